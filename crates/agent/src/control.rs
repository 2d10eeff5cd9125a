//! The agent's local socket, `DATA_DIR/agent.sock`: for whoever may write into its data directory.
//!
//! One JSON object a line each way. `{"import": "/path"}` answers with an [`Imported`], `{"limits": {}}` with a [`LimitsReport`],
//! `{"limits": {"up_limit": "50MB/s", "scavenger": true}}` changes these limits first; or it is `{"error": "…"}`.

use std::{
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
};

use anyhow::Context as _;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use shoal_proto::{ArtifactId, manifest::PieceSize};
use shoal_store::Store;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
};

use crate::{
    limits::LimitsChange,
    machine::{Machine, Retention},
    throttle::LimitsReport,
};

/// The longest request or answer, in bytes.
const LINE_MAX_BYTES: u64 = 64 << 10;

/// zstd's level for pieces that this machine encodes itself: the level of builds.
pub(crate) const IMPORT_LEVEL: i32 = 1;

/// What can be asked: one of `import` and `limits`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Request {
    /// Cut this file and seed it.
    #[serde(skip_serializing_if = "Option::is_none")]
    import: Option<PathBuf>,
    /// The piece size, when not the default one.
    #[serde(skip_serializing_if = "Option::is_none")]
    piece_size_bytes: Option<u64>,
    /// Change these limits, and tell all.
    #[serde(skip_serializing_if = "Option::is_none")]
    limits: Option<LimitsChange>,
}

impl Request {
    pub(crate) fn import(file: &Path, piece_size_bytes: Option<u64>) -> std::io::Result<Self> {
        let import = Some(std::path::absolute(file)?);
        Ok(Self { import, piece_size_bytes, limits: None })
    }

    pub(crate) fn limits(change: LimitsChange) -> Self {
        Self { limits: Some(change), ..Self::default() }
    }
}

/// An imported file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Imported {
    /// BLAKE3 of its bytes.
    pub artifact: ArtifactId,
    /// Its length.
    pub size_bytes: u64,
    /// Its number of pieces.
    pub pieces: u32,
    /// Whether a running agent serves it now; otherwise the agent does when it starts.
    pub seeding: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Answer<T> {
    Done(T),
    Error { error: String },
}

/// Where the socket of an agent is.
pub(crate) fn socket_path(data_dir: &Path) -> PathBuf {
    data_dir.join("agent.sock")
}

/// Cuts `file` into `store` and marks it to be kept. Blocks.
pub(crate) fn import_into(
    store: &Store,
    retention: &Retention,
    file: &Path,
    piece_size_bytes: Option<u64>,
) -> anyhow::Result<Imported> {
    let piece_size = piece_size_bytes
        .map(|bytes| {
            PieceSize::from_bytes(bytes).with_context(|| {
                format!("piece size {bytes}: use a power of two from 256 KiB to 16 MiB")
            })
        })
        .transpose()?;
    let artifact = store.import(file, piece_size, IMPORT_LEVEL, |_| {}).context("cannot import")?;
    let manifest = artifact.manifest();
    retention.keep_imported(&manifest.artifact)?;
    Ok(Imported {
        artifact: manifest.artifact,
        size_bytes: manifest.size_bytes,
        pieces: manifest.piece_count(),
        seeding: false,
    })
}

/// Asks a running agent; none when no agent runs on `data_dir`.
pub(crate) async fn ask<T: DeserializeOwned>(
    data_dir: &Path,
    request: &Request,
) -> anyhow::Result<Option<T>> {
    let Ok(mut stream) = UnixStream::connect(socket_path(data_dir)).await else { return Ok(None) };
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line).await?;
    let mut answer = Vec::new();
    BufReader::new(stream.take(LINE_MAX_BYTES)).read_until(b'\n', &mut answer).await?;
    match serde_json::from_slice(&answer).context("the agent ended before it answered")? {
        Answer::Done(done) => Ok(Some(done)),
        Answer::Error { error } => anyhow::bail!("{error}"),
    }
}

/// Serves the socket for ever.
pub(crate) async fn serve(machine: Arc<Machine>) -> anyhow::Result<()> {
    let path = socket_path(&machine.config.data_dir);
    // The store's lock has been taken, so a socket that is there belongs to a dead agent.
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path)
        .with_context(|| format!("cannot listen on {}", path.display()))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    loop {
        let (stream, _) = listener.accept().await?;
        let machine = machine.clone();
        tokio::spawn(async move {
            if let Err(error) = answer(machine, stream).await {
                tracing::debug!(%error, "local request failed");
            }
        });
    }
}

async fn answer(machine: Arc<Machine>, mut stream: UnixStream) -> anyhow::Result<()> {
    let mut line = Vec::new();
    let mut reader = BufReader::new((&mut stream).take(LINE_MAX_BYTES));
    reader.read_until(b'\n', &mut line).await?;
    let mut line = match carry_out(&machine, &line).await {
        Ok(line) => line,
        Err(error) => serde_json::to_vec(&Answer::<()>::Error { error: format!("{error:#}") })?,
    };
    line.push(b'\n');
    stream.write_all(&line).await?;
    Ok(())
}

/// Does what a request says; the answer.
async fn carry_out(machine: &Arc<Machine>, request: &[u8]) -> anyhow::Result<Vec<u8>> {
    let request: Request = serde_json::from_slice(request).context("not a request")?;
    match request {
        Request { import: Some(file), piece_size_bytes, limits: None } => {
            let imported = import(machine, file, piece_size_bytes).await?;
            Ok(serde_json::to_vec(&Answer::Done(imported))?)
        }
        Request { import: None, piece_size_bytes: None, limits: Some(change) } => {
            machine.throttle.change(change);
            let report: LimitsReport = machine.throttle.report();
            Ok(serde_json::to_vec(&Answer::Done(report))?)
        }
        _ => anyhow::bail!("not a request: ask for one of import and limits"),
    }
}

async fn import(
    machine: &Arc<Machine>,
    file: PathBuf,
    piece_size_bytes: Option<u64>,
) -> anyhow::Result<Imported> {
    let worker = machine.clone();
    let imported = tokio::task::spawn_blocking(move || {
        worker.importing.fetch_add(1, Ordering::AcqRel);
        let imported = import_into(&worker.store, &worker.retention, &file, piece_size_bytes);
        worker.importing.fetch_sub(1, Ordering::AcqRel);
        imported
    })
    .await??;
    seed(machine, imported.artifact).await;
    Ok(Imported { seeding: true, ..imported })
}

/// Serves a whole artifact of the store.
pub(crate) async fn seed(machine: &Arc<Machine>, artifact: ArtifactId) {
    let worker = machine.clone();
    let held = tokio::task::spawn_blocking(move || worker.store.get(&artifact)).await;
    if let Ok(Some(held)) = held
        && held.is_complete()
    {
        machine.engine.join(held, 0, 0).await;
    }
}
