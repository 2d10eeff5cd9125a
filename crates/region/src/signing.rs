//! URLs for leased pieces: this process holds credentials for the bucket, so that no machine needs any.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use shoal_origin::Bucket;
use shoal_proto::{
    ArtifactId, EncodingId,
    manifest::Location,
    region::{SIGNED_URL_MAX_BYTES, SignedUrl},
};

use crate::serve::Server;

/// For how long a URL holds beyond its lease. The store counts from the time of day of this machine, which may be as
/// far off as S3 lets any signed request be.
const CLOCKS_DIFFER_MAX: Duration = Duration::from_secs(15 * 60);

/// Of how many encodings it is kept where their pieces lie; the one that was longest unused makes room. 2,400 pieces
/// take 40 KB.
const LAYOUTS_MAX: usize = 64;

type Key = (ArtifactId, EncodingId);
type Layout = Arc<Vec<Location>>;

/// Where the pieces of the encodings lie that were asked for lately, the last one last.
#[derive(Default)]
pub(crate) struct Signing(Mutex<Vec<(Key, Layout)>>);

impl Signing {
    /// Where an encoding's pieces lie, by its index.
    pub(crate) async fn layout(
        &self,
        artifact: &ArtifactId,
        encoding: &EncodingId,
        server: &Server,
    ) -> Result<Layout, String> {
        if !server.bucket.signs() {
            return Err(format!(
                "the region's bucket {} makes no URLs: set `bucket` in the agents' configuration",
                server.bucket
            ));
        }
        let key = (*artifact, *encoding);
        if let Some(layout) = self.kept(&key) {
            return Ok(layout);
        }
        let bytes = server.index(artifact, encoding).await;
        let bytes = bytes.ok_or("the region's bucket has no such index, or cannot be read")?;
        let index = shoal_pieces::open_index(&bytes, artifact, encoding)
            .map_err(|error| format!("the index in the region's bucket: {error}"))?;
        let layout = Arc::new(index.layout());
        self.keep(key, layout.clone());
        Ok(layout)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<(Key, Layout)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kept(&self, key: &Key) -> Option<Layout> {
        let mut kept = self.lock();
        let at = kept.iter().position(|(of, _)| of == key)?;
        let found = kept.remove(at);
        let layout = found.1.clone();
        kept.push(found);
        Some(layout)
    }

    fn keep(&self, key: Key, layout: Layout) {
        let mut kept = self.lock();
        kept.retain(|(of, _)| *of != key);
        if kept.len() >= LAYOUTS_MAX {
            kept.remove(0);
        }
        kept.push((key, layout));
    }
}

/// Signs a URL for each leased piece, which holds longer than the lease.
pub(crate) async fn sign(
    bucket: &Bucket,
    artifact: &ArtifactId,
    encoding: &EncodingId,
    layout: &[Location],
    pieces: (u32, u32),
    duration_ms: u32,
) -> Result<Vec<SignedUrl>, String> {
    let valid = Duration::from_millis(duration_ms.into()) + CLOCKS_DIFFER_MAX;
    let urls = bucket.sign_pieces(artifact, encoding, layout, pieces, valid).await;
    let urls = urls.map_err(|error| format!("the region process cannot sign URLs: {error}"))?;
    if urls.iter().any(|url| url.len() > SIGNED_URL_MAX_BYTES) {
        return Err(format!("a signed URL is longer than {SIGNED_URL_MAX_BYTES} bytes"));
    }
    Ok(urls.into_iter().map(SignedUrl).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_unused_layout_makes_room() {
        let signing = Signing::default();
        let key = |number: u8| (ArtifactId::EMPTY, EncodingId([number; 32]));
        for number in 0..LAYOUTS_MAX as u8 {
            signing.keep(key(number), Layout::default());
        }
        assert!(signing.kept(&key(0)).is_some());
        signing.keep(key(200), Layout::default());
        assert!(signing.kept(&key(0)).is_some() && signing.kept(&key(1)).is_none());
        assert_eq!(signing.lock().len(), LAYOUTS_MAX);
    }
}
