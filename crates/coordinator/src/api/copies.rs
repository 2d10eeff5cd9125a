//! Copies for as long as their artifact lives: how far they are, inspections, pins, and what is deleted.

use std::collections::BTreeMap;

use serde::Deserialize;
use shoal_client::types;
use shoal_queue::{Bell, Kept};

use super::{App, Args, Json, Reply, Who, done, limited};
use crate::{error::ApiError, retention, state::now_ms, view};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ReplicationArgs {
    r#ref: Option<String>,
    limit: Option<u32>,
}

pub(super) async fn replication(
    shared: App,
    Args(args): Args<ReplicationArgs>,
) -> Reply<types::ReplicationStatusPage> {
    let queue = &shared.queue;
    let regions = queue.regions().await?;
    let artifacts = match &args.r#ref {
        Some(reference) => vec![queue.artifact(reference, None).await?],
        None => queue.artifacts_not_whole(limited(args.limit)).await?,
    };
    let mut summary: BTreeMap<_, types::RegionReplication> = BTreeMap::new();
    for region in &regions {
        let observed = shared.config.is_observed(&region.name);
        let of = types::RegionReplication {
            drained: region.drained,
            observed,
            ..types::RegionReplication::default()
        };
        summary.insert(region.name.clone(), of);
    }
    for count in queue.copies_by_region().await? {
        if let Some(region) = summary.get_mut(&count.region) {
            *region.copies.entry(count.status).or_default() += count.copies;
            region.bytes_left += count.bytes_left;
            region.bytes_per_s += count.bytes_per_s;
        }
    }
    for region in summary.values_mut() {
        region.eta_s = view::eta_s(region.bytes_left, region.bytes_per_s);
    }
    let artifacts = artifacts.into_iter().map(|artifact| view::artifact(artifact, &regions));
    Ok(axum::Json(types::ReplicationStatusPage {
        regions: summary,
        artifacts: artifacts.collect(),
    }))
}

pub(super) async fn inspect(
    shared: App,
    Who(_, actor): Who,
    Json(request): Json<types::ArtifactRef>,
) -> Reply<serde_json::Value> {
    let artifact = shared.queue.artifact(&request.artifact, None).await?;
    let stored = &artifact.stored;
    if !shared.queue.inspect_soon(&stored.artifact, &stored.encoding).await? {
        let why = artifact.deleted.map_or("nothing of it is there".into(), |d| d.to_string());
        return Err(ApiError::conflict(format!("{} cannot be inspected: {why}", artifact.name)));
    }
    tracing::info!(name = artifact.name, by = actor.name, "an inspection was asked for");
    shared.ring(Bell::Upkeep);
    Ok(done())
}

fn pin_view(pin: shoal_queue::Pin) -> types::Pin {
    types::Pin { artifact: pin.name, reason: pin.reason, by: pin.by, at_ms: pin.at_ms }
}

pub(super) async fn pins(shared: App) -> Reply<Vec<types::Pin>> {
    let pins = shared.queue.pins(super::LIST_MAX).await?;
    Ok(axum::Json(pins.into_iter().map(pin_view).collect()))
}

pub(super) async fn pin(
    shared: App,
    Who(_, actor): Who,
    Json(request): Json<types::PinRequest>,
) -> Reply<types::Pin> {
    let artifact = shared.queue.artifact(&request.artifact, None).await?;
    let (reason, now) = (request.reason, now_ms());
    shared.queue.pin(&artifact.name, reason.as_deref(), &actor, now).await?;
    Ok(axum::Json(types::Pin { artifact: artifact.name, reason, by: actor.name, at_ms: now }))
}

pub(super) async fn unpin(
    shared: App,
    Who(_, actor): Who,
    Json(request): Json<types::ArtifactRef>,
) -> Reply<serde_json::Value> {
    let artifact = shared.queue.artifact(&request.artifact, None).await?;
    shared.queue.unpin(&artifact.name, &actor, now_ms()).await?;
    Ok(done())
}

fn kept(it: Kept) -> types::KeptArtifact {
    types::KeptArtifact {
        name: it.name,
        artifact: it.artifact,
        encoded_bytes: it.encoded_bytes,
        created_at_ms: it.created_at_ms,
        why: it.why,
    }
}

pub(super) async fn gc(
    shared: App,
    Who(_, actor): Who,
    Json(request): Json<types::GcRequest>,
) -> Reply<types::GcReport> {
    let really = (!request.dry_run).then_some(&actor);
    let plans = retention::look(&shared, (request.app.as_ref(), request.keep), really).await?;
    if plans.is_empty() {
        return Err(ApiError::conflict(
            "no limit is set, so everything stays: give --keep, set keep_builds of an app \
             (shoal app set APP --keep-builds K), or keep_builds in the coordinator's configuration",
        ));
    }
    let freed_bytes = plans.values().map(|(_, plan)| plan.freed_bytes).sum();
    let apps = plans.into_iter().map(|(app, (keep, plan))| {
        let report = types::GcApp {
            keep,
            goes: plan.goes.into_iter().map(kept).collect(),
            stays: plan.stays.into_iter().map(kept).collect(),
            freed_bytes: plan.freed_bytes,
        };
        (app, report)
    });
    Ok(axum::Json(types::GcReport { dry_run: request.dry_run, apps: apps.collect(), freed_bytes }))
}
