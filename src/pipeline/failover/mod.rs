//! Restarts, replacement by another process, and failovers of the database.
//!
//! * [`lease`]: renews the right to acknowledge and write; [`health`]: monitors the database;
//! * [`replay`]: writes orders that may be rows already; [`restore`]: detects commits that a failover has lost
//!   and writes them again; [`wal_retention`]: keeps segments of the journal until standbys have their orders.

pub mod health;
pub mod lease;
pub mod replay;
pub mod restore;
pub mod wal_retention;
