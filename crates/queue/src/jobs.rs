//! Build jobs and their attempts, as they are kept.

use std::collections::BTreeSet;

use shoal_proto::{
    AppName, ArtifactId, CommitSha,
    state::{JobStatus, Priority},
};
use sqlx::any::AnyRow;

use crate::{
    db::{Queue, Write, corrupt, flag, get, number, parsed, parsed_opt},
    error::{QueueError, Result},
};

/// The longest reason that a row keeps, in bytes: an end's reason is a line, not a log.
pub const REASON_MAX_BYTES: usize = 2_000;

/// A build job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// Its number.
    pub id: i64,
    /// When it was asked for: its place within its priority, kept through every attempt.
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
    /// Who asked for it first.
    pub requested_by: String,
    /// How urgent it is.
    pub priority: Priority,
    /// Since when it waits or waited for a worker; with `deferred`: when it will.
    pub eligible_at_ms: i64,
    /// Whether it waits for that time, after attempts that failed.
    pub deferred: bool,
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
    /// How it ended: succeeded, failed, cancelled, or lost with its worker.
    pub outcome: Option<String>,
    /// Why it ended.
    pub reason: Option<String>,
    /// The coordinators that have some of its log.
    pub log_at: Vec<String>,
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

/// Reads a priority.
pub(crate) fn priority(row: &AnyRow) -> Result<Priority> {
    let rank: u8 = number(row, "priority")?;
    Priority::of_rank(rank).ok_or_else(|| corrupt("priority", rank))
}

pub(crate) fn job(row: &AnyRow) -> Result<Job> {
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
        priority: priority(row)?,
        eligible_at_ms: get(row, "eligible_at")?,
        deferred: flag(row, "deferred")?,
    })
}

/// A job in a transaction, which nobody else changes until its end.
pub(crate) async fn job_in(tx: &mut Write, id: i64) -> Result<Job> {
    let sql = format!("SELECT * FROM jobs WHERE id = $1{}", tx.dialect.for_update());
    let row = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(id).fetch_optional(&mut **tx).await?;
    job(&row.ok_or_else(|| QueueError::no_job(id))?)
}

impl Queue {
    /// One job.
    ///
    /// # Errors
    /// [`QueueError::NotFound`] when there is none of that number.
    pub async fn job(&self, id: i64) -> Result<Job> {
        let row = self.look_at(sqlx::query("SELECT * FROM jobs WHERE id = $1").bind(id)).await?;
        job(&row.ok_or_else(|| QueueError::no_job(id))?)
    }

    /// The newest `limit` jobs, newest first, of one app or of all.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn jobs(&self, app: Option<&AppName>, limit: u32) -> Result<Vec<Job>> {
        let apps = app.map(|app| BTreeSet::from([app.clone()]));
        self.jobs_page(apps.as_ref(), None, limit).await
    }

    /// All jobs that run, by number.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn running(&self) -> Result<Vec<Job>> {
        let rows = sqlx::query("SELECT * FROM jobs WHERE status = 'RUNNING' ORDER BY id")
            .fetch_all(&mut *self.read().await?)
            .await?;
        rows.iter().map(job).collect()
    }

    /// A job's attempts, oldest first.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn attempts(&self, job: i64) -> Result<Vec<Attempt>> {
        let sql = "SELECT * FROM attempts WHERE job = $1 ORDER BY attempt";
        let rows = self.look(sqlx::query(sql).bind(job)).await?;
        rows.iter()
            .map(|row| {
                let outcome: Option<String> = get(row, "outcome")?;
                let log_at: String = get(row, "log_at")?;
                Ok(Attempt {
                    attempt: number(row, "attempt")?,
                    worker: get(row, "worker")?,
                    host: get(row, "host")?,
                    incarnation: get(row, "incarnation")?,
                    started_at_ms: get(row, "started_at")?,
                    finished_at_ms: get(row, "finished_at")?,
                    // Behind its first word stands what tells a repetition.
                    outcome: outcome
                        .and_then(|tag| tag.split([' ', ',']).next().map(ToString::to_string)),
                    reason: get(row, "reason")?,
                    log_at: log_at.split_terminator(',').skip(1).map(String::from).collect(),
                })
            })
            .collect()
    }
}

impl Queue {
    /// Writes down that a coordinator has some of an attempt's log.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn note_log(&self, job: i64, attempt: u32, coordinator: &str) -> Result<()> {
        let mut tx = self.write().await?;
        sqlx::query(
            "UPDATE attempts SET log_at = log_at || $1 WHERE job = $2 AND attempt = $3 \
             AND REPLACE(log_at, $4, ',') = log_at",
        )
        .bind(format!("{coordinator},"))
        .bind(job)
        .bind(i64::from(attempt))
        .bind(format!(",{coordinator},"))
        .execute(&mut *tx)
        .await?;
        tx.commit().await
    }
}
