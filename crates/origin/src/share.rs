//! Reading a source once for several copies of it.
//!
//! Copies of one encoding into several regions go side by side, each at its own pace. A chunk that one of them reads stays a
//! little while, so those that go alike take the same memory, and who is slower reads for itself: no bucket is held up by
//! another one. A chunk in memory has one place in the budget, however many write it.

use std::{
    collections::{HashMap, VecDeque},
    ops::Range,
    sync::{
        Arc, LazyLock, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use object_store::path::Path;
use tokio::sync::{OnceCell, SemaphorePermit};

use crate::{
    bucket::Bucket,
    error::OriginError,
    write::{CHUNK_BYTES, CHUNKS_READ_MAX, Chunk, Chunks, Hold, READ_BUDGET},
};

/// How many chunks stay for those who come a little later: half of the budget, so that there is always room for others.
const STAY_MAX: usize = CHUNKS_READ_MAX / 2;

/// A bucket, an object and an offset in it.
type Key = (u64, Path, u64);

/// A chunk that is being read, or was.
#[derive(Default)]
pub(crate) struct Slot {
    read: OnceCell<Read>,
}

struct Read {
    pieces: Vec<Bytes>,
    len: usize,
    _permit: SemaphorePermit<'static>,
}

#[derive(Default)]
struct Staying {
    /// How many copies go on; with the last one nothing stays.
    copies: usize,
    slots: HashMap<Key, Arc<Slot>>,
    order: VecDeque<Key>,
}

static STAYING: LazyLock<Mutex<Staying>> = LazyLock::new(Mutex::default);
static SHARING: AtomicBool = AtomicBool::new(true);
static SOURCE_BYTES: AtomicU64 = AtomicU64::new(0);

/// Lets copies read for themselves, each all of it, or together: for a comparison of the two.
pub fn set_sharing(on: bool) {
    SHARING.store(on, Ordering::Relaxed);
}

/// How many bytes were read from the sources of copies in this process.
#[must_use]
pub fn source_reads() -> u64 {
    SOURCE_BYTES.load(Ordering::Relaxed)
}

/// A copy that goes on, for as long as it is held.
pub(crate) struct Copying(());

impl Copying {
    pub(crate) fn begin() -> Self {
        STAYING.lock().unwrap_or_else(PoisonError::into_inner).copies += 1;
        Self(())
    }
}

impl Drop for Copying {
    fn drop(&mut self) {
        let mut staying = STAYING.lock().unwrap_or_else(PoisonError::into_inner);
        staying.copies -= 1;
        if staying.copies == 0 {
            *staying = Staying::default();
        }
    }
}

/// The slot of a chunk: another copy's, or a new one, which takes the place of the one that has stayed the longest.
fn slot(key: Key) -> Arc<Slot> {
    if !SHARING.load(Ordering::Relaxed) {
        return Arc::default();
    }
    let mut staying = STAYING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(slot) = staying.slots.get(&key) {
        return slot.clone();
    }
    if staying.order.len() >= STAY_MAX
        && let Some(oldest) = staying.order.pop_front()
    {
        staying.slots.remove(&oldest);
    }
    let slot = Arc::<Slot>::default();
    staying.slots.insert(key.clone(), slot.clone());
    staying.order.push_back(key);
    slot
}

/// Takes out what was read of an object: it proved wrong, or was given up in the middle. The next try reads it anew.
pub(crate) fn forget(bucket: &Bucket, object: &Path) {
    let bucket = bucket.number();
    let mut staying = STAYING.lock().unwrap_or_else(PoisonError::into_inner);
    let of_it = |key: &Key| key.0 == bucket && key.1 == *object;
    staying.slots.retain(|key, _| !of_it(key));
    staying.order.retain(|key| !of_it(key));
}

/// A part of a source, chunk by chunk.
pub(crate) struct SharedPart<'a> {
    bucket: &'a Bucket,
    key: Path,
    len: u64,
    offset: u64,
}

impl<'a> SharedPart<'a> {
    pub(crate) fn new(bucket: &'a Bucket, key: Path, len: u64) -> Self {
        Self { bucket, key, len, offset: 0 }
    }

    async fn read(&self, range: Range<u64>) -> Result<Read, OriginError> {
        let Ok(permit) = READ_BUDGET.acquire().await else {
            return Err(OriginError::Store(object_store::Error::NotImplemented {
                operation: "read".into(),
                implementer: "a budget that is closed".into(),
            }));
        };
        let len = range.end - range.start;
        let pieces = self.bucket.get_chunk(&self.key, range).await?;
        SOURCE_BYTES.fetch_add(len, Ordering::Relaxed);
        Ok(Read { pieces, len: len as usize, _permit: permit })
    }
}

impl Chunks for SharedPart<'_> {
    async fn next(&mut self) -> Result<Option<Chunk>, OriginError> {
        let end = (self.offset + CHUNK_BYTES as u64).min(self.len);
        if self.offset == end {
            return Ok(None);
        }
        let key = (self.bucket.number(), self.key.clone(), self.offset);
        let slot = slot(key);
        let read = slot.read.get_or_try_init(|| self.read(self.offset..end)).await?;
        let (pieces, len) = (read.pieces.clone(), read.len);
        self.offset = end;
        Ok(Some(Chunk { pieces, len, hold: Hold::Shared { _slot: slot } }))
    }
}
