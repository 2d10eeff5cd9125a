//! Machines and regions.

use schemars::JsonSchema;
use serde::Deserialize;
use shoal_client::types;
use shoal_proto::{AppName, RegionName};
use shoal_queue::{Actor, Bell, Reports};

use super::{App, Args, PageArgs, Place, Reply, Spare, Who, pages::Paging, queue::reason};
use crate::{
    error::ApiError,
    state::{Shared, now_ms},
    view,
};

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct MachinesArgs {
    /// Only machines of this region.
    region: Option<RegionName>,
    /// Only machines that have reported about this app, and only that report.
    app: Option<AppName>,
    /// Only machines that failed an app of these (FAILED, ROLLED_BACK), and only these reports.
    #[serde(default)]
    failed: bool,
    /// How many rows at most, 1 to 1000; 100 when nothing is said.
    #[schemars(range(min = 1, max = 1000))]
    limit: Option<u32>,
    /// The `next_cursor` of the page before.
    cursor: Option<String>,
}

pub(super) async fn machines(
    shared: App,
    Who(by, _): Who,
    Args(args): Args<MachinesArgs>,
) -> Reply<types::Page<types::Machine>> {
    let paging = Paging::<String>::of("machines", args.limit, args.cursor.as_deref())?;
    let apps = by.apps(args.app.as_ref())?;
    if let Some(app) = &args.app {
        shared.queue.app(app).await?;
    }
    if let Some(region) = &args.region {
        find_region(&shared, region).await?;
    }
    let (region, after) = (args.region.as_ref(), paging.after.as_deref().unwrap_or_default());
    let wanted = Reports { apps: apps.as_ref(), failed: args.failed };
    let rows = shared.queue.machines_page(region, wanted, after, paging.wanted()).await?;
    Ok(paging.page(rows, |row| row.seen.name.to_string(), view::machine))
}

pub(super) async fn regions(
    shared: App,
    Args(args): Args<PageArgs>,
) -> Reply<types::Page<types::Region>> {
    let paging = Paging::<RegionName>::of("regions", args.limit, args.cursor.as_deref())?;
    // As many as the configuration has, which is a hundred at most.
    let mut regions = shared.queue.regions().await?;
    regions.sort_by(|a, b| a.name.cmp(&b.name));
    regions.retain(|region| paging.after.as_ref().is_none_or(|after| region.name > *after));
    Ok(paging.page(regions, |region| region.name.clone(), view::region))
}

async fn find_region(shared: &Shared, name: &RegionName) -> Result<types::Region, ApiError> {
    let regions = shared.queue.regions().await?;
    let found = regions.into_iter().find(|region| region.name == *name);
    found
        .map(view::region)
        .ok_or_else(|| ApiError::not_found(format!("no region '{name}': shoal regions lists them")))
}

async fn set(
    shared: &Shared,
    name: &RegionName,
    drained: bool,
    reason: Option<&str>,
    actor: &Actor,
) -> Reply<types::Region> {
    shared.queue.drain(name, drained, reason, actor, now_ms()).await?;
    tracing::info!(region = %name, drained, by = actor.name, reason, "region set");
    shared.ring(Bell::Copies);
    shared.ring(Bell::Rollouts);
    find_region(shared, name).await.map(axum::Json)
}

pub(super) async fn drain(
    shared: App,
    Who(_, actor): Who,
    Place(name): Place<RegionName>,
    Spare(request): Spare<types::HaltRequest>,
) -> Reply<types::Region> {
    let reason = reason(request.unwrap_or_default())?;
    set(&shared, &name, true, reason.as_deref(), &actor).await
}

pub(super) async fn undrain(
    shared: App,
    Who(_, actor): Who,
    Place(name): Place<RegionName>,
) -> Reply<types::Region> {
    set(&shared, &name, false, None, &actor).await
}
