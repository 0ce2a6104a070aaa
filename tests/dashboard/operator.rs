//! An operator's work, done in a real Chromium through what a person would see and click.
//!
//! `MILLRACE_PICTURES=DIRECTORY` writes pictures of what a person would see.

use std::sync::LazyLock;

use millrace::config::{Backend, Config, OneOrMany};
use serde_json::{Value, json};

use crate::receiver::Receiver;
use crate::support::block_on;
use crate::support::browser::Browser;
use crate::support::http::Answer;
use crate::support::postgres::TestDatabase;
use crate::support::server::TestServer;
use crate::support::waiting::wait_until;
use crate::support::webhook::{Paid, SECRET};

/// A shop, and a browser that shows its dashboard.
struct Desk {
    database: TestDatabase,
    server: TestServer,
    browser: Browser,
}

impl Desk {
    /// `None` if this machine has no browser.
    async fn open(configure: impl FnOnce(&mut Config)) -> Option<Self> {
        let mut browser = Browser::start()?;
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |config| {
            config.payments.standard.secret = OneOrMany(vec![SECRET.to_owned()]);
            configure(config);
        })
        .await;
        browser.open(&format!("http://{}/", server.control));
        browser.sees("Taking orders");
        Some(Desk {
            database,
            server,
            browser,
        })
    }

    async fn sql(&self, sql: &str) {
        let admin = self.database.connect().await;
        admin.batch_execute(sql).await.expect(sql);
    }

    async fn get(&self, target: &str) -> Value {
        self.server.control("GET", target, Value::Null).await.json()
    }

    async fn order(&self, user: &str, sku: &str) -> Answer {
        self.server.order(user, sku, Some("k")).await
    }

    /// Delivers a payment, which has to be answered with success.
    async fn pay(&self, paid: &Paid) {
        let answer = paid.deliver(self.server.data).await;
        assert_eq!(answer.status, 200, "{answer:?}");
    }

    /// Runs the runbook's query for what somebody has added to the table `orders`; returns the remedies.
    async fn strangers(&self) -> Vec<String> {
        let runbook = std::fs::read_to_string("docs/RUNBOOK.md").expect("the runbook");
        let query = runbook
            .split("\ndb \"")
            .find(|block| block.starts_with("SELECT format('ALTER TABLE"))
            .and_then(|block| block.split('"').next())
            .expect("the query");
        let rows = self.database.connect().await.query(query, &[]).await;
        let rows = rows.expect("what was added");
        rows.iter().map(|row| row.get("remedy")).collect()
    }

    async fn until_live(&self, what: &str, condition: impl Fn(&Value) -> bool) {
        wait_until(what, async || condition(&self.get("/admin/v1/live").await)).await;
    }

    /// A picture of each page in each shape, for people.
    fn picture(&mut self, name: &str) {
        static DIRECTORY: LazyLock<Option<String>> =
            LazyLock::new(|| std::env::var("MILLRACE_PICTURES").ok());
        let Some(directory) = &*DIRECTORY else {
            return;
        };
        for (shape, width, height, colours) in
            [("desk", 1280, 900, "light"), ("phone", 390, 844, "dark")]
        {
            self.browser.size(width, height);
            self.browser.colours(colours);
            self.browser
                .picture(&format!("{directory}/{name}-{shape}.png"));
        }
        self.browser.size(1280, 900);
        self.browser.colours("light");
    }

    /// Ends it: every promise holds, and the page has complained of nothing.
    async fn close(self) {
        assert_eq!(self.browser.complaints, Vec::<String>::new());
        self.server.assert_audit().await;
        assert!(self.server.stop().await);
    }
}

#[test]
fn who_waits_for_how_long_and_what_is_assigned_is_on_the_first_page() {
    block_on(async {
        let Some(mut desk) = Desk::open(|_| {}).await else {
            return;
        };
        desk.server.put_sku("A", 1, json!({})).await;
        assert_eq!(desk.order("u", "A").await.status, 201);
        desk.browser.sees_no("Waiting lists");
        for user in ["v", "w"] {
            let body = json!({ "user_id": user, "sku_id": "A", "waitlist": true });
            assert_eq!(desk.server.post(body, None, &[]).await.status, 202);
        }
        desk.browser.sees("2 orders wait");
        desk.browser.sees("for 1 SKU");
        let oldest = r"/the oldest waits for\s+\d+ seconds/.test(root.innerText)";
        desk.browser.until("how long the oldest waits", oldest);
        let restock = json!({ "quantity": 1 });
        let restock = desk
            .server
            .control("POST", "/admin/v1/skus/A/restock", restock);
        assert_eq!(restock.await.status, 200);
        desk.browser.sees("1 order waits");
        desk.browser.sees("1 assigned, 0 expired since the start");
        desk.picture("waiting");
        desk.close().await;
    });
}

#[test]
fn a_sku_is_created_changed_restocked_and_paused() {
    block_on(async {
        let Some(mut desk) = Desk::open(|_| {}).await else {
            return;
        };
        desk.browser.click("SKUs");
        desk.browser.sees("There is no SKU yet.");
        desk.browser.click("New SKU");
        desk.browser.click("Create…");
        desk.browser.sees("1 to 32 visible ASCII characters");
        for (label, text) in [
            ("SKU", "IPHONE/15"),
            ("Title", "iPhone <b>15</b>"),
            ("Unit price", "199900"),
            ("Currency", "CNY"),
            ("Total", "100"),
            ("Units a buyer", "2"),
            ("Orders that may wait", "50"),
            ("Assign between", "09:00+08:00 to 21:00+08:00"),
        ] {
            desk.browser.enter(label, text);
        }
        desk.browser.sees("Minor units: 1,999.00 CNY.");
        desk.picture("sku-new");
        desk.browser.click("Create…");
        desk.browser
            .sees("100 units for 1,999.00 CNY each, at most 2 a buyer.");
        let skus = desk.get("/admin/v1/skus").await;
        assert_eq!(skus["skus"], json!([]), "nothing before it was confirmed");
        desk.browser.click("Create");
        desk.browser.sees("IPHONE/15 is created.");
        let sku = desk.get("/admin/v1/skus").await["skus"][0].clone();
        assert_eq!(sku["waitlist_max"], 50, "{sku}");
        assert_eq!(sku["assign_between"], json!(["09:00+08:00", "21:00+08:00"]));
        assert_eq!(desk.order("u", "IPHONE/15").await.status, 201);

        // What stops buyers is said before it is done, and may be left.
        desk.browser.sees("iPhone <b>15</b> · IPHONE/15");
        desk.browser.enter("Total", "80");
        desk.browser.enter("Closes", "2020-01-01T00:00:00");
        desk.browser.click("Save…");
        desk.browser.sees("20 free units leave the sale");
        desk.browser.sees("409 sale_closed");
        desk.picture("sku-change");
        desk.browser.click("Cancel");
        let total =
            async |desk: &Desk| desk.get("/admin/v1/skus").await["skus"][0]["total"].clone();
        assert_eq!(total(&desk).await, 100);
        desk.browser.enter("Closes", "2099-01-01T00:00:00");
        desk.browser.click("Save…");
        desk.browser.click("Change");
        desk.browser.sees("is changed: Closes, Total.");
        assert_eq!(total(&desk).await, 80);
        desk.browser.click("Save…");
        desk.browser.sees("Nothing differs from what is in force.");

        // Somebody else's change is not undone.
        let other = json!({ "unit_price": 5, "currency": "CNY", "total": 80, "per_user_limit": 2 });
        let put = desk
            .server
            .control("PUT", "/admin/v1/skus/IPHONE%2F15", other);
        assert_eq!(put.await.status, 200);
        desk.browser.enter("Title", "iPhone");
        desk.browser.click("Save…");
        desk.browser
            .sees("Somebody else has changed Title, Unit price, Closes");
        desk.browser.click("Load it anew");
        assert_eq!(desk.browser.field("Unit price"), "5");
        assert_eq!(desk.browser.field("Closes"), "");

        desk.browser.click("Restock…");
        desk.browser.enter("Units to add", "-200");
        desk.browser.sees("Only 79 are free");
        desk.browser.enter("Units to add", "5");
        desk.browser.sees("5 units more can be bought at once");
        desk.picture("restock");
        desk.browser.click("Restock");
        desk.browser.sees("has 85 in total now, 84 free.");
        assert_eq!(total(&desk).await, 85);
        let shown = "field('Total').value === '85'";
        desk.browser.until("the form has the new total", shown);
        let keys = "SELECT count(*) FROM millrace.stock_log WHERE request_key LIKE 'dashboard-%'";
        let admin = desk.database.connect().await;
        let row = admin.query_one(keys, &[]).await.expect("a count");
        assert_eq!(row.get::<_, i64>(0), 1, "the restock had a key");

        desk.browser.click("Pause");
        desk.browser.sees("is refused with 409 sale_paused");
        desk.browser.press("Escape");
        assert_eq!(desk.order("v", "IPHONE/15").await.status, 201);
        desk.browser.click("Pause");
        desk.browser.click("Pause");
        desk.browser.sees("IPHONE/15 is paused.");
        assert_eq!(desk.order("w", "IPHONE/15").await.code(), "sale_paused");
        desk.browser.click("Resume");
        desk.browser.click("Resume");
        desk.browser.sees("IPHONE/15 is resumed.");
        assert_eq!(desk.order("w", "IPHONE/15").await.status, 201);
        desk.browser.click("Pause all sales");
        desk.browser.sees("of every SKU");
        desk.browser.click("Pause everything");
        desk.browser.sees("Every sale is paused by an operator.");
        assert_eq!(desk.order("x", "IPHONE/15").await.code(), "sale_paused");
        desk.browser.click("Resume all sales");
        desk.browser.click("Resume");
        desk.browser.sees("Taking orders");
        desk.close().await;
    });
}

#[test]
fn payments_are_decided_closed_and_refunded_and_an_order_shows_its_whole_history() {
    block_on(async {
        // Orphans stay until somebody decides.
        let desk = Desk::open(|config| config.payments.orphan_check_ms = 3_600_000).await;
        let Some(mut desk) = desk else {
            return;
        };
        desk.server.put_sku("A", 10, Value::Null).await;
        let order = desk.order("anna", "A").await.json();
        let id = order["order_id"].as_str().expect("an order").to_owned();
        let paid = Paid::of(&order);
        desk.pay(&paid).await;
        desk.pay(&paid.again("twice")).await;
        let lost = |name: &str, order: &str| Paid {
            order: order.to_owned(),
            receipt: None,
            ..paid.again(name)
        };
        desk.pay(&lost("first", "4194305")).await;
        desk.pay(&lost("second", "4194306")).await;
        desk.until_live("they are counted", |live| {
            live["payments"]["orphans"] == 2 && live["payments"]["refunds_due"] == 1
        })
        .await;

        desk.browser.click("Payments 3");
        let (first, second) = (
            format!("{}-first", paid.payment),
            format!("{}-second", paid.payment),
        );
        desk.browser.click_in(&first, "Close…");
        desk.browser.sees("cannot be opened again");
        desk.browser.click("Close it");
        desk.browser.sees("“Note” is needed.");
        desk.picture("close");
        desk.browser.enter("Note", "the buyer has called");
        desk.browser.click("Close it");
        desk.browser.sees("The payment is closed.");
        desk.browser.sees_no(&first);
        desk.picture("payments");
        desk.browser.click_in(&second, "Decide now…");
        desk.browser.sees("becomes due for a refund at once");
        desk.browser.click("Decide now");
        desk.browser.sees("has to be refunded: receipt missing.");
        desk.browser.sees("There is nothing to do here.");

        desk.browser.click("To be refunded");
        desk.browser
            .sees("A second payment of an order that is paid and stays paid.");
        // It is work for afterwards: a number, and no line in the head.
        let why = desk.browser.value("$('why').textContent");
        assert!(!why.to_string().contains("refund"), "{why}");
        desk.picture("refunds");
        desk.browser.click_in("already paid", "Record the refund…");
        desk.browser.sees("The order itself is paid and stays so.");
        desk.browser.enter("Reference of the refund", "refund-1");
        desk.browser.click("Record it");
        desk.browser.sees("Recorded. The order is paid.");
        desk.browser.sees_no("already paid");
        desk.browser.click_in("receipt missing", "Close…");
        desk.browser.enter("Note", "sent back");
        desk.browser.enter("Reference of the refund", "refund-2");
        desk.browser.click("Close it");
        desk.browser.sees("There is nothing to do here.");

        // By its buyer, and then by itself.
        desk.browser.click("Orders");
        desk.browser.enter("Order or buyer", "anna");
        desk.browser.press("Enter");
        desk.browser.sees("Orders of buyer anna");
        desk.picture("buyer");
        desk.browser.click(&id);
        for seen in [
            "Placed by anna: 1 unit of A for 1.00 EUR.".to_owned(),
            format!(
                "Message payment.succeeded of standard about payment {}",
                paid.payment
            ),
            format!("Paid: 1.00 EUR by payment {}.", paid.payment),
            format!(
                "Refund recorded: 1.00 EUR, payment {}-twice, reference refund-1.",
                paid.payment
            ),
        ] {
            desk.browser.sees(&seen);
        }
        let body = "[...document.querySelectorAll('#found pre')].some((e) => e.textContent.includes('payment.succeeded'))";
        desk.browser.until("the message as it came", body);
        desk.picture("order");
        desk.browser.click("Give the sale up…");
        desk.browser.sees("Recording one gives the sale itself up");
        desk.browser.enter("Reference of the refund", "refund-3");
        desk.browser.click("Put its units on sale again");
        desk.browser.click("Give the sale up");
        desk.browser
            .sees("The order is refunded; 1 unit is on sale again.");
        desk.browser
            .sees("Stock: restocked after a refund, −1 sold.");
        assert_eq!(desk.server.stock("A").await, (10, 0, 0));

        // Nothing of it is JSON, and what is not there is said.
        desk.browser.enter("Order or buyer", "4194307");
        desk.browser.press("Enter");
        desk.browser.sees("Nothing is found under “4194307”.");
        desk.browser.enter("Order or buyer", "4194306");
        desk.browser.press("Enter");
        desk.browser
            .sees("There is no such order, but payments name it.");
        desk.close().await;
    });
}

#[test]
fn dead_letters_are_retried_and_discarded_and_only_open_ones_are_counted() {
    block_on(async {
        let Some(mut desk) = Desk::open(|_| {}).await else {
            return;
        };
        desk.server.put_sku("A", 10, Value::Null).await;
        assert_eq!(desk.strangers().await, [""; 0], "all of it is Millrace's");
        desk.sql("ALTER TABLE millrace.orders ADD CONSTRAINT no_b CHECK (user_id NOT LIKE 'b%');
                  CREATE FUNCTION millrace.stranger() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
                  CREATE TRIGGER \"by hand\" BEFORE INSERT ON millrace.orders
                     FOR EACH ROW EXECUTE FUNCTION millrace.stranger()")
            .await;
        for user in ["bea", "bob", "ben", "bud"] {
            assert_eq!(desk.order(user, "A").await.status, 500);
        }
        desk.until_live("they are counted", |live| live["dead_letters_open"] == 4)
            .await;
        desk.browser.sees("4 dead letters are open.");
        desk.browser.click("Dead letters 4");
        desk.picture("letters");
        desk.browser.click_in("bea", "Retry…");
        desk.browser.click("Retry");
        desk.browser.sees("the database refuses the row again");
        desk.browser.click("Cancel");
        desk.browser.click("Retry all…");
        desk.browser.click("Retry all");
        desk.browser.sees("0 orders are written.");
        desk.browser.click("Cancel");
        let remedies = desk.strangers().await;
        assert_eq!(
            remedies,
            [
                "ALTER TABLE millrace.orders DROP CONSTRAINT no_b",
                "DROP TRIGGER \"by hand\" ON millrace.orders"
            ]
        );
        for remedy in &remedies {
            desk.sql(&format!("SET lock_timeout = '2s'; {remedy}"))
                .await;
        }
        assert_eq!(desk.strangers().await, [""; 0]);
        let letters = desk.get("/admin/v1/dead-letters").await;
        let letters = letters["dead_letters"].as_array().expect("letters");
        let bea = letters.iter().find(|letter| letter["user_id"] == "bea");
        let bea = bea.expect("hers")["order_id"].clone();
        desk.browser.click_in("bea", "Retry…");
        desk.browser.click("Retry");
        desk.browser.sees("is written and payable.");
        desk.browser.sees_no("bea");
        desk.browser.click_in("bob", "Discard…");
        desk.browser.sees("stays failed for good");
        desk.browser.enter("Note", "told by phone");
        desk.browser.click("Discard");
        desk.browser.sees("Discarded.");
        desk.browser.sees_no("bob");
        desk.browser.click("Retry all…");
        desk.browser.click("Retry all");
        desk.browser.sees("2 orders are written and payable.");
        desk.browser.sees("None is open.");
        desk.browser.click("With discarded ones");
        desk.browser.sees("told by phone");
        desk.until_live("none is open", |live| live["dead_letters_open"] == 0)
            .await;
        let live = desk.get("/admin/v1/live").await;
        assert_eq!(live["dead_letters"], 4, "since the start");
        desk.browser.click("Live");
        desk.browser.sees("open; 4 since the start");
        desk.browser.click("Orders");
        desk.browser
            .enter("Order or buyer", bea.as_str().expect("an id"));
        desk.browser.press("Enter");
        desk.browser
            .sees("It was a dead letter until an operator retried it");
        desk.browser.sees("a waiting buyer was told 500");
        assert_eq!(desk.server.stock("A").await, (7, 3, 0));
        desk.close().await;
    });
}

#[test]
fn a_sku_that_the_database_has_paused_says_what_can_help() {
    block_on(async {
        let Some(mut desk) = Desk::open(|_| {}).await else {
            return;
        };
        desk.server.put_sku("A", 10, Value::Null).await;
        desk.server.put_sku("B", 10, Value::Null).await;
        desk.sql("UPDATE millrace.sku SET total = 0 WHERE sku_id = 'A'")
            .await;
        let body = json!({ "user_id": "u", "sku_id": "A" });
        let accepted = desk
            .server
            .post(body, None, &[("Prefer", "respond-async")])
            .await;
        assert_eq!(accepted.status, 202, "{accepted:?}");
        desk.browser
            .sees("A is paused by the database: 1 order is parked.");
        desk.picture("refused-live");
        desk.browser
            .click_in("paused by the database", "Cannot resume…");
        desk.browser
            .sees("Resuming cannot help until its row agrees with its orders.");
        desk.browser.sees("violates check constraint");
        desk.picture("refused");
        desk.browser.click("Try the counters now");
        desk.browser
            .sees("the database refuses the counters of A, as a retry has just shown");
        desk.sql("UPDATE millrace.sku SET total = 10 WHERE sku_id = 'A'")
            .await;
        desk.browser.click("Try the counters now");
        desk.browser.sees("The database accepts the counters again");
        desk.browser.sees_no("paused by the database");
        desk.browser.click("Checks");
        desk.browser.click("Audit now");
        desk.browser.sees("every promise holds");
        desk.picture("audit");
        desk.close().await;
    });
}

#[test]
fn a_session_that_locks_the_orders_is_named_and_what_it_cost_stays_on_the_page() {
    block_on(async {
        let Some(mut desk) = Desk::open(|config| config.orders.timeout_ms = 1_000).await else {
            return;
        };
        desk.server.put_sku("A", 10, Value::Null).await;
        desk.browser.sees("since the start; lately 0");
        let mut blocker = desk.database.connect().await;
        let lock = blocker.transaction().await.expect("begin");
        let pid: i32 = lock
            .query_one("SELECT pg_backend_pid()", &[])
            .await
            .expect("its pid")
            .get(0);
        lock.batch_execute("LOCK TABLE millrace.orders IN ACCESS EXCLUSIVE MODE")
            .await
            .expect("lock");
        // Another one, behind it.
        let behind = desk.database.connect().await;
        let waits = behind.batch_execute("BEGIN; LOCK TABLE millrace.orders IN SHARE MODE; COMMIT");
        let meanwhile = async {
            let order = desk.order("u", "A").await;
            assert!([202, 504].contains(&order.status), "{order:?}");
            desk.browser.sees("Orders are not written");
            desk.browser.sees(&format!("session {pid} ("));
            desk.browser.sees("idle in transaction");
            desk.browser.sees("LOCK TABLE millrace.orders IN");
            desk.browser.sees("waits for a lock itself");
            desk.browser
                .sees(&format!("SELECT pg_terminate_backend({pid})"));
            desk.picture("blocked");
            desk.sql(&format!("SELECT pg_terminate_backend({pid})"))
                .await;
            desk.browser.sees("Taking orders");
            desk.browser.sees("1\nsince the start; lately 1");
            desk.picture("after-the-lock");
        };
        let (waited, ()) = tokio::join!(waits, meanwhile);
        waited.expect("it came to its turn");
        assert!(lock.rollback().await.is_err(), "the session was ended");
        desk.close().await;
    });
}

#[test]
fn a_warning_is_a_line_with_its_name_that_leads_to_its_place() {
    block_on(async {
        let Some(mut desk) = Desk::open(|_| {}).await else {
            return;
        };
        let title = "document.title";
        assert_eq!(desk.browser.value(title), "Taking orders · Millrace");
        let soon = millrace::order::UnixMillis(millrace::order::UnixMillis::now().0 + 1_800_000);
        let terms = json!({ "opens_at": soon.to_string() });
        desk.server.put_sku("A", 10, terms).await;
        desk.browser
            .sees("there was no preflight in the last 24 hours");
        desk.browser.sees("Taking orders");
        assert_eq!(
            desk.browser.value(title),
            "Taking orders, 1 warning · Millrace"
        );
        let stands_out = "(() => { const of = (id) => getComputedStyle(document.querySelector(id)).backgroundColor; \
            return of('#warnings li') !== of('#state') && of('#warnings li') !== of('body'); })()";
        desk.browser.until("a colour of its own", stands_out);
        desk.picture("warning");
        desk.browser.size(360, 740);
        desk.browser.until(
            "no scroll to the side",
            "document.documentElement.scrollWidth <= innerWidth",
        );
        desk.browser.click("preflight");
        desk.browser.sees("Readiness");
        let found = "[...document.querySelectorAll('#readiness tr')].map((row) => row.innerText.split(/\\s+/, 2).join(' '))";
        let names = ["recovery", "intake", "progress", "journal", "database"];
        let mut expected: Vec<String> = names.iter().map(|name| format!("ok {name}")).collect();
        expected.push("warning preflight".to_owned());
        assert_eq!(desk.browser.value(found), json!(expected));
        desk.picture("readiness");
        desk.close().await;
    });
}

#[test]
fn the_word_in_the_head_knows_of_the_order_log() {
    block_on(async {
        let Some(mut desk) = Desk::open(|_| {}).await else {
            return;
        };
        // What the control plane would say, in place of a broker and a disk that fail in turn.
        for (log, ready, word, is) in [
            ("open", true, "Taking orders", "good"),
            ("busy", true, "Taking orders", "good"),
            ("full", true, "Order log full", "warn"),
            ("failed", false, "Order log failed", "warn"),
            ("away", false, "Broker away", "warn"),
            ("no_lease", false, "Order log on hold", "warn"),
        ] {
            let shown = desk.browser.value(&format!(
                "(() => {{ const before = [live, checks]; \
                    live = {{ ...live, state: {ready} ? 'ready' : 'not_ready', order_log: {{ ...live.order_log, state: '{log}', detail: 'why' }} }}; \
                    checks = [{{ name: 'journal', ok: {ready}, detail: 'why' }}]; \
                    const [word, is] = headline(); [live, checks] = before; return [word, is]; }})()"
            ));
            assert_eq!(shown, json!([word, is]), "{log}");
        }
        // The database matters more: without it no order becomes a row.
        let shown = desk.browser.value(
            "(() => { const before = [live, checks]; \
                live = { ...live, state: 'not_ready', order_log: { ...live.order_log, state: 'no_lease' } }; \
                checks = [{ name: 'journal', ok: false, detail: '' }, { name: 'database', ok: false, detail: '' }]; \
                const [word, is] = headline(); [live, checks] = before; return [word, is]; })()",
        );
        assert_eq!(shown, json!(["Database away", "bad"]));
        desk.close().await;
    });
}

/// Every page of the dashboard.
const PAGES: [&str; 10] = [
    "#/",
    "#/skus",
    "#/skus/A",
    "#/new-sku",
    "#/orders",
    "#/orders/anna",
    "#/payments/orphan",
    "#/payments/refund_due",
    "#/dead-letters",
    "#/checks",
];

#[test]
fn every_page_fits_a_phone_and_can_be_used_with_the_keyboard() {
    block_on(async {
        let Some(mut desk) = Desk::open(|_| {}).await else {
            return;
        };
        let long = "W".repeat(32);
        let title = json!({ "title": "A title of some length that has to find its place" });
        desk.server.put_sku("A", 1_000_000, title.clone()).await;
        desk.server.put_sku(&long, 4_294_967_295, title).await;
        assert_eq!(desk.order("anna", "A").await.status, 201);
        assert_eq!(desk.order(&"u".repeat(48), &long).await.status, 201);
        desk.browser.size(360, 740);
        for page in PAGES {
            desk.browser
                .value(&format!("(location.hash = {}, true)", json!(page)));
            desk.browser
                .until(page, "document.querySelector('.page:not([hidden]) h2')");
            desk.browser
                .until("the figures", "live && live.skus.length === 2");
            desk.browser.until(
                &format!("{page} without a scroll to the side"),
                "document.documentElement.scrollWidth <= innerWidth",
            );
        }
        desk.browser.size(1280, 900);

        // From the top with the keyboard alone: past the head, to the navigation, to an order.
        desk.browser
            .open(&format!("http://{}/", desk.server.control));
        desk.browser.sees("Taking orders");
        let focused = "document.activeElement.textContent.trim()";
        desk.browser.press("Tab");
        assert_eq!(desk.browser.value(focused), "Skip to the content");
        for expected in ["Pause all sales", "Live", "SKUs", "Orders"] {
            desk.browser.press("Tab");
            assert_eq!(desk.browser.value(focused), expected);
        }
        desk.browser.press("Enter");
        desk.browser.sees("Order or buyer");
        let current = "document.querySelector('nav [aria-current=page]').textContent.trim()";
        assert_eq!(desk.browser.value(current), "Orders");
        let in_field = "document.activeElement.id === 'find-text'";
        desk.browser.until("the field has the focus", in_field);
        desk.browser
            .call("Input.insertText", json!({ "text": "anna" }));
        desk.browser.press("Enter");
        desk.browser.sees("Orders of buyer anna");

        // Every control has a name, and every field a label.
        for page in PAGES {
            desk.browser
                .value(&format!("(location.hash = {}, true)", json!(page)));
            let nameless = "[...document.querySelectorAll('.page:not([hidden]) :is(button, a, input, canvas)')] \
                .filter((e) => seen(e) && !e.ariaHidden && !words(e) && !e.ariaLabel && !(e.labels && e.labels.length)) \
                .map((e) => e.outerHTML)";
            assert_eq!(desk.browser.value(nameless), json!([]), "{page}");
        }
        desk.close().await;
    });
}

#[test]
fn sinks_of_events_are_refilled_and_their_dead_letters_retried_and_discarded() {
    block_on(async {
        let receiver = Receiver::start().await;
        let sink = receiver.sink();
        let desk = Desk::open(|config| {
            config.events.sinks.insert("shop".to_owned(), sink);
        });
        let Some(mut desk) = desk.await else {
            return;
        };
        desk.server.put_sku("A", 10, Value::Null).await;
        desk.browser.click("Events");
        desk.browser.sees("nothing yet");
        // Events begin with the slot.
        let slot = "SELECT FROM pg_replication_slots WHERE database = current_database() AND confirmed_flush_lsn IS NOT NULL";
        let admin = desk.database.connect().await;
        wait_until("the slot", async || {
            !admin.query(slot, &[]).await.expect("the slots").is_empty()
        })
        .await;
        desk.browser.sees("idle");
        let order = desk.order("anna", "A").await.json();
        let id = order["order_id"].as_str().expect("an order").to_owned();
        receiver.until("order.placed", &id).await;
        desk.browser.sees_no("nothing yet");
        desk.picture("sinks");

        // A refill tells it again, from where the operator says.
        let before = receiver.heard().len();
        desk.browser.click_in("shop", "Resync…");
        desk.browser.sees("It hears again what it knows");
        desk.browser.enter("Orders above", "x");
        desk.browser.click("Refill");
        desk.browser
            .sees("must be an order's id, or 0 for all orders");
        desk.browser.enter("Orders above", "0");
        desk.picture("resync");
        desk.browser.click("Refill");
        desk.browser.sees("shop is refilled from the rows.");
        wait_until("the order again", async || receiver.heard().len() > before).await;
        assert_eq!(receiver.heard()[before].event["resync"], true);

        // What it did not take for a day.
        desk.sql(
            "INSERT INTO millrace.event_deliveries (sink, event_id, subject, type, body, attempts, first_failed_at,
                    next_attempt_at, last_error, dead_at)
             SELECT 'shop', n || ':1', n::text, 'order.placed',
                    format('{\"id\":\"%s:1\",\"type\":\"order.placed\",\"data\":{\"order_id\":\"%s\"}}', n, n), 30,
                    now() - interval '1 day', now(), 'it answered 500 Internal Server Error', now()
               FROM generate_series(4194305, 4194308) n",
        )
        .await;
        desk.browser.sees("4 events were not taken by a sink.");
        desk.browser.sees("4 dead letters");
        desk.browser.click("Not taken");
        desk.browser.sees("it answered 500 Internal Server Error");
        desk.picture("event-letters");
        desk.browser.click_in("4194305:1", "Discard…");
        desk.browser.sees("unless it is refilled");
        desk.browser.click("Discard");
        desk.browser.sees("Discarded.");
        desk.browser.sees_no("4194305:1");
        desk.browser.click_in("4194306:1", "Retry…");
        desk.browser.click("Retry");
        desk.browser.sees("4194306:1 is delivered again.");
        receiver.until("order.placed", "4194306").await;
        desk.browser.click("Retry all…");
        desk.browser.click("Retry all");
        desk.browser.sees("2 events are delivered again.");
        desk.browser
            .sees("There is none. There is nothing to do here.");
        for order in ["4194307", "4194308"] {
            receiver.until("order.placed", order).await;
        }
        desk.browser.sees_no("not taken by a sink");

        // One that wants no more gets none, until it is asked for.
        receiver.answer(|_, _| 410);
        desk.order("bea", "A").await;
        desk.browser.click("Sinks");
        desk.browser.sees("it answered 410 Gone");
        // Whoever looks at the sale sees it too, and where to go.
        desk.browser.click("Live");
        let tile = "document.querySelector('#live-sinks-tiles .alarm')?.innerText.startsWith('shop\\ndisabled')";
        desk.browser.until("the tile of the sink", tile);
        desk.browser.sees("events_disabled");
        desk.browser
            .until("a badge", "$('count-events').textContent === '1'");
        desk.picture("sink-disabled");
        desk.browser.click("events_disabled");
        receiver.answer(|_, _| 204);
        desk.browser.click_in("shop", "Resync…");
        desk.browser.sees("It is disabled now");
        desk.browser.click("Refill");
        desk.browser.sees("delivering");
        desk.close().await;
    });
}

#[test]
fn a_node_is_drained_and_its_lanes_are_seen_to_move() {
    block_on(async {
        let node = |config: &mut Config| {
            config.cluster.enabled = true;
            config.cluster.listen.set_port(0);
            config.cluster.secret.0 = "the secret of the nodes in this test".to_owned();
            config.queue.backend = Backend::Memory;
        };
        let Some(mut desk) = Desk::open(node).await else {
            return;
        };
        desk.server.put_sku("A", 100, Value::Null).await;
        assert_eq!(desk.order("u", "A").await.status, 201);
        desk.browser.click("Nodes");
        desk.browser.sees("1 node is active");
        desk.browser.sees("64 lanes, 64 open here");
        // The last one has nobody to give to, and is told so before anything is done.
        desk.browser.click("Drain…");
        desk.browser.sees("No other node is active");
        desk.browser.click("Cancel");
        let other = TestServer::start(&desk.database, node).await;
        desk.browser.sees("2 nodes are active");
        desk.browser.sees("32 lanes, 32 open here");
        desk.picture("nodes");
        desk.browser.click_in("Node 0", "Drain…");
        desk.browser.sees("Drain node 0?");
        desk.browser.sees("It hands its 32 lanes");
        desk.browser.sees("buyers get 503 with Retry-After: 1");
        let nodes = desk.get("/admin/v1/nodes").await;
        assert_eq!(
            nodes["nodes"][0]["drain"], false,
            "nothing before it was confirmed"
        );
        desk.picture("node-drain");
        desk.browser.click("Drain");
        desk.browser.sees("Node 0 hands its lanes over.");
        desk.browser.sees("drained");
        desk.browser.sees("0 lanes, 0 open here");
        let nodes = desk.get("/admin/v1/nodes").await;
        assert_eq!(nodes["nodes"][1]["lanes"], 64, "{nodes}");
        assert_eq!(nodes["nodes"][1]["units_held"], 1, "{nodes}");
        // What it answers comes from the other one.
        assert_eq!(desk.order("u", "A").await.status, 200);
        desk.picture("nodes-drained");
        assert_eq!(desk.browser.complaints, Vec::<String>::new());
        other.assert_audit().await;
        assert!(desk.server.stop().await);
        assert!(other.stop().await);
    });
}

#[test]
fn a_process_on_its_own_has_no_page_of_nodes() {
    block_on(async {
        let Some(mut desk) = Desk::open(|_| {}).await else {
            return;
        };
        // The first poll has been answered by the time that a later one is.
        desk.browser.until(
            "the nodes were asked for",
            "performance.getEntriesByName(location.origin + '/admin/v1/nodes').length > 0",
        );
        desk.browser.sees_no("Nodes");
        desk.close().await;
    });
}
