//! The surface: how a process starts, feeds, hears and stops its gossip.

use std::{net::SocketAddr, sync::Arc};

use shoal_pki::{Credentials, Member};
use shoal_proto::{
    NodeId, RegionName,
    codec::{self, CodecError},
    gossip::{GOSSIP_MESSAGE_MAX_BYTES, GossipMessage},
};
use tokio::{
    sync::{Mutex, mpsc},
    task::JoinHandle,
};

use crate::{
    node::{Command, Node},
    settings::{COMMANDS_MAX, EVENTS_MAX, TARGET_PEERS},
    stats::{Counters, GossipStats},
};

/// What the gossip plane needs.
#[derive(Clone)]
pub struct GossipConfig {
    /// Where to listen, UDP; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Who we are, an agent's or a region process's certificate and key, and whom the cluster believes: each time as they
    /// are then.
    pub credentials: Credentials,
    /// The region whose goals are gossiped; the identity's own.
    pub region: RegionName,
    /// How many members may be connected at once: 40 for an agent; a region process, which every
    /// new machine dials, takes some hundreds. What comes on top is told to try elsewhere.
    pub max_peers: u32,
    /// How many connections are made by ourselves, as far as addresses are known.
    pub target_peers: usize,
}

impl GossipConfig {
    /// The defaults of an agent.
    #[must_use]
    pub fn new(listen: SocketAddr, credentials: Credentials, region: RegionName) -> Self {
        Self { listen, credentials, region, max_peers: 40, target_peers: TARGET_PEERS }
    }
}

/// Why gossip could not be started, or a message not be taken.
#[derive(Debug, thiserror::Error)]
pub enum GossipError {
    /// The identity is not one that takes part in this region's gossip.
    #[error("the certificate does not make a member of this region's gossip: {0}")]
    NotAMember(String),
    /// The listener did not start.
    #[error("gossip cannot listen on {addr}: {reason}")]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// Why.
        reason: String,
    },
    /// libp2p refused its settings.
    #[error("gossip cannot start: {0}")]
    Start(String),
    /// The message is over [`GOSSIP_MESSAGE_MAX_BYTES`].
    #[error(transparent)]
    Message(#[from] CodecError),
    /// The gossip has been shut down.
    #[error("gossip has been shut down")]
    Stopped,
}

/// What the process hears.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GossipEvent {
    /// A sound message, new within the duplicate cache's time. A goal's signature holds; whether its
    /// revision is new is for the process to say.
    Message {
        /// The verified neighbour that passed it on.
        from: NodeId,
        /// The message.
        message: GossipMessage,
    },
    /// A peer showed a certificate of this region.
    PeerVerified(Member),
    /// A verified peer is gone.
    PeerGone(NodeId),
    /// A peer was cut off, or it refused us.
    PeerRefused {
        /// Who; none when its key is not of our kind.
        node: Option<NodeId>,
        /// Why.
        reason: String,
    },
}

/// A running gossip plane. Clones speak to the same one; it ends with [`Gossip::shutdown`], or when the
/// last clone is dropped.
#[derive(Clone)]
pub struct Gossip {
    commands: mpsc::Sender<Command>,
    counters: Arc<Counters>,
    local_addr: SocketAddr,
    task: Arc<Mutex<Option<JoinHandle<()>>>>,
}

impl Gossip {
    /// Starts listening, and the task behind.
    ///
    /// # Errors
    /// [`GossipError::NotAMember`], [`GossipError::Listen`], [`GossipError::Start`].
    pub async fn start(
        config: GossipConfig,
    ) -> Result<(Self, mpsc::Receiver<GossipEvent>), GossipError> {
        let (commands, orders) = mpsc::channel(COMMANDS_MAX);
        let (events, heard) = mpsc::channel(EVENTS_MAX);
        let counters = Arc::new(Counters::default());
        let (node, local_addr) = Node::start(config, orders, events, counters.clone()).await?;
        let task = Arc::new(Mutex::new(Some(tokio::spawn(node.run()))));
        Ok((Self { commands, counters, local_addr, task }, heard))
    }

    /// Where it listens: the address of the configuration with the port that was taken.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Takes addresses of peers whose keys are known. They are dialed as far as peers are needed, again
    /// with growing pauses when they do not answer, and forgotten at last.
    ///
    /// # Errors
    /// [`GossipError::Stopped`].
    pub async fn add_peers(&self, peers: Vec<(NodeId, SocketAddr)>) -> Result<(), GossipError> {
        self.command(Command::AddPeers(peers)).await
    }

    /// Takes the address of a peer whose key is not known, a region process of the configuration: it
    /// is dialed whenever it is not connected, and never forgotten.
    ///
    /// # Errors
    /// [`GossipError::Stopped`].
    pub async fn dial(&self, addr: SocketAddr) -> Result<(), GossipError> {
        self.command(Command::Dial(addr)).await
    }

    /// Sends a message to all peers. When there is none yet, it waits for one for a minute. The same
    /// message is not sent again within [`crate::DUPLICATE_CACHE`].
    ///
    /// # Errors
    /// [`GossipError::Message`] when it is too long, [`GossipError::Stopped`].
    pub async fn publish(&self, message: &GossipMessage) -> Result<(), GossipError> {
        let bytes = codec::encode(message, GOSSIP_MESSAGE_MAX_BYTES)?;
        self.command(Command::Publish(bytes)).await
    }

    /// Looks again at the connected peers, because the trust has changed: those that it no longer covers are cut off.
    ///
    /// # Errors
    /// [`GossipError::Stopped`].
    pub async fn recheck(&self) -> Result<(), GossipError> {
        self.command(Command::Recheck).await
    }

    /// How many verified peers are connected.
    #[must_use]
    pub fn peers(&self) -> usize {
        self.counters.peers.get() as usize
    }

    /// The counters now.
    #[must_use]
    pub fn stats(&self) -> GossipStats {
        self.counters.snapshot()
    }

    /// Closes all connections and ends the task; returns when it has ended.
    pub async fn shutdown(&self) {
        // An error says that it has ended already.
        let _ = self.commands.send(Command::Shutdown).await;
        if let Some(task) = self.task.lock().await.take()
            && let Err(error) = task.await
        {
            tracing::error!(%error, "the gossip task failed");
        }
    }

    pub(crate) async fn command(&self, command: Command) -> Result<(), GossipError> {
        self.commands.send(command).await.map_err(|_| GossipError::Stopped)
    }
}
