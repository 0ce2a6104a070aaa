//! What the slowest hundredth of waiting orders waits for: a thousand times a second PostgreSQL is asked what the backends
//! of Millrace's workers do, and each statement of 5 ms or more is counted under what it did most of that time.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::fixture::child::Server;
use crate::fixture::database::{Postgres, connect};
use crate::fixture::engine::HOT;
use crate::fixture::flood::{Template, offer};
use crate::fixture::{Finding, Lab, Scratch, blocking};

const CONNECTIONS: usize = 512;
/// Orders offered a second.
const RATES: [f64; 3] = [500.0, 5_000.0, 10_000.0];
/// A statement of a worker counts from this duration on.
const STALL: Duration = Duration::from_millis(5);
const INTERVAL: Duration = Duration::from_millis(1);

/// What backends do, and what checkpointer and autovacuum do beside them.
const LOOK: &str = "
    SELECT pid, query_start::text, extract(epoch FROM clock_timestamp() - query_start)::float8,
           CASE WHEN upper(query) LIKE 'COMMIT%' THEN 'COMMIT' ELSE 'statements' END || ', '
             || coalesce(wait_event_type || ':' || wait_event, 'running, or waiting for a processor'),
           (SELECT count(*) FROM pg_stat_activity b
             WHERE b.backend_type = 'checkpointer' AND b.wait_event IS DISTINCT FROM 'CheckpointerMain'
               AND b.wait_event IS DISTINCT FROM 'CheckpointWriteDelay'
                OR b.backend_type = 'autovacuum worker') > 0
      FROM pg_stat_activity WHERE application_name LIKE 'millrace worker %' AND state = 'active'";

/// Runs the case.
pub async fn run(lab: &Lab) -> anyhow::Result<Vec<Finding>> {
    let scratch = Scratch::new()?;
    let postgres = Postgres::start(&scratch).await?;
    let url = postgres.database("stalls").await?;
    let server = Server::start(&scratch.dir("millrace")?, &[("DATABASE__URL", &url)])?;
    server.put_sku(HOT, u32::MAX)?;
    let length = Duration::from_secs(lab.pick(30, 8));
    let mut order = Template::order(HOT, "");
    blocking(|| offer(server.data, CONNECTIONS, RATES[1], length / 8, &mut order))?;
    let mut findings = Vec::new();
    for rate in RATES {
        let stop = AtomicBool::new(false);
        let (answered, seen) = blocking(|| {
            std::thread::scope(|threads| {
                let watching = threads.spawn(|| watch(&url, &stop));
                let answered = offer(server.data, CONNECTIONS, rate, length, &mut order);
                stop.store(true, Ordering::Relaxed);
                (answered, watching.join())
            })
        });
        let seen = seen.map_err(|_| anyhow::anyhow!("the observer has panicked"))??;
        let answered = answered?.only(201)?;
        let at = format!("at {rate:.0} a second");
        for (quantile, name) in [(0.5, "p50"), (0.99, "p99"), (0.999, "p99.9")] {
            findings.push(Finding::of(
                format!("{name} {at}, ms"),
                answered.latency.value_at_quantile(quantile) as f64 / 1_000.0,
            ));
        }
        let seconds = answered.took.as_secs_f64();
        findings.push(Finding::of(
            format!("looks a second {at}"),
            seen.looks as f64 / seconds,
        ));
        findings.push(Finding::of(
            format!("looks {at} that came 5 ms late or later: no processor was free, or the machine stood still, a minute"),
            seen.late as f64 * 60.0 / seconds,
        ));
        for (cause, stalls) in seen.stalls {
            findings.push(Finding::of(
                format!("statements of 5 ms or more {at}, a minute: {cause}"),
                stalls as f64 * 60.0 / seconds,
            ));
        }
    }
    server.audit()?;
    drop(server);
    postgres.stop().await?;
    Ok(findings)
}

/// The result of watching.
#[derive(Default)]
struct Seen {
    looks: u64,
    late: u64,
    /// Statements of [`STALL`] or more, by what they did most.
    stalls: BTreeMap<String, u64>,
}

/// A statement that runs.
#[derive(Default)]
struct Running {
    longest: f64,
    causes: BTreeMap<String, u64>,
}

impl Seen {
    fn end(&mut self, statement: Running) {
        let cause = statement.causes.into_iter().max_by_key(|(_, looks)| *looks);
        if let Some((cause, _)) = cause
            && statement.longest >= STALL.as_secs_f64()
        {
            *self.stalls.entry(cause).or_default() += 1;
        }
    }
}

/// Looks until `stop`, on a thread and a connection of its own.
fn watch(url: &str, stop: &AtomicBool) -> anyhow::Result<Seen> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let client = connect(url).await?;
        let look = client.prepare(LOOK).await?;
        let mut seen = Seen::default();
        let mut running: BTreeMap<(i32, String), Running> = BTreeMap::new();
        while !stop.load(Ordering::Relaxed) {
            let asked = Instant::now();
            let mut before = std::mem::take(&mut running);
            for row in client.query(&look, &[]).await? {
                let key = (row.get(0), row.get(1));
                let mut statement = before.remove(&key).unwrap_or_default();
                statement.longest = statement.longest.max(row.get(2));
                let mut cause: String = row.get(3);
                if row.get(4) {
                    cause.push_str(", beside a checkpoint or autovacuum");
                }
                *statement.causes.entry(cause).or_default() += 1;
                running.insert(key, statement);
            }
            for (_, statement) in before {
                seen.end(statement);
            }
            seen.looks += 1;
            tokio::time::sleep(INTERVAL).await;
            seen.late += u64::from(asked.elapsed() > INTERVAL + STALL);
        }
        Ok(seen)
    })
}
