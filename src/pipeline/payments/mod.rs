//! Payments, refunds, expiry and assignment of orders that are rows. Four tasks, each with a connection of its own:
//!
//! ```text
//!   providers ──► callbacks ──┐
//!   operators ──► processor ──┼──► store::settlement ──► payments, orders, sku
//!   time      ──► expiry    ──┤          │
//!   units     ──► assigner  ──┘          │
//!                                        └─ after each commit: counters and buyers in memory
//! ```
//!
//! * [`callbacks`]: stores the messages of payment providers and matches payments to orders;
//! * [`processor`]: refunds and decisions of operators; [`reconciler`]: orphan payments (payments without an
//!   order);
//! * [`expiry`]: expires orders that were not paid in time;
//! * [`assigner`]: assigns units that come back to the orders that wait for them;
//! * [`settler`]: the parts that all of them share.

pub mod assigner;
pub mod callbacks;
pub mod expiry;
pub mod processor;
pub mod reconciler;
pub mod settler;
