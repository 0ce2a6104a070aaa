//! The tables of the simulated server: committed rows, and those of a transaction over them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;

/// What a row is found and locked by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    Node,
    Identity,
    Writer(i16),
    Sku(i32),
    Order(i64),
    DeadLetter(i64),
    Parked(i64),
    Payment(i64),
    /// The unique key of a payment: provider and its id.
    PaymentId(String, String),
    /// The unique key of a message: provider, its id, and the payment's.
    Event(String, String, Option<String>),
    /// A SKU with a waiting list.
    List(i32),
}

#[derive(Clone, Debug)]
pub struct Node {
    pub epoch: i64,
    pub ids_leased_until_ms: i64,
    pub unpaid_from: i64,
    pub unpaid_changes: i64,
}

#[derive(Clone, Debug)]
pub struct Writer {
    pub epoch: i64,
    pub batch: i64,
}

#[derive(Clone, Debug)]
pub struct Sku {
    pub name: String,
    pub price: i64,
    pub total: i64,
    pub held: i64,
    pub sold: i64,
    pub limit: Option<i64>,
    pub skips: bool,
    /// Units that somebody has taken off `total` by hand.
    pub taken_off: i64,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Order {
    pub user: String,
    pub sku: i32,
    pub quantity: i32,
    pub adjustment: i64,
    pub amount: i64,
    pub currency: String,
    pub status: Option<i16>,
    pub created_ms: i64,
    pub expires_ms: i64,
    pub key: Option<Vec<u8>>,
    pub payload: i64,
    pub attributes: Option<Rc<str>>,
    pub reason: Option<String>,
    /// When it was assigned its units, if it waited.
    pub assigned_ms: Option<i64>,
}

/// An order whose row was refused; its status is `None` unless it was paid.
#[derive(Clone, Debug)]
pub struct Letter {
    pub number: i64,
    pub order: Order,
    pub is_discarded: bool,
}

#[derive(Clone, Debug)]
pub struct Payment {
    pub received_ms: i64,
    pub paid_ms: Option<i64>,
    pub provider: String,
    pub payment_id: String,
    pub order_ref: String,
    pub order: Option<i64>,
    pub amount: i64,
    pub currency: String,
    pub receipt: Option<String>,
    pub state: String,
    pub reason: Option<String>,
    pub changed_ms: i64,
    pub checks: i32,
    pub check_ms: i64,
    /// Of its refund.
    pub reference: Option<String>,
}

impl Payment {
    /// The moment at which it counts as made.
    pub fn counts_at(&self) -> i64 {
        self.paid_ms
            .map_or(self.received_ms, |paid| paid.min(self.received_ms))
    }
}

#[derive(Clone, Debug)]
pub enum Row {
    Node(Node),
    Identity(i64),
    Writer(Writer),
    Sku(Sku),
    Order(Order),
    DeadLetter(Letter),
    Parked(Order),
    Payment(Payment),
    PaymentId,
    Event,
    List,
}

/// Rows that a transaction has written; `None` is deleted.
pub type Written = BTreeMap<Key, Option<Rc<Row>>>;

/// Every committed row, and how to undo the last commits.
#[derive(Default)]
pub struct Committed {
    pub rows: BTreeMap<Key, Rc<Row>>,
    undo: VecDeque<Written>,
}

/// Commits that a failover may lose.
const UNDO_MAX: usize = 64;

impl Committed {
    pub fn commit(&mut self, written: Written) {
        if written.is_empty() {
            return;
        }
        let mut undo = Written::new();
        for (key, row) in written {
            let before = match row {
                Some(row) => self.rows.insert(key.clone(), row),
                None => self.rows.remove(&key),
            };
            undo.insert(key, before);
        }
        self.undo.push_back(undo);
        if self.undo.len() > UNDO_MAX {
            self.undo.pop_front();
        }
    }

    /// Takes the last commits back. Returns the rows that they had changed.
    pub fn lose(&mut self, commits: usize) -> BTreeSet<Key> {
        let mut changed = BTreeSet::new();
        for _ in 0..commits {
            for (key, before) in self.undo.pop_back().unwrap_or_default() {
                match before {
                    Some(row) => self.rows.insert(key.clone(), row),
                    None => self.rows.remove(&key),
                };
                changed.insert(key);
            }
        }
        changed
    }

    /// No failover loses what is committed so far.
    pub fn replicate(&mut self) {
        self.undo.clear();
    }
}

/// What a transaction sees.
pub struct View<'a> {
    pub committed: &'a BTreeMap<Key, Rc<Row>>,
    pub written: &'a Written,
}

macro_rules! getters {
    ($($name:ident: $variant:ident => $of:ty;)*) => {
        impl View<'_> {
            $(pub fn $name(&self, key: &Key) -> Option<$of> {
                match &*self.get(key)? {
                    Row::$variant(row) => Some(row.clone()),
                    _ => None,
                }
            })*
        }
    };
}

getters! {
    node: Node => Node;
    identity: Identity => i64;
    writer: Writer => Writer;
    sku: Sku => Sku;
    order: Order => Order;
    payment: Payment => Payment;
    letter: DeadLetter => Letter;
    parked: Parked => Order;
}

impl View<'_> {
    pub fn get(&self, key: &Key) -> Option<Rc<Row>> {
        match self.written.get(key) {
            Some(row) => row.clone(),
            None => self.committed.get(key).cloned(),
        }
    }

    pub fn has(&self, key: &Key) -> bool {
        self.get(key).is_some()
    }

    /// Rows between two keys, in their order.
    fn range(&self, from: Key, to: Key) -> Vec<(&Key, &Row)> {
        if from > to {
            return Vec::new();
        }
        let mut written = self.written.range(from.clone()..=to.clone()).peekable();
        let is_untouched = written.peek().is_none();
        let committed = self.committed.range(from..=to);
        let committed =
            committed.filter(|(key, _)| is_untouched || !self.written.contains_key(*key));
        let mut found: Vec<_> = committed.map(|(key, row)| (key, &**row)).collect();
        if !is_untouched {
            found.extend(written.filter_map(|(key, row)| Some((key, &**row.as_ref()?))));
            found.sort_unstable_by_key(|(key, _)| *key);
        }
        found
    }
}

macro_rules! lists {
    ($($name:ident: $variant:ident($key:ty) => $of:ty;)*) => {
        impl View<'_> {
            $(pub fn $name(
                &self,
                from: $key,
                to: $key,
                is_wanted: impl Fn($key, &$of) -> bool,
            ) -> Vec<($key, $of)> {
                let rows = self.range(Key::$variant(from), Key::$variant(to)).into_iter();
                rows.filter_map(|(key, row)| match (key, row) {
                    (Key::$variant(id), Row::$variant(row)) if is_wanted(*id, row) => {
                        Some((*id, row.clone()))
                    }
                    _ => None,
                })
                .collect()
            })*
        }
    };
}

lists! {
    orders_where: Order(i64) => Order;
    parked_where: Parked(i64) => Order;
    letters_where: DeadLetter(i64) => Letter;
    payments_where: Payment(i64) => Payment;
    skus_where: Sku(i32) => Sku;
    writers_where: Writer(i16) => Writer;
}

impl View<'_> {
    /// The first orders of a range.
    pub fn first_orders(&self, from: i64, to: i64, limit: usize) -> Vec<(i64, &Order)> {
        let rows = self.range(Key::Order(from), Key::Order(to)).into_iter();
        let orders = rows.filter_map(|(key, row)| match (key, row) {
            (Key::Order(id), Row::Order(order)) => Some((*id, order)),
            _ => None,
        });
        orders.take(limit).collect()
    }

    pub fn orders(&self, from: i64, to: i64) -> Vec<(i64, Order)> {
        self.orders_where(from, to, |_, _| true)
    }

    pub fn all_parked(&self, from: i64, to: i64) -> Vec<(i64, Order)> {
        self.parked_where(from, to, |_, _| true)
    }

    pub fn letters(&self, from: i64, to: i64) -> Vec<(i64, Letter)> {
        self.letters_where(from, to, |_, _| true)
    }

    pub fn payments(&self, is_wanted: impl Fn(i64, &Payment) -> bool) -> Vec<(i64, Payment)> {
        self.payments_where(i64::MIN, i64::MAX, is_wanted)
    }

    pub fn skus(&self) -> Vec<(i32, Sku)> {
        self.skus_where(i32::MIN, i32::MAX, |_, _| true)
    }

    pub fn writers(&self) -> Vec<(i16, Writer)> {
        self.writers_where(i16::MIN, i16::MAX, |_, _| true)
    }

    pub fn lists(&self) -> Vec<i32> {
        let rows = self
            .range(Key::List(i32::MIN), Key::List(i32::MAX))
            .into_iter();
        rows.filter_map(|(key, _)| match key {
            Key::List(sku) => Some(*sku),
            _ => None,
        })
        .collect()
    }
}
