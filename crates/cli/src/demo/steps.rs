//! What the demo does with its cluster, step by step, as an operator would.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{bail, ensure};
use shoal_client::{
    Client, ClientError,
    types::{Artifact, BuildRequest, Job, Rollout},
};
use shoal_proto::state::{JobStatus, MachineState, ReplicationStatus, RolloutStatus};

use super::{
    DemoArgs, check,
    cluster::{Agent, Cluster, Shape},
    process::{self, Failed},
    progress::Progress,
    report::{AgentReport, Report, job_report, region_reports, replication_report},
    source::Source,
};
use crate::{artifacts, deploy, show};

/// How often the coordinator is asked how far things are.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// How often the agents' memory is looked at.
const SAMPLE_EVERY: Duration = Duration::from_millis(100);

/// How long the agents may take to become known to the coordinator.
const KNOWN_TIMEOUT: Duration = Duration::from_secs(60);

/// How long one call's failure may last, before the demo gives up.
const AWAY_TIMEOUT: Duration = Duration::from_secs(30);

/// How much of a job's log is kept while its end is looked for, in bytes.
const LOG_KEEP_BYTES: usize = 64 << 10;

/// The most anonymous memory that any agent was seen to have, in bytes.
type Peak = Arc<AtomicU64>;

fn sample(agents: &[Agent], peak: &Peak) {
    let used = agents.iter().filter_map(|agent| agent.process.rss_anon_bytes()).max();
    peak.fetch_max(used.unwrap_or(0), Ordering::Relaxed);
}

/// Waits for `duration`; looks after the processes and their memory meanwhile.
async fn watch(cluster: &mut Cluster, peak: &Peak, duration: Duration) -> anyhow::Result<()> {
    let end = Instant::now() + duration;
    loop {
        cluster.check()?;
        sample(&cluster.agents, peak);
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        tokio::time::sleep(left.min(SAMPLE_EVERY)).await;
    }
}

/// Asks the coordinator again and again until `done` of the answer.
async fn until<T>(
    cluster: &mut Cluster,
    peak: &Peak,
    ask: impl AsyncFn() -> Result<T, ClientError>,
    mut done: impl FnMut(&T) -> bool,
) -> anyhow::Result<T> {
    let mut away_since = None;
    loop {
        match ask().await {
            Ok(answer) if done(&answer) => return Ok(answer),
            Ok(_) => away_since = None,
            Err(error) if error.is_transient() => {
                let since = *away_since.get_or_insert_with(Instant::now);
                if since.elapsed() > AWAY_TIMEOUT {
                    return Err(error.into());
                }
            }
            Err(error) => return Err(error.into()),
        }
        watch(cluster, peak, LOOK_EVERY).await?;
    }
}

/// The demo from the start of the processes to the check of every agent.
pub(super) async fn follow(
    args: &DemoArgs,
    cluster: &mut Cluster,
    progress: &Progress,
) -> anyhow::Result<(Report, Vec<AgentReport>)> {
    let start = Instant::now();
    let peak = Peak::default();
    let shape = Shape {
        regions: args.regions,
        region_processes: args.region_processes,
        agents: args.agents,
    };
    let operator_dir = cluster.operator_dir();
    let root = operator_dir.parent().unwrap_or(Path::new("/"));
    let source = Source::prepare(args, root)?;
    progress.say(&format!(
        "starting 1 coordinator, 1 worker, {} region processes and {} agents in {}",
        shape.regions * shape.region_processes,
        shape.agents,
        root.display()
    ));
    let client = cluster.start(shape).await?;
    progress.say(&format!("all processes are ready, the coordinator at {}", cluster.api()));
    let is_new = args.database.is_none() || client.apps().await?.is_empty();
    ensure!(is_new, "--database is in use: give an empty one, the demo's buckets are empty, too");
    know_machines(cluster, &client, &peak, args.agents).await?;
    let app = client.set_app(source.app()).await?.name;

    let (job, artifact) = match &source {
        Source::Build { app, commit, .. } => {
            let request = BuildRequest::new(app.name.clone(), commit.clone());
            progress.say(&format!("app {} is registered; building commit {commit}", app.name));
            let job = build(cluster, &client, &peak, progress, &request).await?;
            let artifact = client.artifact(&job.name).await?;
            (Some(job), artifact)
        }
        Source::File { app, path } => {
            progress.say(&format!("app {} is registered; publishing {}", app.name, path.display()));
            (None, publish(cluster, &client, &peak, progress, &source).await?)
        }
    };
    let artifact = replicate(cluster, &client, &peak, progress, artifact).await?;
    progress.say(&format!("{} is in every region; deploying it", artifact.name));
    let rollout = deploy::deploy(&client, &app, &artifact.name).await?;
    let rollout = roll_out(cluster, &client, &peak, progress, rollout).await?;
    progress.say(&format!("rollout {} is {}; checking every agent", rollout.id, rollout.status));
    let agents = check_agents(cluster, &client, &source, &artifact).await?;
    sample(&cluster.agents, &peak);

    let ok = rollout.status == RolloutStatus::Succeeded && agents.iter().all(|agent| agent.ok);
    let report = Report {
        ok,
        artifact: artifact.artifact,
        name: artifact.name.clone(),
        size_bytes: artifact.size_bytes,
        encoded_bytes: artifact.encoded_bytes,
        piece_size_bytes: artifact.piece_size_bytes,
        pieces: artifact.pieces,
        job: job.as_ref().map(job_report),
        replication: replication_report(&artifact),
        regions: region_reports(&rollout),
        peer_bytes: deploy::total(&rollout).peer_bytes,
        wall_s: start.elapsed().as_secs_f64(),
        agent_peak_rss_anon_bytes_max: peak.load(Ordering::Relaxed),
    };
    Ok((report, agents))
}

/// Waits until the coordinator knows every agent: a rollout is for those that are known.
async fn know_machines(
    cluster: &mut Cluster,
    client: &Client,
    peak: &Peak,
    agents: usize,
) -> anyhow::Result<()> {
    let start = Instant::now();
    let ask = async || client.machines(None, None).await;
    let late = |known: usize| known < agents && start.elapsed() > KNOWN_TIMEOUT;
    let machines = until(cluster, peak, ask, |m| m.len() >= agents || late(m.len())).await?;
    let (known, limit) = (machines.len(), KNOWN_TIMEOUT.as_secs());
    ensure!(known >= agents, "only {known} of {agents} agents have reported after {limit} s");
    Ok(())
}

async fn build(
    cluster: &mut Cluster,
    client: &Client,
    peak: &Peak,
    progress: &Progress,
    request: &BuildRequest,
) -> anyhow::Result<Job> {
    let job = client.build(request).await?;
    let id = job.id;
    progress.say(&format!("job {id} is {}", job.status));
    let mut said = job.status;
    let ask = async || client.job(id).await;
    let job = until(cluster, peak, ask, |job| {
        if job.status != said {
            said = job.status;
            progress.say(&format!("job {id} is {said}"));
        }
        job.status.is_terminal()
    })
    .await?;
    if job.status != JobStatus::Succeeded {
        // The job's log is gone with the cluster, so its end is shown here.
        let (mut log, mut offset) = (String::new(), 0);
        while let Ok(more) = client.job_log(id, offset).await
            && !more.is_empty()
        {
            offset += more.len() as u64;
            // One answer's worth is more than is shown, but the last one may be short.
            log = log.split_off(log.floor_char_boundary(log.len().saturating_sub(LOG_KEEP_BYTES)));
            log += &String::from_utf8_lossy(&more);
        }
        let log = process::tail(&log);
        let reason = job.reason.as_deref().unwrap_or("no reason given");
        bail!(Failed { what: format!("job {id} is {}: {reason}", job.status), log });
    }
    Ok(job)
}

async fn publish(
    cluster: &mut Cluster,
    client: &Client,
    peak: &Peak,
    progress: &Progress,
    source: &Source,
) -> anyhow::Result<Artifact> {
    let Source::File { app, path } = source else { bail!("nothing to publish") };
    let size = std::fs::metadata(path).map_or(0, |meta| meta.len());
    let done = Arc::new((AtomicU64::new(0), AtomicU64::new(0)));
    let told = done.clone();
    let note = move |what: &'static str, bytes: u64| {
        let place = if what == "cut" { &told.0 } else { &told.1 };
        place.fetch_max(bytes, Ordering::Relaxed);
    };
    let publishing = artifacts::publish(client, path, &app.name, None, note);
    tokio::pin!(publishing);
    let task = progress.task("publish");
    loop {
        tokio::select! {
            artifact = &mut publishing => return artifact,
            watched = watch(cluster, peak, LOOK_EVERY) => watched?,
        }
        let uploaded = show::size(done.1.load(Ordering::Relaxed));
        task.set(done.0.load(Ordering::Relaxed), size, &format!("uploaded {uploaded}"));
    }
}

/// Waits until the artifact is COMPLETE in every region.
async fn replicate(
    cluster: &mut Cluster,
    client: &Client,
    peak: &Peak,
    progress: &Progress,
    artifact: Artifact,
) -> anyhow::Result<Artifact> {
    let tasks: Vec<_> = artifact
        .replication
        .keys()
        .map(|name| (name.clone(), progress.task(name.as_str())))
        .collect();
    let ask = async || client.artifact(&artifact.name).await;
    until(cluster, peak, ask, |artifact| {
        for (name, task) in &tasks {
            if let Some(copy) = artifact.replication.get(name) {
                let reason = copy.reason.as_deref().unwrap_or_default();
                let text = format!("{} {reason}", copy.status);
                task.set(copy.bytes_done, artifact.encoded_bytes, text.trim_end());
            }
        }
        artifact.deployable && artifact.replication_status == ReplicationStatus::Complete
    })
    .await
}

/// Follows a rollout to its end.
async fn roll_out(
    cluster: &mut Cluster,
    client: &Client,
    peak: &Peak,
    progress: &Progress,
    rollout: Rollout,
) -> anyhow::Result<Rollout> {
    let mut tasks = std::collections::BTreeMap::new();
    let id = rollout.id;
    let ask = async || client.rollout(id).await;
    until(cluster, peak, ask, |rollout| {
        for (name, region) in &rollout.regions {
            let task = tasks.entry(name.clone()).or_insert_with(|| progress.task(name.as_str()));
            task.set(region.pieces, region.pieces_total, &deploy::states(&region.states));
        }
        rollout.status.is_terminal()
    })
    .await
}

/// Looks at every agent: its file's hash, its program's answer, what it reported.
async fn check_agents(
    cluster: &Cluster,
    client: &Client,
    source: &Source,
    artifact: &Artifact,
) -> anyhow::Result<Vec<AgentReport>> {
    let app = &source.app().name;
    let machines = client.machines(None, Some(app)).await?;
    let mut reports = Vec::new();
    for Agent { process, region, zone } in &cluster.agents {
        let machine = machines.iter().find(|machine| machine.name.as_str() == process.name);
        let entry = machine.and_then(|m| m.apps.iter().find(|entry| entry.report.app == *app));
        let state = entry.map(|entry| entry.report.state);
        let line = |error: anyhow::Error| show::one_line(&error);
        let hash = check::hash_current(&process.data_dir(), app).await.map_err(line);
        let answer = match source {
            Source::Build { commit, answers: true, .. } => {
                Some(match check::version(&process.data_dir(), app).await {
                    Ok(version) if version == *commit => Ok(version.to_string()),
                    Ok(version) => Err(format!("{version}, not {commit}")),
                    Err(error) => Err(line(error)),
                })
            }
            _ => None,
        };
        let ok = state == Some(MachineState::Active)
            && hash == Ok(artifact.artifact)
            && answer.as_ref().is_none_or(Result::is_ok);
        reports.push(AgentReport {
            name: process.name.clone(),
            region: region.clone(),
            zone: (*zone).into(),
            state,
            hash,
            answer,
            ok,
        });
    }
    Ok(reports)
}
