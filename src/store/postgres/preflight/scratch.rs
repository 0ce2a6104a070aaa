//! Measurements in a table that is like `orders`, in the same schema, and dropped afterwards.
//!
//! A process that is killed leaves it behind; the next preflight drops it. Everything but the measured commits
//! is done with `synchronous_commit = local`, so that a standby that is away does not keep the table.

use std::time::{Duration, Instant};

use bytes::BytesMut;
use futures_util::SinkExt;
use tokio::time::MissedTickBehavior;

use super::super::{Connected, Database};
use super::{SESSION, is_not_allowed};
use crate::order::{
    Currency, KeyHash, Order, OrderId, OrderStatus, PayloadHash, Quantity, SkuId, SkuNumber,
    UnixMillis, UserId,
};
use crate::store::{StoreError, copy};

/// Name of the table.
pub const TABLE: &str = "preflight_scratch";

/// Commits that are measured, one row each.
pub const COMMITS: u32 = 500;
/// Pause from one begin of a commit to the next: 100 a second.
pub const COMMIT_EVERY: Duration = Duration::from_millis(10);
/// Longest time for them all; a slow database is measured by fewer.
const COMMITS_MAX: Duration = Duration::from_secs(15);
/// Batches that are copied; the first one warms up.
const BATCHES: u32 = 5;

/// Begins what is sent as one text, and so is one transaction.
const LOCAL: &str = "SET LOCAL synchronous_commit = local";

/// What the scratch table showed.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Duration of each commit of one row.
    pub commits: Vec<Duration>,
    /// Rows a second in batches on one connection, commits included.
    pub rows_per_second: f64,
}

/// Measures commits, and COPY in batches of `rows`. `None`: the role may not make the table.
///
/// # Errors
/// The database's error. The table is dropped in any case, or [`StoreError::ScratchLeft`] says that it is not.
pub async fn measure(
    database: &Database,
    (session, backend): (&Connected, i32),
    rows: usize,
) -> Result<Option<Measured>, StoreError> {
    // Storage parameters are not part of LIKE.
    let create = format!(
        "{LOCAL}; CREATE TABLE {TABLE} (LIKE orders INCLUDING ALL)
             WITH (fillfactor = 70, autovacuum_enabled = off)"
    );
    let doing = "creating a scratch table";
    match database.timed(doing, session.batch_execute(&create)).await {
        Err(error) if is_not_allowed(&error) => return Ok(None),
        created => created?,
    }
    let measured = async {
        let commits = commits(database, session).await?;
        let rows_per_second = copied(database, session, rows).await?;
        Ok(Some(Measured {
            commits,
            rows_per_second,
        }))
    };
    let measured = measured.await;
    let dropped = match measured {
        Ok(_) => drop_table(database, session).await,
        Err(_) => drop_behind(database, backend).await,
    };
    dropped.map_err(left)?;
    measured
}

/// Ends a preflight whose session has this process id, and drops its table.
///
/// # Errors
/// [`StoreError::ScratchLeft`].
pub async fn give_up(database: &Database, backend: i32) -> Result<(), StoreError> {
    drop_behind(database, backend).await.map_err(left)
}

fn left(error: StoreError) -> StoreError {
    StoreError::ScratchLeft(error.to_string())
}

async fn commits(database: &Database, session: &Connected) -> Result<Vec<Duration>, StoreError> {
    let doing = "measuring commits";
    let insert = format!(
        "INSERT INTO {TABLE} VALUES ($1::int8, 'preflight', 0, 1, 0, 0, 'EUR', 1, now(), now(), NULL, 0, NULL)"
    );
    let insert = database.timed(doing, session.prepare(&insert)).await?;
    let mut tick = tokio::time::interval(COMMIT_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (began, mut commits) = (Instant::now(), Vec::new());
    for id in 1..=i64::from(COMMITS) {
        tick.tick().await;
        let started = Instant::now();
        database
            .timed(doing, session.execute(&insert, &[&id]))
            .await?;
        commits.push(started.elapsed());
        if began.elapsed() > COMMITS_MAX {
            break;
        }
    }
    Ok(commits)
}

/// Rows a second of the batches behind the first.
async fn copied(database: &Database, session: &Connected, rows: usize) -> Result<f64, StoreError> {
    let doing = "measuring COPY";
    let statement = copy::STATEMENT.replacen("orders", TABLE, 1);
    let statement = database.timed(doing, session.prepare(&statement)).await?;
    let mut order = typical()?;
    let mut took = Duration::ZERO;
    for batch in 0..BATCHES {
        let mut orders = Vec::with_capacity(rows);
        for at in 0..rows as u64 {
            // Above those of the single commits, in ascending order as in a sale.
            let id = (u64::from(batch) + 1) << 32 | at;
            order.id = OrderId::new(id).unwrap_or(order.id);
            orders.push(order.clone());
        }
        let mut encoded = BytesMut::new();
        let all = orders
            .iter()
            .map(|order| (order, OrderStatus::PendingPayment));
        copy::encode(&mut encoded, all);
        let started = Instant::now();
        let copying = async {
            let mut sink = std::pin::pin!(session.copy_in(&statement).await?);
            sink.as_mut().send(encoded.freeze()).await?;
            sink.finish().await
        };
        database.timed(doing, copying).await?;
        if batch > 0 {
            took += started.elapsed();
        }
    }
    Ok(rows as f64 * f64::from(BATCHES - 1) / took.as_secs_f64().max(1e-6))
}

/// An order of usual lengths.
fn typical() -> Result<Order, StoreError> {
    let now = UnixMillis::now();
    let currency = Currency::new("EUR").map_err(|wrong| StoreError::Data(wrong.to_string()))?;
    Ok(Order {
        id: OrderId::MIN,
        user_id: UserId::from_row("user-0123456789"),
        sku_id: std::sync::Arc::new(SkuId::from_row("preflight")),
        sku: SkuNumber(0),
        quantity: Quantity::ONE,
        adjustment: 0,
        amount: 199_900,
        currency,
        created_at: now,
        expires_at: now.plus_ms(900_000),
        key: Some(KeyHash([0x5a; 16])),
        payload: PayloadHash(0x5a5a_5a5a_5a5a),
        attributes: None,
    })
}

/// Drops the table, if it is there.
pub(super) async fn drop_table(database: &Database, session: &Connected) -> Result<(), StoreError> {
    let drop = format!("{LOCAL}; DROP TABLE IF EXISTS {TABLE}");
    let doing = "dropping the scratch table";
    database.timed(doing, session.batch_execute(&drop)).await
}

/// Drops it on another connection, because the session may still be at work in it.
async fn drop_behind(database: &Database, backend: i32) -> Result<(), StoreError> {
    let session = database.connect(SESSION).await?;
    let doing = "ending a measurement";
    let end = "SELECT pg_terminate_backend($1, $2)";
    let patience = database.step_timeout().as_millis() as i64 / 2;
    database
        .timed(doing, session.query(end, &[&backend, &patience]))
        .await?;
    drop_table(database, &session).await
}
