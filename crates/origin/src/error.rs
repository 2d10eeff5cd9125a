//! What can go wrong with a bucket.

use std::{io, path::PathBuf};

/// Why an operation on a bucket failed.
#[derive(Debug, thiserror::Error)]
pub enum OriginError {
    /// Not the address of a bucket.
    #[error(
        "'{url}' is not a bucket: {reason} (give a directory, file:///dir, s3://bucket/prefix or gs://bucket/prefix)"
    )]
    Address {
        /// What was given.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No such object.
    #[error("{key} is not in the bucket {bucket}")]
    NotFound {
        /// The bucket.
        bucket: String,
        /// The object's key.
        key: String,
    },
    /// A part's bytes are not what the index says; nothing of it was written.
    #[error("part {part} is not what its index says: {reason}")]
    Mismatch {
        /// The part's number.
        part: u32,
        /// Length or hash, expected and met.
        reason: String,
    },
    /// The index is not this encoding's, or contradicts itself.
    #[error("index of encoding {encoding}: {reason}")]
    Index {
        /// The encoding.
        encoding: shoal_proto::EncodingId,
        /// What is wrong with it.
        reason: String,
    },
    /// The index may not be written yet: parts are missing, or are of the wrong length.
    #[error("{} parts are missing, the first is {:?}", missing.len(), missing.first())]
    Incomplete {
        /// Their numbers, ascending.
        missing: Vec<u32>,
    },
    /// The encoding is whole already: a part of unknown hash cannot be written over it.
    #[error("{key} belongs to an encoding that is already whole")]
    Sealed {
        /// The part's key.
        key: String,
    },
    /// Pieces that the artifact does not have.
    #[error("pieces {first}..+{count} of an artifact of {pieces}")]
    NoSuchPieces {
        /// The first asked for.
        first: u32,
        /// How many.
        count: u32,
        /// How many there are.
        pieces: usize,
    },
    /// The store answered with other bytes than the range that was asked for.
    #[error("{key}: asked for bytes {asked:?}, got {got}")]
    WrongRange {
        /// The object's key.
        key: String,
        /// The range in bytes.
        asked: std::ops::Range<u64>,
        /// What came instead.
        got: String,
    },
    /// An object that is longer than its kind may be.
    #[error("{key} is {len} bytes, more than {limit}")]
    TooLong {
        /// The object's key.
        key: String,
        /// Its length in bytes.
        len: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// The sender of a part gave nothing for too long.
    #[error("the sender of {key} gave nothing for {seconds} s")]
    Stalled {
        /// The part's key.
        key: String,
        /// How long, in seconds.
        seconds: u64,
    },
    /// The caller's stream of a part's bytes failed.
    #[error("the bytes of {key} could not be read: {source}")]
    Stream {
        /// The part's key.
        key: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A local file could not be read.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] object_store::Error),
}

impl OriginError {
    /// Whether the same request may succeed later without anything being changed by hand.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Store(object_store::Error::Generic { store, source }) => {
                if *store != "LocalFileSystem" {
                    return true;
                }
                // A directory that fails does so at once and for good, unless it is on a network.
                let kind = io_kind(source.as_ref());
                use io::ErrorKind::{Interrupted, StaleNetworkFileHandle, TimedOut, WouldBlock};
                matches!(kind, Some(Interrupted | TimedOut | WouldBlock | StaleNetworkFileHandle))
            }
            Self::WrongRange { .. } => true,
            _ => false,
        }
    }
}

/// The kind of the I/O error at the bottom of a chain, when there is one.
fn io_kind(error: &(dyn std::error::Error + 'static)) -> Option<io::ErrorKind> {
    let mut at = Some(error);
    while let Some(error) = at {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return Some(io.kind());
        }
        at = error.source();
    }
    None
}
