//! Deleting artifacts that nothing needs any more, as configured: of each app but the last so many, and those in use.

use std::{collections::BTreeMap, sync::Arc};

use shoal_client::types;
use shoal_proto::AppName;
use shoal_queue::{Actor, Bell, Plan, QueueError};
use tokio_util::sync::CancellationToken;

use crate::state::{Shared, myself, now_ms, seconds};

/// How many of an app's artifacts stay: as asked, else as the app says, else as the coordinator is configured; none: all.
fn keep(shared: &Shared, spec: &str, asked: Option<u32>) -> Result<Option<u32>, QueueError> {
    let app: types::App =
        serde_json::from_str(spec).map_err(|error| QueueError::Corrupt(error.to_string()))?;
    Ok(asked.or(app.keep_builds).or(shared.config.keep_builds))
}

/// What stays and what goes of each app that has a limit, or of one; with `really`, goes.
pub(crate) async fn look(
    shared: &Shared,
    (app, asked): (Option<&AppName>, Option<u32>),
    really: Option<&Actor>,
) -> Result<BTreeMap<AppName, (u32, Plan)>, QueueError> {
    let apps = match app {
        Some(app) => vec![shared.queue.app(app).await?],
        None => shared.queue.apps().await?,
    };
    let mut plans = BTreeMap::new();
    for row in apps {
        let Some(last) = keep(shared, &row.spec, asked)? else { continue };
        let plan = match really {
            None => shared.queue.retention_plan(&row.name, last).await?,
            Some(actor) => shared.queue.retain(&row.name, last, actor, now_ms()).await?,
        };
        if really.is_some() && !plan.goes.is_empty() {
            shared.metrics.deleted_artifacts.inc_by(plan.goes.len() as u64);
            tracing::info!(app = %row.name, artifacts = plan.goes.len(), bytes = plan.freed_bytes, "artifacts were deleted");
            shared.ring(Bell::Upkeep);
        }
        plans.insert(row.name, (last, plan));
    }
    Ok(plans)
}

/// Deletes until it is stopped.
pub(crate) async fn run(shared: Arc<Shared>, stop: CancellationToken) {
    let interval = seconds(shared.config.retention_interval_s);
    loop {
        // Never at the start: an operator may have come to change the limit.
        tokio::select! {
            () = tokio::time::sleep(interval) => {}
            () = stop.cancelled() => return,
        }
        if let Err(error) = look(&shared, (None, None), Some(&myself())).await {
            tracing::warn!(%error, "cannot delete what nothing needs");
            shared.metrics.task_failures.with_label_values(&["retention"]).inc();
        }
    }
}
