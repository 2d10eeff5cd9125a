//! Taking jobs: the first of the highest priority, once.

use crate::{
    db::Queue,
    dialect::{Dialect, FIRST, POSTGRES_CLAIM},
    error::{QueueError, Result},
    events::{self, EventKind},
    jobs::{Claimant, Job, Lease, job},
};

impl Queue {
    /// Takes the oldest waiting job of the highest priority under a new attempt whose lease is `token` (random, and
    /// new for each call). None when nothing waits, the queue is paused, or this worker is drained or another
    /// process has its name.
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
                    .bind(claimant.worker.as_str())
                    .bind(claimant.incarnation.as_str())
                    .bind(token)
                    .bind(claimant.host.as_str())
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
        // Idle workers only read: the writer is for those who will find something.
        let first = sqlx::query(FIRST)
            .bind(claimant.worker.as_str())
            .bind(claimant.incarnation.as_str())
            .fetch_optional(&mut *self.read().await?)
            .await?;
        if first.is_none() {
            return Ok(None);
        }
        let mut tx = self.write().await?;
        let sql = format!(
            "UPDATE jobs SET status = 'RUNNING', attempt = attempt + 1, lease = $3, worker = $1, \
             host = $4, incarnation = $2, last_heartbeat = $5, started_at = $5, reason = NULL \
             WHERE id = ({FIRST}) AND status = 'QUEUED' RETURNING *"
        );
        let taken = sqlx::query(sqlx::AssertSqlSafe(sql))
            .bind(claimant.worker.as_str())
            .bind(claimant.incarnation.as_str())
            .bind(token)
            .bind(claimant.host.as_str())
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
        events::of_job(&mut tx, EventKind::BuildInit, job.id, now_ms).await?;
        tx.commit().await?;
        Ok(Some(job))
    }

    /// Whether the attempt that holds a job shall stop it: an operator wants it cancelled.
    ///
    /// # Errors
    /// [`QueueError::LeaseLost`] when the attempt does not hold the job.
    pub async fn check_lease(&self, job: i64, lease: &Lease) -> Result<bool> {
        let query = sqlx::query(
            "SELECT cancel_requested FROM jobs \
             WHERE id = $1 AND attempt = $2 AND lease = $3 AND status = 'RUNNING'",
        );
        let query = query.bind(job).bind(i64::from(lease.attempt)).bind(lease.token.as_str());
        let held = self.look_at(query).await?;
        crate::db::flag(&held.ok_or(QueueError::LeaseLost { job })?, "cancel_requested")
    }
}
