//! The reaper: gives lost jobs on, so many at a look, and lets jobs be taken whose wait for their next attempt is over.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use shoal_proto::state::JobStatus;
use shoal_queue::{Bell, QueueError, ReapLimit, Watch};
use tokio_util::sync::CancellationToken;

use crate::state::{Shared, now_ms, seconds};

/// How often it is looked whether a job has waited for long enough.
const RELEASE_INTERVAL: Duration = Duration::from_secs(1);

/// Watches the running jobs until it is stopped.
pub(crate) async fn run(shared: Arc<Shared>, stop: CancellationToken) {
    let interval = seconds(shared.config.reaper_interval_s);
    let mut watch = Watch::new(in_ms(shared.config.loss_window()), in_ms(interval));
    let start = Instant::now();
    loop {
        if let Err(error) = look(&shared, &mut watch, start).await {
            // The next look sees the gap, and waits a full window again.
            tracing::warn!(%error, "cannot look for lost jobs");
            shared.metrics.task_failures.with_label_values(&["reaper"]).inc();
        }
        tokio::select! {
            () = tokio::time::sleep(interval) => {}
            () = stop.cancelled() => break,
        }
    }
    shared.metrics.lost_jobs_waiting.set(0);
}

fn in_ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

async fn look(shared: &Shared, watch: &mut Watch, start: Instant) -> Result<(), QueueError> {
    let asked_ms = in_ms(start.elapsed());
    let running = shared.queue.running().await?;
    let mut lost = watch.look(asked_ms, in_ms(start.elapsed()), &running);
    let config = &shared.config;
    let limit = ReapLimit { jobs: config.reap_jobs as usize, share: config.reap_share };
    let waiting = limit.apply(&mut lost, running.len());
    shared.metrics.lost_jobs_waiting.set(i64::try_from(waiting).unwrap_or(i64::MAX));
    if waiting > 0 {
        tracing::warn!(
            given_on = lost.len(),
            waiting,
            running = running.len(),
            "many workers are silent at once: the network may be to blame, so only some of their jobs are given on now"
        );
    }
    for lost in lost {
        let taken = shared.queue.reap(&lost, shared.backoff(), now_ms()).await?;
        let Some(status) = taken else { continue };
        shared.metrics.jobs_lost.inc();
        shared.metrics.job_transitions.with_label_values(&[status.as_str()]).inc();
        if status == JobStatus::Queued {
            shared.ring(Bell::Jobs);
        }
        tracing::warn!(job = lost.job(), %status, "a worker was lost");
    }
    Ok(())
}

/// Lets jobs be taken that have waited for long enough, until it is stopped.
pub(crate) async fn release(shared: Arc<Shared>, stop: CancellationToken) {
    loop {
        match shared.queue.release_due(now_ms()).await {
            Ok(0) => {}
            Ok(jobs) => {
                tracing::info!(jobs, "jobs may be tried again");
                shared.ring(Bell::Jobs);
            }
            Err(error) => {
                tracing::warn!(%error, "cannot look for jobs that may be tried again");
                shared.metrics.task_failures.with_label_values(&["release"]).inc();
            }
        }
        tokio::select! {
            () = tokio::time::sleep(RELEASE_INTERVAL) => {}
            () = stop.cancelled() => return,
        }
    }
}
