//! Real nodes on loopback.

use std::{net::SocketAddr, time::Duration};

use futures::StreamExt;
use libp2p::{
    SwarmBuilder,
    gossipsub::{self, IdentTopic, MessageAuthenticity},
    identity::Keypair,
    multiaddr::Protocol,
    swarm::SwarmEvent,
};
use shoal_pki::{
    CertificateAuthority, Credentials, GoalSigner, Identity, IssueRequest, Role, Trust,
};
use shoal_proto::{
    AppName, ArtifactId, EncodingId, MachineName, NodeId, RegionName, Revision, codec,
    goal::{Activation, Goal, RolloutPlan, Selector},
    gossip::{GOSSIP_MESSAGE_MAX_BYTES, GossipMessage, goal_topic},
    manifest::PieceSize,
    trust::{TRUST_MAX_BYTES, TrustBundle},
};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout_at},
};

use crate::{Gossip, GossipConfig, GossipError, GossipEvent, VERIFY_MAX, node::Command, settings};

/// No condition takes this long; a test that waits for it has failed.
const DEADLINE: Duration = Duration::from_secs(20);

fn loopback() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

fn region(name: &str) -> RegionName {
    RegionName::new(name).unwrap()
}

/// A cluster's keys.
struct Cluster {
    ca: CertificateAuthority,
    signer: GoalSigner,
}

impl Cluster {
    fn new() -> Self {
        let ca = CertificateAuthority::create("test").unwrap();
        Self { ca, signer: GoalSigner::create(1).unwrap() }
    }

    fn trust(&self, number: u64, revoked: Vec<NodeId>) -> Trust {
        let bundle = TrustBundle {
            cluster: "test".into(),
            number,
            ca_certificates: vec![self.ca.cert_der().to_vec()],
            goal_keys: vec![self.signer.public()],
            revoked,
        };
        let signed = self.signer.sign_trust(&bundle).unwrap();
        Trust::from_signed(&codec::encode(&signed, TRUST_MAX_BYTES).unwrap()).unwrap()
    }

    fn identity(&self, name: &str, region: RegionName, role: Role) -> Identity {
        let issued = self
            .ca
            .issue(&IssueRequest {
                machine: MachineName::new(name).unwrap(),
                region: Some(region),
                role,
                hosts: vec![],
                days: 90,
            })
            .unwrap();
        Identity::from_pem(&issued.cert_pem, &issued.key_pem).unwrap()
    }

    fn config(&self, name: &str) -> GossipConfig {
        let credentials = self.credentials(name, region("eu"), Role::Agent);
        GossipConfig::new(loopback(), credentials, region("eu"))
    }

    fn credentials(&self, name: &str, region: RegionName, role: Role) -> Credentials {
        Credentials::new(self.identity(name, region, role), self.trust(1, vec![]))
    }

    async fn node(&self, name: &str) -> Peer {
        Peer::start(self.config(name)).await
    }

    fn goal(&self, number: u64) -> GossipMessage {
        let goal = Goal {
            cluster: "test".into(),
            app: AppName::new("web").unwrap(),
            revision: Revision { epoch: 0, number },
            selector: Selector::default(),
            regions: vec![],
            artifact: ArtifactId([1; 32]),
            size_bytes: 1,
            piece_size: PieceSize::MIN,
            encoding: EncodingId([2; 32]),
            file_mode: 0o755,
            activation: Activation::None,
            health: None,
            plan: RolloutPlan::default(),
            priority: 0,
            machines_estimate: 1,
            issued_at_ms: 0,
        };
        GossipMessage::Goal(self.signer.sign_goal(&goal).unwrap())
    }
}

/// A node and what it has heard.
struct Peer {
    gossip: Gossip,
    credentials: Credentials,
    node: NodeId,
    events: mpsc::Receiver<GossipEvent>,
    messages: Vec<GossipMessage>,
    refused: Vec<String>,
    gone: Vec<NodeId>,
}

impl Peer {
    async fn start(config: GossipConfig) -> Self {
        let node = config.credentials.identity().member().node;
        let credentials = config.credentials.clone();
        let (gossip, events) = Gossip::start(config).await.unwrap();
        Self { gossip, credentials, node, events, messages: vec![], refused: vec![], gone: vec![] }
    }

    async fn dial(&self, other: &Self) {
        self.gossip.add_peers(vec![(other.node, other.gossip.local_addr())]).await.unwrap();
    }

    /// Takes events until `done`.
    async fn until(&mut self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        // Counters change without an event.
        let mut look = tokio::time::interval(Duration::from_millis(20));
        while !done(self) {
            tokio::select! {
                event = timeout_at(deadline, self.events.recv()) => match event {
                    Ok(Some(GossipEvent::Message { message, .. })) => self.messages.push(message),
                    Ok(Some(GossipEvent::PeerRefused { reason, .. })) => self.refused.push(reason),
                    Ok(Some(GossipEvent::PeerGone(node))) => self.gone.push(node),
                    Ok(Some(GossipEvent::PeerVerified(_))) => {}
                    _ => panic!("not in time: {what}; {:?}", self.gossip.stats()),
                },
                _ = look.tick() => {
                    assert!(Instant::now() < deadline, "not in time: {what}; {:?}", self.gossip.stats());
                }
            }
        }
    }

    async fn until_peers(&mut self, count: usize) {
        self.until(&format!("{count} peers"), |me| me.gossip.peers() == count).await;
    }

    async fn until_messages(&mut self, count: usize) {
        self.until(&format!("{count} messages"), |me| me.messages.len() >= count).await;
    }

    /// Sends bytes that need not be a message.
    async fn publish_raw(&self, bytes: &[u8]) {
        self.gossip.command(Command::Publish(bytes.to_vec())).await.unwrap();
    }
}

async fn pair(cluster: &Cluster) -> (Peer, Peer) {
    let (mut a, mut b) = (cluster.node("a").await, cluster.node("b").await);
    a.dial(&b).await;
    a.until_peers(1).await;
    b.until_peers(1).await;
    (a, b)
}

#[tokio::test]
async fn a_message_reaches_all_of_a_line_once() {
    let cluster = Cluster::new();
    let mut nodes = Vec::new();
    for n in 0..10 {
        nodes.push(cluster.node(&format!("m{n}")).await);
    }
    for n in 0..9 {
        nodes[n].dial(&nodes[n + 1]).await;
    }
    for (n, node) in nodes.iter_mut().enumerate() {
        node.until_peers(if n == 0 || n == 9 { 1 } else { 2 }).await;
    }
    let (first, second) = (cluster.goal(1), cluster.goal(2));
    nodes[0].gossip.publish(&first).await.unwrap();
    for node in &mut nodes[1..] {
        node.until_messages(1).await;
    }
    // The same content again, from its publisher, from one who heard it, and from the far end.
    for n in [0, 4, 9] {
        nodes[n].gossip.publish(&first).await.unwrap();
        nodes[n].until("a repeat", |me| me.gossip.stats().repeated == 1).await;
    }
    nodes[9].gossip.publish(&second).await.unwrap();
    for node in &mut nodes[..9] {
        let own = usize::from(node.messages.is_empty());
        node.until_messages(2 - own).await;
        let heard = [first.clone(), second.clone()];
        assert_eq!(node.messages, heard[own..], "each once; not what was published here");
    }
    for node in &nodes {
        assert_eq!(node.gossip.stats().refused + node.gossip.stats().cut_off, 0);
        node.gossip.shutdown().await;
    }
}

#[tokio::test]
async fn a_message_waits_for_the_first_peer() {
    let cluster = Cluster::new();
    let (mut a, mut b) = (cluster.node("a").await, cluster.node("b").await);
    a.gossip.publish(&cluster.goal(1)).await.unwrap();
    // By its address only, as a region process of the configuration; and its own is there as well.
    a.gossip.dial(a.gossip.local_addr()).await.unwrap();
    a.gossip.dial(b.gossip.local_addr()).await.unwrap();
    b.until_messages(1).await;
    assert_eq!(b.messages, [cluster.goal(1)]);
    // b's address twice, as it was given and as b named it; its own is not dialed.
    a.until_peers(1).await;
    let stats = a.gossip.stats();
    assert!(stats.addresses <= 2 && stats.dials == 1, "{stats:?}");
    assert_eq!(a.gossip.peers(), 1);
}

#[tokio::test]
async fn what_is_not_understood_is_counted_and_the_connection_stays() {
    let cluster = Cluster::new();
    let (a, mut b) = pair(&cluster).await;
    a.publish_raw(b"").await;
    let mut later = codec::encode(&cluster.goal(1), GOSSIP_MESSAGE_MAX_BYTES).unwrap();
    later[0] = 77;
    a.publish_raw(&later).await;
    a.publish_raw(&[1, 200, 3]).await;
    // A goal by somebody who is not trusted to sign.
    a.gossip.publish(&Cluster::new().goal(1)).await.unwrap();
    b.until("all are counted", |me| {
        let stats = me.gossip.stats();
        (stats.malformed, stats.unknown_version, stats.bad_signature) == (2, 1, 1)
    })
    .await;
    a.gossip.publish(&cluster.goal(2)).await.unwrap();
    b.until_messages(1).await;
    assert_eq!(b.messages, [cluster.goal(2)]);
    assert_eq!((b.gossip.peers(), b.gone.len(), b.refused.len()), (1, 0, 0));
    let long = GossipMessage::Goal(shoal_proto::goal::SignedGoal {
        goal: vec![0; 2_000],
        key_id: 0,
        signature: vec![],
    });
    assert!(matches!(a.gossip.publish(&long).await, Err(GossipError::Message(_))));
}

#[tokio::test]
async fn one_who_shows_no_certificate_neither_hears_nor_is_heard_and_is_cut_off() {
    let cluster = Cluster::new();
    let (mut a, mut b) = pair(&cluster).await;

    // Speaks gossipsub and knows the topic, but has no certificate to show.
    let topic = IdentTopic::new(goal_topic("test", &region("eu")));
    let mut stranger = SwarmBuilder::with_existing_identity(Keypair::generate_ed25519())
        .with_tokio()
        .with_quic()
        .with_behaviour(|_| {
            let config = settings::gossipsub_config().unwrap();
            <gossipsub::Behaviour>::new(MessageAuthenticity::Anonymous, config).unwrap()
        })
        .unwrap()
        .build();
    stranger.behaviour_mut().subscribe(&topic).unwrap();
    let addr = a.gossip.local_addr();
    let addr =
        libp2p::Multiaddr::from(addr.ip()).with(Protocol::Udp(addr.port())).with(Protocol::QuicV1);
    stranger.dial(addr).unwrap();
    let forged = codec::encode(&cluster.goal(66), GOSSIP_MESSAGE_MAX_BYTES).unwrap();
    let (mut connected, mut said) = (None, false);
    loop {
        let event = tokio::time::timeout(DEADLINE, stranger.select_next_some()).await.unwrap();
        match event {
            SwarmEvent::ConnectionEstablished { .. } => connected = Some(Instant::now()),
            SwarmEvent::Behaviour(gossipsub::Event::Subscribed { .. }) => {
                // A sound goal, soundly signed: only its sender is wrong.
                stranger.behaviour_mut().publish(topic.clone(), forged.clone()).unwrap();
                said = true;
                // And one that it must not hear while it is still connected.
                a.gossip.publish(&cluster.goal(1)).await.unwrap();
            }
            SwarmEvent::Behaviour(gossipsub::Event::Message { message, .. }) => {
                panic!("a stranger heard {message:?}")
            }
            SwarmEvent::ConnectionClosed { .. } => break,
            _ => {}
        }
    }
    assert!(said);
    let after = connected.unwrap().elapsed();
    assert!(after >= VERIFY_MAX - Duration::from_millis(100), "{after:?}");
    assert!(after < VERIFY_MAX * 2, "{after:?}");
    a.until("it is reported", |me| me.refused.len() == 1).await;
    assert!(a.refused[0].contains("showed no certificate"), "{:?}", a.refused);
    assert_eq!(a.gossip.stats().cut_off, 1);

    b.until_messages(1).await;
    b.gossip.publish(&cluster.goal(2)).await.unwrap();
    a.until_messages(1).await;
    assert_eq!(a.messages, [cluster.goal(2)], "nothing from the stranger");
    assert_eq!(b.messages, [cluster.goal(1)], "nothing was passed on");
    assert_eq!((a.gossip.peers(), b.gossip.peers()), (1, 1));
}

/// Two nodes of which at least one finds the other's certificate wrong.
async fn refuse_each_other(a: GossipConfig, b: GossipConfig, reason: &str) {
    let (mut a, mut b) = (Peer::start(a).await, Peer::start(b).await);
    a.dial(&b).await;
    b.until("it refuses", |me| me.refused.iter().any(|why| why.contains(reason))).await;
    a.until("it hears why", |me| {
        me.refused.iter().any(|why| why.contains(reason) || why.contains("refuses us"))
    })
    .await;
    for node in [&mut a, &mut b] {
        node.until("it is gone", |me| me.gossip.stats().unverified == 0).await;
        assert_eq!((node.gossip.peers(), node.gossip.stats().verified), (0, 0));
    }
}

#[tokio::test]
async fn another_ca_is_refused() {
    let (cluster, other) = (Cluster::new(), Cluster::new());
    refuse_each_other(other.config("a"), cluster.config("b"), "").await;
}

#[tokio::test]
async fn another_region_is_refused() {
    let cluster = Cluster::new();
    let mut other = cluster.config("a");
    other.credentials = cluster.credentials("a", region("us"), Role::Agent);
    other.region = region("us");
    refuse_each_other(other, cluster.config("b"), "of region us, not eu").await;
}

#[tokio::test]
async fn who_is_no_member_does_not_start() {
    let cluster = Cluster::new();
    let mut config = cluster.config("a");
    config.region = region("us");
    assert!(matches!(Gossip::start(config).await, Err(GossipError::NotAMember(_))));
    let mut config = cluster.config("a");
    config.credentials = cluster.credentials("w", region("eu"), Role::Worker);
    assert!(matches!(Gossip::start(config).await, Err(GossipError::NotAMember(_))));
    let mut config = cluster.config("a");
    let other = cluster.node("b").await;
    config.listen = other.gossip.local_addr();
    let error = Gossip::start(config).await.err().unwrap().to_string();
    assert!(error.contains("in use"), "{error}");
}

#[tokio::test]
async fn a_revoked_member_is_cut_off() {
    let cluster = Cluster::new();
    let (mut a, mut b) = pair(&cluster).await;
    assert!(a.credentials.set_trust(cluster.trust(2, vec![b.node])));
    a.gossip.recheck().await.unwrap();
    a.until_peers(0).await;
    b.until("it is cut off", |me| me.gone == [a.node]).await;
    a.until("it says so", |me| me.refused.len() == 1).await;
    // It comes back by itself, and is refused.
    b.dial(&a).await;
    b.until("it hears why", |me| me.refused.iter().any(|why| why.contains("refuses us"))).await;
    assert_eq!(a.gossip.peers(), 0);
}

#[tokio::test]
async fn news_of_trust_travels_from_neighbour_to_neighbour_unless_it_is_old() {
    let cluster = Cluster::new();
    let (mut a, mut b) = pair(&cluster).await;
    let news = |number| GossipMessage::Trust { number, hash: [number as u8; 32] };
    assert!(b.credentials.set_trust(cluster.trust(3, vec![])));
    a.gossip.publish(&news(2)).await.unwrap();
    a.gossip.publish(&news(3)).await.unwrap();
    b.until_messages(1).await;
    assert_eq!(b.messages, [news(3)]);
    b.gossip.publish(&news(4)).await.unwrap();
    a.until_messages(1).await;
    assert_eq!(a.messages, [news(4)]);
}

#[tokio::test]
async fn a_renewed_certificate_is_what_new_neighbours_are_shown() {
    let cluster = Cluster::new();
    let a = cluster.node("a").await;
    let own = a.credentials.identity();
    // The CA that issued the first one is replaced: only the renewed one counts for c.
    let next = CertificateAuthority::create("test").unwrap();
    let renewed = next.renew(own.certificate_der(), 1_000).unwrap();
    a.credentials.set_identity(own.with_certificate(&renewed).unwrap()).unwrap();
    let mut bundle = cluster.trust(1, vec![]).bundle().clone();
    bundle.number = 2;
    bundle.ca_certificates.push(next.cert_der().to_vec());
    let trust = |bundle: &TrustBundle| {
        let signed = cluster.signer.sign_trust(bundle).unwrap();
        Trust::from_signed(&codec::encode(&signed, TRUST_MAX_BYTES).unwrap()).unwrap()
    };
    let mut config = cluster.config("c");
    let theirs = config.credentials.identity();
    let both = trust(&bundle);
    assert!(a.credentials.set_trust(both.clone()));
    bundle.number = 3;
    bundle.ca_certificates.remove(0);
    let pem = next.renew(theirs.certificate_der(), 1_000).unwrap();
    config.credentials = Credentials::new(theirs.with_certificate(&pem).unwrap(), trust(&bundle));
    let mut c = Peer::start(config).await;
    c.dial(&a).await;
    c.until_peers(1).await;
}

#[tokio::test]
async fn a_full_node_turns_others_away() {
    let cluster = Cluster::new();
    let mut config = cluster.config("hub");
    config.max_peers = 1;
    let mut hub = Peer::start(config).await;
    let (mut a, mut b) = (cluster.node("a").await, cluster.node("b").await);
    a.dial(&hub).await;
    a.until_peers(1).await;
    hub.until_peers(1).await;
    b.dial(&hub).await;
    b.until("it hears why", |me| me.refused.iter().any(|why| why.contains("no room"))).await;
    hub.until("it is gone", |me| me.gossip.stats().unverified == 0).await;
    assert_eq!((hub.gossip.peers(), hub.gossip.stats().turned_away), (1, 1));
    assert_eq!(b.gossip.stats().addresses, 1, "full is not dead");
}

#[tokio::test]
async fn a_peer_that_comes_back_is_dialed_again() {
    let cluster = Cluster::new();
    let (mut a, b) = pair(&cluster).await;
    let mut config = cluster.config("b");
    config.credentials = cluster.credentials("b", region("eu"), Role::Region);
    config.listen = b.gossip.local_addr();
    // The address stays, the key is another: what a region process is that was set up anew.
    a.gossip.dial(b.gossip.local_addr()).await.unwrap();
    b.gossip.shutdown().await;
    assert!(matches!(b.gossip.publish(&cluster.goal(1)).await, Err(GossipError::Stopped)));
    a.until("it is told at once", |me| me.gone == [b.node]).await;
    // QUIC gives the port free when its last connection has drained.
    let deadline = Instant::now() + DEADLINE;
    let mut look = tokio::time::interval(Duration::from_millis(20));
    let (gossip, events) = loop {
        look.tick().await;
        match Gossip::start(config.clone()).await {
            Ok(started) => break started,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
    };
    let node = config.credentials.identity().member().node;
    let credentials = config.credentials;
    let mut b =
        Peer { gossip, credentials, node, events, messages: vec![], refused: vec![], gone: vec![] };
    a.until_peers(1).await;
    b.until_peers(1).await;
    a.gossip.publish(&cluster.goal(3)).await.unwrap();
    b.until_messages(1).await;
}
