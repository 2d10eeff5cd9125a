//! Peers that break the protocol, and peers that are slow.

#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use bytes::Bytes;
use common::{CLUSTER, Cluster, DEADLINE, Peer, bytes, hello, loopback, piece, until, within};
use quinn::{Connection, RecvStream, SendStream, VarInt, crypto::rustls::QuicClientConfig};
use shoal_pki::{Credentials, Role, client_config, server_name};
use shoal_proto::{
    ArtifactId, PieceIndex, codec,
    manifest::Codec,
    peer::{CloseReason, HAVE_BATCH_MAX, PeerMessage, StreamReply},
};
use shoal_transport::{RequestError, SendError};
use tokio::time::timeout;

/// The protocol that these peers break.
const ALPN: &[&[u8]] = &[b"shoal/1"];

/// A member that speaks QUIC with its own hands.
struct Raw {
    connection: Connection,
    control: SendStream,
    // Dropping it would stop the other side's control stream.
    _from_peer: RecvStream,
}

/// The handshake and the claim, and then nothing.
async fn raw(cluster: &Cluster, peer: &mut Peer) -> Raw {
    let identity = cluster.identity("raw", Role::Agent);
    let tls =
        client_config(&Credentials::new(identity.clone(), cluster.trust.clone()), ALPN).unwrap();
    let tls = QuicClientConfig::try_from(tls).unwrap();
    let endpoint = quinn::Endpoint::client(loopback()).unwrap();
    let config = quinn::ClientConfig::new(Arc::new(tls));
    let connecting = endpoint.connect_with(config, peer.addr, &server_name(CLUSTER)).unwrap();
    let connection = within(connecting).await.unwrap();
    let mut control = connection.open_uni().await.unwrap();
    control.write_all(&[0; 4]).await.unwrap();
    let mut welcome = within(connection.accept_uni()).await.unwrap();
    welcome.read_exact(&mut [0; 4]).await.unwrap();
    peer.connected().await;
    Raw { connection, control, _from_peer: welcome }
}

async fn closed_as_malformed(raw: &Connection, peer: &mut Peer) {
    match within(raw.closed()).await {
        quinn::ConnectionError::ApplicationClosed(close) => {
            assert_eq!(close.error_code, VarInt::from_u32(CloseReason::Malformed as u32));
        }
        other => panic!("{other}"),
    }
    peer.closed().await;
    peer.alone().await;
}

fn framed(body: &[u8]) -> Vec<u8> {
    [&(body.len() as u32).to_le_bytes(), body].concat()
}

#[tokio::test]
async fn malformed_control_frames_close_the_connection() {
    let cluster = Cluster::new();
    let mut peer = cluster.peer("m1");
    let many = PeerMessage::Have {
        artifact: ArtifactId([1; 32]),
        pieces: vec![PieceIndex(1); HAVE_BATCH_MAX + 1],
    };
    for (what, bytes) in [
        ("a length of 4 GiB", vec![0xff; 4]),
        ("a length above the limit", ((16u32 << 10) + 1).to_le_bytes().to_vec()),
        ("an empty frame", vec![0; 4]),
        ("garbage", framed(&[1, 2, 3, 4])),
        ("another codec version", framed(&[9, 0])),
        ("a batch above its limit", framed(&codec::encode(&many, 1 << 20).unwrap())),
        ("bytes behind a message", {
            let mut body = codec::encode(&hello(1), 1 << 20).unwrap();
            body.push(0);
            framed(&body)
        }),
    ] {
        let mut raw = raw(&cluster, &mut peer).await;
        raw.control.write_all(&bytes).await.unwrap();
        timeout(DEADLINE, closed_as_malformed(&raw.connection, &mut peer)).await.expect(what);
    }
    // A good frame in two halves is no fault.
    let mut raw = raw(&cluster, &mut peer).await;
    let frame = framed(&codec::encode(&hello(7), 1 << 20).unwrap());
    for half in frame.chunks(5) {
        raw.control.write_all(half).await.unwrap();
    }
    assert_eq!(peer.message().await, hello(7));
}

#[tokio::test]
async fn a_control_stream_that_ends_closes_the_connection() {
    let cluster = Cluster::new();
    let mut peer = cluster.peer("m1");
    let mut finished = raw(&cluster, &mut peer).await;
    finished.control.finish().unwrap();
    closed_as_malformed(&finished.connection, &mut peer).await;
    let mut reset = raw(&cluster, &mut peer).await;
    reset.control.write_all(&framed(b"half")[..6]).await.unwrap();
    reset.control.reset(VarInt::from_u32(0)).unwrap();
    closed_as_malformed(&reset.connection, &mut peer).await;
}

#[tokio::test]
async fn malformed_requests_close_the_connection() {
    let cluster = Cluster::new();
    let mut peer = cluster.peer("m1");
    let mut trailing = framed(&codec::encode(&piece(0), 1 << 20).unwrap());
    trailing.push(0);
    for bytes in [vec![0xff; 4], framed(&[1, 200]), vec![0; 4], trailing] {
        let raw = raw(&cluster, &mut peer).await;
        let (mut send, _receive) = raw.connection.open_bi().await.unwrap();
        send.write_all(&bytes).await.unwrap();
        closed_as_malformed(&raw.connection, &mut peer).await;
    }
    // A request that is cut off is given up, and no more.
    let raw = raw(&cluster, &mut peer).await;
    let (mut send, mut receive) = raw.connection.open_bi().await.unwrap();
    send.write_all(&framed(&[1; 100])[..20]).await.unwrap();
    send.finish().unwrap();
    within(receive.read_to_end(10)).await.unwrap_err();
    assert!(raw.connection.close_reason().is_none());
}

#[tokio::test]
async fn malformed_replies_close_the_connection() {
    let cluster = Cluster::new();
    let mut peer = cluster.peer("m1");
    let header = |len| {
        let reply = StreamReply::Piece { codec: Codec::Raw, len };
        framed(&codec::encode(&reply, 1 << 20).unwrap())
    };
    let mut long = header(10);
    long.extend([0; 11]);
    let mut busy = framed(&codec::encode(&StreamReply::Busy, 1 << 20).unwrap());
    busy.push(0);
    for bytes in [vec![0xff; 4], framed(&[1, 200]), header((16 << 20) + 1), long, busy] {
        let raw = raw(&cluster, &mut peer).await;
        let to_raw = peer.endpoint.connections().remove(0);
        let fetch = async {
            let (_, mut body) = to_raw.request(piece(0)).await?;
            body.read(body.left()).await
        };
        let answer = async {
            let (mut send, _receive) = raw.connection.accept_bi().await.unwrap();
            send.write_all(&bytes).await.unwrap();
            send.finish().unwrap();
            raw.connection.closed().await;
        };
        let (got, ()) = within(async { tokio::join!(fetch, answer) }).await;
        assert!(matches!(got, Err(RequestError::Malformed(_))), "{got:?}");
        closed_as_malformed(&raw.connection, &mut peer).await;
    }
    // A body that ends early is an answer that was given up.
    let raw = raw(&cluster, &mut peer).await;
    let to_raw = peer.endpoint.connections().remove(0);
    let answer = async {
        let (mut send, _receive) = raw.connection.accept_bi().await.unwrap();
        send.write_all(&header(10)).await.unwrap();
        send.write_all(&[0; 9]).await.unwrap();
        send.finish().unwrap();
    };
    let fetch = async { to_raw.request(piece(0)).await.unwrap().1.read(10).await };
    let (got, ()) = within(async { tokio::join!(fetch, answer) }).await;
    assert_eq!(got.unwrap_err(), RequestError::Dropped);
    assert!(!to_raw.is_closed());
}

#[tokio::test]
async fn a_client_that_claims_nothing_is_no_connection() {
    let cluster = Cluster::new();
    let mut peer = cluster.peer("m1");
    let identity = cluster.identity("raw", Role::Agent);
    let tls =
        client_config(&Credentials::new(identity.clone(), cluster.trust.clone()), ALPN).unwrap();
    let config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()));
    let endpoint = quinn::Endpoint::client(loopback()).unwrap();
    let connecting = endpoint.connect_with(config, peer.addr, &server_name(CLUSTER)).unwrap();
    let connection = within(connecting).await.unwrap();
    // It is dropped in the end, and nobody ever heard of it.
    within(connection.closed()).await;
    assert!(peer.incoming.try_recv().is_err());
    assert!(peer.endpoint.connections().is_empty());
}

#[tokio::test]
async fn a_slow_consumer_holds_up_its_senders_and_no_memory_grows() {
    let cluster = Cluster::new();
    let (one, mut two) = cluster.pair();
    let to_two = one.connect(&two).await;
    // Nobody takes from two. The queue, the windows and the sender's queue fill, and then it says so.
    let mut taken = 0;
    let message = PeerMessage::Have {
        artifact: ArtifactId([1; 32]),
        pieces: (0..HAVE_BATCH_MAX as u32).map(PieceIndex).collect(),
    };
    let mut full_for = 0;
    while full_for < 200 {
        match to_two.try_send(&message) {
            Ok(()) => (taken, full_for) = (taken + 1, 0),
            Err(SendError::Full) => {
                full_for += 1;
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
            Err(error) => panic!("{error}"),
        }
    }
    // 256 in the channel, 64 in the queue, and what the stream's window of 4 MiB and the connection's
    // send window hold of messages of 6 KiB.
    assert!(taken < 5_000, "{taken} messages were taken");
    // Requests wait as well: no more of them come than streams are granted and the channel holds.
    let asking: Vec<_> = (0..100)
        .map(|at| {
            let connection = to_two.clone();
            tokio::spawn(async move { connection.request(piece(at)).await.map(|got| got.0) })
        })
        .collect();
    // Once somebody takes, everything that was accepted arrives, in order and whole.
    two.connected().await;
    let mut messages = 0;
    let mut requests = 0;
    while messages < taken || requests < 100 {
        match two.next().await {
            shoal_transport::Incoming::Message(_, got) => {
                assert_eq!(got, message);
                messages += 1;
            }
            shoal_transport::Incoming::Request(request) => {
                requests += 1;
                tokio::spawn(request.reply(StreamReply::Busy, None));
            }
            other => panic!("{other:?}"),
        }
    }
    for asked in asking {
        assert_eq!(within(asked).await.unwrap().unwrap(), StreamReply::Busy);
    }
}

#[tokio::test]
async fn a_body_that_nobody_reads_holds_up_its_sender() {
    let cluster = Cluster::new();
    let (one, mut two) = cluster.pair();
    let to_two = one.connect(&two).await;
    two.connected().await;
    let sent = bytes(16 << 20, 1);
    let len = sent.len();
    let answering = tokio::spawn(async move {
        let request = two.request().await;
        let reply = StreamReply::Piece { codec: Codec::Raw, len: len as u32 };
        let answered = request.reply(reply, Some(Bytes::from(sent.clone()))).await;
        (answered, sent)
    });
    let (_, mut body) = within(to_two.request(piece(0))).await.unwrap();
    // It fills the window and stops there: what has come stays the same over many round trips.
    let mut steady = 0;
    let mut came = to_two.stats().received_bytes;
    while steady < 100 {
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        let now = to_two.stats().received_bytes;
        steady = if now - came < 10_000 { steady + 1 } else { 0 };
        came = if steady == 0 { now } else { came };
    }
    assert!(came < 9 << 20, "{came} bytes came unread");
    assert!(!answering.is_finished());
    let got = within(body.read(len)).await.unwrap();
    let (answered, sent) = within(answering).await.unwrap();
    answered.unwrap();
    assert!(got == sent);
}

#[tokio::test]
async fn thousands_of_requests_leave_nothing_behind() {
    let cluster = Cluster::new();
    let (one, mut two) = cluster.pair();
    let to_two = one.connect(&two).await;
    two.connected().await;
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let answering = tokio::spawn(async move {
        let body = Bytes::from(vec![5; 3_000]);
        let mut answers = tokio::task::JoinSet::new();
        for at in 0..5_000 {
            let request = two.request().await;
            let body = body.clone();
            answers.spawn(async move {
                match at % 4 {
                    0 => drop(request),
                    1 => drop(request.reply(StreamReply::Busy, None).await),
                    _ => {
                        let reply = StreamReply::Piece { codec: Codec::Raw, len: 3_000 };
                        drop(request.reply(reply, Some(body)).await);
                    }
                }
            });
            while answers.try_join_next().is_some() {}
        }
        answers.join_all().await;
        (two, body)
    });
    let before = tasks();
    for at in 0..5_000u32 {
        match within(to_two.request(piece(at))).await {
            // Some bodies are read, some dropped.
            Ok((StreamReply::Piece { .. }, mut body)) if at % 2 == 0 => {
                assert_eq!(body.read(3_000).await.unwrap(), [5; 3_000]);
            }
            Ok(_) | Err(RequestError::Dropped) => {}
            Err(error) => panic!("{error}"),
        }
    }
    let (two, body) = within(answering).await.unwrap();
    // Neither tasks nor bytes of the answers are left. (All streams came back: 64 are granted at a time.)
    until(|| tasks() < before && body.is_unique()).await;
    assert!(!to_two.is_closed());
    drop(two);
}
