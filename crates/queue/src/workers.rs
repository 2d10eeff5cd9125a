//! Workers: by the name of their certificate, and which process has that name at present.
//!
//! Each start of a worker draws a random incarnation. The newest process of a name has it, and what an older one still
//! held is given on at once: it cannot be working on it any more. An older one that is heard of again is refused (two
//! processes with one certificate would otherwise take each other's jobs in turn), unless the newer one has been silent
//! for a while: then it was the one that came late.

use shoal_proto::state::JobStatus;
use sqlx::any::AnyRow;

use crate::{
    audit::{self, Actor},
    backoff::Backoff,
    db::{Queue, Write, flag, get},
    error::{QueueError, Result},
    finish::{short, take_back},
    jobs::{Claimant, Lease, job},
};

/// A worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Worker {
    /// Its name, from its certificate.
    pub name: String,
    /// The process that has the name.
    pub incarnation: String,
    /// Its host.
    pub host: String,
    /// When this process was first heard of.
    pub started_at_ms: i64,
    /// When it was last heard of.
    pub last_seen_ms: i64,
    /// Why it takes no more jobs; none when it does.
    pub drain: Option<Drain>,
    /// The jobs that it works on, by number.
    pub jobs: Vec<i64>,
}

/// Why a worker takes no more jobs, or a region is out of service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drain {
    /// What the operator said.
    pub reason: Option<String>,
    /// Who it was.
    pub by: String,
    /// When.
    pub at_ms: i64,
}

impl Drain {
    /// Of a row of workers or regions; none where it is in service.
    pub(crate) fn of(row: &AnyRow) -> Result<Option<Self>> {
        if !flag(row, "drained")? {
            return Ok(None);
        }
        Ok(Some(Self {
            reason: get(row, "drain_reason")?,
            by: get::<Option<String>>(row, "drained_by")?.unwrap_or_default(),
            at_ms: get::<Option<i64>>(row, "drained_at")?.unwrap_or_default(),
        }))
    }
}

/// What a worker is told when its name is another process's.
fn superseded(claimant: &Claimant, host: &str) -> QueueError {
    QueueError::Conflict(format!(
        "another process (on host '{host}') has the name of worker {} now: give each worker a certificate of its own, \
         or restart this one if that one is not to be",
        claimant.worker
    ))
}

impl Queue {
    /// Notes that a worker asks for jobs. When its process is new, what other processes of its name held is given on
    /// at once; returns those jobs and their new states. `silent_before_ms`: a process that was last heard of before
    /// that gives its name up to any other.
    ///
    /// # Errors
    /// [`QueueError::Conflict`] when a newer process has the name.
    pub async fn worker_seen(
        &self,
        claimant: &Claimant,
        silent_before_ms: i64,
        backoff: Backoff,
        now_ms: i64,
    ) -> Result<Vec<(i64, JobStatus)>> {
        let mut tx = self.write().await?;
        let new = sqlx::query(
            "INSERT INTO workers (name, incarnation, host, started_at, last_seen, drained) \
             VALUES ($1, $2, $3, $4, $4, 0) ON CONFLICT (name) DO NOTHING",
        )
        .bind(claimant.worker.as_str())
        .bind(claimant.incarnation.as_str())
        .bind(claimant.host.as_str())
        .bind(now_ms)
        .execute(&mut *tx)
        .await?;
        let taken = if new.rows_affected() == 1
            || supersede(&mut tx, claimant, silent_before_ms, now_ms).await?
        {
            take_from_others(&mut tx, claimant, backoff, now_ms).await?
        } else {
            Vec::new()
        };
        tx.commit().await?;
        Ok(taken)
    }

    /// Notes that the worker that holds a job was heard of.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn worker_heard(&self, job: i64, now_ms: i64) -> Result<()> {
        let mut tx = self.write().await?;
        sqlx::query(
            "UPDATE workers SET last_seen = $1 WHERE name = (SELECT worker FROM jobs WHERE id = $2) \
             AND incarnation = (SELECT incarnation FROM jobs WHERE id = $2)",
        )
        .bind(now_ms)
        .bind(job)
        .execute(&mut *tx)
        .await?;
        tx.commit().await
    }

    /// All workers, by name.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn workers(&self) -> Result<Vec<Worker>> {
        let rows = sqlx::query("SELECT * FROM workers ORDER BY name")
            .fetch_all(&mut *self.read().await?)
            .await?;
        let running = self.running().await?;
        rows.iter()
            .map(|row| {
                let (name, incarnation): (String, String) =
                    (get(row, "name")?, get(row, "incarnation")?);
                let held = running.iter().filter(|job| {
                    job.worker.as_ref() == Some(&name)
                        && job.incarnation.as_ref() == Some(&incarnation)
                });
                let jobs = held.map(|job| job.id).collect();
                Ok(Worker {
                    name,
                    incarnation,
                    host: get(row, "host")?,
                    started_at_ms: get(row, "started_at")?,
                    last_seen_ms: get(row, "last_seen")?,
                    drain: Drain::of(row)?,
                    jobs,
                })
            })
            .collect()
    }

    /// Lets a worker take no more jobs (it finishes what it has), or lets it take them again.
    ///
    /// # Errors
    /// [`QueueError::NotFound`] when no worker of that name was ever heard of.
    pub async fn drain_worker(
        &self,
        name: &str,
        drained: bool,
        reason: Option<&str>,
        actor: &Actor,
        now_ms: i64,
    ) -> Result<()> {
        let mut tx = self.write().await?;
        let reason = reason.filter(|_| drained).map(short);
        let done = sqlx::query(
            "UPDATE workers SET drained = $1, drain_reason = $2, drained_by = $3, drained_at = $4 \
             WHERE name = $5",
        )
        .bind(i64::from(drained))
        .bind(reason)
        .bind(actor.name.as_str())
        .bind(now_ms)
        .bind(name)
        .execute(&mut *tx)
        .await?;
        if done.rows_affected() == 0 {
            tx.undo().await?;
            return Err(QueueError::no_worker(name));
        }
        let what = if drained { "worker.drain" } else { "worker.undrain" };
        audit::record(&mut tx, now_ms, actor, what, name, reason.unwrap_or_default()).await?;
        tx.commit().await
    }

    /// Forgets workers, and processes that had a worker's name, that were last heard of before `before_ms`; never a
    /// drained one, which would be given jobs when it comes back. Returns how many workers.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn forget_workers(&self, before_ms: i64) -> Result<u64> {
        let mut tx = self.write().await?;
        sqlx::query("DELETE FROM past_workers WHERE ended_at < $1")
            .bind(before_ms)
            .execute(&mut *tx)
            .await?;
        let gone = sqlx::query("DELETE FROM workers WHERE last_seen < $1 AND drained = 0")
            .bind(before_ms)
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        Ok(gone.rows_affected())
    }
}

/// Notes that the process that has the name was heard of, or gives the name to another one: true.
async fn supersede(
    tx: &mut Write,
    claimant: &Claimant,
    silent_before_ms: i64,
    now_ms: i64,
) -> Result<bool> {
    let sql = format!(
        "SELECT incarnation, host, last_seen FROM workers WHERE name = $1{}",
        tx.dialect.for_update()
    );
    let row = sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(claimant.worker.as_str())
        .fetch_one(&mut **tx)
        .await?;
    let present: String = get(&row, "incarnation")?;
    let is_new = present != claimant.incarnation;
    if is_new {
        let past = sqlx::query("SELECT 1 FROM past_workers WHERE name = $1 AND incarnation = $2")
            .bind(claimant.worker.as_str())
            .bind(claimant.incarnation.as_str())
            .fetch_optional(&mut **tx)
            .await?;
        if past.is_some() && get::<i64>(&row, "last_seen")? >= silent_before_ms {
            return Err(superseded(claimant, &get::<String>(&row, "host")?));
        }
        sqlx::query(
            "INSERT INTO past_workers (name, incarnation, ended_at) VALUES ($1, $2, $3) \
             ON CONFLICT (name, incarnation) DO UPDATE SET ended_at = excluded.ended_at",
        )
        .bind(claimant.worker.as_str())
        .bind(present)
        .bind(now_ms)
        .execute(&mut **tx)
        .await?;
    }
    sqlx::query(
        "UPDATE workers SET incarnation = $1, host = $2, last_seen = $3, \
         started_at = CASE WHEN $4 = 1 THEN $3 ELSE started_at END WHERE name = $5",
    )
    .bind(claimant.incarnation.as_str())
    .bind(claimant.host.as_str())
    .bind(now_ms)
    .bind(i64::from(is_new))
    .bind(claimant.worker.as_str())
    .execute(&mut **tx)
    .await?;
    Ok(is_new)
}

/// Gives on what other processes of a worker's name hold.
async fn take_from_others(
    tx: &mut Write,
    claimant: &Claimant,
    backoff: Backoff,
    now_ms: i64,
) -> Result<Vec<(i64, JobStatus)>> {
    let sql = format!(
        "SELECT * FROM jobs WHERE status = 'RUNNING' AND worker = $1 AND incarnation <> $2 \
         ORDER BY id{}",
        tx.dialect.for_update()
    );
    let held = sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(claimant.worker.as_str())
        .bind(claimant.incarnation.as_str())
        .fetch_all(&mut **tx)
        .await?;
    let mut taken = Vec::new();
    for row in &held {
        let job = job(row)?;
        let Some(token) = job.lease.clone() else { continue };
        let lease = Lease { attempt: job.attempt, token };
        let why = (format!("worker {} was restarted", claimant.worker), None);
        if let Some(to) = take_back(tx, &job, &lease, why, backoff, now_ms).await? {
            taken.push((job.id, to));
        }
    }
    Ok(taken)
}
