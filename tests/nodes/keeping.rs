//! The keeper of a node's lanes: what goes with a lane, and what comes with one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use millrace::metrics::Metrics;
use millrace::order::{
    ClockReading, Cutover, IdClock, Lane, LaneSet, OrderId, Quantity, SkuId, SkuNumber, UnixMillis,
};
use millrace::pipeline::admin::pauses::Pauses;
use millrace::pipeline::cluster::lane_keeper::{KeeperParts, LaneKeeper, Neighbours};
use millrace::pipeline::cluster::member::{Member, Renewing, session_name};
use millrace::pipeline::cluster::terms::Terms;
use millrace::pipeline::cluster::{lending, moved_units};
use millrace::pipeline::failover::lease::AcknowledgeLease;
use millrace::pipeline::orders::cancel::Canceller;
use millrace::queue::RingQueue;
use millrace::state::lanes::{Lanes, NodeAddress, NodeLanes, Standing};
use millrace::state::poison::Poison;
use millrace::state::stock::{Catalogue, SaleTerms};
use millrace::store::cluster::lanes::LaneUnits;
use millrace::store::cluster::{lanes, shares};
use millrace::store::postgres::parked::ParkedOf;
use millrace::store::postgres::{NodeLease, lease, skus};
use tokio::task::JoinHandle;

use crate::lending::{Node, state};
use crate::support::waiting::{PATIENCE, wait_until};
use crate::twin::Bed;

struct Nobody;

impl Neighbours for Nobody {
    fn are(&self, _: &[NodeAddress]) {}

    fn lanes_moved(&self) {}

    fn want_left(&self, _: &SkuId) {}

    fn terms_changed(&self) {}
}

fn member(own: NodeLease, lanes: Arc<Lanes>) -> Arc<Member> {
    let acknowledge = Arc::new(AcknowledgeLease::of_log());
    Arc::new(Member::new(own, lanes, 10_000, 3_000, acknowledge))
}

/// The task that renews it.
async fn renew(bed: &Bed, member: &Arc<Member>, poison: &Arc<Poison>) -> JoinHandle<()> {
    let session = lease::share(&bed.database, &session_name(member.lease)).await;
    let renewing = Renewing::new(
        Arc::clone(member),
        bed.database.clone(),
        session.unwrap(),
        Arc::clone(poison),
    );
    tokio::spawn(renewing.run())
}

#[tokio::test]
async fn a_clock_that_has_gone_away_from_the_database_s_is_known_by_how_much() {
    let bed = Bed::open().await;
    let own = bed.join(1).await;
    for ahead_ms in [0, 60_000, -60_000] {
        let clock = ClockReading::of(UnixMillis(UnixMillis::now().0 + ahead_ms));
        let ids = IdClock::going_on(clock, UnixMillis(0), UnixMillis(i64::MAX));
        let state = Arc::new(state(Catalogue::default(), None, ids));
        let member = member(own, Arc::default());
        member.lease_ids_of(Arc::clone(&state), Arc::new(RingQueue::new(8)));
        let mut seen = member.watch();
        let renewing = renew(&bed, &member, &state.poison).await;
        seen.changed().await.unwrap();
        // At least so far: the answer takes its time.
        let apart_ms = member.clock_apart_ms();
        assert!(
            (ahead_ms - apart_ms).abs() < 30_000,
            "{ahead_ms}: {apart_ms}"
        );
        renewing.abort();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_that_is_parked_while_its_lane_drains_goes_with_it() {
    let bed = Bed::open().await;
    bed.logged_skus(&[10]).await;
    let own = bed.join(1).await;
    let rows = lanes::claim_free(&bed.database, own).await.unwrap();
    bed.join(2).await;
    let node_lanes = NodeLanes {
        lanes: Arc::new(Lanes::new()),
        cutover: Cutover(OrderId::MIN),
    };
    let doors = Arc::clone(&node_lanes.lanes);
    for row in &rows {
        doors.open(row.lane, 1);
    }
    let lanes = Some(node_lanes.clone());
    let node = Node::start_with(&bed, own, bed.database.clone(), lanes).await;
    let member = member(own, Arc::clone(&doors));
    let renewing = renew(&bed, &member, &node.state.poison).await;
    wait_until("both are seen", async || member.seen().nodes.len() == 2).await;
    let mut keeper = LaneKeeper::new(KeeperParts {
        member,
        state: Arc::clone(&node.state),
        lanes: node_lanes,
        queue: Arc::new(RingQueue::new(8)),
        canceller: Canceller::new(Arc::clone(&node.state), bed.database.clone(), own),
        database: bed.database.clone(),
        window_ms: 86_400_000,
        neighbours: Arc::new(Nobody),
        loaded: rows
            .iter()
            .map(|row| (row.lane, row.epoch))
            .collect::<BTreeMap<_, _>>(),
        changed: Arc::default(),
        metrics: Metrics::new().unwrap(),
    });
    let sku = node.state.catalogue.by_number(SkuNumber(1)).unwrap();
    let (_, passes) = doors.enter_among(LaneSet::ALL);
    let parking = async {
        let closed = || Lane::all().find(|lane| doors.standing(*lane) == Standing::Closed);
        wait_until("one is closed", async || closed().is_some()).await;
        let lane = closed().unwrap();
        lending::hold(&sku, Quantity::ONE).await.unwrap().commit();
        node.state.catalogue.set_fault(&sku, "refused", 1);
        sku.fault().begin_parking().unwrap().done(1);
        bed.park(lane, SkuNumber(1)).await;
        drop(passes);
        lane
    };
    let (passed, parked) = tokio::join!(keeper.pass(), parking);
    passed.unwrap();
    // Those that did not drain in time are tried again.
    let deadline = Instant::now() + PATIENCE;
    while bed.number("SELECT count(*) FROM lane WHERE node = 1").await == 0 {
        assert!(Instant::now() < deadline, "none goes");
        keeper.pass().await.unwrap();
    }
    let went = format!(
        "SELECT count(*) FROM lane WHERE node = 1 AND lane = {}",
        parked.get()
    );
    while bed.number(&went).await == 0 {
        assert!(Instant::now() < deadline, "it stays");
        keeper.pass().await.unwrap();
    }
    // With its unit, in the rows and in memory.
    assert_eq!(
        bed.number("SELECT lent FROM stock_share WHERE node = 1")
            .await,
        1
    );
    assert_eq!(sku.counter().snapshot().held, 0);
    assert_eq!(sku.fault().refused().unwrap().parked, 0);
    renewing.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_sku_whose_units_come_with_a_lane_has_them_once() {
    let bed = Bed::open().await;
    bed.logged_skus(&[10]).await;
    let own = bed.join(1).await;
    let rows = lanes::claim_free(&bed.database, own).await.unwrap();
    let node_lanes = NodeLanes {
        lanes: Arc::new(Lanes::new()),
        cutover: Cutover(OrderId::MIN),
    };
    let doors = Arc::clone(&node_lanes.lanes);
    let node = Node::start_with(&bed, own, bed.database.clone(), Some(node_lanes)).await;
    let coming = rows[0].lane;
    for row in &rows[1..] {
        doors.open(row.lane, 1);
    }
    // Made and sold at another node, from which the lane has come with the units of an order and of one that is parked.
    let (id, new) = (SkuId::new("S1").unwrap(), SkuNumber(2));
    let terms = SaleTerms::clone(
        &node
            .state
            .catalogue
            .by_number(SkuNumber(1))
            .unwrap()
            .terms(),
    );
    let made = skus::put(&bed.database, own, &id, &terms, 5).await;
    assert_eq!(made.unwrap().number, new);
    shares::lend(&bed.database, own, new, 2, 1).await.unwrap();
    bed.settle(own, new.0, 1, 0).await.unwrap();
    bed.park(coming, new).await;
    skus::set_all_paused(&bed.database, own, true)
        .await
        .unwrap();
    let moving = Arc::<tokio::sync::Mutex<()>>::default();
    let terms = Terms {
        state: Arc::clone(&node.state),
        database: bed.database.clone(),
        lease: own,
        pauses: Arc::new(Pauses::new(
            Arc::clone(&node.state),
            bed.database.clone(),
            own,
        )),
        moving: Arc::clone(&moving),
        hints: Arc::default(),
        metrics: Metrics::new().unwrap(),
    };
    let terms = tokio::spawn(terms.run());
    wait_until("it looks", async || node.state.catalogue.is_paused()).await;
    skus::set_all_paused(&bed.database, own, false)
        .await
        .unwrap();
    wait_until("its first look is over", async || {
        !node.state.catalogue.is_paused()
    })
    .await;
    // The keeper loads it.
    let loading = moving.lock().await;
    let parked = ParkedOf {
        orders: 1,
        units: 1,
    };
    let units = LaneUnits::joined([(new, 1)].into(), [(new, parked)].into());
    moved_units::received(&node.state, &Metrics::new().unwrap(), &units);
    doors.open(coming, 1);
    drop(loading);
    wait_until("it is known", async || {
        node.state.catalogue.get(&id).is_some()
    })
    .await;
    let sku = node.state.catalogue.get(&id).unwrap();
    let stock = sku.counter().snapshot();
    assert_eq!((stock.total, stock.held), (2, 2));
    assert_eq!(sku.fault().refused().unwrap().parked, 1);
    terms.abort();
}
