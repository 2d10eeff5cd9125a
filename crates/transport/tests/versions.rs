//! Releases that speak different versions of the protocol.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Cluster, Peer, bytes, hello, piece, within};
use shoal_pki::Role;
use shoal_proto::{
    manifest::Codec,
    peer::{StreamReply, VERSIONS, alpn, version_of},
};
use shoal_transport::{ConnectError, EndpointConfig, TransportError};

/// A peer that speaks these versions.
fn release(cluster: &Cluster, machine: &str, versions: &[u16]) -> Peer {
    let versions = versions.to_vec();
    Peer::bind(&EndpointConfig { versions, ..cluster.config(machine, Role::Agent) })
}

/// `from` dials `to`; a message goes one way and a piece the other. Both ends then name this version.
async fn speak(from: &mut Peer, to: &mut Peer) -> (Option<u16>, Option<u16>) {
    let dialled = from.connect(to).await;
    assert_eq!(from.connected().await, dialled);
    let taken = to.connected().await;
    dialled.try_send(&hello(1)).unwrap();
    assert_eq!(to.message().await, hello(1));
    let sent = bytes(300_000, 1);
    let asking = tokio::spawn({
        let taken = taken.clone();
        async move {
            let (reply, mut body) = taken.request(piece(7)).await.unwrap();
            (reply, body.read(300_000).await.unwrap())
        }
    });
    let reply = StreamReply::Piece { codec: Codec::Raw, len: sent.len() as u32 };
    let asked = from.request().await;
    within(asked.reply(reply.clone(), Some(sent.clone().into()))).await.unwrap();
    assert!(within(asking).await.unwrap() == (reply, sent));
    (dialled.version(), taken.version())
}

#[tokio::test]
async fn two_releases_speak_the_newest_version_that_both_know() {
    let cluster = Cluster::new();
    let (newest, before) = (&[3, 2][..], &[2, 1][..]);
    for (one, two, common) in
        [(newest, newest, 3), (newest, before, 2), (before, newest, 2), (&[1][..], before, 1)]
    {
        let (mut one, mut two) = (release(&cluster, "m1", one), release(&cluster, "m2", two));
        let both = speak(&mut one, &mut two).await;
        assert_eq!(both, (Some(common), Some(common)));
    }
}

#[tokio::test]
async fn releases_with_no_version_in_common_say_so() {
    let cluster = Cluster::new();
    let (new, old) = (release(&cluster, "m1", &[3, 2]), release(&cluster, "m2", &[1]));
    for (one, other, ours) in [(&new, &old, vec![3, 2]), (&old, &new, vec![1])] {
        let error = within(one.endpoint.connect(other.addr, other.node)).await.unwrap_err();
        let said = error.to_string();
        assert_eq!(error, ConnectError::NoCommonVersion { addr: other.addr, ours: ours.clone() });
        assert!(said.contains(&alpn(ours[0])) && said.contains("upgrade"), "{said}");
    }
    new.alone().await;
    old.alone().await;
}

#[tokio::test]
async fn this_release_speaks_its_own_version_and_at_most_the_one_before() {
    let cluster = Cluster::new();
    assert!(matches!(VERSIONS, [_] | [_, _]), "{VERSIONS:?}");
    assert!(VERSIONS.windows(2).all(|pair| pair[0] == pair[1] + 1), "newest first: {VERSIONS:?}");
    let (mut one, mut two) = (cluster.peer("m1"), cluster.peer("m2"));
    assert_eq!(speak(&mut one, &mut two).await.0, Some(VERSIONS[0]));
    for version in VERSIONS {
        assert_eq!(version_of(alpn(*version).as_bytes()), Some(*version));
    }
    assert_eq!(version_of(b"h3"), None);
    let none = EndpointConfig { versions: vec![], ..cluster.config("m1", Role::Agent) };
    let error = shoal_transport::Endpoint::bind(&none).unwrap_err();
    assert!(matches!(error, TransportError::Config(_)), "{error}");
}
