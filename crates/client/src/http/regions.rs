//! A region process's calls.

use reqwest::Method;

use super::{Client, Result};
use crate::types::{Done, GoalsQuery, GoalsReply, RegionReports};

impl Client {
    /// Goals that changed after a cursor; waits for a change.
    ///
    /// # Errors
    /// [`crate::ClientError`], as for every call.
    pub async fn goals(&self, query: &GoalsQuery) -> Result<GoalsReply> {
        let response = self.send(Method::GET, "v1/region/goals", |call| call.query(query)).await?;
        self.read(response).await
    }

    /// Hands in a batch of what machines said; all of it is kept when this returns.
    ///
    /// # Errors
    /// [`crate::ClientError`], as for every call.
    pub async fn report(&self, reports: &RegionReports) -> Result<()> {
        self.post_again::<_, Done>("v1/region/reports", reports).await.map(drop)
    }
}
