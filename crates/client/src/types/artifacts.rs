//! Artifacts, how they get into the main bucket, and where they are.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use shoal_proto::{
    AppName, ArtifactId, CommitSha, EncodingId, RegionName, state::ReplicationStatus,
};

/// An artifact and where it is.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Artifact {
    /// Its name, which is unique: `APP/SHA12-JOB` for a build.
    pub name: String,
    /// The app.
    pub app: AppName,
    /// BLAKE3 of its bytes.
    pub artifact: ArtifactId,
    /// The encoding that the buckets hold.
    pub encoding: EncodingId,
    /// Its length.
    pub size_bytes: u64,
    /// The length of its stored pieces.
    pub encoded_bytes: u64,
    /// The length of a piece.
    pub piece_size_bytes: u64,
    /// The number of pieces.
    pub pieces: u32,
    /// The job that made it; none when it was published.
    pub job: Option<i64>,
    /// The commit that it was made of.
    pub commit: Option<CommitSha>,
    /// When it was stored whole in the main bucket.
    pub created_at_ms: i64,
    /// Its copy in each region.
    pub replication: BTreeMap<RegionName, Replication>,
    /// COMPLETE when it is in all regions that are not drained.
    pub replication_status: ReplicationStatus,
    /// Whether it may be deployed.
    pub deployable: bool,
    /// Why not.
    pub not_deployable_reason: Option<String>,
    /// What the main bucket lost of it; none once that is repaired.
    #[serde(default)]
    pub main_damage: Option<String>,
    /// Its end: its objects are deleted from all buckets; none while it lives.
    #[serde(default)]
    pub deleted: Option<Deletion>,
}

/// The end of an artifact.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Deletion {
    /// When.
    pub at_ms: i64,
    /// By whom.
    pub by: String,
    /// Why.
    pub why: String,
}

/// An artifact's copy in one region's bucket.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Replication {
    /// Its state.
    pub status: ReplicationStatus,
    /// How much is there.
    pub bytes_done: u64,
    /// How much came in a second, of late.
    #[serde(default)]
    pub bytes_per_s: u64,
    /// In how many seconds it will be complete at that rate; only while it is being copied.
    #[serde(default)]
    pub eta_s: Option<f64>,
    /// When the copying began.
    pub started_at_ms: Option<i64>,
    /// When it was complete.
    pub finished_at_ms: Option<i64>,
    /// Why it failed last, what it waits for, or what the bucket lost of it.
    pub reason: Option<String>,
    /// When an inspection found that the bucket had lost some of it; none once that is repaired.
    #[serde(default)]
    pub damaged_at_ms: Option<i64>,
    /// When it was inspected last.
    #[serde(default)]
    pub checked_at_ms: Option<i64>,
}

/// What an uploader has stored under an encoding so far: part number to length in bytes.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct UploadState {
    /// The parts that are there, verified or not.
    pub parts: BTreeMap<u32, u64>,
    /// Whether the index is there: all is there.
    pub whole: bool,
}

/// Makes an uploaded encoding an artifact of an app.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PublishRequest {
    /// The app.
    pub app: AppName,
    /// The artifact.
    pub artifact: ArtifactId,
    /// The encoding that was uploaded.
    pub encoding: EncodingId,
}
