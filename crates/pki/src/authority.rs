//! The cluster's CA: says who is a member.

use std::{
    net::IpAddr,
    time::{SystemTime, UNIX_EPOCH},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyUsagePurpose, SanType,
};
use rustls::pki_types::{CertificateDer, DnsName, pem::PemObject};
use shoal_proto::{MachineName, RegionName};
use x509_parser::time::ASN1Time;

use crate::{
    key::Key,
    member::{PkiError, Role, ca_uri, check_cluster_name, cluster_of_ca, member_uri, server_name},
};

/// How long a certificate counts by default, in days; it is renewed at 60.
pub const CERTIFICATE_DAYS: u32 = 90;

/// The longest that a certificate may count, in days: what leaks should not count for ever.
pub const CERTIFICATE_DAYS_MAX: u32 = 3_650;

/// The most host names and addresses of one certificate: it must stay small, since each handshake and
/// each membership exchange carries it.
pub const HOSTS_MAX: usize = 16;

/// A CA counts for this long, in days; a rotation replaces it before.
const CA_DAYS: u32 = 3_650;

/// Certificates begin this long before they are issued, in days, because clocks differ.
const BACKDATED_DAYS: u32 = 1;

const DAY_S: i64 = 86_400;

/// A new member's certificate, as it is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssueRequest {
    /// The machine's or process's name.
    pub machine: MachineName,
    /// Its region, if it belongs to one.
    pub region: Option<RegionName>,
    /// What it is for.
    pub role: Role,
    /// DNS names and IP addresses under which it is reached by HTTPS; at most [`HOSTS_MAX`].
    pub hosts: Vec<String>,
    /// For how many days from now, at most [`CERTIFICATE_DAYS_MAX`].
    pub days: u32,
}

/// A certificate and its key.
#[derive(Clone)]
pub struct Issued {
    /// The certificate.
    pub cert_pem: String,
    /// The private key, PKCS #8: for its holder only.
    pub key_pem: String,
}

/// The cluster's CA, with its private key.
pub struct CertificateAuthority {
    cluster: String,
    certificate: CertificateDer<'static>,
    cert_pem: String,
    key: Key,
}

impl CertificateAuthority {
    /// Makes a new CA for `cluster`, a DNS label.
    ///
    /// # Errors
    /// [`PkiError`] when the name is not one, or no key can be made.
    pub fn create(cluster: &str) -> Result<Self, PkiError> {
        check_cluster_name(cluster)?;
        let key = Key::generate()?;
        let mut params = params(CA_DAYS, &format!("Shoal CA of {cluster}"))?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.subject_alt_names = vec![SanType::URI(ca_uri(cluster).try_into()?)];
        let certificate = params.self_signed(&key.for_issuing()?)?;
        Ok(Self {
            cluster: cluster.to_string(),
            cert_pem: certificate.pem(),
            certificate: certificate.into(),
            key,
        })
    }

    /// Reads a CA back from its certificate and its key.
    ///
    /// # Errors
    /// [`PkiError`] when they cannot be read or do not belong together.
    pub fn from_pem(cert_pem: &str, key_pem: &str) -> Result<Self, PkiError> {
        let certificate = CertificateDer::from_pem_slice(cert_pem.as_bytes())
            .map_err(|_| PkiError::Pem("no CERTIFICATE section"))?;
        let key = Key::from_pem(key_pem)?;
        let cluster = cluster_of_ca(&certificate)?;
        let parsed = crate::member::parse(&certificate)?;
        if parsed.public_key().subject_public_key.data.as_ref() != key.public() {
            return Err(PkiError::KeyMismatch);
        }
        Ok(Self { cluster, certificate, cert_pem: cert_pem.to_string(), key })
    }

    /// The cluster that it is for.
    #[must_use]
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    /// Its certificate, for everybody.
    #[must_use]
    pub fn cert_pem(&self) -> &str {
        &self.cert_pem
    }

    /// Its certificate, as a trust bundle holds it.
    #[must_use]
    pub fn cert_der(&self) -> &[u8] {
        &self.certificate
    }

    /// Its private key: for nobody else.
    ///
    /// # Errors
    /// [`PkiError`] when the key cannot be written.
    pub fn key_pem(&self) -> Result<String, PkiError> {
        self.key.to_pem()
    }

    /// Issues a certificate with a new key.
    ///
    /// # Errors
    /// [`PkiError::Request`] when a certificate cannot say what is asked for.
    pub fn issue(&self, request: &IssueRequest) -> Result<Issued, PkiError> {
        self.issue_at(request, now_s())
    }

    /// [`Self::issue`] as if it were `now_s`, in seconds since the Unix epoch.
    pub(crate) fn issue_at(&self, request: &IssueRequest, now_s: i64) -> Result<Issued, PkiError> {
        if !(1..=CERTIFICATE_DAYS_MAX).contains(&request.days) {
            return Err(PkiError::Request(format!(
                "a certificate counts for 1-{CERTIFICATE_DAYS_MAX} days, not {}",
                request.days
            )));
        }
        if request.hosts.len() > HOSTS_MAX {
            return Err(PkiError::Request(format!(
                "a certificate holds at most {HOSTS_MAX} hosts, not {}",
                request.hosts.len()
            )));
        }
        let key = Key::generate()?;
        let mut params = params_at(now_s, request.days, request.machine.as_str())?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let uri =
            member_uri(&self.cluster, request.role, request.region.as_ref(), &request.machine);
        params.subject_alt_names = vec![
            SanType::URI(uri.try_into()?),
            SanType::DnsName(server_name(&self.cluster).try_into()?),
        ];
        for host in &request.hosts {
            params.subject_alt_names.push(host_name(host)?);
        }
        let issuer = Issuer::from_ca_cert_der(&self.certificate, self.key.for_issuing()?)?;
        let certificate = params.signed_by(&key.for_issuing()?, &issuer)?;
        Ok(Issued { cert_pem: certificate.pem(), key_pem: key.to_pem()? })
    }
}

fn now_s() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}

pub(crate) fn params(days: u32, name: &str) -> Result<CertificateParams, PkiError> {
    params_at(now_s(), days, name)
}

/// What all certificates have: their time and their name.
fn params_at(now_s: i64, days: u32, name: &str) -> Result<CertificateParams, PkiError> {
    let at = |seconds: i64| {
        ASN1Time::from_timestamp(seconds)
            .map(|time| time.to_datetime())
            .map_err(|_| PkiError::Request("a time that a certificate cannot hold".into()))
    };
    let mut params = CertificateParams::default();
    params.not_before = at(now_s - i64::from(BACKDATED_DAYS) * DAY_S)?;
    params.not_after = at(now_s + i64::from(days) * DAY_S)?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    Ok(params)
}

/// A host as a certificate names it: an IP address, or else a DNS name.
fn host_name(host: &str) -> Result<SanType, PkiError> {
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(ip));
    }
    DnsName::try_from(host).map_err(|_| {
        PkiError::Request(format!("'{host}' is neither an IP address nor a DNS name"))
    })?;
    Ok(SanType::DnsName(host.try_into()?))
}
