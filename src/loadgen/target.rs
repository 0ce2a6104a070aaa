//! The target of requests: its address, paths and headers.

use hyper::Uri;
use hyper::header::{AUTHORIZATION, HOST, HeaderMap, HeaderValue};

use super::error::LoadError;
use super::plan::{LoadPlan, OrderMode, Token};

/// The base URL in parts, with the headers that every request carries.
#[derive(Debug, Clone)]
pub(super) struct Target {
    /// The URL as it was given, for messages.
    pub url: String,
    /// `host:port` to connect to, and of those that may be asked in its place.
    pub addresses: Vec<String>,
    prefix: String,
    get_headers: HeaderMap,
    /// `POST /v1/orders` of buyers with even numbers, then of buyers with odd ones: the request line and all
    /// fields but the key and the length.
    order_heads: [Vec<u8>; 2],
    /// The same of the payment platform's callbacks.
    callback_head: Vec<u8>,
}

impl Target {
    /// Reads the target and the token of a plan.
    pub(super) fn of(plan: &LoadPlan) -> Result<Self, LoadError> {
        let uri = parse(&plan.target)?;
        let mut addresses = vec![address_of(&uri)];
        for more in &plan.more_targets {
            addresses.push(address_of(&parse(more)?));
        }
        let prefix = uri.path().trim_end_matches('/').to_owned();
        let host = uri.host().unwrap_or_default();
        let host_header = match uri.port_u16() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_owned(),
        };
        let mut get_headers = HeaderMap::new();
        get_headers.insert(
            HOST,
            HeaderValue::from_str(&host_header).map_err(|e| bad(&plan.target, format!("{e}")))?,
        );
        if let Some(token) = &plan.token {
            get_headers.insert(AUTHORIZATION, authorization(token)?);
        }
        let head = |path: &str, token: Option<&Token>, prefer: Option<String>| {
            let mut head = format!(
                "POST {prefix}{path} HTTP/1.1\r\nhost: {host_header}\r\ncontent-type: application/json\r\n"
            );
            for (name, value) in [
                ("authorization", token.map(Token::header)),
                ("prefer", prefer),
            ] {
                if let Some(value) = value {
                    head.push_str(&format!("{name}: {value}\r\n"));
                }
            }
            head.into_bytes()
        };
        let modes = match plan.mode {
            OrderMode::Mixed => [OrderMode::Wait, OrderMode::RespondAsync],
            mode => [mode, mode],
        };
        let order_heads =
            modes.map(|mode| head("/v1/orders", plan.token.as_ref(), plan.prefer(mode)));
        // The platform has no token of ours; its signature authenticates it.
        let callback_head = head("/v1/payments/standard/notify", None, None);
        Ok(Self {
            url: plan.target.clone(),
            addresses,
            prefix,
            get_headers,
            order_heads,
            callback_head,
        })
    }

    /// The headers of a `GET`.
    pub(super) fn get_headers(&self) -> HeaderMap {
        self.get_headers.clone()
    }

    /// The head of a buyer's `POST /v1/orders` without the key and the length.
    pub(super) fn order_head(&self, buyer: u32) -> &[u8] {
        let [even, odd] = &self.order_heads;
        if buyer.is_multiple_of(2) { even } else { odd }
    }

    /// The head of a callback without the fields of its message.
    pub(super) fn callback_head(&self) -> &[u8] {
        &self.callback_head
    }

    /// The path of a SKU. Ids are visible ASCII, so some of them need escaping.
    pub(super) fn sku_path(&self, sku_id: &str) -> String {
        let mut path = format!("{}/v1/skus/", self.prefix);
        for byte in sku_id.bytes() {
            if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
                path.push(char::from(byte));
            } else {
                path.push_str(&format!("%{byte:02X}"));
            }
        }
        path
    }

    /// The path of the lanes of several nodes.
    pub(super) fn lanes_path(&self) -> String {
        format!("{}/v1/lanes", self.prefix)
    }

    /// The path that waits for an order's outcome.
    pub(super) fn order_path(&self, order_id: u64, wait_s: u64) -> String {
        format!("{}/v1/orders/{order_id}?wait={wait_s}", self.prefix)
    }
}

fn bad(url: &str, reason: String) -> LoadError {
    LoadError::BadTarget {
        url: url.to_owned(),
        reason,
    }
}

/// Reads the URL of a data plane.
fn parse(url: &str) -> Result<Uri, LoadError> {
    let uri: Uri = url
        .trim()
        .parse()
        .map_err(|e: hyper::http::uri::InvalidUri| bad(url, e.to_string()))?;
    match uri.scheme_str() {
        Some("http") => {}
        Some(other) => return Err(bad(url, format!("it is {other}, not http"))),
        None => return Err(bad(url, "it does not begin with http://".to_owned())),
    }
    if uri.host().unwrap_or_default().is_empty() {
        return Err(bad(url, "it names no host".to_owned()));
    }
    if uri.query().is_some() {
        return Err(bad(url, "it has a query".to_owned()));
    }
    Ok(uri)
}

fn address_of(uri: &Uri) -> String {
    let port = uri.port_u16().unwrap_or(80);
    format!("{}:{port}", uri.host().unwrap_or_default())
}

fn authorization(token: &Token) -> Result<HeaderValue, LoadError> {
    let mut value = HeaderValue::from_str(&token.header()).map_err(|_| {
        LoadError::BadPlan("the bearer token has characters that no header can carry".to_owned())
    })?;
    value.set_sensitive(true);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_http_urls_are_taken() {
        for url in [
            "",
            "127.0.0.1:8080",
            "https://a",
            "ftp://a",
            "http://",
            "http://a/?b=c",
        ] {
            assert!(Target::of(&LoadPlan::new(url)).is_err(), "{url}");
        }
        let target = Target::of(&LoadPlan::new("http://[::1]:8080/shop/")).unwrap();
        assert_eq!(target.addresses, ["[::1]:8080"]);
        let starts = |head: &[u8], with: &str| head.starts_with(with.as_bytes());
        assert!(starts(
            target.order_head(1),
            "POST /shop/v1/orders HTTP/1.1\r\nhost: [::1]:8080\r\n"
        ));
        assert!(starts(
            target.callback_head(),
            "POST /shop/v1/payments/standard/notify HTTP/1.1\r\n"
        ));
        assert_eq!(target.sku_path("A/1"), "/shop/v1/skus/A%2F1");
    }
}
