//! Lending in running nodes: the real task, real shares, buyers at several nodes at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use millrace::metrics::Metrics;
use millrace::order::payment::{Delivery, Notice, Payment, Provider};
use millrace::order::{
    Currency, IdClock, LaneSet, OrderId, OrderStatus, Quantity, Refusal, SkuId, SkuNumber,
    UnixMillis,
};
use millrace::pipeline::admin::audit::audit;
use millrace::pipeline::admin::pauses::Pauses;
use millrace::pipeline::cluster::hints::Hints;
use millrace::pipeline::cluster::lending::{Lending, LendingParts};
use millrace::pipeline::cluster::terms::{self, Terms};
use millrace::pipeline::failover::loading;
use millrace::pipeline::payments::settler::{Settler, SettlerParts, Signals};
use millrace::state::State;
use millrace::state::buyers::Buyers;
use millrace::state::effects::Row;
use millrace::state::lanes::NodeLanes;
use millrace::state::pending::Pending;
use millrace::state::sticky_refusals::StickyRefusals;
use millrace::state::stock::{Ask, Catalogue, SaleTerms, Sku};
use millrace::store::batch::BatchWriter;
use millrace::store::cluster::recall::{self, Lowered, Lowering};
use millrace::store::cluster::{lanes, shares};
use millrace::store::postgres::transitions::{self, Transition, Which};
use millrace::store::postgres::{Database, NodeLease, skus};
use millrace::store::settlement::SettlementWriter;
use millrace::store::settlement::payments::{self, Arrival};
use millrace::store::settlement::refunds::{self, Recorded, RefundNote};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::sync::Mutex;
use tokio::task::JoinHandle;

use crate::support::proxy::{Cut, Proxy};
use crate::support::sale::{SCHEMA, count, order};
use crate::support::waiting::wait_until;
use crate::twin::Bed;

/// Longer than anything here takes.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A node as far as stock goes.
pub struct Node {
    pub lease: NodeLease,
    pub database: Database,
    pub state: Arc<State>,
    writer: Mutex<BatchWriter>,
    hints: Arc<Hints>,
    lending: JoinHandle<()>,
}

/// The memory of a node.
pub fn state(catalogue: Catalogue, lanes: Option<NodeLanes>, ids: IdClock) -> State {
    State {
        lanes,
        recent_orders: millrace::state::recent_orders::RecentOrders::with_capacity(1_000),
        expiry_index: millrace::state::expiry_index::ExpiryIndex::default(),
        orphans: millrace::state::orphans::Orphans::default(),
        catalogue,
        buyers: Buyers::new(1_000_000, 10_000),
        sticky_refusals: StickyRefusals::with_capacity(1_000),
        pending: Arc::new(Pending::with_capacity(1_000)),
        row_changes: Default::default(),
        poison: Default::default(),
        throughput: Default::default(),
        progress: Default::default(),
        ids,
    }
}

impl Node {
    pub async fn start(bed: &Bed, home: u64) -> Arc<Self> {
        let lease = bed.join(home).await;
        Self::start_on(bed, lease, bed.database.clone()).await
    }

    /// Whose lending has a database of its own.
    async fn start_on(bed: &Bed, lease: NodeLease, for_lending: Database) -> Arc<Self> {
        Self::start_with(bed, lease, for_lending, None).await
    }

    /// That knows which lanes are open here.
    pub async fn start_with(
        bed: &Bed,
        lease: NodeLease,
        for_lending: Database,
        lanes: Option<NodeLanes>,
    ) -> Arc<Self> {
        let database = bed.database.clone();
        let catalogue = Catalogue::default();
        catalogue.add(skus::load_all(&database, lease).await.unwrap());
        let hour = UnixMillis::now().plus_ms(3_600_000);
        let ids = IdClock::new(UnixMillis(0), hour);
        let state = Arc::new(state(catalogue, lanes, ids));
        let hints = bed.links.join();
        let lending = Lending::new(LendingParts {
            state: Arc::clone(&state),
            database: for_lending,
            lease,
            hints: Arc::clone(&hints),
        });
        Arc::new(Node {
            writer: Mutex::new(BatchWriter::new(database.clone(), lease, 0)),
            database,
            lease,
            state,
            hints,
            lending: tokio::spawn(lending.run()),
        })
    }

    fn sku(&self) -> Arc<Sku> {
        self.state.catalogue.by_number(SkuNumber(1)).unwrap()
    }

    /// Buys as a request does. The order, or `None`: sold out.
    pub async fn buy(&self, units: u32) -> Option<OrderId> {
        let (sku, deadline) = (self.sku(), Instant::now() + PATIENCE);
        let hold = loop {
            assert!(Instant::now() < deadline, "neither sold nor sold out");
            match sku.hold(Quantity::new(units).unwrap()) {
                Ok(hold) => break hold,
                Err(Refusal::SoldOut { .. }) => return None,
                Err(Refusal::StockElsewhere) => {
                    let ask = Ask::new(&sku, units, false).unwrap().unwrap();
                    let _ = tokio::time::timeout(Duration::from_secs(2), ask).await;
                }
                Err(other) => panic!("{other:?}"),
            }
        };
        let order = order(&sku, units);
        hold.commit();
        let mut writer = self.writer.lock().await;
        writer.write(&[&order]).await.unwrap();
        Some(order.id)
    }

    async fn cancel(&self, id: OrderId) {
        let ended = transitions::cancel(&self.database, self.lease, id, None, Which::Unpaid).await;
        if let Transition::Now(units) = ended.unwrap() {
            let ended = millrace::order::Ended::Cancelled;
            self.state.end_unpaid(&units, ended, Row::Moved);
        }
    }

    /// A task's part of it that moves units.
    pub fn settler(&self) -> Settler {
        Settler::new(SettlerParts {
            state: Arc::clone(&self.state),
            database: self.database.clone(),
            lease: self.lease,
            writer: SettlementWriter::new(self.database.clone(), self.lease, 1),
            signals: Arc::new(Signals::default()),
            metrics: Metrics::new().unwrap(),
        })
    }

    /// Until memory has what the row has.
    pub async fn agrees(&self) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let sku = self.sku();
            let memory = sku.counter().snapshot();
            let row = shares::share_of(&self.database, self.lease.node, sku.number);
            let row = row.await.unwrap();
            let of_memory = [memory.total, memory.held, memory.sold].map(i64::from);
            if of_memory == [row.lent, row.held, row.sold] {
                return;
            }
            assert!(Instant::now() < deadline, "{memory:?} and {row:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Until its answers about the SKU have the counters of the whole sale.
    async fn says_what_the_rows_say(&self, bed: &Bed) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let sku = self.sku();
            let said = sku.stock();
            assert_eq!(said.total, said.free + said.held + said.sold);
            let rows = "SELECT s.total * 1000000 + (s.held + coalesce(sum(h.held), 0)::int8) * 1000
                             + s.sold + coalesce(sum(h.sold), 0)::int8
                          FROM sku s LEFT JOIN stock_share h ON h.sku = s.id WHERE s.id = 1 GROUP BY s.id";
            let told = [said.total, said.held, said.sold].map(i64::from);
            let told = told[0] * 1_000_000 + told[1] * 1_000 + told[2];
            if sku.shared().unwrap().is_fresh() && told == bed.number(rows).await {
                return;
            }
            assert!(Instant::now() < deadline, "{said:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.lending.abort();
    }
}

async fn three(bed: &Bed) -> [Arc<Node>; 3] {
    [
        Node::start(bed, 1).await,
        Node::start(bed, 2).await,
        Node::start(bed, 3).await,
    ]
}

/// Sells every unit that is free anywhere. Units that came back within the last second may be said to be sold out.
async fn sell_out(bed: &Bed, node: &Node, total: i64) {
    let deadline = Instant::now() + PATIENCE;
    while bed.number("SELECT sum(held)::int8 FROM stock_share").await < total {
        assert!(
            Instant::now() < deadline,
            "units are left that nobody can buy"
        );
        if node.buy(1).await.is_none() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    assert_eq!(node.buy(1).await, None);
}

/// Every promise over all shares.
pub async fn assert_sound(bed: &Bed, nodes: &[Arc<Node>]) {
    for node in nodes {
        node.agrees().await;
        node.says_what_the_rows_say(bed).await;
        let audit = audit(&bed.database, Some(&node.state)).await.unwrap();
        assert!(audit.ok, "{:#?}", audit.checks);
        assert!(
            !node.state.poison.is_set(),
            "{:?}",
            node.state.poison.reason()
        );
    }
    let wrong = "SELECT count(*) FROM sku s WHERE lent <> (SELECT coalesce(sum(lent), 0) FROM stock_share WHERE sku = s.id)";
    assert_eq!(bed.number(wrong).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_units_over_three_nodes_with_all_clicks_on_one_of_them() {
    let bed = Bed::open().await;
    bed.logged_skus(&[1_000]).await;
    let nodes = three(&bed).await;
    let (placed, refused) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let buyers = (0..40).map(|_| {
        let node = Arc::clone(&nodes[1]);
        let (placed, refused) = (Arc::clone(&placed), Arc::clone(&refused));
        tokio::spawn(async move {
            for _ in 0..30 {
                match node.buy(1).await {
                    Some(_) => placed.fetch_add(1, Ordering::Relaxed),
                    None => refused.fetch_add(1, Ordering::Relaxed),
                };
            }
        })
    });
    for buyer in buyers.collect::<Vec<_>>() {
        buyer.await.unwrap();
    }
    assert_eq!(placed.load(Ordering::Relaxed), 1_000);
    assert_eq!(refused.load(Ordering::Relaxed), 200);
    assert_eq!(bed.number("SELECT count(*) FROM orders").await, 1_000);
    assert_sound(&bed, &nodes).await;
    // What the last ones wanted is withdrawn after their answers.
    wait_until("nothing is wanted", async || {
        bed.number("SELECT count(*) FROM stock_want").await == 0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_unit_that_comes_back_at_one_node_is_sold_at_another() {
    let bed = Bed::open().await;
    bed.logged_skus(&[3]).await;
    let nodes = three(&bed).await;
    let mut orders = Vec::new();
    while let Some(id) = nodes[0].buy(1).await {
        orders.push(id);
    }
    assert_eq!(orders.len(), 3);
    assert_eq!(nodes[2].buy(1).await, None);
    nodes[0].cancel(orders[0]).await;
    // Sold out was said within the last second; afterwards it is looked for again.
    let deadline = Instant::now() + PATIENCE;
    while nodes[2].buy(1).await.is_none() {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // An order of two, where one unit is free.
    nodes[0].cancel(orders[1]).await;
    assert_eq!(nodes[2].buy(2).await, None);
    assert_sound(&bed, &nodes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ids_go_on_above_those_of_the_orders_that_are_loaded() {
    let bed = Bed::open().await;
    bed.logged_skus(&[5]).await;
    let node = Node::start(&bed, 1).await;
    node.buy(1).await.unwrap();
    // Its node had a fast clock, and a lease that nobody knows of.
    let far = OrderId::floor_of(UnixMillis::now().plus_ms(600_000));
    bed.sql(&format!("UPDATE orders SET order_id = {}", far.as_i64()))
        .await;
    let (database, floor) = (&bed.database, node.state.ids.window_floor(3_600_000));
    let all = LaneSet::ALL;
    let loaded = loading::load(&node.state, database, node.lease, floor, all, |_, _| {});
    assert_eq!(loaded.await.unwrap().orders, 1);
    assert!(node.state.ids.now() > far.millis());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn buyers_and_cancellations_at_three_nodes_never_oversell_and_leave_nothing_behind() {
    let seed = count("MILLRACE_SEED", rand::random::<u32>().into());
    println!("MILLRACE_SEED={seed}");
    let bed = Bed::open().await;
    bed.logged_skus(&[60]).await;
    let nodes = three(&bed).await;
    let steps = 60 * count("MILLRACE_ROUNDS", 1);
    let buyers = (0..9_u64).map(|buyer| {
        let node = Arc::clone(&nodes[buyer as usize % 3]);
        let mut random = StdRng::seed_from_u64(seed ^ buyer);
        tokio::spawn(async move {
            let mut own = Vec::new();
            for _ in 0..steps {
                if random.random_bool(0.6) || own.is_empty() {
                    own.extend(node.buy(random.random_range(1..=3)).await);
                } else {
                    let at = random.random_range(0..own.len());
                    node.cancel(own.swap_remove(at)).await;
                }
            }
        })
    });
    for buyer in buyers.collect::<Vec<_>>() {
        buyer.await.unwrap();
    }
    assert_sound(&bed, &nodes).await;
    // What is free is sold to the last unit, wherever it is.
    sell_out(&bed, &nodes[0], 60).await;
    assert_sound(&bed, &nodes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_follows_the_row_where_the_answer_to_a_commit_was_lost() {
    for cut in [
        Cut::Before,
        Cut::After,
        Cut::AfterInSilence,
        Cut::Late(Duration::from_millis(900)),
    ] {
        let bed = Bed::open().await;
        bed.logged_skus(&[40]).await;
        let proxy = Proxy::start(&bed.test.config()).await;
        let database = Database::with_config(
            proxy.config(&bed.test.config()),
            SCHEMA,
            2,
            Duration::from_millis(500),
        );
        let lease = bed.join(1).await;
        let unlucky = Node::start_on(&bed, lease, database.unwrap()).await;
        let other = Node::start(&bed, 2).await;
        let nodes = [Arc::clone(&unlucky), Arc::clone(&other)];
        // Cut at some moment while most of the units go from one node to the other and back.
        for _ in 0..3 {
            proxy.cut(cut);
            let deadline = Instant::now() + PATIENCE;
            while !proxy.has_cut() {
                assert!(Instant::now() < deadline, "{cut:?}");
                for node in &nodes {
                    let id = node.buy(30).await;
                    node.cancel(id.unwrap()).await;
                }
            }
        }
        let mut placed = 0;
        while unlucky.buy(1).await.is_some() {
            placed += 1;
        }
        assert_eq!(placed, 40, "{cut:?}");
        assert_sound(&bed, &nodes).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_killed_at_any_moment_goes_on_from_its_rows() {
    let seed = count("MILLRACE_SEED", rand::random::<u32>().into());
    println!("MILLRACE_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let bed = Bed::open().await;
    bed.logged_skus(&[400]).await;
    let other = Node::start(&bed, 2).await;
    for _ in 0..12 * count("MILLRACE_ROUNDS", 1) {
        let victim = Node::start(&bed, 1).await;
        let buyers = [&victim, &other].map(|node| {
            let node = Arc::clone(node);
            tokio::spawn(async move {
                for _ in 0..6 {
                    // Most of what is free goes from one node to the other.
                    if let Some(id) = node.buy(60).await {
                        node.cancel(id).await;
                    }
                    node.buy(1).await;
                }
            })
        });
        tokio::time::sleep(Duration::from_millis(random.random_range(5..120))).await;
        let [of_victim, of_other] = buyers;
        victim.lending.abort();
        of_victim.abort();
        let _ = of_victim.await;
        drop(victim);
        // The other node has to wait for a dead one's units, so the next process on its row comes first.
        let again = Node::start(&bed, 1).await;
        of_other.await.unwrap();
        drop(again);
    }
    let victim = Node::start(&bed, 1).await;
    sell_out(&bed, &other, 400).await;
    assert_sound(&bed, &[victim, other]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_total_is_lowered_once_the_free_units_are_back() {
    let bed = Bed::open().await;
    bed.logged_skus(&[100]).await;
    let nodes = three(&bed).await;
    for node in &nodes {
        for _ in 0..10 {
            assert!(node.buy(1).await.is_some());
        }
    }
    let lease = nodes[0].lease;
    let lower = |total| {
        let lowering = Lowering::To(total);
        recall::lower_total(&bed.database, lease, SkuNumber(1), lowering, "put", None)
    };
    let refused = lower(29).await.unwrap();
    assert_eq!(refused, Lowered::Refused { committed: 30 });
    let deadline = Instant::now() + PATIENCE;
    while lower(35).await.unwrap() != Lowered::Done {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut placed = 30;
    while nodes[1].buy(1).await.is_some() {
        placed += 1;
    }
    assert_eq!(placed, 35);
    assert_sound(&bed, &nodes).await;
}

#[tokio::test]
async fn the_audit_finds_what_was_changed_by_hand_at_a_node() {
    let bed = Bed::open().await;
    bed.logged_skus(&[10]).await;
    let node = Node::start(&bed, 1).await;
    lanes::claim_free(&bed.database, node.lease).await.unwrap();
    for _ in 0..4 {
        node.buy(1).await.unwrap();
    }
    let nodes = [Arc::clone(&node)];
    assert_sound(&bed, &nodes).await;
    node.lending.abort();
    for (damage, mended) in [
        (
            "UPDATE stock_share SET held = held - 1",
            "UPDATE stock_share SET held = held + 1",
        ),
        (
            "UPDATE stock_share SET sold = sold + 1, lent = lent + 1",
            "UPDATE stock_share SET sold = sold - 1, lent = lent - 1",
        ),
        (
            "INSERT INTO node (node, epoch, ids_leased_until_ms, started_at) VALUES (9, 1, 0, now());
             UPDATE stock_share SET held = held - 1, lent = lent - 1;
             INSERT INTO stock_share (sku, node, lent, held) VALUES (1, 9, 1, 1)",
            "DELETE FROM stock_share WHERE node = 9; DELETE FROM node WHERE node = 9;
             UPDATE stock_share SET held = held + 1, lent = lent + 1",
        ),
        (
            "UPDATE sku SET total = total + 1",
            "UPDATE sku SET total = total - 1",
        ),
        (
            "UPDATE stock_log SET held_delta = held_delta + 1 WHERE id = (SELECT min(id) FROM stock_log WHERE node IS NOT NULL)",
            "UPDATE stock_log SET held_delta = held_delta - 1 WHERE id = (SELECT min(id) FROM stock_log WHERE node IS NOT NULL)",
        ),
        (
            "DELETE FROM stock_log WHERE id = (SELECT max(id) FROM stock_log)",
            "",
        ),
    ] {
        bed.sql(damage).await;
        let found = audit(&bed.database, None).await.unwrap();
        assert!(!found.ok, "{damage}");
        bed.sql(mended).await;
    }
    let memory = audit(&bed.database, Some(&node.state)).await.unwrap();
    assert!(!memory.ok);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_operator_changes_at_one_node_is_in_force_at_the_others_or_they_are_named() {
    let bed = Bed::open().await;
    bed.logged_skus(&[10]).await;
    let (own, other) = (Node::start(&bed, 1).await, Node::start(&bed, 2).await);
    let pauses = Pauses::new(Arc::clone(&other.state), bed.database.clone(), other.lease);
    let terms = Terms {
        state: Arc::clone(&other.state),
        database: bed.database.clone(),
        lease: other.lease,
        pauses: Arc::new(pauses),
        moving: Arc::default(),
        hints: Arc::clone(&other.hints),
        metrics: Metrics::new().unwrap(),
    };
    let running = tokio::spawn(terms.run());
    let put = async |name: &str, title: &str, total| {
        let mut terms = SaleTerms::clone(&own.sku().terms());
        terms.title = title.to_owned();
        let id = SkuId::new(name).unwrap();
        let stored = skus::put(&bed.database, own.lease, &id, &terms, total).await;
        stored.unwrap();
    };
    // Terms, a new SKU, a pause of one sale and of all: whatever is committed, the other node has it.
    put("S0", "another title", 12).await;
    put("S1", "a new one", 7).await;
    let paused = skus::set_paused(&bed.database, own.lease, &own.sku().id, true).await;
    assert!(paused.unwrap());
    skus::set_all_paused(&bed.database, own.lease, true)
        .await
        .unwrap();
    assert_eq!(
        terms::unreached(&bed.database, own.lease, &own.hints)
            .await
            .unwrap(),
        Vec::<i16>::new()
    );
    assert_eq!(other.sku().terms().title, "another title");
    assert!(other.sku().is_paused() && other.state.catalogue.is_paused());
    let new = other
        .state
        .catalogue
        .get(&SkuId::new("S1").unwrap())
        .unwrap();
    assert!(new.shared().is_some(), "it is sold from a share");
    skus::set_all_paused(&bed.database, own.lease, false)
        .await
        .unwrap();
    assert_eq!(
        terms::unreached(&bed.database, own.lease, &own.hints)
            .await
            .unwrap(),
        Vec::<i16>::new()
    );
    assert!(!other.state.catalogue.is_paused());
    // Units that a total was raised by are lent like all others.
    let deadline = Instant::now() + PATIENCE;
    while other.sku().stock().total != 12 {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let mut placed = 0;
    while other.buy(1).await.is_some() {
        placed += 1;
    }
    assert_eq!(placed, 12);
    running.abort();
    put("S0", "nobody hears of it", 12).await;
    let unreached = terms::unreached(&bed.database, own.lease, &own.hints)
        .await
        .unwrap();
    assert_eq!(unreached, [other.lease.node]);
}

/// A callback about a payment of `amount` for this order.
pub fn payment_of(id: OrderId, amount: i64) -> Delivery {
    Delivery {
        notice: Notice {
            provider: Provider::Standard,
            event_id: "evt".to_owned(),
            kind: "payment.succeeded".to_owned(),
            body: Box::from(&b"{}"[..]),
            payment: Some(Payment {
                payment_id: "pay".to_owned(),
                order_ref: id.to_string(),
                amount,
                currency: Currency::new("EUR").unwrap(),
                receipt: None,
                made_at: None,
            }),
        },
        received_at: UnixMillis::now(),
    }
}

pub fn arrival(now: UnixMillis) -> Arrival {
    Arrival {
        now,
        check_at: now,
        match_now: true,
        with_waiting: false,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn paid_units_are_swept_and_a_refund_at_another_node_finds_them() {
    let bed = Bed::open().await;
    bed.logged_skus(&[10]).await;
    let (seller, other) = (Node::start(&bed, 1).await, Node::start(&bed, 2).await);
    let id = seller.buy(2).await.unwrap();
    let delivery = payment_of(id, 200);
    let now = UnixMillis::now();
    let arrival = arrival(now);
    let mut paying = seller.settler();
    let mut writer = SettlementWriter::new(bed.database.clone(), seller.lease, 1);
    let settled = payments::ingest(&mut writer, &[&delivery], arrival, &[], &[])
        .await
        .unwrap();
    paying.apply_settlement(&settled).await;
    // Its lane is the other node's by now.
    let note = RefundNote {
        reference: Some("r".to_owned()),
        note: None,
        restock: true,
    };
    let deadline = Instant::now() + PATIENCE;
    let mut writer = SettlementWriter::new(bed.database.clone(), other.lease, 1);
    let moved = loop {
        match refunds::record(&mut writer, id, &note, now).await.unwrap() {
            Recorded::Done(moved) => break moved.unwrap(),
            Recorded::UnitsElsewhere => assert!(Instant::now() < deadline, "they are not swept"),
            found => panic!("{found:?}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    other.settler().apply_moves(&[moved]).await;
    let status = format!("SELECT status::int8 FROM orders WHERE order_id = {id}");
    assert_eq!(
        bed.number(&status).await,
        i64::from(OrderStatus::Refunded.code().unwrap())
    );
    let nodes = [seller, other];
    assert_sound(&bed, &nodes).await;
    let mut placed = 0;
    while nodes[1].buy(1).await.is_some() {
        placed += 1;
    }
    assert_eq!(placed, 10, "refunded units are on sale again");
    assert_sound(&bed, &nodes).await;
}

#[tokio::test]
async fn nodes_without_buyers_ask_the_database_rarely() {
    let bed = Bed::open().await;
    bed.skus(&[100]).await;
    let nodes = three(&bed).await;
    for node in &nodes {
        node.says_what_the_rows_say(&bed).await;
    }
    let commits = "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()";
    // In a second, each with a message that verifies the connection: ten readings of the counters and two looks for wants, of
    // two messages, at each node; and the counters added up for all, 13 times at most.
    let a_second = 3 * (10 * 2 + 2 * 3 + 1) + 13 + 1;
    // A server counts a session's statements up to a second later, and ten if the session falls silent: the first
    // looks may see what opening the nodes has cost.
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (since, before) = (Instant::now(), bed.number(commits).await);
        tokio::time::sleep(Duration::from_secs(4)).await;
        let asked = bed.number(commits).await - before;
        let seconds = since.elapsed().as_secs_f64();
        if asked as f64 <= (seconds + 1.0) * f64::from(a_second) {
            break;
        }
        assert!(
            Instant::now() < deadline,
            "{asked} statements in {seconds:.1} s"
        );
    }
}
