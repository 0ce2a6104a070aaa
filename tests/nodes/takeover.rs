//! The log of a dead node on a real broker, and the task that takes nodes over.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use millrace::metrics::Metrics;
use millrace::order::payment::Delivery;
use millrace::order::{ClockReading, Lane, Order, SkuNumber, UnixMillis};
use millrace::pipeline::cluster::member::{Member, Renewing, session_name};
use millrace::pipeline::cluster::takeover::{
    FindLog, Replayed, Replaying, TakeoverError, TakeoverParts, Takeovers, replay,
};
use millrace::pipeline::failover::lease::AcknowledgeLease;
use millrace::queue::log::broker::reader::ReadError;
use millrace::queue::log::broker::redis::{RedisBroker, RedisSettings};
use millrace::queue::log::broker::{
    BeforeStart, Broker, Known, Owner, PATIENCE, Place, SendError, frame, while_away,
};
use millrace::queue::log::record::GroupBytes;
use millrace::state::lanes::Lanes;
use millrace::state::orphans::Orphans;
use millrace::store::StoreError;
use millrace::store::batch::BatchWriter;
use millrace::store::cluster::lanes::HandOver;
use millrace::store::cluster::takeover::{self, DeadNode, Suspect};
use millrace::store::cluster::{lanes, membership, shares};
use millrace::store::postgres::order_log::{self, LogName};
use millrace::store::postgres::{Database, NodeLease, lease, skus};
use millrace::store::settlement::SettlementWriter;
use millrace::store::settlement::payments;
use tokio::task::JoinSet;

use crate::lending::{Node, arrival, payment_of};
use crate::support::brokers::{Broker as Server, Kind};
use crate::support::proxy::{Cut, Proxy};
use crate::support::sale::{SCHEMA, order, refs};
use crate::support::waiting::wait_until;
use crate::twin::Bed;

const SKU: SkuNumber = SkuNumber(1);

/// A node that keeps its log on a broker.
struct LoggingNode {
    lease: NodeLease,
    owner: Owner,
    client: Arc<dyn Broker>,
    place: Place,
}

fn client(server: &Server, node: i16) -> Arc<dyn Broker> {
    let client = RedisBroker::new(RedisSettings {
        url: format!("redis://{}/", server.address()),
        stream: format!("millrace:test:{node}"),
        replicas_min: 0,
        timeout: Duration::from_secs(20),
    });
    let client: Arc<dyn Broker> = Arc::new(client.unwrap());
    while_away(PATIENCE, || client.check()).unwrap();
    client
}

async fn identity(bed: &Bed) -> [u8; 16] {
    let row = bed
        .session
        .query_one("SELECT uuid_send(id) FROM database_identity", &[]);
    row.await.unwrap().get::<_, &[u8]>(0).try_into().unwrap()
}

impl LoggingNode {
    /// Joins with a log that has nothing which is no row.
    async fn join(bed: &Bed, server: &Server, home: u64) -> Self {
        let lease = bed.join(home).await;
        let (client, database) = (client(server, lease.node), identity(bed).await);
        let owner = Owner {
            database,
            node: lease.node as u16,
        };
        let noted = order_log::noted(&bed.database, &bed.session, lease.node);
        let noted = noted.await.unwrap();
        let before = BeforeStart {
            broker: Arc::clone(&client),
            owner,
            epoch: lease.epoch as u64,
            known: Known {
                in_use: false,
                place: noted.and_then(|noted| noted.place),
            },
            patience: PATIENCE,
        };
        let taken = tokio::task::spawn_blocking(move || before.take_over(|_| {}));
        let marker = taken.await.unwrap().unwrap().marker;
        let name = LogName {
            id: format!("{:032x}", lease.node),
            title: client.title(),
        };
        order_log::note(&bed.database, lease, &name, Some(marker))
            .await
            .unwrap();
        LoggingNode {
            lease,
            owner,
            client,
            place: marker.place,
        }
    }

    /// Appends a group, as the node acknowledges its orders.
    async fn append(&mut self, orders: &[Order]) -> Result<u64, SendError> {
        self.place.number += 1;
        let mut group = GroupBytes::default();
        group.begin(self.lease.epoch, self.place.number);
        orders.iter().for_each(|order| group.push_order(order));
        let frame = frame::encode(self.owner, self.place, group.as_bytes());
        let (client, place) = (Arc::clone(&self.client), self.place);
        tokio::task::spawn_blocking(move || client.send(place, &frame))
            .await
            .unwrap()
    }
}

async fn fence(bed: &Bed, by: NodeLease, node: i16) -> takeover::Takeover {
    let nodes = membership::nodes(&bed.database).await.unwrap();
    let row = nodes.iter().find(|row| row.node == node).unwrap();
    let suspect = Suspect {
        node,
        epoch: row.epoch,
        renewals: row.renewals,
    };
    let mut session = bed.database.connect("test").await.unwrap();
    let fenced = takeover::fence(&bed.database, &mut session, by, suspect).await;
    fenced.unwrap().unwrap()
}

/// Replays a dead node's log and ends its takeover. Returns how many orders were written and were there.
async fn finished(bed: &Bed, server: &Server, by: NodeLease, dead: &DeadNode) -> (u64, u64) {
    let replayed = replaying(bed, server, dead).await.unwrap();
    takeover::finish(&bed.database, by, dead.lease, replayed.end)
        .await
        .unwrap();
    (replayed.applied.written, replayed.applied.present)
}

/// Replays a dead node's log and returns how many orders were written and were there.
async fn replayed(bed: &Bed, server: &Server, dead: &DeadNode) -> (u64, u64) {
    let replayed = replaying(bed, server, dead).await.unwrap();
    assert_eq!(replayed.applied.refused + replayed.applied.parked, 0);
    (replayed.applied.written, replayed.applied.present)
}

async fn replaying(bed: &Bed, server: &Server, dead: &DeadNode) -> Result<Replayed, TakeoverError> {
    let orphans = Orphans::default();
    let with = Replaying {
        broker: client(server, dead.lease.node),
        identity: identity(bed).await,
        rows_max: 2,
        orphans: &orphans,
        now: UnixMillis::now(),
    };
    replay(&bed.database, dead, with).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_dead_node_has_acknowledged_is_written_by_whoever_inherits_it_and_nothing_after() {
    let Some(server) = Server::start(Kind::Redis) else {
        return;
    };
    let bed = Bed::open().await;
    bed.skus(&[10]).await;
    let mut dead = LoggingNode::join(&bed, &server, 1).await;
    // It has one worker, and the others may have more.
    bed.sql("DELETE FROM writer WHERE node = 0 AND shard > 0")
        .await;
    let survivor = LoggingNode::join(&bed, &server, 2).await;
    let heir = LoggingNode::join(&bed, &server, 3).await;
    lanes::claim_free(&bed.database, dead.lease).await.unwrap();
    shares::lend(&bed.database, dead.lease, SKU, 8, 1)
        .await
        .unwrap();
    let sku = skus::load_all(&bed.database, dead.lease)
        .await
        .unwrap()
        .remove(0);
    let orders: Vec<Order> = (0..5).map(|_| order(&sku, 1)).collect();
    dead.append(&orders[..3]).await.unwrap();
    dead.append(&orders[3..]).await.unwrap();
    let mut writer = BatchWriter::new(bed.database.clone(), dead.lease, 0);
    writer.write(&refs(&orders[..2])).await.unwrap();

    let taken = fence(&bed, survivor.lease, dead.lease.node).await;
    assert_eq!(taken.lanes.len(), Lane::COUNT);
    assert!(
        writer.write(&refs(&orders[2..3])).await.is_err(),
        "it can commit nothing"
    );
    assert_eq!(replayed(&bed, &server, &taken.dead[0]).await, (3, 2));
    let late = dead.append(&[order(&sku, 1)]).await;
    assert!(
        matches!(late, Err(SendError::Stale(_))),
        "it can acknowledge nothing: {late:?}"
    );
    let share = async |node: i16| {
        let share = shares::share_of(&bed.database, node, SKU).await.unwrap();
        (share.lent, share.held)
    };
    assert_eq!(
        share(dead.lease.node).await,
        (8, 5),
        "its units are still its own"
    );

    // The survivor dies too, before it has finished.
    let taken = fence(&bed, heir.lease, survivor.lease.node).await;
    let nodes: Vec<i16> = taken.dead.iter().map(|dead| dead.lease.node).collect();
    assert_eq!(nodes, [survivor.lease.node, dead.lease.node]);
    assert!(
        taken
            .lanes
            .iter()
            .all(|lane| lane.blocked_by == Some(dead.lease.node))
    );
    for (node, found) in taken.dead.iter().zip([(0, 0), (0, 5)]) {
        let done = finished(&bed, &server, heir.lease, node).await;
        assert_eq!(done, found, "{:?}", node.lease);
    }
    assert_eq!(share(heir.lease.node).await, (8, 5));
    assert_eq!(bed.number("SELECT count(*) FROM orders").await, 5);
    assert_eq!(
        bed.number("SELECT count(*) FROM lane WHERE blocked_by IS NOT NULL")
            .await,
        0
    );
    let log = "SELECT sum(held_delta)::int8 FROM stock_log WHERE node IS NOT NULL";
    assert_eq!(bed.number(log).await, 5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_taker_that_was_paused_leaves_the_log_of_a_node_alone_that_has_come_back() {
    let Some(server) = Server::start(Kind::Redis) else {
        return;
    };
    let bed = Bed::open().await;
    bed.skus(&[10]).await;
    let mut dead = LoggingNode::join(&bed, &server, 1).await;
    lanes::claim_free(&bed.database, dead.lease).await.unwrap();
    shares::lend(&bed.database, dead.lease, SKU, 8, 1)
        .await
        .unwrap();
    let sku = skus::load_all(&bed.database, dead.lease)
        .await
        .unwrap()
        .remove(0);
    dead.append(&[order(&sku, 1)]).await.unwrap();
    let (paused, heir) = (bed.join(2).await, bed.join(3).await);
    let stale = fence(&bed, paused, dead.lease.node).await.dead.remove(0);
    for node in fence(&bed, heir, paused.node).await.dead {
        if node.lease.node == dead.lease.node {
            assert_eq!(finished(&bed, &server, heir, &node).await, (1, 0));
        }
    }
    let mut back = LoggingNode::join(&bed, &server, 1).await;
    assert_eq!(back.lease.node, dead.lease.node);
    // It goes on: the marker of its takeover is refused, and the database knows why.
    let TakeoverError::Log(ReadError::LaterEpoch(epoch)) =
        replaying(&bed, &server, &stale).await.unwrap_err()
    else {
        panic!("it must not take that log over");
    };
    let raised = takeover::raise_to(&bed.database, paused, stale.lease, epoch).await;
    assert!(
        matches!(raised, Err(StoreError::Fenced { .. })),
        "{raised:?}"
    );
    back.append(&[order(&sku, 1)]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_nodes_log_of_later_epochs_than_its_row_is_taken_over_above_them() {
    let Some(server) = Server::start(Kind::Redis) else {
        return;
    };
    let bed = Bed::open().await;
    bed.skus(&[10]).await;
    let mut dead = LoggingNode::join(&bed, &server, 1).await;
    lanes::claim_free(&bed.database, dead.lease).await.unwrap();
    shares::lend(&bed.database, dead.lease, SKU, 8, 1)
        .await
        .unwrap();
    let sku = skus::load_all(&bed.database, dead.lease)
        .await
        .unwrap()
        .remove(0);
    // Its row has forgotten the epoch, as after a failover.
    dead.place = Place {
        epoch: 40,
        number: 0,
    };
    let marker = frame::encode(dead.owner, dead.place, &[]);
    let (client, place) = (Arc::clone(&dead.client), dead.place);
    let sent = tokio::task::spawn_blocking(move || client.send(place, &marker));
    sent.await.unwrap().unwrap();
    dead.append(&[order(&sku, 1)]).await.unwrap();
    let survivor = bed.join(2).await;
    let mut taken = fence(&bed, survivor, dead.lease.node).await.dead.remove(0);
    let refused = replaying(&bed, &server, &taken).await.unwrap_err();
    let TakeoverError::Log(ReadError::LaterEpoch(41)) = refused else {
        panic!("{refused}");
    };
    let raised = takeover::raise_to(&bed.database, survivor, taken.lease, 41).await;
    taken.lease = raised.unwrap();
    assert_eq!(finished(&bed, &server, survivor, &taken).await, (0, 1));
    // Whoever gets the row next begins behind the marker, with nothing to compare.
    let place = "SELECT log_epoch * 1000 + log_number FROM node WHERE node = 0";
    assert_eq!(bed.number(place).await, 41_000);
    let next = bed.join(1).await;
    assert_eq!(next.epoch, 42);
}

/// Has a node renew its membership and take over who does not. Its takeovers are on a database of their own.
async fn takes_over(
    bed: &Bed,
    node: &Node,
    database: Database,
    find_log: FindLog,
) -> (Arc<Member>, JoinSet<()>) {
    let (lease_ms, answer_lease_ms) = (1_000, 300);
    let member = Arc::new(Member::new(
        node.lease,
        Arc::new(Lanes::new()),
        lease_ms,
        answer_lease_ms,
        Arc::new(AcknowledgeLease::of_log()),
    ));
    let name = session_name(node.lease);
    let session = lease::share(&bed.database, &name).await.unwrap();
    let renewing = Renewing::new(
        Arc::clone(&member),
        bed.database.clone(),
        session,
        Arc::clone(&node.state.poison),
    );
    let takeovers = Takeovers::new(TakeoverParts {
        member: Arc::clone(&member),
        database,
        find_log,
        identity: identity(bed).await,
        rows_max: 100,
        clock: ClockReading::take(),
        changed: Arc::default(),
        metrics: Metrics::new().unwrap(),
    });
    let mut tasks = JoinSet::new();
    tasks.spawn(renewing.run());
    tasks.spawn(takeovers.run(Arc::clone(&node.state)));
    (member, tasks)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_takeover_goes_on_although_the_answer_to_one_of_its_commits_is_lost() {
    for cut in [Cut::Before, Cut::After, Cut::AfterInSilence] {
        let bed = Bed::open().await;
        bed.logged_skus(&[20]).await;
        let proxy = Proxy::start(&bed.test.config()).await;
        let through = Database::with_config(
            proxy.config(&bed.test.config()),
            SCHEMA,
            2,
            Duration::from_millis(700),
        );
        let survivor = Node::start(&bed, 1).await;
        let dead = bed.join(2).await;
        lanes::claim_free(&bed.database, dead).await.unwrap();
        shares::lend(&bed.database, dead, SKU, 9, 1).await.unwrap();
        bed.settle(dead, 1, 3, 2).await.unwrap();
        // Its log may hold orders, so there is time between the two transactions. It may answer for longer than others.
        bed.sql(
            "UPDATE node SET journal_id = '00000000-0000-0000-0000-00000000000a', journal_in_use = true,
                    answer_lease_ms = 600000 WHERE node = 1",
        )
        .await;
        proxy.cut(cut);
        let find_log: FindLog = Arc::new(|_| Err("it is not there yet".to_owned()));
        let (member, _tasks) = takes_over(&bed, &survivor, through.unwrap(), find_log).await;
        wait_until("it is fenced", async || {
            bed.number("SELECT count(*) FROM node WHERE state = 'dead'")
                .await
                == 1
        })
        .await;
        assert!(proxy.has_cut());
        proxy.cut(cut);
        bed.sql("UPDATE node SET journal_in_use = false WHERE node = 1")
            .await;
        wait_until("it is taken over", async || {
            let open = "SELECT count(*) FROM lane WHERE node = 0 AND blocked_by IS NULL";
            bed.number(open).await == Lane::COUNT as i64
        })
        .await;
        survivor.agrees().await;
        let stock = survivor.state.catalogue.by_number(SKU).unwrap();
        assert_eq!(stock.counter().snapshot().held, 3, "{cut:?}");
        assert!(member.opens_in() > Some(Duration::from_secs(500)));
        assert!(proxy.has_cut());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_takeover_that_the_database_refuses_keeps_no_other_waiting() {
    let bed = Bed::open().await;
    bed.logged_skus(&[20]).await;
    let survivor = Node::start(&bed, 1).await;
    let (first, second) = (bed.join(2).await, bed.join(3).await);
    let lane = lanes::claim_free(&bed.database, first).await.unwrap()[0];
    let over = HandOver {
        lane: lane.lane,
        epoch: lane.epoch,
        to: second.node,
        ids_until: UnixMillis(0),
        units: &[],
    };
    lanes::hand_over(&bed.database, first, &over).await.unwrap();
    for dead in [first, second] {
        shares::lend(&bed.database, dead, SKU, 2, 1).await.unwrap();
    }
    bed.sql(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no'; END $$;
         CREATE TRIGGER refuse BEFORE DELETE ON stock_share FOR EACH ROW WHEN (OLD.node = 1) EXECUTE FUNCTION refuse()",
    )
    .await;
    let find_log: FindLog = Arc::new(|_| Err("nobody has one".to_owned()));
    let (_member, _tasks) = takes_over(&bed, &survivor, bed.database.clone(), find_log).await;
    let left = async |node: i16| {
        let left = format!("SELECT count(*) FROM node WHERE node = {node} AND state = 'left'");
        bed.number(&left).await == 1
    };
    wait_until("the other one is taken over", async || left(2).await).await;
    assert!(!left(1).await);
    bed.sql("DROP TRIGGER refuse ON stock_share").await;
    wait_until("so is this one", async || left(1).await).await;
    survivor.agrees().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_of_a_single_process_that_is_gone_is_replayed_by_nodes_with_rows_of_their_own() {
    let Some(server) = Server::start(Kind::Redis) else {
        return;
    };
    let bed = Bed::open().await;
    bed.logged_skus(&[10]).await;
    let mut single = LoggingNode::join(&bed, &server, 1).await;
    let sku = skus::load_all(&bed.database, single.lease)
        .await
        .unwrap()
        .remove(0);
    single.append(&[order(&sku, 3)]).await.unwrap();
    bed.sql("UPDATE node SET state = 'single', home = NULL WHERE node = 0")
        .await;
    let node = Node::start(&bed, 2).await;
    assert_eq!(node.lease.node, 1);
    let log = (client(&server, 0), format!("{:032x}", 0));
    let is_there = Arc::new(AtomicBool::new(false));
    let find_log: FindLog = {
        let is_there = Arc::clone(&is_there);
        Arc::new(move |_| match is_there.load(Ordering::Relaxed) {
            true => Ok(log.clone()),
            false => Err("it is not there yet".to_owned()),
        })
    };
    let (_member, _tasks) = takes_over(&bed, &node, bed.database.clone(), find_log).await;
    wait_until("its log is looked for", async || {
        bed.number("SELECT renewals FROM node WHERE node = 1").await > 12
    })
    .await;
    let state = "SELECT count(*) FROM node WHERE node = 0 AND state = 'single'";
    assert_eq!(bed.number(state).await, 1, "a process on its own may go on");
    is_there.store(true, Ordering::Relaxed);
    wait_until("its lanes are free", async || {
        let taken = lanes::claim_free(&bed.database, node.lease).await;
        taken.unwrap().len() == Lane::COUNT
    })
    .await;
    assert_eq!(bed.number("SELECT count(*) FROM orders").await, 1);
    let share = shares::share_of(&bed.database, 1, SKU).await.unwrap();
    assert_eq!(share.held, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_in_a_dead_nodes_log_that_was_paid_in_time_at_another_node_is_payable() {
    let Some(server) = Server::start(Kind::Redis) else {
        return;
    };
    let bed = Bed::open().await;
    bed.skus(&[10]).await;
    let mut dead = LoggingNode::join(&bed, &server, 1).await;
    let survivor = LoggingNode::join(&bed, &server, 2).await;
    lanes::claim_free(&bed.database, dead.lease).await.unwrap();
    shares::lend(&bed.database, dead.lease, SKU, 8, 1)
        .await
        .unwrap();
    let sku = skus::load_all(&bed.database, dead.lease)
        .await
        .unwrap()
        .remove(0);
    let now = UnixMillis::now();
    let due = || Order {
        expires_at: UnixMillis(now.0 - 1_000),
        ..order(&sku, 1)
    };
    let (paid_for, unpaid) = (due(), due());
    dead.append(&[paid_for.clone(), unpaid.clone()])
        .await
        .unwrap();
    let paid = Delivery {
        received_at: UnixMillis(now.0 - 2_000),
        ..payment_of(paid_for.id, 100)
    };
    let mut storing = SettlementWriter::new(bed.database.clone(), survivor.lease, 1);
    payments::ingest(&mut storing, &[&paid], arrival(now), &[], &[paid_for.id])
        .await
        .unwrap();
    let taken = fence(&bed, survivor.lease, dead.lease.node).await;
    assert_eq!(replayed(&bed, &server, &taken.dead[0]).await, (2, 0));
    let status = async |order: &Order| {
        let status = format!(
            "SELECT status::int8 FROM orders WHERE order_id = {}",
            order.id
        );
        bed.number(&status).await
    };
    assert_eq!(status(&unpaid).await, 4, "nobody has paid it");
    assert_eq!(status(&paid_for).await, 1);
}
