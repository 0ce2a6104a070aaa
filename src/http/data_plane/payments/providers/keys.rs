//! Keys that verify signatures. All comparisons of secrets are `ring`'s, in constant time.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::hmac;
use ring::signature::{RSA_PKCS1_2048_8192_SHA256, UnparsedPublicKey};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, SubjectPublicKeyInfoDer};
use x509_cert::Certificate;
use x509_cert::der::asn1::UintRef;
use x509_cert::der::{Decode, Encode, Reader, SliceReader};
use x509_cert::spki::{ObjectIdentifier, SubjectPublicKeyInfoRef};

/// Most signatures that are tried on one message: those of a rotation are two or three.
const SIGNATURES_MAX: usize = 16;

/// `rsaEncryption` (RFC 8017, appendix C).
const RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");

/// Secrets for HMAC-SHA256, of which any may have signed.
pub struct HmacKeys(Vec<hmac::Key>);

impl HmacKeys {
    /// The keys with these bytes.
    pub fn new<B: AsRef<[u8]>>(secrets: impl IntoIterator<Item = B>) -> Self {
        HmacKeys(
            secrets
                .into_iter()
                .map(|secret| hmac::Key::new(hmac::HMAC_SHA256, secret.as_ref()))
                .collect(),
        )
    }

    /// Whether any of `signatures` is that of any key over `signed`. Strangers may send bodies up to
    /// the limit, so a body is hashed once a key, however many signatures come, and not at all
    /// without a signature.
    pub fn verify(&self, signed: &[u8], signatures: impl Iterator<Item = Vec<u8>>) -> bool {
        let signatures: Vec<Vec<u8>> = signatures.take(SIGNATURES_MAX).collect();
        !signatures.is_empty()
            && self.0.iter().any(|key| {
                let tag = hmac::sign(key, signed);
                signatures
                    .iter()
                    .any(|signature| are_equal(key, tag.as_ref(), signature))
            })
    }
}

/// Compares in constant time, by the tags of both under `key`: `ring` compares only the tag of a
/// message that it hashes itself.
fn are_equal(key: &hmac::Key, one: &[u8], other: &[u8]) -> bool {
    hmac::verify(key, one, hmac::sign(key, other).as_ref()).is_ok()
}

impl fmt::Debug for HmacKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{} hidden]", self.0.len())
    }
}

/// An RSA public key of 2048 to 8192 bits, for SHA-256 and PKCS #1 v1.5.
#[derive(Debug)]
pub struct RsaKey(UnparsedPublicKey<Box<[u8]>>);

impl RsaKey {
    /// Reads a key: PEM of the key (`PUBLIC KEY`) or of a certificate, or the base64 that stands
    /// between the lines of the former.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text.is_empty() {
            return Err("is empty".into());
        }
        let unreadable = |e: &dyn fmt::Display| format!("cannot be read: {e}");
        if text.contains("-----BEGIN CERTIFICATE-----") {
            let der = CertificateDer::from_pem_slice(text.as_bytes());
            let der = der.map_err(|e| unreadable(&e))?;
            let certificate = Certificate::from_der(&der).map_err(|e| unreadable(&e))?;
            let info = certificate.tbs_certificate.subject_public_key_info;
            return Self::of_spki(&info.to_der().map_err(|e| unreadable(&e))?);
        }
        if text.starts_with("-----BEGIN PUBLIC KEY-----") {
            let der = SubjectPublicKeyInfoDer::from_pem_slice(text.as_bytes());
            return Self::of_spki(&der.map_err(|e| unreadable(&e))?);
        }
        if text.starts_with("-----") {
            let label = text.lines().next().unwrap_or_default();
            return Err(format!(
                "begins with {label}; it must be a PUBLIC KEY or a CERTIFICATE"
            ));
        }
        let dense: String = text.split_whitespace().collect();
        let der = STANDARD.decode(dense);
        Self::of_spki(&der.map_err(|e| format!("is neither PEM nor base64: {e}"))?)
    }

    fn of_spki(der: &[u8]) -> Result<Self, String> {
        let none = |e: x509_cert::der::Error| format!("holds no public key: {e}");
        let info = SubjectPublicKeyInfoRef::from_der(der).map_err(none)?;
        if info.algorithm.oid != RSA {
            return Err("holds a key that is not RSA".into());
        }
        let key = info.subject_public_key.raw_bytes();
        // RSAPublicKey ::= SEQUENCE { modulus, publicExponent } (RFC 8017, A.1.1)
        let bits = SliceReader::new(key)
            .and_then(|mut reader| {
                reader.sequence(|reader| {
                    let modulus = UintRef::decode(reader)?;
                    UintRef::decode(reader)?;
                    Ok(modulus.as_bytes().len() * 8)
                })
            })
            .map_err(none)?;
        // The range of `ring`, checked at start rather than with the first payment.
        if !(2048..=8192).contains(&bits) {
            return Err(format!(
                "holds a key of {bits} bits; 2048 to 8192 are taken"
            ));
        }
        Ok(RsaKey(UnparsedPublicKey::new(
            &RSA_PKCS1_2048_8192_SHA256,
            key.into(),
        )))
    }

    /// Whether `signature` (base64) is that of this key over `signed`.
    pub fn verify(&self, signed: &[u8], signature: &[u8]) -> bool {
        STANDARD
            .decode(signature)
            .is_ok_and(|signature| self.0.verify(signed, &signature).is_ok())
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_body_is_hashed_once_a_key_however_many_signatures_come() {
        let keys = HmacKeys::new(["one", "two"]);
        let body = vec![b'x'; 4 << 20];
        // The least of a few, both from the same run: a hash for each signature would take 16 times
        // as long.
        let least = |count: usize| -> Duration {
            let mut least = Duration::MAX;
            for _ in 0..5 {
                let started = Instant::now();
                assert!(!keys.verify(&body, std::iter::repeat_n(vec![0; 32], count)));
                least = least.min(started.elapsed());
            }
            least
        };
        let (one, many) = (least(1), least(SIGNATURES_MAX));
        assert!(many < one * 6, "{many:?} for many, {one:?} for one");
    }

    #[test]
    fn any_signature_of_any_key_holds_and_nothing_else_does() {
        let keys = HmacKeys::new(["one", "two"]);
        let of = |secret: &str| {
            let key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
            hmac::sign(&key, b"body").as_ref().to_vec()
        };
        let holds = |signatures: &[Vec<u8>]| keys.verify(b"body", signatures.iter().cloned());
        assert!(holds(&[of("one")]) && holds(&[of("two")]) && holds(&[of("three"), of("two")]));
        let (mut altered, mut longer) = (of("one"), of("one"));
        altered[31] ^= 1;
        longer.push(0);
        assert!(!holds(&[
            of("three"),
            altered,
            longer,
            of("one")[..31].to_vec(),
            vec![]
        ]));
        assert!(!holds(&[]));
        assert!(!keys.verify(b"other", [of("one")].into_iter()));
    }
}
