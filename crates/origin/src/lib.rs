//! Buckets: where artifacts rest, one main bucket and one in every region.
//!
//! A bucket is a directory, an S3 or a GCS bucket ([`Bucket::open`]); all of them go through
//! `object_store`, and the code here is the same for each. An encoding of an artifact is a set of
//! write-once objects under one prefix:
//!
//! ```text
//! artifacts/<artifact>/<encoding>/part-00000     whole stored pieces, at most 64 MiB
//! artifacts/<artifact>/<encoding>/part-00001
//! artifacts/<artifact>/<encoding>/index          written last: where it is, the encoding is whole
//! ```
//!
//! # How nothing is lost and nothing wrong is kept
//!
//! - An object appears whole or not at all: large ones by a multipart upload, small ones by one
//!   put, in a directory both by a rename of a synced file. Each part's BLAKE3 is computed on the way
//!   and compared with the index *before* the upload is completed, so a part that is there is right.
//! - Therefore [`Bucket::upload`] and [`Bucket::copy_from`] resume by listing: a part of the right
//!   length is skipped without being read again. What has rotted since is found by
//!   [`Bucket::verify`], and by every reader, who checks each piece.
//! - [`Bucket::put_index`] refuses while a part is missing. It is the last write of either path.
//! - Objects are created only if absent: small ones by the store's own condition (`If-None-Match: *`), and where a
//!   store does not know it, by looking first. Multipart uploads have no such condition in `object_store`: they look
//!   before they begin and once more before they complete. Two writers that still meet replace a part by the same
//!   bytes, because both were checked against the same hash (see [`Bucket::put_part`] for the one exception).
//! - S3 gets a SHA-256 with each object and each piece of a multipart upload; it refuses what differs, and keeps it.
//! - Directories are synced: file contents and every directory entry, before a write returns.
//! - On S3 and GCS an upload that was cut off leaves an unfinished multipart upload behind; a
//!   lifecycle rule of the bucket should end those after a day. A directory is swept of unfinished
//!   files when the index is written.
//!
//! # How memory stays bounded
//!
//! Bytes move in chunks of [`CHUNK_BYTES`]. Every chunk in memory holds a permit of a budget that the
//! whole process shares, one for what is read here ([`CHUNKS_READ_MAX`]) and one for what callers send
//! ([`CHUNKS_SENT_MAX`]), so ten copies at once take no more memory than one. Chunks that are read from
//! files are used again (`pool.rs`), because the allocator would not give them back.
//!
//! # Reading
//!
//! Credentials come from where the SDKs of S3 and GCS look for them, and never into an address, an error or a log.
//! Who holds them can sign URLs for single pieces ([`Bucket::sign_pieces`]), and who holds none reads by those
//! ([`UrlReader`]).
//!
//! [`Bucket::read_pieces`] reads a run of pieces with one ranged GET for each run of neighbours in a
//! part, and gives nothing unless the answer is exactly the range that was asked for. Transient errors
//! are retried with backoff and jitter; what cannot get better (no such object, no permission, a full
//! disk, a wrong hash) is given back at once.

mod bucket;
mod cloud;
mod error;
mod inspect;
mod pool;
mod profile;
mod read;
mod remove;
mod retry;
mod share;
#[cfg(test)]
mod tests;
mod transfer;
mod urls;
mod write;

pub use bucket::{Bucket, Check};
pub use error::OriginError;
pub use inspect::Finding;
pub use read::GET_MAX_BYTES;
pub use share::{set_sharing, source_reads};
pub use transfer::{CopyStats, PARTS_IN_PARALLEL};
pub use urls::UrlReader;
pub use write::{CHUNK_BYTES, CHUNKS_READ_MAX, CHUNKS_SENT_MAX, PutPart, STREAM_IDLE_MAX};
