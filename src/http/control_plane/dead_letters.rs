//! Dead letters: rows that the database refused, for an operator to decide on.

use axum::extract::{Query, State};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::json;

use super::extract::{Body, Segment};
use super::failure::Failure;
use super::{ControlPlane, Parts, nodes};
use crate::http::problem::Problem;
use crate::http::wire::{DeadLetterView, NoteBody, query};
use crate::order::{Lane, UserId};
use crate::state::lanes::LanePass;
use crate::store::postgres::dead_letters;

#[derive(Debug, Deserialize)]
pub(super) struct ListQuery {
    /// Whether discarded dead letters are listed too.
    #[serde(default)]
    discarded: bool,
    /// 1 to 1,000; default 100.
    #[serde(default = "limit_default")]
    limit: i64,
}

fn limit_default() -> i64 {
    100
}

pub(super) async fn list(
    State(plane): State<ControlPlane>,
    query: Result<Query<ListQuery>, axum::extract::rejection::QueryRejection>,
) -> Result<Response, Failure> {
    let Query(query) = query.map_err(|e| Problem::new(400, "invalid_field", e.body_text()))?;
    if !(1..=1_000).contains(&query.limit) {
        return Err(Problem::new(400, "invalid_field", "limit: must be 1 to 1000").into());
    }
    let letters =
        dead_letters::list(&plane.parts()?.database, query.discarded, query.limit).await?;
    let views: Vec<_> = letters.iter().map(DeadLetterView::of).collect();
    Ok(axum::Json(json!({ "dead_letters": views })).into_response())
}

pub(super) async fn get(
    State(plane): State<ControlPlane>,
    Segment(id): Segment,
) -> Result<Response, Failure> {
    let letter = dead_letters::find(&plane.parts()?.database, parse_id(&id)?).await?;
    let letter = letter.ok_or_else(|| {
        Problem::new(
            404,
            "unknown_dead_letter",
            format!("there is no dead letter {id}"),
        )
    })?;
    Ok(axum::Json(DeadLetterView::of(&letter)).into_response())
}

pub(super) async fn retry(
    State(plane): State<ControlPlane>,
    Segment(id): Segment,
) -> Result<Response, Failure> {
    let (parts, id) = (plane.parts()?, parse_id(&id)?);
    let _held = hold(parts, id).await?;
    let letter = parts.operator.retry_dead_letter(id).await?;
    Ok(
        axum::Json(json!({ "order_id": letter.order_id, "status": "pending_payment" }))
            .into_response(),
    )
}

pub(super) async fn discard(
    State(plane): State<ControlPlane>,
    Segment(id): Segment,
    Body(body): Body,
) -> Result<Response, Failure> {
    let note = NoteBody::parse(&body)?.note;
    let (parts, id) = (plane.parts()?, parse_id(&id)?);
    let _held = hold(parts, id).await?;
    let letter = parts.operator.discard_dead_letter(id, note.as_deref());
    let letter = letter.await?;
    Ok(axum::Json(DeadLetterView::of(&letter)).into_response())
}

/// Holds the lane of a dead letter's buyer, at a node of a cluster.
async fn hold(parts: &Parts, id: i64) -> Result<Option<LanePass<'_>>, Failure> {
    if parts.state.lanes.is_none() {
        return Ok(None);
    }
    let letter = dead_letters::find(&parts.database, id).await?;
    let lane = letter.map(|letter| Lane::of(&UserId::from_row(&letter.user_id)));
    Ok(lane
        .map(|lane| nodes::hold(parts, lane))
        .transpose()?
        .flatten())
}

fn parse_id(text: &str) -> Result<i64, Problem> {
    query::decimal(text).ok_or_else(|| {
        Problem::new(
            404,
            "unknown_dead_letter",
            format!("there is no dead letter {text}"),
        )
    })
}
