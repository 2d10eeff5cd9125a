//! History: a row for each build and deployment, of what is kept in the tables of each.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

use shoal_proto::AppName;
use sqlx::any::AnyRow;

use crate::{
    artifacts::{Artifact, artifact},
    db::{Queue, get, placeholders},
    error::Result,
    jobs::{Job, job},
    pages::Select,
    rollouts::{Rollout, SELECT, rollout},
};

/// How many names or numbers one query asks for.
const CHUNK: usize = 500;

/// How many jobs are forgotten in one transaction.
const FORGOTTEN_AT_ONCE: i64 = 500;

/// A build and a deployment of it: one of them may be missing.
#[derive(Debug, Clone, PartialEq)]
pub struct HistoryRow {
    /// The build; none for what was published.
    pub job: Option<Job>,
    /// The artifact; none when the build made none.
    pub artifact: Option<Artifact>,
    /// The deployment; none when it was never deployed.
    pub rollout: Option<Rollout>,
}

impl HistoryRow {
    /// When the last part of it began, in milliseconds since the Unix epoch, and what tells two such apart.
    #[must_use]
    pub fn place(&self) -> (i64, i64) {
        let rollout = self.rollout.as_ref().map(|rollout| (rollout.created_at_ms, rollout.id));
        let job = self.job.as_ref().map(|job| (job.created_at_ms, job.id));
        rollout.or(job).unwrap_or_default()
    }
}

/// Rows of which a column is one of these.
async fn all_of<T>(
    queue: &Queue,
    select: &str,
    wanted: &[String],
    read: impl Fn(&AnyRow) -> Result<T>,
) -> Result<Vec<T>> {
    let mut found = Vec::new();
    for chunk in wanted.chunks(CHUNK) {
        let mut sql = format!("{select} IN ");
        placeholders(&mut sql, 1, chunk.len());
        let mut query = sqlx::query(sqlx::AssertSqlSafe(sql)).persistent(false);
        for one in chunk {
            query = query.bind(one.as_str());
        }
        let rows = query.fetch_all(&mut *queue.read().await?).await?;
        found.extend(rows.iter().map(&read).collect::<Result<Vec<_>>>()?);
    }
    Ok(found)
}

impl Queue {
    /// The next at most `limit` builds and deployments after the one of that [`HistoryRow::place`], newest first; of these
    /// apps or of all.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn history(
        &self,
        apps: Option<&BTreeSet<AppName>>,
        after: Option<(i64, i64)>,
        limit: u32,
    ) -> Result<Vec<HistoryRow>> {
        let rollouts = self.newest(SELECT, "r", "1 = 1", apps, after, limit).await?;
        let rollouts = rollouts.iter().map(rollout).collect::<Result<Vec<_>>>()?;
        let never = "NOT EXISTS (SELECT 1 FROM rollouts r WHERE r.artifact_name = j.name)";
        let jobs = self.newest("SELECT j.* FROM jobs j ", "j", never, apps, after, limit).await?;
        let jobs = jobs.iter().map(job).collect::<Result<Vec<_>>>()?;
        let none = |rollout| HistoryRow { job: None, artifact: None, rollout };
        let mut rows: Vec<HistoryRow> =
            rollouts.into_iter().map(|rollout| none(Some(rollout))).collect();
        rows.extend(jobs.into_iter().map(|job| HistoryRow { job: Some(job), ..none(None) }));
        rows.sort_by_key(|row| Reverse(row.place()));
        rows.truncate(limit as usize);
        self.complete(&mut rows).await?;
        Ok(rows)
    }

    async fn newest(
        &self,
        select: &str,
        table: &str,
        only: &str,
        apps: Option<&BTreeSet<AppName>>,
        after: Option<(i64, i64)>,
        limit: u32,
    ) -> Result<Vec<AnyRow>> {
        let (created, id) = after.unwrap_or((i64::MAX, i64::MAX));
        let mut wanted = Select::new(select);
        wanted.text(&format!("WHERE ({table}.created_at, {table}.id) < ("));
        wanted.value(created).text(", ").value(id).text(&format!(") AND {only}"));
        wanted.of_apps(&format!("{table}.app"), apps);
        wanted.text(&format!(" ORDER BY {table}.created_at DESC, {table}.id DESC LIMIT "));
        wanted.value(i64::from(limit));
        Ok(wanted.query().fetch_all(&mut *self.read().await?).await?)
    }

    /// Adds the artifacts, and the jobs of those that were deployed.
    async fn complete(&self, rows: &mut [HistoryRow]) -> Result<()> {
        let names: BTreeSet<String> = rows
            .iter()
            .filter_map(|row| match (&row.rollout, &row.job) {
                (Some(rollout), _) => Some(rollout.artifact_name.clone()),
                (None, Some(job)) => Some(job.name.clone()),
                (None, None) => None,
            })
            .collect();
        let names: Vec<String> = names.into_iter().collect();
        let mut artifacts =
            all_of(self, "SELECT * FROM artifacts WHERE name", &names, artifact).await?;
        self.add_copies(&mut artifacts).await?;
        let jobs = all_of(self, "SELECT * FROM jobs WHERE name", &names, job).await?;
        let artifacts: BTreeMap<_, _> =
            artifacts.into_iter().map(|artifact| (artifact.name.clone(), artifact)).collect();
        let jobs: BTreeMap<_, _> = jobs.into_iter().map(|job| (job.name.clone(), job)).collect();
        for row in rows {
            let name = match (&row.rollout, &row.job) {
                (Some(rollout), _) => rollout.artifact_name.as_str(),
                (None, Some(job)) => job.name.as_str(),
                (None, None) => continue,
            };
            row.artifact = artifacts.get(name).cloned();
            if row.job.is_none() {
                row.job = jobs.get(name).cloned();
            }
        }
        Ok(())
    }

    /// Forgets builds that ended before a time, with their attempts and pushes: those that made nothing, or whose artifact is
    /// gone. What an artifact that is there was made by, and what was deployed of it, is kept. Returns how many jobs.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn forget_history(&self, before_ms: i64) -> Result<u64> {
        let mut forgotten = 0;
        loop {
            let mut tx = self.write().await?;
            let rows = sqlx::query(
                "SELECT j.id FROM jobs j WHERE j.created_at < $1 AND j.finished_at < $1 AND j.status IN ('SUCCEEDED', 'FAILED', 'CANCELLED') \
                 AND NOT EXISTS (SELECT 1 FROM artifacts a WHERE a.name = j.name) ORDER BY j.created_at LIMIT $2",
            )
            .bind(before_ms)
            .bind(FORGOTTEN_AT_ONCE)
            .fetch_all(&mut *tx)
            .await?;
            let ids = rows.iter().map(|row| get(row, "id")).collect::<Result<Vec<i64>>>()?;
            if ids.is_empty() {
                tx.undo().await?;
                return Ok(forgotten);
            }
            let mut list = String::new();
            placeholders(&mut list, 1, ids.len());
            for from in ["attempts WHERE job", "pushes WHERE job", "jobs WHERE id"] {
                let sql = format!("DELETE FROM {from} IN {list}");
                let mut query = sqlx::query(sqlx::AssertSqlSafe(sql)).persistent(false);
                for id in &ids {
                    query = query.bind(*id);
                }
                query.execute(&mut *tx).await?;
            }
            tx.commit().await?;
            forgotten += ids.len() as u64;
        }
    }
}
