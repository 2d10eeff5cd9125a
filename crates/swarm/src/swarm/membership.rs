//! Membership: connections that come and go, and who is a neighbour in which swarm.

use alloc::sync::Arc;

use shoal_proto::{Bitmap, PieceIndex};

use super::{
    Swarm,
    peers::{self, Peer},
};
use crate::{
    event::{Action, PeerKey, SwarmKey},
    time::Time,
};

impl Swarm {
    pub(super) fn peer_up(&mut self, key: PeerKey, same_zone: bool) {
        // A neighbour notes its peer's place in 16 bits.
        let max = self.config.peers_max.min(usize::from(u16::MAX));
        if self.peers.find(key).is_some() || self.peers.len() >= max {
            return;
        }
        self.peers.push(key, Peer::new(same_zone));
        for state in self.states.iter() {
            let have = Arc::new(state.held.clone());
            self.actions.push(Action::Announce { peer: key, swarm: state.key, have });
        }
    }

    pub(super) fn peer_down(&mut self, now: Time, key: PeerKey) {
        let Some(place) = self.peers.find(key) else { return };
        self.uploads.peer_down(key);
        self.forget_pieces_of(now, key);
        // Its requests ended with the connection: nothing to cancel.
        self.take_requests(|request| usize::from(request.peer) == place);
        self.peers.remove(place);
        // Another one has its place now.
        let before = self.peers.len();
        if place == before {
            return;
        }
        let moved = self.peers.key(place);
        for state in self.states.iter_mut() {
            if let Some(slot) = state.neighbours.find(moved) {
                state.neighbours.moved(slot, place);
            }
        }
        for request in self.requests.iter_mut().filter(|request| request.peer == before as u16) {
            request.peer = place as u16;
        }
    }

    /// Notes, wherever a peer is a neighbour, that it does not answer, or does again.
    pub(super) fn set_mute(&mut self, place: usize, mute: bool) {
        let Some(peer) = self.peers.get_mut(place) else { return };
        peer.mute = mute;
        let key = self.peers.key(place);
        for swarm in &self.fetching {
            let Some(state) = self.states.get_mut(*swarm) else { continue };
            if let Some(slot) = state.neighbours.find(key) {
                state.neighbours.set_mute(slot, mute);
            }
        }
        self.stir();
    }

    pub(super) fn forget_pieces_of(&mut self, now: Time, key: PeerKey) {
        for at in 0..self.states.len() {
            if let Some(swarm) = self.states.at(at).map(|state| state.key) {
                self.forget_neighbour(now, key, swarm);
            }
        }
    }

    fn forget_neighbour(&mut self, now: Time, peer: PeerKey, swarm: SwarmKey) {
        let Some(state) = self.states.get_mut(swarm) else { return };
        let Some(slot) = state.neighbours.find(peer) else { return };
        if let Some(peer) = self.peers.get_mut(state.neighbours.place(slot)) {
            peer.has_no_slot(swarm);
        }
        state.neighbours.remove(slot);
        // It may have taken with it what nobody else was given.
        state.given = None;
        if state.neighbours.len() * 2 < self.config.neighbours_target && state.fetch.is_some() {
            // Many are gone at once: do not wait out the long pause of a swarm that had enough.
            let soon = now + peers::jitter(self.config.want_peers_min, &mut self.rng);
            state.want_peers_at = state.want_peers_at.min(soon);
            state.want_peers_streak = 0;
        }
        self.stir();
    }

    pub(super) fn peer_joined(&mut self, peer: PeerKey, swarm: SwarmKey, have: &Bitmap) {
        let Some(place) = self.peers.find(peer) else { return };
        let Some(known) = self.peers.get(place).filter(|peer| !peer.banned) else { return };
        let Some(state) = self.states.get_mut(swarm) else { return };
        if have.len() != state.pieces {
            return;
        }
        let who = (peer, place, known.same_zone);
        let joined = state.joined(who, have, self.config.neighbours_max);
        let Some((slot, answer, news)) = joined else { return };
        if let Some(peer) = self.peers.get_mut(place) {
            peer.has_slot(swarm, slot);
            if peer.mute {
                state.neighbours.set_mute(slot, true);
            }
        }
        if answer {
            // It may have thrown our announcement away because it was not in the swarm yet.
            let have = Arc::new(state.held.clone());
            self.actions.push(Action::Announce { peer, swarm, have });
        }
        if news {
            self.stir();
        }
    }

    pub(super) fn peer_have(
        &mut self,
        now: Time,
        peer: PeerKey,
        swarm: SwarmKey,
        pieces: &[PieceIndex],
    ) {
        let budget = self.has_budget();
        let Some(state) = self.states.get_mut(swarm) else { return };
        let Some(slot) = state.neighbours.find(peer) else { return };
        let mut news = false;
        let fetch = state.fetch.as_deref();
        // Whoever frees the budget later looks at all pieces anyway.
        let is_missing = |piece| budget && fetch.is_some_and(|fetch| fetch.is_missing(piece));
        state.neighbours.set(slot, pieces, |piece| news |= is_missing(piece));
        // With several swarms it is not said that it is this one's turn.
        if news && state.neighbours.near() >> slot & 1 == 1 && self.fetching.len() == 1 {
            self.ask_for_news(now, swarm, slot, pieces);
        } else {
            self.peers_stirred |= news;
        }
    }

    pub(super) fn peer_left(&mut self, now: Time, peer: PeerKey, swarm: SwarmKey) {
        self.forget_neighbour(now, peer, swarm);
        if let Some(place) = self.peers.find(peer) {
            self.cancel(|request| usize::from(request.peer) == place && request.swarm == swarm);
        }
    }
}
