//! The way out: a bounded buffer, a thread that empties it, and the count of spans that are lost.
//!
//! The SDK's batch processor counts its losses for its own log alone, so the bound is kept here, below the one that it
//! has: a span that finds the buffer full is counted and dropped.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use opentelemetry::Context;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, Span, SpanData, SpanExporter, SpanProcessor,
};
use prometheus::IntCounter;

/// Spans that wait for the collector, those on their way included.
pub const BUFFER: usize = 8_192;
/// Spans in one request.
const TOGETHER: usize = 512;
/// Longest time that a span waits for others.
const EVERY: Duration = Duration::from_secs(1);

/// Spans in the buffer, and what became of others.
#[derive(Debug)]
struct Shared {
    waiting: AtomicUsize,
    delivered: IntCounter,
    dropped: IntCounter,
}

/// A processor whose buffer has a bound and whose losses are counted.
#[derive(Debug)]
pub struct Bounded {
    shared: Arc<Shared>,
    batches: BatchSpanProcessor,
}

impl Bounded {
    /// One that delivers to `exporter`.
    pub fn new<E: SpanExporter + 'static>(
        exporter: E,
        delivered: IntCounter,
        dropped: IntCounter,
    ) -> Self {
        let shared = Arc::new(Shared {
            waiting: AtomicUsize::new(0),
            delivered,
            dropped,
        });
        let config = BatchConfigBuilder::default()
            .with_max_queue_size(BUFFER)
            .with_max_export_batch_size(TOGETHER)
            .with_scheduled_delay(EVERY)
            .build();
        let counting = Counting {
            exporter,
            shared: Arc::clone(&shared),
            is_failing: AtomicBool::new(false),
        };
        let batches = BatchSpanProcessor::builder(counting)
            .with_batch_config(config)
            .build();
        Bounded { shared, batches }
    }
}

impl SpanProcessor for Bounded {
    fn on_start(&self, span: &mut Span, context: &Context) {
        self.batches.on_start(span, context);
    }

    fn on_end(&self, span: SpanData) {
        // Relaxed: the count guards no data, and a span more or less does not matter.
        if self.shared.waiting.fetch_add(1, Ordering::Relaxed) >= BUFFER {
            self.shared.waiting.fetch_sub(1, Ordering::Relaxed);
            self.shared.dropped.inc();
            return;
        }
        self.batches.on_end(span);
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.batches.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.batches.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.batches.set_resource(resource);
    }
}

/// An exporter with its outcomes counted.
#[derive(Debug)]
struct Counting<E> {
    exporter: E,
    shared: Arc<Shared>,
    is_failing: AtomicBool,
}

impl<E: SpanExporter> SpanExporter for Counting<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        let exported = self.exporter.export(batch).await;
        self.shared.waiting.fetch_sub(spans, Ordering::Relaxed);
        match &exported {
            Ok(()) => {
                self.shared.delivered.inc_by(spans as u64);
                if self.is_failing.swap(false, Ordering::Relaxed) {
                    tracing::info!("the collector of traces takes spans again");
                }
            }
            Err(error) => {
                self.shared.dropped.inc_by(spans as u64);
                if !self.is_failing.swap(true, Ordering::Relaxed) {
                    tracing::warn!(
                        reason = %error,
                        "the collector of traces does not take spans; they are dropped and counted, orders go on"
                    );
                }
            }
        }
        exported
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}
