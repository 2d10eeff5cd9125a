//! The two proofs: the id proves the piece list, the list proves each piece.

use shoal_proto::{
    ArtifactId, PieceIndex,
    manifest::{Inconsistent, Manifest},
};

use crate::hash::{merge, piece_hash};

/// Why a manifest is not to be believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// Its size and its count of pieces contradict each other.
    #[error("the manifest contradicts itself: {0}")]
    Inconsistent(#[from] Inconsistent),
    /// Its piece hashes are those of another artifact.
    #[error("the piece hashes merge to {merged}, not to {artifact}")]
    NotTheArtifact {
        /// The id that the manifest claims.
        artifact: ArtifactId,
        /// What its hashes merge to.
        merged: ArtifactId,
    },
}

/// Why bytes are not the piece that they are said to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PieceError {
    /// The artifact has no such piece.
    #[error("there is no piece {index} of {count}")]
    NoSuchPiece {
        /// The piece asked for.
        index: PieceIndex,
        /// How many pieces the artifact has.
        count: u32,
    },
    /// Of the wrong length.
    #[error("piece {index} is {got} bytes long, not {want}")]
    Length {
        /// The piece.
        index: PieceIndex,
        /// The length met, in bytes.
        got: usize,
        /// The piece's raw length, in bytes.
        want: usize,
    },
    /// Of the right length, but other bytes.
    #[error("piece {index} does not have its hash")]
    Hash {
        /// The piece.
        index: PieceIndex,
    },
}

/// Checks that the manifest agrees with itself and that its hashes merge to its artifact's id.
///
/// # Errors
/// [`ManifestError`] says which it does not.
pub fn verify_manifest(manifest: &Manifest) -> Result<(), ManifestError> {
    manifest.check()?;
    let merged = merge(&manifest.piece_hashes, manifest.piece_size, manifest.size_bytes);
    if merged != manifest.artifact {
        return Err(ManifestError::NotTheArtifact { artifact: manifest.artifact, merged });
    }
    Ok(())
}

/// Checks that `raw` is piece `index` of a manifest that [`verify_manifest`] has passed.
///
/// # Errors
/// [`PieceError`] when there is no such piece, or its length or hash is another.
pub fn verify_piece(manifest: &Manifest, index: PieceIndex, raw: &[u8]) -> Result<(), PieceError> {
    let count = manifest.piece_count();
    let Some(want) = manifest.piece_hashes.get(index.0 as usize) else {
        return Err(PieceError::NoSuchPiece { index, count });
    };
    let want_len = manifest.piece_len(index);
    if raw.len() != want_len {
        return Err(PieceError::Length { index, got: raw.len(), want: want_len });
    }
    if piece_hash(manifest.size_bytes, manifest.piece_size, index, raw) != *want {
        return Err(PieceError::Hash { index });
    }
    Ok(())
}
