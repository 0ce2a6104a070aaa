//! The audit: recomputes every promise that the database can show from its rows.
//!
//! No single snapshot covers it, because a long one keeps vacuum from removing dead rows of the hot tables.
//! Each table is read along its key in parts of about a fifth of a second, on a dedicated connection. Every
//! figure is exact all the same, or comes with its possible error:
//!
//! * `stock`: entries of the stock log never change, so they are followed, SKU by SKU, up to the entry that was
//!   the newest when the last counters were read;
//! * `orders`: a part reads its orders as of one moment. Counters are read with the first and with the last
//!   part. If a SKU has no new entry between the two, none of its orders moved, and its sums are of one moment.
//!   If it has, each order was read before or after its move, so the sums differ from the first counters by at
//!   most the units that those entries moved ([`SkuAudit::motion`]);
//! * `payments`, dead letters: rows that belong together are written in one transaction and read in one
//!   statement;
//! * `keys`: an order's key never changes;
//! * `nodes`: what the shares hold is compared with the orders of their lanes only if neither moved meanwhile.
//!
//! Rows that `retention` has deleted are summed up in checkpoints. None are deleted during an audit: both take
//! the same lock.

mod draws;
mod keys;
mod nodes;
mod orders;
mod payments;
mod session;
mod stock;

pub use self::keys::note_window;
pub use self::nodes::Misplaced;
use self::session::Session;
pub use self::session::{LOCK, PartRows, SESSION};
pub use self::stock::{Motion, NodeShare};
use super::Database;
use crate::store::StoreError;

/// The sums of one SKU's rows beside its counters. All in units.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SkuAudit {
    /// The SKU.
    pub sku_id: String,
    /// `sku.total`.
    pub total: i64,
    /// `sku.held`, and that of the nodes' shares.
    pub held: i64,
    /// `sku.sold`, and that of the nodes' shares.
    pub sold: i64,
    /// `sku.lent`: units that nodes may sell.
    pub lent: i64,
    /// The nodes' shares.
    pub shares: Vec<NodeShare>,
    /// Those of them that hold other units than the orders of their lanes.
    pub misplaced: Vec<Misplaced>,
    /// Units of payable orders.
    pub held_by_orders: i64,
    /// Units of paid orders, deleted ones included.
    pub sold_by_orders: i64,
    /// Orders that wait for units, as each was read.
    pub waiting: i64,
    /// Entries of its waiting list, of which nodes keep one for each order that waits.
    pub entries: i64,
    /// Whether an order still waits although a later one was served by the same strict list, or by rank.
    pub is_overtaken: bool,
    /// Units of parked orders, which memory holds and `held` does not count.
    pub parked: i64,
    /// Units that moved while its orders were read.
    pub motion: Motion,
    /// Total, held, sold when its first orders were read; equal to the counters if nothing moved.
    pub before: (i64, i64, i64),
    /// The sums of the stock log's changes: total, held, sold.
    pub journal: (i64, i64, i64),
    /// Entries whose counters do not follow from the entry before: the row was edited by hand.
    pub journal_breaks: i64,
    /// Descriptions of the differences between log and counters: the entries, and the units. At most
    /// [`GAPS_MAX`].
    pub gaps: Vec<String>,
}

impl SkuAudit {
    /// What is lent to a node, and its held and sold units.
    pub fn share_of(&self, node: i16) -> (i64, i64, i64) {
        let share = self.shares.iter().find(|share| share.node == node);
        share.map_or((0, 0, 0), |share| (share.lent, share.held, share.sold))
    }
}

/// Maximum of gaps described for one SKU.
pub const GAPS_MAX: usize = 5;

/// The result of recomputing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatabaseAudit {
    /// Each SKU.
    pub skus: Vec<SkuAudit>,
    /// Rows of `orders`.
    pub orders: i64,
    /// Whether all of them were read as of one moment.
    pub at_one_moment: bool,
    /// Orders that `retention` has deleted.
    pub orders_pruned: i64,
    /// Orders under a key that another order had already, within the idempotency window then in force.
    pub duplicated_keys: i64,
    /// Orders of a SKU that does not exist.
    pub orders_without_sku: i64,
    /// Dead letters.
    pub dead_letters: i64,
    /// Orders that are both a row and a dead letter.
    pub both_row_and_dead_letter: i64,
    /// Whether several nodes serve the sale, and what their shares hold could be compared with the orders of their lanes.
    pub is_by_lane: bool,
    /// Payments by state, currency and reason of a refund.
    pub payments: Vec<PaymentSum>,
    /// Contradictions among payments.
    pub payment_faults: PaymentFaults,
}

/// Payments of one state, currency and reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PaymentSum {
    /// Their state.
    pub state: String,
    /// Their currency.
    pub currency: String,
    /// Reason of the refund, due or made.
    pub reason: Option<String>,
    /// Number of payments.
    pub count: i64,
    /// Their sum in minor units, in decimal digits.
    pub amount: i128,
}

/// Contradictions among payments, each as a number of rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PaymentFaults {
    /// Messages about a payment that does not exist.
    pub events_without_payment: i64,
    /// Payments without a message.
    pub payments_without_event: i64,
    /// Paid orders without exactly one matched payment of their amount.
    pub paid_without_payment: i64,
    /// Matched payments whose order is not paid.
    pub matched_without_paid_order: i64,
    /// `refund_due` orders without a `refund_due` payment.
    pub refund_due_without_payment: i64,
}

/// Recomputes counters, keys and stock log from the rows. Reads every order, some of them several times
/// (see `keys`).
///
/// # Errors
/// If the database does not answer; [`StoreError::AuditRunning`] if another audit holds the lock.
pub async fn run(database: &Database) -> Result<DatabaseAudit, StoreError> {
    let (found, _) = run_watching(database, PartRows::default(), || ()).await?;
    Ok(found)
}

/// The same with parts of the given size. Calls `look` before the snapshot of the last counters is taken and
/// after they are read, and returns the two results: what both agree on was so at the snapshot's moment.
///
/// # Errors
/// As [`run`].
pub async fn run_watching<T: Send>(
    database: &Database,
    rows: PartRows,
    look: impl FnMut() -> T + Send,
) -> Result<(DatabaseAudit, [T; 2]), StoreError> {
    let mut session = Session::open(database, rows).await?;
    let orders = orders::read(&mut session, look).await?;
    let chains = stock::read(&mut session, &orders.before, &orders.after).await?;
    let duplicated_keys = keys::duplicates(&mut session, &orders.parts).await?;
    let dead_letters = orders::read_dead_letters(&mut session).await?;
    let payments = payments::read(&mut session).await?;
    let mut overtaken = draws::overtaken(&session).await?;
    overtaken.extend(nodes::overtaken(&session).await?);
    let events_without_payment = payments::events_without_payment(&mut session).await?;
    let misplaced = nodes::misplaced(&mut session).await?;
    let sku = |(number, counters): (&i32, &stock::Counters)| {
        let units = orders.by_sku.get(number).copied().unwrap_or_default();
        let chain = chains.get(number).cloned().unwrap_or_default();
        let (total, held, sold) = counters.now;
        SkuAudit {
            sku_id: counters.sku_id.clone(),
            total,
            held,
            sold,
            lent: counters.lent,
            shares: counters.shares.clone(),
            misplaced: misplaced
                .iter()
                .flatten()
                .filter(|(sku, _)| sku == number)
                .map(|(_, misplaced)| *misplaced)
                .collect(),
            held_by_orders: units.held,
            sold_by_orders: units.sold + counters.pruned.1,
            waiting: units.waiting,
            entries: counters.entries,
            is_overtaken: units.is_overtaken || overtaken.contains(number),
            parked: counters.parked,
            motion: chain.motion,
            before: orders
                .before
                .get(number)
                .map_or((0, 0, 0), |before| before.now),
            journal: chain.sum,
            journal_breaks: chain.breaks,
            gaps: chain.gaps,
        }
    };
    let mut skus: Vec<SkuAudit> = orders.after.iter().map(sku).collect();
    skus.sort_by(|a, b| a.sku_id.cmp(&b.sku_id));
    let unknown = orders.by_sku.iter();
    let unknown = unknown.filter(|(number, _)| !orders.after.contains_key(number));
    let found = DatabaseAudit {
        skus,
        orders: orders.orders,
        at_one_moment: orders.parts.len() == 1,
        orders_pruned: orders.after.values().map(|sku| sku.pruned.0).sum(),
        duplicated_keys,
        orders_without_sku: unknown.map(|(_, units)| units.orders).sum(),
        dead_letters: dead_letters.count,
        both_row_and_dead_letter: dead_letters.also_rows,
        is_by_lane: misplaced.is_some(),
        payments: payments.sums,
        payment_faults: PaymentFaults {
            events_without_payment,
            payments_without_event: payments.without_event,
            paid_without_payment: orders.paid_without_payment,
            matched_without_paid_order: payments.matched_without_paid_order,
            refund_due_without_payment: orders.refund_due_without_payment
                + dead_letters.refund_due_without_payment,
        },
    };
    Ok((found, orders.looks))
}
