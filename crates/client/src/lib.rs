//! The coordinator's HTTP API as its callers see it: the JSON types ([`types`]) and a [`Client`] that
//! speaks it over HTTPS with mutual TLS.
//!
//! The operator's commands, the workers and the region processes all use this one client. It knows
//! several coordinators and goes to the next when one does not answer; what is safe to repeat (reads, and
//! calls that the server recognises by their lease or cursor) is repeated with back-off and jitter.

mod follow;
mod http;
mod trust;
pub mod types;

pub use http::{Client, ClientError};
