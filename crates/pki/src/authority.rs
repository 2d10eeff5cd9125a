//! The cluster's CA: says who is a member.

use std::{
    net::IpAddr,
    time::{SystemTime, UNIX_EPOCH},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyUsagePurpose, PublicKeyData, SanType, SubjectPublicKeyInfo,
};
use rustls::pki_types::{CertificateDer, DnsName, pem::PemObject};
use shoal_proto::{MachineName, NodeId, RegionName};
use x509_parser::time::ASN1Time;

use crate::{
    key::Key,
    member::{
        Member, PkiError, Role, ca_uri, check_cluster_name, cluster_of_ca, hosts_of,
        member_of_parsed, member_uri, parse, server_name,
    },
    trust::Trust,
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
const BACKDATED_DAYS: i64 = 1;

const DAY_S: i64 = 86_400;

/// How long before its issue a certificate begins, in seconds.
pub(crate) const BACKDATED_S: i64 = BACKDATED_DAYS * DAY_S;

/// An Ed25519 public key as X.509 writes it: this, and then its 32 bytes (RFC 8410).
const ED25519_SPKI: [u8; 12] =
    [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// What a certificate says about its holder, beside the key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    /// The machine's or process's name.
    pub machine: MachineName,
    /// Its region, if it belongs to one.
    pub region: Option<RegionName>,
    /// What it is for.
    pub role: Role,
    /// DNS names and IP addresses under which it is reached by HTTPS; at most [`HOSTS_MAX`].
    pub hosts: Vec<String>,
}

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
        Ok(Self { cluster: cluster.to_string(), certificate: certificate.into(), key })
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
        let parsed = parse(&certificate)?;
        if parsed.public_key().subject_public_key.data.as_ref() != key.public() {
            return Err(PkiError::KeyMismatch);
        }
        Ok(Self { cluster, certificate, key })
    }

    /// The CA of `trust` that has this key.
    ///
    /// # Errors
    /// [`PkiError`] when it is no key, or that of none of the bundle's CAs.
    pub fn of_trust(trust: &Trust, key_pem: &str) -> Result<Self, PkiError> {
        let key = Key::from_pem(key_pem)?;
        for der in &trust.bundle().ca_certificates {
            let parsed = parse(der)?;
            if parsed.public_key().subject_public_key.data.as_ref() == key.public() {
                let cluster = trust.cluster().to_string();
                return Ok(Self { cluster, certificate: der.clone().into(), key });
            }
        }
        Err(PkiError::Request("the key is of none of the CAs in the trust bundle".into()))
    }

    /// The cluster that it is for.
    #[must_use]
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    /// Its certificate, for everybody.
    #[must_use]
    pub fn cert_pem(&self) -> String {
        pem::encode(&pem::Pem::new("CERTIFICATE", self.certificate.to_vec()))
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
        let key = Key::generate()?;
        let names = Names {
            machine: request.machine.clone(),
            region: request.region.clone(),
            role: request.role,
            hosts: request.hosts.clone(),
        };
        let life_s = i64::from(request.days) * DAY_S;
        let cert_pem = self.sign(&names, &key.for_issuing()?, now_s, life_s)?;
        Ok(Issued { cert_pem, key_pem: key.to_pem()? })
    }

    /// Issues a certificate for a key that its holder made and keeps, for `life_s` seconds from now. Whether the asker
    /// has that key is for the caller to know. PEM.
    ///
    /// # Errors
    /// [`PkiError::Request`] when a certificate cannot say what is asked for.
    pub fn certify(&self, names: &Names, node: &NodeId, life_s: u64) -> Result<String, PkiError> {
        let longest = u64::from(CERTIFICATE_DAYS_MAX) * DAY_S as u64;
        if !(1..=longest).contains(&life_s) {
            let text = format!("a certificate counts for 1-{longest} seconds, not {life_s}");
            return Err(PkiError::Request(text));
        }
        let mut spki = ED25519_SPKI.to_vec();
        spki.extend_from_slice(&node.0);
        let public = SubjectPublicKeyInfo::from_der(&spki)?;
        self.sign(names, &public, now_s(), life_s as i64)
    }

    /// Issues a certificate that says what `der` says, for the same key, for `life_s` seconds from now. It is of use to the
    /// key's holder alone, so whoever asks needs to prove nothing; whether `der` still counts is for the caller to
    /// know. PEM.
    ///
    /// # Errors
    /// [`PkiError`] when `der` names no member of this cluster.
    pub fn renew(&self, der: &[u8], life_s: u64) -> Result<String, PkiError> {
        let certificate = parse(der)?;
        let member = member_of_parsed(&certificate)?;
        if member.cluster != self.cluster {
            return Err(PkiError::Request(format!("a certificate of cluster {}", member.cluster)));
        }
        let hosts = hosts_of(&certificate, &self.cluster)?;
        let Member { machine, region, role, node, .. } = member;
        self.certify(&Names { machine, region, role, hosts }, &node, life_s)
    }

    /// Signs: a certificate in PEM.
    fn sign(
        &self,
        names: &Names,
        public: &impl PublicKeyData,
        now_s: i64,
        life_s: i64,
    ) -> Result<String, PkiError> {
        if names.hosts.len() > HOSTS_MAX {
            return Err(PkiError::Request(format!(
                "a certificate holds at most {HOSTS_MAX} hosts, not {}",
                names.hosts.len()
            )));
        }
        let mut params = params_at(now_s, life_s, names.machine.as_str())?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let uri = member_uri(&self.cluster, names.role, names.region.as_ref(), &names.machine);
        params.subject_alt_names = vec![
            SanType::URI(uri.try_into()?),
            SanType::DnsName(server_name(&self.cluster).try_into()?),
        ];
        for host in &names.hosts {
            params.subject_alt_names.push(host_name(host)?);
        }
        let issuer = Issuer::from_ca_cert_der(&self.certificate, self.key.for_issuing()?)?;
        Ok(params.signed_by(public, &issuer)?.pem())
    }
}

fn now_s() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}

pub(crate) fn params(days: u32, name: &str) -> Result<CertificateParams, PkiError> {
    params_at(now_s(), i64::from(days) * DAY_S, name)
}

/// What all certificates have: their time and their name.
fn params_at(now_s: i64, life_s: i64, name: &str) -> Result<CertificateParams, PkiError> {
    let at = |seconds: i64| {
        ASN1Time::from_timestamp(seconds)
            .map(|time| time.to_datetime())
            .map_err(|_| PkiError::Request("a time that a certificate cannot hold".into()))
    };
    let mut params = CertificateParams::default();
    params.not_before = at(now_s - BACKDATED_S)?;
    params.not_after = at(now_s + life_s)?;
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
