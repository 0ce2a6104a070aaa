//! The default engine: HTTP/1.1 on coroutines, safe to face clients that are slow, broken or
//! hostile.
//!
//! ```text
//!   listener ─► acceptor (thread) ─► connection (coroutine each) ─► Service
//!                   │ makes room           │ phase, by one word
//!                   ▼                      ▼
//!                registry ◄── reaper (thread): clock, deadlines, release
//! ```
//!
//! These hold for any input:
//!
//! - The service runs only for a request whose head and body are complete and framed beyond doubt
//!   ([`framing`]); no byte of one request is ever read as part of another.
//! - Before a body is read, its head is authorized ([`Service::authorize`](super::Service::authorize))
//!   and its bytes are reserved from the budget that all connections share
//!   ([`Limits::body_bytes_total_max`]).
//! - Answers leave in the order of their requests. They are written as soon as no further complete
//!   request is at hand, or when the next one parks, whichever comes first: an answer never waits
//!   behind another request's wait, and a pipeline of quick requests shares a write.
//! - Refusals of the engine (`4xx`, `5xx` of framing) come after the answers that are due, and end
//!   the connection. The rest of its input is thrown away for a bounded time, not served.
//! - A request has [`Limits::request_timeout`] from its first byte to its last, or is answered
//!   `408`; the client as long to take an answer; a connection [`Limits::idle_timeout`] between
//!   requests. The last two end in a close without a word, and none of them cuts a request that is
//!   inside the service.
//! - Memory for a connection grows with the bytes that came, up to the limits, and shrinks when it
//!   falls idle. Connections and descriptors are bounded.

mod acceptor;
mod budget;
mod clock;
mod conn_state;
mod connection;
mod counters;
mod encode;
pub mod framing;
mod outbox;
mod reaper;
mod registry;
pub mod scripted;
mod server;
mod shared;
mod transport;

pub use super::limits::Limits;
pub use counters::{CloseReason, Counters};
pub use server::{Server, serve, serve_supervised};
