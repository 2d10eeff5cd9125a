//! One seed with a slow line and a few machines with fast ones: the seed's line decides, so nothing may go over it twice.

#![allow(clippy::unwrap_used)]

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::Duration,
};

use shoal_proto::Bitmap;
use shoal_swarm::{
    Action, Config, Event, Outcome, PeerKey, Purpose, RequestId, Swarm, SwarmKey, Time, UploadId,
};

const SWARM: SwarmKey = SwarmKey(1);
const LATENCY: Duration = Duration::from_micros(300);

/// What waits for its time.
enum Due {
    Event(usize, Event),
    /// The machine's line is free.
    Sent(usize, UploadId),
    Wake(usize),
}

struct Machine {
    policy: Swarm,
    /// What a piece takes on its line.
    piece: Duration,
    /// What it sends one after the other; the first is on the line.
    queue: VecDeque<UploadId>,
}

/// Machines that all know each other, the first of which is the seed.
struct Net {
    now: Time,
    machines: Vec<Machine>,
    due: BTreeMap<(Time, u64), Due>,
    number: u64,
    /// Who asked, with which request.
    asked: HashMap<UploadId, (usize, RequestId, usize)>,
    requests: HashMap<(usize, RequestId), UploadId>,
    /// Pieces that the seed has put on the line.
    seed_sent: u32,
    completed: usize,
}

fn key(machine: usize) -> PeerKey {
    PeerKey(machine as u64 + 1)
}

fn machine(key: PeerKey) -> usize {
    key.0 as usize - 1
}

impl Net {
    fn new(leechers: usize, pieces: u32, seed_piece: Duration, slots: usize, seed: u64) -> Self {
        let config = Config::default();
        let mut net = Self {
            now: Time(1),
            machines: Vec::new(),
            due: BTreeMap::new(),
            number: 0,
            asked: HashMap::new(),
            requests: HashMap::new(),
            seed_sent: 0,
            completed: 0,
        };
        for at in 0..=leechers {
            let limited = Config { upload_slots: slots, ..config.clone() };
            let config = if at == 0 { limited } else { config.clone() };
            let piece = if at == 0 { seed_piece } else { seed_piece / 20 };
            let policy = Swarm::new(config, seed * 1_000 + at as u64);
            net.machines.push(Machine { policy, piece, queue: VecDeque::new() });
        }
        for at in 0..=leechers {
            let (have, purpose) = if at == 0 {
                (Bitmap::full(pieces), Purpose::Seed)
            } else {
                let purpose = Purpose::Fetch {
                    priority: 0,
                    piece_bytes: 4 << 20,
                    may_lease: false,
                    fleet: leechers as u32,
                };
                (Bitmap::empty(pieces), purpose)
            };
            net.tell(at, Event::Start { swarm: SWARM, pieces, have, purpose });
            for other in (0..=leechers).filter(|other| *other != at) {
                net.tell(at, Event::PeerUp { peer: key(other), same_zone: true });
            }
        }
        net
    }

    fn push(&mut self, after: Duration, due: Due) {
        self.number += 1;
        self.due.insert((self.now + after, self.number), due);
    }

    fn tell(&mut self, at: usize, event: Event) {
        self.machines[at].policy.handle(self.now, event);
        while let Some(action) = self.machines[at].policy.poll_action() {
            self.act(at, action);
        }
        if let Some(wake) = self.machines[at].policy.next_timeout() {
            self.push(wake.since(self.now), Due::Wake(at));
        }
    }

    fn say(&mut self, to: PeerKey, event: Event) {
        self.push(LATENCY, Due::Event(machine(to), event));
    }

    fn act(&mut self, at: usize, action: Action) {
        let peer = key(at);
        match action {
            Action::Announce { peer: to, swarm, have } => {
                self.say(to, Event::PeerJoined { peer, swarm, have });
            }
            Action::AnnounceHave { peer: to, swarm, pieces } => {
                self.say(to, Event::PeerHave { peer, swarm, pieces });
            }
            Action::Offer { peer: to, swarm, piece } => {
                self.say(to, Event::Offered { peer, swarm, piece });
            }
            Action::Fetch { request, peer: of, swarm, piece } => {
                self.number += 1;
                let upload = UploadId(self.number);
                self.asked.insert(upload, (at, request, machine(of)));
                self.requests.insert((at, request), upload);
                self.say(of, Event::UploadAsked { upload, peer, swarm, piece });
            }
            Action::CancelFetch { request } => {
                let Some(upload) = self.requests.remove(&(at, request)) else { return };
                let (_, _, of) = self.asked.remove(&upload).unwrap();
                let on_the_line = self.machines[of].queue.front() == Some(&upload);
                self.machines[of].queue.retain(|other| *other != upload);
                if on_the_line {
                    self.send_next(of);
                }
                self.say(key(of), Event::UploadEnded { upload, whole: false });
            }
            Action::Serve { upload } if self.asked.contains_key(&upload) => {
                self.machines[at].queue.push_back(upload);
                if self.machines[at].queue.len() == 1 {
                    self.send_next(at);
                }
            }
            // It was taken back meanwhile.
            Action::Serve { .. } => {}
            Action::RefuseBusy { upload } => self.answer(upload, Outcome::Busy),
            Action::RefuseNotHere { upload } => self.answer(upload, Outcome::NotHere),
            Action::Completed { .. } if at > 0 => self.completed += 1,
            _ => {}
        }
    }

    fn answer(&mut self, upload: UploadId, outcome: Outcome) {
        if let Some((to, request, _)) = self.asked.remove(&upload) {
            self.requests.remove(&(to, request));
            self.say(key(to), Event::FetchEnded { request, outcome });
        }
    }

    fn send_next(&mut self, at: usize) {
        if let Some(upload) = self.machines[at].queue.front().copied() {
            self.seed_sent += u32::from(at == 0);
            self.push(self.machines[at].piece, Due::Sent(at, upload));
        }
    }

    /// Runs until all machines hold everything; how long it took.
    fn run(&mut self, leechers: usize) -> Duration {
        let limit = Time(600_000_000_000);
        while self.completed < leechers {
            let ((at, _), due) = self.due.pop_first().unwrap();
            assert!(at < limit, "{} of {leechers} are done", self.completed);
            self.now = at;
            match due {
                Due::Event(to, event) => self.tell(to, event),
                Due::Wake(at) => {
                    if self.machines[at].policy.next_timeout().is_some_and(|wake| wake <= self.now)
                    {
                        self.tell(at, Event::Timeout);
                    }
                }
                Due::Sent(at, upload) => {
                    if self.machines[at].queue.front() == Some(&upload) {
                        self.machines[at].queue.pop_front();
                        self.answer(upload, Outcome::Verified);
                        self.send_next(at);
                        self.tell(at, Event::UploadEnded { upload, whole: true });
                    }
                }
            }
        }
        self.now.since(Time(1))
    }
}

#[test]
fn a_lone_seed_sends_hardly_a_piece_twice_and_its_line_is_never_idle() {
    // 256 pieces of 4 MiB, and as many of 256 KiB, at 50 MB/s.
    let (long, short) = (Duration::from_millis(84), Duration::from_micros(5_243));
    let pieces = 256;
    for (each, all_slots) in [(long, &[1, 3, 8][..]), (short, &[8])] {
        for slots in all_slots.iter().copied() {
            for leechers in [2, 8] {
                for seed in 0..2 {
                    let mut net = Net::new(leechers, pieces, each, slots, seed);
                    let took = net.run(leechers).as_secs_f64() / each.as_secs_f64();
                    let context = format!("{each:?}, {slots} slots, {leechers} leechers, {seed}");
                    let copies = f64::from(net.seed_sent) / f64::from(pieces);
                    let ideal = took / f64::from(pieces);
                    println!("{context}: {copies:.3} copies, {ideal:.3} of the ideal time");
                    assert!((1.0..1.03).contains(&copies), "{context}: {copies} copies");
                    assert!(ideal < 1.05, "{context}: {ideal} of the ideal time");
                }
            }
        }
    }
}
