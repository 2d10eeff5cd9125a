//! One machine that fetches an urgent artifact and another from the bucket: the other takes nothing but one read.
#![allow(clippy::unwrap_used)]

use std::{sync::Arc, time::Duration};

use shoal_proto::{Bitmap, PieceIndex};
use shoal_swarm::{
    Action, Config, Event, Outcome, PeerKey, Purpose, RequestId, Swarm, SwarmKey, Time,
};

const LESSER: SwarmKey = SwarmKey(1);
const URGENT: SwarmKey = SwarmKey(2);
const PIECES: u32 = 640;

/// A machine whose leases are granted at once, and whose reads last until they are ended.
struct Machine {
    swarm: Swarm,
    now: Time,
    open: Vec<(SwarmKey, u32)>,
    /// Requests to neighbours.
    requests: Vec<RequestId>,
    asked: Vec<SwarmKey>,
}

impl Machine {
    fn new(leased_max: u32) -> Self {
        let config = Config { origin_reads_max: 4, leased_max, ..Config::default() };
        let swarm = Swarm::new(config, 7);
        Self { swarm, now: Time(1), open: vec![], requests: vec![], asked: vec![] }
    }

    fn fetch(&mut self, swarm: SwarmKey, priority: u8, may_lease: bool) {
        let purpose = Purpose::Fetch { priority, piece_bytes: 1 << 20, may_lease, fleet: 1 };
        let have = Bitmap::empty(PIECES);
        self.tell(Event::Start { swarm, pieces: PIECES, have, purpose });
    }

    fn tell(&mut self, event: Event) {
        let mut events = vec![event];
        while let Some(event) = events.pop() {
            self.swarm.handle(self.now, event);
            while let Some(action) = self.swarm.poll_action() {
                match action {
                    Action::AskLease { swarm, block, lacking, .. } => {
                        self.asked.push(swarm);
                        let first = block * u64::BITS + lacking.trailing_zeros();
                        let duration = Duration::from_secs(60);
                        events.push(Event::LeaseGranted {
                            swarm,
                            block,
                            first,
                            count: 1,
                            duration,
                        });
                    }
                    Action::FetchOrigin { swarm, first, count } => {
                        self.open.extend((first..first + count).map(|piece| (swarm, piece)));
                    }
                    Action::Fetch { request, .. } => self.requests.push(request),
                    _ => {}
                }
            }
        }
        self.swarm.check_invariants().unwrap();
    }

    fn reads(&self, of: SwarmKey) -> usize {
        self.open.iter().filter(|(swarm, _)| *swarm == of).count()
    }

    /// The oldest read of a swarm ends well, a little later.
    fn end_one(&mut self, of: SwarmKey) {
        self.now = self.now + Duration::from_millis(5);
        let at = self.open.iter().position(|(swarm, _)| *swarm == of).unwrap();
        let (swarm, piece) = self.open.remove(at);
        let (piece, outcome) = (PieceIndex(piece), Outcome::Verified);
        self.tell(Event::OriginEnded { swarm, piece, outcome });
    }
}

/// Beside an urgent fetch that gains another reads and leases one piece, whatever it leased before.
fn one_at_a_time(leased_max: u32) {
    let mut machine = Machine::new(leased_max);
    machine.fetch(LESSER, 0, true);
    let before = machine.reads(LESSER);
    assert!(before > 1, "{before} reads while nothing else is fetched");
    machine.fetch(URGENT, 9, true);
    (1..before).for_each(|_| machine.end_one(LESSER));
    machine.asked.clear();
    for round in 0..50 {
        machine.end_one(URGENT);
        assert_eq!(machine.reads(LESSER), 1, "reads in round {round}");
    }
    assert!(machine.reads(URGENT) > 1, "the urgent one has the room");
    assert!(machine.asked.iter().all(|swarm| *swarm == URGENT), "nothing more is leased");
    machine.end_one(LESSER);
    for round in 0..50 {
        machine.end_one(URGENT);
        assert!(machine.reads(LESSER) <= 1, "one after the other, round {round}");
    }
    let asked = machine.asked.iter().filter(|swarm| **swarm == LESSER).count();
    assert!(asked <= 1, "{asked} leases asked for");
    while machine.reads(URGENT) > 0 {
        machine.end_one(URGENT);
    }
    assert!(machine.reads(LESSER) > 1, "the room is the other's again");
}

#[test]
fn an_urgent_fetch_gets_what_another_leased_before() {
    one_at_a_time(32);
}

#[test]
fn beside_an_urgent_fetch_another_reads_one_piece_of_many_that_it_leased() {
    one_at_a_time(800);
}

/// A neighbour begins to feed an urgent fetch, and all but one of the lesser one's reads end.
fn feed(machine: &mut Machine) {
    let before = machine.reads(LESSER);
    assert!(before > 1, "{before} reads while nothing else is fetched");
    machine.fetch(URGENT, 9, false);
    let peer = PeerKey(1);
    machine.tell(Event::PeerUp { peer, same_zone: true });
    let have = Arc::new(Bitmap::full(PIECES));
    machine.tell(Event::PeerJoined { peer, swarm: URGENT, have });
    (1..before).for_each(|_| machine.end_one(LESSER));
}

/// The neighbour gives one piece.
fn gain(machine: &mut Machine) {
    machine.now = machine.now + Duration::from_millis(5);
    let request = machine.requests.remove(0);
    machine.tell(Event::FetchEnded { request, outcome: Outcome::Verified });
}

#[test]
fn beside_an_urgent_fetch_that_neighbours_feed_another_reads_one_piece() {
    let mut machine = Machine::new(800);
    machine.fetch(LESSER, 0, true);
    feed(&mut machine);
    for round in 0..50 {
        gain(&mut machine);
        assert_eq!(machine.reads(LESSER), 1, "reads in round {round}");
    }
}

#[test]
fn beside_an_urgent_fetch_one_that_reads_by_nobodys_leave_reads_one_piece() {
    let mut machine = Machine::new(800);
    machine.fetch(LESSER, 0, false);
    while machine.reads(LESSER) == 0 {
        machine.now = machine.swarm.next_timeout().unwrap();
        machine.tell(Event::Timeout);
    }
    feed(&mut machine);
    for round in 0..50 {
        gain(&mut machine);
        assert_eq!(machine.reads(LESSER), 1, "reads in round {round}");
        machine.end_one(LESSER);
        assert_eq!(machine.reads(LESSER), 1, "one after the other, round {round}");
    }
}
