//! The task that owns the swarm: connections, the membership exchange, messages, deadlines.

use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    sync::Arc,
    time::Instant,
};

use futures::StreamExt;
use libp2p::{
    PeerId, Swarm,
    core::ConnectedPoint,
    gossipsub::{self, IdentTopic, MessageAcceptance, PublishError},
    identify,
    request_response::{self, ResponseChannel},
    swarm::{
        ConnectionId, DialError, SwarmEvent,
        dial_opts::{DialOpts, PeerCondition},
    },
};
use shoal_pki::{Credentials, Member};
use shoal_proto::{
    NodeId, RegionName,
    codec::{self, CodecError},
    gossip::{GOSSIP_MESSAGE_MAX_BYTES, GossipMessage, goal_topic},
};
use tokio::sync::mpsc;

use crate::{
    book::Book,
    gossip::{GossipConfig, GossipError, GossipEvent},
    membership::{self, Answer, Show},
    settings::{DIALS_MAX, RECHECK, SHUTDOWN_MAX, TICK, UNSENT_FOR, UNSENT_MAX, VERIFY_MAX},
    stats::Counters,
    swarm::{self, Behaviour, BehaviourEvent, listen_on, multiaddr, socket_addr, start_error},
};

/// What the process asks for.
pub(crate) enum Command {
    AddPeers(Vec<(NodeId, SocketAddr)>),
    Dial(SocketAddr),
    Publish(Vec<u8>),
    Recheck,
    Shutdown,
}

/// A connected peer.
struct Peer {
    node: NodeId,
    since: Instant,
    /// Whether we dialed it.
    ours: bool,
    state: State,
}

enum State {
    /// Has shown nothing yet.
    Unverified,
    /// Was told that it is refused; is cut off when it has heard so.
    Refused,
    /// A member; its certificate is kept to be checked again.
    Verified { certificate: Vec<u8> },
}

/// Whom a dial under way is for.
enum Dial {
    Node(NodeId),
    Seed(SocketAddr),
}

pub(crate) struct Node {
    swarm: Swarm<Behaviour>,
    orders: mpsc::Receiver<Command>,
    events: mpsc::Sender<GossipEvent>,
    counters: Arc<Counters>,
    credentials: Credentials,
    region: RegionName,
    topic: IdentTopic,
    max_peers: usize,
    target_peers: usize,
    book: Book,
    peers: HashMap<PeerId, Peer>,
    dials: HashMap<ConnectionId, Dial>,
    /// Messages that found no peer yet, and since when.
    unsent: VecDeque<(Instant, Vec<u8>)>,
    rechecked: Instant,
}

impl Node {
    /// Builds the swarm and waits until it listens.
    pub(crate) async fn start(
        config: GossipConfig,
        orders: mpsc::Receiver<Command>,
        events: mpsc::Sender<GossipEvent>,
        counters: Arc<Counters>,
    ) -> Result<(Self, SocketAddr), GossipError> {
        let GossipConfig { listen, credentials, region, max_peers, target_peers } = config;
        let (identity, trust) = (credentials.identity(), credentials.trust());
        let own = identity.member().node;
        membership::check(&trust, &region, &own, identity.certificate_der())
            .map_err(GossipError::NotAMember)?;
        let topic = IdentTopic::new(goal_topic(trust.cluster(), &region));
        let mut swarm = swarm::build(&identity, max_peers)?;
        let behaviour = swarm.behaviour_mut().gossip.inner();
        behaviour.subscribe(&topic).map_err(start_error)?;
        let local_addr = listen_on(&mut swarm, listen).await?;
        let node = Self {
            swarm,
            orders,
            events,
            counters,
            credentials,
            region,
            topic,
            max_peers: max_peers as usize,
            target_peers,
            book: Book::default(),
            peers: HashMap::new(),
            dials: HashMap::new(),
            unsent: VecDeque::new(),
            rechecked: Instant::now(),
        };
        Ok((node, local_addr))
    }

    /// Runs until it is told to stop, or nobody is left to tell.
    pub(crate) async fn run(mut self) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                event = self.swarm.select_next_some() => self.on_swarm_event(event),
                order = self.orders.recv() => match order {
                    None | Some(Command::Shutdown) => break,
                    Some(order) => self.on_command(order),
                },
                _ = tick.tick() => self.on_tick(Instant::now()),
            }
            self.count();
        }
        self.stop().await;
    }

    /// Says goodbye to all, so that they need not wait for a timeout.
    async fn stop(mut self) {
        for peer in self.peers.keys() {
            // An error says that it is not connected, which is what is wanted.
            let _ = self.swarm.disconnect_peer_id(*peer);
        }
        let swarm = &mut self.swarm;
        let closing = async {
            while swarm.connected_peers().next().is_some() {
                swarm.select_next_some().await;
            }
        };
        if tokio::time::timeout(SHUTDOWN_MAX, closing).await.is_err() {
            tracing::debug!("gossip ends with connections that do not close");
        }
        self.peers.clear();
        self.count();
    }

    fn count(&mut self) {
        let verified = self.verified();
        self.counters.peers.set(verified);
        self.counters.unverified.set(self.peers.len() - verified);
        self.counters.addresses.set(self.book.len());
        self.counters.gate_dropped.add(self.swarm.behaviour_mut().gossip.take_dropped());
    }

    fn verified(&self) -> usize {
        self.peers.values().filter(|peer| matches!(peer.state, State::Verified { .. })).count()
    }

    /// Tells the process; never waits for it.
    fn tell(&self, event: GossipEvent) {
        if self.events.try_send(event).is_err() {
            self.counters.events_dropped.add(1);
        }
    }

    fn on_command(&mut self, command: Command) {
        let now = Instant::now();
        match command {
            Command::AddPeers(peers) => {
                let own = self.credentials.identity().member().node;
                for (node, addr) in peers.into_iter().filter(|(node, _)| *node != own) {
                    self.book.add(node, addr, now);
                }
                self.dial_due(now);
            }
            Command::Dial(addr) => {
                // A configuration may name all region processes, and so ourselves.
                if self.swarm.listeners().filter_map(socket_addr).any(|own| own == addr) {
                    return;
                }
                self.book.add_seed(addr, now);
                self.dial_due(now);
            }
            Command::Publish(bytes) => {
                if !self.publish(&bytes) {
                    if self.unsent.len() == UNSENT_MAX {
                        self.unsent.pop_front();
                        self.counters.unsent.add(1);
                    }
                    self.unsent.push_back((now, bytes));
                }
            }
            Command::Recheck => self.recheck(now),
            Command::Shutdown => {}
        }
    }

    /// Sends to all peers; false when there is none to send to.
    fn publish(&mut self, bytes: &[u8]) -> bool {
        let gossip = self.swarm.behaviour_mut().gossip.inner();
        match gossip.publish(self.topic.hash(), bytes) {
            Ok(_) => self.counters.published.add(1),
            Err(PublishError::Duplicate) => self.counters.repeated.add(1),
            Err(PublishError::NoPeersSubscribedToTopic | PublishError::AllQueuesFull(_)) => {
                return false;
            }
            Err(error) => {
                tracing::error!(%error, "a message could not be published");
                self.counters.unsent.add(1);
            }
        }
        true
    }

    fn on_tick(&mut self, now: Instant) {
        let mut late = Vec::new();
        for (id, peer) in &self.peers {
            if now - peer.since >= VERIFY_MAX && !matches!(peer.state, State::Verified { .. }) {
                late.push((*id, peer.node, matches!(peer.state, State::Unverified)));
            }
        }
        for (id, node, silent) in late {
            if silent {
                let reason = format!("showed no certificate in {} s", VERIFY_MAX.as_secs());
                self.counters.cut_off.add(1);
                self.book.failed(&node, now);
                self.tell(GossipEvent::PeerRefused { node: Some(node), reason });
            }
            let _ = self.swarm.disconnect_peer_id(id);
        }
        while let Some((since, bytes)) = self.unsent.pop_front() {
            if now - since > UNSENT_FOR {
                self.counters.unsent.add(1);
            } else if !self.publish(&bytes) {
                self.unsent.push_front((since, bytes));
                break;
            }
        }
        if now - self.rechecked >= RECHECK {
            self.recheck(now);
        }
        self.dial_due(now);
    }

    /// Cuts off the peers that the trust no longer covers.
    fn recheck(&mut self, now: Instant) {
        self.rechecked = now;
        let trust = self.credentials.trust();
        let mut gone = Vec::new();
        for (id, peer) in &self.peers {
            if let State::Verified { certificate } = &peer.state
                && let Err(reason) =
                    membership::check(&trust, &self.region, &peer.node, certificate)
            {
                gone.push((*id, peer.node, reason));
            }
        }
        for (id, node, reason) in gone {
            self.counters.refused.add(1);
            self.book.forget(&node);
            self.tell(GossipEvent::PeerRefused { node: Some(node), reason });
            let _ = self.swarm.disconnect_peer_id(id);
        }
    }

    /// Dials seeds that are not connected, and others up to the target.
    fn dial_due(&mut self, now: Instant) {
        let room = DIALS_MAX.saturating_sub(self.dials.len());
        let dialing = |node: &NodeId| {
            self.dials.values().any(|dial| matches!(dial, Dial::Node(other) if other == node))
        };
        let busy = |node: &NodeId| {
            dialing(node)
                || membership::peer_of(node).is_none_or(|peer| self.peers.contains_key(&peer))
        };
        let at = |addr: &SocketAddr| {
            self.dials.values().any(|dial| matches!(dial, Dial::Seed(other) if other == addr))
        };
        let mut dials: Vec<Dial> = Vec::new();
        dials.extend(self.book.due_seeds(now, busy).into_iter().filter(|a| !at(a)).map(Dial::Seed));
        dials.truncate(room);
        let ours = self.peers.values().filter(|peer| peer.ours).count();
        let want = self.target_peers.saturating_sub(ours + self.dials.len() + dials.len());
        let full = self.peers.len() >= self.max_peers;
        let want = if full { 0 } else { want.min(room - dials.len()) };
        let peers = self.book.due(now, want, busy);
        for seed in dials {
            if let Dial::Seed(addr) = seed {
                let options = DialOpts::unknown_peer_id().address(multiaddr(addr)).build();
                self.dial(seed, options, now);
            }
        }
        for (node, addr) in peers {
            let Some(peer) = membership::peer_of(&node) else { continue };
            let options = DialOpts::peer_id(peer)
                .addresses(vec![multiaddr(addr)])
                .condition(PeerCondition::DisconnectedAndNotDialing)
                .build();
            self.dial(Dial::Node(node), options, now);
        }
    }

    fn dial(&mut self, dial: Dial, options: DialOpts, now: Instant) {
        let connection = options.connection_id();
        self.counters.dials.add(1);
        match self.swarm.dial(options) {
            Ok(()) => {
                self.dials.insert(connection, dial);
            }
            Err(error) => self.dial_failed(&dial, &error, now),
        }
    }

    fn dial_failed(&mut self, dial: &Dial, error: &DialError, now: Instant) {
        tracing::debug!(%error, "a gossip peer was not reached");
        self.counters.dials_failed.add(1);
        match (dial, error) {
            // Ourselves, under an address that is not one of our interfaces'.
            (Dial::Seed(addr), DialError::LocalPeerId { .. }) => self.book.remove_seed(addr),
            (Dial::Seed(addr), _) => self.book.seed_failed(addr, now),
            (Dial::Node(node), DialError::Denied { .. }) => self.book.later(node, false, now),
            (Dial::Node(node), _) => self.book.failed(node, now),
        }
    }

    fn on_swarm_event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        let now = Instant::now();
        match event {
            SwarmEvent::ConnectionEstablished { peer_id, connection_id, endpoint, .. } => {
                self.on_connected(peer_id, connection_id, &endpoint, now);
            }
            SwarmEvent::ConnectionClosed { peer_id, num_established: 0, cause, .. } => {
                let Some(peer) = self.peers.remove(&peer_id) else { return };
                tracing::debug!(node = %peer.node, ?cause, "gossip peer gone");
                if matches!(peer.state, State::Verified { .. }) {
                    self.book.later(&peer.node, false, now);
                    self.tell(GossipEvent::PeerGone(peer.node));
                }
            }
            SwarmEvent::OutgoingConnectionError { connection_id, error, .. } => {
                if let Some(dial) = self.dials.remove(&connection_id) {
                    self.dial_failed(&dial, &error, now);
                }
            }
            SwarmEvent::IncomingConnectionError { error, .. } => {
                tracing::debug!(%error, "an incoming gossip connection failed");
            }
            SwarmEvent::ListenerClosed { reason, .. } => {
                tracing::error!(?reason, "the gossip listener closed");
            }
            SwarmEvent::Behaviour(BehaviourEvent::Gossip(event)) => self.on_gossip(event),
            SwarmEvent::Behaviour(BehaviourEvent::Membership(event)) => {
                self.on_membership(event, now);
            }
            SwarmEvent::Behaviour(BehaviourEvent::Identify(event)) => self.on_identify(event, now),
            _ => {}
        }
    }

    fn on_connected(
        &mut self,
        id: PeerId,
        connection: ConnectionId,
        endpoint: &ConnectedPoint,
        now: Instant,
    ) {
        let dial = self.dials.remove(&connection);
        let Some(node) = membership::node_of(&id) else {
            let reason = "its key is not Ed25519".into();
            self.counters.refused.add(1);
            self.tell(GossipEvent::PeerRefused { node: None, reason });
            let _ = self.swarm.disconnect_peer_id(id);
            return;
        };
        if endpoint.is_dialer() {
            let addr = match dial {
                Some(Dial::Seed(addr)) => Some(addr),
                _ => None,
            };
            self.book.answered(&node, addr, now);
        }
        if let Some(peer) = self.peers.get_mut(&id) {
            // Both dialed at once: the second connection changes nothing.
            peer.ours |= endpoint.is_dialer();
            return;
        }
        let ours = endpoint.is_dialer();
        self.peers.insert(id, Peer { node, since: now, ours, state: State::Unverified });
        let certificate = self.credentials.identity().certificate_der().to_vec();
        self.swarm.behaviour_mut().membership.send_request(&id, Show { certificate });
    }

    fn on_membership(&mut self, event: request_response::Event<Show, Answer>, now: Instant) {
        match event {
            request_response::Event::Message { peer, message, .. } => match message {
                request_response::Message::Request { request, channel, .. } => {
                    self.on_show(peer, request, channel);
                }
                request_response::Message::Response { response, .. } => {
                    self.on_answer(peer, response, now);
                }
            },
            request_response::Event::ResponseSent { peer, .. } => {
                // Those who were refused have heard so.
                if self.peers.get(&peer).is_some_and(|p| matches!(p.state, State::Refused)) {
                    let _ = self.swarm.disconnect_peer_id(peer);
                }
            }
            // Whoever does not manage the exchange is cut off by the clock.
            request_response::Event::OutboundFailure { peer, error, .. } => {
                tracing::debug!(%peer, %error, "the membership exchange failed");
            }
            request_response::Event::InboundFailure { peer, error, .. } => {
                tracing::debug!(%peer, %error, "the membership exchange failed");
            }
        }
    }

    /// A peer shows its certificate.
    fn on_show(&mut self, id: PeerId, show: Show, channel: ResponseChannel<Answer>) {
        let room = self.verified() < self.max_peers;
        let Some(peer) = self.peers.get_mut(&id) else { return };
        let trust = self.credentials.trust();
        let checked = membership::check(&trust, &self.region, &peer.node, &show.certificate);
        let node = peer.node;
        let known = matches!(peer.state, State::Verified { .. });
        let mut verified: Option<Member> = None;
        let answer = match checked {
            Ok(_) if known => Answer::Welcome,
            Ok(_) if !room => {
                peer.state = State::Refused;
                self.counters.turned_away.add(1);
                Answer::Full
            }
            Ok(member) => {
                peer.state = State::Verified { certificate: show.certificate };
                self.counters.verified.add(1);
                verified = Some(member);
                Answer::Welcome
            }
            Err(reason) => {
                peer.state = State::Refused;
                self.counters.refused.add(1);
                self.book.forget(&node);
                let event = GossipEvent::PeerRefused { node: Some(node), reason: reason.clone() };
                self.tell(event);
                Answer::Refused(reason)
            }
        };
        // Fails only when the peer is gone.
        let _ = self.swarm.behaviour_mut().membership.send_response(channel, answer);
        if let Some(member) = verified {
            self.swarm.behaviour_mut().gossip.open(id);
            self.tell(GossipEvent::PeerVerified(member));
        }
    }

    /// A peer has looked at ours.
    fn on_answer(&mut self, id: PeerId, answer: Answer, now: Instant) {
        let Some(node) = self.peers.get(&id).map(|peer| peer.node) else { return };
        let reason = match answer {
            Answer::Welcome => return,
            Answer::Full => "it has no room".into(),
            Answer::Refused(reason) => {
                // It is the other's word: cut, before it goes into a log.
                format!("it refuses us: {}", reason.chars().take(200).collect::<String>())
            }
        };
        self.book.later(&node, true, now);
        self.tell(GossipEvent::PeerRefused { node: Some(node), reason });
    }

    /// Where a verified peer that came to us listens: somebody to dial when it is gone.
    fn on_identify(&mut self, event: identify::Event, now: Instant) {
        let identify::Event::Received { peer_id, info, .. } = event else { return };
        let Some(peer) = self.peers.get(&peer_id) else { return };
        if matches!(peer.state, State::Verified { .. })
            && let Some(addr) = info.listen_addrs.iter().find_map(socket_addr)
        {
            self.book.add(peer.node, addr, now);
        }
    }

    fn on_gossip(&mut self, event: gossipsub::Event) {
        let gossipsub::Event::Message { propagation_source, message_id, message } = event else {
            return;
        };
        let sound = match self.peers.get(&propagation_source) {
            Some(peer)
                if message.topic == self.topic.hash()
                    && self.swarm.behaviour().gossip.is_open(&propagation_source) =>
            {
                self.judge(&message.data).map(|message| (peer.node, message))
            }
            _ => None,
        };
        let acceptance =
            if sound.is_some() { MessageAcceptance::Accept } else { MessageAcceptance::Ignore };
        let gossip = self.swarm.behaviour_mut().gossip.inner();
        gossip.report_message_validation_result(&message_id, &propagation_source, acceptance);
        if let Some((from, message)) = sound {
            self.counters.received.add(1);
            self.tell(GossipEvent::Message { from, message });
        }
    }

    /// Decodes a message and checks its signature; what does not do is counted.
    fn judge(&self, data: &[u8]) -> Option<GossipMessage> {
        match codec::decode::<GossipMessage>(data, GOSSIP_MESSAGE_MAX_BYTES) {
            Ok(message) => {
                let trust = self.credentials.trust();
                match &message {
                    GossipMessage::Goal(goal) => {
                        if let Err(error) = trust.open_goal(goal) {
                            tracing::debug!(%error, "a goal by gossip was refused");
                            self.counters.bad_signature.add(1);
                            return None;
                        }
                    }
                    // Old news is of use to nobody.
                    GossipMessage::Trust { number, .. } if *number < trust.number() => return None,
                    GossipMessage::Trust { .. } => {}
                }
                Some(message)
            }
            Err(CodecError::Version(_)) => {
                self.counters.unknown_version.add(1);
                None
            }
            Err(_) => {
                self.counters.malformed.add(1);
                None
            }
        }
    }
}
