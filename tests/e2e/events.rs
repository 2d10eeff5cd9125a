//! A push that builds and deploys by itself; and what happens, told by a stream and to a webhook, whatever dies meanwhile.

use std::{collections::BTreeMap, fs, sync::Arc, time::Duration};

use aws_lc_rs::hmac;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use shoal_client::{
    Client, EventQuery, Streamed,
    types::{AutoDeploy, Event, HistoryEntry, Webhook, WebhookDelivery},
};
use shoal_proto::{
    CommitSha,
    state::{JobStatus, MachineState, ReplicationStatus, RolloutStatus},
};

use crate::harness::{Cluster, Receiver, Repo, Shape, client, script_app, wait_for};

const PUSH_SECRET: &str = "a secret that GitHub was told";
const HOOK_SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

/// A caller without a certificate, who believes the cluster's CA, as a forge would.
struct Forge {
    http: reqwest::Client,
    url: String,
}

impl Forge {
    fn new(cluster: &Cluster) -> Self {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(cluster.keys.ca.cert_der().to_vec().into()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .no_proxy()
            .timeout(Duration::from_secs(30))
            .build()
            .unwrap();
        Self { http, url: format!("https://{}/", cluster.api) }
    }

    /// Posts as GitHub does; returns the status and the answer.
    async fn github(
        &self,
        event: &str,
        delivery: &str,
        secret: &str,
        body: &Value,
    ) -> (u16, Value) {
        let body = body.to_string();
        let key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
        let tag = hmac::sign(&key, body.as_bytes());
        let tag: String = tag.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        let response = self
            .http
            .post(format!("{}v1/hooks/github", self.url))
            .header("x-github-event", event)
            .header("x-github-delivery", delivery)
            .header("x-hub-signature-256", format!("sha256={tag}"))
            .header("content-type", "application/json")
            .body(body)
            .send()
            .await
            .unwrap();
        let status = response.status().as_u16();
        (status, serde_json::from_slice(&response.bytes().await.unwrap()).unwrap())
    }

    async fn push(&self, repo: &Repo, delivery: &str, commit: &CommitSha) -> i64 {
        let body = pushed(repo, "refs/heads/main", commit);
        let (status, reply) = self.github("push", delivery, PUSH_SECRET, &body).await;
        assert_eq!((status, &reply["message"]), (200, &json!("built")), "{reply}");
        reply["builds"][0]["job"].as_i64().unwrap()
    }
}

fn pushed(repo: &Repo, reference: &str, commit: &CommitSha) -> Value {
    json!({
        "ref": reference, "after": commit.as_str(), "deleted": false,
        "repository": { "full_name": "acme/web", "clone_url": repo.path.to_str().unwrap() },
        "sender": { "login": "octocat" },
    })
}

/// Follows the stream, through its ends, until an event is as wanted; returns all that came.
async fn follow(client: &Client, after: i64, is_last: impl Fn(&Event) -> bool) -> Vec<Event> {
    let mut seen: Vec<Event> = vec![];
    wait_for("the stream's last event", async || {
        let after = seen.last().map_or(after, |event| event.id);
        let query = EventQuery::default();
        let mut stream =
            client.follow_events(&query, Some(after)).await.map_err(|error| error.to_string())?;
        while let Ok(Some(streamed)) = stream.next().await {
            let Streamed::Event(event) = streamed else { panic!("{streamed:?}") };
            seen.push(event);
            if seen.last().is_some_and(&is_last) {
                return Ok(());
            }
        }
        Err(format!("it ended after {after}"))
    })
    .await;
    seen
}

fn ended(event: &Event, kind: &str, job: i64) -> bool {
    event.kind == kind && event.job == Some(job)
}

fn check_signature(received: &crate::harness::Received) {
    let header = |name: &str| received.headers[name].clone();
    let secret = STANDARD.decode(HOOK_SECRET.strip_prefix("whsec_").unwrap()).unwrap();
    let key = hmac::Key::new(hmac::HMAC_SHA256, &secret);
    let mut content =
        format!("{}.{}.", header("webhook-id"), header("webhook-timestamp")).into_bytes();
    content.extend_from_slice(&received.body);
    let signature = header("webhook-signature");
    let tag = STANDARD.decode(signature.strip_prefix("v1,").unwrap()).unwrap();
    hmac::verify(&key, &content, &tag).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_builds_and_deploys_by_itself_and_all_are_told() {
    let receiver = Receiver::start(3).await;
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_string()
    };
    let ca = file("receiver.pem", &receiver.ca_pem);
    let shape = Shape {
        agents: 1,
        workers: 1,
        coordinator_extra: format!("webhooks = {{ ca = {ca:?}, retry_s = 0.2 }}\n"),
        ..Shape::default()
    };
    let mut cluster = Cluster::start(shape).await;
    let repo = Repo::new(cluster.root().join("repo"));
    cluster.set_app(&script_app("web", &repo.path)).await;
    let url = format!("https://{}/hook", receiver.addr);
    let hook_secret = file("hook.secret", &format!("{HOOK_SECRET}\n"));
    let added = cluster.shoal(&["webhook", "add", &url, "--secret-file", &hook_secret, "--json"]);
    let hook: Webhook = serde_json::from_str(&added).unwrap();
    assert!(!added.contains("whsec"), "a secret that was given is not said again");
    let forge = Forge::new(&cluster);

    // Before anybody says so, no push is believed.
    let commit = repo.commit_version("one");
    let main = pushed(&repo, "refs/heads/main", &commit);
    let (status, error) = forge.github("push", "d1", PUSH_SECRET, &main).await;
    assert_eq!((status, &error["error"]["code"]), (404, &json!("not_found")));
    let push_secret = file("push.secret", PUSH_SECRET);
    cluster.shoal(&["app", "push", "web", "--secret-file", &push_secret]);
    cluster.shoal(&["app", "auto-deploy", "web", "on"]);
    let (status, error) = forge.github("push", "d1", "a guess of somebody's", &main).await;
    assert_eq!((status, &error["error"]["code"]), (401, &json!("unauthorized")));
    let (status, reply) = forge.github("ping", "d0", PUSH_SECRET, &main).await;
    assert_eq!((status, &reply["message"]), (200, &json!("pong")));
    let other = pushed(&repo, "refs/heads/feature", &commit);
    let (status, reply) = forge.github("push", "d2", PUSH_SECRET, &other).await;
    assert!(
        status == 200 && reply["message"].as_str().unwrap().starts_with("ignored: "),
        "{reply}"
    );
    assert!(cluster.client.jobs(None, 10).await.unwrap().is_empty());
    // Who shows no certificate and no signature does nothing else.
    let none = forge.http.get(format!("{}v1/apps", forge.url)).send().await.unwrap();
    assert_eq!(none.status().as_u16(), 401);

    // A push: built, copied, deployed, run.
    let first = forge.push(&repo, "d1", &commit).await;
    cluster.machine_is("m1", "web", MachineState::Active).await;
    let version =
        || fs::read_to_string(cluster.agents[0].data_dir().join("run/web/version")).unwrap();
    assert_eq!(version().trim(), "one web");
    let told = follow(&cluster.client, 0, |event| ended(event, "deploy:completed", first)).await;

    // Another one, and the coordinator is killed while it is built and its webhook fails.
    receiver.fail(2);
    let slow = repo.commit(
        "sleep 2; mkdir -p out; printf '#!/bin/sh\\necho two > \"$SHOAL_RUN_DIR/version\"\\n\
         exec sleep 100000\\n' > out/app\n",
    );
    let second = forge.push(&repo, "d3", &slow).await;
    let last = told.last().unwrap().id;
    let operator = client(&cluster.root().join("operator"), cluster.api);
    let killing = async {
        wait_for("the second build to run", async || {
            let job = cluster.client.job(second).await.map_err(|error| error.to_string())?;
            if job.status == JobStatus::Running { Ok(()) } else { Err(job.status.to_string()) }
        })
        .await;
        cluster.restart_coordinator().await;
    };
    let following = follow(&operator, last, |event| ended(event, "deploy:completed", second));
    let (more, ()) = tokio::join!(following, killing);
    let job = cluster.job_ends(second).await;
    assert_eq!((job.status, job.requested_by.as_str()), (JobStatus::Succeeded, "github:octocat"));
    // The stream: every event once, in order, and none left out.
    let all: Vec<_> = told.into_iter().chain(more).collect();
    let ids: Vec<_> = all.iter().map(|event| event.id).collect();
    assert_eq!(ids, (1..=all.len() as i64).collect::<Vec<_>>());
    for job in [first, second] {
        let kinds: Vec<_> = all
            .iter()
            .filter(|event| event.job == Some(job))
            .map(|event| event.kind.as_str())
            .collect();
        let want = [
            "build:queued",
            "build:init",
            "build:completed",
            "replication:completed",
            "deploy:init",
            "deploy:completed",
        ];
        assert_eq!(kinds, want);
    }
    // The webhook: each event at least once, signed, under one id whatever failed.
    let taken = wait_for("the webhook to have all", async || {
        let mut taken: BTreeMap<i64, String> = BTreeMap::new();
        for received in receiver.got().iter().filter(|received| received.answered == 204) {
            let body: Value = serde_json::from_slice(&received.body).unwrap();
            taken.insert(
                body["data"]["id"].as_i64().unwrap(),
                received.headers["webhook-id"].clone(),
            );
        }
        if ids.iter().all(|id| taken.contains_key(id)) { Ok(taken) } else { Err(taken.len()) }
    })
    .await;
    let received = receiver.got();
    received.iter().for_each(check_signature);
    let failed: Vec<_> = received.iter().filter(|received| received.answered == 503).collect();
    assert_eq!(failed.len(), 5);
    for received in &failed {
        let body: Value = serde_json::from_slice(&received.body).unwrap();
        assert_eq!(taken[&body["data"]["id"].as_i64().unwrap()], received.headers["webhook-id"]);
    }
    let log = cluster.shoal(&["webhook", "deliveries", "1", "--limit", "100", "--json"]);
    let log: Vec<WebhookDelivery> = serde_json::from_str(&log).unwrap();
    assert!(log.iter().all(|delivery| delivery.webhook == hook.id));
    assert!(log.iter().any(|delivery| delivery.tries > 1 && delivery.status == "DELIVERED"));
    cluster.shoal(&["webhook", "test", "1"]);
    receiver.fail(1);
    assert!(cluster.shoal_fails(&["webhook", "test", "1"]).contains("503"));

    // An operator goes back: a push is built, and waits for his word.
    cluster.shoal(&["rollback", "web"]);
    let auto = cluster.shoal(&["app", "auto-deploy", "web"]);
    assert!(auto.contains("suspended") && auto.contains("tester went back to"), "{auto}");
    let third = forge.push(&repo, "d4", &repo.commit_version("three")).await;
    let job = cluster.job_ends(third).await;
    cluster.deployable(&job.name).await;
    let auto: AutoDeploy =
        serde_json::from_str(&cluster.shoal(&["app", "auto-deploy", "web", "resume", "--json"]))
            .unwrap();
    assert_eq!((auto.on, auto.suspended), (true, None));
    let last = ids.len() as i64;
    let after =
        follow(&cluster.client, last, |event| ended(event, "deploy:completed", third)).await;
    let deployed: Vec<_> = after
        .iter()
        .filter(|event| event.kind == "deploy:init")
        .map(|event| event.requested_by.as_deref().unwrap())
        .collect();
    assert_eq!(deployed, ["tester", "auto_deploy"]);
    // The same push again builds nothing.
    let again = pushed(&repo, "refs/heads/main", &job.commit);
    let (_, reply) = forge.github("push", "d4", PUSH_SECRET, &again).await;
    assert_eq!(reply["builds"], json!([{ "app": "web", "job": third, "again": true }]));

    let history: Vec<HistoryEntry> =
        serde_json::from_str(&cluster.shoal(&["history", "--app", "web", "--json"])).unwrap();
    let of = |entry: &HistoryEntry| {
        let (build, rollout) = (entry.build.as_ref().unwrap(), entry.rollout.as_ref().unwrap());
        (build.job, rollout.revision.number, rollout.rollback, rollout.requested_by.clone())
    };
    let want = [
        (third, 4, false, "auto_deploy".to_string()),
        (first, 3, true, "tester".into()),
        (second, 2, false, "auto_deploy".into()),
        (first, 1, false, "auto_deploy".into()),
    ];
    assert_eq!(history.iter().map(of).collect::<Vec<_>>(), want);
    let newest = &history[0];
    let (build, copies) = (newest.build.as_ref().unwrap(), newest.replication.as_ref().unwrap());
    let rollout = newest.rollout.as_ref().unwrap();
    assert_eq!(newest.commit.as_ref(), Some(&job.commit));
    assert_eq!(
        (build.status, build.requested_by.as_str()),
        (JobStatus::Succeeded, "github:octocat")
    );
    assert_eq!(copies.status, ReplicationStatus::Complete);
    assert_eq!(rollout.status, RolloutStatus::Succeeded);
    assert_eq!((rollout.machines, rollout.machines_ok, rollout.machines_failed), (1, 1, 0));
    assert!(build.seconds.is_some() && copies.seconds.is_some() && rollout.seconds.is_some());
    let lines = cluster.shoal(&["events", "--limit", "3"]);
    assert_eq!(lines.lines().count(), 3, "{lines}");
}
