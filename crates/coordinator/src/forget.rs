//! Forgetting machines that are gone, so that no rollout waits for them, workers, old requests and tokens that have ended.

use std::{sync::Arc, time::Duration};

use shoal_queue::{Bell, QueueError};
use tokio_util::sync::CancellationToken;

use crate::state::{Shared, ms, now_ms, seconds};

/// How often it looks, at most. Never at the start: after an outage of the coordinator its regions first tell
/// again whom they hear of.
const INTERVAL_MAX: Duration = Duration::from_secs(600);

/// Forgets until it is stopped.
pub(crate) async fn run(shared: Arc<Shared>, stop: CancellationToken) {
    let forget = seconds(shared.config.forget_machine_s);
    let requests = seconds(shared.config.keep_request_s);
    let interval = INTERVAL_MAX.min(forget.min(requests) / 2);
    loop {
        tokio::select! {
            () = tokio::time::sleep(interval) => {}
            () = stop.cancelled() => return,
        }
        if let Err(error) = look(&shared, forget).await {
            tracing::warn!(%error, "cannot forget what is gone");
            shared.metrics.task_failures.with_label_values(&["forget"]).inc();
        }
    }
}

async fn look(shared: &Shared, forget: Duration) -> Result<(), QueueError> {
    let workers = shared.queue.forget_workers(now_ms() - ms(forget)).await?;
    if workers > 0 {
        tracing::info!(workers, "workers were forgotten: they were not heard of for long");
    }
    shared.queue.forget_requests(now_ms() - ms(seconds(shared.config.keep_request_s))).await?;
    shared.queue.forget_tokens(now_ms() - ms(seconds(shared.config.keep_ended_token_s))).await?;
    let gone = shared.queue.forget_machines(now_ms() - ms(forget)).await?;
    if gone > 0 {
        tracing::info!(machines = gone, "machines were forgotten: they were not heard of for long");
        shared.ring(Bell::Rollouts);
    }
    Ok(())
}
