//! TLS towards servers that are not of the cluster.

use std::{path::Path, sync::Arc};

use anyhow::{Context as _, ensure};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject as _},
};

/// A client's TLS settings that believe the system's certificate authorities (`SSL_CERT_FILE` names others), or those of a
/// PEM file alone.
///
/// # Errors
/// A line that names the file, when it cannot be read or holds no certificate.
pub fn public_tls(ca: Option<&Path>) -> anyhow::Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    match ca {
        Some(path) => {
            let wrong = || format!("cannot read the certificate authorities in {}", path.display());
            for certificate in CertificateDer::pem_file_iter(path).with_context(wrong)? {
                roots.add(certificate.with_context(wrong)?).with_context(wrong)?;
            }
            ensure!(!roots.is_empty(), "no certificate is in {}", path.display());
        }
        None => {
            let found = rustls_native_certs::load_native_certs();
            let (_, unusable) = roots.add_parsable_certificates(found.certs);
            if roots.is_empty() {
                tracing::warn!(
                    unusable,
                    "the system has no certificate authorities: no public server will be believed (install ca-certificates)"
                );
            }
        }
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .context("TLS")?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_certificates_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        assert!(public_tls(Some(&path)).unwrap_err().to_string().contains("ca.pem"));
        std::fs::write(&path, "nothing").unwrap();
        assert!(public_tls(Some(&path)).unwrap_err().to_string().contains("ca.pem"));
        public_tls(None).unwrap();
    }
}
