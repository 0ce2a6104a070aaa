//! The steps that every order takes, one by one and end to end, without HTTP and PostgreSQL.
//!
//! `cargo bench --bench hot_path` runs them all in about two minutes; a figure is for one order
//! unless its name says otherwise. It is a machine's own figure: compare within one run.

#![allow(
    missing_docs,
    reason = "the macros of criterion make undocumented functions"
)]

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use millrace::http::data_plane::router::BODY_RULES;
use millrace::http::message::Response;
use millrace::http::problem::Problem;
use millrace::http::server::hardened::framing;
use millrace::http::server::limits::BodyLimits;
use millrace::http::wire::{OrderBody, OrderView};
use millrace::order::receipt::{Issuer, ReceiptKeys, SignedParts};
use millrace::order::{
    Currency, IdClock, IdempotencyKey, KeyHash, Lane, Order, OrderId, OrderStatus, PayloadHash,
    Quantity, Refusal, SkuId, SkuNumber, UnixMillis, UserId,
};
use millrace::pipeline::orders::intake::{Admission, Intake, OrderRequest};
use millrace::queue::log::file::sector::{self, Seal};
use millrace::queue::log::record::GroupBytes;
use millrace::queue::{OrderQueue, RingQueue};
use millrace::state::State;
use millrace::state::buyers::{BuyerOrder, Buyers, Claimed, NothingSticky};
use millrace::state::pending::{Pending, PendingOrder, Settled, Slot};
use millrace::state::recent_orders::RecentOrders;
use millrace::state::sticky_refusals::StickyRefusals;
use millrace::state::stock::{Catalogue, SaleTerms, Sku, StockCounter, WaitlistTerms};
use millrace::store::copy;

/// As the program itself.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const BATCH_ROWS: usize = 5_000;

const ISSUER: Issuer = Issuer {
    database: [7; 16],
    version_1_until: UnixMillis(0),
};

fn clock() -> IdClock {
    IdClock::new(UnixMillis(0), UnixMillis(i64::MAX))
}

fn order(id: u64) -> Order {
    Order {
        id: OrderId::new(id).unwrap(),
        user_id: UserId::new(&format!("user-{id:08}")).unwrap(),
        sku_id: SkuId::new("IPHONE-15").unwrap().into(),
        sku: SkuNumber(1),
        quantity: Quantity::ONE,
        adjustment: 0,
        amount: 199_900,
        currency: Currency::new("CNY").unwrap(),
        created_at: UnixMillis(1_800_000_000_000),
        expires_at: UnixMillis(1_800_000_900_000),
        key: Some(KeyHash([7; 16])),
        payload: PayloadHash(42),
        attributes: Some(Box::from(r#"{"address_id":"a-7"}"#)),
    }
}

fn pending(id: u64) -> Arc<PendingOrder> {
    let deadline = Instant::now() + Duration::from_secs(7);
    Arc::new(PendingOrder::new(order(id), deadline, None))
}

fn state(total: u32) -> Arc<State> {
    let terms = SaleTerms {
        title: "A phone".into(),
        unit_price: 199_900,
        currency: Currency::new("CNY").unwrap(),
        per_user_limit: Some(1),
        opens_at: None,
        closes_at: None,
        waitlist: WaitlistTerms::default(),
        draw: None,
    };
    let catalogue = Catalogue::default();
    catalogue.add([Sku::new(
        SkuId::new("IPHONE-15").unwrap(),
        SkuNumber(1),
        terms,
        StockCounter::new(total, 0, 0),
        false,
    )]);
    Arc::new(State {
        lanes: None,
        sticky_refusals: millrace::state::sticky_refusals::StickyRefusals::with_capacity(1_000),
        recent_orders: millrace::state::recent_orders::RecentOrders::with_capacity(1_000),
        expiry_index: millrace::state::expiry_index::ExpiryIndex::default(),
        orphans: millrace::state::orphans::Orphans::default(),
        catalogue,
        buyers: Buyers::new(1 << 30, 1 << 20),
        pending: Arc::new(Pending::with_capacity(1 << 17)),
        row_changes: Default::default(),
        poison: Default::default(),
        throughput: Default::default(),
        progress: Default::default(),
        ids: clock(),
    })
}

fn key() -> IdempotencyKey<'static> {
    IdempotencyKey::new("8e03978e-40d5-43e8-bc93-6894a57f9324").unwrap()
}

fn request(number: u64) -> OrderRequest<'static> {
    OrderRequest {
        user_id: UserId::new(itoa::Buffer::new().format(number)).unwrap(),
        sku_id: SkuId::new("IPHONE-15").unwrap(),
        quantity: Quantity::ONE,
        adjustment: 0,
        attributes: None,
        key: Some(KeyHash::of(key())),
        wait: Duration::from_secs(7),
        respond_async: false,
        waitlist: false,
        trace: None,
    }
}

fn queue(c: &mut Criterion) {
    let ring = RingQueue::new(65_536);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let one = pending(1);
    c.bench_function("queue/push_and_take_one", |b| {
        b.iter(|| {
            ring.push(Arc::clone(&one)).unwrap();
            runtime.block_on(ring.take(1)).unwrap().ack();
        });
    });
    let mut group = c.benchmark_group("queue");
    group.throughput(Throughput::Elements(BATCH_ROWS as u64));
    group.bench_function("push_and_take_5000", |b| {
        b.iter(|| {
            for _ in 0..BATCH_ROWS {
                ring.push(Arc::clone(&one)).unwrap();
            }
            runtime.block_on(ring.take(BATCH_ROWS)).unwrap().ack();
        });
    });
}

fn stock(c: &mut Criterion) {
    let counter = StockCounter::new(1_000_000, 0, 0);
    let cycle = || {
        counter.hold(1).unwrap();
        counter.release(1);
    };
    c.bench_function("stock/hold_and_release", |b| b.iter(cycle));
    c.bench_function("stock/hold_and_release_beside_another_thread", |b| {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    cycle();
                }
            });
            b.iter(cycle);
            stop.store(true, Ordering::Relaxed);
        });
    });
    c.bench_function("stock/snapshot", |b| b.iter(|| counter.snapshot()));
}

fn ids(c: &mut Criterion) {
    let clock = clock();
    let user = UserId::new("u-1234567").unwrap();
    c.bench_function("order_id/lane_of_buyer", |b| {
        b.iter(|| Lane::of(black_box(&user)));
    });
    let lane = Lane::of(&user);
    c.bench_function("order_id/next", |b| b.iter(|| clock.next(lane).unwrap()));
    let key = key();
    c.bench_function("order/key_hash", |b| b.iter(|| KeyHash::of(black_box(key))));
    let sku = SkuId::new("IPHONE-15").unwrap();
    c.bench_function("order/payload_hash", |b| {
        b.iter(|| PayloadHash::of(black_box(&sku), Quantity::ONE, 0, None, false));
    });
}

fn buyers(c: &mut Criterion) {
    let clock = clock();
    let entry = || BuyerOrder {
        order_id: clock.next(Lane::FIRST).unwrap(),
        key: Some(KeyHash([7; 16])),
        payload: PayloadHash(42),
        sku: SkuNumber(1),
        quantity: Quantity::ONE,
        ended: None,
    };
    let buyers = Buyers::new(1 << 30, 1 << 20);
    let known = UserId::new("known").unwrap();
    match buyers
        .claim(&known, entry(), Some(1), Ok(()), &NothingSticky)
        .unwrap()
    {
        Claimed::Fresh(claim) => claim.commit(),
        Claimed::Duplicate(_) => unreachable!("nobody was there"),
    }
    c.bench_function("buyers/claim_duplicate", |b| {
        b.iter(|| {
            buyers
                .claim(black_box(&known), entry(), Some(1), Ok(()), &NothingSticky)
                .is_ok()
        });
    });
    c.bench_function("buyers/claim_fresh_and_forget", |b| {
        let fresh = UserId::new("fresh").unwrap();
        b.iter(|| {
            drop(
                buyers
                    .claim(black_box(&fresh), entry(), Some(1), Ok(()), &NothingSticky)
                    .unwrap(),
            )
        });
    });
}

fn slot(c: &mut Criterion) {
    c.bench_function("slot/claim_and_settle", |b| {
        b.iter_batched_ref(
            || Slot::new(None),
            |slot| {
                assert!(slot.claim());
                slot.settle(Settled::Persisted);
            },
            BatchSize::SmallInput,
        );
    });
}

fn memory(c: &mut Criterion) {
    let pending_orders = Pending::with_capacity(1 << 17);
    let one = pending(7);
    c.bench_function("pending/insert_and_remove", |b| {
        b.iter(|| {
            pending_orders.insert(black_box(&one));
            pending_orders.remove(one.order.id);
        });
    });
    let recent = RecentOrders::with_capacity(65_536);
    let orders: Vec<_> = (1..=200_000).map(pending).collect();
    let mut turn = orders.iter().cycle();
    c.bench_function("recent/note_when_full", |b| {
        b.iter(|| recent.note(turn.next().unwrap()));
    });
    let refusals = StickyRefusals::with_capacity(100_000);
    let sold_out = Refusal::SoldOut { available: 0 };
    let mut number = 0_u64;
    c.bench_function("refusals/check_and_remember_when_full", |b| {
        b.iter(|| {
            number += 1;
            let user = UserId::new(itoa::Buffer::new().format(number)).unwrap();
            let key = KeyHash([7; 16]);
            assert!(refusals.check(&user, key, PayloadHash(1)).is_ok());
            refusals.remember(&user, key, PayloadHash(1), sold_out);
        });
    });
}

fn intake(c: &mut Criterion) {
    // Another thread plays the worker without a database: it takes, claims and settles.
    let state = state(u32::MAX);
    let ring: Arc<dyn OrderQueue> = Arc::new(RingQueue::new(65_536));
    let intake = Intake::new(Arc::clone(&state), Arc::clone(&ring), 900_000);
    intake.open();
    let consumer = {
        let (state, ring) = (Arc::clone(&state), Arc::clone(&ring));
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .build()
                .unwrap();
            while let Some(taken) = runtime.block_on(ring.take(BATCH_ROWS)) {
                for order in taken.orders() {
                    assert!(order.slot.claim());
                    state.unwritten(order);
                }
                taken.ack();
            }
        })
    };
    let mut number = 0;
    c.bench_function("intake/admit_beside_a_draining_consumer", |b| {
        b.iter(|| {
            number += 1;
            // A full queue gives the order back; the buyer comes again.
            while intake.admit(&request(number), None).is_err() {
                std::thread::yield_now();
            }
        });
    });
    ring.close();
    consumer.join().unwrap();

    let sold_out = self::state(0);
    let ring: Arc<dyn OrderQueue> = Arc::new(RingQueue::new(1));
    let intake = Intake::new(sold_out, ring, 900_000);
    intake.open();
    c.bench_function("intake/refuse_sold_out", |b| {
        b.iter(|| {
            number += 1;
            intake.admit(&request(number), None).unwrap_err()
        });
    });

    let held = self::state(1);
    let ring: Arc<dyn OrderQueue> = Arc::new(RingQueue::new(1));
    let intake = Intake::new(held, ring, 900_000);
    intake.open();
    intake.admit(&request(1), None).unwrap();
    c.bench_function("intake/answer_duplicate", |b| {
        b.iter(|| {
            let admitted = intake.admit(&request(1), None);
            assert!(matches!(admitted, Ok(Admission::Duplicate { .. })));
        });
    });
}

fn encode(c: &mut Criterion) {
    let orders: Vec<Order> = (1..=BATCH_ROWS as u64).map(order).collect();
    let mut group = c.benchmark_group("copy");
    group.throughput(Throughput::Elements(BATCH_ROWS as u64));
    group.bench_function("encode_5000_rows", |b| {
        let mut buffer = BytesMut::new();
        b.iter(|| {
            buffer.clear();
            let rows = orders
                .iter()
                .map(|order| (order, OrderStatus::PendingPayment));
            copy::encode(&mut buffer, rows);
            black_box(buffer.len())
        });
    });
}

fn journal(c: &mut Criterion) {
    let orders: Vec<Order> = (1..=1_000).map(order).collect();
    let seal = Seal::new(&[7; 16], 1);
    let mut group = c.benchmark_group("journal");
    group.throughput(Throughput::Elements(1_000));
    group.bench_function("encode_a_group_of_1000", |b| {
        let (mut records, mut sectors) = (GroupBytes::default(), Vec::new());
        b.iter(|| {
            records.begin(1, 1);
            orders.iter().for_each(|order| records.push_order(order));
            sectors.clear();
            sector::encode(&mut sectors, seal, 1, 1, records.as_bytes());
            black_box(sectors.len())
        });
    });
}

fn wire(c: &mut Criterion) {
    let keys = ReceiptKeys::new(&["0123456789abcdef"], &ISSUER);
    let body = br#"{"user_id":"u-42","sku_id":"IPHONE-15","quantity":1,"attributes":{"address_id":"a-7"}}"#;
    c.bench_function("wire/parse_order", |b| {
        b.iter(|| OrderBody::parse(black_box(body)).unwrap());
    });
    let order = order(7_340_000_000_000_000_000);
    let mut out = Vec::with_capacity(1_024);
    c.bench_function("wire/write_order", |b| {
        b.iter(|| {
            out.clear();
            serde_json::to_writer(
                &mut out,
                &OrderView::of(&order, OrderStatus::PendingPayment, &keys),
            )
            .unwrap();
            black_box(out.len())
        });
    });
    let sold_out = Problem::from(Refusal::SoldOut { available: 0 });
    let mut response = Response::default();
    c.bench_function("wire/write_sold_out", |b| {
        b.iter(|| {
            response.clear();
            black_box(&sold_out).write_to(&mut response);
            black_box(response.body().len())
        });
    });
    let head =
        b"POST /v1/orders HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nContent-Type: application/json\r\n\
        Idempotency-Key: 8e03978e-40d5-43e8-bc93-6894a57f9324\r\nAccept: */*\r\n\
        Authorization: Bearer 0123456789abcdef\r\nContent-Length: 87\r\n\r\n";
    let sizes = framing::Sizes {
        head_bytes_max: 16_384,
        bodies: BodyLimits {
            bytes_max: 16_384,
            rules: BODY_RULES,
        },
    };
    c.bench_function("wire/parse_head", |b| {
        b.iter(|| {
            let mut slots = framing::header_slots();
            match framing::parse(black_box(head), &mut slots, &sizes) {
                framing::Parsed::Complete(head) => head.head_bytes,
                other => panic!("not complete: {other:?}"),
            }
        });
    });
}

fn receipt(c: &mut Criterion) {
    let keys = ReceiptKeys::new(&["a secret of the benchmark"], &ISSUER);
    let order = Order {
        user_id: UserId::new("0b0e0d1c-7f5c-4d7a-9c39-3f5f2f3a1e11").unwrap(),
        ..order(7_340_000_000_000_000_000)
    };
    c.bench_function("receipt/sign", |b| {
        b.iter(|| keys.sign(&SignedParts::from(black_box(&order))));
    });
    let receipt = keys.sign(&SignedParts::from(&order));
    c.bench_function("receipt/open", |b| {
        b.iter(|| {
            keys.open(black_box(&receipt), Some(order.id), order.amount)
                .unwrap()
        });
    });
}

criterion_group! {
    name = hot_path;
    config = Criterion::default()
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(3))
        .sample_size(30)
        .without_plots();
    targets = queue, stock, ids, buyers, slot, memory, intake, encode, journal, wire, receipt
}
criterion_main!(hot_path);
