//! The audit log: each call that changes something leaves one row that says who did what, to what, and from where.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use shoal_client::types::{AuditQuery, AuditRow};
use shoal_pki::Role;

use crate::harness::*;

/// Calls that change nothing that is kept, or whose rows other tests look at.
const APART: [(&str, &str); 7] = [
    // A message that is seen, and a look that is brought forward.
    ("POST", "/v1/webhooks/{webhook}/test"),
    ("POST", "/v1/inspections"),
    // Objects that belong to nothing yet.
    ("PUT", "/v1/uploads/{artifact}/{encoding}/{object}"),
    // They take certificates and keys: the tests of trust make them.
    ("POST", "/v1/trust/ca/begin"),
    ("POST", "/v1/trust/ca/finish"),
    ("POST", "/v1/trust/goal-key/begin"),
    ("POST", "/v1/trust/goal-key/finish"),
];

/// A call: its method, its route, what stands for the route's variable, its body, and the row that it leaves.
type Call<'a> = (&'a str, &'a str, &'a str, Value, &'a str, &'a str);

/// The calls on a cluster with an app `web`, two artifacts of it that may be deployed, and a worker and a region.
fn calls<'a>(one: &'a str, two: &'a str) -> Vec<Call<'a>> {
    let app = json!({ "app": "web" });
    let with = |key: &str, value: &str| json!({ "app": "web", key: value });
    let named = |name: &str| json!({ "artifact": name });
    vec![
        ("POST", "/v1/tokens", "", json!({ "name": "t1", "role": "viewer" }), "token.create", "t1"),
        ("POST", "/v1/tokens/{token}/revoke", "t1", json!({}), "token.revoke", "t1"),
        ("PUT", "/v1/apps/{app}", "web", json!(crate::harness::app("web", "")), "app.set", "web"),
        (
            "PUT",
            "/v1/apps/{app}/push",
            "web",
            json!({ "secret": "0123456789abcdef" }),
            "app.push",
            "web",
        ),
        ("DELETE", "/v1/apps/{app}/push", "web", json!({}), "app.push", "web"),
        (
            "POST",
            "/v1/apps/{app}/auto-deploy",
            "web",
            json!({ "set": "on" }),
            "app.auto_deploy",
            "web",
        ),
        (
            "POST",
            "/v1/apps/{app}/auto-deploy",
            "web",
            json!({ "set": "resume" }),
            "app.auto_deploy",
            "web",
        ),
        (
            "POST",
            "/v1/apps/{app}/auto-deploy",
            "web",
            json!({ "set": "off" }),
            "app.auto_deploy",
            "web",
        ),
        (
            "POST",
            "/v1/webhooks",
            "",
            json!({ "url": "https://example.org/hook" }),
            "webhook.add",
            "1",
        ),
        ("DELETE", "/v1/webhooks/{webhook}", "1", json!({}), "webhook.remove", "1"),
        ("POST", "/v1/jobs", "", with("commit", SHA), "job.submit", "web/0123456789ab-1"),
        ("POST", "/v1/jobs", "", with("commit", SHA), "job.join", "web/0123456789ab-1"),
        ("POST", "/v1/jobs/{job}/cancel", "1", json!({}), "job.cancel", "web/0123456789ab-1"),
        ("POST", "/v1/queue/pause", "", json!({}), "queue.pause", "queue"),
        ("POST", "/v1/queue/resume", "", json!({}), "queue.resume", "queue"),
        ("POST", "/v1/workers/{worker}/drain", "w1", json!({}), "worker.drain", "w1"),
        ("POST", "/v1/workers/{worker}/undrain", "w1", json!({}), "worker.undrain", "w1"),
        ("POST", "/v1/pins", "", named(one), "artifact.pin", one),
        ("POST", "/v1/unpin", "", named(one), "artifact.unpin", one),
        ("POST", "/v1/deployments", "", with("artifact", one), "app.deploy", "web"),
        ("POST", "/v1/rollouts/{rollout}/pause", "1", json!({}), "rollout.pause", "web/1"),
        ("POST", "/v1/rollouts/{rollout}/resume", "1", json!({}), "rollout.resume", "web/1"),
        ("POST", "/v1/rollouts/{rollout}/cancel", "1", json!({}), "rollout.end", "web/1"),
        ("POST", "/v1/deployments", "", with("artifact", two), "app.deploy", "web"),
        ("POST", "/v1/rollbacks", "", app, "app.rollback", "web"),
        ("POST", "/v1/regions/{region}/drain", "us", json!({}), "region.drain", "us"),
        ("POST", "/v1/regions/{region}/undrain", "us", json!({}), "region.undrain", "us"),
        (
            "POST",
            "/v1/join-tokens",
            "",
            json!({ "role": "worker", "uses": 1, "ttl_s": 60 }),
            "join_token.create",
            "",
        ),
        ("POST", "/v1/trust/revoke", "", json!({ "machine": "w1" }), "trust.revoke", "w1"),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn each_call_that_changes_something_leaves_a_row() {
    let cluster = Cluster::start_with("loss_window_s = 60\nno_machine_grace_s = 600").await;
    let operator = cluster.operator();
    operator.set_app(&app("web", "")).await.unwrap();
    let mut names = vec![];
    for seed in [1, 2] {
        let name = publish(&operator, "web", &cut(seed, 1)).await.name;
        deployable(&operator, &name).await;
        names.push(name);
    }
    // A worker is known once it has asked for a job.
    assert!(claim(&cluster.worker("w1"), 0).await.is_none());
    let http = cluster.raw(Role::Operator);
    let rows = async || operator.audit(&Default::default(), 1_000).await.unwrap();
    let mut done = BTreeSet::new();
    let mut act = async |(method, route, variable, body, what, subject): Call<'_>| {
        let last = rows().await.first().map_or(0, |row| row.id);
        let variable_name = route.split('{').nth(1).and_then(|rest| rest.split('}').next());
        let path = variable_name
            .map_or(route.to_string(), |name| route.replace(&format!("{{{name}}}"), variable));
        let request = http.request(method.parse().unwrap(), format!("{}{path}", cluster.url()));
        let answer = request.json(&body).send().await.unwrap();
        let (status, text) = (answer.status(), answer.text().await.unwrap());
        assert!(status.is_success(), "{method} {path}: {status} {text}");
        let after = rows().await;
        // What it sets off by itself is the coordinator's.
        let is_new = |row: &&AuditRow| row.id > last && row.who != "coordinator";
        let new: Vec<_> = after.iter().filter(is_new).collect();
        let [row] = &new[..] else { panic!("{method} {path} left {new:?}") };
        assert_eq!(row.what, what, "{method} {path}");
        assert!(subject.is_empty() || row.subject == subject, "{method} {path}: {row:?}");
        assert_eq!((row.who.as_str(), row.origin.as_str()), ("raw", "127.0.0.1"), "{row:?}");
        done.insert((method.to_string(), route.to_string()));
        serde_json::from_str::<Value>(&text).unwrap_or_default()
    };
    let mut join_token = String::new();
    for call in calls(&names[0], &names[1]) {
        let is_join_token = call.1 == "/v1/join-tokens";
        let answer = act(call).await;
        if is_join_token {
            join_token = answer["id"].as_str().unwrap().to_string();
        }
    }
    let revoke = ("POST", "/v1/join-tokens/{id}/revoke", join_token.as_str(), json!({}));
    act((revoke.0, revoke.1, revoke.2, revoke.3, "join_token.revoke", &join_token)).await;
    // What is published, and what nothing needs any more: a third one, which is no app's goal.
    let third = cut(3, 1);
    store(&cluster.path("main"), &third).await;
    let body = json!({ "app": "web", "artifact": third.artifact, "encoding": third.encoding });
    act(("POST", "/v1/publish", "", body, "artifact.publish", "")).await;
    let body = json!({ "app": "web", "keep": 0, "dry_run": false });
    act(("POST", "/v1/gc", "", body, "artifact.delete", "")).await;

    // Every route that could change something is in one of the lists.
    for route in shoal_coordinator::api_routes() {
        let known = (route.method.clone(), route.path.to_string());
        let is_apart = APART.contains(&(route.method.as_str(), route.path));
        assert!(
            route.method == "GET" || route.role.is_none() || is_apart || done.contains(&known),
            "{} {}: which row does it leave?",
            route.method,
            route.path
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_is_read_by_app_and_in_parts() {
    let cluster = Cluster::start_with("loss_window_s = 60").await;
    let operator = cluster.operator();
    operator.set_app(&app("web", "")).await.unwrap();
    operator.set_app(&app("other", "")).await.unwrap();
    let job = build(&operator, "web").await;
    operator.cancel_job(job.id).await.unwrap();
    operator.pause_queue(&Default::default()).await.unwrap();
    let query = AuditQuery { app: Some("web".parse().unwrap()), ..AuditQuery::default() };
    let rows = operator.audit(&query, 1_000).await.unwrap();
    let what: Vec<_> = rows.iter().rev().map(|row| row.what.as_str()).collect();
    assert_eq!(what, ["app.set", "job.submit", "job.cancel"]);
    let by = |row: &AuditRow| (row.who.clone(), row.origin.clone());
    assert!(rows.iter().all(|row| by(row) == ("alice".into(), "127.0.0.1".into())), "{rows:?}");
    let two = operator.audit(&query, 2).await.unwrap();
    assert_eq!(two.iter().map(|row| row.id).collect::<Vec<_>>(), [rows[0].id, rows[1].id]);
}
