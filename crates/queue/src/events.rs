//! Events: what happened, for those who are told of it.
//!
//! An event is written in the transaction of its change, into an outbox without numbers: a counter's row would be held
//! from each claim and each end of a job to its commit, and so put all of them in one line. The coordinator on duty
//! moves what is committed from there into the numbered events ([`Queue::number_events`]), one such transaction after
//! the other. So whoever reads by the number sees every event once, and one that followed from another after that.

use std::collections::BTreeSet;

use shoal_proto::{AppName, CommitSha, MachineName, RegionName};
use sqlx::any::AnyRow;

use crate::{
    db::{Queue, Write, corrupt, get, number, parsed, parsed_opt, placeholders},
    error::Result,
    replication::CopyJob,
    waves::WaveSeen,
    webhooks,
};

/// What kind of thing happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum EventKind {
    /// A build was asked for.
    BuildQueued,
    /// A worker began an attempt at it.
    BuildInit,
    /// An attempt ended, and another one will follow.
    BuildRequeued,
    /// It ended for good.
    BuildCompleted,
    /// Its artifact's copies are complete in all regions in service.
    ReplicationCompleted,
    /// An app was given a goal.
    DeployInit,
    /// A region process let more machines activate: a wave opened.
    DeployWave,
    /// That rollout was paused: no further wave opens.
    DeployPaused,
    /// It goes on.
    DeployResumed,
    /// It ended.
    DeployCompleted,
}

impl EventKind {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::BuildQueued,
        Self::BuildInit,
        Self::BuildRequeued,
        Self::BuildCompleted,
        Self::ReplicationCompleted,
        Self::DeployInit,
        Self::DeployWave,
        Self::DeployPaused,
        Self::DeployResumed,
        Self::DeployCompleted,
    ];

    /// Its name, such as `build:init`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::BuildQueued => "build:queued",
            Self::BuildInit => "build:init",
            Self::BuildRequeued => "build:requeued",
            Self::BuildCompleted => "build:completed",
            Self::ReplicationCompleted => "replication:completed",
            Self::DeployInit => "deploy:init",
            Self::DeployWave => "deploy:wave",
            Self::DeployPaused => "deploy:paused",
            Self::DeployResumed => "deploy:resumed",
            Self::DeployCompleted => "deploy:completed",
        }
    }

    /// The kind of a name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == name)
    }
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Its number; later ones are higher.
    pub seq: i64,
    /// When it happened, by the clock of the coordinator that did it.
    pub at_ms: i64,
    /// What happened.
    pub kind: EventKind,
    /// To which app.
    pub app: AppName,
    /// The build job.
    pub job: Option<i64>,
    /// Its attempt.
    pub attempt: Option<u32>,
    /// The rollout.
    pub rollout: Option<i64>,
    /// The artifact's name, which a build has from its start.
    pub name: Option<String>,
    /// The commit.
    pub commit: Option<CommitSha>,
    /// The state of the job or the rollout after it.
    pub status: Option<String>,
    /// Why it came so.
    pub reason: Option<String>,
    /// Who asked for the build or the deployment.
    pub requested_by: Option<String>,
    /// The worker.
    pub worker: Option<String>,
    /// The region where a wave opened.
    pub region: Option<RegionName>,
    /// Machines of a rank below this may activate there, in thousandths.
    pub open_permille: Option<u16>,
}

/// Which events are wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EventFilter {
    /// Of these apps; none: of all.
    pub apps: Option<BTreeSet<AppName>>,
    /// Of these kinds; none: of all.
    pub kinds: Vec<EventKind>,
}

const COLUMNS: &str = "at, kind, app, job, attempt, rollout, name, commit_sha, status, reason, who, worker, \
     region, open_permille";

/// The artifact `a` is complete in all regions in service: it may be deployed.
pub(crate) const EVERYWHERE: &str = "NOT EXISTS (SELECT 1 FROM regions r LEFT JOIN replications c \
     ON c.region = r.name AND c.artifact = a.artifact AND c.encoding = a.encoding \
     WHERE r.configured = 1 AND r.drained = 0 AND (c.status IS NULL OR c.status <> 'COMPLETE'))";

/// How many events are numbered in one transaction.
const NUMBERED_AT_ONCE: u32 = 500;

/// How many events are forgotten in one transaction.
const FORGOTTEN_AT_ONCE: i64 = 5_000;

fn event(row: &AnyRow) -> Result<Event> {
    let kind: String = get(row, "kind")?;
    let attempt: Option<i64> = get(row, "attempt")?;
    let open_permille: Option<i64> = get(row, "open_permille")?;
    Ok(Event {
        seq: get(row, "seq")?,
        at_ms: get(row, "at")?,
        kind: EventKind::named(&kind).ok_or_else(|| corrupt("kind", kind))?,
        app: parsed(row, "app")?,
        job: get(row, "job")?,
        attempt: attempt.map(|_| number(row, "attempt")).transpose()?,
        rollout: get(row, "rollout")?,
        name: get(row, "name")?,
        commit: parsed_opt(row, "commit_sha")?,
        status: get(row, "status")?,
        reason: get(row, "reason")?,
        requested_by: get(row, "who")?,
        worker: get(row, "worker")?,
        region: parsed_opt(row, "region")?,
        open_permille: open_permille.map(|_| number(row, "open_permille")).transpose()?,
    })
}

/// Tells of a job as its transaction leaves it.
pub(crate) async fn of_job(tx: &mut Write, kind: EventKind, job: i64, now_ms: i64) -> Result<()> {
    let place = tx.dialect.event_place();
    let sql = format!(
        "INSERT INTO event_outbox (place, at, kind, app, job, attempt, name, commit_sha, status, reason, who, worker) \
         SELECT {place}, $1, $2, app, id, attempt, name, commit_sha, status, reason, requested_by, worker \
         FROM jobs WHERE id = $3"
    );
    sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(now_ms)
        .bind(kind.as_str())
        .bind(job)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// Tells of a rollout as its transaction leaves it.
pub(crate) async fn of_rollout(
    tx: &mut Write,
    kind: EventKind,
    rollout: i64,
    now_ms: i64,
) -> Result<()> {
    let place = tx.dialect.event_place();
    let sql = format!(
        "INSERT INTO event_outbox (place, at, kind, app, job, rollout, name, commit_sha, status, reason, who) \
         SELECT {place}, $1, $2, r.app, a.job, r.id, r.artifact_name, a.commit_sha, r.status, r.reason, r.requested_by \
         FROM rollouts r JOIN artifacts a ON a.name = r.artifact_name WHERE r.id = $3"
    );
    sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(now_ms)
        .bind(kind.as_str())
        .bind(rollout)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// Tells that a region process opened a wave of a rollout.
pub(crate) async fn of_wave(
    tx: &mut Write,
    rollout: i64,
    (region, process): (&RegionName, &MachineName),
    wave: &WaveSeen,
) -> Result<()> {
    let place = tx.dialect.event_place();
    let sql = format!(
        "INSERT INTO event_outbox (place, at, kind, app, job, rollout, name, commit_sha, status, reason, who, \
         region, open_permille) \
         SELECT {place}, $1, $2, r.app, a.job, r.id, r.artifact_name, a.commit_sha, r.status, $3, r.requested_by, \
         $4, $5 FROM rollouts r JOIN artifacts a ON a.name = r.artifact_name WHERE r.id = $6"
    );
    sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(wave.opened_at_ms)
        .bind(EventKind::DeployWave.as_str())
        .bind(format!("opened by {process}"))
        .bind(region.as_str())
        .bind(i64::from(wave.open_permille))
        .bind(rollout)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// Locks all copies of an encoding: of two that are complete at the same moment, one sees that it is the last.
pub(crate) async fn lock_copies(tx: &mut Write, copy: &CopyJob) -> Result<()> {
    let sql = format!(
        "SELECT region FROM replications WHERE artifact = $1 AND encoding = $2 ORDER BY region{}",
        tx.dialect.for_update()
    );
    sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(copy.artifact.to_string())
        .bind(copy.encoding.to_string())
        .fetch_all(&mut **tx)
        .await?;
    Ok(())
}

/// Tells of the artifacts that a copy, which is complete now, made complete in all regions in service.
pub(crate) async fn of_copy(tx: &mut Write, copy: &CopyJob, now_ms: i64) -> Result<()> {
    let rows = sqlx::query(
        "SELECT name FROM artifacts WHERE artifact = $1 AND encoding = $2 AND EXISTS \
         (SELECT 1 FROM regions WHERE name = $3 AND configured = 1 AND drained = 0) ORDER BY name",
    )
    .bind(copy.artifact.to_string())
    .bind(copy.encoding.to_string())
    .bind(copy.region.as_str())
    .fetch_all(&mut **tx)
    .await?;
    for row in &rows {
        of_artifact(tx, &get::<String>(row, "name")?, now_ms).await?;
    }
    Ok(())
}

/// Tells of an artifact if it is complete in all regions in service.
pub(crate) async fn of_artifact(tx: &mut Write, name: &str, now_ms: i64) -> Result<()> {
    let place = tx.dialect.event_place();
    let sql = format!(
        "INSERT INTO event_outbox (place, at, kind, app, job, name, commit_sha, status, who) \
         SELECT {place}, $1, $2, a.app, a.job, a.name, a.commit_sha, 'COMPLETE', a.requested_by \
         FROM artifacts a WHERE a.name = $3 AND {EVERYWHERE}"
    );
    sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(now_ms)
        .bind(EventKind::ReplicationCompleted.as_str())
        .bind(name)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

impl Queue {
    /// Gives numbers to events that have none yet, in the order of their commits, and makes a delivery of each for every
    /// webhook that wants it. Returns how many; when it is as many as are numbered at once, there may be more.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn number_events(&self) -> Result<u32> {
        // Most of the time there is none: the writer is for others then.
        let any = sqlx::query("SELECT place FROM event_outbox LIMIT 1");
        if self.look_at(any).await?.is_none() {
            return Ok(0);
        }
        let mut tx = self.write().await?;
        // Held to the commit: two that number do so one after the other.
        let sql =
            format!("SELECT value FROM counters WHERE name = 'event'{}", tx.dialect.for_update());
        let row = sqlx::query(sqlx::AssertSqlSafe(sql)).fetch_one(&mut *tx).await?;
        let base: i64 = get(&row, "value")?;
        // By name, not up to the highest: one that is lower may be committed at any moment.
        let rows = sqlx::query("SELECT place FROM event_outbox ORDER BY place LIMIT $1")
            .bind(i64::from(NUMBERED_AT_ONCE))
            .fetch_all(&mut *tx)
            .await?;
        let places = rows.iter().map(|row| get(row, "place")).collect::<Result<Vec<i64>>>()?;
        if places.is_empty() {
            tx.undo().await?;
            return Ok(0);
        }
        let mut list = String::new();
        placeholders(&mut list, 1, places.len());
        let base_at = places.len() + 1;
        let insert = format!(
            "INSERT INTO events (seq, {COLUMNS}) \
             SELECT ${base_at} + ROW_NUMBER() OVER (ORDER BY place), {COLUMNS} FROM event_outbox \
             WHERE place IN {list}"
        );
        let delete = format!("DELETE FROM event_outbox WHERE place IN {list}");
        for (sql, bind) in [(insert, Some(base)), (delete, None)] {
            let mut query = sqlx::query(sqlx::AssertSqlSafe(sql)).persistent(false);
            for place in &places {
                query = query.bind(*place);
            }
            if let Some(base) = bind {
                query = query.bind(base);
            }
            query.execute(&mut *tx).await?;
        }
        let numbered = places.len() as u32;
        let last = base + i64::from(numbered);
        webhooks::deliver_in(&mut tx, base, last).await?;
        sqlx::query("UPDATE counters SET value = $1 WHERE name = 'event'")
            .bind(last)
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        Ok(numbered)
    }

    /// The number of the newest event; 0 when there was none yet.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn events_cursor(&self) -> Result<i64> {
        let row = sqlx::query("SELECT value FROM counters WHERE name = 'event'")
            .fetch_one(&mut *self.read().await?)
            .await?;
        get(&row, "value")
    }

    /// The number of the oldest event that is kept; none when none is.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn oldest_event(&self) -> Result<Option<i64>> {
        let row = sqlx::query("SELECT MIN(seq) AS oldest FROM events")
            .fetch_one(&mut *self.read().await?)
            .await?;
        get(&row, "oldest")
    }

    /// At most `limit` events after a number, oldest first.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn events_after(
        &self,
        after: i64,
        filter: &EventFilter,
        limit: u32,
    ) -> Result<Vec<Event>> {
        self.events_where("seq > $1", "ASC", after, filter, limit).await
    }

    /// The newest `limit` events before a number or of all, newest first.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn newest_events(
        &self,
        filter: &EventFilter,
        before: Option<i64>,
        limit: u32,
    ) -> Result<Vec<Event>> {
        self.events_where("seq < $1", "DESC", before.unwrap_or(i64::MAX), filter, limit).await
    }

    async fn events_where(
        &self,
        bound: &str,
        order: &str,
        seq: i64,
        filter: &EventFilter,
        limit: u32,
    ) -> Result<Vec<Event>> {
        let mut sql = format!("SELECT * FROM events WHERE {bound}");
        let apps = filter.apps.iter().flatten();
        if filter.apps.is_some() {
            let places: String = apps.clone().zip(3..).map(|(_, n)| format!(", ${n}")).collect();
            sql.push_str(&format!(" AND app IN (NULL{places})"));
        }
        if !filter.kinds.is_empty() {
            // Names of this program, no one's input.
            let kinds: Vec<_> = filter.kinds.iter().map(|kind| kind.as_str()).collect();
            sql.push_str(&format!(" AND kind IN ('{}')", kinds.join("', '")));
        }
        sql.push_str(&format!(" ORDER BY seq {order} LIMIT $2"));
        let mut query = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(seq).bind(i64::from(limit));
        for app in apps {
            query = query.bind(app.as_str());
        }
        query.fetch_all(&mut *self.read().await?).await?.iter().map(event).collect()
    }

    /// Forgets events that happened before a time, and the oldest above `keep_max`; none that a webhook still waits for.
    /// Returns how many.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn forget_events(&self, before_ms: i64, keep_max: i64) -> Result<u64> {
        const WAITED_FOR: &str =
            "SELECT 1 FROM deliveries d WHERE d.seq = e.seq AND d.status = 'PENDING'";
        let up_to = self.events_cursor().await?.saturating_sub(keep_max);
        let mut forgotten = 0;
        for (column, bound) in [("at", before_ms), ("seq", up_to + 1)] {
            loop {
                let mut tx = self.write().await?;
                let sql = format!(
                    "DELETE FROM events WHERE seq IN (SELECT e.seq FROM events e WHERE e.{column} < $1 \
                     AND NOT EXISTS ({WAITED_FOR}) ORDER BY e.{column} LIMIT $2)"
                );
                let gone = sqlx::query(sqlx::AssertSqlSafe(sql))
                    .bind(bound)
                    .bind(FORGOTTEN_AT_ONCE)
                    .execute(&mut *tx)
                    .await?;
                tx.commit().await?;
                forgotten += gone.rows_affected();
                if gone.rows_affected() < FORGOTTEN_AT_ONCE as u64 {
                    break;
                }
            }
        }
        Ok(forgotten)
    }
}
