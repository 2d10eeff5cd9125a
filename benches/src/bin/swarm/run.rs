//! The deployments: to the seed first, and then, which is measured, to everybody.

use std::{
    collections::BTreeSet,
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use serde::Serialize;
use shoal_benches::{
    children_cpu_s,
    cluster::{Agent, Artifact, Cluster},
    median_of, process, random_file,
};

use crate::{Args, shoal};

const ADDRESS: &str = "127.0.0.1";
const APP: &str = "swarm";
const SEED: &str = "seed";

/// Where the seed tells its metrics.
const METRICS: &str = "127.0.0.1:7398";

/// The first agent's port; each has two.
const PORTS: u16 = 7_500;

/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(600);

/// How often memory is looked at.
const SAMPLE_EVERY: Duration = Duration::from_millis(20);

/// One deployment to everybody.
#[derive(Debug, Serialize)]
pub(crate) struct Round {
    size_bytes: u64,
    encoded_bytes: u64,
    piece_size_bytes: u64,
    wall_s: f64,
    cpu_s: f64,
    publish_cpu_s: f64,
    seed_upload_ratio: f64,
    origin_bytes: u64,
    wire_bytes: u64,
    delivered_bytes: u64,
    rss_anon_peak_bytes_max: u64,
    verified: usize,
}

/// What is printed with `--json`: medians of the rounds.
#[derive(Debug, Serialize)]
struct Report<'a> {
    leechers: usize,
    size_bytes: u64,
    encoded_bytes: u64,
    piece_size_bytes: u64,
    mtu: u32,
    /// From the region's publishing of the goal to the last VERIFIED.
    wall_s: f64,
    /// User and system time of all the cluster's processes meanwhile.
    cpu_s: f64,
    cpu_s_per_gb: f64,
    publish_cpu_s: f64,
    /// Stored piece bytes that the seed sent, by the artifact's.
    seed_upload_ratio: f64,
    /// Stored piece bytes that were read from the bucket.
    origin_bytes: u64,
    /// Everything that went over the link.
    wire_bytes: u64,
    delivered_bytes: u64,
    /// The most memory that any agent held at any moment, files not counted.
    rss_anon_peak_bytes_max: u64,
    /// Leechers that have verified every piece.
    verified: usize,
    raw_quinn_cpu_s_per_gb: f64,
    ratio_to_raw_quinn: f64,
    rounds: &'a [Round],
}

/// Starts the cluster and all its agents.
pub(crate) fn start(args: &Args, cluster: &mut Cluster) -> anyhow::Result<Vec<Round>> {
    cluster.start_control()?;
    cluster.operator(&["app", "set", APP])?;
    let leechers = (1..=args.leechers).map(|number| format!("leecher-{number:02}"));
    let names: Vec<String> = std::iter::once(SEED.to_owned()).chain(leechers).collect();
    let bucket = cluster.bucket();
    let bucket = crate::text(&bucket)?;
    for (name, port) in names.iter().zip((PORTS..).step_by(2)) {
        let mut settings = "keep_builds = 0\nreserve_free_mib = 64\n".to_owned();
        if name == SEED {
            settings += &format!("metrics_listen = \"{METRICS}\"\n");
        }
        let program = Command::new(shoal(args)?);
        let settings = &settings;
        cluster.start_agent(Agent { name, program, address: ADDRESS, port, bucket, settings })?;
    }
    cluster.wait("the machines to be known", LIMIT, |cluster| {
        let machines = cluster.operator(&["machines"])?;
        Ok(machines.as_array().is_some_and(|known| known.len() == names.len()))
    })?;
    Ok(Vec::new())
}

/// Publishes an artifact, gives it to the seed, and then to all.
pub(crate) fn round(
    args: &Args,
    cluster: &mut Cluster,
    root: &Path,
    round: usize,
) -> anyhow::Result<Round> {
    let before = children_cpu_s()? + cpu_s(cluster)?;
    let artifact = publish(args, cluster, root, round)?;
    let publish_cpu_s = children_cpu_s()? + cpu_s(cluster)? - before;
    select(cluster, &format!("machine={SEED}"))?;
    cluster.deploy(APP, &artifact)?;
    cluster.ended(APP, LIMIT)?;
    select(cluster, "")?;

    let leechers: Vec<String> =
        cluster.agents.iter().filter(|name| *name != SEED).cloned().collect();
    let sent = sent_bytes()?;
    let wire = wire_bytes()?;
    let cpu = cpu_s(cluster)?;
    let pids = cluster.pids();
    let over = AtomicBool::new(false);
    let (verified, rss_anon_peak_bytes_max) = thread::scope(|scope| {
        let sampler = scope.spawn(|| peak(&pids, &over));
        let revision = cluster.deploy(APP, &artifact);
        let verified = revision.and_then(|revision| {
            let at = cluster.verified(&leechers, APP, &revision, LIMIT)?;
            Ok((revision, at))
        });
        over.store(true, Ordering::Relaxed);
        (verified, sampler.join().unwrap_or_default())
    });
    let (revision, verified) = verified?;
    let cpu_s = cpu_s(cluster)? - cpu;
    let wire_bytes = wire_bytes()? - wire;
    let sent = sent_bytes()? - sent;
    let goal = cluster.goal_at(APP, &revision)?.context("no region process has the goal")?;
    let last = verified.values().max().context("there are no leechers")?;
    cluster.ended(APP, LIMIT)?;
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
        delivered_bytes: artifact.size_bytes * leechers.len() as u64,
        rss_anon_peak_bytes_max,
        verified: verified.len(),
    })
}

fn publish(args: &Args, cluster: &Cluster, root: &Path, round: usize) -> anyhow::Result<Artifact> {
    let path = root.join("artifact");
    match &args.file {
        None => random_file(&path, args.size.as_u64())?,
        Some(file) => {
            fs::copy(file, &path)?;
            // Another artifact in each round: what agents have of the last one must not count.
            let mut file = fs::OpenOptions::new().append(true).open(&path)?;
            file.write_all(&round.to_le_bytes())?;
        }
    }
    let artifact = cluster.publish(APP, &path)?;
    fs::remove_file(&path)?;
    Ok(artifact)
}

fn select(cluster: &Cluster, selector: &str) -> anyhow::Result<()> {
    cluster.operator(&["app", "set", APP, "--selector", selector]).map(drop)
}

/// CPU time of all processes of the cluster, in seconds.
fn cpu_s(cluster: &Cluster) -> anyhow::Result<f64> {
    Ok(cluster.usage()?.iter().map(|usage| usage.cpu_s).sum())
}

/// The most anonymous memory that any of these processes held until it is over.
fn peak(pids: &[u32], over: &AtomicBool) -> u64 {
    let mut most = 0;
    while !over.load(Ordering::Relaxed) {
        let held = pids.iter().filter_map(|pid| process::usage(*pid).ok());
        most = held.map(|usage| usage.rss_anon_bytes).fold(most, u64::max);
        thread::sleep(SAMPLE_EVERY);
    }
    most
}

/// What went over the link so far, by this process's namespace.
fn wire_bytes() -> anyhow::Result<u64> {
    let links = fs::read_to_string("/proc/net/dev")?;
    let lo = links.lines().find_map(|line| line.trim().strip_prefix("lo:"));
    let sent = lo.and_then(|fields| fields.split_whitespace().nth(8)?.parse().ok());
    sent.context("/proc/net/dev says nothing of lo")
}

/// Stored piece bytes that the seed sent so far.
fn sent_bytes() -> anyhow::Result<f64> {
    let mut stream = TcpStream::connect(METRICS)?;
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    let value = said.lines().find_map(|line| line.strip_prefix("shoal_agent_sent_bytes_total "));
    value.and_then(|value| value.trim().parse().ok()).context("the seed says no sent bytes")
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

pub(crate) fn print(args: &Args, rounds: &[Round], bar: f64) -> anyhow::Result<()> {
    let median = |of: fn(&Round) -> f64| median_of(rounds.iter().map(of)).context("no rounds");
    let per_gb = |round: &Round| round.cpu_s / (round.delivered_bytes as f64 / 1e9);
    let first = rounds.first().context("no rounds")?;
    let report = Report {
        leechers: args.leechers,
        size_bytes: first.size_bytes,
        encoded_bytes: first.encoded_bytes,
        piece_size_bytes: first.piece_size_bytes,
        mtu: args.mtu,
        wall_s: median(|round| round.wall_s)?,
        cpu_s: median(|round| round.cpu_s)?,
        cpu_s_per_gb: median(per_gb)?,
        publish_cpu_s: median(|round| round.publish_cpu_s)?,
        seed_upload_ratio: median(|round| round.seed_upload_ratio)?,
        origin_bytes: median(|round| round.origin_bytes as f64)? as u64,
        wire_bytes: median(|round| round.wire_bytes as f64)? as u64,
        delivered_bytes: first.delivered_bytes,
        rss_anon_peak_bytes_max: median(|round| round.rss_anon_peak_bytes_max as f64)? as u64,
        verified: rounds.iter().map(|round| round.verified).min().unwrap_or(0),
        raw_quinn_cpu_s_per_gb: bar,
        ratio_to_raw_quinn: median(per_gb)? / bar,
        rounds,
    };
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
        return Ok(());
    }
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    println!(
        "{} leechers, {:.0} MiB ({:.0} stored) in pieces of {} KiB, packets of {} bytes",
        report.leechers,
        mib(report.size_bytes),
        mib(report.encoded_bytes),
        report.piece_size_bytes >> 10,
        report.mtu
    );
    println!("wall           {:8.2} s", report.wall_s);
    println!(
        "CPU            {:8.2} s/GB, {:.2} times bare quinn's {:.2}; publishing {:.2} s",
        report.cpu_s_per_gb, report.ratio_to_raw_quinn, bar, report.publish_cpu_s
    );
    println!("seed           {:8.2} copies", report.seed_upload_ratio);
    println!("bucket         {:8.0} MiB", mib(report.origin_bytes));
    println!(
        "wire           {:8.0} MiB for {:.0} delivered",
        mib(report.wire_bytes),
        mib(report.delivered_bytes)
    );
    println!("memory         {:8.0} MiB at most", mib(report.rss_anon_peak_bytes_max));
    println!("verified       {:8}", report.verified);
    Ok(())
}
