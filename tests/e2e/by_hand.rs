//! The commands as an operator types them.

use std::process::Command;

use shoal_proto::state::MachineState;

use crate::harness::{Cluster, SHOAL, Shape, plain_app, wait_for};

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_published_deployed_and_seen() {
    let cluster = Cluster::start(Shape { agents: 2, ..Shape::default() }).await;
    cluster.shoal(&["app", "set", "data", "--selector", "half=even"]);
    let file = cluster.random_file("file", 1 << 20, 6);
    cluster.shoal(&["publish", file.to_str().unwrap(), "--app", "data", "--deploy"]);
    cluster.rollout_succeeds(1).await;
    let listed = |args: &[&str]| -> serde_json::Value {
        serde_json::from_str(&cluster.shoal(&[args, &["--json"]].concat())).unwrap()
    };
    assert_eq!(listed(&["app", "list"])[0]["name"], "data");
    assert_eq!(listed(&["status"])[0]["rollout"]["status"], "SUCCEEDED");
    assert_eq!(listed(&["machines"]).as_array().unwrap().len(), 2);
    assert_eq!(listed(&["artifacts"])[0]["deployable"], true);
    assert_eq!(listed(&["regions"])[0]["name"], "r1");
    assert_eq!(listed(&["jobs"]).as_array().unwrap().len(), 0);
    let table = cluster.shoal(&["machines"]);
    assert!(table.contains("m1") && table.contains("ACTIVE"), "{table}");
    // Published twice, it is the same artifact.
    let again = cluster.publish("data", &file).await;
    assert_eq!(listed(&["artifacts"]).as_array().unwrap().len(), 1, "{again:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_imported_file_is_seeded_and_saves_the_bucket() {
    let cluster = Cluster::start(Shape { agents: 3, ..Shape::default() }).await;
    cluster.set_app(&plain_app("data")).await;
    let file = cluster.random_file("file", 6 << 20, 6);
    let config = cluster.agents[0].dir.join("config.toml");
    let output = Command::new(SHOAL)
        .args(["agent", "import", file.to_str().unwrap(), "--config", config.to_str().unwrap()])
        .arg("--json")
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    let imported: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(imported["seeding"], true);
    let artifact = cluster.publish("data", &file).await;
    assert_eq!(imported["artifact"], artifact.artifact.to_string());
    let rollout = cluster.deploy("data", &artifact.name).await;
    let rollout = cluster.rollout_succeeds(rollout.id).await;
    let region = &rollout.regions.values().next().unwrap();
    assert!(region.origin_copies < 0.5, "{region:?}");
    assert_eq!(region.states[&MachineState::Active], 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_input_gets_one_line_and_an_exit_code() {
    let run = |args: &[&str]| {
        let output =
            Command::new(SHOAL).args(args).env_remove("SHOAL_COORDINATOR").output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).trim().to_string();
        (output.status.code(), text)
    };
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("agent.toml");
    std::fs::write(&config, "identity = 'x'\ndata_dir = 'y'\nbucket = 'z'\nlissten = 'w'\n")
        .unwrap();
    for role in ["agent", "region", "worker", "coordinator"] {
        let (code, text) = run(&[role, "--config", config.to_str().unwrap()]);
        assert_eq!(code, Some(2), "{role}: {text}");
        assert_eq!(text.lines().count(), 1, "{role}: {text}");
        assert!(text.contains("agent.toml"), "{role}: {text}");
        let (code, text) = run(&[role, "--no-such-flag"]);
        assert_eq!(code, Some(2), "{role}: {text}");
    }
    let (_, text) = run(&["agent", "--config", config.to_str().unwrap()]);
    assert!(text.contains("lissten"), "{text}");
    let (code, text) = run(&["agent", "--config", "/no/such/file.toml"]);
    assert_eq!((code, text.lines().count()), (Some(2), 1), "{text}");
    assert!(text.contains("/no/such/file.toml"), "{text}");
    let (code, text) =
        run(&["status", "--coordinator", "https://127.0.0.1:1", "--identity", "/no/such"]);
    assert_eq!((code, text.lines().count()), (Some(1), 1), "{text}");
    assert!(text.contains("/no/such"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_demo_does_what_it_promises() {
    let output = Command::new(SHOAL)
        .args(["demo", "--json", "--size", "8MiB", "--agents", "3", "--regions", "2"])
        .env("SHOAL_LOG", "warn")
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    let told: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(told["ok"], true);
    assert_eq!(told["size_bytes"], 8 << 20);
    assert_eq!(told["job"]["status"], "SUCCEEDED");
    let regions = told["regions"].as_object().unwrap();
    let active: u64 = regions.values().map(|region| region["active"].as_u64().unwrap()).sum();
    assert_eq!((regions.len(), active), (2, 3), "{told}");
    for region in regions.values() {
        assert!(region["origin_copies"].as_f64().unwrap() <= 1.1, "{told}");
    }
    // Nothing of it is left.
    wait_for("the demo's processes to be gone", async || {
        let left: Vec<String> = std::fs::read_dir("/proc")
            .unwrap()
            .flatten()
            .filter_map(|entry| std::fs::read_to_string(entry.path().join("cmdline")).ok())
            .filter(|command| command.contains("shoal-demo"))
            .collect();
        if left.is_empty() { Ok(()) } else { Err(left) }
    })
    .await;
}
