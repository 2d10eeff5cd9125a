//! What must hold after every event: for tests and the simulator.

use alloc::{collections::BTreeSet, format, string::String};

use super::{PieceState, Swarm, state::Holds};

macro_rules! ensure {
    ($holds:expr, $($why:tt)+) => {
        if !$holds {
            return Err(format!($($why)+));
        }
    };
}

impl Swarm {
    /// Checks that each piece is in exactly one state, that all counts agree with what they count, and
    /// that every bound holds. Slow: it looks at everything.
    ///
    /// # Errors
    /// What does not hold.
    pub fn check_invariants(&self) -> Result<(), String> {
        let config = &self.config;
        ensure!(self.requests.len() <= config.requests_max, "too many requests");
        ensure!(self.reads.len() <= config.origin_reads_max, "too many reads of the bucket");
        ensure!(self.peers.len() <= config.peers_max, "too many peers");
        let (served, waiting) = self.uploads.counts();
        ensure!(served <= config.upload_slots, "{served} uploads served");
        ensure!(waiting <= config.upload_queue_max, "{waiting} uploads wait");
        ensure!(waiting == 0 || served == config.upload_slots, "an upload waits for a free slot");
        let (leased, _, open) = self.leases();
        ensure!(leased <= config.leased_max, "{leased} pieces leased");
        ensure!(open <= config.lease_asks_max, "{open} lease questions open");
        ensure!(self.wake.is_none_or(|wake| wake > self.now), "the next timeout is in the past");
        for (key, peer) in &self.peers {
            let own = self.requests.iter().filter(|request| request.peer == *key).count();
            ensure!(own == usize::from(peer.requests), "{key:?} has {own} requests");
            ensure!(peer.requests <= config.requests_per_peer_max, "{own} requests to {key:?}");
            ensure!(own == 0 || !peer.banned, "{key:?} is banned and asked");
        }
        let mut asked = BTreeSet::new();
        for request in &self.requests {
            ensure!(self.peers.contains_key(&request.peer), "{request:?} to nobody");
            let new = asked.insert((request.swarm, request.piece, request.peer));
            ensure!(new, "{request:?} twice to one peer");
        }
        for key in &self.fetching {
            let fetches = self.states.get(key).is_some_and(|state| state.fetch.is_some());
            ensure!(fetches, "{key:?} is listed and does not fetch");
        }
        self.states.keys().try_for_each(|key| self.check_swarm(*key))
    }

    fn check_swarm(&self, key: crate::SwarmKey) -> Result<(), String> {
        let (config, state) = (&self.config, &self.states[&key]);
        ensure!(state.neighbours.len() <= config.neighbours_max, "too many neighbours in {key:?}");
        ensure!(state.untold.len() < self.have_batch(), "{key:?} tells too late");
        ensure!(state.untold.is_empty() || state.tell_at.is_some(), "{key:?} never tells");
        for (peer, holds) in &state.neighbours {
            let known = self.peers.get(peer).is_some_and(|peer| !peer.banned);
            ensure!(known, "{peer:?} is a neighbour in {key:?} without a connection");
            if let Holds::Some(have) = holds {
                ensure!(!have.is_full(), "{peer:?} holds all and is not known to");
            }
        }
        let listed = self.fetching.iter().filter(|other| **other == key).count();
        let own = || self.requests.iter().filter(|request| request.swarm == key);
        let Some(fetch) = &state.fetch else {
            ensure!(listed == 0 && own().count() == 0, "{key:?} asks without fetching");
            return Ok(());
        };
        ensure!(!state.held.is_full(), "{key:?} holds all and fetches");
        ensure!(listed == 1, "{key:?} is listed {listed} times");
        ensure!(own().count() == fetch.requests, "{key:?} miscounts its requests");
        let seeds = state.neighbours.values().filter(|holds| holds.is_all()).count();
        ensure!(usize::from(fetch.seeds) == seeds, "{key:?} miscounts its seeds");
        for piece in 0..state.pieces {
            let is = fetch.state(piece);
            let requests = own().filter(|request| request.piece == piece).count();
            let reads = self.reads.iter().filter(|read| !read.late && read.is_open(key, piece));
            let reads = reads.count();
            let wrong = |what: bool, state: PieceState| what != (is == Some(state));
            ensure!(
                !wrong(state.held.contains(piece), PieceState::Held),
                "piece {piece} of {key:?} is {is:?}; held"
            );
            ensure!(
                !wrong(fetch.missing().contains(piece), PieceState::Missing),
                "piece {piece} of {key:?} is {is:?}; missing"
            );
            ensure!(
                !wrong(requests > 0, PieceState::Asked),
                "piece {piece} of {key:?} is {is:?}; {requests} requests"
            );
            ensure!(
                requests <= config.copies_per_piece_max.max(1),
                "piece {piece} of {key:?} is {is:?}; {requests} requests"
            );
            let leased = fetch.leases.contains_key(&piece);
            ensure!(
                !wrong(leased, PieceState::Leased),
                "piece {piece} of {key:?} is {is:?}; leased"
            );
            ensure!(
                !wrong(reads == 1, PieceState::Origin),
                "piece {piece} of {key:?} is {is:?}; {reads} reads"
            );
            let holders = state.neighbours.values().filter(|holds| holds.contains(piece)).count();
            ensure!(
                usize::from(fetch.available(piece)) == holders,
                "piece {piece} of {key:?} is {is:?}; {holders} holders"
            );
        }
        Ok(())
    }
}
