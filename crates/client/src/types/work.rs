//! What a worker asks and tells.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use shoal_proto::{ArtifactId, EncodingId};

use super::{App, Job};

/// A worker asks for a job.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ClaimRequest {
    /// Random, new with every start of the worker process.
    pub incarnation: String,
    /// The worker's host name.
    pub host: String,
    /// How long to wait for one, 5 s at most.
    pub wait_s: u32,
}

/// A job given to a worker.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct ClaimedJob {
    /// The job.
    pub job: Job,
    /// Its app.
    pub app: App,
    /// The lease that every later call must name.
    pub lease: String,
    /// How often to send a heartbeat.
    pub heartbeat_s: f64,
    /// The main bucket.
    pub bucket: String,
}

/// Proof that a worker still holds a job; part of every later call.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct LeaseRef {
    /// The attempt.
    pub attempt: u32,
    /// The lease.
    pub lease: String,
}

/// A worker waits to be told that its job is cancelled.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct WatchRequest {
    /// The attempt and its lease.
    #[serde(flatten)]
    pub lease: LeaseRef,
    /// How long to wait, 5 s at most.
    pub wait_s: u32,
}

/// The answer to a heartbeat, and to who waits for a cancel.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct HeartbeatReply {
    /// Stop the job: an operator cancelled it.
    pub cancel: bool,
}

/// How an attempt ended.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The artifact is whole in the main bucket.
    Succeeded {
        /// The artifact.
        artifact: ArtifactId,
        /// The encoding.
        encoding: EncodingId,
    },
    /// It failed; `retry` when another attempt may do better (the worker is shutting down, the network failed).
    Failed {
        /// Why.
        reason: String,
        /// Whether to try again.
        retry: bool,
    },
    /// It was cancelled, and everything that it had started is gone.
    Cancelled,
}

/// A worker ends an attempt.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct FinishRequest {
    /// The attempt and its lease.
    #[serde(flatten)]
    pub lease: LeaseRef,
    /// How it ended.
    pub outcome: Outcome,
}
