//! Reading ahead, for a driver of very many machines.
//!
//! Such machines lie all over the memory, and what an event costs is mostly the cache lines that are waited for. A driver
//! that knows which events come next reads what several of them need, and all of that comes together. That takes three
//! steps, each for all of those events before the next one, for each follows pointers that the one before has read:
//! [`Swarm::warm`], [`Swarm::warm_for`] and [`Swarm::warm_beyond`].

use rand::RngExt;
use shoal_proto::PieceIndex;

use super::{
    Swarm,
    choose::first_word,
    neighbours::Neighbours,
    pick::Request,
    state::{Fetching, State},
};
use crate::event::{PeerKey, RequestId, SwarmKey};

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
    /// Reads what lies in the machine itself. What it returns says nothing; it keeps the reading from being left out.
    #[must_use]
    pub fn warm(&self) -> u64 {
        let own = [self.now.0, self.actions.warm(), self.requests.len() as u64];
        let state = self.states.at(0).map_or(0, State::warm);
        own.into_iter().fold(state, |sum, word| sum ^ word)
    }

    /// Reads what an event needs of what the machine points to, like [`Self::warm`].
    #[must_use]
    pub fn warm_for(&self, upcoming: Upcoming<'_>) -> u64 {
        match upcoming {
            Upcoming::Have(peer, swarm, pieces) => self.of(swarm, |state| {
                let neighbours = &state.neighbours;
                let slot = neighbours.probable(peer);
                pieces.iter().fold(neighbours.warm_who(slot), |sum, piece| {
                    sum ^ neighbours.warm_piece(slot, piece.0)
                })
            }),
            Upcoming::Offered(peer, swarm, piece) => self.of(swarm, |state| {
                let neighbours = &state.neighbours;
                let slot = neighbours.probable(peer);
                let fetch = state.fetch.as_deref().filter(|_| self.has_room());
                let fetch = fetch.map_or(self.peers.len() as u64, Fetching::warm);
                neighbours.warm_who(slot) ^ neighbours.warm_piece(slot, piece.0) ^ fetch
            }),
            Upcoming::Asked(peer, swarm, piece) => self.of(swarm, |state| {
                let slot = state.neighbours.probable(peer);
                let held = state.held.contains(piece.0);
                state.neighbours.warm_who(slot) ^ u64::from(held) ^ self.uploads.warm()
            }),
            Upcoming::Served => {
                let offer = self.states.at(0).map_or(0, |state| self.warm_offer(state));
                offer ^ self.uploads.warm()
            }
            Upcoming::Ended(id) => {
                let all = self.requests.iter().fold(0, |sum, request| sum ^ request.at.0);
                let Some(request) = self.request(id) else { return all };
                let state = self.of(request.swarm, |state| {
                    let fetch = state.fetch.as_deref().map_or(0, Fetching::warm);
                    fetch ^ self.warm_offer(state) ^ u64::from(state.held.contains(request.piece))
                });
                all ^ state ^ self.warm_peer(request.peer.into())
            }
        }
    }

    /// Reads what lies beyond that, like [`Self::warm`].
    #[must_use]
    pub fn warm_beyond(&self, upcoming: Upcoming<'_>) -> u64 {
        match upcoming {
            Upcoming::Have(peer, swarm, _) => self.of(swarm, |state| {
                let slot = state.neighbours.probable(peer);
                if self.has_budget() { self.warm_neighbour(state, slot) } else { 0 }
            }),
            Upcoming::Offered(peer, swarm, _) => self.of(swarm, |state| {
                let slot = state.neighbours.probable(peer);
                let pick = if self.has_room() { self.warm_pick(state, 0) } else { 0 };
                self.warm_neighbour(state, slot) ^ pick
            }),
            Upcoming::Ended(id) => self.request(id).map_or(0, |request| {
                let fetch = self.states.fetch(request.swarm);
                let asked = fetch.is_some_and(|fetch| fetch.is_asked(request.piece));
                // First the free slots are offered, each by a number of the generator.
                let pick = |state: &State| self.warm_pick(state, self.offers());
                u64::from(asked) ^ self.of(request.swarm, pick)
            }),
            Upcoming::Asked(..) | Upcoming::Served => 0,
        }
    }

    fn of(&self, swarm: SwarmKey, read: impl FnOnce(&State) -> u64) -> u64 {
        self.states.get(swarm).map_or(0, read)
    }

    fn request(&self, id: RequestId) -> Option<&Request> {
        self.requests.iter().find(|request| request.id == id)
    }

    /// The peer in a slot that is a probable one: with no neighbour at all there is none.
    fn warm_neighbour(&self, state: &State, slot: usize) -> u64 {
        if state.neighbours.len() == 0 { 0 } else { self.warm_peer(state.neighbours.place(slot)) }
    }

    fn warm_peer(&self, place: usize) -> u64 {
        self.peers.get(place).map_or(0, |peer| peer.rests_until.0)
    }

    /// Where a pick begins is by chance, but the generator tells it before: after so many of its numbers.
    fn warm_pick(&self, state: &State, skip: usize) -> u64 {
        let Some(fetch) = state.fetch.as_deref() else { return 0 };
        let mut rng = self.rng.clone();
        (0..skip).for_each(|_| _ = rng.random::<u32>());
        let first = first_word(fetch, rng.random());
        // Two words hold enough candidates mostly.
        let words = [first, (first + 1) % fetch.words().max(1)];
        let lines = words.iter().flat_map(|word| state.neighbours.word(*word));
        lines.fold(fetch.missing_word(first), |sum, line| sum ^ line.0[0])
    }

    /// The neighbour that is offered a slot next, and what it holds where the search for what it lacks begins.
    fn warm_offer(&self, state: &State) -> u64 {
        let neighbours = &state.neighbours;
        let Some(slot) = state.offer_order().next() else { return 0 };
        let words = state.held.words();
        let from = self.rng.clone().random::<u32>() % words.len().max(1) as u32;
        let held = words.get(from as usize).copied().unwrap_or_default();
        neighbours.warm_who(slot) ^ neighbours.warm_piece(slot, from * u64::BITS) ^ held
    }
}

impl State {
    fn warm(&self) -> u64 {
        self.key.0 ^ self.neighbours.warm()
    }
}

impl Neighbours {
    fn warm(&self) -> u64 {
        self.taken() as u64 ^ self.watch_at().0 ^ self.word(0).len() as u64
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
                let _ = machine.warm() ^ machine.warm_for(upcoming) ^ machine.warm_beyond(upcoming);
            }
        }
    }
}
