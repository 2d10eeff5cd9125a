//! Why a server cannot be used, said so that an operator knows what to mend: what a pool says is only that it waited.

use std::{fs::File, path::Path, str::FromStr as _, time::Duration};

use sqlx::{AnyConnection, Connection as _, postgres::PgConnectOptions};

use crate::{
    dialect::Dialect,
    error::{QueueError, Result},
};

/// How long the server may take to say why: a host that does not answer at all takes all of it.
const REASON_TIMEOUT: Duration = Duration::from_secs(5);

/// The parts of a URL that name files.
const FILES: [&str; 6] =
    ["sslrootcert", "ssl-root-cert", "sslcert", "ssl-cert", "sslkey", "ssl-key"];

/// Reads the files that `url` names: the driver's own error does not say which one it misses.
///
/// # Errors
/// [`QueueError::Unusable`] names the first that cannot be read.
pub(crate) fn check_files(url: &str) -> Result<()> {
    // What is no URL at all the driver says.
    let Ok(parsed) = url::Url::parse(url) else { return Ok(()) };
    for (key, file) in parsed.query_pairs() {
        if FILES.contains(&&*key)
            && let Err(error) = File::open(&*file)
        {
            let reason = format!("cannot read {file}, its {key}: {error}");
            return Err(QueueError::Unusable { at: place(url), reason });
        }
    }
    Ok(())
}

/// What to say of the `error` with which the first connection failed.
pub(crate) async fn explain(url: &str, dialect: Dialect, error: QueueError) -> QueueError {
    let QueueError::Database(error) = error else { return error };
    if dialect == Dialect::Sqlite {
        return QueueError::Unusable { at: file(url).into(), reason: reason(&error) };
    }
    let error = match error {
        // A pool goes on for as long as the server refuses connections, and forgets why.
        sqlx::Error::PoolTimedOut => {
            match tokio::time::timeout(REASON_TIMEOUT, AnyConnection::connect(url)).await {
                Ok(Ok(connection)) => {
                    drop(connection.close().await);
                    sqlx::Error::PoolTimedOut
                }
                Ok(Err(reason)) => reason,
                Err(_) => {
                    let reason = format!("nothing came back within {} s", REASON_TIMEOUT.as_secs());
                    return QueueError::Unusable { at: place(url), reason };
                }
            }
        }
        error => error,
    };
    QueueError::Unusable { at: place(url), reason: reason(&error) }
}

/// Looks whether an SQLite file that is there is one: a pool would ask it for its whole patience.
///
/// # Errors
/// [`QueueError::Unusable`] when it is none, or cannot be read.
pub(crate) async fn check_database(url: &str) -> Result<()> {
    if !Path::new(file(url)).exists() {
        return Ok(());
    }
    let look = async {
        let mut connection = AnyConnection::connect(url).await?;
        sqlx::query("PRAGMA schema_version").fetch_one(&mut connection).await?;
        connection.close().await
    };
    let unusable = |error| QueueError::Unusable { at: file(url).into(), reason: reason(&error) };
    look.await.map_err(unusable)
}

/// The file of an SQLite URL.
fn file(url: &str) -> &str {
    let path = url.strip_prefix("sqlite:").unwrap_or(url);
    let path = path.strip_prefix("//").unwrap_or(path);
    path.split('?').next().unwrap_or(path)
}

fn reason(error: &sqlx::Error) -> String {
    let text = match error {
        // sqlx's text ends with the line of the server's source, and begins with what is said already.
        sqlx::Error::Database(error) => error.message().into(),
        sqlx::Error::Io(error) => error.to_string(),
        error => error.to_string(),
    };
    if text.contains("UnknownIssuer") {
        return "no CA that is believed signed its certificate: name its CA with sslrootcert=FILE"
            .into();
    }
    text
}

/// Where a database is: its server, without user and password, or its file.
#[must_use]
pub fn place(url: &str) -> String {
    if url.starts_with("sqlite:") {
        return file(url).into();
    }
    let Ok(options) = PgConnectOptions::from_str(url) else { return "its address".into() };
    let database = options.get_database().unwrap_or_default();
    match options.get_socket() {
        Some(socket) => format!("{}/{database}", socket.display()),
        None => format!("{}:{}/{database}", options.get_host(), options.get_port()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn said(url: &str, error: sqlx::Error) -> String {
        sqlx::any::install_default_drivers();
        explain(url, Dialect::Postgres, QueueError::Database(error)).await.to_string()
    }

    #[tokio::test]
    async fn a_refused_connection_is_told_with_its_place_and_without_the_password() {
        // Nobody listens on a port that was free a moment ago.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let url = format!("postgres://me:secret@127.0.0.1:{port}/shoal");
        let error = said(&url, sqlx::Error::PoolTimedOut).await;
        assert!(error.contains(&format!("127.0.0.1:{port}/shoal")), "{error}");
        assert!(error.contains("refused") && !error.contains("secret"), "{error}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_the_server_says_is_told_without_its_line_of_code() {
        let database = shoal_test_postgres::Database::create().await.unwrap();
        let (server, _) = database.url().rsplit_once('/').unwrap();
        let url = format!("{server}/nowhere");
        let error = crate::Queue::open(&url).await.err().unwrap().to_string();
        assert!(error.ends_with("cannot be used: database \"nowhere\" does not exist"), "{error}");
        database.remove().await.unwrap();
    }

    #[tokio::test]
    async fn a_file_that_is_no_database_is_named_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("notes.txt");
        std::fs::write(&file, "notes, and no database at all. ".repeat(50)).unwrap();
        let error = crate::Queue::open(&crate::sqlite_url(&file)).await.err().unwrap().to_string();
        let want = format!("the database at {} cannot be used: ", file.display());
        assert!(error.starts_with(&want) && error.contains("not a database"), "{error}");
    }

    #[tokio::test]
    async fn an_unknown_ca_is_to_be_named() {
        let io = std::io::Error::other("invalid peer certificate: UnknownIssuer");
        let error = said("postgres://me@db.example/shoal", sqlx::Error::Io(io)).await;
        assert!(error.ends_with("name its CA with sslrootcert=FILE"), "{error}");
    }

    #[test]
    fn a_file_that_is_there_is_found_by_its_escaped_name() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("the ca.pem");
        std::fs::write(&file, "").unwrap();
        let escaped = file.to_str().unwrap().replace('/', "%2F").replace(' ', "%20");
        check_files(&format!("postgres://me@db.example/shoal?sslrootcert={escaped}")).unwrap();
    }

    #[tokio::test]
    async fn a_file_that_is_missing_is_named() {
        let url =
            "postgres://me:secret@db.example/shoal?sslmode=verify-full&sslrootcert=/no/ca.pem";
        let error = crate::Queue::open(url).await.err().unwrap().to_string();
        let want = "the database at db.example:5432/shoal cannot be used: cannot read /no/ca.pem, its sslrootcert: No such file";
        assert!(error.starts_with(want) && !error.contains("secret"), "{error}");
    }
}
