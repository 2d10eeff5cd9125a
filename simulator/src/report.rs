//! What a run comes to.

use std::{
    fs,
    io::{self, Write},
    time::Duration,
};

use serde::Serialize;

use crate::world::{BUCKET_NICS, Run, Setup};

/// A run's figures. Times are in seconds from the moment that the region publishes the goal.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    nodes: u32,
    completed: u32,
    size_bytes: u64,
    piece_size_bytes: u64,
    pieces: u32,
    seed: u64,
    /// The fluid bound `max(F/B, F/u, N F/(B + N u))`, which nothing beats (Kumar and Ross 2006).
    lower_bound_s: f64,
    /// `floor(log2 N) p/u`: what the first pieces need to spread (Mundinger, Weber and Weiss 2008).
    startup_s: f64,
    makespan_s: f64,
    p50_s: f64,
    p99_s: f64,
    p999_s: f64,
    efficiency: f64,
    origin_copies: f64,
    cross_zone_copies: f64,
    messages: u64,
    control_bytes_per_node: f64,
    events: u64,
    trace_digest: String,
    wall_s: f64,
    peak_rss_bytes: u64,
}

pub(crate) fn lower_bound_s(setup: &Setup) -> f64 {
    let (size, nodes) = (setup.size_bytes as f64 * 8.0, f64::from(setup.nodes));
    let nic = setup.nic_bps as f64;
    let bucket = nic * f64::from(BUCKET_NICS);
    (size / bucket).max(size / nic).max(nodes * size / (bucket + nodes * nic))
}

impl Report {
    pub(crate) fn new(setup: &Setup, run: &Run, wall: Duration) -> Self {
        let mut times: Vec<f64> = run.completed.iter().map(|at| at.0 as f64 / 1e9).collect();
        times.sort_by(f64::total_cmp);
        let at = |part: f64| {
            let rank = (part * times.len() as f64).ceil() as usize;
            times.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
        };
        let lower_bound_s = lower_bound_s(setup);
        let makespan_s = at(1.0);
        let zones = f64::from(setup.zones);
        let size = setup.size_bytes as f64;
        let piece_bits = setup.piece_bytes.min(setup.size_bytes) as f64 * 8.0;
        Self {
            nodes: setup.nodes,
            completed: times.len() as u32,
            size_bytes: setup.size_bytes,
            piece_size_bytes: setup.piece_bytes,
            pieces: setup.pieces,
            seed: setup.seed,
            lower_bound_s,
            startup_s: f64::from(setup.nodes.ilog2()) * piece_bits / setup.nic_bps as f64,
            makespan_s,
            p50_s: at(0.5),
            p99_s: at(0.99),
            p999_s: at(0.999),
            efficiency: lower_bound_s / makespan_s,
            origin_copies: run.origin_bytes as f64 / size,
            cross_zone_copies: run.cross_zone_bytes as f64 / size / zones,
            messages: run.messages,
            control_bytes_per_node: run.control_bytes as f64 / f64::from(setup.nodes),
            events: run.events,
            trace_digest: format!("{:016x}", run.digest),
            wall_s: wall.as_secs_f64(),
            peak_rss_bytes: peak_rss_bytes(),
        }
    }

    pub(crate) fn print_json(&self) -> io::Result<()> {
        let text = serde_json::to_string(self)?;
        writeln!(io::stdout().lock(), "{text}")
    }

    pub(crate) fn print_table(&self) -> io::Result<()> {
        let mut out = io::stdout().lock();
        writeln!(out, "machines      {} of {} complete", self.completed, self.nodes)?;
        writeln!(out, "artifact      {} bytes, {} pieces", self.size_bytes, self.pieces)?;
        writeln!(
            out,
            "lower bound   {:.3} s (and {:.3} s to start)",
            self.lower_bound_s, self.startup_s
        )?;
        writeln!(out, "last machine  {:.3} s", self.makespan_s)?;
        let (p50, p99, p999) = (self.p50_s, self.p99_s, self.p999_s);
        writeln!(out, "p50 p99 p99.9 {p50:.3} s, {p99:.3} s, {p999:.3} s")?;
        writeln!(out, "efficiency    {:.3}", self.efficiency)?;
        writeln!(out, "origin        {:.3} copies", self.origin_copies)?;
        writeln!(out, "cross-zone    {:.3} copies into each zone", self.cross_zone_copies)?;
        let kib = self.control_bytes_per_node / 1024.0;
        writeln!(out, "control       {} messages, {kib:.0} KiB a machine", self.messages)?;
        writeln!(out, "trace         {} events, digest {}", self.events, self.trace_digest)?;
        let mib = self.peak_rss_bytes >> 20;
        writeln!(out, "simulated in  {:.1} s, {mib} MiB at most, seed {}", self.wall_s, self.seed)
    }
}

/// The most memory that this process has used; 0 where the system does not say.
fn peak_rss_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}
