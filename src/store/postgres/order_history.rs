//! What is stored about an order besides the order itself: its payments with their messages, its dead letter, and
//! the entries of the stock log that name it.

use tokio_postgres::{IsolationLevel, Row};

use super::Database;
use super::dead_letters::{self, DeadLetter};
use super::payments::{self, StoredPayment};
use crate::order::{OrderId, UnixMillis};
use crate::store::StoreError;

/// Most rows of each kind.
const ROWS_MAX: i64 = 200;

/// What is stored about an order, each list in the sequence of its events.
#[derive(Debug, Default)]
pub struct OrderHistory {
    /// The payments that name it.
    pub payments: Vec<StoredPayment>,
    /// The messages about these payments.
    pub events: Vec<PaymentEvent>,
    /// Its dead letter.
    pub dead_letter: Option<DeadLetter>,
    /// The entries of the stock log that name this order alone: cancelled, retried, recovered, refunded. What a
    /// batch or a transaction moves for several orders together is one entry, which names none of them.
    pub stock_log: Vec<StockLogEntry>,
}

impl OrderHistory {
    /// Whether nothing is stored.
    pub fn is_empty(&self) -> bool {
        self.payments.is_empty() && self.dead_letter.is_none() && self.stock_log.is_empty()
    }
}

/// A payment provider's message, as it was stored.
#[derive(Clone, Debug)]
pub struct PaymentEvent {
    /// Its number in `payment_events`.
    pub id: i64,
    /// Time of its arrival.
    pub received_at: UnixMillis,
    /// The provider's name.
    pub provider: String,
    /// The provider's id of it.
    pub event_id: String,
    /// What it reports, in the provider's words.
    pub kind: String,
    /// The payment that it is about.
    pub payment_id: String,
    /// The body as it came.
    pub body: Vec<u8>,
}

/// An entry of the stock log.
#[derive(Clone, Debug)]
pub struct StockLogEntry {
    /// Its number in `stock_log`.
    pub id: i64,
    /// Its time.
    pub at: UnixMillis,
    /// Why units moved.
    pub cause: String,
    /// Change of the total, in units.
    pub total_delta: i64,
    /// Change of the held units.
    pub held_delta: i64,
    /// Change of the sold units.
    pub sold_delta: i64,
    /// The total after it.
    pub total_after: i64,
    /// The held units after it.
    pub held_after: i64,
    /// The sold units after it.
    pub sold_after: i64,
}

const EVENTS: &str = "
    SELECT e.id, (extract(epoch FROM e.received_at) * 1000)::int8, e.provider, e.event_id, e.kind, e.payment_id, e.body
      FROM payments p JOIN payment_events e ON e.provider = p.provider AND e.payment_id = p.payment_id
     WHERE p.order_id = $1 ORDER BY e.id LIMIT $2";

/// With the condition of the index `stock_log_order`.
const STOCK_LOG: &str = "
    SELECT id, (extract(epoch FROM at) * 1000)::int8, cause, total_delta, held_delta, sold_delta,
           total_after, held_after, sold_after
      FROM stock_log WHERE reference ~ '^[0-9]+$' AND reference = $1 ORDER BY id LIMIT $2";

/// Reads what is stored about an order, as of one moment.
///
/// # Errors
/// If the database does not answer.
pub async fn find(database: &Database, id: OrderId) -> Result<OrderHistory, StoreError> {
    let mut client = database.pooled().await?;
    let (order_id, name) = (id.as_i64(), id.to_string());
    let work = async {
        let snapshot = client
            .build_transaction()
            .isolation_level(IsolationLevel::RepeatableRead)
            .read_only(true)
            .start()
            .await?;
        let payments = snapshot
            .query(&payments::of_order(), &[&order_id, &ROWS_MAX])
            .await?;
        let events = snapshot.query(EVENTS, &[&order_id, &ROWS_MAX]).await?;
        let letter = snapshot
            .query_opt(&dead_letters::of_order(), &[&order_id])
            .await?;
        let stock_log = snapshot.query(STOCK_LOG, &[&name, &ROWS_MAX]).await?;
        snapshot.commit().await?;
        Ok((payments, events, letter, stock_log))
    };
    let (payments, events, letter, stock_log) = database
        .timed("reading the history of an order", work)
        .await?;
    Ok(OrderHistory {
        payments: payments
            .iter()
            .map(payments::from_row)
            .collect::<Result<_, _>>()?,
        events: events.iter().map(event).collect(),
        dead_letter: letter.as_ref().map(dead_letters::from_row).transpose()?,
        stock_log: stock_log.iter().map(entry).collect(),
    })
}

fn event(row: &Row) -> PaymentEvent {
    PaymentEvent {
        id: row.get(0),
        received_at: UnixMillis(row.get(1)),
        provider: row.get(2),
        event_id: row.get(3),
        kind: row.get(4),
        payment_id: row.get(5),
        body: row.get(6),
    }
}

fn entry(row: &Row) -> StockLogEntry {
    StockLogEntry {
        id: row.get(0),
        at: UnixMillis(row.get(1)),
        cause: row.get(2),
        total_delta: row.get(3),
        held_delta: row.get(4),
        sold_delta: row.get(5),
        total_after: row.get(6),
        held_after: row.get(7),
        sold_after: row.get(8),
    }
}
