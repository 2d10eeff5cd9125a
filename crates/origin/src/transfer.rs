//! Whole encodings: from a local directory into a bucket, and from bucket to bucket.

use std::{
    collections::BTreeMap,
    fs::File,
    path::{Path as FsPath, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt, stream};
use shoal_proto::{
    ArtifactId, EncodingId,
    manifest::{EncodingIndex, Part},
};

use crate::{
    bucket::{Bucket, missing, open_index, part_name},
    error::OriginError,
    read::read_file,
    retry::retried,
    write::{CHUNK_BYTES, READ_BUDGET, verify},
};

/// How many parts of one encoding move at once: enough to cover a bucket's latency; the memory is
/// bounded by [`crate::CHUNKS_READ_MAX`].
pub const PARTS_IN_PARALLEL: usize = 4;

/// What a transfer did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CopyStats {
    /// Part bytes that were written.
    pub bytes: u64,
    /// Part bytes that were there already.
    pub skipped_bytes: u64,
}

/// Counts the bytes that are through, and tells the caller. A part that is tried again is taken off.
struct Progress<F> {
    done_bytes: AtomicU64,
    tell: F,
}

impl<F: Fn(u64) + Send + Sync> Progress<F> {
    fn new(done_bytes: u64, tell: F) -> Self {
        tell(done_bytes);
        Self { done_bytes: done_bytes.into(), tell }
    }

    fn add(&self, bytes: u64) {
        (self.tell)(self.done_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes);
    }

    fn take_off(&self, bytes: u64) {
        (self.tell)(self.done_bytes.fetch_sub(bytes, Ordering::Relaxed) - bytes);
    }
}

impl Bucket {
    /// Uploads what `shoal_store::cut` left in `dir` (`part-00000`, ...) and last the index. Goes on
    /// where an earlier upload stopped: a part that is there in its right length is skipped.
    /// `progress` hears the part bytes that are through so far, those skipped among them; it steps
    /// back when a part must be tried again.
    ///
    /// # Errors
    /// [`OriginError::Index`] when `index_bytes` are not the index of `encoding`;
    /// [`OriginError::Mismatch`] when a local part is not what the index says;
    /// [`OriginError::File`]; [`OriginError::Store`]. Without success there is no index.
    pub async fn upload(
        &self,
        dir: &FsPath,
        index: &EncodingIndex,
        index_bytes: &[u8],
        encoding: &EncodingId,
        progress: impl Fn(u64) + Send + Sync,
    ) -> Result<CopyStats, OriginError> {
        let artifact = index.manifest.artifact;
        let opened = open_index(index_bytes, &artifact, encoding)?;
        let bytes = Bytes::copy_from_slice(index_bytes);
        let open = |number: u32, part: Part| {
            let path = dir.join(part_name(number));
            async move { Ok(read_local_part(open_part(path, number, part).await?, part.len)) }
        };
        self.transfer(&artifact, encoding, &opened, bytes, open, progress).await
    }

    /// Copies an encoding from another bucket, part by part, and last the index. Each part is
    /// verified against the index on its way. Goes on where an earlier copy stopped, as
    /// [`Bucket::upload`] does; a copy that is whole already costs two listings and two small reads.
    ///
    /// # Errors
    /// [`OriginError::NotFound`] when the source has no index or lacks a part;
    /// [`OriginError::Index`]; [`OriginError::Mismatch`] when a part in the source is damaged;
    /// [`OriginError::Store`]. Without success there is no index.
    pub async fn copy_from(
        &self,
        source: &Bucket,
        artifact: &ArtifactId,
        encoding: &EncodingId,
        progress: impl Fn(u64) + Send + Sync,
    ) -> Result<CopyStats, OriginError> {
        let Some(bytes) = source.index(artifact, encoding).await? else {
            let key = source.index_key(artifact, encoding).to_string();
            return Err(OriginError::NotFound { bucket: source.url().into(), key });
        };
        let index = open_index(&bytes, artifact, encoding)?;
        let open = |number: u32, part: Part| async move {
            let key = source.part_key(artifact, encoding, number);
            match source.len(&key).await? {
                Some(len) => verify_len(number, part, len)?,
                None => {
                    let bucket = source.url().into();
                    return Err(OriginError::NotFound { bucket, key: key.to_string() });
                }
            }
            Ok(source.read_part(artifact, encoding, number, part.len))
        };
        self.transfer(artifact, encoding, &index, bytes.clone(), open, progress).await
    }

    /// Reads every part and compares it with the index. Memory is bounded as for a copy.
    ///
    /// # Errors
    /// [`OriginError::NotFound`], [`OriginError::Index`], [`OriginError::Mismatch`] for the first
    /// damaged part, [`OriginError::Store`].
    pub async fn verify(
        &self,
        artifact: &ArtifactId,
        encoding: &EncodingId,
    ) -> Result<(), OriginError> {
        let Some(bytes) = self.index(artifact, encoding).await? else {
            let key = self.index_key(artifact, encoding).to_string();
            return Err(OriginError::NotFound { bucket: self.url().into(), key });
        };
        let index = open_index(&bytes, artifact, encoding)?;
        for (number, expect) in (0..).zip(&index.parts) {
            let key = self.part_key(artifact, encoding, number);
            let Some(len) = self.len(&key).await? else {
                let (bucket, key) = (self.url().into(), key.to_string());
                return Err(OriginError::NotFound { bucket, key });
            };
            verify_len(number, *expect, len)?;
            let mut hasher = blake3::Hasher::new();
            let mut chunks = Box::pin(self.read_part(artifact, encoding, number, len));
            loop {
                let Ok(permit) = READ_BUDGET.acquire().await else { break };
                let Some(chunk) = chunks.try_next().await? else { break };
                let hashed = tokio::task::spawn_blocking(move || {
                    hasher.update(&chunk);
                    hasher
                });
                hasher =
                    hashed.await.map_err(|source| object_store::Error::JoinError { source })?;
                drop(permit);
            }
            verify(number, Some(*expect), Part { len, hash: *hasher.finalize().as_bytes() })?;
        }
        Ok(())
    }

    /// A part's bytes; a chunk at a time is read, when it is asked for.
    fn read_part<'a>(
        &'a self,
        artifact: &'a ArtifactId,
        encoding: &'a EncodingId,
        number: u32,
        len: u64,
    ) -> impl Stream<Item = Result<Bytes, OriginError>> + Send + 'a {
        let key = self.part_key(artifact, encoding, number);
        let chunks = stream::try_unfold(0, move |offset: u64| {
            let key = key.clone();
            async move {
                let end = (offset + CHUNK_BYTES as u64).min(len);
                if offset == end {
                    return Ok(None);
                }
                let pieces = self.get_chunk(&key, offset..end).await?;
                Ok::<_, OriginError>(Some((stream::iter(pieces).map(Ok), end)))
            }
        });
        chunks.try_flatten()
    }

    /// What [`Bucket::upload`] and [`Bucket::copy_from`] share: the parts that are missing, several
    /// at a time, each from the stream that `open` gives; and then the index.
    async fn transfer<S, Fut>(
        &self,
        artifact: &ArtifactId,
        encoding: &EncodingId,
        index: &EncodingIndex,
        index_bytes: Bytes,
        open: impl Fn(u32, Part) -> Fut + Sync,
        progress: impl Fn(u64) + Send + Sync,
    ) -> Result<CopyStats, OriginError>
    where
        S: Stream<Item = Result<Bytes, OriginError>> + Send,
        Fut: Future<Output = Result<S, OriginError>> + Send,
    {
        let there: BTreeMap<u32, u64> = self.parts(artifact, encoding).await?;
        let total: u64 = index.parts.iter().map(|part| part.len).sum();
        let todo: Vec<(u32, Part)> = missing(index, &there)
            .into_iter()
            .filter_map(|number| Some((number, *index.parts.get(number as usize)?)))
            .collect();
        let bytes: u64 = todo.iter().map(|(_, part)| part.len).sum();
        let stats = CopyStats { bytes, skipped_bytes: total - bytes };
        let progress = &Progress::new(stats.skipped_bytes, progress);
        let (open, there) = (&open, &there);

        stream::iter(todo)
            .map(|(number, part)| async move {
                let key = &self.part_key(artifact, encoding, number);
                retried("copy part", || async move {
                    let counted = &AtomicU64::new(0);
                    let bytes = open(number, part).await?.inspect_ok(move |bytes| {
                        counted.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                        progress.add(bytes.len() as u64);
                    });
                    let there = there.contains_key(&number);
                    let written =
                        self.write_part(key, number, Some(part), there, bytes, &READ_BUDGET).await;
                    if written.is_err() {
                        progress.take_off(counted.load(Ordering::Relaxed));
                    }
                    written
                })
                .await
            })
            .buffer_unordered(PARTS_IN_PARALLEL)
            .try_for_each(|_| async { Ok(()) })
            .await?;
        self.put_index(artifact, encoding, index_bytes).await?;
        Ok(stats)
    }
}

fn verify_len(number: u32, part: Part, len: u64) -> Result<(), OriginError> {
    verify(number, Some(part), Part { len, hash: part.hash }).map(drop)
}

/// Opens a local part and compares its length.
async fn open_part(
    path: PathBuf,
    number: u32,
    part: Part,
) -> Result<(Arc<File>, PathBuf), OriginError> {
    let opened = tokio::task::spawn_blocking(move || {
        let failed = |source| OriginError::File { path: path.clone(), source };
        let file = File::open(&path).map_err(failed)?;
        verify_len(number, part, file.metadata().map_err(failed)?.len())?;
        Ok((Arc::new(file), path))
    });
    opened.await.map_err(|source| object_store::Error::JoinError { source })?
}

/// A file's bytes, a chunk at a time, each read when it is asked for.
fn read_local_part(
    (file, path): (Arc<File>, PathBuf),
    len: u64,
) -> impl Stream<Item = Result<Bytes, OriginError>> + Send {
    stream::try_unfold(0, move |offset: u64| {
        let (file, path) = (Arc::clone(&file), path.clone());
        async move {
            let end = (offset + CHUNK_BYTES as u64).min(len);
            if offset == end {
                return Ok(None);
            }
            let chunk = read_file(file, path, offset..end).await?;
            Ok(Some((chunk, end)))
        }
    })
}
