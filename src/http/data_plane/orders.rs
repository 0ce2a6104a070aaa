//! Asking for orders, and cancelling one.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::message::{Request, Response};
use super::service::{DataPlane, json};
use crate::http::problem::Problem;
use crate::http::wire::{OrderList, OrderView, query};
use crate::order::{OrderId, OrderStatus, UserId};
use crate::pipeline::cancel::CancelError;
use crate::state::pending::SlotState;

/// Orders in one page of a user's list, unless asked otherwise.
const LIMIT_DEFAULT: u64 = 20;

impl DataPlane {
    /// `GET /v1/orders/{order_id}?wait=N`.
    pub(super) fn get_order(
        &self,
        request: &Request<'_>,
        response: &mut Response,
        id: OrderId,
    ) -> Result<(), Problem> {
        let wait = Duration::from_secs(query::number(request.query(), "wait")?.unwrap_or(0));
        if let Some(pending) = self.ledger.pending.get(id) {
            let deadline = Instant::now() + wait.min(self.order_timeout);
            match self.wait_for_other(request, &pending, deadline) {
                SlotState::Waiting | SlotState::Claimed => {
                    json(
                        response,
                        200,
                        &OrderView::of(&pending.order, OrderStatus::Undecided),
                    );
                    return Ok(());
                }
                SlotState::Abandoned | SlotState::Unwritten => return Err(unknown_order(id)),
                SlotState::Persisted | SlotState::Failed => {}
            }
        }
        if let Some(recent) = self.ledger.recent.get(id) {
            json(
                response,
                200,
                &OrderView::of(&recent.order, OrderStatus::PendingPayment),
            );
            return Ok(());
        }
        let stored = self
            .find_stored(request, self.order_timeout, id)?
            .ok_or_else(|| unknown_order(id))?;
        json(response, 200, &OrderView::stored(&stored));
        Ok(())
    }

    /// `POST /v1/orders/{order_id}/cancel`. An order that is being written is waited for.
    pub(super) fn cancel_order(
        &self,
        request: &Request<'_>,
        response: &mut Response,
        id: OrderId,
    ) -> Result<(), Problem> {
        if let Some(pending) = self.ledger.pending.get(id) {
            let deadline = Instant::now() + self.order_timeout;
            match self.wait_for_other(request, &pending, deadline) {
                SlotState::Waiting | SlotState::Claimed => {
                    let detail = format!("order {id} is still being written; ask again");
                    return Err(Problem::new(503, "overloaded", detail).retry_after(1));
                }
                SlotState::Abandoned | SlotState::Unwritten => return Err(unknown_order(id)),
                SlotState::Persisted | SlotState::Failed => {}
            }
        }
        let canceller = self.canceller.clone();
        let cancelled = self.on_tokio(request, self.order_timeout, async move {
            canceller.cancel(id).await
        })?;
        let order = cancelled.map_err(|error| match error {
            CancelError::Unknown(id) => unknown_order(id),
            CancelError::NotCancellable(..) => {
                Problem::new(409, "not_cancellable", error.to_string())
            }
            CancelError::Store(error) => DataPlane::database_problem(&error),
        })?;
        json(response, 200, &OrderView::stored(&order));
        Ok(())
    }

    /// `GET /v1/users/{user_id}/orders?limit=&before=`, newest first.
    pub(super) fn list_orders(
        &self,
        request: &Request<'_>,
        response: &mut Response,
        user_id: UserId,
    ) -> Result<(), Problem> {
        let limit = query::number(request.query(), "limit")?.unwrap_or(LIMIT_DEFAULT);
        if !(1..=100).contains(&limit) {
            return Err(Problem::new(
                400,
                "invalid_field",
                "limit: must be 1 to 100",
            ));
        }
        let before = match query::value(request.query(), "before") {
            None => OrderId::MAX,
            Some(text) => OrderId::parse(text)
                .ok_or_else(|| Problem::new(400, "invalid_field", "before: must be an order id"))?,
        };
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let mut ids: Vec<OrderId> = self
            .ledger
            .buyers
            .orders_of(&user_id)
            .iter()
            .map(|known| known.order_id)
            .collect();
        ids.retain(|id| *id < before);
        ids.sort_unstable_by(|a, b| b.cmp(a));
        ids.truncate(limit);
        let in_flight: HashMap<OrderId, _> = ids
            .iter()
            .filter_map(|id| Some((*id, self.ledger.pending.get(*id)?)))
            .collect();
        let (database, whole_history) = (self.database.clone(), self.user_index);
        let wanted = ids.clone();
        let stored = self.on_tokio(request, self.order_timeout, async move {
            if whole_history {
                database
                    .orders_of_user(&user_id, before, limit as i64)
                    .await
            } else {
                database.find_orders(&wanted).await
            }
        })?;
        let stored = stored.map_err(|error| DataPlane::database_problem(&error))?;
        // A row that is there says more than the order in flight that it was.
        let mut views: HashMap<OrderId, OrderView<'_>> = in_flight
            .iter()
            .filter(|(_, pending)| !pending.slot.state().is_final())
            .map(|(id, pending)| (*id, OrderView::of(&pending.order, OrderStatus::Undecided)))
            .collect();
        views.extend(
            stored
                .iter()
                .map(|order| (order.id, OrderView::stored(order))),
        );
        let mut newest: Vec<_> = views.into_iter().collect();
        newest.sort_unstable_by(|(a, _), (b, _)| b.cmp(a));
        newest.truncate(limit);
        let next_before = newest
            .last()
            .map(|(id, _)| *id)
            .filter(|_| newest.len() == limit);
        let orders = newest.into_iter().map(|(_, view)| view).collect();
        json(
            response,
            200,
            &OrderList {
                orders,
                next_before,
            },
        );
        Ok(())
    }
}

fn unknown_order(id: OrderId) -> Problem {
    Problem::new(404, "unknown_order", format!("there is no order {id}"))
}
