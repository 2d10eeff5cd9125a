//! The endpoint: one socket, all connections.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use shoal_pki::{Credentials, Role};
use shoal_proto::{
    NodeId,
    peer::{CloseReason, PeerMessage},
};
use tokio::{
    sync::{Semaphore, mpsc, oneshot},
    time::timeout,
};
use tokio_util::task::TaskTracker;

use crate::{
    buffers::{Drops, SocketBuffers},
    config::{EndpointConfig, Opened},
    connection::{Connection, Pacing},
    control::{self, Control},
    dial::{self, CROSSING, decided},
    error::{ConnectError, TransportError, code},
    pace::Pacer,
    peers::{Peers, Want},
    request::IncomingRequest,
};

/// What waits for the process, all connections together. Messages are at most 16 KiB and requests 256 KiB,
/// most of them far less.
const INCOMING_QUEUE: usize = 256;

/// Handshakes that run at a time; each costs some 64 KiB and a millisecond of a core.
const HANDSHAKES_MAX: usize = 128;

/// With a limit on what is received, the receive windows together hold what it lets pass in a part of a second, this
/// one: what they hold comes before the senders are slowed, and covers paths of as long a round trip.
const WINDOWS_PER_SECOND: u64 = 4;

/// A shutdown waits this long for peers to have heard of it.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(3);

/// What comes from the peers.
#[derive(Debug)]
pub enum Incoming {
    /// A connection is up, whoever dialled. Before it nothing comes from that connection.
    Connected(Connection),
    /// A control message; those of one connection come in order.
    Message(Connection, PeerMessage),
    /// A question. Some may still be taken from the queue after their connection was closed; replying then
    /// fails.
    Request(IncomingRequest),
    /// A connection is gone, and why; the last of that connection. When the peer has already come back,
    /// the new connection's [`Self::Connected`] may stand before it: compare connections, not nodes.
    Closed(Connection, String),
}

/// A process's end of the data plane. Cheap to clone. It lives until [`Self::shutdown`], or until the
/// receiver of [`Incoming`] is dropped and its connections with it.
#[derive(Clone, Debug)]
pub struct Endpoint(Arc<Inner>);

/// What the tasks of an endpoint share.
pub(crate) struct Inner {
    me: NodeId,
    cluster: String,
    credentials: Credentials,
    quinn: quinn::Endpoint,
    local_addr: SocketAddr,
    versions: Vec<u16>,
    buffers: SocketBuffers,
    drops: Drops,
    regions: quinn::ClientConfig,
    asking: quinn::ClientConfig,
    peers: Mutex<Peers>,
    pacing: Pacing,
    yields: Arc<AtomicBool>,
    receive_budget_bytes: u64,
    incoming: mpsc::Sender<Incoming>,
    tasks: TaskTracker,
}

impl Endpoint {
    /// Listens, and begins to take connections.
    ///
    /// # Errors
    /// [`TransportError`]: the address is in use, or a setting cannot be.
    pub fn bind(
        config: &EndpointConfig,
    ) -> Result<(Self, mpsc::Receiver<Incoming>), TransportError> {
        let failed = |error| TransportError::Listen { addr: config.listen, error };
        let yields = Arc::<AtomicBool>::default();
        let Opened { quinn, buffers, drops, regions, asking } = config.open(yields.clone())?;
        let me = config.credentials.identity().member().node;
        let (incoming, receiver) = mpsc::channel(INCOMING_QUEUE);
        let peers = Peers::new(me, config.max_connections, config.receive_budget_bytes, CROSSING);
        let inner = Arc::new(Inner {
            me,
            cluster: config.credentials.trust().cluster().to_string(),
            credentials: config.credentials.clone(),
            local_addr: quinn.local_addr().map_err(failed)?,
            quinn,
            versions: config.versions.clone(),
            buffers,
            drops,
            regions,
            asking,
            peers: Mutex::new(peers),
            pacing: Pacing::default(),
            yields,
            receive_budget_bytes: config.receive_budget_bytes,
            incoming,
            tasks: TaskTracker::new(),
        });
        inner.tasks.spawn(accept(inner.clone()));
        Ok((Self(inner), receiver))
    }

    /// The address that it listens on.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.0.local_addr
    }

    /// What the kernel gave of the buffers that its socket asked for.
    #[must_use]
    pub fn socket_buffers(&self) -> SocketBuffers {
        self.0.buffers
    }

    /// Datagrams so far that the kernel dropped on arrival, for want of room in the socket's buffer. It reads a table
    /// of the kernel's: not for a hot path.
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn dropped_datagrams(&self) -> io::Result<u64> {
        self.0.drops.count()
    }

    /// The connection to `expect`: the one there is, or one to be dialled at `addr`. Callers at the same time
    /// share one dial, and a dial of the peer's.
    ///
    /// # Errors
    /// [`ConnectError`]; another node at `addr` is one.
    pub async fn connect(
        &self,
        addr: SocketAddr,
        expect: NodeId,
    ) -> Result<Connection, ConnectError> {
        if expect == self.0.me {
            return Err(ConnectError::Own);
        }
        if self.0.tasks.is_closed() {
            return Err(ConnectError::ShutDown);
        }
        let want = self.0.peers().want(expect);
        match want {
            Want::Have(connection) => Ok(connection),
            Want::Join(waiter) => decided(waiter).await,
            Want::Full => Err(ConnectError::Full),
            Want::Dial(attempt, waiter) => {
                // A task of its own: others may wait for it when this caller does no longer.
                let dial = dial::dial_node(self.0.clone(), addr, expect, attempt, waiter.clone());
                self.0.tasks.spawn(dial);
                decided(waiter).await
            }
        }
    }

    /// The connection to whoever is at `addr`, if it is of `role`: for the addresses of a configuration,
    /// which name no node.
    ///
    /// # Errors
    /// [`ConnectError`]; another role at `addr` is one.
    pub async fn connect_any(
        &self,
        addr: SocketAddr,
        role: Role,
    ) -> Result<Connection, ConnectError> {
        if self.0.tasks.is_closed() {
            return Err(ConnectError::ShutDown);
        }
        let held = {
            let peers = self.0.peers();
            let fits =
                |held: &&Connection| held.remote_addr() == addr && held.member().role == role;
            peers.all().find(fits).cloned()
        };
        if let Some(connection) = held {
            return Ok(connection);
        }
        let (tell, outcome) = oneshot::channel();
        let inner = self.0.clone();
        self.0.tasks.spawn(async move {
            let _ = tell.send(dial::dial_role(inner, addr, role).await);
        });
        outcome.await.unwrap_or(Err(ConnectError::ShutDown))
    }

    /// The connection to `node`, if it is up.
    #[must_use]
    pub fn connection(&self, node: &NodeId) -> Option<Connection> {
        self.0.peers().get(node).cloned()
    }

    /// What limits the piece bytes that are sent, on all connections together.
    #[must_use]
    pub fn up(&self) -> &Pacer {
        &self.0.pacing.up
    }

    /// What limits the piece bytes that are received. Set its limit with [`Self::limit_down`].
    #[must_use]
    pub fn down(&self) -> &Pacer {
        &self.0.pacing.down
    }

    /// Limits the piece bytes that are received, on all connections together, in bytes a second: they are read no faster, and
    /// no more is let come meanwhile than fits a moment of it.
    pub fn limit_down(&self, limit: Option<u64>) {
        self.0.pacing.down.set_limit(limit);
        let all = self.0.receive_budget_bytes;
        let budget = limit.map_or(all, |limit| (limit / WINDOWS_PER_SECOND).min(all));
        self.0.peers().set_receive_budget(budget);
    }

    /// Whether what is sent yields to other traffic, from the next acknowledgement on: congestion is judged by delay, before any
    /// queue is full, and packets say that others go first (DSCP LE, RFC 8622). What is received follows its senders' setting.
    pub fn yield_to_others(&self, yields: bool) {
        self.0.yields.store(yields, Ordering::Relaxed);
    }

    /// All connections that are up.
    #[must_use]
    pub fn connections(&self) -> Vec<Connection> {
        self.0.peers().all().cloned().collect()
    }

    /// The trust bundles that lead on from number `after`, from whoever answers at `addr`: for a machine that slept through a
    /// change of the CA, and so believes nobody's certificate any more. What comes is to be checked by its signatures.
    ///
    /// # Errors
    /// [`ConnectError`]; the other side's refusal of this machine's certificate is one.
    pub async fn ask_trust(
        &self,
        addr: SocketAddr,
        after: u64,
    ) -> Result<Vec<Vec<u8>>, ConnectError> {
        dial::ask_trust(&self.0, addr, after).await
    }

    /// Closes the connections whose certificates the trust of the moment no longer covers, those of revoked machines first;
    /// returns how many. To be called when the trust has changed, and now and then: certificates expire. It costs a
    /// signature a connection, so it is not for a task that others wait for.
    pub fn recheck(&self) -> usize {
        let trust = self.0.credentials.trust();
        let (gone, mut kept): (Vec<_>, Vec<_>) = self
            .connections()
            .into_iter()
            .partition(|connection| trust.is_revoked(&connection.node()));
        let close = |connection: &Connection| connection.close(CloseReason::Untrusted);
        gone.iter().for_each(close);
        kept.retain(|connection| !connection.is_trusted(&trust));
        kept.iter().for_each(close);
        gone.len() + kept.len()
    }

    /// Closes everything, tells the peers, and ends all tasks; waits a few seconds at most. The receiver of
    /// [`Incoming`] still brings what was queued; it ends once all clones of the endpoint are dropped.
    pub async fn shutdown(&self) {
        self.0.tasks.close();
        self.0.quinn.close(code(CloseReason::Done), b"");
        let ended = async {
            self.0.quinn.wait_idle().await;
            self.0.tasks.wait().await;
        };
        if timeout(SHUTDOWN_TIMEOUT, ended).await.is_err() {
            tracing::debug!("a shutdown did not wait for every peer and task");
        }
    }
}

impl Inner {
    pub(crate) fn me(&self) -> NodeId {
        self.me
    }

    pub(crate) fn cluster(&self) -> &str {
        &self.cluster
    }

    /// The protocol versions that it speaks.
    pub(crate) fn versions(&self) -> &[u16] {
        &self.versions
    }

    pub(crate) fn pacing(&self) -> &Pacing {
        &self.pacing
    }

    pub(crate) fn regions(&self) -> &quinn::ClientConfig {
        &self.regions
    }

    pub(crate) fn asking(&self) -> &quinn::ClientConfig {
        &self.asking
    }

    pub(crate) fn quinn(&self) -> &quinn::Endpoint {
        &self.quinn
    }

    /// The slots. Nothing in there waits, so the lock is held for moments.
    pub(crate) fn peers(&self) -> MutexGuard<'_, Peers> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves a connection that has its slot, until it ends.
    pub(crate) fn serve(self: &Arc<Self>, connection: Connection, control: Control) {
        // The trust may have changed since the handshake, and the connection not have been among those rechecked.
        if !connection.is_trusted(&self.credentials.trust()) {
            connection.close(CloseReason::Untrusted);
        }
        let inner = self.clone();
        self.tasks.spawn(async move {
            // The slot must be free before the process hears of the end and dials again.
            let freed = {
                let (inner, connection) = (inner.clone(), connection.clone());
                async move {
                    connection.quinn().closed().await;
                    inner.peers().closed(&connection);
                }
            };
            let served = control::serve(connection, control, inner.incoming.clone());
            tokio::join!(freed, served);
        });
    }
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner").field("local_addr", &self.local_addr).finish_non_exhaustive()
    }
}

/// Takes handshakes, a bounded number at a time, until the endpoint is closed.
async fn accept(inner: Arc<Inner>) {
    let permits = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    loop {
        let Ok(permit) = permits.clone().acquire_owned().await else { return };
        let Some(incoming) = inner.quinn.accept().await else { return };
        let answer = dial::answer(inner.clone(), incoming);
        inner.tasks.spawn(async move {
            answer.await;
            drop(permit);
        });
    }
}
