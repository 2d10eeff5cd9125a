//! One connection, and the tasks that serve it.

use std::{
    fmt,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use quinn::{VarInt, crypto::rustls::HandshakeData};
use rustls::pki_types::CertificateDer;
use shoal_pki::{Member, Trust};
use shoal_proto::{
    NodeId,
    peer::{
        CloseReason, PEER_MESSAGE_MAX_BYTES, PeerMessage, StreamReply, StreamRequest, version_of,
    },
};
use tokio::sync::mpsc;

use crate::{
    error::{RequestError, SendError, code},
    frame,
    pace::Pacer,
    request::{self, ReplyBody},
};

/// Control messages that wait to be sent on one connection. Each is 16 KiB at most and most are far
/// shorter: with 40 neighbours that all stand still it is 40 MiB at the very worst.
const CONTROL_QUEUE_MESSAGES: usize = 64;

/// A connection to another member. Cheap to clone; all clones are the same connection, and `==` tells whether
/// two are. It stays open when the clones are dropped: [`Self::close`] ends it.
#[derive(Clone)]
pub struct Connection(Arc<Shared>);

struct Shared {
    quinn: quinn::Connection,
    member: Member,
    dialled: bool,
    since: Instant,
    /// Milliseconds from `since` to the last message or request, either way.
    active_ms: AtomicU64,
    control: mpsc::Sender<Bytes>,
    pacing: Pacing,
}

/// The limits on piece bytes that all connections of a process share.
#[derive(Debug, Clone, Default)]
pub(crate) struct Pacing {
    pub(crate) up: Pacer,
    pub(crate) down: Pacer,
}

/// What a connection did, and how its path is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionStats {
    /// UDP payload bytes sent.
    pub sent_bytes: u64,
    /// UDP payload bytes received.
    pub received_bytes: u64,
    /// Packets sent that were lost.
    pub lost_packets: u64,
    /// The path's round trip, as estimated.
    pub rtt: Duration,
    /// The congestion window, in bytes.
    pub congestion_window_bytes: u64,
    /// The largest UDP payload that the path is known to carry, in bytes.
    pub mtu: u16,
    /// How old the connection is.
    pub age: Duration,
    /// How long since the last control message or request, either way.
    pub idle: Duration,
}

impl Connection {
    /// The connection, and the queue that its control stream shall be fed from.
    pub(crate) fn new(
        quinn: quinn::Connection,
        member: Member,
        dialled: bool,
        pacing: Pacing,
    ) -> (Self, mpsc::Receiver<Bytes>) {
        let (control, queue) = mpsc::channel(CONTROL_QUEUE_MESSAGES);
        let since = Instant::now();
        let active_ms = AtomicU64::new(0);
        let shared = Shared { quinn, member, dialled, since, active_ms, control, pacing };
        (Self(Arc::new(shared)), queue)
    }

    /// Who is at the other end.
    #[must_use]
    pub fn member(&self) -> &Member {
        &self.0.member
    }

    /// The other end's key.
    #[must_use]
    pub fn node(&self) -> NodeId {
        self.0.member.node
    }

    /// The certificate that the other end showed in the handshake, DER.
    #[must_use]
    pub fn certificate(&self) -> Option<Vec<u8>> {
        let chain = self.0.quinn.peer_identity()?;
        let chain = chain.downcast::<Vec<CertificateDer<'static>>>().ok()?;
        chain.first().map(|certificate| certificate.to_vec())
    }

    pub(crate) fn is_trusted(&self, trust: &Trust) -> bool {
        self.certificate().is_some_and(|der| trust.verify_certificate(&der).is_ok())
    }

    /// The protocol version that both ends speak on it: the newest that they have in common.
    #[must_use]
    pub fn version(&self) -> Option<u16> {
        let data = self.0.quinn.handshake_data()?.downcast::<HandshakeData>().ok()?;
        version_of(&data.protocol?)
    }

    /// Where the other end is.
    #[must_use]
    pub fn remote_addr(&self) -> SocketAddr {
        self.0.quinn.remote_address()
    }

    /// Whether this side dialled.
    #[must_use]
    pub fn dialled(&self) -> bool {
        self.0.dialled
    }

    /// Whether it is closed or lost.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.0.quinn.close_reason().is_some()
    }

    /// Queues a control message, at once or not at all.
    ///
    /// # Errors
    /// [`SendError::Full`] when the peer reads more slowly than this side writes.
    pub fn try_send(&self, message: &PeerMessage) -> Result<(), SendError> {
        let message = self.encode(message)?;
        self.0.control.try_send(message).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => SendError::Full,
            mpsc::error::TrySendError::Closed(_) => SendError::Closed,
        })
    }

    /// Queues a control message as soon as there is room. Not for the loop that takes from
    /// [`crate::Incoming`]: two machines that each wait for the other there would wait for ever.
    ///
    /// # Errors
    /// [`SendError::Closed`], [`SendError::TooLong`].
    pub async fn send(&self, message: &PeerMessage) -> Result<(), SendError> {
        let message = self.encode(message)?;
        self.0.control.send(message).await.map_err(|_| SendError::Closed)
    }

    fn encode(&self, message: &PeerMessage) -> Result<Bytes, SendError> {
        if self.is_closed() {
            return Err(SendError::Closed);
        }
        frame::encode(message, PEER_MESSAGE_MAX_BYTES).map_err(SendError::TooLong)
    }

    /// Asks on a stream of its own; waits while the peer grants none. There is no deadline but the
    /// connection's end. Dropping the future, or the body, cancels the request.
    ///
    /// # Errors
    /// [`RequestError`].
    pub async fn request(
        &self,
        request: StreamRequest,
    ) -> Result<(StreamReply, ReplyBody), RequestError> {
        request::ask(self, &request).await
    }

    /// Closes at once: what is queued is dropped, what is open fails.
    pub fn close(&self, reason: CloseReason) {
        self.0.quinn.close(code(reason), b"");
    }

    /// What it did, and how its path is.
    #[must_use]
    pub fn stats(&self) -> ConnectionStats {
        let stats = self.0.quinn.stats();
        let age = self.0.since.elapsed();
        let active = Duration::from_millis(self.0.active_ms.load(Ordering::Relaxed));
        ConnectionStats {
            sent_bytes: stats.udp_tx.bytes,
            received_bytes: stats.udp_rx.bytes,
            lost_packets: stats.path.lost_packets,
            rtt: stats.path.rtt,
            congestion_window_bytes: stats.path.cwnd,
            mtu: stats.path.current_mtu,
            age,
            idle: age.saturating_sub(active),
        }
    }

    pub(crate) fn quinn(&self) -> &quinn::Connection {
        &self.0.quinn
    }

    pub(crate) fn pacing(&self) -> &Pacing {
        &self.0.pacing
    }

    pub(crate) fn age(&self) -> Duration {
        self.0.since.elapsed()
    }

    /// Notes that it is in use.
    pub(crate) fn touch(&self) {
        let now_ms = self.0.since.elapsed().as_millis() as u64;
        self.0.active_ms.store(now_ms, Ordering::Relaxed);
    }

    pub(crate) fn set_receive_window(&self, bytes: u64) {
        if let Ok(window) = VarInt::from_u64(bytes) {
            self.0.quinn.set_receive_window(window);
        }
    }
}

impl PartialEq for Connection {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Connection {}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("member", &self.0.member)
            .field("remote", &self.remote_addr())
            .field("dialled", &self.0.dialled)
            .finish_non_exhaustive()
    }
}
