//! A process's own certificate and key.

use std::{fmt, sync::Arc};

use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};

use crate::{
    key::Key,
    member::{Member, PkiError, member_of_parsed, parse},
};

/// Who a process is: its certificate and the key that proves it. Cheap to clone.
#[derive(Clone)]
pub struct Identity(Arc<Inner>);

struct Inner {
    member: Member,
    certificate: CertificateDer<'static>,
    key: Key,
    seed: [u8; 32],
    not_after_s: i64,
}

impl Identity {
    /// Reads a certificate and its key.
    ///
    /// # Errors
    /// [`PkiError`] when they cannot be read or do not belong together.
    pub fn from_pem(cert_pem: &str, key_pem: &str) -> Result<Self, PkiError> {
        let certificate = CertificateDer::from_pem_slice(cert_pem.as_bytes())
            .map_err(|_| PkiError::Pem("no CERTIFICATE section"))?;
        let key = Key::from_pem(key_pem)?;
        let parsed = parse(&certificate)?;
        let member = member_of_parsed(&parsed)?;
        if member.node.0 != key.public() {
            return Err(PkiError::KeyMismatch);
        }
        let not_after_s = parsed.validity().not_after.timestamp();
        let seed = key.seed()?;
        Ok(Self(Arc::new(Inner { member, certificate, key, seed, not_after_s })))
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

    /// The 32 bytes that the private key is derived from, for libraries that make the key themselves.
    #[must_use]
    pub fn ed25519_seed(&self) -> [u8; 32] {
        self.0.seed
    }

    /// The chain and the key as rustls wants them.
    pub(crate) fn for_tls(&self) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let key = PrivateKeyDer::Pkcs8(self.0.key.der().clone_key());
        (vec![self.0.certificate.clone()], key)
    }
}

// The key stays out of logs.
impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Identity").field(&self.0.member).finish()
    }
}
