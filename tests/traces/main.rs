//! Traces, on a whole Millrace: a collector gets the spans of sampled requests, by OTLP over HTTP, and events carry their
//! `traceparent`. A collector that is away or slow stops nothing.

#[allow(dead_code, reason = "the suite of events uses the rest")]
#[path = "../events/receiver.rs"]
mod receiver;
#[path = "../support/mod.rs"]
mod support;

mod collector;

use millrace::config::Config;
use serde_json::{Value, json};

use collector::{Collector, Heard};
use receiver::{Shop, id};
use support::block_on;
use support::http::Answer;
use support::postgres::TestDatabase;
use support::server::{TestServer, request};
use support::waiting::wait_until;
use support::webhook::Paid;

/// The example of W3C Trace Context.
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const SPAN: &str = "00f067aa0ba902b7";

fn traceparent(flags: &str) -> String {
    format!("00-{TRACE}-{SPAN}-{flags}")
}

fn traced(collector: &Collector, sample: f64) -> impl Fn(&mut Config) {
    let url = collector.url();
    move |config| {
        config.tracing.otlp_url.clone_from(&url);
        config.tracing.sample = sample;
    }
}

async fn order(server: &TestServer, user: &str, fields: &[(&str, &str)]) -> Answer {
    let body = json!({ "user_id": user, "sku_id": "A" });
    server.post(body, Some("k"), fields).await
}

#[test]
fn a_sampled_order_has_a_span_for_each_part_below_the_span_of_the_shop() {
    block_on(async {
        let collector = Collector::start().await;
        let shop = Shop::open(traced(&collector, 0.0)).await;
        let answer = order(&shop.server, "u", &[("traceparent", &traceparent("01"))]).await;
        assert_eq!(answer.status, 201, "{answer:?}");
        let of = id(&answer.json());
        let names = [
            "POST /v1/orders",
            "admission",
            "queue",
            "COPY orders",
            "answer",
        ];
        let spans = collector.until(&names).await;
        let request = &spans[0];
        assert!(spans.iter().all(|span| span.trace_id == TRACE), "{spans:?}");
        assert_eq!(request.parent, SPAN);
        assert_eq!(request.service, "millrace");
        assert_eq!(request.attribute("http.route"), "/v1/orders");
        assert_eq!(request.attribute("http.response.status_code"), "201");
        for part in &spans[1..] {
            assert_eq!(part.parent, request.span_id, "{part:?}");
            assert_eq!(part.attribute("millrace.order_id"), of);
            assert!(part.started >= request.started, "{part:?} of {request:?}");
        }
        let [_, admission, queue, copy, answer] = &spans[..] else {
            unreachable!("five");
        };
        for [first, second] in [[admission, queue], [queue, copy], [copy, answer]] {
            assert!(first.started <= second.started, "{first:?} {second:?}");
        }
        assert_eq!(copy.attribute("db.operation.batch.size"), "1");
        // Nobody else has been traced: the shop's sampling was asked for, and the share is 0.
        assert_eq!(collector.heard().len(), 5, "{:?}", collector.heard());

        // Events carry it, also those after a restart, and those that are told again from the rows.
        let expected = format!("00-{TRACE}-{}-01", request.span_id);
        let placed = shop.receiver.until("order.placed", &of).await;
        assert_eq!(placed.headers["traceparent"], expected);
        let (database, receiver) = (&shop.database, &shop.receiver);
        assert!(shop.server.stop().await);
        let server = Shop::serve(database, receiver, |_| {}).await;
        let stored = server.get(&format!("/v1/orders/{of}")).await.json();
        assert_eq!(Paid::of(&stored).deliver(server.data).await.status, 200);
        let paid = receiver.until("order.paid", &of).await;
        assert_eq!(paid.headers["traceparent"], expected);
        let before = receiver.heard().len();
        let resync = "/admin/v1/events/shop/resync?after=0";
        let answer = server.control("POST", resync, Value::Null).await;
        assert!(answer.status < 300, "{answer:?}");
        wait_until("the refill", async || receiver.heard().len() > before).await;
        let again = &receiver.heard()[before];
        assert_eq!(again.event["resync"], true);
        assert_eq!(again.headers["traceparent"], expected);
        assert!(server.stop().await);
    });
}

#[test]
fn an_order_that_nobody_samples_leaves_no_trace() {
    block_on(async {
        let collector = Collector::start().await;
        let shop = Shop::open(traced(&collector, 0.0)).await;
        let not_sampled = traceparent("00");
        let fields: [&[(&str, &str)]; 3] = [
            &[("traceparent", &not_sampled)],
            &[],
            // What is no traceparent is none.
            &[("traceparent", "01")],
        ];
        for (at, fields) in fields.into_iter().enumerate() {
            let answer = order(&shop.server, &format!("u{at}"), fields).await;
            assert_eq!(answer.status, 201, "{answer:?}");
            let placed = shop
                .receiver
                .until("order.placed", &id(&answer.json()))
                .await;
            assert_eq!(placed.headers["traceparent"], "");
        }
        // Spans go in their order, so nothing has been before this one.
        order(&shop.server, "last", &[("traceparent", &traceparent("01"))]).await;
        collector.until(&["POST /v1/orders", "COPY orders"]).await;
        assert!(collector.heard().iter().all(|span| span.trace_id == TRACE));
        shop.close().await;
    });
}

#[test]
fn a_share_of_one_traces_every_request_whose_client_says_nothing() {
    block_on(async {
        let collector = Collector::start().await;
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, traced(&collector, 1.0)).await;
        server.put_sku("A", 1, Value::Null).await;
        let acknowledged = order(&server, "u", &[("Prefer", "respond-async")]).await;
        assert_eq!(acknowledged.status, 202, "{acknowledged:?}");
        let names = ["POST /v1/orders", "order log", "queue", "COPY orders"];
        let spans = collector.until(&names).await;
        let request = &spans[0];
        assert_eq!(request.parent, "");
        assert_ne!(request.trace_id, TRACE);
        assert!(spans[1..].iter().all(|part| part.parent == request.span_id));

        let refused = order(&server, "late", &[]).await;
        assert_eq!(refused.status, 409, "{refused:?}");
        server.get("/v1/orders/1").await;
        let found = |code: &str| {
            let heard = collector.heard();
            heard
                .into_iter()
                .find(|span| span.attribute("millrace.code") == code)
        };
        wait_until("both", async || {
            found("sold_out").is_some() && found("unknown_order").is_some()
        })
        .await;
        let read = found("unknown_order").expect("it is there");
        assert_eq!(read.name, "GET /v1/orders/{order_id}");
        assert!(server.stop().await);
    });
}

#[test]
fn a_callback_is_traced_whatever_its_sender_says() {
    block_on(async {
        let collector = Collector::start().await;
        let shop = Shop::open(traced(&collector, 1.0)).await;
        let placed = order(&shop.server, "u", &[]).await;
        let paid = Paid::of(&placed.json());
        assert_eq!(paid.deliver(shop.server.data).await.status, 200);
        let names = ["POST /v1/payments/{provider}/notify", "store payment"];
        let spans = collector.until(&names).await;
        assert_eq!(spans[1].parent, spans[0].span_id);
        assert_eq!(spans[1].attribute("millrace.order_id"), id(&placed.json()));
        // Anybody may send this, and not more often than the share is anything traced for it.
        let forged = [("traceparent", &*traceparent("01"))];
        let target = "/v1/payments/standard/notify";
        let refused = request(shop.server.data, "POST", target, &forged, "{}".into()).await;
        assert!(refused.status >= 400, "{refused:?}");
        let status = refused.status.to_string();
        let is_refused = |span: &Heard| span.attribute("http.response.status_code") == status;
        wait_until("its span", async || {
            collector.heard().iter().any(is_refused)
        })
        .await;
        assert!(collector.heard().iter().all(|span| span.trace_id != TRACE));
        shop.close().await;
    });
}

#[test]
fn a_collector_that_does_not_answer_stops_no_order_and_its_losses_are_counted() {
    block_on(async {
        let collector = Collector::start().await;
        collector.hang();
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, traced(&collector, 1.0)).await;
        server.put_sku("A", 1_000_000, Value::Null).await;
        // Each line makes three spans; the buffer has 8,192.
        for batch in 0..4 {
            let line = |at: usize| {
                json!({ "user_id": format!("{batch}-{at}"), "sku_id": "A" }).to_string()
            };
            let lines: Vec<String> = (0..1_000).map(line).collect();
            let fields = [("Content-Type", "application/x-ndjson")];
            let target = "/v1/orders:batch";
            let answer = request(server.data, "POST", target, &fields, lines.join("\n")).await;
            assert_eq!(answer.status, 200, "{answer:?}");
            let text = String::from_utf8(answer.body).expect("UTF-8");
            let placed = text
                .lines()
                .filter(|line| line.contains("\"http_status\":201"));
            assert_eq!(placed.count(), 1_000);
        }
        wait_until("losses", async || {
            server.metric("millrace_spans_dropped_total").await > 0.0
        })
        .await;
        let client = database.connect().await;
        let sql = "SELECT count(*) FROM millrace.orders WHERE traceparent IS NOT NULL";
        let traced: i64 = client.query_one(sql, &[]).await.expect("a count").get(0);
        assert_eq!(traced, 4_000);
        assert!(server.stop().await, "it drains all the same");
    });
}

#[test]
fn nothing_listens_where_the_collector_should_be() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |config| {
            // Nobody has this port.
            config.tracing.otlp_url = "http://127.0.0.1:1".to_owned();
            config.tracing.sample = 1.0;
        })
        .await;
        server.put_sku("A", 10, Value::Null).await;
        assert_eq!(order(&server, "u", &[]).await.status, 201);
        wait_until("the losses are counted", async || {
            server.metric("millrace_spans_dropped_total").await >= 4.0
        })
        .await;
        assert_eq!(server.metric("millrace_spans_delivered_total").await, 0.0);
        assert!(server.stop().await);
    });
}

#[test]
#[ignore = "needs the collector: tests/traces/collector/check.sh"]
fn the_collector_itself_takes_the_spans() {
    let program = std::env::var("MILLRACE_COLLECTOR").expect("MILLRACE_COLLECTOR");
    block_on(async {
        let real = collector::Real::start(&program).await;
        let database = TestDatabase::create().await;
        let server =
            TestServer::start(&database, |config| config.tracing.otlp_url = real.url()).await;
        server.put_sku("A", 1, Value::Null).await;
        let answer = order(&server, "u", &[("traceparent", &traceparent("01"))]).await;
        assert_eq!(answer.status, 201, "{answer:?}");
        let expected = [
            "Str(millrace)",
            &format!("Trace ID       : {TRACE}"),
            &format!("Parent ID      : {SPAN}"),
            "Name           : POST /v1/orders",
            "Name           : COPY orders",
        ];
        wait_until("its spans", async || {
            let printed = real.printed();
            expected.iter().all(|line| printed.contains(line))
        })
        .await;
        assert_eq!(server.metric("millrace_spans_dropped_total").await, 0.0);
        assert!(server.stop().await);
    });
}
