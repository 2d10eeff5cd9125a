//! What is to be simulated: flags, scenario file and defaults, put together.

use std::{num::NonZero, thread};

use crate::{
    args::Args,
    options::Options,
    pipeline::Pipeline,
    scenario::Scenario,
    setup::{Artifact, Setup, derived_seed},
};

/// Everything to be simulated.
#[derive(Debug)]
pub(crate) struct Plan {
    /// One for each region; at least one.
    pub(crate) regions: Vec<Setup>,
    scenario: Option<Scenario>,
}

impl Plan {
    pub(crate) fn new(args: &Args) -> Result<Self, String> {
        let scenario = args.scenario.as_deref().map(Scenario::load).transpose()?;
        let file = scenario.as_ref().map(|scenario| scenario.world().clone());
        let options = args.options.clone().or(file.unwrap_or_default());
        let regions = (0..options.regions()?).map(|region| {
            let mut setup = options.setup()?;
            setup.seed = region_seed(setup.seed, region);
            setup.threads = threads(args.threads)?;
            setup.stop_at_s = args.stop_at;
            setup.watch = watched(args.watch, setup.nodes)?;
            setup.faults = match &scenario {
                Some(scenario) => scenario.faults(&setup)?,
                None => Vec::new(),
            };
            setup.artifacts = artifacts(scenario.as_ref(), &options, &setup)?;
            Ok(setup)
        });
        let regions = regions.collect::<Result<Vec<_>, String>>()?;
        Ok(Self { regions, scenario })
    }

    pub(crate) fn about(&self) -> Option<&str> {
        self.scenario.as_ref().map(Scenario::about)
    }

    pub(crate) fn pipeline(&self) -> Option<&Pipeline> {
        self.scenario.as_ref().and_then(Scenario::pipeline)
    }
}

/// The first region has the seed itself, so that a region alone is what its seed says.
fn region_seed(seed: u64, region: u32) -> u64 {
    if region == 0 { seed } else { derived_seed(seed, u64::from(region)) }
}

fn threads(given: Option<usize>) -> Result<usize, String> {
    match given {
        Some(0) => Err("threads is 0: give at least 1".into()),
        Some(threads) => Ok(threads),
        None => Ok(thread::available_parallelism().map_or(1, NonZero::get)),
    }
}

fn watched(machine: Option<u32>, nodes: u32) -> Result<Option<u32>, String> {
    match machine {
        Some(machine) if machine >= nodes => {
            Err(format!("watch is {machine}: machines are numbered from 0 to {}", nodes - 1))
        }
        _ => Ok(machine),
    }
}

/// The scenario's, or one for all machines.
fn artifacts(
    scenario: Option<&Scenario>,
    options: &Options,
    setup: &Setup,
) -> Result<Vec<Artifact>, String> {
    let artifacts = match scenario {
        Some(scenario) => scenario.artifacts(options, setup)?,
        None => Vec::new(),
    };
    if artifacts.is_empty() {
        let piece_bytes = options.piece_size.map(|size| size.0);
        return Ok(vec![Artifact::new(options.size().0, piece_bytes)?]);
    }
    Ok(artifacts)
}
