//! Deployments, and the machines that they are for.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use shoal_proto::{
    AppName, ArtifactId, MachineName, RegionName, Revision,
    goal::Labels,
    region::MachineReport,
    state::{MachineState, RolloutStatus},
};

use super::Halt;

/// Sets an app's goal.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DeployRequest {
    /// The app.
    pub app: AppName,
    /// An artifact's name or id.
    pub artifact: String,
}

/// Sets an app's goal back to what it ran before.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RollbackRequest {
    /// The app.
    pub app: AppName,
    /// An artifact's name or id; none: what ran before the present one.
    #[serde(default)]
    pub artifact: Option<String>,
}

/// A rollout and how far it is.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Rollout {
    /// Its number.
    pub id: i64,
    /// The app.
    pub app: AppName,
    /// Its goal's revision.
    pub revision: Revision,
    /// The artifact.
    pub artifact: ArtifactId,
    /// The artifact's name.
    pub artifact_name: String,
    /// Its state.
    pub status: RolloutStatus,
    /// Why it ended as it did.
    pub reason: Option<String>,
    /// Whether it went back.
    pub rollback: bool,
    /// When it began.
    pub created_at_ms: i64,
    /// When it ended.
    pub finished_at_ms: Option<i64>,
    /// Who asked for it.
    pub requested_by: String,
    /// How it is in each region.
    pub regions: BTreeMap<RegionName, RolloutRegion>,
}

/// A rollout in one region.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
pub struct RolloutRegion {
    /// How many machines it is for.
    pub machines: u64,
    /// How many are in each state.
    pub states: BTreeMap<MachineState, u64>,
    /// Pieces held and verified, over all machines.
    pub pieces: u64,
    /// Pieces wanted, over all machines.
    pub pieces_total: u64,
    /// Stored piece bytes read from the region's bucket.
    pub origin_bytes: u64,
    /// `origin_bytes` by the encoded size.
    pub origin_copies: f64,
    /// Stored piece bytes received from neighbours.
    pub peer_bytes: u64,
    /// When its first machine was ACTIVE.
    pub first_active_at_ms: Option<i64>,
    /// When its last one was.
    pub last_active_at_ms: Option<i64>,
    /// How far its waves are open: machines of a rank below this, of 1000, may activate, whichever of its region processes
    /// they keep to. None without waves, or when no region process has told yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub open_permille: Option<u16>,
}

/// A machine and what it runs.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Machine {
    /// Its name.
    pub name: MachineName,
    /// Its region.
    pub region: RegionName,
    /// Its zone.
    pub zone: String,
    /// All its labels.
    pub labels: Labels,
    /// The release that its agent runs.
    pub version: String,
    /// Where its data plane is.
    pub address: String,
    /// When its region last heard of it.
    pub last_seen_at_ms: i64,
    /// What it does about each app.
    pub apps: Vec<MachineApp>,
}

/// What a machine does about an app.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct MachineApp {
    /// Its last report.
    #[serde(flatten)]
    pub report: MachineReport,
    /// When that state came about, by the coordinator's clock.
    pub state_at_ms: i64,
}

/// A region.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Region {
    /// Its name.
    pub name: RegionName,
    /// Whether it is out of service: it holds up no deployment.
    pub drained: bool,
    /// Why it is; none when it is in service.
    pub drain: Option<Halt>,
    /// Its region processes and when each was last heard of.
    pub processes: BTreeMap<MachineName, i64>,
    /// How many machines it knows.
    pub machines: u64,
}

/// An app's goal and the rollout that carries it out.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct AppStatus {
    /// The app.
    pub app: AppName,
    /// Its present rollout; none when it was never deployed.
    pub rollout: Option<Rollout>,
}
