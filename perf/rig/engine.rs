//! Millrace without HTTP, in this process: the same wiring as `millrace serve`, driven at its intake.
//! Beside it what no engine can beat: COPY of the same rows, encoded beforehand.

use std::path::Path;
use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bytes::{Bytes, BytesMut};
use futures_util::SinkExt;
use millrace::app::Millrace;
use millrace::config::Config;
use millrace::order::{
    Currency, IdempotencyKey, KeyHash, Order, OrderId, OrderStatus, PayloadHash, Quantity, Refusal,
    SkuId, SkuNumber, UnixMillis, UserId,
};
use millrace::pipeline::orders::intake::{Intake, OrderRequest};
use millrace::store::{batch, copy};
use tokio_postgres::Client;

use super::database::connect;

/// The one SKU that everybody wants.
pub const HOT: &str = "HOT";
/// Rows of a commit, for both: the default of `workers.batch_rows_max`.
pub const BATCH_ROWS: usize = 5_000;
/// How long the engine may take over what it was given.
const PATIENCE: Duration = Duration::from_secs(300);

/// Starts Millrace on a database, with the hot SKU on sale.
///
/// # Errors
/// Where it does not start.
pub async fn start(
    url: &str,
    data_dir: &Path,
    change: impl FnOnce(&mut Config),
) -> anyhow::Result<Millrace> {
    let mut config = Config {
        data_dir: data_dir.to_owned(),
        ..Config::default()
    };
    config.database.url = url.to_owned();
    config.data_plane.listen.set_port(0);
    config.control_plane.listen.set_port(0);
    config.orders.timeout_ms = 60_000;
    change(&mut config);
    let millrace = Millrace::start(config).await?;
    let body =
        serde_json::json!({ "unit_price": 100, "currency": "EUR", "total": u32::MAX }).to_string();
    let control = millrace.control_plane;
    let put = tokio::task::spawn_blocking(move || {
        super::child::call(control, "PUT", &format!("/admin/v1/skus/{HOT}"), &body)
    });
    let (status, answer) = put.await??;
    ensure!(status / 100 == 2, "PUT of the hot SKU: {status} {answer}");
    Ok(millrace)
}

/// What buyer `number` sends.
///
/// # Panics
/// Never: the texts are valid.
pub fn request(number: u64, respond_async: bool) -> OrderRequest<'static> {
    let mut text = *b"u-0000000000";
    let mut rest = number;
    for digit in text[2..].iter_mut().rev() {
        *digit = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    let text = std::str::from_utf8(&text).expect("digits");
    OrderRequest {
        user_id: UserId::new(text).expect("a user id"),
        sku_id: SkuId::new(HOT).expect("a SKU id"),
        quantity: Quantity::ONE,
        adjustment: 0,
        attributes: None,
        key: Some(KeyHash::of(IdempotencyKey::new(text).expect("a key"))),
        wait: Duration::from_secs(60),
        respond_async,
    }
}

/// Gives the engine `orders` orders from a thread of its own, as fast as it takes them, and waits until every
/// one is a committed row. Orders a second.
///
/// # Errors
/// Where an order is refused for anything but a full queue.
pub async fn persist(millrace: &Millrace, first: u64, orders: u64) -> anyhow::Result<f64> {
    let (intake, state) = (Arc::clone(millrace.intake()), Arc::clone(millrace.state()));
    let started = Instant::now();
    let driver = tokio::task::spawn_blocking(move || give(&intake, first..first + orders, None));
    driver.await??;
    while !state.pending.is_empty() {
        ensure!(started.elapsed() < PATIENCE, "the engine does not finish");
        tokio::time::sleep(Duration::from_micros(500)).await;
    }
    Ok(orders as f64 / started.elapsed().as_secs_f64())
}

/// Admits one order for each number; with a waker each is to be acknowledged at once, and wakes it. A full
/// queue is waited for, as a client with `Retry-After` does.
///
/// # Errors
/// Another refusal.
pub fn give(
    intake: &Intake,
    numbers: std::ops::Range<u64>,
    waker: Option<&Waker>,
) -> anyhow::Result<()> {
    let started = Instant::now();
    let waker = waker.map(|waker| Arc::new(waker.clone()));
    for number in numbers {
        let request = request(number, waker.is_some());
        loop {
            match intake.admit(&request, waker.as_ref()) {
                Ok(_) => break,
                Err(Refusal::Overloaded | Refusal::Backlogged { .. }) => {
                    ensure!(started.elapsed() < PATIENCE, "the queue stays full");
                    std::thread::sleep(Duration::from_micros(200));
                }
                Err(refusal) => anyhow::bail!("an order was refused: {refusal:?}"),
            }
        }
    }
    Ok(())
}

/// Rows as the engine would write them, from `first` on. Their ids lie below all that Millrace gives out.
pub fn rows(first: u64, count: u64, sku: SkuNumber) -> Vec<Order> {
    let now = UnixMillis::now();
    let sku_id = Arc::new(SkuId::new(HOT).expect("a SKU id"));
    (first..first + count)
        .map(|number| {
            let request = request(number, false);
            Order {
                id: OrderId::new(number + 1).unwrap_or(OrderId::MAX),
                payload: PayloadHash::of(&request.sku_id, request.quantity, 0, None),
                key: request.key,
                user_id: request.user_id,
                sku_id: Arc::clone(&sku_id),
                sku,
                quantity: Quantity::ONE,
                adjustment: 0,
                amount: 100,
                currency: Currency::new("EUR").expect("a currency"),
                created_at: now,
                expires_at: now.plus_ms(900_000),
                attributes: None,
            }
        })
        .collect()
}

/// The ceiling: connections that do nothing but COPY what was encoded beforehand, each commit with its counters.
pub struct RawCopy {
    clients: Vec<Client>,
    sku: SkuNumber,
}

impl RawCopy {
    /// With so many connections, into the tables that Millrace made in this database.
    ///
    /// # Errors
    /// Where a connection cannot be made, or the SKU is not there.
    pub async fn connect(url: &str, connections: usize) -> anyhow::Result<Self> {
        let mut clients = Vec::new();
        for _ in 0..connections {
            clients.push(connect(url).await?);
        }
        let first = clients.first().context("a ceiling needs a connection")?;
        let row = first
            .query_one("SELECT id FROM sku WHERE sku_id = $1", &[&HOT])
            .await?;
        Ok(RawCopy {
            sku: SkuNumber(row.get(0)),
            clients,
        })
    }

    /// Writes `count` rows, numbered from `first` on. Rows a second, without the encoding.
    ///
    /// # Errors
    /// Where the database fails.
    pub async fn write(&self, first: u64, count: u64) -> anyhow::Result<f64> {
        let orders = rows(first, count, self.sku);
        let mut shares: Vec<Vec<(Bytes, i64)>> = vec![Vec::new(); self.clients.len()];
        for (number, part) in orders.chunks(BATCH_ROWS).enumerate() {
            let mut buffer = BytesMut::new();
            let rows = part
                .iter()
                .map(|order| (order, OrderStatus::PendingPayment));
            copy::encode(&mut buffer, rows);
            let turn = number % shares.len();
            shares[turn].push((buffer.freeze(), part.len() as i64));
        }
        drop(orders);
        let started = Instant::now();
        let work = self
            .clients
            .iter()
            .zip(shares)
            .map(|(client, share)| copy_all(client, share, self.sku));
        futures_util::future::try_join_all(work).await?;
        Ok(count as f64 / started.elapsed().as_secs_f64())
    }
}

async fn copy_all(client: &Client, share: Vec<(Bytes, i64)>, sku: SkuNumber) -> anyhow::Result<()> {
    let copy = client.prepare(copy::STATEMENT).await?;
    let counter = client.prepare(batch::COUNTER).await?;
    for (rows, units) in share {
        let (begun, sink) = tokio::join!(
            client.batch_execute("BEGIN"),
            client.copy_in::<_, Bytes>(&copy)
        );
        begun?;
        let mut sink = std::pin::pin!(sink?);
        let copied = async {
            sink.as_mut().send(rows).await?;
            sink.as_mut().finish().await
        };
        let counted: [&(dyn tokio_postgres::types::ToSql + Sync); 3] =
            [&sku.0, &units, &"the ceiling"];
        let (copied, counted, committed) = tokio::join!(
            copied,
            client.execute(&counter, &counted),
            client.batch_execute("COMMIT")
        );
        copied?;
        counted?;
        committed?;
    }
    Ok(())
}
