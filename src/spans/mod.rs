//! Spans for OpenTelemetry: the way of a sampled request, from its arrival to the commit of its order.
//!
//! ```text
//!   request ──┬── admission      price, sale window, key, units
//!             ├── order log      until the log has it (respond-async)
//!             ├── queue          until a worker claims it
//!             ├── COPY orders    its batch: COPY, counters, COMMIT
//!             └── answer
//! ```
//!
//! Without `tracing.otlp_url` there is no [`Spans`], so a request looks at one absent pointer and no header. With it, the
//! sampler decides by the client's `traceparent` or by `tracing.sample`; what is not sampled has no [`Trace`]. Spans are
//! delivered by a thread of their own ([`export`]), for which nothing waits.

pub mod export;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use dashmap::DashMap;
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::{
    Span as _, SpanContext, SpanKind, Status, TraceContextExt, Tracer, TracerProvider,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SdkTracer, SdkTracerProvider, Span};

use crate::order::OrderId;

/// Sampled orders in flight that are known by their ids. Further ones have no spans behind their admission.
const ORDERS_MAX: usize = 65_536;

/// Makes spans. Cheap to clone.
#[derive(Clone)]
pub struct Spans(Arc<Inner>);

struct Inner {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
    /// Sampled orders from their admission until a worker claims them.
    orders: DashMap<OrderId, InFlight, foldhash::quality::RandomState>,
    /// Their number. It spares workers the look-ups while there are none, so it may lag behind.
    count: AtomicUsize,
}

struct InFlight {
    trace: Trace,
    since: Instant,
}

impl fmt::Debug for Spans {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Spans").finish_non_exhaustive()
    }
}

/// The header fields of W3C Trace Context in a request.
#[derive(Clone, Copy, Debug, Default)]
pub struct TraceFields<'a> {
    /// `traceparent`
    pub parent: Option<&'a str>,
    /// `tracestate`
    pub state: Option<&'a str>,
}

impl Extractor for TraceFields<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        match key {
            "traceparent" => self.parent,
            "tracestate" => self.state,
            _ => None,
        }
    }

    fn keys(&self) -> Vec<&str> {
        vec!["traceparent", "tracestate"]
    }
}

impl Spans {
    /// Delivers spans to `exporter`. `sample` is the share of requests that are sampled if their client has not decided
    /// it, 0 to 1.
    pub fn new(exporter: export::Bounded, sample: f64) -> Self {
        let sampler = Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(sample)));
        let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
        let mut resource = Resource::builder().with_attribute(version);
        if std::env::var_os("OTEL_SERVICE_NAME").is_none() {
            resource = resource.with_service_name("millrace");
        }
        let provider = SdkTracerProvider::builder()
            .with_span_processor(exporter)
            .with_sampler(sampler)
            .with_resource(resource.build())
            .build();
        Spans(Arc::new(Inner {
            tracer: provider.tracer("millrace"),
            provider,
            orders: DashMap::default(),
            count: AtomicUsize::new(0),
        }))
    }

    /// Begins the span of a request; `None` if it is not sampled.
    pub fn request(&self, fields: &TraceFields<'_>) -> Option<RequestSpan> {
        let parent = TraceContextPropagator::new().extract_with_context(&Context::new(), fields);
        let tracer = &self.0.tracer;
        let builder = tracer.span_builder("request").with_kind(SpanKind::Server);
        let span = tracer.build_with_context(builder, &parent);
        let trace = Trace {
            spans: self.clone(),
            context: span.span_context().clone(),
        };
        span.is_recording().then_some(RequestSpan { span, trace })
    }

    /// The sampled ones among the orders that a worker has claimed. Ends their time in the queue.
    pub fn claimed(&self, ids: impl Iterator<Item = OrderId>) -> Vec<ClaimedOrder> {
        // Relaxed: the order has come through the queue, which orders the count of it before this.
        if self.0.count.load(Ordering::Relaxed) == 0 {
            return Vec::new();
        }
        ids.filter_map(|id| {
            let InFlight { trace, since } = self.take(id)?;
            trace.child("queue", since, vec![order_id(id)]);
            Some(ClaimedOrder { id, trace })
        })
        .collect()
    }

    fn take(&self, id: OrderId) -> Option<InFlight> {
        let (_, order) = self.0.orders.remove(&id)?;
        self.0.count.fetch_sub(1, Ordering::Relaxed);
        Some(order)
    }

    /// Delivers what is left, for at most `limit`. Blocks.
    pub fn shutdown(&self, limit: Duration) {
        // Spans that could not be delivered are counted.
        let _ = self.0.provider.shutdown_with_timeout(limit);
    }
}

/// The span of a request in progress.
pub struct RequestSpan {
    span: Span,
    trace: Trace,
}

impl RequestSpan {
    /// The parent of the spans below it.
    pub fn trace(&self) -> &Trace {
        &self.trace
    }

    /// Ends it, once the request is answered. `code` is that of the problem it was answered with.
    pub fn end(
        mut self,
        method: &str,
        route: &'static str,
        status: u16,
        code: Option<&'static str>,
    ) {
        const METHODS: [&str; 7] = ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"];
        let known = METHODS.into_iter().find(|known| *known == method);
        let method = known.unwrap_or("_OTHER");
        self.span.update_name(format!("{method} {route}"));
        self.span
            .set_attribute(KeyValue::new("http.request.method", method));
        self.span.set_attribute(KeyValue::new("http.route", route));
        self.span.set_attribute(KeyValue::new(
            "http.response.status_code",
            i64::from(status),
        ));
        if let Some(code) = code {
            self.span
                .set_attribute(KeyValue::new("millrace.code", code));
            if status >= 500 {
                self.span.set_attribute(KeyValue::new("error.type", code));
                self.span.set_status(Status::error(code));
            }
        }
        self.span.end();
    }
}

/// A sampled request, for spans below its own.
#[derive(Clone, Debug)]
pub struct Trace {
    spans: Spans,
    context: SpanContext,
}

impl Trace {
    /// A part of the request that ends now.
    pub fn child(&self, name: &'static str, from: Instant, attributes: Vec<KeyValue>) {
        self.part(SpanKind::Internal, name, from, attributes);
    }

    fn part(&self, kind: SpanKind, name: &'static str, from: Instant, attributes: Vec<KeyValue>) {
        let tracer = &self.spans.0.tracer;
        let parent = Context::new().with_remote_span_context(self.context.clone());
        let now = SystemTime::now();
        let started = now.checked_sub(from.elapsed()).unwrap_or(now);
        let builder = tracer
            .span_builder(name)
            .with_kind(kind)
            .with_start_time(started)
            .with_attributes(attributes);
        tracer
            .build_with_context(builder, &parent)
            .end_with_timestamp(now);
    }

    /// An order of the request is admitted, and about to be queued.
    pub fn admitted(&self, id: OrderId, from: Instant) {
        self.child("admission", from, vec![order_id(id)]);
        let inner = &self.spans.0;
        if inner.count.load(Ordering::Relaxed) >= ORDERS_MAX {
            return;
        }
        let order = InFlight {
            trace: self.clone(),
            since: Instant::now(),
        };
        if inner.orders.insert(id, order).is_none() {
            inner.count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// An order of the request will not be written.
    pub fn given_up(&self, id: OrderId) {
        let _ = self.spans.take(id);
    }

    /// The value of the header `traceparent` for what follows from the request.
    pub fn traceparent(&self) -> String {
        let (trace, span) = (self.context.trace_id(), self.context.span_id());
        format!("00-{trace}-{span}-{:02x}", self.context.trace_flags())
    }
}

/// The attribute that names an order.
pub fn order_id(id: OrderId) -> KeyValue {
    KeyValue::new("millrace.order_id", id.to_string())
}

/// A sampled order in a batch.
pub struct ClaimedOrder {
    /// The order.
    pub id: OrderId,
    trace: Trace,
}

impl ClaimedOrder {
    /// See [`Trace::traceparent`].
    pub fn traceparent(&self) -> String {
        self.trace.traceparent()
    }

    /// Its batch of `rows` is decided.
    pub fn decided(&self, from: Instant, rows: usize) {
        let rows = i64::try_from(rows).unwrap_or(i64::MAX);
        let attributes = vec![
            KeyValue::new("db.system.name", "postgresql"),
            KeyValue::new("db.operation.name", "COPY"),
            KeyValue::new("db.collection.name", "orders"),
            KeyValue::new("db.operation.batch.size", rows),
            order_id(self.id),
        ];
        self.trace
            .part(SpanKind::Client, "COPY orders", from, attributes);
    }
}
