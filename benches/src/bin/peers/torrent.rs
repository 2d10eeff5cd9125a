//! What peers of BitTorrent are given: a metainfo file, and a tracker that tells each of those that came before it.
//!
//! Formats: BEP 3, and BEP 23 for the tracker's compact list.

use std::{
    fs::File,
    io::Read as _,
    net::{IpAddr, SocketAddr, SocketAddrV4},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
};

use anyhow::Context as _;
use aws_lc_rs::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use axum::{
    Router,
    extract::{ConnectInfo, Query, State},
    http::StatusCode,
    routing::get,
};
use serde::Deserialize;
use tokio::sync::oneshot;

/// The length of a piece: usual for a file of 1 GiB.
const PIECE_BYTES: u64 = 1 << 20;

/// How long a peer may wait before it asks the tracker again, in seconds.
const INTERVAL_S: u64 = 60;

/// The metainfo of a file, for a tracker at this address.
pub(crate) fn metainfo(file: &Path, tracker: &str) -> anyhow::Result<Vec<u8>> {
    let name = file.file_name().and_then(|name| name.to_str()).context("a file without a name")?;
    let mut file = File::open(file)?;
    let length = file.metadata()?.len();
    let mut pieces = Vec::new();
    loop {
        let mut piece = Vec::new();
        file.by_ref().take(PIECE_BYTES).read_to_end(&mut piece)?;
        if piece.is_empty() {
            break;
        }
        pieces.extend_from_slice(digest(&SHA1_FOR_LEGACY_USE_ONLY, &piece).as_ref());
    }
    Ok(encode_metainfo(name, length, &pieces, &format!("http://{tracker}/announce")))
}

fn encode_metainfo(name: &str, length: u64, pieces: &[u8], announce: &str) -> Vec<u8> {
    let mut out = b"d8:announce".to_vec();
    string(&mut out, announce.as_bytes());
    out.extend_from_slice(format!("4:infod6:lengthi{length}e4:name").as_bytes());
    string(&mut out, name.as_bytes());
    out.extend_from_slice(format!("12:piece lengthi{PIECE_BYTES}e6:pieces").as_bytes());
    string(&mut out, pieces);
    // Private: peers come from the tracker alone.
    out.extend_from_slice(b"7:privatei1eee");
    out
}

fn string(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(format!("{}:", bytes.len()).as_bytes());
    out.extend_from_slice(bytes);
}

fn encode_peers(peers: &[SocketAddrV4]) -> Vec<u8> {
    let compact: Vec<u8> = peers
        .iter()
        .flat_map(|peer| [&peer.ip().octets()[..], &peer.port().to_be_bytes()].concat())
        .collect();
    let mut out = format!("d8:intervali{INTERVAL_S}e5:peers").into_bytes();
    string(&mut out, &compact);
    out.push(b'e');
    out
}

/// The swarm's peers, and those of them that have announced themselves, in that order.
#[derive(Debug, Default)]
struct Peers {
    all: Vec<SocketAddrV4>,
    known: Vec<SocketAddrV4>,
}

impl Peers {
    /// The peer that asks. On loopback one may ask from another address than it listens at, but ports differ there.
    fn asker(&self, from: IpAddr, port: u16) -> Option<SocketAddrV4> {
        let with_port = || self.all.iter().filter(|peer| peer.port() == port);
        with_port().find(|peer| *peer.ip() == from).or_else(|| with_port().next()).copied()
    }
}

type Shared = Arc<Mutex<Peers>>;

/// A tracker of one swarm. It ends with this.
#[derive(Debug)]
pub(crate) struct Tracker {
    peers: Shared,
    end: Option<oneshot::Sender<()>>,
    server: Option<JoinHandle<()>>,
}

impl Tracker {
    /// Starts it at an address, for these peers.
    pub(crate) fn start(listen: &str, all: &[String]) -> anyhow::Result<Self> {
        let all = all.iter().map(|peer| Ok(peer.parse()?)).collect::<anyhow::Result<_>>()?;
        let listener = std::net::TcpListener::bind(listen)
            .with_context(|| format!("cannot listen at {listen}"))?;
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let listener = runtime.block_on(async { tokio::net::TcpListener::from_std(listener) })?;
        let peers = Shared::new(Mutex::new(Peers { all, known: Vec::new() }));
        let router = Router::new().route("/announce", get(announce)).with_state(peers.clone());
        let (end, ended) = oneshot::channel();
        let server = thread::spawn(move || {
            runtime.block_on(async {
                let service = router.into_make_service_with_connect_info::<SocketAddr>();
                tokio::select! {
                    served = axum::serve(listener, service) => drop(served),
                    _ = ended => {}
                }
            });
        });
        Ok(Self { peers, end: Some(end), server: Some(server) })
    }

    /// How many peers it has heard of.
    pub(crate) fn known(&self) -> usize {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner).known.len()
    }
}

impl Drop for Tracker {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(server) = self.server.take() {
            // It does not panic, and if it did, it has ended.
            let _ = server.join();
        }
    }
}

/// What a peer tells of itself, as far as it matters here.
#[derive(Debug, Deserialize)]
struct Announce {
    port: u16,
}

async fn announce(
    State(peers): State<Shared>,
    ConnectInfo(from): ConnectInfo<SocketAddr>,
    Query(Announce { port }): Query<Announce>,
) -> Result<Vec<u8>, StatusCode> {
    let mut peers = peers.lock().unwrap_or_else(PoisonError::into_inner);
    let asker = peers.asker(from.ip(), port).ok_or(StatusCode::NOT_FOUND)?;
    let others: Vec<_> = peers.known.iter().copied().filter(|peer| *peer != asker).collect();
    if others.len() == peers.known.len() {
        peers.known.push(asker);
    }
    Ok(encode_peers(&others))
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::{Ipv4Addr, TcpListener, TcpStream},
    };

    use super::*;

    #[test]
    fn metainfo_is_as_bep_3_says() {
        let made = encode_metainfo("file", 3, b"01234567890123456789", "http://a/announce");
        let expected = "d8:announce17:http://a/announce4:infod6:lengthi3e4:name4:file\
            12:piece lengthi1048576e6:pieces20:012345678901234567897:privatei1eee";
        assert_eq!(String::from_utf8(made).expect("text"), expected);
    }

    #[test]
    fn metainfo_has_the_hash_of_every_piece() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("file");
        let content = vec![7; PIECE_BYTES as usize + 3];
        std::fs::write(&path, &content).expect("a file");
        let made = metainfo(&path, "127.0.0.1:1").expect("metainfo");
        let (first, last) = content.split_at(PIECE_BYTES as usize);
        let hashes = [first, last].map(|piece| digest(&SHA1_FOR_LEGACY_USE_ONLY, piece));
        let hashes = [hashes[0].as_ref(), hashes[1].as_ref()].concat();
        let expected =
            encode_metainfo("file", content.len() as u64, &hashes, "http://127.0.0.1:1/announce");
        assert_eq!(made, expected);
    }

    #[test]
    fn peers_are_six_bytes_each() {
        let peers = [SocketAddrV4::new(Ipv4Addr::new(10, 77, 1, 2), 0x1f90)];
        assert_eq!(encode_peers(&peers), b"d8:intervali60e5:peers6:\x0a\x4d\x01\x02\x1f\x90e");
        assert_eq!(encode_peers(&[]), b"d8:intervali60e5:peers0:e");
    }

    #[test]
    fn the_tracker_tells_of_those_that_came_before() {
        let free = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let at = free.local_addr().expect("an address").to_string();
        drop(free);
        let all = ["127.0.1.1:1", "127.0.1.2:2"].map(String::from);
        let tracker = Tracker::start(&at, &all).expect("a tracker");
        let ask = |port: u16| {
            let mut stream = TcpStream::connect(&at).expect("the tracker");
            // The hash is no text, as it is seldom.
            let path = format!("/announce?info_hash=%ff%00%9a&peer_id=x&port={port}&compact=1");
            write!(stream, "GET {path} HTTP/1.0\r\n\r\n").expect("to ask");
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).expect("an answer");
            let end = answer.windows(4).position(|four| four == b"\r\n\r\n").expect("a head");
            answer.split_off(end + 4)
        };
        let peer = |port: u16| SocketAddrV4::new(Ipv4Addr::new(127, 0, 1, port as u8), port);
        assert_eq!(ask(1), encode_peers(&[]));
        assert_eq!(ask(2), encode_peers(&[peer(1)]));
        assert_eq!(ask(1), encode_peers(&[peer(2)]));
        assert_eq!(ask(3), b"", "one that is not of the swarm");
        assert_eq!(tracker.known(), 2);
    }

    #[test]
    fn the_tracker_tells_peers_apart_by_address_first() {
        let all: Vec<SocketAddrV4> =
            ["10.77.1.1:7", "10.77.1.2:7"].map(|peer| peer.parse().expect("an address")).into();
        let peers = Peers { all: all.clone(), known: Vec::new() };
        let from = |text: &str| text.parse::<IpAddr>().expect("an address");
        assert_eq!(peers.asker(from("10.77.1.2"), 7), Some(all[1]));
        assert_eq!(peers.asker(from("10.77.0.1"), 7), Some(all[0]));
        assert_eq!(peers.asker(from("10.77.1.2"), 8), None);
    }
}
