//! Bandwidth limits and the scavenger setting: from the file, by SIGHUP, and by hand.

use std::{fs, net::SocketAddr, path::PathBuf, process::Command, time::Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::harness::{Cluster, Process, SHOAL, Shape, plain_app, wait_for};

const METRICS: &str = "metrics_listen = \"127.0.0.1:0\"\n";

/// What passes a limit at once after a pause, and by how much counting may be off.
const BURST_BYTES: f64 = 1_000_000.0;

/// An agent's file as it was at first.
fn config(agent: &Process) -> PathBuf {
    let (now, first) = (agent.dir.join("config.toml"), agent.dir.join("config.first"));
    if !first.exists() {
        fs::copy(now, &first).unwrap();
    }
    first
}

/// Writes `keys` above the rest of an agent's file as it was at first, and has the agent read it.
fn reconfigure(agent: &Process, keys: &str) {
    let first = fs::read_to_string(config(agent)).unwrap();
    fs::write(agent.dir.join("config.toml"), format!("{keys}\n{first}")).unwrap();
    hang_up(agent);
}

fn hang_up(agent: &Process) {
    kill_process(Pid::from_raw(agent.pid() as i32).unwrap(), Signal::HUP).unwrap();
}

/// `shoal agent limits` with these flags, and what it prints.
pub fn limits(agent: &Process, flags: &[&str]) -> Value {
    let output = Command::new(SHOAL)
        .args(["agent", "limits", "--json", "--config", config(agent).to_str().unwrap()])
        .args(flags)
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn number(report: &Value, way: &str, what: &str) -> u64 {
    report[way][what].as_u64().unwrap()
}

async fn wait_for_limit(agent: &Process, way: &str, limit: Option<u64>) {
    wait_for(&format!("{way} to be limited to {limit:?}"), async || {
        let report = limits(agent, &[]);
        let found = report[way]["limit_bytes_per_s"].as_u64();
        if found == limit { Ok(()) } else { Err(report) }
    })
    .await;
}

async fn wait_for_line(agent: &Process, line: &str) {
    wait_for(line, async || {
        let log = agent.log();
        if log.contains(line) { Ok(()) } else { Err(log) }
    })
    .await;
}

/// The value of a metric with its labels.
async fn metric(page: SocketAddr, name: &str) -> f64 {
    let mut stream = tokio::net::TcpStream::connect(page).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await.unwrap();
    let mut said = String::new();
    stream.read_to_string(&mut said).await.unwrap();
    let value = said.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("no {name} in {said}")).parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_holds_at_once_and_a_wrong_file_changes_nothing() {
    let shape = Shape { agents: 2, agent_extra: METRICS.into(), ..Shape::default() };
    let mut cluster = Cluster::start(shape).await;
    cluster.set_app(&plain_app("data")).await;
    let file = cluster.random_file("file", 24 << 20, 6);
    let page = cluster.agents[0].address("metrics").await;
    let seed = &cluster.agents[0];
    let import = ["agent", "import", file.to_str().unwrap(), "--config"];
    let imported = Command::new(SHOAL).args(import).arg(config(seed)).output().unwrap();
    assert!(imported.status.success(), "{imported:?}");
    let artifact = cluster.publish("data", &file).await;

    reconfigure(seed, "up_limit = \"2MB/s\"\nscavenger = true");
    wait_for_limit(seed, "up", Some(2_000_000)).await;
    wait_for_line(seed, "up_limit was none and is 2.0 MB/s, scavenger was false and is true").await;
    assert_eq!(limits(seed, &[])["scavenger"], true);
    let limit = "shoal_agent_limit_bytes_per_second{way=\"up\"}";
    assert_eq!(metric(page, limit).await, 2e6);
    assert_eq!(metric(page, "shoal_agent_scavenger").await, 1.0);

    let rollout = cluster.deploy("data", &artifact.name).await;
    let seed = &cluster.agents[0];
    // No more passes than the limit says, as counted between two looks.
    let look = |least: u64| async move {
        wait_for("the seed to be held back", async || {
            let report = limits(seed, &[]);
            let passed = number(&report, "up", "passed_bytes");
            if passed >= least && number(&report, "up", "held_back_bytes") > 0 {
                Ok((passed, Instant::now()))
            } else {
                Err(report)
            }
        })
        .await
    };
    let began = Instant::now();
    let (first, _) = look(1).await;
    let (second, at) = look(first + (4 << 20)).await;
    let most = 2e6 * at.duration_since(began).as_secs_f64() + BURST_BYTES;
    assert!(((second - first) as f64) < most, "{} of {most} bytes", second - first);
    assert!(second < file.metadata().unwrap().len(), "it is in the middle of the transfer");

    // Files that are wrong: each is told of in the log, and the limit stays.
    for (wrong, told) in [
        ("up_limit = ", "is not TOML"),
        ("up_limit = \"1MB/s\"", "at least 2.0 MB/s"),
        ("up_limit = \"9MB\"", "is not a rate"),
        ("up_limitt = \"9MB/s\"", "up_limitt"),
    ] {
        reconfigure(seed, wrong);
        wait_for_line(seed, told).await;
        assert_eq!(number(&limits(seed, &[]), "up", "limit_bytes_per_s"), 2_000_000);
    }
    // By hand it is changed until the file is read again.
    let report = limits(seed, &["--up-limit", "24Mbit/s"]);
    assert_eq!(number(&report, "up", "limit_bytes_per_s"), 3_000_000);
    assert_eq!(report["scavenger"], true, "what is not named stays");
    // What needs a restart is named.
    reconfigure(seed, "up_limit = \"1GB/s\"\nkeep_builds = 7");
    wait_for_limit(seed, "up", Some(1_000_000_000)).await;
    wait_for_line(seed, "keep_builds has changed: it needs a restart of the agent").await;
    assert!(!seed.log().contains("up_limit has changed"));

    let rollout = cluster.rollout_succeeds(rollout.id).await;
    assert_eq!(cluster.current("m2", "data"), fs::read(&file).unwrap());
    let region = &rollout.regions.values().next().unwrap();
    assert!(region.origin_copies < 0.5, "the seed was waited for: {region:?}");
    let sent = metric(page, "shoal_agent_sent_bytes_total").await;
    assert!(sent < 1.1 * (24 << 20) as f64, "{sent} bytes: a slow seed is no stalled one");
    let held = "shoal_agent_held_back_bytes_total{way=\"up\"}";
    wait_for("the metrics to tell it", async || {
        let bytes = metric(page, held).await;
        if bytes > 0.0 { Ok(()) } else { Err(bytes) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_read_and_received_keeps_to_its_limits() {
    let extra = "origin_limit = \"3MB/s\"\ndown_limit = \"32Mbit/s\"\n";
    let shape = Shape { agents: 2, agent_extra: format!("{extra}{METRICS}"), ..Shape::default() };
    let cluster = Cluster::start(shape).await;
    cluster.set_app(&plain_app("data")).await;
    let file = cluster.random_file("file", 12 << 20, 7);
    let artifact = cluster.publish("data", &file).await;
    let began = Instant::now();
    let rollout = cluster.deploy("data", &artifact.name).await;
    let rollout = cluster.rollout_succeeds(rollout.id).await;
    let region = &rollout.regions.values().next().unwrap();
    assert!(region.origin_copies < 1.05, "{region:?}");
    let mut read = 0;
    for agent in &cluster.agents {
        assert_eq!(cluster.current(&agent.name, "data"), fs::read(&file).unwrap());
        let report = limits(agent, &[]);
        assert_eq!(number(&report, "origin", "limit_bytes_per_s"), 3_000_000);
        assert_eq!(number(&report, "down", "limit_bytes_per_s"), 4_000_000);
        assert!(number(&report, "down", "passed_bytes") >= 12 << 20, "{report}");
        assert!(number(&report, "down", "held_back_bytes") > 0, "{report}");
        let passed = number(&report, "down", "passed_bytes") as f64;
        let most = 4e6 * began.elapsed().as_secs_f64() + BURST_BYTES;
        assert!(passed < most, "{passed} of {most} bytes");
        read += number(&report, "origin", "passed_bytes");
    }
    assert!((12 << 20..13 << 20).contains(&read), "{read} bytes read from the bucket");
}

#[test]
fn a_wrong_limit_gets_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("agent.toml");
    let settings = "identity = 'x'\ndata_dir = '/no/such'\nbucket = 'z'\n";
    fs::write(&file, format!("{settings}down_limit = '1MB/s'\n")).unwrap();
    let run = |args: &[&str]| {
        let output = Command::new(SHOAL).args(args).arg("--config").arg(&file).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).trim().to_string())
    };
    let (code, text) = run(&["agent"]);
    assert_eq!((code, text.lines().count()), (Some(2), 1), "{text}");
    assert!(text.contains("agent.toml") && text.contains("at least 2.0 MB/s"), "{text}");
    let (code, text) = run(&["agent", "--up-limit", "fast"]);
    assert_eq!(code, Some(2), "{text}");
    assert!(text.contains("'fast' is not a rate"), "{text}");
    fs::write(&file, settings).unwrap();
    let (code, text) = run(&["agent", "limits"]);
    assert_eq!((code, text.lines().count()), (Some(1), 1), "{text}");
    assert!(text.contains("no agent runs on /no/such"), "{text}");
}
