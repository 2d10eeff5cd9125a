//! Memory that this machine holds until it is needed.
//!
//! The host of a virtual machine may take free memory back within a second, and giving it again costs several times the
//! CPU of writing to it. Who is measured first, or after one that needed less, then pays what others do not. So memory is held
//! in a file, and given free as fast as other files of the same file system grow: what they write to was the file's a moment ago.

use std::{
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::Context as _;
use rustix::fs::{FallocateFlags, fallocate, statfs, statvfs};

/// What is written at once.
const CHUNK_BYTES: usize = 1 << 20;

/// The file system is looked at this often: at a few GB/s it grows by some MiB meanwhile.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// How a part of a file is given free.
const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);

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

/// Memory that is held. Dropping it gives all of it free.
pub struct Ballast {
    path: PathBuf,
    over: Arc<AtomicBool>,
    giver: Option<JoinHandle<()>>,
}

impl Ballast {
    /// Holds `bytes` in a file of `dir`, or nine tenths of the [`room`] there; nothing where `dir` is not in memory.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn hold(dir: &Path, bytes: u64) -> anyhow::Result<Self> {
        let path = dir.join("ballast");
        let bytes = if in_memory(dir)? { bytes.min(room(dir)? / 10 * 9) } else { 0 };
        let failed = || format!("cannot write {}", path.display());
        let mut file = File::create(&path).with_context(failed)?;
        let ballast = Self { path: path.clone(), over: Arc::default(), giver: None };
        let chunk = vec![1; CHUNK_BYTES];
        let mut left = bytes;
        while left > 0 {
            let part = left.min(CHUNK_BYTES as u64);
            file.write_all(&chunk[..part as usize]).with_context(failed)?;
            left -= part;
        }
        Ok(ballast)
    }

    /// Gives free from now on what others take of the file system.
    ///
    /// # Errors
    /// When the file is gone.
    pub fn give(&mut self) -> anyhow::Result<()> {
        let file = File::options().write(true).open(&self.path)?;
        let bytes = file.metadata()?.len();
        let used = used_bytes(&self.path)?;
        let over = self.over.clone();
        let path = self.path.clone();
        self.giver = Some(thread::spawn(move || {
            let mut given = 0;
            while given < bytes && !over.load(Ordering::Relaxed) {
                let Ok(now) = used_bytes(&path) else { return };
                let part = now.saturating_sub(used).min(bytes - given);
                if part > 0 && fallocate(&file, PUNCH, given, part).is_err() {
                    return;
                }
                given += part;
                thread::sleep(LOOK_EVERY);
            }
        }));
        Ok(())
    }
}

impl Drop for Ballast {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        // All the same if it panicked.
        let _ = self.giver.take().map(JoinHandle::join);
        let _ = fs::remove_file(&self.path);
    }
}

/// What is taken of a file system.
fn used_bytes(path: &Path) -> anyhow::Result<u64> {
    let stat = statvfs(path)?;
    Ok((stat.f_blocks - stat.f_bfree) * stat.f_frsize)
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::MetadataExt as _, time::Instant};

    use super::*;

    /// On a file system where others write too, what it gives is at least what the test takes.
    #[test]
    fn it_gives_what_others_take_and_leaves_nothing() {
        let dir = tempfile::tempdir_in("/dev/shm").expect("a directory in memory");
        let mut ballast = Ballast::hold(dir.path(), 8 << 20).expect("room");
        let path = dir.path().join("ballast");
        let held = || fs::metadata(&path).expect("it is there").blocks() * 512;
        assert_eq!(held(), 8 << 20);
        ballast.give().expect("it is there");
        fs::write(dir.path().join("other"), vec![1; 3 << 20]).expect("room");
        let start = Instant::now();
        while held() > 5 << 20 {
            assert!(start.elapsed() < Duration::from_secs(30), "{} are still held", held());
            thread::sleep(LOOK_EVERY);
        }
        drop(ballast);
        assert!(!path.exists());
    }
}
