//! What a run is given and what it gives back: the seam between the world and everything that describes it.

use rand::{RngExt as _, SeedableRng as _};
use rand_pcg::Pcg64;
use shoal_proto::manifest::{PIECES_MAX, PieceSize};

/// The bucket's bandwidth, in machines' lines.
pub(crate) const BUCKET_NICS: u32 = 10;

/// Region processes of a region.
pub(crate) const REGION_PROCESSES: u32 = 2;

/// What is simulated: one region, its machines, and what goes wrong.
#[derive(Debug, Clone)]
pub(crate) struct Setup {
    pub(crate) nodes: u32,
    /// Machines are spread over the zones evenly.
    pub(crate) zones: u32,
    /// Racks in each zone; machines are spread over them evenly.
    pub(crate) racks: u32,
    /// Each machine's line, each way, in bits a second.
    pub(crate) nic_bps: u64,
    /// Each rack's line to its zone, each way; none: it never fills.
    pub(crate) rack_bps: Option<u64>,
    /// Each zone's line to the others, each way; none: it never fills.
    pub(crate) zone_bps: Option<u64>,
    /// Parts that a piece is sent in.
    pub(crate) parts: u32,
    /// At least one; their place in the list is their number.
    pub(crate) artifacts: Vec<Artifact>,
    pub(crate) faults: Vec<Fault>,
    pub(crate) seed: u64,
    /// Threads to simulate with; the result is the same with any number.
    pub(crate) threads: usize,
    /// Stop at this time, though the machines are not complete: how a violation is replayed.
    pub(crate) stop_at_s: Option<f64>,
    /// Print every event of this machine to stderr.
    pub(crate) watch: Option<u32>,
}

impl Setup {
    /// The machines that fetch this artifact, in order: the same for one seed, one number and one fleet.
    pub(crate) fn members(&self, artifact: usize) -> Vec<u32> {
        let Some(machines) = self.artifacts[artifact].machines else {
            return (0..self.nodes).collect();
        };
        let mut rng = Pcg64::seed_from_u64(derived_seed(self.seed, artifact as u64));
        let mut wanted = machines.min(self.nodes);
        let chosen = (0..self.nodes).filter(|machine| {
            // As many as are wanted of those that are left: every choice is as likely (Knuth's algorithm S).
            let chosen = rng.random_range(0..self.nodes - machine) < wanted;
            wanted -= u32::from(chosen);
            chosen
        });
        chosen.collect()
    }

    /// How many machines fetch each artifact, all together.
    pub(crate) fn fetches(&self) -> u64 {
        let machines =
            self.artifacts.iter().map(|artifact| artifact.machines.unwrap_or(self.nodes));
        machines.map(u64::from).sum()
    }

    /// The number of the artifact that replaces this one, if any.
    pub(crate) fn replaced_by(&self, artifact: usize) -> Option<usize> {
        self.artifacts.iter().position(|newer| newer.replaces == u32::try_from(artifact).ok())
    }
}

/// A seed that follows from another one and a number, short enough to type (SplitMix64's finish).
pub(crate) fn derived_seed(seed: u64, number: u64) -> u64 {
    let mut x = seed ^ number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    (x ^ x >> 31) >> 32
}

/// One artifact and the machines that fetch it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Artifact {
    pub(crate) size_bytes: u64,
    pub(crate) piece_bytes: u64,
    pub(crate) pieces: u32,
    /// How many machines, chosen by the seed; none: all.
    pub(crate) machines: Option<u32>,
    /// When the region publishes the goal, in seconds, or how far the artifact that it replaces is then.
    pub(crate) start: When,
    pub(crate) priority: u8,
    /// The number of an earlier artifact of the same app: whoever hears of this one drops that one.
    pub(crate) replaces: Option<u32>,
}

impl Artifact {
    /// An artifact for all machines at the start; its piece size is the agent's own choice unless one is given.
    pub(crate) fn new(size_bytes: u64, piece_bytes: Option<u64>) -> Result<Self, String> {
        let piece_size = match piece_bytes {
            None => PieceSize::for_artifact(size_bytes),
            Some(bytes) => PieceSize::from_bytes(bytes).ok_or_else(|| {
                format!("a piece size of {bytes} bytes: give a power of two, 256KiB to 16MiB")
            })?,
        };
        let pieces = size_bytes.div_ceil(piece_size.bytes());
        let pieces = u32::try_from(pieces).ok().filter(|pieces| (1..=PIECES_MAX).contains(pieces));
        let pieces = pieces.ok_or_else(|| {
            format!("an artifact has 1 to {PIECES_MAX} pieces: use another size or --piece-size")
        })?;
        Ok(Self {
            size_bytes,
            piece_bytes: piece_size.bytes(),
            pieces,
            machines: None,
            start: When::Seconds(0.0),
            priority: 0,
            replaces: None,
        })
    }

    /// The bytes of one piece: the last one may be short.
    pub(crate) fn piece_len(&self, piece: u32) -> u64 {
        let start = u64::from(piece) * self.piece_bytes;
        self.piece_bytes.min(self.size_bytes.saturating_sub(start))
    }
}

/// A moment of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum When {
    /// Seconds after the run began.
    Seconds(f64),
    /// When this part (0 to 1) of all pieces of all machines and artifacts that have started is held.
    Progress(f64),
}

/// Something that goes wrong.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Fault {
    /// This part of the machines has this part of the line's bandwidth, each way. They are not healthy.
    Stragglers { share: f64, rate: f64 },
    /// Machines die without a word, and come back with what they had on disk. They are not healthy.
    Churn {
        /// This part of the machines each minute, one after the other at random.
        per_minute: f64,
        down_s: f64,
        /// No machine dies after this many seconds.
        until_s: f64,
    },
    /// Region processes die, for good. There are [`REGION_PROCESSES`].
    RegionsLost { processes: u32, at: When },
    /// The bucket answers with errors.
    BucketFails { from: When, for_s: f64 },
    /// The bucket has this part of its bandwidth.
    BucketSlow { from: When, for_s: f64, rate: f64 },
    /// This part of the machines sends wrong bytes, always. They are not healthy.
    Corrupt { share: f64 },
    /// A zone hears nothing from the others, the region processes and the bucket, nor they from it.
    ZoneCut { zone: u32, from: When, for_s: f64 },
    /// This part of the machines is switched on only now.
    Late { share: f64, at: When },
}

/// What came of it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Run {
    /// In the order of the setup's.
    pub(crate) artifacts: Vec<Fetched>,
    pub(crate) samples: Vec<Sample>,
    /// Piece bytes that left the bucket.
    pub(crate) origin_bytes: u64,
    /// Piece bytes that went from a machine in one zone to one in another.
    pub(crate) cross_zone_bytes: u64,
    /// Piece bytes that arrived for nothing: twice, cancelled or wrong.
    pub(crate) wasted_bytes: u64,
    /// Control messages between machines and with region processes.
    pub(crate) messages: u64,
    pub(crate) control_bytes: u64,
    pub(crate) events: u64,
    /// FNV-1a over time, kind and subject of each machine's events, machine by machine.
    pub(crate) digest: u64,
    /// Simulated time at the end, in seconds.
    pub(crate) ended_s: f64,
    pub(crate) violation: Option<Violation>,
}

/// One artifact's end.
#[derive(Debug, Clone, Default)]
pub(crate) struct Fetched {
    /// When the goal was published, in seconds.
    pub(crate) started_s: f64,
    /// One for each machine that was to fetch it and lives (and, for one that was replaced, that never heard of
    /// the newer one), by machine.
    pub(crate) machines: Vec<Completion>,
}

/// One machine's end with one artifact.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Completion {
    pub(crate) machine: u32,
    /// In seconds of the run; none: it is not complete.
    pub(crate) at_s: Option<f64>,
    /// No fault was laid on this machine.
    pub(crate) healthy: bool,
}

/// How far the run was at a moment; some hundreds of them are kept.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Sample {
    pub(crate) at_s: f64,
    /// Piece bytes that machines hold, all artifacts together.
    pub(crate) held_bytes: u64,
    pub(crate) origin_bytes: u64,
    pub(crate) cross_zone_bytes: u64,
}

/// What must never be, and was.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Violation {
    pub(crate) at_s: f64,
    pub(crate) machine: Option<u32>,
    pub(crate) what: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_as_many_as_asked_for_in_order_and_by_the_seed() {
        let artifact = |machines| Artifact {
            machines,
            ..Artifact::new(1 << 20, None).expect("a size that is allowed")
        };
        let artifacts = vec![artifact(None), artifact(Some(30)), artifact(Some(30))];
        let mut setup = Setup {
            nodes: 100,
            zones: 1,
            racks: 1,
            nic_bps: 1,
            rack_bps: None,
            zone_bps: None,
            parts: 2,
            artifacts,
            faults: Vec::new(),
            seed: 1,
            threads: 1,
            stop_at_s: None,
            watch: None,
        };
        assert_eq!(setup.members(0), (0..100).collect::<Vec<_>>());
        let first = setup.members(1);
        assert_eq!((first.len(), first.is_sorted()), (30, true));
        assert!(first.iter().all(|machine| *machine < 100));
        assert_eq!(first, setup.members(1));
        assert_ne!(first, setup.members(2), "another artifact, another choice");
        setup.seed = 2;
        assert_ne!(first, setup.members(1), "another seed, another choice");
        setup.artifacts[1].machines = Some(100);
        assert_eq!(setup.members(1), setup.members(0));
    }
}
