//! The indexes that machines ask for: each is read once from the bucket, however many ask.

use std::{
    future::Future,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use bytes::Bytes;
use shoal_proto::{ArtifactId, EncodingId};
use tokio::sync::OnceCell;

/// How much the kept indexes may take, in bytes: 50 of a 10 GB artifact.
const KEPT_MAX_BYTES: usize = 16 << 20;

/// The most indexes that are kept, read, or known to be missing; the one that was longest unused makes room.
const KEPT_MAX: usize = 256;

/// An index that the bucket did not have is not looked for again for this long.
const MISSING_FOR: Duration = Duration::from_secs(1);

type Key = (ArtifactId, EncodingId);

/// What the bucket had, and when.
struct Found {
    bytes: Option<Bytes>,
    at: Instant,
}

/// The kept indexes, the most lately used last. The lock is never held across a read of the bucket.
#[derive(Default)]
pub(crate) struct Indexes(Mutex<Vec<(Key, Arc<OnceCell<Found>>)>>);

impl Indexes {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<(Key, Arc<OnceCell<Found>>)>> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The index of `key`, by `read` unless it is kept; who asks meanwhile waits for the same read.
    pub(crate) async fn get<F>(&self, key: Key, read: impl FnOnce() -> F) -> Option<Bytes>
    where
        F: Future<Output = Option<Bytes>>,
    {
        let cell = self.cell(key);
        let read = async || Found { bytes: read().await, at: Instant::now() };
        let found = cell.get_or_init(read).await.bytes.clone();
        self.make_room();
        found
    }

    fn cell(&self, key: Key) -> Arc<OnceCell<Found>> {
        let mut kept = self.lock();
        let at = kept.iter().position(|(of, _)| *of == key);
        let cell = at.map(|at| kept.remove(at).1).filter(|cell| {
            cell.get().is_none_or(|found| found.bytes.is_some() || found.at.elapsed() < MISSING_FOR)
        });
        let cell = cell.unwrap_or_default();
        kept.push((key, cell.clone()));
        cell
    }

    fn make_room(&self) {
        let mut kept = self.lock();
        let len = |cell: &OnceCell<Found>| {
            cell.get().and_then(|found| found.bytes.as_ref()).map_or(0, Bytes::len)
        };
        let mut bytes: usize = kept.iter().map(|(_, cell)| len(cell)).sum();
        let mut gone = 0;
        while kept.len() - gone > 1 && (bytes > KEPT_MAX_BYTES || kept.len() - gone > KEPT_MAX) {
            bytes -= len(&kept[gone].1);
            gone += 1;
        }
        kept.drain(..gone);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test]
    async fn many_askers_are_one_read_and_another_index_does_not_wait() {
        let (indexes, reads) = (Indexes::default(), AtomicUsize::new(0));
        let open = tokio::sync::Notify::new();
        let key = |number| (ArtifactId::EMPTY, EncodingId([number; 32]));
        let slow = || {
            indexes.get(key(1), || async {
                reads.fetch_add(1, Ordering::Relaxed);
                open.notified().await;
                Some(Bytes::from_static(b"index"))
            })
        };
        let other = async {
            let found = indexes.get(key(2), || async { Some(Bytes::from_static(b"other")) }).await;
            open.notify_one();
            found
        };
        let (first, second, other) = tokio::join!(slow(), slow(), other);
        assert_eq!(first.as_deref(), Some(&b"index"[..]));
        assert_eq!((second, other.as_deref()), (first, Some(&b"other"[..])));
        assert_eq!(reads.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn what_is_missing_is_asked_for_again_only_later_and_the_kept_are_bounded() {
        let indexes = Indexes::default();
        let key = |number: usize| {
            let mut id = [0; 32];
            id[..8].copy_from_slice(&number.to_le_bytes());
            (ArtifactId::EMPTY, EncodingId(id))
        };
        assert!(indexes.get(key(0), || async { None }).await.is_none());
        let found = indexes.get(key(0), || async { Some(Bytes::new()) }).await;
        assert!(found.is_none(), "known to be missing");
        let big = Bytes::from(vec![0; KEPT_MAX_BYTES / 2]);
        for number in 1..4 {
            indexes.get(key(number), || async { Some(big.clone()) }).await;
        }
        assert_eq!(indexes.lock().len(), 2);
        for number in 10..20 + KEPT_MAX {
            indexes.get(key(number), || async { None }).await;
        }
        assert_eq!(indexes.lock().len(), KEPT_MAX);
    }
}
