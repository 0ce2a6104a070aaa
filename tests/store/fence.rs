//! Who may write: lost commits, epochs, the lock against a second process, the lease on ids.

use std::time::Duration;

use millrace::order::{IdClock, Lane, UnixMillis};
use millrace::store::StoreError;
use millrace::store::WriteError;
use millrace::store::postgres::lease::{self, ID_LEASE_MS, NodeGuard};
use millrace::store::postgres::{Database, replication, skus};
use millrace::store::schema;
use rustix::process::{Pid, Signal, kill_process};

use crate::support::postgres::TestDatabase;
use crate::support::sale::{SCHEMA, STEP, Sale, order, orders, refs, take_over};

#[tokio::test]
async fn commits_that_the_database_lost_are_counted_and_writing_goes_on() {
    let sale = Sale::open(1).await;
    let sku = sale.sku("A", 100).await;
    let mut writer = sale.writer(0);
    for _ in 0..3 {
        writer.write(&refs(&orders(&sku, 2))).await.unwrap();
    }
    // As after a failover to a standby that lacked the last two batches.
    sale.sql("UPDATE writer SET batch = batch - 2").await;
    let batch = orders(&sku, 2);
    let noticed = writer.write(&refs(&batch)).await;
    assert!(matches!(noticed, Err(WriteError::Retry(_))), "{noticed:?}");
    assert!(!writer.outcome_unknown());
    writer.write(&refs(&batch)).await.unwrap();
    assert_eq!(writer.commits_lost(), 2);
    writer.write(&refs(&orders(&sku, 2))).await.unwrap();
    assert_eq!(writer.commits_lost(), 2, "counted once");
    assert_eq!(sale.rows().await, 10);
    assert_eq!(sale.number("SELECT batch FROM writer").await, 3);
}

#[tokio::test]
async fn a_writer_of_an_older_epoch_can_write_nothing_any_more() {
    let sale = Sale::open(2).await;
    let sku = sale.sku("A", 100).await;
    let (mut connected, mut fresh) = (sale.writer(0), sale.writer(1));
    connected.write(&refs(&orders(&sku, 1))).await.unwrap();
    let lease = sale.lease();
    drop(sale.taken.guard);
    let successor = loop {
        // The lock goes when the server has noticed that the connection is closed.
        match take_over(&sale.database, 2).await {
            Ok(taken) => break taken,
            Err(StoreError::AlreadyActive(_)) => tokio::task::yield_now().await,
            Err(error) => panic!("{error}"),
        }
    };
    assert_eq!(successor.lease.epoch, lease.epoch + 1);

    let batch = orders(&sku, 2);
    let is_fenced = |result: &Result<(), WriteError>| {
        matches!(
            result,
            Err(WriteError::Fatal(StoreError::Fenced { found, ours }))
                if (*found, *ours) == (successor.lease.epoch, lease.epoch)
        )
    };
    let refused = fresh.write(&refs(&batch)).await;
    assert!(is_fenced(&refused), "{refused:?}");
    // One that was connected notices by its row having moved, and finds out why.
    let noticed = connected.write(&refs(&batch)).await;
    assert!(matches!(noticed, Err(WriteError::Retry(_))), "{noticed:?}");
    let refused = connected.write(&refs(&batch)).await;
    assert!(is_fenced(&refused), "{refused:?}");
    assert!(!connected.outcome_unknown(), "nothing of it was sent");

    let refused_row = order(&sku, 1);
    let buried = connected.write_dead_letter(&refused_row, "23514", "x");
    assert!(matches!(buried.await, Err(StoreError::Fenced { .. })));
    let session = sale.database.connect("test").await.unwrap();
    let renewed = lease::renew(&sale.database, &session, lease, UnixMillis::now(), 1_000);
    assert!(matches!(renewed.await, Err(StoreError::Fenced { .. })));
    let paused = skus::set_all_paused(&sale.database, lease, true);
    assert!(matches!(paused.await, Err(StoreError::Fenced { .. })));
    let terms = sku.terms();
    let put = skus::put(&sale.database, lease, &sku.id, &terms, 5);
    assert!(matches!(put.await, Err(StoreError::Fenced { .. })));
    let session = Database::with_config(sale.config.clone(), SCHEMA, 1, STEP).unwrap();
    let client = session.pooled().await.unwrap();
    let counts = client
        .query_one(
            "SELECT (SELECT count(*) FROM orders), (SELECT count(*) FROM dead_letters), (SELECT total FROM sku)",
            &[],
        )
        .await
        .unwrap();
    let counts: (i64, i64, i64) = (counts.get(0), counts.get(1), counts.get(2));
    assert_eq!(counts, (1, 0, 100));
}

#[tokio::test]
async fn a_second_process_is_kept_out_and_told_who_is_there() {
    // Another process with a schema of the same name, in another database, is nobody's business.
    let (sale, other) = (Sale::open(1).await, Sale::open(1).await);
    for sale in [&sale, &other] {
        let refused = take_over(&sale.database, 1).await;
        let Err(StoreError::AlreadyActive(holder)) = refused else {
            panic!("{refused:?}");
        };
        assert!(
            holder.starts_with(" (from this machine, connected since 2"),
            "{holder:?}"
        );
    }
    // A schema of its own is a Millrace of its own.
    let database = Database::with_config(sale.config.clone(), "second", 2, STEP).unwrap();
    let mut client = database.connect("test").await.unwrap();
    schema::migrate(&mut client, "second").await.unwrap();
    take_over(&database, 1).await.unwrap();
}

#[tokio::test]
async fn order_ids_never_go_back_over_restarts() {
    let test = TestDatabase::create().await;
    let database = Database::with_config(test.config(), SCHEMA, 2, STEP).unwrap();
    let mut client = database.connect("test").await.unwrap();
    schema::migrate(&mut client, SCHEMA).await.unwrap();
    let lane = Lane::new(9).unwrap();
    let mut last = None;
    for round in 0..4 {
        let taken = loop {
            match take_over(&database, 1).await {
                Ok(taken) => break taken,
                Err(StoreError::AlreadyActive(_)) => tokio::task::yield_now().await,
                Err(error) => panic!("{error}"),
            }
        };
        assert_eq!(taken.lease.epoch, round + 1);
        let ids = IdClock::new(taken.id_high_water, taken.ids_leased_until);
        let first = ids.next(lane).unwrap();
        assert!(last < Some(first), "{last:?} {first}");
        last = Some(ids.next(lane).unwrap());
        if round % 2 == 0 {
            // A crash: everything leased may have been given out.
            let until = ids.now().plus_ms(ID_LEASE_MS);
            lease::renew(&database, &client, taken.lease, until, 1_000)
                .await
                .unwrap();
            // It never shrinks.
            lease::renew(&database, &client, taken.lease, UnixMillis(5), 1_000)
                .await
                .unwrap();
            ids.extend_lease(until);
            last = Some(ids.next(lane).unwrap());
            let row = client
                .query_one("SELECT ids_leased_until_ms FROM node", &[])
                .await
                .unwrap();
            assert_eq!(row.get::<_, i64>(0), until.0);
        } else {
            // A clean stop: the next process starts near the clock again.
            lease::give_back(&database, taken.lease, ids.now())
                .await
                .unwrap();
            let row = client
                .query_one("SELECT ids_leased_until_ms FROM node", &[])
                .await
                .unwrap();
            let returned = row.get::<_, i64>(0) - ids.now().0;
            assert!(returned <= 1_000, "{returned} ms ahead");
        }
    }
}

#[tokio::test]
async fn a_guard_that_was_lost_is_made_again_with_its_lock() {
    let mut sale = Sale::open(1).await;
    let lease = sale.lease();
    let database = sale.with_step(Duration::from_millis(500));
    let first = std::mem::replace(
        &mut sale.taken.guard,
        database.connect("test").await.unwrap(),
    );
    let mut guard = NodeGuard::keep(database.clone(), first).await.unwrap();
    // It has its mark beside the lock.
    let pid = async || {
        sale.number(
            "SELECT pid::int8 FROM pg_locks WHERE locktype = 'advisory' AND granted
                AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
              GROUP BY pid HAVING count(*) = 2",
        )
        .await
    };
    let renew = async |guard: &mut NodeGuard| guard.renew(lease, UnixMillis::now(), 1_000).await;
    let kept_out = async || {
        matches!(
            lease::claim(&database).await,
            Err(StoreError::AlreadyActive(_))
        )
    };
    renew(&mut guard).await.unwrap();

    // The server ends it, as a restart does.
    let first = pid().await;
    sale.sql(&format!("SELECT pg_terminate_backend({first}, 10000)"))
        .await;
    guard.lost().await;
    assert!(!guard.is_connected());
    guard.reconnect().await.unwrap();
    assert_ne!(pid().await, first);
    assert!(kept_out().await, "the lock is ours again");
    renew(&mut guard).await.unwrap();

    // The server does not know that it is lost, and still has its lock: it is told to end.
    let second = pid().await;
    let process = Pid::from_raw(second as i32).unwrap();
    kill_process(process, Signal::STOP).unwrap();
    assert!(renew(&mut guard).await.is_err(), "it does not answer");
    assert!(!guard.is_connected(), "so it is given up");
    // As long as it does not even take that, the epoch alone decides.
    renew(&mut guard).await.unwrap();
    assert!(kept_out().await);
    kill_process(process, Signal::CONT).unwrap();
    sale.until(&format!(
        "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = {second})"
    ))
    .await;
    renew(&mut guard).await.unwrap();
    assert!(kept_out().await, "the lock is ours again");

    // Another process that got in between is not thrown out, and decides by its epoch.
    let third = pid().await;
    sale.sql(&format!("SELECT pg_terminate_backend({third}, 10000)"))
        .await;
    guard.lost().await;
    let other = lease::claim(&database).await.unwrap();
    renew(&mut guard).await.unwrap();
    assert!(!other.is_closed(), "it lives");
    let taken = lease::take_over(other, 1, UnixMillis::now()).await.unwrap();
    assert!(matches!(
        renew(&mut guard).await,
        Err(StoreError::Fenced { .. })
    ));
    drop(taken);
}

#[tokio::test]
async fn what_keeps_old_rows_is_named_with_its_remedy() {
    let sale = Sale::open(1).await;
    let horizons = async || {
        replication::horizons(&sale.database, Duration::ZERO)
            .await
            .unwrap()
    };
    let mut session = sale.session().await;
    let pid: i32 = session
        .query_one("SELECT pg_backend_pid()", &[])
        .await
        .unwrap()
        .get(0);
    let holder = format!("session {pid} ");
    let found = async || {
        horizons()
            .await
            .into_iter()
            .find(|horizon| horizon.holder.starts_with(&holder))
    };
    assert_eq!(found().await, None, "it is idle");
    let transaction = session
        .build_transaction()
        .isolation_level(tokio_postgres::IsolationLevel::RepeatableRead)
        .start()
        .await
        .unwrap();
    transaction
        .query_one("SELECT count(*) FROM sku", &[])
        .await
        .unwrap();
    let old = found().await.expect("an open snapshot");
    assert!(old.seconds.is_some(), "{old:?}");
    assert!(
        old.remedy.contains(&format!("pg_terminate_backend({pid})")),
        "{old:?}"
    );
    let patient = replication::horizons(&sale.database, Duration::from_secs(3_600))
        .await
        .unwrap();
    assert!(
        !patient
            .iter()
            .any(|horizon| horizon.holder.starts_with(&holder)),
        "{patient:?}"
    );
    transaction.commit().await.unwrap();
    assert_eq!(found().await, None, "it is over");
}
