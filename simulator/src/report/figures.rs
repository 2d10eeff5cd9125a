//! What one region's run comes to.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::{
    bounds::{startup_s, straggler_bound_s},
    fair::Fluid,
    setup::{Run, Setup},
};

/// One region's figures. Times are in seconds from the start of the run; a time that was not reached is infinite,
/// which is `null` in JSON.
///
/// With several artifacts a machine is complete when it holds all that it was to fetch, sizes and pieces are sums,
/// and the bound is when the last one could be complete.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Figures {
    /// The region's number, from 0.
    pub(crate) region: u32,
    /// The seed that gives this region alone.
    pub(crate) seed: u64,
    pub(crate) completed: u32,
    pub(crate) lower_bound_s: f64,
    pub(crate) startup_s: f64,
    pub(crate) makespan_s: f64,
    pub(crate) p50_s: f64,
    pub(crate) p99_s: f64,
    pub(crate) p999_s: f64,
    pub(crate) efficiency: f64,
    pub(crate) origin_copies: f64,
    pub(crate) cross_zone_copies: f64,
    pub(crate) messages: u64,
    pub(crate) control_bytes_per_node: f64,
    pub(crate) events: u64,
    pub(crate) trace_digest: String,
    pub(crate) wasted_bytes: u64,
    /// Machines that no fault was laid on, when there are faults.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) healthy: Option<Healthy>,
    /// One line for each artifact, when there are several.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) artifacts: Vec<Share>,
}

/// What came of the machines that no fault was laid on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Healthy {
    pub(crate) healthy_nodes: u32,
    pub(crate) healthy_p50_s: f64,
    pub(crate) healthy_p99_s: f64,
    pub(crate) healthy_makespan_s: f64,
    /// What the slowest straggler needs on its own line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) straggler_bound_s: Option<f64>,
}

/// One of several artifacts. Times but `started_s` count from its start.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Share {
    pub(crate) size_bytes: u64,
    pub(crate) machines: u32,
    pub(crate) completed: u32,
    pub(crate) started_s: f64,
    pub(crate) makespan_s: f64,
    /// Its fair share's bound; none: another artifact replaced it.
    pub(crate) fair_bound_s: Option<f64>,
    /// `makespan_s / fair_bound_s`.
    pub(crate) ratio: Option<f64>,
}

impl Figures {
    /// What the run of region number `region` comes to.
    pub(crate) fn new(setup: &Setup, run: &Run, region: u32) -> Self {
        let started_s: Vec<f64> = run.artifacts.iter().map(|fetched| fetched.started_s).collect();
        let fluid = Fluid::new(setup, &started_s);
        let ends = ends(run);
        let all = sorted(ends.values().map(|end| end.at_s));
        let idle = idle(setup);
        let complete = all.iter().filter(|at_s| at_s.is_finite()).count() as u32;
        let size_bytes = size_bytes(setup) as f64;
        let makespan_s = quantile(&all, 1.0);
        let startup_s = setup.artifacts.iter().map(|artifact| startup_s(setup, artifact));
        let several = setup.artifacts.len() > 1;
        Self {
            region,
            seed: setup.seed,
            completed: complete + idle,
            lower_bound_s: fluid.ends_s,
            startup_s: startup_s.fold(0.0, f64::max),
            makespan_s,
            p50_s: quantile(&all, 0.5),
            p99_s: quantile(&all, 0.99),
            p999_s: quantile(&all, 0.999),
            efficiency: fluid.ends_s / makespan_s,
            origin_copies: run.origin_bytes as f64 / size_bytes,
            cross_zone_copies: run.cross_zone_bytes as f64 / size_bytes / f64::from(setup.zones),
            messages: run.messages,
            control_bytes_per_node: run.control_bytes as f64 / f64::from(setup.nodes),
            events: run.events,
            trace_digest: format!("{:016x}", run.digest),
            wasted_bytes: run.wasted_bytes,
            healthy: (!setup.faults.is_empty()).then(|| Healthy::new(setup, &ends)),
            artifacts: if several { shares(setup, run, &fluid) } else { Vec::new() },
        }
    }
}

impl Healthy {
    fn new(setup: &Setup, ends: &BTreeMap<u32, End>) -> Self {
        let healthy = sorted(ends.values().filter(|end| end.healthy).map(|end| end.at_s));
        Self {
            healthy_nodes: healthy.len() as u32,
            healthy_p50_s: quantile(&healthy, 0.5),
            healthy_p99_s: quantile(&healthy, 0.99),
            healthy_makespan_s: quantile(&healthy, 1.0),
            straggler_bound_s: straggler_bound_s(setup),
        }
    }
}

/// The bytes of all artifacts together.
pub(crate) fn size_bytes(setup: &Setup) -> u64 {
    setup.artifacts.iter().map(|artifact| artifact.size_bytes).sum()
}

/// When a machine had all that it was to fetch.
#[derive(Debug, Clone, Copy)]
struct End {
    at_s: f64,
    healthy: bool,
}

fn ends(run: &Run) -> BTreeMap<u32, End> {
    let mut ends = BTreeMap::new();
    for completion in run.artifacts.iter().flat_map(|fetched| &fetched.machines) {
        let end = ends.entry(completion.machine).or_insert(End { at_s: 0.0, healthy: true });
        end.at_s = end.at_s.max(completion.at_s.unwrap_or(f64::INFINITY));
        end.healthy &= completion.healthy;
    }
    ends
}

/// Machines that have nothing to fetch.
fn idle(setup: &Setup) -> u32 {
    let mut fetches = vec![false; setup.nodes as usize];
    for artifact in 0..setup.artifacts.len() {
        for machine in setup.members(artifact) {
            fetches[machine as usize] = true;
        }
    }
    fetches.iter().filter(|fetches| !**fetches).count() as u32
}

fn shares(setup: &Setup, run: &Run, fluid: &Fluid) -> Vec<Share> {
    let fetched = setup.artifacts.iter().zip(&run.artifacts).zip(&fluid.bounds_s);
    let shares = fetched.map(|((artifact, fetched), fair_bound_s)| {
        let machines = fetched.machines.iter();
        let times = machines.map(|done| done.at_s.unwrap_or(f64::INFINITY) - fetched.started_s);
        let times = sorted(times);
        let makespan_s = quantile(&times, 1.0);
        Share {
            size_bytes: artifact.size_bytes,
            machines: artifact.machines.unwrap_or(setup.nodes),
            completed: times.iter().filter(|at_s| at_s.is_finite()).count() as u32,
            started_s: fetched.started_s,
            makespan_s,
            fair_bound_s: *fair_bound_s,
            ratio: fair_bound_s.map(|bound_s| makespan_s / bound_s),
        }
    });
    shares.collect()
}

pub(crate) fn sorted(times: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut times: Vec<f64> = times.collect();
    times.sort_by(f64::total_cmp);
    times
}

/// The smallest of these sorted times that this part of them does not exceed; not a number when there are none.
fn quantile(times: &[f64], part: f64) -> f64 {
    let rank = (part * times.len() as f64).ceil() as usize;
    times.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        setup::Fault,
        testing::{artifact, run, setup},
    };

    const GB: u64 = 1_000_000_000;

    #[test]
    fn a_run_of_one_artifact_is_its_machines() {
        let mut setup = setup(4, GB);
        setup.zones = 2;
        let machines = [(0, 8.5), (1, 9.0), (2, 16.0), (3, 10.0)];
        let machines = machines.map(|(machine, at_s)| (machine, Some(at_s), true));
        let mut run = run(&[(0.0, &machines)]);
        (run.origin_bytes, run.cross_zone_bytes) = (GB + GB / 4, 3 * GB);
        let figures = Figures::new(&setup, &run, 0);
        assert_eq!(figures.completed, 4);
        assert_eq!((figures.lower_bound_s, figures.makespan_s), (8.0, 16.0));
        assert_eq!((figures.p50_s, figures.p99_s, figures.efficiency), (9.0, 16.0, 0.5));
        assert_eq!((figures.origin_copies, figures.cross_zone_copies), (1.25, 1.5));
        assert_eq!(figures.control_bytes_per_node, 250.0);
        assert_eq!(figures.trace_digest, "0000000000000abc");
        assert!(figures.healthy.is_none() && figures.artifacts.is_empty());
    }

    #[test]
    fn a_time_that_was_not_reached_is_null() {
        let setup = setup(3, GB);
        let machines = [(0, Some(9.0), true), (1, Some(9.5), true), (2, None, true)];
        let figures = Figures::new(&setup, &run(&[(0.0, &machines)]), 0);
        assert_eq!((figures.completed, figures.p50_s), (2, 9.5));
        let json = serde_json::to_value(&figures).expect("JSON");
        assert!(json["makespan_s"].is_null() && json["p99_s"].is_null(), "{json}");
    }

    #[test]
    fn healthy_machines_have_figures_of_their_own() {
        let mut setup = setup(4, GB);
        setup.faults = vec![Fault::Stragglers { share: 0.25, rate: 0.1 }];
        let machines =
            [(0, Some(9.0), true), (1, Some(90.0), false), (2, Some(8.5), true), (3, None, false)];
        let healthy = Figures::new(&setup, &run(&[(0.0, &machines)]), 0).healthy;
        let expected = Healthy {
            healthy_nodes: 2,
            healthy_p50_s: 8.5,
            healthy_p99_s: 9.0,
            healthy_makespan_s: 9.0,
            straggler_bound_s: Some(80.0),
        };
        assert_eq!(healthy, Some(expected));
    }

    #[test]
    fn several_artifacts_are_measured_against_their_fair_share() {
        // All machines fetch both, so that each is done after 16 s in the fluid limit; the second begins at 8 s.
        let mut setup = setup(2, 2 * GB);
        setup.artifacts.push(artifact(GB));
        let first = [(0, Some(20.0), true), (1, Some(30.0), true)];
        let second = [(0, Some(28.0), true), (1, Some(26.0), true)];
        let figures = Figures::new(&setup, &run(&[(0.0, &first), (8.0, &second)]), 0);
        assert_eq!((figures.lower_bound_s, figures.makespan_s, figures.p50_s), (24.0, 30.0, 28.0));
        let expected = Share {
            size_bytes: GB,
            machines: 2,
            completed: 2,
            started_s: 8.0,
            makespan_s: 20.0,
            fair_bound_s: Some(16.0),
            ratio: Some(1.25),
        };
        assert_eq!(figures.artifacts[1], expected);
        assert_eq!(figures.artifacts[0].ratio, Some(30.0 / 24.0));
    }

    #[test]
    fn machines_without_an_artifact_are_complete_and_not_counted_in_times() {
        let mut setup = setup(10, GB);
        setup.artifacts[0].machines = Some(1);
        let figures = Figures::new(&setup, &run(&[(0.0, &[(3, Some(9.0), true)])]), 0);
        assert_eq!((figures.completed, figures.p50_s), (10, 9.0));
    }
}
