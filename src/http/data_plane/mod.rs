//! The data plane, for the shop's backend and for payment platforms.
//!
//! ```text
//!   server ──► router ──┬─► orders   (create, read, cancel)
//!                       ├─► payments (notify, providers)
//!                       └─► skus, draws
//!              each handler: fn(&Context, &Request, &mut Response) -> Result<(), Problem>
//! ```
//!
//! With several [`nodes`], a handler answers if this one owns the buyer's lane, and passes the request on otherwise.
//!
//! The [`router`] authorizes a request, finds its handler and writes the problem that the handler
//! returns. A handler reads its request with [`wire`](super::wire), calls the pipeline, and waits,
//! if it must, by parking its coroutine ([`wake`](super::server::wake)).

pub mod context;
mod draws;
pub mod nodes;
mod orders;
pub mod payments;
pub mod router;
mod skus;
