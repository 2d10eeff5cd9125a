//! History: what was built, copied and deployed, a row each.

use std::collections::BTreeMap;

use shoal_client::types;
use shoal_proto::RegionName;
use shoal_queue::{self as queue, HistoryRow, Region};

use super::{App, Args, Reply, Who, deploy::with_progress, jobs::ListArgs, pages::Paging};
use crate::{error::ApiResult, state::Shared, view};

fn between_s(from_ms: Option<i64>, to_ms: Option<i64>) -> Option<f64> {
    Some(to_ms?.saturating_sub(from_ms?).max(0) as f64 / 1_000.0)
}

fn build(job: queue::Job) -> types::HistoryBuild {
    types::HistoryBuild {
        job: job.id,
        status: job.status,
        attempts: job.attempt,
        priority: job.priority,
        created_at_ms: job.created_at_ms,
        seconds: between_s(job.started_at_ms, job.finished_at_ms),
        reason: job.reason,
        requested_by: job.requested_by,
    }
}

fn replication(artifact: queue::Artifact, regions: &[Region]) -> types::HistoryReplication {
    let created_ms = artifact.created_at_ms;
    let copies: BTreeMap<RegionName, Option<i64>> = artifact
        .copies
        .iter()
        .map(|(region, copy)| (region.clone(), copy.finished_at_ms))
        .collect();
    let status = view::artifact(artifact, regions).replication_status;
    let is_whole = status == shoal_proto::state::ReplicationStatus::Complete;
    let last_ms = copies.values().flatten().max().copied();
    let seconds = between_s(Some(created_ms), last_ms.filter(|_| is_whole));
    types::HistoryReplication { status, seconds }
}

async fn rollout(shared: &Shared, rollout: queue::Rollout) -> ApiResult<types::HistoryRollout> {
    let rollout = with_progress(shared, rollout).await?;
    let of = |wanted: fn(shoal_proto::state::MachineState) -> bool| {
        let states = rollout.regions.values().flat_map(|region| &region.states);
        states.filter(|(state, _)| wanted(**state)).map(|(_, count)| count).sum()
    };
    Ok(types::HistoryRollout {
        id: rollout.id,
        revision: rollout.revision,
        status: rollout.status,
        rollback: rollout.rollback,
        created_at_ms: rollout.created_at_ms,
        seconds: between_s(Some(rollout.created_at_ms), rollout.finished_at_ms),
        machines: rollout.regions.values().map(|region| region.machines).sum(),
        machines_ok: of(|state| state.is_success()),
        machines_failed: of(|state| state.is_failure()),
        reason: rollout.reason.clone(),
        requested_by: rollout.requested_by.clone(),
    })
}

async fn entry(
    shared: &Shared,
    row: HistoryRow,
    regions: &[Region],
) -> ApiResult<Option<types::HistoryEntry>> {
    let artifact = row.artifact.as_ref();
    let app = match (&row.job, &row.rollout) {
        (Some(job), _) => job.app.clone(),
        (None, Some(rollout)) => rollout.app.clone(),
        (None, None) => return Ok(None),
    };
    let name = match (&row.rollout, &row.job) {
        (Some(rollout), _) => rollout.artifact_name.clone(),
        (None, Some(job)) => job.name.clone(),
        (None, None) => return Ok(None),
    };
    let commit = row.job.as_ref().map(|job| job.commit.clone());
    let commit = commit.or_else(|| artifact?.origin.commit.clone());
    let deployed = match row.rollout {
        Some(of) => Some(rollout(shared, of).await?),
        None => None,
    };
    Ok(Some(types::HistoryEntry {
        app,
        commit,
        name,
        build: row.job.map(build),
        replication: row.artifact.map(|artifact| replication(artifact, regions)),
        rollout: deployed,
    }))
}

pub(super) async fn list(
    shared: App,
    Who(by, _): Who,
    Args(args): Args<ListArgs>,
) -> Reply<types::Page<types::HistoryEntry>> {
    let paging = Paging::of("history", args.limit, args.cursor.as_deref())?;
    let apps = by.apps(args.app.as_ref())?;
    if let Some(app) = &args.app {
        shared.queue.app(app).await?;
    }
    let rows = shared.queue.history(apps.as_ref(), paging.after, paging.wanted()).await?;
    let regions = shared.queue.regions().await?;
    let page = paging.page(rows, HistoryRow::place, |row| row).0;
    let mut items = Vec::with_capacity(page.items.len());
    for row in page.items {
        items.extend(entry(&shared, row, &regions).await?);
    }
    Ok(axum::Json(types::Page { items, next_cursor: page.next_cursor }))
}
