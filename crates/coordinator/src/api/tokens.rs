//! Tokens, and who one is.

use shoal_client::types;
use shoal_proto::MachineName;
use shoal_queue::{NewToken, Token};

use super::{App, Args, Json, PageArgs, Place, Reply, Who, access, once::ShownOnce, pages::Paging};
use crate::{
    error::{ApiError, ApiResult},
    state::now_ms,
};

/// The most apps that a token is bound to.
const APPS_MAX: usize = 50;

/// The longest that a token counts when it ends at all, in seconds: ten years.
const EXPIRES_MAX_S: u32 = 10 * 365 * 86_400;

fn view(token: Token) -> types::Token {
    types::Token {
        name: token.name,
        role: token.role,
        apps: token.apps,
        created_at_ms: token.created_at_ms,
        created_by: token.created_by,
        expires_at_ms: token.expires_at_ms,
        revoked_at_ms: token.revoked_at_ms,
        revoked_by: token.revoked_by,
        last_used_at_ms: token.last_used_at_ms,
    }
}

pub(super) async fn create(
    shared: App,
    Who(_, actor): Who,
    Json(request): Json<types::TokenRequest>,
) -> ApiResult<ShownOnce<types::CreatedToken>> {
    if request.apps.as_ref().is_some_and(|apps| apps.is_empty() || apps.len() > APPS_MAX) {
        return Err(ApiError::invalid(format!(
            "apps must name 1 to {APPS_MAX} apps; leave it out for a token of all"
        )));
    }
    if request.expires_in_s.is_some_and(|seconds| !(1..=EXPIRES_MAX_S).contains(&seconds)) {
        return Err(ApiError::invalid(format!("expires_in_s must be 1 to {EXPIRES_MAX_S}")));
    }
    let now = now_ms();
    let (secret, hash) =
        access::new_token().map_err(|error| ApiError::internal(error.to_string()))?;
    let new = NewToken {
        name: request.name,
        hash,
        role: request.role,
        apps: request.apps,
        expires_at_ms: request.expires_in_s.map(|seconds| now + i64::from(seconds) * 1_000),
    };
    let token = shared.queue.create_token(&new, &actor, now).await?;
    tracing::info!(token = %token.name, role = %token.role, by = actor.name, "token made");
    Ok(ShownOnce(types::CreatedToken { secret, token: view(token) }))
}

pub(super) async fn list(
    shared: App,
    Args(args): Args<PageArgs>,
) -> Reply<types::Page<types::Token>> {
    let paging = Paging::of("tokens", args.limit, args.cursor.as_deref())?;
    let tokens = shared.queue.tokens(paging.after.unwrap_or_default(), paging.wanted()).await?;
    Ok(paging.page(tokens, |token| token.id, view))
}

pub(super) async fn revoke(
    shared: App,
    Who(_, actor): Who,
    Place(name): Place<MachineName>,
) -> Reply<types::Token> {
    let token = shared.queue.revoke_token(&name, &actor, now_ms()).await?;
    tracing::info!(token = %name, by = actor.name, "token revoked");
    Ok(axum::Json(view(token)))
}

pub(super) async fn whoami(shared: App, Who(by, _): Who) -> Reply<types::WhoAmI> {
    Ok(axum::Json(types::WhoAmI {
        name: by.name,
        role: by.role,
        apps: by.apps,
        expires_at_ms: by.expires_at_ms,
        cluster: shared.membership.trust().cluster().into(),
    }))
}
