//! Artifacts, and where their copies are.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use shoal_proto::{
    AppName, ArtifactId, CommitSha, EncodingId, RegionName, state::ReplicationStatus,
};
use sqlx::any::AnyRow;

use crate::{
    audit::{self, Actor},
    db::{Queue, Write, count, get, number, parsed, parsed_opt, placeholders},
    error::{QueueError, Result},
    events, removal,
};

/// What lies whole in the main bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// BLAKE3 of the artifact's bytes.
    pub artifact: ArtifactId,
    /// The encoding.
    pub encoding: EncodingId,
    /// The artifact's length in bytes.
    pub size_bytes: u64,
    /// The length of its stored pieces.
    pub encoded_bytes: u64,
    /// The length of a piece.
    pub piece_size_bytes: u64,
    /// The number of pieces.
    pub pieces: u32,
}

/// What an artifact was made of; neither for one that was published.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Origin {
    /// The job.
    pub job: Option<i64>,
    /// The commit.
    pub commit: Option<CommitSha>,
}

/// A named artifact of an app.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Artifact {
    /// Its name, which is unique.
    pub name: String,
    /// The app.
    pub app: AppName,
    /// What is stored.
    pub stored: Stored,
    /// What it was made of.
    pub origin: Origin,
    /// When its row came about.
    pub created_at_ms: i64,
    /// Who asked for it.
    pub requested_by: String,
    /// Its copy in each region.
    pub copies: BTreeMap<RegionName, Copy>,
    /// What its main bucket lost of it, as an inspection found.
    pub main_damage: Option<String>,
    /// When and why its objects were deleted from all buckets; none while it lives.
    pub deleted: Option<Deleted>,
}

/// The end of an artifact: its row stays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deleted {
    /// When.
    pub at_ms: i64,
    /// By whom.
    pub by: String,
    /// Why.
    pub why: String,
    /// How to have it again.
    again: String,
}

impl fmt::Display for Deleted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "it was deleted ({}): make it again with: {}", self.why, self.again)
    }
}

/// An encoding's copy in a region's bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Copy {
    /// Its state.
    pub status: ReplicationStatus,
    /// How many bytes are there.
    pub bytes_done: u64,
    /// How many bytes came in a second, of late.
    pub bytes_per_s: u64,
    /// When the copying began.
    pub started_at_ms: Option<i64>,
    /// When it was complete.
    pub finished_at_ms: Option<i64>,
    /// Why it failed last, or what it waits for.
    pub reason: Option<String>,
    /// When an inspection found that the bucket had lost some of it; none once that is repaired.
    pub damaged_at_ms: Option<i64>,
    /// When it was inspected last.
    pub checked_at_ms: Option<i64>,
}

pub(crate) struct NewArtifact<'a> {
    pub(crate) name: &'a str,
    pub(crate) app: &'a AppName,
    pub(crate) stored: &'a Stored,
    pub(crate) origin: Origin,
}

/// How many artifacts' copies one query reads: three parameters' worth of columns, far below any limit.
const COPIES_CHUNK: usize = 500;

pub(crate) fn artifact(row: &AnyRow) -> Result<Artifact> {
    let commit: Option<CommitSha> = parsed_opt(row, "commit_sha")?;
    let app: AppName = parsed(row, "app")?;
    let again = match &commit {
        Some(commit) => format!("shoal build {app} {commit}"),
        None => format!("shoal publish FILE --app {app}"),
    };
    let deleted = match get(row, "deleted_at")? {
        Some(at_ms) => Some(Deleted {
            at_ms,
            by: get::<Option<String>>(row, "deleted_by")?.unwrap_or_default(),
            why: get::<Option<String>>(row, "deleted_why")?.unwrap_or_default(),
            again,
        }),
        None => None,
    };
    Ok(Artifact {
        name: get(row, "name")?,
        app,
        stored: Stored {
            artifact: parsed(row, "artifact")?,
            encoding: parsed(row, "encoding")?,
            size_bytes: number(row, "size_bytes")?,
            encoded_bytes: number(row, "encoded_bytes")?,
            piece_size_bytes: number(row, "piece_size_bytes")?,
            pieces: number(row, "pieces")?,
        },
        origin: Origin { job: get(row, "job")?, commit },
        created_at_ms: get(row, "created_at")?,
        requested_by: get(row, "requested_by")?,
        copies: BTreeMap::new(),
        main_damage: None,
        deleted,
    })
}

/// Adds an artifact's row. False: there is one of that name.
pub(crate) async fn insert(
    tx: &mut Write,
    new: &NewArtifact<'_>,
    requested_by: &str,
    now_ms: i64,
) -> Result<bool> {
    let done = sqlx::query(
        "INSERT INTO artifacts (name, app, artifact, encoding, size_bytes, encoded_bytes, \
         piece_size_bytes, pieces, job, commit_sha, created_at, requested_by) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12) ON CONFLICT (name) DO NOTHING",
    )
    .bind(new.name)
    .bind(new.app.as_str())
    .bind(new.stored.artifact.to_string())
    .bind(new.stored.encoding.to_string())
    .bind(count(new.stored.size_bytes))
    .bind(count(new.stored.encoded_bytes))
    .bind(count(new.stored.piece_size_bytes))
    .bind(i64::from(new.stored.pieces))
    .bind(new.origin.job)
    .bind(new.origin.commit.as_ref().map(CommitSha::as_str))
    .bind(now_ms)
    .bind(requested_by)
    .execute(&mut **tx)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Adds a PENDING copy for each region that has no row yet, or one whose objects were to be removed.
pub(crate) async fn want_copies(
    tx: &mut Write,
    stored: &Stored,
    regions: &[RegionName],
    now_ms: i64,
) -> Result<u64> {
    let mut added = 0;
    for region in regions {
        let done = sqlx::query(
            "INSERT INTO replications (artifact, encoding, region, status, bytes_done, created_at, \
             tries, next_try_at, owned_until) VALUES ($1, $2, $3, 'PENDING', 0, $4, 0, 0, 0) \
             ON CONFLICT (artifact, encoding, region) DO UPDATE SET status = 'PENDING', removing = 0, \
             bytes_done = 0, created_at = excluded.created_at, started_at = NULL, finished_at = NULL, \
             next_try_at = 0, owned_until = 0, reason = NULL, doubted = NULL, damaged_at = NULL \
             WHERE replications.removing = 1",
        )
        .bind(stored.artifact.to_string())
        .bind(stored.encoding.to_string())
        .bind(region.as_str())
        .bind(now_ms)
        .execute(&mut **tx)
        .await?;
        added += done.rows_affected();
    }
    Ok(added)
}

/// An artifact by its name, in a transaction that relies on its not being deleted meanwhile.
pub(crate) async fn by_name(tx: &mut Write, name: &str) -> Result<Option<Artifact>> {
    let sql = format!("SELECT * FROM artifacts WHERE name = $1{}", tx.dialect.for_update());
    let row = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(name).fetch_optional(&mut **tx).await?;
    row.as_ref().map(artifact).transpose()
}

/// Brings an artifact that was deleted back to life: it was made again, under the same name.
async fn revive(tx: &mut Write, name: &str, stored: &Stored, now_ms: i64) -> Result<()> {
    sqlx::query(
        "UPDATE artifacts SET deleted_at = NULL, deleted_by = NULL, deleted_why = NULL, \
         encoding = $1, encoded_bytes = $2, piece_size_bytes = $3, pieces = $4, created_at = $5 \
         WHERE name = $6",
    )
    .bind(stored.encoding.to_string())
    .bind(count(stored.encoded_bytes))
    .bind(count(stored.piece_size_bytes))
    .bind(i64::from(stored.pieces))
    .bind(now_ms)
    .bind(name)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

impl Queue {
    /// Gives what is stored whole in the main bucket a name as an app's artifact, and wants a copy of it in
    /// each region. When the name is there with the same bytes, what is there is returned; one that was deleted lives again.
    ///
    /// # Errors
    /// [`QueueError::NotFound`] for an unknown app, [`QueueError::Conflict`] when the name is another artifact's,
    /// [`QueueError::ObjectsGone`] while somebody removes its objects.
    pub async fn publish(
        &self,
        app: &AppName,
        name: &str,
        stored: &Stored,
        regions: &[RegionName],
        actor: &Actor,
        now_ms: i64,
    ) -> Result<Artifact> {
        self.publish_seen(app, name, (stored, None), regions, actor, now_ms).await
    }

    /// [`Queue::publish`] of objects that were seen in the main bucket: `seen` is what [`Queue::generation`] said before
    /// that. Without it, that they are there is certain.
    ///
    /// # Errors
    /// As [`Queue::publish`]; [`QueueError::ObjectsGone`] when they were removed since, too.
    pub async fn publish_seen(
        &self,
        app: &AppName,
        name: &str,
        (stored, seen): (&Stored, Option<i64>),
        regions: &[RegionName],
        actor: &Actor,
        now_ms: i64,
    ) -> Result<Artifact> {
        // Outside of the transaction: apps are never removed.
        self.app(app).await?;
        let mut tx = self.write().await?;
        let new = NewArtifact { name, app, stored, origin: Origin::default() };
        let mut lives = insert(&mut tx, &new, &actor.name, now_ms).await?;
        if !lives && let Some(there) = by_name(&mut tx, name).await? {
            if there.stored.artifact != stored.artifact || there.app != *app {
                let other = there.stored.artifact;
                return Err(QueueError::Conflict(format!("the name {name} is {other}'s already")));
            }
            if there.deleted.is_some() {
                revive(&mut tx, name, stored, now_ms).await?;
                lives = true;
            }
        }
        if lives {
            removal::admit(&mut tx, stored, seen, now_ms).await?;
            want_copies(&mut tx, stored, regions, now_ms).await?;
            events::of_artifact(&mut tx, name, now_ms).await?;
            let detail = stored.artifact.to_string();
            audit::record(&mut tx, now_ms, actor, "artifact.publish", name, &detail).await?;
            tx.commit().await?;
        }
        self.artifact(name, Some(app)).await
    }

    /// An artifact by its name or its id; where several have the id, `app`'s newest one, else the newest.
    ///
    /// # Errors
    /// [`QueueError::NotFound`] when there is none.
    pub async fn artifact(&self, reference: &str, app: Option<&AppName>) -> Result<Artifact> {
        let query = match reference.parse::<ArtifactId>() {
            Ok(id) => sqlx::query(
                "SELECT * FROM artifacts WHERE artifact = $1 \
                 ORDER BY CASE WHEN app = $2 THEN 0 ELSE 1 END, \
                 CASE WHEN deleted_at IS NULL THEN 0 ELSE 1 END, created_at DESC, name LIMIT 1",
            )
            .bind(id.to_string())
            .bind(app.map_or("", AppName::as_str)),
            Err(_) => sqlx::query("SELECT * FROM artifacts WHERE name = $1").bind(reference),
        };
        let row = self.look_at(query).await?;
        let row = row.ok_or_else(|| QueueError::no_artifact(reference))?;
        let mut found = vec![artifact(&row)?];
        self.add_copies(&mut found).await?;
        found.pop().ok_or_else(|| QueueError::Corrupt("an artifact that vanished".into()))
    }

    /// The newest `limit` artifacts, newest first, of one app or of all.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn artifacts(&self, app: Option<&AppName>, limit: u32) -> Result<Vec<Artifact>> {
        let apps = app.map(|app| BTreeSet::from([app.clone()]));
        self.artifacts_page(apps.as_ref(), None, limit).await
    }

    /// The newest `limit` living artifacts that are not whole in some bucket, newest first.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn artifacts_not_whole(&self, limit: u32) -> Result<Vec<Artifact>> {
        let rows = sqlx::query(
            "SELECT * FROM artifacts WHERE deleted_at IS NULL AND (artifact, encoding) IN \
             (SELECT c.artifact, c.encoding FROM replications c JOIN regions r ON r.name = c.region \
             AND r.configured = 1 WHERE c.status IN ('PENDING', 'COPYING', 'FAILED') AND c.removing = 0 \
             UNION SELECT artifact, encoding FROM encodings WHERE damage IS NOT NULL) \
             ORDER BY created_at DESC, name LIMIT $1",
        )
        .bind(i64::from(limit))
        .fetch_all(&mut *self.read().await?)
        .await?;
        let mut found = rows.iter().map(artifact).collect::<Result<Vec<_>>>()?;
        self.add_copies(&mut found).await?;
        Ok(found)
    }

    pub(crate) async fn add_copies(&self, artifacts: &mut [Artifact]) -> Result<()> {
        type Key = (ArtifactId, EncodingId);
        let mut copies: BTreeMap<Key, BTreeMap<RegionName, Copy>> = BTreeMap::new();
        let mut damages: BTreeMap<Key, String> = BTreeMap::new();
        // As many texts as lists are long: only the most frequent one is worth a place among the prepared statements.
        let alone = artifacts.len() == 1;
        for chunk in artifacts.chunks(COPIES_CHUNK) {
            let mut sql = String::from(
                "SELECT c.* FROM replications c JOIN regions r ON r.name = c.region \
                 AND r.configured = 1 WHERE c.removing = 0 AND c.artifact IN ",
            );
            placeholders(&mut sql, 1, chunk.len());
            let mut query = sqlx::query(sqlx::AssertSqlSafe(sql)).persistent(alone);
            for artifact in chunk {
                query = query.bind(artifact.stored.artifact.to_string());
            }
            for row in &self.look(query).await? {
                let copy = Copy {
                    status: parsed(row, "status")?,
                    bytes_done: number(row, "bytes_done")?,
                    bytes_per_s: number(row, "bytes_per_s")?,
                    started_at_ms: get(row, "started_at")?,
                    finished_at_ms: get(row, "finished_at")?,
                    reason: get(row, "reason")?,
                    damaged_at_ms: get(row, "damaged_at")?,
                    checked_at_ms: get(row, "checked_at")?,
                };
                let key = (parsed(row, "artifact")?, parsed(row, "encoding")?);
                copies.entry(key).or_default().insert(parsed(row, "region")?, copy);
            }
            let mut sql = String::from(
                "SELECT artifact, encoding, damage FROM encodings \
                 WHERE damage IS NOT NULL AND artifact IN ",
            );
            placeholders(&mut sql, 1, chunk.len());
            let mut query = sqlx::query(sqlx::AssertSqlSafe(sql)).persistent(alone);
            for artifact in chunk {
                query = query.bind(artifact.stored.artifact.to_string());
            }
            for row in &self.look(query).await? {
                let key = (parsed(row, "artifact")?, parsed(row, "encoding")?);
                damages.insert(key, get(row, "damage")?);
            }
        }
        for artifact in artifacts {
            let key = (artifact.stored.artifact, artifact.stored.encoding);
            artifact.copies = copies.get(&key).cloned().unwrap_or_default();
            artifact.main_damage = damages.get(&key).cloned();
        }
        Ok(())
    }
}
