//! Expiry of orders that were not paid in time: found by ranges of ids, a bounded number of rows at a time,
//! then expired.

use futures_util::future::join_all;

use super::statements::{Change, Changes, Closing, Sql};
use super::{Destination, SettlementWriter, UnitMove};
use crate::faults::bug;
use crate::order::{Ended, IdRange, LaneSet, OrderId, OrderUnits, SkuNumber, UnixMillis, UserId};
use crate::store::StoreError;

/// An unpaid order past its deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overdue {
    /// The order.
    pub order_id: OrderId,
    /// Its SKU.
    pub sku: SkuNumber,
    /// Its deadline, in milliseconds since the epoch.
    pub expires_at: UnixMillis,
}

/// The result of a look at ranges of ids.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Looked {
    /// Rows read, of any status.
    pub rows: i64,
    /// The overdue orders among them, by range, then by id.
    pub overdue: Vec<Overdue>,
    /// The ids that were not read yet.
    pub rest: Vec<IdRange>,
}

/// Reads the rows of `ranges`, at most `rows_max` of them (and at least one a range), and finds the unpaid
/// orders whose deadline is at or before `now`; if `sku` is given, of this SKU only. Takes no locks and changes
/// nothing.
///
/// # Errors
/// [`StoreError::is_overlong`], among others, if it takes longer than half a step; fewer rows may then
/// succeed.
pub async fn look_for_overdue(
    writer: &mut SettlementWriter,
    ranges: &[IdRange],
    rows_max: usize,
    now: UnixMillis,
    sku: Option<SkuNumber>,
) -> Result<Looked, StoreError> {
    let doing = "looking for orders that expire";
    let limit = (rows_max / ranges.len().max(1)).max(1);
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let sku = sku.map(|sku| sku.0);
    let found = writer
        .read(doing, async |client, statements| {
            let look = statements.of(client, Sql::Look).await?;
            let rows = join_all(ranges.iter().map(|range| async move {
                let (from, to) = (range.from.as_i64(), range.to.as_i64());
                let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 5] =
                    [&from, &to, &limit, &now.0, &sku];
                client.query_one(look, &parameters).await
            }));
            rows.await.into_iter().collect::<Result<Vec<_>, _>>()
        })
        .await?;
    let mut looked = Looked::default();
    for (range, row) in ranges.iter().zip(found) {
        let (rows, last): (i64, Option<i64>) = (row.get(0), row.get(1));
        looked.rows += rows;
        let next = last.and_then(|last| OrderId::from_i64(last.saturating_add(1)));
        if rows >= limit
            && let Some(from) = next.filter(|next| *next <= range.to)
        {
            looked.rest.push(IdRange { from, to: range.to });
        }
        let ids: Vec<i64> = row.get::<_, Option<_>>(2).unwrap_or_default();
        let skus: Vec<i32> = row.get::<_, Option<_>>(3).unwrap_or_default();
        let until: Vec<i64> = row.get::<_, Option<_>>(4).unwrap_or_default();
        let overdue = ids.into_iter().zip(skus).zip(until);
        looked
            .overdue
            .extend(overdue.filter_map(|((id, sku), until)| {
                Some(Overdue {
                    order_id: OrderId::from_i64(id)?,
                    sku: SkuNumber(sku),
                    expires_at: UnixMillis(until),
                })
            }));
    }
    Ok(looked)
}

/// Expires those of `orders` that are unpaid and past their deadline at `now`, and releases their units.
/// Skips locked rows. `with_orphans`: some of the orders may have been paid in time, by payments that are
/// not matched yet.
///
/// # Errors
/// On an error nothing has changed. [`StoreError::is_about_rows`] if the row of a SKU cannot be locked, or
/// its counters are refused.
pub async fn end_overdue(
    writer: &mut SettlementWriter,
    orders: &[OrderId],
    now: UnixMillis,
    with_orphans: bool,
) -> Result<Vec<UnitMove>, StoreError> {
    let with_orphans = with_orphans && !bug("expire_what_is_paid");
    let ids: Vec<i64> = orders.iter().map(|id| id.as_i64()).collect();
    writer
        .transact("expiring orders", async |client, statements| {
            let locked: Vec<i64>;
            let ids = match with_orphans {
                false => &ids,
                true => {
                    let lock = statements.of(client, Sql::LockOverdue).await?;
                    let rows = client.query(lock, &[&ids, &now.0]).await?;
                    locked = rows.iter().map(|row| row.get(0)).collect();
                    &locked
                }
            };
            let rows = client
                .query(
                    statements.of(client, Sql::Expire).await?,
                    &[ids, &now.0, &with_orphans],
                )
                .await?;
            let (mut changes, mut moved) = (Changes::default(), Vec::with_capacity(rows.len()));
            for row in &rows {
                let (sku, quantity) = (SkuNumber(row.get(2)), row.get::<_, i32>(3));
                changes.add(
                    sku,
                    Change {
                        held: -i64::from(quantity),
                        ..Change::default()
                    },
                );
                if let Some(order_id) = OrderId::from_i64(row.get(0)) {
                    let units = OrderUnits {
                        order_id,
                        user_id: UserId::from_row(row.get(1)),
                        sku,
                        quantity: u32::try_from(quantity).unwrap_or(0),
                    };
                    let to = Destination::Free(Ended::Expired);
                    moved.push(UnitMove { units, to });
                }
            }
            moved.sort_unstable_by_key(|moved| moved.units.order_id);
            let from = moved.first().map_or(0, |first| first.units.order_id.get());
            let mut closing = Closing::default();
            let reference = format!("{} orders from {from}", moved.len());
            closing.move_counters(&[("expired", changes)], &reference);
            Ok((moved, closing))
        })
        .await
}

/// Those of `skus` whose row another session holds locked at this moment.
///
/// # Errors
/// If the database does not answer.
pub async fn held_skus(
    writer: &mut SettlementWriter,
    skus: &[SkuNumber],
) -> Result<Vec<SkuNumber>, StoreError> {
    let ids: Vec<i32> = skus.iter().map(|sku| sku.0).collect();
    let free: Vec<i32> = writer
        .transact("looking which SKUs are held", async |client, statements| {
            let free_skus = statements.of(client, Sql::FreeSkus).await?;
            let rows = client.query(free_skus, &[&ids]).await?;
            let free = rows.iter().map(|row| row.get(0)).collect();
            Ok((free, Closing::default()))
        })
        .await?;
    let is_held = |sku: &&SkuNumber| !free.contains(&sku.0);
    Ok(skus.iter().filter(is_held).copied().collect())
}

/// Number of times that an older order became unpaid again. Pass it to [`note_unpaid_from`]; read it before
/// asking memory for the lowest unpaid order and for its lanes.
///
/// # Errors
/// If the database does not answer.
pub async fn unpaid_changes(writer: &mut SettlementWriter) -> Result<i64, StoreError> {
    let node = writer.row.lease.node;
    writer
        .read(
            "reading where unpaid orders begin",
            async |client, statements| {
                let changes = statements.of(client, Sql::UnpaidChanges).await?;
                client.query_one(changes, &[&node]).await
            },
        )
        .await
        .map(|row| row.get(0))
}

/// Stores, for the next start, that no unpaid order older than the idempotency window has an id below `id`.
/// If an older order has become unpaid again since `changes` was read, this node has a lane beside those that are `loaded`, or
/// its row is locked, nothing is stored and false returned.
///
/// # Errors
/// If the database does not answer; the next start then reads more than it needs.
pub async fn note_unpaid_from(
    writer: &mut SettlementWriter,
    changes: i64,
    id: OrderId,
    loaded: LaneSet,
) -> Result<bool, StoreError> {
    let lease = writer.row.lease;
    let loaded: Vec<i16> = loaded.iter().map(|lane| lane.get().into()).collect();
    let noted = writer
        .transact(
            "noting the least unpaid order",
            async |client, statements| {
                let note = statements.of(client, Sql::UnpaidFrom).await?;
                let noted = client
                    .execute(
                        note,
                        &[&lease.node, &lease.epoch, &changes, &id.as_i64(), &loaded],
                    )
                    .await?;
                Ok((noted, Closing::default()))
            },
        )
        .await?;
    Ok(noted > 0)
}
