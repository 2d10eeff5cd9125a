//! A real swarm beside the simulated one: real agents, each in a network namespace behind a line held to a rate, and
//! `shoal-sim` with the same numbers.
//!
//! The benchmark starts itself again in namespaces of its own (mounts, network, process ids): nothing of what it makes
//! is seen outside, and however it ends, the kernel takes all of it away. Files lie in memory, because the simulated
//! machines have no disks.

mod report;
mod rounds;

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, ensure};
use clap::Parser;
use shoal_benches::{
    bucket,
    namespaces::{self, Flags},
    net, program,
};

/// Where the benchmark's files lie: in its own mounts, in memory.
const ROOT: &str = "/run/real-swarm";

/// The most agents: their addresses are numbered in one byte.
const AGENTS_MAX: usize = 200;

/// Measures a swarm of real agents on lines of a rate, and simulates the same. Needs root, iproute2 and util-linux.
#[derive(Parser)]
#[command(max_term_width = 100)]
struct Args {
    /// How many agents.
    #[arg(long, default_value_t = 16)]
    agents: usize,
    /// Each line's rate, each way, in Mbit/s.
    #[arg(long, default_value_t = 20.0)]
    rate_mbit: f64,
    /// The length of the artifact, in MiB; random, so that it is stored as it is.
    #[arg(long, default_value_t = 64)]
    size_mib: u64,
    /// How many deployments are measured, each of another artifact. One more goes before them, to make the
    /// connections that stand between agents at rest; it is reported apart.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// How long the queue before a line may be, in milliseconds of its rate.
    #[arg(long, default_value_t = 20.0)]
    queue_ms: f64,
    /// How many seeds are simulated; medians are compared.
    #[arg(long, default_value_t = 5)]
    seeds: u64,
    /// The program `shoal-sim`; by default the one beside this one.
    #[arg(long, value_name = "PATH")]
    sim: Option<PathBuf>,
    /// Copy the processes' logs to this directory at the end.
    #[arg(long, value_name = "DIR")]
    keep_logs: Option<PathBuf>,
    #[command(flatten)]
    flags: Flags,
    #[command(flatten)]
    serve: bucket::Serve,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(done) = args.serve.run() {
        return namespaces::ended(done.map(|()| ExitCode::SUCCESS));
    }
    namespaces::main(&args.flags, &[], || check(&args), || inside(&args))
}

/// What must be so before anything is begun.
fn check(args: &Args) -> anyhow::Result<()> {
    net::check()?;
    ensure!((2..=AGENTS_MAX).contains(&args.agents), "--agents is 2 to {AGENTS_MAX}");
    ensure!((1.0..=10_000.0).contains(&args.rate_mbit), "--rate-mbit is 1 to 10000");
    ensure!((1.0..=1_000.0).contains(&args.queue_ms), "--queue-ms is 1 to 1000");
    ensure!((1..=65_536).contains(&args.size_mib), "--size-mib is 1 to 65536");
    ensure!((1..=100).contains(&args.rounds), "--rounds is 1 to 100");
    ensure!((1..=100).contains(&args.seeds), "--seeds is 1 to 100");
    args.flags.shoal()?;
    args.sim()?;
    // While one artifact is fetched, the one before is still there; buckets and the cut hold all of them.
    let copies = 2 * args.agents + 2 * (args.rounds + 1) + 3;
    let needed_mib = args.size_mib * copies as u64;
    let free_mib = memory_free_mib()?;
    ensure!(
        needed_mib < free_mib,
        "it needs {needed_mib} MiB of memory for files, and {free_mib} MiB are free: \
         give a smaller --size-mib or fewer --agents"
    );
    Ok(())
}

fn memory_free_mib() -> anyhow::Result<u64> {
    let info = fs::read_to_string("/proc/meminfo")?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()).context("no MemAvailable")?;
    Ok(kib.parse::<u64>()? >> 10)
}

impl Args {
    fn sim(&self) -> anyhow::Result<PathBuf> {
        program(self.sim.as_deref(), "shoal-sim")
    }
}

fn inside(args: &Args) -> anyhow::Result<ExitCode> {
    let measured = rounds::measure(args, Path::new(ROOT))?;
    let simulated = report::simulate(args, &measured)?;
    let report = report::Report::new(args, measured, simulated)?;
    if args.flags.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        report.print();
    }
    Ok(if report.void { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
