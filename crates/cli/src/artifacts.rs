//! `shoal artifacts`, `artifact`, `publish`.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use backon::{ExponentialBuilder, Retryable as _};
use bytes::Bytes;
use shoal_client::{
    Client, ClientError,
    types::{Artifact, PublishRequest},
};
use shoal_proto::{AppName, manifest::PieceSize, state::ReplicationStatus};
use shoal_store::{Cut, CutOptions, INDEX_NAME, cut, part_name};

use crate::{connect::Connection, deploy, exit::usage, jobs::LIST_LIMIT, show};

/// The longest reason in a listing, in characters.
const REASON_MAX_CHARS: usize = 80;

/// How often an artifact that is waited for is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// How often all of it is uploaded again, when some of it is gone at the end.
const UPLOADS_AGAIN_MAX: usize = 20;

/// How often the upload of an object is tried; with the back-off about half a minute.
const UPLOAD_RETRIES_MAX: usize = 6;

#[derive(clap::Args)]
pub(crate) struct ArtifactsArgs {
    /// Only artifacts of this app.
    #[arg(long)]
    app: Option<AppName>,
    /// How many at most.
    #[arg(long, default_value_t = LIST_LIMIT, value_parser = show::at_least_one())]
    limit: u32,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
pub(crate) struct ArtifactArgs {
    /// Its name (APP/SHA12-JOB) or id.
    artifact: String,
    /// Wait until it may be deployed.
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
pub(crate) struct PublishArgs {
    /// The file.
    file: PathBuf,
    /// The app that it is an artifact of.
    #[arg(long)]
    app: AppName,
    /// Deploy it as soon as it is in every region, and wait for the rollout's end.
    #[arg(long)]
    deploy: bool,
    /// The length of a piece: a power of two from 256KiB to 16MiB; by default the app's, else by the file's size.
    #[arg(long, value_name = "SIZE", value_parser = show::parse_size)]
    piece_size: Option<bytesize::ByteSize>,
    #[command(flatten)]
    connection: Connection,
}

impl ArtifactsArgs {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let artifacts = self.connection.client()?.artifacts(self.app.as_ref(), self.limit).await?;
        show::print_as(self.connection.json, &artifacts, |artifacts| list(artifacts))
    }
}

impl ArtifactArgs {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let client = self.connection.client()?;
        let artifact = if self.wait {
            wait_deployable(&client, &self.artifact).await?
        } else {
            client.artifact(&self.artifact).await?
        };
        show::print_as(self.connection.json, &artifact, detail)
    }
}

impl PublishArgs {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let client = self.connection.client()?;
        let app = client.app(&self.app).await?;
        let size = self.piece_size.map(|size| size.as_u64()).or(app.piece_size_bytes);
        let piece_size = size.map(piece_size).transpose()?;
        let show_bytes = |what: &str, bytes: u64| tracing::debug!(what, bytes);
        let artifact = publish(&client, &self.file, &self.app, piece_size, show_bytes).await?;
        if !self.deploy {
            return show::print_as(self.connection.json, &artifact, detail);
        }
        if !self.connection.json {
            show::note(&format!(
                "{} is {}; waiting for the regions",
                artifact.name, artifact.artifact
            ));
        }
        wait_deployable(&client, &artifact.name).await?;
        let rollout = deploy::deploy(&client, &self.app, &artifact.name).await?;
        deploy::wait_and_show(&client, rollout, self.connection.json).await
    }
}

/// Reads a piece size.
fn piece_size(bytes: u64) -> anyhow::Result<PieceSize> {
    let wrong =
        || usage(format!("{bytes} bytes is no piece size: a power of two from 256KiB to 16MiB"));
    PieceSize::from_bytes(bytes).ok_or_else(wrong)
}

/// Cuts `file`, uploads what the main bucket lacks, and makes it an artifact of `app`. An upload that was
/// broken off goes on where it was, since the same file is cut into the same encoding. `progress` is told what
/// is being done ("cut", "upload") and how many bytes of it are.
pub(crate) async fn publish(
    client: &Client,
    file: &Path,
    app: &AppName,
    piece_size: Option<PieceSize>,
    progress: impl Fn(&'static str, u64) + Send + Sync + Clone + 'static,
) -> anyhow::Result<Artifact> {
    let meta =
        std::fs::metadata(file).with_context(|| format!("cannot read {}", file.display()))?;
    ensure!(meta.is_file(), "{} is not a file", file.display());
    let dir = tempfile::tempdir().context("cannot make a temporary directory for the parts")?;
    let options = CutOptions { piece_size, ..CutOptions::default() };
    let (source, out, told) = (file.to_path_buf(), dir.path().to_path_buf(), progress.clone());
    let cut = tokio::task::spawn_blocking(move || {
        cut(&source, &out, &options, move |bytes| told("cut", bytes))
    })
    .await??;
    let request = PublishRequest {
        app: app.clone(),
        artifact: cut.index.manifest.artifact,
        encoding: cut.encoding,
    };
    let once = async || {
        upload(client, dir.path(), &cut, &progress).await?;
        Ok(client.publish(&request).await?)
    };
    for _ in 0..UPLOADS_AGAIN_MAX {
        match once().await {
            // Something deleted the same content at this moment, or what lay there is not what its index says.
            Err(error) if is_not_whole(&error) => {}
            other => return other,
        }
    }
    once().await
}

fn is_not_whole(error: &anyhow::Error) -> bool {
    error.downcast_ref::<ClientError>().and_then(ClientError::code) == Some("not_whole")
}

async fn upload(
    client: &Client,
    dir: &Path,
    cut: &Cut,
    progress: &impl Fn(&'static str, u64),
) -> anyhow::Result<()> {
    let (artifact, encoding) = (&cut.index.manifest.artifact, &cut.encoding);
    let put = |name: String, bytes: Bytes| async move {
        let once = || client.upload(artifact, encoding, &name, bytes.clone());
        let backoff =
            ExponentialBuilder::default().with_max_times(UPLOAD_RETRIES_MAX).with_jitter();
        once.retry(backoff).when(ClientError::is_transient).await
    };
    let there = client.upload_state(artifact, encoding).await?;
    if there.whole {
        return Ok(());
    }
    let mut done = 0;
    for (number, part) in (0..).zip(&cut.index.parts) {
        if there.parts.get(&number) != Some(&part.len) {
            let name = part_name(number);
            let path = dir.join(&name);
            // A part is 64 MiB at most, and one is in memory at a time.
            let bytes = tokio::fs::read(&path)
                .await
                .with_context(|| format!("cannot read {}", path.display()))?;
            put(name, bytes.into()).await?;
        }
        done += part.len;
        progress("upload", done);
    }
    Ok(put(INDEX_NAME.into(), cut.index_bytes.clone()).await?)
}

/// Waits until an artifact may be deployed. A coordinator that is away for a while does not end the waiting.
async fn wait_deployable(client: &Client, reference: &str) -> anyhow::Result<Artifact> {
    let mut said = None;
    loop {
        match client.artifact(reference).await {
            Ok(artifact) if artifact.deployable => return Ok(artifact),
            Ok(artifact) => {
                if said != artifact.not_deployable_reason {
                    said = artifact.not_deployable_reason;
                    let why = said.as_deref().unwrap_or("not deployable yet");
                    show::note(&format!("waiting: {why}"));
                }
            }
            Err(error) if error.may_pass() => show::again(&error),
            Err(error) => return Err(error.into()),
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Whether it may be deployed, and in a few words why not.
fn deployable(artifact: &Artifact) -> String {
    match (&artifact.deleted, &artifact.not_deployable_reason) {
        (Some(_), _) => "deleted".into(),
        (None, Some(reason)) => {
            let short: String = reason.chars().take(REASON_MAX_CHARS).collect();
            let more = if short.len() < reason.len() { "..." } else { "" };
            format!("no: {short}{more}")
        }
        (None, None) => "yes".into(),
    }
}

/// In how many of how many regions it is.
fn regions(artifact: &Artifact) -> String {
    if artifact.deleted.is_some() {
        return "-".into();
    }
    let complete = |status| status == ReplicationStatus::Complete;
    let there = artifact.replication.values().filter(|copy| complete(copy.status)).count();
    format!("{} in {there}/{}", artifact.replication_status, artifact.replication.len())
}

fn list(artifacts: &[Artifact]) -> String {
    let mut table =
        show::table(&["NAME", "ARTIFACT", "SIZE", "STORED", "REGIONS", "MADE", "DEPLOYABLE"]);
    for artifact in artifacts {
        table.add_row([
            artifact.name.clone(),
            artifact.artifact.to_string(),
            show::size(artifact.size_bytes),
            show::size(artifact.encoded_bytes),
            regions(artifact),
            show::ago(artifact.created_at_ms),
            deployable(artifact),
        ]);
    }
    show::render(&table, "no artifacts yet: make one with shoal build or shoal publish")
}

fn detail(artifact: &Artifact) -> String {
    let mut table = show::table(&["ARTIFACT", &artifact.name]);
    let mut row = |key: &str, value: String| {
        table.add_row([key, &value]);
    };
    row("app", artifact.app.to_string());
    row("id (b3sum)", artifact.artifact.to_string());
    row("encoding", artifact.encoding.to_string());
    row("size", format!("{} ({} bytes)", show::size(artifact.size_bytes), artifact.size_bytes));
    row("stored", show::size(artifact.encoded_bytes));
    row("pieces", format!("{} of {}", artifact.pieces, show::size(artifact.piece_size_bytes)));
    if let (Some(job), Some(commit)) = (artifact.job, &artifact.commit) {
        row("made by", format!("job {job} from commit {commit}"));
    }
    row("made", show::ago(artifact.created_at_ms));
    for (region, copy) in &artifact.replication {
        let reason = copy.reason.as_deref().map(|reason| format!(": {reason}")).unwrap_or_default();
        let done = show::size(copy.bytes_done);
        let checked = copy.checked_at_ms.map(|at| format!(", inspected {}", show::ago(at)));
        let checked = checked.unwrap_or_default();
        row(&format!("in {region}"), format!("{} ({done}{checked}){reason}", copy.status));
    }
    if let Some(damage) = &artifact.main_damage {
        row("in the main bucket", damage.clone());
    }
    if let Some(deleted) = &artifact.deleted {
        row("deleted", format!("{} by {}: {}", show::ago(deleted.at_ms), deleted.by, deleted.why));
    }
    let reason = artifact.not_deployable_reason.as_deref().unwrap_or("not yet");
    row("deployable", if artifact.deployable { "yes".into() } else { format!("no: {reason}") });
    show::render(&table, "")
}
