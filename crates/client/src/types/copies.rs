//! Copies for as long as their artifact lives.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use shoal_proto::{AppName, ArtifactId, RegionName, state::ReplicationStatus};

use super::{Artifact, Halt};

/// How the copies are.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct ReplicationStatusPage {
    /// All regions.
    pub regions: BTreeMap<RegionName, RegionReplication>,
    /// The artifact that was asked for, or those that are not whole in some bucket, newest first.
    pub artifacts: Vec<Artifact>,
}

/// The copies of a region.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
pub struct RegionReplication {
    /// Whether it is out of service: nothing is copied into it.
    pub drained: bool,
    /// Why it is; none when it is in service.
    pub drain: Option<Halt>,
    /// Whether its store makes the copies itself, and the coordinator only looks.
    pub observed: bool,
    /// How many copies are in each state; only states of which there are any.
    pub copies: BTreeMap<ReplicationStatus, u64>,
    /// How much is to be copied yet.
    pub bytes_left: u64,
    /// How much comes in a second.
    pub bytes_per_s: u64,
    /// In how many seconds all is copied at that rate.
    pub eta_s: Option<f64>,
}

/// Names an artifact.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ArtifactRef {
    /// Its name or id.
    pub artifact: String,
}

/// Keeps an artifact whatever comes.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PinRequest {
    /// Its name or id.
    pub artifact: String,
    /// Why, for those who look.
    #[serde(default)]
    pub reason: Option<String>,
}

/// A pin.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Pin {
    /// The artifact's name.
    pub artifact: String,
    /// What the operator said.
    pub reason: Option<String>,
    /// Who it was.
    pub by: String,
    /// When.
    pub at_ms: i64,
}

/// Deletes artifacts that nothing needs, or says which would go.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GcRequest {
    /// Only says what would go.
    #[serde(default)]
    pub dry_run: bool,
    /// Only artifacts of this app.
    #[serde(default)]
    pub app: Option<AppName>,
    /// How many of an app's newest stay; none: as the app says, or the coordinator is configured.
    #[serde(default)]
    pub keep: Option<u32>,
}

/// What went, or would go.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct GcReport {
    /// Whether nothing was deleted.
    pub dry_run: bool,
    /// By app; those without a limit keep everything and are not here.
    pub apps: BTreeMap<AppName, GcApp>,
    /// How many bytes each bucket then holds less.
    pub freed_bytes: u64,
}

/// What goes of an app, and what stays.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct GcApp {
    /// How many of the newest stay.
    pub keep: u32,
    /// What goes.
    pub goes: Vec<KeptArtifact>,
    /// What stays, newest first.
    pub stays: Vec<KeptArtifact>,
    /// How many bytes each bucket then holds less.
    pub freed_bytes: u64,
}

/// An artifact that stays or goes, and why.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct KeptArtifact {
    /// Its name.
    pub name: String,
    /// Its id.
    pub artifact: ArtifactId,
    /// The length of its stored pieces.
    pub encoded_bytes: u64,
    /// When it was made.
    pub created_at_ms: i64,
    /// Why it stays or goes.
    pub why: String,
}
