//! Which pieces are known to be on the disk: a sled database that may be lost at any time.
//!
//! An entry holds the identity of the file that it speaks of, so that an entry of a file that was replaced
//! means nothing. A database that cannot be read is moved aside and begun anew; one that cannot be written is
//! given up until the store is opened again. Neither is an error: what is not in the ledger is verified.

use std::{
    fs::{self, Metadata},
    os::unix::fs::MetadataExt,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::Mutex,
};

use shoal_proto::{ArtifactId, PieceIndex, manifest::PieceSize};
use sled::{Batch, Db, Mode};

use crate::disk::{self, lock};

/// sled's page cache, in bytes. A 10 GB artifact has 2,385 entries of about 50 bytes.
const CACHE_BYTES: u64 = 1 << 20;

/// sled's unit of allocation in its log, and of its write buffers, in bytes.
const SEGMENT_BYTES: usize = 128 << 10;

/// The piece index under which a whole file is entered: no artifact has so many pieces.
const WHOLE: u32 = u32::MAX;

pub(crate) struct Ledger {
    path: PathBuf,
    db: Mutex<Option<Db>>,
}

/// What an entry speaks of. The modification time is checked for whole files only: nothing writes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FileIdentity {
    inode: u64,
    size_bytes: u64,
    modified_ns: i128,
}

impl FileIdentity {
    pub(crate) fn of(metadata: &Metadata) -> Self {
        Self {
            inode: metadata.ino(),
            size_bytes: metadata.len(),
            modified_ns: i128::from(metadata.mtime()) * 1_000_000_000
                + i128::from(metadata.mtime_nsec()),
        }
    }

    fn piece_value(&self, piece_size: PieceSize) -> Vec<u8> {
        let mut value = vec![u8::from(piece_size)];
        value.extend_from_slice(&self.inode.to_be_bytes());
        value.extend_from_slice(&self.size_bytes.to_be_bytes());
        value
    }

    fn whole_value(&self) -> Vec<u8> {
        let mut value = self.inode.to_be_bytes().to_vec();
        value.extend_from_slice(&self.size_bytes.to_be_bytes());
        value.extend_from_slice(&self.modified_ns.to_be_bytes());
        value
    }
}

fn key(artifact: &ArtifactId, piece: u32) -> [u8; 36] {
    let mut key = [0; 36];
    key[..32].copy_from_slice(&artifact.0);
    key[32..].copy_from_slice(&piece.to_be_bytes());
    key
}

fn open(path: &Path) -> Option<Db> {
    // sled asserts where a damaged log should be an error.
    let opened = catch_unwind(AssertUnwindSafe(|| {
        let db = sled::Config::new()
            .path(path)
            .mode(Mode::LowSpace)
            .cache_capacity(CACHE_BYTES)
            .segment_size(SEGMENT_BYTES)
            .flush_every_ms(None)
            .open()?;
        // Damage that opening does not meet shows here, and not at the first resume.
        db.iter().try_for_each(|entry| entry.map(drop))?;
        Ok::<_, sled::Error>(db)
    }));
    match opened {
        Ok(Ok(db)) => Some(db),
        Ok(Err(error)) => {
            tracing::warn!(path = %path.display(), %error, "the ledger of pieces cannot be read");
            None
        }
        Err(_) => {
            tracing::warn!(path = %path.display(), "the ledger of pieces is damaged");
            None
        }
    }
}

/// Opens the ledger, or moves it aside and begins a new one.
fn open_or_begin(path: &Path) -> Option<Db> {
    if let Some(db) = open(path) {
        return Some(db);
    }
    let aside = path.with_extension("damaged");
    let moved = disk::remove(&aside).and_then(|()| fs::rename(path, &aside));
    if let Err(error) = moved {
        tracing::warn!(path = %path.display(), %error, "the damaged ledger cannot be moved aside");
        return None;
    }
    open(path)
}

impl Ledger {
    /// Opens the ledger at `path`, a new one when there is none or it is damaged. It never fails: without a
    /// ledger, pieces are verified at every start.
    pub(crate) fn open(path: PathBuf) -> Self {
        let db = Mutex::new(open_or_begin(&path));
        Self { path, db }
    }

    /// Works on the database; a failure gives the database up: what it would have said is found by hashing.
    fn with<T>(&self, what: &str, work: impl FnOnce(&Db) -> sled::Result<T>) -> Option<T> {
        let mut db = lock(&self.db);
        let open = db.as_ref()?;
        let done = catch_unwind(AssertUnwindSafe(|| work(open)));
        let reason = match done {
            Ok(Ok(value)) => return Some(value),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "it is damaged".to_owned(),
        };
        tracing::warn!(path = %self.path.display(), what, reason, "the ledger failed and is begun anew");
        *db = None;
        *db = open_or_begin(&self.path);
        None
    }

    /// The pieces known to be on the disk in this very file, cut this way.
    pub(crate) fn pieces(
        &self,
        artifact: &ArtifactId,
        piece_size: PieceSize,
        file: FileIdentity,
    ) -> Vec<u32> {
        let want = file.piece_value(piece_size);
        self.with("read", |db| {
            let mut pieces = Vec::new();
            for entry in db.scan_prefix(artifact.0) {
                let (key, value) = entry?;
                let piece = key.get(32..).and_then(|tail| tail.try_into().ok());
                if let Some(piece) = piece.map(u32::from_be_bytes)
                    && piece != WHOLE
                    && *value == *want
                {
                    pieces.push(piece);
                }
            }
            Ok(pieces)
        })
        .unwrap_or_default()
    }

    /// Enters pieces that are on the disk: call it after the sync, never before.
    pub(crate) fn record(
        &self,
        artifact: &ArtifactId,
        piece_size: PieceSize,
        file: FileIdentity,
        pieces: &[u32],
    ) {
        let value = file.piece_value(piece_size);
        self.with("record", |db| {
            let mut batch = Batch::default();
            for &piece in pieces {
                batch.insert(&key(artifact, piece)[..], value.clone());
            }
            db.apply_batch(batch)?;
            db.flush().map(drop)
        });
    }

    /// Takes a piece out that turned out not to be what it was, and with it the file's being whole.
    pub(crate) fn strike(&self, artifact: &ArtifactId, piece: PieceIndex) {
        self.with("strike", |db| {
            let mut batch = Batch::default();
            batch.remove(&key(artifact, piece.0)[..]);
            batch.remove(&key(artifact, WHOLE)[..]);
            db.apply_batch(batch)?;
            db.flush().map(drop)
        });
    }

    /// Whether this very file, unchanged since, was entered as whole.
    pub(crate) fn is_whole(&self, artifact: &ArtifactId, file: FileIdentity) -> bool {
        let entry = self.with("read", |db| db.get(key(artifact, WHOLE))).flatten();
        entry.is_some_and(|value| *value == *file.whole_value())
    }

    /// Enters a file as whole, in place of its pieces.
    pub(crate) fn record_whole(&self, artifact: &ArtifactId, file: FileIdentity) {
        self.with("record", |db| {
            let mut batch = removals(db, artifact)?;
            batch.insert(&key(artifact, WHOLE)[..], file.whole_value());
            db.apply_batch(batch)?;
            db.flush().map(drop)
        });
    }

    /// Takes out everything about the artifact, durably.
    pub(crate) fn forget(&self, artifact: &ArtifactId) {
        self.with("forget", |db| {
            db.apply_batch(removals(db, artifact)?)?;
            db.flush().map(drop)
        });
    }
}

fn removals(db: &Db, artifact: &ArtifactId) -> sled::Result<Batch> {
    let mut batch = Batch::default();
    for entry in db.scan_prefix(artifact.0) {
        batch.remove(entry?.0);
    }
    Ok(batch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ledger_that_fails_in_use_is_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path().join("ledger"));
        let id = ArtifactId([7; 32]);
        let file = FileIdentity::of(&fs::metadata(dir.path()).unwrap());
        let recorded = || {
            ledger.record(&id, PieceSize::MIN, file, &[1, 2]);
            ledger.pieces(&id, PieceSize::MIN, file)
        };
        assert_eq!(recorded(), [1, 2]);
        let failed = ledger.with("test", |_| Err::<(), _>(sled::Error::Unsupported("test".into())));
        assert!(failed.is_none());
        assert_eq!(recorded(), [1, 2]);
        let panicked: Option<()> = ledger.with("test", |_| panic!("as sled does"));
        assert!(panicked.is_none());
        assert_eq!(recorded(), [1, 2]);
        assert_eq!(ledger.pieces(&id, PieceSize::MAX, file), Vec::<u32>::new());
    }

    #[test]
    fn a_whole_file_takes_the_place_of_its_pieces() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path().join("ledger"));
        let (id, other) = (ArtifactId([7; 32]), ArtifactId([8; 32]));
        let path = dir.path().join("file");
        fs::write(&path, "whole").unwrap();
        let file = FileIdentity::of(&fs::metadata(&path).unwrap());
        ledger.record(&id, PieceSize::MIN, file, &[1, 2]);
        ledger.record(&other, PieceSize::MIN, file, &[3]);
        assert!(!ledger.is_whole(&id, file));
        ledger.record_whole(&id, file);
        assert!(ledger.is_whole(&id, file) && !ledger.is_whole(&other, file));
        assert_eq!(ledger.pieces(&id, PieceSize::MIN, file), Vec::<u32>::new());
        fs::write(&path, "other").unwrap();
        let same_length = fs::File::open(&path).unwrap();
        same_length.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        let changed = FileIdentity::of(&same_length.metadata().unwrap());
        assert!(!ledger.is_whole(&id, changed));
        ledger.forget(&id);
        assert!(!ledger.is_whole(&id, file));
        assert_eq!(ledger.pieces(&other, PieceSize::MIN, file), [3]);
    }
}
