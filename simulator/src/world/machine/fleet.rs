//! The others: connections, goals, region processes; and how a machine dies and comes back.

use rand::RngExt;
use shoal_swarm::{Event, PeerKey, Purpose, Swarm, SwarmKey};

use super::{LeaseAsk, Machine, POLL_NS, Peer, key};
use crate::world::{
    GOSSIP_HOP_NS, REGIONS, Static,
    line::Line,
    message::{Actor, ENVELOPE, What},
    shard::Out,
};

/// How long a region process may take to answer, as the agent has it.
pub(super) const ANSWER_TIMEOUT_NS: u64 = 3_000_000_000;

/// A silent connection is dead after this long (as the transport has it), counted from the last thing heard: a
/// keep-alive of up to 4 s before.
const IDLE_NS: u64 = 12_000_000_000;
const KEEP_ALIVE_NS: u64 = 4_000_000_000;

/// The neighbours that a machine passes a new goal on to: gossipsub's mesh.
const MESH: usize = 8;

/// Connections of a machine, as the agent has it.
const CONNECTIONS_MAX: usize = 96;

/// Dials of a machine under way.
const DIALS_MAX: usize = 64;

/// A machine asks neighbours for goals no more often than this, as the agent.
const ASK_GOALS_NS: u64 = 1_000_000_000;

impl Machine {
    /// A connection that stands before the run begins.
    pub(in crate::world) fn stands(&mut self, world: &Static, out: &mut Out, other: Actor) {
        let peer = Peer { machine: other, link: 0 };
        self.add_peer(world, out, 0, peer);
    }

    /// What a machine plans for itself when it is switched on.
    pub(in crate::world) fn switched_on(&mut self, out: &mut Out, now: u64) {
        let first = self.rng.random_range(0..POLL_NS + POLL_NS / 2);
        let life = self.life;
        self.plan(out, now + first, What::PollDue { life });
    }

    /// A zone was cut off just now: it will notice which connections are silent.
    pub(in crate::world) fn cut(&mut self, out: &mut Out, now: u64) {
        let (life, silent) = (self.life, IDLE_NS - self.rng.random_range(0..KEEP_ALIVE_NS));
        self.plan(out, now + silent, What::CutNoticed { life });
    }

    /// The machines that were off from the start are switched on.
    pub(in crate::world) fn arrives(&mut self, out: &mut Out, now: u64) {
        if !self.alive && self.life == 0 {
            self.plan(out, now + crate::world::WINDOW_NS, What::Revive);
        }
    }

    /// The policy's handle of a connection that still stands. Inlined: else it would be called with the list of
    /// peers at hand, read for nothing where all connections stand.
    #[inline(always)]
    pub(super) fn key(&self, world: &Static, machine: Actor, link: u16) -> Option<PeerKey> {
        let stands = world.links_stand || self.link(machine) == Some(link);
        stands.then(|| key(Peer { machine, link }))
    }

    #[inline(never)]
    pub(super) fn link(&self, machine: Actor) -> Option<u16> {
        let at = self.peers.binary_search_by_key(&machine, |peer| peer.machine).ok()?;
        Some(self.peers[at].link)
    }

    /// A region process, another one each time.
    pub(super) fn region(&mut self, world: &Static) -> Actor {
        self.region_turn = (self.region_turn + 1) % REGIONS;
        world.region(self.region_turn)
    }

    pub(super) fn ask_lease(
        &mut self,
        world: &Static,
        out: &mut Out,
        now: u64,
        ask: LeaseAsk,
        tried: u8,
    ) {
        let LeaseAsk { number, swarm, block, lacking, want } = ask;
        let owners = world.owners(swarm, block);
        let next =
            (usize::from(tried)..owners.len()).find(|at| self.silent_until[owners[*at]] <= now);
        let Some(at) = next else {
            self.answered(swarm, block);
            let swarm = SwarmKey(u64::from(swarm));
            return self.tell(world, out, now, Event::LeaseFailed { swarm, block });
        };
        let (life, tried) = (self.life, at as u8);
        out.counts.control(ENVELOPE * 3);
        let region = world.region(owners[at]);
        self.send(world, out, now, region, What::AskLease { swarm, block, lacking, want });
        let timeout = What::LeaseTimeout { life, tried, number };
        self.plan(out, now + ANSWER_TIMEOUT_NS, timeout);
    }

    /// Takes an open lease question out.
    pub(super) fn answered(&mut self, swarm: u16, block: u32) -> bool {
        let at = self.asks.iter().position(|ask| (ask.swarm, ask.block) == (swarm, block));
        at.map(|at| self.asks.swap_remove(at)).is_some()
    }

    pub(super) fn goal(&mut self, world: &Static, out: &mut Out, now: u64, artifact: u16) {
        if self.known >> artifact & 1 == 1 {
            return;
        }
        self.known |= 1 << artifact;
        let mesh = (self.peers.len()).min(MESH);
        let turn = self.rng.random_range(0..self.peers.len().max(1));
        for step in 0..mesh {
            let to = self.peers[(turn + step) % self.peers.len()].machine;
            out.counts.control(ENVELOPE * 20);
            self.post(world, out, now + GOSSIP_HOP_NS, to, What::Goal { artifact });
        }
        let newer = world.newer(artifact);
        if let Some(old) = world.setup.artifacts[usize::from(artifact)].replaces {
            self.drop_task(world, out, now, old as u16);
        }
        if newer.is_some_and(|newer| self.known >> newer & 1 == 1) {
            return self.drop_task(world, out, now, artifact);
        }
        self.start(world, out, now, artifact);
    }

    /// A neighbour is in a swarm that this machine knows nothing of: gossip left it out, or comes only now.
    pub(super) fn ask_for_goals(
        &mut self,
        world: &Static,
        out: &mut Out,
        now: u64,
        from: Actor,
        artifact: u16,
    ) {
        if self.known >> artifact & 1 == 0 && self.asks_goals_at <= now {
            self.asks_goals_at = now + ASK_GOALS_NS;
            out.counts.control(ENVELOPE * 4);
            let known = self.known;
            self.send(world, out, now, from, What::Known { known });
        }
    }

    /// Tells a neighbour of goals that it does not know.
    pub(super) fn tell_goals(
        &mut self,
        world: &Static,
        out: &mut Out,
        now: u64,
        to: Actor,
        known: u64,
    ) {
        for artifact in 0..world.setup.artifacts.len() as u16 {
            if (self.known & !known) >> artifact & 1 == 1 {
                out.counts.control(ENVELOPE * 20);
                self.send(world, out, now, to, What::Goal { artifact });
            }
        }
    }

    pub(super) fn drop_task(&mut self, world: &Static, out: &mut Out, now: u64, artifact: u16) {
        let task = self.tasks.iter_mut().find(|task| task.artifact == artifact);
        let Some(task) = task.filter(|task| !task.dropped) else { return };
        task.dropped = true;
        if task.completed_at.is_none() {
            out.counts.completed += 1;
        }
        let swarm = SwarmKey(u64::from(artifact));
        self.tell(world, out, now, Event::Stop { swarm });
    }

    pub(super) fn start(&mut self, world: &Static, out: &mut Out, now: u64, artifact: u16) {
        let id = self.id;
        let task = self.tasks.iter_mut().find(|task| task.artifact == artifact);
        let Some(task) = task.filter(|task| !task.dropped) else { return };
        task.started = true;
        let (fleet, may_lease) = world.place(id, artifact);
        let have = task.got.clone();
        let priority = world.setup.artifacts[usize::from(artifact)].priority;
        let purpose = if have.is_full() {
            Purpose::Seed
        } else {
            let piece_bytes = world.piece_len(artifact, 0);
            Purpose::Fetch { priority, piece_bytes, may_lease, fleet }
        };
        let (swarm, pieces) = (SwarmKey(u64::from(artifact)), have.len());
        self.tell(world, out, now, Event::Start { swarm, pieces, have, purpose });
    }

    pub(super) fn dial(&mut self, world: &Static, out: &mut Out, now: u64, other: Actor) {
        let known = other == self.id
            || self.link(other).is_some()
            || self.banned.contains(&other)
            || self.dials.iter().any(|dial| dial.machine == other);
        if known || self.peers.len() >= CONNECTIONS_MAX {
            return;
        }
        if self.dials.len() >= DIALS_MAX {
            self.dials.remove(0);
        }
        self.links = self.links.wrapping_add(1);
        // The two ends never give the same number.
        let link = self.links << 1 | u16::from(self.id < other);
        self.dials.push(Peer { machine: other, link });
        out.counts.control(ENVELOPE * 60);
        self.send(world, out, now, other, What::Connect { link });
    }

    pub(super) fn asked_to_connect(
        &mut self,
        world: &Static,
        out: &mut Out,
        now: u64,
        from: Actor,
        link: u16,
    ) {
        if self.banned.contains(&from) {
            return;
        }
        if let Some(at) = self.dials.iter().position(|dial| dial.machine == from) {
            if self.id < from {
                // Both dialled at once: ours stands.
                return;
            }
            self.dials.swap_remove(at);
        }
        if self.link(from).is_some() {
            self.drop_peer(world, out, now, from);
        }
        if self.peers.len() < CONNECTIONS_MAX {
            self.add_peer(world, out, now, Peer { machine: from, link });
            self.send(world, out, now, from, What::Connected { link });
            self.greet(world, out, now, from);
        }
    }

    /// The first message on a connection: the goals that we know.
    pub(super) fn greet(&mut self, world: &Static, out: &mut Out, now: u64, other: Actor) {
        for artifact in 0..world.setup.artifacts.len() as u16 {
            if self.known >> artifact & 1 == 1 {
                self.send(world, out, now, other, What::Goal { artifact });
            }
        }
    }

    pub(super) fn add_peer(&mut self, world: &Static, out: &mut Out, now: u64, peer: Peer) {
        if let Err(at) = self.peers.binary_search_by_key(&peer.machine, |peer| peer.machine) {
            self.peers.insert(at, peer);
            let same_zone = world.zone(peer.machine) == self.zone;
            self.tell(world, out, now, Event::PeerUp { peer: key(peer), same_zone });
        }
    }

    pub(super) fn drop_peer(&mut self, world: &Static, out: &mut Out, now: u64, machine: Actor) {
        let found = self.peers.binary_search_by_key(&machine, |peer| peer.machine);
        let Ok(at) = found else { return };
        let peer = self.peers.remove(at);
        self.live.retain(|live| live.from != machine);
        for at in (0..self.uploads.len()).rev() {
            if self.uploads[at].to == machine {
                let upload = self.uploads.swap_remove(at);
                self.line.remove(machine, upload.number);
            }
        }
        self.tell(world, out, now, Event::PeerDown { peer: key(peer) });
        self.send_next(world, out, now);
    }

    pub(super) fn dies(&mut self, world: &Static, out: &mut Out, now: u64) {
        self.alive = false;
        self.life = self.life.wrapping_add(1);
        for peer in std::mem::take(&mut self.peers) {
            // From the last keep-alive that the other side heard.
            let silent = IDLE_NS - self.rng.random_range(0..KEEP_ALIVE_NS);
            let link = peer.link;
            self.post(world, out, now + silent, peer.machine, What::Lost { link });
            self.remembered.push(peer.machine);
        }
        for region in 0..REGIONS {
            self.post(world, out, now + IDLE_NS, world.region(region), What::Gone);
        }
        self.dials.clear();
        self.live.clear();
        self.uploads.clear();
        self.asks.clear();
        self.line = Line::default();
        self.wake = u64::MAX;
        // Goals and pieces are on its disk.
        self.swarm = Swarm::new(world.config.clone(), self.rng.random());
    }

    pub(super) fn revives(&mut self, world: &Static, out: &mut Out, now: u64) {
        if std::mem::replace(&mut self.alive, true) {
            return;
        }
        self.switched_on(out, now);
        for other in std::mem::take(&mut self.remembered) {
            self.dial(world, out, now, other);
        }
        let tasks: Vec<u16> =
            self.tasks.iter().filter(|task| task.started).map(|task| task.artifact).collect();
        for artifact in tasks {
            self.start(world, out, now, artifact);
        }
        // It asks at once what it missed.
        let (region, known) = (self.region(world), self.known);
        self.send(world, out, now, region, What::Poll { known });
        if self.peers.is_empty() && self.dials.is_empty() {
            let want = world.config.neighbours_target as u16;
            let region = self.region(world);
            self.send(world, out, now, region, What::Introduce { want });
        }
    }
}
