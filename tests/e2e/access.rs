//! The API and the command line as people use them: a login by token, and a property-based client that tries every
//! operation of the OpenAPI document.

use std::{
    fs,
    io::Write as _,
    path::Path,
    process::{Command, Output, Stdio},
};

use serde_json::Value;
use shoal_client::types::TokenRequest;
use shoal_pki::Role;
use shoal_proto::state::TokenRole;
use shoal_test_postgres::Database;

use crate::harness::{Cluster, SHOAL, Shape};

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
    child.stdin.take().unwrap().write_all(stdin.as_bytes()).unwrap();
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

/// The one line with which a command fails.
fn refused(home: &Path, args: &[&str], stdin: &str) -> String {
    let output = shoal(home, args, stdin);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {}", text(&output.stdout));
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

/// Tries every operation whose path fits, as its caller would be.
fn schemathesis(cluster: &Cluster, paths: &str, credential: &[&str]) -> (bool, String) {
    let ca = cluster.root().join("ca.pem");
    fs::write(&ca, cluster.keys.ca.cert_pem()).unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../.ci/schemathesis");
    let url = format!("https://{}/v1/openapi.json", cluster.api);
    let mut command = Command::new(script);
    // It writes what it has found into the directory that it runs in.
    command.current_dir(cluster.root()).args(["run", &url, "--seed", "1", "--checks", CHECKS]);
    command.args(["--max-examples", EXAMPLES, "--include-path-regex", paths]).args(credential);
    command.args(["--tls-verify", ca.to_str().unwrap(), "--no-color", "--warnings", "off"]);
    command.args(["--request-timeout", "30", "--suppress-health-check", "all"]);
    let output = command.output().unwrap();
    (output.status.success(), text(&output.stdout) + &text(&output.stderr))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_api_is_what_its_document_says() {
    let database = Database::create().await.unwrap();
    let coordinator_extra = format!("database = '{}'\nlong_poll_s = 0.01", database.url());
    let cluster = Cluster::start(Shape { coordinator_extra, ..only_a_coordinator() }).await;
    let request = TokenRequest {
        name: "tester".parse().unwrap(),
        role: TokenRole::Admin,
        apps: None,
        expires_in_s: None,
    };
    let secret = cluster.client.create_token(&request).await.unwrap().secret;
    let header = format!("Authorization: Bearer {secret}");
    let (good, said) = schemathesis(&cluster, "^/v1/(?!worker/|region/)", &["--header", &header]);
    assert!(good, "{said}");
    println!(
        "{}",
        said.lines()
            .rev()
            .take(25)
            .collect::<Vec<_>>()
            .into_iter()
            .rev()
            .collect::<Vec<_>>()
            .join("\n")
    );
    for (role, region, paths) in
        [(Role::Worker, None, "^/v1/worker/"), (Role::Region, Some("r1"), "^/v1/region/")]
    {
        let dir = cluster.root().join(role.to_string());
        cluster.keys.issue(&dir, role, "tester", region);
        let file = |name: &str| dir.join(name).display().to_string();
        let (certificate, key) = (file("identity.pem"), file("identity.key"));
        let credential = ["--request-cert", &certificate, "--request-cert-key", &key];
        let (good, said) = schemathesis(&cluster, paths, &credential);
        assert!(good, "{said}");
    }
    drop(cluster);
    database.remove().await.unwrap();
}
