//! The JSON of an order's history.

use std::borrow::Cow;

use serde::Serialize;

use super::dead_letters::DeadLetterView;
use super::orders::OrderView;
use super::payments::PaymentView;
use super::time::Time;
use crate::order::receipt::ReceiptKeys;
use crate::pipeline::orders::lookup::Found;
use crate::state::State;
use crate::store::postgres::order_history::{OrderHistory, PaymentEvent, StockLogEntry};

/// An order with everything that is known of it.
#[derive(Debug, Serialize)]
pub struct HistoryView<'a> {
    /// `null`: payments name it, and it is not there.
    order: Option<OrderView<'a>>,
    /// `in_flight`, `order_log` or `database`.
    place: Option<&'static str>,
    payments: Vec<PaymentView<'a>>,
    payment_events: Vec<EventView<'a>>,
    dead_letter: Option<DeadLetterView<'a>>,
    stock_log: Vec<StockLogView<'a>>,
}

#[derive(Debug, Serialize)]
struct EventView<'a> {
    id: i64,
    received_at: Time,
    provider: &'a str,
    event_id: &'a str,
    kind: &'a str,
    payment_id: &'a str,
    /// As it came; what is not UTF-8 is replaced.
    body: Cow<'a, str>,
}

#[derive(Debug, Serialize)]
struct StockLogView<'a> {
    id: i64,
    at: Time,
    cause: &'a str,
    total_delta: i64,
    held_delta: i64,
    sold_delta: i64,
    total_after: i64,
    held_after: i64,
    sold_after: i64,
}

impl<'a> HistoryView<'a> {
    /// An order as it stands now, and what is stored about it.
    pub fn of(
        order: Option<&'a Found>,
        stored: &'a OrderHistory,
        state: &State,
        keys: &ReceiptKeys,
    ) -> Self {
        let payments = stored.payments.iter();
        HistoryView {
            order: order.map(|order| OrderView::found(order, state, keys)),
            place: order.map(|order| match order {
                Found::InFlight(_) => "in_flight",
                Found::OnDisk(_) => "order_log",
                Found::Recent(_) | Found::Stored(_) => "database",
            }),
            payments: payments
                .map(|payment| PaymentView::of(payment, keys, &state.catalogue))
                .collect(),
            payment_events: stored.events.iter().map(EventView::of).collect(),
            dead_letter: stored.dead_letter.as_ref().map(DeadLetterView::of),
            stock_log: stored.stock_log.iter().map(StockLogView::of).collect(),
        }
    }
}

impl<'a> EventView<'a> {
    fn of(event: &'a PaymentEvent) -> Self {
        EventView {
            id: event.id,
            received_at: Time(event.received_at),
            provider: &event.provider,
            event_id: &event.event_id,
            kind: &event.kind,
            payment_id: &event.payment_id,
            body: String::from_utf8_lossy(&event.body),
        }
    }
}

impl<'a> StockLogView<'a> {
    fn of(entry: &'a StockLogEntry) -> Self {
        StockLogView {
            id: entry.id,
            at: Time(entry.at),
            cause: &entry.cause,
            total_delta: entry.total_delta,
            held_delta: entry.held_delta,
            sold_delta: entry.sold_delta,
            total_after: entry.total_after,
            held_after: entry.held_after,
            sold_after: entry.sold_after,
        }
    }
}
