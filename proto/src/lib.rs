//! The words that Shoal's processes say to each other.
//!
//! Everything here is plain data: names and ids ([`ids`]), what an artifact is made of
//! ([`manifest`]), what a region shall run ([`goal`]), the states that people see ([`state`]), and the
//! messages of the three conversations: machine to machine ([`peer`]), machine to region process
//! ([`region`]), and the region's gossip topic ([`gossip`]). All of it goes over the wire through one
//! door, [`codec`], which puts a version byte in front and holds each message to its size.
//!
//! The crate is pure: `no_std` with `alloc`, no sockets, files, clock, threads or random source. What
//! needs a hash function is in `shoal-pieces`, what needs a key is in `shoal-pki`.
#![no_std]

extern crate alloc;

pub mod bitmap;
pub mod codec;
pub mod goal;
pub mod gossip;
pub mod ids;
pub mod manifest;
pub mod peer;
pub mod region;
pub mod state;
pub mod trust;

pub use bitmap::Bitmap;
pub use ids::{
    AppName, ArtifactId, CommitSha, EncodingId, MachineName, NodeId, PieceHash, PieceIndex,
    RegionName, Revision,
};
