//! Sinks of events: how far they are, their dead letters, and refilling them.

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::json;

use super::ControlPlane;
use super::extract::Segment;
use super::failure::Failure;
use crate::http::problem::Problem;
use crate::http::wire::events::{EventDeadLetterView, SinkView, resync_after};
use crate::store::events::{deliveries, sinks};

#[derive(Debug, Deserialize)]
pub(super) struct ListQuery {
    sink: Option<String>,
    /// 1 to 1,000; default 100.
    limit: Option<i64>,
}

#[derive(Debug, Deserialize)]
pub(super) struct ResyncQuery {
    after: Option<String>,
}

fn invalid(rejection: QueryRejection) -> Failure {
    Problem::new(400, "invalid_field", rejection.body_text()).into()
}

pub(super) async fn list_sinks(State(plane): State<ControlPlane>) -> Result<Response, Failure> {
    let sinks = SinkView::all(&plane.parts()?.sinks);
    Ok(axum::Json(json!({ "sinks": sinks })).into_response())
}

pub(super) async fn resync(
    State(plane): State<ControlPlane>,
    Segment(sink): Segment,
    query: Result<Query<ResyncQuery>, QueryRejection>,
) -> Result<Response, Failure> {
    let Query(query) = query.map_err(invalid)?;
    let after = resync_after(query.after.as_deref())?;
    if !sinks::resync(&plane.parts()?.database, &sink, after).await? {
        let detail = format!("there is no sink {sink} that has got events from this database");
        return Err(Problem::new(404, "unknown_sink", detail).into());
    }
    Ok(axum::Json(json!({ "sink": sink, "state": "refilling" })).into_response())
}

pub(super) async fn list(
    State(plane): State<ControlPlane>,
    query: Result<Query<ListQuery>, QueryRejection>,
) -> Result<Response, Failure> {
    let Query(query) = query.map_err(invalid)?;
    let limit = query.limit.unwrap_or(100);
    if !(1..=1_000).contains(&limit) {
        return Err(Problem::new(400, "invalid_field", "limit: must be 1 to 1000").into());
    }
    let database = &plane.parts()?.database;
    let letters = deliveries::dead_letters(database, query.sink.as_deref(), limit).await?;
    let views: Vec<_> = letters.iter().map(EventDeadLetterView::of).collect();
    Ok(axum::Json(json!({ "event_dead_letters": views })).into_response())
}

pub(super) async fn retry(
    State(plane): State<ControlPlane>,
    Segment(id): Segment,
) -> Result<Response, Failure> {
    let letter = match id.parse() {
        Ok(number) => deliveries::retry(&plane.parts()?.database, number).await?,
        Err(_) => None,
    };
    answer(&id, letter.as_ref())
}

pub(super) async fn discard(
    State(plane): State<ControlPlane>,
    Segment(id): Segment,
) -> Result<Response, Failure> {
    let letter = match id.parse() {
        Ok(number) => deliveries::discard(&plane.parts()?.database, number).await?,
        Err(_) => None,
    };
    answer(&id, letter.as_ref())
}

fn answer(id: &str, letter: Option<&deliveries::Delivery>) -> Result<Response, Failure> {
    let letter = letter.ok_or_else(|| {
        let detail = format!("there is no dead letter {id} of an event");
        Problem::new(404, "unknown_dead_letter", detail)
    })?;
    Ok(axum::Json(EventDeadLetterView::of(letter)).into_response())
}
