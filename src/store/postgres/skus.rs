//! SKUs: reading them, and their administration. Every change of a counter is entered in the stock log with its cause, in the same
//! transaction.

use std::collections::HashMap;
use std::sync::Arc;

use tokio_postgres::{Error, GenericClient, Transaction};

use super::draws::{self, StoredDraw};
use super::transitions::fence;
use super::{Database, NodeLease};
use crate::order::draw::{NoRandomness, Salt, Seed};
use crate::order::{Currency, SkuId, SkuNumber, UnixMillis};
use crate::state::stock::{
    DayTime, DayWindow, Draw, DrawPhase, DrawTerms, SaleTerms, Sku, StockCounter,
    WAITLIST_MAX_DEFAULT, WaitlistTerms,
};
use crate::store::cluster::{self, terms};
use crate::store::{Ledger, StoreError};

fn data(what: impl std::fmt::Display) -> StoreError {
    StoreError::Data(what.to_string())
}

/// The columns of a SKU's row. At a node the counters are those of its share instead ([`shares_of`]). See `V1__orders_and_stock.sql`.
const SKU_COLUMNS: &str = "id, sku_id, title, unit_price, currency, total, held, sold, per_user_limit,
    (extract(epoch FROM opens_at) * 1000)::int8, (extract(epoch FROM closes_at) * 1000)::int8, paused,
    waitlist_max, waitlist_skips, waitlist_payment_ttl_ms, assign_between,
    (extract(epoch FROM draw_at) * 1000)::int8, draw_beacon";

fn sku_from_row(row: &tokio_postgres::Row, shares: &Shares) -> Result<Sku, StoreError> {
    let name: &str = row.get(1);
    let counters = match shares {
        None => [row.get(5), row.get(6), row.get(7)],
        Some((_, shares)) => shares.get(&row.get(0)).copied().unwrap_or_default(),
    };
    let [total, held, sold] = counters.map(|units: i64| {
        u32::try_from(units).map_err(|_| data(format!("sku {name}: a counter is out of range")))
    });
    let (total, held, sold) = (total?, held?, sold?);
    if held.checked_add(sold).is_none_or(|taken| taken > total) {
        return Err(data(format!(
            "sku {name}: held {held} + sold {sold} exceed total {total}"
        )));
    }
    let terms = SaleTerms {
        title: row.get(2),
        unit_price: row.get(3),
        currency: Currency::new(row.get(4))
            .map_err(|e| data(format!("sku {name}: currency {e}")))?,
        per_user_limit: row
            .get::<_, Option<i64>>(8)
            .and_then(|limit| u32::try_from(limit).ok()),
        opens_at: row.get::<_, Option<i64>>(9).map(UnixMillis),
        closes_at: row.get::<_, Option<i64>>(10).map(UnixMillis),
        waitlist: waitlist_terms(row)
            .ok_or_else(|| data(format!("sku {name}: terms of its waiting list")))?,
        draw: row.get::<_, Option<i64>>(16).map(|at| DrawTerms {
            at: UnixMillis(at),
            beacon: row.get(17),
        }),
    };
    let id = SkuId::new(name).map_err(|e| data(format!("sku {name}: {e}")))?;
    let counter = StockCounter::new(total, held, sold);
    let sku = Sku::new(id, SkuNumber(row.get(0)), terms, counter, row.get(11));
    Ok(match shares {
        None => sku,
        Some((node, _)) => sku.at_node(*node),
    })
}

fn waitlist_terms(row: &tokio_postgres::Row) -> Option<WaitlistTerms> {
    let max: Option<i64> = row.get(12);
    let ttl: Option<i64> = row.get(14);
    let between: Option<&str> = row.get(15);
    Some(WaitlistTerms {
        max: max.map_or(Some(WAITLIST_MAX_DEFAULT), |max| u32::try_from(max).ok())?,
        skips: row.get(13),
        payment_ttl_ms: ttl.and_then(|ttl| u64::try_from(ttl).ok()),
        assign_between: match between {
            None => None,
            Some(between) => Some(window_from_text(between)?),
        },
    })
}

/// Reads a window as [`window_text`] writes it.
fn window_from_text(text: &str) -> Option<DayWindow> {
    let (from, to) = text.split_once('/')?;
    DayWindow::new(DayTime::parse(from)?, DayTime::parse(to)?)
}

fn window_text(window: DayWindow) -> String {
    format!("{}/{}", window.from, window.to)
}

/// Locks the terms and total of a SKU, which need not exist yet, until the transaction ends. Workers, which
/// move its counters, are not blocked.
async fn lock(
    transaction: &Transaction<'_>,
    schema: &str,
    id: &SkuId,
) -> Result<(), tokio_postgres::Error> {
    let name = format!("millrace sku:{schema}:{id}");
    transaction
        .execute(
            "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))",
            &[&name],
        )
        .await
        .map(|_| ())
}

/// A node and its shares by SKU: lent, held, sold. `None`: a single node has all of `sku`.
type Shares = Option<(i16, HashMap<i32, [i64; 3]>)>;

/// The counters of the node's shares, if it has such.
async fn shares_of(client: &impl GenericClient, lease: NodeLease) -> Result<Shares, Error> {
    if lease.ledger == Ledger::Sku {
        return Ok(None);
    }
    let sql = "SELECT sku, lent, held, sold FROM stock_share WHERE node = $1";
    let rows = client.query(sql, &[&lease.node]).await?;
    let share = |row: &tokio_postgres::Row| (row.get(0), [row.get(1), row.get(2), row.get(3)]);
    Ok(Some((lease.node, rows.iter().map(share).collect())))
}

/// Every SKU with the counters of this process.
///
/// # Errors
/// If a row contradicts itself, or the database's error.
pub async fn load_all(database: &Database, lease: NodeLease) -> Result<Vec<Sku>, StoreError> {
    let client = database.pooled().await?;
    let rows = client
        .query(&format!("SELECT {SKU_COLUMNS} FROM sku ORDER BY id"), &[])
        .await
        .map_err(StoreError::statement("reading the SKUs"))?;
    let shares = shares_of(&**client, lease).await;
    let shares = shares.map_err(StoreError::statement("reading the shares of stock"))?;
    let mut draws = draws::load_all(&client).await?;
    let skus = rows.iter().map(|row| sku_from_row(row, &shares));
    skus.map(|sku| {
        let sku = sku?;
        sku.set_draw(draws.remove(&sku.number).as_ref().map(draw_of));
        Ok(sku)
    })
    .collect()
}

/// The database's number of each SKU.
///
/// # Errors
/// If a row contradicts itself, or the database's error.
pub async fn numbers(database: &Database) -> Result<HashMap<SkuId, SkuNumber>, StoreError> {
    let client = database.pooled().await?;
    let rows = client
        .query("SELECT sku_id, id FROM sku", &[])
        .await
        .map_err(StoreError::statement("reading the numbers of SKUs"))?;
    let number = |row: &tokio_postgres::Row| {
        let name: &str = row.get(0);
        let id = SkuId::new(name).map_err(|e| data(format!("sku {name}: {e}")))?;
        Ok((id, SkuNumber(row.get(1))))
    };
    rows.iter().map(number).collect()
}

/// A stored draw, as memory knows it.
fn draw_of(stored: &StoredDraw) -> Arc<Draw> {
    let phase = match (stored.is_drawn, &stored.fixed) {
        (true, _) => DrawPhase::Drawn,
        (false, Some(_)) => DrawPhase::Fixed,
        (false, None) if stored.is_closed => DrawPhase::Closed,
        (false, None) => DrawPhase::Open,
    };
    let has_beacon = stored.beacon.is_some();
    let commitment = stored.seed.commitment();
    Arc::new(Draw::new(commitment, &stored.salt, phase, has_beacon))
}

/// A SKU with its draw, from the rows of both.
fn with_draw(
    (sku, draw, shares): &(tokio_postgres::Row, Option<tokio_postgres::Row>, Shares),
) -> Result<Sku, StoreError> {
    let sku = sku_from_row(sku, shares)?;
    if sku.terms().draw.is_some() {
        let draw = draw
            .as_ref()
            .ok_or_else(|| data(format!("sku {}: its draw has no secrets", sku.id)))?;
        sku.set_draw(Some(draw_of(&draws::from_row(draw)?)));
    }
    Ok(sku)
}

/// Creates a SKU or replaces its terms and total, and returns its new state.
///
/// # Errors
/// [`StoreError::Statement`] with a CHECK violation if the total would fall below the units that orders
/// have taken, [`StoreError::Fenced`] if this process may not write any more.
pub async fn put(
    database: &Database,
    lease: NodeLease,
    id: &SkuId,
    terms: &SaleTerms,
    total: u32,
) -> Result<Sku, StoreError> {
    let doing = "storing a SKU";
    let waitlist = &terms.waitlist;
    let max = (waitlist.max != WAITLIST_MAX_DEFAULT).then(|| i64::from(waitlist.max));
    let draw = terms.draw.as_ref();
    let is_by_id = draw.is_none() && !waitlist.skips;
    // Of a draw that has secrets already, these are dropped.
    let secrets = draw
        .map(|_| Ok::<_, NoRandomness>((Seed::random()?, Salt::random()?)))
        .transpose()
        .map_err(data)?;
    let mut client = database.pooled().await?;
    let work = async {
        let transaction = client.transaction().await?;
        if !fence(&transaction, lease).await? {
            return Ok(None);
        }
        lock(&transaction, database.schema(), id).await?;
        let before: i64 = transaction
            .query_opt(
                "SELECT total FROM sku WHERE sku_id = $1 FOR UPDATE",
                &[&id.as_str()],
            )
            .await?
            .map_or(0, |row| row.get(0));
        let row = transaction
            .query_one(
                &format!(
                    "INSERT INTO sku (sku_id, title, unit_price, currency, total, per_user_limit, opens_at, closes_at,
                            waitlist_max, waitlist_skips, waitlist_payment_ttl_ms, assign_between,
                            waitlist_strict_since, allocation, draw_at, draw_beacon)
                     VALUES ($1, $2, $3, $4, $5, $6, to_timestamp($7::int8 / 1000.0), to_timestamp($8::int8 / 1000.0),
                            $9, $10, $11, $12, CASE WHEN NOT $13 THEN timestamptz 'infinity' END,
                            CASE WHEN $14::int8 IS NOT NULL THEN 'draw' END, to_timestamp($14::int8 / 1000.0), $15)
                     ON CONFLICT (sku_id) DO UPDATE SET title = excluded.title, unit_price = excluded.unit_price,
                         currency = excluded.currency, total = excluded.total, per_user_limit = excluded.per_user_limit,
                         opens_at = excluded.opens_at, closes_at = excluded.closes_at,
                         waitlist_max = excluded.waitlist_max, waitlist_skips = excluded.waitlist_skips,
                         waitlist_payment_ttl_ms = excluded.waitlist_payment_ttl_ms,
                         assign_between = excluded.assign_between,
                         waitlist_strict_since = CASE WHEN NOT $13 THEN timestamptz 'infinity'
                             WHEN sku.waitlist_strict_since = timestamptz 'infinity' THEN clock_timestamp()
                             ELSE sku.waitlist_strict_since END,
                         allocation = excluded.allocation, draw_at = excluded.draw_at,
                         draw_beacon = excluded.draw_beacon
                     RETURNING {SKU_COLUMNS}"
                ),
                &[
                    &id.as_str(),
                    &terms.title,
                    &terms.unit_price,
                    &terms.currency.as_str(),
                    &i64::from(total),
                    &terms.per_user_limit.map(i64::from),
                    &terms.opens_at.map(|at| at.0),
                    &terms.closes_at.map(|at| at.0),
                    &max,
                    &waitlist.skips,
                    &waitlist.payment_ttl_ms.and_then(|ttl| i64::try_from(ttl).ok()),
                    &waitlist.assign_between.map(window_text),
                    &is_by_id,
                    &draw.map(|draw| draw.at.0),
                    &draw.and_then(|draw| draw.beacon.as_deref()),
                ],
            )
            .await?;
        let number = row.get(0);
        if let Some((seed, salt)) = &secrets {
            draws::keep_secrets(&transaction, number, seed, salt).await?;
        }
        let draw = draws::row(&transaction, number).await?;
        transaction
            .execute(
                &lease.sql("INSERT INTO stock_log (sku, @columncause, reference, total_delta, total_after, held_after, sold_after)
                 SELECT id, @node'admin', 'put', total - $2, total, held, sold FROM sku WHERE sku_id = $1"),
                &[&id.as_str(), &before],
            )
            .await?;
        terms::note(&*transaction, lease).await?;
        let shares = shares_of(&*transaction, lease).await?;
        transaction.commit().await?;
        Ok(Some((row, draw, shares)))
    };
    let stored = database.timed(doing, work).await?;
    with_draw(&stored.ok_or_else(|| lease.is_lost())?)
}

/// Stores whether a SKU is paused. Returns false if there is no such SKU.
///
/// # Errors
/// If the database does not answer; [`StoreError::Fenced`] if this node was taken over.
pub async fn set_paused(
    database: &Database,
    lease: NodeLease,
    id: &SkuId,
    paused: bool,
) -> Result<bool, StoreError> {
    let doing = "pausing a SKU";
    let sql = "UPDATE sku SET paused = $2 WHERE sku_id = $1";
    let changed = match lease.ledger {
        Ledger::Sku => {
            let client = database.pooled().await?;
            database
                .timed(doing, client.execute(sql, &[&id.as_str(), &paused]))
                .await?
        }
        Ledger::Share => {
            let pausing = async |transaction: &Transaction<'_>| {
                let changed = transaction.execute(sql, &[&id.as_str(), &paused]).await?;
                terms::note(transaction, lease).await?;
                Ok(changed)
            };
            cluster::transact(database, lease, doing, pausing).await?
        }
    };
    Ok(changed == 1)
}

/// A SKU's row. Waits for earlier changes of its terms or total that are under way.
///
/// # Errors
/// If the database does not answer.
pub async fn find_committed(
    database: &Database,
    lease: NodeLease,
    id: &SkuId,
) -> Result<Option<Sku>, StoreError> {
    let mut client = database.pooled().await?;
    let work = async {
        let transaction = client.transaction().await?;
        lock(&transaction, database.schema(), id).await?;
        let row = transaction
            .query_opt(
                &format!("SELECT {SKU_COLUMNS} FROM sku WHERE sku_id = $1"),
                &[&id.as_str()],
            )
            .await?;
        let draw = match &row {
            Some(row) => draws::row(&transaction, row.get(0)).await?,
            None => None,
        };
        let shares = shares_of(&*transaction, lease).await?;
        transaction.commit().await?;
        Ok(row.map(|row| (row, draw, shares)))
    };
    let found = database.timed("looking a SKU up", work).await?;
    found.as_ref().map(with_draw).transpose()
}

/// Stores whether every sale is paused, at every node.
///
/// # Errors
/// If the database does not answer; [`StoreError::Fenced`] if this process may not write any more.
pub async fn set_all_paused(
    database: &Database,
    lease: NodeLease,
    paused: bool,
) -> Result<(), StoreError> {
    let mut client = database.pooled().await?;
    let work = async {
        let transaction = client.transaction().await?;
        let changed = transaction
            .execute(
                "UPDATE node SET paused = $2 WHERE node = $1 AND epoch = $3",
                &[&lease.node, &paused, &lease.epoch],
            )
            .await?;
        if changed == 1 {
            let all = "UPDATE node SET paused = $1 WHERE paused <> $1";
            transaction.execute(all, &[&paused]).await?;
            if lease.ledger == Ledger::Share {
                terms::note(&*transaction, lease).await?;
                // Rows that were made meanwhile. Whoever makes one from here on waits for this transaction.
                transaction.execute(all, &[&paused]).await?;
            }
        }
        transaction.commit().await?;
        Ok(changed)
    };
    let changed = database.timed("pausing every sale", work).await?;
    if changed == 1 {
        return Ok(());
    }
    Err(lease.is_lost())
}

/// Changes a SKU's total by `units`, at most once for each `request_key`.
///
/// # Errors
/// A CHECK violation if the total would fall below the units that orders have taken, or the database's
/// error.
pub async fn restock(
    database: &Database,
    lease: NodeLease,
    id: &SkuId,
    units: i64,
    request_key: Option<&str>,
) -> Result<(), StoreError> {
    let mut client = database.pooled().await?;
    let work = async {
        let transaction = client.transaction().await?;
        if !fence(&transaction, lease).await? {
            return Ok(false);
        }
        lock(&transaction, database.schema(), id).await?;
        transaction
            .execute(
                &lease.sql("WITH moved AS (
                     UPDATE sku SET total = total + $2 WHERE sku_id = $1 RETURNING id, total, held, sold
                 )
                 INSERT INTO stock_log (sku, @columncause, reference, total_delta, total_after, held_after, sold_after,
                                            request_key)
                 SELECT id, @node'admin', 'restock', $2, total, held, sold, $3 FROM moved"),
                &[&id.as_str(), &units, &request_key],
            )
            .await?;
        terms::note(&*transaction, lease).await?;
        transaction.commit().await?;
        Ok(true)
    };
    match database.timed("restocking", work).await? {
        true => Ok(()),
        false => Err(lease.is_lost()),
    }
}

/// The change of a SKU's total by an earlier request under this key, if there was one.
///
/// # Errors
/// If the database does not answer.
pub async fn restocked(
    database: &Database,
    id: &SkuId,
    request_key: &str,
) -> Result<Option<i64>, StoreError> {
    let client = database.pooled().await?;
    let row = database
        .timed(
            "looking a restock up",
            client.query_opt(
                "SELECT j.total_delta FROM stock_log j JOIN sku s ON s.id = j.sku
                  WHERE s.sku_id = $1 AND j.request_key = $2",
                &[&id.as_str(), &request_key],
            ),
        )
        .await?;
    Ok(row.map(|row| row.get(0)))
}

/// A SKU's total in the database.
///
/// # Errors
/// If the database does not answer.
pub async fn total_of(database: &Database, id: &SkuId) -> Result<Option<u32>, StoreError> {
    let client = database.pooled().await?;
    let row = database
        .timed(
            "reading a total",
            client.query_opt("SELECT total FROM sku WHERE sku_id = $1", &[&id.as_str()]),
        )
        .await?;
    Ok(row.and_then(|row| u32::try_from(row.get::<_, i64>(0)).ok()))
}

/// Tries to move a SKU's counters by `units` and rolls back. Returns the database's reason if it refuses
/// them.
///
/// # Errors
/// If the database does not answer.
pub async fn try_counters(
    database: &Database,
    lease: NodeLease,
    sku: SkuNumber,
    units: u32,
) -> Result<Option<String>, StoreError> {
    let mut client = database.pooled().await?;
    let work = async {
        let transaction = client.transaction().await?;
        let tried = transaction
            .execute(
                &lease.sql("UPDATE @ledger SET held = held + $2::int8 WHERE @id = $1@own"),
                &[&sku.0, &i64::from(units)],
            )
            .await;
        transaction.rollback().await?;
        Ok(tried)
    };
    match database.timed("trying a stock counter", work).await? {
        Ok(0) => Ok(Some("there is no such row in sku".to_owned())),
        Ok(_) => Ok(None),
        Err(error) if crate::store::error::refuses_row(&error) => {
            Ok(Some(crate::store::error::chain(&error)))
        }
        Err(error) => Err(StoreError::statement("trying a stock counter")(error)),
    }
}
