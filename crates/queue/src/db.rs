//! The connections, the migrations, and what every query needs.

use std::{
    fmt::Display,
    io,
    ops::{Deref, DerefMut},
    str::FromStr,
    sync::Arc,
    time::{Duration, Instant},
};

use serde::{Serialize, de::DeserializeOwned};
use sqlx::{
    Any, AnyConnection, AnyPool, Connection as _, Row as _, SqlSafeStr as _,
    any::{AnyArguments, AnyPoolOptions, AnyRow},
    migrate::{Migration, MigrationType, Migrator},
    pool::PoolConnection,
    query::Query,
};

use crate::{
    beats::Beats,
    bells::Bells,
    dialect::{Dialect, Numbers},
    error::{QueueError, Result},
    hand::Hand,
    unreachable,
};

/// How long a caller waits for a free connection: a burst is worked off within seconds, and a database
/// that is stuck should show.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(20);

/// After how long a server whose queue was full is asked again.
const QUEUE_FULL_RETRY: Duration = Duration::from_millis(20);

/// The coordinator's database. Clones share its connections.
#[derive(Clone)]
pub struct Queue {
    inner: Arc<Inner>,
}

struct Inner {
    url: String,
    dialect: Dialect,
    writer: AnyPool,
    reader: AnyPool,
    hand: Hand,
    beats: Beats,
    bells: Bells,
}

/// A transaction that writes; what is not committed is undone when it is dropped.
///
/// Not sqlx's own: that of 0.9.0 forgets a transaction whose BEGIN was given up on the way (its caller hung up), and
/// the next user of the connection would be in it, told of commits that never come.
pub(crate) struct Write {
    /// None once it is committed.
    connection: Option<PoolConnection<Any>>,
    pub(crate) dialect: Dialect,
}

impl Write {
    async fn begin(
        connection: PoolConnection<Any>,
        dialect: Dialect,
        begin: &'static str,
    ) -> Result<Self> {
        // From here on whatever happens ends in a commit or in a ROLLBACK.
        let mut write = Self { connection: Some(connection), dialect };
        sqlx::raw_sql(begin).execute(&mut *write).await?;
        Ok(write)
    }

    pub(crate) async fn commit(mut self) -> Result<()> {
        sqlx::raw_sql("COMMIT").execute(&mut *self).await?;
        self.connection = None;
        Ok(())
    }

    /// Undoes it, and returns when its locks are free: a row that is still locked is passed by by a claimant that
    /// comes next.
    pub(crate) async fn undo(mut self) -> Result<()> {
        sqlx::raw_sql("ROLLBACK").execute(&mut *self).await?;
        self.connection = None;
        Ok(())
    }
}

impl Drop for Write {
    fn drop(&mut self) {
        let Some(mut connection) = self.connection.take() else { return };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            connection.close_on_drop();
            return;
        };
        runtime.spawn(async move {
            if sqlx::raw_sql("ROLLBACK").execute(&mut *connection).await.is_err() {
                connection.close_on_drop();
            }
        });
    }
}

impl Deref for Write {
    type Target = AnyConnection;

    #[expect(clippy::expect_used, reason = "what takes it out is the end of it")]
    fn deref(&self) -> &AnyConnection {
        self.connection.as_ref().expect("it is open")
    }
}

impl DerefMut for Write {
    #[expect(clippy::expect_used, reason = "what takes it out is the end of it")]
    fn deref_mut(&mut self) -> &mut AnyConnection {
        self.connection.as_mut().expect("it is open")
    }
}

/// The migrations, and whether each is for SQLite, too.
const MIGRATIONS: [(i64, &str, bool, &str); 12] = [
    (1, "first", true, include_str!("../migrations/0001_first.sql")),
    (2, "several coordinators", true, include_str!("../migrations/0002_several_coordinators.sql")),
    (3, "postgres", false, include_str!("../migrations/0003_postgres.sql")),
    (4, "queue", true, include_str!("../migrations/0004_queue.sql")),
    (5, "goal outbox", true, include_str!("../migrations/0005_goal_outbox.sql")),
    (6, "access", true, include_str!("../migrations/0006_access.sql")),
    (7, "copies", true, include_str!("../migrations/0007_copies.sql")),
    (8, "events", true, include_str!("../migrations/0008_events.sql")),
    (9, "trust", true, include_str!("../migrations/0009_trust.sql")),
    (10, "region drain", true, include_str!("../migrations/0010_region_drain.sql")),
    (11, "numbers", false, include_str!("../migrations/0011_numbers.sql")),
    (12, "waves", true, include_str!("../migrations/0012_waves.sql")),
];

/// What some of them do on PostgreSQL beside.
const ON_POSTGRES: [(i64, &str); 1] = [(8, include_str!("../migrations/0008_events_postgres.sql"))];

fn migrations(dialect: Dialect) -> Migrator {
    Migrator::with_migrations(
        MIGRATIONS
            .into_iter()
            .filter(|(_, _, everywhere, _)| *everywhere || dialect == Dialect::Postgres)
            .map(|(version, what, _, sql)| {
                let more = ON_POSTGRES.iter().find(|(of, _)| *of == version);
                let more = more.filter(|_| dialect == Dialect::Postgres);
                let sql = match more {
                    Some((_, more)) => sqlx::AssertSqlSafe(format!("{sql}{more}")).into_sql_str(),
                    None => sql.into_sql_str(),
                };
                Migration::new(version, what.into(), MigrationType::Simple, sql, false)
            })
            .collect(),
    )
}

impl Queue {
    /// Opens the database at `url` (see [`crate::sqlite_url`], or `postgres://USER@HOST/DATABASE`) and brings its
    /// schema up to date.
    ///
    /// # Errors
    /// [`QueueError`] when the URL is of no supported kind, or the database cannot be reached or migrated.
    pub async fn open(url: &str) -> Result<Self> {
        let dialect = Dialect::of(url)?;
        if dialect == Dialect::Postgres {
            unreachable::check_files(url)?;
        }
        sqlx::any::install_default_drivers();
        if dialect == Dialect::Sqlite {
            unreachable::check_database(url).await?;
        }
        let pool = |size: u32, writes: bool| {
            AnyPoolOptions::new()
                .max_connections(size)
                .acquire_timeout(ACQUIRE_TIMEOUT)
                // A round trip before each call would be half of its cost.
                .test_before_acquire(false)
                .before_acquire(move |connection, meta| {
                    Box::pin(async move {
                        if meta.idle_for > dialect.try_after() {
                            connection.ping().await?;
                        }
                        Ok(true)
                    })
                })
                .after_connect(move |connection, _| {
                    Box::pin(async move { dialect.set_up(connection, writes).await })
                })
        };
        // The writer first: it creates the file and sets its mode.
        let writer = pool(dialect.writers(), true).connect_lazy(url)?;
        // The migrations take it over: the pool itself does not ask again.
        match connection(&writer).await {
            Ok(first) => drop(first),
            Err(error) => return Err(unreachable::explain(url, dialect, error).await),
        }
        migrations(dialect).run(&writer).await?;
        let reader = match dialect.readers() {
            Some(readers) => pool(readers, false).connect_lazy(url)?,
            None => writer.clone(),
        };
        let hand = Hand::new(dialect.at_hand());
        let (beats, bells) = (Beats::default(), Bells::default());
        Ok(Self {
            inner: Arc::new(Inner { url: url.into(), dialect, writer, reader, hand, beats, bells }),
        })
    }

    /// Closes all connections; calls that are under way are finished first.
    pub async fn close(&self) {
        self.inner.hand.empty();
        self.inner.reader.close().await;
        self.inner.writer.close().await;
    }

    pub(crate) fn dialect(&self) -> Dialect {
        self.inner.dialect
    }

    /// A connection to read with.
    pub(crate) async fn read(&self) -> Result<PoolConnection<Any>> {
        connection(&self.inner.reader).await
    }

    pub(crate) fn url(&self) -> &str {
        &self.inner.url
    }

    pub(crate) fn beats(&self) -> &Beats {
        &self.inner.beats
    }

    pub(crate) fn bells(&self) -> &Bells {
        &self.inner.bells
    }

    /// Runs a statement that is a transaction by itself; it is committed when this returns.
    pub(crate) async fn once(&self, query: Query<'_, Any, AnyArguments>) -> Result<Vec<AnyRow>> {
        self.alone(&self.inner.writer, query).await
    }

    /// Runs a statement that only reads.
    pub(crate) async fn look(&self, query: Query<'_, Any, AnyArguments>) -> Result<Vec<AnyRow>> {
        self.alone(&self.inner.reader, query).await
    }

    /// [`Queue::look`] for what has one row at most.
    pub(crate) async fn look_at(
        &self,
        query: Query<'_, Any, AnyArguments>,
    ) -> Result<Option<AnyRow>> {
        Ok(self.look(query).await?.into_iter().next())
    }

    async fn alone(
        &self,
        pool: &AnyPool,
        query: Query<'_, Any, AnyArguments>,
    ) -> Result<Vec<AnyRow>> {
        match self.inner.dialect {
            // Its writer is one: at hand for some, it would be out of reach for all others.
            Dialect::Sqlite => Ok(query.fetch_all(&mut *connection(pool).await?).await?),
            dialect => self.inner.hand.run(pool, dialect, query).await,
        }
    }

    pub(crate) async fn write(&self) -> Result<Write> {
        let dialect = self.inner.dialect;
        Write::begin(connection(&self.inner.writer).await?, dialect, dialect.begin_write()).await
    }

    /// [`Queue::write`] for what may be lost when the server fails right after it.
    pub(crate) async fn write_unsynced(&self) -> Result<Write> {
        let dialect = self.inner.dialect;
        Write::begin(connection(&self.inner.writer).await?, dialect, dialect.begin_unsynced()).await
    }
}

/// A free connection, or a new one. While PostgreSQL's queue for new connections is full, its local socket turns a caller
/// away at once (EAGAIN) where its TCP port lets it wait: so it is asked until [`ACQUIRE_TIMEOUT`].
pub(crate) async fn connection(pool: &AnyPool) -> Result<PoolConnection<Any>> {
    let until = Instant::now() + ACQUIRE_TIMEOUT;
    loop {
        match pool.acquire().await {
            Err(sqlx::Error::Io(error))
                if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < until =>
            {
                tokio::time::sleep(QUEUE_FULL_RETRY).await;
            }
            acquired => return Ok(acquired?),
        }
    }
}

/// Raises a counter and returns its new value; its row stays locked until the commit.
pub(crate) async fn next(tx: &mut Write, counter: &'static str) -> Result<i64> {
    let row = sqlx::query("UPDATE counters SET value = value + 1 WHERE name = $1 RETURNING value")
        .bind(counter)
        .fetch_one(&mut **tx)
        .await?;
    Ok(row.try_get("value")?)
}

/// What the next row of a kind is numbered with, as an expression for the statement that writes it.
///
/// PostgreSQL's sequences give numbers that rise and hold up nobody: these are told apart by them, and no reader follows
/// them with a cursor. What is followed (goals, machines, events) has a counter ([`next`]).
pub(crate) async fn numbered(tx: &mut Write, numbers: Numbers) -> Result<&'static str> {
    if tx.dialect == Dialect::Sqlite {
        next(tx, numbers.counter()).await?;
    }
    Ok(tx.dialect.number(numbers))
}

/// Reads a column of a basic type.
pub(crate) fn get<'r, T>(row: &'r AnyRow, column: &str) -> Result<T>
where
    T: sqlx::Decode<'r, Any> + sqlx::Type<Any>,
{
    Ok(row.try_get(column)?)
}

/// What cannot be read.
pub(crate) fn corrupt(column: &str, error: impl Display) -> QueueError {
    QueueError::Corrupt(format!("column {column}: {error}"))
}

/// Reads a text column as a name, an id or a state.
pub(crate) fn parsed<T: FromStr<Err: Display>>(row: &AnyRow, column: &str) -> Result<T> {
    get::<String>(row, column)?.parse().map_err(|error| corrupt(column, error))
}

/// [`parsed`] for a column that may be NULL.
pub(crate) fn parsed_opt<T: FromStr<Err: Display>>(
    row: &AnyRow,
    column: &str,
) -> Result<Option<T>> {
    let text: Option<String> = get(row, column)?;
    text.map(|text| text.parse().map_err(|error| corrupt(column, error))).transpose()
}

/// Reads a whole number into a narrower or unsigned type.
pub(crate) fn number<T: TryFrom<i64, Error: Display>>(row: &AnyRow, column: &str) -> Result<T> {
    get::<i64>(row, column)?.try_into().map_err(|error| corrupt(column, error))
}

/// Reads a flag.
pub(crate) fn flag(row: &AnyRow, column: &str) -> Result<bool> {
    Ok(get::<i64>(row, column)? != 0)
}

/// Reads a text column that holds JSON.
pub(crate) fn json<T: DeserializeOwned>(row: &AnyRow, column: &str) -> Result<T> {
    serde_json::from_str(&get::<String>(row, column)?).map_err(|error| corrupt(column, error))
}

/// What a JSON column holds.
pub(crate) fn to_json(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|error| QueueError::Refused(error.to_string()))
}

/// A count as a column holds it. What exceeds 2^63 is no real count: it is cut.
pub(crate) fn count(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Appends `rows` groups of `columns` placeholders: `($1,$2),($3,$4)`.
pub(crate) fn placeholders(sql: &mut String, rows: usize, columns: usize) {
    use std::fmt::Write as _;
    for row in 0..rows {
        sql.push_str(if row == 0 { "(" } else { ",(" });
        for column in 0..columns {
            let comma = if column == 0 { "" } else { "," };
            // Writing to a String does not fail.
            let _ = write!(sql, "{comma}${}", row * columns + column + 1);
        }
        sql.push(')');
    }
}

#[cfg(test)]
mod tests {
    use std::task::Poll;

    use shoal_proto::state::JobStatus;
    use tokio::{
        io::AsyncReadExt as _,
        net::{UnixSocket, UnixStream},
    };

    use super::*;
    use crate::sqlite_url;

    /// A database of the release before the queue had rules: several jobs may build one commit.
    async fn before_the_queue(url: &str) {
        sqlx::any::install_default_drivers();
        let pool = AnyPoolOptions::new().max_connections(1).connect(url).await.unwrap();
        let all = migrations(Dialect::of(url).unwrap());
        let before: Vec<_> = all.iter().filter(|one| one.version < 4).cloned().collect();
        Migrator::with_migrations(before).run(&pool).await.unwrap();
        sqlx::query(
            "INSERT INTO apps (name, spec, created_at, updated_at) VALUES ('web', '{}', 1, 1)",
        )
        .execute(&pool)
        .await
        .unwrap();
        let jobs = [
            ("a", "QUEUED"),
            ("a", "RUNNING"),
            ("a", "QUEUED"),
            ("b", "RUNNING"),
            ("b", "RUNNING"),
            ("c", "QUEUED"),
            ("c", "QUEUED"),
            ("d", "SUCCEEDED"),
            ("d", "QUEUED"),
        ];
        for (id, (commit, status)) in (1..).zip(jobs) {
            sqlx::query(
                "INSERT INTO jobs (id, created_at, app, commit_sha, name, status, attempt, \
                 max_attempts, cancel_requested, requested_by) \
                 VALUES ($1, $1, 'web', $2, $3, $4, 0, 3, 0, 'me')",
            )
            .bind(i64::from(id))
            .bind(commit.repeat(40))
            .bind(format!("web/{id}"))
            .bind(status)
            .execute(&pool)
            .await
            .unwrap();
        }
        pool.close().await;
    }

    async fn of_jobs_of_one_commit_one_goes_on(url: &str) {
        before_the_queue(url).await;
        let queue = Queue::open(url).await.unwrap();
        let mut jobs = queue.jobs(None, 10).await.unwrap();
        jobs.reverse();
        use JobStatus::{Cancelled, Queued, Running, Succeeded};
        let now: Vec<_> = jobs.iter().map(|job| job.status).collect();
        let want =
            [Cancelled, Running, Cancelled, Running, Running, Queued, Cancelled, Succeeded, Queued];
        assert_eq!(now, want);
        let stopped = jobs.iter().filter(|job| job.status == Running && job.cancel_requested);
        assert_eq!(stopped.map(|job| job.id).collect::<Vec<_>>(), [5]);
        assert!(jobs[2].reason.as_ref().unwrap().contains("same commit"));
        assert!(jobs.iter().all(|job| job.eligible_at_ms == job.created_at_ms && !job.deferred));
        queue.close().await;
    }

    #[tokio::test]
    async fn a_sqlite_file_is_brought_up_to_date() {
        let dir = tempfile::tempdir().unwrap();
        of_jobs_of_one_commit_one_goes_on(&sqlite_url(&dir.path().join("test.sqlite"))).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_postgres_database_is_brought_up_to_date() {
        let database = shoal_test_postgres::Database::create().await.unwrap();
        of_jobs_of_one_commit_one_goes_on(database.url()).await;
        database.remove().await.unwrap();
    }

    #[tokio::test]
    async fn who_is_turned_away_by_a_full_queue_asks_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(".s.PGSQL.5432");
        let socket = UnixSocket::new_stream().unwrap();
        socket.bind(&path).unwrap();
        let listener = socket.listen(1).unwrap();
        let mut waiting = Vec::new();
        let full = loop {
            match UnixStream::connect(&path).await {
                Ok(stream) => waiting.push(stream),
                Err(error) => break error,
            }
        };
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);

        sqlx::any::install_default_drivers();
        let host = dir.path().display().to_string().replace('/', "%2F");
        let url = format!("postgres://postgres@{host}/any?sslmode=disable");
        let pool = AnyPoolOptions::new().max_connections(1).connect_lazy(&url).unwrap();
        let mut asking = std::pin::pin!(connection(&pool));
        // On a local socket the refusal comes with the first call.
        let ended = std::future::poll_fn(|context| Poll::Ready(asking.as_mut().poll(context)));
        if let Poll::Ready(ended) = ended.await {
            panic!("given up: {:?}", ended.err());
        }
        // Those before it are taken, and it is next.
        for _ in &waiting {
            listener.accept().await.unwrap();
        }
        let hello = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut hello = [0; 8];
            stream.read_exact(&mut hello).await.unwrap();
            i32::from_be_bytes(hello[4..].try_into().unwrap())
        };
        tokio::select! {
            version = hello => assert_eq!(version, 3 << 16, "it speaks PostgreSQL's protocol"),
            ended = asking => panic!("given up: {:?}", ended.err()),
        }
    }

    #[test]
    fn placeholders_count_on() {
        let mut sql = String::new();
        placeholders(&mut sql, 2, 2);
        assert_eq!(sql, "($1,$2),($3,$4)");
    }
}
