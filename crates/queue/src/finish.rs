//! Ending attempts, and cancelling jobs. Every transition is compare-and-set on (job, attempt, lease); whoever holds an
//! old lease changes nothing.

use shoal_proto::{RegionName, state::JobStatus};

use crate::{
    artifacts::{self, NewArtifact, Origin, Stored},
    audit::{self, Actor},
    backoff::Backoff,
    db::{Queue, Write, count, get},
    dialect::{Dialect, POSTGRES_SUCCEED},
    error::{QueueError, Result},
    events::{self, EventKind},
    jobs::{Job, Lease, REASON_MAX_BYTES, job, job_in},
    removal,
};

/// How an attempt ended, by its worker.
#[derive(Debug, Clone)]
pub enum End {
    /// The artifact is whole in the main bucket, which the caller has checked.
    Succeeded(Stored),
    /// It failed.
    Failed {
        /// Why.
        reason: String,
        /// How long to wait before another attempt; none: that would fail alike.
        retry: Option<Backoff>,
    },
    /// It was stopped as asked.
    Cancelled,
}

impl End {
    /// What the attempt's row remembers of it, so that a repetition is known. Its first word is the outcome.
    fn tag(&self) -> String {
        match self {
            Self::Succeeded(stored) => format!("succeeded {} {}", stored.artifact, stored.encoding),
            Self::Failed { retry: None, .. } => "failed".into(),
            Self::Failed { retry: Some(_), .. } => "failed retry".into(),
            Self::Cancelled => "cancelled".into(),
        }
    }
}

/// Cuts a reason to [`REASON_MAX_BYTES`] at a character's end.
pub(crate) fn short(reason: &str) -> &str {
    &reason[..reason.floor_char_boundary(REASON_MAX_BYTES)]
}

/// What becomes of a running job.
pub(crate) struct Transition<'a> {
    pub(crate) job: i64,
    pub(crate) lease: &'a Lease,
    pub(crate) to: JobStatus,
    /// When it waits again: for how long at least, in milliseconds.
    pub(crate) wait_ms: u64,
    pub(crate) reason: Option<&'a str>,
    pub(crate) artifact: Option<String>,
    /// What the attempt's row remembers.
    pub(crate) outcome: Option<String>,
    /// Only while the last heartbeat is still this one.
    pub(crate) heartbeat_ms: Option<i64>,
}

/// The one statement that takes a job out of RUNNING, and its attempt's end. False: the job is not held so.
pub(crate) async fn transition(tx: &mut Write, t: Transition<'_>, now_ms: i64) -> Result<bool> {
    let reason = t.reason.map(short);
    let finished = t.to.is_terminal().then_some(now_ms);
    let eligible = (t.to == JobStatus::Queued).then(|| now_ms.saturating_add(count(t.wait_ms)));
    let deferred = t.to == JobStatus::Queued && t.wait_ms > 0;
    let changed = sqlx::query(
        "UPDATE jobs SET status = $1, lease = NULL, finished_at = $2, reason = $3, artifact = $4, \
         eligible_at = COALESCE($9, eligible_at), deferred = $10 \
         WHERE id = $5 AND attempt = $6 AND lease = $7 AND status = 'RUNNING' \
         AND last_heartbeat = COALESCE($8, last_heartbeat)",
    )
    .bind(t.to.as_str())
    .bind(finished)
    .bind(reason)
    .bind(t.artifact)
    .bind(t.job)
    .bind(i64::from(t.lease.attempt))
    .bind(t.lease.token.as_str())
    .bind(t.heartbeat_ms)
    .bind(eligible)
    .bind(i64::from(deferred))
    .execute(&mut **tx)
    .await?;
    if changed.rows_affected() != 1 {
        return Ok(false);
    }
    sqlx::query(
        "UPDATE attempts SET finished_at = $1, reason = $2, outcome = $3 \
         WHERE job = $4 AND attempt = $5 AND lease = $6",
    )
    .bind(now_ms)
    .bind(reason)
    .bind(t.outcome)
    .bind(t.job)
    .bind(i64::from(t.lease.attempt))
    .bind(t.lease.token.as_str())
    .execute(&mut **tx)
    .await?;
    let kind =
        if t.to.is_terminal() { EventKind::BuildCompleted } else { EventKind::BuildRequeued };
    events::of_job(tx, kind, t.job, now_ms).await?;
    Ok(true)
}

/// Why a job ends that may be started no more.
fn at_last(why: &str, attempt: u32) -> String {
    format!("{why}, in attempt {attempt} of {attempt}")
}

/// Takes a running job from a worker that is gone: back to its old place, FAILED after its last attempt, CANCELLED when
/// that was asked for. `heartbeat_ms`: only while the last heartbeat is still that one. Returns its new state; none when
/// it is not held so any more.
pub(crate) async fn take_back(
    tx: &mut Write,
    job: &Job,
    lease: &Lease,
    (why, heartbeat_ms): (String, Option<i64>),
    backoff: Backoff,
    now_ms: i64,
) -> Result<Option<JobStatus>> {
    let (to, reason) = if job.cancel_requested {
        let by = job.cancelled_by.as_deref().unwrap_or("an operator");
        (JobStatus::Cancelled, format!("cancelled by {by}; {why}"))
    } else if lease.attempt < job.max_attempts {
        (JobStatus::Queued, why)
    } else {
        (JobStatus::Failed, at_last(&why, lease.attempt))
    };
    let transition_to = Transition {
        job: job.id,
        lease,
        to,
        wait_ms: backoff.after(lease.attempt),
        reason: Some(&reason),
        artifact: None,
        outcome: Some("lost".into()),
        heartbeat_ms,
    };
    Ok(transition(tx, transition_to, now_ms).await?.then_some(to))
}

impl Queue {
    /// Ends an attempt. With a success, in the same transaction, come the artifact's row and a PENDING
    /// copy for each of `regions`. What an operator has cancelled is CANCELLED, however it ends. The same end told twice
    /// is answered alike.
    ///
    /// # Errors
    /// [`QueueError::LeaseLost`] when the attempt did not hold the job, or ended otherwise.
    pub async fn finish(
        &self,
        id: i64,
        lease: &Lease,
        end: &End,
        regions: &[RegionName],
        now_ms: i64,
    ) -> Result<Job> {
        self.finish_seen(id, lease, (end, None), regions, now_ms).await
    }

    /// [`Queue::finish`] for a success whose objects were seen in the main bucket: `seen` is what [`Queue::generation`] said
    /// before that. Without it, that they are there is certain.
    ///
    /// # Errors
    /// As [`Queue::finish`]; [`QueueError::ObjectsGone`] when they were removed since. The job runs on.
    pub async fn finish_seen(
        &self,
        id: i64,
        lease: &Lease,
        (end, seen): (&End, Option<i64>),
        regions: &[RegionName],
        now_ms: i64,
    ) -> Result<Job> {
        if let (Dialect::Postgres, End::Succeeded(stored)) = (self.dialect(), end)
            && let Some(job) = self.succeed(id, lease, (stored, end, seen), regions, now_ms).await?
        {
            return Ok(job);
        }
        let mut tx = self.write().await?;
        let job = job_in(&mut tx, id).await?;
        let by = job.cancelled_by.as_deref().unwrap_or("an operator");
        let cancelled = format!("cancelled by {by}");
        let mut wait_ms = 0;
        let (to, reason, artifact) = match end {
            End::Succeeded(_) if job.cancel_requested => {
                (JobStatus::Cancelled, Some(format!("{cancelled}; it had just been built")), None)
            }
            End::Succeeded(stored) => {
                (JobStatus::Succeeded, None, Some(stored.artifact.to_string()))
            }
            End::Cancelled if job.cancel_requested => (JobStatus::Cancelled, Some(cancelled), None),
            End::Cancelled => (JobStatus::Cancelled, Some("cancelled by its worker".into()), None),
            End::Failed { reason, .. } if job.cancel_requested => {
                (JobStatus::Cancelled, Some(format!("{cancelled}; {reason}")), None)
            }
            End::Failed { reason, retry: Some(backoff) } if lease.attempt < job.max_attempts => {
                wait_ms = backoff.after(lease.attempt);
                (JobStatus::Queued, Some(reason.clone()), None)
            }
            End::Failed { reason, retry: Some(_) } => {
                (JobStatus::Failed, Some(at_last(reason, lease.attempt)), None)
            }
            End::Failed { reason, retry: None } => (JobStatus::Failed, Some(reason.clone()), None),
        };
        let outcome = Some(end.tag());
        let transition = Transition {
            job: id,
            lease,
            to,
            wait_ms,
            reason: reason.as_deref(),
            artifact,
            outcome,
            heartbeat_ms: None,
        };
        if !self::transition(&mut tx, transition, now_ms).await? {
            // Told before, with the answer lost on the way?
            let before = sqlx::query(
                "SELECT outcome FROM attempts WHERE job = $1 AND attempt = $2 AND lease = $3",
            )
            .bind(id)
            .bind(i64::from(lease.attempt))
            .bind(lease.token.as_str())
            .fetch_optional(&mut *tx)
            .await?;
            let before: Option<String> =
                before.map(|row| get(&row, "outcome")).transpose()?.flatten();
            tx.undo().await?;
            return if before == Some(end.tag()) {
                Ok(job)
            } else {
                Err(QueueError::LeaseLost { job: id })
            };
        }
        if let (JobStatus::Succeeded, End::Succeeded(stored)) = (to, end) {
            let origin = Origin { job: Some(id), commit: Some(job.commit.clone()) };
            let new = NewArtifact { name: &job.name, app: &job.app, stored, origin };
            if !artifacts::insert(&mut tx, &new, &job.requested_by, now_ms).await? {
                let taken = format!("the name {} is another artifact's already", job.name);
                return Err(QueueError::Conflict(taken));
            }
            removal::admit(&mut tx, stored, seen, now_ms).await?;
            artifacts::want_copies(&mut tx, stored, regions, now_ms).await?;
            // The same bytes may have been copied before, for another name.
            events::of_artifact(&mut tx, &job.name, now_ms).await?;
        }
        let job = job_in(&mut tx, id).await?;
        tx.commit().await?;
        Ok(job)
    }

    /// The ordinary end on PostgreSQL, in one statement. None: the attempt does not hold the job, or it is to be cancelled.
    async fn succeed(
        &self,
        id: i64,
        lease: &Lease,
        (stored, end, seen): (&Stored, &End, Option<i64>),
        regions: &[RegionName],
        now_ms: i64,
    ) -> Result<Option<Job>> {
        // Names of regions hold no commas.
        let regions: Vec<_> = regions.iter().map(RegionName::as_str).collect();
        let query = sqlx::query(POSTGRES_SUCCEED)
            .bind(id)
            .bind(i64::from(lease.attempt))
            .bind(lease.token.as_str())
            .bind(now_ms)
            .bind(stored.artifact.to_string())
            .bind(end.tag())
            .bind(stored.encoding.to_string())
            .bind(count(stored.size_bytes))
            .bind(count(stored.encoded_bytes))
            .bind(count(stored.piece_size_bytes))
            .bind(i64::from(stored.pieces))
            .bind(regions.join(","))
            .bind(seen.unwrap_or_default());
        self.once(query).await?.first().map(job).transpose()
    }

    /// Cancels a job: at once while it waits, by way of its worker while it runs. Once this has returned, the job never
    /// succeeds.
    ///
    /// # Errors
    /// [`QueueError::NotFound`], or [`QueueError::Conflict`] when it has ended.
    pub async fn cancel(&self, id: i64, actor: &Actor, now_ms: i64) -> Result<Job> {
        let mut tx = self.write().await?;
        // Its state stays as it is found here.
        job_in(&mut tx, id).await?;
        let reason = format!("cancelled by {}", actor.name);
        let waiting = sqlx::query(
            "UPDATE jobs SET status = 'CANCELLED', finished_at = $1, reason = $2, \
             cancel_requested = 1, cancelled_by = $3 WHERE id = $4 AND status = 'QUEUED'",
        )
        .bind(now_ms)
        .bind(short(&reason))
        .bind(actor.name.as_str())
        .bind(id)
        .execute(&mut *tx)
        .await?;
        if waiting.rows_affected() == 1 {
            events::of_job(&mut tx, EventKind::BuildCompleted, id, now_ms).await?;
        } else {
            sqlx::query(
                "UPDATE jobs SET cancel_requested = 1, cancelled_by = COALESCE(cancelled_by, $1) \
                 WHERE id = $2 AND status = 'RUNNING'",
            )
            .bind(actor.name.as_str())
            .bind(id)
            .execute(&mut *tx)
            .await?;
        }
        let job = job_in(&mut tx, id).await?;
        if job.status.is_terminal() && waiting.rows_affected() == 0 {
            // Cancelled twice is cancelled once; anything else came too late.
            tx.undo().await?;
            return match job.status {
                JobStatus::Cancelled => Ok(job),
                status => {
                    Err(QueueError::Conflict(format!("job {id} has ended already: it is {status}")))
                }
            };
        }
        audit::record(&mut tx, now_ms, actor, "job.cancel", &job.name, "").await?;
        tx.commit().await?;
        Ok(job)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_cut_at_a_character() {
        let long = "ä".repeat(REASON_MAX_BYTES);
        assert_eq!(short(&long).len(), REASON_MAX_BYTES);
        assert_eq!(short("why"), "why");
        let odd = format!("x{long}");
        assert_eq!(short(&odd).len(), REASON_MAX_BYTES - 1);
    }
}
