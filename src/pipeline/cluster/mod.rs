//! Several nodes serve one sale. The transactions are in [`crate::store::cluster`], the lanes in memory in
//! [`crate::state::lanes`].
//!
//! * [`watch`]: when another node is suspect, and [`balance`]: which lanes should move; both need neither PostgreSQL nor
//!   a clock, so a model can drive them;
//! * [`lending`]: the node's shares of stock;
//! * [`terms`]: operators' changes at other nodes;
//! * [`takeover`]: replaying the log of a node that is gone.
//!
//! [docs/NODES.md](../../../docs/NODES.md) says what stands and what does not.

pub mod balance;
pub mod lending;
pub mod takeover;
pub mod terms;
pub mod watch;
