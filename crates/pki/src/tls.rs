//! The TLS settings of both planes that speak TLS: QUIC and HTTPS.

use std::sync::Arc;

use rustls::{
    CertificateError as TlsError, CipherSuite, ClientConfig, DigitallySignedStruct,
    DistinguishedName, Error, OtherError, ServerConfig, SignatureScheme,
    client::{
        ResolvesClientCert, Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::{
        ClientHello, NoServerSessionStorage, ResolvesServerCert,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
    version::TLS13,
};
use webpki::EndEntityCert;

use crate::{
    credentials::Credentials,
    member::PkiError,
    trust::{CertificateError, Trust},
};

/// Whether a server lets clients in that show no certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientAuth {
    /// No: the handshake fails.
    Required,
    /// Yes: what they may do is decided behind. A certificate that is shown must still be good.
    Optional,
}

/// A server's TLS settings: TLS 1.3 only, AES-128-GCM first, clients checked by the trust of the moment.
///
/// # Errors
/// [`PkiError::Tls`] when rustls refuses the identity.
pub fn server_config(
    credentials: &Credentials,
    alpn: &[&[u8]],
    client: ClientAuth,
) -> Result<ServerConfig, PkiError> {
    let provider = provider();
    let verifier = Verifier::new(credentials, &provider, client == ClientAuth::Required);
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(tls)?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Own::new(credentials)?);
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    // A resumed session would not look at the certificate again, and so not at its revocation.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// A client's TLS settings: TLS 1.3 only, AES-128-GCM first, the server checked by the trust of the moment and by the
/// name that the client asks for; [`crate::server_name`] is a name that every member has.
///
/// # Errors
/// [`PkiError::Tls`] when rustls refuses the identity.
pub fn client_config(credentials: &Credentials, alpn: &[&[u8]]) -> Result<ClientConfig, PkiError> {
    client(credentials, Whom::Following(credentials.clone()), alpn)
}

/// [`client_config`] for a question to a server that may be anybody, whose answer proves itself: a machine that slept through
/// a change of the CA asks so for the trust bundles that lead to it.
///
/// # Errors
/// [`PkiError::Tls`] when rustls refuses the identity.
pub fn asking_config(credentials: &Credentials, alpn: &[&[u8]]) -> Result<ClientConfig, PkiError> {
    client(credentials, Whom::Anybody, alpn)
}

fn client(credentials: &Credentials, whom: Whom, alpn: &[&[u8]]) -> Result<ClientConfig, PkiError> {
    let provider = provider();
    let verifier = Arc::new(Verifier { whom, provider: provider.clone(), required: true });
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(tls)?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Own::new(credentials)?);
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// The TLS settings of a client that has no certificate yet. The server is checked by `trust`; without that it may be
/// anybody, and what it says is to be proved by other means.
///
/// # Errors
/// [`PkiError::Tls`] when rustls refuses.
pub fn stranger_config(trust: Option<Trust>, alpn: &[&[u8]]) -> Result<ClientConfig, PkiError> {
    let provider = provider();
    let whom = trust.map_or(Whom::Anybody, Whom::Fixed);
    let verifier = Arc::new(Verifier { whom, provider: provider.clone(), required: false });
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(tls)?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config.resumption = Resumption::disabled();
    Ok(config)
}

pub(crate) fn tls(error: Error) -> PkiError {
    PkiError::Tls(error.to_string())
}

/// aws-lc-rs with AES-128-GCM first: it takes the least processor time of all suites.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    provider
        .cipher_suites
        .sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
}

/// The own certificate as it is at each handshake.
#[derive(Debug)]
struct Own(Credentials);

impl Own {
    fn new(credentials: &Credentials) -> Result<Arc<Self>, PkiError> {
        // What rustls refuses is said now, not at the first handshake.
        credentials.identity().for_tls()?;
        Ok(Arc::new(Self(credentials.clone())))
    }

    fn at_present(&self) -> Option<Arc<CertifiedKey>> {
        self.0.identity().for_tls().ok()
    }
}

impl ResolvesServerCert for Own {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.at_present()
    }
}

impl ResolvesClientCert for Own {
    fn resolve(
        &self,
        _root_hint_subjects: &[&[u8]],
        _sigschemes: &[SignatureScheme],
    ) -> Option<Arc<CertifiedKey>> {
        self.at_present()
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// [`crate::Trust::verify_certificate`] at both ends of a handshake.
#[derive(Debug)]
struct Verifier {
    whom: Whom,
    provider: Arc<CryptoProvider>,
    required: bool,
}

/// By whose word the other end is believed.
#[derive(Debug)]
enum Whom {
    /// The trust of each moment.
    Following(Credentials),
    /// This one.
    Fixed(Trust),
    /// Nobody's.
    Anybody,
}

impl Verifier {
    fn new(credentials: &Credentials, provider: &Arc<CryptoProvider>, required: bool) -> Arc<Self> {
        let whom = Whom::Following(credentials.clone());
        Arc::new(Self { whom, provider: provider.clone(), required })
    }

    fn check(&self, der: &CertificateDer<'_>, now: UnixTime) -> Result<(), Error> {
        let trust = match &self.whom {
            Whom::Following(credentials) => credentials.trust(),
            Whom::Fixed(trust) => trust.clone(),
            Whom::Anybody => return Ok(()),
        };
        trust.verify_certificate_at(der, now).map(drop).map_err(|error| {
            Error::InvalidCertificate(match error {
                CertificateError::UnknownIssuer => TlsError::UnknownIssuer,
                CertificateError::Expired(_) => TlsError::Expired,
                CertificateError::NotYet(_) => TlsError::NotValidYet,
                CertificateError::Revoked(_) => TlsError::Revoked,
                CertificateError::Malformed(_) => TlsError::BadEncoding,
                other => TlsError::Other(OtherError(Arc::new(other))),
            })
        })
    }

    fn signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, algorithms)
    }
}

/// Only TLS 1.3 is spoken.
fn no_tls12() -> Result<HandshakeSignatureValid, Error> {
    Err(Error::General("TLS 1.2 is not spoken here".into()))
}

impl ClientCertVerifier for Verifier {
    fn client_auth_mandatory(&self) -> bool {
        self.required
    }

    /// None: a member has one certificate, and shows that. Names would be those of one moment.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(end_entity, now)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(end_entity, now)?;
        if matches!(self.whom, Whom::Anybody) {
            return Ok(ServerCertVerified::assertion());
        }
        let wrong_name = |_| Error::InvalidCertificate(TlsError::NotValidForName);
        EndEntityCert::try_from(end_entity)
            .and_then(|leaf| leaf.verify_is_valid_for_subject_name(server_name))
            .map_err(wrong_name)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}
