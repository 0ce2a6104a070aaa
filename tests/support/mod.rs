//! What several integration tests share.
#![allow(
    dead_code,
    reason = "every test binary compiles this module and uses a part of it"
)]

pub mod allocations;
pub mod broker_admin;
pub mod brokers;
pub mod browser;
pub mod http;
pub mod listening;
pub mod pgbouncer;
pub mod pipe;
pub mod postgres;
pub mod proxy;
pub mod relay;
pub mod sale;
pub mod served;
pub mod server;
pub mod standby;
pub mod waiting;
pub mod webhook;
pub mod wire;

/// Runs a test on a runtime with room for many blocking callers.
pub fn block_on(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(4)
        .max_blocking_threads(600)
        .enable_all()
        .build()
        .expect("a runtime")
        .block_on(test);
}
