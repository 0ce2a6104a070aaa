//! Payments for an operator: those without an order, those that have to be refunded, and the record
//! of what was done.

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::json;

use super::extract::{Body, Segment};
use super::failure::Failure;
use super::{ControlPlane, Parts, nodes};
use crate::http::problem::Problem;
use crate::http::wire::payments::{CloseBody, PaymentView, RefundedBody};
use crate::http::wire::query;
use crate::order::payment::PaymentState;
use crate::order::{Lane, OrderId, UserId};
use crate::store::postgres::orders;
use crate::store::postgres::payments::{self, StoredPayment};
use crate::store::settlement::Destination;
use crate::store::settlement::refunds::{Closed, Recorded};

#[derive(Debug, Deserialize)]
pub(super) struct ListQuery {
    /// One state; default: every open one.
    state: Option<String>,
    /// 1 to 1,000; default 100.
    #[serde(default = "limit_default")]
    limit: i64,
    /// Only those with a smaller id.
    #[serde(default = "before_default")]
    before: i64,
}

fn limit_default() -> i64 {
    100
}

fn before_default() -> i64 {
    i64::MAX
}

/// `GET /admin/v1/orphan-payments`: payments without an order.
pub(super) async fn orphans(
    State(plane): State<ControlPlane>,
    query: Result<Query<ListQuery>, QueryRejection>,
) -> Result<Response, Failure> {
    list(plane.parts()?, query, true).await
}

/// `GET /admin/v1/payments`: payments; the open ones unless the query says otherwise.
pub(super) async fn all(
    State(plane): State<ControlPlane>,
    query: Result<Query<ListQuery>, QueryRejection>,
) -> Result<Response, Failure> {
    list(plane.parts()?, query, false).await
}

async fn list(
    parts: &Parts,
    query: Result<Query<ListQuery>, QueryRejection>,
    without_order: bool,
) -> Result<Response, Failure> {
    let invalid = |detail: String| Problem::new(400, "invalid_field", detail);
    let Query(query) = query.map_err(|e| invalid(e.body_text()))?;
    if !(1..=1_000).contains(&query.limit) {
        return Err(invalid("limit: must be 1 to 1000".to_owned()).into());
    }
    if query.before < 1 {
        return Err(invalid("before: must be 1 or more".to_owned()).into());
    }
    let states = match query.state.as_deref() {
        None => vec![PaymentState::Orphan, PaymentState::RefundDue],
        Some(word) => vec![PaymentState::from_word(word).ok_or_else(|| {
            let words: Vec<_> = PaymentState::ALL.iter().map(|one| one.as_str()).collect();
            invalid(format!("state: must be one of {}", words.join(", ")))
        })?],
    };
    let payments = payments::list(
        &parts.database,
        &states,
        without_order,
        query.before,
        query.limit,
    )
    .await?;
    let views: Vec<_> = payments.iter().map(|one| view(parts, one)).collect();
    let full = payments.len() as i64 == query.limit;
    let next_before = payments.last().filter(|_| full).map(|one| one.id);
    Ok(axum::Json(json!({ "payments": views, "next_before": next_before })).into_response())
}

fn view<'a>(parts: &Parts, payment: &'a StoredPayment) -> PaymentView<'a> {
    PaymentView::of(payment, &parts.receipts, &parts.state.catalogue)
}

pub(super) async fn get(
    State(plane): State<ControlPlane>,
    Segment(id): Segment,
) -> Result<Response, Failure> {
    as_it_stands(plane.parts()?, parse_id(&id)?).await
}

async fn as_it_stands(parts: &Parts, id: i64) -> Result<Response, Failure> {
    let payment = payments::find(&parts.database, id).await?;
    let payment = payment.ok_or_else(|| unknown_payment(&id.to_string()))?;
    Ok(axum::Json(view(parts, &payment)).into_response())
}

/// `POST /admin/v1/orphan-payments/{id}/retry`: looks for its order now, and recovers the order from
/// the receipt if it does not exist.
pub(super) async fn retry(
    State(plane): State<ControlPlane>,
    Segment(id): Segment,
) -> Result<Response, Failure> {
    let (parts, id) = (plane.parts()?, parse_id(&id)?);
    let _held = match &parts.state.lanes {
        None => None,
        Some(of) => {
            let payment = payments::find(&parts.database, id).await?;
            let order_id = payment.and_then(|payment| payment.order_id);
            let lane = order_id.and_then(|order_id| of.cutover.lane_of(order_id));
            lane.map(|lane| nodes::hold(parts, lane)).transpose()?
        }
    };
    if !parts.payments.retry(id).await? {
        let payment = payments::find(&parts.database, id).await?;
        let payment = payment.ok_or_else(|| unknown_payment(&id.to_string()))?;
        let detail = format!("payment {id} is {} and no longer an orphan", payment.state);
        return Err(Problem::new(409, "not_an_orphan", detail).into());
    }
    as_it_stands(parts, id).await
}

/// `POST /admin/v1/orphan-payments/{id}/close`: records that a person has dealt with the money.
pub(super) async fn close(
    State(plane): State<ControlPlane>,
    Segment(id): Segment,
    Body(body): Body,
) -> Result<Response, Failure> {
    let (parts, id) = (plane.parts()?, parse_id(&id)?);
    let note = CloseBody::parse(&body)?;
    match parts.payments.close(id, note).await? {
        Closed::Done(_) => {
            tracing::info!(
                payment = id,
                "an operator has closed a payment without an order"
            );
            as_it_stands(parts, id).await
        }
        Closed::Unknown => Err(unknown_payment(&id.to_string()).into()),
        Closed::HasOrder(order_id) => {
            let detail = format!(
                "order {order_id} of this payment exists: record its refund at /admin/v1/orders/{order_id}/refunded"
            );
            Err(Problem::new(409, "not_an_orphan", detail).into())
        }
        Closed::Settled => {
            let detail = format!("payment {id} is matched with its order, or closed already");
            Err(Problem::new(409, "not_an_orphan", detail).into())
        }
    }
}

/// `POST /admin/v1/orders/{order_id}/refunded`: records that the money of an order was refunded.
pub(super) async fn refunded(
    State(plane): State<ControlPlane>,
    Segment(id): Segment,
    Body(body): Body,
) -> Result<Response, Failure> {
    let parts = plane.parts()?;
    let unknown = || Problem::new(404, "unknown_order", format!("there is no order {id}"));
    let order_id = OrderId::parse(&id).ok_or_else(unknown)?;
    let note = RefundedBody::parse(&body)?;
    let _held = match &parts.state.lanes {
        None => None,
        Some(_) => {
            let order = orders::find(&parts.database, order_id).await?;
            let user_id = UserId::from_row(&order.ok_or_else(unknown)?.user_id);
            nodes::hold(parts, Lane::of(&user_id))?
        }
    };
    let recorded = parts.operator.record_refund(order_id, note).await?;
    let restocked = match recorded {
        Recorded::Done(moved) => {
            tracing::info!(%order_id, "an operator has recorded a refund");
            moved.map_or(0, |moved| match moved.to {
                Destination::Restocked | Destination::Pool { is_free: true, .. } => {
                    moved.units.quantity
                }
                _ => 0,
            })
        }
        Recorded::Already => 0,
        Recorded::StandsAt(status) => {
            let detail =
                format!("order {order_id} is {status}: none of its payments has to be refunded");
            return Err(Problem::new(409, "not_refundable", detail).into());
        }
        Recorded::UnitsElsewhere => {
            let detail = format!(
                "the units of order {order_id} are counted as sold by another node, which passes them on within a second; \
                 nothing has changed: send the request again"
            );
            return Err(Problem::new(503, "not_ready", detail).retry_after(1).into());
        }
        Recorded::Unknown => return Err(unknown().into()),
    };
    let order = orders::find(&parts.database, order_id)
        .await?
        .ok_or_else(unknown)?;
    let body = json!({
        "order_id": order_id,
        "status": order.status.as_str(),
        "refund_reason": order.refund_reason,
        "restocked": restocked,
    });
    Ok(axum::Json(body).into_response())
}

fn unknown_payment(id: &str) -> Problem {
    Problem::new(404, "unknown_payment", format!("there is no payment {id}"))
}

fn parse_id(text: &str) -> Result<i64, Problem> {
    query::decimal(text).ok_or_else(|| unknown_payment(text))
}
