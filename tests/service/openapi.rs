//! The OpenAPI document is valid, names exactly the routes that there are, and tells the truth:
//! real answers of a running Millrace are held against it, status by status.

mod events;
#[path = "../providers/fixture.rs"]
#[allow(dead_code, reason = "it is shared with the tests of the providers")]
mod fixture;
mod payments;

use std::collections::BTreeSet;

use crate::support::block_on;
use crate::support::http::Answer;
use crate::support::postgres::TestDatabase;
use crate::support::server::{TestServer, request};
use crate::support::waiting::wait_until;
use crate::support::webhook::SECRET;
use jsonschema::Validator;
use millrace::http::OPENAPI;
use millrace::http::control_plane;
use millrace::http::data_plane::router::ROUTES;
use millrace::order::UnixMillis;
use serde_json::{Value, json};

fn document() -> Value {
    serde_json::from_str(OPENAPI).expect("the document is JSON")
}

/// Follows one reference into the document.
fn resolve<'a>(document: &'a Value, value: &'a Value) -> &'a Value {
    match value["$ref"].as_str() {
        Some(reference) => document
            .pointer(reference.trim_start_matches('#'))
            .unwrap_or_else(|| panic!("{reference} leads nowhere")),
        None => value,
    }
}

/// A validator for a schema of the document; its references lead into the document's components.
fn validator(document: &Value, schema: &Value) -> Validator {
    let whole = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "allOf": [schema],
        "components": document["components"],
    });
    jsonschema::options()
        .should_validate_formats(true)
        .build(&whole)
        .expect("a schema that compiles")
}

fn operations(document: &Value) -> BTreeSet<(String, String)> {
    let paths = document["paths"].as_object().expect("paths");
    let operations = paths.iter().flat_map(|(path, item)| {
        let methods = item.as_object().expect("a path item").keys();
        methods
            .filter(|name| *name != "servers")
            .map(|method| (method.to_uppercase(), path.clone()))
    });
    operations.collect()
}

#[test]
fn it_is_valid_openapi_3_1_with_valid_schemas() {
    let document = document();
    let meta: Value = serde_json::from_str(include_str!("../data/openapi-3.1.schema.json"))
        .expect("the OpenAPI Initiative's schema");
    let meta = jsonschema::validator_for(&meta).expect("a schema that compiles");
    let wrong: Vec<_> = meta
        .iter_errors(&document)
        .map(|error| format!("{}: {error}", error.instance_path))
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    let schemas = document["components"]["schemas"].as_object();
    for (name, schema) in schemas.expect("schemas") {
        assert!(jsonschema::meta::is_valid(schema), "{name}");
        validator(&document, schema);
        for example in schema["examples"].as_array().into_iter().flatten() {
            assert!(validator(&document, schema).is_valid(example), "{name}");
        }
    }
}

#[test]
fn it_names_every_route_of_both_planes_and_no_other() {
    let routes = ROUTES.into_iter().chain(control_plane::router::routes());
    let served: BTreeSet<(String, String)> = routes
        .map(|(method, path)| (method.to_owned(), path.to_owned()))
        .collect();
    assert_eq!(operations(&document()), served);
}

/// Holds answers against the document and remembers which it has seen.
struct Checker {
    document: Value,
    seen: BTreeSet<String>,
}

impl Checker {
    fn new() -> Self {
        Checker {
            document: document(),
            seen: BTreeSet::new(),
        }
    }

    fn check(&mut self, method: &str, path: &str, answer: &Answer) {
        let status = answer.status.to_string();
        let place = format!("{method} {path} {status}");
        let operation = &self.document["paths"][path][method.to_lowercase()];
        assert!(operation.is_object(), "{place}: no such operation");
        let response = resolve(&self.document, &operation["responses"][&status]);
        assert!(
            response.is_object(),
            "{place} is not documented: {answer:?}"
        );
        for (name, header) in response["headers"].as_object().into_iter().flatten() {
            let header = resolve(&self.document, header);
            let value = answer.field(&name.to_lowercase());
            assert!(
                value.is_some() || header["required"] != true,
                "{place}: no {name}"
            );
            if let Some(value) = value {
                let value = value
                    .parse()
                    .map_or(json!(value), |number: u64| json!(number));
                let valid = validator(&self.document, &header["schema"]).is_valid(&value);
                assert!(valid, "{place}: {name}: {value}");
            }
        }
        let Some(content) = response["content"].as_object() else {
            assert!(answer.body.is_empty(), "{place}: a body");
            self.seen.insert(place);
            return;
        };
        let Some(media_type) = answer.field("content-type") else {
            // Some platforms want no body where others want a word.
            assert!(answer.body.is_empty(), "{place}: no Content-Type");
            assert!(!content.contains_key("application/json"), "{place}: empty");
            self.seen.insert(place);
            return;
        };
        let media_type = media_type.split(';').next().unwrap_or_default();
        let schema = &content
            .get(media_type)
            .unwrap_or_else(|| panic!("{place}: {media_type}"))["schema"];
        let body = match media_type {
            "application/x-ndjson" => {
                let lines = answer.body.split(|byte| *byte == b'\n');
                let lines = lines.filter(|line| !line.is_empty());
                lines
                    .map(|line| serde_json::from_slice::<Value>(line).expect("a line of JSON"))
                    .collect()
            }
            "application/json" | "application/problem+json" => answer.json(),
            _ => json!(String::from_utf8_lossy(&answer.body)),
        };
        let wrong: Vec<_> = validator(&self.document, schema)
            .iter_errors(&body)
            .map(|error| format!("{}: {error}", error.instance_path))
            .collect();
        assert!(wrong.is_empty(), "{place}: {wrong:#?}\n{body:#}");
        self.seen.insert(place);
    }
}

const JSON: (&str, &str) = ("Content-Type", "application/json");
const SHOP: (&str, &str) = ("Authorization", "Bearer shop");
const OPS: (&str, &str) = ("Authorization", "Bearer ops");

/// A draw from its terms to its published file, and the refusals that only it meets.
#[test]
fn a_draw_is_what_it_says() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        let mut checker = Checker::new();
        let now = UnixMillis::now();
        let terms = json!({
            "unit_price": 5, "currency": "EUR", "total": 1, "allocation": "draw", "draw_beacon": "drand round 7",
            "opens_at": UnixMillis(now.0 - 60_000).to_string(), "draw_at": now.plus_ms(4_000).to_string(),
            "closes_at": now.plus_ms(600_000).to_string(),
        });
        let (sku, draw) = ("/admin/v1/skus/{sku_id}", "/admin/v1/skus/{sku_id}/draw");
        let mut put = async |terms: &Value, status: u16| {
            let answer = server
                .control("PUT", "/admin/v1/skus/D", terms.clone())
                .await;
            assert_eq!(answer.status, status, "{answer:?}");
            checker.check("PUT", sku, &answer);
        };
        put(&terms, 201).await;
        put(&terms, 200).await;
        let order = |user: &str| json!({ "user_id": user, "sku_id": "D" });
        let entered = server.post(order("a"), Some("k"), &[]).await;
        assert_eq!(entered.status, 202, "{entered:?}");
        let mut other = terms.clone();
        other["unit_price"] = json!(6);
        put(&other, 409).await;
        checker.check("POST", "/v1/orders", &entered);
        let supply = async |beacon: &str| {
            let body = json!({ "beacon": beacon });
            server.control("POST", "/admin/v1/skus/D/draw", body).await
        };
        let early = supply("4242").await;
        assert_eq!(early.status, 409, "{early:?}");
        checker.check("POST", draw, &early);
        let published = async |checker: &mut Checker, state: &str| {
            let is_there = async || server.get("/v1/skus/D").await.json()["state"] == state;
            wait_until(state, is_there).await;
            let page = server.get("/v1/skus/D/draw?limit=1").await;
            assert_eq!(page.status, 200, "{page:?}");
            checker.check("GET", "/v1/skus/{sku_id}/draw", &page);
            let sku = server.get("/v1/skus/D").await;
            checker.check("GET", "/v1/skus/{sku_id}", &sku);
        };
        published(&mut checker, "entries_open").await;
        published(&mut checker, "entries_fixed").await;
        let late = server.post(order("late"), None, &[]).await;
        assert_eq!(late.code(), "draw_under_way");
        checker.check("POST", "/v1/orders", &late);
        for (beacon, status) in [("a b", 400), ("4242", 200), ("4242", 200), ("4243", 409)] {
            let answer = supply(beacon).await;
            assert_eq!(answer.status, status, "{answer:?}");
            checker.check("POST", draw, &answer);
        }
        published(&mut checker, "drawn").await;
        for target in ["/v1/skus/E/draw", "/v1/skus/D/draw?limit=0"] {
            checker.check("GET", "/v1/skus/{sku_id}/draw", &server.get(target).await);
        }
        assert!(server.stop().await);
    });
}

/// Orders that wait for units, assigned ones, and the refusals that only they meet.
#[test]
fn waiting_orders_are_what_it_says() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        let mut checker = Checker::new();
        let terms = json!({
            "unit_price": 5, "currency": "EUR", "total": 1, "waitlist_max": 1, "waitlist_skips": true,
            "waitlist_payment_ttl_ms": 60_000, "assign_between": ["00:00Z", "23:59+00:00"],
        });
        let put = server.control("PUT", "/admin/v1/skus/A", terms).await;
        checker.check("PUT", "/admin/v1/skus/{sku_id}", &put);
        let order = |user: &str| json!({ "user_id": user, "sku_id": "A", "waitlist": true });
        let mut ids = Vec::new();
        for (user, status) in [("a", 201), ("b", 202), ("b", 200), ("c", 409)] {
            let answer = server.post(order(user), Some("k"), &[]).await;
            assert_eq!(answer.status, status, "{answer:?}");
            checker.check("POST", "/v1/orders", &answer);
            ids.extend(answer.json()["order_id"].as_str().map(str::to_owned));
        }
        let (first, waiting) = (&ids[0], &ids[1]);
        let line = json!({ "user_id": "d", "sku_id": "A", "waitlist": true }).to_string();
        let ndjson = [("Content-Type", "application/x-ndjson")];
        let batch = request(server.data, "POST", "/v1/orders:batch", &ndjson, line).await;
        checker.check("POST", "/v1/orders:batch", &batch);
        let path = "/v1/orders/{order_id}";
        let get = |id: &str| format!("/v1/orders/{id}");
        checker.check("GET", path, &server.get(&get(waiting)).await);
        checker.check("GET", "/v1/skus/{sku_id}", &server.get("/v1/skus/A").await);
        let cancel = "/v1/orders/{order_id}/cancel";
        for (id, only, status) in [
            (first, "?only=waitlisted", 409),
            (first, "?only=x", 400),
            (waiting, "?only=waitlisted", 200),
        ] {
            let target = format!("{}/cancel{only}", get(id));
            let answer = request(server.data, "POST", &target, &[], String::new()).await;
            assert_eq!(answer.status, status, "{answer:?}");
            checker.check("POST", cancel, &answer);
        }
        for target in ["/admin/v1/live", "/admin/v1/audit"] {
            checker.check(
                "GET",
                target,
                &server.control("GET", target, Value::Null).await,
            );
        }
        assert!(server.stop().await);
    });
}

#[test]
fn real_answers_are_what_it_says() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |config| {
            config.data_plane.token.0 = vec!["shop".into()];
            config.control_plane.token.0 = vec!["ops".into()];
            config.rate_limit.per_user = "20/min".to_owned().try_into().expect("a rate");
            config.payments = fixture::config();
            config.payments.standard.secret.0.push(SECRET.to_owned());
            // Orphans stay until somebody looks.
            config.payments.orphan_check_ms = 3_600_000;
        })
        .await;
        let mut checker = Checker::new();
        let (shop, ops) = (SHOP, OPS);
        let key = |key| ("Idempotency-Key", key);
        let prefer = ("Prefer", "wait=5");

        // Method, route, what its braces are, the query, fields, body, status.
        type Case<'a> = (
            &'a str,
            &'a str,
            &'a str,
            &'a str,
            Vec<(&'a str, &'a str)>,
            String,
            u16,
        );
        let (sku, restock) = ("/admin/v1/skus/{sku_id}", "/admin/v1/skus/{sku_id}/restock");
        let terms = json!({ "unit_price": 5, "currency": "EUR", "total": 3, "per_user_limit": 2,
            "opens_at": "2020-01-01T00:00:00+08:00" });
        let mut limited = terms.clone();
        limited["total"] = json!(0);
        let form = ("Content-Type", "application/x-www-form-urlencoded");
        let control: Vec<Case<'_>> = vec![
            ("GET", "/healthz", "", "", vec![], String::new(), 200),
            ("GET", "/readyz", "", "", vec![], String::new(), 200),
            ("GET", "/metrics", "", "", vec![], String::new(), 200),
            ("GET", "/", "", "", vec![], String::new(), 200),
            (
                "POST",
                "/login",
                "",
                "",
                vec![form],
                "token=ops".into(),
                303,
            ),
            (
                "POST",
                "/login",
                "",
                "",
                vec![form],
                "token=spo".into(),
                401,
            ),
            ("POST", "/login", "", "", vec![form], "tok=ops".into(), 400),
            ("POST", "/login", "", "", vec![JSON], "{}".into(), 415),
            (
                "POST",
                "/login",
                "",
                "",
                vec![form],
                "a".repeat(70_000),
                413,
            ),
            (
                "POST",
                "/login",
                "",
                "",
                vec![("Origin", "null")],
                String::new(),
                403,
            ),
            ("POST", "/logout", "", "", vec![], String::new(), 303),
            (
                "GET",
                "/openapi.json",
                "",
                "",
                vec![ops],
                String::new(),
                200,
            ),
            ("GET", "/openapi.json", "", "", vec![], String::new(), 401),
            ("PUT", sku, "A", "", vec![ops], terms.to_string(), 201),
            ("PUT", sku, "A", "", vec![ops], terms.to_string(), 200),
            ("PUT", sku, "A", "", vec![ops], "{}".into(), 400),
            ("PUT", sku, "A", "?x=1", vec![ops], terms.to_string(), 400),
            (
                "PUT",
                sku,
                "A",
                "",
                vec![ops, ("Content-Encoding", "gzip")],
                terms.to_string(),
                415,
            ),
            (
                "POST",
                "/admin/v1/pause",
                "",
                "",
                vec![ops],
                r#"{"x":1}"#.into(),
                400,
            ),
            (
                "GET",
                "/admin/v1/audit",
                "",
                "?x=1",
                vec![ops],
                String::new(),
                400,
            ),
            ("PUT", sku, "A", "", vec![ops], " ".repeat(70_000), 413),
            ("PUT", sku, "A", "", vec![], terms.to_string(), 401),
            ("PUT", sku, "%ff", "", vec![ops], terms.to_string(), 404),
            (
                "POST",
                restock,
                "A",
                "",
                vec![ops, key("r")],
                r#"{"quantity":1}"#.into(),
                200,
            ),
            (
                "POST",
                restock,
                "A",
                "",
                vec![ops, key("r")],
                r#"{"quantity":1}"#.into(),
                200,
            ),
            (
                "POST",
                restock,
                "A",
                "",
                vec![ops, key("r")],
                r#"{"quantity":2}"#.into(),
                422,
            ),
            (
                "POST",
                restock,
                "A",
                "",
                vec![ops, key("a b")],
                r#"{"quantity":2}"#.into(),
                400,
            ),
            (
                "POST",
                restock,
                "B",
                "",
                vec![ops],
                r#"{"quantity":2}"#.into(),
                404,
            ),
            (
                "POST",
                "/admin/v1/skus/{sku_id}/pause",
                "A",
                "",
                vec![ops],
                String::new(),
                200,
            ),
            (
                "POST",
                "/admin/v1/skus/{sku_id}/resume",
                "A",
                "",
                vec![ops],
                String::new(),
                200,
            ),
            (
                "POST",
                "/admin/v1/skus/{sku_id}/resume",
                "B",
                "",
                vec![ops],
                String::new(),
                404,
            ),
            (
                "POST",
                "/admin/v1/pause",
                "",
                "",
                vec![ops],
                String::new(),
                200,
            ),
            (
                "POST",
                "/admin/v1/resume",
                "",
                "",
                vec![ops],
                String::new(),
                200,
            ),
            (
                "GET",
                "/admin/v1/profile",
                "",
                "?seconds=1",
                vec![ops],
                String::new(),
                200,
            ),
            (
                "GET",
                "/admin/v1/profile",
                "",
                "?seconds=1&format=folded",
                vec![ops],
                String::new(),
                200,
            ),
            (
                "GET",
                "/admin/v1/profile",
                "",
                "?hz=0",
                vec![ops],
                String::new(),
                400,
            ),
            (
                "GET",
                "/admin/v1/profile",
                "",
                "",
                vec![],
                String::new(),
                401,
            ),
        ];
        let order = |user: &str| json!({ "user_id": user, "sku_id": "A" }).to_string();
        let place = "/v1/orders";
        let big = json!({ "user_id": "u", "sku_id": "A", "quantity": 3 }).to_string();
        let data: Vec<Case<'_>> = vec![
            (
                "POST",
                place,
                "",
                "",
                vec![shop, JSON, key("k"), prefer],
                order("u"),
                201,
            ),
            (
                "POST",
                place,
                "",
                "",
                vec![shop, JSON, key("k")],
                order("u"),
                200,
            ),
            (
                "POST",
                place,
                "",
                "",
                vec![shop, JSON, key("k")],
                big.clone(),
                422,
            ),
            ("POST", place, "", "", vec![shop, JSON], big, 409),
            ("POST", place, "", "", vec![shop, JSON], "{".into(), 400),
            (
                "POST",
                place,
                "",
                "",
                vec![shop, JSON],
                order("u").replace('A', "B"),
                404,
            ),
            ("POST", place, "", "", vec![shop], order("u"), 415),
            ("POST", place, "", "", vec![JSON], order("u"), 401),
            (
                "POST",
                place,
                "",
                "",
                vec![shop, JSON],
                " ".repeat(20_000),
                413,
            ),
            (
                "POST",
                place,
                "",
                "",
                vec![shop, JSON, ("Expect", "more")],
                order("u"),
                417,
            ),
            (
                "POST",
                place,
                "",
                "",
                vec![shop, ("Transfer-Encoding", "gzip")],
                String::new(),
                400,
            ),
            (
                "POST",
                "/v1/orders:batch",
                "",
                "",
                vec![shop, JSON, prefer],
                format!("{}\n{{\n{}\n", order("v"), order("w").replace('A', "B")),
                200,
            ),
            (
                "POST",
                "/v1/orders:batch",
                "",
                "",
                vec![shop, JSON],
                String::new(),
                400,
            ),
            (
                "POST",
                "/v1/orders:batch",
                "",
                "",
                vec![shop],
                "x".into(),
                415,
            ),
            (
                "POST",
                "/v1/orders:batch",
                "",
                "",
                vec![shop, JSON, key("k")],
                order("v"),
                400,
            ),
            (
                "POST",
                "/v1/orders:batch",
                "",
                "?x=1",
                vec![shop, JSON],
                order("v"),
                400,
            ),
            (
                "GET",
                "/v1/skus/{sku_id}",
                "A",
                "?x=1",
                vec![shop],
                String::new(),
                400,
            ),
            (
                "GET",
                "/v1/skus/{sku_id}",
                "A",
                "",
                vec![shop, ("Content-Encoding", "gzip")],
                String::new(),
                415,
            ),
            (
                "POST",
                "/v1/orders:batch",
                "",
                "",
                vec![shop, JSON],
                "\n".repeat(2_000),
                413,
            ),
            (
                "GET",
                "/v1/skus/{sku_id}",
                "A",
                "",
                vec![shop],
                String::new(),
                200,
            ),
            (
                "GET",
                "/v1/skus/{sku_id}",
                "B",
                "",
                vec![shop],
                String::new(),
                404,
            ),
            (
                "GET",
                "/v1/skus/{sku_id}",
                "%ff",
                "",
                vec![shop],
                String::new(),
                404,
            ),
            (
                "GET",
                "/v1/orders/{order_id}",
                "1",
                "",
                vec![shop],
                String::new(),
                404,
            ),
            (
                "GET",
                "/v1/orders/{order_id}",
                "x",
                "",
                vec![shop],
                String::new(),
                404,
            ),
            (
                "GET",
                "/v1/orders/{order_id}",
                "1",
                "?wait=x",
                vec![shop],
                String::new(),
                400,
            ),
            (
                "POST",
                "/v1/orders/{order_id}/cancel",
                "1",
                "",
                vec![shop],
                String::new(),
                404,
            ),
            (
                "GET",
                "/v1/users/{user_id}/orders",
                "u",
                "",
                vec![shop],
                String::new(),
                200,
            ),
            (
                "GET",
                "/v1/users/{user_id}/orders",
                "u",
                "?limit=0",
                vec![shop],
                String::new(),
                400,
            ),
        ];
        let mut placed = Value::Null;
        for (address, cases) in [(server.control, control), (server.data, data)] {
            for (method, path, name, query, fields, body, status) in cases {
                let at = path.find('{').zip(path.find('}'));
                let target = match at {
                    Some((from, to)) => format!("{}{name}{}", &path[..from], &path[to + 1..]),
                    None => path.to_owned(),
                };
                let target = format!("{target}{query}");
                let answer = request(address, method, &target, &fields, body).await;
                assert_eq!(answer.status, status, "{method} {target}: {answer:?}");
                checker.check(method, path, &answer);
                if status == 201 && path == place {
                    placed = answer.json()["order_id"].clone();
                }
            }
        }
        let placed = placed.as_str().expect("the order's id");
        for (method, path, status) in [
            ("GET", "/v1/orders/{order_id}", 200),
            ("POST", "/v1/orders/{order_id}/cancel", 200),
        ] {
            let target = path.replace("{order_id}", placed);
            let answer = request(server.data, method, &target, &[shop], String::new()).await;
            assert_eq!(answer.status, status, "{answer:?}");
            checker.check(method, path, &answer);
        }
        for _ in 0..20 {
            request(server.data, "POST", place, &[shop, JSON], order("u")).await;
        }
        let answer = request(server.data, "POST", place, &[shop, JSON], order("u")).await;
        assert_eq!(answer.status, 429, "{answer:?}");
        checker.check("POST", place, &answer);

        // The database refuses a row.
        let rows = database.connect().await;
        rows.batch_execute(
            "ALTER TABLE millrace.orders ADD CONSTRAINT no_m CHECK (user_id <> 'm')",
        )
        .await
        .expect("a rule");
        let answer = request(server.data, "POST", place, &[shop, JSON], order("m")).await;
        assert_eq!(answer.status, 500, "{answer:?}");
        checker.check("POST", place, &answer);
        let letters = "/admin/v1/dead-letters";
        let list = request(server.control, "GET", letters, &[ops], String::new()).await;
        let id = list.json()["dead_letters"][0]["id"].to_string();
        checker.check("GET", letters, &list);
        for (method, path, id, body, status) in [
            ("GET", "/admin/v1/dead-letters/{id}", id.as_str(), "", 200),
            ("GET", "/admin/v1/dead-letters/{id}", "x", "", 404),
            ("POST", "/admin/v1/dead-letters/{id}/retry", &id, "", 409),
            (
                "POST",
                "/admin/v1/dead-letters/{id}/discard",
                &id,
                r#"{"note":5}"#,
                400,
            ),
            (
                "POST",
                "/admin/v1/dead-letters/{id}/discard",
                &id,
                r#"{"note":"bot"}"#,
                200,
            ),
            ("POST", "/admin/v1/dead-letters/{id}/retry", &id, "", 404),
        ] {
            let target = path.replace("{id}", id);
            let answer = request(server.control, method, &target, &[ops], body.into()).await;
            assert_eq!(answer.status, status, "{method} {target}: {answer:?}");
            checker.check(method, path, &answer);
        }
        payments::check(&server, &database, &mut checker).await;
        events::check(&server, &database, &mut checker).await;
        let drain = "/admin/v1/nodes/{node}/drain";
        let target = drain.replace("{node}", "0");
        let answer = request(server.control, "POST", &target, &[ops], String::new()).await;
        assert_eq!(answer.status, 404, "{answer:?}");
        checker.check("POST", drain, &answer);
        for path in [
            "/admin/v1/audit",
            "/admin/v1/live",
            "/admin/v1/nodes",
            "/admin/v1/skus",
            letters,
        ] {
            let answer = request(server.control, "GET", path, &[ops], String::new()).await;
            assert_eq!(answer.status, 200, "{answer:?}");
            checker.check("GET", path, &answer);
        }
        for (query, status) in [
            ("?prepare=maybe", 400),
            ("?orders=10&rate=5&prepare=true", 200),
        ] {
            let path = "/admin/v1/preflight";
            let target = format!("{path}{query}");
            let answer = request(server.control, "POST", &target, &[ops], String::new()).await;
            assert_eq!(answer.status, status, "{answer:?}");
            checker.check("POST", path, &answer);
        }

        // Every route answers a method that it does not have, and names those that it has.
        for (method, path) in operations(&checker.document.clone()) {
            let (address, token) = if path.starts_with("/v1/") {
                (server.data, shop)
            } else {
                (server.control, ops)
            };
            let target = path
                .replace("{order_id}", placed)
                .replace("{sku_id}", "A")
                .replace("{user_id}", "u")
                .replace("{provider}", "standard")
                .replace("{id}", "1")
                .replace("{sink}", "erp")
                .replace("{node}", "0")
                .replace("/profile", "/profile?seconds=1");
            for wrong in ["DELETE", "OPTIONS", "TRACE", "PROPFIND"] {
                let answer = request(address, wrong, &target, &[token], String::new()).await;
                assert_eq!(answer.status, 405, "{wrong} {target}: {answer:?}");
                checker.check(&method, &path, &answer);
                let allowed = answer.field("allow").expect("Allow");
                assert!(
                    allowed.split(',').any(|allowed| allowed.trim() == method),
                    "{wrong} {target}: {allowed}"
                );
            }
            if method == "GET" {
                let get = request(address, "GET", &target, &[token], String::new()).await;
                assert!(matches!(get.status, 200 | 404), "{target}: {get:?}");
            }
        }
        let succeeds = |(method, path): &(String, String)| {
            checker.seen.iter().any(|seen| {
                seen.starts_with(&format!("{method} {path} ")) && seen[seen.len() - 3..] < *"400"
            })
        };
        let never: Vec<_> = operations(&checker.document)
            .into_iter()
            .filter(|operation| !succeeds(operation))
            .map(|(_, path)| path)
            .collect();
        // A retry that succeeds is in tests/service/contract.rs, a node in tests/cluster, a draw above.
        let elsewhere = [
            "/v1/skus/{sku_id}/draw",
            "/admin/v1/dead-letters/{id}/retry",
            "/admin/v1/nodes/{node}/drain",
            "/admin/v1/skus/{sku_id}/draw",
        ];
        assert_eq!(never, elsewhere);
        assert!(server.stop().await);
    });
}
