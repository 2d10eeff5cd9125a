//! A piece that is written where it belongs while it comes, and is held only once it has its hash.
//!
//! Nobody reads it meanwhile, and a crash leaves bytes there that nobody believes. One at a time writes to a piece like
//! that; whoever brings the same piece whole and verified takes the place over, and the first one's bytes are refused from
//! then on.

use std::{
    collections::HashMap,
    fmt,
    os::unix::fs::FileExt,
    sync::{Arc, PoisonError},
};

use shoal_pieces::PieceHasher;
use shoal_proto::PieceIndex;

use crate::{
    artifact::Body,
    disk::lock,
    error::{At, StoreError},
};

/// Who is at which piece of a file.
#[derive(Debug, Default)]
pub(crate) struct Writers {
    taken: HashMap<u32, u64>,
    last: u64,
}

impl Writers {
    /// Whoever is at a piece no longer is.
    pub(crate) fn revoke(&mut self, index: PieceIndex) {
        self.taken.remove(&index.0);
    }

    fn take(&mut self, index: PieceIndex) -> Option<u64> {
        if self.taken.contains_key(&index.0) {
            return None;
        }
        self.last += 1;
        self.taken.insert(index.0, self.last);
        Some(self.last)
    }

    fn is_at(&self, index: PieceIndex, ticket: u64) -> bool {
        self.taken.get(&index.0) == Some(&ticket)
    }
}

/// The right to write one piece as it comes. Dropping it gives the piece up.
pub struct PieceWriter {
    body: Arc<Body>,
    index: PieceIndex,
    ticket: u64,
    hasher: Box<PieceHasher>,
    written: usize,
}

impl PieceWriter {
    /// None when the piece is held, or somebody else is at it.
    pub(crate) fn take(body: &Arc<Body>, index: PieceIndex) -> Option<Self> {
        let ticket = {
            let mut writers = lock(&body.writing);
            if body.holds(index) {
                return None;
            }
            writers.take(index)?
        };
        let manifest = &body.manifest;
        let hasher = Box::new(PieceHasher::new(manifest.size_bytes, manifest.piece_size, index));
        Some(Self { body: body.clone(), index, ticket, hasher, written: 0 })
    }

    /// Bytes of the piece that have not come yet.
    #[must_use]
    pub fn left(&self) -> usize {
        self.body.manifest.piece_len(self.index) - self.written
    }

    /// Hashes the next bytes and writes them. It blocks, and is best called with few enough bytes to stay in the
    /// processor's cache.
    ///
    /// # Errors
    /// [`StoreError`] when there are more than the piece has, the artifact was removed, or the disk fails.
    pub fn write(&mut self, raw: &[u8]) -> Result<(), StoreError> {
        if raw.len() > self.left() {
            let (got, want) = (self.written + raw.len(), self.written + self.left());
            return Err(StoreError::Length { index: self.index, got, want });
        }
        self.hasher.update(raw);
        let body = &self.body;
        let at = body.manifest.piece_range(self.index).start + self.written as u64;
        let writer = body.writer.read().unwrap_or_else(PoisonError::into_inner);
        let file = writer.as_ref().ok_or_else(|| StoreError::Closed(*body.id()))?;
        let writers = lock(&body.writing);
        if writers.is_at(self.index, self.ticket) {
            file.write_all_at(raw, at).at(&body.path())?;
        }
        drop(writers);
        self.written += raw.len();
        Ok(())
    }

    /// Ends it: true when all bytes came and have the piece's hash, and it is held now. Nothing is synced:
    /// [`crate::Artifact::is_sync_due`] says when to.
    ///
    /// # Errors
    /// [`StoreError::TakenOver`] when whoever took the piece over could not write it; then it is not held.
    pub fn end(self) -> Result<bool, StoreError> {
        let body = &self.body;
        let want = body.manifest.piece_hashes.get(self.index.0 as usize);
        if self.left() > 0 || want != Some(&self.hasher.finish()) {
            return Ok(false);
        }
        let writers = lock(&body.writing);
        if writers.is_at(self.index, self.ticket) {
            body.hold(self.index);
        } else if !body.holds(self.index) {
            return Err(StoreError::TakenOver(self.index));
        }
        drop(writers);
        Ok(true)
    }
}

impl Drop for PieceWriter {
    fn drop(&mut self) {
        let mut writers = lock(&self.body.writing);
        if writers.is_at(self.index, self.ticket) {
            writers.revoke(self.index);
        }
    }
}

impl fmt::Debug for PieceWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PieceWriter({}, {} left)", self.index, self.left())
    }
}
