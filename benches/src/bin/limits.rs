//! What this machine can do at best: bare quinn with the transport's TLS and settings, BLAKE3, zstd both ways, writing and
//! reading a file. The bars that the agents are compared with, all in one run, in interleaved rounds.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use anyhow::ensure;
use clap::Parser;
use serde::Serialize;
use shoal_benches::{
    ballast::Ballast,
    bare::{self, Bare},
    cluster::Cluster,
    machine, median_of,
    namespaces::{self, Flags},
    process,
};

/// What is hashed, encoded, written and read at once: the length of a piece.
const BLOCK_BYTES: usize = 4 << 20;

/// Measures what this machine can do at best. Needs iproute2 and util-linux.
#[derive(Parser)]
#[command(max_term_width = 100)]
struct Args {
    /// How many bytes each one works on, such as 1GiB.
    #[arg(long, default_value = "1GiB")]
    size: bytesize::ByteSize,
    /// What zstd encodes: by default the program `shoal` itself, again and again.
    #[arg(long)]
    file: Option<PathBuf>,
    /// How many rounds; medians are given.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Where files lie.
    #[arg(long, default_value = "/dev/shm")]
    dir: PathBuf,
    #[command(flatten)]
    flags: Flags,
    #[command(flatten)]
    bare: Bare,
}

/// One thing that was measured.
#[derive(Debug, Clone, Serialize)]
struct Limit {
    what: &'static str,
    gb_per_s: f64,
    cpu_s_per_gb: f64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(done) = args.bare.run() {
        return namespaces::ended(done.map(|()| ExitCode::SUCCESS));
    }
    namespaces::main(&args.flags, namespaces::as_anybody(), || check(&args), || inside(&args))
}

fn check(args: &Args) -> anyhow::Result<()> {
    ensure!(args.size.as_u64() >= BLOCK_BYTES as u64, "--size is 4MiB or more");
    ensure!((1..=100).contains(&args.rounds), "--rounds is 1 to 100");
    ensure!(args.dir.is_dir(), "there is no directory {}: give --dir", args.dir.display());
    let encoded = args.encoded()?;
    ensure!(encoded.is_file(), "{} is no file: give another --file", encoded.display());
    args.flags.shoal().map(drop)
}

impl Args {
    fn encoded(&self) -> anyhow::Result<PathBuf> {
        self.file.clone().map_or_else(|| self.flags.shoal(), Ok)
    }
}

fn inside(args: &Args) -> anyhow::Result<ExitCode> {
    let root = tempfile::Builder::new().prefix("shoal-limits-").tempdir_in(&args.dir)?;
    let cluster = Cluster::create(&args.flags.shoal()?, root.path(), "127.0.0.1")?;
    let file = root.path().join("random");
    let native = blocks(&fs::read(args.encoded()?)?, args.size.as_u64());
    let packed: Vec<Vec<u8>> =
        native.iter().map(|block| zstd::bulk::compress(block, 1)).collect::<Result<_, _>>()?;
    let bytes = args.size.as_u64();
    let ballast = Ballast::new(root.path())?;
    let mut rounds: Vec<Vec<Limit>> = Vec::new();
    for _ in 0..args.rounds {
        let mut limits = Vec::new();
        for (what, mtu) in
            [("bare quinn, packets of 1,472", 1_472), ("bare quinn, packets of 8,972", 8_972)]
        {
            machine::hold_loopback(mtu)?;
            let begun = Instant::now();
            let cpu_s_per_gb = bare::measure(&cluster, root.path(), bytes)?;
            let gb_per_s = bytes as f64 / 1e9 / begun.elapsed().as_secs_f64();
            limits.push(Limit { what, gb_per_s, cpu_s_per_gb });
        }
        limits.push(own("BLAKE3, one thread", bytes, || {
            let block = vec![7; BLOCK_BYTES];
            (0..bytes.div_ceil(BLOCK_BYTES as u64)).for_each(|_| {
                std::hint::black_box(blake3::hash(&block));
            });
            Ok(())
        })?);
        let encoded: u64 = native.iter().map(|block| block.len() as u64).sum();
        limits.push(own("zstd -1, encode", encoded, || {
            for block in &native {
                std::hint::black_box(zstd::bulk::compress(block, 1)?);
            }
            Ok(())
        })?);
        limits.push(own("zstd, decode", encoded, || {
            for (block, plain) in packed.iter().zip(&native) {
                std::hint::black_box(zstd::bulk::decompress(block, plain.len())?);
            }
            Ok(())
        })?);
        ballast.fill()?;
        limits.push(own("write a file", bytes, || write(&file, bytes))?);
        limits.push(own("read a file", bytes, || read(&file))?);
        fs::remove_file(&file)?;
        rounds.push(limits);
    }
    let limits = (0..rounds[0].len()).filter_map(|at| {
        let median = |of: fn(&Limit) -> f64| median_of(rounds.iter().map(|round| of(&round[at])));
        Some(Limit {
            what: rounds[0][at].what,
            gb_per_s: median(|limit| limit.gb_per_s)?,
            cpu_s_per_gb: median(|limit| limit.cpu_s_per_gb)?,
        })
    });
    let limits: Vec<Limit> = limits.collect();
    if args.flags.json {
        println!("{}", serde_json::to_string(&limits)?);
        return Ok(ExitCode::SUCCESS);
    }
    println!("{:30}  GB/s  CPU s/GB", "");
    for limit in limits {
        println!("{:30}  {:4.2}      {:4.2}", limit.what, limit.gb_per_s, limit.cpu_s_per_gb);
    }
    Ok(ExitCode::SUCCESS)
}

/// A file's blocks, again and again, of so many bytes in all.
fn blocks(file: &[u8], bytes: u64) -> Vec<Vec<u8>> {
    let count = (bytes / BLOCK_BYTES as u64).max(1) as usize;
    file.chunks(BLOCK_BYTES).cycle().take(count).map(<[u8]>::to_vec).collect()
}

/// Measures what this process does itself.
fn own(
    what: &'static str,
    bytes: u64,
    work: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<Limit> {
    let pid = std::process::id();
    let before = process::usage(pid)?.cpu_s;
    let begun = Instant::now();
    work()?;
    let wall_s = begun.elapsed().as_secs_f64();
    let cpu_s = process::usage(pid)?.cpu_s - before;
    let gb = bytes as f64 / 1e9;
    Ok(Limit { what, gb_per_s: gb / wall_s, cpu_s_per_gb: cpu_s / gb })
}

fn write(path: &Path, bytes: u64) -> anyhow::Result<()> {
    let block = vec![7; BLOCK_BYTES];
    let mut file = File::create(path)?;
    for _ in 0..bytes.div_ceil(BLOCK_BYTES as u64) {
        file.write_all(&block)?;
    }
    Ok(())
}

fn read(path: &Path) -> anyhow::Result<()> {
    let mut block = vec![0; BLOCK_BYTES];
    let mut file = File::open(path)?;
    while file.read(&mut block)? > 0 {
        std::hint::black_box(&block);
    }
    Ok(())
}
