//! What is measured of a swarm of agents, on whatever machines: a deployment to the seed first, and then, on the clock, to
//! everybody.

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use serde::Serialize;

use crate::{
    ballast::Ballast,
    bucket, children_cpu_s,
    cluster::{Agent, Artifact, Cluster},
    machine::{Machine, SEED},
    process::Peaks,
};

const APP: &str = "swarm";

/// Which of its ports a machine gives to the data plane, with gossip on the next, and to the metrics.
const DATA: u16 = 0;
const METRICS: u16 = 2;

/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(600);

/// One deployment to everybody.
#[derive(Debug, Serialize)]
pub struct Round {
    /// The artifact's length.
    pub size_bytes: u64,
    /// The length of its stored pieces.
    pub encoded_bytes: u64,
    /// The length of a piece, but for the last one.
    pub piece_size_bytes: u64,
    /// From the region's publishing of the goal to the last VERIFIED.
    pub wall_s: f64,
    /// User and system time of all the cluster's processes meanwhile.
    pub cpu_s: f64,
    /// What publishing took of them and of the command.
    pub publish_cpu_s: f64,
    /// Stored piece bytes that the seed sent, by the artifact's.
    pub seed_upload_ratio: f64,
    /// Stored piece bytes that leechers read from the bucket.
    pub origin_bytes: u64,
    /// What the meter counted.
    pub wire_bytes: u64,
    /// The artifact's length for each leecher.
    pub delivered_bytes: u64,
    /// The most memory that any agent held at any moment, files not counted.
    pub rss_anon_peak_bytes_max: u64,
    /// That of the seed alone.
    pub rss_anon_peak_bytes_seed: u64,
    /// That of the leecher that held most.
    pub rss_anon_peak_bytes_leecher: u64,
    /// Leechers that have verified every piece.
    pub verified: usize,
}

/// Starts coordinator and region processes, and an agent on each machine; the seed's has `seed_settings` in its file too.
///
/// # Errors
/// When one does not start.
pub fn start(
    cluster: &mut Cluster,
    shoal: &Path,
    machines: &[Machine],
    seed_settings: &str,
) -> anyhow::Result<()> {
    cluster.start_control()?;
    cluster.operator(&["app", "set", APP])?;
    let seed = seed(machines)?;
    let directory = cluster.bucket();
    let directory = directory.to_str().context("a path that is no text")?;
    // Behind lines the bucket stands on the seed's: what is read from it is the seed's upload too.
    if let Some(namespace) = seed.namespace() {
        bucket::start(cluster, namespace, &seed.address)?;
    }
    for machine in machines {
        let metrics = machine.at(METRICS);
        let mut settings =
            format!("keep_builds = 0\nreserve_free_mib = 64\nmetrics_listen = \"{metrics}\"\n");
        if machine.name == SEED {
            settings += seed_settings;
        }
        let mut program = machine.command(shoal);
        if machine.namespace().is_some() {
            bucket::found_at(&mut program, &seed.address);
        }
        cluster.start_agent(Agent {
            name: &machine.name,
            program,
            address: &machine.address,
            port: machine.port(DATA),
            bucket: machine.namespace().map_or(directory, |_| bucket::URL),
            settings: &settings,
        })?;
    }
    cluster.wait("the machines to be known", LIMIT, |cluster| {
        let known = cluster.operator(&["machines"])?;
        Ok(known.as_array().is_some_and(|known| known.len() == machines.len()))
    })
}

/// How often an artifact's bytes lie in the directory at most, with so many rounds of another artifact each: each agent's, the
/// file itself, each round's in the two buckets, and what the next round writes before the last one's is gone.
#[must_use]
pub fn copies(leechers: usize, rounds: usize) -> u64 {
    ((leechers + 1) * rounds.min(2) + 1 + 2 * rounds) as u64
}

fn seed(machines: &[Machine]) -> anyhow::Result<&Machine> {
    machines.iter().find(|machine| machine.name == SEED).context("there is no seed")
}

/// Publishes a file, gives it to the seed, and then to all. `meter` counts bytes on the wire; what it counts while all are
/// served is the round's. A `ballast` is filled before the clock starts.
///
/// # Errors
/// When a process ends, or anything fails.
pub fn round(
    cluster: &mut Cluster,
    machines: &[Machine],
    file: &Path,
    ballast: Option<&Ballast>,
    meter: impl Fn() -> anyhow::Result<u64>,
) -> anyhow::Result<Round> {
    let seed = seed(machines)?;
    let leechers: Vec<String> =
        cluster.agents.iter().filter(|name| *name != SEED).cloned().collect();
    let before = children_cpu_s()? + cpu_s(cluster)?;
    let artifact = cluster.publish(APP, file)?;
    let publish_cpu_s = children_cpu_s()? + cpu_s(cluster)? - before;
    select(cluster, &format!("machine={SEED}"))?;
    cluster.deploy(APP, &artifact)?;
    cluster.ended(APP, LIMIT)?;
    select(cluster, "")?;

    if let Some(ballast) = ballast {
        ballast.fill()?;
    }
    let sent = sent_bytes(seed)?;
    let wire = meter()?;
    let cpu = cpu_s(cluster)?;
    let peaks = Peaks::watch(cluster.pids());
    let revision = cluster.deploy(APP, &artifact)?;
    let verified = cluster.verified(&leechers, APP, &revision, LIMIT)?;
    let peaks = peaks.end();
    let cpu_s = cpu_s(cluster)? - cpu;
    let wire_bytes = meter()? - wire;
    let sent = sent_bytes(seed)? - sent;
    let goal = cluster.goal_at(APP, &revision)?.context("no region process has the goal")?;
    let last = verified.values().max().context("there are no leechers")?;
    cluster.ended(APP, LIMIT)?;
    let of = |name: &String| {
        let pid = cluster.pid(name)?;
        peaks.get(&pid).copied()
    };
    Ok(Round {
        size_bytes: artifact.size_bytes,
        encoded_bytes: artifact.encoded_bytes,
        piece_size_bytes: artifact.piece_size_bytes,
        wall_s: last.duration_since(goal)?.as_secs_f64(),
        cpu_s,
        publish_cpu_s,
        seed_upload_ratio: sent / artifact.encoded_bytes as f64,
        origin_bytes: origin_bytes(cluster, &leechers)?,
        wire_bytes,
        delivered_bytes: delivered_bytes(&artifact, &leechers),
        rss_anon_peak_bytes_max: cluster.agents.iter().filter_map(of).max().unwrap_or(0),
        rss_anon_peak_bytes_seed: of(&seed.name).unwrap_or(0),
        rss_anon_peak_bytes_leecher: leechers.iter().filter_map(of).max().unwrap_or(0),
        verified: verified.len(),
    })
}

fn delivered_bytes(artifact: &Artifact, leechers: &[String]) -> u64 {
    artifact.size_bytes * leechers.len() as u64
}

fn select(cluster: &Cluster, selector: &str) -> anyhow::Result<()> {
    cluster.operator(&["app", "set", APP, "--selector", selector]).map(drop)
}

/// CPU time of all processes of the cluster, in seconds.
fn cpu_s(cluster: &Cluster) -> anyhow::Result<f64> {
    Ok(cluster.usage()?.iter().map(|usage| usage.cpu_s).sum())
}

/// Stored piece bytes that the seed sent so far.
fn sent_bytes(seed: &Machine) -> anyhow::Result<f64> {
    metric(seed, "shoal_agent_sent_bytes_total")
}

/// One of the metrics of the agent on a machine; it has no labels.
///
/// # Errors
/// When the agent says nothing of it.
pub fn metric(machine: &Machine, name: &str) -> anyhow::Result<f64> {
    let mut stream = TcpStream::connect(machine.at(METRICS))?;
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    let value = said.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    let value = value.and_then(|value| value.trim().parse().ok());
    value.with_context(|| format!("{} says nothing of {name}", machine.name))
}

/// Stored piece bytes that these agents read from the bucket for the present artifact.
fn origin_bytes(cluster: &Cluster, agents: &[String]) -> anyhow::Result<u64> {
    let agents: BTreeSet<&str> = agents.iter().map(String::as_str).collect();
    let machines = cluster.operator(&["machines", "--app", APP])?;
    let machines = machines.as_array().context("no machines")?;
    let of = |machine: &serde_json::Value| {
        let name = machine.get("name")?.as_str()?;
        let bytes = machine.pointer("/apps/0/progress")?.get("origin_bytes")?.as_u64()?;
        agents.contains(name).then_some(bytes)
    };
    let read: Vec<u64> = machines.iter().filter_map(of).collect();
    ensure!(read.len() == agents.len(), "{} of {} machines reported", read.len(), agents.len());
    Ok(read.into_iter().sum())
}
