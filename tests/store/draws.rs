//! A draw in the database: fixed once, made once, and as it is published. `MILLRACE_DRAW_ENTRIES` turns its size up and
//! `--nocapture` tells how long each step took.

use std::time::Instant;

use millrace::order::draw::verify::{Evidence, verify};
use millrace::order::draw::{Beacon, State, write_line};
use millrace::order::{Currency, OrderId, SkuId, UnixMillis};
use millrace::state::stock::{DrawTerms, SaleTerms, Sku, WaitlistTerms};
use millrace::store::StoreError;
use millrace::store::postgres::draws::{self, BeaconStored};
use millrace::store::postgres::{NodeLease, skus};

use crate::support::sale::{Sale, count};

const DAY_MS: i64 = 86_400_000;

async fn put(sale: &Sale, beacon: Option<&str>) -> Sku {
    let now = UnixMillis::now();
    let terms = SaleTerms {
        title: "Drawn".into(),
        unit_price: 100,
        currency: Currency::new("EUR").unwrap(),
        per_user_limit: None,
        opens_at: Some(UnixMillis(now.0 - DAY_MS)),
        closes_at: Some(UnixMillis(now.0 + DAY_MS)),
        waitlist: WaitlistTerms::default(),
        draw: Some(DrawTerms {
            at: now,
            beacon: beacon.map(str::to_owned),
        }),
    };
    let id = SkuId::new("D").unwrap();
    let put = skus::put(&sale.database, sale.lease(), &id, &terms, 1_000);
    put.await.unwrap()
}

/// Writes entries as workers do, and two orders that are none.
async fn enter(sale: &Sale, sku: &Sku, entries: u64) {
    let first = OrderId::floor_of(UnixMillis::now()).get();
    sale.sql(&format!(
        "INSERT INTO orders (order_id, user_id, sku, quantity, adjustment, amount, currency, status, created_at,
                expires_at, payload_hash)
         SELECT {first} + n, 'user-' || n, {sku}, 1, 0, 100, 'EUR', CASE WHEN n > {entries} THEN 3 ELSE 7 END,
                now(), timestamptz '9999-01-01 00:00:00+00', 0
           FROM generate_series(1, {entries} + 2) n",
        sku = sku.number.0,
    ))
    .await;
}

fn since() -> OrderId {
    OrderId::floor_of(UnixMillis(UnixMillis::now().0 - DAY_MS))
}

#[tokio::test]
async fn a_draw_of_many_is_fixed_and_made_once_and_published_in_pages() {
    let sale = Sale::open(1).await;
    let (database, lease) = (&sale.database, sale.lease());
    let entries = count("MILLRACE_DRAW_ENTRIES", 2_500);
    let sku = put(&sale, Some("a beacon")).await;
    enter(&sale, &sku, entries).await;
    let now = UnixMillis::now();
    let beacon = Beacon::new("4242").unwrap();
    let early = draws::store_beacon(database, lease, sku.number, &beacon).await;
    assert_eq!(early.unwrap(), BeaconStored::NotFixed);
    assert!(draws::draw(database, lease, sku.number, now).await.is_err());

    let started = Instant::now();
    let fixed = draws::fix(database, lease, sku.number, since(), now).await;
    let fixed = fixed.unwrap().unwrap();
    println!("{entries} entries fixed in {:?}", started.elapsed());
    assert_eq!((fixed.entries, fixed.units), (entries, 1_000));
    // An entry that ends after this is in the draw all the same.
    sale.sql("UPDATE orders SET status = 3 WHERE user_id = 'user-1'")
        .await;
    let again = draws::fix(database, lease, sku.number, since(), now.plus_ms(5)).await;
    assert_eq!(again.unwrap(), Some(fixed));
    let header = draws::page(database, &sku.id, 0, 10)
        .await
        .unwrap()
        .unwrap()
        .header;
    assert_eq!((header.state, header.seed), (State::EntriesFixed, None));
    for _ in 0..2 {
        let stored = draws::store_beacon(database, lease, sku.number, &beacon).await;
        assert_eq!(stored.unwrap(), BeaconStored::Stored);
    }
    let other = Beacon::new("4243").unwrap();
    let stored = draws::store_beacon(database, lease, sku.number, &other).await;
    assert_eq!(stored.unwrap(), BeaconStored::Other(beacon));

    let started = Instant::now();
    let places = draws::draw(database, lease, sku.number, now).await;
    let places = places.unwrap().unwrap();
    println!("{entries} entries drawn in {:?}", started.elapsed());
    assert_eq!(places.len() as u64, entries);
    let again = draws::draw(database, lease, sku.number, now).await;
    let mut again = again.unwrap().unwrap();
    assert_eq!(again.len() as u64, entries - 1, "of those that still wait");
    again.retain(|id, place| places.get(id) != Some(place));
    assert!(again.is_empty());

    let started = Instant::now();
    let mut file = Vec::new();
    let mut after = 0;
    loop {
        let page = draws::page(database, &sku.id, after, 1_000)
            .await
            .unwrap()
            .unwrap();
        if after == 0 {
            write_line(&page.header, &mut file).unwrap();
        }
        page.rows
            .iter()
            .for_each(|row| write_line(row, &mut file).unwrap());
        match page.rows.last() {
            Some(last) => after = last.place as i64,
            None => break,
        }
    }
    println!(
        "{} MB published in {:?}",
        file.len() / 1_000_000,
        started.elapsed()
    );
    let started = Instant::now();
    let evidence = Evidence {
        earlier: vec![header],
        openings: Vec::new(),
    };
    let verdict = verify(&*file, &evidence).unwrap();
    println!("verified in {:?}", started.elapsed());
    assert!(verdict.ok, "{verdict:#?}");
    assert_eq!(
        (verdict.entries, verdict.winners),
        (entries, entries.min(1_000))
    );
}

#[tokio::test]
async fn the_secrets_of_a_sku_never_change_and_another_process_makes_no_draw() {
    let sale = Sale::open(1).await;
    let first = put(&sale, None).await.draw().unwrap().commitment();
    let sku = put(&sale, Some("another beacon")).await;
    assert_eq!(sku.draw().unwrap().commitment(), first);
    let stored = sale.number("SELECT count(*) FROM draws").await;
    assert_eq!(stored, 1);
    let loaded = skus::load_all(&sale.database, sale.lease()).await.unwrap();
    assert_eq!(loaded[0].draw().unwrap().commitment(), first);
    assert_eq!(loaded[0].terms().draw, sku.terms().draw);
    let replaced = NodeLease {
        epoch: sale.lease().epoch + 1,
        ..sale.lease()
    };
    let now = UnixMillis::now();
    let fixed = draws::fix(&sale.database, replaced, sku.number, since(), now).await;
    assert!(matches!(fixed, Err(StoreError::Fenced { .. })), "{fixed:?}");
    // Neither is it in what leaves by logical replication.
    let published = "SELECT count(*) FROM pg_publication_tables WHERE tablename LIKE 'draw%'";
    assert_eq!(sale.number(published).await, 0);
}
