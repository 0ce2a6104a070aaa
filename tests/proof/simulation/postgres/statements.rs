//! The statements that the simulated server knows: ours, by their text, each with its types and its effect. What
//! PostgreSQL itself makes of the text is for the tests that have one.

use std::collections::BTreeMap;
use std::rc::Rc;

use tokio_postgres::types::{FromSql, Type};

use super::locks::Waits;
use super::session::{Refused, Session, Statement};
use super::tables::{Key, Node, Order, Payment, Row, View, Writer};

macro_rules! statements {
    ($($name:ident: $begin:literal, $($within:literal,)? ($parameters:literal) -> ($columns:literal);)*) => {
        /// A statement.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Sql { $($name,)* }

        /// Each with the beginning of its text, something else in it, and the types of its parameters and columns.
        const STATEMENTS: &[(Sql, &str, &str, &str, &str)] = &[
            $((Sql::$name, $begin, concat!("", $($within)?), $parameters, $columns),)*
        ];
    };
}

statements! {
    // Writers.
    Resolve: "SELECT epoch, batch, pg_backend_pid() FROM writer", ("i2 i2") -> ("i8 i8 i4");
    EndSuspect: "SELECT pg_terminate_backend(pid) FROM pg_stat_activity", ("i4 t") -> ("b");
    FenceBatch: "UPDATE writer SET batch = $4::int8", "RETURNING EXISTS", ("i2 i2 i8 i8") -> ("b");
    Fence: "UPDATE writer SET batch = $4::int8", ("i2 i2 i8 i8") -> ("");
    CopyOrders: "COPY orders (", ("") -> ("");
    Counter: "WITH moved AS ( UPDATE sku SET held = held + $2::int8", ("i4 i8 t") -> ("");
    Counters: "WITH wanted AS ( SELECT w.sku, w.units FROM unnest", ("i4[] i8[] t") -> ("");
    DeadLetter: "INSERT INTO dead_letters", ("i8 t i4 i4 i8 i8 t i8 i8 y i8 t t t i2 i8 t") -> ("");
    Epoch: "SELECT epoch FROM node", ("i2") -> ("i8");
    Batches: "SELECT shard, batch FROM writer", ("i2") -> ("i2 i8");
    // Payments, expiry, waiting lists.
    Events: "INSERT INTO payment_events", ("i8[] t[] t[] t[] y[] t[]") -> ("");
    Known: "SELECT w.place FROM unnest", ("t[] t[]") -> ("i8");
    Payments: "INSERT INTO payments (", ("i8[] i8[] t[] t[] t[] i8[] i8[] t[] t[] t[] t[] i8 i8") -> ("");
    Waiting: "SELECT id, order_id, amount, currency, payment_id FROM payments", ("i8[]") -> ("i8 i8 i8 t t");
    TryOrders: "SELECT order_id, status, amount, currency, sku,", "FROM orders WHERE order_id = ANY ($1) ORDER BY order_id FOR UPDATE SKIP LOCKED", ("i8[]") -> ("i8 i2 i8 t i4 i4 t b");
    LockDeadLetters: "SELECT order_id, status, amount, currency, sku,", "FROM dead_letters", ("i8[]") -> ("i8 i2 i8 t i4 i4 t b");
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
    Recover: "INSERT INTO orders (order_id", ("i8 t i4 i4 i8 i8 t i2 i8 i8 y i8 t") -> ("");
    SettleCounters: "WITH wanted AS ( SELECT * FROM unnest", ("i4[] i8[] i8[] i8[] t t") -> ("");
    // Ends of single orders.
    FenceNode: "SELECT 1 FROM node", ("i2 i8") -> ("i4");
    EndOrder: "UPDATE orders SET status = $3", ("i8 i2[] i2 i8") -> ("t i4 i4 b");
    EndParked: "WITH gone AS ( DELETE FROM parked_orders", ("i8 i2 i8 b") -> ("t i4 i4");
    StatusOf: "SELECT status FROM order_rows", ("i8") -> ("t");
    EndCounter: "WITH moved AS ( UPDATE sku SET held = held - $2::int8", ("i4 i8 t t") -> ("");
    Find: "SELECT order_id, user_id, sku_id, quantity,", "FROM order_rows WHERE order_id = $1", ("i8") -> ("i8 t t i4 i8 i8 t t i8 i8 t i4 t y i8");
    // Leases.
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
    // Reads.
    Skus: "SELECT id, sku_id, title, unit_price", "FROM sku ORDER BY id", ("") -> ("i4 t t i8 t i8 i8 i8 i8 i8 i8 b i8 b i8 t i8 b");
    SkuNumbers: "SELECT sku_id, id FROM sku", ("") -> ("t i4");
    Draws: "SELECT d.sku, d.seed", ("") -> ("i4 y y i8 i8 i8 y y b");
    OrphanedOrders: "SELECT order_id, (extract(epoch FROM min(least(", ("") -> ("i8 i8");
    CountOpen: "SELECT count(*) FILTER (WHERE state = 'orphan')", ("") -> ("i8 i8 i8 i8");
    OrphansWithOrder: "SELECT * FROM (SELECT p.id, p.provider", "AND p.id > $1) p WHERE has_order", ("i8 i8") -> ("i8 t t t i8 i8 t t t t i8 i8 i4 i8 t t b i8");
    DueOrphans: "SELECT p.id, p.provider", "p.check_at <= to_timestamp($1", ("i8 i8") -> ("i8 t t t i8 i8 t t t t i8 i8 i4 i8 t t b i8");
    NoteCheck: "UPDATE payments SET checks = $2", ("i8 i4 i8") -> ("");
    NoteOrder: "UPDATE payments SET order_id = $2", ("i8 i8") -> ("");
    PresentInRange: "(SELECT order_id, user_id, payload_hash, 0 FROM orders", ("i8 i8 i8") -> ("i8 t i8 i4");
    PresentByIds: "SELECT order_id, user_id, payload_hash FROM orders", ("i8[]") -> ("i8 t i8");
    Absent: "SELECT id FROM unnest($1::int8[]) id", ("i8[]") -> ("i8");
    OpenAmong: "SELECT order_id FROM orders WHERE order_id = ANY ($1) AND status IN (1, 7)", ("i8[]") -> ("i8");
    OpenBelow: "SELECT order_id, user_id, sku, quantity, (extract(epoch FROM expires_at)", ("i2 i8 i8[]") -> ("i8 t i4 i4 i8");
    ParkedBySku: "SELECT sku, count(*), sum(quantity)::int8 FROM parked_orders", ("i8[]") -> ("i4 i8 i8");
    Ends: "SELECT (SELECT order_id FROM orders WHERE order_id >= $1", ("i8 i8") -> ("i8 i8 b");
    Window: "SELECT order_id, user_id, sku, quantity, key_hash, payload_hash, status,", ("i8 i8 i8") -> ("i8 t i4 i4 u i8 i2 z");
    WindowDead: "SELECT order_id, user_id, sku, quantity, key_hash, payload_hash, NULL::int2", ("i8 i8 i8") -> ("i8 t i4 i4 u i8 i2 z");
    WindowParked: "SELECT order_id, user_id, sku, quantity, key_hash, payload_hash, 1::int2", ("i8 i8 i8") -> ("i8 t i4 i4 u i8 i2 z");
    FirstOfSkus: "SELECT (extract(epoch FROM coalesce(created_at", ("i4[]") -> ("i8");
    IsParked: "SELECT FROM parked_orders", ("i8") -> ("");
    LiveParked: "SELECT order_id, user_id, sku, quantity FROM parked_orders", ("i8 i8 i8 i4[] i8[]") -> ("i8 t i4 i4");
    Live: "WITH part AS MATERIALIZED", ("i8 i8 i8 i4[] i8[] i2[]") -> ("i8 t i4 i4");
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

use Value::{Bool, Bytes, I2, I4, I4s, I8, I8s, Null, Text};

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
        match sql {
            Sql::Resolve => {
                let key = Key::Writer(with.i2(2));
                self.lock(&key, Waits::Long).await?;
                let writer = self.view(|view| view.writer(&key));
                let pid = self.pid;
                let row = |writer: Writer| vec![I8(writer.epoch), I8(writer.batch), I4(pid)];
                rows(writer.map(row).into_iter().collect())
            }
            Sql::EndSuspect => {
                let ended = self.server.end_session(with.i4(1), Some(&with.text(2)));
                rows(ended.then(|| vec![Bool(true)]).into_iter().collect())
            }
            Sql::FenceBatch | Sql::Fence => {
                let (key, epoch, batch) = (Key::Writer(with.i2(2)), with.i8(3), with.i8(4));
                self.lock(&key, Waits::Long).await?;
                let writer = self.view(|view| view.writer(&key));
                let ours =
                    writer.filter(|writer| writer.epoch == epoch && writer.batch == batch - 1);
                let Some(writer) = ours else {
                    return changed(0);
                };
                self.put(key, Row::Writer(Writer { batch, ..writer }));
                match sql {
                    Sql::FenceBatch => rows(vec![vec![Bool(false)]]),
                    _ => changed(1),
                }
            }
            Sql::CopyOrders => unreachable!("a COPY has its own messages"),
            Sql::Counter => {
                self.move_counters(&[(with.i4(1), [0, with.i8(2), 0])])
                    .await
            }
            Sql::EndCounter => {
                let units = with.i8(2);
                self.move_counters(&[(with.i4(1), [0, -units, 0])]).await
            }
            Sql::Counters => {
                let moved: Vec<_> = with
                    .i4s(1)
                    .into_iter()
                    .zip(with.i8s(2))
                    .map(|(sku, units)| (sku, [0, units, 0]))
                    .collect();
                self.move_counters(&moved).await
            }
            Sql::SettleCounters => {
                let (total, held, sold) = (with.i8s(2), with.i8s(3), with.i8s(4));
                let skus = with.i4s(1).into_iter().enumerate();
                let moved: Vec<_> = skus
                    .map(|(at, sku)| (sku, [total[at], held[at], sold[at]]))
                    .collect();
                self.move_counters(&moved).await
            }
            Sql::DeadLetter => {
                let epoch = self
                    .view(|view| view.node(&Key::Node))
                    .map(|node| node.epoch);
                let key = Key::DeadLetter(with.i8(1));
                if epoch != Some(with.i8(16)) || self.view(|view| view.has(&key)) {
                    return changed(0);
                }
                let order = Order {
                    user: with.text(2),
                    sku: with.i4(3),
                    quantity: with.i4(4),
                    adjustment: with.i8(5),
                    amount: with.i8(6),
                    currency: with.text(7),
                    status: None,
                    created_ms: with.i8(8),
                    expires_ms: with.i8(9),
                    key: with.0[9].clone(),
                    payload: with.i8(11),
                    attributes: with.get::<&str>(12, &Type::TEXT).map(Rc::from),
                    reason: None,
                    assigned_ms: None,
                };
                self.put(key, Row::DeadLetter(order));
                changed(1)
            }
            Sql::Epoch => {
                let node = self.view(|view| view.node(&Key::Node));
                rows(node.map(|node| vec![I8(node.epoch)]).into_iter().collect())
            }
            Sql::Batches => {
                let writers = self.view(|view| view.writers());
                let writers = writers.into_iter();
                rows(
                    writers
                        .map(|(shard, one)| vec![I2(shard), I8(one.batch)])
                        .collect(),
                )
            }
            Sql::Events => {
                let (providers, ids, payments) = (with.texts(2), with.texts(3), with.texts(6));
                let mut new = 0;
                for at in 0..ids.len() {
                    let name = |texts: &[Option<String>]| texts[at].clone().unwrap_or_default();
                    let key = Key::Event(name(&providers), name(&ids), payments[at].clone());
                    if !self.view(|view| view.has(&key)) {
                        self.put(key, Row::Event);
                        new += 1;
                    }
                }
                changed(new)
            }
            Sql::Known => {
                let names = with.texts(1).into_iter().zip(with.texts(2)).enumerate();
                let known = names.filter_map(|(at, (provider, id))| {
                    let key = Key::PaymentId(provider?, id?);
                    self.view(|view| view.has(&key))
                        .then(|| vec![I8(at as i64 + 1)])
                });
                rows(known.collect())
            }
            Sql::Payments => self.store_payments(with),
            Sql::Waiting => {
                let ids = with.i8s(1);
                let orphan = |_: i64, one: &Payment| {
                    one.state == "orphan" && one.order.is_some_and(|id| ids.contains(&id))
                };
                let mut found = Vec::new();
                for (id, _) in self.view(|view| view.payments(orphan)) {
                    self.lock(&Key::Payment(id), Waits::Long).await?;
                    let payment = self.view(|view| view.payment(&Key::Payment(id)));
                    if let Some(one) = payment.filter(|one| one.state == "orphan") {
                        let order = one.order.map_or(Null, I8);
                        let (currency, name) = (Text(one.currency), Text(one.payment_id));
                        found.push(vec![I8(id), order, I8(one.amount), currency, name]);
                    }
                }
                rows(found)
            }
            Sql::TryOrders => {
                let mut found = Vec::new();
                for id in sorted(with.i8s(1)) {
                    if let Some(one) = self.locked_order(id, Waits::Not).await? {
                        found.push(facts(id, one));
                    }
                }
                rows(found)
            }
            Sql::LockDeadLetters => {
                let letter = |id: i64| match &*self.view(|view| view.get(&Key::DeadLetter(id)))? {
                    Row::DeadLetter(one) => Some(facts(id, one.clone())),
                    _ => None,
                };
                rows(sorted(with.i8s(1)).into_iter().filter_map(letter).collect())
            }
            Sql::MoveOrders => {
                let (was, now, reasons) = (with.i2s(2), with.i2s(3), with.texts(4));
                let mut moved = 0;
                for (at, id) in with.i8s(1).into_iter().enumerate() {
                    let Some(mut order) = self.locked_order(id, Waits::Long).await? else {
                        continue;
                    };
                    if order.status == was[at] {
                        order.status = now[at];
                        order.reason = reasons[at].clone().or(order.reason);
                        self.put(Key::Order(id), Row::Order(order));
                        moved += 1;
                    }
                }
                changed(moved)
            }
            Sql::MovePayments => {
                let (states, reasons, now) = (with.texts(2), with.texts(3), with.i8(4));
                let mut moved = 0;
                for (at, id) in with.i8s(1).into_iter().enumerate() {
                    let state = states[at].clone().unwrap_or_default();
                    moved += self
                        .move_orphan(id, &state, reasons[at].clone(), now)
                        .await?;
                }
                changed(moved)
            }
            Sql::GiveUp => {
                let (id, now) = (with.i8(1), with.i8(3));
                let order = self.view(|view| view.payment(&Key::Payment(id)));
                let has_order = order.and_then(|one| one.order).is_some_and(|id| {
                    self.view(|view| view.has(&Key::Order(id)) || view.has(&Key::DeadLetter(id)))
                });
                if has_order {
                    return changed(0);
                }
                let reason = Some(with.text(2));
                let moved = self.move_orphan(id, "refund_due", reason, now).await?;
                changed(moved)
            }
            Sql::Look => {
                let (limit, now) = (with.i8(3) as usize, with.i8(4));
                let of: Option<i32> = with.get(5, &Type::INT4);
                let mut looked = self.view(|view| view.orders(with.i8(1), with.i8(2)));
                looked.truncate(limit);
                let last = looked.last().map(|(id, _)| *id);
                let due: Vec<_> = looked
                    .iter()
                    .filter(|(_, one)| one.status == PAYABLE && one.expires_ms <= now)
                    .filter(|(_, one)| of.is_none_or(|sku| one.sku == sku))
                    .collect();
                let count = I8(looked.len() as i64);
                if due.is_empty() {
                    return rows(vec![vec![count, i8_or_null(last), Null, Null, Null]]);
                }
                let ids = due.iter().map(|(id, _)| *id).collect();
                let skus = due.iter().map(|(_, one)| one.sku).collect();
                let until = due.iter().map(|(_, one)| one.expires_ms).collect();
                rows(vec![vec![
                    count,
                    i8_or_null(last),
                    I8s(ids),
                    I4s(skus),
                    I8s(until),
                ]])
            }
            Sql::LockOverdue => {
                let mut locked = Vec::new();
                for id in sorted(with.i8s(1)) {
                    let order = self.locked_order(id, Waits::Not).await?;
                    let is_due =
                        |one: &Order| one.status == PAYABLE && one.expires_ms <= with.i8(2);
                    if order.is_some_and(|one| is_due(&one)) {
                        locked.push(vec![I8(id)]);
                    }
                }
                rows(locked)
            }
            Sql::Expire => {
                let (now, with_orphans) = (with.i8(2), with.flag(3));
                let mut ended = Vec::new();
                for id in sorted(with.i8s(1)) {
                    let Some(mut order) = self.locked_order(id, Waits::Not).await? else {
                        continue;
                    };
                    let in_time = |one: &Payment| one.counts_at() < order.expires_ms;
                    let is_due = order.status == PAYABLE && order.expires_ms <= now;
                    let is_paid = with_orphans && self.orphans_of(id).iter().any(in_time);
                    if is_due && !is_paid {
                        order.status = EXPIRED;
                        ended.push(units(id, &order));
                        self.put(Key::Order(id), Row::Order(order));
                    }
                }
                rows(ended)
            }
            Sql::Assign => {
                let mut assigned = Vec::new();
                for id in sorted(with.i8s(1)) {
                    let Some(mut order) = self.locked_order(id, Waits::Long).await? else {
                        continue;
                    };
                    if order.status == WAITING {
                        (order.status, order.expires_ms) = (PAYABLE, with.i8(2));
                        order.assigned_ms = Some(with.i8(3));
                        assigned.push(units(id, &order));
                        self.put(Key::Order(id), Row::Order(order));
                    }
                }
                rows(assigned)
            }
            Sql::EndWaiting => {
                let unservable = with.flag(2);
                let mut ended = Vec::new();
                for id in sorted(with.i8s(1)) {
                    let Some(mut order) = self.locked_order(id, Waits::Not).await? else {
                        continue;
                    };
                    let total = self.view(|view| view.sku(&Key::Sku(order.sku)));
                    let fits = total.is_some_and(|sku| i64::from(order.quantity) <= sku.total);
                    if order.status == WAITING && !(unservable && fits) {
                        order.status = EXPIRED;
                        ended.push(units(id, &order));
                        self.put(Key::Order(id), Row::Order(order));
                    }
                }
                rows(ended)
            }
            Sql::NoteLists => {
                let skus = with.i4s(2);
                for sku in self.view(|view| view.lists()) {
                    if !skus.contains(&sku) {
                        self.delete(Key::List(sku));
                    }
                }
                let count = skus.len();
                for sku in skus {
                    self.put(Key::List(sku), Row::List);
                }
                changed(count)
            }
            Sql::FreeSkus | Sql::LockSkus => {
                let mut locked = Vec::new();
                for sku in with.i4s(1) {
                    let waits = match sql {
                        Sql::FreeSkus => Waits::Not,
                        _ => Waits::Long,
                    };
                    if self.lock(&Key::Sku(sku), waits).await? {
                        locked.push(vec![I4(sku)]);
                    }
                }
                rows(locked)
            }
            Sql::UnpaidChanges => {
                let node = self.view(|view| view.node(&Key::Node));
                rows(
                    node.map(|node| vec![I8(node.unpaid_changes)])
                        .into_iter()
                        .collect(),
                )
            }
            Sql::UnpaidFrom => {
                if !self.lock(&Key::Node, Waits::Not).await? {
                    return changed(0);
                }
                let node = self.view(|view| view.node(&Key::Node));
                let ours = node
                    .filter(|node| node.epoch == with.i8(2) && node.unpaid_changes == with.i8(3));
                self.change_node(ours.map(|node| Node {
                    unpaid_from: with.i8(4),
                    ..node
                }))
            }
            Sql::Recover => {
                let id = with.i8(1);
                self.lock(&Key::Order(id), Waits::Long).await?;
                if self.view(|view| view.has(&Key::Order(id)) || view.has(&Key::DeadLetter(id))) {
                    return changed(0);
                }
                let order = Order {
                    user: with.text(2),
                    sku: with.i4(3),
                    quantity: with.i4(4),
                    adjustment: with.i8(5),
                    amount: with.i8(6),
                    currency: with.text(7),
                    status: with.get(8, &Type::INT2),
                    created_ms: with.i8(9),
                    expires_ms: with.i8(10),
                    key: with.0[10].clone(),
                    payload: with.i8(12),
                    attributes: None,
                    reason: with.get(13, &Type::TEXT),
                    assigned_ms: None,
                };
                self.put(Key::Order(id), Row::Order(order));
                changed(1)
            }
            Sql::FenceNode => {
                let epoch = self
                    .view(|view| view.node(&Key::Node))
                    .map(|node| node.epoch);
                let is_ours = epoch == Some(with.i8(2));
                rows(is_ours.then(|| vec![I4(1)]).into_iter().collect())
            }
            Sql::EndOrder => {
                let (id, from) = (with.i8(1), with.i2s(2));
                let now: Option<i64> = with.get(4, &Type::INT8);
                let Some(mut order) = self.locked_order(id, Waits::Long).await? else {
                    return rows(Vec::new());
                };
                let in_time = now.is_none_or(|now| order.expires_ms > now);
                if !from.contains(&order.status) || !in_time {
                    return rows(Vec::new());
                }
                order.status = Some(with.i2(3));
                let waited = order.expires_ms == NEVER_MS;
                let (user, sku, quantity) = (order.user.clone(), order.sku, order.quantity);
                self.put(Key::Order(id), Row::Order(order));
                rows(vec![vec![Text(user), I4(sku), I4(quantity), Bool(waited)]])
            }
            Sql::StatusOf => {
                let status = self.view(|view| word_of(view, with.i8(1)));
                rows(status.map(|word| vec![Text(word)]).into_iter().collect())
            }
            Sql::Find => {
                let id = with.i8(1);
                let found = self.view(|view| stored(view, id));
                rows(found.into_iter().collect())
            }
            Sql::LockOut => rows(vec![vec![Bool(self.server.lock_out(self.pid))]]),
            Sql::Mark => {
                self.server.mark(with.i8(1), self.pid);
                rows(vec![vec![Text(String::new())]])
            }
            Sql::EndMarked => {
                let holder = self.server.marked_by(with.i8(1));
                let ended = holder.is_some_and(|pid| self.server.end_session(pid, None));
                rows(ended.then(|| vec![Bool(true)]).into_iter().collect())
            }
            Sql::IdsOfLanes | Sql::OtherNodes => rows(vec![vec![Null]]),
            Sql::NodeRow => {
                self.lock(&Key::Node, Waits::Long).await?;
                let node = self.view(|view| view.node(&Key::Node));
                let row = |node: Node| vec![I8(node.ids_leased_until_ms)];
                rows(node.map(row).into_iter().collect())
            }
            Sql::RaiseEpoch => {
                self.lock(&Key::Node, Waits::Long).await?;
                let node = self.view(|view| view.node(&Key::Node)).unwrap_or(Node {
                    epoch: 0,
                    ids_leased_until_ms: 0,
                    unpaid_from: 0,
                    unpaid_changes: 0,
                });
                let epoch = node.epoch + 1;
                let ids_leased_until_ms = with.i8(2);
                let node = Node {
                    epoch,
                    ids_leased_until_ms,
                    ..node
                };
                self.put(Key::Node, Row::Node(node));
                rows(vec![vec![I8(epoch), Bool(false)]])
            }
            Sql::RaiseWriters => {
                let epoch = with.i8(2);
                let shards = self.view(|view| view.writers());
                for (shard, _) in &shards {
                    self.lock(&Key::Writer(*shard), Waits::Long).await?;
                    // As it is now that it is ours.
                    if let Some(writer) = self.view(|view| view.writer(&Key::Writer(*shard))) {
                        self.put(Key::Writer(*shard), Row::Writer(Writer { epoch, ..writer }));
                    }
                }
                changed(shards.len())
            }
            Sql::AddWriters => {
                let epoch = with.i8(2);
                for shard in 0..with.i4(3) as i16 {
                    if !self.view(|view| view.has(&Key::Writer(shard))) {
                        self.put(Key::Writer(shard), Row::Writer(Writer { epoch, batch: 0 }));
                    }
                }
                changed(0)
            }
            Sql::Identity => {
                let since = self.view(|view| view.identity(&Key::Identity));
                let since = since.unwrap_or(with.i8(1));
                self.put(Key::Identity, Row::Identity(since));
                rows(vec![vec![Bytes(vec![7; 16]), I8(since)]])
            }
            Sql::Renew => {
                self.lock(&Key::Node, Waits::Long).await?;
                let node = self.view(|view| view.node(&Key::Node));
                let ours = node.filter(|node| node.epoch == with.i8(2));
                self.change_node(ours.map(|node| Node {
                    ids_leased_until_ms: node.ids_leased_until_ms.max(with.i8(3)),
                    ..node
                }))
            }
            Sql::Timeline => rows(vec![vec![Text(self.server.timeline())]]),
            Sql::Skus => {
                let sku = |(id, one): (i32, super::tables::Sku)| {
                    let counters = [one.total, one.held, one.sold].map(I8);
                    let [total, held, sold] = counters;
                    let (name, title) = (Text(one.name.clone()), Text(one.name));
                    let (price, currency) = (I8(one.price), Text("EUR".to_owned()));
                    vec![
                        I4(id),
                        name,
                        title,
                        price,
                        currency,
                        total,
                        held,
                        sold,
                        i8_or_null(one.limit),
                        Null,
                        Null,
                        Bool(false),
                        Null,
                        Bool(one.skips),
                        Null,
                        Null,
                        Null,
                        Bool(false),
                    ]
                };
                rows(self.view(|view| view.skus()).into_iter().map(sku).collect())
            }
            Sql::SkuNumbers => {
                let skus = self.view(|view| view.skus()).into_iter();
                rows(skus.map(|(id, one)| vec![Text(one.name), I4(id)]).collect())
            }
            Sql::OrphanedOrders => {
                let mut least: BTreeMap<i64, i64> = BTreeMap::new();
                for (_, one) in self.view(|view| view.payments(|_, one| one.state == "orphan")) {
                    if let Some(id) = one.order {
                        let at = least.entry(id).or_insert(i64::MAX);
                        *at = (*at).min(one.counts_at());
                    }
                }
                rows(
                    least
                        .into_iter()
                        .map(|(id, at)| vec![I8(id), I8(at)])
                        .collect(),
                )
            }
            Sql::CountOpen => {
                let is_open =
                    |_: i64, one: &Payment| one.state == "orphan" || one.state == "refund_due";
                let payments = self.view(|view| view.payments(is_open));
                let of = |state: &str| {
                    let all = payments.iter().filter(|(_, one)| one.state == state);
                    all.map(|(_, one)| one.clone()).collect::<Vec<Payment>>()
                };
                let (orphans, due) = (of("orphan"), of("refund_due"));
                let oldest = orphans.iter().map(|one| one.received_ms).min();
                let oldest_due = due.iter().map(|one| one.changed_ms).min();
                let counts = [orphans.len(), due.len()].map(|count| I8(count as i64));
                let [orphans, due] = counts;
                rows(vec![vec![
                    orphans,
                    i8_or_null(oldest),
                    due,
                    i8_or_null(oldest_due),
                ]])
            }
            Sql::OrphansWithOrder => {
                let (after, limit) = (with.i8(1), with.i8(2) as usize);
                let all =
                    self.view(|view| payments(view, |id, one| id > after && one.state == "orphan"));
                let with_order = all.into_iter().filter(|row| matches!(row[16], Bool(true)));
                rows(with_order.take(limit).collect())
            }
            Sql::DueOrphans => {
                let (now, limit) = (with.i8(1), with.i8(2) as usize);
                let all = self.view(|view| view.payments(|_, one| one.state == "orphan"));
                let is_first = |id: i64, order: Option<i64>| {
                    !all.iter()
                        .any(|(other, one)| order.is_some() && one.order == order && *other < id)
                };
                let mut due = self.view(|view| {
                    payments(view, |id, one| {
                        one.state == "orphan" && one.check_ms <= now && is_first(id, one.order)
                    })
                });
                due.sort_by_key(|row| match row[13] {
                    I8(check_at) => check_at,
                    _ => 0,
                });
                due.truncate(limit);
                rows(due)
            }
            Sql::NoteCheck | Sql::NoteOrder => {
                let key = Key::Payment(with.i8(1));
                self.lock(&key, Waits::Long).await?;
                let payment = self.view(|view| view.payment(&key));
                let Some(mut payment) = payment.filter(|one| one.state == "orphan") else {
                    return changed(0);
                };
                if sql == Sql::NoteCheck {
                    (payment.checks, payment.check_ms) = (with.i4(2), with.i8(3));
                } else {
                    payment.order = payment.order.or(Some(with.i8(2)));
                }
                self.put(key, Row::Payment(payment));
                changed(1)
            }
            Sql::PresentInRange => {
                let mut found = self.view(|view| view.orders(with.i8(1), with.i8(2)));
                found.truncate(with.i8(3) as usize);
                let row =
                    |(id, one): (i64, Order)| vec![I8(id), Text(one.user), I8(one.payload), I4(0)];
                rows(found.into_iter().map(row).collect())
            }
            Sql::PresentByIds => {
                let found = with.i8s(1).into_iter().filter_map(|id| {
                    let one = self.view(|view| view.order(&Key::Order(id)))?;
                    Some(vec![I8(id), Text(one.user), I8(one.payload)])
                });
                rows(found.collect())
            }
            Sql::Absent => {
                let absent = with.i8s(1).into_iter().filter(|id| {
                    self.view(|view| {
                        !view.has(&Key::Order(*id)) && !view.has(&Key::DeadLetter(*id))
                    })
                });
                rows(absent.map(|id| vec![I8(id)]).collect())
            }
            Sql::OpenAmong => {
                let open = with.i8s(1).into_iter().filter(|id| {
                    let order = self.view(|view| view.order(&Key::Order(*id)));
                    order.is_some_and(|one| is_open(&one))
                });
                rows(open.map(|id| vec![I8(id)]).collect())
            }
            Sql::OpenBelow => {
                let node = self.view(|view| view.node(&Key::Node));
                let from = node.map_or(0, |node| node.unpaid_from);
                let below = self.view(|view| view.orders(from, with.i8(2).saturating_sub(1)));
                let open = below.into_iter().filter(|(_, one)| is_open(one));
                let row = |(id, one): (i64, Order)| {
                    let mut row = units(id, &one);
                    row.push(I8(one.expires_ms));
                    row
                };
                rows(open.map(row).collect())
            }
            Sql::Ends => {
                let all = self.view(|view| view.orders(with.i8(1), with.i8(2)));
                let end = |one: Option<&(i64, Order)>| i8_or_null(one.map(|(id, _)| *id));
                rows(vec![vec![end(all.first()), end(all.last()), Bool(false)]])
            }
            Sql::Window => {
                let mut found = self.view(|view| view.orders(with.i8(1), with.i8(2)));
                found.truncate(with.i8(3) as usize);
                let row = |(id, one): (i64, Order)| {
                    let mut row = units(id, &one);
                    row.push(one.key.clone().map_or(Null, Bytes));
                    row.push(I8(one.payload));
                    row.push(one.status.map_or(Null, I2));
                    row.push(if is_open(&one) {
                        moment(one.expires_ms)
                    } else {
                        Null
                    });
                    row
                };
                rows(found.into_iter().map(row).collect())
            }
            Sql::FirstOfSkus => rows(vec![vec![I8(0)]]),
            Sql::Live => {
                let (skus, live) = (with.i4s(4), with.i2s(6));
                let mut part = self.view(|view| view.orders(with.i8(1), with.i8(2)));
                part.truncate(with.i8(3) as usize);
                let (last, count) = (part.last().map(|(id, _)| *id), part.len());
                let wanted = part
                    .into_iter()
                    .filter(|(_, one)| skus.contains(&one.sku) && live.contains(&one.status));
                let mut found: Vec<_> = wanted.map(|(id, one)| units(id, &one)).collect();
                found.push(vec![i8_or_null(last), Null, Null, I4(count as i32)]);
                rows(found)
            }
            Sql::Single | Sql::TakeUnpaid => changed(0),
            // Tables that stay empty here.
            Sql::LockHolder | Sql::Draws | Sql::ParkedBySku | Sql::EndParked => rows(Vec::new()),
            Sql::WindowDead | Sql::WindowParked | Sql::LiveParked | Sql::IsParked => {
                rows(Vec::new())
            }
        }
    }

    /// The rows of a COPY.
    pub async fn copied(&mut self, orders: Vec<(i64, Order)>) -> Result<u64, Refused> {
        let count = orders.len() as u64;
        for (id, order) in orders {
            let key = Key::Order(id);
            self.lock(&key, Waits::Long).await?;
            if self.view(|view| view.has(&key)) {
                return Err(refused("23505", "duplicate key value violates orders_pkey"));
            }
            if order.status.is_none() {
                return Err(refused("23502", "null value in column status"));
            }
            self.put(key, Row::Order(order));
        }
        Ok(count)
    }

    /// Moves total, held and sold of SKUs.
    async fn move_counters(&mut self, moved: &[(i32, [i64; 3])]) -> Result<Done, Refused> {
        for (sku, _) in moved {
            self.lock(&Key::Sku(*sku), Waits::Long).await?;
        }
        for (sku, [total, held, sold]) in moved {
            let Some(mut row) = self.view(|view| view.sku(&Key::Sku(*sku))) else {
                return Err(refused("23502", "null value in column total_after"));
            };
            row.total += total;
            row.held += held;
            row.sold += sold;
            if row.held < 0 || row.sold < 0 || row.held + row.sold > row.total {
                return Err(refused("23514", "new row violates check sku_not_oversold"));
            }
            self.put(Key::Sku(*sku), Row::Sku(row));
        }
        changed(moved.len())
    }

    fn store_payments(&mut self, with: &Parameters) -> Result<Done, Refused> {
        let (received, paid, orders) = (with.i8s(1), with.i8s_or_null(2), with.i8s_or_null(6));
        let (amounts, words) = (with.i8s(7), |number| with.texts(number));
        let [providers, ids, refs, currencies, receipts, states, reasons] =
            [3, 4, 5, 8, 9, 10, 11].map(words);
        for at in 0..ids.len() {
            let word = |of: &[Option<String>]| of[at].clone().unwrap_or_default();
            let name = Key::PaymentId(word(&providers), word(&ids));
            if self.view(|view| view.has(&name)) {
                return Err(refused(
                    "23505",
                    "duplicate key value violates payments_payment",
                ));
            }
            self.put(name, Row::PaymentId);
            let payment = Payment {
                received_ms: received[at],
                paid_ms: paid[at],
                provider: word(&providers),
                payment_id: word(&ids),
                order_ref: word(&refs),
                order: orders[at],
                amount: amounts[at],
                currency: word(&currencies),
                receipt: receipts[at].clone(),
                state: word(&states),
                reason: reasons[at].clone(),
                changed_ms: with.i8(12),
                checks: 0,
                check_ms: with.i8(13),
            };
            let id = self.server.next_payment();
            self.put(Key::Payment(id), Row::Payment(payment));
        }
        changed(ids.len())
    }

    async fn move_orphan(
        &mut self,
        id: i64,
        state: &str,
        reason: Option<String>,
        now: i64,
    ) -> Result<usize, Refused> {
        let key = Key::Payment(id);
        self.lock(&key, Waits::Long).await?;
        let payment = self.view(|view| view.payment(&key));
        let Some(mut payment) = payment.filter(|one| one.state == "orphan") else {
            return Ok(0);
        };
        payment.state = state.to_owned();
        (payment.reason, payment.changed_ms) = (reason, now);
        self.put(key, Row::Payment(payment));
        Ok(1)
    }

    fn orphans_of(&self, order: i64) -> Vec<Payment> {
        let orphan = |_: i64, one: &Payment| one.order == Some(order) && one.state == "orphan";
        let payments = self.view(|view| view.payments(orphan)).into_iter();
        payments.map(|(_, one)| one).collect()
    }

    /// An order, locked; `None` if there is none, or if it is locked and is not waited for.
    async fn locked_order(&mut self, id: i64, waits: Waits) -> Result<Option<Order>, Refused> {
        let key = Key::Order(id);
        if !self.view(|view| view.has(&key)) || !self.lock(&key, waits).await? {
            return Ok(None);
        }
        Ok(self.view(|view| view.order(&key)))
    }

    fn change_node(&mut self, node: Option<Node>) -> Result<Done, Refused> {
        let count = usize::from(node.is_some());
        if let Some(node) = node {
            self.put(Key::Node, Row::Node(node));
        }
        changed(count)
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

fn word_of(view: &View<'_>, id: i64) -> Option<String> {
    if let Some(order) = view.order(&Key::Order(id)) {
        let status = order
            .status
            .and_then(millrace::order::OrderStatus::from_code);
        return status.map(|status| status.as_str().to_owned());
    }
    view.has(&Key::DeadLetter(id)).then(|| "failed".to_owned())
}

fn stored(view: &View<'_>, id: i64) -> Option<Vec<Value>> {
    let one = view.order(&Key::Order(id))?;
    let sku = view.sku(&Key::Sku(one.sku))?;
    let status = word_of(view, id)?;
    Some(vec![
        I8(id),
        Text(one.user),
        Text(sku.name),
        I4(one.quantity),
        I8(one.adjustment),
        I8(one.amount),
        Text(one.currency),
        Text(status),
        I8(one.created_ms),
        I8(one.expires_ms),
        one.attributes.map_or(Null, |text| Text(text.to_string())),
        I4(one.sku),
        text(&one.reason),
        one.key.map_or(Null, Bytes),
        I8(one.payload),
    ])
}

fn payments(view: &View<'_>, is_wanted: impl Fn(i64, &Payment) -> bool) -> Vec<Vec<Value>> {
    let wanted = view.payments(is_wanted).into_iter();
    let row = |(id, one): (i64, Payment)| {
        let has = |id| view.has(&Key::Order(id)) || view.has(&Key::DeadLetter(id));
        let (has_order, counts_at) = (one.order.is_some_and(has), one.counts_at());
        vec![
            I8(id),
            Text(one.provider),
            Text(one.payment_id),
            Text(one.order_ref),
            i8_or_null(one.order),
            I8(one.amount),
            Text(one.currency),
            text(&one.receipt),
            Text(one.state),
            text(&one.reason),
            I8(one.received_ms),
            I8(one.changed_ms),
            I4(one.checks),
            I8(one.check_ms),
            Null,
            Null,
            Bool(has_order),
            I8(counts_at),
        ]
    };
    wanted.map(row).collect()
}
