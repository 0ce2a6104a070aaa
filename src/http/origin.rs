//! Requests that another site makes a browser send.
//!
//! A browser reaches loopback and every host that its machine reaches, and so does every page that it
//! shows. If a token is required, such a page has none. Without a token, two fields remain to tell
//! such requests apart: the name under which the server was asked, and the site that asked.

use crate::http::problem::Problem;

/// The fields of a request that name its host and its site, if they came.
#[derive(Clone, Copy, Debug, Default)]
pub struct SiteFields<'a> {
    /// `Host`.
    pub host: Option<&'a [u8]>,
    /// `Origin`.
    pub origin: Option<&'a [u8]>,
    /// `Sec-Fetch-Site`.
    pub sec_fetch_site: Option<&'a [u8]>,
}

impl SiteFields<'_> {
    /// Refuses every name but `localhost` and the loopback addresses, with any port. The owner of any
    /// other name may point it at this machine (DNS rebinding), and a page of that name is then of the
    /// same origin as the answers. A request without a `Host`, which HTTP/1.0 allows, is not a
    /// browser's.
    ///
    /// # Errors
    /// `421 misdirected`.
    pub fn check_host(&self) -> Result<(), Problem> {
        match self.host {
            Some(host) if !is_loopback(host) => {
                let detail =
                    "Host: without a token only localhost and loopback addresses are answered";
                Err(Problem::new(421, "misdirected", detail))
            }
            _ => Ok(()),
        }
    }

    /// Refuses the requests of another site. A program sends neither field.
    ///
    /// # Errors
    /// `403 cross_origin`.
    pub fn check_site(&self) -> Result<(), Problem> {
        let refuse = |detail: &'static str| Err(Problem::new(403, "cross_origin", detail));
        let origin = self.origin.map(|origin| {
            let origin = origin
                .strip_prefix(b"http://")
                .or(origin.strip_prefix(b"https://"));
            origin.unwrap_or_default()
        });
        match (self.sec_fetch_site, origin) {
            (Some(b"same-origin" | b"none"), _) => Ok(()),
            (Some(_), _) => refuse("Sec-Fetch-Site: another site sent this request"),
            (None, Some(origin)) if Some(origin) == self.host => Ok(()),
            (None, Some(_)) => refuse("Origin: another site sent this request"),
            (None, None) => Ok(()),
        }
    }
}

fn is_loopback(authority: &[u8]) -> bool {
    let Ok(authority) = std::str::from_utf8(authority) else {
        return false;
    };
    let host = match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        _ => authority,
    };
    let address = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    let address = address.unwrap_or(host).parse::<std::net::IpAddr>();
    host.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_this_machine_are_answered() {
        let pass = |host: &str| {
            let fields = SiteFields {
                host: Some(host.as_bytes()),
                ..SiteFields::default()
            };
            fields.check_host().is_ok()
        };
        for host in [
            "localhost",
            "LocalHost:8081",
            "127.0.0.1",
            "127.0.0.1:8081",
            "127.1.2.3:1",
            "[::1]",
            "[::1]:8081",
        ] {
            assert!(pass(host), "{host}");
        }
        for host in [
            "",
            "evil.example",
            "evil.example:8081",
            "localhost.evil.example",
            "evil.localhost:8081",
            "127.0.0.1.evil.example",
            "127.0.0.1@evil.example",
            "0.0.0.0:8081",
            "[::]:8081",
            "10.0.0.1:8081",
            "localhost:8081:evil",
            "127.1",
            "2130706433",
        ] {
            assert!(!pass(host), "{host}");
        }
        assert!(SiteFields::default().check_host().is_ok());
    }

    #[test]
    fn only_our_own_page_may_change_something() {
        let pass = |origin: Option<&str>, site: Option<&str>| {
            let fields = SiteFields {
                host: Some(b"127.0.0.1:8081"),
                origin: origin.map(str::as_bytes),
                sec_fetch_site: site.map(str::as_bytes),
            };
            fields.check_site().is_ok()
        };
        assert!(pass(None, None), "curl");
        assert!(pass(None, Some("same-origin")));
        assert!(pass(None, Some("none")));
        assert!(pass(Some("http://127.0.0.1:8081"), None));
        for site in ["cross-site", "same-site", ""] {
            assert!(!pass(None, Some(site)), "{site}");
            assert!(!pass(Some("http://127.0.0.1:8081"), Some(site)), "{site}");
        }
        for origin in ["null", "http://evil.example", "http://127.0.0.1:9", ""] {
            assert!(!pass(Some(origin), None), "{origin}");
        }
    }
}
