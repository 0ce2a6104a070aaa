//! The keeper of a node's lanes: what keeps a lane where it is.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use millrace::metrics::Metrics;
use millrace::order::{Cutover, Lane, LaneSet, OrderId};
use millrace::pipeline::cluster::lane_keeper::{KeeperParts, LaneKeeper, Neighbours};
use millrace::pipeline::cluster::member::{Member, Renewing, session_name};
use millrace::pipeline::failover::lease::AcknowledgeLease;
use millrace::pipeline::orders::cancel::Canceller;
use millrace::queue::RingQueue;
use millrace::state::lanes::{Lanes, NodeAddress, NodeLanes, Standing};
use millrace::store::cluster::lanes;
use millrace::store::postgres::lease;

use crate::lending::Node;
use crate::support::waiting::{PATIENCE, wait_until};
use crate::twin::Bed;

struct Nobody;

impl Neighbours for Nobody {
    fn are(&self, _: &[NodeAddress]) {}

    fn lanes_moved(&self) {}
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lane_whose_order_is_parked_while_it_drains_stays() {
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
    let member = Arc::new(Member::new(
        own,
        Arc::clone(&doors),
        10_000,
        3_000,
        Arc::new(AcknowledgeLease::of_log()),
    ));
    let session = lease::share(&bed.database, &session_name(own)).await;
    let renewing = Renewing::new(
        Arc::clone(&member),
        bed.database.clone(),
        session.unwrap(),
        Arc::clone(&node.state.poison),
    );
    let renewing = tokio::spawn(renewing.run());
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
    let (_, passes) = doors.enter_among(LaneSet::ALL);
    let parking = async {
        let closed = || Lane::all().find(|lane| doors.standing(*lane) == Standing::Closed);
        wait_until("one is closed", async || closed().is_some()).await;
        let lane = closed().unwrap();
        let id = (1_i64 << 22) + (i64::from(lane.get()) << 16);
        bed.sql(&format!(
            "INSERT INTO parked_orders (order_id, user_id, sku, quantity, adjustment, amount, currency, created_at, expires_at,
                                        payload_hash)
             VALUES ({id}, 'u', 1, 1, 0, 100, 'EUR', now(), now(), 0)"
        ))
        .await;
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
    let stays = format!(
        "SELECT count(*) FROM lane WHERE node = 0 AND lane = {}",
        parked.get()
    );
    assert_eq!(bed.number(&stays).await, 1);
    assert!(doors.open_here().has(parked));
    renewing.abort();
}
