//! A whole Millrace in the test's own process, on a database of its own.

use std::net::SocketAddr;

use millrace::app::Millrace;
use millrace::app::nodes::NodeParts;
use millrace::config::Config;
use serde_json::{Value, json};

use super::http::{Answer, call};
use super::postgres::{TestDatabase, test_dir};

/// What the tests' receipts are signed with.
pub const RECEIPT_KEY: &str = "a key that the tests sign receipts with";

/// A running Millrace.
pub struct TestServer {
    /// Where the shop's backend calls.
    pub data: SocketAddr,
    /// Where operators call.
    pub control: SocketAddr,
    millrace: Millrace,
    _data_dir: tempfile::TempDir,
}

impl TestServer {
    /// Starts one on `database`, with settings changed by `configure`.
    pub async fn start(database: &TestDatabase, configure: impl FnOnce(&mut Config)) -> Self {
        Self::start_at(database.url(), configure).await
    }

    /// The same as a node of a cluster.
    pub async fn start_node(
        database: &TestDatabase,
        configure: impl FnOnce(&mut Config),
        node: NodeParts,
    ) -> Self {
        Self::start_as(database.url(), configure, Some(node)).await
    }

    /// The same on whatever `url` leads to.
    pub async fn start_at(url: String, configure: impl FnOnce(&mut Config)) -> Self {
        Self::start_as(url, configure, None).await
    }

    async fn start_as(
        url: String,
        configure: impl FnOnce(&mut Config),
        node: Option<NodeParts>,
    ) -> Self {
        let data_dir = test_dir();
        let mut config = Config {
            data_dir: data_dir.path().to_path_buf(),
            ..Config::default()
        };
        config.database.url = url;
        config.data_plane.listen.set_port(0);
        config.control_plane.listen.set_port(0);
        // The same in every process of a test, as in a shop.
        config.receipt.key.0 = vec![RECEIPT_KEY.to_owned()];
        configure(&mut config);
        let millrace = Millrace::start_as(config, node)
            .await
            .expect("start Millrace");
        TestServer {
            data: millrace.data_plane,
            control: millrace.control_plane,
            millrace,
            _data_dir: data_dir,
        }
    }

    /// Drains it and says whether nothing was left over.
    pub async fn stop(self) -> bool {
        self.millrace.drain().await
    }

    /// The server itself.
    pub fn millrace(&self) -> &Millrace {
        &self.millrace
    }

    /// Sends a request to the control plane.
    pub async fn control(&self, method: &str, target: &str, body: Value) -> Answer {
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        request(self.control, method, target, &[], body).await
    }

    /// Puts a SKU on sale with these units and whatever `more` sets.
    pub async fn put_sku(&self, sku_id: &str, total: u32, more: Value) {
        let mut body = json!({ "unit_price": 100, "currency": "EUR", "total": total });
        if let (Some(body), Value::Object(more)) = (body.as_object_mut(), more) {
            body.extend(more);
        }
        let answer = self
            .control("PUT", &format!("/admin/v1/skus/{sku_id}"), body)
            .await;
        assert!((200..300).contains(&answer.status), "{answer:?}");
    }

    /// Sends an order.
    pub async fn order(&self, user_id: &str, sku_id: &str, key: Option<&str>) -> Answer {
        self.post(json!({ "user_id": user_id, "sku_id": sku_id }), key, &[])
            .await
    }

    /// Sends an order with every part chosen.
    pub async fn post(&self, body: Value, key: Option<&str>, more: &[(&str, &str)]) -> Answer {
        let mut fields = vec![("Content-Type", "application/json")];
        fields.extend(key.map(|key| ("Idempotency-Key", key)));
        fields.extend_from_slice(more);
        request(self.data, "POST", "/v1/orders", &fields, body.to_string()).await
    }

    /// Asks the data plane.
    pub async fn get(&self, target: &str) -> Answer {
        request(self.data, "GET", target, &[], String::new()).await
    }

    /// The status of the one order that a user has, where there is one.
    pub async fn order_as_it_stands(&self, user_id: &str) -> Option<String> {
        let list = self
            .get(&format!("/v1/users/{user_id}/orders"))
            .await
            .json();
        let orders = list["orders"].as_array().cloned().unwrap_or_default();
        assert!(orders.len() <= 1, "{user_id} has {orders:?}");
        orders
            .first()
            .and_then(|order| order["status"].as_str())
            .map(str::to_owned)
    }

    /// A metric without labels.
    pub async fn metric(&self, name: &str) -> f64 {
        let text = self.control("GET", "/metrics", Value::Null).await.body;
        let text = String::from_utf8(text).expect("text");
        let mut lines = text.lines();
        let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        let value = value.unwrap_or_else(|| panic!("no metric {name}"));
        value.parse().expect("a number")
    }

    /// A SKU's counters: free, held, sold.
    pub async fn stock(&self, sku_id: &str) -> (u64, u64, u64) {
        let sku = self.get(&format!("/v1/skus/{sku_id}")).await.json();
        let units = |name: &str| sku[name].as_u64().unwrap_or(u64::MAX);
        assert_eq!(
            units("total"),
            units("free") + units("held") + units("sold"),
            "I2 in every answer: {sku}"
        );
        (units("free"), units("held"), units("sold"))
    }

    /// Asserts that every promise holds, live counters included.
    pub async fn assert_audit(&self) {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        loop {
            let audit = self
                .control("GET", "/admin/v1/audit", Value::Null)
                .await
                .json();
            assert_eq!(audit["ok"], true, "{audit:#}");
            if audit["orders_in_flight"] == 0 {
                return;
            }
            assert!(
                std::time::Instant::now() < deadline,
                "still in flight: {audit:#}"
            );
        }
    }
}

/// Sends a request from a thread that may block.
pub async fn request(
    address: SocketAddr,
    method: &str,
    target: &str,
    fields: &[(&str, &str)],
    body: String,
) -> Answer {
    let (method, target) = (method.to_owned(), target.to_owned());
    let fields: Vec<(String, String)> = fields
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect();
    tokio::task::spawn_blocking(move || {
        let fields: Vec<(&str, &str)> = fields
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        call(address, &method, &target, &fields, &body)
    })
    .await
    .expect("the request's thread")
}
