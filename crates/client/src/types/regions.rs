//! What a region process asks and tells.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use shoal_proto::{AppName, MachineName, NodeId, Revision, goal::Labels, region::MachineReport};

/// A region process asks for goals that changed after a cursor.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GoalsQuery {
    /// The cursor of the last answer; 0 for all goals.
    pub after: u64,
    /// How long to wait for a change, 5 s at most.
    pub wait_s: u32,
    /// The highest epoch of the goals that the region process knows: what a recovery must go above.
    #[serde(default)]
    pub highest_epoch: u32,
}

/// Goals that changed.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct GoalsReply {
    /// To be given back the next time.
    pub cursor: u64,
    /// Each goal as the hex of an encoded `SignedGoal`.
    pub goals: Vec<String>,
    /// Revisions whose rollouts are paused or ended badly: their waves stay as they are.
    pub halted: Vec<(AppName, Revision)>,
}

/// A region process tells of machines: those that it heard of, and their new states. All or nothing is kept.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
pub struct RegionReports {
    /// Machines that were heard of since the last batch.
    pub machines: Vec<MachineSeen>,
    /// New states.
    pub reports: Vec<MachineStateSeen>,
    /// Waves that it has opened.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub waves: Vec<WaveOpened>,
}

/// A region process lets more of its machines activate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct WaveOpened {
    /// The app.
    pub app: AppName,
    /// Its goal's revision.
    pub revision: Revision,
    /// Machines of a rank below this may activate, in thousandths.
    pub open_permille: u16,
    /// How long ago it opened.
    pub age_ms: u64,
}

/// A machine that was heard of.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct MachineSeen {
    /// Its name.
    pub name: MachineName,
    /// Its zone.
    pub zone: String,
    /// All its labels.
    pub labels: Labels,
    /// The release that its agent runs.
    pub version: String,
    /// Where its data plane is.
    pub address: String,
    /// Its key.
    #[serde(default)]
    pub node: Option<NodeId>,
    /// How long ago it was heard of.
    pub age_ms: u64,
}

/// A machine's new state; `report.age_ms` counts up to the sending of the batch.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct MachineStateSeen {
    /// The machine.
    pub machine: MachineName,
    /// The report.
    pub report: MachineReport,
}
