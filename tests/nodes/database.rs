//! What an arbiter in memory cannot show: transactions at the same time, locks, a database of before.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use millrace::order::{Lane, OrderId, SkuId, SkuNumber, UnixMillis};
use millrace::store::cluster::lanes::{self, HandOver, HandedOver, LaneUnits};
use millrace::store::cluster::membership::{self, Join};
use millrace::store::cluster::shares::{self, Share, Supply};
use millrace::store::cluster::takeover::{self, LogEnd, Suspect};
use millrace::store::cluster::{lists, terms};
use millrace::store::postgres::parked::ParkedOf;
use millrace::store::postgres::{Connected, Database, NodeLease, dead_letters, lease, skus};
use millrace::store::{Ledger, StoreError};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::support::postgres::connect;
use crate::support::sale::{SCHEMA, STEP, count, take_over};
use crate::support::waiting::wait_until;
use crate::twin::{Bed, candidate, uuid};

const SKU: SkuNumber = SkuNumber(1);

async fn suspect(bed: &Bed, node: i16) -> Suspect {
    let nodes = membership::nodes(&bed.database).await.unwrap();
    let row = nodes.iter().find(|row| row.node == node).unwrap();
    Suspect {
        node,
        epoch: row.epoch,
        renewals: row.renewals,
    }
}

/// A node in this test: what it has in memory of its share.
struct Seller {
    lease: NodeLease,
    free: i64,
}

/// Sells one unit: out of memory, else out of the pool, else out of the others' shares. Returns false if the SKU is sold
/// out, as the protocol says it.
async fn sell(database: &Database, sellers: &mut [Seller], at: usize) -> bool {
    for _ in 0..100 {
        let seller = &mut sellers[at];
        if seller.free > 0 {
            seller.free -= 1;
            let client = database.pooled().await.unwrap();
            client
                .execute(
                    "UPDATE stock_share SET held = held + 1 WHERE sku = 1 AND node = $1",
                    &[&seller.lease.node],
                )
                .await
                .unwrap();
            return true;
        }
        let lent = shares::lend(database, seller.lease, SKU, 50, 1)
            .await
            .unwrap();
        seller.free += lent.units;
        if lent.want.is_none() {
            continue;
        }
        let wants = shares::wants(database).await.unwrap();
        let own = wants
            .iter()
            .find(|want| want.node == sellers[at].lease.node)
            .unwrap();
        match shares::supply(database, own, false).await.unwrap().unwrap() {
            Supply::Pool => {}
            Supply::Unanswered => {
                for other in sellers
                    .iter_mut()
                    .filter(|other| other.lease.node != own.node)
                {
                    let units = std::mem::take(&mut other.free);
                    let lent = shares::share_of(database, other.lease.node, SKU)
                        .await
                        .unwrap()
                        .lent;
                    shares::answer(database, other.lease, own, units, lent)
                        .await
                        .unwrap();
                }
            }
            Supply::None => {
                shares::withdraw(database, sellers[at].lease, SKU)
                    .await
                    .unwrap();
                return false;
            }
        }
    }
    panic!("neither sold nor sold out");
}

#[tokio::test]
async fn the_last_unit_is_sold_whichever_node_it_was_lent_to() {
    let bed = Bed::open().await;
    bed.skus(&[1_000]).await;
    let mut sellers = Vec::new();
    for home in 1..=3 {
        let lease = bed.join(home).await;
        // Lent before the sale opens.
        let lent = shares::lend(&bed.database, lease, SKU, 333, 1)
            .await
            .unwrap();
        sellers.push(Seller {
            lease,
            free: lent.units,
        });
    }
    let mut sold = 0;
    while sell(&bed.database, &mut sellers, 1).await {
        sold += 1;
    }
    assert_eq!(sold, 1_000, "all clicks on one node");
    assert_eq!(shares::wants(&bed.database).await.unwrap(), []);
    let counters = "SELECT total - held - sold - lent FROM sku";
    assert_eq!(bed.number(counters).await, 0);
}

#[tokio::test]
async fn a_dead_node_makes_sold_out_wait_for_its_share() {
    let bed = Bed::open().await;
    bed.skus(&[10]).await;
    let (survivor, dead) = (bed.join(1).await, bed.join(2).await);
    lanes::claim_free(&bed.database, dead).await.unwrap();
    shares::lend(&bed.database, dead, SKU, 10, 1).await.unwrap();
    assert!(
        shares::lend(&bed.database, survivor, SKU, 1, 1)
            .await
            .unwrap()
            .want
            .is_some()
    );
    let wants = shares::wants(&bed.database).await.unwrap();
    let supply = || shares::supply(&bed.database, &wants[0], false);
    assert_eq!(supply().await.unwrap(), Some(Supply::Unanswered));
    let mut session = bed.database.connect("test").await.unwrap();
    let suspect = suspect(&bed, dead.node).await;
    let fenced = takeover::fence(&bed.database, &mut session, survivor, suspect).await;
    let fenced = fenced.unwrap().unwrap();
    assert_eq!(fenced.lanes.len(), Lane::COUNT);
    assert_eq!(
        supply().await.unwrap(),
        Some(Supply::Unanswered),
        "its log may hold orders"
    );
    takeover::finish(
        &bed.database,
        survivor,
        fenced.dead[0].lease,
        LogEnd::default(),
    )
    .await
    .unwrap();
    let share = shares::share_of(&bed.database, survivor.node, SKU)
        .await
        .unwrap();
    let all = Share {
        lent: 10,
        ..Share::default()
    };
    assert_eq!(share, all, "the survivor has them now");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_do_everything_at_once_neither_deadlock_nor_lose_a_unit() {
    let seed = count("MILLRACE_SEED", rand::random::<u32>().into());
    println!("MILLRACE_SEED={seed}");
    let bed = Bed::open().await;
    let totals = [500_i64, 300, 200];
    bed.skus(&totals).await;
    let mut leases = Vec::new();
    for home in 1..=4 {
        leases.push(bed.join(home).await);
    }
    lanes::claim_free(&bed.database, leases[0]).await.unwrap();
    let steps = 60 * count("MILLRACE_ROUNDS", 1);
    let nodes = leases.iter().map(|lease| {
        let (database, lease, nodes) = (bed.database.clone(), *lease, leases.clone());
        let mut random = StdRng::seed_from_u64(seed ^ lease.node as u64);
        tokio::spawn(async move {
            for _ in 0..steps {
                busy(&database, lease, &nodes, &mut random).await;
            }
        })
    });
    for node in nodes.collect::<Vec<_>>() {
        node.await.unwrap();
    }
    let (mut own, mut owners) = (0, [0; 4]);
    for row in lanes::all(&bed.database).await.unwrap() {
        owners[row.node.unwrap() as usize] += 1;
        own += 1;
    }
    assert_eq!(own, Lane::COUNT);
    println!("lanes {owners:?}");
    let wrong = "SELECT count(*) FROM sku s WHERE lent <> (SELECT coalesce(sum(lent), 0) FROM stock_share WHERE sku = s.id)";
    assert_eq!(bed.number(wrong).await, 0);
}

/// One random step of a node. Refused counters are part of it; anything else is not.
async fn busy(database: &Database, lease: NodeLease, nodes: &[NodeLease], random: &mut StdRng) {
    let sku = SkuNumber(random.random_range(1..=3));
    let units = random.random_range(1..20);
    let done = match random.random_range(0..6) {
        0 | 1 => shares::lend(database, lease, sku, units, 1)
            .await
            .map(|_| ()),
        2 => shares::give_back(database, lease, sku, units).await,
        3 => {
            let client = database.pooled().await.unwrap();
            let settled = client
                .execute(
                    "UPDATE stock_share SET held = held + $3 WHERE sku = $1 AND node = $2",
                    &[&sku.0, &lease.node, &(units / 4)],
                )
                .await;
            settled
                .map(|_| ())
                .map_err(StoreError::statement("settling"))
        }
        4 => {
            let wants = shares::wants(database).await.unwrap();
            match wants.iter().find(|want| want.node != lease.node) {
                Some(want) => shares::answer(database, lease, want, 0, 0).await,
                None => shares::withdraw(database, lease, sku).await,
            }
        }
        _ => {
            let rows = lanes::all(database).await.unwrap();
            let own: Vec<_> = rows
                .iter()
                .filter(|row| row.node == Some(lease.node))
                .collect();
            let Some(row) = own.first() else { return };
            let over = HandOver {
                lane: row.lane,
                epoch: row.epoch,
                to: nodes[random.random_range(0..nodes.len())].node,
                ids_until: UnixMillis(0),
                units: &LaneUnits::joined(
                    [(SkuNumber(1), 1), (SkuNumber(3), 2)].into(),
                    BTreeMap::new(),
                ),
            };
            lanes::hand_over(database, lease, &over).await.map(|_| ())
        }
    };
    match done {
        Err(error) if !error.is_about_rows() => panic!("{lease:?}: {error}"),
        _ => {}
    }
}

#[tokio::test]
async fn a_dead_node_is_fenced_although_its_backend_is_in_the_middle_of_a_transaction() {
    let bed = Bed::open().await;
    let (survivor, dead) = (bed.join(1).await, bed.join(2).await);
    lanes::claim_free(&bed.database, dead).await.unwrap();
    let writer = bed
        .database
        .connect(&format!("millrace worker {}/0", dead.node))
        .await
        .unwrap();
    writer
        .batch_execute(&format!(
            "BEGIN; UPDATE writer SET batch = batch + 1 WHERE node = {} AND shard = 0",
            dead.node
        ))
        .await
        .unwrap();
    let mut session = bed.database.connect("test").await.unwrap();
    let suspect = suspect(&bed, dead.node).await;
    let fenced = takeover::fence(&bed.database, &mut session, survivor, suspect).await;
    let fenced = fenced.unwrap().unwrap();
    assert_eq!(fenced.dead[0].lease.epoch, dead.epoch + 1);
    assert!(
        fenced
            .lanes
            .iter()
            .all(|row| row.blocked_by == Some(dead.node))
    );
    assert!(writer.batch_execute("COMMIT").await.is_err(), "it is gone");
    let batches = format!(
        "SELECT sum(batch)::int8 FROM writer WHERE node = {}",
        dead.node
    );
    assert_eq!(bed.number(&batches).await, 0);
    let renewed = membership::renew(&bed.database, &bed.session, dead, UnixMillis(0)).await;
    assert!(
        matches!(renewed, Err(StoreError::Fenced { .. })),
        "{renewed:?}"
    );
    let lent = shares::lend(&bed.database, dead, SKU, 1, 1).await;
    assert!(matches!(lent, Err(StoreError::Fenced { .. })), "{lent:?}");
}

#[tokio::test]
async fn no_other_backend_of_a_dead_node_or_of_its_takeovers_is_in_the_way() {
    let mut bed = Bed::open().await;
    let (heir, survivor, dead) = (bed.join(1).await, bed.join(2).await, bed.join(3).await);
    // The replay of a node that it had taken over, and lending or a hand-over of its own.
    let gone = suspect(&bed, dead.node).await;
    let fenced = takeover::fence(&bed.database, &mut bed.session, survivor, gone).await;
    assert!(fenced.unwrap().is_some());
    let replay = bed.database.connect("millrace worker 2/0").await.unwrap();
    replay
        .batch_execute("BEGIN; SELECT FROM writer WHERE node = 2 AND shard = 0 FOR UPDATE")
        .await
        .unwrap();
    let pool = bed.database.clone().of_node(survivor.node).unwrap();
    let lending = pool.pooled().await.unwrap();
    lending
        .batch_execute("BEGIN; SELECT FROM node WHERE node = 1 FOR KEY SHARE")
        .await
        .unwrap();
    let gone = suspect(&bed, survivor.node).await;
    let fenced = takeover::fence(&bed.database, &mut bed.session, heir, gone).await;
    assert_eq!(fenced.unwrap().unwrap().dead.len(), 2);
}

#[tokio::test]
async fn a_session_that_is_not_the_dead_nodes_is_not_ended() {
    let mut bed = Bed::open().await;
    let (survivor, dead) = (bed.join(1).await, bed.join(2).await);
    let person = connect(&bed.test.config()).await;
    let lock = format!(
        "SET search_path = {SCHEMA}; BEGIN; SELECT FROM writer WHERE node = {} FOR UPDATE",
        dead.node
    );
    person.batch_execute(&lock).await.unwrap();
    let short =
        Database::with_config(bed.test.config(), SCHEMA, 2, Duration::from_secs(3)).unwrap();
    let mut session = short.connect("test").await.unwrap();
    let suspect = suspect(&bed, dead.node).await;
    let fenced = takeover::fence(&short, &mut session, survivor, suspect).await;
    assert!(
        matches!(fenced, Err(StoreError::Timeout { .. })),
        "{fenced:?}"
    );
    person.batch_execute("COMMIT").await.unwrap();
    drop(session);
    let fenced = takeover::fence(&bed.database, &mut bed.session, survivor, suspect).await;
    assert!(fenced.unwrap().is_some(), "as soon as it is free");
}

#[tokio::test]
async fn two_survivors_that_fence_one_node_at_once_do_not_both_get_it() {
    let bed = Bed::open().await;
    let leases = [bed.join(1).await, bed.join(2).await, bed.join(3).await];
    lanes::claim_free(&bed.database, leases[1]).await.unwrap();
    let suspect = suspect(&bed, leases[1].node).await;
    let mut first = bed.database.connect("test").await.unwrap();
    let mut second = bed.database.connect("test").await.unwrap();
    let (one, other) = tokio::join!(
        takeover::fence(&bed.database, &mut first, leases[0], suspect),
        takeover::fence(&bed.database, &mut second, leases[2], suspect),
    );
    let won = [one.unwrap().is_some(), other.unwrap().is_some()];
    assert_eq!(won.iter().filter(|won| **won).count(), 1, "{won:?}");
}

#[tokio::test]
async fn a_process_that_comes_back_while_its_row_is_fenced_waits_for_the_replay() {
    let bed = Bed::open().await;
    let (survivor, dead) = (bed.join(1).await, bed.join(2).await);
    lanes::claim_free(&bed.database, dead).await.unwrap();
    // The fence has the row, and waits for its writers.
    let holding = bed.database.connect("test").await.unwrap();
    let hold = format!(
        "BEGIN; SELECT FROM writer WHERE node = {} FOR UPDATE",
        dead.node
    );
    holding.batch_execute(&hold).await.unwrap();
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    let wait_for = async |count: i64| {
        wait_until("they wait", async || bed.number(waiting).await == count).await;
    };
    let gone = suspect(&bed, dead.node).await;
    let mut session = bed.database.connect("test").await.unwrap();
    let database = bed.database.clone();
    let fencing =
        tokio::spawn(async move { takeover::fence(&database, &mut session, survivor, gone).await });
    wait_for(1).await;
    let mut session = bed.database.connect("test").await.unwrap();
    let joining =
        tokio::spawn(async move { membership::join(&mut session, &candidate(0, &uuid(2))).await });
    wait_for(2).await;
    holding.batch_execute("ROLLBACK").await.unwrap();
    assert!(fencing.await.unwrap().unwrap().is_some());
    let joined = joining.await.unwrap();
    assert!(
        matches!(joined, Ok(Join::BeingReplayed { node: 1, by: 0 })),
        "{joined:?}"
    );
}

#[tokio::test]
async fn a_lost_answer_to_a_hand_over_is_no_second_hand_over() {
    let bed = Bed::open().await;
    bed.skus(&[10]).await;
    let (giver, taker) = (bed.join(1).await, bed.join(2).await);
    let lane = lanes::claim_free(&bed.database, giver).await.unwrap()[0];
    shares::lend(&bed.database, giver, SKU, 8, 1).await.unwrap();
    bed.settle(giver, 1, 5, 0).await.unwrap();
    let over = HandOver {
        lane: lane.lane,
        epoch: lane.epoch,
        to: taker.node,
        ids_until: UnixMillis(77),
        units: &LaneUnits::joined(
            [(SKU, 3)].into(),
            [(
                SKU,
                ParkedOf {
                    orders: 1,
                    units: 2,
                },
            )]
            .into(),
        ),
    };
    let first = lanes::hand_over(&bed.database, giver, &over).await.unwrap();
    assert_eq!(first, HandedOver::Yes { epoch: 2 });
    let again = lanes::hand_over(&bed.database, giver, &over).await.unwrap();
    assert_eq!(again, HandedOver::No);
    let row = lanes::all(&bed.database).await.unwrap()[usize::from(lane.lane.get())];
    assert_eq!(
        (row.node, row.epoch, row.ids_until),
        (Some(taker.node), 2, UnixMillis(77))
    );
    let share = async |node| shares::share_of(&bed.database, node, SKU).await.unwrap();
    let of = |lent, held| Share {
        lent,
        held,
        sold: 0,
    };
    assert_eq!(share(giver.node).await, of(3, 2));
    assert_eq!(share(taker.node).await, of(5, 3));
}

#[tokio::test]
async fn a_single_process_and_nodes_keep_each_other_away() {
    let bed = Bed::open().await;
    let one = lease::share(&bed.database, "millrace node 0")
        .await
        .unwrap();
    let other = lease::share(&bed.database, "millrace node 1")
        .await
        .unwrap();
    let refused = lease::claim(&bed.database).await;
    assert!(
        matches!(refused, Err(StoreError::AlreadyActive(_))),
        "{refused:?}"
    );
    drop((one, other));
    let deadline = Instant::now() + STEP;
    let single = loop {
        match lease::claim(&bed.database).await {
            Ok(single) => break single,
            // The server has yet to notice that they are gone.
            Err(StoreError::AlreadyActive(_)) => assert!(Instant::now() < deadline),
            Err(error) => panic!("{error}"),
        }
    };
    let refused = lease::share(&bed.database, "millrace node 0").await;
    assert!(
        matches!(refused, Err(StoreError::AlreadyActive(_))),
        "{refused:?}"
    );
    drop(single);
}

/// The row and the units of a single node, with orders in its log.
const SINGLE: &str = "
    INSERT INTO node (node, epoch, ids_leased_until_ms, started_at, journal_id, journal_in_use)
    VALUES (0, 7, 5000, now(), '00000000-0000-0000-0000-00000000000a', true);
    UPDATE sku SET held = 4, sold = 3;";

#[tokio::test]
async fn the_data_of_a_single_node_is_taken_along_and_back() {
    let mut bed = Bed::open().await;
    bed.skus(&[10]).await;
    bed.sql(SINGLE).await;
    let id = uuid(1);
    let with_log = |log| membership::Candidate {
        log: Some(log),
        ..candidate(0, &id)
    };
    let log = uuid(10);
    let joined = membership::join(&mut bed.session, &with_log(&log))
        .await
        .unwrap();
    let Join::Joined(joined) = joined else {
        panic!("{joined:?}");
    };
    assert_eq!(
        (joined.lease.node, joined.lease.epoch),
        (0, 8),
        "it has the log"
    );
    assert_eq!(joined.id_high_water, UnixMillis(5_000));
    membership::activate(&bed.database, joined.lease, UnixMillis(0))
        .await
        .unwrap();
    let lanes = lanes::claim_free(&bed.database, joined.lease)
        .await
        .unwrap();
    assert_eq!(lanes.len(), Lane::COUNT);
    let share = shares::share_of(&bed.database, 0, SKU).await.unwrap();
    let held = Share {
        lent: 4,
        held: 4,
        sold: 0,
    };
    assert_eq!(share, held);
    let list = "SELECT free * 10000 + held * 100 + sold FROM sku_list";
    assert_eq!(bed.number(list).await, 30_403, "a list shows no difference");
    assert!(
        !membership::leave(&bed.database, joined.lease, UnixMillis(9))
            .await
            .unwrap()
    );
    bed.sql("UPDATE node SET journal_in_use = false").await;
    assert!(
        membership::leave(&bed.database, joined.lease, UnixMillis(9_000))
            .await
            .unwrap()
    );
    assert_eq!(bed.number(list).await, 30_403);
    assert_eq!(bed.number("SELECT held * 100 + lent FROM sku").await, 400);
    let single = take_over(&bed.database, 1).await.unwrap();
    assert_eq!(single.lease.node, 0);
    assert!(single.id_high_water >= UnixMillis(9_000));
    assert_eq!(
        bed.number("SELECT count(*) FROM node WHERE state = 'single'")
            .await,
        1
    );
    assert_eq!(
        bed.number("SELECT count(*) FROM lane WHERE node IS NULL AND ids_until_ms = 9000")
            .await,
        64
    );
}

#[tokio::test]
async fn the_units_of_parked_orders_are_for_whoever_takes_their_lanes_as_far_as_they_are_there() {
    let bed = Bed::open().await;
    bed.skus(&[10, 3]).await;
    bed.sql(
        "UPDATE sku SET held = 2 WHERE id = 1;
         UPDATE sku SET sold = 2 WHERE id = 2;
         INSERT INTO parked_orders (order_id, user_id, sku, quantity, adjustment, amount, currency, created_at, expires_at, payload_hash)
         SELECT id, 'u', sku, units, 0, 100, 'EUR', now(), now(), 0 FROM (VALUES (1, 1, 1), (2, 1, 2), (3, 2, 4)) AS p (id, sku, units)",
    )
    .await;
    let node = bed.join(1).await;
    lanes::claim_free(&bed.database, node).await.unwrap();
    let share = async |sku| {
        shares::share_of(&bed.database, node.node, SkuNumber(sku))
            .await
            .unwrap()
    };
    let of = |lent, held| Share {
        lent,
        held,
        sold: 0,
    };
    assert_eq!((share(1).await, share(2).await), (of(5, 2), of(1, 0)));
}

#[tokio::test]
async fn entering_all_that_wait_into_lists_may_take_longer_than_a_step() {
    let bed = Bed::open().await;
    bed.skus(&[10]).await;
    let node = bed.join(1).await;
    bed.sql(
        "INSERT INTO orders (order_id, user_id, sku, quantity, adjustment, amount, currency, status, created_at, expires_at, payload_hash)
         VALUES (65536, 'u', 1, 1, 0, 100, 'EUR', 7, now(), '9999-01-01', 0);
         CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(2.5); RETURN NEW; END $$;
         CREATE TRIGGER slowly BEFORE INSERT ON waitlist_entries FOR EACH ROW EXECUTE FUNCTION slowly()",
    )
    .await;
    let step = Duration::from_secs(2);
    let database = Database::with_config(bed.test.config(), SCHEMA, 1, step).unwrap();
    let waits = OrderId::from_i64(65_536).unwrap();
    lists::restore(&database, node, &[SKU], &[waits])
        .await
        .unwrap();
    assert_eq!(bed.number("SELECT count(*) FROM waitlist_entries").await, 1);
}

#[tokio::test]
async fn a_single_process_does_not_start_on_the_database_of_nodes_that_have_not_left() {
    let bed = Bed::open().await;
    let node = bed.join(1).await;
    let refused = take_over(&bed.database, 1).await.unwrap_err();
    assert!(
        refused.to_string().contains("have not left it: 0;"),
        "{refused}"
    );
    assert!(
        membership::leave(&bed.database, node, UnixMillis(0))
            .await
            .unwrap()
    );
    // The lock goes when the server has noticed that the refused process is gone.
    let deadline = Instant::now() + STEP;
    while let Err(error) = take_over(&bed.database, 1).await {
        assert!(matches!(error, StoreError::AlreadyActive(_)), "{error}");
        assert!(Instant::now() < deadline);
    }
}

#[tokio::test]
async fn the_log_of_a_single_node_that_is_gone_is_replayed_before_anybody_has_a_lane() {
    let mut bed = Bed::open().await;
    bed.skus(&[10]).await;
    bed.sql(SINGLE).await;
    let node = bed.join(1).await;
    assert_eq!(node.node, 1, "row 0 belongs to whoever has its log");
    assert_eq!(lanes::claim_free(&bed.database, node).await.unwrap(), []);
    let suspect = suspect(&bed, 0).await;
    let fenced = takeover::fence(&bed.database, &mut bed.session, node, suspect).await;
    let fenced = fenced.unwrap().unwrap();
    let log = fenced.dead[0].log.as_ref().unwrap();
    assert!(log.in_use && log.name.ends_with("0a"), "{log:?}");
    assert_eq!(lanes::claim_free(&bed.database, node).await.unwrap(), []);
    takeover::finish(&bed.database, node, fenced.dead[0].lease, LogEnd::default())
        .await
        .unwrap();
    let lanes = lanes::claim_free(&bed.database, node).await.unwrap();
    assert_eq!(lanes.len(), Lane::COUNT);
    assert!(lanes.iter().all(|row| row.ids_until >= UnixMillis(5_000)));
    let share = shares::share_of(&bed.database, 1, SKU).await.unwrap();
    assert_eq!((share.lent, share.held), (4, 4));
}

#[tokio::test]
async fn nobody_has_a_lane_while_a_node_replays_the_log_of_a_single_process() {
    let mut bed = Bed::open().await;
    bed.skus(&[10]).await;
    bed.sql(SINGLE).await;
    let (first, log) = (uuid(1), uuid(10));
    let with_log = membership::Candidate {
        log: Some(&log),
        ..candidate(0, &first)
    };
    let join = async |session: &mut Connected| match membership::join(session, &with_log).await {
        Ok(Join::Joined(joined)) => joined,
        other => panic!("{other:?}"),
    };
    let joined = join(&mut bed.session).await;
    assert_eq!((joined.lease.node, joined.log_ledger), (0, Ledger::Sku));
    let other = bed.join(2).await;
    assert_eq!(lanes::claim_free(&bed.database, other).await.unwrap(), []);
    // Its start failed in the middle of the log; the next one goes on with the same counters.
    let joined = join(&mut bed.session).await;
    assert_eq!((joined.lease.epoch, joined.log_ledger), (9, Ledger::Sku));
    assert_eq!(lanes::claim_free(&bed.database, other).await.unwrap(), []);
    let lanes = lanes::claim_free(&bed.database, joined.lease)
        .await
        .unwrap();
    assert_eq!(lanes.len(), Lane::COUNT);
    assert_eq!(join(&mut bed.session).await.log_ledger, Ledger::Share);
}

#[tokio::test]
async fn ids_go_on_above_those_of_a_single_process_whichever_node_gets_its_lanes() {
    let mut bed = Bed::open().await;
    bed.sql(SINGLE).await;
    bed.sql("UPDATE node SET journal_in_use = false").await;
    let joined = membership::join(&mut bed.session, &candidate(0, &uuid(1))).await;
    let Ok(Join::Joined(joined)) = joined else {
        panic!("{joined:?}");
    };
    assert_eq!(joined.lease.node, 0, "it starts, and another is faster");
    let other = bed.join(2).await;
    let lanes = lanes::claim_free(&bed.database, other).await.unwrap();
    assert_eq!(lanes.len(), Lane::COUNT);
    assert!(lanes.iter().all(|row| row.ids_until >= UnixMillis(5_000)));
}

#[tokio::test]
async fn a_pause_of_every_sale_is_in_force_at_nodes_that_did_not_exist_then() {
    let bed = Bed::open().await;
    let first = bed.join(1).await;
    skus::set_all_paused(&bed.database, first, true)
        .await
        .unwrap();
    let mut session = bed.database.connect("test").await.unwrap();
    let joined = membership::join(&mut session, &candidate(0, &uuid(2))).await;
    let Join::Joined(second) = joined.unwrap() else {
        panic!("it does not join");
    };
    assert!(second.paused, "from its start");
    let left = membership::leave(&bed.database, first, UnixMillis(0)).await;
    assert!(left.unwrap());
    assert!(terms::last(&bed.database).await.unwrap().is_paused);
    skus::set_all_paused(&bed.database, second.lease, false)
        .await
        .unwrap();
    bed.join(1).await;
    assert!(!terms::last(&bed.database).await.unwrap().is_paused);
}

#[tokio::test]
async fn a_pause_of_every_sale_is_in_the_row_that_is_made_while_it_is_stored() {
    let bed = Bed::open().await;
    let (first, second) = (bed.join(1).await, bed.join(2).await);
    let holding = bed.database.connect("test").await.unwrap();
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    let somebody_waits = async || bed.number(waiting).await == 1;
    let paused = "SELECT count(*) FROM node WHERE paused";
    // It waits for a row that it has seen while another one is made.
    let hold = format!(
        "BEGIN; SELECT FROM node WHERE node = {} FOR UPDATE",
        second.node
    );
    holding.batch_execute(&hold).await.unwrap();
    let database = bed.database.clone();
    let pausing = tokio::spawn(async move { skus::set_all_paused(&database, first, true).await });
    wait_until("the pause waits", somebody_waits).await;
    bed.join(3).await;
    holding.batch_execute("ROLLBACK").await.unwrap();
    pausing.await.unwrap().unwrap();
    assert_eq!(bed.number(paused).await, 3);
    // It is all but committed, and whoever makes a row has not seen it.
    bed.sql("UPDATE node SET paused = false").await;
    let pause =
        "BEGIN; UPDATE node SET paused = true; UPDATE database_identity SET terms = terms + 1";
    holding.batch_execute(pause).await.unwrap();
    let (joining, ()) = tokio::join!(bed.join(4), async {
        wait_until("the new node waits", somebody_waits).await;
        holding.batch_execute("COMMIT").await.unwrap();
    });
    assert_eq!((joining.node, bed.number(paused).await), (3, 4));
}

#[tokio::test]
async fn a_node_that_was_taken_over_stores_no_pause_and_discards_no_dead_letter() {
    let mut bed = Bed::open().await;
    bed.skus(&[1]).await;
    bed.sql(
        "INSERT INTO dead_letters (order_id, user_id, sku, quantity, adjustment, amount, currency, created_at, expires_at,
                                   payload_hash, sqlstate, reason)
         VALUES (1, 'u', 1, 1, 0, 1, 'EUR', now(), now(), 0, '23514', '')",
    )
    .await;
    let (survivor, dead) = (bed.join(1).await, bed.join(2).await);
    let gone = suspect(&bed, dead.node).await;
    let fenced = takeover::fence(&bed.database, &mut bed.session, survivor, gone).await;
    assert!(fenced.unwrap().is_some());
    let id = SkuId::new("S0").unwrap();
    let changed =
        "SELECT count(*) FROM sku, dead_letters WHERE paused AND discarded_at IS NOT NULL";
    for (lease, is_done) in [(dead, false), (survivor, true)] {
        let paused = skus::set_paused(&bed.database, lease, &id, true).await;
        let discarded = dead_letters::discard(&bed.database, lease, 1, None).await;
        for done in [&paused, &discarded] {
            let is_fenced = matches!(done, Err(StoreError::Fenced { .. }));
            assert_eq!(
                (is_fenced, matches!(done, Ok(true))),
                (!is_done, is_done),
                "{done:?}"
            );
        }
        assert_eq!(bed.number(changed).await, i64::from(is_done));
    }
}
