//! An open-loop load generator that speaks only HTTP.
//!
//! Buyers in a flash sale do not wait for one another, so neither does the generator: every
//! request has a moment at which it is due, fixed before the run by the [`LoadPlan`] and its seed,
//! and its latency counts from that moment. A server that stalls makes every later request late,
//! and the report says so, instead of the generator politely slowing down with the server
//! ("coordinated omission", Gil Tene).
//!
//! ```text
//! plan ─► schedule (a cursor, never a list) ─► buyers (a thread: N connections) ─► recorder
//!                                                │ placed orders                     │
//!                                                ▼                                   │
//!                                              platform (a thread of its own) ───────┤
//!                                              POST /v1/payments/standard/notify     │
//!                                                                                    │
//!            stock: GET /v1/skus/… every 100 ms        follow_up: GET /v1/orders/…   │
//!            lanes: GET /v1/lanes every 100 ms                                       │
//!            waiting: GET /v1/orders/… of who is next                                │
//!                            └───────────────► report ◄──────────────┴───────────────┘
//!                                                │
//!                                    table (terminal) · page (HTML) · serde (--json)
//! ```
//!
//! The module imports nothing else of this crate: it knows only the public contract of the server,
//! so that it can also check the server against it.

mod arrival;
mod buyers;
pub mod checker;
mod error;
mod follow_up;
mod get;
mod lanes;
mod orders_file;
mod outcome;
mod page;
mod plan;
mod platform;
mod progress;
mod rate;
mod recorder;
mod report;
mod request_template;
mod run;
mod schedule;
pub mod sender;
mod stock;
mod table;
mod target;
mod waiting;

#[cfg(test)]
mod test_server;
#[cfg(test)]
mod tests;

pub use error::LoadError;
pub use lanes::{LaneSeries, LaneSpan};
pub use outcome::{AnswerKind, Outcome, Outcomes};
pub use page::{Check, KilledNode, PageOptions, render_page};
pub use plan::{LoadPlan, OrderMode, SkuShare, Token};
pub use platform::{
    FalseSignatures, Money, PaymentKind, PaymentKindCount, PaymentMessage, PaymentOutcome,
    PaymentReport, WebhookSecret,
};
pub use progress::{Phase, Progress, Silent, Snapshot, StderrProgress};
pub use rate::RateProfile;
pub use report::{
    Distribution, KindCount, LatencySummary, LoadReport, Percentiles, Series, StockSample,
    StockSeries, UndecidedReport,
};
pub use run::{run, run_until};
pub use table::render_table;
pub use waiting::WaitlistReport;
