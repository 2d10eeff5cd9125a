//! Going on after the database was restored from a backup that is older than what machines have been told.
//!
//! Machines follow no goal whose (epoch, revision) is not higher than the one that they have. So the epoch is raised above
//! all that anybody knows: the database itself, the goal store, and each region's processes, which say it when they ask for
//! goals. Until then no goal is set.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use shoal_goals::{EtcdStore, GoalStore as _};
use shoal_proto::RegionName;
use shoal_queue::{Bell, QueueError};

use crate::state::{Shared, lock, myself, now_ms, seconds};

/// How often it is looked whether all regions have told.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// How often the log says what is waited for.
const SAY_EVERY: Duration = Duration::from_secs(10);

/// What a recovery knows so far. None of it: none is under way.
#[derive(Debug, Default)]
pub(crate) struct Recovery {
    /// The highest epoch that each region's processes have told of.
    told: BTreeMap<RegionName, u32>,
    /// What is waited for.
    waits_for: String,
}

impl Shared {
    /// A process of a region says which epoch is the highest that it knows.
    pub(crate) fn epoch_told(&self, region: &RegionName, epoch: u32) {
        if let Some(recovery) = &mut *lock(&self.recovery) {
            let known = recovery.told.entry(region.clone()).or_default();
            *known = epoch.max(*known);
        }
    }

    /// Why no goal can be set at present.
    pub(crate) fn recovering(&self) -> Option<String> {
        let recovery = lock(&self.recovery);
        let waits_for = &recovery.as_ref()?.waits_for;
        Some(format!("the coordinator recovers and sets no goal yet: it waits for {waits_for}"))
    }
}

/// Raises the epoch above all that is known. Returns when it is done, or never when the process stops before.
pub(crate) async fn run(shared: Arc<Shared>) {
    tokio::select! {
        () = recover(&shared) => {}
        () = shared.stop.cancelled() => {}
    }
}

async fn recover(shared: &Shared) {
    let started = Instant::now();
    let mut said: Option<Instant> = None;
    let mut store = shared.goal_store.as_ref();
    let mut highest = 0;
    loop {
        match step(shared, &mut store, &mut highest, started).await {
            Ok(None) => break,
            Ok(Some(waits_for)) => {
                if said.is_none_or(|said| said.elapsed() >= SAY_EVERY) {
                    said = Some(Instant::now());
                    tracing::warn!(
                        waits_for,
                        "recovering: no goal is set until the epoch is raised"
                    );
                }
                if let Some(recovery) = &mut *lock(&shared.recovery) {
                    recovery.waits_for = waits_for;
                }
            }
            Err(error) => tracing::warn!(%error, "recovering: the database failed"),
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    *lock(&shared.recovery) = None;
    // Those who wait with a cursor from before the restore look now.
    shared.ring(Bell::Goals);
}

/// Does the next step; what is still waited for, if anything.
async fn step(
    shared: &Shared,
    store: &mut Option<&EtcdStore>,
    highest: &mut u32,
    started: Instant,
) -> Result<Option<String>, QueueError> {
    if let Some(open) = store {
        match open.list().await {
            Ok(listed) => {
                let trust = shared.membership.trust();
                let signed =
                    listed.entries.iter().filter(|entry| trust.open_goal(&entry.signed).is_ok());
                let epochs = signed.map(|entry| entry.revision.epoch);
                *highest = epochs.max().unwrap_or_default().max(*highest);
                *store = None;
            }
            Err(error) => return Ok(Some(format!("the goal store: {error}"))),
        }
    }
    let regions = shared.queue.regions().await?;
    let mut silent: Vec<_> = regions.into_iter().filter(|region| region.drain.is_none()).collect();
    // After the rows: who tells in between is not missed.
    let told = lock(&shared.recovery).as_ref().map(|now| now.told.clone()).unwrap_or_default();
    silent.retain(|region| !told.contains_key(&region.name));
    if let Some(region) = silent.first() {
        let name = &region.name;
        return Ok(Some(format!(
            "a process of region {name} to say which goals it knows; if {name} is gone: shoal drain {name}"
        )));
    }
    // One process of a region may know less than another one: all have their time to ask.
    let settle = seconds(shared.config.recover_settle_s);
    if !told.is_empty() && started.elapsed() < settle {
        return Ok(Some(format!("all region processes to ask, {} s", settle.as_secs_f64())));
    }
    *highest = told.values().copied().max().unwrap_or_default().max(*highest);
    *highest = shared.queue.highest_epoch().await?.max(*highest);
    let Some(epoch) = highest.checked_add(1) else {
        return Ok(Some("a lower epoch: the highest possible one is in use".into()));
    };
    shared.queue.raise_epoch(epoch, &myself(), now_ms()).await?;
    tracing::info!(epoch, "recovered: every goal from now on is newer than all that machines know");
    Ok(None)
}
