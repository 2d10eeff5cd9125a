//! What an artifact is made of: its pieces, and one way in which they are stored.

use alloc::{format, string::String, vec::Vec};
use core::{fmt, ops::Range};

use serde::{Deserialize, Serialize};

use crate::ids::{ArtifactId, PieceHash, PieceIndex};

/// The most pieces that an artifact may have: bounds a bitmap to 8 KiB and a manifest to 2 MiB.
pub const PIECES_MAX: u32 = 65_536;

/// The longest encoded [`EncodingIndex`], in bytes: [`PIECES_MAX`] hashes and lengths, and the parts.
pub const INDEX_MAX_BYTES: usize = 4 << 20;

/// A part object of an encoding is never longer than this, in bytes.
pub const PART_MAX_BYTES: u64 = 64 << 20;

/// [`PieceSize::for_artifact`] keeps to at most this many pieces where it can: enough for a swarm of
/// 100,000 to keep its pipelines full, few enough that maps and hashes stay small.
const PIECES_AIM: u64 = 2_560;

/// The length of every piece but the last: a power of two from 256 KiB to 16 MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct PieceSize(u8);

impl PieceSize {
    /// 256 KiB.
    pub const MIN: Self = Self(18);
    /// 16 MiB.
    pub const MAX: Self = Self(24);

    /// The size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        1 << self.0
    }

    /// The piece size of `bytes` bytes, when there is one.
    #[must_use]
    pub fn from_bytes(bytes: u64) -> Option<Self> {
        let log2 = u8::try_from(bytes.checked_ilog2()?).ok()?;
        bytes.is_power_of_two().then_some(())?;
        Self::try_from(log2).ok()
    }

    /// The default for an artifact of `size_bytes`: the smallest that makes at most 2,560 pieces, so
    /// 4 MiB for 10 GB.
    #[must_use]
    pub fn for_artifact(size_bytes: u64) -> Self {
        (Self::MIN.0..Self::MAX.0)
            .map(Self)
            .find(|size| size_bytes.div_ceil(size.bytes()) <= PIECES_AIM)
            .unwrap_or(Self::MAX)
    }
}

impl TryFrom<u8> for PieceSize {
    type Error = &'static str;

    fn try_from(log2: u8) -> Result<Self, Self::Error> {
        if (Self::MIN.0..=Self::MAX.0).contains(&log2) {
            Ok(Self(log2))
        } else {
            Err("a piece is 256 KiB to 16 MiB, a power of two")
        }
    }
}

impl From<PieceSize> for u8 {
    fn from(size: PieceSize) -> u8 {
        size.0
    }
}

/// A manifest or an index that contradicts itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inconsistent(pub String);

impl fmt::Display for Inconsistent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl core::error::Error for Inconsistent {}

/// An artifact's pieces. The hashes merge to the id (`shoal_pieces::verify_manifest` checks it), so a
/// manifest from anywhere is as good as its id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// BLAKE3 of all the bytes.
    pub artifact: ArtifactId,
    /// Length of the artifact in bytes.
    pub size_bytes: u64,
    /// Length of each piece but the last.
    pub piece_size: PieceSize,
    /// One hash a piece, in order; none for an artifact of no bytes.
    pub piece_hashes: Vec<PieceHash>,
}

impl Manifest {
    /// How many pieces there are; 0 for an artifact of no bytes.
    #[must_use]
    pub fn piece_count(&self) -> u32 {
        self.piece_hashes.len() as u32
    }

    /// The bytes of the artifact that piece `index` covers.
    #[must_use]
    pub fn piece_range(&self, index: PieceIndex) -> Range<u64> {
        let start = (u64::from(index.0) * self.piece_size.bytes()).min(self.size_bytes);
        start..(start + self.piece_size.bytes()).min(self.size_bytes)
    }

    /// The raw length of piece `index` in bytes.
    #[must_use]
    pub fn piece_len(&self, index: PieceIndex) -> usize {
        let range = self.piece_range(index);
        (range.end - range.start) as usize
    }

    /// Checks that count and size agree.
    ///
    /// # Errors
    /// [`Inconsistent`] says where they do not.
    pub fn check(&self) -> Result<(), Inconsistent> {
        let count = self.size_bytes.div_ceil(self.piece_size.bytes());
        if count > u64::from(PIECES_MAX) {
            return Err(Inconsistent(format!(
                "{count} pieces are more than {PIECES_MAX}: use a larger piece size"
            )));
        }
        if count != self.piece_hashes.len() as u64 {
            return Err(Inconsistent(format!(
                "{} piece hashes for {count} pieces",
                self.piece_hashes.len()
            )));
        }
        Ok(())
    }
}

/// How a piece's bytes are stored and sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Codec {
    /// As they are.
    Raw,
    /// One zstd frame.
    Zstd,
}

/// The stored form of one piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredPiece {
    /// How it is encoded.
    pub codec: Codec,
    /// Its stored length in bytes; never above the raw length.
    pub len: u32,
}

/// One part object: a run of whole stored pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Its length in bytes, at most [`PART_MAX_BYTES`].
    pub len: u64,
    /// BLAKE3 of its bytes: proves a copy without decoding it.
    pub hash: [u8; 32],
}

/// An encoding of an artifact: its pieces as stored, one after the other, cut into parts. The encoded
/// index is an object of its own, whose BLAKE3 is the [`crate::EncodingId`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EncodingIndex {
    /// The artifact.
    pub manifest: Manifest,
    /// One entry a piece, in order.
    pub pieces: Vec<StoredPiece>,
    /// The part objects, in order.
    pub parts: Vec<Part>,
}

/// Where a stored piece lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Location {
    /// Which part object.
    pub part: u32,
    /// From which byte of it.
    pub offset: u64,
    /// How many bytes.
    pub len: u32,
}

impl EncodingIndex {
    /// The bytes of all stored pieces: what "one copy" of the artifact means for `origin_copies`.
    #[must_use]
    pub fn encoded_bytes(&self) -> u64 {
        self.pieces.iter().map(|piece| u64::from(piece.len)).sum()
    }

    /// Where each piece lies, by piece index: parts are filled in order, each to the last whole piece
    /// that fits under [`PART_MAX_BYTES`].
    #[must_use]
    pub fn layout(&self) -> Vec<Location> {
        layout(&self.pieces)
    }

    /// Checks that the parts of the index agree with each other and with the manifest.
    ///
    /// # Errors
    /// [`Inconsistent`] says where they do not.
    pub fn check(&self) -> Result<(), Inconsistent> {
        self.manifest.check()?;
        let wrong = |text: String| Err(Inconsistent(text));
        if self.pieces.len() != self.manifest.piece_hashes.len() {
            return wrong(format!("{} stored pieces, not one a hash", self.pieces.len()));
        }
        for (at, piece) in self.pieces.iter().enumerate() {
            let raw = self.manifest.piece_len(PieceIndex(at as u32));
            let fits = match piece.codec {
                Codec::Raw => piece.len as usize == raw,
                Codec::Zstd => piece.len > 0 && (piece.len as usize) < raw,
            };
            if !fits {
                return wrong(format!("stored piece {at} of {} bytes for {raw}", piece.len));
            }
        }
        let mut lens: Vec<u64> = Vec::new();
        for place in self.layout() {
            lens.resize(place.part as usize + 1, 0);
            lens[place.part as usize] += u64::from(place.len);
        }
        if !lens.iter().eq(self.parts.iter().map(|part| &part.len)) {
            return wrong(format!("{} parts do not hold the stored pieces", self.parts.len()));
        }
        Ok(())
    }
}

/// The rule of [`EncodingIndex::layout`], for whoever writes the parts.
#[must_use]
pub fn layout(pieces: &[StoredPiece]) -> Vec<Location> {
    let (mut part, mut offset) = (0, 0);
    pieces
        .iter()
        .map(|piece| {
            if offset + u64::from(piece.len) > PART_MAX_BYTES {
                part += 1;
                offset = 0;
            }
            let place = Location { part, offset, len: piece.len };
            offset += u64::from(piece.len);
            place
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;

    fn index(size_bytes: u64, lens: &[u32]) -> EncodingIndex {
        let pieces: Vec<_> =
            lens.iter().map(|&len| StoredPiece { codec: Codec::Zstd, len }).collect();
        let mut parts: Vec<Part> = vec![];
        for place in layout(&pieces) {
            parts.resize(place.part as usize + 1, Part { len: 0, hash: [0; 32] });
            parts[place.part as usize].len += u64::from(place.len);
        }
        EncodingIndex {
            manifest: Manifest {
                artifact: ArtifactId::EMPTY,
                size_bytes,
                piece_size: PieceSize::MAX,
                piece_hashes: vec![PieceHash([0; 32]); lens.len()],
            },
            pieces,
            parts,
        }
    }

    #[test]
    fn piece_size_follows_the_artifact() {
        assert_eq!(PieceSize::for_artifact(0), PieceSize::MIN);
        assert_eq!(PieceSize::for_artifact(256 << 20).bytes(), 256 << 10);
        assert_eq!(PieceSize::for_artifact(10_000_000_000).bytes(), 4 << 20);
        assert_eq!(10_000_000_000u64.div_ceil(4 << 20), 2_385);
        assert_eq!(PieceSize::for_artifact(u64::MAX), PieceSize::MAX);
        assert_eq!(PieceSize::from_bytes(3 << 20), None);
        assert_eq!(PieceSize::from_bytes(128 << 10), None);
        assert_eq!(PieceSize::from_bytes(0), None);
        assert_eq!(PieceSize::from_bytes(16 << 20), Some(PieceSize::MAX));
    }

    #[test]
    fn parts_hold_whole_pieces_up_to_their_limit() {
        let len = 15 << 20;
        let index = index(9 * (16 << 20), &[len; 9]);
        index.check().unwrap();
        assert_eq!(index.parts.len(), 3);
        assert_eq!(index.layout()[4], Location { part: 1, offset: 0, len });
        assert_eq!(index.layout()[8], Location { part: 2, offset: 0, len });
    }

    #[test]
    fn an_index_that_contradicts_itself_is_refused() {
        let good = index((16 << 20) + 1000, &[1 << 20, 10]);
        good.check().unwrap();
        let mut short = good.clone();
        short.manifest.piece_hashes.pop();
        assert!(short.check().is_err());
        let mut grown = good.clone();
        grown.pieces[1].len = 1000;
        assert!(grown.check().is_err(), "a stored piece as long as the raw one is not zstd");
        let mut raw = good.clone();
        raw.pieces[1].codec = Codec::Raw;
        assert!(raw.check().is_err());
        let mut parts = good.clone();
        parts.parts[0].len += 1;
        assert!(parts.check().is_err());
        let mut many = good;
        many.manifest.size_bytes = u64::MAX;
        assert!(many.check().is_err());
    }
}
