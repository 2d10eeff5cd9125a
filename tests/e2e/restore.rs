//! A database that was restored from an older backup: machines know newer goals than it does.

use std::{fs, path::PathBuf};

use shoal_client::{ClientError, types::DeployRequest};
use shoal_proto::{
    AppName, Revision,
    state::{MachineState, RolloutStatus},
};
use shoal_test_etcd::Place;
use shoal_test_postgres::Database;

use crate::{
    goals::{is_stored, runs},
    harness::{Cluster, Shape, plain_app, wait_for},
};

/// Where the coordinator's database is.
enum Engine {
    Sqlite,
    Postgres(Database),
}

impl Engine {
    /// The line of a coordinator's configuration.
    fn key(&self) -> String {
        match self {
            Self::Sqlite => String::new(),
            Self::Postgres(database) => format!("database = \"{}\"\n", database.url()),
        }
    }

    /// Makes a backup: of a file while nobody has it open, of a server while it is used.
    async fn back_up(&self, cluster: &mut Cluster) -> PathBuf {
        let backup = cluster.root().join("backup");
        match self {
            Self::Sqlite => {
                assert!(cluster.coordinator.stop().await.success());
                fs::copy(cluster.coordinator.data_dir().join("shoal.sqlite"), &backup).unwrap();
                cluster.restart_coordinator().await;
            }
            Self::Postgres(database) => database.dump(&backup).unwrap(),
        }
        backup
    }

    /// Puts a backup in the place of the database; its coordinator has stopped.
    async fn restore(&self, cluster: &Cluster, backup: &PathBuf) {
        match self {
            Self::Sqlite => {
                let data = cluster.coordinator.data_dir();
                for name in ["shoal.sqlite", "shoal.sqlite-wal", "shoal.sqlite-shm"] {
                    let _ = fs::remove_file(data.join(name));
                }
                fs::copy(backup, data.join("shoal.sqlite")).unwrap();
            }
            Self::Postgres(database) => database.restore(backup).await.unwrap(),
        }
    }
}

/// Deploys once that is possible, and waits until every machine runs it and the rollout has said so.
async fn deployed(cluster: &Cluster, request: &DeployRequest, wanted: Revision) {
    let rollout = wait_for("a goal that can be set", async || {
        cluster.client.deploy(request).await.map_err(|error| error.to_string())
    })
    .await;
    assert_eq!(rollout.revision, wanted);
    let rollout = cluster.rollout_ends(rollout.id).await;
    assert_eq!(rollout.status, RolloutStatus::Succeeded, "{rollout:?}");
    let active = rollout.regions.values().map(|region| &region.states);
    let active: u64 = active.filter_map(|states| states.get(&MachineState::Active)).sum();
    assert_eq!(active, cluster.agents.len() as u64, "{rollout:?}");
    for agent in &cluster.agents {
        let seen = cluster.machine_is(&agent.name, "data", MachineState::Active).await;
        assert_eq!(seen.report.revision, wanted, "{}", agent.name);
    }
}

/// `etcd` is where the goals are beside the database.
async fn machines_follow_again(engine: &Engine, etcd: Option<&Place>) {
    let goals = etcd.map(|place| format!("goals = \"{}\"\n", place.url())).unwrap_or_default();
    let coordinator_extra = format!("recover_settle_s = 6.0\n{goals}{}", engine.key());
    let stored = async |revision| {
        if let Some(place) = etcd {
            is_stored(place.url(), "data", revision).await;
        }
    };
    let mut cluster =
        Cluster::start(Shape { coordinator_extra, agents: 2, ..Shape::default() }).await;
    cluster.set_app(&plain_app("data")).await;
    let (one, two) =
        (cluster.random_file("one", 1 << 20, 1), cluster.random_file("two", 1 << 20, 2));
    let first = cluster.publish("data", &one).await;
    let second = cluster.publish("data", &two).await;
    let rollout = cluster.deploy("data", &first.name).await;
    cluster.rollout_succeeds(rollout.id).await;
    // A backup, and what happens after it.
    let backup = engine.back_up(&mut cluster).await;
    for _ in 0..3 {
        let rollout = cluster.deploy("data", &second.name).await;
        cluster.rollout_succeeds(rollout.id).await;
    }
    runs(&cluster, &two).await;
    stored(Revision { epoch: 1, number: 4 }).await;

    assert!(cluster.coordinator.stop().await.success());
    engine.restore(&cluster, &backup).await;
    // Without a recovery it says what is wrong, where it can see it.
    cluster.restart_coordinator().await;
    if etcd.is_some() {
        wait_for("the coordinator to notice", async || {
            let log = cluster.coordinator.log();
            if log.contains("--recover") && log.contains("1.4") { Ok(()) } else { Err(log) }
        })
        .await;
    }
    cluster.restart_coordinator_with("--recover").await;
    let request = |artifact: &str| DeployRequest {
        app: AppName::new("data").unwrap(),
        artifact: artifact.into(),
    };
    match cluster.client.deploy(&request(&first.name)).await {
        Err(ClientError::Refused { message, .. }) => {
            assert!(message.contains("recovers"), "{message}");
        }
        other => panic!("not before the regions have told: {other:?}"),
    }
    let revision = Revision { epoch: 2, number: 2 };
    deployed(&cluster, &request(&first.name), revision).await;
    runs(&cluster, &one).await;
    stored(revision).await;
    // From then on it needs no recovery.
    cluster.restart_coordinator_with("").await;
    let revision = Revision { epoch: 2, number: 3 };
    deployed(&cluster, &request(&second.name), revision).await;
    runs(&cluster, &two).await;
    stored(revision).await;

    // And restored once more: the backup is of the first epoch, and machines know the second.
    assert!(cluster.coordinator.stop().await.success());
    engine.restore(&cluster, &backup).await;
    cluster.restart_coordinator_with("--recover").await;
    let revision = Revision { epoch: 3, number: 2 };
    deployed(&cluster, &request(&first.name), revision).await;
    runs(&cluster, &one).await;
    stored(revision).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_restored_backup_machines_follow_again_with_recover() {
    let place = Place::create().await.unwrap();
    machines_follow_again(&Engine::Sqlite, Some(&place)).await;
    place.remove().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_restored_dump_of_postgresql_machines_follow_again_with_recover() {
    let engine = Engine::Postgres(Database::create().await.unwrap());
    // Nobody but the regions knows what is newer.
    machines_follow_again(&engine, None).await;
    let Engine::Postgres(database) = engine else { return };
    database.remove().await.unwrap();
}
