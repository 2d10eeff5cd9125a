//! Webhooks, as operators see them.

use shoal_client::types;
use shoal_queue::{Delivery, DeliveryStatus, NewWebhook, Webhook};

use super::{
    App, Args, Json, PageArgs, Place, Reply, Who, done, events::kinds, once::ShownOnce,
    pages::Paging,
};
use crate::{
    error::{ApiError, ApiResult},
    signatures,
    state::now_ms,
    webhooks,
};

/// How long a secret is, in bytes: Standard Webhooks wants 24 to 64, and a text may be as short as a good password.
const SECRET_MIN_BYTES: usize = 16;
const SECRET_MAX_BYTES: usize = 256;

/// How long one is that is made here.
const SECRET_BYTES: usize = 32;

fn view(webhook: Webhook) -> types::Webhook {
    types::Webhook {
        id: webhook.id,
        url: webhook.url,
        app: webhook.app,
        events: webhook.kinds.iter().map(|kind| kind.as_str().into()).collect(),
        created_at_ms: webhook.created_at_ms,
        created_by: webhook.created_by,
        secret: None,
    }
}

fn delivery(delivery: Delivery) -> types::WebhookDelivery {
    let is_pending = delivery.status == DeliveryStatus::Pending;
    types::WebhookDelivery {
        id: delivery.message,
        webhook: delivery.webhook,
        event: delivery.seq,
        kind: delivery.kind,
        status: delivery.status.as_str().into(),
        created_at_ms: delivery.created_at_ms,
        tries: delivery.tries,
        next_try_at_ms: is_pending.then(|| delivery.next_try_at_ms.max(delivery.created_at_ms)),
        last_try_at_ms: delivery.last_try_at_ms,
        answer: delivery.answer,
        latency_ms: delivery.latency_ms,
        reason: delivery.reason,
        finished_at_ms: delivery.finished_at_ms,
    }
}

/// The bytes of a secret that somebody chose.
pub(super) fn secret(text: &str) -> ApiResult<Vec<u8>> {
    let bytes = signatures::secret_bytes(text.trim()).map_err(ApiError::invalid)?;
    if !(SECRET_MIN_BYTES..=SECRET_MAX_BYTES).contains(&bytes.len()) {
        return Err(ApiError::invalid(format!(
            "the secret has {} bytes: give {SECRET_MIN_BYTES} to {SECRET_MAX_BYTES}",
            bytes.len()
        )));
    }
    Ok(bytes)
}

fn new_secret() -> ApiResult<Vec<u8>> {
    let mut bytes = vec![0; SECRET_BYTES];
    aws_lc_rs::rand::fill(&mut bytes)
        .map_err(|_| ApiError::internal("no random bytes to be had"))?;
    Ok(bytes)
}

pub(super) async fn add(
    shared: App,
    Who(_, actor): Who,
    Json(request): Json<types::WebhookRequest>,
) -> ApiResult<ShownOnce<types::Webhook>> {
    let allow_http = shared.config.webhooks.allow_http;
    webhooks::check_url(&request.url, allow_http).map_err(ApiError::invalid)?;
    let kinds = kinds(request.events.iter().map(String::as_str))?;
    if let Some(app) = &request.app {
        shared.queue.app(app).await?;
    }
    let (bytes, made) = match &request.secret {
        Some(text) => (secret(text)?, false),
        None => (new_secret()?, true),
    };
    let sealed = shared.secrets.seal(webhooks::OWNER, &bytes);
    let sealed = sealed.map_err(|error| ApiError::internal(error.to_string()))?;
    let new = NewWebhook { url: request.url, app: request.app, kinds, sealed };
    let added = shared.queue.add_webhook(&new, &actor, now_ms()).await?;
    tracing::info!(webhook = added.id, by = actor.name, "webhook added");
    let secret = made.then(|| signatures::secret_text(&bytes));
    Ok(ShownOnce(types::Webhook { secret, ..view(added) }))
}

pub(super) async fn list(
    shared: App,
    Args(args): Args<PageArgs>,
) -> Reply<types::Page<types::Webhook>> {
    let paging = Paging::of("webhooks", args.limit, args.cursor.as_deref())?;
    let mut webhooks = shared.queue.webhooks().await?;
    // There are few: WEBHOOKS_MAX at most.
    webhooks.retain(|webhook| paging.after.is_none_or(|after| webhook.id > after));
    Ok(paging.page(webhooks, |webhook| webhook.id, view))
}

pub(super) async fn remove(
    shared: App,
    Who(_, actor): Who,
    Place(id): Place<i64>,
) -> Reply<types::Done> {
    shared.queue.remove_webhook(id, &actor, now_ms()).await?;
    tracing::info!(webhook = id, by = actor.name, "webhook removed");
    Ok(done())
}

pub(super) async fn test(shared: App, Place(id): Place<i64>) -> Reply<types::WebhookDelivery> {
    Ok(axum::Json(delivery(webhooks::test(&shared, id).await?)))
}

pub(super) async fn deliveries(
    shared: App,
    Place(id): Place<i64>,
    Args(args): Args<PageArgs>,
) -> Reply<types::Page<types::WebhookDelivery>> {
    let paging = Paging::<(i64, String)>::of("deliveries", args.limit, args.cursor.as_deref())?;
    let after = paging.after.as_ref().map(|(at, message)| (*at, message.as_str()));
    let deliveries = shared.queue.deliveries(id, after, paging.wanted()).await?;
    let key = |delivery: &Delivery| (delivery.created_at_ms, delivery.message.clone());
    Ok(paging.page(deliveries, key, self::delivery))
}
