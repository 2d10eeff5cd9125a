//! Machine to region process: goals, introductions, origin leases, reports. Each request is one stream
//! of the data plane, so the region process knows from the handshake who asks.

use alloc::{string::String, vec::Vec};
use core::fmt;

use serde::{Deserialize, Serialize};

use crate::{
    goal::{Labels, SignedGoal},
    ids::{AppName, ArtifactId, EncodingId, MachineName, Revision},
    peer::PeerAddr,
    state::MachineState,
};

/// The longest reason in a report, in bytes; longer ones are cut.
pub const REASON_MAX_BYTES: usize = 512;

/// The most pieces that one lease covers.
pub const LEASE_PIECES_MAX: u32 = 16;

/// How many neighbouring pieces have the same lease owner.
pub const LEASE_BLOCK_PIECES: u32 = 64;

/// The protocol version that brought [`RegionRequest::SignedLease`]: who speaks an older one is not asked for it.
pub const SIGNED_LEASES_SINCE: u16 = 2;

/// The longest URL of a signed lease, in bytes: a key of 200, a signature, and a session token of up to 2 KiB.
pub const SIGNED_URL_MAX_BYTES: usize = 4_096;

/// A URL by which one piece can be read from the bucket without credentials, for a while. A secret until then, so it
/// shows itself to nobody by accident.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedUrl(pub String);

impl fmt::Debug for SignedUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SignedUrl(..)")
    }
}

/// Who a machine is, as its region knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineInfo {
    /// Where it can be reached, and its zone.
    pub addr: PeerAddr,
    /// All its labels.
    pub labels: Labels,
    /// The release that its agent runs.
    pub version: String,
}

/// How far a fetch is, in bytes and pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct FetchProgress {
    /// Pieces held and verified.
    pub pieces: u32,
    /// Pieces of the artifact.
    pub pieces_total: u32,
    /// Stored piece bytes that came from neighbours.
    pub peer_bytes: u64,
    /// Stored piece bytes that came from the region's bucket.
    pub origin_bytes: u64,
    /// Pieces that failed their hash.
    pub corrupt_pieces: u32,
}

/// A machine's state about one app.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct MachineReport {
    /// The app.
    pub app: AppName,
    /// The goal that it is about.
    pub revision: Revision,
    /// Its artifact.
    pub artifact: ArtifactId,
    /// The state.
    pub state: MachineState,
    /// Why, for a failure or a wait; at most [`REASON_MAX_BYTES`].
    pub reason: Option<String>,
    /// How the fetch went.
    pub progress: FetchProgress,
    /// Counts the machine's state changes for this goal: an older report never replaces a newer one.
    pub sequence: u64,
    /// How long ago it came about, in milliseconds by the machine's own clock.
    pub age_ms: u64,
}

/// A region process says how far a rollout may go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenWave {
    /// The app.
    pub app: AppName,
    /// The goal.
    pub revision: Revision,
    /// Machines whose rank is below this may activate, in thousandths.
    pub open_permille: u16,
}

/// What a machine asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RegionRequest {
    /// All goals that concern the machine, if they differ from what it has.
    Poll {
        /// Who asks.
        machine: MachineInfo,
        /// [`goals_digest`] of what it has.
        digest: u64,
        /// [`reports_digest`] of its present states.
        reports_digest: u64,
    },
    /// New states; answered once they are kept.
    Report {
        /// Who reports.
        machine: MachineInfo,
        /// The states, at most one an app.
        reports: Vec<MachineReport>,
    },
    /// Neighbours for an artifact; the asker becomes one that others are told of.
    Introduce {
        /// Where the asker can be reached.
        me: PeerAddr,
        /// The artifact.
        artifact: ArtifactId,
        /// Whether the asker holds all of it.
        complete: bool,
        /// How many are wanted.
        want: u16,
    },
    /// Leave to read pieces from the bucket.
    Lease {
        /// The artifact.
        artifact: ArtifactId,
        /// The encoding.
        encoding: EncodingId,
        /// Its number of pieces.
        pieces_total: u32,
        /// The lease block that is asked about: pieces from `block * LEASE_BLOCK_PIECES` on.
        block: u32,
        /// The pieces of the block that neither the asker nor any neighbour of it has, lowest bit first: only these are leased,
        /// and one that should long have come round is leased again.
        lacking: u64,
        /// How many pieces at most.
        want: u16,
    },
    /// Leased pieces that the asker now holds and serves, or gives back.
    LeaseDone {
        /// The artifact.
        artifact: ArtifactId,
        /// The first piece.
        first: u32,
        /// How many.
        count: u32,
        /// Whether it holds them; false gives the lease back.
        held: bool,
    },
    /// An encoding's index, for a machine without neighbours.
    Index {
        /// The artifact.
        artifact: ArtifactId,
        /// The encoding.
        encoding: EncodingId,
    },
    /// As [`RegionRequest::Lease`], by a machine that cannot read the bucket by itself.
    SignedLease {
        /// The artifact.
        artifact: ArtifactId,
        /// The encoding.
        encoding: EncodingId,
        /// Its number of pieces.
        pieces_total: u32,
        /// The lease block that is asked about.
        block: u32,
        /// The pieces of the block that neither the asker nor any neighbour of it has, lowest bit first.
        lacking: u64,
        /// How many pieces at most.
        want: u16,
    },
}

/// What it answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RegionReply {
    /// To a poll: nothing new about goals; the open waves.
    Unchanged {
        /// How far the rollouts of the machine's apps may go.
        waves: Vec<OpenWave>,
        /// When to ask again, in milliseconds; the asker spreads it by half.
        poll_after_ms: u32,
        /// The answerer does not know the machine's present states (it was restarted, or another
        /// process answered before): the machine reports all of them again.
        want_reports: bool,
    },
    /// To a poll: all goals that concern the machine.
    Goals {
        /// The goals.
        goals: Vec<SignedGoal>,
        /// How far their rollouts may go.
        waves: Vec<OpenWave>,
        /// When to ask again, in milliseconds; the asker spreads it by half.
        poll_after_ms: u32,
        /// The answerer does not know the machine's present states (it was restarted, or another
        /// process answered before): the machine reports all of them again.
        want_reports: bool,
    },
    /// To a report or a done lease: kept.
    Kept,
    /// To an introduction.
    Peers(Vec<PeerAddr>),
    /// To a lease: read these, report when held; the lease ends by itself after `duration_ms`.
    Leased {
        /// The first piece.
        first: u32,
        /// How many.
        count: u32,
        /// How long it holds, in milliseconds.
        duration_ms: u32,
    },
    /// To a lease: nothing to give now.
    NoLease {
        /// When to ask again, in milliseconds; none: every piece of the block is in the swarm.
        retry_ms: Option<u32>,
        /// Whether that goes for every block: the bucket is busy enough.
        all_blocks: bool,
    },
    /// To an index: the object as stored.
    Index(Vec<u8>),
    /// It cannot answer, and why.
    Error(String),
    /// To a signed lease: read these by their URLs, report when held; lease and URLs end by themselves.
    SignedLeased {
        /// The first piece.
        first: u32,
        /// How long it holds, in milliseconds. The URLs hold longer.
        duration_ms: u32,
        /// One for each piece: at most [`LEASE_PIECES_MAX`], each of at most [`SIGNED_URL_MAX_BYTES`].
        urls: Vec<SignedUrl>,
    },
}

/// A digest of a set of goals: equal sets have equal digests. FNV-1a over the names and revisions, in
/// the order of the names; it saves traffic and guards nothing.
#[must_use]
pub fn goals_digest<'a>(goals: impl IntoIterator<Item = (&'a AppName, Revision)>) -> u64 {
    let mut sorted: Vec<_> = goals.into_iter().collect();
    sorted.sort();
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut eat = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    for (app, revision) in sorted {
        eat(app.as_str().as_bytes());
        eat(&[0]);
        eat(&revision.epoch.to_le_bytes());
        eat(&revision.number.to_le_bytes());
    }
    hash
}

/// A digest of a machine's present states, for the same use as [`goals_digest`].
#[must_use]
pub fn reports_digest<'a>(reports: impl IntoIterator<Item = (&'a AppName, Revision, u64)>) -> u64 {
    let folded: Vec<_> = reports
        .into_iter()
        .map(|(app, revision, sequence)| {
            let number = revision.number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ sequence;
            (app, Revision { epoch: revision.epoch, number })
        })
        .collect();
    goals_digest(folded)
}

/// A machine's place in a rollout, 0-999: the same on the machine and in every region process, and
/// another one for every artifact, so that no machine is always first.
#[must_use]
pub fn rollout_rank(machine: &MachineName, artifact: &ArtifactId) -> u16 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in machine.as_str().bytes().chain(artifact.0) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    // The last multiplications leave the low bits weak: mix once (the finaliser of splitmix64).
    hash = (hash ^ hash >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ hash >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((hash ^ hash >> 31) % 1_000) as u16
}
