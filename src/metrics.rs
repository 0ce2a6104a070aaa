//! Every metric, named once.
//!
//! Names follow the Prometheus conventions: a unit at the end, `_total` on counters.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use prometheus::core::Collector;
use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry, TextEncoder,
};

mod payments;

pub use payments::Payments;

/// Handles to every metric. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Registry,
    described: Arc<Vec<Described>>,
    /// Answers to orders by outcome: what became of one, or the code of its refusal.
    pub orders: Counters,
    /// Time from admission to the answer of a placed order, in seconds.
    pub wait_seconds: Histogram,
    /// Requests that named what does not exist.
    pub unknown: Counters,
    /// Orders in the queue.
    pub queue_depth: IntGauge,
    /// Orders that the queue has room for.
    pub queue_capacity: IntGauge,
    /// Time that the oldest order of a batch had been in the queue, in seconds.
    pub queue_wait_seconds: Histogram,
    /// Orders in flight: queued or being written.
    pub orders_in_flight: IntGauge,
    /// Orders remembered for idempotency and limits.
    pub orders_remembered: IntGauge,
    /// Batches taken from the queue, by why they were no larger.
    pub batch_flushes: Counters,
    /// Rows a committed batch had.
    pub batch_rows: Histogram,
    /// Time to write and commit a batch, in seconds.
    pub batch_seconds: Histogram,
    /// Batches committed.
    pub batches: IntCounter,
    /// Rows committed.
    pub rows_written: IntCounter,
    /// Attempts to write a batch that failed and were tried again.
    pub batch_retries: Counters,
    /// Orders given up at their deadline before a worker claimed them.
    pub orders_abandoned: IntCounter,
    /// Rows that the database refused and that became dead letters.
    pub dead_letters: IntCounter,
    /// Orders parked because the database refuses their SKU's counters.
    pub orders_parked: IntGauge,
    /// Commits that the database lost after it had acknowledged them (failover).
    pub commits_lost: IntCounter,
    /// Groups of orders synced to the journal.
    pub journal_groups: IntCounter,
    /// Orders synced to the journal.
    pub journal_orders: IntCounter,
    /// Time to write and sync one group.
    pub journal_sync_seconds: Histogram,
    /// Bytes that the journal takes on the disk.
    pub journal_bytes: IntGauge,
    /// Bytes that it may take.
    pub journal_bytes_max: IntGauge,
    /// Orders that wait on the disk and not in memory.
    pub journal_backlog: IntGauge,
    /// Orders in the journal that the database has not decided yet.
    pub journal_outstanding: IntGauge,
    /// 1 once the journal has stopped acknowledging.
    pub journal_failed: IntGauge,
    /// Orders that the last start found in the journal and wrote.
    pub journal_replayed: IntGauge,
    /// Orders written again after the database had lost them.
    pub orders_restored: IntCounter,
    /// Payments, and orders that are not paid.
    pub payments: Payments,
    /// Open connections of the data plane.
    pub connections: IntGauge,
    /// Connections of the data plane that have ended.
    pub connections_cut: Counters,
    /// Lines of the log that were dropped.
    pub log_lines_dropped: Counters,
    /// Rows deleted because `retention` keeps them no longer.
    pub pruned_rows: Counters,
    /// Age in seconds of the oldest row of each table that `retention` is about.
    oldest_row: IntGaugeVec,
    /// Units of each SKU by `state`: `free`, `held`, `sold`.
    stock: IntGaugeVec,
    /// 1 while orders are taken.
    pub ready: IntGauge,
    /// Time for which orders have waited and none was written, in seconds; 0 while none waits.
    pub stalled_seconds: Gauge,
    /// 1 once an internal fault has stopped the process from taking orders.
    pub poisoned: IntGauge,
    /// Time that recovery took at the last start, in seconds.
    pub recovery_seconds: Gauge,
    /// Orders that recovery found in the idempotency window.
    pub recovered_orders: IntGauge,
}

/// Upper bounds in seconds: from a local commit to beyond the order timeout.
const SECONDS: [f64; 14] = [
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];
const ROWS: [f64; 11] = [
    1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 1_000.0, 2_500.0, 5_000.0,
];

/// The values of `outcome`: what became of an order, or the code of its refusal.
const OUTCOMES: [&str; 22] = [
    "sold_out",
    "created",
    "accepted",
    "replayed",
    "purchase_limit",
    "overloaded",
    "timed_out",
    "undecided",
    "sale_not_open",
    "sale_closed",
    "sale_paused",
    "unknown_sku",
    "rate_limited",
    "invalid_field",
    "idempotency_key_reused",
    "not_ready",
    "draining",
    "journal_full",
    "journal_failed",
    "unwritten",
    "failed",
    "other",
];

/// What was asked for and is not there.
const UNKNOWN: [&str; 3] = ["order", "sku", "other"];
/// Why a batch was no larger: nothing more was in the queue, or `workers.batch_rows_max`.
const FLUSHES: [&str; 3] = ["idle", "full", "other"];
/// Why a line of the log was dropped: the queue to its writer was full, standard error refused it, or
/// too many of its kind came at once.
const LOG_DROPS: [&str; 3] = ["full", "sink", "limited"];
/// Why a batch was tried again: the connection or the server failed, or a step took too long.
const RETRIES: [&str; 3] = ["transient", "timeout", "other"];
/// The tables that `retention` is about.
const PRUNED: [&str; 4] = ["orders", "payment_events", "stock_journal", "other"];
/// Why a connection ended; `CloseReason` has the story of each.
const CLOSES: [&str; 11] = [
    "peer_closed",
    "finished",
    "refused",
    "request_timeout",
    "idle_timeout",
    "unread_reply",
    "evicted",
    "drained",
    "io_error",
    "panicked",
    "other",
];

/// Counts by the values of a label.
pub type Totals = BTreeMap<&'static str, u64>;

/// A counter for each value of one label, all there from the start, so that a rate has a zero to
/// begin at. They are looked up once: a look-up by label is a lock and a hash, on every request.
#[derive(Clone, Debug)]
pub struct Counters {
    by_value: Arc<[(&'static str, IntCounter)]>,
}

impl Counters {
    /// Counts one; a value that is not in the list counts as the last, which is `other`.
    pub fn count(&self, value: &str) {
        if let Some(counter) = self.of(value) {
            counter.inc();
        }
    }

    /// Counts several; as [`Counters::count`].
    pub fn add(&self, value: &str, more: u64) {
        if let Some(counter) = self.of(value) {
            counter.inc_by(more);
        }
    }

    /// Raises a counter to what somebody else has counted.
    pub fn catch_up(&self, value: &str, counted: u64) {
        if let Some(counter) = self.of(value) {
            counter.inc_by(counted.saturating_sub(counter.get()));
        }
    }

    /// The counts so far.
    pub fn totals(&self) -> Totals {
        let counters = self.by_value.iter();
        counters.map(|(value, n)| (*value, n.get())).collect()
    }

    fn of(&self, value: &str) -> Option<&IntCounter> {
        let found = self.by_value.iter().find(|(known, _)| *known == value);
        found.or(self.by_value.last()).map(|(_, counter)| counter)
    }
}

/// What the reference page says of a metric.
#[derive(Clone, Debug)]
struct Described {
    name: String,
    kind: &'static str,
    /// The labels, with the values of those that have a fixed set.
    labels: String,
    help: String,
}

/// Registers metrics and remembers what they are.
#[derive(Default)]
struct Registrar {
    registry: Registry,
    described: Vec<Described>,
}

impl Registrar {
    fn add<M: Collector + Clone + 'static>(
        &mut self,
        metric: M,
        kind: &'static str,
        labels: String,
    ) -> prometheus::Result<M> {
        for desc in metric.desc() {
            self.described.push(Described {
                name: desc.fq_name.clone(),
                kind,
                labels: labels.clone(),
                help: desc.help.clone(),
            });
        }
        self.registry.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    fn counter(&mut self, name: &str, help: &str) -> prometheus::Result<IntCounter> {
        self.add(IntCounter::new(name, help)?, "counter", String::new())
    }

    fn counters(
        &mut self,
        name: &str,
        help: &str,
        label: &str,
        values: &[&'static str],
    ) -> prometheus::Result<Counters> {
        let listed = values.iter().map(|value| format!("`{value}`"));
        let listed = listed.collect::<Vec<_>>().join(", ");
        let metric = IntCounterVec::new(Opts::new(name, help), &[label])?;
        let metric = self.add(metric, "counter", format!("`{label}`: {listed}"))?;
        let by_value = values
            .iter()
            .map(|value| (*value, metric.with_label_values(&[value])));
        Ok(Counters {
            by_value: by_value.collect(),
        })
    }

    fn gauge(&mut self, name: &str, help: &str) -> prometheus::Result<IntGauge> {
        self.add(IntGauge::new(name, help)?, "gauge", String::new())
    }

    fn histogram(
        &mut self,
        name: &str,
        help: &str,
        buckets: &[f64],
    ) -> prometheus::Result<Histogram> {
        let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        self.add(Histogram::with_opts(options)?, "histogram", String::new())
    }
}

impl Metrics {
    /// A registry of its own with every metric at zero.
    ///
    /// # Errors
    /// Where a name is invalid or used twice; a defect that the first test finds.
    pub fn new() -> prometheus::Result<Self> {
        let mut make = Registrar::default();
        let orders = make.counters(
            "millrace_orders_total",
            "Answers to orders by outcome: what became of one, or the code of its refusal.",
            "outcome",
            &OUTCOMES,
        )?;
        let wait_seconds = make.histogram(
            "millrace_order_wait_seconds",
            "Time from admission to the answer of a placed order.",
            &SECONDS,
        )?;
        let unknown = make.counters(
            "millrace_unknown_total",
            "Requests of the data plane that named an order, a SKU or a path that does not exist.",
            "what",
            &UNKNOWN,
        )?;
        let orders_abandoned = make.counter(
            "millrace_orders_abandoned_total",
            "Orders given up at their deadline before a worker claimed them.",
        )?;
        let queue_depth = make.gauge("millrace_queue_depth", "Orders in the queue.")?;
        let queue_capacity = make.gauge(
            "millrace_queue_capacity",
            "Orders that the queue has room for.",
        )?;
        let queue_wait_seconds = make.histogram(
            "millrace_queue_wait_seconds",
            "Time that the oldest order of a batch had been in the queue, by the wall clock.",
            &SECONDS,
        )?;
        let orders_in_flight = make.gauge(
            "millrace_orders_in_flight",
            "Orders queued or being written.",
        )?;
        let orders_remembered = make.gauge(
            "millrace_orders_remembered",
            "Orders remembered for idempotency and purchase limits.",
        )?;
        let batch_flushes = make.counters(
            "millrace_batch_flushes_total",
            "Batches taken from the queue, by why they were no larger: nothing more was there, or \
             workers.batch_rows_max.",
            "reason",
            &FLUSHES,
        )?;
        let batch_rows = make.histogram(
            "millrace_batch_rows",
            "Rows that a committed batch had.",
            &ROWS,
        )?;
        let batch_seconds = make.histogram(
            "millrace_batch_seconds",
            "Time to write and commit a batch, with every attempt.",
            &SECONDS,
        )?;
        let batches = make.counter("millrace_batches_total", "Batches committed.")?;
        let rows_written = make.counter("millrace_rows_written_total", "Rows committed.")?;
        let batch_retries = make.counters(
            "millrace_batch_retries_total",
            "Attempts to write a batch that failed and were tried again.",
            "reason",
            &RETRIES,
        )?;
        let dead_letters = make.counter(
            "millrace_dead_letters_total",
            "Rows that the database refused and that became dead letters.",
        )?;
        let orders_parked = make.gauge(
            "millrace_orders_parked",
            "Orders parked because the database refuses their SKU's counters.",
        )?;
        let commits_lost = make.counter(
            "millrace_commits_lost_total",
            "Commits that the database lost after it had acknowledged them (failover).",
        )?;
        let journal_groups = make.counter(
            "millrace_journal_groups_total",
            "Groups of orders synced to the journal; each cost one sync.",
        )?;
        let journal_orders = make.counter(
            "millrace_journal_orders_total",
            "Orders synced to the journal.",
        )?;
        let journal_sync_seconds = make.histogram(
            "millrace_journal_sync_seconds",
            "Time to write and sync one group of orders to the journal.",
            &SECONDS,
        )?;
        let journal_bytes = make.gauge(
            "millrace_journal_bytes",
            "Bytes that the journal's segments take on the disk.",
        )?;
        let journal_bytes_max = make.gauge(
            "millrace_journal_bytes_max",
            "Bytes that they may take: queue.journal.bytes_max.",
        )?;
        let journal_backlog = make.gauge(
            "millrace_journal_backlog_orders",
            "Acknowledged orders that wait on the disk, because there is no room in memory.",
        )?;
        let journal_outstanding = make.gauge(
            "millrace_journal_outstanding_orders",
            "Orders in the journal that the database has not decided yet.",
        )?;
        let journal_failed = make.gauge(
            "millrace_journal_failed",
            "1 once the journal has failed: respond-async is refused until a restart.",
        )?;
        let journal_replayed = make.gauge(
            "millrace_journal_replayed_orders",
            "Orders that the last start found in the journal and not in the database, and wrote.",
        )?;
        let orders_restored = make.counter(
            "millrace_orders_restored_total",
            "Orders written again after the database had lost them (failover).",
        )?;
        let pruned_rows = make.counters(
            "millrace_pruned_rows_total",
            "Rows deleted because retention keeps them no longer.",
            "table",
            &PRUNED,
        )?;
        let oldest_row = IntGaugeVec::new(
            Opts::new(
                "millrace_oldest_row_seconds",
                "Age of the oldest row, seen when retention last deleted what was too old.",
            ),
            &["table"],
        )?;
        let oldest_row = make.add(
            oldest_row,
            "gauge",
            "`table`: `orders`, `payment_events`, `stock_journal`".to_owned(),
        )?;
        let payments = Payments::register(&mut make)?;
        let stock = IntGaugeVec::new(
            Opts::new(
                "millrace_stock_units",
                "Units of each SKU by state; held: by orders that are not paid yet.",
            ),
            &["sku_id", "state"],
        )?;
        let labels = "`sku_id`; `state`: `free`, `held`, `sold`";
        let stock = make.add(stock, "gauge", labels.to_owned())?;
        let connections = make.gauge(
            "millrace_connections",
            "Open connections of the data plane.",
        )?;
        let connections_cut = make.counters(
            "millrace_connections_cut_total",
            "Connections of the data plane that have ended, by who or what ended them.",
            "reason",
            &CLOSES,
        )?;
        let log_lines_dropped = make.counters(
            "millrace_log_lines_dropped_total",
            "Lines of the log that were dropped: the queue to standard error was full, standard error \
             refused them, or too many of one kind came at once (the log says how many of each).",
            "reason",
            &LOG_DROPS,
        )?;
        let ready = make.gauge("millrace_ready", "1 while every check of /readyz holds.")?;
        let stalled_seconds = Gauge::new(
            "millrace_stalled_seconds",
            "Time for which orders have waited and none was written; 0 while none waits.",
        )?;
        let stalled_seconds = make.add(stalled_seconds, "gauge", String::new())?;
        let poisoned = make.gauge(
            "millrace_poisoned",
            "1 once an internal fault has stopped the process from taking orders.",
        )?;
        let recovery_seconds = Gauge::new(
            "millrace_recovery_seconds",
            "Time that the last start took, from the first step to the recovered state.",
        )?;
        let recovery_seconds = make.add(recovery_seconds, "gauge", String::new())?;
        let recovered_orders = make.gauge(
            "millrace_recovered_orders",
            "Orders of the idempotency window that the last start read from the database.",
        )?;
        #[cfg(target_os = "linux")]
        make.registry.register(Box::new(
            prometheus::process_collector::ProcessCollector::for_self(),
        ))?;
        Ok(Metrics {
            registry: make.registry,
            described: Arc::new(make.described),
            orders,
            wait_seconds,
            unknown,
            queue_depth,
            queue_capacity,
            queue_wait_seconds,
            orders_in_flight,
            orders_remembered,
            batch_flushes,
            batch_rows,
            batch_seconds,
            batches,
            rows_written,
            batch_retries,
            orders_abandoned,
            dead_letters,
            orders_parked,
            commits_lost,
            journal_groups,
            journal_orders,
            journal_sync_seconds,
            journal_bytes,
            journal_bytes_max,
            journal_backlog,
            journal_outstanding,
            journal_failed,
            journal_replayed,
            orders_restored,
            payments,
            connections,
            connections_cut,
            log_lines_dropped,
            pruned_rows,
            oldest_row,
            stock,
            ready,
            stalled_seconds,
            poisoned,
            recovery_seconds,
            recovered_orders,
        })
    }

    /// Notes how old the oldest row of a table is.
    pub fn set_oldest_row(&self, table: &str, seconds: i64) {
        self.oldest_row.with_label_values(&[table]).set(seconds);
    }

    /// Notes the counters of a SKU.
    pub fn observe_stock(&self, sku_id: &str, free: u32, held: u32, sold: u32) {
        for (state, units) in [("free", free), ("held", held), ("sold", sold)] {
            self.stock
                .with_label_values(&[sku_id, state])
                .set(i64::from(units));
        }
    }

    /// How many batches took at most so many seconds, for each bound of the histogram.
    pub fn batch_seconds_within(&self) -> Vec<(f64, u64)> {
        let families = self.batch_seconds.collect();
        let metrics = families.iter().flat_map(|family| family.get_metric());
        metrics
            .flat_map(|metric| metric.get_histogram().get_bucket())
            .map(|bucket| (bucket.upper_bound(), bucket.cumulative_count()))
            .collect()
    }

    /// The Prometheus text form.
    pub fn render(&self) -> String {
        let mut text = Vec::new();
        // Encoding into a vector fails only for a family without metrics, which has no text.
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut text);
        String::from_utf8(text).unwrap_or_default()
    }

    /// The reference page, `docs/METRICS.md`.
    pub fn reference(&self) -> String {
        let mut page = String::from(REFERENCE_HEAD);
        for metric in self.described.iter() {
            let Described {
                name,
                kind,
                labels,
                help,
            } = metric;
            // Writing to a String cannot fail.
            let _ = writeln!(page, "| `{name}` | {kind} | {labels} | {help} |");
        }
        page
    }
}

const REFERENCE_HEAD: &str = "\
# Metrics

<!-- Generated from src/metrics.rs: UPDATE_REFERENCE=1 cargo test --test reference -->

`GET /metrics` on the control plane, in Prometheus' text form, without a token. Names are stable;
counters count from the start of the process, and times are in seconds. On Linux the usual
`process_*` metrics (CPU, memory, descriptors, threads, start time) come with them.

| name | type | labels | meaning |
|---|---|---|---|
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_valid_and_used_once() {
        let metrics = Metrics::new().unwrap();
        metrics.orders.count("created");
        metrics.batch_retries.count("a reason nobody listed");
        let text = metrics.render();
        assert!(text.contains("millrace_orders_total{outcome=\"created\"} 1"));
        assert!(text.contains("millrace_batch_retries_total{reason=\"other\"} 1"));
        assert!(text.contains("# TYPE millrace_batch_seconds histogram"));
    }

    #[test]
    fn a_counter_catches_up_with_what_others_count() {
        let metrics = Metrics::new().unwrap();
        metrics.connections_cut.catch_up("evicted", 3);
        metrics.connections_cut.catch_up("evicted", 2);
        metrics.connections_cut.catch_up("evicted", 5);
        assert_eq!(metrics.connections_cut.totals()["evicted"], 5);
    }
}
