//! One machine: the policy, and a driver modelled on the agent's.

mod fleet;
mod pieces;

use std::time::Duration;

use rand::RngExt;
use rand_pcg::Pcg32;
use shoal_proto::Bitmap;
use shoal_swarm::{
    Event, Outcome, PeerKey, RequestId, Swarm, SwarmKey, Time, Upcoming, UploadId, prefetch,
    prefetch_all,
};
use smallvec::SmallVec;

use super::{
    REGIONS, Static,
    line::Line,
    message::{Actor, ENVELOPE, Message, What},
    shard::Out,
};

/// A machine asks for its goals every this long, half more or less.
const POLL_NS: u64 = 30_000_000_000;

/// Requests of ours that lie in the machine itself, and uploads: as many as there are mostly.
const LIVE: usize = 10;
const UPLOADS: usize = 8;

/// Numbers of pieces in a cache line.
const PIECES_IN_LINE: usize = 16;

/// One connection, seen from one end.
#[derive(Debug, Clone, Copy)]
struct Peer {
    machine: Actor,
    link: u16,
}

/// What stands for the policy's request in a read of the bucket; the policy counts its requests from 0.
const OF_BUCKET: RequestId = RequestId(u64::MAX);

/// A request of ours under way, to a peer or to the bucket.
#[derive(Debug, Clone, Copy)]
struct Live {
    number: u32,
    from: Actor,
    /// [`OF_BUCKET`]: a read of the bucket.
    request: RequestId,
    piece: u32,
    last: u32,
    /// Bytes of `piece` that have not arrived.
    left: u32,
    swarm: u16,
    /// Pieces that arrived and are being verified.
    storing: u16,
}

/// A lease question that is open.
#[derive(Debug, Clone, Copy)]
struct LeaseAsk {
    number: u32,
    swarm: u16,
    block: u32,
    lacking: u64,
    want: u16,
}

/// A peer's request of us.
#[derive(Debug, Clone, Copy)]
struct Upload {
    id: u32,
    to: Actor,
    number: u32,
    swarm: u16,
    piece: u32,
}

impl Upload {
    /// Whether the policy calls it this.
    fn is(&self, id: UploadId) -> bool {
        u64::from(self.id) == id.0
    }
}

/// An artifact that this machine is to fetch.
#[derive(Debug, Clone)]
pub(super) struct Task {
    pub(super) artifact: u16,
    /// Pieces that were verified in this world: what the policy may call held.
    got: Bitmap,
    started: bool,
    pub(super) dropped: bool,
    pub(super) completed_at: Option<u64>,
}

/// A machine. The fields lie in their order, and what most happens to needs lies side by side: machines are touched in random
/// order, and what that costs is the cache lines that are waited for. A `SmallVec` ends with its length.
#[repr(C, align(64))]
pub(super) struct Machine {
    live: SmallVec<[Live; LIVE]>,
    /// When the receiving side is through with everything that is on its way.
    down_free: u64,
    hash_free: u64,
    disk_free: u64,
    /// What its clock shows when the run begins, in nanoseconds.
    clock: u64,
    /// The planned wake-up that counts; others are void.
    wake: u64,
    id: Actor,
    zone: u32,
    /// Which part of its line works.
    rate_bps: u64,
    rng: Pcg32,
    numbers: u32,
    seq: u32,
    life: u16,
    alive: bool,
    /// It sends wrong bytes.
    corrupt: bool,
    pub(super) healthy: bool,
    pub(super) events: u64,
    pub(super) digest: u64,
    known: u64,
    line: Line,
    uploads: SmallVec<[Upload; UPLOADS]>,
    pub(super) tasks: SmallVec<[Task; 1]>,
    swarm: Swarm,
    peers: Vec<Peer>,
    dials: Vec<Peer>,
    /// Those whose connections are refused for good.
    banned: Vec<Actor>,
    /// The machines that it was connected with when it died.
    remembered: Vec<Actor>,
    links: u16,
    asks: Vec<LeaseAsk>,
    silent_until: [u64; REGIONS],
    region_turn: usize,
    /// When it may ask a neighbour for goals again.
    asks_goals_at: u64,
}

/// How a machine is made.
pub(super) struct Made {
    pub(super) id: Actor,
    pub(super) rate_bps: u64,
    pub(super) corrupt: bool,
    pub(super) healthy: bool,
    pub(super) late: bool,
    pub(super) clock: u64,
}

impl Machine {
    pub(super) fn new(world: &Static, made: &Made, rng: Pcg32, artifacts: &[u16]) -> Self {
        let task = |artifact: &u16| Task {
            artifact: *artifact,
            got: Bitmap::empty(world.setup.artifacts[usize::from(*artifact)].pieces),
            started: false,
            dropped: false,
            completed_at: None,
        };
        let mut rng = rng;
        Self {
            id: made.id,
            zone: world.zone(made.id),
            rate_bps: made.rate_bps,
            corrupt: made.corrupt,
            healthy: made.healthy,
            alive: !made.late,
            life: 0,
            swarm: Swarm::new(world.config.clone(), rng.random()),
            clock: made.clock,
            rng,
            peers: Vec::new(),
            dials: Vec::new(),
            banned: Vec::new(),
            remembered: Vec::new(),
            links: 0,
            line: Line::default(),
            down_free: 0,
            hash_free: 0,
            disk_free: 0,
            live: SmallVec::new(),
            uploads: SmallVec::new(),
            asks: Vec::new(),
            silent_until: [0; REGIONS],
            region_turn: made.id as usize % REGIONS,
            numbers: 0,
            seq: 0,
            wake: u64::MAX,
            known: 0,
            asks_goals_at: 0,
            tasks: artifacts.iter().map(task).collect(),
            events: 0,
            digest: 0xcbf2_9ce4_8422_2325,
        }
    }

    /// Begins to read what a message will need of the machine itself.
    pub(super) fn warm(&self, message: &Message) {
        prefetch(&self.down_free);
        prefetch(&self.digest);
        match &message.what {
            What::Bytes { .. } => prefetch_all(&self.live),
            What::Stored { .. } | What::Refused { .. } => {
                prefetch_all(&self.live);
                prefetch(&self.tasks);
                self.swarm.warm();
            }
            What::Credit { .. } => prefetch_all(&self.line),
            What::LineFree { .. } => {
                prefetch_all(&self.line);
                prefetch_all(&self.uploads);
            }
            What::Ask { .. } => {
                prefetch_all(&self.uploads);
                self.swarm.warm();
            }
            What::Have { pieces, .. } => {
                // 32 numbers or fewer, mostly.
                pieces.iter().step_by(PIECES_IN_LINE).for_each(prefetch);
                self.swarm.warm();
            }
            _ => self.swarm.warm(),
        }
    }

    /// Begins to read what a message needs of what the machine points to.
    pub(super) fn warm_for(&self, message: &Message) {
        match &message.what {
            What::LineFree { .. } if self.line.ending.is_some() => self.swarm.warm(),
            What::LineFree { .. } => {}
            _ => {
                if let Some(upcoming) = self.upcoming(message) {
                    self.swarm.warm_for(upcoming);
                }
                if let (What::Stored { piece, .. }, Some(task)) =
                    (&message.what, self.tasks.first())
                {
                    task.got
                        .words()
                        .get((*piece / u64::BITS) as usize)
                        .into_iter()
                        .for_each(prefetch);
                }
            }
        }
    }

    /// Begins to read what lies beyond that.
    pub(super) fn warm_beyond(&self, message: &Message) {
        match self.upcoming(message) {
            Some(upcoming @ Upcoming::Served) => self.swarm.warm_for(upcoming),
            Some(upcoming) => self.swarm.warm_beyond(upcoming),
            None => {}
        }
    }

    /// What the policy will hear by a message.
    fn upcoming<'a>(&self, message: &'a Message) -> Option<Upcoming<'a>> {
        let peer = |link: u16| key(Peer { machine: message.from, link });
        let swarm = |swarm: u16| SwarmKey(swarm.into());
        Some(match &message.what {
            What::Have { link, swarm: of, pieces } => {
                Upcoming::Have(peer(*link), swarm(*of), pieces)
            }
            What::Offer { link, swarm: of, piece } => {
                Upcoming::Offered(peer(*link), swarm(*of), *piece)
            }
            What::Ask { link, swarm: of, piece, .. } => {
                Upcoming::Asked(peer(*link), swarm(*of), *piece)
            }
            What::Stored { number, .. } | What::Refused { number, .. } => {
                let live = self.live.iter().find(|live| live.number == *number)?;
                (live.request != OF_BUCKET).then_some(Upcoming::Ended(live.request))?
            }
            What::LineFree { .. } if self.line.ending.is_some() => Upcoming::Served,
            _ => return None,
        })
    }

    pub(super) fn is_alive(&self) -> bool {
        self.alive
    }

    fn trace(&mut self, now: u64, what: &What) {
        self.events += 1;
        let (kind, subject) = what.code();
        for word in [now, u64::from(kind) << 32 | u64::from(subject)] {
            self.digest = (self.digest ^ word).wrapping_mul(0x0100_0000_01b3);
            self.digest ^= self.digest >> 29;
        }
    }

    /// Something happens to this machine. An error is a violation.
    pub(super) fn happens(
        &mut self,
        world: &Static,
        out: &mut Out,
        now: u64,
        from: Actor,
        what: What,
    ) -> Result<(), String> {
        if !self.alive && !matches!(what, What::Revive) {
            if let What::Bytes { bytes, .. } = what {
                out.counts.wasted_bytes += u64::from(bytes);
            }
            return Ok(());
        }
        if let What::Wake = what {
            if self.wake != now {
                return Ok(());
            }
            self.wake = u64::MAX;
        }
        self.trace(now, &what);
        if world.setup.watch == Some(self.id) {
            eprintln!("{:>14.9} s machine {} from {from}: {what:?}", now as f64 / 1e9, self.id);
        }
        match what {
            What::Join { link, swarm, have } => {
                if let Some(peer) = self.key(world, from, link) {
                    self.ask_for_goals(world, out, now, from, swarm);
                    let swarm = SwarmKey(u64::from(swarm));
                    self.tell(world, out, now, Event::PeerJoined { peer, swarm, have });
                }
            }
            What::Have { link, swarm, pieces } => {
                if let Some(peer) = self.key(world, from, link) {
                    let swarm = SwarmKey(u64::from(swarm));
                    self.tell(world, out, now, Event::PeerHave { peer, swarm, pieces });
                }
            }
            What::Leave { link, swarm } => {
                if let Some(peer) = self.key(world, from, link) {
                    let swarm = SwarmKey(u64::from(swarm));
                    self.tell(world, out, now, Event::PeerLeft { peer, swarm });
                }
            }
            What::Offer { link, swarm, piece } => {
                if let Some(peer) = self.key(world, from, link) {
                    let swarm = SwarmKey(u64::from(swarm));
                    self.tell(world, out, now, Event::Offered { peer, swarm, piece });
                }
            }
            What::Goal { artifact } => self.goal(world, out, now, artifact),
            What::Known { known } => self.tell_goals(world, out, now, from, known),
            What::Ask { link, swarm, piece, number } => {
                if let Some(peer) = self.key(world, from, link) {
                    let id = self.number();
                    self.uploads.push(Upload { id, to: from, number, swarm, piece: piece.0 });
                    let swarm = SwarmKey(u64::from(swarm));
                    let asked =
                        Event::UploadAsked { upload: UploadId(id.into()), peer, swarm, piece };
                    self.tell(world, out, now, asked);
                }
            }
            What::Cancel { number } => {
                let same = |upload: &Upload| upload.to == from && upload.number == number;
                if let Some(at) = self.uploads.iter().position(same) {
                    let upload = UploadId(self.uploads.swap_remove(at).id.into());
                    self.line.remove(from, number);
                    self.tell(world, out, now, Event::UploadEnded { upload, whole: false });
                }
            }
            What::Refused { number, busy } => {
                let outcome = if busy { Outcome::Busy } else { Outcome::NotHere };
                if let Some(at) = self.live.iter().position(|live| live.number == number) {
                    let live = self.live.swap_remove(at);
                    self.ended(world, out, now, live, outcome);
                }
            }
            What::Bytes { number, bytes, tail_ns, corrupt, .. } => {
                self.received(world, out, now, from, (number, bytes, tail_ns, corrupt));
            }
            What::Credit { number } => {
                self.line.credit(from, number);
                self.send_next(world, out, now);
            }
            What::LineFree { life } if life == self.life => {
                self.line.busy = false;
                if let Some(upload) = self.line.ending.take() {
                    if let Some(at) = self.uploads.iter().position(|own| own.id == upload) {
                        self.uploads.swap_remove(at);
                    }
                    let upload = UploadId(upload.into());
                    self.tell(world, out, now, Event::UploadEnded { upload, whole: true });
                }
                self.send_next(world, out, now);
            }
            What::Stored { life, number, piece, corrupt } if life == self.life => {
                self.stored(world, out, now, number, piece, corrupt);
            }
            What::Connect { link } => self.asked_to_connect(world, out, now, from, link),
            What::Connected { link } => {
                let same = |dial: &Peer| dial.machine == from && dial.link == link;
                if let Some(at) = self.dials.iter().position(same) {
                    let peer = self.dials.swap_remove(at);
                    self.add_peer(world, out, now, peer);
                    self.greet(world, out, now, from);
                }
            }
            What::Lost { link } if self.key(world, from, link).is_some() => {
                self.drop_peer(world, out, now, from);
            }
            What::LeaseGranted { swarm, block, first, count } if self.answered(swarm, block) => {
                let (swarm, duration) = (SwarmKey(u64::from(swarm)), shoal_swarm::LEASE_DURATION);
                let granted = Event::LeaseGranted { swarm, block, first, count, duration };
                self.tell(world, out, now, granted);
            }
            What::LeaseDenied { swarm, all_blocks, block, retry }
                if self.answered(swarm, block) =>
            {
                let swarm = SwarmKey(u64::from(swarm));
                let denied = Event::LeaseDenied { swarm, block, retry, all_blocks };
                self.tell(world, out, now, denied);
            }
            What::LeaseTimeout { life, tried, number } if life == self.life => {
                let open = self.asks.iter().find(|ask| ask.number == number);
                if let Some(ask) = open.copied() {
                    let owner = world.owners(ask.swarm, ask.block)[usize::from(tried)];
                    self.silent_until[owner] = now + fleet::ANSWER_TIMEOUT_NS;
                    self.ask_lease(world, out, now, ask, tried + 1);
                }
            }
            What::Introduced { machines } => {
                for machine in machines {
                    self.dial(world, out, now, machine);
                }
            }
            What::ReadFailed { number } => self.read_failed(world, out, now, number),
            What::ReadTimeout { life, number } if life == self.life => {
                self.read_failed(world, out, now, number);
            }
            What::PollDue { life } if life == self.life => {
                let region = self.region(world);
                out.counts.control(ENVELOPE * 2);
                let known = self.known;
                self.send(world, out, now, region, What::Poll { known });
                let pause = POLL_NS / 2 + self.rng.random_range(0..POLL_NS);
                self.plan(out, now + pause, What::PollDue { life });
            }
            What::CutNoticed { life } if life == self.life => {
                let gone: Vec<Actor> = self.peers.iter().map(|peer| peer.machine).collect();
                for other in gone {
                    if out.conditions.is_cut(self.zone, world.zone(other)) {
                        self.drop_peer(world, out, now, other);
                    }
                }
            }
            What::Wake => {
                if self.swarm.next_timeout().is_some_and(|due| due.0 <= now + self.clock) {
                    self.tell(world, out, now, Event::Timeout);
                } else {
                    self.plan_wake(out, now);
                }
            }
            What::Die => self.dies(world, out, now),
            What::Revive => self.revives(world, out, now),
            // Planned in an earlier life, or no longer waited for.
            _ => {}
        }
        self.check(world, out)
    }

    fn number(&mut self) -> u32 {
        self.numbers = self.numbers.wrapping_add(1);
        self.numbers
    }

    fn plan(&mut self, out: &mut Out, at: u64, what: What) {
        self.seq = self.seq.wrapping_add(1);
        out.push(at, self.id, self.id, self.seq, what);
    }

    /// Sends a control message: it arrives after the way there, later if it was lost once.
    fn send(&mut self, world: &Static, out: &mut Out, now: u64, to: Actor, what: What) {
        let roll = self.rng.random();
        let arrives = now + world.control_ns(self.zone, world.zone(to), roll);
        self.post(world, out, arrives, to, what);
    }

    /// Sends what arrives at a known time, unless no way leads there.
    fn post(&mut self, world: &Static, out: &mut Out, arrives: u64, to: Actor, what: What) {
        if !out.conditions.is_cut(self.zone, world.zone(to)) {
            self.seq = self.seq.wrapping_add(1);
            out.push(arrives, to, self.id, self.seq, what);
        }
    }

    fn tell(&mut self, world: &Static, out: &mut Out, now: u64, event: Event) {
        self.swarm.handle(Time(now + self.clock), event);
        while let Some(action) = self.swarm.poll_action() {
            self.act(world, out, now, action);
        }
        self.plan_wake(out, now);
    }

    fn plan_wake(&mut self, out: &mut Out, now: u64) {
        let Some(due) = self.swarm.next_timeout() else { return };
        let due = due.0.saturating_sub(self.clock).max(now + 1);
        // A wake-up that comes too early finds nothing due and plans the next one.
        if due < self.wake {
            self.wake = due;
            self.plan(out, due, What::Wake);
        }
    }

    /// Looks, now and then, whether what must hold does.
    fn check(&self, world: &Static, out: &mut Out) -> Result<(), String> {
        if !self.events.is_multiple_of(world.check_every) {
            return Ok(());
        }
        out.counts.checks += 1;
        self.check_now()
    }

    /// The policy's invariants, and that it holds nothing that was not verified.
    pub(super) fn check_now(&self) -> Result<(), String> {
        self.swarm.check_invariants()?;
        for task in &self.tasks {
            let held = self.swarm.held(SwarmKey(u64::from(task.artifact)));
            for (held, got) in
                held.iter().flat_map(|held| held.words().iter().zip(task.got.words()))
            {
                if held & !got != 0 {
                    return Err(format!(
                        "artifact {} counts a piece as held that was never verified",
                        task.artifact
                    ));
                }
            }
            if task.completed_at.is_some() && !task.got.is_full() {
                return Err(format!("artifact {} is complete without all pieces", task.artifact));
            }
        }
        Ok(())
    }
}

fn key(peer: Peer) -> PeerKey {
    PeerKey(u64::from(peer.link) << 32 | u64::from(peer.machine))
}

fn parts(key: PeerKey) -> (Actor, u16) {
    (key.0 as Actor, (key.0 >> 32) as u16)
}

/// A clock that is wrong by up to this much.
pub(super) const CLOCK_OFF_MAX: Duration = Duration::from_secs(600);
