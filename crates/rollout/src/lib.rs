//! Who may activate, when a rollout stops, and how it ends: decisions from counts, nothing else.
//!
//! A rollout lets every machine download at once; *activation* goes in waves. A machine has a rank of
//! 0-999 ([`shoal_proto::region::rollout_rank`]), and may activate when its rank is below the
//! threshold that its region has opened so far. Three parts decide:
//!
//! - [`thresholds`] turns a plan's waves into ranks, from the machines that a region knows: a wave of 1 % of
//!   eight machines is one machine, not none, so that every wave adds at least one.
//! - [`Waves`] is what a region process keeps for each rollout. Its [`step`](Waves::step) opens the
//!   next wave when the newest one went well, and never lowers what is open.
//! - [`outcome()`] is the whole rollout's state from all regions' [`Counts`]. It always ends, at the
//!   latest by the plan's deadline.
//!
//! What must never be: a wave without a success opens the next one; a region above its failure limit
//! opens anything; a rollback waits for waves.
//!
//! The crate is pure: no clock (time is passed in, in seconds since the rollout began), no memory
//! beyond its arguments.
#![no_std]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod outcome;
mod waves;

pub use outcome::{Counts, outcome, settled};
pub use waves::{ALL_PERMILLE, Machine, Waves, thresholds};
