//! A real S3 server for tests: `s3s-fs`, on a free port of loopback, with signatures that it checks.
//!
//! [`Server`] keeps objects in a temporary directory and knows two keys, [`WRITER`] and [`READER`], of which one may
//! only read. It counts what it is asked for. A [`Proxy`] in front of it lies and breaks as it is told to
//! ([`Fault`]), and [`Roles`] hands out keys as an instance or a container gets them. All have threads of their own, and
//! end when they are dropped. The program of this crate
//! runs a command with such a server beside it.

mod files;
mod proxy;
mod roles;

use std::{
    convert::Infallible,
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use hyper::{Method, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use s3s::{
    S3Result,
    access::{S3Access, S3AccessContext},
    auth::SimpleAuth,
    s3_error,
    service::{S3Service, S3ServiceBuilder},
};
use s3s_fs::FileSystem;
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};

use files::Files;

pub use proxy::{Fault, Proxy};
pub use roles::{CONTAINER_TOKEN, Roles};

/// An access key and its secret.
pub type Key = (&'static str, &'static str);

/// May do everything.
pub const WRITER: Key = ("shoal-writer", "Secret-of-the-writer-7f3a");

/// May only read and list.
pub const READER: Key = ("shoal-reader", "Secret-of-the-reader-91c4");

/// The bucket that a server has from its start.
pub const BUCKET: &str = "shoal";

/// The region that its signatures are for.
pub const REGION: &str = "us-east-1";

/// How many requests are remembered: more than any test sends.
const SEEN_MAX: usize = 100_000;

/// What [`READER`] may ask for.
const READS: [&str; 5] = ["GetObject", "HeadObject", "HeadBucket", "ListObjects", "ListObjectsV2"];

/// A request that was answered.
#[derive(Debug, Clone)]
pub struct Seen {
    /// GET, PUT, ...
    pub method: String,
    /// The bucket and the object's key, with a slash before each.
    pub path: String,
    /// The query, such as `list-type=2&prefix=...`; empty when there is none.
    pub query: String,
    /// The range that was asked for.
    pub range: Option<String>,
    /// The HTTP status of the answer.
    pub status: u16,
    /// How long its body is, in bytes.
    pub bytes: u64,
}

impl Seen {
    /// Whether it was signed in its URL by somebody else than who sent it.
    #[must_use]
    pub fn is_presigned(&self) -> bool {
        self.query.contains("X-Amz-Signature=")
    }

    /// Whether it read an object of which this is a part of the key.
    #[must_use]
    pub fn reads(&self, key: &str) -> bool {
        self.method == "GET" && self.path.contains(key) && !self.query.contains("list-type")
    }
}

/// A running server.
pub struct Server {
    addr: SocketAddr,
    dir: TempDir,
    seen: Arc<Mutex<Vec<Seen>>>,
    runtime: Option<tokio::runtime::Runtime>,
}

/// Who may do what.
struct Access;

#[async_trait::async_trait]
impl S3Access for Access {
    async fn check(&self, context: &mut S3AccessContext<'_>) -> S3Result<()> {
        let operation = context.s3_op().name();
        match context.credentials() {
            None => Err(s3_error!(AccessDenied, "Anonymous access is not allowed.")),
            Some(who) if who.access_key == READER.0 && !READS.contains(&operation) => {
                Err(s3_error!(AccessDenied, "This key may only read."))
            }
            Some(_) => Ok(()),
        }
    }
}

/// A runtime for the threads of a server or a proxy.
fn runtime(name: &str) -> anyhow::Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    Ok(builder.worker_threads(2).thread_name(name).enable_all().build()?)
}

/// A free port of loopback.
const ANY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// Listens, for a runtime.
fn listen(
    runtime: &tokio::runtime::Runtime,
    addr: SocketAddr,
) -> anyhow::Result<(TcpListener, SocketAddr)> {
    let listener = std::net::TcpListener::bind(addr)?;
    listener.set_nonblocking(true)?;
    let addr = listener.local_addr()?;
    let _inside = runtime.enter();
    Ok((TcpListener::from_std(listener)?, addr))
}

impl Server {
    /// Starts one with an empty bucket [`BUCKET`].
    ///
    /// # Errors
    /// When there is no room for its directory or no free port.
    pub fn start() -> anyhow::Result<Self> {
        Self::start_on(ANY)
    }

    /// The same at this address.
    ///
    /// # Errors
    /// When there is no room for its directory, or nothing can listen there.
    pub fn start_on(addr: SocketAddr) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("shoal-s3-").tempdir()?;
        fs::create_dir(dir.path().join(BUCKET))?;
        let runtime = runtime("s3")?;
        let files = FileSystem::new(dir.path()).map_err(|error| anyhow::anyhow!("{error:?}"))?;
        let mut builder = S3ServiceBuilder::new(Files(files));
        let mut auth = SimpleAuth::new();
        for (key, secret) in [WRITER, READER] {
            auth.register(key.into(), secret.into());
        }
        builder.set_auth(auth);
        builder.set_access(Access);
        let service = builder.build();
        let (listener, addr) = listen(&runtime, addr)?;
        let seen = Arc::<Mutex<Vec<Seen>>>::default();
        runtime.spawn(accept(listener, service, seen.clone()));
        Ok(Self { addr, dir, seen, runtime: Some(runtime) })
    }

    /// Where it listens.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Its address, for `AWS_ENDPOINT_URL`.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// The environment in which SDKs find it, with this key.
    #[must_use]
    pub fn environment(&self, key: Key) -> Vec<(String, String)> {
        environment(&self.endpoint(), key)
    }

    /// The file in which an object of [`BUCKET`] lies.
    #[must_use]
    pub fn file(&self, key: &str) -> PathBuf {
        self.dir.path().join(BUCKET).join(files::on_disk(key))
    }

    /// The directory in which it keeps them, and what it knows about them.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// What it was asked for since it was started, or since this was asked last.
    #[must_use]
    pub fn take_seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// The environment in which SDKs find an S3 server.
#[must_use]
pub fn environment(endpoint: &str, (key, secret): Key) -> Vec<(String, String)> {
    [
        ("AWS_ENDPOINT_URL", endpoint),
        ("AWS_REGION", REGION),
        ("AWS_ACCESS_KEY_ID", key),
        ("AWS_SECRET_ACCESS_KEY", secret),
    ]
    .map(|(name, value)| (name.to_string(), value.to_string()))
    .to_vec()
}

async fn accept(listener: TcpListener, service: S3Service, seen: Arc<Mutex<Vec<Seen>>>) {
    while let Ok((stream, _)) = listener.accept().await {
        tokio::spawn(serve(stream, service.clone(), seen.clone()));
    }
}

/// Answers on one connection until it ends.
async fn serve(stream: TcpStream, service: S3Service, seen: Arc<Mutex<Vec<Seen>>>) {
    let answer = |request: hyper::Request<Incoming>| {
        let (service, seen) = (service.clone(), seen.clone());
        async move {
            let header = |name: &str| Some(request.headers().get(name)?.to_str().ok()?.to_string());
            let mut one = Seen {
                method: request.method().to_string(),
                path: request.uri().path().into(),
                query: request.uri().query().unwrap_or_default().into(),
                range: header("range"),
                status: 500,
                bytes: 0,
            };
            let is_head = request.method() == Method::HEAD;
            let answer = service.call(request.map(s3s::Body::from)).await;
            let answer = answer.unwrap_or_else(|_| {
                let mut failed = hyper::Response::new(s3s::Body::empty());
                *failed.status_mut() = hyper::StatusCode::INTERNAL_SERVER_ERROR;
                failed
            });
            one.status = answer.status().as_u16();
            let len = answer.headers().get("content-length").and_then(|len| len.to_str().ok());
            one.bytes = len.filter(|_| !is_head).and_then(|len| len.parse().ok()).unwrap_or(0);
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            if seen.len() < SEEN_MAX {
                seen.push(one);
            }
            Ok::<_, Infallible>(answer)
        }
    };
    // An error is the end of the connection, and the asker sees it.
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(answer)).await;
}
