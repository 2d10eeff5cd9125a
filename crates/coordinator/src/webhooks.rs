//! Telling webhooks what happened.
//!
//! The coordinator on duty takes from the database what each webhook is to be told, a task a webhook: one that is slow or
//! away holds up no other. A message is POSTed, signed as Standard Webhooks wants it, until its receiver answers 2xx or
//! it has been tried for long enough; its row is changed after each attempt. So it comes at least once, and after a
//! `kill -9` maybe twice, with the same `webhook-id`.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant, UNIX_EPOCH},
};

use anyhow::Context as _;
use reqwest::redirect;
use shoal_client::types::WebhookMessage;
use shoal_queue::{Attempted, Delivery, DeliveryStatus, EventFilter, QueueError, Webhook};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use url::{Host, Url};

use crate::{
    config::Config,
    events::told,
    signatures,
    state::{Shared, bell, chance, now_ms, random_token, seconds},
};

/// How long a connection may take to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How often it is looked for what is due when nobody rings.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// How many messages a webhook's task reads at once.
const BATCH: u32 = 100;

/// The longest wait between two attempts at a message.
const WAIT_MAX: Duration = Duration::from_secs(3_600);

/// The longest rest of a webhook that fails again and again, whatever waits for it.
const REST_MAX: Duration = Duration::from_secs(60);

/// The longest URL, in bytes.
const URL_MAX_BYTES: usize = 2_000;

/// What tests are called.
const TEST: &str = "webhook:test";

/// Whose secrets these are.
pub(crate) const OWNER: &str = "webhook";

/// The client that webhooks are told with: it follows no redirects, and goes through no proxy.
pub(crate) fn client(config: &Config) -> anyhow::Result<reqwest::Client> {
    let tls = shoal_process::public_tls(config.webhooks.ca.as_deref()).context("webhooks.ca")?;
    reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .redirect(redirect::Policy::none())
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(seconds(config.webhooks.timeout_s))
        .user_agent(concat!("shoal/", env!("CARGO_PKG_VERSION")))
        .no_proxy()
        .build()
        .context("the webhooks' HTTP client")
}

/// Checks a webhook's address.
///
/// # Errors
/// One line that says what is wrong with it.
pub(crate) fn check_url(text: &str, allow_http: bool) -> Result<Url, String> {
    if text.len() > URL_MAX_BYTES {
        return Err(format!("the URL is longer than {URL_MAX_BYTES} bytes"));
    }
    let url =
        Url::parse(text).map_err(|_| format!("'{text}' is not a URL: write https://HOST/PATH"))?;
    let is_loopback = match url.host() {
        Some(Host::Ipv4(ip)) => ip.is_loopback(),
        Some(Host::Ipv6(ip)) => ip.is_loopback(),
        Some(Host::Domain(name)) => name == "localhost",
        None => false,
    };
    if !url.username().is_empty() || url.password().is_some() {
        return Err(
            "put no user or password into the URL: it is shown in lists; messages are signed"
                .into(),
        );
    }
    match url.scheme() {
        "https" => Ok(url),
        "http" if is_loopback || allow_http => Ok(url),
        "http" => Err(format!(
            "'{text}' is plain http: use https, or set webhooks.allow_http on the coordinators"
        )),
        other => Err(format!("'{other}' is no scheme of a webhook: use https")),
    }
}

fn rfc3339(at_ms: i64) -> String {
    let since = Duration::from_millis(u64::try_from(at_ms).unwrap_or_default());
    humantime::format_rfc3339_millis(UNIX_EPOCH + since).to_string()
}

/// Posts a message once.
async fn post(shared: &Shared, webhook: &Webhook, id: &str, message: &WebhookMessage) -> Attempted {
    let start = Instant::now();
    let sent = send(shared, webhook, id, message).await;
    let latency_ms = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    match sent {
        Ok(answer) => {
            let reason = match answer {
                200..300 => None,
                300..400 => Some(format!(
                    "it answered {answer}: redirects are not followed, give the webhook its final URL"
                )),
                _ => Some(format!("it answered {answer}")),
            };
            Attempted { answer: Some(answer), latency_ms, reason }
        }
        Err(reason) => Attempted { answer: None, latency_ms, reason: Some(reason) },
    }
}

async fn send(
    shared: &Shared,
    webhook: &Webhook,
    id: &str,
    message: &WebhookMessage,
) -> Result<u16, String> {
    let secret = shared.secrets.open(OWNER, &webhook.sealed)?;
    // What was allowed once may be no longer.
    let url = check_url(&webhook.url, shared.config.webhooks.allow_http)?;
    let body = serde_json::to_vec(message).map_err(|error| error.to_string())?;
    let timestamp = now_ms() / 1_000;
    let signature = signatures::sign(&secret, id, timestamp, &body);
    let request = shared
        .webhook_client
        .post(url)
        .header("content-type", "application/json")
        .header("webhook-id", id)
        .header("webhook-timestamp", timestamp.to_string())
        .header("webhook-signature", signature)
        .body(body);
    // The answer's body is nobody's business: it is never read.
    let response = request.send().await.map_err(|error| cause(&error.without_url()))?;
    Ok(response.status().as_u16())
}

/// An error's innermost cause, which says the most.
fn cause(error: &reqwest::Error) -> String {
    if error.is_timeout() {
        return "it did not answer in time".into();
    }
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    format!("no answer: {cause}")
}

/// Sends a test message now, once.
///
/// # Errors
/// [`QueueError`] when there is no such webhook, or the database fails.
pub(crate) async fn test(shared: &Shared, id: i64) -> Result<Delivery, QueueError> {
    let webhook = shared.queue.webhook(id).await?;
    let token = random_token().map_err(|error| QueueError::Refused(error.to_string()))?;
    let (message, now) = (format!("test_{token}"), now_ms());
    let body = WebhookMessage { kind: TEST.into(), timestamp: rfc3339(now), data: None };
    let attempted = post(shared, &webhook, &message, &body).await;
    shared.queue.keep_test(id, &message, TEST, &attempted, now).await
}

/// How long to wait after an attempt, by how many there were; less up to half by chance.
fn wait_after(first: Duration, tries: u32) -> Duration {
    let wait = first.saturating_mul(2_u32.saturating_pow(tries.min(31))).min(WAIT_MAX);
    wait.mul_f64(1.0 - chance() / 2.0)
}

/// Tells a webhook what is due, one message after the other. False: it failed, and is better left alone for a while.
async fn tell(shared: &Shared, id: i64) -> Result<bool, QueueError> {
    let webhook = match shared.queue.webhook(id).await {
        Ok(webhook) => webhook,
        // It was removed, and what it was to be told with it.
        Err(QueueError::NotFound(_)) => return Ok(true),
        Err(error) => return Err(error),
    };
    let config = &shared.config.webhooks;
    for delivery in shared.queue.deliveries_due(id, now_ms(), BATCH).await? {
        let after = delivery.seq.unwrap_or_default() - 1;
        let events = shared.queue.events_after(after, &EventFilter::default(), 1).await?;
        let event = events.into_iter().find(|event| Some(event.seq) == delivery.seq);
        let attempted = match event {
            Some(event) => {
                let (kind, timestamp) = (event.kind.as_str().into(), rfc3339(event.at_ms));
                let message = WebhookMessage { kind, timestamp, data: Some(told(event)) };
                post(shared, &webhook, &delivery.message, &message).await
            }
            None => Attempted { reason: Some("the event is gone".into()), ..Attempted::default() },
        };
        let now = now_ms();
        let wait = wait_after(seconds(config.retry_s), delivery.tries);
        let next = now.saturating_add(crate::state::ms(wait));
        let give_up = delivery.created_at_ms + crate::state::ms(seconds(config.give_up_s));
        let next = (attempted.reason.is_some() && next < give_up).then_some(next);
        let status = shared.queue.delivery_tried(&delivery, &attempted, next, now).await?;
        let result = match (status, &attempted.reason) {
            (DeliveryStatus::Delivered, _) => "delivered",
            (DeliveryStatus::GivenUp, _) => "given_up",
            (DeliveryStatus::Pending, _) => "failed",
        };
        shared.metrics.webhook_attempts.with_label_values(&[result]).inc();
        if let Some(reason) = &attempted.reason {
            tracing::warn!(
                webhook = id,
                message = delivery.message,
                reason,
                result,
                "a webhook was not told"
            );
            // Those that waited behind it for as long are not tried one by one.
            let before = now - crate::state::ms(seconds(config.give_up_s));
            let given_up = shared.queue.give_up_deliveries(id, before, reason, now).await?;
            if given_up > 0 {
                tracing::warn!(webhook = id, messages = given_up, "a webhook failed for too long");
                shared.metrics.webhook_attempts.with_label_values(&["given_up"]).inc_by(given_up);
            }
            return Ok(false);
        }
    }
    Ok(true)
}

/// When a webhook that failed is left alone until, and how often it has failed since it last answered.
struct Rest {
    until: Instant,
    failures: u32,
}

/// Tells all webhooks until it is stopped.
pub(crate) async fn run(shared: Arc<Shared>, stop: CancellationToken) {
    // As many tasks as there are webhooks, which have a bound of their own.
    let mut tasks: JoinSet<(i64, bool)> = JoinSet::new();
    let mut busy = HashSet::new();
    let mut resting: HashMap<i64, Rest> = HashMap::new();
    loop {
        let bell = bell(&shared.events_moved);
        let wait = match look(&shared, &mut tasks, &mut busy, &resting).await {
            Ok(wait) => wait,
            Err(error) => {
                tracing::warn!(%error, "cannot look what webhooks are to be told");
                LOOK_AGAIN
            }
        };
        tokio::select! {
            () = bell => {}
            () = tokio::time::sleep(wait) => {}
            Some(ended) = tasks.join_next() => match ended {
                Ok((webhook, well)) => {
                    busy.remove(&webhook);
                    let failures = resting.remove(&webhook).map_or(0, |rest| rest.failures);
                    if !well {
                        let first = seconds(shared.config.webhooks.retry_s);
                        let rest = wait_after(first, failures).min(REST_MAX);
                        let rest = Rest { until: Instant::now() + rest, failures: failures + 1 };
                        resting.insert(webhook, rest);
                    }
                }
                // What panics ends the duty, as in its other tasks.
                Err(error) => match error.try_into_panic() {
                    Ok(panic) => std::panic::resume_unwind(panic),
                    Err(_) => return,
                },
            },
            // What is under way is tried again by a successor: it was not taken yet.
            () = stop.cancelled() => return,
        }
    }
}

/// Starts a task for each webhook that has something due; returns how long it is until another one has.
async fn look(
    shared: &Arc<Shared>,
    tasks: &mut JoinSet<(i64, bool)>,
    busy: &mut HashSet<i64>,
    resting: &HashMap<i64, Rest>,
) -> Result<Duration, QueueError> {
    let mut wait = LOOK_AGAIN;
    for due in shared.queue.webhooks_due().await? {
        if busy.contains(&due.webhook) {
            continue;
        }
        let until = Duration::from_millis(u64::try_from(due.at_ms - now_ms()).unwrap_or_default());
        let rest = resting.get(&due.webhook);
        let rest = rest.map(|rest| rest.until.saturating_duration_since(Instant::now()));
        let left = until.max(rest.unwrap_or_default());
        if left.is_zero() {
            busy.insert(due.webhook);
            let shared = shared.clone();
            tasks.spawn(async move {
                let well = tell(&shared, due.webhook).await.unwrap_or_else(|error| {
                    tracing::warn!(%error, webhook = due.webhook, "cannot tell a webhook");
                    shared.metrics.task_failures.with_label_values(&["webhooks"]).inc();
                    false
                });
                (due.webhook, well)
            });
        } else {
            wait = wait.min(left);
        }
    }
    Ok(wait)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_https_or_of_this_machine() {
        for good in [
            "https://example.org/hook",
            "http://127.0.0.1:8080/",
            "http://[::1]/x",
            "http://localhost/",
        ] {
            assert!(check_url(good, false).is_ok(), "{good}");
        }
        for (bad, word) in [
            ("http://example.org/hook", "plain http"),
            ("http://127.0.0.1.example.org/", "plain http"),
            ("ftp://example.org", "scheme"),
            ("https://me:secret@example.org/", "password"),
            ("example.org", "not a URL"),
        ] {
            let error = check_url(bad, false).unwrap_err();
            assert!(error.contains(word) && !error.contains("secret@"), "{error}");
        }
        assert!(check_url("http://example.org/hook", true).is_ok());
        assert!(check_url(&format!("https://example.org/{}", "x".repeat(2_000)), true).is_err());
    }

    #[test]
    fn waits_grow_to_an_hour() {
        let first = Duration::from_secs(5);
        for (tries, longest_s) in [(0, 5), (1, 10), (3, 40), (20, 3_600), (4_000_000, 3_600)] {
            let wait = wait_after(first, tries);
            let longest = Duration::from_secs(longest_s);
            assert!(wait <= longest && wait >= longest / 2, "{tries}: {wait:?}");
        }
        assert_eq!(rfc3339(1_700_000_000_123), "2023-11-14T22:13:20.123Z");
    }
}
