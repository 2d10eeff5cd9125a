//! What machines have reported, counted: for a large fleet ready for whoever looks, and counted anew by one at a time.
//!
//! Counting 100,000 reports takes the database some 30 ms, many times as long while they come in, and a page or a person that
//! watches a rollout asks again and again. So what was counted is kept for a moment, and counted anew beside the answers. It is
//! kept in memory alone: each coordinator counts for itself, and after a restart the first who asks waits.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use shoal_proto::{AppName, state::RolloutStatus};
use shoal_queue::{Progress, Queue, QueueError, Rollout};

use crate::state::lock;

/// So many reports are counted for each who asks: that takes as long as any other query.
const COUNTED_EACH_TIME: u64 = 5_000;

/// A count that is older is done anew while it is still told.
const ANEW_AFTER: Duration = Duration::from_millis(250);

/// Counting takes at most one part in so many of the time.
const REST_FACTOR: u32 = 4;

/// A count that is older is not told any more: whoever asks waits for the next.
const OLD_MAX: Duration = Duration::from_secs(2);

/// What was counted, and when.
#[derive(Clone)]
struct Count {
    progress: Arc<Progress>,
    began: Instant,
    took: Duration,
}

impl Count {
    /// Whether it is told to others than who counted.
    fn is_kept(&self) -> bool {
        let machines: u64 = self.progress.values().flat_map(|region| region.states.values()).sum();
        machines > COUNTED_EACH_TIME
    }

    fn is_due(&self) -> bool {
        self.began.elapsed() >= ANEW_AFTER.max(self.took * REST_FACTOR)
    }
}

/// The count of one rollout in one of its states: what ends it is seen in what is counted afterwards.
struct Slot {
    rollout: (i64, RolloutStatus),
    count: Mutex<Option<Count>>,
    /// Who counts has it.
    turn: Arc<tokio::sync::Mutex<()>>,
}

impl Slot {
    /// Keeps a count, unless a later one is there.
    fn keep(&self, count: Count) {
        let mut kept = lock(&self.count);
        if kept.as_ref().is_none_or(|kept| kept.began < count.began) {
            *kept = Some(count).filter(Count::is_kept);
        }
    }

    async fn count(&self, queue: &Queue, rollout: &Rollout) -> Result<Arc<Progress>, QueueError> {
        let began = Instant::now();
        let progress = Arc::new(queue.progress(&rollout.app, rollout.revision).await?);
        self.keep(Count { progress: progress.clone(), began, took: began.elapsed() });
        Ok(progress)
    }
}

/// The counts of the apps' newest rollouts: one an app.
#[derive(Default)]
pub(crate) struct Counted {
    slots: Mutex<HashMap<AppName, Arc<Slot>>>,
}

impl Counted {
    fn slot(&self, rollout: &Rollout) -> Arc<Slot> {
        let mut slots = lock(&self.slots);
        let of = (rollout.id, rollout.status);
        match slots.get(&rollout.app) {
            Some(slot) if slot.rollout == of => slot.clone(),
            // Somebody who read it before its end or before the next one came.
            Some(slot) if slot.rollout.0 > of.0 => Arc::new(Slot::new(of)),
            _ => {
                let slot = Arc::new(Slot::new(of));
                slots.insert(rollout.app.clone(), slot.clone());
                slot
            }
        }
    }

    /// What the machines have reported about a rollout's goal: exactly now for a few thousand, else as it was within the last two
    /// seconds.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub(crate) async fn progress(
        &self,
        queue: &Queue,
        rollout: &Rollout,
    ) -> Result<Arc<Progress>, QueueError> {
        let (asked, slot) = (Instant::now(), self.slot(rollout));
        let kept = lock(&slot.count).clone();
        let Some(kept) = kept else { return slot.count(queue, rollout).await };
        if kept.began.elapsed() >= OLD_MAX {
            let _turn = slot.turn.lock().await;
            // Somebody who came before may have counted.
            let kept = lock(&slot.count).clone().filter(|kept| kept.began >= asked);
            return match kept {
                Some(kept) => Ok(kept.progress),
                None => slot.count(queue, rollout).await,
            };
        }
        if kept.is_due()
            && let Ok(turn) = slot.turn.clone().try_lock_owned()
        {
            let (queue, rollout, slot) = (queue.clone(), rollout.clone(), slot.clone());
            tokio::spawn(async move {
                let _turn = turn;
                if let Err(error) = slot.count(&queue, &rollout).await {
                    tracing::warn!(%error, rollout = rollout.id, "cannot count what machines reported");
                }
            });
        }
        Ok(kept.progress)
    }

    /// Keeps what was counted from `began` on for a reason of its own.
    pub(crate) fn note(&self, rollout: &Rollout, progress: &Progress, began: Instant) {
        let count = Count { progress: Arc::new(progress.clone()), began, took: began.elapsed() };
        if rollout.newest && count.is_kept() {
            self.slot(rollout).keep(count);
        }
    }
}

impl Slot {
    fn new(rollout: (i64, RolloutStatus)) -> Self {
        Self { rollout, count: Mutex::default(), turn: Arc::default() }
    }
}

#[cfg(test)]
mod tests {
    use shoal_proto::{
        ArtifactId, EncodingId, MachineName, RegionName, Revision,
        goal::RolloutPlan,
        region::{FetchProgress, MachineReport},
        state::MachineState,
    };
    use shoal_queue::{StateSeen, sqlite_url};

    use super::*;

    fn rollout(status: RolloutStatus) -> Rollout {
        Rollout {
            id: 1,
            app: "web".parse().unwrap(),
            revision: Revision { epoch: 1, number: 1 },
            artifact: ArtifactId::EMPTY,
            encoding: EncodingId([0; 32]),
            encoded_bytes: 0,
            artifact_name: "web/a".into(),
            status,
            reason: None,
            rollback: false,
            selector: String::new(),
            plan: RolloutPlan::default(),
            targets: shoal_queue::Targets::new(),
            summary: None,
            created_at_ms: 0,
            finished_at_ms: None,
            paused_at_ms: None,
            paused_ms: 0,
            requested_by: "alice".into(),
            newest: true,
        }
    }

    /// The first `count` machines report a state.
    async fn report(queue: &Queue, count: u64, state: MachineState, sequence: u64) {
        let seen = |at: u64| StateSeen {
            machine: MachineName::new(format!("m{at}")).unwrap(),
            report: MachineReport {
                app: "web".parse().unwrap(),
                revision: Revision { epoch: 1, number: 1 },
                artifact: ArtifactId::EMPTY,
                state,
                reason: None,
                progress: FetchProgress::default(),
                sequence,
                age_ms: 0,
            },
            state_at_ms: 1,
        };
        let states: Vec<_> = (0..count).map(seen).collect();
        let region: RegionName = "eu".parse().unwrap();
        queue.keep_reports(&region, &[], &states).await.unwrap();
    }

    fn active(progress: &Progress) -> u64 {
        let states = progress.values().flat_map(|region| &region.states);
        states.filter(|(state, _)| **state == MachineState::Active).map(|(_, count)| count).sum()
    }

    async fn open() -> (tempfile::TempDir, Queue) {
        let dir = tempfile::tempdir().unwrap();
        let queue = Queue::open(&sqlite_url(&dir.path().join("test.sqlite"))).await.unwrap();
        (dir, queue)
    }

    #[tokio::test]
    async fn a_small_fleet_is_counted_for_each_who_asks() {
        let (_dir, queue) = open().await;
        let (counted, running) = (Counted::default(), rollout(RolloutStatus::Running));
        for sequence in 1..5 {
            report(&queue, sequence * 10, MachineState::Active, sequence).await;
            let progress = counted.progress(&queue, &running).await.unwrap();
            assert_eq!(active(&progress), sequence * 10);
        }
    }

    #[tokio::test]
    async fn a_large_fleet_is_counted_by_one_at_a_time_and_anew_after_the_end() {
        let (_dir, queue) = open().await;
        let (counted, running) = (Counted::default(), rollout(RolloutStatus::Running));
        let all = COUNTED_EACH_TIME + 1;
        report(&queue, all, MachineState::Fetching, 1).await;
        assert_eq!(active(&counted.progress(&queue, &running).await.unwrap()), 0);
        report(&queue, all, MachineState::Active, 2).await;
        // Whoever asks is told what was counted, and it is counted anew meanwhile.
        let slot = counted.slot(&running);
        let turn = slot.turn.clone().lock_owned().await;
        let kept = lock(&slot.count).clone().unwrap();
        let late = Count { began: Instant::now() - OLD_MAX / 2, ..kept };
        *lock(&slot.count) = Some(late.clone());
        assert_eq!(
            active(&counted.progress(&queue, &running).await.unwrap()),
            0,
            "somebody counts"
        );
        drop(turn);
        let start = Instant::now();
        while active(&counted.progress(&queue, &running).await.unwrap()) != all {
            assert!(start.elapsed() < Duration::from_secs(20), "nobody counts anew");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // Too old: whoever asks waits.
        *lock(&slot.count) = Some(Count { began: Instant::now() - OLD_MAX, ..late.clone() });
        assert_eq!(active(&counted.progress(&queue, &running).await.unwrap()), all);
        // What was counted before a rollout's end is not told of the rollout that has ended.
        *lock(&slot.count) = Some(Count { began: Instant::now(), ..late });
        assert_eq!(active(&counted.progress(&queue, &running).await.unwrap()), 0);
        let ended = rollout(RolloutStatus::Succeeded);
        assert_eq!(active(&counted.progress(&queue, &ended).await.unwrap()), all);
    }
}
