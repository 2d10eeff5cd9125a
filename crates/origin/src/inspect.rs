//! Looking whether a bucket still has what it was given: names and lengths by a listing, and some of the bytes.

use std::collections::BTreeSet;

use shoal_pieces::{Decoder, verify_piece};
use shoal_proto::{
    ArtifactId, EncodingId, PieceIndex,
    manifest::{EncodingIndex, Location},
};

use crate::{
    bucket::{Bucket, missing, open_index, part_name},
    error::OriginError,
};

/// The most missing or wrong parts that a reason names.
const NAMED_MAX: usize = 3;

/// What a bucket has of an encoding that it should have whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    /// All of it; the pieces that were read are right.
    Whole {
        /// How many stored bytes were read.
        read_bytes: u64,
    },
    /// Not all, or not right.
    Damaged {
        /// What is wrong, to follow the bucket's name: `lost part-00001`.
        reason: String,
        /// The parts that are there in their right length with wrong bytes.
        doubted: Vec<u32>,
    },
}

/// `part-00001, part-00002 and 5 more`.
fn parts_named(parts: &[u32]) -> String {
    let named: Vec<_> = parts.iter().take(NAMED_MAX).map(|part| part_name(*part)).collect();
    match parts.len().saturating_sub(NAMED_MAX) {
        0 => named.join(", "),
        more => format!("{} and {more} more", named.join(", ")),
    }
}

impl Bucket {
    /// Compares names and lengths with the index, reads and proves the pieces that `sample` picks of their count, and where one of
    /// them is wrong, all parts.
    ///
    /// # Errors
    /// What says nothing about the copy: the bucket cannot be reached or refuses to answer.
    pub async fn inspect(
        &self,
        artifact: &ArtifactId,
        encoding: &EncodingId,
        sample: impl FnOnce(u32) -> Vec<u32>,
    ) -> Result<Finding, OriginError> {
        let damaged = |reason: String, doubted| Ok(Finding::Damaged { reason, doubted });
        let there = self.parts(artifact, encoding).await?;
        let bytes = match self.index(artifact, encoding).await {
            Ok(Some(bytes)) => bytes,
            Ok(None) if there.is_empty() => return damaged("lost all of it".into(), Vec::new()),
            Ok(None) => return damaged("lost its index".into(), Vec::new()),
            Err(OriginError::TooLong { .. }) => {
                return damaged("has a damaged index".into(), Vec::new());
            }
            Err(error) => return Err(error),
        };
        let Ok(index) = open_index(&bytes, artifact, encoding) else {
            return damaged("has a damaged index".into(), Vec::new());
        };
        let mut missing = missing(&index, &there);
        let layout = index.layout();
        let mut read_bytes = 0;
        let mut suspect = false;
        for piece in sample(index.manifest.piece_count()) {
            let Some(place) = layout.get(piece as usize) else { continue };
            if missing.contains(&place.part) {
                continue;
            }
            match self.proves(artifact, encoding, (&index, &layout), piece).await {
                Ok(true) => read_bytes += u64::from(place.len),
                Ok(false) => suspect = true,
                // It was there a moment ago.
                Err(OriginError::NotFound { .. }) => suspect = true,
                Err(error) => return Err(error),
            }
        }
        let mut wrong = Vec::new();
        if suspect || !missing.is_empty() {
            (missing, wrong) = self.bad_parts(artifact, encoding, &index, missing).await?;
        }
        let mut reasons = Vec::new();
        if !missing.is_empty() {
            reasons.push(format!("lost {}", parts_named(&missing)));
        }
        if !wrong.is_empty() {
            reasons.push(format!("has wrong bytes in {}", parts_named(&wrong)));
        }
        if reasons.is_empty() {
            return Ok(Finding::Whole { read_bytes });
        }
        damaged(reasons.join(" and "), wrong)
    }

    /// Whether a stored piece is what the manifest says.
    async fn proves(
        &self,
        artifact: &ArtifactId,
        encoding: &EncodingId,
        (index, layout): (&EncodingIndex, &[Location]),
        piece: u32,
    ) -> Result<bool, OriginError> {
        let stored = self.read_pieces(artifact, encoding, layout, piece, 1).await?;
        let (Some(stored), Some(form)) =
            (stored.into_iter().next(), index.pieces.get(piece as usize).copied())
        else {
            return Ok(false);
        };
        let manifest = index.manifest.clone();
        let proved = tokio::task::spawn_blocking(move || {
            let (mut raw, at) = (Vec::new(), PieceIndex(piece));
            let len = manifest.piece_len(at);
            Decoder::new().decode(form.codec, &stored, len, &mut raw).is_ok()
                && verify_piece(&manifest, at, &raw).is_ok()
        });
        proved.await.map_err(|source| object_store::Error::JoinError { source }.into())
    }

    /// The parts that are not there, `missing` and those that went since the listing, and those whose bytes are not what the
    /// index says. Reads all that are there.
    async fn bad_parts(
        &self,
        artifact: &ArtifactId,
        encoding: &EncodingId,
        index: &EncodingIndex,
        missing: Vec<u32>,
    ) -> Result<(Vec<u32>, Vec<u32>), OriginError> {
        let mut missing: BTreeSet<u32> = missing.into_iter().collect();
        let mut wrong = Vec::new();
        for (number, part) in (0..).zip(&index.parts) {
            if missing.contains(&number) {
                continue;
            }
            match self.verify_part(artifact, encoding, number, *part).await {
                Ok(()) => {}
                Err(OriginError::Mismatch { .. }) => wrong.push(number),
                Err(OriginError::NotFound { .. }) => {
                    missing.insert(number);
                }
                Err(error) => return Err(error),
            }
        }
        Ok((missing.into_iter().collect(), wrong))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_names_a_few_parts() {
        assert_eq!(parts_named(&[7]), "part-00007");
        assert_eq!(parts_named(&[0, 1, 2, 3, 4]), "part-00000, part-00001, part-00002 and 2 more");
    }
}
