//! Neighbours: meeting them, hearing them, telling them.

use std::{
    collections::{BTreeMap, HashSet},
    time::{Duration, Instant},
};

use rand::seq::IteratorRandom as _;
use shoal_pki::Role;
use shoal_proto::{
    ArtifactId, NodeId,
    goal::SignedGoal,
    peer::{CloseReason, PEERS_BATCH_MAX, PeerAddr, PeerMessage},
};
use shoal_swarm::{Event, PeerKey, SwarmKey};
use shoal_transport::{Connection, SendError};

use super::{DIALS_MAX, Driver, EARLY_JOINS_MAX, Input, Peer};
use crate::{link::take_goal, regions::REGION_PROCESSES_MAX};

/// How many machines a new neighbour is told of.
const EXCHANGE_PEERS: usize = 16;

/// How many apps a Hello names, so that it is never too long; polling is the certain way for the others.
const HELLO_REVISIONS_MAX: usize = 128;

/// How many machines are remembered for a swarm beside those that are connected.
const KNOWN_MAX: usize = 512;

impl Driver {
    pub(super) fn connected(&mut self, connection: Connection) {
        self.parts.standing.tell(&connection);
        let member = connection.member().clone();
        if member.role != Role::Agent || self.parts.regions.is_region(&member.node) {
            return;
        }
        if self.banned.contains(&member.node) {
            connection.close(CloseReason::Banned);
            return;
        }
        tracing::debug!(machine = %member.machine, "neighbour");
        let peer = PeerKey(self.key());
        // A new connection's queue is empty.
        let _ = connection.try_send(&self.hello());
        if let Some(old) = self.by_node.insert(member.node, peer) {
            self.forget(old);
        }
        let state = Peer {
            connection,
            addr: None,
            early: BTreeMap::new(),
            resend: HashSet::new(),
            exchanged: HashSet::new(),
        };
        self.peers.insert(peer, state);
        // Room for the region processes and for new swarms: the longest idle neighbour goes.
        if self.peers.len() + REGION_PROCESSES_MAX >= self.parts.max_connections {
            let connections = self.peers.values().map(|state| &state.connection);
            if let Some(idle) = connections.max_by_key(|connection| connection.stats().idle) {
                idle.close(CloseReason::Idle);
            }
        }
        self.parts.metrics.neighbours.set(self.peers.len() as i64);
    }

    fn forget(&mut self, peer: PeerKey) {
        if let Some(addr) = self.peers.remove(&peer).and_then(|state| state.addr) {
            self.parts.neighbours.note(addr);
            self.tell(Event::PeerDown { peer });
        }
        self.uploads.retain(|_, asked| asked.peer != peer);
        self.parts.metrics.neighbours.set(self.peers.len() as i64);
    }

    pub(super) fn closed(&mut self, connection: &Connection, reason: &str) {
        let node = connection.member().node;
        let Some(peer) = self.by_node.get(&node).copied() else { return };
        if !self.peers.get(&peer).is_some_and(|state| state.connection == *connection) {
            return;
        }
        tracing::debug!(machine = %connection.member().machine, reason, "neighbour gone");
        self.by_node.remove(&node);
        self.forget(peer);
    }

    pub(super) fn message(&mut self, connection: &Connection, message: PeerMessage) {
        // Region processes say it, too, and are no neighbours.
        if let PeerMessage::Standing { trust, .. } = message {
            return self.parts.standing.heard(connection, trust);
        }
        let node = connection.member().node;
        let Some(peer) = self.by_node.get(&node).copied() else { return };
        // What is left in the queue of a connection that was replaced is not the new one's.
        if self.peers.get(&peer).is_none_or(|state| state.connection != *connection) {
            return;
        }
        match message {
            PeerMessage::Hello { me, revisions } => {
                // It speaks for itself only.
                if me.node != node || me.machine != connection.member().machine {
                    connection.close(CloseReason::WrongPeer);
                    return;
                }
                self.greeted(peer, me, &revisions);
            }
            PeerMessage::Goal(signed) => self.heard_goal(signed),
            PeerMessage::Standing { .. } => {}
            PeerMessage::Join { artifact, have } => {
                tracing::debug!(machine = %connection.member().machine, %artifact, pieces = have.count(), "neighbour takes part");
                match self.by_artifact.get(&artifact).copied() {
                    Some(swarm) => {
                        self.tell(Event::PeerJoined { peer, swarm, have: have.into() });
                        self.exchange(peer, swarm);
                    }
                    None => {
                        if let Some(state) = self.peers.get_mut(&peer)
                            && (state.early.len() < EARLY_JOINS_MAX
                                || state.early.contains_key(&artifact))
                        {
                            state.early.insert(artifact, have);
                        }
                        self.ask_for_goals(peer);
                    }
                }
            }
            PeerMessage::Have { artifact, pieces } => {
                match self.by_artifact.get(&artifact).copied() {
                    Some(swarm) => {
                        self.tell(Event::PeerHave { peer, swarm, pieces: pieces.into() });
                    }
                    None => {
                        let early = self
                            .peers
                            .get_mut(&peer)
                            .and_then(|state| state.early.get_mut(&artifact));
                        if let Some(have) = early {
                            pieces.iter().for_each(|piece| {
                                have.insert(piece.0);
                            });
                        }
                    }
                }
            }
            PeerMessage::Leave { artifact } => {
                if let Some(state) = self.peers.get_mut(&peer) {
                    state.early.remove(&artifact);
                }
                if let Some(swarm) = self.by_artifact.get(&artifact).copied() {
                    self.tell(Event::PeerLeft { peer, swarm });
                }
            }
            PeerMessage::Offer { artifact, piece } => {
                if let Some(swarm) = self.by_artifact.get(&artifact).copied() {
                    self.tell(Event::Offered { peer, swarm, piece });
                }
            }
            PeerMessage::Peers { artifact, peers } => {
                if let Some(swarm) = self.by_artifact.get(&artifact).copied() {
                    self.learn(swarm, peers);
                }
            }
        }
    }

    fn greeted(
        &mut self,
        peer: PeerKey,
        me: PeerAddr,
        revisions: &[(shoal_proto::AppName, shoal_proto::Revision)],
    ) {
        let Some(state) = self.peers.get_mut(&peer) else { return };
        let first = state.addr.is_none();
        let same_zone = me.zone == self.parts.me.zone;
        let known = self.parts.goals.all();
        for (app, revision) in revisions {
            if let Some(goal) = known.get(app).filter(|known| known.goal.revision > *revision) {
                // Lost when its queue is full; its poll is the certain way.
                let _ = state.connection.try_send(&PeerMessage::Goal(goal.signed.clone()));
            }
        }
        let gossip = (me.node, me.gossip);
        self.parts.neighbours.note(me.clone());
        state.addr = Some(me);
        if first {
            self.tell(Event::PeerUp { peer, same_zone });
            let handle = self.parts.gossip.clone();
            tokio::spawn(async move {
                let _ = handle.add_peers(vec![gossip]).await;
            });
        }
    }

    /// Who we are, and which goals we know.
    fn hello(&self) -> PeerMessage {
        let mut revisions = self.parts.goals.revisions();
        revisions.truncate(HELLO_REVISIONS_MAX);
        PeerMessage::Hello { me: self.parts.me.clone(), revisions }
    }

    /// A neighbour is in a swarm that we know nothing of: gossip may have left us out, and our next poll is far away. Who
    /// hears what we know answers with what we lack.
    fn ask_for_goals(&mut self, peer: PeerKey) {
        /// One neighbour's answer is enough, unless it is lost.
        const PAUSE: Duration = Duration::from_secs(1);
        if self.asked_for_goals.is_some_and(|asked| asked.elapsed() < PAUSE) {
            return;
        }
        self.asked_for_goals = Some(Instant::now());
        let hello = self.hello();
        if let Some(state) = self.peers.get(&peer) {
            let _ = state.connection.try_send(&hello);
        }
    }

    /// Takes a neighbour's goal, aside: it is synced to the disk first.
    fn heard_goal(&self, signed: SignedGoal) {
        let (goals, metrics) = (self.parts.goals.clone(), self.parts.metrics.clone());
        tokio::task::spawn_blocking(move || take_goal(&goals, &metrics, &signed, "a neighbour"));
    }

    /// Tells a new neighbour, once for each swarm, of others in it.
    fn exchange(&mut self, peer: PeerKey, swarm: SwarmKey) {
        let Some(part) = self.swarms.get(&swarm) else { return };
        let Some(node) = self.peers.get(&peer).map(|state| state.connection.member().node) else {
            return;
        };
        let others = self
            .peers
            .values()
            .filter_map(|state| state.addr.as_ref())
            .chain(part.known.values())
            .filter(|addr| addr.node != node)
            .cloned()
            .sample(&mut rand::rng(), EXCHANGE_PEERS);
        let artifact = part.artifact.manifest().artifact;
        if let Some(state) = self.peers.get_mut(&peer)
            && !others.is_empty()
            && state.exchanged.insert(swarm)
        {
            // Only a help: lost when the queue is full.
            let _ = state.connection.try_send(&PeerMessage::Peers { artifact, peers: others });
        }
    }

    /// Sends a message about a swarm; when the queue is full, the whole bitmap goes out later instead.
    pub(super) fn send_about(
        &mut self,
        peer: PeerKey,
        swarm: SwarmKey,
        message: impl FnOnce(ArtifactId) -> PeerMessage,
    ) {
        let Some(part) = self.swarms.get(&swarm) else { return };
        let Some(state) = self.peers.get_mut(&peer) else { return };
        let message = message(part.artifact.manifest().artifact);
        if let Err(SendError::Full) = state.connection.try_send(&message) {
            state.resend.insert(swarm);
        }
    }

    /// Tries again what did not fit.
    pub(super) fn resend(&mut self) {
        let swarms = &self.swarms;
        for state in self.peers.values_mut().filter(|state| !state.resend.is_empty()) {
            let connection = &state.connection;
            state.resend.retain(|swarm| {
                let Some(part) = swarms.get(swarm) else { return false };
                let artifact = part.artifact.manifest().artifact;
                let message = PeerMessage::Join { artifact, have: part.artifact.have() };
                matches!(connection.try_send(&message), Err(SendError::Full))
            });
        }
    }

    /// Asks the region processes for neighbours, and makes this machine known to them.
    pub(super) fn introduce(&mut self, swarm: SwarmKey, want: u16) {
        let Some(part) = self.swarms.get(&swarm) else { return };
        let (regions, inputs) = (self.parts.regions.clone(), self.inputs.clone());
        let (me, artifact) = (self.parts.me.clone(), part.artifact.manifest().artifact);
        let complete = part.artifact.have().is_full();
        tokio::spawn(async move {
            if let Ok(peers) = regions.introduce(&me, artifact, complete, want).await {
                let _ = inputs.send(Input::Introduced(swarm, peers)).await;
            }
        });
        // Those who were heard of and not reached may be there by now.
        self.dial_known(swarm);
    }

    /// Remembers machines of a swarm and connects to them.
    pub(super) fn learn(&mut self, swarm: SwarmKey, peers: Vec<PeerAddr>) {
        let Some(part) = self.swarms.get_mut(&swarm) else { return };
        tracing::debug!(peers = peers.len(), "told of others");
        for peer in peers.into_iter().take(PEERS_BATCH_MAX * REGION_PROCESSES_MAX) {
            if peer.node == self.parts.me.node || self.banned.contains(&peer.node) {
                continue;
            }
            if part.known.len() < KNOWN_MAX || part.known.contains_key(&peer.node) {
                part.known.insert(peer.node, peer);
            }
        }
        self.dial_known(swarm);
    }

    fn dial_known(&mut self, swarm: SwarmKey) {
        let Some(part) = self.swarms.get(&swarm) else { return };
        let target = shoal_swarm::Config::default().neighbours_target;
        let connected = part.known.keys().filter(|node| self.by_node.contains_key(*node)).count();
        let room =
            DIALS_MAX.saturating_sub(self.dialling.len()).min(target.saturating_sub(connected));
        let chosen: Vec<PeerAddr> = part
            .known
            .values()
            .filter(|addr| self.may_dial(&addr.node))
            .cloned()
            .sample(&mut rand::rng(), room);
        for addr in chosen {
            self.dial(addr);
        }
    }

    /// Connects to some of the machines that were neighbours lately, also in an earlier life: no region process may
    /// be there to name any. Which swarms they take part in, they say themselves.
    pub(super) fn dial_remembered(&mut self, want: usize) {
        let room = DIALS_MAX.saturating_sub(self.dialling.len()).min(want);
        let mut remembered = self.parts.neighbours.all();
        remembered.retain(|addr| self.may_dial(&addr.node));
        for addr in remembered.into_iter().sample(&mut rand::rng(), room) {
            self.dial(addr);
        }
    }

    fn may_dial(&self, node: &NodeId) -> bool {
        !self.by_node.contains_key(node)
            && !self.dialling.contains(node)
            && !self.banned.contains(node)
    }

    fn dial(&mut self, addr: PeerAddr) {
        let node: NodeId = addr.node;
        self.dialling.insert(node);
        let (endpoint, inputs) = (self.parts.endpoint.clone(), self.inputs.clone());
        tokio::spawn(async move {
            if let Err(error) = endpoint.connect(addr.data, node).await {
                tracing::debug!(machine = %addr.machine, %error, "cannot reach a neighbour");
            }
            let _ = inputs.send(Input::Dialled(node)).await;
        });
    }

    pub(super) fn ban(&mut self, peer: PeerKey) {
        let Some(state) = self.peers.get(&peer) else { return };
        let member = state.connection.member().clone();
        tracing::warn!(machine = %member.machine, "neighbour banned: it sent pieces that fail their hash");
        self.parts.metrics.banned.inc();
        self.banned.insert(member.node);
        state.connection.close(CloseReason::Banned);
        self.by_node.remove(&member.node);
        self.forget(peer);
        self.parts.neighbours.forget(&member.node);
    }
}
