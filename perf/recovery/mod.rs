//! P8: a start that finds a journal full of acknowledged orders, beside COPY of the same rows.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::rig::child::Server;
use crate::rig::compare::{Spread, alternate};
use crate::rig::database::{self, Postgres};
use crate::rig::engine::{self, HOT, RawCopy};
use crate::rig::flood::{Template, flood};
use crate::rig::{Finding, Lab, Scratch, Target, blocking};

/// Orders in the journal.
const ORDERS: u64 = 1_000_000;
const ORDERS_QUICK: u64 = 200_000;
const CONNECTIONS: usize = 512;

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
    ])
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
