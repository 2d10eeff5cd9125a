//! The embedded store: a file an app in a directory.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use shoal_proto::{
    AppName, codec,
    goal::{GOAL_MAX_BYTES, SignedGoal},
};
use tokio::sync::watch;

use crate::{Changes, Cursor, Entry, GoalStore, GoalWatch, GoalsError, Put, Result};

/// How a file is written: whole and synced, or not at all.
pub type WriteFile = fn(&Path, &[u8]) -> io::Result<()>;

/// The store. Clones share it.
#[derive(Clone)]
pub struct FileStore {
    inner: Arc<Inner>,
}

struct Inner {
    dir: PathBuf,
    write: WriteFile,
    /// Of this life: a cursor of another one is not known.
    id: u64,
    /// The newest goal of each app, and the number of the change that brought it.
    known: Mutex<BTreeMap<AppName, (u64, Entry)>>,
    /// How many changes there were.
    changes: watch::Sender<u64>,
}

/// A number that no other store has, in this process or in one before.
fn new_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let nanos = u64::try_from(since.as_nanos()).unwrap_or(u64::MAX);
    nanos.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed))
}

impl FileStore {
    /// Reads the goals in `dir`, which is made if need be. A file that is no goal, or one that `check` refuses, is set
    /// aside as `NAME.goal.invalid`, and said in the log.
    ///
    /// # Errors
    /// When the directory cannot be made or read.
    pub fn open(
        dir: PathBuf,
        write: WriteFile,
        check: impl Fn(&Entry) -> std::result::Result<(), String>,
    ) -> io::Result<Self> {
        std::fs::create_dir_all(&dir)?;
        let mut known = BTreeMap::new();
        for file in std::fs::read_dir(&dir)? {
            let path = file?.path();
            if path.extension().is_none_or(|extension| extension != "goal") {
                continue;
            }
            let read = || {
                let bytes = std::fs::read(&path).map_err(|error| error.to_string())?;
                let signed: SignedGoal =
                    codec::decode(&bytes, GOAL_MAX_BYTES).map_err(|error| error.to_string())?;
                let entry = Entry::of(signed)?;
                check(&entry).map(|()| entry)
            };
            match read() {
                Ok(entry) => {
                    known.insert(entry.app.clone(), (known.len() as u64 + 1, entry));
                }
                Err(error) => {
                    tracing::warn!(path = %path.display(), error, "goal file is not valid: set aside");
                    let _ = std::fs::rename(&path, path.with_extension("goal.invalid"));
                }
            }
        }
        let changes = watch::Sender::new(known.len() as u64);
        let known = Mutex::new(known);
        Ok(Self { inner: Arc::new(Inner { dir, write, id: new_id(), known, changes }) })
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<AppName, (u64, Entry)>> {
        self.inner.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// [`GoalStore::put`], at once.
    ///
    /// # Errors
    /// [`GoalsError::File`] when it could not be written.
    pub fn put_now(&self, entry: &Entry) -> Result<Put> {
        let mut known = self.known();
        match known.get(&entry.app) {
            Some((_, stored)) if stored == entry => return Ok(Put::Known),
            Some((_, stored)) if stored.revision >= entry.revision => {
                return Ok(Put::Stale(Box::new(stored.clone())));
            }
            _ => {}
        }
        self.write(&mut known, entry)?;
        Ok(Put::Written)
    }

    /// Writes a goal whatever is there: the same one, signed with another key.
    ///
    /// # Errors
    /// [`GoalsError::File`] when it could not be written.
    pub fn put_over(&self, entry: &Entry) -> Result<()> {
        self.write(&mut self.known(), entry)
    }

    fn write(&self, known: &mut BTreeMap<AppName, (u64, Entry)>, entry: &Entry) -> Result<()> {
        let path = self.inner.dir.join(format!("{}.goal", entry.app));
        codec::encode(&entry.signed, GOAL_MAX_BYTES)
            .map_err(io::Error::other)
            .and_then(|bytes| (self.inner.write)(&path, &bytes))
            .map_err(|source| GoalsError::File { path: path.display().to_string(), source })?;
        // Under the lock: a watcher that sees the count finds the goal.
        self.inner.changes.send_modify(|count| {
            *count += 1;
            known.insert(entry.app.clone(), (*count, entry.clone()));
        });
        Ok(())
    }

    /// Whether it has this goal, or a newer one.
    #[must_use]
    pub fn has(&self, entry: &Entry) -> bool {
        self.known().get(&entry.app).is_some_and(|(_, known)| known.revision >= entry.revision)
    }

    /// [`GoalStore::list`], at once.
    #[must_use]
    pub fn list_now(&self) -> Changes {
        self.after(0, true)
    }

    fn after(&self, revision: u64, complete: bool) -> Changes {
        let known = self.known();
        let newest = *self.inner.changes.borrow();
        let mut found: Vec<_> = known.values().filter(|(at, _)| *at > revision).collect();
        found.sort_by_key(|(at, _)| *at);
        let entries = found.into_iter().map(|(_, entry)| entry.clone()).collect();
        Changes { cursor: Cursor { store: self.inner.id, revision: newest }, entries, complete }
    }

    fn changes_now(&self, after: Cursor) -> Changes {
        let newest = *self.inner.changes.borrow();
        if after.store == self.inner.id && after.revision <= newest {
            self.after(after.revision, false)
        } else {
            self.list_now()
        }
    }
}

impl GoalStore for FileStore {
    type Watch = FileWatch;

    async fn put(&self, entry: &Entry) -> Result<Put> {
        self.put_now(entry)
    }

    async fn list(&self) -> Result<Changes> {
        Ok(self.list_now())
    }

    async fn changes(&self, after: Cursor) -> Result<Changes> {
        Ok(self.changes_now(after))
    }

    fn watch(&self, after: Option<Cursor>) -> FileWatch {
        FileWatch { store: self.clone(), moved: self.inner.changes.subscribe(), after }
    }
}

/// Follows an embedded store.
pub struct FileWatch {
    store: FileStore,
    moved: watch::Receiver<u64>,
    after: Option<Cursor>,
}

impl GoalWatch for FileWatch {
    async fn next(&mut self) -> Result<Changes> {
        loop {
            // First marked as seen: what comes from now on wakes the next wait.
            self.moved.borrow_and_update();
            let changes = match self.after {
                Some(after) => self.store.changes_now(after),
                None => self.store.list_now(),
            };
            self.after = Some(changes.cursor);
            if changes.complete || !changes.entries.is_empty() {
                return Ok(changes);
            }
            // The sender lives as long as the store, which this holds.
            let _ = self.moved.changed().await;
        }
    }
}
