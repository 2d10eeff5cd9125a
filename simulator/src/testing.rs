//! What the tests share: small setups and runs made by hand.

use crate::setup::{Artifact, Completion, Fetched, Run, Sample, Setup};

/// Machines of 1 Gbit/s, and one artifact in pieces of 16 MiB for all of them.
pub(crate) fn setup(nodes: u32, size_bytes: u64) -> Setup {
    Setup {
        nodes,
        zones: 1,
        racks: 1,
        nic_bps: 1_000_000_000,
        rack_bps: None,
        zone_bps: None,
        parts: 2,
        artifacts: vec![artifact(size_bytes)],
        faults: Vec::new(),
        seed: 1,
        threads: 1,
        stop_at_s: None,
        watch: None,
    }
}

/// An artifact for all machines, at the start.
pub(crate) fn artifact(size_bytes: u64) -> Artifact {
    Artifact::new(size_bytes, Some(16 << 20)).expect("a size that is allowed")
}

/// A machine, when it was complete, and whether it is healthy.
pub(crate) type Done = (u32, Option<f64>, bool);

/// A run in which each artifact started then, and its machines were complete so.
pub(crate) fn run(artifacts: &[(f64, &[Done])]) -> Run {
    let artifacts = artifacts.iter().map(|(started_s, machines)| {
        let machines = machines.iter();
        let machines = machines
            .map(|(machine, at_s, healthy)| Completion {
                machine: *machine,
                at_s: *at_s,
                healthy: *healthy,
            })
            .collect();
        Fetched { started_s: *started_s, machines }
    });
    Run {
        artifacts: artifacts.collect(),
        samples: vec![Sample::default()],
        messages: 10,
        control_bytes: 1_000,
        events: 100,
        digest: 0xabc,
        ..Run::default()
    }
}
