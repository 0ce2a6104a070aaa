//! What events cost: waiting orders at a fixed rate without a sink, with a Redis stream and with a webhook, each with a
//! PostgreSQL of its own, because decoding needs a WAL of another level.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use tokio_postgres::Client;

use crate::brokers::{Broker, Kind};
use crate::fixture::child::{Server, Service, start_broker};
use crate::fixture::compare::{Spread, alternate};
use crate::fixture::database::{self, Postgres};
use crate::fixture::engine::HOT;
use crate::fixture::flood::{Template, offer};
use crate::fixture::machine::family_cpu_seconds;
use crate::fixture::{Finding, Lab, Scratch, blocking};
use crate::wait_mode::CONNECTIONS;

/// Orders a second: while processors are free most of the time, and while they are busy for more than half of it.
const RATES: [f64; 2] = [1_000.0, 3_000.0];
const PATIENCE: Duration = Duration::from_secs(120);
const SIDES: [&str; 3] = ["no sink", "a Redis stream", "a webhook"];

struct Side {
    postgres: Postgres,
    client: Client,
    /// The server's first process.
    postmaster: u32,
    server: Server,
    order: Template,
}

/// Costs of an order on one side, round by round.
#[derive(Default)]
struct Costs {
    p50_ms: Vec<f64>,
    p99_ms: Vec<f64>,
    wal_bytes: Vec<f64>,
    postgres_micros: Vec<f64>,
    service_micros: Vec<f64>,
    heard_after_ms: Vec<f64>,
}

/// Runs the case.
pub async fn run(lab: &Lab) -> anyhow::Result<Vec<Finding>> {
    let scratch = Scratch::new()?;
    let broker = start_broker(Kind::Redis)?;
    let receiver = Service::start("constant", None, None)?;
    let hook = format!("http://{}/", receiver.address);
    let mut sides = Vec::new();
    for name in SIDES {
        sides.push(Side::start(&scratch, name, &broker, &hook).await?);
    }
    let length = lab.window() * 2;
    for side in &mut sides {
        side.sell(RATES[1], length / 4).await?;
    }
    let mut found = Vec::new();
    for rate in RATES {
        found.extend(at_rate(lab, &mut sides, rate, length).await?);
    }
    for side in sides {
        side.server.audit()?;
        drop(side.server);
        side.postgres.stop().await?;
    }
    Ok(found)
}

async fn at_rate(
    lab: &Lab,
    sides: &mut [Side],
    rate: f64,
    length: Duration,
) -> anyhow::Result<Vec<Finding>> {
    let mut costs: [Costs; 3] = Default::default();
    let rounds = alternate(lab.rounds(), SIDES, async |at| {
        let (side, costs) = (&mut sides[at], &mut costs[at]);
        database::settle(&side.client).await?;
        let wal = side.wal().await?;
        let postgres = family_cpu_seconds(side.postmaster)?;
        let service = side.server.process.usage()?.cpu_seconds;
        let (orders, p50, p99, late) = side.sell(rate, length).await?;
        costs.p50_ms.push(p50 / 1_000.0);
        costs.p99_ms.push(p99 / 1_000.0);
        costs.wal_bytes.push((side.wal().await? - wal) / orders);
        let spent = family_cpu_seconds(side.postmaster)? - postgres;
        costs.postgres_micros.push(spent * 1e6 / orders);
        let spent = side.server.process.usage()?.cpu_seconds - service;
        costs.service_micros.push(spent * 1e6 / orders);
        costs.heard_after_ms.push(late.as_secs_f64() * 1_000.0);
        Ok(p99)
    })
    .await?;
    let ratios = [rounds.ratio(1, 0), rounds.ratio(2, 0)];
    Ok(findings(rate, &ratios, &costs))
}

fn findings(rate: f64, ratios: &[Spread; 2], costs: &[Costs; 3]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (name, ratio) in SIDES[1..].iter().zip(ratios) {
        let what = format!("p99 of a waiting order at {rate} a second, with {name} / without");
        findings.push(Finding::spread(what, *ratio));
    }
    for (name, costs) in SIDES.iter().zip(costs) {
        let mut tell = |what: &str, values: &[f64]| {
            findings.push(Finding::spread(
                format!("{name}, {rate} a second: {what}"),
                Spread::of(values),
            ));
        };
        tell("p50 of a waiting order, ms", &costs.p50_ms);
        tell("p99 of a waiting order, ms", &costs.p99_ms);
        tell("WAL of an order, bytes", &costs.wal_bytes);
        tell(
            "processor time of PostgreSQL an order, µs",
            &costs.postgres_micros,
        );
        tell(
            "processor time of the service an order, µs",
            &costs.service_micros,
        );
        if *name != SIDES[0] {
            tell(
                "from the last order to all events delivered and noted, ms",
                &costs.heard_after_ms,
            );
        }
    }
    findings
}

impl Side {
    async fn start(
        scratch: &Scratch,
        name: &str,
        broker: &Broker,
        hook: &str,
    ) -> anyhow::Result<Self> {
        let at = SIDES
            .iter()
            .position(|side| *side == name)
            .unwrap_or_default();
        let dir = format!("side-{at}");
        let postgres = Postgres::start_in(scratch, &format!("{dir}-postgres"), at > 0).await?;
        let url = postgres.database("events").await?;
        let redis = format!("redis://{}/", broker.address());
        let secret = "whsec_bGFiLWxhYi1sYWItbGFiLWxhYi1sYWItbGFi";
        let mut settings = vec![("DATABASE__URL", url.as_str())];
        match at {
            1 => settings.extend([
                ("EVENTS__SINKS__LAB__KIND", "redis"),
                ("EVENTS__SINKS__LAB__URL", redis.as_str()),
            ]),
            2 => settings.extend([
                ("EVENTS__SINKS__LAB__URL", hook),
                ("EVENTS__SINKS__LAB__SECRET", secret),
            ]),
            _ => {}
        }
        let server = Server::start(&scratch.dir(&dir)?, &settings)?;
        server.put_sku(HOT, u32::MAX)?;
        let client = database::connect(&url).await?;
        let slots = "SELECT count(*) FROM pg_replication_slots WHERE database = current_database()";
        let deadline = Instant::now() + PATIENCE;
        while client.query_one(slots, &[]).await?.get::<_, i64>(0) < i64::from(at > 0) {
            ensure!(Instant::now() < deadline, "there is no slot for {name}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let backend = client
            .query_one("SELECT pg_backend_pid()", &[])
            .await?
            .get::<_, i32>(0);
        let stat = std::fs::read_to_string(format!("/proc/{backend}/stat"))?;
        let parent = stat
            .rsplit_once(')')
            .and_then(|(_, rest)| rest.split_whitespace().nth(1));
        let postmaster = parent.context("a process without a parent")?.parse()?;
        Ok(Side {
            postgres,
            client,
            postmaster,
            server,
            order: Template::order(HOT, ""),
        })
    }

    /// Bytes of WAL written so far.
    async fn wal(&self) -> anyhow::Result<f64> {
        let sql = "SELECT (pg_current_wal_insert_lsn() - '0/0')::float8";
        Ok(self.client.query_one(sql, &[]).await?.get(0))
    }

    /// Places orders for so long, and waits until every sink has heard of all. Gives how many there were, the p50 and the
    /// p99 in µs, and how long it took until all were heard of.
    async fn sell(
        &mut self,
        rate: f64,
        length: Duration,
    ) -> anyhow::Result<(f64, f64, f64, Duration)> {
        let placed = blocking(|| {
            offer(self.server.data, CONNECTIONS, rate, length, &mut self.order)?.only(201)
        })?;
        let ended = Instant::now();
        let end: String = self
            .client
            .query_one("SELECT pg_current_wal_lsn()::text", &[])
            .await?
            .get(0);
        let sql = "SELECT count(*) FROM pg_replication_slots
                   WHERE database = current_database() AND confirmed_flush_lsn < $1::text::pg_lsn";
        while self.client.query_one(sql, &[&end]).await?.get::<_, i64>(0) > 0 {
            ensure!(ended.elapsed() < PATIENCE, "events are not delivered");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok((
            placed.count(201) as f64,
            placed.latency.value_at_quantile(0.5) as f64,
            placed.latency.value_at_quantile(0.99) as f64,
            ended.elapsed(),
        ))
    }
}
