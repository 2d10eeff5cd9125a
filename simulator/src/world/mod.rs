//! The world: machines that are the real policy, and what lies between them.
//!
//! [`run`] builds it from a [`Setup`] and lets it happen. [`shard`] says how that is done on several
//! threads with one result; [`fixed`] what never changes; [`machine`] is the model of an agent; [`mod@line`] of what
//! it is joined to others with; [`services`] of region processes, bucket and trunks; [`triggers`] of what goes wrong and when.

mod fixed;
mod line;
mod machine;
mod message;
mod network;
mod services;
mod shard;
mod triggers;

use std::{
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread,
};

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg32;

use self::{
    fixed::Static,
    machine::{Machine, Made},
    message::Actor,
    services::{Bucket, Region},
    shard::{Conditions, Counts, Shard},
    triggers::Triggers,
};
use crate::setup::{
    BUCKET_NICS, Completion, Fetched, REGION_PROCESSES, Run, Sample, Setup, Violation,
};

/// Round trip between two machines of a zone, before jitter, in nanoseconds.
const RTT_ZONE_NS: u64 = 500_000;

/// Round trip between two zones, and to the region processes and the bucket, before jitter.
const RTT_CROSS_NS: u64 = 1_500_000;

/// One hop of gossip.
const GOSSIP_HOP_NS: u64 = 5_000_000;

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

fn machines_of(shard: usize, nodes: u32, shards: usize) -> (u32, u32) {
    let each = nodes.div_ceil(shards as u32);
    let first = (shard as u32 * each).min(nodes);
    (first, (first + each).min(nodes))
}

fn shard_of(actor: Actor, nodes: u32, shards: usize) -> usize {
    // Services live in the first.
    if actor < nodes { (actor / nodes.div_ceil(shards as u32)) as usize } else { 0 }
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
