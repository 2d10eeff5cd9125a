//! An artifact's copies with real processes: lost and mended, a region away and back, deleted through a killed coordinator,
//! observed.

use std::fs;

use shoal_client::types::{Artifact, GcReport, ReplicationStatusPage};
use shoal_origin::{Bucket, Check};
use shoal_proto::state::{MachineState, RolloutStatus};

use crate::harness::{Cluster, Shape, plain_app, region_name, wait_for};

/// Rounds that nobody waits for.
const OFTEN: &str = "inspect_round_s = 0.5\ninspect_share = 1.0\nreplication_interval_s = 0.2\n\
                     copy_retry_s = 0.1\n";

fn bare(regions: usize, extra: &str) -> Shape {
    Shape {
        regions,
        agents: 0,
        region_processes: 0,
        coordinator_extra: extra.into(),
        ..Shape::default()
    }
}

fn objects(cluster: &Cluster, bucket: &str, artifact: &Artifact) -> std::path::PathBuf {
    let place = format!("bucket-{bucket}/artifacts/{}/{}", artifact.artifact, artifact.encoding);
    cluster.root().join(place)
}

fn opened(cluster: &Cluster, bucket: &str) -> Bucket {
    let place = cluster.root().join(format!("bucket-{bucket}"));
    Bucket::open(place.to_str().unwrap()).unwrap()
}

async fn whole(cluster: &Cluster, bucket: &str, artifact: &Artifact) {
    let opened = opened(cluster, bucket);
    wait_for(&format!("{} to be whole in {bucket}", artifact.name), async || {
        let verified = opened.verify(&artifact.artifact, &artifact.encoding).await;
        verified.map_err(|error| error.to_string())
    })
    .await;
}

async fn gone(cluster: &Cluster, bucket: &str, artifact: &Artifact) {
    let opened = opened(cluster, bucket);
    wait_for(&format!("{} to be gone from {bucket}", artifact.name), async || {
        match opened.check(&artifact.artifact, &artifact.encoding).await.unwrap() {
            Check::Absent => Ok(()),
            other => Err(other),
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_damaged_everywhere_is_mended_by_publishing_it_again() {
    let cluster = Cluster::start(bare(2, OFTEN)).await;
    cluster.set_app(&plain_app("data")).await;
    let file = cluster.random_file("one", 70 << 20, 1);
    let artifact = cluster.publish("data", &file).await;
    // One part is lost, another one wrong.
    for bucket in ["r1", "r2", "main"] {
        let place = objects(&cluster, bucket, &artifact);
        fs::remove_file(place.join("part-00000")).unwrap();
        let wrong = place.join("part-00001");
        let mut bytes = fs::read(&wrong).unwrap();
        bytes[5] ^= 1;
        fs::write(&wrong, bytes).unwrap();
    }
    wait_for("it to be said what to do", async || {
        let said = cluster.shoal(&["replication", &artifact.name]);
        if said.contains("publish it again") { Ok(()) } else { Err(said) }
    })
    .await;
    cluster.shoal(&["publish", file.to_str().unwrap(), "--app", "data"]);
    opened(&cluster, "main").verify(&artifact.artifact, &artifact.encoding).await.unwrap();
    cluster.deployable(&artifact.name).await;
    for bucket in ["r1", "r2"] {
        whole(&cluster, bucket, &artifact).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_object_is_told_and_mended() {
    let cluster = Cluster::start(bare(2, OFTEN)).await;
    cluster.set_app(&plain_app("data")).await;
    let artifact = cluster.publish("data", &cluster.random_file("one", 70 << 20, 1)).await;
    for (bucket, object, word) in [
        ("r1", "part-00001", "region r1"),
        ("main", "part-00000", "the main bucket lost part-00000"),
    ] {
        let place = objects(&cluster, bucket, &artifact).join(object);
        fs::remove_file(&place).unwrap();
        // Something that cannot be written over is in the way, so that it stays lost for now.
        fs::create_dir(&place).unwrap();
        fs::write(place.join("x"), b"x").unwrap();
        wait_for(&format!("{word} to be told"), async || {
            let said = cluster.shoal(&["artifacts"]);
            if said.contains(word) { Ok(()) } else { Err(said) }
        })
        .await;
        let refused = cluster.shoal_fails(&["deploy", "data", &artifact.name]);
        assert!(refused.contains(word) && refused.contains("it is being repaired"), "{refused}");
        let said = cluster.shoal(&["replication"]);
        assert!(said.contains(&artifact.name) && said.contains("not deployable"), "{said}");
        fs::remove_dir_all(&place).unwrap();
        cluster.deployable(&artifact.name).await;
        whole(&cluster, bucket, &artifact).await;
    }
    // Asked for, it is looked at whenever that is.
    let said = cluster.shoal(&["replication", &artifact.name, "--inspect", "--watch", "--json"]);
    let page: ReplicationStatusPage = serde_json::from_str(&said).unwrap();
    assert!(page.artifacts[0].deployable, "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_region_that_is_away_holds_up_nothing_and_catches_up() {
    let shape = Shape {
        regions: 2,
        region_processes: 1,
        agents: 2,
        coordinator_extra: OFTEN.into(),
        ..Shape::default()
    };
    let mut cluster = Cluster::start(shape).await;
    cluster.set_app(&plain_app("data")).await;
    let first = cluster.publish("data", &cluster.random_file("one", 1 << 20, 1)).await;
    let rollout = cluster.deploy("data", &first.name).await;
    cluster.rollout_succeeds(rollout.id).await;
    // The second region is gone: its process, and its bucket.
    let away = cluster.root().join("away");
    let listen = cluster.regions[1].address("data").await;
    cluster.regions[1].kill();
    fs::rename(cluster.bucket(1), &away).unwrap();
    fs::write(cluster.bucket(1), b"no bucket").unwrap();
    let publish = async |name: &str, seed| {
        let file = cluster.random_file(name, 1 << 20, seed);
        let said = cluster.shoal(&["publish", file.to_str().unwrap(), "--app", "data", "--json"]);
        let artifact: Artifact = serde_json::from_str(&said).unwrap();
        artifact
    };
    let missed = publish("two", 2).await;
    wait_for("r2 to hold it up", async || {
        let artifact = cluster.client.artifact(&missed.name).await.unwrap();
        let why = artifact.not_deployable_reason.unwrap_or_default();
        if why.contains("r2 (FAILED") && !why.contains("r1 (") { Ok(()) } else { Err(why) }
    })
    .await;
    let r2 = region_name(1);
    cluster.shoal(&["drain", &r2]);
    let newest = publish("three", 3).await;
    for artifact in [&missed, &newest] {
        cluster.deployable(&artifact.name).await;
    }
    let rollout = cluster.deploy("data", &newest.name).await;
    let rollout = cluster.rollout_ends(rollout.id).await;
    assert_eq!(rollout.status, RolloutStatus::Succeeded, "{rollout:?}");
    cluster.machine_is("m1", "data", MachineState::Active).await;
    assert!(cluster.current("m2", "data") == fs::read(cluster.root().join("one")).unwrap());
    // It comes back: its bucket with what it had, and its process.
    fs::remove_file(cluster.bucket(1)).unwrap();
    fs::rename(&away, cluster.bucket(1)).unwrap();
    cluster.shoal(&["undrain", &r2]);
    let back = cluster.start_region(1, 0, &[], Some(listen));
    cluster.regions[1] = back;
    for artifact in [&first, &missed, &newest] {
        whole(&cluster, &r2, artifact).await;
        cluster.deployable(&artifact.name).await;
    }
    let path = cluster.root().join("three");
    cluster
        .machine_reports("m2", "data", "the newest", |seen| {
            seen.report.artifact == newest.artifact && seen.report.state == MachineState::Active
        })
        .await;
    assert!(cluster.current("m2", "data") == fs::read(path).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_deleted_goes_though_the_coordinator_is_killed() {
    const ARTIFACTS: u64 = 12;
    let extra = "copy_owned_s = 1.0\n";
    let mut cluster = Cluster::start(bare(2, extra)).await;
    cluster.set_app(&plain_app("data")).await;
    let mut artifacts = vec![];
    for seed in 0..ARTIFACTS {
        let file = cluster.random_file("next", 1 << 20, seed);
        artifacts.push(cluster.publish("data", &file).await);
    }
    let newest = artifacts.pop().unwrap();
    let pinned = artifacts.remove(0);
    cluster.shoal(&["pin", &pinned.name, "--reason", "kept for the auditors"]);
    let said = cluster.shoal(&["gc", "--keep", "1", "--dry-run"]);
    assert!(said.contains("kept for the auditors") && said.contains("10 would go"), "{said}");
    let said = cluster.shoal(&["gc", "--keep", "1", "--json"]);
    let report: GcReport = serde_json::from_str(&said).unwrap();
    assert_eq!(report.apps.values().map(|app| app.goes.len()).sum::<usize>(), artifacts.len());
    // Killed as soon as some of it is gone, wherever it is then.
    wait_for("the first object to go", async || {
        let left = artifacts.iter().filter(|it| objects(&cluster, "r1", it).join("index").exists());
        if left.count() < artifacts.len() { Ok(()) } else { Err(()) }
    })
    .await;
    cluster.restart_coordinator().await;
    for artifact in &artifacts {
        for bucket in ["r1", "r2", "main"] {
            gone(&cluster, bucket, artifact).await;
        }
        let record = cluster.client.artifact(&artifact.name).await.unwrap();
        assert_eq!(record.deleted.unwrap().by, "tester");
    }
    let refused = cluster.shoal_fails(&["deploy", "data", &artifacts[0].name]);
    assert!(refused.contains("deleted") && refused.contains("shoal publish"), "{refused}");
    for kept in [&newest, &pinned] {
        for bucket in ["r1", "r2", "main"] {
            whole(&cluster, bucket, kept).await;
        }
    }
    assert!(cluster.shoal(&["pins"]).contains(&pinned.name));
    assert!(cluster.shoal(&["unpin", &pinned.name]).contains("nothing is pinned"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stores_own_replication_is_observed() {
    let extra = "replication = \"observe\"\nobserve_interval_s = 0.2\n";
    let cluster = Cluster::start(bare(1, extra)).await;
    cluster.set_app(&plain_app("data")).await;
    let file = cluster.random_file("one", 70 << 20, 1);
    let said = cluster.shoal(&["publish", file.to_str().unwrap(), "--app", "data", "--json"]);
    let artifact: Artifact = serde_json::from_str(&said).unwrap();
    let refused = wait_for("it to be refused for that reason", async || {
        let refused = cluster.shoal_fails(&["deploy", "data", &artifact.name]);
        if refused.contains("brought nothing yet") { Ok(refused) } else { Err(refused) }
    })
    .await;
    assert!(refused.contains("the store's own replication"), "{refused}");
    // As a store would bring it: in any order.
    let (from, to) = (objects(&cluster, "main", &artifact), objects(&cluster, "r1", &artifact));
    fs::create_dir_all(&to).unwrap();
    for object in ["part-00001", "index", "part-00000"] {
        fs::copy(from.join(object), to.join(".coming")).unwrap();
        fs::rename(to.join(".coming"), to.join(object)).unwrap();
    }
    cluster.deployable(&artifact.name).await;
    let said = cluster.shoal(&["replication", &artifact.name]);
    assert!(said.contains("observed") && said.contains("COMPLETE"), "{said}");
}
