//! A picture of a run: completion over time, machines by their time, and copies over time.

mod chart;
mod picture;

use std::{
    fs::{File, OpenOptions},
    io::BufWriter,
    path::{Path, PathBuf},
};

use embedded_graphics::{
    mono_font::iso_8859_1::{FONT_9X15, FONT_10X20},
    pixelcolor::{Rgb888, RgbColor as _},
    text::Alignment,
};

use crate::{
    fair::Fluid,
    report::{size_bytes, sorted},
    setup::{Run, Setup},
    units::{Rate, Size, grouped},
};
use chart::{Axis, Chart, Line};
use picture::Picture;

const WIDTH: u32 = 1_200;
const HEIGHT: u32 = 1_480;

/// Room above the charts, in pixels.
const HEAD: f64 = 88.0;

/// Points that a line has at most: more than pixels would not be seen.
const POINTS_MAX: usize = 1_200;

/// Colours that people tell apart (Okabe and Ito), and some more.
const COLORS: [Rgb888; 10] = [
    Rgb888::new(0x00, 0x72, 0xb2),
    Rgb888::new(0xd5, 0x5e, 0x00),
    Rgb888::new(0x00, 0x9e, 0x73),
    Rgb888::new(0xcc, 0x79, 0xa7),
    Rgb888::new(0xe6, 0x9f, 0x00),
    Rgb888::new(0x56, 0xb4, 0xe9),
    Rgb888::new(0x7f, 0x3f, 0xbf),
    Rgb888::new(0x8c, 0x56, 0x4b),
    Rgb888::new(0x99, 0x99, 0x33),
    Rgb888::new(0x33, 0x44, 0x55),
];
const BOUND: Rgb888 = Rgb888::new(0x55, 0x55, 0x55);

/// Lines of a legend at most.
const LEGEND_MAX: usize = 14;

/// The file that a picture goes to. It is opened before the run, so that a wrong name costs no time.
pub(crate) struct Plot {
    file: File,
    path: PathBuf,
}

impl Plot {
    pub(crate) fn open(path: &Path) -> Result<Self, String> {
        // What is there stays until there is something better.
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(path);
        let file = file.map_err(|error| format!("cannot write {}: {error}", path.display()))?;
        Ok(Self { file, path: path.to_path_buf() })
    }

    pub(crate) fn draw(self, setup: &Setup, run: &Run, about: Option<&str>) -> Result<(), String> {
        let picture = picture(setup, run, about);
        let written = self.file.set_len(0);
        let written = written.and_then(|()| picture.write(BufWriter::new(&self.file)));
        written.map_err(|error| format!("cannot write {}: {error}", self.path.display()))
    }
}

fn picture(setup: &Setup, run: &Run, about: Option<&str>) -> Picture {
    let started_s: Vec<f64> = run.artifacts.iter().map(|fetched| fetched.started_s).collect();
    let fluid = Fluid::new(setup, &started_s);
    let mut picture = Picture::new(WIDTH, HEIGHT);
    let [title, subtitle] = titles(setup, about);
    picture.text(&title, (30.0, 32.0), Alignment::Left, &FONT_10X20, Rgb888::BLACK);
    picture.text(&subtitle, (30.0, 60.0), Alignment::Left, &FONT_9X15, BOUND);
    let charts = [
        completion(setup, run, &fluid),
        if setup.artifacts.len() > 1 { shares(run, &fluid) } else { machines(setup, run, &fluid) },
        copies(setup, run, &fluid),
    ];
    let height = (f64::from(HEIGHT) - HEAD) / charts.len() as f64;
    for (at, chart) in charts.iter().enumerate() {
        let top = HEAD + height * at as f64;
        chart.draw(&mut picture, f64::from(WIDTH), top, top + height);
    }
    picture
}

/// What the scenario is about, or the machines; and the setup in short.
fn titles(setup: &Setup, about: Option<&str>) -> [String; 2] {
    let nodes = grouped(u64::from(setup.nodes));
    let subtitle = format!(
        "{nodes} machines, {} zone{}, {} each way; {} artifact{}, {} in all; seed {}",
        setup.zones,
        if setup.zones == 1 { "" } else { "s" },
        Rate(setup.nic_bps),
        setup.artifacts.len(),
        if setup.artifacts.len() == 1 { "" } else { "s" },
        Size(size_bytes(setup)),
        setup.seed,
    );
    let title = about.map_or_else(|| format!("A swarm of {nodes} machines"), String::from);
    // A line of this font is this long at most.
    let room = (WIDTH as usize - 60) / 10;
    let title = match title.char_indices().nth(room) {
        Some((at, _)) => format!("{}...", &title[..at - 3]),
        None => title,
    };
    [title, subtitle]
}

/// The time axis of a whole run.
fn time(run: &Run, fluid: &Fluid) -> Axis {
    let to = run.ended_s.max(fluid.ends_s) * 1.02;
    Axis { title: "simulated time (s)", from: 0.0, to: to.max(1e-9) }
}

/// Part of all pieces held, and what the fluid limit would hold.
fn completion(setup: &Setup, run: &Run, fluid: &Fluid) -> Chart {
    // Pieces of an artifact that was replaced stay in the sum: what was dropped is missing at the end.
    let wholes = setup.artifacts.iter().map(|artifact| {
        artifact.size_bytes as f64 * f64::from(artifact.machines.unwrap_or(setup.nodes))
    });
    let whole: f64 = wholes.sum();
    let percent = |bytes: f64| bytes / whole * 100.0;
    let x = time(run, fluid);
    let held = run.samples.iter().map(|at| (at.at_s, percent(at.held_bytes as f64)));
    let ideal = (0..=POINTS_MAX).map(|at| {
        let at_s = fluid.ends_s * at as f64 / POINTS_MAX as f64;
        (at_s, percent(fluid.held_bytes(at_s)))
    });
    Chart {
        title: "Completion over time".into(),
        y: Axis { title: "pieces held (% of all)", from: 0.0, to: 100.0 },
        lines: vec![
            line("bound (fluid limit)", BOUND, true, ideal.collect()),
            line("simulated", COLORS[0], false, held.collect()),
        ],
        x,
    }
}

/// How many machines were complete by when: all, and those that no fault was laid on.
fn machines(setup: &Setup, run: &Run, fluid: &Fluid) -> Chart {
    let all = run.artifacts.iter().flat_map(|fetched| &fetched.machines);
    let count = all.clone().count();
    let times = |only_healthy: bool| {
        let some = all.clone().filter(|done| done.healthy || !only_healthy);
        (some.clone().count(), sorted(some.filter_map(|done| done.at_s)))
    };
    let (_, complete) = times(false);
    let bound_s = fluid.ends_s;
    let last = complete.last().copied().unwrap_or(bound_s).max(bound_s);
    let first = complete.first().copied().unwrap_or(bound_s).min(bound_s);
    let mut lines = vec![
        line(
            &format!("bound, {bound_s:.2} s"),
            BOUND,
            true,
            vec![(bound_s, 0.0), (bound_s, 100.0)],
        ),
        line(&named("all", &complete), COLORS[0], false, steps(&complete, count, last)),
    ];
    if !setup.faults.is_empty() {
        let (count, healthy) = times(true);
        let name = named("healthy", &healthy);
        lines.push(line(&name, COLORS[2], false, steps(&healthy, count, last)));
    }
    Chart {
        title: "Machines by the time they were complete".into(),
        x: Axis { title: "simulated time (s)", ..near(first, last) },
        y: Axis { title: "machines complete (%)", from: 0.0, to: 100.0 },
        lines,
    }
}

/// Of each artifact how many machines were complete by which multiple of its fair share's bound.
fn shares(run: &Run, fluid: &Fluid) -> Chart {
    let mut lines = Vec::new();
    let (mut first, mut last) = (1.0_f64, 1.0_f64);
    let artifacts = run.artifacts.iter().zip(&fluid.bounds_s).enumerate();
    for (at, (fetched, bound_s)) in artifacts {
        let Some(bound_s) = bound_s else { continue };
        let times = fetched.machines.iter().filter_map(|done| done.at_s);
        let times: Vec<f64> = sorted(times.map(|at_s| (at_s - fetched.started_s) / bound_s));
        first = first.min(times.first().copied().unwrap_or(first));
        last = last.max(times.last().copied().unwrap_or(last));
        let name = format!("artifact {at} ({bound_s:.1} s)");
        let color = COLORS[at % COLORS.len()];
        lines.push((name, color, times, fetched.machines.len()));
    }
    let lines = lines
        .into_iter()
        .map(|(name, color, times, count)| line(&name, color, false, steps(&times, count, last)));
    let bound = line("fair share's bound", BOUND, true, vec![(1.0, 0.0), (1.0, 100.0)]);
    Chart {
        title: "Machines of each artifact by the time they were complete".into(),
        x: Axis { title: "time since its goal / its fair share's bound", ..near(first, last) },
        y: Axis { title: "machines complete (%)", from: 0.0, to: 100.0 },
        lines: std::iter::once(bound).chain(lines).take(LEGEND_MAX).collect(),
    }
}

/// Copies of the artifacts that left the bucket, and that entered a zone from another.
fn copies(setup: &Setup, run: &Run, fluid: &Fluid) -> Chart {
    let copy = size_bytes(setup) as f64;
    let zones = f64::from(setup.zones);
    let origin = run.samples.iter().map(|at| (at.at_s, at.origin_bytes as f64 / copy));
    let cross = run.samples.iter().map(|at| (at.at_s, at.cross_zone_bytes as f64 / copy / zones));
    let (origin, cross): (Vec<_>, Vec<_>) = (origin.collect(), cross.collect());
    let most = origin.iter().chain(&cross).map(|(_, copies)| *copies).fold(1.0, f64::max);
    Chart {
        title: "Copies read from the bucket, and copies that crossed zones".into(),
        x: time(run, fluid),
        y: Axis { title: "copies of the artifacts", from: 0.0, to: most * 1.1 },
        lines: vec![
            line("from the bucket", COLORS[1], false, origin),
            line("into each zone (mean)", COLORS[2], false, cross),
        ],
    }
}

/// `WHICH, last T s`.
fn named(which: &str, times: &[f64]) -> String {
    times.last().map_or(which.into(), |last_s| format!("{which}, last {last_s:.2} s"))
}

fn line(name: &str, color: Rgb888, dashed: bool, points: Vec<(f64, f64)>) -> Line {
    Line { name: name.into(), color, dashed, points }
}

/// What part of `count`, in percent, was done by each of these sorted times, and so until `last`.
fn steps(times: &[f64], count: usize, last: f64) -> Vec<(f64, f64)> {
    let percent = |done: usize| done as f64 / count.max(1) as f64 * 100.0;
    let stride = times.len().div_ceil(POINTS_MAX).max(1);
    let mut points = vec![(0.0, 0.0)];
    let mut before = 0.0;
    for (at, time) in times.iter().enumerate() {
        if at % stride == 0 || at + 1 == times.len() {
            points.extend([(*time, before), (*time, percent(at + 1))]);
            before = percent(at + 1);
        }
    }
    points.push((last, before));
    points
}

/// An axis from a bit before `first` to a bit after `last`: from 0 when that does not make it much longer.
fn near(first: f64, last: f64) -> Axis {
    let room = ((last - first) * 0.06).max(last * 0.005).max(1e-9);
    let from = if first < last * 0.5 { 0.0 } else { first - room };
    Axis { title: "", from, to: last + room }
}

#[cfg(test)]
mod tests;
