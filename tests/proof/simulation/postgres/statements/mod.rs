//! The statements that the simulated server knows: ours, by their text, each with its types and its effect. What
//! PostgreSQL itself makes of the text is for the tests that have one.

mod aside;
mod node;
mod reads;
mod refunds;
mod settlement;
mod writers;

use std::rc::Rc;

use tokio_postgres::types::{FromSql, Type};

use super::locks::Waits;
use super::session::{Refused, Session, Statement};
use super::tables::{Key, Order, Row};

macro_rules! statements {
    ($($subject:ident { $($name:ident: $begin:literal, $($within:literal,)? ($parameters:literal) -> ($columns:literal);)* })*) => {
        /// A statement.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Sql { $($($name,)*)* }

        /// What statements are about: a file for each.
        enum Subject { $($subject,)* }

        impl Sql {
            fn subject(self) -> Subject {
                match self { $($(Sql::$name => Subject::$subject,)*)* }
            }
        }

        /// Each with the beginning of its text, something else in it, and the types of its parameters and columns.
        const STATEMENTS: &[(Sql, &str, &str, &str, &str)] = &[
            $($((Sql::$name, $begin, concat!("", $($within)?), $parameters, $columns),)*)*
        ];
    };
}

statements! {
    Writers {
        Resolve: "SELECT epoch, batch, pg_backend_pid() FROM writer", ("i2 i2") -> ("i8 i8 i4");
        EndSuspect: "SELECT pg_terminate_backend(pid) FROM pg_stat_activity", ("i4 t") -> ("b");
        FenceBatch: "UPDATE writer SET batch = $4::int8", "RETURNING EXISTS", ("i2 i2 i8 i8") -> ("b");
        Fence: "UPDATE writer SET batch = $4::int8", ("i2 i2 i8 i8") -> ("");
        CopyOrders: "COPY orders (", ("") -> ("");
        Counter: "WITH moved AS ( UPDATE sku SET held = held + $2::int8", ("i4 i8 t") -> ("");
        Counters: "WITH wanted AS ( SELECT w.sku, w.units FROM unnest", ("i4[] i8[] t") -> ("");
        Epoch: "SELECT epoch FROM node", ("i2") -> ("i8");
        Batches: "SELECT shard, batch FROM writer", ("i2") -> ("i2 i8");
        EndCounter: "WITH moved AS ( UPDATE sku SET held = held - $2::int8", ("i4 i8 t t") -> ("");
        SettleCounters: "WITH wanted AS ( SELECT * FROM unnest", ("i4[] i8[] i8[] i8[] t t") -> ("");
    }
    Settlement {
        Events: "INSERT INTO payment_events", ("i8[] t[] t[] t[] y[] t[]") -> ("");
        Known: "SELECT w.place FROM unnest", ("t[] t[]") -> ("i8");
        Payments: "INSERT INTO payments (", ("i8[] i8[] t[] t[] t[] i8[] i8[] t[] t[] t[] t[] i8 i8") -> ("");
        Waiting: "SELECT id, order_id, amount, currency, payment_id FROM payments", ("i8[]") -> ("i8 i8 i8 t t");
        TryOrders: "SELECT order_id, status, amount, currency, sku,", "FROM orders WHERE order_id = ANY ($1) ORDER BY order_id FOR UPDATE SKIP LOCKED", ("i8[]") -> ("i8 i2 i8 t i4 i4 t b");
        MoveOrders: "UPDATE orders o SET status = m.status", ("i8[] i2[] i2[] t[]") -> ("");
        MovePayments: "UPDATE payments p SET state = m.state", ("i8[] t[] t[] i8") -> ("");
        GiveUp: "UPDATE payments p SET state = 'refund_due'", ("i8 t i8") -> ("");
        Look: "WITH looked_at AS MATERIALIZED", ("i8 i8 i8 i8 i4") -> ("i8 i8 i8[] i4[] i8[]");
        Expire: "WITH due AS ( SELECT order_id FROM orders", ("i8[] i8 b") -> ("i8 t i4 i4");
        Assign: "WITH next AS ( SELECT order_id FROM orders", ("i8[] i8 i8") -> ("i8 t i4 i4");
        EndWaiting: "WITH ended AS ( SELECT order_id FROM orders", ("i8[] b") -> ("i8 t i4 i4");
        NoteLists: "WITH ended AS ( DELETE FROM waitlists", ("i2 i4[]") -> ("");
        FreeSkus: "SELECT id FROM sku WHERE id = ANY ($1)", "SKIP LOCKED", ("i4[]") -> ("i4");
        LockSkus: "SELECT id FROM sku WHERE id = ANY ($1)", ("i4[]") -> ("i4");
        UnpaidChanges: "SELECT unpaid_changes FROM node", ("i2") -> ("i8");
        UnpaidFrom: "UPDATE node SET unpaid_from = $4", ("i2 i8 i8 i8 i2[]") -> ("");
        LockOverdue: "SELECT order_id FROM orders WHERE order_id = ANY ($1) AND status = 1 AND expires_at", ("i8[] i8") -> ("i8");
        NoteCheck: "UPDATE payments SET checks = $2", ("i8 i4 i8") -> ("");
        NoteOrder: "UPDATE payments SET order_id = $2", ("i8 i8") -> ("");
        Recover: "INSERT INTO orders (order_id", ("i8 t i4 i4 i8 i8 t i2 i8 i8 y i8 t") -> ("");
    }
    Aside {
        CopyParked: "COPY parked_orders (", ("") -> ("");
        TakeParked: "DELETE FROM parked_orders WHERE order_id = ANY ($1)", ("i8[]") -> ("");
        ParkedBySku: "SELECT sku, count(*), sum(quantity)::int8 FROM parked_orders", ("i8[]") -> ("i4 i8 i8");
        ParkedOf: "SELECT p.order_id, p.user_id, s.sku_id, p.sku,", "WHERE p.sku = $1", ("i4 i8 i8[]") -> ("i8 t t i4 i4 i8 i8 t i8 i8 y i8 t");
        ParkedDue: "SELECT p.order_id, p.user_id, s.sku_id, p.sku,", "WHERE p.expires_at <=", ("i8 i8 i8 i8 i8[]") -> ("i8 t t i4 i4 i8 i8 t i8 i8 y i8 t");
        BuryParked: "WITH gone AS ( DELETE FROM parked_orders", "INSERT INTO dead_letters", ("i8 t t i2 i8") -> ("b");
        EndParked: "WITH gone AS ( DELETE FROM parked_orders", ("i8 i2 i8 b") -> ("t i4 i4");
        IsParked: "SELECT FROM parked_orders", ("i8") -> ("");
        WindowParked: "SELECT order_id, user_id, sku, quantity, key_hash, payload_hash, 1::int2", ("i8 i8 i8") -> ("i8 t i4 i4 u i8 i2 z");
        LiveParked: "SELECT order_id, user_id, sku, quantity FROM parked_orders", ("i8 i8 i8 i4[] i8[]") -> ("i8 t i4 i4");
        HeldUnits: "SELECT sku, sum(quantity)::int8 FROM orders", ("i2 i8 i2 i4[] i8[]") -> ("i4 i8");
        TryCounters: "UPDATE sku SET held = held + $2::int8 WHERE id = $1", ("i4 i8") -> ("");
        TotalOf: "SELECT total FROM sku WHERE sku_id = $1", ("t") -> ("i8");
        DeadLetter: "INSERT INTO dead_letters", ("i8 t i4 i4 i8 i8 t i8 i8 y i8 t t t i2 i8 t") -> ("");
        LockDeadLetters: "SELECT order_id, status, amount, currency, sku,", "FROM dead_letters", ("i8[]") -> ("i8 i2 i8 t i4 i4 t b");
        MoveDeadLetters: "UPDATE dead_letters d SET status = m.status", ("i8[] i2[] t[]") -> ("");
        WindowDead: "SELECT order_id, user_id, sku, quantity, key_hash, payload_hash, NULL::int2", ("i8 i8 i8") -> ("i8 t i4 i4 u i8 i2 z");
        FindLetter: "SELECT d.id, (extract(epoch FROM d.at)", "WHERE d.id = $1", ("i8") -> ("i8 i8 i8 t t i4 i4 i8 t t t t i8 t");
        LockLetter: "SELECT FROM dead_letters WHERE id = $1 FOR UPDATE", ("i8") -> ("");
        Discard: "UPDATE dead_letters SET discarded_at", ("i8 t") -> ("");
        Revive: "WITH gone AS ( DELETE FROM dead_letters", ("i8 i8") -> ("i8 i4 i4");
        NoteUnpaid: "UPDATE node SET unpaid_from = least", ("i2 i8") -> ("");
    }
    Refunds {
        LockOrders: "SELECT order_id, status, amount, currency, sku,", "FROM orders WHERE order_id = ANY ($1) ORDER BY order_id FOR UPDATE", ("i8[]") -> ("i8 i2 i8 t i4 i4 t b");
        MarkRefunded: "UPDATE payments SET state = 'refunded', changed_at = to_timestamp($3::int8", ("i8 t i8 t t") -> ("");
        IsRefunded: "SELECT FROM payments WHERE order_id = $1 AND state = 'refunded'", ("i8 t") -> ("");
        RefundOrder: "UPDATE orders SET status = $2 WHERE order_id = $1", ("i8 i2") -> ("");
        RefundLetter: "UPDATE dead_letters SET status = $2 WHERE order_id = $1", ("i8 i2") -> ("");
        Pause: "UPDATE sku SET paused = $2", ("t b") -> ("");
        EndOrder: "UPDATE orders SET status = $3", ("i8 i2[] i2 i8") -> ("t i4 i4 b");
    }
    Node {
        FenceNode: "SELECT 1 FROM node", ("i2 i8") -> ("i4");
        LockOut: "SELECT pg_try_advisory_lock(hashtextextended($1, 0))", ("t") -> ("b");
        LockHolder: "SELECT a.client_addr::text", ("t") -> ("t t");
        Mark: "SELECT pg_advisory_lock($1)", ("i8") -> ("t");
        EndMarked: "SELECT pg_terminate_backend(pid) FROM pg_locks", ("i8") -> ("b");
        IdsOfLanes: "SELECT max(ids_until_ms) FROM lane", ("") -> ("i8");
        NodeRow: "SELECT ids_leased_until_ms FROM node", ("i2") -> ("i8");
        RaiseEpoch: "INSERT INTO node (node, epoch", ("i2 i8") -> ("i8 b");
        RaiseWriters: "UPDATE writer SET epoch = $2", ("i2 i8") -> ("");
        AddWriters: "INSERT INTO writer", ("i2 i8 i4") -> ("");
        OtherNodes: "SELECT string_agg(node::text", ("") -> ("t");
        Single: "UPDATE node SET state = 'single'", ("i2") -> ("");
        TakeUnpaid: "WITH others AS ( UPDATE node", ("i2 i8") -> ("");
        Identity: "UPDATE database_identity", ("i8") -> ("y i8");
        Renew: "UPDATE node SET ids_leased_until_ms = greatest", ("i2 i8 i8 i8") -> ("");
        Timeline: "SELECT left(pg_walfile_name", ("") -> ("t");
    }
    Reads {
        StatusOf: "SELECT status FROM order_rows", ("i8") -> ("t");
        Find: "SELECT order_id, user_id, sku_id, quantity,", "FROM order_rows WHERE order_id = $1", ("i8") -> ("i8 t t i4 i8 i8 t t i8 i8 t i4 t y i8");
        Skus: "SELECT id, sku_id, title, unit_price", "FROM sku ORDER BY id", ("") -> ("i4 t t i8 t i8 i8 i8 i8 i8 i8 b i8 b i8 t i8 b");
        SkuNumbers: "SELECT sku_id, id FROM sku", ("") -> ("t i4");
        Draws: "SELECT d.sku, d.seed", ("") -> ("i4 y y i8 i8 i8 y y b");
        OrphanedOrders: "SELECT order_id, (extract(epoch FROM min(least(", ("") -> ("i8 i8");
        CountOpen: "SELECT count(*) FILTER (WHERE state = 'orphan')", ("") -> ("i8 i8 i8 i8");
        OrphansWithOrder: "SELECT * FROM (SELECT p.id, p.provider", "AND p.id > $1) p WHERE has_order", ("i8 i8") -> ("i8 t t t i8 i8 t t t t i8 i8 i4 i8 t t b i8");
        DueOrphans: "SELECT p.id, p.provider", "p.check_at <= to_timestamp($1", ("i8 i8") -> ("i8 t t t i8 i8 t t t t i8 i8 i4 i8 t t b i8");
        DigestOfRange: "SELECT sha256(string_agg(", ("i8 i8 i8") -> ("y");
        PresentInRange: "(SELECT order_id, user_id, payload_hash, 0 FROM orders", ("i8 i8 i8") -> ("i8 t i8 i4");
        PresentByIds: "SELECT order_id, user_id, payload_hash FROM orders", ("i8[]") -> ("i8 t i8");
        DeletedBelow: "SELECT below FROM orders_deleted", ("") -> ("i8");
        Absent: "SELECT id FROM unnest($1::int8[]) id", ("i8[]") -> ("i8");
        OpenAmong: "SELECT order_id FROM orders WHERE order_id = ANY ($1) AND status IN (1, 7)", ("i8[]") -> ("i8");
        OpenBelow: "SELECT order_id, user_id, sku, quantity, (extract(epoch FROM expires_at)", ("i2 i8 i8[]") -> ("i8 t i4 i4 i8");
        Ends: "SELECT (SELECT order_id FROM orders WHERE order_id >= $1", ("i8 i8") -> ("i8 i8 b");
        Window: "SELECT order_id, user_id, sku, quantity, key_hash, payload_hash, status,", ("i8 i8 i8") -> ("i8 t i4 i4 u i8 i2 z");
        FirstOfSkus: "SELECT (extract(epoch FROM coalesce(created_at", ("i4[]") -> ("i8");
        Live: "WITH part AS MATERIALIZED", ("i8 i8 i8 i4[] i8[] i2[]") -> ("i8 t i4 i4");
    }
}

fn type_of(word: &str) -> Type {
    match word {
        "i2" => Type::INT2,
        "i4" => Type::INT4,
        "i8" => Type::INT8,
        "t" => Type::TEXT,
        "b" => Type::BOOL,
        "y" => Type::BYTEA,
        "u" => Type::UUID,
        "z" => Type::TIMESTAMPTZ,
        "i2[]" => Type::INT2_ARRAY,
        "i4[]" => Type::INT4_ARRAY,
        "i8[]" => Type::INT8_ARRAY,
        "t[]" => Type::TEXT_ARRAY,
        "y[]" => Type::BYTEA_ARRAY,
        other => unreachable!("no type {other}"),
    }
}

/// The statement of a text, and the types of its parameters and columns.
pub fn known(text: &str) -> Option<Statement> {
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let found = STATEMENTS
        .iter()
        .find(|(_, begin, within, ..)| text.starts_with(begin) && text.contains(within));
    let (sql, _, _, parameters, columns) = found?;
    let types = |words: &str| words.split_whitespace().map(type_of).collect();
    Some((*sql, types(parameters), types(columns)))
}

/// A value of a result.
#[derive(Clone, Debug)]
pub enum Value {
    Null,
    I2(i16),
    I4(i32),
    I8(i64),
    Text(String),
    Bool(bool),
    Bytes(Vec<u8>),
    I4s(Vec<i32>),
    I8s(Vec<i64>),
}

use Value::{Bool, Bytes, I2, I4, I8, Null, Text};

fn text(value: &Option<String>) -> Value {
    value.clone().map_or(Null, Text)
}

fn i8_or_null(value: Option<i64>) -> Value {
    value.map_or(Null, I8)
}

/// A `timestamptz`.
fn moment(ms: i64) -> Value {
    I8((ms - 946_684_800_000) * 1_000)
}

/// The result of a statement: rows, or how many were changed.
pub type Done = (Vec<Vec<Value>>, u64);

fn rows(rows: Vec<Vec<Value>>) -> Result<Done, Refused> {
    let count = rows.len() as u64;
    Ok((rows, count))
}

fn changed(count: usize) -> Result<Done, Refused> {
    Ok((Vec::new(), count as u64))
}

/// The parameters of a statement, in binary form.
pub struct Parameters(pub Vec<Option<Vec<u8>>>);

impl Parameters {
    fn get<'a, T: FromSql<'a>>(&'a self, number: usize, of: &Type) -> Option<T> {
        let raw = self.0[number - 1].as_deref()?;
        Some(T::from_sql(of, raw).expect("a parameter of the declared type"))
    }
    fn i2(&self, number: usize) -> i16 {
        self.get(number, &Type::INT2).expect("an int2")
    }
    fn i4(&self, number: usize) -> i32 {
        self.get(number, &Type::INT4).expect("an int4")
    }
    fn i8(&self, number: usize) -> i64 {
        self.get(number, &Type::INT8).expect("an int8")
    }
    fn text(&self, number: usize) -> String {
        self.get(number, &Type::TEXT).expect("a text")
    }
    fn flag(&self, number: usize) -> bool {
        self.get(number, &Type::BOOL).expect("a bool")
    }
    fn i2s(&self, number: usize) -> Vec<Option<i16>> {
        self.get(number, &Type::INT2_ARRAY).expect("int2s")
    }
    fn i4s(&self, number: usize) -> Vec<i32> {
        self.get(number, &Type::INT4_ARRAY).expect("int4s")
    }
    fn i8s(&self, number: usize) -> Vec<i64> {
        self.get(number, &Type::INT8_ARRAY).expect("int8s")
    }
    fn i8s_or_null(&self, number: usize) -> Vec<Option<i64>> {
        self.get(number, &Type::INT8_ARRAY).expect("int8s")
    }
    /// An order of these parameters, from the second on: its buyer, what it is for, and its price.
    fn bought(&self) -> Order {
        Order {
            user: self.text(2),
            sku: self.i4(3),
            quantity: self.i4(4),
            adjustment: self.i8(5),
            amount: self.i8(6),
            currency: self.text(7),
            ..Order::default()
        }
    }
    fn texts(&self, number: usize) -> Vec<Option<String>> {
        self.get(number, &Type::TEXT_ARRAY).expect("texts")
    }
}

const PAYABLE: Option<i16> = Some(1);
const EXPIRED: Option<i16> = Some(4);
const WAITING: Option<i16> = Some(7);
/// `expires_at` of an order without time to pay, as `UnixMillis::NEVER`.
const NEVER_MS: i64 = 253_370_764_800_000;

fn refused(code: &'static str, why: &str) -> Refused {
    Refused {
        code,
        message: why.to_owned(),
    }
}

impl Session {
    /// Runs a statement within the transaction.
    pub async fn run(&mut self, sql: Sql, with: &Parameters) -> Result<Done, Refused> {
        match sql.subject() {
            Subject::Writers => self.run_writers(sql, with).await,
            Subject::Settlement => self.run_settlement(sql, with).await,
            Subject::Aside => self.run_aside(sql, with).await,
            Subject::Refunds => self.run_refunds(sql, with).await,
            Subject::Node => self.run_node(sql, with).await,
            Subject::Reads => self.run_reads(sql, with),
        }
    }

    /// An order, locked; `None` if there is none, or if it is locked and is not waited for.
    async fn locked_order(&mut self, id: i64, waits: Waits) -> Result<Option<Order>, Refused> {
        let key = Key::Order(id);
        if !self.view(|view| view.has(&key)) || !self.lock(&key, waits).await? {
            return Ok(None);
        }
        Ok(self.view(|view| view.order(&key)))
    }

    fn put(&mut self, key: Key, row: Row) {
        self.written.insert(key, Some(Rc::new(row)));
    }

    fn delete(&mut self, key: Key) {
        self.written.insert(key, None);
    }
}

fn sorted(mut ids: Vec<i64>) -> Vec<i64> {
    ids.sort_unstable();
    ids.dedup();
    ids
}

fn is_open(order: &Order) -> bool {
    order.status == PAYABLE || order.status == WAITING
}

fn units(id: i64, order: &Order) -> Vec<Value> {
    let user = Text(order.user.clone());
    vec![I8(id), user, I4(order.sku), I4(order.quantity)]
}

fn facts(id: i64, one: Order) -> Vec<Value> {
    let was_payable = Bool(one.expires_ms < NEVER_MS);
    let status = one.status.map_or(Null, I2);
    let (currency, user) = (Text(one.currency), Text(one.user));
    vec![
        I8(id),
        status,
        I8(one.amount),
        currency,
        I4(one.sku),
        I4(one.quantity),
        user,
        was_payable,
    ]
}

/// A row of the idempotency window. `until`: the end of its time to pay, if it is open.
fn window_row(id: i64, one: &Order, status: Option<i16>, until: Option<i64>) -> Vec<Value> {
    let mut row = units(id, one);
    row.push(one.key.clone().map_or(Null, Bytes));
    row.push(I8(one.payload));
    row.push(status.map_or(Null, I2));
    row.push(until.map_or(Null, moment));
    row
}
