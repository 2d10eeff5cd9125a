//! Artifacts to try the store on.
#![allow(dead_code, unreachable_pub)]

use std::{
    fs,
    path::{Path, PathBuf},
};

use shoal_pieces::Encoder;
use shoal_proto::{
    PieceIndex,
    manifest::{Codec, EncodingIndex, PieceSize},
};
use shoal_store::{Artifact, CutOptions, Store, StoreConfig, cut};
use tempfile::TempDir;

pub const PIECE: usize = 256 << 10;

/// `len` bytes that depend on the seed alone; every other piece is of text-like bytes that compress.
pub fn content(len: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    for piece in bytes.chunks_mut(PIECE).step_by(2) {
        piece.iter_mut().for_each(|byte| *byte = b"etaoinsh"[usize::from(*byte) % 8]);
    }
    bytes
}

/// A store in a directory of its own, which can be closed and opened again.
pub struct Place {
    pub dir: TempDir,
    pub config: StoreConfig,
}

impl Place {
    pub fn new() -> Self {
        let config = StoreConfig { encoded_cache_bytes: 64 << 20, reserve_free_bytes: 0 };
        Self { dir: tempfile::tempdir().unwrap(), config }
    }

    pub fn root(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    pub fn open(&self) -> Store {
        Store::open(&self.root(), self.config).unwrap()
    }

    /// A file of the artifact's directory.
    pub fn file(&self, index: &EncodingIndex, name: &str) -> PathBuf {
        self.root().join("artifacts").join(index.manifest.artifact.to_string()).join(name)
    }
}

/// The index of `bytes` in pieces of 256 KiB.
pub fn index_of(bytes: &[u8]) -> EncodingIndex {
    index_with(bytes, CutOptions { piece_size: Some(PieceSize::MIN), ..Default::default() })
}

pub fn index_with(bytes: &[u8], options: CutOptions) -> EncodingIndex {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    fs::write(&path, bytes).unwrap();
    cut(&path, &dir.path().join("out"), &options, |_| {}).unwrap().index
}

pub fn raw<'a>(index: &EncodingIndex, bytes: &'a [u8], piece: u32) -> &'a [u8] {
    let range = index.manifest.piece_range(PieceIndex(piece));
    &bytes[range.start as usize..range.end as usize]
}

/// Writes a piece as an agent does: raw, with the form in which it came.
pub fn put(artifact: &Artifact, bytes: &[u8], piece: u32) {
    let raw = raw(artifact.index(), bytes, piece);
    let mut out = Vec::new();
    let codec = Encoder::new(1).encode(raw, &mut out);
    let stored = if codec == Codec::Raw { raw } else { &out };
    artifact.write(PieceIndex(piece), raw, Some((codec, stored))).unwrap();
}

pub fn held(artifact: &Artifact) -> Vec<u32> {
    artifact.have().iter().collect()
}

/// Flips a byte of a file in place, without changing anything else about it.
pub fn damage(path: &Path, at: u64) {
    use std::os::unix::fs::FileExt;
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[!byte[0]], at).unwrap();
}
