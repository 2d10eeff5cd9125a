//! What can be set about events and webhooks.

use std::path::PathBuf;

use anyhow::ensure;
use serde::Deserialize;

/// How long what happened is kept.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EventsConfig {
    /// How long events are kept, in seconds: for so long a reader of the stream may be away.
    pub keep_s: f64,
    /// How many are kept at most.
    pub keep_max: u32,
    /// A reader of the stream that takes nothing for this long, with its buffer full, is dropped.
    pub slow_s: f64,
}

impl Default for EventsConfig {
    fn default() -> Self {
        Self { keep_s: 7.0 * 86_400.0, keep_max: 1_000_000, slow_s: 30.0 }
    }
}

/// How webhooks are told. Times are in seconds.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WebhooksConfig {
    /// PEM file with the certificate authorities that receivers' certificates are of; none: the system's.
    pub ca: Option<PathBuf>,
    /// Whether plain http is allowed to receivers beyond this machine.
    pub allow_http: bool,
    /// How long an attempt may take.
    pub timeout_s: f64,
    /// How long after its first failure a message is sent again; doubled with each one, to an hour, less up to half by
    /// chance.
    pub retry_s: f64,
    /// For how long it is tried.
    pub give_up_s: f64,
    /// How long the log of deliveries is kept.
    pub keep_s: f64,
}

impl Default for WebhooksConfig {
    fn default() -> Self {
        Self {
            ca: None,
            allow_http: false,
            timeout_s: 15.0,
            retry_s: 5.0,
            give_up_s: 86_400.0,
            keep_s: 7.0 * 86_400.0,
        }
    }
}

impl EventsConfig {
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        ensure!(self.keep_max > 0, "events.keep_max = 0: no event would ever be told");
        Ok(())
    }

    pub(crate) fn times(&self) -> [(&'static str, f64); 2] {
        [("events.keep_s", self.keep_s), ("events.slow_s", self.slow_s)]
    }
}

impl WebhooksConfig {
    pub(crate) fn times(&self) -> [(&'static str, f64); 4] {
        [
            ("webhooks.timeout_s", self.timeout_s),
            ("webhooks.retry_s", self.retry_s),
            ("webhooks.give_up_s", self.give_up_s),
            ("webhooks.keep_s", self.keep_s),
        ]
    }
}
