//! Who may administer: a bearer token for programs, a session for a browser that logged in with
//! one. Without a configured token the plane is open, which only a loopback listener may be.
//!
//! A browser sends what it holds along with requests that other sites make it send, and can reach
//! loopback. So a request that changes something must come from our own page wherever a browser
//! is behind it, and a plane without a token answers only under names of this machine
//! ([`crate::http::origin`]).

use std::collections::HashMap;
use std::time::{Duration, Instant};

use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, header};
use axum::middleware::Next;
use axum::response::Response;
use parking_lot::Mutex;
use rand::TryRngCore;
use rand::rngs::OsRng;
use sha2::{Digest, Sha256};

use super::ControlPlane;
use super::failure::Failure;
use crate::http::origin::SiteFields;
use crate::http::problem::Problem;
use crate::http::wire::require_identity;

/// Name of the session's cookie.
pub(super) const COOKIE: &str = "millrace_session";
/// How long a session lasts: a shift, not more.
pub(super) const SESSION_LASTS: Duration = Duration::from_secs(12 * 3_600);
/// Sessions at once; the one that ends first makes room.
const SESSIONS_MAX: usize = 64;

/// The browsers that are logged in, by the hash of what their cookie holds: what this process has
/// in memory opens nothing.
#[derive(Debug, Default)]
pub(super) struct Sessions {
    ends: Mutex<HashMap<[u8; 32], Instant>>,
}

impl Sessions {
    /// Begins one and gives its cookie's value, which has nothing to do with the token; none where
    /// the system has no randomness.
    pub(super) fn begin(&self) -> Option<String> {
        let mut secret = [0_u8; 32];
        OsRng.try_fill_bytes(&mut secret).ok()?;
        let value: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
        let now = Instant::now();
        let mut ends = self.ends.lock();
        ends.retain(|_, end| *end > now);
        if ends.len() >= SESSIONS_MAX
            && let Some(first) = ends.iter().min_by_key(|(_, end)| **end).map(|(id, _)| *id)
        {
            ends.remove(&first);
        }
        ends.insert(hash(&value), now + SESSION_LASTS);
        Some(value)
    }

    /// Ends the session of a request.
    pub(super) fn end(&self, headers: &HeaderMap) {
        if let Some(value) = cookie(headers) {
            self.ends.lock().remove(&hash(value));
        }
    }

    /// Whether a request belongs to a session.
    pub(super) fn allow(&self, headers: &HeaderMap) -> bool {
        cookie(headers).is_some_and(|value| {
            let ends = self.ends.lock();
            ends.get(&hash(value))
                .is_some_and(|end| *end > Instant::now())
        })
    }
}

fn hash(value: &str) -> [u8; 32] {
    Sha256::digest(value.as_bytes()).into()
}

fn cookie(headers: &HeaderMap) -> Option<&str> {
    headers
        .get_all(header::COOKIE)
        .iter()
        .filter_map(|field| field.to_str().ok())
        .flat_map(|field| field.split(';'))
        .find_map(|pair| pair.trim().strip_prefix(COOKIE)?.strip_prefix('='))
}

/// The first look at every request, whatever it is for: without a token only names of this machine
/// are answered, and no coding of a body is undone.
pub(super) async fn look(
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

/// Lets a request pass that shows a token or belongs to a session, and that no other site sent.
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
            // A program has the token; a browser always says at least one of the two.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(fields: &[(&'static str, &str)]) -> HeaderMap {
        let parsed = fields
            .iter()
            .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
        parsed
            .collect::<Vec<(header::HeaderName, _)>>()
            .into_iter()
            .collect()
    }

    #[test]
    fn sessions_begin_end_and_are_bounded() {
        let sessions = Sessions::default();
        let with = |value: &str| headers(&[("cookie", &format!("a=b; {COOKIE}={value}; c=d"))]);
        let first = sessions.begin().unwrap();
        assert!(sessions.allow(&with(&first)));
        assert!(!sessions.allow(&with("")) && !sessions.allow(&with(&first[1..])));
        sessions.end(&with(&first));
        assert!(!sessions.allow(&with(&first)));
        let oldest = sessions.begin().unwrap();
        for _ in 0..SESSIONS_MAX {
            sessions.begin().unwrap();
        }
        assert_eq!(sessions.ends.lock().len(), SESSIONS_MAX);
        assert!(!sessions.allow(&with(&oldest)));
    }
}
