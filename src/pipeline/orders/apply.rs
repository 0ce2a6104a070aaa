//! Narrows down what the database refuses of a batch: the batch is split until the refusal concerns one order
//! or one SKU. The rest is written.
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
//! Workers and the replay of a journal share this. They differ in their treatment of the isolated order or SKU.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::order::{Order, OrderStatus, SkuNumber};
use crate::state::pending::PendingOrder;

/// The form in which the orders of a part are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// As rows.
    Write,
    /// As parked orders, because their SKU's counters are refused.
    Park,
}

/// The database's refusal of a part.
#[derive(Debug)]
pub enum Refusal {
    /// A row of it.
    Row {
        /// SQLSTATE (appendix A of PostgreSQL's manual).
        sqlstate: String,
        /// The server's message.
        reason: String,
    },
    /// The counters of a SKU in it.
    Counter {
        /// The server's message.
        reason: String,
    },
}

/// The subject of a refusal, once isolated.
#[derive(Debug)]
pub enum Isolated<T> {
    /// This order's row.
    Order {
        /// The order.
        order: T,
        /// The form in which it was to be stored.
        how: How,
        /// SQLSTATE.
        sqlstate: String,
        /// The server's message.
        reason: String,
    },
    /// The counters of the one SKU of all these orders.
    Sku {
        /// The SKU.
        sku: SkuNumber,
        /// The orders.
        orders: Vec<T>,
        /// The server's message.
        reason: String,
    },
}

/// An order in a batch, with the data that its owner keeps beside it.
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

/// The undecided parts of a batch.
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
    /// Adds a part, to be taken before the others.
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

    /// Narrows a refused part down. Returns `None` after putting it back in smaller parts.
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
