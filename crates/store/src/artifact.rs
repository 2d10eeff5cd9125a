//! One artifact on the disk, and the handles on it.

use std::{
    fs::{self, File, Permissions},
    ops::Range,
    os::unix::fs::{FileExt, PermissionsExt},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError, RwLock},
};

use bytes::Bytes;
use shoal_pieces::{Decoder, verify_piece};
use shoal_proto::{
    ArtifactId, Bitmap, EncodingId, PieceIndex,
    manifest::{Codec, EncodingIndex, Manifest},
};

use crate::{
    buffers::{Buffer, Buffers},
    cache::Cached,
    disk::{self, lock},
    error::{At, StoreError},
    ledger::FileIdentity,
    piece_writer::{PieceWriter, Writers},
    resume,
    store::Shared,
};

/// The raw file while pieces are missing, and when it is whole.
pub(crate) const PARTIAL_NAME: &str = "partial";
pub(crate) const DATA_NAME: &str = "data";

/// So many bytes are written between two syncs: a crash costs at most hashing as many again, and a sync is
/// rare enough to be cheap.
const SYNC_EVERY_BYTES: u64 = 64 << 20;

/// An artifact's file mode keeps these bits: nothing fetched is ever set-user-id.
const MODE_BITS: u32 = 0o777;

/// The owner must be able to read what he serves.
const MODE_ALWAYS: u32 = 0o400;

/// How far an artifact is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// The pieces held.
    pub pieces_held: u32,
    /// The pieces that there are.
    pub pieces: u32,
    /// The raw bytes held.
    pub bytes_held: u64,
    /// The artifact's length, in bytes.
    pub size_bytes: u64,
}

/// A handle on one artifact in a [`crate::Store`]. Any number of threads may read and write pieces through
/// it at once; all its calls block.
#[derive(Debug)]
pub struct Artifact {
    pub(crate) body: Arc<Body>,
    index: EncodingIndex,
    index_bytes: Bytes,
    encoding: EncodingId,
}

/// A held piece in the form in which it is sent, read part by part.
#[derive(Debug)]
pub struct Stored {
    body: Arc<Body>,
    codec: Codec,
    /// What is left to read: of the file, or of the encoded piece.
    range: Range<u64>,
    encoded: Option<Cached>,
}

impl Stored {
    /// How it is encoded.
    #[must_use]
    pub fn codec(&self) -> Codec {
        self.codec
    }

    /// Bytes that are left to read.
    #[must_use]
    pub fn left(&self) -> usize {
        (self.range.end - self.range.start) as usize
    }

    /// The next bytes, at most so many, read into `buffer`; none are left when it is empty.
    ///
    /// # Errors
    /// [`StoreError`] when the disk fails.
    pub fn read(&mut self, most: usize, mut buffer: Buffer) -> Result<Bytes, StoreError> {
        let (at, len) = (self.range.start, self.left().min(most));
        self.range.start += len as u64;
        buffer.resize(len, 0);
        match &self.encoded {
            Some(Cached { file, path, .. }) => disk::read_at(file, &mut buffer, at).at(path)?,
            None => disk::read_at(&self.body.reader, &mut buffer, at).at(&self.body.path())?,
        }
        Ok(Bytes::from_owner(buffer))
    }
}

/// What all handles on one file share.
pub(crate) struct Body {
    pub(crate) shared: Arc<Shared>,
    pub(crate) dir: PathBuf,
    pub(crate) manifest: Manifest,
    pub(crate) identity: FileIdentity,
    pub(crate) reader: File,
    /// Gone once the file is whole: a program cannot be started while somebody may write to it.
    pub(crate) writer: RwLock<Option<File>>,
    pub(crate) state: Mutex<State>,
    /// Held while anything is written: the kernel lets one at a time write to a file, and has the others spin. Taken before
    /// `state`.
    pub(crate) writing: Mutex<Writers>,
    /// Held while a sync is under way; taken before `writer` and `state`.
    pub(crate) syncing: Mutex<()>,
}

pub(crate) struct State {
    pub(crate) have: Bitmap,
    /// Held, but not known to be on the disk.
    pub(crate) unsynced: Vec<u32>,
    pub(crate) unsynced_bytes: u64,
    pub(crate) complete: bool,
}

impl State {
    pub(crate) fn new(have: Bitmap, complete: bool) -> Self {
        Self { have, unsynced: Vec::new(), unsynced_bytes: 0, complete }
    }
}

impl std::fmt::Debug for Body {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Body").field("dir", &self.dir).finish_non_exhaustive()
    }
}

impl Body {
    pub(crate) fn id(&self) -> &ArtifactId {
        &self.manifest.artifact
    }

    /// Ends all writing.
    pub(crate) fn retire(&self) {
        let _syncing = lock(&self.syncing);
        *self.writer.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(crate) fn path(&self) -> PathBuf {
        let complete = lock(&self.state).complete;
        self.dir.join(if complete { DATA_NAME } else { PARTIAL_NAME })
    }

    pub(crate) fn holds(&self, index: PieceIndex) -> bool {
        lock(&self.state).have.contains(index.0)
    }

    fn known(&self, index: PieceIndex) -> Result<(), StoreError> {
        if index.0 < self.manifest.piece_count() {
            Ok(())
        } else {
            Err(StoreError::NoSuchPiece { artifact: *self.id(), index })
        }
    }

    fn read(&self, index: PieceIndex, out: &mut [u8]) -> Result<(), StoreError> {
        disk::read_at(&self.reader, out, self.manifest.piece_range(index).start).at(&self.path())
    }

    /// Writes a piece in place; true when it was not held yet.
    fn write(&self, index: PieceIndex, raw: &[u8]) -> Result<bool, StoreError> {
        if self.holds(index) {
            return Ok(false);
        }
        let writer = self.writer.read().unwrap_or_else(PoisonError::into_inner);
        let file = writer.as_ref().ok_or(StoreError::Closed(*self.id()))?;
        let mut writers = lock(&self.writing);
        // Nothing unverified comes over it from now on.
        writers.revoke(index);
        file.write_all_at(raw, self.manifest.piece_range(index).start).at(&self.path())?;
        Ok(self.hold(index))
    }

    /// Notes that a piece is written; true when it was not held yet. Call it with `writing` held.
    pub(crate) fn hold(&self, index: PieceIndex) -> bool {
        let mut state = lock(&self.state);
        // Two may write the same piece: the same verified bytes, and one of them is the first.
        let new = state.have.insert(index.0);
        if new {
            state.unsynced.push(index.0);
            state.unsynced_bytes += self.manifest.piece_len(index) as u64;
        }
        new
    }

    fn is_sync_due(&self) -> bool {
        lock(&self.state).unsynced_bytes >= SYNC_EVERY_BYTES
    }

    /// Syncs if enough was written since the last time.
    pub(crate) fn sync_at_times(&self) -> Result<(), StoreError> {
        if self.is_sync_due()
            // Somebody else is at it: what is written meanwhile goes with the next one.
            && let Ok(_syncing) = self.syncing.try_lock()
        {
            self.sync()?;
        }
        Ok(())
    }

    /// Syncs what is not synced; call it with `syncing` held. After a failed sync nobody knows what is on the
    /// disk, so those pieces are no longer held.
    fn sync(&self) -> Result<(), StoreError> {
        let pieces = {
            let mut state = lock(&self.state);
            state.unsynced_bytes = 0;
            std::mem::take(&mut state.unsynced)
        };
        if pieces.is_empty() {
            return Ok(());
        }
        let writer = self.writer.read().unwrap_or_else(PoisonError::into_inner);
        let synced = match writer.as_ref() {
            Some(file) => file.sync_data().at(&self.path()),
            None => Err(StoreError::Closed(*self.id())),
        };
        drop(writer);
        match synced {
            Ok(()) => {
                let size = self.manifest.piece_size;
                self.shared.ledger.record(self.id(), size, self.identity, &pieces);
                Ok(())
            }
            Err(error) => {
                let mut state = lock(&self.state);
                for piece in pieces {
                    state.have.remove(piece);
                }
                Err(error)
            }
        }
    }

    /// Makes a file with all pieces the whole one.
    fn finish(&self, mode: u32) -> Result<PathBuf, StoreError> {
        let _syncing = lock(&self.syncing);
        let permissions = Permissions::from_mode((mode & MODE_BITS) | MODE_ALWAYS);
        let data = self.dir.join(DATA_NAME);
        if lock(&self.state).complete {
            let now = self.reader.metadata().at(&data)?.permissions().mode() & MODE_BITS;
            if now != permissions.mode() {
                self.reader.set_permissions(permissions).at(&data)?;
                self.reader.sync_all().at(&data)?;
            }
            return Ok(data);
        }
        let progress = self.progress();
        if progress.pieces_held < progress.pieces {
            let Progress { pieces_held: held, pieces, .. } = progress;
            return Err(StoreError::Incomplete { held, pieces });
        }
        self.sync()?;
        let mut writer = self.writer.write().unwrap_or_else(PoisonError::into_inner);
        let file = writer.as_ref().ok_or(StoreError::Closed(*self.id()))?;
        let partial = self.dir.join(PARTIAL_NAME);
        file.set_permissions(permissions).at(&partial)?;
        file.sync_all().at(&partial)?;
        fs::rename(&partial, &data).at(&data)?;
        disk::sync_dir(&self.dir).at(&self.dir)?;
        *writer = None;
        drop(writer);
        lock(&self.state).complete = true;
        let metadata = self.reader.metadata().at(&data)?;
        self.shared.ledger.record_whole(self.id(), FileIdentity::of(&metadata));
        Ok(data)
    }

    fn progress(&self) -> Progress {
        let state = lock(&self.state);
        let (pieces, size_bytes) = (self.manifest.piece_count(), self.manifest.size_bytes);
        let held = state.have.count();
        let last = PieceIndex(pieces.saturating_sub(1));
        // All pieces are of one length but the last.
        let mut bytes_held = u64::from(held) * self.manifest.piece_size.bytes();
        if state.have.contains(last.0) {
            bytes_held -= self.manifest.piece_size.bytes() - self.manifest.piece_len(last) as u64;
        }
        Progress { pieces_held: held, pieces, bytes_held, size_bytes }
    }
}

impl Artifact {
    pub(crate) fn new(
        body: Arc<Body>,
        index: EncodingIndex,
        index_bytes: Bytes,
        encoding: EncodingId,
    ) -> Self {
        Self { body, index, index_bytes, encoding }
    }

    /// Its pieces.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.index.manifest
    }

    /// The index of the encoding that it was opened with.
    #[must_use]
    pub fn index(&self) -> &EncodingIndex {
        &self.index
    }

    /// That index as it is stored and sent.
    #[must_use]
    pub fn index_bytes(&self) -> Bytes {
        self.index_bytes.clone()
    }

    /// The hash of [`Artifact::index_bytes`].
    #[must_use]
    pub fn encoding(&self) -> EncodingId {
        self.encoding
    }

    /// The pieces held now.
    #[must_use]
    pub fn have(&self) -> Bitmap {
        lock(&self.body.state).have.clone()
    }

    /// Whether it was finished: whole, synced and under its final name.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        lock(&self.body.state).complete
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.body.progress()
    }

    /// The raw file. Its name changes when it is finished.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.body.path()
    }

    /// Writes piece `index` in place. The caller has verified `raw`; `stored`, when there is one, is the form
    /// in which it came, and goes to the bounded cache. A piece that is held already is left as it is. Nothing is
    /// synced: [`Artifact::is_sync_due`] says when to.
    ///
    /// # Errors
    /// [`StoreError`] when there is no such piece, its length is another, the artifact was removed, or the disk
    /// fails; then the piece is not held.
    pub fn write(
        &self,
        index: PieceIndex,
        raw: &[u8],
        stored: Option<(Codec, &[u8])>,
    ) -> Result<(), StoreError> {
        let body = &self.body;
        body.known(index)?;
        let want = body.manifest.piece_len(index);
        if raw.len() != want {
            return Err(StoreError::Length { index, got: raw.len(), want });
        }
        if !body.write(index, raw)? {
            return Ok(());
        }
        if let Some((Codec::Zstd, stored)) = stored
            && stored.len() < raw.len()
        {
            body.shared.cache.put(body.id(), index, stored);
        }
        Ok(())
    }

    /// Begins to write piece `index` as it comes; none when it is held, or somebody else is at it: then it is to be brought
    /// whole, by [`Artifact::write`].
    ///
    /// # Errors
    /// [`StoreError`] when there is no such piece.
    pub fn begin(&self, index: PieceIndex) -> Result<Option<PieceWriter>, StoreError> {
        self.body.known(index)?;
        Ok(PieceWriter::take(&self.body, index))
    }

    /// Syncs all pieces written so far and enters them in the ledger, so that a restart need not hash them.
    ///
    /// # Errors
    /// [`StoreError`] when the disk fails.
    pub fn sync(&self) -> Result<(), StoreError> {
        let _syncing = lock(&self.body.syncing);
        self.body.sync()
    }

    /// Whether so much was written since the last sync that the next one is due: then call [`Artifact::sync_at_times`].
    #[must_use]
    pub fn is_sync_due(&self) -> bool {
        self.body.is_sync_due()
    }

    /// Syncs if that is due and nobody else is at it.
    ///
    /// # Errors
    /// As for [`Artifact::sync`]; what was not synced is no longer held then.
    pub fn sync_at_times(&self) -> Result<(), StoreError> {
        self.body.sync_at_times()
    }

    /// Piece `index` in the form in which to send it: encoded when the cache has it, else raw; none when it
    /// is not held.
    ///
    /// # Errors
    /// [`StoreError`] when there is no such piece.
    pub fn stored(&self, index: PieceIndex) -> Result<Option<Stored>, StoreError> {
        let body = &self.body;
        body.known(index)?;
        if !body.holds(index) {
            return Ok(None);
        }
        let stored = |codec, range, encoded| Stored { body: body.clone(), codec, range, encoded };
        if let Some(cached) = body.shared.cache.get(body.id(), index) {
            if cached.proven || self.prove(index, &cached) {
                return Ok(Some(stored(Codec::Zstd, 0..cached.len, Some(cached))));
            }
            body.shared.cache.discard(body.id(), index);
        }
        Ok(Some(stored(Codec::Raw, body.manifest.piece_range(index), None)))
    }

    /// Where the store's piece buffers lie between two uses.
    #[must_use]
    pub fn buffers(&self) -> &Buffers {
        &self.body.shared.buffers
    }

    /// Verifies an encoded piece that an earlier process left.
    fn prove(&self, index: PieceIndex, cached: &Cached) -> bool {
        let manifest = &self.body.manifest;
        let (mut stored, mut raw) = (vec![0; cached.len as usize], Vec::new());
        let sound = disk::read_at(&cached.file, &mut stored, 0).is_ok()
            && Decoder::new()
                .decode(Codec::Zstd, &stored, manifest.piece_len(index), &mut raw)
                .is_ok_and(|()| verify_piece(manifest, index, &raw).is_ok());
        if sound {
            self.body.shared.cache.prove(self.body.id(), index);
        }
        sound
    }

    /// Reads the raw bytes of piece `index` into `out`, replacing what it held; false when the piece is
    /// not held, with `out` empty.
    ///
    /// # Errors
    /// [`StoreError`] when there is no such piece or the disk fails.
    pub fn read_raw(&self, index: PieceIndex, out: &mut Vec<u8>) -> Result<bool, StoreError> {
        self.body.known(index)?;
        if !self.body.holds(index) {
            out.clear();
            return Ok(false);
        }
        out.resize(self.body.manifest.piece_len(index), 0);
        self.body.read(index, out)?;
        Ok(true)
    }

    /// Hashes piece `index` again; false when the disk no longer has what was written. Such a piece is no
    /// longer held; what is left of the artifact is verified when it is next opened.
    ///
    /// # Errors
    /// [`StoreError`] when there is no such piece.
    pub fn recheck(&self, index: PieceIndex) -> Result<bool, StoreError> {
        let body = &self.body;
        body.known(index)?;
        if !body.holds(index) {
            return Ok(false);
        }
        if resume::holds(&body.reader, &body.manifest, index, &mut Vec::new()) {
            return Ok(true);
        }
        let mut state = lock(&body.state);
        state.have.remove(index.0);
        state.unsynced.retain(|&piece| piece != index.0);
        drop(state);
        body.shared.ledger.strike(body.id(), index);
        body.shared.cache.discard(body.id(), index);
        Ok(false)
    }

    /// Makes the artifact whole: syncs the file, gives it `mode` (permission bits only, and always readable by
    /// its owner), renames it to its final name and syncs the directory. From here on nobody has it open for
    /// writing, so it can be run. Doing it again changes at most the mode.
    ///
    /// # Errors
    /// [`StoreError::Incomplete`] when pieces are missing; else when the disk fails, and then it can be tried
    /// again.
    pub fn finish(&self, mode: u32) -> Result<PathBuf, StoreError> {
        self.body.finish(mode)
    }
}
