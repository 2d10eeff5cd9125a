//! Rollouts: how far each one is, and how it ended.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use shoal_proto::{
    AppName, ArtifactId, EncodingId, MachineName, RegionName, Revision,
    goal::RolloutPlan,
    state::{MachineState, RolloutStatus},
};
use sqlx::{AnyConnection, any::AnyRow};

use crate::{
    audit::{self, Actor},
    db::{self, Queue, Write, count, flag, get, json, number, parsed, to_json},
    error::{QueueError, Result},
    events::{self, EventKind},
    waves,
};

/// How a rollout is in each region.
pub type Progress = BTreeMap<RegionName, RegionProgress>;

/// How many machines a rollout is for in each region.
pub type Targets = BTreeMap<RegionName, u64>;

/// How a rollout is in one region, from its machines' reports.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionProgress {
    /// How many machines are in each state.
    pub states: BTreeMap<MachineState, u64>,
    /// Pieces held and verified, over all machines.
    pub pieces: u64,
    /// Pieces wanted.
    pub pieces_total: u64,
    /// Stored piece bytes from the region's bucket.
    pub origin_bytes: u64,
    /// Stored piece bytes from neighbours.
    pub peer_bytes: u64,
    /// When the first machine was ACTIVE.
    pub first_active_ms: Option<i64>,
    /// When the last one was.
    pub last_active_ms: Option<i64>,
    /// Machines of a rank below this may activate, in thousandths; none when no region process told.
    #[serde(default)]
    pub open_permille: Option<u16>,
}

/// A rollout.
#[derive(Debug, Clone, PartialEq)]
pub struct Rollout {
    /// Its number.
    pub id: i64,
    /// The app.
    pub app: AppName,
    /// Its goal's revision.
    pub revision: Revision,
    /// The artifact.
    pub artifact: ArtifactId,
    /// The encoding.
    pub encoding: EncodingId,
    /// The length of the encoding's stored pieces.
    pub encoded_bytes: u64,
    /// The artifact's name.
    pub artifact_name: String,
    /// Its state.
    pub status: RolloutStatus,
    /// Why it ended so.
    pub reason: Option<String>,
    /// Whether it goes back.
    pub rollback: bool,
    /// The machines that it selects, as its text.
    pub selector: String,
    /// Its plan, as signed.
    pub plan: RolloutPlan,
    /// The machines that it is for, as last counted.
    pub targets: Targets,
    /// How it was when it ended.
    pub summary: Option<Progress>,
    /// When it began.
    pub created_at_ms: i64,
    /// When it ended.
    pub finished_at_ms: Option<i64>,
    /// Since when it is paused, if it is or ended so.
    pub paused_at_ms: Option<i64>,
    /// For how long it was paused before that, in milliseconds.
    pub paused_ms: i64,
    /// Who asked for it.
    pub requested_by: String,
    /// Whether it is its app's newest one, whose machines report about it.
    pub newest: bool,
}

impl Rollout {
    /// For how long it had run by a time, pauses left out, in seconds.
    #[must_use]
    pub fn elapsed_s(&self, at_ms: i64) -> u64 {
        let ran_ms = self.paused_at_ms.unwrap_or(at_ms) - self.created_at_ms - self.paused_ms;
        u64::try_from(ran_ms / 1_000).unwrap_or_default()
    }
}

pub(crate) const SELECT: &str = "SELECT r.*, a.encoded_bytes AS encoded_bytes, \
     CASE WHEN EXISTS (SELECT 1 FROM apps p JOIN goals g ON g.seq = p.goal_seq \
     WHERE p.name = r.app AND g.rollout = r.id) THEN 1 ELSE 0 END AS newest \
     FROM rollouts r JOIN artifacts a ON a.name = r.artifact_name ";

fn select(rest: &'static str) -> sqlx::AssertSqlSafe<String> {
    sqlx::AssertSqlSafe(format!("{SELECT}{rest}"))
}

pub(crate) fn rollout(row: &AnyRow) -> Result<Rollout> {
    let summary: Option<String> = get(row, "summary")?;
    Ok(Rollout {
        id: get(row, "id")?,
        app: parsed(row, "app")?,
        revision: Revision { epoch: number(row, "epoch")?, number: number(row, "number")? },
        artifact: parsed(row, "artifact")?,
        encoding: parsed(row, "encoding")?,
        encoded_bytes: number(row, "encoded_bytes")?,
        artifact_name: get(row, "artifact_name")?,
        status: parsed(row, "status")?,
        reason: get(row, "reason")?,
        rollback: flag(row, "is_rollback")?,
        selector: get(row, "selector")?,
        plan: json(row, "plan")?,
        targets: json(row, "targets")?,
        summary: summary.map(|_| json(row, "summary")).transpose()?,
        created_at_ms: get(row, "created_at")?,
        finished_at_ms: get(row, "finished_at")?,
        paused_at_ms: get(row, "paused_at")?,
        paused_ms: get(row, "paused_ms")?,
        requested_by: get(row, "requested_by")?,
        newest: flag(row, "newest")?,
    })
}

pub(crate) async fn rollout_in(connection: &mut AnyConnection, id: i64) -> Result<Rollout> {
    let row =
        sqlx::query(select("WHERE r.id = $1")).bind(id).fetch_optional(&mut *connection).await?;
    rollout(&row.ok_or_else(|| QueueError::no_rollout(id))?)
}

/// The rollouts of an app that have not ended.
pub(crate) async fn open_of(tx: &mut Write, app: &AppName) -> Result<Vec<Rollout>> {
    sqlx::query(select("WHERE r.app = $1 AND r.status IN ('RUNNING', 'PAUSED') ORDER BY r.id"))
        .bind(app.as_str())
        .fetch_all(&mut **tx)
        .await?
        .iter()
        .map(rollout)
        .collect()
}

/// What is counted of the reports `m` of a goal's machines, by region and state.
const COUNTED: &str = "m.region, m.state, COUNT(*) AS machines, CAST(SUM(m.pieces) AS BIGINT) AS pieces, \
     CAST(SUM(m.pieces_total) AS BIGINT) AS pieces_total, \
     CAST(SUM(m.origin_bytes) AS BIGINT) AS origin_bytes, \
     CAST(SUM(m.peer_bytes) AS BIGINT) AS peer_bytes, \
     MIN(m.state_at) AS first_at, MAX(m.state_at) AS last_at";

/// Adds what was counted in one row.
fn add(progress: &mut Progress, row: &AnyRow) -> Result<()> {
    let region = progress.entry(parsed(row, "region")?).or_default();
    let state: MachineState = parsed(row, "state")?;
    region.states.insert(state, number(row, "machines")?);
    region.pieces += number::<u64>(row, "pieces")?;
    region.pieces_total += number::<u64>(row, "pieces_total")?;
    region.origin_bytes += number::<u64>(row, "origin_bytes")?;
    region.peer_bytes += number::<u64>(row, "peer_bytes")?;
    if state == MachineState::Active {
        region.first_active_ms = get(row, "first_at")?;
        region.last_active_ms = get(row, "last_at")?;
    }
    Ok(())
}

/// What the machines have reported about a goal.
pub(crate) async fn progress_in(
    connection: &mut AnyConnection,
    app: &AppName,
    revision: Revision,
) -> Result<Progress> {
    let sql = format!(
        "SELECT {COUNTED} FROM machine_apps m WHERE m.app = $1 AND m.epoch = $2 AND m.number = $3 \
         GROUP BY m.region, m.state"
    );
    let rows = sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(app.as_str())
        .bind(i64::from(revision.epoch))
        .bind(count(revision.number))
        .fetch_all(&mut *connection)
        .await?;
    let mut progress = Progress::new();
    rows.iter().try_for_each(|row| add(&mut progress, row))?;
    for (region, open_permille) in waves::open_in(connection, app, revision).await? {
        progress.entry(region).or_default().open_permille = Some(open_permille);
    }
    Ok(progress)
}

/// How a rollout ends.
pub(crate) struct Ending<'a> {
    pub(crate) id: i64,
    pub(crate) status: RolloutStatus,
    pub(crate) reason: &'a str,
    pub(crate) summary: &'a Progress,
}

/// Ends a rollout that has not ended. False: it has.
pub(crate) async fn end_in(tx: &mut Write, end: &Ending<'_>, now_ms: i64) -> Result<bool> {
    let done = sqlx::query(
        "UPDATE rollouts SET status = $1, reason = $2, summary = $3, finished_at = $4 \
         WHERE id = $5 AND status IN ('RUNNING', 'PAUSED')",
    )
    .bind(end.status.as_str())
    .bind(end.reason)
    .bind(to_json(end.summary)?)
    .bind(now_ms)
    .bind(end.id)
    .execute(&mut **tx)
    .await?;
    if done.rows_affected() == 1 {
        events::of_rollout(tx, EventKind::DeployCompleted, end.id, now_ms).await?;
    }
    Ok(done.rows_affected() == 1)
}

impl Queue {
    /// One rollout.
    ///
    /// # Errors
    /// [`QueueError::NotFound`] when there is none of that number.
    pub async fn rollout(&self, id: i64) -> Result<Rollout> {
        let mut connection = self.read().await?;
        rollout_in(&mut connection, id).await
    }

    /// All rollouts that have not ended, oldest first.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn open_rollouts(&self) -> Result<Vec<Rollout>> {
        sqlx::query(select("WHERE r.status IN ('RUNNING', 'PAUSED') ORDER BY r.id"))
            .fetch_all(&mut *self.read().await?)
            .await?
            .iter()
            .map(rollout)
            .collect()
    }

    /// The newest rollout of each app that was ever deployed, by app.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn newest_rollouts(&self) -> Result<Vec<Rollout>> {
        let query = sqlx::query(select(
            "JOIN goals n ON n.rollout = r.id JOIN apps q ON q.goal_seq = n.seq ORDER BY r.app",
        ));
        self.look(query).await?.iter().map(rollout).collect()
    }

    /// An app's newest rollout.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn newest_rollout(&self, app: &AppName) -> Result<Option<Rollout>> {
        let query = sqlx::query(select(
            "JOIN goals n ON n.rollout = r.id JOIN apps q ON q.goal_seq = n.seq WHERE r.app = $1",
        ));
        self.look_at(query.bind(app.as_str())).await?.as_ref().map(rollout).transpose()
    }

    /// What the machines have reported about a goal.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn progress(&self, app: &AppName, revision: Revision) -> Result<Progress> {
        let mut connection = self.read().await?;
        progress_in(&mut connection, app, revision).await
    }

    /// What the machines have reported about the goals of all rollouts that have not ended, by rollout; one about whose goal
    /// nobody has reported is not in it.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn progress_of_open(&self) -> Result<BTreeMap<i64, Progress>> {
        let sql = format!(
            "SELECT r.id, {COUNTED} FROM rollouts r JOIN machine_apps m \
             ON m.app = r.app AND m.epoch = r.epoch AND m.number = r.number \
             WHERE r.status IN ('RUNNING', 'PAUSED') GROUP BY r.id, m.region, m.state"
        );
        let mut connection = self.read().await?;
        let query = sqlx::query(sqlx::AssertSqlSafe(sql));
        let rows = query.fetch_all(&mut *connection).await?;
        let mut all = BTreeMap::<_, Progress>::new();
        for row in &rows {
            add(all.entry(get(row, "id")?).or_default(), row)?;
        }
        for (rollout, region, open_permille) in waves::open_in_all(&mut connection).await? {
            let progress = all.entry(rollout).or_default();
            progress.entry(region).or_default().open_permille = Some(open_permille);
        }
        Ok(all)
    }

    /// Each machine that has reported about a goal, with its region and its state.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn states(
        &self,
        app: &AppName,
        revision: Revision,
    ) -> Result<Vec<(MachineName, RegionName, MachineState)>> {
        let rows = sqlx::query(
            "SELECT machine, region, state FROM machine_apps \
             WHERE app = $1 AND epoch = $2 AND number = $3",
        )
        .bind(app.as_str())
        .bind(i64::from(revision.epoch))
        .bind(count(revision.number))
        .fetch_all(&mut *self.read().await?)
        .await?;
        rows.iter()
            .map(|row| Ok((parsed(row, "machine")?, parsed(row, "region")?, parsed(row, "state")?)))
            .collect()
    }

    /// Writes down for how many machines a rollout is.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn set_targets(&self, id: i64, targets: &Targets) -> Result<()> {
        let mut tx = self.write().await?;
        sqlx::query(
            "UPDATE rollouts SET targets = $1 WHERE id = $2 AND status IN ('RUNNING', 'PAUSED')",
        )
        .bind(to_json(targets)?)
        .bind(id)
        .execute(&mut *tx)
        .await?;
        tx.commit().await
    }

    /// Ends a rollout. One that ends badly is halted: regions are told by their next poll. Returns the
    /// rollout, and whether this call ended it.
    ///
    /// # Errors
    /// [`QueueError::NotFound`] when there is none of that number.
    pub async fn end_rollout(
        &self,
        id: i64,
        status: RolloutStatus,
        reason: &str,
        summary: &Progress,
        actor: &Actor,
        now_ms: i64,
    ) -> Result<(Rollout, bool)> {
        let mut tx = self.write().await?;
        let ended = end_in(&mut tx, &Ending { id, status, reason, summary }, now_ms).await?;
        let rollout = rollout_in(&mut tx, id).await?;
        if ended {
            if status != RolloutStatus::Succeeded {
                // Moves the cursor of the goals, so that waiting regions hear of it.
                db::next(&mut tx, "goal").await?;
            }
            let detail = format!("{status}: {reason}");
            let subject = format!("{}/{id}", rollout.app);
            audit::record(&mut tx, now_ms, actor, "rollout.end", &subject, &detail).await?;
            tx.commit().await?;
        }
        Ok((rollout, ended))
    }

    /// How many rollouts are in each state.
    ///
    /// # Errors
    /// [`QueueError`] when the database fails.
    pub async fn rollouts_by_status(&self) -> Result<Vec<(RolloutStatus, u64)>> {
        let rows = sqlx::query("SELECT status, COUNT(*) AS n FROM rollouts GROUP BY status")
            .fetch_all(&mut *self.read().await?)
            .await?;
        rows.iter().map(|row| Ok((parsed(row, "status")?, number(row, "n")?))).collect()
    }
}
