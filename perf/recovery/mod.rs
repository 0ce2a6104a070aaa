//! P8: a start that finds a journal full of acknowledged orders, beside COPY of the same rows; and one
//! whose few orders lie days apart among the rows of others.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use millrace::order::{OrderId, UnixMillis};
use millrace::queue::log::file::disk::RealDisk;
use millrace::queue::log::file::{Opened, Writer, prepare};
use millrace::queue::log::record::{GroupBytes, Record};
use serde_json::Value;

use crate::fixture::child::Server;
use crate::fixture::compare::{Spread, alternate};
use crate::fixture::database::{self, Postgres};
use crate::fixture::engine::{self, HOT, RawCopy};
use crate::fixture::flood::{Template, flood};
use crate::fixture::{Finding, Lab, Scratch, Target, blocking};

/// Orders in the journal.
const ORDERS: u64 = 1_000_000;
const ORDERS_QUICK: u64 = 200_000;
const CONNECTIONS: usize = 512;
/// Rows among which the few orders lie, the days of the rows, and these orders.
const ROWS: u64 = 20_000_000;
const ROWS_QUICK: u64 = 500_000;
const DAYS: u64 = 10;
const FEW: u64 = 2_000;

/// Runs the case.
pub async fn run(lab: &Lab) -> anyhow::Result<Vec<Finding>> {
    let scratch = Scratch::new()?;
    let postgres = Postgres::start(&scratch).await?;
    let (url, raw_url) = (
        postgres.database("replayed").await?,
        postgres.database("raw").await?,
    );
    engine::start(&raw_url, &scratch.dir("raw")?, |_| {})
        .await?
        .drain()
        .await;
    // Replay has one connection, so its ceiling has.
    let raw = RawCopy::connect(&raw_url, 1).await?;
    let raw_client = database::connect(&raw_url).await?;
    let client = database::connect(&url).await?;
    let wanted = lab.pick(ORDERS, ORDERS_QUICK);
    let dir = scratch.dir("millrace")?;
    let (mut buyer, mut first) = (1, 0);
    let mut with_all_there = Vec::new();
    let names = ["replay, orders/s", "raw COPY, rows/s"];
    let rounds = alternate(lab.pick(3, 2), names, async |side| {
        if side == 1 {
            first += 2 * wanted;
            raw_client.batch_execute("TRUNCATE orders").await?;
            database::settle(&raw_client).await?;
            return raw.write(first, wanted).await;
        }
        let orders = fill(&dir, &url, wanted, &mut buyer).await?;
        let journal = dir.join("journal");
        let kept = dir.join("kept");
        copy_dir(&journal, &kept)?;
        client
            .batch_execute("TRUNCATE orders; UPDATE sku SET held = 0")
            .await?;
        database::settle(&client).await?;
        let (replayed, seconds) = start(&dir, &url)?;
        ensure!(
            replayed == orders,
            "{replayed} of {orders} orders were replayed"
        );
        let rate = orders as f64 / seconds;
        // The same journal again, with every row there.
        std::fs::remove_dir_all(&journal)?;
        std::fs::rename(&kept, &journal)?;
        let (replayed, seconds) = start(&dir, &url)?;
        ensure!(
            replayed == 0,
            "{replayed} orders were replayed that were there"
        );
        with_all_there.push(orders as f64 / seconds);
        std::fs::remove_dir_all(&journal)?;
        client
            .batch_execute(
                "TRUNCATE orders; UPDATE sku SET held = 0; UPDATE node SET journal_in_use = false",
            )
            .await?;
        Ok(rate)
    })
    .await?;
    let rows = lab.pick(ROWS, ROWS_QUICK);
    fill(&dir, &url, FEW, &mut buyer).await?;
    spread(&dir.join("journal"))?;
    load(&url, rows).await?;
    let started = Instant::now();
    let (replayed, with_gaps) = start(&dir, &url)?;
    let ready = started.elapsed().as_secs_f64();
    ensure!(replayed == FEW, "{replayed} of {FEW} orders were replayed");
    postgres.stop().await?;
    let copy = rounds.side(1).median;
    let again: Vec<f64> = with_all_there.iter().map(|rate| copy / rate).collect();
    Ok(vec![
        Finding::spread(
            format!("replay of {wanted} orders into an empty table, time / raw COPY's, one connection each"),
            rounds.ratio(1, 0),
        )
        .against("P8", Target::AtMost(1.3)),
        Finding::spread("replay with every row there, time / raw COPY's", Spread::of(&again))
            .against("P8b", Target::AtMost(0.3)),
        Finding::spread("replayed orders a second", rounds.side(0)),
        Finding::of(
            format!("replay of {FEW} orders that lie among {rows} rows of {DAYS} days, right after these were loaded, s"),
            with_gaps,
        )
        .against("P8c", Target::AtMost(5.0)),
        Finding::of("such a start, until it is ready, s", ready)
            .against("P8d", Target::AtMost(20.0)),
    ])
}

/// The id of the order number `at` of `of` that are spread over the days, ending now. `last` sets
/// its last bits: who has which.
fn spread_id(now: UnixMillis, at: u64, of: u64, last: u64) -> anyhow::Result<OrderId> {
    let days_ms = DAYS * 86_400_000;
    let moment = UnixMillis(now.0 - (days_ms - days_ms * at / of) as i64);
    OrderId::new(OrderId::floor_of(moment).get() | last).context("an order id")
}

/// Writes the journal anew, with a few of its orders in one segment, under ids that lie days apart.
fn spread(journal: &Path) -> anyhow::Result<()> {
    let opened = Opened::at(journal, 0, [0; 16], |_, _| {})?;
    let identity = opened.identity;
    let (now, mut orders) = (UnixMillis::now(), Vec::new());
    opened.records(|record| {
        if let Record::Order(order) = record
            && (orders.len() as u64) < FEW
        {
            orders.push(*order);
        }
    })?;
    drop(opened);
    std::fs::remove_dir_all(journal)?;
    std::fs::create_dir_all(journal)?;
    let disk = RealDisk::lock(journal)?.context("the journal is in use")?;
    let segment = Arc::new(prepare(&disk, &identity, 1)?);
    let mut writer = Writer::new(segment, identity.sectors(), 1);
    let mut group = GroupBytes::default();
    let count = orders.len() as u64;
    for (at, mut order) in orders.into_iter().enumerate() {
        // A bit that no row has.
        order.id = spread_id(now, at as u64, count, 1 << 21)?;
        group.begin(1, at as u64 + 1);
        group.push_order(&order);
        writer.commit(&group.group())?;
    }
    Ok(())
}

/// Loads rows of others in the days before. Statistics are taken at the worst moment: while the rows are
/// there and not committed, so that the planner believes the table to be nearly empty.
async fn load(url: &str, rows: u64) -> anyhow::Result<()> {
    let (loading, client) = (database::connect(url).await?, database::connect(url).await?);
    let first = spread_id(UnixMillis::now(), 0, 1, 0)?.get() >> 22;
    let days_ms = DAYS * 86_400_000;
    loading
        .batch_execute(&format!(
            "BEGIN;
             INSERT INTO orders (order_id, user_id, sku, quantity, adjustment, amount, currency, status, created_at,
                                 expires_at, key_hash, payload_hash)
             SELECT ({first} + i * {days_ms} / {rows}) << 22 | i % 1000, 'before-' || i, 1, 1, 0, 100, 'EUR', 3, now(), now(),
                    md5(i::text)::uuid, i
               FROM generate_series(1, {rows}::int8) i"
        ))
        .await?;
    client.batch_execute("ANALYZE orders").await?;
    Ok(loading.batch_execute("COMMIT").await?)
}

/// Leaves a journal with acknowledged orders and nothing in the database, as after a crash while the
/// database was away. How many.
async fn fill(dir: &Path, url: &str, wanted: u64, buyer: &mut u64) -> anyhow::Result<u64> {
    let server = Server::start(
        dir,
        &[
            ("DATABASE__URL", url),
            // Workers wait for the lock below all the while.
            ("DATABASE__STEP_TIMEOUT_MS", "600000"),
            ("ORDERS__PAYMENT_TTL_MS", "86400000"),
        ],
    )?;
    server.put_sku(HOT, u32::MAX)?;
    let mut pause = database::connect(url).await?;
    let paused = pause.transaction().await?;
    paused
        .batch_execute("LOCK TABLE orders IN ACCESS EXCLUSIVE MODE")
        .await?;
    let mut order = Template::order(HOT, "Prefer: respond-async\r\n").starting_at(*buyer);
    let mut acknowledged = 0;
    while acknowledged < wanted {
        let flooded =
            blocking(|| flood(server.data, CONNECTIONS, Duration::from_secs(1), &mut order))?;
        acknowledged += flooded.count(202);
        ensure!(
            flooded.count(202) > 0,
            "nothing is acknowledged: {:?}",
            flooded.answers
        );
    }
    *buyer = order.next_number();
    let orders = server.metric("millrace_journal_orders_total")? as u64;
    server.process.kill();
    paused.rollback().await?;
    Ok(orders)
}

/// Starts on that journal and ends the process again. How many orders it replayed, and in what time.
fn start(dir: &Path, url: &str) -> anyhow::Result<(u64, f64)> {
    let started = Instant::now();
    let server =
        blocking(|| Server::start(dir, &[("DATABASE__URL", url), ("LOG__FORMAT", "json")]))?;
    eprintln!("    ready after {:.1} s", started.elapsed().as_secs_f64());
    server.process.kill();
    let log = std::fs::read_to_string(dir.join("millrace.log"))?;
    let line = log
        .lines()
        .find(|line| line.contains("\"replayed the journal\""))
        .context("nothing was replayed")?;
    let line: Value = serde_json::from_str(line)?;
    let figure = |name: &str| {
        line.get(name)
            .or(line["fields"].get(name))
            .and_then(Value::as_u64)
    };
    Ok((
        figure("written").context("the log does not say how many")?,
        figure("ms").context("the log does not say how long")? as f64 / 1_000.0,
    ))
}

fn copy_dir(from: &Path, to: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            std::fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
    }
    Ok(())
}
