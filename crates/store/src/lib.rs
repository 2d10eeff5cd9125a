//! Where a machine's artifacts lie, and how a file becomes one.
//!
//! A [`Store`] is a directory. An artifact in it is one raw file, preallocated on a disk, in which each piece is
//! written in place as it arrives; when all are there and synced it is renamed from `partial` to `data`,
//! and can be run where it lies. So an artifact on a machine is always in one of two states, and a
//! file name says in which.
//!
//! ```text
//! DIR/lock                        held while a process has the store open
//! DIR/artifacts/<id>/index        the encoding's index, as it came
//! DIR/artifacts/<id>/partial      the raw bytes, of full length, some of them not there yet
//! DIR/artifacts/<id>/data         the same file when it is whole and synced
//! DIR/ledger/                     sled: which pieces are known to be on the disk
//! DIR/cache/<id>/<piece>          pieces in their encoded form, bounded, the first to go
//! DIR/trash/                      what is being removed
//! ```
//!
//! The **ledger** saves work and is never the truth: it names pieces that were synced in a file that is
//! still the same file. A piece that it does not name is read and hashed again before it counts as held,
//! so losing the ledger costs time, and a torn write is found. The **cache** keeps pieces as they travel, so
//! that passing one on costs no compression; a piece that is not in it is served raw.
//!
//! [`cut()`] makes an artifact for a bucket: it reads a file once, on all cores, hashing and encoding each piece
//! while it is at hand, and writes part objects and an index. [`Store::import`] does the same into the store, for
//! a machine that is to seed a file of its own.
//!
//! Everything here blocks: call it where blocking is allowed. All of it can be called from any thread.

mod artifact;
mod buffers;
mod cache;
mod cut;
mod disk;
mod error;
mod import;
mod ledger;
mod parts;
mod piece_writer;
mod resume;
mod store;

pub use artifact::{Artifact, Progress, Stored};
pub use buffers::{Buffer, Buffers};
pub use error::{CutError, StoreError};
pub use parts::{Cut, CutOptions, INDEX_NAME, cut, part_name};
pub use piece_writer::PieceWriter;
pub use store::{ArtifactSummary, Store, StoreConfig};
