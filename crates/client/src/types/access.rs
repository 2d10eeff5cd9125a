//! Tokens, the audit log, and pages of lists.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use shoal_proto::{AppName, MachineName, state::TokenRole};

/// A page of a list.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "PageOf{T}")]
pub struct Page<T> {
    /// Its rows.
    pub items: Vec<T>,
    /// To be given as `cursor` for the next page; none: this is the last one.
    #[serde(default)]
    pub next_cursor: Option<String>,
}

/// The answer to what needs none.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Done {}

/// Makes a token.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenRequest {
    /// Its name, which the audit log tells.
    pub name: MachineName,
    /// What its holder may do.
    pub role: TokenRole,
    /// The apps that it is bound to, 50 at most; none: all apps, and what is of no app.
    #[serde(default)]
    pub apps: Option<BTreeSet<AppName>>,
    /// For how long it counts, ten years at most; none: until it is revoked.
    #[serde(default)]
    pub expires_in_s: Option<u32>,
}

/// A token, without its secret.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Token {
    /// Its name.
    pub name: MachineName,
    /// What its holder may do.
    pub role: TokenRole,
    /// The apps that it is bound to; none: all.
    pub apps: Option<BTreeSet<AppName>>,
    /// When it was made.
    pub created_at_ms: i64,
    /// Who made it.
    pub created_by: String,
    /// From when on it counts no more.
    pub expires_at_ms: Option<i64>,
    /// When it was revoked.
    pub revoked_at_ms: Option<i64>,
    /// Who revoked it.
    pub revoked_by: Option<String>,
    /// When it was used last, to a minute.
    pub last_used_at_ms: Option<i64>,
}

/// A token that was just made.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct CreatedToken {
    /// What to show as `Authorization: Bearer ...`. It is told this once, and kept nowhere.
    pub secret: String,
    /// The token.
    pub token: Token,
}

/// Who the caller is.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct WhoAmI {
    /// As the audit log tells it: `token:NAME`, or a certificate's machine.
    pub name: String,
    /// What it may do.
    pub role: TokenRole,
    /// The apps that it is bound to; none: all.
    pub apps: Option<BTreeSet<AppName>>,
    /// When its token ends.
    pub expires_at_ms: Option<i64>,
    /// The cluster.
    pub cluster: String,
}

/// A row of the audit log: a change.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct AuditRow {
    /// Rises by one with each row.
    pub id: i64,
    /// When.
    pub at_ms: i64,
    /// Who: a certificate's machine, `token:NAME`, or `coordinator` for what went on by itself.
    pub who: String,
    /// From which address; empty for what went on by itself.
    pub origin: String,
    /// What was done, such as `job.submit`.
    pub what: String,
    /// To what.
    pub subject: String,
    /// The app that it is about.
    pub app: Option<String>,
    /// More about it.
    pub detail: String,
}

/// Which rows of the audit log are asked for: those that fit all that is given.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AuditQuery {
    /// About this app.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub app: Option<AppName>,
    /// To this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<String>,
    /// By this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub who: Option<String>,
    /// This, or with a dot at the end all of a kind: `job.submit`, `job.`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub what: Option<String>,
    /// Not before this, in milliseconds since the Unix epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since_ms: Option<i64>,
    /// How many rows at most, 1 to 1000.
    #[schemars(range(min = 1, max = 1000))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
    /// The `next_cursor` of the page before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
}
