//! What a certificate says about its holder.

use std::{fmt, net::IpAddr, str::FromStr};

use serde::{Deserialize, Serialize};
use shoal_proto::{MachineName, NodeId, RegionName};
use x509_parser::{
    extensions::{GeneralName, ParsedExtension},
    oid_registry::OID_SIG_ED25519,
    prelude::X509Certificate,
};

/// The scheme of the URI that names a member in its certificate.
const SCHEME: &str = "shoal://";

/// The longest cluster name in bytes: it is a DNS label.
const CLUSTER_NAME_MAX_BYTES: usize = 63;

/// What went wrong with keys and certificates.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PkiError {
    /// A PEM text does not hold what it should.
    #[error("bad PEM: {0}")]
    Pem(&'static str),
    /// A certificate cannot be read, or is not one of Shoal's.
    #[error("bad certificate: {0}")]
    Certificate(String),
    /// A key and a certificate that do not belong together.
    #[error("the private key is not the certificate's")]
    KeyMismatch,
    /// A name, a host or a number that a certificate cannot carry.
    #[error("{0}")]
    Request(String),
    /// The cryptographic library refused.
    #[error("{0}")]
    Crypto(&'static str),
    /// A TLS setting was refused.
    #[error("TLS: {0}")]
    Tls(String),
}

impl From<rcgen::Error> for PkiError {
    fn from(error: rcgen::Error) -> Self {
        Self::Certificate(error.to_string())
    }
}

/// What a process is for; its certificate says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Owns the database, the API and the rollouts.
    Coordinator,
    /// Builds.
    Worker,
    /// Serves the machines of a region.
    Region,
    /// A target machine.
    Agent,
    /// A person with a shell.
    Operator,
}

impl Role {
    /// Every role, with its name.
    const NAMES: [(Self, &'static str); 5] = [
        (Self::Coordinator, "coordinator"),
        (Self::Worker, "worker"),
        (Self::Region, "region"),
        (Self::Agent, "agent"),
        (Self::Operator, "operator"),
    ];
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(Self::NAMES.iter().find(|(role, _)| role == self).map_or("", |(_, name)| name))
    }
}

impl FromStr for Role {
    type Err = PkiError;

    fn from_str(text: &str) -> Result<Self, PkiError> {
        let found = Self::NAMES.iter().find(|(_, name)| *name == text);
        found.map(|(role, _)| *role).ok_or_else(|| {
            let names = Self::NAMES.map(|(_, name)| name).join(", ");
            PkiError::Request(format!("'{text}' is not a role: use one of {names}"))
        })
    }
}

/// A member of a cluster, as its certificate names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The cluster.
    pub cluster: String,
    /// The public key.
    pub node: NodeId,
    /// The machine's or process's name.
    pub machine: MachineName,
    /// Its region; none for what belongs to no region.
    pub region: Option<RegionName>,
    /// What it is for.
    pub role: Role,
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.role, self.machine)?;
        self.region.as_ref().map_or(Ok(()), |region| write!(f, " in {region}"))
    }
}

/// Checks a cluster's name: a DNS label of `a-z`, `0-9` and `-`.
///
/// # Errors
/// [`PkiError::Request`] says what is allowed.
pub fn check_cluster_name(name: &str) -> Result<(), PkiError> {
    let ok = !name.is_empty()
        && name.len() <= CLUSTER_NAME_MAX_BYTES
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-');
    if ok {
        return Ok(());
    }
    Err(PkiError::Request(format!(
        "'{}' is not a cluster name: use 1-{CLUSTER_NAME_MAX_BYTES} of a-z 0-9 -, not - first or last",
        name.chars().take(80).collect::<String>()
    )))
}

/// The DNS name that every certificate of `cluster` holds: what a client asks for when it knows whom it
/// wants by the key and not by a host name.
#[must_use]
pub fn server_name(cluster: &str) -> String {
    format!("{cluster}.shoal")
}

/// The URI that names a member.
pub(crate) fn member_uri(
    cluster: &str,
    role: Role,
    region: Option<&RegionName>,
    machine: &MachineName,
) -> String {
    // No region's name can be "-": names begin with a letter or a digit.
    let region = region.map_or("-", RegionName::as_str);
    format!("{SCHEME}{cluster}/{role}/{region}/{machine}")
}

/// The URI that names a CA.
pub(crate) fn ca_uri(cluster: &str) -> String {
    format!("{SCHEME}{cluster}")
}

/// Parses a whole certificate.
pub(crate) fn parse(der: &[u8]) -> Result<X509Certificate<'_>, PkiError> {
    match x509_parser::parse_x509_certificate(der) {
        Ok(([], certificate)) => Ok(certificate),
        Ok(_) => Err(PkiError::Certificate("bytes are left over after it".into())),
        Err(error) => Err(PkiError::Certificate(error.to_string())),
    }
}

/// The one `shoal://` URI of a certificate, without its scheme.
fn shoal_uri<'a>(certificate: &'a X509Certificate<'_>) -> Result<&'a str, PkiError> {
    let wrong = |text: &str| PkiError::Certificate(text.into());
    let names = certificate
        .subject_alternative_name()
        .map_err(|error| PkiError::Certificate(error.to_string()))?
        .ok_or_else(|| wrong("it has no subject alternative names"))?;
    let mut uris = names.value.general_names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => uri.strip_prefix(SCHEME),
        _ => None,
    });
    match (uris.next(), uris.next()) {
        (Some(uri), None) => Ok(uri),
        (None, _) => Err(wrong("it names no member of a Shoal cluster")),
        (Some(_), Some(_)) => Err(wrong("it names more than one member")),
    }
}

/// The DNS names and addresses that a certificate of `cluster` holds beside the one that all of them hold.
pub(crate) fn hosts_of(
    certificate: &X509Certificate<'_>,
    cluster: &str,
) -> Result<Vec<String>, PkiError> {
    let names = certificate
        .subject_alternative_name()
        .map_err(|error| PkiError::Certificate(error.to_string()))?;
    let Some(names) = names else { return Ok(Vec::new()) };
    let own = server_name(cluster);
    let hosts = names.value.general_names.iter().filter_map(|name| match name {
        GeneralName::DNSName(host) if *host != own => Some((*host).to_string()),
        GeneralName::IPAddress(bytes) => address(bytes).map(|ip| ip.to_string()),
        _ => None,
    });
    Ok(hosts.collect())
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    let four: Option<[u8; 4]> = bytes.try_into().ok();
    let sixteen: Option<[u8; 16]> = bytes.try_into().ok();
    four.map(IpAddr::from).or(sixteen.map(IpAddr::from))
}

/// The first bytes of a key's id as X.509 holds it.
fn short(id: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(*id.first_chunk::<8>()?))
}

/// The first bytes of the id of the CA key that issued a certificate; none when it does not say.
#[must_use]
pub fn issuer_of(der: &[u8]) -> Option<u64> {
    let certificate = parse(der).ok()?;
    certificate.extensions().iter().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::AuthorityKeyIdentifier(id) => short(id.key_identifier.as_ref()?.0),
        _ => None,
    })
}

/// The first bytes of the id of a CA's key, as [`issuer_of`] gives them of what it issued.
#[must_use]
pub fn ca_id(der: &[u8]) -> Option<u64> {
    let certificate = parse(der).ok()?;
    certificate.extensions().iter().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::SubjectKeyIdentifier(id) => short(id.0),
        _ => None,
    })
}

/// The cluster that a CA certificate is for.
pub(crate) fn cluster_of_ca(der: &[u8]) -> Result<String, PkiError> {
    let certificate = parse(der)?;
    let cluster = shoal_uri(&certificate)?;
    check_cluster_name(cluster)?;
    Ok(cluster.to_string())
}

/// Reads a CA's certificate of `cluster` from PEM: its DER.
///
/// # Errors
/// [`PkiError`] when it is none, or another cluster's.
pub fn ca_certificate(pem: &str, cluster: &str) -> Result<Vec<u8>, PkiError> {
    use rustls::pki_types::{CertificateDer, pem::PemObject as _};
    let der = CertificateDer::from_pem_slice(pem.as_bytes())
        .map_err(|_| PkiError::Pem("no CERTIFICATE section"))?;
    let parsed = parse(&der)?;
    let of = cluster_of_ca(&der)?;
    if of != cluster || !parsed.is_ca() {
        return Err(PkiError::Request(format!("it is no CA of cluster {cluster}")));
    }
    Ok(der.to_vec())
}

/// Reads the member that a certificate names. This does not check who issued it:
/// [`crate::Trust::verify_certificate`] does both.
///
/// # Errors
/// [`PkiError::Certificate`] when it cannot be read or names no member.
pub fn member_of(der: &[u8]) -> Result<Member, PkiError> {
    let certificate = parse(der)?;
    member_of_parsed(&certificate)
}

pub(crate) fn member_of_parsed(certificate: &X509Certificate<'_>) -> Result<Member, PkiError> {
    let uri = shoal_uri(certificate)?;
    let wrong = |text: String| PkiError::Certificate(text);
    let mut fields = uri.split('/');
    let mut field = || fields.next().ok_or_else(|| wrong(format!("'{uri}' names no member")));
    let (cluster, role, region, machine) = (field()?, field()?, field()?, field()?);
    if fields.next().is_some() {
        return Err(wrong(format!("'{uri}' names no member")));
    }
    check_cluster_name(cluster)?;
    let region = match region {
        "-" => None,
        name => Some(RegionName::new(name).map_err(|error| wrong(error.to_string()))?),
    };
    let key = certificate.public_key();
    let public: Option<[u8; 32]> = key.subject_public_key.data.as_ref().try_into().ok();
    match public {
        Some(public) if key.algorithm.algorithm == OID_SIG_ED25519 => Ok(Member {
            cluster: cluster.to_string(),
            node: NodeId(public),
            machine: MachineName::new(machine).map_err(|error| wrong(error.to_string()))?,
            region,
            role: role.parse()?,
        }),
        _ => Err(wrong("its key is not an Ed25519 key".into())),
    }
}
