//! Why a call failed.

use std::{error::Error, io};

use rustls::{AlertDescription, CertificateError};

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The coordinator refused it; the message says what to do.
    #[error("{message}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// The error's fixed word.
        code: String,
        /// One line for people.
        message: String,
    },
    /// No coordinator answered.
    #[error(
        "no answer from the coordinator at {url}: {}; is it running, and is the address right?",
        bottom(source)
    )]
    Unreachable {
        /// The last one tried.
        url: String,
        /// What happened.
        source: reqwest::Error,
    },
    /// One end does not believe the other's certificate: waiting does not help.
    #[error("no answer from the coordinator at {url}: {}", explained(cause))]
    Distrusted {
        /// Where that was.
        url: String,
        /// What TLS says.
        cause: rustls::Error,
    },
    /// An answer that is none of the API.
    #[error("{url} did not answer as a coordinator does: {text}")]
    Unexpected {
        /// The address.
        url: String,
        /// What came instead.
        text: String,
    },
    /// The addresses or the identity cannot be used.
    #[error("{0}")]
    Config(String),
}

impl ClientError {
    /// No answer came from `url`.
    pub(crate) fn unreached(url: &str, source: reqwest::Error) -> Self {
        let url = url.into();
        match distrust(&source) {
            Some(cause) => Self::Distrusted { url, cause: cause.clone() },
            None => Self::Unreachable { url, source: source.without_url() },
        }
    }

    /// The same once more, where one end does not believe the other.
    pub(crate) fn distrust(&self) -> Option<Self> {
        let Self::Distrusted { url, cause } = self else { return None };
        Some(Self::Distrusted { url: url.clone(), cause: cause.clone() })
    }

    /// Whether trying again later may help. It may with distrust, too, for who runs on: certificates are renewed.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Distrusted { .. } => true,
            Self::Refused { status, code, .. } => {
                *status >= 500 || *status == 429 || code == "under_way"
            }
            Self::Unexpected { .. } | Self::Config(_) => false,
        }
    }

    /// Whether waiting may help who shows the same certificate again, as a command does.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        self.is_transient() && !matches!(self, Self::Distrusted { .. })
    }

    /// The fixed word of a refusal.
    #[must_use]
    pub fn code(&self) -> Option<&str> {
        match self {
            Self::Refused { code, .. } => Some(code),
            _ => None,
        }
    }
}

/// Whether one end has something against the other's certificate; other alerts are of servers that are no coordinators.
fn is_about_certificates(error: &rustls::Error) -> bool {
    use AlertDescription::{
        AccessDenied, BadCertificate, CertificateExpired, CertificateRequired, CertificateRevoked,
        CertificateUnknown, DecryptError, UnknownCA, UnsupportedCertificate,
    };
    match error {
        rustls::Error::InvalidCertificate(_) => true,
        rustls::Error::AlertReceived(alert) => matches!(
            alert,
            AccessDenied
                | BadCertificate
                | CertificateExpired
                | CertificateRequired
                | CertificateRevoked
                | CertificateUnknown
                | DecryptError
                | UnknownCA
                | UnsupportedCertificate
        ),
        _ => false,
    }
}

/// What TLS says where one end does not believe the other's certificate.
fn distrust<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(tls) = error.downcast_ref::<rustls::Error>() {
            return is_about_certificates(tls).then_some(tls);
        }
        // An io error's own source is what lies below the error that it carries.
        let carried = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        cause = match carried {
            Some(carried) => Some(carried),
            None => error.source(),
        };
    }
    None
}

/// What lies at the bottom of an error.
fn bottom(error: &dyn Error) -> String {
    let mut cause = error;
    while let Some(below) = cause.source() {
        cause = below;
    }
    cause.to_string()
}

/// What TLS says, and what to look at.
fn explained(cause: &rustls::Error) -> String {
    use rustls::Error::{AlertReceived, InvalidCertificate};
    let renew = "ask an administrator for a new one (shoal join-token create, shoal pki issue)";
    match cause {
        AlertReceived(AlertDescription::CertificateRevoked) => {
            format!("it says that this certificate is revoked: {renew}")
        }
        AlertReceived(AlertDescription::CertificateExpired) => {
            format!("it says that this certificate has expired: {renew}")
        }
        InvalidCertificate(CertificateError::Revoked) => "its certificate is revoked".into(),
        cause => format!(
            "{cause}; is this a member of that cluster, and is the address the coordinator's? If the CA was replaced: \
             shoal pki refresh"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_tls_says_is_explained() {
        let says = |cause| {
            let error = ClientError::Distrusted { url: "https://c:1/".into(), cause };
            assert!(error.is_transient() && !error.may_pass() && error.code().is_none());
            assert_eq!(error.distrust().unwrap().to_string(), error.to_string());
            error.to_string()
        };
        let text = says(rustls::Error::AlertReceived(AlertDescription::CertificateRevoked));
        assert!(text.contains("https://c:1/: it says that this certificate is revoked"), "{text}");
        let text = says(rustls::Error::AlertReceived(AlertDescription::UnknownCA));
        assert!(text.contains("is this a member of that cluster"), "{text}");
    }

    #[test]
    fn distrust_is_found_below_other_errors() {
        let alert = rustls::Error::AlertReceived(AlertDescription::CertificateRevoked);
        let carried = io::Error::new(io::ErrorKind::InvalidData, alert.clone());
        assert_eq!(distrust(&io::Error::other(carried)), Some(&alert));
        let other = io::Error::other(rustls::Error::HandshakeNotComplete);
        assert_eq!(distrust(&other), None);
        assert_eq!(distrust(&io::Error::other("no route")), None);
        let alert = rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol);
        assert_eq!(distrust(&io::Error::other(alert)), None, "no coordinator at all");
    }
}
