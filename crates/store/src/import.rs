//! Cutting a local file into the store.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    os::unix::fs::{FileExt, PermissionsExt},
    path::Path,
    sync::Arc,
};

use rustix::fs::ioctl_ficlone;
use shoal_pieces::seal_index;
use shoal_proto::{
    ArtifactId, PieceIndex,
    manifest::{Codec, EncodingIndex, Location, PieceSize},
};

use crate::{
    artifact::{Artifact, DATA_NAME},
    cut::{self, Job, Sink},
    disk,
    error::{At, CutError, StoreError},
    ledger::FileIdentity,
    parts::INDEX_NAME,
    store::{Shared, Store},
};

/// Puts raw pieces in the staged file, unless they are there already, and encoded ones in the cache.
struct Staging<'a> {
    shared: &'a Shared,
    /// The name under which encoded pieces are kept until the artifact's id is known.
    provisional: ArtifactId,
    copy_to: Option<(&'a File, &'a Path)>,
    piece_size: PieceSize,
}

impl Sink for Staging<'_> {
    fn raw(&self, index: PieceIndex, raw: &[u8]) -> Result<(), CutError> {
        let Some((file, path)) = self.copy_to else { return Ok(()) };
        file.write_all_at(raw, u64::from(index.0) * self.piece_size.bytes()).cutting(path)
    }

    fn stored(
        &self,
        index: PieceIndex,
        codec: Codec,
        _: Location,
        stored: &[u8],
    ) -> Result<(), CutError> {
        if codec == Codec::Zstd {
            self.shared.cache.put(&self.provisional, index, stored);
        }
        Ok(())
    }
}

impl Store {
    /// Cuts the file `path` into the store, whole and ready to seed, with the permissions that it has. Where
    /// the file system can, the store's file shares its blocks (a reflink); else it is copied in the same single
    /// pass that hashes it. It is never a hard link: the store's file must not change with the original.
    /// Encoded pieces go to the bounded cache only. When the artifact is here already, what is here is
    /// completed where it has to be, and keeps its index.
    ///
    /// # Errors
    /// [`StoreError::NoSpace`] when the disk has no room, [`StoreError::Cut`] when the file cannot be cut, else
    /// when the disk fails.
    pub fn import(
        &self,
        path: &Path,
        piece_size: Option<PieceSize>,
        level: i32,
        progress: impl Fn(u64) + Sync,
    ) -> Result<Arc<Artifact>, StoreError> {
        let (dir, number) = self.shared.stage()?;
        // No artifact is known to have such an id: 24 bytes of it are ones.
        let mut provisional = ArtifactId([0xff; 32]);
        provisional.0[24..].copy_from_slice(&number.to_be_bytes());
        let imported = self.stage_file(path, &dir, provisional, piece_size, level, &progress);
        let adopted = imported.and_then(|index| self.adopt(&dir, provisional, &index));
        self.shared.cache.forget(&provisional);
        disk::remove(&dir).at(&dir)?;
        adopted
    }

    /// Makes a directory that could be the artifact's, durably.
    fn stage_file(
        &self,
        source: &Path,
        dir: &Path,
        provisional: ArtifactId,
        piece_size: Option<PieceSize>,
        level: i32,
        progress: &(impl Fn(u64) + Sync),
    ) -> Result<EncodingIndex, StoreError> {
        let (original, unchanged) = cut::open(source)?;
        let size_bytes = unchanged.size_bytes;
        let piece_size = piece_size.unwrap_or_else(|| PieceSize::for_artifact(size_bytes));
        let path = dir.join(DATA_NAME);
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).open(&path).at(&path)?;
        // A clone is a snapshot: cut that, and what happens to the original no longer matters.
        let cloned = ioctl_ficlone(&file, &original).is_ok()
            && file.metadata().at(&path)?.len() == size_bytes;
        if !cloned {
            file.set_len(0).at(&path)?;
            self.shared.preallocate(&file, size_bytes, &path)?;
        }
        let (from, from_path) = if cloned { (&file, &*path) } else { (&original, source) };
        let job = Job { file: from, path: from_path, size_bytes, piece_size, level, threads: None };
        let copy_to = (!cloned).then_some((&file, &*path));
        let sink = Staging { shared: &self.shared, provisional, copy_to, piece_size };
        let index = cut::run(&job, &sink, progress)?;
        if !cloned {
            unchanged.check(&original, source)?;
        }
        let mode = original.metadata().at(source)?.permissions().mode() & 0o777 | 0o400;
        file.set_permissions(Permissions::from_mode(mode)).at(&path)?;
        file.sync_all().at(&path)?;
        let (bytes, _) = seal_index(&index)?;
        disk::write_atomic(dir, INDEX_NAME, &bytes).at(dir)?;
        Ok(index)
    }

    /// Takes a staged directory in as the artifact's, or completes the one that is there.
    fn adopt(
        &self,
        staged: &Path,
        provisional: ArtifactId,
        index: &EncodingIndex,
    ) -> Result<Arc<Artifact>, StoreError> {
        let artifact = index.manifest.artifact;
        if let Some(here) = self.get(&artifact) {
            return self.complete(staged, here);
        }
        {
            let mut stripe = self.stripe(&artifact);
            let dir = self.shared.dir_of(&artifact);
            // What is there could not be opened, so nobody has it open.
            stripe.remove(&artifact);
            disk::remove(&dir).at(&dir)?;
            self.shared.ledger.forget(&artifact);
            fs::rename(staged, &dir).at(&dir)?;
            let parent = self.shared.artifacts_dir();
            disk::sync_dir(parent).at(parent)?;
            let data = dir.join(DATA_NAME);
            let identity = FileIdentity::of(&fs::metadata(&data).at(&data)?);
            self.shared.ledger.record_whole(&artifact, identity);
            self.shared.cache.rename(&provisional, &artifact);
        }
        self.open_artifact(index)
    }

    /// Fills what is missing in an artifact that is here from a staged file.
    fn complete(&self, staged: &Path, here: Arc<Artifact>) -> Result<Arc<Artifact>, StoreError> {
        if here.is_complete() {
            return Ok(here);
        }
        let path = staged.join(DATA_NAME);
        let file = File::open(&path).at(&path)?;
        let manifest = here.manifest();
        let have = here.have();
        let mut raw = Vec::new();
        for index in (0..manifest.piece_count()).map(PieceIndex) {
            if !have.contains(index.0) {
                raw.resize(manifest.piece_len(index), 0);
                disk::read_at(&file, &mut raw, manifest.piece_range(index).start).at(&path)?;
                here.write(index, &raw, None)?;
            }
        }
        here.finish(file.metadata().at(&path)?.permissions().mode())?;
        Ok(here)
    }
}
