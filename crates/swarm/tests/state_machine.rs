//! Any events in any order, with handles that are known, stale, doubled or made up: the policy never
//! panics, and after each event its invariants hold and its answers keep to the rules.
#![allow(clippy::unwrap_used)]

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use proptest::prelude::*;
use shoal_proto::{Bitmap, PieceIndex};
use shoal_swarm::{
    Action, Config, Event, Outcome, PeerKey, Purpose, RequestId, Swarm, SwarmKey, Time, UploadId,
};

/// One step: which event, with numbers that choose among what there is.
#[derive(Debug, Clone)]
struct Step {
    kind: u8,
    a: u32,
    b: u32,
    c: u32,
    /// Nanoseconds that pass before it.
    wait: u64,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let wait = prop_oneof![
        4 => Just(0u64),
        4 => 0..5_000_000u64,
        2 => 0..3_000_000_000u64,
        1 => 0..200_000_000_000u64,
    ];
    let step = (0..28u8, 0..6u32, any::<u32>(), any::<u32>(), wait)
        .prop_map(|(kind, a, b, c, wait)| Step { kind, a, b, c, wait });
    prop::collection::vec(step, 1..400)
}

/// The other side of the policy: what it was told and has asked for.
#[derive(Default)]
struct Driver {
    requests: BTreeMap<RequestId, (PeerKey, SwarmKey, u32)>,
    /// Requests that ended or were cancelled: stale handles.
    stale: Vec<RequestId>,
    uploads: BTreeMap<UploadId, bool>,
    next_upload: u64,
    asks: Vec<(SwarmKey, u32)>,
    reads: Vec<(SwarmKey, u32)>,
    held: BTreeMap<SwarmKey, BTreeSet<u32>>,
    up: BTreeSet<PeerKey>,
}

fn pieces_of(swarm: SwarmKey) -> u32 {
    [0, 1, 5, 64, 130, 7][swarm.0 as usize % 6]
}

fn bitmap(pieces: u32, pattern: u32) -> Bitmap {
    let mut map = Bitmap::empty(pieces);
    for piece in 0..pieces {
        // Full and empty ones often, any pattern else.
        let bit = match pattern % 4 {
            0 => true,
            1 => false,
            _ => (pattern.rotate_left(piece) ^ piece) & 1 == 1,
        };
        if bit {
            map.insert(piece);
        }
    }
    map
}

fn outcome(of: u32) -> Outcome {
    match of % 7 {
        0..=2 => Outcome::Verified,
        3 => Outcome::Corrupt,
        4 => Outcome::Busy,
        5 => Outcome::NotHere,
        _ => Outcome::Failed,
    }
}

impl Driver {
    fn event(&mut self, step: &Step) -> Event {
        let Step { kind, a, b, c, .. } = *step;
        let swarm = SwarmKey(u64::from(a));
        let peer = PeerKey(u64::from(b % 10));
        let pieces = pieces_of(swarm);
        let piece = PieceIndex(c % (pieces + 2));
        match kind {
            0 | 1 => {
                let have = bitmap(pieces + u32::from(c % 17 == 16), b);
                let fleet = [0, 1, 4, 1_000, 100_000][(c % 5) as usize];
                let purpose = match c % 9 {
                    0 => Purpose::Seed,
                    n => Purpose::Fetch {
                        priority: n as u8 / 3,
                        piece_bytes: 1 << 20,
                        may_lease: n % 2 == 0,
                        fleet,
                    },
                };
                Event::Start { swarm, pieces, have, purpose }
            }
            2 if b % 3 == 0 => {
                self.held.remove(&swarm);
                Event::Stop { swarm }
            }
            3..=5 => Event::PeerUp { peer, same_zone: c % 2 == 0 },
            6 => Event::PeerDown { peer },
            7..=9 => Event::PeerJoined {
                peer,
                swarm,
                have: bitmap(pieces + u32::from(c % 19 == 18), c).into(),
            },
            10..=12 => Event::PeerHave {
                peer,
                swarm,
                pieces: (0..c % 5)
                    .map(|at| PieceIndex(c.wrapping_add(at.wrapping_mul(b)) % (pieces + 2)))
                    .collect(),
            },
            13 => Event::PeerLeft { peer, swarm },
            14..=17 => {
                let live: Vec<_> = self.requests.keys().copied().collect();
                let request = match c % 12 {
                    0 => RequestId(u64::from(b)),
                    1 if !self.stale.is_empty() => self.stale[b as usize % self.stale.len()],
                    _ if live.is_empty() => RequestId(u64::from(b)),
                    _ => live[b as usize % live.len()],
                };
                let outcome = outcome(b);
                if let Some((_, swarm, piece)) = self.requests.remove(&request) {
                    self.stale.push(request);
                    if outcome == Outcome::Verified {
                        self.held.entry(swarm).or_default().insert(piece);
                    }
                }
                Event::FetchEnded { request, outcome }
            }
            18 | 19 => {
                // Now and then the same handle again.
                let upload = UploadId(self.next_upload.saturating_sub(u64::from(c % 8 == 0)));
                self.next_upload = upload.0 + 1;
                self.uploads.entry(upload).or_insert(false);
                Event::UploadAsked { upload, peer, swarm, piece }
            }
            20 => {
                let upload = UploadId(u64::from(b) % (self.next_upload + 2));
                self.uploads.insert(upload, true);
                Event::UploadEnded { upload, whole: c % 2 == 0 }
            }
            21..=23 => {
                let known = c % 8 != 0 && !self.asks.is_empty();
                let (swarm, block) = match known {
                    true => self.asks.swap_remove(b as usize % self.asks.len()),
                    false => (swarm, c % 4),
                };
                let duration = Duration::from_millis(u64::from(b % 40_000));
                match kind {
                    21 => {
                        let first = block * 64 + b % 70;
                        Event::LeaseGranted { swarm, block, first, count: c % 20, duration }
                    }
                    22 => {
                        let retry = (b % 2 == 0).then_some(duration);
                        Event::LeaseDenied { swarm, block, retry, all_blocks: c % 3 == 0 }
                    }
                    _ => Event::LeaseFailed { swarm, block },
                }
            }
            24 | 25 => {
                let known = c % 8 != 0 && !self.reads.is_empty();
                let (swarm, piece) = match known {
                    true => self.reads.swap_remove(b as usize % self.reads.len()),
                    false => (swarm, piece.0),
                };
                Event::OriginEnded { swarm, piece: PieceIndex(piece), outcome: outcome(b) }
            }
            _ => Event::Timeout,
        }
    }

    fn act(&mut self, policy: &Swarm, action: Action) {
        match action {
            Action::Fetch { request, peer, swarm, piece } => {
                assert!(self.up.contains(&peer), "asked a peer that is gone");
                assert!(!self.stale.contains(&request), "a handle given twice");
                assert!(self.requests.insert(request, (peer, swarm, piece.0)).is_none());
            }
            Action::CancelFetch { request } => {
                assert!(self.requests.remove(&request).is_some(), "cancelled what is over");
                self.stale.push(request);
            }
            Action::Serve { upload }
            | Action::RefuseBusy { upload }
            | Action::RefuseNotHere { upload } => {
                assert!(self.uploads.contains_key(&upload), "answered what nobody asked");
            }
            Action::AskLease { swarm, block, lacking, want } => {
                assert!(lacking != 0);
                assert!((1..=16).contains(&want) && block <= pieces_of(swarm) / 64);
                self.asks.push((swarm, block));
            }
            Action::FetchOrigin { swarm, first, count } => {
                assert!(count > 0 && first + count <= pieces_of(swarm));
                self.reads.extend((first..first + count).map(|piece| (swarm, piece)));
            }
            Action::LeaseDone { swarm, first, count, .. } => {
                assert!(count > 0 && first + count <= pieces_of(swarm));
            }
            Action::AnnounceHave { swarm, pieces, .. } => {
                assert!(!pieces.is_empty());
                let held = policy.held(swarm);
                let all = |held: &Bitmap| pieces.iter().all(|piece| held.contains(piece.0));
                assert!(held.is_none_or(all), "told what is not held");
            }
            Action::Completed { swarm } => {
                assert!(policy.held(swarm).is_none_or(Bitmap::is_full));
            }
            Action::Ban { peer } | Action::Offer { peer, .. } => assert!(self.up.contains(&peer)),
            Action::Announce { peer, .. } | Action::AnnounceLeave { peer, .. } => {
                assert!(self.up.contains(&peer), "spoke to a peer that is gone");
            }
            Action::WantPeers { want, .. } => assert!(want > 0),
        }
    }
}

fn config() -> Config {
    // Small bounds are reached often.
    Config {
        requests_wanted: 4,
        requests_max: 5,
        upload_slots: 2,
        have_batch: 4,
        neighbours_max: 6,
        peers_max: 8,
        leased_max: 12,
        ..Config::default()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn any_events_keep_the_invariants(steps in steps(), seed in any::<u64>()) {
        let (mut policy, mut driver) = (Swarm::new(config(), seed), Driver::default());
        let mut now = Time::ZERO;
        for step in &steps {
            now = now + Duration::from_nanos(step.wait);
            // Half of the time the driver keeps to the timeouts, as a real one does.
            while step.c % 2 == 0 && let Some(at) = policy.next_timeout().filter(|at| *at <= now) {
                policy.handle(at, Event::Timeout);
                while let Some(action) = policy.poll_action() {
                    driver.act(&policy, action);
                }
                prop_assert_eq!(policy.check_invariants(), Ok(()));
            }
            let event = driver.event(step);
            match &event {
                Event::PeerUp { peer, .. } if driver.up.len() < config().peers_max => {
                    driver.up.insert(*peer);
                }
                Event::PeerDown { peer } => {
                    driver.up.remove(peer);
                    let gone = driver.requests.extract_if(.., |_, (on, _, _)| on == peer);
                    driver.stale.extend(gone.map(|(request, _)| request));
                }
                _ => {}
            }
            policy.handle(now, event);
            while let Some(action) = policy.poll_action() {
                driver.act(&policy, action);
            }
            prop_assert_eq!(policy.check_invariants(), Ok(()));
            prop_assert!(policy.next_timeout().is_none_or(|at| at > now));
            prop_assert_eq!(policy.load().requests, driver.requests.len());
        }
    }

    #[test]
    fn a_healthy_driver_always_completes(pieces in 1..90u32, have in any::<u32>(), seed in any::<u64>()) {
        // One seed that answers every request, now well, now badly, and no bucket.
        let mut policy = Swarm::new(Config::default(), seed);
        let (swarm, peer) = (SwarmKey(1), PeerKey(1));
        let mut now = Time::ZERO;
        let purpose = Purpose::Fetch { priority: 0, piece_bytes: 1 << 20, may_lease: false, fleet: 1_000_000_000 };
        let have = bitmap(pieces, have);
        let mut events = vec![
            Event::PeerJoined { peer, swarm, have: Bitmap::full(pieces).into() },
            Event::PeerUp { peer, same_zone: true },
            Event::Start { swarm, pieces, have, purpose },
        ];
        let (mut completed, mut turn) = (false, seed);
        for _ in 0..20_000 {
            let event = events.pop().unwrap_or(Event::Timeout);
            if event == Event::Timeout {
                match policy.next_timeout() {
                    Some(at) => now = at,
                    None => break,
                }
            }
            policy.handle(now, event);
            while let Some(action) = policy.poll_action() {
                match action {
                    Action::Fetch { request, .. } => {
                        turn = turn.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                        let outcome = match turn >> 60 {
                            0 | 1 => Outcome::Busy,
                            2 => Outcome::Failed,
                            // Vanishes: the policy must give up by itself.
                            3 => continue,
                            _ => Outcome::Verified,
                        };
                        events.push(Event::FetchEnded { request, outcome });
                    }
                    Action::Completed { .. } => completed = true,
                    _ => {}
                }
            }
            if completed {
                break;
            }
        }
        prop_assert_eq!(policy.check_invariants(), Ok(()));
        prop_assert!(completed, "{:?} at {}", policy.progress(swarm), now);
    }
}
