//! Limits and yielding, between real endpoints over loopback: by counted bytes, never by time.

#![allow(clippy::unwrap_used)]

mod common;

use std::{io::IoSliceMut, net::UdpSocket, os::fd::AsRawFd as _, time::Duration};

use bytes::Bytes;
use common::{Cluster, bytes, hello, loopback, piece, until, within};
use nix::{
    cmsg_space,
    sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg},
};
use shoal_proto::{NodeId, manifest::Codec, peer::StreamReply};
use shoal_transport::{Connection, IncomingRequest, ReplyError};
use tokio::task::JoinHandle;

const LEN: u32 = 16 << 20;

/// The lowest limit that an agent takes, in bytes a second.
const SLOW: Option<u64> = Some(2_000_000);

/// DSCP LE, as it stands beside ECN.
const LOWER_EFFORT: u8 = 1 << 2;

fn body() -> Bytes {
    Bytes::from(bytes(LEN as usize, 7))
}

fn send(request: IncomingRequest) -> JoinHandle<Result<u64, ReplyError>> {
    let reply = StreamReply::Piece { codec: Codec::Raw, len: LEN };
    tokio::spawn(request.reply(reply, Some(body())))
}

fn fetch(from: &Connection) -> JoinHandle<Vec<u8>> {
    let from = from.clone();
    tokio::spawn(async move {
        let (_, mut got) = from.request(piece(0)).await.unwrap();
        got.read(LEN as usize).await.unwrap()
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_short_never_waits_for_the_limit_on_pieces() {
    let cluster = Cluster::new();
    let (mut one, mut two) = cluster.pair();
    let to_two = one.connect(&two).await;
    let to_one = two.connected().await;
    one.connected().await;
    two.endpoint.up().set_limit(SLOW);
    let fetched = fetch(&to_two);
    let sent = send(two.request().await);
    until(|| two.endpoint.up().paced().held_bytes > 0).await;
    // Both ways, and BUSY too.
    for number in 0..20 {
        to_one.send(&hello(number)).await.unwrap();
        assert_eq!(one.message().await, hello(number));
        to_two.send(&hello(number)).await.unwrap();
        assert_eq!(two.message().await, hello(number));
    }
    let asked = tokio::spawn({
        let to_two = to_two.clone();
        async move { to_two.request(piece(1)).await.unwrap().0 }
    });
    two.request().await.reply(StreamReply::Busy, None).await.unwrap();
    assert_eq!(within(asked).await.unwrap(), StreamReply::Busy);
    let paced = two.endpoint.up().paced();
    assert!(paced.passed_bytes < LEN.into(), "it was not sent meanwhile: {paced:?}");
    assert!(!sent.is_finished() && !fetched.is_finished());
    // Taken away, the limit holds for nothing that is under way.
    two.endpoint.up().set_limit(None);
    assert!(within(fetched).await.unwrap() == body());
    assert!(within(sent).await.unwrap().unwrap() > LEN.into());
    assert_eq!(two.endpoint.up().paced().passed_bytes, u64::from(LEN));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_reads_slowly_slows_the_sender() {
    let cluster = Cluster::new();
    let (one, mut two) = cluster.pair();
    // Before they meet: a window that was granted is not taken back.
    one.endpoint.limit_down(SLOW);
    let to_two = one.connect(&two).await;
    two.connected().await;
    let fetched = fetch(&to_two);
    let sent = send(two.request().await);
    // Some has come by the limit; of the rest no more than windows hold has left the sender.
    until(|| one.endpoint.down().paced().passed_bytes > 2 << 20).await;
    let ahead = two.endpoint.up().paced().passed_bytes - one.endpoint.down().paced().passed_bytes;
    assert!(ahead < 2 << 20, "{ahead} bytes lie between them");
    assert!(one.endpoint.down().paced().held_bytes > 0);
    assert!(!fetched.is_finished());
    one.endpoint.limit_down(None);
    assert!(within(fetched).await.unwrap() == body());
    within(sent).await.unwrap().unwrap();
    assert_eq!(one.endpoint.down().paced().passed_bytes, u64::from(LEN));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_gives_up_while_it_waits_for_its_turn_frees_the_sender() {
    let cluster = Cluster::new();
    let (one, mut two) = cluster.pair();
    let to_two = one.connect(&two).await;
    two.connected().await;
    two.endpoint.up().set_limit(SLOW);
    let first = fetch(&to_two);
    let sends = send(two.request().await);
    let second = fetch(&to_two);
    let waits = send(two.request().await);
    until(|| two.endpoint.up().paced().held_bytes > 0).await;
    second.abort();
    assert_eq!(within(waits).await.unwrap(), Err(ReplyError::Stopped { sent_bytes: 0 }));
    two.endpoint.up().set_limit(None);
    assert!(within(first).await.unwrap() == body());
    within(sends).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_may_begin_and_cease_to_yield_in_the_middle_of_a_piece() {
    let cluster = Cluster::new();
    let (one, mut two) = cluster.pair();
    let to_two = one.connect(&two).await;
    two.connected().await;
    for yields in [true, false, true] {
        let before = two.endpoint.up().paced().passed_bytes;
        let fetched = fetch(&to_two);
        let sent = send(two.request().await);
        until(|| two.endpoint.up().paced().passed_bytes > before).await;
        two.endpoint.yield_to_others(yields);
        assert!(within(fetched).await.unwrap() == body());
        within(sent).await.unwrap().unwrap();
    }
}

/// The byte of DSCP and ECN of the next packet.
fn class_of_next(socket: &UdpSocket) -> u8 {
    let mut bytes = [0; 2_048];
    let mut space = cmsg_space!(u8, i32);
    let mut slices = [IoSliceMut::new(&mut bytes)];
    let received = recvmsg::<SockaddrStorage>(
        socket.as_raw_fd(),
        &mut slices,
        Some(&mut space),
        MsgFlags::empty(),
    );
    let received = received.expect("the endpoint dials");
    let mut classes = received.cmsgs().unwrap().filter_map(|message| match message {
        ControlMessageOwned::Ipv4Tos(class) => Some(class),
        _ => None,
    });
    classes.next().expect("the kernel tells it")
}

#[tokio::test(flavor = "multi_thread")]
async fn packets_of_who_yields_say_so() {
    let cluster = Cluster::new();
    let one = cluster.peer("m1");
    for (node, yields, mark) in [(7, false, 0), (8, true, LOWER_EFFORT), (9, false, 0)] {
        let heard = UdpSocket::bind(loopback()).unwrap();
        heard.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        socket2::SockRef::from(&heard).set_recv_tos_v4(true).unwrap();
        let addr = heard.local_addr().unwrap();
        one.endpoint.yield_to_others(yields);
        let endpoint = one.endpoint.clone();
        // Nobody will answer.
        tokio::spawn(async move { endpoint.connect(addr, NodeId([node; 32])).await });
        let class = tokio::task::block_in_place(|| class_of_next(&heard));
        assert_eq!(class & !0b11, mark, "{class:#010b}");
        assert_eq!(class & 0b11, 0b10, "ECN is as quinn wants it");
    }
}
