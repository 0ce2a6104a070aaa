//! Restarts, replacement by another process, and failovers of the database.
//!
//! * [`lease`]: renews the right to acknowledge and write; [`health`]: monitors the database;
//! * [`loading`]: reads orders back into memory; [`replay`]: writes orders that may be rows already; [`log_replay`]: those of an order log; [`restore`]: detects commits that a failover has lost
//!   and writes them again; [`wal_retention`]: keeps spans of the order log until standbys have their orders;
//! * [`log_place`]: the place of a broker's log in the database.

pub mod health;
pub mod lease;
pub mod loading;
pub mod log_place;
pub mod log_replay;
pub mod replay;
pub mod restore;
pub mod wal_retention;
