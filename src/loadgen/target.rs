//! The target of requests: its address, paths and headers.

use hyper::Uri;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderMap, HeaderName, HeaderValue};

use super::error::LoadError;
use super::plan::{LoadPlan, OrderMode, Token};

/// The base URL in parts, with the headers that every request carries.
#[derive(Debug, Clone)]
pub(super) struct Target {
    /// The URL as it was given, for messages.
    pub url: String,
    /// `host:port` to connect to.
    pub address: String,
    prefix: String,
    get_headers: HeaderMap,
    /// Headers of buyers with even numbers, then of buyers with odd ones.
    order_headers: [HeaderMap; 2],
    callback_headers: HeaderMap,
    /// The path of `POST /v1/orders`, parsed once.
    pub orders: Uri,
    /// The path of the payment platform's callbacks.
    pub callbacks: Uri,
}

impl Target {
    /// Reads the target and the token of a plan.
    pub(super) fn of(plan: &LoadPlan) -> Result<Self, LoadError> {
        let bad = |reason: String| LoadError::BadTarget {
            url: plan.target.clone(),
            reason,
        };
        let uri: Uri = plan
            .target
            .trim()
            .parse()
            .map_err(|e| bad(format!("{e}")))?;
        match uri.scheme_str() {
            Some("http") => {}
            Some(other) => return Err(bad(format!("it is {other}, not http"))),
            None => return Err(bad("it does not begin with http://".to_owned())),
        }
        let host = match uri.host() {
            Some(host) if !host.is_empty() => host,
            _ => return Err(bad("it names no host".to_owned())),
        };
        if uri.query().is_some() {
            return Err(bad("it has a query".to_owned()));
        }
        let port = uri.port_u16().unwrap_or(80);
        let prefix = uri.path().trim_end_matches('/').to_owned();
        let host_header = match uri.port_u16() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_owned(),
        };
        let mut get_headers = HeaderMap::new();
        get_headers.insert(
            HOST,
            HeaderValue::from_str(&host_header).map_err(|e| bad(format!("{e}")))?,
        );
        let json = HeaderValue::from_static("application/json");
        // The platform has no token of ours; its signature authenticates it.
        let mut callback_headers = get_headers.clone();
        callback_headers.insert(CONTENT_TYPE, json.clone());
        if let Some(token) = &plan.token {
            get_headers.insert(AUTHORIZATION, authorization(token)?);
        }
        let mut order_headers = get_headers.clone();
        order_headers.insert(CONTENT_TYPE, json);
        let order_headers = |mode| {
            let mut headers = order_headers.clone();
            let prefer = plan.prefer(mode);
            if let Some(prefer) = prefer.and_then(|text| HeaderValue::from_str(&text).ok()) {
                headers.insert(HeaderName::from_static("prefer"), prefer);
            }
            headers
        };
        let order_headers = match plan.mode {
            OrderMode::Mixed => [OrderMode::Wait, OrderMode::RespondAsync].map(order_headers),
            mode => [mode, mode].map(order_headers),
        };
        let path = |path: &str| {
            let path = format!("{prefix}{path}").parse();
            path.map_err(|e: hyper::http::uri::InvalidUri| bad(format!("{e}")))
        };
        let orders = path("/v1/orders")?;
        let callbacks = path("/v1/payments/standard/notify")?;
        Ok(Self {
            url: plan.target.clone(),
            address: format!("{host}:{port}"),
            prefix,
            get_headers,
            order_headers,
            callback_headers,
            orders,
            callbacks,
        })
    }

    /// The headers of a `GET`.
    pub(super) fn get_headers(&self) -> HeaderMap {
        self.get_headers.clone()
    }

    /// The headers of a buyer's `POST /v1/orders`, all but the key.
    pub(super) fn order_headers(&self, buyer: u32) -> HeaderMap {
        let [even, odd] = &self.order_headers;
        if buyer.is_multiple_of(2) { even } else { odd }.clone()
    }

    /// The headers of a callback, all but those of its message.
    pub(super) fn callback_headers(&self) -> HeaderMap {
        self.callback_headers.clone()
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

    /// The path that waits for an order's outcome.
    pub(super) fn order_path(&self, order_id: u64, wait_s: u64) -> String {
        format!("{}/v1/orders/{order_id}?wait={wait_s}", self.prefix)
    }
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
        assert_eq!(target.address, "[::1]:8080");
        assert_eq!(target.orders.path(), "/shop/v1/orders");
        assert_eq!(target.callbacks.path(), "/shop/v1/payments/standard/notify");
        assert_eq!(target.sku_path("A/1"), "/shop/v1/skus/A%2F1");
    }
}
