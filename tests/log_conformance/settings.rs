//! Settings of the server that break the promise are refused, each by its name; credentials are refused and never
//! printed; TLS.

use std::path::Path;
use std::process::Command;

use millrace::queue::log::broker::kafka::{KafkaBroker, KafkaSettings, Mechanism, Sasl, Tls};
use millrace::queue::log::broker::redis::{RedisBroker, RedisSettings};
use millrace::queue::log::broker::rocketmq::RocketMqBroker;
use millrace::queue::log::broker::{Broker, BrokerError, SendError};

use crate::bed::{
    Bed, LONG, PASSWORD, PATIENCE, SASL, TLS, USER, all, bytes, connect, fresh, place,
    redis_client, refused, says, send,
};
use crate::support::broker_admin::{kafka_create, kafka_set, redis, rocketmq_set};
use crate::support::brokers::{Kind, Setup};
use crate::support::waiting::until;

on_each_broker! {
    calm: credentials_are_taken_if_right_and_refused_unprinted;
}

/// After a check that was refused nothing is sent.
fn sends_nothing(client: &dyn Broker) {
    let sent = client.send(place(1, 0), b"not stored");
    assert!(
        matches!(sent, Err(SendError::Away(_) | SendError::Refused(_))),
        "{sent:?}"
    );
}

#[test]
fn each_setting_of_redis_that_breaks_the_promise_is_refused_by_name() {
    crate::bed::rough(Kind::Redis, |bed| {
        let log = fresh("settings");
        let known = bed.ready(&log);
        for (setting, wrong, needed) in [
            ("appendonly", "no", "yes"),
            ("appendfsync", "everysec", "always"),
            ("appendfsync", "no", "always"),
            ("no-appendfsync-on-rewrite", "yes", "no"),
            ("maxmemory-policy", "allkeys-lru", "noeviction"),
        ] {
            let set = |value| {
                assert_eq!(
                    redis(bed.address(), &["CONFIG", "SET", setting, value]),
                    "+OK"
                )
            };
            set(wrong);
            let new = bed.client(&log, LONG);
            for client in [&known, &new] {
                let remedy = format!("run CONFIG SET {setting} {needed} there");
                says(refused(client.check()), &[setting, wrong, needed, &remedy]);
            }
            sends_nothing(&*new);
            set(needed);
            // Its first file has to be complete.
            until("the setting is in force", PATIENCE, || {
                new.check().is_ok_and(|checked| checked.warnings.is_empty())
            });
        }
        assert_eq!(all(&*known), []);
        // Neither an entry that is not ours nor another type of key is taken for a log.
        redis(bed.address(), &["XADD", &log, "5-5", "name", "value"]);
        says(
            refused(known.read(None, 1)),
            &["5-5", &log, "queue.redis.stream"],
        );
        let text = fresh("text");
        redis(bed.address(), &["SET", &text, "text"]);
        says(
            refused(bed.client(&text, LONG).check()),
            &["WRONGTYPE", "queue.redis.stream"],
        );
    });
}

#[test]
fn each_setting_of_kafka_that_breaks_the_promise_is_refused_by_name() {
    crate::bed::calm(Kind::Kafka, |bed| {
        let right = [("retention.ms", "-1"), ("retention.bytes", "-1")];
        let create = |topic: &str, name: &str, value: &str| {
            let mut settings: Vec<_> = right
                .iter()
                .copied()
                .filter(|(other, _)| *other != name)
                .collect();
            settings.push((name, value));
            kafka_create(bed.address(), topic, &settings);
        };
        for (name, wrong, needed) in [
            ("cleanup.policy", "compact", "must be delete"),
            ("cleanup.policy", "compact,delete", "must be delete"),
            ("retention.ms", "604800000", "must be -1"),
            ("retention.bytes", "1000000", "must be -1"),
            ("unclean.leader.election.enable", "true", "must be false"),
            (
                "compression.type",
                "gzip",
                "must be producer or uncompressed",
            ),
            (
                "min.insync.replicas",
                "2",
                "must be at most the number of replicas, 1",
            ),
        ] {
            let topic = fresh("settings");
            create(&topic, name, wrong);
            let client = bed.client(&topic, LONG);
            let mut sentence = String::new();
            until("an answer", PATIENCE, || match client.check() {
                // It has just been made, and has no leader yet.
                Err(BrokerError::Away(_)) => false,
                checked => {
                    sentence = refused(checked);
                    true
                }
            });
            assert_eq!(
                sentence,
                format!("topic {topic}: {name} is {wrong} and {needed}")
            );
            sends_nothing(&*client);
        }
        let unflushed = fresh("settings");
        create(&unflushed, "flush.messages", "100");
        let warnings = connect(&*bed.client(&unflushed, LONG));
        says(&warnings[0], &["set flush.messages of the topic to 1"]);
        // A limit of the topic that falls under an open connection, and is noticed with the next check.
        let topic = fresh("settings");
        let client = bed.ready(&topic);
        kafka_set(bed.address(), &topic, "max.message.bytes", "2000");
        let mut sent = Ok(0);
        until("the topic takes less", PATIENCE, || {
            sent = client.send(place(1, 0), &bytes(0, 5_000));
            sent.is_err()
        });
        says(
            sent.expect_err("it is too long"),
            &["refuses", "MESSAGE_TOO_LARGE"],
        );
        connect(&*client);
        assert_eq!(client.frame_max(), 1_900);
        send(&*client, place(1, 1), &bytes(1, 1_900));
    });
}

#[test]
fn each_setting_of_rocketmq_that_breaks_the_promise_is_refused_by_name() {
    crate::bed::rough(Kind::RocketMq, |bed| {
        let log = fresh("settings");
        let known = bed.ready(&log);
        for (setting, right, wrong, needed) in [
            (
                "flushDiskType",
                "SYNC_FLUSH",
                "ASYNC_FLUSH",
                "Millrace needs SYNC_FLUSH,",
            ),
            (
                "maxMessageSize",
                "4194304",
                "65536",
                "Millrace needs at least 1114112",
            ),
            ("duplicationEnable", "false", "true", "Millrace needs false"),
            (
                "enableDLegerCommitLog",
                "false",
                "true",
                "Millrace needs false",
            ),
        ] {
            rocketmq_set(bed.address(), setting, wrong);
            let new = bed.client(&log, LONG);
            for client in [&known, &new] {
                says(
                    refused(client.check()),
                    &[&format!("{setting} = {wrong}"), needed],
                );
            }
            sends_nothing(&*new);
            rocketmq_set(bed.address(), setting, right);
            connect(&*new);
        }
        assert_eq!(all(&*known), []);
        let warnings = connect(&*known);
        says(&warnings[0], &["deletes orders after 72 hours"]);
        // Settings of Millrace itself.
        let (mut none, mut below, mut half) = (
            bed.rocketmq_settings(&log, LONG),
            bed.rocketmq_settings(&log, LONG),
            bed.rocketmq_settings(&log, LONG),
        );
        (none.namesrv, below.queue, half.access_key) =
            (" ; ".to_owned(), -1, Some("key".to_owned()));
        for settings in [none, below, half] {
            refused(RocketMqBroker::new(settings).check());
        }
    });
}

fn credentials_are_taken_if_right_and_refused_unprinted(bed: &Bed) {
    const WRONG: &str = "wrong-secret";
    let log = fresh("credentials");
    type With<'a> = Box<dyn Fn(&str, &str) -> Box<dyn Broker> + 'a>;
    let mut clients: Vec<(With<'_>, &str)> = Vec::new();
    match bed.kind {
        Kind::Redis => {
            let right = format!(">{PASSWORD}");
            let user = ["ACL", "SETUSER", USER, "on", &right, "~*", "+@all"];
            assert_eq!(redis(bed.address(), &user), "+OK");
            let with = |user: &str, password: &str| {
                let mut settings = bed.redis_settings(&log, LONG);
                settings.url = settings
                    .url
                    .replace("://", &format!("://{user}:{password}@"));
                assert!(!format!("{settings:?}").contains(password), "{settings:?}");
                Box::new(redis_client(settings)) as Box<dyn Broker>
            };
            clients.push((Box::new(with), "WRONGPASS"));
        }
        Kind::Kafka => {
            for mechanism in [
                Mechanism::Plain,
                Mechanism::ScramSha256,
                Mechanism::ScramSha512,
            ] {
                let settings = bed.kafka_settings(&log, LONG);
                let with = move |user: &str, password: &str| {
                    let (user, password) = (user.to_owned(), password.to_owned());
                    let settings = KafkaSettings {
                        bootstrap: format!("127.0.0.1:{}", bed.address().port() + SASL),
                        sasl: Some(Sasl {
                            mechanism,
                            user,
                            password,
                        }),
                        ..settings.clone()
                    };
                    Box::new(KafkaBroker::new(settings).expect("settings")) as Box<dyn Broker>
                };
                clients.push((Box::new(with), "SASL_AUTHENTICATION_FAILED"));
            }
        }
        Kind::RocketMq => {
            let with = |user: &str, password: &str| {
                let mut settings = bed.rocketmq_settings(&log, LONG);
                (settings.access_key, settings.secret_key) =
                    (Some(user.to_owned()), Some(password.to_owned()));
                Box::new(RocketMqBroker::new(settings)) as Box<dyn Broker>
            };
            clients.push((Box::new(with), ""));
        }
    }
    for (number, (with, code)) in (0..).zip(&clients) {
        let right = with(USER, PASSWORD);
        connect(&*right);
        send(&*right, place(1, number), &bytes(number, 20_000));
        assert_eq!(all(&*right).len() as u64, number + 1);
        for (user, password) in [(USER, WRONG), ("mallory", PASSWORD)] {
            let wrong = with(user, password);
            let sentence = refused(wrong.check());
            says(&sentence, &[code]);
            for said in [sentence, refused(wrong.read(None, 1)), format!("{wrong:?}")] {
                assert!(!said.contains(password), "{said}");
            }
            sends_nothing(&*wrong);
        }
    }
    if bed.kind == Kind::Redis {
        // None of these can be used, and none is repeated.
        for url in [
            "redis://shop:some-secret@",
            "http://shop:some-secret@h:1/",
            "redis://shop:some-secret@h:port/",
            "redis://shop:some-secret@h:1/database",
            "rediss://shop:some-secret@h:1/#insecure",
            "some-secret",
        ] {
            let mut settings = bed.redis_settings(&log, LONG);
            settings.url = url.to_owned();
            let sentence = refused(RedisBroker::new(settings));
            assert!(!sentence.contains("some-secret"), "{sentence}");
        }
    }
}

/// An authority in `ca.pem`, and a key with a certificate of its for `localhost` and 127.0.0.1 in `server.pem`.
pub fn make_certificates(dir: &Path) {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    let key = || KeyPair::generate().expect("a key");
    let (ca_key, server_key) = (key(), key());
    let mut ca = CertificateParams::new(Vec::<String>::new()).expect("parameters");
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let names = ["localhost", "127.0.0.1"].map(str::to_owned);
    let server = CertificateParams::new(names).expect("parameters");
    let server = server.signed_by(&server_key, &Issuer::from_params(&ca, &ca_key));
    let server = server_key.serialize_pem() + &server.expect("a certificate").pem();
    let ca = ca.self_signed(&ca_key).expect("a certificate").pem();
    for (name, pem) in [("ca.pem", ca), ("server.pem", server)] {
        std::fs::write(dir.join(name), pem).expect("write a certificate");
    }
}

#[test]
fn kafka_shows_a_certificate_that_is_trusted() {
    crate::bed::calm(Kind::Kafka, |bed| {
        let with = |port: u16, file: Option<&str>| {
            let log = fresh("tls");
            KafkaBroker::new(KafkaSettings {
                bootstrap: format!("127.0.0.1:{}", bed.address().port() + port),
                tls: file.map(|file| Tls::File(bed.server.dir().join(file))),
                ..bed.kafka_settings(&log, LONG)
            })
        };
        let right = with(TLS, Some("ca.pem")).expect("settings");
        connect(&right);
        for number in 0..20 {
            send(&right, place(1, number), &bytes(number, 30_000));
        }
        assert_eq!(all(&right).len(), 20);
        // The server's own certificate is no authority.
        let foreign = with(TLS, Some("server.pem")).expect("settings");
        says(refused(foreign.check()), &["TLS failed"]);
        refused(with(TLS, Some("absent.pem")).map(|_| ()));
        let plain = with(TLS, None).expect("settings").check();
        assert!(matches!(plain, Err(BrokerError::Away(_))), "{plain:?}");
        assert!(with(0, Some("ca.pem")).expect("settings").check().is_err());
    });
}

/// Where a process of its own finds the server of the test below: trusted certificates are read from the environment.
const TLS_URL: &str = "MILLRACE_TEST_TLS_URL";

#[test]
fn redis_shows_a_certificate_that_is_trusted() {
    let client = |url: &str| {
        redis_client(RedisSettings {
            url: url.to_owned(),
            stream: fresh("tls"),
            replicas_min: 0,
            timeout: LONG,
        })
    };
    if let Ok(url) = std::env::var(TLS_URL) {
        let trusting = client(&url);
        assert_eq!(connect(&trusting), [""; 0]);
        send(&trusting, place(1, 0), &bytes(9, 1 << 20));
        assert_eq!(
            trusting.read(None, 1).expect("a page")[0].frame,
            bytes(9, 1 << 20)
        );
        return;
    }
    let lines = |port: u16, dir: &Path| {
        make_certificates(dir);
        let dir = dir.display();
        format!(
            "tls-port {}\ntls-auth-clients no\ntls-cert-file {dir}/server.pem\ntls-key-file {dir}/server.pem\n\
             requirepass {PASSWORD}\n",
            port + 1
        )
    };
    let setup = Setup {
        lines: Some(Box::new(lines)),
        ..Setup::default()
    };
    let Some(bed) = Bed::start(Kind::Redis, setup) else {
        return;
    };
    let at = format!("default:{PASSWORD}@localhost:{}/", bed.address().port() + 1);
    let url = format!("rediss://{at}");
    says(refused(client(&url).check()), &["certificate"]);
    let plain = client(&format!("redis://{at}")).check();
    assert!(matches!(plain, Err(BrokerError::Away(_))), "{plain:?}");
    let trusting = Command::new(std::env::current_exe().expect("this program"))
        .args([
            "--exact",
            "settings::redis_shows_a_certificate_that_is_trusted",
        ])
        .env("SSL_CERT_FILE", bed.server.dir().join("ca.pem"))
        .env(TLS_URL, url)
        .output()
        .expect("a process of its own");
    let said = String::from_utf8_lossy(&trusting.stdout);
    assert!(
        trusting.status.success() && said.contains("1 passed"),
        "{said}"
    );
}
