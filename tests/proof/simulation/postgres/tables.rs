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
}

#[derive(Clone, Debug, PartialEq)]
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
    DeadLetter(Order),
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
    fn range(&self, from: Key, to: Key) -> BTreeMap<Key, Rc<Row>> {
        let committed = self.committed.range(from.clone()..=to.clone());
        let mut found: BTreeMap<_, _> = committed
            .map(|(key, row)| (key.clone(), Rc::clone(row)))
            .collect();
        for (key, row) in self.written.range(from..=to) {
            match row {
                Some(row) => found.insert(key.clone(), Rc::clone(row)),
                None => found.remove(key),
            };
        }
        found
    }

    pub fn orders(&self, from: i64, to: i64) -> Vec<(i64, Order)> {
        if from > to {
            return Vec::new();
        }
        let rows = self.range(Key::Order(from), Key::Order(to));
        rows.into_iter()
            .filter_map(|(key, row)| match (key, &*row) {
                (Key::Order(id), Row::Order(order)) => Some((id, order.clone())),
                _ => None,
            })
            .collect()
    }

    pub fn payments(&self, is_wanted: impl Fn(i64, &Payment) -> bool) -> Vec<(i64, Payment)> {
        let rows = self.range(Key::Payment(i64::MIN), Key::Payment(i64::MAX));
        rows.into_iter()
            .filter_map(|(key, row)| match (key, &*row) {
                (Key::Payment(id), Row::Payment(payment)) if is_wanted(id, payment) => {
                    Some((id, payment.clone()))
                }
                _ => None,
            })
            .collect()
    }

    pub fn skus(&self) -> Vec<(i32, Sku)> {
        let rows = self.range(Key::Sku(i32::MIN), Key::Sku(i32::MAX));
        rows.into_iter()
            .filter_map(|(key, row)| match (key, &*row) {
                (Key::Sku(id), Row::Sku(sku)) => Some((id, sku.clone())),
                _ => None,
            })
            .collect()
    }

    pub fn writers(&self) -> Vec<(i16, Writer)> {
        let rows = self.range(Key::Writer(i16::MIN), Key::Writer(i16::MAX));
        rows.into_iter()
            .filter_map(|(key, row)| match (key, &*row) {
                (Key::Writer(shard), Row::Writer(writer)) => Some((shard, writer.clone())),
                _ => None,
            })
            .collect()
    }

    pub fn lists(&self) -> Vec<i32> {
        let rows = self.range(Key::List(i32::MIN), Key::List(i32::MAX));
        rows.into_keys()
            .filter_map(|key| match key {
                Key::List(sku) => Some(sku),
                _ => None,
            })
            .collect()
    }
}
