//! Every check is shown to accept what it should and to refuse what it should not.

mod certificates;
mod goals;
mod handshakes;

use shoal_proto::{
    MachineName, RegionName, codec,
    trust::{TRUST_MAX_BYTES, TrustBundle},
};

use crate::{CertificateAuthority, GoalSigner, Identity, IssueRequest, Role, Trust};

pub(super) const CLUSTER: &str = "reef";

/// A cluster with one CA and one goal key.
pub(super) struct Cluster {
    pub(super) ca: CertificateAuthority,
    pub(super) signer: GoalSigner,
    pub(super) trust: Trust,
}

pub(super) fn cluster(name: &str) -> Cluster {
    let ca = CertificateAuthority::create(name).unwrap();
    let signer = GoalSigner::create(1).unwrap();
    let trust = sign(&signer, &bundle(&ca, &signer));
    Cluster { ca, signer, trust }
}

pub(super) fn bundle(ca: &CertificateAuthority, signer: &GoalSigner) -> TrustBundle {
    TrustBundle {
        cluster: ca.cluster().into(),
        number: 1,
        ca_certificates: vec![ca.cert_der().to_vec()],
        goal_keys: vec![signer.public()],
        revoked: vec![],
    }
}

pub(super) fn signed_bytes(signer: &GoalSigner, bundle: &TrustBundle) -> Vec<u8> {
    codec::encode(&signer.sign_trust(bundle).unwrap(), TRUST_MAX_BYTES).unwrap()
}

pub(super) fn sign(signer: &GoalSigner, bundle: &TrustBundle) -> Trust {
    Trust::from_signed(&signed_bytes(signer, bundle)).unwrap()
}

pub(super) fn request(machine: &str, role: Role) -> IssueRequest {
    IssueRequest {
        machine: MachineName::new(machine).unwrap(),
        region: (role == Role::Agent).then(|| RegionName::new("eu").unwrap()),
        role,
        hosts: vec!["localhost".into(), "127.0.0.1".into()],
        days: 90,
    }
}

pub(super) fn identity(ca: &CertificateAuthority, machine: &str, role: Role) -> Identity {
    let issued = ca.issue(&request(machine, role)).unwrap();
    Identity::from_pem(&issued.cert_pem, &issued.key_pem).unwrap()
}
