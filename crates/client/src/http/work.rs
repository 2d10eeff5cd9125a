//! A worker's calls.

use bytes::Bytes;
use reqwest::{Method, StatusCode};

use super::{Client, Result};
use crate::types::{
    ClaimRequest, ClaimedJob, FinishRequest, HeartbeatReply, Job, LeaseRef, WatchRequest,
};

impl Client {
    /// Asks for a job; none when there is none within the wait.
    ///
    /// # Errors
    /// [`crate::ClientError`], as for every call.
    pub async fn claim(&self, request: &ClaimRequest) -> Result<Option<ClaimedJob>> {
        let response =
            self.send(Method::POST, "v1/worker/claim", |call| call.json(request)).await?;
        if response.status() == StatusCode::NO_CONTENT {
            return Ok(None);
        }
        self.read(response).await.map(Some)
    }

    /// Says that a worker still builds. Refused with `lease_lost` when the job was given to another.
    ///
    /// # Errors
    /// [`crate::ClientError`], as for every call.
    pub async fn heartbeat(&self, job: i64, lease: &LeaseRef) -> Result<HeartbeatReply> {
        self.post_again(&format!("v1/worker/jobs/{job}/heartbeat"), lease).await
    }

    /// Waits until a job that is worked on is to be cancelled, or the time is over. Refused with `lease_lost` when the
    /// job was given to another.
    ///
    /// # Errors
    /// [`crate::ClientError`], as for every call.
    pub async fn watch_job(&self, job: i64, request: &WatchRequest) -> Result<HeartbeatReply> {
        self.post_once(&format!("v1/worker/jobs/{job}/watch"), request).await
    }

    /// Adds to a job's log at byte `offset`; what is there already is not added twice.
    ///
    /// # Errors
    /// [`crate::ClientError`], as for every call.
    pub async fn append_log(
        &self,
        job: i64,
        lease: &LeaseRef,
        offset: u64,
        bytes: Bytes,
    ) -> Result<()> {
        let query = [
            ("attempt", lease.attempt.to_string()),
            ("lease", lease.lease.clone()),
            ("offset", offset.to_string()),
        ];
        let path = format!("v1/worker/jobs/{job}/log");
        self.repeated(|| async {
            let build = |call: reqwest::RequestBuilder| call.query(&query).body(bytes.clone());
            self.send(Method::POST, &path, build).await.map(drop)
        })
        .await
    }

    /// Ends an attempt. The same end told twice is answered alike.
    ///
    /// # Errors
    /// [`crate::ClientError`], as for every call.
    pub async fn finish(&self, job: i64, request: &FinishRequest) -> Result<Job> {
        self.post_again(&format!("v1/worker/jobs/{job}/finish"), request).await
    }
}
