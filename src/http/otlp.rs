//! Delivers spans to a collector by OTLP over HTTP, as protobuf.

use std::fmt;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Request, Response};
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
use tokio::runtime::Handle;

use super::outgoing::{self, OutgoingClient, causes};

/// Longest wait for an answer.
const ANSWER: Duration = Duration::from_secs(5);
/// Largest answer.
const BODY_BYTES_MAX: usize = 64 * 1024;
/// The path below the collector's address, as OTLP defines it.
const PATH: &str = "/v1/traces";

/// An exporter to the collector at `url`, whose requests run on `runtime`. Connects when it is needed.
///
/// # Errors
/// What is wrong with the address or the system's certificates.
pub fn exporter(url: &str, runtime: Handle) -> Result<SpanExporter, String> {
    outgoing::address(url)?;
    let client = Collector {
        client: outgoing::client(1)?,
        runtime,
    };
    SpanExporter::builder()
        .with_http()
        .with_http_client(client)
        .with_protocol(Protocol::HttpBinary)
        .with_endpoint(format!("{}{PATH}", url.trim_end_matches('/')))
        .with_timeout(ANSWER)
        .build()
        .map_err(|error| error.to_string())
}

/// The client of the exporter.
struct Collector {
    client: OutgoingClient,
    runtime: Handle,
}

impl fmt::Debug for Collector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Collector").finish_non_exhaustive()
    }
}

type Sending<'a> = Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'a>>;

impl HttpClient for Collector {
    fn send_bytes<'a, 'b>(&'a self, request: Request<Bytes>) -> Sending<'b>
    where
        'a: 'b,
        Self: 'b,
    {
        let client = self.client.clone();
        let asking = async move {
            let answer = client.request(request.map(Full::new)).await;
            let (head, body) = answer.map_err(|error| causes(&error))?.into_parts();
            let body = Limited::new(body, BODY_BYTES_MAX).collect().await;
            let body = body.map_err(|error| error.to_string())?.to_bytes();
            match head.status.is_success() {
                true => Ok(Response::from_parts(head, body)),
                false => Err(format!("it answered {}", head.status)),
            }
        };
        // The exporter has a thread of its own, without tokio's timers and sockets.
        let asked = self
            .runtime
            .spawn(async move { tokio::time::timeout(ANSWER, asking).await });
        Box::pin(async move {
            match asked.await? {
                Ok(answered) => Ok(answered?),
                Err(_) => Err(format!("no answer within {} s", ANSWER.as_secs()).into()),
            }
        })
    }
}
