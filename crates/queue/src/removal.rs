//! Removing the objects of encodings that have no living name, without ever taking those of one that comes meanwhile.
//!
//! Who uploads skips what is there, so an upload and a removal of the same content may meet. Three rules keep them apart:
//!
//! 1. Objects are removed only by the owner of a *run*, which begins by raising the encoding's generation and ends by
//!    saying what is gone. A run begins only while no living name has the encoding, and that is looked at under a lock
//!    that everybody who gives names waits for ([`lock_names`]).
//! 2. Who gives a name says which generation it saw *before* it looked into the main bucket. Within its transaction, after
//!    the name's row is there, [`admit`] refuses when a run began since, or goes on: what it saw may be gone. It uploads again.
//! 3. Copies into the regions are wanted in that same transaction, so a region's copy begins after the run has ended, and a run
//!    takes nothing of an encoding whose copies are wanted.
//!
//! A bucket that cannot be reached keeps its row, and another run takes its objects later; between runs names are given
//! freely, and take the rows back.

use shoal_proto::{ArtifactId, EncodingId, RegionName};

use crate::{
    artifacts::Stored,
    db::{Queue, Write, flag, get, number, parsed},
    error::{QueueError, Result},
};

/// How many runs begin in one transaction.
const RUNS_MAX: u32 = 16;

/// After how long it is looked again whether the last buckets with objects are in service, in milliseconds. A region that
/// comes back into service does not wait for it.
const LOOK_AGAIN_MS: i64 = 600_000;

/// A removal that its owner carries out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removal {
    /// The artifact.
    pub artifact: ArtifactId,
    /// The encoding.
    pub encoding: EncodingId,
    /// The regions in service whose buckets have objects of it.
    pub regions: Vec<RegionName>,
    /// Whether the main bucket has.
    pub main: bool,
    /// How often it has been tried, this time included.
    pub tries: u32,
}

/// Waits until nobody gives an artifact a name, a goal or a pin, and lets nobody until the transaction's end. Reading
/// goes on. SQLite's writer is alone anyway.
pub(crate) async fn lock_names(tx: &mut Write) -> Result<()> {
    if let Some(sql) = tx.dialect.lock_artifacts() {
        sqlx::raw_sql(sql).execute(&mut **tx).await?;
    }
    Ok(())
}

/// Lets a new name have an encoding's objects, if nobody removes them and nobody has since `seen`. The name's row must
/// have been written before: its lock makes runs wait.
pub(crate) async fn admit(
    tx: &mut Write,
    stored: &Stored,
    seen: Option<i64>,
    now_ms: i64,
) -> Result<()> {
    let sql = format!(
        "SELECT generation, removal, checked_at FROM encodings WHERE artifact = $1 AND encoding = $2{}",
        tx.dialect.for_update()
    );
    let row = sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(stored.artifact.to_string())
        .bind(stored.encoding.to_string())
        .fetch_optional(&mut **tx)
        .await?;
    let Some(row) = row else { return Ok(()) };
    let (generation, removal): (i64, i64) = (get(&row, "generation")?, get(&row, "removal")?);
    if removal == 2 || seen.is_some_and(|seen| seen != generation) {
        return Err(QueueError::ObjectsGone(stored.encoding));
    }
    if removal == 1 || get::<Option<i64>>(&row, "checked_at")?.is_none() {
        sqlx::query(
            "UPDATE encodings SET removal = 0, remove_main = 0, checked_at = $1, damage = NULL, \
             damaged_at = NULL, doubted = NULL WHERE artifact = $2 AND encoding = $3",
        )
        .bind(now_ms)
        .bind(stored.artifact.to_string())
        .bind(stored.encoding.to_string())
        .execute(&mut **tx)
        .await?;
    }
    Ok(())
}

/// Has the objects of an encoding removed from all buckets, if no living name has it any more.
pub(crate) async fn want_removal(tx: &mut Write, artifact: &str, encoding: &str) -> Result<bool> {
    let living = sqlx::query(
        "SELECT name FROM artifacts WHERE artifact = $1 AND encoding = $2 AND deleted_at IS NULL LIMIT 1",
    )
    .bind(artifact)
    .bind(encoding)
    .fetch_optional(&mut **tx)
    .await?;
    if living.is_some() {
        return Ok(false);
    }
    sqlx::query(
        "INSERT INTO encodings (artifact, encoding, removal, remove_main) VALUES ($1, $2, 1, 1) \
         ON CONFLICT (artifact, encoding) DO UPDATE SET removal = 1, remove_main = 1, checked_at = NULL, \
         urgent = 0, damage = NULL, damaged_at = NULL, doubted = NULL, tries = 0, next_try_at = 0",
    )
    .bind(artifact)
    .bind(encoding)
    .execute(&mut **tx)
    .await?;
    // Who copies it finds at its next word that it does so no more.
    sqlx::query(
        "UPDATE replications SET removing = 1, status = 'PENDING', owner = NULL, owned_until = 0, \
         reason = NULL, doubted = NULL, damaged_at = NULL WHERE artifact = $1 AND encoding = $2",
    )
    .bind(artifact)
    .bind(encoding)
    .execute(&mut **tx)
    .await?;
    Ok(true)
}

const DUE: &str = "SELECT artifact, encoding, remove_main, tries FROM encodings \
    WHERE (removal = 1 AND next_try_at <= $1) OR (removal = 2 AND owned_until < $1) \
    ORDER BY next_try_at LIMIT $2";

impl Queue {
    /// The generation of an encoding's objects, to be asked for before its bucket is looked at; none while somebody removes
    /// them.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn generation(
        &self,
        artifact: &ArtifactId,
        encoding: &EncodingId,
    ) -> Result<Option<i64>> {
        let query = sqlx::query(
            "SELECT generation, removal FROM encodings WHERE artifact = $1 AND encoding = $2",
        );
        let query = query.bind(artifact.to_string()).bind(encoding.to_string());
        let row = self.look_at(query).await?;
        let Some(row) = row else { return Ok(Some(0)) };
        let removal: i64 = get(&row, "removal")?;
        Ok(if removal == 2 { None } else { Some(get(&row, "generation")?) })
    }

    /// Begins the runs that are due: `owner`'s until `owned_until_ms`, which it prolongs by
    /// [`Queue::removal_goes_on`]. A run whose owner is silent past its time is begun again.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn take_removals(
        &self,
        owner: &str,
        now_ms: i64,
        owned_until_ms: i64,
    ) -> Result<Vec<Removal>> {
        // Locks nobody out while there is nothing to do.
        let due = sqlx::query(DUE).bind(now_ms).bind(i64::from(RUNS_MAX));
        if due.fetch_optional(&mut *self.read().await?).await?.is_none() {
            return Ok(Vec::new());
        }
        let mut tx = self.write().await?;
        lock_names(&mut tx).await?;
        let due = sqlx::query(DUE).bind(now_ms).bind(i64::from(RUNS_MAX));
        let rows = due.fetch_all(&mut *tx).await?;
        let mut runs = Vec::with_capacity(rows.len());
        for row in &rows {
            let (artifact, encoding): (String, String) =
                (get(row, "artifact")?, get(row, "encoding")?);
            let regions = sqlx::query(
                "SELECT c.region FROM replications c JOIN regions r ON r.name = c.region \
                 AND r.configured = 1 AND r.drained = 0 \
                 WHERE c.artifact = $1 AND c.encoding = $2 AND c.removing = 1 ORDER BY c.region",
            )
            .bind(artifact.as_str())
            .bind(encoding.as_str())
            .fetch_all(&mut *tx)
            .await?;
            let tries: u32 = number(row, "tries")?;
            if regions.is_empty() && !flag(row, "remove_main")? {
                // Only regions that are out of service have any left.
                sqlx::query(
                    "UPDATE encodings SET removal = 1, owner = NULL, next_try_at = $1 \
                     WHERE artifact = $2 AND encoding = $3",
                )
                .bind(now_ms.saturating_add(LOOK_AGAIN_MS))
                .bind(artifact.as_str())
                .bind(encoding.as_str())
                .execute(&mut *tx)
                .await?;
                continue;
            }
            sqlx::query(
                "UPDATE encodings SET removal = 2, generation = generation + 1, owner = $1, \
                 owned_until = $2, tries = tries + 1 WHERE artifact = $3 AND encoding = $4",
            )
            .bind(owner)
            .bind(owned_until_ms)
            .bind(artifact.as_str())
            .bind(encoding.as_str())
            .execute(&mut *tx)
            .await?;
            let region = |row| parsed(row, "region");
            runs.push(Removal {
                artifact: parsed(row, "artifact")?,
                encoding: parsed(row, "encoding")?,
                regions: regions.iter().map(region).collect::<Result<_>>()?,
                main: flag(row, "remove_main")?,
                tries: tries.saturating_add(1),
            });
        }
        tx.commit().await?;
        Ok(runs)
    }

    /// Prolongs a run. False: it is another's by now; stop at once.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn removal_goes_on(
        &self,
        run: &Removal,
        owner: &str,
        owned_until_ms: i64,
    ) -> Result<bool> {
        let mut tx = self.write().await?;
        let done = sqlx::query(
            "UPDATE encodings SET owned_until = $1 WHERE artifact = $2 AND encoding = $3 \
             AND owner = $4 AND removal = 2 AND tries = $5",
        )
        .bind(owned_until_ms)
        .bind(run.artifact.to_string())
        .bind(run.encoding.to_string())
        .bind(owner)
        .bind(i64::from(run.tries))
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(done.rows_affected() == 1)
    }

    /// Ends a run: what is gone from which buckets. What is left is due again at `next_try_at_ms`. False: it was another's.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn removal_ends(
        &self,
        run: &Removal,
        owner: &str,
        (gone, main_gone): (&[RegionName], bool),
        next_try_at_ms: i64,
    ) -> Result<bool> {
        let mut tx = self.write().await?;
        let (artifact, encoding) = (run.artifact.to_string(), run.encoding.to_string());
        let done = sqlx::query(
            "UPDATE encodings SET removal = 1, remove_main = $1, owner = NULL, owned_until = 0, \
             next_try_at = $2 WHERE artifact = $3 AND encoding = $4 AND owner = $5 AND removal = 2 \
             AND tries = $6",
        )
        .bind(i64::from(run.main && !main_gone))
        .bind(next_try_at_ms)
        .bind(artifact.as_str())
        .bind(encoding.as_str())
        .bind(owner)
        .bind(i64::from(run.tries))
        .execute(&mut *tx)
        .await?;
        if done.rows_affected() != 1 {
            return Ok(false);
        }
        for region in gone {
            sqlx::query(
                "DELETE FROM replications WHERE artifact = $1 AND encoding = $2 AND region = $3 \
                 AND removing = 1",
            )
            .bind(artifact.as_str())
            .bind(encoding.as_str())
            .bind(region.as_str())
            .execute(&mut *tx)
            .await?;
        }
        sqlx::query(
            "UPDATE encodings SET removal = 0 WHERE artifact = $1 AND encoding = $2 AND remove_main = 0 \
             AND NOT EXISTS (SELECT 1 FROM replications c WHERE c.artifact = $1 AND c.encoding = $2 \
             AND c.removing = 1)",
        )
        .bind(artifact.as_str())
        .bind(encoding.as_str())
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(true)
    }

    /// How many encodings' objects are still to be removed from some bucket.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn removals_open(&self) -> Result<u64> {
        let row = sqlx::query("SELECT COUNT(*) AS n FROM encodings WHERE removal > 0")
            .fetch_one(&mut *self.read().await?)
            .await?;
        number(&row, "n")
    }
}
