//! Copies from the main bucket into the regions' buckets.
//!
//! Each copy streams part by part with bounded memory, checks each part against its index, and goes on from what
//! is there: a copy that was broken off, here or in another coordinator, costs only the part it was in.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use shoal_origin::{Bucket, Check, OriginError};
use shoal_proto::{ArtifactId, EncodingId, RegionName};
use shoal_queue::{Bell, CopyJob, CopyProgress, QueueError};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::{
    error::ApiError,
    state::{Shared, ms, now_ms, seconds},
};

/// How often a copy says how far it is.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// How much a second's rate counts against those before it.
const RATE_WEIGHT: f64 = 0.3;

/// The longest pause before a failed copy is tried again.
const RETRY_MAX: Duration = Duration::from_secs(60);

/// When a copy that has failed `tries` times is due again: doubled each time, spread by a quarter.
pub(crate) fn retry_after(first: Duration, tries: u32, spread: u32) -> Duration {
    let doubled = first.saturating_mul(1 << tries.saturating_sub(1).min(16));
    let pause = doubled.min(RETRY_MAX);
    pause + pause.mul_f64(f64::from(spread % 1_000) / 4_000.0)
}

/// What was lost, and why it is not there again yet: the last reason takes the place of the one before.
pub(crate) fn not_repaired(damage: &str, why: &str) -> String {
    const YET: &str = "; not repaired yet: ";
    let lost = damage.split(YET).next().unwrap_or(damage);
    format!("{lost}{YET}{why}")
}

/// Copies until it is stopped.
pub(crate) async fn run(shared: Arc<Shared>, owner: String, stop: CancellationToken) {
    // Who made them before does so no more.
    if let Err(error) = shared.queue.take_over_copies().await {
        tracing::warn!(%error, "copies under way were not taken over: they go on a little later");
    }
    let mut copies = JoinSet::new();
    let mut under_way = BTreeMap::new();
    let most = shared.config.copies_in_parallel as usize;
    loop {
        while copies.len() < most {
            match take(&shared, &owner, &under_way).await {
                Ok(Some(job)) => {
                    *under_way.entry(job.region.clone()).or_default() += 1;
                    let (shared, owner) = (shared.clone(), owner.clone());
                    copies.spawn(async move {
                        one(&shared, &owner, &job).await;
                        job.region
                    });
                }
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!(%error, "cannot look for copies to make");
                    shared.metrics.task_failures.with_label_values(&["replication"]).inc();
                    break;
                }
            }
        }
        let pause = pause(&shared).await;
        let full = copies.len() >= most;
        tokio::select! {
            Some(ended) = copies.join_next() => match ended {
                Ok(region) => {
                    under_way.entry(region).and_modify(|count| *count = count.saturating_sub(1));
                }
                // Not known which region's: count afresh as the others end.
                Err(error) => {
                    tracing::error!(%error, "a copy panicked");
                    under_way.clear();
                }
            },
            () = shared.copy_waits.notified(), if !full => {}
            () = tokio::time::sleep(pause), if !full => {}
            () = stop.cancelled() => break,
        }
    }
    copies.shutdown().await;
    if let Err(error) = shared.queue.give_back_copies(&owner).await {
        tracing::warn!(%error, "copies under way were not given back: they go on a little later");
    }
}

/// How long nothing is due: at most the configured interval.
async fn pause(shared: &Shared) -> Duration {
    let interval = seconds(shared.config.replication_interval_s);
    match shared.queue.next_copy_due_ms().await {
        Ok(Some(due_ms)) => {
            let left = u64::try_from(due_ms - now_ms()).unwrap_or_default();
            // What is overdue was looked at just now, and was another region's or somebody else's.
            if left == 0 { interval } else { interval.min(Duration::from_millis(left)) }
        }
        _ => interval,
    }
}

async fn take(
    shared: &Shared,
    owner: &str,
    under_way: &BTreeMap<RegionName, usize>,
) -> Result<Option<CopyJob>, QueueError> {
    let most = shared.config.copies_per_region as usize;
    let busy = under_way.iter().filter(|(_, count)| **count >= most);
    let busy: Vec<_> = busy.map(|(region, _)| region.clone()).collect();
    let now = now_ms();
    shared.queue.take_copy(owner, &busy, now, owned_until(shared, now)).await
}

fn owned_until(shared: &Shared, now: i64) -> i64 {
    now + ms(seconds(shared.config.copy_owned_s))
}

/// Makes one copy and writes down how it went.
async fn one(shared: &Shared, owner: &str, job: &CopyJob) {
    let (artifact, region) = (job.artifact, job.region.clone());
    tracing::info!(%artifact, %region, tries = job.tries, "copying");
    let goes = shared.copies_under_way.begin(job.encoding);
    let result = copy(shared, owner, job).await;
    drop(goes);
    let count = |result| {
        shared.metrics.copies_ended.with_label_values(&[region.as_str(), result]).inc();
    };
    let told = match result {
        Ok(Some(Made::Awaited { bytes, reason })) => {
            count("awaited");
            tracing::debug!(%artifact, %region, reason, "the store has not brought it yet");
            let next = now_ms() + ms(seconds(shared.config.observe_interval_s));
            shared.queue.copy_awaited(job, owner, (bytes, &reason), next).await
        }
        Ok(Some(Made::Whole { bytes })) => {
            count("complete");
            if job.damage.is_some() {
                shared.metrics.repairs.with_label_values(&["region"]).inc();
            }
            tracing::info!(%artifact, %region, bytes, "copy complete");
            let complete = shared.queue.copy_complete(job, owner, bytes, now_ms()).await;
            shared.ring(Bell::Events);
            complete
        }
        Ok(None) => {
            count("taken_over");
            tracing::warn!(%artifact, %region, "another coordinator makes this copy");
            return;
        }
        Err(reason) => {
            count("failed");
            tracing::warn!(%artifact, %region, reason, "a copy failed; it is tried again");
            let first = seconds(shared.config.copy_retry_s);
            let spread = u32::from(artifact.0[0]) * 256 + u32::from(artifact.0[1]);
            let next = now_ms() + ms(retry_after(first, job.tries, spread));
            let reason = match &job.damage {
                Some(damage) => not_repaired(damage, &reason),
                None => reason,
            };
            shared.queue.copy_failed(job, owner, &reason, next).await
        }
    };
    if let Err(error) = told {
        // It stays COPYING until its owner's time ends, and is then found whole at once.
        tracing::warn!(%artifact, %region, %error, "how a copy ended was not written down");
    }
}

/// What became of a copy.
enum Made {
    /// It is whole and proved.
    Whole {
        /// How long it is.
        bytes: u64,
    },
    /// The store has not brought all of it.
    Awaited {
        /// How much is there.
        bytes: u64,
        /// What is waited for.
        reason: String,
    },
}

/// How fast a copy goes, of late.
struct Rate {
    at: Instant,
    bytes: u64,
    bytes_per_s: Option<f64>,
}

impl Rate {
    fn new() -> Self {
        Self { at: Instant::now(), bytes: 0, bytes_per_s: None }
    }

    /// Takes in how far the copy is now. What was there before it began counts for nothing, nor does a step back.
    fn saw(&mut self, bytes: u64, at: Instant) -> u64 {
        let took = at.saturating_duration_since(self.at).as_secs_f64();
        if took > 0.0 && self.bytes > 0 {
            let now = bytes.saturating_sub(self.bytes) as f64 / took;
            let before = self.bytes_per_s.unwrap_or(now);
            self.bytes_per_s = Some(before + RATE_WEIGHT * (now - before));
        }
        (self.at, self.bytes) = (at, bytes);
        self.bytes_per_s.unwrap_or_default() as u64
    }
}

/// Copies, or looks at a copy that the store makes; none when another coordinator took it over, or nobody wants it any
/// more.
async fn copy(shared: &Shared, owner: &str, job: &CopyJob) -> Result<Option<Made>, String> {
    let CopyJob { artifact, encoding, region, .. } = job;
    let no_bucket =
        |region: &RegionName| format!("region {region} is not in this coordinator's configuration");
    let bucket = shared.buckets.get(region).ok_or_else(|| no_bucket(region))?;
    let bytes_done = AtomicU64::new(0);
    let progress = |bytes: u64| bytes_done.store(bytes, Ordering::Relaxed);
    // What the main bucket has lost may still be in another region's.
    let others = shared.queue.regions_with(artifact, encoding).await;
    let others = others.map_err(|error| error.to_string())?;
    let others = others.iter().filter_map(|region| shared.buckets.get(region));
    let sources: Vec<&Bucket> = std::iter::once(&shared.main).chain(others).collect();
    let mut making = std::pin::pin!(async {
        if shared.config.is_observed(region) {
            return observe(bucket, artifact, encoding).await;
        }
        let stats = bucket.mend_from(&sources, artifact, encoding, &job.doubted, progress).await?;
        let written = shared.metrics.replication_bytes.with_label_values(&[region.as_str()]);
        written.inc_by(stats.bytes);
        Ok(Made::Whole { bytes: stats.bytes + stats.skipped_bytes })
    });
    let period = PROGRESS_INTERVAL.min(seconds(shared.config.copy_owned_s) / 3);
    let mut tick = tokio::time::interval(period);
    let mut rate = Rate::new();
    loop {
        tokio::select! {
            made = &mut making => return made.map(Some).map_err(|error: OriginError| error.to_string()),
            _ = tick.tick() => {
                let (done, now) = (bytes_done.load(Ordering::Relaxed), now_ms());
                let until = owned_until(shared, now);
                let bytes_per_s = rate.saw(done, Instant::now());
                let progress = CopyProgress { bytes_done: done, bytes_per_s };
                match shared.queue.copy_progress(job, owner, progress, until).await {
                    Ok(true) => {}
                    Ok(false) => return Ok(None),
                    // The copy itself goes on: objects are write-once, a second copier does no harm.
                    Err(error) => {
                        let error = ApiError::from(error);
                        tracing::debug!(?error, "a copy's progress was not written down");
                    }
                }
            }
        }
    }
}

/// Looks whether a store has brought all of an encoding, and proves it then.
async fn observe(
    bucket: &Bucket,
    artifact: &ArtifactId,
    encoding: &EncodingId,
) -> Result<Made, OriginError> {
    let there = bucket.parts(artifact, encoding).await?;
    let bytes = there.values().sum();
    let reason = match bucket.check(artifact, encoding).await? {
        Check::Whole => {
            bucket.verify(artifact, encoding).await?;
            return Ok(Made::Whole { bytes });
        }
        Check::Absent => "the store's own replication has brought nothing yet".to_string(),
        Check::Missing { index: false, .. } => {
            format!(
                "the store's own replication has brought {} parts and no index yet",
                there.len()
            )
        }
        Check::Missing { index: true, parts } => {
            format!("the store's own replication has not brought {} parts yet", parts.len())
        }
    };
    Ok(Made::Awaited { bytes, reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_of_what_comes_and_not_of_what_was_there() {
        let mut rate = Rate::new();
        let second = |at| rate_start() + Duration::from_secs(at);
        rate.at = second(0);
        assert_eq!(rate.saw(1_000_000, second(1)), 0, "that was there");
        assert_eq!(rate.saw(1_000_500, second(2)), 500);
        assert_eq!(rate.saw(1_001_500, second(3)), 650);
        assert_eq!(rate.saw(900_000, second(4)), 455, "a part is tried again");
    }

    fn rate_start() -> Instant {
        static START: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
        *START
    }

    #[test]
    fn a_reason_says_what_was_lost_and_why_it_is_not_back() {
        let once = not_repaired("lost part-00001", "no room");
        assert_eq!(once, "lost part-00001; not repaired yet: no room");
        assert_eq!(not_repaired(&once, "no key"), "lost part-00001; not repaired yet: no key");
    }

    #[test]
    fn failed_copies_wait_longer_each_time_and_never_much_over_a_minute() {
        let first = Duration::from_secs(1);
        assert_eq!(retry_after(first, 1, 0), first);
        assert_eq!(retry_after(first, 3, 0), first * 4);
        assert_eq!(retry_after(first, 1_000, 0), RETRY_MAX);
        assert!(retry_after(first, u32::MAX, u32::MAX) < RETRY_MAX * 5 / 4);
    }
}
