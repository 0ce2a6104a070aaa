//! What several integration tests share.
#![allow(
    dead_code,
    reason = "every test binary compiles this module and uses a part of it"
)]

pub mod http;
pub mod listening;
pub mod pgbouncer;
pub mod postgres;
pub mod server;
