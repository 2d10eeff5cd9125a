//! Members of a swarm that keep to the protocol and not to its spirit, for tests and benchmarks: real certificates, real
//! connections, and pieces that never come or are wrong. An honest one stands beside them, to speak other versions of
//! the protocol. Nothing that runs depends on this crate.

use std::{
    collections::HashSet,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use bytes::Bytes;
use shoal_pki::{Credentials, Identity, Role, Trust};
use shoal_proto::{
    ArtifactId, Bitmap, NodeId, PieceIndex,
    manifest::{Codec, PieceSize},
    peer::{CloseReason, PEERS_BATCH_MAX, PeerAddr, PeerMessage, StreamReply, StreamRequest},
    region::{RegionReply, RegionRequest},
};
use shoal_transport::{Connection, Endpoint, EndpointConfig, Incoming, IncomingRequest};
use tokio::{sync::mpsc, task::AbortHandle};

/// How often the region processes are asked for neighbours, and told of this one.
const INTRODUCE_EVERY: Duration = Duration::from_millis(500);

/// How a peer answers who asks it for a piece. All of them say that they hold every piece.
#[derive(Debug, Clone)]
pub enum Manner {
    /// Never.
    Silent,
    /// With as many other bytes.
    Liar,
    /// With the piece out of these, the whole artifact.
    Honest(Bytes),
}

/// What a peer needs to take part.
#[derive(Debug)]
pub struct Setup {
    /// Its end of the data plane: listening address, certificate, protocol versions.
    pub endpoint: EndpointConfig,
    /// The data addresses of the region processes.
    pub regions: Vec<SocketAddr>,
    /// Its zone.
    pub zone: String,
    /// The artifact that it says it holds.
    pub artifact: ArtifactId,
    /// Its length.
    pub size_bytes: u64,
    /// The length of its pieces.
    pub piece_size: PieceSize,
    /// How it answers.
    pub manner: Manner,
}

impl Setup {
    /// An agent of this identity that has an artifact.
    #[must_use]
    pub fn new(
        listen: SocketAddr,
        identity: Identity,
        trust: Trust,
        regions: Vec<SocketAddr>,
        (artifact, size_bytes, piece_size): (ArtifactId, u64, PieceSize),
        manner: Manner,
    ) -> Self {
        let endpoint = EndpointConfig::new(listen, Credentials::new(identity, trust));
        let zone = "a".into();
        Self { endpoint, regions, zone, artifact, size_bytes, piece_size, manner }
    }

    fn pieces(&self) -> u32 {
        u32::try_from(self.size_bytes.div_ceil(self.piece_size.bytes())).unwrap_or(u32::MAX)
    }

    /// Where a piece lies in the artifact.
    fn range(&self, piece: PieceIndex) -> std::ops::Range<usize> {
        let from = u64::from(piece.0) * self.piece_size.bytes();
        let to = (from + self.piece_size.bytes()).min(self.size_bytes);
        from.min(to) as usize..to as usize
    }
}

/// What became of a peer so far.
#[derive(Debug, Default)]
pub struct Seen {
    /// Questions for pieces that came.
    pub asked: AtomicU64,
    /// Connections that others closed because they banned it.
    pub banned: AtomicU64,
}

/// A peer that takes part until it is dropped.
#[derive(Debug)]
pub struct Peer {
    /// Its end of the data plane.
    pub endpoint: Endpoint,
    seen: Arc<Seen>,
    tasks: [AbortHandle; 2],
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
        for connection in self.endpoint.connections() {
            connection.close(CloseReason::Done);
        }
    }
}

impl Peer {
    /// Takes part from now on.
    ///
    /// # Errors
    /// When the endpoint cannot be bound.
    pub fn start(setup: Setup) -> anyhow::Result<Self> {
        let (endpoint, incoming) = Endpoint::bind(&setup.endpoint)?;
        let identity = setup.endpoint.credentials.identity();
        let member = identity.member();
        let me = PeerAddr {
            node: member.node,
            machine: member.machine.clone(),
            zone: setup.zone.clone(),
            data: endpoint.local_addr(),
            // It does not gossip: the port is that of the discard service.
            gossip: SocketAddr::new(endpoint.local_addr().ip(), 9),
        };
        let (setup, seen) = (Arc::new(setup), Arc::new(Seen::default()));
        let met = tokio::spawn(meet(endpoint.clone(), setup.clone(), me.clone())).abort_handle();
        let served = tokio::spawn(serve(incoming, setup, me, seen.clone())).abort_handle();
        Ok(Self { endpoint, seen, tasks: [met, served] })
    }

    /// How many questions for pieces came so far.
    #[must_use]
    pub fn asked(&self) -> u64 {
        self.seen.asked.load(Ordering::Relaxed)
    }

    /// How many connections were closed by others that banned it, so far.
    #[must_use]
    pub fn banned(&self) -> u64 {
        self.seen.banned.load(Ordering::Relaxed)
    }

    /// Its connection to another agent.
    ///
    /// # Errors
    /// When there is none.
    pub fn connection(&self, machine: &str) -> anyhow::Result<Connection> {
        let all = self.endpoint.connections();
        let found = all.into_iter().find(|c| c.member().machine.as_str() == machine);
        found.with_context(|| format!("no connection to {machine}"))
    }
}

/// Keeps being introduced, and connects to whom it is told of.
async fn meet(endpoint: Endpoint, setup: Arc<Setup>, me: PeerAddr) {
    loop {
        for region in &setup.regions {
            let request = StreamRequest::Region(RegionRequest::Introduce {
                me: me.clone(),
                artifact: setup.artifact,
                complete: true,
                want: PEERS_BATCH_MAX as u16,
            });
            let asked = async {
                let connection = endpoint.connect_any(*region, Role::Region).await.ok()?;
                connection.request(request).await.ok()
            };
            let Some((StreamReply::Region(RegionReply::Peers(peers)), _)) = asked.await else {
                continue;
            };
            for peer in peers.into_iter().filter(|peer| peer.node != me.node) {
                // Who cannot be reached is tried again with the next introduction.
                let _ = endpoint.connect(peer.data, peer.node).await;
            }
        }
        tokio::time::sleep(INTRODUCE_EVERY).await;
    }
}

async fn serve(
    mut incoming: mpsc::Receiver<Incoming>,
    setup: Arc<Setup>,
    me: PeerAddr,
    seen: Arc<Seen>,
) {
    // Who was told what it holds since they said that they take part.
    let mut told: HashSet<NodeId> = HashSet::new();
    let join = PeerMessage::Join { artifact: setup.artifact, have: Bitmap::full(setup.pieces()) };
    while let Some(incoming) = incoming.recv().await {
        match incoming {
            Incoming::Connected(connection) if connection.member().role == Role::Agent => {
                told.remove(&connection.node());
                let _ =
                    connection.try_send(&PeerMessage::Hello { me: me.clone(), revisions: vec![] });
                let _ = connection.try_send(&join);
            }
            Incoming::Message(connection, PeerMessage::Join { artifact, .. }) => {
                if artifact == setup.artifact && told.insert(connection.node()) {
                    let _ = connection.try_send(&join);
                }
            }
            Incoming::Request(request) => {
                tokio::spawn(answer(request, setup.clone(), seen.clone()));
            }
            Incoming::Closed(_, reason) if reason.contains("Banned") => {
                seen.banned.fetch_add(1, Ordering::Relaxed);
            }
            Incoming::Connected(_) | Incoming::Message(..) | Incoming::Closed(..) => {}
        }
    }
}

/// Answers one question. Those that are never answered are bounded by the streams of their connection.
async fn answer(request: IncomingRequest, setup: Arc<Setup>, seen: Arc<Seen>) {
    let StreamRequest::Piece { artifact, piece } = request.request else {
        let _ = request.reply(StreamReply::NotHere, None).await;
        return;
    };
    if artifact != setup.artifact || piece.0 >= setup.pieces() {
        let _ = request.reply(StreamReply::NotHere, None).await;
        return;
    }
    seen.asked.fetch_add(1, Ordering::Relaxed);
    let range = setup.range(piece);
    let bytes = match &setup.manner {
        Manner::Silent => return request.stopped().await,
        Manner::Liar => Bytes::from(vec![0x5a; range.len()]),
        Manner::Honest(bytes) => bytes.slice(range),
    };
    let reply = StreamReply::Piece { codec: Codec::Raw, len: bytes.len() as u32 };
    // An error says that the asker is gone.
    let _ = request.reply(reply, Some(bytes)).await;
}
