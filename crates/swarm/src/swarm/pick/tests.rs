use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    vec::Vec,
};

use shoal_proto::Bitmap;

use super::*;
use crate::{
    config::Config,
    event::{Event, Outcome, Purpose},
};

const PIECES: u32 = 4_000;

/// A machine that fetches from forty that have everything, each piece in the order in which it was asked for.
struct Fetches {
    swarm: Swarm,
    asked: VecDeque<(RequestId, SwarmKey)>,
    piece_bytes: BTreeMap<SwarmKey, u64>,
    gained: BTreeMap<SwarmKey, u64>,
}

impl Fetches {
    fn new() -> Self {
        Self::from(40)
    }

    /// From fewer.
    fn from(peers: u64) -> Self {
        let mut swarm = Swarm::new(Config::default(), 7);
        for peer in (0..peers).map(PeerKey) {
            swarm.handle(Time(1), Event::PeerUp { peer, same_zone: true });
        }
        Self {
            swarm,
            asked: VecDeque::new(),
            piece_bytes: BTreeMap::new(),
            gained: BTreeMap::new(),
        }
    }

    fn start(&mut self, key: u64, piece_bytes: u64, priority: u8) {
        self.start_where(key, piece_bytes, priority, PIECES);
    }

    /// Its neighbours hold so many pieces of it.
    fn start_where(&mut self, key: u64, piece_bytes: u64, priority: u8, held: u32) {
        let (swarm, have) = (SwarmKey(key), Bitmap::empty(PIECES));
        self.piece_bytes.insert(swarm, piece_bytes);
        let purpose = Purpose::Fetch { priority, piece_bytes, may_lease: false, fleet: 1_000 };
        self.swarm.handle(Time(2), Event::Start { swarm, pieces: PIECES, have, purpose });
        for peer in (0..40).map(PeerKey) {
            let mut have = Bitmap::empty(PIECES);
            (0..held).for_each(|piece| _ = have.insert(piece));
            let have = Arc::new(have);
            self.swarm.handle(Time(3), Event::PeerJoined { peer, swarm, have });
        }
    }

    /// How many pieces of a swarm are asked for and on their way.
    fn under_way(&mut self, key: u64) -> usize {
        while let Some(action) = self.swarm.poll_action() {
            if let Action::Fetch { request, swarm, .. } = action {
                self.asked.push_back((request, swarm));
            }
        }
        self.asked.iter().filter(|(_, swarm)| *swarm == SwarmKey(key)).count()
    }

    /// The oldest request of a swarm ends well.
    fn comes(&mut self, now: Time, key: u64) {
        let at = self.asked.iter().position(|(_, swarm)| *swarm == SwarmKey(key));
        let (request, _) = at.and_then(|at| self.asked.remove(at)).expect("it was asked for");
        self.swarm.handle(now, Event::FetchEnded { request, outcome: Outcome::Verified });
    }

    /// What each swarm gained of the next so many bytes.
    fn gain(&mut self, bytes: u64) -> Vec<u64> {
        self.gained = self.piece_bytes.keys().map(|swarm| (*swarm, 0)).collect();
        let mut now = Time(4);
        while self.gained.values().sum::<u64>() < bytes {
            while let Some(action) = self.swarm.poll_action() {
                if let Action::Fetch { request, swarm, .. } = action {
                    self.asked.push_back((request, swarm));
                }
            }
            let (request, swarm) = self.asked.pop_front().expect("it asks for something");
            *self.gained.entry(swarm).or_default() += self.piece_bytes[&swarm];
            now = now + Duration::from_millis(1);
            let outcome = Outcome::Verified;
            self.swarm.handle(now, Event::FetchEnded { request, outcome });
        }
        self.gained.values().copied().collect()
    }
}

#[test]
fn fetches_of_one_priority_share_by_bytes_whatever_their_pieces() {
    const MIB: u64 = 1 << 20;
    let mut fetches = Fetches::new();
    fetches.start(1, 4 << 20, 0);
    assert_eq!(fetches.gain(400 * MIB), [400 * MIB]);
    // Another one neither waits for what the first has, nor takes all until it has as much.
    fetches.start(2, 1 << 20, 0);
    // At the start all that is on its way is the first one's.
    fetches.gain(40 * MIB);
    let even = |shares: &[u64], each: u64| shares.iter().all(|own| own.abs_diff(each) < 48 * MIB);
    let shares = fetches.gain(400 * MIB);
    assert!(even(&shares, 200 * MIB), "{shares:?}");
    fetches.start(3, 1 << 20, 0);
    let shares = fetches.gain(600 * MIB);
    assert!(even(&shares, 200 * MIB), "{shares:?}");
    // A higher one comes before all, once what was asked for has come.
    fetches.start(4, 4 << 20, 1);
    fetches.gain(40 * MIB);
    assert_eq!(fetches.gain(200 * MIB)[3], 200 * MIB);
}

#[test]
fn a_neighbour_is_asked_for_a_second_piece_only_where_there_are_few() {
    let each = |peers| {
        let mut fetches = Fetches::from(peers);
        fetches.start(1, 1 << 20, 0);
        // Measured ones, too: who is fast gets no second request.
        for ms in 0..100 {
            fetches.under_way(1);
            fetches.comes(Time(4) + Duration::from_millis(ms), 1);
        }
        let total = fetches.under_way(1);
        let each = (0..peers).map(|peer| {
            let place = fetches.swarm.peers.find(PeerKey(peer));
            place.and_then(|place| fetches.swarm.peers.get(place)).map(|peer| peer.requests)
        });
        (total, each.flatten().max())
    };
    assert_eq!(each(1), (2, Some(2)));
    assert_eq!(each(4), (8, Some(2)));
    assert_eq!(each(5), (5, Some(1)));
    assert_eq!(each(20), (8, Some(1)));
}

#[test]
fn what_an_asked_neighbour_of_the_zone_holds_is_not_fetched_from_another() {
    let mut fetches = Fetches::from(5);
    let far = PeerKey(99);
    fetches.swarm.handle(Time(1), Event::PeerUp { peer: far, same_zone: false });
    fetches.start(1, 1 << 20, 0);
    // The first ones were asked for two pieces each: there were few of them.
    for ms in 0..100 {
        fetches.under_way(1);
        fetches.comes(Time(4) + Duration::from_millis(ms), 1);
    }
    assert_eq!(fetches.under_way(1), 5, "one from each of the zone");
    let (swarm, have) = (SwarmKey(1), Arc::new(Bitmap::full(PIECES)));
    let now = Time(4) + Duration::from_millis(100);
    fetches.swarm.handle(now, Event::PeerJoined { peer: far, swarm, have });
    assert_eq!(fetches.under_way(1), 5);
}

#[test]
fn a_fetch_has_one_piece_on_its_way_while_a_more_urgent_one_gains() {
    let mut fetches = Fetches::new();
    fetches.start_where(1, 1 << 20, 1, 20);
    fetches.start(2, 1 << 20, 0);
    let urgent = fetches.under_way(1);
    assert!(urgent > 4, "{urgent} of the urgent one");
    // What its neighbours have of it comes, piece after piece; then it waits for more.
    let mut now = Time(10);
    for _ in 0..20 {
        now = now + Duration::from_millis(10);
        fetches.comes(now, 1);
        assert!(fetches.under_way(2) <= 1, "at {now}");
    }
    assert_eq!((fetches.under_way(1), fetches.under_way(2)), (0, 1));
    for _ in 0..5 {
        now = now + Duration::from_millis(10);
        fetches.comes(now, 2);
        assert_eq!(fetches.under_way(2), 1, "at {now}");
    }
    // It gains nothing for long: the line is the other's.
    now = now + Duration::from_secs(10);
    fetches.comes(now, 2);
    assert!(fetches.under_way(2) > 4);
}
