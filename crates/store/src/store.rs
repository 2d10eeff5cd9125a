//! The directory and what is in it.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions, TryLockError},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, RwLock, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use shoal_pieces::{open_index, seal_index};
use shoal_proto::{
    ArtifactId, Bitmap, EncodingId,
    manifest::{EncodingIndex, INDEX_MAX_BYTES, Manifest},
};

use crate::{
    artifact::{Artifact, Body, DATA_NAME, PARTIAL_NAME, State},
    buffers::Buffers,
    cache::Cache,
    disk::{self, lock},
    error::{At, StoreError},
    ledger::{FileIdentity, Ledger},
    parts::INDEX_NAME,
    resume,
};

/// The map of open artifacts is split in so many by the id's first byte, so that one that is being verified
/// holds up few others.
const STRIPES: usize = 64;

/// How a store shares the disk with others.
#[derive(Debug, Clone, Copy)]
pub struct StoreConfig {
    /// The most that encoded pieces take, in bytes.
    pub encoded_cache_bytes: u64,
    /// So much of the file system is left free, in bytes: no artifact is begun and no piece cached below it.
    pub reserve_free_bytes: u64,
}

impl Default for StoreConfig {
    /// 4 GiB of encoded pieces, an artifact of 10 GB as it travels; 1 GiB left free.
    fn default() -> Self {
        Self { encoded_cache_bytes: 4 << 30, reserve_free_bytes: 1 << 30 }
    }
}

/// What [`Store::list`] says of an artifact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArtifactSummary {
    /// The artifact.
    pub artifact: ArtifactId,
    /// Its length in bytes; all of it is set aside on the disk from the start.
    pub size_bytes: u64,
    /// Whether it was finished.
    pub complete: bool,
    /// When it was last opened.
    pub last_used: SystemTime,
}

/// What the store and its artifacts share.
pub(crate) struct Shared {
    config: StoreConfig,
    artifacts: PathBuf,
    staging: PathBuf,
    trash: PathBuf,
    pub(crate) ledger: Ledger,
    pub(crate) cache: Cache,
    pub(crate) buffers: Buffers,
    /// The artifacts that may have bytes still to be allocated; held while space is taken.
    space: Mutex<Vec<Weak<Body>>>,
    /// Numbers what is staged and removed.
    counter: AtomicU64,
    /// Locked as long as the file is open.
    _lock: File,
}

/// A directory of artifacts, one process's at a time. Cheap to clone; all its calls block.
#[derive(Clone)]
pub struct Store {
    pub(crate) shared: Arc<Shared>,
    stripes: Arc<[Mutex<Stripe>; STRIPES]>,
}

pub(crate) type Stripe = HashMap<ArtifactId, Arc<Artifact>>;

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("artifacts", &self.shared.artifacts).finish_non_exhaustive()
    }
}

impl Shared {
    pub(crate) fn dir_of(&self, artifact: &ArtifactId) -> PathBuf {
        self.artifacts.join(artifact.to_string())
    }

    pub(crate) fn artifacts_dir(&self) -> &Path {
        &self.artifacts
    }

    fn number(&self) -> u64 {
        self.counter.fetch_add(1, Ordering::Relaxed)
    }

    /// A new empty directory that is removed at the next start, and a number that is nobody else's.
    pub(crate) fn stage(&self) -> Result<(PathBuf, u64), StoreError> {
        let number = self.number();
        let dir = self.staging.join(number.to_string());
        fs::create_dir(&dir).at(&dir)?;
        Ok((dir, number))
    }

    /// Removes a directory at once for whoever looks for it; what is left after a crash goes at the next start.
    fn discard(&self, dir: &Path) -> Result<(), StoreError> {
        let trash = self.trash.join(self.number().to_string());
        match fs::rename(dir, &trash) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            renamed => renamed.at(dir)?,
        }
        disk::sync_dir(&self.artifacts).at(&self.artifacts)?;
        disk::remove(&trash).at(&trash)
    }

    /// Sets `len` bytes aside for `file`, evicting encoded pieces where that helps.
    pub(crate) fn preallocate(&self, file: &File, len: u64, path: &Path) -> Result<(), StoreError> {
        let mut bodies = lock(&self.space);
        bodies.retain(|body| body.strong_count() > 0);
        // Where the file system sets nothing aside, the promises made to others are counted here.
        let promised: u64 = bodies
            .iter()
            .filter_map(Weak::upgrade)
            .filter(|body| !lock(&body.state).complete)
            .map(|body| disk::unallocated_bytes(&body.reader).unwrap_or(0))
            .sum();
        let longer = len.saturating_sub(file.metadata().at(path)?.len());
        let needed = longer + disk::unallocated_bytes(file).at(path)?;
        let kept = self.config.reserve_free_bytes.saturating_add(promised);
        let free = || disk::free_bytes(path).map(|free| free.saturating_sub(kept)).at(path);
        let mut left = free()?;
        if left < needed {
            self.cache.free(needed - left);
            left = free()?;
        }
        if left < needed {
            return Err(StoreError::NoSpace { needed, free: left });
        }
        match disk::preallocate(file, len) {
            Err(error) if error.kind() == io::ErrorKind::StorageFull => {
                Err(StoreError::NoSpace { needed, free: left })
            }
            other => other.at(path),
        }
    }
}

impl Store {
    /// Opens the store in `dir`, which is made when it is not there. What an earlier process was removing or
    /// importing is cleared away. No artifact is read here: that happens when one is first asked for.
    ///
    /// # Errors
    /// [`StoreError::InUse`] when another process has it open; else when the directory cannot be used.
    pub fn open(dir: &Path, config: StoreConfig) -> Result<Self, StoreError> {
        let [artifacts, staging, trash] = ["artifacts", "staging", "trash"].map(|n| dir.join(n));
        fs::create_dir_all(&artifacts).at(&artifacts)?;
        let lock_path = dir.join("lock");
        let mut options = OpenOptions::new();
        let lock_file =
            options.create(true).truncate(false).write(true).open(&lock_path).at(&lock_path)?;
        match lock_file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(StoreError::InUse(dir.to_owned())),
            Err(TryLockError::Error(error)) => return Err(error).at(&lock_path),
        }
        for scratch in [&staging, &trash] {
            disk::remove(scratch).at(scratch)?;
            fs::create_dir(scratch).at(scratch)?;
        }
        let cache_dir = dir.join("cache");
        let cache = Cache::open(
            cache_dir.clone(),
            config.encoded_cache_bytes,
            config.reserve_free_bytes,
            |artifact| artifacts.join(artifact.to_string()).is_dir(),
        )
        .at(&cache_dir)?;
        let shared = Shared {
            config,
            artifacts,
            staging,
            trash,
            ledger: Ledger::open(dir.join("ledger")),
            cache,
            buffers: Buffers::default(),
            space: Mutex::default(),
            counter: AtomicU64::new(0),
            _lock: lock_file,
        };
        let stripes = Arc::new(std::array::from_fn(|_| Mutex::default()));
        Ok(Self { shared: Arc::new(shared), stripes })
    }

    /// The open artifacts among which `artifact` is. Finished ones that nobody uses are closed on the way, so
    /// that what is open is what is in use.
    pub(crate) fn stripe(&self, artifact: &ArtifactId) -> MutexGuard<'_, Stripe> {
        let mut stripe = lock(&self.stripes[usize::from(artifact.0[0]) % STRIPES]);
        stripe.retain(|id, open| {
            id == artifact || Arc::strong_count(open) > 1 || !open.is_complete()
        });
        stripe
    }

    /// Opens the artifact of `index`: begins it, its whole length set aside on a disk (in memory only where it is scarce), or
    /// goes on with what is there. Pieces that are not known to be on the disk are hashed first. With an index of another
    /// encoding of the same pieces, the same file gets a handle with the new index; with another piece size, older
    /// handles can no longer write.
    ///
    /// # Errors
    /// [`StoreError::NoSpace`] when the disk has no room, [`StoreError::Index`] when the index is not sound, else
    /// when the disk fails.
    pub fn open_artifact(&self, index: &EncodingIndex) -> Result<Arc<Artifact>, StoreError> {
        let (bytes, encoding) = seal_index(index)?;
        let artifact = index.manifest.artifact;
        let mut stripe = self.stripe(&artifact);
        let dir = self.shared.dir_of(&artifact);
        let mut shared_body = None;
        if let Some(open) = stripe.get(&artifact) {
            if open.encoding() == encoding {
                touch(&dir);
                return Ok(open.clone());
            }
            if open.manifest().piece_size == index.manifest.piece_size {
                shared_body = Some(open.body.clone());
            } else {
                open.body.retire();
                stripe.remove(&artifact);
            }
        }
        let begun = !dir.exists();
        let opened = self.begin(&dir, index, &bytes, encoding, shared_body);
        if begun && opened.is_err() {
            self.shared.discard(&dir)?;
        }
        let opened = opened?;
        stripe.insert(artifact, opened.clone());
        Ok(opened)
    }

    fn begin(
        &self,
        dir: &Path,
        index: &EncodingIndex,
        bytes: &[u8],
        encoding: EncodingId,
        body: Option<Arc<Body>>,
    ) -> Result<Arc<Artifact>, StoreError> {
        fs::create_dir_all(dir).at(dir)?;
        let body = match body {
            Some(body) => body,
            None => self.open_body(dir, &index.manifest, true)?.ok_or_else(|| gone(dir))?,
        };
        disk::write_atomic(dir, INDEX_NAME, bytes).at(dir)?;
        disk::sync_dir(&self.shared.artifacts).at(&self.shared.artifacts)?;
        let bytes = bytes.to_vec().into();
        Ok(Arc::new(Artifact::new(body, index.clone(), bytes, encoding)))
    }

    /// An artifact that is here, whole or not; none when it is not, or when what is here cannot be read, which
    /// is logged: [`Store::open_artifact`] repairs it. Pieces that are not known to be on the disk are hashed
    /// first, once.
    #[must_use]
    pub fn get(&self, artifact: &ArtifactId) -> Option<Arc<Artifact>> {
        let mut stripe = self.stripe(artifact);
        if let Some(open) = stripe.get(artifact) {
            return Some(open.clone());
        }
        let dir = self.shared.dir_of(artifact);
        match self.reopen(&dir, artifact) {
            Ok(Some(open)) => {
                touch(&dir);
                stripe.insert(*artifact, open.clone());
                Some(open)
            }
            Ok(None) => None,
            Err(error) => {
                tracing::warn!(%artifact, %error, "an artifact in the store cannot be opened");
                None
            }
        }
    }

    fn reopen(
        &self,
        dir: &Path,
        artifact: &ArtifactId,
    ) -> Result<Option<Arc<Artifact>>, StoreError> {
        let path = dir.join(INDEX_NAME);
        let metadata = match fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.at(&path)?,
        };
        if metadata.len() > INDEX_MAX_BYTES as u64 {
            return Err(io::Error::from(io::ErrorKind::FileTooLarge)).at(&path);
        }
        let bytes = fs::read(&path).at(&path)?;
        let encoding = EncodingId(*blake3::hash(&bytes).as_bytes());
        let index = open_index(&bytes, artifact, &encoding)?;
        let body = self.open_body(dir, &index.manifest, false)?;
        Ok(body.map(|body| Arc::new(Artifact::new(body, index, bytes.into(), encoding))))
    }

    /// Opens the raw file, whole or partial; begins one when there is none and `begin` says so.
    fn open_body(
        &self,
        dir: &Path,
        manifest: &Manifest,
        begin: bool,
    ) -> Result<Option<Arc<Body>>, StoreError> {
        let data = dir.join(DATA_NAME);
        if data.exists() {
            if let Some(body) = self.open_whole(dir, manifest)? {
                return Ok(Some(body));
            }
            tracing::warn!(path = %data.display(), "a finished artifact is damaged");
            let partial = dir.join(PARTIAL_NAME);
            self.shared.ledger.forget(&manifest.artifact);
            fs::rename(&data, &partial).at(&data)?;
            disk::sync_dir(dir).at(dir)?;
        }
        self.open_partial(dir, manifest, begin)
    }

    fn body(
        &self,
        dir: &Path,
        manifest: &Manifest,
        reader: File,
        writer: Option<File>,
        state: State,
    ) -> Result<Arc<Body>, StoreError> {
        let identity = FileIdentity::of(&reader.metadata().at(dir)?);
        Ok(Arc::new(Body {
            shared: self.shared.clone(),
            dir: dir.to_owned(),
            manifest: manifest.clone(),
            identity,
            reader,
            writer: RwLock::new(writer),
            state: Mutex::new(state),
            writing: Mutex::default(),
            syncing: Mutex::default(),
        }))
    }

    /// Opens a finished file when it is what it was when it was finished, or still has every hash.
    fn open_whole(&self, dir: &Path, manifest: &Manifest) -> Result<Option<Arc<Body>>, StoreError> {
        let path = dir.join(DATA_NAME);
        let file = File::open(&path).at(&path)?;
        let identity = FileIdentity::of(&file.metadata().at(&path)?);
        let count = manifest.piece_count();
        if file.metadata().at(&path)?.len() != manifest.size_bytes {
            return Ok(None);
        }
        if !self.shared.ledger.is_whole(&manifest.artifact, identity) {
            let found = resume::find(&file, manifest, &Bitmap::empty(count), true);
            if found.len() != count as usize {
                return Ok(None);
            }
            file.sync_all().at(&path)?;
            self.shared.ledger.record_whole(&manifest.artifact, identity);
        }
        self.body(dir, manifest, file, None, State::new(Bitmap::full(count), true)).map(Some)
    }

    fn open_partial(
        &self,
        dir: &Path,
        manifest: &Manifest,
        begin: bool,
    ) -> Result<Option<Arc<Body>>, StoreError> {
        let path = dir.join(PARTIAL_NAME);
        let artifact = &manifest.artifact;
        let opened = match OpenOptions::new().read(true).write(true).open(&path) {
            // It was whole, was damaged, and runs: its bytes cannot be repaired in place.
            Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy => {
                disk::remove(&path).at(&path)?;
                None
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound && begin => None,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => Some(other.at(&path)?),
        };
        let file = match opened {
            Some(file) => file,
            None => {
                // Before the file is there: what is entered of an older one is not about this one.
                self.shared.ledger.forget(artifact);
                let mut options = OpenOptions::new();
                options.read(true).write(true).create_new(true).open(&path).at(&path)?
            }
        };
        if file.metadata().at(&path)?.len() != manifest.size_bytes {
            self.shared.ledger.forget(artifact);
        }
        self.shared.preallocate(&file, manifest.size_bytes, &path)?;
        file.sync_all().at(&path)?;
        disk::sync_dir(dir).at(dir)?;

        let identity = FileIdentity::of(&file.metadata().at(&path)?);
        let size = manifest.piece_size;
        let mut have = Bitmap::empty(manifest.piece_count());
        for piece in self.shared.ledger.pieces(artifact, size, identity) {
            have.insert(piece);
        }
        let found = resume::find(&file, manifest, &have, false);
        if !found.is_empty() {
            file.sync_data().at(&path)?;
            self.shared.ledger.record(artifact, size, identity, &found);
            for piece in found {
                have.insert(piece);
            }
        }
        let reader = File::open(&path).at(&path)?;
        let body = self.body(dir, manifest, reader, Some(file), State::new(have, false))?;
        lock(&self.shared.space).push(Arc::downgrade(&body));
        Ok(Some(body))
    }

    /// All artifacts on the disk, in no particular order, without opening them. A directory that cannot be read
    /// is logged and has none.
    #[must_use]
    pub fn list(&self) -> Vec<ArtifactSummary> {
        let dir = &self.shared.artifacts;
        let entries = match fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(error) => {
                tracing::error!(path = %dir.display(), %error, "the store cannot be listed");
                return Vec::new();
            }
        };
        entries
            .flatten()
            .filter_map(|entry| {
                let artifact = entry.file_name().to_str()?.parse().ok()?;
                summary(artifact, &entry.path())
            })
            .collect()
    }

    /// Removes an artifact with all that belongs to it; true when it was there. Handles on it can read on and
    /// no longer write; a program that runs from it runs on.
    ///
    /// # Errors
    /// [`StoreError::Io`] when the disk fails; it is then gone or still there, and can be removed again.
    pub fn remove(&self, artifact: &ArtifactId) -> Result<bool, StoreError> {
        let mut stripe = self.stripe(artifact);
        if let Some(open) = stripe.remove(artifact) {
            open.body.retire();
        }
        let dir = self.shared.dir_of(artifact);
        let was_there = dir.exists();
        self.shared.ledger.forget(artifact);
        self.shared.discard(&dir)?;
        self.shared.cache.forget(artifact);
        Ok(was_there)
    }

    /// What encoded pieces take on the disk now, in bytes.
    #[must_use]
    pub fn encoded_cache_bytes(&self) -> u64 {
        self.shared.cache.bytes()
    }
}

fn gone(dir: &Path) -> StoreError {
    StoreError::Io { path: dir.to_owned(), source: io::ErrorKind::NotFound.into() }
}

/// What the disk says of an artifact; none when it has no raw file yet, or none any more.
fn summary(artifact: ArtifactId, dir: &Path) -> Option<ArtifactSummary> {
    let whole = fs::metadata(dir.join(DATA_NAME)).ok();
    let complete = whole.is_some();
    let file = whole.or_else(|| fs::metadata(dir.join(PARTIAL_NAME)).ok())?;
    let last_used = fs::metadata(dir.join(INDEX_NAME))
        .and_then(|index| index.modified())
        .or_else(|_| file.modified())
        .unwrap_or(SystemTime::UNIX_EPOCH);
    Some(ArtifactSummary { artifact, size_bytes: file.len(), complete, last_used })
}

/// Notes that an artifact was used, by its index's modification time. It only orders what to remove first, so
/// a failure is not one of the caller's.
fn touch(dir: &Path) {
    let path = dir.join(INDEX_NAME);
    let touched = File::open(&path).and_then(|file| file.set_modified(SystemTime::now()));
    if let Err(error) = touched {
        tracing::debug!(path = %path.display(), %error, "the time of use cannot be noted");
    }
}
