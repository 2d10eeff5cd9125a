//! Calls about the queue and its workers.

use shoal_proto::MachineName;

use super::{Client, Result};
use crate::types::{HaltRequest, QueueStatus, Worker};

impl Client {
    /// Whether the queue is paused, and how much waits.
    ///
    /// # Errors
    /// [`crate::ClientError`], as for every call.
    pub async fn queue(&self) -> Result<QueueStatus> {
        self.get("v1/queue", &[]).await
    }

    /// Lets no worker take a job until [`Client::resume_queue`].
    ///
    /// # Errors
    /// [`crate::ClientError`], as for every call.
    pub async fn pause_queue(&self, request: &HaltRequest) -> Result<QueueStatus> {
        self.post("v1/queue/pause", request).await
    }

    /// Lets workers take jobs again.
    ///
    /// # Errors
    /// [`crate::ClientError`], as for every call.
    pub async fn resume_queue(&self) -> Result<QueueStatus> {
        self.post("v1/queue/resume", &()).await
    }

    /// All workers, by name.
    ///
    /// # Errors
    /// [`crate::ClientError`], as for every call.
    pub async fn workers(&self) -> Result<Vec<Worker>> {
        self.list("v1/workers", Vec::new(), None).await
    }

    /// Lets a worker take no more jobs; it finishes what it has.
    ///
    /// # Errors
    /// [`crate::ClientError`], as for every call.
    pub async fn drain_worker(
        &self,
        worker: &MachineName,
        request: &HaltRequest,
    ) -> Result<Worker> {
        self.post(&format!("v1/workers/{worker}/drain"), request).await
    }

    /// Lets a worker take jobs again.
    ///
    /// # Errors
    /// [`crate::ClientError`], as for every call.
    pub async fn undrain_worker(&self, worker: &MachineName) -> Result<Worker> {
        self.post(&format!("v1/workers/{worker}/undrain"), &()).await
    }
}
