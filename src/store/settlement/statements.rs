//! The statements of a settlement, each prepared once a connection, when it is first needed: to
//! prepare one takes a lock on its tables, and what stores a payment must not wait for orders.

use std::collections::BTreeMap;

use tokio::sync::OnceCell;
use tokio_postgres::{Client, Error, Statement};

use crate::order::SkuNumber;
use crate::store::numbered::FENCE;

/// Messages: their moment, then arrays. One that is there already is left alone.
const EVENTS: &str = "
    INSERT INTO payment_events (received_at, provider, event_id, kind, body, payment_id)
    SELECT to_timestamp($1::int8 / 1000.0), e.* FROM unnest($2::text[], $3::text[], $4::text[], $5::bytea[], $6::text[]) e
    ON CONFLICT (provider, event_id) DO NOTHING";

/// Payments, all orphans at first; returns the new ones. $9: when orphans are looked at first.
const PAYMENTS: &str = "
    INSERT INTO payments (received_at, provider, payment_id, order_ref, order_id, amount, currency, receipt,
                          state, changed_at, check_at)
    SELECT to_timestamp($1::int8 / 1000.0), p.*, 'orphan', to_timestamp($1::int8 / 1000.0), to_timestamp($9::int8 / 1000.0)
      FROM unnest($2::text[], $3::text[], $4::text[], $5::int8[], $6::int8[], $7::text[], $8::text[]) p
    ON CONFLICT (provider, payment_id) DO NOTHING
    RETURNING id, provider, payment_id";

/// Orphans of these orders, as they came.
const WAITING: &str = "
    SELECT id, order_id, amount, currency, (extract(epoch FROM received_at) * 1000)::int8
      FROM payments WHERE order_id = ANY ($1) AND state = 'orphan' ORDER BY id";

/// Locked by id, as every transaction does.
const LOCK_ORDERS: &str = "
    SELECT order_id, status, amount, currency, (extract(epoch FROM expires_at) * 1000)::int8, sku, quantity, user_id
      FROM orders WHERE order_id = ANY ($1) ORDER BY order_id FOR UPDATE";

const LOCK_DEAD_LETTERS: &str = "
    SELECT order_id, status, amount, currency, (extract(epoch FROM expires_at) * 1000)::int8, sku, quantity, user_id
      FROM dead_letters WHERE order_id = ANY ($1) ORDER BY order_id FOR UPDATE";

/// Guarded: each order moves from where it was judged, or not at all.
const MOVE_ORDERS: &str = "
    UPDATE orders o SET status = m.status, refund_reason = coalesce(m.reason, o.refund_reason)
      FROM unnest($1::int8[], $2::int2[], $3::int2[], $4::text[]) AS m (order_id, was, status, reason)
     WHERE o.order_id = m.order_id AND o.status = m.was";

const MOVE_DEAD_LETTERS: &str = "
    UPDATE dead_letters d SET status = m.status, refund_reason = coalesce(m.reason, d.refund_reason)
      FROM unnest($1::int8[], $2::int2[], $3::text[]) AS m (order_id, status, reason)
     WHERE d.order_id = m.order_id";

/// Guarded likewise.
const MOVE_PAYMENTS: &str = "
    UPDATE payments p SET state = m.state, refund_reason = m.reason, changed_at = to_timestamp($4::int8 / 1000.0)
      FROM unnest($1::int8[], $2::text[], $3::text[]) AS m (id, state, reason)
     WHERE p.id = m.id AND p.state = 'orphan'";

/// Guarded by the order too: a worker may have written it since it was looked for.
const GIVE_UP: &str = "
    UPDATE payments p SET state = 'refund_due', refund_reason = $2, changed_at = to_timestamp($3::int8 / 1000.0)
     WHERE p.id = $1 AND p.state = 'orphan'
       AND NOT EXISTS (SELECT FROM orders o WHERE o.order_id = p.order_id)
       AND NOT EXISTS (SELECT FROM dead_letters d WHERE d.order_id = p.order_id)";

const LOCK_SKUS: &str = "SELECT id FROM sku WHERE id = ANY ($1) ORDER BY id FOR UPDATE";

/// Moves counters of SKUs that are locked, and writes the journal after them, so that its entries
/// are numbered in the order in which the counters moved. The LEFT JOIN makes a SKU that does not
/// exist violate NOT NULL, which takes the transaction down.
const COUNTERS: &str = "
    WITH wanted AS (
        SELECT * FROM unnest($1::int4[], $2::int8[], $3::int8[], $4::int8[]) AS w (sku, total, held, sold)
    ), moved AS (
        UPDATE sku s SET total = s.total + w.total, held = s.held + w.held, sold = s.sold + w.sold
          FROM wanted w WHERE s.id = w.sku RETURNING s.id, s.total, s.held, s.sold
    )
    INSERT INTO stock_journal (sku, cause, reference, total_delta, held_delta, sold_delta,
                               total_after, held_after, sold_after)
    SELECT w.sku, $5, $6, w.total, w.held, w.sold, m.total, m.held, m.sold
      FROM wanted w LEFT JOIN moved m ON m.id = w.sku ORDER BY w.sku";

/// Unpaid orders of a range of ids that are past their time. One whose payment came in time and
/// waits to be matched is left to it ($5: whether there may be any). $6: of which SKU, or of all.
const EXPIRE: &str = "
    WITH due AS (
        SELECT order_id FROM orders o
         WHERE order_id BETWEEN $1 AND $2 AND status = 1 AND expires_at <= to_timestamp($3::int8 / 1000.0)
           AND NOT ($5::bool AND EXISTS (SELECT FROM payments p WHERE p.order_id = o.order_id
                                            AND p.state = 'orphan' AND p.received_at < o.expires_at))
           AND ($6::int4 IS NULL OR sku = $6)
         ORDER BY order_id LIMIT $4 FOR UPDATE
    )
    UPDATE orders o SET status = 4 FROM due WHERE o.order_id = due.order_id AND o.status = 1
    RETURNING o.order_id, o.user_id, o.sku, o.quantity";

/// An order that was lost, as its receipt tells it; nothing where it is there after all.
const RECOVER: &str = "
    INSERT INTO orders (order_id, user_id, sku, quantity, adjustment, amount, currency, status, created_at, expires_at,
                        key_hash, payload_hash, refund_reason)
    SELECT $1, $2, $3, $4, $5, $6, $7, $8, to_timestamp($9::int8 / 1000.0), to_timestamp($10::int8 / 1000.0),
           encode($11::bytea, 'hex')::uuid, $12, $13
     WHERE NOT EXISTS (SELECT FROM dead_letters d WHERE d.order_id = $1)
    ON CONFLICT (order_id) DO NOTHING";

/// Which statement.
#[derive(Clone, Copy, Debug)]
pub(super) enum Sql {
    Fence,
    Events,
    Payments,
    Waiting,
    LockOrders,
    LockDeadLetters,
    MoveOrders,
    MoveDeadLetters,
    MovePayments,
    GiveUp,
    Expire,
    Recover,
    LockSkus,
    Counters,
}

const SQL: [&str; 14] = [
    FENCE,
    EVENTS,
    PAYMENTS,
    WAITING,
    LOCK_ORDERS,
    LOCK_DEAD_LETTERS,
    MOVE_ORDERS,
    MOVE_DEAD_LETTERS,
    MOVE_PAYMENTS,
    GIVE_UP,
    EXPIRE,
    RECOVER,
    LOCK_SKUS,
    COUNTERS,
];

/// The statements that were prepared so far, in the order of [`Sql`].
#[derive(Debug, Default)]
pub(super) struct Statements([OnceCell<Statement>; SQL.len()]);

/// By how much the counters of each SKU change, by id, so that every transaction locks in the
/// same order.
#[derive(Debug, Default)]
pub(super) struct Changes(BTreeMap<SkuNumber, Change>);

/// By how much the counters of one SKU change.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Change {
    pub(super) total: i64,
    pub(super) held: i64,
    pub(super) sold: i64,
}

impl Changes {
    pub(super) fn add(&mut self, sku: SkuNumber, change: Change) {
        let sum = self.0.entry(sku).or_default();
        sum.total += change.total;
        sum.held += change.held;
        sum.sold += change.sold;
    }
}

impl Statements {
    /// A statement, prepared on `client`.
    pub(super) async fn of(&self, client: &Client, sql: Sql) -> Result<&Statement, Error> {
        let index = sql as usize;
        let prepare = || client.prepare(SQL[index]);
        self.0[index].get_or_try_init(prepare).await
    }

    /// Moves counters, each cause with journal entries of its own, with `reference` as what to
    /// look for. SKUs that change nothing are left out.
    pub(super) async fn move_counters(
        &self,
        client: &Client,
        changes: &[(&str, Changes)],
        reference: &str,
    ) -> Result<(), Error> {
        let mut skus: Vec<i32> = changes
            .iter()
            .flat_map(|(_, changes)| changes.0.keys().map(|sku| sku.0))
            .collect();
        if skus.is_empty() {
            return Ok(());
        }
        skus.sort_unstable();
        skus.dedup();
        let lock = self.of(client, Sql::LockSkus).await?;
        client.execute(lock, &[&skus]).await?;
        let counters = self.of(client, Sql::Counters).await?;
        for (cause, Changes(changes)) in changes {
            if changes.is_empty() {
                continue;
            }
            let skus: Vec<i32> = changes.keys().map(|sku| sku.0).collect();
            let column = |of: fn(&Change) -> i64| changes.values().map(of).collect::<Vec<i64>>();
            let (total, held, sold) = (
                column(|change| change.total),
                column(|change| change.held),
                column(|change| change.sold),
            );
            client
                .execute(counters, &[&skus, &total, &held, &sold, cause, &reference])
                .await?;
        }
        Ok(())
    }
}
