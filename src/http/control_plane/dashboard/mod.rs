//! The dashboard: one page that loads nothing from elsewhere, and its login.
//!
//! `page.html` has the pages that its head leads to. `styles` and `scripts` are put together into one style sheet and
//! one script when the program is built, so that a nonce admits each and nothing is fetched. A file of `scripts` has one
//! noun; they share one scope, and each uses only what stands before it, but for `poll`, which `start.js` has.

use std::sync::LazyLock;

use axum::Form;
use axum::extract::State;
use axum::extract::rejection::FormRejection;
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use rand::Rng;
use serde::Deserialize;

use super::ControlPlane;
use super::access::site;
use super::failure::Failure;
use super::sessions::{COOKIE, SESSION_LASTS};
use crate::http::problem::Problem;

const PAGE: &str = include_str!("page.html");
const STYLES: &str = concat!(
    include_str!("styles/base.css"),
    include_str!("styles/layout.css"),
    include_str!("styles/parts.css"),
);
const SCRIPTS: &str = concat!(
    include_str!("scripts/dom.js"),
    include_str!("scripts/api.js"),
    include_str!("scripts/dialog.js"),
    include_str!("scripts/state.js"),
    include_str!("scripts/chart.js"),
    include_str!("scripts/sku_parts.js"),
    include_str!("scripts/live.js"),
    include_str!("scripts/skus.js"),
    include_str!("scripts/sku_form.js"),
    include_str!("scripts/payments.js"),
    include_str!("scripts/dead_letters.js"),
    include_str!("scripts/events.js"),
    include_str!("scripts/order_history.js"),
    include_str!("scripts/orders.js"),
    include_str!("scripts/nodes.js"),
    include_str!("scripts/checks.js"),
    include_str!("scripts/start.js"),
);
/// The page with its styles and scripts; what differs between requests is not filled in yet.
static DASHBOARD: LazyLock<String> = LazyLock::new(|| {
    let styled = PAGE.replacen("__STYLES__", STYLES, 1);
    styled.replacen("__SCRIPTS__", SCRIPTS, 1)
});
const LOGIN: &str = include_str!("login.html");
/// Placeholder in the pages for the nonce of their one script and their one style sheet.
const NONCE: &str = "__NONCE__";
/// Placeholder in the login page for its error message.
const MESSAGE: &str = "__MESSAGE__";

#[derive(Deserialize)]
pub(super) struct LoginForm {
    token: String,
}

/// `GET /`: the dashboard, or the login form if a login is needed.
pub(super) async fn page(State(plane): State<ControlPlane>, headers: HeaderMap) -> Response {
    let shared = &plane.shared;
    let authorization = headers.get(header::AUTHORIZATION).map(|v| v.as_bytes());
    if shared.tokens.allow(authorization) || shared.sessions.allow(&headers) {
        let asked = if shared.tokens.is_open() {
            "open"
        } else {
            "session"
        };
        return html(StatusCode::OK, DASHBOARD.replace("__ACCESS__", asked));
    }
    html(StatusCode::OK, LOGIN.replace(MESSAGE, ""))
}

/// `POST /login`: exchanges a token for a session's cookie.
pub(super) async fn login(
    State(plane): State<ControlPlane>,
    headers: HeaderMap,
    form: Result<Form<LoginForm>, FormRejection>,
) -> Result<Response, Failure> {
    let shared = &plane.shared;
    site(&headers).check_site()?;
    let Form(LoginForm { token }) = form.map_err(|rejection| {
        let detail = rejection.body_text();
        match rejection.into_response().status().as_u16() {
            413 => Problem::new(413, "body_too_large", detail),
            415 => Problem::new(415, "unsupported_media_type", detail),
            _ => Problem::new(400, "invalid_field", detail),
        }
    })?;
    if shared.tokens.is_open() {
        return Ok(go_home(None));
    }
    if !shared.tokens.contain(token.trim().as_bytes()) {
        tracing::warn!("a login to the dashboard was refused: wrong token");
        let page = LOGIN.replace(MESSAGE, "That is not a token of this control plane.");
        let mut response = html(StatusCode::UNAUTHORIZED, page);
        let challenge = header::HeaderValue::from_static("Bearer");
        response
            .headers_mut()
            .insert(header::WWW_AUTHENTICATE, challenge);
        return Ok(response);
    }
    let value = shared.sessions.begin().ok_or_else(Problem::internal)?;
    tracing::info!("an operator logged in to the dashboard");
    Ok(go_home(Some(set_cookie(
        &headers,
        &value,
        SESSION_LASTS.as_secs(),
    ))))
}

/// `POST /logout`: ends the session.
pub(super) async fn logout(
    State(plane): State<ControlPlane>,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    site(&headers).check_site()?;
    plane.shared.sessions.end(&headers);
    Ok(go_home(Some(set_cookie(&headers, "", 0))))
}

fn set_cookie(headers: &HeaderMap, value: &str, max_age: u64) -> String {
    let by_tls = headers
        .get(header::ORIGIN)
        .is_some_and(|origin| origin.as_bytes().starts_with(b"https://"));
    let secure = if by_tls { "; Secure" } else { "" };
    format!("{COOKIE}={value}; Path=/; Max-Age={max_age}; HttpOnly; SameSite=Strict{secure}")
}

fn go_home(cookie: Option<String>) -> Response {
    let mut response = (StatusCode::SEE_OTHER, [(header::LOCATION, "/")]).into_response();
    if let Some(cookie) = cookie.and_then(|cookie| cookie.parse().ok()) {
        response.headers_mut().insert(header::SET_COOKIE, cookie);
    }
    response
}

/// A page that may load nothing, run only its own script, and not be framed.
fn html(status: StatusCode, page: String) -> Response {
    let nonce = format!("{:032x}", rand::rng().random::<u128>());
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; \
         connect-src 'self'; img-src data:; form-action 'self'; base-uri 'none'; \
         frame-ancestors 'none'"
    );
    let fields: [(HeaderName, &str); 6] = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, &policy),
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "same-origin"),
    ];
    (status, fields, page.replace(NONCE, &nonce)).into_response()
}
