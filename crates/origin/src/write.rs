//! Writing parts and the index: verified on the way, visible only when whole.

use std::{
    pin::Pin,
    sync::{Arc, LazyLock, atomic::Ordering},
    time::Duration,
};

use blake3::Hasher;
use bytes::Bytes;
use futures::{Stream, StreamExt};
use object_store::{PutMode, PutMultipartOptions, PutOptions, PutPayload, path::Path};
use shoal_proto::{
    ArtifactId, EncodingId,
    manifest::{PART_MAX_BYTES, Part},
};
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    task::JoinSet,
};

use crate::{
    bucket::{Bucket, missing, open_index},
    error::OriginError,
    retry::retried,
    share::Slot,
};

/// How many bytes move at a time. S3 wants at least 5 MiB, all but the last alike; a 64 MiB part is
/// eight of these.
pub const CHUNK_BYTES: usize = 8 << 20;

/// How many chunks that this process reads by itself (uploads and copies) are in memory at once, all
/// operations together: 128 MiB.
pub const CHUNKS_READ_MAX: usize = 16;

/// How many chunks that callers send (see [`Bucket::put_part`]) are in memory at once, all calls
/// together: 32 MiB. Apart from the others, so that slow senders cannot hold up a copy.
pub const CHUNKS_SENT_MAX: usize = 4;

/// A sender that gives nothing for this long is given up, so that it does not hold its memory for ever.
pub const STREAM_IDLE_MAX: Duration = Duration::from_secs(60);

pub(crate) static READ_BUDGET: LazyLock<Semaphore> =
    LazyLock::new(|| Semaphore::new(CHUNKS_READ_MAX));
static SENT_BUDGET: LazyLock<Semaphore> = LazyLock::new(|| Semaphore::new(CHUNKS_SENT_MAX));

/// What became of a part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PutPart {
    /// It was written; its length and hash.
    Written(Part),
    /// It was there already, in the expected length. The stream was not read.
    Present,
}

/// One chunk in memory, and its share of the budget.
pub(crate) struct Chunk {
    pub(crate) pieces: Vec<Bytes>,
    pub(crate) len: usize,
    pub(crate) hold: Hold,
}

/// What keeps a chunk's place in the budget until it is dropped.
pub(crate) enum Hold {
    Own {
        _permit: SemaphorePermit<'static>,
    },
    /// With others who write the same bytes elsewhere.
    Shared {
        _slot: Arc<Slot>,
    },
}

/// A part's bytes in chunks of [`CHUNK_BYTES`], the last one shorter.
pub(crate) trait Chunks: Send {
    /// The next chunk, full unless it is the last.
    fn next(&mut self) -> impl Future<Output = Result<Option<Chunk>, OriginError>> + Send;
}

impl Bucket {
    /// Writes one part from a stream of its bytes, which may come in any lengths. With `expect`, the
    /// part becomes visible only if length and hash agree, and a part that is there in that length is
    /// left alone. Without, it is written over whatever is there, unless the index is there already: then only what
    /// that says, where it is missing. Compare the [`Part`] that comes back.
    ///
    /// Never tried again, because the stream cannot be read twice.
    ///
    /// # Errors
    /// [`OriginError::Mismatch`], [`OriginError::Sealed`], [`OriginError::Stalled`],
    /// [`OriginError::Stream`], [`OriginError::TooLong`] beyond [`PART_MAX_BYTES`],
    /// [`OriginError::Store`]. None of them leaves a new part behind.
    pub async fn put_part<E>(
        &self,
        artifact: &ArtifactId,
        encoding: &EncodingId,
        number: u32,
        expect: Option<Part>,
        stream: impl Stream<Item = Result<Bytes, E>> + Send,
    ) -> Result<PutPart, OriginError>
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let key = self.part_key(artifact, encoding, number);
        let there = self.len(&key).await?;
        let expect = match expect {
            Some(part) if there == Some(part.len) => return Ok(PutPart::Present),
            Some(part) => Some(part),
            // An index says what the part should be. One that is not there though its index is, was lost: it may be
            // brought again, and nothing else.
            None => match self.index(artifact, encoding).await? {
                None => None,
                Some(bytes) => {
                    match open_index(&bytes, artifact, encoding)?.parts.get(number as usize) {
                        Some(part) if there != Some(part.len) => Some(*part),
                        _ => return Err(OriginError::Sealed { key: key.to_string() }),
                    }
                }
            },
        };
        let name = key.to_string();
        let stream = futures::stream::try_unfold((Box::pin(stream), name), read_on);
        let chunks = Source::new(stream, &SENT_BUDGET);
        let part = self.write_part(&key, number, expect, there.is_some(), chunks);
        Ok(PutPart::Written(part.await?))
    }

    /// Writes an encoding's index, which makes it whole for all who look. Does nothing when it is
    /// there already.
    ///
    /// # Errors
    /// [`OriginError::Index`] when `bytes` are not this encoding's index,
    /// [`OriginError::Incomplete`] while parts are missing, [`OriginError::Store`].
    pub async fn put_index(
        &self,
        artifact: &ArtifactId,
        encoding: &EncodingId,
        bytes: Bytes,
    ) -> Result<(), OriginError> {
        let index = open_index(&bytes, artifact, encoding)?;
        let missing = missing(&index, &self.parts(artifact, encoding).await?);
        if !missing.is_empty() {
            return Err(OriginError::Incomplete { missing });
        }
        let key = self.index_key(artifact, encoding);
        retried("write index", || async {
            let Err(error) = self.put_whole(&key, bytes.clone().into(), PutMode::Create).await
            else {
                return Ok(());
            };
            // Another writer may have been first, and have swept away what we were about to rename. Its name is its hash:
            // another content under it is damage, and is mended.
            match self.index(artifact, encoding).await {
                Ok(Some(there)) if there == bytes => Ok(()),
                Ok(None) if !error.is_there_already() => Err(error),
                Ok(_) | Err(OriginError::TooLong { .. }) => {
                    self.put_whole(&key, bytes.clone().into(), PutMode::Overwrite).await
                }
                Err(error) => Err(error),
            }
        })
        .await?;
        self.sweep(artifact, encoding).await;
        Ok(())
    }

    /// Takes away what uploads that were cut off have left in a directory. Only once the index is
    /// there: another writer of the same encoding that loses its file finds the part in place.
    pub(crate) async fn sweep(&self, artifact: &ArtifactId, encoding: &EncodingId) {
        let Some(dir) = self.directory(artifact, encoding) else { return };
        let swept = tokio::task::spawn_blocking(move || {
            let entries = match std::fs::read_dir(&dir) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
                entries => entries?,
            };
            for entry in entries {
                let entry = entry?;
                // `object_store` writes to NAME#N and renames.
                if entry.file_name().to_string_lossy().contains('#') {
                    std::fs::remove_file(entry.path())?;
                }
            }
            std::io::Result::Ok(())
        });
        if let Ok(Err(error)) = swept.await {
            tracing::warn!(%error, bucket = self.url(), "unfinished files could not be removed");
        }
    }

    /// Writes a small object at once.
    async fn put_whole(
        &self,
        key: &Path,
        payload: PutPayload,
        mode: PutMode,
    ) -> Result<(), OriginError> {
        let put = |mode| async {
            let put = self.store().put_opts(key, payload.clone(), PutOptions::from(mode)).await;
            put.map(drop).map_err(|error| self.error(key, error))
        };
        let create = mode == PutMode::Create;
        if !create || !self.unconditional().load(Ordering::Relaxed) {
            match put(mode).await {
                Err(error) if create && knows_no_condition(&error) => {
                    tracing::warn!(
                        bucket = self.url(),
                        "the store knows no If-None-Match: objects are looked for before they are written"
                    );
                    self.unconditional().store(true, Ordering::Relaxed);
                }
                other => return other,
            }
        }
        match self.len(key).await? {
            None => put(PutMode::Overwrite).await,
            Some(_) => Err(OriginError::Store(object_store::Error::AlreadyExists {
                path: key.to_string(),
                source: "it is there".into(),
            })),
        }
    }

    /// Writes one part, chunk by chunk; completes it only if it is what is expected. `there` says
    /// that an object of that name exists and shall be replaced.
    pub(crate) async fn write_part(
        &self,
        key: &Path,
        number: u32,
        expect: Option<Part>,
        there: bool,
        mut source: impl Chunks,
    ) -> Result<Part, OriginError> {
        let limit = expect.map_or(PART_MAX_BYTES, |part| part.len);
        let mut hasher = Hasher::new();
        let mut len = 0u64;
        let Some(mut chunk) = source.next().await? else {
            return Err(OriginError::Mismatch { part: number, reason: "no bytes".into() });
        };
        let too_long = |len: u64| match expect {
            Some(_) => {
                OriginError::Mismatch { part: number, reason: format!("more than {limit} bytes") }
            }
            None => OriginError::TooLong { key: key.to_string(), len, limit },
        };
        let finished = |len: u64, hasher: &Hasher| {
            let part = Part { len, hash: *hasher.finalize().as_bytes() };
            verify(number, expect, part)
        };

        if chunk.len < CHUNK_BYTES {
            // All of it is in memory: one put, and create-if-absent.
            (hasher, chunk) = hash(hasher, chunk).await?;
            len += chunk.len as u64;
            if len > limit {
                return Err(too_long(len));
            }
            let part = finished(len, &hasher)?;
            let mode = if there { PutMode::Overwrite } else { PutMode::Create };
            let payload: PutPayload = chunk.pieces.iter().cloned().collect();
            return match self.put_whole(key, payload, mode).await {
                // Written by another in this moment: as good, if it is the same.
                Err(OriginError::Store(object_store::Error::AlreadyExists { .. }))
                    if self.len(key).await? == Some(part.len) && expect.is_some() =>
                {
                    Ok(part)
                }
                other => other.map(|()| part),
            };
        }

        let upload = self.store().put_multipart_opts(key, PutMultipartOptions::default()).await;
        let mut upload = upload.map_err(|e| self.error(key, e))?;
        let mut sending: JoinSet<object_store::Result<()>> = JoinSet::new();
        let result = async {
            loop {
                (hasher, chunk) = hash(hasher, chunk).await?;
                len += chunk.len as u64;
                if len > limit {
                    return Err(too_long(len));
                }
                let Chunk { pieces, hold, .. } = chunk;
                let put = upload.put_part(pieces.into_iter().collect());
                sending.spawn(async move {
                    let sent = put.await;
                    drop(hold);
                    sent
                });
                while let Some(sent) = sending.try_join_next() {
                    self.sent(key, sent)?;
                }
                // The last chunk's place has gone with it: nobody holds one and waits for another.
                chunk = match source.next().await? {
                    Some(chunk) => chunk,
                    None => break,
                };
            }
            while let Some(sent) = sending.join_next().await {
                self.sent(key, sent)?;
            }
            let part = finished(len, &hasher)?;
            if expect.is_some() && !there && self.len(key).await? == Some(part.len) {
                // Another writer was first: what it wrote was checked against the same hash.
                return Ok((part, false));
            }
            upload.complete().await.map_err(|e| self.error(key, e))?;
            Ok((part, true))
        }
        .await;
        if !matches!(result, Ok((_, true))) {
            sending.shutdown().await;
            if let Err(error) = upload.abort().await {
                tracing::debug!(%error, %key, "an unfinished upload could not be ended");
            }
        }
        result.map(|(part, _)| part)
    }

    fn sent(
        &self,
        key: &Path,
        sent: Result<object_store::Result<()>, tokio::task::JoinError>,
    ) -> Result<(), OriginError> {
        let sent = sent.map_err(|source| object_store::Error::JoinError { source });
        sent.and_then(|sent| sent).map_err(|e| self.error(key, e))
    }
}

/// The next bytes of a caller's stream, which belong to the part of this name.
async fn read_on<S, E>(
    (mut stream, name): (Pin<Box<S>>, String),
) -> Result<Option<(Bytes, (Pin<Box<S>>, String))>, OriginError>
where
    S: Stream<Item = Result<Bytes, E>> + Send,
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let Ok(item) = tokio::time::timeout(STREAM_IDLE_MAX, stream.next()).await else {
        return Err(OriginError::Stalled { key: name, seconds: STREAM_IDLE_MAX.as_secs() });
    };
    match item.transpose() {
        Ok(bytes) => Ok(bytes.map(|bytes| (bytes, (stream, name)))),
        Err(error) => Err(OriginError::Stream { key: name, source: error.into() }),
    }
}

/// Whether a store says that it has no condition for writes.
fn knows_no_condition(error: &OriginError) -> bool {
    matches!(error, OriginError::Store(object_store::Error::NotImplemented { .. }))
        || error.is_code("NotImplemented")
}

/// Compares a part with what was expected.
pub(crate) fn verify(number: u32, expect: Option<Part>, part: Part) -> Result<Part, OriginError> {
    match expect {
        Some(expect) if expect.len != part.len => Err(OriginError::Mismatch {
            part: number,
            reason: format!("{} bytes instead of {}", part.len, expect.len),
        }),
        Some(expect) if expect.hash != part.hash => Err(OriginError::Mismatch {
            part: number,
            reason: format!(
                "hash {} instead of {}",
                blake3::Hash::from(part.hash),
                blake3::Hash::from(expect.hash)
            ),
        }),
        _ => Ok(part),
    }
}

/// Hashes a chunk away from the threads that wait for the network.
async fn hash(mut hasher: Hasher, chunk: Chunk) -> Result<(Hasher, Chunk), OriginError> {
    tokio::task::spawn_blocking(move || {
        for piece in &chunk.pieces {
            hasher.update(piece);
        }
        (hasher, chunk)
    })
    .await
    .map_err(|source| OriginError::Store(object_store::Error::JoinError { source }))
}

/// Cuts a stream into chunks of [`CHUNK_BYTES`] without copying.
pub(crate) struct Source<S> {
    stream: Pin<Box<S>>,
    /// What the last item had beyond its chunk.
    rest: Bytes,
    budget: &'static Semaphore,
}

impl<S> Source<S> {
    pub(crate) fn new(stream: S, budget: &'static Semaphore) -> Self {
        Self { stream: Box::pin(stream), rest: Bytes::new(), budget }
    }
}

impl<S: Stream<Item = Result<Bytes, OriginError>> + Send> Chunks for Source<S> {
    // A place in the budget is waited for first.
    async fn next(&mut self) -> Result<Option<Chunk>, OriginError> {
        // Never closed, so this only waits.
        let Ok(permit) = self.budget.acquire().await else { return Ok(None) };
        let mut chunk = Chunk { pieces: Vec::new(), len: 0, hold: Hold::Own { _permit: permit } };
        while chunk.len < CHUNK_BYTES {
            if self.rest.is_empty() {
                match self.stream.next().await {
                    Some(bytes) => self.rest = bytes?,
                    None => break,
                }
            }
            let take = self.rest.len().min(CHUNK_BYTES - chunk.len);
            if take > 0 {
                chunk.len += take;
                chunk.pieces.push(self.rest.split_to(take));
            }
        }
        Ok((chunk.len > 0).then_some(chunk))
    }
}
