//! An operator's changes whose COMMIT is not answered: memory and database agree again by themselves,
//! whatever came of them.

use std::time::{Duration, Instant};

use crate::support::block_on;
use crate::support::http::Answer;
use crate::support::postgres::TestDatabase;
use crate::support::proxy::{Cut, Proxy};
use crate::support::server::TestServer;
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(30);

/// The COMMIT is lost, its answer is, or it arrives after its sender has given up.
const CUTS: [Cut; 4] = [
    Cut::Before,
    Cut::After,
    Cut::AfterInSilence,
    Cut::Late(Duration::from_millis(1_700)),
];

struct Shop {
    database: TestDatabase,
    proxy: Proxy,
    server: TestServer,
}

impl Shop {
    /// Sells 10 of `A`, through a proxy that can cut.
    async fn open() -> Self {
        let database = TestDatabase::create().await;
        let config = database.config();
        let proxy = Proxy::start(&config).await;
        let (user, name) = (config.get_user().unwrap(), config.get_dbname().unwrap());
        let server = TestServer::start_at(proxy.url(user, name), |config| {
            config.database.step_timeout_ms = 1_500;
        })
        .await;
        server.put_sku("A", 10, Value::Null).await;
        Shop {
            database,
            proxy,
            server,
        }
    }

    /// Sends an operator's request whose commit is cut.
    async fn cut(&self, cut: Cut, method: &str, target: &str, body: Value) -> Answer {
        self.proxy.cut_change_of_stock(cut);
        let answer = self.server.control(method, target, body).await;
        assert!(self.proxy.has_cut(), "{method} {target} has committed");
        assert_eq!(answer.status, 503, "{cut:?}: {answer:?}");
        // Until the outcome is known memory and rows may differ, which is no fault of either.
        let audit = self.server.control("GET", "/admin/v1/audit", Value::Null);
        let audit = audit.await.json();
        assert_eq!(audit["ok"], true, "{cut:?} {target}: {audit:#}");
        answer
    }

    /// What the database says of a SKU: price, total, paused.
    async fn row(&self, sku: &str) -> Option<(i64, i64, bool)> {
        let look = "SELECT unit_price, total, paused FROM millrace.sku WHERE sku_id = $1";
        let client = self.database.connect().await;
        let row = client.query_opt(look, &[&sku]).await.unwrap();
        row.map(|row| (row.get(0), row.get(1), row.get(2)))
    }

    /// What memory says.
    async fn memory(&self, sku: &str) -> Option<(i64, i64, bool)> {
        let answer = self.server.get(&format!("/v1/skus/{sku}")).await;
        let sku = (answer.status == 200).then(|| answer.json())?;
        let number = |name: &str| sku[name].as_i64().expect("a number");
        Some((
            number("unit_price"),
            number("total"),
            sku["state"] == "paused",
        ))
    }

    /// Waits until both say the same, which is this.
    async fn until(&self, sku: &str, expected: Option<(i64, i64, bool)>, why: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (memory, row) = (self.memory(sku).await, self.row(sku).await);
            if memory == expected && row == expected {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{why}: {memory:?} and {row:?}, not {expected:?}"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn close(self) {
        self.server.assert_audit().await;
        assert!(self.server.stop().await);
    }
}

fn was_stored(cut: Cut) -> bool {
    cut != Cut::Before
}

#[test]
fn a_sku_whose_put_is_not_answered_is_sold_if_it_was_stored() {
    block_on(async {
        let shop = Shop::open().await;
        for (at, cut) in CUTS.into_iter().enumerate() {
            let sku = format!("NEW-{at}");
            let body = json!({ "unit_price": 7, "currency": "EUR", "total": 3 });
            let target = format!("/admin/v1/skus/{sku}");
            shop.cut(cut, "PUT", &target, body).await;
            let stored = was_stored(cut).then_some((7, 3, false));
            shop.until(&sku, stored, &format!("{cut:?}")).await;
            let order = shop.server.order("u", &sku, None).await;
            let expected = if was_stored(cut) { 201 } else { 404 };
            assert_eq!(order.status, expected, "{cut:?}: {order:?}");
        }
        shop.close().await;
    });
}

#[test]
fn terms_and_totals_that_are_not_answered_are_in_force_as_they_were_stored() {
    block_on(async {
        let shop = Shop::open().await;
        let mut stands = (100, 10, false);
        for cut in CUTS {
            for total in [stands.1 + 5, stands.1 - 2] {
                let price = stands.0 + 1;
                let body = json!({ "unit_price": price, "currency": "EUR", "total": total });
                shop.cut(cut, "PUT", "/admin/v1/skus/A", body).await;
                if was_stored(cut) {
                    stands = (price, total, false);
                }
                shop.until("A", Some(stands), &format!("{cut:?}, total {total}"))
                    .await;
            }
            for quantity in [4, -1] {
                let target = "/admin/v1/skus/A/restock";
                shop.cut(cut, "POST", target, json!({ "quantity": quantity }))
                    .await;
                if was_stored(cut) {
                    stands.1 += quantity;
                }
                let why = format!("{cut:?}, restock {quantity}");
                shop.until("A", Some(stands), &why).await;
            }
        }
        shop.close().await;
    });
}

#[test]
fn a_dead_letter_whose_retry_is_not_answered_holds_its_units_if_it_is_a_row() {
    block_on(async {
        let shop = Shop::open().await;
        let admin = shop.database.connect().await;
        let sql = async |statement: &str| admin.batch_execute(statement).await.unwrap();
        for (at, cut) in CUTS.into_iter().enumerate() {
            let user = format!("refused-{at}");
            sql("ALTER TABLE millrace.orders ADD CONSTRAINT no CHECK (user_id NOT LIKE 'refused%') NOT VALID").await;
            let failed = shop.server.order(&user, "A", None).await;
            sql("ALTER TABLE millrace.orders DROP CONSTRAINT no").await;
            let (free, held, _) = shop.server.stock("A").await;
            let list = shop
                .server
                .control("GET", "/admin/v1/dead-letters", Value::Null)
                .await;
            let list = list.json();
            let id = list["dead_letters"][0]["id"].as_i64();
            let id = id.unwrap_or_else(|| panic!("{failed:?} {list}"));
            let target = format!("/admin/v1/dead-letters/{id}/retry");
            shop.cut(cut, "POST", &target, Value::Null).await;
            let units = u64::from(was_stored(cut));
            let expected = (free - units, held + units, 0);
            let deadline = Instant::now() + PATIENCE;
            loop {
                let stock = shop.server.stock("A").await;
                let letters = "SELECT count(*) FROM millrace.dead_letters";
                let letters: i64 = admin.query_one(letters, &[]).await.unwrap().get(0);
                if stock == expected && letters == i64::from(!was_stored(cut)) {
                    break;
                }
                assert!(
                    Instant::now() < deadline,
                    "{cut:?}: {stock:?}, not {expected:?}"
                );
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            shop.server.assert_audit().await;
            if !was_stored(cut) {
                let retried = shop.server.control("POST", &target, Value::Null).await;
                assert_eq!(retried.status, 200, "{retried:?}");
            }
        }
        shop.close().await;
    });
}

#[test]
fn a_put_names_the_terms_that_it_changed() {
    block_on(async {
        let shop = Shop::open().await;
        let put = async |body: Value| {
            let answer = shop.server.control("PUT", "/admin/v1/skus/T", body).await;
            (answer.status, answer.json()["changed"].clone())
        };
        let all = json!({
            "title": "Tee", "unit_price": 5, "currency": "EUR", "total": 4, "per_user_limit": 2,
            "opens_at": "2020-01-01T00:00:00Z", "closes_at": "2099-01-01T00:00:00Z",
        });
        assert_eq!(put(all.clone()).await, (201, json!([])));
        assert_eq!(put(all).await, (200, json!([])));
        // What is left out takes its default, visibly.
        let least = json!({ "unit_price": 6, "currency": "EUR", "total": 9 });
        let changed = json!([
            "title",
            "unit_price",
            "per_user_limit",
            "opens_at",
            "closes_at",
            "total"
        ]);
        assert_eq!(put(least.clone()).await, (200, changed));
        assert_eq!(put(least).await, (200, json!([])));
        shop.close().await;
    });
}
