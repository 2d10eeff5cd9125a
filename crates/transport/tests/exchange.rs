//! Messages, pieces and questions between two endpoints over loopback.

#![allow(clippy::unwrap_used)]

mod common;

use bytes::Bytes;
use common::{Cluster, Peer, bytes, hello, piece, until, within};
use shoal_pki::Role;
use shoal_proto::PieceIndex;
use shoal_proto::{
    ArtifactId, EncodingId,
    manifest::Codec,
    peer::{CloseReason, HAVE_BATCH_MAX, PeerMessage, StreamReply, StreamRequest},
    region::{RegionReply, RegionRequest},
};
use shoal_transport::{ReplyError, RequestError, SendError};

#[tokio::test]
async fn control_messages_arrive_in_order_both_ways() {
    let cluster = Cluster::new();
    let (mut one, mut two) = cluster.pair();
    let to_two = one.connect(&two).await;
    let to_one = two.connected().await;
    assert_eq!(one.connected().await, to_two);
    assert_eq!((to_one.node(), to_two.node()), (one.node, two.node));
    assert_eq!(to_one.member().role, Role::Agent);
    assert!(to_two.dialled() && !to_one.dialled());
    for number in 0..500 {
        to_two.send(&hello(number)).await.unwrap();
        to_one.send(&hello(number + 1_000)).await.unwrap();
        assert_eq!(two.message().await, hello(number));
        assert_eq!(one.message().await, hello(number + 1_000));
    }
    assert!(to_two.stats().sent_bytes > 0 && to_two.stats().received_bytes > 0);
    one.endpoint.shutdown().await;
    let (connection, reason) = two.closed().await;
    assert_eq!(connection, to_one);
    assert!(reason.contains("Done"), "{reason}");
    assert_eq!(to_one.try_send(&hello(0)), Err(SendError::Closed));
    assert!(matches!(to_one.request(piece(0)).await, Err(RequestError::Closed(_))));
    two.alone().await;
}

#[tokio::test]
async fn questions_are_answered() {
    let cluster = Cluster::new();
    let (mut one, mut two) = cluster.pair();
    let to_two = one.connect(&two).await;
    two.connected().await;
    one.connected().await;

    // A region's answer, an index of 4 MiB, a refusal: each with nothing behind it.
    let lease = StreamRequest::Region(RegionRequest::Lease {
        artifact: ArtifactId([1; 32]),
        encoding: EncodingId([2; 32]),
        pieces_total: 9,
        block: 0,
        lacking: 5,
        want: 4,
    });
    let index =
        StreamRequest::Index { artifact: ArtifactId([1; 32]), encoding: EncodingId([2; 32]) };
    for (request, reply) in [
        (lease, StreamReply::Region(RegionReply::Kept)),
        (index, StreamReply::Index(bytes(4 << 20, 5))),
        (piece(7), StreamReply::Busy),
        (piece(8), StreamReply::NotHere),
    ] {
        let answer = async {
            let incoming = two.request().await;
            assert_eq!(incoming.request, request);
            assert_eq!(incoming.from().node(), one.node);
            incoming.reply(reply.clone(), None).await.unwrap()
        };
        let (answered, sent_bytes) =
            within(async { tokio::join!(to_two.request(request.clone()), answer) }).await;
        let (got, body) = answered.unwrap();
        assert_eq!(got, reply);
        assert_eq!(body.left(), 0);
        assert!(sent_bytes > 0);
    }
}

#[tokio::test]
async fn pieces_of_all_lengths_arrive_whole() {
    let cluster = Cluster::new();
    let (one, mut two) = cluster.pair();
    let to_two = one.connect(&two).await;
    two.connected().await;
    for len in [0, 1, 1_451, 65_536, 4 << 20, 16 << 20] {
        let sent = bytes(len, len as u64);
        let body = Bytes::from(sent.clone());
        let answer = async {
            let reply = StreamReply::Piece { codec: Codec::Zstd, len: len as u32 };
            two.request().await.reply(reply, Some(body)).await
        };
        let fetch = async {
            let (reply, mut body) = to_two.request(piece(0)).await.unwrap();
            assert_eq!(reply, StreamReply::Piece { codec: Codec::Zstd, len: len as u32 });
            assert_eq!(body.left(), len);
            // Once in two reads, whose seam must not show.
            let mut got = body.read(len / 3).await.unwrap();
            got.extend(body.read(len - len / 3).await.unwrap());
            assert_eq!(body.left(), 0);
            assert_eq!(
                body.read(1).await.unwrap_err(),
                RequestError::PastEnd { asked: 1, left: 0 }
            );
            got
        };
        let (got, answered) = within(async { tokio::join!(fetch, answer) }).await;
        assert!(got == sent, "{len} bytes came back different");
        assert!(answered.unwrap() > len as u64);
    }
}

#[tokio::test]
async fn large_packets_are_found_and_used() {
    let cluster = Cluster::new();
    for mtu_max in [8_972, 65_507] {
        let bind = |machine| {
            let mut config = cluster.config(machine, Role::Agent);
            config.mtu_max = mtu_max;
            Peer::bind(&config)
        };
        let (one, mut two) = (bind("m1"), bind("m2"));
        let to_two = one.connect(&two).await;
        let to_one = two.connected().await;
        // The search goes on while something is sent. Too many segments a call would stall it.
        let len: u32 = 4 << 20;
        let body = Bytes::from(bytes(len as usize, 3));
        while to_one.stats().mtu < 8_000 {
            let reply = StreamReply::Piece { codec: Codec::Raw, len };
            let answer = async { two.request().await.reply(reply, Some(body.clone())).await };
            let fetch = async {
                let (_, mut got) = to_two.request(piece(0)).await.unwrap();
                got.read(len as usize).await.unwrap()
            };
            let (got, answered) = within(async { tokio::join!(fetch, answer) }).await;
            assert!(got == body);
            answered.unwrap();
        }
        assert!(to_one.stats().mtu <= mtu_max);
    }
    let mut config = cluster.config("m1", Role::Agent);
    config.mtu_max = 1_000;
    assert!(shoal_transport::Endpoint::bind(&config).is_err());
}

#[tokio::test]
async fn a_reply_of_the_wrong_length_is_not_sent() {
    let cluster = Cluster::new();
    let (one, mut two) = cluster.pair();
    let to_two = one.connect(&two).await;
    two.connected().await;
    let answer = async {
        let reply = StreamReply::Piece { codec: Codec::Raw, len: 10 };
        two.request().await.reply(reply, Some(Bytes::from_static(b"short"))).await
    };
    let (got, answered) = within(async { tokio::join!(to_two.request(piece(0)), answer) }).await;
    assert_eq!(answered, Err(ReplyError::WrongLength { header: 10, body: 5 }));
    assert_eq!(got.unwrap_err(), RequestError::Dropped);
    assert!(!to_two.is_closed());
}

#[tokio::test]
async fn an_answer_in_parts_is_as_long_as_it_promised() {
    let cluster = Cluster::new();
    let (one, mut two) = cluster.pair();
    let to_two = one.connect(&two).await;
    two.connected().await;
    let reply = StreamReply::Piece { codec: Codec::Raw, len: 10 };
    let answer = async {
        // The whole of it, seams and empty parts included.
        let mut whole = two.request().await.answer(reply.clone()).unwrap();
        for part in ["01234", "", "56789"] {
            whole.send(Bytes::from_static(part.as_bytes())).await.unwrap();
        }
        assert_eq!(whole.left(), 0);
        let sent = whole.end().await.unwrap();
        // Less, and more.
        let mut short = two.request().await.answer(reply.clone()).unwrap();
        short.send(Bytes::from_static(b"0123")).await.unwrap();
        assert_eq!(short.left(), 6);
        let short = short.end().await;
        let mut long = two.request().await.answer(reply.clone()).unwrap();
        long.send(Bytes::from_static(b"012345678")).await.unwrap();
        (sent, short, long.send(Bytes::from_static(b"9A")).await)
    };
    let fetch = async {
        let mut got = Vec::new();
        for _ in 0..3 {
            // What is given up may be so before its header has left.
            got.push(match to_two.request(piece(0)).await {
                Ok((_, mut body)) => body.read(10).await,
                Err(error) => Err(error),
            });
        }
        got
    };
    let ((sent, short, long), got) = within(async { tokio::join!(answer, fetch) }).await;
    assert!(sent > 10);
    assert_eq!(short, Err(ReplyError::WrongLength { header: 10, body: 4 }));
    assert_eq!(long, Err(ReplyError::WrongLength { header: 10, body: 11 }));
    let dropped = || Err(RequestError::Dropped);
    assert_eq!(got, [Ok(b"0123456789".to_vec()), dropped(), dropped()]);
}

#[tokio::test]
async fn an_unanswered_request_is_given_up_at_once() {
    let cluster = Cluster::new();
    let (one, mut two) = cluster.pair();
    let to_two = one.connect(&two).await;
    two.connected().await;
    let answer = async { drop(two.request().await) };
    let (got, ()) = within(async { tokio::join!(to_two.request(piece(0)), answer) }).await;
    assert_eq!(got.unwrap_err(), RequestError::Dropped);
}

#[tokio::test]
async fn dropping_a_body_frees_the_sender() {
    let cluster = Cluster::new();
    let (one, mut two) = cluster.pair();
    let to_two = one.connect(&two).await;
    two.connected().await;
    let len = 16 << 20;
    let reply = StreamReply::Piece { codec: Codec::Raw, len };
    let body = Bytes::from(vec![7; len as usize]);
    let watch = body.clone();
    let answer = async { two.request().await.reply(reply, Some(body)).await };
    let fetch = async {
        let (_, mut body) = to_two.request(piece(0)).await.unwrap();
        body.read(100_000).await.unwrap();
        drop(body);
    };
    let ((), answered) = within(async { tokio::join!(fetch, answer) }).await;
    match answered.unwrap_err() {
        ReplyError::Stopped { sent_bytes } => assert!(sent_bytes < u64::from(len)),
        other => panic!("{other}"),
    }
    // Nothing of the piece is held any more, so its memory is free.
    until(|| watch.is_unique()).await;
    // And the connection goes on.
    let answer = async { two.request().await.reply(StreamReply::Busy, None).await };
    let (got, answered) = within(async { tokio::join!(to_two.request(piece(1)), answer) }).await;
    assert_eq!(got.unwrap().0, StreamReply::Busy);
    answered.unwrap();
}

#[tokio::test]
async fn a_request_that_is_dropped_shows_to_who_waits_with_it() {
    let cluster = Cluster::new();
    let (one, mut two) = cluster.pair();
    let to_two = one.connect(&two).await;
    two.connected().await;
    let asking = tokio::spawn(async move { to_two.request(piece(0)).await.map(drop) });
    let waiting = two.request().await;
    asking.abort();
    within(waiting.stopped()).await;
    let error = within(waiting.reply(StreamReply::Busy, None)).await.unwrap_err();
    assert!(matches!(error, ReplyError::Stopped { .. }), "{error}");
}

#[tokio::test]
async fn dropping_an_answer_in_the_middle_is_no_whole_answer() {
    let cluster = Cluster::new();
    let (one, mut two) = cluster.pair();
    let to_two = one.connect(&two).await;
    two.connected().await;
    let len: u32 = 16 << 20;
    let answer = tokio::spawn(async move {
        let request = two.request().await;
        let reply = StreamReply::Piece { codec: Codec::Raw, len };
        let _ = request.reply(reply, Some(Bytes::from(vec![7; len as usize]))).await;
    });
    let (_, mut body) = within(to_two.request(piece(0))).await.unwrap();
    answer.abort();
    let error = within(body.read(len as usize)).await.unwrap_err();
    assert_eq!(error, RequestError::Dropped);
}

#[tokio::test]
async fn a_short_answer_overtakes_a_piece() {
    let cluster = Cluster::new();
    let (one, mut two) = cluster.pair();
    let to_two = one.connect(&two).await;
    two.connected().await;
    // A piece that nobody reads fills its window; a refusal and a message still come through.
    let len: u32 = 2 << 20;
    let sending = async {
        let request = two.request().await;
        let reply = StreamReply::Piece { codec: Codec::Raw, len };
        let big = request.reply(reply, Some(Bytes::from(vec![7; len as usize])));
        let small = async {
            let request = two.request().await;
            request.from().send(&hello(1)).await.unwrap();
            request.reply(StreamReply::Busy, None).await.unwrap()
        };
        tokio::join!(big, small)
    };
    let fetch = async {
        let (_, mut body) = to_two.request(piece(0)).await.unwrap();
        let (reply, _) = to_two.request(piece(1)).await.unwrap();
        assert_eq!(reply, StreamReply::Busy);
        body.read(len as usize).await.unwrap()
    };
    let (got, (big, _)) = within(async { tokio::join!(fetch, sending) }).await;
    assert_eq!(got.len(), len as usize);
    big.unwrap();
}

#[tokio::test]
async fn messages_that_are_too_long_stay_here() {
    let cluster = Cluster::new();
    let (one, mut two) = cluster.pair();
    let to_two = one.connect(&two).await;
    two.connected().await;
    let pieces = (0..u32::MAX).step_by(1 << 10).take(HAVE_BATCH_MAX * 4).map(PieceIndex).collect();
    let long = PeerMessage::Have { artifact: ArtifactId([1; 32]), pieces };
    assert!(matches!(to_two.try_send(&long), Err(SendError::TooLong(_))));
    let pieces = vec![PieceIndex(1); HAVE_BATCH_MAX];
    let most = PeerMessage::Have { artifact: ArtifactId([1; 32]), pieces };
    to_two.try_send(&most).unwrap();
    assert_eq!(two.message().await, most);
}

#[tokio::test]
async fn closing_says_why() {
    let cluster = Cluster::new();
    let (one, mut two) = cluster.pair();
    let to_two = one.connect(&two).await;
    two.connected().await;
    to_two.close(CloseReason::Banned);
    let (_, reason) = two.closed().await;
    assert!(reason.contains("Banned"), "{reason}");
    // The slot is free again by then, on both sides.
    assert!(two.endpoint.connection(&one.node).is_none());
    one.alone().await;
    assert!(!one.connect(&two).await.is_closed());
}
