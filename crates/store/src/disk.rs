//! The few things that the store asks of a file system.

use std::{
    fs::{self, File},
    io::{self, Write},
    ops::Range,
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

use rustix::{
    fs::{FallocateFlags, SeekFrom, fallocate, fstatfs, seek, statvfs},
    io::Errno,
};

/// Locks, whoever panicked before: what these locks guard is changed in one step or checked when used.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes the names in a directory durable.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Replaces `dir/name` with `bytes`, whole or not at all, durably.
pub(crate) fn write_atomic(dir: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let temporary = dir.join(format!("{name}.new"));
    let mut file = File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, dir.join(name))?;
    sync_dir(dir)
}

/// The bytes that this process may still write to the file system of `path`.
pub(crate) fn free_bytes(path: &Path) -> io::Result<u64> {
    let stat = statvfs(path)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// The bytes of the file's length that no disk block is set aside for yet.
pub(crate) fn unallocated_bytes(file: &File) -> io::Result<u64> {
    let metadata = file.metadata()?;
    // st_blocks counts 512 bytes, whatever the file system's own block is (POSIX leaves it open, Linux not).
    Ok(metadata.len().saturating_sub(metadata.blocks() * 512))
}

/// Whether the file lies in memory, with room for several times `len` more bytes there.
fn has_plenty_of_memory(file: &File, len: u64) -> io::Result<bool> {
    /// How statfs(2) names a file system in memory.
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    const PLENTY: u64 = 4;
    let stat = fstatfs(file)?;
    let free = stat.f_bavail.saturating_mul(stat.f_bsize as u64);
    Ok(stat.f_type == TMPFS_MAGIC && free >= len.saturating_mul(PLENTY))
}

/// Gives the file its length and sets the disk blocks aside, where the file system can do that; where it
/// cannot, only the length is set and a full disk shows in a write. So it is in memory, too, where there is plenty of room:
/// finding every page first takes a second for a few GB, while nothing is fetched.
pub(crate) fn preallocate(file: &File, len: u64) -> io::Result<()> {
    if len == 0 || has_plenty_of_memory(file, len)? {
        return file.set_len(len);
    }
    match fallocate(file, FallocateFlags::empty(), 0, len) {
        Ok(()) => {}
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {}
        Err(error) => return Err(error.into()),
    }
    // fallocate only ever makes a file longer.
    file.set_len(len)
}

/// The ranges of the file that may hold data: a hole was never written, so it needs no reading.
pub(crate) fn data_ranges(file: &File, len: u64) -> Vec<Range<u64>> {
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < len {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) if start < len => start,
            Ok(_) | Err(Errno::NXIO) => break,
            // No such seek here: everything may be data.
            Err(_) => at,
        };
        let end = match seek(file, SeekFrom::Hole(start)) {
            Ok(end) if end > start => end.min(len),
            _ => len,
        };
        ranges.push(start..end);
        at = end;
    }
    ranges
}

/// Fills `buffer` from `offset`; an end of file before that is `UnexpectedEof`.
pub(crate) fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    file.read_exact_at(buffer, offset)
}

/// Removes a file or a directory tree; what is not there is as good as removed.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_its_length_and_with_plenty_of_memory_no_room_of_its_own_yet() {
        const LEN: u64 = 1 << 20;
        let in_memory = tempfile::tempfile_in("/dev/shm").expect("a file in memory");
        for len in [LEN, LEN / 2, 0] {
            preallocate(&in_memory, len).expect("room");
            assert_eq!(in_memory.metadata().expect("it is open").len(), len);
            assert_eq!(unallocated_bytes(&in_memory).expect("it is open"), len);
        }
        let anywhere = tempfile::tempfile().expect("a file");
        preallocate(&anywhere, LEN).expect("room");
        assert_eq!(anywhere.metadata().expect("it is open").len(), LEN);
    }
}
