//! The trust bundle: whom the cluster believes.

use alloc::{string::String, vec::Vec};

use serde::{Deserialize, Serialize};

use crate::ids::NodeId;

/// What is signed is this tag and then the bundle's bytes.
pub const TRUST_DOMAIN: &[u8] = b"shoal trust v1\0";

/// The longest encoded [`SignedTrust`], in bytes.
pub const TRUST_MAX_BYTES: usize = 256 << 10;

/// The most bundles that lead from an old one to the newest: one for each goal key that was replaced since. A machine
/// that slept through more replacements joins again.
pub const TRUST_CHAIN_MAX: usize = 8;

/// A key that goals may be signed with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GoalKey {
    /// Its number.
    pub id: u32,
    /// Its Ed25519 public key.
    pub public: [u8; 32],
}

/// Two CAs during a rotation, the goal keys, the revoked machines. A higher number replaces a lower one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrustBundle {
    /// The cluster.
    pub cluster: String,
    /// Rises with every change.
    pub number: u64,
    /// CA certificates, DER.
    pub ca_certificates: Vec<Vec<u8>>,
    /// The goal keys.
    pub goal_keys: Vec<GoalKey>,
    /// Machines whose certificates no longer count.
    pub revoked: Vec<NodeId>,
}

/// A bundle as it travels and rests: the bytes that were signed, by a goal key of the bundle before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedTrust {
    /// The encoded [`TrustBundle`].
    pub bundle: Vec<u8>,
    /// Which goal key signed it.
    pub key_id: u32,
    /// Ed25519 over [`TRUST_DOMAIN`] and `bundle`: 64 bytes.
    pub signature: Vec<u8>,
}
