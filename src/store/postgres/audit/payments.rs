//! Payments and messages in parts: sums of money, and contradictions.

use std::collections::BTreeMap;

use super::PaymentSum;
use super::session::{Session, sum};
use crate::store::StoreError;

/// Payments above a number, by state, currency and reason. A payment whose messages were deleted needs none,
/// and a matched payment whose order was deleted needs no order.
const PAYMENTS: &str = "
    WITH part AS MATERIALIZED (
        SELECT id, provider, payment_id, order_id, amount, currency, state, order_pruned,
               received_at >= coalesce((SELECT received_before FROM payment_events_checkpoint), '-infinity') AS has_event,
               CASE WHEN state = 'orphan' OR state = 'matched' THEN NULL ELSE refund_reason END AS reason
          FROM payments WHERE id > $1 ORDER BY id LIMIT $2
    )
    SELECT state, part.currency, reason, count(*), sum(part.amount)::text, max(part.id),
           count(*) FILTER (WHERE has_event AND event.found IS NULL),
           count(*) FILTER (WHERE state = 'matched' AND NOT order_pruned AND paid.found IS NULL)
      FROM part
      LEFT JOIN LATERAL (
          SELECT 1 AS found FROM payment_events e
           WHERE e.provider = part.provider AND e.payment_id = part.payment_id LIMIT 1) event ON true
      LEFT JOIN LATERAL (
          SELECT 1 AS found FROM orders o
           WHERE part.state = 'matched' AND o.order_id = part.order_id AND o.status = 2 LIMIT 1) paid ON true
     GROUP BY 1, 2, 3";

/// Messages above a number.
const EVENTS: &str = "
    WITH part AS MATERIALIZED (
        SELECT id, provider, payment_id FROM payment_events WHERE id > $1 ORDER BY id LIMIT $2
    )
    SELECT count(*), coalesce(max(part.id), 0),
           count(*) FILTER (WHERE part.payment_id IS NOT NULL AND payment.found IS NULL)
      FROM part
      LEFT JOIN LATERAL (
          SELECT 1 AS found FROM payments p
           WHERE p.provider = part.provider AND p.payment_id = part.payment_id LIMIT 1) payment ON true";

#[derive(Debug, Default)]
pub(super) struct Payments {
    pub(super) sums: Vec<PaymentSum>,
    pub(super) without_event: i64,
    pub(super) matched_without_paid_order: i64,
}

pub(super) async fn read(session: &mut Session) -> Result<Payments, StoreError> {
    let statement = session.prepare(PAYMENTS).await?;
    let mut sums: BTreeMap<(String, String, Option<String>), (i64, i128)> = BTreeMap::new();
    let mut all = Payments::default();
    let mut above = 0_i64;
    loop {
        let part = session
            .part("payments", &statement, &[&above], sum::<3>, None)
            .await?;
        for row in &part.rows {
            let (payments, amount) = sums
                .entry((row.get(0), row.get(1), row.get(2)))
                .or_default();
            *payments += row.get::<_, i64>(3);
            *amount += row.get::<_, &str>(4).parse::<i128>().unwrap_or_default();
            above = above.max(row.get(5));
            all.without_event += row.get::<_, i64>(6);
            all.matched_without_paid_order += row.get::<_, i64>(7);
        }
        if part.is_last {
            break;
        }
    }
    let total = |((state, currency, reason), (count, amount))| PaymentSum {
        state,
        currency,
        reason,
        count,
        amount,
    };
    all.sums = sums.into_iter().map(total).collect();
    Ok(all)
}

/// Messages about a payment that does not exist.
pub(super) async fn events_without_payment(session: &mut Session) -> Result<i64, StoreError> {
    let statement = session.prepare(EVENTS).await?;
    let (mut above, mut without) = (0_i64, 0);
    loop {
        let part = session
            .part("messages", &statement, &[&above], sum::<0>, None)
            .await?;
        for row in &part.rows {
            above = above.max(row.get(1));
            without += row.get::<_, i64>(2);
        }
        if part.is_last {
            return Ok(without);
        }
    }
}
