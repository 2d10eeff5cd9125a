//! Shoal beside other programs that bring a file from one machine to many: the same file, the same machines, in one run, in
//! interleaved rounds.
//!
//! Each peer is a process of its own, and files lie in memory. The seed has the file, hashed, before the clock starts; all
//! leechers begin at the same moment; it stops when the last of them has the whole file, verified if the program
//! verifies. What each got is compared with the file afterwards, off the clock.
//!
//! `benches/peers/install` installs the others; one that is not there is named and left out.

mod bittorrent;
mod case;
mod curl;
mod http;
mod iroh;
mod kind;
mod libtorrent;
mod report;
mod run;
mod shoal;
mod talk;
mod torrent;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, ensure};
use clap::Parser;
use shoal_benches::{
    bucket, machine,
    namespaces::{self, Flags},
    net,
};

use crate::{case::Case, kind::Kind};

/// Measures Shoal beside rqbit, libtorrent, aria2, nginx with curl, and iroh-blobs. Needs root, iproute2 and util-linux.
#[derive(Parser)]
#[command(max_term_width = 100)]
struct Args {
    /// What is measured.
    #[arg(long = "case", value_enum, value_delimiter = ',', default_values = ["one", "many"])]
    cases: Vec<Case>,
    /// Only these; by default all that are installed and that the case is for.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Kind>,
    /// How many leechers there are, but in the case `one`.
    #[arg(long, default_value_t = 8)]
    leechers: usize,
    /// The length of the file, such as 1GiB; random bytes.
    #[arg(long, default_value = "1GiB")]
    size: bytesize::ByteSize,
    /// The largest UDP payloads of the path, each in turn: 8972 with jumbo frames, 1472 on Ethernet.
    #[arg(long, value_delimiter = ',', default_values_t = [8_972, 1_472])]
    mtu: Vec<u32>,
    /// How many times each is measured; medians are given.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// What the seed may send in the case `seed-up`, in MB (1e6 bytes) a second, headers counted.
    #[arg(long, value_name = "MB/S", default_value_t = 50.0)]
    seed_up: f64,
    /// What each line carries each way in the case `links`, in MB (1e6 bytes) a second, headers counted.
    #[arg(long, value_name = "MB/S", default_value_t = 15.0)]
    link: f64,
    /// Where files lie: what is measured is no disk, unless you give one.
    #[arg(long, default_value = "/dev/shm")]
    dir: PathBuf,
    /// The directory that `benches/peers/install` filled; by default `peers` in the target directory.
    #[arg(long, value_name = "DIR")]
    peers: Option<PathBuf>,
    #[command(flatten)]
    flags: Flags,
    #[command(flatten)]
    serve: bucket::Serve,
}

impl Args {
    /// The directory of what is installed.
    fn installed(&self) -> anyhow::Result<PathBuf> {
        if let Some(dir) = &self.peers {
            return std::path::absolute(dir).context("--peers");
        }
        let target = std::env::current_exe()?;
        let target = target.parent().and_then(Path::parent).context("no target directory")?;
        Ok(target.join("peers"))
    }

    /// Those that a case is measured with.
    fn kinds(&self, case: Case) -> anyhow::Result<Vec<Kind>> {
        if !self.only.is_empty() {
            return Ok(self.only.clone());
        }
        let installed = self.installed()?;
        let all = case.kinds().iter().copied();
        Ok(all.filter(|kind| kind.missing(&installed).is_none()).collect())
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(done) = args.serve.run() {
        return namespaces::ended(done.map(|()| ExitCode::SUCCESS));
    }
    namespaces::main(&args.flags, &[], || check(&args), || run::all(&args))
}

/// What must be so before anything is begun.
fn check(args: &Args) -> anyhow::Result<()> {
    net::check()?;
    ensure!(
        (1..machine::MACHINES_MAX).contains(&args.leechers),
        "--leechers is 1 to {}",
        machine::MACHINES_MAX - 1
    );
    ensure!(args.size.as_u64() > 0, "--size is more than 0");
    ensure!(args.mtu.iter().all(|mtu| (1_472..=65_507).contains(mtu)), "--mtu is 1472 to 65507");
    ensure!(args.mtu.len() <= 8 && args.cases.len() <= 8, "--mtu and --case take at most 8 each");
    ensure!((1..=100).contains(&args.rounds), "--rounds is 1 to 100");
    ensure!((0.1..=1_000.0).contains(&args.seed_up), "--seed-up is 0.1 to 1000");
    ensure!((0.1..=1_000.0).contains(&args.link), "--link is 0.1 to 1000");
    let dir = args.dir.display();
    ensure!(args.dir.is_dir(), "there is no directory {dir}: give --dir");
    // Each peer's, the two buckets', what the seed keeps, and the file itself.
    let needed = args.size.as_u64() * (args.leechers as u64 + 4);
    let free = rustix::fs::statvfs(&args.dir)?;
    let free = free.f_bavail * free.f_frsize;
    ensure!(
        free > needed,
        "it needs {} MiB in {dir}, and {} are free: give another --dir, or less",
        needed >> 20,
        free >> 20
    );
    let installed = args.installed()?;
    let wanted = if args.only.is_empty() { Kind::ALL } else { &args.only };
    for kind in wanted {
        if let Some(missing) = kind.missing(&installed) {
            ensure!(args.only.is_empty(), "{missing}");
            eprintln!("left out: {missing}");
        }
    }
    if wanted.contains(&Kind::Shoal) {
        args.flags.shoal()?;
    }
    Ok(())
}
