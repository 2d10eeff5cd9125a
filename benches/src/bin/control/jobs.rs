//! Dequeue and complete through the API: what `queue` measures of the queue itself, with TLS, HTTP, JSON and the look into the
//! bucket around it.

use std::{collections::BTreeSet, sync::Arc, time::Instant};

use anyhow::{Context as _, ensure};
use serde::Serialize;
use shoal_client::{
    Client,
    types::{Artifact, BuildRequest, ClaimRequest, FinishRequest, LeaseRef, Outcome},
};
use shoal_pki::Role;
use shoal_proto::AppName;
use tokio::{sync::Barrier, task::JoinSet};

use crate::{
    times::{Spread, Times},
    world::{Shape, World, app},
};

/// How many ask for builds at once.
const ASKERS: usize = 16;

const CLAIM: &str = "POST /v1/worker/claim";
const FINISH: &str = "POST /v1/worker/jobs/{job}/finish";

#[derive(Debug, Serialize)]
pub(crate) struct Report {
    jobs: usize,
    workers: usize,
    regions: usize,
    jobs_per_s: f64,
    coordinator_cpu_ms_each: f64,
    run_twice: usize,
    claim: Spread,
    finish: Spread,
}

impl Report {
    pub(crate) fn print(&self) {
        println!(
            "{} jobs by {} workers through the API, {} regions: {:.0} jobs/s, {:.2} CPU ms of the coordinator each, {} run twice",
            self.jobs,
            self.workers,
            self.regions,
            self.jobs_per_s,
            self.coordinator_cpu_ms_each,
            self.run_twice,
        );
        println!("  {CLAIM:<36} {}", self.claim);
        println!("  {FINISH:<36} {}", self.finish);
    }
}

/// Asks for its share of the builds, each of another commit.
async fn ask(client: Arc<Client>, app: AppName, first: usize, jobs: usize) -> anyhow::Result<()> {
    for number in (first..jobs).step_by(ASKERS) {
        client.build(&BuildRequest::new(app.clone(), format!("{number:040x}").parse()?)).await?;
    }
    Ok(())
}

/// Takes jobs and ends each at once, until there is none; what the calls took, and the jobs.
async fn work(
    client: Client,
    stored: Arc<Artifact>,
    start: Arc<Barrier>,
) -> anyhow::Result<(Times, Vec<i64>)> {
    let (mut times, mut jobs) = (Times::default(), vec![]);
    let request = ClaimRequest { incarnation: "one".into(), host: "bench".into(), wait_s: 0 };
    start.wait().await;
    loop {
        let asked = Instant::now();
        let Some(claimed) = client.claim(&request).await? else { return Ok((times, jobs)) };
        times.add(CLAIM, asked.elapsed());
        let job = claimed.job.id;
        let lease = LeaseRef { attempt: claimed.job.attempt, lease: claimed.lease };
        let (artifact, encoding) = (stored.artifact, stored.encoding);
        let outcome = Outcome::Succeeded { artifact, encoding };
        let given = Instant::now();
        client.finish(job, &FinishRequest { lease, outcome }).await?;
        times.add(FINISH, given.elapsed());
        jobs.push(job);
    }
}

pub(crate) async fn measure(
    shape: Shape<'_>,
    jobs: usize,
    workers: usize,
) -> anyhow::Result<Report> {
    let mut world = World::start(shape).await?;
    let client = Arc::new(world.client("bench", Role::Operator, None)?);
    let name = AppName::new("web")?;
    client.set_app(&app("web")?).await?;
    // Every build makes these bytes.
    let stored = Arc::new(world.publish(&client, "web").await?);
    let mut askers = JoinSet::new();
    for at in 0..ASKERS {
        askers.spawn(ask(client.clone(), name.clone(), at, jobs));
    }
    while let Some(asked) = askers.join_next().await {
        asked??;
    }
    let start = Arc::new(Barrier::new(workers + 1));
    let mut running = JoinSet::new();
    for at in 0..workers {
        let client = world.client(&format!("w{at}"), Role::Worker, None)?;
        // Its connection stands when the clock starts.
        ensure!(client.heartbeat(0, &nothing()).await.is_err(), "job 0 has no lease");
        running.spawn(work(client, stored.clone(), start.clone()));
    }
    start.wait().await;
    let (before_s, begin) = (world.cpu_s("coordinator")?, Instant::now());
    let (mut times, mut done) = (Times::default(), vec![]);
    while let Some(worked) = running.join_next().await {
        let (took, ended) = worked??;
        times.merge(took);
        done.extend(ended);
    }
    let seconds = begin.elapsed().as_secs_f64();
    let cpu_s = world.cpu_s("coordinator")? - before_s;
    world.check()?;
    let distinct: BTreeSet<_> = done.iter().collect();
    ensure!(distinct.len() == jobs, "{} of {jobs} jobs were run", distinct.len());
    let mut spreads = times.spreads();
    let mut spread = |call| spreads.remove(call).context("no calls");
    Ok(Report {
        jobs,
        workers,
        regions: world.regions.len(),
        jobs_per_s: jobs as f64 / seconds,
        coordinator_cpu_ms_each: cpu_s * 1e3 / jobs as f64,
        run_twice: done.len() - distinct.len(),
        claim: spread(CLAIM)?,
        finish: spread(FINISH)?,
    })
}

/// The lease of no job.
fn nothing() -> LeaseRef {
    LeaseRef { attempt: 0, lease: String::new() }
}
