//! What waits: how much, for how long, until when, and whether anything may be taken at all. None of it looks at history.

use shoal_proto::state::Priority;

use crate::{
    audit::{self, Actor},
    db::{Queue, get, number},
    error::Result,
    finish::short,
    jobs::priority,
};

/// How many jobs wait and run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Depth {
    /// Those that a worker could take, by priority; none where none waits.
    pub waiting: Vec<Waiting>,
    /// Those that wait for their next attempt.
    pub deferred: u64,
    /// Those that run.
    pub running: u64,
}

/// The jobs of one priority that a worker could take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// The priority.
    pub priority: Priority,
    /// How many they are.
    pub jobs: u64,
    /// Since when one of them has waited for a worker. The time of earlier attempts does not count.
    pub since_ms: i64,
}

/// Why nobody takes a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pause {
    /// What the operator said.
    pub reason: Option<String>,
    /// Who it was.
    pub by: String,
    /// When.
    pub at_ms: i64,
}

pub(crate) const WAITING: &str = "SELECT priority, COUNT(*) AS jobs, MIN(eligible_at) AS since FROM jobs \
     WHERE status = 'QUEUED' AND deferred = 0 GROUP BY priority ORDER BY priority";

pub(crate) const OTHERS: &str = "SELECT (SELECT COUNT(*) FROM jobs WHERE status = 'QUEUED' AND deferred = 1) AS deferred, \
     (SELECT COUNT(*) FROM jobs WHERE status = 'RUNNING') AS running";

impl Queue {
    /// How many jobs wait and run, and for how long.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn depth(&self) -> Result<Depth> {
        let rows = sqlx::query(WAITING).fetch_all(&mut *self.read().await?).await?;
        let waiting = rows.iter().map(|row| {
            let (jobs, since_ms) = (number(row, "jobs")?, get(row, "since")?);
            Ok(Waiting { priority: priority(row)?, jobs, since_ms })
        });
        let waiting = waiting.collect::<Result<_>>()?;
        let row = sqlx::query(OTHERS).fetch_one(&mut *self.read().await?).await?;
        Ok(Depth {
            waiting,
            deferred: number(&row, "deferred")?,
            running: number(&row, "running")?,
        })
    }

    /// Lets jobs be taken whose time to wait for their next attempt is over. Returns how many.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn release_due(&self, now_ms: i64) -> Result<u64> {
        const DUE: &str = "status = 'QUEUED' AND deferred = 1 AND eligible_at <= $1";
        // Most of the time there is none: the writer is for others then.
        let sql = format!("SELECT id FROM jobs WHERE {DUE} LIMIT 1");
        let any = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(now_ms);
        if any.fetch_optional(&mut *self.read().await?).await?.is_none() {
            return Ok(0);
        }
        let mut tx = self.write().await?;
        let sql = format!("UPDATE jobs SET deferred = 0 WHERE {DUE}");
        let released = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(now_ms).execute(&mut *tx).await?;
        tx.commit().await?;
        Ok(released.rows_affected())
    }

    /// Lets nobody take a job until [`Queue::resume`]; jobs that run go on.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn pause(&self, reason: Option<&str>, actor: &Actor, now_ms: i64) -> Result<()> {
        let mut tx = self.write().await?;
        let reason = reason.map(short);
        sqlx::query(
            "INSERT INTO pauses (id, reason, paused_by, paused_at) VALUES (1, $1, $2, $3) \
             ON CONFLICT (id) DO UPDATE SET reason = excluded.reason, paused_by = excluded.paused_by, \
             paused_at = excluded.paused_at",
        )
        .bind(reason)
        .bind(actor.name.as_str())
        .bind(now_ms)
        .execute(&mut *tx)
        .await?;
        let reason = reason.unwrap_or_default();
        audit::record(&mut tx, now_ms, actor, "queue.pause", "queue", reason).await?;
        tx.commit().await
    }

    /// Lets jobs be taken again.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn resume(&self, actor: &Actor, now_ms: i64) -> Result<()> {
        let mut tx = self.write().await?;
        let ended = sqlx::query("DELETE FROM pauses").execute(&mut *tx).await?;
        if ended.rows_affected() > 0 {
            audit::record(&mut tx, now_ms, actor, "queue.resume", "queue", "").await?;
        }
        tx.commit().await
    }

    /// Why nobody takes a job; none while the queue is not paused.
    ///
    /// # Errors
    /// [`crate::QueueError`] when the database fails.
    pub async fn paused(&self) -> Result<Option<Pause>> {
        let row =
            sqlx::query("SELECT * FROM pauses").fetch_optional(&mut *self.read().await?).await?;
        row.map(|row| {
            let by = get(&row, "paused_by")?;
            Ok(Pause { reason: get(&row, "reason")?, by, at_ms: get(&row, "paused_at")? })
        })
        .transpose()
    }
}

#[cfg(test)]
mod tests {
    use sqlx::Row as _;

    use super::*;
    use crate::{
        Actor, AppRow,
        db::Write,
        dialect::{Dialect, FIRST},
        sqlite_url,
    };

    /// More than any planner would rather read than look up.
    const HISTORY: u32 = 20_000;

    /// How the database would answer a query, in lower case.
    async fn plan(tx: &mut Write, sql: &str, binds: &[&str]) -> String {
        let explain = match tx.dialect {
            Dialect::Sqlite => "EXPLAIN QUERY PLAN",
            Dialect::Postgres => "EXPLAIN",
        };
        let mut query = sqlx::query(sqlx::AssertSqlSafe(format!("{explain} {sql}")));
        for bind in binds {
            query = query.bind(*bind);
        }
        let rows = query.fetch_all(&mut **tx).await.unwrap();
        // SQLite's text is its last column, PostgreSQL's its only one.
        let lines = rows.iter().map(|row| row.get::<String, _>(row.len() - 1));
        lines.collect::<Vec<_>>().join("\n").to_lowercase()
    }

    async fn nothing_looks_at_history(url: &str) {
        let queue = Queue::open(url).await.unwrap();
        let app = AppRow { name: "web".parse().unwrap(), spec: "{}".into() };
        queue
            .set_app(&app, &Actor { name: "me".into(), origin: String::new(), request: None }, 0)
            .await
            .unwrap();
        let mut tx = queue.write().await.unwrap();
        let history = format!(
            "INSERT INTO jobs (id, created_at, app, commit_sha, name, status, attempt, max_attempts, \
             cancel_requested, requested_by) \
             WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {HISTORY}) \
             SELECT i, i, 'web', 'commit ' || i, 'web/' || i, 'SUCCEEDED', 1, 1, 0, 'me' FROM n"
        );
        sqlx::raw_sql(sqlx::AssertSqlSafe(history)).execute(&mut *tx).await.unwrap();
        tx.commit().await.unwrap();
        let mut tx = queue.write().await.unwrap();
        sqlx::raw_sql("ANALYZE").execute(&mut *tx).await.unwrap();
        let open = "SELECT * FROM jobs WHERE app = $1 AND commit_sha = $2 \
                    AND status IN ('QUEUED', 'RUNNING') AND cancel_requested = 0";
        let running = "SELECT * FROM jobs WHERE status = 'RUNNING' ORDER BY id";
        let due =
            "SELECT id FROM jobs WHERE status = 'QUEUED' AND deferred = 1 AND eligible_at <= 5";
        for (sql, binds, indexes) in [
            (FIRST, &["w1", "one"][..], &["jobs_ready"][..]),
            (WAITING, &[], &["jobs_ready"]),
            (OTHERS, &[], &["jobs_deferred", "jobs_running"]),
            (running, &[], &["jobs_running"]),
            (due, &[], &["jobs_deferred"]),
            (open, &["web", "c"], &["jobs_open"]),
        ] {
            let plan = plan(&mut tx, sql, binds).await;
            assert!(indexes.iter().all(|index| plan.contains(index)), "{sql}\n{plan}");
            // Neither the table itself is read, nor what was found put in order.
            let reads = plan.contains("seq scan on jobs")
                || plan.lines().any(|line| line.ends_with("scan jobs"));
            let sorts = sql == FIRST && (plan.contains("sort") || plan.contains("b-tree"));
            assert!(!reads && !sorts, "{sql}\n{plan}");
        }
        tx.undo().await.unwrap();
        queue.close().await;
    }

    #[tokio::test]
    async fn on_sqlite_nothing_looks_at_history() {
        let dir = tempfile::tempdir().unwrap();
        nothing_looks_at_history(&sqlite_url(&dir.path().join("test.sqlite"))).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn on_postgres_nothing_looks_at_history() {
        let database = shoal_test_postgres::Database::create().await.unwrap();
        nothing_looks_at_history(database.url()).await;
        database.remove().await.unwrap();
    }
}
