//! What it costs a swarm that one of its machines is slow, never answers or lies; and what an agent does whose disk is
//! slower than its line. Real agents, each in a network namespace behind a line held to a rate.
//!
//! Like `real-swarm`, it starts itself again in namespaces of its own, and the kernel takes all of it away with them.

mod act;
mod bad;
mod disk;

use std::{
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use clap::{Parser, Subcommand};
use shoal_benches::{
    cluster::{Agent, Artifact, Cluster},
    namespaces::{self, Flags},
    net::{self, CONTROL, Line, Rate},
    random_file,
};

/// Where the benchmark's files lie, in its own mounts.
const ROOT: &str = "/run/pressure";

const APP: &str = "swarm";

/// Who has the artifact first.
const SEED: &str = "seed";

/// The data port of every agent.
const PORT: u16 = 7410;

/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(900);

/// Measures swarms under pressure. Needs root, iproute2 and util-linux.
#[derive(Parser)]
#[command(max_term_width = 100)]
struct Args {
    /// How many agents fetch, the bad one among them.
    #[arg(long, default_value_t = 8)]
    leechers: usize,
    /// Each line's rate, each way, in Mbit/s.
    #[arg(long, default_value_t = 100.0)]
    rate_mbit: f64,
    /// The length of the artifact, in MiB; random.
    #[arg(long, default_value_t = 128)]
    size_mib: u64,
    /// How many deployments with and as many without, in turn; medians are compared.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Copy the processes' logs to this directory at the end.
    #[arg(long, value_name = "DIR")]
    keep_logs: Option<PathBuf>,
    #[command(flatten)]
    flags: Flags,
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Clone)]
enum What {
    /// One of the leechers is bad.
    Peer {
        /// How.
        #[arg(value_enum)]
        bad: Bad,
    },
    /// One leecher's disk is slower than its line.
    Disk {
        /// What the disk writes, in MB/s.
        #[arg(long, default_value_t = 5.0)]
        write_mb_s: f64,
    },
    /// Be a bad peer: what runs on its machine.
    #[command(hide = true)]
    Act(act::Act),
}

/// What is wrong with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
enum Bad {
    /// Its line has a hundredth of the rate.
    Slow,
    /// It says that it has everything, takes every question, and answers none.
    Silent,
    /// It says that it has everything, and sends wrong bytes.
    Liar,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let What::Act(act) = &args.what {
        return namespaces::ended(act.run().map(|()| ExitCode::SUCCESS));
    }
    namespaces::main(&args.flags, &[], || check(&args), || inside(&args))
}

/// What must be so before anything is begun.
fn check(args: &Args) -> anyhow::Result<()> {
    net::check()?;
    ensure!((2..=64).contains(&args.leechers), "--leechers is 2 to 64");
    ensure!((1.0..=10_000.0).contains(&args.rate_mbit), "--rate-mbit is 1 to 10000");
    ensure!((1..=16_384).contains(&args.size_mib), "--size-mib is 1 to 16384");
    ensure!((1..=100).contains(&args.rounds), "--rounds is 1 to 100");
    if let What::Disk { write_mb_s } = args.what {
        ensure!((0.1..=1_000.0).contains(&write_mb_s), "--write-mb-s is 0.1 to 1000");
        disk::check()?;
    }
    args.flags.shoal().map(drop)
}

fn inside(args: &Args) -> anyhow::Result<ExitCode> {
    net::bridge()?;
    // Goes after the cluster's processes, which are in its group.
    let mut slow_disk = None;
    let mut cluster = Cluster::create(&args.flags.shoal()?, Path::new(ROOT), CONTROL)?;
    cluster.start_control()?;
    let done = match &args.what {
        What::Peer { bad } => bad::measure(args, &mut cluster, *bad),
        What::Disk { write_mb_s } => disk::measure(args, &mut cluster, *write_mb_s, &mut slow_disk),
        What::Act(_) => Ok(()),
    };
    if let Some(dir) = &args.keep_logs {
        cluster.keep_logs(dir)?;
    }
    done.map(|()| ExitCode::SUCCESS)
}

/// The line of every machine.
fn line(args: &Args) -> Line {
    Line::even(Rate { bits_per_s: args.rate_mbit * 1e6, queue_s: 0.02 })
}

/// Starts an agent on a machine of its own, behind the command `before`, which becomes it.
fn start_agent(
    args: &Args,
    cluster: &mut Cluster,
    name: &str,
    before: &[String],
) -> anyhow::Result<()> {
    let address = format!("10.77.1.{}", cluster.agents.len() + 1);
    net::machine(name, &address, line(args))?;
    let shoal = args.flags.shoal()?;
    let on_machine = net::on_machine(name, &shoal);
    let program = match before {
        [] => on_machine,
        [first, rest @ ..] => {
            let mut program = Command::new(first);
            program.args(rest).arg(on_machine.get_program()).args(on_machine.get_args());
            program
        }
    };
    let bucket = cluster.bucket();
    let bucket = bucket.to_str().context("a path that is no text")?;
    let settings = "keep_builds = 0\nreserve_free_mib = 64\n";
    cluster.start_agent(Agent { name, program, address: &address, port: PORT, bucket, settings })
}

/// Waits until all agents are known.
fn known(cluster: &mut Cluster) -> anyhow::Result<()> {
    cluster.operator(&["app", "set", APP])?;
    let agents = cluster.agents.len();
    cluster.wait("the machines to be known", LIMIT, |cluster| {
        let machines = cluster.operator(&["machines"])?;
        Ok(machines.as_array().is_some_and(|known| known.len() == agents))
    })
}

/// Publishes another artifact, and gives it to the seed.
fn seeded(args: &Args, cluster: &mut Cluster) -> anyhow::Result<Artifact> {
    let path = Path::new(ROOT).join("file");
    random_file(&path, args.size_mib << 20)?;
    let artifact = cluster.publish(APP, &path)?;
    std::fs::remove_file(&path)?;
    select(cluster, &[SEED.to_owned()])?;
    cluster.deploy(APP, &artifact)?;
    cluster.ended(APP, LIMIT)?;
    Ok(artifact)
}

/// From now on the app is for these machines.
fn select(cluster: &Cluster, agents: &[String]) -> anyhow::Result<()> {
    let selector = format!("machine={}", agents.join("|"));
    cluster.operator(&["app", "set", APP, "--selector", &selector]).map(drop)
}
