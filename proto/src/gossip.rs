//! What goes over a region's gossip topic: small, signed, and safe to hear twice.

use alloc::{format, string::String};

use serde::{Deserialize, Serialize};

use crate::{goal::SignedGoal, ids::RegionName};

/// The longest encoded [`GossipMessage`], in bytes.
pub const GOSSIP_MESSAGE_MAX_BYTES: usize = 1_024;

/// A message of the goal topic. Unknown versions are ignored and counted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum GossipMessage {
    /// A goal, new or repeated.
    Goal(SignedGoal),
    /// There is a trust bundle of this number, too long to be here: it is asked for by QUIC
    /// ([`crate::peer::StreamRequest::Trust`]). Not signed, so it proves nothing and starts a question at most. A release that
    /// does not know it ignores it.
    Trust {
        /// The bundle's number.
        number: u64,
        /// The BLAKE3 hash of the encoded signed bundle.
        hash: [u8; 32],
    },
}

/// The name of a region's goal topic.
#[must_use]
pub fn goal_topic(cluster: &str, region: &RegionName) -> String {
    format!("shoal/{cluster}/{region}/goals")
}
