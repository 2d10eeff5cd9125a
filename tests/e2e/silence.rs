//! Region processes from which nothing comes back, and one that hears and does not answer.

use std::{fs, net::SocketAddr};

use shoal_pki::{Credentials, Role, Trust};
use shoal_proto::{peer::StreamRequest, region::RegionRequest, state::MachineState};
use shoal_transport::{Endpoint, EndpointConfig, Incoming};

use crate::{
    harness::{Cluster, Relay, Shape, plain_app},
    peers::identity,
};

/// Starts an agent again that knows a region process by this address and no other.
async fn knows_only(cluster: &mut Cluster, at: usize, region: SocketAddr) {
    let file = cluster.agents[at].dir.join("config.toml");
    let mut config: toml::Table = fs::read_to_string(&file).unwrap().parse().unwrap();
    config.insert("regions".into(), vec![region.to_string()].into());
    fs::write(&file, config.to_string()).unwrap();
    cluster.restart_agent(at).await;
}

async fn one_agent() -> Cluster {
    let cluster =
        Cluster::start(Shape { region_processes: 1, agents: 1, ..Shape::default() }).await;
    cluster.set_app(&plain_app("data")).await;
    cluster
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_over_which_nothing_comes_back_is_made_anew() {
    let mut cluster = one_agent().await;
    let relay = Relay::to(cluster.regions[0].address("data").await).await;
    knows_only(&mut cluster, 0, relay.addr).await;
    let file = cluster.random_file("file", 1 << 20, 1);
    let artifact = cluster.publish("data", &file).await;
    let rollout = cluster.deploy("data", &artifact.name).await;
    cluster.rollout_succeeds(rollout.id).await;
    assert_eq!(relay.opened(), 1);

    // Nobody says that the way is dead, and the connection would stand for another 150 s: longer than a test waits.
    relay.forget();
    let rollout = cluster.deploy("data", &artifact.name).await;
    // The goal came by gossip; that it runs is told over the new connection.
    cluster.rollout_succeeds(rollout.id).await;
    let seen = cluster.machine_is("m1", "data", MachineState::Active).await;
    assert_eq!(seen.report.revision, rollout.revision);
    assert_eq!(relay.opened(), 2);
    assert!(cluster.agents[0].log().contains("lost the region process"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_stays_whose_questions_arrive_and_are_not_answered() {
    let mut cluster = one_agent().await;
    let dir = cluster.root().join("slow");
    cluster.keys.issue(&dir.join("identity"), Role::Region, "r1-p2", Some("r1"));
    let trust = Trust::from_signed(&cluster.keys.trust).unwrap();
    let credentials = Credentials::new(identity(&dir), trust);
    let config = EndpointConfig::of_region("127.0.0.1:0".parse().unwrap(), credentials);
    let (endpoint, mut incoming) = Endpoint::bind(&config).unwrap();
    knows_only(&mut cluster, 0, endpoint.local_addr()).await;

    // Each question waits for 3 s. With the second one a connection would be made anew, were its packets lost.
    let mut asked = vec![];
    let mut connected = 0;
    while asked.len() < 4 {
        match incoming.recv().await.unwrap() {
            Incoming::Connected(_) => connected += 1,
            Incoming::Request(request) => {
                if let StreamRequest::Region(RegionRequest::Poll { .. }) = &request.request {
                    // Kept, it is not refused either.
                    asked.push(request);
                }
            }
            Incoming::Message(..) => {}
            Incoming::Closed(_, reason) => panic!("after {} questions: {reason}", asked.len()),
        }
    }
    assert_eq!(connected, 1);
    endpoint.shutdown().await;
}
