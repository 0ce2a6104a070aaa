//! TLS to PostgreSQL, by `rustls`: verification of the server's certificate.
//!
//! | `sslmode` | `sslrootcert` | the server's certificate |
//! |---|---|---|
//! | `verify-full` | file or `system` | chains to a trusted one, and names the host connected to |
//! | `verify-ca`, or any weaker one | file | chains to a trusted one |
//! | `require`, `prefer`, `allow` | none | is not checked |
//!
//! That is `libpq`'s table, with three differences. An unreadable `sslrootcert` is an error in every mode.
//! Nothing is read from the home directory. A host's name is matched against the certificate's `subjectAltName`
//! only, as everywhere since RFC 9525, not against its common name.
//!
//! The server's proof that it has the certificate's key is checked in every mode, because SCRAM's channel
//! binding rests on it.

use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{
    WebPkiSupportedAlgorithms, ring, verify_tls12_signature, verify_tls13_signature,
    verify_tls13_signature_with_raw_key,
};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{
    CertificateDer, PrivateKeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime,
};
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
};
use tokio_postgres_rustls::MakeRustlsConnect;
use x509_cert::der::{Decode, Encode};

use super::url::{TlsMode, TlsParameters, Trust};
use crate::store::StoreError;

/// PostgreSQL's name in the TLS handshake; `sslnegotiation=direct` needs it.
const ALPN: &[u8] = b"postgresql";

/// Reads the files that `parameters` name and makes the TLS half of a connection.
///
/// # Errors
/// [`StoreError::Url`] with the file and its fault.
pub(super) fn connector(parameters: &TlsParameters) -> Result<MakeRustlsConnect, StoreError> {
    let provider = Arc::new(ring::default_provider());
    let check = ServerCheck {
        algorithms: provider.signature_verification_algorithms,
        trusted: trusted(&parameters.trust)?,
        name: parameters.mode == TlsMode::VerifyFull,
    };
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| StoreError::Url(format!("TLS: {e}")))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(check));
    let mut config = match &parameters.identity {
        None => builder.with_no_client_auth(),
        Some((cert, key)) => {
            let chain = certificates("sslcert", cert)?;
            let secret = PrivateKeyDer::from_pem_file(key).map_err(unreadable("sslkey", key))?;
            builder.with_client_auth_cert(chain, secret).map_err(|e| {
                StoreError::Url(format!(
                    "sslcert {} and sslkey {} do not go together: {e}",
                    cert.display(),
                    key.display()
                ))
            })?
        }
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(MakeRustlsConnect::new(config))
}

fn trusted(trust: &Trust) -> Result<Option<Trusted>, StoreError> {
    let mut roots = RootCertStore::empty();
    let certificates = match trust {
        Trust::Anybody => return Ok(None),
        Trust::File(path) => {
            let found = certificates("sslrootcert", path)?;
            for certificate in &found {
                roots
                    .add(certificate.clone())
                    .map_err(|e| StoreError::Url(format!("sslrootcert {}: {e}", path.display())))?;
            }
            found
        }
        Trust::System => {
            // Some certificates of a machine's store are always too old to be parsed.
            let found = rustls_native_certs::load_native_certs();
            let (added, _) = roots.add_parsable_certificates(found.certs);
            if added == 0 {
                return Err(StoreError::Url(
                    "sslrootcert=system: this machine trusts no certificate authority; install the package \
                     ca-certificates, or name a file"
                        .to_owned(),
                ));
            }
            Vec::new()
        }
    };
    Ok(Some(Trusted {
        roots,
        certificates,
    }))
}

fn certificates(
    parameter: &'static str,
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, StoreError> {
    let found: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(unreadable(parameter, path))?;
    if found.is_empty() {
        return Err(unreadable(parameter, path)(pem::Error::NoItemsFound));
    }
    Ok(found)
}

fn unreadable(parameter: &'static str, path: &Path) -> impl FnOnce(pem::Error) -> StoreError {
    move |error| {
        let reason = match error {
            pem::Error::Io(e) => e.to_string(),
            pem::Error::NoItemsFound => "there is no PEM block of the right kind in it".to_owned(),
            other => other.to_string(),
        };
        StoreError::Url(format!("{parameter} {}: {reason}", path.display()))
    }
}

/// The trusted certificates.
#[derive(Debug)]
struct Trusted {
    roots: RootCertStore,
    /// The certificates of the file, byte for byte. A server may use one of them itself: a self-signed
    /// certificate, as `openssl req -x509` makes it, is the usual beginning.
    certificates: Vec<CertificateDer<'static>>,
}

/// Verifies a server's certificate as far as the mode requires.
#[derive(Debug)]
struct ServerCheck {
    algorithms: WebPkiSupportedAlgorithms,
    trusted: Option<Trusted>,
    name: bool,
}

impl ServerCertVerifier for ServerCheck {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(trusted) = &self.trusted else {
            return Ok(ServerCertVerified::assertion());
        };
        if trusted.certificates.contains(end_entity) {
            // It is its own authority; `webpki` would refuse it for being one.
            in_date(end_entity, now)?;
        } else {
            rustls::client::verify_server_cert_signed_by_trust_anchor(
                &ParsedCertificate::try_from(end_entity)?,
                &trusted.roots,
                intermediates,
                now,
                self.algorithms.all,
            )?;
        }
        if self.name {
            let certificate = ParsedCertificate::try_from(end_entity)?;
            rustls::client::verify_server_name(&certificate, server_name)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        if ParsedCertificate::try_from(cert).is_ok() {
            return verify_tls13_signature(message, cert, dss, &self.algorithms);
        }
        // A certificate of X.509 version 1, as the recipe in PostgreSQL's documentation makes it with an older
        // OpenSSL. `webpki` does not parse it, but its key can be used like any other.
        let key = x509_cert::Certificate::from_der(cert)
            .and_then(|cert| cert.tbs_certificate.subject_public_key_info.to_der())
            .map_err(|_| CertificateError::BadEncoding)?;
        let key = SubjectPublicKeyInfoDer::from(key);
        verify_tls13_signature_with_raw_key(message, &key, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

fn in_date(certificate: &CertificateDer<'_>, now: UnixTime) -> Result<(), rustls::Error> {
    let validity = x509_cert::Certificate::from_der(certificate)
        .map_err(|_| CertificateError::BadEncoding)?
        .tbs_certificate
        .validity;
    if now.as_secs() < validity.not_before.to_unix_duration().as_secs() {
        return Err(CertificateError::NotValidYet.into());
    }
    if now.as_secs() > validity.not_after.to_unix_duration().as_secs() {
        return Err(CertificateError::Expired.into());
    }
    Ok(())
}
