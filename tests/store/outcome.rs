//! Commits of unknown outcome: whatever happens to the connection, every order is written once.

use std::time::{Duration, Instant};

use millrace::order::Order;
use millrace::store::StoreError;
use millrace::store::WriteError;
use millrace::store::batch::BatchWriter;
use rand::Rng;
use rustix::process::{Pid, Signal, kill_process};

use crate::support::proxy::{Cut, Proxy};
use crate::support::sale::{STEP, Sale, count, order, orders, refs};

const BACKENDS: &str = "SELECT pid FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = 'millrace worker 0/0'";

/// Writes one batch until it is written, whatever it takes; how often it had to be tried again.
async fn persist(writer: &mut BatchWriter, batch: &[Order]) -> usize {
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut retries = 0;
    loop {
        match writer.write(&refs(batch)).await {
            Ok(()) => return retries,
            Err(WriteError::Retry(error)) => {
                assert!(Instant::now() < deadline, "not in time: {error}");
                retries += 1;
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            Err(error) => panic!("{error}"),
        }
    }
}

#[tokio::test]
async fn a_commit_that_nobody_heard_of_is_found_and_not_written_twice() {
    let sale = Sale::open(1).await;
    let sku = sale.sku("A", 100).await;
    let proxy = Proxy::start(&sale.config).await;
    let mut writer = BatchWriter::new(sale.through(&proxy, STEP), sale.lease(), 0);
    for known in [false, true] {
        // With and without an earlier batch on the same connection.
        if known {
            writer.write(&refs(&orders(&sku, 2))).await.unwrap();
        }
        let before = sale.rows().await;
        let batch = orders(&sku, 3);
        proxy.cut(Cut::After);
        let lost = writer.write(&refs(&batch)).await;
        assert!(matches!(lost, Err(WriteError::Retry(_))), "{lost:?}");
        assert!(proxy.has_cut() && writer.outcome_unknown());
        assert_eq!(sale.rows().await, before + 3, "the server has committed");
        writer.write(&refs(&batch)).await.unwrap();
        assert!(!writer.outcome_unknown());
        assert_eq!(sale.rows().await, before + 3);
    }
    // Another batch after it is another batch.
    writer.write(&refs(&orders(&sku, 1))).await.unwrap();
    assert_eq!(sale.rows().await, 9);
    assert_eq!(writer.commits_lost(), 0);
    sale.assert_audit(None).await;
}

#[tokio::test]
async fn a_commit_that_never_arrived_is_written_by_the_retry() {
    let sale = Sale::open(1).await;
    let sku = sale.sku("A", 100).await;
    let proxy = Proxy::start(&sale.config).await;
    let mut writer = BatchWriter::new(sale.through(&proxy, STEP), sale.lease(), 0);
    for round in 1..=3 {
        let batch = orders(&sku, 3);
        proxy.cut(Cut::Before);
        let lost = writer.write(&refs(&batch)).await;
        assert!(matches!(lost, Err(WriteError::Retry(_))), "{lost:?}");
        assert!(proxy.has_cut() && writer.outcome_unknown());
        writer.write(&refs(&batch)).await.unwrap();
        assert_eq!(sale.rows().await, 3 * round);
    }
    sale.assert_audit(None).await;
}

#[tokio::test]
async fn a_commit_that_is_answered_by_silence_is_found_and_not_written_twice() {
    let sale = Sale::open(1).await;
    let sku = sale.sku("A", 100).await;
    let proxy = Proxy::start(&sale.config).await;
    let database = sale.through(&proxy, Duration::from_millis(500));
    let mut writer = BatchWriter::new(database, sale.lease(), 0);
    for (round, give_up) in [(1, false), (2, true)] {
        let batch = orders(&sku, 3);
        proxy.cut(Cut::AfterInSilence);
        if give_up {
            // The caller loses patience first: the call is dropped half-way.
            let batch = refs(&batch);
            let mut write = std::pin::pin!(writer.write(&batch));
            while sale.rows().await != 3 * round {
                let step = tokio::time::timeout(Duration::from_millis(1), write.as_mut());
                assert!(step.await.is_err(), "it was answered");
            }
        } else {
            let silence = writer.write(&refs(&batch)).await;
            assert!(
                matches!(silence, Err(WriteError::Retry(StoreError::Timeout { .. }))),
                "{silence:?}"
            );
        }
        assert!(writer.outcome_unknown());
        assert_eq!(sale.rows().await, 3 * round, "the server has committed");
        persist(&mut writer, &batch).await;
        assert_eq!(sale.rows().await, 3 * round);
    }
    sale.assert_audit(None).await;
}

#[tokio::test]
async fn a_dead_letter_that_meets_silence_has_a_deadline() {
    let sale = Sale::open(1).await;
    let sku = sale.sku("A", 100).await;
    let proxy = Proxy::start(&sale.config).await;
    // A busy machine needs most of a second to connect.
    let database = sale.through(&proxy, Duration::from_secs(2));
    let mut writer = BatchWriter::new(database, sale.lease(), 0);
    let [first, second] = [order(&sku, 1), order(&sku, 1)];
    // The pool has a connection from now on.
    writer
        .write_dead_letter(&first, "23514", "x")
        .await
        .unwrap();
    proxy.freeze(true);
    let started = Instant::now();
    let silence = writer.write_dead_letter(&second, "23514", "x").await;
    assert!(
        // Whoever notices first: the statement, or the pool that looks at a connection
        // before it gives it out.
        matches!(
            silence,
            Err(StoreError::Timeout { .. } | StoreError::Pool(_))
        ),
        "{silence:?}"
    );
    assert!(started.elapsed() < Duration::from_secs(10));
    proxy.freeze(false);
    writer
        .write_dead_letter(&second, "23514", "x")
        .await
        .unwrap();
    assert_eq!(sale.number("SELECT count(*) FROM dead_letters").await, 2);
}

#[tokio::test]
async fn what_was_never_sent_is_not_of_unknown_outcome() {
    let sale = Sale::open(1).await;
    let sku = sale.sku("A", 100).await;
    let mut writer = sale.writer(0);
    writer.write(&refs(&orders(&sku, 1))).await.unwrap();
    sale.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'millrace worker 0/0'
        AND datname = current_database()")
        .await;
    sale.until(&format!("SELECT NOT EXISTS ({BACKENDS})")).await;
    let batch = orders(&sku, 1);
    let failed = writer.write(&refs(&batch)).await;
    assert!(matches!(failed, Err(WriteError::Retry(_))), "{failed:?}");
    assert!(!writer.outcome_unknown(), "the connection was gone before");
    writer.write(&refs(&batch)).await.unwrap();
    assert_eq!(sale.rows().await, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn backends_terminated_at_random_lose_and_double_nothing() {
    let sale = Sale::open(1).await;
    let sku = sale.sku("A", 1_000_000).await;
    let mut writer = sale.writer(0);
    let session = sale.session().await;
    let terminator = tokio::spawn(async move {
        loop {
            let wait = rand::rng().random_range(0..60_000);
            tokio::time::sleep(Duration::from_micros(wait)).await;
            let statement = format!("SELECT pg_terminate_backend(pid) FROM ({BACKENDS}) b");
            session.batch_execute(&statement).await.unwrap();
        }
    });
    let mut written = 0;
    let mut retries = 0;
    for at in 0..150 * count("MILLRACE_ROUNDS", 1) as usize {
        let batch = orders(&sku, 1 + at % 50);
        retries += persist(&mut writer, &batch).await;
        written += batch.len() as i64;
    }
    terminator.abort();
    println!("{retries} retries");
    assert_eq!(sale.rows().await, written);
    assert_eq!(sale.number("SELECT held FROM sku").await, written);
    assert_eq!(writer.commits_lost(), 0);
    sale.assert_audit(None).await;
}

/// A stopped process goes on when this is dropped, whatever became of the test.
struct Stopped(Pid);

impl Stopped {
    fn stop(pid: i64) -> Self {
        let pid = Pid::from_raw(pid.try_into().unwrap()).unwrap();
        kill_process(pid, Signal::STOP).unwrap();
        Stopped(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // It may have ended.
        let _ = kill_process(self.0, Signal::CONT);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stalled_backend_is_terminated_before_its_batch_is_written_again() {
    let sale = Sale::open(1).await;
    let sku = sale.sku("A", 100).await;
    let database = sale.with_step(Duration::from_millis(1_200));
    let mut writer = BatchWriter::new(database, sale.lease(), 0);
    writer.write(&refs(&orders(&sku, 1))).await.unwrap();
    let backend = sale.number("SELECT pid::int8 FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'millrace worker 0/0'").await;

    // The backend stands still with its batch sent, its COPY done and its row in `writer` locked.
    let mut holder = sale.session().await;
    let held = holder.transaction().await.unwrap();
    held.execute("SELECT FROM sku FOR UPDATE", &[])
        .await
        .unwrap();
    let batch = orders(&sku, 3);
    let stop = async {
        sale.until(&format!(
            "SELECT coalesce((SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = {backend}), false)"
        ))
        .await;
        Stopped::stop(backend)
    };
    let (stalled, stopped) = tokio::join!(
        async {
            let batch = refs(&batch);
            writer.write(&batch).await
        },
        stop
    );
    assert!(
        matches!(stalled, Err(WriteError::Retry(StoreError::Timeout { .. }))),
        "{stalled:?}"
    );
    drop(held);
    for _ in 0..2 {
        let blocked = writer.write(&refs(&batch)).await;
        assert!(matches!(blocked, Err(WriteError::Retry(_))), "{blocked:?}");
        assert!(writer.outcome_unknown());
    }
    drop(stopped);
    // Nobody but the writer ends it.
    sale.until(&format!(
        "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = {backend})"
    ))
    .await;
    persist(&mut writer, &batch).await;
    assert_eq!(sale.rows().await, 4);
    sale.assert_audit(None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn backends_stopped_at_random_lose_and_double_nothing() {
    let sale = Sale::open(1).await;
    let sku = sale.sku("A", 1_000_000).await;
    let database = sale.with_step(Duration::from_millis(300));
    let mut writer = BatchWriter::new(database, sale.lease(), 0);
    let (mut written, mut retries) = (0, 0);
    for _ in 0..5 * count("MILLRACE_ROUNDS", 1) {
        let fault = async {
            let wait = rand::rng().random_range(0..15_000);
            tokio::time::sleep(Duration::from_micros(wait)).await;
            let pid = sale.number(
                "SELECT coalesce(max(pid), 0)::int8 FROM pg_stat_activity
                  WHERE datname = current_database() AND application_name = 'millrace worker 0/0'",
            );
            let pid = pid.await;
            if pid > 0 {
                let stopped = Stopped::stop(pid);
                let wait = rand::rng().random_range(100..500);
                tokio::time::sleep(Duration::from_millis(wait)).await;
                drop(stopped);
            }
        };
        let work = async {
            for at in 0..12 {
                let batch = orders(&sku, 1 + at * 20);
                retries += persist(&mut writer, &batch).await;
                written += batch.len() as i64;
            }
        };
        tokio::join!(fault, work);
    }
    println!("{retries} retries");
    assert_eq!(sale.rows().await, written);
    assert_eq!(writer.commits_lost(), 0);
    sale.assert_audit(None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_network_that_delivers_late_doubles_nothing() {
    let sale = Sale::open(1).await;
    let sku = sale.sku("A", 1_000_000).await;
    let proxy = Proxy::start(&sale.config).await;
    let database = sale.through(&proxy, Duration::from_millis(250));
    let mut writer = BatchWriter::new(database, sale.lease(), 0);
    let (mut written, mut retries) = (0, 0);
    for _ in 0..6 * count("MILLRACE_ROUNDS", 1) {
        let fault = async {
            let wait = rand::rng().random_range(0..10_000);
            tokio::time::sleep(Duration::from_micros(wait)).await;
            proxy.freeze(true);
            let wait = rand::rng().random_range(50..400);
            tokio::time::sleep(Duration::from_millis(wait)).await;
            // What given up connections had sent, a COMMIT perhaps, arrives now.
            proxy.freeze(false);
        };
        let work = async {
            for at in 0..12 {
                let batch = orders(&sku, 1 + at * 20);
                retries += persist(&mut writer, &batch).await;
                written += batch.len() as i64;
            }
        };
        tokio::join!(fault, work);
    }
    println!("{retries} retries");
    assert_eq!(sale.rows().await, written);
    assert_eq!(writer.commits_lost(), 0);
    sale.assert_audit(None).await;
}
