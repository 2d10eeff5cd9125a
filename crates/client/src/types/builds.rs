//! Apps and their builds.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use shoal_proto::{
    AppName, ArtifactId, CommitSha,
    goal::{Activation, HealthCheck, RolloutPlan},
    state::{JobStatus, Priority},
};

/// A registered app.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct App {
    /// Its name.
    pub name: AppName,
    /// Where its commits are: a URL or path that `git fetch` takes. Empty for an app that is only published to.
    #[serde(default)]
    pub repository: String,
    /// Run with `sh -c` in the root of a clean checkout.
    #[serde(default)]
    pub build_command: String,
    /// The file that the build leaves, relative to the root of the checkout.
    #[serde(default)]
    pub output: String,
    /// What a machine does with the artifact.
    #[serde(default = "activation_none")]
    pub activation: Activation,
    /// How a machine finds out whether the build is well.
    #[serde(default)]
    pub health: Option<HealthCheck>,
    /// Which machines it is for, such as `role=web,zone!=b`; empty: all.
    #[serde(default)]
    pub selector: String,
    /// How long a build may take, upload not counted.
    #[serde(default = "build_timeout_default")]
    pub build_timeout_s: u32,
    /// How often a build is started at most; none: as the coordinator is configured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_attempts: Option<u32>,
    /// The piece size, when not the default for the artifact's size.
    #[serde(default)]
    pub piece_size_bytes: Option<u64>,
    /// How many of its newest artifacts are kept beside those in use; none: as the coordinator is configured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_builds: Option<u32>,
    /// How its rollouts go.
    #[serde(default)]
    pub plan: RolloutPlan,
    /// Higher fetches first where apps compete.
    #[serde(default)]
    pub priority: u8,
}

fn activation_none() -> Activation {
    Activation::None
}

fn build_timeout_default() -> u32 {
    1_200
}

/// Asks for a build. Where a job waits or runs for the same commit of the app, it is that job that is answered.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BuildRequest {
    /// The app.
    pub app: AppName,
    /// The commit.
    pub commit: CommitSha,
    /// How urgent it is; a job that is joined is raised to it.
    #[serde(default)]
    pub priority: Priority,
}

impl BuildRequest {
    /// An ordinary build.
    #[must_use]
    pub fn new(app: AppName, commit: CommitSha) -> Self {
        Self { app, commit, priority: Priority::default() }
    }
}

/// A build job.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Job {
    /// Its number.
    pub id: i64,
    /// The app.
    pub app: AppName,
    /// The commit.
    pub commit: CommitSha,
    /// The name that its artifact has or will have: `APP/SHA12-JOB`.
    pub name: String,
    /// Its state.
    pub status: JobStatus,
    /// How often it was started.
    pub attempt: u32,
    /// How often it may be.
    pub max_attempts: u32,
    /// Which jobs are taken first.
    #[serde(default)]
    pub priority: Priority,
    /// When it was asked for: its place within its priority.
    pub created_at_ms: i64,
    /// While it waits for its next attempt: until when.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eligible_at_ms: Option<i64>,
    /// When its present or last attempt began.
    pub started_at_ms: Option<i64>,
    /// When it ended.
    pub finished_at_ms: Option<i64>,
    /// The worker of its present or last attempt.
    pub worker: Option<String>,
    /// Why it ended as it did.
    pub reason: Option<String>,
    /// What it made.
    pub artifact: Option<ArtifactId>,
    /// Whether an operator wants it stopped.
    #[serde(default)]
    pub cancel_requested: bool,
    /// Who asked for it first.
    pub requested_by: String,
    /// Whether it was there before this request; only in the answer to a request for a build.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub joined: Option<bool>,
    /// Its attempts, oldest first; only where one job is asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub attempts: Vec<Attempt>,
}

/// One attempt at a job.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Attempt {
    /// Its number, from 1.
    pub attempt: u32,
    /// The worker's name.
    pub worker: String,
    /// Its host.
    #[serde(default)]
    pub host: String,
    /// The worker process's incarnation.
    pub incarnation: String,
    /// When it began.
    pub started_at_ms: i64,
    /// When it ended.
    pub finished_at_ms: Option<i64>,
    /// How it ended: `succeeded`, `failed`, `cancelled`, or `lost` with its worker.
    #[serde(default)]
    pub outcome: Option<String>,
    /// Why it ended.
    pub reason: Option<String>,
    /// The coordinators that have some of its log.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub log_at: Vec<String>,
}
