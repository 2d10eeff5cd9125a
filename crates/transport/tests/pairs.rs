//! Who gets a connection, and that a pair has one.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::{CLUSTER, Cluster, Peer, hello, loopback, piece, until, within};
use shoal_pki::{Credentials, Role};
use shoal_proto::NodeId;
use shoal_transport::{ConnectError, Endpoint, EndpointConfig, RequestError};

#[tokio::test]
async fn a_simultaneous_dial_gives_one_connection() {
    let cluster = Cluster::new();
    for round in 0..20 {
        let (mut one, mut two) = cluster.pair();
        let (left, right) =
            within(async { tokio::join!(one.connect(&two), two.connect(&one)) }).await;
        // Each side may have been first in its own eyes, but both hold the same connection.
        assert_eq!(one.connected().await, left, "round {round}");
        assert_eq!(two.connected().await, right, "round {round}");
        assert_ne!(left.dialled(), right.dialled(), "round {round}");
        left.send(&hello(round)).await.unwrap();
        right.send(&hello(round + 1)).await.unwrap();
        // No other connection was shown in between, and none was closed.
        assert_eq!(two.message().await, hello(round));
        assert_eq!(one.message().await, hello(round + 1));
        assert_eq!(one.endpoint.connections(), [left]);
        assert_eq!(two.endpoint.connections(), [right]);
    }
}

#[tokio::test]
async fn callers_share_one_dial() {
    let cluster = Cluster::new();
    let (mut one, mut two) = cluster.pair();
    let calls = || one.endpoint.connect(two.addr, two.node);
    let (a, b, c) = within(async { tokio::join!(calls(), calls(), calls()) }).await;
    let kept = a.unwrap();
    assert_eq!((b.unwrap(), c.unwrap()), (kept.clone(), kept.clone()));
    assert_eq!(one.connect(&two).await, kept);
    // The other side may use it too, without dialling.
    let back = two.connected().await;
    assert_eq!(two.connect(&one).await, back);
    assert_eq!(one.connected().await, kept);
}

#[tokio::test]
async fn a_caller_who_goes_away_does_not_take_the_dial_with_it() {
    let cluster = Cluster::new();
    let (one, two) = cluster.pair();
    let (endpoint, addr, node) = (one.endpoint.clone(), two.addr, two.node);
    let first = tokio::spawn(async move { endpoint.connect(addr, node).await });
    tokio::task::yield_now().await;
    first.abort();
    one.connect(&two).await;
}

#[tokio::test]
async fn a_lost_connection_is_dialled_again() {
    let cluster = Cluster::new();
    let (one, two) = cluster.pair();
    for (from, to) in [(&one, &two), (&two, &one), (&one, &two)] {
        let connection = from.connect(to).await;
        until(|| to.endpoint.connection(&from.node).is_some()).await;
        connection.close(shoal_proto::peer::CloseReason::Idle);
        assert!(from.endpoint.connection(&to.node).is_none());
        to.alone().await;
    }
}

#[tokio::test]
async fn another_ca_is_refused_on_both_sides() {
    let (ours, theirs) = (Cluster::new(), Cluster::new());
    let (ours, theirs) = (ours.peer("m1"), theirs.peer("m2"));
    for (from, to) in [(&ours, &theirs), (&theirs, &ours)] {
        let error = within(from.endpoint.connect(to.addr, to.node)).await.unwrap_err();
        assert!(matches!(error, ConnectError::Handshake(_)), "{error}");
    }
    // A client that believes the server is refused by the server.
    let (trusting, other) = (Cluster::new(), Cluster::new());
    let server = trusting.peer("m1");
    let liar = EndpointConfig::new(
        loopback(),
        Credentials::new(other.identity("m2", Role::Agent), trusting.trust.clone()),
    );
    let liar = Peer::bind(&liar);
    let error = within(liar.endpoint.connect(server.addr, server.node)).await.unwrap_err();
    assert!(matches!(error, ConnectError::Handshake(_)), "{error}");
    for peer in [&ours, &theirs, &server, &liar] {
        assert!(peer.endpoint.connections().is_empty());
    }
}

#[tokio::test]
async fn the_wrong_machine_or_role_is_refused() {
    let cluster = Cluster::new();
    let (one, mut two) = cluster.pair();
    let expected = NodeId([9; 32]);
    let error = within(one.endpoint.connect(two.addr, expected)).await.unwrap_err();
    assert_eq!(error, ConnectError::WrongPeer { expected, found: two.node });
    let error = within(one.endpoint.connect_any(two.addr, Role::Region)).await.unwrap_err();
    assert_eq!(error, ConnectError::WrongRole { expected: Role::Region, found: Role::Agent });
    let error = within(one.endpoint.connect(one.addr, one.node)).await.unwrap_err();
    assert_eq!(error, ConnectError::Own);
    let error = within(one.endpoint.connect_any(one.addr, Role::Agent)).await.unwrap_err();
    assert_eq!(error, ConnectError::Own);
    // The one who was dialled in error has never heard of a connection.
    assert!(two.endpoint.connections().is_empty());
    assert!(two.incoming.try_recv().is_err());
}

#[tokio::test]
async fn an_address_alone_leads_to_the_same_connection() {
    let cluster = Cluster::new();
    let agent = cluster.peer("m1");
    let mut region = Peer::bind(&cluster.config("r1", Role::Region));
    let by_addr = || agent.endpoint.connect_any(region.addr, Role::Region);
    let by_node = agent.endpoint.connect(region.addr, region.node);
    let (a, b, c) = within(async { tokio::join!(by_addr(), by_node, by_addr()) }).await;
    let kept = a.unwrap();
    assert_eq!((b.unwrap(), c.unwrap()), (kept.clone(), kept.clone()));
    assert_eq!(within(by_addr()).await.unwrap(), kept);
    assert_eq!(kept.member().role, Role::Region);
    let back = region.connected().await;
    assert_eq!(region.endpoint.connections(), [back]);
}

#[tokio::test]
async fn a_full_endpoint_refuses() {
    let cluster = Cluster::new();
    let mut config = cluster.config("m0", Role::Agent);
    config.max_connections = 2;
    let full = Peer::bind(&config);
    let peers = [cluster.peer("m1"), cluster.peer("m2"), cluster.peer("m3")];
    let first = peers[0].connect(&full).await;
    peers[1].connect(&full).await;
    let error = within(peers[2].endpoint.connect(full.addr, full.node)).await.unwrap_err();
    assert_eq!(error, ConnectError::Full);
    let error = within(full.endpoint.connect(peers[2].addr, peers[2].node)).await.unwrap_err();
    assert_eq!(error, ConnectError::Full);
    // Whoever is in stays in, and a place that is given up can be taken.
    assert!(!first.is_closed());
    first.close(shoal_proto::peer::CloseReason::Done);
    until(|| full.endpoint.connections().len() == 1).await;
    peers[2].connect(&full).await;
}

#[tokio::test]
async fn a_dead_address_is_given_up() {
    let cluster = Cluster::new();
    let one = cluster.peer("m1");
    // A socket that takes packets and never answers.
    let silent = std::net::UdpSocket::bind(loopback()).unwrap();
    let addr = silent.local_addr().unwrap();
    let error = within(one.endpoint.connect(addr, NodeId([9; 32]))).await.unwrap_err();
    assert_eq!(error, ConnectError::Timeout(addr));
}

/// Runs an endpoint in a runtime of its own that can be killed: dropped without a word to anybody.
fn killable(config: EndpointConfig) -> (tokio::runtime::Runtime, Peer) {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let peer = {
        let _guard = runtime.enter();
        Peer::bind(&config)
    };
    (runtime, peer)
}

#[tokio::test]
async fn a_killed_endpoint_is_noticed_within_the_idle_timeout() {
    let cluster = Cluster::new();
    let mut config = cluster.config("m1", Role::Agent);
    config.idle_timeout = Duration::from_millis(600);
    config.keep_alive = Some(Duration::from_millis(100));
    let mut survivor = Peer::bind(&config);
    let (runtime, victim) = killable(cluster.config("m2", Role::Agent));
    let connection = survivor.connect(&victim).await;
    survivor.connected().await;
    let asking = tokio::spawn({
        let connection = connection.clone();
        async move { connection.request(piece(0)).await.map(drop) }
    });
    runtime.shutdown_background();
    let (closed, reason) = survivor.closed().await;
    assert_eq!(closed, connection);
    assert!(reason.contains("too long"), "{reason}");
    assert!(matches!(within(asking).await.unwrap(), Err(RequestError::Closed(_))));
    drop(victim);
}

#[tokio::test]
async fn who_rests_at_a_region_process_is_not_probed_and_neighbours_are() {
    let cluster = Cluster::new();
    let region = cluster.config("r1", Role::Region);
    let region = EndpointConfig::of_region(region.listen, region.credentials);
    let region = Peer::bind(&region);
    let mut config = cluster.config("m1", Role::Agent);
    (config.keep_alive, config.idle_timeout) =
        (Some(Duration::from_millis(50)), Duration::from_millis(400));
    config.region_idle_timeout = Duration::from_millis(400);
    let mut machine = Peer::bind(&config);
    let other = cluster.peer("m2");
    let neighbour = machine.connect(&other).await;
    machine.connected().await;
    let rests = within(machine.endpoint.connect_any(region.addr, Role::Region)).await.unwrap();
    assert_eq!(machine.connected().await, rests);
    // Neither end says anything, so the shorter of both times ends it.
    let (closed, reason) = machine.closed().await;
    assert_eq!(closed, rests);
    assert!(reason.contains("too long"), "{reason}");
    assert!(!neighbour.is_closed());
}

#[tokio::test]
async fn a_restarted_peer_is_noticed_at_once() {
    let cluster = Cluster::new();
    let mut config = cluster.config("m1", Role::Agent);
    // Far longer than the test may take: only the new process can say that the old one is gone.
    config.idle_timeout = Duration::from_secs(600);
    config.keep_alive = Some(Duration::from_millis(50));
    let mut survivor = Peer::bind(&config);
    let mut config = cluster.config("m2", Role::Agent);
    let (runtime, victim) = killable(config.clone());
    survivor.connect(&victim).await;
    survivor.connected().await;
    config.listen = victim.addr;
    runtime.shutdown_background();
    drop(victim);
    // The port is free once the old socket is gone.
    let again = within(async {
        loop {
            match Endpoint::bind(&config) {
                Ok((endpoint, incoming)) => {
                    let node = config.credentials.identity().member().node;
                    break Peer { addr: endpoint.local_addr(), endpoint, incoming, node };
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(2)).await,
            }
        }
    })
    .await;
    let (_, reason) = survivor.closed().await;
    assert!(reason.contains("restarted"), "{reason}");
    survivor.connect(&again).await;
}

#[tokio::test]
async fn a_restarted_peer_that_dials_takes_over() {
    let cluster = Cluster::new();
    let mut survivor = cluster.peer("m1");
    let config = cluster.config("m2", Role::Agent);
    let (runtime, victim) = killable(config.clone());
    // The victim dialled, so its next dial shows that it has lost the connection.
    let old = within(victim.endpoint.connect(survivor.addr, survivor.node)).await.unwrap();
    assert!(old.dialled());
    let held = survivor.connected().await;
    runtime.shutdown_background();
    let again = Peer::bind(&config);
    again.connect(&survivor).await;
    // The new one is up; the old one is gone, whichever is told first.
    let (mut up, mut down) = (None, None);
    for _ in 0..2 {
        match survivor.next().await {
            shoal_transport::Incoming::Connected(connection) => up = Some(connection),
            shoal_transport::Incoming::Closed(connection, _) => down = Some(connection),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(down.unwrap(), held);
    assert_eq!(survivor.endpoint.connections(), [up.unwrap()]);
}

#[tokio::test]
async fn a_mesh_has_one_connection_a_pair() {
    let cluster = Cluster::new();
    let peers: Vec<_> = (0..8).map(|at| cluster.peer(&format!("m{at}"))).collect();
    let mut dials = tokio::task::JoinSet::new();
    for from in &peers {
        for to in peers.iter().filter(|to| to.node != from.node) {
            let (endpoint, addr, node) = (from.endpoint.clone(), to.addr, to.node);
            dials.spawn(async move { endpoint.connect(addr, node).await.map(drop) });
        }
    }
    while let Some(dialled) = within(dials.join_next()).await {
        dialled.unwrap().unwrap();
    }
    for peer in &peers {
        assert_eq!(peer.endpoint.connections().len(), 7);
    }
    let dialled: usize = peers
        .iter()
        .flat_map(|peer| peer.endpoint.connections())
        .filter(|connection| connection.dialled())
        .count();
    assert_eq!(dialled, 28, "each pair has one dialler");
    assert!(peers[0].endpoint.connections().iter().all(|c| c.member().cluster == CLUSTER));
}
