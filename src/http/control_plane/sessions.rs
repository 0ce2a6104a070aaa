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
        ends.insert(hash(value.as_bytes()), now + SESSION_LASTS);
        Some(value)
    }

    /// Ends the sessions of a request.
    pub(super) fn end(&self, headers: &HeaderMap) {
        for value in cookies(fields(headers)) {
            self.ends.lock().remove(&hash(value));
        }
    }

    /// Whether a request belongs to a session.
    pub(super) fn allow(&self, headers: &HeaderMap) -> bool {
        let now = Instant::now();
        cookies(fields(headers))
            .map(hash)
            .any(|id| self.ends.lock().get(&id).is_some_and(|end| *end > now))
    }
}

fn hash(value: &[u8]) -> [u8; 32] {
    Sha256::digest(value).into()
}

fn fields(headers: &HeaderMap) -> impl Iterator<Item = &[u8]> {
    let fields = headers.get_all(header::COOKIE).into_iter();
    fields.map(|field| field.as_bytes())
}

/// The values that `Cookie` fields have for the session (RFC 6265 4.2). A browser sends those that any port and path of this
/// host has set, in an order that says nothing, and their bytes need not be text.
pub fn cookies<'a>(fields: impl Iterator<Item = &'a [u8]>) -> impl Iterator<Item = &'a [u8]> {
    fields
        .flat_map(|field| field.split(|byte| *byte == b';'))
        .filter_map(|pair| {
            let rest = pair.trim_ascii().strip_prefix(COOKIE.as_bytes())?;
            rest.strip_prefix(b"=")
        })
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

    #[test]
    fn cookies_of_other_services_on_this_host_end_no_session() {
        let sessions = Sessions::default();
        let value = sessions.begin().unwrap();
        for cookies in [
            format!("{COOKIE}=of another path; {COOKIE}={value}"),
            format!("name=Zo\u{eb}; {COOKIE}={value}"),
            format!("{COOKIE}2=x; a{COOKIE}=y;{COOKIE}={value};"),
        ] {
            let with = HeaderMap::from_iter([(
                header::COOKIE,
                cookies.as_bytes().try_into().expect("a field"),
            )]);
            assert!(sessions.allow(&with), "{cookies}");
        }
        let quoted = headers(&[("cookie", &format!("{COOKIE}=\"{value}\""))]);
        assert!(!sessions.allow(&quoted));
        let both = headers(&[
            ("cookie", &format!("{COOKIE}=x")),
            ("cookie", &format!("{COOKIE}={value}")),
        ]);
        sessions.end(&both);
        assert!(!sessions.allow(&both));
    }
}
