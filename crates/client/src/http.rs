//! The client: how a call is made. The calls themselves are in the files beside, by what they are about.

mod access;
mod artifacts;
mod builds;
mod events;
mod queue;
mod regions;
mod rollouts;
mod trust;
mod work;

use std::{
    sync::{
        PoisonError, RwLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use backon::{ExponentialBuilder, Retryable};
use reqwest::{
    Method, Url,
    header::{self, HeaderValue},
};
use serde::{Serialize, de::DeserializeOwned};
use shoal_pki::{Credentials, Identity, Trust};

use crate::{
    ClientError, VERSION_HEADER,
    types::{ErrorBody, ErrorDetail, Page},
};

pub use events::{EventQuery, EventStream, Streamed};

/// How long a connection may take to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a call may take: the longest long poll (5 s) and a slow database behind it.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// How often a call that is safe to repeat is repeated before its error is passed on.
const RETRIES_MAX: usize = 4;

/// How many rows of a list are asked for at once: the most that are given.
const PAGE_ROWS: usize = 1_000;

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

type Result<T> = std::result::Result<T, ClientError>;

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

/// Whether there is nothing beside scheme, host and port.
fn is_bare(url: &Url) -> bool {
    let has_user = !url.username().is_empty() || url.password().is_some();
    url.path() == "/" && url.query().is_none() && url.fragment().is_none() && !has_user
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

    fn over(
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
                Ok(url) if url.scheme() == "https" && url.has_host() && is_bare(&url) => Ok(url),
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

    async fn send(
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
            ClientError::unreached(base.as_str(), source)
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

    async fn read<T: DeserializeOwned>(&self, response: reqwest::Response) -> Result<T> {
        let other = other_release(&response);
        let bytes = response.bytes().await;
        let bytes = bytes.map_err(|source| ClientError::unreached(self.url(), source))?;
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

    /// A call that is safe to repeat, until it is answered or the retries are used up. A coordinator that does not believe
    /// this end says more than one that is away, whichever was asked last.
    async fn repeated<T, F: Future<Output = Result<T>>>(
        &self,
        once: impl FnMut() -> F,
    ) -> Result<T> {
        let mut distrusted = None;
        let answer = once
            .retry(Self::backoff())
            // Who distrusts does so the next time, too; another one may not.
            .when(|error| error.is_transient() && (error.may_pass() || self.coordinators.len() > 1))
            .notify(|error, _| distrusted = error.distrust().or(distrusted.take()))
            .await;
        match (answer, distrusted) {
            (Err(ClientError::Unreachable { .. }), Some(distrust)) => Err(distrust),
            (answer, _) => answer,
        }
    }

    async fn get<T: DeserializeOwned>(&self, path: &str, query: &[(&str, String)]) -> Result<T> {
        self.repeated(|| async {
            let response = self.send(Method::GET, path, |request| request.query(query)).await?;
            self.read(response).await
        })
        .await
    }

    /// The first `most` rows of a list, or all of them.
    async fn list<T: DeserializeOwned>(
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
    async fn post<B: Serialize, T: DeserializeOwned>(&self, path: &str, body: &B) -> Result<T> {
        let key = format!("{:032x}", rand::random::<u128>());
        self.repeated(|| async {
            let build = |request: reqwest::RequestBuilder| {
                request.header("Idempotency-Key", key.as_str()).json(body)
            };
            let response = self.send(Method::POST, path, build).await?;
            self.read(response).await
        })
        .await
    }

    /// A process's call, which the server recognises when it comes twice.
    async fn post_again<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T> {
        self.repeated(|| self.post_once(path, body)).await
    }

    async fn post_once<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T> {
        let response = self.send(Method::POST, path, |request| request.json(body)).await?;
        self.read(response).await
    }
}
