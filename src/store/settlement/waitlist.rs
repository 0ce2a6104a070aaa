//! Orders that wait for units: assigning them, ending their wait, and which SKUs have any.

use super::SettlementWriter;
use super::statements::{Change, Changes, Closing, Sql};
use crate::order::{OrderId, OrderUnits, SkuNumber, UnixMillis, UserId};
use crate::store::cluster::lists;
use crate::store::{Ledger, StoreError};

/// Makes those of `orders` payable until `expires_at` that still wait, and moves their units to `held`, all or
/// nothing. Returns them. The caller has units in memory for all of them.
///
/// # Errors
/// On an error nothing has changed. [`StoreError::is_about_rows`] if a row cannot be locked, or a SKU's counters
/// are refused.
pub async fn assign(
    writer: &mut SettlementWriter,
    orders: &[OrderId],
    now: UnixMillis,
    expires_at: UnixMillis,
) -> Result<Vec<OrderUnits>, StoreError> {
    let ids: Vec<i64> = orders.iter().map(|id| id.as_i64()).collect();
    writer
        .transact("assigning units", async |client, statements| {
            let assign = statements.of(client, Sql::Assign).await?;
            let rows = client.query(assign, &[&ids, &expires_at.0, &now.0]).await?;
            let assigned = units_of(&rows);
            let closing = holding(&assigned);
            Ok((assigned, closing))
        })
        .await
}

/// At a node: makes those of `orders`, which are of its lanes, payable until `expires_at` that still wait and that the pool
/// covers (`store::cluster::lists`), and lends the node their units, all or nothing. Returns them.
///
/// # Errors
/// Those of [`assign`].
pub async fn assign_covered(
    writer: &mut SettlementWriter,
    sku: SkuNumber,
    skips: bool,
    orders: &[OrderId],
    now: UnixMillis,
    expires_at: UnixMillis,
) -> Result<Vec<OrderUnits>, StoreError> {
    let ids: Vec<i64> = orders.iter().map(|id| id.as_i64()).collect();
    let node = writer.node();
    writer
        .transact("assigning units of the pool", async |client, statements| {
            let of = async |sql| statements.of(client, sql).await;
            let waiting = client.query(of(Sql::LockWaiting).await?, &[&ids]).await?;
            let pool = client
                .query_opt(of(Sql::LockPool).await?, &[&sku.0])
                .await?;
            let free: i64 = pool.map_or(0, |pool| pool.get(0));
            let front = of(Sql::Front).await?;
            let front = client
                .query(front, &[&sku.0, &skips, &free, &lists::front_of(free)])
                .await?;
            // Both are sorted by id.
            let waits = |id: i64| waiting.binary_search_by_key(&id, |row| row.get(0)).is_ok();
            let mut covered = lists::cover(&front, free, skips);
            covered.retain(|entry| waits(entry.order_id.as_i64()));
            if covered.is_empty() {
                return Ok((Vec::new(), Closing::default()));
            }
            let ids: Vec<i64> = covered.iter().map(|one| one.order_id.as_i64()).collect();
            let served = covered.iter().map(|one| one.turn).max().filter(|_| !skips);
            let assign = of(Sql::Assign).await?;
            let rows = client.query(assign, &[&ids, &expires_at.0, &now.0]).await?;
            let assigned = units_of(&rows);
            let units: i64 = assigned.iter().map(|one| i64::from(one.quantity)).sum();
            client.execute(of(Sql::LeaveLists).await?, &[&ids]).await?;
            let lend = of(Sql::LendTaken).await?;
            client.execute(lend, &[&sku.0, &node, &units]).await?;
            let note = of(Sql::NoteServed).await?;
            client.execute(note, &[&sku.0, &served, &now.0]).await?;
            let closing = holding(&assigned);
            Ok((assigned, closing))
        })
        .await
}

/// Counts the units of these orders, which have waited, as held.
fn holding(assigned: &[OrderUnits]) -> Closing<'static> {
    let mut changes = Changes::default();
    for units in assigned {
        let change = Change {
            held: i64::from(units.quantity),
            ..Change::default()
        };
        changes.add(units.sku, change);
    }
    let from = assigned.first().map_or(0, |first| first.order_id.get());
    let reference = format!("{} orders from {from}", assigned.len());
    let mut closing = Closing::default();
    closing.move_counters(&[("assigned", changes)], &reference);
    closing
}

/// Why orders no longer wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Their list, or their time, is over.
    Over,
    /// They ask for more units than their SKU has in total. The row decides: a lower total may not be stored yet.
    Unservable,
}

/// Expires those of `orders` that still wait. They hold no units, so no counter moves. Skips locked rows.
///
/// # Errors
/// On an error nothing has changed.
pub async fn end(
    writer: &mut SettlementWriter,
    orders: &[OrderId],
    why: Ending,
) -> Result<Vec<OrderUnits>, StoreError> {
    let ids: Vec<i64> = orders.iter().map(|id| id.as_i64()).collect();
    let is_unservable = why == Ending::Unservable;
    writer
        .transact("ending a waiting list", async |client, statements| {
            let end = statements.of(client, Sql::EndWaiting).await?;
            let rows = client.query(end, &[&ids, &is_unservable]).await?;
            let ended = units_of(&rows);
            let mut closing = Closing::default();
            if statements.lease().ledger == Ledger::Share {
                let ids: Vec<i64> = ended.iter().map(|one| one.order_id.as_i64()).collect();
                closing.add(Sql::LeaveLists, vec![Box::new(ids)]);
            }
            Ok((ended, closing))
        })
        .await
}

/// Notes that these SKUs, and no others, have orders that wait: `sku_list` shows their units as held.
///
/// # Errors
/// On an error nothing has changed.
pub async fn note_lists(
    writer: &mut SettlementWriter,
    skus: &[SkuNumber],
) -> Result<(), StoreError> {
    let node = writer.node();
    let skus: Vec<i32> = skus.iter().map(|sku| sku.0).collect();
    writer
        .transact("noting the waiting lists", async |client, statements| {
            let note = statements.of(client, Sql::NoteLists).await?;
            client.execute(note, &[&node, &skus]).await?;
            Ok(((), Closing::default()))
        })
        .await
}

/// Reads rows of id, buyer, SKU and quantity; sorted by id.
fn units_of(rows: &[tokio_postgres::Row]) -> Vec<OrderUnits> {
    let mut units: Vec<OrderUnits> = rows
        .iter()
        .filter_map(|row| {
            Some(OrderUnits {
                order_id: OrderId::from_i64(row.get(0))?,
                user_id: UserId::from_row(row.get(1)),
                sku: SkuNumber(row.get(2)),
                quantity: u32::try_from(row.get::<_, i32>(3)).unwrap_or(0),
            })
        })
        .collect();
    units.sort_unstable_by_key(|units| units.order_id);
    units
}
