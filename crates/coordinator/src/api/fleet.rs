//! Machines and regions.

use serde::Deserialize;
use shoal_client::types;
use shoal_proto::{AppName, RegionName};
use shoal_queue::{Actor, Bell};

use super::{App, Args, Place, Reply, Who};
use crate::{
    error::ApiError,
    state::{Shared, now_ms},
    view,
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MachinesArgs {
    region: Option<RegionName>,
    app: Option<AppName>,
}

pub(super) async fn machines(
    shared: App,
    Args(args): Args<MachinesArgs>,
) -> Reply<Vec<types::Machine>> {
    if let Some(app) = &args.app {
        shared.queue.app(app).await?;
    }
    if let Some(region) = &args.region {
        find_region(&shared, region).await?;
    }
    let machines = shared.queue.machines(args.region.as_ref(), args.app.as_ref()).await?;
    Ok(axum::Json(machines.into_iter().map(view::machine).collect()))
}

pub(super) async fn regions(shared: App) -> Reply<Vec<types::Region>> {
    let regions = shared.queue.regions().await?;
    Ok(axum::Json(regions.into_iter().map(view::region).collect()))
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
    actor: &Actor,
) -> Reply<types::Region> {
    shared.queue.drain(name, drained, actor, now_ms()).await?;
    tracing::info!(region = %name, drained, by = actor.name, "region set");
    shared.ring(Bell::Copies);
    shared.ring(Bell::Rollouts);
    find_region(shared, name).await.map(axum::Json)
}

pub(super) async fn drain(
    shared: App,
    Who(_, actor): Who,
    Place(name): Place<RegionName>,
) -> Reply<types::Region> {
    set(&shared, &name, true, &actor).await
}

pub(super) async fn undrain(
    shared: App,
    Who(_, actor): Who,
    Place(name): Place<RegionName>,
) -> Reply<types::Region> {
    set(&shared, &name, false, &actor).await
}
