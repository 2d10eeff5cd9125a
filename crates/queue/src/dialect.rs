//! Where databases differ, and nowhere else: how a transaction begins, what is set on a connection, how
//! many connections there are, how a row to be changed is locked, what is numbered by what, and the hot calls that PostgreSQL
//! does in one statement. And what a claim looks for, which both share.

use std::{path::Path, time::Duration};

use sqlx::AnyConnection;

use crate::error::{QueueError, Result};

/// How long SQLite waits for another process's lock before it gives up, in milliseconds: no transaction here
/// takes a second, so only a stuck process makes a caller see an error.
const BUSY_TIMEOUT_MS: u32 = 30_000;

/// SQLite's readers. They never wait for the writer (WAL), only for each other.
const SQLITE_READERS: u32 = 4;

/// A coordinator's connections to PostgreSQL: enough commits at once for one sync to carry many, and few
/// enough that several coordinators fit below a server's default of 100.
const POSTGRES_CONNECTIONS: u32 = 24;

/// How many of them are kept for the calls that are one statement.
const POSTGRES_AT_HAND: u32 = 16;

/// A connection that has rested for this long is tried before it is used: the server may have been restarted.
const TRY_AFTER: Duration = Duration::from_secs(5);

/// What holds on every connection to PostgreSQL. A commit is on the disk before it is acknowledged, whatever the
/// server's default is (a stricter one is kept); and the locks of a coordinator whose host vanished in the
/// middle of a transaction are free after seconds, not after TCP's two hours.
const POSTGRES_SETTINGS: &str = "
    SELECT set_config('synchronous_commit', 'on', false)
    WHERE current_setting('synchronous_commit') = 'off';
    SET idle_in_transaction_session_timeout = '10s';
    SET tcp_keepalives_idle = 5;
    SET tcp_keepalives_interval = 2;
    SET tcp_keepalives_count = 3;";

/// The job that the worker $1 takes next, in its process $2. None while the queue is paused, or when the worker is drained
/// or its name another process's by now. It is one probe of an index, however long the history is.
macro_rules! first {
    () => {
        "SELECT id FROM jobs WHERE status = 'QUEUED' AND deferred = 0 \
         AND NOT EXISTS (SELECT 1 FROM pauses) AND NOT EXISTS \
         (SELECT 1 FROM workers WHERE name = $1 AND (drained = 1 OR incarnation <> $2)) \
         ORDER BY priority, created_at, id LIMIT 1"
    };
}

pub(crate) const FIRST: &str = first!();

/// Takes the first waiting job: the row, its attempt, and the answer in one round trip and one commit.
/// Claimants pass each other's rows by (SKIP LOCKED), so none waits for another.
pub(crate) const POSTGRES_CLAIM: &str = concat!(
    "WITH first AS (",
    first!(),
    " FOR NO KEY UPDATE SKIP LOCKED), taken AS (
        UPDATE jobs SET status = 'RUNNING', attempt = attempt + 1, lease = $3, worker = $1, host = $4,
            incarnation = $2, last_heartbeat = $5, started_at = $5, reason = NULL
        WHERE id = (SELECT id FROM first) RETURNING jobs.*
    ), noted AS (
        INSERT INTO attempts (job, attempt, lease, worker, host, incarnation, started_at)
        SELECT id, attempt, lease, worker, host, incarnation, started_at FROM taken
    ), told AS (
        INSERT INTO event_outbox (place, at, kind, app, job, attempt, name, commit_sha, status, who, worker)
        SELECT nextval('event_places'), started_at, 'build:init', app, id, attempt, name, commit_sha, status,
            requested_by, worker FROM taken
    )
    SELECT * FROM taken"
);

/// Ends a job well: the job, its attempt, its artifact, the copies to be made and the events in one round trip and one
/// commit. `whole` reads from `told` so that its event comes after that. No row: the job is not held so, or is to be cancelled,
/// or its objects were or are to be removed. Who removes objects locks the table of artifacts; a statement has its locks on
/// tables before it takes what it sees.
pub(crate) const POSTGRES_SUCCEED: &str = "
    WITH ended AS (
        UPDATE jobs SET status = 'SUCCEEDED', lease = NULL, finished_at = $4, reason = NULL, artifact = $5
        WHERE id = $1 AND attempt = $2 AND lease = $3 AND status = 'RUNNING' AND cancel_requested = 0
        AND NOT EXISTS (SELECT 1 FROM encodings e WHERE e.artifact = $5 AND e.encoding = $7
            AND (e.removal <> 0 OR e.checked_at IS NULL OR e.generation <> $13))
        RETURNING jobs.*
    ), noted AS (
        UPDATE attempts SET finished_at = $4, reason = NULL, outcome = $6
        WHERE job = (SELECT id FROM ended) AND attempt = $2 AND lease = $3
    ), made AS (
        INSERT INTO artifacts (name, app, artifact, encoding, size_bytes, encoded_bytes,
            piece_size_bytes, pieces, job, commit_sha, created_at, requested_by)
        SELECT name, app, $5, $7, $8, $9, $10, $11, id, commit_sha, $4, requested_by FROM ended
    ), copies AS (
        INSERT INTO replications (artifact, encoding, region, status, bytes_done, created_at, tries,
            next_try_at, owned_until)
        SELECT $5, $7, region, 'PENDING', 0, $4, 0, 0, 0
        FROM ended, unnest(string_to_array($12, ',')) AS region ORDER BY region
        ON CONFLICT (artifact, encoding, region) DO NOTHING
    ), told AS (
        INSERT INTO event_outbox (place, at, kind, app, job, attempt, name, commit_sha, status, who, worker)
        SELECT nextval('event_places'), finished_at, 'build:completed', app, id, attempt, name, commit_sha, status,
            requested_by, worker FROM ended RETURNING place
    ), whole AS (
        INSERT INTO event_outbox (place, at, kind, app, job, name, commit_sha, status, who)
        SELECT nextval('event_places'), finished_at, 'replication:completed', app, id, name, commit_sha, 'COMPLETE',
            requested_by FROM ended, told
        WHERE NOT EXISTS (SELECT 1 FROM regions r LEFT JOIN replications c ON c.region = r.name
            AND c.artifact = $5 AND c.encoding = $7
            WHERE r.configured = 1 AND r.drained = 0 AND (c.status IS NULL OR c.status <> 'COMPLETE'))
    )
    SELECT * FROM ended";

/// Asks for a build that is a new job: the job, its audit row and event, and what its request has made, in one round trip and
/// one commit. No row: the app is unknown, the commit is being built already, or the request has made something. Who asks for the
/// same commit at the same moment waits for this to be committed, at the unique index.
pub(crate) const POSTGRES_SUBMIT: &str = "
    WITH request AS (
        SELECT id FROM requests WHERE id = $1 AND made IS NULL FOR NO KEY UPDATE
    ), job AS (
        INSERT INTO jobs (id, created_at, app, commit_sha, name, status, attempt, max_attempts, cancel_requested,
            requested_by, priority, eligible_at, deferred)
        SELECT n.id, $2, a.name, $4, a.name || '/' || $5 || '-' || n.id, 'QUEUED', 0, $6, 0, $7, $8, $2, 0
        FROM apps a, (SELECT nextval('job_numbers') AS id) n
        WHERE a.name = $3 AND ($1 IS NULL OR EXISTS (SELECT 1 FROM request))
        ON CONFLICT (app, commit_sha) WHERE status IN ('QUEUED', 'RUNNING') AND cancel_requested = 0
        DO NOTHING RETURNING *
    ), noted AS (
        UPDATE requests SET made = job.id FROM job, request WHERE requests.id = request.id
    ), audited AS (
        INSERT INTO audit (id, at, who, origin, what, subject, detail, app)
        SELECT nextval('audit_numbers'), $2, $7, $9, 'job.submit', name, $10, app FROM job
    ), told AS (
        INSERT INTO event_outbox (place, at, kind, app, job, attempt, name, commit_sha, status, who)
        SELECT nextval('event_places'), $2, 'build:queued', app, id, attempt, name, commit_sha, status, requested_by
        FROM job
    )
    SELECT * FROM job";

/// Gives an app a goal whose revision and artifact are decided: rollout, goal, its place in the order of all goals and in the
/// outbox, audit row, event, and what its request has made, in one round trip. The order's counter is locked from here to the commit,
/// which is the next thing to come. The new rollout.
pub(crate) const POSTGRES_SET_GOAL: &str = "
    WITH made AS (
        INSERT INTO rollouts (id, app, epoch, number, artifact, encoding, artifact_name, status, is_rollback, selector,
            plan, targets, created_at, requested_by)
        VALUES (nextval('rollout_numbers'), $1, $2, $3, $4, $5, $6, 'RUNNING', $7, $8, $9, $10, $11, $12)
        RETURNING *
    ), place AS (
        UPDATE counters SET value = value + 1 WHERE name = 'goal' RETURNING value AS seq
    ), goal AS (
        INSERT INTO goals (seq, app, epoch, number, rollout, signed, created_at)
        SELECT place.seq, made.app, made.epoch, made.number, made.id, $13, $11 FROM made, place
    ), of_app AS (
        UPDATE apps SET goal_seq = place.seq FROM place WHERE name = $1
    ), outbox AS (
        INSERT INTO goal_outbox (app, seq, waits_since) SELECT $1, seq, $11 FROM place
        ON CONFLICT (app) DO UPDATE SET seq = excluded.seq
    ), audited AS (
        INSERT INTO audit (id, at, who, origin, what, subject, detail, app)
        VALUES (nextval('audit_numbers'), $11, $12, $14, $15, $1, $16, $1)
    ), noted AS (
        UPDATE requests SET made = made.id FROM made WHERE requests.id = $17
    ), told AS (
        INSERT INTO event_outbox (place, at, kind, app, job, rollout, name, commit_sha, status, who)
        SELECT nextval('event_places'), $11, 'deploy:init', r.app, a.job, r.id, r.artifact_name, a.commit_sha, r.status,
            r.requested_by FROM made r JOIN artifacts a ON a.name = r.artifact_name
    )
    SELECT made.*, a.encoded_bytes, CAST(1 AS BIGINT) AS newest FROM made JOIN artifacts a ON a.name = made.artifact_name";

/// What is numbered by sequences where there are some.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Numbers {
    /// Rows of the audit log.
    Audit,
    /// Jobs.
    Jobs,
    /// Rollouts.
    Rollouts,
}

impl Numbers {
    /// The counter that numbers them where there are no sequences.
    pub(crate) fn counter(self) -> &'static str {
        match self {
            Self::Audit => "audit",
            Self::Jobs => "job",
            Self::Rollouts => "rollout",
        }
    }
}

/// A kind of database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// One file, one writer.
    Sqlite,
    /// A server that several coordinators share.
    Postgres,
}

impl Dialect {
    /// The kind of database that a URL names.
    pub(crate) fn of(url: &str) -> Result<Self> {
        match url.split_once(':') {
            Some(("sqlite", _)) => Ok(Self::Sqlite),
            Some(("postgres" | "postgresql", _)) => Ok(Self::Postgres),
            // What is behind the colon may hold a password.
            Some((scheme, _)) => Err(QueueError::Address(format!("{scheme}:..."))),
            None => Err(QueueError::Address(url.into())),
        }
    }

    /// Begins a transaction that will write. SQLite takes the write lock at once: a transaction that
    /// read first and wrote later would fail when another wrote between. On PostgreSQL every statement sees
    /// what was committed before it, and rows that are read to be changed are locked.
    pub(crate) fn begin_write(self) -> &'static str {
        match self {
            Self::Sqlite => "BEGIN IMMEDIATE",
            Self::Postgres => "BEGIN ISOLATION LEVEL READ COMMITTED",
        }
    }

    /// [`Self::begin_write`] for what may be lost when the server fails right after it: its commit does not wait for the disk.
    pub(crate) fn begin_unsynced(self) -> &'static str {
        match self {
            Self::Sqlite => self.begin_write(),
            Self::Postgres => {
                "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL synchronous_commit = off"
            }
        }
    }

    /// Ends a query for rows that the transaction is going to change. SQLite's writer is alone anyway.
    pub(crate) fn for_update(self) -> &'static str {
        match self {
            Self::Sqlite => "",
            Self::Postgres => " FOR NO KEY UPDATE",
        }
    }

    /// An expression for the place of an event that is written now: after that of every event that its transaction has
    /// seen.
    pub(crate) fn event_place(self) -> &'static str {
        match self {
            Self::Sqlite => "(SELECT COALESCE(MAX(place), 0) + 1 FROM event_outbox)",
            Self::Postgres => "nextval('event_places')",
        }
    }

    /// An expression for the next number, of the sequence or of the counter that was raised for it.
    pub(crate) fn number(self, numbers: Numbers) -> &'static str {
        match (self, numbers) {
            (Self::Sqlite, Numbers::Audit) => "(SELECT value FROM counters WHERE name = 'audit')",
            (Self::Sqlite, Numbers::Jobs) => "(SELECT value FROM counters WHERE name = 'job')",
            (Self::Sqlite, Numbers::Rollouts) => {
                "(SELECT value FROM counters WHERE name = 'rollout')"
            }
            (Self::Postgres, Numbers::Audit) => "nextval('audit_numbers')",
            (Self::Postgres, Numbers::Jobs) => "nextval('job_numbers')",
            (Self::Postgres, Numbers::Rollouts) => "nextval('rollout_numbers')",
        }
    }

    /// Begins the `FROM` of a statement whose loss with the server undoes nothing that was acknowledged: its commit does not
    /// wait for the disk.
    pub(crate) fn unsynced(self) -> &'static str {
        match self {
            Self::Sqlite => "(SELECT 1) AS unsynced",
            Self::Postgres => "(SELECT set_config('synchronous_commit', 'off', true)) AS unsynced",
        }
    }

    /// Keeps all others from writing artifacts' rows, and from locking them, until the transaction ends.
    pub(crate) fn lock_artifacts(self) -> Option<&'static str> {
        match self {
            Self::Sqlite => None,
            Self::Postgres => Some("LOCK TABLE artifacts IN EXCLUSIVE MODE"),
        }
    }

    /// Ends a query for copies that are due, `c`: those that another one is taking are passed by.
    pub(crate) fn skip_taken_copies(self) -> &'static str {
        match self {
            Self::Sqlite => "",
            Self::Postgres => " FOR NO KEY UPDATE OF c SKIP LOCKED",
        }
    }

    /// How many connections may write at once.
    pub(crate) fn writers(self) -> u32 {
        match self {
            // One, so that writers queue in memory and not on the file's lock.
            Self::Sqlite => 1,
            Self::Postgres => POSTGRES_CONNECTIONS,
        }
    }

    /// How many of the writing connections are kept for the calls that are one statement.
    pub(crate) fn at_hand(self) -> u32 {
        match self {
            // None is: its writer is one, and every call waits for it.
            Self::Sqlite => 1,
            Self::Postgres => POSTGRES_AT_HAND,
        }
    }

    /// How many connections only read; none where the writers' do both.
    pub(crate) fn readers(self) -> Option<u32> {
        match self {
            Self::Sqlite => Some(SQLITE_READERS),
            Self::Postgres => None,
        }
    }

    /// How long a connection may have rested to be used without being tried.
    pub(crate) fn try_after(self) -> Duration {
        match self {
            Self::Sqlite => Duration::MAX,
            Self::Postgres => TRY_AFTER,
        }
    }

    /// Sets up a new connection.
    pub(crate) async fn set_up(
        self,
        connection: &mut AnyConnection,
        writes: bool,
    ) -> std::result::Result<(), sqlx::Error> {
        match self {
            Self::Sqlite => {
                let busy = format!("PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}");
                sqlx::raw_sql(sqlx::AssertSqlSafe(busy)).execute(&mut *connection).await?;
                // FULL: a commit is on the disk before it is acknowledged, in WAL mode too.
                let all = if writes {
                    "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;"
                } else {
                    "PRAGMA query_only = ON;"
                };
                sqlx::raw_sql(all).execute(&mut *connection).await?;
            }
            Self::Postgres => {
                sqlx::raw_sql(POSTGRES_SETTINGS).execute(&mut *connection).await?;
            }
        }
        Ok(())
    }
}

/// The URL of a SQLite file, which is created when it is not there.
#[must_use]
pub fn sqlite_url(path: &Path) -> String {
    // What would end the path of a URL, or begin an escape in it.
    let path = path.to_string_lossy();
    let path = path.replace('%', "%25").replace('?', "%3F").replace('#', "%23");
    format!("sqlite://{path}?mode=rwc")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_supported_databases_have_a_dialect() {
        assert_eq!(Dialect::of("sqlite:///x").unwrap(), Dialect::Sqlite);
        assert_eq!(Dialect::of("postgres://x/y").unwrap(), Dialect::Postgres);
        assert_eq!(Dialect::of("postgresql:///y").unwrap(), Dialect::Postgres);
        assert!(Dialect::of("/path").is_err());
        assert_eq!(sqlite_url(Path::new("/a?b#c%")), "sqlite:///a%3Fb%23c%25?mode=rwc");
    }

    #[test]
    fn a_wrong_address_is_told_without_its_password() {
        let error = Dialect::of("mysql://me:secret@x").unwrap_err().to_string();
        assert!(error.contains("mysql") && !error.contains("secret"), "{error}");
    }
}
