//! Finding jobs whose worker is gone.
//!
//! A job is lost when *this process has watched* its heartbeat stand still for the whole loss window.
//! No clock is compared with another one (a heartbeat may have been stamped by another coordinator): a
//! new process, or one that was stopped or cut off from the database for a while, starts to watch anew
//! and so waits a full window by construction. The verdict is carried out by compare-and-set on the very
//! heartbeat that was watched, so one that came in between wins.

use std::collections::HashMap;

use shoal_proto::state::JobStatus;

use crate::{
    db::Queue,
    error::Result,
    jobs::{Job, Lease, Transition, job_in, transition},
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

    /// Looks at all running jobs ([`Queue::running`], read just now) at `now_ms` of a clock that never goes
    /// back, and says which ones are lost.
    pub fn look(&mut self, now_ms: u64, running: &[Job]) -> Vec<Lost> {
        let gap =
            self.last_look_ms.is_none_or(|last| now_ms.saturating_sub(last) > self.gap_max_ms);
        if gap {
            self.seen.clear();
        }
        self.last_look_ms = Some(now_ms);
        self.seen.retain(|id, _| running.binary_search_by_key(id, |job| job.id).is_ok());
        let mut lost = Vec::new();
        for job in running {
            let (Some(heartbeat_ms), Some(token)) = (job.last_heartbeat_ms, &job.lease) else {
                continue;
            };
            let fresh = Seen { attempt: job.attempt, heartbeat_ms, since_ms: now_ms };
            let seen = self.seen.entry(job.id).or_insert(fresh);
            if (seen.attempt, seen.heartbeat_ms) != (job.attempt, heartbeat_ms) {
                *seen = Seen { attempt: job.attempt, heartbeat_ms, since_ms: now_ms };
            }
            let silent_ms = now_ms - seen.since_ms;
            if silent_ms >= self.window_ms {
                let lease = Lease { attempt: job.attempt, token: token.clone() };
                lost.push(Lost { job: job.id, lease, heartbeat_ms, silent_ms });
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
    pub async fn reap(&self, lost: &Lost, now_ms: i64) -> Result<Option<JobStatus>> {
        let mut tx = self.write().await?;
        // Read under the write lock: a cancel that came in since counts.
        let job = job_in(&mut tx, lost.job).await?;
        let worker = job.worker.as_deref().unwrap_or("its worker");
        let silent_s = lost.silent_ms as f64 / 1_000.0;
        let lost_reason = format!("worker {worker} was lost: no heartbeat for {silent_s:.1} s");
        let (to, reason) = if job.cancel_requested {
            let by = job.cancelled_by.as_deref().unwrap_or("an operator");
            (JobStatus::Cancelled, format!("cancelled by {by}; {lost_reason}"))
        } else if lost.lease.attempt < job.max_attempts {
            (JobStatus::Queued, lost_reason)
        } else {
            let attempts = lost.lease.attempt;
            (JobStatus::Failed, format!("{lost_reason}, in attempt {attempts} of {attempts}"))
        };
        let transition_to = Transition {
            job: lost.job,
            lease: &lost.lease,
            to,
            reason: Some(&reason),
            artifact: None,
            outcome: Some("lost".into()),
            heartbeat_ms: Some(lost.heartbeat_ms),
        };
        if !transition(&mut tx, transition_to, now_ms).await? {
            tx.undo().await?;
            return Ok(None);
        }
        tx.commit().await?;
        Ok(Some(to))
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
        }
    }

    #[test]
    fn a_still_heartbeat_is_lost_after_the_window() {
        let mut watch = Watch::new(90, 30);
        // The heartbeat's own stamp, however old, decides nothing.
        for now in [0, 30, 60] {
            assert!(watch.look(now, &[running(1, 1, -999_999)]).is_empty());
        }
        let lost = watch.look(90, &[running(1, 1, -999_999)]);
        assert_eq!(lost.len(), 1);
        assert_eq!((lost[0].job(), lost[0].silent_ms), (1, 90));
    }

    #[test]
    fn any_new_heartbeat_or_attempt_starts_the_window_again() {
        let mut watch = Watch::new(90, 30);
        watch.look(0, &[running(1, 1, 5), running(2, 1, 5)]);
        // One beats (with a stamp that went back: another coordinator's clock), the other is given on.
        watch.look(30, &[running(1, 1, 4), running(2, 2, 5)]);
        watch.look(60, &[running(1, 1, 4), running(2, 2, 5)]);
        assert!(watch.look(90, &[running(1, 1, 4), running(2, 2, 5)]).is_empty());
        assert_eq!(watch.look(120, &[running(1, 1, 4), running(2, 2, 5)]).len(), 2);
    }

    #[test]
    fn after_an_outage_of_its_own_it_waits_a_full_window() {
        let mut watch = Watch::new(90, 30);
        watch.look(0, &[running(1, 1, 5)]);
        assert!(watch.look(1_000, &[running(1, 1, 5)]).is_empty(), "the worker could not be heard");
        assert!(watch.look(1_060, &[running(1, 1, 5)]).is_empty());
        assert_eq!(watch.look(1_090, &[running(1, 1, 5)]).len(), 1);
    }

    #[test]
    fn ended_jobs_are_forgotten() {
        let mut watch = Watch::new(90, 30);
        watch.look(0, &[running(1, 1, 5)]);
        watch.look(30, &[]);
        assert!(watch.seen.is_empty());
    }
}
