//! Goals: numbered and stored with their rollout and audit rows in one transaction, and read by a cursor.

use shoal_proto::{AppName, Revision, goal::RolloutPlan, state::RolloutStatus};
use sqlx::AnyConnection;

use crate::{
    apps::{self, AppRow},
    artifacts::{self, Artifact},
    audit::{self, Actor},
    auto_deploy,
    db::{self, Queue, count, get, number, parsed, to_json},
    error::{QueueError, Result},
    events::{self, EventKind},
    outbox, requests,
    rollouts::{self, Ending, Rollout, Targets},
    standing,
};

/// The most goals of one answer: one an app, and each is under 2 KB of hexadecimal.
pub const GOALS_MAX: u32 = 1_000;

/// What an app shall run.
#[derive(Debug, Clone)]
pub enum Choice {
    /// The artifact of this name.
    Named(String),
    /// What it ran before the present goal: the artifact of the last rollout before that SUCCEEDED with
    /// another artifact; where none did, the goal before.
    Previous,
    /// The artifact of a build of the main branch, if it is still to be deployed by itself.
    Following {
        /// The artifact's name.
        name: String,
        /// The job that built it.
        job: i64,
    },
}

/// What the one who signs a goal is given.
#[derive(Debug)]
pub struct GoalDraft<'a> {
    /// The app, as it is now.
    pub app: &'a AppRow,
    /// The artifact.
    pub artifact: &'a Artifact,
    /// The number that the goal gets.
    pub revision: Revision,
}

/// A goal that was made of a [`GoalDraft`].
#[derive(Debug)]
pub struct SealedGoal {
    /// The signed goal, in hexadecimal.
    pub signed: String,
    /// The machines that it selects, as its text.
    pub selector: String,
    /// Its plan.
    pub plan: RolloutPlan,
    /// For how many machines it is.
    pub targets: Targets,
}

/// Goals that changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GoalsAfter {
    /// To be asked with the next time.
    pub cursor: i64,
    /// The newest goal of each app that changed, in hexadecimal, oldest first.
    pub signed: Vec<String>,
    /// Newest goals whose rollouts are paused or ended badly.
    pub halted: Vec<(AppName, Revision)>,
}

pub(crate) async fn previous(db: &mut AnyConnection, app: &AppName) -> Result<String> {
    let present = sqlx::query(
        "SELECT id, artifact_name FROM rollouts WHERE app = $1 ORDER BY id DESC LIMIT 1",
    )
    .bind(app.as_str())
    .fetch_optional(&mut *db)
    .await?;
    let never = || {
        QueueError::Conflict(format!("{app} was never deployed: there is nothing to go back to"))
    };
    let present = present.ok_or_else(never)?;
    let (id, name): (i64, String) = (get(&present, "id")?, get(&present, "artifact_name")?);
    let before = sqlx::query(
        "SELECT artifact_name FROM rollouts WHERE app = $1 AND id < $2 AND artifact_name <> $3 \
         ORDER BY CASE WHEN status = 'SUCCEEDED' THEN 0 ELSE 1 END, id DESC LIMIT 1",
    )
    .bind(app.as_str())
    .bind(id)
    .bind(name.as_str())
    .fetch_optional(&mut *db)
    .await?;
    let first = || {
        QueueError::Conflict(format!(
            "{app} has only ever run {name}: say what to go back to with: shoal rollback {app} ARTIFACT"
        ))
    };
    get(&before.ok_or_else(first)?, "artifact_name")
}

impl Queue {
    /// Gives an app its next goal: revision, signed goal, rollout, its place in the outbox, audit row and the end of
    /// the rollout before, in one transaction. `seal` signs; it is called with the final number.
    ///
    /// # Errors
    /// [`QueueError::NotFound`] for an unknown app or artifact, [`QueueError::Conflict`] for another app's
    /// artifact or nothing to go back to, [`QueueError::NotDeployable`], and what `seal` returns.
    pub async fn set_goal(
        &self,
        app: &AppName,
        choice: &Choice,
        rollback: bool,
        seal: impl FnOnce(&GoalDraft<'_>) -> Result<SealedGoal> + Send,
        actor: &Actor,
        now_ms: i64,
    ) -> Result<Rollout> {
        let mut tx = self.write().await?;
        if let Some(made) = requests::made(&mut tx, actor).await? {
            return rollouts::rollout_in(&mut tx, made).await;
        }
        let revision = apps::next_revision(&mut tx, app).await?;
        let name = match choice {
            Choice::Named(name) => name.clone(),
            Choice::Previous => previous(&mut tx, app).await?,
            Choice::Following { name, job } => {
                auto_deploy::check_in(&mut tx, app, *job).await?;
                name.clone()
            }
        };
        let before = auto_deploy::present_job(&mut tx, app).await?;
        let artifact = artifacts::by_name(&mut tx, &name).await?;
        let artifact = artifact.ok_or_else(|| {
            QueueError::NotFound(format!("no artifact '{name}': shoal artifacts lists them"))
        })?;
        if artifact.app != *app {
            return Err(QueueError::Conflict(format!(
                "{name} is an artifact of {}, not of {app}: shoal artifacts --app {app} lists its own",
                artifact.app
            )));
        }
        if let Some(reason) = standing::standing_in(&mut tx, &artifact).await?.reason {
            return Err(QueueError::NotDeployable { name, reason });
        }
        let row = sqlx::query("SELECT name, spec FROM apps WHERE name = $1")
            .bind(app.as_str())
            .fetch_one(&mut *tx)
            .await?;
        let app_row = AppRow { name: parsed(&row, "name")?, spec: get(&row, "spec")? };
        let sealed = seal(&GoalDraft { app: &app_row, artifact: &artifact, revision })?;
        for old in rollouts::open_of(&mut tx, app).await? {
            let summary = rollouts::progress_in(&mut tx, app, old.revision).await?;
            let reason = format!("revision {revision} took its place");
            let status = RolloutStatus::Superseded;
            let end = Ending { id: old.id, status, reason: &reason, summary: &summary };
            rollouts::end_in(&mut tx, &end, now_ms).await?;
        }
        let rollout = db::next(&mut tx, "rollout").await?;
        let seq = db::next(&mut tx, "goal").await?;
        sqlx::query(
            "INSERT INTO rollouts (id, app, epoch, number, artifact, encoding, artifact_name, \
             status, is_rollback, selector, plan, targets, created_at, requested_by) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, 'RUNNING', $8, $9, $10, $11, $12, $13)",
        )
        .bind(rollout)
        .bind(app.as_str())
        .bind(i64::from(revision.epoch))
        .bind(count(revision.number))
        .bind(artifact.stored.artifact.to_string())
        .bind(artifact.stored.encoding.to_string())
        .bind(name.as_str())
        .bind(i64::from(rollback))
        .bind(sealed.selector)
        .bind(to_json(&sealed.plan)?)
        .bind(to_json(&sealed.targets)?)
        .bind(now_ms)
        .bind(actor.name.as_str())
        .execute(&mut *tx)
        .await?;
        sqlx::query(
            "INSERT INTO goals (seq, app, epoch, number, rollout, signed, created_at) \
             VALUES ($1, $2, $3, $4, $5, $6, $7)",
        )
        .bind(seq)
        .bind(app.as_str())
        .bind(i64::from(revision.epoch))
        .bind(count(revision.number))
        .bind(rollout)
        .bind(sealed.signed)
        .bind(now_ms)
        .execute(&mut *tx)
        .await?;
        sqlx::query("UPDATE apps SET goal_seq = $1 WHERE name = $2")
            .bind(seq)
            .bind(app.as_str())
            .execute(&mut *tx)
            .await?;
        outbox::add(&mut tx, app, seq, now_ms).await?;
        let jobs = (before, artifact.origin.job);
        auto_deploy::goal_set_in(&mut tx, app, jobs, (rollback, &name), actor, now_ms).await?;
        let what = if rollback { "app.rollback" } else { "app.deploy" };
        let detail = format!("revision {revision}: {name}");
        audit::record(&mut tx, now_ms, actor, what, app.as_str(), &detail).await?;
        requests::note(&mut tx, actor, rollout).await?;
        events::of_rollout(&mut tx, EventKind::DeployInit, rollout, now_ms).await?;
        let rollout = rollouts::rollout_in(&mut tx, rollout).await?;
        tx.commit().await?;
        Ok(rollout)
    }

    /// Where the cursor of the goals stands.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn goals_cursor(&self) -> Result<i64> {
        let row = sqlx::query("SELECT value FROM counters WHERE name = 'goal'")
            .fetch_one(&mut *self.read().await?)
            .await?;
        get(&row, "value")
    }

    /// The goals that changed after a cursor, and all that are halted. A cursor from the future (the database
    /// was restored from a backup) asks for all.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn goals_after(&self, after: i64) -> Result<GoalsAfter> {
        // First the cursor: a goal that comes between the two reads is told by the next call.
        let cursor = self.goals_cursor().await?;
        let after = if after > cursor { 0 } else { after };
        let rows = sqlx::query(
            "SELECT g.seq, g.signed FROM apps a JOIN goals g ON g.seq = a.goal_seq \
             WHERE g.seq > $1 AND g.seq <= $2 ORDER BY g.seq LIMIT $3",
        )
        .bind(after)
        .bind(cursor)
        .bind(i64::from(GOALS_MAX))
        .fetch_all(&mut *self.read().await?)
        .await?;
        let mut answer = GoalsAfter { cursor, ..GoalsAfter::default() };
        for row in &rows {
            answer.signed.push(get(row, "signed")?);
        }
        if rows.len() == GOALS_MAX as usize {
            // There may be more: the next call goes on behind the last one.
            answer.cursor = rows.last().map_or(Ok(cursor), |row| get(row, "seq"))?;
        }
        let rows = sqlx::query(
            "SELECT r.app, r.epoch, r.number FROM apps a JOIN goals g ON g.seq = a.goal_seq \
             JOIN rollouts r ON r.id = g.rollout \
             WHERE r.status IN ('PAUSED', 'FAILED', 'CANCELLED') ORDER BY r.app",
        )
        .fetch_all(&mut *self.read().await?)
        .await?;
        for row in &rows {
            let revision =
                Revision { epoch: number(row, "epoch")?, number: number(row, "number")? };
            answer.halted.push((parsed(row, "app")?, revision));
        }
        Ok(answer)
    }
}
