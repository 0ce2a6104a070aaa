//! A shop with a payment platform.

use std::time::{Duration, Instant};

use millrace::config::{Config, OneOrMany};
use serde_json::{Value, json};

use crate::support::http::Answer;
use crate::support::postgres::TestDatabase;
use crate::support::server::TestServer;
use crate::support::webhook::{Paid, SECRET};

/// How long anything may take.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// How soon a condition is looked at again. Each look is a connection of its own.
pub const LOOK: Duration = Duration::from_millis(5);

/// A shop that sells `A`, at 100 EUR cents.
pub struct Shop {
    pub database: TestDatabase,
    pub server: TestServer,
}

impl Shop {
    /// Opens it with so many units.
    pub async fn open(total: u32, configure: impl FnOnce(&mut Config)) -> Self {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |config| {
            config.payments.standard.secret = OneOrMany(vec![SECRET.to_owned()]);
            config.payments.orphan_check_ms = 100;
            config.payments.orphan_checks = 2;
            configure(config);
        })
        .await;
        server.put_sku("A", total, Value::Null).await;
        Shop { database, server }
    }

    /// A placed order, as its answer has it.
    pub async fn order(&self, user: &str) -> Value {
        let answer = self.server.order(user, "A", Some("k")).await;
        assert_eq!(answer.status, 201, "{answer:?}");
        answer.json()
    }

    /// Delivers a payment, which has to be answered with success.
    pub async fn pay(&self, paid: &Paid) {
        let answer = paid.deliver(self.server.data).await;
        assert_eq!(answer.status, 200, "{answer:?}");
    }

    /// The order as it stands.
    pub async fn look(&self, order: &Value) -> Value {
        let id = order["order_id"].as_str().expect("an order");
        self.server.get(&format!("/v1/orders/{id}")).await.json()
    }

    /// Waits until an order stands at `status`.
    pub async fn until(&self, order: &Value, status: &str) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let found = self.look(order).await;
            if found["status"] == status {
                return found;
            }
            assert!(Instant::now() < deadline, "not {status}: {found}");
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Waits until a SKU's counters are `free, held, sold`.
    pub async fn until_stock(&self, wanted: (u64, u64, u64)) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let stock = self.server.stock("A").await;
            if stock == wanted {
                return;
            }
            assert!(Instant::now() < deadline, "{stock:?}, not {wanted:?}");
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Where the money is: count of matched, orphan, refund due and refunded.
    pub async fn money(&self) -> [i64; 4] {
        let audit = self.control("GET", "/admin/v1/audit", Value::Null).await;
        let payments = audit.json()["payments"].clone();
        let count = |state: &str| payments[state]["count"].as_i64().expect("a count");
        let counts = ["matched", "orphan", "refund_due", "refunded"].map(count);
        assert_eq!(counts.iter().sum::<i64>(), count("received"), "I7");
        counts
    }

    /// Messages of the platform that were stored.
    pub async fn events(&self) -> i64 {
        let client = self.database.connect().await;
        let count = "SELECT count(*) FROM millrace.payment_events";
        client.query_one(count, &[]).await.expect("a count").get(0)
    }

    /// Waits until the money is where it is wanted.
    pub async fn until_money(&self, wanted: [i64; 4]) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let money = self.money().await;
            if money == wanted {
                return;
            }
            assert!(Instant::now() < deadline, "{money:?}, not {wanted:?}");
            tokio::time::sleep(LOOK).await;
        }
    }

    /// The open payments, as operators see them.
    pub async fn open_payments(&self, list: &str) -> Vec<Value> {
        let answer = self.control("GET", list, Value::Null).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.json()["payments"]
            .as_array()
            .expect("a list")
            .clone()
    }

    /// Asks the control plane.
    pub async fn control(&self, method: &str, target: &str, body: Value) -> Answer {
        self.server.control(method, target, body).await
    }

    /// Records that an order's money went back, under `reference`.
    pub async fn refunded(&self, order: &Value, reference: &str, restock: bool) -> Answer {
        let id = order["order_id"].as_str().expect("an order");
        let target = format!("/admin/v1/orders/{id}/refunded");
        let body = json!({ "reference": reference, "restock": restock });
        self.control("POST", &target, body).await
    }

    /// Audits, and stops it with nothing left over.
    pub async fn close(self) {
        self.server.assert_audit().await;
        assert!(self.server.stop().await, "something was left over");
    }
}
