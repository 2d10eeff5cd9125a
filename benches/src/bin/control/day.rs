//! A day's builds and deployments, one after the other as fast as they go.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use serde::Serialize;
use shoal_client::{
    Client, ClientError,
    types::{
        BuildRequest, ClaimRequest, ClaimedJob, DeployRequest, FinishRequest, LeaseRef, Outcome,
    },
};
use shoal_pki::Role;
use shoal_proto::{AppName, ArtifactId, EncodingId, state::JobStatus};
use tokio::task::JoinSet;

use crate::{
    times::{Spread, Times},
    world::{Shape, World, app},
};

/// How many apps there are.
const APPS: usize = 100;

/// How often an engineer looks at what they wait for.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// How long a worker's claim waits for a job.
const CLAIM_WAIT_S: u32 = 5;

/// How many errors are shown.
const ERRORS_SHOWN: usize = 5;

/// How much is done, and by how many.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Load {
    pub(crate) builds: usize,
    pub(crate) engineers: usize,
    pub(crate) workers: usize,
}

#[derive(Debug, Serialize)]
pub(crate) struct Report {
    load: Load,
    regions: usize,
    seconds: f64,
    coordinator_cpu_s: f64,
    /// Calls that failed, and what the coordinator refused, by route and status.
    errors: usize,
    first_errors: Vec<String>,
    refused: Vec<String>,
    /// By route; long polls count from when there was something to answer.
    calls: BTreeMap<&'static str, Spread>,
    /// From a job's row until it is given to a worker that had asked before.
    queue_worker_free: Spread,
}

impl Report {
    pub(crate) fn print(&self) {
        println!(
            "{0} builds and {0} deployments by {1} engineers and {2} workers, {3} regions: {4:.1} s, {5:.1} CPU s of the \
             coordinator, {6} errors",
            self.load.builds,
            self.load.engineers,
            self.load.workers,
            self.regions,
            self.seconds,
            self.coordinator_cpu_s,
            self.errors,
        );
        for error in self.first_errors.iter().chain(&self.refused) {
            println!("  {error}");
        }
        for (route, spread) in &self.calls {
            println!("  {route:<36} {spread}");
        }
        println!("  {:<36} {}", "queued, with a worker free", self.queue_worker_free);
    }
}

/// What all share.
struct Day {
    next: AtomicUsize,
    builds: usize,
    artifact: ArtifactId,
    encoding: EncodingId,
    errors: Mutex<Vec<String>>,
}

impl Day {
    fn failed(&self, what: &str, error: &ClientError) {
        let mut errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        errors.push(format!("{what}: {error}"));
    }

    /// Times a call; one that failed is counted.
    async fn timed<T>(
        &self,
        times: &mut Times,
        route: &'static str,
        call: impl Future<Output = Result<T, ClientError>>,
    ) -> Option<T> {
        let start = Instant::now();
        let answer = call.await;
        times.add(route, start.elapsed());
        answer.inspect_err(|error| self.failed(route, error)).ok()
    }
}

fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// Builds, waits until that may be deployed, deploys, and again.
async fn engineer(day: Arc<Day>, client: Client) -> anyhow::Result<Times> {
    let mut times = Times::default();
    loop {
        let number = day.next.fetch_add(1, Ordering::Relaxed);
        if number >= day.builds {
            return Ok(times);
        }
        let app = AppName::new(format!("app-{}", number % APPS))?;
        let request = BuildRequest::new(app.clone(), format!("{number:040x}").parse()?);
        let built = day.timed(&mut times, "POST /v1/jobs", client.build(&request)).await;
        let Some(job) = built else { continue };
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let now = day.timed(&mut times, "GET /v1/jobs/{job}", client.job(job.id)).await;
            if let Some(now) = now.filter(|now| now.status.is_terminal()) {
                ensure!(now.status == JobStatus::Succeeded, "a build failed: {now:?}");
                break;
            }
        }
        loop {
            let found = client.artifact(&job.name);
            let found = day.timed(&mut times, "GET /v1/artifact", found).await;
            if found.is_some_and(|found| found.deployable) {
                break;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        let request = DeployRequest { app: app.clone(), artifact: job.name };
        day.timed(&mut times, "POST /v1/deployments", client.deploy(&request)).await;
        day.timed(&mut times, "GET /v1/status?app", client.status(Some(&app))).await;
    }
}

/// Takes jobs, and ends each at once with an artifact that is there; returns the waits of jobs while it was free, too.
async fn worker(
    day: Arc<Day>,
    client: Client,
    over: tokio::sync::watch::Receiver<bool>,
) -> anyhow::Result<(Times, Vec<Duration>)> {
    let (mut times, mut waits) = (Times::default(), vec![]);
    let request =
        ClaimRequest { incarnation: "one".into(), host: "bench".into(), wait_s: CLAIM_WAIT_S };
    loop {
        if *over.borrow() {
            return Ok((times, waits));
        }
        let (asked_ms, start) = (now_ms(), Instant::now());
        let claimed = client.claim(&request).await;
        match claimed {
            Ok(Some(claimed)) => {
                let waited_ms = now_ms() - claimed.job.created_at_ms;
                if asked_ms < claimed.job.created_at_ms {
                    waits.push(Duration::from_millis(u64::try_from(waited_ms).unwrap_or_default()));
                } else {
                    times.add("POST /v1/worker/claim", start.elapsed());
                }
                work(&day, &client, &mut times, claimed).await;
            }
            Ok(None) => {}
            Err(error) => day.failed("POST /v1/worker/claim", &error),
        }
    }
}

async fn work(day: &Day, client: &Client, times: &mut Times, claimed: ClaimedJob) {
    let (job, lease) = (claimed.job.id, claimed.lease);
    let lease = LeaseRef { attempt: claimed.job.attempt, lease };
    let log = client.append_log(job, &lease, 0, Bytes::from_static(b"built\n"));
    day.timed(times, "POST /v1/worker/jobs/{job}/log", log).await;
    let beat = client.heartbeat(job, &lease);
    day.timed(times, "POST /v1/worker/jobs/{job}/heartbeat", beat).await;
    let outcome = Outcome::Succeeded { artifact: day.artifact, encoding: day.encoding };
    let request = FinishRequest { lease, outcome };
    let finish = client.finish(job, &request);
    day.timed(times, "POST /v1/worker/jobs/{job}/finish", finish).await;
}

pub(crate) async fn measure(shape: Shape<'_>, load: Load) -> anyhow::Result<Report> {
    let mut world = World::start(Shape { region_processes: true, etcd: false, ..shape }).await?;
    let client = world.client("bench", Role::Operator, None)?;
    for at in 0..APPS {
        client.set_app(&app(&format!("app-{at}"))?).await?;
    }
    // Every build makes these bytes: what is measured is the control plane, not the buckets.
    let stored = world.publish(&client, "app-0").await?;
    let day = Arc::new(Day {
        next: AtomicUsize::new(0),
        builds: load.builds,
        artifact: stored.artifact,
        encoding: stored.encoding,
        errors: Mutex::default(),
    });
    let before_s = world.cpu_s("coordinator")?;
    let start = Instant::now();
    let (over, is_over) = tokio::sync::watch::channel(false);
    let mut workers = JoinSet::new();
    for at in 0..load.workers {
        let client = world.client(&format!("w{at}"), Role::Worker, None)?;
        workers.spawn(worker(day.clone(), client, is_over.clone()));
    }
    let mut engineers = JoinSet::new();
    for at in 0..load.engineers {
        let client = world.client(&format!("engineer-{at}"), Role::Operator, None)?;
        engineers.spawn(engineer(day.clone(), client));
    }
    let mut times = Times::default();
    while let Some(ended) = engineers.join_next().await {
        times.merge(ended??);
        world.check()?;
    }
    let seconds = start.elapsed().as_secs_f64();
    let coordinator_cpu_s = world.cpu_s("coordinator")? - before_s;
    over.send(true).context("no workers")?;
    let mut waits = vec![];
    while let Some(ended) = workers.join_next().await {
        let (worked, waited) = ended??;
        times.merge(worked);
        waits.extend(waited);
    }
    let refused = world.refused().await?;
    let errors = day.errors.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(Report {
        load,
        regions: world.regions.len(),
        seconds,
        coordinator_cpu_s,
        errors: errors.len(),
        first_errors: errors.iter().take(ERRORS_SHOWN).cloned().collect(),
        refused,
        calls: times.spreads(),
        queue_worker_free: Spread::of(waits),
    })
}
