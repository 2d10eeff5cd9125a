//! Calls about deployments, machines and regions.

use shoal_proto::{AppName, RegionName};

use super::{Client, Result};
use crate::types::{
    AppStatus, DeployRequest, HaltRequest, Machine, Region, RollbackRequest, Rollout,
};

impl Client {
    /// Sets an app's goal.
    ///
    /// # Errors
    /// [`crate::ClientError`], as for every call.
    pub async fn deploy(&self, request: &DeployRequest) -> Result<Rollout> {
        self.post("v1/deployments", request).await
    }

    /// Sets an app's goal back.
    ///
    /// # Errors
    /// [`crate::ClientError`], as for every call.
    pub async fn rollback(&self, request: &RollbackRequest) -> Result<Rollout> {
        self.post("v1/rollbacks", request).await
    }

    /// Each app's present rollout.
    ///
    /// # Errors
    /// [`crate::ClientError`], as for every call.
    pub async fn status(&self, app: Option<&AppName>) -> Result<Vec<AppStatus>> {
        let query = app.map(|app| ("app", app.to_string())).into_iter().collect();
        self.list("v1/status", query, None).await
    }

    /// One rollout.
    ///
    /// # Errors
    /// [`crate::ClientError`], as for every call.
    pub async fn rollout(&self, id: i64) -> Result<Rollout> {
        self.get(&format!("v1/rollouts/{id}"), &[]).await
    }

    /// Cancels a rollout that has not ended: its goal stays, its waves open no further.
    ///
    /// # Errors
    /// [`crate::ClientError`], as for every call.
    pub async fn cancel_rollout(&self, id: i64) -> Result<Rollout> {
        self.post(&format!("v1/rollouts/{id}/cancel"), &()).await
    }

    /// Pauses a rollout, so that no further wave opens, or lets it go on.
    ///
    /// # Errors
    /// [`crate::ClientError`], as for every call.
    pub async fn pause_rollout(&self, id: i64, pause: bool) -> Result<Rollout> {
        let verb = if pause { "pause" } else { "resume" };
        self.post(&format!("v1/rollouts/{id}/{verb}"), &()).await
    }

    /// Machines and what they run.
    ///
    /// # Errors
    /// [`crate::ClientError`], as for every call.
    pub async fn machines(
        &self,
        region: Option<&RegionName>,
        app: Option<&AppName>,
    ) -> Result<Vec<Machine>> {
        let mut query = Vec::new();
        query.extend(region.map(|region| ("region", region.to_string())));
        query.extend(app.map(|app| ("app", app.to_string())));
        self.list("v1/machines", query, None).await
    }

    /// All regions.
    ///
    /// # Errors
    /// [`crate::ClientError`], as for every call.
    pub async fn regions(&self) -> Result<Vec<Region>> {
        self.list("v1/regions", Vec::new(), None).await
    }

    /// Takes a region out of service.
    ///
    /// # Errors
    /// [`crate::ClientError`], as for every call.
    pub async fn drain_region(&self, region: &RegionName, request: &HaltRequest) -> Result<Region> {
        self.post(&format!("v1/regions/{region}/drain"), request).await
    }

    /// Puts a region back into service.
    ///
    /// # Errors
    /// [`crate::ClientError`], as for every call.
    pub async fn undrain_region(&self, region: &RegionName) -> Result<Region> {
        self.post(&format!("v1/regions/{region}/undrain"), &()).await
    }
}
