//! `GET /admin/v1/audit`: the counters against the rows.

use axum::extract::State;
use axum::response::{IntoResponse, Response};

use super::ControlPlane;
use super::failure::Failure;

/// Runs an audit. A client that goes away ends it, since this future is dropped with it.
pub(super) async fn run(State(plane): State<ControlPlane>) -> Result<Response, Failure> {
    let report = plane.parts()?.auditor.audit().await?;
    Ok(axum::Json(report).into_response())
}
