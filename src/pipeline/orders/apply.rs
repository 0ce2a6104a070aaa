//! A batch of which the database refuses something: it is made smaller until the refusal is about one
//! order or one SKU. The rest of the batch is written.
//!
//! ```text
//!   batch ─► part ─┬─ written
//!              ▲   ├─ a row is refused ──────► one order? ─ yes ─► dead letter
//!              │   │                              └─ no ─► two halves ─────────┐
//!              │   └─ counters are refused ──► one SKU? ─ yes ─► parked        │
//!              │                                  └─ no ─► a part for each ────┤
//!              └───────────────────────────────────────────────────────────────┘
//! ```
//!
//! Workers and the replay of a journal both go through it. They differ in what they do with the order or
//! the SKU that is found.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::order::{Order, OrderStatus, SkuNumber};
use crate::state::pending::PendingOrder;

/// How the orders of a part go into the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// As rows.
    Write,
    /// As parked orders, because their SKU's counters are refused.
    Park,
}

/// What the database refuses about a part.
#[derive(Debug)]
pub enum Refusal {
    /// A row of it.
    Row {
        /// Why, as PostgreSQL's code (appendix A of its manual).
        sqlstate: String,
        /// Why, in its words.
        reason: String,
    },
    /// The counters of a SKU in it.
    Counter {
        /// Why, in its words.
        reason: String,
    },
}

/// What a refusal is about.
#[derive(Debug)]
pub enum Isolated<T> {
    /// This order's row.
    Order {
        /// The order.
        order: T,
        /// How it was to be stored.
        how: How,
        /// Why, as PostgreSQL's code.
        sqlstate: String,
        /// Why, in its words.
        reason: String,
    },
    /// The counters of the one SKU of all these orders.
    Sku {
        /// The SKU.
        sku: SkuNumber,
        /// The orders.
        orders: Vec<T>,
        /// Why.
        reason: String,
    },
}

/// An order in a batch, with what its owner needs beside it.
pub trait BatchOrder {
    /// The order.
    fn order(&self) -> &Order;
}

impl BatchOrder for Arc<PendingOrder> {
    fn order(&self) -> &Order {
        &self.order
    }
}

impl BatchOrder for (&Order, OrderStatus) {
    fn order(&self) -> &Order {
        self.0
    }
}

/// The parts of a batch that are not decided yet.
#[derive(Debug)]
pub struct Parts<T> {
    /// The oldest orders on top.
    stack: Vec<(How, Vec<T>)>,
}

impl<T> Default for Parts<T> {
    fn default() -> Self {
        Parts { stack: Vec::new() }
    }
}

impl<T: BatchOrder> Parts<T> {
    /// Adds a part, to be taken before those that are there.
    pub fn push(&mut self, how: How, orders: Vec<T>) {
        if !orders.is_empty() {
            self.stack.push((how, orders));
        }
    }

    /// Takes the next part.
    pub fn pop(&mut self) -> Option<(How, Vec<T>)> {
        self.stack.pop()
    }

    /// The orders of all parts that are left.
    pub fn into_rest(self) -> impl Iterator<Item = Vec<T>> {
        self.stack.into_iter().map(|(_, orders)| orders)
    }

    /// Narrows a refused part down. `None`: it is back in smaller parts.
    pub fn isolate(
        &mut self,
        how: How,
        mut orders: Vec<T>,
        refusal: Refusal,
    ) -> Option<Isolated<T>> {
        match refusal {
            Refusal::Row { sqlstate, reason } => {
                let newer = orders.split_off(orders.len() / 2);
                if !orders.is_empty() {
                    self.push(how, newer);
                    self.push(how, orders);
                    return None;
                }
                let order = newer.into_iter().next()?;
                Some(Isolated::Order {
                    order,
                    how,
                    sqlstate,
                    reason,
                })
            }
            Refusal::Counter { reason } => {
                let mut by_sku: BTreeMap<SkuNumber, Vec<T>> = BTreeMap::new();
                for one in orders {
                    by_sku.entry(one.order().sku).or_default().push(one);
                }
                if by_sku.len() == 1 {
                    let (sku, orders) = by_sku.pop_first()?;
                    return Some(Isolated::Sku {
                        sku,
                        orders,
                        reason,
                    });
                }
                for orders in by_sku.into_values() {
                    self.push(How::Write, orders);
                }
                None
            }
        }
    }
}
