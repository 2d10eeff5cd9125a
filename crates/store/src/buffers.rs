//! Buffers of pieces, used again: memory that is fetched from the kernel anew for each piece costs more than hashing it.

use std::{
    fmt,
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// What is kept at rest, in bytes.
const KEPT_BYTES: usize = 16 << 20;

/// Where buffers lie between two uses. Cheap to clone.
#[derive(Clone, Default)]
pub struct Buffers(Arc<Mutex<Vec<Vec<u8>>>>);

impl Buffers {
    /// A buffer. It holds whatever its last user left.
    #[must_use]
    pub fn take(&self) -> Buffer {
        Buffer { bytes: self.kept().pop().unwrap_or_default(), home: self.clone() }
    }

    fn kept(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Buffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffers({})", self.kept().len())
    }
}

/// Bytes that go back where they came from when they are dropped.
pub struct Buffer {
    bytes: Vec<u8>,
    home: Buffers,
}

impl Deref for Buffer {
    type Target = Vec<u8>;

    fn deref(&self) -> &Vec<u8> {
        &self.bytes
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({})", self.bytes.len())
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        let mut kept = self.home.kept();
        let held: usize = kept.iter().map(Vec::capacity).sum();
        if bytes.capacity() > 0 && held + bytes.capacity() <= KEPT_BYTES {
            kept.push(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[test]
    fn a_buffer_comes_back_once_its_last_reader_is_done() {
        let buffers = Buffers::default();
        let mut buffer = buffers.take();
        buffer.extend_from_slice(b"a piece");
        let at = buffer.as_ptr();
        let sent = Bytes::from_owner(buffer);
        let waits = sent.slice(2..);
        drop(sent);
        assert_eq!(buffers.take().capacity(), 0, "the other one is still read");
        assert_eq!(waits, "piece");
        drop(waits);
        assert_eq!(buffers.take().as_ptr(), at);
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let buffers = Buffers::default();
        let taken: Vec<_> = (0..9)
            .map(|_| {
                let mut buffer = buffers.take();
                buffer.reserve_exact(4 << 20);
                buffer
            })
            .collect();
        drop(taken);
        assert_eq!(buffers.kept().len(), 4);
    }
}
