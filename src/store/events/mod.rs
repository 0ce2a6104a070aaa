//! Changes of orders and payments for the shop's other systems, as PostgreSQL's logical decoding tells them: a
//! committed change is told, and nothing else is.
//!
//! * this file: a change, and the names of SKUs;
//! * [`slot`]: the publication, and the replication slot of a sink;
//! * [`transactions`]: the stream of a slot, put together to transactions;
//! * `rows`: a change out of a decoded row;
//! * [`refill`]: the same changes read from the rows, once a slot is gone;
//! * [`sinks`]: how far each sink is;
//! * [`deliveries`]: events that wait for a sink, and its dead letters.

pub mod deliveries;
pub mod refill;
mod rows;
pub mod sinks;
pub mod slot;
pub mod transactions;

use std::collections::HashMap;

use super::StoreError;
use super::postgres::Database;
use super::postgres::orders::StoredOrder;
use crate::order::payment::{PaymentState, RefundReason};
use crate::order::{OrderId, OrderStatus, SkuNumber, UnixMillis};

/// A change that makes an event, as of its commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Where its row is.
    pub table: Table,
    /// The number of this transition of its row, from 1.
    pub transition: u32,
    /// When it was committed; of a row that was read later, when it was read.
    pub at: UnixMillis,
    /// `traceparent` of the request that placed the order, if that is traced.
    pub traceparent: Option<String>,
    /// The row after it.
    pub of: Changed,
}

/// The tables whose changes make events, in the order in which a refill reads them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// Orders.
    Orders = 0,
    /// Orders that the database refused.
    DeadLetters = 1,
    /// Payments.
    Payments = 2,
}

/// A row after a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Changed {
    /// An order, and its status before.
    Order(Box<StoredOrder>, Option<OrderStatus>),
    /// A payment.
    Payment(Box<ChangedPayment>),
}

/// A payment that waits for its order or is to be refunded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangedPayment {
    /// The number of its row.
    pub id: i64,
    /// Name of the provider.
    pub provider: String,
    /// The provider's id.
    pub payment_id: String,
    /// The order as the provider named it.
    pub order_ref: String,
    /// Its order, where it is one of ours.
    pub order_id: Option<OrderId>,
    /// The amount in minor units.
    pub amount: i64,
    /// Its currency.
    pub currency: String,
    /// Its state.
    pub state: PaymentState,
    /// Why it is to be refunded.
    pub refund_reason: Option<RefundReason>,
    /// When it came in.
    pub received_at: UnixMillis,
}

/// A transaction with its changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transaction {
    /// Its number, without its epoch.
    pub xid: u32,
    /// Position behind it.
    pub end: super::pgoutput::Lsn,
    /// Its changes that make events, in their order.
    pub changes: Vec<Change>,
}

/// The shop's ids of SKUs by the database's numbers. A number never changes its id.
#[derive(Debug, Default)]
pub struct SkuNames(HashMap<SkuNumber, String>);

impl SkuNames {
    /// Fills in the names of the SKUs of orders.
    ///
    /// # Errors
    /// If the database does not answer.
    pub async fn fill_in(
        &mut self,
        database: &Database,
        changes: &mut [Change],
    ) -> Result<(), StoreError> {
        for change in changes {
            let Changed::Order(order, _) = &mut change.of else {
                continue;
            };
            if !self.0.contains_key(&order.sku) {
                self.0 = read_names(database).await?;
            }
            // A SKU whose row somebody has deleted has no name.
            order.sku_id = self.0.get(&order.sku).cloned().unwrap_or_default();
        }
        Ok(())
    }
}

async fn read_names(database: &Database) -> Result<HashMap<SkuNumber, String>, StoreError> {
    let client = database.pooled().await?;
    let rows = database
        .timed(
            "reading the names of SKUs",
            client.query("SELECT id, sku_id FROM sku", &[]),
        )
        .await?;
    Ok(rows
        .iter()
        .map(|row| (SkuNumber(row.get(0)), row.get(1)))
        .collect())
}
