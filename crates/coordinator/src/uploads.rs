//! Operators' uploads into the main bucket: streamed through, and believed only when an index proves them.
//!
//! A part comes before its index, so nothing says yet what it should be. Its hash is remembered as it
//! passes; when the index comes, each part's hash is compared with it, and a part whose hash is no longer
//! known (another coordinator took it, or this one was restarted) is read back. Only then is the index
//! stored, which makes the encoding whole.

use std::{collections::HashMap, ops::Range, sync::Mutex};

use bytes::Bytes;
use shoal_origin::{Bucket, OriginError, PutPart};
use shoal_pieces::open_index;
use shoal_proto::{
    ArtifactId, EncodingId,
    manifest::{EncodingIndex, Location, PART_MAX_BYTES, Part},
};
use shoal_queue::Stored;

use crate::{
    error::{ApiError, ApiResult},
    state::lock,
};

/// How many parts' hashes are remembered: 16,384 of up to 64 MiB are 1 TiB of uploads under way.
const HASHES_MAX: usize = 16_384;

/// How much of a part is read back at once, in bytes; a piece is never longer than twice that.
const READ_BACK_BYTES: u64 = 8 << 20;

/// What is known of uploaded parts whose index has not come.
#[derive(Default)]
pub(crate) struct PartHashes {
    known: Mutex<HashMap<(EncodingId, u32), Option<Part>>>,
}

impl PartHashes {
    fn set(&self, encoding: &EncodingId, number: u32, part: Option<Part>) {
        let mut known = lock(&self.known);
        if known.len() >= HASHES_MAX {
            // They are an optimisation only: parts are read back instead.
            known.clear();
        }
        known.insert((*encoding, number), part);
    }

    fn get(&self, encoding: &EncodingId, number: u32) -> Option<Part> {
        lock(&self.known).get(&(*encoding, number)).copied().flatten()
    }

    /// Whether a part is known not to be what its index says: it is to be sent again.
    pub(crate) fn is_bad(&self, encoding: &EncodingId, number: u32) -> bool {
        lock(&self.known).get(&(*encoding, number)).is_some_and(Option::is_none)
    }

    fn forget(&self, encoding: &EncodingId) {
        lock(&self.known).retain(|(of, _), _| of != encoding);
    }
}

/// The refusal of a part that is too long.
pub(crate) fn part_too_long() -> ApiError {
    ApiError::too_long(format!("a part is at most {PART_MAX_BYTES} bytes"))
}

/// Stores one part from the request's body.
pub(crate) async fn put_part(
    bucket: &Bucket,
    hashes: &PartHashes,
    artifact: &ArtifactId,
    encoding: &EncodingId,
    number: u32,
    body: axum::body::Body,
) -> ApiResult<()> {
    let stream = body.into_data_stream();
    let put = bucket.put_part(artifact, encoding, number, None, stream).await;
    match put {
        Ok(PutPart::Written(part)) => hashes.set(encoding, number, Some(part)),
        Ok(PutPart::Present) => {}
        Err(OriginError::TooLong { .. }) => return Err(part_too_long()),
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

/// The pieces of part `number`: their numbers.
fn pieces_of(layout: &[Location], number: u32) -> Range<usize> {
    let first = layout.partition_point(|place| place.part < number);
    first..layout.partition_point(|place| place.part <= number)
}

/// Reads a part back and hashes it.
async fn read_back(
    bucket: &Bucket,
    artifact: &ArtifactId,
    encoding: &EncodingId,
    layout: &[Location],
    number: u32,
) -> ApiResult<[u8; 32]> {
    let mut hasher = blake3::Hasher::new();
    let mut left = pieces_of(layout, number);
    while !left.is_empty() {
        let mut bytes = 0;
        let fits = layout[left.clone()].iter().take_while(|place| {
            bytes += u64::from(place.len);
            bytes <= READ_BACK_BYTES
        });
        let count = fits.count().max(1);
        let (first, wanted) = (left.start as u32, count as u32);
        for piece in bucket.read_pieces(artifact, encoding, layout, first, wanted).await? {
            hasher.update(&piece);
        }
        left.start += count;
    }
    Ok(*hasher.finalize().as_bytes())
}

/// Stores an index, if it is one, and every part that it names is there and is what it says.
pub(crate) async fn put_index(
    bucket: &Bucket,
    hashes: &PartHashes,
    artifact: &ArtifactId,
    encoding: &EncodingId,
    bytes: Bytes,
) -> ApiResult<()> {
    let index = open_index(&bytes, artifact, encoding).map_err(|error| {
        ApiError::invalid(format!("not the index of encoding {encoding}: {error}"))
    })?;
    let there = bucket.parts(artifact, encoding).await?;
    let missing: Vec<u32> = (0..)
        .zip(&index.parts)
        .filter(|(number, part)| there.get(number) != Some(&part.len))
        .map(|(number, _)| number)
        .collect();
    if let Some(first) = missing.first() {
        return Err(ApiError::not_whole(format!(
            "{} of {} parts are not there or not whole, the first is part-{first:05}: upload them before \
             the index",
            missing.len(),
            index.parts.len()
        )));
    }
    let layout = index.layout();
    let mut wrong = Vec::new();
    for (number, part) in (0..).zip(&index.parts) {
        // What is remembered may be out of date, so it disproves nothing.
        let is_proved = hashes.get(encoding, number) == Some(*part)
            || read_back(bucket, artifact, encoding, &layout, number).await? == part.hash;
        if !is_proved {
            hashes.set(encoding, number, None);
            wrong.push(number);
        }
    }
    if let Some(first) = wrong.first() {
        // One that lies there already says what is not so, and would keep the parts from being written again.
        bucket.remove_index(artifact, encoding).await?;
        return Err(ApiError::not_whole(format!(
            "{} of {} parts are not what the index says, the first is part-{first:05}: upload them again",
            wrong.len(),
            index.parts.len()
        )));
    }
    bucket.put_index(artifact, encoding, bytes).await?;
    hashes.forget(encoding);
    Ok(())
}

/// What lies whole in a bucket; an error that says what is missing.
pub(crate) async fn stored(
    bucket: &Bucket,
    artifact: &ArtifactId,
    encoding: &EncodingId,
) -> ApiResult<Stored> {
    let there = bucket.parts(artifact, encoding).await?;
    let Some(bytes) = bucket.index(artifact, encoding).await? else {
        return Err(ApiError::not_whole(format!(
            "encoding {encoding} of {artifact} is not whole in the main bucket: its index is missing; \
             upload its parts and last the index"
        )));
    };
    let index: EncodingIndex = open_index(&bytes, artifact, encoding).map_err(|error| {
        ApiError::not_whole(format!("the index in the main bucket is damaged: {error}"))
    })?;
    let missing =
        (0..).zip(&index.parts).find(|(number, part)| there.get(number) != Some(&part.len));
    if let Some((number, _)) = missing {
        return Err(ApiError::not_whole(format!(
            "encoding {encoding} of {artifact} is not whole in the main bucket: part-{number:05} is \
             missing or too short"
        )));
    }
    Ok(Stored {
        artifact: *artifact,
        encoding: *encoding,
        size_bytes: index.manifest.size_bytes,
        encoded_bytes: index.encoded_bytes(),
        piece_size_bytes: index.manifest.piece_size.bytes(),
        pieces: index.manifest.piece_count(),
    })
}
