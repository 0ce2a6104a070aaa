//! Units that a node may sell.
//!
//! ```text
//!   sku:          total = held + sold + lent + pool        held, sold: outside of any share; pool: lent to nobody
//!   stock_share:  lent  = held + sold + free               one row a node, changed by that node alone
//! ```
//!
//! A node that runs dry takes units from the pool. If the pool has too few, the node leaves a *want*. Wants are served
//! oldest first, and while there is one the pool lends to nobody else. Each node looks at wants, gives back what it
//! has free, and marks its share with the number of the want. When every share is marked and the pool is still too
//! small, the SKU is sold out.

use tokio_postgres::{Error, Transaction};

use super::transact;
use crate::order::SkuNumber;
use crate::store::StoreError;
use crate::store::postgres::{Database, NodeLease};

/// The counters of a node's share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// Units lent to the node.
    pub lent: i64,
    /// Of these, units of unpaid orders that are rows.
    pub held: i64,
    /// Of these, units of paid orders that were not swept yet.
    pub sold: i64,
}

/// The outcome of asking for units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lent {
    /// Units that were lent now.
    pub units: i64,
    /// Sold units that left the share, with as many units of `lent`; they are in `sku.sold` now.
    pub swept: i64,
    /// The number of the want that was left because too few were there.
    pub want: Option<i64>,
    /// Whether nothing was lent because orders wait, for which all units are kept.
    pub is_waited: bool,
}

/// A want that is not served yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Want {
    /// Its number: the lower, the older.
    pub number: i64,
    /// The SKU.
    pub sku: SkuNumber,
    /// The node that wants.
    pub node: i16,
    /// Units that it needs at least.
    pub units: i64,
}

/// Whether units for a want may still turn up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Supply {
    /// The pool has enough for it: ask again.
    Pool,
    /// Some node has not looked at the want yet or is being taken over, or a total is being lowered.
    Unanswered,
    /// Every node has given back what it had free after the want was left, and the pool has too few.
    None,
}

/// While lanes are nobody's and a log may be replayed, the pool is kept for its orders.
const IS_KEPT: &str = "(EXISTS (SELECT FROM lane WHERE node IS NULL)
    AND EXISTS (SELECT FROM node WHERE state IN ('joining', 'dead')))";

/// A SKU's counters outside of shares, locked.
pub(super) struct Pool {
    total: i64,
    committed: i64,
    lent: i64,
    is_recalled: bool,
    pub(super) is_kept: bool,
}

impl Pool {
    pub(super) async fn lock(
        transaction: &Transaction<'_>,
        sku: SkuNumber,
    ) -> Result<Option<Self>, Error> {
        let row = transaction
            .query_opt(
                &format!(
                    "SELECT total, held + sold, lent, recall IS NOT NULL, {IS_KEPT} FROM sku WHERE id = $1 FOR UPDATE"
                ),
                &[&sku.0],
            )
            .await?;
        Ok(row.map(|row| Pool {
            total: row.get(0),
            committed: row.get(1),
            lent: row.get(2),
            is_recalled: row.get(3),
            is_kept: row.get(4),
        }))
    }

    fn free(&self) -> i64 {
        self.total - self.committed - self.lent
    }
}

/// Lends the node up to `wanted` units; if the pool has fewer than `least`, lends nothing and leaves a want for
/// `least`. `least` is one whole order. Sweeps the sold units of the share.
///
/// The row tells the outcome of a lost answer: see [`super::stock::books`].
///
/// # Errors
/// [`StoreError::Fenced`] if the node was taken over; otherwise if the database does not answer.
pub async fn lend(
    database: &Database,
    lease: NodeLease,
    sku: SkuNumber,
    wanted: i64,
    least: i64,
) -> Result<Lent, StoreError> {
    borrow(database, lease, sku, wanted, Some(least)).await
}

/// The same for a share that is not dry: it leaves no want.
///
/// # Errors
/// Those of [`lend`].
pub async fn refill(
    database: &Database,
    lease: NodeLease,
    sku: SkuNumber,
    wanted: i64,
) -> Result<Lent, StoreError> {
    borrow(database, lease, sku, wanted, None).await
}

async fn borrow(
    database: &Database,
    lease: NodeLease,
    sku: SkuNumber,
    wanted: i64,
    want: Option<i64>,
) -> Result<Lent, StoreError> {
    let least = want.unwrap_or(1);
    let work = async |transaction: &Transaction<'_>| {
        let Some(pool) = Pool::lock(transaction, sku).await? else {
            return Ok(None);
        };
        // Wants are left and entries of lists made under the lock that is held now.
        let before = transaction
            .query_one(
                "SELECT (SELECT node FROM stock_want WHERE sku = $1 ORDER BY number LIMIT 1),
                        EXISTS (SELECT FROM waitlist_entries WHERE sku = $1)",
                &[&sku.0],
            )
            .await?;
        let (oldest, is_waited): (Option<i16>, bool) = (before.get(0), before.get(1));
        let is_next = oldest.is_none_or(|oldest| oldest == lease.node);
        let units = match pool.free() {
            _ if pool.is_recalled || pool.is_kept || is_waited || !is_next => 0,
            free if free < least => 0,
            free => free.min(wanted.max(least)),
        };
        let swept = sweep_in(transaction, lease, &[sku]).await?;
        let swept = swept.first().map_or(0, |(_, units)| *units);
        let want = if units > 0 {
            transaction
                .execute(
                    "INSERT INTO stock_share (sku, node, lent, borrowed) VALUES ($1, $2, $3, $3)
                     ON CONFLICT (sku, node) DO UPDATE
                        SET lent = stock_share.lent + $3, borrowed = stock_share.borrowed + $3, answered = 0",
                    &[&sku.0, &lease.node, &units],
                )
                .await?;
            withdraw_in(transaction, lease, sku).await?;
            None
        } else if is_waited {
            withdraw_in(transaction, lease, sku).await?;
            None
        } else if want.is_none() {
            None
        } else {
            let row = transaction
                .query_one(
                    "INSERT INTO stock_want (sku, node, units) VALUES ($1, $2, $3)
                     ON CONFLICT (sku, node) DO UPDATE SET units = least(stock_want.units, $3) RETURNING number",
                    &[&sku.0, &lease.node, &least],
                )
                .await?;
            Some(row.get(0))
        };
        Ok(Some(Lent {
            units,
            swept,
            want,
            is_waited,
        }))
    };
    let lent = transact(database, lease, "lending stock to a node", work).await?;
    lent.ok_or_else(|| StoreError::Data(format!("there is no SKU {}", sku.0)))
}

/// Takes the sold units of these SKUs ($1) out of the share of node $2. Their SKUs are locked. $3: they count as swept by the
/// node's lending, which learns of a lost answer by that.
pub(in crate::store) const SWEEP: &str = "
    WITH own AS (
        SELECT sku, sold FROM stock_share WHERE sku = ANY ($1) AND node = $2 AND sold > 0 ORDER BY sku FOR UPDATE
    ), left_it AS (
        UPDATE stock_share s SET lent = s.lent - own.sold, sold = 0, swept = s.swept + CASE WHEN $3 THEN own.sold ELSE 0 END
          FROM own WHERE s.sku = own.sku AND s.node = $2
        RETURNING own.sku, own.sold
    )
    SELECT sku, sold FROM left_it ORDER BY sku";

/// Moves the sold units of the node's shares to `sku`. The SKUs are locked.
async fn sweep_in(
    transaction: &Transaction<'_>,
    lease: NodeLease,
    skus: &[SkuNumber],
) -> Result<Vec<(SkuNumber, i64)>, Error> {
    let skus: Vec<i32> = skus.iter().map(|sku| sku.0).collect();
    // They leave `lent`, which the trigger sums up, before they enter `sold`.
    let rows = transaction
        .query(SWEEP, &[&skus, &lease.node, &true])
        .await?;
    let swept: Vec<(SkuNumber, i64)> = rows
        .iter()
        .map(|row| (SkuNumber(row.get(0)), row.get(1)))
        .collect();
    if !swept.is_empty() {
        let skus: Vec<i32> = swept.iter().map(|(sku, _)| sku.0).collect();
        let units: Vec<i64> = swept.iter().map(|(_, units)| *units).collect();
        transaction
            .execute(
                "UPDATE sku s SET sold = s.sold + w.units
                   FROM unnest($1::int4[], $2::int8[]) AS w (sku, units) WHERE s.id = w.sku",
                &[&skus, &units],
            )
            .await?;
    }
    Ok(swept)
}

/// Moves the sold units of the node's shares of these SKUs to `sku`, where a refund finds them whichever node has the lane
/// by then. Returns them by SKU, ascending.
///
/// # Errors
/// [`StoreError::Fenced`] if the node was taken over; otherwise if the database does not answer.
pub async fn sweep(
    database: &Database,
    lease: NodeLease,
    skus: &[SkuNumber],
) -> Result<Vec<(SkuNumber, i64)>, StoreError> {
    let ids: Vec<i32> = skus.iter().map(|sku| sku.0).collect();
    let work = async |transaction: &Transaction<'_>| {
        transaction
            .execute(
                "SELECT FROM sku WHERE id = ANY ($1) ORDER BY id FOR UPDATE",
                &[&ids],
            )
            .await?;
        sweep_in(transaction, lease, skus).await
    };
    transact(database, lease, "moving sold units to their SKUs", work).await
}

/// Gives `units` of the node's share back to the pool. The node has taken them out of its memory before.
///
/// # Errors
/// A CHECK violation if orders have taken them; [`StoreError::Fenced`] if the node was taken over.
pub async fn give_back(
    database: &Database,
    lease: NodeLease,
    sku: SkuNumber,
    units: i64,
) -> Result<(), StoreError> {
    give(database, lease, sku, units, None).await
}

/// Answers a want: gives back `units`, which is everything that the node had free after it read the want, of `lent`
/// units in its memory. Marks the share if these are all that is lent: the rest may have free units, as after a
/// takeover that has ended meanwhile.
///
/// # Errors
/// Those of [`give_back`].
pub async fn answer(
    database: &Database,
    lease: NodeLease,
    want: &Want,
    units: i64,
    lent: i64,
) -> Result<(), StoreError> {
    give(database, lease, want.sku, units, Some((want.number, lent))).await
}

async fn give(
    database: &Database,
    lease: NodeLease,
    sku: SkuNumber,
    units: i64,
    answer: Option<(i64, i64)>,
) -> Result<(), StoreError> {
    let (number, lent) = answer.unzip();
    let work = async |transaction: &Transaction<'_>| {
        // The trigger locks the SKU's row after the share's; locked here, it comes first.
        Pool::lock(transaction, sku).await?;
        transaction
            .execute(
                "UPDATE stock_share SET lent = lent - $3, borrowed = borrowed - $3,
                        answered = CASE WHEN lent = $5::int8 THEN greatest(answered, $4::int8) ELSE answered END
                  WHERE sku = $1 AND node = $2",
                &[&sku.0, &lease.node, &units, &number, &lent],
            )
            .await?;
        Ok(())
    };
    transact(database, lease, "giving stock back", work).await
}

/// Wants that are not served yet, oldest first.
///
/// # Errors
/// If the database does not answer.
pub async fn wants(database: &Database) -> Result<Vec<Want>, StoreError> {
    let sql = "SELECT number, sku, node, units FROM stock_want ORDER BY number";
    let rows = database
        .query_prepared("reading wants of stock", sql, &[])
        .await?;
    let want = |row: &tokio_postgres::Row| Want {
        number: row.get(0),
        sku: SkuNumber(row.get(1)),
        node: row.get(2),
        units: row.get(3),
    };
    Ok(rows.iter().map(want).collect())
}

/// Whether units for a want of this node may still turn up. `sold_out` may be answered after [`Supply::None`] only,
/// and then [`withdraw`] lets the pool lend to others again. `None`: the want does not stand any more, so nobody answers it.
///
/// `of_all`: [`Supply::None`] means that those nodes have answered too which have nothing free, but held units, which may
/// come free: they keep them while the want stands.
///
/// # Errors
/// If the database does not answer.
pub async fn supply(
    database: &Database,
    want: &Want,
    of_all: bool,
) -> Result<Option<Supply>, StoreError> {
    let client = database.pooled().await?;
    // Memory takes units before the row says so, and the row returns them before memory does. So a share that has
    // nothing free by its row has nothing free in memory. A dead node answers nothing until its share is merged.
    let row = database
        .timed(
            "asking whether a SKU is sold out",
            client.query_opt(
                &format!(
                    "SELECT s.total - s.held - s.sold - s.lent >= $3 AND s.recall IS NULL AND NOT {IS_KEPT},
                            s.recall IS NOT NULL OR {IS_KEPT}
                            OR EXISTS (SELECT FROM stock_share o WHERE o.sku = s.id AND o.node <> $2 AND o.answered < $4
                                          AND o.lent > CASE WHEN $5 THEN o.sold ELSE o.held + o.sold END)
                       FROM sku s JOIN stock_want w ON w.sku = s.id AND w.node = $2 AND w.number = $4 WHERE s.id = $1"
                ),
                &[&want.sku.0, &want.node, &want.units, &want.number, &of_all],
            ),
        )
        .await?;
    Ok(row.map(|row| match (row.get(0), row.get(1)) {
        (true, _) => Supply::Pool,
        (false, true) => Supply::Unanswered,
        (false, false) => Supply::None,
    }))
}

/// Withdraws the node's want of a SKU.
///
/// # Errors
/// [`StoreError::Fenced`] if the node was taken over; otherwise if the database does not answer.
pub async fn withdraw(
    database: &Database,
    lease: NodeLease,
    sku: SkuNumber,
) -> Result<(), StoreError> {
    let work = async |transaction: &Transaction<'_>| withdraw_in(transaction, lease, sku).await;
    transact(database, lease, "withdrawing a want of stock", work).await
}

async fn withdraw_in(
    transaction: &Transaction<'_>,
    lease: NodeLease,
    sku: SkuNumber,
) -> Result<(), Error> {
    transaction
        .execute(
            "DELETE FROM stock_want WHERE sku = $1 AND node = $2",
            &[&sku.0, &lease.node],
        )
        .await
        .map(|_| ())
}

/// The node's share of a SKU.
///
/// # Errors
/// If the database does not answer.
pub async fn share_of(database: &Database, node: i16, sku: SkuNumber) -> Result<Share, StoreError> {
    let client = database.pooled().await?;
    let row = database
        .timed(
            "reading a share of stock",
            client.query_opt(
                "SELECT lent, held, sold FROM stock_share WHERE sku = $1 AND node = $2",
                &[&sku.0, &node],
            ),
        )
        .await?;
    Ok(row.map_or_else(Share::default, |row| Share {
        lent: row.get(0),
        held: row.get(1),
        sold: row.get(2),
    }))
}
