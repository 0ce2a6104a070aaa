//! The checker of a sale: requests and answers of clients against the rows of the database.
//!
//! ```text
//!  client ─► asks / answered ─► Checker ────────────┐
//!                                                   ├─► check ─► Findings
//!  platform ─► sent, acknowledged ► PaymentHistory ─┤
//!                                                   │
//!  database ─► order_list, sku_list, payment_list ──┘ (StoredRows)
//! ```
//!
//! It knows the public contract and the public views, and nothing of how Millrace works: what a client
//! was told must be true of the rows. `millrace demo` holds its sale against it, and the proofs
//! (`tests/proof`) every load that they put on a server while it is killed or its database fails.
//! `millrace audit` is another check, of the database against itself.

mod orders;
mod payments;

use std::collections::BTreeMap;
use std::fmt;

use serde_json::Value;

pub use self::orders::{Attempt, AttemptRecord, Checker, Claim, OrderAnswer, OrderRequest};
pub use self::payments::{Expected, KnownOrder, PaymentFindings, PaymentHistory, SentPayment};

/// A row of `order_list`.
#[derive(Clone, Debug)]
pub struct OrderRow {
    /// Its id.
    pub order_id: i64,
    /// Whose order it is.
    pub user: String,
    /// Of which SKU.
    pub sku: String,
    /// Units.
    pub quantity: i64,
    /// In minor units.
    pub adjustment: i64,
    /// In minor units.
    pub amount: i64,
    /// Its status.
    pub status: String,
    /// Why its money has to go back, or went back.
    pub refund_reason: Option<String>,
    /// Its attributes.
    pub attributes: Option<Value>,
}

/// A row of `payment_list`.
#[derive(Clone, Debug)]
pub struct PaymentRow {
    /// Its number.
    pub id: i64,
    /// The platform's id.
    pub payment: String,
    /// The order as the platform named it.
    pub order: String,
    /// In minor units.
    pub amount: i64,
    /// Its currency.
    pub currency: String,
    /// Its state.
    pub state: String,
    /// Why it has to go back, or went back.
    pub refund_reason: Option<String>,
}

/// A row of `sku_list`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SkuRow {
    /// All units.
    pub total: i64,
    /// Units of orders that are to be paid.
    pub held: i64,
    /// Units of orders that are paid.
    pub sold: i64,
}

/// Rows of the database, all of one moment.
#[derive(Clone, Debug, Default)]
pub struct StoredRows {
    /// `order_list`.
    pub orders: Vec<OrderRow>,
    /// `sku_list`.
    pub skus: BTreeMap<String, SkuRow>,
    /// `payment_list`.
    pub payments: Vec<PaymentRow>,
}

/// The result of a comparison. Everything that is wrong is in `faults`, and most of it in a figure too.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    /// Orders that clients were told are there, or will be.
    pub acked: u64,
    /// Of these, those whose row is there, as the order was requested.
    pub present: u64,
    /// Of these, those whose row is missing.
    pub lost: u64,
    /// Of these, those whose row differs from the request.
    pub changed: u64,
    /// Orders beyond one for a key, by rows or by answers.
    pub duplicated: u64,
    /// Rows beyond one for a key.
    pub second_rows: u64,
    /// Keys whose answers named several orders, or an order and later none.
    pub contradicted: u64,
    /// Rows of requests that were refused.
    pub refused_but_present: u64,
    /// Rows that no request explains.
    pub unexplained: u64,
    /// Units sold beyond the total.
    pub oversold: i64,
    /// Units by which counters and rows differ.
    pub leaked: i64,
    /// Requests that were refused.
    pub refused: u64,
    /// Orders that were cancelled.
    pub cancelled: u64,
    /// Requests without an answer.
    pub unanswered: u64,
    /// Acknowledged orders that some client was only told to be durable in the queue.
    pub respond_async: u64,
    /// Findings about payments, if any were made.
    pub payments: PaymentFindings,
    /// Everything that is wrong, in words.
    pub faults: Vec<String>,
}

impl Findings {
    /// Whether every promise was kept.
    pub fn holds(&self) -> bool {
        self.acked == self.present
            && self.duplicated == 0
            && self.refused_but_present == 0
            && self.oversold == 0
            && self.leaked == 0
            && self.payments.adds_up()
            && self.faults.is_empty()
    }

    /// The figures with the first faults.
    pub fn into_words(self) -> String {
        let shown: Vec<String> = self.faults.iter().take(5).cloned().collect();
        let more = self.faults.len() - shown.len();
        format!("{self}: {} (and {more} more)", shown.join("; "))
    }

    /// Adds the findings of another database.
    pub fn add(&mut self, other: &Findings) {
        for (own, others) in [
            (&mut self.acked, other.acked),
            (&mut self.present, other.present),
            (&mut self.lost, other.lost),
            (&mut self.changed, other.changed),
            (&mut self.duplicated, other.duplicated),
            (&mut self.second_rows, other.second_rows),
            (&mut self.contradicted, other.contradicted),
            (&mut self.refused_but_present, other.refused_but_present),
            (&mut self.unexplained, other.unexplained),
            (&mut self.refused, other.refused),
            (&mut self.cancelled, other.cancelled),
            (&mut self.unanswered, other.unanswered),
            (&mut self.respond_async, other.respond_async),
        ] {
            *own += others;
        }
        self.oversold += other.oversold;
        self.leaked += other.leaked;
        self.payments.add(&other.payments);
        self.faults.extend_from_slice(&other.faults);
    }

    /// Notes something that is wrong.
    pub fn fault(&mut self, fault: String) {
        self.faults.push(fault);
    }
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "acked={} present={} duplicated={} refused_but_present={} oversold={} leaked={} \
             async={} refused={} cancelled={} unanswered={}",
            self.acked,
            self.present,
            self.duplicated,
            self.refused_but_present,
            self.oversold,
            self.leaked,
            self.respond_async,
            self.refused,
            self.cancelled,
            self.unanswered,
        )?;
        write!(f, "{}", self.payments)
    }
}
