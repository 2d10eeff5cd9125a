//! Finding out by hashing which pieces a file holds.

use std::{
    fs::File,
    ops::Range,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use shoal_pieces::PieceHasher;
use shoal_proto::{Bitmap, PieceIndex, manifest::Manifest};

use crate::{
    cut::READ_BYTES,
    disk::{self, lock},
};

/// The most threads that hash: the disk is the limit beyond.
const THREADS_MAX: usize = 4;

/// Whether piece `index` of the file has its hash. What cannot be read does not; `buffer` is scratch.
pub(crate) fn holds(
    file: &File,
    manifest: &Manifest,
    index: PieceIndex,
    buffer: &mut Vec<u8>,
) -> bool {
    let Some(want) = manifest.piece_hashes.get(index.0 as usize) else { return false };
    let mut hasher = PieceHasher::new(manifest.size_bytes, manifest.piece_size, index);
    let Range { start: mut at, end } = manifest.piece_range(index);
    buffer.resize(READ_BYTES, 0);
    while at < end {
        let len = (end - at).min(READ_BYTES as u64) as usize;
        let block = &mut buffer[..len];
        if disk::read_at(file, block, at).is_err() {
            return false;
        }
        hasher.update(block);
        at += len as u64;
    }
    hasher.finish() == *want
}

/// The pieces, among those not `known`, that the file holds, ascending. In a file that was preallocated and
/// written piece by piece a hole is what was never written, and is not read; in any other (`holes_count`) it may
/// be a run of zeros.
pub(crate) fn find(
    file: &File,
    manifest: &Manifest,
    known: &Bitmap,
    holes_count: bool,
) -> Vec<u32> {
    let data = match holes_count {
        true => vec![Range { start: 0, end: manifest.size_bytes }],
        false => disk::data_ranges(file, manifest.size_bytes),
    };
    let written = |piece: u32| {
        let range = manifest.piece_range(PieceIndex(piece));
        let at = data.partition_point(|data| data.end <= range.start);
        data.get(at).is_some_and(|data| data.start <= range.start && range.end <= data.end)
    };
    let candidates: Vec<u32> = (0..manifest.piece_count())
        .filter(|&piece| !known.contains(piece) && written(piece))
        .collect();
    let threads = thread::available_parallelism()
        .map_or(1, usize::from)
        .min(THREADS_MAX)
        .min(candidates.len());
    let next = AtomicUsize::new(0);
    let found = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut buffer = Vec::new();
                while let Some(&piece) = candidates.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if holds(file, manifest, PieceIndex(piece), &mut buffer) {
                        lock(&found).push(piece);
                    }
                }
            });
        }
    });
    let mut found = found.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    found.sort_unstable();
    found
}
