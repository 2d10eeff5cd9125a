//! One machine beside neighbours that say they hold everything and do not answer.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use shoal_proto::Bitmap;
use shoal_swarm::{
    Action, Config, Event, Outcome, PeerKey, Purpose, RequestId, Swarm, SwarmKey, Time,
};

const SWARM: SwarmKey = SwarmKey(1);
const PIECES: u32 = 40;

struct Machine {
    swarm: Swarm,
    now: Time,
    asked: Vec<(RequestId, PeerKey)>,
    /// The pieces of each question for a lease.
    leases: Vec<u64>,
}

impl Machine {
    /// It may lease, and these neighbours hold everything.
    fn new(neighbours: u64, seed: u64) -> Self {
        let swarm = Swarm::new(Config::default(), seed);
        let mut machine = Self { swarm, now: Time(1), asked: vec![], leases: vec![] };
        let purpose =
            Purpose::Fetch { priority: 0, piece_bytes: 1 << 20, may_lease: true, fleet: 8 };
        let have = Bitmap::empty(PIECES);
        machine.tell(Event::Start { swarm: SWARM, pieces: PIECES, have, purpose });
        for peer in (0..neighbours).map(PeerKey) {
            machine.tell(Event::PeerUp { peer, same_zone: true });
            let have = Bitmap::full(PIECES).into();
            machine.tell(Event::PeerJoined { peer, swarm: SWARM, have });
        }
        machine.deny();
        machine
    }

    /// No lease now: ask again soon.
    fn deny(&mut self) {
        let (block, retry) = (0, Some(Duration::from_millis(1)));
        for _ in std::mem::take(&mut self.leases) {
            self.tell(Event::LeaseDenied { swarm: SWARM, block, retry, all_blocks: false });
        }
    }

    fn tell(&mut self, event: Event) {
        self.swarm.handle(self.now, event);
        while let Some(action) = self.swarm.poll_action() {
            match action {
                Action::Fetch { request, peer, .. } => self.asked.push((request, peer)),
                Action::CancelFetch { request } => self.asked.retain(|(open, _)| *open != request),
                Action::AskLease { block: 0, lacking, .. } => self.leases.push(lacking),
                _ => {}
            }
        }
        self.swarm.check_invariants().unwrap();
    }

    /// Time passes and nobody says anything.
    fn wait(&mut self, time: Duration) {
        let until = self.now + time;
        while let Some(at) = self.swarm.next_timeout().filter(|at| *at <= until) {
            self.now = at;
            self.tell(Event::Timeout);
        }
        self.now = until;
    }

    fn answer(&mut self, peer: PeerKey, outcome: Outcome) {
        let at = self.asked.iter().position(|(_, asked)| *asked == peer).unwrap();
        let (request, _) = self.asked.remove(at);
        self.tell(Event::FetchEnded { request, outcome });
    }
}

#[test]
fn what_only_silent_neighbours_hold_is_leased() {
    let late = Config::default().late_first;
    for seed in 0..8 {
        let mut machine = Machine::new(2, seed);
        machine.wait(late - Duration::from_millis(1));
        assert_eq!(machine.leases, Vec::<u64>::new(), "seed {seed}: they may yet deliver");
        machine.wait(Duration::from_millis(2));
        // All but what they were asked for.
        let lacking = machine.leases.first().copied().unwrap_or(0);
        assert!(lacking.count_ones() >= PIECES - 4, "seed {seed}: {lacking:x}");
    }
}

#[test]
fn a_neighbour_that_answers_again_is_believed_again() {
    let late = Config::default().late_first;
    for (seed, outcome) in [(1, Outcome::Verified), (2, Outcome::Busy)] {
        let mut machine = Machine::new(1, seed);
        machine.wait(late - Duration::from_millis(1));
        machine.answer(PeerKey(0), outcome);
        let answered = machine.leases.len();
        assert_eq!(answered, 0, "seed {seed}");
        // It is late with the other piece, but has shown that it delivers or at least that it lives.
        machine.wait(Duration::from_millis(2));
        machine.answer(PeerKey(0), outcome);
        machine.deny();
        machine.wait(Duration::from_millis(100));
        let lacking = machine.leases.iter().fold(0, |all, lacking| all | lacking);
        assert!(lacking.count_ones() <= 2, "seed {seed}: {lacking:x}");
    }
}
