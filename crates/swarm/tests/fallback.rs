//! One machine without region processes: when it reads the bucket by itself, and when it does not.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use shoal_proto::{Bitmap, PieceIndex};
use shoal_swarm::{
    Action, Config, Event, Outcome, PeerKey, Purpose, RequestId, Swarm, SwarmKey, Time,
};

const SWARM: SwarmKey = SwarmKey(1);

/// A machine, and the world around it.
struct Lone {
    swarm: Swarm,
    now: Time,
    /// Requests to neighbours that were not answered.
    open: Vec<(RequestId, u32)>,
    /// Every piece that was to be read from the bucket, and when.
    reads: Vec<(u64, u32)>,
}

impl Lone {
    /// It asks for leases in vain, and has neighbours that all hold the first `held` pieces.
    fn new(pieces: u32, neighbours: u64, held: u32, fleet: u32, seed: u64) -> Self {
        let swarm = Swarm::new(Config::default(), seed);
        let mut lone = Self { swarm, now: Time::ZERO, open: vec![], reads: vec![] };
        let purpose = Purpose::Fetch { priority: 0, piece_bytes: 1 << 20, may_lease: true, fleet };
        let have = Bitmap::empty(pieces);
        lone.swarm.handle(lone.now, Event::Start { swarm: SWARM, pieces, have, purpose });
        let mut have = Bitmap::empty(pieces);
        (0..held).for_each(|piece| {
            have.insert(piece);
        });
        for peer in (0..neighbours).map(PeerKey) {
            lone.swarm.handle(lone.now, Event::PeerUp { peer, same_zone: true });
            let have = have.clone().into();
            lone.swarm.handle(lone.now, Event::PeerJoined { peer, swarm: SWARM, have });
        }
        lone
    }

    fn held(&self) -> u32 {
        self.swarm.progress(SWARM).unwrap().held
    }

    /// Time passes; nobody answers for leases, and the bucket answers at once, as `bucket` has it.
    fn run(&mut self, for_s: u64, bucket: impl Fn(u32) -> Outcome) {
        let until = self.now + Duration::from_secs(for_s);
        loop {
            let mut events = Vec::new();
            while let Some(action) = self.swarm.poll_action() {
                match action {
                    Action::Fetch { request, piece, .. } => self.open.push((request, piece.0)),
                    Action::CancelFetch { request } => {
                        self.open.retain(|(open, _)| *open != request);
                    }
                    Action::AskLease { swarm, block, .. } => {
                        events.push(Event::LeaseFailed { swarm, block });
                    }
                    Action::FetchOrigin { swarm, first, count } => {
                        for piece in first..first + count {
                            self.reads.push((self.now.0 / 1_000_000_000, piece));
                            let (outcome, piece) = (bucket(piece), PieceIndex(piece));
                            events.push(Event::OriginEnded { swarm, piece, outcome });
                        }
                    }
                    _ => {}
                }
            }
            if !events.is_empty() {
                self.now = self.now + Duration::from_millis(5);
                events.into_iter().for_each(|event| self.swarm.handle(self.now, event));
                continue;
            }
            match self.swarm.next_timeout().filter(|at| *at <= until) {
                Some(at) => {
                    self.now = self.now.max(at);
                    self.swarm.handle(self.now, Event::Timeout);
                }
                None => break,
            }
        }
        self.now = self.now.max(until);
        self.swarm.check_invariants().unwrap();
    }

    /// Everything that neighbours were asked for arrives.
    fn deliver(&mut self) {
        for (request, _) in std::mem::take(&mut self.open) {
            let outcome = Outcome::Verified;
            self.swarm.handle(self.now, Event::FetchEnded { request, outcome });
        }
    }
}

#[test]
fn a_slow_line_is_no_reason_to_read_what_neighbours_hold() {
    for seed in 0..8 {
        // A tenth of the usual rate: eight pieces at once, every 10 s. Ten more pieces are nowhere.
        let mut lone = Lone::new(200, 6, 190, 4, seed);
        for _ in 0..60 {
            lone.run(10, |_| Outcome::Verified);
            lone.deliver();
        }
        assert_eq!(lone.held(), 200, "seed {seed}");
        let theirs: Vec<_> = lone.reads.iter().filter(|(_, piece)| *piece < 190).collect();
        assert!(theirs.is_empty(), "seed {seed}: read what neighbours hold: {theirs:?}");
        assert_eq!(lone.reads.len(), 10, "seed {seed}: {:?}", lone.reads);
    }
}

#[test]
fn what_neighbours_hold_and_never_give_is_read_in_the_end() {
    for seed in 0..8 {
        let give_up = Config::default().give_up_max.as_secs();
        // One piece is nowhere: so it learns that the region processes are silent.
        let mut lone = Lone::new(60, 6, 59, 100_000, seed);
        lone.run(give_up - 1, |_| Outcome::Verified);
        assert!(lone.reads.iter().all(|(_, piece)| *piece == 59), "seed {seed}: {:?}", lone.reads);
        lone.run(2 * give_up, |_| Outcome::Verified);
        assert_eq!(lone.held(), 60, "seed {seed}: {:?}", lone.swarm.progress(SWARM));
        // Not at once: a hundred thousand machines may find so at the same time.
        let early = lone.reads.iter().filter(|(at, _)| *at < give_up + 10).count();
        assert!(early <= 5, "seed {seed}: {:?}", lone.reads);
    }
}

#[test]
fn a_bucket_that_failed_for_minutes_is_not_stormed() {
    for seed in 0..8 {
        let mut lone = Lone::new(600, 0, 0, 1_000, seed);
        lone.run(150, |_| Outcome::Failed);
        assert_eq!(lone.held(), 0);
        while lone.held() == 0 {
            lone.run(1, |_| Outcome::Verified);
        }
        // Others would have been heard of by now: at once it reads a part of what only 256 machines try.
        assert!(lone.held() <= 150, "seed {seed}: read {} of 600", lone.held());
    }
}

#[test]
fn one_piece_that_always_fails_holds_up_no_other() {
    for seed in 0..8 {
        let mut lone = Lone::new(60, 0, 0, 16, seed);
        let bucket = |piece| if piece % 30 == 7 { Outcome::Failed } else { Outcome::Verified };
        lone.run(900, bucket);
        assert_eq!(lone.held(), 58, "seed {seed}");
    }
}
