//! The jobs' logs: a file an attempt, `JOB-ATTEMPT.log`, read one after the other as the job's log.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom},
    os::unix::fs::FileExt as _,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use crate::state::lock;

/// The longest log of one attempt, in bytes: more than people read, and 100 workers cannot fill a disk.
pub(crate) const LOG_MAX_BYTES: u64 = 64 << 20;

/// How much of a log one answer carries, in bytes.
pub(crate) const LOG_READ_MAX_BYTES: u64 = 1 << 20;

/// A log at its limit ends with this.
const CUT: &[u8] = b"\n[the log is cut here: it is longer than 64 MiB]\n";

/// A lock for each attempt's log that is being written.
type Writers = HashMap<(i64, u32), Arc<Mutex<()>>>;

/// What stands for bytes that never came.
const FILL: &[u8] = &[b'\n'; 4096];

/// The jobs' logs.
#[derive(Clone)]
pub(crate) struct Logs {
    dir: PathBuf,
    /// One writer a log at a time. Emptied of those whom nobody waits for.
    writing: Arc<Mutex<Writers>>,
}

impl Logs {
    /// Logs in `dir`, which is made when it is not there.
    pub(crate) fn open(dir: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        Ok(Self { dir, writing: Arc::default() })
    }

    fn path(&self, job: i64, attempt: u32) -> PathBuf {
        self.dir.join(format!("{job}-{attempt}.log"))
    }

    /// Whether any of an attempt's log is here.
    pub(crate) fn has(&self, job: i64, attempt: u32) -> bool {
        self.path(job, attempt).exists()
    }

    /// Adds `bytes` at `offset` of an attempt's log; what is there already is left, what is missing before
    /// `offset` is filled with line ends. It is on the disk when this returns. Blocks.
    pub(crate) fn append(
        &self,
        job: i64,
        attempt: u32,
        offset: u64,
        bytes: &[u8],
    ) -> io::Result<()> {
        let mine = lock(&self.writing).entry((job, attempt)).or_default().clone();
        let result = {
            let _writing = lock(&mine);
            self.append_alone(job, attempt, offset, bytes)
        };
        drop(mine);
        lock(&self.writing).retain(|_, other| Arc::strong_count(other) > 1);
        result
    }

    fn append_alone(&self, job: i64, attempt: u32, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let path = self.path(job, attempt);
        let file =
            File::options().create(true).append(false).truncate(false).write(true).open(path)?;
        let there = file.metadata()?.len();
        let offset = offset.min(LOG_MAX_BYTES);
        let mut filled = there;
        while filled < offset {
            // Another coordinator took those, or its disk lost them.
            let gap = (offset - filled).min(FILL.len() as u64);
            file.write_all_at(&FILL[..gap as usize], filled)?;
            filled += gap;
        }
        let skip = usize::try_from(there.saturating_sub(offset)).unwrap_or(usize::MAX);
        let Some(new) = bytes.get(skip..).filter(|new| !new.is_empty()) else { return Ok(()) };
        let at = there.max(offset);
        let room = usize::try_from(LOG_MAX_BYTES.saturating_sub(at)).unwrap_or(usize::MAX);
        if new.len() <= room {
            file.write_all_at(new, at)?;
        } else if room > 0 {
            file.write_all_at(&new[..room], at)?;
            file.write_all_at(CUT, at + room as u64)?;
        }
        file.sync_data()
    }

    /// At most [`LOG_READ_MAX_BYTES`] of a job's log from `offset` on; empty at its end. Blocks.
    pub(crate) fn read(&self, job: i64, attempts: u32, mut offset: u64) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        for attempt in 1..=attempts {
            let mut file = match File::open(self.path(job, attempt)) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            let len = file.metadata()?.len();
            if offset >= len {
                offset -= len;
                continue;
            }
            file.seek(SeekFrom::Start(offset))?;
            offset = 0;
            let left = LOG_READ_MAX_BYTES - out.len() as u64;
            file.take(left).read_to_end(&mut out)?;
            if out.len() as u64 >= LOG_READ_MAX_BYTES {
                break;
            }
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_twice_is_kept_once_and_attempts_follow_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let logs = Logs::open(dir.path().join("logs")).unwrap();
        logs.append(1, 1, 0, b"hello ").unwrap();
        logs.append(1, 1, 0, b"hello ").unwrap();
        logs.append(1, 1, 3, b"lo world").unwrap();
        logs.append(1, 2, 0, b"again").unwrap();
        logs.append(2, 1, 0, b"other").unwrap();
        assert_eq!(logs.read(1, 2, 0).unwrap(), b"hello worldagain");
        assert_eq!(logs.read(1, 2, 6).unwrap(), b"worldagain");
        assert_eq!(logs.read(1, 2, 13).unwrap(), b"ain");
        assert_eq!(logs.read(1, 2, 16).unwrap(), b"");
        assert_eq!(logs.read(3, 1, 0).unwrap(), b"");
        assert!(lock(&logs.writing).is_empty());
    }

    #[test]
    fn a_gap_is_filled_and_the_limit_cuts_once() {
        let dir = tempfile::tempdir().unwrap();
        let logs = Logs::open(dir.path().into()).unwrap();
        logs.append(1, 1, 2, b"x").unwrap();
        assert_eq!(logs.read(1, 1, 0).unwrap(), b"\n\nx");
        let at = LOG_MAX_BYTES - 3;
        logs.append(2, 1, at, b"abcdef").unwrap();
        logs.append(2, 1, at + 6, b"more").unwrap();
        logs.append(2, 1, u64::MAX, b"more").unwrap();
        let end = logs.read(2, 1, at).unwrap();
        assert_eq!(end, [b"abc", CUT].concat());
    }

    #[test]
    fn an_answer_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let logs = Logs::open(dir.path().into()).unwrap();
        logs.append(1, 1, 0, &vec![b'a'; LOG_READ_MAX_BYTES as usize - 1]).unwrap();
        logs.append(1, 2, 0, b"bcd").unwrap();
        let all = logs.read(1, 2, 0).unwrap();
        assert_eq!(all.len() as u64, LOG_READ_MAX_BYTES);
        assert_eq!(logs.read(1, 2, all.len() as u64).unwrap(), b"cd");
    }
}
