//! The world: lines, latencies, gossip, lease books, a bucket; and machines that are the real policy.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BinaryHeap},
    time::Duration,
};

use crate::setup::{
    Artifact, BUCKET_NICS, Completion, Fetched, REGION_PROCESSES, Run, Sample, Setup, Violation,
};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use shoal_proto::{ArtifactId, Bitmap, NodeId, PieceIndex};
use shoal_swarm::{
    Action, Config, Event, LeaseAnswer, LeaseBook, Outcome, PeerKey, Purpose, RequestId, Swarm,
    SwarmKey, Time, UploadId, lease_owners, machine_hash, may_lease,
};

/// Round trip between two machines of a zone, before jitter.
const RTT_ZONE: Duration = Duration::from_micros(500);

/// Round trip between two zones, and to the region processes and the bucket, before jitter.
const RTT_CROSS: Duration = Duration::from_micros(1_500);

/// One hop of gossip.
const GOSSIP_HOP: Duration = Duration::from_millis(5);

/// One control message of this many is lost, and sent again after [`RESEND_RTTS`] round trips.
const LOSS_ONE_IN: u32 = 1_000;

/// When a lost message is sent again: quinn's probe timeout is about three round trips.
const RESEND_RTTS: u32 = 3;

/// The machines that the region's gossip reaches first.
const PUBLISHED_TO: u32 = 8;

/// Of each machine's standing connections one in this many goes to any zone, the others to its own.
const ANY_ZONE_ONE_IN: u32 = 4;

/// A run that simulates more than this has a machine that is stuck.
const LIMIT: Time = Time(36_000_000_000_000);

const SWARM: SwarmKey = SwarmKey(0);

/// Artifacts of one run.
pub(crate) const ARTIFACTS_MAX: usize = 64;

/// Samples that are kept of a run near the bound.
const SAMPLES: f64 = 300.0;

/// How often progress is told, in events.
const PROGRESS_EVERY: u64 = 1 << 14;

/// What holds in every run: names and values.
pub(crate) const DEFAULTS: &[(&str, &str)] = &[
    ("round trip", "0.5 ms in a zone, 1.5 ms across zones and to the bucket, +-50 %"),
    ("gossip", "5 ms a hop"),
    ("lost control messages", "0.1 %"),
    ("bucket", "10 x a machine's line"),
    ("connections", "stand beforehand"),
];

/// How far a run is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Progress {
    /// Simulated time in seconds.
    pub(crate) at_s: f64,
    /// Part of all pieces that machines hold, 0 to 1.
    pub(crate) held_part: f64,
    /// Machines that are complete, counted once for each artifact.
    pub(crate) done: u64,
}

/// Simulates one region.
pub(crate) fn run(setup: &Setup, progress: &mut dyn FnMut(Progress)) -> Run {
    World::new(setup.clone()).run(progress)
}

/// A machine, and what its driver keeps for it.
struct Node {
    swarm: Swarm,
    zone: u32,
    knows_goal: bool,
    up_free: Time,
    down_free: Time,
    /// The time of the newest wake-up on its way; older ones are void.
    wake: Option<Time>,
    live: Vec<RequestId>,
    uploads: BTreeMap<UploadId, Upload>,
    verified: u32,
    done: bool,
}

#[derive(Clone, Copy)]
struct Upload {
    to: u32,
    request: RequestId,
    piece: u32,
}

enum What {
    /// The goal arrives by gossip.
    Goal,
    Event(Event),
    Wake,
    /// A piece's first byte leaves: it takes its place in the receiver's line.
    Sending {
        from: u32,
        upload: UploadId,
        record: Upload,
        sent: Time,
    },
    /// A request ended at its asker.
    Ended(RequestId, u32, Outcome),
    AskLease {
        block: u32,
        want: u16,
    },
    LeaseDone {
        first: u32,
        count: u32,
        held: bool,
    },
    Introduce {
        want: u16,
    },
}

struct Planned {
    at: Time,
    order: u64,
    node: u32,
    what: What,
}

// The earliest first, and what was planned first among equals.
impl Ord for Planned {
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.order).cmp(&(self.at, self.order))
    }
}

impl PartialOrd for Planned {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Planned {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}

impl Eq for Planned {}

/// One region with its machines.
struct World {
    setup: Setup,
    artifact: Artifact,
    held_bytes: u64,
    sampled_at_s: f64,
    completions: Vec<Completion>,
    now: Time,
    queue: BinaryHeap<Planned>,
    order: u64,
    nodes: Vec<Node>,
    neighbours: Vec<Vec<u32>>,
    books: Vec<LeaseBook>,
    regions: Vec<NodeId>,
    bucket_free: Time,
    next_upload: u64,
    rng: Pcg64,
    left: u32,
    run: Run,
}

fn node_id(n: u32) -> NodeId {
    let mut bytes = [0x51; 32];
    bytes[..4].copy_from_slice(&n.to_le_bytes());
    NodeId(bytes)
}

fn mix(mut x: u64) -> u64 {
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

impl World {
    fn new(setup: Setup) -> Self {
        let artifact = setup.artifacts[0].clone();
        let mut rng = Pcg64::seed_from_u64(setup.seed);
        let nodes = (0..setup.nodes)
            .map(|at| Node {
                swarm: Swarm::new(Config::default(), rng.random()),
                zone: at % setup.zones,
                knows_goal: false,
                up_free: Time::ZERO,
                down_free: Time::ZERO,
                wake: None,
                live: Vec::new(),
                uploads: BTreeMap::new(),
                verified: 0,
                done: false,
            })
            .collect();
        let mut world = Self {
            now: Time::ZERO,
            queue: BinaryHeap::new(),
            order: 0,
            nodes,
            neighbours: vec![Vec::new(); setup.nodes as usize],
            books: vec![LeaseBook::new(artifact.pieces); REGION_PROCESSES as usize],
            regions: (0..REGION_PROCESSES).map(|at| node_id(u32::MAX - at)).collect(),
            bucket_free: Time::ZERO,
            next_upload: 0,
            rng,
            left: setup.nodes,
            run: Run { digest: 0xcbf2_9ce4_8422_2325, ..Run::default() },
            artifact,
            held_bytes: 0,
            sampled_at_s: 0.0,
            completions: Vec::new(),
            setup,
        };
        world.connect_all();
        world
    }

    /// Connections between agents at rest: each machine has picked half of its neighbours, most of them
    /// in its zone.
    fn connect_all(&mut self) {
        let each = (Config::default().neighbours_target / 2) as u32;
        for node in 0..self.setup.nodes {
            for pick in 0..each.min(self.setup.nodes - 1) {
                let zone = self.nodes[node as usize].zone;
                let zone = (pick % ANY_ZONE_ONE_IN != 0).then_some(zone);
                if let Some(other) = self.stranger(node, zone) {
                    self.connect(node, other);
                }
            }
        }
    }

    /// Any machine that `node` is not connected to, of `zone` if given and possible.
    fn stranger(&mut self, node: u32, zone: Option<u32>) -> Option<u32> {
        /// Picks that may hit a neighbour before it is given up: then nearly all are neighbours.
        const TRIES: u32 = 64;
        let zones = self.setup.zones;
        (0..TRIES).find_map(|_| {
            let mut other = self.rng.random_range(0..self.setup.nodes);
            if let Some(zone) = zone {
                other = other - other % zones + zone;
            }
            let known = self.neighbours[node as usize].contains(&other);
            (other < self.setup.nodes && other != node && !known).then_some(other)
        })
    }

    fn connect(&mut self, a: u32, b: u32) {
        let same_zone = self.nodes[a as usize].zone == self.nodes[b as usize].zone;
        self.neighbours[a as usize].push(b);
        self.neighbours[b as usize].push(a);
        // A connection never ends in this world, so the other machine's number serves as its handle.
        self.tell(a, Event::PeerUp { peer: PeerKey(u64::from(b)), same_zone });
        self.tell(b, Event::PeerUp { peer: PeerKey(u64::from(a)), same_zone });
    }

    fn plan(&mut self, at: Time, node: u32, what: What) {
        self.queue.push(Planned { at, order: self.order, node, what });
        self.order += 1;
    }

    /// One way between two machines. The jitter of a pair and direction is fixed, so that messages on a
    /// stream keep their order.
    fn one_way(&self, from: u32, to: u32) -> Duration {
        let same = self.nodes[from as usize].zone == self.nodes[to as usize].zone;
        let rtt = if same { RTT_ZONE } else { RTT_CROSS };
        jittered(rtt / 2, mix(u64::from(from) << 32 | u64::from(to)))
    }

    fn region_delay(&mut self) -> Duration {
        let roll = self.rng.random();
        jittered(RTT_CROSS / 2, roll) + self.resend(RTT_CROSS)
    }

    /// What a lost message loses in time.
    fn resend(&mut self, rtt: Duration) -> Duration {
        if self.rng.random_range(0..LOSS_ONE_IN) == 0 { rtt * RESEND_RTTS } else { Duration::ZERO }
    }

    fn line_time(&self, bytes: u64) -> Duration {
        let nanos = u128::from(bytes) * 8 * 1_000_000_000 / u128::from(self.setup.nic_bps);
        Duration::from_nanos(nanos as u64)
    }

    fn piece_bytes(&self, piece: u32) -> u64 {
        self.artifact.piece_len(piece)
    }

    /// Runs until every machine is complete.
    fn run(mut self, progress: &mut dyn FnMut(Progress)) -> Run {
        for _ in 0..PUBLISHED_TO {
            let node = self.rng.random_range(0..self.setup.nodes);
            self.plan(Time::ZERO + GOSSIP_HOP, node, What::Goal);
        }
        let whole = self.artifact.size_bytes as f64 * f64::from(self.setup.nodes);
        let alone_s = self.artifact.size_bytes as f64 * 8.0 / self.setup.nic_bps as f64;
        self.sample();
        while self.left > 0 && self.run.violation.is_none() {
            let Some(Planned { at, node, what, .. }) = self.queue.pop() else {
                self.violated(None, "nothing happens any more".into());
                break;
            };
            if at > LIMIT {
                self.violated(None, format!("{} machines are stuck", self.left));
                break;
            }
            if self.setup.stop_at_s.is_some_and(|stop_s| seconds(at) > stop_s) {
                break;
            }
            self.now = at;
            if seconds(at) - self.sampled_at_s > alone_s / SAMPLES {
                self.sample();
            }
            self.happens(node, what);
            if self.run.events.is_multiple_of(PROGRESS_EVERY) {
                progress(Progress {
                    at_s: seconds(self.now),
                    held_part: self.held_bytes as f64 / whole,
                    done: u64::from(self.setup.nodes - self.left),
                });
            }
        }
        self.sample();
        self.run.ended_s = seconds(self.now);
        let done: Vec<u32> = self.completions.iter().map(|done| done.machine).collect();
        let left = (0..self.setup.nodes).filter(|machine| !done.contains(machine));
        let left = left.map(|machine| Completion { machine, at_s: None, healthy: true });
        let mut machines: Vec<_> = left.collect();
        machines.extend(self.completions);
        machines.sort_by_key(|done| done.machine);
        self.run.artifacts = vec![Fetched::default(); self.setup.artifacts.len()];
        self.run.artifacts[0].machines = machines;
        self.run
    }

    fn sample(&mut self) {
        self.sampled_at_s = seconds(self.now);
        self.run.samples.push(Sample {
            at_s: self.sampled_at_s,
            held_bytes: self.held_bytes,
            origin_bytes: self.run.origin_bytes,
            cross_zone_bytes: self.run.cross_zone_bytes,
        });
    }

    fn violated(&mut self, machine: Option<u32>, what: String) {
        self.run.violation = Some(Violation { at_s: seconds(self.now), machine, what });
    }

    fn trace(&mut self, node: u32, kind: u64) {
        if self.setup.watch == Some(node) {
            eprintln!("{:.9} s, machine {node}: event {kind}", seconds(self.now));
        }
        self.run.events += 1;
        for word in [self.now.0, u64::from(node) << 32 | kind] {
            self.run.digest = (self.run.digest ^ word).wrapping_mul(0x0100_0000_01b3);
            self.run.digest ^= self.run.digest >> 29;
        }
    }

    fn happens(&mut self, node: u32, what: What) {
        let at = node as usize;
        match what {
            What::Wake => {
                if self.nodes[at].wake == Some(self.now) {
                    self.nodes[at].wake = None;
                    self.trace(node, 1);
                    self.tell(node, Event::Timeout);
                }
            }
            What::Goal => self.goal(node),
            What::Event(event) => {
                self.trace(node, 3);
                self.tell(node, event);
            }
            What::Sending { from, upload, record, sent } => {
                self.trace(node, 4);
                let took = self.line_time(self.piece_bytes(record.piece));
                let receiver = &mut self.nodes[at];
                receiver.down_free = receiver.down_free.max(self.now) + took;
                let arrived = receiver.down_free.max(sent) + self.one_way(from, node);
                self.plan(sent, from, What::Event(Event::UploadEnded { upload }));
                self.plan(
                    arrived,
                    node,
                    What::Ended(record.request, record.piece, Outcome::Verified),
                );
            }
            What::Ended(request, piece, outcome) => {
                let live = &mut self.nodes[at].live;
                if let Some(place) = live.iter().position(|other| *other == request) {
                    live.swap_remove(place);
                    self.trace(node, 5 | u64::from(piece) << 8);
                    if outcome == Outcome::Verified {
                        self.nodes[at].verified += 1;
                        self.held_bytes += self.piece_bytes(piece);
                    }
                    self.tell(node, Event::FetchEnded { request, outcome });
                }
            }
            What::AskLease { block, want } => self.ask_lease(node, block, want),
            What::LeaseDone { first, count, held } => {
                self.trace(node, 7);
                let owner = self.owner(first / shoal_proto::region::LEASE_BLOCK_PIECES);
                self.books[owner].done(self.now, u64::from(node), first, count, held);
            }
            What::Introduce { want } => {
                self.trace(node, 8);
                for _ in 0..want.min(64) {
                    match self.stranger(node, None) {
                        Some(other) => self.connect(node, other),
                        None => break,
                    }
                }
            }
        }
    }

    fn goal(&mut self, node: u32) {
        if std::mem::replace(&mut self.nodes[node as usize].knows_goal, true) {
            return;
        }
        self.trace(node, 2);
        for other in self.neighbours[node as usize].clone() {
            if !self.nodes[other as usize].knows_goal {
                self.plan(self.now + GOSSIP_HOP, other, What::Goal);
            }
        }
        let (pieces, fleet) = (self.artifact.pieces, self.setup.nodes);
        let may_lease = may_lease(machine_hash(&node_id(node), &ArtifactId::EMPTY), fleet);
        let purpose = Purpose::Fetch { priority: 0, may_lease, fleet };
        let have = Bitmap::empty(pieces);
        self.tell(node, Event::Start { swarm: SWARM, pieces, have, purpose });
    }

    fn owner(&self, block: u32) -> usize {
        lease_owners(&ArtifactId::EMPTY, block, &self.regions)[0]
    }

    fn ask_lease(&mut self, node: u32, block: u32, want: u16) {
        self.trace(node, 6);
        let owner = self.owner(block);
        let event = match self.books[owner].ask(self.now, u64::from(node), block, want) {
            LeaseAnswer::Granted { first, count, duration } => {
                Event::LeaseGranted { swarm: SWARM, block, first, count, duration }
            }
            LeaseAnswer::Retry(wait) => {
                Event::LeaseDenied { swarm: SWARM, block, retry: Some(wait) }
            }
            LeaseAnswer::AllHeld => Event::LeaseDenied { swarm: SWARM, block, retry: None },
        };
        let at = self.now + self.region_delay();
        self.plan(at, node, What::Event(event));
    }

    fn tell(&mut self, node: u32, event: Event) {
        let at = node as usize;
        self.nodes[at].swarm.handle(self.now, event);
        while let Some(action) = self.nodes[at].swarm.poll_action() {
            self.act(node, action);
        }
        let wake = self.nodes[at].swarm.next_timeout();
        if wake != self.nodes[at].wake {
            self.nodes[at].wake = wake;
            if let Some(time) = wake {
                self.plan(time, node, What::Wake);
            }
        }
    }

    /// A control message between machines.
    fn send(&mut self, from: u32, peer: PeerKey, bytes: usize, event: Event) {
        let to = peer.0 as u32;
        self.run.messages += 1;
        self.run.control_bytes += bytes as u64;
        let one_way = self.one_way(from, to);
        let at = self.now + one_way + self.resend(one_way * 2);
        self.plan(at, to, What::Event(event));
    }

    fn count_control(&mut self, bytes: u64) {
        self.run.messages += 1;
        self.run.control_bytes += bytes;
    }

    fn act(&mut self, from: u32, action: Action) {
        /// Artifact, kind and framing of a control message, in bytes.
        const ENVELOPE: usize = 40;
        let me = PeerKey(u64::from(from));
        match action {
            Action::Announce { peer, swarm, have } => {
                let bytes = ENVELOPE + have.words().len() * 8;
                self.send(from, peer, bytes, Event::PeerJoined { peer: me, swarm, have });
            }
            Action::AnnounceHave { peer, swarm, pieces } => {
                let bytes = ENVELOPE + pieces.len() * 3;
                self.send(from, peer, bytes, Event::PeerHave { peer: me, swarm, pieces });
            }
            Action::AnnounceLeave { peer, swarm } => {
                self.send(from, peer, ENVELOPE, Event::PeerLeft { peer: me, swarm });
            }
            Action::Fetch { request, peer, swarm, piece } => {
                let to = peer.0 as u32;
                self.nodes[from as usize].live.push(request);
                let upload = UploadId(self.next_upload);
                self.next_upload += 1;
                let record = Upload { to: from, request, piece: piece.0 };
                self.nodes[to as usize].uploads.insert(upload, record);
                let asked = Event::UploadAsked { upload, peer: me, swarm, piece };
                self.send(from, peer, ENVELOPE, asked);
            }
            Action::CancelFetch { request } => {
                self.nodes[from as usize].live.retain(|other| *other != request);
            }
            Action::Serve { upload } => self.serve(from, upload),
            Action::RefuseBusy { upload } => self.refuse(from, upload, Outcome::Busy),
            Action::RefuseNotHere { upload } => self.refuse(from, upload, Outcome::NotHere),
            Action::AskLease { block, want, .. } => {
                self.count_control(ENVELOPE as u64 * 3);
                let at = self.now + self.region_delay();
                self.plan(at, from, What::AskLease { block, want });
            }
            Action::LeaseDone { first, count, held, .. } => {
                self.count_control(ENVELOPE as u64);
                let at = self.now + self.region_delay();
                self.plan(at, from, What::LeaseDone { first, count, held });
            }
            Action::FetchOrigin { first, count, .. } => self.fetch_origin(from, first, count),
            Action::WantPeers { want, .. } => {
                self.count_control(ENVELOPE as u64);
                let at = self.now + self.region_delay() + self.region_delay();
                self.plan(at, from, What::Introduce { want });
            }
            Action::Ban { peer } => {
                self.violated(Some(from), format!("banned {}", peer.0));
            }
            Action::Completed { .. } => self.completed(from),
        }
    }

    fn completed(&mut self, node: u32) {
        let machine = &mut self.nodes[node as usize];
        if machine.verified < self.artifact.pieces || std::mem::replace(&mut machine.done, true) {
            let what = format!("completed with {} pieces", machine.verified);
            self.violated(Some(node), what);
        }
        self.left -= 1;
        let at_s = Some(seconds(self.now));
        self.completions.push(Completion { machine: node, at_s, healthy: true });
    }

    fn serve(&mut self, from: u32, upload: UploadId) {
        let Some(record) = self.nodes[from as usize].uploads.remove(&upload) else { return };
        if !self.nodes[record.to as usize].live.contains(&record.request) {
            // Cancelled meanwhile; the sender learns it from the reset stream.
            let at = self.now + self.one_way(record.to, from);
            self.plan(at, from, What::Event(Event::UploadEnded { upload }));
            return;
        }
        let bytes = self.piece_bytes(record.piece);
        if self.nodes[from as usize].zone != self.nodes[record.to as usize].zone {
            self.run.cross_zone_bytes += bytes;
        }
        let begins = self.nodes[from as usize].up_free.max(self.now);
        let sent = begins + self.line_time(bytes);
        self.nodes[from as usize].up_free = sent;
        self.plan(begins, record.to, What::Sending { from, upload, record, sent });
    }

    fn refuse(&mut self, from: u32, upload: UploadId, outcome: Outcome) {
        if let Some(record) = self.nodes[from as usize].uploads.remove(&upload) {
            self.count_control(8);
            let at = self.now + self.one_way(from, record.to);
            self.plan(at, record.to, What::Ended(record.request, record.piece, outcome));
        }
    }

    fn fetch_origin(&mut self, node: u32, first: u32, count: u32) {
        let asked = self.now + self.region_delay();
        for piece in first..first + count {
            let bytes = self.piece_bytes(piece);
            self.run.origin_bytes += bytes;
            let took = self.line_time(bytes);
            self.bucket_free = self.bucket_free.max(asked) + took / BUCKET_NICS;
            let receiver = &mut self.nodes[node as usize];
            receiver.down_free = receiver.down_free.max(asked) + took;
            receiver.verified += 1;
            self.held_bytes += bytes;
            let arrived = self.bucket_free.max(receiver.down_free) + self.region_delay();
            let (piece, outcome) = (PieceIndex(piece), Outcome::Verified);
            let ended = Event::OriginEnded { swarm: SWARM, piece, outcome };
            self.plan(arrived, node, What::Event(ended));
        }
    }
}

fn seconds(time: Time) -> f64 {
    time.0 as f64 / 1e9
}

/// Between half and one and a half of `around`, by `roll`.
fn jittered(around: Duration, roll: u64) -> Duration {
    let nanos = around.as_nanos() as u64;
    Duration::from_nanos(nanos / 2 + roll % (nanos + 1))
}
