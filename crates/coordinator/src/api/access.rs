//! Who may call what: by a certificate, or by a token with a role that may be bound to apps.
//!
//! A token is looked up in the database at each call: one probe of an index. So a revocation holds at every coordinator
//! from its commit on, and there is no cache to wait for. Whoever shows a token is who the token says, whatever
//! certificate the connection has.

use std::collections::BTreeSet;

use axum::{
    extract::{ConnectInfo, FromRequestParts, Request, State},
    http::{Extensions, HeaderMap, StatusCode, header, request::Parts},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use shoal_pki::{Member, Role};
use shoal_process::Caller;
use shoal_proto::{AppName, state::TokenRole};
use shoal_queue::Actor;

use super::App;
use crate::{
    error::{ApiError, ApiResult},
    state::{Shared, hex, lock, now_ms},
};

/// The longest address of a request, in bytes. Beyond 64 KiB the HTTP library refuses it before this.
const ADDRESS_MAX_BYTES: usize = 8 << 10;

/// What every token begins with, so that scanners for secrets find one that was left somewhere.
const PREFIX: &str = "shoal_";

/// The random bytes of a token.
const SECRET_BYTES: usize = 32;

/// How often a token's last use is written down, in milliseconds.
const USED_INTERVAL_MS: i64 = 60_000;

/// How many tokens' last uses are held in memory: an optimisation only, so it is emptied when it is full.
const USED_MAX: usize = 10_000;

/// Who may call a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Anybody, without any credential.
    Open,
    /// A certificate of this role, and no token.
    Certificate(Role),
    /// An operator's certificate, or a token of this role or a higher one.
    Token(TokenRole, Reach),
}

/// What a token must reach that is bound to apps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    /// All: a token that is bound to apps is refused.
    Fleet,
    /// The apps that the call is about: its handler asks [`Principal::may`] for each, or lists only these.
    Apps,
    /// Nothing: what is of no app and tells nothing of any.
    Nothing,
}

/// Who calls, as far as a handler may want to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Principal {
    /// As the audit log tells it.
    pub(crate) name: String,
    /// What it may do.
    pub(crate) role: TokenRole,
    /// The apps that it is bound to; none: all.
    pub(crate) apps: Option<BTreeSet<AppName>>,
    /// When its token ends.
    pub(crate) expires_at_ms: Option<i64>,
}

impl Principal {
    /// Whether it may have to do with an app.
    ///
    /// # Errors
    /// 403 when it is bound to others.
    pub(crate) fn may(&self, app: &AppName) -> ApiResult<()> {
        match &self.apps {
            Some(apps) if !apps.contains(app) => Err(forbidden(format!(
                "your token is bound to {}, not to {app}: ask for one of that app",
                join(apps)
            ))),
            _ => Ok(()),
        }
    }

    /// The apps of a list: the one that is asked for, else all that it is bound to, else all there are (none).
    ///
    /// # Errors
    /// 403 when it is bound to others than the one that is asked for.
    pub(crate) fn apps(&self, asked: Option<&AppName>) -> ApiResult<Option<BTreeSet<AppName>>> {
        match asked {
            Some(app) => self.may(app).map(|()| Some(BTreeSet::from([app.clone()]))),
            None => Ok(self.apps.clone()),
        }
    }
}

fn join(apps: &BTreeSet<AppName>) -> String {
    apps.iter().map(AppName::as_str).collect::<Vec<_>>().join(", ")
}

fn forbidden(text: impl Into<String>) -> ApiError {
    ApiError::new(StatusCode::FORBIDDEN, "forbidden", text)
}

fn unauthorized(text: impl Into<String>) -> ApiError {
    ApiError::new(StatusCode::UNAUTHORIZED, "unauthorized", text)
}

/// A new token, to be shown once, and the hash that is kept of it.
pub(super) fn new_token() -> anyhow::Result<(String, String)> {
    let mut bytes = [0; SECRET_BYTES];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| anyhow::anyhow!("no random bytes to be had"))?;
    let token = format!("{PREFIX}{}", hex(&bytes));
    let hash = hash(&token);
    Ok((token, hash))
}

fn hash(token: &str) -> String {
    blake3::hash(token.as_bytes()).to_hex().to_string()
}

/// The token that a request shows, if it shows any credential in its header.
fn bearer(headers: &HeaderMap) -> ApiResult<Option<&str>> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let Some(value) = values.next() else { return Ok(None) };
    let wrong = || unauthorized("write the header as Authorization: Bearer shoal_...");
    if values.next().is_some() {
        return Err(wrong());
    }
    let text = value.to_str().map_err(|_| wrong())?;
    let (scheme, token) = text.split_once(' ').ok_or_else(wrong)?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Err(wrong());
    }
    Ok(Some(token.trim()))
}

/// Who the holder of a token is.
async fn of_token(shared: &Shared, token: &str) -> ApiResult<Principal> {
    let now = now_ms();
    let found = match token.starts_with(PREFIX) {
        true => shared.queue.token_of(&hash(token), now).await?,
        false => None,
    };
    let found = found.ok_or_else(|| {
        unauthorized("this token is none that counts: it is unknown, expired or revoked; log in with another one")
    })?;
    if is_use_due(shared, found.id, found.last_used_at_ms, now) {
        // Only for those who look: a failure here is no reason to refuse.
        if let Err(error) = shared.queue.token_used(found.id, now).await {
            tracing::warn!(%error, "a token's use could not be written down");
        }
    }
    Ok(Principal {
        name: format!("token:{}", found.name),
        role: found.role,
        apps: found.apps,
        expires_at_ms: found.expires_at_ms,
    })
}

/// Whether a token's last use is to be written down now.
fn is_use_due(shared: &Shared, id: i64, last_ms: Option<i64>, now_ms: i64) -> bool {
    let mut used = lock(&shared.tokens_used);
    let last = used.get(&id).copied().or(last_ms);
    let due = last.is_none_or(|last| now_ms - last >= USED_INTERVAL_MS);
    if due {
        if used.len() >= USED_MAX {
            used.clear();
        }
        used.insert(id, now_ms);
    }
    due
}

fn caller(extensions: &Extensions) -> Option<&Caller> {
    extensions.get::<ConnectInfo<Caller>>().map(|ConnectInfo(caller)| caller)
}

fn member(extensions: &Extensions) -> Option<&Member> {
    caller(extensions)?.member.as_ref()
}

/// Who calls a route for people: by its token, else by its operator's certificate.
async fn principal(
    shared: &Shared,
    headers: &HeaderMap,
    extensions: &Extensions,
) -> ApiResult<Principal> {
    if let Some(token) = bearer(headers)? {
        return of_token(shared, token).await;
    }
    match member(extensions) {
        Some(member) if member.role == Role::Operator => Ok(Principal {
            name: member.machine.to_string(),
            role: TokenRole::Admin,
            apps: None,
            expires_at_ms: None,
        }),
        Some(member) => Err(forbidden(format!(
            "only a token or a certificate of the role {} may do this; your certificate is of {}",
            Role::Operator,
            member.role
        ))),
        None => Err(unauthorized(
            "show a token (Authorization: Bearer ...; shoal login stores one) or an operator's certificate",
        )),
    }
}

/// Lets a request through to its route, or refuses it.
async fn enter(shared: &Shared, access: Access, request: &mut Request) -> ApiResult<()> {
    match access {
        Access::Open => Ok(()),
        Access::Certificate(role) => {
            if let Some(token) = bearer(request.headers())? {
                // First whether it counts at all: who shows a wrong one hears that.
                of_token(shared, token).await?;
                return Err(forbidden(format!(
                    "only a certificate of the role {role} may do this"
                )));
            }
            let member = member(request.extensions()).ok_or_else(|| {
                unauthorized(format!(
                    "no certificate was shown: this is for certificates of the role {role}, which \
                     shoal pki issue makes"
                ))
            })?;
            if member.role == role {
                return Ok(());
            }
            Err(forbidden(format!(
                "only a certificate of the role {role} may do this; yours is of {}",
                member.role
            )))
        }
        Access::Token(role, reach) => {
            let principal = principal(shared, request.headers(), request.extensions()).await?;
            if principal.role < role {
                return Err(forbidden(format!(
                    "this takes the role {role}; your token has {}: ask for one with that role",
                    principal.role
                )));
            }
            if let (Reach::Fleet, Some(apps)) = (reach, &principal.apps) {
                return Err(forbidden(format!(
                    "your token is bound to {}, and this is about the whole fleet: ask for one without apps",
                    join(apps)
                )));
            }
            request.extensions_mut().insert(principal);
            Ok(())
        }
    }
}

/// The guard in front of each route.
pub(super) async fn guard(
    State((shared, access)): State<(std::sync::Arc<Shared>, Access)>,
    mut request: Request,
    next: Next,
) -> Response {
    match enter(&shared, access, &mut request).await {
        Ok(()) => next.run(request).await,
        Err(error) => {
            let mut response = error.into_response();
            if response.status() == StatusCode::UNAUTHORIZED {
                let value = header::HeaderValue::from_static("Bearer");
                response.headers_mut().insert(header::WWW_AUTHENTICATE, value);
            }
            response
        }
    }
}

/// The request that a call belongs to, where it may come again: put there by `once`.
#[derive(Debug, Clone)]
pub(super) struct RequestId(pub(super) String);

/// Who calls a route for people, and as whom the audit log tells it.
pub(super) struct Who(pub(super) Principal, pub(super) Actor);

impl FromRequestParts<std::sync::Arc<Shared>> for Who {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &std::sync::Arc<Shared>) -> ApiResult<Self> {
        let principal = parts.extensions.get::<Principal>().cloned();
        // A route for people has a guard that puts it there.
        let principal = principal.ok_or_else(|| ApiError::internal("nobody asked who calls"))?;
        let origin = caller(&parts.extensions).map(|from| from.addr.ip().to_string());
        let actor = Actor {
            name: principal.name.clone(),
            origin: origin.unwrap_or_default(),
            request: parts.extensions.get::<RequestId>().map(|request| request.0.clone()),
        };
        Ok(Self(principal, actor))
    }
}

/// The process that calls a route for certificates.
pub(super) struct Peer(pub(super) Member);

impl FromRequestParts<std::sync::Arc<Shared>> for Peer {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &std::sync::Arc<Shared>) -> ApiResult<Self> {
        let member = member(&parts.extensions).cloned();
        member.map(Self).ok_or_else(|| unauthorized("no certificate was shown"))
    }
}

/// Whoever calls a route that is open to all.
pub(super) struct From(pub(super) Caller);

impl<S: Send + Sync> FromRequestParts<S> for From {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> ApiResult<Self> {
        let caller = caller(&parts.extensions).cloned();
        caller.map(Self).ok_or_else(|| ApiError::internal("a caller without an address"))
    }
}

/// Shuts out what no handler should see: an address without end, or a NUL, which PostgreSQL keeps in no text.
pub(super) async fn address(State(_): App, request: Request, next: Next) -> Response {
    let address = request.uri().to_string();
    if address.len() > ADDRESS_MAX_BYTES {
        let text = format!("the address is longer than {ADDRESS_MAX_BYTES} bytes");
        return ApiError::new(StatusCode::URI_TOO_LONG, "too_long", text).into_response();
    }
    if address.contains("%00") {
        return ApiError::invalid("a NUL character is in the address: leave it out")
            .into_response();
    }
    next.run(request).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_long_random_and_found_by_scanners() {
        let (one, hash_one) = new_token().unwrap();
        let (two, hash_two) = new_token().unwrap();
        assert!(one.starts_with("shoal_") && one.len() == 6 + 64, "{one}");
        assert!(one != two && hash_one != hash_two && hash_one == hash(&one));
        assert!(!hash_one.contains(&one[6..]));
    }

    #[test]
    fn only_one_bearer_token_is_read() {
        let headers = |values: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(header::AUTHORIZATION, header::HeaderValue::from_static(value));
            }
            headers
        };
        assert!(bearer(&headers(&[])).unwrap().is_none());
        assert_eq!(bearer(&headers(&["bearer  shoal_x "])).unwrap(), Some("shoal_x"));
        for wrong in [&["Basic x"][..], &["Bearer"], &[""], &["Bearer a", "Bearer b"]] {
            assert!(bearer(&headers(wrong)).is_err(), "{wrong:?}");
        }
    }
}
