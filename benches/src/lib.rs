//! What the benchmarks share: running commands in turn and saying how long each took.
//!
//! Figures of one machine mean little on another, and on a busy one they drift within a minute. So every
//! benchmark runs what it compares in one run, in interleaved rounds, and gives medians and their ratios. A
//! contender that is not installed is named and left out.

pub mod ballast;
pub mod bare;
pub mod bucket;
pub mod cluster;
pub mod deployment;
pub mod machine;
pub mod namespaces;
pub mod net;
pub mod plot;
pub mod process;
pub mod processes;

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use serde::Serialize;

/// What one command took.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Cost {
    /// From start to end, in seconds.
    pub wall_s: f64,
    /// User and system time of the command and its children, in seconds; to 10 ms.
    pub cpu_s: f64,
}

/// User and system time of all children that were waited for, in seconds; to 10 ms.
///
/// # Errors
/// When `/proc/self/stat` does not say.
pub fn children_cpu_s() -> anyhow::Result<f64> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    // The name in parentheses may hold anything; cutime and cstime are the 16th and 17th fields (proc(5)).
    let (_, fields) = stat.rsplit_once(')').context("no name in /proc/self/stat")?;
    let mut fields = fields.split_whitespace().skip(13);
    let mut ticks = || fields.next().and_then(|field| field.parse::<f64>().ok());
    match (ticks(), ticks()) {
        (Some(user), Some(system)) => Ok((user + system) / process::TICKS_PER_SECOND),
        _ => bail!("/proc/self/stat has no CPU times of children"),
    }
}

/// Runs a command to its end, and gives what it took and printed.
///
/// # Errors
/// When it cannot be started or fails.
pub fn run(command: &mut Command) -> anyhow::Result<(Cost, String)> {
    let before = children_cpu_s()?;
    let start = Instant::now();
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot run {command:?}"))?;
    let wall_s = start.elapsed().as_secs_f64();
    if !output.status.success() {
        bail!("{command:?} failed: {}", output.status);
    }
    let cost = Cost { wall_s, cpu_s: children_cpu_s()? - before };
    Ok((cost, String::from_utf8_lossy(&output.stdout).into_owned()))
}

/// Whether a program can be started.
///
/// # Errors
/// When it is there and cannot be started.
pub fn installed(program: &str) -> anyhow::Result<bool> {
    match Command::new(program).arg("--version").stdout(Stdio::null()).status() {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).with_context(|| format!("cannot run {program}")),
    }
}

/// A program of this project: the one that was given, or the one beside this one.
///
/// # Errors
/// When it is not there; it says how to make it.
pub fn program(given: Option<&Path>, name: &str) -> anyhow::Result<PathBuf> {
    let path = match given {
        Some(path) => path.to_path_buf(),
        None => std::env::current_exe()?.with_file_name(name),
    };
    anyhow::ensure!(
        path.is_file(),
        "{} is missing: cargo build --release -p {name}",
        path.display()
    );
    Ok(fs::canonicalize(path)?)
}

/// The median; none of none.
#[must_use]
pub fn median_of(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut all: Vec<f64> = values.collect();
    all.sort_by(f64::total_cmp);
    all.get(all.len() / 2).copied()
}

/// The median of wall and of CPU time, each by itself; none of none.
#[must_use]
pub fn median(costs: &[Cost]) -> Option<Cost> {
    let middle = |pick: fn(&Cost) -> f64| median_of(costs.iter().map(pick));
    Some(Cost { wall_s: middle(|c| c.wall_s)?, cpu_s: middle(|c| c.cpu_s)? })
}

/// The most memory that this process ever held, in bytes.
///
/// # Errors
/// When `/proc/self/status` does not say.
pub fn peak_rss_bytes() -> anyhow::Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
        .context("/proc/self/status has no VmHWM")?;
    Ok(kib * 1024)
}

/// Waits until what was written is on the disk, so that one contender does not pay for another's.
///
/// # Errors
/// When `sync` cannot be run.
pub fn settle(dir: &Path) -> anyhow::Result<Duration> {
    let start = Instant::now();
    let status = Command::new("sync").arg("-f").arg(dir).status().context("cannot run sync")?;
    anyhow::ensure!(status.success(), "sync failed: {status}");
    Ok(start.elapsed())
}

/// Writes a file of random bytes, so that nothing compresses it.
///
/// # Errors
/// When it cannot be written.
pub fn random_file(path: &Path, bytes: u64) -> anyhow::Result<()> {
    let mut seed = [0; 32];
    File::open("/dev/urandom")?.read_exact(&mut seed)?;
    let mut stream = blake3::Hasher::new_keyed(&seed).finalize_xof();
    let mut file = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
    let mut chunk = vec![0; 1 << 20];
    let mut left = bytes;
    while left > 0 {
        let part = &mut chunk[..left.min(1 << 20) as usize];
        stream.fill(part);
        file.write_all(part)?;
        left -= part.len() as u64;
    }
    Ok(())
}
