//! Credentials: the messages of the mechanisms PLAIN (RFC 4616) and SCRAM (RFC 5802, RFC 7677).

use std::{fmt, num::NonZeroU32, str::FromStr};

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use ring::{
    digest, hmac, pbkdf2,
    rand::{SecureRandom, SystemRandom},
};

/// Mechanisms of SASL that a listener may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mechanism {
    /// The password itself; only over TLS.
    Plain,
    /// A proof of the password, with SHA-256.
    ScramSha256,
    /// A proof of the password, with SHA-512.
    ScramSha512,
}

impl Mechanism {
    /// Its name in the protocol.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Plain => "PLAIN",
            Self::ScramSha256 => "SCRAM-SHA-256",
            Self::ScramSha512 => "SCRAM-SHA-512",
        }
    }
}

impl FromStr for Mechanism {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::Plain, Self::ScramSha256, Self::ScramSha512]
            .into_iter()
            .find(|mechanism| mechanism.name().eq_ignore_ascii_case(text))
            .ok_or_else(|| {
                format!("SASL mechanism {text} is none of PLAIN, SCRAM-SHA-256 and SCRAM-SHA-512")
            })
    }
}

/// Credentials.
#[derive(Clone)]
pub struct Sasl {
    /// The mechanism.
    pub mechanism: Mechanism,
    /// The user.
    pub user: String,
    /// The password. SCRAM takes it as it is, without the preparation of RFC 4013: it has to be ASCII, or
    /// normalised already.
    pub password: String,
}

impl fmt::Debug for Sasl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sasl")
            .field("mechanism", &self.mechanism)
            .field("user", &self.user)
            .finish_non_exhaustive()
    }
}

impl Sasl {
    /// `text` without the password.
    pub(super) fn redact(&self, text: String) -> String {
        if self.password.is_empty() {
            text
        } else {
            text.replace(&self.password, "***")
        }
    }

    /// The message of PLAIN.
    pub(super) fn plain(&self) -> Vec<u8> {
        format!("\0{}\0{}", self.user, self.password).into_bytes()
    }
}

/// A SCRAM conversation, from the client's first message on.
pub(super) struct Scram<'a> {
    sasl: &'a Sasl,
    nonce: String,
    first: String,
}

/// The algorithms of a SCRAM mechanism.
struct Hashes {
    pbkdf2: pbkdf2::Algorithm,
    hmac: hmac::Algorithm,
    digest: &'static digest::Algorithm,
}

/// Upper bound of the iterations that a server may ask for: a foreign one cannot keep the processor busy.
const ITERATIONS_MAX: u32 = 1_000_000;

impl<'a> Scram<'a> {
    pub(super) fn new(sasl: &'a Sasl) -> Result<Self, String> {
        let mut random = [0; 24];
        SystemRandom::new()
            .fill(&mut random)
            .map_err(|_| "no random numbers".to_owned())?;
        Ok(Self::with_nonce(sasl, BASE64.encode(random)))
    }

    pub(super) fn with_nonce(sasl: &'a Sasl, nonce: String) -> Self {
        let user = sasl.user.replace('=', "=3D").replace(',', "=2C");
        let first = format!("n={user},r={nonce}");
        Self { sasl, nonce, first }
    }

    /// The client's first message.
    pub(super) fn first(&self) -> Vec<u8> {
        format!("n,,{}", self.first).into_bytes()
    }

    fn hashes(&self) -> Hashes {
        match self.sasl.mechanism {
            Mechanism::Plain | Mechanism::ScramSha256 => Hashes {
                pbkdf2: pbkdf2::PBKDF2_HMAC_SHA256,
                hmac: hmac::HMAC_SHA256,
                digest: &digest::SHA256,
            },
            Mechanism::ScramSha512 => Hashes {
                pbkdf2: pbkdf2::PBKDF2_HMAC_SHA512,
                hmac: hmac::HMAC_SHA512,
                digest: &digest::SHA512,
            },
        }
    }

    /// The client's last message, and the last one that the server must answer.
    pub(super) fn last(&self, challenge: &[u8]) -> Result<(Vec<u8>, Vec<u8>), String> {
        let said =
            std::str::from_utf8(challenge).map_err(|_| "its challenge is no text".to_owned())?;
        let field = |name: &str| said.split(',').find_map(|part| part.strip_prefix(name));
        if let Some(error) = field("e=") {
            return Err(error.to_owned());
        }
        let (Some(nonce), Some(salt), Some(iterations)) = (field("r="), field("s="), field("i="))
        else {
            return Err("its challenge lacks nonce, salt or iterations".to_owned());
        };
        if !nonce.starts_with(&self.nonce) || nonce.len() == self.nonce.len() {
            return Err("its challenge answers another nonce".to_owned());
        }
        let salt = BASE64
            .decode(salt)
            .map_err(|_| "its salt is not base64".to_owned())?;
        let iterations = iterations
            .parse()
            .ok()
            .filter(|count| *count <= ITERATIONS_MAX)
            .and_then(NonZeroU32::new)
            .ok_or_else(|| format!("its number of iterations is not in 1..={ITERATIONS_MAX}"))?;

        let Hashes {
            pbkdf2,
            hmac,
            digest,
        } = self.hashes();
        let mut salted = vec![0; digest.output_len()];
        pbkdf2::derive(
            pbkdf2,
            iterations,
            &salt,
            self.sasl.password.as_bytes(),
            &mut salted,
        );
        let salted = hmac::Key::new(hmac, &salted);
        let client_key = hmac::sign(&salted, b"Client Key");
        let server_key = hmac::sign(&salted, b"Server Key");
        let stored = digest::digest(digest, client_key.as_ref());
        let without_proof = format!("c=biws,r={nonce}");
        let message = format!("{},{said},{without_proof}", self.first);
        let signature = hmac::sign(&hmac::Key::new(hmac, stored.as_ref()), message.as_bytes());
        let proof: Vec<u8> = client_key
            .as_ref()
            .iter()
            .zip(signature.as_ref())
            .map(|(key, sign)| key ^ sign)
            .collect();
        let answer = hmac::sign(
            &hmac::Key::new(hmac, server_key.as_ref()),
            message.as_bytes(),
        );
        Ok((
            format!("{without_proof},p={}", BASE64.encode(proof)).into_bytes(),
            format!("v={}", BASE64.encode(answer)).into_bytes(),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pencil(mechanism: Mechanism) -> Sasl {
        Sasl {
            mechanism,
            user: "user".to_owned(),
            password: "pencil".to_owned(),
        }
    }

    #[test]
    fn scram_is_the_example_of_rfc_7677() {
        let sasl = pencil(Mechanism::ScramSha256);
        let scram = Scram::with_nonce(&sasl, "rOprNGfwEbeRWgbNEkqO".to_owned());
        assert_eq!(scram.first(), b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO");
        let challenge = "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096";
        let (last, answer) = scram.last(challenge.as_bytes()).unwrap();
        assert_eq!(
            String::from_utf8(last).unwrap(),
            "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,\
             p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=",
        );
        assert_eq!(answer, b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=");
    }

    #[test]
    fn a_challenge_of_somebody_else_is_refused() {
        let sasl = pencil(Mechanism::ScramSha512);
        let scram = Scram::with_nonce(&sasl, "abc".to_owned());
        for challenge in [
            "r=abd1,s=AAAA,i=4096",
            "r=abc,s=AAAA,i=4096",
            "r=abc1,s=AAAA,i=0",
            "r=abc1,s=A,i=1",
            "e=no",
            "",
        ] {
            assert!(scram.last(challenge.as_bytes()).is_err(), "{challenge}");
        }
        assert!(scram.last(b"r=abc1,s=AAAA,i=9999999").is_err());
        assert!(scram.last(b"r=abc1,s=AAAA,i=4096").is_ok());
    }

    #[test]
    fn the_password_is_never_printed() {
        let sasl = pencil(Mechanism::Plain);
        assert!(!format!("{sasl:?}").contains("pencil"));
        assert_eq!(sasl.redact("bad pencil".to_owned()), "bad ***");
        assert_eq!("scram-sha-512".parse(), Ok(Mechanism::ScramSha512));
        assert!("GSSAPI".parse::<Mechanism>().is_err());
    }
}
