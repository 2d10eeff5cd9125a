//! Artifacts, and where their copies are.

use std::collections::{BTreeMap, BTreeSet};

use shoal_proto::{
    AppName, ArtifactId, CommitSha, EncodingId, RegionName, state::ReplicationStatus,
};
use sqlx::any::AnyRow;

use crate::{
    audit::{self, Actor},
    db::{Queue, Write, count, get, number, parsed, parsed_opt, placeholders},
    error::{QueueError, Result},
    events,
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
}

/// An encoding's copy in a region's bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Copy {
    /// Its state.
    pub status: ReplicationStatus,
    /// How many bytes are there.
    pub bytes_done: u64,
    /// When the copying began.
    pub started_at_ms: Option<i64>,
    /// When it was complete.
    pub finished_at_ms: Option<i64>,
    /// Why it failed last.
    pub reason: Option<String>,
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
    Ok(Artifact {
        name: get(row, "name")?,
        app: parsed(row, "app")?,
        stored: Stored {
            artifact: parsed(row, "artifact")?,
            encoding: parsed(row, "encoding")?,
            size_bytes: number(row, "size_bytes")?,
            encoded_bytes: number(row, "encoded_bytes")?,
            piece_size_bytes: number(row, "piece_size_bytes")?,
            pieces: number(row, "pieces")?,
        },
        origin: Origin { job: get(row, "job")?, commit: parsed_opt(row, "commit_sha")? },
        created_at_ms: get(row, "created_at")?,
        requested_by: get(row, "requested_by")?,
        copies: BTreeMap::new(),
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

/// Adds a PENDING copy for each region that has no row yet.
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
             ON CONFLICT (artifact, encoding, region) DO NOTHING",
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

/// An artifact by its name, in a transaction.
pub(crate) async fn by_name(tx: &mut Write, name: &str) -> Result<Option<Artifact>> {
    let row = sqlx::query("SELECT * FROM artifacts WHERE name = $1")
        .bind(name)
        .fetch_optional(&mut **tx)
        .await?;
    row.as_ref().map(artifact).transpose()
}

/// The regions in service where an artifact is not COMPLETE.
pub(crate) async fn not_complete(
    tx: &mut Write,
    stored: &Stored,
) -> Result<Vec<(RegionName, ReplicationStatus)>> {
    let rows = sqlx::query(
        "SELECT r.name AS region, c.status AS status FROM regions r LEFT JOIN replications c \
         ON c.region = r.name AND c.artifact = $1 AND c.encoding = $2 \
         WHERE r.configured = 1 AND r.drained = 0 ORDER BY r.name",
    )
    .bind(stored.artifact.to_string())
    .bind(stored.encoding.to_string())
    .fetch_all(&mut **tx)
    .await?;
    let mut pending = Vec::new();
    for row in &rows {
        let status = parsed_opt(row, "status")?.unwrap_or(ReplicationStatus::Pending);
        if status != ReplicationStatus::Complete {
            pending.push((parsed(row, "region")?, status));
        }
    }
    Ok(pending)
}

impl Queue {
    /// Gives what is stored whole in the main bucket a name as an app's artifact, and wants a copy of it in
    /// each region. When the name is there with the same bytes, what is there is returned.
    ///
    /// # Errors
    /// [`QueueError::NotFound`] for an unknown app, [`QueueError::Conflict`] when the name is another artifact's.
    pub async fn publish(
        &self,
        app: &AppName,
        name: &str,
        stored: &Stored,
        regions: &[RegionName],
        actor: &Actor,
        now_ms: i64,
    ) -> Result<Artifact> {
        // Outside of the transaction: apps are never removed.
        self.app(app).await?;
        let mut tx = self.write().await?;
        let new = NewArtifact { name, app, stored, origin: Origin::default() };
        if insert(&mut tx, &new, &actor.name, now_ms).await? {
            want_copies(&mut tx, stored, regions, now_ms).await?;
            events::of_artifact(&mut tx, name, now_ms).await?;
            let detail = stored.artifact.to_string();
            audit::record(&mut tx, now_ms, actor, "artifact.publish", name, &detail).await?;
            tx.commit().await?;
        } else if let Some(there) = by_name(&mut tx, name).await?
            && (there.stored.artifact != stored.artifact || there.app != *app)
        {
            let other = there.stored.artifact;
            return Err(QueueError::Conflict(format!("the name {name} is {other}'s already")));
        }
        self.artifact(name, Some(app)).await
    }

    /// An artifact by its name or its id; where several have the id, `app`'s newest one, else the newest.
    ///
    /// # Errors
    /// [`QueueError::NotFound`] when there is none.
    pub async fn artifact(&self, reference: &str, app: Option<&AppName>) -> Result<Artifact> {
        let row = match reference.parse::<ArtifactId>() {
            Ok(id) => {
                sqlx::query(
                    "SELECT * FROM artifacts WHERE artifact = $1 \
                     ORDER BY CASE WHEN app = $2 THEN 0 ELSE 1 END, created_at DESC, name LIMIT 1",
                )
                .bind(id.to_string())
                .bind(app.map_or("", AppName::as_str))
                .fetch_optional(&mut *self.read().await?)
                .await?
            }
            Err(_) => {
                sqlx::query("SELECT * FROM artifacts WHERE name = $1")
                    .bind(reference)
                    .fetch_optional(&mut *self.read().await?)
                    .await?
            }
        };
        let row = row.ok_or_else(|| {
            let short: String = reference.chars().take(100).collect();
            QueueError::NotFound(format!(
                "no artifact '{short}': give a name such as APP/SHA12-JOB or an id of 64 hex digits; \
                 shoal artifacts lists them"
            ))
        })?;
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

    pub(crate) async fn add_copies(&self, artifacts: &mut [Artifact]) -> Result<()> {
        type Key = (ArtifactId, EncodingId);
        let mut copies: BTreeMap<Key, BTreeMap<RegionName, Copy>> = BTreeMap::new();
        for chunk in artifacts.chunks(COPIES_CHUNK) {
            let mut sql = String::from(
                "SELECT c.* FROM replications c JOIN regions r ON r.name = c.region \
                 AND r.configured = 1 WHERE c.artifact IN ",
            );
            placeholders(&mut sql, 1, chunk.len());
            let mut query = sqlx::query(sqlx::AssertSqlSafe(sql)).persistent(false);
            for artifact in chunk {
                query = query.bind(artifact.stored.artifact.to_string());
            }
            for row in &query.fetch_all(&mut *self.read().await?).await? {
                let copy = Copy {
                    status: parsed(row, "status")?,
                    bytes_done: number(row, "bytes_done")?,
                    started_at_ms: get(row, "started_at")?,
                    finished_at_ms: get(row, "finished_at")?,
                    reason: get(row, "reason")?,
                };
                let key = (parsed(row, "artifact")?, parsed(row, "encoding")?);
                copies.entry(key).or_default().insert(parsed(row, "region")?, copy);
            }
        }
        for artifact in artifacts {
            let key = (artifact.stored.artifact, artifact.stored.encoding);
            artifact.copies = copies.get(&key).cloned().unwrap_or_default();
        }
        Ok(())
    }
}
