//! Calls about artifacts and their copies.

use std::time::Duration;

use reqwest::{Body, Method};
use shoal_proto::{AppName, ArtifactId, EncodingId};

use super::{Client, Result};
use crate::types::{
    Artifact, ArtifactRef, Done, GcReport, GcRequest, Pin, PinRequest, PublishRequest,
    ReplicationStatusPage, UploadState,
};

/// How long the upload of one part object (64 MiB at most) may take: 1 Mbit/s is enough.
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(600);

impl Client {
    /// Artifacts, newest first; of one app or of all.
    ///
    /// # Errors
    /// [`crate::ClientError`], as for every call.
    pub async fn artifacts(&self, app: Option<&AppName>, limit: u32) -> Result<Vec<Artifact>> {
        let query = app.map(|app| ("app", app.to_string())).into_iter().collect();
        self.list("v1/artifacts", query, Some(limit)).await
    }

    /// One artifact, by name or id.
    ///
    /// # Errors
    /// [`crate::ClientError`], as for every call.
    pub async fn artifact(&self, reference: &str) -> Result<Artifact> {
        self.get("v1/artifact", &[("ref", reference.into())]).await
    }

    /// What is stored of an encoding in the main bucket.
    ///
    /// # Errors
    /// [`crate::ClientError`], as for every call.
    pub async fn upload_state(
        &self,
        artifact: &ArtifactId,
        encoding: &EncodingId,
    ) -> Result<UploadState> {
        self.get(&format!("v1/uploads/{artifact}/{encoding}"), &[]).await
    }

    /// Stores an object of an encoding in the main bucket: `part-00000`, …, and last `index`.
    ///
    /// # Errors
    /// [`crate::ClientError`], as for every call.
    pub async fn upload(
        &self,
        artifact: &ArtifactId,
        encoding: &EncodingId,
        object: &str,
        body: impl Into<Body>,
    ) -> Result<()> {
        let path = format!("v1/uploads/{artifact}/{encoding}/{object}");
        let body = std::sync::Mutex::new(Some(body.into()));
        let build = |request: reqwest::RequestBuilder| {
            let body = body.lock().ok().and_then(|mut body| body.take()).unwrap_or_default();
            request.body(body).timeout(UPLOAD_TIMEOUT)
        };
        self.send(Method::PUT, &path, build).await.map(drop)
    }

    /// Makes an uploaded encoding an artifact of an app.
    ///
    /// # Errors
    /// [`crate::ClientError`], as for every call.
    pub async fn publish(&self, request: &PublishRequest) -> Result<Artifact> {
        self.post("v1/publish", request).await
    }

    /// How the copies are: of one artifact, or of all that are not whole in some bucket.
    ///
    /// # Errors
    /// [`crate::ClientError`], as for every call.
    pub async fn replication(
        &self,
        reference: Option<&str>,
        limit: u32,
    ) -> Result<ReplicationStatusPage> {
        let mut query = vec![("limit", limit.to_string())];
        query.extend(reference.map(|reference| ("ref", reference.to_string())));
        self.get("v1/replication", &query).await
    }

    /// Has an artifact's copies inspected as soon as may be.
    ///
    /// # Errors
    /// [`crate::ClientError`], as for every call.
    pub async fn inspect(&self, reference: &str) -> Result<()> {
        let request = ArtifactRef { artifact: reference.into() };
        self.post::<_, Done>("v1/inspections", &request).await.map(drop)
    }

    /// All pins, newest first.
    ///
    /// # Errors
    /// [`crate::ClientError`], as for every call.
    pub async fn pins(&self) -> Result<Vec<Pin>> {
        self.list("v1/pins", Vec::new(), None).await
    }

    /// Keeps an artifact whatever comes.
    ///
    /// # Errors
    /// [`crate::ClientError`], as for every call.
    pub async fn pin(&self, request: &PinRequest) -> Result<Pin> {
        self.post("v1/pins", request).await
    }

    /// Takes an artifact's pin away.
    ///
    /// # Errors
    /// [`crate::ClientError`], as for every call.
    pub async fn unpin(&self, reference: &str) -> Result<()> {
        let request = ArtifactRef { artifact: reference.into() };
        self.post::<_, Done>("v1/unpin", &request).await.map(drop)
    }

    /// Deletes artifacts that nothing needs, or says which would go.
    ///
    /// # Errors
    /// [`crate::ClientError`], as for every call.
    pub async fn gc(&self, request: &GcRequest) -> Result<GcReport> {
        self.post("v1/gc", request).await
    }
}
