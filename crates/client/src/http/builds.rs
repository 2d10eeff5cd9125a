//! Calls about apps and their builds.

use bytes::Bytes;
use reqwest::Method;
use shoal_proto::AppName;

use super::{Client, ClientError, Result};
use crate::types::{App, BuildRequest, Job};

impl Client {
    /// Registers an app, or changes it.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn set_app(&self, app: &App) -> Result<App> {
        let path = format!("v1/apps/{}", app.name);
        self.repeated(|| async {
            let response = self.send(Method::PUT, &path, |request| request.json(app)).await?;
            self.read(response).await
        })
        .await
    }

    /// All apps, by name.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn apps(&self) -> Result<Vec<App>> {
        self.list("v1/apps", Vec::new(), None).await
    }

    /// One app.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn app(&self, app: &AppName) -> Result<App> {
        self.get(&format!("v1/apps/{app}"), &[]).await
    }

    /// Asks for a build, or joins the job that waits or runs for the same commit.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn build(&self, request: &BuildRequest) -> Result<Job> {
        self.post("v1/jobs", request).await
    }

    /// Jobs, newest first; of one app or of all.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn jobs(&self, app: Option<&AppName>, limit: u32) -> Result<Vec<Job>> {
        let query = app.map(|app| ("app", app.to_string())).into_iter().collect();
        self.list("v1/jobs", query, Some(limit)).await
    }

    /// One job, with its attempts.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn job(&self, id: i64) -> Result<Job> {
        self.get(&format!("v1/jobs/{id}"), &[]).await
    }

    /// Cancels a job that has not ended.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn cancel_job(&self, id: i64) -> Result<Job> {
        self.post(&format!("v1/jobs/{id}/cancel"), &()).await
    }

    /// A job's log from byte `offset` on: at most 1 MiB of it.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn job_log(&self, id: i64, offset: u64) -> Result<Bytes> {
        let query = [("offset", offset.to_string())];
        let path = format!("v1/jobs/{id}/log");
        let response = self.send(Method::GET, &path, |request| request.query(&query)).await?;
        let bytes = response.bytes().await;
        bytes.map_err(|source| ClientError::unreached(self.url(), source))
    }
}
