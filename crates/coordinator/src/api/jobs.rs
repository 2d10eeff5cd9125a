//! Build jobs, as operators see them.

use schemars::JsonSchema;
use serde::Deserialize;
use shoal_client::types;
use shoal_proto::{
    AppName, CommitSha,
    state::{JobStatus, Priority},
};
use shoal_queue::{Actor, Ask, Bell, Submitted};

use super::{App, Args, Json, Place, Raw, Reply, Who, apps, pages::Paging};
use crate::{
    error::{ApiError, ApiResult},
    state::{Shared, now_ms},
    view,
};

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ListArgs {
    /// Only of this app.
    pub(super) app: Option<AppName>,
    /// How many rows at most, 1 to 1000; 100 when nothing is said.
    #[schemars(range(min = 1, max = 1000))]
    pub(super) limit: Option<u32>,
    /// The `next_cursor` of the page before.
    pub(super) cursor: Option<String>,
}

/// A build of an app, as it is asked for.
pub(super) async fn ask(
    shared: &Shared,
    app: &AppName,
    commit: &CommitSha,
    priority: Priority,
) -> ApiResult<Ask> {
    let app = apps::get(shared, app).await?;
    if app.repository.trim().is_empty() {
        return Err(ApiError::conflict(format!(
            "{0} has no repository to build from: set one with shoal app set {0}, or publish a file with \
             shoal publish",
            app.name
        )));
    }
    Ok(Ask {
        app: app.name,
        commit: commit.clone(),
        priority,
        max_attempts: app.max_attempts.unwrap_or(shared.config.max_attempts),
    })
}

/// Says that a build was asked for.
pub(super) fn submitted(shared: &Shared, submitted: &Submitted, actor: &Actor) {
    let job = &submitted.job;
    if submitted.joined {
        tracing::info!(job = job.id, priority = %job.priority, by = actor.name, "job joined");
    } else {
        shared.metrics.job_transitions.with_label_values(&[JobStatus::Queued.as_str()]).inc();
        shared.ring(Bell::Jobs);
        tracing::info!(job = job.id, name = job.name, by = actor.name, "job queued");
    }
}

pub(super) async fn submit(
    shared: App,
    Who(by, actor): Who,
    Json(request): Json<types::BuildRequest>,
) -> Reply<types::Job> {
    by.may(&request.app)?;
    let ask = ask(&shared, &request.app, &request.commit, request.priority).await?;
    let asked = shared.queue.submit(&ask, &actor, now_ms()).await?;
    submitted(&shared, &asked, &actor);
    let joined = Some(asked.joined);
    Ok(axum::Json(types::Job { joined, ..view::job(asked.job, Vec::new()) }))
}

pub(super) async fn list(
    shared: App,
    Who(by, _): Who,
    Args(args): Args<ListArgs>,
) -> Reply<types::Page<types::Job>> {
    let paging = Paging::of("jobs", args.limit, args.cursor.as_deref())?;
    let apps = by.apps(args.app.as_ref())?;
    if let Some(app) = &args.app {
        shared.queue.app(app).await?;
    }
    let jobs = shared.queue.jobs_page(apps.as_ref(), paging.after, paging.wanted()).await?;
    Ok(paging.page(jobs, |job| (job.created_at_ms, job.id), |job| view::job(job, Vec::new())))
}

pub(super) async fn one(shared: App, Who(by, _): Who, Place(job): Place<i64>) -> Reply<types::Job> {
    let found = shared.queue.job(job).await?;
    by.may(&found.app)?;
    let attempts = shared.queue.attempts(job).await?;
    Ok(axum::Json(view::job(found, attempts)))
}

pub(super) async fn cancel(
    shared: App,
    Who(by, actor): Who,
    Place(job): Place<i64>,
) -> Reply<types::Job> {
    by.may(&shared.queue.job(job).await?.app)?;
    let job = shared.queue.cancel(job, &actor, now_ms()).await?;
    if job.status == JobStatus::Cancelled {
        shared.ring(Bell::Events);
        shared.metrics.job_transitions.with_label_values(&[job.status.as_str()]).inc();
    } else {
        shared.ring(Bell::Cancels);
    }
    tracing::info!(job = job.id, by = actor.name, status = %job.status, "job cancelled");
    Ok(axum::Json(view::job(job, Vec::new())))
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct LogArgs {
    /// From which byte on.
    #[serde(default)]
    offset: u64,
}

pub(super) async fn log(
    shared: App,
    Who(by, _): Who,
    Place(job): Place<i64>,
    Args(args): Args<LogArgs>,
) -> ApiResult<Raw> {
    let job = shared.queue.job(job).await?;
    by.may(&job.app)?;
    let logs = shared.logs.clone();
    let read =
        tokio::task::spawn_blocking(move || logs.read(job.id, job.attempt, args.offset)).await;
    let content = read.map_err(|error| ApiError::internal(error.to_string()))?;
    content.map(Raw).map_err(|error| ApiError::internal(format!("the log cannot be read: {error}")))
}
