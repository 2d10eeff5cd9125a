//! Goals in a real etcd: with the coordinator dead, killed in between; and a region's own etcd.

use std::{
    collections::BTreeMap,
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
};

use shoal_goals::{Entry, EtcdStore, GoalStore as _};
use shoal_proto::{AppName, Revision};
use shoal_test_etcd::{Place, Server};
use tokio::{net::TcpListener, task::JoinHandle};

use crate::harness::{Cluster, Shape, plain_app, wait_for};

/// The cluster's name in the harness.
const CLUSTER: &str = "test";

async fn stored(url: &str) -> BTreeMap<String, Revision> {
    let store = EtcdStore::open(url, CLUSTER).unwrap();
    let listed = store.list().await.unwrap().entries;
    listed.into_iter().map(|entry| (entry.app.to_string(), entry.revision)).collect()
}

/// Waits until etcd has this revision of an app's goal.
pub async fn is_stored(url: &str, app: &str, revision: Revision) {
    wait_for(&format!("{app} {revision} in etcd"), async || match stored(url).await.get(app) {
        Some(found) if *found == revision => Ok(()),
        found => Err(format!("{found:?}")),
    })
    .await;
}

/// Waits until every agent's file is this one.
pub async fn runs(cluster: &Cluster, file: &Path) {
    let want = fs::read(file).unwrap();
    for agent in &cluster.agents {
        wait_for(&format!("{} to have {}", agent.name, file.display()), async || {
            let path = cluster.current_path(&agent.name, "data");
            match fs::read(path) {
                Ok(found) if found == want => Ok(()),
                Ok(found) => Err(format!("{} other bytes", found.len())),
                Err(error) => Err(error.to_string()),
            }
        })
        .await;
    }
}

/// A way to the coordinator that can be cut.
struct Wire {
    task: JoinHandle<()>,
    url: String,
}

impl Wire {
    async fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let url = format!("https://{}", listener.local_addr().unwrap());
        let task = tokio::spawn(async move {
            // Aborted, it ends all that it carries.
            let mut carried = tokio::task::JoinSet::new();
            while let Ok((mut near, _)) = listener.accept().await {
                carried.spawn(async move {
                    if let Ok(mut far) = tokio::net::TcpStream::connect(target).await {
                        let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                    }
                });
            }
        });
        Self { task, url }
    }

    async fn cut(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deploy_reaches_machines_through_etcd_with_the_coordinator_dead() {
    let place = Place::create().await.unwrap();
    let port = free_port();
    let wire = Wire::to(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).await;
    let key = format!("goals = \"{}\"\n", place.url());
    let shape = Shape {
        coordinator_port: port,
        coordinator_extra: key.clone(),
        region_extra: key,
        region_coordinators: Some(vec![wire.url.clone()]),
        ..Shape::default()
    };
    let mut cluster = Cluster::start(shape).await;
    cluster.set_app(&plain_app("data")).await;
    let (one, two) =
        (cluster.random_file("one", 3 << 20, 1), cluster.random_file("two", 3 << 20, 2));
    let first = cluster.publish("data", &one).await;
    let second = cluster.publish("data", &two).await;
    let rollout = cluster.deploy("data", &first.name).await;
    cluster.rollout_succeeds(rollout.id).await;
    runs(&cluster, &one).await;

    // The regions no longer reach the coordinator; it sets a goal, and is dead before any of them could ask it.
    wire.cut().await;
    let rollout = cluster.deploy("data", &second.name).await;
    is_stored(place.url(), "data", rollout.revision).await;
    cluster.coordinator.kill();
    runs(&cluster, &two).await;
    for region in &cluster.regions {
        assert!(region.log().contains("cannot follow the goals"), "it had no coordinator");
    }
    drop(cluster);
    place.remove().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_goal_that_was_acknowledged_reaches_etcd_whoever_is_killed() {
    let mut server = Server::start().await.unwrap();
    let url = server.url();
    let shape = Shape {
        coordinator_extra: format!("goals = \"{url}\"\nmetrics_listen = \"127.0.0.1:0\"\n"),
        ..Shape::default()
    };
    let mut cluster = Cluster::start(shape).await;
    for app in ["data", "other"] {
        cluster.set_app(&plain_app(app)).await;
    }
    let file = cluster.random_file("one", 1 << 20, 1);
    let data = cluster.publish("data", &file).await;
    let other = cluster.publish("other", &file).await;
    let first = cluster.deploy("data", &data.name).await;
    is_stored(&url, "data", first.revision).await;

    // etcd is away: goals are set all the same, and machines follow them by the coordinator.
    server.kill().unwrap();
    let second = cluster.deploy("data", &data.name).await;
    let third = cluster.deploy("other", &other.name).await;
    cluster.rollout_succeeds(third.id).await;
    wait_for("the outbox to show", async || {
        match cluster.coordinator.metric("shoal_coordinator_goal_outbox").await {
            2 => Ok(()),
            other => Err(other),
        }
    })
    .await;
    // The coordinator is killed with them in its outbox.
    cluster.coordinator.kill();
    server.start_again().await.unwrap();
    assert_eq!(stored(&url).await, BTreeMap::from([("data".to_string(), first.revision)]));
    cluster.restart_coordinator().await;
    is_stored(&url, "data", second.revision).await;
    is_stored(&url, "other", third.revision).await;

    // etcd comes back without its data, and gets it again from the database.
    server.empty().unwrap();
    server.start_again().await.unwrap();
    assert!(stored(&url).await.is_empty());
    cluster.restart_coordinator().await;
    is_stored(&url, "data", second.revision).await;
    is_stored(&url, "other", third.revision).await;
    drop(cluster);
    drop(server);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_region_process_finds_the_goals_in_the_regions_own_etcd() {
    let place = Place::create().await.unwrap();
    let shape = Shape {
        region_processes: 1,
        agents: 1,
        region_extra: format!("region_goals = \"{}\"\n", place.url()),
        ..Shape::default()
    };
    let mut cluster = Cluster::start(shape).await;
    cluster.set_app(&plain_app("data")).await;
    let artifact = cluster.publish("data", &cluster.random_file("one", 1 << 20, 1)).await;
    let rollout = cluster.deploy("data", &artifact.name).await;
    is_stored(place.url(), "data", rollout.revision).await;
    // Nobody else is left to tell.
    cluster.coordinator.kill();
    cluster.regions[0].kill();
    let fresh = cluster.start_region(0, 1, &[], None);
    let file = fresh.data_dir().join("goals/data.goal");
    wait_for("the goal's file", async || file.exists().then_some(()).ok_or_else(|| fresh.log()))
        .await;
    // What nobody of the cluster signed is not taken from there.
    let store = EtcdStore::open(place.url(), CLUSTER).unwrap();
    let mut forged: Entry = store.list().await.unwrap().entries.remove(0);
    let mut goal = forged.signed.decode_unverified().unwrap();
    goal.app = AppName::new("forged").unwrap();
    forged.signed.goal = shoal_proto::codec::encode(&goal, 960).unwrap();
    store.put(&Entry::of(forged.signed).unwrap()).await.unwrap();
    wait_for("the forged goal to be refused", async || {
        if fresh.log().contains("refused a goal") { Ok(()) } else { Err(fresh.log()) }
    })
    .await;
    assert!(!fresh.data_dir().join("goals/forged.goal").exists());
    drop(fresh);
    drop(cluster);
    place.remove().await.unwrap();
}
