//! Deploying the main branch by itself: what a push brought, once it may be deployed, where an app says so.
//!
//! Which builds those are, and whether a goal may still be set, is the database's to say (`shoal_queue`); here it is
//! looked, and done, by the coordinator on duty.

use std::{sync::Arc, time::Duration};

use shoal_queue::{Actor, Choice, QueueError};
use tokio_util::sync::CancellationToken;

use crate::{
    goals,
    state::{Shared, bell},
};

/// Who it is in the audit log.
const WHO: &str = "auto_deploy";

/// How often it is looked when nobody rings: a region that is drained may make a build deployable.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// Between two looks lies this at least.
const REST: Duration = Duration::from_millis(200);

/// Deploys until it is stopped.
pub(crate) async fn run(shared: Arc<Shared>, stop: CancellationToken) {
    loop {
        let bell = bell(&shared.events_moved);
        if let Err(error) = look(&shared).await {
            tracing::warn!(%error, "cannot look what is to be deployed by itself");
            shared.metrics.task_failures.with_label_values(&["auto_deploy"]).inc();
        }
        tokio::select! {
            () = async { tokio::time::sleep(REST).await; bell.await } => {}
            () = tokio::time::sleep(LOOK_AGAIN) => {}
            () = stop.cancelled() => return,
        }
    }
}

async fn look(shared: &Shared) -> Result<(), QueueError> {
    for next in shared.queue.upcoming().await? {
        let actor = Actor { name: WHO.into(), origin: String::new(), request: None };
        let (app, job) = (next.app, next.job);
        let choice = Choice::Following { name: next.name, job };
        match goals::set(shared, &app, &choice, false, &actor).await {
            Ok(rollout) => {
                tracing::info!(%app, job, rollout = rollout.id, "deployed by itself");
            }
            // Somebody was faster, or it has to wait: the next look sees.
            Err(QueueError::Conflict(why)) => {
                tracing::info!(%app, job, why, "not deployed by itself")
            }
            Err(error @ QueueError::NotDeployable { .. }) => {
                tracing::info!(%app, job, %error, "not deployed by itself yet");
            }
            // Another app's is not held up.
            Err(error) => {
                tracing::warn!(%app, job, %error, "cannot be deployed by itself; it is tried again");
                shared.metrics.task_failures.with_label_values(&["auto_deploy"]).inc();
            }
        }
    }
    Ok(())
}
