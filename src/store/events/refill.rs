//! The rows that have changed since a place, for a sink whose slot is gone.
//!
//! Rows are read part by part while the new slot is read on. A part knows the snapshot that it was read in, so that
//! each change is told once and none is told after a later one:
//!
//! * a change of a row that is not read yet is left to its part, which has to see it;
//! * a change of a row that was read is told, unless its part has seen it.
//!
//! Which rows: those whose newest version was written by the place's transaction or a later one (`xmin`). Of a row
//! that changed several times the newest change alone is told.

use std::collections::HashSet;

use tokio_postgres::Row;

use super::{Change, Changed, ChangedPayment, Table, Transaction, rows, sinks::Refill};
use crate::order::payment::{PaymentState, RefundReason};
use crate::order::{KeyHash, OrderId, OrderStatus, PayloadHash, SkuNumber, UnixMillis};
use crate::store::StoreError;
use crate::store::postgres::Database;
use crate::store::postgres::orders::StoredOrder;

/// Rows that are looked at in one statement.
const PART_ROWS: i64 = 5_000;

/// The tables, in the order in which they are read.
const TABLES: [Table; 3] = [Table::Orders, Table::DeadLetters, Table::Payments];

/// A refill in progress.
#[derive(Debug)]
pub struct Refilling {
    refill: Refill,
    /// The parts read so far of each table: the last id of each, and what it has seen.
    parts: [Vec<(i64, Snapshot)>; 3],
    /// Index of the table that is being read; behind the last one all are read.
    table: usize,
    /// Transactions with changes that were left to parts not yet read.
    left: HashSet<u32>,
}

impl Refilling {
    /// Begins a refill.
    pub fn new(refill: Refill) -> Self {
        let mut parts: [Vec<(i64, Snapshot)>; 3] = Default::default();
        // Ids that are not asked for have seen nothing, so their changes are told.
        parts[0].push((refill.after, Snapshot::default()));
        parts[1].push((refill.after, Snapshot::default()));
        Refilling {
            refill,
            parts,
            table: 0,
            left: HashSet::new(),
        }
    }

    /// What was asked for.
    pub fn refill(&self) -> Refill {
        self.refill
    }

    /// Whether every part is read.
    pub fn is_read(&self) -> bool {
        self.table >= TABLES.len()
    }

    /// Reads the next part. `None`: a transaction whose changes were left to it cannot be seen yet, because it waits
    /// for a standby; ask again.
    ///
    /// # Errors
    /// If the database does not answer.
    pub async fn next(&mut self, database: &Database) -> Result<Option<Vec<Change>>, StoreError> {
        let Some(table) = TABLES.get(self.table) else {
            return Ok(Some(Vec::new()));
        };
        let parts = &mut self.parts[self.table];
        let after = parts.last().map_or(0, |(through, _)| *through);
        let part = read(database, *table, after, self.refill).await?;
        if !self.left.iter().all(|xid| part.snapshot.sees(*xid)) {
            return Ok(None);
        }
        parts.push((part.through.unwrap_or(i64::MAX), part.snapshot));
        if part.through.is_none() {
            self.table += 1;
            if self.is_read() {
                self.left.clear();
            }
        }
        Ok(Some(part.changes))
    }

    /// Takes out of a transaction what parts have told or will tell.
    pub fn screen(&mut self, transaction: &mut Transaction) {
        let (parts, left, xid) = (&self.parts, &mut self.left, transaction.xid);
        transaction.changes.retain(|change| {
            let id = match &change.of {
                Changed::Order(order, _) => order.id.as_i64(),
                Changed::Payment(payment) => payment.id,
            };
            let parts = &parts[change.table as usize];
            let part = parts.partition_point(|(through, _)| *through < id);
            match parts.get(part) {
                Some((_, snapshot)) => !snapshot.sees(xid),
                None => {
                    left.insert(xid);
                    false
                }
            }
        });
    }
}

/// Which transactions a statement has seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Snapshot {
    /// Every transaction below it had ended.
    xmin: u64,
    /// No transaction from it on had ended.
    xmax: u64,
    /// Those between that had not ended.
    open: Vec<u64>,
}

impl Snapshot {
    /// Reads the text form of `pg_snapshot`: `xmin:xmax:xip,xip`.
    fn parse(text: &str) -> Option<Self> {
        let mut fields = text.split(':');
        let xmin = fields.next()?.parse().ok()?;
        let xmax = fields.next()?.parse().ok()?;
        let open = fields.next()?.split(',').filter(|xid| !xid.is_empty());
        let open = open.map(|xid| xid.parse().ok()).collect::<Option<_>>()?;
        Some(Snapshot { xmin, xmax, open })
    }

    /// Whether it has seen a transaction that is committed by now. Numbers come without their epoch, and are less than
    /// half of their range away.
    fn sees(&self, xid: u32) -> bool {
        const RANGE: u64 = 1 << 32;
        let near = (self.xmax & !(RANGE - 1)) | u64::from(xid);
        let xid = if near > self.xmax + RANGE / 2 {
            near.saturating_sub(RANGE)
        } else if near + RANGE / 2 < self.xmax {
            near + RANGE
        } else {
            near
        };
        xid < self.xmax && (xid < self.xmin || !self.open.contains(&xid))
    }
}

struct Part {
    snapshot: Snapshot,
    /// The last id that was looked at; `None`: there are no more.
    through: Option<i64>,
    changes: Vec<Change>,
}

/// Columns of `orders` and `dead_letters`.
const ORDER: &str = "order_id, user_id, sku, quantity, adjustment, amount, currency, status,
    (extract(epoch FROM created_at) * 1000)::int8 AS created_at, (extract(epoch FROM expires_at) * 1000)::int8 AS expires_at,
    attributes::text AS attributes, refund_reason, decode(replace(key_hash::text, '-', ''), 'hex') AS key_hash,
    payload_hash, previous_status, traceparent";

const PAYMENT: &str =
    "id, provider, payment_id, order_ref, order_id, amount, currency, state, refund_reason,
    (extract(epoch FROM received_at) * 1000)::int8 AS received_at";

async fn read(
    database: &Database,
    table: Table,
    after: i64,
    refill: Refill,
) -> Result<Part, StoreError> {
    let (from, id, columns, which) = match table {
        Table::Orders => ("orders", "order_id", ORDER, "true"),
        Table::DeadLetters => ("dead_letters", "order_id", ORDER, "true"),
        Table::Payments => (
            "payments",
            "id",
            PAYMENT,
            "state IN ('orphan', 'refund_due')",
        ),
    };
    // `age` compares with the newest number, and wraps after 2^31.
    let sql = format!(
        "WITH looked_at AS MATERIALIZED (
             SELECT xmin AS written_by, * FROM {from} WHERE {id} > $1 ORDER BY {id} LIMIT $2
         ), taken AS (
             SELECT {columns}, coalesce(transition, 1)::int4 AS transition FROM looked_at
              WHERE {which} AND ($3::int8 <= 3
                                 OR pg_snapshot_xmax(pg_current_snapshot())::text::int8 - $3::int8 > 2000000000
                                 OR age(written_by) <= age((($3::int8 % 4294967296)::text)::xid))
         )
         SELECT pg_current_snapshot()::text AS snapshot, (SELECT count(*) FROM looked_at) AS looked_at,
                (SELECT max({id}) FROM looked_at) AS through,
                (extract(epoch FROM clock_timestamp()) * 1000)::int8 AS at, t.{id} IS NOT NULL AS is_there, t.*
           FROM (SELECT) one LEFT JOIN taken t ON true ORDER BY t.{id}"
    );
    let client = database.pooled().await?;
    let rows = database
        .timed(
            "reading what a sink has missed",
            client.query(&sql, &[&after, &PART_ROWS, &refill.from_xid]),
        )
        .await?;
    let first = rows
        .first()
        .ok_or_else(|| StoreError::Data("an outer join without a row".to_owned()))?;
    let text: &str = first.get("snapshot");
    let snapshot =
        Snapshot::parse(text).ok_or_else(|| StoreError::Data(format!("a snapshot is {text:?}")))?;
    let through = (first.get::<_, i64>("looked_at") == PART_ROWS).then(|| first.get("through"));
    let changes = rows
        .iter()
        .filter(|row| row.get("is_there"))
        .map(|row| change(row, table));
    Ok(Part {
        snapshot,
        through,
        changes: changes.collect::<Result<_, _>>()?,
    })
}

fn change(row: &Row, table: Table) -> Result<Change, StoreError> {
    let unexpected = |what: &str| StoreError::Data(format!("a row that a sink has missed: {what}"));
    let of = match table {
        Table::Payments => {
            let state = PaymentState::from_word(row.get("state"));
            Changed::Payment(Box::new(ChangedPayment {
                id: row.get("id"),
                provider: row.get("provider"),
                payment_id: row.get("payment_id"),
                order_ref: row.get("order_ref"),
                order_id: row
                    .get::<_, Option<i64>>("order_id")
                    .and_then(OrderId::from_i64),
                amount: row.get("amount"),
                currency: row.get("currency"),
                state: state.ok_or_else(|| unexpected("unknown state"))?,
                refund_reason: row
                    .get::<_, Option<&str>>("refund_reason")
                    .and_then(RefundReason::from_word),
                received_at: UnixMillis(row.get("received_at")),
            }))
        }
        Table::Orders | Table::DeadLetters => {
            let status = match row.get::<_, Option<i16>>("status") {
                None => Some(OrderStatus::Failed),
                Some(code) => OrderStatus::from_code(code),
            };
            let previous = row.get::<_, Option<i16>>("previous_status");
            let order = StoredOrder {
                id: OrderId::from_i64(row.get("order_id"))
                    .ok_or_else(|| unexpected("no order id"))?,
                user_id: row.get("user_id"),
                sku_id: String::new(),
                sku: SkuNumber(row.get("sku")),
                quantity: u32::try_from(row.get::<_, i32>("quantity"))
                    .map_err(|_| unexpected("negative quantity"))?,
                adjustment: row.get("adjustment"),
                amount: row.get("amount"),
                currency: row.get("currency"),
                status: status.ok_or_else(|| unexpected("unknown status"))?,
                created_at: UnixMillis(row.get("created_at")),
                expires_at: UnixMillis(row.get("expires_at")),
                attributes: row.get("attributes"),
                refund_reason: row.get("refund_reason"),
                key: row
                    .get::<_, Option<&[u8]>>("key_hash")
                    .and_then(|bytes| bytes.try_into().ok())
                    .map(KeyHash),
                payload: PayloadHash(row.get::<_, i64>("payload_hash").cast_unsigned()),
            };
            Changed::Order(Box::new(order), previous.and_then(rows::previous))
        }
    };
    Ok(Change {
        table,
        transition: u32::try_from(row.get::<_, i32>("transition"))
            .map_err(|_| unexpected("no number of a transition"))?,
        at: UnixMillis(row.get("at")),
        traceparent: match table {
            Table::Orders | Table::DeadLetters => row.get("traceparent"),
            Table::Payments => None,
        },
        of,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_sees_what_had_ended() {
        let snapshot = Snapshot::parse("100:110:103,105").unwrap();
        for (xid, sees) in [
            (99, true),
            (100, true),
            (103, false),
            (104, true),
            (105, false),
            (109, true),
            (110, false),
        ] {
            assert_eq!(snapshot.sees(xid), sees, "{xid}");
        }
        assert_eq!(Snapshot::parse("7:7:").unwrap().open, [0; 0]);
        for bad in ["", "7", "7:8", "7:8:x", "a:8:"] {
            assert_eq!(Snapshot::parse(bad), None, "{bad}");
        }
        assert!(
            !Snapshot::default().sees(3),
            "nothing had ended before the first transaction"
        );
    }

    #[test]
    fn numbers_without_their_epoch_are_those_nearby() {
        let epoch = 1_u64 << 32;
        let snapshot = Snapshot {
            xmin: epoch + 2,
            xmax: epoch + 10,
            open: vec![epoch + 4],
        };
        assert!(snapshot.sees(u32::MAX), "of the epoch before");
        assert!(snapshot.sees(3) && !snapshot.sees(4) && !snapshot.sees(10));
        let before = Snapshot {
            xmin: epoch - 2,
            xmax: epoch - 1,
            open: vec![],
        };
        assert!(!before.sees(5), "of the epoch behind");
    }
}
