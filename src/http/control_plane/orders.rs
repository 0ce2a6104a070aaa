//! Orders for an operator: one with its whole history, and those of a buyer.

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;

use super::extract::Segment;
use super::failure::Failure;
use super::{ControlPlane, Parts};
use crate::http::problem::Problem;
use crate::http::wire::order_history::HistoryView;
use crate::http::wire::{OrderList, OrderView};
use crate::order::{OrderId, UserId};
use crate::pipeline::orders::lookup::{Found, LookupError};
use crate::state::pending::SlotState;
use crate::store::postgres::order_history;

/// `GET /admin/v1/orders/{order_id}`: the order, wherever it is, and what is stored about it.
pub(super) async fn history(
    State(plane): State<ControlPlane>,
    Segment(id): Segment,
) -> Result<Response, Failure> {
    let parts = plane.parts()?;
    let unknown = || Problem::new(404, "unknown_order", format!("there is no order {id}"));
    let order_id = OrderId::parse(&id).ok_or_else(unknown)?;
    let order = find(parts, order_id).await?;
    let stored = order_history::find(&parts.database, order_id).await?;
    if order.is_none() && stored.is_empty() {
        return Err(unknown().into());
    }
    let view = HistoryView::of(order.as_ref(), &stored, &parts.state, &parts.receipts);
    Ok(axum::Json(view).into_response())
}

/// An order, unless it was given back. One that was decided a moment ago is read from the database.
async fn find(parts: &Parts, id: OrderId) -> Result<Option<Found>, LookupError> {
    let found = parts.lookup.find(id).await?;
    let Some(Found::InFlight(pending)) = &found else {
        return Ok(found);
    };
    let state = pending.slot.state();
    if !state.is_final() || state == SlotState::OnDisk {
        return Ok(found);
    }
    let stored = parts.lookup.stored(id).await?;
    Ok(stored.map(|stored| Found::Stored(Box::new(stored))))
}

#[derive(Debug, Deserialize)]
pub(super) struct ListQuery {
    /// 1 to 100; default 20.
    #[serde(default = "limit_default")]
    limit: usize,
    /// Only those with a smaller id.
    before: Option<String>,
}

fn limit_default() -> usize {
    20
}

/// `GET /admin/v1/users/{user_id}/orders`: as on the data plane.
pub(super) async fn of_user(
    State(plane): State<ControlPlane>,
    Segment(user_id): Segment,
    query: Result<Query<ListQuery>, QueryRejection>,
) -> Result<Response, Failure> {
    let invalid = |detail: String| Problem::new(400, "invalid_field", detail);
    let parts = plane.parts()?;
    let user_id = UserId::new(&user_id).map_err(|e| invalid(format!("user_id: {e}")))?;
    let Query(ListQuery { limit, before }) = query.map_err(|e| invalid(e.body_text()))?;
    if !(1..=100).contains(&limit) {
        return Err(invalid("limit: must be 1 to 100".to_owned()).into());
    }
    let before = match before {
        None => OrderId::MAX,
        Some(text) => OrderId::parse(&text)
            .ok_or_else(|| invalid("before: must be an order id".to_owned()))?,
    };
    let lookup = &parts.lookup;
    let found = lookup
        .of_user(&user_id, before, limit, parts.user_index)
        .await?;
    let view = |order| OrderView::found(order, &parts.state, &parts.receipts);
    let list = OrderList::of(found.iter().map(view).collect(), limit);
    Ok(axum::Json(list).into_response())
}
