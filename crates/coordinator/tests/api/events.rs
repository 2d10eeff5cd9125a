//! What happens, told by the stream and to webhooks.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse as _, Response},
    routing::post,
};
use reqwest::Method;
use serde_json::{Value, json};
use shoal_client::{
    Client, EventQuery, Streamed,
    types::{Event, Webhook, WebhookDelivery, WebhookRequest},
};
use shoal_pki::Role;
use shoal_queue::{Actor, Ask, Queue, sqlite_url};

use crate::harness::*;

fn only(types: &[&str]) -> EventQuery {
    EventQuery { app: None, types: types.iter().map(ToString::to_string).collect() }
}

/// Reads a stream up to an event.
async fn up_to(
    operator: &Client,
    query: &EventQuery,
    after: Option<i64>,
    last: i64,
) -> (Vec<Event>, Vec<String>) {
    let mut stream = operator.follow_events(query, after).await.unwrap();
    let (mut events, mut notices) = (vec![], vec![]);
    loop {
        let next = tokio::time::timeout(PATIENCE, stream.next()).await.expect("something comes");
        match next.unwrap().expect("it goes on") {
            Streamed::Event(event) => events.push(event),
            Streamed::Notice(name, _) => notices.push(name),
        }
        if events.last().is_some_and(|event: &Event| event.id >= last) {
            return (events, notices);
        }
    }
}

async fn recent(operator: &Client, count: usize) -> Vec<Event> {
    wait_for(&format!("{count} events"), async || {
        let mut events = operator.events(&EventQuery::default(), 1_000).await.unwrap();
        events.reverse();
        if events.len() == count { Ok(events) } else { Err(events) }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_is_filtered_and_goes_on_where_it_ended() {
    let mut cluster = Cluster::start_with(ONLY_BELLS).await;
    let operator = cluster.operator();
    operator.set_app(&app("web", "")).await.unwrap();
    operator.set_app(&app("db", "")).await.unwrap();
    // Opened before anything happens, and told of it by a bell alone.
    let mut live = operator.follow_events(&EventQuery::default(), None).await.unwrap();
    let one = build(&operator, "web").await;
    let Some(Streamed::Event(first)) = woken(live.next()).await.unwrap() else { panic!("none") };
    assert_eq!((first.id, first.kind.as_str(), first.job), (1, "build:queued", Some(one.id)));
    build(&operator, "db").await;
    operator.cancel_job(one.id).await.unwrap();
    let events = recent(&operator, 3).await;
    let (all, notices) = up_to(&operator, &EventQuery::default(), Some(0), 3).await;
    assert_eq!((all, notices.len()), (events.clone(), 0));
    let (rest, _) = up_to(&operator, &EventQuery::default(), Some(2), 3).await;
    assert_eq!(rest, events[2..]);
    let (ended, _) = up_to(&operator, &only(&["build:completed", "deploy:init"]), Some(0), 3).await;
    assert_eq!(ended, events[2..]);
    let query = EventQuery { app: Some("db".parse().unwrap()), types: vec![] };
    let (of_db, _) = up_to(&operator, &query, Some(0), 2).await;
    assert_eq!(of_db, events[1..2]);

    // Who cannot set a header says it in the address; a browser that comes again says both, and the header is newer.
    let http = cluster.raw(Role::Operator);
    for (after, header, first) in [(1, None, 2), (0, Some("2"), 3)] {
        let url = format!("{}/v1/events?after={after}", cluster.url());
        let call = http.get(url);
        let call = header.into_iter().fold(call, |call, last| call.header("last-event-id", last));
        let mut stream = call.timeout(PATIENCE).send().await.unwrap();
        let mut text = String::new();
        while !text.contains("\n\nid: ") || !text.ends_with("\n\n") {
            let chunk = stream.chunk().await.unwrap().expect("it goes on");
            text += std::str::from_utf8(&chunk).unwrap();
        }
        let id = text.lines().find_map(|line| line.strip_prefix("id: ")).unwrap();
        assert_eq!(id, first.to_string(), "{text}");
    }

    // A coordinator that stops ends its streams; the next one goes on behind the last event.
    cluster.stop().await;
    while let Some(streamed) = live.next().await.unwrap_or(None) {
        assert!(matches!(streamed, Streamed::Event(_)));
    }
    cluster.run().await;
    let operator = cluster.operator();
    let again = build(&operator, "web").await;
    let (after, notices) = up_to(&operator, &EventQuery::default(), Some(3), 4).await;
    assert_eq!((after[0].job, after.len(), notices.len()), (Some(again.id), 1, 0));
    // A number that never was: a database that was restored.
    build(&operator, "web").await;
    let mut stream = operator.follow_events(&EventQuery::default(), Some(1_000)).await.unwrap();
    let next = tokio::time::timeout(PATIENCE, stream.next()).await.expect("something comes");
    let Some(Streamed::Notice(name, text)) = next.unwrap() else { panic!("none") };
    assert!(name == "stream:gap" && text.contains("\"after\":1000"), "{name} {text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_forgotten_is_a_gap() {
    let cluster = Cluster::start_with("events = { keep_max = 2, keep_s = 1.0 }").await;
    let operator = cluster.operator();
    operator.set_app(&app("web", "")).await.unwrap();
    for _ in 0..4 {
        build(&operator, "web").await;
    }
    wait_for("all to have numbers", async || {
        let page = cluster.metrics().await;
        if page.contains("shoal_coordinator_events_total 4\n") { Ok(()) } else { Err("not yet") }
    })
    .await;
    wait_for("the oldest to be forgotten", async || {
        let events = operator.events(&EventQuery::default(), 100).await.unwrap();
        if events.is_empty() { Ok(()) } else { Err(events.len()) }
    })
    .await;
    build(&operator, "web").await;
    let (events, notices) = up_to(&operator, &EventQuery::default(), Some(1), 5).await;
    assert_eq!((events[0].id, notices), (5, vec!["stream:gap".to_string()]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_is_told_and_dropped() {
    let cluster = Cluster::start_with("events = { slow_s = 0.3 }").await;
    let operator = cluster.operator();
    operator.set_app(&app("web", "")).await.unwrap();
    let http = cluster.raw(Role::Operator);
    let url = format!("{}/v1/events?type=build:completed&after=0", cluster.url());
    let mut slow = http.get(url).send().await.unwrap();
    assert_eq!(slow.headers()["content-type"], "text/event-stream");
    // More than the buffers of both ends hold, with long reasons.
    let queue = Queue::open(&sqlite_url(&cluster.path("data/shoal.sqlite"))).await.unwrap();
    let by = Actor { name: "x".repeat(1_900), origin: String::new(), request: None };
    let dropped = "shoal_coordinator_event_streams_dropped_total 1";
    wait_for("the reader to be dropped", async || {
        let app = || "web".parse().unwrap();
        let commit = || format!("{:040x}", rand_number()).parse().unwrap();
        for _ in 0..50 {
            let ask = Ask {
                app: app(),
                commit: commit(),
                priority: shoal_proto::state::Priority::Low,
                max_attempts: 1,
            };
            let job = queue.submit(&ask, &by, 1).await.unwrap().job;
            queue.cancel(job.id, &by, 2).await.unwrap();
        }
        if cluster.metrics().await.contains(dropped) { Ok(()) } else { Err("not yet") }
    })
    .await;
    let mut text = Vec::new();
    while let Some(chunk) = slow.chunk().await.unwrap() {
        text.extend_from_slice(&chunk);
    }
    let text = String::from_utf8(text).unwrap();
    let last = text.trim_end().rsplit("\n\n").next().unwrap();
    assert!(last.starts_with("event: stream:slow\ndata: "), "{last}");
    let ids: Vec<i64> =
        text.lines().filter_map(|line| line.strip_prefix("id: ")?.parse().ok()).collect();
    // What it had is known, and what comes after it is there.
    let said = format!("\"after\":{}", ids.last().unwrap());
    assert!(last.contains(&said), "{last}");
    let query = only(&["build:completed"]);
    let next = ids.last().unwrap() + 2;
    let (more, _) = up_to(&operator, &query, ids.last().copied(), next).await;
    assert_eq!(more[0].id, next);
    queue.close().await;
}

fn rand_number() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(1 << 60);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// What a receiver was sent: the path, the id, the body.
type Got = Arc<Mutex<Vec<(String, String, Value)>>>;

/// A receiver on this machine: `/well` takes all, `/gone` redirects there, `/ill` never does, `/silent` never answers.
async fn receiver() -> (SocketAddr, Got) {
    async fn take(
        State(got): State<Got>,
        path: &str,
        headers: HeaderMap,
        body: Bytes,
    ) -> StatusCode {
        let id = headers["webhook-id"].to_str().unwrap().to_string();
        let body = serde_json::from_slice(&body).unwrap();
        got.lock().unwrap().push((path.to_string(), id, body));
        StatusCode::OK
    }
    let got = Got::default();
    let well =
        |state: State<Got>, headers: HeaderMap, body: Bytes| take(state, "/well", headers, body);
    let ill = async |state: State<Got>, headers: HeaderMap, body: Bytes| -> Response {
        take(state, "/ill", headers, body).await;
        StatusCode::INTERNAL_SERVER_ERROR.into_response()
    };
    let gone = async || (StatusCode::FOUND, [(header::LOCATION, "/well")]).into_response();
    let silent = async || std::future::pending::<StatusCode>().await;
    let router = Router::new()
        .route("/well", post(well))
        .route("/ill", post(ill))
        .route("/gone", post(gone))
        .route("/silent", post(silent))
        .with_state(got.clone());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    (addr, got)
}

async fn hook(operator: &Client, url: String, events: &[&str]) -> Webhook {
    let events = events.iter().map(ToString::to_string).collect();
    let request = WebhookRequest { url, app: None, events, secret: None };
    operator.add_webhook(&request).await.unwrap()
}

async fn log(operator: &Client, id: i64, status: &str, count: usize) -> Vec<WebhookDelivery> {
    wait_for(&format!("{count} deliveries of {id} to be {status}"), async || {
        let log = operator.webhook_deliveries(id, 100).await.unwrap();
        let is_so = log.iter().filter(|one| one.status == status).count() == count;
        if is_so { Ok(log) } else { Err(log) }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn webhooks_do_not_hold_each_other_up_and_are_given_up_in_the_end() {
    let more = "webhooks = { timeout_s = 0.3, retry_s = 0.05, give_up_s = 1.0 }";
    let cluster = Cluster::start_with(more).await;
    let operator = cluster.operator();
    operator.set_app(&app("web", "")).await.unwrap();
    let (addr, got) = receiver().await;
    let at = |path: &str| format!("http://{addr}/{path}");
    let silent = hook(&operator, at("silent"), &[]).await;
    let ill = hook(&operator, at("ill"), &["build:queued"]).await;
    let gone = hook(&operator, at("gone"), &["build:queued"]).await;
    let well = hook(&operator, at("well"), &["build:queued"]).await;
    let secret = well.secret.clone().unwrap();
    assert!(secret.starts_with("whsec_"));
    let listed = operator.webhooks().await.unwrap();
    assert_eq!(listed.len(), 4);
    assert!(listed.iter().all(|webhook| webhook.secret.is_none()), "said once");
    for _ in 0..3 {
        build(&operator, "web").await;
    }
    let log_of_well = log(&operator, well.id, "DELIVERED", 3).await;
    assert!(
        log_of_well.iter().all(|one| one.answer == Some(200) && one.tries == 1),
        "{log_of_well:?}"
    );
    let taken: Vec<_> =
        got.lock().unwrap().iter().filter(|one| one.0 == "/well").cloned().collect();
    assert_eq!(taken.len(), 3, "what was redirected did not get there");
    let (_, id, body) = &taken[0];
    assert_eq!((&body["type"], &body["data"]["id"]), (&json!("build:queued"), &json!(1)));
    assert_eq!(log_of_well[2].id, *id);
    for (webhook, word) in [(&silent, "in time"), (&ill, "500"), (&gone, "redirects")] {
        let log = log(&operator, webhook.id, "GIVEN_UP", 3).await;
        let reason = log[0].reason.clone().unwrap();
        assert!(reason.contains(word), "{reason}");
        assert!(log.iter().any(|one| one.tries > 1), "{log:?}");
    }
    // A test is sent at once, and kept.
    let tested = operator.test_webhook(well.id).await.unwrap();
    assert_eq!((tested.status.as_str(), tested.kind.as_str()), ("DELIVERED", "webhook:test"));
    assert_eq!(operator.webhook_deliveries(well.id, 100).await.unwrap().len(), 4);
    assert_eq!(operator.test_webhook(gone.id).await.unwrap().answer, Some(302));
    operator.remove_webhook(ill.id).await.unwrap();
    assert_eq!(refusal(operator.test_webhook(ill.id).await).0, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_was_allowed_once_may_be_no_longer() {
    let mut cluster = Cluster::start_with("webhooks = { allow_http = true }").await;
    // No such host is ever there.
    let webhook = hook(&cluster.operator(), "http://hook.invalid/".into(), &[]).await;
    cluster.stop().await;
    let config = std::fs::read_to_string(cluster.path("config.toml")).unwrap();
    let strict = config.replace("allow_http = true", "allow_http = false");
    std::fs::write(cluster.path("config.toml"), strict).unwrap();
    cluster.run().await;
    let told = cluster.operator().test_webhook(webhook.id).await.unwrap();
    let reason = told.reason.unwrap_or_default();
    assert!(reason.contains("is plain http"), "{reason}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_not_told_is_told_after_a_restart_with_the_key_it_was_sealed_with() {
    let more = "webhooks = { timeout_s = 0.3, retry_s = 0.05 }";
    let mut cluster = Cluster::start_with(more).await;
    let operator = cluster.operator();
    operator.set_app(&app("web", "")).await.unwrap();
    // Nobody listens there yet.
    let (addr, got) = receiver().await;
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let away = free.local_addr().unwrap();
    drop(free);
    let webhook = hook(&operator, format!("http://{away}/well"), &[]).await;
    build(&operator, "web").await;
    wait_for("an attempt", async || {
        let log = operator.webhook_deliveries(webhook.id, 10).await.unwrap();
        if log.iter().any(|one| one.tries > 0) { Ok(()) } else { Err(log) }
    })
    .await;
    cluster.stop().await;
    // A coordinator with another key cannot sign, and says so.
    let config = std::fs::read_to_string(cluster.path("config.toml")).unwrap();
    std::fs::write(cluster.path("other.key"), "another key").unwrap();
    let other = format!("secrets_key = '{}'\n{config}", cluster.path("other.key").display());
    std::fs::write(cluster.path("config.toml"), other).unwrap();
    cluster.run().await;
    let operator = cluster.operator();
    wait_for("the reason", async || {
        let log = operator.webhook_deliveries(webhook.id, 10).await.unwrap();
        let reason = log[0].reason.clone().unwrap_or_default();
        if reason.contains("sealed with another key") { Ok(()) } else { Err(reason) }
    })
    .await;
    cluster.stop().await;
    std::fs::write(cluster.path("config.toml"), config).unwrap();
    // Now somebody listens, at the port that nobody had.
    let listener = tokio::net::TcpListener::bind(away).await.unwrap();
    tokio::spawn(async move {
        loop {
            let Ok((mut from, _)) = listener.accept().await else { return };
            let mut to = tokio::net::TcpStream::connect(addr).await.unwrap();
            tokio::spawn(async move { tokio::io::copy_bidirectional(&mut from, &mut to).await });
        }
    });
    cluster.run().await;
    log(&cluster.operator(), webhook.id, "DELIVERED", 1).await;
    assert_eq!(got.lock().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_streams_and_webhooks_are_refused() {
    let cluster = Cluster::start().await;
    let operator = cluster.operator();
    operator.set_app(&app("web", "")).await.unwrap();
    let http = cluster.raw(Role::Operator);
    let hook = |url: &str| json!({ "url": url });
    let secret = |secret: &str| json!({ "url": "https://example.org/", "secret": secret });
    for (method, path, body, status, word) in [
        (Method::GET, "v1/events?type=build:done", json!(null), 400, "build:completed"),
        (Method::GET, "v1/events?app=none", json!(null), 404, "none"),
        (Method::GET, "v1/events?after=-1", json!(null), 400, "0 or more"),
        (Method::GET, "v1/events?after=x", json!(null), 400, "after"),
        (Method::GET, "v1/events/recent?type=x", json!(null), 400, "build:init"),
        (Method::GET, "v1/history?app=none", json!(null), 404, "none"),
        (Method::POST, "v1/webhooks", hook("http://example.org/"), 400, "plain http"),
        (Method::POST, "v1/webhooks", hook("https://me:pw@example.org/"), 400, "password"),
        (Method::POST, "v1/webhooks", hook("example"), 400, "not a URL"),
        (Method::POST, "v1/webhooks", secret("short"), 400, "16"),
        (Method::POST, "v1/webhooks", secret("whsec_*"), 400, "base64"),
        (
            Method::POST,
            "v1/webhooks",
            json!({ "url": "https://example.org/", "events": ["x"] }),
            400,
            "event type",
        ),
        (Method::DELETE, "v1/webhooks/7", json!(null), 404, "shoal webhook list"),
        (Method::GET, "v1/webhooks/7/deliveries", json!(null), 404, "shoal webhook list"),
        (Method::GET, "v1/apps/web/push", json!(null), 404, "shoal app push"),
        (Method::PUT, "v1/apps/web/push", json!({ "secret": "short" }), 400, "16"),
        (
            Method::POST,
            "v1/apps/web/auto-deploy",
            json!({ "set": "resume" }),
            409,
            "auto-deploy web on",
        ),
        (Method::POST, "v1/apps/web/auto-deploy", json!({ "set": "perhaps" }), 400, "perhaps"),
    ] {
        let url = format!("{}/{path}", cluster.url());
        let response = http.request(method, url).json(&body).send().await.unwrap();
        assert_eq!(response.status().as_u16(), status, "{path} {body}");
        let answer: Value = response.json().await.unwrap();
        let text = answer["error"]["message"].as_str().unwrap();
        assert!(text.contains(word) && !text.contains('\n'), "{path}: {text}");
        assert!(!text.contains("pw@"), "{text}");
    }
    let url = format!("{}/v1/events", cluster.url());
    let response = http.get(url).header("last-event-id", "new").send().await.unwrap();
    assert_eq!(response.status().as_u16(), 400);
    // So many streams, and no more; one that is closed makes room.
    let mut open = vec![];
    for _ in 0..64 {
        open.push(operator.follow_events(&EventQuery::default(), None).await.unwrap());
    }
    let url = format!("{}/v1/events", cluster.url());
    let response = http.get(&url).send().await.unwrap();
    assert_eq!(response.status().as_u16(), 503);
    open.pop();
    wait_for("room", async || match http.get(&url).timeout(Duration::from_secs(5)).send().await {
        Ok(response) if response.status() == 200 => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
}
