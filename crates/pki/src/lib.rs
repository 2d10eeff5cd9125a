//! Who belongs to a cluster, and whose word counts in it.
//!
//! There are two kinds of keys, all Ed25519. A **CA key** says who is a member: [`CertificateAuthority`]
//! issues each process one certificate, which names its cluster, machine, region and role in a URI
//! (`shoal://CLUSTER/ROLE/REGION/MACHINE`) and whose key is the process's [`NodeId`](shoal_proto::NodeId)
//! on both planes. A **goal key** says what shall run: [`GoalSigner`] signs goals and trust bundles.
//!
//! The other side of both is [`Trust`]: a signed, numbered bundle of CA certificates, goal keys and
//! revoked machines. It opens goals ([`Trust::open_goal`]) and reads certificates
//! ([`Trust::verify_certificate`]) into a [`Member`]. The TLS settings of QUIC and HTTPS
//! ([`server_config`], [`client_config`]) put that same check into the handshake, so membership is
//! decided in one place only. Each handshake goes by what the process's [`Credentials`] are at that moment: trust
//! changes and certificates are renewed while it runs.
//!
//! Machines' clocks may differ by [`CLOCK_LEEWAY_S`]: a certificate counts that much before and after its
//! time, and is issued backdated by a day.
//!
//! The crate computes over bytes: whoever calls it reads and writes the files.

mod authority;
mod browser;
mod credentials;
mod goal;
mod identity;
mod join;
mod key;
mod member;
mod tls;
mod trust;

#[cfg(test)]
mod tests;

pub use authority::{
    CERTIFICATE_DAYS, CERTIFICATE_DAYS_MAX, CertificateAuthority, HOSTS_MAX, IssueRequest, Issued,
    Names,
};
pub use browser::{BrowserCertificate, not_after_s, self_signed};
pub use credentials::Credentials;
pub use goal::{GoalSigner, SignError};
pub use identity::Identity;
pub use join::{NewKey, join_signature_holds};
pub use member::{
    Member, PkiError, Role, ca_certificate, ca_id, check_cluster_name, issuer_of, member_of,
    server_name,
};
pub use tls::{ClientAuth, asking_config, client_config, server_config, stranger_config};
pub use trust::{CLOCK_LEEWAY_S, CertificateError, GoalError, Trust, TrustError};
