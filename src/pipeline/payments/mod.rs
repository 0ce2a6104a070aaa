//! What happens to an order after its row is there. Three tasks, each with a connection of its own:
//!
//! ```text
//!   providers ──► callbacks ──┐
//!   operators ──► processor ──┼──► store::settlement ──► payments, orders, sku
//!   time      ──► expiry    ──┘          │
//!                                        └─ after each commit: counters and buyers in memory
//! ```
//!
//! * [`callbacks`]: messages of payment providers are stored, and payments matched to orders;
//! * [`processor`]: refunds and decisions of operators; [`reconciler`]: payments without an order;
//! * [`expiry`]: orders that were not paid in time;
//! * [`settler`]: the parts that all three share.

pub mod callbacks;
pub mod expiry;
pub mod processor;
pub mod reconciler;
pub mod settler;
