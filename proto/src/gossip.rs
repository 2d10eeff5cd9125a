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
}

/// The name of a region's goal topic.
#[must_use]
pub fn goal_topic(cluster: &str, region: &RegionName) -> String {
    format!("shoal/{cluster}/{region}/goals")
}
