//! The data plane: one QUIC connection between two machines, and everything that they say over it.
//!
//! An [`Endpoint`] is one UDP socket that dials and is dialled. Both ends of a handshake show a
//! certificate of the cluster (`shoal_pki`), so a [`Connection`] always has a
//! [`Member`](shoal_pki::Member) at its other end; which roles may do what is for the process to decide.
//!
//! **One connection a pair.** Two machines that dial each other at the same moment keep one connection,
//! and both keep the same. After the TLS handshake the dialler *claims* the pair (an empty frame on its
//! control stream) and the other side *welcomes* it (the same, back). Only then does either side use it.
//! A machine that is dialling holds back a claim from a greater node id until its own dial has ended, and
//! yields at once to a lesser one; so callers of [`Endpoint::connect`] get the connection that is kept, and
//! nobody works on one that is about to go. The rules are in `peers`, free of sockets.
//!
//! **On a connection.** Each side has one control stream of [`PeerMessage`](shoal_proto::peer::PeerMessage)s
//! behind a bounded queue ([`Connection::try_send`]), and each question opens a stream of its own
//! ([`Connection::request`]): the request, the reply's header, and for a piece its bytes
//! ([`ReplyBody`]). Dropping either side's half cancels the other.
//!
//! **Back-pressure** goes all the way. What arrives comes out of one bounded channel of [`Incoming`]; while
//! the process does not take from it, the control streams are not read and no further streams are
//! granted, until the sender's own queue is full and [`SendError::Full`] says so. Receive windows come from
//! one budget for the whole process ([`EndpointConfig::receive_budget_bytes`]), shared by its connections.
//!
//! **Limits** of bandwidth hold for the piece bytes of a whole process ([`Endpoint::up`], [`Endpoint::limit_down`]): what is sent
//! takes its turn before it goes, and what comes is read no faster than it may, so that flow control slows its senders.
//!
//! Whatever is malformed or too long closes its connection with
//! [`CloseReason::Malformed`](shoal_proto::peer::CloseReason::Malformed).

mod buffers;
mod config;
mod congestion;
mod connection;
mod control;
mod dial;
mod endpoint;
mod error;
mod frame;
mod mark;
mod pace;
mod peers;
mod request;
mod socket;

pub use buffers::SocketBuffers;
pub use config::EndpointConfig;
pub use connection::{Connection, ConnectionStats};
pub use endpoint::{Endpoint, Incoming};
pub use error::{ConnectError, ReplyError, RequestError, SendError, TransportError};
pub use pace::{Paced, Pacer, Turn};
pub use request::{Answer, IncomingRequest, ReplyBody};
