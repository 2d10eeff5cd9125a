//! Membership: trust bundles, certificates, join tokens.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use shoal_proto::{MachineName, NodeId, RegionName, goal::Labels};

/// Asks for the trust bundles that lead on from one.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrustQuery {
    /// The number of the asker's bundle; 0: for all that there are.
    pub after: u64,
    /// How long to wait for a newer one, 5 s at most.
    #[serde(default)]
    pub wait_s: u32,
}

/// Trust bundles.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct TrustReply {
    /// The number of the newest.
    pub number: u64,
    /// Those that lead from the asker's to it, each as the hex of an encoded `SignedTrust`.
    pub bundles: Vec<String>,
}

/// What a change of trust came to.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct TrustChanged {
    /// The number of the new bundle.
    pub number: u64,
}

/// Whose certificates shall no longer count.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RevokeRequest {
    /// The machine: all keys that were ever seen with its name.
    pub machine: MachineName,
    /// A key of it that no coordinator has seen.
    #[serde(default)]
    pub node: Option<NodeId>,
}

/// What was revoked.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct RevokeReply {
    /// The number of the new bundle.
    pub number: u64,
    /// The keys.
    pub nodes: Vec<NodeId>,
}

/// A region process asks for a renewed certificate of one of its machines.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RenewForRequest {
    /// The certificate that the machine showed, in hex.
    pub certificate: String,
}

/// A certificate.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct CertificateReply {
    /// It, in PEM.
    pub certificate: String,
}

/// Asks for a token by which new machines join.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct JoinTokenRequest {
    /// The role of their certificates: agent, region or worker.
    pub role: String,
    /// Their region, for agents and region processes.
    #[serde(default)]
    pub region: Option<RegionName>,
    /// The zone of an agent.
    #[serde(default)]
    pub zone: Option<String>,
    /// Labels of an agent.
    #[serde(default)]
    pub labels: Labels,
    /// How many machines may join by it.
    pub uses: u32,
    /// For how long, in seconds.
    pub ttl_s: u64,
}

/// A token that was made: the only time that it is told.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct JoinTokenMade {
    /// What is given to the new machine.
    pub token: String,
    /// Its public name.
    pub id: String,
    /// Until when it is good.
    pub expires_at_ms: i64,
    /// The CA that the new machine shall find: `blake3:` and the hash of its certificate.
    pub ca_hash: String,
}

/// A token, without what makes it one.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct JoinToken {
    /// Its public name.
    pub id: String,
    /// The role that it gives.
    pub role: String,
    /// The region.
    pub region: Option<RegionName>,
    /// The zone.
    pub zone: Option<String>,
    /// The labels.
    pub labels: Labels,
    /// How many machines may still join by it.
    pub uses_left: u32,
    /// When it was made.
    pub created_at_ms: i64,
    /// Until when it is good.
    pub expires_at_ms: i64,
    /// Who made it.
    pub created_by: String,
}

/// A new machine asks for its certificate.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct JoinRequest {
    /// The token.
    pub token: String,
    /// The machine's name.
    pub machine: MachineName,
    /// Its new key.
    pub node: NodeId,
    /// Names and addresses under which it is reached by HTTPS.
    #[serde(default)]
    pub hosts: Vec<String>,
    /// Made with that key, over token and name, in hex: the asker has it.
    pub signature: String,
}

/// What a machine that has joined needs.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct JoinReply {
    /// Its certificate, PEM.
    pub certificate: String,
    /// The present trust bundle, in hex.
    pub trust: String,
    /// The role that it has.
    pub role: String,
    /// Its region.
    pub region: Option<RegionName>,
    /// Its zone.
    pub zone: Option<String>,
    /// Its labels.
    pub labels: Labels,
    /// Where the region's processes were last heard of, data plane.
    #[serde(default)]
    pub regions: Vec<String>,
}

/// A new CA that is to be believed beside the present one.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CaBeginRequest {
    /// Its certificate, PEM.
    pub certificate: String,
}

/// Ends a rotation.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FinishRotation {
    /// Also while machines still go by what is to end.
    #[serde(default)]
    pub force: bool,
}

/// A new goal key that is to be believed beside the present one.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GoalKeyBeginRequest {
    /// Its number.
    pub id: u32,
    /// Its public half, in hex.
    pub public: String,
}

/// What a region process knows of its machines' trust and certificates.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Standing {
    /// How many machines go by each bundle, by number.
    pub bundles: BTreeMap<u64, u64>,
    /// How many have a certificate of each CA, by the first bytes of its key's id in hex.
    pub issuers: BTreeMap<String, u64>,
    /// Where the process is reached, data plane.
    #[serde(default)]
    pub address: Option<String>,
}

/// Whom the cluster believes, and how far that has come.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct TrustStatus {
    /// The number of the newest bundle.
    pub number: u64,
    /// The CAs that it names by the first bytes of their keys' ids in hex, the newest last.
    pub cas: Vec<String>,
    /// `blake3:` and the hash of the newest CA's certificate, as `shoal join` wants it.
    pub ca_hash: String,
    /// The goal keys that it names.
    pub goal_keys: Vec<u32>,
    /// The goal key that the asked coordinator signs with.
    pub signs_with: Option<u32>,
    /// The CA that the asked coordinator issues certificates with.
    pub issues_with: Option<String>,
    /// How many keys are revoked.
    pub revoked: u64,
    /// What each region's processes say, by region and process.
    pub regions: BTreeMap<RegionName, BTreeMap<MachineName, Standing>>,
}

impl TrustStatus {
    /// All that the regions say together.
    #[must_use]
    pub fn standing(&self) -> Standing {
        let mut all = Standing::default();
        for standing in self.regions.values().flat_map(BTreeMap::values) {
            for (number, machines) in &standing.bundles {
                *all.bundles.entry(*number).or_default() += machines;
            }
            for (issuer, machines) in &standing.issuers {
                *all.issuers.entry(issuer.clone()).or_default() += machines;
            }
        }
        all
    }
}
