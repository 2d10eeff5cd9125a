//! The state machine: one entry, [`Swarm::handle`], and what each event changes. The decisions lie
//! beside it: [`pick`] says which piece is asked from whom, [`origin`] what is read from the bucket, by leave that
//! [`leasing`] asks for or [`fallback`] gives; [`tell`] what neighbours hear, [`uploads`] what they get;
//! [`membership`] follows who they are.

mod actions;
mod check;
mod choose;
mod fallback;
mod leasing;
mod membership;
mod neighbours;
mod origin;
mod peers;
mod pick;
mod state;
mod tell;
mod timers;
mod uploads;
mod warm;

pub use warm::Upcoming;

use alloc::{boxed::Box, sync::Arc, vec::Vec};
use core::cmp::Reverse;

use rand::SeedableRng;
use rand_pcg::Pcg32;
use shoal_proto::{Bitmap, PieceIndex, manifest::PIECES_MAX};
use smallvec::SmallVec;

use self::{
    actions::Actions,
    neighbours::Neighbours,
    origin::Read,
    peers::Peers,
    pick::Request,
    state::{Fetching, State, States},
    uploads::Uploads,
};
use crate::{
    config::Config,
    event::{Action, Event, Outcome, PeerKey, Purpose, RequestId, SwarmKey, UploadId},
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
    /// Pieces that are leased or being read from the bucket.
    pub origin: u32,
    /// Neighbours that take part.
    pub neighbours: u32,
    /// Neighbours that hold every piece.
    pub seeds: u32,
}

/// How much is under way on the whole machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Load {
    /// Connections.
    pub peers: usize,
    /// Swarms, fetching and serving.
    pub swarms: usize,
    /// Requests to peers.
    pub requests: usize,
    /// Reads of the bucket.
    pub origin_reads: usize,
    /// Uploads being served.
    pub uploads: usize,
}

/// Requests that lie in the machine itself: no pointer lies between for most.
const REQUESTS: usize = 10;

/// The policy of one machine, for all its swarms.
///
/// The fields lie in their order: where there are many machines, cache lines are what an event waits for, so what every
/// event needs lies side by side. A `SmallVec` ends with its length, which is needed more often than what is in it.
#[derive(Debug, Clone)]
#[repr(C, align(64))]
pub struct Swarm {
    /// At most `requests_max`: looked through from end to end.
    requests: SmallVec<[Request; REQUESTS]>,
    /// The swarms that fetch, the highest priority first.
    fetching: SmallVec<[SwarmKey; 1]>,
    now: Time,
    wake: Option<Time>,
    next_request: u64,
    /// Something changed that may let a peer be asked.
    peers_stirred: bool,
    /// Something changed that may let the bucket be read.
    origin_stirred: bool,
    config: Arc<Config>,
    rng: Pcg32,
    actions: Actions,
    /// Tells this machine from others where all use one hash.
    salt: u64,
    /// Whose turn it is, as [`Fetching::turn`] counts.
    turn: u64,
    states: States,
    peers: Peers,
    /// At most `origin_reads_max`.
    reads: Vec<Read>,
    uploads: Uploads,
}

impl Swarm {
    /// A machine without peers and swarms. `seed` must differ from machine to machine: it breaks ties,
    /// and so keeps machines that see the same from doing the same. Many machines may share a `config`.
    #[must_use]
    pub fn new(config: impl Into<Arc<Config>>, seed: u64) -> Self {
        Self {
            config: config.into(),
            salt: crate::hash::mix(seed ^ 0x5a17_5a17_5a17_5a17),
            rng: Pcg32::seed_from_u64(seed),
            now: Time::ZERO,
            peers: Peers::default(),
            states: States::default(),
            fetching: SmallVec::new(),
            requests: SmallVec::new(),
            next_request: 0,
            turn: 0,
            reads: Vec::new(),
            uploads: Uploads::default(),
            peers_stirred: false,
            origin_stirred: false,
            wake: None,
            actions: Actions::default(),
        }
    }

    /// Takes one event in; then drain [`Self::poll_action`] and look at [`Self::next_timeout`]. A `now`
    /// that goes back is taken for the latest one.
    pub fn handle(&mut self, now: Time, event: Event) {
        let now = now.max(self.now);
        self.now = now;
        self.actions.settle(&self.states);
        // What is heard most often moves no timer, unless something is asked for.
        let asked = self.next_request;
        let still = matches!(
            event,
            Event::PeerHave { .. }
                | Event::UploadAsked { .. }
                | Event::UploadEnded { .. }
                | Event::Offered { .. }
        );
        match event {
            Event::Start { swarm, pieces, have, purpose } => {
                self.start(now, swarm, pieces, have, purpose);
            }
            Event::Stop { swarm } => self.stop(swarm),
            Event::PeerUp { peer, same_zone } => self.peer_up(peer, same_zone),
            Event::PeerDown { peer } => self.peer_down(now, peer),
            Event::PeerJoined { peer, swarm, have } => self.peer_joined(peer, swarm, &have),
            Event::PeerHave { peer, swarm, pieces } => self.peer_have(now, peer, swarm, &pieces),
            Event::PeerLeft { peer, swarm } => self.peer_left(now, peer, swarm),
            Event::FetchEnded { request, outcome } => self.fetch_ended(now, request, outcome),
            Event::UploadAsked { upload, peer, swarm, piece } => {
                self.upload_asked(upload, peer, swarm, piece);
            }
            Event::UploadEnded { upload, whole } => self.upload_ended(upload, whole),
            Event::Offered { peer, swarm, piece } => self.offered(now, peer, swarm, piece.0),
            Event::LeaseGranted { swarm, block, first, count, duration } => {
                self.lease_granted(now, swarm, block, first, count, duration);
            }
            Event::LeaseDenied { swarm, block, retry, all_blocks } => {
                self.lease_denied(now, swarm, block, retry, all_blocks);
            }
            Event::LeaseFailed { swarm, block } => self.lease_failed(now, swarm, block),
            Event::OriginEnded { swarm, piece, outcome } => {
                self.origin_ended(now, swarm, piece.0, outcome);
            }
            Event::Timeout => self.stir(),
        }
        if self.wake.is_some_and(|wake| wake <= now) {
            // The driver is late: this event is the timeout too.
            self.stir();
        }
        if still && !self.origin_stirred && !self.peers_stirred && asked == self.next_request {
            return;
        }
        self.fire(now);
        if core::mem::take(&mut self.origin_stirred) {
            self.use_origin(now);
        }
        if core::mem::take(&mut self.peers_stirred) {
            self.ask_peers(now);
        }
        self.wake = self.next_wake(now);
    }

    /// The next thing to do; drain it after each event.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop(&self.states)
    }

    /// When to send [`Event::Timeout`]; always later than the last event. Changes with each event.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Time> {
        self.wake
    }

    /// How far a swarm is; none when this machine is not in it.
    #[must_use]
    pub fn progress(&self, swarm: SwarmKey) -> Option<Progress> {
        let state = self.states.get(swarm)?;
        let reads = self.reads.iter().filter(|read| read.swarm == swarm);
        let origin = reads.map(Read::open_count).sum::<u32>();
        let fetch = state.fetch.as_deref();
        Some(Progress {
            pieces: state.pieces,
            held: state.held.count(),
            requests: fetch.map_or(0, |fetch| fetch.requests),
            origin: origin + fetch.map_or(0, |fetch| fetch.leases.len() as u32),
            neighbours: state.neighbours.len() as u32,
            seeds: state.neighbours.complete().count_ones(),
        })
    }

    /// What a piece is to this machine; none when there is no such swarm or piece.
    #[must_use]
    pub fn piece_state(&self, swarm: SwarmKey, piece: PieceIndex) -> Option<PieceState> {
        self.states.get(swarm)?.piece_state(piece.0)
    }

    /// The pieces held in a swarm.
    #[must_use]
    pub fn held(&self, swarm: SwarmKey) -> Option<&Bitmap> {
        self.states.get(swarm).map(|state| &state.held)
    }

    /// How much is under way in all.
    #[must_use]
    pub fn load(&self) -> Load {
        Load {
            peers: self.peers.len(),
            swarms: self.states.len(),
            requests: self.requests.len(),
            origin_reads: self.reads.len(),
            uploads: self.uploads.count(),
        }
    }

    /// The numbers it works with.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Works with other numbers from now on; then drain [`Self::poll_action`] and look at [`Self::next_timeout`]. What is
    /// under way goes on, though it be more than they allow.
    pub fn set_config(&mut self, now: Time, config: impl Into<Arc<Config>>) {
        self.config = config.into();
        self.handle(now, Event::Timeout);
        // Places may be free that were not.
        self.offer_slots();
    }

    fn stir(&mut self) {
        self.peers_stirred = true;
        self.origin_stirred = true;
    }

    fn start(&mut self, now: Time, key: SwarmKey, pieces: u32, have: Bitmap, purpose: Purpose) {
        if have.len() != pieces || pieces > PIECES_MAX {
            return;
        }
        self.stir();
        if let Some(state) = self.states.get_mut(key) {
            let Purpose::Fetch { priority, may_lease, fleet, .. } = purpose else { return };
            if let Some(fetch) = &mut state.fetch {
                (fetch.priority, fetch.fleet) = (priority, fleet);
                fetch.let_lease(may_lease);
                self.sort_fetching();
                return;
            }
            if state.held.is_full() {
                self.actions.push(Action::Completed { swarm: key });
                return;
            }
            // It served a part, and shall now get the rest: begin anew, so that neighbours tell
            // again what they hold.
            self.stop(key);
        }
        let fetch = match purpose {
            Purpose::Fetch { priority, piece_bytes, may_lease, fleet } if !have.is_full() => {
                let config = &self.config;
                let mut fetch = Fetching::new(&have, priority, may_lease, fleet, now, config);
                fetch.shares(piece_bytes, self.turn);
                Some(Box::new(fetch))
            }
            _ => None,
        };
        let fetches = fetch.is_some();
        if !fetches && matches!(purpose, Purpose::Fetch { .. }) {
            self.actions.push(Action::Completed { swarm: key });
        }
        let said = Arc::new(have.clone());
        for (peer, _) in self.peers.iter().filter(|(_, peer)| !peer.banned) {
            let have = said.clone();
            self.actions.push(Action::Announce { peer, swarm: key, have });
        }
        // Those that there is a connection to may take part too, and will say so soon.
        let expected = self.peers.iter().filter(|(_, peer)| !peer.banned).count();
        let want_peers_at = if expected * 2 >= self.config.neighbours_target {
            now + peers::jitter(self.config.want_peers_first, &mut self.rng)
        } else {
            now
        };
        let state = State {
            key,
            pieces,
            held: have,
            fetch,
            neighbours: Neighbours::new(pieces, fetches),
            untold: Vec::new(),
            tell_at: None,
            reannounce_at: now + peers::jitter(self.config.reannounce, &mut self.rng),
            want_peers_at,
            want_peers_streak: 0,
            offer_turn: 0,
            given: None,
        };
        self.states.insert(state);
        if fetches {
            self.fetching.push(key);
            self.sort_fetching();
        }
    }

    fn sort_fetching(&mut self) {
        let states = &self.states;
        let priority = |key: &SwarmKey| states.fetch(*key).map_or(0, |fetch| fetch.priority);
        self.fetching.sort_by_key(|key| Reverse(priority(key)));
    }

    fn stop(&mut self, key: SwarmKey) {
        let Some(state) = self.states.remove(key) else { return };
        self.peers.iter_mut().for_each(|peer| peer.has_no_slot(key));
        self.stir();
        self.fetching.retain(|other| *other != key);
        self.cancel(|request| request.swarm == key);
        if let Some(fetch) = state.fetch {
            let back = fetch.leases.pieces().map(|piece| (piece, false));
            leasing::report(&mut self.actions, key, back);
        }
        self.reads.iter_mut().filter(|read| read.swarm == key).for_each(Read::orphan);
        for (peer, _) in self.peers.iter().filter(|(_, peer)| !peer.banned) {
            self.actions.push(Action::AnnounceLeave { peer, swarm: key });
        }
    }

    fn upload_asked(&mut self, id: UploadId, peer: PeerKey, swarm: SwarmKey, piece: PieceIndex) {
        let may_have = self.states.get(swarm).is_some_and(|state| {
            // A neighbour is known and not banned; others may ask too.
            let known = || self.peers.find(peer).and_then(|at| self.peers.get(at));
            state.held.contains(piece.0)
                && (state.neighbours.find(peer).is_some()
                    || known().is_some_and(|peer| !peer.banned))
        });
        if may_have {
            self.serve(id, peer, swarm, piece.0);
        } else {
            self.actions.push(Action::RefuseNotHere { upload: id });
        }
    }

    fn fetch_ended(&mut self, now: Time, id: RequestId, outcome: Outcome) {
        let Some(at) = self.requests.iter().position(|request| request.id == id) else { return };
        let request = self.take_request(at);
        let took = now.since(request.at);
        let place = usize::from(request.peer);
        let answers = matches!(outcome, Outcome::Verified | Outcome::Busy | Outcome::NotHere);
        if answers && self.peers.get(place).is_some_and(|peer| peer.mute) {
            self.set_mute(place, false);
        }
        let Some(peer) = self.peers.get_mut(place) else { return };
        let Some(state) = self.states.get_mut(request.swarm) else { return };
        let (config, rng) = (&self.config, &mut self.rng);
        self.peers_stirred = true;
        match outcome {
            Outcome::Verified => {
                peer.delivered(now, took);
                if let Some(fetch) = &mut state.fetch {
                    fetch.served(now, took);
                    fetch.gained += fetch.piece_bytes;
                }
                self.hold(now, request.swarm, request.piece);
                return;
            }
            Outcome::Busy => {
                let usual = state.fetch.as_ref().and_then(|fetch| fetch.times.mean());
                let least = config.busy_backoff_min;
                let min = usual.map_or(least, |usual| (usual / 2).max(least));
                let max = usual.map_or(config.busy_backoff_max, |usual| usual * 2);
                peer.was_busy(now, min, max.min(config.busy_backoff_max).max(min), rng);
                self.watch(now, place);
                if let Some(state) = self.states.get_mut(request.swarm)
                    && let Some(slot) = state.neighbours.find(self.peers.key(place))
                {
                    state.neighbours.is_busy(slot);
                }
                self.ask_another(now, request.swarm, request.piece);
                return;
            }
            Outcome::NotHere => state.has_not(self.peers.key(place), request.piece),
            Outcome::Failed => {
                peer.has_failed(now, config.failed_backoff_min, config.failed_backoff_max, rng);
                self.watch(now, place);
            }
            Outcome::Corrupt => {
                peer.corrupt = peer.corrupt.saturating_add(1);
                let corrupt = peer.corrupt;
                let key = self.peers.key(place);
                state.has_not(key, request.piece);
                if corrupt >= config.corrupt_max {
                    if let Some(peer) = self.peers.get_mut(place) {
                        peer.banned = true;
                    }
                    self.actions.push(Action::Ban { peer: key });
                    self.cancel(|other| other.peer == request.peer);
                    self.forget_pieces_of(now, key);
                }
            }
        }
        self.origin_stirred = true;
    }

    /// A piece is held from now on.
    fn hold(&mut self, now: Time, key: SwarmKey, piece: u32) {
        let Some(state) = self.states.get_mut(key) else { return };
        let Some(fetch) = state.fetch.as_deref_mut() else { return };
        if piece >= state.pieces || state.held.contains(piece) {
            return;
        }
        fetch.leases.remove(piece);
        fetch.set(piece, PieceState::Held);
        fetch.progressed(now, &self.config);
        state.held.insert(piece);
        state.untold.push(PieceIndex(piece));
        if state.tell_at.is_none() {
            let delay = tell::delay(fetch, &state.held);
            let within = (self.config.have_delay_min, self.config.have_delay_max);
            state.tell_at = Some(now + delay.clamp(within.0, within.1.max(within.0)));
        }
        let full = state.held.is_full();
        let batch = state.untold.len() >= self.have_batch();
        self.cancel(|request| request.swarm == key && request.piece == piece);
        if full {
            self.complete(now, key);
        } else if batch {
            self.tell(key);
        }
        self.offer_slots();
        self.stir();
    }

    fn complete(&mut self, now: Time, key: SwarmKey) {
        let Some(state) = self.states.get_mut(key) else { return };
        state.finish();
        state.untold = Vec::new();
        state.tell_at = None;
        state.reannounce_at = now + peers::jitter(self.config.reannounce, &mut self.rng);
        self.fetching.retain(|other| *other != key);
        self.actions.push(Action::Completed { swarm: key });
        self.announce_to(key, |state| state.neighbours.taken());
    }
}
