//! The API and the command line as people use them: a login by token, and a property-based client that tries every
//! operation of the OpenAPI document.

use std::{
    fs,
    io::Write as _,
    path::Path,
    process::{Command, Output, Stdio},
};

use serde_json::Value;
use shoal_client::types::{App, BuildRequest, TokenRequest};
use shoal_pki::Role;
use shoal_proto::state::TokenRole;
use shoal_test_postgres::Database;

use crate::{
    harness::{Cluster, SHOAL, Shape, plain_app},
    postgres::plain_get,
};

/// A command of an operator whose home is `home`, who has no certificate.
fn shoal(home: &Path, args: &[&str], stdin: &str) -> Output {
    let mut command = Command::new(SHOAL);
    command.args(args).env_remove("SHOAL_IDENTITY").env_remove("SHOAL_COORDINATOR");
    command
        .env_remove("SHOAL_CONFIG")
        .env("HOME", home)
        .env("XDG_CONFIG_HOME", home.join("config"));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // An error says that the command has ended without reading: its output tells why.
    let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
    child.wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What a command that succeeds prints as JSON.
fn json(home: &Path, args: &[&str]) -> Value {
    let output = shoal(home, args, "");
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The one line with which a command fails: it is refused, or nobody may do it who asks.
fn refused(home: &Path, args: &[&str], stdin: &str) -> String {
    let output = shoal(home, args, stdin);
    let code = output.status.code();
    assert!(matches!(code, Some(1 | 4)), "{args:?}: {code:?} {}", text(&output.stdout));
    let said = text(&output.stderr);
    assert_eq!(said.trim().lines().count(), 1, "{said}");
    said
}

fn only_a_coordinator() -> Shape {
    Shape { region_processes: 0, agents: 0, ..Shape::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_logs_in_with_a_token_and_works_without_a_certificate() {
    let cluster = Cluster::start(only_a_coordinator()).await;
    let home = tempfile::tempdir().unwrap();
    let (home, url) = (home.path(), format!("https://{}", cluster.api));
    let ca = home.join("ca.pem");
    fs::write(&ca, cluster.keys.ca.cert_pem()).unwrap();
    let ca = ca.to_str().unwrap();
    let login = ["login", "--coordinator", &url, "--ca", ca];

    let said = refused(home, &["app", "list"], "x").to_string() + &refused(home, &["jobs"], "");
    assert!(said.contains("shoal login"), "{said}");
    // The first token is made with a certificate.
    let identity = cluster.root().join("operator");
    let identity = identity.to_str().unwrap();
    let by_certificate = ["--identity", identity, "--coordinator", &url, "--json"];
    let create = [&["token", "create", "root", "--role", "admin"][..], &by_certificate].concat();
    let root = json(home, &create)["secret"].as_str().unwrap().to_string();

    assert!(refused(home, &login, "").contains("no token on standard input"));
    let wrong = format!("shoal_{}", "0".repeat(64));
    assert!(refused(home, &login, &wrong).contains("unknown"));
    let file = home.join("config/shoal/login.json");
    assert!(!file.exists(), "what is good for nothing is not stored");
    let output = shoal(home, &login, &format!("{root}\n"));
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(!text(&output.stdout).contains(&root) && !text(&output.stderr).contains(&root));
    let mode = std::os::unix::fs::MetadataExt::mode(&fs::metadata(&file).unwrap());
    assert_eq!(mode & 0o777, 0o600);

    let whoami = json(home, &["whoami", "--json"]);
    assert_eq!((&whoami["name"], &whoami["role"]), (&"token:root".into(), &"admin".into()));
    let published = ["app", "set", "web", "--selector", "role=web", "--json"];
    assert_eq!(json(home, &published)["name"], "web");
    let made = shoal(home, &["token", "create", "ci", "--role", "viewer", "--app", "web"], "");
    let ci = text(&made.stdout).trim().to_string();
    assert!(ci.starts_with("shoal_") && ci.len() == 70, "{ci}");
    let tokens = json(home, &["token", "list", "--json"]);
    assert_eq!(tokens.as_array().unwrap().len(), 2);
    assert!(!tokens.to_string().contains(&ci[6..]));

    // Another login, in a file of its own.
    let other = home.join("other.json");
    let other = ["--config", other.to_str().unwrap()];
    let output = shoal(home, &[&login[..], &other].concat(), &ci);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let said = refused(home, &[&["build", "web", commit][..], &other].concat(), "");
    assert!(said.contains("deployer"), "{said}");
    let said = refused(home, &[&["regions"][..], &other].concat(), "");
    assert!(said.contains("bound to web"), "{said}");
    assert_eq!(json(home, &[&["status", "--json"][..], &other].concat())[0]["app"], "web");
    assert_eq!(json(home, &["token", "revoke", "ci", "--json"])["revoked_by"], "token:root");
    let said = refused(home, &[&["status"][..], &other].concat(), "");
    assert!(said.contains("revoked"), "{said}");

    let rows = json(home, &["audit", "--who", "token:root", "--json"]);
    let what: Vec<_> = rows.as_array().unwrap().iter().map(|row| row["what"].clone()).collect();
    assert_eq!(what, ["token.revoke", "token.create", "app.set"]);
    assert!(text(&shoal(home, &["audit", "--app", "web"], "").stdout).contains("127.0.0.1"));
    let shown = text(&shoal(home, &["token", "list", "--all"], "").stdout);
    assert!(shown.contains("revoked") && shown.contains("viewer"), "{shown}");

    // No log has a token.
    for secret in [&root, &ci] {
        for path in crate::harness::walk(cluster.root(), &|path| {
            path.extension().is_some_and(|e| e == "log")
        }) {
            assert!(!fs::read_to_string(&path).unwrap_or_default().contains(&secret[6..]));
        }
    }
    assert!(shoal(home, &["logout"], "").status.success());
    assert!(refused(home, &["whoami"], "").contains("who are you"));
    assert!(refused(home, &["logout"], "").contains("nobody is logged in"));
}

/// How many calls of each operation schemathesis makes up by chance, beside its systematic ones.
const EXAMPLES: &str = "25";

/// What is checked of every answer. That every body which fits its schema is taken is not: schemas can't say that an
/// artifact must be there.
const CHECKS: &str = "not_a_server_error,status_code_conformance,content_type_conformance,\
    response_headers_conformance,response_schema_conformance,negative_data_rejection,missing_required_header,\
    unsupported_method,allow_header_conformance,use_after_free,ensure_resource_availability,ignored_auth";

/// What stands for a path's variable in the run that finds what is there.
const THERE: &str = r#"
[parameters]
"path.app" = "web"
"path.job" = 1
"path.rollout" = 1
"path.region" = "r1"
"path.worker" = "m1"
"path.token" = "m1"
"query.app" = "web"
"#;

/// Tries every operation whose path fits, as its caller would be.
fn schemathesis(cluster: &Cluster, paths: &str, config: &str, credential: &[&str]) {
    let (ca, file) = (cluster.root().join("ca.pem"), cluster.root().join("schemathesis.toml"));
    fs::write(&ca, cluster.keys.ca.cert_pem()).unwrap();
    fs::write(&file, config).unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../.ci/schemathesis");
    let url = format!("https://{}/v1/openapi.json", cluster.api);
    let mut command = Command::new(script);
    // It writes what it has found into the directory that it runs in.
    command.current_dir(cluster.root()).args([
        "--config-file",
        file.to_str().unwrap(),
        "run",
        &url,
    ]);
    command.args(["--seed", "1", "--checks", CHECKS, "--max-examples", EXAMPLES]);
    command.args(["--include-path-regex", paths, "--tls-verify", ca.to_str().unwrap()]);
    command.args(["--no-color", "--warnings", "off", "--suppress-health-check", "all"]);
    // A connection that the server closes while the next call is on its way is tried again, as by any client.
    command.args(["--request-timeout", "30", "--request-retries", "2"]).args(credential);
    let output = command.output().unwrap();
    let said = text(&output.stdout) + &text(&output.stderr);
    assert!(output.status.success(), "{said}");
    let cases = said.lines().filter(|line| line.contains(" generated, "));
    println!("{paths}: {}", cases.collect::<String>().trim());
}

/// Calls by status, for one route.
async fn answers(cluster: &mut Cluster, route: &str, status: u16) -> u64 {
    let page = plain_get(cluster.coordinator.address("metrics").await).await;
    let name =
        format!("shoal_coordinator_api_requests_total{{route=\"{route}\",status=\"{status}\"}} ");
    page.lines().find_map(|line| line.strip_prefix(&name)?.parse().ok()).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_api_is_what_its_document_says() {
    let database = Database::create().await.unwrap();
    let coordinator_extra = format!(
        "database = '{}'\nlong_poll_s = 0.01\nmetrics_listen = '127.0.0.1:0'",
        database.url()
    );
    let mut cluster = Cluster::start(Shape { coordinator_extra, ..only_a_coordinator() }).await;
    let request = TokenRequest {
        name: "tester".parse().unwrap(),
        role: TokenRole::Admin,
        apps: None,
        expires_in_s: None,
    };
    let secret = cluster.client.create_token(&request).await.unwrap().secret;
    let header = format!("Authorization: Bearer {secret}");
    // By whoever builds, so that an app is there and a job.
    // A stream of events has no end that could be waited for.
    let of_people = "^/v1/(?!worker/|region/|events$)";
    let app = App { repository: "/nowhere".into(), ..plain_app("web") };
    let app = App { build_command: "make".into(), output: "out".into(), ..app };
    cluster.client.set_app(&app).await.unwrap();
    let commit = "0123456789abcdef0123456789abcdef01234567".parse().unwrap();
    cluster.client.build(&BuildRequest::new(app.name.clone(), commit)).await.unwrap();
    schemathesis(&cluster, of_people, "", &["--header", &header]);
    schemathesis(&cluster, of_people, THERE, &["--header", &header]);
    for (role, region, paths) in
        [(Role::Worker, None, "^/v1/worker/"), (Role::Region, Some("r1"), "^/v1/region/")]
    {
        let dir = cluster.root().join(role.to_string());
        cluster.keys.issue(&dir, role, "m1", region);
        let file = |name: &str| dir.join(name).display().to_string();
        let (certificate, key) = (file("identity.pem"), file("identity.key"));
        let credential = ["--request-cert", &certificate, "--request-cert-key", &key];
        schemathesis(&cluster, paths, "", &credential);
    }
    // It got somewhere: calls were answered well, behind the token and the certificates.
    for route in [
        "/v1/jobs",
        "/v1/jobs/{job}",
        "/v1/jobs/{job}/cancel",
        "/v1/apps/{app}",
        "/v1/regions/{region}/drain",
        "/v1/tokens",
        "/v1/tokens/{token}/revoke",
        "/v1/audit",
        "/v1/whoami",
        "/v1/region/reports",
    ] {
        assert!(answers(&mut cluster, route, 200).await > 0, "{route} was never answered well");
    }
    drop(cluster);
    database.remove().await.unwrap();
}
