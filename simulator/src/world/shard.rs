//! A part of the world that one thread simulates.
//!
//! Nothing that one actor does reaches another one sooner than [`WINDOW_NS`]. So within a window
//! of that length the actors do not depend on each other: each thread works through its own actors' messages,
//! actor by actor, and hands over at the window's end what it has for others' actors. What an actor
//! gets is ordered by time, sender and the sender's count, whichever thread either lives in: the result
//! is the same with any number of threads.

use std::{collections::BinaryHeap, sync::Mutex};

use shoal_swarm::prefetch;

use super::{
    Static, WINDOW_NS,
    machine::Machine,
    message::{Actor, Calendar, Message, What},
    services::{Bucket, Region, Trunk},
};
use crate::setup::Violation;

/// What happens all over the world; each shard has the same.
#[derive(Debug, Clone)]
pub(super) struct Conditions {
    pub(super) regions_alive: [bool; super::REGIONS],
    pub(super) bucket_fails: bool,
    pub(super) bucket_bps: u64,
    /// The zone that hears nothing and is heard by nobody.
    pub(super) cut_zone: Option<u32>,
    /// One bit for each artifact whose goal is out.
    pub(super) published: u64,
}

impl Conditions {
    /// Whether nothing goes from one zone to the other.
    pub(super) fn is_cut(&self, a: u32, b: u32) -> bool {
        self.cut_zone.is_some_and(|cut| (a == cut) != (b == cut))
    }
}

/// What is counted in a shard; sums over shards mean something.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Counts {
    pub(super) held_bytes: u64,
    pub(super) origin_bytes: u64,
    pub(super) cross_zone_bytes: u64,
    pub(super) wasted_bytes: u64,
    pub(super) messages: u64,
    pub(super) control_bytes: u64,
    /// Machines' artifacts that are complete, or no longer wanted.
    pub(super) completed: u64,
    pub(super) checks: u64,
}

impl Counts {
    /// A control message of so many bytes.
    pub(super) fn control(&mut self, bytes: u64) {
        self.messages += 1;
        self.control_bytes += bytes;
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.held_bytes += other.held_bytes;
        self.origin_bytes += other.origin_bytes;
        self.cross_zone_bytes += other.cross_zone_bytes;
        self.wasted_bytes += other.wasted_bytes;
        self.messages += other.messages;
        self.control_bytes += other.control_bytes;
        self.completed += other.completed;
        self.checks += other.checks;
    }
}

/// Where what actors do goes, and what they must know of the world.
pub(super) struct Out {
    pub(super) conditions: Conditions,
    pub(super) counts: Counts,
    /// The actors from here on, up to `last`, live in this shard; services live in the first.
    first: Actor,
    last: Actor,
    shards: usize,
    own: usize,
    nodes: Actor,
    calendar: Calendar,
    /// For the actor whose turn it is, within this window.
    soon: BinaryHeap<Message>,
    window_end: u64,
    outboxes: Vec<Vec<Message>>,
}

impl Out {
    /// Takes a message that an actor sends.
    pub(super) fn push(&mut self, at: u64, to: Actor, from: Actor, seq: u32, what: What) {
        let message = Message { at, to, from, seq, what };
        if at < self.window_end {
            debug_assert!(to == from, "only what an actor plans for itself may be this soon");
            self.soon.push(message);
        } else if (self.first..self.last).contains(&to) {
            self.calendar.push(message);
        } else {
            let shard = super::shard_of(to, self.nodes, self.shards);
            if shard == self.own {
                self.calendar.push(message);
            } else {
                self.outboxes[shard].push(message);
            }
        }
    }
}

/// So many machines lie in the caches: more are read ahead.
const WARM_FROM: u32 = 500;

/// How many messages happen between two steps of reading ahead what a further one needs: about as long as a read takes. Two and
/// eight are as good.
const AHEAD: usize = 4;

/// The steps: the message, and three for its machine, each by what the one before has read.
const STEPS: usize = 4;

/// What is read ahead of a window's messages. The machines lie all over the memory: read when it is needed, each of their
/// lines would be waited for.
struct Ahead {
    many: bool,
    /// The message whose first step is next.
    tick: usize,
}

impl Ahead {
    /// Begins every step that is due before the message at a place of the order happens.
    fn read(&mut self, shard: &Shard, messages: &[Message], order: &[(u64, u32)], at: usize) {
        while self.many && self.tick <= at + STEPS * AHEAD {
            for step in 0..STEPS {
                let place = self.tick.checked_sub(step * AHEAD).and_then(|at| order.get(at));
                let Some((_, place)) = place else { continue };
                let message = &messages[*place as usize];
                if step == 0 {
                    prefetch(message);
                    continue;
                }
                let machine = message.to.wrapping_sub(shard.out.first) as usize;
                let Some(machine) = shard.machines.get(machine) else { continue };
                match step {
                    1 => machine.warm(message),
                    2 => machine.warm_for(message),
                    _ => machine.warm_beyond(message),
                }
            }
            self.tick += 1;
        }
    }
}

/// The places of a window's messages in the order in which they happen: actor by actor, each one's by time, sender and
/// the sender's count. What is moved about is a small key with the place: a message is three times as long.
fn sort(messages: &[Message], start: u64, order: &mut Vec<(u64, u32)>) {
    order.clear();
    let key = |message: &Message| u64::from(message.to) << 32 | (message.at - start);
    order.extend(messages.iter().map(key).zip(0..));
    order.sort_unstable_by_key(|(key, _)| *key);
    // Few come to one actor at one moment: only those are looked at.
    for same in order.chunk_by_mut(|(a, _), (b, _)| a == b).filter(|same| same.len() > 1) {
        same.sort_unstable_by_key(|(_, place)| {
            let message = &messages[*place as usize];
            (message.from, message.seq)
        });
    }
}

/// One thread's part of the world.
pub(super) struct Shard {
    pub(super) out: Out,
    pub(super) machines: Vec<Machine>,
    /// In the first shard only.
    pub(super) regions: Vec<Region>,
    pub(super) bucket: Option<Bucket>,
    pub(super) trunks: Vec<Trunk>,
    pub(super) violation: Option<Violation>,
    /// Room for a window's order: see [`sort`].
    order: Vec<(u64, u32)>,
}

impl Shard {
    pub(super) fn new(world: &Static, own: usize, shards: usize, conditions: Conditions) -> Self {
        let nodes = world.setup.nodes;
        let (first, last) = super::machines_of(own, nodes, shards);
        Self {
            out: Out {
                conditions,
                counts: Counts::default(),
                first,
                last,
                shards,
                own,
                nodes,
                calendar: Calendar::new(),
                soon: BinaryHeap::new(),
                window_end: 0,
                outboxes: (0..shards).map(|_| Vec::new()).collect(),
            },
            machines: Vec::new(),
            regions: Vec::new(),
            bucket: None,
            trunks: Vec::new(),
            violation: None,
            order: Vec::new(),
        }
    }

    /// Hands over what is for other shards.
    pub(super) fn hand_over(&mut self, mailboxes: &[Mutex<Vec<Message>>]) {
        for (shard, outbox) in self.out.outboxes.iter_mut().enumerate() {
            if !outbox.is_empty() {
                let mut mailbox =
                    mailboxes[shard].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                mailbox.append(outbox);
            }
        }
    }

    /// Takes in what others handed over.
    pub(super) fn take_over(&mut self, mailboxes: &[Mutex<Vec<Message>>]) {
        let own = &mailboxes[self.out.own];
        let mut mailbox = own.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for message in mailbox.drain(..) {
            self.out.calendar.push(message);
        }
    }

    /// The first window with something in it.
    pub(super) fn first_window(&self) -> Option<u64> {
        self.out.calendar.first()
    }

    /// Lets everything of one window happen.
    pub(super) fn simulate(&mut self, world: &Static, window: u64) {
        let mut messages = self.out.calendar.take(window);
        let start = window * WINDOW_NS;
        self.out.window_end = start + WINDOW_NS;
        let mut order = std::mem::take(&mut self.order);
        sort(&messages, start, &mut order);
        let mut ahead = Ahead { many: world.setup.nodes > WARM_FROM, tick: 0 };
        let mut at = 0;
        let take = |messages: &mut [Message], at: &mut usize| {
            let message = &mut messages[order[*at].1 as usize];
            *at += 1;
            let what = std::mem::replace(&mut message.what, What::Gone);
            Message { what, ..*message }
        };
        while at < order.len() {
            ahead.read(self, &messages, &order, at);
            let first = take(&mut messages, &mut at);
            let actor = first.to;
            self.happens(world, first);
            loop {
                ahead.read(self, &messages, &order, at);
                let next = order.get(at).map(|(_, place)| &messages[*place as usize]);
                let next = next.filter(|message| message.to == actor);
                let message = match (next, self.out.soon.peek()) {
                    (Some(next), Some(soon)) if soon >= next => self.out.soon.pop(),
                    (Some(_), _) => Some(take(&mut messages, &mut at)),
                    (None, _) => self.out.soon.pop(),
                };
                let Some(message) = message else { break };
                self.happens(world, message);
            }
        }
        self.order = order;
        messages.clear();
        self.out.window_end = 0;
        self.out.calendar.give_back(messages);
    }

    fn happens(&mut self, world: &Static, message: Message) {
        let Message { at, to, from, what, .. } = message;
        if to < world.setup.nodes {
            let machine = &mut self.machines[(to - self.out.first) as usize];
            if let Err(what) = machine.happens(world, &mut self.out, at, from, what)
                && self.violation.is_none()
            {
                let at_s = at as f64 / 1e9;
                self.violation = Some(Violation { at_s, machine: Some(to), what });
            }
            return;
        }
        let service = (to - world.setup.nodes) as usize;
        if let Some(region) = self.regions.get_mut(service) {
            region.happens(world, &mut self.out, at, from, what);
        } else if to == world.bucket() {
            if let Some(bucket) = &mut self.bucket {
                bucket.happens(world, &mut self.out, at, from, what);
            }
        } else if let Some(trunk) = self.trunks.get_mut(service - super::REGIONS - 1) {
            trunk.happens(world, &mut self.out, at, from, what);
        }
    }
}
