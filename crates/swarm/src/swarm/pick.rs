//! Which piece is asked from whom.
//!
//! The piece first: the rarest among a random sample of those that a free neighbour has, an even choice
//! among equals, so that machines that see the same do not all want the same. Then the neighbour: one in
//! our zone, then the one that will have it here soonest by what was measured, then one that is not a
//! seed. A neighbour in another zone is asked for what our zone can give only when nothing else is
//! under way: what crosses zones is a budget.
//!
//! A late request is joined by a second one to another neighbour before it fails. When nothing is
//! left to ask for, requests that take longer than usual are joined too: the endgame. The first to
//! arrive wins, and the other is cancelled.

use alloc::vec::Vec;
use core::time::Duration;

use rand::RngExt;

use super::{
    PieceState, Swarm,
    state::{Fetching, Holds},
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

/// A piece asked from a peer.
#[derive(Debug, Clone)]
pub(super) struct Request {
    pub(super) id: RequestId,
    pub(super) peer: PeerKey,
    pub(super) swarm: SwarmKey,
    pub(super) piece: u32,
    pub(super) at: Time,
    pub(super) late_at: Time,
    pub(super) give_up_at: Time,
    /// Whether `late_at` has passed.
    pub(super) late: bool,
}

/// A neighbour that may be asked now.
struct Free<'a> {
    key: PeerKey,
    holds: &'a Holds,
    same_zone: bool,
    load: u32,
}

impl Free<'_> {
    /// Lower is better.
    fn rank(&self, salt: u64) -> (bool, u32, bool, u64) {
        (!self.same_zone, self.load, self.holds.is_all(), mix(self.key.0 ^ salt))
    }
}

impl Swarm {
    /// Fills the budget of requests: late ones first, then new ones, then the endgame.
    pub(super) fn ask_peers(&mut self, now: Time) {
        if self.has_budget() {
            self.join_requests(now, |request, _| request.late);
        }
        let mut stuck: Vec<SwarmKey> = Vec::new();
        while self.has_budget() {
            let Some(key) = self.next_swarm(&stuck) else { break };
            match self.pick(now, key) {
                Some((piece, peer)) => self.ask(now, key, piece, peer),
                None => stuck.push(key),
            }
        }
        if self.has_budget() {
            self.join_requests(now, |request, fetch| {
                let usual = fetch.times.mean();
                fetch.missing().is_empty() && usual.is_some_and(|mean| request.at + mean <= now)
            });
        }
    }

    fn has_budget(&self) -> bool {
        self.requests.len() < self.config.requests_max && !self.fetching.is_empty()
    }

    /// The swarm whose turn it is: the highest priority, among equal ones the one with the fewest
    /// requests under way, among those any.
    fn next_swarm(&mut self, stuck: &[SwarmKey]) -> Option<SwarmKey> {
        let turn = self.rng.random_range(0..self.fetching.len().max(1));
        let (later, sooner) = self.fetching.split_at_checked(turn)?;
        let fetch = |key: &SwarmKey| self.states.get(key).and_then(|state| state.fetch.as_deref());
        sooner
            .iter()
            .chain(later)
            .filter(|key| !stuck.contains(key))
            .filter_map(|key| fetch(key).map(|fetch| (key, fetch)))
            .filter(|(_, fetch)| !fetch.missing().is_empty())
            .min_by_key(|(_, fetch)| (u8::MAX - fetch.priority, fetch.requests))
            .map(|(key, _)| *key)
    }

    /// Neighbours that may be asked now, and the pieces of all in our zone that are worth waiting for.
    fn free(&self, now: Time, key: SwarmKey) -> (Vec<Free<'_>>, Vec<&Holds>) {
        let (mut free, mut zone) = (Vec::new(), Vec::new());
        let Some(state) = self.states.get(&key) else { return (free, zone) };
        let usual = state.fetch.as_ref().and_then(|fetch| fetch.times.mean());
        for (key, holds) in &state.neighbours {
            let Some(peer) = self.peers.get(key) else { continue };
            if peer.same_zone && peer.rests_until <= now + RESTS_SHORTLY {
                zone.push(holds);
            }
            if peer.is_free(now, self.config.requests_per_peer_max) {
                let load = peer.load(now, usual.unwrap_or(USUAL_GUESS));
                free.push(Free { key: *key, holds, same_zone: peer.same_zone, load });
            }
        }
        (free, zone)
    }

    fn pick(&mut self, now: Time, key: SwarmKey) -> Option<(u32, PeerKey)> {
        let salt: u64 = self.rng.random();
        let (free, zone) = self.free(now, key);
        let fetch = self.states.get(&key)?.fetch.as_deref()?;
        let idle = fetch.requests == 0;
        let piece = rarest(fetch, &free, &zone, idle, self.config.pick_scan, salt)?;
        let holders = free.iter().filter(|free| free.holds.contains(piece));
        let peer = holders.min_by_key(|free| free.rank(salt))?.key;
        Some((piece, peer))
    }

    /// Asks further peers for pieces that are under way, where `which` says so, oldest first.
    fn join_requests(&mut self, now: Time, which: impl Fn(&Request, &Fetching) -> bool) {
        let mut slow: Vec<(Time, SwarmKey, u32)> = self
            .requests
            .iter()
            .filter(|request| {
                let state = self.states.get(&request.swarm);
                let fetch = state.and_then(|state| state.fetch.as_deref());
                fetch.is_some_and(|fetch| which(request, fetch))
            })
            .map(|request| (request.at, request.swarm, request.piece))
            .collect();
        slow.sort_unstable();
        for (_, key, piece) in slow {
            let of_piece = |r: &&Request| r.swarm == key && r.piece == piece;
            let asked: Vec<PeerKey> =
                self.requests.iter().filter(of_piece).map(|request| request.peer).collect();
            if asked.len() >= self.config.copies_per_piece_max || !self.has_budget() {
                continue;
            }
            let salt: u64 = self.rng.random();
            let (free, _) = self.free(now, key);
            let other = free
                .iter()
                .filter(|free| free.holds.contains(piece) && !asked.contains(&free.key))
                .min_by_key(|free| free.rank(salt))
                .map(|free| free.key);
            if let Some(peer) = other {
                self.ask(now, key, piece, peer);
            }
        }
    }

    fn ask(&mut self, now: Time, key: SwarmKey, piece: u32, peer: PeerKey) {
        let state = self.states.get_mut(&key).and_then(|state| state.fetch.as_deref_mut());
        let (Some(fetch), Some(asked)) = (state, self.peers.get_mut(&peer)) else { return };
        let config = &self.config;
        let late = fetch.times.late().unwrap_or(config.late_first);
        let late = late.clamp(config.late_min, config.late_max.max(config.late_min));
        let give_up =
            late.saturating_mul(config.give_up_factor.saturating_mul(fetch.times.strain()));
        let give_up = give_up.clamp(config.give_up_min, config.give_up_max.max(config.give_up_min));
        fetch.set(piece, PieceState::Asked);
        fetch.requests += 1;
        asked.requests += 1;
        let id = RequestId(self.next_request);
        self.next_request += 1;
        self.requests.push(Request {
            id,
            peer,
            swarm: key,
            piece,
            at: now,
            late_at: now + late,
            give_up_at: now + give_up,
            late: false,
        });
        let piece = shoal_proto::PieceIndex(piece);
        self.actions.push_back(Action::Fetch { request: id, peer, swarm: key, piece });
    }

    /// Takes a request out; its piece is missing again unless another request or fate has it.
    pub(super) fn take_request(&mut self, at: usize) -> Request {
        let request = self.requests.swap_remove(at);
        if let Some(peer) = self.peers.get_mut(&request.peer) {
            peer.requests -= 1;
        }
        let still = self
            .requests
            .iter()
            .any(|other| other.swarm == request.swarm && other.piece == request.piece);
        let state = self.states.get_mut(&request.swarm);
        if let Some(fetch) = state.and_then(|state| state.fetch.as_deref_mut()) {
            fetch.requests -= 1;
            if !still && fetch.state(request.piece) == Some(PieceState::Asked) {
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
            self.actions.push_back(Action::CancelFetch { request });
        }
    }
}

/// The rarest missing piece that a free neighbour has, among about `scan` candidates from a random place
/// on; of equally rare ones any.
fn rarest(
    fetch: &Fetching,
    free: &[Free<'_>],
    zone: &[&Holds],
    idle: bool,
    scan: u32,
    salt: u64,
) -> Option<u32> {
    let missing = fetch.missing().words();
    let (words, mut seen) = (missing.len(), 0);
    let mut best: Option<(u16, u64, u32)> = None;
    if free.is_empty() || words == 0 {
        return None;
    }
    let start = (salt % words as u64) as usize;
    for at in (start..words).chain(0..start) {
        if missing[at] == 0 {
            continue;
        }
        let (mut near, mut far) = (0, 0);
        for neighbour in free {
            let word = neighbour.holds.word(at);
            if neighbour.same_zone { near |= word } else { far |= word }
        }
        if !idle && far & missing[at] != 0 {
            far &= !zone.iter().fold(0, |all, holds| all | holds.word(at));
        }
        let mut word = missing[at] & (near | far);
        seen += word.count_ones();
        while word != 0 {
            let piece = at as u32 * 64 + word.trailing_zeros();
            word &= word - 1;
            let next = (fetch.available(piece), mix(u64::from(piece) ^ salt), piece);
            if best.is_none_or(|best| next < best) {
                best = Some(next);
            }
        }
        if seen >= scan {
            break;
        }
    }
    best.map(|(_, _, piece)| piece)
}
