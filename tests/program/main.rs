//! The program as a process, with what it writes and whom it talks to: files, logs, brokers, the embedded cluster, other
//! nodes.

#[path = "../support/mod.rs"]
mod support;

mod brokers;
mod embedded;
mod journal;
mod logging;
mod order_log;
mod peers;
mod preflight;
mod process;
mod profile;
mod supervision;
