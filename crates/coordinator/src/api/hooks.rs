//! Pushes, as GitHub and GitLab tell them. These routes ask for no certificate: a signature over the body is what proves
//! a caller, and who has none is told little and not often.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use axum::{
    body::Body,
    extract::{FromRequest, FromRequestParts as _, Request},
    http::{HeaderMap, StatusCode},
};
use shoal_client::types;
use shoal_proto::state::Priority;
use shoal_queue::{Actor, PushSource, Taken};

use super::{App, Reply, access::From, apps, extract::whole, follow::owner, jobs};
use crate::{
    error::{ApiError, ApiResult},
    hooks::{self, Change, Limit, Pushed},
    signatures,
    state::{Shared, now_ms},
};

/// The longest body, in bytes: GitHub names at most 2,048 commits of a push.
const BODY_MAX_BYTES: usize = 8 << 20;

/// How many bodies are read at once, which bounds the memory that strangers may take to 64 MiB.
pub(crate) const AT_ONCE: usize = 8;

/// How long a call waits for its place: a forge does not come again by itself.
const PLACE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a body may take to come.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// The longest id of a delivery that is kept, in bytes.
const DELIVERY_MAX_BYTES: usize = 200;

/// Which forge calls.
#[derive(Clone, Copy)]
enum Forge {
    GitHub,
    GitLab,
}

impl Forge {
    fn as_str(self) -> &'static str {
        match self {
            Self::GitHub => "github",
            Self::GitLab => "gitlab",
        }
    }
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Whether a call is signed with this secret.
fn is_signed(forge: Forge, headers: &HeaderMap, secret: &[u8], body: &[u8]) -> bool {
    match forge {
        Forge::GitHub => header(headers, "x-hub-signature-256")
            .is_some_and(|signature| signatures::is_github(secret, signature, body)),
        Forge::GitLab => {
            let all = ["webhook-id", "webhook-timestamp", "webhook-signature"];
            match all.map(|name| header(headers, name)) {
                // A signature covers the body, and a token does not: where there is one, it decides.
                [Some(id), Some(timestamp), Some(signature)] => {
                    let now_s = now_ms() / 1_000;
                    // Its signing tokens are written as Standard Webhooks writes secrets; its other ones are plain text.
                    let text = std::str::from_utf8(secret).unwrap_or_default();
                    let key = signatures::secret_bytes(text).unwrap_or_else(|_| secret.to_vec());
                    signatures::is_signed(&key, (id, timestamp, signature), body, now_s)
                }
                _ => header(headers, "x-gitlab-token")
                    .is_some_and(|token| signatures::is_token(secret, token)),
            }
        }
    }
}

/// What tells a delivery from others, and stays when it is sent again. Only of what is signed: others could use it up.
fn delivery_id(forge: Forge, headers: &HeaderMap, body: &[u8]) -> String {
    let names: &[&str] = match forge {
        Forge::GitHub => &["x-github-delivery"],
        Forge::GitLab => &["idempotency-key", "webhook-id", "x-gitlab-event-uuid"],
    };
    let said = names.iter().find_map(|name| header(headers, name));
    let said = said.filter(|id| !id.is_empty() && id.len() <= DELIVERY_MAX_BYTES);
    let id = said.map_or_else(|| blake3::hash(body).to_hex().to_string(), ToString::to_string);
    format!("{}:{id}", forge.as_str())
}

/// A call of a forge, before it is believed: its body is read only once it has a place.
pub(super) struct Push {
    origin: IpAddr,
    headers: HeaderMap,
    body: Body,
}

impl<S: Send + Sync> FromRequest<S> for Push {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> ApiResult<Self> {
        let (mut parts, body) = request.into_parts();
        let From(caller) = From::from_request_parts(&mut parts, state).await?;
        Ok(Self { origin: caller.addr.ip(), headers: parts.headers, body })
    }
}

pub(super) async fn github(shared: App, push: Push) -> Reply<types::PushReply> {
    take(&shared, Forge::GitHub, push).await.map(axum::Json)
}

pub(super) async fn gitlab(shared: App, push: Push) -> Reply<types::PushReply> {
    take(&shared, Forge::GitLab, push).await.map(axum::Json)
}

fn answer(message: impl Into<String>) -> types::PushReply {
    types::PushReply { message: message.into(), builds: Vec::new() }
}

async fn take(shared: &Shared, forge: Forge, push: Push) -> ApiResult<types::PushReply> {
    let Push { origin, headers, body } = push;
    let headers = &headers;
    let busy = || {
        let wait_s = Limit::retry_after().as_secs();
        let text = format!("too many calls: try again in {wait_s} s");
        ApiError::new(StatusCode::TOO_MANY_REQUESTS, "too_many", text)
    };
    if !shared.hook_limit.allows(origin, Instant::now()) {
        return Err(busy());
    }
    let place = tokio::time::timeout(PLACE_TIMEOUT, shared.hook_places.acquire()).await;
    let _place = place.map_err(|_| busy())?;
    let body = whole(body, BODY_MAX_BYTES, BODY_TIMEOUT).await?;
    let event = match forge {
        Forge::GitHub => header(headers, "x-github-event"),
        Forge::GitLab => header(headers, "x-gitlab-event"),
    };
    let is_push = matches!(event, Some("push" | "Push Hook" | "System Hook"));
    let content_type = header(headers, "content-type").unwrap_or_default();
    let payload = hooks::payload(&body, content_type);
    let pushed = hooks::read(&payload, is_push).map_err(ApiError::invalid)?;
    let sources = believed(shared, forge, headers, &pushed, &body).await?;
    if event == Some("ping") {
        return Ok(answer("pong"));
    }
    let change = match &pushed.change {
        Ok(change) => change,
        Err(why) => return Ok(answer(format!("ignored: {why}"))),
    };
    let delivery = delivery_id(forge, headers, &body);
    let login = format!("{}:{}", forge.as_str(), pushed.login);
    let actor = Actor { name: login, origin: origin.to_string(), request: None };
    let mut reply = answer("built");
    for source in &sources {
        if source.branch == change.branch {
            reply.builds.push(build(shared, source, &delivery, change, &actor).await?);
        }
    }
    if reply.builds.is_empty() {
        let branches: Vec<_> = sources.iter().map(|source| source.branch.as_str()).collect();
        reply.message = format!("ignored: only pushes to {} are built", branches.join(", "));
    }
    Ok(reply)
}

/// The apps of the repository that a push names, whose secret it is signed with.
async fn believed(
    shared: &Shared,
    forge: Forge,
    headers: &HeaderMap,
    pushed: &Pushed,
    body: &[u8],
) -> ApiResult<Vec<PushSource>> {
    let mut known = Vec::new();
    let all = shared.queue.apps().await?;
    for source in shared.queue.push_sources().await? {
        let repository = match source.repository.as_str() {
            "" => match all.iter().find(|row| row.name == source.app) {
                Some(row) => hooks::canonical(&apps::read(row)?.repository),
                None => continue,
            },
            other => other.to_string(),
        };
        if pushed.repositories.contains(&repository) {
            known.push(source);
        }
    }
    if known.is_empty() {
        return Err(ApiError::not_found(
            "no app is built from this repository's pushes: shoal app push APP --secret-file FILE lets them",
        ));
    }
    let mut believed = Vec::new();
    for source in known {
        match shared.secrets.open(&owner(&source.app), &source.sealed) {
            Ok(secret) if is_signed(forge, headers, &secret, body) => believed.push(source),
            Ok(_) => {}
            Err(why) => {
                tracing::error!(app = %source.app, why, "an app's pushes cannot be checked")
            }
        }
    }
    if believed.is_empty() {
        shared.metrics.pushes.with_label_values(&["refused"]).inc();
        return Err(ApiError::new(
            StatusCode::UNAUTHORIZED,
            "unauthorized",
            "the signature is missing or wrong: give the forge the secret that the app was given",
        ));
    }
    Ok(believed)
}

/// Asks for the build of a push.
async fn build(
    shared: &Shared,
    source: &PushSource,
    delivery: &str,
    change: &Change,
    actor: &Actor,
) -> ApiResult<types::PushBuild> {
    let ask = jobs::ask(shared, &source.app, &change.commit, Priority::default()).await?;
    let push = shoal_queue::Push { delivery: delivery.into(), branch: change.branch.clone() };
    let taken = shared.queue.take_push(&push, &ask, actor, now_ms()).await?;
    let (result, job, again) = match taken {
        Taken::Now(submitted) => {
            jobs::submitted(shared, &submitted, actor);
            ("taken", submitted.job.id, false)
        }
        Taken::Before(job) => ("again", job, true),
    };
    shared.metrics.pushes.with_label_values(&[result]).inc();
    Ok(types::PushBuild { app: source.app.clone(), job, again })
}
