//! A whole network in memory with its own clock: machines with a line each way, connections with delay,
//! loss and death, region processes with lease books, and a bucket that counts what is read.
//!
//! A machine's line is a queue: one piece after the other, each as long as `piece_time`.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap},
    time::Duration,
};

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg32;
use shoal_proto::{ArtifactId, Bitmap, NodeId};
use shoal_swarm::{
    Action, Config, Event, LeaseAnswer, LeaseBook, Outcome, PeerKey, Purpose, RequestId, Swarm,
    SwarmKey, Time, UploadId, lease_owners, machine_hash, may_lease,
};

/// The artifact that most tests have one of.
pub(crate) const SWARM: SwarmKey = SwarmKey(1);

/// What a test may change.
pub(crate) struct Setup {
    pub(crate) machines: usize,
    pub(crate) pieces: u32,
    pub(crate) zones: usize,
    pub(crate) seed: u64,
    pub(crate) regions: usize,
    /// Part of the requests and control messages that vanish.
    pub(crate) loss: f64,
    pub(crate) piece_time: Duration,
    pub(crate) config: Config,
}

impl Setup {
    pub(crate) fn new(machines: usize, pieces: u32, seed: u64) -> Self {
        Self {
            machines,
            pieces,
            zones: 1,
            seed,
            regions: 2,
            loss: 0.0,
            piece_time: Duration::from_millis(20),
            config: Config::default(),
        }
    }
}

struct Machine {
    swarm: Swarm,
    alive: bool,
    /// Counts its lives: what was meant for an earlier one is dropped.
    life: u32,
    zone: usize,
    /// Connections and who is at the other end.
    peers: BTreeMap<PeerKey, usize>,
    disk: BTreeMap<SwarmKey, Bitmap>,
    goals: BTreeMap<SwarmKey, Purpose>,
    /// Requests under way, and on which connection.
    live: BTreeMap<RequestId, PeerKey>,
    up_free: Time,
    down_free: Time,
    wake: Option<Time>,
    corrupts: bool,
    uploaded: u32,
    completed: BTreeMap<SwarmKey, Time>,
    banned: BTreeSet<usize>,
}

enum What {
    Event(Event),
    /// The piece of a fetch has arrived, or its refusal.
    Ended(RequestId, SwarmKey, u32, Outcome),
    Wake,
    Lease(usize, SwarmKey, u32, u64, u16),
    LeaseDone(usize, SwarmKey, u32, u32, bool),
    OriginEnded(SwarmKey, u32, Outcome),
    Introduce(SwarmKey, u16),
    Die,
    Reborn,
    RegionDies(usize),
    BucketDies,
    Start(SwarmKey, Purpose),
}

struct Upload {
    to: usize,
    to_life: u32,
    request: RequestId,
    swarm: SwarmKey,
    piece: u32,
}

pub(crate) struct Net {
    setup: Setup,
    pub(crate) now: Time,
    machines: Vec<Machine>,
    queue: BinaryHeap<Reverse<(Time, u64, usize, u32)>>,
    what: BTreeMap<u64, What>,
    next: u64,
    rng: Pcg32,
    uploads: BTreeMap<UploadId, Upload>,
    books: Vec<Option<BTreeMap<SwarmKey, LeaseBook>>>,
    bucket: bool,
    bucket_free: Time,
    pub(crate) origin_pieces: u32,
    origin_by_piece: BTreeMap<u32, u32>,
    /// Pieces that the bucket gives wrong.
    pub(crate) spoilt: BTreeSet<u32>,
    pub(crate) events: u64,
    /// Deaths, births and starts that are still to come.
    planned: u32,
    /// Somebody completed, died or was planned to.
    news: bool,
}

fn node(n: usize) -> NodeId {
    let mut bytes = [1; 32];
    bytes[..8].copy_from_slice(&(n as u64).to_le_bytes());
    NodeId(bytes)
}

pub(crate) fn secs(s: u64) -> Time {
    Time(s * 1_000_000_000)
}

pub(crate) fn millis(ms: u64) -> Time {
    Time(ms * 1_000_000)
}

impl Net {
    pub(crate) fn new(setup: Setup) -> Self {
        let mut rng = Pcg32::seed_from_u64(setup.seed);
        let machines = (0..setup.machines)
            .map(|at| Machine {
                swarm: Swarm::new(setup.config.clone(), rng.random()),
                alive: true,
                life: 0,
                zone: at % setup.zones,
                peers: BTreeMap::new(),
                disk: BTreeMap::new(),
                goals: BTreeMap::new(),
                live: BTreeMap::new(),
                up_free: Time::ZERO,
                down_free: Time::ZERO,
                wake: None,
                corrupts: false,
                uploaded: 0,
                completed: BTreeMap::new(),
                banned: BTreeSet::new(),
            })
            .collect();
        let books = (0..setup.regions).map(|_| Some(BTreeMap::new())).collect();
        Self {
            now: Time::ZERO,
            machines,
            queue: BinaryHeap::new(),
            what: BTreeMap::new(),
            next: 0,
            rng,
            uploads: BTreeMap::new(),
            books,
            bucket: setup.regions > 0,
            bucket_free: Time::ZERO,
            origin_pieces: 0,
            origin_by_piece: BTreeMap::new(),
            spoilt: BTreeSet::new(),
            events: 0,
            planned: 0,
            news: true,
            setup,
        }
    }

    fn push(&mut self, at: Time, machine: usize, what: What) {
        let life = self.machines.get(machine).map_or(0, |m| m.life);
        self.queue.push(Reverse((at, self.next, machine, life)));
        self.planned += u32::from(matches!(what, What::Start(..)));
        self.what.insert(self.next, what);
        self.next += 1;
    }

    fn delay(&mut self) -> Duration {
        Duration::from_micros(self.rng.random_range(250..750))
    }

    fn lost(&mut self) -> bool {
        let loss = self.setup.loss;
        loss > 0.0 && self.rng.random_bool(loss)
    }

    pub(crate) fn fetch_purpose(&self, machine: usize, priority: u8) -> Purpose {
        let fleet = self.machines.len() as u32;
        let may_lease = may_lease(machine_hash(&node(machine), &ArtifactId::EMPTY), fleet);
        Purpose::Fetch { priority, piece_bytes: 1 << 20, may_lease, fleet }
    }

    /// All machines fetch [`SWARM`], each from about now.
    pub(crate) fn everybody_fetches(&mut self) {
        for machine in 0..self.machines.len() {
            let at = Time(self.rng.random_range(0..20_000_000));
            let purpose = self.fetch_purpose(machine, 1);
            self.push(at, machine, What::Start(SWARM, purpose));
        }
    }

    pub(crate) fn start(&mut self, at: Time, machine: usize, key: SwarmKey, purpose: Purpose) {
        self.push(at, machine, What::Start(key, purpose));
    }

    /// The machine has these pieces on its disk.
    pub(crate) fn put(&mut self, machine: usize, key: SwarmKey, have: Bitmap) {
        self.machines[machine].disk.insert(key, have);
    }

    pub(crate) fn corrupts(&mut self, machine: usize) {
        self.machines[machine].corrupts = true;
    }

    pub(crate) fn dies(&mut self, at: Time, machine: usize) {
        self.push_any_life(at, machine, What::Die);
    }

    pub(crate) fn reborn(&mut self, at: Time, machine: usize) {
        self.push_any_life(at, machine, What::Reborn);
    }

    fn push_any_life(&mut self, at: Time, machine: usize, what: What) {
        self.queue.push(Reverse((at, self.next, machine, u32::MAX)));
        self.planned += 1;
        self.what.insert(self.next, what);
        self.next += 1;
    }

    pub(crate) fn region_dies(&mut self, at: Time, region: usize) {
        self.push_any_life(at, 0, What::RegionDies(region));
    }

    pub(crate) fn bucket_dies(&mut self, at: Time) {
        self.push_any_life(at, 0, What::BucketDies);
    }

    pub(crate) fn uploaded(&self, machine: usize) -> u32 {
        self.machines[machine].uploaded
    }

    pub(crate) fn completed(&self, machine: usize, key: SwarmKey) -> Option<Time> {
        self.machines[machine].completed.get(&key).copied()
    }

    /// Copies of the artifact that were read from the bucket.
    pub(crate) fn origin_copies(&self) -> f64 {
        f64::from(self.origin_pieces) / f64::from(self.setup.pieces)
    }

    /// How often the piece read most often was read.
    pub(crate) fn origin_most(&self) -> u32 {
        self.origin_by_piece.values().copied().max().unwrap_or(0)
    }

    /// Runs until all live machines hold all that they fetch; panics when that is not so by `limit`.
    pub(crate) fn run(&mut self, limit: Time) {
        self.run_until(limit, |_| false);
        for (at, machine) in self.machines.iter().enumerate().filter(|(_, m)| m.alive) {
            for key in machine.goals.keys() {
                let progress = machine.swarm.progress(*key);
                assert!(
                    machine.completed.contains_key(key),
                    "seed {}: machine {at} is stuck in {key:?} at {}: {progress:?}",
                    self.setup.seed,
                    self.now
                );
            }
        }
    }

    fn all_done(&self) -> bool {
        self.machines
            .iter()
            .all(|m| !m.alive || m.goals.keys().all(|key| m.completed.contains_key(key)))
    }

    /// Runs until `stop`, or all is done and nobody will be reborn or start, or `limit`.
    pub(crate) fn run_until(&mut self, limit: Time, stop: impl Fn(&Self) -> bool) {
        while let Some(Reverse((at, id, machine, life))) = self.queue.pop() {
            let what = self.what.remove(&id).unwrap();
            if at > limit {
                return;
            }
            self.now = at;
            self.events += 1;
            let start = matches!(what, What::Start(..));
            let plan = life == u32::MAX || start;
            self.planned -= u32::from(plan);
            self.news |= plan;
            if life == u32::MAX || self.machines[machine].life == life {
                self.happens(machine, what);
            }
            let maybe = self.planned == 0 && self.news;
            self.news = false;
            if stop(self) || (maybe && self.all_done()) {
                return;
            }
        }
    }

    fn happens(&mut self, machine: usize, what: What) {
        match what {
            What::Event(event) => self.tell(machine, event),
            What::Wake => {
                if self.machines[machine].wake == Some(self.now) {
                    self.machines[machine].wake = None;
                    self.tell(machine, Event::Timeout);
                }
            }
            What::Ended(request, swarm, piece, outcome) => {
                let m = &mut self.machines[machine];
                if m.live.remove(&request).is_some() {
                    if outcome == Outcome::Verified {
                        assert!(m.disk.get_mut(&swarm).unwrap().insert(piece), "fetched twice");
                    }
                    self.tell(machine, Event::FetchEnded { request, outcome });
                }
            }
            What::Lease(from, swarm, block, lacking, want) => {
                self.lease(from, swarm, block, lacking, want);
            }
            What::LeaseDone(from, swarm, first, count, held) => {
                let owner = self.owner(first / 64);
                if let Some(book) = owner.and_then(|owner| self.books[owner].as_mut())
                    && let Some(book) = book.get_mut(&swarm)
                {
                    book.done(self.now, from as u64, first, count, held);
                }
            }
            What::OriginEnded(swarm, piece, outcome) => {
                if outcome == Outcome::Verified {
                    self.machines[machine].disk.get_mut(&swarm).unwrap().insert(piece);
                }
                let piece = shoal_proto::PieceIndex(piece);
                self.tell(machine, Event::OriginEnded { swarm, piece, outcome });
            }
            What::Introduce(swarm, want) => self.introduce(machine, swarm, want),
            What::Die => self.die(machine),
            What::Reborn => {
                if !self.machines[machine].alive {
                    let seed = self.rng.random();
                    let m = &mut self.machines[machine];
                    m.alive = true;
                    m.swarm = Swarm::new(self.setup.config.clone(), seed);
                    let goals: Vec<_> = m.goals.iter().map(|(key, goal)| (*key, *goal)).collect();
                    goals.into_iter().for_each(|(key, goal)| self.start_now(machine, key, goal));
                }
            }
            What::RegionDies(region) => self.books[region] = None,
            What::BucketDies => self.bucket = false,
            What::Start(key, purpose) => self.start_now(machine, key, purpose),
        }
    }

    fn start_now(&mut self, machine: usize, swarm: SwarmKey, purpose: Purpose) {
        let pieces = self.setup.pieces;
        let m = &mut self.machines[machine];
        m.goals.insert(swarm, purpose);
        let have = m.disk.entry(swarm).or_insert_with(|| Bitmap::empty(pieces)).clone();
        if purpose == Purpose::Seed {
            m.completed.insert(swarm, self.now);
        }
        self.tell(machine, Event::Start { swarm, pieces, have, purpose });
    }

    fn die(&mut self, machine: usize) {
        // A region process sees the connection end.
        for book in self.books.iter_mut().flatten().flat_map(BTreeMap::values_mut) {
            book.lost(self.now, machine as u64);
        }
        let m = &mut self.machines[machine];
        m.alive = false;
        m.life += 1;
        m.wake = None;
        m.live.clear();
        (m.up_free, m.down_free) = (self.now, self.now);
        let peers = std::mem::take(&mut m.peers);
        for (peer, other) in peers {
            let at = self.now + self.delay() * 200;
            self.push(at, other, What::Event(Event::PeerDown { peer }));
        }
    }

    fn owner(&self, block: u32) -> Option<usize> {
        let nodes: Vec<NodeId> = (0..self.books.len()).map(|at| node(1_000 + at)).collect();
        let order = lease_owners(&ArtifactId::EMPTY, block, &nodes);
        order.into_iter().find(|at| self.books[*at].is_some())
    }

    fn lease(&mut self, from: usize, swarm: SwarmKey, block: u32, lacking: u64, want: u16) {
        let at = self.now + self.delay();
        let pieces = self.setup.pieces;
        let answer = self.owner(block).and_then(|owner| self.books[owner].as_mut()).map(|book| {
            let book = book.entry(swarm).or_insert_with(|| LeaseBook::new(pieces));
            book.ask(self.now, from as u64, block, lacking, want)
        });
        let event = match answer {
            Some(LeaseAnswer::Granted { first, count, duration }) => {
                Event::LeaseGranted { swarm, block, first, count, duration }
            }
            Some(LeaseAnswer::Retry(wait)) => {
                Event::LeaseDenied { swarm, block, retry: Some(wait), all_blocks: false }
            }
            Some(LeaseAnswer::Later(wait)) => {
                Event::LeaseDenied { swarm, block, retry: Some(wait), all_blocks: true }
            }
            Some(LeaseAnswer::AllHeld) => {
                Event::LeaseDenied { swarm, block, retry: None, all_blocks: false }
            }
            None => Event::LeaseFailed { swarm, block },
        };
        self.push(at, from, What::Event(event));
    }

    fn introduce(&mut self, machine: usize, swarm: SwarmKey, want: u16) {
        let mut others: Vec<usize> = (0..self.machines.len())
            .filter(|at| {
                let other = &self.machines[*at];
                let m = &self.machines[machine];
                *at != machine
                    && other.alive
                    && other.goals.contains_key(&swarm)
                    && !m.peers.values().any(|peer| peer == at)
                    && !m.banned.contains(at)
                    && !other.banned.contains(&machine)
            })
            .collect();
        for _ in 0..want {
            if others.is_empty() {
                return;
            }
            let other = others.swap_remove(self.rng.random_range(0..others.len()));
            let peer = PeerKey(self.next);
            self.next += 1;
            let same_zone = self.machines[machine].zone == self.machines[other].zone;
            self.machines[machine].peers.insert(peer, other);
            self.machines[other].peers.insert(peer, machine);
            self.tell(machine, Event::PeerUp { peer, same_zone });
            self.tell(other, Event::PeerUp { peer, same_zone });
        }
    }

    fn tell(&mut self, machine: usize, event: Event) {
        if !self.machines[machine].alive {
            return;
        }
        if let Event::PeerDown { peer } = event {
            let m = &mut self.machines[machine];
            m.peers.remove(&peer);
            // What was under way on the connection ended with it.
            m.live.retain(|_, on| *on != peer);
        }
        let swarm = &mut self.machines[machine].swarm;
        swarm.handle(self.now, event);
        if self.events.is_multiple_of(64) {
            let checked = swarm.check_invariants();
            assert!(checked.is_ok(), "seed {}: {checked:?} at {}", self.setup.seed, self.now);
        }
        while let Some(action) = self.machines[machine].swarm.poll_action() {
            self.act(machine, action);
        }
        let wake = self.machines[machine].swarm.next_timeout();
        if wake != self.machines[machine].wake {
            self.machines[machine].wake = wake;
            if let Some(at) = wake {
                self.push(at, machine, What::Wake);
            }
        }
    }

    /// Sends a control message on a connection, if it still stands.
    fn send(&mut self, from: usize, peer: PeerKey, event: Event) {
        let lossy = matches!(event, Event::PeerJoined { .. } | Event::PeerHave { .. });
        if let Some(to) = self.machines[from].peers.get(&peer).copied()
            && !(lossy && self.lost())
        {
            // In order, as on one stream: a fixed delay.
            let at = self.now + Duration::from_micros(500);
            self.push(at, to, What::Event(event));
        }
    }

    fn act(&mut self, from: usize, action: Action) {
        match action {
            Action::Announce { peer, swarm, have } => {
                assert_eq!(*have, self.machines[from].disk[&swarm], "announced what is not held");
                self.send(from, peer, Event::PeerJoined { peer, swarm, have });
            }
            Action::AnnounceHave { peer, swarm, pieces } => {
                let disk = &self.machines[from].disk[&swarm];
                assert!(pieces.iter().all(|piece| disk.contains(piece.0)));
                self.send(from, peer, Event::PeerHave { peer, swarm, pieces });
            }
            Action::AnnounceLeave { peer, swarm } => {
                self.send(from, peer, Event::PeerLeft { peer, swarm });
            }
            Action::Fetch { request, peer, swarm, piece } => {
                self.machines[from].live.insert(request, peer);
                let Some(to) = self.machines[from].peers.get(&peer).copied() else { return };
                if self.lost() {
                    return;
                }
                let upload = UploadId(self.next);
                self.next += 1;
                let to_life = self.machines[from].life;
                let record = Upload { to: from, to_life, request, swarm, piece: piece.0 };
                self.uploads.insert(upload, record);
                let at = self.now + self.delay();
                let asked = Event::UploadAsked { upload, peer, swarm, piece };
                self.push(at, to, What::Event(asked));
            }
            Action::CancelFetch { request } => {
                self.machines[from].live.remove(&request);
            }
            Action::Serve { upload } => self.serve(from, upload),
            Action::Offer { peer, swarm, piece } => {
                self.send(from, peer, Event::Offered { peer, swarm, piece });
            }
            Action::RefuseBusy { upload } => self.refuse(upload, Outcome::Busy),
            Action::RefuseNotHere { upload } => self.refuse(upload, Outcome::NotHere),
            Action::AskLease { swarm, block, lacking, want } => {
                let at = self.now + self.delay();
                self.push(at, from, What::Lease(from, swarm, block, lacking, want));
            }
            Action::LeaseDone { swarm, first, count, held } => {
                let at = self.now + self.delay();
                self.push(at, from, What::LeaseDone(from, swarm, first, count, held));
            }
            Action::FetchOrigin { swarm, first, count } => {
                for piece in first..first + count {
                    let mut at = self.now + self.delay();
                    let mut outcome = Outcome::Failed;
                    if self.bucket {
                        self.origin_pieces += 1;
                        *self.origin_by_piece.entry(piece).or_default() += 1;
                        // The bucket gives ten machines' worth at most.
                        self.bucket_free =
                            self.bucket_free.max(self.now) + self.setup.piece_time / 10;
                        let down = &mut self.machines[from].down_free;
                        *down = (*down).max(self.now) + self.setup.piece_time;
                        at = self.bucket_free.max(*down) + Duration::from_millis(5);
                        let good = !self.spoilt.contains(&piece);
                        outcome = if good { Outcome::Verified } else { Outcome::Corrupt };
                    }
                    self.push(at, from, What::OriginEnded(swarm, piece, outcome));
                }
            }
            Action::WantPeers { swarm, want } => {
                let at = self.now + self.delay();
                self.push(at, from, What::Introduce(swarm, want));
            }
            Action::Ban { peer } => {
                // The other end may have hung up just before.
                let Some(other) = self.machines[from].peers.remove(&peer) else { return };
                self.machines[from].banned.insert(other);
                self.machines[other].peers.remove(&peer);
                let at = self.now + self.delay();
                self.push(at, from, What::Event(Event::PeerDown { peer }));
                self.push(at, other, What::Event(Event::PeerDown { peer }));
            }
            Action::Completed { swarm } => {
                assert!(self.machines[from].disk[&swarm].is_full(), "completed and not whole");
                self.machines[from].completed.insert(swarm, self.now);
                self.news = true;
            }
        }
    }

    fn serve(&mut self, from: usize, upload: UploadId) {
        let Some(record) = self.uploads.remove(&upload) else { return };
        assert!(self.machines[from].disk[&record.swarm].contains(record.piece));
        let to = &self.machines[record.to];
        let wanted = to.life == record.to_life && to.live.contains_key(&record.request);
        if !wanted {
            // It was cancelled meanwhile: the stream is reset at once.
            let at = self.now + self.delay();
            self.push(at, from, What::Event(Event::UploadEnded { upload, whole: false }));
            return;
        }
        let took = self.setup.piece_time;
        // Each line carries one piece after the other; the slower queue decides.
        let up = self.machines[from].up_free.max(self.now) + took;
        let down = self.machines[record.to].down_free.max(self.now) + took;
        self.machines[from].up_free = up;
        self.machines[record.to].down_free = down;
        let end = up.max(down);
        self.machines[from].uploaded += 1;
        let outcome =
            if self.machines[from].corrupts { Outcome::Corrupt } else { Outcome::Verified };
        self.push(end, from, What::Event(Event::UploadEnded { upload, whole: true }));
        let ended = What::Ended(record.request, record.swarm, record.piece, outcome);
        let at = end + self.delay();
        self.push(at, record.to, ended);
    }

    fn refuse(&mut self, upload: UploadId, outcome: Outcome) {
        if let Some(record) = self.uploads.remove(&upload) {
            let at = self.now + self.delay();
            let ended = What::Ended(record.request, record.swarm, record.piece, outcome);
            self.push(at, record.to, ended);
        }
    }
}
