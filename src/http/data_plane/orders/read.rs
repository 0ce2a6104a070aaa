//! `GET /v1/orders/{order_id}` and `GET /v1/users/{user_id}/orders`.

use std::time::{Duration, Instant};

use super::elsewhere::{self, Away};
use super::follow::{Followed, GRACE, follow};
use crate::http::data_plane::context::{Context, lookup_problem, unknown_order};
use crate::http::data_plane::nodes::{self, Origin, Place};
use crate::http::message::{Request, Response};
use crate::http::problem::Problem;
use crate::http::wire::{OrderList, OrderView, query, write};
use crate::order::{OrderId, OrderStatus, UserId};
use crate::pipeline::orders::lookup::Found;

/// Orders in one page of a user's list, unless the request says otherwise.
const LIMIT_DEFAULT: u64 = 20;

/// Interval at which a parked order is looked for by requests that wait for it.
const PARKED_RECHECK: Duration = Duration::from_millis(500);

/// Pause before an order is read again that has left its waiting list since.
const LEFT_RECHECK: Duration = Duration::from_millis(5);

/// `GET /v1/orders/{order_id}?wait=N`.
pub(in crate::http::data_plane) fn one(
    context: &Context,
    request: &Request<'_>,
    origin: Origin,
    response: &mut Response,
    id: OrderId,
) -> Result<(), Problem> {
    let wait = Duration::from_secs(query::number(request.query(), "wait")?.unwrap_or(0));
    let started = Instant::now();
    let until = started + origin.limit(wait.min(context.order_timeout));
    let deadline = started + context.order_timeout + GRACE;
    match elsewhere::place(context, request, origin, deadline, id) {
        Ok(Place::Here(held)) => {
            let read = here(context, request, response, id, (until, deadline));
            held.vouched(read, response)
        }
        Ok(Place::Elsewhere(nodes, lane)) => {
            let away = Away {
                nodes,
                lane,
                request,
            };
            elsewhere::read(context, away, response, id, until)
        }
        // A closed lane: what is a row can be told all the same.
        Err(problem) if problem.status == 503 => {
            elsewhere::from_row(context, request, response, id, problem)
        }
        Err(problem) => Err(problem),
    }
}

/// Reads an order of this process.
fn here(
    context: &Context,
    request: &Request<'_>,
    response: &mut Response,
    id: OrderId,
    (until, deadline): (Instant, Instant),
) -> Result<(), Problem> {
    match follow(context, request, id, until, deadline)? {
        Followed::InFlight(pending) => {
            let found = Found::InFlight(pending);
            let view = OrderView::found(&found, &context.state, &context.receipts);
            write::json(response, 200, &view);
            return Ok(());
        }
        Followed::OnDisk(order) => {
            let view = context.view(&order, order.acknowledged_status());
            write::json(response, 200, &view);
            return Ok(());
        }
        Followed::Never => return Err(unknown_order(id)),
        Followed::Elsewhere => {}
    }
    if let Some(recent) = context.lookup.recent(id) {
        let order = &recent.order;
        // An order that has left its list is read from the database.
        if !order.waits() || context.stays_on_list(request, until, order.sku, id)? {
            if order.waits() {
                context.wait_for_turn(request, order.sku, id);
            }
            let view = context.view(order, order.status_in_time());
            write::json(response, 200, &view);
            return Ok(());
        }
    }
    loop {
        let stored = context
            .find_stored(request, deadline, id)?
            .ok_or_else(|| unknown_order(id))?;
        let is_waiting = stored.status == OrderStatus::Waitlisted;
        let stays = is_waiting && context.stays_on_list(request, until, stored.sku, id)?;
        let left = until.saturating_duration_since(Instant::now());
        let is_open = is_waiting || stored.status == OrderStatus::Accepted;
        if !is_open || stays || left.is_zero() || context.is_stopping() {
            if stays {
                context.wait_for_turn(request, stored.sku, id);
            }
            write::json(response, 200, &context.stored_view(&stored));
            return Ok(());
        }
        // Parked in the database; nothing wakes us when that ends. Or it has left its list since its row was read.
        let recheck = if is_waiting {
            LEFT_RECHECK
        } else {
            PARKED_RECHECK
        };
        context.on_tokio(request, deadline, async move {
            tokio::time::sleep(left.min(recheck)).await;
        })?;
    }
}

/// `GET /v1/users/{user_id}/orders?limit=&before=`, newest first.
pub(in crate::http::data_plane) fn list(
    context: &Context,
    request: &Request<'_>,
    origin: Origin,
    response: &mut Response,
    user_id: UserId,
) -> Result<(), Problem> {
    match nodes::place(context.nodes.as_ref(), origin, &user_id)? {
        Place::Here(held) => {
            let listed = list_here(context, request, response, user_id);
            held.vouched(listed, response)
        }
        Place::Elsewhere(nodes, lane) => {
            let away = Away {
                nodes,
                lane,
                request,
            };
            let until = Instant::now() + context.order_timeout;
            elsewhere::repeatable(context, away, "GET", response, until)
        }
    }
}

fn list_here(
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
    let deadline = Instant::now() + context.order_timeout;
    let (lookup, whole_history, of) = (context.lookup.clone(), context.user_index, user_id.clone());
    let found = context.on_tokio(request, deadline, async move {
        lookup.of_user(&user_id, before, limit, whole_history).await
    })?;
    let found = found.map_err(|error| lookup_problem(&of, &error))?;
    let view = |order| OrderView::found(order, &context.state, &context.receipts);
    let list = OrderList::of(found.iter().map(view).collect(), limit);
    write::json(response, 200, &list);
    Ok(())
}
