//! What only one coordinator at a time does: the reaper, the copies, their inspection and end, the ends of rollouts, telling
//! the goal store, numbering events, telling webhooks, deploying main branches, forgetting what is old.
//!
//! Each coordinator asks for the duty every [`Duty::PERIOD`]; the one that has it runs these tasks, and ends them when
//! it loses it. All that they know is in the database, so a successor goes on where the one before stopped.

use std::{panic, sync::Arc};

use shoal_queue::Duty;
use tokio::task::{JoinError, JoinSet};

use crate::{
    auto_deploy, events, forget, inspect, outbox, reaper, removal, replicate, retention, rollout,
    state::Shared, webhooks,
};

/// Asks for the duty and does it, until the process stops. `owner` is this process, in the rows of copies.
pub(crate) async fn run(shared: Arc<Shared>, owner: String) {
    let mut duty = shared.queue.duty();
    loop {
        if duty.hold().await {
            on_duty(&shared, &mut duty, &owner).await;
        }
        tokio::select! {
            () = tokio::time::sleep(Duty::PERIOD) => {}
            () = shared.stop.cancelled() => return,
        }
    }
}

async fn on_duty(shared: &Arc<Shared>, duty: &mut Duty, owner: &str) {
    tracing::info!("on duty: this coordinator runs the periodic tasks");
    shared.metrics.on_duty.set(1);
    let stop = shared.stop.child_token();
    let mut tasks = JoinSet::new();
    tasks.spawn(reaper::run(shared.clone(), stop.clone()));
    tasks.spawn(reaper::release(shared.clone(), stop.clone()));
    tasks.spawn(replicate::run(shared.clone(), owner.into(), stop.clone()));
    tasks.spawn(inspect::run(shared.clone(), stop.clone()));
    tasks.spawn(inspect::repair(shared.clone(), stop.clone()));
    tasks.spawn(retention::run(shared.clone(), stop.clone()));
    tasks.spawn(removal::run(shared.clone(), owner.into(), stop.clone()));
    tasks.spawn(rollout::run(shared.clone(), stop.clone()));
    tasks.spawn(forget::run(shared.clone(), stop.clone()));
    tasks.spawn(events::number(shared.clone(), stop.clone()));
    tasks.spawn(events::forget(shared.clone(), stop.clone()));
    tasks.spawn(webhooks::run(shared.clone(), stop.clone()));
    tasks.spawn(auto_deploy::run(shared.clone(), stop.clone()));
    if let Some(store) = shared.goal_store.clone() {
        tasks.spawn(outbox::run(shared.clone(), store, stop.clone()));
    }
    let mut failed = None;
    loop {
        tokio::select! {
            () = tokio::time::sleep(Duty::PERIOD) => {
                if !duty.hold().await {
                    tracing::warn!("no longer on duty: another coordinator may be");
                    break;
                }
            }
            Some(Err(error)) = tasks.join_next() => {
                failed = Some(error);
                break;
            }
            () = stop.cancelled() => break,
        }
    }
    stop.cancel();
    while let Some(ended) = tasks.join_next().await {
        failed = failed.or(ended.err());
    }
    shared.metrics.on_duty.set(0);
    duty.release().await;
    // A task that panics ends the process, as any other of its tasks does.
    if let Some(Ok(panic)) = failed.map(JoinError::try_into_panic) {
        panic::resume_unwind(panic);
    }
}
