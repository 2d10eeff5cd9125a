//! The HTTP API: the routes, who may call them, and how requests are read.
//!
//! Three groups of routes, one a role, and a few for everybody. Each group is behind a check of the caller's certificate; everything else, wrong
//! paths, methods and bodies included, is answered in the one shape of errors.

mod apps;
mod deploy;
mod fleet;
mod jobs;
mod join;
mod queue;
mod regions;
mod trust;
mod uploads;
mod workers;

pub(crate) use join::Failures;
pub(crate) use trust::Noted;

use std::{sync::Arc, time::Instant};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{
        ConnectInfo, FromRequest, FromRequestParts, MatchedPath, Path, Query, Request, State,
    },
    http::{StatusCode, header, request::Parts},
    middleware::{self, Next},
    response::Response,
    routing::{get, post, put},
};
use prometheus::IntGauge;
use serde::de::DeserializeOwned;
use shoal_pki::{Member, Role};
use shoal_process::Caller;
use shoal_queue::Actor;

use crate::{
    error::{ApiError, ApiResult},
    state::Shared,
};

/// The longest JSON body of a request, in bytes.
const JSON_MAX_BYTES: usize = 1 << 20;

/// The longest batch of reports, in bytes: about 30,000 machines with a state each.
const REPORTS_MAX_BYTES: usize = 16 << 20;

/// The longest listing, in rows.
const LIST_MAX: u32 = 10_000;

type App = State<Arc<Shared>>;

/// The whole API.
pub(crate) fn router(shared: Arc<Shared>) -> Router {
    let operator = Router::new()
        .route("/v1/apps", get(apps::list))
        .route("/v1/apps/{app}", get(apps::one).put(apps::set))
        .route("/v1/jobs", get(jobs::list).post(jobs::submit))
        .route("/v1/jobs/{job}", get(jobs::one))
        .route("/v1/jobs/{job}/cancel", post(jobs::cancel))
        .route("/v1/jobs/{job}/log", get(jobs::log))
        .route("/v1/queue", get(queue::status))
        .route("/v1/queue/pause", post(queue::pause))
        .route("/v1/queue/resume", post(queue::resume))
        .route("/v1/workers", get(queue::workers))
        .route("/v1/workers/{worker}/drain", post(queue::drain))
        .route("/v1/workers/{worker}/undrain", post(queue::undrain))
        .route("/v1/artifacts", get(uploads::list))
        .route("/v1/artifact", get(uploads::one))
        .route("/v1/uploads/{artifact}/{encoding}", get(uploads::state))
        .route("/v1/uploads/{artifact}/{encoding}/{object}", put(uploads::put))
        .route("/v1/publish", post(uploads::publish))
        .route("/v1/deployments", post(deploy::deploy))
        .route("/v1/rollbacks", post(deploy::rollback))
        .route("/v1/status", get(deploy::status))
        .route("/v1/rollouts/{rollout}", get(deploy::rollout))
        .route("/v1/rollouts/{rollout}/cancel", post(deploy::cancel))
        .route("/v1/machines", get(fleet::machines))
        .route("/v1/regions", get(fleet::regions))
        .route("/v1/regions/{region}/drain", post(fleet::drain))
        .route("/v1/regions/{region}/undrain", post(fleet::undrain))
        .route("/v1/trust/status", get(trust::status))
        .route("/v1/trust/revoke", post(trust::revoke))
        .route("/v1/trust/ca/begin", post(trust::begin_ca))
        .route("/v1/trust/ca/finish", post(trust::finish_ca))
        .route("/v1/trust/goal-key/begin", post(trust::begin_goal_key))
        .route("/v1/trust/goal-key/finish", post(trust::finish_goal_key))
        .route("/v1/join-tokens", get(join::list).post(join::make))
        .route("/v1/join-tokens/{id}/revoke", post(join::revoke))
        .route_layer(middleware::from_fn_with_state(Role::Operator, require));
    let worker = Router::new()
        .route("/v1/worker/claim", post(workers::claim))
        .route("/v1/worker/jobs/{job}/heartbeat", post(workers::heartbeat))
        .route("/v1/worker/jobs/{job}/watch", post(workers::watch))
        .route("/v1/worker/jobs/{job}/log", post(workers::log))
        .route("/v1/worker/jobs/{job}/finish", post(workers::finish))
        .route_layer(middleware::from_fn_with_state(Role::Worker, require));
    let region = Router::new()
        .route("/v1/region/goals", get(regions::goals))
        .route("/v1/region/reports", post(regions::reports))
        .route("/v1/region/renew", post(trust::renew_for))
        .route("/v1/region/standing", post(trust::standing))
        .route_layer(middleware::from_fn_with_state(Role::Region, require));
    // For everybody: what they need who have no certificate yet, or one of any role.
    let open = Router::new()
        .route("/v1/trust", get(trust::bundles))
        .route("/v1/join", post(join::join))
        .route("/v1/certificate/renew", post(trust::renew));
    Router::new()
        .merge(open)
        .merge(operator)
        .merge(worker)
        .merge(region)
        .method_not_allowed_fallback(wrong_method)
        .fallback(wrong_path)
        .layer(middleware::from_fn_with_state(shared.clone(), trust::note))
        .layer(middleware::from_fn_with_state(shared.clone(), count))
        .with_state(shared)
}

async fn wrong_path(request: Request) -> ApiError {
    ApiError::not_found(format!("no such path: {}", request.uri().path()))
}

async fn wrong_method(request: Request) -> ApiError {
    ApiError::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "wrong_method",
        format!("{} is not possible on {}", request.method(), request.uri().path()),
    )
}

/// A call under way: counted until it is answered, or its caller hung up.
struct Open(IntGauge);

impl Open {
    fn new(gauge: IntGauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Counts every call by its route and status.
async fn count(State(shared): App, request: Request, next: Next) -> Response {
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map_or_else(|| "none".to_string(), |path| path.as_str().to_string());
    let start = Instant::now();
    let open = Open::new(shared.metrics.requests_open.with_label_values(&[&route]));
    let response = next.run(request).await;
    drop(open);
    let seconds = start.elapsed().as_secs_f64();
    shared.metrics.request_seconds.with_label_values(&[&route]).observe(seconds);
    shared.metrics.requests.with_label_values(&[route.as_str(), response.status().as_str()]).inc();
    response
}

fn caller(parts: &axum::http::Extensions) -> ApiResult<(&Member, &Caller)> {
    let caller = parts.get::<ConnectInfo<Caller>>().map(|ConnectInfo(caller)| caller);
    caller.and_then(|caller| Some((caller.member.as_ref()?, caller))).ok_or_else(|| {
        ApiError::new(
            StatusCode::UNAUTHORIZED,
            "unauthorized",
            "no certificate of the cluster was shown: shoal pki issue makes one",
        )
    })
}

/// Lets through only callers whose certificate is for `role`.
async fn require(State(role): State<Role>, request: Request, next: Next) -> ApiResult<Response> {
    let (member, _) = caller(request.extensions())?;
    if member.role != role {
        return Err(ApiError::new(
            StatusCode::FORBIDDEN,
            "forbidden",
            format!(
                "only a certificate of the role {role} may do this; yours is of {}",
                member.role
            ),
        ));
    }
    Ok(next.run(request).await)
}

/// The caller, as its certificate names it.
struct Who(Member, Actor);

impl<S: Send + Sync> FromRequestParts<S> for Who {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> ApiResult<Self> {
        let (member, from) = caller(&parts.extensions)?;
        let actor = Actor { name: member.machine.to_string(), origin: from.addr.ip().to_string() };
        Ok(Self(member.clone(), actor))
    }
}

/// A JSON body.
struct Json<T>(T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> ApiResult<Self> {
        json(request.into_body(), JSON_MAX_BYTES).await.map(Self)
    }
}

/// Reads a body whole, up to a limit.
async fn whole(body: Body, limit: usize) -> ApiResult<Bytes> {
    axum::body::to_bytes(body, limit).await.map_err(|error| {
        use std::error::Error as _;
        if error.source().is_some_and(|cause| cause.is::<http_body_util::LengthLimitError>()) {
            ApiError::too_long(format!("the body is longer than {limit} bytes"))
        } else {
            ApiError::new(StatusCode::REQUEST_TIMEOUT, "incomplete_body", error.to_string())
        }
    })
}

/// Reads a body as JSON.
async fn json<T: DeserializeOwned>(body: Body, limit: usize) -> ApiResult<T> {
    let bytes = whole(body, limit).await?;
    serde_json::from_slice(&bytes).map_err(|error| {
        let text = error.to_string();
        // The place in a body that a program wrote helps nobody.
        let text = text.split(" at line ").next().unwrap_or_default();
        ApiError::invalid(format!("wrong body: {text}"))
    })
}

/// The query string.
struct Args<T>(T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Args<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> ApiResult<Self> {
        let query = Query::<T>::from_request_parts(parts, state).await;
        query.map(|Query(args)| Self(args)).map_err(|error| ApiError::invalid(error.body_text()))
    }
}

/// The path's variables.
struct Place<T>(T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Place<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> ApiResult<Self> {
        let path = Path::<T>::from_request_parts(parts, state).await;
        path.map(|Path(place)| Self(place)).map_err(|error| ApiError::invalid(error.body_text()))
    }
}

/// An answer in JSON.
type Reply<T> = ApiResult<axum::Json<T>>;

/// The answer to what needs none: `{}`.
fn done() -> axum::Json<serde_json::Value> {
    axum::Json(serde_json::json!({}))
}

/// An answer of plain bytes.
fn bytes(content: Vec<u8>) -> Response {
    let mut response = Response::new(Body::from(content));
    let kind = header::HeaderValue::from_static("application/octet-stream");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

/// How many rows a listing gives.
fn limited(asked: Option<u32>) -> u32 {
    asked.unwrap_or(100).min(LIST_MAX)
}
