//! Finding and calling a control plane of our own.

use anyhow::Context;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::StatusCode;
use hyper_util::rt::TokioIo;
use serde_json::Value;

use crate::config::Config;

/// The control plane of a server that runs on this `data_dir`.
pub fn running_server(config: &Config) -> Option<String> {
    let text = std::fs::read_to_string(config.data_dir.join("addresses.json")).ok()?;
    let addresses: Value = serde_json::from_str(&text).ok()?;
    let address = addresses["control_plane"].as_str()?.to_owned();
    // A server that was killed leaves the file behind.
    std::net::TcpStream::connect(&address)
        .is_ok()
        .then_some(address)
}

/// Sends one request to `address`, with a bearer token where there is one, and returns the JSON of a
/// 2xx answer.
pub async fn call_with_token(
    address: &str,
    method: &str,
    path: &str,
    body: Option<&Value>,
    token: Option<&str>,
) -> anyhow::Result<Value> {
    let doing = || format!("{method} http://{address}{path}");
    let body = body.map(Value::to_string).unwrap_or_default();
    let (status, body) = send(address, method, path, None, body, token).await?;
    let body: Value = serde_json::from_slice(&body)
        .with_context(|| format!("{}: the answer is not JSON", doing()))?;
    anyhow::ensure!(
        status.is_success(),
        "{}: {status}: {}",
        doing(),
        body["detail"].as_str().unwrap_or_default()
    );
    Ok(body)
}

/// Sends one request of this media type and returns status and body, whatever they are.
pub async fn send(
    address: &str,
    method: &str,
    path: &str,
    media_type: Option<&str>,
    body: String,
    token: Option<&str>,
) -> anyhow::Result<(StatusCode, Bytes)> {
    let doing = || format!("{method} http://{address}{path}");
    let stream = tokio::net::TcpStream::connect(address)
        .await
        .with_context(doing)?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let driver = tokio::spawn(connection);
    let mut request = hyper::Request::builder()
        .method(method)
        .uri(path)
        .header("host", address);
    if let Some(token) = token {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    if let Some(media_type) = media_type {
        request = request.header("content-type", media_type);
    }
    let answer = sender
        .send_request(request.body(Full::new(Bytes::from(body)))?)
        .await
        .with_context(doing)?;
    let status = answer.status();
    let body = answer
        .into_body()
        .collect()
        .await
        .with_context(doing)?
        .to_bytes();
    driver.abort();
    Ok((status, body))
}
