//! The region's bucket for the agents: as much of S3 as reading takes, over a directory. Reading the directory itself
//! would cost no line anything.

use std::{
    fs::File,
    net::SocketAddr,
    os::unix::fs::FileExt as _,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use axum::{
    Router,
    extract::{Path as UrlPath, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse as _, Response},
    routing::get,
};

/// Serves `dir` as the bucket of any name, until the process is ended.
pub(crate) fn serve(dir: &Path, listen: SocketAddr) -> anyhow::Result<()> {
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
