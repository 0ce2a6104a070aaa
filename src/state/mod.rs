//! The in-memory state, shared by everything above it.
//!
//! * [`stock`]: the catalogue of SKUs and, for each, the word that cannot oversell.
//! * [`buyers`]: one record a buyer: keys, recent orders, units toward purchase limits.
//! * [`pending`]: the slots of orders in flight, by id; the meeting place of a buyer that waits
//!   and the worker that writes.
//! * [`recent`]: orders written a moment ago, to answer those who ask again.
//! * [`refusals`]: what buyers were told no to, under their keys; bounded, until a restart.
//! * [`orphans`]: orders that a verified payment waits for.
//! * [`unpaid`]: when unpaid orders fall due.
//! * [`pace`]: how fast the database takes orders of late.
//! * [`progress`]: whether orders are written while orders wait.
//! * [`poison`]: the fail-stop flag.
//!
//! Nothing here knows tokio, `may`, HTTP or SQL. What is full refuses and gives back; what was
//! taken is given back by dropping its guard.

pub mod buyers;
pub mod orphans;
pub mod pace;
pub mod pending;
pub mod poison;
pub mod progress;
pub mod recent;
pub mod refusals;
mod sets;
pub mod stock;
pub mod unpaid;
