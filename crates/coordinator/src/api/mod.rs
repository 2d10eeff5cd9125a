//! The HTTP API: the table of routes, and what goes around each of them.
//!
//! A route says who may call it (`access`); a POST for people may come again without being done again (`once`). The same
//! table makes the OpenAPI document (`routes`, `describe`). Everything else, wrong paths, methods and bodies included, is
//! answered in the one shape of errors.

mod access;
mod apps;
mod audit;
mod copies;
mod deploy;
mod describe;
mod events;
mod extract;
mod fleet;
mod follow;
mod history;
mod hooks;
mod jobs;
mod join;
mod once;
mod pages;
mod queue;
mod regions;
mod routes;
mod tokens;
mod trust;
mod uploads;
mod webhooks;
mod workers;

use std::{panic::AssertUnwindSafe, sync::Arc, time::Instant};

use axum::{
    Router,
    extract::{MatchedPath, Request, State},
    http::{HeaderValue, StatusCode},
    middleware::{self, Next},
    response::{IntoResponse as _, Response},
};
use futures::FutureExt as _;
use prometheus::IntGauge;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;
use shoal_client::VERSION_HEADER;
use shoal_pki::Role;
use shoal_proto::state::TokenRole;

pub(crate) use hooks::AT_ONCE as HOOKS_AT_ONCE;
pub(crate) use join::Failures;
pub(crate) use trust::Noted;

use self::{
    access::{Access, Peer, Reach, Who},
    extract::{
        Args, BODY_TIMEOUT, Batch, JSON_MAX_BYTES, Json, Maybe, Place, Raw, Reply, Spare, done,
        whole,
    },
    routes::{Route, Routes},
};
use crate::{RouteInfo, error::ApiError, state::Shared};

type App = State<Arc<Shared>>;

/// This release.
const VERSION: HeaderValue = HeaderValue::from_static(env!("CARGO_PKG_VERSION"));

/// Who looks at something of an app.
const VIEWER: Access = Access::Token(TokenRole::Viewer, Reach::Apps);
/// Who looks at the fleet.
const FLEET_VIEWER: Access = Access::Token(TokenRole::Viewer, Reach::Fleet);
/// Who does something to an app.
const DEPLOYER: Access = Access::Token(TokenRole::Deployer, Reach::Apps);
/// Who uploads what belongs to no app yet.
const UPLOADER: Access = Access::Token(TokenRole::Deployer, Reach::Nothing);
/// Who changes what an app is.
const ADMIN: Access = Access::Token(TokenRole::Admin, Reach::Apps);
/// Who changes the fleet.
const FLEET_ADMIN: Access = Access::Token(TokenRole::Admin, Reach::Fleet);
/// Anybody with any token.
const ANYBODY: Access = Access::Token(TokenRole::Viewer, Reach::Nothing);
const WORKER: Access = Access::Certificate(Role::Worker);
const REGION: Access = Access::Certificate(Role::Region);

/// Every route.
fn routes() -> Routes {
    Routes::new()
        .get("/v1/openapi.json", Access::Open, "This document.", openapi)
        .get("/v1/whoami", ANYBODY, "Who the caller is.", tokens::whoami)
        .get("/v1/tokens", FLEET_ADMIN, "Tokens, oldest first.", tokens::list)
        .post("/v1/tokens", FLEET_ADMIN, "Make a token.", tokens::create)
        .post("/v1/tokens/{token}/revoke", FLEET_ADMIN, "Revoke a token.", tokens::revoke)
        .get("/v1/audit", FLEET_ADMIN, "Who changed what, newest first.", audit::list)
        .get("/v1/apps", VIEWER, "Apps, by name.", apps::list)
        .get("/v1/apps/{app}", VIEWER, "One app.", apps::one)
        .put("/v1/apps/{app}", ADMIN, "Register an app, or change it.", apps::set)
        .get("/v1/apps/{app}/push", ADMIN, "Whose pushes build an app.", follow::push)
        .put("/v1/apps/{app}/push", ADMIN, "Let pushes build an app.", follow::set_push)
        .delete("/v1/apps/{app}/push", ADMIN, "Let pushes build it no more.", follow::unset_push)
        .get(
            "/v1/apps/{app}/auto-deploy",
            VIEWER,
            "Whether an app's main branch is deployed by itself.",
            follow::auto_deploy,
        )
        .post(
            "/v1/apps/{app}/auto-deploy",
            DEPLOYER,
            "Switch that on or off, or go on after a rollback.",
            follow::set_auto_deploy,
        )
        .get("/v1/events", VIEWER, "A stream of what happens.", events::stream)
        .get("/v1/events/recent", VIEWER, "What happened, newest first.", events::recent)
        .get("/v1/history", VIEWER, "Builds and deployments, newest first.", history::list)
        .get("/v1/webhooks", FLEET_ADMIN, "Webhooks, oldest first.", webhooks::list)
        .post("/v1/webhooks", FLEET_ADMIN, "Add a webhook.", webhooks::add)
        .delete("/v1/webhooks/{webhook}", FLEET_ADMIN, "Remove a webhook.", webhooks::remove)
        .post(
            "/v1/webhooks/{webhook}/test",
            FLEET_ADMIN,
            "Send a webhook a message to see it come.",
            webhooks::test,
        )
        .get(
            "/v1/webhooks/{webhook}/deliveries",
            FLEET_ADMIN,
            "What a webhook was told, newest first.",
            webhooks::deliveries,
        )
        .post("/v1/hooks/github", Access::Open, "Take GitHub's signed pushes.", hooks::github)
        .post("/v1/hooks/gitlab", Access::Open, "Take GitLab's signed pushes.", hooks::gitlab)
        .get("/v1/jobs", VIEWER, "Build jobs, newest first.", jobs::list)
        .post("/v1/jobs", DEPLOYER, "Ask for a build.", jobs::submit)
        .get("/v1/jobs/{job}", VIEWER, "One job, with its attempts.", jobs::one)
        .post("/v1/jobs/{job}/cancel", DEPLOYER, "Cancel a job.", jobs::cancel)
        .get(
            "/v1/jobs/{job}/log",
            VIEWER,
            "A job's log from an offset on, 1 MiB at most.",
            jobs::log,
        )
        .get("/v1/queue", FLEET_VIEWER, "What waits.", queue::status)
        .post("/v1/queue/pause", FLEET_ADMIN, "Let no worker take a job.", queue::pause)
        .post("/v1/queue/resume", FLEET_ADMIN, "Let workers take jobs again.", queue::resume)
        .get("/v1/workers", FLEET_VIEWER, "Workers, by name.", queue::workers)
        .post(
            "/v1/workers/{worker}/drain",
            FLEET_ADMIN,
            "Let a worker take no more jobs.",
            queue::drain,
        )
        .post(
            "/v1/workers/{worker}/undrain",
            FLEET_ADMIN,
            "Let a worker take jobs again.",
            queue::undrain,
        )
        .get("/v1/artifacts", VIEWER, "Artifacts, newest first.", uploads::list)
        .get("/v1/artifact", VIEWER, "One artifact, by its name or its id.", uploads::one)
        .get("/v1/replication", VIEWER, "How the copies are.", copies::replication)
        .post(
            "/v1/inspections",
            DEPLOYER,
            "Have an artifact's copies inspected soon.",
            copies::inspect,
        )
        .get("/v1/pins", VIEWER, "Pins, newest first.", copies::pins)
        .post("/v1/pins", DEPLOYER, "Keep an artifact whatever comes.", copies::pin)
        .post("/v1/unpin", DEPLOYER, "Take a pin away.", copies::unpin)
        .post("/v1/gc", ADMIN, "Delete what nothing needs, or say what would go.", copies::gc)
        .get(
            "/v1/uploads/{artifact}/{encoding}",
            UPLOADER,
            "What is stored of an encoding.",
            uploads::state,
        )
        .put(
            "/v1/uploads/{artifact}/{encoding}/{object}",
            UPLOADER,
            "Store an object of an encoding: part-00000, ..., and last the index.",
            uploads::put,
        )
        .post(
            "/v1/publish",
            DEPLOYER,
            "Make an uploaded encoding an artifact of an app.",
            uploads::publish,
        )
        .post("/v1/deployments", DEPLOYER, "Set an app's goal.", deploy::deploy)
        .post("/v1/rollbacks", DEPLOYER, "Set an app's goal back.", deploy::rollback)
        .get("/v1/status", VIEWER, "Each app's present rollout, by app.", deploy::status)
        .get("/v1/rollouts/{rollout}", VIEWER, "One rollout.", deploy::rollout)
        .post(
            "/v1/rollouts/{rollout}/pause",
            DEPLOYER,
            "Pause a rollout: no further wave opens.",
            deploy::pause,
        )
        .post(
            "/v1/rollouts/{rollout}/resume",
            DEPLOYER,
            "Let a paused rollout go on.",
            deploy::resume,
        )
        .post("/v1/rollouts/{rollout}/cancel", DEPLOYER, "Cancel a rollout.", deploy::cancel)
        .get("/v1/machines", VIEWER, "Machines and what they run, by name.", fleet::machines)
        .get("/v1/regions", FLEET_VIEWER, "Regions, by name.", fleet::regions)
        .post(
            "/v1/regions/{region}/drain",
            FLEET_ADMIN,
            "Take a region out of service.",
            fleet::drain,
        )
        .post(
            "/v1/regions/{region}/undrain",
            FLEET_ADMIN,
            "Put a region back into service.",
            fleet::undrain,
        )
        .get("/v1/trust/status", FLEET_VIEWER, "Whom the cluster believes.", trust::status)
        .post("/v1/trust/revoke", FLEET_ADMIN, "Revoke a machine's keys.", trust::revoke)
        .post("/v1/trust/ca/begin", FLEET_ADMIN, "Believe a new CA, too.", trust::begin_ca)
        .post("/v1/trust/ca/finish", FLEET_ADMIN, "Believe only the new CA.", trust::finish_ca)
        .post(
            "/v1/trust/goal-key/begin",
            FLEET_ADMIN,
            "Believe a new goal key, too.",
            trust::begin_goal_key,
        )
        .post(
            "/v1/trust/goal-key/finish",
            FLEET_ADMIN,
            "Believe only the new goal key.",
            trust::finish_goal_key,
        )
        .get("/v1/join-tokens", FLEET_ADMIN, "Tokens for new machines.", join::list)
        .post("/v1/join-tokens", FLEET_ADMIN, "Make a token for new machines.", join::make)
        .post("/v1/join-tokens/{id}/revoke", FLEET_ADMIN, "Revoke such a token.", join::revoke)
        .get("/v1/trust", Access::Open, "The trust bundles after one.", trust::bundles)
        .post("/v1/join", Access::Open, "Give a new machine its certificate.", join::join)
        .post(
            "/v1/certificate/renew",
            Access::Open,
            "Renew the certificate that the caller shows.",
            trust::renew,
        )
        .post("/v1/region/renew", REGION, "Renew a machine's certificate.", trust::renew_for)
        .post("/v1/region/standing", REGION, "Say what machines go by.", trust::standing)
        .post("/v1/worker/claim", WORKER, "Take a job, or wait for one.", workers::claim)
        .post(
            "/v1/worker/jobs/{job}/heartbeat",
            WORKER,
            "Say that a job goes on.",
            workers::heartbeat,
        )
        .post(
            "/v1/worker/jobs/{job}/watch",
            WORKER,
            "Wait until a job is cancelled.",
            workers::watch,
        )
        .post("/v1/worker/jobs/{job}/log", WORKER, "Add to a job's log.", workers::log)
        .post("/v1/worker/jobs/{job}/finish", WORKER, "End an attempt.", workers::finish)
        .get(
            "/v1/region/goals",
            REGION,
            "Goals that changed after a cursor; waits for a change.",
            regions::goals,
        )
        .post("/v1/region/reports", REGION, "Hand in what machines said.", regions::reports)
}

/// The OpenAPI document of the API.
#[must_use]
pub(crate) fn document() -> Value {
    routes().document()
}

/// All routes, and who may call each.
#[must_use]
pub(crate) fn table() -> Vec<RouteInfo> {
    let info = |route: Route| {
        let (certificate, role, reach) = match route.access {
            Access::Open => (None, None, None),
            Access::Certificate(role) => (Some(role), None, None),
            Access::Token(role, reach) => (None, Some(role), Some(reach)),
        };
        let (method, fleet) = (route.method.to_string(), reach == Some(Reach::Fleet));
        RouteInfo { method, path: route.path, certificate, role, fleet }
    };
    routes().list.into_iter().map(info).collect()
}

async fn openapi(shared: App) -> Reply<Value> {
    Ok(axum::Json(shared.openapi.clone()))
}

/// The whole API.
pub(crate) fn router(shared: Arc<Shared>) -> Router {
    routes()
        .router(&shared)
        .method_not_allowed_fallback(wrong_method)
        .fallback(wrong_path)
        .layer(middleware::from_fn_with_state(shared.clone(), access::address))
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

/// Which page of a list is asked for.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct PageArgs {
    /// How many rows at most, 1 to 1000; 100 when nothing is said.
    #[schemars(range(min = 1, max = 1000))]
    limit: Option<u32>,
    /// The `next_cursor` of the page before.
    cursor: Option<String>,
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

/// Counts every call by its route and status, and answers those that panic.
async fn count(State(shared): App, request: Request, next: Next) -> Response {
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map_or_else(|| "none".to_string(), |path| path.as_str().to_string());
    let start = Instant::now();
    let open = Open::new(shared.metrics.requests_open.with_label_values(&[&route]));
    // A panic is told as any other error; what its future held is dropped.
    let run = AssertUnwindSafe(next.run(request)).catch_unwind().await;
    let mut response = run.unwrap_or_else(|_| {
        ApiError::internal("the call failed: the coordinator's log says why").into_response()
    });
    response.headers_mut().insert(VERSION_HEADER, VERSION);
    drop(open);
    let seconds = start.elapsed().as_secs_f64();
    shared.metrics.request_seconds.with_label_values(&[&route]).observe(seconds);
    shared.metrics.requests.with_label_values(&[route.as_str(), response.status().as_str()]).inc();
    response
}
