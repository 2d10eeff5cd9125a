//! Deploying the main branch by itself.
//!
//! Builds that a push brought are deployed when they may be: only forward, by the order of their jobs, and never over
//! what an operator went back to. Whether it still holds is looked at in the goal's own transaction
//! ([`crate::Choice::Following`]), so an operator and the coordinator on duty cannot cross.

use shoal_proto::AppName;
use sqlx::any::AnyRow;

use crate::{
    audit::{self, Actor},
    db::{Queue, Write, get, parsed},
    error::{QueueError, Result},
    events::EVERYWHERE,
};

/// An app whose main branch is deployed by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AutoDeploy {
    /// The app.
    pub app: AppName,
    /// Only builds after this one.
    pub after_job: i64,
    /// Why nothing is deployed at present.
    pub suspended: Option<Suspension>,
}

/// Why nothing is deployed by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Suspension {
    /// The reason.
    pub reason: String,
    /// Who caused it.
    pub by: String,
    /// When.
    pub at_ms: i64,
}

/// A build that is to be deployed by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upcoming {
    /// The app.
    pub app: AppName,
    /// The job.
    pub job: i64,
    /// Its artifact's name.
    pub name: String,
}

fn auto_deploy(row: &AnyRow) -> Result<AutoDeploy> {
    let reason: Option<String> = get(row, "suspended_reason")?;
    let suspended = match reason {
        Some(reason) => Some(Suspension {
            reason,
            by: get::<Option<String>>(row, "suspended_by")?.unwrap_or_default(),
            at_ms: get::<Option<i64>>(row, "suspended_at")?.unwrap_or_default(),
        }),
        None => None,
    };
    Ok(AutoDeploy { app: parsed(row, "app")?, after_job: get(row, "after_job")?, suspended })
}

/// The job of the app's newest job: what is there is not deployed by itself any more.
async fn newest_job(tx: &mut Write, app: &AppName) -> Result<i64> {
    let row = sqlx::query("SELECT COALESCE(MAX(id), 0) AS job FROM jobs WHERE app = $1")
        .bind(app.as_str())
        .fetch_one(&mut **tx)
        .await?;
    get(&row, "job")
}

/// The job of an app's present goal; none when it has no goal, or one that was published. The app's row is locked.
pub(crate) async fn present_job(tx: &mut Write, app: &AppName) -> Result<Option<i64>> {
    let row = sqlx::query(
        "SELECT a.job FROM apps p JOIN goals g ON g.seq = p.goal_seq JOIN rollouts r ON r.id = g.rollout \
         JOIN artifacts a ON a.name = r.artifact_name WHERE p.name = $1",
    )
    .bind(app.as_str())
    .fetch_optional(&mut **tx)
    .await?;
    row.map_or(Ok(None), |row| get(&row, "job"))
}

/// Refuses a goal that is set by itself, unless it still goes forward and nobody said otherwise. The app's row is
/// locked.
pub(crate) async fn check_in(tx: &mut Write, app: &AppName, job: i64) -> Result<()> {
    let row = sqlx::query("SELECT * FROM auto_deploys WHERE app = $1")
        .bind(app.as_str())
        .fetch_optional(&mut **tx)
        .await?;
    let no =
        |why: String| Err(QueueError::Conflict(format!("{app} is not deployed by itself: {why}")));
    let Some(row) = row else { return no("it is off".into()) };
    let auto = auto_deploy(&row)?;
    if let Some(suspended) = auto.suspended {
        return no(suspended.reason);
    }
    if job <= auto.after_job {
        return no(format!("job {job} was there when it was switched on"));
    }
    match present_job(tx, app).await? {
        Some(present) if present >= job => {
            no(format!("it runs job {present}, which is not older than {job}"))
        }
        _ => Ok(()),
    }
}

/// Suspends it when an operator went back: by a rollback, or by deploying an older build. `before`: the job of the goal
/// that is replaced.
pub(crate) async fn goal_set_in(
    tx: &mut Write,
    app: &AppName,
    (before, now): (Option<i64>, Option<i64>),
    (rollback, name): (bool, &str),
    actor: &Actor,
    now_ms: i64,
) -> Result<()> {
    let older = matches!((before, now), (Some(before), Some(now)) if now < before);
    if !rollback && !older {
        return Ok(());
    }
    let verb = if rollback { "went back to" } else { "deployed the older" };
    let reason = format!("{} {verb} {name}", actor.name);
    sqlx::query(
        "UPDATE auto_deploys SET suspended_at = $1, suspended_by = $2, suspended_reason = $3 WHERE app = $4",
    )
    .bind(now_ms)
    .bind(actor.name.as_str())
    .bind(reason)
    .bind(app.as_str())
    .execute(&mut **tx)
    .await?;
    Ok(())
}

impl Queue {
    /// Deploys the main branch of an app by itself from now on, or no longer; builds that are there already are not
    /// deployed. Switching it on ends a suspension.
    ///
    /// # Errors
    /// [`QueueError::NotFound`] for an unknown app.
    pub async fn set_auto_deploy(
        &self,
        app: &AppName,
        on: bool,
        actor: &Actor,
        now_ms: i64,
    ) -> Result<()> {
        self.app(app).await?;
        let mut tx = self.write().await?;
        if on {
            let after = newest_job(&mut tx, app).await?;
            sqlx::query(
                "INSERT INTO auto_deploys (app, after_job) VALUES ($1, $2) ON CONFLICT (app) DO UPDATE SET \
                 after_job = CASE WHEN auto_deploys.suspended_reason IS NULL THEN auto_deploys.after_job \
                 ELSE excluded.after_job END, suspended_at = NULL, suspended_by = NULL, suspended_reason = NULL",
            )
            .bind(app.as_str())
            .bind(after)
            .execute(&mut *tx)
            .await?;
        } else {
            sqlx::query("DELETE FROM auto_deploys WHERE app = $1")
                .bind(app.as_str())
                .execute(&mut *tx)
                .await?;
        }
        let detail = if on { "on" } else { "off" };
        audit::record(&mut tx, now_ms, actor, "app.auto_deploy", app.as_str(), detail).await?;
        tx.commit().await
    }

    /// Goes on after a rollback, with builds that are asked for from now on and those that are under way.
    ///
    /// # Errors
    /// [`QueueError::Conflict`] when it is not on.
    pub async fn resume_auto_deploy(
        &self,
        app: &AppName,
        actor: &Actor,
        now_ms: i64,
    ) -> Result<()> {
        self.app(app).await?;
        let mut tx = self.write().await?;
        // What the operator went back from has a higher number than what runs, and must not come back by itself: only
        // what was not deployable yet may.
        let row = sqlx::query(
            "SELECT COALESCE(MAX(p.job), 0) AS job FROM pushes p JOIN jobs j ON j.id = p.job \
             WHERE p.app = $1 AND EXISTS (SELECT 1 FROM rollouts o WHERE o.artifact_name = j.name)",
        )
        .bind(app.as_str())
        .fetch_one(&mut *tx)
        .await?;
        let deployed: i64 = get(&row, "job")?;
        let resumed = sqlx::query(
            "UPDATE auto_deploys SET suspended_at = NULL, suspended_by = NULL, suspended_reason = NULL, \
             after_job = CASE WHEN after_job < $1 THEN $1 ELSE after_job END WHERE app = $2",
        )
        .bind(deployed)
        .bind(app.as_str())
        .execute(&mut *tx)
        .await?;
        if resumed.rows_affected() == 0 {
            return Err(QueueError::Conflict(format!(
                "{app} is not deployed by itself: switch it on with shoal app auto-deploy {app} on"
            )));
        }
        audit::record(&mut tx, now_ms, actor, "app.auto_deploy", app.as_str(), "resume").await?;
        tx.commit().await
    }

    /// The apps whose main branch is deployed by itself, by name.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn auto_deploys(&self) -> Result<Vec<AutoDeploy>> {
        let rows = sqlx::query("SELECT * FROM auto_deploys ORDER BY app")
            .fetch_all(&mut *self.read().await?)
            .await?;
        rows.iter().map(auto_deploy).collect()
    }

    /// How an app's main branch is deployed by itself; none: it is not.
    ///
    /// # Errors
    /// [`QueueError::NotFound`] for an unknown app.
    pub async fn auto_deploy(&self, app: &AppName) -> Result<Option<AutoDeploy>> {
        self.app(app).await?;
        let row = sqlx::query("SELECT * FROM auto_deploys WHERE app = $1")
            .bind(app.as_str())
            .fetch_optional(&mut *self.read().await?)
            .await?;
        row.as_ref().map(auto_deploy).transpose()
    }

    /// The newest build of each app that is to be deployed by itself now.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn upcoming(&self) -> Result<Vec<Upcoming>> {
        let sql = format!(
            "SELECT d.app, p.job, a.name FROM auto_deploys d JOIN pushes p ON p.app = d.app \
             AND p.job > d.after_job AND p.job > COALESCE((SELECT b.job FROM apps q JOIN goals g ON g.seq = q.goal_seq \
                 JOIN rollouts o ON o.id = g.rollout JOIN artifacts b ON b.name = o.artifact_name \
                 WHERE q.name = d.app), 0) \
             JOIN jobs j ON j.id = p.job AND j.status = 'SUCCEEDED' JOIN artifacts a ON a.name = j.name \
             WHERE d.suspended_reason IS NULL AND {EVERYWHERE} ORDER BY d.app, p.job DESC"
        );
        let rows =
            sqlx::query(sqlx::AssertSqlSafe(sql)).fetch_all(&mut *self.read().await?).await?;
        let mut upcoming: Vec<Upcoming> = Vec::new();
        for row in &rows {
            let next = Upcoming {
                app: parsed(row, "app")?,
                job: get(row, "job")?,
                name: get(row, "name")?,
            };
            // The first one of an app is its newest.
            if upcoming.last().is_none_or(|last| last.app != next.app) {
                upcoming.push(next);
            }
        }
        Ok(upcoming)
    }
}
