//! The embedded PostgreSQL, on a real one: its life, its deaths, and what it leaves alone.

use std::{
    fs::Permissions,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    time::{Duration, Instant},
};

use crate::support::postgres::{TestDatabase, connect, copy_template, options, test_dir};
use millrace::store::embedded::{DATABASE, Embedded, EmbeddedError, EmbeddedOptions};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// A `data_dir` with a cluster that has been made and stopped.
async fn made() -> TempDir {
    let dir = test_dir();
    copy_template(dir.path()).await;
    dir
}

async fn start(dir: &Path) -> Embedded {
    Embedded::start(options(dir))
        .await
        .unwrap_or_else(|error| panic!("{error}"))
}

async fn refusal(options: EmbeddedOptions) -> EmbeddedError {
    match Embedded::start(options).await {
        Ok(_) => panic!("it started"),
        Err(error) => error,
    }
}

async fn put(embedded: &Embedded, value: i32) {
    let client = connect(&embedded.config(DATABASE)).await;
    client
        .batch_execute(&format!(
            "CREATE TABLE IF NOT EXISTS kept (value int); INSERT INTO kept VALUES ({value})"
        ))
        .await
        .unwrap();
}

async fn kept(embedded: &Embedded) -> Vec<i32> {
    let client = connect(&embedded.config(DATABASE)).await;
    let rows = client
        .query("SELECT value FROM kept ORDER BY value", &[])
        .await
        .unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

fn pid(embedded: &Embedded) -> Pid {
    let raw = embedded.postmaster_pid().expect("it runs");
    Pid::from_raw(raw.try_into().unwrap()).unwrap()
}

/// Whether the process runs. A zombie, which only its parent can remove, does not: it has no working
/// directory.
fn runs(pid: Pid) -> bool {
    match cfg!(target_os = "linux") {
        true => std::fs::read_link(format!("/proc/{}/cwd", pid.as_raw_nonzero())).is_ok(),
        false => rustix::process::test_kill_process(pid).is_ok(),
    }
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_fresh_start_makes_a_durable_private_cluster_that_answers() {
    let dir = test_dir();
    // Not the settings of tests: what a user gets.
    let embedded = Embedded::start(EmbeddedOptions::new(dir.path()))
        .await
        .unwrap();
    let client = connect(&embedded.config(DATABASE)).await;
    for (name, expected) in [
        ("fsync", "on"),
        ("synchronous_commit", "on"),
        ("full_page_writes", "on"),
        ("data_checksums", "on"),
        ("listen_addresses", ""),
        ("wal_level", "replica"),
        ("server_encoding", "UTF8"),
        ("max_connections", "100"),
    ] {
        let row = client
            .query_one("SELECT current_setting($1), current_user::text", &[&name])
            .await
            .unwrap();
        assert_eq!(row.get::<_, &str>(0), expected, "{name}");
        assert_eq!(row.get::<_, &str>(1), "millrace");
    }
    // The URL leads to the same server.
    let by_url: tokio_postgres::Config = embedded.url(DATABASE).parse().unwrap();
    connect(&by_url).await;

    let run = std::fs::metadata(embedded.home().join("run")).unwrap();
    assert_eq!(run.mode() & 0o777, 0o700);
    let data = std::fs::metadata(embedded.home().join("data")).unwrap();
    assert_ne!(data.uid(), 0, "PostgreSQL must not run as root");
    embedded.stop().await.unwrap();
}

#[tokio::test]
async fn the_log_can_be_decoded_where_that_is_asked_for_and_for_as_long_as_there_are_slots() {
    let dir = made().await;
    let start = async |logical: bool| {
        let mut options = options(dir.path());
        options.logical = logical;
        Embedded::start(options).await.unwrap()
    };
    let level = async |embedded: &Embedded| {
        let client = connect(&embedded.config(DATABASE)).await;
        let row = client.query_one("SHOW wal_level", &[]).await.unwrap();
        row.get::<_, String>(0)
    };
    let embedded = start(true).await;
    assert_eq!(level(&embedded).await, "logical");
    let sql = "SELECT pg_create_logical_replication_slot('s', 'pgoutput')";
    connect(&embedded.config(DATABASE))
        .await
        .query(sql, &[])
        .await
        .unwrap();
    embedded.stop().await.unwrap();
    let embedded = start(false).await;
    assert_eq!(level(&embedded).await, "logical", "the slot needs it");
    let sql = "SELECT pg_drop_replication_slot('s')";
    connect(&embedded.config(DATABASE))
        .await
        .query(sql, &[])
        .await
        .unwrap();
    embedded.stop().await.unwrap();
    let embedded = start(false).await;
    assert_eq!(level(&embedded).await, "replica");
    embedded.stop().await.unwrap();
}

#[tokio::test]
async fn wal_segments_are_ready_before_a_sale_and_made_again_only_once_half_are_used() {
    let dir = made().await;
    let start = async || {
        let mut options = options(dir.path());
        options.wal_bytes = 6 * (16 << 20);
        Embedded::start(options).await.unwrap()
    };
    let wal = async |embedded: &Embedded| {
        let row = connect(&embedded.config(DATABASE))
            .await
            .query_one(
                "SELECT (SELECT count(*) FROM pg_ls_waldir() WHERE name > pg_walfile_name(pg_current_wal_lsn())
                            AND name ~ '^[0-9A-F]{24}$'), pg_walfile_name(pg_current_wal_lsn())",
                &[],
            )
            .await
            .unwrap();
        (row.get::<_, i64>(0), row.get::<_, String>(1))
    };
    let embedded = start().await;
    let (ready, current) = wal(&embedded).await;
    assert!(ready >= 6, "{ready} are ready");
    embedded.stop().await.unwrap();

    let mut embedded = start().await;
    let (still_ready, still_current) = wal(&embedded).await;
    assert!(still_ready >= 5, "{still_ready} of {ready}");
    let moved = |name: &str| u64::from_str_radix(&name[16..], 16).unwrap();
    assert!(
        moved(&still_current) - moved(&current) <= 1,
        "segments were made again: {current}, {still_current}"
    );
    let client = connect(&embedded.config(DATABASE)).await;
    while wal(&embedded).await.0 >= 3 {
        client
            .batch_execute("SELECT pg_logical_emit_message(false, '', ''); SELECT pg_switch_wal()")
            .await
            .unwrap();
    }
    // As a crash leaves them: a shutdown's checkpoint would recycle them too.
    embedded.stop_immediate().await.unwrap();
    drop(embedded);
    let embedded = start().await;
    assert!(wal(&embedded).await.0 >= 6);
}

#[tokio::test]
async fn stopping_leaves_no_process_and_starting_finds_the_data() {
    let dir = made().await;
    let embedded = start(dir.path()).await;
    put(&embedded, 1).await;
    let first = pid(&embedded);
    embedded.stop().await.unwrap();
    assert!(!runs(first));

    let embedded = start(dir.path()).await;
    assert_eq!(kept(&embedded).await, [1]);
    let second = pid(&embedded);
    drop(embedded);
    assert!(!runs(second));
}

#[tokio::test]
async fn a_start_that_is_given_up_leaves_no_server() {
    let dir = made().await;
    let pid_file = dir.path().join("postgres/data/postmaster.pid");
    let mut given_up = 0;
    let mut patience = Duration::from_millis(15);
    loop {
        let outcome = tokio::time::timeout(patience, Embedded::start(options(dir.path()))).await;
        match outcome {
            Err(_) => given_up += 1,
            Ok(Ok(_)) => break,
            // The blocking part of the start before goes on for a moment.
            Ok(Err(EmbeddedError::InUse { .. })) => continue,
            Ok(Err(error)) => panic!("{error}"),
        }
        patience = patience * 3 / 2;
        assert!(!pid_file.exists(), "after {patience:?}");
    }
    assert!(given_up > 1, "given up {given_up} times");
}

#[tokio::test]
async fn a_killed_postmaster_is_recovered_from_by_the_same_handle_and_by_the_next() {
    let dir = made().await;
    let mut embedded = start(dir.path()).await;
    put(&embedded, 1).await;
    assert!(embedded.is_running());
    kill_process(pid(&embedded), Signal::KILL).unwrap();
    until("the death is noticed", || !embedded.is_running()).await;
    embedded.start_again().await.unwrap();
    assert_eq!(kept(&embedded).await, [1]);

    put(&embedded, 2).await;
    kill_process(pid(&embedded), Signal::KILL).unwrap();
    drop(embedded);
    let embedded = start(dir.path()).await;
    assert_eq!(kept(&embedded).await, [1, 2]);
}

#[tokio::test]
async fn an_immediate_stop_is_a_crash_that_the_next_start_recovers() {
    let dir = made().await;
    let mut embedded = start(dir.path()).await;
    put(&embedded, 1).await;
    embedded.stop_immediate().await.unwrap();
    assert_eq!(embedded.postmaster_pid(), None);
    embedded.start_again().await.unwrap();
    assert_eq!(kept(&embedded).await, [1]);
}

#[tokio::test]
async fn a_server_left_by_a_killed_millrace_is_taken_over() {
    let dir = made().await;
    let embedded = start(dir.path()).await;
    put(&embedded, 1).await;
    let orphan = pid(&embedded);
    embedded.abandon();
    assert!(runs(orphan));

    let embedded = start(dir.path()).await;
    assert_ne!(pid(&embedded), orphan);
    assert_eq!(kept(&embedded).await, [1]);
    assert!(!runs(orphan));
}

#[tokio::test]
async fn an_orphan_that_was_stopped_with_sigstop_is_taken_over_too() {
    let dir = made().await;
    let embedded = start(dir.path()).await;
    put(&embedded, 1).await;
    kill_process(pid(&embedded), Signal::STOP).unwrap();
    embedded.abandon();
    let embedded = start(dir.path()).await;
    assert_eq!(kept(&embedded).await, [1]);
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_stale_pid_file_that_names_a_strangers_process_is_no_obstacle() {
    let dir = made().await;
    // This very test process is alive and no PostgreSQL.
    let data = dir.path().join("postgres/data");
    let text = format!("{}\n{}\n1\n5432\n", std::process::id(), data.display());
    let meta = std::fs::metadata(&data).unwrap();
    for path in [
        data.join("postmaster.pid"),
        // A loss of power leaves this one too.
        dir.path().join("postgres/run/.s.PGSQL.5432.lock"),
    ] {
        std::fs::write(&path, &text).unwrap();
        std::os::unix::fs::chown(&path, Some(meta.uid()), Some(meta.gid())).unwrap();
    }
    start(dir.path()).await;
}

#[tokio::test]
async fn a_second_owner_is_refused_and_the_first_goes_on() {
    let dir = made().await;
    let first = start(dir.path()).await;
    put(&first, 1).await;
    let error = refusal(options(dir.path())).await;
    assert!(matches!(error, EmbeddedError::InUse { .. }), "{error}");
    assert!(error.to_string().contains("another Millrace (process "));
    assert_eq!(kept(&first).await, [1]);
}

#[tokio::test]
async fn a_cluster_that_millrace_did_not_make_is_refused_and_left_as_it_is() {
    let dir = made().await;
    let marker = dir.path().join("postgres/millrace-cluster.json");
    let ours = std::fs::read_to_string(&marker).unwrap();

    std::fs::remove_file(&marker).unwrap();
    let error = refusal(options(dir.path())).await;
    assert!(matches!(error, EmbeddedError::Foreign { .. }), "{error}");

    // A marker that belongs to another cluster does not help.
    let other = ours.replace("system_identifier\": \"", "system_identifier\": \"9");
    assert_ne!(other, ours);
    std::fs::write(&marker, other).unwrap();
    let error = refusal(options(dir.path())).await;
    assert!(matches!(error, EmbeddedError::Foreign { .. }), "{error}");

    assert!(!dir.path().join("postgres/data/postmaster.pid").exists());
    std::fs::write(&marker, ours).unwrap();
    start(dir.path()).await;
}

#[tokio::test]
async fn a_link_in_the_place_of_the_log_is_not_followed() {
    let dir = made().await;
    let (log, victim) = (dir.path().join("postgres/server.log"), dir.path().join("v"));
    std::fs::write(&victim, "").unwrap();
    std::fs::remove_file(&log).unwrap();
    std::os::unix::fs::symlink(&victim, &log).unwrap();
    let error = refusal(options(dir.path())).await;
    assert!(matches!(error, EmbeddedError::Io { .. }), "{error}");
    assert_eq!(std::fs::read(&victim).unwrap(), b"");
}

#[tokio::test]
async fn a_plain_pgdata_in_our_place_is_refused() {
    let dir = test_dir();
    std::fs::create_dir(dir.path().join("postgres")).unwrap();
    std::fs::write(dir.path().join("postgres/PG_VERSION"), "15\n").unwrap();
    let error = refusal(options(dir.path())).await;
    assert!(matches!(error, EmbeddedError::Foreign { .. }), "{error}");
}

#[tokio::test]
async fn a_cluster_whose_data_vanished_is_not_replaced_by_an_empty_one() {
    let dir = made().await;
    std::fs::remove_dir_all(dir.path().join("postgres/data")).unwrap();
    let error = refusal(options(dir.path())).await;
    assert!(matches!(error, EmbeddedError::DataGone { .. }), "{error}");
}

#[tokio::test]
async fn an_initdb_killed_in_the_middle_is_done_again() {
    let dir = test_dir();
    let home = dir.path().join("postgres");
    std::fs::create_dir_all(home.join("data.initdb/base")).unwrap();
    std::fs::write(home.join("data.initdb/PG_VERSION"), "15\n").unwrap();
    let embedded = start(dir.path()).await;
    assert!(!home.join("data.initdb").exists());
    embedded.stop().await.unwrap();

    // Killed between the marker and the rename: finished, with the same cluster.
    std::fs::rename(home.join("data"), home.join("data.initdb")).unwrap();
    start(dir.path()).await;
    assert!(home.join("data").exists());
}

#[tokio::test]
async fn a_cluster_of_a_version_that_is_not_installed_names_the_version() {
    let dir = made().await;
    let path = dir.path().join("postgres/data/PG_VERSION");
    std::fs::write(path, "99\n").unwrap();
    let error = refusal(options(dir.path())).await;
    assert!(
        matches!(error, EmbeddedError::VersionMissing { needed: 99, .. }),
        "{error}"
    );
}

#[tokio::test]
async fn a_configured_directory_without_a_server_is_named() {
    let dir = test_dir();
    let mut options = options(dir.path());
    options.bin_dir = Some(dir.path().to_owned());
    let error = refusal(options).await;
    assert!(matches!(error, EmbeddedError::BinDir { .. }), "{error}");
}

#[tokio::test]
async fn a_server_that_cannot_start_shows_the_end_of_its_log() {
    let dir = made().await;
    let mut options = options(dir.path());
    options
        .settings
        .push(("shared_buffers".to_owned(), "nonsense".to_owned()));
    let error = refusal(options).await;
    assert!(matches!(error, EmbeddedError::Exited { .. }), "{error}");
    assert!(error.to_string().contains("shared_buffers"), "{error}");
}

#[tokio::test]
async fn a_data_dir_too_long_for_a_socket_gets_a_private_directory_elsewhere() {
    let dir = test_dir();
    let long = dir
        .path()
        .join("x".repeat(80))
        .join("y, \"z\"")
        .join("é".repeat(40));
    let embedded = start(&long).await;
    put(&embedded, 1).await;
    let config = embedded.config(DATABASE);
    let [tokio_postgres::config::Host::Unix(socket)] = config.get_hosts() else {
        panic!("not a socket");
    };
    let meta = std::fs::metadata(socket).unwrap();
    assert_eq!(meta.mode() & 0o777, 0o700);
    assert_eq!(
        meta.uid(),
        std::fs::metadata(embedded.home().join("data"))
            .unwrap()
            .uid()
    );
    let by_url: tokio_postgres::Config = embedded.url(DATABASE).parse().unwrap();
    connect(&by_url).await;
    let socket = socket.clone();
    embedded.stop().await.unwrap();
    assert!(!socket.exists());
    let embedded = start(&long).await;
    assert_eq!(kept(&embedded).await, [1]);
}

/// Only root can run the server as another user, so there is nothing to see for anyone else.
#[tokio::test]
async fn a_data_dir_that_the_servers_user_may_not_enter_gets_a_home_elsewhere() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    let dir = test_dir();
    let closed = dir.path().join("closed");
    std::fs::create_dir(&closed).unwrap();
    std::fs::set_permissions(&closed, Permissions::from_mode(0o700)).unwrap();
    let mut options = options(&closed.join("data"));
    options.fallback_root = dir.path().join("lib");

    let embedded = Embedded::start(options.clone()).await.unwrap();
    assert!(embedded.home().starts_with(&options.fallback_root));
    put(&embedded, 1).await;
    embedded.stop().await.unwrap();
    let mode = std::fs::metadata(&closed).unwrap().mode() & 0o777;
    assert_eq!(mode, 0o700, "a directory of the user's was opened");

    let embedded = Embedded::start(options.clone()).await.unwrap();
    assert_eq!(kept(&embedded).await, [1]);
    let home = embedded.home().to_owned();
    embedded.stop().await.unwrap();

    // A new `data_dir` of the same path is a fresh start; the old database is not deleted.
    std::fs::remove_dir_all(&options.data_dir).unwrap();
    let fresh = Embedded::start(options.clone()).await.unwrap();
    assert_ne!(fresh.home(), home);
    assert!(home.join("data").exists());
    fresh.stop_and_erase().await.unwrap();
    assert!(!options.data_dir.join("postgres.location").exists());

    // A pointer to nowhere is not taken for a fresh start.
    std::fs::write(
        options.data_dir.join("postgres.location"),
        "/nowhere/at/all",
    )
    .unwrap();
    let error = refusal(options).await;
    assert!(
        matches!(error, EmbeddedError::PointerBroken { .. }),
        "{error}"
    );
}

#[tokio::test]
async fn each_test_gets_an_empty_database_of_its_own() {
    let (one, two) = (TestDatabase::create().await, TestDatabase::create().await);
    let client = one.connect().await;
    client.batch_execute("CREATE TABLE t ()").await.unwrap();
    let client = two.connect().await;
    client.batch_execute("CREATE TABLE t ()").await.unwrap();
    assert_ne!(one.url(), two.url());
}

#[tokio::test]
async fn a_database_is_made_once_and_dropped_with_its_sessions() {
    let database = TestDatabase::create().await;
    let cluster = crate::support::postgres::Cluster::shared().await;
    let embedded = cluster.embedded();
    let name = "with \"quotes\" and /";
    embedded.ensure_database(name).await.unwrap();
    embedded.ensure_database(name).await.unwrap();
    let error = embedded.create_database(name).await.unwrap_err();
    assert!(matches!(error, EmbeddedError::Database { .. }), "{error}");
    let by_url: tokio_postgres::Config = embedded.url(name).parse().unwrap();
    let _session = connect(&by_url).await;
    embedded.drop_database(name).await.unwrap();
    embedded.drop_database(name).await.unwrap();
    drop(database);
}
