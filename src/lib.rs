//! Millrace: flash-sale order intake in front of PostgreSQL.

pub mod app;
pub mod cli;
pub mod config;
pub mod http;
pub mod loadgen;
pub mod metrics;
pub mod order;
pub mod pipeline;
pub mod queue;
pub mod state;
pub mod store;
