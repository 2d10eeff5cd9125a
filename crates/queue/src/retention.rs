//! Which artifacts stay, and the end of the others: deleted from all buckets, never from the record.
//!
//! An app's newest artifacts stay, and beyond them whatever its goal names (with it a rollout that is under way), what the app would
//! go back to, what a machine has, runs or ran before, what is being built again, and what is pinned. The plan is made
//! under the same lock as the deletion, so nothing that is begun meanwhile loses what it counts on.

use std::collections::{BTreeMap, BTreeSet};

use shoal_proto::{AppName, ArtifactId, CommitSha, EncodingId};
use sqlx::AnyConnection;

use crate::{
    artifacts,
    audit::{self, Actor},
    db::{Queue, get, number, parsed, parsed_opt},
    error::{QueueError, Result},
    finish::short,
    goals, removal,
};

/// How many names are deleted in one transaction: it holds up those who give names.
const NAMES_MAX: usize = 100;

/// An artifact, and why it stays or goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// Its name.
    pub name: String,
    /// The artifact.
    pub artifact: ArtifactId,
    /// The encoding.
    pub encoding: EncodingId,
    /// How many bytes each bucket holds of it; several names may share them.
    pub encoded_bytes: u64,
    /// When it was made.
    pub created_at_ms: i64,
    /// Why.
    pub why: String,
}

/// What stays of an app's artifacts and what goes, newest first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// What goes.
    pub goes: Vec<Kept>,
    /// What stays.
    pub stays: Vec<Kept>,
    /// How many bytes each bucket then holds less: an encoding whose last name goes counts.
    pub freed_bytes: u64,
}

/// A pin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pin {
    /// The artifact's name.
    pub name: String,
    /// What the operator said.
    pub reason: Option<String>,
    /// Who it was.
    pub by: String,
    /// When.
    pub at_ms: i64,
}

/// What keeps artifacts of an app.
#[derive(Default)]
struct Uses {
    /// By name.
    names: BTreeMap<String, String>,
    /// By id, because that is what machines report.
    ids: BTreeMap<ArtifactId, String>,
    /// By commit.
    commits: BTreeMap<CommitSha, String>,
}

impl Uses {
    fn why(&self, name: &str, id: &ArtifactId, commit: Option<&CommitSha>) -> Option<&String> {
        let by_commit = || commit.and_then(|commit| self.commits.get(commit));
        self.names.get(name).or_else(|| self.ids.get(id)).or_else(by_commit)
    }
}

/// What machines have of an app. They come to have something else only by way of a goal, so this may be read before the
/// lock.
async fn machines(db: &mut AnyConnection, app: &AppName) -> Result<BTreeMap<ArtifactId, String>> {
    let mut ids = BTreeMap::new();
    for (column, what) in [
        ("artifact", "have it, or are on their way to it"),
        ("active", "run it"),
        ("was_active", "ran it before, and may go back to it"),
    ] {
        let sql = format!(
            "SELECT {column} AS id, COUNT(*) AS n FROM machine_apps WHERE app = $1 \
             AND {column} IS NOT NULL GROUP BY {column}"
        );
        let query = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(app.as_str());
        for row in &query.fetch_all(&mut *db).await? {
            let count: u64 = number(row, "n")?;
            ids.insert(parsed(row, "id")?, format!("{count} machines {what}"));
        }
    }
    Ok(ids)
}

async fn uses(db: &mut AnyConnection, app: &AppName) -> Result<Uses> {
    let mut uses = Uses::default();
    // The last reason that is found is the strongest.
    let jobs = sqlx::query(
        "SELECT id, commit_sha FROM jobs WHERE app = $1 AND status IN ('QUEUED', 'RUNNING') \
         AND cancel_requested = 0",
    );
    for row in &jobs.bind(app.as_str()).fetch_all(&mut *db).await? {
        let job: i64 = get(row, "id")?;
        uses.commits
            .insert(parsed(row, "commit_sha")?, format!("job {job} builds its commit again"));
    }
    match goals::previous(db, app).await {
        Ok(name) => {
            uses.names.insert(name, format!("shoal rollback {app} goes back to it"));
        }
        Err(QueueError::Conflict(_)) => {}
        Err(error) => return Err(error),
    }
    // A rollout that is under way is the goal's: the next goal ends it.
    let goal = sqlx::query(
        "SELECT r.artifact_name FROM apps a JOIN goals g ON g.seq = a.goal_seq \
         JOIN rollouts r ON r.id = g.rollout WHERE a.name = $1",
    );
    for row in &goal.bind(app.as_str()).fetch_all(&mut *db).await? {
        uses.names.insert(get(row, "artifact_name")?, format!("it is the goal of {app}"));
    }
    let pins = sqlx::query(
        "SELECT p.name, p.reason, p.pinned_by FROM pins p JOIN artifacts a ON a.name = p.name \
         WHERE a.app = $1",
    );
    for row in &pins.bind(app.as_str()).fetch_all(&mut *db).await? {
        let (by, reason): (String, Option<String>) = (get(row, "pinned_by")?, get(row, "reason")?);
        let reason = reason.map(|reason| format!(": {reason}")).unwrap_or_default();
        uses.names.insert(get(row, "name")?, format!("pinned by {by}{reason}"));
    }
    Ok(uses)
}

async fn plan(
    db: &mut AnyConnection,
    app: &AppName,
    last: u32,
    machines: &BTreeMap<ArtifactId, String>,
) -> Result<Plan> {
    let mut uses = uses(db, app).await?;
    uses.ids.clone_from(machines);
    let rows = sqlx::query(
        "SELECT name, artifact, encoding, encoded_bytes, commit_sha, created_at FROM artifacts \
         WHERE app = $1 AND deleted_at IS NULL ORDER BY created_at DESC, name DESC",
    )
    .bind(app.as_str())
    .fetch_all(&mut *db)
    .await?;
    let mut plan = Plan::default();
    for (place, row) in rows.iter().enumerate() {
        let mut it = Kept {
            name: get(row, "name")?,
            artifact: parsed(row, "artifact")?,
            encoding: parsed(row, "encoding")?,
            encoded_bytes: number(row, "encoded_bytes")?,
            created_at_ms: get(row, "created_at")?,
            why: String::new(),
        };
        let commit = parsed_opt(row, "commit_sha")?;
        if let Some(why) = uses.why(&it.name, &it.artifact, commit.as_ref()) {
            it.why = why.clone();
            plan.stays.push(it);
        } else if place < last as usize {
            it.why = format!("among the last {last} of {app}");
            plan.stays.push(it);
        } else {
            it.why = format!("beyond the last {last} of {app}, and nothing uses it");
            plan.goes.push(it);
        }
    }
    plan.freed_bytes = freed(db, &plan.goes).await?;
    Ok(plan)
}

/// The bytes of the encodings that lose their last name.
async fn freed(db: &mut AnyConnection, goes: &[Kept]) -> Result<u64> {
    let names: BTreeSet<&str> = goes.iter().map(|it| it.name.as_str()).collect();
    let encodings: BTreeMap<_, _> =
        goes.iter().map(|it| ((it.artifact, it.encoding), it.encoded_bytes)).collect();
    let mut bytes = 0;
    for ((artifact, encoding), encoded_bytes) in encodings {
        let sharing = sqlx::query(
            "SELECT name FROM artifacts WHERE artifact = $1 AND encoding = $2 AND deleted_at IS NULL",
        )
        .bind(artifact.to_string())
        .bind(encoding.to_string())
        .fetch_all(&mut *db)
        .await?;
        let mut stays = false;
        for row in &sharing {
            stays |= !names.contains(get::<String>(row, "name")?.as_str());
        }
        bytes += if stays { 0 } else { encoded_bytes };
    }
    Ok(bytes)
}

impl Queue {
    /// What would stay of an app's artifacts and what would go, if the last `last` are kept. Changes nothing.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn retention_plan(&self, app: &AppName, last: u32) -> Result<Plan> {
        let mut db = self.read().await?;
        let machines = machines(&mut db, app).await?;
        plan(&mut db, app, last, &machines).await
    }

    /// Deletes an app's artifacts beyond the last `last`, but those in use: their names at once, the objects of an encoding
    /// that has no name any more as removals ([`Queue::take_removals`]). Returns what went and what stays.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails; what was deleted before is deleted.
    pub async fn retain(
        &self,
        app: &AppName,
        last: u32,
        actor: &Actor,
        now_ms: i64,
    ) -> Result<Plan> {
        let mut all = Plan::default();
        loop {
            let machines = machines(&mut *self.read().await?, app).await?;
            let before = plan(&mut *self.read().await?, app, last, &machines).await?;
            if before.goes.is_empty() {
                all.stays = before.stays;
                return Ok(all);
            }
            let mut tx = self.write().await?;
            removal::lock_names(&mut tx).await?;
            let mut now = plan(&mut tx, app, last, &machines).await?;
            // The oldest first: what is left is deleted in the next transaction.
            let many = now.goes.len().saturating_sub(NAMES_MAX);
            let goes = now.goes.split_off(many);
            all.freed_bytes += freed(&mut tx, &goes).await?;
            for it in &goes {
                sqlx::query(
                    "UPDATE artifacts SET deleted_at = $1, deleted_by = $2, deleted_why = $3 \
                     WHERE name = $4 AND deleted_at IS NULL",
                )
                .bind(now_ms)
                .bind(actor.name.as_str())
                .bind(it.why.as_str())
                .bind(it.name.as_str())
                .execute(&mut *tx)
                .await?;
                audit::record(&mut tx, now_ms, actor, "artifact.delete", &it.name, &it.why).await?;
            }
            for it in &goes {
                removal::want_removal(&mut tx, &it.artifact.to_string(), &it.encoding.to_string())
                    .await?;
            }
            tx.commit().await?;
            all.goes.extend(goes);
        }
    }

    /// Keeps an artifact whatever comes. Pinned twice is pinned with the newer reason.
    ///
    /// # Errors
    /// [`QueueError::NotFound`], or [`QueueError::Conflict`] when it was deleted.
    pub async fn pin(
        &self,
        name: &str,
        reason: Option<&str>,
        actor: &Actor,
        now_ms: i64,
    ) -> Result<()> {
        let mut tx = self.write().await?;
        let artifact = artifacts::by_name(&mut tx, name).await?;
        let artifact =
            artifact.ok_or_else(|| QueueError::NotFound(format!("no artifact '{name}'")))?;
        if let Some(deleted) = &artifact.deleted {
            return Err(QueueError::Conflict(format!("{name} cannot be pinned: {deleted}")));
        }
        let reason = reason.map(short);
        sqlx::query(
            "INSERT INTO pins (name, reason, pinned_by, pinned_at) VALUES ($1, $2, $3, $4) \
             ON CONFLICT (name) DO UPDATE SET reason = excluded.reason, \
             pinned_by = excluded.pinned_by, pinned_at = excluded.pinned_at",
        )
        .bind(name)
        .bind(reason)
        .bind(actor.name.as_str())
        .bind(now_ms)
        .execute(&mut *tx)
        .await?;
        let detail = reason.unwrap_or_default();
        audit::record(&mut tx, now_ms, actor, "artifact.pin", name, detail).await?;
        tx.commit().await
    }

    /// Takes a pin away. False: there was none.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn unpin(&self, name: &str, actor: &Actor, now_ms: i64) -> Result<bool> {
        let mut tx = self.write().await?;
        let done =
            sqlx::query("DELETE FROM pins WHERE name = $1").bind(name).execute(&mut *tx).await?;
        if done.rows_affected() == 0 {
            return Ok(false);
        }
        audit::record(&mut tx, now_ms, actor, "artifact.unpin", name, "").await?;
        tx.commit().await?;
        Ok(true)
    }

    /// The newest `limit` pins.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn pins(&self, limit: u32) -> Result<Vec<Pin>> {
        let rows = sqlx::query("SELECT * FROM pins ORDER BY pinned_at DESC, name LIMIT $1")
            .bind(i64::from(limit))
            .fetch_all(&mut *self.read().await?)
            .await?;
        let pin = |row| {
            Ok(Pin {
                name: get(row, "name")?,
                reason: get(row, "reason")?,
                by: get(row, "pinned_by")?,
                at_ms: get(row, "pinned_at")?,
            })
        };
        rows.iter().map(pin).collect()
    }
}
