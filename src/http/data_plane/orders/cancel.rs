//! `POST /v1/orders/{order_id}/cancel`.

use std::time::Instant;

use super::elsewhere::{self, Away};
use super::follow::{Followed, GRACE, follow};
use crate::http::data_plane::context::{Context, database_problem, unknown_order};
use crate::http::data_plane::nodes::{Origin, Place};
use crate::http::message::{Request, Response};
use crate::http::problem::Problem;
use crate::http::wire::write;
use crate::order::OrderId;
use crate::pipeline::orders::cancel::CancelError;

/// Cancels an order. Waits first if it is being written.
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
    let cancelled =
        context.on_tokio(request, deadline, async move { canceller.cancel(id).await })?;
    let order = cancelled.map_err(|error| match error {
        CancelError::Unknown(id) => unknown_order(id),
        CancelError::NotCancellable(..) => Problem::new(409, "not_cancellable", error.to_string()),
        CancelError::Busy => Problem::new(503, "overloaded", error.to_string()).retry_after(1),
        CancelError::Store(error) => database_problem(&error),
    })?;
    write::json(response, 200, &context.stored_view(&order));
    Ok(())
}
