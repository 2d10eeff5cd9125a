//! Which piece is asked from whom.
//!
//! The piece first: the rarest among a random sample of those that a free neighbour has, an even choice
//! among equals, so that machines that see the same do not all want the same. Then the neighbour: the one of our
//! zone that will have it here soonest by what was measured, then one that is not a seed. A neighbour in another
//! zone is asked only for what none in our zone has, and only if the piece falls to this machine
//! ([`Across`]): what crosses zones is a budget.
//!
//! A late request is joined by a second one to another neighbour before it fails. When nothing is
//! left to ask for, requests that take longer than usual are joined too: the endgame. The first to
//! arrive wins, and the other is cancelled.

use alloc::vec::Vec;
use core::time::Duration;

use rand::RngExt;
use shoal_proto::PieceIndex;

use super::{
    PieceState, Swarm,
    choose::{Across, Free, choose},
    neighbours::{Slots, members},
    peers::Peer,
    state::{Fetching, State},
};
use crate::{
    event::{Action, PeerKey, RequestId, SwarmKey},
    hash::mix,
    time::Time,
};

/// What a piece is thought to take before any was measured: only compared with the like.
const USUAL_GUESS: Duration = Duration::from_millis(50);

/// A neighbour of our zone that rests no longer than this is worth waiting for.
const RESTS_SHORTLY: Duration = Duration::from_millis(100);

/// How many bytes a fetch may catch up with others of its priority.
const TURN_LAG: u64 = 256 << 20;

/// A piece asked from a peer.
#[derive(Debug, Clone)]
pub(super) struct Request {
    pub(super) id: RequestId,
    pub(super) swarm: SwarmKey,
    pub(super) at: Time,
    pub(super) late_at: Time,
    pub(super) give_up_at: Time,
    pub(super) piece: u32,
    /// The peer's place.
    pub(super) peer: u16,
    /// Its slot among the swarm's neighbours.
    pub(super) slot: u8,
    /// Whether `late_at` has passed.
    pub(super) late: bool,
}

impl Swarm {
    /// Fills the budget of requests: late ones first, then new ones, then the endgame.
    pub(super) fn ask_peers(&mut self, now: Time) {
        // Who has rested for long enough no longer counts as busy, whether it offered a slot or not.
        for at in 0..self.fetching.len() {
            self.look_at_watched(now, self.fetching[at]);
        }
        if self.has_budget() {
            self.join_requests(now, |request, _| request.late);
        }
        let mut stuck: Vec<SwarmKey> = Vec::new();
        while self.has_budget() {
            let Some(key) = self.next_swarm(&stuck) else { break };
            match self.pick(now, key) {
                Some((piece, slot)) => self.ask(now, key, piece, slot),
                None if self.fetching.len() == 1 => break,
                None => stuck.push(key),
            }
        }
        if self.has_budget() {
            self.join_requests(now, |request, fetch| {
                let usual = fetch.times.mean();
                fetch.missing() == 0 && usual.is_some_and(|mean| request.at + mean <= now)
            });
        }
    }

    /// Whether to ask for one more piece by ourselves.
    pub(super) fn has_budget(&self) -> bool {
        let requests = self.requests.len();
        let waits = || -> usize {
            let states = self.fetching.iter().filter_map(|key| self.states.get(*key));
            states.map(|state| state.neighbours.busy_count()).sum()
        };
        requests < self.config.requests_wanted
            && !self.fetching.is_empty()
            && requests + waits() < self.config.asks_max
    }

    /// Whether there is room for what was offered, or for a second request for a piece.
    pub(super) fn has_room(&self) -> bool {
        self.requests.len() < self.config.requests_max && !self.fetching.is_empty()
    }

    /// A neighbour has a free slot: asks it for the best piece that it holds, of the swarm whose turn it is.
    pub(super) fn ask_one(&mut self, now: Time, key: PeerKey) {
        let mut stuck = Vec::new();
        while let Some(swarm) = self.next_swarm(&stuck) {
            if let Some((piece, slot)) = self.pick_of(now, swarm, key) {
                return self.ask(now, swarm, piece, slot);
            }
            if self.fetching.len() == 1 {
                return;
            }
            stuck.push(swarm);
        }
    }

    /// The best piece that one neighbour holds, and its slot.
    fn pick_of(&mut self, now: Time, swarm: SwarmKey, key: PeerKey) -> Option<(u32, usize)> {
        let salt: u64 = self.rng.random();
        let state = self.states.get(swarm)?;
        let fetch = state.fetch.as_deref()?;
        let slot = state.neighbours.find(key)?;
        let (only, near) = (1 << slot, state.neighbours.near());
        let free = Free { near: only & near, far: only & !near, zone: near };
        let across = Across::new(fetch, self.salt ^ mix(swarm.0), now);
        let scan = self.config.pick_scan;
        Some((choose(fetch, &state.neighbours, free, &across, scan, salt)?, slot))
    }

    /// A neighbour was busy: asks another one of our zone for the same piece, which was the best to ask for just now. If
    /// there is none, the piece is picked anew like any other.
    pub(super) fn ask_another(&mut self, now: Time, key: SwarmKey, piece: u32) {
        let is_missing = self.piece_state(key, PieceIndex(piece)) == Some(PieceState::Missing);
        if !is_missing || !self.has_budget() {
            return;
        }
        let free = Free { far: 0, ..self.free(now, key) };
        let salt: u64 = self.rng.random();
        let Some(state) = self.states.get(key) else { return };
        if let Some(slot) = self.best(now, state, free, piece, salt) {
            self.ask(now, key, piece, slot);
        }
    }

    /// Whether a more urgent fetch than this one gains.
    pub(super) fn is_outranked(&self, now: Time, priority: u8) -> bool {
        // They are in the order of their priorities.
        let others = self.fetching.iter().filter_map(|other| self.states.fetch(*other));
        others.take_while(|other| other.priority > priority).any(|other| !stalls(other, now))
    }

    /// Whether a fetch waits for a more urgent one that gains: it has something on its way, and no more comes beside that. Else
    /// its requests would fill the line whenever the urgent one's neighbours have nothing new for a moment, which is most of
    /// the time where its pieces only come into being.
    pub(super) fn yields(&self, now: Time, key: SwarmKey) -> bool {
        let Some(fetch) = self.states.fetch(key) else { return false };
        self.is_outranked(now, fetch.priority)
            && (fetch.requests > 0
                || self.reads.iter().any(|read| read.swarm == key && read.open_count() > 0))
    }

    /// The swarm whose turn it is: the highest priority, among equal ones the one that got the fewest bytes, what is
    /// on its way counted, among those any.
    fn next_swarm(&mut self, stuck: &[SwarmKey]) -> Option<SwarmKey> {
        let wanting = |key: &SwarmKey| {
            let fetch = self.states.fetch(*key).filter(|fetch| fetch.missing() > 0)?;
            Some((*key, fetch))
        };
        if let [only] = self.fetching.as_slice() {
            return wanting(only).map(|(key, _)| key);
        }
        let turn = self.rng.random_range(0..self.fetching.len().max(1));
        let (later, sooner) = self.fetching.split_at_checked(turn)?;
        sooner
            .iter()
            .chain(later)
            .filter(|key| !stuck.contains(key))
            .filter(|key| !self.yields(self.now, **key))
            .filter_map(wanting)
            .min_by_key(|(_, fetch)| (u8::MAX - fetch.priority, fetch.turn()))
            .map(|(key, _)| key)
    }

    /// Finds out which of those that are watched may be asked again, if the time has come for any.
    fn look_at_watched(&mut self, now: Time, key: SwarmKey) {
        let Some(state) = self.states.get_mut(key) else { return };
        let neighbours = &mut state.neighbours;
        if neighbours.watch_at() > now {
            return;
        }
        let (mut free, mut until) = (0, Time(u64::MAX));
        for slot in members(neighbours.watched()) {
            let Some(peer) = self.peers.get(neighbours.place(slot)) else { continue };
            let may_ask = peer.is_free(now, self.config.requests_per_peer_max);
            free |= Slots::from(may_ask) << slot;
            if peer.rests_until > now {
                until = until.min(peer.rests_until);
            }
        }
        neighbours.unwatch(free);
        neighbours.watched_until(until);
    }

    /// Who may be asked. Only the few that are watched are looked at.
    fn free(&mut self, now: Time, key: SwarmKey) -> Free {
        self.look_at_watched(now, key);
        let Some(state) = self.states.get(key) else { return Free::default() };
        let neighbours = &state.neighbours;
        let near = neighbours.near();
        let mut free = neighbours.taken() & !neighbours.watched();
        if neighbours.beginners() != 0
            && state.fetch.as_deref().is_some_and(|fetch| !stalls(fetch, now))
        {
            free &= !(neighbours.beginners() & near);
        }
        // Who has a request of ours is worth waiting for.
        let mut zone = free & near;
        free &= !self.asked_enough(state);
        let far = free & !near;
        if far != 0 {
            for slot in members(neighbours.watched() & near) {
                let Some(peer) = self.peers.get(neighbours.place(slot)) else { continue };
                zone |= Slots::from(peer.rests_until <= now + RESTS_SHORTLY) << slot;
            }
        }
        Free { near: free & near, far, zone }
    }

    /// Neighbours that have a request of ours, where there are enough of them to ask each for one piece: many slow lines fill
    /// ours more evenly than few, and no round trip is waited for as long as others send.
    fn asked_enough(&self, state: &State) -> Slots {
        if self.requests_per_peer(state) == self.config.requests_per_peer_max {
            return 0;
        }
        let asked = self.requests.iter().filter_map(|request| {
            if request.swarm == state.key {
                return Some(request.slot.into());
            }
            state.neighbours.find(self.peers.key(request.peer.into()))
        });
        asked.fold(0, |asked, slot: usize| asked | 1 << slot)
    }

    /// How many pieces may be on their way from one neighbour.
    pub(super) fn requests_per_peer(&self, state: &State) -> u8 {
        let enough = 2 * state.neighbours.len() > self.config.requests_wanted;
        if enough { 1 } else { self.config.requests_per_peer_max }
    }

    /// What lets a peer be asked or not has changed: notes it wherever it is a neighbour.
    pub(super) fn watch(&mut self, now: Time, place: usize) {
        let Some(peer) = self.peers.get(place) else { return };
        let may_ask = peer.is_free(now, self.config.requests_per_peer_max);
        let until = if peer.rests_until > now { peer.rests_until } else { Time(u64::MAX) };
        for swarm in &self.fetching {
            let Some(state) = self.states.get_mut(*swarm) else { continue };
            let find = || state.neighbours.find(self.peers.key(place));
            let Some(slot) = peer.slot(*swarm).or_else(find) else { continue };
            if may_ask {
                state.neighbours.unwatch(1 << slot);
            } else {
                state.neighbours.watch(1 << slot, until);
            }
        }
    }

    /// A neighbour of our zone holds new pieces: asks it for the rarest of them that we lack, if it may be asked.
    pub(super) fn ask_for_news(
        &mut self,
        now: Time,
        swarm: SwarmKey,
        slot: usize,
        news: &[PieceIndex],
    ) {
        let salt: u64 = self.rng.random();
        let Some(state) = self.states.get(swarm) else { return };
        let (Some(fetch), neighbours) = (state.fetch.as_deref(), &state.neighbours) else { return };
        let peer = self.peers.get(neighbours.place(slot));
        let offers = neighbours.beginners() >> slot & 1 == 1 && !stalls(fetch, now);
        let most = self.requests_per_peer(state);
        let is_free = |peer: &Peer| peer.is_free(now, most);
        if offers || !peer.is_some_and(is_free) || self.yields(now, swarm) {
            return;
        }
        let wanted = news.iter().map(|piece| piece.0).filter(|piece| fetch.is_missing(*piece));
        let rarest = wanted.min_by_key(|piece| {
            (neighbours.holders(*piece).count_ones(), mix(salt ^ u64::from(*piece)))
        });
        if let Some(piece) = rarest {
            self.ask(now, swarm, piece, slot);
        }
    }

    /// A piece, and the slot of the neighbour to ask for it.
    fn pick(&mut self, now: Time, key: SwarmKey) -> Option<(u32, usize)> {
        let salt: u64 = self.rng.random();
        let free = self.free(now, key);
        let state = self.states.get(key)?;
        let fetch = state.fetch.as_deref()?;
        let scan = self.config.pick_scan;
        let across = Across::new(fetch, self.salt ^ mix(key.0), now);
        let piece = choose(fetch, &state.neighbours, free, &across, scan, salt)?;
        let slot = self.best(now, state, free, piece, salt)?;
        Some((piece, slot))
    }

    /// Of the free neighbours that hold a piece the one that will have it here soonest.
    fn best(&self, now: Time, state: &State, free: Free, piece: u32, salt: u64) -> Option<usize> {
        let neighbours = &state.neighbours;
        let usual = state.fetch.as_ref().and_then(|fetch| fetch.times.mean());
        let usual = usual.unwrap_or(USUAL_GUESS);
        let holders = neighbours.holders(piece);
        let near = holders & free.near;
        let from = if near != 0 { near } else { holders & free.far };
        members(from).min_by_key(|slot| {
            let load = self.peers.get(neighbours.place(*slot)).map(|peer| peer.load(now, usual));
            let any = mix(neighbours.key(*slot).0 ^ salt);
            (load, neighbours.is_complete(*slot), any)
        })
    }

    /// Asks further peers for pieces that are under way, where `which` says so, oldest first.
    fn join_requests(&mut self, now: Time, which: impl Fn(&Request, &Fetching) -> bool) {
        let slow = |request: &&Request| {
            self.states.fetch(request.swarm).is_some_and(|fetch| which(request, fetch))
        };
        let slow = self.requests.iter().filter(slow);
        let mut slow: Vec<(Time, SwarmKey, u32)> =
            slow.map(|request| (request.at, request.swarm, request.piece)).collect();
        slow.sort_unstable();
        for (_, key, piece) in slow {
            let copies =
                self.requests.iter().filter(|r| r.swarm == key && r.piece == piece).count();
            if copies >= self.config.copies_per_piece_max || !self.has_room() {
                continue;
            }
            let mut free = self.free(now, key);
            let Some(state) = self.states.get(key) else { continue };
            let asked =
                self.requests.iter().filter(|r| r.swarm == key && r.piece == piece).map(|r| r.peer);
            for slot in asked.filter_map(|peer| state.neighbours.find(self.peers.key(peer.into())))
            {
                free.near &= !(1 << slot);
                free.far &= !(1 << slot);
            }
            let salt: u64 = self.rng.random();
            if let Some(slot) = self.best(now, state, free, piece, salt) {
                self.ask(now, key, piece, slot);
            }
        }
    }

    /// Asks the neighbour in a slot for a piece.
    fn ask(&mut self, now: Time, key: SwarmKey, piece: u32, slot: usize) {
        let Some(state) = self.states.get_mut(key) else { return };
        let Some(fetch) = state.fetch.as_deref_mut() else { return };
        let (peer, place) = (state.neighbours.key(slot), state.neighbours.place(slot));
        let Some(asked) = self.peers.get_mut(place) else { return };
        let config = &self.config;
        let late = fetch.times.late().unwrap_or(config.late_first);
        let late = late.clamp(config.late_min, config.late_max.max(config.late_min));
        let give_up =
            late.saturating_mul(config.give_up_factor.saturating_mul(fetch.times.strain()));
        let give_up = give_up.clamp(config.give_up_min, config.give_up_max.max(config.give_up_min));
        fetch.set(piece, PieceState::Asked);
        // Who could not be served for long does not keep all others waiting for as long.
        fetch.gained = fetch.gained.max(self.turn.saturating_sub(TURN_LAG));
        self.turn = self.turn.max(fetch.turn());
        fetch.requests += 1;
        asked.requests += 1;
        let id = RequestId(self.next_request);
        self.next_request += 1;
        self.requests.push(Request {
            id,
            swarm: key,
            at: now,
            late_at: now + late,
            give_up_at: now + give_up,
            piece,
            peer: place as u16,
            slot: slot as u8,
            late: false,
        });
        self.watch(now, place);
        let piece = shoal_proto::PieceIndex(piece);
        self.actions.push(Action::Fetch { request: id, peer, swarm: key, piece });
    }

    /// Takes a request out; its piece is missing again unless another request or fate has it.
    pub(super) fn take_request(&mut self, at: usize) -> Request {
        let request = self.requests.swap_remove(at);
        let place = usize::from(request.peer);
        if let Some(peer) = self.peers.get_mut(place) {
            peer.requests -= 1;
            self.watch(self.now, place);
        }
        let still = self
            .requests
            .iter()
            .any(|other| other.swarm == request.swarm && other.piece == request.piece);
        if let Some(fetch) = self.states.fetch_mut(request.swarm) {
            fetch.requests -= 1;
            if !still && fetch.is_asked(request.piece) {
                fetch.set(request.piece, PieceState::Missing);
            }
        }
        request
    }

    /// Takes out the requests that `which` says, telling nobody.
    pub(super) fn take_requests(&mut self, which: impl Fn(&Request) -> bool) -> Vec<RequestId> {
        let mut taken = Vec::new();
        while let Some(at) = self.requests.iter().position(&which) {
            taken.push(self.take_request(at).id);
        }
        if !taken.is_empty() {
            self.stir();
        }
        taken
    }

    /// Cancels the requests that `which` says.
    pub(super) fn cancel(&mut self, which: impl Fn(&Request) -> bool) {
        for request in self.take_requests(which) {
            self.actions.push(Action::CancelFetch { request });
        }
    }
}

/// A fetch that gains nothing for this long stalls: many pieces should have come. In a large zone a machine waits for
/// some pieces' time at the start, and that is no reason to fetch from outside.
pub(super) fn stall(fetch: &Fetching) -> Duration {
    /// The first piece of a large, slow swarm needs some time.
    const FIRST: Duration = Duration::from_secs(2);
    fetch.times.mean().map_or(FIRST, |mean| (mean * 16).max(Duration::from_millis(1)))
}

/// Whether a fetch has gained nothing for that long.
fn stalls(fetch: &Fetching, now: Time) -> bool {
    fetch.progressed_at + stall(fetch) <= now
}

#[cfg(test)]
mod tests;
