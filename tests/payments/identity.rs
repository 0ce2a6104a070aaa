//! A receipt is worth something only to the database, and for the SKU, that it was made for.

use std::time::Instant;

use millrace::config::{Config, OneOrMany};
use serde_json::{Value, json};

use crate::fixture::{LOOK, PATIENCE};
use crate::support::block_on;
use crate::support::postgres::TestDatabase;
use crate::support::server::TestServer;
use crate::support::webhook::{Paid, SECRET};

/// A shop that sells these, with the key of receipts that every test server has.
async fn open(
    database: &TestDatabase,
    skus: [&str; 2],
    more: impl FnOnce(&mut Config),
) -> TestServer {
    let server = TestServer::start(database, |config| {
        config.payments.standard.secret = OneOrMany(vec![SECRET.to_owned()]);
        config.payments.orphan_check_ms = 100;
        config.payments.orphan_checks = 1;
        more(config);
    })
    .await;
    for sku in skus {
        server.put_sku(sku, 5, Value::Null).await;
    }
    server
}

async fn order(server: &TestServer, sku: &str) -> Value {
    let answer = server.order("u", sku, Some("k")).await;
    assert_eq!(answer.status, 201, "{answer:?}");
    answer.json()
}

/// Delivers a payment and waits until it is decided on: its state, and the reason of its refund.
async fn decided(server: &TestServer, paid: &Paid) -> (String, Value) {
    let answer = paid.deliver(server.data).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let deadline = Instant::now() + PATIENCE;
    loop {
        let list = server
            .control("GET", "/admin/v1/payments", Value::Null)
            .await
            .json();
        let payments = list["payments"].as_array().expect("a list");
        let one = payments
            .iter()
            .find(|one| one["payment_id"] == paid.payment.as_str());
        if let Some(one) = one.filter(|one| one["state"] != "orphan") {
            let state = one["state"].as_str().expect("a word").to_owned();
            return (state, one["refund_reason"].clone());
        }
        assert!(Instant::now() < deadline, "not decided: {list}");
        tokio::time::sleep(LOOK).await;
    }
}

async fn assert_untouched(server: &TestServer, skus: [&str; 2]) {
    for sku in skus {
        assert_eq!(server.stock(sku).await, (5, 0, 0), "{sku}");
    }
    server.assert_audit().await;
}

#[test]
fn a_receipt_of_a_lost_database_makes_no_order_of_another_sku_in_its_successor() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = open(&database, ["PHONE", "CASE"], |_| {}).await;
        let phone = order(&server, "PHONE").await;
        assert!(server.stop().await);
        drop(database);
        // The same numbers, of the other SKUs.
        let database = TestDatabase::create().await;
        let server = open(&database, ["CASE", "PHONE"], |_| {}).await;
        let (state, reason) = decided(&server, &Paid::of(&phone)).await;
        assert_eq!(
            (state.as_str(), reason),
            ("refund_due", json!("receipt_invalid"))
        );
        // Also where the payment names no order, and the receipt would.
        let unnamed = Paid {
            order: "order no. 7".into(),
            ..Paid::of(&phone).again("unnamed")
        };
        let (state, reason) = decided(&server, &unnamed).await;
        assert_eq!(
            (state.as_str(), reason),
            ("refund_due", json!("receipt_invalid"))
        );
        assert_untouched(&server, ["CASE", "PHONE"]).await;
        assert!(server.stop().await);
    });
}

#[test]
fn shops_that_share_a_key_refuse_each_others_receipts() {
    block_on(async {
        let database = TestDatabase::create().await;
        let one = open(&database, ["A", "B"], |_| {}).await;
        let other = open(&database, ["A", "B"], |config| {
            config.database.schema = "another_shop".into();
        })
        .await;
        let of_one = order(&one, "A").await;
        let (state, reason) = decided(&other, &Paid::of(&of_one)).await;
        assert_eq!(
            (state.as_str(), reason),
            ("refund_due", json!("receipt_invalid"))
        );
        assert_untouched(&other, ["A", "B"]).await;
        assert!(other.stop().await && one.stop().await);
    });
}

/// A failover to a standby that lagged loses the SKUs, an operator puts them again in another
/// sequence, and the receipt still finds its own.
#[test]
fn a_receipt_finds_its_sku_where_the_database_numbers_it_anew() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = open(&database, ["PHONE", "CASE"], |_| {}).await;
        let phone = order(&server, "PHONE").await;
        assert!(server.stop().await);
        let lost = "SET search_path = millrace;
            TRUNCATE orders, sku, stock_share, stock_want, stock_log, draws RESTART IDENTITY";
        database.connect().await.batch_execute(lost).await.unwrap();
        let server = open(&database, ["CASE", "PHONE"], |_| {}).await;
        let answer = Paid::of(&phone).deliver(server.data).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        let deadline = Instant::now() + PATIENCE;
        while server.order_as_it_stands("u").await.as_deref() != Some("paid") {
            assert!(Instant::now() < deadline, "not recovered");
            tokio::time::sleep(LOOK).await;
        }
        assert_eq!(server.stock("CASE").await, (5, 0, 0));
        assert_eq!(server.stock("PHONE").await, (4, 0, 1));
        server.assert_audit().await;
        assert!(server.stop().await);
    });
}

/// A failover to a standby that lagged loses the SKUs while the process goes on.
#[test]
fn a_number_that_memory_knows_as_another_sku_stops_the_process() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = open(&database, ["PHONE", "CASE"], |_| {}).await;
        let lost = "SET search_path = millrace;
            TRUNCATE orders, sku, stock_share, stock_want, stock_log, draws RESTART IDENTITY";
        database.connect().await.batch_execute(lost).await.unwrap();
        let body = json!({ "unit_price": 1, "currency": "EUR", "total": 5 });
        let answer = server.control("PUT", "/admin/v1/skus/CABLE", body).await;
        assert_eq!(answer.status, 500, "{answer:?}");
        let reason = server.millrace().poisoned().await;
        assert!(reason.contains("CABLE under number 1"), "{reason}");
        let order = server.order("u", "PHONE", None).await;
        assert_eq!(order.status, 503, "{order:?}");
        assert!(!server.stop().await);
    });
}
