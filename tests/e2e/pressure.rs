//! What presses on a machine while it fetches: other fetches, upgrades, a disk that fills.

use std::{collections::BTreeMap, fs, path::PathBuf};

use shoal_client::types::App;
use shoal_proto::state::MachineState;
use shoal_test_peers::Manner;
use shoal_transport::Endpoint;

use crate::{
    faults::{TWO_PARTS, hide_second_part, stuck_in_the_middle, whole_on_disk},
    harness::{Cluster, Process, Shape, ip, own_network, plain_app, wait_for},
    limits::limits,
    peers,
};

const METRICS: &str = "metrics_listen = \"127.0.0.1:0\"\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_small_urgent_artifact_overtakes_a_large_one() {
    const LARGE: usize = 112 << 20;
    const SMALL: usize = 32 << 20;
    // In turns the large one gains as much as the small one meanwhile, and more. So it gains what is under way when the small
    // one begins, and one piece at a time beside it.
    const GAINS_MOST: u64 = SMALL as u64 / 4 * 3;
    let agent_extra = format!("down_limit = \"2MB/s\"\n{METRICS}");
    let mut cluster = Cluster::start(Shape { agent_extra, ..Shape::default() }).await;
    cluster.set_app(&App { priority: 200, ..plain_app("web") }).await;
    cluster.set_app(&plain_app("data")).await;
    let small = cluster.random_file("small", SMALL, 11);
    let small = cluster.publish("web", &small).await;
    let large = cluster.random_file("large", LARGE, 12);
    let bytes = fs::read(&large).unwrap();
    let large = cluster.publish("data", &large).await;
    cluster.deploy("data", &large.name).await;
    for agent in &cluster.agents {
        cluster
            .machine_reports(&agent.name, "data", "under way", |seen| {
                seen.report.progress.pieces > 0
            })
            .await;
    }
    let mut before = Vec::new();
    for agent in &mut cluster.agents {
        before.push(received(agent).await);
    }
    let rollout = cluster.deploy("web", &small.name).await;
    let mut left: Vec<usize> = (0..cluster.agents.len()).collect();
    wait_for("all to have the small one", async || {
        for at in std::mem::take(&mut left) {
            let agent = &mut cluster.agents[at];
            if !agent.log().contains("app=web revision=1.1 state=VERIFIED") {
                left.push(at);
                continue;
            }
            let gained = (received(agent).await - before[at]).saturating_sub(SMALL as u64);
            println!("the large one gained {gained} bytes on {}", agent.name);
            assert!(gained <= GAINS_MOST, "the large one gained {gained} bytes on {}", agent.name);
        }
        if left.is_empty() { Ok(()) } else { Err(left.clone()) }
    })
    .await;
    cluster.rollout_succeeds(rollout.id).await;
    for agent in &cluster.agents {
        cluster.machine_is(&agent.name, "data", MachineState::Fetching).await;
        limits(agent, &["--down-limit", "none"]);
    }
    whole_on_disk(&cluster, &bytes).await;
}

/// What an agent received, of all artifacts.
async fn received(agent: &mut Process) -> u64 {
    let mut fetched = Fetched::default();
    fetched.add(agent).await;
    fetched.bytes
}

/// What an agent's lives fetched, by its metrics when nothing was under way.
#[derive(Default)]
struct Fetched {
    bytes: u64,
    origin_bytes: u64,
}

impl Fetched {
    async fn add(&mut self, agent: &mut Process) {
        let origin = agent.metric("shoal_agent_received_bytes_total{source=\"origin\"}").await;
        let peers = agent.metric("shoal_agent_received_bytes_total{source=\"peer\"}").await;
        self.bytes += origin + peers;
        self.origin_bytes += origin;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_restarted_one_after_the_other_fetch_nothing_twice() {
    let shape = Shape { agents: 4, agent_extra: METRICS.into(), ..Shape::default() };
    let mut cluster = Cluster::start(shape).await;
    let (artifact, part, hidden, bytes) = stuck_in_the_middle(&cluster).await;
    let mut fetched: BTreeMap<String, Fetched> = BTreeMap::new();
    let in_first = (64 << 20) / artifact.piece_size_bytes as u32;
    for at in 0..cluster.agents.len() {
        let name = cluster.agents[at].name.clone();
        fetched.entry(name.clone()).or_default().add(&mut cluster.agents[at]).await;
        // As an upgrade does: told to stop, and started anew. The third one goes amid the others' fetching.
        if at == 2 {
            fs::rename(&hidden, &part).unwrap();
        }
        assert!(cluster.agents[at].stop().await.success(), "{name}");
        cluster.restart_agent(at).await;
        cluster
            .machine_reports(&name, "data", "going on", |seen| {
                seen.report.progress.pieces >= in_first || seen.report.state == MachineState::Active
            })
            .await;
    }
    whole_on_disk(&cluster, &bytes).await;
    let mut origin_bytes = 0;
    for agent in &mut cluster.agents {
        let all = fetched.entry(agent.name.clone()).or_default();
        all.add(agent).await;
        origin_bytes += all.origin_bytes;
        // What it asked of the kernel for its packets is told, too, and no more is given.
        let asked = agent.metric("shoal_agent_udp_buffer_bytes{which=\"asked\"}").await;
        let given = agent.metric("shoal_agent_udp_buffer_bytes{which=\"receive\"}").await;
        assert!(asked >= 1 << 20 && (1..=asked).contains(&given), "{given} of {asked}");
        let copies = all.bytes as f64 / artifact.encoded_bytes as f64;
        assert!((0.99..=1.1).contains(&copies), "{} fetched {copies:.3} copies", agent.name);
    }
    let copies = origin_bytes as f64 / artifact.encoded_bytes as f64;
    assert!((0.99..=1.1).contains(&copies), "{copies:.3} copies of the bucket in all");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_path_that_carries_less_in_mid_transfer_is_used_with_less() {
    if !own_network("pressure::a_path_that_carries_less_in_mid_transfer_is_used_with_less") {
        return;
    }
    ip("link set lo mtu 9000 up");
    let mut cluster = Cluster::start(Shape::default()).await;
    let (artifact, part, hidden, bytes) = stuck_in_the_middle(&cluster).await;
    // Somebody who looks on: jumbo packets pass.
    let watcher = peers::setup(&mut cluster, "m9", &artifact, Manner::Silent).await;
    let (watcher, _incoming) = Endpoint::bind(&watcher.endpoint).unwrap();
    for agent in &mut cluster.agents {
        let (data, node) = (agent.address("data").await, peers::identity(&agent.dir).member().node);
        let connection = watcher.connect(data, node).await.unwrap();
        wait_for("jumbo packets", async || match connection.stats().mtu {
            8_900.. => Ok(()),
            mtu => Err(mtu),
        })
        .await;
    }
    watcher.shutdown().await;
    ip("link set lo mtu 1500");
    fs::rename(&hidden, &part).unwrap();
    whole_on_disk(&cluster, &bytes).await;
    for agent in &cluster.agents {
        cluster.machine_is(&agent.name, "data", MachineState::Active).await;
        // The connections that stood were used on: none was lost but the watcher's, which was closed.
        let log = agent.log();
        let mut lost = log.lines().filter(|line| line.contains("neighbour gone"));
        assert!(lost.all(|line| line.contains("machine=m9")), "{log}");
    }
}

/// An agent whose pieces lie on a disk of its own of this size, seen through the process that has it mounted.
struct SmallDisk {
    agent: Process,
    disk: PathBuf,
}

impl SmallDisk {
    async fn start(cluster: &mut Cluster, name: &str, mib: u64) -> Self {
        let agent = cluster.start_agent(name, "").await;
        let dir = agent.dir.clone();
        drop(agent);
        let store = dir.join("data/store");
        let user: &[&str] =
            if rustix::process::geteuid().is_root() { &[] } else { &["--user", "--map-root-user"] };
        let mount =
            format!("mount -t tmpfs -o size={mib}m none '{}' && exec \"$@\"", store.display());
        let before = [&["unshare", "--mount"], user, &["sh", "-c", &mount, "sh"]].concat();
        let mut agent = Process::start_behind(&before, "agent", name, &dir);
        agent.address("data").await;
        let disk = PathBuf::from(format!("/proc/{}/root{}", agent.pid(), store.display()));
        let mounted = rustix::fs::statvfs(&disk).unwrap();
        assert_eq!(mounted.f_blocks * mounted.f_frsize, mib << 20, "it has its own disk");
        Self { agent, disk }
    }

    fn free_bytes(&self) -> u64 {
        let disk = rustix::fs::statvfs(&self.disk).unwrap();
        disk.f_bavail * disk.f_frsize
    }

    /// Takes all that is free but so much.
    fn fill(&self, but_bytes: u64) -> PathBuf {
        let filler = self.disk.join("filler");
        let file = fs::File::create(&filler).unwrap();
        let all = self.free_bytes() - but_bytes;
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, all).unwrap();
        filler
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_waited_for_and_one_that_fills_holds_up_nothing_begun() {
    let mut cluster = Cluster::start(Shape {
        agents: 0,
        // What it compresses goes to the same disk.
        agent_extra: "encoded_cache_mib = 64\n".into(),
        ..Shape::default()
    })
    .await;
    let small = SmallDisk::start(&mut cluster, "m1", 200).await;
    cluster.machines_known(1).await;
    let filler = small.fill(100 << 20);
    cluster.set_app(&plain_app("data")).await;
    let file = cluster.random_file("big", TWO_PARTS, 7);
    let artifact = cluster.publish("data", &file).await;
    cluster.deploy("data", &artifact.name).await;
    // 70 MiB and the 64 that stay free do not fit into 100.
    let seen = cluster
        .machine_reports("m1", "data", "waiting for its disk", |seen| {
            seen.report.reason.as_deref().is_some_and(|reason| reason.contains("the disk is full"))
        })
        .await;
    assert_eq!(seen.report.state, MachineState::Waiting, "{seen:?}");
    assert_eq!(seen.report.progress.origin_bytes, 0, "nothing was fetched in vain");
    let (part, hidden) = hide_second_part(&cluster);
    fs::remove_file(&filler).unwrap();
    let in_first = (64 << 20) / artifact.piece_size_bytes as u32;
    cluster
        .machine_reports("m1", "data", "through with the first part", |seen| {
            seen.report.progress.pieces == in_first
        })
        .await;
    // Now the disk fills to its last byte: what is begun has its room.
    small.fill(0);
    assert_eq!(small.free_bytes(), 0);
    fs::rename(&hidden, &part).unwrap();
    cluster.machine_is("m1", "data", MachineState::Active).await;
    let current = small.disk.join(format!("artifacts/{}/data", artifact.artifact));
    assert!(fs::read(current).unwrap() == fs::read(&file).unwrap());
    assert!(small.agent.log().contains("the disk is full"));
}
