//! Fixed hashes that every machine computes alike. They spread work; they guard nothing.

use alloc::vec::Vec;

use shoal_proto::{ArtifactId, NodeId};

/// About how many machines of a fleet ask for origin leases: enough that the bucket's bandwidth (about
/// ten machines' worth) is used even when most of them are slow or gone, few enough for one region
/// process to answer.
pub const LEASERS_AIM: u32 = 256;

/// The finaliser of splitmix64: each bit of the answer hangs on each bit of the question.
pub(crate) const fn mix(mut x: u64) -> u64 {
    x ^= x >> 30;
    x = x.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^= x >> 27;
    x = x.wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

/// FNV-1a, mixed once more.
fn hash(parts: &[&[u8]]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in parts.iter().copied().flatten() {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    }
    mix(hash)
}

/// A machine's place among those that fetch an artifact: even over all u64, and another one for every
/// artifact.
#[must_use]
pub fn machine_hash(node: &NodeId, artifact: &ArtifactId) -> u64 {
    hash(&[&node.0, &artifact.0])
}

/// Whether a machine with this [`machine_hash`] asks for origin leases in a fleet of about `fleet`
/// machines: all of up to [`LEASERS_AIM`], about that many of more.
#[must_use]
pub fn may_lease(machine_hash: u64, fleet: u32) -> bool {
    below(machine_hash, LEASERS_AIM, fleet)
}

/// Whether an even hash falls into the first `part` of `whole`.
pub(crate) fn below(hash: u64, part: u32, whole: u32) -> bool {
    u128::from(hash) * u128::from(whole) < u128::from(part) << 64
}

/// The region processes that may lease pieces of `block`, best first, as indices into `processes`
/// (rendezvous hashing): who finds the first one silent asks the next, and one that dies moves only
/// its own blocks.
#[must_use]
pub fn lease_owners(artifact: &ArtifactId, block: u32, processes: &[NodeId]) -> Vec<usize> {
    let score = |at: &usize| {
        let node = &processes[*at];
        (core::cmp::Reverse(hash(&[&artifact.0, &block.to_le_bytes(), &node.0])), *node)
    };
    let mut order: Vec<usize> = (0..processes.len()).collect();
    order.sort_by_cached_key(score);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(n: u64) -> NodeId {
        let mut bytes = [7; 32];
        bytes[..8].copy_from_slice(&n.to_le_bytes());
        NodeId(bytes)
    }

    #[test]
    fn a_few_hundred_of_any_fleet_may_lease() {
        for fleet in [1u32, 4, 256, 1_000, 100_000] {
            let leasers = (0..u64::from(fleet))
                .filter(|n| may_lease(machine_hash(&node(*n), &ArtifactId::EMPTY), fleet))
                .count() as u32;
            let aim = fleet.min(LEASERS_AIM);
            assert!(leasers * 10 >= aim * 8 && leasers * 10 <= aim * 12, "{leasers} of {fleet}");
        }
        assert!(may_lease(u64::MAX, 0));
    }

    #[test]
    fn owners_share_blocks_and_survive_each_other() {
        let three = [node(1), node(2), node(3)];
        let mut firsts = [0; 3];
        for block in 0..300 {
            let order = lease_owners(&ArtifactId::EMPTY, block, &three);
            firsts[order[0]] += 1;
            // Without the last one, or in another order, the others keep their order.
            let two = [node(2), node(1)];
            let expect: Vec<_> = order.iter().filter(|at| **at < 2).map(|at| 1 - at).collect();
            assert_eq!(lease_owners(&ArtifactId::EMPTY, block, &two), expect);
        }
        assert!(firsts.iter().all(|n| *n > 60), "{firsts:?}");
        assert!(lease_owners(&ArtifactId::EMPTY, 0, &[]).is_empty());
    }
}
