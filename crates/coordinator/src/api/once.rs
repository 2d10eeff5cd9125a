//! Idempotency keys: a request that comes again, because its answer got lost, is not done again.
//!
//! A call is done in a task of its own, so it goes on when its caller hangs up, and its answer is kept for when it comes
//! again. What must not happen twice (a job, a goal) notes in its own transaction what it made, so even the answer of a
//! coordinator that was killed between commit and answer is found: the call is done again and finds what is there. All
//! else sets something, and setting it twice is setting it; or makes a secret, which is answered once, and never kept: who
//! comes again is told so. Refusals have changed nothing and are not kept.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    body::Body,
    extract::{Request, State},
    http::{HeaderName, HeaderValue, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use schemars::{JsonSchema, SchemaGenerator};
use serde::Serialize;
use shoal_queue::Known;

use super::{
    access::{Principal, RequestId},
    describe::{Answer, Operation},
    extract::{BODY_TIMEOUT, JSON_MAX_BYTES, whole},
};
use crate::{
    error::{ApiError, ApiResult},
    state::{Shared, now_ms},
};

const KEY: HeaderName = HeaderName::from_static("idempotency-key");
const REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");

/// The longest key, in bytes.
const KEY_MAX_BYTES: usize = 255;

/// The longest answer that is kept, in bytes: a rollout of a hundred regions is a tenth of it.
const ANSWER_MAX_BYTES: usize = 1 << 20;

/// How often a call under way says that it is.
const BEAT: Duration = Duration::from_millis(500);

/// How long a beat may stand still until whoever did the call counts as gone.
const GONE_AFTER: Duration = Duration::from_secs(3);

/// How long a second call waits for the first one's answer.
const WAIT_MAX: Duration = Duration::from_secs(10);

/// How often it looks.
const LOOK: Duration = Duration::from_millis(50);

/// An answer with a secret: it is shown once and never kept, and what is kept is that it was.
pub(super) struct ShownOnce<T>(pub(super) T);

/// Marks the response of one.
#[derive(Clone, Copy)]
struct NeverKept;

impl<T: Serialize> IntoResponse for ShownOnce<T> {
    fn into_response(self) -> Response {
        let mut response = axum::Json(self.0).into_response();
        response.extensions_mut().insert(NeverKept);
        response
    }
}

impl<T: JsonSchema> Answer for ShownOnce<T> {
    fn describe(operation: &mut Operation, schemas: &mut SchemaGenerator) {
        <axum::Json<T> as Answer>::describe(operation, schemas);
    }
}

/// The caller's key, if it gave one.
fn key(request: &Request) -> ApiResult<Option<&str>> {
    let mut values = request.headers().get_all(KEY).iter();
    let Some(value) = values.next() else { return Ok(None) };
    let text = value.to_str().unwrap_or_default();
    let fits =
        (1..=KEY_MAX_BYTES).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
    if !fits || values.next().is_some() {
        return Err(ApiError::invalid(format!(
            "Idempotency-Key must be one text of 1 to {KEY_MAX_BYTES} visible ASCII characters"
        )));
    }
    Ok(Some(text))
}

fn digest(parts: &[&[u8]]) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        // With its length: no two lists of parts are the same bytes.
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
    }
    hasher.finalize().to_hex().to_string()
}

/// Does a call with an idempotency key once.
pub(super) async fn once(
    State(shared): State<Arc<Shared>>,
    request: Request,
    next: Next,
) -> Response {
    let key = match key(&request) {
        Ok(Some(key)) => key.to_string(),
        Ok(None) => return next.run(request).await,
        Err(error) => return error.into_response(),
    };
    match keyed(shared, &key, request, next).await {
        Ok(response) => response,
        Err(error) => error.into_response(),
    }
}

async fn keyed(
    shared: Arc<Shared>,
    key: &str,
    request: Request,
    next: Next,
) -> ApiResult<Response> {
    let (mut parts, body) = request.into_parts();
    let caller = parts.extensions.get::<Principal>().map(|by| by.name.clone()).unwrap_or_default();
    let body = whole(body, JSON_MAX_BYTES, BODY_TIMEOUT).await?;
    let id = digest(&[caller.as_bytes(), key.as_bytes()]);
    let (method, uri) = (parts.method.as_str(), parts.uri.to_string());
    let fingerprint = digest(&[method.as_bytes(), uri.as_bytes(), &body]);
    if let Some(answer) = known(&shared, &id, &fingerprint).await? {
        return Ok(answer);
    }
    parts.extensions.insert(RequestId(id.clone()));
    let request = Request::from_parts(parts, Body::from(body));
    let call = tokio::spawn(async move {
        let alive = keep_alive(&shared, &id);
        tokio::select! {
            response = next.run(request) => kept(&shared, &id, response).await,
            never = alive => match never {},
        }
    });
    call.await.unwrap_or_else(|error| {
        tracing::error!(%error, "a call failed");
        Err(ApiError::internal("the call failed: the coordinator's log says why"))
    })
}

/// Finds a call's answer, or makes the call ours to do (none). One that is under way is waited for.
async fn known(shared: &Shared, id: &str, fingerprint: &str) -> ApiResult<Option<Response>> {
    let queue = &shared.queue;
    let start = Instant::now();
    let mut seen: Option<(i64, Instant)> = None;
    loop {
        let known = match seen {
            None => match queue.begin_request(id, fingerprint, now_ms()).await? {
                Known::New => return Ok(None),
                other => other,
            },
            Some(_) => queue.known_request(id, fingerprint).await?,
        };
        match known {
            // It was refused meanwhile, so it is to be begun anew.
            Known::New => seen = None,
            Known::Other => {
                return Err(ApiError::new(
                    StatusCode::UNPROCESSABLE_ENTITY,
                    "key_reused",
                    "this Idempotency-Key was another request's: give each request one of its own",
                ));
            }
            Known::Answered { status, body } => return Ok(Some(answered(status, body))),
            Known::UnderWay { beat } => match seen {
                Some((last, since)) if last == beat => {
                    if since.elapsed() >= GONE_AFTER && queue.take_over_request(id, beat).await? {
                        tracing::info!("a request is done again: whoever did it is gone");
                        return Ok(None);
                    }
                }
                _ => seen = Some((beat, Instant::now())),
            },
        }
        if start.elapsed() >= WAIT_MAX {
            return Err(ApiError::new(
                StatusCode::CONFLICT,
                "under_way",
                "the first request with this Idempotency-Key is still being done: ask again",
            ));
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn answered(status: u16, body: String) -> Response {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let kind = HeaderValue::from_static("application/json");
    let headers = [(header::CONTENT_TYPE, kind), (REPLAYED, HeaderValue::from_static("true"))];
    (status, headers, body).into_response()
}

/// Says again and again that a call is under way.
async fn keep_alive(shared: &Shared, id: &str) -> std::convert::Infallible {
    loop {
        tokio::time::sleep(BEAT).await;
        if let Err(error) = shared.queue.beat_request(id).await {
            tracing::warn!(%error, "cannot say that a request is under way");
        }
    }
}

/// Keeps an answer, if there is something to keep.
async fn kept(shared: &Shared, id: &str, response: Response) -> ApiResult<Response> {
    let status = response.status();
    if !status.is_success() {
        if let Err(error) = shared.queue.drop_request(id).await {
            // It is then taken over by whoever comes with this key again.
            tracing::warn!(%error, "a request that was refused stays noted");
        }
        return Ok(response);
    }
    if response.extensions().get::<NeverKept>().is_some() {
        let told = ApiError::new(
            StatusCode::CONFLICT,
            "shown_once",
            "this was done by a request with this Idempotency-Key, whose answer had a secret that nobody keeps: take back what it \
             made, and make another with another key",
        );
        let told = told.into_response();
        keep(shared, id, told).await?;
        return Ok(response);
    }
    keep(shared, id, response).await
}

/// Notes an answer to give again, and gives it.
async fn keep(shared: &Shared, id: &str, response: Response) -> ApiResult<Response> {
    let status = response.status();
    let (parts, body) = response.into_parts();
    let body = whole(body, ANSWER_MAX_BYTES, BODY_TIMEOUT).await?;
    let text = String::from_utf8_lossy(&body);
    if let Err(error) = shared.queue.answer_request(id, status.as_u16(), &text).await {
        // What was asked for is done: that is the answer, whether or not it can be given again.
        tracing::warn!(%error, "an answer could not be kept");
    }
    Ok(Response::from_parts(parts, Body::from(body)))
}
