//! The region's bucket for agents behind lines: as much of S3 as reading takes, over a directory. Reading the directory
//! itself would cost no line anything.
//!
//! What serves it is the benchmark itself, started again with the flags of [`Serve`].

use std::{
    env,
    fs::File,
    net::SocketAddr,
    os::unix::fs::FileExt as _,
    path::{Component, Path, PathBuf},
    process::Command,
    sync::Arc,
};

use axum::{
    Router,
    extract::{Path as UrlPath, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse as _, Response},
    routing::get,
};

use crate::{cluster::Cluster, net};

/// What agents call it.
pub const URL: &str = "s3://bucket";

/// What makes the benchmark the bucket's server.
#[derive(Debug, clap::Args)]
pub struct Serve {
    /// Serve this directory as a bucket...
    #[arg(long, hide = true, requires = "listen")]
    serve_bucket: Option<PathBuf>,
    /// ...here.
    #[arg(long, hide = true)]
    listen: Option<SocketAddr>,
}

impl Serve {
    /// Does that until the process is ended, if it was started for it.
    #[must_use]
    pub fn run(&self) -> Option<anyhow::Result<()>> {
        Some(serve(self.serve_bucket.as_deref()?, self.listen?))
    }
}

/// Starts the server of a cluster's bucket on a machine of this name and address.
///
/// # Errors
/// When it cannot be started.
pub fn start(cluster: &mut Cluster, machine: &str, address: &str) -> anyhow::Result<()> {
    let mut command = net::on_machine(machine, &env::current_exe()?);
    command.arg("--serve-bucket").arg(cluster.bucket());
    command.args(["--listen", &format!("{address}:80")]);
    cluster.spawn("bucket", &mut command)
}

/// Tells a process where the bucket of [`URL`] is: at this address.
pub fn found_at(command: &mut Command, address: &str) {
    command.env("AWS_ENDPOINT", format!("http://{address}"));
    command.env("AWS_ALLOW_HTTP", "true").env("AWS_SKIP_SIGNATURE", "true");
    command.env("AWS_REGION", "none");
}

/// Serves `dir` as the bucket of any name.
fn serve(dir: &Path, listen: SocketAddr) -> anyhow::Result<()> {
    let router = Router::new()
        .route("/{bucket}/{*key}", get(object))
        .with_state(Arc::new(dir.to_path_buf()));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(listen).await?;
        Ok(axum::serve(listener, router).await?)
    })
}

async fn object(
    State(dir): State<Arc<PathBuf>>,
    UrlPath((_, key)): UrlPath<(String, String)>,
    headers: HeaderMap,
) -> Response {
    let key = PathBuf::from(key);
    if !key.components().all(|part| matches!(part, Component::Normal(_))) {
        return StatusCode::BAD_REQUEST.into_response();
    }
    let asked = headers.get(header::RANGE).and_then(|value| value.to_str().ok());
    match read(&dir.join(key), asked) {
        Ok((status, range, bytes)) => {
            (status, [(header::CONTENT_RANGE, range)], bytes).into_response()
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            StatusCode::NOT_FOUND.into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// Reads what a `Range: bytes=FIRST-LAST` asks for; all of the file when nothing is asked.
fn read(path: &Path, asked: Option<&str>) -> std::io::Result<(StatusCode, String, Vec<u8>)> {
    let file = File::open(path)?;
    let size = file.metadata()?.len();
    let bounds = asked.and_then(|text| text.strip_prefix("bytes=")?.split_once('-'));
    let bounds = bounds
        .and_then(|(first, last)| Some((first.parse::<u64>().ok()?, last.parse::<u64>().ok()?)));
    let (status, first, end) = match bounds {
        Some((first, last)) => {
            (StatusCode::PARTIAL_CONTENT, first, size.min(last.saturating_add(1)))
        }
        None => (StatusCode::OK, 0u64, size),
    };
    let mut bytes = vec![0; end.saturating_sub(first) as usize];
    file.read_exact_at(&mut bytes, first)?;
    Ok((status, format!("bytes {first}-{}/{size}", end.saturating_sub(1)), bytes))
}
