//! What does not change while the world runs: who has what, where it is, and how far it is from there to there.

use std::sync::Arc;

use shoal_proto::{ArtifactId, NodeId};
use shoal_swarm::{Config, lease_owners, machine_hash, may_lease};

use super::{REGIONS, RTT_CROSS_NS, RTT_ZONE_NS, line::Parts, message::Actor};
use crate::setup::{Fault, Setup};

/// One control message of this many is lost, and sent again after [`RESEND_RTTS`] round trips.
const LOSS_ONE_IN: u64 = 1_000;

/// When a lost message is sent again: quinn's probe timeout is about three round trips.
const RESEND_RTTS: u64 = 3;

/// What does not change while the world runs, and every actor may read.
pub(super) struct Static {
    pub(super) setup: Setup,
    pub(super) config: Arc<Config>,
    /// The machines of each artifact, ascending.
    pub(super) members: Vec<Vec<u32>>,
    /// Which newer artifact replaces each.
    pub(super) replaced_by: Vec<Option<u16>>,
    pub(super) parts: Vec<Parts>,
    pub(super) check_every: u64,
    /// No connection ever ends: what came over one need not be looked at twice.
    pub(super) links_stand: bool,
    /// Owners of each lease block of each artifact, best first.
    pub(super) owners: Vec<Vec<[usize; REGIONS]>>,
}

fn artifact_id(artifact: u16) -> ArtifactId {
    let mut id = ArtifactId::EMPTY;
    id.0[..2].copy_from_slice(&artifact.to_le_bytes());
    id
}

fn node_id(n: u32) -> NodeId {
    let mut bytes = [0x51; 32];
    bytes[..4].copy_from_slice(&n.to_le_bytes());
    NodeId(bytes)
}

impl Static {
    pub(super) fn new(setup: &Setup) -> Self {
        let region_ids: [NodeId; REGIONS] = std::array::from_fn(|at| node_id(u32::MAX - at as u32));
        let count = setup.artifacts.len();
        let owners = (0..count as u16).map(|at| {
            let pieces = setup.artifacts[usize::from(at)].pieces;
            (0..pieces.div_ceil(shoal_proto::region::LEASE_BLOCK_PIECES))
                .map(|block| {
                    let order = lease_owners(&artifact_id(at), block, &region_ids);
                    std::array::from_fn(|place| order[place])
                })
                .collect()
        });
        Self {
            config: Arc::new(Config::default()),
            members: (0..count).map(|at| setup.members(at)).collect(),
            owners: owners.collect(),
            replaced_by: (0..count)
                .map(|at| setup.replaced_by(at).map(|newer| newer as u16))
                .collect(),
            parts: setup
                .artifacts
                .iter()
                .map(|a| Parts::of(a.piece_bytes, setup.parts, setup.nic_bps))
                .collect(),
            check_every: if setup.nodes <= 100 { 1 << 12 } else { 1 << 17 },
            links_stand: setup.faults.iter().all(|fault| {
                !matches!(
                    fault,
                    Fault::Churn { .. }
                        | Fault::ZoneCut { .. }
                        | Fault::Corrupt { .. }
                        | Fault::Late { .. }
                )
            }),
            setup: setup.clone(),
        }
    }

    /// A machine's zone; services have one of their own.
    pub(super) fn zone(&self, actor: Actor) -> u32 {
        if actor < self.setup.nodes { actor % self.setup.zones } else { u32::MAX }
    }

    pub(super) fn rack(&self, machine: Actor) -> u32 {
        let in_zone = machine / self.setup.zones;
        machine % self.setup.zones * self.setup.racks + in_zone % self.setup.racks
    }

    pub(super) fn region(&self, number: usize) -> Actor {
        self.setup.nodes + number as Actor
    }

    pub(super) fn bucket(&self) -> Actor {
        self.setup.nodes + REGIONS as Actor
    }

    /// One way, with its jitter.
    pub(super) fn one_way_ns(&self, from: u32, to: u32, roll: u32) -> u64 {
        let rtt = if from == to { RTT_ZONE_NS } else { RTT_CROSS_NS };
        rtt / 4 + ((u64::from(roll) * (rtt / 2)) >> 32)
    }

    /// One way of a message that may be lost once.
    pub(super) fn control_ns(&self, from: u32, to: u32, roll: u64) -> u64 {
        let rtt = if from == to { RTT_ZONE_NS } else { RTT_CROSS_NS };
        let lost = (roll >> 32).is_multiple_of(LOSS_ONE_IN);
        self.one_way_ns(from, to, roll as u32) + if lost { rtt * RESEND_RTTS } else { 0 }
    }

    pub(super) fn owners(&self, artifact: u16, block: u32) -> [usize; REGIONS] {
        let blocks = &self.owners[usize::from(artifact)];
        blocks[(block as usize).min(blocks.len() - 1)]
    }

    pub(super) fn newer(&self, artifact: u16) -> Option<u16> {
        self.replaced_by[usize::from(artifact)]
    }

    /// How many machines fetch an artifact, and whether this one may lease.
    pub(super) fn place(&self, machine: Actor, artifact: u16) -> (u32, bool) {
        let fleet = self.members[usize::from(artifact)].len() as u32;
        let hash = machine_hash(&node_id(machine), &artifact_id(artifact));
        (fleet, may_lease(hash, fleet))
    }

    pub(super) fn piece_len(&self, artifact: u16, piece: u32) -> u64 {
        self.setup.artifacts[usize::from(artifact)].piece_len(piece)
    }

    pub(super) fn parts(&self, artifact: u16) -> Parts {
        self.parts[usize::from(artifact)]
    }

    /// Piece bytes that all machines hold in the end.
    pub(super) fn total_bytes(&self) -> u64 {
        let sizes = self.setup.artifacts.iter().zip(&self.members);
        sizes.map(|(artifact, members)| artifact.size_bytes * members.len() as u64).sum()
    }
}
