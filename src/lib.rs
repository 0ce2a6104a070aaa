//! Millrace: flash-sale order intake in front of PostgreSQL. It holds stock in memory, writes accepted orders
//! with COPY, and answers every buyer truthfully.
//!
//! ```text
//!             data plane                                              PostgreSQL
//!  client ─► http ─► intake ─► queue ─► worker (×N) ─► store ── COPY ──►  orders, sku
//!               ▲      │ holds stock        │ settles
//!               │      ▼                    ▼
//!               └── state: stock · buyers · pending · poison
//! ```
//!
//! Calls go right and down only; the reply travels back as data, because [`state::pending`] lies below both
//! ends. `ARCHITECTURE.md` has the map and the promises.

pub mod app;
pub mod backoff;
pub mod cli;
pub mod clock;
pub mod config;
pub mod faults;
pub mod http;
pub mod loadgen;
pub mod logging;
pub mod metrics;
pub mod order;
pub mod pipeline;
pub mod profile;
pub mod queue;
#[cfg(feature = "faults")]
pub mod simulated;
pub mod spans;
pub mod state;
pub mod store;
pub mod supervise;
mod sync;
