//! How the page does everything that it does: as a caller of the API, through the API's own door.

use axum::{
    Router,
    body::{Body, Bytes},
    extract::ConnectInfo,
    http::{Method, Request, StatusCode, header},
    response::Response,
};
use serde::{Serialize, de::DeserializeOwned};
use shoal_client::types::ErrorBody;
use shoal_process::Caller;
use tower::ServiceExt as _;

/// The longest answer of the API that a page is made of, in bytes: a hundred rows of it are a tenth of that.
const ANSWER_MAX_BYTES: usize = 8 << 20;

/// The API said no.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    /// One line that says what to do.
    pub(super) message: String,
}

impl Refusal {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }

    fn internal(what: impl std::fmt::Display) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, format!("the API's answer is none: {what}"))
    }
}

/// Calls the API as the holder of a token, from where the browser is.
#[derive(Clone)]
pub(super) struct Api {
    router: Router,
    token: String,
    from: Option<Caller>,
}

impl Api {
    /// The certificate of the browser's connection, if it has one, is not taken along: only the token counts.
    pub(super) fn new(router: Router, token: String, from: Option<&Caller>) -> Self {
        let from = from.map(|from| Caller { addr: from.addr, member: None, certificate: None });
        Self { router, token, from }
    }

    /// An answer as it comes.
    pub(super) async fn send(
        &self,
        method: Method,
        path: &str,
        key: Option<&str>,
        body: Body,
    ) -> Result<Response, Refusal> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::AUTHORIZATION, format!("Bearer {}", self.token));
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
        let wrong =
            |_| Refusal::new(StatusCode::BAD_REQUEST, "the form has characters that no name has");
        let mut request = request.body(body).map_err(wrong)?;
        if let Some(from) = &self.from {
            request.extensions_mut().insert(ConnectInfo(from.clone()));
        }
        let response = match self.router.clone().oneshot(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        };
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = axum::body::to_bytes(response.into_body(), ANSWER_MAX_BYTES).await;
        let body: ErrorBody =
            serde_json::from_slice(&body.map_err(Refusal::internal)?).map_err(Refusal::internal)?;
        Err(Refusal::new(status, body.error.message))
    }

    async fn read<T: DeserializeOwned>(response: Response) -> Result<T, Refusal> {
        let body = axum::body::to_bytes(response.into_body(), ANSWER_MAX_BYTES).await;
        serde_json::from_slice(&body.map_err(Refusal::internal)?).map_err(Refusal::internal)
    }

    pub(super) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Refusal> {
        Self::read(self.send(Method::GET, path, None, Body::empty()).await?).await
    }

    /// An answer of plain bytes, of so many at most.
    pub(super) async fn bytes(&self, path: &str, max: usize) -> Result<Bytes, Refusal> {
        let response = self.send(Method::GET, path, None, Body::empty()).await?;
        axum::body::to_bytes(response.into_body(), max).await.map_err(Refusal::internal)
    }

    pub(super) async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        key: &str,
        body: &impl Serialize,
    ) -> Result<T, Refusal> {
        let body = serde_json::to_vec(body).map_err(Refusal::internal)?;
        Self::read(self.send(Method::POST, path, Some(key), body.into()).await?).await
    }
}
