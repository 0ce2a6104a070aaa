//! Every way to a database that `database.url` promises: each `sslmode` against good and bad
//! certificates, SCRAM, unix sockets, several hosts, a role that is nobody special, and PgBouncer,
//! whose transaction pooling is refused.

use std::process::{Command, Output};
use std::time::Duration;

use crate::support::listening::{
    Authority, Listening, PASSWORD, PASSWORD_IN_URL, free_port, of_version_1, self_signed,
};
use crate::support::pgbouncer::PgBouncer;
use crate::support::server::TestServer;
use futures_util::future::join_all;
use millrace::store::StoreError;
use millrace::store::postgres::{Database, ReplicationStream, pooling};
use serde_json::Value;

const STEP: Duration = Duration::from_secs(5);

fn block_on(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(4)
        .max_blocking_threads(600)
        .enable_all()
        .build()
        .expect("a runtime")
        .block_on(test);
}

fn open(url: &str) -> Result<Database, StoreError> {
    Database::new(url, "millrace", 2, STEP)
}

/// Connects, by itself, through the pool and for a stream of changes, and says whether it is encrypted.
async fn encrypted(url: &str) -> Result<bool, String> {
    const ASK: &str = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    const SENDERS: &str = "SELECT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)
                            WHERE backend_type = 'walsender' ORDER BY backend_start";
    let database = open(url).map_err(|e| e.to_string())?;
    let alone = match database.connect("millrace test").await {
        Ok(client) => {
            let alone = client.query_one(ASK, &[]).await.expect("ask").get(0);
            let streams = ReplicationStream::connect(&database, &client).await;
            let stream = streams.expect("a stream goes the same way");
            let mut senders = client.query(SENDERS, &[]).await.expect("ask");
            let newest = senders.pop().expect("the server has a sender");
            assert_eq!(newest.get::<_, bool>(0), alone, "a stream too: {url}");
            drop(stream);
            Ok(alone)
        }
        Err(error) => Err(error.to_string()),
    };
    let pooled: Result<bool, String> = match database.pooled().await {
        Ok(client) => Ok(client.query_one(ASK, &[]).await.expect("ask").get(0)),
        Err(error) => Err(error.to_string()),
    };
    assert_eq!(
        alone, pooled,
        "the pool connects as a single one does: {url}"
    );
    alone
}

/// Asserts that connecting goes as `wanted`: `Ok(encrypted)`, or an error with these words.
async fn assert_goes(url: &str, wanted: Result<bool, &str>) {
    let found = encrypted(url).await;
    match (&found, wanted) {
        (Ok(found), Ok(wanted)) if *found == wanted => {}
        (Err(message), Err(words)) if message.contains(words) => {
            assert!(!message.contains(PASSWORD), "{message}");
            assert!(!message.contains('\n'), "one sentence: {message}");
        }
        _ => panic!("{url}: wanted {wanted:?}, found {found:?}"),
    }
}

#[test]
fn each_sslmode_takes_the_certificates_that_it_should() {
    block_on(async {
        let Some(server) = Listening::start_for_tls().await else {
            return;
        };
        server.let_all_stream().await;
        let ours = Authority::new("ours");
        let other = Authority::new("another");
        let own = self_signed(&["localhost"], 2200);
        let own_expired = self_signed(&["localhost"], 2021);
        let trust = |file: &str, text: &str| server.write(file, text).display().to_string();
        let root = trust("ca.crt", &ours.certificate);
        let own_root = trust("own.crt", &own.certificate);
        let own_expired_root = trust("own-expired.crt", &own_expired.certificate);
        let wanted = |letter: char| match letter {
            '-' => Ok(false),
            '+' => Ok(true),
            't' => Err("turn ssl on there, or lower sslmode"),
            'n' => Err("subjectAltName, or use sslmode=verify-ca"),
            'a' => Err("name the certificate authority of this server in sslrootcert"),
            'e' => Err("renew the server's certificate"),
            '3' => Err("a certificate of X.509 version 3"),
            other => panic!("no such outcome: {other}"),
        };

        // Outcomes for disable, allow, prefer, require, and with an authority to trust: prefer,
        // require, verify-ca, verify-full. `-` is connected without TLS, `+` with it.
        let good = |names: &[&str]| Some(ours.vouch("localhost", names, 2200));
        let old = || of_version_1(self_signed(&["localhost"], 2200));
        let (old, old_trusted) = (old(), old());
        let old_root = trust("old.crt", &old_trusted.certificate);
        let rows = [
            ("no TLS", None, &root, "---t-ttt"),
            ("good", good(&["localhost"]), &root, "--++++++"),
            ("for another host", good(&["db.example"]), &root, "--+++++n"),
            ("without a name", good(&[]), &root, "--+++++n"),
            (
                "expired",
                Some(ours.vouch("db", &["localhost"], 2021)),
                &root,
                "--++-eee",
            ),
            (
                "from another authority",
                Some(other.vouch("db", &["localhost"], 2200)),
                &root,
                "--++-aaa",
            ),
            ("its own authority", Some(own), &own_root, "--++++++"),
            (
                "its own authority, expired",
                Some(own_expired),
                &own_expired_root,
                "--++-eee",
            ),
            (
                "its own authority, which we do not trust",
                Some(self_signed(&["localhost"], 2200)),
                &root,
                "--++-aaa",
            ),
            ("X.509 version 1", Some(old), &root, "--++-333"),
            (
                "X.509 version 1, trusted itself",
                Some(old_trusted),
                &old_root,
                "--+++++3",
            ),
        ];
        for (name, presented, trusted, letters) in rows {
            server.present(presented.as_ref()).await;
            let with_root = |mode: &str| format!("sslmode={mode}&sslrootcert={trusted}");
            let parameters = [
                "sslmode=disable".to_owned(),
                "sslmode=allow".to_owned(),
                "sslmode=prefer".to_owned(),
                "sslmode=require".to_owned(),
                with_root("prefer"),
                with_root("require"),
                with_root("verify-ca"),
                with_root("verify-full"),
            ];
            assert_eq!(parameters.len(), letters.len());
            for (parameters, letter) in parameters.iter().zip(letters.chars()) {
                eprintln!("{name}: {parameters}");
                assert_goes(&server.url("shop", parameters), wanted(letter)).await;
            }
        }
    });
}

#[test]
fn files_that_are_missing_or_wrong_are_named() {
    let fault = |parameters: &str| {
        let error = open(&format!("postgresql://u@localhost/d?{parameters}"))
            .expect_err("it must not be taken");
        assert!(!error.is_transient());
        error.to_string()
    };
    let dir = crate::support::postgres::test_dir();
    let empty = dir.path().join("empty.pem");
    std::fs::write(&empty, "").expect("write it");
    let pair = Authority::new("one").vouch("one", &[], 2200);
    let stranger = Authority::new("two").vouch("two", &[], 2200);
    let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    std::fs::write(&cert, pair.certificate).expect("write it");
    std::fs::write(&key, stranger.key).expect("write it");
    for (parameters, words) in [
        (
            "sslrootcert=/nowhere/ca.pem".to_owned(),
            "sslrootcert /nowhere/ca.pem: No such file",
        ),
        (format!("sslrootcert={}", empty.display()), "no PEM block"),
        (
            format!("sslcert={}&sslkey={}", cert.display(), cert.display()),
            "no PEM block",
        ),
        (
            format!("sslcert={}&sslkey={}", cert.display(), key.display()),
            "do not go together",
        ),
    ] {
        let message = fault(&parameters);
        assert!(message.contains(words), "{parameters}: {message}");
    }
}

#[test]
fn the_servers_own_rules_choose_between_tls_and_none() {
    block_on(async {
        let Some(server) = Listening::start_for_tls().await else {
            return;
        };
        server.let_all_stream().await;
        let ours = Authority::new("ours");
        server.write("clients.crt", &ours.certificate);
        server
            .present(Some(&ours.vouch("db", &["localhost"], 2200)))
            .await;
        const TURNED_AWAY: &str = "or the server's pg_hba.conf";
        for (role, parameters, wanted) in [
            ("tls", "sslmode=disable", Err(TURNED_AWAY)),
            ("tls", "sslmode=allow", Ok(true)),
            ("tls", "sslmode=prefer", Ok(true)),
            ("plain", "sslmode=allow", Ok(false)),
            ("plain", "sslmode=prefer", Ok(false)),
            ("plain", "sslmode=require", Err(TURNED_AWAY)),
            ("tls", "sslmode=require&channel_binding=require", Ok(true)),
            (
                "shop",
                "sslmode=disable&channel_binding=require",
                Err("channel binding"),
            ),
        ] {
            assert_goes(&server.url(role, parameters), wanted).await;
        }

        // A role that proves itself by a certificate and has no other way in.
        let proof = ours.vouch("holder", &[], 2200);
        let cert = server.write("holder.crt", &proof.certificate);
        let key = server.write("holder.key", &proof.key);
        let parameters = format!(
            "sslmode=require&sslcert={}&sslkey={}",
            cert.display(),
            key.display()
        );
        assert_goes(&server.url("holder", &parameters), Ok(true)).await;
        assert_goes(&server.url("holder", "sslmode=require"), Err("certificate")).await;
        let other = ours.vouch("somebody", &[], 2200);
        server.write("holder.crt", &other.certificate);
        server.write("holder.key", &other.key);
        assert_goes(&server.url("holder", &parameters), Err("certificate")).await;
    });
}

#[test]
fn scram_unix_sockets_and_several_hosts() {
    block_on(async {
        let server = Listening::start().await;
        server.let_all_stream().await;
        let (port, closed) = (server.port, free_port());
        let socket = server.dir.path().display().to_string();
        let encoded = socket.replace('/', "%2F");
        let password = PASSWORD_IN_URL;
        const DOWN: &str = "check that it runs at the host and port";
        for (url, wanted) in [
            (
                format!("postgresql://shop:{password}@localhost:{port}/shop"),
                Ok(false),
            ),
            (
                format!("postgresql://shop:wrong@localhost:{port}/shop"),
                Err("check user and password"),
            ),
            (
                format!("postgresql://shop@localhost:{port}/shop"),
                Err("put it into database.url"),
            ),
            (
                format!("postgresql://nobody:{password}@localhost:{port}/shop"),
                Err("pg_hba.conf"),
            ),
            (
                format!("postgresql://shop:{password}@localhost:{port}/nowhere"),
                Err("create it"),
            ),
            (
                format!("host=localhost port={port} user=shop dbname=shop password='{PASSWORD}'"),
                Ok(false),
            ),
            (
                format!(
                    "hostaddr=127.0.0.1 port={port} user=shop dbname=shop password='{PASSWORD}' sslmode=prefer"
                ),
                Ok(false),
            ),
            // Unix sockets, where no TLS is to be had, whatever sslmode says.
            (
                format!("postgresql://shop:{password}@{encoded}:{port}/shop"),
                Ok(false),
            ),
            (
                format!("postgresql://shop:{password}@{encoded}:{port}/shop?sslmode=require"),
                Ok(false),
            ),
            (
                format!("postgresql://shop:{password}@:{port}/shop?host={encoded}"),
                Ok(false),
            ),
            (
                format!("postgresql://shop:wrong@{encoded}:{port}/shop"),
                Err("check user and password"),
            ),
            (
                format!("host={socket} port={port} user=shop dbname=shop password='{PASSWORD}'"),
                Ok(false),
            ),
            (
                format!("host={socket}/none port={port} user=shop dbname=shop password=x"),
                Err(DOWN),
            ),
            // Several hosts: the first that takes us.
            (
                format!("postgresql://shop:{password}@localhost:{closed},localhost:{port}/shop"),
                Ok(false),
            ),
            (
                format!(
                    "host=localhost,{socket} port={closed},{port} user=shop dbname=shop password='{PASSWORD}' sslmode=require"
                ),
                Ok(false),
            ),
            (
                format!("postgresql://shop:{password}@localhost:{closed}/shop"),
                Err(DOWN),
            ),
            (
                format!("host=a,b port=1,2,3 user={closed}"),
                Err("2 hosts but 3 ports"),
            ),
            (format!("user=shop port={port}"), Err("names no host")),
        ] {
            assert_goes(&url, wanted).await;
        }
    });
}

/// Sells 200 units to 300 buyers, with every worker's session cut once in between.
async fn sell(url: String, server: &Listening) {
    let shop = TestServer::start_at(url, |config| config.workers.count = 3).await;
    shop.put_sku("HOT", 200, Value::Null).await;
    let rush = async |from: usize| {
        let answers = join_all((from..from + 150).map(|buyer| {
            let shop = &shop;
            async move { shop.order(&format!("u{buyer}"), "HOT", Some("k")).await }
        }))
        .await;
        let with = |status| {
            answers
                .iter()
                .filter(|answer| answer.status == status)
                .count()
        };
        assert_eq!(with(201) + with(409), 150, "{answers:?}");
        with(201)
    };
    let administrator = server.administrator().await;
    let mut sold = rush(0).await;
    let cut = administrator
        .query_one(
            "SELECT count(*) FILTER (WHERE pg_terminate_backend(pid)) FROM pg_stat_activity
              WHERE usename = 'shop' AND application_name LIKE 'millrace worker%'",
            &[],
        )
        .await
        .expect("cut the workers off");
    assert!(cut.get::<_, i64>(0) > 0, "the workers bear their names");
    sold += rush(150).await;
    assert_eq!(sold, 200);
    assert_eq!(shop.stock("HOT").await, (0, 200, 0));
    shop.assert_audit().await;
    assert!(shop.stop().await, "nothing is left over");
    let rows: i64 = administrator
        .query_one("SELECT count(*) FROM millrace.order_list", &[])
        .await
        .expect("count the orders")
        .get(0);
    assert_eq!(rows, 200);
}

#[test]
fn a_role_that_is_nobody_special_sells_over_verified_tls() {
    block_on(async {
        let Some(server) = Listening::start_for_tls().await else {
            return;
        };
        let ours = Authority::new("ours");
        server
            .present(Some(&ours.vouch("db", &["localhost"], 2200)))
            .await;
        let root = server.write("ca.crt", &ours.certificate);
        let parameters = format!("sslmode=verify-full&sslrootcert={}", root.display());
        sell(server.url("shop", &parameters), &server).await;
    });
}

#[test]
fn a_sale_runs_through_session_pooling() {
    block_on(async {
        let server = Listening::start().await;
        let Some(pooler) = PgBouncer::start(&server, "") else {
            return;
        };
        // A full pool of sessions that others have left behind.
        let database = Database::new(&pooler.url("session"), "public", 12, STEP).expect("a URL");
        let left: Vec<_> = join_all((0..12).map(|_| database.pooled())).await;
        assert!(left.iter().all(Result::is_ok));
        drop(left);
        database.close();
        let check = open(&pooler.url("session")).expect("a URL");
        for _ in 0..10 {
            pooling::check(&check).await.expect("sessions are ours");
        }
        sell(pooler.url("session"), &server).await;
        // The advisory lock went with the session: the next process is let in.
        let again = TestServer::start_at(pooler.url("session"), |_| {}).await;
        assert!(again.stop().await);
    });
}

#[test]
fn pooling_of_transactions_is_found_whatever_else_goes_on() {
    block_on(async {
        let server = Listening::start().await;
        for more in [
            "",
            "server_round_robin = 1",
            "server_reset_query_always = 1",
        ] {
            let Some(pooler) = PgBouncer::start(&server, more) else {
                return;
            };
            for mode in ["transaction", "narrow", "statement"] {
                let database = open(&pooler.url(mode)).expect("a URL");
                for _ in 0..5 {
                    let found = pooling::check(&database).await;
                    assert!(
                        matches!(found, Err(StoreError::SharedSessions)),
                        "{more} {mode}: {found:?}"
                    );
                }
            }
            // With idle sessions at hand, and with others who keep taking and returning them.
            let url = pooler.url("transaction");
            let others = open(&url).expect("a URL");
            let noise: Vec<_> = join_all((0..8).map(|_| others.connect("somebody else")))
                .await
                .into_iter()
                .map(|client| {
                    let client = client.expect("connect");
                    tokio::spawn(async move {
                        loop {
                            let asked =
                                client.simple_query("BEGIN; SELECT pg_sleep(0.001); COMMIT");
                            if asked.await.is_err() {
                                return;
                            }
                        }
                    })
                })
                .collect();
            for _ in 0..20 {
                let found = pooling::check(&others).await;
                assert!(
                    matches!(found, Err(StoreError::SharedSessions)),
                    "{more}: {found:?}"
                );
            }
            // The same noise, seen from beside the pooler, is no reason to refuse.
            let direct = open(&server.url("shop", "")).expect("a URL");
            for _ in 0..20 {
                pooling::check(&direct).await.expect("a direct connection");
            }
            noise.iter().for_each(tokio::task::JoinHandle::abort);
        }
    });
}

fn millrace(args: &[&str], url: &str, more: &[(&str, &str)]) -> Output {
    let dir = crate::support::postgres::test_dir();
    let mut command = Command::new(env!("CARGO_BIN_EXE_millrace"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("MILLRACE_")) {
        command.env_remove(name);
    }
    command
        .args(args)
        .envs(more.iter().copied())
        .env("MILLRACE_DATABASE__URL", url)
        .env("MILLRACE_DATA_DIR", dir.path())
        .env("MILLRACE_DATA_PLANE__LISTEN", "127.0.0.1:0")
        .env("MILLRACE_CONTROL_PLANE__LISTEN", "127.0.0.1:0")
        .current_dir(dir.path())
        .output()
        .expect("run millrace")
}

/// The command's last words.
fn last_line(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    text.lines().last().unwrap_or_default().to_owned()
}

#[test]
fn every_command_refuses_shared_sessions_in_one_sentence() {
    block_on(async {
        let server = Listening::start().await;
        let Some(pooler) = PgBouncer::start(&server, "") else {
            return;
        };
        for mode in ["transaction", "statement"] {
            for command in [
                &["config", "check"][..],
                &["serve"],
                &["migrate"],
                &["audit"],
            ] {
                let output = millrace(command, &pooler.url(mode), &[]);
                let said = last_line(&output);
                assert_eq!(output.status.code(), Some(1), "{command:?}: {said}");
                assert!(
                    said.starts_with("millrace: database.url leads through a pooler")
                        && said.contains("pool_mode = session"),
                    "{command:?}: {said}"
                );
            }
        }
        let output = millrace(&["config", "check"], &pooler.url("session"), &[]);
        assert!(output.status.success(), "{}", last_line(&output));
        // A stream of changes does not go through it.
        let pooled = open(&pooler.url("session")).expect("a URL");
        let session = pooled.connect("millrace test").await.expect("a session");
        let refused = ReplicationStream::connect(&pooled, &session).await;
        let refused = refused
            .expect_err("PgBouncer knows no replication")
            .to_string();
        assert!(refused.contains("replication"), "{refused}");
        let none = server
            .administrator()
            .await
            .query_one("SELECT to_regnamespace('millrace') IS NULL", &[])
            .await
            .expect("look for a schema");
        assert!(none.get::<_, bool>(0), "nothing was made");
    });
}

#[test]
fn the_machines_own_authorities_are_trusted_where_asked() {
    block_on(async {
        let Some(server) = Listening::start_for_tls().await else {
            return;
        };
        let ours = Authority::new("ours");
        server
            .present(Some(&ours.vouch("db", &["localhost"], 2200)))
            .await;
        let store = server.write("store.pem", &ours.certificate);
        let other = server.write("other.pem", &Authority::new("another").certificate);
        let url = server.url("shop", "sslrootcert=system");
        let with = |store: &std::path::Path| {
            millrace(
                &["config", "check"],
                &url,
                &[("SSL_CERT_FILE", &store.display().to_string())],
            )
        };
        let output = with(&store);
        assert!(output.status.success(), "{}", last_line(&output));
        let output = with(&other);
        assert_eq!(output.status.code(), Some(1));
        assert!(
            last_line(&output).contains("sslrootcert"),
            "{}",
            last_line(&output)
        );
    });
}
