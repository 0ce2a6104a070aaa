//! The table of every metric.
//!
//! Names follow the Prometheus conventions: a unit at the end, `_total` on counters.

use std::fmt::Write as _;
use std::ops::Deref;
use std::sync::Arc;

use prometheus::core::Collector;
use prometheus::{Encoder, Registry, TextEncoder};

#[macro_use]
mod table;
mod cluster;
mod payments;
mod waitlist;

pub use cluster::Cluster;
pub use payments::Payments;
pub use table::{Counters, Totals};
use table::{Described, Registrar};
pub use waitlist::Waitlist;

/// Upper bounds in seconds: from a local commit to beyond the order timeout.
const SECONDS: [f64; 14] = [
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];
const ROWS: [f64; 11] = [
    1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 1_000.0, 2_500.0, 5_000.0,
];

/// Values of `outcome`: the result of an order, or the code of its refusal.
const OUTCOMES: [&str; 26] = [
    "sold_out",
    "created",
    "accepted",
    "waitlisted",
    "draw_under_way",
    "waitlist_full",
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
    "queue_unavailable",
    "unwritten",
    "failed",
    "other",
];

/// Kinds of things that a request named and that do not exist.
const UNKNOWN: [&str; 3] = ["order", "sku", "other"];
/// Reasons why a batch ended: the queue was empty, or `workers.batch_rows_max` was reached.
const FLUSHES: [&str; 3] = ["idle", "full", "other"];
/// Reasons for dropping a log line: the queue was full, standard error refused it, or there were
/// too many of one kind.
const LOG_DROPS: [&str; 3] = ["full", "sink", "limited"];
/// Reasons for retrying a batch: the connection or the server failed, or a step took too long.
const RETRIES: [&str; 3] = ["transient", "timeout", "other"];
/// Tables that `retention` prunes.
const PRUNED: [&str; 4] = ["orders", "payment_events", "stock_journal", "other"];
/// Reasons for the end of a connection, documented at `CloseReason`.
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

metrics! {
    /// The metrics, in the order of the reference page.
    pub struct Table {
        orders = counters("millrace_orders_total", "outcome", &OUTCOMES):
            "Answers to orders by outcome: the result of the order, or the code of its refusal.";
        wait_seconds = histogram("millrace_order_wait_seconds", &SECONDS):
            "Time from admission to the answer of a placed order.";
        unknown = counters("millrace_unknown_total", "what", &UNKNOWN):
            "Requests of the data plane that named an order, a SKU or a path that does not exist.";
        orders_abandoned = counter("millrace_orders_abandoned_total"):
            "Orders abandoned at their deadline before a worker claimed them.";
        queue_depth = gauge("millrace_queue_depth"):
            "Orders in the queue.";
        queue_capacity = gauge("millrace_queue_capacity"):
            "Capacity of the queue in orders.";
        queue_wait_seconds = histogram("millrace_queue_wait_seconds", &SECONDS):
            "Time in the queue of the oldest order of a batch, by the wall clock.";
        orders_in_flight = gauge("millrace_orders_in_flight"):
            "Orders that are queued or being written.";
        orders_remembered = gauge("millrace_orders_remembered"):
            "Orders kept in memory for idempotency and purchase limits.";
        remembered_ratio = float_gauge("millrace_orders_remembered_ratio"):
            "Share of orders.remembered_max in use, 0 to 1; at 1 every new order is refused.";
        batch_flushes = counters("millrace_batch_flushes_total", "reason", &FLUSHES):
            "Batches taken from the queue, by the reason for their size: idle, the queue was empty; full, \
             workers.batch_rows_max was reached.";
        batch_rows = histogram("millrace_batch_rows", &ROWS):
            "Rows per committed batch.";
        batch_seconds = histogram("millrace_batch_seconds", &SECONDS):
            "Time to write and commit a batch, including all attempts.";
        batches = counter("millrace_batches_total"):
            "Batches committed.";
        rows_written = counter("millrace_rows_written_total"):
            "Rows committed.";
        batch_retries = counters("millrace_batch_retries_total", "reason", &RETRIES):
            "Failed attempts to write a batch, which were retried.";
        dead_letters = counter("millrace_dead_letters_total"):
            "Rows that the database refused and that became dead letters.";
        dead_letters_open = gauge("millrace_dead_letters_open"):
            "Dead letters that an operator has neither retried nor discarded, counted every few seconds, up to 10,000.";
        orders_parked = gauge("millrace_orders_parked"):
            "Orders parked because the database refuses their SKU's counters.";
        commits_lost = counter("millrace_commits_lost_total"):
            "Acknowledged commits that the database lost in a failover.";
        journal_groups = counter("millrace_journal_groups_total"):
            "Groups of orders synced to the journal, one sync each.";
        journal_orders = counter("millrace_journal_orders_total"):
            "Orders synced to the journal.";
        journal_sync_seconds = histogram("millrace_journal_sync_seconds", &SECONDS):
            "Time to write and sync one group of orders to the journal.";
        journal_bytes = gauge("millrace_journal_bytes"):
            "Bytes of the journal's segments on the disk.";
        journal_bytes_max = gauge("millrace_journal_bytes_max"):
            "Limit of the journal's bytes: queue.journal.bytes_max.";
        journal_backlog = gauge("millrace_journal_backlog_orders"):
            "Acknowledged orders that wait on the disk because the memory queue is full.";
        journal_outstanding = gauge("millrace_journal_outstanding_orders"):
            "Orders in the journal that are not yet settled in the database.";
        journal_failed = gauge("millrace_journal_failed"):
            "1 once the journal has failed: respond-async is refused until a restart.";
        log_away = gauge("millrace_log_away"):
            "1 while the order log takes no orders: respond-async is refused with 503 queue_unavailable.";
        log_unknown = counter("millrace_log_unknown_total"):
            "Groups whose append had an unknown outcome at first; each is repeated until it is there for certain.";
        journal_replayed = gauge("millrace_journal_replayed_orders"):
            "Orders that the last start found in the journal but not in the database, and wrote.";
        orders_restored = counter("millrace_orders_restored_total"):
            "Orders written again after the database had lost them in a failover.";
        pruned_rows = counters("millrace_pruned_rows_total", "table", &PRUNED):
            "Rows deleted by retention.";
        oldest_row = gauges("millrace_oldest_row_seconds", &["table"], "`table`: `orders`, `payment_events`, `stock_journal`"):
            "Age of the oldest row when retention last ran.";
        waitlist = group(Waitlist): "Orders that wait for units.";
        payments = group(Payments): "Payments, and orders that are not paid.";
        cluster = group(Cluster): "This process as one of several nodes.";
        stock = gauges("millrace_stock_units", &["sku_id", "state"], "`sku_id`; `state`: `free`, `held`, `sold`"):
            "Units of each SKU by state; held units belong to unpaid orders.";
        events_delivered = labelled_counter("millrace_events_delivered_total", &["sink"], "`sink`"):
            "Events that a sink has taken.";
        events_failures = labelled_counter("millrace_events_failures_total", &["sink"], "`sink`"):
            "Attempts to deliver an event that failed; each is repeated.";
        events_slots_given_up = labelled_counter("millrace_events_slots_given_up_total", &["sink"], "`sink`"):
            "Replication slots dropped because a sink was more than events.lag_bytes_max behind; it is refilled from \
             the rows.";
        events_kept_bytes = gauges("millrace_events_kept_bytes", &["sink"], "`sink`"):
            "Bytes of WAL that PostgreSQL keeps for a sink.";
        events_behind_seconds = gauges("millrace_events_behind_seconds", &["sink"], "`sink`"):
            "Age of the oldest event that is read and that the sink has not taken; 0 if there is none.";
        events_waiting = gauges("millrace_events_waiting", &["sink"], "`sink`"):
            "Events that wait one by one in the database, because the sink did not take them while it took others.";
        events_dead_letters = gauges("millrace_events_dead_letters", &["sink"], "`sink`"):
            "Dead letters of a sink: events that it did not take for a day.";
        events_disabled = gauges("millrace_events_disabled", &["sink"], "`sink`"):
            "1 while a sink gets nothing because it wants no more events (410 Gone).";
        connections = gauge("millrace_connections"):
            "Open connections of the data plane.";
        connections_cut = counters("millrace_connections_cut_total", "reason", &CLOSES):
            "Connections of the data plane that have ended, by reason.";
        log_lines_dropped = counters("millrace_log_lines_dropped_total", "reason", &LOG_DROPS):
            "Log lines that were dropped: the queue to standard error was full, standard error refused them, or \
             there were too many of one kind (the log says how many of each).";
        ready = gauge("millrace_ready"):
            "1 while every check of /readyz passes.";
        stalled_seconds = float_gauge("millrace_stalled_seconds"):
            "Time for which orders have waited without any being written; 0 while none waits.";
        poisoned = gauge("millrace_poisoned"):
            "1 once an internal fault has stopped the process from taking orders.";
        spans_delivered = counter("millrace_spans_delivered_total"):
            "Spans of traced requests that the collector has taken.";
        spans_dropped = counter("millrace_spans_dropped_total"):
            "Spans that were dropped because the collector does not take them, or not fast enough.";
        recovery_seconds = float_gauge("millrace_recovery_seconds"):
            "Duration of the last start, from the first step to the recovered state.";
        recovered_orders = gauge("millrace_recovered_orders"):
            "Orders of the idempotency window that the last start read from the database.";
    }
}

/// Handles to every metric. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Registry,
    described: Arc<Vec<Described>>,
    table: Arc<Table>,
}

impl Deref for Metrics {
    type Target = Table;

    fn deref(&self) -> &Table {
        &self.table
    }
}

impl Metrics {
    /// Creates a registry with every metric at zero.
    ///
    /// # Errors
    /// If a name is invalid or used twice, which the first test finds.
    pub fn new() -> prometheus::Result<Self> {
        let mut registrar = Registrar::default();
        let table = Table::register(&mut registrar)?;
        #[cfg(target_os = "linux")]
        registrar.registry.register(Box::new(
            prometheus::process_collector::ProcessCollector::for_self(),
        ))?;
        Ok(Metrics {
            registry: registrar.registry,
            described: Arc::new(registrar.described),
            table: Arc::new(table),
        })
    }

    /// Sets the age of the oldest row of a table, in seconds.
    pub fn set_oldest_row(&self, table: &str, seconds: i64) {
        self.oldest_row.with_label_values(&[table]).set(seconds);
    }

    /// Sets how far a sink of events is: the age of its oldest event in milliseconds, the events that wait one by one,
    /// its dead letters, and whether it is disabled.
    pub fn observe_sink(
        &self,
        sink: &str,
        behind_ms: u64,
        waiting: i64,
        dead_letters: i64,
        is_disabled: bool,
    ) {
        let seconds = i64::try_from(behind_ms / 1_000).unwrap_or(i64::MAX);
        self.events_behind_seconds
            .with_label_values(&[sink])
            .set(seconds);
        self.events_waiting.with_label_values(&[sink]).set(waiting);
        self.events_dead_letters
            .with_label_values(&[sink])
            .set(dead_letters);
        self.events_disabled
            .with_label_values(&[sink])
            .set(is_disabled.into());
        // Counters exist from the start, so that a rate begins at zero.
        for counter in [
            &self.events_delivered,
            &self.events_failures,
            &self.events_slots_given_up,
        ] {
            counter.with_label_values(&[sink]);
        }
    }

    /// Sets the bytes of WAL that are kept for a sink.
    pub fn observe_kept(&self, sink: &str, bytes: u64) {
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        self.events_kept_bytes.with_label_values(&[sink]).set(bytes);
    }

    /// Sets the counters of a SKU, in units.
    pub fn observe_stock(&self, sku_id: &str, free: u32, held: u32, sold: u32) {
        for (state, units) in [("free", free), ("held", held), ("sold", sold)] {
            self.stock
                .with_label_values(&[sku_id, state])
                .set(i64::from(units));
        }
    }

    /// Sets the length of a SKU's waiting list, and the units kept for it.
    pub fn observe_waitlist(&self, sku_id: &str, orders: usize, kept: u32) {
        let (waiting, units) = (&self.waitlist.waiting, &self.waitlist.kept);
        waiting.with_label_values(&[sku_id]).set(orders as i64);
        units.with_label_values(&[sku_id]).set(i64::from(kept));
    }

    /// Batches that took at most so many seconds: each bound of the histogram with its cumulative
    /// count.
    pub fn batch_seconds_within(&self) -> Vec<(f64, u64)> {
        within(&self.batch_seconds)
    }

    /// The same for groups of the order log.
    pub fn journal_sync_seconds_within(&self) -> Vec<(f64, u64)> {
        within(&self.journal_sync_seconds)
    }

    /// All metrics in Prometheus' text format.
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

/// Each bound of a histogram with its cumulative count.
fn within(histogram: &prometheus::Histogram) -> Vec<(f64, u64)> {
    let families = histogram.collect();
    let metrics = families.iter().flat_map(|family| family.get_metric());
    metrics
        .flat_map(|metric| metric.get_histogram().get_bucket())
        .map(|bucket| (bucket.upper_bound(), bucket.cumulative_count()))
        .collect()
}

const REFERENCE_HEAD: &str = "\
# Metrics

<!-- Generated from src/metrics.rs: UPDATE_REFERENCE=1 cargo test --test reference -->

`GET /metrics` on the control plane, in Prometheus' text format, without a token. Names are stable.
Counters count from the start of the process; times are in seconds. On Linux the usual `process_*`
metrics (CPU, memory, descriptors, threads, start time) are included.

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
