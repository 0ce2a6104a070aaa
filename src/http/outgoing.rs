//! Requests to other systems of the shop: receivers of webhooks, the collector of traces.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::Uri;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};

/// Longest time for which an idle connection is kept.
const IDLE: Duration = Duration::from_secs(30);

/// A client with a pool.
pub type OutgoingClient = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

/// A client that keeps at most `idle_max` idle connections to a host. TLS rests on the system's certificates.
///
/// # Errors
/// If these cannot be read.
pub fn client(idle_max: usize) -> Result<OutgoingClient, String> {
    let provider = rustls::crypto::ring::default_provider();
    let connector = HttpsConnectorBuilder::new()
        .with_provider_and_native_roots(provider)
        .map_err(|error| format!("the system's certificates cannot be read: {error}"))?
        .https_or_http()
        .enable_http1()
        .build();
    Ok(Client::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE)
        .pool_max_idle_per_host(idle_max)
        .build(connector))
}

/// An address from the settings: `http` or `https`, with a host and without a user.
///
/// # Errors
/// What is wrong with it, for a sentence that names the setting.
pub fn address(url: &str) -> Result<Uri, String> {
    let uri: Uri = url.parse().map_err(|error| format!("{error}"))?;
    if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none() {
        return Err("must be https://host/path (or http:// on a network of your own)".to_owned());
    }
    let has_user = |authority: &hyper::http::uri::Authority| authority.as_str().contains('@');
    if uri.authority().is_some_and(has_user) {
        return Err("must not have a user in it".to_owned());
    }
    Ok(uri)
}

/// An error with its causes.
pub fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
