//! Goals: numbered and stored with their rollout and audit rows in one transaction, and read by a cursor.

use shoal_proto::{AppName, Revision, goal::RolloutPlan, state::RolloutStatus};
use sqlx::AnyConnection;

use crate::{
    apps::{self, AppRow},
    artifacts::{self, Artifact},
    audit::{self, Actor},
    auto_deploy,
    db::{self, Queue, Write, count, get, number, parsed, to_json},
    dialect::{Dialect, Numbers, POSTGRES_SET_GOAL},
    error::{QueueError, Result},
    events::{self, EventKind},
    outbox, requests,
    rollouts::{self, Ending, Rollout, Targets},
    standing,
};

/// The most goals of one answer: one an app, and each is under 2 KB of hexadecimal.
pub const GOALS_MAX: u32 = 1_000;
const GOALS_LEN: usize = GOALS_MAX as usize;

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

/// The cursor (0), the goals after $1 in their order (1), $2 at most, and those that are halted (2), by app. A cursor of the
/// future asks for all.
const GOALS_AFTER: &str = "
    SELECT 0 AS what, value AS seq, NULL AS signed, NULL AS app, 0 AS epoch, 0 AS number
    FROM counters WHERE name = 'goal'
    UNION ALL SELECT * FROM (
        SELECT 1 AS what, g.seq, g.signed, NULL AS app, 0 AS epoch, 0 AS number
        FROM apps a JOIN goals g ON g.seq = a.goal_seq
        WHERE a.goal_seq > (SELECT CASE WHEN value < $1 THEN 0 ELSE $1 END FROM counters WHERE name = 'goal')
        ORDER BY g.seq LIMIT $2
    ) AS changed
    UNION ALL SELECT * FROM (
        SELECT 2 AS what, g.seq, NULL AS signed, r.app, r.epoch, r.number
        FROM apps a JOIN goals g ON g.seq = a.goal_seq JOIN rollouts r ON r.id = g.rollout
        WHERE r.status IN ('PAUSED', 'FAILED', 'CANCELLED')
    ) AS halted";

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

/// A goal that is decided.
struct NewGoal<'a> {
    app: &'a AppName,
    revision: Revision,
    artifact: &'a Artifact,
    rollback: bool,
    sealed: &'a SealedGoal,
}

impl NewGoal<'_> {
    /// What the audit log says of it: what was done, and more.
    fn told(&self) -> (&'static str, String) {
        let what = if self.rollback { "app.rollback" } else { "app.deploy" };
        (what, format!("revision {}: {}", self.revision, self.artifact.name))
    }
}

/// Writes a goal with all that belongs to it, in one statement of PostgreSQL.
async fn write_at_once(
    tx: &mut Write,
    new: &NewGoal<'_>,
    actor: &Actor,
    now_ms: i64,
) -> Result<Rollout> {
    let (what, detail) = new.told();
    let row = sqlx::query(POSTGRES_SET_GOAL)
        .bind(new.app.as_str())
        .bind(i64::from(new.revision.epoch))
        .bind(count(new.revision.number))
        .bind(new.artifact.stored.artifact.to_string())
        .bind(new.artifact.stored.encoding.to_string())
        .bind(new.artifact.name.as_str())
        .bind(i64::from(new.rollback))
        .bind(new.sealed.selector.as_str())
        .bind(to_json(&new.sealed.plan)?)
        .bind(to_json(&new.sealed.targets)?)
        .bind(now_ms)
        .bind(actor.name.as_str())
        .bind(new.sealed.signed.as_str())
        .bind(actor.origin.as_str())
        .bind(what)
        .bind(detail)
        .bind(actor.request.as_deref())
        .fetch_one(&mut **tx)
        .await?;
    rollouts::rollout(&row)
}

/// The same, statement by statement.
async fn write_alone(
    tx: &mut Write,
    new: &NewGoal<'_>,
    actor: &Actor,
    now_ms: i64,
) -> Result<Rollout> {
    let (app, revision) = (new.app, new.revision);
    let id = db::numbered(tx, Numbers::Rollouts).await?;
    let sql = format!(
        "INSERT INTO rollouts (id, app, epoch, number, artifact, encoding, artifact_name, \
         status, is_rollback, selector, plan, targets, created_at, requested_by) \
         VALUES ({id}, $1, $2, $3, $4, $5, $6, 'RUNNING', $7, $8, $9, $10, $11, $12) RETURNING id"
    );
    let row = sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(app.as_str())
        .bind(i64::from(revision.epoch))
        .bind(count(revision.number))
        .bind(new.artifact.stored.artifact.to_string())
        .bind(new.artifact.stored.encoding.to_string())
        .bind(new.artifact.name.as_str())
        .bind(i64::from(new.rollback))
        .bind(new.sealed.selector.as_str())
        .bind(to_json(&new.sealed.plan)?)
        .bind(to_json(&new.sealed.targets)?)
        .bind(now_ms)
        .bind(actor.name.as_str())
        .fetch_one(&mut **tx)
        .await?;
    let rollout: i64 = get(&row, "id")?;
    let seq = db::next(tx, "goal").await?;
    sqlx::query(
        "INSERT INTO goals (seq, app, epoch, number, rollout, signed, created_at) \
         VALUES ($1, $2, $3, $4, $5, $6, $7)",
    )
    .bind(seq)
    .bind(app.as_str())
    .bind(i64::from(revision.epoch))
    .bind(count(revision.number))
    .bind(rollout)
    .bind(new.sealed.signed.as_str())
    .bind(now_ms)
    .execute(&mut **tx)
    .await?;
    sqlx::query("UPDATE apps SET goal_seq = $1 WHERE name = $2")
        .bind(seq)
        .bind(app.as_str())
        .execute(&mut **tx)
        .await?;
    outbox::add(tx, app, seq, now_ms).await?;
    let (what, detail) = new.told();
    audit::record(tx, now_ms, actor, what, app.as_str(), &detail).await?;
    requests::note(tx, actor, rollout).await?;
    events::of_rollout(tx, EventKind::DeployInit, rollout, now_ms).await?;
    rollouts::rollout_in(tx, rollout).await
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
        let apps::Next { app: app_row, revision, present_job } =
            apps::next_revision(&mut tx, app).await?;
        let name = match choice {
            Choice::Named(name) => name.clone(),
            Choice::Previous => previous(&mut tx, app).await?,
            Choice::Following { name, job } => {
                auto_deploy::check_in(&mut tx, app, *job).await?;
                name.clone()
            }
        };
        let artifact = artifacts::by_name(&mut tx, &name).await?;
        let artifact = artifact.ok_or_else(|| QueueError::no_artifact(&name))?;
        if artifact.app != *app {
            return Err(QueueError::Conflict(format!(
                "{name} is an artifact of {}, not of {app}: shoal artifacts --app {app} lists its own",
                artifact.app
            )));
        }
        if let Some(reason) = standing::standing_in(&mut tx, &artifact).await?.reason {
            return Err(QueueError::NotDeployable { name, reason });
        }
        let sealed = seal(&GoalDraft { app: &app_row, artifact: &artifact, revision })?;
        for old in rollouts::open_of(&mut tx, app).await? {
            let summary = rollouts::progress_in(&mut tx, app, old.revision).await?;
            let reason = format!("revision {revision} took its place");
            let status = RolloutStatus::Superseded;
            let end = Ending { id: old.id, status, reason: &reason, summary: &summary };
            rollouts::end_in(&mut tx, &end, now_ms).await?;
        }
        let jobs = (present_job, artifact.origin.job);
        auto_deploy::goal_set_in(&mut tx, app, jobs, (rollback, &name), actor, now_ms).await?;
        let new = NewGoal { app, revision, artifact: &artifact, rollback, sealed: &sealed };
        // Last: the place in the order of all goals is locked from then to the commit.
        let rollout = match tx.dialect {
            Dialect::Sqlite => write_alone(&mut tx, &new, actor, now_ms).await?,
            Dialect::Postgres => write_at_once(&mut tx, &new, actor, now_ms).await?,
        };
        tx.commit().await?;
        Ok(rollout)
    }

    /// Where the cursor of the goals stands.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn goals_cursor(&self) -> Result<i64> {
        let query = sqlx::query("SELECT value FROM counters WHERE name = 'goal'");
        let row = self.look_at(query).await?.ok_or(sqlx::Error::RowNotFound)?;
        get(&row, "value")
    }

    /// The goals that changed after a cursor, and all that are halted. A cursor from the future (the database
    /// was restored from a backup) asks for all.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn goals_after(&self, after: i64) -> Result<GoalsAfter> {
        // One statement, so what it sees is of one moment.
        let query = sqlx::query(GOALS_AFTER).bind(after).bind(i64::from(GOALS_MAX));
        let (mut answer, mut goals) = (GoalsAfter::default(), Vec::new());
        for row in &self.look(query).await? {
            match get::<i64>(row, "what")? {
                0 => answer.cursor = get(row, "seq")?,
                1 => goals.push((get::<i64>(row, "seq")?, get(row, "signed")?)),
                _ => {
                    let revision =
                        Revision { epoch: number(row, "epoch")?, number: number(row, "number")? };
                    answer.halted.push((parsed(row, "app")?, revision));
                }
            }
        }
        // Parts of a union have no order among them.
        goals.sort_unstable();
        answer.halted.sort_unstable();
        if let (GOALS_LEN, Some((last, _))) = (goals.len(), goals.last()) {
            // There may be more: the next call goes on behind the last one.
            answer.cursor = *last;
        }
        answer.signed = goals.into_iter().map(|(_, signed)| signed).collect();
        Ok(answer)
    }
}
