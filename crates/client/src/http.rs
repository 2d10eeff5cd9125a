//! The client: one method a call.

mod events;

use std::{
    sync::{
        PoisonError, RwLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use backon::{ExponentialBuilder, Retryable};
use bytes::Bytes;
use reqwest::{
    Body, Method, StatusCode, Url,
    header::{self, HeaderValue},
};
use serde::{Serialize, de::DeserializeOwned};
use shoal_pki::{Credentials, Identity, Trust};
use shoal_proto::{AppName, ArtifactId, EncodingId, MachineName, RegionName};

use crate::{
    VERSION_HEADER,
    types::{
        App, AppStatus, Artifact, ArtifactRef, BuildRequest, ClaimRequest, ClaimedJob,
        DeployRequest, Done, ErrorBody, ErrorDetail, FinishRequest, GcReport, GcRequest,
        GoalsQuery, GoalsReply, HaltRequest, HeartbeatReply, Job, LeaseRef, Machine, Page, Pin,
        PinRequest, PublishRequest, QueueStatus, Region, RegionReports, ReplicationStatusPage,
        RollbackRequest, Rollout, UploadState, WatchRequest, Worker,
    },
};

pub use events::{EventQuery, EventStream, Streamed};

/// How long a connection may take to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a call may take: the longest long poll (5 s) and a slow database behind it.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// How long the upload of one part object (64 MiB at most) may take: 1 Mbit/s is enough.
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(600);

/// How often a call that is safe to repeat is repeated before its error is passed on.
const RETRIES_MAX: usize = 4;

/// How many rows of a list are asked for at once: the most that are given.
const PAGE_ROWS: usize = 1_000;

/// Why there was no answer: what lies at the bottom of it, and what to look at.
fn unreachable(url: &str, source: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = source;
    while let Some(below) = cause.source() {
        cause = below;
    }
    let cause = cause.to_string();
    let look = if cause.contains("certificate") || cause.contains("received fatal alert") {
        "is this a member of that cluster, and is the address the coordinator's?"
    } else {
        "is it running, and is the address right?"
    };
    format!("no answer from the coordinator at {url}: {cause}; {look}")
}

/// What is wrong with an answer that comes from another release than this one; nothing where it is the same.
fn other_release(response: &reqwest::Response) -> Option<String> {
    let theirs = response.headers().get(VERSION_HEADER)?.to_str().ok()?;
    let ours = env!("CARGO_PKG_VERSION");
    (theirs != ours).then(|| {
        format!("the coordinator is shoal {theirs} and this is {ours}: use one of the same release")
    })
}

/// Whether a refusal may be because the two ends are of different releases: a path or a field that is not known there.
fn is_unknown_there(error: &ErrorDetail) -> bool {
    let unknown = ["no such path", "wrong body: unknown field", "wrong body: missing field"];
    error.code == "wrong_method" || unknown.iter().any(|start| error.message.starts_with(start))
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The coordinator refused it; the message says what to do.
    #[error("{message}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// The error's fixed word.
        code: String,
        /// One line for people.
        message: String,
    },
    /// No coordinator answered.
    #[error("{}", unreachable(url, source))]
    Unreachable {
        /// The last one tried.
        url: String,
        /// What happened.
        source: reqwest::Error,
    },
    /// An answer that is none of the API.
    #[error("{url} did not answer as a coordinator does: {text}")]
    Unexpected {
        /// The address.
        url: String,
        /// What came instead.
        text: String,
    },
    /// The addresses or the identity cannot be used.
    #[error("{0}")]
    Config(String),
}

impl ClientError {
    /// Whether trying again later may help.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            Self::Refused { status, code, .. } => {
                *status >= 500 || *status == 429 || code == "under_way"
            }
            Self::Unexpected { .. } | Self::Config(_) => false,
        }
    }

    /// The fixed word of a refusal.
    #[must_use]
    pub fn code(&self) -> Option<&str> {
        match self {
            Self::Refused { code, .. } => Some(code),
            _ => None,
        }
    }
}

pub(crate) type Result<T> = std::result::Result<T, ClientError>;

fn http(credentials: &Credentials) -> Result<reqwest::Client> {
    let config = |text: String| ClientError::Config(text);
    let tls = shoal_pki::client_config(credentials, &[b"http/1.1"])
        .map_err(|error| config(error.to_string()))?;
    http_with(tls)
}

fn http_with(tls: rustls::ClientConfig) -> Result<reqwest::Client> {
    let config = |text: String| ClientError::Config(text);
    reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(CALL_TIMEOUT)
        .no_proxy()
        .build()
        .map_err(|error| config(error.to_string()))
}

/// A client of one or several coordinators.
pub struct Client {
    http: RwLock<reqwest::Client>,
    /// What it shows; none for a machine that has no certificate yet, and for who shows a token.
    credentials: Option<Credentials>,
    /// The token that is shown with every call.
    authorization: Option<HeaderValue>,
    coordinators: Vec<Url>,
    current: AtomicUsize,
}

impl Client {
    /// Makes a client that shows `identity` and believes `trust`.
    ///
    /// # Errors
    /// [`ClientError::Config`] when there is no address, or one is not an `https://` URL.
    pub fn new(coordinators: &[String], identity: &Identity, trust: &Trust) -> Result<Self> {
        Self::of(coordinators, &Credentials::new(identity.clone(), trust.clone()))
    }

    /// Makes a client that goes by what `credentials` are at each handshake.
    ///
    /// # Errors
    /// As for [`Self::new`].
    pub fn of(coordinators: &[String], credentials: &Credentials) -> Result<Self> {
        let client = Self::with(coordinators, http(credentials)?, None)?;
        Ok(Self { credentials: Some(credentials.clone()), ..client })
    }

    /// Makes a client that has no certificate to show, for those who want to join. It believes coordinators by `trust`;
    /// without one whoever answers.
    ///
    /// # Errors
    /// As for [`Self::new`].
    pub fn stranger(coordinators: &[String], trust: Option<Trust>) -> Result<Self> {
        let tls = shoal_pki::stranger_config(trust, &[b"http/1.1"])
            .map_err(|error| ClientError::Config(error.to_string()))?;
        Self::with(coordinators, http_with(tls)?, None)
    }

    pub(crate) fn over(
        coordinators: &[String],
        tls: rustls::ClientConfig,
        token: Option<&str>,
    ) -> Result<Self> {
        Self::with(coordinators, http_with(tls)?, token)
    }

    fn with(coordinators: &[String], http: reqwest::Client, token: Option<&str>) -> Result<Self> {
        let config = |text: String| ClientError::Config(text);
        let coordinators = coordinators
            .iter()
            .map(|text| match Url::parse(text) {
                Ok(url) if url.scheme() == "https" && url.has_host() => Ok(url),
                _ => Err(config(format!(
                    "'{text}' is not a coordinator's address: write https://HOST:PORT"
                ))),
            })
            .collect::<Result<Vec<_>>>()?;
        if coordinators.is_empty() {
            return Err(config("no coordinator: give --coordinator https://HOST:PORT".into()));
        }
        let authorization = token.map(|token| {
            let value = HeaderValue::from_str(&format!("Bearer {token}"));
            let mut value =
                value.map_err(|_| config("the token is not one line of text".into()))?;
            value.set_sensitive(true);
            Ok::<_, ClientError>(value)
        });
        let authorization = authorization.transpose()?;
        let (http, current) = (RwLock::new(http), AtomicUsize::new(0));
        Ok(Self { http, credentials: None, authorization, coordinators, current })
    }

    /// Makes new connections for the calls from now on: the certificates at both ends of those that are there were looked
    /// at before trust changed.
    pub fn reconnect(&self) {
        if let Some(Ok(http)) = self.credentials.as_ref().map(http) {
            *self.http.write().unwrap_or_else(PoisonError::into_inner) = http;
        }
    }

    /// The address of the coordinator that calls go to at present.
    #[must_use]
    pub fn url(&self) -> &str {
        self.base().as_str()
    }

    fn http(&self) -> reqwest::Client {
        self.http.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn urls(&self) -> Vec<String> {
        self.coordinators.iter().map(ToString::to_string).collect()
    }

    fn base(&self) -> &Url {
        &self.coordinators[self.current.load(Ordering::Relaxed) % self.coordinators.len()]
    }

    pub(crate) async fn send(
        &self,
        method: Method,
        path: &str,
        build: impl Fn(reqwest::RequestBuilder) -> reqwest::RequestBuilder,
    ) -> Result<reqwest::Response> {
        let base = self.base();
        let wrong = |text: String| ClientError::Unexpected { url: base.to_string(), text };
        let url = base.join(path).map_err(|error| wrong(error.to_string()))?;
        let mut request = self.http().request(method, url);
        if let Some(authorization) = &self.authorization {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        let response = build(request).send().await.map_err(|source| {
            self.current.fetch_add(1, Ordering::Relaxed);
            ClientError::Unreachable { url: base.to_string(), source: source.without_url() }
        })?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let other = other_release(&response);
        let text = response.text().await.unwrap_or_default();
        match serde_json::from_str::<ErrorBody>(&text) {
            Ok(ErrorBody { error }) => {
                let other = other.filter(|_| is_unknown_there(&error));
                let message = match other {
                    Some(other) => format!("{}; {other}", error.message),
                    None => error.message,
                };
                Err(ClientError::Refused { status: status.as_u16(), code: error.code, message })
            }
            Err(_) => {
                Err(wrong(format!("{status} {}", text.chars().take(200).collect::<String>())))
            }
        }
    }

    pub(crate) async fn read<T: DeserializeOwned>(&self, response: reqwest::Response) -> Result<T> {
        let other = other_release(&response);
        let bytes = response.bytes().await.map_err(|source| ClientError::Unreachable {
            url: self.url().into(),
            source: source.without_url(),
        })?;
        serde_json::from_slice(&bytes).map_err(|error| ClientError::Unexpected {
            url: self.url().into(),
            text: match other {
                Some(other) => format!("{error}; {other}"),
                None => error.to_string(),
            },
        })
    }

    fn backoff() -> ExponentialBuilder {
        ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(100))
            .with_max_delay(Duration::from_secs(2))
            .with_max_times(RETRIES_MAX)
            .with_jitter()
    }

    pub(crate) async fn get<T: DeserializeOwned>(
        &self,
        path: &str,
        query: &[(&str, String)],
    ) -> Result<T> {
        let once = || async {
            let response = self.send(Method::GET, path, |request| request.query(query)).await?;
            self.read(response).await
        };
        once.retry(Self::backoff()).when(ClientError::is_transient).await
    }

    /// The first `most` rows of a list, or all of them.
    pub(crate) async fn list<T: DeserializeOwned>(
        &self,
        path: &str,
        query: Vec<(&'static str, String)>,
        most: Option<u32>,
    ) -> Result<Vec<T>> {
        let mut items = Vec::new();
        let mut cursor: Option<String> = None;
        loop {
            let left = most.map_or(usize::MAX, |most| most as usize - items.len());
            if left == 0 {
                return Ok(items);
            }
            let mut query = query.clone();
            query.push(("limit", left.min(PAGE_ROWS).to_string()));
            query.extend(cursor.take().map(|cursor| ("cursor", cursor)));
            let page: Page<T> = self.get(path, &query).await?;
            items.extend(page.items.into_iter().take(left));
            match page.next_cursor {
                Some(next) => cursor = Some(next),
                None => return Ok(items),
            }
        }
    }

    /// A call of a person or a script: repeated with the key that it has, it is done once.
    pub(crate) async fn post<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T> {
        let key = format!("{:032x}", rand::random::<u128>());
        let once = || async {
            let build = |request: reqwest::RequestBuilder| {
                request.header("Idempotency-Key", key.as_str()).json(body)
            };
            let response = self.send(Method::POST, path, build).await?;
            self.read(response).await
        };
        once.retry(Self::backoff()).when(ClientError::is_transient).await
    }

    /// A process's call, which the server recognises when it comes twice.
    pub(crate) async fn post_again<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T> {
        let once = || self.post_once(path, body);
        once.retry(Self::backoff()).when(ClientError::is_transient).await
    }

    pub(crate) async fn post_once<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T> {
        let response = self.send(Method::POST, path, |request| request.json(body)).await?;
        self.read(response).await
    }

    // The operator's calls.

    /// Registers an app, or changes it.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn set_app(&self, app: &App) -> Result<App> {
        let path = format!("v1/apps/{}", app.name);
        let once = || async {
            let response = self.send(Method::PUT, &path, |request| request.json(app)).await?;
            self.read(response).await
        };
        once.retry(Self::backoff()).when(ClientError::is_transient).await
    }

    /// All apps, by name.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn apps(&self) -> Result<Vec<App>> {
        self.list("v1/apps", Vec::new(), None).await
    }

    /// One app.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn app(&self, app: &AppName) -> Result<App> {
        self.get(&format!("v1/apps/{app}"), &[]).await
    }

    /// Asks for a build, or joins the job that waits or runs for the same commit.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn build(&self, request: &BuildRequest) -> Result<Job> {
        self.post("v1/jobs", request).await
    }

    /// Jobs, newest first; of one app or of all.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn jobs(&self, app: Option<&AppName>, limit: u32) -> Result<Vec<Job>> {
        let query = app.map(|app| ("app", app.to_string())).into_iter().collect();
        self.list("v1/jobs", query, Some(limit)).await
    }

    /// One job, with its attempts.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn job(&self, id: i64) -> Result<Job> {
        self.get(&format!("v1/jobs/{id}"), &[]).await
    }

    /// Cancels a job that has not ended.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn cancel_job(&self, id: i64) -> Result<Job> {
        self.post(&format!("v1/jobs/{id}/cancel"), &()).await
    }

    /// A job's log from byte `offset` on: at most 1 MiB of it.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn job_log(&self, id: i64, offset: u64) -> Result<Bytes> {
        let query = [("offset", offset.to_string())];
        let path = format!("v1/jobs/{id}/log");
        let response = self.send(Method::GET, &path, |request| request.query(&query)).await?;
        response.bytes().await.map_err(|source| ClientError::Unreachable {
            url: self.url().into(),
            source: source.without_url(),
        })
    }

    /// Artifacts, newest first; of one app or of all.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn artifacts(&self, app: Option<&AppName>, limit: u32) -> Result<Vec<Artifact>> {
        let query = app.map(|app| ("app", app.to_string())).into_iter().collect();
        self.list("v1/artifacts", query, Some(limit)).await
    }

    /// One artifact, by name or id.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn artifact(&self, reference: &str) -> Result<Artifact> {
        self.get("v1/artifact", &[("ref", reference.into())]).await
    }

    /// What is stored of an encoding in the main bucket.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn upload_state(
        &self,
        artifact: &ArtifactId,
        encoding: &EncodingId,
    ) -> Result<UploadState> {
        self.get(&format!("v1/uploads/{artifact}/{encoding}"), &[]).await
    }

    /// Stores an object of an encoding in the main bucket: `part-00000`, …, and last `index`.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn upload(
        &self,
        artifact: &ArtifactId,
        encoding: &EncodingId,
        object: &str,
        body: impl Into<Body>,
    ) -> Result<()> {
        let path = format!("v1/uploads/{artifact}/{encoding}/{object}");
        let body = std::sync::Mutex::new(Some(body.into()));
        let build = |request: reqwest::RequestBuilder| {
            let body = body.lock().ok().and_then(|mut body| body.take()).unwrap_or_default();
            request.body(body).timeout(UPLOAD_TIMEOUT)
        };
        self.send(Method::PUT, &path, build).await.map(drop)
    }

    /// Makes an uploaded encoding an artifact of an app.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn publish(&self, request: &PublishRequest) -> Result<Artifact> {
        self.post("v1/publish", request).await
    }

    /// How the copies are: of one artifact, or of all that are not whole in some bucket.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn replication(
        &self,
        reference: Option<&str>,
        limit: u32,
    ) -> Result<ReplicationStatusPage> {
        let mut query = vec![("limit", limit.to_string())];
        query.extend(reference.map(|reference| ("ref", reference.to_string())));
        self.get("v1/replication", &query).await
    }

    /// Has an artifact's copies inspected as soon as may be.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn inspect(&self, reference: &str) -> Result<()> {
        let request = ArtifactRef { artifact: reference.into() };
        self.post::<_, Done>("v1/inspections", &request).await.map(drop)
    }

    /// All pins, newest first.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn pins(&self) -> Result<Vec<Pin>> {
        self.list("v1/pins", Vec::new(), None).await
    }

    /// Keeps an artifact whatever comes.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn pin(&self, request: &PinRequest) -> Result<Pin> {
        self.post("v1/pins", request).await
    }

    /// Takes an artifact's pin away.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn unpin(&self, reference: &str) -> Result<()> {
        let request = ArtifactRef { artifact: reference.into() };
        self.post::<_, Done>("v1/unpin", &request).await.map(drop)
    }

    /// Deletes artifacts that nothing needs, or says which would go.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn gc(&self, request: &GcRequest) -> Result<GcReport> {
        self.post("v1/gc", request).await
    }

    /// Sets an app's goal.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn deploy(&self, request: &DeployRequest) -> Result<Rollout> {
        self.post("v1/deployments", request).await
    }

    /// Sets an app's goal back.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn rollback(&self, request: &RollbackRequest) -> Result<Rollout> {
        self.post("v1/rollbacks", request).await
    }

    /// Each app's present rollout.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn status(&self, app: Option<&AppName>) -> Result<Vec<AppStatus>> {
        let query = app.map(|app| ("app", app.to_string())).into_iter().collect();
        self.list("v1/status", query, None).await
    }

    /// One rollout.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn rollout(&self, id: i64) -> Result<Rollout> {
        self.get(&format!("v1/rollouts/{id}"), &[]).await
    }

    /// Cancels a rollout that has not ended: its goal stays, its waves open no further.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn cancel_rollout(&self, id: i64) -> Result<Rollout> {
        self.post(&format!("v1/rollouts/{id}/cancel"), &()).await
    }

    /// Pauses a rollout, so that no further wave opens, or lets it go on.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn pause_rollout(&self, id: i64, pause: bool) -> Result<Rollout> {
        let verb = if pause { "pause" } else { "resume" };
        self.post(&format!("v1/rollouts/{id}/{verb}"), &()).await
    }

    /// Machines and what they run.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn machines(
        &self,
        region: Option<&RegionName>,
        app: Option<&AppName>,
    ) -> Result<Vec<Machine>> {
        let mut query = Vec::new();
        query.extend(region.map(|region| ("region", region.to_string())));
        query.extend(app.map(|app| ("app", app.to_string())));
        self.list("v1/machines", query, None).await
    }

    /// All regions.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn regions(&self) -> Result<Vec<Region>> {
        self.list("v1/regions", Vec::new(), None).await
    }

    /// Takes a region out of service.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn drain_region(&self, region: &RegionName, request: &HaltRequest) -> Result<Region> {
        self.post(&format!("v1/regions/{region}/drain"), request).await
    }

    /// Puts a region back into service.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn undrain_region(&self, region: &RegionName) -> Result<Region> {
        self.post(&format!("v1/regions/{region}/undrain"), &()).await
    }

    /// Whether the queue is paused, and how much waits.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn queue(&self) -> Result<QueueStatus> {
        self.get("v1/queue", &[]).await
    }

    /// Lets no worker take a job until [`Client::resume_queue`].
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn pause_queue(&self, request: &HaltRequest) -> Result<QueueStatus> {
        self.post("v1/queue/pause", request).await
    }

    /// Lets workers take jobs again.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn resume_queue(&self) -> Result<QueueStatus> {
        self.post("v1/queue/resume", &()).await
    }

    /// All workers, by name.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn workers(&self) -> Result<Vec<Worker>> {
        self.list("v1/workers", Vec::new(), None).await
    }

    /// Lets a worker take no more jobs; it finishes what it has.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn drain_worker(
        &self,
        worker: &MachineName,
        request: &HaltRequest,
    ) -> Result<Worker> {
        self.post(&format!("v1/workers/{worker}/drain"), request).await
    }

    /// Lets a worker take jobs again.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn undrain_worker(&self, worker: &MachineName) -> Result<Worker> {
        self.post(&format!("v1/workers/{worker}/undrain"), &()).await
    }

    // A worker's calls.

    /// Asks for a job; none when there is none within the wait.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn claim(&self, request: &ClaimRequest) -> Result<Option<ClaimedJob>> {
        let response =
            self.send(Method::POST, "v1/worker/claim", |call| call.json(request)).await?;
        if response.status() == StatusCode::NO_CONTENT {
            return Ok(None);
        }
        self.read(response).await.map(Some)
    }

    /// Says that a worker still builds. Refused with `lease_lost` when the job was given to another.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn heartbeat(&self, job: i64, lease: &LeaseRef) -> Result<HeartbeatReply> {
        self.post_again(&format!("v1/worker/jobs/{job}/heartbeat"), lease).await
    }

    /// Waits until a job that is worked on is to be cancelled, or the time is over. Refused with `lease_lost` when the
    /// job was given to another.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn watch_job(&self, job: i64, request: &WatchRequest) -> Result<HeartbeatReply> {
        self.post_once(&format!("v1/worker/jobs/{job}/watch"), request).await
    }

    /// Adds to a job's log at byte `offset`; what is there already is not added twice.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn append_log(
        &self,
        job: i64,
        lease: &LeaseRef,
        offset: u64,
        bytes: Bytes,
    ) -> Result<()> {
        let query = [
            ("attempt", lease.attempt.to_string()),
            ("lease", lease.lease.clone()),
            ("offset", offset.to_string()),
        ];
        let path = format!("v1/worker/jobs/{job}/log");
        let once = || async {
            let build = |call: reqwest::RequestBuilder| call.query(&query).body(bytes.clone());
            self.send(Method::POST, &path, build).await.map(drop)
        };
        once.retry(Self::backoff()).when(ClientError::is_transient).await
    }

    /// Ends an attempt. The same end told twice is answered alike.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn finish(&self, job: i64, request: &FinishRequest) -> Result<Job> {
        self.post_again(&format!("v1/worker/jobs/{job}/finish"), request).await
    }

    // A region process's calls.

    /// Goals that changed after a cursor; waits for a change.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn goals(&self, query: &GoalsQuery) -> Result<GoalsReply> {
        let response = self.send(Method::GET, "v1/region/goals", |call| call.query(query)).await?;
        self.read(response).await
    }

    /// Hands in a batch of what machines said; all of it is kept when this returns.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn report(&self, reports: &RegionReports) -> Result<()> {
        self.post_again::<_, Done>("v1/region/reports", reports).await.map(drop)
    }
}
