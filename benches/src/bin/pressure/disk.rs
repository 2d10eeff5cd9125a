//! An agent whose disk is slower than its line: how much memory it takes, and how fast its neighbour sends.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, ensure};
use serde::Serialize;
use shoal_benches::{cluster::Cluster, net, process::Peaks};

use crate::{APP, Args, LIMIT, ROOT, SEED, known, seeded, select, start_agent};

const SLOW: &str = "slow";

/// What an agent may take of memory, files not counted.
const PEAK_MAX_BYTES: u64 = 200 << 20;

/// What is printed with `--json`.
#[derive(Serialize)]
struct Report {
    size_mib: u64,
    rate_mbit: f64,
    write_mb_s: f64,
    /// From the region's publishing of the goal to VERIFIED, in seconds.
    wall_s: f64,
    /// What the neighbour's line carried meanwhile, in MB/s: held to what the disk takes.
    received_mb_s: f64,
    /// The most memory that the agent held at any moment, files not counted.
    rss_anon_peak_bytes: u64,
}

/// Where the kernel takes a limit of writes, and how it is written.
fn controller() -> anyhow::Result<(PathBuf, &'static str)> {
    let one = Path::new("/sys/fs/cgroup/blkio");
    if one.join("blkio.throttle.write_bps_device").exists() {
        return Ok((one.into(), "blkio.throttle.write_bps_device"));
    }
    let two = Path::new("/sys/fs/cgroup");
    let controllers = fs::read_to_string(two.join("cgroup.subtree_control")).unwrap_or_default();
    ensure!(
        controllers.split_whitespace().any(|controller| controller == "io"),
        "the kernel limits no disk here: it needs the cgroup controller blkio, or io enabled at the root"
    );
    Ok((two.into(), "io.max"))
}

pub(crate) fn check() -> anyhow::Result<()> {
    controller()?;
    for tool in ["mkfs.ext4", "mount"] {
        let found = Command::new(tool).arg("-V").output();
        found.with_context(|| format!("cannot run {tool}: install e2fsprogs and util-linux"))?;
    }
    Ok(())
}

/// A disk of its own in a file, and the group of processes that write to it so slowly.
/// Drop it after the processes.
pub(crate) struct SlowDisk {
    group: PathBuf,
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.group) {
            eprintln!("cannot remove {}: {error}", self.group.display());
        }
    }
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

impl SlowDisk {
    /// Mounts it at `at`. The image lies in memory; the kernel holds back what is written to it.
    fn new(at: &Path, size_mib: u64, write_mb_s: f64) -> anyhow::Result<Self> {
        let image = Path::new(ROOT).join("disk");
        fs::File::create(&image)?.set_len(size_mib << 20)?;
        run(Command::new("mkfs.ext4").arg("-q").arg(&image))?;
        fs::create_dir_all(at)?;
        run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(at))?;
        let device = fs::metadata(at)?.dev();
        let device = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
        let (root, file) = controller()?;
        // Not removed as files are: what is in it is the kernel's.
        let group = tempfile::Builder::new().prefix("shoal-pressure-").tempdir_in(root)?.keep();
        let disk = Self { group };
        let bytes_per_s = (write_mb_s * 1e6) as u64;
        let limit = match file {
            "io.max" => format!("{device} wbps={bytes_per_s}"),
            _ => format!("{device} {bytes_per_s}"),
        };
        fs::write(disk.group.join(file), limit).context("the kernel takes no limit of the disk")?;
        Ok(disk)
    }
}

pub(crate) fn measure(
    args: &Args,
    cluster: &mut Cluster,
    write_mb_s: f64,
    disk: &mut Option<SlowDisk>,
) -> anyhow::Result<()> {
    let data = Path::new(ROOT).join(SLOW).join("data");
    let disk = disk.insert(SlowDisk::new(&data, args.size_mib * 2 + 256, write_mb_s)?);
    start_agent(args, cluster, SEED, &[])?;
    let enter = format!("echo $$ >{}/cgroup.procs && exec \"$@\"", disk.group.display());
    let before = ["sh", "-c", &enter, "sh"].map(str::to_owned);
    start_agent(args, cluster, SLOW, &before)?;
    known(cluster)?;
    let artifact = seeded(args, cluster)?;
    select(cluster, &[SEED.to_owned(), SLOW.to_owned()])?;
    let pid = cluster.pids().last().copied().context("no processes")?;
    let carried = net::carried(SLOW)?;
    let peaks = Peaks::watch(vec![pid]);
    let revision = cluster.deploy(APP, &artifact)?;
    let verified = cluster.verified(&[SLOW.to_owned()], APP, &revision, LIMIT)?;
    let rss_anon_peak_bytes = peaks.end().get(&pid).copied().context("its memory was not seen")?;
    let received = net::carried(SLOW)?.since(carried).down_bytes;
    let goal = cluster.goal_at(APP, &revision)?.context("no region process has the goal")?;
    let at = verified.get(SLOW).context("it has not verified")?;
    let wall_s = at.duration_since(goal)?.as_secs_f64();
    let report = Report {
        size_mib: args.size_mib,
        rate_mbit: args.rate_mbit,
        write_mb_s,
        wall_s,
        received_mb_s: received as f64 / 1e6 / wall_s,
        rss_anon_peak_bytes,
    };
    if args.flags.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        println!(
            "{} MiB over a line of {} Mbit/s to a disk of {write_mb_s} MB/s: {wall_s:.1} s, {:.1} MB/s received, {} MiB of memory at most",
            report.size_mib,
            report.rate_mbit,
            report.received_mb_s,
            rss_anon_peak_bytes >> 20
        );
    }
    ensure!(
        rss_anon_peak_bytes <= PEAK_MAX_BYTES,
        "it took {} MiB of memory: more than {}",
        rss_anon_peak_bytes >> 20,
        PEAK_MAX_BYTES >> 20
    );
    Ok(())
}
