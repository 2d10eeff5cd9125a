//! Two coordinators on one PostgreSQL: both serve, one has the duty, and it passes on when its holder dies.

use std::{
    fs,
    time::{Duration, Instant},
};

use shoal_client::{
    Client, EventQuery,
    types::{BuildRequest, DeployRequest},
};
use shoal_proto::{
    AppName,
    state::{JobStatus, MachineState, RolloutStatus},
};
use shoal_test_postgres::Database;

use crate::harness::{Cluster, Process, Repo, Shape, client, script_app, wait_for};

/// In how long the duty passes on.
const TAKEOVER_MAX: Duration = Duration::from_secs(10);

/// A metric of a coordinator without labels.
async fn metric(process: &mut Process, name: &str) -> i64 {
    let addr = process.address("metrics").await;
    let page = plain_get(addr).await;
    let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name} in {page}")).parse().unwrap()
}

/// The metrics page, which is plain HTTP.
pub async fn plain_get(addr: std::net::SocketAddr) -> String {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(addr).await.unwrap();
    let request = format!("GET /metrics HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).await.unwrap();
    page
}

async fn on_duty(process: &mut Process) -> bool {
    metric(process, "shoal_coordinator_on_duty").await == 1
}

async fn build(client: &Client, commit: &str) -> String {
    let request = BuildRequest::new(AppName::new("web").unwrap(), commit.parse().unwrap());
    client.build(&request).await.unwrap().name
}

/// Waits through one coordinator for what was begun through another one.
async fn deployable(client: &Client, name: &str) {
    wait_for(&format!("{name} to be deployable"), async || match client.artifact(name).await {
        Ok(artifact) if artifact.deployable => Ok(()),
        Ok(artifact) => Err(format!("{:?}", artifact.replication)),
        Err(error) => Err(error.to_string()),
    })
    .await;
}

async fn deploy(client: &Client, name: &str) -> i64 {
    let request = DeployRequest { app: AppName::new("web").unwrap(), artifact: name.into() };
    client.deploy(&request).await.unwrap().id
}

async fn succeeds(client: &Client, rollout: i64) {
    wait_for(&format!("rollout {rollout} to succeed"), async || {
        let rollout = client.rollout(rollout).await.map_err(|error| error.to_string())?;
        if rollout.status == RolloutStatus::Succeeded {
            Ok(())
        } else {
            Err(rollout.status.to_string())
        }
    })
    .await;
}

fn says(cluster: &Cluster, said: &str) {
    for agent in &cluster.agents {
        let version = agent.data_dir().join("run/web/version");
        assert_eq!(fs::read_to_string(version).unwrap().trim(), said);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_coordinators_serve_at_once_and_one_takes_over_from_the_other() {
    let database = Database::create().await.unwrap();
    let shape = Shape {
        agents: 2,
        workers: 1,
        coordinators: 2,
        coordinator_extra: format!(
            "database = \"{}\"\nmetrics_listen = \"127.0.0.1:0\"\nheartbeat_s = 1.0\n\
             reaper_interval_s = 0.5\n",
            database.url()
        ),
        ..Shape::default()
    };
    let mut cluster = Cluster::start(shape).await;
    let one = client(&cluster.root().join("operator"), cluster.api);
    let two = client(&cluster.root().join("operator"), cluster.other_apis[0]);
    let repo = Repo::new(cluster.root().join("repo"));
    cluster.set_app(&script_app("web", &repo.path)).await;

    // Asked for here, seen and deployed there; and the other way round.
    for (here, there, version) in [(&one, &two, "first"), (&two, &one, "second")] {
        let name = build(here, repo.commit_version(version).as_str()).await;
        deployable(there, &name).await;
        let rollout = deploy(there, &name).await;
        succeeds(here, rollout).await;
        says(&cluster, &format!("{version} web"));
    }

    // One of them has the duty; it is killed in the middle of a build and of a rollout.
    let holders = [on_duty(&mut cluster.coordinator).await, on_duty(&mut cluster.others[0]).await];
    assert_eq!(holders.iter().filter(|holds| **holds).count(), 1, "{holders:?}");
    let slow = repo.commit("sleep 4; mkdir -p out; printf '#!/bin/sh\\necho third > \"$SHOAL_RUN_DIR/version\"\\nexec sleep 100000\\n' > out/app\n");
    let name = build(&one, slow.as_str()).await;
    wait_for("the build to run", async || {
        let jobs = two.jobs(None, 100).await.map_err(|error| error.to_string())?;
        match jobs.iter().find(|job| job.name == name) {
            Some(job) if job.status == JobStatus::Running => Ok(()),
            job => Err(format!("{job:?}")),
        }
    })
    .await;
    let (holder, other, left) = if holders[0] {
        (&mut cluster.coordinator, &mut cluster.others[0], two)
    } else {
        (&mut cluster.others[0], &mut cluster.coordinator, one)
    };
    holder.kill();
    let killed = Instant::now();
    while !on_duty(other).await {
        assert!(killed.elapsed() < TAKEOVER_MAX, "the duty did not pass on within 10 s");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    println!("the duty passed on after {:.1} s", killed.elapsed().as_secs_f64());

    // Everything goes on through the one that is left.
    deployable(&left, &name).await;
    let rollout = deploy(&left, &name).await;
    succeeds(&left, rollout).await;
    says(&cluster, "third");
    let jobs = left.jobs(None, 100).await.unwrap();
    assert!(jobs.iter().all(|job| job.status == JobStatus::Succeeded), "{jobs:?}");
    // What happened is told without a gap, whoever did it and whoever numbered it.
    wait_for("all events", async || {
        let events = left.events(&EventQuery::default(), 1_000).await;
        let events = events.map_err(|error| error.to_string())?;
        let ids: Vec<_> = events.iter().rev().map(|event| event.id).collect();
        assert_eq!(ids, (1..=ids.len() as i64).collect::<Vec<_>>());
        let of = |kind: &str| events.iter().filter(|event| event.kind == kind).count();
        let ends = ["build:completed", "replication:completed", "deploy:completed"].map(of);
        if ends == [3; 3] { Ok(()) } else { Err(format!("{ends:?}")) }
    })
    .await;
    let machines = left.machines(None, None).await.unwrap();
    assert_eq!(machines.len(), 2);
    let state = |machine: &shoal_client::types::Machine| machine.apps[0].report.state;
    assert!(machines.iter().all(|machine| state(machine) == MachineState::Active));
    drop(cluster);
    database.remove().await.unwrap();
}
