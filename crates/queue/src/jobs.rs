//! Build jobs: asked for, claimed, kept alive, ended. Every transition is compare-and-set on (job,
//! attempt, lease); whoever holds an old lease changes nothing.

use shoal_proto::{AppName, ArtifactId, CommitSha, RegionName, state::JobStatus};
use sqlx::any::AnyRow;

use crate::{
    artifacts::{self, NewArtifact, Origin, Stored},
    audit::{self, Actor},
    db::{self, Queue, Write, count, flag, get, number, parsed, parsed_opt},
    dialect::{Dialect, POSTGRES_CLAIM, POSTGRES_SUCCEED},
    error::{QueueError, Result},
};

/// The longest reason that a row keeps, in bytes: an end's reason is a line, not a log.
pub const REASON_MAX_BYTES: usize = 2_000;

/// A build job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// Its number.
    pub id: i64,
    /// When it was asked for: its place in the queue, kept through every attempt.
    pub created_at_ms: i64,
    /// The app.
    pub app: AppName,
    /// The commit.
    pub commit: CommitSha,
    /// The name of its artifact: `APP/SHA12-JOB`.
    pub name: String,
    /// Its state.
    pub status: JobStatus,
    /// How often it was started.
    pub attempt: u32,
    /// How often it may be.
    pub max_attempts: u32,
    /// The lease of the present attempt.
    pub lease: Option<String>,
    /// The worker of the present or last attempt.
    pub worker: Option<String>,
    /// That worker's host.
    pub host: Option<String>,
    /// That worker process's incarnation.
    pub incarnation: Option<String>,
    /// When its worker was last heard of.
    pub last_heartbeat_ms: Option<i64>,
    /// When its present or last attempt began.
    pub started_at_ms: Option<i64>,
    /// When it ended.
    pub finished_at_ms: Option<i64>,
    /// Whether an operator wants it stopped.
    pub cancel_requested: bool,
    /// Who does.
    pub cancelled_by: Option<String>,
    /// Why it ended, or why its last attempt did.
    pub reason: Option<String>,
    /// What it made.
    pub artifact: Option<ArtifactId>,
    /// Who asked for it.
    pub requested_by: String,
}

/// One attempt at a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    /// Its number, from 1.
    pub attempt: u32,
    /// The worker.
    pub worker: String,
    /// Its host.
    pub host: String,
    /// The worker process's incarnation.
    pub incarnation: String,
    /// When it began.
    pub started_at_ms: i64,
    /// When it ended.
    pub finished_at_ms: Option<i64>,
    /// Why it ended.
    pub reason: Option<String>,
}

/// Who takes a job.
#[derive(Debug, Clone)]
pub struct Claimant {
    /// The worker's name, from its certificate.
    pub worker: String,
    /// Its host.
    pub host: String,
    /// Its incarnation.
    pub incarnation: String,
}

/// What proves that an attempt still holds its job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// The attempt.
    pub attempt: u32,
    /// The random token that the attempt was given.
    pub token: String,
}

/// How an attempt ended, by its worker.
#[derive(Debug, Clone)]
pub enum End {
    /// The artifact is whole in the main bucket, which the caller has checked.
    Succeeded(Stored),
    /// It failed.
    Failed {
        /// Why.
        reason: String,
        /// Whether another attempt may do better.
        retry: bool,
    },
    /// It was stopped as asked.
    Cancelled,
}

impl End {
    /// What the attempt's row remembers of it, so that a repetition is known.
    fn tag(&self) -> String {
        match self {
            Self::Succeeded(stored) => format!("succeeded {} {}", stored.artifact, stored.encoding),
            Self::Failed { retry: false, .. } => "failed".into(),
            Self::Failed { retry: true, .. } => "failed, retry".into(),
            Self::Cancelled => "cancelled".into(),
        }
    }
}

/// How many jobs wait and run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Depth {
    /// Jobs by state.
    pub by_status: Vec<(JobStatus, u64)>,
    /// When the oldest waiting one was asked for.
    pub oldest_queued_ms: Option<i64>,
}

fn job(row: &AnyRow) -> Result<Job> {
    Ok(Job {
        id: get(row, "id")?,
        created_at_ms: get(row, "created_at")?,
        app: parsed(row, "app")?,
        commit: parsed(row, "commit_sha")?,
        name: get(row, "name")?,
        status: parsed(row, "status")?,
        attempt: number(row, "attempt")?,
        max_attempts: number(row, "max_attempts")?,
        lease: get(row, "lease")?,
        worker: get(row, "worker")?,
        host: get(row, "host")?,
        incarnation: get(row, "incarnation")?,
        last_heartbeat_ms: get(row, "last_heartbeat")?,
        started_at_ms: get(row, "started_at")?,
        finished_at_ms: get(row, "finished_at")?,
        cancel_requested: flag(row, "cancel_requested")?,
        cancelled_by: get(row, "cancelled_by")?,
        reason: get(row, "reason")?,
        artifact: parsed_opt(row, "artifact")?,
        requested_by: get(row, "requested_by")?,
    })
}

/// Cuts a reason to [`REASON_MAX_BYTES`] at a character's end.
fn short(reason: &str) -> &str {
    &reason[..reason.floor_char_boundary(REASON_MAX_BYTES)]
}

/// A job in a transaction, which nobody else changes until its end.
pub(crate) async fn job_in(tx: &mut Write, id: i64) -> Result<Job> {
    let sql = format!("SELECT * FROM jobs WHERE id = $1{}", tx.dialect.for_update());
    let row = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(id).fetch_optional(&mut **tx).await?;
    job(&row.ok_or_else(|| QueueError::no_job(id))?)
}

/// What becomes of a running job.
pub(crate) struct Transition<'a> {
    pub(crate) job: i64,
    pub(crate) lease: &'a Lease,
    pub(crate) to: JobStatus,
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
    let changed = sqlx::query(
        "UPDATE jobs SET status = $1, lease = NULL, finished_at = $2, reason = $3, artifact = $4 \
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
    Ok(true)
}

impl Queue {
    /// Puts a job at the end of the queue.
    ///
    /// # Errors
    /// [`QueueError::NotFound`] when the app is not registered.
    pub async fn submit(
        &self,
        app: &AppName,
        commit: &CommitSha,
        max_attempts: u32,
        actor: &Actor,
        now_ms: i64,
    ) -> Result<Job> {
        let mut tx = self.write().await?;
        let known = sqlx::query("SELECT name FROM apps WHERE name = $1")
            .bind(app.as_str())
            .fetch_optional(&mut *tx)
            .await?;
        known.ok_or_else(|| QueueError::no_app(app))?;
        let id = db::next(&mut tx, "job").await?;
        let name = format!("{app}/{}-{id}", commit.short());
        sqlx::query(
            "INSERT INTO jobs (id, created_at, app, commit_sha, name, status, attempt, max_attempts, \
             cancel_requested, requested_by) VALUES ($1, $2, $3, $4, $5, 'QUEUED', 0, $6, 0, $7)",
        )
        .bind(id)
        .bind(now_ms)
        .bind(app.as_str())
        .bind(commit.as_str())
        .bind(name.as_str())
        .bind(i64::from(max_attempts))
        .bind(actor.name.as_str())
        .execute(&mut *tx)
        .await?;
        audit::record(&mut tx, now_ms, actor, "job.submit", &name, commit.as_str()).await?;
        let job = job_in(&mut tx, id).await?;
        tx.commit().await?;
        Ok(job)
    }

    /// One job.
    ///
    /// # Errors
    /// [`QueueError::NotFound`] when there is none of that number.
    pub async fn job(&self, id: i64) -> Result<Job> {
        let row = sqlx::query("SELECT * FROM jobs WHERE id = $1")
            .bind(id)
            .fetch_optional(self.reader())
            .await?;
        job(&row.ok_or_else(|| QueueError::no_job(id))?)
    }

    /// The newest `limit` jobs, newest first, of one app or of all.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn jobs(&self, app: Option<&AppName>, limit: u32) -> Result<Vec<Job>> {
        let query = match app {
            Some(app) => sqlx::query(
                "SELECT * FROM jobs WHERE app = $2 ORDER BY created_at DESC, id DESC LIMIT $1",
            )
            .bind(i64::from(limit))
            .bind(app.as_str()),
            None => sqlx::query("SELECT * FROM jobs ORDER BY created_at DESC, id DESC LIMIT $1")
                .bind(i64::from(limit)),
        };
        query.fetch_all(self.reader()).await?.iter().map(job).collect()
    }

    /// All jobs that run, by number.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn running(&self) -> Result<Vec<Job>> {
        let rows = sqlx::query("SELECT * FROM jobs WHERE status = 'RUNNING' ORDER BY id")
            .fetch_all(self.reader())
            .await?;
        rows.iter().map(job).collect()
    }

    /// A job's attempts, oldest first.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn attempts(&self, job: i64) -> Result<Vec<Attempt>> {
        let rows = sqlx::query("SELECT * FROM attempts WHERE job = $1 ORDER BY attempt")
            .bind(job)
            .fetch_all(self.reader())
            .await?;
        rows.iter()
            .map(|row| {
                Ok(Attempt {
                    attempt: number(row, "attempt")?,
                    worker: get(row, "worker")?,
                    host: get(row, "host")?,
                    incarnation: get(row, "incarnation")?,
                    started_at_ms: get(row, "started_at")?,
                    finished_at_ms: get(row, "finished_at")?,
                    reason: get(row, "reason")?,
                })
            })
            .collect()
    }

    /// How many jobs are in each state, and since when the oldest waits.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn depth(&self) -> Result<Depth> {
        let rows = sqlx::query(
            "SELECT status, COUNT(*) AS jobs, MIN(created_at) AS oldest FROM jobs GROUP BY status",
        )
        .fetch_all(self.reader())
        .await?;
        let mut depth = Depth::default();
        for row in &rows {
            let status: JobStatus = parsed(row, "status")?;
            if status == JobStatus::Queued {
                depth.oldest_queued_ms = get(row, "oldest")?;
            }
            depth.by_status.push((status, number(row, "jobs")?));
        }
        Ok(depth)
    }

    /// Takes the oldest waiting job under a new attempt whose lease is `token` (random, and new for each
    /// call); none when nothing waits.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn claim(
        &self,
        claimant: &Claimant,
        token: &str,
        now_ms: i64,
    ) -> Result<Option<Job>> {
        match self.dialect() {
            Dialect::Sqlite => self.claim_alone(claimant, token, now_ms).await,
            Dialect::Postgres => {
                let query = sqlx::query(POSTGRES_CLAIM)
                    .bind(token)
                    .bind(claimant.worker.as_str())
                    .bind(claimant.host.as_str())
                    .bind(claimant.incarnation.as_str())
                    .bind(now_ms);
                self.once(query).await?.first().map(job).transpose()
            }
        }
    }

    /// [`Queue::claim`] by the only writer.
    async fn claim_alone(
        &self,
        claimant: &Claimant,
        token: &str,
        now_ms: i64,
    ) -> Result<Option<Job>> {
        const OLDEST: &str =
            "SELECT id FROM jobs WHERE status = 'QUEUED' ORDER BY created_at, id LIMIT 1";
        // Idle workers only read: the writer is for those who will find something.
        if sqlx::query(OLDEST).fetch_optional(self.reader()).await?.is_none() {
            return Ok(None);
        }
        let mut tx = self.write().await?;
        let sql = format!(
            "UPDATE jobs SET status = 'RUNNING', attempt = attempt + 1, lease = $1, worker = $2, \
             host = $3, incarnation = $4, last_heartbeat = $5, started_at = $5, reason = NULL \
             WHERE id = ({OLDEST}) AND status = 'QUEUED' RETURNING *"
        );
        let taken = sqlx::query(sqlx::AssertSqlSafe(sql))
            .bind(token)
            .bind(claimant.worker.as_str())
            .bind(claimant.host.as_str())
            .bind(claimant.incarnation.as_str())
            .bind(now_ms)
            .fetch_optional(&mut *tx)
            .await?;
        let Some(row) = taken else { return Ok(None) };
        let job = job(&row)?;
        sqlx::query(
            "INSERT INTO attempts (job, attempt, lease, worker, host, incarnation, started_at) \
             VALUES ($1, $2, $3, $4, $5, $6, $7)",
        )
        .bind(job.id)
        .bind(i64::from(job.attempt))
        .bind(token)
        .bind(claimant.worker.as_str())
        .bind(claimant.host.as_str())
        .bind(claimant.incarnation.as_str())
        .bind(now_ms)
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(Some(job))
    }

    /// Whether an attempt holds a job at present.
    ///
    /// # Errors
    /// [`QueueError::LeaseLost`] when it does not.
    pub async fn check_lease(&self, job: i64, lease: &Lease) -> Result<()> {
        let held = sqlx::query(
            "SELECT id FROM jobs WHERE id = $1 AND attempt = $2 AND lease = $3 AND status = 'RUNNING'",
        )
        .bind(job)
        .bind(i64::from(lease.attempt))
        .bind(lease.token.as_str())
        .fetch_optional(self.reader())
        .await?;
        held.map(drop).ok_or(QueueError::LeaseLost { job })
    }

    /// Ends an attempt. With a success, in the same transaction, come the artifact's row and a PENDING
    /// copy for each of `regions`. The same end told twice is answered alike.
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
        if let (Dialect::Postgres, End::Succeeded(stored)) = (self.dialect(), end)
            && let Some(job) = self.succeed(id, lease, (stored, end), regions, now_ms).await?
        {
            return Ok(job);
        }
        let mut tx = self.write().await?;
        let job = job_in(&mut tx, id).await?;
        let by = job.cancelled_by.as_deref().unwrap_or("an operator");
        let cancelled = format!("cancelled by {by}");
        let (to, reason, artifact) = match end {
            End::Succeeded(stored) => {
                (JobStatus::Succeeded, None, Some(stored.artifact.to_string()))
            }
            End::Cancelled if job.cancel_requested => (JobStatus::Cancelled, Some(cancelled), None),
            End::Cancelled => (JobStatus::Cancelled, Some("cancelled by its worker".into()), None),
            End::Failed { reason, .. } if job.cancel_requested => {
                (JobStatus::Cancelled, Some(format!("{cancelled}; {reason}")), None)
            }
            End::Failed { reason, retry: true } if job.attempt < job.max_attempts => {
                (JobStatus::Queued, Some(reason.clone()), None)
            }
            End::Failed { reason, .. } => (JobStatus::Failed, Some(reason.clone()), None),
        };
        let outcome = Some(end.tag());
        let transition = Transition {
            job: id,
            lease,
            to,
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
        if let End::Succeeded(stored) = end {
            let origin = Origin { job: Some(id), commit: Some(job.commit.clone()) };
            let new = NewArtifact { name: &job.name, app: &job.app, stored, origin };
            if !artifacts::insert(&mut tx, &new, &job.requested_by, now_ms).await? {
                let taken = format!("the name {} is another artifact's already", job.name);
                return Err(QueueError::Conflict(taken));
            }
            artifacts::want_copies(&mut tx, stored, regions, now_ms).await?;
        }
        let job = job_in(&mut tx, id).await?;
        tx.commit().await?;
        Ok(job)
    }

    /// The ordinary end on PostgreSQL, in one statement. None: the attempt does not hold the job.
    async fn succeed(
        &self,
        id: i64,
        lease: &Lease,
        (stored, end): (&Stored, &End),
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
            .bind(regions.join(","));
        self.once(query).await?.first().map(job).transpose()
    }

    /// Cancels a job: at once while it waits, by way of its worker while it runs.
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
        if waiting.rows_affected() == 0 {
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
