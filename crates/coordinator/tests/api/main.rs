//! The coordinator as its callers see it: over real HTTPS on loopback, with real certificates.
#![allow(clippy::unwrap_used)]

mod artifacts;
mod harness;
mod jobs;
mod queue;
mod refusals;
mod rollouts;
mod trust;
