//! The state machine.

use alloc::collections::VecDeque;

use rand::SeedableRng;
use rand_pcg::Pcg32;
use shoal_proto::PieceIndex;

use crate::{
    config::Config,
    event::{Action, Event, SwarmKey},
    time::Time,
};

/// What a piece is to this machine. It is exactly one of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum PieceState {
    /// Not held, and nothing under way.
    Missing,
    /// On its way from one or more peers.
    Asked,
    /// Ours to read from the bucket, not begun.
    Leased,
    /// On its way from the bucket.
    Origin,
    /// Held and verified.
    Held,
}

/// How far one swarm is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Pieces of the artifact.
    pub pieces: u32,
    /// Pieces held.
    pub held: u32,
    /// Requests to peers under way.
    pub requests: u32,
    /// Pieces being read from the bucket.
    pub origin: u32,
    /// Neighbours that take part.
    pub neighbours: u32,
    /// Neighbours that hold every piece.
    pub seeds: u32,
}

/// The policy of one machine, for all its swarms.
#[derive(Debug, Clone)]
pub struct Swarm {
    config: Config,
    rng: Pcg32,
    actions: VecDeque<Action>,
}

impl Swarm {
    /// A machine without peers and swarms. `seed` must differ from machine to machine: it breaks ties,
    /// and so keeps machines that see the same from doing the same.
    #[must_use]
    pub fn new(config: Config, seed: u64) -> Self {
        Self { config, rng: Pcg32::seed_from_u64(seed), actions: VecDeque::new() }
    }

    /// Takes one event in. `now` never goes back.
    pub fn handle(&mut self, now: Time, event: Event) {
        let _ = (now, event, &self.config, &self.rng);
    }

    /// The next thing to do; drain it after each event.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When to send [`Event::Timeout`] at the latest. Changes with each event.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Time> {
        None
    }

    /// How far a swarm is.
    #[must_use]
    pub fn progress(&self, swarm: SwarmKey) -> Option<Progress> {
        let _ = swarm;
        None
    }

    /// What a piece is to this machine.
    #[must_use]
    pub fn piece_state(&self, swarm: SwarmKey, piece: PieceIndex) -> Option<PieceState> {
        let _ = (swarm, piece);
        None
    }
}
