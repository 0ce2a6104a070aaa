//! The pipeline on a real PostgreSQL: intake, queue, workers, state and deadlines, wired as the
//! application wires them, without HTTP.
//!
//! `MILLRACE_ROUNDS` (default 1) multiplies the orders of what is random, `MILLRACE_OUTAGE_S`
//! (default 2) is how long PostgreSQL is away.

#[path = "../support/mod.rs"]
mod support;

mod cancels;
mod drain;
mod faults;
mod flow;
mod line;
mod lost;
mod outages;
mod worker_pool;
