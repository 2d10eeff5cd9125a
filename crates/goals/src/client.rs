//! Calls of etcd's JSON gateway: one endpoint after the other until one answers, logged in where that is asked for.

use std::{
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::BytesMut;
use reqwest::{StatusCode, header::AUTHORIZATION};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    GoalsError, Result,
    api::{AuthRequest, AuthResponse, Refusal},
    url::Address,
};

/// How long a connection may take to come about: a host that is gone does not hold up the next endpoint for long.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a call may take: etcd itself gives up after 7 s without a leader.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// After how long the kernel asks whether a silent peer is still there.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// The longest answer, in bytes: a page of goals is a quarter of that, and etcd's own messages are 2 MiB at most.
pub(crate) const ANSWER_MAX_BYTES: usize = 8 << 20;

/// The longest text of an error that is repeated, in bytes.
const TEXT_MAX: usize = 200;

/// gRPC's codes for: this member cannot serve now; who are you; you asked wrongly.
const UNAVAILABLE: u32 = 14;
const UNAUTHENTICATED: u32 = 16;
const INVALID_ARGUMENT: u32 = 3;

/// A user and what proves it.
struct Login {
    user: String,
    password: String,
    /// Of the last login; etcd forgets it with its next restart.
    token: Mutex<Option<String>>,
}

/// A client of one etcd.
pub(crate) struct Client {
    http: reqwest::Client,
    endpoints: Vec<String>,
    current: AtomicUsize,
    login: Option<Login>,
}

/// Why one endpoint's answer does not do.
enum Failure {
    /// Another endpoint may know better.
    Elsewhere(String),
    /// The login is none (any more).
    Login(String),
    Final(GoalsError),
}

fn wrong(what: impl Into<String>) -> GoalsError {
    GoalsError::Address(what.into())
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let name = path.display();
    let read = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<std::result::Result<Vec<_>, _>>);
    match read {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(wrong(format!("there is no certificate in PEM in {name}"))),
        Err(error) => Err(wrong(format!("cannot read the certificate {name}: {error}"))),
    }
}

fn tls(address: &Address) -> Result<Option<ClientConfig>> {
    let Some(ca) = address.ca.as_deref().filter(|_| address.tls) else { return Ok(None) };
    let mut roots = RootCertStore::empty();
    for certificate in certificates(ca)? {
        let added = roots.add(certificate);
        added.map_err(|error| wrong(format!("{} is no CA: {error}", ca.display())))?;
    }
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    let config = ClientConfig::builder_with_provider(provider.into())
        .with_safe_default_protocol_versions()
        .map_err(|error| wrong(error.to_string()))?
        .with_root_certificates(roots);
    let (Some(cert), Some(key)) = (&address.cert, &address.key) else {
        return Ok(Some(config.with_no_client_auth()));
    };
    let name = key.display();
    let private = PrivateKeyDer::from_pem_file(key)
        .map_err(|error| wrong(format!("cannot read the key {name}: {error}")))?;
    let config = config
        .with_client_auth_cert(certificates(cert)?, private)
        .map_err(|error| wrong(format!("{name} does not fit its certificate: {error}")))?;
    Ok(Some(config))
}

fn login(address: &Address) -> Result<Option<Login>> {
    let Some(user) = address.user.clone() else { return Ok(None) };
    let password = match (&address.password, &address.password_file) {
        (Some(password), _) => password.clone(),
        (None, Some(file)) => std::fs::read_to_string(file)
            .map(|text| text.trim_end_matches(['\r', '\n']).to_string())
            .map_err(|error| {
                wrong(format!("cannot read etcd's password in {}: {error}", file.display()))
            })?,
        (None, None) => String::new(),
    };
    Ok(Some(Login { user, password, token: Mutex::default() }))
}

fn cut(text: &str) -> String {
    text.chars().take(TEXT_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// A transport error as one line, causes included: reqwest's own text leaves out why.
fn reason(error: reqwest::Error) -> String {
    let mut text = error.to_string();
    let error = error.without_url();
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(&error);
    while let Some(error) = cause {
        text = error.to_string();
        cause = error.source();
    }
    cut(&text)
}

impl Client {
    pub(crate) fn new(address: &Address) -> Result<Self> {
        let mut builder = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_keepalive(KEEPALIVE)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy();
        // Without TLS none is asked of the system either.
        builder = match tls(address)? {
            Some(config) => builder.tls_backend_preconfigured(config),
            None => builder.tls_backend_preconfigured(no_tls()?),
        };
        let http = builder.build().map_err(|error| wrong(error.to_string()))?;
        let (endpoints, login) = (address.endpoints.clone(), login(address)?);
        Ok(Self { http, endpoints, current: AtomicUsize::new(0), login })
    }

    /// Calls and reads the whole answer, from whichever endpoint gives one.
    pub(crate) async fn call<B: Serialize + Sync, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T> {
        let mut round = Round::new(self);
        loop {
            let failure = match self.send(&round.endpoint, path, body, Some(CALL_TIMEOUT)).await {
                Ok(response) => match read(&round.endpoint, response).await {
                    Ok(answer) => return Ok(answer),
                    Err(failure) => failure,
                },
                Err(failure) => failure,
            };
            round.go_on(self, failure)?;
        }
    }

    /// Calls; the answer is the beginning of a stream.
    pub(crate) async fn open<B: Serialize + Sync>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<reqwest::Response> {
        let mut round = Round::new(self);
        loop {
            let sent = self.send(&round.endpoint, path, body, None);
            let failure = match tokio::time::timeout(CALL_TIMEOUT, sent).await {
                Ok(Ok(response)) => return Ok(response),
                Ok(Err(failure)) => failure,
                Err(_) => Failure::Elsewhere("no answer in time".into()),
            };
            round.go_on(self, failure)?;
        }
    }

    /// The endpoint that the next call goes to first.
    pub(crate) fn endpoint(&self) -> &str {
        &self.endpoints[self.current.load(Ordering::Relaxed) % self.endpoints.len()]
    }

    async fn send<B: Serialize + Sync>(
        &self,
        endpoint: &str,
        path: &str,
        body: &B,
        timeout: Option<Duration>,
    ) -> std::result::Result<reqwest::Response, Failure> {
        let mut request = self.http.post(format!("{endpoint}/v3/{path}")).json(body);
        if let Some(token) = self.token(endpoint).await? {
            request = request.header(AUTHORIZATION, token);
        }
        // A member that has lost its leader says so, instead of holding a stream that never tells anything.
        request = request.header("Grpc-Metadata-hasleader", "true");
        if let Some(timeout) = timeout {
            request = request.timeout(timeout);
        }
        let response = request.send().await.map_err(|error| Failure::Elsewhere(reason(error)))?;
        if response.status().is_success() {
            return Ok(response);
        }
        Err(refusal(endpoint, response).await)
    }

    fn set_token(&self, token: Option<String>) {
        if let Some(login) = &self.login {
            *login.token.lock().unwrap_or_else(PoisonError::into_inner) = token;
        }
    }

    /// The login's token, with a login first where there is none.
    async fn token(&self, endpoint: &str) -> std::result::Result<Option<String>, Failure> {
        let Some(login) = &self.login else { return Ok(None) };
        let known = login.token.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if known.is_some() {
            return Ok(known);
        }
        let body = AuthRequest { name: &login.user, password: &login.password };
        let request = self.http.post(format!("{endpoint}/v3/auth/authenticate")).json(&body);
        let sent = request.timeout(CALL_TIMEOUT).send().await;
        let response = sent.map_err(|error| Failure::Elsewhere(reason(error)))?;
        if !response.status().is_success() {
            return Err(match refusal(endpoint, response).await {
                Failure::Login(message) => Failure::Final(GoalsError::Refused { message }),
                other => other,
            });
        }
        let answer: AuthResponse = read(endpoint, response).await?;
        self.set_token(Some(answer.token.clone()));
        Ok(Some(answer.token))
    }
}

/// One call's way through the endpoints: each once, and one of them once more with a fresh login.
struct Round {
    at: usize,
    endpoint: String,
    left: usize,
    fresh_login: bool,
}

impl Round {
    fn new(client: &Client) -> Self {
        let at = client.current.load(Ordering::Relaxed) % client.endpoints.len();
        let endpoint = client.endpoints[at].clone();
        Self { at, endpoint, left: client.endpoints.len(), fresh_login: client.login.is_some() }
    }

    /// Goes on to the next try; an error when none is left.
    fn go_on(&mut self, client: &Client, failure: Failure) -> Result<()> {
        let reason = match failure {
            Failure::Login(_) if self.fresh_login => {
                self.fresh_login = false;
                client.set_token(None);
                return Ok(());
            }
            Failure::Login(message) => return Err(GoalsError::Refused { message }),
            Failure::Final(error) => return Err(error),
            Failure::Elsewhere(reason) => reason,
        };
        let next = (self.at + 1) % client.endpoints.len();
        // Unless another call has moved on already.
        let (now, relaxed) = (self.at, Ordering::Relaxed);
        let _ = client.current.compare_exchange(now, next, relaxed, relaxed);
        self.at = next;
        self.left -= 1;
        let failed = std::mem::replace(&mut self.endpoint, client.endpoints[next].clone());
        if self.left == 0 {
            return Err(GoalsError::Unreachable { endpoint: failed, reason });
        }
        Ok(())
    }
}

/// Believes nobody: for connections that have no TLS.
fn no_tls() -> Result<ClientConfig> {
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    Ok(ClientConfig::builder_with_provider(provider.into())
        .with_safe_default_protocol_versions()
        .map_err(|error| wrong(error.to_string()))?
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth())
}

async fn body(mut response: reqwest::Response) -> std::result::Result<BytesMut, Failure> {
    let mut bytes = BytesMut::new();
    let failed = |error| Failure::Elsewhere(reason(error));
    while let Some(chunk) = response.chunk().await.map_err(failed)? {
        if bytes.len() + chunk.len() > ANSWER_MAX_BYTES {
            return Err(Failure::Elsewhere(format!("an answer of over {ANSWER_MAX_BYTES} bytes")));
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

async fn read<T: DeserializeOwned>(
    endpoint: &str,
    response: reqwest::Response,
) -> std::result::Result<T, Failure> {
    let bytes = body(response).await?;
    serde_json::from_slice(&bytes).map_err(|error| {
        Failure::Final(GoalsError::Unexpected {
            endpoint: endpoint.into(),
            text: cut(&error.to_string()),
        })
    })
}

/// What an answer that is no success means.
async fn refusal(endpoint: &str, response: reqwest::Response) -> Failure {
    let status = response.status();
    let bytes = match body(response).await {
        Ok(bytes) => bytes,
        Err(failure) => return failure,
    };
    let Ok(refusal) = serde_json::from_slice::<Refusal>(&bytes) else {
        let text = cut(&format!("{status} {}", String::from_utf8_lossy(&bytes)));
        if status.is_server_error() {
            return Failure::Elsewhere(text);
        }
        return Failure::Final(GoalsError::Unexpected { endpoint: endpoint.into(), text });
    };
    let text = if refusal.message.is_empty() { refusal.error } else { refusal.message };
    let message = cut(&text);
    match refusal.code {
        UNAUTHENTICATED => Failure::Login(message),
        // A changed user or role makes tokens old; etcd says that as a wrong argument.
        INVALID_ARGUMENT if message.contains("auth") || message.contains("user name is empty") => {
            Failure::Login(message)
        }
        UNAVAILABLE => Failure::Elsewhere(message),
        _ if status == StatusCode::SERVICE_UNAVAILABLE || status.is_server_error() => {
            Failure::Elsewhere(message)
        }
        _ => Failure::Final(GoalsError::Refused { message }),
    }
}
