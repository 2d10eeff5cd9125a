//! What can go wrong, by operation.

use std::{
    io,
    path::{Path, PathBuf},
};

use shoal_pieces::IndexError;
use shoal_proto::{ArtifactId, PieceIndex};

/// Why the store could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process, or another [`crate::Store`] of this one, has the directory open.
    #[error("the store {0} is in use by another process")]
    InUse(PathBuf),
    /// The disk has no room, even with all encoded pieces evicted.
    #[error("no space: {needed} bytes are needed beside the reserve, {free} are free beside it")]
    NoSpace {
        /// The bytes still to be allocated.
        needed: u64,
        /// The bytes that are free above the configured reserve.
        free: u64,
    },
    /// The index is not a sound one.
    #[error("a bad index: {0}")]
    Index(#[from] IndexError),
    /// The artifact has no such piece.
    #[error("artifact {artifact} has no piece {index}")]
    NoSuchPiece {
        /// The artifact.
        artifact: ArtifactId,
        /// The piece asked for.
        index: PieceIndex,
    },
    /// The bytes given for a piece have not its length.
    #[error("piece {index} is {got} bytes long, not {want}")]
    Length {
        /// The piece.
        index: PieceIndex,
        /// The length given, in bytes.
        got: usize,
        /// Its length, in bytes.
        want: usize,
    },
    /// Somebody else wrote the piece meanwhile, and it is not held.
    #[error("piece {0} was taken over, and is not held")]
    TakenOver(PieceIndex),
    /// The artifact cannot be finished yet.
    #[error("{held} of {pieces} pieces are held")]
    Incomplete {
        /// The pieces held.
        held: u32,
        /// The pieces that there are.
        pieces: u32,
    },
    /// The artifact was removed, or opened anew with another piece size, since this handle was made.
    #[error("artifact {0} is no longer open for writing")]
    Closed(ArtifactId),
    /// A local file could not be cut into the store.
    #[error(transparent)]
    Cut(#[from] CutError),
    /// The file system failed.
    #[error("{path}: {source}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Why a file could not be cut.
#[derive(Debug, thiserror::Error)]
pub enum CutError {
    /// Not a regular file.
    #[error("{0} is not a regular file")]
    NotAFile(PathBuf),
    /// More pieces than an artifact may have.
    #[error("{pieces} pieces are too many: use a larger piece size")]
    TooManyPieces {
        /// How many there would be.
        pieces: u64,
    },
    /// The file changed its length, or was written to, while it was cut.
    #[error("{0} was changed while it was cut")]
    Changed(PathBuf),
    /// What was cut does not make an index.
    #[error("a bad index: {0}")]
    Index(#[from] IndexError),
    /// The file system failed.
    #[error("{path}: {source}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Names the file in an [`io::Error`].
pub(crate) trait At<T> {
    fn at(self, path: &Path) -> Result<T, StoreError>;
    fn cutting(self, path: &Path) -> Result<T, CutError>;
}

impl<T> At<T> for io::Result<T> {
    fn at(self, path: &Path) -> Result<T, StoreError> {
        self.map_err(|source| StoreError::Io { path: path.to_owned(), source })
    }

    fn cutting(self, path: &Path) -> Result<T, CutError> {
        self.map_err(|source| CutError::Io { path: path.to_owned(), source })
    }
}
