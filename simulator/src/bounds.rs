//! What no swarm beats: bounds in the fluid limit, where pieces are infinitely small and messages take no time.

use crate::setup::{Artifact, BUCKET_NICS, Fault, Setup};

/// The time to bring an artifact to its machines, in seconds from its start:
/// `max(F/B, F/min u, N F/(B + sum u))` (Kumar and Ross, "Peer-assisted file distribution: the minimum
/// distribution time", 2006), where F is its size, B the bucket's bandwidth, u a machine's.
///
/// With stragglers this is the bound of the healthy machines, and so `min u` and N are theirs; what stragglers
/// send still counts in `sum u`. What stragglers themselves need at least is [`straggler_bound_s`]. No other
/// fault enters: each of them can only make it later.
pub(crate) fn lower_bound_s(setup: &Setup, artifact: &Artifact) -> f64 {
    let bits = artifact.size_bytes as f64 * 8.0;
    let nic = setup.nic_bps as f64;
    let bucket = nic * f64::from(BUCKET_NICS);
    let machines = f64::from(artifact.machines.unwrap_or(setup.nodes).min(setup.nodes));
    let (mut healthy, mut sent) = (machines, machines * nic);
    for fault in &setup.faults {
        if let Fault::Stragglers { share, rate } = fault {
            let stragglers = (machines * share).floor();
            healthy -= stragglers;
            sent -= stragglers * nic * (1.0 - rate);
        }
    }
    let together = healthy.max(0.0) * bits / (bucket + sent.max(0.0));
    (bits / bucket).max(bits / nic).max(together)
}

/// The time that the slowest straggler needs for the largest artifact on its own line, in seconds; none: there
/// are no stragglers.
pub(crate) fn straggler_bound_s(setup: &Setup) -> Option<f64> {
    let slowest = setup.faults.iter().filter_map(|fault| match fault {
        Fault::Stragglers { rate, .. } => Some(*rate),
        _ => None,
    });
    let rate = slowest.min_by(f64::total_cmp)?;
    let bytes = setup.artifacts.iter().map(|artifact| artifact.size_bytes).max()?;
    Some(bytes as f64 * 8.0 / (setup.nic_bps as f64 * rate))
}

/// What the first pieces need to spread, in seconds: `floor(log2 N) p/u`, where p is the size of a piece (Mundinger,
/// Weber and Weiss, "Optimal scheduling of peer-to-peer file dissemination", 2008). It comes on top of the
/// fluid bound.
pub(crate) fn startup_s(setup: &Setup, artifact: &Artifact) -> f64 {
    let machines = artifact.machines.unwrap_or(setup.nodes).min(setup.nodes).max(1);
    let piece_bits = artifact.piece_len(0) as f64 * 8.0;
    f64::from(machines.ilog2()) * piece_bits / setup.nic_bps as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::setup;

    #[test]
    fn alone_the_bound_is_a_machines_own_line() {
        // 1 GB at 1 Gbit/s.
        let setup = setup(1_000, 1_000_000_000);
        assert_eq!(lower_bound_s(&setup, &setup.artifacts[0]), 8.0);
        assert_eq!(straggler_bound_s(&setup), None);
    }

    #[test]
    fn stragglers_take_from_what_all_send() {
        let mut setup = setup(1_000, 1_000_000_000);
        setup.faults = vec![Fault::Stragglers { share: 0.5, rate: 0.1 }];
        // 500 healthy machines of 1 Gbit/s, 500 of 0.1, and the bucket's 10: enough for 500 lines.
        assert_eq!(lower_bound_s(&setup, &setup.artifacts[0]), 8.0);
        assert_eq!(straggler_bound_s(&setup), Some(80.0));
    }

    #[test]
    fn the_start_takes_a_piece_for_every_doubling() {
        let mut setup = setup(1_000, 1_000_000_000);
        setup.artifacts[0].piece_bytes = 1 << 20;
        let expected = 9.0 * f64::from(1 << 23) / 1e9;
        assert_eq!(startup_s(&setup, &setup.artifacts[0]), expected);
        setup.artifacts[0].machines = Some(1);
        assert_eq!(startup_s(&setup, &setup.artifacts[0]), 0.0);
    }
}
