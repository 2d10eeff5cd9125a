//! One seed and N leechers, each an agent process as operators run it: mutual TLS, verification, piece files, sled. And in
//! the same run the same bytes from one process to another over bare quinn, with the same TLS and the same settings: the
//! bar to be compared with.
//!
//! All of it runs in a network namespace whose only link is a loopback of the MTU that is asked for, so no path is
//! longer than that.

mod run;

use std::{fs, path::PathBuf, process::ExitCode};

use anyhow::{Context as _, ensure};
use clap::Parser;
use shoal_benches::{
    ballast::{self, Ballast},
    bare::{self, Bare},
    cluster::Cluster,
    deployment, machine, median_of,
    namespaces::{self, Flags},
};

/// Measures one seed and some leechers, beside bare quinn. Needs iproute2 and util-linux.
#[derive(Parser)]
#[command(max_term_width = 100)]
struct Args {
    /// How many agents fetch from the seed and from each other.
    #[arg(long, default_value_t = 8)]
    leechers: usize,
    /// The length of the artifact, such as 1GiB; random bytes.
    #[arg(long, default_value = "1GiB", conflicts_with = "file")]
    size: bytesize::ByteSize,
    /// This file instead.
    #[arg(long)]
    file: Option<PathBuf>,
    /// The largest UDP payload of the path: 8972 with jumbo frames, 1472 on Ethernet.
    #[arg(long, default_value_t = 8_972)]
    mtu: u32,
    /// The seed's own limit on what it sends, such as 50MB/s.
    #[arg(long, value_name = "RATE")]
    seed_up_limit: Option<String>,
    /// How many deployments of another artifact each; medians are given.
    #[arg(long, default_value_t = 1)]
    rounds: usize,
    /// Where files lie: what is measured is no disk, unless you give one.
    #[arg(long, default_value = "/dev/shm")]
    dir: PathBuf,
    #[command(flatten)]
    flags: Flags,
    #[command(flatten)]
    bare: Bare,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(done) = args.bare.run() {
        return namespaces::ended(done.map(|()| ExitCode::SUCCESS));
    }
    namespaces::main(&args.flags, namespaces::as_anybody(), || check(&args), || inside(&args))
}

/// What must be so before anything is begun.
fn check(args: &Args) -> anyhow::Result<()> {
    ensure!((1..=64).contains(&args.leechers), "--leechers is 1 to 64");
    ensure!((1_472..=65_507).contains(&args.mtu), "--mtu is 1472 to 65507");
    ensure!((1..=100).contains(&args.rounds), "--rounds is 1 to 100");
    ensure!(args.size.as_u64() > 0, "--size is more than 0");
    let dir = args.dir.display();
    ensure!(args.dir.is_dir(), "there is no directory {dir}: give --dir");
    if let Some(file) = &args.file {
        let length =
            fs::metadata(file).with_context(|| format!("cannot read {}", file.display()))?;
        ensure!(length.is_file() && length.len() > 0, "{} is no file, or empty", file.display());
    }
    args.flags.shoal()?;
    let size = args
        .file
        .as_ref()
        .map_or(Ok(args.size.as_u64()), |file| fs::metadata(file).map(|file| file.len()))?;
    let copies = deployment::copies(args.leechers, args.rounds);
    let free = ballast::room(&args.dir)?;
    ensure!(
        free > size * copies,
        "it needs {} MiB in {dir}, and {} are free: give another --dir, or less",
        (size * copies) >> 20,
        free >> 20
    );
    Ok(())
}

fn inside(args: &Args) -> anyhow::Result<ExitCode> {
    machine::hold_loopback(args.mtu)?;
    let root = tempfile::Builder::new().prefix("shoal-swarm-").tempdir_in(&args.dir)?;
    let mut cluster = Cluster::create(&args.flags.shoal()?, root.path(), "127.0.0.1")?;
    let mut bars = vec![bare::measure(&cluster, root.path(), args.size.as_u64())?];
    let machines = machine::on_loopback(args.leechers);
    let limit = args.seed_up_limit.as_ref().map(|limit| format!("up_limit = \"{limit}\"\n"));
    deployment::start(&mut cluster, &args.flags.shoal()?, &machines, &limit.unwrap_or_default())?;
    let ballast = Ballast::new(&args.dir)?;
    let mut rounds = Vec::new();
    for round in 0..args.rounds {
        rounds.push(run::round(args, &mut cluster, &machines, root.path(), &ballast, round)?);
        bars.push(bare::measure(&cluster, root.path(), args.size.as_u64())?);
    }
    let bar = median_of(bars.into_iter()).context("nothing was measured")?;
    run::print(args, &rounds, bar)?;
    Ok(ExitCode::SUCCESS)
}
