//! What a start reads back: SKUs, keys, limits.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use millrace::order::{
    Currency, Cutover, Ended, Lane, LaneSet, Order, OrderId, OrderStatus, SkuId, UnixMillis, UserId,
};
use millrace::state::buyers::{BuyerOrder, Buyers, Claimed, Eviction, LiveOrder, NothingSticky};
use millrace::state::stock::{DayTime, DayWindow, DrawTerms, SaleTerms, Sku, WaitlistTerms};
use millrace::store::StoreError;
use millrace::store::postgres::{skus, window};

use crate::support::sale::{Sale, count, order, orders, refs};

#[tokio::test]
async fn skus_come_back_with_their_terms_and_counters() {
    let sale = Sale::open(1).await;
    let all = SaleTerms {
        title: "Ein Gerät, 手机".into(),
        unit_price: i64::MAX,
        currency: Currency::new("CNY").unwrap(),
        per_user_limit: Some(u32::MAX),
        opens_at: Some(UnixMillis(1_700_000_000_001)),
        closes_at: Some(UnixMillis(253_402_300_799_999)),
        waitlist: WaitlistTerms {
            max: 7,
            skips: true,
            payment_ttl_ms: Some(1_000),
            assign_between: DayWindow::new(
                DayTime::parse("22:00+08:00").unwrap(),
                DayTime::parse("06:30-03:30").unwrap(),
            ),
        },
        draw: Some(DrawTerms {
            at: UnixMillis(1_700_000_000_002),
            beacon: Some("drand, round 7".into()),
        }),
    };
    let none = SaleTerms {
        title: String::new(),
        unit_price: 0,
        per_user_limit: None,
        opens_at: None,
        closes_at: None,
        waitlist: WaitlistTerms::default(),
        draw: None,
        ..all.clone()
    };
    for (name, terms, total) in [("!~", &all, u32::MAX), ("none", &none, 0)] {
        let id = SkuId::new(name).unwrap();
        let put = skus::put(&sale.database, sale.lease(), &id, terms, total)
            .await
            .unwrap();
        assert_eq!((**put.terms()).clone(), *terms);
    }
    let mut writer = sale.writer(0);
    let first = skus::load_all(&sale.database, sale.lease())
        .await
        .unwrap()
        .remove(0);
    writer.write(&refs(&orders(&first, 7))).await.unwrap();
    sale.sql("UPDATE sku SET held = held - 3, sold = 3 WHERE sku_id = '!~'")
        .await;
    let id = SkuId::new("none").unwrap();
    assert!(
        skus::set_paused(&sale.database, sale.lease(), &id, true)
            .await
            .unwrap()
    );
    let nobody = SkuId::new("nobody").unwrap();
    assert!(
        !skus::set_paused(&sale.database, sale.lease(), &nobody, true)
            .await
            .unwrap()
    );

    let loaded = skus::load_all(&sale.database, sale.lease()).await.unwrap();
    let figures: Vec<_> = loaded
        .iter()
        .map(|sku| {
            let stock = sku.counter().snapshot();
            (sku.id.as_str(), stock.total, stock.held, stock.sold)
        })
        .collect();
    assert_eq!(figures, [("!~", u32::MAX, 4, 3), ("none", 0, 0, 0)]);
    assert_eq!(**loaded[0].terms(), all);
    assert_eq!(**loaded[1].terms(), none);
    assert!(loaded[0].window(UnixMillis(1_800_000_000_000)).is_ok());
    assert!(loaded[1].window(UnixMillis::now()).is_err(), "it is paused");
}

#[tokio::test]
async fn a_sku_row_that_contradicts_itself_is_named() {
    let sale = Sale::open(1).await;
    sale.sku("A", 5).await;
    sale.sql("ALTER TABLE sku DROP CONSTRAINT sku_not_oversold; UPDATE sku SET held = 6")
        .await;
    let refused = skus::load_all(&sale.database, sale.lease()).await;
    assert!(
        matches!(&refused, Err(StoreError::Data(what)) if what.contains("sku A")),
        "{refused:?}"
    );
}

async fn load(sale: &Sale, floor: OrderId) -> HashMap<OrderId, (UserId, BuyerOrder)> {
    let mut loaded = HashMap::new();
    let read = window::load(
        &sale.database,
        floor,
        LaneSet::ALL,
        |user, order, _| {
            assert!(loaded.insert(order.order_id, (user, order)).is_none());
        },
        |_| {},
    )
    .await
    .unwrap();
    assert_eq!(read, loaded.len() as u64);
    loaded
}

fn remembered(order: &Order, status: OrderStatus) -> (UserId, BuyerOrder) {
    let remembered = BuyerOrder {
        ended: Ended::of(status),
        ..BuyerOrder::of(order)
    };
    (order.user_id.clone(), remembered)
}

#[tokio::test]
async fn keys_and_limits_come_back_exactly_from_the_floor_on() {
    let sale = Sale::open(1).await;
    let sku: Sku = sale.sku("A", 100).await;
    let mut writer = sale.writer(0);
    let old = orders(&sku, 2);
    let mut stored: Vec<(Order, OrderStatus)> = OrderStatus::ALL
        .into_iter()
        .filter(|status| status.code().is_some())
        .map(|status| (order(&sku, 2), status))
        .collect();
    stored[0].0.key = None;
    let batch: Vec<Order> = old
        .iter()
        .cloned()
        .chain(stored.iter().map(|(order, _)| order.clone()))
        .collect();
    writer.write(&refs(&batch)).await.unwrap();
    for (order, status) in &stored {
        let code = status.code().unwrap();
        sale.sql(&format!(
            "UPDATE orders SET status = {code} WHERE order_id = {}",
            order.id
        ))
        .await;
    }
    let dead = order(&sku, 3);
    writer.write_dead_letter(&dead, "23514", "x").await.unwrap();

    let mut expected: HashMap<_, _> = stored
        .iter()
        .map(|(order, status)| (order.id, remembered(order, *status)))
        .collect();
    expected.insert(dead.id, remembered(&dead, OrderStatus::Failed));
    let floor = stored[0].0.id;
    assert_eq!(load(&sale, floor).await, expected);
    let just_above = OrderId::new(dead.id.get() + 1).unwrap();
    assert!(load(&sale, just_above).await.is_empty());
    for order in &old {
        expected.insert(order.id, remembered(order, OrderStatus::PendingPayment));
    }
    let everything = load(&sale, OrderId::new(1).unwrap()).await;
    assert_eq!(everything, expected);

    // What a retry under an old key then gets.
    let buyers = Buyers::new(100, 100);
    for (user, order) in everything.into_values() {
        buyers.restore(user, order, false);
    }
    let again = |order: &Order| {
        let fresh = BuyerOrder {
            order_id: OrderId::new(i64::MAX as u64).unwrap(),
            ..remembered(order, OrderStatus::PendingPayment).1
        };
        match buyers.claim(&order.user_id, fresh, None, Ok(()), &NothingSticky) {
            Ok(Claimed::Duplicate(id)) => Some(id),
            _ => None,
        }
    };
    assert_eq!(again(&dead), Some(dead.id), "a dead letter keeps its key");
    assert_eq!(again(&stored[1].0), Some(stored[1].0.id));
    assert_eq!(again(&stored[0].0), None, "it came without a key");
}

/// So many rows of a SKU, each of a buyer and under a key of its own, one a millisecond from
/// `number << 22` on.
async fn fill(sale: &Sale, sku: &Sku, rows: u64) {
    let number = sku.number.0;
    sale.sql(&format!(
        "INSERT INTO orders (order_id, user_id, sku, quantity, adjustment, amount, currency, status, created_at, expires_at,
                             key_hash, payload_hash)
         SELECT (n << 22) | ((n & 63) << 16), 'buyer-' || n, {number}, 1, 0, 100, 'EUR', CASE n % 4 WHEN 0 THEN 3 ELSE 2 END, now(), now(),
                md5(n::text)::uuid, n
           FROM generate_series(1, {rows}::bigint) n"
    ))
    .await;
}

/// `MILLRACE_WINDOW=10000000 cargo test --release --test store a_long_window -- --nocapture` says what
/// the window of a day of 115 orders a second takes.
#[tokio::test]
async fn a_long_window_is_read_in_parts_with_progress() {
    let rows = count("MILLRACE_WINDOW", 30_000);
    let sale = Sale::open(1).await;
    let sku = sale.sku_with("A", 100, Some(9)).await;
    fill(&sale, &sku, rows).await;
    let (buyers, started) = (Buyers::new(usize::MAX, 65_536), Instant::now());
    let before = resident_bytes();
    let mut parts = Vec::new();
    let read = window::load(
        &sale.database,
        OrderId::MIN,
        LaneSet::ALL,
        |user, order, _| buyers.restore(user, order, true),
        |progress| {
            println!("{progress}");
            parts.push(progress.rows);
        },
    )
    .await
    .unwrap();
    let (took, grown) = (started.elapsed(), resident_bytes().saturating_sub(before));
    assert_eq!((read, buyers.len() as u64), (rows, rows));
    assert!(parts.is_sorted() && parts.len() as u64 <= took.as_secs());
    println!(
        "{rows} orders in {:.1} s ({:.0} a second), {:.2} GB: {} bytes an order",
        took.as_secs_f64(),
        rows as f64 / took.as_secs_f64(),
        grown as f64 / 1e9,
        grown / rows
    );
    let started = Instant::now();
    let slowest = beside(&buyers, rows, || {
        assert_eq!(buyers.evict(Eviction::before(OrderId::MIN), |_| true), 0);
    });
    println!(
        "a walk in which nothing goes: {} ms; the slowest look-up of a buyer beside it: {slowest:?}",
        started.elapsed().as_millis()
    );
    let started = Instant::now();
    let mut gone = 0;
    let slowest = beside(&buyers, rows, || {
        gone = buyers.evict(Eviction::before(OrderId::MAX), |_| true) as u64;
    });
    println!(
        "one in which all leave the window: {} ms; the slowest look-up: {slowest:?}",
        started.elapsed().as_millis()
    );
    assert_eq!(gone, rows / 4, "what is cancelled");
    drop(buyers);

    // The same rows where they are older than the window.
    sale.sql("UPDATE sku SET created_at = NULL").await;
    let (buyers, started, before) = (
        Buyers::new(usize::MAX, 65_536),
        Instant::now(),
        resident_bytes(),
    );
    window::load_live_orders(
        &sale.database,
        &[sku.number],
        OrderId::MAX,
        LaneSet::ALL,
        |user, order| buyers.restore_live(user, order),
        |progress| println!("{progress}"),
    )
    .await
    .unwrap();
    let grown = resident_bytes().saturating_sub(before);
    assert_eq!(buyers.len() as u64, rows - rows / 4);
    println!(
        "{} older orders that a limit counts in {:.1} s: {} bytes each",
        buyers.len(),
        started.elapsed().as_secs_f64(),
        grown / buyers.len() as u64
    );
}

/// `MILLRACE_WINDOW=1000000 cargo test --test store orders_of_its_lanes -- --nocapture` says what that takes.
#[tokio::test]
async fn a_node_reads_the_orders_of_its_lanes_alone() {
    let rows = count("MILLRACE_WINDOW", 30_000);
    let sale = Sale::open(1).await;
    let sku = sale.sku_with("A", 100, Some(9)).await;
    fill(&sale, &sku, rows).await;
    // Half of the ids are from before lanes. Some rows were refused, and some orders are parked.
    let columns = "order_id, user_id, sku, quantity, adjustment, amount, currency, created_at, expires_at, key_hash, payload_hash";
    sale.sql(&format!(
        "UPDATE sku SET created_at = NULL;
         UPDATE database_identity SET lanes_from = ({rows}::int8 / 2) << 22;
         WITH gone AS (DELETE FROM orders WHERE order_id >> 22 <= 100 RETURNING *)
         INSERT INTO dead_letters ({columns}, sqlstate, reason) SELECT {columns}, '23514', '' FROM gone;
         WITH gone AS (DELETE FROM orders WHERE order_id >> 22 > {rows} - 100 RETURNING *)
         INSERT INTO parked_orders ({columns}) SELECT {columns} FROM gone"
    ))
    .await;
    sale.sql("VACUUM ANALYZE orders").await;
    let cutover = Cutover(OrderId::new((rows / 2) << 22).unwrap());
    let some: LaneSet = Lane::all().step_by(9).collect();
    let is_of_some = |id: OrderId, user: &UserId| {
        some.has(cutover.lane_of(id).unwrap_or_else(|| Lane::of(user)))
    };
    for lanes in [LaneSet::ALL, some] {
        let (mut read, started) = (HashSet::new(), Instant::now());
        let remember = |user: UserId, order: BuyerOrder, _| {
            assert!(lanes == LaneSet::ALL || is_of_some(order.order_id, &user));
            assert!(read.insert(order.order_id));
        };
        let floor = OrderId::MIN;
        let count = window::load(&sale.database, floor, lanes, remember, |_| {}).await;
        println!(
            "{} lanes: {} ms",
            lanes.len(),
            started.elapsed().as_millis()
        );
        assert_eq!(count.unwrap(), read.len() as u64);
        if lanes == LaneSet::ALL {
            assert_eq!(read.len() as u64, rows);
        }
        let of_some = (1..=rows).filter(|number| {
            let id = OrderId::new(number << 22 | (number & 63) << 16).unwrap();
            let user = UserId::new(&format!("buyer-{number}")).unwrap();
            assert!(lanes != LaneSet::ALL || read.contains(&id));
            is_of_some(id, &user)
        });
        let of_some = of_some.count();
        assert!(
            lanes == LaneSet::ALL || read.len() == of_some,
            "{} of {of_some}",
            read.len()
        );

        // What a limit counts: live ones, the parked ones among them.
        let mut live = HashSet::new();
        let skus = [sku.number];
        let count = |user: UserId, order: LiveOrder| {
            assert!(lanes == LaneSet::ALL || is_of_some(order.order_id, &user));
            assert!(live.insert(order.order_id));
        };
        let counted =
            window::load_live_orders(&sale.database, &skus, OrderId::MAX, lanes, count, |_| {});
        counted.await.unwrap();
        let is_live = |id: &OrderId| {
            let number = id.get() >> 22;
            number > rows - 100 || number > 100 && !number.is_multiple_of(4)
        };
        let of_read: HashSet<OrderId> = read.into_iter().filter(is_live).collect();
        let differ = live.symmetric_difference(&of_read).next();
        assert_eq!((live.len(), differ), (of_read.len(), None));
    }
    sale.sql("UPDATE database_identity SET lanes_from = 1")
        .await;
    let started = Instant::now();
    let count = window::load(&sale.database, OrderId::MIN, some, |_, _, _| {}, |_| {}).await;
    println!(
        "{} lanes, every id names its own: {} ms",
        some.len(),
        started.elapsed().as_millis()
    );
    let of_some = (1..=rows).filter(|number| some.has(Lane::new((number & 63) as u8).unwrap()));
    assert_eq!(count.unwrap(), of_some.count() as u64);
}

/// Looks buyers up for as long as `walk` lasts. The slowest look-up: about the longest time for which
/// the walk keeps a lock, where the machine has a core for both.
fn beside(buyers: &Buyers, count: u64, walk: impl FnOnce()) -> Duration {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let looking = scope.spawn(|| {
            let (mut slowest, mut of) = (Duration::ZERO, 1);
            while !over.load(Ordering::Relaxed) {
                of = (of + 7_919) % count + 1;
                let user = UserId::new(&format!("buyer-{of}")).unwrap();
                let started = Instant::now();
                buyers.find(&user, OrderId::MAX);
                slowest = slowest.max(started.elapsed());
            }
            slowest
        });
        walk();
        over.store(true, Ordering::Relaxed);
        looking.join().unwrap()
    })
}

fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1_024
}

#[tokio::test]
async fn a_slow_database_is_read_in_smaller_parts_until_all_is_read() {
    const ROWS: u64 = 3_000;
    let sale = Sale::open(1).await;
    let sku = sale.sku_with("A", 100, Some(9)).await;
    fill(&sale, &sku, ROWS).await;
    // Each row takes half a millisecond, so that all of them take longer than a step may.
    sale.sql(
        "UPDATE sku SET created_at = NULL;
         ALTER TABLE orders RENAME TO real_orders;
         CREATE VIEW orders AS SELECT * FROM real_orders WHERE pg_sleep(0.0005) IS NOT NULL;",
    )
    .await;
    let impatient = sale.with_step(Duration::from_secs(1));
    let (mut read, mut told) = (HashSet::new(), Vec::new());
    let count = window::load(
        &impatient,
        OrderId::MIN,
        LaneSet::ALL,
        |_, order, _| assert!(read.insert(order.order_id), "twice"),
        |progress| told.push(progress),
    )
    .await
    .unwrap();
    assert_eq!((count, read.len() as u64), (ROWS, ROWS));
    // There are no statistics to estimate from, and the ids are evenly spread.
    assert!(!told.is_empty());
    for progress in told {
        let of_about = progress.of_about;
        assert!((ROWS / 2..=ROWS * 2).contains(&of_about), "{progress}");
    }
    let mut live = 0;
    window::load_live_orders(
        &impatient,
        &[sku.number],
        OrderId::MAX,
        LaneSet::ALL,
        |_, _| live += 1,
        |_| {},
    )
    .await
    .unwrap();
    assert_eq!(live, ROWS - ROWS / 4);
}

#[tokio::test]
async fn live_orders_of_a_sku_are_read_below_an_id_and_from_its_making_on() {
    let sale = Sale::open(1).await;
    let (a, b) = (sale.sku("A", 100).await, sale.sku("B", 100).await);
    let mut writer = sale.writer(0);
    let of_both: Vec<Order> = (0..8).flat_map(|_| [order(&a, 2), order(&b, 1)]).collect();
    writer.write(&refs(&of_both)).await.unwrap();
    for (at, status) in OrderStatus::ALL.into_iter().enumerate() {
        if let Some(code) = status.code() {
            let id = of_both[at].id;
            sale.sql(&format!(
                "UPDATE orders SET status = {code} WHERE order_id = {id}"
            ))
            .await;
        }
    }
    let read = async |below| {
        let mut read = Vec::new();
        window::load_live_orders(
            &sale.database,
            &[a.number],
            below,
            LaneSet::ALL,
            |user, order| read.push((user, order)),
            |_| {},
        )
        .await
        .unwrap();
        read
    };
    assert_eq!(
        read(OrderId::MAX).await,
        [],
        "the SKU is newer than any of them"
    );
    sale.sql("UPDATE sku SET created_at = NULL").await;
    let below = of_both[14].id;
    let mut expected: Vec<_> = of_both[..14]
        .iter()
        .enumerate()
        .filter(|(at, order)| {
            order.sku == a.number
                && OrderStatus::ALL
                    .get(*at)
                    .is_none_or(|status| status.code().is_none() || status.is_live())
        })
        .map(|(_, order)| (order.user_id.clone(), LiveOrder::of(&BuyerOrder::of(order))))
        .collect();
    expected.sort_by_key(|(_, order)| order.order_id);
    let mut found = read(below).await;
    found.sort_by_key(|(_, order)| order.order_id);
    assert_eq!(found, expected);
}
