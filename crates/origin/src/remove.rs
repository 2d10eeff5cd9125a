//! Taking an encoding out of a bucket: the index first, so that nobody begins to read it, and then the rest.

use futures::{StreamExt as _, TryStreamExt as _, stream};
use object_store::{ObjectStoreExt as _, path::Path};
use shoal_proto::{ArtifactId, EncodingId};

use crate::{bucket::Bucket, error::OriginError, retry::retried};

/// How many objects of one encoding are deleted at once.
const DELETES_IN_PARALLEL: usize = 8;

impl Bucket {
    async fn delete(&self, key: &Path) -> Result<(), OriginError> {
        let deleted = retried("delete", || async {
            self.store().delete(key).await.map_err(|error| self.error(key, error))
        });
        match deleted.await {
            // S3 says nothing of what is not there; a directory does.
            Ok(()) | Err(OriginError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Deletes an encoding's index: from now on it is not whole for anybody who looks. What is not there is no error.
    ///
    /// # Errors
    /// [`OriginError::Denied`], [`OriginError::NoBucket`], [`OriginError::Store`].
    pub async fn remove_index(
        &self,
        artifact: &ArtifactId,
        encoding: &EncodingId,
    ) -> Result<(), OriginError> {
        self.delete(&self.index_key(artifact, encoding)).await
    }

    /// Deletes the rest of what lies under an encoding, part by part, for as long as `may` says so; returns whether all is
    /// gone. Call it until it is: what came meanwhile is seen by the next listing.
    ///
    /// # Errors
    /// As [`Bucket::remove_index`].
    pub async fn remove_parts(
        &self,
        artifact: &ArtifactId,
        encoding: &EncodingId,
        may: impl Fn() -> bool + Sync,
    ) -> Result<bool, OriginError> {
        let keys = self.keys(artifact, encoding).await?;
        let (may, any) = (&may, !keys.is_empty());
        let deleted = stream::iter(keys).map(|key| async move {
            if may() { self.delete(&key).await.map(|()| true) } else { Ok(false) }
        });
        let all = deleted
            .buffer_unordered(DELETES_IN_PARALLEL)
            .try_fold(true, |all, deleted| std::future::ready(Ok(all && deleted)))
            .await?;
        if any || !all {
            // A listing that is empty says that it is over.
            return Ok(false);
        }
        self.remove_directory(artifact, encoding).await;
        Ok(true)
    }

    /// Deletes all that lies under this bucket's prefix, whatever it is: for who has made the prefix for himself. Uploads that
    /// were cut off are not seen; the bucket's lifecycle rule ends them.
    ///
    /// # Errors
    /// [`OriginError::Address`] for a directory and for a bucket without a prefix; else as [`Bucket::remove_index`].
    pub async fn clear(&self) -> Result<(), OriginError> {
        let prefix = self.prefix();
        if !self.signs() || prefix.as_ref().is_empty() {
            let reason = "only what is under a prefix of S3 or GCS is deleted as a whole".into();
            return Err(OriginError::Address { url: self.url().into(), reason });
        }
        loop {
            let keys = self.listed(prefix).await?;
            if keys.is_empty() {
                return Ok(());
            }
            let deleted = stream::iter(&keys).map(|key| self.delete(key));
            let () = deleted.buffer_unordered(DELETES_IN_PARALLEL).try_collect().await?;
        }
    }

    async fn listed(&self, prefix: &Path) -> Result<Vec<Path>, OriginError> {
        retried("list", || async {
            let listing = self.store().list(Some(prefix));
            let keys = listing.map_ok(|meta| meta.location).try_collect().await;
            keys.map_err(|error| self.error(prefix, error))
        })
        .await
    }

    /// The keys of all objects of an encoding.
    async fn keys(
        &self,
        artifact: &ArtifactId,
        encoding: &EncodingId,
    ) -> Result<Vec<Path>, OriginError> {
        self.listed(&self.encoding_key(artifact, encoding)).await
    }

    /// Takes away the directories that were its, and what uploads that were cut off have left there.
    async fn remove_directory(&self, artifact: &ArtifactId, encoding: &EncodingId) {
        let Some(dir) = self.directory(artifact, encoding) else { return };
        self.sweep(artifact, encoding).await;
        let removed = tokio::task::spawn_blocking(move || {
            // Not empty: somebody else's, or another encoding's.
            std::fs::remove_dir(&dir)?;
            dir.parent().map_or(Ok(()), std::fs::remove_dir)
        });
        if let Ok(Err(error)) = removed.await {
            tracing::debug!(%error, bucket = self.url(), "a directory stays");
        }
    }
}
