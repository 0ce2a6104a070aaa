//! Bearer tokens (RFC 6750).

use sha2::{Digest, Sha256};

/// The tokens of a plane; without any, it is open. Only their hashes are kept and compared, so that
/// neither a core dump nor the time of a comparison helps to guess one.
#[derive(Clone, Debug, Default)]
pub struct Tokens {
    hashes: Vec<[u8; 32]>,
}

impl Tokens {
    /// The tokens with these texts.
    pub fn new(tokens: &[String]) -> Self {
        Tokens {
            hashes: tokens
                .iter()
                .map(|token| Sha256::digest(token.as_bytes()).into())
                .collect(),
        }
    }

    /// Whether no token is required.
    pub fn is_open(&self) -> bool {
        self.hashes.is_empty()
    }

    /// Whether `token` is one of them.
    pub fn contain(&self, token: &[u8]) -> bool {
        self.hashes.contains(&Sha256::digest(token).into())
    }

    /// Whether a request with this `Authorization` field may pass.
    pub fn allow(&self, authorization: Option<&[u8]>) -> bool {
        if self.is_open() {
            return true;
        }
        let token = authorization.and_then(|value| {
            let (scheme, token) = value.split_at_checked("bearer ".len())?;
            scheme
                .eq_ignore_ascii_case(b"bearer ")
                .then(|| token.trim_ascii())
        });
        token.is_some_and(|token| self.contain(token))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bearer_token_opens_and_nothing_else_does() {
        let tokens = Tokens::new(&["one".into(), "two".into()]);
        assert!(tokens.allow(Some(b"Bearer one")));
        assert!(tokens.allow(Some(b"bearer two")));
        for bad in [
            "",
            "Bearer",
            "Bearer ",
            "Bearer on",
            "Bearer onee",
            "Basic one",
            "one",
        ] {
            assert!(!tokens.allow(Some(bad.as_bytes())), "{bad:?}");
        }
        assert!(!tokens.allow(None));
        assert!(Tokens::default().allow(None));
    }
}
