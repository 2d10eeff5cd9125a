//! What the driver tells the policy and what the policy tells the driver.

use alloc::sync::Arc;
use core::time::Duration;

use shoal_proto::{Bitmap, PieceIndex};

/// A machine that there is a connection to. The driver gives the handle, a new one for every
/// connection: a peer that comes back is another peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerKey(pub u64);

/// The swarm of one artifact. The driver gives the handle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SwarmKey(pub u64);

/// A piece asked from a peer. The policy gives the handle, never the same one twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// A piece that a peer asked of us. The driver gives the handle, never the same one twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UploadId(pub u64);

/// What a machine is in a swarm for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To get the pieces that it lacks, and to go on serving once it has them all.
    Fetch {
        /// Higher fetches first; equal ones share the line evenly, by bytes.
        priority: u8,
        /// The length of a piece, in bytes, but for the last one.
        piece_bytes: u64,
        /// Whether this machine is one of those that ask for origin leases: [`crate::may_lease`].
        may_lease: bool,
        /// About how many machines of the region fetch this artifact.
        fleet: u32,
    },
    /// To serve what it has.
    Seed,
}

/// How a piece transfer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Received, verified against the manifest, and written: it is held from now on.
    Verified,
    /// Received, but its hash is wrong; dropped.
    Corrupt,
    /// The peer has no free slot.
    Busy,
    /// The peer (or the bucket) does not have it.
    NotHere,
    /// Anything else: a reset stream, a timeout, an error at the other end.
    Failed,
}

/// Something happened. Handles that the policy does not know, or no longer knows, are ignored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Take part in a swarm. For a swarm that is already there only the purpose's numbers are taken.
    Start {
        /// The swarm.
        swarm: SwarmKey,
        /// How many pieces the artifact has.
        pieces: u32,
        /// Those held and verified; must have length `pieces`, else the event is ignored.
        have: Bitmap,
        /// What for.
        purpose: Purpose,
    },
    /// Take part no longer: requests are cancelled, leases given back; what is being sent goes on.
    Stop {
        /// The swarm.
        swarm: SwarmKey,
    },
    /// A connection stands.
    PeerUp {
        /// The peer.
        peer: PeerKey,
        /// Whether it is in this machine's zone.
        same_zone: bool,
    },
    /// A connection ended, and with it every request and upload on it; no other event about those need
    /// follow.
    PeerDown {
        /// The peer.
        peer: PeerKey,
    },
    /// A peer said that it takes part, or said again what it holds. Ignored for a swarm that this
    /// machine is not in: when it starts, its own announcement makes the peer repeat this.
    PeerJoined {
        /// The peer.
        peer: PeerKey,
        /// The swarm.
        swarm: SwarmKey,
        /// What the peer holds; ignored unless its length is the swarm's number of pieces.
        have: Arc<Bitmap>,
    },
    /// A peer holds more pieces.
    PeerHave {
        /// The peer.
        peer: PeerKey,
        /// The swarm.
        swarm: SwarmKey,
        /// The pieces; those past the end are ignored.
        pieces: Arc<[PieceIndex]>,
    },
    /// A peer takes part no longer.
    PeerLeft {
        /// The peer.
        peer: PeerKey,
        /// The swarm.
        swarm: SwarmKey,
    },
    /// A request of [`Action::Fetch`] ended.
    FetchEnded {
        /// The request.
        request: RequestId,
        /// How.
        outcome: Outcome,
    },
    /// A peer asks for a piece. Answered by exactly one of [`Action::Serve`], [`Action::RefuseBusy`]
    /// and [`Action::RefuseNotHere`].
    UploadAsked {
        /// The upload.
        upload: UploadId,
        /// Who asks.
        peer: PeerKey,
        /// The swarm.
        swarm: SwarmKey,
        /// The piece.
        piece: PieceIndex,
    },
    /// A served upload ended, well or not, or was taken back by the peer.
    UploadEnded {
        /// The upload.
        upload: UploadId,
        /// Whether the peer has all of it.
        whole: bool,
    },
    /// A peer has a free slot and holds a piece that it thinks we lack: an `Offer` message.
    Offered {
        /// The peer.
        peer: PeerKey,
        /// The swarm.
        swarm: SwarmKey,
        /// The piece; any other may be asked for.
        piece: PieceIndex,
    },
    /// A region process leased us pieces.
    LeaseGranted {
        /// The swarm.
        swarm: SwarmKey,
        /// The block that was asked about.
        block: u32,
        /// The first piece.
        first: u32,
        /// How many.
        count: u32,
        /// For how long.
        duration: Duration,
    },
    /// A region process has nothing to lease in this block.
    LeaseDenied {
        /// The swarm.
        swarm: SwarmKey,
        /// The block.
        block: u32,
        /// When to ask again; none: every piece of the block is in the swarm.
        retry: Option<Duration>,
        /// Whether that goes for every block: the bucket is busy enough.
        all_blocks: bool,
    },
    /// No region process answered.
    LeaseFailed {
        /// The swarm.
        swarm: SwarmKey,
        /// The block.
        block: u32,
    },
    /// One piece of an [`Action::FetchOrigin`] ended. Every piece of it must end some time, so the
    /// driver needs a time limit of its own on reading the bucket.
    OriginEnded {
        /// The swarm.
        swarm: SwarmKey,
        /// The piece.
        piece: PieceIndex,
        /// How. [`Outcome::Busy`] counts as a failure.
        outcome: Outcome,
    },
    /// The time of [`crate::Swarm::next_timeout`] has come. Early, late and needless ones do no harm.
    Timeout,
}

/// Something to do. The driver drains all of them after each event, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Tell a peer that we take part and what we hold: a `Join` message.
    Announce {
        /// The peer.
        peer: PeerKey,
        /// The swarm.
        swarm: SwarmKey,
        /// What we hold; all that are told at once share it.
        have: Arc<Bitmap>,
    },
    /// Tell a peer of pieces that we hold by now, one of which it lacks at least: a `Have` message.
    AnnounceHave {
        /// The peer.
        peer: PeerKey,
        /// The swarm.
        swarm: SwarmKey,
        /// The pieces, at most `HAVE_BATCH_MAX` of the protocol; all that are told share them.
        pieces: Arc<[PieceIndex]>,
    },
    /// Tell a peer that we take part no longer: a `Leave` message.
    AnnounceLeave {
        /// The peer.
        peer: PeerKey,
        /// The swarm.
        swarm: SwarmKey,
    },
    /// Ask a peer for a piece, verify it and write it, then say [`Event::FetchEnded`].
    Fetch {
        /// The request.
        request: RequestId,
        /// The peer.
        peer: PeerKey,
        /// The swarm.
        swarm: SwarmKey,
        /// The piece.
        piece: PieceIndex,
    },
    /// Stop a request; nothing more is expected of it, and nothing more about it is heard.
    CancelFetch {
        /// The request.
        request: RequestId,
    },
    /// Send the piece that was asked for; say [`Event::UploadEnded`] when it is sent or has failed.
    Serve {
        /// The upload.
        upload: UploadId,
    },
    /// Answer BUSY.
    RefuseBusy {
        /// The upload.
        upload: UploadId,
    },
    /// Answer that the piece is not here.
    RefuseNotHere {
        /// The upload.
        upload: UploadId,
    },
    /// Tell a peer that we have a free slot, and hold a piece that it lacks: an `Offer` message.
    Offer {
        /// The peer.
        peer: PeerKey,
        /// The swarm.
        swarm: SwarmKey,
        /// The piece.
        piece: PieceIndex,
    },
    /// Ask the region processes, in the order of [`crate::lease_owners`], for leave to read pieces of
    /// a block; one of the three lease events must follow.
    AskLease {
        /// The swarm.
        swarm: SwarmKey,
        /// The block: pieces from `block * LEASE_BLOCK_PIECES` on.
        block: u32,
        /// The pieces of the block that neither this machine nor any neighbour has, lowest bit first.
        lacking: u64,
        /// How many pieces at most.
        want: u16,
    },
    /// Tell the block's owner how leased pieces ended. Held ones are in the swarm: this machine or a
    /// neighbour of it has them.
    LeaseDone {
        /// The swarm.
        swarm: SwarmKey,
        /// The first piece.
        first: u32,
        /// How many.
        count: u32,
        /// Whether they are in the swarm; false gives the lease back.
        held: bool,
    },
    /// Read neighbouring pieces from the region's bucket, verify and write each, and say
    /// [`Event::OriginEnded`] for each.
    FetchOrigin {
        /// The swarm.
        swarm: SwarmKey,
        /// The first piece.
        first: u32,
        /// How many.
        count: u32,
    },
    /// Find more neighbours for a swarm: ask the region processes, or others, and connect. Asking
    /// also makes this machine known, so it comes now and then from a seed too.
    WantPeers {
        /// The swarm.
        swarm: SwarmKey,
        /// How many more.
        want: u16,
    },
    /// The peer sent too many corrupt pieces: close the connection and refuse the machine from now on.
    /// The policy forgets the ban with the handle.
    Ban {
        /// The peer.
        peer: PeerKey,
    },
    /// Every piece is held. Said once a swarm, also when it was so from the start.
    Completed {
        /// The swarm.
        swarm: SwarmKey,
    },
}
