//! Processes killed at the worst moment, bytes gone bad.

use std::{fs, io::Write as _, os::unix::fs::FileExt as _, path::PathBuf};

use shoal_client::types::{App, Artifact};
use shoal_proto::{codec, peer::PeerAddr, state::MachineState};

use crate::harness::{Cluster, Shape, plain_app, wait_for, walk};

/// Large enough for two part objects.
pub const TWO_PARTS: usize = 70 << 20;

/// Takes the second part out of the bucket: where it was, and where it is.
pub fn hide_second_part(cluster: &Cluster) -> (PathBuf, PathBuf) {
    let mut parts = walk(&cluster.bucket(0), &|path| path.ends_with("part-00001"));
    let part = parts.pop().unwrap();
    let hidden = cluster.root().join("hidden");
    fs::rename(&part, &hidden).unwrap();
    (part, hidden)
}

/// Publishes a file of two parts and hides the second one, so that every fetch stops in the middle.
pub async fn stuck_in_the_middle(cluster: &Cluster) -> (Artifact, PathBuf, PathBuf, Vec<u8>) {
    cluster.set_app(&plain_app("data")).await;
    let file = cluster.random_file("big", TWO_PARTS, 7);
    let artifact = cluster.publish("data", &file).await;
    let (part, hidden) = hide_second_part(cluster);
    cluster.deploy("data", &artifact.name).await;
    let in_first = (64 << 20) / artifact.piece_size_bytes as u32;
    for agent in &cluster.agents {
        cluster
            .machine_reports(&agent.name, "data", "through with the first part", |seen| {
                seen.report.progress.pieces == in_first
            })
            .await;
    }
    let bytes = fs::read(file).unwrap();
    (artifact, part, hidden, bytes)
}

/// Waits until every agent's file is whole, without asking anybody but the disk.
pub async fn whole_on_disk(cluster: &Cluster, bytes: &[u8]) {
    for agent in &cluster.agents {
        let path = cluster.current_path(&agent.name, "data");
        wait_for(&format!("{} to have it all", agent.name), async || {
            fs::metadata(&path).map(drop).map_err(|error| error.to_string())
        })
        .await;
        assert!(cluster.current(&agent.name, "data") == bytes, "{} has other bytes", agent.name);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_killed_in_the_middle_goes_on_from_what_it_has() {
    let mut cluster = Cluster::start(Shape { agents: 1, ..Shape::default() }).await;
    let (artifact, part, hidden, bytes) = stuck_in_the_middle(&cluster).await;
    cluster.restart_agent(0).await;
    let resumed = cluster
        .machine_reports("m1", "data", "fetching again", |seen| {
            seen.report.state == MachineState::Fetching && seen.report.progress.origin_bytes == 0
        })
        .await;
    let in_first = (64 << 20) / artifact.piece_size_bytes as u32;
    assert_eq!(resumed.report.progress.pieces, in_first, "it kept what it had");
    fs::rename(&hidden, &part).unwrap();
    whole_on_disk(&cluster, &bytes).await;
    let active = cluster.machine_is("m1", "data", MachineState::Active).await;
    let rest = (TWO_PARTS as u64) - (64 << 20);
    assert_eq!(active.report.progress.origin_bytes, rest, "only the rest was fetched");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_fetch_finishes_with_the_coordinator_and_all_region_processes_dead() {
    let mut cluster = Cluster::start(Shape::default()).await;
    let (_, part, hidden, bytes) = stuck_in_the_middle(&cluster).await;
    cluster.coordinator.kill();
    for region in &mut cluster.regions {
        region.kill();
    }
    fs::rename(&hidden, &part).unwrap();
    whole_on_disk(&cluster, &bytes).await;
    // And what is back learns of it.
    cluster.restart_coordinator().await;
    for at in 0..2 {
        let text = fs::read_to_string(cluster.agents[0].dir.join("config.toml")).unwrap();
        let config: toml::Table = text.parse().unwrap();
        let listen = config["regions"][at].as_str().unwrap().parse().unwrap();
        cluster.regions[at] = cluster.start_region(0, at, &[], Some(listen));
    }
    for agent in &cluster.agents {
        cluster.machine_is(&agent.name, "data", MachineState::Active).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_restarted_with_all_region_processes_dead_finds_its_neighbours_again() {
    let mut cluster = Cluster::start(Shape::default()).await;
    let (_, part, hidden, bytes) = stuck_in_the_middle(&cluster).await;
    let remembered = cluster.agents[0].data_dir().join("neighbours.bin");
    wait_for("m1 to remember its neighbours", async || {
        let bytes = fs::read(&remembered).map_err(|error| error.to_string())?;
        let all: Vec<PeerAddr> = codec::decode(&bytes, 1 << 20).unwrap();
        if all.len() == 2 { Ok(()) } else { Err(format!("{all:?}")) }
    })
    .await;
    cluster.coordinator.kill();
    for region in &mut cluster.regions {
        region.kill();
    }
    // From now on the first agent's bucket is an empty directory: it can have the rest from neighbours only.
    cluster.agents[0].kill();
    let config = cluster.agents[0].dir.join("config.toml");
    let text = fs::read_to_string(&config).unwrap();
    let elsewhere = cluster.root().join("empty");
    fs::create_dir(&elsewhere).unwrap();
    let bucket = cluster.bucket(0);
    let changed = text.replace(bucket.to_str().unwrap(), elsewhere.to_str().unwrap());
    assert_ne!(changed, text);
    fs::write(&config, changed).unwrap();
    cluster.restart_agent(0).await;
    fs::rename(&hidden, &part).unwrap();
    whole_on_disk(&cluster, &bytes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_piece_that_is_corrupt_in_the_bucket_is_never_taken() {
    let cluster = Cluster::start(Shape { agents: 2, ..Shape::default() }).await;
    cluster.set_app(&plain_app("data")).await;
    let file = cluster.random_file("file", 4 << 20, 8);
    let artifact = cluster.publish("data", &file).await;
    let part = walk(&cluster.bucket(0), &|path| path.ends_with("part-00000")).pop().unwrap();
    let good = fs::read(&part).unwrap();
    let mut bad = good.clone();
    bad[1_000_000] ^= 1;
    fs::write(&part, &bad).unwrap();
    cluster.deploy("data", &artifact.name).await;
    for agent in &cluster.agents {
        let seen = cluster
            .machine_reports(&agent.name, "data", "all but one piece", |seen| {
                seen.report.progress.pieces == artifact.pieces - 1
            })
            .await;
        assert_eq!(seen.report.state, MachineState::Fetching);
        assert!(!cluster.current_path(&agent.name, "data").exists());
    }
    wait_for("somebody to say which piece is corrupt", async || {
        let mut reasons = vec![];
        for agent in &cluster.agents {
            let machine = cluster.machine(&agent.name).await;
            reasons.extend(machine.apps.into_iter().filter_map(|app| app.report.reason));
        }
        if reasons.iter().any(|reason| reason.contains("piece 3")) { Ok(()) } else { Err(reasons) }
    })
    .await;
    fs::write(&part, &good).unwrap();
    for agent in &cluster.agents {
        cluster.machine_is(&agent.name, "data", MachineState::Active).await;
        assert_eq!(cluster.current(&agent.name, "data"), fs::read(&file).unwrap());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_with_a_bad_disk_is_banned_and_harms_nobody() {
    let cluster = Cluster::start(Shape { agents: 2, ..Shape::default() }).await;
    let app = |selector: &str| App { selector: selector.into(), ..plain_app("data") };
    cluster.set_app(&app("machine=m1")).await;
    let file = cluster.random_file("file", 8 << 20, 8);
    let artifact = cluster.publish("data", &file).await;
    let rollout = cluster.deploy("data", &artifact.name).await;
    cluster.rollout_succeeds(rollout.id).await;
    // Every piece that m1 has goes bad, under its feet.
    let data = cluster.current_path("m1", "data").canonicalize().unwrap();
    let disk = fs::File::options().write(true).open(data).unwrap();
    for piece in 0..u64::from(artifact.pieces) {
        disk.write_all_at(b"rotten", piece * artifact.piece_size_bytes + 77).unwrap();
    }
    cluster.set_app(&app("")).await;
    cluster.deploy("data", &artifact.name).await;
    let seen = cluster.machine_is("m2", "data", MachineState::Active).await;
    assert_eq!(cluster.current("m2", "data"), fs::read(&file).unwrap());
    assert!(seen.report.progress.corrupt_pieces >= 3, "{seen:?}");
    assert!(seen.report.progress.origin_bytes > 0, "{seen:?}");
    assert!(cluster.agents[1].log().contains("banned"), "{}", cluster.agents[1].log());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_and_its_program_survive_each_other() {
    let mut cluster = Cluster::start(Shape { agents: 1, ..Shape::default() }).await;
    let mut app = plain_app("web");
    app.activation = shoal_proto::goal::Activation::Run { args: vec![] };
    cluster.set_app(&app).await;
    let script = cluster.root().join("program");
    let mut file = fs::File::create(&script).unwrap();
    file.write_all(b"#!/bin/sh\nexec sleep 100000\n").unwrap();
    let artifact = cluster.publish("web", &script).await;
    let rollout = cluster.deploy("web", &artifact.name).await;
    cluster.rollout_succeeds(rollout.id).await;
    let pid = || {
        let path = cluster.root().join("m1/data/run/web/pid");
        let text = fs::read_to_string(path).map_err(|error| error.to_string())?;
        let pid: i32 = text.split_whitespace().next().unwrap().parse().unwrap();
        Ok::<_, String>(rustix::process::Pid::from_raw(pid).unwrap())
    };
    let first = pid().unwrap();
    let alive = |pid| rustix::process::test_kill_process(pid).is_ok();
    let root = cluster.root().to_path_buf();
    let pid_now = move || {
        let text = fs::read_to_string(root.join("m1/data/run/web/pid")).unwrap_or_default();
        let pid = text.split_whitespace().next().and_then(|pid| pid.parse().ok());
        pid.and_then(rustix::process::Pid::from_raw)
    };
    cluster.restart_agent(0).await;
    cluster.machine_is("m1", "web", MachineState::Active).await;
    assert!(alive(first), "the program ran on");
    assert_eq!(pid_now(), Some(first), "and was not started twice");
    rustix::process::kill_process(first, rustix::process::Signal::KILL).unwrap();
    wait_for("the program to be started again", async || match pid_now() {
        Some(pid) if pid != first && alive(pid) => Ok(()),
        other => Err(other),
    })
    .await;
    assert!(cluster.agents[0].stop().await.success());
    assert!(alive(pid_now().unwrap()), "it outlives an agent that is stopped, too");
}
