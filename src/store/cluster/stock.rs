//! What nodes read of their shares and of the sale as a whole.

use std::collections::BTreeMap;

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
    let books = |row: &tokio_postgres::Row| {
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
///
/// # Errors
/// If the database does not answer.
pub async fn sales(database: &Database) -> Result<(Vec<Sale>, i64), StoreError> {
    let client = database.pooled().await?;
    let rows = database
        .timed(
            "reading the stock of every SKU",
            client.query(
                "SELECT s.id, s.total, s.held + coalesce(h.held, 0), s.sold + coalesce(h.sold, 0),
                        s.total - s.held - s.sold - s.lent, s.recall IS NOT NULL,
                        (SELECT count(*) FROM node WHERE state = 'active')
                   FROM sku s
                   LEFT JOIN (SELECT sku, sum(held)::int8 AS held, sum(sold)::int8 AS sold FROM stock_share GROUP BY sku) h
                     ON h.sku = s.id",
                &[],
            ),
        )
        .await?;
    let sale = |row: &tokio_postgres::Row| Sale {
        sku: SkuNumber(row.get(0)),
        total: row.get(1),
        held: row.get(2),
        sold: row.get(3),
        pool: row.get(4),
        is_recalled: row.get(5),
    };
    let nodes = rows.first().map_or(1, |row| row.get(6));
    Ok((rows.iter().map(sale).collect(), nodes))
}
