//! A collector of OTLP over HTTP: it decodes what comes by the messages that OpenTelemetry publishes.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use axum::body::Bytes;
use axum::extract::State;
use axum::http::HeaderMap;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use prost::Message;

use crate::support::waiting::wait_until;

/// A span that came in.
#[derive(Clone, Debug)]
pub struct Heard {
    /// `service.name` of its resource.
    pub service: String,
    /// Its name.
    pub name: String,
    /// In hexadecimal.
    pub trace_id: String,
    /// In hexadecimal.
    pub span_id: String,
    /// The span above it; empty if there is none.
    pub parent: String,
    /// In nanoseconds.
    pub started: u64,
    attributes: HashMap<String, String>,
}

impl Heard {
    /// The value of an attribute, as text; empty if it is not there.
    pub fn attribute(&self, name: &str) -> String {
        self.attributes.get(name).cloned().unwrap_or_default()
    }
}

#[derive(Default)]
struct Shared {
    heard: Mutex<Vec<Heard>>,
    hangs: AtomicBool,
}

/// The collector.
pub struct Collector {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl Collector {
    pub async fn start() -> Self {
        let shared = Arc::<Shared>::default();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .expect("a port");
        let address = listener.local_addr().expect("its address");
        let router = axum::Router::new()
            .route("/v1/traces", axum::routing::post(take))
            .with_state(Arc::clone(&shared));
        tokio::spawn(async move { axum::serve(listener, router).await });
        Collector { address, shared }
    }

    /// Answers nothing any more.
    pub fn hang(&self) {
        self.shared.hangs.store(true, Ordering::Release);
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Every span so far, in the order in which they ended.
    pub fn heard(&self) -> Vec<Heard> {
        self.shared.heard.lock().expect("no panic").clone()
    }

    /// Waits until a span of each name was heard, and returns the first of each.
    pub async fn until<const N: usize>(&self, names: &[&str; N]) -> Vec<Heard> {
        let find = || {
            let heard = self.heard();
            let first = |name: &&str| heard.iter().find(|span| span.name == *name).cloned();
            names.iter().map(first).collect::<Option<Vec<_>>>()
        };
        wait_until(&format!("{names:?}"), async || find().is_some()).await;
        find().expect("it was there")
    }
}

async fn take(State(shared): State<Arc<Shared>>, headers: HeaderMap, body: Bytes) {
    assert_eq!(headers["content-type"], "application/x-protobuf");
    if shared.hangs.load(Ordering::Acquire) {
        std::future::pending::<()>().await;
    }
    let request = ExportTraceServiceRequest::decode(body).expect("a request of OTLP");
    let mut heard = shared.heard.lock().expect("no panic");
    for resource in request.resource_spans {
        let described = attributes(
            resource
                .resource
                .map(|it| it.attributes)
                .unwrap_or_default(),
        );
        for span in resource.scope_spans.into_iter().flat_map(|it| it.spans) {
            heard.push(Heard {
                service: described.get("service.name").cloned().unwrap_or_default(),
                name: span.name,
                trace_id: hex(&span.trace_id),
                span_id: hex(&span.span_id),
                parent: hex(&span.parent_span_id),
                started: span.start_time_unix_nano,
                attributes: attributes(span.attributes),
            });
        }
    }
}

fn attributes(pairs: Vec<KeyValue>) -> HashMap<String, String> {
    let text = |value: AnyValue| match value.value {
        Some(Value::StringValue(text)) => text,
        Some(Value::IntValue(number)) => number.to_string(),
        other => format!("{other:?}"),
    };
    let pairs = pairs.into_iter();
    pairs
        .map(|pair| (pair.key, pair.value.map(text).unwrap_or_default()))
        .collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The OpenTelemetry Collector, a program, which prints what comes.
pub struct Real {
    child: std::process::Child,
    address: SocketAddr,
    directory: tempfile::TempDir,
}

impl Real {
    pub async fn start(program: &str) -> Self {
        let directory = crate::support::postgres::test_dir();
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = free.local_addr().expect("its address");
        drop(free);
        let settings = format!(
            "yaml:{{receivers: {{otlp: {{protocols: {{http: {{endpoint: '{address}'}}}}}}}}, \
             exporters: {{debug: {{verbosity: detailed}}}}, \
             service: {{telemetry: {{metrics: {{level: none}}}}, \
             pipelines: {{traces: {{receivers: [otlp], exporters: [debug]}}}}}}}}"
        );
        let log = std::fs::File::create(directory.path().join("log")).expect("a log");
        let child = std::process::Command::new(program)
            .args(["--config", &settings])
            .stderr(log)
            .spawn()
            .expect("the collector");
        let real = Real {
            child,
            address,
            directory,
        };
        wait_until("the collector", async || {
            std::net::TcpStream::connect(address).is_ok()
        })
        .await;
        real
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What it has printed so far.
    pub fn printed(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Real {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
