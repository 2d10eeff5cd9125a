//! Finding jobs whose worker is gone.
//!
//! A job is lost when *this process has watched* its heartbeat stand still for the whole loss window.
//! No clock is compared with another one (a heartbeat may have been stamped by another coordinator): a
//! new process, or one that was stopped or cut off from the database for a while, starts to watch anew
//! and so waits a full window by construction. The verdict is carried out by compare-and-set on the very
//! heartbeat that was watched, so one that came in between wins.
//!
//! A network that fails makes many workers silent at once, and comes back. So only some jobs are given on at a look
//! ([`ReapLimit`]); the others are looked at again, and whose worker is heard of meanwhile goes on.

use std::{cmp::Reverse, collections::HashMap};

use shoal_proto::state::{JobStatus, Priority};

use crate::{
    backoff::Backoff,
    db::Queue,
    error::Result,
    finish::take_back,
    jobs::{Job, Lease, job_in},
};

/// What is remembered of a running job.
#[derive(Debug)]
struct Seen {
    attempt: u32,
    heartbeat_ms: i64,
    since_ms: u64,
}

/// Watches the running jobs' heartbeats.
#[derive(Debug)]
pub struct Watch {
    window_ms: u64,
    /// A pause between two looks that is longer than this was an outage of the watcher.
    gap_max_ms: u64,
    last_look_ms: Option<u64>,
    seen: HashMap<i64, Seen>,
}

/// A job whose worker is gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    job: i64,
    lease: Lease,
    heartbeat_ms: i64,
    silent_ms: u64,
    priority: Priority,
}

/// How many lost jobs are given on at one look.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ReapLimit {
    /// So many,
    pub jobs: usize,
    /// or this share of those that run, whichever is more.
    pub share: f64,
}

impl ReapLimit {
    /// Keeps those that are given on now: the longest silent, and of equals the most urgent. Returns how many have to
    /// wait for another look.
    pub fn apply(&self, lost: &mut Vec<Lost>, running: usize) -> usize {
        let share = (running as f64 * self.share.clamp(0.0, 1.0)) as usize;
        lost.sort_by_key(|lost| (Reverse(lost.silent_ms), lost.priority, lost.job));
        let waiting = lost.len().saturating_sub(self.jobs.max(share));
        lost.truncate(lost.len() - waiting);
        waiting
    }
}

impl Lost {
    /// The job.
    #[must_use]
    pub fn job(&self) -> i64 {
        self.job
    }
}

impl Watch {
    /// A job is lost after `window_ms` without a heartbeat; [`Watch::look`] is called about every
    /// `interval_ms`.
    #[must_use]
    pub fn new(window_ms: u64, interval_ms: u64) -> Self {
        // Half a window late is more than a slow query, and still leaves room to see a heartbeat.
        let gap_max_ms = interval_ms.saturating_add(window_ms / 2);
        Self { window_ms, gap_max_ms, last_look_ms: None, seen: HashMap::new() }
    }

    /// Looks at all running jobs ([`Queue::running`]), which were asked for at `asked_ms` and came at `came_ms` of a
    /// clock that never goes back, and says which ones are lost. A heartbeat stands still from the moment that it was
    /// read to the moment that it was asked for again: how long an answer took counts for the worker.
    pub fn look(&mut self, asked_ms: u64, came_ms: u64, running: &[Job]) -> Vec<Lost> {
        let gap =
            self.last_look_ms.is_none_or(|last| came_ms.saturating_sub(last) > self.gap_max_ms);
        if gap {
            self.seen.clear();
        }
        self.last_look_ms = Some(came_ms);
        self.seen.retain(|id, _| running.binary_search_by_key(id, |job| job.id).is_ok());
        let mut lost = Vec::new();
        for job in running {
            let (Some(heartbeat_ms), Some(token)) = (job.last_heartbeat_ms, &job.lease) else {
                continue;
            };
            let fresh = Seen { attempt: job.attempt, heartbeat_ms, since_ms: came_ms };
            let seen = self.seen.entry(job.id).or_insert(fresh);
            if (seen.attempt, seen.heartbeat_ms) != (job.attempt, heartbeat_ms) {
                *seen = Seen { attempt: job.attempt, heartbeat_ms, since_ms: came_ms };
            }
            let silent_ms = asked_ms.saturating_sub(seen.since_ms);
            if silent_ms >= self.window_ms {
                let lease = Lease { attempt: job.attempt, token: token.clone() };
                let (job, priority) = (job.id, job.priority);
                lost.push(Lost { job, lease, heartbeat_ms, silent_ms, priority });
            }
        }
        lost
    }
}

impl Queue {
    /// Takes a lost job from its worker: back to its old place in the queue, FAILED after its last attempt,
    /// CANCELLED when that was asked for. Returns its new state; none when a heartbeat or an end came in
    /// between.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn reap(
        &self,
        lost: &Lost,
        backoff: Backoff,
        now_ms: i64,
    ) -> Result<Option<JobStatus>> {
        let mut tx = self.write().await?;
        // Read under the write lock: a cancel that came in since counts.
        let job = job_in(&mut tx, lost.job).await?;
        let worker = job.worker.as_deref().unwrap_or("its worker");
        let silent_s = lost.silent_ms as f64 / 1_000.0;
        let why = format!("worker {worker} was lost: no heartbeat for {silent_s:.1} s");
        let why = (why, Some(lost.heartbeat_ms));
        let taken = take_back(&mut tx, &job, &lost.lease, why, backoff, now_ms).await?;
        match taken {
            Some(_) => tx.commit().await?,
            None => tx.undo().await?,
        }
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn running(id: i64, attempt: u32, heartbeat_ms: i64) -> Job {
        Job {
            id,
            created_at_ms: 0,
            app: "web".parse().unwrap(),
            commit: "a".repeat(40).parse().unwrap(),
            name: "web/a".into(),
            status: JobStatus::Running,
            attempt,
            max_attempts: 3,
            lease: Some("lease".into()),
            worker: None,
            host: None,
            incarnation: None,
            last_heartbeat_ms: Some(heartbeat_ms),
            started_at_ms: None,
            finished_at_ms: None,
            cancel_requested: false,
            cancelled_by: None,
            reason: None,
            artifact: None,
            requested_by: "me".into(),
            priority: Priority::Normal,
            eligible_at_ms: 0,
            deferred: false,
        }
    }

    #[test]
    fn a_still_heartbeat_is_lost_after_the_window() {
        let mut watch = Watch::new(90, 30);
        // The heartbeat's own stamp, however old, decides nothing.
        for now in [0, 30, 60] {
            assert!(watch.look(now, now, &[running(1, 1, -999_999)]).is_empty());
        }
        let lost = watch.look(90, 90, &[running(1, 1, -999_999)]);
        assert_eq!(lost.len(), 1);
        assert_eq!((lost[0].job(), lost[0].silent_ms), (1, 90));
    }

    #[test]
    fn any_new_heartbeat_or_attempt_starts_the_window_again() {
        let mut watch = Watch::new(90, 30);
        watch.look(0, 0, &[running(1, 1, 5), running(2, 1, 5)]);
        // One beats (with a stamp that went back: another coordinator's clock), the other is given on.
        watch.look(30, 30, &[running(1, 1, 4), running(2, 2, 5)]);
        watch.look(60, 60, &[running(1, 1, 4), running(2, 2, 5)]);
        assert!(watch.look(90, 90, &[running(1, 1, 4), running(2, 2, 5)]).is_empty());
        assert_eq!(watch.look(120, 120, &[running(1, 1, 4), running(2, 2, 5)]).len(), 2);
    }

    #[test]
    fn after_an_outage_of_its_own_it_waits_a_full_window() {
        let mut watch = Watch::new(90, 30);
        watch.look(0, 0, &[running(1, 1, 5)]);
        assert!(
            watch.look(1_000, 1_000, &[running(1, 1, 5)]).is_empty(),
            "the worker could not be heard"
        );
        assert!(watch.look(1_060, 1_060, &[running(1, 1, 5)]).is_empty());
        assert_eq!(watch.look(1_090, 1_090, &[running(1, 1, 5)]).len(), 1);
    }

    #[test]
    fn ended_jobs_are_forgotten() {
        let mut watch = Watch::new(90, 30);
        watch.look(0, 0, &[running(1, 1, 5)]);
        watch.look(30, 30, &[]);
        assert!(watch.seen.is_empty());
    }

    #[test]
    fn a_slow_answer_counts_for_the_worker() {
        let mut watch = Watch::new(90, 30);
        // Read at 20 at the latest: what it says may be as young as that.
        watch.look(0, 20, &[running(1, 1, 5)]);
        assert!(watch.look(90, 91, &[running(1, 1, 5)]).is_empty());
        assert!(watch.look(109, 140, &[running(1, 1, 5)]).is_empty());
        assert_eq!(watch.look(150, 150, &[running(1, 1, 5)])[0].silent_ms, 130);
        // An answer that took for ever is an outage.
        assert!(watch.look(155, 300, &[running(1, 1, 5)]).is_empty());
    }

    #[test]
    fn a_network_that_fails_does_not_give_all_jobs_on() {
        let limit = ReapLimit { jobs: 5, share: 0.1 };
        let lost = |count: i64| {
            let lost = |id| Lost {
                job: id,
                lease: Lease { attempt: 1, token: String::new() },
                heartbeat_ms: 0,
                // The later ones are silent for longer.
                silent_ms: 100 + id as u64 / 10,
                priority: if id % 10 == 7 { Priority::Urgent } else { Priority::Low },
            };
            (0..count).map(lost).collect::<Vec<_>>()
        };
        let mut few = lost(5);
        assert_eq!((limit.apply(&mut few, 5), few.len()), (0, 5));
        let mut some = lost(20);
        assert_eq!(limit.apply(&mut some, 20), 15);
        assert_eq!(some.iter().map(Lost::job).collect::<Vec<_>>(), [17, 10, 11, 12, 13]);
        let mut many = lost(100);
        assert_eq!((limit.apply(&mut many, 100), many.len()), (90, 10));
    }
}
