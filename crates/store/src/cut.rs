//! Cutting: one pass over a file, on all cores, in bounded memory.
//!
//! Each thread takes two buffers from a pool, claims the next piece, reads it a block at a time, hashing each
//! block while it is in the cache, and encodes it. The buffer with the stored form is then laid down, and
//! whoever finds the next piece in order there carries on with it: places it in its part, hashes it into the
//! part's hash, hands it to the [`Sink`]. So parts are hashed as they are written, nothing is read twice, and no
//! thread waits for another unless the pool is empty. It cannot stay so: the thread with the next piece in
//! order took its buffers before it claimed that piece.

use std::{
    collections::BTreeMap,
    fs::File,
    path::Path,
    sync::{Condvar, Mutex, PoisonError},
    thread,
};

use blake3::Hasher;
use shoal_pieces::{Encoder, PieceHasher, merge};
use shoal_proto::{
    PieceHash, PieceIndex,
    manifest::{
        Codec, EncodingIndex, Location, Manifest, PART_MAX_BYTES, PIECES_MAX, Part, PieceSize,
        StoredPiece,
    },
};

use crate::{
    disk::{self, lock},
    error::{At, CutError},
};

/// What all buffers and encoders together may take, in bytes: under the 200 MiB that a process has.
const MEMORY_MAX_BYTES: u64 = 144 << 20;

/// zstd's tables for one thread, in bytes, at levels up to [`LEVEL_LIGHT_MAX`] and above it.
const ENCODER_LIGHT_BYTES: u64 = 3 << 20;
const ENCODER_HEAVY_BYTES: u64 = 24 << 20;
const LEVEL_LIGHT_MAX: i32 = 3;

/// Buffers for each thread, of a piece each: the raw piece, its encoded form, and at least one piece that waits
/// for its turn. With more of those a slow write of one piece holds up nobody, so up to four are taken where they
/// fit.
const BUFFERS_PER_THREAD_MIN: u64 = 3;
const BUFFERS_PER_THREAD_MAX: u64 = 6;

/// A piece is read in blocks of this many bytes, so that it is hashed in the second-level cache.
pub(crate) const READ_BYTES: usize = 256 << 10;

/// What to cut and how.
pub(crate) struct Job<'a> {
    pub(crate) file: &'a File,
    pub(crate) path: &'a Path,
    pub(crate) size_bytes: u64,
    pub(crate) piece_size: PieceSize,
    pub(crate) level: i32,
    pub(crate) threads: Option<usize>,
}

/// Where the pieces go.
pub(crate) trait Sink: Sync {
    /// Takes a raw piece; from any thread, in any order.
    fn raw(&self, index: PieceIndex, raw: &[u8]) -> Result<(), CutError>;

    /// Takes a stored piece; in order, one at a time.
    fn stored(
        &self,
        index: PieceIndex,
        codec: Codec,
        place: Location,
        stored: &[u8],
    ) -> Result<(), CutError>;
}

/// A piece that is hashed and encoded and waits for its turn.
struct Encoded {
    hash: PieceHash,
    codec: Codec,
    stored: Vec<u8>,
}

struct Shared<'a, S, P> {
    job: &'a Job<'a>,
    count: u32,
    sink: &'a S,
    progress: &'a P,
    state: Mutex<State>,
    /// Signals that buffers were returned, or that a thread failed.
    returned: Condvar,
}

#[derive(Default)]
struct State {
    /// Buffers that nobody uses.
    pool: Vec<Vec<u8>>,
    /// The next piece to read.
    claim: u32,
    ready: BTreeMap<u32, Encoded>,
    /// What was placed so far; taken out by the thread that is placing.
    placed: Option<Placed>,
    error: Option<CutError>,
    stopped: bool,
}

/// The pieces placed, in order.
struct Placed {
    hashes: Vec<PieceHash>,
    pieces: Vec<StoredPiece>,
    parts: Vec<Part>,
    hasher: Hasher,
    /// Bytes of the part that is being filled.
    part_len: u64,
}

impl Placed {
    fn place(&mut self, encoded: &Encoded) -> Location {
        let len = encoded.stored.len() as u32;
        if self.part_len + u64::from(len) > PART_MAX_BYTES {
            self.end_part();
        }
        let place = Location { part: self.parts.len() as u32, offset: self.part_len, len };
        self.hasher.update(&encoded.stored);
        self.part_len += u64::from(len);
        self.hashes.push(encoded.hash);
        self.pieces.push(StoredPiece { codec: encoded.codec, len });
        place
    }

    fn end_part(&mut self) {
        if self.part_len > 0 {
            let hash = *self.hasher.finalize().as_bytes();
            self.parts.push(Part { len: self.part_len, hash });
            self.hasher.reset();
            self.part_len = 0;
        }
    }
}

/// Stops the other threads when one panics, so that none waits for it forever.
struct StopOnPanic<'a, S: Sink, P: Fn(u64) + Sync>(&'a Shared<'a, S, P>);

impl<S: Sink, P: Fn(u64) + Sync> Drop for StopOnPanic<'_, S, P> {
    fn drop(&mut self) {
        if thread::panicking() {
            lock(&self.0.state).stopped = true;
            self.0.returned.notify_all();
        }
    }
}

/// How many threads to cut with, and how many buffers they share: as many threads as asked for, or one more
/// than there are cores, because one of them is often writing; all within the memory.
fn threads_and_buffers(job: &Job<'_>) -> (usize, usize) {
    let encoder =
        if job.level <= LEVEL_LIGHT_MAX { ENCODER_LIGHT_BYTES } else { ENCODER_HEAVY_BYTES };
    let piece = job.piece_size.bytes();
    let fit = MEMORY_MAX_BYTES / (BUFFERS_PER_THREAD_MIN * piece + encoder);
    let cores = || thread::available_parallelism().map_or(1, usize::from);
    let threads = job.threads.unwrap_or_else(|| cores() + 1).min(fit as usize).max(1);
    let count = threads as u64;
    let room = MEMORY_MAX_BYTES.saturating_sub(count * encoder) / piece;
    let buffers = room.clamp(count * BUFFERS_PER_THREAD_MIN, count * BUFFERS_PER_THREAD_MAX);
    (threads, buffers as usize)
}

/// Cuts a file, handing every piece to `sink`, and `progress` the count of raw bytes done so far, rising.
pub(crate) fn run<S: Sink, P: Fn(u64) + Sync>(
    job: &Job<'_>,
    sink: &S,
    progress: &P,
) -> Result<EncodingIndex, CutError> {
    let pieces = job.size_bytes.div_ceil(job.piece_size.bytes());
    let count = u32::try_from(pieces).ok().filter(|&count| count <= PIECES_MAX);
    let count = count.ok_or(CutError::TooManyPieces { pieces })?;
    let (threads, buffers) = threads_and_buffers(job);
    let threads = threads.min(count as usize);
    let placed = Placed {
        hashes: Vec::with_capacity(count as usize),
        pieces: Vec::with_capacity(count as usize),
        parts: Vec::new(),
        hasher: Hasher::new(),
        part_len: 0,
    };
    let state = State { pool: vec![Vec::new(); buffers], placed: Some(placed), ..State::default() };
    let shared =
        Shared { job, count, sink, progress, state: Mutex::new(state), returned: Condvar::new() };
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let _stop = StopOnPanic(&shared);
                if let Err(error) = shared.work() {
                    shared.stop(error);
                }
            });
        }
    });
    let state = shared.state.into_inner().unwrap_or_else(PoisonError::into_inner);
    if let Some(error) = state.error {
        return Err(error);
    }
    // Absent only after a panic, which the scope has passed on.
    let mut placed = state.placed.ok_or_else(|| CutError::Changed(job.path.to_owned()))?;
    placed.end_part();
    let artifact = merge(&placed.hashes, job.piece_size, job.size_bytes);
    Ok(EncodingIndex {
        manifest: Manifest {
            artifact,
            size_bytes: job.size_bytes,
            piece_size: job.piece_size,
            piece_hashes: placed.hashes,
        },
        pieces: placed.pieces,
        parts: placed.parts,
    })
}

impl<S: Sink, P: Fn(u64) + Sync> Shared<'_, S, P> {
    fn stop(&self, error: CutError) {
        let mut state = lock(&self.state);
        state.error.get_or_insert(error);
        state.stopped = true;
        self.returned.notify_all();
    }

    fn work(&self) -> Result<(), CutError> {
        let mut encoder = Encoder::new(self.job.level);
        while let Some((index, raw, out)) = self.claim() {
            let encoded = self.encode(&mut encoder, index, raw, out)?;
            self.lay_down(index, encoded)?;
        }
        Ok(())
    }

    /// Two buffers and the next piece; none when there is nothing left to do.
    fn claim(&self) -> Option<(PieceIndex, Vec<u8>, Vec<u8>)> {
        let mut state = lock(&self.state);
        loop {
            if state.stopped || state.claim == self.count {
                return None;
            }
            if state.pool.len() >= 2 {
                let (raw, out) = (state.pool.pop()?, state.pool.pop()?);
                let index = PieceIndex(state.claim);
                state.claim += 1;
                if state.claim == self.count {
                    self.returned.notify_all();
                }
                return Some((index, raw, out));
            }
            state = self.returned.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Reads, hashes and encodes one piece; the buffer that is not needed any more goes back.
    fn encode(
        &self,
        encoder: &mut Encoder,
        index: PieceIndex,
        mut raw: Vec<u8>,
        mut out: Vec<u8>,
    ) -> Result<Encoded, CutError> {
        let job = self.job;
        let start = u64::from(index.0) * job.piece_size.bytes();
        let len = (job.size_bytes - start).min(job.piece_size.bytes()) as usize;
        if raw.capacity() < len {
            raw.reserve_exact(len - raw.len());
        }
        raw.resize(len, 0);
        let mut hasher = PieceHasher::new(job.size_bytes, job.piece_size, index);
        let mut at = start;
        for block in raw.chunks_mut(READ_BYTES) {
            disk::read_at(job.file, block, at).map_err(|source| match source.kind() {
                std::io::ErrorKind::UnexpectedEof => CutError::Changed(job.path.to_owned()),
                _ => CutError::Io { path: job.path.to_owned(), source },
            })?;
            hasher.update(block);
            at += block.len() as u64;
        }
        self.sink.raw(index, &raw)?;
        let codec = encoder.encode(&raw, &mut out);
        let (stored, spare) = match codec {
            Codec::Raw => (raw, out),
            Codec::Zstd => (out, raw),
        };
        self.give_back(spare);
        Ok(Encoded { hash: hasher.finish(), codec, stored })
    }

    fn give_back(&self, buffer: Vec<u8>) {
        lock(&self.state).pool.push(buffer);
        self.returned.notify_all();
    }

    /// Lays a piece down, and places all that are next in order unless another thread is at it.
    fn lay_down(&self, index: PieceIndex, encoded: Encoded) -> Result<(), CutError> {
        let mut state = lock(&self.state);
        state.ready.insert(index.0, encoded);
        loop {
            if state.stopped {
                return Ok(());
            }
            let Some(mut placed) = state.placed.take() else { return Ok(()) };
            let next = placed.hashes.len() as u32;
            let Some(encoded) = state.ready.remove(&next) else {
                state.placed = Some(placed);
                return Ok(());
            };
            drop(state);
            let place = placed.place(&encoded);
            let index = PieceIndex(next);
            self.sink.stored(index, encoded.codec, place, &encoded.stored)?;
            let done = u64::from(next + 1) * self.job.piece_size.bytes();
            (self.progress)(done.min(self.job.size_bytes));
            state = lock(&self.state);
            state.pool.push(encoded.stored);
            state.placed = Some(placed);
            self.returned.notify_all();
        }
    }
}

/// Opens a file to be cut, and gives its length and what to compare it with afterwards.
pub(crate) fn open(path: &Path) -> Result<(File, Unchanged), CutError> {
    let file = File::open(path).cutting(path)?;
    let metadata = file.metadata().cutting(path)?;
    if !metadata.is_file() {
        return Err(CutError::NotAFile(path.to_owned()));
    }
    let unchanged =
        Unchanged { size_bytes: metadata.len(), modified: metadata.modified().cutting(path)? };
    Ok((file, unchanged))
}

/// What a file was when it was opened.
pub(crate) struct Unchanged {
    pub(crate) size_bytes: u64,
    modified: std::time::SystemTime,
}

impl Unchanged {
    /// Checks that nobody wrote to the file meanwhile: what was cut would be no state that it ever had.
    pub(crate) fn check(&self, file: &File, path: &Path) -> Result<(), CutError> {
        let metadata = file.metadata().cutting(path)?;
        let modified = metadata.modified().cutting(path)?;
        if metadata.len() != self.size_bytes || modified != self.modified {
            return Err(CutError::Changed(path.to_owned()));
        }
        Ok(())
    }
}
