//! Who does what only one coordinator at a time shall do: the reaper, the copies, the ends of rollouts.
//!
//! On PostgreSQL it is an advisory lock of a session: a connection of its own that does nothing else. Its holder
//! says every [`Duty::PERIOD`] that it is there. When it dies, its host closes the connection and the lock is free at
//! once; when its host vanishes, or it stands still, the server ends the silent session. On SQLite there is one
//! coordinator, and it is on duty.
//!
//! A holder that stood still may go on for a moment beside its successor. That does no harm: each change that it makes
//! is compare-and-set.

use std::time::Duration;

use sqlx::{Connection as _, PgConnection};
use tokio::time::timeout;

use crate::{db::Queue, dialect::Dialect, error::Result};

/// The lock's number: "shoal" in ASCII and a 1. Such locks are a database's, not a server's.
const LOCK: i64 = 0x7368_6f61_6c01;

/// How long the server may take to answer before the duty is given up: longer than any pause of a healthy server,
/// and with the session's limit below the 10 s in which a duty passes on.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);

/// The server ends the session of a holder that says nothing for this long.
const SESSION: &str = "SET idle_session_timeout = '6s'";

/// Being on duty, or waiting for it.
pub struct Duty {
    queue: Queue,
    session: Option<Session>,
}

struct Session {
    connection: PgConnection,
    holds: bool,
}

impl Duty {
    /// How often [`Duty::hold`] is called.
    pub const PERIOD: Duration = Duration::from_secs(2);

    /// Takes the duty if nobody has it, and says whether it is this process's. False is certain only for a
    /// moment; so is true, for [`Duty::PERIOD`].
    pub async fn hold(&mut self) -> bool {
        if self.queue.dialect() == Dialect::Sqlite {
            return true;
        }
        // A connection that failed or did not answer is closed, and its lock free.
        let session = self.session.take();
        match timeout(ANSWER_TIMEOUT, ask(self.queue.url(), session)).await {
            Ok(Ok(session)) => self.session.insert(session).holds,
            _ => false,
        }
    }

    /// Gives the duty up at once, so that another process need not wait.
    pub async fn release(&mut self) {
        let Some(Session { mut connection, .. }) = self.session.take() else { return };
        let end = async {
            // By itself first: a session's end frees its locks a little later.
            sqlx::raw_sql("SELECT pg_advisory_unlock_all()").execute(&mut connection).await?;
            connection.close().await
        };
        // What fails is closed by being dropped.
        let _: std::result::Result<std::result::Result<(), sqlx::Error>, _> =
            timeout(ANSWER_TIMEOUT, end).await;
    }
}

async fn ask(url: &str, session: Option<Session>) -> Result<Session> {
    let mut session = match session {
        Some(session) => session,
        None => {
            let mut connection = PgConnection::connect(url).await?;
            sqlx::raw_sql(SESSION).execute(&mut connection).await?;
            Session { connection, holds: false }
        }
    };
    if session.holds {
        session.connection.ping().await?;
    } else {
        session.holds = sqlx::query_scalar("SELECT pg_try_advisory_lock($1)")
            .bind(LOCK)
            .fetch_one(&mut session.connection)
            .await?;
    }
    Ok(session)
}

impl Queue {
    /// The duty, not yet taken.
    #[must_use]
    pub fn duty(&self) -> Duty {
        Duty { queue: self.clone(), session: None }
    }
}
