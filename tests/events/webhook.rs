//! A webhook that refuses, redirects, is away or goes.

use std::time::Duration;

use millrace::config::Config;
use serde_json::{Value, json};

use crate::receiver::{Receiver, SECRETS, Shop, drop_slots, id};
use crate::support::block_on;
use crate::support::postgres::TestDatabase;
use crate::support::waiting::wait_until;

#[test]
fn one_order_that_is_refused_holds_up_its_own_events_alone() {
    block_on(async {
        let shop = Shop::open(|_| {}).await;
        let refused = shop.order("refused").await;
        let of = id(&refused);
        let refuses = of.clone();
        shop.receiver.answer(
            move |event, _| match event["data"]["order_id"] == refuses.as_str() {
                true => 400,
                false => 200,
            },
        );
        let cancel = format!("/v1/orders/{of}/cancel");
        let answer =
            crate::support::server::request(shop.server.data, "POST", &cancel, &[], String::new())
                .await;
        assert_eq!(answer.status, 200);
        for user in 0..20 {
            let other = shop.order(&format!("u{user}")).await;
            shop.receiver.until("order.placed", &id(&other)).await;
        }
        let client = shop.database.connect().await;
        wait_until("its events wait by themselves", async || {
            let sql = "SELECT count(*) FROM millrace.event_deliveries WHERE sink = 'shop' AND dead_at IS NULL";
            client.query_one(sql, &[]).await.expect("a count").get::<_, i64>(0) > 0
        })
        .await;
        shop.receiver.answer(|_, _| 200);
        client
            .execute(
                "UPDATE millrace.event_deliveries SET next_attempt_at = now()",
                &[],
            )
            .await
            .expect("due");
        shop.receiver.until("order.cancelled", &of).await;
        assert_eq!(
            shop.receiver.ids_of(&of),
            [format!("{of}:1"), format!("{of}:2")]
        );
        shop.close().await;
    });
}

#[test]
fn what_is_not_taken_for_a_day_is_a_dead_letter_until_somebody_decides() {
    block_on(async {
        let shop = Shop::open(|_| {}).await;
        shop.receiver
            .answer(|event, _| match event["data"]["user_id"] == "refused" {
                true => 500,
                false => 200,
            });
        let of = id(&shop.order("refused").await);
        let client = shop.database.connect().await;
        let mut users = 0;
        // Others have to be taken meanwhile; alone it would be a sink that is away.
        loop {
            shop.order(&format!("u{users}")).await;
            users += 1;
            let sql = "UPDATE millrace.event_deliveries
                          SET first_failed_at = now() - interval '1 day', next_attempt_at = now() WHERE dead_at IS NULL";
            if client.execute(sql, &[]).await.expect("an update") > 0 {
                break;
            }
            assert!(users < 2_000, "it never waited");
        }
        let letters = async || {
            shop.admin("GET", "/admin/v1/event-dead-letters?sink=shop")
                .await
                .json()
        };
        wait_until("the dead letter", async || {
            letters().await["event_dead_letters"][0].is_object()
        })
        .await;
        let letter = letters().await["event_dead_letters"][0].clone();
        assert_eq!(letter["event_id"], format!("{of}:1"));
        assert_eq!(letter["event"]["type"], "order.placed");
        assert!(
            letter["reason"]
                .as_str()
                .is_some_and(|reason| reason.contains("500")),
            "{letter}"
        );
        wait_until("the metric", async || {
            let text = shop.admin("GET", "/metrics").await.body;
            String::from_utf8_lossy(&text).contains("millrace_events_dead_letters{sink=\"shop\"} 1")
        })
        .await;
        shop.receiver.answer(|_, _| 200);
        let retry = format!("/admin/v1/event-dead-letters/{}/retry", letter["id"]);
        assert_eq!(shop.admin("POST", &retry).await.status, 200);
        shop.receiver.until("order.placed", &of).await;
        assert_eq!(
            shop.admin("POST", &retry).await.status,
            404,
            "it is none any more"
        );
        shop.close().await;
    });
}

#[test]
fn a_redirect_is_not_followed_and_nothing_is_lost_while_the_sink_is_away() {
    block_on(async {
        let shop = Shop::open(|_| {}).await;
        let state = async || {
            let sinks = shop.admin("GET", "/admin/v1/events").await.json();
            sinks["sinks"][0]["state"].clone()
        };
        // Whether it takes an event nobody knows; that its slot could not be made at once, say, is no failure of its own.
        wait_until("it is idle", async || state().await == "idle").await;
        shop.receiver
            .answer(|_, before| if before == 0 { 302 } else { 204 });
        let order = shop.order("a").await;
        shop.receiver.until("order.placed", &id(&order)).await;
        let heard: Vec<u16> = shop.receiver.heard().iter().map(|one| one.answer).collect();
        assert_eq!(heard, [302, 204]);
        wait_until("it delivers", async || state().await == "delivering").await;
        shop.close().await;
    });
}

#[test]
fn a_sink_that_is_gone_gets_nothing_until_a_resync_and_then_what_it_missed() {
    block_on(async {
        let shop = Shop::open(|_| {}).await;
        let before = shop.order("before").await;
        shop.receiver.until("order.placed", &id(&before)).await;
        shop.receiver.answer(|_, _| 410);
        let missed = shop.order("missed").await;
        let state = async || {
            shop.admin("GET", "/admin/v1/events").await.json()["sinks"][0]["state"].clone()
        };
        wait_until("it is disabled", async || state().await == "disabled").await;
        let ready = shop.admin("GET", "/readyz").await.json();
        assert_eq!(ready["ready"], true, "{ready}");
        assert!(
            ready["warnings"].to_string().contains("events_disabled"),
            "{ready}"
        );
        let client = shop.database.connect().await;
        wait_until("it keeps no WAL", async || {
            let sql = "SELECT FROM pg_replication_slots WHERE database = current_database()";
            client.query(sql, &[]).await.expect("the slots").is_empty()
        })
        .await;
        let later = shop.order("later").await;
        shop.receiver.answer(|_, _| 200);
        let answer = shop.admin("POST", "/admin/v1/events/shop/resync").await;
        assert_eq!(answer.status, 200, "{answer:?}");
        for order in [&missed, &later] {
            let heard = shop.receiver.until("order.placed", &id(order)).await;
            assert_eq!(heard.event["resync"], true, "{}", heard.event);
        }
        wait_until("it is refilled", async || state().await == "delivering").await;
        let next = shop.order("next").await;
        let heard = shop.receiver.until("order.placed", &id(&next)).await;
        assert_eq!(heard.event.get("resync"), None);
        assert_eq!(
            shop.admin("POST", "/admin/v1/events/nobody/resync")
                .await
                .status,
            404
        );
        shop.close().await;
    });
}

#[test]
fn events_go_on_over_a_restart_and_each_sink_has_its_own_place() {
    block_on(async {
        let database = TestDatabase::create().await;
        let (receiver, other) = (Receiver::start().await, Receiver::start().await);
        let configure = |config: &mut Config| {
            config.events.sinks.insert("erp".to_owned(), other.sink());
        };
        let server = Shop::serve(&database, &receiver, configure).await;
        server.put_sku("A", 10, Value::Null).await;
        let shop = Shop {
            database,
            server,
            receiver,
        };
        shop.until_it_listens(2).await;
        let first = shop.order("first").await;
        shop.receiver.until("order.placed", &id(&first)).await;
        other.answer(|_, _| 503);
        let second = shop.order("second").await;
        shop.receiver.until("order.placed", &id(&second)).await;
        let Shop {
            database,
            server,
            receiver,
        } = shop;
        assert!(server.stop().await);
        other.answer(|_, _| 200);
        let server = Shop::serve(&database, &receiver, configure).await;
        let shop = Shop {
            database,
            server,
            receiver,
        };
        for of in [&first, &second] {
            other.until("order.placed", &id(of)).await;
        }
        shop.close().await;
    });
}

#[test]
fn messages_are_signed_with_every_secret() {
    block_on(async {
        let shop = Shop::open(|_| {}).await;
        let mut orders = Vec::new();
        for user in ["u-1", "u-2"] {
            orders.push(shop.order(user).await);
        }
        for order in &orders {
            shop.receiver.until("order.placed", &id(order)).await;
        }
        let messages: Vec<Value> = shop
            .receiver
            .heard()
            .iter()
            .map(|one| json!({ "headers": one.headers, "body": one.body }))
            .collect();
        for message in &messages {
            let signature = message["headers"]["webhook-signature"]
                .as_str()
                .expect("a signature");
            assert_eq!(signature.split(' ').count(), SECRETS.len(), "{signature}");
        }
        // For the libraries of Standard Webhooks: tests/events/signatures/check.sh.
        if let Some(file) = std::env::var_os("MILLRACE_MESSAGES") {
            let text = json!({ "secrets": SECRETS, "messages": messages }).to_string();
            std::fs::write(file, text).expect("write the messages");
        }
        shop.close().await;
    });
}

#[test]
fn the_command_drops_slots_and_publication_once_no_server_reads_them() {
    block_on(async {
        let shop = Shop::open(|_| {}).await;
        let url = shop.database.url();
        let run = async |args: &[&str]| {
            let mut command = crate::support::served::millrace(args);
            command.env("MILLRACE_DATABASE__URL", &url);
            for (name, value) in [("URL", "http://127.0.0.1:1/"), ("SECRET", SECRETS[0])] {
                command.env(format!("MILLRACE_EVENTS__SINKS__SHOP__{name}"), value);
            }
            let output = tokio::task::spawn_blocking(move || command.output())
                .await
                .expect("a thread")
                .expect("it runs");
            let text = [output.stdout, output.stderr].concat();
            (
                output.status.code(),
                String::from_utf8_lossy(&text).into_owned(),
            )
        };
        let (code, text) = run(&["events", "drop"]).await;
        assert_eq!(code, Some(1), "{text}");
        assert!(text.contains("is read by a Millrace"), "{text}");
        let (code, text) = run(&["config", "check"]).await;
        assert_eq!(code, Some(0), "{text}");
        let Shop {
            database, server, ..
        } = shop;
        assert!(server.stop().await);
        let (code, text) = run(&["events", "drop"]).await;
        assert_eq!(code, Some(0), "{text}");
        assert!(text.contains("millrace_millrace_shop"), "{text}");
        let client = database.connect().await;
        for sql in [
            "SELECT FROM pg_replication_slots WHERE database = current_database()",
            "SELECT FROM pg_publication WHERE pubname = 'millrace_millrace'",
            "SELECT FROM millrace.event_sinks",
        ] {
            assert!(
                client.query(sql, &[]).await.expect("a query").is_empty(),
                "{sql}"
            );
        }
        drop_slots(&database).await;
    });
}

#[test]
fn an_order_does_not_wait_for_a_sink_that_hangs() {
    block_on(async {
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .expect("a port");
        let address = silent.local_addr().expect("its address");
        let shop = Shop::open(|config| {
            let sink = config.events.sinks.get_mut("shop").expect("the sink");
            sink.url = format!("http://{address}/");
        })
        .await;
        for user in 0..50 {
            let began = std::time::Instant::now();
            shop.order(&format!("u{user}")).await;
            assert!(began.elapsed() < Duration::from_secs(5));
        }
        let ready = shop.admin("GET", "/readyz").await.json();
        assert_eq!(ready["ready"], true, "{ready}");
        shop.close().await;
    });
}
