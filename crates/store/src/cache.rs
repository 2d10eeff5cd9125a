//! Encoded pieces, bounded, least recently used first to go.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use shoal_proto::{ArtifactId, PieceIndex};

use crate::disk::{self, lock};

/// The most entries: bounds their memory to about 3 MiB. It is the pieces of six artifacts of 10 GB.
const ENTRIES_MAX: usize = 16_384;

/// What a file takes on the disk is a multiple of this, in bytes: a million tiny pieces are not free.
const BLOCK_BYTES: u64 = 4_096;

type Key = (ArtifactId, u32);

pub(crate) struct Cache {
    dir: PathBuf,
    capacity_bytes: u64,
    reserve_free_bytes: u64,
    state: Mutex<State>,
    /// Numbers temporary files.
    temporary: AtomicU64,
}

#[derive(Default)]
struct State {
    entries: HashMap<Key, Entry>,
    /// Every entry by its last use, the oldest first.
    by_use: BTreeMap<u64, Key>,
    bytes: u64,
    clock: u64,
}

struct Entry {
    used: u64,
    /// The length of the encoded piece, in bytes.
    len: u64,
    /// Whether this process wrote it; what an earlier one left may be torn.
    proven: bool,
}

/// An encoded piece in the cache. It can be read to its end even if it is evicted meanwhile.
#[derive(Debug)]
pub(crate) struct Cached {
    pub(crate) file: File,
    pub(crate) path: PathBuf,
    /// Its length, in bytes.
    pub(crate) len: u64,
    /// False when it was left by an earlier process: decode and verify it, then say so with
    /// [`Cache::prove`] or [`Cache::discard`].
    pub(crate) proven: bool,
}

fn cost(len: u64) -> u64 {
    len.next_multiple_of(BLOCK_BYTES)
}

impl State {
    fn insert(&mut self, key: Key, len: u64, proven: bool) {
        self.take(&key);
        self.clock += 1;
        self.by_use.insert(self.clock, key);
        self.entries.insert(key, Entry { used: self.clock, len, proven });
        self.bytes += cost(len);
    }

    fn touch(&mut self, key: &Key) -> Option<&Entry> {
        let entry = self.entries.get_mut(key)?;
        self.by_use.remove(&entry.used);
        self.clock += 1;
        entry.used = self.clock;
        self.by_use.insert(self.clock, *key);
        Some(entry)
    }

    fn take(&mut self, key: &Key) -> Option<Entry> {
        let entry = self.entries.remove(key)?;
        self.by_use.remove(&entry.used);
        self.bytes -= cost(entry.len);
        Some(entry)
    }

    fn keys_of(&self, artifact: &ArtifactId) -> Vec<Key> {
        self.entries.keys().filter(|key| key.0 == *artifact).copied().collect()
    }
}

impl Cache {
    /// Opens the cache, forgetting what belongs to artifacts that are not `known`.
    pub(crate) fn open(
        dir: PathBuf,
        capacity_bytes: u64,
        reserve_free_bytes: u64,
        known: impl Fn(&ArtifactId) -> bool,
    ) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        let mut state = State::default();
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            match path.file_name().and_then(|name| name.to_str()).map(str::parse) {
                Some(Ok(artifact)) if known(&artifact) => load(&mut state, artifact, &path)?,
                _ => disk::remove(&path)?,
            }
        }
        let cache = Self {
            dir,
            capacity_bytes,
            reserve_free_bytes,
            state: Mutex::new(state),
            temporary: AtomicU64::new(0),
        };
        cache.evict(&mut lock(&cache.state), capacity_bytes);
        Ok(cache)
    }

    fn dir_of(&self, artifact: &ArtifactId) -> PathBuf {
        self.dir.join(artifact.to_string())
    }

    fn path_of(&self, key: &Key) -> PathBuf {
        self.dir_of(&key.0).join(key.1.to_string())
    }

    /// Evicts until at most `bytes` are left. The files go under the lock, so that a name in the cache
    /// directory always is what the entries say.
    fn evict(&self, state: &mut State, bytes: u64) {
        while state.bytes > bytes || state.entries.len() > ENTRIES_MAX {
            let Some((_, &key)) = state.by_use.first_key_value() else { return };
            state.take(&key);
            self.unlink(&key);
        }
    }

    fn unlink(&self, key: &Key) {
        let path = self.path_of(key);
        if let Err(error) = disk::remove(&path) {
            tracing::warn!(path = %path.display(), %error, "an encoded piece cannot be removed");
        }
    }

    /// Keeps an encoded piece where there is room. A cache that cannot be written is an empty one: that is
    /// logged, and the piece will be served raw.
    pub(crate) fn put(&self, artifact: &ArtifactId, piece: PieceIndex, stored: &[u8]) {
        let len = stored.len() as u64;
        let room = disk::free_bytes(&self.dir)
            .is_ok_and(|free| free >= self.reserve_free_bytes.saturating_add(cost(len)));
        if !room || cost(len) > self.capacity_bytes {
            return;
        }
        let key = (*artifact, piece.0);
        if let Err(error) = self.write(&key, stored) {
            tracing::warn!(%artifact, %piece, %error, "an encoded piece cannot be cached");
        }
    }

    fn write(&self, key: &Key, stored: &[u8]) -> io::Result<()> {
        let number = self.temporary.fetch_add(1, Ordering::Relaxed);
        let temporary = self.dir_of(&key.0).join(format!("new-{number}"));
        let mut file = match File::create(&temporary) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(self.dir_of(&key.0))?;
                File::create(&temporary)?
            }
            created => created?,
        };
        // Not synced: what a crash tears is found when it is proven.
        let written = file.write_all(stored).and_then(|()| {
            let mut state = lock(&self.state);
            fs::rename(&temporary, self.path_of(key))?;
            state.insert(*key, stored.len() as u64, true);
            self.evict(&mut state, self.capacity_bytes);
            Ok(())
        });
        if written.is_err() {
            disk::remove(&temporary)?;
        }
        written
    }

    /// An encoded piece, when it is kept.
    pub(crate) fn get(&self, artifact: &ArtifactId, piece: PieceIndex) -> Option<Cached> {
        let key = (*artifact, piece.0);
        let (len, proven) = lock(&self.state).touch(&key).map(|e| (e.len, e.proven))?;
        let path = self.path_of(&key);
        // Evicted meanwhile, or not as it was entered: not kept.
        match File::open(&path).and_then(|file| Ok((file.metadata()?.len(), file))) {
            Ok((now, file)) if now == len => Some(Cached { file, path, len, proven }),
            _ => {
                self.discard(artifact, piece);
                None
            }
        }
    }

    /// Says that an entry of an earlier process was verified.
    pub(crate) fn prove(&self, artifact: &ArtifactId, piece: PieceIndex) {
        if let Some(entry) = lock(&self.state).entries.get_mut(&(*artifact, piece.0)) {
            entry.proven = true;
        }
    }

    /// Drops one piece.
    pub(crate) fn discard(&self, artifact: &ArtifactId, piece: PieceIndex) {
        let key = (*artifact, piece.0);
        let mut state = lock(&self.state);
        if state.take(&key).is_some() {
            self.unlink(&key);
        }
    }

    /// Drops all pieces of an artifact.
    pub(crate) fn forget(&self, artifact: &ArtifactId) {
        let mut state = lock(&self.state);
        for key in state.keys_of(artifact) {
            state.take(&key);
        }
        let dir = self.dir_of(artifact);
        if let Err(error) = disk::remove(&dir) {
            tracing::warn!(path = %dir.display(), %error, "encoded pieces cannot be removed");
        }
    }

    /// Gives the pieces that were kept under one id to another, dropping what that one had.
    pub(crate) fn rename(&self, from: &ArtifactId, to: &ArtifactId) {
        self.forget(to);
        let mut state = lock(&self.state);
        if fs::rename(self.dir_of(from), self.dir_of(to)).is_err() {
            // Nothing was kept, or it cannot be moved: either way nothing is under the new id.
            drop(state);
            return self.forget(from);
        }
        for key in state.keys_of(from) {
            if let Some(entry) = state.take(&key) {
                state.insert((*to, key.1), entry.len, entry.proven);
            }
        }
    }

    /// Evicts at least `bytes` where so many are kept.
    pub(crate) fn free(&self, bytes: u64) {
        let mut state = lock(&self.state);
        let left = state.bytes.saturating_sub(bytes);
        self.evict(&mut state, left);
    }

    /// What the cache takes on the disk, in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        lock(&self.state).bytes
    }
}

/// Takes in what an earlier process left.
fn load(state: &mut State, artifact: ArtifactId, dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        match entry.file_name().to_str().map(str::parse) {
            Some(Ok(piece)) => state.insert((artifact, piece), entry.metadata()?.len(), false),
            _ => disk::remove(&entry.path())?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PIECE: u64 = 3 * BLOCK_BYTES;

    fn kept(cache: &Cache, id: &ArtifactId) -> Vec<u32> {
        (0..64).filter(|&piece| cache.get(id, PieceIndex(piece)).is_some()).collect()
    }

    #[test]
    fn the_least_recently_used_go_first() {
        let dir = tempfile::tempdir().unwrap();
        let (id, other) = (ArtifactId([1; 32]), ArtifactId([2; 32]));
        let cache = Cache::open(dir.path().join("cache"), 8 * PIECE, 0, |_| true).unwrap();
        for piece in 0..8 {
            // A byte less than a block: what counts is what the disk gives.
            cache.put(&id, PieceIndex(piece), &vec![1; PIECE as usize - 1]);
        }
        assert_eq!(cache.bytes(), 8 * PIECE);
        assert!(cache.get(&id, PieceIndex(0)).is_some());
        cache.put(&other, PieceIndex(0), &[2]);
        assert_eq!(kept(&cache, &id), [0, 2, 3, 4, 5, 6, 7]);
        // For the sake of an artifact, some are given up at once.
        cache.free(2 * PIECE + 1);
        assert!(cache.bytes() <= 5 * PIECE + BLOCK_BYTES);
        assert_eq!(cache.get(&id, PieceIndex(0)).map(|c| c.proven), None);
        cache.free(u64::MAX);
        assert_eq!(cache.bytes(), 0);
        // One that is larger than all is not kept, and takes nothing from the others.
        cache.put(&id, PieceIndex(1), &[1]);
        cache.put(&id, PieceIndex(2), &vec![1; 8 * PIECE as usize + 1]);
        assert_eq!(kept(&cache, &id), [1]);
        cache.put(&id, PieceIndex(1), &[7, 7]);
        assert_eq!(fs::read(cache.get(&id, PieceIndex(1)).unwrap().path).unwrap(), [7, 7]);
        assert_eq!(cache.bytes(), BLOCK_BYTES);
    }

    #[test]
    fn pieces_go_over_to_another_id_and_are_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (ArtifactId([1; 32]), ArtifactId([2; 32]));
        let cache = Cache::open(dir.path().join("cache"), 1 << 20, 0, |_| true).unwrap();
        cache.put(&from, PieceIndex(3), b"three");
        cache.put(&to, PieceIndex(4), b"four");
        cache.rename(&from, &to);
        assert_eq!((kept(&cache, &from), kept(&cache, &to)), (vec![], vec![3]));
        cache.rename(&from, &to);
        assert_eq!(kept(&cache, &to), Vec::<u32>::new());
        cache.put(&to, PieceIndex(4), b"four");
        cache.forget(&to);
        assert_eq!((kept(&cache, &to), cache.bytes()), (vec![], 0));
        assert_eq!(fs::read_dir(dir.path().join("cache")).unwrap().count(), 0);
    }

    #[test]
    fn a_disk_below_its_reserve_takes_no_encoded_pieces() {
        let dir = tempfile::tempdir().unwrap();
        let id = ArtifactId([1; 32]);
        let cache = Cache::open(dir.path().join("cache"), 1 << 20, u64::MAX, |_| true).unwrap();
        cache.put(&id, PieceIndex(3), b"three");
        assert_eq!(kept(&cache, &id), Vec::<u32>::new());
    }
}
