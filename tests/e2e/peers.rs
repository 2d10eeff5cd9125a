//! Peers that lie, that never answer, and that speak another version of the protocol, beside real agents.

use std::{fs, path::Path};

use shoal_client::types::{App, Artifact};
use shoal_pki::{Identity, Role, Trust};
use shoal_proto::{
    PieceIndex,
    manifest::PieceSize,
    peer::{StreamReply, StreamRequest, VERSIONS},
    state::MachineState,
};
use shoal_test_peers::{Manner, Peer, Setup};
use tokio::{sync::watch, task::JoinSet};

use crate::harness::{Cluster, Shape, plain_app, wait_for};

/// Pieces of 1 MiB, so that there are enough of them to be banned for.
const SIZE: usize = 24 << 20;

async fn cluster() -> Cluster {
    let agent_extra = "metrics_listen = \"127.0.0.1:0\"\n".into();
    let cluster = Cluster::start(Shape { agent_extra, ..Shape::default() }).await;
    cluster.set_app(&plain_app("data")).await;
    cluster
}

/// Who the process of a directory is.
pub fn identity(dir: &Path) -> Identity {
    let read = |file: &str| fs::read_to_string(dir.join("identity").join(file)).unwrap();
    Identity::from_pem(&read("identity.pem"), &read("identity.key")).unwrap()
}

/// What a peer of this name needs to take part in an artifact's swarm.
pub async fn setup(
    cluster: &mut Cluster,
    name: &str,
    artifact: &Artifact,
    manner: Manner,
) -> Setup {
    let dir = cluster.root().join(name);
    cluster.keys.issue(&dir.join("identity"), Role::Agent, name, Some("r1"));
    let identity = identity(&dir);
    let trust = Trust::from_signed(&cluster.keys.trust).unwrap();
    let mut regions = vec![];
    for region in &mut cluster.regions {
        regions.push(region.address("data").await);
    }
    let piece_size = PieceSize::from_bytes(artifact.piece_size_bytes).unwrap();
    let what = (artifact.artifact, artifact.size_bytes, piece_size);
    Setup::new("127.0.0.1:0".parse().unwrap(), identity, trust, regions, what, manner)
}

/// Waits until every agent is connected with a peer.
async fn all_met(cluster: &Cluster, peer: &Peer) {
    for agent in &cluster.agents {
        wait_for(&format!("{} to meet the peer", agent.name), async || {
            peer.connection(&agent.name).map(drop).map_err(|error| error.to_string())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_liar_is_banned_by_everyone_and_harms_nobody() {
    let mut cluster = cluster().await;
    let file = cluster.random_file("file", SIZE, 1);
    let artifact = cluster.publish("data", &file).await;
    let setup = setup(&mut cluster, "m9", &artifact, Manner::Liar).await;
    let liar = Peer::start(setup).unwrap();
    let rollout = cluster.deploy("data", &artifact.name).await;
    cluster.rollout_succeeds(rollout.id).await;
    for agent in &mut cluster.agents {
        assert_eq!(
            fs::read(agent.data_dir().join("apps/data/current")).unwrap(),
            fs::read(&file).unwrap()
        );
        let name = agent.name.clone();
        let corrupt = agent.metric("shoal_agent_fetches_total{outcome=\"corrupt\"}").await;
        // Two more may have been on their way when the third came.
        assert!((3..=5).contains(&corrupt), "{name}: {corrupt} corrupt pieces");
        assert_eq!(agent.metric("shoal_agent_banned_total").await, 1, "{name}");
        assert!(agent.log().contains("neighbour banned"), "{name}");
    }
    wait_for("the liar to be told", async || match liar.banned() {
        banned if banned >= cluster.agents.len() as u64 => Ok(()),
        banned => Err(banned),
    })
    .await;
    let asked = liar.asked();
    assert!(asked <= 5 * cluster.agents.len() as u64, "nobody asks again: {asked}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_never_answers_harms_nobody() {
    let mut cluster = cluster().await;
    let file = cluster.random_file("file", SIZE, 2);
    let artifact = cluster.publish("data", &file).await;
    let setup = setup(&mut cluster, "m9", &artifact, Manner::Silent).await;
    let silent = Peer::start(setup).unwrap();
    // It says that it has everything, so at first nobody reads the bucket.
    let rollout = cluster.deploy("data", &artifact.name).await;
    let rollout = cluster.rollout_succeeds(rollout.id).await;
    assert!(silent.asked() > 0, "somebody trusted it");
    for agent in &cluster.agents {
        assert_eq!(cluster.current(&agent.name, "data"), fs::read(&file).unwrap());
    }
    let copies = rollout.regions.values().next().unwrap().origin_copies;
    assert!((0.99..1.11).contains(&copies), "{copies} copies");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_and_does_not_read_holds_up_nobody() {
    /// More than fits into a connection: an upload that is not read does not end.
    const PIECE: usize = 16 << 20;
    let mut cluster = Cluster::start(Shape { agents: 1, ..Shape::default() }).await;
    cluster.set_app(&App { piece_size_bytes: Some(PIECE as u64), ..plain_app("data") }).await;
    let file = cluster.random_file("file", 4 * PIECE, 4);
    let bytes = fs::read(&file).unwrap();
    let artifact = cluster.publish("data", &file).await;
    let rollout = cluster.deploy("data", &artifact.name).await;
    cluster.rollout_succeeds(rollout.id).await;
    let agent = cluster.agents[0].name.clone();
    let mut peers = vec![];
    for name in ["m7", "m8", "m9"] {
        let setup = setup(&mut cluster, name, &artifact, Manner::Silent).await;
        peers.push(Peer::start(setup).unwrap());
    }
    for peer in &peers {
        all_met(&cluster, peer).await;
    }
    let (reader, others) = peers.split_last().unwrap();
    let ask = |peer: &Peer, piece: usize| {
        let piece = PieceIndex(piece as u32);
        let request = StreamRequest::Piece { artifact: artifact.artifact, piece };
        let connection = peer.connection(&agent).unwrap();
        async move {
            match connection.request(request).await.unwrap() {
                (StreamReply::Piece { .. }, body) => Ok(body),
                (reply, _) => Err(reply),
            }
        }
    };
    // All eight slots of the agent, until someone reads. The later answers wait behind the first body.
    let (read, reads) = watch::channel(false);
    let mut unread = JoinSet::new();
    for (peer, piece) in others.iter().flat_map(|peer| (0..4).map(move |piece| (peer, piece))) {
        let (asked, mut reads) = (ask(peer, piece), reads.clone());
        unread.spawn(async move {
            let mut body = asked.await.unwrap();
            reads.wait_for(|read| *read).await.unwrap();
            (piece, body.read(PIECE).await.unwrap())
        });
    }
    wait_for("all slots to be taken", async || match ask(reader, 0).await {
        Err(StreamReply::Busy) => Ok(()),
        other => Err(other.map(|_| "there was one")),
    })
    .await;
    for piece in 0..4 {
        let mut body = wait_for("one more slot", async || ask(reader, piece).await).await;
        assert!(body.read(PIECE).await.unwrap() == bytes[piece * PIECE..][..PIECE], "{piece}");
    }
    // Nobody was cut off for it.
    assert_eq!(unread.len(), 8);
    assert!(unread.try_join_next().is_none());
    read.send(true).unwrap();
    while let Some(ended) = unread.join_next().await {
        let (piece, came) = ended.unwrap();
        assert!(came == bytes[piece * PIECE..][..PIECE], "{piece}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn releases_of_two_versions_swarm() {
    let mut cluster = cluster().await;
    let file = cluster.random_file("file", SIZE, 3);
    let bytes = fs::read(&file).unwrap();
    let artifact = cluster.publish("data", &file).await;
    let ours = VERSIONS[0];
    // The next release speaks its own version and ours.
    let manner = Manner::Honest(bytes.clone().into());
    let mut next = setup(&mut cluster, "m8", &artifact, manner.clone()).await;
    next.endpoint.versions = vec![ours + 1, ours];
    let next = Peer::start(next).unwrap();
    // The one after it does no longer speak ours.
    let mut after = setup(&mut cluster, "m9", &artifact, manner).await;
    after.endpoint.versions = vec![ours + 2, ours + 1];
    let after = Peer::start(after).unwrap();
    // An agent of this release that is told of it cannot connect, and says why.
    let data = cluster.agents[0].address("data").await;
    let node = identity(&cluster.agents[0].dir).member().node;
    let error = after.endpoint.connect(data, node).await.unwrap_err().to_string();
    assert!(error.contains("speaks none of the protocol versions"), "{error}");
    let said = "it speaks none of our protocol versions";
    wait_for("the agent to say so", async || {
        let log = cluster.agents[0].log();
        if log.contains(said) { Ok(()) } else { Err(log) }
    })
    .await;

    // The agents get pieces of the next release...
    cluster.deploy("data", &artifact.name).await;
    for agent in &cluster.agents {
        cluster.machine_is(&agent.name, "data", MachineState::Active).await;
        assert_eq!(cluster.current(&agent.name, "data"), bytes);
    }
    all_met(&cluster, &next).await;
    assert!(next.asked() > 0);
    for agent in &mut cluster.agents {
        // ...and it gets pieces of them.
        let connection = next.connection(&agent.name).unwrap();
        assert_eq!(connection.version(), Some(ours));
        let request = StreamRequest::Piece { artifact: artifact.artifact, piece: PieceIndex(1) };
        let (reply, mut body) = connection.request(request).await.unwrap();
        assert!(matches!(reply, StreamReply::Piece { .. }), "{reply:?}");
        let len = artifact.piece_size_bytes as usize;
        assert!(body.read(len).await.unwrap() == bytes[len..2 * len]);
        assert_eq!(agent.metric("shoal_agent_banned_total").await, 0);
    }
}
