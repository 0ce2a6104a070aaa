//! A process on its own on the database of nodes that have not left: the transactions.

use std::time::Duration;

use millrace::order::{SkuNumber, UnixMillis};
use millrace::store::StoreError;
use millrace::store::cluster::membership::{self, Join};
use millrace::store::cluster::takeover::{self, LogEnd};
use millrace::store::cluster::{disband, lanes, shares};
use millrace::store::postgres::{Database, NodeLease, lease};

use crate::support::waiting::wait_until;
use crate::twin::{Bed, candidate, uuid};

const SKU: SkuNumber = SkuNumber(1);

/// What a start on its own does before it reads logs.
async fn start_alone(database: &Database) -> NodeLease {
    let mut guard = lease::claim(database).await.unwrap();
    let gone = disband::remaining(database, &guard).await.unwrap();
    let nodes: Vec<i16> = gone.iter().map(|node| node.node).collect();
    disband::disband_gone(database, &mut guard, &nodes)
        .await
        .unwrap();
    let taken = lease::take_over(guard, 2, UnixMillis(0)).await.unwrap();
    taken.lease
}

#[tokio::test]
async fn nodes_that_are_disbanded_change_nothing_and_their_units_are_those_of_the_sale() {
    let bed = Bed::open().await;
    bed.skus(&[10]).await;
    let (one, two) = (bed.join(1).await, bed.join(2).await);
    lanes::claim_free(&bed.database, one).await.unwrap();
    for node in [one, two] {
        shares::lend(&bed.database, node, SKU, 4, 1).await.unwrap();
    }
    bed.settle(one, SKU.0, 2, 1).await.unwrap();
    bed.settle(two, SKU.0, 1, 0).await.unwrap();
    let in_use = "UPDATE node SET journal_in_use = true, ids_leased_until_ms = 7000 * (node + 1)";
    bed.sql(in_use).await;
    // A transaction of a node that nobody will end.
    let pool = bed.database.clone().of_node(two.node).unwrap();
    let stalled = pool.pooled().await.unwrap();
    stalled
        .batch_execute("BEGIN; UPDATE stock_share SET held = held + 1 WHERE node = 1")
        .await
        .unwrap();

    let alone = start_alone(&bed.database).await;
    let counters = "SELECT held * 100 + sold * 10 + lent FROM sku";
    assert_eq!(bed.number(counters).await, 310);
    assert_eq!(bed.number("SELECT count(*) FROM stock_share").await, 0);
    let free = "SELECT count(*) FROM lane WHERE node IS NULL AND ids_until_ms >= 14000";
    assert_eq!(bed.number(free).await, 64);
    assert!(stalled.batch_execute("COMMIT").await.is_err(), "it is gone");
    for node in [one, two] {
        let renewed = membership::renew(&bed.database, &bed.session, node, UnixMillis(0)).await;
        assert!(
            matches!(renewed, Err(StoreError::Fenced { .. })),
            "{renewed:?}"
        );
    }
    let lent = shares::lend(&bed.database, two, SKU, 1, 1).await;
    assert!(matches!(lent, Err(StoreError::Fenced { .. })), "{lent:?}");

    // The log of node 0 is its own now, that of node 1 is still to be read.
    let begun = takeover::begun(&bed.database, alone).await.unwrap();
    assert_eq!(begun.dead.len(), 1);
    let dead = begun.dead[0].lease;
    assert_eq!((dead.node, dead.ledger), (1, alone.ledger));
    let higher = takeover::raise_to(&bed.database, alone, dead, 99)
        .await
        .unwrap();
    assert_eq!(higher.epoch, 99);
    // A later process takes its place in the middle of that.
    let later = start_alone(&bed.database).await;
    let end = LogEnd {
        ids_until: UnixMillis(90_000),
        place: None,
    };
    let late = takeover::finish(&bed.database, alone, higher, end).await;
    assert!(matches!(late, Err(StoreError::Fenced { .. })), "{late:?}");
    let begun = takeover::begun(&bed.database, later).await.unwrap();
    let dead = begun.dead[0].lease;
    assert_eq!(dead.epoch, 100);
    takeover::finish(&bed.database, later, dead, end)
        .await
        .unwrap();
    assert!(
        takeover::is_finished(&bed.database, later, dead)
            .await
            .unwrap()
    );
    let left = "SELECT count(*) FROM node WHERE state = 'left' AND NOT journal_in_use";
    assert_eq!(bed.number(left).await, 1);
    let free = "SELECT count(*) FROM lane WHERE node IS NULL AND ids_until_ms = 90000";
    assert_eq!(bed.number(free).await, 64);
    assert_eq!(bed.number(counters).await, 310);
}

#[tokio::test]
async fn a_node_comes_back_to_its_log_after_a_process_on_its_own_was_stopped_before_it_had_read_it()
{
    let bed = Bed::open().await;
    bed.join(1).await;
    let two = bed.join(2).await;
    bed.sql("UPDATE node SET journal_in_use = true, journal_id = gen_random_uuid()")
        .await;
    start_alone(&bed.database).await;
    let home = uuid(2);
    let mut session = bed.database.connect("test").await.unwrap();
    wait_until("the lock is free", async || {
        lease::share(&bed.database, "test").await.is_ok()
    })
    .await;
    match membership::join(&mut session, &candidate(0, &home)).await {
        Ok(Join::Joined(joined)) => assert_eq!(joined.lease.node, two.node),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_process_on_its_own_that_has_lost_the_lock_is_fenced_by_a_node_that_comes_back_to_its_row()
 {
    let bed = Bed::open().await;
    bed.join(1).await;
    let two = bed.join(2).await;
    let alone = start_alone(&bed.database).await;
    let begun = takeover::begun(&bed.database, alone).await.unwrap();
    let end = LogEnd {
        ids_until: UnixMillis(90_000),
        place: None,
    };
    for dead in begun.dead {
        takeover::finish(&bed.database, alone, dead.lease, end)
            .await
            .unwrap();
    }
    let may_write = format!(
        "SELECT count(*) FROM writer WHERE node = {} AND epoch = {}",
        alone.node, alone.epoch
    );
    assert!(bed.number(&may_write).await > 0);
    let home = uuid(2);
    let mut session = bed.database.connect("test").await.unwrap();
    match membership::join(&mut session, &candidate(0, &home)).await {
        Ok(Join::Joined(joined)) => assert_eq!(joined.lease.node, two.node),
        other => panic!("{other:?}"),
    }
    assert_eq!(bed.number(&may_write).await, 0);
    let late = takeover::raise_to(&bed.database, alone, two, 99).await;
    assert!(matches!(late, Err(StoreError::Fenced { .. })), "{late:?}");
}

#[tokio::test]
async fn a_process_on_its_own_gives_way_to_a_node_that_is_alive() {
    let bed = Bed::open().await;
    let guard = lease::claim(&bed.database).await.unwrap();
    let database = bed.database.clone();
    let alive = tokio::spawn(async move {
        loop {
            if let Ok(session) = lease::share(&database, "test").await {
                return session;
            }
        }
    });
    let refused = lease::give_way(&bed.database, &guard, Duration::from_secs(3)).await;
    assert!(
        matches!(refused, Err(StoreError::AlreadyActive(_))),
        "{refused:?}"
    );
    drop(alive.await.unwrap());
    drop(guard);
    wait_until("nobody is there", async || {
        match lease::claim(&bed.database).await {
            Ok(guard) => lease::give_way(&bed.database, &guard, Duration::ZERO)
                .await
                .is_ok(),
            Err(_) => false,
        }
    })
    .await;
}
