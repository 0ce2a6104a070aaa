//! A running service, seen by those who send it requests.

#[path = "../support/mod.rs"]
mod support;

#[allow(dead_code, reason = "the suite of traces uses the rest")]
#[path = "../traces/collector.rs"]
mod collector;

mod connections;
mod contract;
mod doors;
mod draws;
mod end_to_end;
mod failures;
mod http_closing;
mod lost_answers;
mod openapi;
mod parked_orders;
mod passing_on;
mod progress;
mod upgrade;
mod waitlist;

/// The program's, for what is measured here.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;
