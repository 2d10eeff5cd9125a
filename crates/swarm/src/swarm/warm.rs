//! Reading ahead, for a driver of very many machines.
//!
//! Such machines lie all over the memory, and what an event costs is mostly the cache lines that are waited for. A driver
//! that knows which events come next reads what several of them need, and all of that comes together: first
//! [`Swarm::warm`] for each, then [`Swarm::warm_for`], which follows pointers that the first has read.

use shoal_proto::PieceIndex;

use super::Swarm;
use crate::event::{PeerKey, RequestId, SwarmKey};

/// An event that will happen soon, as far as it matters which.
#[derive(Debug, Clone, Copy)]
pub enum Upcoming<'a> {
    /// [`crate::Event::PeerHave`].
    Have(PeerKey, SwarmKey, &'a [PieceIndex]),
    /// [`crate::Event::Offered`].
    Offered(PeerKey, SwarmKey),
    /// [`crate::Event::UploadAsked`].
    Asked(PeerKey, SwarmKey, PieceIndex),
    /// [`crate::Event::FetchEnded`].
    Ended(RequestId),
}

impl Swarm {
    /// Reads from all over the machine. What it returns says nothing; it keeps the reading from being left out.
    #[must_use]
    pub fn warm(&self) -> u64 {
        let own = [
            self.salt,
            self.now.0,
            self.next_request,
            self.requests.len() as u64,
            self.reads.len() as u64,
            self.uploads.count() as u64,
            self.peers.len() as u64,
            self.fetching.len() as u64,
            u64::from(self.wake.is_some()),
            u64::from(self.origin_stirred),
        ];
        let states = self.states.at(0).map_or(0, |state| state.neighbours.warm());
        own.into_iter().fold(states, |sum, word| sum ^ word)
    }

    /// Reads what an event needs beyond that, like [`Self::warm`].
    #[must_use]
    pub fn warm_for(&self, upcoming: Upcoming<'_>) -> u64 {
        let peer = |place: usize| self.peers.get(place).map_or(0, |peer| peer.rests_until.0);
        match upcoming {
            Upcoming::Have(peer, swarm, pieces) => {
                self.states.get(swarm).map_or(0, |state| state.neighbours.warm_for(peer, pieces))
            }
            Upcoming::Offered(key, swarm) => self.states.get(swarm).map_or(0, |state| {
                let slot = state.neighbours.find(key);
                let missing = state.fetch.as_deref().map_or(0, |fetch| fetch.missing());
                slot.map_or(0, |slot| peer(state.neighbours.place(slot))) ^ u64::from(missing)
            }),
            Upcoming::Asked(key, swarm, piece) => self.states.get(swarm).map_or(0, |state| {
                let slot = state.neighbours.find(key).unwrap_or(0);
                slot as u64 ^ u64::from(state.held.contains(piece.0))
            }),
            Upcoming::Ended(id) => {
                let request = self.requests.iter().find(|request| request.id == id);
                request.map_or(0, |request| {
                    let fetch = self.states.fetch(request.swarm);
                    let missing = fetch.is_some_and(|fetch| fetch.is_asked(request.piece));
                    peer(request.peer.into()) ^ u64::from(missing)
                })
            }
        }
    }
}
