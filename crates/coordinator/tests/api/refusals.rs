//! Who may do what, and what wrong requests get.

use reqwest::Method;
use serde_json::{Value, json};
use shoal_client::types::{BuildRequest, GoalsQuery, RegionReports};
use shoal_coordinator::Args;
use shoal_pki::Role;

use crate::harness::*;

#[tokio::test(flavor = "multi_thread")]
async fn strangers_get_no_connection() {
    let (cluster, other) = (Cluster::start().await, Cluster::start().await);
    let stranger = other.identity(Role::Operator, "mallory", None);
    let client = shoal_client::Client::new(&[cluster.url()], &stranger, &cluster.trust).unwrap();
    assert!(client.apps().await.is_err());
    let none = reqwest::Client::builder().no_proxy().tls_backend_preconfigured(
        shoal_pki::client_config(
            &shoal_pki::Credentials::new(stranger, other.trust.clone()),
            &[b"http/1.1"],
        )
        .unwrap(),
    );
    assert!(none.build().unwrap().get(cluster.url()).send().await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn regions_are_those_of_the_configuration() {
    let cluster = Cluster::start().await;
    let query = GoalsQuery { after: 0, wait_s: 0, highest_epoch: 0 };
    let mars = cluster.region("mars");
    let refused = refusal(mars.goals(&query).await);
    assert!(refused.0 == 403 && refused.2.contains("[[regions]]"), "{refused:?}");
    assert_eq!(refusal(mars.report(&RegionReports::default()).await).0, 403);
    let nowhere = cluster.client(Role::Region, "p1", None);
    assert_eq!(refusal(nowhere.goals(&query).await).0, 403);
    cluster.region("eu").report(&RegionReports::default()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_requests_get_one_line_in_one_shape() {
    let cluster = Cluster::start().await;
    let operator = cluster.operator();
    operator.set_app(&app("web", "")).await.unwrap();
    let published = shoal_client::types::App {
        repository: String::new(),
        build_command: String::new(),
        output: String::new(),
        ..app("files", "")
    };
    operator.set_app(&published).await.unwrap();
    let http = cluster.raw(Role::Operator);
    let good = serde_json::to_value(app("web", "")).unwrap();
    let with = |key: &str, value: Value| {
        let mut app = good.clone();
        app[key] = value;
        app.to_string()
    };
    let plan = |key: &str, value: Value| {
        let mut plan = good["plan"].clone();
        plan[key] = value;
        with("plan", plan)
    };
    let long_address = format!("v1/jobs?app={}", "x".repeat(9_000));
    let build = |app: &str, commit: &str| json!({ "app": app, "commit": commit }).to_string();
    let cases: Vec<(Method, &str, String, u16, &str)> = vec![
        (Method::GET, "v1/nothing", String::new(), 404, "no such path"),
        (Method::GET, "v1", String::new(), 404, "no such path"),
        (Method::DELETE, "v1/apps", String::new(), 405, "DELETE"),
        (Method::GET, "v1/apps/none", String::new(), 404, "shoal app set none"),
        (Method::GET, "v1/apps/A%20B", String::new(), 400, "app name"),
        (Method::PUT, "v1/apps/web", "{".into(), 400, "wrong body"),
        (Method::PUT, "v1/apps/web", "\u{fffd}".into(), 400, "wrong body"),
        (Method::PUT, "v1/apps/api", good.to_string(), 400, "the path about api"),
        (Method::PUT, "v1/apps/web", with("selctor", json!("x")), 400, "selctor"),
        (Method::PUT, "v1/apps/web", with("selector", json!("role")), 400, "key=value"),
        (Method::PUT, "v1/apps/web", with("selector", json!(long_selector())), 400, "too long"),
        (
            Method::PUT,
            "v1/apps/web",
            with("output", json!("../secret")),
            400,
            "within the checkout",
        ),
        (Method::PUT, "v1/apps/web", with("output", json!("")), 400, "belong together"),
        (Method::PUT, "v1/apps/web", with("output", json!("a\nb")), 400, "control characters"),
        (
            Method::PUT,
            "v1/apps/web",
            with("repository", json!("--upload-pack=x")),
            400,
            "not a repository",
        ),
        (Method::PUT, "v1/apps/web", with("piece_size_bytes", json!(1000)), 400, "power of two"),
        (Method::PUT, "v1/apps/web", with("build_timeout_s", json!(0)), 400, "build_timeout_s"),
        (Method::PUT, "v1/apps/web", plan("waves_permille", json!([500, 100])), 400, "rise"),
        (Method::PUT, "v1/apps/web", plan("max_failed_permille", json!(1001)), 400, "thousandths"),
        (Method::PUT, "v1/apps/web", plan("deadline_s", json!(0)), 400, "deadline_s"),
        (Method::PUT, "v1/apps/web", plan("rollback", json!(true)), 400, "rollback"),
        (Method::PUT, "v1/apps/web", "x".repeat((1 << 20) + 1), 413, "longer than"),
        (Method::POST, "v1/jobs", build("web", "master"), 400, "not a full commit SHA"),
        (Method::POST, "v1/jobs", build("none", SHA), 404, "shoal app set none"),
        (Method::POST, "v1/jobs", build("files", SHA), 409, "no repository"),
        (Method::POST, "v1/jobs", "{}".into(), 400, "missing field"),
        (Method::POST, "v1/jobs", json!(["web", SHA, "normal"]).to_string(), 400, "JSON object"),
        (Method::POST, "v1/jobs", "null".into(), 400, "JSON object"),
        (Method::POST, "v1/jobs", String::new(), 400, "JSON object"),
        (Method::GET, "v1/jobs/%ff", String::new(), 400, "not UTF-8"),
        // Refused before anybody reads the body.
        (Method::POST, "v1/nothing", "x".repeat(32 << 20), 404, "no such path"),
        (Method::DELETE, "v1/apps", "x".repeat(32 << 20), 405, "DELETE"),
        (Method::PUT, "v1/uploads/abc/def/index", "x".repeat(32 << 20), 400, "64 hex digits"),
        (Method::POST, "v1/jobs", "x".repeat(32 << 20), 413, "longer than"),
        (
            Method::POST,
            "v1/jobs",
            json!({ "app": "web", "commit": SHA, "priority": "now" }).to_string(),
            400,
            "urgent",
        ),
        (Method::PUT, "v1/apps/web", with("max_attempts", json!(0)), 400, "max_attempts"),
        (Method::POST, "v1/queue/pause", json!({ "why": "x" }).to_string(), 400, "why"),
        (
            Method::POST,
            "v1/queue/pause",
            json!({ "reason": "x".repeat(2_001) }).to_string(),
            400,
            "longer than",
        ),
        (Method::POST, "v1/workers/none/drain", "{}".into(), 404, "shoal workers"),
        (Method::POST, "v1/workers/none/undrain", "{}".into(), 404, "shoal workers"),
        (Method::POST, "v1/workers/A%20B/drain", "{}".into(), 400, "name"),
        (Method::GET, "v1/jobs?limit=many", String::new(), 400, "limit: it is not a whole number"),
        (Method::GET, "v1/jobs?colour=red", String::new(), 400, "colour"),
        (Method::GET, "v1/jobs?app=none", String::new(), 404, "no app"),
        (Method::GET, "v1/jobs/7", String::new(), 404, "no job 7"),
        (Method::GET, "v1/jobs/x", String::new(), 400, "'x' in the address is not a number"),
        (Method::GET, "v1/jobs?limit=", String::new(), 400, "limit: it is empty"),
        (Method::GET, "v1/jobs?limit=99999999999", String::new(), 400, "limit: it is too large"),
        (Method::GET, "v1/events/recent?type=", String::new(), 400, "no event type ''"),
        (Method::GET, &long_address, String::new(), 414, "longer than"),
        (Method::GET, "v1/jobs/7/log", String::new(), 404, "no job 7"),
        (Method::POST, "v1/jobs/7/cancel", "null".into(), 404, "no job 7"),
        (Method::POST, "v1/jobs/7/cancel", "{ }".into(), 404, "no job 7"),
        (Method::POST, "v1/jobs/7/cancel", json!({ "why": 1 }).to_string(), 400, "takes none"),
        (Method::DELETE, "v1/webhooks/7", "x".into(), 400, "takes none"),
        (Method::GET, "v1/artifact", String::new(), 400, "ref"),
        (Method::GET, "v1/artifact?ref=web/none", String::new(), 404, "no artifact"),
        (Method::GET, "v1/uploads/abc/def", String::new(), 400, "64 hex digits"),
        (Method::POST, "v1/deployments", json!({ "app": "web" }).to_string(), 400, "artifact"),
        (Method::POST, "v1/rollbacks", json!({ "app": "web" }).to_string(), 409, "never deployed"),
        (Method::GET, "v1/rollouts/9", String::new(), 404, "no rollout 9"),
        (Method::POST, "v1/rollouts/9/cancel", String::new(), 404, "no rollout 9"),
        (Method::GET, "v1/status?app=none", String::new(), 404, "no app"),
        (Method::GET, "v1/machines?region=mars", String::new(), 404, "no region"),
    ];
    for (method, path, body, status, text) in cases {
        let what = format!("{method} {path} {}", body.chars().take(200).collect::<String>());
        let url = format!("{}/{path}", cluster.url());
        let response = http.request(method, url).body(body).send().await.unwrap();
        assert_eq!(response.status().as_u16(), status, "{what}");
        let body: Value = response.json().await.unwrap();
        let message = body["error"]["message"].as_str().unwrap();
        assert!(!body["error"]["code"].as_str().unwrap().is_empty());
        assert!(message.contains(text) && !message.contains('\n'), "{what}: {message}");
    }
    let unchanged = operator.app(&"web".parse().unwrap()).await.unwrap();
    assert_eq!(unchanged, app("web", ""));
    assert!(operator.jobs(None, 10).await.unwrap().is_empty());
}

/// One that no goal has room for.
fn long_selector() -> String {
    let values: Vec<_> = (0..60).map(|at| format!("a-very-long-label-value-{at}")).collect();
    format!("role={}", values.join("|"))
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_are_refused_what_they_do_not_hold() {
    let cluster = Cluster::start_with("loss_window_s = 60").await;
    let (operator, worker) = (cluster.operator(), cluster.worker("w1"));
    operator.set_app(&app("web", "")).await.unwrap();
    let job = build(&operator, "web").await;
    let (_, lease) = claim(&worker, 5).await.unwrap();
    let mut forged = lease.clone();
    forged.lease = "0".repeat(32);
    assert_eq!(refusal(worker.heartbeat(job.id, &forged).await).1, "lease_lost");
    assert_eq!(refusal(worker.heartbeat(99, &lease).await).1, "lease_lost");
    let long = vec![b'x'; (1 << 20) + 1];
    assert_eq!(refusal(worker.append_log(job.id, &lease, 0, long.into()).await).0, 413);
    let http = cluster.raw(Role::Worker);
    let url = format!("{}/v1/worker/jobs/{}/finish", cluster.url(), job.id);
    let body = json!({ "attempt": 1, "lease": lease.lease, "outcome": "exploded" });
    let response = http.post(url).body(body.to_string()).send().await.unwrap();
    assert_eq!(response.status(), 400);
    let request = BuildRequest::new("web".parse().unwrap(), SHA.parse().unwrap());
    assert_eq!(refusal(worker.build(&request).await).0, 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_cannot_work_says_why_and_does_not_start() {
    let cluster = Cluster::start().await;
    let try_with = async |change: &dyn Fn(&mut shoal_coordinator::Config)| {
        let mut config = cluster.config();
        config.data_dir = cluster.path("other");
        change(&mut config);
        let token = tokio_util::sync::CancellationToken::new();
        match shoal_coordinator::start(config, token).await {
            Ok(_) => panic!("it started"),
            Err(error) => format!("{error:#}"),
        }
    };
    let other = Cluster::start().await;
    let key = other.path("goal.key");
    let text = try_with(&|config| config.goal_key = key.clone()).await;
    assert!(text.contains("does not know the goal key"), "{text}");
    let text = try_with(&|config| config.goal_key = "/nowhere".into()).await;
    assert!(text.contains("/nowhere"), "{text}");
    let text = try_with(&|config| config.database = Some("mysql://x".into())).await;
    assert!(text.contains("mysql"), "{text}");
    let text = try_with(&|config| config.bucket = "ftp://x".into()).await;
    assert!(text.contains("main bucket"), "{text}");
    let text = try_with(&|config| config.max_attempts = 0).await;
    assert!(text.contains("max_attempts"), "{text}");
    let args = Args { config: Some("/nowhere.toml".into()), ..Args::default() };
    assert!(shoal_coordinator::run(args).await.is_err());
}
