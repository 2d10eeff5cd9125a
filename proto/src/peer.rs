//! Machine to machine, over one QUIC connection a pair: a control stream of [`PeerMessage`]s each way,
//! and one short stream for each [`StreamRequest`].

use alloc::{format, string::String, vec::Vec};
use core::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::{
    bitmap::Bitmap,
    goal::SignedGoal,
    ids::{AppName, ArtifactId, EncodingId, MachineName, NodeId, PieceIndex, Revision},
    manifest::{Codec, INDEX_MAX_BYTES},
    region::{RegionReply, RegionRequest},
};

/// The protocol versions that this release speaks, newest first: its own and the one before, so that machines swarm while
/// a fleet is upgraded. Version 2 brought leases with URLs ([`crate::region::SIGNED_LEASES_SINCE`]), and trust that changes
/// ([`TRUST_SINCE`]).
pub const VERSIONS: &[u16] = &[2, 1];

/// A protocol version as TLS ALPN names it.
#[must_use]
pub fn alpn(version: u16) -> String {
    format!("shoal/{version}")
}

/// The protocol version of a TLS ALPN name; none when it is no name of ours.
#[must_use]
pub fn version_of(alpn: &[u8]) -> Option<u16> {
    core::str::from_utf8(alpn).ok()?.strip_prefix("shoal/")?.parse().ok()
}

/// The protocol version that brought [`PeerMessage::Standing`], [`StreamRequest::Trust`] and [`StreamRequest::Renew`]: who
/// speaks an older one is sent none of them.
pub const TRUST_SINCE: u16 = 2;

/// The longest encoded [`PeerMessage`]: a bitmap of 8 KiB and its envelope, or a batch of peers.
pub const PEER_MESSAGE_MAX_BYTES: usize = 16 << 10;

/// The longest encoded [`StreamRequest`]: a machine's report of all its apps is the longest.
pub const STREAM_REQUEST_MAX_BYTES: usize = 256 << 10;

/// The longest encoded [`StreamReply`] header: the goals of one machine, or an encoding's index.
pub const STREAM_REPLY_MAX_BYTES: usize = INDEX_MAX_BYTES + 1024;

/// The most piece indices in one [`PeerMessage::Have`].
pub const HAVE_BATCH_MAX: usize = 2_048;

/// The most addresses in one [`PeerMessage::Peers`].
pub const PEERS_BATCH_MAX: usize = 64;

/// Where a machine can be reached.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PeerAddr {
    /// Its key: a connection to another key is refused.
    pub node: NodeId,
    /// Its name.
    pub machine: MachineName,
    /// Its zone.
    pub zone: String,
    /// Its data plane, UDP.
    pub data: SocketAddr,
    /// Its gossip plane, UDP.
    pub gossip: SocketAddr,
}

/// What neighbours tell each other; order is kept, loss means a lost connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PeerMessage {
    /// First of all: who speaks, and which goals it knows, so that the one who is behind learns it.
    Hello {
        /// Where the sender can be reached, and its zone.
        me: PeerAddr,
        /// The highest revision that it knows of each app.
        revisions: Vec<(AppName, Revision)>,
    },
    /// A goal that the receiver was behind on.
    Goal(SignedGoal),
    /// The sender takes part in an artifact's swarm, as a fetcher or as a seed.
    Join {
        /// The artifact.
        artifact: ArtifactId,
        /// What the sender holds; its length is the number of pieces.
        have: Bitmap,
    },
    /// The sender holds more pieces: a batch.
    Have {
        /// The artifact.
        artifact: ArtifactId,
        /// The pieces, at most [`HAVE_BATCH_MAX`].
        pieces: Vec<PieceIndex>,
    },
    /// The sender no longer takes part.
    Leave {
        /// The artifact.
        artifact: ArtifactId,
    },
    /// Others that take part: peer exchange.
    Peers {
        /// The artifact.
        artifact: ArtifactId,
        /// At most [`PEERS_BATCH_MAX`].
        peers: Vec<PeerAddr>,
    },
    /// The sender has a free upload slot, and holds a piece that it thinks the receiver lacks. Nothing is kept for the
    /// receiver: it asks for that piece or another one if it has room for one.
    Offer {
        /// The artifact.
        artifact: ArtifactId,
        /// The piece.
        piece: PieceIndex,
    },
    /// Which trust the sender goes by, and whose certificate it shows: after the connection is up, whenever either changes,
    /// and now and then. Who is behind asks for what it lacks ([`StreamRequest::Trust`]).
    Standing {
        /// The number of its trust bundle.
        trust: u64,
        /// The first bytes of the id of the CA key that issued its certificate.
        issuer: u64,
    },
}

/// What opens a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum StreamRequest {
    /// One piece, of any encoding.
    Piece {
        /// The artifact.
        artifact: ArtifactId,
        /// The piece.
        piece: PieceIndex,
    },
    /// An encoding's index.
    Index {
        /// The artifact.
        artifact: ArtifactId,
        /// The encoding.
        encoding: EncodingId,
    },
    /// A question to a region process.
    Region(RegionRequest),
    /// The trust bundles that lead on from one of this number.
    Trust {
        /// The number of the asker's bundle.
        after: u64,
    },
    /// An agent asks its region process for a renewed certificate of the key that the connection is made with.
    Renew,
}

/// What comes back first on such a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum StreamReply {
    /// A piece; `len` bytes follow.
    Piece {
        /// How they are encoded.
        codec: Codec,
        /// How many they are.
        len: u32,
    },
    /// The index object, as stored.
    Index(Vec<u8>),
    /// A region process's answer.
    Region(RegionReply),
    /// No free slot: ask somebody else, or again later.
    Busy,
    /// The answerer does not have it.
    NotHere,
    /// The question was wrong or failed, and why.
    Error(String),
    /// Signed trust bundles, encoded, each signed by a key of the one before; at most
    /// [`TRUST_CHAIN_MAX`](crate::trust::TRUST_CHAIN_MAX).
    Trust(Vec<Vec<u8>>),
    /// A renewed certificate, PEM.
    Certificate(String),
}

/// Why a side closed a connection, as QUIC application error codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum CloseReason {
    /// In order: shutting down.
    Done = 0,
    /// A message was malformed or too long.
    Malformed = 1,
    /// Another connection of the same pair is kept.
    Duplicate = 2,
    /// Sent too many pieces that fail their hash.
    Banned = 3,
    /// Too many connections.
    Full = 4,
    /// Not used for a long time.
    Idle = 5,
    /// Not the machine or role that was expected.
    WrongPeer = 6,
    /// The certificate no longer counts: revoked, of a CA that was replaced, or over.
    Untrusted = 7,
}
