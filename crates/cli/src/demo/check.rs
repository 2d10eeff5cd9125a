//! The demo does not take the cluster's word for it: it hashes the file that each agent runs, and asks each
//! program for its version.

use std::{
    fs::File,
    io::Read as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use shoal_proto::{AppName, ArtifactId, CommitSha};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

/// How long a program may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// The longest answer that is read, in bytes.
const ANSWER_MAX_BYTES: u64 = 4 << 10;

/// How much of a file is hashed at a time, in bytes.
const CHUNK_BYTES: usize = 1 << 20;

/// The BLAKE3 hash of the file that an agent has as current.
pub(super) async fn hash_current(data_dir: &Path, app: &AppName) -> anyhow::Result<ArtifactId> {
    let current = data_dir.join("apps").join(app.as_str()).join("current");
    tokio::task::spawn_blocking(move || hash(&current)).await?
}

fn hash(link: &PathBuf) -> anyhow::Result<ArtifactId> {
    let read = || -> std::io::Result<ArtifactId> {
        let mut file = File::open(link)?;
        let mut hasher = blake3::Hasher::new();
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            match file.read(&mut chunk)? {
                0 => return Ok(ArtifactId(*hasher.finalize().as_bytes())),
                len => hasher.update(&chunk[..len]),
            };
        }
    };
    read().with_context(|| format!("cannot read {}", link.display()))
}

/// Asks an agent's program for its version.
pub(super) async fn version(data_dir: &Path, app: &AppName) -> anyhow::Result<CommitSha> {
    let path = data_dir.join("run").join(app.as_str()).join("port");
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("the program has not written {}", path.display()))?;
    let port: u16 = text.trim().parse().context("the program's port is no number")?;
    let answer = tokio::time::timeout(ANSWER_TIMEOUT, ask(port));
    let answer = answer.await.context("the program does not answer")??;
    ensure!(answer.starts_with("HTTP/1.0 200 "), "the program answered: {answer}");
    match answer.split_once("\r\n\r\n") {
        Some((_, body)) => Ok(body.trim().parse()?),
        None => bail!("the program's answer has no body"),
    }
}

async fn ask(port: u16) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
    stream.write_all(b"GET /version HTTP/1.0\r\n\r\n").await?;
    let mut answer = String::new();
    stream.take(ANSWER_MAX_BYTES).read_to_string(&mut answer).await?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write as _, net::TcpListener};

    use super::*;

    #[tokio::test]
    async fn hashes_and_versions_are_those_of_the_files_and_programs() {
        let dir = tempfile::tempdir().unwrap();
        let app = AppName::new("demo").unwrap();
        let place = |kind: &str, name: &str| {
            let dir = dir.path().join(kind).join("demo");
            fs::create_dir_all(&dir).unwrap();
            dir.join(name)
        };
        assert!(hash_current(dir.path(), &app).await.is_err());
        fs::write(place("apps", "current"), b"").unwrap();
        assert_eq!(hash_current(dir.path(), &app).await.unwrap(), ArtifactId::EMPTY);
        fs::write(place("apps", "current"), b"x").unwrap();
        assert_ne!(hash_current(dir.path(), &app).await.unwrap(), ArtifactId::EMPTY);

        assert!(version(dir.path(), &app).await.is_err());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        fs::write(place("run", "port"), format!("{port}\n")).unwrap();
        let sha = "a".repeat(40);
        let answer = format!("HTTP/1.0 200 OK\r\n\r\n{sha}\n");
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 25];
            stream.read_exact(&mut request).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
        });
        assert_eq!(version(dir.path(), &app).await.unwrap().as_str(), sha);
        server.join().unwrap();
    }
}
