//! Millrace: flash-sale order intake in front of PostgreSQL.

pub mod http;
pub mod loadgen;
pub mod store;
