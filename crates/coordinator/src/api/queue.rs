//! The queue and the workers, as operators see them.

use shoal_client::types;
use shoal_proto::MachineName;
use shoal_queue::{Actor, Bell, QueueError, REASON_MAX_BYTES};

use super::{App, Args, Json, PageArgs, Place, Reply, Who, pages::Paging};
use crate::{
    error::{ApiError, ApiResult},
    state::{Shared, now_ms},
    view,
};

/// The reason of a request; none when it says nothing.
pub(super) fn reason(request: types::HaltRequest) -> ApiResult<Option<String>> {
    let reason = request.reason.map(|reason| reason.trim().to_string());
    let reason = reason.filter(|reason| !reason.is_empty());
    if reason.as_ref().is_some_and(|reason| reason.len() > REASON_MAX_BYTES) {
        return Err(ApiError::invalid(format!(
            "the reason is longer than {REASON_MAX_BYTES} bytes"
        )));
    }
    Ok(reason)
}

pub(super) async fn status(shared: App) -> Reply<types::QueueStatus> {
    Ok(axum::Json(view::queue_status(&shared).await?))
}

pub(super) async fn pause(
    shared: App,
    Who(_, actor): Who,
    Json(request): Json<types::HaltRequest>,
) -> Reply<types::QueueStatus> {
    let reason = reason(request)?;
    shared.queue.pause(reason.as_deref(), &actor, now_ms()).await?;
    tracing::info!(by = actor.name, reason, "queue paused");
    status(shared).await
}

pub(super) async fn resume(shared: App, Who(_, actor): Who) -> Reply<types::QueueStatus> {
    shared.queue.resume(&actor, now_ms()).await?;
    tracing::info!(by = actor.name, "queue resumed");
    shared.ring(Bell::Jobs);
    status(shared).await
}

pub(super) async fn workers(
    shared: App,
    Args(args): Args<PageArgs>,
) -> Reply<types::Page<types::Worker>> {
    let paging = Paging::<String>::of("workers", args.limit, args.cursor.as_deref())?;
    // As many as there are certificates for: hundreds.
    let mut workers = shared.queue.workers().await?;
    workers.sort_by(|a, b| a.name.cmp(&b.name));
    workers.retain(|worker| paging.after.as_ref().is_none_or(|after| worker.name > *after));
    Ok(paging.page(workers, |worker| worker.name.clone(), view::worker))
}

async fn set(
    shared: &Shared,
    name: &MachineName,
    drained: bool,
    reason: Option<&str>,
    actor: &Actor,
) -> Reply<types::Worker> {
    shared.queue.drain_worker(name.as_str(), drained, reason, actor, now_ms()).await?;
    tracing::info!(worker = %name, drained, by = actor.name, reason, "worker set");
    let mut workers = shared.queue.workers().await?.into_iter();
    let found = workers.find(|worker| worker.name == name.as_str());
    // It was there a moment ago.
    let found = found.ok_or_else(|| QueueError::NotFound(format!("no worker '{name}'")))?;
    Ok(axum::Json(view::worker(found)))
}

pub(super) async fn drain(
    shared: App,
    Who(_, actor): Who,
    Place(name): Place<MachineName>,
    Json(request): Json<types::HaltRequest>,
) -> Reply<types::Worker> {
    set(&shared, &name, true, reason(request)?.as_deref(), &actor).await
}

pub(super) async fn undrain(
    shared: App,
    Who(_, actor): Who,
    Place(name): Place<MachineName>,
) -> Reply<types::Worker> {
    let worker = set(&shared, &name, false, None, &actor).await?;
    shared.ring(Bell::Jobs);
    Ok(worker)
}
