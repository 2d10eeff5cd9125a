//! The whole of Shoal with real processes on loopback, each test a cluster of its own.
#![allow(clippy::unwrap_used, missing_docs, unreachable_pub)]

mod access;
mod by_hand;
mod copies;
mod demo;
mod deploys;
mod events;
mod faults;
mod goals;
mod harness;
mod kills;
mod limits;
mod membership;
mod page;
mod peers;
mod pipeline;
mod postgres;
mod pressure;
mod queue;
mod restore;
mod s3;
mod scripts;
mod silence;
mod trust;
mod upgrade;
