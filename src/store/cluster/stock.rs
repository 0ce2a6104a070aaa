//! What nodes read of their shares and of the sale as a whole.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tokio_postgres::Row;

use crate::order::SkuNumber;
use crate::store::StoreError;
use crate::store::postgres::Database;

/// What a node's lending has done to one of its shares, over the life of its row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Books {
    /// Units that the pool has lent, less those given back.
    pub borrowed: i64,
    /// Sold units that were moved to `sku`.
    pub swept: i64,
}

/// The books of a node's shares of these SKUs, after every transaction on them that is under way.
///
/// # Errors
/// If the database does not answer.
pub async fn books(
    database: &Database,
    node: i16,
    skus: &[SkuNumber],
) -> Result<BTreeMap<SkuNumber, Books>, StoreError> {
    let mut client = database.pooled().await?;
    let ids: Vec<i32> = skus.iter().map(|sku| sku.0).collect();
    let work = async {
        let transaction = client.transaction().await?;
        transaction
            .execute(
                "SELECT FROM sku WHERE id = ANY ($1) ORDER BY id FOR UPDATE",
                &[&ids],
            )
            .await?;
        let rows = transaction
            .query(
                "SELECT sku, borrowed, swept FROM stock_share WHERE sku = ANY ($1) AND node = $2",
                &[&ids, &node],
            )
            .await?;
        transaction.commit().await?;
        Ok(rows)
    };
    let rows = database.timed("reading the books of shares", work).await?;
    let books = |row: &Row| {
        let books = Books {
            borrowed: row.get(1),
            swept: row.get(2),
        };
        (SkuNumber(row.get(0)), books)
    };
    Ok(rows.iter().map(books).collect())
}

/// The counters of a SKU over all nodes, at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sale {
    /// The SKU.
    pub sku: SkuNumber,
    /// Units that the sale offers.
    pub total: i64,
    /// Units of unpaid orders, in every share and outside.
    pub held: i64,
    /// Units of paid orders, in every share and outside.
    pub sold: i64,
    /// Units that are lent to no node and not taken.
    pub pool: i64,
    /// Whether a total is being lowered, so that nothing is lent.
    pub is_recalled: bool,
}

/// The counters of every SKU, and the number of active nodes, in one snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sales {
    /// A moment before the snapshot.
    pub read_at: Instant,
    /// Names the counters: others have another one.
    pub version: i64,
    /// `None`: those of the version that the caller has.
    pub sales: Option<Vec<Sale>>,
    /// Active nodes.
    pub nodes: i64,
}

/// The counters that a node has brought up to date within `age_max`; if they are older, this one does it. The caller has
/// `known`. `None`: another node does it at this moment.
///
/// Ages are told by the database's clock. If it is set meanwhile, the counters are read anew.
///
/// # Errors
/// If the database does not answer.
pub async fn sales(
    database: &Database,
    known: Option<i64>,
    age_max: Duration,
) -> Result<Option<Sales>, StoreError> {
    let client = database.pooled().await?;
    let asked_at = Instant::now();
    let known = known.unwrap_or(0);
    let reading = async {
        let read = client.prepare_cached(READ).await?;
        client.query_opt(&read, &[&known]).await
    };
    let read = database.timed(DOING, reading).await?;
    if let Some(row) = &read {
        let age = u64::try_from(row.get::<_, i64>(3)).map(Duration::from_micros);
        if let Some(age) = age.ok().filter(|age| *age <= age_max) {
            // Told after the question was sent, so the snapshot is no older by this clock.
            return from_row(row, asked_at.checked_sub(age).unwrap_or(asked_at)).map(Some);
        }
    }
    let asked_at = Instant::now();
    let adding_up = async {
        if read.is_none() {
            client.execute(FIRST, &[]).await?;
        }
        let add_up = client.prepare_cached(ADD_UP).await?;
        let age_max = i64::try_from(age_max.as_micros()).unwrap_or(i64::MAX);
        client.query_opt(&add_up, &[&known, &age_max]).await
    };
    let added_up = database.timed(DOING, adding_up).await?;
    added_up.map(|row| from_row(&row, asked_at)).transpose()
}

const DOING: &str = "reading the stock of every SKU";

/// The row as it stands, with its age in microseconds. $1: the version that is known.
const READ: &str = "
    SELECT version, nodes, CASE WHEN version <> $1 THEN counters END,
           (extract(epoch FROM clock_timestamp() - read_at) * 1000000)::int8
      FROM (SELECT (extract(epoch FROM changed_at) * 1000000)::int8 AS version, * FROM sale_counters) c";

/// Makes the row, older than anything.
const FIRST: &str = "
    INSERT INTO sale_counters (read_at, changed_at, nodes, counters) VALUES ('epoch', 'epoch', 0, '') ON CONFLICT DO NOTHING";

/// Adds the shares up, if the row is older than $2 microseconds and nobody else does. $1: the version that is known. The
/// clock is read before the snapshot is taken.
const ADD_UP: &str = "
    WITH old AS MATERIALIZED (
        SELECT FROM sale_counters
         WHERE NOT read_at BETWEEN clock_timestamp() - $2::int8 * interval '1 microsecond' AND clock_timestamp()
           FOR UPDATE SKIP LOCKED
    ), new AS MATERIALIZED (
        SELECT coalesce(string_agg(int8send(s.id) || int8send(s.total) || int8send(s.held + coalesce(h.held, 0))
                                   || int8send(s.sold + coalesce(h.sold, 0)) || int8send(s.total - s.held - s.sold - s.lent)
                                   || int8send((s.recall IS NOT NULL)::int), '' ORDER BY s.id), '') AS counters
          FROM sku s
          LEFT JOIN (SELECT sku, sum(held)::int8 AS held, sum(sold)::int8 AS sold FROM stock_share GROUP BY sku) h
            ON h.sku = s.id
         WHERE EXISTS (SELECT FROM old)
    ), moved AS (
        UPDATE sale_counters c
           SET read_at = statement_timestamp(),
               nodes = (SELECT count(*) FROM node WHERE state = 'active'),
               changed_at = CASE WHEN c.counters = new.counters THEN c.changed_at ELSE statement_timestamp() END,
               counters = CASE WHEN c.counters = new.counters THEN c.counters ELSE new.counters END
          FROM old, new
        RETURNING (extract(epoch FROM c.changed_at) * 1000000)::int8 AS version, c.nodes, c.counters
    )
    SELECT version, nodes, CASE WHEN version <> $1 THEN counters END FROM moved";

fn from_row(row: &Row, read_at: Instant) -> Result<Sales, StoreError> {
    let counters: Option<&[u8]> = row.get(2);
    let sales = counters.map(|bytes| {
        let (skus, rest) = bytes.as_chunks::<{ 6 * 8 }>();
        let sales = skus.iter().map(sale).collect::<Option<Vec<_>>>();
        sales.filter(|_| rest.is_empty())
    });
    if sales == Some(None) {
        let message = "the row of sale_counters is not one of this release".to_owned();
        return Err(StoreError::Data(message));
    }
    Ok(Sales {
        read_at,
        version: row.get(0),
        sales: sales.flatten(),
        nodes: row.get(1),
    })
}

fn sale(counters: &[u8; 6 * 8]) -> Option<Sale> {
    let (words, _) = counters.as_chunks::<8>();
    let [id, total, held, sold, pool, recall] = words else {
        return None;
    };
    let number = |word: &[u8; 8]| i64::from_be_bytes(*word);
    Some(Sale {
        sku: SkuNumber(i32::try_from(number(id)).ok()?),
        total: number(total),
        held: number(held),
        sold: number(sold),
        pool: number(pool),
        is_recalled: number(recall) != 0,
    })
}

/// Units of all SKUs that are lent to no node and not taken.
///
/// # Errors
/// If the database does not answer.
pub async fn pool(database: &Database) -> Result<i64, StoreError> {
    let client = database.pooled().await?;
    let sql = "SELECT coalesce(sum(total - held - sold - lent), 0)::int8 FROM sku";
    let row = database.timed(DOING, client.query_one(sql, &[])).await?;
    Ok(row.get(0))
}
