//! A client by token instead of by certificate, and the calls about tokens and the audit log.

use std::sync::Arc;

use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject as _},
};
use shoal_proto::MachineName;

use super::{Client, ClientError, Result};
use crate::types::{AuditQuery, AuditRow, CreatedToken, Token, TokenRequest, WhoAmI};

/// TLS settings that believe servers whose certificate one of these CAs issued, and show none.
fn tls_of_ca(ca_pem: &str) -> std::result::Result<ClientConfig, String> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(ca_pem.as_bytes()) {
        let certificate = certificate.map_err(|error| error.to_string())?;
        roots.add(certificate).map_err(|error| error.to_string())?;
    }
    if roots.is_empty() {
        return Err("it has no certificate in it".into());
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| error.to_string())?;
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

impl Client {
    /// Makes a client that shows a token, and believes coordinators whose certificate one of the CAs issued (PEM).
    ///
    /// # Errors
    /// [`ClientError::Config`] when an address, the CA or the token cannot be used.
    pub fn with_token(coordinators: &[String], ca_pem: &str, token: &str) -> Result<Self> {
        let tls = tls_of_ca(ca_pem)
            .map_err(|error| ClientError::Config(format!("the CA certificate: {error}")))?;
        Self::over(coordinators, tls, Some(token))
    }

    /// Who the caller is.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn whoami(&self) -> Result<WhoAmI> {
        self.get("v1/whoami", &[]).await
    }

    /// Makes a token. Its secret is in this answer and in no other.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn create_token(&self, request: &TokenRequest) -> Result<CreatedToken> {
        self.post("v1/tokens", request).await
    }

    /// All tokens, oldest first, without their secrets.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn tokens(&self) -> Result<Vec<Token>> {
        self.list("v1/tokens", Vec::new(), None).await
    }

    /// Revokes a token.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn revoke_token(&self, name: &MachineName) -> Result<Token> {
        self.post(&format!("v1/tokens/{name}/revoke"), &()).await
    }

    /// The newest rows of the audit log that fit a query, `most` at most, newest first. The query's own page is not
    /// looked at.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn audit(&self, query: &AuditQuery, most: u32) -> Result<Vec<AuditRow>> {
        let mut args = Vec::new();
        args.extend(query.app.as_ref().map(|app| ("app", app.to_string())));
        args.extend(query.subject.as_ref().map(|subject| ("subject", subject.clone())));
        args.extend(query.who.as_ref().map(|who| ("who", who.clone())));
        args.extend(query.what.as_ref().map(|what| ("what", what.clone())));
        args.extend(query.since_ms.map(|since| ("since_ms", since.to_string())));
        self.list("v1/audit", args, Some(most)).await
    }
}
