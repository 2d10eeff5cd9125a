//! The chain of trust and the codec, on random artifacts and on liars.
#![allow(clippy::unwrap_used)]

use proptest::{prelude::*, sample::select};
use shoal_pieces::{
    DecodeError, Decoder, Encoder, IndexError, ManifestError, PieceError, PieceHasher, merge,
    open_index, piece_hash, seal_index, verify_manifest, verify_piece,
};
use shoal_proto::{
    ArtifactId, EncodingId, PieceHash, PieceIndex, codec,
    manifest::{
        Codec, EncodingIndex, INDEX_MAX_BYTES, Manifest, Part, PieceSize, StoredPiece, layout,
    },
};

const PIECE: usize = 256 << 10;

/// `len` bytes that depend on the seed alone; half of the pieces compress.
fn content(len: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    for piece in bytes.chunks_mut(PIECE).skip(seed as usize % 2).step_by(2) {
        for run in piece.chunks_mut(16) {
            run.fill(b'x');
        }
    }
    bytes
}

fn manifest_of(bytes: &[u8]) -> Manifest {
    let piece_size = PieceSize::MIN;
    let size_bytes = bytes.len() as u64;
    let piece_hashes: Vec<PieceHash> = bytes
        .chunks(PIECE)
        .enumerate()
        .map(|(at, raw)| piece_hash(size_bytes, piece_size, PieceIndex(at as u32), raw))
        .collect();
    let artifact = merge(&piece_hashes, piece_size, size_bytes);
    Manifest { artifact, size_bytes, piece_size, piece_hashes }
}

/// An index over the encoded pieces of `bytes`, and those pieces.
fn encode(bytes: &[u8], level: i32) -> (EncodingIndex, Vec<Vec<u8>>) {
    let mut encoder = Encoder::new(level);
    let (mut pieces, mut stored) = (Vec::new(), Vec::new());
    for raw in bytes.chunks(PIECE) {
        let mut out = vec![7; 3];
        let codec = encoder.encode(raw, &mut out);
        if codec == Codec::Raw {
            assert!(out.is_empty());
            out = raw.to_vec();
        }
        pieces.push(StoredPiece { codec, len: out.len() as u32 });
        stored.push(out);
    }
    let mut lens: Vec<u64> = Vec::new();
    for place in layout(&pieces) {
        lens.resize(place.part as usize + 1, 0);
        lens[place.part as usize] += u64::from(place.len);
    }
    let parts = lens.into_iter().map(|len| Part { len, hash: [0; 32] }).collect();
    (EncodingIndex { manifest: manifest_of(bytes), pieces, parts }, stored)
}

/// Lengths around the boundaries of pieces, up to a few hundred of them.
fn lengths() -> impl Strategy<Value = usize> {
    let edge = select(vec![-1025i64, -1024, -1, 0, 1, 1023, 1024, 1025]);
    let near = (0..12i64, edge).prop_map(|(n, d)| (n * PIECE as i64 + d).max(0) as usize);
    prop_oneof![near, 0..6 * PIECE]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn pieces_merge_to_the_hash_of_the_whole(len in lengths(), seed: u64) {
        let bytes = content(len, seed);
        let manifest = manifest_of(&bytes);
        prop_assert_eq!(manifest.artifact.0, *blake3::hash(&bytes).as_bytes());
        verify_manifest(&manifest).unwrap();
        for (at, raw) in bytes.chunks(PIECE).enumerate() {
            verify_piece(&manifest, PieceIndex(at as u32), raw).unwrap();
        }
    }

    #[test]
    fn every_encoded_piece_decodes_and_verifies(
        len in lengths(), seed: u64, level in -3..12i32
    ) {
        let bytes = content(len, seed);
        let (index, stored) = encode(&bytes, level);
        index.check().unwrap();
        let (mut decoder, mut raw) = (Decoder::new(), Vec::new());
        for (at, (piece, stored)) in index.pieces.iter().zip(&stored).enumerate() {
            let at = PieceIndex(at as u32);
            let len = index.manifest.piece_len(at);
            decoder.decode(piece.codec, stored, len, &mut raw).unwrap();
            verify_piece(&index.manifest, at, &raw).unwrap();
        }
        let (sealed, encoding) = seal_index(&index).unwrap();
        let opened = open_index(&sealed, &index.manifest.artifact, &encoding).unwrap();
        prop_assert_eq!(opened, index);
    }

    #[test]
    fn one_wrong_bit_is_found(
        len in 1..3 * PIECE, seed: u64, bit: prop::sample::Index, by in 0..8u32
    ) {
        let mut bytes = content(len, seed);
        let manifest = manifest_of(&bytes);
        let at = bit.index(len);
        bytes[at] ^= 1 << by;
        for (piece, raw) in bytes.chunks(PIECE).enumerate() {
            let index = PieceIndex(piece as u32);
            let verified = verify_piece(&manifest, index, raw);
            if piece == at / PIECE {
                prop_assert_eq!(verified, Err(PieceError::Hash { index }));
            } else {
                prop_assert_eq!(verified, Ok(()));
            }
        }
        let mut other = manifest.clone();
        other.piece_hashes[at / PIECE].0[by as usize] ^= 1;
        let refused = matches!(verify_manifest(&other), Err(ManifestError::NotTheArtifact { .. }));
        prop_assert!(refused);
    }

    #[test]
    fn what_is_no_frame_is_refused(garbage in prop::collection::vec(any::<u8>(), 0..4096)) {
        let mut out = vec![1; 5];
        let decoded = Decoder::new().decode(Codec::Zstd, &garbage, PIECE, &mut out);
        prop_assert!(decoded.is_err());
        prop_assert!(out.is_empty() && out.capacity() <= PIECE);
    }

    #[test]
    fn a_damaged_frame_gives_an_error_or_fails_its_hash(
        seed: u64, at: prop::sample::Index, to: u8
    ) {
        // Random words of a small alphabet: a frame with sequences and literals.
        let bytes: Vec<u8> = content(PIECE, seed | 1).iter().map(|b| b"abcdefgh"[*b as usize % 8]).collect();
        let manifest = manifest_of(&bytes);
        let mut frame = Vec::new();
        prop_assert_eq!(Encoder::new(1).encode(&bytes, &mut frame), Codec::Zstd);
        let at = at.index(frame.len());
        let changed = frame[at] != to;
        frame[at] = to;
        let mut out = Vec::new();
        let sound = Decoder::new().decode(Codec::Zstd, &frame, PIECE, &mut out).is_ok()
            && verify_piece(&manifest, PieceIndex(0), &out).is_ok();
        // A changed frame may still decode to the same bytes (an unused header bit), never to others.
        prop_assert!(!sound || out == bytes);
        prop_assert!(changed || sound);
        prop_assert!(out.capacity() <= PIECE);
    }
}

#[test]
fn hundreds_of_pieces_merge_with_any_last_length() {
    // Every count up to 40, then counts around powers of two; one short last piece each.
    let counts = (1..=40).chain([63, 64, 65, 127, 128, 129, 255, 256, 257, 300]);
    let bytes = content(300 * PIECE, 3);
    for count in counts {
        for last in [1, 1023, 1025, PIECE / 2 + 1, PIECE] {
            let bytes = &bytes[..(count - 1) * PIECE + last];
            let manifest = manifest_of(bytes);
            assert_eq!(manifest.piece_count() as usize, count);
            let mut whole = blake3::Hasher::new();
            whole.update(bytes);
            assert_eq!(manifest.artifact.0, *whole.finalize().as_bytes(), "{count} {last}");
        }
    }
}

#[test]
fn a_list_of_the_wrong_length_merges_to_no_artifact() {
    let manifest = manifest_of(&content(3 * PIECE, 1));
    let (size, hashes) = (manifest.piece_size, &manifest.piece_hashes);
    assert_eq!(merge(&hashes[..2], size, manifest.size_bytes), ArtifactId([0; 32]));
    assert_eq!(merge(&[], size, 0), ArtifactId::EMPTY);
    assert_eq!(merge(&[], size, 1), ArtifactId([0; 32]));
    let mut short = manifest.clone();
    short.piece_hashes.pop();
    assert!(matches!(verify_manifest(&short), Err(ManifestError::Inconsistent(_))));
}

#[test]
fn a_piece_of_another_length_or_place_is_refused() {
    let bytes = content(PIECE + 1, 2);
    let manifest = manifest_of(&bytes);
    let (first, last) = (PieceIndex(0), PieceIndex(1));
    let short = verify_piece(&manifest, first, &bytes[..PIECE - 1]);
    assert_eq!(short, Err(PieceError::Length { index: first, got: PIECE - 1, want: PIECE }));
    // Nothing at all, and more than a subtree may hold, are lengths like any other.
    for bytes in [&bytes[..0], &bytes[..]] {
        let other = verify_piece(&manifest, last, bytes);
        assert_eq!(other, Err(PieceError::Length { index: last, got: bytes.len(), want: 1 }));
    }
    let past = PieceIndex(2);
    let none = verify_piece(&manifest, past, &bytes[..1]);
    assert_eq!(none, Err(PieceError::NoSuchPiece { index: past, count: 2 }));
    // The same bytes elsewhere in the artifact are another piece.
    let twice = [&bytes[..PIECE], &bytes[..PIECE]].concat();
    let hashes = manifest_of(&twice).piece_hashes;
    assert_ne!(hashes[0], hashes[1]);
}

#[test]
fn a_piece_hashed_in_blocks_is_the_piece() {
    let bytes = content(2 * PIECE, 5);
    let manifest = manifest_of(&bytes);
    let mut hasher = PieceHasher::new(manifest.size_bytes, manifest.piece_size, PieceIndex(1));
    bytes[PIECE..].chunks(1000).for_each(|block| hasher.update(block));
    assert_eq!(hasher.finish(), manifest.piece_hashes[1]);
    // An empty subtree has no hash: it must not panic and must not be a piece's.
    let empty = PieceHasher::new(manifest.size_bytes, manifest.piece_size, PieceIndex(1)).finish();
    assert!(!manifest.piece_hashes.contains(&empty));
}

#[test]
fn a_bomb_is_held_to_the_length_of_the_piece() {
    // 64 MiB of zeros in a few KB, and the same as frames one after another.
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
    let small = zstd::bulk::compress(&vec![0; PIECE], 1).unwrap();
    let chain = small.repeat(16);
    for stored in [bomb, chain] {
        assert!(stored.len() < PIECE);
        let mut out = Vec::new();
        let decoded = Decoder::new().decode(Codec::Zstd, &stored, PIECE, &mut out);
        assert!(matches!(decoded, Err(DecodeError::Frame { .. })), "{decoded:?}");
        assert!(out.is_empty() && out.capacity() <= PIECE);
    }
    // A frame that asks for a window of gigabytes gets none: the output is the window.
    let mut streamed = zstd::stream::Encoder::new(Vec::new(), 1).unwrap();
    streamed.window_log(30).unwrap();
    std::io::Write::write_all(&mut streamed, &[0; PIECE]).unwrap();
    let stored = streamed.finish().unwrap();
    let mut out = Vec::new();
    Decoder::new().decode(Codec::Zstd, &stored, PIECE, &mut out).unwrap();
    assert_eq!(out, vec![0; PIECE]);
}

#[test]
fn a_stored_piece_of_the_wrong_length_is_refused() {
    let short = zstd::bulk::compress(&[0; 1000], 1).unwrap();
    let mut out = vec![9; PIECE];
    let mut decoder = Decoder::new();
    let mut refused = |codec, stored: &[u8]| {
        let error = decoder.decode(codec, stored, PIECE, &mut out).unwrap_err();
        assert!(out.is_empty());
        error
    };
    let length = |got| DecodeError::Length { got, want: PIECE };
    assert_eq!(refused(Codec::Zstd, &short), length(1000));
    // No frame at all, and a frame that is skipped, are 0 bytes.
    assert_eq!(refused(Codec::Zstd, &[]), length(0));
    assert_eq!(refused(Codec::Zstd, &[0x50, 0x2a, 0x4d, 0x18, 1, 0, 0, 0, 9]), length(0));
    let too_long = DecodeError::StoredLength { stored: PIECE, raw: PIECE };
    assert_eq!(refused(Codec::Zstd, &vec![0; PIECE]), too_long);
    assert_eq!(refused(Codec::Raw, &[1; 10]), length(10));
    let too_long = DecodeError::StoredLength { stored: PIECE + 1, raw: PIECE };
    assert_eq!(refused(Codec::Raw, &vec![0; PIECE + 1]), too_long);
}

#[test]
fn what_does_not_compress_stays_raw() {
    let mut random = vec![0; PIECE];
    blake3::Hasher::new().finalize_xof().fill(&mut random);
    let mut encoder = Encoder::new(1);
    let mut out = Vec::new();
    assert_eq!(encoder.encode(&random, &mut out), Codec::Raw);
    assert_eq!(encoder.encode(&[5], &mut out), Codec::Raw);
    assert_eq!(encoder.encode(&[], &mut out), Codec::Raw);
    // 2 % of zeros is too little to save, 6 % is enough.
    random[..PIECE / 50].fill(0);
    assert_eq!(encoder.encode(&random, &mut out), Codec::Raw);
    random[..PIECE / 16].fill(0);
    assert_eq!(encoder.encode(&random, &mut out), Codec::Zstd);
    assert!(out.len() <= PIECE - PIECE / 32);
    // A buffer that is larger than the piece does not widen what counts as saving.
    let mut roomy = Vec::with_capacity(2 * PIECE);
    random[..PIECE / 16].fill(1);
    blake3::Hasher::new().finalize_xof().fill(&mut random[..PIECE / 16]);
    assert_eq!(encoder.encode(&random, &mut roomy), Codec::Raw);
    assert!(roomy.is_empty());
}

#[test]
fn an_index_is_believed_only_with_every_proof() {
    let (index, _) = encode(&content(2 * PIECE + 5, 4), 1);
    let artifact = index.manifest.artifact;
    let (sealed, encoding) = seal_index(&index).unwrap();
    open_index(&sealed, &artifact, &encoding).unwrap();

    let mut damaged = sealed.clone();
    *damaged.last_mut().unwrap() ^= 1;
    let not_it = open_index(&damaged, &artifact, &encoding);
    assert!(matches!(not_it, Err(IndexError::NotTheEncoding { .. })));
    let other = open_index(&sealed, &ArtifactId([1; 32]), &encoding);
    assert!(matches!(other, Err(IndexError::OtherArtifact { .. })));

    // Whoever writes an index also gives it its hash: the rest must hold by itself.
    let name = |bytes: &[u8]| EncodingId(*blake3::hash(bytes).as_bytes());
    let forge = |index: &EncodingIndex| {
        let bytes = codec::encode(index, INDEX_MAX_BYTES).unwrap();
        open_index(&bytes, &artifact, &name(&bytes)).unwrap_err()
    };
    let mut forged = index.clone();
    forged.manifest.piece_hashes[1].0[0] ^= 1;
    assert!(matches!(forge(&forged), IndexError::Manifest(_)));
    assert!(matches!(seal_index(&forged), Err(IndexError::Manifest(_))));
    let mut forged = index.clone();
    forged.parts[0].len += 1;
    assert!(matches!(forge(&forged), IndexError::Inconsistent(_)));
    assert!(matches!(seal_index(&forged), Err(IndexError::Inconsistent(_))));

    let garbage = b"\x01not an index";
    let refused = open_index(garbage, &artifact, &name(garbage));
    assert!(matches!(refused, Err(IndexError::Codec(_))));
    let long = vec![1; INDEX_MAX_BYTES + 1];
    let refused = open_index(&long, &artifact, &name(&long));
    assert!(matches!(refused, Err(IndexError::Codec(_))));
}
