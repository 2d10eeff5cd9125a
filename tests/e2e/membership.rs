//! Whose word counts.

use std::fs;

use shoal_pki::{GoalSigner, Role};
use shoal_proto::state::MachineState;

use crate::harness::{Cluster, Keys, Shape, client, plain_app, wait_for};

#[tokio::test(flavor = "multi_thread")]
async fn a_goal_signed_with_another_key_is_followed_by_nobody() {
    let mut cluster = Cluster::start(Shape { agents: 1, ..Shape::default() }).await;
    cluster.set_app(&plain_app("data")).await;
    let good = cluster.publish("data", &cluster.random_file("good", 1 << 20, 1)).await;
    let bad = cluster.publish("data", &cluster.random_file("bad", 1 << 20, 2)).await;
    let rollout = cluster.deploy("data", &good.name).await;
    cluster.rollout_succeeds(rollout.id).await;
    // A coordinator whose goal key and trust were exchanged: the number is right, the key is not.
    let goal_key = cluster.root().join("coordinator/goal.key");
    let trust = cluster.root().join("coordinator/identity/trust.bin");
    let right = (fs::read(&goal_key).unwrap(), fs::read(&trust).unwrap());
    let forger = GoalSigner::create(1).unwrap();
    fs::write(&goal_key, forger.to_pem().unwrap()).unwrap();
    fs::write(&trust, cluster.keys.trust_with(&forger)).unwrap();
    cluster.restart_coordinator().await;
    cluster.deploy("data", &bad.name).await;
    wait_for("the region processes to refuse it", async || {
        let refused = cluster.regions.iter().all(|region| region.log().contains("refused a goal"));
        if refused { Ok(()) } else { Err("not refused yet") }
    })
    .await;
    // With the right key again, the next goal is followed: the agent never took the forged one.
    fs::write(&goal_key, right.0).unwrap();
    fs::write(&trust, right.1).unwrap();
    cluster.restart_coordinator().await;
    let rollout = cluster.deploy("data", &good.name).await;
    cluster.rollout_succeeds(rollout.id).await;
    let forged = bad.artifact.to_string();
    assert!(!cluster.agents[0].data_dir().join("store/artifacts").join(forged).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_of_another_ca_gets_nothing() {
    let mut cluster = Cluster::start(Shape { agents: 1, ..Shape::default() }).await;
    cluster.set_app(&plain_app("data")).await;
    let artifact = cluster.publish("data", &cluster.random_file("file", 1 << 20, 1)).await;
    let ours = std::mem::replace(&mut cluster.keys, Keys::new("test"));
    let mut stranger = cluster.start_agent("m2", "").await;
    cluster.keys = ours;
    let rollout = cluster.deploy("data", &artifact.name).await;
    cluster.rollout_succeeds(rollout.id).await;
    wait_for("the stranger to be refused", async || {
        let log = stranger.log();
        if log.contains("no connection to the region process") { Ok(()) } else { Err(log) }
    })
    .await;
    let known = cluster.client.machines(None, None).await.unwrap();
    assert_eq!(known.len(), 1, "{known:?}");
    assert!(!cluster.current_path("m2", "data").exists());
    assert!(stranger.ended().is_none(), "it goes on trying");
    cluster.machine_is("m1", "data", MachineState::Active).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_api_knows_its_callers_by_their_certificates() {
    let shape = Shape { agents: 0, region_processes: 0, ..Shape::default() };
    let cluster = Cluster::start(shape).await;
    // A machine's certificate is no operator's.
    let dir = cluster.root().join("an-agent");
    cluster.keys.issue(&dir, Role::Agent, "m9", Some("r1"));
    let error = client(&dir, cluster.api).set_app(&plain_app("data")).await.unwrap_err();
    assert_eq!(error.code(), Some("forbidden"), "{error}");
    // One of another cluster's CA does not get so far.
    let dir = cluster.root().join("a-stranger");
    Keys::new("test").issue(&dir, Role::Operator, "eve", None);
    fs::write(dir.join("trust.bin"), &cluster.keys.trust).unwrap();
    let error = client(&dir, cluster.api).apps().await.unwrap_err();
    assert!(error.is_transient(), "no connection: {error}");
}
