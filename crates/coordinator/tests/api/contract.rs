//! What callers may rely on: the document, requests that come again, pages, the audit log.

use std::path::Path;

use serde_json::{Value, json};
use shoal_client::types::Page;
use shoal_pki::Role;
use shoal_test_postgres::Database;

use crate::harness::*;

/// Where the document lies; `SHOAL_UPDATE=1` writes it anew.
const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json");

#[test]
fn the_committed_document_is_the_one_that_is_served() {
    let text = serde_json::to_string_pretty(&shoal_coordinator::openapi()).unwrap() + "\n";
    if std::env::var_os("SHOAL_UPDATE").is_some() {
        std::fs::write(DOCUMENT, &text).unwrap();
    }
    let there = std::fs::read_to_string(Path::new(DOCUMENT)).unwrap_or_default();
    assert!(
        there == text,
        "crates/coordinator/openapi.json is old: SHOAL_UPDATE=1 cargo nextest run -p shoal-coordinator document"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_document_has_every_route_and_needs_no_credential() {
    let cluster = Cluster::start().await;
    let url = format!("{}/v1/openapi.json", cluster.url());
    let answer = cluster.without_certificate().get(url).send().await.unwrap();
    assert_eq!(answer.headers()[shoal_client::VERSION_HEADER], env!("CARGO_PKG_VERSION"));
    let document: Value = answer.json().await.unwrap();
    assert_eq!(document, shoal_coordinator::openapi());
    let mut ids = std::collections::BTreeSet::new();
    for route in shoal_coordinator::api_routes() {
        let method = route.method.to_lowercase();
        let operation = &document["paths"][route.path][&method];
        let what = format!("{method} {}", route.path);
        assert!(ids.insert(operation["operationId"].as_str().expect(&what).to_string()), "{what}");
        let variables = route.path.matches('{').count();
        let parameters = operation["parameters"].as_array().cloned().unwrap_or_default();
        let in_path = parameters.iter().filter(|one| one["in"] == "path").count();
        assert_eq!(in_path, variables, "{what}");
        assert!(!operation["summary"].as_str().unwrap().is_empty(), "{what}");
    }
}

/// A POST with a key, as an operator.
struct Keyed {
    http: reqwest::Client,
    url: String,
}

impl Keyed {
    fn of(cluster: &Cluster) -> Self {
        Self { http: cluster.raw(Role::Operator), url: cluster.url() }
    }

    async fn post(&self, path: &str, key: &str, body: Value) -> (u16, bool, Value) {
        let url = format!("{}/v1/{path}", self.url);
        let request = self.http.post(url).header("Idempotency-Key", key).body(body.to_string());
        let response = request.send().await.unwrap();
        let replayed = response.headers().contains_key("idempotency-replayed");
        (response.status().as_u16(), replayed, response.json().await.unwrap())
    }
}

fn build_of(commit: &str) -> Value {
    json!({ "app": "web", "commit": commit })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_comes_again_is_answered_alike_and_not_done() {
    let cluster = Cluster::start_with("loss_window_s = 60").await;
    let (operator, keyed) = (cluster.operator(), Keyed::of(&cluster));
    operator.set_app(&app("web", "")).await.unwrap();
    let first = keyed.post("jobs", "k1", build_of(SHA)).await;
    assert_eq!((first.0, first.1), (200, false), "{}", first.2);
    let id = first.2["id"].as_i64().unwrap();
    // It has ended meanwhile, so another request would build it again.
    operator.cancel_job(id).await.unwrap();
    let again = keyed.post("jobs", "k1", build_of(SHA)).await;
    assert_eq!((again.0, again.1), (200, true));
    assert_eq!(again.2, first.2);
    assert_eq!(operator.jobs(None, 10).await.unwrap().len(), 1);
    // Another body or another path with the key is a mistake.
    let other = keyed.post("jobs", "k1", build_of(&SHA.replace('0', "1"))).await;
    assert_eq!((other.0, other.2["error"]["code"].as_str()), (422, Some("key_reused")));
    assert_eq!(keyed.post("publish", "k1", build_of(SHA)).await.0, 422);
    // Another caller's key is another key.
    let token = cluster.token("ci", shoal_proto::state::TokenRole::Deployer, None).await;
    let request = cluster.without_certificate().post(format!("{}/v1/jobs", cluster.url()));
    let request = request.header("Idempotency-Key", "k1").bearer_auth(token);
    let theirs = request.body(build_of(SHA).to_string()).send().await.unwrap();
    assert!(theirs.status() == 200 && !theirs.headers().contains_key("idempotency-replayed"));
    assert_eq!(operator.jobs(None, 10).await.unwrap().len(), 2);
    // A secret is shown once: who comes again is told so, and nothing is made twice.
    let webhook = json!({ "url": "https://127.0.0.1:1/x" });
    assert_eq!(keyed.post("webhooks", "k3", webhook.clone()).await.0, 200);
    let again = keyed.post("webhooks", "k3", webhook).await;
    let code = again.2["error"]["code"].as_str();
    assert_eq!((again.0, again.1, code), (409, true, Some("shown_once")));
    assert_eq!(operator.webhooks().await.unwrap().len(), 1);
    // A refusal has changed nothing, so it is asked anew.
    let deployment = json!({ "app": "web", "artifact": "web/none" });
    assert_eq!(keyed.post("deployments", "k2", deployment.clone()).await.0, 404);
    assert_eq!(keyed.post("deployments", "k2", build_of(SHA)).await.0, 400);
    for wrong in ["", " x", "ä", &"x".repeat(256)] {
        let url = format!("{}/v1/queue/pause", cluster.url());
        let value = reqwest::header::HeaderValue::from_bytes(wrong.as_bytes()).unwrap();
        let request = keyed.http.post(url).header("Idempotency-Key", value);
        let got = request.body("{}").send().await.unwrap().status();
        // Blanks around a header's value are no part of it.
        assert_eq!(got, if wrong == " x" { 200 } else { 400 }, "'{wrong}'");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_who_ask_with_one_key_get_one_goal() {
    let cluster = Cluster::start().await;
    let (operator, keyed) = (cluster.operator(), Keyed::of(&cluster));
    operator.set_app(&app("web", "")).await.unwrap();
    let artifact = publish(&operator, "web", &cut(1, 2)).await;
    deployable(&operator, &artifact.name).await;
    let body = json!({ "app": "web", "artifact": artifact.name });
    let calls = (0..8).map(|_| keyed.post("deployments", "one", body.clone()));
    let answers = futures::future::join_all(calls).await;
    assert!(answers.iter().all(|answer| answer.0 == 200), "{answers:?}");
    assert!(answers.iter().all(|answer| answer.2 == answers[0].2));
    assert_eq!(answers.iter().filter(|answer| !answer.1).count(), 1, "one did it");
    let again = deploy(&operator, "web", &artifact.name).await.unwrap();
    assert_eq!(again.revision.number, 2, "the eight had revision 1");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_done_before_a_crash_is_found_after_it() {
    let database = Database::create().await.unwrap();
    let line = format!("database = '{}'\nloss_window_s = 60", database.url());
    let mut cluster = Cluster::start_with(&line).await;
    let operator = cluster.operator();
    operator.set_app(&app("web", "")).await.unwrap();
    let first = Keyed::of(&cluster).post("jobs", "k1", build_of(SHA)).await;
    assert_eq!(first.0, 200);
    // As a kill between the commit and the answer leaves it: the job is there, the answer is not, and nobody's
    // beat goes on.
    cluster.stop().await;
    database.run_in("UPDATE requests SET status = NULL, body = NULL, beat = 3").await.unwrap();
    cluster.run().await;
    let operator = cluster.operator();
    operator.cancel_job(first.2["id"].as_i64().unwrap()).await.unwrap();
    let again = Keyed::of(&cluster).post("jobs", "k1", build_of(SHA)).await;
    assert_eq!((again.0, &again.2["id"]), (200, &first.2["id"]), "{}", again.2);
    assert_eq!(operator.jobs(None, 10).await.unwrap().len(), 1);
    let last = Keyed::of(&cluster).post("jobs", "k1", build_of(SHA)).await;
    assert!(last.1 && last.2 == again.2, "{}", last.2);
    cluster.stop().await;
    database.remove().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_is_answered_once() {
    let cluster = Cluster::start().await;
    let keyed = Keyed::of(&cluster);
    let body = json!({ "name": "ci", "role": "viewer" });
    let first = keyed.post("tokens", "k1", body.clone()).await;
    assert!(first.0 == 200 && first.2["secret"].as_str().unwrap().starts_with("shoal_"));
    let again = keyed.post("tokens", "k1", body).await;
    assert_eq!((again.0, again.1, &again.2["error"]["code"]), (409, true, &json!("shown_once")));
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_come_in_pages() {
    let cluster = Cluster::start_with("loss_window_s = 60").await;
    let operator = cluster.operator();
    for name in ["a", "b", "c", "d", "e"] {
        operator.set_app(&app(name, "")).await.unwrap();
        build(&operator, name).await;
    }
    let names = ["m1", "m2", "m3", "m4", "m5"];
    let machines = names.iter().map(|name| machine(name, "web")).collect();
    report(&cluster.region("eu"), machines, vec![]).await;
    let http = cluster.raw(Role::Operator);
    let get =
        async |query: &str| http.get(format!("{}/v1/{query}", cluster.url())).send().await.unwrap();
    for list in ["apps", "jobs", "status", "machines", "audit"] {
        let mut cursor = String::new();
        let mut items = Vec::new();
        loop {
            let page: Page<Value> =
                get(&format!("{list}?limit=2{cursor}")).await.json().await.unwrap();
            assert!((1..=2).contains(&page.items.len()), "{list}");
            items.extend(page.items);
            let Some(next) = page.next_cursor else { break };
            cursor = format!("&cursor={next}");
        }
        let all: Page<Value> = get(list).await.json().await.unwrap();
        assert!(all.next_cursor.is_none());
        let key = |item: &Value| [&item["id"], &item["name"], &item["app"]].map(Value::to_string);
        let keys = |items: &[Value]| items.iter().map(key).collect::<Vec<_>>();
        assert_eq!(keys(&items), keys(&all.items), "{list}");
        assert!(items.len() >= 5, "{list}");
        let other = if list == "apps" { "jobs" } else { "apps" };
        assert_eq!(get(&format!("{other}?limit=2{cursor}")).await.status(), 400, "{list}'s cursor");
    }
    for wrong in ["workers?limit=0", "regions?limit=1001", "tokens?cursor=x", "apps?limit=-1"] {
        assert_eq!(get(wrong).await.status(), 400, "{wrong}");
    }
}
