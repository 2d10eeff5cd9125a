//! What must hold after every event: for tests and the simulator.

use alloc::{collections::BTreeSet, format, string::String};

use super::{PieceState, Swarm, neighbours::members, peers::Peer, state::State};

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
        let served = self.uploads.count();
        ensure!(
            served <= config.upload_slots + config.uploads_stuck_max,
            "{served} uploads served"
        );
        let (leased, _, open) = self.leases();
        ensure!(leased <= config.leased_max, "{leased} pieces leased");
        ensure!(open <= config.lease_asks_max, "{open} lease questions open");
        ensure!(self.wake.is_none_or(|wake| wake > self.now), "the next timeout is in the past");
        for (at, (key, peer)) in self.peers.iter().enumerate() {
            for state in self.states.iter().filter(|state| peer.slot(state.key).is_some()) {
                let slot = state.neighbours.find(key);
                ensure!(slot == peer.slot(state.key), "{key:?} is in another slot");
            }
            ensure!(self.peers.find(key) == Some(at), "{key:?} is there twice");
            let own =
                self.requests.iter().filter(|request| usize::from(request.peer) == at).count();
            ensure!(own == usize::from(peer.requests), "{key:?} has {own} requests");
            ensure!(peer.requests <= config.requests_per_peer_max, "{own} requests to {key:?}");
            ensure!(own == 0 || !peer.banned, "{key:?} is banned and asked");
        }
        let mut asked = BTreeSet::new();
        for request in &self.requests {
            ensure!(self.peers.get(request.peer.into()).is_some(), "{request:?} to nobody");
            let new = asked.insert((request.swarm, request.piece, request.peer));
            ensure!(new, "{request:?} twice to one peer");
            let state = self.states.get(request.swarm);
            let slot = state.and_then(|s| s.neighbours.find(self.peers.key(request.peer.into())));
            ensure!(slot == Some(request.slot.into()), "{request:?} to another slot");
        }
        for key in &self.fetching {
            let fetches = self.states.fetch(*key).is_some();
            ensure!(fetches, "{key:?} is listed and does not fetch");
        }
        let keys: BTreeSet<_> = self.states.iter().map(|state| state.key).collect();
        ensure!(keys.len() == self.states.len(), "a swarm is there twice");
        for key in &keys {
            ensure!(self.states.get(*key).is_some_and(|s| s.key == *key), "{key:?} is not found");
        }
        self.states.iter().try_for_each(|state| self.check_swarm(state))
    }

    fn check_swarm(&self, state: &State) -> Result<(), String> {
        let (config, key, neighbours) = (&self.config, state.key, &state.neighbours);
        ensure!(neighbours.len() <= config.neighbours_max, "too many neighbours in {key:?}");
        ensure!(state.untold.len() < self.have_batch(), "{key:?} tells too late");
        ensure!(state.untold.is_empty() || state.tell_at.is_some(), "{key:?} never tells");
        ensure!(neighbours.is_sound(), "the neighbours of {key:?} do not agree with their counts");
        for slot in members(neighbours.taken()) {
            let (peer, place) = (neighbours.key(slot), neighbours.place(slot));
            let known = self.peers.get(place).filter(|peer| !peer.banned);
            let near = neighbours.near() >> slot & 1 == 1;
            let watched = neighbours.watched() >> slot & 1 == 1;
            let free = |peer: &Peer| peer.is_free(self.now, config.requests_per_peer_max);
            ensure!(
                state.fetch.is_none() || watched || known.is_some_and(free),
                "{peer:?} in {key:?} may not be asked and is not watched"
            );
            ensure!(
                known.is_some_and(|peer| peer.same_zone == near) && self.peers.key(place) == peer,
                "{peer:?} is a neighbour in {key:?} without a connection"
            );
        }
        let listed = self.fetching.iter().filter(|other| **other == key).count();
        let own = || self.requests.iter().filter(|request| request.swarm == key);
        let Some(fetch) = &state.fetch else {
            ensure!(listed == 0 && own().count() == 0, "{key:?} asks without fetching");
            return Ok(());
        };
        ensure!(!state.held.is_full(), "{key:?} holds all and fetches");
        ensure!(listed == 1, "{key:?} is listed {listed} times");
        ensure!(own().count() == fetch.requests as usize, "{key:?} miscounts its requests");
        let missing = (0..state.pieces).filter(|piece| fetch.is_missing(*piece)).count();
        ensure!(fetch.missing() as usize == missing, "{key:?} miscounts what is missing");
        for piece in 0..state.pieces {
            let is = state.piece_state(piece);
            let requests = own().filter(|request| request.piece == piece).count();
            let reads = self.reads.iter().filter(|read| !read.late && read.is_open(key, piece));
            let reads = reads.count();
            // In exactly one state, though each state is kept by itself.
            let all = [
                (fetch.is_missing(piece), PieceState::Missing),
                (fetch.is_asked(piece), PieceState::Asked),
                (fetch.leases.contains(piece), PieceState::Leased),
                (reads == 1, PieceState::Origin),
                (state.held.contains(piece), PieceState::Held),
            ];
            for (is_so, what) in all {
                ensure!(
                    is_so == (is == Some(what)),
                    "piece {piece} of {key:?} is {is:?}; {what:?}"
                );
            }
            ensure!(
                fetch.is_asked(piece) == (requests > 0),
                "piece {piece} of {key:?} is {is:?}; {requests} requests"
            );
            ensure!(
                requests <= config.copies_per_piece_max.max(1),
                "piece {piece} of {key:?} is {is:?}; {requests} requests"
            );
            ensure!(
                neighbours.anyone_gives(piece)
                    == (neighbours.holders(piece) & !neighbours.mute() != 0),
                "piece {piece} of {key:?} has holders that nobody knows"
            );
        }
        Ok(())
    }
}
