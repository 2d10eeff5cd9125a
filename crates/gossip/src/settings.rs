//! Every number of the gossip plane, and what libp2p is told.

use std::time::Duration;

use libp2p::{
    StreamProtocol, connection_limits::ConnectionLimits, gossipsub, quic, request_response,
};
use shoal_proto::gossip::GOSSIP_MESSAGE_MAX_BYTES;

/// A peer that has shown no certificate of the cluster for this long is cut off.
pub const VERIFY_MAX: Duration = Duration::from_secs(2);

/// How many connected peers may be unverified at once: the room for a storm of new machines, and a
/// bound for strangers.
pub const UNVERIFIED_MAX: u32 = 64;

/// How many connections a machine makes by itself: with those that others make to it, about twice as
/// many, and so more than the mesh takes.
pub const TARGET_PEERS: usize = 16;

/// Mesh links of a machine (gossipsub's D).
pub const MESH_N: usize = 8;

/// Below this many mesh links new ones are made (D_low).
const MESH_N_LOW: usize = 6;

/// Above this many, some are given up (D_high).
const MESH_N_HIGH: usize = 12;

/// How many of the mesh links are of a machine's own making, at least (D_out).
const MESH_OUTBOUND_MIN: usize = 3;

/// To how many peers outside the mesh the ids of the last messages go each second (D_lazy).
pub const GOSSIP_LAZY: usize = 8;

/// For how long the same message is not taken, or published, again. Shorter than a region process's
/// pause between repeats of a goal, so that a repeat reaches machines that came later.
pub const DUPLICATE_CACHE: Duration = Duration::from_secs(60);

/// The mesh is tended this often.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// What gossipsub puts around a message, at most: a topic of two names of 63 bytes, and field tags.
const ENVELOPE_MAX_BYTES: usize = 512;

/// The most message ids that one round of gossip names to a peer: 256 ids of 20 bytes fit into a third of
/// gossipsub's 16 KiB for control messages.
const GOSSIP_IDS_MAX: usize = 256;

/// How many messages wait for one peer at most: 256 KiB. Polling mends what is dropped.
const PEER_QUEUE_MAX: usize = 256;

/// How many events wait for the process; what comes on top is dropped and counted.
pub const EVENTS_MAX: usize = 1_024;

/// How many commands of the process wait.
pub(crate) const COMMANDS_MAX: usize = 256;

/// How many published messages wait for a first peer.
pub(crate) const UNSENT_MAX: usize = 64;

/// For how long they wait.
pub(crate) const UNSENT_FOR: Duration = Duration::from_secs(60);

/// How often deadlines and connections are looked at.
pub(crate) const TICK: Duration = Duration::from_millis(250);

/// How many dials are under way at once.
pub(crate) const DIALS_MAX: usize = 8;

/// How long the members' certificates are believed before they are checked again: they expire.
pub(crate) const RECHECK: Duration = Duration::from_secs(600);

/// Links outside the mesh are idle most of the time, and are kept for so long.
pub(crate) const IDLE_MAX: Duration = Duration::from_secs(86_400);

/// How long closing connections may take at the end.
pub(crate) const SHUTDOWN_MAX: Duration = Duration::from_millis(500);

/// Time for a dialed address to answer, and for a listener to start.
pub(crate) const CONNECT_MAX: Duration = Duration::from_secs(5);

/// A message's id is the first 160 bits of its content's hash: no two contents share one.
const MESSAGE_ID_BYTES: usize = 20;

/// Streams that a peer may have open: gossipsub, identify and membership need five.
const STREAMS_MAX: u32 = 16;

/// Bytes that a peer may have in flight on a stream, and on all of them.
const STREAM_WINDOW_BYTES: u32 = 64 << 10;
const CONNECTION_WINDOW_BYTES: u32 = 256 << 10;

/// The membership exchange's protocol.
pub(crate) const MEMBERSHIP: StreamProtocol = StreamProtocol::new("/shoal/membership/1");

/// A message's id: the hash of its content, whoever sends it.
fn message_id(data: &[u8]) -> gossipsub::MessageId {
    gossipsub::MessageId::new(&blake3::hash(data).as_bytes()[..MESSAGE_ID_BYTES])
}

pub(crate) fn gossipsub_config() -> Result<gossipsub::Config, gossipsub::ConfigBuilderError> {
    gossipsub::ConfigBuilder::default()
        .validation_mode(gossipsub::ValidationMode::Anonymous)
        .validate_messages()
        .message_id_fn(|message| message_id(&message.data))
        .duplicate_cache_time(DUPLICATE_CACHE)
        .max_transmit_size(GOSSIP_MESSAGE_MAX_BYTES + ENVELOPE_MAX_BYTES)
        .mesh_n(MESH_N)
        .mesh_n_low(MESH_N_LOW)
        .mesh_n_high(MESH_N_HIGH)
        .mesh_outbound_min(MESH_OUTBOUND_MIN)
        .gossip_lazy(GOSSIP_LAZY)
        .heartbeat_initial_delay(HEARTBEAT / 4)
        .heartbeat_interval(HEARTBEAT)
        .flood_publish(true)
        .connection_handler_queue_len(PEER_QUEUE_MAX)
        .max_control_messages_sent(GOSSIP_IDS_MAX)
        .max_ihave_messages_heartbeat(GOSSIP_IDS_MAX)
        .build()
}

pub(crate) fn membership_config() -> request_response::Config {
    request_response::Config::default().with_request_timeout(VERIFY_MAX)
}

pub(crate) fn quic_config(mut config: quic::Config) -> quic::Config {
    config.handshake_timeout = CONNECT_MAX;
    // A dead neighbour is noticed after 30 s; until then the others carry the messages.
    config.max_idle_timeout = 30_000;
    config.keep_alive_interval = Duration::from_secs(10);
    config.max_concurrent_stream_limit = STREAMS_MAX;
    config.max_stream_data = STREAM_WINDOW_BYTES;
    config.max_connection_data = CONNECTION_WINDOW_BYTES;
    config
}

/// Room for `max_peers` members and [`UNVERIFIED_MAX`] others; two connections a pair for the moment
/// when both dial.
pub(crate) fn limits(max_peers: u32) -> ConnectionLimits {
    ConnectionLimits::default()
        .with_max_pending_incoming(Some(UNVERIFIED_MAX))
        .with_max_pending_outgoing(Some(DIALS_MAX as u32 * 2))
        .with_max_established(Some(max_peers.saturating_add(UNVERIFIED_MAX)))
        .with_max_established_per_peer(Some(2))
}
