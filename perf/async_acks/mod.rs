//! Orders that are acknowledged as soon as they are durable in the journal, in process and with the
//! workers paused, beside raw COPY. Over HTTP: `order_logs`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Wake, Waker};
use std::time::{Duration, Instant};

use anyhow::ensure;
use millrace::app::Millrace;
use tokio_postgres::Client;

use crate::fixture::compare::alternate;
use crate::fixture::database::{self, Postgres};
use crate::fixture::engine::{self, RawCopy};
use crate::fixture::{Finding, Lab, Scratch};

/// Orders that are acknowledged in a round.
const ORDERS: u64 = 400_000;
/// Threads that place orders, as the data plane has one for each of two cores.
const DRIVERS: u64 = 2;
/// Rows that raw COPY writes in a round.
const ROWS: u64 = 300_000;
const PATIENCE: Duration = Duration::from_secs(120);

/// Runs the case.
pub async fn run(lab: &Lab) -> anyhow::Result<Vec<Finding>> {
    let scratch = Scratch::new()?;
    let postgres = Postgres::start(&scratch).await?;
    let url = postgres.database("acks").await?;
    let raw_url = postgres.database("acks_raw").await?;
    let millrace = engine::start(&url, &scratch.dir("engine")?, |config| {
        // Workers that wait for a lock must not give it up.
        config.database.step_timeout_ms = 600_000;
    })
    .await?;
    // Only for its tables and its SKU.
    engine::start(&raw_url, &scratch.dir("raw")?, |_| {})
        .await?
        .drain()
        .await;
    let raw =
        RawCopy::connect(&raw_url, millrace::config::Config::default().worker_count()).await?;
    let mut first = 0;
    let rounds = alternate(
        lab.rounds(),
        ["durable acks/s", "raw COPY rows/s"],
        async |side| {
            first += ORDERS;
            match side {
                0 => acknowledge(&millrace, &url, first).await,
                _ => raw.write(first, ROWS).await,
            }
        },
    )
    .await?;
    millrace.drain().await;
    postgres.stop().await?;
    Ok(vec![
        Finding::spread(
            "durable acknowledgements in process, workers paused / raw COPY",
            rounds.ratio(0, 1),
        ),
        Finding::spread(
            "durable acknowledgements in process, a second",
            rounds.side(0),
        ),
    ])
}

/// Counts acknowledgements: each wakes its order's waker once.
struct Counter(AtomicU64);

impl Wake for Counter {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Pauses the workers, has orders acknowledged, and lets the workers write them afterwards.
async fn acknowledge(millrace: &Millrace, url: &str, first: u64) -> anyhow::Result<f64> {
    let mut pause = database::connect(url).await?;
    let paused = pause_workers(&mut pause).await?;
    let counter = Arc::new(Counter(AtomicU64::new(0)));
    let waker = Waker::from(Arc::clone(&counter));
    let intake = Arc::clone(millrace.intake());
    let started = Instant::now();
    let share = ORDERS / DRIVERS;
    let giving = (0..DRIVERS).map(|driver| {
        let (intake, waker) = (Arc::clone(&intake), waker.clone());
        let numbers = first + driver * share..first + (driver + 1) * share;
        tokio::task::spawn_blocking(move || engine::give(&intake, numbers, Some(&waker)))
    });
    for given in futures_util::future::join_all(giving).await {
        given??;
    }
    while counter.0.load(Ordering::Relaxed) < ORDERS {
        ensure!(
            started.elapsed() < PATIENCE,
            "not every order is acknowledged"
        );
        tokio::time::sleep(Duration::from_micros(200)).await;
    }
    let rate = ORDERS as f64 / started.elapsed().as_secs_f64();
    let acknowledged = counter.0.load(Ordering::Relaxed);
    ensure!(
        acknowledged == ORDERS,
        "{acknowledged} acknowledgements of {ORDERS} orders"
    );
    paused.rollback().await?;
    // Everything that was acknowledged becomes a row before the next round.
    let deadline = Instant::now() + PATIENCE;
    while millrace.state().pending.in_flight() > 0 {
        ensure!(
            Instant::now() < deadline,
            "acknowledged orders do not become rows"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(rate)
}

async fn pause_workers(client: &mut Client) -> anyhow::Result<tokio_postgres::Transaction<'_>> {
    let paused = client.transaction().await?;
    paused
        .batch_execute("LOCK TABLE orders IN ACCESS EXCLUSIVE MODE")
        .await?;
    Ok(paused)
}
