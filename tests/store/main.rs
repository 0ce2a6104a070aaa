//! The store, on a real PostgreSQL with a database a test: rows, batches, fences, schema,
//! recovery, audit, deletion of old rows.
//!
//! `MILLRACE_ROUNDS` (default 1) multiplies the rounds of what is random, `MILLRACE_SEED` replays
//! one run of it.

#[path = "../support/mod.rs"]
mod support;

mod audit;
mod batches;
mod draws;
mod fence;
mod lanes;
mod outcome;
mod present;
mod pruning;
mod recovery;
mod rows;
mod tables;
mod upgrade;
