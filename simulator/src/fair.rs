//! Several artifacts at once: what a fair share of each machine's line would bring, in the fluid limit.
//!
//! From its start on, each artifact that a machine is still fetching has an equal share of that machine's line. An
//! artifact's bound is the time from its start until the last of its machines has it, and no less than its own
//! [`lower_bound_s`]. A swarm may well beat it for one artifact, at the cost of another; when the last artifact
//! is done on a machine does not depend on how they share, so the latest of all ends is a bound that nothing beats.

use std::collections::BTreeMap;

use crate::{bounds::lower_bound_s, setup::Setup};

/// The fluid limit of a setup.
#[derive(Debug)]
pub(crate) struct Fluid {
    /// For each artifact, the seconds from its start to its bound; none: another one replaces it.
    pub(crate) bounds_s: Vec<Option<f64>>,
    /// When the last artifact is done, in seconds of the run.
    pub(crate) ends_s: f64,
    /// Machines that fetch the same artifacts: how many, and when their lines are busy.
    busy: Vec<(u32, Vec<(f64, f64)>)>,
    nic_bps: f64,
}

/// What a machine fetches.
#[derive(Debug, Clone, Copy)]
struct Job {
    artifact: usize,
    start_s: f64,
    /// When it is dropped, done or not.
    drop_s: f64,
    /// What is left of it, in seconds of the whole line.
    left_s: f64,
}

impl Fluid {
    /// `started_s`: when each artifact's goal was published, in seconds of the run.
    pub(crate) fn new(setup: &Setup, started_s: &[f64]) -> Self {
        let artifacts = setup.artifacts.len();
        let mut ends_s = vec![0.0_f64; artifacts];
        let mut busy = Vec::new();
        for (set, machines) in sets(setup) {
            let jobs = (0..artifacts).filter(|artifact| set >> artifact & 1 == 1).map(|artifact| {
                let newer = setup.replaced_by(artifact).filter(|newer| set >> newer & 1 == 1);
                let bits = setup.artifacts[artifact].size_bytes as f64 * 8.0;
                let start_s = started_s[artifact];
                Job {
                    artifact,
                    start_s,
                    drop_s: newer.map_or(f64::INFINITY, |newer| started_s[newer].max(start_s)),
                    left_s: bits / setup.nic_bps as f64,
                }
            });
            busy.push((machines, share(jobs.collect(), &mut ends_s)));
        }
        let bounds_s: Vec<_> = (0..artifacts)
            .map(|artifact| {
                let alone_s = lower_bound_s(setup, &setup.artifacts[artifact]);
                let shared_s = ends_s[artifact] - started_s[artifact];
                setup.replaced_by(artifact).is_none().then(|| shared_s.max(alone_s))
            })
            .collect();
        let ends =
            bounds_s.iter().zip(started_s).filter_map(|(bound, start)| Some((*bound)? + start));
        let ends_s = ends.fold(0.0, f64::max);
        Self { bounds_s, ends_s, busy, nic_bps: setup.nic_bps as f64 }
    }

    /// The bytes that all machines have received at a time.
    pub(crate) fn held_bytes(&self, at_s: f64) -> f64 {
        let busy_s = self.busy.iter().map(|(machines, spans)| {
            let spans = spans.iter().map(|(from, to)| (to.min(at_s) - from).max(0.0));
            f64::from(*machines) * spans.sum::<f64>()
        });
        busy_s.sum::<f64>() * self.nic_bps / 8.0
    }
}

/// How many machines fetch each set of artifacts, by a bit for each.
fn sets(setup: &Setup) -> BTreeMap<u64, u32> {
    let mut by_machine = vec![0_u64; setup.nodes as usize];
    for artifact in 0..setup.artifacts.len() {
        for machine in setup.members(artifact) {
            by_machine[machine as usize] |= 1 << artifact;
        }
    }
    let mut sets = BTreeMap::new();
    for set in by_machine {
        *sets.entry(set).or_insert(0) += 1;
    }
    sets
}

/// Shares one machine's line; moves each artifact's end to this machine's if that is later. Returns when the line
/// is busy.
fn share(mut jobs: Vec<Job>, ends_s: &mut [f64]) -> Vec<(f64, f64)> {
    let mut busy: Vec<(f64, f64)> = Vec::new();
    let mut now_s = 0.0;
    while !jobs.is_empty() {
        let open = |job: &Job| job.start_s <= now_s;
        let sharing = jobs.iter().filter(|job| open(job)).count() as f64;
        // What happens next: an artifact starts, is dropped, or is done.
        let next_s = jobs.iter().map(|job| {
            if open(job) { job.drop_s.min(now_s + job.left_s * sharing) } else { job.start_s }
        });
        let next_s = next_s.fold(f64::INFINITY, f64::min);
        if sharing > 0.0 {
            match busy.last_mut() {
                Some((_, to)) if *to == now_s => *to = next_s,
                _ => busy.push((now_s, next_s)),
            }
        }
        let passed_s = next_s - now_s;
        jobs.retain_mut(|job| {
            if job.start_s > now_s {
                return true;
            }
            // The one that is done next is done now, whatever rounding left of it.
            let done = now_s + job.left_s * sharing <= next_s;
            job.left_s -= passed_s / sharing;
            if done {
                ends_s[job.artifact] = ends_s[job.artifact].max(next_s);
            }
            !done && job.drop_s > next_s
        });
        now_s = next_s;
    }
    busy
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        setup::When,
        testing::{artifact, setup},
    };

    const GB: u64 = 1_000_000_000;

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-9
    }

    #[test]
    fn one_artifact_has_the_whole_line() {
        let fluid = Fluid::new(&setup(100, GB), &[0.0]);
        assert_eq!((fluid.bounds_s.as_slice(), fluid.ends_s), ([Some(8.0)].as_slice(), 8.0));
        assert!(close(fluid.held_bytes(4.0), 50.0 * GB as f64));
        assert!(close(fluid.held_bytes(99.0), 100.0 * GB as f64));
    }

    #[test]
    fn a_small_one_waits_for_half_of_a_large_one() {
        let mut setup = setup(100, 4 * GB);
        setup.artifacts.push(artifact(GB));
        // The large one has 16 s alone; both share from 16 s to 32 s; it has the line again until 40 s.
        let fluid = Fluid::new(&setup, &[0.0, 16.0]);
        assert_eq!(fluid.bounds_s, [Some(40.0), Some(16.0)]);
        assert_eq!(fluid.ends_s, 40.0);
    }

    #[test]
    fn lines_rest_between_artifacts() {
        let mut setup = setup(10, GB);
        setup.artifacts.push(artifact(GB));
        let fluid = Fluid::new(&setup, &[2.0, 20.0]);
        assert_eq!((fluid.bounds_s.as_slice(), fluid.ends_s), ([Some(8.0); 2].as_slice(), 28.0));
        assert!(close(fluid.held_bytes(15.0), 10.0 * GB as f64));
        assert!(close(fluid.held_bytes(24.0), 15.0 * GB as f64));
    }

    #[test]
    fn the_slowest_machine_is_the_one_that_fetches_both() {
        let mut setup = setup(10, GB);
        setup.artifacts = vec![artifact(GB), artifact(GB)];
        setup.artifacts[0].machines = Some(9);
        setup.artifacts[1].machines = Some(9);
        assert_eq!(Fluid::new(&setup, &[0.0, 0.0]).bounds_s, [Some(16.0); 2]);
    }

    #[test]
    fn what_is_replaced_gives_its_share_away() {
        let mut setup = setup(10, GB);
        setup.artifacts.push(artifact(GB));
        setup.artifacts[1].replaces = Some(0);
        setup.artifacts[1].start = When::Progress(0.5);
        let fluid = Fluid::new(&setup, &[0.0, 4.0]);
        assert_eq!((fluid.bounds_s.as_slice(), fluid.ends_s), ([None, Some(8.0)].as_slice(), 12.0));
    }
}
