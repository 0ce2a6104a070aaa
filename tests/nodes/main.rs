//! Several nodes on one database.
//!
//! * `twin`: the transactions of `store::cluster` on a real PostgreSQL, against a naive arbiter, by the same random
//!   operations;
//! * `database`: what an arbiter in memory cannot show: concurrent transactions, locks, a schema of before;
//! * `alone`: a process on its own where nodes have not left;
//! * `counters`: the counters of the whole sale, which one node adds up for all;
//! * `keeping`: what goes with a lane, and what comes with one;
//! * `lending`: the task that lends in running nodes, with buyers at several at once;
//! * `payments`: payments of orders whose lane another node has;
//! * `retention`: which of them deletes old rows;
//! * `stock`: wants that nobody has any more, totals that are lowered at two nodes;
//! * `takeover`: the log of a dead node on a real broker;
//! * `model`: nodes, brokers and clients in virtual time on the naive arbiter, with a planted defect for each rule of
//!   the protocol.
//!
//! `MILLRACE_ROUNDS` (default 1) multiplies the rounds of what is random, `MILLRACE_SEED` replays one run of it.

#[path = "../support/mod.rs"]
mod support;

mod alone;
mod arbiter;
mod counters;
mod database;
mod keeping;
mod lending;
mod model;
mod payments;
mod retention;
mod stock;
mod takeover;
mod twin;
