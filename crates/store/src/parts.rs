//! Cutting a file into the part objects and the index of an encoding.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    sync::Mutex,
};

use bytes::Bytes;
use shoal_pieces::{LEVEL_DEFAULT, seal_index};
use shoal_proto::{
    EncodingId, PieceIndex,
    manifest::{Codec, EncodingIndex, Location, PieceSize},
};

use crate::{
    cut::{self, Job, Sink},
    disk::{self, lock},
    error::{At, CutError},
};

/// The name of the index object, in a cut's directory as in a bucket.
pub const INDEX_NAME: &str = "index";

/// The name of part object `number`, in a cut's directory as in a bucket.
#[must_use]
pub fn part_name(number: u32) -> String {
    format!("part-{number:05}")
}

/// How to cut a file.
#[derive(Debug, Clone, Copy)]
pub struct CutOptions {
    /// The piece size; none: [`PieceSize::for_artifact`].
    pub piece_size: Option<PieceSize>,
    /// The zstd level, held to 1..=9.
    pub level: i32,
    /// How many threads; none: one more than there are cores, as one is often writing. Fewer are used where
    /// memory would pass about 150 MiB.
    pub threads: Option<usize>,
}

impl Default for CutOptions {
    fn default() -> Self {
        Self { piece_size: None, level: LEVEL_DEFAULT, threads: None }
    }
}

/// What a file was cut into.
#[derive(Debug, Clone)]
pub struct Cut {
    /// The index: manifest, stored pieces, parts.
    pub index: EncodingIndex,
    /// The index as it is stored.
    pub index_bytes: Bytes,
    /// The hash of `index_bytes`.
    pub encoding: EncodingId,
}

struct PartFiles<'a> {
    dir: &'a Path,
    /// The part that is being written and its number.
    open: Mutex<Option<(u32, File)>>,
}

impl PartFiles<'_> {
    fn path(&self, part: u32) -> PathBuf {
        self.dir.join(part_name(part))
    }
}

impl Sink for PartFiles<'_> {
    fn raw(&self, _: PieceIndex, _: &[u8]) -> Result<(), CutError> {
        Ok(())
    }

    fn stored(
        &self,
        _: PieceIndex,
        _: Codec,
        place: Location,
        stored: &[u8],
    ) -> Result<(), CutError> {
        let path = self.path(place.part);
        let mut open = lock(&self.open);
        let file = match &mut *open {
            Some((number, file)) if *number == place.part => file,
            open => &mut open.insert((place.part, File::create(&path).cutting(&path)?)).1,
        };
        file.write_all(stored).cutting(&path)
    }
}

/// Cuts the file `path` into `out_dir/part-00000` and so on, and last `out_dir/index`. The file is read once, on
/// all cores; memory does not depend on its length. `progress` is told how many raw bytes are done, rising,
/// from any thread. Parts and index that an earlier cut left in `out_dir` are removed first. Nothing is
/// synced: the parts are on their way to a bucket, and a crash means another cut.
///
/// # Errors
/// [`CutError`] when the file cannot be read, is changed meanwhile or has too many pieces, or the parts
/// cannot be written.
pub fn cut(
    path: &Path,
    out_dir: &Path,
    options: &CutOptions,
    progress: impl Fn(u64) + Sync,
) -> Result<Cut, CutError> {
    let (file, unchanged) = cut::open(path)?;
    let size_bytes = unchanged.size_bytes;
    prepare(out_dir).cutting(out_dir)?;
    let job = Job {
        file: &file,
        path,
        size_bytes,
        piece_size: options.piece_size.unwrap_or_else(|| PieceSize::for_artifact(size_bytes)),
        level: options.level,
        threads: options.threads,
    };
    let sink = PartFiles { dir: out_dir, open: Mutex::new(None) };
    let index = cut::run(&job, &sink, &progress)?;
    unchanged.check(&file, path)?;
    let (index_bytes, encoding) = seal_index(&index)?;
    let index_path = out_dir.join(INDEX_NAME);
    fs::write(&index_path, &index_bytes).cutting(&index_path)?;
    Ok(Cut { index, index_bytes: index_bytes.into(), encoding })
}

/// Makes the directory, and takes out of it what an earlier cut left.
fn prepare(dir: &Path) -> std::io::Result<()> {
    fs::create_dir_all(dir)?;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == INDEX_NAME || name.to_string_lossy().starts_with("part-") {
            disk::remove(&entry.path())?;
        }
    }
    Ok(())
}
