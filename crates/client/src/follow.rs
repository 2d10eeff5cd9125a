//! Following the trust bundles by long poll, as every process does that speaks with the coordinators.

use std::time::Duration;

use crate::{
    Client, ClientError,
    types::{TrustQuery, TrustReply},
};

/// How long the coordinator holds a question: DESIGN's 5 s.
const LONG_POLL_S: u32 = 5;

/// How long to wait after a coordinator did not answer.
const RETRY: Duration = Duration::from_secs(2);

/// How long to wait for a coordinator of a release that has no bundles to give.
const RETRY_OLD: Duration = Duration::from_secs(60);

impl Client {
    /// The trust bundles that lead on from number `after`, from whoever answers: for those who believe no coordinator's
    /// certificate any more. What comes is to be checked by its signatures.
    ///
    /// # Errors
    /// [`ClientError`], as for every call.
    pub async fn trust_from_anybody(&self, after: u64) -> Result<TrustReply, ClientError> {
        let anybody = Self::stranger(&self.urls(), None)?;
        anybody.trust(&TrustQuery { after, wait_s: 0 }).await
    }

    /// Gives `take` the bundles that are newer than what `held` says, the encoded bytes, until it is dropped.
    pub async fn follow_trust(&self, held: impl Fn() -> u64, take: impl Fn(&[Vec<u8>])) {
        loop {
            let after = held();
            let pause = match self.trust(&TrustQuery { after, wait_s: LONG_POLL_S }).await {
                Ok(reply) => {
                    let bundles: Vec<_> =
                        reply.bundles.iter().filter_map(|text| unhex(text)).collect();
                    take(&bundles);
                    // What was not taken, or another coordinator's older one, is not asked for in a circle.
                    let stuck = reply.number != after && held() == after;
                    if stuck { RETRY } else { Duration::ZERO }
                }
                Err(ClientError::Refused { status: 404, .. }) => RETRY_OLD,
                Err(error) => {
                    tracing::debug!(%error, "cannot follow the trust");
                    // The CA may have been replaced while this process was off.
                    if let Ok(reply) = self.trust_from_anybody(after).await {
                        take(&unhex_all(&reply.bundles));
                        if held() != after {
                            self.reconnect();
                        }
                    }
                    RETRY
                }
            };
            tokio::time::sleep(pause).await;
        }
    }
}

fn unhex_all(texts: &[String]) -> Vec<Vec<u8>> {
    texts.iter().filter_map(|text| unhex(text)).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    let pairs = digits.chunks_exact(2);
    if !pairs.remainder().is_empty() {
        return None;
    }
    pairs.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}
