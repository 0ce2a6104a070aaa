//! Asking for orders, and cancelling one.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::message::{Request, Response};
use super::service::{DataPlane, json};
use crate::http::problem::Problem;
use crate::http::wire::{OrderList, OrderView, query};
use crate::order::{Order, OrderId, OrderStatus, UserId};
use crate::pipeline::orders::cancel::CancelError;
use crate::state::pending::{PendingOrder, SlotState};

/// Orders in one page of a user's list, unless asked otherwise.
const LIMIT_DEFAULT: u64 = 20;

/// What a look-up may take beyond the order timeout, after a client waited all of that.
const GRACE: Duration = Duration::from_secs(1);

/// How often those who wait for an order that is on the disk look for it.
const DISK_RECHECK: Duration = Duration::from_millis(100);

/// The same of those who wait for an order that is parked.
const PARKED_RECHECK: Duration = Duration::from_millis(500);

/// Where an order that was followed is.
enum Followed {
    /// On its way, in memory.
    InFlight(Arc<PendingOrder>),
    /// Durable, on the disk.
    OnDisk(Box<Order>),
    /// Nowhere: it was given up.
    Never,
    /// Not on its way: among the recent ones, in the database, or nowhere.
    Elsewhere,
}

impl DataPlane {
    /// `GET /v1/orders/{order_id}?wait=N`.
    pub(super) fn get_order(
        &self,
        request: &Request<'_>,
        response: &mut Response,
        id: OrderId,
    ) -> Result<(), Problem> {
        let wait = Duration::from_secs(query::number(request.query(), "wait")?.unwrap_or(0));
        let started = Instant::now();
        let until = started + wait.min(self.order_timeout);
        let deadline = started + self.order_timeout + GRACE;
        match self.follow(request, id, until, deadline)? {
            Followed::InFlight(pending) => {
                let status = if pending.slot.is_durable() {
                    OrderStatus::Accepted
                } else {
                    OrderStatus::Undecided
                };
                json(
                    response,
                    200,
                    &OrderView::of(&pending.order, status, &self.receipts),
                );
                return Ok(());
            }
            Followed::OnDisk(order) => {
                json(
                    response,
                    200,
                    &OrderView::of(&order, OrderStatus::Accepted, &self.receipts),
                );
                return Ok(());
            }
            Followed::Never => return Err(unknown_order(id)),
            Followed::Elsewhere => {}
        }
        if let Some(recent) = self.recent(id) {
            json(
                response,
                200,
                &OrderView::of(&recent.order, OrderStatus::PendingPayment, &self.receipts),
            );
            return Ok(());
        }
        loop {
            let stored = self
                .find_stored(request, deadline, id)?
                .ok_or_else(|| unknown_order(id))?;
            let left = until.saturating_duration_since(Instant::now());
            if stored.status != OrderStatus::Accepted || left.is_zero() || self.is_stopping() {
                json(response, 200, &self.stored_view(&stored));
                return Ok(());
            }
            // Parked in the database; nothing wakes us when that ends.
            self.on_tokio(request, deadline, async move {
                tokio::time::sleep(left.min(PARKED_RECHECK)).await;
            })?;
        }
    }

    /// Follows an order that may be on its way, in memory or on the disk, until it is decided or
    /// `until` comes. A look-up on the disk ends by `deadline`.
    fn follow(
        &self,
        request: &Request<'_>,
        id: OrderId,
        until: Instant,
        deadline: Instant,
    ) -> Result<Followed, Problem> {
        loop {
            if let Some(pending) = self.state.pending.get(id) {
                match self.wait_for_other(request, &pending, until, |_| false) {
                    SlotState::Appending | SlotState::Waiting | SlotState::Claimed => {
                        return Ok(Followed::InFlight(pending));
                    }
                    SlotState::Abandoned | SlotState::Unwritten => return Ok(Followed::Never),
                    SlotState::Persisted | SlotState::Failed => return Ok(Followed::Elsewhere),
                    // It was moved there, or is left there at shutdown.
                    SlotState::OnDisk if self.is_stopping() => {
                        return Ok(Followed::InFlight(pending));
                    }
                    SlotState::OnDisk => {}
                }
            }
            let Some(order) = self.find_on_disk(request, deadline, id)? else {
                // It goes from memory to the disk at most once, and back at most once.
                match self.state.pending.get(id) {
                    Some(pending) if !pending.slot.state().is_final() => continue,
                    // Left to the next process.
                    Some(pending) if pending.slot.state() == SlotState::OnDisk => {
                        return Ok(Followed::InFlight(pending));
                    }
                    _ => return Ok(Followed::Elsewhere),
                }
            };
            if Instant::now() >= until || self.is_stopping() {
                return Ok(Followed::OnDisk(Box::new(order)));
            }
            // Nothing wakes us when it is read back; that is rare enough to look for it.
            let left = until.saturating_duration_since(Instant::now());
            self.on_tokio(request, until + DISK_RECHECK, async move {
                tokio::time::sleep(left.min(DISK_RECHECK)).await;
            })?;
        }
    }

    /// `POST /v1/orders/{order_id}/cancel`. An order that is being written is waited for.
    pub(super) fn cancel_order(
        &self,
        request: &Request<'_>,
        response: &mut Response,
        id: OrderId,
    ) -> Result<(), Problem> {
        let until = Instant::now() + self.order_timeout;
        let deadline = until + GRACE;
        match self.follow(request, id, until, deadline)? {
            Followed::InFlight(_) | Followed::OnDisk(_) => {
                let detail = format!("order {id} is still being written; ask again");
                return Err(Problem::new(503, "overloaded", detail).retry_after(1));
            }
            Followed::Never => return Err(unknown_order(id)),
            Followed::Elsewhere => {}
        }
        let canceller = self.canceller.clone();
        let cancelled =
            self.on_tokio(request, deadline, async move { canceller.cancel(id).await })?;
        let order = cancelled.map_err(|error| match error {
            CancelError::Unknown(id) => unknown_order(id),
            CancelError::NotCancellable(..) => {
                Problem::new(409, "not_cancellable", error.to_string())
            }
            CancelError::Busy => Problem::new(503, "overloaded", error.to_string()).retry_after(1),
            CancelError::Store(error) => DataPlane::database_problem(&error),
        })?;
        json(response, 200, &self.stored_view(&order));
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
        let known = self.state.buyers.page(&user_id, before, limit);
        let ids: Vec<OrderId> = known.iter().map(|known| known.order_id).collect();
        let in_flight: HashMap<OrderId, _> = ids
            .iter()
            .filter_map(|id| Some((*id, self.state.pending.get(*id)?)))
            .collect();
        let deadline = Instant::now() + self.order_timeout;
        let mut on_disk = Vec::new();
        for id in ids.iter().filter(|id| !in_flight.contains_key(id)) {
            on_disk.extend(self.find_on_disk(request, deadline, *id)?);
        }
        let (database, whole_history) = (self.database.clone(), self.user_index);
        let mut wanted = ids.clone();
        wanted.retain(|id| !on_disk.iter().any(|order| order.id == *id));
        wanted.retain(|id| {
            let pending = in_flight.get(id);
            pending.is_none_or(|pending| is_decided(pending))
        });
        // Who has nothing there is answered also while the database is away.
        let stored = if wanted.is_empty() && !whole_history {
            Ok(Vec::new())
        } else {
            self.on_tokio(request, deadline, async move {
                if whole_history {
                    database
                        .orders_of_user(&user_id, before, limit as i64)
                        .await
                } else {
                    database.find_orders(&wanted).await
                }
            })?
        };
        let stored = stored.map_err(|error| DataPlane::database_problem(&error))?;
        // A row that is there says more than the order in flight that it was.
        let mut views: HashMap<OrderId, OrderView<'_>> = in_flight
            .iter()
            .filter(|(_, pending)| !is_decided(pending))
            .map(|(id, pending)| {
                let status = if pending.slot.is_durable() {
                    OrderStatus::Accepted
                } else {
                    OrderStatus::Undecided
                };
                (*id, OrderView::of(&pending.order, status, &self.receipts))
            })
            .collect();
        views.extend(on_disk.iter().map(|order| {
            (
                order.id,
                OrderView::of(order, OrderStatus::Accepted, &self.receipts),
            )
        }));
        views.extend(
            stored
                .iter()
                .map(|order| (order.id, self.stored_view(order))),
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

/// Whether an order in flight has become a row, or never will.
fn is_decided(pending: &PendingOrder) -> bool {
    let state = pending.slot.state();
    state.is_final() && state != SlotState::OnDisk
}

fn unknown_order(id: OrderId) -> Problem {
    Problem::new(404, "unknown_order", format!("there is no order {id}"))
}
