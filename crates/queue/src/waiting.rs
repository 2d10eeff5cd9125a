//! What waits: how much, for how long, until when, and whether anything may be taken at all. None of it looks at history.

use shoal_proto::state::Priority;

use crate::{
    audit::{self, Actor},
    db::{Queue, get, number},
    error::Result,
    finish::short,
    jobs::priority,
};

/// How many jobs wait and run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Depth {
    /// Those that a worker could take, by priority; none where none waits.
    pub waiting: Vec<Waiting>,
    /// Those that wait for their next attempt.
    pub deferred: u64,
    /// Those that run.
    pub running: u64,
}

/// The jobs of one priority that a worker could take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// The priority.
    pub priority: Priority,
    /// How many they are.
    pub jobs: u64,
    /// Since when one of them has waited for a worker. The time of earlier attempts does not count.
    pub since_ms: i64,
}

/// Why nobody takes a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pause {
    /// What the operator said.
    pub reason: Option<String>,
    /// Who it was.
    pub by: String,
    /// When.
    pub at_ms: i64,
}

impl Queue {
    /// How many jobs wait and run, and for how long.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn depth(&self) -> Result<Depth> {
        let rows = sqlx::query(
            "SELECT priority, COUNT(*) AS jobs, MIN(eligible_at) AS since FROM jobs \
             WHERE status = 'QUEUED' AND deferred = 0 GROUP BY priority ORDER BY priority",
        )
        .fetch_all(self.reader())
        .await?;
        let waiting = rows.iter().map(|row| {
            let (jobs, since_ms) = (number(row, "jobs")?, get(row, "since")?);
            Ok(Waiting { priority: priority(row)?, jobs, since_ms })
        });
        let waiting = waiting.collect::<Result<_>>()?;
        let row = sqlx::query(
            "SELECT (SELECT COUNT(*) FROM jobs WHERE status = 'QUEUED' AND deferred = 1) AS deferred, \
             (SELECT COUNT(*) FROM jobs WHERE status = 'RUNNING') AS running",
        )
        .fetch_one(self.reader())
        .await?;
        Ok(Depth {
            waiting,
            deferred: number(&row, "deferred")?,
            running: number(&row, "running")?,
        })
    }

    /// Lets jobs be taken whose time to wait for their next attempt is over. Returns how many.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn release_due(&self, now_ms: i64) -> Result<u64> {
        const DUE: &str = "status = 'QUEUED' AND deferred = 1 AND eligible_at <= $1";
        // Most of the time there is none: the writer is for others then.
        let sql = format!("SELECT id FROM jobs WHERE {DUE} LIMIT 1");
        let any = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(now_ms);
        if any.fetch_optional(self.reader()).await?.is_none() {
            return Ok(0);
        }
        let mut tx = self.write().await?;
        let sql = format!("UPDATE jobs SET deferred = 0 WHERE {DUE}");
        let released = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(now_ms).execute(&mut *tx).await?;
        tx.commit().await?;
        Ok(released.rows_affected())
    }

    /// Lets nobody take a job until [`Queue::resume`]; jobs that run go on.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn pause(&self, reason: Option<&str>, actor: &Actor, now_ms: i64) -> Result<()> {
        let mut tx = self.write().await?;
        let reason = reason.map(short);
        sqlx::query(
            "INSERT INTO pauses (id, reason, paused_by, paused_at) VALUES (1, $1, $2, $3) \
             ON CONFLICT (id) DO UPDATE SET reason = excluded.reason, paused_by = excluded.paused_by, \
             paused_at = excluded.paused_at",
        )
        .bind(reason)
        .bind(actor.name.as_str())
        .bind(now_ms)
        .execute(&mut *tx)
        .await?;
        let reason = reason.unwrap_or_default();
        audit::record(&mut tx, now_ms, actor, "queue.pause", "queue", reason).await?;
        tx.commit().await
    }

    /// Lets jobs be taken again.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn resume(&self, actor: &Actor, now_ms: i64) -> Result<()> {
        let mut tx = self.write().await?;
        let ended = sqlx::query("DELETE FROM pauses").execute(&mut *tx).await?;
        if ended.rows_affected() > 0 {
            audit::record(&mut tx, now_ms, actor, "queue.resume", "queue", "").await?;
        }
        tx.commit().await
    }

    /// Why nobody takes a job; none while the queue is not paused.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn paused(&self) -> Result<Option<Pause>> {
        let row = sqlx::query("SELECT * FROM pauses").fetch_optional(self.reader()).await?;
        row.map(|row| {
            let by = get(&row, "paused_by")?;
            Ok(Pause { reason: get(&row, "reason")?, by, at_ms: get(&row, "paused_at")? })
        })
        .transpose()
    }
}
