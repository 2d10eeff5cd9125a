//! What happened, who is told of it, and what starts by itself.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use shoal_proto::{
    AppName, CommitSha, RegionName, Revision,
    state::{JobStatus, Priority, ReplicationStatus, RolloutStatus},
};

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Event {
    /// Its number: later ones are higher, and the stream's `id`.
    pub id: i64,
    /// What happened, such as `build:completed`.
    #[serde(rename = "type")]
    pub kind: String,
    /// When.
    pub at_ms: i64,
    /// To which app.
    pub app: AppName,
    /// The build job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<i64>,
    /// Its attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempt: Option<u32>,
    /// The rollout.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<i64>,
    /// The artifact's name: `APP/SHA12-JOB` for a build, from its start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The commit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<CommitSha>,
    /// The state of the job, the copies or the rollout after it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<String>,
    /// Why it came so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Who asked for the build or the deployment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requested_by: Option<String>,
    /// The worker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<String>,
    /// Where a wave opened.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<RegionName>,
    /// How far it is open there: machines of a rank below this, of 1000, may activate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub open_permille: Option<u16>,
}

/// The body of a message to a webhook.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct WebhookMessage {
    /// What happened, such as `build:completed`; `webhook:test` for a test.
    #[serde(rename = "type")]
    pub kind: String,
    /// When, as RFC 3339 says it.
    pub timestamp: String,
    /// The event; none for a test.
    pub data: Option<Event>,
}

/// Adds a webhook.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WebhookRequest {
    /// Where messages are posted: `https://`.
    pub url: String,
    /// Only events of this app; none: of all.
    #[serde(default)]
    pub app: Option<AppName>,
    /// Only events of these types; empty: of all.
    #[serde(default)]
    pub events: Vec<String>,
    /// What signs the messages: `whsec_` and base64, or a text of 16 bytes at least; none: a new one, which the answer says.
    #[serde(default)]
    pub secret: Option<String>,
}

/// A webhook.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Webhook {
    /// Its number.
    pub id: i64,
    /// Where messages are posted.
    pub url: String,
    /// Only events of this app; none: of all.
    pub app: Option<AppName>,
    /// Only events of these types; empty: of all.
    pub events: Vec<String>,
    /// Since when it is there.
    pub created_at_ms: i64,
    /// Who added it.
    pub created_by: String,
    /// The secret that was made for it: said once, in the answer to the request that added it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<String>,
}

/// A message to a webhook and what became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct WebhookDelivery {
    /// The message's id, the same in every attempt: `webhook-id`.
    pub id: String,
    /// The webhook.
    pub webhook: i64,
    /// The event; none for a test.
    pub event: Option<i64>,
    /// The event's type.
    #[serde(rename = "type")]
    pub kind: String,
    /// PENDING, DELIVERED or GIVEN_UP.
    pub status: String,
    /// Since when it is to be delivered.
    pub created_at_ms: i64,
    /// How often it was tried.
    pub tries: u32,
    /// When it is tried next, while it is pending.
    pub next_try_at_ms: Option<i64>,
    /// When it was tried last.
    pub last_try_at_ms: Option<i64>,
    /// The HTTP status of the last answer.
    pub answer: Option<u16>,
    /// How long the last attempt took.
    pub latency_ms: Option<u64>,
    /// Why the last attempt failed.
    pub reason: Option<String>,
    /// When it ended.
    pub finished_at_ms: Option<i64>,
}

/// Lets pushes to a repository's main branch start builds of an app.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PushRequest {
    /// What pushes are signed with, as GitHub or GitLab was told it.
    pub secret: String,
    /// The branch that is built.
    #[serde(default = "branch_default")]
    pub branch: String,
    /// The repository that pushes name, when it is not the app's own: a mirror is built, say.
    #[serde(default)]
    pub repository: Option<String>,
}

fn branch_default() -> String {
    "main".into()
}

/// Whose pushes start builds of an app.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PushSettings {
    /// The app.
    pub app: AppName,
    /// The branch that is built.
    pub branch: String,
    /// The repository, as pushes are compared with it: `HOST/PATH`.
    pub repository: String,
    /// Since when it is so.
    pub updated_at_ms: i64,
}

/// The answer to a push.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PushReply {
    /// What became of it: `built`, `pong`, or `ignored: ` and why.
    pub message: String,
    /// The builds.
    pub builds: Vec<PushBuild>,
}

/// A build that a push asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PushBuild {
    /// The app.
    pub app: AppName,
    /// The job.
    pub job: i64,
    /// Whether this very push had asked for it before.
    pub again: bool,
}

/// Switches it on or off that the main branch is deployed by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AutoDeploySwitch {
    /// Builds of pushes from now on are deployed.
    On,
    /// None are.
    Off,
    /// They are again, after an operator went back.
    Resume,
}

/// The body of the request that does.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AutoDeployRequest {
    /// What to do.
    pub set: AutoDeploySwitch,
}

/// Whether an app's main branch is deployed by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AutoDeploy {
    /// The app.
    pub app: AppName,
    /// Whether it is switched on.
    pub on: bool,
    /// Only builds after this job.
    pub after_job: Option<i64>,
    /// Why nothing is deployed at present: an operator went back.
    pub suspended: Option<super::Halt>,
}

/// A build and a deployment of it; either may be missing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct HistoryEntry {
    /// The app.
    pub app: AppName,
    /// The commit; none for what was published.
    pub commit: Option<CommitSha>,
    /// The artifact's name; a build has it before its artifact is there.
    pub name: String,
    /// The build; none for what was published, or when its record was forgotten.
    pub build: Option<HistoryBuild>,
    /// The copies; none when there is no artifact.
    pub replication: Option<HistoryReplication>,
    /// The deployment; none when there was none.
    pub rollout: Option<HistoryRollout>,
}

/// A build, in a line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct HistoryBuild {
    /// Its number.
    pub job: i64,
    /// Its state.
    pub status: JobStatus,
    /// How often it was started.
    pub attempts: u32,
    /// How urgent it was.
    pub priority: Priority,
    /// When it was asked for.
    pub created_at_ms: i64,
    /// How long its last attempt took.
    pub seconds: Option<f64>,
    /// Why it ended as it did.
    pub reason: Option<String>,
    /// Who asked for it.
    pub requested_by: String,
}

/// An artifact's copies, in a line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct HistoryReplication {
    /// The state of all.
    pub status: ReplicationStatus,
    /// From the artifact's being there to its last copy.
    pub seconds: Option<f64>,
}

/// A deployment, in a line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct HistoryRollout {
    /// Its number.
    pub id: i64,
    /// Its goal's revision.
    pub revision: Revision,
    /// Its state.
    pub status: RolloutStatus,
    /// Whether it went back.
    pub rollback: bool,
    /// When it began.
    pub created_at_ms: i64,
    /// How long it took.
    pub seconds: Option<f64>,
    /// How many machines it was for.
    pub machines: u64,
    /// How many of them came to run it.
    pub machines_ok: u64,
    /// How many failed.
    pub machines_failed: u64,
    /// Why it ended as it did.
    pub reason: Option<String>,
    /// Who asked for it.
    pub requested_by: String,
}
