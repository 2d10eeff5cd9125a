//! What an agent at rest costs: many of them have an artifact, know each other, and have nothing to do.
//!
//! They stand on one loopback, in a network namespace of the benchmark's own, as operators run them; what is counted is each
//! process's own CPU time and memory, so other work on the machine changes little of it.

use std::{
    fs,
    path::PathBuf,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use clap::Parser;
use serde::Serialize;
use shoal_benches::{
    cluster::Cluster,
    deployment,
    machine::{self, Machine},
    median_of,
    namespaces::{self, Flags},
    process::{self, Usage},
    random_file,
};

/// Measures agents at rest. Needs iproute2 and util-linux.
#[derive(Parser)]
#[command(max_term_width = 100)]
struct Args {
    /// How many agents; each has at most one less as neighbours.
    #[arg(long, default_value_t = 41)]
    agents: usize,
    /// The length of the artifact that all of them have; random bytes.
    #[arg(long, default_value = "64MiB")]
    size: bytesize::ByteSize,
    /// How long nothing is counted after the deployment has ended, in seconds.
    #[arg(long, default_value_t = 30)]
    settle_s: u64,
    /// How long is measured, in seconds.
    #[arg(long, default_value_t = 60)]
    measure_s: u64,
    /// Where files lie.
    #[arg(long, default_value = "/dev/shm")]
    dir: PathBuf,
    #[command(flatten)]
    flags: Flags,
}

/// What is printed with `--json`.
#[derive(Debug, Serialize)]
struct Report {
    agents: usize,
    measured_s: f64,
    /// Neighbours on the data plane: the median of the agents, and the fewest.
    neighbours: f64,
    neighbours_min: f64,
    /// Part of one core: the median of the agents, and the most.
    core: f64,
    core_max: f64,
    /// Memory that is no file's, in bytes: the median of the agents, and the most.
    rss_anon_bytes: u64,
    rss_anon_bytes_max: u64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    namespaces::main(&args.flags, namespaces::as_anybody(), || check(&args), || inside(&args))
}

fn check(args: &Args) -> anyhow::Result<()> {
    ensure!((2..=machine::MACHINES_MAX).contains(&args.agents), "--agents is 2 to 200");
    ensure!(args.measure_s > 0, "--measure-s is more than 0");
    ensure!(args.size.as_u64() > 0, "--size is more than 0");
    ensure!(args.dir.is_dir(), "there is no directory {}: give --dir", args.dir.display());
    args.flags.shoal().map(drop)
}

fn usages(cluster: &Cluster, machines: &[Machine]) -> anyhow::Result<Vec<Usage>> {
    let of = |machine: &Machine| {
        process::usage(cluster.pid(&machine.name).with_context(|| format!("no {}", machine.name))?)
    };
    machines.iter().map(of).collect()
}

fn inside(args: &Args) -> anyhow::Result<ExitCode> {
    machine::hold_loopback(1_472)?;
    let root = tempfile::Builder::new().prefix("shoal-rest-").tempdir_in(&args.dir)?;
    let shoal = args.flags.shoal()?;
    let mut cluster = Cluster::create(&shoal, root.path(), "127.0.0.1")?;
    let machines = machine::on_loopback(args.agents - 1);
    deployment::start(&mut cluster, &shoal, &machines, "")?;
    let file = root.path().join("artifact");
    random_file(&file, args.size.as_u64())?;
    deployment::round(&mut cluster, &machines, &file, None, || Ok(0))?;
    fs::remove_file(&file)?;
    thread::sleep(Duration::from_secs(args.settle_s));
    let (start, before) = (Instant::now(), usages(&cluster, &machines)?);
    thread::sleep(Duration::from_secs(args.measure_s));
    let (measured_s, after) = (start.elapsed().as_secs_f64(), usages(&cluster, &machines)?);
    let neighbours: anyhow::Result<Vec<f64>> = machines
        .iter()
        .map(|machine| deployment::metric(machine, "shoal_agent_neighbours"))
        .collect();
    let neighbours = neighbours?;
    let cores = || before.iter().zip(&after).map(|(a, b)| (b.cpu_s - a.cpu_s) / measured_s);
    let held = || after.iter().map(|usage| usage.rss_anon_bytes as f64);
    let median = |of: &mut dyn Iterator<Item = f64>| median_of(of).context("no agents");
    let report = Report {
        agents: args.agents,
        measured_s,
        neighbours: median(&mut neighbours.iter().copied())?,
        neighbours_min: neighbours.iter().copied().fold(f64::INFINITY, f64::min),
        core: median(&mut cores())?,
        core_max: cores().fold(0.0, f64::max),
        rss_anon_bytes: median(&mut held())? as u64,
        rss_anon_bytes_max: held().fold(0.0, f64::max) as u64,
    };
    if args.flags.json {
        println!("{}", serde_json::to_string(&report)?);
        return Ok(ExitCode::SUCCESS);
    }
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    println!(
        "{} agents at rest, {:.0} s; median, and the worst of them",
        report.agents, measured_s
    );
    println!("neighbours  {:6.0}    {:6.0}", report.neighbours, report.neighbours_min);
    println!("a core      {:6.2} %  {:6.2} %", report.core * 100.0, report.core_max * 100.0);
    println!(
        "memory      {:6.1} MiB {:5.1} MiB",
        mib(report.rss_anon_bytes),
        mib(report.rss_anon_bytes_max)
    );
    Ok(ExitCode::SUCCESS)
}
