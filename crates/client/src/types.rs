//! The JSON of the HTTP API. Times are milliseconds since the Unix epoch (`…_ms`) or seconds (`…_s`).

mod access;
mod copies;
mod events;
mod trust;

use std::collections::BTreeMap;

pub use access::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use shoal_proto::{
    AppName, ArtifactId, CommitSha, EncodingId, MachineName, NodeId, RegionName, Revision,
    goal::{Activation, HealthCheck, Labels, RolloutPlan},
    region::MachineReport,
    state::{JobStatus, MachineState, Priority, ReplicationStatus, RolloutStatus, WorkerState},
};

pub use copies::*;
pub use events::*;
pub use trust::*;

/// The body of every answer that is not 2xx.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ErrorDetail,
}

/// What went wrong, for programs and for people.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct ErrorDetail {
    /// A fixed word, such as `not_found`, `invalid`, `conflict`, `lease_lost`, `forbidden`.
    pub code: String,
    /// One line that says what to do.
    pub message: String,
}

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
