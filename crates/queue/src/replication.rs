//! Copies to be made: taken by one coordinator process at a time, tried again until they are complete.
//!
//! A copy is owned for a short time that its owner keeps prolonging; when the owner dies, another process (or
//! the same one after its restart) takes it up. The times are wall-clock, so two processes with clocks far
//! apart may copy the same thing at once: objects are write-once and checked, so that costs traffic and
//! nothing else.

use shoal_proto::{ArtifactId, EncodingId, RegionName};

use crate::{
    db::{Queue, Write, count, get, number, parsed, placeholders},
    error::Result,
    events,
};

/// A copy that somebody makes now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyJob {
    /// The artifact.
    pub artifact: ArtifactId,
    /// The encoding.
    pub encoding: EncodingId,
    /// Into which region's bucket.
    pub region: RegionName,
    /// How often it has been tried, this time included.
    pub tries: u32,
}

/// The copy that is due first.
async fn due<'c>(
    connection: impl sqlx::Executor<'c, Database = sqlx::Any>,
    without: &[RegionName],
    now_ms: i64,
    lock: &str,
) -> Result<Option<sqlx::any::AnyRow>> {
    // COMPLETE rows, nearly all, are never looked at: the index leads with the status.
    let mut sql = String::from(
        "SELECT c.artifact, c.encoding, c.region, c.tries FROM replications c \
         JOIN regions r ON r.name = c.region AND r.configured = 1 \
         WHERE c.status IN ('PENDING', 'COPYING', 'FAILED')",
    );
    if !without.is_empty() {
        sql.push_str(" AND c.region NOT IN ");
        placeholders(&mut sql, 1, without.len());
    }
    let now = without.len() + 1;
    sql.push_str(&format!(
        " AND c.next_try_at <= ${now} AND (c.status <> 'COPYING' OR c.owned_until < ${now}) \
         ORDER BY r.drained, c.created_at, c.region LIMIT 1{lock}"
    ));
    let mut query = sqlx::query(sqlx::AssertSqlSafe(sql));
    for region in without {
        query = query.bind(region.as_str());
    }
    Ok(query.bind(now_ms).fetch_optional(connection).await?)
}

/// Changes a copy while it is its owner's. False: it is no longer.
async fn set_copy_in(
    tx: &mut Write,
    job: &CopyJob,
    owner: &str,
    sql: &'static str,
    values: (i64, i64, Option<&str>),
) -> Result<bool> {
    let done = sqlx::query(sql)
        .bind(values.0)
        .bind(values.1)
        .bind(values.2)
        .bind(job.artifact.to_string())
        .bind(job.encoding.to_string())
        .bind(job.region.as_str())
        .bind(owner)
        .bind(i64::from(job.tries))
        .execute(&mut **tx)
        .await?;
    Ok(done.rows_affected() == 1)
}

impl Queue {
    /// Takes the oldest copy that is due: PENDING, FAILED and due again, or COPYING by an owner who is gone.
    /// Drained regions come last, the regions in `without` not at all. It is `owner`'s until `owned_until_ms`.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn take_copy(
        &self,
        owner: &str,
        without: &[RegionName],
        now_ms: i64,
        owned_until_ms: i64,
    ) -> Result<Option<CopyJob>> {
        if due(&mut *self.read().await?, without, now_ms, "").await?.is_none() {
            return Ok(None);
        }
        let mut tx = self.write().await?;
        let lock = tx.dialect.skip_taken_copies();
        let due = due(&mut *tx, without, now_ms, lock).await?;
        let Some(row) = due else { return Ok(None) };
        let tries: u32 = number(&row, "tries")?;
        let job = CopyJob {
            artifact: parsed(&row, "artifact")?,
            encoding: parsed(&row, "encoding")?,
            region: parsed(&row, "region")?,
            tries: tries.saturating_add(1),
        };
        let taken = sqlx::query(
            "UPDATE replications SET status = 'COPYING', owner = $1, owned_until = $2, \
             tries = tries + 1, started_at = COALESCE(started_at, $3) \
             WHERE artifact = $4 AND encoding = $5 AND region = $6 AND tries = $7",
        )
        .bind(owner)
        .bind(owned_until_ms)
        .bind(now_ms)
        .bind(job.artifact.to_string())
        .bind(job.encoding.to_string())
        .bind(job.region.as_str())
        .bind(i64::from(tries))
        .execute(&mut *tx)
        .await?;
        if taken.rows_affected() != 1 {
            return Ok(None);
        }
        tx.commit().await?;
        Ok(Some(job))
    }

    async fn set_copy(
        &self,
        job: &CopyJob,
        owner: &str,
        sql: &'static str,
        values: (i64, i64, Option<&str>),
    ) -> Result<bool> {
        let mut tx = self.write().await?;
        let done = set_copy_in(&mut tx, job, owner, sql, values).await?;
        tx.commit().await?;
        Ok(done)
    }

    /// Says how far a copy is, and keeps it the owner's. False: it was taken over, stop.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn copy_progress(
        &self,
        job: &CopyJob,
        owner: &str,
        bytes_done: u64,
        owned_until_ms: i64,
    ) -> Result<bool> {
        const SQL: &str = "UPDATE replications SET bytes_done = $1, owned_until = $2, \
             reason = COALESCE($3, reason) WHERE artifact = $4 AND encoding = $5 AND region = $6 \
             AND owner = $7 AND tries = $8 AND status = 'COPYING'";
        self.set_copy(job, owner, SQL, (count(bytes_done), owned_until_ms, None)).await
    }

    /// A copy is whole and checked.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn copy_complete(
        &self,
        job: &CopyJob,
        owner: &str,
        bytes: u64,
        now_ms: i64,
    ) -> Result<bool> {
        const SQL: &str = "UPDATE replications SET status = 'COMPLETE', bytes_done = $1, \
             finished_at = $2, reason = $3, owner = NULL WHERE artifact = $4 AND encoding = $5 \
             AND region = $6 AND owner = $7 AND tries = $8 AND status = 'COPYING'";
        let mut tx = self.write().await?;
        events::lock_copies(&mut tx, job).await?;
        let done = set_copy_in(&mut tx, job, owner, SQL, (count(bytes), now_ms, None)).await?;
        if done {
            events::of_copy(&mut tx, job, now_ms).await?;
        }
        tx.commit().await?;
        Ok(done)
    }

    /// A copy failed; it is due again at `next_try_at_ms`.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn copy_failed(
        &self,
        job: &CopyJob,
        owner: &str,
        reason: &str,
        next_try_at_ms: i64,
    ) -> Result<bool> {
        const SQL: &str = "UPDATE replications SET status = 'FAILED', owned_until = $1, \
             next_try_at = $2, reason = $3, owner = NULL WHERE artifact = $4 AND encoding = $5 \
             AND region = $6 AND owner = $7 AND tries = $8 AND status = 'COPYING'";
        self.set_copy(job, owner, SQL, (0, next_try_at_ms, Some(reason))).await
    }

    /// Gives back what `owner` still copies, because it stops: others need not wait for its time to end.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn give_back_copies(&self, owner: &str) -> Result<u64> {
        let mut tx = self.write().await?;
        let done = sqlx::query(
            "UPDATE replications SET status = 'PENDING', owner = NULL, owned_until = 0 \
             WHERE owner = $1 AND status = 'COPYING'",
        )
        .bind(owner)
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(done.rows_affected())
    }

    /// Gives back what anybody copies, because who calls this is the only one that does from now on, and the one
    /// before is gone: nobody waits for the end of its time.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn take_over_copies(&self) -> Result<u64> {
        let mut tx = self.write().await?;
        let done = sqlx::query(
            "UPDATE replications SET status = 'PENDING', owner = NULL, owned_until = 0 \
             WHERE status = 'COPYING'",
        )
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(done.rows_affected())
    }

    /// When the next copy that failed is due again; none when nothing waits for its time.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn next_copy_due_ms(&self) -> Result<Option<i64>> {
        let row =
            sqlx::query("SELECT MIN(next_try_at) AS due FROM replications WHERE status = 'FAILED'")
                .fetch_one(&mut *self.read().await?)
                .await?;
        get(&row, "due")
    }

    /// How many copies are in each state.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn copies_by_status(
        &self,
    ) -> Result<Vec<(shoal_proto::state::ReplicationStatus, u64)>> {
        let rows = sqlx::query("SELECT status, COUNT(*) AS n FROM replications GROUP BY status")
            .fetch_all(&mut *self.read().await?)
            .await?;
        rows.iter().map(|row| Ok((parsed(row, "status")?, number(row, "n")?))).collect()
    }
}
