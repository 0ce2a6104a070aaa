//! What a start reads back: SKUs, keys, limits.

use std::collections::HashMap;

use millrace::order::{Currency, Order, OrderId, OrderStatus, SkuId, UnixMillis, UserId};
use millrace::state::buyers::{Buyers, Claimed, Remembered};
use millrace::state::stock::{SaleTerms, Sku};
use millrace::store::StoreError;

use crate::support::sale::{Sale, order, orders, refs};

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
    };
    let none = SaleTerms {
        title: String::new(),
        unit_price: 0,
        per_user_limit: None,
        opens_at: None,
        closes_at: None,
        ..all.clone()
    };
    for (name, terms, total) in [("!~", &all, u32::MAX), ("none", &none, 0)] {
        let id = SkuId::new(name).unwrap();
        let put = sale
            .database
            .put_sku(sale.lease(), &id, terms, total)
            .await
            .unwrap();
        assert_eq!((**put.terms()).clone(), *terms);
    }
    let mut writer = sale.writer(0);
    let first = sale.database.load_skus().await.unwrap().remove(0);
    writer.write(&refs(&orders(&first, 7))).await.unwrap();
    sale.sql("UPDATE sku SET held = held - 3, sold = 3 WHERE sku_id = '!~'")
        .await;
    let id = SkuId::new("none").unwrap();
    assert!(sale.database.set_sku_paused(&id, true).await.unwrap());
    let nobody = SkuId::new("nobody").unwrap();
    assert!(!sale.database.set_sku_paused(&nobody, true).await.unwrap());

    let loaded = sale.database.load_skus().await.unwrap();
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
    let refused = sale.database.load_skus().await;
    assert!(
        matches!(&refused, Err(StoreError::Data(what)) if what.contains("sku A")),
        "{refused:?}"
    );
}

async fn load(sale: &Sale, floor: OrderId) -> HashMap<OrderId, (UserId, Remembered)> {
    let mut loaded = HashMap::new();
    let count = sale
        .database
        .load_window(floor, |user, order, _| {
            assert!(loaded.insert(order.order_id, (user, order)).is_none());
        })
        .await
        .unwrap();
    assert_eq!(count, loaded.len() as u64);
    loaded
}

fn remembered(order: &Order, live: bool) -> (UserId, Remembered) {
    let remembered = Remembered {
        live,
        ..Remembered::of(order)
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
        .map(|(order, status)| (order.id, remembered(order, status.is_live())))
        .collect();
    expected.insert(dead.id, remembered(&dead, false));
    let floor = stored[0].0.id;
    assert_eq!(load(&sale, floor).await, expected);
    let just_above = OrderId::new(dead.id.get() + 1).unwrap();
    assert!(load(&sale, just_above).await.is_empty());
    for order in &old {
        expected.insert(order.id, remembered(order, true));
    }
    let everything = load(&sale, OrderId::new(1).unwrap()).await;
    assert_eq!(everything, expected);

    // What a retry under an old key then gets.
    let buyers = Buyers::new(100, 100);
    for (user, order) in everything.into_values() {
        buyers.restore(user, order);
    }
    let again = |order: &Order| {
        let fresh = Remembered {
            order_id: OrderId::new(i64::MAX as u64).unwrap(),
            ..remembered(order, true).1
        };
        match buyers.claim(&order.user_id, fresh, None, Ok(())) {
            Ok(Claimed::Duplicate(id)) => Some(id),
            _ => None,
        }
    };
    assert_eq!(again(&dead), Some(dead.id), "a dead letter keeps its key");
    assert_eq!(again(&stored[1].0), Some(stored[1].0.id));
    assert_eq!(again(&stored[0].0), None, "it came without a key");
}
