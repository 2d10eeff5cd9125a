//! The queue with real workers: cancelled, drained, restarted.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use shoal_client::types::{BuildRequest, Job, LeaseRef};
use shoal_proto::{
    AppName, CommitSha,
    state::{JobStatus, WorkerState},
};
use shoal_test_postgres::Database;

use crate::harness::{Cluster, Repo, Shape, client, script_app, wait_for};

/// In how long a cancelled job is CANCELLED, and everything that it started gone.
const CANCEL_MAX: Duration = Duration::from_secs(5);

/// No heartbeat and no reaper within the time of a test: what happens, happens without them.
const NO_HEARTBEATS: &str = "heartbeat_s = 600.0\n";

fn shape(workers: usize, extra: &str) -> Shape {
    Shape {
        agents: 0,
        region_processes: 0,
        workers,
        coordinator_extra: format!("{NO_HEARTBEATS}{extra}"),
        ..Shape::default()
    }
}

async fn build(cluster: &Cluster, commit: &CommitSha) -> Job {
    let request = BuildRequest::new(AppName::new("web").unwrap(), commit.clone());
    cluster.client.build(&request).await.unwrap()
}

async fn job_is(cluster: &Cluster, id: i64, what: &str, is: impl Fn(&Job) -> bool) -> Job {
    wait_for(&format!("job {id} to be {what}"), async || {
        let job = cluster.client.job(id).await.map_err(|error| error.to_string())?;
        if is(&job) { Ok(job) } else { Err(format!("{job:?}")) }
    })
    .await
}

/// The processes that name this cluster's directory in their environment and run `sleep 98765`.
fn sleepers(cluster: &Cluster) -> Vec<PathBuf> {
    let root = cluster.root().to_str().unwrap().as_bytes();
    let is_sleeper = |path: &Path| {
        let command = fs::read(path.join("cmdline")).unwrap_or_default();
        let environment = fs::read(path.join("environ")).unwrap_or_default();
        command.starts_with(b"sleep\x0098765\0")
            && environment.windows(root.len()).any(|window| window == root)
    };
    let entries = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    entries.filter(|path| is_sleeper(path)).collect()
}

/// A build of three processes that stay: one its shell's, one in the background, one in a session of its own.
fn commit_that_stays(repo: &Repo, what: &str) -> CommitSha {
    repo.commit(&format!(
        "# {what}\ntrap '' TERM\nsleep 98765 &\nsetsid sleep 98765 &\necho started\nsleep 98765\n"
    ))
}

async fn all_sleep(cluster: &Cluster) {
    wait_for("the build's processes", async || match sleepers(cluster).len() {
        3 => Ok(()),
        other => Err(other),
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_build_is_gone_within_seconds_through_any_coordinator() {
    let database = Database::create().await.unwrap();
    let shape =
        Shape { coordinators: 2, ..shape(1, &format!("database = \"{}\"\n", database.url())) };
    let cluster = Cluster::start(shape).await;
    let repo = Repo::new(cluster.root().join("repo"));
    cluster.set_app(&script_app("web", &repo.path)).await;
    let operator = cluster.root().join("operator");
    // The worker asks the first; either may be told.
    let coordinators = [client(&operator, cluster.api), client(&operator, cluster.other_apis[0])];
    for (round, tells) in coordinators.iter().enumerate() {
        let commit = commit_that_stays(&repo, &round.to_string());
        let job = build(&cluster, &commit).await;
        all_sleep(&cluster).await;
        let log = async || cluster.client.job_log(job.id, 0).await.map_err(|e| e.to_string());
        wait_for("its log", async || match log().await {
            Ok(log) if log.starts_with(b"started") => Ok(()),
            other => Err(other),
        })
        .await;
        let asked = Instant::now();
        tells.cancel_job(job.id).await.unwrap();
        let ended = cluster.job_ends(job.id).await;
        let took = asked.elapsed();
        assert_eq!(ended.status, JobStatus::Cancelled, "{ended:?}");
        assert_eq!(ended.reason.as_deref(), Some("cancelled by tester"));
        assert!(sleepers(&cluster).is_empty(), "a process of the build is left");
        assert!(took < CANCEL_MAX, "{took:?}");
        println!("cancelled, and its processes gone, after {took:?}");
        let attempt = &ended.attempts[0];
        assert_eq!(attempt.outcome.as_deref(), Some("cancelled"), "{attempt:?}");
        // Whoever says otherwise is not heard.
        let stale = LeaseRef { attempt: 1, lease: "0".repeat(32) };
        let dir = cluster.root().join("w1/identity");
        assert!(client(&dir, cluster.api).heartbeat(job.id, &stale).await.is_err());
    }
    // The worker is well after that.
    let job = build(&cluster, &repo.commit_version("fine")).await;
    assert_eq!(cluster.job_ends(job.id).await.status, JobStatus::Succeeded);
    drop(cluster);
    database.remove().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_worker_finishes_its_build_and_takes_no_other() {
    let cluster = Cluster::start(shape(1, "")).await;
    let repo = Repo::new(cluster.root().join("repo"));
    cluster.set_app(&script_app("web", &repo.path)).await;
    let go = cluster.root().join("go");
    let waits = format!("while ! test -e {}; do sleep 0.05; done\n", go.display());
    let slow = repo.commit(&format!("{waits}mkdir -p out\necho slow > out/app\n"));
    let job = build(&cluster, &slow).await;
    job_is(&cluster, job.id, "RUNNING", |job| job.status == JobStatus::Running).await;
    let next = build(&cluster, &repo.commit_version("next")).await;

    let unknown = cluster.shoal_fails(&["drain", "--worker", "w9"]);
    assert!(unknown.contains("no worker 'w9'"), "{unknown}");
    let text = cluster.shoal(&["drain", "--worker", "w1", "--reason", "new disk", "--json"]);
    let drained: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&drained["state"], &drained["jobs"][0]), (&"DRAINING".into(), &job.id.into()));
    assert_eq!(drained["drain"]["reason"], "new disk");
    fs::write(&go, "").unwrap();
    assert_eq!(cluster.job_ends(job.id).await.status, JobStatus::Succeeded);
    // It has asked since, more than once, and was given nothing.
    let seen = cluster.client.workers().await.unwrap()[0].last_seen_at_ms;
    wait_for("it to ask again", async || {
        let workers = cluster.client.workers().await.unwrap();
        if workers[0].last_seen_at_ms > seen { Ok(()) } else { Err(workers[0].last_seen_at_ms) }
    })
    .await;
    assert_eq!(cluster.client.workers().await.unwrap()[0].state, WorkerState::Drained);
    assert_eq!(cluster.client.job(next.id).await.unwrap().status, JobStatus::Queued);
    let list = cluster.shoal(&["workers"]);
    assert!(list.contains("DRAINED") && list.contains("by tester: new disk"), "{list}");
    cluster.shoal(&["undrain", "--worker", "w1"]);
    assert_eq!(cluster.job_ends(next.id).await.status, JobStatus::Succeeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_killed_and_started_again_loses_its_build_at_once() {
    let mut cluster = Cluster::start(shape(1, "")).await;
    let repo = Repo::new(cluster.root().join("repo"));
    cluster.set_app(&script_app("web", &repo.path)).await;
    // The first attempt stays; the second one finds the mark of the first, and ends.
    let mark = cluster.root().join("mark");
    fs::create_dir(&mark).unwrap();
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    fs::set_permissions(&mark, open).unwrap();
    let commit = repo.commit(&format!(
        "mkdir -p out; echo built > out/app\ntest -e {0}/first && exit 0\ntouch {0}/first\n\
         setsid sleep 98765 &\nsleep 98765 &\nsleep 98765\n",
        mark.display()
    ));
    let job = build(&cluster, &commit).await;
    all_sleep(&cluster).await;
    let before = cluster.client.workers().await.unwrap().remove(0);
    assert_eq!((before.state, &before.jobs), (WorkerState::Busy, &vec![job.id]));
    cluster.workers[0].kill();
    cluster.workers[0] = cluster.start_worker(0);
    // Without a heartbeat missed: the reaper would come in half an hour.
    let ended = cluster.job_ends(job.id).await;
    assert_eq!((ended.status, ended.attempt), (JobStatus::Succeeded, 2), "{ended:?}");
    assert_eq!(ended.attempts[0].outcome.as_deref(), Some("lost"));
    assert_eq!(ended.attempts[0].reason.as_deref(), Some("worker w1 was restarted"));
    assert_ne!(ended.attempts[0].incarnation, ended.attempts[1].incarnation);
    assert!(sleepers(&cluster).is_empty(), "the first attempt's processes are left");
    let after = cluster.client.workers().await.unwrap().remove(0);
    assert_ne!(after.incarnation, before.incarnation);
    let shown = cluster.shoal(&["job", &job.id.to_string()]);
    assert!(shown.contains("on w1: worker w1 was restarted"), "{shown}");
    assert!(shown.contains("succeeded after"), "{shown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_queue_opens_for_the_urgent_first() {
    let cluster = Cluster::start(shape(1, "")).await;
    let repo = Repo::new(cluster.root().join("repo"));
    cluster.set_app(&script_app("web", &repo.path)).await;
    let text = cluster.shoal(&["queue", "pause", "--reason", "the mirror is down"]);
    assert!(text.contains("paused") && text.contains("by tester: the mirror is down"), "{text}");
    let asked = |commit: &CommitSha, priority: &str| {
        let text =
            cluster.shoal(&["build", "web", commit.as_str(), "--priority", priority, "--json"]);
        let job: serde_json::Value = serde_json::from_str(&text).unwrap();
        (job["id"].as_i64().unwrap(), job["joined"].as_bool().unwrap())
    };
    let commits = ["low", "normal", "high", "urgent"].map(|version| repo.commit_version(version));
    let (low, _) = asked(&commits[0], "low");
    let (normal, _) = asked(&commits[1], "normal");
    let (high, _) = asked(&commits[2], "high");
    let (urgent, _) = asked(&commits[3], "urgent");
    assert_eq!(asked(&commits[0], "urgent"), (low, true), "raised above what came later");
    let again = cluster.shoal(&["build", "web", commits[1].as_str()]);
    assert!(again.contains("it was there already"), "{again}");
    let text = cluster.shoal(&["queue", "status", "--json"]);
    let status: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(status["waiting"]["urgent"]["jobs"], 2);
    assert_eq!(status["paused"]["reason"], "the mirror is down");
    assert_eq!(status["running"], 0);
    assert!(cluster.shoal(&["queue", "resume"]).contains("open"));
    let mut started = vec![];
    for id in [low, normal, high, urgent] {
        let job = cluster.job_ends(id).await;
        assert_eq!(job.status, JobStatus::Succeeded, "{job:?}");
        started.push((job.started_at_ms, id));
    }
    started.sort_unstable();
    let order: Vec<_> = started.into_iter().map(|(_, id)| id).collect();
    assert_eq!(order, [low, urgent, high, normal]);
    let wrong = cluster.shoal_fails(&["cancel", &low.to_string()]);
    assert!(wrong.contains("SUCCEEDED"), "{wrong}");
}
