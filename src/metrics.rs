//! Every metric, named once.
//!
//! Names follow the Prometheus conventions: a unit at the end, `_total` on counters.

use prometheus::{
    Encoder, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

/// Handles to every metric. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Registry,
    /// Answers to `POST /v1/orders` by `outcome`: `created`, `replayed`, `undecided`,
    /// `timed_out`, `unwritten`, `failed`, or the refusal's code.
    pub orders: OrderOutcomes,
    /// Time from admission to the answer of a placed order, in seconds.
    pub wait_seconds: Histogram,
    /// Orders in the queue.
    pub queue_depth: IntGauge,
    /// Orders in flight: queued or being written.
    pub orders_in_flight: IntGauge,
    /// Orders remembered for idempotency and limits.
    pub orders_remembered: IntGauge,
    /// Rows a committed batch had.
    pub batch_rows: Histogram,
    /// Time to write and commit a batch, in seconds.
    pub batch_seconds: Histogram,
    /// Batches committed.
    pub batches: IntCounter,
    /// Rows committed.
    pub rows_written: IntCounter,
    /// Attempts to write a batch that failed and were tried again, by `reason`: `transient`,
    /// `timeout`, `unknown_commit`.
    pub batch_retries: IntCounterVec,
    /// Orders given up at their deadline before a worker claimed them.
    pub orders_abandoned: IntCounter,
    /// Rows that the database refused and that became dead letters.
    pub dead_letters: IntCounter,
    /// Orders parked because the database refuses their SKU's counters.
    pub orders_parked: IntGauge,
    /// Commits that the database lost after it had acknowledged them (failover).
    pub commits_lost: IntCounter,
    /// Open connections of the data plane.
    pub connections: IntGauge,
    /// Connections closed by the engine itself, by `reason`.
    pub connections_cut: IntCounterVec,
    /// Units of each SKU by `state`: `free`, `held`, `sold`.
    stock: IntGaugeVec,
    /// 1 while orders are taken.
    pub ready: IntGauge,
    /// Time that recovery took at the last start, in seconds.
    pub recovery_seconds: prometheus::Gauge,
}

/// Upper bounds in seconds: from a local commit to beyond the order timeout.
const SECONDS: [f64; 14] = [
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];
const ROWS: [f64; 11] = [
    1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 1_000.0, 2_500.0, 5_000.0,
];

/// The values of `outcome`: what became of an order, or the code of its refusal.
const OUTCOMES: [&str; 19] = [
    "sold_out",
    "created",
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
    "unwritten",
    "failed",
    "other",
];

/// A counter for each outcome, looked up by its label once at start: a look-up by label is a lock
/// and a hash, on every single request.
#[derive(Clone, Debug)]
pub struct OrderOutcomes {
    counters: [IntCounter; OUTCOMES.len()],
}

impl OrderOutcomes {
    /// Counts one answer; one that is not in the list counts as `other`.
    pub fn count(&self, outcome: &'static str) {
        let place = OUTCOMES.iter().position(|known| *known == outcome);
        self.counters[place.unwrap_or(OUTCOMES.len() - 1)].inc();
    }
}

impl Metrics {
    /// A registry of its own with every metric at zero.
    ///
    /// # Errors
    /// Where a name is invalid or used twice; a defect that the first test finds.
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let counter = |name: &str, help: &str| -> prometheus::Result<IntCounter> {
            let metric = IntCounter::new(name, help)?;
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        };
        let counters = |name: &str, help: &str, label: &str| -> prometheus::Result<IntCounterVec> {
            let metric = IntCounterVec::new(Opts::new(name, help), &[label])?;
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        };
        let gauge = |name: &str, help: &str| -> prometheus::Result<IntGauge> {
            let metric = IntGauge::new(name, help)?;
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        };
        let histogram =
            |name: &str, help: &str, buckets: &[f64]| -> prometheus::Result<Histogram> {
                let metric =
                    Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec()))?;
                registry.register(Box::new(metric.clone()))?;
                Ok(metric)
            };
        let by_outcome = counters(
            "millrace_orders_total",
            "Answers to orders by outcome.",
            "outcome",
        )?;
        let stock = IntGaugeVec::new(
            Opts::new("millrace_stock_units", "Units of each SKU by state."),
            &["sku_id", "state"],
        )?;
        registry.register(Box::new(stock.clone()))?;
        let recovery_seconds = prometheus::Gauge::new(
            "millrace_recovery_seconds",
            "Time that recovery took at the last start.",
        )?;
        registry.register(Box::new(recovery_seconds.clone()))?;
        Ok(Metrics {
            orders: OrderOutcomes {
                counters: OUTCOMES.map(|outcome| by_outcome.with_label_values(&[outcome])),
            },
            wait_seconds: histogram(
                "millrace_order_wait_seconds",
                "Time from admission to the answer of a placed order.",
                &SECONDS,
            )?,
            queue_depth: gauge("millrace_queue_depth", "Orders in the queue.")?,
            orders_in_flight: gauge(
                "millrace_orders_in_flight",
                "Orders queued or being written.",
            )?,
            orders_remembered: gauge(
                "millrace_orders_remembered",
                "Orders remembered for idempotency and purchase limits.",
            )?,
            batch_rows: histogram("millrace_batch_rows", "Rows a committed batch had.", &ROWS)?,
            batch_seconds: histogram(
                "millrace_batch_seconds",
                "Time to write and commit a batch.",
                &SECONDS,
            )?,
            batches: counter("millrace_batches_total", "Batches committed.")?,
            rows_written: counter("millrace_rows_written_total", "Rows committed.")?,
            batch_retries: counters(
                "millrace_batch_retries_total",
                "Attempts to write a batch that failed and were tried again.",
                "reason",
            )?,
            orders_abandoned: counter(
                "millrace_orders_abandoned_total",
                "Orders given up at their deadline before a worker claimed them.",
            )?,
            dead_letters: counter(
                "millrace_dead_letters_total",
                "Rows that the database refused.",
            )?,
            orders_parked: gauge(
                "millrace_orders_parked",
                "Orders parked because the database refuses their SKU's counters.",
            )?,
            commits_lost: counter(
                "millrace_commits_lost_total",
                "Commits that the database lost after it had acknowledged them.",
            )?,
            connections: gauge(
                "millrace_connections",
                "Open connections of the data plane.",
            )?,
            connections_cut: counters(
                "millrace_connections_cut_total",
                "Connections closed by the engine itself.",
                "reason",
            )?,
            ready: gauge("millrace_ready", "1 while orders are taken.")?,
            stock,
            recovery_seconds,
            registry,
        })
    }

    /// Notes the counters of a SKU.
    pub fn observe_stock(&self, sku_id: &str, free: u32, held: u32, sold: u32) {
        for (state, units) in [("free", free), ("held", held), ("sold", sold)] {
            self.stock
                .with_label_values(&[sku_id, state])
                .set(i64::from(units));
        }
    }

    /// The Prometheus text form.
    pub fn render(&self) -> String {
        let mut text = Vec::new();
        // Encoding into a vector fails only for a family without metrics, which has no text.
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut text);
        String::from_utf8(text).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_valid_and_used_once() {
        let metrics = Metrics::new().unwrap();
        metrics.orders.count("created");
        let text = metrics.render();
        assert!(text.contains("millrace_orders_total{outcome=\"created\"} 1"));
        assert!(text.contains("# TYPE millrace_batch_seconds histogram"));
    }
}
