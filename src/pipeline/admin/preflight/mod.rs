//! The preflight: tells before a sale whether the database and the order log will hold it, and with what remedy
//! if not. `checks` judges the figures; the database's part is [`crate::store::postgres::preflight`].
//!
//! ```text
//!   lock ─► (prepare) ─► facts ─► scratch table: commits, COPY ─► order log: appends ─► checks ─► verdict
//! ```
//!
//! It needs a connection of its own and touches nothing that an order needs: some 500 commits of one row, 100 a
//! second, five batches of COPY, and as many appends to a file of its own.

mod checks;
mod replication;
mod wal;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use serde::Serialize;
use tokio::sync::Mutex;

use crate::metrics::Metrics;
use crate::order::UnixMillis;
use crate::queue::log::broker::Broker;
use crate::queue::log::file::probe;
use crate::store::StoreError;
use crate::store::postgres::preflight::{self as database_part, prepare, scratch};
use crate::store::postgres::replication::{HORIZON_HELD, Horizon, horizons};
use crate::store::postgres::{Connected, Database, pooling};

pub use checks::{Check, ROW_BYTES, Verdict, WAL_BYTES};
pub use prepare::Step;

/// Longest time for the appends to the journal.
const APPENDS_MAX: Duration = Duration::from_secs(15);

/// Fewer groups of a broker's log say nothing of it.
const GROUPS_MIN: u64 = 100;

/// The settings that a sale is judged by.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Whether the database is the embedded one, whose settings are Millrace's own.
    pub embedded: bool,
    /// Connections that Millrace opens at most.
    pub connections: u64,
    /// `workers.batch_rows_max`.
    pub batch_rows_max: usize,
    /// `orders.timeout_ms`.
    pub order_timeout: Duration,
    /// `database.clock_difference_max_ms`.
    pub clock_difference_max_ms: u64,
    /// The order log.
    pub log: LogProbe,
}

/// The measurement of the order log.
#[derive(Clone, Debug)]
pub enum LogProbe {
    /// There is none.
    Memory,
    /// In a file of its own on the journal's directory.
    Journal(PathBuf),
    /// The appends of this service so far; without any, a check of the broker's settings, which appends nothing.
    Broker(Arc<dyn Broker>, Option<Metrics>),
}

/// The sale that is coming, as far as it is known.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sale {
    /// Orders; otherwise one for each free unit.
    pub orders: Option<u64>,
    /// Orders a second; otherwise all at once.
    pub rate: Option<u64>,
}

impl Sale {
    /// The numbers that each of them may be.
    pub const NUMBERS: std::ops::RangeInclusive<u64> = 1..=1_000_000_000;
}

/// The verdict. Its JSON is stable.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Whether no check is bad.
    pub ok: bool,
    /// The moment of its end.
    pub at: String,
    /// Orders of the sale.
    pub orders: u64,
    /// Orders a second, if given.
    pub rate: Option<u64>,
    /// Each check.
    pub checks: Vec<Check>,
    /// The measurements.
    pub measured: Measured,
    /// The preparations, if asked for.
    pub prepared: Option<Vec<Step>>,
}

/// What was measured; null: it could not be.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Measured {
    /// Commits of one row.
    pub commit: Option<Latencies>,
    /// Appends to the order log.
    pub log_append: Option<Latencies>,
    /// Rows a second by COPY on one connection, commits included.
    pub copy_rows_per_second: Option<u64>,
    /// Orders a second that the database may be expected to take.
    pub orders_per_second: Option<u64>,
    /// Wait of the last order of the sale, in milliseconds.
    pub wait_ms: Option<u64>,
    /// WAL segments that exist ahead.
    pub wal_segments_ready: Option<u64>,
    /// WAL segments that the sale will fill.
    pub wal_segments_needed: u64,
}

/// Latencies in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Latencies {
    /// Number of measurements.
    pub count: u64,
    /// Half of them took at most so long.
    pub p50_ms: f64,
    /// 99 % of them.
    pub p99_ms: f64,
    /// 99.9 % of them.
    pub p999_ms: f64,
}

impl Latencies {
    /// Those of measured times.
    fn of(mut took: Vec<Duration>) -> Option<Self> {
        took.sort_unstable();
        let at = |share: f64| {
            let rank = (took.len() as f64 * share).ceil() as usize;
            let time = took.get(rank.clamp(1, took.len().max(1)) - 1);
            time.map(|time| rounded(time.as_secs_f64()))
        };
        Some(Latencies {
            count: took.len() as u64,
            p50_ms: at(0.5)?,
            p99_ms: at(0.99)?,
            p999_ms: at(0.999)?,
        })
    }

    /// Those of a histogram's cumulative counts, each as the bound that it is within.
    fn within(buckets: &[(f64, u64)]) -> Option<Self> {
        let count = buckets.last()?.1;
        let at = |share: f64| {
            let rank = (count as f64 * share).ceil() as u64;
            let found = buckets.iter().find(|(_, within)| *within >= rank.max(1));
            found.map(|(bound, _)| rounded(*bound))
        };
        Some(Latencies {
            count,
            p50_ms: at(0.5)?,
            p99_ms: at(0.99)?,
            p999_ms: at(0.999)?,
        })
    }
}

/// Seconds as milliseconds with two decimals.
fn rounded(seconds: f64) -> f64 {
    (seconds * 1e5).round() / 100.0
}

/// The result of the last preflight.
#[derive(Debug)]
pub struct Last {
    /// Its end.
    pub at: Instant,
    /// The names of the checks that were bad.
    pub bad: Vec<&'static str>,
}

/// Makes preflights of a running service, one at a time, and remembers the last one.
#[derive(Debug)]
pub struct Preflighter {
    database: Database,
    settings: Settings,
    running: Mutex<()>,
    last: ArcSwapOption<Last>,
}

impl Preflighter {
    /// A preflighter that has made none yet.
    pub fn new(database: Database, settings: Settings) -> Self {
        Preflighter {
            database,
            settings,
            running: Mutex::new(()),
            last: ArcSwapOption::empty(),
        }
    }

    /// The result of the last preflight, if there was one.
    pub fn last(&self) -> Option<Arc<Last>> {
        self.last.load_full()
    }

    /// Makes one.
    ///
    /// # Errors
    /// [`StoreError::PreflightRunning`] if another one has not ended, or the database's error.
    pub async fn make(&self, sale: Sale, prepares: bool) -> Result<Report, StoreError> {
        let _running = self
            .running
            .try_lock()
            .map_err(|_| StoreError::PreflightRunning)?;
        let report = preflight(&self.database, &self.settings, sale, prepares).await?;
        let bad = report.checks.iter();
        let bad = bad.filter(|check| check.verdict == Verdict::Bad);
        let bad: Vec<_> = bad.map(|check| check.name).collect();
        tracing::info!(bad = bad.join(", "), prepares, "made a preflight");
        self.last.store(Some(Arc::new(Last {
            at: Instant::now(),
            bad,
        })));
        Ok(report)
    }
}

/// Everything that the checks judge.
#[derive(Debug)]
struct Seen<'a> {
    settings: &'a Settings,
    schema: &'a str,
    sale: Sale,
    facts: database_part::Facts,
    /// `None`: the role may not make a scratch table. An error: the measurement failed.
    scratch: Result<Option<scratch::Measured>, StoreError>,
    log: Result<Option<Latencies>, String>,
    /// Weak settings of the broker, a sentence each.
    log_warnings: Vec<String>,
    horizons: Vec<Horizon>,
    pooling: Result<(), StoreError>,
}

/// Makes a preflight of `database`; `prepares`: as far as the role may.
///
/// # Errors
/// [`StoreError::PreflightRunning`] if another one has not ended, or the database's error.
pub async fn preflight(
    database: &Database,
    settings: &Settings,
    sale: Sale,
    prepares: bool,
) -> Result<Report, StoreError> {
    let (session, backend) = database_part::open(database).await?;
    let report = look(database, (&session, backend), settings, sale, prepares).await?;
    database_part::close(database, session).await;
    Ok(report)
}

/// The same, unless `ended` comes first. `None`: it did, and nothing of the preflight is left.
///
/// # Errors
/// Those of [`preflight`], and [`StoreError::ScratchLeft`].
pub async fn preflight_until(
    ended: impl Future<Output = ()>,
    database: &Database,
    settings: &Settings,
    sale: Sale,
    prepares: bool,
) -> Result<Option<Report>, StoreError> {
    let (session, backend) = database_part::open(database).await?;
    let report = tokio::select! {
        report = look(database, (&session, backend), settings, sale, prepares) => Some(report?),
        () = ended => None,
    };
    match report {
        Some(_) => database_part::close(database, session).await,
        None => scratch::give_up(database, backend).await?,
    }
    Ok(report)
}

async fn look(
    database: &Database,
    (session, backend): (&Connected, i32),
    settings: &Settings,
    sale: Sale,
    prepares: bool,
) -> Result<Report, StoreError> {
    let mut facts = database_part::read(database, session).await?;
    let mut prepared = None;
    if prepares {
        let needed = checks::segments_needed(&facts, sale);
        let wanted = needed.min(prepare::segments_most(&facts));
        prepared = Some(prepare::run(database, session, &facts, wanted).await?);
        facts = database_part::read(database, session).await?;
    }
    let rows = settings.batch_rows_max.min(checks::BATCH_ROWS);
    let scratch = match facts.room.map(|room| room.least()) {
        Some(free) if free < prepare::ROOM_LEFT => Err(StoreError::DiskFull { free }),
        _ => scratch::measure(database, (session, backend), rows).await,
    };
    let (log, log_warnings) = match appends(&settings.log).await {
        Ok((log, warnings)) => (Ok(log), warnings),
        Err(error) => (Err(error), Vec::new()),
    };
    let seen = Seen {
        settings,
        schema: database.schema(),
        sale,
        facts,
        scratch,
        log,
        log_warnings,
        horizons: horizons(database, HORIZON_HELD).await?,
        pooling: pooling::check(database).await,
    };
    let (checks, measured) = checks::all(&seen);
    Ok(Report {
        ok: checks.iter().all(|check| check.verdict != Verdict::Bad),
        at: UnixMillis::now().to_string(),
        orders: checks::orders(&seen.facts, sale),
        rate: sale.rate,
        checks,
        measured,
        prepared,
    })
}

/// Latencies of the order log, if there is one, and warnings.
type Appended = (Option<Latencies>, Vec<String>);

/// Measures the order log. The error is a sentence.
async fn appends(log: &LogProbe) -> Result<Appended, String> {
    let measure: Box<dyn FnOnce() -> Result<Appended, String> + Send> = match log.clone() {
        LogProbe::Memory => return Ok((None, Vec::new())),
        LogProbe::Journal(directory) => Box::new(move || {
            let (count, pace) = (scratch::COMMITS, scratch::COMMIT_EVERY);
            let took = probe::appends(&directory, count, pace, APPENDS_MAX);
            let took = took.map_err(|error| format!("{}: {error}", directory.display()))?;
            Ok((Latencies::of(took), Vec::new()))
        }),
        LogProbe::Broker(broker, metrics) => {
            let buckets = metrics.map(|metrics| metrics.journal_sync_seconds_within());
            let appended = buckets.and_then(|buckets| Latencies::within(&buckets));
            let appended = appended.filter(|groups| groups.count >= GROUPS_MIN);
            // Also then: figures of the past say nothing of a broker that is away now.
            Box::new(move || {
                let started = Instant::now();
                let checked = broker.check();
                let checked = checked.map_err(|error| format!("{}: {error}", broker.title()));
                let warnings = checked?.warnings;
                let checked = Latencies::of(vec![started.elapsed()]);
                Ok((appended.or(checked), warnings))
            })
        }
    };
    let measured = tokio::task::spawn_blocking(measure).await;
    measured.map_err(|panic| panic.to_string())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_measured_times_or_bounds() {
        let took = (1..=1_000).rev().map(Duration::from_millis).collect();
        let measured = Latencies::of(took).expect("latencies");
        let expected = Latencies {
            count: 1_000,
            p50_ms: 500.0,
            p99_ms: 990.0,
            p999_ms: 999.0,
        };
        assert_eq!(measured, expected);
        assert_eq!(Latencies::of(Vec::new()), None);
        let buckets = [(0.001, 0), (0.002, 90), (0.005, 99), (0.01, 100)];
        let within = Latencies::within(&buckets).expect("latencies");
        assert_eq!(
            (within.p50_ms, within.p99_ms, within.p999_ms),
            (2.0, 5.0, 10.0)
        );
        assert_eq!(Latencies::within(&[(0.001, 0), (0.002, 0)]), None);
    }
}
