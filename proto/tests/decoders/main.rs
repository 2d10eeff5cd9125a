//! Every decoder, fed what nobody should send: no panic, no large allocation, and nothing that is not the
//! message it encodes to.
#![allow(clippy::unwrap_used)]

mod list;
mod meter;

use proptest::prelude::*;
use serde::Serialize;
use shoal_proto::{
    AppName, ArtifactId, Bitmap, EncodingId, MachineName, NodeId, PieceHash, PieceIndex, Revision,
    codec::{self, CodecError},
    goal::SignedGoal,
    gossip::GossipMessage,
    manifest::{Codec, EncodingIndex, Manifest, Part, PieceSize, StoredPiece},
    peer::{PeerAddr, PeerMessage, StreamReply, StreamRequest},
    region::{RegionReply, RegionRequest, SignedUrl},
};

const LIMIT: usize = 64 << 10;

/// Gives `bytes` to every decoder.
fn feed_all(bytes: &[u8]) {
    for (_, feed) in list::DECODERS {
        feed(bytes);
    }
}

fn addr() -> PeerAddr {
    PeerAddr {
        node: NodeId([7; 32]),
        machine: MachineName::new("m1").unwrap(),
        zone: "a".into(),
        data: "127.0.0.1:1".parse().unwrap(),
        gossip: "[::1]:2".parse().unwrap(),
    }
}

fn encoded(message: &impl Serialize) -> Vec<u8> {
    codec::encode(message, LIMIT).unwrap()
}

/// One good message of each conversation, encoded.
fn good() -> Vec<Vec<u8>> {
    let artifact = ArtifactId([1; 32]);
    let mut have = Bitmap::empty(100);
    have.insert(42);
    let signed = SignedGoal { goal: vec![1, 2, 3], key_id: 1, signature: vec![9; 64] };
    let index = EncodingIndex {
        manifest: Manifest {
            artifact,
            size_bytes: 300 << 10,
            piece_size: PieceSize::MIN,
            piece_hashes: vec![PieceHash([2; 32]); 2],
        },
        pieces: vec![StoredPiece { codec: Codec::Zstd, len: 10 }; 2],
        parts: vec![Part { len: 20, hash: [3; 32] }],
    };
    let revisions = vec![(AppName::new("web").unwrap(), Revision { epoch: 1, number: 2 })];
    let piece = PieceIndex(3);
    let encoding = EncodingId([4; 32]);
    let lease =
        RegionRequest::Lease { artifact, encoding, pieces_total: 9, block: 0, lacking: 3, want: 2 };
    vec![
        encoded(&PeerMessage::Join { artifact, have }),
        encoded(&PeerMessage::Hello { me: addr(), revisions }),
        encoded(&StreamRequest::Piece { artifact, piece }),
        encoded(&StreamRequest::Region(lease)),
        encoded(&StreamReply::Region(RegionReply::Peers(vec![addr()]))),
        encoded(&StreamReply::Region(RegionReply::SignedLeased {
            first: 3,
            duration_ms: 30_000,
            urls: vec![SignedUrl("https://bucket.example.org/part-00000?X-Amz-Signature=0".into())],
        })),
        encoded(&GossipMessage::Goal(signed)),
        encoded(&index),
    ]
}

#[test]
fn good_messages_come_back_as_they_were() {
    let mut decoded = 0;
    for bytes in good() {
        feed_all(&bytes);
        decoded += usize::from(codec::decode::<PeerMessage>(&bytes, LIMIT).is_ok());
        decoded += usize::from(codec::decode::<EncodingIndex>(&bytes, LIMIT).is_ok());
    }
    assert!(decoded >= 3, "the messages that were meant to be good are not");
}

/// Found by the fuzz target: a name that claims 8 MiB, in seven bytes.
#[test]
fn a_string_claims_no_more_than_its_message_could_hold() {
    let bytes = [1, 252, 9, 0, 128, 0, 0];
    let (read, allocated) = meter::peak_bytes(|| codec::decode::<String>(&bytes, LIMIT));
    assert_eq!(read, Err(CodecError::Malformed));
    assert!(allocated < 1 << 10, "{allocated} bytes were allocated");
    feed_all(&bytes);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(8_192) })]

    #[test]
    fn noise_is_refused_or_is_a_message(mut bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        feed_all(&bytes);
        if let Some(first) = bytes.first_mut() {
            *first = codec::CODEC_VERSION;
        }
        feed_all(&bytes);
    }

    #[test]
    fn a_good_message_gone_wrong_is_refused_or_is_a_message(
        which in 0..7usize,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<Option<prop::sample::Index>>(),
    ) {
        let mut bytes = good().swap_remove(which);
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        feed_all(&bytes);
    }
}
