//! Access to the control plane: a bearer token for programs, a session for a browser that logged in
//! with one. Without a configured token the plane is open, which only a loopback listener may be.
//!
//! A browser sends its cookies with requests that other sites make it send, and can reach loopback.
//! So a request of a browser that changes something must come from our own page, and a plane without
//! a token answers only under names of this machine ([`crate::http::origin`]).

use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, header};
use axum::middleware::Next;
use axum::response::Response;

use super::ControlPlane;
use super::failure::Failure;
use crate::http::origin::SiteFields;
use crate::http::problem::Problem;
use crate::http::wire::require_identity;

/// Screens every request: without a token only names of this machine are answered, and no coding of
/// a body is undone.
pub(super) async fn screen(
    State(plane): State<ControlPlane>,
    request: Request,
    next: Next,
) -> Result<Response, Failure> {
    let headers = request.headers();
    if plane.shared.tokens.is_open() {
        site(headers).check_host()?;
    }
    let codings = headers.get_all(header::CONTENT_ENCODING).iter();
    require_identity(codings.map(|value| value.as_bytes()))?;
    Ok(next.run(request).await)
}

/// Admits a request with a token or of a session, unless another site sent it.
pub(super) async fn authorize(
    State(plane): State<ControlPlane>,
    request: Request,
    next: Next,
) -> Result<Response, Failure> {
    let (tokens, headers) = (&plane.shared.tokens, request.headers());
    let authorization = headers.get(header::AUTHORIZATION).map(|v| v.as_bytes());
    let by_token = !tokens.is_open() && tokens.allow(authorization);
    if !by_token {
        if !tokens.is_open() && !plane.shared.sessions.allow(headers) {
            return Err(Failure(Problem::unauthorized()));
        }
        let changes = !matches!(*request.method(), Method::GET | Method::HEAD);
        if changes {
            site(headers).check_site()?;
            // A program has the token; a browser always sends at least one of these fields.
            let told = ["sec-fetch-site", "origin"].map(|name| headers.contains_key(name));
            if !tokens.is_open() && told == [false, false] {
                let detail = "Origin: a session needs it; a program sends the bearer token";
                return Err(Failure(Problem::new(403, "cross_origin", detail)));
            }
        }
    }
    Ok(next.run(request).await)
}

/// The fields that tell which site made a request.
pub(super) fn site(headers: &HeaderMap) -> SiteFields<'_> {
    let field = |name: &str| headers.get(name).map(|value| value.as_bytes());
    SiteFields {
        host: field("host"),
        origin: field("origin"),
        sec_fetch_site: field("sec-fetch-site"),
    }
}
