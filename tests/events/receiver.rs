//! A receiver of webhooks that answers as the test says, and a shop that sends to it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Bytes;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use millrace::config::{Config, EventSink, OneOrMany};
use serde_json::{Value, json};

use crate::support::http::Answer;
use crate::support::postgres::TestDatabase;
use crate::support::server::TestServer;
use crate::support::waiting::{wait_until, wait_until_within};
use crate::support::webhook;

/// Longest wait for a slot.
pub const SLOT: Duration = Duration::from_secs(120);

/// The secrets that the receiver knows.
pub const SECRETS: [&str; 2] = [
    "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
    "bmV3LXNlY3JldC1vZi10aGUtcmVjZWl2ZXItMQ==",
];

/// A message that came in.
#[derive(Clone, Debug)]
pub struct Heard {
    /// The header `webhook-id`.
    pub id: String,
    /// Every header that signs, and `traceparent`; empty if it is not there.
    pub headers: HashMap<String, String>,
    /// The body as it came.
    pub body: String,
    /// The body.
    pub event: Value,
    /// What it was answered.
    pub answer: u16,
}

impl Heard {
    /// Its type.
    pub fn kind(&self) -> &str {
        self.event["type"].as_str().unwrap_or_default()
    }

    /// Its order.
    pub fn order(&self) -> &str {
        self.event["data"]["order_id"].as_str().unwrap_or_default()
    }
}

type Script = Box<dyn Fn(&Value, usize) -> u16 + Send + Sync>;

struct Shared {
    heard: Mutex<Vec<Heard>>,
    /// Messages by their id, so that a long run costs no search.
    counts: Mutex<HashMap<String, usize>>,
    keeps: AtomicBool,
    script: Mutex<Script>,
}

/// A receiver.
#[derive(Clone)]
pub struct Receiver {
    /// Where it listens.
    pub address: SocketAddr,
    shared: Arc<Shared>,
}

impl Receiver {
    /// One that takes everything.
    pub async fn start() -> Self {
        let shared = Arc::new(Shared {
            heard: Mutex::default(),
            counts: Mutex::default(),
            keeps: AtomicBool::new(true),
            script: Mutex::new(Box::new(|_, _| 204)),
        });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .expect("a port");
        let address = listener.local_addr().expect("its address");
        let router = axum::Router::new()
            .fallback(take)
            .with_state(Arc::clone(&shared));
        tokio::spawn(async move { axum::serve(listener, router).await });
        Receiver { address, shared }
    }

    /// Answers from now on with the status that `script` finds for an event, of which so many messages came before.
    pub fn answer(&self, script: impl Fn(&Value, usize) -> u16 + Send + Sync + 'static) {
        *self.shared.script.lock().expect("no panic") = Box::new(script);
    }

    /// From now on messages go to the script alone, for a run that has too many of them to keep.
    pub fn keep_nothing(&self) {
        self.shared.keeps.store(false, Ordering::Relaxed);
    }

    /// Every message so far.
    pub fn heard(&self) -> Vec<Heard> {
        self.shared.heard.lock().expect("no panic").clone()
    }

    /// Messages that were answered with success.
    pub fn taken(&self) -> Vec<Heard> {
        let taken = |heard: &Heard| (200..300).contains(&heard.answer);
        self.heard().into_iter().filter(taken).collect()
    }

    /// The ids of an order's events that were taken, in the order of their first delivery.
    pub fn ids_of(&self, order: &str) -> Vec<String> {
        let mut ids: Vec<String> = Vec::new();
        for heard in self.taken() {
            if heard.order() == order && !ids.contains(&heard.id) {
                ids.push(heard.id);
            }
        }
        ids
    }

    /// Waits until an event of this type about an order was taken.
    pub async fn until(&self, kind: &str, order: &str) -> Heard {
        let find = || {
            let mut taken = self.taken().into_iter();
            taken.find(|heard| heard.kind() == kind && heard.order() == order)
        };
        wait_until(&format!("{kind} of {order}"), async || find().is_some()).await;
        find().expect("it was there")
    }

    /// The settings of a sink that sends to it.
    pub fn sink(&self) -> EventSink {
        EventSink {
            url: format!("http://{}/events", self.address),
            secret: OneOrMany(SECRETS.map(str::to_owned).to_vec()),
            ..EventSink::default()
        }
    }
}

async fn take(
    axum::extract::State(shared): axum::extract::State<Arc<Shared>>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let field = |name: &str| {
        let value = headers.get(name).and_then(|value| value.to_str().ok());
        value.unwrap_or_default().to_owned()
    };
    let event: Value = serde_json::from_slice(&body).expect("a message is JSON");
    let id = field("webhook-id");
    assert_eq!(event["id"], id.as_str());
    assert_eq!(field("content-type"), "application/json");
    let mut heard = shared.heard.lock().expect("no panic");
    let before = {
        let mut counts = shared.counts.lock().expect("no panic");
        let count = counts.entry(id.clone()).or_default();
        *count += 1;
        *count - 1
    };
    let answer = (shared.script.lock().expect("no panic"))(&event, before);
    let names = [
        "webhook-id",
        "webhook-timestamp",
        "webhook-signature",
        "traceparent",
    ];
    if shared.keeps.load(Ordering::Relaxed) {
        heard.push(Heard {
            headers: names.map(|name| (name.to_owned(), field(name))).into(),
            body: String::from_utf8(body.to_vec()).expect("UTF-8"),
            id,
            event,
            answer,
        });
    }
    let status = StatusCode::from_u16(answer).expect("a status");
    (status, [(header::LOCATION, "/elsewhere")]).into_response()
}

/// A shop that sells `A` at 100 EUR cents, with the receiver as its sink `shop`.
pub struct Shop {
    /// Its database.
    pub database: TestDatabase,
    /// Its server.
    pub server: TestServer,
    /// The receiver.
    pub receiver: Receiver,
}

impl Shop {
    /// Opens it.
    pub async fn open(configure: impl FnOnce(&mut Config)) -> Self {
        let database = TestDatabase::create().await;
        let receiver = Receiver::start().await;
        let server = Self::serve(&database, &receiver, configure).await;
        server.put_sku("A", 1_000_000, Value::Null).await;
        let shop = Shop {
            database,
            server,
            receiver,
        };
        shop.until_it_listens(1).await;
        shop
    }

    /// A server of it.
    pub async fn serve(
        database: &TestDatabase,
        receiver: &Receiver,
        configure: impl FnOnce(&mut Config),
    ) -> TestServer {
        let sink = receiver.sink();
        TestServer::start(database, |config| {
            config.payments.standard.secret = OneOrMany(vec![webhook::SECRET.to_owned()]);
            config.payments.orphan_check_ms = 100;
            config.payments.orphan_checks = 2;
            config.events.sinks.insert("shop".to_owned(), sink);
            configure(config);
        })
        .await
    }

    /// Waits until there are so many slots: events begin with them. PostgreSQL makes one once every transaction that is open in
    /// any database of the server has ended, those of other tests too.
    pub async fn until_it_listens(&self, sinks: usize) {
        let client = self.database.connect().await;
        wait_until_within("the slot", SLOT, async || {
            let sql = "SELECT FROM pg_replication_slots WHERE database = current_database() AND confirmed_flush_lsn IS NOT NULL";
            client.query(sql, &[]).await.expect("the slots").len() >= sinks
        })
        .await;
    }

    /// A placed order.
    pub async fn order(&self, user: &str) -> Value {
        let body = json!({ "user_id": user, "sku_id": "A", "attributes": { "gift": true } });
        let answer = self.server.post(body, Some("k"), &[]).await;
        assert_eq!(answer.status, 201, "{answer:?}");
        answer.json()
    }

    /// Asks the control plane.
    pub async fn admin(&self, method: &str, target: &str) -> Answer {
        self.server.control(method, target, Value::Null).await
    }

    /// Stops the server and drops the slots: the test's database cannot be dropped before.
    pub async fn close(self) {
        assert!(self.server.stop().await);
        drop_slots(&self.database).await;
    }
}

/// Drops the slots of a test's database.
pub async fn drop_slots(database: &TestDatabase) {
    let client = database.connect().await;
    wait_until("the slots are free", async || {
        let sql = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = current_database()";
        client.execute(sql, &[]).await.is_ok()
    })
    .await;
}

/// The id of an order.
pub fn id(order: &Value) -> String {
    order["order_id"].as_str().expect("an order").to_owned()
}
