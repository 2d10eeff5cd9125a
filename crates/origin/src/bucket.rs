//! A bucket: how it is opened, what its objects are called, what is there.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fmt,
    path::{Path as FsPath, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::{ObjectStore, local::LocalFileSystem, path::Path, signer::Signer};
use shoal_proto::{
    ArtifactId, EncodingId,
    manifest::{EncodingIndex, INDEX_MAX_BYTES},
};
use url::Url;

use crate::{cloud, error::OriginError, retry::retried};

/// A bucket. Clones share one client.
#[derive(Clone)]
pub struct Bucket {
    inner: Arc<Inner>,
}

struct Inner {
    /// Tells it from all other buckets of this process.
    number: u64,
    store: Arc<dyn ObjectStore>,
    /// Put in front of every key.
    prefix: Path,
    /// For messages; holds no credentials.
    url: String,
    /// The directory, when the bucket is one.
    root: Option<PathBuf>,
    /// Makes URLs that need no credentials; a directory has none.
    signer: Option<Arc<dyn Signer>>,
    /// The store has refused a write on a condition, and would do so again.
    unconditional: AtomicBool,
}

/// What a bucket holds of an encoding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Check {
    /// The index, and every part in its right length.
    Whole,
    /// Some of it.
    Missing {
        /// Whether the index is there.
        index: bool,
        /// The parts that the index names and that are missing or of the wrong length; empty when
        /// there is no index to tell.
        parts: Vec<u32>,
    },
    /// Nothing.
    Absent,
}

impl fmt::Debug for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Bucket").field(&self.inner.url).finish()
    }
}

impl fmt::Display for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.inner.url)
    }
}

impl Bucket {
    /// Opens a bucket: a directory (created if it is not there), `file:///dir`, `s3://bucket/prefix`
    /// or `gs://bucket/prefix`. S3 and GCS take their credentials and settings from the environment
    /// variables and files of their SDKs (`AWS_*`, `GOOGLE_*`). Sends nothing yet.
    ///
    /// # Errors
    /// [`OriginError::Address`] when it is none of these, [`OriginError::File`] when the directory
    /// cannot be made, [`OriginError::Settings`] and [`OriginError::Store`] when the settings do not do.
    pub fn open(url: &str) -> Result<Self, OriginError> {
        let text = |(name, value): (OsString, OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        Self::open_in(url, std::env::vars_os().filter_map(text))
    }

    /// The same with these variables in place of the process's own.
    ///
    /// # Errors
    /// As [`Bucket::open`].
    pub fn open_in(
        url: &str,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, OriginError> {
        let wrong = |reason: &str| OriginError::Address { url: url.into(), reason: reason.into() };
        if url.is_empty() {
            return Err(wrong("it is empty"));
        }
        if !url.contains("://") {
            return Self::open_directory(FsPath::new(url));
        }
        let parsed = Url::parse(url).map_err(|error| wrong(&error.to_string()))?;
        let host = || match parsed.host_str() {
            Some(host) if !host.is_empty() => Ok(host.to_string()),
            _ => Err(wrong("it names no bucket")),
        };
        if !parsed.username().is_empty() || parsed.password().is_some() {
            // Not repeated: what stands there is a secret, and would go on into logs and the database.
            let (url, reason) = ("(with credentials)", "credentials come from the environment");
            return Err(OriginError::Address { url: url.into(), reason: reason.into() });
        }
        let environment = environment.into_iter().collect();
        let (store, signer): (Arc<dyn ObjectStore>, Arc<dyn Signer>) = match parsed.scheme() {
            "file" => {
                let path = parsed.to_file_path().map_err(|()| wrong("not a local path"))?;
                return Self::open_directory(&path);
            }
            "s3" => {
                let store = Arc::new(cloud::s3(&host()?, &environment)?);
                (store.clone(), store)
            }
            "gs" => {
                let store = Arc::new(cloud::gcs(&host()?, &environment)?);
                (store.clone(), store)
            }
            scheme => return Err(wrong(&format!("unknown scheme '{scheme}'"))),
        };
        let prefix = Path::from_url_path(parsed.path()).map_err(|e| wrong(&e.to_string()))?;
        let url = format!("{}://{}/{prefix}", parsed.scheme(), host()?);
        Ok(Self::with(store, prefix, url, None, Some(signer)))
    }

    fn with(
        store: Arc<dyn ObjectStore>,
        prefix: Path,
        url: String,
        root: Option<PathBuf>,
        signer: Option<Arc<dyn Signer>>,
    ) -> Self {
        let unconditional = AtomicBool::new(false);
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self { inner: Arc::new(Inner { number, store, prefix, url, root, signer, unconditional }) }
    }

    fn open_directory(path: &FsPath) -> Result<Self, OriginError> {
        let failed = |source| OriginError::File { path: path.into(), source };
        std::fs::create_dir_all(path).map_err(failed)?;
        let root = path.canonicalize().map_err(failed)?;
        let store = LocalFileSystem::new_with_prefix(&root)?.with_fsync(true);
        let url = root.display().to_string();
        Ok(Self::with(Arc::new(store), Path::default(), url, Some(root), None))
    }

    /// A bucket over any store, for tests that make one fail.
    #[cfg(test)]
    pub(crate) fn over(store: Arc<dyn ObjectStore>) -> Self {
        Self::with(store, Path::default(), "test".into(), None, None)
    }

    /// Its number among the buckets that this process has opened.
    pub(crate) fn number(&self) -> u64 {
        self.inner.number
    }

    /// Its address, without credentials.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.inner.url
    }

    pub(crate) fn prefix(&self) -> &Path {
        &self.inner.prefix
    }

    pub(crate) fn store(&self) -> &dyn ObjectStore {
        self.inner.store.as_ref()
    }

    /// The directory of an encoding, when the bucket is a directory.
    pub(crate) fn directory(
        &self,
        artifact: &ArtifactId,
        encoding: &EncodingId,
    ) -> Option<PathBuf> {
        let root = self.inner.root.as_ref()?;
        Some(root.join("artifacts").join(artifact.to_string()).join(encoding.to_string()))
    }

    pub(crate) fn encoding_key(&self, artifact: &ArtifactId, encoding: &EncodingId) -> Path {
        let prefix = self.inner.prefix.clone();
        prefix.join("artifacts").join(artifact.to_string()).join(encoding.to_string())
    }

    pub(crate) fn part_key(&self, artifact: &ArtifactId, encoding: &EncodingId, part: u32) -> Path {
        self.encoding_key(artifact, encoding).join(part_name(part))
    }

    pub(crate) fn index_key(&self, artifact: &ArtifactId, encoding: &EncodingId) -> Path {
        self.encoding_key(artifact, encoding).join("index")
    }

    pub(crate) fn signer(&self) -> Option<&dyn Signer> {
        self.inner.signer.as_deref()
    }

    /// Whether the store has refused a write on a condition.
    pub(crate) fn unconditional(&self) -> &AtomicBool {
        &self.inner.unconditional
    }

    /// The store's error in the words of this crate.
    pub(crate) fn error(&self, key: &Path, error: object_store::Error) -> OriginError {
        OriginError::of_store(&self.inner.url, key.as_ref(), error)
    }

    /// Asks for a listing, of which the answer does not matter: whether the bucket is there and may be read.
    ///
    /// # Errors
    /// [`OriginError::NoBucket`], [`OriginError::NoCredentials`], [`OriginError::Denied`],
    /// [`OriginError::Store`]; a directory is always there.
    pub async fn probe(&self) -> Result<(), OriginError> {
        let nothing = self.inner.prefix.clone().join("artifacts").join("none");
        let listed = self.store().list_with_delimiter(Some(&nothing)).await;
        listed.map(drop).map_err(|error| self.error(&nothing, error))
    }

    /// An encoding's index as stored; none when it is not there, that is when the encoding is not
    /// (or not yet) whole. Not checked: give it to `shoal_pieces::open_index`.
    ///
    /// # Errors
    /// [`OriginError::TooLong`] beyond [`INDEX_MAX_BYTES`]; [`OriginError::Store`].
    pub async fn index(
        &self,
        artifact: &ArtifactId,
        encoding: &EncodingId,
    ) -> Result<Option<Bytes>, OriginError> {
        let key = self.index_key(artifact, encoding);
        match self.get_whole(&key, INDEX_MAX_BYTES as u64).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(OriginError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The parts that are there: number and length in bytes.
    ///
    /// # Errors
    /// [`OriginError::Store`].
    pub async fn parts(
        &self,
        artifact: &ArtifactId,
        encoding: &EncodingId,
    ) -> Result<BTreeMap<u32, u64>, OriginError> {
        let prefix = self.encoding_key(artifact, encoding);
        retried("list", || async {
            let mut parts = BTreeMap::new();
            let mut listing = self.store().list(Some(&prefix));
            while let Some(meta) = listing.try_next().await.map_err(|e| self.error(&prefix, e))? {
                if let Some(number) = meta.location.filename().and_then(part_number) {
                    parts.insert(number, meta.size);
                }
            }
            Ok(parts)
        })
        .await
    }

    /// What is there of an encoding, by its index and the parts' lengths; reads no part.
    ///
    /// # Errors
    /// [`OriginError::Index`] when the index that is there is not this encoding's;
    /// [`OriginError::Store`].
    pub async fn check(
        &self,
        artifact: &ArtifactId,
        encoding: &EncodingId,
    ) -> Result<Check, OriginError> {
        let there = self.parts(artifact, encoding).await?;
        let Some(bytes) = self.index(artifact, encoding).await? else {
            let absent = Check::Missing { index: false, parts: Vec::new() };
            return Ok(if there.is_empty() { Check::Absent } else { absent });
        };
        let index = open_index(&bytes, artifact, encoding)?;
        let parts = missing(&index, &there);
        Ok(if parts.is_empty() { Check::Whole } else { Check::Missing { index: true, parts } })
    }
}

/// The name of part `number`, in a bucket and in the directory that `shoal_store::cut` writes.
pub(crate) fn part_name(number: u32) -> String {
    format!("part-{number:05}")
}

fn part_number(name: &str) -> Option<u32> {
    let number = name.strip_prefix("part-")?.parse().ok()?;
    (part_name(number) == name).then_some(number)
}

/// The parts of `index` that are not among `there` in their right length.
pub(crate) fn missing(index: &EncodingIndex, there: &BTreeMap<u32, u64>) -> Vec<u32> {
    (0..)
        .zip(&index.parts)
        .filter(|(n, part)| there.get(n) != Some(&part.len))
        .map(|(n, _)| n)
        .collect()
}

/// Opens and checks an index.
pub(crate) fn open_index(
    bytes: &[u8],
    artifact: &ArtifactId,
    encoding: &EncodingId,
) -> Result<EncodingIndex, OriginError> {
    shoal_pieces::open_index(bytes, artifact, encoding)
        .map_err(|error| OriginError::Index { encoding: *encoding, reason: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b c");
        let bucket = Bucket::open(path.to_str().unwrap()).unwrap();
        assert!(path.is_dir(), "a directory is made");
        assert_eq!(bucket.url(), path.canonicalize().unwrap().to_str().unwrap());
        let url = Url::from_file_path(&path).unwrap();
        assert_eq!(Bucket::open(url.as_str()).unwrap().url(), bucket.url());
        for wrong in ["", "ftp://x/y", "s3://", "file://host/x", "gs:///x", "s3://key:secret@b/p"] {
            let error = Bucket::open(wrong).unwrap_err();
            assert!(matches!(error, OriginError::Address { .. }), "{wrong}: {error}");
            assert!(!error.to_string().contains("secret"), "{error}");
        }
    }

    #[test]
    fn keys_and_part_names() {
        let dir = tempfile::tempdir().unwrap();
        let bucket = Bucket::open(dir.path().to_str().unwrap()).unwrap();
        let (artifact, encoding) = (ArtifactId([0xab; 32]), EncodingId([1; 32]));
        let key = bucket.part_key(&artifact, &encoding, 7).to_string();
        assert_eq!(key, format!("artifacts/{artifact}/{encoding}/part-00007"));
        assert_eq!(part_number("part-00007"), Some(7));
        assert_eq!(part_number("part-100000"), Some(100_000));
        for wrong in ["part-7", "part-+0007", "part-", "index", "part-00007#1"] {
            assert_eq!(part_number(wrong), None, "{wrong}");
        }
    }
}
