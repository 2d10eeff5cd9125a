//! The coordinator's HTTP API as its callers see it: the JSON types ([`types`]) and a [`Client`] that
//! speaks it over HTTPS: with mutual TLS, or for people with a token.
//!
//! The operator's commands, the workers and the region processes all use this one client. It knows
//! several coordinators and goes to the next when one does not answer; calls are repeated with back-off and jitter,
//! since reads change nothing and the server recognises all else by its lease, its cursor or its idempotency key.

mod error;
mod follow;
mod http;
pub mod types;

/// The header in which a coordinator says its release, with every answer.
pub const VERSION_HEADER: &str = "shoal-version";

pub use error::ClientError;
pub use http::{Client, EventQuery, EventStream, Streamed};
