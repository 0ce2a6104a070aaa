//! A small stand-in for Millrace that answers by rule and records every request.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::platform::WebhookSecret;

/// What every order costs.
pub(super) const AMOUNT: i64 = 1000;

/// What the server does beside selling its stock.
#[derive(Debug, Default)]
pub(super) struct Rules {
    /// Units by SKU.
    pub stock: Vec<(&'static str, u64)>,
    /// The order (from 1) that stops everything for a while.
    pub stall: Option<(usize, Duration)>,
    /// Each so-many-th new order is told to be undecided; every other one of them has no row.
    pub undecided_every: Option<u64>,
    /// Each answer ends its connection.
    pub hang_up: bool,
    /// The first request under each key is answered `503`.
    pub refuses_first: bool,
    /// Orders of this user are never answered.
    pub ignored_user: Option<&'static str>,
    /// What every call must carry.
    pub token: Option<&'static str>,
    /// What callbacks must be signed with.
    pub payment_secret: Option<WebhookSecret>,
    /// So many deliveries of each event are answered `503` before one is taken.
    pub callbacks_refused: usize,
    /// Callbacks are never answered.
    pub callbacks_ignored: bool,
    /// Every signature is believed.
    pub credulous: bool,
    /// Orders expire so long after they were placed.
    pub expires_in: Option<Duration>,
}

/// One delivery of a callback as it arrived.
#[derive(Debug, Clone)]
pub(super) struct Callback {
    pub webhook_id: String,
    pub body: Value,
    /// The signature is that of the body.
    pub signed: bool,
    pub status: u16,
    pub at: jiff::Timestamp,
}

/// One order as it arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Seen {
    pub key: Option<String>,
    pub prefer: Option<String>,
    pub body: Bytes,
}

/// A running server; it ends with the test's runtime.
pub(super) struct TestServer {
    pub url: String,
    shop: Arc<Shop>,
}

#[derive(Default)]
struct Shop {
    rules: Rules,
    stalled: tokio::sync::RwLock<()>,
    records: Mutex<Records>,
}

#[derive(Default)]
struct Records {
    taken: HashMap<String, u64>,
    orders: HashMap<(String, String), u64>,
    asked: HashMap<u64, u32>,
    seen: Vec<Seen>,
    callbacks: Vec<Callback>,
}

impl TestServer {
    pub(super) async fn start(rules: Rules) -> Self {
        let shop = Arc::new(Shop {
            rules,
            ..Shop::default()
        });
        let app = Router::new()
            .route("/v1/orders", post(place))
            .route("/v1/orders/{order_id}", get(outcome))
            .route("/v1/skus/{sku_id}", get(sku))
            .route("/v1/payments/standard/notify", post(notify))
            .with_state(Arc::clone(&shop));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self { url, shop }
    }

    /// Every order request, in the order of arrival.
    pub(super) fn seen(&self) -> Vec<Seen> {
        self.shop.records.lock().seen.clone()
    }

    /// Every delivery of a callback, in the order of arrival.
    pub(super) fn callbacks(&self) -> Vec<Callback> {
        self.shop.records.lock().callbacks.clone()
    }

    /// Units of a SKU that were ordered.
    pub(super) fn taken(&self, sku: &str) -> u64 {
        self.shop
            .records
            .lock()
            .taken
            .get(sku)
            .copied()
            .unwrap_or(0)
    }
}

async fn place(State(shop): State<Arc<Shop>>, headers: HeaderMap, body: Bytes) -> Response {
    if let Some(refusal) = shop.refuse_stranger(&headers) {
        return refusal;
    }
    let text = |name: &str| Some(headers.get(name)?.to_str().ok()?.to_owned());
    let seen = Seen {
        key: text("idempotency-key"),
        prefer: text("prefer"),
        body: body.clone(),
    };
    let order: Value = serde_json::from_slice(&body).unwrap();
    let user = order["user_id"].as_str().unwrap().to_owned();
    let sku = order["sku_id"].as_str().unwrap().to_owned();
    let (number, is_first) = {
        let mut records = shop.records.lock();
        let is_first = records.seen.iter().all(|other| other.key != seen.key);
        records.seen.push(seen.clone());
        (records.seen.len(), is_first)
    };
    if shop.rules.refuses_first && is_first {
        return answer(
            StatusCode::SERVICE_UNAVAILABLE,
            json!({"code": "not_ready"}),
        );
    }
    match shop.rules.stall {
        Some((at, pause)) if at == number => {
            let _closed = shop.stalled.write().await;
            tokio::time::sleep(pause).await;
        }
        _ => drop(shop.stalled.read().await),
    }
    if shop
        .rules
        .ignored_user
        .is_some_and(|ignored| ignored == user)
    {
        std::future::pending::<()>().await;
    }
    let mut response = shop.decide(user, sku, seen.key);
    if shop.rules.hang_up {
        let close = axum::http::HeaderValue::from_static("close");
        response.headers_mut().insert("connection", close);
    }
    response
}

impl Shop {
    fn decide(&self, user: String, sku: String, key: Option<String>) -> Response {
        let mut records = self.records.lock();
        let next = records.orders.len() as u64 + 1;
        let key = key.unwrap_or_else(|| format!("none-{next}"));
        if let Some(order_id) = records.orders.get(&(user.clone(), key.clone())) {
            let body = json!({"order_id": order_id.to_string(), "status": "pending_payment"});
            return answer(StatusCode::OK, body);
        }
        let total = self.total(&sku).unwrap_or(0);
        let taken = records.taken.entry(sku).or_default();
        if *taken == total {
            let body = json!({"status": 409, "code": "sold_out", "available": 0});
            return answer(StatusCode::CONFLICT, body);
        }
        *taken += 1;
        records.orders.insert((user, key), next);
        match self.rules.undecided_every {
            Some(every) if next.is_multiple_of(every) => {
                let body = json!({"order_id": next.to_string(), "status": "undecided"});
                answer(StatusCode::ACCEPTED, body)
            }
            _ => {
                let mut body = json!({"order_id": next.to_string(), "status": "pending_payment",
                    "amount": AMOUNT, "currency": "EUR", "receipt": format!("r-{next}")});
                if let Some(expires_in) = self.rules.expires_in {
                    body["expires_at"] = (jiff::Timestamp::now() + expires_in).to_string().into();
                }
                answer(StatusCode::CREATED, body)
            }
        }
    }

    fn total(&self, sku: &str) -> Option<u64> {
        let mut stock = self.rules.stock.iter();
        stock.find(|(id, _)| *id == sku).map(|(_, total)| *total)
    }

    fn refuse_stranger(&self, headers: &HeaderMap) -> Option<Response> {
        let token = self.rules.token?;
        let given = headers.get("authorization").and_then(|v| v.to_str().ok());
        (given != Some(&format!("Bearer {token}")))
            .then(|| answer(StatusCode::UNAUTHORIZED, json!({"code": "unauthorized"})))
    }
}

/// Takes a payment as the contract says, or as the rules do.
async fn notify(State(shop): State<Arc<Shop>>, headers: HeaderMap, body: Bytes) -> Response {
    let text = |name: &str| headers.get(name).and_then(|v| v.to_str().ok());
    let (Some(webhook_id), Some(timestamp_s), Some(signature)) = (
        text("webhook-id"),
        text("webhook-timestamp").and_then(|s| s.parse::<i64>().ok()),
        text("webhook-signature"),
    ) else {
        return answer(StatusCode::BAD_REQUEST, json!({"code": "bad_request"}));
    };
    let secret = shop.rules.payment_secret.as_ref().unwrap();
    let signer = secret.signer().unwrap();
    let fresh = (jiff::Timestamp::now().as_second() - timestamp_s).abs() <= 300;
    let signed = fresh && signer.sign(webhook_id, timestamp_s, &body) == signature;
    let status = {
        let mut records = shop.records.lock();
        let before = records
            .callbacks
            .iter()
            .filter(|c| c.webhook_id == webhook_id);
        let status = if !signed && !shop.rules.credulous {
            StatusCode::UNAUTHORIZED
        } else if before.count() < shop.rules.callbacks_refused {
            StatusCode::SERVICE_UNAVAILABLE
        } else {
            StatusCode::OK
        };
        records.callbacks.push(Callback {
            webhook_id: webhook_id.to_owned(),
            body: serde_json::from_slice(&body).unwrap(),
            signed,
            status: status.as_u16(),
            at: jiff::Timestamp::now(),
        });
        status
    };
    if shop.rules.callbacks_ignored {
        std::future::pending::<()>().await;
    }
    answer(status, json!({}))
}

/// The first question about an order finds it still undecided.
async fn outcome(State(shop): State<Arc<Shop>>, Path(order_id): Path<u64>) -> Response {
    let mut records = shop.records.lock();
    let asked = records.asked.entry(order_id).or_default();
    *asked += 1;
    let every = shop.rules.undecided_every.unwrap_or(1);
    if *asked == 1 {
        let body = json!({"order_id": order_id.to_string(), "status": "undecided"});
        answer(StatusCode::OK, body)
    } else if (order_id / every).is_multiple_of(2) {
        answer(StatusCode::NOT_FOUND, json!({"code": "unknown_order"}))
    } else {
        let body = json!({"order_id": order_id.to_string(), "status": "pending_payment"});
        answer(StatusCode::OK, body)
    }
}

async fn sku(
    State(shop): State<Arc<Shop>>,
    headers: HeaderMap,
    Path(sku): Path<String>,
) -> Response {
    if let Some(refusal) = shop.refuse_stranger(&headers) {
        return refusal;
    }
    match shop.total(&sku) {
        None => answer(StatusCode::NOT_FOUND, json!({"code": "unknown_sku"})),
        Some(total) => {
            let held = shop.records.lock().taken.get(&sku).copied().unwrap_or(0);
            let body = json!({"sku_id": sku, "title": format!("The {sku}"), "total": total,
                "free": total - held, "held": held, "sold": 0, "state": "open"});
            answer(StatusCode::OK, body)
        }
    }
}

fn answer(status: StatusCode, body: Value) -> Response {
    (status, body.to_string()).into_response()
}
