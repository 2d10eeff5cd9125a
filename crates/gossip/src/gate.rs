//! A gate in front of a behaviour: what an unverified peer says waits outside.
//!
//! The inner behaviour sees connections come and go as always, but what their handlers report is kept
//! back until [`Gate::open`] is called for the peer, and then handed on in order. For gossipsub that means:
//! until then the peer is subscribed to nothing, so it is in no mesh and is sent no message, and
//! none of its messages is taken.

use std::{
    collections::{HashMap, HashSet},
    task::{Context, Poll},
};

use libp2p::{
    Multiaddr, PeerId,
    core::{Endpoint, transport::PortUse},
    swarm::{
        ConnectionClosed, ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, THandler,
        THandlerInEvent, THandlerOutEvent, ToSwarm,
    },
};

/// How many reports of one unverified peer are kept: its subscription comes first, and more than a
/// few messages do not come in the two seconds. Each holds at most one message of 1.5 KiB.
const WAITING_MAX: usize = 32;

pub(crate) struct Gate<B: NetworkBehaviour> {
    inner: B,
    open: HashSet<PeerId>,
    waiting: HashMap<PeerId, Vec<(ConnectionId, THandlerOutEvent<B>)>>,
    dropped: u64,
}

impl<B: NetworkBehaviour> Gate<B> {
    pub(crate) fn new(inner: B) -> Self {
        Self { inner, open: HashSet::new(), waiting: HashMap::new(), dropped: 0 }
    }

    /// Lets a connected peer through, with what it has said so far.
    pub(crate) fn open(&mut self, peer: PeerId) {
        if self.open.insert(peer) {
            for (connection, event) in self.waiting.remove(&peer).unwrap_or_default() {
                self.inner.on_connection_handler_event(peer, connection, event);
            }
        }
    }

    pub(crate) fn is_open(&self, peer: &PeerId) -> bool {
        self.open.contains(peer)
    }

    pub(crate) fn inner(&mut self) -> &mut B {
        &mut self.inner
    }

    /// Reports that did not fit since the last call.
    pub(crate) fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }
}

impl<B: NetworkBehaviour> NetworkBehaviour for Gate<B> {
    type ConnectionHandler = B::ConnectionHandler;
    type ToSwarm = B::ToSwarm;

    fn handle_pending_inbound_connection(
        &mut self,
        connection: ConnectionId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<(), ConnectionDenied> {
        self.inner.handle_pending_inbound_connection(connection, local, remote)
    }

    fn handle_established_inbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.inner.handle_established_inbound_connection(connection, peer, local, remote)
    }

    fn handle_pending_outbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: Option<PeerId>,
        addresses: &[Multiaddr],
        role: Endpoint,
    ) -> Result<Vec<Multiaddr>, ConnectionDenied> {
        self.inner.handle_pending_outbound_connection(connection, peer, addresses, role)
    }

    fn handle_established_outbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        role: Endpoint,
        port: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.inner.handle_established_outbound_connection(connection, peer, address, role, port)
    }

    fn on_swarm_event(&mut self, event: FromSwarm) {
        if let FromSwarm::ConnectionClosed(ConnectionClosed {
            peer_id,
            connection_id,
            remaining_established,
            ..
        }) = &event
        {
            if *remaining_established == 0 {
                self.open.remove(peer_id);
                self.waiting.remove(peer_id);
            } else if let Some(waiting) = self.waiting.get_mut(peer_id) {
                waiting.retain(|(connection, _)| connection != connection_id);
            }
        }
        self.inner.on_swarm_event(event);
    }

    fn on_connection_handler_event(
        &mut self,
        peer: PeerId,
        connection: ConnectionId,
        event: THandlerOutEvent<Self>,
    ) {
        if self.open.contains(&peer) {
            return self.inner.on_connection_handler_event(peer, connection, event);
        }
        let waiting = self.waiting.entry(peer).or_default();
        if waiting.len() < WAITING_MAX {
            waiting.push((connection, event));
        } else {
            self.dropped += 1;
        }
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        self.inner.poll(cx)
    }
}
