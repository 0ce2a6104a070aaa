//! Answers about payments, to platforms and to operators, held against the document.

use millrace::http::data_plane::payments::providers::CallbackError;
use millrace::http::message::Response;
use millrace::order::payment::{PaymentState, Provider, RefundReason};
use millrace::order::{OrderId, OrderStatus};
use serde_json::{Value, json};

use super::fixture::{Callback, PROVIDERS, Told};
use super::{Checker, JSON, OPS, SHOP, document};
use crate::support::http::Answer;
use crate::support::postgres::TestDatabase;
use crate::support::server::{TestServer, request};
use crate::support::webhook::{Paid, deliver};

const NOTIFY: &str = "/v1/payments/{provider}/notify";
const PAYMENTS: &str = "/admin/v1/payments";
const ORPHANS: &str = "/admin/v1/orphan-payments";
const ORPHAN: &str = "/admin/v1/orphan-payments/{id}";
const RETRY: &str = "/admin/v1/orphan-payments/{id}/retry";
const CLOSE: &str = "/admin/v1/orphan-payments/{id}/close";
const REFUNDED: &str = "/admin/v1/orders/{order_id}/refunded";
const ORDER: &str = "/v1/orders/{order_id}";
const HISTORY: &str = "/admin/v1/orders/{order_id}";
const OF_USER: &str = "/admin/v1/users/{user_id}/orders";
const LIST: &str = "/v1/users/{user_id}/orders";
const CANCEL: &str = "/v1/orders/{order_id}/cancel";

#[test]
fn its_words_are_those_of_the_code() {
    let document = document();
    let words = |schema: &Value| -> Vec<String> {
        serde_json::from_value(schema["enum"].clone()).expect("words")
    };
    let schemas = &document["components"]["schemas"];
    let all = |words: &[&'static str]| -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    };
    let states: Vec<_> = PaymentState::ALL.iter().map(|one| one.as_str()).collect();
    assert_eq!(words(&schemas["PaymentState"]), all(&states));
    let reasons: Vec<_> = RefundReason::ALL.iter().map(|one| one.as_str()).collect();
    assert_eq!(words(&schemas["RefundReason"]), all(&reasons));
    let providers: Vec<_> = Provider::ALL.iter().map(|one| one.as_str()).collect();
    assert_eq!(words(&schemas["Provider"]), all(&providers));
    let mut statuses = all(&OrderStatus::ALL.map(OrderStatus::as_str));
    statuses.sort();
    let line = &schemas["BatchVerdict"]["oneOf"][0];
    for order in [&schemas["Order"], line, &schemas["RefundRecorded"]] {
        let mut documented = words(&order["properties"]["status"]);
        documented.sort();
        assert_eq!(documented, statuses);
    }
}

#[test]
fn what_each_platform_is_told_is_what_it_says() {
    let mut checker = Checker::new();
    let errors = [
        CallbackError::BadSignature("it has no sign"),
        CallbackError::SignatureProbe,
        CallbackError::Stale { off_s: 301 },
        CallbackError::NotForUs("app_id"),
        CallbackError::Malformed("it has no type".into()),
        CallbackError::Unbookable("it has no data".into()),
        CallbackError::NotStored,
    ];
    for provider in Provider::ALL {
        let provider = PROVIDERS.get(*provider).expect("configured");
        let mut response = Response::default();
        response.clear();
        provider.accept(&mut response);
        checker.check("POST", NOTIFY, &as_answer(&response));
        for error in &errors {
            response.clear();
            provider.refuse(&mut response, error);
            checker.check("POST", NOTIFY, &as_answer(&response));
        }
    }
    for status in [200, 400, 401, 503] {
        assert!(checker.seen.contains(&format!("POST {NOTIFY} {status}")));
    }
}

fn as_answer(response: &Response) -> Answer {
    let fields = response.fields().lines();
    let fields = fields.filter_map(|line| line.split_once(": "));
    Answer {
        status: response.status(),
        fields: fields
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect(),
        body: response.body().to_vec(),
    }
}

/// Asks, and holds the answer against the document.
struct Asker<'a> {
    server: &'a TestServer,
    checker: &'a mut Checker,
}

impl Asker<'_> {
    async fn ask(
        &mut self,
        (method, path): (&str, &str),
        name: &str,
        query: &str,
        body: String,
        status: u16,
    ) -> Answer {
        let (address, token) = if path.starts_with("/v1/") {
            (self.server.data, SHOP)
        } else {
            (self.server.control, OPS)
        };
        let target = match path.find('{').zip(path.find('}')) {
            Some((from, to)) => format!("{}{name}{}", &path[..from], &path[to + 1..]),
            None => path.to_owned(),
        };
        let target = format!("{target}{query}");
        let answer = request(address, method, &target, &[token, JSON], body).await;
        assert_eq!(answer.status, status, "{method} {target}: {answer:?}");
        self.checker.check(method, path, &answer);
        answer
    }

    async fn get(&mut self, path: &str, name: &str, query: &str, status: u16) -> Value {
        let answer = self
            .ask(("GET", path), name, query, String::new(), status)
            .await;
        answer.json()
    }

    async fn post(&mut self, path: &str, name: &str, body: Value, status: u16) -> Answer {
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        self.ask(("POST", path), name, "", body, status).await
    }

    /// A new order of `user`, which has a receipt.
    async fn order(&mut self, user: &str, prefer: &str) -> Value {
        let body = json!({ "user_id": user, "sku_id": "P" }).to_string();
        let fields = [SHOP, JSON, ("Prefer", prefer), ("Idempotency-Key", "k")];
        let answer = request(self.server.data, "POST", "/v1/orders", &fields, body).await;
        self.checker.check("POST", "/v1/orders", &answer);
        let order = answer.json();
        assert!(order["receipt"].is_string(), "{answer:?}");
        order
    }

    /// A delivery by a platform, and what it is told.
    async fn pay(&mut self, paid: &Paid, status: u16) {
        let answer = paid.deliver(self.server.data).await;
        self.told(&answer, status);
    }

    fn told(&mut self, answer: &Answer, status: u16) {
        assert_eq!(answer.status, status, "{answer:?}");
        self.checker.check("POST", NOTIFY, answer);
    }

    /// What the fixture has signed, over the wire.
    async fn send(&mut self, callback: &Callback, status: u16) -> Answer {
        let fields: Vec<_> = callback
            .headers
            .iter()
            .map(|(name, value)| (name.as_str(), std::str::from_utf8(value).expect("ASCII")))
            .collect();
        let target = NOTIFY.replace("{provider}", callback.provider.as_str());
        let body = String::from_utf8(callback.body.clone()).expect("UTF-8");
        let answer = request(self.server.data, "POST", &target, &fields, body).await;
        self.told(&answer, status);
        answer
    }
}

fn id(order: &Value) -> String {
    order["order_id"].as_str().expect("an order").to_owned()
}

/// Everything about payments that a running Millrace answers.
pub async fn check(server: &TestServer, database: &TestDatabase, checker: &mut Checker) {
    let mut shop = Asker { server, checker };
    let terms = json!({ "unit_price": 100, "currency": "EUR", "total": 20 }).to_string();
    shop.ask(("PUT", "/admin/v1/skus/{sku_id}"), "P", "", terms, 201)
        .await;
    platforms(&mut shop).await;

    // A receipt with every order, alone or on a line; a reason with those whose money goes back.
    let accepted = shop.order("payer-0", "respond-async").await;
    shop.get(ORDER, &id(&accepted), "?wait=5", 200).await;
    let line = json!({ "user_id": "payer-1", "sku_id": "P" });
    let batch = shop.post("/v1/orders:batch", "", line, 200).await;
    assert!(batch.json()["receipt"].is_string(), "{batch:?}");
    let paid = shop.order("payer-2", "wait=5").await;
    shop.pay(&Paid::of(&paid), 200).await;
    assert_eq!(shop.get(ORDER, &id(&paid), "", 200).await["status"], "paid");
    shop.post(CANCEL, &id(&paid), Value::Null, 409).await;
    let late = shop.order("payer-3", "wait=5").await;
    let cancelled = shop.post(CANCEL, &id(&late), Value::Null, 200).await.json();
    assert_eq!(cancelled["receipt"], late["receipt"]);
    shop.pay(&Paid::of(&late), 200).await;
    let listed = shop.get(LIST, "payer-3", "", 200).await["orders"][0].clone();
    let replayed = shop.order("payer-3", "wait=5").await;
    for seen in [listed, replayed, shop.get(ORDER, &id(&late), "", 200).await] {
        assert_eq!(seen["status"], "refund_due", "{seen}");
        assert_eq!(seen["refund_reason"], "order_cancelled", "{seen}");
        assert_eq!(seen["receipt"], late["receipt"], "{seen}");
    }

    // The lists.
    let list = shop
        .get(PAYMENTS, "", "?state=refund_due&limit=1", 200)
        .await;
    assert_eq!(list["payments"][0]["order_id"], late["order_id"]);
    let query = format!("?before={}", list["next_before"]);
    shop.get(PAYMENTS, "", &query, 200).await;
    shop.get(PAYMENTS, "", "?state=matched", 200).await;
    for path in [PAYMENTS, ORPHANS] {
        for query in ["?state=lost", "?limit=0", "?before=0", "?before=x"] {
            shop.get(path, "", query, 400).await;
        }
        let answer = request(server.control, "GET", path, &[], String::new()).await;
        assert_eq!(answer.status, 401, "{answer:?}");
        shop.checker.check("GET", path, &answer);
    }

    orphans(&mut shop, database, &paid).await;

    // Refunds.
    let refund = json!({ "reference": "re-1", "note": "by hand", "restock": true });
    shop.post(REFUNDED, &id(&accepted), refund.clone(), 409)
        .await;
    shop.post(REFUNDED, "1", refund.clone(), 404).await;
    shop.post(REFUNDED, "x", refund.clone(), 404).await;
    for body in [json!({}), json!({ "reference": " " }), json!({ "ref": 1 })] {
        shop.post(REFUNDED, &id(&paid), body, 400).await;
    }
    let body = " ".repeat(70_000);
    shop.ask(("POST", REFUNDED), &id(&paid), "", body, 413)
        .await;
    for restocked in [1, 0] {
        let recorded = shop.post(REFUNDED, &id(&paid), refund.clone(), 200).await;
        assert_eq!(recorded.json()["restocked"], restocked, "{recorded:?}");
    }
    let recorded = shop.post(REFUNDED, &id(&late), refund, 200).await;
    histories(&mut shop, &paid, &late).await;
    assert_eq!(recorded.json()["refund_reason"], "order_cancelled");
    let audit = shop.get("/admin/v1/audit", "", "", 200).await;
    assert_eq!(audit["payments"]["refunded"]["amount"]["EUR"], 300);
}

/// Orders as an operator looks them up: one that was paid and then refunded, and one that was cancelled and then paid.
async fn histories(shop: &mut Asker<'_>, paid: &Value, late: &Value) {
    let history = shop.get(HISTORY, &id(paid), "", 200).await;
    assert_eq!(history["order"]["status"], "refunded", "{history:#}");
    assert_eq!(history["place"], "database");
    assert_eq!(history["payments"][0]["reference"], "re-1");
    let event = &history["payment_events"][0];
    assert_eq!(event["kind"], "payment.succeeded");
    let body: Value = serde_json::from_str(event["body"].as_str().expect("a body")).expect("JSON");
    assert_eq!(body["data"]["order_id"], paid["order_id"]);
    let entry = &history["stock_log"][0];
    assert_eq!(entry["cause"], "restocked after a refund");
    assert_eq!(
        (&entry["sold_delta"], &entry["total_delta"]),
        (&json!(-1), &json!(0))
    );
    let history = shop.get(HISTORY, &id(late), "", 200).await;
    let entry = &history["stock_log"][0];
    assert_eq!(
        (&entry["cause"], &entry["held_delta"]),
        (&json!("cancelled"), &json!(-1))
    );
    // Payments name it, and it is not there.
    let history = shop.get(HISTORY, "123456789", "", 200).await;
    assert_eq!(
        (&history["order"], &history["place"]),
        (&Value::Null, &Value::Null)
    );
    assert_eq!(history["payments"].as_array().map(Vec::len), Some(1));
    shop.get(HISTORY, "1", "", 404).await;
    shop.get(HISTORY, "x", "", 404).await;
    shop.get(HISTORY, &id(paid), "?all=1", 400).await;

    let page = shop.get(OF_USER, "payer-3", "", 200).await;
    assert_eq!(page["orders"][0]["order_id"], late["order_id"]);
    let full = shop.get(OF_USER, "payer-3", "?limit=1", 200).await;
    let query = format!("?before={}", full["next_before"].as_str().expect("more"));
    let rest = shop.get(OF_USER, "payer-3", &query, 200).await;
    assert_eq!(rest["orders"], json!([]));
    assert_eq!(
        shop.get(OF_USER, "nobody", "", 200).await["orders"],
        json!([])
    );
    for query in ["?limit=0", "?limit=101", "?before=x", "?page=2"] {
        shop.get(OF_USER, "payer-3", query, 400).await;
    }
}

/// What is refused of a platform's messages, in its own dialect.
async fn platforms(shop: &mut Asker<'_>) {
    let data = shop.server.data;
    let false_secret = "whsec_b3RoZXItc2VjcmV0LW9mLTI0LWJ5dGVzIQ==";
    let answer = deliver(data, "evt", "{}".into(), false_secret).await;
    shop.told(&answer, 401);
    // They were signed on one day for all, and Alipay does not date its messages.
    for provider in Provider::ALL {
        let callback = Told::with(|told| told.order_ref = json!("nobody's")).by(*provider);
        let status = match provider {
            Provider::Alipay => 200,
            Provider::Standard | Provider::Stripe | Provider::Wechatpay => 400,
        };
        shop.send(&callback, status).await;
        let altered = callback.with(|callback| callback.body.push(b' '));
        let status = match provider {
            Provider::Alipay => 400,
            Provider::Standard | Provider::Stripe | Provider::Wechatpay => 401,
        };
        shop.send(&altered, status).await;
        let large = callback.with(|callback| callback.body.resize(70_000, b' '));
        shop.send(&large, 413).await;
    }
    let target = NOTIFY.replace("{provider}", "nobody");
    let answer = request(data, "POST", &target, &[JSON], "{}".into()).await;
    shop.told(&answer, 404);
}

/// Payments without an order. `other` is somebody's order.
async fn orphans(shop: &mut Asker<'_>, database: &TestDatabase, other: &Value) {
    let lost = shop.order("payer-4", "wait=5").await;
    let lost_id = id(&lost)
        .parse()
        .ok()
        .and_then(OrderId::new)
        .expect("an id");
    let rows = database.connect().await;
    rows.execute(
        "DELETE FROM millrace.orders WHERE order_id = $1",
        &[&lost_id.as_i64()],
    )
    .await
    .expect("lose its row");
    shop.pay(&Paid::of(&lost), 200).await;
    let nobody = Paid {
        order: "123456789".into(),
        receipt: None,
        ..Paid::of(other).again("nobody's")
    };
    shop.pay(&nobody, 200).await;
    // The newest first; Alipay's is the oldest.
    let list = shop.get(ORPHANS, "", "", 200).await["payments"].clone();
    assert_eq!(list.as_array().map(Vec::len), Some(3), "{list:#}");
    assert_eq!(list[0]["order_in_receipt"], Value::Null);
    assert_eq!(list[1]["order_in_receipt"]["user_id"], "payer-4");
    assert_eq!(list[2]["provider"], "alipay");
    let orphan = list[0]["id"].to_string();

    shop.get(ORPHAN, &orphan, "", 200).await;
    shop.get(ORPHAN, "999", "", 404).await;
    shop.post(RETRY, "999", Value::Null, 404).await;
    // Its order is written anew from its receipt.
    let known = list[1]["id"].to_string();
    let recovered = shop.post(RETRY, &known, Value::Null, 200).await.json();
    assert_eq!(recovered["state"], "matched");
    let given_up = shop.post(RETRY, &orphan, Value::Null, 200).await.json();
    assert_eq!(given_up["refund_reason"], "receipt_missing");
    shop.post(RETRY, &orphan, Value::Null, 409).await;

    let note = json!({ "note": "sent back by bank transfer", "reference": "T-1" });
    for body in [json!({}), json!({ "note": "" }), json!({ "text": "x" })] {
        shop.post(CLOSE, &orphan, body, 400).await;
    }
    shop.post(CLOSE, "999", note.clone(), 404).await;
    let body = " ".repeat(70_000);
    shop.ask(("POST", CLOSE), &orphan, "", body, 413).await;
    let closed = shop.post(CLOSE, &orphan, note.clone(), 200).await.json();
    assert_eq!(closed["state"], "refunded");
    shop.post(CLOSE, &orphan, note, 409).await;
}
