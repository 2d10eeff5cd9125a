//! Memory that this machine holds until it is needed.
//!
//! The host of a virtual machine may take free memory back within a second, and giving it again costs ten times the CPU
//! of writing to it: 2.3 s/GiB by 0.2. The kernel does not give out first what was freed last, so whoever writes files into memory
//! pays for that where much is free, and how much is chance. So all free memory but a little is held, and given back as it
//! is used up: whatever a program takes was in use a moment ago.

use std::{
    fs, io,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::Context as _;
use memmap2::{Advice, MmapMut};
use rustix::{
    fs::{statfs, statvfs},
    system::sysinfo,
};

/// What is given back at once: some large pages, which come and go faster than small ones.
const CHUNK_BYTES: usize = 32 << 20;

/// So much is always free. It is cold, and hardly used: what was given back last is taken first.
const COLD_BYTES: u64 = 384 << 20;

/// So much more is given back before anybody needs it.
const AHEAD_BYTES: u64 = 3 * CHUNK_BYTES as u64;

/// No more than this is held: a larger machine is not kept busy for minutes.
const MOST_BYTES: u64 = 32 << 30;

/// Holding more than this takes seconds, and is told.
const TOLD_BYTES: u64 = 4 << 30;

/// Free memory is looked at this often: at a few GB/s it shrinks by some MiB meanwhile.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// How statfs(2) names a file system in memory.
const TMPFS_MAGIC: i64 = 0x0102_1994;

fn in_memory(dir: &Path) -> anyhow::Result<bool> {
    Ok(statfs(dir)?.f_type == TMPFS_MAGIC)
}

/// How many bytes files in a directory may take. A file system in memory may be larger than the memory that is free.
///
/// # Errors
/// When the system does not say.
pub fn room(dir: &Path) -> anyhow::Result<u64> {
    let free = statvfs(dir)?;
    let free = free.f_bavail * free.f_frsize;
    if !in_memory(dir)? {
        return Ok(free);
    }
    let memory = fs::read_to_string("/proc/meminfo")?;
    let available = memory.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = available.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    Ok(free.min(kib.context("/proc/meminfo has no MemAvailable")? << 10))
}

/// Memory that is held, and given back as others need it. Dropping it gives all of it back.
#[derive(Debug)]
pub struct Ballast {
    /// Files that are measured lie in memory.
    is_needed: bool,
    held: Arc<Mutex<Vec<MmapMut>>>,
    over: Arc<AtomicBool>,
    giver: Option<JoinHandle<()>>,
}

impl Ballast {
    /// Holds nothing yet, and never will where `dir` is not in memory.
    ///
    /// # Errors
    /// When the system does not say what `dir` lies in.
    pub fn new(dir: &Path) -> anyhow::Result<Self> {
        let is_needed = in_memory(dir)?;
        let (held, over) = (Arc::<Mutex<Vec<MmapMut>>>::default(), Arc::<AtomicBool>::default());
        let giver = thread::spawn({
            let (held, over) = (held.clone(), over.clone());
            move || {
                while !over.load(Ordering::Relaxed) {
                    give(&mut lock(&held), free_bytes);
                    thread::sleep(LOOK_EVERY);
                }
            }
        });
        Ok(Self { is_needed, held, over, giver: Some(giver) })
    }

    /// Holds what is free now, too. Call it just before the clock starts.
    ///
    /// # Errors
    /// When the system refuses memory that is free.
    pub fn fill(&self) -> anyhow::Result<()> {
        if self.is_needed {
            let free = free_bytes();
            if free > TOLD_BYTES {
                eprintln!("holding {} GiB of free memory first", free.min(MOST_BYTES) >> 30);
            }
            take(&mut lock(&self.held), free_bytes, chunk).context("cannot hold memory")?;
        }
        Ok(())
    }
}

impl Drop for Ballast {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        // All the same if it panicked.
        let _ = self.giver.take().map(JoinHandle::join);
    }
}

fn lock<T>(held: &Mutex<T>) -> MutexGuard<'_, T> {
    held.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Gives back until enough is free.
fn give<T>(held: &mut Vec<T>, free_bytes: impl Fn() -> u64) {
    while free_bytes() < COLD_BYTES + AHEAD_BYTES && held.pop().is_some() {}
}

/// Takes until little is free.
fn take<T>(
    held: &mut Vec<T>,
    free_bytes: impl Fn() -> u64,
    chunk: impl Fn() -> io::Result<T>,
) -> io::Result<()> {
    while free_bytes() > COLD_BYTES + AHEAD_BYTES + CHUNK_BYTES as u64
        && ((held.len() * CHUNK_BYTES) as u64) < MOST_BYTES
    {
        held.push(chunk()?);
    }
    Ok(())
}

/// Memory that is in use.
fn chunk() -> io::Result<MmapMut> {
    let mut chunk = MmapMut::map_anon(CHUNK_BYTES)?;
    // Where there are no large pages small ones do.
    let _ = chunk.advise(Advice::HugePage);
    chunk.fill(1);
    Ok(chunk)
}

/// What nobody uses, not even as a cache.
fn free_bytes() -> u64 {
    let info = sysinfo();
    info.freeram * u64::from(info.mem_unit)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// Holding and giving back on a machine of 4 GiB, of which others take some.
    #[test]
    fn what_others_take_is_given_back_and_the_rest_is_held() {
        let total = 4_u64 << 30;
        let others = Cell::new(0);
        let held = Cell::new(0);
        let chunk = || {
            held.set(held.get() + CHUNK_BYTES as u64);
            Ok(Held(&held))
        };
        let free = || total.saturating_sub(others.get() + held.get());
        let mut all = Vec::new();
        take(&mut all, free, chunk).unwrap();
        let little = COLD_BYTES + AHEAD_BYTES;
        let is_little = |free| (little..=little + CHUNK_BYTES as u64).contains(&free);
        assert!(is_little(free()), "{} are free", free());
        give(&mut all, free);
        assert!(is_little(free()), "nothing is given back that nobody needs");
        others.set(1 << 30);
        give(&mut all, free);
        assert!(is_little(free()), "{} are free", free());
        others.set(total);
        give(&mut all, || 0);
        assert!(all.is_empty() && held.get() == 0, "all of it is given when it is needed");
    }

    #[test]
    fn a_large_machine_is_not_held_whole() {
        let mut all = Vec::new();
        take(&mut all, || 1 << 40, || Ok(())).unwrap();
        assert_eq!((all.len() * CHUNK_BYTES) as u64, MOST_BYTES);
    }

    #[test]
    fn a_chunk_is_memory_in_use_and_goes_with_the_ballast() {
        let dir = tempfile::tempdir_in("/dev/shm").expect("a directory in memory");
        let ballast = Ballast::new(dir.path()).unwrap();
        assert!(ballast.is_needed);
        let before = resident_bytes();
        lock(&ballast.held).push(chunk().unwrap());
        let taken = resident_bytes() - before;
        assert!(taken >= CHUNK_BYTES as u64, "{taken} are in use");
        let held = ballast.held.clone();
        drop(ballast);
        // The giver has let go of it, too.
        assert_eq!(Arc::strong_count(&held), 1);
    }

    /// What this process has of the memory.
    fn resident_bytes() -> u64 {
        let status = fs::read_to_string("/proc/self/status").expect("Linux");
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("RssAnon");
        line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).expect("KiB") << 10
    }

    /// Counts itself out.
    struct Held<'a>(&'a Cell<u64>);

    impl Drop for Held<'_> {
        fn drop(&mut self) {
            self.0.set(self.0.get() - CHUNK_BYTES as u64);
        }
    }
}
