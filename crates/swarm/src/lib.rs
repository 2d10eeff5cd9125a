//! The swarm policy of one machine.
#![no_std]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod config;
mod event;
mod hash;
mod lease;
mod swarm;
mod time;

pub use config::Config;
pub use event::{Action, Event, Outcome, PeerKey, Purpose, RequestId, SwarmKey, UploadId};
pub use hash::{LEASERS_AIM, lease_owners, machine_hash, may_lease};
pub use lease::{
    HELD_SETTLES, LEASE_DURATION, LEASE_RETRY_MAX, LEASE_RETRY_MIN, LeaseAnswer, LeaseBook,
};
pub use swarm::{Load, PieceState, Progress, Swarm};
pub use time::Time;
