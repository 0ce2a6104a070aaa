//! Every promise that the database can show, recomputed and compared with the live counters.

use std::collections::BTreeMap;

use serde::Serialize;

use super::ledger::Ledger;
use crate::order::SkuId;
use crate::order::payment::PaymentState;
use crate::store::StoreError;
use crate::store::postgres::Database;
use crate::store::postgres::audit::{DatabaseAudit, PaymentSum, SkuAudit};

/// The name of the check that is left out while anything is in flight or moves.
pub const LIVE_CHECK: &str = "live counters are those of the database";

/// The verdict on every promise that the database can show.
#[derive(Debug, Serialize)]
pub struct Audit {
    /// Whether every check holds.
    pub ok: bool,
    /// Each check.
    pub checks: Vec<Check>,
    /// Each SKU's figures.
    pub skus: Vec<SkuFigures>,
    /// Rows of `orders`.
    pub orders: i64,
    /// Dead letters.
    pub dead_letters: i64,
    /// Where the money is that came in.
    pub payments: Money,
    /// Orders in flight while it was made; with any, live counters may be ahead of the rows.
    pub orders_in_flight: Option<usize>,
}

/// Where the money is: `received` is the sum of the others.
#[derive(Debug, Default, Serialize)]
pub struct Money {
    /// Everything that came in.
    pub received: Sum,
    /// What has paid its order.
    pub matched: Sum,
    /// What has not found its order yet.
    pub orphan: Sum,
    /// What has to go back.
    pub refund_due: Sum,
    /// What went back.
    pub refunded: Sum,
    /// Payments that have to go back, by why.
    pub refund_reasons: BTreeMap<String, i64>,
}

/// A number of payments and their amounts in minor units, by currency.
#[derive(Debug, Default, Serialize)]
pub struct Sum {
    /// How many.
    pub count: i64,
    /// Their sum in each currency.
    pub amount: BTreeMap<String, i128>,
}

impl Sum {
    fn add(&mut self, sum: &PaymentSum) {
        self.count += sum.count;
        *self.amount.entry(sum.currency.clone()).or_default() += sum.amount;
    }
}

impl Money {
    fn of(sums: &[PaymentSum]) -> Self {
        let mut money = Money::default();
        for sum in sums {
            money.received.add(sum);
            match PaymentState::from_word(&sum.state) {
                Some(PaymentState::Orphan) => money.orphan.add(sum),
                Some(PaymentState::Matched) => money.matched.add(sum),
                Some(PaymentState::RefundDue) => {
                    money.refund_due.add(sum);
                    let reason = sum.reason.clone().unwrap_or_default();
                    *money.refund_reasons.entry(reason).or_default() += sum.count;
                }
                Some(PaymentState::Refunded) => money.refunded.add(sum),
                // The table's CHECK knows no other.
                None => {}
            }
        }
        money
    }
}

/// One check.
#[derive(Debug, Serialize)]
pub struct Check {
    /// The promise, as numbered in ARCHITECTURE.md.
    pub promise: &'static str,
    /// What has to hold.
    pub name: &'static str,
    /// Whether it does.
    pub ok: bool,
    /// The figures that say so.
    pub detail: String,
}

/// One SKU's counters as each source has them, in units.
#[derive(Debug, Serialize)]
pub struct SkuFigures {
    sku_id: String,
    total: i64,
    held: i64,
    sold: i64,
    held_by_orders: i64,
    sold_by_orders: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    live: Option<LiveFigures>,
}

/// The counters in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct LiveFigures {
    total: u32,
    free: u32,
    held: u32,
    sold: u32,
}

/// Audits the database, and the live counters where `ledger` is given.
///
/// # Errors
/// Where the database does not answer.
pub async fn audit(database: &Database, ledger: Option<&Ledger>) -> Result<Audit, StoreError> {
    // Memory and rows are of the same moment only if nothing was in flight on either side of the
    // snapshot (an order in flight is in memory and not yet in the rows) and no counter moved.
    let in_flight = || ledger.map(|ledger| ledger.pending.in_flight());
    let before = (in_flight(), ledger.map(live));
    let found = database.audit().await?;
    let after = (in_flight(), ledger.map(live));
    let quiet = before == after && after.0 == Some(0);
    let (in_flight, after) = after;
    Ok(judge(&found, after.as_deref(), in_flight, quiet))
}

fn live(ledger: &Ledger) -> Vec<(SkuId, LiveFigures)> {
    let skus = ledger.catalogue.all().into_iter();
    skus.map(|sku| {
        let stock = sku.counter().snapshot();
        let figures = LiveFigures {
            total: stock.total,
            free: stock.free,
            held: stock.held,
            sold: stock.sold,
        };
        (SkuId::clone(&sku.id), figures)
    })
    .collect()
}

fn judge(
    found: &DatabaseAudit,
    live: Option<&[(SkuId, LiveFigures)]>,
    in_flight: Option<usize>,
    quiet: bool,
) -> Audit {
    let live_of = |sku_id: &str| {
        live.and_then(|all| all.iter().find(|(id, _)| id.as_str() == sku_id))
            .map(|(_, figures)| *figures)
    };
    let mut checks = vec![
        over_skus(found, "I1", "no SKU is oversold", |sku| {
            (sku.held_by_orders + sku.sold_by_orders > sku.total).then(|| {
                format!(
                    "{}: orders hold {} and have bought {} of {}",
                    sku.sku_id, sku.held_by_orders, sku.sold_by_orders, sku.total
                )
            })
        }),
        over_skus(found, "I2", "counters are those of the orders", |sku| {
            (sku.held != sku.held_by_orders || sku.sold != sku.sold_by_orders).then(|| {
                let explained = (sku.total, sku.held, sku.sold) == sku.journal && sku.gaps.is_empty();
                let cause = if explained {
                    "the stock journal explains the counters, so rows of orders were changed by hand"
                } else {
                    "the counters changed without an entry in the stock journal, see there"
                };
                format!(
                    "{}: held {} sold {}, but orders hold {} and have bought {}: {cause}",
                    sku.sku_id, sku.held, sku.sold, sku.held_by_orders, sku.sold_by_orders
                )
            })
        }),
        over_skus(
            found,
            "I2",
            "the stock journal explains every counter",
            |sku| {
                let wrong =
                    (sku.total, sku.held, sku.sold) != sku.journal || sku.journal_breaks > 0;
                wrong.then(|| {
                let (total, held, sold) = sku.journal;
                format!(
                    "{}: total {} held {} sold {}, but its changes add up to {total}, {held}, {sold}: \
                     the row or its journal was edited by hand, {}",
                    sku.sku_id, sku.total, sku.held, sku.sold, sku.gaps.join(", ")
                )
            })
            },
        ),
        count("I4", "no key has two orders", found.duplicated_keys),
        count(
            "I2",
            "every order is of a known SKU",
            found.orders_without_sku,
        ),
        count(
            "I5",
            "no order is both written and refused",
            found.both_row_and_dead_letter,
        ),
    ];
    let faults = &found.payment_faults;
    checks.extend([
        count(
            "I7",
            "every payment that was reported is booked, and no other",
            faults.events_without_payment + faults.payments_without_event,
        ),
        count(
            "I7",
            "every paid order is paid by exactly one payment of its amount",
            faults.paid_without_payment + faults.matched_without_paid_order,
        ),
        count(
            "I7",
            "every order whose money has to go back has a payment that has to",
            faults.refund_due_without_payment,
        ),
    ]);
    if quiet {
        checks.push(over_skus(found, "I2", LIVE_CHECK, |sku| {
            let figures = live_of(&sku.sku_id)?;
            let same = i64::from(figures.total) == sku.total
                && i64::from(figures.held) == sku.held
                && i64::from(figures.sold) == sku.sold;
            (!same).then(|| format!("{}: memory has {figures:?}", sku.sku_id))
        }));
    }
    Audit {
        ok: checks.iter().all(|check| check.ok),
        checks,
        skus: found
            .skus
            .iter()
            .map(|sku| SkuFigures {
                sku_id: sku.sku_id.clone(),
                total: sku.total,
                held: sku.held,
                sold: sku.sold,
                held_by_orders: sku.held_by_orders,
                sold_by_orders: sku.sold_by_orders,
                live: live_of(&sku.sku_id),
            })
            .collect(),
        orders: found.orders,
        dead_letters: found.dead_letters,
        payments: Money::of(&found.payments),
        orders_in_flight: in_flight,
    }
}

fn over_skus(
    found: &DatabaseAudit,
    promise: &'static str,
    name: &'static str,
    fault: impl Fn(&SkuAudit) -> Option<String>,
) -> Check {
    let faults: Vec<String> = found.skus.iter().filter_map(fault).collect();
    Check {
        promise,
        name,
        ok: faults.is_empty(),
        detail: if faults.is_empty() {
            format!("{} SKUs", found.skus.len())
        } else {
            faults.join("; ")
        },
    }
}

fn count(promise: &'static str, name: &'static str, faults: i64) -> Check {
    Check {
        promise,
        name,
        ok: faults == 0,
        detail: format!("{faults} found"),
    }
}
