//! What peers ask of us: slots, BUSY at once beyond them, and offers when one is free.
//!
//! Who serves knows when a slot is free and what its neighbours lack. So nobody has to find that out by asking: when an upload
//! ends or a piece is new, the neighbour that was turned away longest ago is told, and if there is none, one that lacks
//! something that we hold, each in turn. Whoever has room for one more piece then asks. Nothing is kept for it: an
//! offer that nobody takes costs one small message. Who holds its first piece has few slots and is wanted by all its
//! neighbours: it is not asked but offers, as long as that brings anything.
//!
//! A machine that hardly reads what it asked for keeps its slots for long, and a few of them keep them all. So an upload that
//! others overtake, and that lasts many times as long as they do, goes on but takes no slot any more. Where none gets on, one
//! more peer is served to see whether another one would.

use alloc::{boxed::Box, collections::VecDeque, vec::Vec};
use core::time::Duration;

use rand::RngExt;
use shoal_proto::{Bitmap, PieceIndex};
use smallvec::SmallVec;

use super::{
    Swarm,
    neighbours::{Slots, members},
    peers::PieceTime,
    state::State,
};
use crate::{
    config::Config,
    event::{Action, PeerKey, SwarmKey, UploadId},
    prefetch::prefetch_all,
    time::Time,
};

/// The most that were turned away and are remembered; any more ask again after a rest.
const TURNED_AWAY_MAX: usize = 64;

/// What a lone seed gave is remembered of so many pieces, the last ones, and for as long as news may wait: by then all know
/// who has it.
const GIVEN_MAX: usize = 512;

/// Uploads that lie in the machine itself: as many as it has slots.
const SERVED: usize = 8;

#[derive(Debug, Clone)]
pub(super) struct Upload {
    id: UploadId,
    peer: PeerKey,
    /// A piece that a lone seed gave before.
    again: bool,
    /// One that began later was sent whole.
    overtaken: bool,
    began: Time,
}

/// A piece that a lone seed gave.
#[derive(Debug, Clone)]
struct Given {
    swarm: SwarmKey,
    piece: u32,
    peer: PeerKey,
    /// It was given before.
    again: bool,
    /// When all know of it.
    known_at: Time,
}

#[derive(Debug, Clone, Default)]
#[repr(C)]
pub(super) struct Uploads {
    /// The swarm whose neighbours are offered a slot first.
    turn: usize,
    /// Who was answered BUSY, and not offered a slot since; longest ago first.
    turned_away: Vec<PeerKey>,
    /// The oldest first.
    given: VecDeque<Given>,
    /// When an upload began or ended last.
    moved_at: Time,
    times: PieceTime,
    served: SmallVec<[Upload; SERVED]>,
}

impl Uploads {
    /// Begins to read what is being served, for `warm`.
    pub(super) fn warm(&self) {
        prefetch_all(self);
    }

    /// Uploads being served.
    pub(super) fn count(&self) -> usize {
        self.served.len()
    }

    /// Uploads that take a slot: those that get on.
    fn moving(&self, now: Time, config: &Config) -> impl Iterator<Item = &Upload> {
        let patience = self.patience(config);
        let stuck = move |upload: &&Upload| upload.overtaken && now.since(upload.began) >= patience;
        self.served.iter().filter(move |upload| !stuck(upload))
    }

    /// How long an upload may last and still be taken for one that gets on.
    fn patience(&self, config: &Config) -> Duration {
        let usual = self.times.mean().map(|mean| mean * config.upload_stuck_factor);
        usual.map_or(config.late_first, |usual| {
            usual.max(config.upload_stuck_min).min(config.late_max)
        })
    }

    /// Whether a peer is served one more, where a machine has so many slots.
    fn has_room(&self, now: Time, config: &Config, slots: usize, peer: PeerKey) -> bool {
        if self.served.len() >= slots + config.uploads_stuck_max {
            return false;
        }
        let tries = || now.since(self.moved_at) >= self.patience(config) && !self.serves(peer);
        self.moving(now, config).count() < slots || tries()
    }

    /// An upload ended, `whole` or not; whether it was known.
    fn ended(&mut self, now: Time, id: UploadId, whole: bool) -> bool {
        let Some(at) = self.served.iter().position(|upload| upload.id == id) else { return false };
        let upload = self.served.swap_remove(at);
        self.moved_at = now;
        if whole {
            self.times.measured(now.since(upload.began));
            let before = self.served.iter_mut().filter(|other| other.began <= upload.began);
            before.for_each(|other| other.overtaken = true);
        }
        true
    }

    /// Whether a peer is being served.
    fn serves(&self, peer: PeerKey) -> bool {
        self.served.iter().any(|upload| upload.peer == peer)
    }

    /// Whether another peer was given a piece, and not all know of it.
    fn gave_another(&self, now: Time, swarm: SwarmKey, piece: u32, peer: PeerKey) -> bool {
        let same = |given: &Given| given.swarm == swarm && given.piece == piece;
        self.given.iter().any(|given| same(given) && given.peer != peer && given.known_at > now)
    }

    /// Whether a piece was given for the first time shortly before.
    fn gave_new(&self, now: Time, swarm: SwarmKey) -> bool {
        let mut lately = self.given.iter().rev().take_while(|given| given.known_at > now);
        lately.any(|given| given.swarm == swarm && !given.again)
    }

    fn gives(&mut self, given: Given) {
        if self.given.len() >= GIVEN_MAX {
            self.given.pop_front();
        }
        self.given.push_back(given);
    }

    /// A connection ended, and all its uploads with it.
    pub(super) fn peer_down(&mut self, peer: PeerKey) {
        self.served.retain(|upload| upload.peer != peer);
        self.turned_away.retain(|other| *other != peer);
        self.given.retain(|given| given.peer != peer);
    }
}

/// How many uploads a machine serves at once, of a swarm of which it holds so much.
fn slots(config: &Config, state: &State) -> usize {
    let begins = state.fetch.is_some() && state.held.count() < config.upload_start_pieces;
    if begins { config.upload_start_slots } else { config.upload_slots }
}

impl State {
    /// Whether everything is held here, and by few others: the first to be complete leaves the rest with as much to fetch as
    /// before, and is not to send them all to who had everything first.
    fn is_lone_seed(&self) -> bool {
        /// One in so many neighbours is few.
        const FEW: u32 = 4;
        let complete = self.neighbours.complete().count_ones();
        self.held.is_full() && complete * FEW <= self.neighbours.taken().count_ones()
    }

    /// The slots whose turn it is to be offered a place, in order.
    pub(super) fn offer_order(&self) -> impl Iterator<Item = usize> + use<> {
        // What crosses zones is a budget: those ask by themselves.
        let lacking = self.neighbours.near() & !self.neighbours.complete();
        let later = lacking & Slots::MAX.checked_shl(self.offer_turn).unwrap_or(0);
        members(later).chain(members(lacking & !later))
    }
}

impl Swarm {
    /// A peer asks for a piece that we hold.
    pub(super) fn serve(&mut self, id: UploadId, peer: PeerKey, swarm: SwarmKey, piece: u32) {
        let Some(state) = self.states.get_mut(swarm) else { return };
        let uploads = &mut self.uploads;
        if uploads.served.iter().any(|upload| upload.id == id) {
            return;
        }
        let own = uploads.served.iter().filter(|upload| upload.peer == peer).count();
        let room = uploads.has_room(self.now, &self.config, slots(&self.config, state), peer);
        // Its neighbours know nothing of each other's requests, and what it sends twice nobody else can send for it.
        let alone = state.is_lone_seed();
        let unknown = alone && uploads.gave_another(self.now, swarm, piece, peer);
        let none = || Box::new(Bitmap::empty(state.pieces));
        let given = alone.then(|| state.given.get_or_insert_with(none));
        let again = given.as_ref().is_some_and(|given| given.contains(piece));
        let moving = uploads.moving(self.now, &self.config);
        let repeats = moving.filter(|upload| upload.again).count();
        // What nobody was given comes first, as long as such pieces are asked for.
        let has_new = given.as_ref().is_some_and(|given| !given.is_full());
        let waits = has_new && uploads.gave_new(self.now, swarm);
        let refuse = unknown || again && (waits || repeats >= self.config.repeats_max);
        if room && own < self.config.uploads_per_peer_max && !refuse {
            if let Some(given) = given {
                given.insert(piece);
                let known_at = self.now + self.config.have_delay_max;
                uploads.gives(Given { swarm, piece, peer, again, known_at });
            }
            uploads.turned_away.retain(|other| *other != peer);
            uploads.moved_at = self.now;
            let began = self.now;
            uploads.served.push(Upload { id, peer, again, overtaken: false, began });
            self.actions.push(Action::Serve { upload: id });
        } else {
            if !uploads.turned_away.contains(&peer) && uploads.turned_away.len() < TURNED_AWAY_MAX {
                uploads.turned_away.push(peer);
            }
            self.actions.push(Action::RefuseBusy { upload: id });
        }
    }

    /// An upload ended, `whole` or not.
    pub(super) fn upload_ended(&mut self, id: UploadId, whole: bool) {
        if self.uploads.ended(self.now, id, whole) {
            self.offer_slots();
        }
    }

    /// How many slots are offered at once, most likely.
    pub(super) fn offers(&self) -> usize {
        let Config { upload_slots, offers_until, offers_max, .. } = *self.config;
        let none_waits = self.uploads.turned_away.is_empty();
        let slots = if none_waits { upload_slots.min(offers_until) } else { upload_slots };
        let taken = self.uploads.moving(self.now, &self.config).count();
        slots.saturating_sub(taken).min(offers_max)
    }

    /// Tells neighbours of free slots.
    pub(super) fn offer_slots(&mut self) {
        for told in 0..self.config.offers_max {
            let Some((peer, swarm, piece)) = self.next_in_turn(told) else { return };
            self.actions.push(Action::Offer { peer, swarm, piece: PieceIndex(piece) });
        }
    }

    /// Who is to hear of a free slot, if there are more than so many, and of which piece.
    fn next_in_turn(&mut self, told: usize) -> Option<(PeerKey, SwarmKey, u32)> {
        let (config, uploads, rng) = (&self.config, &mut self.uploads, &mut self.rng);
        let taken = told + uploads.moving(self.now, config).count();
        let enough = taken >= config.offers_until;
        if taken >= config.upload_slots || enough && uploads.turned_away.is_empty() {
            return None;
        }
        let from = rng.random::<u32>() as usize;
        while !uploads.turned_away.is_empty() {
            let peer = uploads.turned_away.remove(0);
            let lacks = self.states.iter().find_map(|state| {
                let slot = state.neighbours.find(peer)?;
                Some((peer, state.key, state.neighbours.lacked(slot, &state.held, from)?))
            });
            if lacks.is_some() {
                return lacks;
            }
        }
        if enough {
            return None;
        }
        // The swarms take turns too.
        let count = self.states.len();
        uploads.turn = (uploads.turn + 1) % count.max(1);
        (0..count).find_map(|step| {
            let state = self.states.at_mut((uploads.turn + step) % count)?;
            if taken >= slots(config, state) {
                return None;
            }
            let neighbours = &state.neighbours;
            let (slot, piece) = state.offer_order().find_map(|slot| {
                let piece = neighbours.lacked(slot, &state.held, from)?;
                (!uploads.serves(neighbours.key(slot))).then_some((slot, piece))
            })?;
            state.offer_turn = slot as u32 + 1;
            Some((neighbours.key(slot), state.key, piece))
        })
    }

    /// A peer has a free slot, and holds a piece: asks for that or a better one, if there is room for one more.
    pub(super) fn offered(&mut self, now: Time, key: PeerKey, swarm: SwarmKey, piece: u32) {
        let Some(state) = self.states.get_mut(swarm) else { return };
        let Some(slot) = state.neighbours.find(key) else { return };
        // It may come before the news that the piece is there.
        state.neighbours.set(slot, &[PieceIndex(piece)], |_| ());
        let place = state.neighbours.place(slot);
        let most = self.states.get(swarm).map_or(0, |state| self.requests_per_peer(state));
        let Some(peer) = self.peers.get_mut(place) else { return };
        peer.offers(now);
        let may_ask = peer.is_free(now, most);
        self.watch(now, place);
        if may_ask && self.has_room() {
            self.ask_one(now, key);
        }
    }
}

#[cfg(test)]
mod tests {
    use core::time::Duration;
    use std::{collections::BTreeSet, sync::Arc, vec::Vec};

    use shoal_proto::{Bitmap, PieceIndex};

    use super::*;
    use crate::{
        event::{Event, Outcome, Purpose},
        swarm::Swarm,
    };

    const SWARM: SwarmKey = SwarmKey(1);

    /// A seed of a hundred pieces, with neighbours that lack them all: those below 100 in its zone.
    fn seed(neighbours: &[u64]) -> Swarm {
        seed_with(Config { upload_slots: 2, ..Config::default() }, neighbours)
    }

    fn seed_with(config: Config, neighbours: &[u64]) -> Swarm {
        let mut swarm = Swarm::new(config, 7);
        let have = Bitmap::full(100);
        swarm.handle(
            Time(1),
            Event::Start { swarm: SWARM, pieces: 100, have, purpose: Purpose::Seed },
        );
        for neighbour in neighbours {
            let peer = PeerKey(*neighbour);
            swarm.handle(Time(2), Event::PeerUp { peer, same_zone: *neighbour < 100 });
            let have = Arc::new(Bitmap::empty(100));
            swarm.handle(Time(3), Event::PeerJoined { peer, swarm: SWARM, have });
        }
        while swarm.poll_action().is_some() {}
        swarm
    }

    fn asks(swarm: &mut Swarm, peer: u64, upload: u64) -> Vec<Action> {
        let (upload, peer) = (UploadId(upload), PeerKey(peer));
        let piece = PieceIndex(upload.0 as u32);
        swarm.handle(Time(4), Event::UploadAsked { upload, peer, swarm: SWARM, piece });
        core::iter::from_fn(|| swarm.poll_action()).collect()
    }

    /// To whom slots are offered when an upload ends.
    fn offers_after(swarm: &mut Swarm, upload: u64) -> Vec<u64> {
        let upload = UploadId(upload);
        swarm.handle(Time(5), Event::UploadEnded { upload, whole: true });
        let actions = core::iter::from_fn(|| swarm.poll_action());
        actions
            .filter_map(|action| match action {
                Action::Offer { peer, .. } => Some(peer.0),
                _ => None,
            })
            .collect()
    }

    #[test]
    fn a_free_slot_is_offered_first_to_who_was_turned_away() {
        let mut swarm = seed(&[1, 2, 3, 4]);
        assert_eq!(asks(&mut swarm, 1, 10), [Action::Serve { upload: UploadId(10) }]);
        assert_eq!(asks(&mut swarm, 2, 11), [Action::Serve { upload: UploadId(11) }]);
        assert_eq!(asks(&mut swarm, 4, 12), [Action::RefuseBusy { upload: UploadId(12) }]);
        assert_eq!(asks(&mut swarm, 3, 13), [Action::RefuseBusy { upload: UploadId(13) }]);
        assert_eq!(offers_after(&mut swarm, 10), [4], "one slot is free, and 4 was refused first");
        assert_eq!(offers_after(&mut swarm, 11), [3, 1], "then those that lack something");
        assert_eq!(offers_after(&mut swarm, 11), Vec::<u64>::new(), "it ended before");
    }

    #[test]
    fn with_most_slots_in_use_only_who_was_turned_away_is_offered_another() {
        let config = Config { upload_slots: 4, offers_until: 2, ..Config::default() };
        let mut swarm = seed_with(config, &[1, 2, 3, 4, 5, 6]);
        for peer in 1..=4 {
            assert_eq!(asks(&mut swarm, peer, peer).len(), 1);
        }
        assert_eq!(asks(&mut swarm, 5, 5), [Action::RefuseBusy { upload: UploadId(5) }]);
        assert_eq!(offers_after(&mut swarm, 1), [5], "three are in use, but it was turned away");
        assert_eq!(offers_after(&mut swarm, 2), Vec::<u64>::new(), "two are in use: enough");
        assert_eq!(offers_after(&mut swarm, 3).len(), 1, "one is in use");
    }

    /// Whether a peer that asks for the piece of the upload's number is served.
    fn is_served(swarm: &mut Swarm, ms: u64, peer: u64, upload: u64) -> bool {
        let (piece, upload, peer) = (PieceIndex(upload as u32), UploadId(upload), PeerKey(peer));
        let now = Time(0) + Duration::from_millis(ms);
        swarm.handle(now, Event::UploadAsked { upload, peer, swarm: SWARM, piece });
        let first = swarm.poll_action();
        while swarm.poll_action().is_some() {}
        first == Some(Action::Serve { upload })
    }

    fn ends(swarm: &mut Swarm, ms: u64, upload: u64, whole: bool) {
        let now = Time(0) + Duration::from_millis(ms);
        swarm.handle(now, Event::UploadEnded { upload: UploadId(upload), whole });
        while swarm.poll_action().is_some() {}
    }

    #[test]
    fn who_asks_and_does_not_read_holds_up_nobody() {
        let config = Config { upload_slots: 2, uploads_stuck_max: 3, ..Config::default() };
        let mut swarm = seed_with(config, &[1, 2, 3, 4]);
        let swarm = &mut swarm;
        assert!(is_served(swarm, 0, 1, 10) && is_served(swarm, 0, 1, 11));
        assert!(!is_served(swarm, 4_900, 2, 20), "pieces may take that long here");
        assert!(!is_served(swarm, 5_100, 1, 12), "it has some");
        assert!(is_served(swarm, 5_100, 2, 20), "another one may get on");
        assert!(!is_served(swarm, 5_100, 3, 30), "one is enough to see that");
        ends(swarm, 5_120, 20, true);
        assert!(is_served(swarm, 5_120, 2, 21) && is_served(swarm, 5_120, 3, 31));
        assert!(!is_served(swarm, 5_120, 4, 40), "both slots are in use");
        ends(swarm, 5_140, 21, true);
        assert!(is_served(swarm, 5_140, 4, 41));
        // Those two hang as well, and it is known by now what a piece takes.
        assert!(!is_served(swarm, 6_000, 2, 22));
        assert!(is_served(swarm, 6_200, 2, 22));
        assert!(!is_served(swarm, 9_000, 1, 13), "five are under way: as many as there may be");
        ends(swarm, 9_000, 22, true);
        assert!(is_served(swarm, 9_000, 2, 23));
    }

    #[test]
    fn uploads_that_are_all_slow_keep_their_slots() {
        let mut swarm = seed(&[1, 2, 3, 4]);
        let swarm = &mut swarm;
        assert!(is_served(swarm, 0, 1, 10) && is_served(swarm, 10, 2, 11));
        ends(swarm, 20, 10, true);
        // What takes 20 ms takes 2 s from now on: nobody is overtaken but by who gave up.
        assert!(is_served(swarm, 20, 1, 12));
        assert!(!is_served(swarm, 900, 3, 30));
        ends(swarm, 1_800, 11, true);
        assert!(is_served(swarm, 1_800, 3, 31) && !is_served(swarm, 1_800, 4, 40));
        ends(swarm, 1_900, 31, false);
        assert!(is_served(swarm, 1_900, 4, 41) && !is_served(swarm, 2_800, 3, 32));
    }

    #[test]
    fn a_lone_seed_gives_one_piece_again_at_a_time() {
        let config = Config { upload_slots: 8, ..Config::default() };
        let mut swarm = seed_with(config, &[1, 2, 3, 4]);
        let mut now = Time(4);
        let asks = |swarm: &mut Swarm, now: Time, upload: u64, peer: u64, piece: u32| {
            let (upload, peer) = (UploadId(upload), PeerKey(peer));
            let piece = PieceIndex(piece);
            swarm.handle(now, Event::UploadAsked { upload, peer, swarm: SWARM, piece });
            let first = swarm.poll_action();
            while swarm.poll_action().is_some() {}
            first == Some(Action::Serve { upload })
        };
        assert!(
            asks(&mut swarm, now, 10, 1, 0)
                && asks(&mut swarm, now, 11, 1, 1)
                && asks(&mut swarm, now, 12, 2, 2)
        );
        now = now + Duration::from_secs(10);
        assert!(
            asks(&mut swarm, now, 13, 3, 0),
            "all know who has it, and it is asked here all the same"
        );
        assert!(!asks(&mut swarm, now, 14, 4, 1), "another one has it too");
        assert!(asks(&mut swarm, now, 15, 4, 3), "nobody else has it");
        swarm.handle(now, Event::PeerDown { peer: PeerKey(1) });
        while swarm.poll_action().is_some() {}
        assert!(asks(&mut swarm, now, 16, 4, 1), "who had it has left");
    }

    #[test]
    fn a_lone_seed_gives_nothing_again_while_it_is_asked_for_what_nobody_was_given() {
        let mut swarm = seed_with(Config::default(), &[1, 2, 3, 4]);
        let mut upload = 0;
        let mut asks = |swarm: &mut Swarm, seconds: u64, peer: u64, piece: u32| {
            upload += 1;
            let (upload, peer, piece) = (UploadId(upload), PeerKey(peer), PieceIndex(piece));
            let now = Time(0) + Duration::from_secs(seconds);
            swarm.handle(now, Event::UploadAsked { upload, peer, swarm: SWARM, piece });
            let first = swarm.poll_action();
            swarm.handle(now, Event::UploadEnded { upload, whole: true });
            while swarm.poll_action().is_some() {}
            first == Some(Action::Serve { upload })
        };
        assert!(asks(&mut swarm, 1, 1, 0));
        assert!(!asks(&mut swarm, 2, 1, 0), "99 others were given to nobody");
        assert!(asks(&mut swarm, 4, 2, 1));
        assert!(!asks(&mut swarm, 7, 1, 0), "one of them was, three seconds ago");
        assert!(asks(&mut swarm, 9, 1, 0), "nobody has asked for one of them for longer");
        assert!(asks(&mut swarm, 10, 1, 0), "and what is given again changes nothing of that");
        for piece in 2..100 {
            assert!(asks(&mut swarm, 20, 3, piece));
        }
        assert!(asks(&mut swarm, 20, 1, 0), "all were given to somebody");
    }

    #[test]
    fn who_is_complete_first_does_not_end_the_care_of_a_lone_seed() {
        let mut swarm = seed_with(Config { upload_slots: 8, ..Config::default() }, &[1, 2, 3, 4]);
        let completes = |swarm: &mut Swarm, peer: u64| {
            let have = Arc::new(Bitmap::full(100));
            swarm.handle(Time(4), Event::PeerJoined { peer: PeerKey(peer), swarm: SWARM, have });
            while swarm.poll_action().is_some() {}
        };
        asks(&mut swarm, 1, 10);
        completes(&mut swarm, 1);
        let asks_again = |swarm: &mut Swarm, upload: u64| {
            let (upload, peer) = (UploadId(upload), PeerKey(3));
            let piece = PieceIndex(10);
            swarm.handle(Time(4), Event::UploadAsked { upload, peer, swarm: SWARM, piece });
            swarm.poll_action() == Some(Action::Serve { upload })
        };
        assert!(!asks_again(&mut swarm, 20), "1 has it, and is one of four");
        while swarm.poll_action().is_some() {}
        completes(&mut swarm, 2);
        assert!(asks_again(&mut swarm, 21), "half of them hold everything");
    }

    #[test]
    fn who_was_turned_away_by_all_asks_again_though_nobody_offers() {
        let config = Config::default();
        let asks_max = config.asks_max;
        let mut swarm = Swarm::new(config, 7);
        let purpose =
            Purpose::Fetch { priority: 0, piece_bytes: 1 << 20, may_lease: false, fleet: 1_000 };
        let have = Bitmap::empty(100);
        swarm.handle(Time(1), Event::Start { swarm: SWARM, pieces: 100, have, purpose });
        for peer in (0..40).map(PeerKey) {
            swarm.handle(Time(2), Event::PeerUp { peer, same_zone: true });
            let have = Arc::new(Bitmap::full(100));
            swarm.handle(Time(3), Event::PeerJoined { peer, swarm: SWARM, have });
        }
        let mut now = Time(4);
        // All that is asked is refused; who was asked.
        let refuse = |swarm: &mut Swarm, now: Time| {
            let mut asked = BTreeSet::new();
            while let Some(action) = swarm.poll_action() {
                if let Action::Fetch { request, peer, .. } = action {
                    asked.insert(peer.0);
                    let outcome = Outcome::Busy;
                    swarm.handle(now, Event::FetchEnded { request, outcome });
                }
            }
            asked
        };
        assert_eq!(refuse(&mut swarm, now).len(), asks_max, "then it waits for offers");
        let mut again = 0;
        while let Some(next) = swarm.next_timeout().filter(|next| next.0 < 1_000_000_000) {
            now = next;
            swarm.handle(now, Event::Timeout);
            again += refuse(&mut swarm, now).len();
        }
        assert!(again > asks_max, "asked {again} more, though all have rested");
    }

    #[test]
    fn slots_are_offered_in_turn_to_neighbours_of_our_zone_that_lack_something() {
        let mut swarm = seed(&[1, 2, 3, 101]);
        let have = Arc::new(Bitmap::full(100));
        swarm.handle(Time(3), Event::PeerJoined { peer: PeerKey(2), swarm: SWARM, have });
        let mut offered = Vec::new();
        for upload in 10..14 {
            asks(&mut swarm, 101, upload);
            offered.extend(offers_after(&mut swarm, upload));
        }
        assert_eq!(offered, [1, 3, 1, 3, 1, 3, 1, 3], "2 has all, 101 is far");
    }
}
