//! A certificate for browsers, beside the cluster's own.
//!
//! Browsers cannot check Ed25519 certificates, and do not know the cluster's CA. So a listener that serves a page has a second
//! certificate: whoever says in its first message that it cannot check the first kind is shown the second one. It
//! proves nothing to a member of the cluster, since none ever sees it.

use std::sync::{Arc, PoisonError, RwLock};

use rcgen::{ExtendedKeyUsagePurpose, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::{
    ServerConfig, SignatureScheme,
    crypto::aws_lc_rs::sign::any_supported_type,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};

use crate::{
    authority::params,
    member::{PkiError, parse},
};

/// The certificate that browsers are shown; it may be replaced while connections come.
#[derive(Debug, Clone)]
pub struct BrowserCertificate(Arc<RwLock<Arc<CertifiedKey>>>);

impl BrowserCertificate {
    /// One of a PEM chain and its key.
    ///
    /// # Errors
    /// [`PkiError`] when they cannot be read, or do not belong together.
    pub fn new(chain_pem: &str, key_pem: &str) -> Result<Self, PkiError> {
        Ok(Self(Arc::new(RwLock::new(certified(chain_pem, key_pem)?))))
    }

    /// Has browsers be shown another one from now on; what is wrong changes nothing.
    ///
    /// # Errors
    /// [`PkiError`], as for [`Self::new`].
    pub fn replace(&self, chain_pem: &str, key_pem: &str) -> Result<(), PkiError> {
        let new = certified(chain_pem, key_pem)?;
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = new;
        Ok(())
    }

    /// Has a server show it to whoever cannot check Ed25519 ones.
    pub fn show(&self, config: &mut ServerConfig) {
        let members = config.cert_resolver.clone();
        config.cert_resolver = Arc::new(ByCaller { members, browsers: self.clone() });
    }
}

/// Shows each caller a certificate that it can check.
#[derive(Debug)]
struct ByCaller {
    members: Arc<dyn ResolvesServerCert>,
    browsers: BrowserCertificate,
}

impl ResolvesServerCert for ByCaller {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        match hello.signature_schemes().contains(&SignatureScheme::ED25519) {
            true => self.members.resolve(hello),
            false => Some(self.browsers.0.read().unwrap_or_else(PoisonError::into_inner).clone()),
        }
    }
}

fn certified(chain_pem: &str, key_pem: &str) -> Result<Arc<CertifiedKey>, PkiError> {
    let chain = CertificateDer::pem_slice_iter(chain_pem.as_bytes()).collect::<Result<Vec<_>, _>>();
    let chain = chain.ok().filter(|chain| !chain.is_empty());
    let chain = chain.ok_or(PkiError::Pem("no CERTIFICATE section"))?;
    let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes());
    let key = key.map_err(|_| PkiError::Pem("no PRIVATE KEY section"))?;
    let tls = |error: rustls::Error| PkiError::Tls(error.to_string());
    let certified = CertifiedKey::new(chain, any_supported_type(&key).map_err(tls)?);
    certified.keys_match().map_err(|_| PkiError::KeyMismatch)?;
    Ok(Arc::new(certified))
}

/// A certificate for `hosts` that nobody signed but its own key (ECDSA P-256, which every browser checks), and that key, PEM.
///
/// # Errors
/// [`PkiError`] when a host is none.
pub fn self_signed(hosts: &[String], days: u32) -> Result<(String, String), PkiError> {
    let mut params = params(days, "Shoal")?;
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    for host in hosts {
        let name = match host.parse() {
            Ok(address) => SanType::IpAddress(address),
            Err(_) => SanType::DnsName(host.as_str().try_into()?),
        };
        params.subject_alt_names.push(name);
    }
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let certificate = params.self_signed(&key)?;
    Ok((certificate.pem(), key.serialize_pem()))
}

/// Until when a certificate counts, in seconds since the Unix epoch.
///
/// # Errors
/// [`PkiError`] when it cannot be read.
pub fn not_after_s(chain_pem: &str) -> Result<i64, PkiError> {
    let first = CertificateDer::from_pem_slice(chain_pem.as_bytes());
    let first = first.map_err(|_| PkiError::Pem("no CERTIFICATE section"))?;
    Ok(parse(&first)?.validity().not_after.timestamp())
}
