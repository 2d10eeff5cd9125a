//! A process's own certificate and key.

use std::{
    fmt,
    sync::{Arc, OnceLock},
};

use rustls::{
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    sign::CertifiedKey,
};

use crate::{
    authority::BACKDATED_S,
    key::Key,
    member::{Member, PkiError, member_of_parsed, parse},
    tls::{provider, tls},
};

/// Who a process is: its certificate and the key that proves it. Cheap to clone.
#[derive(Clone)]
pub struct Identity(Arc<Inner>);

struct Inner {
    member: Member,
    certificate: CertificateDer<'static>,
    key: Key,
    seed: [u8; 32],
    not_before_s: i64,
    not_after_s: i64,
    /// As rustls wants it, once it was asked for.
    certified: OnceLock<Arc<CertifiedKey>>,
}

impl Identity {
    /// Reads a certificate and its key.
    ///
    /// # Errors
    /// [`PkiError`] when they cannot be read or do not belong together.
    pub fn from_pem(cert_pem: &str, key_pem: &str) -> Result<Self, PkiError> {
        Self::of(cert_pem, Key::from_pem(key_pem)?)
    }

    /// The same key with another certificate of it, in PEM.
    ///
    /// # Errors
    /// [`PkiError`] when it cannot be read or is of another key.
    pub fn with_certificate(&self, cert_pem: &str) -> Result<Self, PkiError> {
        Self::of(cert_pem, self.0.key.again()?)
    }

    fn of(cert_pem: &str, key: Key) -> Result<Self, PkiError> {
        let certificate = CertificateDer::from_pem_slice(cert_pem.as_bytes())
            .map_err(|_| PkiError::Pem("no CERTIFICATE section"))?;
        let parsed = parse(&certificate)?;
        let member = member_of_parsed(&parsed)?;
        if member.node.0 != key.public() {
            return Err(PkiError::KeyMismatch);
        }
        let validity = parsed.validity();
        let (not_before_s, not_after_s) =
            (validity.not_before.timestamp(), validity.not_after.timestamp());
        let seed = key.seed()?;
        let certified = OnceLock::new();
        Ok(Self(Arc::new(Inner {
            member,
            certificate,
            key,
            seed,
            not_before_s,
            not_after_s,
            certified,
        })))
    }

    /// What the certificate says.
    #[must_use]
    pub fn member(&self) -> &Member {
        &self.0.member
    }

    /// The certificate, DER.
    #[must_use]
    pub fn certificate_der(&self) -> &[u8] {
        &self.0.certificate
    }

    /// Until when the certificate counts, in seconds since the Unix epoch.
    #[must_use]
    pub fn not_after_s(&self) -> i64 {
        self.0.not_after_s
    }

    /// From when on it should be renewed, in seconds since the Unix epoch: two thirds of its life.
    #[must_use]
    pub fn renew_at_s(&self) -> i64 {
        let issued_s = self.0.not_before_s + BACKDATED_S;
        issued_s + (self.0.not_after_s - issued_s) / 3 * 2
    }

    /// The 32 bytes that the private key is derived from, for libraries that make the key themselves.
    #[must_use]
    pub fn ed25519_seed(&self) -> [u8; 32] {
        self.0.seed
    }

    /// The chain and the key as rustls wants them.
    pub(crate) fn for_tls(&self) -> Result<Arc<CertifiedKey>, PkiError> {
        if let Some(certified) = self.0.certified.get() {
            return Ok(certified.clone());
        }
        let key = PrivateKeyDer::Pkcs8(self.0.key.der().clone_key());
        let chain = vec![self.0.certificate.clone()];
        let certified = Arc::new(CertifiedKey::from_der(chain, key, &provider()).map_err(tls)?);
        Ok(self.0.certified.get_or_init(|| certified).clone())
    }
}

// The key stays out of logs.
impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Identity").field(&self.0.member).finish()
    }
}
