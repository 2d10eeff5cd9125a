//! Every message that is read from a network or a disk, each under the limit that its reader sets, and what must
//! hold of whatever comes out. The fuzz target and the tests take the list from here.

use serde::{Serialize, de::DeserializeOwned};
use shoal_proto::{
    Bitmap, codec,
    goal::{GOAL_MAX_BYTES, Goal, SignedGoal},
    gossip::{GOSSIP_MESSAGE_MAX_BYTES, GossipMessage},
    manifest::{EncodingIndex, INDEX_MAX_BYTES},
    peer::{
        PEER_MESSAGE_MAX_BYTES, PeerMessage, STREAM_REPLY_MAX_BYTES, STREAM_REQUEST_MAX_BYTES,
        StreamReply, StreamRequest,
    },
    region::OpenWave,
    trust::{SignedTrust, TRUST_MAX_BYTES, TrustBundle},
};

use crate::meter;

/// The open waves that a region process keeps in a file; the limit is its own.
const WAVES_FILE_MAX_BYTES: usize = 16 << 20;

/// What reading may allocate for nothing, in bytes: serde makes room for at most 1 MiB of elements of a list before
/// it has seen one, and no message nests lists deeper than three.
const ALLOCATED_FLAT_BYTES: usize = 4 << 20;

/// And what it may allocate for each byte of the message: codec makes room for strings in steps of the message's
/// length, at the coarsest 32 times each other, and for 8 bytes a byte.
const ALLOCATED_PER_BYTE: usize = 256;

/// A decoder: panics when something does not hold of these bytes.
pub(crate) type Feed = fn(&[u8]);

/// All of them, by name.
pub(crate) const DECODERS: &[(&str, Feed)] = &[
    ("PeerMessage", feed::<PeerMessage, PEER_MESSAGE_MAX_BYTES>),
    ("StreamRequest", feed::<StreamRequest, STREAM_REQUEST_MAX_BYTES>),
    ("StreamReply", feed::<StreamReply, STREAM_REPLY_MAX_BYTES>),
    ("GossipMessage", feed::<GossipMessage, GOSSIP_MESSAGE_MAX_BYTES>),
    ("SignedGoal", feed::<SignedGoal, GOAL_MAX_BYTES>),
    ("Goal", feed::<Goal, GOAL_MAX_BYTES>),
    ("SignedTrust", feed::<SignedTrust, TRUST_MAX_BYTES>),
    ("TrustBundle", feed::<TrustBundle, TRUST_MAX_BYTES>),
    ("EncodingIndex", feed_index),
    ("Bitmap", feed_bitmap),
    ("open waves", feed::<Vec<OpenWave>, WAVES_FILE_MAX_BYTES>),
];

fn feed<T, const LIMIT: usize>(bytes: &[u8])
where
    T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug,
{
    let _ = read::<T>(bytes, LIMIT);
}

fn feed_index(bytes: &[u8]) {
    let Some(index) = read::<EncodingIndex>(bytes, INDEX_MAX_BYTES) else { return };
    // What has passed its check may be reckoned with.
    if index.check().is_ok() {
        let stored: u64 = index.layout().iter().map(|place| u64::from(place.len)).sum();
        assert_eq!(stored, index.parts.iter().map(|part| part.len).sum::<u64>());
        assert!(stored <= index.manifest.size_bytes);
    }
}

fn feed_bitmap(bytes: &[u8]) {
    let Some(map) = read::<Bitmap>(bytes, PEER_MESSAGE_MAX_BYTES) else { return };
    assert_eq!(map.iter().filter(|&index| map.contains(index)).count(), map.count() as usize);
    assert!(map.count() <= map.len());
}

/// Decodes `bytes` under `limit`: refused without much memory, or a message that goes the same way again.
fn read<T>(bytes: &[u8], limit: usize) -> Option<T>
where
    T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug,
{
    let (decoded, allocated) = meter::peak_bytes(|| codec::decode::<T>(bytes, limit));
    let allowed = ALLOCATED_FLAT_BYTES + ALLOCATED_PER_BYTE * bytes.len().min(limit);
    assert!(allocated <= allowed, "{} bytes took {allocated} bytes to read", bytes.len());
    let message = decoded.ok()?;
    // It may have come in longer than it need be, never shorter: who read it can pass it on.
    let again = codec::encode(&message, bytes.len()).expect("what was read can be written");
    let same = codec::decode::<T>(&again, limit).expect("what was written can be read");
    assert_eq!(same, message);
    Some(message)
}
