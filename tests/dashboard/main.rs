//! The dashboard: who sees it, who may change something through it, and what its page may do.

mod operator;
#[allow(dead_code, reason = "the suite of events uses the rest")]
#[path = "../events/receiver.rs"]
mod receiver;
#[path = "../support/mod.rs"]
mod support;

use millrace::order::OrderStatus;
use millrace::order::payment::{PaymentState, RefundReason};
use serde_json::{Value, json};
use support::block_on;
use support::http::Answer;
use support::postgres::TestDatabase;
use support::server::{TestServer, request};

const FORM: (&str, &str) = ("Content-Type", "application/x-www-form-urlencoded");
const OURS: (&str, &str) = ("Sec-Fetch-Site", "same-origin");

async fn login(server: &TestServer, token: &str, fields: &[(&str, &str)]) -> Answer {
    let fields = [&[FORM], fields].concat();
    let body = format!("token={token}");
    request(server.control, "POST", "/login", &fields, body).await
}

async fn ask(server: &TestServer, method: &str, target: &str, fields: &[(&str, &str)]) -> Answer {
    request(server.control, method, target, fields, String::new()).await
}

fn page(answer: &Answer) -> String {
    String::from_utf8(answer.body.clone()).expect("UTF-8")
}

/// What the page may do is decided by its policy, not by its good will.
fn assert_locked_down(answer: &Answer) {
    let policy = answer.field("content-security-policy").expect("a policy");
    let nonce = policy
        .split_once("script-src 'nonce-")
        .and_then(|(_, rest)| rest.split_once('\''))
        .map(|(nonce, _)| nonce)
        .expect("a nonce");
    assert!(policy.starts_with("default-src 'none'"), "{policy}");
    assert!(policy.contains("frame-ancestors 'none'"), "{policy}");
    assert!(!policy.contains("unsafe"), "{policy}");
    let page = page(answer);
    let inline = page.matches("<script").count() + page.matches("<style").count();
    assert_eq!(page.matches(&format!("nonce=\"{nonce}\"")).count(), inline);
    for outside in ["http://", "https://", "src=", "__", "onclick=", "innerHTML"] {
        assert!(!page.contains(outside), "{outside}");
    }
    assert_eq!(answer.field("cache-control"), Some("no-store"));
    assert_eq!(answer.field("x-content-type-options"), Some("nosniff"));
}

/// Each outcome has its colour in the chart of orders, and each state and reason its words.
fn assert_knows_every_word(page: &str, live: &Value) {
    let groups = page.split("const GROUPS = [").nth(1).expect("the groups");
    let groups = groups.split("\n];").next().expect("their end");
    for outcome in live["orders"].as_object().expect("outcomes").keys() {
        let times = groups.matches(&format!("\"{outcome}\"")).count();
        assert!(times >= 1, "{outcome} is in no group of the chart");
    }
    let states = OrderStatus::ALL.map(OrderStatus::as_str);
    let words = states.into_iter();
    let words = words.chain(PaymentState::ALL.iter().map(|one| one.as_str()));
    let words = words.chain(RefundReason::ALL.iter().map(|one| one.as_str()));
    for word in words {
        assert!(page.contains(&format!(" {word}:")), "{word} has no words");
    }
}

#[test]
fn a_browser_logs_in_sees_changes_and_logs_out() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |config| {
            config.control_plane.token.0 = vec!["s3cret+&".into()];
        })
        .await;
        let form = ask(&server, "GET", "/", &[]).await;
        assert!(page(&form).contains("type=\"password\""));
        assert_locked_down(&form);
        assert_eq!(ask(&server, "GET", "/admin/v1/live", &[]).await.status, 401);

        let wrong = login(&server, "s3cret", &[OURS]).await;
        assert_eq!(wrong.status, 401);
        assert!(page(&wrong).contains("not a token") && wrong.field("set-cookie").is_none());
        assert_locked_down(&wrong);

        let right = login(&server, "s3cret%2B%26", &[OURS]).await;
        assert_eq!((right.status, right.field("location")), (303, Some("/")));
        let cookie = right.field("set-cookie").expect("a cookie");
        assert!(cookie.contains("HttpOnly") && cookie.contains("SameSite=Strict"));
        assert!(!cookie.contains("s3cret") && !cookie.contains("Secure"));
        let session = cookie.split(';').next().expect("a pair");
        let session = ("Cookie", session);
        let again = login(
            &server,
            "s3cret%2B%26",
            &[OURS, ("Origin", "https://ops.example")],
        )
        .await;
        assert!(
            again
                .field("set-cookie")
                .is_some_and(|other| !other.contains(session.1))
        );
        assert!(
            again
                .field("set-cookie")
                .is_some_and(|other| other.ends_with("; Secure"))
        );

        let dashboard = ask(&server, "GET", "/", &[session]).await;
        assert!(page(&dashboard).contains("const ADMIN = \"/admin/v1/\";"));
        assert!(!page(&dashboard).contains("type=\"password\""));
        assert!(page(&dashboard).contains("data-access=\"session\""));
        assert_locked_down(&dashboard);
        let live = ask(&server, "GET", "/admin/v1/live", &[session]).await;
        assert_eq!(live.json()["state"], "ready");

        let host = server.control.to_string();
        let origin = format!("http://{host}");
        let pause = async |fields: &[(&str, &str)]| {
            let answer = ask(&server, "POST", "/admin/v1/pause", fields).await;
            (answer.status, answer.code())
        };
        let refused = (403, "cross_origin".to_owned());
        assert_eq!(pause(&[session]).await, refused, "nothing says who sent it");
        for from in [
            ("Sec-Fetch-Site", "cross-site"),
            ("Sec-Fetch-Site", "same-site"),
            ("Origin", "http://evil.example"),
            ("Origin", "null"),
        ] {
            assert_eq!(pause(&[session, from]).await, refused, "{from:?}");
            let elsewhere = login(&server, "s3cret%2B%26", &[from]).await;
            assert_eq!(elsewhere.code(), "cross_origin", "{from:?}");
        }
        let live = ask(&server, "GET", "/admin/v1/live", &[session]).await;
        assert_eq!(live.json()["paused"], false);
        assert_eq!(pause(&[session, OURS]).await.0, 200);
        assert_eq!(pause(&[session, ("Origin", &origin)]).await.0, 200);
        let program = ("Authorization", "Bearer s3cret+&");
        assert_eq!(pause(&[program]).await.0, 200);
        assert_eq!(pause(&[]).await.0, 401);

        let out = ask(&server, "POST", "/logout", &[session, OURS]).await;
        assert_eq!(out.status, 303);
        assert!(
            out.field("set-cookie")
                .is_some_and(|cookie| cookie.contains("Max-Age=0"))
        );
        assert_eq!(
            ask(&server, "GET", "/admin/v1/live", &[session])
                .await
                .status,
            401
        );
        assert!(server.stop().await);
    });
}

#[test]
fn without_a_token_no_login_is_asked_for_and_other_sites_still_change_nothing() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        server.put_sku("A", 5, json!({ "title": "<b>&" })).await;
        let dashboard = ask(&server, "GET", "/", &[]).await;
        assert!(page(&dashboard).contains("data-access=\"open\""));
        assert_locked_down(&dashboard);
        for from in [
            ("Sec-Fetch-Site", "cross-site"),
            ("Origin", "http://evil.example"),
        ] {
            let answer = ask(&server, "POST", "/admin/v1/pause", &[from]).await;
            assert_eq!(answer.code(), "cross_origin", "{from:?}");
        }
        assert_eq!(server.order("u", "A", None).await.status, 201);
        let live = server
            .control("GET", "/admin/v1/live", Value::Null)
            .await
            .json();
        assert_eq!(live["orders"]["created"], 1);
        assert_eq!(live["skus"][0]["held"], 1);
        assert_eq!(live["batches"]["rows"], 1);
        assert_eq!(live["payments"]["orphans"], 0);
        assert_knows_every_word(&page(&dashboard), &live);
        assert!(server.stop().await);
    });
}
