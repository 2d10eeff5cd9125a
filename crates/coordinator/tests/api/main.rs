//! The coordinator as its callers see it: over real HTTPS on loopback, with real certificates.
#![allow(clippy::unwrap_used)]

mod access;
mod artifacts;
mod audit;
mod contract;
mod copies;
mod events;
mod harness;
mod jobs;
mod page;
mod pushes;
mod queue;
mod refusals;
mod rollouts;
mod trust;
