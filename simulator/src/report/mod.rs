//! What all regions together come to: one JSON object, or a table for people.

mod figures;
mod table;

use std::{
    fs,
    io::{self, Write as _},
    time::Duration,
};

use serde::Serialize;

use crate::{
    pipeline::{Pipeline, Step, total_s},
    setup::Setup,
};
pub(crate) use figures::{Figures, size_bytes, sorted};

/// The figures of a run, as `--json` prints them. The fields up to `peak_rss_bytes` are always there and in this
/// order; those after it where the scenario has what they are about.
///
/// With several regions `nodes`, `completed`, `messages`, `events` and `wasted_bytes` are sums,
/// `control_bytes_per_node` is the mean over all machines, `origin_copies` and `cross_zone_copies` are the
/// largest of any region, `trace_digest` is that of the regions' digests, `seed` is the one that was given,
/// and the rest is the worst region's: the one whose last machine is complete last.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    nodes: u32,
    completed: u32,
    size_bytes: u64,
    piece_size_bytes: u64,
    pieces: u32,
    seed: u64,
    /// The fluid bound, which nothing beats: see `bounds.rs` and, for several artifacts, `fair.rs`.
    lower_bound_s: f64,
    startup_s: f64,
    makespan_s: f64,
    p50_s: f64,
    p99_s: f64,
    p999_s: f64,
    efficiency: f64,
    /// Piece bytes that left a region's bucket, by the size of its artifacts.
    origin_copies: f64,
    /// Piece bytes that entered a zone from another one, by the size of its artifacts, mean per zone.
    cross_zone_copies: f64,
    messages: u64,
    control_bytes_per_node: f64,
    events: u64,
    trace_digest: String,
    wall_s: f64,
    peak_rss_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    wasted_bytes: Option<u64>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    healthy: Option<figures::Healthy>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    artifacts: Vec<figures::Share>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    regions: Vec<Figures>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pipeline: Vec<Step>,
    #[serde(skip_serializing_if = "Option::is_none")]
    total_s: Option<f64>,
}

impl Report {
    /// What the regions come to, of which there is at least one. `setup` is the worst region's.
    pub(crate) fn new(
        setup: &Setup,
        regions: Vec<Figures>,
        pipeline: Option<&Pipeline>,
        wall: Duration,
    ) -> Self {
        let at = worst(&regions);
        let largest = |value: fn(&Figures) -> f64| regions.iter().map(value).fold(0.0, f64::max);
        let pieces_of = setup.artifacts.iter().max_by_key(|artifact| artifact.size_bytes);
        let steps =
            pipeline.map(|pipeline| pipeline.steps(size_bytes(setup), regions[at].makespan_s));
        let special = !setup.faults.is_empty() || setup.artifacts.len() > 1;
        let worst = regions[at].clone();
        Self {
            nodes: setup.nodes * regions.len() as u32,
            completed: regions.iter().map(|region| region.completed).sum(),
            size_bytes: size_bytes(setup),
            piece_size_bytes: pieces_of.map_or(0, |artifact| artifact.piece_bytes),
            pieces: setup.artifacts.iter().map(|artifact| artifact.pieces).sum(),
            seed: regions[0].seed,
            lower_bound_s: worst.lower_bound_s,
            startup_s: worst.startup_s,
            makespan_s: worst.makespan_s,
            p50_s: worst.p50_s,
            p99_s: worst.p99_s,
            p999_s: worst.p999_s,
            efficiency: worst.efficiency,
            origin_copies: largest(|region| region.origin_copies),
            cross_zone_copies: largest(|region| region.cross_zone_copies),
            messages: regions.iter().map(|region| region.messages).sum(),
            control_bytes_per_node: mean(&regions, |region| region.control_bytes_per_node),
            events: regions.iter().map(|region| region.events).sum(),
            trace_digest: digest(&regions),
            wall_s: wall.as_secs_f64(),
            peak_rss_bytes: peak_rss_bytes(),
            wasted_bytes: special.then(|| regions.iter().map(|region| region.wasted_bytes).sum()),
            healthy: worst.healthy,
            artifacts: worst.artifacts,
            total_s: steps.as_ref().map(|steps| total_s(steps)),
            pipeline: steps.unwrap_or_default(),
            regions: if regions.len() > 1 { regions } else { Vec::new() },
        }
    }

    /// Prints one JSON object in one line.
    pub(crate) fn print_json(&self) -> io::Result<()> {
        let text = serde_json::to_string(self)?;
        writeln!(io::stdout().lock(), "{text}")
    }

    /// Prints the figures for people.
    pub(crate) fn print_table(&self, setup: &Setup, about: Option<&str>) -> io::Result<()> {
        let text = table::text(self, setup, about);
        io::stdout().lock().write_all(text.as_bytes())
    }
}

/// The place of the region whose last machine is complete last: the first of those that never are, if any is not.
pub(crate) fn worst(regions: &[Figures]) -> usize {
    let later = |at: usize, than: usize| regions[at].makespan_s > regions[than].makespan_s;
    (0..regions.len()).reduce(|worst, at| if later(at, worst) { at } else { worst }).unwrap_or(0)
}

fn mean(regions: &[Figures], value: impl Fn(&Figures) -> f64) -> f64 {
    regions.iter().map(value).sum::<f64>() / regions.len() as f64
}

/// One region's digest, or FNV-1a over the digests of several.
fn digest(regions: &[Figures]) -> String {
    if let [one] = regions {
        return one.trace_digest.clone();
    }
    let bytes = regions.iter().flat_map(|region| region.trace_digest.bytes());
    let digest = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |digest, byte| {
        (digest ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{digest:016x}")
}

/// The most memory that this process has used; 0 where the system does not say.
fn peak_rss_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}
