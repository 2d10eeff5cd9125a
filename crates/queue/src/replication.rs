//! Copies to be made: taken by one coordinator process at a time, tried again until they are complete.
//!
//! A copy is owned for a short time that its owner keeps prolonging; when the owner dies, another process (or
//! the same one after its restart) takes it up. The times are wall-clock, so two processes with clocks far
//! apart may copy the same thing at once: objects are write-once and checked, so that costs traffic and
//! nothing else.

use shoal_proto::{ArtifactId, EncodingId, RegionName};

use crate::{
    audit::{self, Actor},
    db::{Queue, Write, count, get, number, parsed, placeholders},
    error::Result,
    events,
    finish::short,
    inspect::parts_of,
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
    /// Parts that are there with wrong bytes, as an inspection found.
    pub doubted: Vec<u32>,
    /// What its bucket lost of it, when it was whole before.
    pub damage: Option<String>,
}

/// The copies of one state in a region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegionCopies {
    /// The region.
    pub region: RegionName,
    /// Their state.
    pub status: shoal_proto::state::ReplicationStatus,
    /// How many they are.
    pub copies: u64,
    /// How many bytes they lack.
    pub bytes_left: u64,
    /// How many bytes come in a second.
    pub bytes_per_s: u64,
}

/// How far a copy is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CopyProgress {
    /// How many bytes are there.
    pub bytes_done: u64,
    /// How many came in a second, of late.
    pub bytes_per_s: u64,
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
        "SELECT c.artifact, c.encoding, c.region, c.tries, c.doubted, CASE WHEN c.damaged_at IS NULL THEN NULL ELSE c.reason END AS damage FROM replications c \
         JOIN regions r ON r.name = c.region AND r.configured = 1 AND r.drained = 0 \
         WHERE c.status IN ('PENDING', 'COPYING', 'FAILED') AND c.removing = 0",
    );
    if !without.is_empty() {
        sql.push_str(" AND c.region NOT IN ");
        placeholders(&mut sql, 1, without.len());
    }
    let now = without.len() + 1;
    sql.push_str(&format!(
        " AND c.next_try_at <= ${now} AND (c.status <> 'COPYING' OR c.owned_until < ${now}) \
         ORDER BY CASE WHEN c.artifact IN (SELECT o.artifact FROM apps a \
         JOIN goals g ON g.seq = a.goal_seq JOIN rollouts o ON o.id = g.rollout) THEN 0 ELSE 1 END, \
         CASE WHEN c.created_at < r.back_at THEN 1 ELSE 0 END, \
         CASE WHEN c.created_at < r.back_at THEN -c.created_at ELSE c.created_at END, \
         c.artifact, c.region LIMIT 1{lock}"
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
    /// Takes the copy that is due first: PENDING, FAILED and due again, or COPYING by an owner who is gone. What a goal
    /// names comes first, then the oldest; what a region missed while it was out of service comes last, and of that the
    /// newest first. Drained regions and those in `without` are passed by. It is `owner`'s until `owned_until_ms`.
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
            doubted: parts_of(&row, "doubted")?,
            damage: get(&row, "damage")?,
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
        progress: CopyProgress,
        owned_until_ms: i64,
    ) -> Result<bool> {
        let mut tx = self.write().await?;
        let done = sqlx::query(
            "UPDATE replications SET bytes_done = $1, bytes_per_s = $2, owned_until = $3 \
             WHERE artifact = $4 AND encoding = $5 AND region = $6 AND owner = $7 AND tries = $8 \
             AND status = 'COPYING'",
        )
        .bind(count(progress.bytes_done))
        .bind(count(progress.bytes_per_s))
        .bind(owned_until_ms)
        .bind(job.artifact.to_string())
        .bind(job.encoding.to_string())
        .bind(job.region.as_str())
        .bind(owner)
        .bind(i64::from(job.tries))
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(done.rows_affected() == 1)
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
        let (artifact, encoding) = (job.artifact.to_string(), job.encoding.to_string());
        let mut tx = self.write().await?;
        events::lock_copies(&mut tx, job).await?;
        // The row is the owner's, so nobody else writes it between the two.
        let row = sqlx::query(
            "SELECT damaged_at FROM replications WHERE artifact = $1 AND encoding = $2 AND region = $3",
        )
        .bind(artifact.as_str())
        .bind(encoding.as_str())
        .bind(job.region.as_str())
        .fetch_optional(&mut *tx)
        .await?;
        let damaged: Option<i64> = row.map(|row| get(&row, "damaged_at")).transpose()?.flatten();
        let done = sqlx::query(
            "UPDATE replications SET status = 'COMPLETE', bytes_done = $1, finished_at = $2, \
             checked_at = $2, reason = NULL, owner = NULL, doubted = NULL, damaged_at = NULL \
             WHERE artifact = $3 AND encoding = $4 AND region = $5 AND owner = $6 AND tries = $7 \
             AND status = 'COPYING'",
        )
        .bind(count(bytes))
        .bind(now_ms)
        .bind(artifact.as_str())
        .bind(encoding.as_str())
        .bind(job.region.as_str())
        .bind(owner)
        .bind(i64::from(job.tries))
        .execute(&mut *tx)
        .await?;
        if done.rows_affected() != 1 {
            return Ok(false);
        }
        if damaged.is_some() {
            let actor = Actor { name: "coordinator".into(), origin: String::new(), request: None };
            let detail = format!("region {}", job.region);
            audit::record(&mut tx, now_ms, &actor, "copy.repaired", &artifact, &detail).await?;
        }
        events::of_copy(&mut tx, job, now_ms).await?;
        tx.commit().await?;
        Ok(true)
    }

    /// A copy that the store itself makes is not whole yet: what is there, what is waited for, and when to look again.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn copy_awaited(
        &self,
        job: &CopyJob,
        owner: &str,
        (bytes_done, reason): (u64, &str),
        next_try_at_ms: i64,
    ) -> Result<bool> {
        const SQL: &str = "UPDATE replications SET status = 'PENDING', bytes_done = $1, \
             next_try_at = $2, reason = $3, owner = NULL WHERE artifact = $4 AND encoding = $5 \
             AND region = $6 AND owner = $7 AND tries = $8 AND status = 'COPYING'";
        self.set_copy(job, owner, SQL, (count(bytes_done), next_try_at_ms, Some(short(reason))))
            .await
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
        self.set_copy(job, owner, SQL, (0, next_try_at_ms, Some(short(reason)))).await
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

    /// When the next copy that waits for its time is due; none when nothing does.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn next_copy_due_ms(&self) -> Result<Option<i64>> {
        let row = sqlx::query(
            "SELECT MIN(c.next_try_at) AS due FROM replications c JOIN regions r \
                 ON r.name = c.region AND r.configured = 1 AND r.drained = 0 \
                 WHERE c.status IN ('PENDING', 'FAILED') AND c.next_try_at > 0 AND c.removing = 0",
        )
        .fetch_one(&mut *self.read().await?)
        .await?;
        get(&row, "due")
    }

    /// The regions in service where a copy is COMPLETE.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn regions_with(
        &self,
        artifact: &ArtifactId,
        encoding: &EncodingId,
    ) -> Result<Vec<RegionName>> {
        let rows = sqlx::query(
            "SELECT c.region FROM replications c JOIN regions r ON r.name = c.region \
             AND r.configured = 1 AND r.drained = 0 WHERE c.artifact = $1 AND c.encoding = $2 \
             AND c.status = 'COMPLETE' AND c.removing = 0 ORDER BY c.region",
        )
        .bind(artifact.to_string())
        .bind(encoding.to_string())
        .fetch_all(&mut *self.read().await?)
        .await?;
        rows.iter().map(|row| parsed(row, "region")).collect()
    }

    /// How many copies each region has in each state, and what is left of those that are not COMPLETE.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn copies_by_region(&self) -> Result<Vec<RegionCopies>> {
        // A copy's length is its artifact's; several names of it are one.
        let rows = sqlx::query(
            "SELECT c.region, c.status, COUNT(*) AS n, \
             CAST(COALESCE(SUM(CASE WHEN c.status = 'COMPLETE' THEN 0 ELSE (SELECT MAX(a.encoded_bytes) \
             FROM artifacts a WHERE a.artifact = c.artifact AND a.encoding = c.encoding) - c.bytes_done END), 0) \
             AS BIGINT) AS bytes_left, \
             CAST(COALESCE(SUM(CASE WHEN c.status = 'COPYING' THEN c.bytes_per_s ELSE 0 END), 0) AS BIGINT) AS bytes_per_s \
             FROM replications c WHERE c.removing = 0 GROUP BY c.region, c.status",
        )
        .fetch_all(&mut *self.read().await?)
        .await?;
        let of = |row| {
            Ok(RegionCopies {
                region: parsed(row, "region")?,
                status: parsed(row, "status")?,
                copies: number(row, "n")?,
                bytes_left: get::<i64>(row, "bytes_left")?.max(0).unsigned_abs(),
                bytes_per_s: number(row, "bytes_per_s")?,
            })
        };
        rows.iter().map(of).collect()
    }

    /// How many copies are in each state.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn copies_by_status(
        &self,
    ) -> Result<Vec<(shoal_proto::state::ReplicationStatus, u64)>> {
        let rows = sqlx::query(
            "SELECT status, COUNT(*) AS n FROM replications WHERE removing = 0 GROUP BY status",
        )
        .fetch_all(&mut *self.read().await?)
        .await?;
        rows.iter().map(|row| Ok((parsed(row, "status")?, number(row, "n")?))).collect()
    }
}
