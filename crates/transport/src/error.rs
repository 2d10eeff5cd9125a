//! What can go wrong, an operation each.

use std::{io, net::SocketAddr};

use quinn::{ConnectionError, TransportErrorCode, VarInt};
use shoal_pki::{PkiError, Role};
use shoal_proto::{
    NodeId,
    codec::CodecError,
    peer::{CloseReason, alpn},
};

/// Why an endpoint could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The address cannot be listened on.
    #[error("cannot listen on UDP {addr}: {error}")]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// What the system said.
        error: io::Error,
    },
    /// A setting that cannot be.
    #[error("{0}")]
    Config(String),
    /// The identity or the trust cannot be used.
    #[error(transparent)]
    Pki(#[from] PkiError),
}

/// Why there is no connection.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// No answer in time.
    #[error("no answer from {0}")]
    Timeout(SocketAddr),
    /// The handshake failed: most often one side's certificate did not please the other.
    #[error("the handshake failed: {0}")]
    Handshake(String),
    /// The two ends have no protocol version in common.
    #[error(
        "the peer at {addr} speaks none of the protocol versions of this release ({}): upgrade the older one of the two",
        names(ours)
    )]
    NoCommonVersion {
        /// The peer.
        addr: SocketAddr,
        /// What this side speaks.
        ours: Vec<u16>,
    },
    /// Another machine answered.
    #[error("expected node {expected}, but {found} answered")]
    WrongPeer {
        /// Who was wanted.
        expected: NodeId,
        /// Who answered.
        found: NodeId,
    },
    /// A process of another role answered.
    #[error("expected a process of role {expected}, but one of role {found} answered")]
    WrongRole {
        /// What was wanted.
        expected: Role,
        /// What answered.
        found: Role,
    },
    /// The other side, or this one, has no room for another connection.
    #[error("too many connections")]
    Full,
    /// The other side closed the connection.
    #[error("the peer closed the connection: {0}")]
    Refused(String),
    /// The address cannot be dialled.
    #[error("cannot dial {0}: {1}")]
    Address(SocketAddr, String),
    /// This is the own node id.
    #[error("a machine does not connect to itself")]
    Own,
    /// The endpoint is shut down.
    #[error("the endpoint is shut down")]
    ShutDown,
}

/// Why a control message was not queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The queue is full: the peer, or the way to it, is slower than what is sent.
    #[error("the connection's queue is full")]
    Full,
    /// The connection is closed.
    #[error("the connection is closed")]
    Closed,
    /// The message is longer than any peer would take.
    #[error(transparent)]
    TooLong(CodecError),
}

/// Why a request has no answer, or a reply no body.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The connection was closed or lost.
    #[error("the connection is gone: {0}")]
    Closed(String),
    /// The request is longer than any peer would take.
    #[error(transparent)]
    TooLong(CodecError),
    /// The peer gave the request up.
    #[error("the peer gave up the request")]
    Dropped,
    /// The peer broke the protocol; the connection is closed.
    #[error("the peer broke the protocol: {0}")]
    Malformed(&'static str),
    /// More was asked of a body than it has left.
    #[error("{asked} bytes asked of a body with {left} left")]
    PastEnd {
        /// Bytes asked for.
        asked: usize,
        /// Bytes left.
        left: usize,
    },
}

/// Why a reply did not arrive.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReplyError {
    /// The asker no longer wants it.
    #[error("the peer stopped the stream after {sent_bytes} bytes")]
    Stopped {
        /// Bytes that had been given to the connection by then, header included.
        sent_bytes: u64,
    },
    /// The connection was closed or lost.
    #[error("the connection is gone: {0}")]
    Closed(String),
    /// The header is longer than any peer would take.
    #[error(transparent)]
    TooLong(CodecError),
    /// The header promises another length than the body has: a mistake of the caller.
    #[error("a body of {body} bytes under a header for {header}")]
    WrongLength {
        /// Bytes by the header.
        header: usize,
        /// Bytes of the body.
        body: usize,
    },
}

/// Protocol versions as people read them.
pub(crate) fn names(versions: &[u16]) -> String {
    versions.iter().map(|version| alpn(*version)).collect::<Vec<_>>().join(", ")
}

/// Whether a handshake failed because the two ends have no protocol version in common; either end learns it.
pub(crate) fn no_common_version(error: &ConnectionError) -> bool {
    /// TLS's alert for it, `no_application_protocol` (RFC 7301), as QUIC carries alerts (RFC 9001, section 4.8).
    const NO_APPLICATION_PROTOCOL: u8 = 120;
    let code = match error {
        ConnectionError::TransportError(error) => error.code,
        ConnectionError::ConnectionClosed(close) => close.error_code,
        _ => return false,
    };
    code == TransportErrorCode::crypto(NO_APPLICATION_PROTOCOL)
}

/// A close reason as QUIC carries it.
pub(crate) fn code(reason: CloseReason) -> VarInt {
    VarInt::from_u32(reason as u32)
}

/// The reason behind a QUIC error code.
pub(crate) fn reason_of(code: VarInt) -> Option<CloseReason> {
    use CloseReason::{Banned, Done, Duplicate, Full, Idle, Malformed, Untrusted, WrongPeer};
    [Done, Malformed, Duplicate, Banned, Full, Idle, WrongPeer, Untrusted]
        .into_iter()
        .find(|reason| *reason as u64 == code.into_inner())
}

/// The reason with which the peer closed, if it did.
pub(crate) fn closed_by_peer(error: &ConnectionError) -> Option<CloseReason> {
    match error {
        ConnectionError::ApplicationClosed(close) => reason_of(close.error_code),
        _ => None,
    }
}

/// Why a connection ended, for people.
pub(crate) fn describe(error: &ConnectionError) -> String {
    match error {
        ConnectionError::ApplicationClosed(close) => match reason_of(close.error_code) {
            Some(reason) => format!("closed by the peer: {reason:?}"),
            None => format!("closed by the peer with code {}", close.error_code),
        },
        ConnectionError::LocallyClosed => "closed here".into(),
        ConnectionError::TimedOut => "nothing came for too long".into(),
        ConnectionError::Reset => "the peer has restarted".into(),
        other => other.to_string(),
    }
}
