//! The calls about membership.

use reqwest::Method;

use super::{Client, ClientError, Result};
use crate::types::{
    CaBeginRequest, CertificateReply, Done, FinishRotation, GoalKeyBeginRequest, JoinReply,
    JoinRequest, JoinToken, JoinTokenMade, JoinTokenRequest, RenewForRequest, RevokeReply,
    RevokeRequest, Standing, TrustChanged, TrustQuery, TrustReply, TrustStatus,
};

impl Client {
    /// The trust bundles that lead on from one; waits for a newer one. Whoever asks, with a certificate or without.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn trust(&self, query: &TrustQuery) -> Result<TrustReply> {
        let response = self.send(Method::GET, "v1/trust", |call| call.query(query)).await?;
        self.read(response).await
    }

    /// Has all certificates of a machine count no longer.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn revoke(&self, request: &RevokeRequest) -> Result<RevokeReply> {
        self.post("v1/trust/revoke", request).await
    }

    /// Whom the cluster believes, and how far that has come.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn trust_status(&self) -> Result<TrustStatus> {
        self.get("v1/trust/status", &[]).await
    }

    /// Believes a new CA beside the present one, and has certificates renewed by it.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn begin_ca(&self, request: &CaBeginRequest) -> Result<TrustChanged> {
        self.post("v1/trust/ca/begin", request).await
    }

    /// Believes the newest CA alone.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn finish_ca(&self, request: &FinishRotation) -> Result<TrustChanged> {
        self.post("v1/trust/ca/finish", request).await
    }

    /// Believes a new goal key beside the present one.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn begin_goal_key(&self, request: &GoalKeyBeginRequest) -> Result<TrustChanged> {
        self.post("v1/trust/goal-key/begin", request).await
    }

    /// Believes the newest goal key alone, with which all present goals are signed again.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn finish_goal_key(&self, request: &FinishRotation) -> Result<TrustChanged> {
        self.post("v1/trust/goal-key/finish", request).await
    }

    /// A renewed certificate of the caller's own key.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn renew(&self) -> Result<CertificateReply> {
        self.post_again("v1/certificate/renew", &()).await
    }

    /// A renewed certificate of a machine of the caller's region: a region process's call.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn renew_for(&self, request: &RenewForRequest) -> Result<CertificateReply> {
        self.post_again("v1/region/renew", request).await
    }

    /// Says how a region process's machines stand.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn stand(&self, standing: &Standing) -> Result<()> {
        self.post_again::<_, Done>("v1/region/standing", standing).await.map(drop)
    }

    /// Makes a token by which new machines join.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn make_join_token(&self, request: &JoinTokenRequest) -> Result<JoinTokenMade> {
        self.post("v1/join-tokens", request).await
    }

    /// The tokens that are good, newest first.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn join_tokens(&self) -> Result<Vec<JoinToken>> {
        self.list("v1/join-tokens", Vec::new(), None).await
    }

    /// Makes a token good for nothing.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn revoke_join_token(&self, id: &str) -> Result<()> {
        // What is no id must not lead to another path.
        if id.is_empty() || !id.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            let message = format!(
                "'{}' is no join token's id: shoal join-token list shows them",
                id.escape_debug()
            );
            return Err(ClientError::Refused { status: 404, code: "not_found".into(), message });
        }
        let path = format!("v1/join-tokens/{id}/revoke");
        self.post::<_, Done>(&path, &()).await.map(drop)
    }

    /// Joins the cluster: a call without a certificate.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn join(&self, request: &JoinRequest) -> Result<JoinReply> {
        self.post_once("v1/join", request).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_no_join_tokens_id_leads_to_no_other_path() {
        // Nobody listens there: what is refused is refused before anybody is asked.
        let client = Client::stranger(&["https://127.0.0.1:1".into()], None).unwrap();
        for wrong in ["", "..", "../tokens/ci", "a/b", "a?b=1", "a\nb"] {
            match client.revoke_join_token(wrong).await {
                Err(ClientError::Refused { status: 404, message, .. }) => {
                    assert!(
                        !message.contains('\n') && message.contains("no join token"),
                        "{message}"
                    );
                }
                other => panic!("{wrong}: {other:?}"),
            }
        }
    }
}
