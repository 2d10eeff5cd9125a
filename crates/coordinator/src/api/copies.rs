//! Copies for as long as their artifact lives: how far they are, inspections, pins, and what is deleted.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;
use shoal_client::types;
use shoal_proto::AppName;
use shoal_queue::{Artifact, Bell, Kept};

use super::{
    App, Args, Json, PageArgs, Reply, Who,
    access::Principal,
    done,
    pages::{LIMIT_MAX, Paging},
};
use crate::{
    error::{ApiError, ApiResult},
    retention,
    state::{Shared, now_ms},
    view,
};

/// The most pins that are listed.
const PINS_MAX: u32 = 10_000;

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ReplicationArgs {
    /// Only this artifact, by its name or id; without it, all that are not whole in some bucket.
    r#ref: Option<String>,
    /// How many artifacts at most, 1 to 1000; 100 when nothing is said.
    #[schemars(range(min = 1, max = 1000))]
    limit: Option<u32>,
}

pub(super) async fn replication(
    shared: App,
    Who(by, _): Who,
    Args(args): Args<ReplicationArgs>,
) -> Reply<types::ReplicationStatusPage> {
    let queue = &shared.queue;
    let limit = args.limit.unwrap_or(100);
    if !(1..=LIMIT_MAX).contains(&limit) {
        return Err(ApiError::invalid(format!("limit must be 1 to {LIMIT_MAX}")));
    }
    let regions = queue.regions().await?;
    let mut artifacts = match &args.r#ref {
        Some(reference) => vec![named(&shared, &by, reference).await?],
        None => queue.artifacts_not_whole(limit).await?,
    };
    artifacts.retain(|artifact| by.may(&artifact.app).is_ok());
    let mut summary: BTreeMap<_, types::RegionReplication> = BTreeMap::new();
    for region in &regions {
        let observed = shared.config.is_observed(&region.name);
        let of = types::RegionReplication {
            drained: region.drain.is_some(),
            // Who asks for some apps sees nothing of the fleet but its regions.
            drain: region.drain.clone().filter(|_| by.apps.is_none()).map(view::halt),
            observed,
            ..types::RegionReplication::default()
        };
        summary.insert(region.name.clone(), of);
    }
    let counts = if by.apps.is_none() { queue.copies_by_region().await? } else { vec![] };
    for count in counts {
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

/// An artifact that the caller may have to do with.
async fn named(shared: &Shared, by: &Principal, reference: &str) -> ApiResult<Artifact> {
    let artifact = shared.queue.artifact(reference, None).await?;
    by.may(&artifact.app)?;
    Ok(artifact)
}

pub(super) async fn inspect(
    shared: App,
    Who(by, actor): Who,
    Json(request): Json<types::ArtifactRef>,
) -> Reply<types::Done> {
    let artifact = named(&shared, &by, &request.artifact).await?;
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

pub(super) async fn pins(
    shared: App,
    Who(by, _): Who,
    Args(args): Args<PageArgs>,
) -> Reply<types::Page<types::Pin>> {
    let paging = Paging::<(i64, String)>::of("pins", args.limit, args.cursor.as_deref())?;
    let key = |pin: &shoal_queue::Pin| (pin.at_ms, pin.name.clone());
    let mut pins = shared.queue.pins(PINS_MAX).await?;
    // A name begins with its app.
    let app = |pin: &shoal_queue::Pin| pin.name.split('/').next()?.parse::<AppName>().ok();
    pins.retain(|pin| app(pin).is_some_and(|app| by.may(&app).is_ok()));
    // There are few, and they are read whole: a page begins behind the last pin of the one before.
    if let Some((at, name)) = &paging.after {
        pins.retain(|pin| pin.at_ms < *at || (pin.at_ms == *at && pin.name > *name));
    }
    Ok(paging.page(pins, key, pin_view))
}

pub(super) async fn pin(
    shared: App,
    Who(by, actor): Who,
    Json(request): Json<types::PinRequest>,
) -> Reply<types::Pin> {
    let artifact = named(&shared, &by, &request.artifact).await?;
    let (reason, now) = (request.reason, now_ms());
    shared.queue.pin(&artifact.name, reason.as_deref(), &actor, now).await?;
    Ok(axum::Json(types::Pin { artifact: artifact.name, reason, by: actor.name, at_ms: now }))
}

pub(super) async fn unpin(
    shared: App,
    Who(by, actor): Who,
    Json(request): Json<types::ArtifactRef>,
) -> Reply<types::Done> {
    let artifact = named(&shared, &by, &request.artifact).await?;
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
    Who(by, actor): Who,
    Json(request): Json<types::GcRequest>,
) -> Reply<types::GcReport> {
    match (&request.app, &by.apps) {
        (Some(app), _) => by.may(app)?,
        (None, Some(_)) => {
            return Err(ApiError::invalid("your token is bound to apps: name one with app"));
        }
        (None, None) => {}
    }
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
