//! The gossip plane: a region's goals, from neighbour to neighbour, by libp2p.
//!
//! A process starts one [`Gossip`] with its [`GossipConfig`], feeds it addresses
//! ([`Gossip::add_peers`], [`Gossip::dial`]), publishes ([`Gossip::publish`]) and reads
//! [`GossipEvent`]s. Below is one task that owns a libp2p swarm over QUIC, with the Ed25519 key of the
//! machine's certificate. Goals travel on one gossipsub topic for each region
//! ([`shoal_proto::gossip::goal_topic`]). This plane is the accelerator; polling is the certain way. So
//! whatever does not fit (a slow reader, a full queue) is dropped and counted, never waited for.
//!
//! # Members only
//!
//! libp2p's TLS proves a peer's key, not that the cluster knows it. So each side of a new connection
//! shows its certificate over `/shoal/membership/1` (`membership.rs`), and checks the other's: the
//! cluster's CA, not revoked, the very key of the connection, an agent or region process of the same
//! region. Until then a gate (`gate.rs`) stands between the connection and gossipsub, which therefore
//! does not know that the peer subscribes to anything: it is sent no message and none of its messages
//! is looked at. A peer that has not shown a certificate after [`VERIFY_MAX`] is cut off. When the trust
//! changes, every peer is checked again.
//!
//! # What a message goes through
//!
//! gossipsub runs in its anonymous mode, and refuses messages that name an author: the author's key
//! would prove nothing, since what counts is the goal's own signature. A message is forwarded only when
//! it is decoded and its goal's signature holds. An unknown version or a malformed message is ignored
//! and counted, and the connection stays: a newer release may speak so. A message's id is the hash of
//! its content, so the same goal from several region processes is one message, delivered once within
//! [`DUPLICATE_CACHE`].
//!
//! # The mesh, for 100,000 machines in one region
//!
//! Each keeps [`TARGET_PEERS`] connections of its own making and takes on as many as its
//! `max_peers` allows. The mesh holds [`MESH_N`] of them: with 7 new machines at each hop, 100,000 are
//! reached in six hops, each costs one message of at most 1 KiB in both directions per link, and
//! a random graph of that degree stays connected when half of its machines are gone at once. Links
//! outside the mesh carry the ids of the last messages ([`GOSSIP_LAZY`] of them each second), which
//! mends what a lost link made miss. Who publishes sends to every peer, not to its mesh only.

mod book;
mod gate;
mod gossip;
mod membership;
mod node;
mod settings;
mod stats;
mod swarm;
#[cfg(test)]
mod tests;

pub use gossip::{Gossip, GossipConfig, GossipError, GossipEvent};
pub use settings::{
    DUPLICATE_CACHE, EVENTS_MAX, GOSSIP_LAZY, MESH_N, TARGET_PEERS, UNVERIFIED_MAX, VERIFY_MAX,
};
pub use stats::GossipStats;
