//! Goals, rollouts and their state.

use schemars::JsonSchema;
use serde::Deserialize;
use shoal_client::types;
use shoal_proto::{AppName, ArtifactId, state::RolloutStatus};
use shoal_queue::{Actor, AppRow, Bell, Choice, QueueError, Rollout};

use super::{App, Args, Json, Place, Reply, Who, access::Principal, pages::Paging};
use crate::{
    error::ApiResult,
    goals,
    state::{Shared, now_ms},
    view,
};

/// A rollout with what its machines have reported: the newest one of an app as it is now, an older one as it
/// was when it ended.
pub(super) async fn with_progress(shared: &Shared, rollout: Rollout) -> ApiResult<types::Rollout> {
    if let Some(summary) = rollout.summary.as_ref().filter(|_| !rollout.newest) {
        let summary = summary.clone();
        return Ok(view::rollout(rollout, &summary));
    }
    let progress = shared.counted.progress(&shared.queue, &rollout).await?;
    Ok(view::rollout(rollout, &progress))
}

async fn set(
    shared: &Shared,
    app: AppName,
    reference: Option<String>,
    rollback: bool,
    (by, actor): (&Principal, &Actor),
) -> Reply<types::Rollout> {
    by.may(&app)?;
    let choice = match reference {
        // Which of those with these bytes is meant is looked up; whether a name is there, the goal's own transaction sees.
        Some(reference) if reference.parse::<ArtifactId>().is_ok() => {
            shared.queue.app(&app).await?;
            Choice::Named(shared.queue.artifact(&reference, Some(&app)).await?.name)
        }
        Some(name) => Choice::Named(name),
        None => Choice::Previous,
    };
    let rollout = match goals::set(shared, &app, &choice, rollback, actor).await {
        Err(QueueError::NotDeployable { name, reason }) => {
            // A region that came after the artifact gets its copy now.
            if shared.queue.want_everywhere(&name, now_ms()).await? > 0 {
                shared.ring(Bell::Copies);
            }
            return Err(QueueError::NotDeployable { name, reason }.into());
        }
        other => other?,
    };
    let progress = shoal_queue::Progress::new();
    Ok(axum::Json(view::rollout(rollout, &progress)))
}

pub(super) async fn deploy(
    shared: App,
    Who(by, actor): Who,
    Json(request): Json<types::DeployRequest>,
) -> Reply<types::Rollout> {
    set(&shared, request.app, Some(request.artifact), false, (&by, &actor)).await
}

pub(super) async fn rollback(
    shared: App,
    Who(by, actor): Who,
    Json(request): Json<types::RollbackRequest>,
) -> Reply<types::Rollout> {
    set(&shared, request.app, request.artifact, true, (&by, &actor)).await
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct StatusArgs {
    /// Only this app.
    app: Option<AppName>,
    /// How many rows at most, 1 to 1000; 100 when nothing is said.
    #[schemars(range(min = 1, max = 1000))]
    limit: Option<u32>,
    /// The `next_cursor` of the page before.
    cursor: Option<String>,
}

pub(super) async fn status(
    shared: App,
    Who(by, _): Who,
    Args(args): Args<StatusArgs>,
) -> Reply<types::Page<types::AppStatus>> {
    let paging = Paging::<String>::of("status", args.limit, args.cursor.as_deref())?;
    let apps = by.apps(args.app.as_ref())?;
    let after = paging.after.as_deref().unwrap_or_default();
    let rows: Vec<AppRow> = match &args.app {
        Some(app) => {
            let row = shared.queue.app(app).await?;
            Vec::from_iter((row.name.as_str() > after).then_some(row))
        }
        None => shared.queue.apps_page(apps.as_ref(), after, paging.wanted()).await?,
    };
    let mut rollouts = match &args.app {
        Some(app) => shared.queue.newest_rollout(app).await?.into_iter().collect(),
        None => shared.queue.newest_rollouts().await?,
    };
    let mut list = Vec::with_capacity(rows.len());
    for row in rows {
        let at = rollouts.iter().position(|rollout| rollout.app == row.name);
        let rollout = match at {
            Some(at) => Some(with_progress(&shared, rollouts.swap_remove(at)).await?),
            None => None,
        };
        list.push(types::AppStatus { app: row.name, rollout });
    }
    Ok(paging.page(list, |status| status.app.to_string(), |status| status))
}

pub(super) async fn rollout(
    shared: App,
    Who(by, _): Who,
    Place(id): Place<i64>,
) -> Reply<types::Rollout> {
    let rollout = shared.queue.rollout(id).await?;
    by.may(&rollout.app)?;
    with_progress(&shared, rollout).await.map(axum::Json)
}

async fn set_paused(
    shared: &Shared,
    id: i64,
    pause: bool,
    (by, actor): (&Principal, &Actor),
) -> Reply<types::Rollout> {
    by.may(&shared.queue.rollout(id).await?.app)?;
    let (rollout, changed) = shared.queue.pause_rollout(id, pause, actor, now_ms()).await?;
    if changed {
        shared.ring(Bell::Goals);
        shared.ring(Bell::Rollouts);
        shared.ring(Bell::Events);
        tracing::info!(rollout = id, by = actor.name, status = %rollout.status, "rollout paused or resumed");
    }
    with_progress(shared, rollout).await.map(axum::Json)
}

pub(super) async fn pause(
    shared: App,
    Who(by, actor): Who,
    Place(id): Place<i64>,
) -> Reply<types::Rollout> {
    set_paused(&shared, id, true, (&by, &actor)).await
}

pub(super) async fn resume(
    shared: App,
    Who(by, actor): Who,
    Place(id): Place<i64>,
) -> Reply<types::Rollout> {
    set_paused(&shared, id, false, (&by, &actor)).await
}

pub(super) async fn cancel(
    shared: App,
    Who(by, actor): Who,
    Place(id): Place<i64>,
) -> Reply<types::Rollout> {
    let rollout = shared.queue.rollout(id).await?;
    by.may(&rollout.app)?;
    let progress = shared.queue.progress(&rollout.app, rollout.revision).await?;
    let (status, reason) = (RolloutStatus::Cancelled, format!("cancelled by {}", actor.name));
    let (queue, now) = (&shared.queue, now_ms());
    let (rollout, ended) = queue.end_rollout(id, status, &reason, &progress, &actor, now).await?;
    if ended {
        shared.metrics.rollouts_ended.with_label_values(&[status.as_str()]).inc();
        shared.ring(Bell::Goals);
        tracing::info!(rollout = id, by = actor.name, "rollout cancelled");
    } else if rollout.status != status {
        let text = format!("rollout {id} has ended already: it is {}", rollout.status);
        return Err(QueueError::Conflict(text).into());
    }
    with_progress(&shared, rollout).await.map(axum::Json)
}
