//! The audit of a running service: recomputes every promise that the database can show and compares the result
//! with the live counters.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::Mutex;

use crate::order::SkuId;
use crate::order::payment::PaymentState;
use crate::state::State;
use crate::store::StoreError;
use crate::store::postgres::Database;
use crate::store::postgres::audit::{
    self, DatabaseAudit, Motion, PartRows, PaymentFaults, PaymentSum, SkuAudit,
};

/// The name of the check that is omitted while orders are in flight or counters move.
pub const LIVE_CHECK: &str = "live counters are those of the database";

/// Time for which units may be kept for an order that could have them, until it is a fault.
const OVERDUE: Duration = Duration::from_secs(1);

/// Audits a running service, one at a time.
#[derive(Debug)]
pub struct Auditor {
    database: Database,
    state: Arc<State>,
    timeout: Duration,
    running: Mutex<()>,
}

impl Auditor {
    /// An auditor that aborts an audit after `timeout`.
    pub fn new(database: Database, state: Arc<State>, timeout: Duration) -> Self {
        Auditor {
            database,
            state,
            timeout,
            running: Mutex::new(()),
        }
    }

    /// Audits the database and the live counters. Ends, with its connection, when it is dropped.
    ///
    /// # Errors
    /// [`StoreError::AuditRunning`] if another audit has not ended, [`StoreError::AuditTimeout`] after the
    /// configured time, or the database's error.
    pub async fn audit(&self) -> Result<Audit, StoreError> {
        let _running = self
            .running
            .try_lock()
            .map_err(|_| StoreError::AuditRunning)?;
        within(self.timeout, audit(&self.database, Some(&self.state))).await
    }
}

/// Aborts an audit after `timeout`.
///
/// # Errors
/// [`StoreError::AuditTimeout`], and those of the audit.
pub async fn within(
    timeout: Duration,
    audit: impl Future<Output = Result<Audit, StoreError>>,
) -> Result<Audit, StoreError> {
    tokio::time::timeout(timeout, audit)
        .await
        .map_err(|_| StoreError::AuditTimeout { after: timeout })?
}

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
    /// Orders that `retention` has deleted.
    pub orders_pruned: i64,
    /// Dead letters.
    pub dead_letters: i64,
    /// The money received, by state.
    pub payments: Money,
    /// Orders in flight during the audit; if there are any, live counters may be ahead of the rows.
    pub orders_in_flight: Option<usize>,
}

/// Received money by state: `received` is the sum of the others.
#[derive(Debug, Default, Serialize)]
pub struct Money {
    /// All payments.
    pub received: Sum,
    /// Payments that paid their order.
    pub matched: Sum,
    /// Payments without an order so far.
    pub orphan: Sum,
    /// Payments that have to be refunded.
    pub refund_due: Sum,
    /// Payments that were refunded.
    pub refunded: Sum,
    /// Payments that have to be refunded, by reason.
    pub refund_reasons: BTreeMap<String, i64>,
}

/// A number of payments and their amounts in minor units, by currency.
#[derive(Debug, Default, Serialize)]
pub struct Sum {
    /// Number of payments.
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
    /// The condition.
    pub name: &'static str,
    /// Whether it holds.
    pub ok: bool,
    /// False: units moved while the orders were read, and the figures agree only within the units moved.
    pub decided: bool,
    /// The figures.
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
    /// Orders that wait for units.
    waiting: i64,
    /// Maximum error of the two sums in units, because units moved while the orders were read.
    moved: i64,
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
    /// Part of `held`: units that no order holds, kept for waiting ones.
    kept: u32,
    /// Orders on the waiting list.
    waiting: usize,
    /// The node that has these of its share.
    #[serde(skip)]
    node: Option<i16>,
    /// Milliseconds for which units have been kept that the next order could have.
    #[serde(skip)]
    overdue_ms: u128,
}

/// Audits the database, and the live counters if `state` is given.
///
/// # Errors
/// [`StoreError::AuditRunning`] if another audit has not ended, or the database's error.
pub async fn audit(database: &Database, state: Option<&State>) -> Result<Audit, StoreError> {
    audit_in_parts(database, state, PartRows::default()).await
}

/// The same with parts of the given size.
///
/// # Errors
/// As [`audit()`].
pub async fn audit_in_parts(
    database: &Database,
    state: Option<&State>,
    rows: PartRows,
) -> Result<Audit, StoreError> {
    // Memory and rows show the same moment only if no order was in flight before and after the rows'
    // snapshot (an order in flight is in memory and not yet a row), no change of rows was on its way to memory,
    // and no counter moved.
    let look = || {
        state.map(|state| Look {
            in_flight: state.pending.in_flight(),
            row_changes: state.row_changes.at_rest(),
            live: live(state),
        })
    };
    let (found, [before, after]) = audit::run_watching(database, rows, look).await?;
    let is_quiet = |look: &Look| look.in_flight == 0 && look.row_changes.is_some();
    let quiet = before == after && after.as_ref().is_some_and(is_quiet);
    let in_flight = after.as_ref().map(|look| look.in_flight);
    let after = after.map(|look| look.live);
    Ok(result(&found, after.as_deref(), in_flight, quiet))
}

/// Memory at one moment.
#[derive(PartialEq, Eq)]
struct Look {
    in_flight: usize,
    row_changes: Option<u64>,
    live: Vec<(SkuId, LiveFigures)>,
}

fn live(state: &State) -> Vec<(SkuId, LiveFigures)> {
    let skus = state.catalogue.all().into_iter();
    skus.map(|sku| {
        let stock = sku.counter().snapshot();
        let figures = LiveFigures {
            total: stock.total,
            free: stock.free,
            held: stock.held,
            sold: stock.sold,
            kept: sku.counter().kept(),
            waiting: sku.waitlist().len(),
            node: sku.shared().map(|shared| shared.node),
            overdue_ms: match sku.waitlist().overdue() {
                overdue if overdue > OVERDUE => overdue.as_millis(),
                _ => 0,
            },
        };
        (SkuId::clone(&sku.id), figures)
    })
    .collect()
}

/// Evaluates the figures of database and memory. `quiet`: both are of one moment.
fn result(
    found: &DatabaseAudit,
    live: Option<&[(SkuId, LiveFigures)]>,
    in_flight: Option<usize>,
    quiet: bool,
) -> Audit {
    let live_of = |sku_id: &str| {
        live.and_then(|all| all.iter().find(|(id, _)| id.as_str() == sku_id))
            .map(|(_, figures)| *figures)
    };
    let mut checks = order_checks(found);
    checks.extend(payment_checks(&found.payment_faults));
    if found.skus.iter().any(|sku| !sku.shares.is_empty()) {
        checks.push(shares_check(found));
        let name = "every order that waits has its turn";
        checks.push(over_skus(found, "I5", name, |sku| {
            let is_wrong = found.at_one_moment && sku.entries != sku.waiting;
            is_wrong.then(|| {
                format!(
                    "{}: {} orders wait, and its list has {} entries",
                    sku.sku_id, sku.waiting, sku.entries
                )
            })
        }));
    }
    if found.is_by_lane {
        let name = "each node holds the units of its lanes' orders";
        checks.push(over_skus(found, "I2", name, |sku| {
            let wrong = sku.misplaced.first()?;
            Some(format!("{}: {wrong:?}", sku.sku_id))
        }));
    }
    if quiet {
        checks.push(live_check(found, live_of));
    }
    if live.is_some() {
        checks.push(overdue_check(found, live_of));
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
                waiting: sku.waiting,
                moved: moved(sku),
                live: live_of(&sku.sku_id),
            })
            .collect(),
        orders: found.orders,
        orders_pruned: found.orders_pruned,
        dead_letters: found.dead_letters,
        payments: Money::of(&found.payments),
        orders_in_flight: in_flight,
    }
}

/// Orders against counters and the stock log, and orders among themselves.
fn order_checks(found: &DatabaseAudit) -> Vec<Check> {
    let mut checks = vec![
        over_skus(found, "I1", "no SKU is oversold", |sku| {
            // The fewest units that can have been held and sold when the first orders were read.
            let least =
                sku.held_by_orders + sku.sold_by_orders - sku.motion.held_in - sku.motion.sold_in;
            (least > sku.before.0).then(|| {
                format!(
                    "{}: orders hold {} and have bought {} of {}{}",
                    sku.sku_id,
                    sku.held_by_orders,
                    sku.sold_by_orders,
                    sku.total,
                    at_most_moved(sku)
                )
            })
        }),
        over_skus(found, "I2", "counters are those of the orders", |sku| {
            let (_, held, sold) = sku.before;
            let Motion {
                held_in,
                held_out,
                sold_in,
                sold_out,
            } = sku.motion;
            let agree = (held - held_out..=held + held_in).contains(&sku.held_by_orders)
                && (sold - sold_out..=sold + sold_in).contains(&sku.sold_by_orders);
            (!agree).then(|| {
                let explained =
                    (sku.total, sku.held, sku.sold) == sku.journal && sku.gaps.is_empty();
                let cause = if explained {
                    "the stock log explains the counters, so rows of orders were changed by hand"
                } else {
                    "the counters changed without an entry in the stock log, see there"
                };
                format!(
                    "{}: held {held} sold {sold}, but orders hold {} and have bought {}{}: {cause}",
                    sku.sku_id,
                    sku.held_by_orders,
                    sku.sold_by_orders,
                    at_most_moved(sku)
                )
            })
        }),
        over_skus(found, "I2", "the stock log explains every counter", |sku| {
            let wrong = (sku.total, sku.held, sku.sold) != sku.journal || sku.journal_breaks > 0;
            wrong.then(|| {
                let (total, held, sold) = sku.journal;
                format!(
                    "{}: total {} held {} sold {}, but its changes add up to {total}, {held}, {sold}: \
                     the row or its stock log was edited by hand, {}",
                    sku.sku_id, sku.total, sku.held, sku.sold, sku.gaps.join(", ")
                )
            })
        }),
        over_skus(
            found,
            "I5",
            "waiting orders are served in their order",
            |sku| {
                sku.is_overtaken.then(|| {
                    format!(
                        "{}: an order waits that joined before one that was served",
                        sku.sku_id
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
    let moving: Vec<String> = found
        .skus
        .iter()
        .filter(|sku| !sku.motion.is_none())
        .map(|sku| format!("{} moved {} units", sku.sku_id, moved(sku)))
        .collect();
    if !moving.is_empty() {
        for check in checks.iter_mut().take(2).filter(|check| check.ok) {
            check.decided = false;
            check.detail = format!(
                "{}; exact but for what moved while the orders were read: {}",
                check.detail,
                moving.join(", ")
            );
        }
    }
    checks
}

/// Payments against the messages of their providers and against orders.
fn payment_checks(faults: &PaymentFaults) -> [Check; 3] {
    [
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
    ]
}

/// Compares rows with memory.
fn live_check(found: &DatabaseAudit, live_of: impl Fn(&str) -> Option<LiveFigures>) -> Check {
    over_skus(found, "I2", LIVE_CHECK, |sku| {
        let figures = live_of(&sku.sku_id)?;
        let (total, held, sold) = match figures.node {
            // Those of its parked orders that are of its lanes are held in memory, and not in its share.
            Some(node) if sku.parked > 0 => {
                let (total, held, sold) = sku.share_of(node);
                let parked = i64::from(figures.held) - i64::from(figures.kept) - held;
                (total, held + parked.clamp(0, sku.parked), sold)
            }
            Some(node) => sku.share_of(node),
            // While it has parked orders, its row is known to be wrong.
            None if sku.parked > 0 => {
                let held = sku.held_by_orders + sku.parked;
                (figures.total.into(), held, sku.sold)
            }
            None => (sku.total, sku.held, sku.sold),
        };
        // Kept units are free in the database, until they are assigned.
        let same = i64::from(figures.total) == total
            && i64::from(figures.held) == held + i64::from(figures.kept)
            && i64::from(figures.sold) == sold
            // A node lists the orders of its lanes.
            && (!found.at_one_moment
                || figures.node.is_some()
                || figures.waiting as i64 == sku.waiting);
        (!same).then(|| format!("{}: memory has {figures:?}", sku.sku_id))
    })
}

/// What nodes may sell is part of the sale, and no node has taken more than it may sell.
fn shares_check(found: &DatabaseAudit) -> Check {
    over_skus(found, "I1", "no node sells what is not lent to it", |sku| {
        let lent: i64 = sku.shares.iter().map(|share| share.lent).sum();
        let over = sku
            .shares
            .iter()
            .find(|share| share.held + share.sold > share.lent);
        if let Some(over) = over {
            return Some(format!("{}: {over:?}", sku.sku_id));
        }
        (lent != sku.lent).then(|| {
            format!(
                "{}: its nodes have {lent} units, and its row says {}",
                sku.sku_id, sku.lent
            )
        })
    })
}

/// Nobody waits while units are there that they could have.
fn overdue_check(found: &DatabaseAudit, live_of: impl Fn(&str) -> Option<LiveFigures>) -> Check {
    let name = "nobody waits for units that are there";
    over_skus(found, "I5", name, |sku| {
        let figures = live_of(&sku.sku_id)?;
        (figures.overdue_ms > 0).then(|| {
            format!(
                "{}: {} orders wait, and {} units have been kept for the next one for {} ms",
                sku.sku_id, figures.waiting, figures.kept, figures.overdue_ms
            )
        })
    })
}

/// Units that moved while its orders were read, the larger of both counters.
fn moved(sku: &SkuAudit) -> i64 {
    let motion = &sku.motion;
    (motion.held_in + motion.held_out).max(motion.sold_in + motion.sold_out)
}

fn at_most_moved(sku: &SkuAudit) -> String {
    match moved(sku) {
        0 => String::new(),
        moved => format!(" (up to {moved} units moved while they were read)"),
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
        decided: true,
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
        decided: true,
        detail: format!("{faults} found"),
    }
}
