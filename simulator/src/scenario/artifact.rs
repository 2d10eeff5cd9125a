//! `[[artifact]]`: what is fetched, by which machines and from when on.

use rand::{RngExt as _, SeedableRng as _};
use rand_pcg::Pcg64;
use serde::Deserialize;
use toml::Spanned;

use super::{Wrong, when};
use crate::{
    options::Options,
    setup::{Artifact, Setup, When, derived_seed},
    units::{Part, Seconds, Size},
    world::ARTIFACTS_MAX,
};

/// Sets the seeds of sizes and starts apart from those that choose machines.
const SIZES_SEED: u64 = 0x7369_7a65;

/// An artifact as it is written, or several that are alike but for size and start.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ArtifactTable {
    /// Default: the world's.
    size: Option<Spanned<Size>>,
    /// Default: the world's, and if it has none, the agent's own choice.
    piece_size: Option<Spanned<Size>>,
    /// How many machines fetch it, chosen by the seed. Default: all.
    machines: Option<Spanned<u32>>,
    /// When the goal is published. Default: at once.
    start: Option<Spanned<Seconds>>,
    /// At which part of all pieces held the goal is published.
    start_progress: Option<Spanned<Part>>,
    /// The higher, the earlier.
    #[serde(default)]
    priority: u8,
    /// The number, from 0, of an earlier artifact of the same app that this one replaces.
    replaces: Option<Spanned<u32>>,
    /// Makes this many, each with a size from `size_min` to `size_max` and a start up to `start_within`.
    count: Option<Spanned<u32>>,
    size_min: Option<Spanned<Size>>,
    size_max: Option<Spanned<Size>>,
    start_within: Option<Spanned<Seconds>>,
}

/// All artifacts of a file, in order.
pub(super) fn artifacts(
    tables: &[Spanned<ArtifactTable>],
    options: &Options,
    setup: &Setup,
) -> Result<Vec<Artifact>, Wrong> {
    let mut artifacts = Vec::new();
    for table in tables {
        if table.get_ref().count.is_some() {
            several(table, options, setup, &mut artifacts)?;
        } else {
            let one = one(table, options, setup, artifacts.len())?;
            artifacts.push(one);
        }
        if artifacts.len() > ARTIFACTS_MAX {
            let what = format!("there are more than {ARTIFACTS_MAX} artifacts");
            return Err(Wrong::new(table.span(), what));
        }
    }
    let first = tables.first();
    if let Some(first) = first
        && !artifacts.iter().any(|artifact| matches!(artifact.start, When::Seconds(_)))
    {
        let what = "no artifact starts by itself: give one of them no `start_progress`";
        return Err(Wrong::new(first.span(), what));
    }
    Ok(artifacts)
}

fn one(
    table: &Spanned<ArtifactTable>,
    options: &Options,
    setup: &Setup,
    number: usize,
) -> Result<Artifact, Wrong> {
    let keys = table.get_ref();
    let size_min = keys.size_min.as_ref().map(Spanned::span);
    let size_max = keys.size_max.as_ref().map(Spanned::span);
    let start_within = keys.start_within.as_ref().map(Spanned::span);
    if let Some(span) = size_min.or(size_max).or(start_within) {
        return Err(Wrong::new(span, "this goes with `count` only"));
    }
    let size = keys.size.as_ref().map_or_else(|| options.size(), |size| *size.get_ref());
    let start = match (&keys.start, &keys.start_progress) {
        (None, None) => When::Seconds(0.0),
        (start, part) => {
            let names = ["start", "start_progress"];
            when(table.span(), names, start.as_ref(), part.as_ref())?
        }
    };
    if let Some(replaces) = &keys.replaces
        && *replaces.get_ref() as usize >= number
    {
        let what = "this must be the number of an earlier artifact, from 0";
        return Err(Wrong::new(replaces.span(), what));
    }
    let replaces = keys.replaces.as_ref().map(|number| *number.get_ref());
    Ok(Artifact { start, replaces, ..alike(table, size, options, setup)? })
}

fn several(
    table: &Spanned<ArtifactTable>,
    options: &Options,
    setup: &Setup,
    artifacts: &mut Vec<Artifact>,
) -> Result<(), Wrong> {
    let keys = table.get_ref();
    let missing = |name| Wrong::new(table.span(), format!("`{name}` is missing beside `count`"));
    let count = keys.count.as_ref().ok_or_else(|| missing("count"))?;
    if !(1..=ARTIFACTS_MAX as u32).contains(count.get_ref()) {
        return Err(Wrong::new(count.span(), format!("give 1 to {ARTIFACTS_MAX}")));
    }
    let size = keys.size.as_ref().map(Spanned::span);
    let start = keys.start.as_ref().map(Spanned::span);
    let progress = keys.start_progress.as_ref().map(Spanned::span);
    let replaces = keys.replaces.as_ref().map(Spanned::span);
    if let Some(span) = size.or(start).or(progress).or(replaces) {
        return Err(Wrong::new(span, "this does not go with `count`"));
    }
    let size_min = keys.size_min.as_ref().ok_or_else(|| missing("size_min"))?;
    let size_max = keys.size_max.as_ref().ok_or_else(|| missing("size_max"))?;
    let within = keys.start_within.as_ref().map_or(0.0, |within| within.get_ref().0);
    let (least, most) = (size_min.get_ref().0, size_max.get_ref().0);
    if least > most {
        return Err(Wrong::new(size_max.span(), "this is less than `size_min`"));
    }
    let mut rng =
        Pcg64::seed_from_u64(derived_seed(setup.seed ^ SIZES_SEED, artifacts.len() as u64));
    for _ in 0..*count.get_ref() {
        let size = Size(rng.random_range(least..=most));
        let start_ms = rng.random_range(0..=(within * 1e3) as u64);
        let start = When::Seconds(start_ms as f64 / 1e3);
        artifacts.push(Artifact { start, ..alike(table, size, options, setup)? });
    }
    Ok(())
}

/// An artifact of this size with what the artifacts of one table have in common.
fn alike(
    table: &Spanned<ArtifactTable>,
    size: Size,
    options: &Options,
    setup: &Setup,
) -> Result<Artifact, Wrong> {
    let keys = table.get_ref();
    if let Some(machines) = &keys.machines
        && !(1..=setup.nodes).contains(machines.get_ref())
    {
        let what = format!("give 1 to the number of nodes, {}", setup.nodes);
        return Err(Wrong::new(machines.span(), what));
    }
    let piece_size = keys.piece_size.as_ref().map(|size| *size.get_ref()).or(options.piece_size);
    let place = [&keys.piece_size, &keys.size, &keys.size_max].into_iter().flatten().next();
    let place = place.map_or_else(|| table.span(), Spanned::span);
    let artifact = Artifact::new(size.0, piece_size.map(|size| size.0));
    Ok(Artifact {
        machines: keys.machines.as_ref().map(|machines| *machines.get_ref()),
        priority: keys.priority,
        ..artifact.map_err(|what| Wrong::new(place, what))?
    })
}
