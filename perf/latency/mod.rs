//! P4: how long a waiting order takes at 10, 50, 80 and 100 % of what the service can do, under open
//! loop and from the moment that each request was due; beside a lone INSERT on the idle database.

mod plot;

use std::path::Path;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use tokio_postgres::Client;

use crate::baselines::TABLES;
use crate::rig::child::Server;
use crate::rig::compare::alternate;
use crate::rig::database::{self, Postgres};
use crate::rig::engine::HOT;
use crate::rig::load::{Load, load};
use crate::rig::{Finding, Lab, Scratch, Target, blocking};

/// Shares of capacity, in percent.
const SHARES: [u32; 4] = [10, 50, 80, 100];
const CONNECTIONS: usize = 512;

/// Runs the case.
pub async fn run(lab: &Lab) -> anyhow::Result<Vec<Finding>> {
    let scratch = Scratch::new()?;
    let postgres = Postgres::start(&scratch).await?;
    let url = postgres.database("latency").await?;
    let lone = database::connect(&postgres.database("lone").await?).await?;
    lone.batch_execute("SET search_path = public").await?;
    lone.batch_execute(TABLES).await?;
    let server = Server::start(&scratch.dir("millrace")?, &[("DATABASE__URL", &url)])?;
    server.put_sku(HOT, u32::MAX)?;
    let seconds = lab.pick(8.0, 4.0);
    let mut seed = 0;
    let mut offer = |rate: f64, seconds: f64| {
        seed += 1;
        let plan = Load {
            rate,
            seconds,
            mode: "wait",
            connections: CONNECTIONS,
            seed,
            more: ["--buyers", "4000000"].map(str::to_owned).to_vec(),
        };
        blocking(|| load(server.data, HOT, &plan))
    };
    // What it can do with this generator on the same cores: more than that is offered.
    offer(5_000.0, 1.0)?;
    let flood = offer(200_000.0, seconds)?;
    let capacity = flood.count("created") as f64 / (flood.number("elapsed_ms")? / 1_000.0);

    let mut next = 1;
    let names = ["201 at half capacity, p99 µs", "lone INSERT, p99 µs"];
    let rounds = alternate(lab.rounds(), names, async |side| match side {
        0 => Ok(offer(capacity / 2.0, seconds)?.latency_ms("created", "p99_ms")? * 1_000.0),
        _ => {
            let alone =
                insert_alone(&lone, &mut next, Duration::from_secs_f64(seconds / 2.0)).await?;
            Ok(alone.value_at_quantile(0.99) as f64)
        }
    })
    .await?;
    let mut findings = vec![
        Finding::spread(
            "p99 of a waiting order at half capacity / p99 of a lone INSERT",
            rounds.ratio(0, 1),
        )
        .against("P4", Target::AtMost(3.0)),
        Finding::spread("p99 of a lone INSERT, ms", rounds.side(1).times(0.001)),
        Finding::of("capacity with this generator, orders a second", capacity),
    ];
    let mut curves = Vec::new();
    for share in SHARES {
        let report = offer(capacity * f64::from(share) / 100.0, seconds)?;
        for (percentile, name) in [("p50_ms", "p50"), ("p99_ms", "p99"), ("p999_ms", "p99.9")] {
            let value = report.latency_ms("created", percentile)?;
            findings.push(Finding::of(
                format!("{name} at {share} % of capacity, ms"),
                value,
            ));
        }
        curves.push((format!("{share} %"), report.distribution("placed")));
    }
    server.audit()?;
    drop(server);
    drop(lone);
    postgres.stop().await?;
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("perf/latency/latency.svg");
    if lab.record {
        std::fs::write(&file, plot::svg(&curves))?;
    }
    Ok(findings)
}

/// One INSERT after the other, each its own transaction, on one connection. Microseconds.
async fn insert_alone(
    client: &Client,
    next: &mut i64,
    length: Duration,
) -> anyhow::Result<Histogram<u64>> {
    let insert = client
        .prepare(
            "INSERT INTO shop_orders (order_id, user_id, sku, quantity, amount, currency, status, created_at, expires_at)
             VALUES ($1, 'u-1', 1, 1, 100, 'EUR', 1, now(), now())",
        )
        .await?;
    let mut latencies = Histogram::new(3)?;
    let started = Instant::now();
    while started.elapsed() < length {
        let sent = Instant::now();
        client.execute(&insert, &[&*next]).await?;
        latencies.record(sent.elapsed().as_micros() as u64)?;
        *next += 1;
    }
    Ok(latencies)
}
