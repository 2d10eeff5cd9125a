//! Tokens and roles: every route of the table, by everybody who may and who may not call it.

use std::collections::BTreeSet;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use shoal_client::{
    Client,
    types::{PublishRequest, TokenRequest},
};
use shoal_coordinator::RouteInfo;
use shoal_pki::Role;
use shoal_proto::state::{MachineState, TokenRole};

use crate::harness::*;

impl Cluster {
    /// Makes a token, for one app or for all, and returns its secret.
    pub(crate) async fn token(&self, name: &str, role: TokenRole, app: Option<&str>) -> String {
        let request = TokenRequest {
            name: name.parse().unwrap(),
            role,
            apps: app.map(|app| BTreeSet::from([app.parse().unwrap()])),
            expires_in_s: None,
        };
        self.operator().create_token(&request).await.unwrap().secret
    }

    pub(crate) fn by_token(&self, secret: &str) -> Client {
        Client::with_token(&[self.url()], &self.ca_pem(), secret).unwrap()
    }
}

/// What a route is called with: its query and its body, about the app `web`.
fn sample(route: &RouteInfo) -> (String, String) {
    let app = || json!({ "app": "web" });
    let with = |mut body: Value, key: &str, value: &str| {
        body[key] = value.into();
        body.to_string()
    };
    let zeros = "0".repeat(64);
    let body = match (route.method.as_str(), route.path) {
        ("PUT", "/v1/apps/{app}") => {
            serde_json::to_string(&crate::harness::app("web", "")).unwrap()
        }
        ("POST", "/v1/jobs") => with(app(), "commit", SHA),
        ("POST", "/v1/publish") => {
            json!({ "app": "web", "artifact": zeros, "encoding": zeros }).to_string()
        }
        ("POST", "/v1/deployments") => with(app(), "artifact", "web/x"),
        ("POST", "/v1/rollbacks") => app().to_string(),
        ("PUT", "/v1/apps/{app}/push") => json!({ "secret": "0123456789abcdef" }).to_string(),
        ("POST", "/v1/apps/{app}/auto-deploy") => json!({ "set": "on" }).to_string(),
        ("POST", "/v1/gc") => json!({ "app": "web", "keep": 1 }).to_string(),
        ("POST", "/v1/pins" | "/v1/unpin" | "/v1/inspections") => {
            json!({ "artifact": "web/named" }).to_string()
        }
        ("DELETE", _) => String::new(),
        ("POST", path) if path.contains("{job}") || path.contains("{rollout}") => String::new(),
        _ => "{".into(),
    };
    let query = match route.path {
        "/v1/artifact" => "?ref=web/named",
        "/v1/region/goals" => "?after=0&wait_s=0",
        "/v1/trust" => "?after=0",
        // One that is refused: a stream has no end.
        "/v1/events" => "?app=web&after=-1",
        _ => "",
    };
    (query.into(), body)
}

/// A route's path with something in the place of each variable.
fn path(route: &RouteInfo, artifact: &str) -> String {
    let parts = route.path.split('/').map(|part| {
        let zeros = "0".repeat(64);
        match part {
            "{app}" => "web".into(),
            "{job}" | "{rollout}" | "{webhook}" | "{id}" => "1".into(),
            "{worker}" => "w1".into(),
            "{region}" => "eu".into(),
            "{token}" => "nobodys".into(),
            "{object}" => "index".into(),
            "{artifact}" | "{encoding}" => zeros,
            other if other.starts_with('{') => panic!("what shall stand for {other}?"),
            other => other.to_string(),
        }
    });
    let (query, _) = sample(route);
    parts.collect::<Vec<_>>().join("/") + &query.replace("web/named", artifact)
}

/// An app with a job, an artifact, a rollout and a machine; returns the artifact's name.
async fn something_of_web(cluster: &Cluster) -> String {
    let operator = cluster.operator();
    operator.set_app(&app("web", "")).await.unwrap();
    operator.set_app(&app("other", "")).await.unwrap();
    build(&operator, "web").await;
    let artifact = publish(&operator, "web", &cut(1, 2)).await;
    deployable(&operator, &artifact.name).await;
    let rollout = deploy(&operator, "web", &artifact.name).await.unwrap();
    let seen = state("m1", "web", rollout.revision, MachineState::Fetching);
    report(&cluster.region("eu"), vec![machine("m1", "web")], vec![seen]).await;
    artifact.name
}

async fn call(
    http: &reqwest::Client,
    url: &str,
    route: &RouteInfo,
    token: Option<&str>,
    body: String,
) -> (StatusCode, String, Value) {
    let method: Method = route.method.parse().unwrap();
    let request = http.request(method, url).body(body);
    let request = token.into_iter().fold(request, |request, token| request.bearer_auth(token));
    let response = request.send().await.unwrap();
    let (status, headers) = (response.status(), response.headers().clone());
    let text = response.text().await.unwrap();
    let value: Value = serde_json::from_str(&text).unwrap_or_default();
    if !status.is_success() {
        let message = value["error"]["message"].as_str().unwrap_or_default();
        assert!(!message.is_empty() && !message.contains('\n'), "{} {url}: {text}", route.method);
        assert!(value["error"]["code"].is_string(), "{text}");
    }
    if status == 401 && route.path != "/v1/certificate/renew" {
        assert_eq!(headers["www-authenticate"], "Bearer");
    }
    (status, text, value)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_refuses_whoever_may_not_call_it() {
    use TokenRole::{Admin, Deployer, Viewer};
    let cluster = Cluster::start_with("loss_window_s = 60").await;
    let artifact = something_of_web(&cluster).await;
    let mut tokens = Vec::new();
    for role in [Viewer, Deployer, Admin] {
        tokens.push((role, cluster.token(role.as_str(), role, None).await));
    }
    let revoked = cluster.token("revoked", Admin, None).await;
    cluster.operator().revoke_token(&"revoked".parse().unwrap()).await.unwrap();
    let nobodys = format!("shoal_{}", "0".repeat(64));
    let bare = cluster.without_certificate();
    let roles = [Role::Operator, Role::Worker, Role::Region, Role::Agent, Role::Coordinator];
    let certified: Vec<_> = roles.map(|role| (role, cluster.raw(role))).into_iter().collect();
    let routes = shoal_coordinator::api_routes();
    assert!(routes.len() > 35);
    for route in &routes {
        let what = format!("{} {}", route.method, route.path);
        let url = format!("{}{}", cluster.url(), path(route, &artifact));
        // A body that is none: whoever gets as far as the handler changes nothing.
        let status = async |http: &reqwest::Client, token: Option<&str>| {
            call(http, &url, route, token, "{".into()).await.0
        };
        let is_open = route.role.is_none() && route.certificate.is_none();
        let none = status(&bare, None).await;
        let wanted = match route.path {
            "/v1/openapi.json" | "/v1/trust" => 200,
            // These prove who calls in a way of their own, by what is no proof here.
            "/v1/hooks/github" | "/v1/hooks/gitlab" | "/v1/join" => 400,
            // Its body is looked at first: it takes none.
            "/v1/certificate/renew" => 400,
            _ => 401,
        };
        assert_eq!(none, wanted, "{what} without anything");
        if is_open {
            continue;
        }
        for wrong in [&revoked, &nobodys, "", "shoal_", "x"] {
            assert_eq!(status(&bare, Some(wrong)).await, 401, "{what} with '{wrong}'");
            // A certificate doesn't make up for a wrong token.
            assert_eq!(status(&certified[0].1, Some(wrong)).await, 401, "{what}, certified");
        }
        for (role, token) in &tokens {
            let may = route.role.is_some_and(|least| *role >= least);
            let got = status(&bare, Some(token)).await;
            assert_eq!(got != 403, may, "{what} with a token of {role}: {got}");
            assert_ne!(got, 401, "{what} with a token of {role}");
        }
        for (role, http) in &certified {
            // An operator's certificate is an admin; others are for their own routes.
            let may = match route.certificate {
                Some(of) => *role == of,
                None => *role == Role::Operator,
            };
            let got = status(http, None).await;
            assert_eq!(got != 403, may, "{what} with a certificate of {role}: {got}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_an_app_neither_sees_nor_changes_others() {
    let cluster = Cluster::start_with("loss_window_s = 60").await;
    let artifact = something_of_web(&cluster).await;
    let bound = cluster.token("bound", TokenRole::Admin, Some("other")).await;
    let bare = cluster.without_certificate();
    let before = cluster.operator().audit(&Default::default(), 1_000).await.unwrap();
    let mut apart = 0;
    for route in shoal_coordinator::api_routes() {
        if route.role.is_none() {
            continue;
        }
        let what = format!("{} {}", route.method, route.path);
        let url = format!("{}{}", cluster.url(), path(&route, &artifact));
        let body = sample(&route).1.replace("web/named", &artifact);
        let (status, text, _) = call(&bare, &url, &route, Some(&bound), body).await;
        if route.fleet {
            assert_eq!(status, 403, "{what} is about the whole fleet");
        } else if status == 200 {
            // A list has nothing of the app in it, and can't be asked for it.
            assert!(!text.contains("web"), "{what} tells of web: {text}");
            if text.contains("\"items\"") && !["/v1/apps", "/v1/pins"].contains(&route.path) {
                apart += 1;
                let url = format!("{url}?app=web");
                assert_eq!(call(&bare, &url, &route, Some(&bound), String::new()).await.0, 403);
            }
        } else if !route.path.starts_with("/v1/uploads") {
            assert_eq!(status, 403, "{what}: {text}");
        }
    }
    assert_eq!(apart, 6, "lists by app");
    let after = cluster.operator().audit(&Default::default(), 1_000).await.unwrap();
    assert_eq!(before.len(), after.len(), "nothing was changed");
    // Its own app it may change, and its rows tell who did.
    let client = cluster.by_token(&bound);
    client.set_app(&app("other", "")).await.unwrap();
    let job = build(&client, "other").await;
    assert_eq!(client.jobs(None, 10).await.unwrap().len(), 1);
    assert_eq!(client.job(job.id).await.unwrap().requested_by, "token:bound");
    let whoami = client.whoami().await.unwrap();
    assert_eq!((whoami.name.as_str(), whoami.role), ("token:bound", TokenRole::Admin));
    // The same bytes are its own by its own name.
    let theirs = cluster.operator().artifact(&artifact).await.unwrap();
    let id = theirs.artifact.to_string();
    assert_eq!(refusal(client.artifact(&id).await).0, 403);
    let (artifact, encoding) = (theirs.artifact, theirs.encoding);
    let request = PublishRequest { app: "other".parse().unwrap(), artifact, encoding };
    client.publish(&request).await.unwrap();
    assert_eq!(client.artifact(&id).await.unwrap().app.as_str(), "other");
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_end_when_they_are_revoked_or_expire() {
    let cluster = Cluster::start().await;
    let operator = cluster.operator();
    let request = TokenRequest {
        name: "short".parse().unwrap(),
        role: TokenRole::Viewer,
        apps: None,
        expires_in_s: Some(1),
    };
    let short = operator.create_token(&request).await.unwrap();
    let long = cluster.token("long", TokenRole::Viewer, None).await;
    let by_long = cluster.by_token(&long);
    by_long.apps().await.unwrap();
    let by_short = cluster.by_token(&short.secret);
    wait_for("the token to expire", async || match by_short.apps().await {
        Err(error) if error.code() == Some("unauthorized") => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    operator.revoke_token(&"long".parse().unwrap()).await.unwrap();
    // The very next call, over a connection that was good a moment ago.
    let refused = refusal(by_long.apps().await);
    assert!(refused.0 == 401 && refused.2.contains("revoked"), "{refused:?}");
    let tokens = operator.tokens().await.unwrap();
    assert!(tokens[1].last_used_at_ms.is_some() && tokens[1].revoked_by.is_some());
    // What is kept is no secret, and no answer repeats it.
    let files = std::fs::read(cluster.path("data/shoal.sqlite")).unwrap();
    let wal = std::fs::read(cluster.path("data/shoal.sqlite-wal")).unwrap_or_default();
    for secret in [&short.secret, &long] {
        let found =
            |bytes: &[u8]| bytes.windows(secret.len()).any(|part| part == secret.as_bytes());
        assert!(!found(&files) && !found(&wal));
    }
    for (name, apps, expires_in_s) in [
        ("none", Some(BTreeSet::new()), None),
        ("never", None, Some(0)),
        ("ever", None, Some(u32::MAX)),
    ] {
        let name = name.parse().unwrap();
        let request = TokenRequest { name, role: TokenRole::Viewer, apps, expires_in_s };
        assert_eq!(refusal(operator.create_token(&request).await).0, 400);
    }
    assert_eq!(refusal(operator.create_token(&request).await).0, 409, "the name is taken");
}
