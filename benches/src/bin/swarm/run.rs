//! The deployments: to the seed first, and then, which is measured, to everybody.

use std::{fs, io::Write as _, path::Path};

use anyhow::Context as _;
use serde::Serialize;
use shoal_benches::{
    ballast::Ballast,
    cluster::Cluster,
    deployment::{self, Round},
    machine::Machine,
    median_of, random_file,
};

use crate::Args;

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

/// Publishes another artifact, and deploys it to the seed and then to all.
pub(crate) fn round(
    args: &Args,
    cluster: &mut Cluster,
    machines: &[Machine],
    root: &Path,
    ballast: &Ballast,
    round: usize,
) -> anyhow::Result<Round> {
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
    let round = deployment::round(cluster, machines, &path, Some(ballast), wire_bytes)?;
    fs::remove_file(&path)?;
    Ok(round)
}

/// What went over the link so far, by this process's namespace.
fn wire_bytes() -> anyhow::Result<u64> {
    let links = fs::read_to_string("/proc/net/dev")?;
    let lo = links.lines().find_map(|line| line.trim().strip_prefix("lo:"));
    let sent = lo.and_then(|fields| fields.split_whitespace().nth(8)?.parse().ok());
    sent.context("/proc/net/dev says nothing of lo")
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
    if args.flags.json {
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
