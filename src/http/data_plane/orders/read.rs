//! `GET /v1/orders/{order_id}` and `GET /v1/users/{user_id}/orders`.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::follow::{Followed, GRACE, follow};
use crate::http::data_plane::context::{Context, database_problem, unknown_order};
use crate::http::message::{Request, Response};
use crate::http::problem::Problem;
use crate::http::wire::{OrderList, OrderView, query, write};
use crate::order::{OrderId, OrderStatus, UserId};
use crate::state::pending::{PendingOrder, SlotState};
use crate::store::postgres::orders;

/// Orders in one page of a user's list, unless the request says otherwise.
const LIMIT_DEFAULT: u64 = 20;

/// Interval at which a parked order is looked for by requests that wait for it.
const PARKED_RECHECK: Duration = Duration::from_millis(500);

/// `GET /v1/orders/{order_id}?wait=N`.
pub(in crate::http::data_plane) fn one(
    context: &Context,
    request: &Request<'_>,
    response: &mut Response,
    id: OrderId,
) -> Result<(), Problem> {
    let wait = Duration::from_secs(query::number(request.query(), "wait")?.unwrap_or(0));
    let started = Instant::now();
    let until = started + wait.min(context.order_timeout);
    let deadline = started + context.order_timeout + GRACE;
    match follow(context, request, id, until, deadline)? {
        Followed::InFlight(pending) => {
            let status = if pending.slot.is_durable() {
                OrderStatus::Accepted
            } else {
                OrderStatus::Undecided
            };
            write::json(
                response,
                200,
                &OrderView::of(&pending.order, status, &context.receipts),
            );
            return Ok(());
        }
        Followed::OnDisk(order) => {
            write::json(
                response,
                200,
                &OrderView::of(&order, OrderStatus::Accepted, &context.receipts),
            );
            return Ok(());
        }
        Followed::Never => return Err(unknown_order(id)),
        Followed::Elsewhere => {}
    }
    if let Some(recent) = context.lookup.recent(id) {
        write::json(
            response,
            200,
            &OrderView::of(
                &recent.order,
                OrderStatus::PendingPayment,
                &context.receipts,
            ),
        );
        return Ok(());
    }
    loop {
        let stored = context
            .find_stored(request, deadline, id)?
            .ok_or_else(|| unknown_order(id))?;
        let left = until.saturating_duration_since(Instant::now());
        if stored.status != OrderStatus::Accepted || left.is_zero() || context.is_stopping() {
            write::json(response, 200, &context.stored_view(&stored));
            return Ok(());
        }
        // Parked in the database; nothing wakes us when that ends.
        context.on_tokio(request, deadline, async move {
            tokio::time::sleep(left.min(PARKED_RECHECK)).await;
        })?;
    }
}

/// `GET /v1/users/{user_id}/orders?limit=&before=`, newest first.
pub(in crate::http::data_plane) fn list(
    context: &Context,
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
    let known = context.state.buyers.page(&user_id, before, limit);
    let ids: Vec<OrderId> = known.iter().map(|known| known.order_id).collect();
    let in_flight: HashMap<OrderId, _> = ids
        .iter()
        .filter_map(|id| Some((*id, context.state.pending.get(*id)?)))
        .collect();
    let deadline = Instant::now() + context.order_timeout;
    let mut on_disk = Vec::new();
    for id in ids.iter().filter(|id| !in_flight.contains_key(id)) {
        on_disk.extend(context.find_on_disk(request, deadline, *id)?);
    }
    let (database, whole_history) = (context.database.clone(), context.user_index);
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
        context.on_tokio(request, deadline, async move {
            if whole_history {
                orders::of_user(&database, &user_id, before, limit as i64).await
            } else {
                orders::find_among(&database, &wanted).await
            }
        })?
    };
    let stored = stored.map_err(|error| database_problem(&error))?;
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
            (
                *id,
                OrderView::of(&pending.order, status, &context.receipts),
            )
        })
        .collect();
    views.extend(on_disk.iter().map(|order| {
        (
            order.id,
            OrderView::of(order, OrderStatus::Accepted, &context.receipts),
        )
    }));
    views.extend(
        stored
            .iter()
            .map(|order| (order.id, context.stored_view(order))),
    );
    let mut newest: Vec<_> = views.into_iter().collect();
    newest.sort_unstable_by(|(a, _), (b, _)| b.cmp(a));
    newest.truncate(limit);
    let next_before = newest
        .last()
        .map(|(id, _)| *id)
        .filter(|_| newest.len() == limit);
    let orders = newest.into_iter().map(|(_, view)| view).collect();
    write::json(
        response,
        200,
        &OrderList {
            orders,
            next_before,
        },
    );
    Ok(())
}

/// Whether an order in flight has become a row, or never will.
fn is_decided(pending: &PendingOrder) -> bool {
    let state = pending.slot.state();
    state.is_final() && state != SlotState::OnDisk
}
