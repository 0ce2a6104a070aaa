//! The statements of a settlement. Each is prepared once a connection, when first needed: preparing takes a
//! lock on the statement's tables, and storing a payment must not wait for orders.

use std::collections::BTreeMap;

use tokio::sync::OnceCell;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Error, Statement};

use crate::order::SkuNumber;
use crate::store::cluster::lists;
use crate::store::fenced::FENCE;
use crate::store::postgres::NodeLease;

/// Stores messages. A message already stored, about the same payment, is left alone.
const EVENTS: &str = "
    INSERT INTO payment_events (received_at, provider, event_id, kind, body, payment_id)
    SELECT to_timestamp(e.at / 1000.0), e.provider, e.event_id, e.kind, e.body, e.payment_id
      FROM unnest($1::int8[], $2::text[], $3::text[], $4::text[], $5::bytea[], $6::text[])
           AS e (at, provider, event_id, kind, body, payment_id)
    ON CONFLICT (provider, event_id, payment_id) DO NOTHING";

/// The positions of the payments that are stored already.
const KNOWN: &str = "
    SELECT w.place FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS w (provider, payment_id, place)
     WHERE EXISTS (SELECT FROM payments p WHERE p.provider = w.provider AND p.payment_id = w.payment_id)";

/// Stores new payments, each with its initial state. $12: now; $13: time of an orphan's first check.
const PAYMENTS: &str = "
    INSERT INTO payments (received_at, paid_at, provider, payment_id, order_ref, order_id, amount, currency, receipt,
                          state, refund_reason, changed_at, check_at)
    SELECT to_timestamp(p.received_at / 1000.0), to_timestamp(p.paid_at / 1000.0), p.provider, p.payment_id,
           p.order_ref, p.order_id, p.amount, p.currency, p.receipt, p.state, p.reason,
           to_timestamp($12::int8 / 1000.0), to_timestamp($13::int8 / 1000.0)
      FROM unnest($1::int8[], $2::int8[], $3::text[], $4::text[], $5::text[], $6::int8[], $7::int8[], $8::text[],
                  $9::text[], $10::text[], $11::text[])
           AS p (received_at, paid_at, provider, payment_id, order_ref, order_id, amount, currency, receipt, state,
                 reason)";

/// Locks the orphans of these orders, in order of arrival, after their orders.
const WAITING: &str = "
    SELECT id, order_id, amount, currency, payment_id
      FROM payments WHERE order_id = ANY ($1) AND state = 'orphan' ORDER BY id FOR UPDATE";

/// Locked by id, as every transaction does.
const LOCK_ORDERS: &str = "
    SELECT order_id, status, amount, currency, sku, quantity, user_id, expires_at < '9999-01-01 00:00:00+00'
      FROM orders WHERE order_id = ANY ($1) ORDER BY order_id FOR UPDATE";

/// The same, skipping locked rows.
const TRY_ORDERS: &str = "
    SELECT order_id, status, amount, currency, sku, quantity, user_id, expires_at < '9999-01-01 00:00:00+00'
      FROM orders WHERE order_id = ANY ($1) ORDER BY order_id FOR UPDATE SKIP LOCKED";

/// Keeps these orders as they are until the transaction ends.
const SHARE_ORDERS: &str =
    "SELECT FROM orders WHERE order_id = ANY ($1) ORDER BY order_id FOR SHARE";

/// The same, skipping locked rows: whoever has locked one decides about it first.
const TRY_SHARE_ORDERS: &str =
    "SELECT FROM orders WHERE order_id = ANY ($1) ORDER BY order_id FOR SHARE SKIP LOCKED";

const LOCK_DEAD_LETTERS: &str = "
    SELECT order_id, status, amount, currency, sku, quantity, user_id, expires_at < '9999-01-01 00:00:00+00'
      FROM dead_letters WHERE order_id = ANY ($1) ORDER BY order_id FOR UPDATE";

/// Guarded: an order moves only from the status that its verdict was based on.
const MOVE_ORDERS: &str = "
    UPDATE orders o SET status = m.status, refund_reason = coalesce(m.reason, o.refund_reason)
      FROM unnest($1::int8[], $2::int2[], $3::int2[], $4::text[]) AS m (order_id, was, status, reason)
     WHERE o.order_id = m.order_id AND o.status = m.was";

const MOVE_DEAD_LETTERS: &str = "
    UPDATE dead_letters d SET status = m.status, refund_reason = coalesce(m.reason, d.refund_reason)
      FROM unnest($1::int8[], $2::int2[], $3::text[]) AS m (order_id, status, reason)
     WHERE d.order_id = m.order_id";

/// Guarded: a payment moves only while it is an orphan.
const MOVE_PAYMENTS: &str = "
    UPDATE payments p SET state = m.state, refund_reason = m.reason, changed_at = to_timestamp($4::int8 / 1000.0)
      FROM unnest($1::int8[], $2::text[], $3::text[]) AS m (id, state, reason)
     WHERE p.id = m.id AND p.state = 'orphan'";

/// Guarded by the order too: a worker may have written it since the look-up.
const GIVE_UP: &str = "
    UPDATE payments p SET state = 'refund_due', refund_reason = $2, changed_at = to_timestamp($3::int8 / 1000.0)
     WHERE p.id = $1 AND p.state = 'orphan'
       AND NOT EXISTS (SELECT FROM orders o WHERE o.order_id = p.order_id)
       AND NOT EXISTS (SELECT FROM dead_letters d WHERE d.order_id = p.order_id)";

/// The counters that move, by SKU. Written out by [`Ledger::sql`](crate::store::Ledger::sql), as the two below.
const LOCK_SKUS: &str = "SELECT @id FROM @ledger WHERE @id = ANY ($1)@own ORDER BY @id FOR UPDATE";

/// Moves counters of locked SKUs and then writes the stock log, so that its entries are numbered in the order
/// of the moves. The LEFT JOIN makes an unknown SKU violate NOT NULL, which aborts the transaction.
const COUNTERS: &str = "
    WITH wanted AS (
        SELECT * FROM unnest($1::int4[], $2::int8[], $3::int8[], $4::int8[]) AS w (sku, total, held, sold)
    ), moved AS (
        UPDATE @ledger s SET @total = s.@total + w.total, held = s.held + w.held, sold = s.sold + w.sold
          FROM wanted w WHERE s.@id = w.sku@own RETURNING s.@id, s.@total, s.held, s.sold
    )
    INSERT INTO stock_log (sku, @columncause, reference, total_delta, held_delta, sold_delta,
                               total_after, held_after, sold_after)
    SELECT w.sku, @node$5, $6, w.total, w.held, w.sold, m.@total, m.held, m.sold
      FROM wanted w LEFT JOIN moved m ON m.@id = w.sku ORDER BY w.sku";

/// Takes sold units of a node's order out of `sku`, which gets those that were swept out of its share, $7.
const REFUND_SWEPT: &str = "
    WITH moved AS (
        UPDATE sku SET total = total + $2::int8, sold = sold + $3::int8 + $7::int8 WHERE id = $1 RETURNING total, held, sold
    )
    INSERT INTO stock_log (sku, node, cause, reference, total_delta, sold_delta, total_after, held_after, sold_after)
    SELECT $1::int4, $6::int2, $4::text, $5::text, $2::int8, $3::int8, total, held, sold FROM moved";

/// Reads at most $3 rows of a range of ids: returns their count, the last id, and the unpaid orders past their
/// deadline. $5: one SKU, or NULL for all.
const LOOK: &str = "
    WITH looked_at AS MATERIALIZED (
        SELECT order_id, sku, expires_at,
               status = 1 AND expires_at <= to_timestamp($4::int8 / 1000.0) AND ($5::int4 IS NULL OR sku = $5) AS due
          FROM orders WHERE order_id BETWEEN $1 AND $2 ORDER BY order_id LIMIT $3
    )
    SELECT count(*), max(order_id), array_agg(order_id ORDER BY order_id) FILTER (WHERE due),
           array_agg(sku ORDER BY order_id) FILTER (WHERE due),
           array_agg((extract(epoch FROM expires_at) * 1000)::int8 ORDER BY order_id) FILTER (WHERE due)
      FROM looked_at";

/// Locks those of these orders that are unpaid and past their deadline, before [`EXPIRE`] looks at their payments. In one
/// statement the look would have the snapshot from before the lock, and miss a payment that another node commits in between.
const LOCK_OVERDUE: &str = "
    SELECT order_id FROM orders
     WHERE order_id = ANY ($1) AND status = 1 AND expires_at <= to_timestamp($2::int8 / 1000.0)
     ORDER BY order_id FOR UPDATE SKIP LOCKED";

/// Expires those of these orders that are still unpaid and past their deadline. Locked rows are skipped. $3:
/// whether there may be orphans; an order whose orphan was paid in time is left to it.
const EXPIRE: &str = "
    WITH due AS (
        SELECT order_id FROM orders o
         WHERE order_id = ANY ($1) AND status = 1 AND expires_at <= to_timestamp($2::int8 / 1000.0)
           AND NOT ($3::bool AND EXISTS (SELECT FROM payments p WHERE p.order_id = o.order_id
                                            AND p.state = 'orphan' AND least(p.received_at, p.paid_at) < o.expires_at))
         ORDER BY order_id FOR UPDATE SKIP LOCKED
    )
    UPDATE orders o SET status = 4 FROM due WHERE o.order_id = due.order_id AND o.status = 1
    RETURNING o.order_id, o.user_id, o.sku, o.quantity";

/// Makes waiting orders payable. Locked by id; a locked row is waited for, because none behind it may be served
/// before.
const ASSIGN: &str = "
    WITH next AS (
        SELECT order_id FROM orders WHERE order_id = ANY ($1) AND status = 7 ORDER BY order_id FOR UPDATE
    )
    UPDATE orders o SET status = 1, expires_at = to_timestamp($2::int8 / 1000.0),
           assigned_at = to_timestamp($3::int8 / 1000.0)
      FROM next WHERE o.order_id = next.order_id AND o.status = 7
    RETURNING o.order_id, o.user_id, o.sku, o.quantity";

/// Ends the wait of orders that hold no units. $2: only those for more units than their SKU has in total.
const END_WAITING: &str = "
    WITH ended AS (
        SELECT order_id FROM orders o WHERE order_id = ANY ($1) AND status = 7
           AND NOT ($2::bool AND quantity <= (SELECT total FROM sku s WHERE s.id = o.sku))
         ORDER BY order_id FOR UPDATE SKIP LOCKED
    )
    UPDATE orders o SET status = 4 FROM ended WHERE o.order_id = ended.order_id AND o.status = 7
    RETURNING o.order_id, o.user_id, o.sku, o.quantity";

/// Locks those of these orders that wait.
const LOCK_WAITING: &str = "SELECT order_id FROM orders WHERE order_id = ANY ($1) AND status = 7 ORDER BY order_id FOR UPDATE";

/// Locks a SKU and reads the units of its pool; none while a total is lowered.
const LOCK_POOL: &str = "
    SELECT CASE WHEN recall IS NULL THEN total - held - sold - lent ELSE 0 END FROM sku WHERE id = $1 FOR UPDATE";

/// Lends units to a node for orders that take them in the same transaction.
const LEND_TAKEN: &str = "
    INSERT INTO stock_share (sku, node, lent) VALUES ($1, $2, $3)
    ON CONFLICT (sku, node) DO UPDATE SET lent = stock_share.lent + excluded.lent";

/// Notes which turn was served; $2 NULL: somebody may have been passed over. The sequence of ids says nothing about those who
/// were assigned up to now, $3.
const NOTE_SERVED: &str = "
    UPDATE sku SET waitlist_served = greatest($2::int8, CASE WHEN $2::int8 IS NOT NULL THEN waitlist_served END),
           waitlist_strict_since = greatest(waitlist_strict_since, to_timestamp(($3::int8 + 1) / 1000.0))
     WHERE id = $1";

/// Notes that these SKUs, and no others, have orders that wait at node $1.
const NOTE_LISTS: &str = "
    WITH ended AS (
        DELETE FROM waitlists WHERE node = $1 AND sku <> ALL ($2)
    )
    INSERT INTO waitlists (node, sku) SELECT $1, unnest($2::int4[]) ON CONFLICT DO NOTHING";

/// Those of these SKUs whose row is not locked.
const FREE_SKUS: &str =
    "SELECT @id FROM @ledger WHERE @id = ANY ($1)@own ORDER BY @id FOR UPDATE SKIP LOCKED";

const UNPAID_CHANGES: &str = "SELECT unpaid_changes FROM node WHERE node = $1";

/// Guarded: no older order has become unpaid again since $3 was read, and memory has the orders of every lane of this node.
/// Skips a locked row: whoever raises the epoch has it, and waits for this writer.
const UNPAID_FROM: &str = "
    UPDATE node SET unpaid_from = $4
     WHERE node = (SELECT node FROM node WHERE node = $1 AND epoch = $2 AND unpaid_changes = $3 FOR NO KEY UPDATE SKIP LOCKED)
       AND NOT EXISTS (SELECT FROM lane l WHERE l.node = $1 AND l.lane <> ALL ($5::int2[]))";

/// Writes a lost order from its receipt, unless it exists after all.
const RECOVER: &str = "
    INSERT INTO orders (order_id, user_id, sku, quantity, adjustment, amount, currency, status, created_at, expires_at,
                        key_hash, payload_hash, refund_reason)
    SELECT $1, $2, $3, $4, $5, $6, $7, $8, to_timestamp($9::int8 / 1000.0), to_timestamp($10::int8 / 1000.0),
           encode($11::bytea, 'hex')::uuid, $12, $13
     WHERE NOT EXISTS (SELECT FROM dead_letters d WHERE d.order_id = $1)
    ON CONFLICT (order_id) DO NOTHING";

/// A statement of a settlement.
#[derive(Clone, Copy, Debug)]
pub(super) enum Sql {
    Fence,
    Events,
    Known,
    Payments,
    Waiting,
    LockOrders,
    TryOrders,
    LockDeadLetters,
    MoveOrders,
    MoveDeadLetters,
    MovePayments,
    GiveUp,
    Look,
    LockOverdue,
    Expire,
    Assign,
    EndWaiting,
    LockWaiting,
    LockPool,
    Front,
    LeaveLists,
    LendTaken,
    NoteServed,
    NoteLists,
    FreeSkus,
    UnpaidChanges,
    UnpaidFrom,
    Recover,
    LockSkus,
    Counters,
    RefundSwept,
    ShareOrders,
    TryShareOrders,
}

const SQL: [&str; 33] = [
    FENCE,
    EVENTS,
    KNOWN,
    PAYMENTS,
    WAITING,
    LOCK_ORDERS,
    TRY_ORDERS,
    LOCK_DEAD_LETTERS,
    MOVE_ORDERS,
    MOVE_DEAD_LETTERS,
    MOVE_PAYMENTS,
    GIVE_UP,
    LOOK,
    LOCK_OVERDUE,
    EXPIRE,
    ASSIGN,
    END_WAITING,
    LOCK_WAITING,
    LOCK_POOL,
    lists::FRONT,
    lists::LEAVE,
    LEND_TAKEN,
    NOTE_SERVED,
    NOTE_LISTS,
    FREE_SKUS,
    UNPAID_CHANGES,
    UNPAID_FROM,
    RECOVER,
    LOCK_SKUS,
    COUNTERS,
    REFUND_SWEPT,
    SHARE_ORDERS,
    TRY_SHARE_ORDERS,
];

/// The statements prepared so far, in the order of [`Sql`].
#[derive(Debug)]
pub(super) struct Statements {
    lease: NodeLease,
    prepared: [OnceCell<Statement>; SQL.len()],
}

/// Changes of the counters of each SKU, by id, so that every transaction locks in the same order.
#[derive(Debug, Default)]
pub(super) struct Changes(BTreeMap<SkuNumber, Change>);

/// Changes of the counters of one SKU, in units.
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
    pub(super) fn new(lease: NodeLease) -> Self {
        let prepared = std::array::from_fn(|_| OnceCell::new());
        Statements { lease, prepared }
    }

    /// The lease of the process that they are written for.
    pub(super) fn lease(&self) -> NodeLease {
        self.lease
    }

    /// A statement, prepared on `client`.
    pub(super) async fn of(&self, client: &Client, sql: Sql) -> Result<&Statement, Error> {
        let index = sql as usize;
        let prepare = async || client.prepare(&self.lease.sql(SQL[index])).await;
        self.prepared[index].get_or_try_init(prepare).await
    }
}

/// Parameters of a statement.
type Parameters<'a> = Vec<Box<dyn ToSql + Sync + Send + 'a>>;

/// The last statements of a transaction, sent together with its COMMIT.
#[derive(Default)]
pub(super) struct Closing<'a>(Vec<(Sql, Parameters<'a>)>);

impl<'a> Closing<'a> {
    /// Adds a statement.
    pub(super) fn add(&mut self, sql: Sql, parameters: Parameters<'a>) {
        self.0.push((sql, parameters));
    }

    /// Moves counters. Each cause has entries of its own in the stock log, found by `reference`.
    pub(super) fn move_counters(&mut self, changes: &[(&'static str, Changes)], reference: &str) {
        let mut skus: Vec<i32> = changes
            .iter()
            .flat_map(|(_, changes)| changes.0.keys().map(|sku| sku.0))
            .collect();
        if skus.is_empty() {
            return;
        }
        skus.sort_unstable();
        skus.dedup();
        self.add(Sql::LockSkus, vec![Box::new(skus)]);
        for (cause, Changes(changes)) in changes {
            if changes.is_empty() {
                continue;
            }
            let skus: Vec<i32> = changes.keys().map(|sku| sku.0).collect();
            let column = |of: fn(&Change) -> i64| changes.values().map(of).collect::<Vec<i64>>();
            self.add(
                Sql::Counters,
                vec![
                    Box::new(skus),
                    Box::new(column(|change| change.total)),
                    Box::new(column(|change| change.held)),
                    Box::new(column(|change| change.sold)),
                    Box::new(*cause),
                    Box::new(reference.to_owned()),
                ],
            );
        }
    }

    /// The statements, in order.
    pub(super) fn statements(&self) -> impl Iterator<Item = Sql> {
        self.0.iter().map(|(sql, _)| *sql)
    }

    /// The statements with their parameters, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Sql, &Parameters<'a>)> {
        self.0.iter().map(|(sql, parameters)| (*sql, parameters))
    }
}
