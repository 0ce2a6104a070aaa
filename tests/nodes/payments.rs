//! Payments of orders whose lane another node has.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::poll;
use millrace::metrics::Metrics;
use millrace::order::{Cutover, Lane, LaneSet, OrderId, SkuNumber, UnixMillis};
use millrace::pipeline::cluster::moved_units;
use millrace::pipeline::payments::callbacks::Callbacks;
use millrace::state::lanes::{Lanes, NodeLanes};
use millrace::store::cluster::lanes::{self, HandOver, HandedOver, LaneUnits};
use millrace::store::cluster::takeover::{self, Suspect};
use millrace::store::cluster::{membership, shares};
use millrace::store::postgres::Database;
use millrace::store::settlement::payments::{self, Arrival};
use millrace::store::settlement::{SettlementWriter, expiry};

use crate::lending::{Node, PATIENCE, arrival, payment_of};
use crate::support::proxy::{Cut, Proxy};
use crate::support::sale::SCHEMA;
use crate::twin::Bed;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_does_not_expire_while_another_node_stores_its_payment() {
    for match_now in [true, false] {
        does_not_expire_while_a_payment_is_stored(match_now).await;
    }
}

async fn does_not_expire_while_a_payment_is_stored(match_now: bool) {
    let bed = Bed::open().await;
    bed.logged_skus(&[10]).await;
    let (owner, other) = (Node::start(&bed, 1).await, Node::start(&bed, 2).await);
    let id = owner.buy(1).await.unwrap();
    let proxy = Proxy::start(&bed.test.config()).await;
    let config = proxy.config(&bed.test.config());
    let slow = Database::with_config(config, SCHEMA, 2, Duration::from_secs(10)).unwrap();
    let (mut storing, mut expiring) = (
        SettlementWriter::new(slow, other.lease, 1),
        SettlementWriter::new(bed.database.clone(), owner.lease, 1),
    );
    let (now, delivery) = (UnixMillis::now(), payment_of(id, 100));
    let later = now.plus_ms(86_400_000);
    let arrival = Arrival {
        match_now,
        ..arrival(now)
    };
    // The payment is on its way: nothing of it is committed.
    proxy.cut(Cut::Late(Duration::from_secs(1)));
    let (deliveries, elsewhere) = ([&delivery], [id]);
    let stored = payments::ingest(&mut storing, &deliveries, arrival, &[], &elsewhere);
    let meanwhile = async {
        let deadline = Instant::now() + PATIENCE;
        while proxy.late() == 0 {
            assert!(Instant::now() < deadline);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        expiry::end_overdue(&mut expiring, &[id], later, true).await
    };
    let (stored, meanwhile) = tokio::join!(stored, meanwhile);
    assert_eq!(stored.unwrap().orphans.len(), 1);
    assert_eq!(meanwhile.unwrap(), [], "its row is locked");
    let afterwards = expiry::end_overdue(&mut expiring, &[id], later, true).await;
    assert_eq!(afterwards.unwrap(), [], "it was paid in time");
    let matched = payments::match_orphans(&mut expiring, &[id], now).await;
    assert_eq!(matched.unwrap().matched.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_payment_that_waits_while_its_lane_is_handed_over_is_left_to_the_new_owner() {
    let bed = Bed::open().await;
    bed.logged_skus(&[10]).await;
    let lease = bed.join(1).await;
    let cutover = Cutover(OrderId::MIN);
    let node_lanes = NodeLanes {
        lanes: Arc::new(Lanes::new()),
        cutover,
    };
    let doors = Arc::clone(&node_lanes.lanes);
    let owner = Node::start_with(&bed, lease, bed.database.clone(), Some(node_lanes)).await;
    let taker = bed.join(2).await;
    for row in lanes::claim_free(&bed.database, lease).await.unwrap() {
        doors.open(row.lane, 1);
    }
    // One unit stands for those of other lanes: it does not go with the lane.
    let id = owner.buy(2).await.unwrap();
    let lane = cutover.lane_of(id).unwrap();
    let (handle, task) = Callbacks::new(owner.settler(), 60_000);
    let mut storing = pin!(handle.ingest(payment_of(id, 100)));
    assert!(poll!(&mut storing).is_pending());
    // As the keeper does, and the callback is no request any more: it was answered.
    doors.close(lane);
    assert!(doors.is_drained(lane));
    let units = LaneUnits::joined([(SkuNumber(1), 1)].into(), BTreeMap::new());
    let over = HandOver {
        lane,
        epoch: 1,
        to: taker.node,
        ids_until: UnixMillis(0),
        units: &units,
    };
    let went = lanes::hand_over(&bed.database, lease, &over).await;
    assert_eq!(went.unwrap(), HandedOver::Yes { epoch: 2 });
    moved_units::given(&owner.state, &Metrics::new().unwrap(), &units);
    let task = tokio::spawn(task.run());
    storing.await.unwrap();
    let orphans = "SELECT count(*) FROM payments WHERE state = 'orphan'";
    assert_eq!(bed.number(orphans).await, 1);
    let share = shares::share_of(&bed.database, lease.node, SkuNumber(1));
    let share = share.await.unwrap();
    assert_eq!((share.held, share.sold), (1, 0));
    task.abort();
}

/// Makes every look at payments one that says so (lock 8) and ends when lock 7 is free, with the snapshot of its beginning.
const SLOW_LOOK: &str = "
    ALTER TABLE payments RENAME TO stored_payments;
    CREATE FUNCTION look() RETURNS SETOF stored_payments STABLE LANGUAGE plpgsql AS $$ BEGIN
        PERFORM pg_advisory_xact_lock_shared(8);
        WHILE NOT pg_try_advisory_xact_lock_shared(7) LOOP PERFORM pg_sleep(0.005); END LOOP;
        RETURN QUERY SELECT * FROM stored_payments;
    END $$;
    CREATE VIEW payments AS SELECT * FROM look();
    SELECT pg_advisory_lock(7);";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_is_locked_before_its_expiry_looks_for_payments() {
    let bed = Bed::open().await;
    bed.logged_skus(&[10]).await;
    let owner = Node::start(&bed, 1).await;
    let id = owner.buy(1).await.unwrap();
    let mut expiring = SettlementWriter::new(bed.database.clone(), owner.lease, 1);
    expiring.connected().await.unwrap();
    bed.sql(SLOW_LOOK).await;
    let later = UnixMillis::now().plus_ms(86_400_000);
    let due = [id];
    let expiring = expiry::end_overdue(&mut expiring, &due, later, true);
    let meanwhile = async {
        let deadline = Instant::now() + PATIENCE;
        let looks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 8";
        while bed.number(looks).await == 0 {
            assert!(Instant::now() < deadline);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // As another node does before it stores a payment, which this look would not see any more.
        let share = format!(
            "SELECT count(*) FROM (SELECT FROM orders WHERE order_id = {id} FOR SHARE SKIP LOCKED) o"
        );
        let lockable = bed.number(&share).await;
        bed.sql("SELECT pg_advisory_unlock(7)").await;
        lockable
    };
    let (expired, lockable) = tokio::join!(expiring, meanwhile);
    assert_eq!(expired.unwrap().len(), 1);
    assert_eq!(lockable, 0);
}

#[tokio::test]
async fn what_a_start_looks_for_is_not_raised_before_every_lane_is_loaded() {
    let bed = Bed::open().await;
    let (survivor, dead) = (bed.join(1).await, bed.join(2).await);
    lanes::claim_free(&bed.database, dead).await.unwrap();
    bed.sql(&format!(
        "UPDATE node SET unpaid_from = CASE WHEN node = {} THEN 5 ELSE 100 END",
        dead.node
    ))
    .await;
    let nodes = membership::nodes(&bed.database).await.unwrap();
    let suspect = Suspect {
        node: dead.node,
        epoch: dead.epoch,
        renewals: nodes
            .iter()
            .find(|row| row.node == dead.node)
            .unwrap()
            .renewals,
    };
    let mut session = bed.database.connect("test").await.unwrap();
    let fenced = takeover::fence(&bed.database, &mut session, survivor, suspect).await;
    assert!(fenced.unwrap().is_some());
    let mut expiring = SettlementWriter::new(bed.database.clone(), survivor, 1);
    let changes = expiry::unpaid_changes(&mut expiring).await.unwrap();
    let later = OrderId::new(1_000).unwrap();
    let loaded: LaneSet = Lane::all().skip(1).collect();
    let noted = expiry::note_unpaid_from(&mut expiring, changes, later, loaded).await;
    assert!(!noted.unwrap(), "the orders of one lane are not in memory");
    let from = format!(
        "SELECT unpaid_from FROM node WHERE node = {}",
        survivor.node
    );
    assert_eq!(bed.number(&from).await, 5);
    // Somebody raises the node's epoch, and waits for this writer.
    let raising = session.transaction().await.unwrap();
    raising
        .execute("SELECT FROM node FOR UPDATE", &[])
        .await
        .unwrap();
    let noted = expiry::note_unpaid_from(&mut expiring, changes, later, LaneSet::ALL).await;
    assert!(!noted.unwrap());
    raising.rollback().await.unwrap();
    let noted = expiry::note_unpaid_from(&mut expiring, changes, later, LaneSet::ALL).await;
    assert!(noted.unwrap());
    assert_eq!(bed.number(&from).await, 1_000);
}
