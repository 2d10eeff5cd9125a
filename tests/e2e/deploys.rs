//! Artifacts of every size, apps side by side, goals one after the other.

use std::{
    fs,
    time::{Duration, Instant},
};

use shoal_client::{
    EventQuery,
    types::{App, DeployRequest},
};
use shoal_proto::{
    AppName,
    goal::Activation,
    goal::HealthCheck,
    state::{MachineState, RolloutStatus},
};

use crate::harness::{Cluster, Repo, Shape, plain_app, wait_for, walk};

const PIECE: usize = 256 << 10;

#[tokio::test(flavor = "multi_thread")]
async fn artifacts_of_the_odd_sizes_reach_every_machine() {
    let cluster = Cluster::start(Shape::default()).await;
    cluster.set_app(&plain_app("data")).await;
    for len in [0, 1, PIECE, PIECE + 1, 5 * PIECE - 1] {
        let file = cluster.random_file(&format!("file-{len}"), len, len as u64);
        let artifact = cluster.publish("data", &file).await;
        assert_eq!(artifact.size_bytes, len as u64);
        assert_eq!(artifact.pieces as usize, len.div_ceil(PIECE));
        let rollout = cluster.deploy("data", &artifact.name).await;
        let rollout = cluster.rollout_succeeds(rollout.id).await;
        let region = &rollout.regions.values().next().unwrap();
        if len > 0 {
            assert!(region.origin_copies >= 0.99, "{region:?}");
            assert!(region.origin_copies <= 1.1, "{region:?}");
        }
        for agent in &cluster.agents {
            assert_eq!(cluster.current(&agent.name, "data"), fs::read(&file).unwrap());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_swarm_reads_the_bucket_once_and_compressed_pieces_stay_compressed() {
    let cluster = Cluster::start(Shape { agents: 6, ..Shape::default() }).await;
    cluster.set_app(&plain_app("data")).await;
    // Half of it compresses.
    let file = cluster.random_file("big", 24 << 20, 9);
    let mut bytes = fs::read(&file).unwrap();
    bytes[12 << 20..].fill(b'x');
    fs::write(&file, &bytes).unwrap();
    let artifact = cluster.publish("data", &file).await;
    assert!(artifact.encoded_bytes < 13 << 20, "{artifact:?}");
    let rollout = cluster.deploy("data", &artifact.name).await;
    let rollout = cluster.rollout_succeeds(rollout.id).await;
    let region = &rollout.regions.values().next().unwrap();
    assert!(region.origin_copies <= 1.1, "{region:?}");
    let received = region.origin_bytes + region.peer_bytes;
    assert!(received < 6 * artifact.encoded_bytes * 13 / 10, "{region:?}");
    for agent in &cluster.agents {
        assert_eq!(cluster.current(&agent.name, "data"), bytes);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_apps_reach_just_their_machines_at_the_same_time() {
    let cluster = Cluster::start(Shape { agents: 4, ..Shape::default() }).await;
    let app = |name: &str, selector: &str| App { selector: selector.into(), ..plain_app(name) };
    cluster.set_app(&app("even", "half=even")).await;
    cluster.set_app(&app("most", "machine!=m4")).await;
    let even = cluster.publish("even", &cluster.random_file("even", 3 << 20, 1)).await;
    let most = cluster.publish("most", &cluster.random_file("most", 4 << 20, 2)).await;
    let rollouts =
        [cluster.deploy("even", &even.name).await, cluster.deploy("most", &most.name).await];
    for (rollout, machines) in rollouts.iter().zip([2, 3]) {
        let rollout = cluster.rollout_succeeds(rollout.id).await;
        assert_eq!(rollout.regions.values().map(|region| region.machines).sum::<u64>(), machines);
    }
    for (name, has) in
        [("m1", [true, true]), ("m2", [false, true]), ("m3", [true, true]), ("m4", [false, false])]
    {
        for (app, has) in ["even", "most"].iter().zip(has) {
            assert_eq!(cluster.current_path(name, app).exists(), has, "{name} {app}");
        }
    }
    // An artifact of another app is not this app's to deploy.
    let error = cluster.shoal_fails(&["deploy", "even", &most.name]);
    assert!(error.contains("even"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_deployed_is_refused_with_a_line_that_says_why() {
    let shape = Shape { regions: 2, agents: 0, region_processes: 0, ..Shape::default() };
    let cluster = Cluster::start(shape).await;
    cluster.set_app(&plain_app("data")).await;
    // A file where the second region's bucket should be: the copy cannot succeed.
    let blocked = cluster.bucket(1);
    let _ = fs::remove_dir_all(&blocked);
    fs::write(&blocked, "not a directory").unwrap();
    let file = cluster.random_file("file", 1 << 20, 3);
    let output = cluster.shoal(&["publish", file.to_str().unwrap(), "--app", "data", "--json"]);
    let artifact: shoal_client::types::Artifact = serde_json::from_str(&output).unwrap();
    let error = cluster.shoal_fails(&["deploy", "data", &artifact.name]);
    assert!(error.contains("r2"), "{error}");
    let error = cluster.shoal_fails(&["deploy", "data", "data/000000000000-9"]);
    assert!(error.contains("data/000000000000-9"), "{error}");
    let error = cluster.shoal_fails(&["deploy", "nobody", &artifact.name]);
    assert!(error.contains("nobody"), "{error}");
    let error = cluster.shoal_fails(&["rollback", "data"]);
    assert!(error.contains("data"), "{error}");
    // Drained, the region holds nothing up; the bucket there again, it catches up.
    cluster.shoal(&["drain", "r2"]);
    cluster.deployable(&artifact.name).await;
    fs::remove_file(&blocked).unwrap();
    cluster.shoal(&["undrain", "r2"]);
    let artifact = cluster.deployable(&artifact.name).await;
    assert_eq!(artifact.replication.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_goal_takes_over_in_the_middle_of_a_fetch() {
    let cluster = Cluster::start(Shape::default()).await;
    cluster.set_app(&plain_app("data")).await;
    let first = cluster.publish("data", &cluster.random_file("first", 70 << 20, 1)).await;
    let second_file = cluster.random_file("second", 2 << 20, 2);
    let second = cluster.publish("data", &second_file).await;
    // The first artifact's second part is not to be had: its fetch stops in the middle.
    let part = walk(&cluster.bucket(0), &|path| {
        path.ends_with("part-00001") && path.to_str().unwrap().contains(&first.artifact.to_string())
    });
    let hidden = cluster.root().join("hidden");
    fs::rename(&part[0], &hidden).unwrap();
    let stuck = cluster.deploy("data", &first.name).await;
    cluster
        .machine_reports("m1", "data", "in the middle", |seen| {
            seen.report.progress.pieces > 0 && seen.report.state == MachineState::Fetching
        })
        .await;
    let rollout = cluster.deploy("data", &second.name).await;
    cluster.rollout_succeeds(rollout.id).await;
    assert_eq!(cluster.rollout_ends(stuck.id).await.status, RolloutStatus::Superseded);
    for agent in &cluster.agents {
        assert_eq!(cluster.current(&agent.name, "data"), fs::read(&second_file).unwrap());
        let kept = agent.data_dir().join("store/artifacts").join(first.artifact.to_string());
        wait_for("the unfinished artifact to be removed", async || {
            if kept.exists() { Err("still there") } else { Ok(()) }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_does_not_start_well_goes_back_to_the_one_before() {
    let cluster = Cluster::start(Shape { workers: 1, ..Shape::default() }).await;
    let repo = Repo::new(cluster.root().join("repo"));
    let app = App {
        health: Some(HealthCheck {
            command: "grep -q good \"$SHOAL_RUN_DIR/version\"".into(),
            timeout_s: 2,
        }),
        activation: Activation::Run { args: vec![] },
        ..crate::harness::script_app("web", &repo.path)
    };
    cluster.set_app(&app).await;
    let mut names = vec![];
    for version in ["good", "bad"] {
        let commit = repo.commit_version(version);
        let app = AppName::new("web").unwrap();
        let request = shoal_client::types::BuildRequest::new(app, commit);
        let job = cluster.client.build(&request).await.unwrap();
        names.push(cluster.job_ends(job.id).await.name);
    }
    cluster.deployable(&names[0]).await;
    cluster.deployable(&names[1]).await;
    let good = cluster.deploy("web", &names[0]).await;
    let good = cluster.rollout_succeeds(good.id).await;
    let bad = cluster.deploy("web", &names[1]).await;
    assert_eq!(cluster.rollout_ends(bad.id).await.status, RolloutStatus::Failed);
    for agent in &cluster.agents {
        let report = cluster.machine_is(&agent.name, "web", MachineState::RolledBack).await;
        assert!(report.report.reason.unwrap().contains("not healthy"));
        let bytes = cluster.current(&agent.name, "web");
        assert_eq!(*blake3::hash(&bytes).as_bytes(), good.artifact.0);
        let version = agent.data_dir().join("run/web/version");
        assert_eq!(fs::read_to_string(version).unwrap().trim(), "good web");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollout_in_waves_activates_the_first_machines_first() {
    let cluster =
        Cluster::start(Shape { agents: 4, region_processes: 1, ..Shape::default() }).await;
    let gate = cluster.root().join("gate");
    let mut app = plain_app("web");
    app.plan.waves_permille = vec![250];
    app.activation =
        Activation::Command { command: format!("test -e {} || sleep 0.1", gate.display()) };
    app.health =
        Some(HealthCheck { command: format!("test -e {}", gate.display()), timeout_s: 120 });
    cluster.set_app(&app).await;
    let artifact = cluster.publish("web", &cluster.random_file("web", 1 << 20, 4)).await;
    let rollout = cluster.deploy("web", &artifact.name).await;
    let count = async |state: MachineState| {
        let rollout = cluster.client.rollout(rollout.id).await.unwrap();
        rollout
            .regions
            .values()
            .map(|region| region.states.get(&state).copied().unwrap_or(0))
            .sum::<u64>()
    };
    wait_for("one machine to activate and three to wait", async || {
        let seen = (count(MachineState::Activating).await, count(MachineState::Verified).await);
        if seen == (1, 3) { Ok(()) } else { Err(seen) }
    })
    .await;
    // Paused, it stays where it is when its first machine is well; what went on is told.
    let said = cluster.shoal(&["rollout", "pause", "web"]);
    assert!(said.contains("PAUSED"), "{said}");
    wait_for("the region process to hear of it", async || {
        let log = cluster.regions[0].log();
        if log.contains("no further wave opens") { Ok(()) } else { Err(log) }
    })
    .await;
    let open = cluster.client.rollout(rollout.id).await.unwrap();
    let open = open.regions.values().next().unwrap().open_permille;
    assert!(open.is_some_and(|open| open < 1_000), "{open:?}");
    fs::write(&gate, "").unwrap();
    wait_for("the first machine to be well", async || match count(MachineState::Active).await {
        1 => Ok(()),
        other => Err(other),
    })
    .await;
    // For as long as several polls of who waits for a wave, it stays so.
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(3) {
        assert_eq!(count(MachineState::Active).await, 1);
    }
    assert!(cluster.shoal(&["rollout", "resume", "web"]).contains("RUNNING"));
    cluster.rollout_succeeds(rollout.id).await;
    let wanted = [
        "deploy:init",
        "deploy:wave",
        "deploy:paused",
        "deploy:resumed",
        "deploy:wave",
        "deploy:completed",
    ];
    // What happened is numbered, and told, a moment after it happened.
    let events = wait_for("all of it to be told", async || {
        let events = cluster.client.events(&EventQuery::default(), 1_000).await.unwrap();
        let told = events.iter().rev().map(|event| event.kind.as_str());
        let told: Vec<_> = told.filter(|kind| kind.starts_with("deploy:")).collect();
        if told == wanted { Ok(events) } else { Err(format!("{told:?}")) }
    })
    .await;
    let waves: Vec<_> = events.iter().rev().filter_map(|event| event.open_permille).collect();
    assert!(waves[0] < 1_000 && waves[1] == 1_000, "{waves:?}");
    let refused = cluster.shoal_fails(&["rollout", "cancel", "web"]);
    assert!(refused.contains("SUCCEEDED"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollout_ends_also_when_a_machine_never_reports() {
    let mut cluster = Cluster::start(Shape { agents: 2, ..Shape::default() }).await;
    let mut app = plain_app("data");
    app.plan.deadline_s = 4;
    cluster.set_app(&app).await;
    let artifact = cluster.publish("data", &cluster.random_file("file", 1 << 20, 5)).await;
    cluster.agents[1].kill();
    let request = DeployRequest { app: AppName::new("data").unwrap(), artifact: artifact.name };
    let rollout = cluster.client.deploy(&request).await.unwrap();
    let rollout = cluster.rollout_ends(rollout.id).await;
    assert_eq!(rollout.status, RolloutStatus::Failed, "{rollout:?}");
    let states = &rollout.regions.values().next().unwrap().states;
    assert_eq!(states.get(&MachineState::Unreachable), Some(&1), "{rollout:?}");
    assert_eq!(states.get(&MachineState::Active), Some(&1), "{rollout:?}");
}
