//! Every door is shut until it is opened: who may call is judged before a body is read, and what a
//! request brings along is honoured or refused in words.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crate::support::block_on;
use crate::support::http::Answer;
use crate::support::postgres::TestDatabase;
use crate::support::server::{TestServer, request};
use serde_json::{Value, json};

/// What the server says to bytes after which the client sends no more and leaves its side open.
fn said(address: SocketAddr, input: &str) -> String {
    let mut stream = TcpStream::connect(address).expect("a connection");
    let patience = Some(Duration::from_secs(20));
    stream.set_read_timeout(patience).expect("a timeout");
    stream.write_all(input.as_bytes()).expect("sent");
    let mut said = Vec::new();
    stream
        .read_to_end(&mut said)
        .expect("an answer and a close");
    String::from_utf8(said).expect("text")
}

fn verdict(answer: &Answer) -> (u16, String) {
    (answer.status, answer.code())
}

#[test]
fn who_has_no_token_is_told_so_before_a_byte_of_the_body_is_read() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |config| {
            config.data_plane.token.0 = vec!["t0ken".into()];
            config.payments.stripe.secret.0 = vec!["whsec_x".into()];
        })
        .await;
        let data = server.data;
        let head = |path: &str, more: &str| {
            format!("POST {path} HTTP/1.1\r\nHost: h\r\nContent-Length: 5000\r\n{more}\r\n")
        };
        let asked = tokio::task::spawn_blocking(move || {
            let bad = "Authorization: Bearer other\r\n";
            for (path, more) in [("/v1/orders", ""), ("/v1/orders:batch", bad), ("/x", "")] {
                let said = said(data, &head(path, more));
                assert!(said.starts_with("HTTP/1.1 401 "), "{path}: {said}");
            }
            // A platform has no token. One that is not configured has nothing to say either.
            let said = said(data, &head("/v1/payments/alipay/notify", ""));
            assert!(said.starts_with("HTTP/1.1 404 "), "{said}");
        });
        asked.await.expect("asked");
        let unsigned = request(
            server.data,
            "POST",
            "/v1/payments/stripe/notify",
            &[],
            "x".repeat(5_000),
        )
        .await;
        assert_eq!(verdict(&unsigned), (401, "invalid_signature".into()));
        assert!(server.stop().await);
    });
}

#[test]
fn without_a_token_only_names_of_this_machine_are_answered_and_no_other_site() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        server.put_sku("A", 5, json!({})).await;
        let order = server.order("u", "A", None).await.json();
        let path = format!("/v1/orders/{}", order["order_id"].as_str().expect("an id"));
        let misdirected = (421, "misdirected".to_owned());
        let under = async |plane: SocketAddr, method: &str, target: &str, host: &str| {
            request(plane, method, target, &[("Host", host)], String::new()).await
        };
        for target in [
            "/admin/v1/skus",
            "/admin/v1/live",
            "/",
            "/metrics",
            "/nowhere",
        ] {
            let answer = under(server.control, "GET", target, "evil.example:8081").await;
            assert_eq!(verdict(&answer), misdirected, "{target}");
            assert!(answer.field("access-control-allow-origin").is_none());
        }
        let cancel = format!("{path}/cancel");
        for (method, target) in [
            ("GET", path.as_str()),
            ("GET", "/v1/users/u/orders"),
            ("POST", &cancel),
        ] {
            let answer = under(server.data, method, target, "evil.example:8080").await;
            assert_eq!(verdict(&answer), misdirected, "{target}");
        }
        for host in ["localhost", "localhost:1", "[::1]:8081"] {
            let answer = under(server.control, "GET", "/admin/v1/skus", host).await;
            assert_eq!(answer.status, 200, "{host}");
            let answer = under(server.data, "GET", &path, host).await;
            assert_eq!(answer.status, 200, "{host}");
        }
        // What a page elsewhere can send without being asked first: no body, no type.
        for from in [
            ("Sec-Fetch-Site", "cross-site"),
            ("Sec-Fetch-Site", "same-site"),
            ("Origin", "http://evil.example"),
            ("Origin", "null"),
        ] {
            let answer = request(server.data, "POST", &cancel, &[from], String::new()).await;
            assert_eq!(verdict(&answer), (403, "cross_origin".into()), "{from:?}");
        }
        assert_eq!(server.get(&path).await.json()["status"], "pending_payment");
        let answer = request(server.data, "POST", &cancel, &[], String::new()).await;
        assert_eq!(answer.status, 200);
        assert!(server.stop().await);
    });
}

#[test]
fn with_a_token_or_in_a_trusted_network_any_name_is_answered() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |config| {
            config.control_plane.token.0 = vec!["t".into()];
            config.data_plane.trust_network = true;
        })
        .await;
        let named = [
            ("Host", "millrace.internal:8080"),
            ("Authorization", "Bearer t"),
        ];
        let answer = request(
            server.control,
            "GET",
            "/admin/v1/skus",
            &named,
            String::new(),
        )
        .await;
        assert_eq!(answer.status, 200);
        let answer = request(server.data, "GET", "/v1/skus/A", &named, String::new()).await;
        assert_eq!(verdict(&answer), (404, "unknown_sku".into()));
        assert!(server.stop().await);
    });
}

#[test]
fn what_a_request_brings_along_is_honoured_or_refused_in_words() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        server.put_sku("A", 9, json!({})).await;
        let line = r#"{"user_id":"u","sku_id":"A"}"#;
        let ndjson = ("Content-Type", "application/x-ndjson");
        let json_type = ("Content-Type", "application/json");
        let refused = |status: u16, code: &str, names: &str, answer: &Answer| {
            assert_eq!(verdict(answer), (status, code.to_owned()));
            let detail = answer.json()["detail"]
                .as_str()
                .unwrap_or_default()
                .to_owned();
            assert!(detail.contains(names), "{detail}");
        };
        for _ in 0..2 {
            let fields = [ndjson, ("Idempotency-Key", "k")];
            let answer = request(
                server.data,
                "POST",
                "/v1/orders:batch",
                &fields,
                line.into(),
            );
            refused(400, "invalid_idempotency_key", "each line", &answer.await);
        }
        for (target, kind) in [("/v1/orders", json_type), ("/v1/orders:batch", ndjson)] {
            for coding in ["gzip", "identity, br"] {
                let fields = [kind, ("Content-Encoding", coding)];
                let answer = request(server.data, "POST", target, &fields, line.into()).await;
                refused(415, "unsupported_media_type", "Content-Encoding", &answer);
                assert_eq!(answer.field("accept-encoding"), Some("identity"));
            }
        }
        let order = server
            .post(
                json!({"user_id": "u", "sku_id": "A"}),
                None,
                &[("Content-Encoding", "Identity")],
            )
            .await;
        assert_eq!(order.status, 201);
        let path = format!(
            "/v1/orders/{}",
            order.json()["order_id"].as_str().expect("an id")
        );
        for target in [
            format!("{path}?wiat=3"),
            "/v1/users/u/orders?limit=1&page=2".to_owned(),
            "/v1/skus/A?fields=free".to_owned(),
        ] {
            refused(
                400,
                "unknown_field",
                "query parameter",
                &server.get(&target).await,
            );
        }
        refused(
            400,
            "invalid_field",
            "limit",
            &server.get("/v1/users/u/orders?limit=1&limit=2").await,
        );
        let cancel = format!("{path}/cancel");
        let body = r#"{"reason":"changed their mind"}"#.to_owned();
        let answer = request(server.data, "POST", &cancel, &[json_type], body).await;
        refused(400, "unknown_field", "reason", &answer);
        assert_eq!(server.get(&path).await.json()["status"], "pending_payment");
        let answer = request(server.data, "POST", &cancel, &[json_type], "{}".into()).await;
        assert_eq!(answer.status, 200);

        let control = async |method: &str, target: &str, fields: &[(&str, &str)], body: &str| {
            request(server.control, method, target, fields, body.to_owned()).await
        };
        let sku = r#"{"unit_price":1,"currency":"CNY","total":7}"#;
        let answer = control(
            "PUT",
            "/admin/v1/skus/B",
            &[("Content-Encoding", "gzip")],
            sku,
        );
        refused(
            415,
            "unsupported_media_type",
            "Content-Encoding",
            &answer.await,
        );
        for (method, target, body, code, names) in [
            (
                "PUT",
                "/admin/v1/skus/B?dry_run=true",
                sku,
                "unknown_field",
                "dry_run",
            ),
            (
                "GET",
                "/admin/v1/skus?limit=1",
                "",
                "unknown_field",
                "limit",
            ),
            (
                "GET",
                "/admin/v1/payments?sate=paid",
                "",
                "unknown_field",
                "sate",
            ),
            ("GET", "/admin/v1/audit?from=1", "", "unknown_field", "from"),
            (
                "POST",
                "/admin/v1/skus/A/pause",
                r#"{"until":"18:00"}"#,
                "unknown_field",
                "until",
            ),
            (
                "POST",
                "/admin/v1/pause",
                "[]",
                "invalid_field",
                "an object",
            ),
        ] {
            let answer = control(method, target, &[], body).await;
            assert_eq!(verdict(&answer), (400, code.to_owned()), "{target}");
            assert!(
                answer.json()["detail"]
                    .as_str()
                    .is_some_and(|detail| detail.contains(names))
            );
        }
        let skus = server
            .control("GET", "/admin/v1/skus", Value::Null)
            .await
            .json();
        assert_eq!(skus["skus"].as_array().map(Vec::len), Some(1));
        assert_eq!(
            (&skus["paused"], &skus["skus"][0]["state"]),
            (&json!(false), &json!("open"))
        );
        assert!(server.stop().await);
    });
}

#[test]
fn an_array_is_no_order_no_sku_and_no_restock_and_long_integers_are_names() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        server.put_sku("A", 9, json!({})).await;
        let refused = (400, "invalid_field".to_owned());
        assert_eq!(
            verdict(&server.post(json!(["u", "A", 1, 0]), None, &[]).await),
            refused
        );
        for (method, target, body) in [
            ("PUT", "/admin/v1/skus/B", json!(["t", 1, "CNY", 7])),
            ("POST", "/admin/v1/skus/A/restock", json!([5])),
        ] {
            assert_eq!(
                verdict(&server.control(method, target, body).await),
                refused
            );
        }
        assert_eq!(server.stock("A").await, (9, 0, 0));
        let long = "123456789012345678901234567890";
        let body = format!(r#"{{"user_id":{long},"sku_id":"A"}}"#);
        let kind = [("Content-Type", "application/json")];
        let answer = request(server.data, "POST", "/v1/orders", &kind, body).await;
        assert_eq!(answer.status, 201);
        assert_eq!(answer.json()["user_id"], long);
        let answer = server.control(
            "PUT",
            "/admin/v1/skus/C",
            json!({
                "unit_price": 1, "currency": "CNY", "total": 7, "closes_at": "9999-12-31T23:59:59Z",
            }),
        );
        assert_eq!(answer.await.json()["closes_at"], "9999-12-31T23:59:59.000Z");
        assert!(server.stop().await);
    });
}

/// What `millrace` says to these arguments and settings, and whether it is content.
fn says(directory: &std::path::Path, args: &[&str], settings: &[(&str, &str)]) -> (bool, String) {
    let mut command = crate::support::served::millrace(args);
    command
        .current_dir(directory)
        .env("MILLRACE_DATA_PLANE__LISTEN", "127.0.0.1:0")
        .env("MILLRACE_CONTROL_PLANE__LISTEN", "127.0.0.1:0")
        .envs(settings.iter().copied());
    let output = command.output().expect("the program");
    (
        output.status.success(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

#[test]
fn config_check_finds_what_a_start_would() {
    block_on(async {
        let database = TestDatabase::create().await;
        let foreign = TestDatabase::create().await;
        let client = foreign.connect().await;
        client
            .batch_execute("CREATE SCHEMA shop; CREATE TABLE shop.basket (id int)")
            .await
            .expect("a schema of somebody else's");
        let (url, other_url) = (database.url(), foreign.url());
        let separator = if url.contains('?') { '&' } else { '?' };
        let no_certificate =
            format!("{url}{separator}sslmode=verify-full&sslrootcert=/nowhere.pem");
        let cases: [(&[(&str, &str)], &str); 9] = [
            (
                &[("MILLRACE_DATABASE__SCHEMA", "pg_shop")],
                "database.schema",
            ),
            (&[("MILLRACE_DATA_DIR", "file/below")], "data_dir"),
            (
                &[("MILLRACE_QUEUE__JOURNAL__DIR", "file")],
                "queue.journal.dir",
            ),
            (&[("MILLRACE_DATA_DIR", "cut")], "truncated"),
            (
                &[
                    ("MILLRACE_PAYMENTS__ALIPAY__APP_ID", "1"),
                    ("MILLRACE_PAYMENTS__ALIPAY__PUBLIC_KEY", "AAAA"),
                ],
                "payments.alipay.public_key",
            ),
            (
                &[
                    ("MILLRACE_CONTROL_PLANE__LISTEN", "127.0.0.1:0"),
                    ("MILLRACE_DATA_PLANE__LISTEN", "192.0.2.1:0"),
                    ("MILLRACE_DATA_PLANE__TOKEN", "t"),
                ],
                "data_plane.listen",
            ),
            (
                &[("MILLRACE_DATABASE__URL", &no_certificate)],
                "/nowhere.pem",
            ),
            (
                &[
                    ("MILLRACE_DATABASE__URL", &other_url),
                    ("MILLRACE_DATABASE__SCHEMA", "shop"),
                ],
                "did not create",
            ),
            (
                &[("MILLRACE_DATABASE__MIGRATE", "never")],
                "does not exist yet",
            ),
        ];
        let directory = tempfile::tempdir().expect("a directory");
        std::fs::write(directory.path().join("file"), "").expect("a file");
        std::fs::create_dir(directory.path().join("cut")).expect("a directory");
        std::fs::write(directory.path().join("cut/receipt.key"), "abc").expect("a cut key");
        for (settings, names) in cases {
            let settings = [&[("MILLRACE_DATABASE__URL", url.as_str())], settings].concat();
            for args in [&["config", "check"][..], &["serve"]] {
                let (content, said) = says(directory.path(), args, &settings);
                assert!(
                    !content && said.contains(names),
                    "{args:?} {settings:?}: {said}"
                );
                assert!(!said.contains("syntax"), "{said}");
            }
        }
        let bin_dir = [("MILLRACE_DATABASE__EMBEDDED_BIN_DIR", "/nowhere")];
        let (content, said) = says(directory.path(), &["config", "check"], &bin_dir);
        assert!(!content && said.contains("/nowhere"), "{said}");
        let fine = [
            ("MILLRACE_DATABASE__URL", url.as_str()),
            ("MILLRACE_DATA_DIR", "made/by/none"),
        ];
        let (content, said) = says(directory.path(), &["config", "check"], &fine);
        assert!(content && said.contains("the database answers"), "{said}");
        assert!(
            !directory.path().join("made").exists(),
            "a check makes nothing"
        );
    });
}

#[test]
fn a_schema_may_be_named_by_a_word_of_sql() {
    block_on(async {
        for word in ["user", "order", "select"] {
            let database = TestDatabase::create().await;
            let server = TestServer::start(&database, |config| {
                config.database.schema = word.into();
            })
            .await;
            server.put_sku("A", 5, json!({})).await;
            assert_eq!(server.order("u", "A", None).await.status, 201, "{word}");
            let audit = server
                .control("GET", "/admin/v1/audit", Value::Null)
                .await
                .json();
            assert_eq!(audit["ok"], true, "{audit:#}");
            assert!(server.stop().await);
            // What people run themselves is the same.
            let by_hand = TestDatabase::create().await;
            let printed = millrace::store::schema::print(word);
            let client = by_hand.connect().await;
            client.batch_execute(&printed).await.expect("it runs");
            let server = TestServer::start(&by_hand, |config| {
                config.database.schema = word.into();
                config.database.migrate = millrace::config::Migrate::Never;
            })
            .await;
            assert!(server.stop().await);
        }
    });
}
