//! What events cost: waiting orders at a fixed rate without a sink, twice, with a Redis stream and with a webhook, each with a
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
use crate::fixture::machine::{family_cpu_seconds, thread_cpu_seconds};
use crate::fixture::{Finding, Lab, Scratch, blocking};
use crate::wait_mode::CONNECTIONS;

/// Orders a second: while processors are free most of the time, and while they are busy for more than half of it.
const RATES: [f64; 2] = [1_000.0, 3_000.0];
const PATIENCE: Duration = Duration::from_secs(120);
/// The second says how far two sides differ that are the same.
const SIDES: [&str; 4] = ["no sink", "no sink again", "a Redis stream", "a webhook"];
/// The sides that have a sink.
const REDIS: usize = 2;
const WEBHOOK: usize = 3;

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
    /// Of the service without the thread that delivers events.
    orders_micros: Vec<f64>,
    /// Of that thread.
    delivery_micros: Vec<f64>,
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
    let mut costs: [Costs; SIDES.len()] = Default::default();
    let rounds = alternate(lab.rounds(), SIDES, async |at| {
        let (side, costs) = (&mut sides[at], &mut costs[at]);
        database::settle(&side.client).await?;
        let wal = side.wal().await?;
        let postgres = family_cpu_seconds(side.postmaster)?;
        let service = side.service()?;
        let (orders, p50, p99, late) = side.sell(rate, length).await?;
        costs.p50_ms.push(p50 / 1_000.0);
        costs.p99_ms.push(p99 / 1_000.0);
        costs.wal_bytes.push((side.wal().await? - wal) / orders);
        let spent = family_cpu_seconds(side.postmaster)? - postgres;
        costs.postgres_micros.push(spent * 1e6 / orders);
        let [all, delivery] = side.service()?;
        let (all, delivery) = (all - service[0], delivery - service[1]);
        costs.orders_micros.push((all - delivery) * 1e6 / orders);
        costs.delivery_micros.push(delivery * 1e6 / orders);
        costs.heard_after_ms.push(late.as_secs_f64() * 1_000.0);
        Ok(p99)
    })
    .await?;
    let mut found = Vec::new();
    for (at, name) in SIDES.iter().enumerate().skip(1) {
        let what = format!("p99 of a waiting order at {rate} a second, {name} / no sink");
        found.push(Finding::spread(what, rounds.ratio(at, 0)));
        let ratios = costs[at].orders_micros.iter().zip(&costs[0].orders_micros);
        let ratios: Vec<f64> = ratios.map(|(with, without)| with / without).collect();
        let what = format!(
            "processor time of the service for an order at {rate} a second, delivery of events left out, {name} / no sink"
        );
        found.push(Finding::spread(what, Spread::of(&ratios)));
    }
    found.extend(findings(rate, &costs));
    Ok(found)
}

fn findings(rate: f64, costs: &[Costs]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (at, (name, costs)) in SIDES.iter().zip(costs).enumerate() {
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
            "processor time of the service for an order, µs",
            &costs.orders_micros,
        );
        if at >= REDIS {
            tell(
                "processor time of delivering its event, µs",
                &costs.delivery_micros,
            );
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
        let postgres = Postgres::start_in(scratch, &format!("{dir}-postgres"), at >= REDIS).await?;
        let url = postgres.database("events").await?;
        let redis = format!("redis://{}/", broker.address());
        let secret = "whsec_bGFiLWxhYi1sYWItbGFiLWxhYi1sYWItbGFi";
        let mut settings = vec![("DATABASE__URL", url.as_str())];
        match at {
            REDIS => settings.extend([
                ("EVENTS__SINKS__LAB__KIND", "redis"),
                ("EVENTS__SINKS__LAB__URL", redis.as_str()),
            ]),
            WEBHOOK => settings.extend([
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
        while client.query_one(slots, &[]).await?.get::<_, i64>(0) < i64::from(at >= REDIS) {
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

    /// Processor time of the service so far in seconds: all, and that of delivering events.
    fn service(&self) -> anyhow::Result<[f64; 2]> {
        let process = &self.server.process;
        let delivery = thread_cpu_seconds(process.id(), "events")?;
        Ok([process.usage()?.cpu_seconds, delivery])
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
