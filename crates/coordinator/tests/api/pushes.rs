//! Pushes, as forges tell them, and what starts by itself.

use aws_lc_rs::hmac;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use shoal_client::types::{AutoDeployRequest, AutoDeploySwitch, PushRequest, RollbackRequest};
use shoal_proto::state::RolloutStatus;

use crate::harness::*;

const SECRET: &str = "what the forge was told";

fn push(branch: &str, commit: &str) -> Value {
    json!({
        "object_kind": "push", "ref": format!("refs/heads/{branch}"), "after": commit,
        "user_username": "jsmith", "sender": { "login": "octocat" },
        "project": { "git_http_url": "https://git.example.org/acme/web.git" },
        "repository": { "clone_url": "https://git.example.org/acme/web.git" },
    })
}

struct Stranger<'a> {
    cluster: &'a Cluster,
    http: reqwest::Client,
}

impl Stranger<'_> {
    async fn post(&self, forge: &str, headers: &[(&str, &str)], body: Vec<u8>) -> (u16, Value) {
        let url = format!("{}/v1/hooks/{forge}", self.cluster.url());
        let mut request = self.http.post(url).body(body);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = request.send().await.unwrap();
        let status = response.status().as_u16();
        (status, response.json().await.unwrap())
    }

    async fn github(&self, delivery: &str, body: &Value) -> (u16, Value) {
        let body = body.to_string().into_bytes();
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, SECRET.as_bytes()), &body);
        let tag: String = tag.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        let signature = format!("sha256={tag}");
        let headers = [
            ("x-github-event", "push"),
            ("x-github-delivery", delivery),
            ("x-hub-signature-256", signature.as_str()),
        ];
        self.post("github", &headers, body).await
    }
}

fn sha(number: u8) -> String {
    format!("{number:02x}").repeat(20)
}

async fn with_push(cluster: &Cluster, names: &[&str]) {
    let operator = cluster.operator();
    for name in names {
        let repository = "git@git.example.org:acme/web.git".into();
        let app = shoal_client::types::App { repository, ..app(name, "") };
        operator.set_app(&app).await.unwrap();
        let request =
            PushRequest { secret: SECRET.into(), branch: "main".into(), repository: None };
        operator.set_push(&app.name, &request).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn gitlab_is_believed_by_its_token_or_its_signature() {
    let cluster = Cluster::start().await;
    with_push(&cluster, &["web", "api"]).await;
    let stranger = Stranger { cluster: &cluster, http: cluster.stranger() };
    let event = ("x-gitlab-event", "Push Hook");
    let gitlab = |number: u8| {
        let mut body = push("main", &sha(number));
        body.as_object_mut().unwrap().remove("sender");
        body.to_string().into_bytes()
    };
    let body = gitlab(1);
    let wrong = [event, ("x-gitlab-token", "a guess")];
    assert_eq!(stranger.post("gitlab", &wrong, body.clone()).await.0, 401);
    assert_eq!(stranger.post("gitlab", &[event], body.clone()).await.0, 401);
    // An app each, of one repository.
    let right = [event, ("x-gitlab-token", SECRET), ("idempotency-key", "k1")];
    let (status, reply) = stranger.post("gitlab", &right, body.clone()).await;
    assert_eq!((status, &reply["message"]), (200, &json!("built")), "{reply}");
    assert_eq!(reply["builds"].as_array().unwrap().len(), 2);
    let jobs = cluster.operator().jobs(None, 10).await.unwrap();
    assert!(jobs.iter().all(|job| job.requested_by == "gitlab:jsmith"));
    let (_, again) = stranger.post("gitlab", &right, body).await;
    assert_eq!(again["builds"][0]["again"], json!(true));
    assert_eq!(cluster.operator().jobs(None, 10).await.unwrap().len(), 2);

    // Signed: the token counts no more.
    let body = gitlab(2);
    let now_s =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    for (age_s, status) in [(0, 200), (3_600, 401)] {
        let time = (now_s - age_s).to_string();
        let mut content = format!("m1.{time}.").into_bytes();
        content.extend_from_slice(&body);
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, SECRET.as_bytes()), &content);
        let signature = format!("v1,{}", STANDARD.encode(tag.as_ref()));
        let headers = [
            event,
            ("x-gitlab-token", SECRET),
            ("webhook-id", "m1"),
            ("webhook-timestamp", time.as_str()),
            ("webhook-signature", signature.as_str()),
        ];
        let got = stranger.post("gitlab", &headers, body.clone()).await;
        assert_eq!(got.0, status, "{}", got.1);
    }
    // A tag's push, and another kind of event.
    let tag = [("x-gitlab-event", "Tag Push Hook"), ("x-gitlab-token", SECRET)];
    let (status, reply) = stranger.post("gitlab", &tag, body).await;
    assert!(
        status == 200 && reply["message"].as_str().unwrap().starts_with("ignored: "),
        "{reply}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_are_told_little_and_not_often() {
    let cluster = Cluster::start().await;
    with_push(&cluster, &["web"]).await;
    let stranger = Stranger { cluster: &cluster, http: cluster.stranger() };
    for (body, status, code) in [
        (b"no json".to_vec(), 400, "invalid"),
        (b"{}".to_vec(), 404, "not_found"),
        (vec![b' '; (8 << 20) + 1], 413, "too_long"),
    ] {
        let (got, error) = stranger.post("github", &[("x-github-event", "push")], body).await;
        assert_eq!((got, error["error"]["code"].as_str().unwrap()), (status, code), "{error}");
    }
    let mut deleted = push("main", &"0".repeat(40));
    deleted["deleted"] = json!(true);
    let (status, reply) = stranger.github("d1", &deleted).await;
    assert_eq!((status, &reply["message"]), (200, &json!("ignored: the branch was deleted")));
    let (_, reply) = stranger.github("d2", &push("main2", &sha(1))).await;
    assert_eq!(reply["message"], json!("ignored: only pushes to main are built"));
    // As a form, which GitHub sends by default.
    let json = push("main", &sha(1)).to_string();
    let form: String =
        url::form_urlencoded::Serializer::new(String::new()).append_pair("payload", &json).finish();
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, SECRET.as_bytes()), form.as_bytes());
    let tag: String = tag.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    let signature = format!("sha256={tag}");
    let headers = [
        ("x-github-event", "push"),
        ("content-type", "application/x-www-form-urlencoded"),
        ("x-hub-signature-256", signature.as_str()),
    ];
    let (status, reply) = stranger.post("github", &headers, form.into_bytes()).await;
    assert_eq!((status, &reply["message"]), (200, &json!("built")), "{reply}");
    // The secret is nowhere to be read.
    let operator = cluster.operator();
    let settings = operator.push_settings(&"web".parse().unwrap()).await.unwrap();
    assert_eq!(settings.repository, "git.example.org/acme/web");
    for file in ["data/shoal.sqlite", "data/shoal.sqlite-wal"] {
        let bytes = std::fs::read(cluster.path(file)).unwrap_or_default();
        assert!(!bytes.windows(SECRET.len()).any(|part| part == SECRET.as_bytes()), "{file}");
    }
    operator.unset_push(&"web".parse().unwrap()).await.unwrap();
    assert_eq!(stranger.github("d3", &push("main", &sha(3))).await.0, 404);
    let mut refused = None;
    for _ in 0..200 {
        let (status, error) = stranger.post("github", &[], b"{}".to_vec()).await;
        if status == 429 {
            refused = Some(error);
            break;
        }
    }
    assert_eq!(refused.unwrap()["error"]["code"], json!("too_many"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_push_brought_is_deployed_once_it_may_be() {
    let cluster = Cluster::start().await;
    with_push(&cluster, &["web"]).await;
    let (operator, worker) = (cluster.operator(), cluster.worker("w1"));
    let web = "web".parse().unwrap();
    let switch = |set| AutoDeployRequest { set };
    operator.set_auto_deploy(&web, &switch(AutoDeploySwitch::On)).await.unwrap();
    let stranger = Stranger { cluster: &cluster, http: cluster.stranger() };
    let built = async |number: u8| {
        let (_, reply) = stranger.github(&format!("d{number}"), &push("main", &sha(number))).await;
        let (claimed, lease) = claim(&worker, 5).await.unwrap();
        assert_eq!(Some(claimed.job.id), reply["builds"][0]["job"].as_i64());
        let cut = cut(number, 1);
        store(&cluster.path("main"), &cut).await;
        worker.finish(claimed.job.id, &succeeded(&lease, &cut)).await.unwrap();
        claimed.job.name
    };
    let deployed = async |name: &str| {
        wait_for(&format!("{name} to be deployed"), async || {
            let status = operator.status(Some(&web)).await.unwrap().remove(0);
            match status.rollout {
                Some(rollout) if rollout.artifact_name == name => Ok(rollout),
                other => Err(format!("{other:?}")),
            }
        })
        .await
    };
    let one = built(1).await;
    let rollout = deployed(&one).await;
    assert_eq!((rollout.requested_by.as_str(), rollout.rollback), ("auto_deploy", false));
    let two = built(2).await;
    deployed(&two).await;
    let back = RollbackRequest { app: web.clone(), artifact: Some(one.clone()) };
    operator.rollback(&back).await.unwrap();
    let auto = operator.auto_deploy(&web).await.unwrap();
    assert!(auto.on && auto.suspended.unwrap().reason.unwrap().contains("alice went back to"));
    let three = built(3).await;
    deployable(&operator, &three).await;
    operator.set_auto_deploy(&web, &switch(AutoDeploySwitch::Resume)).await.unwrap();
    deployed(&three).await;
    let history = operator.history(Some(&web), 10).await.unwrap();
    let rows: Vec<_> = history
        .iter()
        .map(|entry| {
            let rollout = entry.rollout.as_ref().unwrap();
            (entry.name.as_str(), rollout.rollback, rollout.requested_by.as_str())
        })
        .collect();
    let want = [
        (three.as_str(), false, "auto_deploy"),
        (one.as_str(), true, "alice"),
        (two.as_str(), false, "auto_deploy"),
        (one.as_str(), false, "auto_deploy"),
    ];
    assert_eq!(rows, want);
    assert_eq!(history[1].rollout.as_ref().unwrap().status, RolloutStatus::Superseded);
    assert_eq!(history[0].build.as_ref().unwrap().requested_by, "github:octocat");
}
