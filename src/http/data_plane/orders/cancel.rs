//! `POST /v1/orders/{order_id}/cancel`.

use std::time::Instant;

use super::elsewhere::{self, Away};
use super::follow::{Followed, GRACE, follow};
use crate::http::data_plane::context::{Context, database_problem, unknown_order};
use crate::http::data_plane::nodes::{Origin, Place};
use crate::http::message::{Request, Response};
use crate::http::problem::Problem;
use crate::http::wire::{query, write};
use crate::order::OrderId;
use crate::pipeline::orders::cancel::{CancelError, Which};

/// Cancels an order; with `?only=waitlisted` only if it waits for units. Waits first if it is being written.
pub(in crate::http::data_plane) fn cancel(
    context: &Context,
    request: &Request<'_>,
    origin: Origin,
    response: &mut Response,
    id: OrderId,
) -> Result<(), Problem> {
    let until = Instant::now() + origin.limit(context.order_timeout);
    match elsewhere::place(context, request, origin, until + GRACE, id)? {
        Place::Here(held) => {
            let cancelled = here(context, request, response, id, until);
            held.vouched(cancelled, response)
        }
        Place::Elsewhere(nodes, lane) => {
            let away = Away {
                nodes,
                lane,
                request,
            };
            elsewhere::repeatable(context, away, "POST", response, until)
        }
    }
}

/// Cancels an order of this process.
fn here(
    context: &Context,
    request: &Request<'_>,
    response: &mut Response,
    id: OrderId,
    until: Instant,
) -> Result<(), Problem> {
    let which = match query::value(request.query(), "only") {
        None => Which::Unpaid,
        Some("waitlisted") => Which::Waiting,
        Some(_) => {
            let detail = "only: must be waitlisted, or left out";
            return Err(Problem::new(400, "invalid_field", detail));
        }
    };
    let deadline = until + GRACE;
    match follow(context, request, id, until, deadline)? {
        Followed::InFlight(_) | Followed::OnDisk(_) => {
            let detail = format!("order {id} is still being written; ask again");
            return Err(Problem::new(503, "overloaded", detail).retry_after(1));
        }
        Followed::Never => return Err(unknown_order(id)),
        Followed::Elsewhere => {}
    }
    let canceller = context.canceller.clone();
    let cancelled = context.on_tokio(request, deadline, async move {
        canceller.cancel(id, which).await
    })?;
    let order = cancelled.map_err(|error| match error {
        CancelError::Unknown(id) => unknown_order(id),
        CancelError::AlreadyAssigned(..) => {
            Problem::new(409, "already_assigned", error.to_string())
        }
        CancelError::NotCancellable(..) => Problem::new(409, "not_cancellable", error.to_string()),
        CancelError::Busy => Problem::new(503, "overloaded", error.to_string()).retry_after(1),
        CancelError::Store(error) => database_problem(&error),
    })?;
    write::json(response, 200, &context.stored_view(&order));
    Ok(())
}
