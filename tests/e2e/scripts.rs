//! What a script may rely on: exit codes, one line on stderr, whole JSON on stdout, and an end when nobody reads.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _},
    path::Path,
    process::{Command, Output, Stdio},
};

use serde_json::Value;
use shoal_client::types::BuildRequest;
use shoal_pki::{ClientAuth, Credentials, Role};
use shoal_proto::{
    AppName,
    state::{JobStatus, TokenRole},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    task::JoinHandle,
};
use tokio_rustls::TlsAcceptor;

use crate::harness::{Cluster, Keys, Repo, SHOAL, Shape, script_app};

/// `shoal` without a coordinator or an identity of the environment's.
fn shoal(home: &Path) -> Command {
    let mut command = Command::new(SHOAL);
    for name in ["SHOAL_COORDINATOR", "SHOAL_IDENTITY", "SHOAL_CONFIG", "SHOAL_LOG"] {
        command.env_remove(name);
    }
    command.env("XDG_CONFIG_HOME", home);
    command
}

/// Checks a failure's exit code, that nothing is on stdout, and that stderr is one line; returns the line.
fn failed(output: &Output, code: i32) -> String {
    let said = String::from_utf8_lossy(&output.stderr).trim().to_string();
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(output.stdout.is_empty(), "{said}");
    assert!(said.starts_with("shoal: ") && said.lines().count() == 1, "{said}");
    said
}

fn small() -> Shape {
    Shape { regions: 2, region_processes: 1, agents: 1, workers: 1, ..Shape::default() }
}

/// A cluster with an app `web` of which a commit is built, and the job's name.
async fn with_a_build() -> (Cluster, String) {
    let cluster = Cluster::start(small()).await;
    let repo = Repo::new(cluster.root().join("repo"));
    cluster.set_app(&script_app("web", &repo.path)).await;
    let request = BuildRequest::new(AppName::new("web").unwrap(), repo.commit_version("one"));
    let job = cluster.client.build(&request).await.unwrap();
    assert_eq!(cluster.job_ends(job.id).await.status, JobStatus::Succeeded);
    cluster.deployable(&job.name).await;
    (cluster, job.name)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_command_that_reads_prints_json() {
    let (cluster, name) = with_a_build().await;
    cluster.shoal(&["deploy", "web", &name, "--wait"]);
    let commit = cluster.client.job(1).await.unwrap().commit.to_string();
    let config = cluster.agents[0].dir.join("config.toml").display().to_string();
    let commands: &[&[&str]] = &[
        &["build", "web", &commit, "--follow"],
        &["jobs"],
        &["job", "1"],
        &["job", "1", "--log"],
        &["job", "1", "--follow"],
        &["artifacts"],
        &["artifact", &name],
        &["replication"],
        &["replication", &name],
        &["deploy", "web", &name, "--wait"],
        &["status"],
        &["history"],
        &["events"],
        &["machines"],
        &["machines", "--failed"],
        &["regions"],
        &["drain", "r2", "--reason", "flood"],
        &["undrain", "r2"],
        &["workers"],
        &["queue", "status"],
        &["queue", "pause"],
        &["queue", "resume"],
        &["pin", &name],
        &["pins"],
        &["unpin", &name],
        &["gc", "--dry-run", "--keep", "1"],
        &["audit"],
        &["app", "list"],
        &["app", "show", "web"],
        &["app", "auto-deploy", "web"],
        &["token", "create", "t", "--role", "viewer"],
        &["token", "list"],
        &["token", "revoke", "t"],
        &["webhook", "list"],
        &["join-token", "list"],
        &["pki", "status"],
        &["whoami"],
        &["agent", "limits", "--config", &config],
    ];
    for command in commands {
        let text = cluster.shoal(&[command, &["--json"][..]].concat());
        let read: Result<Value, _> = serde_json::from_str(&text);
        assert!(read.is_ok(), "{command:?}: {text}");
    }
    // The log is the same, as text and in JSON.
    let log: Value =
        serde_json::from_str(&cluster.shoal(&["job", "1", "--log", "--json"])).unwrap();
    assert_eq!(log["log"], cluster.shoal(&["job", "1", "--log"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_region_s_drain_says_why_wherever_it_is_shown() {
    let cluster = Cluster::start(small()).await;
    cluster.shoal(&["drain", "r2", "--reason", "flood in the hall"]);
    for command in [&["regions"][..], &["replication"], &["audit", "--subject", "r2"]] {
        let text = cluster.shoal(command);
        assert!(text.contains("flood in the hall"), "{command:?}: {text}");
    }
    let text = cluster.shoal(&["undrain", "r2"]) + &cluster.shoal(&["replication"]);
    assert!(!text.contains("flood"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn exit_codes_say_what_may_be_done() {
    let cluster = Cluster::start(small()).await;
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let (api, identity) = (format!("https://{}", cluster.api), cluster.root().join("operator"));
    let run = |args: &[&str]| {
        let connected = ["--coordinator", &api, "--identity", identity.to_str().unwrap()];
        shoal(home).args(args).args(connected).output().unwrap()
    };
    // 1: refused, with what to do; with --json, too.
    for args in [&["status", "none"][..], &["job", "99"], &["job", "99", "--log"], &["drain", "r9"]]
    {
        let said = failed(&run(args), 1);
        assert!(said.contains("shoal app set") || said.contains("lists them"), "{said}");
        failed(&run(&[args, &["--json"][..]].concat()), 1);
    }
    assert!(failed(&run(&["publish", "/nowhere", "--app", "x"]), 1).contains("no app 'x'"));
    // 2: wrong usage.
    for args in [&["status", "--jsno"][..], &["build", "web", "main"], &["jobs", "--limit", "0"]] {
        assert!(failed(&run(args), 2).contains("--help says more"));
    }
    // 3: nobody answers.
    let away = ["status", "--coordinator", "https://127.0.0.1:1", "--identity"];
    let said = failed(&shoal(home).args(away).arg(&identity).output().unwrap(), 3);
    assert!(said.contains("Connection refused") && said.ends_with("right?"), "{said}");
    // 4: nobody, somebody who may not, and one of another cluster.
    failed(&shoal(home).args(["status", "--coordinator", &api]).output().unwrap(), 4);
    let agent = cluster.agents[0].dir.join("identity");
    let as_one = |of: &Path| {
        shoal(home).args(&away[..1]).args(["--coordinator", &api, "--identity"]).arg(of).output()
    };
    assert!(failed(&as_one(&agent).unwrap(), 4).contains("role operator"));
    let eve = home.join("eve");
    Keys::new("other").issue(&eve, Role::Operator, "eve", None);
    assert!(failed(&as_one(&eve).unwrap(), 4).contains("UnknownIssuer"));
    // Nobody waits for that to pass.
    for wait in [&["status", "--watch"][..], &["events", "--follow"], &["job", "1", "--follow"]] {
        let mut command = shoal(home);
        command.args(wait).args(["--coordinator", &api, "--identity"]).arg(&eve);
        assert!(failed(&command.output().unwrap(), 4).contains("UnknownIssuer"));
    }
    // The same whichever is asked last: the one that distrusts, or one that is away.
    for both in [["https://127.0.0.1:1", &api], [&api, "https://127.0.0.1:1"]] {
        let mut command = shoal(home);
        command.args(&away[..1]).args(["--coordinator", &both.join(","), "--identity"]).arg(&eve);
        assert!(failed(&command.output().unwrap(), 4).contains("UnknownIssuer"));
    }
    let made: Value = serde_json::from_str(
        &cluster.shoal(&["token", "create", "t", "--role", "viewer", "--json"]),
    )
    .unwrap();
    assert_eq!(made["token"]["role"], TokenRole::Viewer.as_str());
    let login = home.join("shoal");
    fs::create_dir_all(&login).unwrap();
    let stored = serde_json::json!({
        "coordinators": [api], "ca": cluster.keys.ca.cert_pem(), "token": made["secret"],
    });
    let file = login.join("login.json");
    fs::write(&file, stored.to_string()).unwrap();
    fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let by_token = |args: &[&str]| shoal(home).args(args).output().unwrap();
    assert!(by_token(&["status"]).status.success());
    assert!(failed(&by_token(&["drain", "r2"]), 4).contains("takes the role admin"));
    cluster.shoal(&["token", "revoke", "t"]);
    assert!(failed(&by_token(&["status"]), 4).contains("revoked"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_ends_when_nobody_reads_it_any_more() {
    let (cluster, _) = with_a_build().await;
    let follow: &[&[&str]] = &[
        &["status", "--watch"],
        &["status", "--watch", "--json"],
        &["events", "--follow", "--after", "0"],
    ];
    for args in follow {
        let mut command = Command::new(SHOAL);
        command.args(*args).env("SHOAL_COORDINATOR", format!("https://{}", cluster.api));
        command.env("SHOAL_IDENTITY", cluster.root().join("operator"));
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(!line.trim().is_empty(), "{args:?}");
        if args.contains(&"events") {
            // It has no reason to write until something happens.
            cluster.client.pause_queue(&Default::default()).await.unwrap();
            let commit = cluster.client.job(1).await.unwrap().commit;
            let request = BuildRequest::new(AppName::new("web").unwrap(), commit);
            cluster.client.build(&request).await.unwrap();
        }
        // Waits for its end, which would never come; the test's own limit is the runner's.
        let status = tokio::task::spawn_blocking(move || {
            let mut said = String::new();
            child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
            (child.wait().unwrap(), said)
        });
        let (status, said) = status.await.unwrap();
        assert!(status.success() && said.is_empty(), "{args:?}: {status} {said}");
    }
    // Nor does it matter that nobody reads what went wrong.
    let mut command = Command::new(SHOAL);
    command.args(["status", "none"]).env("SHOAL_COORDINATOR", format!("https://{}", cluster.api));
    command.env("SHOAL_IDENTITY", cluster.root().join("operator")).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    drop(child.stderr.take());
    assert_eq!(child.wait().unwrap().code(), Some(1));
}

/// A coordinator of another release, which answers every call with this.
async fn other_release(keys: &Keys, dir: &Path, answer: String) -> (String, JoinHandle<()>) {
    keys.issue(dir, Role::Coordinator, "c9", None);
    let (identity, trust) = shoal_process::load_identity(dir).unwrap();
    let credentials = Credentials::new(identity, trust);
    let config =
        shoal_pki::server_config(&credentials, &[b"http/1.1"], ClientAuth::Optional).unwrap();
    let acceptor = TlsAcceptor::from(std::sync::Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    let task = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let Ok(mut stream) = acceptor.accept(stream).await else { continue };
            let mut request = [0; 4096];
            let _ = stream.read(&mut request).await;
            let _ = stream.write_all(answer.as_bytes()).await;
            let _ = stream.shutdown().await;
        }
    });
    (url, task)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_of_another_release_is_named() {
    let home = tempfile::tempdir().unwrap();
    let keys = Keys::new("test");
    let identity = home.path().join("operator");
    keys.issue(&identity, Role::Operator, "alice", None);
    let unknown = r#"{"error": {"code": "not_found", "message": "no such path: /v1/status"}}"#;
    let refusal = r#"{"error": {"code": "not_found", "message": "no app 'web'"}}"#;
    let answers = [
        ("200 OK", r#"{"items": [{"ap": 1}]}"#, true),
        ("404 Not Found", unknown, true),
        // What both know has nothing to do with it.
        ("404 Not Found", refusal, false),
    ];
    for (status, body, is_named) in answers {
        let answer = format!(
            "HTTP/1.1 {status}\r\nshoal-version: 0.9.9\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.len()
        );
        let (url, task) = other_release(&keys, &home.path().join("coordinator"), answer).await;
        let mut command = shoal(home.path());
        command.args(["status", "--coordinator", &url, "--identity"]).arg(&identity);
        let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        let said = failed(&output, 1);
        let named = format!("is shoal 0.9.9 and this is {}", env!("CARGO_PKG_VERSION"));
        assert_eq!(said.contains(&named), is_named, "{said}");
        task.abort();
    }
}
