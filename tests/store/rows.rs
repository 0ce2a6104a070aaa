//! The COPY encoder: what is written is what is read.

use millrace::order::{
    Currency, KeyHash, Order, OrderId, OrderStatus, PayloadHash, Quantity, UnixMillis, UserId,
};
use millrace::state::stock::Sku;
use millrace::store::WriteError;
use millrace::store::postgres::orders;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::support::sale::{Sale, count, order, refs};

/// The least and greatest moments that PostgreSQL stores, in Unix milliseconds.
/// Source: PostgreSQL documentation, "Date/Time Types": 4713 BC to 294276 AD.
const FIRST_MS: i64 = -210_866_803_200_000;
const LAST_MS: i64 = 9_224_318_015_999_999;

fn any_of<T: Copy>(random: &mut StdRng, extremes: &[T], plain: impl Fn(&mut StdRng) -> T) -> T {
    match random.random_range(0..=extremes.len()) {
        at if at < extremes.len() => extremes[at],
        _ => plain(random),
    }
}

fn text(random: &mut StdRng, len: usize) -> String {
    (0..len)
        .map(|_| char::from(random.random_range(b'!'..=b'~')))
        .collect()
}

fn attributes(random: &mut StdRng) -> Option<Box<str>> {
    let filler = ["ü", "订单", "🛒", "x", "\\u0000", "\\ud800", "\\\"", " "];
    let text = match random.random_range(0..5) {
        0 => return None,
        1 => "{}".to_owned(),
        // Not what a parser would print again: it must come back byte for byte.
        2 => "{ \"a\" : 1.50e+1,\n\t\"a\":[ ], \"\" : null }".to_owned(),
        3 => format!("{}{}", "{\"a\":[".repeat(60), "]}".repeat(60)),
        _ => {
            let mut inner = String::new();
            loop {
                let next = filler[random.random_range(0..filler.len())];
                if inner.len() + next.len() > 1_024 - 8 {
                    break;
                }
                inner.push_str(next);
            }
            format!("{{\"a\":\"{inner}\"}}")
        }
    };
    Some(text.into_boxed_str())
}

fn random_order(random: &mut StdRng, sku: &Sku, id: i64) -> Order {
    let millis = |random: &mut StdRng| {
        let ms = any_of(
            random,
            &[
                FIRST_MS,
                LAST_MS,
                0,
                -1,
                946_684_799_999,
                946_684_800_000,
                946_684_800_001,
            ],
            |random| random.random_range(-9_000_000_000_000..9_000_000_000_000),
        );
        UnixMillis(ms)
    };
    let len = any_of(random, &[1, UserId::LEN_MAX], |random| {
        random.random_range(1..=UserId::LEN_MAX)
    });
    Order {
        id: OrderId::from_i64(id).unwrap(),
        user_id: UserId::new(&text(random, len)).unwrap(),
        sku_id: sku.id.clone(),
        sku: sku.number,
        quantity: Quantity::new(any_of(random, &[1, Quantity::MAX], |random| {
            random.random_range(1..=Quantity::MAX)
        }))
        .unwrap(),
        adjustment: any_of(random, &[i64::MIN, i64::MAX, 0, -1], StdRng::random),
        amount: any_of(random, &[i64::MAX, 0], |random| {
            random.random_range(0..=i64::MAX)
        }),
        currency: Currency::new(["EUR", "CNY", "XXX"][random.random_range(0..3)]).unwrap(),
        created_at: millis(random),
        expires_at: millis(random),
        key: random
            .random_bool(0.7)
            .then(|| KeyHash(any_of(random, &[[0; 16], [255; 16]], StdRng::random))),
        payload: PayloadHash(any_of(random, &[0, u64::MAX, 1 << 63], StdRng::random)),
        attributes: attributes(random),
    }
}

#[tokio::test]
async fn every_field_comes_back_as_it_was_written() {
    let seed = count("MILLRACE_SEED", rand::random());
    println!("MILLRACE_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let sale = Sale::open(1).await;
    let sku = sale.sku("A", u32::MAX).await;
    let mut ids: Vec<i64> = (2..1_000 * count("MILLRACE_ROUNDS", 1) as i64).collect();
    ids.extend([1, i64::MAX, i64::MAX - 1]);
    let written: Vec<Order> = ids
        .into_iter()
        .map(|id| random_order(&mut random, &sku, id))
        .collect();
    let mut writer = sale.writer(0);
    let mut rest = &written[..];
    while !rest.is_empty() {
        let (batch, later) = rest.split_at(random.random_range(1..=rest.len().min(400)));
        writer.write(&refs(batch)).await.unwrap();
        rest = later;
    }
    assert_eq!(sale.rows().await, written.len() as i64);

    let session = sale.session().await;
    let read = session
        .prepare(
            "SELECT user_id, sku, quantity, adjustment, amount, currency, status,
                    (extract(epoch FROM created_at) * 1000)::int8, (extract(epoch FROM expires_at) * 1000)::int8,
                    decode(replace(key_hash::text, '-', ''), 'hex'), payload_hash, attributes::text
               FROM orders WHERE order_id = $1",
        )
        .await
        .unwrap();
    for order in &written {
        let row = session
            .query_one(&read, &[&order.id.as_i64()])
            .await
            .unwrap();
        let what = format!("{order:?}");
        assert_eq!(row.get::<_, &str>(0), order.user_id.as_str(), "{what}");
        assert_eq!(row.get::<_, i32>(1), order.sku.0, "{what}");
        assert_eq!(row.get::<_, i32>(2), order.quantity.get() as i32, "{what}");
        assert_eq!(row.get::<_, i64>(3), order.adjustment, "{what}");
        assert_eq!(row.get::<_, i64>(4), order.amount, "{what}");
        assert_eq!(row.get::<_, &str>(5), order.currency.as_str(), "{what}");
        assert_eq!(
            Some(row.get::<_, i16>(6)),
            OrderStatus::PendingPayment.code(),
            "{what}"
        );
        assert_eq!(row.get::<_, i64>(7), order.created_at.0, "{what}");
        assert_eq!(row.get::<_, i64>(8), order.expires_at.0, "{what}");
        assert_eq!(
            row.get::<_, Option<&[u8]>>(9),
            order.key.as_ref().map(|key| &key.0[..]),
            "{what}"
        );
        assert_eq!(row.get::<_, i64>(10) as u64, order.payload.0, "{what}");
        assert_eq!(
            row.get::<_, Option<&str>>(11),
            order.attributes.as_deref(),
            "{what}"
        );
    }
    // And through the look-up that clients see.
    for order in written.iter().take(200) {
        let found = orders::find(&sale.database, order.id)
            .await
            .unwrap()
            .unwrap();
        assert_eq!(found.user_id, order.user_id.as_str());
        assert_eq!(found.sku_id, "A");
        assert_eq!(found.quantity, order.quantity.get());
        assert_eq!(found.adjustment, order.adjustment);
        assert_eq!(found.amount, order.amount);
        assert_eq!(found.status, OrderStatus::PendingPayment);
        assert_eq!(found.created_at, order.created_at);
        assert_eq!(found.expires_at, order.expires_at);
        assert_eq!(found.attributes.as_deref(), order.attributes.as_deref());
    }
    let units: i64 = written.iter().map(|o| i64::from(o.quantity.get())).sum();
    assert_eq!(sale.number("SELECT held FROM sku").await, units);
    // Some of them share a random key, or a user; the rest of the audit holds.
    let faults = sale.faults().await;
    assert!(
        faults.iter().all(|fault| *fault == "no key has two orders"),
        "{faults:?}"
    );
}

#[tokio::test]
async fn a_dead_letter_keeps_the_whole_order() {
    let mut random = StdRng::seed_from_u64(7);
    let sale = Sale::open(1).await;
    let sku = sale.sku("A", 10).await;
    let mut writer = sale.writer(0);
    let session = sale.session().await;
    for id in 1..60 {
        let mut order = random_order(&mut random, &sku, id);
        // `to_timestamp` takes a double: exact over the times at which orders are placed.
        order.created_at = UnixMillis(1_790_000_000_000 + id);
        order.expires_at = order.created_at.plus_ms(900_001);
        for _ in 0..2 {
            writer
                .write_dead_letter(&order, "23514", "some check")
                .await
                .unwrap();
        }
        let row = session
            .query_one(
                "SELECT user_id, quantity, adjustment, amount, currency,
                        (extract(epoch FROM created_at) * 1000)::int8, (extract(epoch FROM expires_at) * 1000)::int8,
                        decode(replace(key_hash::text, '-', ''), 'hex'), payload_hash, attributes, sqlstate, reason
                   FROM dead_letters WHERE order_id = $1",
                &[&id],
            )
            .await
            .unwrap();
        assert_eq!(row.get::<_, &str>(0), order.user_id.as_str());
        assert_eq!(row.get::<_, i32>(1), order.quantity.get() as i32);
        assert_eq!(row.get::<_, i64>(2), order.adjustment);
        assert_eq!(row.get::<_, i64>(3), order.amount);
        assert_eq!(row.get::<_, &str>(4), order.currency.as_str());
        assert_eq!(row.get::<_, i64>(5), order.created_at.0);
        assert_eq!(row.get::<_, i64>(6), order.expires_at.0);
        assert_eq!(
            row.get::<_, Option<&[u8]>>(7),
            order.key.as_ref().map(|key| &key.0[..])
        );
        assert_eq!(row.get::<_, i64>(8) as u64, order.payload.0);
        assert_eq!(
            row.get::<_, Option<&str>>(9),
            order.attributes.as_deref(),
            "{id}"
        );
        assert_eq!(row.get::<_, &str>(10), "23514");
        assert_eq!(row.get::<_, &str>(11), "some check");
        let found = orders::find(&sale.database, order.id)
            .await
            .unwrap()
            .unwrap();
        assert_eq!(found.status, OrderStatus::Failed);
    }
}

#[tokio::test]
async fn a_moment_that_postgresql_cannot_store_is_a_refused_row() {
    let sale = Sale::open(1).await;
    let sku = sale.sku("A", 10).await;
    let mut writer = sale.writer(0);
    for ms in [FIRST_MS - 1, LAST_MS + 1] {
        let mut bad = order(&sku, 1);
        bad.created_at = UnixMillis(ms);
        let refused = writer.write(&[&bad]).await;
        assert!(
            matches!(&refused, Err(WriteError::Row { sqlstate, .. }) if sqlstate == "22008"),
            "{refused:?}"
        );
    }
    assert_eq!(sale.rows().await, 0);
}
