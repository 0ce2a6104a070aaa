//! A draw as the service makes it: entries without units until `draw_at`, then number and hash, then the seed; units by
//! rank, and a published file that the verifier finds right. Over restarts and kills at each step.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt as _;

use crate::support::block_on;
use crate::support::http::{Answer, call};
use crate::support::postgres::{TestDatabase, copy_template, test_dir};
use crate::support::served::Served;
use crate::support::server::{TestServer, request};
use crate::support::waiting::wait_until;
use millrace::order::draw::verify::{Evidence, Opening, Verdict, header_of, verify};
use millrace::order::draw::{EntryToken, Header, Row, State};
use millrace::order::{UnixMillis, UserId};
use rustix::process::Signal;
use serde_json::{Value, json};

/// Time for entries, in milliseconds: more than they take on a busy machine.
const ENTRIES_MS: u64 = 6_000;

/// Terms of a draw whose entries end `in_ms` from now.
fn terms(in_ms: u64, beacon: Option<&str>) -> Value {
    let now = UnixMillis::now();
    let mut terms = json!({
        "allocation": "draw",
        "opens_at": UnixMillis(now.0 - 60_000).to_string(),
        "draw_at": now.plus_ms(in_ms).to_string(),
        "closes_at": now.plus_ms(3_600_000).to_string(),
    });
    if let Some(beacon) = beacon {
        terms["draw_beacon"] = beacon.into();
    }
    terms
}

/// The published draw: every page, one after the other.
fn published(data: SocketAddr, limit: u64) -> String {
    let mut target = format!("/v1/skus/D/draw?limit={limit}");
    let mut file = String::new();
    loop {
        let page = call(data, "GET", &target, &[], "");
        assert_eq!(page.status, 200, "{page:?}");
        assert_eq!(page.field("content-type"), Some("application/x-ndjson"));
        file.push_str(std::str::from_utf8(&page.body).unwrap());
        let Some(link) = page.field("link") else {
            return file;
        };
        target = link
            .strip_prefix('<')
            .and_then(|link| link.strip_suffix(">; rel=\"next\""))
            .unwrap_or_else(|| panic!("{link}"))
            .to_owned();
    }
}

async fn published_by(server: &TestServer, limit: u64) -> String {
    let data = server.data;
    tokio::task::spawn_blocking(move || published(data, limit))
        .await
        .unwrap()
}

fn header(file: &str) -> Header {
    header_of(file.as_bytes()).unwrap()
}

fn rows(file: &str) -> Vec<Row> {
    let lines = file.lines().skip(1);
    lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn judge(file: &str, earlier: Vec<Header>, openings: Vec<Opening>) -> Verdict {
    let verdict = verify(file.as_bytes(), &Evidence { earlier, openings }).unwrap();
    assert!(verdict.ok, "{verdict:#?}");
    verdict
}

/// An entry, as its answer told it.
#[derive(Clone, Debug)]
struct Entered {
    order_id: String,
    opening: Opening,
}

fn entered(answer: &Answer) -> Entered {
    assert_eq!(answer.status, 202, "{answer:?}");
    let order = answer.json();
    assert_eq!(order["status"], "waitlisted", "{order}");
    assert!(order.get("position").is_none(), "{order}");
    assert_eq!(order["receipt"], Value::Null);
    assert_eq!(order["expires_at"], Value::Null);
    let text = |name: &str| order[name].as_str().unwrap_or_else(|| panic!("{order}"));
    Entered {
        order_id: text("order_id").to_owned(),
        opening: Opening {
            user_id: UserId::new(text("user_id")).unwrap(),
            token: EntryToken::from_hex(text("entry_token")).unwrap(),
        },
    }
}

async fn enter(server: &TestServer, user: &str, quantity: u32) -> Entered {
    let body = json!({ "user_id": user, "sku_id": "D", "quantity": quantity });
    entered(&server.post(body, Some("k"), &[]).await)
}

async fn state(server: &TestServer) -> String {
    let sku = server.get("/v1/skus/D").await.json();
    sku["state"].as_str().unwrap_or_default().to_owned()
}

async fn until_state(server: &TestServer, wanted: &str) {
    wait_until(wanted, async || state(server).await == wanted).await;
}

async fn order(server: &TestServer, id: &str) -> Value {
    server.get(&format!("/v1/orders/{id}")).await.json()
}

async fn until_status(server: &TestServer, id: &str, wanted: &str) -> Value {
    wait_until(wanted, async || order(server, id).await["status"] == wanted).await;
    order(server, id).await
}

async fn cancel(server: &TestServer, id: &str) -> Answer {
    let target = format!("/v1/orders/{id}/cancel");
    request(server.data, "POST", &target, &[], String::new()).await
}

async fn put(server: &TestServer, total: u32, terms: &Value) -> Answer {
    let mut body = json!({ "unit_price": 100, "currency": "EUR", "total": total });
    let members = body.as_object_mut().unwrap();
    members.extend(terms.as_object().unwrap().clone());
    server.control("PUT", "/admin/v1/skus/D", body).await
}

/// The orders by the entry that the file has of them.
fn by_entry(entries: &[Entered]) -> BTreeMap<String, Entered> {
    let entries = entries.iter().map(|entered| {
        let opening = &entered.opening;
        let hash = opening.token.entry_hash(&opening.user_id);
        (hash.to_string(), entered.clone())
    });
    entries.collect()
}

// --- The life of a draw ------------------------------------------------------------------------

#[test]
fn units_go_out_by_rank_and_the_published_file_shows_it() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        let terms = terms(ENTRIES_MS, None);
        let made = put(&server, 10, &terms).await.json();
        let promised = made["draw_commitment"].as_str().unwrap().to_owned();
        assert_eq!(state(&server).await, "entries_open");
        let open = header(&published_by(&server, 100).await);
        assert_eq!(open.state, State::EntriesOpen);
        assert_eq!(open.commitment.to_string(), promised);
        assert_eq!((open.seed, open.entries), (None, None));

        assert_eq!(server.stock("D").await, (10, 0, 0));
        let mut entries = Vec::new();
        for number in 0..12 {
            entries.push(enter(&server, &format!("u-{number}"), 1 + number % 3).await);
        }
        // Until then the units are nobody's, and nobody can have one: not in an answer, and not in the view.
        assert_eq!(server.stock("D").await, (0, 10, 0));
        let client = database.connect().await;
        let kept = "SELECT free = 0 AND held = 10 AND sold = 0 FROM millrace.sku_list";
        wait_until("the view has it", async || {
            let row = client.query_one(kept, &[]).await.unwrap();
            row.get(0)
        })
        .await;
        // One entry of a user; under its key it is the same one.
        let again = server.order("u-1", "D", None).await;
        assert_eq!((again.status, &*again.code()), (409, "purchase_limit"));
        let body = json!({ "user_id": "u-1", "sku_id": "D", "quantity": 2 });
        let replay = server.post(body, Some("k"), &[]).await;
        assert_eq!(replay.status, 200);
        assert_eq!(
            replay.json()["entry_token"],
            entries[1].opening.token.to_string()
        );
        // Whoever leaves before the draw is not in it.
        let left = entries.remove(0);
        assert_eq!(cancel(&server, &left.order_id).await.status, 200);
        // Terms stay, and so does the seed; people may have another title, and the draw may have more units.
        for (name, value) in [
            (
                "draw_at",
                json!(UnixMillis::now().plus_ms(90_000).to_string()),
            ),
            ("draw_beacon", json!("drand round 1")),
            ("per_user_limit", json!(1)),
            ("allocation", Value::Null),
        ] {
            let mut other = terms.clone();
            other[name] = value;
            if name == "allocation" {
                other["draw_at"] = Value::Null;
            }
            let refused = put(&server, 10, &other).await;
            assert_eq!(
                (refused.status, &*refused.code()),
                (409, "draw_fixed"),
                "{name}"
            );
        }
        let mut titled = terms.clone();
        titled["title"] = "The draw".into();
        let titled = put(&server, 12, &titled).await.json();
        assert_eq!(titled["draw_commitment"], promised);
        assert_eq!(titled["changed"], json!(["title", "total"]));
        assert_eq!(
            state(&server).await,
            "entries_open",
            "{ENTRIES_MS} ms were too short"
        );

        until_state(&server, "drawn").await;
        let file = published_by(&server, 3).await;
        assert_eq!(file, published_by(&server, 10_000).await);
        let openings = entries.iter().map(|entered| entered.opening.clone());
        let verdict = judge(&file, vec![open], openings.collect());
        assert_eq!((verdict.entries, verdict.units), (11, 12));
        assert!(!file.contains("u-1"), "no user id is published");

        let orders = by_entry(&entries);
        let mut place = 0;
        for row in rows(&file) {
            let entered = &orders[&row.entry.to_string()];
            if row.won {
                let won = until_status(&server, &entered.order_id, "pending_payment").await;
                assert!(
                    won["receipt"].is_string() && won["expires_at"].is_string(),
                    "{won}"
                );
                assert_eq!(won["entry_token"], entered.opening.token.to_string());
            } else {
                let lost = order(&server, &entered.order_id).await;
                place += 1;
                assert_eq!(
                    (&lost["status"], &lost["position"]),
                    (&json!("waitlisted"), &json!(place))
                );
            }
        }
        // A unit that comes back goes on by rank: to the first for whom it suffices.
        let rows = rows(&file);
        let winner = rows
            .iter()
            .find(|row| row.won && row.quantity.get() == 3)
            .unwrap();
        let mut free = 12
            - rows
                .iter()
                .filter(|row| row.won)
                .map(|row| row.quantity.get())
                .sum::<u32>();
        free += 3;
        let mut next = Vec::new();
        for row in rows.iter().filter(|row| !row.won) {
            if row.quantity.get() <= free {
                free -= row.quantity.get();
                next.push(&orders[&row.entry.to_string()]);
            }
        }
        let winner = &orders[&winner.entry.to_string()];
        assert_eq!(cancel(&server, &winner.order_id).await.status, 200);
        for entered in next {
            until_status(&server, &entered.order_id, "pending_payment").await;
        }
        assert_eq!(order(&server, &left.order_id).await["status"], "cancelled");
        server.assert_audit().await;
        assert!(server.stop().await);
    });
}

#[test]
fn a_beacon_is_taken_once_and_only_after_the_entries_are_fixed_also_over_restarts() {
    block_on(async {
        let database = TestDatabase::create().await;
        let data = test_dir();
        let start = || {
            TestServer::start(&database, |config| {
                config.queue.journal.dir = data.path().to_owned();
            })
        };
        let server = start().await;
        let terms = terms(ENTRIES_MS, Some("drand round 7, hexadecimal"));
        assert_eq!(put(&server, 3, &terms).await.status, 201);
        let beacon = |value: &str| json!({ "beacon": value });
        let supply = async |server: &TestServer, value: &str| {
            server
                .control("POST", "/admin/v1/skus/D/draw", beacon(value))
                .await
        };
        let early = supply(&server, "abcd").await;
        assert_eq!((early.status, &*early.code()), (409, "entries_not_fixed"));
        let mut entries = Vec::new();
        for number in 0..6 {
            // As durable as an order of this kind.
            let body = json!({ "user_id": format!("u-{number}"), "sku_id": "D" });
            let respond_async = [("Prefer", "respond-async")];
            entries.push(entered(&server.post(body, Some("k"), &respond_async).await));
        }
        assert_eq!(
            state(&server).await,
            "entries_open",
            "{ENTRIES_MS} ms were too short"
        );
        assert!(server.stop().await);

        let server = start().await;
        until_state(&server, "entries_fixed").await;
        let fixed = header(&published_by(&server, 100).await);
        assert_eq!(
            (fixed.state, fixed.entries, fixed.seed),
            (State::EntriesFixed, Some(6), None)
        );
        let late = server.order("late", "D", None).await;
        assert_eq!((late.status, &*late.code()), (409, "draw_under_way"));
        // Cancelled now, it stays in the file, and its units go on.
        assert_eq!(cancel(&server, &entries[0].order_id).await.status, 200);
        assert_eq!(server.stock("D").await, (0, 3, 0), "the units are kept");
        assert!(server.stop().await);

        let server = start().await;
        assert_eq!(state(&server).await, "entries_fixed");
        let supplied = supply(&server, "abcd").await;
        assert_eq!(supplied.status, 200, "{supplied:?}");
        until_state(&server, "drawn").await;
        assert_eq!(supply(&server, "abcd").await.status, 200);
        let other = supply(&server, "abce").await;
        assert_eq!((other.status, &*other.code()), (409, "draw_fixed"));

        let file = published_by(&server, 100).await;
        let openings: Vec<_> = entries
            .iter()
            .map(|entered| entered.opening.clone())
            .collect();
        judge(&file, vec![fixed.clone()], openings.clone());
        let orders = by_entry(&entries);
        let live = async |server: &TestServer| {
            let mut live = Vec::new();
            for row in rows(&file) {
                let order = order(server, &orders[&row.entry.to_string()].order_id).await;
                live.push((order["status"].clone(), order["position"].clone()));
            }
            live
        };
        wait_until("three winners", async || {
            let live = live(&server).await;
            live.iter()
                .filter(|(status, _)| status == "pending_payment")
                .count()
                == 3
        })
        .await;
        let before = live(&server).await;
        assert!(server.stop().await);
        let server = start().await;
        assert_eq!(live(&server).await, before);
        assert_eq!(published_by(&server, 2).await, file);
        // Restock after the draw goes by rank, and whoever joins now stands behind.
        let body = json!({ "user_id": "late", "sku_id": "D", "waitlist": true });
        let late = server.post(body, None, &[]).await.json();
        assert_eq!(
            (&late["status"], &late["position"]),
            (&json!("waitlisted"), &json!(3))
        );
        assert!(late.get("entry_token").is_none(), "{late}");
        let restock = server.control("POST", "/admin/v1/skus/D/restock", json!({ "quantity": 2 }));
        assert_eq!(restock.await.status, 200);
        let mut waiting = rows(&file).into_iter().zip(&before);
        for (row, _) in waiting
            .by_ref()
            .filter(|(_, (status, _))| status == "waitlisted")
        {
            let id = &orders[&row.entry.to_string()].order_id;
            until_status(&server, id, "pending_payment").await;
        }
        assert_eq!(
            order(&server, late["order_id"].as_str().unwrap()).await["position"],
            1
        );
        server.assert_audit().await;
        assert!(server.stop().await);
    });
}

#[test]
fn what_a_draw_cannot_be_asked_is_refused_in_words() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        server.put_sku("A", 1, Value::Null).await;
        let body = json!({ "beacon": "x" });
        for (method, target, body, status, code) in [
            (
                "POST",
                "/admin/v1/skus/A/draw",
                body.clone(),
                404,
                "no_draw",
            ),
            (
                "POST",
                "/admin/v1/skus/B/draw",
                body.clone(),
                404,
                "unknown_sku",
            ),
            (
                "POST",
                "/admin/v1/skus/A/draw",
                json!({ "beacon": "a b" }),
                400,
                "invalid_field",
            ),
        ] {
            let answer = server.control(method, target, body).await;
            assert_eq!((answer.status, &*answer.code()), (status, code), "{target}");
        }
        for (target, status, code) in [
            ("/v1/skus/A/draw", 404, "no_draw"),
            ("/v1/skus/B/draw", 404, "unknown_sku"),
            ("/v1/skus/A/draw?limit=0", 400, "invalid_field"),
            ("/v1/skus/A/draw?page=2", 400, "unknown_field"),
        ] {
            let answer = server.get(target).await;
            assert_eq!((answer.status, &*answer.code()), (status, code), "{target}");
        }
        assert_eq!(put(&server, 1, &terms(60_000, None)).await.status, 201);
        let answer = server.control("POST", "/admin/v1/skus/D/draw", body).await;
        assert_eq!((answer.status, &*answer.code()), (409, "no_beacon"));
        // Until the first entry the terms are free, and the seed stays all the same.
        let first = server.get("/v1/skus/D").await.json();
        let changed = put(&server, 2, &terms(50_000, Some("a beacon")))
            .await
            .json();
        assert_eq!(changed["draw_commitment"], first["draw_commitment"]);
        let sold = put(&server, 2, &json!({})).await.json();
        assert!(sold.get("draw_at").is_none(), "{sold}");
        let again = put(&server, 2, &terms(50_000, None)).await.json();
        assert_eq!(again["draw_commitment"], first["draw_commitment"]);
        // A list has an allocation, too.
        assert_eq!(server.order("u", "A", None).await.status, 201);
        let body = json!({ "user_id": "v", "sku_id": "A", "waitlist": true });
        assert_eq!(server.post(body, None, &[]).await.status, 202);
        let mut body = json!({ "unit_price": 100, "currency": "EUR", "total": 1 });
        body.as_object_mut()
            .unwrap()
            .extend(terms(50_000, None).as_object().unwrap().clone());
        let refused = server.control("PUT", "/admin/v1/skus/A", body).await;
        assert_eq!(
            (refused.status, &*refused.code()),
            (409, "allocation_fixed")
        );
        assert!(server.stop().await);
    });
}

// --- Killed ------------------------------------------------------------------------------------

#[test]
fn a_draw_that_is_killed_at_any_step_goes_on_and_is_the_same() {
    let data_dir = test_dir();
    block_on(copy_template(data_dir.path()));
    let log = data_dir.path().join("serve.log");
    let start = |point: Option<&str>| {
        let fault = point.map(|point| ("MILLRACE_FAULT".to_owned(), format!("crash@{point}")));
        let settings: Vec<_> = fault.into_iter().collect();
        Served::try_start(data_dir.path(), &settings, &log)
    };
    let mut served = start(Some("draw.fixed")).unwrap_or_else(|ended| panic!("{ended:?}"));
    let mut body = json!({ "unit_price": 100, "currency": "EUR", "total": 5 });
    body.as_object_mut()
        .unwrap()
        .extend(terms(ENTRIES_MS, None).as_object().unwrap().clone());
    let made = call(
        served.control,
        "PUT",
        "/admin/v1/skus/D",
        &[],
        &body.to_string(),
    );
    assert_eq!(made.status, 201, "{made:?}");
    let mut openings = Vec::new();
    for number in 0..20 {
        let body = json!({ "user_id": format!("u-{number}"), "sku_id": "D" }).to_string();
        let fields = [
            ("Content-Type", "application/json"),
            ("Idempotency-Key", "k"),
        ];
        let answer = call(served.data, "POST", "/v1/orders", &fields, &body);
        openings.push(entered(&answer).opening);
    }
    let killed = served.child.wait().expect("its status");
    assert_eq!(killed.signal(), Some(Signal::KILL.as_raw()));
    // Each comes to its step by itself, while it serves or before it is ready.
    for point in ["draw.ranked", "draw.drawn"] {
        match start(Some(point)) {
            Ok(mut served) => {
                let killed = served.child.wait().expect("its status");
                assert_eq!(killed.signal(), Some(Signal::KILL.as_raw()), "{point}");
            }
            Err(ended) => assert!(ended.is_killed(), "{point}: {ended:?}"),
        }
    }
    let served = start(None).unwrap_or_else(|ended| panic!("{ended:?}"));
    // Its five units are assigned, too: the audit compares memory with rows, which an assignment moves one after the other.
    let is_drawn = || {
        let sku = call(served.data, "GET", "/v1/skus/D", &[], "").json();
        sku["state"] == "drawn" && sku["waiting"] == 15
    };
    crate::support::waiting::until("drawn", crate::support::waiting::PATIENCE, is_drawn);
    let file = published(served.data, 7);
    let verdict = judge(&file, Vec::new(), openings);
    assert_eq!((verdict.entries, verdict.winners), (20, 5));
    let audit = call(served.control, "GET", "/admin/v1/audit", &[], "").json();
    assert_eq!(audit["ok"], true, "{audit:#}");
    served.terminate();
    assert_eq!(served.wait(), Some(0));
}
