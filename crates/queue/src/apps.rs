//! Apps. What an app is made of is its owner's JSON; here it is kept, not read.

use shoal_proto::{AppName, Revision};
use sqlx::any::AnyRow;

use crate::{
    audit::{self, Actor},
    db::{Queue, Write, get, number, parsed},
    error::{QueueError, Result},
};

/// More goals than can have been lost with the newest backup: a century of 20,000 a day.
const CURSOR_JUMP: i64 = 1_000_000_000;

/// A registered app.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AppRow {
    /// Its name.
    pub name: AppName,
    /// What it is made of, as JSON.
    pub spec: String,
}

pub(crate) fn app(row: &AnyRow) -> Result<AppRow> {
    Ok(AppRow { name: parsed(row, "name")?, spec: get(row, "spec")? })
}

impl Queue {
    /// Registers an app, or changes it.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn set_app(&self, app: &AppRow, actor: &Actor, now_ms: i64) -> Result<()> {
        let mut tx = self.write().await?;
        sqlx::query(
            "INSERT INTO apps (name, spec, created_at, updated_at) VALUES ($1, $2, $3, $3) \
             ON CONFLICT (name) DO UPDATE SET spec = excluded.spec, updated_at = excluded.updated_at",
        )
        .bind(app.name.as_str())
        .bind(app.spec.as_str())
        .bind(now_ms)
        .execute(&mut *tx)
        .await?;
        audit::record(&mut tx, now_ms, actor, "app.set", app.name.as_str(), &app.spec).await?;
        tx.commit().await
    }

    /// All apps, by name.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn apps(&self) -> Result<Vec<AppRow>> {
        let rows = self.look(sqlx::query("SELECT name, spec FROM apps ORDER BY name")).await?;
        rows.iter().map(app).collect()
    }

    /// One app.
    ///
    /// # Errors
    /// [`QueueError::NotFound`] when it is not registered.
    pub async fn app(&self, name: &AppName) -> Result<AppRow> {
        let query = sqlx::query("SELECT name, spec FROM apps WHERE name = $1").bind(name.as_str());
        let row = self.look_at(query).await?;
        app(&row.ok_or_else(|| QueueError::no_app(name))?)
    }

    /// Raises the epoch of all revisions to `epoch`, after a restore from a backup that may have lost some. The cursor of
    /// the goals jumps, too, past all that were told before: whoever asks with one of those misses no new goal.
    ///
    /// # Errors
    /// [`QueueError::Conflict`] when the epoch is not lower than that.
    pub async fn raise_epoch(&self, epoch: u32, actor: &Actor, now_ms: i64) -> Result<()> {
        let mut tx = self.write().await?;
        let raised =
            sqlx::query("UPDATE counters SET value = $1 WHERE name = 'epoch' AND value < $1")
                .bind(i64::from(epoch))
                .execute(&mut *tx)
                .await?;
        if raised.rows_affected() == 0 {
            return Err(QueueError::Conflict(format!("the epoch is {epoch} or higher already")));
        }
        sqlx::query("UPDATE counters SET value = value + $1 WHERE name = 'goal'")
            .bind(CURSOR_JUMP)
            .execute(&mut *tx)
            .await?;
        audit::record(&mut tx, now_ms, actor, "epoch.raise", "epoch", &epoch.to_string()).await?;
        tx.commit().await
    }
}

/// An app that is to get a goal.
pub(crate) struct Next {
    pub(crate) app: AppRow,
    pub(crate) revision: Revision,
    /// The job of its present goal; none when it has no goal, or one that was published.
    pub(crate) present_job: Option<i64>,
}

/// Gives an app its next revision; the app's row stays locked until the commit.
pub(crate) async fn next_revision(tx: &mut Write, name: &AppName) -> Result<Next> {
    let row = sqlx::query(
        "UPDATE apps SET revision = revision + 1 WHERE name = $1 \
         RETURNING name, spec, revision, (SELECT value FROM counters WHERE name = 'epoch') AS epoch, \
         (SELECT a.job FROM goals g JOIN rollouts r ON r.id = g.rollout JOIN artifacts a ON a.name = r.artifact_name \
         WHERE g.seq = apps.goal_seq) AS present_job",
    )
    .bind(name.as_str())
    .fetch_optional(&mut **tx)
    .await?;
    let row = row.ok_or_else(|| QueueError::no_app(name))?;
    Ok(Next {
        app: app(&row)?,
        revision: Revision { epoch: number(&row, "epoch")?, number: number(&row, "revision")? },
        present_job: get(&row, "present_job")?,
    })
}
