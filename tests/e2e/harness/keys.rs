//! A cluster's keys.

use std::{fs, path::Path};

use shoal_pki::{CertificateAuthority, GoalSigner, Names, NewKey, Role};
use shoal_proto::{
    MachineName, RegionName, codec,
    trust::{TRUST_MAX_BYTES, TrustBundle},
};

fn trust(ca: &CertificateAuthority, signer: &GoalSigner) -> Vec<u8> {
    let bundle = TrustBundle {
        cluster: ca.cluster().into(),
        number: 1,
        ca_certificates: vec![ca.cert_der().to_vec()],
        goal_keys: vec![signer.public()],
        revoked: vec![],
    };
    codec::encode(&signer.sign_trust(&bundle).unwrap(), TRUST_MAX_BYTES).unwrap()
}

/// A cluster's keys.
pub struct Keys {
    pub ca: CertificateAuthority,
    pub signer: GoalSigner,
    pub trust: Vec<u8>,
    /// How long its certificates count, in seconds.
    pub life_s: u64,
}

impl Keys {
    pub fn new(cluster: &str) -> Self {
        let ca = CertificateAuthority::create(cluster).unwrap();
        let signer = GoalSigner::create(1).unwrap();
        let trust = trust(&ca, &signer);
        Self { ca, signer, trust, life_s: 7 * 86_400 }
    }

    /// A trust bundle of this CA that believes another goal key.
    pub fn trust_with(&self, signer: &GoalSigner) -> Vec<u8> {
        trust(&self.ca, signer)
    }

    /// Writes an identity directory.
    pub fn issue(&self, dir: &Path, role: Role, name: &str, region: Option<&str>) {
        fs::create_dir_all(dir).unwrap();
        let names = Names {
            machine: MachineName::new(name).unwrap(),
            region: region.map(|region| RegionName::new(region).unwrap()),
            role,
            hosts: vec!["127.0.0.1".into()],
        };
        let key = NewKey::generate().unwrap();
        let certificate = self.ca.certify(&names, &key.node(), self.life_s).unwrap();
        fs::write(dir.join("identity.pem"), certificate).unwrap();
        fs::write(dir.join("identity.key"), key.to_pem().unwrap()).unwrap();
        fs::write(dir.join("trust.bin"), &self.trust).unwrap();
    }
}
