//! Asking for builds. A commit of an app is built once at a time: who asks for it meanwhile joins the job that is there.

use shoal_proto::{AppName, CommitSha, state::Priority};

use crate::{
    audit::{self, Actor},
    db::{self, Queue, Write},
    dialect::{Dialect, Numbers, POSTGRES_SUBMIT},
    error::{QueueError, Result},
    events::{self, EventKind},
    jobs::{Job, job, job_in},
    requests,
};

/// A build that is asked for.
#[derive(Debug, Clone)]
pub struct Ask {
    /// The app.
    pub app: AppName,
    /// The commit.
    pub commit: CommitSha,
    /// How urgent it is.
    pub priority: Priority,
    /// How often it may be started.
    pub max_attempts: u32,
}

/// The job that builds what was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Submitted {
    /// The job.
    pub job: Job,
    /// Whether it was there already.
    pub joined: bool,
}

/// The job that builds a commit at present, locked. One that is being cancelled builds nothing for anybody.
async fn open_job(tx: &mut Write, ask: &Ask) -> Result<Option<Job>> {
    let sql = format!(
        "SELECT * FROM jobs WHERE app = $1 AND commit_sha = $2 AND status IN ('QUEUED', 'RUNNING') \
         AND cancel_requested = 0{}",
        tx.dialect.for_update()
    );
    let row = sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(ask.app.as_str())
        .bind(ask.commit.as_str())
        .fetch_optional(&mut **tx)
        .await?;
    row.as_ref().map(job).transpose()
}

impl Queue {
    /// Asks for a build: joins the job that waits or runs for the same commit of the app, and raises its priority to this
    /// one's if that is higher; else puts a new job at the end of its priority. What has ended is not joined: who asks
    /// then wants it built again.
    ///
    /// # Errors
    /// [`QueueError::NotFound`] when the app is not registered.
    pub async fn submit(&self, ask: &Ask, actor: &Actor, now_ms: i64) -> Result<Submitted> {
        if self.dialect() == Dialect::Postgres
            && let Some(job) = self.submit_new(ask, actor, now_ms).await?
        {
            return Ok(Submitted { job, joined: false });
        }
        let mut tx = self.write().await?;
        if let Some(made) = requests::made(&mut tx, actor).await? {
            return Ok(Submitted { job: job_in(&mut tx, made).await?, joined: true });
        }
        let submitted = submit_in(&mut tx, ask, actor, now_ms).await?;
        requests::note(&mut tx, actor, submitted.job.id).await?;
        tx.commit().await?;
        Ok(submitted)
    }

    /// The ordinary case on PostgreSQL, in one statement. None: it is no new job.
    async fn submit_new(&self, ask: &Ask, actor: &Actor, now_ms: i64) -> Result<Option<Job>> {
        let query = sqlx::query(POSTGRES_SUBMIT)
            .bind(actor.request.as_deref())
            .bind(now_ms)
            .bind(ask.app.as_str())
            .bind(ask.commit.as_str())
            .bind(ask.commit.short())
            .bind(i64::from(ask.max_attempts))
            .bind(actor.name.as_str())
            .bind(i64::from(ask.priority.rank()))
            .bind(actor.origin.as_str())
            .bind(detail(ask));
        self.once(query).await?.first().map(job).transpose()
    }
}

/// What the audit log says of a new job.
fn detail(ask: &Ask) -> String {
    format!("{} {}", ask.commit, ask.priority)
}

/// [`Queue::submit`] in a transaction, which has the lock of those who ask for builds from then on.
pub(crate) async fn submit_in(
    tx: &mut Write,
    ask: &Ask,
    actor: &Actor,
    now_ms: i64,
) -> Result<Submitted> {
    // Who looks at the same moment waits here, and then finds the job.
    let sql = format!(
        "SELECT (SELECT 1 FROM apps WHERE name = $1) AS known FROM counters WHERE name = 'job'{}",
        tx.dialect.for_update()
    );
    let row =
        sqlx::query(sqlx::AssertSqlSafe(sql)).bind(ask.app.as_str()).fetch_one(&mut **tx).await?;
    db::get::<Option<i64>>(&row, "known")?.ok_or_else(|| QueueError::no_app(&ask.app))?;
    loop {
        if let Some(open) = open_job(tx, ask).await? {
            return Ok(Submitted { job: join(tx, open, ask, actor, now_ms).await?, joined: true });
        }
        // None: somebody added it without looking ([`POSTGRES_SUBMIT`]), and it is there now or has ended already.
        if let Some(job) = insert(tx, ask, actor, now_ms).await? {
            return Ok(Submitted { job, joined: false });
        }
    }
}

async fn join(tx: &mut Write, open: Job, ask: &Ask, actor: &Actor, now_ms: i64) -> Result<Job> {
    let mut detail = String::new();
    if ask.priority < open.priority {
        // A job that runs may come to wait again.
        sqlx::query("UPDATE jobs SET priority = $1 WHERE id = $2")
            .bind(i64::from(ask.priority.rank()))
            .bind(open.id)
            .execute(&mut **tx)
            .await?;
        detail = format!("raised from {} to {}", open.priority, ask.priority);
    }
    audit::record(tx, now_ms, actor, "job.join", &open.name, &detail).await?;
    job_in(tx, open.id).await
}

/// Adds a job. None: the commit is being built.
async fn insert(tx: &mut Write, ask: &Ask, actor: &Actor, now_ms: i64) -> Result<Option<Job>> {
    let id = db::numbered(tx, Numbers::Jobs).await?;
    let sql = format!(
        "INSERT INTO jobs (id, created_at, app, commit_sha, name, status, attempt, max_attempts, \
         cancel_requested, requested_by, priority, eligible_at, deferred) \
         SELECT n.id, $1, $2, $3, $2 || '/' || $4 || '-' || n.id, 'QUEUED', 0, $5, 0, $6, $7, $1, 0 \
         FROM (SELECT {id} AS id) AS n WHERE 1 = 1 ON CONFLICT (app, commit_sha) \
         WHERE status IN ('QUEUED', 'RUNNING') AND cancel_requested = 0 DO NOTHING RETURNING *"
    );
    let row = sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(now_ms)
        .bind(ask.app.as_str())
        .bind(ask.commit.as_str())
        .bind(ask.commit.short())
        .bind(i64::from(ask.max_attempts))
        .bind(actor.name.as_str())
        .bind(i64::from(ask.priority.rank()))
        .fetch_optional(&mut **tx)
        .await?;
    let Some(row) = row else { return Ok(None) };
    let job = job(&row)?;
    audit::record(tx, now_ms, actor, "job.submit", &job.name, &detail(ask)).await?;
    events::of_job(tx, EventKind::BuildQueued, job.id, now_ms).await?;
    Ok(Some(job))
}
