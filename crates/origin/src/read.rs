//! Ranged reads whose answers are checked.

use std::{fs::File, ops::Range, os::unix::fs::FileExt, path::PathBuf, sync::Arc};

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::{GetOptions, GetRange, GetResult, GetResultPayload, ObjectStoreExt, path::Path};
use shoal_proto::{
    ArtifactId, EncodingId,
    manifest::{Location, PieceSize},
};

use crate::{bucket::Bucket, error::OriginError, pool, retry::retried};

/// The longest range of one GET, in bytes: one piece of the largest kind, or several smaller. More
/// would only make a broken answer dearer to read again.
pub const GET_MAX_BYTES: u64 = PieceSize::MAX.bytes();

/// Neighbouring pieces that one GET reads.
#[derive(Debug, PartialEq, Eq)]
struct Run {
    part: u32,
    range: Range<u64>,
    /// Their lengths, in order.
    lens: Vec<u32>,
}

/// Cuts `pieces` into runs: neighbours in one part, at most [`GET_MAX_BYTES`].
fn runs(pieces: &[Location]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for place in pieces {
        let end = place.offset + u64::from(place.len);
        match runs.last_mut() {
            Some(run)
                if run.part == place.part
                    && run.range.end == place.offset
                    && end - run.range.start <= GET_MAX_BYTES =>
            {
                run.range.end = end;
                run.lens.push(place.len);
            }
            _ => {
                runs.push(Run { part: place.part, range: place.offset..end, lens: vec![place.len] })
            }
        }
    }
    runs
}

impl Bucket {
    /// Reads the stored bytes of pieces `first..first + count`, in order. `layout` is
    /// [`shoal_proto::manifest::EncodingIndex::layout`]. Neighbours in a part are read by one GET of
    /// at most [`GET_MAX_BYTES`], and their `Bytes` share its memory; the caller bounds `count` by
    /// what it wants to hold. The pieces are not verified here.
    ///
    /// # Errors
    /// [`OriginError::NoSuchPieces`]; [`OriginError::NotFound`] when a part is not there;
    /// [`OriginError::WrongRange`] when it is shorter than the layout says or the answer is another
    /// range; [`OriginError::Store`].
    pub async fn read_pieces(
        &self,
        artifact: &ArtifactId,
        encoding: &EncodingId,
        layout: &[Location],
        first: u32,
        count: u32,
    ) -> Result<Vec<Bytes>, OriginError> {
        let wanted = (first as usize).checked_add(count as usize);
        let wanted = wanted.and_then(|end| layout.get(first as usize..end));
        let no_such = OriginError::NoSuchPieces { first, count, pieces: layout.len() };
        let wanted = wanted.ok_or(no_such)?;
        let mut pieces = Vec::with_capacity(wanted.len());
        for run in runs(wanted) {
            let key = self.part_key(artifact, encoding, run.part);
            let mut bytes = self.get_range(&key, run.range).await?;
            for len in run.lens {
                pieces.push(bytes.split_to(len as usize));
            }
        }
        Ok(pieces)
    }

    /// Reads exactly `range` of an object, trying again when that may help.
    async fn get_range(&self, key: &Path, range: Range<u64>) -> Result<Bytes, OriginError> {
        let range = &range;
        retried("read", || async move {
            let answer = match self.open_range(key, range).await? {
                Ok(answer) => answer,
                short => return Ok(short.map(|_| Bytes::new())),
            };
            let bytes = answer.bytes().await.map_err(|e| self.error(key, e))?;
            self.check_len(key, range, bytes.len() as u64)?;
            Ok(Ok(bytes))
        })
        .await?
    }

    /// The same for a chunk of at most [`CHUNK_BYTES`](crate::CHUNK_BYTES) on its way elsewhere: it may
    /// come in several pieces, and its memory is used again.
    pub(crate) async fn get_chunk(
        &self,
        key: &Path,
        range: Range<u64>,
    ) -> Result<Vec<Bytes>, OriginError> {
        let range = &range;
        retried("read", || async move {
            let answer = match self.open_range(key, range).await? {
                Ok(answer) => answer,
                short => return Ok(short.map(|_| Vec::new())),
            };
            let pieces = match answer.payload {
                GetResultPayload::File(file, path) => {
                    vec![read_file(Arc::new(file), path, range.clone()).await?]
                }
                GetResultPayload::Stream(stream) => {
                    stream.try_collect().await.map_err(|e| self.error(key, e))?
                }
            };
            self.check_len(key, range, pieces.iter().map(|piece| piece.len() as u64).sum())?;
            Ok(Ok(pieces))
        })
        .await?
    }

    fn wrong_range(&self, key: &Path, asked: &Range<u64>, got: String) -> OriginError {
        OriginError::WrongRange { key: key.to_string(), asked: asked.clone(), got }
    }

    fn check_len(&self, key: &Path, asked: &Range<u64>, len: u64) -> Result<(), OriginError> {
        if len == asked.end - asked.start {
            return Ok(());
        }
        Err(self.wrong_range(key, asked, format!("{len} bytes")))
    }

    /// Asks for `range`. The outer error may pass; the inner one will not: the object is shorter.
    async fn open_range(
        &self,
        key: &Path,
        range: &Range<u64>,
    ) -> Result<Result<GetResult, OriginError>, OriginError> {
        let options =
            GetOptions { range: Some(GetRange::Bounded(range.clone())), ..GetOptions::default() };
        let short = |size: u64| self.wrong_range(key, range, format!("an object of {size} bytes"));
        let answer = match self.store().get_opts(key, options).await {
            Ok(answer) => answer,
            Err(error) => {
                // Stores differ in how they refuse a range past the end; ask for the length.
                if matches!(error, object_store::Error::Generic { .. })
                    && let Ok(meta) = self.store().head(key).await
                    && meta.size < range.end
                {
                    return Ok(Err(short(meta.size)));
                }
                return Err(self.error(key, error));
            }
        };
        if answer.meta.size < range.end {
            return Ok(Err(short(answer.meta.size)));
        }
        if answer.range != *range {
            return Err(self.wrong_range(key, range, format!("bytes {:?}", answer.range)));
        }
        Ok(Ok(answer))
    }

    /// Reads a whole object of at most `limit` bytes.
    pub(crate) async fn get_whole(&self, key: &Path, limit: u64) -> Result<Bytes, OriginError> {
        retried("read", || async {
            let answer = self.store().get_opts(key, GetOptions::default()).await;
            let answer = answer.map_err(|e| self.error(key, e))?;
            let len = answer.meta.size;
            if len > limit {
                return Err(OriginError::TooLong { key: key.to_string(), len, limit });
            }
            let bytes = answer.bytes().await.map_err(|e| self.error(key, e))?;
            if bytes.len() as u64 != len {
                let got = format!("{} bytes", bytes.len());
                return Err(OriginError::WrongRange { key: key.to_string(), asked: 0..len, got });
            }
            Ok(bytes)
        })
        .await
    }

    /// An object's length in bytes, when it is there.
    pub(crate) async fn len(&self, key: &Path) -> Result<Option<u64>, OriginError> {
        let head = retried("head", || async {
            self.store().head(key).await.map_err(|e| self.error(key, e))
        });
        match head.await {
            Ok(meta) => Ok(Some(meta.size)),
            Err(OriginError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Reads `range` of a local file, at most a chunk, into memory that is used again.
pub(crate) async fn read_file(
    file: Arc<File>,
    path: PathBuf,
    range: Range<u64>,
) -> Result<Bytes, OriginError> {
    let read = tokio::task::spawn_blocking(move || {
        let len = (range.end - range.start) as usize;
        pool::chunk(len, |chunk| file.read_exact_at(chunk, range.start))
            .map_err(|source| OriginError::File { path, source })
    });
    read.await.map_err(|source| OriginError::Store(object_store::Error::JoinError { source }))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_read_together() {
        let at = |part, offset, len| Location { part, offset, len };
        let places =
            [at(0, 0, 10), at(0, 10, 5), at(1, 0, 7), at(1, 7, 16 << 20), at(1, 7 + (16 << 20), 1)];
        let runs = runs(&places);
        let got: Vec<_> = runs.iter().map(|r| (r.part, r.range.clone(), r.lens.len())).collect();
        let big = 16 << 20;
        assert_eq!(
            got,
            [(0, 0..15, 2), (1, 0..7, 1), (1, 7..7 + big, 1), (1, 7 + big..8 + big, 1)]
        );
    }
}
