//! What is not a machine: region processes, the bucket, and trunks between racks and zones.

use rand::RngExt;
use rand_pcg::Pcg32;
use shoal_swarm::{LeaseAnswer, LeaseBook, Time};

use super::{
    Static,
    line::{Flow, Line, line_ns},
    message::{Actor, ENVELOPE, What},
    shard::Out,
};

/// Requests that the bucket answers in a second: what S3 promises for one prefix.
const BUCKET_REQUESTS_PER_S: u64 = 5_500;

/// A region process: lease books, introductions, goals.
pub(super) struct Region {
    id: Actor,
    number: usize,
    books: Vec<LeaseBook>,
    rng: Pcg32,
    seq: u32,
}

impl Region {
    pub(super) fn new(world: &Static, number: usize, rng: Pcg32) -> Self {
        let books = world.setup.artifacts.iter().map(|artifact| LeaseBook::new(artifact.pieces));
        Self { id: world.region(number), number, books: books.collect(), rng, seq: 0 }
    }

    fn send(&mut self, world: &Static, out: &mut Out, now: u64, to: Actor, what: What) {
        if out.conditions.is_cut(world.zone(self.id), world.zone(to)) {
            return;
        }
        let roll = self.rng.random();
        let arrives = now + world.control_ns(world.zone(self.id), world.zone(to), roll);
        self.seq = self.seq.wrapping_add(1);
        out.push(arrives, to, self.id, self.seq, what);
    }

    /// Publishes a goal to the machines of its mesh.
    pub(super) fn publish(&mut self, world: &Static, out: &mut Out, now: u64, artifact: u16) {
        /// gossipsub's mesh of one process.
        const MESH: u32 = 8;
        for _ in 0..MESH.min(world.setup.nodes) {
            let to = self.rng.random_range(0..world.setup.nodes);
            self.seq = self.seq.wrapping_add(1);
            out.push(now + super::GOSSIP_HOP_NS, to, self.id, self.seq, What::Goal { artifact });
        }
    }

    pub(super) fn happens(
        &mut self,
        world: &Static,
        out: &mut Out,
        now: u64,
        from: Actor,
        what: What,
    ) {
        if !out.conditions.regions_alive[self.number] {
            return;
        }
        match what {
            What::AskLease { swarm, block, lacking, want } => {
                let book = &mut self.books[usize::from(swarm)];
                let answer = match book.ask(Time(now), u64::from(from), block, lacking, want) {
                    LeaseAnswer::Granted { first, count, .. } => {
                        What::LeaseGranted { swarm, block, first, count }
                    }
                    LeaseAnswer::Retry(wait) => {
                        What::LeaseDenied { swarm, all_blocks: false, block, retry: Some(wait) }
                    }
                    LeaseAnswer::Later(wait) => {
                        What::LeaseDenied { swarm, all_blocks: true, block, retry: Some(wait) }
                    }
                    LeaseAnswer::AllHeld => {
                        What::LeaseDenied { swarm, all_blocks: false, block, retry: None }
                    }
                };
                out.counts.control(ENVELOPE);
                self.send(world, out, now, from, answer);
            }
            What::LeaseDone { swarm, first, count, held } => {
                let book = &mut self.books[usize::from(swarm)];
                book.done(Time(now), u64::from(from), first, count, held);
            }
            What::Gone => {
                for book in &mut self.books {
                    book.lost(Time(now), u64::from(from));
                }
            }
            What::Introduce { want } => {
                let machines: Box<[Actor]> =
                    (0..u32::from(want)).map(|pick| self.anyone(world, from, pick)).collect();
                out.counts.control(ENVELOPE + machines.len() as u64 * 80);
                self.send(world, out, now, from, What::Introduced { machines });
            }
            What::Poll { known } => {
                out.counts.control(ENVELOPE);
                for artifact in 0..world.setup.artifacts.len() as u16 {
                    if out.conditions.published >> artifact & 1 == 1 && known >> artifact & 1 == 0 {
                        out.counts.control(ENVELOPE * 10);
                        self.send(world, out, now, from, What::Goal { artifact });
                    }
                }
            }
            _ => {}
        }
    }

    fn anyone(&mut self, world: &Static, asker: Actor, pick: u32) -> Actor {
        let (nodes, zones) = (world.setup.nodes, world.setup.zones);
        let other = self.rng.random_range(0..nodes);
        if pick.is_multiple_of(super::ANY_ZONE_ONE_IN) {
            return other;
        }
        let same = other - other % zones + world.zone(asker);
        if same < nodes { same } else { other }
    }
}

/// The region's bucket.
pub(super) struct Bucket {
    id: Actor,
    line: Line,
    uploads: u32,
    /// When the next request is taken.
    free: u64,
    rng: Pcg32,
    seq: u32,
}

impl Bucket {
    pub(super) fn new(world: &Static, rng: Pcg32) -> Self {
        Self { id: world.bucket(), line: Line::default(), uploads: 0, free: 0, rng, seq: 0 }
    }

    fn post(&mut self, world: &Static, out: &mut Out, at: u64, to: Actor, what: What) {
        if to == self.id || !out.conditions.is_cut(world.zone(self.id), world.zone(to)) {
            self.seq = self.seq.wrapping_add(1);
            out.push(at, to, self.id, self.seq, what);
        }
    }

    pub(super) fn happens(
        &mut self,
        world: &Static,
        out: &mut Out,
        now: u64,
        from: Actor,
        what: What,
    ) {
        match what {
            What::Read { number, .. } if out.conditions.bucket_fails => {
                let arrives = now
                    + world.control_ns(world.zone(self.id), world.zone(from), self.rng.random());
                self.post(world, out, arrives, from, What::ReadFailed { number });
            }
            What::Read { swarm, first, count, number, admitted: false } if self.free > now => {
                // Beyond its rate of requests it makes them wait.
                let at = self.free.max(now + super::WINDOW_NS);
                self.free += 1_000_000_000 / BUCKET_REQUESTS_PER_S;
                self.seq = self.seq.wrapping_add(1);
                let read = What::Read { swarm, first, count, number, admitted: true };
                out.push(at, self.id, from, self.seq | 1 << 31, read);
                return;
            }
            What::Read { swarm, first, count, number, admitted } => {
                if !admitted {
                    self.free = now + 1_000_000_000 / BUCKET_REQUESTS_PER_S;
                }
                self.uploads = self.uploads.wrapping_add(1);
                self.line.add(Flow {
                    to: from,
                    number,
                    swarm,
                    piece: first,
                    last: first + u32::from(count) - 1,
                    left: world.piece_len(swarm, first) as u32,
                    in_flight: 0,
                    upload: self.uploads,
                });
            }
            What::Credit { number } => self.line.credit(from, number),
            What::LineFree { .. } => {
                self.line.busy = false;
                self.line.ending = None;
            }
            _ => {}
        }
        self.send_next(world, out, now);
    }

    fn send_next(&mut self, world: &Static, out: &mut Out, now: u64) {
        if self.line.busy {
            return;
        }
        let next = self.line.next(|swarm| world.parts(swarm), |swarm, p| world.piece_len(swarm, p));
        let Some((flow, bytes)) = next else { return };
        self.line.busy = true;
        out.counts.origin_bytes += bytes;
        let took = line_ns(bytes, out.conditions.bucket_bps);
        self.post(world, out, now + took, self.id, What::LineFree { life: 0 });
        let (own, zone) = (world.zone(self.id), world.zone(flow.to));
        let arrives = now + world.one_way_ns(own, zone, self.rng.random());
        let part = What::Bytes {
            to: flow.to,
            number: flow.number,
            bytes: bytes as u32,
            tail_ns: took as u32,
            corrupt: false,
        };
        self.post(world, out, arrives, flow.to, part);
    }
}

/// A line that machines share on their way out of, or into, a rack or a zone: first come, first served.
pub(super) struct Trunk {
    id: Actor,
    rate_bps: u64,
    free: u64,
    seq: u32,
}

impl Trunk {
    pub(super) fn new(id: Actor, rate_bps: u64) -> Self {
        Self { id, rate_bps, free: 0, seq: 0 }
    }

    pub(super) fn happens(
        &mut self,
        world: &Static,
        out: &mut Out,
        now: u64,
        from: Actor,
        what: What,
    ) {
        let What::Bytes { to, number, bytes, tail_ns, corrupt } = what else { return };
        let took = line_ns(u64::from(bytes), self.rate_bps);
        let begins = self.free.max(now);
        self.free = begins + took;
        self.seq = self.seq.wrapping_add(1);
        let tail_ns = tail_ns.max(took as u32);
        let part = What::Bytes { to, number, bytes, tail_ns, corrupt };
        let hop = world.next_hop(self.id, from, to);
        // The sender stays the sender: credits go to it.
        out.push(begins + super::TRUNK_NS, hop, from, self.seq | 1 << 31, part);
    }
}
