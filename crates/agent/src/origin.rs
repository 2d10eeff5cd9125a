//! How this machine reads the region's bucket: by itself, where its configuration names the bucket and its
//! environment has credentials; else by the URLs that come with leases, for which it needs none.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use shoal_origin::{Bucket, OriginError, UrlReader};
use shoal_proto::{
    ArtifactId, EncodingId,
    manifest::Location,
    region::{LEASE_PIECES_MAX, SIGNED_URL_MAX_BYTES, SignedUrl},
};

/// The most URLs that are held at once: several times what the policy leases. At 4 KiB each they take 1 MiB.
const URLS_MAX: usize = 256;

/// A piece of an encoding.
type Key = (ArtifactId, EncodingId, u32);

/// A handle on the bucket; clones share it.
#[derive(Clone)]
pub(crate) struct Origin(Arc<Inner>);

struct Inner {
    /// None: only what comes with leases is read.
    bucket: Option<Bucket>,
    reader: UrlReader,
    /// Each with the end of its lease, by this machine's own clock.
    urls: Mutex<HashMap<Key, (SignedUrl, Instant)>>,
}

/// Why nothing was read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    #[error(transparent)]
    Origin(#[from] OriginError),
    #[error(
        "this machine has no bucket of its own, and no region process gave it a URL: it waits for neighbours"
    )]
    NoUrl,
}

impl Origin {
    pub(crate) fn new(bucket: Option<Bucket>) -> Result<Self, OriginError> {
        let reader = UrlReader::new()?;
        Ok(Self(Arc::new(Inner { bucket, reader, urls: Mutex::default() })))
    }

    /// The bucket, when this machine reads it by itself.
    pub(crate) fn bucket(&self) -> Option<&Bucket> {
        self.0.bucket.as_ref()
    }

    fn urls(&self) -> std::sync::MutexGuard<'_, HashMap<Key, (SignedUrl, Instant)>> {
        self.0.urls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the URLs of a lease, from piece `first` on. They hold at least as long as the lease, so clocks need not
    /// agree. False when they are not what a region process may send: then there is no lease.
    pub(crate) fn keep(
        &self,
        (artifact, encoding): (ArtifactId, EncodingId),
        first: u32,
        urls: Vec<SignedUrl>,
        duration: Duration,
    ) -> bool {
        let right = !urls.is_empty()
            && urls.len() <= LEASE_PIECES_MAX as usize
            && urls.iter().all(|url| url.0.len() <= SIGNED_URL_MAX_BYTES);
        let now = Instant::now();
        let mut kept = self.urls();
        kept.retain(|_, (_, until)| *until > now);
        if !right || kept.len() + urls.len() > URLS_MAX {
            return false;
        }
        for (piece, url) in (first..).zip(urls) {
            kept.insert((artifact, encoding, piece), (url, now + duration));
        }
        true
    }

    /// The stored bytes of a piece. A URL serves once: a piece that fails is leased again.
    pub(crate) async fn read(
        &self,
        (artifact, encoding): (ArtifactId, EncodingId),
        layout: &[Location],
        piece: u32,
    ) -> Result<Bytes, ReadError> {
        let no_such = || OriginError::NoSuchPieces { first: piece, count: 1, pieces: layout.len() };
        if let Some(bucket) = &self.0.bucket {
            let pieces = bucket.read_pieces(&artifact, &encoding, layout, piece, 1).await?;
            return Ok(pieces.into_iter().next().ok_or_else(no_such)?);
        }
        let place = layout.get(piece as usize).ok_or_else(no_such)?;
        let url = self.urls().remove(&(artifact, encoding, piece));
        let url = url.filter(|(_, until)| *until > Instant::now()).ok_or(ReadError::NoUrl)?;
        Ok(self.0.reader.read(&url.0.0, place).await?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_secs(30);

    fn urls(count: usize, len: usize) -> Vec<SignedUrl> {
        (0..count).map(|_| SignedUrl("x".repeat(len))).collect()
    }

    #[tokio::test]
    async fn only_leases_within_their_bounds_are_kept_and_a_url_serves_once() {
        let origin = Origin::new(None).unwrap();
        let of = |number| (ArtifactId::EMPTY, EncodingId([number; 32]));
        assert!(!origin.keep(of(0), 0, urls(0, 1), LEASE));
        assert!(!origin.keep(of(0), 0, urls(LEASE_PIECES_MAX as usize + 1, 1), LEASE));
        assert!(!origin.keep(of(0), 0, urls(1, SIGNED_URL_MAX_BYTES + 1), LEASE));
        // Over at once: neither read by nor in the way.
        assert!(origin.keep(of(0), 3, urls(1, 1), Duration::ZERO));
        let layout = [Location { part: 0, offset: 0, len: 1 }; 4];
        let read = origin.read(of(0), &layout, 3).await;
        assert!(matches!(read, Err(ReadError::NoUrl)), "{read:?}");
        for number in 0..(URLS_MAX / 16) as u8 {
            assert!(origin.keep(of(number), 0, urls(16, 1), LEASE));
        }
        assert!(!origin.keep(of(200), 0, urls(1, 1), LEASE));
        assert_eq!(origin.urls().len(), URLS_MAX);
        assert!(!format!("{:?}", urls(1, 5)).contains('x'), "a URL shows itself to nobody");
        // No URL at all, and gone after the try.
        let read = origin.read(of(0), &layout, 2).await.unwrap_err();
        assert!(matches!(read, ReadError::Origin(OriginError::Url { .. })), "{read}");
        assert!(matches!(origin.read(of(0), &layout, 2).await, Err(ReadError::NoUrl)));
        let beyond = origin.read(of(0), &layout, 4).await.unwrap_err();
        assert!(matches!(beyond, ReadError::Origin(OriginError::NoSuchPieces { .. })));
    }
}
