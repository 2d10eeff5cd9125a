//! New machines: tokens by which they join, and the call that they join by.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::Mutex,
    time::{Duration, Instant},
};

use axum::http::StatusCode;
use shoal_client::types;
use shoal_pki::{HOSTS_MAX, Names, Role, join_signature_holds};
use shoal_proto::goal::check_label;
use shoal_queue::{JoinGrant, JoinToken, MemberSeen};

use super::{
    App, Args, Json, PageArgs, Place, Reply, Who, access::From, done, once::ShownOnce,
    pages::Paging, trust::ca_hash,
};
use crate::{
    error::{ApiError, ApiResult},
    state::{hex, lock, now_ms, random_token},
    trust::unhex,
};

/// How many wrong tokens an address may name within [`WINDOW`] before it has to wait.
const FAILURES_MAX: u32 = 10;

/// For how long they are counted.
const WINDOW: Duration = Duration::from_secs(60);

/// Of how many addresses they are counted; when there are more, all begin anew.
const ADDRESSES_MAX: usize = 10_000;

/// The longest that a token may be good, in seconds: 30 days.
const TTL_MAX_S: u64 = 30 * 86_400;

/// The most machines that may join by one token.
const USES_MAX: u32 = 100_000;

/// The most labels of a machine.
const LABELS_MAX: usize = 32;

/// What a token begins with, so that one that leaked into a log is found.
const TOKEN_PREFIX: &str = "shoal-join-";

/// The longest text that is looked at as a token, in bytes.
const TOKEN_MAX_BYTES: usize = 128;

/// Wrong tokens by address.
#[derive(Default)]
pub(crate) struct Failures(Mutex<HashMap<IpAddr, (Instant, u32)>>);

impl Failures {
    /// Whether an address has named too many wrong tokens lately.
    fn is_over(&self, addr: IpAddr) -> bool {
        let failures = lock(&self.0);
        failures
            .get(&addr)
            .is_some_and(|(since, count)| since.elapsed() < WINDOW && *count >= FAILURES_MAX)
    }

    fn count(&self, addr: IpAddr) {
        let mut failures = lock(&self.0);
        if failures.len() >= ADDRESSES_MAX {
            failures.clear();
        }
        let now = Instant::now();
        let entry = failures.entry(addr).or_insert((now, 0));
        if entry.0.elapsed() >= WINDOW {
            *entry = (now, 0);
        }
        entry.1 += 1;
    }
}

fn hash(token: &str) -> String {
    blake3::hash(token.as_bytes()).to_hex().to_string()
}

/// What a token may give: no coordinator's or operator's certificate, which could do everything.
fn check_grant(request: &types::JoinTokenRequest) -> ApiResult<Role> {
    let invalid = |text: String| Err(ApiError::invalid(text));
    let role: Role = request.role.parse().map_err(|e| ApiError::invalid(format!("{e}")))?;
    match (role, &request.region) {
        (Role::Agent | Role::Region, Some(_)) | (Role::Worker, None) => {}
        (Role::Agent | Role::Region, None) => {
            return invalid(format!("role {role} needs a region"));
        }
        (Role::Worker, Some(_)) => return invalid("a worker belongs to no region".into()),
        (Role::Coordinator | Role::Operator, _) => {
            return invalid(format!(
                "no machine joins as {role} by a token: use shoal pki issue where the CA's key is"
            ));
        }
    }
    if role != Role::Agent && (request.zone.is_some() || !request.labels.is_empty()) {
        return invalid("only agents have a zone and labels".into());
    }
    if !(1..=USES_MAX).contains(&request.uses) {
        return invalid(format!("uses = {}: give 1 to {USES_MAX}", request.uses));
    }
    if !(1..=TTL_MAX_S).contains(&request.ttl_s) {
        return invalid(format!("ttl_s = {}: give 1 to {TTL_MAX_S}", request.ttl_s));
    }
    if request.labels.len() > LABELS_MAX {
        return invalid(format!("{} labels: at most {LABELS_MAX}", request.labels.len()));
    }
    let texts = request.labels.iter().flat_map(|(key, value)| [key, value]).chain(&request.zone);
    for text in texts {
        check_label(text).map_err(|error| ApiError::invalid(error.to_string()))?;
    }
    Ok(role)
}

pub(super) async fn make(
    shared: App,
    Who(_, actor): Who,
    Json(request): Json<types::JoinTokenRequest>,
) -> ApiResult<ShownOnce<types::JoinTokenMade>> {
    let role = check_grant(&request)?;
    if let Some(region) = &request.region
        && !shared.buckets.contains_key(region)
    {
        return Err(ApiError::not_found(format!("no region '{region}': shoal regions lists them")));
    }
    // Said now, not to the new machine.
    shared.authority()?;
    let random = || random_token().map_err(|error| ApiError::internal(error.to_string()));
    let token = format!("{TOKEN_PREFIX}{}{}", random()?, random()?);
    let id = random()?[..12].to_string();
    let now = now_ms();
    let ttl_ms = i64::try_from(request.ttl_s * 1_000).unwrap_or(i64::MAX);
    let new = JoinToken {
        id: id.clone(),
        grant: JoinGrant {
            role: role.to_string(),
            region: request.region,
            zone: request.zone,
            labels: request.labels,
        },
        uses_left: request.uses,
        created_at_ms: now,
        expires_at_ms: now.saturating_add(ttl_ms),
        created_by: actor.name.clone(),
    };
    shared.queue.add_join_token(&new, &hash(&token), &actor).await?;
    let ca_hash = ca_hash(&shared.membership.trust());
    Ok(ShownOnce(types::JoinTokenMade { token, id, expires_at_ms: new.expires_at_ms, ca_hash }))
}

fn view(token: JoinToken) -> types::JoinToken {
    types::JoinToken {
        id: token.id,
        role: token.grant.role,
        region: token.grant.region,
        zone: token.grant.zone,
        labels: token.grant.labels,
        uses_left: token.uses_left,
        created_at_ms: token.created_at_ms,
        expires_at_ms: token.expires_at_ms,
        created_by: token.created_by,
    }
}

pub(super) async fn list(
    shared: App,
    Args(args): Args<PageArgs>,
) -> Reply<types::Page<types::JoinToken>> {
    let paging = Paging::<(i64, String)>::of("join-tokens", args.limit, args.cursor.as_deref())?;
    let key = |token: &JoinToken| (token.created_at_ms, token.id.clone());
    // There are few: JOIN_TOKENS_MAX at most.
    let mut tokens = shared.queue.join_tokens(now_ms()).await?;
    tokens.sort_by_key(key);
    tokens.retain(|token| paging.after.as_ref().is_none_or(|after| key(token) > *after));
    Ok(paging.page(tokens, key, view))
}

pub(super) async fn revoke(
    shared: App,
    Who(_, actor): Who,
    Place(id): Place<String>,
) -> Reply<types::Done> {
    shared.queue.revoke_join_token(&id, &actor, now_ms()).await?;
    Ok(done())
}

/// Gives a new machine its certificate. Its caller has none to show: it has the token.
pub(super) async fn join(
    shared: App,
    From(caller): From,
    Json(request): Json<types::JoinRequest>,
) -> Reply<types::JoinReply> {
    let addr = caller.addr.ip();
    if shared.join_failures.is_over(addr) {
        return Err(ApiError::new(
            StatusCode::TOO_MANY_REQUESTS,
            "too_many_requests",
            format!("too many wrong join tokens from {addr}: try again in a minute"),
        ));
    }
    let refused = |text: &str| ApiError::new(StatusCode::FORBIDDEN, "forbidden", text);
    let known = |grant: Option<JoinGrant>| {
        grant.ok_or_else(|| {
            shared.join_failures.count(addr);
            tracing::warn!(%addr, machine = %request.machine, "a wrong join token");
            refused(
                "the join token is unknown, used up or over: make one with shoal join-token create",
            )
        })
    };
    if request.token.len() > TOKEN_MAX_BYTES || request.hosts.len() > HOSTS_MAX {
        known(None)?;
    }
    let hash = hash(&request.token);
    let grant = known(shared.queue.join_grant(&hash, now_ms()).await?)?;
    let signature = unhex(&request.signature).unwrap_or_default();
    if !join_signature_holds(&request.node, &request.token, &request.machine, &signature) {
        return Err(refused("the request is not signed with the key that it names"));
    }
    let trust = shared.membership.trust();
    if trust.is_revoked(&request.node) {
        return Err(refused("this machine's key is revoked: remove it, and join with a new one"));
    }
    let role: Role = grant.role.parse().map_err(|_| ApiError::internal("a role of no kind"))?;
    let names = Names {
        machine: request.machine.clone(),
        region: grant.region.clone(),
        role,
        // Who joins by a token is reached by its key, not by a name that it chose: it could choose another's.
        hosts: Vec::new(),
    };
    let life_s = shared.config.certificate_life_s as u64;
    let certificate = shared
        .authority()?
        .certify(&names, &request.node, life_s)
        .map_err(|error| ApiError::invalid(format!("no certificate was issued: {error}")))?;
    let member = MemberSeen {
        node: request.node,
        machine: request.machine.clone(),
        role: grant.role.clone(),
        region: grant.region.clone(),
    };
    // Last: whoever loses the race for the last use has got nothing.
    shared.queue.use_join_token(&hash, &member, &addr.to_string(), now_ms()).await?;
    tracing::info!(machine = %request.machine, role = grant.role, %addr, "joined");
    let regions = shared.region_addresses(grant.region.as_ref()).await?;
    Ok(axum::Json(types::JoinReply {
        certificate,
        trust: hex(trust.signed_bytes()),
        role: grant.role,
        region: grant.region,
        zone: grant.zone,
        labels: grant.labels,
        regions,
    }))
}
