//! A job's log: one file with a limit, which is read from while it is written.

use std::{
    fs::File,
    io::{self, Write as _},
    os::unix::fs::FileExt as _,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;

/// The most of a line that is kept for a failure's reason, in bytes.
const LINE_MAX_BYTES: usize = 200;

/// A job's log. Clones are one log.
#[derive(Clone)]
pub(crate) struct BuildLog {
    inner: Arc<Mutex<Inner>>,
    file: Arc<File>,
    limit_bytes: u64,
}

#[derive(Default)]
struct Inner {
    len: u64,
    dropped: u64,
    /// The last line that was not empty, and the one that is being written.
    last: Vec<u8>,
    line: Vec<u8>,
}

impl BuildLog {
    /// Makes the file; what comes after `limit_bytes` is counted and not kept.
    pub(crate) fn create(path: &Path, limit_bytes: u64) -> io::Result<Self> {
        let file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
        Ok(Self { inner: Arc::default(), file: Arc::new(file), limit_bytes })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn append(&self, inner: &mut Inner, bytes: &[u8]) {
        match (&*self.file).write_all(bytes) {
            Ok(()) => inner.len += bytes.len() as u64,
            // A full disk must not end the build; what is missing is said at the end.
            Err(_) => inner.dropped += bytes.len() as u64,
        }
    }

    /// Takes output of the command.
    pub(crate) fn output(&self, bytes: &[u8]) {
        let mut inner = self.lock();
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            let text = part.strip_suffix(b"\n").unwrap_or(part);
            let room = LINE_MAX_BYTES.saturating_sub(inner.line.len()).min(text.len());
            inner.line.extend_from_slice(&text[..room]);
            if text.len() < part.len() {
                let line = std::mem::take(&mut inner.line);
                if !line.trim_ascii().is_empty() {
                    inner.last = line;
                }
            }
        }
        let room = self.limit_bytes.saturating_sub(inner.len);
        let kept = usize::try_from(room).unwrap_or(usize::MAX).min(bytes.len());
        self.append(&mut inner, &bytes[..kept]);
        inner.dropped += (bytes.len() - kept) as u64;
    }

    /// Adds a line of the worker's own; these are few, and always kept.
    pub(crate) fn note(&self, text: &str) {
        let mut inner = self.lock();
        let break_before = if inner.line.is_empty() { "" } else { "\n" };
        inner.line.clear();
        self.append(&mut inner, format!("{break_before}shoal: {text}\n").as_bytes());
    }

    /// Says what is missing, if anything is.
    pub(crate) fn close(&self) {
        let dropped = self.lock().dropped;
        if dropped > 0 {
            let limit = self.limit_bytes >> 10;
            self.note(&format!(
                "the log is longer than {limit} KiB: {dropped} bytes were not kept"
            ));
        }
    }

    /// The last line of the command's output that was not empty, without what a terminal would hide.
    pub(crate) fn last_line(&self) -> String {
        let inner = self.lock();
        let line =
            if inner.line.trim_ascii().is_empty() { &inner.last } else { &inner.line };
        let text = String::from_utf8_lossy(line);
        text.chars().filter(|c| !c.is_control()).collect::<String>().trim().into()
    }

    /// What there is from `offset` on, at most `max` bytes; empty when there is no more.
    pub(crate) fn read(&self, offset: u64, max: usize) -> io::Result<Bytes> {
        let len = self.lock().len.saturating_sub(offset);
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(max).min(max)];
        self.file.read_exact_at(&mut bytes, offset)?;
        Ok(bytes.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(limit: u64) -> (tempfile::TempDir, BuildLog) {
        let dir = tempfile::tempdir().unwrap();
        let log = BuildLog::create(&dir.path().join("log"), limit).unwrap();
        (dir, log)
    }

    #[test]
    fn a_long_log_is_cut_and_says_so_and_the_last_line_is_known() {
        let (_dir, log) = log(10);
        log.output(b"first li");
        log.output(b"ne\nsecond\n\nthe \x1blast");
        assert_eq!(log.read(0, 100).unwrap(), "first line");
        assert_eq!(log.last_line(), "the last");
        log.close();
        let all = log.read(0, 1_000).unwrap();
        let text = std::str::from_utf8(&all).unwrap();
        assert!(text.ends_with("shoal: the log is longer than 0 KiB: 18 bytes were not kept\n"));
        log.output(b"\n\n");
        assert_eq!(log.read(all.len() as u64, 10).unwrap(), "");
    }

    #[test]
    fn it_is_read_in_steps_and_notes_stand_on_lines_of_their_own() {
        let (_dir, log) = log(1_000);
        log.output(b"no newline");
        log.note("a note");
        let mut text = Vec::new();
        loop {
            let next = log.read(text.len() as u64, 7).unwrap();
            if next.is_empty() {
                break;
            }
            text.extend_from_slice(&next);
        }
        assert_eq!(text, b"no newline\nshoal: a note\n");
        log.output(&[b'x'; 1_000]);
        assert_eq!(log.last_line().len(), LINE_MAX_BYTES);
    }
}
