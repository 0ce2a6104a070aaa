//! Parsing of `database.url`: a URL or a key-value string, as `libpq` takes them.
//!
//! The driver's own parser knows no certificates and three of the six values of `sslmode`, and refuses unknown
//! parameters. So the TLS parameters are cut out here, and every other byte is passed to it unchanged; it
//! refuses unknown parameters by name.
//!
//! Source: PostgreSQL documentation, "Connection Strings" and "SSL Support" of libpq.

use std::path::PathBuf;
use std::str::FromStr;

use percent_encoding::percent_decode_str;
use tokio_postgres::config::SslMode;

use crate::store::StoreError;
use crate::store::error::chain;

/// `sslmode`, with the meanings of `libpq`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) enum TlsMode {
    /// Never TLS.
    Disable,
    /// TLS only if the server insists.
    Allow,
    /// TLS if the server offers it.
    #[default]
    Prefer,
    /// Always TLS; the certificate is checked only if `sslrootcert` is given.
    Require,
    /// Always TLS, with a certificate that chains to a trusted one.
    VerifyCa,
    /// The same, and the certificate must name the host that is connected to.
    VerifyFull,
}

/// The trusted certificates.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(super) enum Trust {
    /// No verification: the connection is encrypted and no more.
    #[default]
    Anybody,
    /// The certificates in this file.
    File(PathBuf),
    /// The certificates that the machine trusts.
    System,
}

/// The TLS parameters of `database.url`.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(super) struct TlsParameters {
    /// `sslmode`.
    pub mode: TlsMode,
    /// `sslrootcert`.
    pub trust: Trust,
    /// `sslcert` and `sslkey`: the client certificate and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
}

impl TlsParameters {
    /// The parameters of a configuration of the driver.
    pub(super) fn of(config: &tokio_postgres::Config) -> Self {
        let mode = match config.get_ssl_mode() {
            SslMode::Disable => TlsMode::Disable,
            SslMode::Require => TlsMode::Require,
            _ => TlsMode::Prefer,
        };
        TlsParameters {
            mode,
            ..TlsParameters::default()
        }
    }
}

/// Parses `database.url`. Reads no files.
///
/// # Errors
/// [`StoreError::Url`] with the parameter at fault; never contains the password.
pub(super) fn parse(url: &str) -> Result<(tokio_postgres::Config, TlsParameters), StoreError> {
    let mut ours = Ours::default();
    let theirs = match after_scheme(url) {
        Some(from) => cut_from_url(url, from, &mut ours)?,
        None => cut_from_pairs(url, &mut ours),
    };
    let config = tokio_postgres::Config::from_str(&theirs).map_err(|e| fault(chain(&e)))?;
    Ok((config, ours.into_parameters()?))
}

fn fault(message: impl Into<String>) -> StoreError {
    StoreError::Url(message.into())
}

/// Our parameters, as given. The last of several wins, as with `libpq`.
#[derive(Default)]
struct Ours {
    mode: Option<String>,
    root: Option<String>,
    cert: Option<String>,
    key: Option<String>,
}

impl Ours {
    fn field(&mut self, name: &str) -> Option<&mut Option<String>> {
        match name {
            "sslmode" => Some(&mut self.mode),
            "sslrootcert" => Some(&mut self.root),
            "sslcert" => Some(&mut self.cert),
            "sslkey" => Some(&mut self.key),
            _ => None,
        }
    }

    fn into_parameters(self) -> Result<TlsParameters, StoreError> {
        let set = |text: Option<String>| text.filter(|text| !text.is_empty());
        let trust = match set(self.root) {
            None => Trust::Anybody,
            Some(word) if word == "system" => Trust::System,
            Some(path) => Trust::File(path.into()),
        };
        let mode = match set(self.mode).as_deref() {
            None if trust == Trust::System => TlsMode::VerifyFull,
            None => TlsMode::default(),
            Some("disable") => TlsMode::Disable,
            Some("allow") => TlsMode::Allow,
            Some("prefer") => TlsMode::Prefer,
            Some("require") => TlsMode::Require,
            Some("verify-ca") => TlsMode::VerifyCa,
            Some("verify-full") => TlsMode::VerifyFull,
            Some(other) => {
                return Err(fault(format!(
                    "sslmode={other} is none of disable, allow, prefer, require, verify-ca, verify-full"
                )));
            }
        };
        if trust == Trust::Anybody && matches!(mode, TlsMode::VerifyCa | TlsMode::VerifyFull) {
            return Err(fault(
                "sslmode=verify-ca and verify-full need sslrootcert: the file with the certificate authority's \
                 certificate, or sslrootcert=system for those that this machine trusts",
            ));
        }
        // Anybody can get a certificate from a public authority, so the name has to be verified.
        if trust == Trust::System && mode != TlsMode::VerifyFull {
            return Err(fault(
                "sslrootcert=system goes only with sslmode=verify-full: leave sslmode out or set it so",
            ));
        }
        let identity = match (set(self.cert), set(self.key)) {
            (Some(cert), Some(key)) => Some((cert.into(), key.into())),
            (None, None) => None,
            _ => {
                return Err(fault(
                    "sslcert and sslkey go together: give both or neither",
                ));
            }
        };
        Ok(TlsParameters {
            mode,
            trust,
            identity,
        })
    }
}

fn after_scheme(url: &str) -> Option<usize> {
    ["postgresql://", "postgres://"]
        .into_iter()
        .find(|scheme| url.starts_with(scheme))
        .map(str::len)
}

/// Cuts our parameters out of a URL.
fn cut_from_url(url: &str, scheme: usize, ours: &mut Ours) -> Result<String, StoreError> {
    let (head, rest) = url.split_at(scheme);
    // Credentials end at the first `@` before the first `/` (libpq). A raw `/` in a password is not a valid
    // URL, but the driver has always accepted it.
    let end = |stop: &[char]| rest.find(stop).unwrap_or(rest.len());
    let credentials = rest
        .find('@')
        .filter(|at| *at < end(&['/']) || *at < end(&['?']));
    let query = match credentials {
        Some(at) => rest[at..].find('?').map(|from| at + from),
        None => rest.find('?'),
    };
    let Some(query) = query else {
        return Ok(url.to_owned());
    };
    let (front, parameters) = (&rest[..query], &rest[query + 1..]);
    let mut kept = Vec::new();
    for parameter in parameters.split('&').filter(|text| !text.is_empty()) {
        let (name, value) = parameter
            .split_once('=')
            .ok_or_else(|| fault(format!("parameter {parameter} has no value")))?;
        let name = decode(name)?;
        if let Some(field) = ours.field(&name) {
            *field = Some(decode(value)?);
        } else if name == "ssl" && value == "true" {
            // The form of JDBC, which libpq accepts.
            ours.mode = Some("require".to_owned());
        } else {
            // The driver takes the first `@` anywhere as the end of the credentials.
            kept.push(parameter.replace('@', "%40"));
        }
    }
    let mark = if kept.is_empty() { "" } else { "?" };
    Ok(format!("{head}{front}{mark}{}", kept.join("&")))
}

fn decode(text: &str) -> Result<String, StoreError> {
    percent_decode_str(text)
        .decode_utf8()
        .map(|text| text.into_owned())
        .map_err(|_| fault(format!("{text} is not UTF-8 once percent-decoded")))
}

/// Cuts our pairs out of a key-value string. A malformed part stays, with everything after it, for the driver
/// to report.
fn cut_from_pairs(text: &str, ours: &mut Ours) -> String {
    let mut kept = String::new();
    let mut rest = text;
    while let Some((name, value, length)) = first_pair(rest) {
        match ours.field(name) {
            Some(field) => *field = Some(value),
            None => kept.push_str(&rest[..length]),
        }
        rest = &rest[length..];
    }
    kept.push_str(rest);
    kept
}

/// The first `name = value`: the name, the unquoted value, and the length in bytes with leading white space.
fn first_pair(text: &str) -> Option<(&str, String, usize)> {
    let start = text.trim_start();
    let name_end = start.find(|c: char| c.is_whitespace() || c == '=')?;
    let name = &start[..name_end];
    let after = start[name_end..].trim_start().strip_prefix('=')?;
    let after = after.trim_start();
    let (quoted, after) = match after.strip_prefix('\'') {
        Some(inside) => (true, inside),
        None => (false, after),
    };
    let mut value = String::new();
    let mut chars = after.char_indices();
    let left = loop {
        match chars.next() {
            Some((_, '\\')) => value.extend(chars.next().map(|(_, c)| c)),
            Some((at, '\'')) if quoted => break &after[at + 1..],
            Some((at, c)) if !quoted && c.is_whitespace() => break &after[at..],
            Some((_, c)) => value.push(c),
            None if quoted => return None,
            None => break "",
        }
    };
    Some((name, value, text.len() - left.len()))
}

#[cfg(test)]
mod tests {
    use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
    use proptest::prelude::*;
    use tokio_postgres::config::Host;

    use super::*;

    fn tls(url: &str) -> TlsParameters {
        parse(url).unwrap_or_else(|e| panic!("{url}: {e}")).1
    }

    fn refusal(url: &str) -> String {
        match parse(url) {
            Ok(taken) => panic!("{url} was taken: {taken:?}"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn every_sslmode_is_read_in_both_forms() {
        for (word, mode) in [
            ("disable", TlsMode::Disable),
            ("allow", TlsMode::Allow),
            ("prefer", TlsMode::Prefer),
            ("require", TlsMode::Require),
            ("verify-ca", TlsMode::VerifyCa),
            ("verify-full", TlsMode::VerifyFull),
        ] {
            for url in [
                format!("postgresql://u@h/d?sslmode={word}&sslrootcert=/ca%20file.pem"),
                format!("postgres://u@h?sslrootcert=%2Fca%20file.pem&sslmode={word}"),
                format!("sslmode={word} host=h sslrootcert='/ca file.pem'"),
                format!("host=h sslrootcert = /ca\\ file.pem  sslmode = '{word}'"),
            ] {
                let found = tls(&url);
                assert_eq!(found.mode, mode, "{url}");
                assert_eq!(found.trust, Trust::File("/ca file.pem".into()), "{url}");
            }
        }
        assert_eq!(tls("host=h"), TlsParameters::default());
        assert_eq!(tls("postgresql://h/d?ssl=true").mode, TlsMode::Require);
        assert_eq!(
            tls("host=h sslmode=disable sslmode=require").mode,
            TlsMode::Require
        );
        assert_eq!(
            tls("host=h sslcert=c sslkey=k").identity,
            Some(("c".into(), "k".into()))
        );
    }

    #[test]
    fn the_machines_own_authorities_always_mean_verify_full() {
        let found = tls("host=h sslrootcert=system");
        assert_eq!(found.mode, TlsMode::VerifyFull);
        assert_eq!(found.trust, Trust::System);
        assert!(refusal("host=h sslmode=require sslrootcert=system").contains("verify-full"));
    }

    #[test]
    fn passwords_and_hosts_come_through_as_they_were_written() {
        for (url, password) in [
            (
                "postgresql://u:p%40s%26s%3Fsslmode%3Drequire@h/d",
                "p@s&s?sslmode=require",
            ),
            (
                "postgresql://u:p?sslmode=allow@h/d?sslmode=disable",
                "p?sslmode=allow",
            ),
            ("postgresql://u:a/b+c==@h/d?sslmode=disable", "a/b+c=="),
            (
                "postgresql://h/d?user=u&password=x%20y&sslmode=disable",
                "x y",
            ),
            (
                "host=h password='a sslmode=allow \\' b' sslmode=disable",
                "a sslmode=allow ' b",
            ),
            (
                "host=h sslmode=disable password=a\\ sslmode=allow",
                "a sslmode=allow",
            ),
        ] {
            let (config, found) = parse(url).unwrap_or_else(|e| panic!("{url}: {e}"));
            assert_eq!(config.get_password(), Some(password.as_bytes()), "{url}");
            assert_eq!(config.get_hosts(), [Host::Tcp("h".into())], "{url}");
            if url.contains("sslmode=disable") {
                assert_eq!(found.mode, TlsMode::Disable, "{url}");
            }
        }
        let (config, _) = parse("postgresql://h1:1,h2:2/d?application_name=a@b&sslmode=require")
            .expect("no credentials");
        assert_eq!(config.get_hosts().len(), 2);
        assert_eq!(config.get_application_name(), Some("a@b"));
        assert_eq!(config.get_user(), None);
        for url in [
            "postgresql://u@%2Frun%2Fpg:5433/d?sslmode=require",
            "postgresql:///d?host=/run/pg&port=5433",
            "host=/run/pg port=5433",
        ] {
            let (config, _) = parse(url).unwrap_or_else(|e| panic!("{url}: {e}"));
            assert_eq!(config.get_hosts(), [Host::Unix("/run/pg".into())], "{url}");
            assert_eq!(config.get_ports(), [5433], "{url}");
        }
    }

    #[test]
    fn what_is_wrong_is_named_and_the_password_is_not() {
        for (url, word) in [
            ("postgresql://u:geheim@h/d?sslmod=require", "sslmod"),
            ("host=h password=geheim sslmod=require", "sslmod"),
            ("host=h password=geheim sslmode=always", "sslmode=always"),
            ("host=h password=geheim sslmode=verify-ca", "sslrootcert"),
            (
                "host=h password=geheim sslmode=verify-full",
                "sslrootcert=system",
            ),
            ("host=h password=geheim sslcert=c", "sslkey"),
            ("postgresql://u:geheim@h/d?sslmode", "sslmode"),
            ("postgresql://u:geheim@h/d?sslrootcert=%FF", "%FF"),
            ("host=h password='geheim", "unterminated"),
        ] {
            let message = refusal(url);
            assert!(message.starts_with("database.url: "), "{message}");
            assert!(message.contains(word), "{url}: {message}");
            assert!(!message.contains("geheim"), "{message}");
        }
    }

    proptest! {
        #[test]
        fn any_password_survives_both_forms(password in any::<String>()) {
            let encoded = utf8_percent_encode(&password, NON_ALPHANUMERIC);
            let quoted = password.replace('\\', "\\\\").replace('\'', "\\'");
            for url in [
                format!("postgresql://u:{encoded}@h/d?sslmode=require&application_name=a"),
                format!("postgresql://h/d?sslmode=require&user=u&password={encoded}"),
                format!("host=h sslmode='require'\tpassword = '{quoted}' user=u"),
            ] {
                let (config, tls) = parse(&url).expect("a good URL");
                prop_assert_eq!(config.get_password(), Some(password.as_bytes()));
                prop_assert_eq!(config.get_user(), Some("u"));
                prop_assert_eq!(tls.mode, TlsMode::Require);
            }
        }

        #[test]
        fn nothing_makes_it_panic(text in "(postgres://)?[a-z@:/?&='\\\\ %sslmode]{0,40}|\\PC{0,40}") {
            let _ = parse(&text);
        }
    }
}
