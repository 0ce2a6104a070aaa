//! `cluster.secret` as a TLS identity.
//!
//! The secret is stretched to the seed of one Ed25519 key (HKDF, RFC 5869), which every node of the cluster has and
//! nobody else. Both sides of a connection show its public half as a raw public key (RFC 7250) and prove that they have
//! the private one, so there are no certificates to issue, to renew or to let run out.
//!
//! Somebody who can connect learns the public half, and can try secrets against it at leisure. So the secret must be
//! long: [`SECRET_BYTES_MIN`].

use std::sync::Arc;

use ring::hkdf;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{AlwaysResolvesClientRawPublicKeys, Resumption};
use rustls::crypto::ring::{cipher_suite, default_provider, sign};
use rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature_with_raw_key,
};
use rustls::pki_types::{
    CertificateDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime,
};
use rustls::server::AlwaysResolvesServerRawPublicKeys;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::CertifiedKey;
use rustls::version::TLS13;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, ServerConfig,
    SignatureScheme,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::PROTOCOL;

/// Bytes that `cluster.secret` has at least.
pub const SECRET_BYTES_MIN: usize = 32;

/// The same in every version of the protocol: releases that follow one another share the key.
const KEY_SALT: &[u8] = b"millrace nodes";

/// What stands before the seed of an Ed25519 key in PKCS #8 (RFC 8410 7, without the public half).
const PKCS8_PREFIX: [u8; 16] = [
    0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20,
];

/// Reason why a secret cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// It is too short.
    #[error(
        "cluster.secret has {0} bytes and needs {SECRET_BYTES_MIN} or more; `openssl rand -base64 32` makes one"
    )]
    TooShort(usize),
    /// The library refused the key, which is a defect.
    #[error("no TLS identity can be made of cluster.secret: {0}")]
    Tls(#[from] rustls::Error),
}

/// The identity that the nodes of a cluster share. Cheap to clone.
#[derive(Clone)]
pub struct ClusterKey {
    /// For the side that calls.
    pub connector: TlsConnector,
    /// For the side that is called.
    pub acceptor: TlsAcceptor,
}

impl ClusterKey {
    /// The identity of a secret.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn new(secret: &str) -> Result<Self, KeyError> {
        Self::speaking(secret, &[PROTOCOL])
    }

    /// The same, for a program that speaks other versions of the protocol.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn speaking(secret: &str, protocols: &[&[u8]]) -> Result<Self, KeyError> {
        if secret.len() < SECRET_BYTES_MIN {
            return Err(KeyError::TooShort(secret.len()));
        }
        let (key, public) = signing_key(secret)?;
        let provider = Arc::new(provider());
        let check = Arc::new(OneKey {
            public: public.clone(),
            algorithms: provider.signature_verification_algorithms,
        });
        let shown = Arc::new(CertifiedKey::new(vec![CertificateDer::from(public)], key));
        let protocols: Vec<Vec<u8>> = protocols.iter().map(|name| name.to_vec()).collect();

        let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::clone(&check) as Arc<dyn ServerCertVerifier>)
            .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(
                Arc::clone(&shown),
            )));
        client.alpn_protocols.clone_from(&protocols);
        client.enable_sni = false;
        client.resumption = Resumption::disabled();

        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(check)
            .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(shown)));
        server.alpn_protocols = protocols;
        server.send_tls13_tickets = 0;
        Ok(ClusterKey {
            connector: TlsConnector::from(Arc::new(client)),
            acceptor: TlsAcceptor::from(Arc::new(server)),
        })
    }
}

/// The suites of TLS 1.3, first the one that costs least on a processor with AES.
fn provider() -> CryptoProvider {
    CryptoProvider {
        cipher_suites: vec![
            cipher_suite::TLS13_AES_128_GCM_SHA256,
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        ..default_provider()
    }
}

/// The key of a secret, and its public half as a SubjectPublicKeyInfo.
fn signing_key(
    secret: &str,
) -> Result<(Arc<dyn rustls::sign::SigningKey>, Vec<u8>), rustls::Error> {
    let failed = || rustls::Error::General("the key could not be derived".to_owned());
    let derived = hkdf::Salt::new(hkdf::HKDF_SHA256, KEY_SALT).extract(secret.as_bytes());
    let mut seed = [0; 32];
    derived
        .expand(&[&b"ed25519 seed"[..]], hkdf::HKDF_SHA256)
        .and_then(|okm| okm.fill(&mut seed))
        .map_err(|_| failed())?;
    let pkcs8 = [&PKCS8_PREFIX[..], &seed].concat();
    let key = sign::any_eddsa_type(&PrivatePkcs8KeyDer::from(pkcs8))?;
    let public = key.public_key().ok_or_else(failed)?.to_vec();
    Ok((key, public))
}

/// Accepts the one key of the cluster, from both sides.
#[derive(Debug)]
struct OneKey {
    public: Vec<u8>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl OneKey {
    fn check(&self, shown: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        // Public on both sides: nothing is learnt from the time that this takes.
        if shown.as_ref() == self.public {
            return Ok(());
        }
        Err(CertificateError::ApplicationVerificationFailure.into())
    }

    fn check_signature(
        &self,
        message: &[u8],
        shown: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let public = SubjectPublicKeyInfoDer::from(shown.as_ref());
        verify_tls13_signature_with_raw_key(message, &public, signature, &self.algorithms)
    }
}

/// TLS 1.2 is not spoken, so its signatures are never asked for.
fn no_tls12() -> Result<HandshakeSignatureValid, rustls::Error> {
    Err(rustls::Error::General("nodes speak TLS 1.3".to_owned()))
}

impl ServerCertVerifier for OneKey {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(end_entity)
            .map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.check_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

impl ClientCertVerifier for OneKey {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.check(end_entity)
            .map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.check_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_always_the_same_key_and_another_secret_another_one() {
        let public = |secret| signing_key(secret).unwrap().1;
        let secret = "a secret of thirty-two characters";
        assert_eq!(public(secret), public(secret));
        assert_ne!(public(secret), public("a secret of thirty-two characterz"));
        // The SubjectPublicKeyInfo of an Ed25519 key (RFC 8410 4).
        let spki = [
            0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00,
        ];
        assert!(public(secret).starts_with(&spki));
        assert_eq!(public(secret).len(), spki.len() + 32);
    }

    #[test]
    fn a_short_secret_is_refused_in_a_sentence() {
        let refused = ClusterKey::new(&"x".repeat(SECRET_BYTES_MIN - 1)).err();
        let text = refused.map(|error| error.to_string()).unwrap_or_default();
        assert!(
            text.starts_with("cluster.secret has 31 bytes and needs 32 or more"),
            "{text}"
        );
        assert!(ClusterKey::new(&"x".repeat(SECRET_BYTES_MIN)).is_ok());
    }
}
