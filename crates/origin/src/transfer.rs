//! Whole encodings: from a local directory into a bucket, and from bucket to bucket.

use std::{
    collections::{BTreeMap, BTreeSet},
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
    share::{self, SharedPart},
    write::{CHUNK_BYTES, Chunk, Chunks, READ_BUDGET, Source, verify},
};

/// How many parts of one encoding move at once: enough to cover a bucket's latency; the memory is
/// bounded by [`crate::CHUNKS_READ_MAX`].
pub const PARTS_IN_PARALLEL: usize = 4;

/// How often a transfer begins again when objects that it found are gone at its end: somebody removed what had no name.
const LOST_TRIES_MAX: u32 = 3;

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
    /// where an earlier upload stopped: a part that is there in its right length is read and compared with the index, and
    /// skipped if that is what it is. Others may write there too, so what lies there proves nothing by its name.
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
        let open = |number: u32, part: Part, _| {
            let path = dir.join(part_name(number));
            async move {
                let bytes = read_local_part(open_part(path, number, part).await?, part.len);
                Ok(Source::new(bytes, &READ_BUDGET))
            }
        };
        let what = Todo { index: &opened, doubted: &[], sources: &[] };
        self.transfer(&artifact, encoding, what, bytes, open, progress).await
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
        self.mend_from(&[source], artifact, encoding, &[], progress).await
    }

    /// [`Bucket::copy_from`] the first of `sources` that has it, part by part: what one has lost comes from the next. The
    /// parts in `doubted` are written again, though they are there in their right length.
    ///
    /// # Errors
    /// As [`Bucket::copy_from`]; what the first source lacks counts, when no other one has it.
    pub async fn mend_from(
        &self,
        sources: &[&Bucket],
        artifact: &ArtifactId,
        encoding: &EncodingId,
        doubted: &[u32],
        progress: impl Fn(u64) + Send + Sync,
    ) -> Result<CopyStats, OriginError> {
        let (bytes, index) = any_index(sources, artifact, encoding).await?;
        let _copying = share::Copying::begin();
        let open = |number: u32, part: Part, turn: usize| async move {
            // There is one at least: it gave the index.
            let source = sources[turn % sources.len()];
            let key = source.part_key(artifact, encoding, number);
            match source.len(&key).await? {
                Some(len) => verify_len(number, part, len)?,
                None => {
                    let bucket = source.url().into();
                    return Err(OriginError::NotFound { bucket, key: key.to_string() });
                }
            }
            Ok(SharedPart::new(source, key, part.len))
        };
        let plan = Todo { index: &index, doubted, sources };
        self.transfer(artifact, encoding, plan, bytes.clone(), open, progress).await
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
            self.verify_part(artifact, encoding, number, *expect).await?;
        }
        Ok(())
    }

    /// Reads a part and compares it with what the index says.
    ///
    /// # Errors
    /// As [`Bucket::verify`].
    pub(crate) async fn verify_part(
        &self,
        artifact: &ArtifactId,
        encoding: &EncodingId,
        number: u32,
        expect: Part,
    ) -> Result<(), OriginError> {
        let key = self.part_key(artifact, encoding, number);
        let Some(len) = self.len(&key).await? else {
            return Err(OriginError::NotFound { bucket: self.url().into(), key: key.to_string() });
        };
        verify_len(number, expect, len)?;
        let mut hasher = blake3::Hasher::new();
        let mut chunks = Box::pin(self.read_part(artifact, encoding, number, len));
        loop {
            let Ok(permit) = READ_BUDGET.acquire().await else { break };
            let Some(chunk) = chunks.try_next().await? else { break };
            let hashed = tokio::task::spawn_blocking(move || {
                hasher.update(&chunk);
                hasher
            });
            hasher = hashed.await.map_err(|source| object_store::Error::JoinError { source })?;
            drop(permit);
        }
        verify(number, Some(expect), Part { len, hash: *hasher.finalize().as_bytes() }).map(drop)
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

    /// Which of these parts are there in their right length, and are not what the index says.
    async fn disproved(
        &self,
        artifact: &ArtifactId,
        encoding: &EncodingId,
        index: &EncodingIndex,
        there: &BTreeMap<u32, u64>,
    ) -> Result<BTreeSet<u32>, OriginError> {
        let expected = (0..).zip(index.parts.iter().copied());
        let doubted: Vec<(u32, Part)> =
            expected.filter(|(number, part)| there.get(number) == Some(&part.len)).collect();
        let looked = stream::iter(doubted).map(|(number, part)| async move {
            match self.verify_part(artifact, encoding, number, part).await {
                Ok(()) => Ok(None),
                Err(error) if lacks(&error) => {
                    tracing::warn!(%error, bucket = self.url(), "a part is written again");
                    Ok(Some(number))
                }
                Err(error) => Err(error),
            }
        });
        let wrong = looked.buffer_unordered(PARTS_IN_PARALLEL);
        wrong.try_filter_map(|number| async move { Ok(number) }).try_collect().await
    }

    /// What [`Bucket::upload`] and [`Bucket::copy_from`] share: the parts that are missing, several
    /// at a time, each from what `open` gives, in turn for each source; and then the index. What was taken away meanwhile
    /// is written once more.
    async fn transfer<S, Fut>(
        &self,
        artifact: &ArtifactId,
        encoding: &EncodingId,
        what: Todo<'_>,
        index_bytes: Bytes,
        open: impl Fn(u32, Part, usize) -> Fut + Sync,
        progress: impl Fn(u64) + Send + Sync,
    ) -> Result<CopyStats, OriginError>
    where
        S: Chunks,
        Fut: Future<Output = Result<S, OriginError>> + Send,
    {
        let Todo { index, doubted, sources } = what;
        let total: u64 = index.parts.iter().map(|part| part.len).sum();
        let mut written = 0;
        let mut tries = 0;
        loop {
            let there: BTreeMap<u32, u64> = self.parts(artifact, encoding).await?;
            let mut right = there.clone();
            if tries == 0 {
                right.retain(|number, _| !doubted.contains(number));
                if sources.is_empty() {
                    let wrong = self.disproved(artifact, encoding, index, &right).await?;
                    right.retain(|number, _| !wrong.contains(number));
                }
            }
            let todo: Vec<(u32, Part)> = missing(index, &right)
                .into_iter()
                .filter_map(|number| Some((number, *index.parts.get(number as usize)?)))
                .collect();
            let bytes: u64 = todo.iter().map(|(_, part)| part.len).sum();
            let told = &Progress::new(total - bytes, &progress);
            let (open, there) = (&open, &there);
            let parts = stream::iter(todo).map(|(number, part)| async move {
                let is_there = there.contains_key(&number);
                let key = &self.part_key(artifact, encoding, number);
                let mut first = None;
                for turn in 0..sources.len().max(1) {
                    let one = retried("copy part", || async move {
                        let counted = &AtomicU64::new(0);
                        let chunks =
                            Counted { chunks: open(number, part, turn).await?, counted, told };
                        let written =
                            self.write_part(key, number, Some(part), is_there, chunks).await;
                        if written.is_err() {
                            told.take_off(counted.load(Ordering::Relaxed));
                        }
                        written
                    });
                    match one.await {
                        Ok(_) => return Ok(()),
                        Err(error) => {
                            if let Some(source) = sources.get(turn) {
                                share::forget(source, &source.part_key(artifact, encoding, number));
                            }
                            if !lacks(&error) {
                                return Err(error);
                            }
                            first = first.or(Some(error));
                        }
                    }
                }
                first.map_or(Ok(()), Err)
            });
            parts.buffer_unordered(PARTS_IN_PARALLEL).try_for_each(|()| async { Ok(()) }).await?;
            written += bytes;
            match self.put_index(artifact, encoding, index_bytes.clone()).await {
                Err(OriginError::Incomplete { .. }) if tries < LOST_TRIES_MAX => tries += 1,
                Err(error) => return Err(error),
                Ok(()) => {
                    let skipped_bytes = total.saturating_sub(written);
                    return Ok(CopyStats { bytes: written, skipped_bytes });
                }
            }
        }
    }
}

/// What a transfer is of.
struct Todo<'a> {
    index: &'a EncodingIndex,
    /// Parts that are to be written though they are there.
    doubted: &'a [u32],
    /// The buckets that it is read from; none when it comes from files.
    sources: &'a [&'a Bucket],
}

/// Whether another source may do better.
fn lacks(error: &OriginError) -> bool {
    matches!(
        error,
        OriginError::NotFound { .. }
            | OriginError::Mismatch { .. }
            | OriginError::WrongRange { .. }
    )
}

/// The index of the first source that has it.
async fn any_index(
    sources: &[&Bucket],
    artifact: &ArtifactId,
    encoding: &EncodingId,
) -> Result<(Bytes, EncodingIndex), OriginError> {
    let mut first = None;
    for source in sources {
        let read = match source.index(artifact, encoding).await {
            Ok(Some(bytes)) => open_index(&bytes, artifact, encoding).map(|index| (bytes, index)),
            Ok(None) => {
                let key = source.index_key(artifact, encoding).to_string();
                Err(OriginError::NotFound { bucket: source.url().into(), key })
            }
            Err(error) => Err(error),
        };
        match read {
            Ok(found) => return Ok(found),
            Err(error) => first = first.or(Some(error)),
        }
    }
    Err(first
        .unwrap_or(OriginError::NotFound { bucket: "no bucket".into(), key: encoding.to_string() }))
}

/// Chunks that are counted as they come.
struct Counted<'a, S, F> {
    chunks: S,
    counted: &'a AtomicU64,
    told: &'a Progress<F>,
}

impl<S: Chunks, F: Fn(u64) + Send + Sync> Chunks for Counted<'_, S, F> {
    async fn next(&mut self) -> Result<Option<Chunk>, OriginError> {
        let chunk = self.chunks.next().await?;
        if let Some(chunk) = &chunk {
            self.counted.fetch_add(chunk.len as u64, Ordering::Relaxed);
            self.told.add(chunk.len as u64);
        }
        Ok(chunk)
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
