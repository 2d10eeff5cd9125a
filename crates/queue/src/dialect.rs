//! Where databases differ, and nowhere else: how a transaction begins, what is set on a connection, how
//! many connections may write, and how a row to be changed is locked.

use std::path::Path;

use sqlx::AnyConnection;

use crate::error::{QueueError, Result};

/// How long SQLite waits for another process's lock before it gives up, in milliseconds: no transaction here
/// takes a second, so only a stuck process makes a caller see an error.
const BUSY_TIMEOUT_MS: u32 = 30_000;

/// SQLite's readers. They never wait for the writer (WAL), only for each other.
const SQLITE_READERS: u32 = 4;

/// A kind of database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// One file, one writer.
    Sqlite,
}

impl Dialect {
    /// The kind of database that a URL names.
    pub(crate) fn of(url: &str) -> Result<Self> {
        match url.split_once(':') {
            Some(("sqlite", _)) => Ok(Self::Sqlite),
            _ => Err(QueueError::Address(url.into())),
        }
    }

    /// Begins a transaction that will write. SQLite takes the write lock at once: a transaction that
    /// read first and wrote later would fail when another wrote between.
    pub(crate) fn begin_write(self) -> &'static str {
        match self {
            Self::Sqlite => "BEGIN IMMEDIATE",
        }
    }

    /// The oldest waiting job, locked against other claimants.
    pub(crate) fn oldest_queued(self) -> &'static str {
        match self {
            Self::Sqlite => {
                "SELECT id, attempt FROM jobs WHERE status = 'QUEUED' ORDER BY created_at, id LIMIT 1"
            }
        }
    }

    /// How many connections may write at once.
    pub(crate) fn writers(self) -> u32 {
        match self {
            // One, so that writers queue in memory and not on the file's lock.
            Self::Sqlite => 1,
        }
    }

    /// How many connections read.
    pub(crate) fn readers(self) -> u32 {
        match self {
            Self::Sqlite => SQLITE_READERS,
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
                Ok(())
            }
        }
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
        assert!(Dialect::of("mysql://x").is_err());
        assert!(Dialect::of("/path").is_err());
        assert_eq!(sqlite_url(Path::new("/a?b#c%")), "sqlite:///a%3Fb%23c%25?mode=rwc");
    }
}
