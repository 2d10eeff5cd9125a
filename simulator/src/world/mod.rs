//! The world: machines that are the real policy, and what lies between them.
//!
//! [`run`] builds it from a [`Setup`] and lets it happen. [`shard`] says how that is done on several
//! threads with one result; [`machine`] is the model of an agent; [`mod@line`] of what it is joined to others with;
//! [`services`] of region processes, bucket and trunks; [`triggers`] of what goes wrong and when.

mod line;
mod machine;
mod message;
mod network;
mod services;
mod shard;
mod triggers;

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread,
};

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg32;
use shoal_proto::{ArtifactId, NodeId};
use shoal_swarm::{Config, lease_owners, machine_hash, may_lease};

use self::{
    machine::{Machine, Made},
    message::Actor,
    services::{Bucket, Region},
    shard::{Conditions, Counts, Shard},
    triggers::Triggers,
};
use crate::setup::{
    BUCKET_NICS, Completion, Fault, Fetched, REGION_PROCESSES, Run, Sample, Setup, Violation,
};

/// Round trip between two machines of a zone, before jitter, in nanoseconds.
const RTT_ZONE_NS: u64 = 500_000;

/// Round trip between two zones, and to the region processes and the bucket, before jitter.
const RTT_CROSS_NS: u64 = 1_500_000;

/// One hop of gossip.
const GOSSIP_HOP_NS: u64 = 5_000_000;

/// One control message of this many is lost, and sent again after [`RESEND_RTTS`] round trips.
const LOSS_ONE_IN: u64 = 1_000;

/// When a lost message is sent again: quinn's probe timeout is about three round trips.
const RESEND_RTTS: u64 = 3;

/// Region processes of a region, as an index.
const REGIONS: usize = REGION_PROCESSES as usize;

/// Of the connections that stand beforehand, and of the machines that a region process names, one in this many is of
/// any zone, the others of the machine's own.
const ANY_ZONE_ONE_IN: u32 = 4;

/// A window of simulation: no message between two actors takes less, which is half a zone's round trip less half.
const WINDOW_NS: u64 = RTT_ZONE_NS / 4;

/// What each trunk on the way adds.
const TRUNK_NS: u64 = WINDOW_NS;

/// A run that simulates more than this has a machine that is stuck.
const LIMIT_NS: u64 = 36_000_000_000_000;

/// Fewer machines than this are simulated by one thread: more would only wait for each other.
const NODES_A_THREAD: u32 = 1_000;

/// The most artifacts of one run: a machine keeps what it knows of them in the bits of a word.
pub(crate) const ARTIFACTS_MAX: usize = 64;

/// Samples that are kept at most; beyond it every second one goes.
const SAMPLES_MAX: usize = 1_024;

/// The defaults that no option changes, for the report.
pub(crate) const DEFAULTS: &[(&str, &str)] = &[
    ("round trip", "0.5 ms in a zone, 1.5 ms across and to services, +-50 % a message"),
    ("gossip", "5 ms a hop, to 8 neighbours"),
    ("loss", "0.1 % of control messages, sent again after 3 round trips"),
    ("bucket", "10 x a machine's line, 5,500 requests/s"),
    ("region processes", "2"),
    ("connections", "stand beforehand: 32 neighbours on average, 1 in 4 of any zone"),
    ("hashing and writing", "4.4 and 4.3 GB/s, one piece after the other"),
];

/// How far a run is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Progress {
    pub(crate) at_s: f64,
    /// Which part of all pieces of all machines is held.
    pub(crate) held_part: f64,
    /// Machines' artifacts that are complete.
    pub(crate) done: u64,
}

/// What does not change while the world runs, and every actor may read.
struct Static {
    setup: Setup,
    config: Arc<Config>,
    /// The machines of each artifact, ascending.
    members: Vec<Vec<u32>>,
    /// Which newer artifact replaces each.
    replaced_by: Vec<Option<u16>>,
    parts: Vec<u64>,
    check_every: u64,
    /// No connection ever ends: what came over one need not be looked at twice.
    links_stand: bool,
    /// Owners of each lease block of each artifact, best first.
    owners: Vec<Vec<[usize; REGIONS]>>,
}

fn artifact_id(artifact: u16) -> ArtifactId {
    let mut id = ArtifactId::EMPTY;
    id.0[..2].copy_from_slice(&artifact.to_le_bytes());
    id
}

fn node_id(n: u32) -> NodeId {
    let mut bytes = [0x51; 32];
    bytes[..4].copy_from_slice(&n.to_le_bytes());
    NodeId(bytes)
}

fn machines_of(shard: usize, nodes: u32, shards: usize) -> (u32, u32) {
    let each = nodes.div_ceil(shards as u32);
    let first = (shard as u32 * each).min(nodes);
    (first, (first + each).min(nodes))
}

fn shard_of(actor: Actor, nodes: u32, shards: usize) -> usize {
    // Services live in the first.
    if actor < nodes { (actor / nodes.div_ceil(shards as u32)) as usize } else { 0 }
}

impl Static {
    fn new(setup: &Setup) -> Self {
        let region_ids: [NodeId; REGIONS] = std::array::from_fn(|at| node_id(u32::MAX - at as u32));
        let count = setup.artifacts.len();
        let owners = (0..count as u16).map(|at| {
            let pieces = setup.artifacts[usize::from(at)].pieces;
            (0..pieces.div_ceil(shoal_proto::region::LEASE_BLOCK_PIECES))
                .map(|block| {
                    let order = lease_owners(&artifact_id(at), block, &region_ids);
                    std::array::from_fn(|place| order[place])
                })
                .collect()
        });
        Self {
            config: Arc::new(Config::default()),
            members: (0..count).map(|at| setup.members(at)).collect(),
            owners: owners.collect(),
            replaced_by: (0..count)
                .map(|at| setup.replaced_by(at).map(|newer| newer as u16))
                .collect(),
            parts: setup.artifacts.iter().map(|a| line::part_bytes(a.piece_bytes)).collect(),
            check_every: if setup.nodes <= 100 { 1 << 12 } else { 1 << 17 },
            links_stand: setup.faults.iter().all(|fault| {
                !matches!(
                    fault,
                    Fault::Churn { .. }
                        | Fault::ZoneCut { .. }
                        | Fault::Corrupt { .. }
                        | Fault::Late { .. }
                )
            }),
            setup: setup.clone(),
        }
    }

    /// A machine's zone; services have one of their own.
    fn zone(&self, actor: Actor) -> u32 {
        if actor < self.setup.nodes { actor % self.setup.zones } else { u32::MAX }
    }

    fn rack(&self, machine: Actor) -> u32 {
        let in_zone = machine / self.setup.zones;
        machine % self.setup.zones * self.setup.racks + in_zone % self.setup.racks
    }

    fn region(&self, number: usize) -> Actor {
        self.setup.nodes + number as Actor
    }

    fn bucket(&self) -> Actor {
        self.setup.nodes + REGIONS as Actor
    }

    /// One way, with its jitter.
    fn one_way_ns(&self, from: u32, to: u32, roll: u32) -> u64 {
        let rtt = if from == to { RTT_ZONE_NS } else { RTT_CROSS_NS };
        rtt / 4 + ((u64::from(roll) * (rtt / 2)) >> 32)
    }

    /// One way of a message that may be lost once.
    fn control_ns(&self, from: u32, to: u32, roll: u64) -> u64 {
        let rtt = if from == to { RTT_ZONE_NS } else { RTT_CROSS_NS };
        let lost = (roll >> 32).is_multiple_of(LOSS_ONE_IN);
        self.one_way_ns(from, to, roll as u32) + if lost { rtt * RESEND_RTTS } else { 0 }
    }

    fn owners(&self, artifact: u16, block: u32) -> [usize; REGIONS] {
        let blocks = &self.owners[usize::from(artifact)];
        blocks[(block as usize).min(blocks.len() - 1)]
    }

    fn newer(&self, artifact: u16) -> Option<u16> {
        self.replaced_by[usize::from(artifact)]
    }

    /// How many machines fetch an artifact, and whether this one may lease.
    fn place(&self, machine: Actor, artifact: u16) -> (u32, bool) {
        let fleet = self.members[usize::from(artifact)].len() as u32;
        let hash = machine_hash(&node_id(machine), &artifact_id(artifact));
        (fleet, may_lease(hash, fleet))
    }

    fn piece_len(&self, artifact: u16, piece: u32) -> u64 {
        self.setup.artifacts[usize::from(artifact)].piece_len(piece)
    }

    fn part_bytes(&self, artifact: u16) -> u64 {
        self.parts[usize::from(artifact)]
    }
}

/// Threads meet here at a window's end. They spin for a while: windows are short.
struct Meeting {
    threads: usize,
    arrived: AtomicUsize,
    round: AtomicUsize,
}

impl Meeting {
    fn wait(&self) {
        /// Spins before the processor is given to others: about 20 us.
        const SPINS: u32 = 4_000;
        if self.threads == 1 {
            return;
        }
        let round = self.round.load(Ordering::Acquire);
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.threads {
            self.arrived.store(0, Ordering::Release);
            self.round.store(round + 1, Ordering::Release);
            return;
        }
        let mut spins = 0;
        while self.round.load(Ordering::Acquire) == round {
            spins += 1;
            if spins < SPINS { std::hint::spin_loop() } else { thread::yield_now() }
        }
    }
}

/// What a shard says of itself at a window's end.
#[derive(Default)]
struct Board {
    first_window: AtomicU64,
    held_bytes: AtomicU64,
    origin_bytes: AtomicU64,
    cross_zone_bytes: AtomicU64,
    completed: AtomicU64,
    violated: AtomicBool,
}

struct Meet<'a> {
    world: &'a Static,
    meeting: Meeting,
    boards: Vec<Board>,
    mailboxes: Vec<Mutex<Vec<message::Message>>>,
    /// Machines' artifacts in all.
    pairs: u64,
}

/// The end of a shard's run, the same in each.
struct Ended {
    at_ns: u64,
    samples: Vec<Sample>,
    started_s: Vec<f64>,
    stuck: Option<String>,
}

/// Lets a world happen until every machine is complete.
pub(crate) fn run(setup: &Setup, progress: &mut dyn FnMut(Progress)) -> Run {
    let world = Static::new(setup);
    let threads = setup.threads.clamp(1, (setup.nodes / NODES_A_THREAD).max(1) as usize);
    let mut shards = build(&world, threads);
    let meet = Meet {
        world: &world,
        meeting: Meeting { threads, arrived: AtomicUsize::new(0), round: AtomicUsize::new(0) },
        boards: (0..threads).map(|_| Board::default()).collect(),
        mailboxes: (0..threads).map(|_| Mutex::default()).collect(),
        pairs: world.members.iter().map(|members| members.len() as u64).sum(),
    };
    let ended = thread::scope(|scope| {
        let (first, others) = shards.split_at_mut(1);
        for (at, shard) in others.iter_mut().enumerate() {
            let meet = &meet;
            scope.spawn(move || drive(meet, shard, at + 1, &mut |_| ()));
        }
        drive(&meet, &mut first[0], 0, progress)
    });
    collect(&world, &shards, ended)
}

/// One thread's work.
fn drive(
    meet: &Meet<'_>,
    shard: &mut Shard,
    own: usize,
    progress: &mut dyn FnMut(Progress),
) -> Ended {
    let mut triggers = Triggers::new(meet.world);
    let mut samples: Vec<Sample> = vec![Sample::default()];
    let mut step_ns = 1_000_000;
    let mut at_ns = 0;
    let total = meet.world.total_bytes() as f64;
    let ended = |at_ns, samples, triggers: Triggers, stuck| Ended {
        at_ns,
        samples,
        started_s: triggers.started_s,
        stuck,
    };
    triggers.fire(meet.world, shard, 0, 0);
    loop {
        shard.hand_over(&meet.mailboxes);
        meet.meeting.wait();
        shard.take_over(&meet.mailboxes);
        let board = &meet.boards[own];
        let counts = &shard.out.counts;
        board.first_window.store(shard.first_window().unwrap_or(u64::MAX), Ordering::Relaxed);
        board.held_bytes.store(counts.held_bytes, Ordering::Relaxed);
        board.origin_bytes.store(counts.origin_bytes, Ordering::Relaxed);
        board.cross_zone_bytes.store(counts.cross_zone_bytes, Ordering::Relaxed);
        board.completed.store(counts.completed, Ordering::Relaxed);
        board.violated.store(shard.violation.is_some(), Ordering::Relaxed);
        meet.meeting.wait();
        // From here to the next meeting nobody writes on the boards: all read the same.
        let sum = |of: fn(&Board) -> &AtomicU64| -> u64 {
            meet.boards.iter().map(|board| of(board).load(Ordering::Relaxed)).sum()
        };
        let (held, completed) = (sum(|board| &board.held_bytes), sum(|board| &board.completed));
        let sample = Sample {
            at_s: at_ns as f64 / 1e9,
            held_bytes: held,
            origin_bytes: sum(|board| &board.origin_bytes),
            cross_zone_bytes: sum(|board| &board.cross_zone_bytes),
        };
        let last = samples.last().map_or(0.0, |sample| sample.at_s);
        let done = completed == meet.pairs;
        if done || (sample.at_s - last) * 1e9 >= step_ns as f64 {
            samples.push(sample);
            let held_part = held as f64 / total;
            progress(Progress { at_s: sample.at_s, held_part, done: completed });
        }
        if samples.len() > SAMPLES_MAX {
            let mut keep = false;
            samples.retain(|_| {
                keep = !keep;
                keep
            });
            step_ns *= 2;
        }
        let violated = meet.boards.iter().any(|board| board.violated.load(Ordering::Relaxed));
        if done || violated {
            return ended(at_ns, samples, triggers, None);
        }
        let first = meet.boards.iter().map(|board| board.first_window.load(Ordering::Relaxed));
        let next = first.chain(triggers.next_ns().map(|at| at / WINDOW_NS)).min();
        let next = next.filter(|next| *next < u64::MAX);
        let Some(window) = next else {
            let stuck =
                format!("nothing happens any more; {} of {} are complete", completed, meet.pairs);
            return ended(at_ns, samples, triggers, Some(stuck));
        };
        at_ns = window * WINDOW_NS;
        if meet.world.setup.stop_at_s.is_some_and(|stop| at_ns as f64 / 1e9 > stop) {
            return ended(at_ns, samples, triggers, None);
        }
        if at_ns > LIMIT_NS {
            let stuck = format!(
                "{} of {} machines' artifacts are stuck",
                meet.pairs - completed,
                meet.pairs
            );
            return ended(at_ns, samples, triggers, Some(stuck));
        }
        triggers.fire(meet.world, shard, at_ns, held);
        shard.simulate(meet.world, window);
    }
}

impl Static {
    /// Piece bytes that all machines hold in the end.
    fn total_bytes(&self) -> u64 {
        let sizes = self.setup.artifacts.iter().zip(&self.members);
        sizes.map(|(artifact, members)| artifact.size_bytes * members.len() as u64).sum()
    }
}

fn build(world: &Static, threads: usize) -> Vec<Shard> {
    let setup = &world.setup;
    let mut rng = Pcg32::seed_from_u64(setup.seed);
    let conditions = Conditions {
        regions_alive: [true; REGIONS],
        bucket_fails: false,
        bucket_bps: setup.nic_bps * u64::from(BUCKET_NICS),
        cut_zone: None,
        published: 0,
    };
    let mut shards: Vec<Shard> =
        (0..threads).map(|own| Shard::new(world, own, threads, conditions.clone())).collect();
    let fates = triggers::fates(setup, &mut rng);
    let mut artifacts: Vec<Vec<u16>> = vec![Vec::new(); setup.nodes as usize];
    for (artifact, members) in world.members.iter().enumerate() {
        for member in members {
            artifacts[*member as usize].push(artifact as u16);
        }
    }
    let graph = network::standing(world, &fates, &mut rng);
    for id in 0..setup.nodes {
        let shard = &mut shards[shard_of(id, setup.nodes, threads)];
        let fate = &fates[id as usize];
        let made = Made {
            id,
            rate_bps: (setup.nic_bps as f64 * fate.rate).round().max(1.0) as u64,
            corrupt: fate.corrupt,
            healthy: fate.healthy(),
            late: fate.late,
            clock: rng.random_range(0..2 * machine::CLOCK_OFF_MAX.as_nanos() as u64),
        };
        let own = Pcg32::seed_from_u64(rng.random());
        let mut machine = Machine::new(world, &made, own, &artifacts[id as usize]);
        for other in &graph[id as usize] {
            machine.stands(world, &mut shard.out, *other);
        }
        if !fate.late {
            machine.switched_on(&mut shard.out, 0);
        }
        for (at, what) in fate.deaths() {
            shard.out.push(at, id, id, 0, what);
        }
        shard.machines.push(machine);
    }
    let first = &mut shards[0];
    for number in 0..REGIONS {
        first.regions.push(Region::new(world, number, Pcg32::seed_from_u64(rng.random())));
    }
    first.bucket = Some(Bucket::new(world, Pcg32::seed_from_u64(rng.random())));
    first.trunks = network::trunks(world);
    shards
}

fn collect(world: &Static, shards: &[Shard], ended: Ended) -> Run {
    let mut counts = Counts::default();
    shards.iter().for_each(|shard| counts.add(&shard.out.counts));
    let mut run = Run {
        artifacts: ended
            .started_s
            .iter()
            .map(|at| Fetched { started_s: *at, machines: Vec::new() })
            .collect(),
        samples: ended.samples,
        origin_bytes: counts.origin_bytes,
        cross_zone_bytes: counts.cross_zone_bytes,
        wasted_bytes: counts.wasted_bytes,
        messages: counts.messages,
        control_bytes: counts.control_bytes,
        digest: 0xcbf2_9ce4_8422_2325,
        ended_s: ended.at_ns as f64 / 1e9,
        ..Run::default()
    };
    let mut violations: Vec<Violation> =
        shards.iter().filter_map(|shard| shard.violation.clone()).collect();
    violations.sort_by(|a, b| a.at_s.total_cmp(&b.at_s).then(a.machine.cmp(&b.machine)));
    run.violation = violations.into_iter().next();
    if let (None, Some(what)) = (&run.violation, ended.stuck) {
        let stuck = |machine: &&Machine| {
            machine.tasks.iter().any(|task| task.completed_at.is_none() && !task.dropped)
        };
        let machine = (0..).zip(shards.iter().flat_map(|shard| &shard.machines));
        let machine = machine.filter(|(_, machine)| stuck(machine)).map(|(at, _)| at).next();
        run.violation = Some(Violation { at_s: run.ended_s, machine, what });
    }
    for (id, machine) in (0..).zip(shards.iter().flat_map(|shard| &shard.machines)) {
        run.events += machine.events;
        run.digest = (run.digest ^ machine.digest).wrapping_mul(0x0100_0000_01b3);
        run.digest ^= run.digest >> 29;
        if run.violation.is_none()
            && let Err(what) = machine.check_now()
        {
            run.violation = Some(Violation { at_s: run.ended_s, machine: Some(id), what });
        }
        for task in &machine.tasks {
            if task.dropped && task.completed_at.is_none() || !machine.is_alive() {
                continue;
            }
            run.artifacts[usize::from(task.artifact)].machines.push(Completion {
                machine: id,
                at_s: task.completed_at.map(|at| at as f64 / 1e9),
                healthy: machine.healthy,
            });
        }
    }
    if run.violation.is_none() {
        run.violation = beats_a_line(world, &run);
    }
    run
}

/// A machine that was faster than its line.
fn beats_a_line(world: &Static, run: &Run) -> Option<Violation> {
    // A machine that was switched off on the way had no more time for it, so all can be judged alike.
    for (artifact, fetched) in world.setup.artifacts.iter().zip(&run.artifacts) {
        let least_s = artifact.size_bytes as f64 * 8.0 / world.setup.nic_bps as f64;
        for completion in &fetched.machines {
            let Some(at_s) = completion.at_s else { continue };
            // Whole nanoseconds a part are rounded down.
            if at_s - fetched.started_s < least_s * 0.999_99 {
                return Some(Violation {
                    at_s,
                    machine: Some(completion.machine),
                    what: format!("complete in less than the {least_s} s that its line needs"),
                });
            }
        }
    }
    None
}
