//! An open-loop load generator that speaks only HTTP.
//!
//! Buyers in a flash sale do not wait for one another, so neither does the generator: every
//! request has a moment at which it is due, fixed before the run by the [`LoadPlan`] and its seed,
//! and its latency counts from that moment. A server that stalls makes every later request late,
//! and the report says so, instead of the generator politely slowing down with the server
//! ("coordinated omission", Gil Tene).
//!
//! ```text
//! plan ─► schedule (a cursor, never a list) ─► worker (a thread: N connections) ─► recorder
//!                                                │ orders placed                     │
//!                                                ▼                                   │
//!                          fate (by seed) ─► merchant (a thread of its own) ─────────┤
//!                                            POST /v1/payments/standard/notify       │
//!                                                                                    │
//!            stock: GET /v1/skus/… every 100 ms        follow_up: GET /v1/orders/…   │
//!                            └───────────────► report ◄──────────────┴───────────────┘
//!                                                │
//!                                    table (terminal) · page (HTML) · serde (--json)
//! ```
//!
//! The module imports nothing else of this crate: what it knows of the server is the public
//! contract, so that it can also judge it.

mod click;
mod client;
mod error;
mod fate;
mod follow_up;
mod histogram;
mod merchant;
mod orders_file;
mod outcome;
mod page;
mod payment;
mod payment_report;
mod plan;
mod progress;
mod rate;
mod recorder;
mod report;
mod run;
mod schedule;
mod stock;
mod table;
mod target;
mod webhook;
mod worker;

#[cfg(test)]
mod payment_tests;
#[cfg(test)]
mod test_server;
#[cfg(test)]
mod tests;

pub use error::LoadError;
pub use outcome::{AnswerKind, Outcomes, Told};
pub use page::{PageOptions, Promise, render_page};
pub use payment::PaymentKind;
pub use payment_report::{FalseSignatures, Money, PaymentKindCount, PaymentReport, PaymentTold};
pub use plan::{LoadPlan, OrderMode, SkuShare, Token};
pub use progress::{Phase, Progress, Silent, Snapshot, StderrProgress};
pub use rate::RateProfile;
pub use report::{
    Distribution, KindCount, LatencySummary, LoadReport, Percentiles, Series, StockSample,
    StockSeries, UndecidedReport,
};
pub use run::{run, run_until};
pub use table::render_table;
pub use webhook::WebhookSecret;
