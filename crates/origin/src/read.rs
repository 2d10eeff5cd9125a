//! Ranged reads whose answers are checked.

use std::ops::Range;

use bytes::Bytes;
use object_store::{GetOptions, GetRange, ObjectStoreExt, path::Path};
use shoal_proto::{
    ArtifactId, EncodingId,
    manifest::{Location, PieceSize},
};

use crate::{bucket::Bucket, error::OriginError, retry::retried};

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
    pub(crate) async fn get_range(
        &self,
        key: &Path,
        range: Range<u64>,
    ) -> Result<Bytes, OriginError> {
        let range = &range;
        retried("read", || async move {
            let options = GetOptions {
                range: Some(GetRange::Bounded(range.clone())),
                ..GetOptions::default()
            };
            let wrong = |got: String| OriginError::WrongRange {
                key: key.to_string(),
                asked: range.clone(),
                got,
            };
            let answer = match self.store().get_opts(key, options).await {
                Ok(answer) => answer,
                Err(error) => {
                    // Stores differ in how they refuse a range past the end; ask for the length.
                    let error = self.error(key, error);
                    if error.is_transient()
                        || matches!(error, OriginError::Store(object_store::Error::Generic { .. }))
                    {
                        let meta = self.store().head(key).await;
                        if let Ok(meta) = meta
                            && meta.size < range.end
                        {
                            return Ok(Err(wrong(format!("an object of {} bytes", meta.size))));
                        }
                    }
                    return Err(error);
                }
            };
            // Shorter than asked for: the object is, and it will not grow.
            if answer.meta.size < range.end {
                return Ok(Err(wrong(format!("an object of {} bytes", answer.meta.size))));
            }
            if answer.range != *range {
                return Err(wrong(format!("bytes {:?}", answer.range)));
            }
            let bytes = answer.bytes().await.map_err(|e| self.error(key, e))?;
            if bytes.len() as u64 != range.end - range.start {
                return Err(wrong(format!("{} bytes", bytes.len())));
            }
            Ok(Ok(bytes))
        })
        .await?
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
