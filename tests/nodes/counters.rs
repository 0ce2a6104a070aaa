//! The counters of the whole sale, which one node adds up for all, and what that costs PostgreSQL.

use std::time::{Duration, Instant};

use millrace::order::SkuNumber;
use millrace::store::cluster::shares;
use millrace::store::cluster::stock::{self, Sale, Sales};
use millrace::store::postgres::{Database, preflight};

use crate::support::sale::{SCHEMA, STEP};
use crate::twin::Bed;

const DAY: Duration = Duration::from_secs(86_400);

async fn read(bed: &Bed, known: Option<i64>, age_max: Duration) -> Option<Sales> {
    stock::sales(&bed.database, known, age_max).await.unwrap()
}

/// Read anew.
async fn anew(bed: &Bed) -> Sales {
    read(bed, None, Duration::ZERO).await.unwrap()
}

#[tokio::test]
async fn one_node_adds_the_shares_up_for_all() {
    let bed = Bed::open().await;
    bed.skus(&[100, 50]).await;
    let [one, two] = [bed.join(1).await, bed.join(2).await];
    shares::lend(&bed.database, one, SkuNumber(1), 30, 1)
        .await
        .unwrap();
    shares::lend(&bed.database, two, SkuNumber(1), 20, 1)
        .await
        .unwrap();
    bed.settle(one, 1, 7, 2).await.unwrap();
    bed.settle(two, 1, 5, 0).await.unwrap();
    let asked_at = Instant::now();
    let first = read(&bed, None, DAY).await.unwrap();
    assert!(first.read_at >= asked_at);
    assert_eq!(first.nodes, 2);
    let sale = Sale {
        sku: SkuNumber(1),
        total: 100,
        held: 12,
        sold: 2,
        pool: 50,
        is_recalled: false,
    };
    let other = Sale {
        sku: SkuNumber(2),
        total: 50,
        held: 0,
        sold: 0,
        pool: 50,
        is_recalled: false,
    };
    assert_eq!(first.sales, Some(vec![sale, other]));

    // Another node takes what is there, as old as it is, and whoever has it does not fetch it again.
    bed.settle(two, 1, 1, 0).await.unwrap();
    let taken = read(&bed, None, DAY).await.unwrap();
    assert_eq!((taken.version, &taken.sales), (first.version, &first.sales));
    assert!(taken.read_at <= Instant::now());
    assert_eq!(
        read(&bed, Some(first.version), DAY).await.unwrap().sales,
        None
    );

    // What is too old is added up again.
    let later = anew(&bed).await;
    assert_ne!(later.version, first.version);
    assert_eq!(later.sales.unwrap()[0].held, 13);
    let same = read(&bed, Some(later.version), Duration::ZERO)
        .await
        .unwrap();
    assert_eq!((same.version, same.sales), (later.version, None));

    bed.sql("UPDATE sku SET recall = 20 WHERE id = 1").await;
    assert!(anew(&bed).await.sales.unwrap()[0].is_recalled);
}

#[tokio::test]
async fn counters_that_are_lost_or_from_another_time_are_read_anew() {
    let bed = Bed::open().await;
    bed.skus(&[100]).await;
    let one = bed.join(1).await;
    shares::lend(&bed.database, one, SkuNumber(1), 30, 1)
        .await
        .unwrap();
    let before = anew(&bed).await;
    bed.settle(one, 1, 7, 0).await.unwrap();
    // The clock of the database was set back.
    bed.sql("UPDATE sale_counters SET read_at = read_at + interval '1 hour'")
        .await;
    let now = read(&bed, Some(before.version), DAY).await.unwrap();
    assert_eq!(now.sales.unwrap()[0].held, 7);
    // It has crashed: what is unlogged is empty.
    bed.sql("TRUNCATE sale_counters").await;
    let now = read(&bed, Some(now.version), DAY).await.unwrap();
    assert_eq!(now.sales.unwrap()[0].held, 7);
}

#[tokio::test]
async fn nobody_waits_for_a_node_that_adds_up() {
    let bed = Bed::open().await;
    bed.skus(&[100]).await;
    anew(&bed).await;
    bed.sql("BEGIN; SELECT FROM sale_counters FOR UPDATE").await;
    assert_eq!(read(&bed, None, Duration::ZERO).await, None);
    assert!(read(&bed, None, DAY).await.is_some());
    bed.sql("ROLLBACK").await;
    assert!(read(&bed, None, Duration::ZERO).await.is_some());
}

/// A node's reading by itself alone, as it was before.
const EACH_ADDS_UP: &str = "
    SELECT s.id, s.total, s.held + coalesce(h.held, 0), s.sold + coalesce(h.sold, 0),
           s.total - s.held - s.sold - s.lent, s.recall IS NOT NULL,
           (SELECT count(*) FROM node WHERE state = 'active')
      FROM sku s
      LEFT JOIN (SELECT sku, sum(held)::int8 AS held, sum(sold)::int8 AS sold FROM stock_share GROUP BY sku) h
        ON h.sku = s.id";

/// Processor time of the backends of this database so far, in seconds.
async fn processor_seconds(bed: &Bed) -> f64 {
    let sql = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()";
    let pids = bed.session.query(sql, &[]).await.unwrap();
    let ticks = pids.iter().map(|row| {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", row.get::<_, i32>(0)));
        let stat = stat.unwrap_or_default();
        let fields = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace();
        let times = fields.skip(11).take(2);
        times
            .filter_map(|time| time.parse::<f64>().ok())
            .sum::<f64>()
    });
    ticks.sum::<f64>() / 100.0
}

/// `nodes` that read ten times a second, each at its own moment, while shares change; cores of PostgreSQL.
async fn cores(bed: &Bed, database: &Database, nodes: u32, is_shared: bool) -> f64 {
    let (began, before) = (Instant::now(), processor_seconds(bed).await);
    let period = Duration::from_millis(100);
    let readers = (0..nodes).map(|node| {
        let database = database.clone();
        tokio::spawn(async move {
            tokio::time::sleep(period / nodes * node).await;
            let mut tick = tokio::time::interval(period);
            tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
            let (mut known, mut reads) = (None, 0_u32);
            while began.elapsed() < Duration::from_secs(5) {
                tick.tick().await;
                reads += 1;
                if is_shared {
                    let read = stock::sales(&database, known, Duration::from_millis(75)).await;
                    known = read.unwrap().map_or(known, |read| Some(read.version));
                } else {
                    let client = database.pooled().await.unwrap();
                    let statement = client.prepare_cached(EACH_ADDS_UP).await.unwrap();
                    client.query(&statement, &[]).await.unwrap();
                }
            }
            reads
        })
    });
    let mut reads = 0;
    for reader in readers.collect::<Vec<_>>() {
        reads += reader.await.unwrap();
    }
    let spent = processor_seconds(bed).await - before;
    let expected = f64::from(nodes) * 50.0;
    // Where the machine is too small for the reads that are due, the price of one times those is it.
    spent / f64::from(reads) * expected / 5.0
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement: cargo test --test nodes -- --ignored --nocapture the_price_of_the_counters"]
async fn the_price_of_the_counters() {
    for (nodes, skus) in [
        (3, 100),
        (16, 100),
        (64, 100),
        (3, 1_000),
        (16, 1_000),
        (64, 1_000),
    ] {
        let bed = Bed::open().await;
        bed.skus(&vec![1_000_000; skus]).await;
        bed.sql(&format!(
            "INSERT INTO node (node, epoch, ids_leased_until_ms, started_at, state)
             SELECT n, 1, 0, now(), 'active' FROM generate_series(0, {nodes} - 1) n;
             INSERT INTO stock_share (sku, node, lent, held) SELECT s.id, n.node, 1000, 100 FROM sku s, node n"
        ))
        .await;
        for table in ["stock_share", "sku"] {
            bed.sql(&format!("VACUUM ANALYZE {table}")).await;
        }
        let database = Database::with_config(bed.test.config(), SCHEMA, 8, STEP).unwrap();
        let changing = tokio::spawn({
            let database = database.clone();
            async move {
                let mut tick = tokio::time::interval(Duration::from_millis(10));
                for sku in (1..=i32::try_from(skus).unwrap()).cycle() {
                    tick.tick().await;
                    let client = database.pooled().await.unwrap();
                    let sql = "UPDATE stock_share SET held = held + 1 WHERE sku = $1 AND node = 1";
                    client.execute(sql, &[&sku]).await.unwrap();
                }
            }
        });
        let each = cores(&bed, &database, nodes, false).await;
        let shared = cores(&bed, &database, nodes, true).await;
        changing.abort();
        println!(
            "{nodes} nodes, {skus} SKUs: each by itself {each:.3} cores, one for all {shared:.3}"
        );
    }
}

#[tokio::test]
async fn a_preflight_leaves_out_what_shares_have_sold() {
    let bed = Bed::open().await;
    bed.skus(&[100, 50]).await;
    let [one, two] = [bed.join(1).await, bed.join(2).await];
    for lease in [one, two] {
        shares::lend(&bed.database, lease, SkuNumber(1), 30, 1)
            .await
            .unwrap();
        bed.settle(lease, 1, 7, 2).await.unwrap();
    }
    let facts = preflight::read(&bed.database, &bed.session).await.unwrap();
    assert_eq!(facts.units_free, 132);
}
