//! Taking the objects of deleted artifacts out of the buckets: in the regions the index first, so that nobody begins to read,
//! then the parts, and then the same in the main bucket.
//!
//! How a removal and an upload of the same content are kept apart stands in `shoal-queue`. What is left to this side: a run
//! takes nothing any more once its ownership was not confirmed for a while, and waits until copies of its own into the regions have
//! stopped. A bucket that does not answer is left for a later run.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::future;
use shoal_origin::{Bucket, OriginError};
use shoal_proto::{EncodingId, RegionName};
use shoal_queue::{QueueError, Removal};
use tokio::{task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    replicate::retry_after,
    state::{Shared, bell, lock, ms, now_ms, seconds},
};

/// How long one bucket may take in a run; what is left is the next run's.
const BUCKET_TIME_MAX: Duration = Duration::from_secs(30);

/// How often a bucket is listed again until nothing is there.
const LISTINGS_MAX: usize = 5;

/// How often it is looked for what is due, when nobody rings.
const LOOK: Duration = Duration::from_secs(10);

/// How often a copy that is to stop is looked at.
const COPY_STOPS: Duration = Duration::from_millis(50);

/// The copies that this process makes, by encoding.
#[derive(Default)]
pub(crate) struct UnderWay(Mutex<BTreeMap<EncodingId, usize>>);

/// A copy under way, for as long as it is held.
pub(crate) struct Goes<'a>(&'a UnderWay, EncodingId);

impl UnderWay {
    pub(crate) fn begin(&self, encoding: EncodingId) -> Goes<'_> {
        *lock(&self.0).entry(encoding).or_default() += 1;
        Goes(self, encoding)
    }

    fn has(&self, encoding: &EncodingId) -> bool {
        lock(&self.0).contains_key(encoding)
    }
}

impl Drop for Goes<'_> {
    fn drop(&mut self) {
        let mut all = lock(&self.0.0);
        match all.get_mut(&self.1) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(all.remove(&self.1)),
        }
    }
}

/// Removes until it is stopped.
pub(crate) async fn run(shared: Arc<Shared>, owner: String, stop: CancellationToken) {
    let owned = seconds(shared.config.copy_owned_s);
    loop {
        let woken = bell(&shared.upkeep);
        let now = now_ms();
        let runs = match shared.queue.take_removals(&owner, now, now + ms(owned)).await {
            Ok(runs) => runs,
            Err(error) => {
                tracing::warn!(%error, "cannot look for objects to remove");
                shared.metrics.task_failures.with_label_values(&["removal"]).inc();
                Vec::new()
            }
        };
        let any = !runs.is_empty();
        // At once, so that each is confirmed from the beginning: `RUNS_MAX` of the queue bounds them.
        let mut going = JoinSet::new();
        for run in runs {
            let (shared, owner) = (shared.clone(), owner.clone());
            going.spawn(async move { one(&shared, &owner, &run).await });
        }
        loop {
            tokio::select! {
                ended = going.join_next() => match ended {
                    None => break,
                    Some(Ok(())) => {}
                    Some(Err(error)) => tracing::error!(%error, "a removal panicked"),
                },
                () = stop.cancelled() => return,
            }
        }
        if any {
            continue;
        }
        tokio::select! {
            () = woken => {}
            () = tokio::time::sleep(LOOK.min(owned)) => {}
            () = stop.cancelled() => return,
        }
    }
}

/// What a run took.
#[derive(Default)]
struct Gone {
    regions: Vec<RegionName>,
    main: bool,
}

/// Carries out a run, for as long as it is this process's.
async fn one(shared: &Shared, owner: &str, run: &Removal) {
    let owned = seconds(shared.config.copy_owned_s);
    let confirmed = Mutex::new(Instant::now());
    let may = || lock(&confirmed).elapsed() < owned / 2;
    let keep = async {
        let mut tick = tokio::time::interval(owned / 6);
        loop {
            tick.tick().await;
            let start = Instant::now();
            match shared.queue.removal_goes_on(run, owner, now_ms() + ms(owned)).await {
                Ok(true) => *lock(&confirmed) = start,
                Ok(false) => return,
                Err(error) => tracing::debug!(%error, "a removal was not prolonged"),
            }
            if !may() {
                return;
            }
        }
    };
    let gone = tokio::select! {
        gone = take_away(shared, run, &may) => gone,
        () = keep => {
            tracing::warn!(encoding = %run.encoding, "a removal is given up: it is not certain any more that it is ours");
            return;
        }
    };
    let next = now_ms() + ms(retry_after(seconds(shared.config.copy_retry_s), run.tries, 0));
    let ended = shared.queue.removal_ends(run, owner, (&gone.regions, gone.main), next).await;
    let whole = gone.main && gone.regions.len() == run.regions.len();
    let result = if whole { "gone" } else { "later" };
    shared.metrics.removals.with_label_values(&[result]).inc();
    match ended {
        Ok(_) => tracing::info!(
            artifact = %run.artifact, encoding = %run.encoding, regions = gone.regions.len(), main = gone.main,
            "objects were removed"
        ),
        // Its time ends, and another run finds nothing left.
        Err(error) => tracing::warn!(%error, "the end of a removal was not written down"),
    }
}

async fn take_away(shared: &Shared, run: &Removal, may: &(impl Fn() -> bool + Sync)) -> Gone {
    // Copies hear within a second that they are not wanted; what they wrote until then is in the listing.
    while shared.copies_under_way.has(&run.encoding) {
        tokio::time::sleep(COPY_STOPS).await;
    }
    let of = |region: &RegionName| Some((region.clone(), shared.buckets.get(region)?.clone()));
    let buckets: Vec<(RegionName, Bucket)> = run.regions.iter().filter_map(of).collect();
    let indexes = buckets.iter().map(|(region, bucket)| async move {
        let removed = bucket.remove_index(&run.artifact, &run.encoding);
        answers(region.as_str(), removed).await.map(|()| (region, bucket))
    });
    let reached = future::join_all(indexes).await;
    let parts = reached.into_iter().flatten().map(|(region, bucket)| async move {
        let removed = remove_parts(bucket, run, may);
        answers(region.as_str(), removed).await.filter(|all| *all).map(|_| region.clone())
    });
    let regions = future::join_all(parts).await.into_iter().flatten().collect();
    let mut gone = Gone { regions, main: !run.main };
    if run.main {
        let removed = async {
            shared.main.remove_index(&run.artifact, &run.encoding).await?;
            remove_parts(&shared.main, run, may).await
        };
        gone.main = answers("main", removed).await.unwrap_or(false);
    }
    gone
}

async fn remove_parts(
    bucket: &Bucket,
    run: &Removal,
    may: &(impl Fn() -> bool + Sync),
) -> Result<bool, OriginError> {
    for _ in 0..LISTINGS_MAX {
        if bucket.remove_parts(&run.artifact, &run.encoding, may).await? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A bucket's answer; none when it fails or takes too long.
async fn answers<T>(name: &str, what: impl Future<Output = Result<T, OriginError>>) -> Option<T> {
    match tokio::time::timeout(BUCKET_TIME_MAX, what).await {
        Ok(Ok(done)) => Some(done),
        Ok(Err(error)) => {
            tracing::warn!(bucket = name, %error, "objects were not removed; it is tried again");
            None
        }
        Err(_) => {
            tracing::warn!(
                bucket = name,
                "objects were not removed: the bucket does not answer; it is tried again"
            );
            None
        }
    }
}

/// Waits until nobody removes an encoding's objects, and says which generation they are then: to be asked before the main
/// bucket is looked at.
pub(crate) async fn generation(
    shared: &Shared,
    artifact: &shoal_proto::ArtifactId,
    encoding: &EncodingId,
) -> Result<i64, QueueError> {
    let until = Instant::now() + seconds(shared.config.long_poll_s);
    loop {
        if let Some(generation) = shared.queue.generation(artifact, encoding).await? {
            return Ok(generation);
        }
        if Instant::now() >= until {
            return Err(QueueError::ObjectsGone(*encoding));
        }
        tokio::time::sleep(COPY_STOPS).await;
    }
}
