//! Pushes to the main branch: whose are believed, and which ones were taken.

use shoal_proto::AppName;
use sqlx::any::AnyRow;

use crate::{
    audit::{self, Actor},
    db::{Queue, get, parsed},
    error::{QueueError, Result},
    submit::{Ask, Submitted, submit_in},
};

/// Whose pushes start builds of an app.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PushSource {
    /// The app.
    pub app: AppName,
    /// The repository, as it is compared; empty: the app's own.
    pub repository: String,
    /// The branch that is built.
    pub branch: String,
    /// What its pushes are signed with, as it was sealed.
    pub sealed: String,
    /// Since when it is so.
    pub updated_at_ms: i64,
}

/// A push.
#[derive(Debug, Clone)]
pub struct Push {
    /// Its delivery's id, which its sender repeats when it sends it again.
    pub delivery: String,
    /// The branch.
    pub branch: String,
}

/// What became of a push.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Taken {
    /// It is built by this job.
    Now(Box<Submitted>),
    /// It had been taken before, for this job.
    Before(i64),
}

fn source(row: &AnyRow) -> Result<PushSource> {
    Ok(PushSource {
        app: parsed(row, "app")?,
        repository: get(row, "repository")?,
        branch: get(row, "branch")?,
        sealed: get(row, "secret")?,
        updated_at_ms: get(row, "updated_at")?,
    })
}

impl Queue {
    /// Lets pushes start builds of an app, or changes whose do.
    ///
    /// # Errors
    /// [`QueueError::NotFound`] for an unknown app.
    pub async fn set_push(&self, source: &PushSource, actor: &Actor) -> Result<()> {
        self.app(&source.app).await?;
        let mut tx = self.write().await?;
        sqlx::query(
            "INSERT INTO push_sources (app, repository, branch, secret, updated_at) VALUES ($1, $2, $3, $4, $5) \
             ON CONFLICT (app) DO UPDATE SET repository = excluded.repository, branch = excluded.branch, \
             secret = excluded.secret, updated_at = excluded.updated_at",
        )
        .bind(source.app.as_str())
        .bind(source.repository.as_str())
        .bind(source.branch.as_str())
        .bind(source.sealed.as_str())
        .bind(source.updated_at_ms)
        .execute(&mut *tx)
        .await?;
        let detail = format!("on: {} {}", source.branch, source.repository);
        let (app, now_ms) = (source.app.as_str(), source.updated_at_ms);
        audit::record(&mut tx, now_ms, actor, "app.push", app, &detail).await?;
        tx.commit().await
    }

    /// Lets no push start builds of an app any more.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn unset_push(&self, app: &AppName, actor: &Actor, now_ms: i64) -> Result<()> {
        let mut tx = self.write().await?;
        let gone = sqlx::query("DELETE FROM push_sources WHERE app = $1")
            .bind(app.as_str())
            .execute(&mut *tx)
            .await?;
        if gone.rows_affected() > 0 {
            audit::record(&mut tx, now_ms, actor, "app.push", app.as_str(), "off").await?;
        }
        tx.commit().await
    }

    /// Whose pushes start builds, by app.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn push_sources(&self) -> Result<Vec<PushSource>> {
        let rows = sqlx::query("SELECT * FROM push_sources ORDER BY app")
            .fetch_all(&mut *self.read().await?)
            .await?;
        rows.iter().map(source).collect()
    }

    /// Asks for the build of a push, as [`Queue::submit`] does, once however often its delivery comes.
    ///
    /// # Errors
    /// [`QueueError::NotFound`] when the app is not registered.
    pub async fn take_push(
        &self,
        push: &Push,
        ask: &Ask,
        actor: &Actor,
        now_ms: i64,
    ) -> Result<Taken> {
        let mut tx = self.write().await?;
        // Takes the lock of those who ask for builds: the same delivery, come twice at once, is here one after the other.
        let submitted = submit_in(&mut tx, ask, actor, now_ms).await?;
        let before = sqlx::query("SELECT job FROM pushes WHERE delivery = $1 AND app = $2")
            .bind(push.delivery.as_str())
            .bind(ask.app.as_str())
            .fetch_optional(&mut *tx)
            .await?;
        if let Some(row) = before {
            tx.undo().await?;
            return Ok(Taken::Before(get(&row, "job")?));
        }
        sqlx::query(
            "INSERT INTO pushes (delivery, app, job, commit_sha, branch, at) VALUES ($1, $2, $3, $4, $5, $6)",
        )
        .bind(push.delivery.as_str())
        .bind(ask.app.as_str())
        .bind(submitted.job.id)
        .bind(ask.commit.as_str())
        .bind(push.branch.as_str())
        .bind(now_ms)
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(Taken::Now(Box::new(submitted)))
    }

    /// Whose pushes start builds of an app.
    ///
    /// # Errors
    /// [`QueueError::NotFound`] when none do.
    pub async fn push_source(&self, app: &AppName) -> Result<PushSource> {
        let row = sqlx::query("SELECT * FROM push_sources WHERE app = $1")
            .bind(app.as_str())
            .fetch_optional(&mut *self.read().await?)
            .await?;
        source(&row.ok_or_else(|| {
            QueueError::NotFound(format!(
                "no push starts a build of {app}: shoal app push {app} --secret-file FILE lets one"
            ))
        })?)
    }
}
