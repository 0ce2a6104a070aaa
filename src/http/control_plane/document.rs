//! `GET /openapi.json`: the description of both planes.

use axum::http::header;
use axum::response::{IntoResponse, Response};

/// Answers with the OpenAPI document.
pub(super) async fn get() -> Response {
    let json = [(header::CONTENT_TYPE, "application/json")];
    (json, crate::http::OPENAPI).into_response()
}
