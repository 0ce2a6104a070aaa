//! SKU administration.

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::extract::{Body, Segment, idempotency_key};
use super::failure::Failure;
use super::{ControlPlane, Parts};
use crate::http::problem::Problem;
use crate::http::wire::{DrawBody, OperatorSkuView, PutSkuView, RestockBody, SkuBody};
use crate::order::{IdempotencyKey, SkuId};
use crate::state::stock::Sku;

pub(super) async fn list(State(plane): State<ControlPlane>) -> Result<Response, Failure> {
    let catalogue = &plane.parts()?.state.catalogue;
    let skus = catalogue.all();
    let views: Vec<_> = skus
        .iter()
        .map(|sku| OperatorSkuView::of(sku, catalogue.is_paused()))
        .collect();
    Ok(axum::Json(json!({ "skus": views, "paused": catalogue.is_paused() })).into_response())
}

pub(super) async fn put(
    State(plane): State<ControlPlane>,
    Segment(sku_id): Segment,
    Body(body): Body,
) -> Result<Response, Failure> {
    let parts = plane.parts()?;
    let id = parse_id(&sku_id)?;
    let body = SkuBody::parse(&id, &body)?;
    let put = parts.operator.put_sku(&id, body.terms, body.total).await?;
    let status = if put.is_new {
        StatusCode::CREATED
    } else {
        StatusCode::OK
    };
    let view = OperatorSkuView::of(&put.sku, parts.state.catalogue.is_paused());
    let answer = PutSkuView::of(view, put.changed);
    told(parts, (status, axum::Json(answer)).into_response()).await
}

pub(super) async fn restock(
    State(plane): State<ControlPlane>,
    Segment(sku_id): Segment,
    headers: HeaderMap,
    Body(body): Body,
) -> Result<Response, Failure> {
    let parts = plane.parts()?;
    let id = parse_id(&sku_id)?;
    let key = idempotency_key(&headers)?;
    let units = RestockBody::parse(&body)?.quantity;
    let (sku, replayed) = parts
        .operator
        .restock(&id, units, key.map(IdempotencyKey::as_str))
        .await?;
    let mut response = view(parts, &sku).into_response();
    if replayed && let Ok(value) = "true".parse() {
        response.headers_mut().insert("idempotency-replayed", value);
    }
    told(parts, response).await
}

pub(super) async fn draw(
    State(plane): State<ControlPlane>,
    Segment(sku_id): Segment,
    Body(body): Body,
) -> Result<Response, Failure> {
    let parts = plane.parts()?;
    let id = parse_id(&sku_id)?;
    let beacon = DrawBody::parse(&body)?;
    let header = parts.operator.supply_beacon(&id, &beacon).await?;
    Ok(axum::Json(header).into_response())
}

pub(super) async fn pause(
    State(plane): State<ControlPlane>,
    Segment(sku_id): Segment,
) -> Result<Response, Failure> {
    let parts = plane.parts()?;
    let sku = parts.operator.pause(&parse_id(&sku_id)?).await?;
    told(parts, view(parts, &sku).into_response()).await
}

pub(super) async fn resume(
    State(plane): State<ControlPlane>,
    Segment(sku_id): Segment,
) -> Result<Response, Failure> {
    let parts = plane.parts()?;
    let sku = parts.operator.resume(&parse_id(&sku_id)?).await?;
    told(parts, view(parts, &sku).into_response()).await
}

pub(super) async fn pause_all(State(plane): State<ControlPlane>) -> Result<Response, Failure> {
    let parts = plane.parts()?;
    parts.operator.pause_all().await?;
    told(parts, paused(parts)).await
}

pub(super) async fn resume_all(State(plane): State<ControlPlane>) -> Result<Response, Failure> {
    let parts = plane.parts()?;
    parts.operator.resume_all().await?;
    told(parts, paused(parts)).await
}

/// Names the nodes that have not taken a change over within a second. It is in force at this one.
async fn told(parts: &Parts, mut response: Response) -> Result<Response, Failure> {
    let unreached: Vec<String> = match parts.operator.unreached().await {
        Ok(nodes) => nodes.iter().map(i16::to_string).collect(),
        Err(error) => {
            tracing::warn!(reason = %error, "which nodes know an operator's change cannot be told");
            vec!["unknown".to_owned()]
        }
    };
    if !unreached.is_empty()
        && let Ok(value) = unreached.join(", ").parse()
    {
        response
            .headers_mut()
            .insert("millrace-unreached-nodes", value);
    }
    Ok(response)
}

fn paused(parts: &Parts) -> Response {
    let paused = parts.state.catalogue.is_paused();
    axum::Json(json!({ "paused": paused })).into_response()
}

fn view(parts: &Parts, sku: &Sku) -> axum::Json<OperatorSkuView> {
    axum::Json(OperatorSkuView::of(sku, parts.state.catalogue.is_paused()))
}

fn parse_id(text: &str) -> Result<SkuId, Problem> {
    SkuId::new(text).map_err(|e| Problem::new(400, "invalid_field", format!("sku_id: {e}")))
}
