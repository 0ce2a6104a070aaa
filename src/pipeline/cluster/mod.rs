//! Several nodes serve one sale. The transactions are in [`crate::store::cluster`], the lanes in memory in
//! [`crate::state::lanes`].
//!
//! * [`watch`]: when another node is suspect, and [`balance`]: which lanes should move; both need neither PostgreSQL nor
//!   a clock, so a model can drive them;
//! * [`member`]: renewing, and seeing the other nodes;
//! * [`lane_keeper`]: opening, closing and handing over lanes;
//! * [`held`]: lanes that do not move while their orders do;
//! * [`lending`]: the node's shares of stock, and [`moved_units`]: those that come and go with lanes;
//! * [`hints`]: what nodes tell each other, so that they need not ask the database often;
//! * [`lists`]: who waits for units, at whatever node;
//! * [`terms`]: operators' changes at other nodes;
//! * [`takeover`]: replaying the log of a node that is gone, and taking its lanes over.
//!
//! [docs/NODES.md](../../../docs/NODES.md) says what stands and what does not.

pub mod balance;
pub mod held;
pub mod hints;
pub mod lane_keeper;
pub mod lending;
pub mod lists;
pub mod member;
pub mod moved_units;
mod own_share;
pub mod takeover;
pub mod terms;
mod timer;
pub mod watch;
