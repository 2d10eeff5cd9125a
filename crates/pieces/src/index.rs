//! An encoding's index: sealed by whoever cut the artifact, opened by everybody else.

use shoal_proto::{
    ArtifactId, EncodingId,
    codec::{self, CodecError},
    manifest::{EncodingIndex, INDEX_MAX_BYTES, Inconsistent},
};

use crate::verify::{ManifestError, verify_manifest};

/// Why bytes are not the index that they are said to be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IndexError {
    /// Its hash is another: damaged, or of another encoding.
    #[error("these bytes are encoding {got}, not {want}")]
    NotTheEncoding {
        /// The hash of the bytes.
        got: EncodingId,
        /// The encoding asked for.
        want: EncodingId,
    },
    /// It has its hash but is not an index, or is longer than one may be.
    #[error("not an index: {0}")]
    Codec(#[from] CodecError),
    /// It is an index whose pieces and parts contradict each other.
    #[error("the index contradicts itself: {0}")]
    Inconsistent(#[from] Inconsistent),
    /// Its manifest is not that of any artifact.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// It is sound, and of another artifact.
    #[error("the index is of artifact {got}, not {want}")]
    OtherArtifact {
        /// The artifact that it is of.
        got: ArtifactId,
        /// The artifact asked for.
        want: ArtifactId,
    },
}

/// Reads an index from anywhere and proves all of it that can be proved: the bytes have the encoding's
/// hash, the parts hold the pieces, and the piece hashes merge to the artifact.
///
/// # Errors
/// [`IndexError`] says what does not hold.
pub fn open_index(
    bytes: &[u8],
    artifact: &ArtifactId,
    encoding: &EncodingId,
) -> Result<EncodingIndex, IndexError> {
    if bytes.len() > INDEX_MAX_BYTES {
        return Err(CodecError::TooLong { len: bytes.len(), limit: INDEX_MAX_BYTES }.into());
    }
    let got = EncodingId(*blake3::hash(bytes).as_bytes());
    if got != *encoding {
        return Err(IndexError::NotTheEncoding { got, want: *encoding });
    }
    let index: EncodingIndex = codec::decode(bytes, INDEX_MAX_BYTES)?;
    index.check()?;
    if index.manifest.artifact != *artifact {
        return Err(IndexError::OtherArtifact { got: index.manifest.artifact, want: *artifact });
    }
    verify_manifest(&index.manifest)?;
    Ok(index)
}

/// Checks an index, writes it as the object that it is stored as, and names it.
///
/// # Errors
/// [`IndexError`] when the index contradicts itself, is of no artifact, or is too long.
pub fn seal_index(index: &EncodingIndex) -> Result<(Vec<u8>, EncodingId), IndexError> {
    index.check()?;
    verify_manifest(&index.manifest)?;
    let bytes = codec::encode(index, INDEX_MAX_BYTES)?;
    let encoding = EncodingId(*blake3::hash(&bytes).as_bytes());
    Ok((bytes, encoding))
}
