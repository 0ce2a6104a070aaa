//! The audit: silent on good data, and each kind of tampering is found by the check that is for it.

use crate::support::sale::{Sale, orders, refs};

const JOURNAL: &str = "the stock journal explains every counter";
const COUNTERS: &str = "counters are those of the orders";
const OVERSOLD: &str = "no SKU is oversold";
const KEYS: &str = "no key has two orders";
const KNOWN: &str = "every order is of a known SKU";
const BOTH: &str = "no order is both written and refused";
const BOOKED: &str = "every payment that was reported is booked, and no other";
const PAID: &str = "every paid order is paid by exactly one payment of its amount";
const REFUNDS: &str = "every order whose money has to go back has a payment that has to";

/// A message about a payment of the first order, and that payment, at `state`.
fn payment(state: &str) -> String {
    let reason = if state == "refund_due" {
        "'already_paid'"
    } else {
        "NULL"
    };
    format!(
        "INSERT INTO payment_events (received_at, provider, event_id, kind, body, payment_id)
             VALUES (now(), 'standard', 'e', 'payment.succeeded', '', 'p');
         INSERT INTO payments (received_at, provider, payment_id, order_ref, order_id, amount, currency, state,
                               refund_reason, changed_at, check_at)
             SELECT now(), 'standard', 'p', order_id::text, order_id, amount, currency, '{state}', {reason}, now(), now()
               FROM orders o ORDER BY o.order_id LIMIT 1;"
    )
}

async fn good() -> Sale {
    let sale = Sale::open(1).await;
    let (a, b) = (sale.sku("A", 10).await, sale.sku("B", 10).await);
    let mut writer = sale.writer(0);
    for _ in 0..2 {
        let mut batch = orders(&a, 2);
        batch.extend(orders(&b, 2));
        writer.write(&refs(&batch)).await.unwrap();
    }
    // The total is changed in the middle of the sale, as an operator does.
    sale.sku("A", 20).await;
    writer.write(&refs(&orders(&a, 1))).await.unwrap();
    sale
}

#[tokio::test]
async fn good_data_passes() {
    let sale = good().await;
    assert_eq!(sale.faults().await, [""; 0]);
    let audit = sale.database.audit().await.unwrap();
    assert_eq!(audit.orders, 9);
    assert_eq!((audit.skus[0].held, audit.skus[0].held_by_orders), (5, 5));
    assert_eq!(audit.skus[0].journal, (20, 5, 0));
}

#[tokio::test]
async fn each_kind_of_tampering_is_found_by_its_check() {
    let copy = "INSERT INTO orders (order_id, user_id, sku, quantity, adjustment, amount, currency, status,
                    created_at, expires_at, key_hash, payload_hash)
                SELECT order_id + 1, user_id, sku, quantity, adjustment, amount, currency, status,
                    created_at, expires_at, key_hash, payload_hash FROM orders LIMIT 1";
    for (tampering, expected) in [
        ("UPDATE sku SET held = held - 1 WHERE sku_id = 'A'", vec![COUNTERS, JOURNAL]),
        ("UPDATE sku SET sold = 1 WHERE sku_id = 'A'", vec![COUNTERS, JOURNAL]),
        ("UPDATE sku SET total = 11 WHERE sku_id = 'B'", vec![JOURNAL]),
        ("DELETE FROM orders WHERE order_id = (SELECT min(order_id) FROM orders)", vec![COUNTERS]),
        ("UPDATE orders SET quantity = 2 WHERE order_id = (SELECT min(order_id) FROM orders)", vec![COUNTERS]),
        ("UPDATE orders SET status = 2 WHERE order_id = (SELECT min(order_id) FROM orders)", vec![COUNTERS, PAID]),
        ("UPDATE orders SET status = 5 WHERE order_id = (SELECT min(order_id) FROM orders)", vec![COUNTERS, REFUNDS]),
        (&payment("matched"), vec![PAID]),
        (&(payment("orphan") + "DELETE FROM payment_events"), vec![BOOKED]),
        (&(payment("orphan") + "DELETE FROM payments"), vec![BOOKED]),
        (&payment("orphan"), vec![]),
        (&payment("refund_due"), vec![]),
        ("UPDATE orders SET status = 3 WHERE order_id = (SELECT min(order_id) FROM orders)", vec![COUNTERS]),
        (copy, vec![COUNTERS, KEYS]),
        ("UPDATE orders SET quantity = 5000 WHERE order_id = (SELECT min(order_id) FROM orders)", vec![OVERSOLD, COUNTERS]),
        ("UPDATE orders SET sku = 999 WHERE order_id = (SELECT min(order_id) FROM orders)", vec![COUNTERS, KNOWN]),
        ("DELETE FROM stock_journal WHERE id = (SELECT max(id) FROM stock_journal)", vec![JOURNAL]),
        // The sums still agree: only the chain tells.
        (
            "UPDATE stock_journal SET held_after = held_after + 1 WHERE id = (SELECT max(id) FROM stock_journal)",
            vec![JOURNAL],
        ),
        (
            "INSERT INTO dead_letters (order_id, user_id, sku, quantity, adjustment, amount, currency, created_at,
                 expires_at, payload_hash, sqlstate, reason)
             SELECT order_id, user_id, sku, quantity, adjustment, amount, currency, created_at, expires_at,
                 payload_hash, '23514', 'x' FROM orders LIMIT 1",
            vec![BOTH],
        ),
    ] {
        let sale = good().await;
        sale.sql(tampering).await;
        assert_eq!(sale.faults().await, expected, "{tampering}");
    }
}

#[tokio::test]
async fn an_edit_that_was_undone_by_hand_is_no_break() {
    let sale = good().await;
    sale.sql("UPDATE sku SET held = held + 1 WHERE sku_id = 'A'; UPDATE sku SET held = held - 1 WHERE sku_id = 'A'")
        .await;
    assert_eq!(sale.faults().await, [""; 0]);
    // One that orders were written upon is.
    let sku = sale.database.load_skus().await.unwrap().remove(0);
    sale.sql("UPDATE sku SET held = held + 1 WHERE sku_id = 'A'")
        .await;
    let mut writer = sale.writer(0);
    writer.write(&refs(&orders(&sku, 1))).await.unwrap();
    sale.sql("UPDATE sku SET held = held - 1 WHERE sku_id = 'A'")
        .await;
    assert_eq!(sale.faults().await, [JOURNAL]);
}

#[tokio::test]
async fn a_counter_that_is_wrong_is_explained_by_place_and_units() {
    let sale = good().await;
    sale.sql("UPDATE sku SET held = held - 2 WHERE sku_id = 'A'")
        .await;
    let audit = sale.database.audit().await.unwrap();
    let gap = &audit.skus[0].gaps;
    assert_eq!(gap.len(), 1, "{gap:?}");
    assert!(gap[0].starts_with("after the last entry "), "{gap:?}");
    assert!(gap[0].contains("(orders batch 0/0/"), "{gap:?}");
    assert!(gap[0].contains("held -2"), "{gap:?}");
    // Orders that come upon it put the gap between two entries.
    let sku = sale.database.load_skus().await.unwrap().remove(0);
    let mut writer = sale.writer(0);
    writer.write(&refs(&orders(&sku, 1))).await.unwrap();
    let audit = sale.database.audit().await.unwrap();
    let gap = &audit.skus[0].gaps;
    assert_eq!(gap.len(), 1, "{gap:?}");
    assert!(gap[0].starts_with("before entry "), "{gap:?}");
    assert!(gap[0].contains("held -2"), "{gap:?}");
    assert!(audit.skus[1].gaps.is_empty());
}
