//! One way to try again.

use std::{future::Future, time::Duration};

use backon::{ExponentialBuilder, Retryable};

use crate::error::OriginError;

/// How often a failed operation is tried again. S3 and GCS requests have retries of their own below
/// (see `bucket.rs`), so this is for what those do not see: a body that breaks off, a directory on a
/// network that hangs.
const RETRIES_MAX: usize = 4;

/// The first pause; it doubles each time, with up to as much again at random.
const PAUSE_MIN: Duration = Duration::from_millis(200);

/// The longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Runs `operation` until it succeeds, fails for good, or was tried [`RETRIES_MAX`] times again.
pub(crate) async fn retried<T, Fut>(
    what: &str,
    operation: impl FnMut() -> Fut,
) -> Result<T, OriginError>
where
    Fut: Future<Output = Result<T, OriginError>>,
{
    let pauses = ExponentialBuilder::new()
        .with_min_delay(PAUSE_MIN)
        .with_max_delay(PAUSE_MAX)
        .with_max_times(RETRIES_MAX)
        .with_jitter();
    operation
        .retry(pauses)
        .when(OriginError::is_transient)
        .notify(|error, pause| {
            tracing::warn!(%error, what, pause_ms = pause.as_millis() as u64, "trying again");
        })
        .await
}
