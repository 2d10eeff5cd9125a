//! What the API and the background tasks share.

use std::{
    collections::{BTreeMap, HashMap},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use shoal_goals::EtcdStore;
use shoal_origin::Bucket;
use shoal_process::Membership;
use shoal_proto::{MachineName, RegionName};
use shoal_queue::{Actor, Backoff, Bell, Queue};
use tokio::sync::{Notify, Semaphore, futures::Notified};
use tokio_util::sync::CancellationToken;

use crate::{
    api::{Failures, Noted},
    config::Config,
    counted::Counted,
    hooks::Limit,
    logs::Logs,
    metrics::Metrics,
    recover::Recovery,
    registry::Registry,
    removal::UnderWay,
    secrets::Secrets,
    uploads::PartHashes,
};

/// How often a region process's being alive is written down.
const SEEN_INTERVAL: Duration = Duration::from_secs(5);

/// How often a worker's being alive is written down: seven writes a second with a hundred of them.
const WORKER_SEEN_INTERVAL: Duration = Duration::from_secs(15);

/// A worker that was not heard of for this long is gone, and another process may have its name: four of those.
pub(crate) const WORKER_GONE: Duration = Duration::from_secs(60);

/// What the API and the tasks share.
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) queue: Queue,
    pub(crate) main: Bucket,
    pub(crate) buckets: BTreeMap<RegionName, Bucket>,
    /// Where goals are told beside the database.
    pub(crate) goal_store: Option<EtcdStore>,
    /// The recovery that is under way, if any.
    pub(crate) recovery: Mutex<Option<Recovery>>,
    /// This process's certificate, and whom it believes.
    pub(crate) membership: Arc<Membership>,
    /// Members that were written down.
    pub(crate) noted: Noted,
    /// Wrong join tokens.
    pub(crate) join_failures: Failures,
    pub(crate) logs: Logs,
    pub(crate) registry: Registry,
    pub(crate) counted: Counted,
    pub(crate) part_hashes: PartHashes,
    pub(crate) metrics: Metrics,
    /// A job waits.
    pub(crate) job_waits: Notify,
    /// A copy waits.
    pub(crate) copy_waits: Notify,
    /// Objects are to be removed, or inspected at once.
    pub(crate) upkeep: Notify,
    /// The copies that this process makes.
    pub(crate) copies_under_way: UnderWay,
    /// The cursor of the goals moved.
    pub(crate) goals_moved: Notify,
    /// Something happened that may end a rollout.
    pub(crate) rollouts_moved: Notify,
    /// A job that runs is to be stopped.
    pub(crate) cancels: Notify,
    /// When each worker's process was last written down, by the worker's name.
    pub(crate) workers: Mutex<HashMap<MachineName, (String, Instant)>>,
    /// When each region process's being alive was last written down.
    pub(crate) seen: Mutex<HashMap<(RegionName, MachineName), Instant>>,
    /// When tokens' uses were last written down, by the token's number.
    pub(crate) tokens_used: Mutex<HashMap<i64, i64>>,
    /// The OpenAPI document.
    pub(crate) openapi: serde_json::Value,
    /// Something happened that has no number yet.
    pub(crate) happened: Notify,
    /// Events got numbers.
    pub(crate) events_moved: Notify,
    /// Places for streams of events.
    pub(crate) streams: Arc<Semaphore>,
    /// Seals secrets in the database.
    pub(crate) secrets: Secrets,
    /// Tells webhooks.
    pub(crate) webhook_client: reqwest::Client,
    /// How often strangers may call.
    pub(crate) hook_limit: Limit,
    /// Places for their bodies.
    pub(crate) hook_places: Semaphore,
    /// The process stops.
    pub(crate) stop: CancellationToken,
}

/// Milliseconds since the Unix epoch.
pub(crate) fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// A duration in milliseconds.
pub(crate) fn ms(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// A configured time.
pub(crate) fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

/// The coordinator itself, where the audit log asks who.
pub(crate) fn myself() -> Actor {
    Actor { name: "coordinator".into(), origin: String::new(), request: None }
}

/// A number from 0 to 1 by chance.
pub(crate) fn chance() -> f64 {
    let mut bytes = [0; 4];
    // Without chance waits are as long as they may be.
    match aws_lc_rs::rand::fill(&mut bytes) {
        Ok(()) => f64::from(u32::from_le_bytes(bytes)) / f64::from(u32::MAX),
        Err(_) => 0.0,
    }
}

/// Locks a mutex; what a panicking holder left is still consistent in all of them.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// This coordinator's name, by its certificate.
    pub(crate) fn machine(&self) -> MachineName {
        self.membership.identity().member().machine.clone()
    }

    /// Wakes those who wait for something, here and at the other coordinators.
    pub(crate) fn ring(&self, bell: Bell) {
        self.wake(bell);
        self.queue.ring(bell);
    }

    /// Wakes those who wait for something here.
    pub(crate) fn wake(&self, bell: Bell) {
        // Whatever rings may have happened just now.
        self.happened.notify_waiters();
        match bell {
            Bell::Jobs => self.job_waits.notify_waiters(),
            Bell::Copies => self.copy_waits.notify_one(),
            Bell::Upkeep => self.upkeep.notify_waiters(),
            Bell::Goals => self.goals_moved.notify_waiters(),
            Bell::Rollouts => self.rollouts_moved.notify_one(),
            Bell::Cancels => self.cancels.notify_waiters(),
            Bell::Events => self.events_moved.notify_waiters(),
        }
    }

    /// The regions of the configuration.
    pub(crate) fn region_names(&self) -> Vec<RegionName> {
        self.buckets.keys().cloned().collect()
    }

    /// Begins a long poll of at most `wait_s` or the configured time. Its caller registers with a bell
    /// ([`bell`]), looks, and if it found nothing waits; again until [`LongPoll::wait`] says that it is over.
    pub(crate) fn long_poll(&self, wait_s: u32) -> LongPoll {
        let longest = seconds(self.config.long_poll_s);
        let until = Instant::now() + longest.min(Duration::from_secs(u64::from(wait_s)));
        let look_again = seconds(self.config.look_again_s);
        LongPoll { until, look_again, stop: self.stop.clone() }
    }

    /// How long jobs wait before their next attempt, by chance anew for each call.
    pub(crate) fn backoff(&self) -> Backoff {
        let in_ms = |seconds: f64| (seconds * 1_000.0) as u64;
        let (first_ms, max_ms) = (in_ms(self.config.backoff_s), in_ms(self.config.backoff_max_s));
        Backoff { first_ms, max_ms, random: chance() }
    }

    /// Whether it is to be written down now that a worker is alive, or that this process of its is new.
    pub(crate) fn is_worker_due(&self, worker: &MachineName, incarnation: Option<&str>) -> bool {
        let seen = lock(&self.workers);
        seen.get(worker).is_none_or(|(known, last)| {
            incarnation.is_some_and(|incarnation| incarnation != known)
                || last.elapsed() >= WORKER_SEEN_INTERVAL
        })
    }

    /// It was. Certificates bound the keys: one entry a worker of the cluster.
    pub(crate) fn worker_written(&self, worker: &MachineName, incarnation: Option<&str>) {
        let mut seen = lock(&self.workers);
        let known = seen.remove(worker).map(|(known, _)| known).unwrap_or_default();
        let incarnation = incarnation.map_or(known, ToString::to_string);
        seen.insert(worker.clone(), (incarnation, Instant::now()));
    }

    /// Whether a region process's being alive is to be written down now.
    pub(crate) fn is_seen_due(&self, region: &RegionName, machine: &MachineName) -> bool {
        let mut seen = lock(&self.seen);
        // Certificates bound the keys: one entry a region process of the cluster.
        let key = (region.clone(), machine.clone());
        let due = seen.get(&key).is_none_or(|last| last.elapsed() >= SEEN_INTERVAL);
        if due {
            seen.insert(key, Instant::now());
        }
        due
    }
}

/// A long poll under way.
pub(crate) struct LongPoll {
    until: Instant,
    look_again: Duration,
    stop: CancellationToken,
}

impl LongPoll {
    /// Waits for the bell, or until it is time to look again. False: the time is over.
    pub(crate) async fn wait(&self, bell: Pin<Box<Notified<'_>>>) -> bool {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() || self.stop.is_cancelled() {
            return false;
        }
        tokio::select! {
            () = bell => {}
            () = tokio::time::sleep(left.min(self.look_again)) => {}
            () = self.stop.cancelled() => {}
        }
        true
    }
}

/// Registers with a bell: what rings it from now on is not missed between a look and the wait.
pub(crate) fn bell(notify: &Notify) -> Pin<Box<Notified<'_>>> {
    let mut bell = Box::pin(notify.notified());
    bell.as_mut().enable();
    bell
}

/// A fresh random token in hexadecimal.
pub(crate) fn random_token() -> anyhow::Result<String> {
    let mut bytes = [0; 16];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| anyhow::anyhow!("no random bytes to be had"))?;
    Ok(hex(&bytes))
}

/// Bytes in hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a String does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
