//! The figures as people read them.

use std::fmt::Write as _;

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};

use super::Report;
use crate::{
    setup::Setup,
    units::{Rate, Size, grouped},
    world,
};

/// Room for a line's name.
const NAME_WIDTH: usize = 14;

/// All figures, and the world that they hold in.
pub(super) fn text(report: &Report, setup: &Setup, about: Option<&str>) -> String {
    let mut text = String::new();
    for (name, value) in lines(report, setup, about) {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{name:<NAME_WIDTH$}  {value}");
    }
    for (title, table) in [
        ("Artifacts, each from its start", artifacts(report)),
        ("Regions", regions(report)),
        ("Pipeline", pipeline(report)),
    ] {
        if let Some(table) = table {
            text += &format!("\n{title}\n{table}");
        }
    }
    text += "\nThe world: fixed\n";
    for (name, value) in world::DEFAULTS {
        let _ = writeln!(text, "  {name:<24}  {value}");
    }
    text
}

fn lines(report: &Report, setup: &Setup, about: Option<&str>) -> Vec<(&'static str, String)> {
    let mut lines = Vec::new();
    lines.extend(about.map(|about| ("scenario", about.to_string())));
    let line = |bps: Option<u64>| bps.map_or("never full".into(), |bps| Rate(bps).to_string());
    lines.extend([
        ("machines", {
            let (completed, nodes) = (u64::from(report.completed), u64::from(report.nodes));
            format!("{} of {} complete", grouped(completed), grouped(nodes))
        }),
        ("lines", {
            let (rack, zone) = (line(setup.rack_bps), line(setup.zone_bps));
            let nic = Rate(setup.nic_bps);
            format!("{nic} a machine; between racks {rack}, between zones {zone}")
        }),
        ("parts", format!("{} a piece: lines are shared evenly to within one", setup.parts)),
        ("zones", format!("{}, of {} racks each", setup.zones, setup.racks)),
        ("artifact", {
            let (size, piece) = (Size(report.size_bytes), Size(report.piece_size_bytes));
            format!("{size}, {} pieces of {piece}", grouped(u64::from(report.pieces)))
        }),
        ("lower bound", {
            format!("{}, and {} to start", seconds(report.lower_bound_s), seconds(report.startup_s))
        }),
        ("last machine", {
            format!("{}, efficiency {:.3}", seconds(report.makespan_s), report.efficiency)
        }),
        ("p50 p99 p99.9", { [report.p50_s, report.p99_s, report.p999_s].map(seconds).join(", ") }),
    ]);
    if let Some(healthy) = &report.healthy {
        let nodes = grouped(u64::from(healthy.healthy_nodes));
        let [p50, p99, last] =
            [healthy.healthy_p50_s, healthy.healthy_p99_s, healthy.healthy_makespan_s].map(seconds);
        lines.push(("healthy", format!("{nodes} machines: p50 {p50}, p99 {p99}, last {last}")));
        lines.extend(healthy.straggler_bound_s.map(|bound_s| {
            ("stragglers", format!("at least {} on their own lines", seconds(bound_s)))
        }));
    }
    lines.extend([
        ("origin", format!("{:.3} copies", report.origin_copies)),
        ("cross-zone", format!("{:.3} copies into each zone", report.cross_zone_copies)),
    ]);
    lines.extend(report.wasted_bytes.map(|bytes| ("wasted", Size(bytes).to_string())));
    lines.extend([
        ("control", {
            let bytes = Size(report.control_bytes_per_node as u64);
            format!("{} messages, {bytes} a machine", grouped(report.messages))
        }),
        ("trace", format!("{} events, digest {}", grouped(report.events), report.trace_digest)),
        ("simulated in", {
            let memory = Size(report.peak_rss_bytes);
            format!("{:.1} s, {memory} at most, seed {}", report.wall_s, report.seed)
        }),
    ]);
    lines.extend(
        report.total_s.map(|total_s| {
            ("whole pipeline", format!("{} ({})", seconds(total_s), minutes(total_s)))
        }),
    );
    lines
}

fn artifacts(report: &Report) -> Option<String> {
    let titles = ["size", "machines", "complete", "started", "last machine", "fair bound", "ratio"];
    let rows = report.artifacts.iter().map(|share| {
        vec![
            Size(share.size_bytes).to_string(),
            grouped(u64::from(share.machines)),
            grouped(u64::from(share.completed)),
            seconds(share.started_s),
            seconds(share.makespan_s),
            share.fair_bound_s.map_or("replaced".into(), seconds),
            share.ratio.map_or("-".into(), |ratio| format!("{ratio:.3}")),
        ]
    });
    rendered(&titles, rows)
}

fn regions(report: &Report) -> Option<String> {
    let titles =
        ["region", "seed", "complete", "last machine", "p99", "efficiency", "origin", "cross-zone"];
    let rows = report.regions.iter().map(|region| {
        vec![
            region.region.to_string(),
            region.seed.to_string(),
            grouped(u64::from(region.completed)),
            seconds(region.makespan_s),
            seconds(region.p99_s),
            format!("{:.3}", region.efficiency),
            format!("{:.3}", region.origin_copies),
            format!("{:.3}", region.cross_zone_copies),
        ]
    });
    rendered(&titles, rows)
}

fn pipeline(report: &Report) -> Option<String> {
    let rows = report.pipeline.iter();
    rendered(&["part", "takes"], rows.map(|step| vec![step.part.into(), seconds(step.seconds)]))
}

/// A table without lines, numbers to the right; none when it has no rows.
fn rendered(titles: &[&str], rows: impl Iterator<Item = Vec<String>>) -> Option<String> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(titles.to_vec());
    table.add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let lines = table.lines().map(|line| format!("  {}\n", line.trim_end()));
    (!table.is_empty()).then(|| lines.collect())
}

/// A time as people read it: infinite when it was not reached, and no number when there was nobody to reach it.
fn seconds(seconds: f64) -> String {
    match seconds {
        _ if seconds.is_nan() => "-".into(),
        _ if seconds.is_infinite() => "never".into(),
        _ => format!("{seconds:.3} s"),
    }
}

fn minutes(seconds: f64) -> String {
    if !seconds.is_finite() {
        return "never".into();
    }
    let whole = seconds.round() as u64;
    format!("{} min {} s", whole / 60, whole % 60)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        report::Figures,
        testing::{artifact, run, setup},
    };

    #[test]
    fn a_table_has_the_figures_and_the_world() {
        let mut setup = setup(2, 2_000_000_000);
        setup.artifacts.push(artifact(1_000_000_000));
        let machines = [(0, Some(30.0), true), (1, None, true)];
        let run = run(&[(0.0, &machines), (8.0, &machines)]);
        let figures = Figures::new(&setup, &run, 0);
        let report = Report::new(&setup, vec![figures], None, Duration::from_millis(1_500));
        let text = text(&report, &setup, Some("Two at once."));
        for line in [
            "scenario        Two at once.\n",
            "machines        1 of 2 complete\n",
            "last machine    never, efficiency 0.000\n",
            "p50 p99 p99.9   30.000 s, never, never\n",
            "The world: fixed\n",
        ] {
            assert!(text.contains(line), "{line:?} is not in\n{text}");
        }
        assert!(text.lines().all(|line| line.trim_end() == line), "{text}");
    }
}
