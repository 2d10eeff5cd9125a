//! Where work on the files of pieces is done: on the spot, as long as the disk lets nobody wait.
//!
//! The page cache takes or gives a part of a piece in a tenth of a millisecond. Handing that over to another thread costs more:
//! two wake-ups, and bytes that leave the processor's cache (the benchmark `swarm`, eight leechers on two cores, in turn: 3.72 CPU
//! s/GB with every part handed over, 2.95 so; tokio's `block_in_place` gained nothing). A disk that has to be waited for is
//! another matter: then whoever waits must not be a thread that connections need.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use nix::sys::resource::{UsageWho, getrusage};
use shoal_store::Buffers;
use tokio::{
    runtime::Handle,
    sync::{Semaphore, SemaphorePermit},
    task::{JoinError, spawn_blocking},
    time::timeout,
};

/// Pieces are read, hashed and written in parts of at most so many bytes, which stay in the processor's cache between the
/// socket and the file.
pub(crate) const PART_BYTES: usize = 256 << 10;

/// A disk that had a thread wait for longer than this is slow...
const WAIT: Duration = Duration::from_millis(2);

/// ...and is taken for slow for so long; then one part is tried on the spot again.
const SLOW_FOR: Duration = Duration::from_secs(1);

/// Who has waited for a place for so long is behind a thread that a disk keeps: it is slow, too, and perhaps never answers. A
/// thread that only lost its processor is back sooner.
const PLACE_WAIT: Duration = Duration::from_millis(100);

/// The work on files of a process.
pub(crate) struct DiskWork {
    /// Who works on the spot: all threads of the runtime but one, at most. Others wait for a place, for [`PLACE_WAIT`].
    places: Semaphore,
    began: Instant,
    /// The disk is taken for slow until then, in nanoseconds since `began`.
    slow_until: AtomicU64,
    parts: Buffers,
}

impl DiskWork {
    /// For the runtime that it is called in. A runtime of one thread has none to spare: all work is handed over.
    pub(crate) fn new() -> Arc<Self> {
        let places = Handle::current().metrics().num_workers() - 1;
        Arc::new(Self {
            places: Semaphore::new(places),
            began: Instant::now(),
            slow_until: AtomicU64::new(if places == 0 { u64::MAX } else { 0 }),
            parts: Buffers::default(),
        })
    }

    /// Where buffers of [`PART_BYTES`] lie between two uses.
    pub(crate) fn parts(&self) -> &Buffers {
        &self.parts
    }

    /// Does some work on files: short work, but for the time that the disk takes.
    ///
    /// # Errors
    /// [`JoinError`] when it panicked on another thread.
    pub(crate) async fn run<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, JoinError> {
        // While one waits for a place the disk may turn out to be slow.
        if !self.is_slow()
            && let Some(_place) = self.place().await
            && !self.is_slow()
        {
            return Ok(self.watch(work));
        }
        spawn_blocking(work).await
    }

    /// A place at the disk; none when it has to be waited for too long.
    async fn place(&self) -> Option<SemaphorePermit<'_>> {
        if let Ok(place) = self.places.try_acquire() {
            return Some(place);
        }
        if let Ok(place) = timeout(PLACE_WAIT, self.places.acquire()).await {
            return place.ok();
        }
        self.mark_slow();
        None
    }

    fn mark_slow(&self) {
        let until = (self.now() + SLOW_FOR).as_nanos();
        self.slow_until.store(u64::try_from(until).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    fn is_slow(&self) -> bool {
        self.now() < Duration::from_nanos(self.slow_until.load(Ordering::Relaxed))
    }

    /// Does it, and sees whether the disk had it wait. Time alone does not tell: the thread may have lost the processor.
    fn watch<T>(&self, work: impl FnOnce() -> T) -> T {
        let (began, waits_before) = (self.now(), waits());
        let done = work();
        if self.now() - began > WAIT && waits() > waits_before {
            self.mark_slow();
        }
        done
    }
}

/// How often this thread has given the processor away to wait for something.
fn waits() -> i64 {
    getrusage(UsageWho::RUSAGE_THREAD).map_or(0, |usage| usage.voluntary_context_switches())
}

#[cfg(test)]
mod tests {
    use std::{
        sync::mpsc,
        thread::{self, ThreadId},
    };

    use super::*;

    /// Whether work was done on the thread that wanted it done.
    async fn is_done_on_the_spot(disk: &Arc<DiskWork>) -> bool {
        let disk = disk.clone();
        let threads: (ThreadId, ThreadId) = tokio::spawn(async move {
            let own = thread::current().id();
            (own, disk.run(|| thread::current().id()).await.unwrap())
        })
        .await
        .unwrap();
        threads.0 == threads.1
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_disk_that_is_waited_for_is_left_to_other_threads() {
        let disk = DiskWork::new();
        assert!(is_done_on_the_spot(&disk).await);
        disk.run(|| thread::sleep(2 * WAIT)).await.unwrap();
        assert!(disk.is_slow());
        assert!(!is_done_on_the_spot(&disk).await);
        // Time passes.
        disk.slow_until.store(0, Ordering::Relaxed);
        assert!(is_done_on_the_spot(&disk).await);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn work_that_only_takes_long_is_no_slow_disk() {
        let disk = DiskWork::new();
        let began = Instant::now();
        let busy = move || while began.elapsed() < 2 * WAIT {};
        disk.run(busy).await.unwrap();
        assert!(!disk.is_slow());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn one_thread_stays_free() {
        let disk = DiskWork::new();
        let (goes_on, waits) = mpsc::channel::<()>();
        let (stands, stands_there) = tokio::sync::oneshot::channel();
        let stuck = tokio::spawn({
            let disk = disk.clone();
            async move {
                let work = move || {
                    stands.send(()).unwrap();
                    waits.recv().unwrap();
                };
                disk.run(work).await
            }
        });
        stands_there.await.unwrap();
        assert_eq!(disk.places.available_permits(), 0, "the other thread stays away from the disk");
        assert!(!is_done_on_the_spot(&disk).await, "nobody waits for the one that is stuck");
        assert!(disk.is_slow());
        goes_on.send(()).unwrap();
        stuck.await.unwrap().unwrap();
        assert_eq!(disk.places.available_permits(), 1, "its place is free again");
    }

    #[tokio::test]
    async fn a_runtime_of_one_thread_hands_all_work_over() {
        assert!(!is_done_on_the_spot(&DiskWork::new()).await);
    }
}
