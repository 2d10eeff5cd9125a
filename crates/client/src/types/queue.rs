//! The queue, its workers, and what is halted.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use shoal_proto::state::{Priority, WorkerState};

/// The queue: whether it is paused, and how much waits.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct QueueStatus {
    /// Why nobody takes a job; none while it is not paused.
    pub paused: Option<Halt>,
    /// The jobs that a worker could take, by priority; only those of which there are any.
    pub waiting: BTreeMap<Priority, Waiting>,
    /// Jobs that wait for their next attempt.
    pub deferred: u64,
    /// Jobs that run.
    pub running: u64,
    /// Workers by what they do; only those of which there are any.
    pub workers: BTreeMap<WorkerState, u64>,
}

/// The jobs of one priority that a worker could take.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Waiting {
    /// How many they are.
    pub jobs: u64,
    /// For how long one of them has waited.
    pub oldest_wait_s: f64,
}

/// Why jobs are not taken, by anybody or by a worker, or a region is out of service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Halt {
    /// What the operator said.
    pub reason: Option<String>,
    /// Who it was.
    pub by: String,
    /// When.
    pub at_ms: i64,
}

/// Lets jobs not be taken, by anybody or by a worker, or takes a region out of service.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HaltRequest {
    /// Why, for those who look.
    #[serde(default)]
    pub reason: Option<String>,
}

/// A worker.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Worker {
    /// Its name.
    pub name: String,
    /// What it does.
    pub state: WorkerState,
    /// Its host.
    pub host: String,
    /// The process that has the name.
    pub incarnation: String,
    /// When this process was first heard of.
    pub started_at_ms: i64,
    /// When it was last heard of.
    pub last_seen_at_ms: i64,
    /// The jobs that it works on.
    pub jobs: Vec<i64>,
    /// Why it takes no more jobs; none when it does.
    pub drain: Option<Halt>,
}
