//! Copies for as long as their artifact lives: lost and mended, observed, kept and deleted.

use std::{
    fs,
    path::{Path, PathBuf},
};

use shoal_client::{
    Client,
    types::{Artifact, GcReport, GcRequest, HaltRequest, PinRequest, PublishRequest},
};
use shoal_origin::{Bucket, Check};
use shoal_queue::{Queue, sqlite_url};

use crate::harness::*;

/// Rounds that nobody waits for.
const OFTEN: &str = "inspect_round_s = 0.4\ninspect_share = 1.0";

fn dir(cluster: &Cluster, bucket: &str, cut: &Cut) -> PathBuf {
    let place = format!("{bucket}/artifacts/{}/{}", cut.artifact, cut.encoding);
    cluster.path(&place)
}

/// An artifact of the app `web` that is in all buckets.
struct Published {
    cluster: Cluster,
    operator: Client,
    cut: Cut,
    name: String,
}

/// Starts a cluster and publishes an artifact of so many pieces.
async fn published(more: &str, pieces: usize) -> Published {
    let cluster = Cluster::start_with(more).await;
    let operator = cluster.operator();
    operator.set_app(&app("web", "")).await.unwrap();
    let cut = cut(1, pieces);
    let name = publish(&operator, "web", &cut).await.name;
    deployable(&operator, &name).await;
    Published { cluster, operator, cut, name }
}

/// Makes bytes of a file wrong.
fn flip(file: &Path, places: &[usize]) {
    let mut bytes = fs::read(file).unwrap();
    for place in places {
        bytes[*place] ^= 1;
    }
    fs::write(file, bytes).unwrap();
}

/// Takes an object away and puts something in its place that nobody can write over.
fn lose_and_block(cluster: &Cluster, bucket: &str, cut: &Cut, object: &str) -> PathBuf {
    let place = dir(cluster, bucket, cut).join(object);
    fs::remove_file(&place).unwrap();
    fs::create_dir(&place).unwrap();
    fs::write(place.join("x"), b"in the way").unwrap();
    place
}

async fn audited(cluster: &Cluster) -> Vec<(String, String, String)> {
    let queue = Queue::open(&sqlite_url(&cluster.path("data/shoal.sqlite"))).await.unwrap();
    let rows = queue.audit(1_000).await.unwrap();
    queue.close().await;
    rows.into_iter().map(|row| (row.who, row.what, row.detail)).collect()
}

async fn not_deployable(operator: &Client, name: &str, word: &str) -> Artifact {
    wait_for(&format!("{name} not to be deployable: {word}"), async || {
        let artifact = operator.artifact(name).await.unwrap();
        let why = artifact.not_deployable_reason.clone().unwrap_or_default();
        if why.contains(word) { Ok(artifact) } else { Err(artifact) }
    })
    .await
}

async fn gc(operator: &Client, dry_run: bool, keep: u32) -> GcReport {
    operator.gc(&GcRequest { dry_run, keep: Some(keep), app: None }).await.unwrap()
}

fn bucket(cluster: &Cluster, name: &str) -> Bucket {
    Bucket::open(cluster.path(name).to_str().unwrap()).unwrap()
}

async fn is_gone(cluster: &Cluster, name: &str, cut: &Cut) {
    let bucket = bucket(cluster, name);
    wait_for(&format!("the objects in {name} to be gone"), async || {
        match bucket.check(&cut.artifact, &cut.encoding).await.unwrap() {
            Check::Absent => Ok(()),
            other => Err(other),
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_bucket_lost_is_told_refused_mended_and_audited() {
    let Published { cluster, operator, cut, name } = published(OFTEN, 3).await;
    for (place, object, word) in [
        ("eu", "part-00000", "region eu"),
        ("us", "index", "region us"),
        ("main", "part-00000", "the main bucket lost"),
        ("main", "index", "the main bucket lost"),
    ] {
        let block = lose_and_block(&cluster, place, &cut, object);
        let broken = not_deployable(&operator, &name, word).await;
        assert_eq!(broken.main_damage.is_some(), place == "main", "{broken:?}");
        let (status, code, text) = refusal(deploy(&operator, "web", &name).await);
        assert_eq!((status, code.as_str()), (409, "not_deployable"));
        assert!(text.contains(word) && text.contains("it is being repaired"), "{text}");
        let page = operator.replication(None, 10).await.unwrap();
        assert_eq!(page.artifacts[0].name, name, "it is among what is not whole");
        fs::remove_dir_all(&block).unwrap();
        deployable(&operator, &name).await;
        bucket(&cluster, place).verify(&cut.artifact, &cut.encoding).await.unwrap();
    }
    // Bytes that are wrong in their right length.
    for place in ["eu", "main"] {
        flip(&dir(&cluster, place, &cut).join("part-00000"), &[700_000]);
        let bucket = bucket(&cluster, place);
        wait_for("the wrong bytes to be mended", async || {
            bucket.verify(&cut.artifact, &cut.encoding).await.map_err(|error| error.to_string())
        })
        .await;
        deployable(&operator, &name).await;
    }
    deploy(&operator, "web", &name).await.unwrap();
    let audited = audited(&cluster).await;
    let count = |what: &str| {
        audited.iter().filter(|(who, of, _)| who == "coordinator" && of == what).count()
    };
    assert_eq!((count("copy.damaged"), count("copy.repaired")), (3, 3), "{audited:?}");
    assert_eq!((count("main.damaged"), count("main.repaired")), (3, 3), "{audited:?}");
    let metrics = cluster.metrics().await;
    for line in [
        "shoal_coordinator_repairs_total{where=\"main\"} 3",
        "shoal_coordinator_repairs_total{where=\"region\"} 3",
        "shoal_coordinator_inspections_total{bucket=\"eu\",result=\"damaged\"} 2",
    ] {
        assert!(metrics.contains(line), "{line}: {metrics}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_bucket_has_any_more_is_mended_by_who_publishes_it_again() {
    let Published { cluster, operator, cut, name } = published(OFTEN, 3).await;
    for place in ["eu", "us", "main"] {
        flip(&dir(&cluster, place, &cut).join("part-00000"), &[700_000]);
    }
    not_deployable(&operator, &name, "no region in service has it: publish it again").await;
    brought_again(&cluster, &cut).await;
    deployable(&operator, &name).await;
    for place in ["eu", "us", "main"] {
        bucket(&cluster, place).verify(&cut.artifact, &cut.encoding).await.unwrap();
    }
}

/// Sends an artifact again of which a part lies there with wrong bytes in its right length.
async fn brought_again(cluster: &Cluster, cut: &Cut) {
    let operator = cluster.operator();
    let (artifact, encoding) = (&cut.artifact, &cut.encoding);
    let index = || operator.upload(artifact, encoding, "index", cut.index.clone());
    let (status, code, text) = refusal(index().await);
    assert_eq!((status, code.as_str()), (409, "not_whole"), "{text}");
    assert!(text.contains("1 of 1 parts"), "{text}");
    let there = operator.upload_state(artifact, encoding).await.unwrap();
    assert!(!there.whole && there.parts.is_empty(), "{there:?}");
    operator.upload(artifact, encoding, "part-00000", cut.part.clone()).await.unwrap();
    index().await.unwrap();
    bucket(cluster, "main").verify(artifact, encoding).await.unwrap();
    assert!(operator.upload_state(artifact, encoding).await.unwrap().whole);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_lies_there_does_not_keep_wrong_bytes() {
    // Nobody inspects: only who sends the index has the parts looked at.
    let Published { cluster, cut, .. } = published("inspect_round_s = 3600", 3).await;
    flip(&dir(&cluster, "main", &cut).join("part-00000"), &[700_000]);
    brought_again(&cluster, &cut).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_cannot_repair_is_no_source_any_more() {
    // A sample of one piece finds what is wrong in all of them, and most likely not what is wrong in one of forty.
    let Published { cluster, operator, cut, name } =
        published("inspect_round_s = 3600\ninspect_share = 0.001", 40).await;
    let all: Vec<usize> = (0..40).map(|piece| piece * (cut.part.len() / 40)).collect();
    flip(&dir(&cluster, "main", &cut).join("part-00000"), &all);
    for region in ["eu", "us"] {
        flip(&dir(&cluster, region, &cut).join("part-00000"), &[700_000]);
    }
    operator.inspect(&name).await.unwrap();
    not_deployable(&operator, &name, "no region in service has it: publish it again").await;
    brought_again(&cluster, &cut).await;
    deployable(&operator, &name).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_inspection_that_is_asked_for_comes_at_once() {
    let cluster = Cluster::start().await;
    let operator = cluster.operator();
    operator.set_app(&app("web", "")).await.unwrap();
    let cut = cut(1, 2);
    let name = publish(&operator, "web", &cut).await.name;
    deployable(&operator, &name).await;
    let part = dir(&cluster, "us", &cut).join("part-00000");
    fs::remove_file(&part).unwrap();
    operator.inspect(&name).await.unwrap();
    wait_for("the part to be back", async || {
        fs::metadata(&part).map(drop).map_err(|error| error.to_string())
    })
    .await;
    assert_eq!(refusal(operator.inspect("web/none").await).0, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stores_own_replication_is_only_observed() {
    let observe = "replication = 'observe'\nobserve_interval_s = 0.05";
    let cluster = Cluster::start_with(observe).await;
    let operator = cluster.operator();
    operator.set_app(&app("web", "")).await.unwrap();
    let cut = cut(1, 4);
    let name = publish(&operator, "web", &cut).await.name;
    let waits = not_deployable(&operator, &name, "has brought nothing yet").await;
    assert!(waits.replication.values().all(|copy| copy.bytes_done == 0));
    let page = operator.replication(Some(&name), 1).await.unwrap();
    assert!(page.regions.values().all(|region| region.observed));
    // The store brings it, object by object, in an order of its own.
    for region in ["eu", "us"] {
        let (from, to) = (dir(&cluster, "main", &cut), dir(&cluster, region, &cut));
        fs::create_dir_all(&to).unwrap();
        fs::copy(from.join("index"), to.join("index")).unwrap();
        not_deployable(&operator, &name, "has not brought 1 parts yet").await;
        let mut part = fs::read(from.join("part-00000")).unwrap();
        part[5] ^= 1;
        fs::write(to.join("part-00000"), &part).unwrap();
        not_deployable(&operator, &name, "part 0 is not what its index says").await;
        part[5] ^= 1;
        fs::write(to.join("part-00000"), &part).unwrap();
    }
    let whole = deployable(&operator, &name).await;
    assert!(whole.replication.values().all(|copy| copy.bytes_done == cut.part.len() as u64));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nothing_needs_is_deleted_everywhere_and_stays_on_record() {
    let cluster = Cluster::start().await;
    let operator = cluster.operator();
    operator.set_app(&app("web", "")).await.unwrap();
    operator.set_app(&app("api", "")).await.unwrap();
    let none = refusal(operator.gc(&GcRequest::default()).await);
    assert!(none.0 == 409 && none.2.contains("--keep"), "{none:?}");
    let cuts: Vec<_> = (1..=4).map(|seed| cut(seed, 2)).collect();
    let mut names = vec![];
    for cut in &cuts {
        let name = publish(&operator, "web", cut).await.name;
        deployable(&operator, &name).await;
        names.push(name);
    }
    // The first one is pinned, the second one is also api's, and the third one runs.
    let pin = PinRequest { artifact: names[0].clone(), reason: Some("keep".into()) };
    operator.pin(&pin).await.unwrap();
    assert_eq!(operator.pins().await.unwrap()[0].by, "alice");
    let request = PublishRequest {
        app: "api".parse().unwrap(),
        artifact: cuts[1].artifact,
        encoding: cuts[1].encoding,
    };
    let shared = operator.publish(&request).await.unwrap().name;
    deploy(&operator, "web", &names[2]).await.unwrap();
    let request = GcRequest { app: Some("web".parse().unwrap()), keep: Some(1), dry_run: true };
    let would = operator.gc(&request).await.unwrap();
    let of = |report: &GcReport| -> Vec<String> {
        report.apps.values().flat_map(|app| &app.goes).map(|it| it.name.clone()).collect()
    };
    assert_eq!((of(&would), would.freed_bytes), (vec![names[1].clone()], 0));
    let web = &would.apps[&"web".parse().unwrap()];
    let why: Vec<_> = web.stays.iter().map(|it| it.why.as_str()).collect();
    assert!(why[0].contains("last 1") && why[1].contains("goal") && why[2].contains("pinned"));
    assert!(operator.artifact(&names[1]).await.unwrap().deleted.is_none(), "only looked");
    let went = operator.gc(&GcRequest { dry_run: false, ..request }).await.unwrap();
    assert_eq!(of(&went), of(&would));
    // Its objects are api's, and stay; with that name they go, everywhere.
    assert!(operator.artifact(&names[1]).await.unwrap().deleted.is_some());
    assert!(operator.artifact(&shared).await.unwrap().deployable);
    let went = gc(&operator, false, 0).await;
    let mut all = of(&went);
    all.sort();
    let mut want = vec![shared.clone(), names[3].clone()];
    want.sort();
    assert_eq!(all, want);
    assert_eq!(went.freed_bytes, (cuts[1].part.len() + cuts[3].part.len()) as u64);
    for place in ["eu", "us", "main"] {
        is_gone(&cluster, place, &cuts[1]).await;
        is_gone(&cluster, place, &cuts[3]).await;
        for kept in [&cuts[0], &cuts[2]] {
            bucket(&cluster, place).verify(&kept.artifact, &kept.encoding).await.unwrap();
        }
    }
    let (status, _, text) = refusal(deploy(&operator, "web", &names[3]).await);
    assert!(status == 409 && text.contains("deleted") && text.contains("shoal publish"), "{text}");
    assert_eq!(refusal(operator.inspect(&names[3]).await).0, 409);
    assert_eq!(operator.artifacts(None, 10).await.unwrap().len(), 5, "all are on record");
    // Made again, it is there again.
    let again = publish(&operator, "web", &cuts[3]).await;
    assert_eq!((&again.name, again.deleted.is_none()), (&names[3], true));
    deployable(&operator, &again.name).await;
    operator.unpin(&names[0]).await.unwrap();
    assert!(of(&gc(&operator, true, 1).await).contains(&names[0]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_region_that_was_away_is_cleared_when_it_is_back() {
    let cluster = Cluster::start_with("keep_builds = 1\nretention_interval_s = 0.1").await;
    let operator = cluster.operator();
    let us = "us".parse().unwrap();
    operator.set_app(&app("web", "")).await.unwrap();
    let (old, new) = (cut(1, 2), cut(2, 2));
    let name = publish(&operator, "web", &old).await.name;
    deployable(&operator, &name).await;
    operator.drain_region(&us, &HaltRequest::default()).await.unwrap();
    let newer = publish(&operator, "web", &new).await.name;
    // What is out of service holds up nothing.
    deployable(&operator, &newer).await;
    is_gone(&cluster, "main", &old).await;
    is_gone(&cluster, "eu", &old).await;
    bucket(&cluster, "us").verify(&old.artifact, &old.encoding).await.unwrap();
    operator.undrain_region(&us).await.unwrap();
    is_gone(&cluster, "us", &old).await;
    // And it gets what it missed.
    let us = bucket(&cluster, "us");
    wait_for("the new one to be in us", async || {
        us.verify(&new.artifact, &new.encoding).await.map_err(|error| error.to_string())
    })
    .await;
}

/// Publishes as the command does: what is gone at the end is uploaded again.
async fn publish_on(operator: &Client, cut: &Cut) -> Artifact {
    let app = "web".parse().unwrap();
    let request = PublishRequest { app, artifact: cut.artifact, encoding: cut.encoding };
    wait_for("it to be published", async || {
        let (artifact, encoding) = (&cut.artifact, &cut.encoding);
        // Each step may meet a removal, which says so.
        let state = operator.upload_state(artifact, encoding).await;
        if !state.map_err(|error| error.to_string())?.whole {
            let part = operator.upload(artifact, encoding, "part-00000", cut.part.clone()).await;
            part.map_err(|error| error.to_string())?;
            let index = operator.upload(artifact, encoding, "index", cut.index.clone()).await;
            index.map_err(|error| error.to_string())?;
        }
        operator.publish(&request).await.map_err(|error| error.to_string())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_made_at_the_moment_of_its_deletion_is_never_lost() {
    const ROUNDS: usize = 12;
    let cluster = Cluster::start().await;
    let operator = cluster.operator();
    operator.set_app(&app("web", "")).await.unwrap();
    operator.set_app(&app("api", "")).await.unwrap();
    let cut = cut(1, 8);
    let name = publish(&operator, "web", &cut).await.name;
    let worker = cluster.worker("w1");
    for round in 0..ROUNDS {
        // A job that has just uploaded the same, as a worker does, and is about to say so.
        build(&operator, "api").await;
        let (claimed, lease) = claim(&worker, 5).await.unwrap();
        let deletes = gc(&operator, false, 0);
        let finishes = async {
            wait_for("the job to end", async || {
                let main = bucket(&cluster, "main");
                let part = futures::stream::iter([Ok::<_, std::io::Error>(cut.part.clone())]);
                // Refused where it is there, which is as good.
                let _ = main.put_part(&cut.artifact, &cut.encoding, 0, None, part).await;
                let index = main.put_index(&cut.artifact, &cut.encoding, cut.index.clone()).await;
                index.map_err(|error| error.to_string())?;
                let ended = worker.finish(claimed.job.id, &succeeded(&lease, &cut)).await;
                ended.map_err(|error| error.to_string())
            })
            .await
        };
        let publishes = async {
            // Sometimes before, sometimes in the middle.
            for _ in 0..round {
                tokio::task::yield_now().await;
            }
            publish_on(&operator, &cut).await
        };
        let (_, job, _) = tokio::join!(deletes, finishes, publishes);
        // Whatever the order was: a name that lives has its objects, everywhere.
        for name in [&name, &job.name] {
            let artifact = operator.artifact(name).await.unwrap();
            if artifact.deleted.is_some() {
                continue;
            }
            bucket(&cluster, "main").verify(&cut.artifact, &cut.encoding).await.unwrap();
            deployable(&operator, name).await;
            for region in ["eu", "us"] {
                bucket(&cluster, region).verify(&cut.artifact, &cut.encoding).await.unwrap();
            }
        }
    }
}
