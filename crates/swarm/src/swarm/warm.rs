//! Reading ahead, for a driver of very many machines.
//!
//! Such machines lie all over the memory, and what an event costs is mostly the cache lines that are waited for. A driver
//! that knows which events come next begins to read what they need while others happen. That takes three steps, a few
//! events apart, for each follows pointers that the one before has read: [`Swarm::warm`], [`Swarm::warm_for`] and
//! [`Swarm::warm_beyond`].

use rand::RngExt;
use shoal_proto::PieceIndex;

use super::{Swarm, choose::first_word, pick::Request, state::State};
use crate::{
    event::{PeerKey, RequestId, SwarmKey},
    prefetch::{prefetch, prefetch_all},
};

/// An event that will happen soon, as far as it matters which.
#[derive(Debug, Clone, Copy)]
pub enum Upcoming<'a> {
    /// [`crate::Event::PeerHave`].
    Have(PeerKey, SwarmKey, &'a [PieceIndex]),
    /// [`crate::Event::Offered`].
    Offered(PeerKey, SwarmKey, PieceIndex),
    /// [`crate::Event::UploadAsked`].
    Asked(PeerKey, SwarmKey, PieceIndex),
    /// [`crate::Event::UploadEnded`].
    Served,
    /// [`crate::Event::FetchEnded`].
    Ended(RequestId),
}

impl Swarm {
    /// Begins to read what lies in the machine itself.
    pub fn warm(&self) {
        prefetch(&self.fetching);
        prefetch(&self.now);
        prefetch(&self.actions);
        prefetch_all(&self.states);
        prefetch(&self.peers);
    }

    /// Begins to read what an event needs of what the machine points to.
    pub fn warm_for(&self, upcoming: Upcoming<'_>) {
        match upcoming {
            Upcoming::Have(peer, swarm, pieces) => self.of(swarm, |state| {
                let neighbours = &state.neighbours;
                let slot = neighbours.probable(peer);
                neighbours.warm_who(slot);
                pieces.iter().for_each(|piece| neighbours.warm_piece(slot, piece.0));
            }),
            Upcoming::Offered(peer, swarm, piece) => self.of(swarm, |state| {
                let slot = state.neighbours.probable(peer);
                state.neighbours.warm_who(slot);
                state.neighbours.warm_piece(slot, piece.0);
                if self.has_room() {
                    self.warm_requests();
                    state.warm_fetch();
                }
            }),
            Upcoming::Asked(peer, swarm, piece) => self.of(swarm, |state| {
                state.neighbours.warm_who(state.neighbours.probable(peer));
                state.warm_held((piece.0 / u64::BITS) as usize);
                self.uploads.warm();
            }),
            Upcoming::Served => {
                if let Some(state) = self.states.at(0) {
                    self.warm_offer(state);
                }
                self.uploads.warm();
            }
            Upcoming::Ended(id) => {
                self.warm_requests();
                let Some(request) = self.request(id) else { return };
                self.warm_peer(request.peer.into());
                self.of(request.swarm, |state| {
                    state.warm_fetch();
                    state.warm_held((request.piece / u64::BITS) as usize);
                    self.warm_offer(state);
                });
            }
        }
    }

    /// Begins to read what lies beyond that.
    pub fn warm_beyond(&self, upcoming: Upcoming<'_>) {
        match upcoming {
            Upcoming::Have(peer, swarm, _) if self.has_budget() => {
                self.of(swarm, |state| self.warm_neighbour(state, peer));
            }
            Upcoming::Offered(peer, swarm, _) => self.of(swarm, |state| {
                self.warm_neighbour(state, peer);
                if self.has_room() {
                    self.warm_pick(state, 0);
                }
            }),
            Upcoming::Ended(id) => {
                let Some(request) = self.request(id) else { return };
                if let Some(fetch) = self.states.fetch(request.swarm) {
                    fetch.warm_word((request.piece / u64::BITS) as usize);
                }
                // First the free slots are offered, each by a number of the generator.
                self.of(request.swarm, |state| self.warm_pick(state, self.offers()));
            }
            _ => {}
        }
    }

    fn of(&self, swarm: SwarmKey, read: impl FnOnce(&State)) {
        if let Some(state) = self.states.get(swarm) {
            read(state);
        }
    }

    fn request(&self, id: RequestId) -> Option<&Request> {
        self.requests.iter().find(|request| request.id == id)
    }

    fn warm_requests(&self) {
        self.requests.iter().for_each(prefetch);
    }

    fn warm_peer(&self, place: usize) {
        if let Some(peer) = self.peers.get(place) {
            prefetch(peer);
        }
    }

    /// The peer that most likely has this key: with no neighbour at all there is none.
    fn warm_neighbour(&self, state: &State, peer: PeerKey) {
        let neighbours = &state.neighbours;
        if neighbours.len() > 0 {
            self.warm_peer(neighbours.place(neighbours.probable(peer)));
        }
    }

    /// Where a pick begins is by chance, but the generator tells it before: after so many of its numbers.
    fn warm_pick(&self, state: &State, skip: usize) {
        let Some(fetch) = state.fetch.as_deref() else { return };
        let mut rng = self.rng.clone();
        (0..skip).for_each(|_| _ = rng.random::<u32>());
        let first = first_word(fetch, rng.random());
        // Two words hold enough candidates mostly.
        for word in [first, (first + 1) % fetch.words().max(1)] {
            fetch.warm_word(word);
            state.neighbours.word(word).iter().for_each(prefetch);
        }
    }

    /// The neighbour that is offered a slot next, and what it holds where the search for what it lacks begins.
    fn warm_offer(&self, state: &State) {
        let Some(slot) = state.offer_order().next() else { return };
        let words = state.held.words().len().max(1) as u32;
        let from = self.rng.clone().random::<u32>() % words;
        state.neighbours.warm_who(slot);
        state.neighbours.warm_piece(slot, from * u64::BITS);
        state.warm_held(from as usize);
    }
}

impl State {
    fn warm_held(&self, word: usize) {
        if let Some(held) = self.held.words().get(word) {
            prefetch(held);
        }
    }

    fn warm_fetch(&self) {
        if let Some(fetch) = self.fetch.as_deref() {
            prefetch_all(fetch);
        }
    }
}

#[cfg(test)]
mod tests {
    use shoal_proto::Bitmap;

    use super::*;
    use crate::{Config, Event, Purpose, Time};

    #[test]
    fn what_is_about_a_stranger_can_be_read_ahead() {
        // Reading must not look where nothing lies, which would panic: a machine of no swarm, one without a neighbour, and a peer that neither knows.
        let (peer, swarm, piece) = (PeerKey(3), SwarmKey(1), PieceIndex(9));
        let upcoming = [
            Upcoming::Have(peer, swarm, &[piece]),
            Upcoming::Offered(peer, swarm, piece),
            Upcoming::Asked(peer, swarm, piece),
            Upcoming::Served,
            Upcoming::Ended(RequestId(5)),
        ];
        let mut machine = Swarm::new(Config::default(), 7);
        for takes_part in [false, true] {
            if takes_part {
                let purpose =
                    Purpose::Fetch { priority: 0, piece_bytes: 1 << 20, may_lease: true, fleet: 1 };
                let have = Bitmap::empty(70);
                machine.handle(Time(1), Event::Start { swarm, pieces: 70, have, purpose });
            }
            for upcoming in upcoming {
                machine.warm();
                machine.warm_for(upcoming);
                machine.warm_beyond(upcoming);
            }
        }
    }
}
