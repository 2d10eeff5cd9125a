//! Subtree hashes of an artifact's BLAKE3 tree, and how they merge to its root.

use blake3::{
    Hasher,
    hazmat::{ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root},
};
use shoal_proto::{ArtifactId, PieceHash, PieceIndex, manifest::PieceSize};

/// Hashes one piece bit by bit, for a reader that wants each block hashed while it is in the processor's
/// cache.
#[derive(Debug, Clone)]
pub struct PieceHasher {
    hasher: Hasher,
    whole: bool,
}

impl PieceHasher {
    /// Begins piece `index` of an artifact of `size_bytes`.
    #[must_use]
    pub fn new(size_bytes: u64, piece_size: PieceSize, index: PieceIndex) -> Self {
        let mut hasher = Hasher::new();
        // An artifact of one piece is its own root: a root is finalised differently from a subtree.
        let whole = size_bytes <= piece_size.bytes();
        if !whole {
            hasher.set_input_offset(u64::from(index.0) * piece_size.bytes());
        }
        Self { hasher, whole }
    }

    /// Takes the next bytes of the piece.
    ///
    /// # Panics
    /// When the piece grows beyond the subtree that can begin at its offset, which no range within
    /// one piece does.
    pub fn update(&mut self, raw: &[u8]) {
        self.hasher.update(raw);
    }

    /// The hash of all bytes taken, which must be at least one unless the artifact is one piece: an
    /// empty subtree has no hash, and gives the hash of nothing, which no piece has.
    #[must_use]
    pub fn finish(&self) -> PieceHash {
        if self.whole {
            return PieceHash(*self.hasher.finalize().as_bytes());
        }
        if self.hasher.count() == 0 {
            // blake3 panics on it.
            return PieceHash(ArtifactId::EMPTY.0);
        }
        PieceHash(self.hasher.finalize_non_root())
    }
}

/// The hash of piece `index`: its subtree's chaining value, or the plain hash when the artifact is one
/// piece. `raw` is the piece and nothing else: a longer slice is cut off at the piece size, so it is never
/// out of the tree's shape; its length is [`crate::verify_piece`]'s to check.
#[must_use]
pub fn piece_hash(
    size_bytes: u64,
    piece_size: PieceSize,
    index: PieceIndex,
    raw: &[u8],
) -> PieceHash {
    let mut hasher = PieceHasher::new(size_bytes, piece_size, index);
    hasher.update(&raw[..raw.len().min(piece_size.bytes() as usize)]);
    hasher.finish()
}

/// Merges the hashes of all pieces to the artifact's id: no pieces, the hash of nothing; one, itself; more,
/// by BLAKE3's rule that a left subtree holds the largest power of two of pieces strictly below the count
/// (BLAKE3 specification, section 2.1; it holds for pieces because each is a power of two of chunks).
///
/// Neither size changes the result: every piece but the last is whole, and the tree above the pieces
/// depends on their count alone. They are here to check the count: a list of another length gives an id
/// that no artifact has.
#[must_use]
pub fn merge(hashes: &[PieceHash], piece_size: PieceSize, size_bytes: u64) -> ArtifactId {
    if hashes.len() as u64 != size_bytes.div_ceil(piece_size.bytes()) {
        return NO_ARTIFACT;
    }
    match hashes {
        [] => ArtifactId::EMPTY,
        [one] => ArtifactId(one.0),
        many => {
            let (left, right) = many.split_at(left_count(many.len()));
            let root = merge_subtrees_root(&subtree(left), &subtree(right), Mode::Hash);
            ArtifactId(*root.as_bytes())
        }
    }
}

/// What [`merge`] gives for a list that is not one hash a piece: no hash is known to be all zeros.
const NO_ARTIFACT: ArtifactId = ArtifactId([0; 32]);

/// The chaining value above `hashes`, at least one; recursion is at most 17 deep (65,536 pieces).
fn subtree(hashes: &[PieceHash]) -> ChainingValue {
    match hashes {
        [one] => one.0,
        many => {
            let (left, right) = many.split_at(left_count(many.len()));
            merge_subtrees_non_root(&subtree(left), &subtree(right), Mode::Hash)
        }
    }
}

/// The largest power of two strictly below `count`, which is at least 2.
fn left_count(count: usize) -> usize {
    1 << (count - 1).ilog2()
}
