//! Parts of a request, or a problem if they are invalid: axum's own rejections are plain text.

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, FromRequestParts, Path, Request, State};
use axum::http::HeaderMap;
use axum::http::request::Parts;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::failure::Failure;
use crate::http::problem::Problem;
use crate::http::wire::{self, no_members, query};
use crate::order::IdempotencyKey;

/// The whole body.
pub(super) struct Body(pub(super) Bytes);

impl<S: Send + Sync> FromRequest<S> for Body {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &S) -> Result<Self, Failure> {
        Bytes::from_request(request, state)
            .await
            .map(Body)
            .map_err(unreadable)
    }
}

/// The answer to a request whose body cannot be read.
pub(super) fn unreadable(rejection: BytesRejection) -> Failure {
    let detail = rejection.body_text();
    Failure(match rejection.into_response().status().as_u16() {
        413 => Problem::new(413, "body_too_large", "the request body is too large"),
        _ => Problem::new(400, "bad_request", detail),
    })
}

/// The one variable segment of the path, its percent-encoding undone.
pub(super) struct Segment(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Segment {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        Path::<String>::from_request_parts(parts, state)
            .await
            .map(|Path(segment)| Segment(segment))
            .map_err(|e| Failure(Problem::new(404, "not_found", e.body_text())))
    }
}

/// The query fields and the body that a route accepts; everything else is refused.
#[derive(Clone, Copy)]
pub(super) struct Accepts {
    /// The names of its query fields.
    pub(super) query: &'static [&'static str],
    /// Whether its handler reads a body. If not, only `{}` passes.
    pub(super) body: bool,
}

/// Refuses input that the handler would ignore: other query fields, or a body that is not read.
pub(super) async fn only(
    State(accepts): State<Accepts>,
    request: Request,
    next: Next,
) -> Result<Response, Failure> {
    query::only(request.uri().query().unwrap_or_default(), accepts.query)?;
    if accepts.body {
        return Ok(next.run(request).await);
    }
    let (parts, body) = request.into_parts();
    let request = Request::from_parts(parts.clone(), body);
    let Body(body) = Body::from_request(request, &()).await?;
    no_members(&body)?;
    let request = Request::from_parts(parts, axum::body::Body::empty());
    Ok(next.run(request).await)
}

/// The idempotency key of a request, if it has one.
pub(super) fn idempotency_key(headers: &HeaderMap) -> Result<Option<IdempotencyKey<'_>>, Problem> {
    let values = headers.get_all("idempotency-key").iter();
    wire::idempotency_key(values.map(|value| value.as_bytes()))
}
