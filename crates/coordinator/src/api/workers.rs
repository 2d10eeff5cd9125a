//! A worker's calls: take a job, keep it, log, end it.

use axum::{extract::Request, http::StatusCode};
use schemars::JsonSchema;
use serde::Deserialize;
use shoal_client::types::{self, Outcome};
use shoal_proto::{MachineName, state::JobStatus};
use shoal_queue::{Bell, Claimant, End, Lease};

use super::{
    App, Args, BODY_TIMEOUT, JSON_MAX_BYTES, Json, Maybe, Peer, Place, Reply, apps, done, whole,
};
use crate::{
    error::{ApiError, ApiResult},
    removal,
    state::{Shared, WORKER_GONE, bell, ms, now_ms, random_token},
    uploads, view,
};

/// The longest host name or incarnation that is kept, in bytes.
const NAME_MAX_BYTES: usize = 255;

fn lease(lease: types::LeaseRef) -> Lease {
    Lease { attempt: lease.attempt, token: lease.lease }
}

pub(super) async fn claim(
    shared: App,
    Peer(member): Peer,
    Json(request): Json<types::ClaimRequest>,
) -> ApiResult<Maybe<types::ClaimedJob>> {
    if request.host.len() > NAME_MAX_BYTES || request.incarnation.len() > NAME_MAX_BYTES {
        return Err(ApiError::invalid(format!("a name is longer than {NAME_MAX_BYTES} bytes")));
    }
    let claimant = Claimant {
        worker: member.machine.to_string(),
        host: request.host,
        incarnation: request.incarnation,
    };
    note(&shared, &member.machine, &claimant).await?;
    let poll = shared.long_poll(request.wait_s);
    let (job, token) = loop {
        let bell = bell(&shared.job_waits);
        let token = random_token().map_err(|error| ApiError::internal(error.to_string()))?;
        if let Some(job) = shared.queue.claim(&claimant, &token, now_ms()).await? {
            break (job, token);
        }
        if !poll.wait(bell).await {
            return Ok(Maybe(None));
        }
    };
    shared.metrics.job_transitions.with_label_values(&[JobStatus::Running.as_str()]).inc();
    shared.ring(Bell::Events);
    tracing::info!(job = job.id, attempt = job.attempt, worker = claimant.worker, "job started");
    let app = apps::get(&shared, &job.app).await?;
    let claimed = types::ClaimedJob {
        job: view::job(job, Vec::new()),
        app,
        lease: token,
        heartbeat_s: shared.config.heartbeat_s,
        bucket: shared.main.url().into(),
    };
    Ok(Maybe(Some(claimed)))
}

/// Notes that a worker's process asks for jobs. What an earlier process of its name held is given on.
async fn note(shared: &Shared, worker: &MachineName, claimant: &Claimant) -> ApiResult<()> {
    if !shared.is_worker_due(worker, Some(&claimant.incarnation)) {
        return Ok(());
    }
    let now_ms = now_ms();
    let silent_before_ms = now_ms - ms(WORKER_GONE);
    let (queue, backoff) = (&shared.queue, shared.backoff());
    for (job, status) in queue.worker_seen(claimant, silent_before_ms, backoff, now_ms).await? {
        shared.metrics.jobs_lost.inc();
        shared.metrics.job_transitions.with_label_values(&[status.as_str()]).inc();
        if status == JobStatus::Queued {
            shared.ring(Bell::Jobs);
        }
        tracing::warn!(job, %status, worker = %worker, "a worker was restarted: its job is given on");
    }
    shared.worker_written(worker, Some(&claimant.incarnation));
    Ok(())
}

pub(super) async fn heartbeat(
    shared: App,
    Place(job): Place<i64>,
    Json(held): Json<types::LeaseRef>,
) -> Reply<types::HeartbeatReply> {
    let cancel = shared.queue.heartbeat(job, &lease(held), now_ms()).await?;
    Ok(axum::Json(types::HeartbeatReply { cancel }))
}

pub(super) async fn watch(
    shared: App,
    Peer(member): Peer,
    Place(job): Place<i64>,
    Json(request): Json<types::WatchRequest>,
) -> Reply<types::HeartbeatReply> {
    let lease = lease(request.lease);
    let poll = shared.long_poll(request.wait_s);
    let mut first = true;
    loop {
        let bell = bell(&shared.cancels);
        let cancel = shared.queue.check_lease(job, &lease).await?;
        // A worker with its hands full asks for no jobs; this is how it is heard of.
        if first && shared.is_worker_due(&member.machine, None) {
            shared.queue.worker_heard(job, now_ms()).await?;
            shared.worker_written(&member.machine, None);
        }
        first = false;
        if cancel || !poll.wait(bell).await {
            return Ok(axum::Json(types::HeartbeatReply { cancel }));
        }
    }
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct LogArgs {
    /// The attempt.
    attempt: u32,
    /// Its lease.
    lease: String,
    /// At which byte of the log the body begins.
    offset: u64,
}

pub(super) async fn log(
    shared: App,
    Place(job): Place<i64>,
    Args(args): Args<LogArgs>,
    request: Request,
) -> Reply<types::Done> {
    let content = whole(request.into_body(), JSON_MAX_BYTES, BODY_TIMEOUT).await?;
    let lease = Lease { attempt: args.attempt, token: args.lease };
    shared.queue.check_lease(job, &lease).await?;
    let logs = shared.logs.clone();
    // Written down before the first of it is here: others say where to look.
    if !logs.has(job, args.attempt) {
        shared.queue.note_log(job, args.attempt, shared.machine().as_str()).await?;
    }
    let append = move || logs.append(job, args.attempt, args.offset, &content);
    let written = tokio::task::spawn_blocking(append).await;
    let written = written.map_err(|error| ApiError::internal(error.to_string()))?;
    written.map_err(|error| {
        tracing::warn!(job, %error, "a job's log cannot be written");
        let text = format!("the log cannot be written: {error}");
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", text)
    })?;
    Ok(done())
}

pub(super) async fn finish(
    shared: App,
    Place(job): Place<i64>,
    Json(request): Json<types::FinishRequest>,
) -> Reply<types::Job> {
    let lease = lease(request.lease);
    let mut seen = None;
    let end = match request.outcome {
        // Believed only when it is there: the index is the last object of an upload.
        Outcome::Succeeded { artifact, encoding } => {
            let there = async {
                seen = Some(removal::generation(&shared, &artifact, &encoding).await?);
                uploads::stored(&shared.main, &artifact, &encoding).await
            };
            match there.await {
                Ok(stored) => End::Succeeded(stored),
                Err(error) => {
                    // Who lost the job hears that first: there is nothing to upload again.
                    shared.queue.check_lease(job, &lease).await?;
                    return Err(error);
                }
            }
        }
        Outcome::Failed { reason, retry } => {
            End::Failed { reason, retry: retry.then(|| shared.backoff()) }
        }
        Outcome::Cancelled => End::Cancelled,
    };
    let regions = shared.region_names();
    let end = (&end, seen);
    let job = shared.queue.finish_seen(job, &lease, end, &regions, now_ms()).await?;
    shared.metrics.job_transitions.with_label_values(&[job.status.as_str()]).inc();
    match job.status {
        JobStatus::Succeeded => shared.ring(Bell::Copies),
        JobStatus::Queued => shared.ring(Bell::Jobs),
        _ => shared.ring(Bell::Events),
    }
    let reason = job.reason.as_deref().unwrap_or_default();
    tracing::info!(job = job.id, attempt = lease.attempt, status = %job.status, reason, "attempt ended");
    Ok(axum::Json(view::job(job, Vec::new())))
}
