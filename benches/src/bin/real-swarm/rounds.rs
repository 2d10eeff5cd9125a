//! The deployments: one machine to one, to learn what of a line's rate is payload, and then to all.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, ensure};
use serde::Serialize;
use serde_json::Value;

use shoal_benches::{
    bucket,
    cluster::{Agent, Artifact, Cluster, text},
    net::{self, CONTROL, Carried, Line, Rate},
    process, random_file,
};

use crate::Args;

/// Where the agents find the bucket.
const BUCKET_ADDRESS: &str = "10.77.0.2";

/// The bucket's line has this many times a machine's rate, as the simulated one has.
const BUCKET_LINES: f64 = 10.0;

/// A run during which more of the machine than this was busy says nothing about lines.
const CPU_SHARE_MAX: f64 = 0.6;

/// How long one machine fetches from one other, in seconds of the line's rate.
const PAIR_S: f64 = 5.0;

/// How long anything but a transfer may take.
const LIMIT: Duration = Duration::from_secs(60);

/// How much longer than its bytes need a transfer may take, before it is given up.
const SLOWEST: f64 = 10.0;

/// One machine to one other over their lines.
#[derive(Serialize)]
pub(crate) struct Pair {
    /// The bytes of the artifact.
    payload_bytes: u64,
    /// What its receiver's line carried to it, for each byte of payload: headers, and what was sent again.
    wire_per_payload: f64,
    /// What it carried back: acknowledgements and requests.
    back_per_payload: f64,
    /// From FETCHING to VERIFIED, in seconds.
    seconds: f64,
    /// The payload's share of the line's rate over that time.
    pub(crate) share_of_line: f64,
    /// Packets lost before the two lines.
    dropped: u64,
}

/// One deployment to all.
#[derive(Serialize)]
pub(crate) struct Round {
    /// From the region's publishing of the goal to VERIFIED, in seconds.
    pub(crate) seconds: BTreeMap<String, f64>,
    pub(crate) p50_s: f64,
    pub(crate) last_s: f64,
    /// How much of the whole machine was busy meanwhile.
    cpu_share: f64,
    /// What of that the swarm's processes used; the rest is the kernel's part of the lines, and others' work.
    own_cpu_share: f64,
    /// More than 60 %: the machine was measured, not the lines.
    pub(crate) void: bool,
    origin_copies: f64,
    /// What the lines carried to the machines, for each byte of payload.
    wire_per_payload: f64,
    /// Packets lost before any line.
    dropped: u64,
}

pub(crate) struct Measured {
    pub(crate) size_bytes: u64,
    pub(crate) piece_size_bytes: u64,
    pub(crate) pair: Pair,
    pub(crate) cold: Round,
    pub(crate) rounds: Vec<Round>,
    /// What of a line's rate is payload when it carries pieces one way and acknowledgements of others the same way,
    /// in bits a second.
    pub(crate) payload_bits_per_s: f64,
}

pub(crate) fn measure(args: &Args, root: &Path) -> anyhow::Result<Measured> {
    let mut cluster = start(args, root)?;
    let measured = measure_with(args, &mut cluster);
    if let Some(dir) = &args.keep_logs {
        cluster.keep_logs(dir)?;
    }
    measured
}

fn start(args: &Args, root: &Path) -> anyhow::Result<Cluster> {
    let line = Rate { bits_per_s: args.rate_mbit * 1e6, queue_s: args.queue_ms / 1e3 };
    let wide = Rate { bits_per_s: line.bits_per_s * BUCKET_LINES, ..line };
    net::bridge()?;
    net::machine("bucket", BUCKET_ADDRESS, Line::even(wide))?;
    let mut cluster = Cluster::create(&args.flags.shoal()?, root, CONTROL)?;
    bucket::start(&mut cluster, "bucket", BUCKET_ADDRESS)?;
    cluster.start_control()?;
    for number in 1..=args.agents {
        let (name, address) = (format!("m{number:03}"), format!("10.77.1.{number}"));
        net::machine(&name, &address, Line::even(line))?;
        let mut program = net::on_machine(&name, &args.flags.shoal()?);
        bucket::found_at(&mut program, BUCKET_ADDRESS);
        cluster.start_agent(Agent {
            name: &name,
            program,
            address: &address,
            port: 7410,
            bucket: bucket::URL,
            // The disk is memory here: what was deployed before makes room.
            settings: "keep_builds = 0\nreserve_free_mib = 64\n",
        })?;
    }
    cluster.wait("the machines to be known", LIMIT, |cluster| {
        let machines = cluster.operator(&["machines"])?;
        Ok(machines.as_array().is_some_and(|known| known.len() == args.agents))
    })?;
    Ok(cluster)
}

fn measure_with(args: &Args, cluster: &mut Cluster) -> anyhow::Result<Measured> {
    let line_bits_per_s = args.rate_mbit * 1e6;
    let pair = measure_pair(cluster, line_bits_per_s)?;
    let payload_bits_per_s = line_bits_per_s / (pair.wire_per_payload + pair.back_per_payload);
    cluster.operator(&["app", "set", "swarm"])?;
    let mut sizes = (0, 0);
    let mut round = |cluster: &mut Cluster| {
        let artifact = publish(cluster, "swarm", args.size_mib)?;
        sizes = (artifact.size_bytes, artifact.piece_size_bytes);
        measure_round(cluster, &artifact, payload_bits_per_s)
    };
    let cold = round(cluster)?;
    let rounds = (0..args.rounds).map(|_| round(cluster)).collect::<anyhow::Result<_>>()?;
    let (size_bytes, piece_size_bytes) = sizes;
    Ok(Measured { size_bytes, piece_size_bytes, pair, cold, rounds, payload_bits_per_s })
}

/// Makes a random file an artifact of an app.
fn publish(cluster: &Cluster, app: &str, size_mib: u64) -> anyhow::Result<Artifact> {
    let path = Path::new(crate::ROOT).join("file");
    random_file(&path, size_mib << 20)?;
    let artifact = cluster.publish(app, &path)?;
    fs::remove_file(&path)?;
    Ok(artifact)
}

/// The first machine gets an artifact from the bucket, the second from the first.
fn measure_pair(cluster: &mut Cluster, line_bits_per_s: f64) -> anyhow::Result<Pair> {
    let (from, to) = (cluster.agents[0].clone(), cluster.agents[1].clone());
    cluster.operator(&["app", "set", "pair", "--selector", &format!("machine={from}")])?;
    let size_mib = (PAIR_S * line_bits_per_s / 8.0 / f64::from(1 << 20)).ceil() as u64;
    let artifact = publish(cluster, "pair", size_mib)?;
    let limit = LIMIT + slowest(&artifact, line_bits_per_s);
    cluster.deploy("pair", &artifact)?;
    cluster.ended("pair", limit)?;

    cluster.operator(&["app", "set", "pair", "--selector", &format!("machine={from}|{to}")])?;
    let sent = net::carried(&from)?;
    let received = net::carried(&to)?;
    let revision = cluster.deploy("pair", &artifact)?;
    cluster.ended("pair", limit)?;
    let sent = net::carried(&from)?.since(sent);
    let received = net::carried(&to)?.since(received);
    let machines = cluster.operator(&["machines", "--app", "pair"])?;
    let mut machines = machines.as_array().into_iter().flatten();
    let report = machines.find(|machine| text(machine, "name").is_ok_and(|name| name == to));
    let progress = report.and_then(|report| report.pointer("/apps/0/progress"));
    let origin = progress.and_then(|progress| progress.get("origin_bytes")?.as_u64());
    ensure!(origin == Some(0), "the second machine read from the bucket: {progress:?}");

    let at = |state| cluster.state_at(&to, "pair", &revision, state);
    let (begun, done) = at("FETCHING")?.zip(at("VERIFIED")?).context("no states in the log")?;
    let seconds = done.duration_since(begun)?.as_secs_f64();
    let payload = artifact.size_bytes as f64;
    Ok(Pair {
        payload_bytes: artifact.size_bytes,
        wire_per_payload: received.down_bytes as f64 / payload,
        back_per_payload: received.up_bytes as f64 / payload,
        seconds,
        share_of_line: payload * 8.0 / seconds / line_bits_per_s,
        dropped: sent.dropped + received.dropped,
    })
}

impl Round {
    pub(crate) fn print(&self, name: &str) {
        println!(
            "{name:>10}  {:8.2}  {:8.2}  {:3.0} %  {:6.2}  {:4.2}  {}{}",
            self.p50_s,
            self.last_s,
            100.0 * self.cpu_share,
            self.origin_copies,
            self.wire_per_payload,
            self.dropped,
            if self.void { "  void" } else { "" },
        );
    }
}

fn slowest(artifact: &Artifact, bits_per_s: f64) -> Duration {
    Duration::from_secs_f64(SLOWEST * artifact.size_bytes as f64 * 8.0 / bits_per_s)
}

fn measure_round(
    cluster: &mut Cluster,
    artifact: &Artifact,
    payload_bits_per_s: f64,
) -> anyhow::Result<Round> {
    let limit = LIMIT + slowest(artifact, payload_bits_per_s);
    let agents = cluster.agents.clone();
    let carried = || agents.iter().map(|agent| net::carried(agent)).collect::<Result<Vec<_>, _>>();
    let before = carried()?;
    let cpu_before = Cpu::now()?;
    let revision = cluster.deploy("swarm", artifact)?;
    let verified = cluster.verified(&agents, "swarm", &revision, limit)?;
    let cpu = Cpu::now()?.since(cpu_before);
    let (cpu_share, own_cpu_share) = (cpu.share(cpu.busy), cpu.share(cpu.own));
    let after = carried()?;
    let rollout = cluster.ended("swarm", LIMIT)?;

    let goal = cluster.goal_at("swarm", &revision)?.context("no region process has the goal")?;
    let since = |at: SystemTime| anyhow::Ok(at.duration_since(goal)?.as_secs_f64());
    let seconds = verified.into_iter().map(|(agent, at)| Ok((agent, since(at)?)));
    let seconds = seconds.collect::<anyhow::Result<BTreeMap<_, _>>>()?;
    let mut sorted: Vec<f64> = seconds.values().copied().collect();
    sorted.sort_by(f64::total_cmp);
    let carried = after.iter().zip(before).map(|(after, before)| after.since(before));
    let carried = carried.fold(Carried::default(), |sum, one| Carried {
        up_bytes: sum.up_bytes + one.up_bytes,
        down_bytes: sum.down_bytes + one.down_bytes,
        dropped: sum.dropped + one.dropped,
    });
    let payload = artifact.size_bytes as f64 * agents.len() as f64;
    Ok(Round {
        p50_s: sorted[(sorted.len() - 1) / 2],
        last_s: sorted[sorted.len() - 1],
        seconds,
        cpu_share,
        own_cpu_share,
        void: cpu_share > CPU_SHARE_MAX,
        origin_copies: rollout
            .pointer("/regions/bench/origin_copies")
            .and_then(Value::as_f64)
            .context("a rollout says no copies")?,
        wire_per_payload: carried.down_bytes as f64 / payload,
        dropped: carried.dropped,
    })
}

/// What the whole machine's processors did since it started, in the kernel's ticks.
#[derive(Clone, Copy)]
struct Cpu {
    busy: u64,
    all: u64,
    /// What processes of the benchmark's own namespace did of it.
    own: u64,
}

impl Cpu {
    fn now() -> anyhow::Result<Self> {
        let stat = fs::read_to_string("/proc/stat")?;
        let line = stat.lines().next().and_then(|line| line.strip_prefix("cpu ")).unwrap_or("");
        let ticks = numbers(line);
        ensure!(ticks.len() >= 8, "/proc/stat is not as expected");
        // Guests' time, after these, is in the first two; idle and waiting for a disk are not busy.
        let all = ticks[..8].iter().sum();
        let mut own = 0;
        for entry in fs::read_dir("/proc")?.flatten() {
            if entry.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()) {
                // It may just have ended.
                let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
                own += process::ticks(&stat).unwrap_or(0);
            }
        }
        Ok(Self { busy: all - ticks[3] - ticks[4], all, own })
    }

    fn since(self, before: Self) -> Self {
        // A process that ended takes its ticks with it.
        let own = self.own.saturating_sub(before.own);
        Self { busy: self.busy - before.busy, all: self.all - before.all, own }
    }

    fn share(self, ticks: u64) -> f64 {
        ticks as f64 / self.all.max(1) as f64
    }
}

fn numbers(text: &str) -> Vec<u64> {
    text.split_whitespace().map_while(|field| field.parse().ok()).collect()
}
