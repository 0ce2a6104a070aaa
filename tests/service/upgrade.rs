//! A start on the data and the journal of each release before, killed in the middle of a sale. `tests/upgrade/make.py` has made
//! them with the release's own binary.

use std::path::{Path, PathBuf};

use crate::support::block_on;
use crate::support::postgres::{TestDatabase, test_dir};
use crate::support::server::{TestServer, request};
use crate::support::webhook::{self, Paid};
use millrace::order::UnixMillis;
use serde_json::{Value, json};

/// What the makers' settings were and the tests' have to be: a year, in milliseconds.
const YEAR_MS: u64 = 31_536_000_000;

/// The data of a release, as its process left them.
struct Release {
    directory: PathBuf,
    sale: Value,
}

impl Release {
    fn all() -> Vec<Release> {
        let home = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/upgrade");
        let entries = std::fs::read_dir(home).expect("the releases");
        let directories = entries.map(|entry| entry.expect("an entry").path());
        let mut all: Vec<Release> = directories
            .filter(|directory| directory.is_dir())
            .map(|directory| {
                let sale = std::fs::read(directory.join("sale.json")).expect("its sale");
                let sale = serde_json::from_slice(&sale).expect("JSON");
                Release { directory, sale }
            })
            .collect();
        all.sort_by(|one, other| one.directory.cmp(&other.directory));
        all
    }

    /// The orders whose answers said that they exist, or will.
    fn acknowledged(&self) -> impl Iterator<Item = Acknowledged<'_>> {
        let orders = |name: &str| self.sale[name].as_array().expect("orders").iter();
        orders("rows")
            .chain(orders("in_flight"))
            .map(|order| Acknowledged {
                answer: &order["answer"],
                status: order["status"].as_str().expect("a status"),
                request: &order["request"],
                body: order["body"].as_str().expect("a body"),
                key: order["key"].as_str(),
            })
    }

    async fn restore(&self, database: &TestDatabase) {
        let dump = std::fs::read_to_string(self.directory.join("database.sql")).expect("its rows");
        let client = database.connect().await;
        client.batch_execute(&dump).await.expect("restore its rows");
    }

    /// Puts its journal where the release had it.
    fn lay_journal(&self, data_dir: &Path) {
        let journal = data_dir.join("journal");
        std::fs::create_dir(&journal).expect("make the journal's directory");
        let bytes = self.sale["segment_bytes"].as_u64().expect("a size") as usize;
        for segment in std::fs::read_dir(self.directory.join("journal")).expect("its journal") {
            let segment = segment.expect("a segment");
            let mut content = std::fs::read(segment.path()).expect("its content");
            content.resize(bytes, 0);
            std::fs::write(journal.join(segment.file_name()), content).expect("lay a segment");
        }
    }
}

struct Acknowledged<'a> {
    answer: &'a Value,
    status: &'a str,
    request: &'a Value,
    /// The request's body as it was sent.
    body: &'a str,
    key: Option<&'a str>,
}

impl Acknowledged<'_> {
    fn id(&self) -> &str {
        self.answer["order_id"].as_str().expect("an id")
    }

    /// Whether it can still be paid.
    fn is_in_time(&self) -> bool {
        self.answer["expires_at"].as_str() > Some(UnixMillis::now().to_string().as_str())
    }

    /// The status that the order has to have now, as far as nobody has paid or cancelled it since.
    fn now(&self) -> &str {
        match self.status {
            "accepted" | "pending_payment" if self.is_in_time() => "pending_payment",
            "accepted" | "pending_payment" => "expired",
            status => status,
        }
    }
}

async fn start(release: &Release, database: &TestDatabase, data_dir: &Path) -> TestServer {
    let secret = release.sale["secret"].as_str().expect("a secret");
    let receipt_key = release.sale["receipt_key"].as_str().expect("a key");
    TestServer::start(database, |config| {
        config.data_dir = data_dir.to_owned();
        config.orders.payment_ttl_ms = YEAR_MS;
        config.orders.idempotency_window_ms = YEAR_MS;
        config.payments.standard.secret.0 = vec![secret.to_owned()];
        config.receipt.key.0 = vec![receipt_key.to_owned()];
    })
    .await
}

/// Every acknowledged order is there, once, as it was answered.
async fn assert_all_present(release: &Release, server: &TestServer, database: &TestDatabase) {
    for order in release.acknowledged() {
        let answer = server.get(&format!("/v1/orders/{}", order.id())).await;
        let now = answer.json();
        assert_eq!(answer.status, 200, "{}: {now}", order.answer);
        for member in [
            "order_id",
            "user_id",
            "sku_id",
            "quantity",
            "adjustment",
            "amount",
            "currency",
            "created_at",
            "expires_at",
        ] {
            assert_eq!(now[member], order.answer[member], "{member} of {now}");
        }
        assert_eq!(now["attributes"], order.request["attributes"], "{now}");
        assert_eq!(now["status"], order.now(), "{now}");
    }
    let client = database.connect().await;
    let rows = client
        .query_one("SELECT count(*) FROM millrace.orders", &[])
        .await
        .expect("count its rows");
    assert_eq!(rows.get::<_, i64>(0), release.acknowledged().count() as i64);
}

#[test]
fn every_acknowledged_order_of_a_killed_release_is_there_and_goes_on() {
    for release in Release::all() {
        block_on(goes_on(&release));
    }
}

async fn goes_on(release: &Release) {
    let database = TestDatabase::create().await;
    release.restore(&database).await;
    let data_dir = test_dir();
    release.lay_journal(data_dir.path());

    let server = start(release, &database, data_dir.path()).await;
    assert_all_present(release, &server, &database).await;
    server.assert_audit().await;

    // So are its units, those of the journal among them.
    if release.acknowledged().all(|order| order.is_in_time()) {
        for (sku_id, before) in release.sale["skus"].as_object().expect("its SKUs") {
            let units = |name: &str| before[name].as_u64().expect("a number");
            let counted = (units("free"), units("held"), units("sold"));
            assert_eq!(server.stock(sku_id).await, counted, "{sku_id}");
        }
    }

    // Each key still has its one order.
    for order in release.acknowledged().filter(Acknowledged::is_in_time) {
        let Some(key) = order.key else { continue };
        let fields = [
            ("Content-Type", "application/json"),
            ("Idempotency-Key", key),
        ];
        let body = order.body.to_owned();
        let answer = request(server.data, "POST", "/v1/orders", &fields, body).await;
        assert_eq!(answer.status, 200, "{key}: {answer:?}");
        assert_eq!(answer.field("idempotency-replayed"), Some("true"));
        assert_eq!(answer.json()["order_id"], order.answer["order_id"]);
    }

    // So has the limit its units: two a buyer, of live orders only.
    let phones = release
        .acknowledged()
        .filter(|order| order.request["sku_id"] == "PHONE" && order.now() == "pending_payment");
    for order in phones {
        let mut more = json!({ "user_id": order.request["user_id"], "sku_id": "PHONE" });
        more["quantity"] = json!(3 - order.request["quantity"].as_u64().expect("a number"));
        let answer = server.post(more, None, &[]).await;
        assert_eq!(answer.code(), "purchase_limit", "{answer:?}");
    }

    // A receipt of the release comes back with the money.
    let secret = release.sale["secret"].as_str().expect("a secret");
    let payable = release.acknowledged().filter(|order| {
        matches!(order.status, "accepted" | "pending_payment") && order.is_in_time()
    });
    for order in payable.take(12) {
        let paid = Paid::of(order.answer);
        let answer = webhook::deliver(server.data, &paid.event, paid.body(), secret).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        let now = server.get(&format!("/v1/orders/{}", order.id())).await;
        assert_eq!(now.json()["status"], "paid");
    }

    // New orders lie behind the old ones.
    let answer = server.order("new", "CASE", Some("a-new-key")).await;
    assert_eq!(answer.status, 201, "{answer:?}");
    let number = |order: &Value| -> i64 {
        let id = order["order_id"].as_str().expect("an id");
        id.parse().expect("a number")
    };
    let last = release.acknowledged().map(|order| number(order.answer));
    assert!(Some(number(&answer.json())) > last.max());
    server.assert_audit().await;
    assert!(server.stop().await);

    // Once more, on its own journal.
    let server = start(release, &database, data_dir.path()).await;
    let again = server.order("new", "CASE", Some("a-new-key")).await;
    assert_eq!(again.json()["order_id"], answer.json()["order_id"]);
    server.assert_audit().await;
    assert!(server.stop().await);
}
