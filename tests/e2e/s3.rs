//! Buckets on a real S3 server: the coordinator and the worker may write, the region processes may read, and the
//! agents hold no credentials at all.

use std::{fs, process::Command};

use shoal_client::types::BuildRequest;
use shoal_pki::Role;
use shoal_proto::{
    AppName,
    peer::{StreamReply, StreamRequest, VERSIONS},
    region::{RegionReply, RegionRequest, SIGNED_LEASES_SINCE},
    state::{JobStatus, MachineState},
};
use shoal_test_peers::{Manner, Peer};
use shoal_test_s3::{BUCKET, Fault, Proxy, READER, Seen, Server, WRITER, environment};

use crate::{
    harness::{Cluster, Remote, Repo, SHOAL, Shape, plain_app, script_app, wait_for, walk},
    peers::setup,
};

/// Pieces of 1 MiB.
const SIZE: usize = 24 << 20;

/// A cluster on a bucket at this endpoint.
async fn cluster(endpoint: &str, workers: usize) -> Cluster {
    let remote = Remote {
        base: format!("s3://{BUCKET}/e2e"),
        writer: environment(endpoint, WRITER),
        reader: environment(endpoint, READER),
    };
    let agent_extra = "metrics_listen = \"127.0.0.1:0\"\n".to_string();
    let (worker_extra, remote) = (agent_extra.clone(), Some(remote));
    Cluster::start(Shape { workers, worker_extra, agent_extra, remote, ..Shape::default() }).await
}

/// Nothing that a cluster has written holds a secret.
fn assert_no_secrets(cluster: &Cluster) {
    for path in walk(cluster.root(), &|path| path.is_file()) {
        let Ok(bytes) = fs::read(&path) else { continue };
        let text = String::from_utf8_lossy(&bytes);
        for secret in
            [WRITER.0, WRITER.1, READER.0, READER.1, "X-Amz-Signature", "X-Amz-Credential"]
        {
            assert!(!text.contains(secret), "{} holds {secret}", path.display());
        }
    }
}

fn in_region(seen: &Seen) -> bool {
    seen.reads("/e2e/r1/") && seen.path.contains("/part-")
}

#[tokio::test(flavor = "multi_thread")]
async fn machines_without_credentials_get_what_is_deployed() {
    let server = Server::start().unwrap();
    let mut cluster = cluster(&server.endpoint(), 1).await;
    // Built by a worker, which puts it into the main bucket by itself.
    let repo = Repo::new(cluster.root().join("repo"));
    cluster.set_app(&script_app("web", &repo.path)).await;
    let request = BuildRequest::new(AppName::new("web").unwrap(), repo.commit_version("one"));
    let job = cluster.client.build(&request).await.unwrap();
    let job = cluster.job_ends(job.id).await;
    assert_eq!(job.status, JobStatus::Succeeded, "{job:?}");
    let built = cluster.deployable(&job.name).await;
    let rollout = cluster.deploy("web", &built.name).await;
    cluster.rollout_succeeds(rollout.id).await;

    // And something longer, which is read piece by piece.
    cluster.set_app(&plain_app("data")).await;
    let file = cluster.random_file("file", SIZE, 1);
    let artifact = cluster.publish("data", &file).await;
    let _ = server.take_seen();
    let rollout = cluster.deploy("data", &artifact.name).await;
    let rollout = cluster.rollout_succeeds(rollout.id).await;
    for agent in &mut cluster.agents {
        let current = fs::read(agent.data_dir().join("apps/data/current")).unwrap();
        assert!(current == fs::read(&file).unwrap(), "{}", agent.name);
        let variables = fs::read(format!("/proc/{}/environ", agent.pid())).unwrap();
        assert!(!String::from_utf8_lossy(&variables).contains("AWS_"), "it could not have read it");
    }
    // The server's own count: each piece about once, each by a URL and a range.
    let reads: Vec<_> = server.take_seen().into_iter().filter(in_region).collect();
    assert!(reads.iter().all(|seen| seen.is_presigned() && seen.range.is_some()), "{reads:?}");
    assert!(reads.iter().all(|seen| seen.status == 206), "{reads:?}");
    let bytes: u64 = reads.iter().map(|seen| seen.bytes).sum();
    let copies = bytes as f64 / artifact.encoded_bytes as f64;
    assert!((0.99..1.11).contains(&copies), "{copies} copies");
    let told = rollout.regions.values().next().unwrap().origin_copies;
    assert!((0.99..1.11).contains(&told), "{told} copies");
    assert_no_secrets(&cluster);

    // Without region processes nobody signs: a machine that comes later gets all of it from its neighbours.
    let late = cluster.start_agent("m4", "").await;
    cluster.agents.push(late);
    cluster.machines_known(4).await;
    cluster.machine_is("m4", "data", MachineState::Active).await;
    let neighbours = cluster.root().join("m4/data/neighbours.bin");
    wait_for("m4 to remember its neighbours", async || {
        if neighbours.exists() { Ok(()) } else { Err("no file") }
    })
    .await;
    for region in &mut cluster.regions {
        region.kill();
    }
    fs::remove_dir_all(cluster.root().join("m4/data/store")).unwrap();
    cluster.restart_agent(3).await;
    wait_for("m4 to have it again", async || match fs::read(cluster.current_path("m4", "data")) {
        Ok(bytes) if bytes == fs::read(&file).unwrap() => Ok(()),
        other => Err(other.map(|bytes| bytes.len())),
    })
    .await;
    assert!(server.take_seen().iter().all(|seen| !in_region(seen)));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_no_way_to_the_bucket_says_so() {
    let server = Server::start().unwrap();
    let proxy = Proxy::start(&server).unwrap();
    let cluster = cluster(&proxy.endpoint(), 0).await;
    cluster.set_app(&plain_app("data")).await;
    let file = cluster.random_file("file", 3 << 20, 2);
    let artifact = cluster.publish("data", &file).await;
    // No piece can be read: the bucket is away, though not its index.
    proxy.next(100_000, Fault::SlowDown, |method, path| method == "GET" && path.contains("part-"));
    cluster.deploy("data", &artifact.name).await;
    let seen = cluster
        .machine_reports("m1", "data", "waiting with a reason", |seen| {
            seen.report.reason.as_ref().is_some_and(|reason| reason.contains("503"))
        })
        .await;
    assert!(!seen.report.reason.unwrap().contains("X-Amz"));
    proxy.behave();
    // It is back: nothing has to be done.
    for name in ["m1", "m2", "m3"] {
        cluster.machine_is(name, "data", MachineState::Active).await;
    }
    assert_no_secrets(&cluster);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_goes_on_after_its_coordinator_was_killed_in_the_middle() {
    let server = Server::start().unwrap();
    let proxy = Proxy::start(&server).unwrap();
    let mut cluster = cluster(&proxy.endpoint(), 0).await;
    cluster.set_app(&plain_app("data")).await;
    let file = cluster.random_file("file", (64 << 20) + 100_000, 3);
    // The second part hangs on its way into the region.
    proxy.next(1, Fault::Hang, |method, path| {
        method == "PUT" && path.contains("/e2e/r1/") && path.contains("part-00001")
    });
    let published = cluster.shoal(&["publish", file.to_str().unwrap(), "--app", "data", "--json"]);
    let name = serde_json::from_str::<serde_json::Value>(&published).unwrap()["name"].to_string();
    let name = name.trim_matches('"');
    let completes = |seen: &Seen| {
        seen.method == "POST" && seen.path.contains("/r1/") && seen.query.contains("uploadId=")
    };
    wait_for("the first part to be there, and the second one to hang", async || {
        let done = server.take_seen().iter().any(completes);
        if done && proxy.left() == 0 { Ok(()) } else { Err((done, proxy.left())) }
    })
    .await;
    cluster.coordinator.kill();
    let _ = server.take_seen();
    cluster.restart_coordinator().await;
    let artifact = cluster.deployable(name).await;
    let written: Vec<_> = server
        .take_seen()
        .into_iter()
        .filter(|seen| seen.method != "GET" && seen.method != "HEAD")
        .map(|seen| seen.path)
        .collect();
    assert!(written.iter().any(|path| path.ends_with("part-00001")), "{written:?}");
    assert!(!written.iter().any(|path| path.contains("part-00000")), "not again: {written:?}");
    let rollout = cluster.deploy("data", &artifact.name).await;
    cluster.rollout_succeeds(rollout.id).await;
    assert_no_secrets(&cluster);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_goes_on_in_the_next_attempt_after_its_worker_was_killed_in_the_middle() {
    let server = Server::start().unwrap();
    let proxy = Proxy::start(&server).unwrap();
    let mut cluster = cluster(&proxy.endpoint(), 1).await;
    let repo = Repo::new(cluster.root().join("repo"));
    cluster.set_app(&script_app("web", &repo.path)).await;
    // Two parts, of what does not compress.
    let file = cluster.random_file("file", (64 << 20) + 100_000, 5);
    let commit = repo.commit(&format!("mkdir -p out\ncp {} out/app\n", file.display()));
    // The second part hangs on its way into the main bucket.
    let of_main =
        |part: &'static str| move |path: &str| path.contains("/e2e/main/") && path.contains(part);
    let second = of_main("part-00001");
    proxy.next(1, Fault::Hang, move |method, path| method == "PUT" && second(path));
    let request = BuildRequest::new(AppName::new("web").unwrap(), commit);
    let job = cluster.client.build(&request).await.unwrap();
    let first = of_main("part-00000");
    let completes = |seen: &Seen| {
        seen.method == "POST" && first(&seen.path) && seen.query.contains("uploadId=")
    };
    wait_for("the first part to be there, and the second one to hang", async || {
        let done = server.take_seen().iter().any(completes);
        if done && proxy.left() == 0 { Ok(()) } else { Err((done, proxy.left())) }
    })
    .await;
    cluster.workers[0].kill();
    let _ = server.take_seen();
    cluster.workers[0] = cluster.start_worker(0);
    let job = cluster.job_ends(job.id).await;
    assert_eq!((job.status, job.attempt), (JobStatus::Succeeded, 2), "{job:?}");
    assert_eq!(job.attempts[0].outcome.as_deref(), Some("lost"), "{job:?}");
    let seen = server.take_seen().into_iter();
    let written: Vec<_> = seen
        .filter(|seen| seen.path.contains("/e2e/main/") && ["PUT", "POST"].contains(&&*seen.method))
        .map(|seen| seen.path)
        .collect();
    assert!(written.iter().any(|path| path.ends_with("part-00001")), "{written:?}");
    assert!(!written.iter().any(|path| path.contains("part-00000")), "not again: {written:?}");
    let sent = cluster.workers[0].metric("shoal_worker_uploaded_bytes_total").await;
    assert_eq!(sent, job_bytes(&cluster, &job.name).await - (64 << 20), "only what was missing");
}

/// The length of a build's stored pieces.
async fn job_bytes(cluster: &Cluster, name: &str) -> u64 {
    cluster.client.artifact(name).await.unwrap().encoded_bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_of_the_release_before_gets_leases_without_urls() {
    let server = Server::start().unwrap();
    let mut cluster = cluster(&server.endpoint(), 0).await;
    cluster.set_app(&plain_app("data")).await;
    let file = cluster.random_file("file", SIZE, 4);
    let artifact = cluster.publish("data", &file).await;
    let region = cluster.regions[0].address("data").await;
    let (id, encoding) = (artifact.artifact, artifact.encoding);
    let pieces_total = artifact.pieces;
    let (mut leased, mut peers) = (vec![], vec![]);
    for (name, versions) in [("m8", vec![SIGNED_LEASES_SINCE - 1]), ("m9", VERSIONS.to_vec())] {
        let mut peer = setup(&mut cluster, name, &artifact, Manner::Silent).await;
        peer.endpoint.versions = versions.clone();
        let peer = Peer::start(peer).unwrap();
        let connection = peer.endpoint.connect_any(region, Role::Region).await.unwrap();
        assert_eq!(connection.version(), versions.first().copied());
        let (block, lacking, want) = (0, u64::MAX, 2);
        let plain =
            RegionRequest::Lease { artifact: id, encoding, pieces_total, block, lacking, want };
        let signed = RegionRequest::SignedLease {
            artifact: id,
            encoding,
            pieces_total,
            block,
            lacking,
            want,
        };
        let old = versions == [SIGNED_LEASES_SINCE - 1];
        let request = StreamRequest::Region(if old { plain } else { signed });
        let (reply, _) = connection.request(request).await.unwrap();
        match reply {
            StreamReply::Region(RegionReply::Leased { first, count, .. }) if old => {
                leased.extend(first..first + count);
            }
            StreamReply::Region(RegionReply::SignedLeased { first, urls, duration_ms }) if !old => {
                assert!(
                    duration_ms > 0 && urls.iter().all(|url| url.0.contains("X-Amz-Signature"))
                );
                leased.extend((first..).take(urls.len()));
            }
            other => panic!("{other:?}"),
        }
        // Who is gone has no leases.
        peers.push(peer);
    }
    // Both kinds come out of one book.
    let all = leased.len();
    leased.sort_unstable();
    leased.dedup();
    assert!(leased.len() == all && all >= 2, "{leased:?} of {all}");
}

#[test]
fn the_demo_runs_on_s3() {
    let server = Server::start().unwrap();
    let run = |bucket: &str| {
        let mut command = Command::new(SHOAL);
        command.args(["demo", "--json", "--size", "8MiB", "--agents", "3", "--regions", "2"]);
        command.args(["--bucket", bucket]).envs(server.environment(WRITER));
        command.output().unwrap()
    };
    let output = run(&format!("s3://{BUCKET}/demo"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["ok"], true, "{report}");
    for (name, region) in report["regions"].as_object().unwrap() {
        let copies = region["origin_copies"].as_f64().unwrap();
        assert!((0.99..1.11).contains(&copies), "{name}: {copies}");
    }
    let seen = server.take_seen();
    assert!(seen.iter().any(|seen| seen.is_presigned()), "agents read by URLs");
    let parts = |place: &str| {
        // Below the prefix each demo has a name of its own.
        let written = |one: &&Seen| {
            one.method == "PUT" && one.path.contains("/demo/demo-") && one.path.contains(place)
        };
        seen.iter().filter(written).count()
    };
    for place in ["/main/", "/region-1/", "/region-2/"] {
        assert!(parts(place) > 0, "{place}");
    }
    // A mistake is told before anything is started.
    let wrong = run("s3://nowhere/demo");
    let line = String::from_utf8_lossy(&wrong.stderr).trim().to_string();
    assert!(!wrong.status.success() && line.contains("no bucket s3://nowhere/demo"), "{line}");
}
