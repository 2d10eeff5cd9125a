//! From a commit to every machine: builds good and bad, and what becomes of them.

use std::fs;

use shoal_client::types::{BuildRequest, Job};
use shoal_proto::{
    AppName,
    state::{JobStatus, MachineState, ReplicationStatus},
};

use crate::harness::{Cluster, Repo, Shape, script_app, wait_for};

async fn build(cluster: &Cluster, app: &str, commit: &str) -> Job {
    let app = AppName::new(app).unwrap();
    let request = BuildRequest::new(app, commit.parse().unwrap());
    cluster.client.build(&request).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_becomes_a_program_that_runs_on_every_machine_and_goes_back() {
    let shape = Shape { regions: 2, agents: 4, workers: 1, ..Shape::default() };
    let cluster = Cluster::start(shape).await;
    let repo = Repo::new(cluster.root().join("repo"));
    let first = repo.commit_version("one");
    let second = repo.commit_version("two");
    cluster.set_app(&script_app("web", &repo.path)).await;

    let mut rollouts = vec![];
    for (commit, said) in [(&first, "one web"), (&second, "two web")] {
        let job = build(&cluster, "web", commit.as_str()).await;
        assert_eq!(job.status, JobStatus::Queued);
        assert_eq!(job.name, format!("web/{}-{}", commit.short(), job.id));
        let job = cluster.job_ends(job.id).await;
        assert_eq!(job.status, JobStatus::Succeeded, "{job:?}");
        let artifact = cluster.deployable(&job.name).await;
        assert_eq!(Some(artifact.artifact), job.artifact);
        assert_eq!(artifact.replication.len(), 2);
        let complete = |status| status == ReplicationStatus::Complete;
        assert!(artifact.replication.values().all(|copy| complete(copy.status)));

        let rollout = cluster.deploy("web", &job.name).await;
        let rollout = cluster.rollout_succeeds(rollout.id).await;
        let active: u64 =
            rollout.regions.values().map(|region| region.states[&MachineState::Active]).sum();
        assert_eq!(active, 4);
        for agent in &cluster.agents {
            let version = agent.data_dir().join("run/web/version");
            assert_eq!(fs::read_to_string(version).unwrap().trim(), said);
            let bytes = cluster.current(&agent.name, "web");
            assert_eq!(*blake3::hash(&bytes).as_bytes(), artifact.artifact.0);
        }
        rollouts.push(rollout);
    }
    assert!(rollouts[1].revision > rollouts[0].revision);

    let back = cluster.shoal(&["rollback", "web", "--wait", "--json"]);
    assert!(back.contains(&rollouts[0].artifact.to_string()), "{back}");
    for agent in &cluster.agents {
        let version = agent.data_dir().join("run/web/version");
        assert_eq!(fs::read_to_string(version).unwrap().trim(), "one web");
    }
    let log = cluster.client.job_log(1, 0).await.unwrap();
    assert!(log.len() < 1 << 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn builds_that_fail_say_why() {
    let shape = Shape { agents: 0, region_processes: 0, workers: 1, ..Shape::default() };
    let cluster = Cluster::start(shape).await;
    let repo = Repo::new(cluster.root().join("repo"));
    let app = |name: &str| script_app(name, &repo.path);
    cluster.set_app(&app("web")).await;
    let mut hasty = app("hasty");
    hasty.build_timeout_s = 1;
    cluster.set_app(&hasty).await;
    let mut homeless = app("homeless");
    homeless.repository = cluster.root().join("nowhere").display().to_string();
    cluster.set_app(&homeless).await;

    let fails = repo.commit("echo before the end\nexit 7\n");
    let hangs = repo.commit("sleep 10000 &\nsleep 10000\n");
    let leaves_nothing = repo.commit("true\n");
    let escapes = repo.commit("mkdir -p out\nln -s /etc/passwd out/app\n");
    let fine = repo.commit_version("fine");
    let unknown = "0123456789abcdef0123456789abcdef01234567";

    let cases = [
        ("web", fails.as_str(), "7"),
        ("hasty", hangs.as_str(), "1 s"),
        ("web", leaves_nothing.as_str(), "out/app"),
        ("web", escapes.as_str(), "out/app"),
        ("web", unknown, unknown),
        ("homeless", fine.as_str(), "nowhere"),
    ];
    for (app, commit, reason) in cases {
        let job = build(&cluster, app, commit).await;
        let job = cluster.job_ends(job.id).await;
        assert_eq!(job.status, JobStatus::Failed, "{job:?}");
        let told = job.reason.as_deref().unwrap();
        assert!(told.contains(reason), "{told}");
        assert_eq!(told.lines().count(), 1, "{told}");
        assert!(job.artifact.is_none());
    }
    let log = cluster.client.job_log(1, 0).await.unwrap();
    assert!(String::from_utf8_lossy(&log).contains("before the end"));
    // The worker is well after all this, and nothing of the build that hung is left.
    let job = build(&cluster, "web", fine.as_str()).await;
    assert_eq!(cluster.job_ends(job.id).await.status, JobStatus::Succeeded);
    let sleeping = fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
        let root = cluster.root().to_str().unwrap().as_bytes();
        command.starts_with(b"sleep\x0010000\0")
            && environment.windows(root.len()).any(|w| w == root)
    });
    assert!(!sleeping, "a process of the build is left");

    let error = cluster.shoal_fails_with(2, &["build", "web", "not-a-sha"]);
    assert!(error.contains("40 hex digits"), "{error}");
    let error = cluster.shoal_fails(&["build", "nobody", fine.as_str()]);
    assert!(error.contains("nobody"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_of_a_killed_worker_runs_again_in_its_old_place() {
    let shape = Shape {
        agents: 0,
        region_processes: 0,
        workers: 1,
        coordinator_extra: "heartbeat_s = 0.3\nreaper_interval_s = 0.2\n".into(),
        ..Shape::default()
    };
    let mut cluster = Cluster::start(shape).await;
    let repo = Repo::new(cluster.root().join("repo"));
    // The build waits for a file, so that the kill comes in its middle.
    let go = cluster.root().join("go");
    let commit = repo.commit(&format!(
        "mkdir -p out\necho built > out/app\nwhile [ ! -e {} ]; do sleep 0.05; done\n",
        go.display()
    ));
    cluster.set_app(&script_app("web", &repo.path)).await;
    let job = build(&cluster, "web", commit.as_str()).await;
    let later = build(&cluster, "web", repo.commit_version("later").as_str()).await;
    wait_for("the build to run", async || {
        let job = cluster.client.job(job.id).await.map_err(|error| error.to_string())?;
        (job.status == JobStatus::Running).then_some(()).ok_or(format!("{job:?}"))
    })
    .await;
    cluster.workers[0].kill();
    wait_for("the job to be queued again", async || {
        let job = cluster.client.job(job.id).await.map_err(|error| error.to_string())?;
        (job.status == JobStatus::Queued).then_some(()).ok_or(format!("{job:?}"))
    })
    .await;
    fs::write(&go, "").unwrap();
    cluster.workers[0] = cluster.start_worker(0);
    let ended = cluster.job_ends(job.id).await;
    assert_eq!((ended.status, ended.attempt), (JobStatus::Succeeded, 2), "{ended:?}");
    assert_eq!(ended.created_at_ms, job.created_at_ms);
    assert_eq!(ended.attempts.len(), 2);
    assert!(ended.attempts[0].reason.is_some());
    let later = cluster.job_ends(later.id).await;
    assert!(later.started_at_ms >= ended.finished_at_ms, "the lost job kept its place");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_job_is_cancelled() {
    let shape = Shape {
        agents: 0,
        region_processes: 0,
        workers: 1,
        coordinator_extra: "heartbeat_s = 0.3\n".into(),
        ..Shape::default()
    };
    let cluster = Cluster::start(shape).await;
    let repo = Repo::new(cluster.root().join("repo"));
    let commit = repo.commit("echo begun\nsleep 10000\n");
    cluster.set_app(&script_app("web", &repo.path)).await;
    let job = build(&cluster, "web", commit.as_str()).await;
    wait_for("the build to run", async || {
        let log = cluster.client.job_log(job.id, 0).await.map_err(|error| error.to_string())?;
        let text = String::from_utf8_lossy(&log).into_owned();
        if text.contains("begun") { Ok(()) } else { Err(text) }
    })
    .await;
    cluster.client.cancel_job(job.id).await.unwrap();
    assert_eq!(cluster.job_ends(job.id).await.status, JobStatus::Cancelled);
}
