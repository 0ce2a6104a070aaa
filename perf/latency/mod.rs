//! P4: how long a waiting order takes at 10, 50, 80 and 100 % of what the service can do, under open
//! loop and from the moment that each request was due; beside a lone INSERT on the idle database.

mod plot;

use std::path::Path;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use tokio_postgres::Client;

use crate::baselines::TABLES;
use crate::fixture::child::Server;
use crate::fixture::compare::alternate;
use crate::fixture::database::{self, Postgres};
use crate::fixture::engine::HOT;
use crate::fixture::flood::{Flooded, Template, flood, offer};
use crate::fixture::{Finding, Lab, Scratch, Target, blocking};

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
    let length = Duration::from_secs(lab.pick(8, 4));
    let mut order = Template::order(HOT, "");
    let mut placed = |rate: Option<f64>, length| -> anyhow::Result<Flooded> {
        let answered = blocking(|| match rate {
            Some(rate) => offer(server.data, CONNECTIONS, rate, length, &mut order),
            None => flood(server.data, CONNECTIONS, length, &mut order),
        })?;
        answered.only(201)
    };
    // What it can do with this client on the same cores.
    placed(None, length / 8)?;
    let capacity = placed(None, length)?.rate(201);

    let mut next = 1;
    let names = ["201 at half capacity, p99 µs", "lone INSERT, p99 µs"];
    let rounds = alternate(lab.rounds(), names, async |side| match side {
        0 => {
            let at_half = placed(Some(capacity / 2.0), length)?;
            Ok(at_half.latency.value_at_quantile(0.99) as f64)
        }
        _ => {
            let alone = insert_alone(&lone, &mut next, length / 2).await?;
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
        Finding::of("capacity in a closed loop, orders a second", capacity),
    ];
    let mut curves = Vec::new();
    for share in SHARES {
        let latency = placed(Some(capacity * f64::from(share) / 100.0), length)?.latency;
        for (quantile, name) in [(0.5, "p50"), (0.99, "p99"), (0.999, "p99.9")] {
            findings.push(Finding::of(
                format!("{name} at {share} % of capacity, ms"),
                latency.value_at_quantile(quantile) as f64 / 1_000.0,
            ));
        }
        curves.push((format!("{share} %"), plot::curve(&latency)));
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
