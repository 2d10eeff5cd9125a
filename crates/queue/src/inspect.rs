//! Inspecting copies for as long as their artifact lives: which are due, and what was found.

use shoal_proto::{ArtifactId, EncodingId, RegionName};
use sqlx::any::AnyRow;

use crate::{
    audit::{self, Actor},
    db::{Queue, corrupt, get, number, parsed},
    error::Result,
    finish::short,
};

/// An encoding that is to be inspected in the main bucket and in the regions that should have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inspection {
    /// The artifact.
    pub artifact: ArtifactId,
    /// The encoding.
    pub encoding: EncodingId,
    /// The regions in service where it is COMPLETE.
    pub regions: Vec<RegionName>,
    /// Whether the main bucket is known to be damaged: that is being repaired.
    pub main_damaged: bool,
    /// Whether somebody asked for it.
    pub urgent: bool,
}

/// An encoding that the main bucket has lost some of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damaged {
    /// The artifact.
    pub artifact: ArtifactId,
    /// The encoding.
    pub encoding: EncodingId,
    /// What it lost.
    pub damage: String,
    /// The parts whose bytes are wrong, though they are there.
    pub doubted: Vec<u32>,
    /// The regions in service that have it whole.
    pub regions: Vec<RegionName>,
    /// How often a repair has failed.
    pub tries: u32,
}

/// Numbers of parts as a column holds them.
pub(crate) fn parts_text(parts: &[u32]) -> Option<String> {
    let parts: Vec<_> = parts.iter().map(ToString::to_string).collect();
    (!parts.is_empty()).then(|| parts.join(","))
}

/// Reads numbers of parts.
pub(crate) fn parts_of(row: &AnyRow, column: &str) -> Result<Vec<u32>> {
    let text: Option<String> = get(row, column)?;
    let parts = text.unwrap_or_default();
    let parts = parts.split(',').filter(|part| !part.is_empty());
    parts.map(|part| part.parse().map_err(|error| corrupt(column, error))).collect()
}

impl Queue {
    /// Sees to it that every encoding with a living name is inspected once a round: those that no inspection knows yet
    /// are due a round after they were made. Returns how many encodings live.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn inspect_all(&self) -> Result<u64> {
        let mut tx = self.write().await?;
        sqlx::query(
            "INSERT INTO encodings (artifact, encoding, checked_at) \
             SELECT a.artifact, a.encoding, MAX(a.created_at) FROM artifacts a \
             WHERE a.deleted_at IS NULL AND NOT EXISTS (SELECT 1 FROM encodings e \
             WHERE e.artifact = a.artifact AND e.encoding = a.encoding) \
             GROUP BY a.artifact, a.encoding ON CONFLICT (artifact, encoding) DO NOTHING",
        )
        .execute(&mut *tx)
        .await?;
        let row = sqlx::query(
            "SELECT COUNT(*) AS n FROM encodings WHERE checked_at IS NOT NULL AND removal = 0",
        )
        .fetch_one(&mut *tx)
        .await?;
        let count = number(&row, "n")?;
        tx.commit().await?;
        Ok(count)
    }

    /// What is to be inspected next: first what somebody asked for, what a goal names and what is new before the rest; then
    /// what was inspected before `before_ms`, the longest ago first.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn next_inspection(&self, before_ms: i64) -> Result<Option<Inspection>> {
        let urgent = sqlx::query(
            "SELECT e.artifact, e.encoding, e.damage, e.urgent FROM encodings e \
             WHERE e.urgent = 1 AND e.removal = 0 AND e.checked_at IS NOT NULL \
             ORDER BY CASE WHEN e.artifact IN (SELECT r.artifact FROM apps a \
             JOIN goals g ON g.seq = a.goal_seq JOIN rollouts r ON r.id = g.rollout) THEN 0 ELSE 1 END, \
             (SELECT MAX(n.created_at) FROM artifacts n WHERE n.artifact = e.artifact \
             AND n.encoding = e.encoding AND n.deleted_at IS NULL) DESC LIMIT 1",
        )
        .fetch_optional(&mut *self.read().await?)
        .await?;
        let row = match urgent {
            Some(row) => Some(row),
            None => {
                sqlx::query(
                    "SELECT artifact, encoding, damage, urgent FROM encodings \
                     WHERE checked_at IS NOT NULL AND removal = 0 AND checked_at < $1 \
                     ORDER BY checked_at LIMIT 1",
                )
                .bind(before_ms)
                .fetch_optional(&mut *self.read().await?)
                .await?
            }
        };
        let Some(row) = row else { return Ok(None) };
        let (artifact, encoding) = (parsed(&row, "artifact")?, parsed(&row, "encoding")?);
        Ok(Some(Inspection {
            artifact,
            encoding,
            regions: self.regions_with(&artifact, &encoding).await?,
            main_damaged: get::<Option<String>>(&row, "damage")?.is_some(),
            urgent: get::<i64>(&row, "urgent")? != 0,
        }))
    }

    /// When the longest ago inspected encoding was; none when there is none.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn oldest_inspection_ms(&self) -> Result<Option<i64>> {
        let row = sqlx::query(
            "SELECT MIN(checked_at) AS at FROM encodings WHERE checked_at IS NOT NULL AND removal = 0",
        )
        .fetch_one(&mut *self.read().await?)
        .await?;
        get(&row, "at")
    }

    /// Has an encoding inspected as soon as may be. False: it has no living name.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn inspect_soon(&self, artifact: &ArtifactId, encoding: &EncodingId) -> Result<bool> {
        self.inspect_all().await?;
        let mut tx = self.write().await?;
        let done = sqlx::query(
            "UPDATE encodings SET urgent = 1 WHERE artifact = $1 AND encoding = $2 \
             AND checked_at IS NOT NULL AND removal = 0",
        )
        .bind(artifact.to_string())
        .bind(encoding.to_string())
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(done.rows_affected() == 1)
    }

    /// An encoding was inspected, in the main bucket and in these regions. One that could not be is due again at its next
    /// round.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn inspected(
        &self,
        it: &Inspection,
        regions: &[RegionName],
        now_ms: i64,
    ) -> Result<()> {
        let mut tx = self.write().await?;
        let (artifact, encoding) = (it.artifact.to_string(), it.encoding.to_string());
        sqlx::query(
            "UPDATE encodings SET checked_at = $1, urgent = 0 WHERE artifact = $2 AND encoding = $3 \
             AND checked_at IS NOT NULL",
        )
        .bind(now_ms)
        .bind(artifact.as_str())
        .bind(encoding.as_str())
        .execute(&mut *tx)
        .await?;
        for region in regions {
            sqlx::query(
                "UPDATE replications SET checked_at = $1 \
                 WHERE artifact = $2 AND encoding = $3 AND region = $4",
            )
            .bind(now_ms)
            .bind(artifact.as_str())
            .bind(encoding.as_str())
            .bind(region.as_str())
            .execute(&mut *tx)
            .await?;
        }
        tx.commit().await
    }

    /// A region's bucket lost some of a copy that was COMPLETE: `reason` says what, `doubted` are parts that are there with
    /// wrong bytes. It is FAILED, and due to be copied again at once. False: it was not COMPLETE.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn copy_damaged(
        &self,
        (artifact, encoding, region): (&ArtifactId, &EncodingId, &RegionName),
        (reason, doubted): (&str, &[u32]),
        actor: &Actor,
        now_ms: i64,
    ) -> Result<bool> {
        let mut tx = self.write().await?;
        let done = sqlx::query(
            "UPDATE replications SET status = 'FAILED', reason = $1, doubted = $2, damaged_at = $3, \
             tries = 0, next_try_at = 0, owned_until = 0, finished_at = NULL, bytes_per_s = 0 \
             WHERE artifact = $4 AND encoding = $5 AND region = $6 AND status = 'COMPLETE' \
             AND removing = 0",
        )
        .bind(short(reason))
        .bind(parts_text(doubted))
        .bind(now_ms)
        .bind(artifact.to_string())
        .bind(encoding.to_string())
        .bind(region.as_str())
        .execute(&mut *tx)
        .await?;
        if done.rows_affected() == 0 {
            return Ok(false);
        }
        let (subject, detail) = (artifact.to_string(), format!("region {region} {reason}"));
        audit::record(&mut tx, now_ms, actor, "copy.damaged", &subject, &detail).await?;
        tx.commit().await?;
        Ok(true)
    }

    /// The main bucket lost some of an encoding, as [`Queue::copy_damaged`].
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn main_damaged(
        &self,
        (artifact, encoding): (&ArtifactId, &EncodingId),
        (reason, doubted): (&str, &[u32]),
        actor: &Actor,
        now_ms: i64,
    ) -> Result<bool> {
        let mut tx = self.write().await?;
        let done = sqlx::query(
            "UPDATE encodings SET damage = $1, doubted = $2, damaged_at = $3, tries = 0, next_try_at = 0 \
             WHERE artifact = $4 AND encoding = $5 AND damage IS NULL AND removal = 0 \
             AND checked_at IS NOT NULL",
        )
        .bind(short(reason))
        .bind(parts_text(doubted))
        .bind(now_ms)
        .bind(artifact.to_string())
        .bind(encoding.to_string())
        .execute(&mut *tx)
        .await?;
        if done.rows_affected() == 0 {
            return Ok(false);
        }
        let (subject, detail) = (artifact.to_string(), format!("the main bucket {reason}"));
        audit::record(&mut tx, now_ms, actor, "main.damaged", &subject, &detail).await?;
        tx.commit().await?;
        Ok(true)
    }

    /// The encoding whose repair in the main bucket is due first.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn next_repair(&self, now_ms: i64) -> Result<Option<Damaged>> {
        let row = sqlx::query(
            "SELECT artifact, encoding, damage, doubted, tries FROM encodings WHERE damage IS NOT NULL \
             AND removal = 0 AND next_try_at <= $1 ORDER BY next_try_at LIMIT 1",
        )
        .bind(now_ms)
        .fetch_optional(&mut *self.read().await?)
        .await?;
        let Some(row) = row else { return Ok(None) };
        let (artifact, encoding) = (parsed(&row, "artifact")?, parsed(&row, "encoding")?);
        Ok(Some(Damaged {
            artifact,
            encoding,
            damage: get(&row, "damage")?,
            doubted: parts_of(&row, "doubted")?,
            regions: self.regions_with(&artifact, &encoding).await?,
            tries: number(&row, "tries")?,
        }))
    }

    /// Whether the main bucket is known to have lost some of an encoding.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn is_main_damaged(
        &self,
        artifact: &ArtifactId,
        encoding: &EncodingId,
    ) -> Result<bool> {
        let query = sqlx::query(
            "SELECT 1 AS damaged FROM encodings WHERE artifact = $1 AND encoding = $2 \
             AND damage IS NOT NULL",
        );
        let query = query.bind(artifact.to_string()).bind(encoding.to_string());
        Ok(self.look_at(query).await?.is_some())
    }

    /// The main bucket has it whole again; copies that failed meanwhile are due. Returns whether it was damaged.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn main_repaired(
        &self,
        (artifact, encoding): (&ArtifactId, &EncodingId),
        actor: &Actor,
        now_ms: i64,
    ) -> Result<bool> {
        if !self.is_main_damaged(artifact, encoding).await? {
            return Ok(false);
        }
        let (artifact, encoding) = (artifact.to_string(), encoding.to_string());
        let mut tx = self.write().await?;
        let done = sqlx::query(
            "UPDATE encodings SET damage = NULL, doubted = NULL, damaged_at = NULL, tries = 0, \
             next_try_at = 0 WHERE artifact = $1 AND encoding = $2 AND damage IS NOT NULL",
        )
        .bind(&artifact)
        .bind(&encoding)
        .execute(&mut *tx)
        .await?;
        if done.rows_affected() == 0 {
            return tx.undo().await.map(|()| false);
        }
        sqlx::query(
            "UPDATE replications SET next_try_at = 0 WHERE artifact = $1 AND encoding = $2 \
             AND status = 'FAILED'",
        )
        .bind(&artifact)
        .bind(&encoding)
        .execute(&mut *tx)
        .await?;
        audit::record(&mut tx, now_ms, actor, "main.repaired", &artifact, "").await?;
        tx.commit().await?;
        Ok(true)
    }

    /// A repair failed; it is due again at `next_try_at_ms`. The reason goes to those who ask why it is not deployable.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn repair_failed(
        &self,
        it: &Damaged,
        reason: &str,
        next_try_at_ms: i64,
    ) -> Result<()> {
        let mut tx = self.write().await?;
        sqlx::query(
            "UPDATE encodings SET damage = $1, tries = tries + 1, next_try_at = $2 \
             WHERE artifact = $3 AND encoding = $4 AND damage IS NOT NULL",
        )
        .bind(short(reason))
        .bind(next_try_at_ms)
        .bind(it.artifact.to_string())
        .bind(it.encoding.to_string())
        .execute(&mut *tx)
        .await?;
        tx.commit().await
    }

    /// How many encodings are damaged in the main bucket, and how many copies in regions.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn damaged(&self) -> Result<(u64, u64)> {
        let row = sqlx::query(
            "SELECT (SELECT COUNT(*) FROM encodings WHERE damage IS NOT NULL) AS main, \
             (SELECT COUNT(*) FROM replications WHERE status IN ('PENDING', 'COPYING', 'FAILED') \
             AND damaged_at IS NOT NULL AND removing = 0) AS copies",
        )
        .fetch_one(&mut *self.read().await?)
        .await?;
        Ok((number(&row, "main")?, number(&row, "copies")?))
    }
}
