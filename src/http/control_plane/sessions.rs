//! The sessions of browsers that have logged in.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use axum::http::{HeaderMap, header};
use parking_lot::Mutex;
use rand::TryRngCore;
use rand::rngs::OsRng;
use sha2::{Digest, Sha256};

/// Name of the session's cookie.
pub(super) const COOKIE: &str = "millrace_session";
/// Duration of a session: a shift, not more.
pub(super) const SESSION_LASTS: Duration = Duration::from_secs(12 * 3_600);
/// Sessions at once; the one that ends first makes room.
const SESSIONS_MAX: usize = 64;

/// The browsers that are logged in, by the hash of their cookie's value: the memory of this process
/// opens nothing.
#[derive(Debug, Default)]
pub(super) struct Sessions {
    ends: Mutex<HashMap<[u8; 32], Instant>>,
}

impl Sessions {
    /// Begins a session. Returns its cookie's value, which is independent of the token; `None` if the
    /// system has no randomness.
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
