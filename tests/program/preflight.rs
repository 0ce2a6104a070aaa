//! The preflight on a real PostgreSQL: what it finds, what it prepares, what it leaves to others, and that
//! nothing of it stays behind.

use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::support::block_on;
use crate::support::http::Connection;
use crate::support::listening::Listening;
use crate::support::postgres::{TestDatabase, test_dir};
use crate::support::served::millrace;
use crate::support::server::{TestServer, request};
use crate::support::standby::{self, Pair, Server};
use crate::support::waiting::wait_until_within;
use crate::support::webhook::{Paid, SECRET};
use millrace::metrics::Metrics;
use millrace::order::UnixMillis;
use millrace::pipeline::admin::preflight::{
    Check, LogProbe, ROW_BYTES, Report, Sale, Settings, Verdict, WAL_BYTES, preflight,
};
use millrace::queue::log::broker::{
    Broker, BrokerError, Checked, Place, Position, SendError, Stored,
};
use millrace::store::postgres::Database;
use millrace::store::{StoreError, schema};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio_postgres::Client;

const SCHEMA: &str = "millrace";
const STEP: Duration = Duration::from_secs(20);

fn settings() -> Settings {
    Settings {
        embedded: false,
        connections: 20,
        batch_rows_max: 500,
        order_timeout: Duration::from_secs(7),
        clock_difference_max_ms: 120_000,
        log: LogProbe::Memory,
    }
}

fn sale(orders: u64) -> Sale {
    Sale {
        orders: Some(orders),
        rate: None,
    }
}

/// A database at `url` with our schema in it.
async fn migrated(url: &str) -> Database {
    migrate(Database::new(url, SCHEMA, 4, STEP).expect("a URL")).await
}

/// The database of `server`.
fn of(server: &Server) -> Database {
    let config = server.config(standby::DATABASE);
    Database::with_config(config, SCHEMA, 4, STEP).expect("a pool")
}

/// The same, with our schema in it.
async fn migrated_of(server: &Server) -> Database {
    migrate(of(server)).await
}

async fn migrate(database: Database) -> Database {
    let mut session = database.connect("test").await.expect("connect");
    schema::migrate(&mut session, SCHEMA)
        .await
        .expect("migrate");
    database
}

async fn look(database: &Database, sale: Sale, prepares: bool) -> Report {
    let report = preflight(database, &settings(), sale, prepares).await;
    report.expect("a preflight")
}

fn check<'r>(report: &'r Report, name: &str) -> &'r Check {
    let found = report.checks.iter().find(|check| check.name == name);
    found.unwrap_or_else(|| panic!("no check {name}"))
}

async fn number(client: &Client, sql: &str) -> i64 {
    let row = client.query_one(sql, &[]).await;
    row.unwrap_or_else(|error| panic!("{sql}: {error:?}"))
        .get(0)
}

async fn scratch_tables(client: &Client) -> i64 {
    number(
        client,
        "SELECT count(*) FROM pg_class WHERE relname LIKE 'preflight%'",
    )
    .await
}

#[test]
fn too_few_segments_are_bad_and_prepare_makes_them() {
    block_on(async {
        let server = Listening::start().await;
        let database = migrated(&server.superuser_url()).await;
        let admin = server.administrator().await;
        // Where it is packaged, that way of reading is taken.
        let extension =
            "DO $$ BEGIN CREATE EXTENSION pg_prewarm; EXCEPTION WHEN OTHERS THEN NULL; END $$";
        admin.batch_execute(extension).await.expect("try");
        // A server with default settings keeps no segment ahead of a quiet database.
        let orders = 20 * (16 << 20) / WAL_BYTES;
        let before = look(&database, sale(orders), false).await;
        let found = check(&before, "wal_segments");
        assert_eq!(found.verdict, Verdict::Bad, "{found:?}");
        let remedy = found.remedy.as_deref().expect("a remedy");
        assert!(remedy.contains("millrace preflight --prepare"), "{remedy}");
        assert!(before.measured.wal_segments_ready < Some(20));
        assert_eq!(before.measured.wal_segments_needed, 20);
        assert!(!before.ok);

        let after = look(&database, sale(orders), true).await;
        let found = check(&after, "wal_segments");
        assert_eq!(found.verdict, Verdict::Good, "{found:?}");
        let prepared = after.prepared.as_ref().expect("preparations");
        let names: Vec<_> = prepared.iter().map(|step| (step.name, step.done)).collect();
        assert_eq!(
            names,
            [
                ("prewarm", true),
                ("wal_segments", true),
                ("checkpoint", true)
            ],
            "{prepared:?}"
        );
        let seen = number(
            &admin,
            "SELECT count(*) FROM pg_ls_waldir() WHERE name ~ '^[0-9A-F]{24}$'
                AND name > pg_walfile_name(pg_current_wal_lsn())",
        );
        assert!(seen.await >= 20);

        // More than max_wal_size keeps: that has to be raised first, and prepare does not.
        let more = look(&database, sale(orders * 4), true).await;
        let found = check(&more, "wal_segments");
        assert_eq!(found.verdict, Verdict::Bad, "{found:?}");
        let remedy = found.remedy.as_deref().expect("a remedy");
        assert!(remedy.contains("raise max_wal_size"), "{remedy}");
        let checkpoints = check(&more, "checkpoints");
        assert_eq!(checkpoints.verdict, Verdict::Warn);
        for statement in &checkpoints.sql {
            admin.batch_execute(statement).await.expect("it can be run");
        }
        let deadline = Instant::now() + STEP;
        while look(&database, sale(orders * 4), true).await.checks[1].verdict != Verdict::Good {
            assert!(Instant::now() < deadline, "the advice does not satisfy");
        }
        let advised = look(&database, sale(orders * 4), true).await;
        let found = check(&advised, "wal_segments");
        assert_eq!(found.verdict, Verdict::Good, "{found:?}");
        assert_eq!(scratch_tables(&admin).await, 0);
    });
}

#[test]
fn a_role_that_may_little_is_told_the_sql_that_helps() {
    block_on(async {
        let server = Listening::start().await;
        let owner = migrated(&server.superuser_url()).await;
        let admin = server.administrator().await;
        let may_write = "GRANT USAGE ON SCHEMA millrace TO shop;
            GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA millrace TO shop";
        admin.batch_execute(may_write).await.expect("grant");
        let database = Database::new(&server.url("shop", ""), SCHEMA, 4, STEP).expect("a URL");

        let report = look(&database, sale(100_000), true).await;
        let mut advice = Vec::new();
        for (name, part) in [
            ("wal_segments", "GRANT pg_monitor TO \"shop\";"),
            ("commit", "GRANT CREATE ON SCHEMA \"millrace\" TO \"shop\";"),
            ("rate", "GRANT CREATE ON SCHEMA \"millrace\" TO \"shop\";"),
            ("replication", "GRANT pg_monitor TO \"shop\";"),
        ] {
            let found = check(&report, name);
            assert_eq!(found.verdict, Verdict::Unknown, "{found:?}");
            assert_eq!(found.sql, [part], "{found:?}");
            advice.extend(found.sql.clone());
        }
        assert_eq!(report.measured.commit, None);
        let prepared = report.prepared.as_ref().expect("preparations");
        let refused: Vec<_> = prepared.iter().filter(|step| !step.done).collect();
        let names: Vec<_> = refused.iter().map(|step| step.name).collect();
        assert_eq!(names, ["wal_segments", "checkpoint"], "{prepared:?}");
        advice.extend(refused.iter().flat_map(|step| step.sql.clone()));
        for part in [
            "pg_switch_wal(); END LOOP",
            "CHECKPOINT;",
            "GRANT pg_checkpoint TO \"shop\";",
        ] {
            assert!(
                advice.iter().any(|statement| statement.contains(part)),
                "{part}: {advice:?}"
            );
        }

        // What it says can be run, and then the role may by itself.
        for statement in &advice {
            let run = admin.batch_execute(statement).await;
            run.unwrap_or_else(|error| panic!("{statement}: {error:?}"));
        }
        let report = look(&database, sale(100_000), true).await;
        assert_eq!(check(&report, "wal_segments").verdict, Verdict::Good);
        assert_eq!(check(&report, "replication").verdict, Verdict::Good);
        assert!(report.measured.commit.is_some() && report.measured.wait_ms.is_some());
        let prepared = report.prepared.as_ref().expect("preparations");
        assert!(prepared.iter().all(|step| step.done), "{prepared:?}");
        assert_eq!(scratch_tables(&admin).await, 0);
        owner.close();
    });
}

#[test]
fn settings_that_lose_orders_are_found() {
    block_on(async {
        let server = Listening::start().await;
        let admin = server.administrator().await;
        let change = "ALTER ROLE millrace SET synchronous_commit = off";
        admin.batch_execute(change).await.expect("alter");
        let database = migrated(&server.superuser_url()).await;
        admin
            .batch_execute("ALTER TABLE millrace.orders SET (autovacuum_enabled = false)")
            .await
            .expect("alter");
        let mut wanting = settings();
        wanting.connections = 200;
        let report = preflight(&database, &wanting, sale(1_000), false).await;
        let report = report.expect("a preflight");
        // The tests' servers run without fsync.
        let durability = check(&report, "durability");
        assert_eq!(durability.verdict, Verdict::Bad, "{durability:?}");
        assert!(
            durability.figure.contains("fsync off")
                && durability.figure.contains("synchronous_commit off"),
            "{durability:?}"
        );
        assert!(
            durability
                .sql
                .contains(&"ALTER SYSTEM SET fsync = 'on';".to_owned())
        );
        assert_eq!(check(&report, "autovacuum").verdict, Verdict::Bad);
        let connections = check(&report, "connections");
        assert_eq!(connections.verdict, Verdict::Bad, "{connections:?}");
        assert_eq!(check(&report, "pooler").verdict, Verdict::Good);
        assert_eq!(check(&report, "clock").verdict, Verdict::Good);
        assert_eq!(check(&report, "snapshots").verdict, Verdict::Good);
        let disk = check(&report, "disk");
        assert_ne!(
            disk.verdict,
            Verdict::Unknown,
            "the server is on this machine"
        );
    });
}

#[test]
fn a_standby_that_is_away_is_found_and_the_scratch_table_goes_all_the_same() {
    block_on(async {
        let server = Listening::start().await;
        let database = migrated(&server.superuser_url()).await;
        let impatient = Duration::from_secs(1);
        let database_of = |url: &str| Database::new(url, SCHEMA, 4, impatient).expect("a URL");
        let admin = server.administrator().await;
        // What a killed preflight leaves.
        admin
            .batch_execute("CREATE TABLE millrace.preflight_scratch (other text)")
            .await
            .expect("create");
        for statement in [
            "ALTER SYSTEM SET synchronous_standby_names = 'nobody'",
            "SELECT pg_reload_conf()",
        ] {
            admin.batch_execute(statement).await.expect("alter");
        }
        let deadline = Instant::now() + STEP;
        let names = "SELECT current_setting('synchronous_standby_names') = 'nobody'";
        while !admin
            .query_one(names, &[])
            .await
            .expect("a row")
            .get::<_, bool>(0)
        {
            assert!(Instant::now() < deadline, "not reloaded in time");
        }
        let report = look(&database_of(&server.superuser_url()), sale(1_000), false).await;
        let replication = check(&report, "replication");
        assert_eq!(replication.verdict, Verdict::Bad, "{replication:?}");
        let commit = check(&report, "commit");
        assert_eq!(commit.verdict, Verdict::Bad, "{commit:?}");
        assert!(commit.figure.contains("no answer"), "{commit:?}");
        assert_eq!(scratch_tables(&admin).await, 0);
        database.close();
    });
}

#[test]
fn a_standby_and_read_only_sessions_are_refused_before_anything_is_done() {
    block_on(async {
        let pair = Pair::start().await;
        let (primary, follower) = (migrated_of(&pair.primary).await, of(&pair.standby));
        pair.standby
            .until("SELECT to_regclass('millrace.refinery_schema_history') IS NOT NULL")
            .await;
        for prepares in [false, true] {
            let refused = preflight(&follower, &settings(), sale(1_000), prepares).await;
            let refused = refused.expect_err("a standby").to_string();
            assert!(
                refused.contains("a standby, which takes no writes"),
                "{refused}"
            );
        }
        let mut session = follower.connect("test").await.expect("connect");
        let refused = schema::migrate(&mut session, SCHEMA).await;
        let refused = refused.expect_err("a standby").to_string();
        assert!(refused.contains("name the primary"), "{refused}");
        pair.primary
            .sql("ALTER DATABASE millrace SET default_transaction_read_only = on")
            .await;
        let refused = preflight(&primary, &settings(), sale(1_000), false).await;
        let refused = refused.expect_err("read-only").to_string();
        assert!(
            refused.contains("default_transaction_read_only"),
            "{refused}"
        );
    });
}

#[test]
fn prepare_on_a_primary_waits_for_its_standby_and_tells_if_commits_wait_for_more() {
    block_on(async {
        let pair = Pair::start().await;
        let database = migrated_of(&pair.primary).await;
        let asynchronous = look(&database, sale(1_000), false).await;
        let found = check(&asynchronous, "replication");
        assert_eq!(found.verdict, Verdict::Warn, "{found:?}");
        assert!(
            found.figure.starts_with("1 standby, 0 synchronous"),
            "{found:?}"
        );

        pair.synchronous(true).await;
        let orders = 20 * (16 << 20) / WAL_BYTES;
        let prepared = look(&database, sale(orders), true).await;
        for name in ["replication", "wal_segments", "wal_kept"] {
            let found = check(&prepared, name);
            assert_eq!(found.verdict, Verdict::Good, "{found:?}");
        }
        let two = "ALTER SYSTEM SET synchronous_standby_names = 'FIRST 2 (standby, other)'";
        pair.primary.sql(two).await;
        pair.primary.sql("SELECT pg_reload_conf()").await;
        pair.primary
            .until("SELECT current_setting('synchronous_standby_names') LIKE 'FIRST 2%'")
            .await;
        let impatient = Database::with_config(
            pair.primary.config(standby::DATABASE),
            SCHEMA,
            4,
            Duration::from_secs(1),
        );
        let found = look(&impatient.expect("a pool"), sale(1_000), false).await;
        let found = check(&found, "replication");
        assert_eq!(found.verdict, Verdict::Bad, "{found:?}");
        let remedy = found.remedy.as_deref().expect("a remedy");
        assert!(remedy.contains("1 of 2 are there"), "{remedy}");
    });
}

#[test]
fn whoever_keeps_wal_is_named_and_prepare_does_not_fill_the_disk_for_it() {
    block_on(async {
        let dir = test_dir();
        let archive = [("archive_mode", "on"), ("archive_command", "/bin/true")];
        let server = Server::start_in(dir.path(), &archive).await;
        let database = migrated_of(&server).await;
        let orders = 20 * (16 << 20) / WAL_BYTES;
        let segments = "SELECT count(*) FROM pg_ls_waldir() WHERE name ~ '^[0-9A-F]{24}$'";

        let slot = "SELECT pg_create_physical_replication_slot('gone', true)";
        server.sql(slot).await;
        let before = server.number(segments).await;
        let held = look(&database, sale(orders), true).await;
        assert!(
            server.number(segments).await <= before + 2,
            "segments for nothing"
        );
        let step = &held.prepared.as_ref().expect("preparations")[1];
        assert!(
            !step.done && step.detail.contains("replication slot gone"),
            "{step:?}"
        );
        let found = check(&held, "wal_segments");
        assert_eq!(found.verdict, Verdict::Bad, "{found:?}");
        let remedy = found.remedy.as_deref().expect("a remedy");
        let drop = "SELECT pg_drop_replication_slot('gone')";
        assert!(remedy.contains(drop), "{remedy}");
        assert_eq!(check(&held, "wal_kept").verdict, Verdict::Warn);

        // The remedy helps, also if wal_keep_size keeps more than there is.
        server.sql(drop).await;
        server.sql("ALTER SYSTEM SET wal_keep_size = '160MB'").await;
        server.sql("SELECT pg_reload_conf()").await;
        server
            .until("SELECT current_setting('wal_keep_size') = '160MB'")
            .await;
        let freed = look(&database, sale(orders), true).await;
        for name in ["wal_segments", "wal_kept"] {
            let found = check(&freed, name);
            assert_eq!(found.verdict, Verdict::Good, "{found:?}");
        }
    });
}

#[test]
fn an_archive_that_takes_nothing_is_bad() {
    block_on(async {
        let dir = test_dir();
        let archive = [("archive_mode", "on"), ("archive_command", "/bin/false")];
        let server = Server::start_in(dir.path(), &archive).await;
        let database = migrated_of(&server).await;
        server.sql("SELECT pg_switch_wal()").await;
        server
            .until("SELECT failed_count > 0 FROM pg_stat_archiver")
            .await;
        let report = look(&database, sale(1_000), false).await;
        let found = check(&report, "wal_kept");
        assert_eq!(found.verdict, Verdict::Bad, "{found:?}");
        assert!(found.figure.contains("archive_command"), "{found:?}");
    });
}

/// A broker of which nothing but its check is asked.
#[derive(Debug)]
struct CheckAlone(Option<&'static str>);

impl Broker for CheckAlone {
    fn check(&self) -> Result<Checked, BrokerError> {
        match self.0 {
            Some(warning) => Ok(Checked {
                warnings: vec![warning.to_owned()],
                is_anew: false,
            }),
            None => Err(BrokerError::Away("connection refused".to_owned())),
        }
    }
    fn send(&self, _: Place, _: &[u8]) -> Result<u64, SendError> {
        panic!("a preflight appends nothing");
    }
    fn read(&self, _: Option<Position>, _: usize) -> Result<Vec<Stored>, BrokerError> {
        panic!("a preflight reads nothing");
    }
    fn forget(&self, _: Position) -> Result<(), BrokerError> {
        panic!("a preflight forgets nothing");
    }
    fn frame_max(&self) -> usize {
        1 << 20
    }
    fn title(&self) -> String {
        "the log".to_owned()
    }
}

#[test]
fn a_broker_is_asked_again_although_its_appends_were_fast_before() {
    block_on(async {
        let database = TestDatabase::create().await;
        let database = migrated(&database.url()).await;
        let metrics = Metrics::new().expect("metrics");
        for _ in 0..200 {
            metrics.journal_sync_seconds.observe(0.0015);
        }
        let found = async |broker: CheckAlone| {
            let mut settings = settings();
            settings.log = LogProbe::Broker(Arc::new(broker), Some(metrics.clone()));
            let report = preflight(&database, &settings, sale(1_000), false).await;
            check(&report.expect("a preflight"), "order_log").clone()
        };
        let weak = found(CheckAlone(Some("topic t has 1 replica"))).await;
        assert_eq!(weak.verdict, Verdict::Warn, "{weak:?}");
        let told = ["200 groups", "topic t has 1 replica"];
        let all = told.iter().all(|part| weak.figure.contains(part));
        assert!(all && weak.remedy.is_some(), "{weak:?}");
        let away = found(CheckAlone(None)).await;
        assert_eq!(away.verdict, Verdict::Bad, "{away:?}");
        assert!(away.figure.contains("connection refused"), "{away:?}");
    });
}

#[test]
fn a_preflight_that_is_interrupted_leaves_nothing() {
    block_on(async {
        let database = TestDatabase::create().await;
        migrated(&database.url()).await.close();
        let admin = database.connect().await;
        let data_dir = test_dir();
        for signal in [Signal::INT, Signal::TERM] {
            let child = millrace(&["preflight", "--orders", "1000"])
                .env("MILLRACE_DATA_DIR", data_dir.path())
                .env("MILLRACE_DATABASE__URL", database.url())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .expect("run millrace");
            wait_until_within("its table", STEP, async || scratch_tables(&admin).await > 0).await;
            kill_process(Pid::from_child(&child), signal).expect("a signal");
            let ended = child.wait_with_output().expect("its end");
            assert_eq!(ended.status.code(), Some(2), "{ended:?}");
            let said = String::from_utf8_lossy(&ended.stderr).into_owned();
            assert!(said.contains("nothing of the preflight is left"), "{said}");
            assert_eq!(scratch_tables(&admin).await, 0);
        }
    });
}

#[test]
fn one_preflight_at_a_time_and_readyz_warns_before_a_sale() {
    block_on(async {
        const PREFLIGHT: &str = "/admin/v1/preflight";
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        let warnings = async || {
            let ready = server.control("GET", "/readyz", Value::Null).await;
            assert_eq!(ready.status, 200, "a warning stops nothing: {ready:?}");
            let ready = ready.json();
            let all = ready["warnings"].as_array().cloned().unwrap_or_default();
            let of = all
                .into_iter()
                .filter(|warning| warning["name"] == "preflight");
            let texts = of.map(|warning| warning["detail"].as_str().unwrap_or_default().to_owned());
            texts.collect::<Vec<_>>()
        };
        let opens = |ms: u64| json!({ "opens_at": UnixMillis::now().plus_ms(ms).to_string() });
        server.put_sku("TOMORROW", 5, opens(86_400_000)).await;
        server.put_sku("OPEN", 5, json!({})).await;
        assert!(warnings().await.is_empty(), "nothing opens soon");
        server.put_sku("SOON", 5, opens(1_800_000)).await;
        let [missing] = &warnings().await[..] else {
            panic!("no warning")
        };
        assert!(missing.contains("no preflight"), "{missing}");

        let mut first = Connection::open(server.control).expect("connect");
        first.begin("POST", PREFLIGHT, &[], "").expect("send");
        let admin = database.connect().await;
        let sessions = "SELECT count(*) FROM pg_stat_activity
            WHERE application_name = 'millrace preflight' AND datname = current_database()";
        // Its lock, not only its session: otherwise the other process below may take it first.
        let locks = "SELECT count(*) FROM pg_stat_activity JOIN pg_locks USING (pid)
            WHERE application_name = 'millrace preflight' AND datname = current_database()
              AND locktype = 'advisory' AND granted";
        let deadline = Instant::now() + STEP;
        while number(&admin, locks).await == 0 {
            assert!(Instant::now() < deadline, "it does not begin");
        }
        let second = server.control("POST", PREFLIGHT, Value::Null).await;
        assert_eq!(
            (second.status, second.code().as_str()),
            (409, "preflight_running")
        );
        // Another process of the same database is refused by the database.
        let elsewhere = Database::new(&database.url(), SCHEMA, 4, STEP).expect("a URL");
        let refused = preflight(&elsewhere, &settings(), Sale::default(), false).await;
        assert!(
            matches!(refused, Err(StoreError::PreflightRunning)),
            "{refused:?}"
        );
        // The client goes away, and the preflight ends all the same.
        drop(first);
        wait_until_within("its end", Duration::from_secs(60), async || {
            number(&admin, sessions).await == 0
        })
        .await;
        assert_eq!(scratch_tables(&admin).await, 0);

        let deadline = Instant::now() + STEP;
        let found = loop {
            let [found] = &warnings().await[..] else {
                panic!("no warning")
            };
            if !found.contains("no preflight") {
                break found.clone();
            }
            assert!(Instant::now() < deadline, "it is not remembered");
        };
        assert!(found.contains("durability"), "{found}");
        for wrong in [
            "?prepare=yes",
            "?orders=-1",
            "?orders=0",
            "?orders=18446744073709551615",
            "?rate=x",
            "?rate=0",
            "?x=1",
        ] {
            let target = format!("{PREFLIGHT}{wrong}");
            let answer = server.control("POST", &target, Value::Null).await;
            assert_eq!(answer.status, 400, "{wrong}");
        }
        server.assert_audit().await;
        assert!(server.stop().await);
    });
}

#[test]
fn the_command_has_a_table_json_and_three_exit_codes() {
    block_on(async {
        let database = TestDatabase::create().await;
        let data_dir = test_dir();
        let run = |url: String, more: &[&str]| {
            let mut command = millrace(&["preflight"]);
            command
                .args(more)
                .env("MILLRACE_DATA_DIR", data_dir.path())
                .env("MILLRACE_DATABASE__URL", url);
            command.output().expect("run millrace")
        };
        let before = run(database.url(), &[]);
        assert_eq!(before.status.code(), Some(2), "{before:?}");
        let said = String::from_utf8_lossy(&before.stderr).into_owned();
        assert!(said.contains("millrace migrate"), "{said}");
        migrated(&database.url()).await.close();

        let found = run(database.url(), &["--orders", "1000", "--rate", "500"]);
        assert_eq!(found.status.code(), Some(1), "{found:?}");
        let table = String::from_utf8(found.stdout).expect("text");
        for part in [
            "BAD",
            "WAL segments",
            "order log",
            "1,000 orders at 500 a second",
            "ALTER SYSTEM SET fsync = 'on';",
            "Mend what is BAD",
        ] {
            assert!(table.contains(part), "{part}: {table}");
        }
        let found = run(database.url(), &["--orders", "1000", "--json", "--prepare"]);
        let report: Value = serde_json::from_slice(&found.stdout).expect("JSON");
        assert_eq!(report["ok"], false);
        assert_eq!(
            (&report["orders"], &report["rate"]),
            (&json!(1_000), &Value::Null)
        );
        assert_eq!(report["prepared"].as_array().map(Vec::len), Some(3));
        let measured = &report["measured"];
        assert!(measured["commit"]["count"].as_u64() > Some(0), "{report:#}");
        for name in ["commit", "log_append"] {
            let at = |name: &str, part: &str| measured[name][part].as_f64().expect("a number");
            assert!(at(name, "p50_ms") <= at(name, "p99_ms"), "{report:#}");
            assert!(at(name, "p99_ms") <= at(name, "p999_ms"), "{report:#}");
        }
        let left: Vec<_> = std::fs::read_dir(data_dir.path())
            .expect("a folder")
            .collect();
        assert!(left.is_empty(), "the append's file stays: {left:?}");

        let nowhere = run("postgresql://127.0.0.1:1/none".to_owned(), &[]);
        assert_eq!(nowhere.status.code(), Some(2), "{nowhere:?}");
    });
}

/// What [`WAL_BYTES`] and [`ROW_BYTES`] are taken from: 7 of 10 orders are paid, the others expire.
#[test]
fn an_order_writes_as_much_as_the_preflight_reckons() {
    const ORDERS: usize = 3_000;
    block_on(async {
        let listening = Listening::start().await;
        let server = TestServer::start_at(listening.superuser_url(), |config| {
            config.payments.standard.secret.0 = vec![SECRET.to_owned()];
            config.orders.payment_ttl_ms = 20_000;
        })
        .await;
        server.put_sku("IPHONE-15", ORDERS as u32, json!({})).await;
        let admin = listening.administrator().await;
        // Without it each page would be written whole once more, as after any checkpoint.
        let wal = "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::int8";
        let rows = "SELECT sum(pg_total_relation_size(oid))::int8 FROM pg_class
            WHERE relnamespace = 'millrace'::regnamespace AND relkind = 'r'";
        let (wal_before, rows_before) = (number(&admin, wal).await, number(&admin, rows).await);
        let mut placed = Vec::new();
        for batch in 0..ORDERS / 500 {
            let lines: String = (0..500)
                .map(|at| {
                    let user = format!("user-{:010}", batch * 500 + at);
                    let order =
                        json!({ "user_id": user, "sku_id": "IPHONE-15", "idempotency_key": "k" });
                    format!("{order}\n")
                })
                .collect();
            let fields = [("Content-Type", "application/x-ndjson")];
            let answer = request(server.data, "POST", "/v1/orders:batch", &fields, lines).await;
            let text = String::from_utf8(answer.body).expect("text");
            placed.extend(
                text.lines()
                    .map(|line| serde_json::from_str::<Value>(line).expect("JSON")),
            );
        }
        assert_eq!(placed.len(), ORDERS);
        let payments: Vec<Paid> = placed.iter().map(Paid::of).collect();
        for some in payments[..ORDERS * 7 / 10].chunks(50) {
            let sent = some.iter().map(|paid| paid.deliver(server.data));
            for answer in futures_util::future::join_all(sent).await {
                assert_eq!(answer.status, 200, "{answer:?}");
            }
        }
        wait_until_within("their expiry", Duration::from_secs(180), async || {
            server.stock("IPHONE-15").await.1 == 0
        })
        .await;
        let wal = (number(&admin, wal).await - wal_before) as u64 / ORDERS as u64;
        let rows = (number(&admin, rows).await - rows_before) as u64 / ORDERS as u64;
        println!("an order of {ORDERS}: {wal} bytes of WAL, {rows} bytes of rows");
        assert!(
            (WAL_BYTES / 2..=WAL_BYTES).contains(&wal),
            "{wal} bytes of WAL an order"
        );
        assert!(
            (ROW_BYTES / 3..=ROW_BYTES).contains(&rows),
            "{rows} bytes of rows an order"
        );
        server.assert_audit().await;
        assert!(server.stop().await);
    });
}
