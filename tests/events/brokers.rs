//! The sinks that are brokers, on real ones.

use std::time::Duration;

use millrace::config::{EventSink, EventSinkKind};

use millrace::queue::log::broker::kafka::{KafkaBroker, KafkaSettings};
use millrace::queue::log::broker::{Broker as _, Place, Position};
use serde_json::{Value, json};

use crate::receiver::{Shop, id};
use crate::support::block_on;
use crate::support::brokers::{Broker, Kind};
use crate::support::waiting::{wait_until, wait_until_within};
use crate::support::webhook::Paid;

/// An entry of a stream: its id and its fields.
type Entry = (String, Vec<(String, String)>);

/// A sink that is away is tried every 30 s at the latest.
const PATIENCE: Duration = Duration::from_secs(120);

#[test]
fn a_redis_stream_has_an_entry_for_each_event_over_a_restart_of_redis() {
    let Some(mut broker) = Broker::start(Kind::Redis) else {
        return;
    };
    block_on(async {
        let url = format!("redis://{}/", broker.address());
        let shop = Shop::open(|config| {
            let sink = EventSink {
                kind: EventSinkKind::Redis,
                url: url.clone(),
                ..EventSink::default()
            };
            config.events.sinks = [("stream".to_owned(), sink)].into();
            // Nobody collects the spans.
            config.tracing.otlp_url = "http://127.0.0.1:1".to_owned();
            config.tracing.sample = 0.0;
        })
        .await;
        let entries = || -> Vec<(String, String)> {
            let client = redis::Client::open(&*url).expect("a URL");
            let Ok(mut connection) = client.get_connection() else {
                return Vec::new();
            };
            let read: Result<Vec<Entry>, _> = redis::cmd("XRANGE")
                .arg("millrace:millrace:events")
                .arg("-")
                .arg("+")
                .query(&mut connection);
            let entries = read.unwrap_or_default().into_iter().map(|(_, fields)| {
                let field = |name: &str| {
                    let found = fields.iter().find(|(known, _)| known == name);
                    found.map(|(_, value)| value.clone()).unwrap_or_default()
                };
                let event: Value = serde_json::from_str(&field("event")).expect("JSON");
                assert_eq!(event["id"], field("id").as_str());
                assert_eq!(event["type"], field("type").as_str());
                assert_eq!(event["data"]["order_id"], field("key").as_str());
                (field("id"), field("traceparent"))
            });
            entries.collect()
        };
        let has = |id: String| entries().iter().any(|(known, _)| *known == id);
        let first = shop.order("first").await;
        wait_until("the first", async || has(format!("{}:1", id(&first)))).await;
        broker.kill9();
        assert_eq!(Paid::of(&first).deliver(shop.server.data).await.status, 200);
        let body = json!({ "user_id": "second", "sku_id": "A" });
        let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let fields = [("traceparent", parent)];
        let second = shop.server.post(body, None, &fields).await.json();
        broker.start_again();
        wait_until_within("the second", PATIENCE, async || {
            has(format!("{}:1", id(&second)))
        })
        .await;
        wait_until_within("the payment", PATIENCE, async || {
            has(format!("{}:2", id(&first)))
        })
        .await;
        let all = entries();
        let place = |id: String| all.iter().position(|(known, _)| *known == id);
        assert!(place(format!("{}:1", id(&first))) < place(format!("{}:2", id(&first))));
        for (known, traceparent) in all {
            let is_traced = known == format!("{}:1", id(&second));
            assert_eq!(traceparent.starts_with(&parent[..36]), is_traced, "{known}");
        }
        shop.close().await;
    });
}

#[test]
fn a_kafka_topic_has_a_record_for_each_event_over_a_restart_of_kafka() {
    let Some(mut broker) = Broker::start(Kind::Kafka) else {
        return;
    };
    block_on(async {
        let settings = KafkaSettings {
            bootstrap: broker.address().to_string(),
            topic: "millrace-millrace-events".to_owned(),
            partition: 0,
            tls: None,
            sasl: None,
            timeout: Duration::from_secs(20),
        };
        let reader = std::sync::Arc::new(KafkaBroker::new(settings.clone()).expect("a client"));
        let shop = Shop::open(|config| {
            let sink = EventSink {
                kind: EventSinkKind::Kafka,
                url: settings.bootstrap.clone(),
                ..EventSink::default()
            };
            config.events.sinks = [("topic".to_owned(), sink)].into();
        })
        .await;
        // Without its topic nothing is lost.
        let first = shop.order("first").await;
        let makes = std::sync::Arc::clone(&reader);
        let made = tokio::task::spawn_blocking(move || makes.check())
            .await
            .expect("a thread");
        made.expect("the topic is made");
        let ids = async || -> Vec<String> {
            let reader = std::sync::Arc::clone(&reader);
            let read = tokio::task::spawn_blocking(move || {
                let (mut frames, mut after) = (Vec::new(), None);
                loop {
                    let more = reader.read(after, 1 << 20).unwrap_or_default();
                    let Some(last) = more.last() else {
                        return frames;
                    };
                    after = Some(Position {
                        place: Place {
                            epoch: 0,
                            number: 0,
                        },
                        offset: last.offset,
                    });
                    frames.extend(more.into_iter().map(|stored| stored.frame));
                }
            });
            let frames = read.await.expect("a thread").into_iter();
            let events = frames.map(|frame| serde_json::from_slice::<Value>(&frame).expect("JSON"));
            events
                .map(|event| event["id"].as_str().expect("an id").to_owned())
                .collect()
        };
        let has = async |id: String| ids().await.contains(&id);
        wait_until("the first", async || has(format!("{}:1", id(&first))).await).await;
        broker.kill9();
        assert_eq!(Paid::of(&first).deliver(shop.server.data).await.status, 200);
        let second = shop.order("second").await;
        broker.start_again();
        let makes = std::sync::Arc::clone(&reader);
        wait_until_within("kafka is back", PATIENCE, async || {
            let makes = std::sync::Arc::clone(&makes);
            tokio::task::spawn_blocking(move || makes.check())
                .await
                .expect("a thread")
                .is_ok()
        })
        .await;
        wait_until_within("the second", PATIENCE, async || {
            has(format!("{}:1", id(&second))).await
        })
        .await;
        wait_until_within("the payment", PATIENCE, async || {
            has(format!("{}:2", id(&first))).await
        })
        .await;
        let all = ids().await;
        let place = |id: String| all.iter().position(|known| *known == id);
        assert!(place(format!("{}:1", id(&first))) < place(format!("{}:2", id(&first))));
        shop.close().await;
    });
}
