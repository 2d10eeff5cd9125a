//! Looking for as long as an artifact lives whether every bucket still has it: all of them once a round, and at once
//! what somebody asks for or a region that came back should have.
//!
//! Names and lengths are compared by a listing, the index is proved by its hash, and of the pieces a share is read and proved.
//! What a bucket lost makes the artifact not deployable, with the reason, and is copied again: a region's by `replicate`,
//! the main bucket's here, from the regions that have it. A bucket that does not answer has lost nothing.

use std::{sync::Arc, time::Duration};

use futures::future;
use shoal_origin::{Bucket, CopyStats, Finding, OriginError};
use shoal_proto::{ArtifactId, EncodingId, RegionName};
use shoal_queue::{Bell, Damaged, Inspection, QueueError};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    replicate::{not_repaired, retry_after},
    state::{Shared, bell, chance, ms, myself, now_ms, seconds},
};

/// How often it is looked at most whether something is due, or was made that no inspection knows yet.
const LOOK_MAX: Duration = Duration::from_secs(10);

/// The most pieces of one copy that are read at an inspection.
const SAMPLE_MAX: u32 = 64;

/// The pieces to be read of `count`: a share of them by chance, and one at least.
fn sample(count: u32, share: f64) -> Vec<u32> {
    let wanted = (f64::from(count) * share).ceil().max(1.0) as u32;
    let mut pieces: Vec<u32> = (0..wanted.min(SAMPLE_MAX).min(count))
        .map(|_| ((f64::from(count) * chance()) as u32).min(count.saturating_sub(1)))
        .collect();
    pieces.sort_unstable();
    pieces.dedup();
    pieces
}

/// How long to rest after an inspection, so that a round of `count` fits into its time twice.
fn rest(round: Duration, count: u64, took: Duration) -> Duration {
    let each = round.div_f64(2.0 * count.max(1) as f64);
    each.saturating_sub(took).min(LOOK_MAX)
}

/// Inspects until it is stopped.
pub(crate) async fn run(shared: Arc<Shared>, stop: CancellationToken) {
    let round = seconds(shared.config.inspect_round_s);
    let look = LOOK_MAX.min(round / 4);
    let mut known: Option<(Instant, u64)> = None;
    loop {
        let woken = bell(&shared.upkeep);
        let start = Instant::now();
        let inspected = async {
            let count = match known {
                Some((at, count)) if at.elapsed() < look => count,
                _ => shared.queue.inspect_all().await?,
            };
            known = Some((start, count));
            let next = shared.queue.next_inspection(now_ms() - ms(round)).await?;
            if let Some(it) = &next {
                one(&shared, it).await?;
            }
            Ok::<_, QueueError>((next, count))
        };
        let pause = match inspected.await {
            Ok((Some(it), _)) if it.urgent => Duration::ZERO,
            Ok((Some(_), count)) => rest(round, count, start.elapsed()),
            Ok((None, _)) => look,
            Err(error) => {
                tracing::warn!(%error, "cannot inspect copies");
                shared.metrics.task_failures.with_label_values(&["inspection"]).inc();
                look
            }
        };
        tokio::select! {
            () = woken => {}
            () = tokio::time::sleep(pause) => {}
            () = stop.cancelled() => return,
        }
    }
}

/// Inspects an encoding in all buckets that should have it.
async fn one(shared: &Shared, it: &Inspection) -> Result<(), QueueError> {
    let share = shared.config.inspect_share;
    let look = |name: String, bucket: Bucket| async move {
        let found = bucket.inspect(&it.artifact, &it.encoding, |count| sample(count, share)).await;
        let result = match &found {
            Ok(Finding::Whole { read_bytes }) => {
                shared.metrics.inspected_bytes.with_label_values(&[&name]).inc_by(*read_bytes);
                "whole"
            }
            Ok(Finding::Damaged { .. }) => "damaged",
            Err(_) => "unreachable",
        };
        shared.metrics.inspections.with_label_values(&[&name, result]).inc();
        if let Err(error) = &found {
            tracing::warn!(artifact = %it.artifact, bucket = name, %error, "a copy could not be inspected");
        }
        found.ok()
    };
    let regions = it.regions.iter().filter_map(|region| {
        let bucket = shared.buckets.get(region)?.clone();
        Some(async move { (region, look(region.to_string(), bucket).await) })
    });
    let (main, regions) =
        future::join(look("main".into(), shared.main.clone()), future::join_all(regions)).await;
    let mut seen = Vec::new();
    for (region, found) in regions {
        match found {
            Some(Finding::Whole { .. }) => seen.push(region.clone()),
            Some(Finding::Damaged { reason, doubted }) => {
                let what = (reason.as_str(), doubted.as_slice());
                copy_damaged(shared, (it.artifact, it.encoding), region, what).await?;
            }
            None => {}
        }
    }
    if let Some(Finding::Damaged { reason, doubted }) = main {
        let what = (reason.as_str(), doubted.as_slice());
        let of = (&it.artifact, &it.encoding);
        if shared.queue.main_damaged(of, what, &myself(), now_ms()).await? {
            tracing::error!(artifact = %it.artifact, reason, "the main bucket is damaged");
            shared.ring(Bell::Upkeep);
        }
    }
    shared.queue.inspected(it, &seen, now_ms()).await
}

/// Repairs the main bucket until it is stopped.
pub(crate) async fn repair(shared: Arc<Shared>, stop: CancellationToken) {
    let interval = seconds(shared.config.replication_interval_s);
    loop {
        let woken = bell(&shared.upkeep);
        let more = match shared.queue.next_repair(now_ms()).await {
            Ok(Some(it)) => {
                tokio::select! {
                    () = mend(&shared, &it) => {}
                    () = stop.cancelled() => return,
                }
                true
            }
            Ok(None) => false,
            Err(error) => {
                tracing::warn!(%error, "cannot look for what is to be repaired");
                shared.metrics.task_failures.with_label_values(&["repair"]).inc();
                false
            }
        };
        if more {
            continue;
        }
        tokio::select! {
            () = woken => {}
            () = tokio::time::sleep(interval) => {}
            () = stop.cancelled() => return,
        }
    }
}

/// Where no region has it: whether whoever has the file has brought it again. Until then what is damaged has no index, so
/// that the bucket takes its parts.
async fn brought_again(main: &Bucket, it: &Damaged) -> Result<CopyStats, OriginError> {
    let proved = main.verify(&it.artifact, &it.encoding).await;
    if proved.as_ref().is_err_and(is_damage) {
        main.remove_index(&it.artifact, &it.encoding).await?;
    }
    proved.map(|()| CopyStats::default())
}

/// Whether an error says that bytes are wrong or missing, and not that a bucket does not answer.
fn is_damage(error: &OriginError) -> bool {
    use OriginError::{Index, Mismatch, NotFound};
    matches!(error, Mismatch { .. } | Index { .. } | NotFound { .. })
}

/// Reads the copies that were to repair the main bucket and could not, whole: a sample had not found what is wrong in them.
/// What is damaged is no source any more.
async fn disprove(shared: &Shared, it: &Damaged) {
    for region in &it.regions {
        let Some(bucket) = shared.buckets.get(region) else { continue };
        let found = bucket.inspect(&it.artifact, &it.encoding, |count| (0..count).collect()).await;
        let Ok(Finding::Damaged { reason, doubted }) = found else { continue };
        if let Err(error) =
            copy_damaged(shared, (it.artifact, it.encoding), region, (&reason, &doubted)).await
        {
            tracing::warn!(artifact = %it.artifact, %region, %error, "damage was not written down");
        }
    }
}

/// Writes down that a region's copy is damaged.
async fn copy_damaged(
    shared: &Shared,
    (artifact, encoding): (ArtifactId, EncodingId),
    region: &RegionName,
    (reason, doubted): (&str, &[u32]),
) -> Result<(), QueueError> {
    let of = (&artifact, &encoding, region);
    if shared.queue.copy_damaged(of, (reason, doubted), &myself(), now_ms()).await? {
        tracing::error!(%artifact, %region, reason, "a copy is damaged");
        shared.ring(Bell::Copies);
    }
    Ok(())
}

async fn mend(shared: &Shared, it: &Damaged) {
    let artifact = it.artifact;
    let sources: Vec<&Bucket> =
        it.regions.iter().filter_map(|region| shared.buckets.get(region)).collect();
    let mended = if sources.is_empty() {
        brought_again(&shared.main, it).await
    } else {
        shared.main.mend_from(&sources, &artifact, &it.encoding, &it.doubted, |_| {}).await
    };
    let told = match mended {
        Ok(stats) => {
            tracing::info!(%artifact, bytes = stats.bytes, "the main bucket is repaired");
            shared.metrics.repairs.with_label_values(&["main"]).inc();
            shared.queue.main_repaired((&artifact, &it.encoding), &myself(), now_ms()).await
        }
        Err(error) => {
            tracing::warn!(%artifact, %error, "the main bucket was not repaired; it is tried again");
            let why = match sources.is_empty() {
                true => {
                    "no region in service has it: publish it again, or undrain a region that has it"
                        .to_string()
                }
                false => error.to_string(),
            };
            if is_damage(&error) {
                disprove(shared, it).await;
            }
            let reason = not_repaired(&it.damage, &why);
            let first = seconds(shared.config.copy_retry_s);
            let next = now_ms() + ms(retry_after(first, it.tries + 1, 0));
            shared.queue.repair_failed(it, &reason, next).await.map(|()| false)
        }
    };
    if let Ok(true) = told {
        shared.ring(Bell::Copies);
    }
    if let Err(error) = told {
        tracing::warn!(%artifact, %error, "how a repair ended was not written down");
        tokio::time::sleep(seconds(shared.config.copy_retry_s)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_a_share_and_never_nothing() {
        assert_eq!(sample(0, 0.5), Vec::<u32>::new());
        assert_eq!(sample(1, 0.001), [0]);
        assert!((1..=64).contains(&sample(60_000, 1.0).len()));
        assert!(sample(2_400, 0.01).iter().all(|piece| *piece < 2_400));
    }

    #[test]
    fn a_round_fits_into_its_time_twice() {
        let day = Duration::from_secs(86_400);
        let took = Duration::from_secs(1);
        assert_eq!(rest(day, 43_200, took), Duration::ZERO);
        assert_eq!(rest(day, 10_800, took), Duration::from_secs(3));
        assert_eq!(rest(day, 0, took), LOOK_MAX);
    }
}
