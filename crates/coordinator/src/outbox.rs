//! Telling the goal store (etcd) what the database has decided.
//!
//! A goal lies in the outbox from its own transaction on until the store has it. The coordinator on duty empties it in
//! order; whoever does it twice, or late, does no harm, since the store takes only what is newer. Now and then, and
//! first of all, the store is compared with the database: one that is new or was restored gets what it lacks, and
//! one that knows newer goals than the database says that the database was restored.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use shoal_goals::{Entry, EtcdStore, GoalStore as _, GoalsError, Put};
use shoal_queue::{OutboxGoal, QueueError};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::state::{Shared, bell, chance, now_ms};

/// How long to wait after the store failed, at first and at most; less up to half by chance.
const RETRY_MIN: Duration = Duration::from_millis(250);
const RETRY_MAX: Duration = Duration::from_secs(5);

/// How often the outbox is looked at when nobody rings.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// How often store and database are compared.
const COMPARE_INTERVAL: Duration = Duration::from_secs(60);

/// How many goals are read from the outbox at once.
const BATCH: u32 = 100;

/// Why the store was not told.
#[derive(Debug, thiserror::Error)]
enum OutboxError {
    #[error(transparent)]
    Database(#[from] QueueError),
    #[error(transparent)]
    Store(#[from] GoalsError),
    #[error("{0} of the goals could not be written")]
    Some(usize),
}

/// Empties the outbox until it is stopped.
pub(crate) async fn run(shared: Arc<Shared>, store: EtcdStore, stop: CancellationToken) {
    let mut pause = RETRY_MIN;
    let mut compare_at = Instant::now();
    loop {
        // Before the look: a goal that comes meanwhile is not waited for.
        let bell = bell(&shared.goals_moved);
        let told = tokio::select! {
            told = look(&shared, &store, &mut compare_at) => told,
            () = stop.cancelled() => return,
        };
        let failed = told.is_err();
        let wait = match told {
            Ok(()) => {
                pause = RETRY_MIN;
                LOOK_AGAIN
            }
            Err(error) => {
                shared.metrics.task_failures.with_label_values(&["goal store"]).inc();
                tracing::warn!(%error, "the goal store was not told; it is tried again");
                let wait = pause.mul_f64(1.0 - chance() / 2.0);
                pause = (pause * 2).min(RETRY_MAX);
                wait
            }
        };
        tokio::select! {
            () = bell, if !failed => {}
            () = tokio::time::sleep(wait) => {}
            () = stop.cancelled() => return,
        }
    }
}

async fn look(
    shared: &Shared,
    store: &EtcdStore,
    compare_at: &mut Instant,
) -> Result<(), OutboxError> {
    if shared.recovering().is_some() {
        // What it would say is being mended.
        return Ok(());
    }
    if Instant::now() >= *compare_at {
        compare(shared, store).await?;
        *compare_at = Instant::now() + COMPARE_INTERVAL;
    }
    loop {
        let goals = shared.queue.outbox(BATCH).await?;
        let mut refused = 0;
        for goal in &goals {
            match tell(shared, store, goal).await {
                Ok(is_newest) => {
                    shared.queue.outbox_told(goal).await?;
                    if !is_newest {
                        *compare_at = Instant::now();
                    }
                }
                // The others are not held up by what is wrong with this one.
                Err(error) if error.is_about_content() => {
                    tracing::error!(app = %goal.app, %error, "the goal store refuses a goal");
                    shared.metrics.goal_store_writes.with_label_values(&["refused"]).inc();
                    refused += 1;
                }
                Err(error) => {
                    shared.metrics.goal_store_writes.with_label_values(&["failed"]).inc();
                    return Err(error.into());
                }
            }
        }
        if refused > 0 {
            return Err(OutboxError::Some(refused));
        }
        if goals.len() < BATCH as usize {
            return Ok(());
        }
    }
}

/// Tells one goal; whether the store has it now, and not a newer one.
async fn tell(shared: &Shared, store: &EtcdStore, goal: &OutboxGoal) -> Result<bool, GoalsError> {
    let entry = Entry::from_hex(&goal.signed)
        .map_err(|message| GoalsError::Refused { message: format!("it is no goal: {message}") })?;
    let result = match store.put(&entry).await? {
        Put::Written => "written",
        Put::Known => "known",
        Put::Stale(stored) if shared.membership.trust().open_goal(&stored.signed).is_err() => {
            tracing::warn!(app = %goal.app, "the goal store has a goal that this cluster's keys did not sign: replaced");
            if !store.put_over(&entry, &stored).await? {
                let message = "others write to it what this cluster's keys did not sign".into();
                return Err(GoalsError::Refused { message });
            }
            "written"
        }
        Put::Stale(stored) => {
            // The comparison that follows says what it means.
            tracing::warn!(
                app = %goal.app, ours = %entry.revision, stored = %stored.revision,
                "the goal store knows a newer goal: this one is not written"
            );
            "stale"
        }
    };
    shared.metrics.goal_store_writes.with_label_values(&[result]).inc();
    tracing::debug!(app = %goal.app, revision = %entry.revision, result, "told the goal store");
    Ok(result != "stale")
}

/// What it means when others know more than the database.
const RESTORED: &str = "the database was restored from an older backup, and machines would not follow what is deployed \
                        now; start one coordinator once with --recover";

async fn compare(shared: &Shared, store: &EtcdStore) -> Result<(), OutboxError> {
    let listed = store.list().await?;
    let trust = shared.membership.trust();
    let signed = listed.entries.into_iter();
    let signed = signed.filter(|entry| trust.open_goal(&entry.signed).is_ok());
    let stored: BTreeMap<_, _> = signed.map(|entry| (entry.app, entry.revision)).collect();
    let found = shared.queue.outbox_compare(&stored, now_ms()).await?;
    if found.behind > 0 {
        tracing::info!(goals = found.behind, "the goal store lacks goals: they are told again");
    }
    shared.metrics.goals_ahead.set(i64::try_from(found.ahead.len()).unwrap_or(i64::MAX));
    for (app, revision) in found.ahead {
        tracing::error!(%app, %revision, "the goal store knows a newer goal: {RESTORED}");
    }
    Ok(())
}
