//! The reaper: gives lost jobs on.

use std::{sync::Arc, time::Instant};

use shoal_proto::state::JobStatus;
use shoal_queue::{Bell, QueueError, Watch};
use tokio_util::sync::CancellationToken;

use crate::state::{Shared, now_ms, seconds};

/// Watches the running jobs until it is stopped.
pub(crate) async fn run(shared: Arc<Shared>, stop: CancellationToken) {
    let interval = seconds(shared.config.reaper_interval_s);
    let window = shared.config.loss_window();
    let in_ms =
        |duration: std::time::Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let mut watch = Watch::new(in_ms(window), in_ms(interval));
    let start = Instant::now();
    loop {
        if let Err(error) = look(&shared, &mut watch, in_ms(start.elapsed())).await {
            // The next look sees the gap, and waits a full window again.
            tracing::warn!(%error, "cannot look for lost jobs");
            shared.metrics.task_failures.with_label_values(&["reaper"]).inc();
        }
        tokio::select! {
            () = tokio::time::sleep(interval) => {}
            () = stop.cancelled() => return,
        }
    }
}

async fn look(shared: &Shared, watch: &mut Watch, at_ms: u64) -> Result<(), QueueError> {
    let running = shared.queue.running().await?;
    for lost in watch.look(at_ms, &running) {
        let Some(status) = shared.queue.reap(&lost, now_ms()).await? else { continue };
        shared.metrics.job_transitions.with_label_values(&[status.as_str()]).inc();
        if status == JobStatus::Queued {
            shared.ring(Bell::Jobs);
        }
        tracing::warn!(job = lost.job(), %status, "a worker was lost");
    }
    Ok(())
}
