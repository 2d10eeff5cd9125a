//! `shoal demo`: a whole cluster of real processes on this machine, and what an operator does with it.
//!
//! It starts a coordinator, a worker, region processes and agents ([`cluster`], [`process`]), registers an app,
//! builds a commit ([`source`]), waits for its copies in the regions, deploys it, follows the rollout, and
//! then looks for itself ([`check`]) whether each agent runs the right bytes.

mod check;
mod cluster;
mod process;
mod progress;
mod report;
mod source;

use std::{
    fs::{DirBuilder, Permissions},
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use bytesize::ByteSize;
use shoal_client::{
    Client, ClientError,
    types::{Artifact, BuildRequest, Job, Rollout},
};
use shoal_origin::Bucket;
use shoal_proto::state::{JobStatus, MachineState, ReplicationStatus, RolloutStatus};

use self::{
    cluster::{Agent, Cluster, Shape},
    process::Failed,
    progress::Progress,
    report::{AgentReport, JobReport, RegionReport, ReplicationReport, Report},
    source::{SIZE_MIN_BYTES, Source},
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

/// More processes than this are no demo for one machine.
const PROCESSES_MAX: usize = 256;

/// How much of a job's log is kept while its end is looked for, in bytes.
const LOG_KEEP_BYTES: usize = 64 << 10;

/// The directory's mode: builds run as another user where the demo runs as root, and must reach their own
/// checkout in it. Keys have modes of their own.
const ROOT_MODE: u32 = 0o711;

#[derive(clap::Args)]
pub(crate) struct DemoArgs {
    /// Build this repository instead of the demo's own: a path or URL.
    #[arg(long, value_name = "PATH_OR_URL", requires_all = ["build_command", "output"])]
    repo: Option<String>,
    /// The commit to build; by default the repository's HEAD.
    #[arg(long, value_name = "SHA", requires = "repo")]
    commit: Option<String>,
    /// The command that builds it, run with `sh -c` in a clean checkout.
    #[arg(long, value_name = "CMD", requires = "repo")]
    build_command: Option<String>,
    /// The file that the build leaves, relative to the checkout's root.
    #[arg(long, value_name = "PATH", requires = "repo")]
    output: Option<String>,
    /// An argument for the built program; repeat for each.
    #[arg(long = "run-arg", value_name = "ARG", requires = "repo", allow_hyphen_values = true)]
    run_args: Vec<String>,
    /// The built program is well when this exits 0, run with `sh -c`.
    #[arg(long, value_name = "CMD", requires = "repo")]
    health: Option<String>,
    /// Publish this file instead of building; it is verified, not started.
    #[arg(long, value_name = "FILE", conflicts_with = "repo")]
    artifact: Option<PathBuf>,
    /// How long the artifact of the demo's own repository is.
    #[arg(long, default_value = "256MiB", conflicts_with_all = ["repo", "artifact"])]
    size: ByteSize,
    /// Keep the buckets under this address, such as s3://bucket/prefix, with credentials from the environment. The
    /// agents get none of them, and what is written stays there.
    #[arg(long, value_name = "URL")]
    bucket: Option<String>,
    /// How many agents, spread evenly over the regions.
    #[arg(long, default_value_t = 8)]
    agents: usize,
    /// How many regions.
    #[arg(long, default_value_t = 2)]
    regions: usize,
    /// How many region processes in each region.
    #[arg(long, default_value_t = 2)]
    region_processes: usize,
    /// Use this empty PostgreSQL database, postgres://USER@HOST/DATABASE, instead of a SQLite file. What is written stays
    /// there.
    #[arg(long, value_name = "URL")]
    database: Option<String>,
    /// Keep goals in this etcd, too, etcd://HOST:PORT or etcds://...?ca=FILE: the regions follow it beside the coordinator.
    #[arg(long, value_name = "URL")]
    goals: Option<String>,
    /// Leave everything running, and say how to talk to it.
    #[arg(long)]
    keep: bool,
    /// Use this new or empty directory, and leave it in place; by default a temporary one.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Print one JSON object at the end; progress goes to stderr either way.
    #[arg(long)]
    json: bool,
    /// End what an earlier `shoal demo --keep` left running in this directory.
    #[arg(long, value_name = "DIR", exclusive = true)]
    stop: Option<PathBuf>,
}

impl DemoArgs {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        if let Some(dir) = &self.stop {
            return cluster::stop_kept(dir).await;
        }
        self.check()?;
        let buckets = self.buckets().await?;
        // Both before the first process, so that nothing is left behind whenever the signal comes.
        let interrupted = shoal_process::shutdown()?;
        let place = Place::make(&self)?;
        let (temporary, goals) = (place.temporary.is_some(), self.goals.as_deref());
        let mut cluster = Cluster::create(&place.root, self.keep, temporary, goals)?;
        cluster.database.clone_from(&self.database);
        cluster.buckets = buckets;
        let progress = Progress::new();
        let outcome = tokio::select! {
            outcome = follow(&self, &mut cluster, &progress) => outcome,
            () = interrupted.cancelled() => Err(anyhow::anyhow!("interrupted")),
        };
        if self.keep && !interrupted.is_cancelled() {
            place.leave();
            explain(&cluster);
        } else {
            if cluster.has_started() {
                progress.say("stopping the processes");
                if let Err(error) = cluster.stop().await {
                    progress.say(&format!("{error:#}"));
                }
            }
            place.remove()?;
        }
        match outcome {
            Ok((report, agents)) => {
                show::print_as(self.json, &report, |report| report::tables(report, &agents))?;
                ensure!(report.ok, "{}", wrong(&agents));
                Ok(())
            }
            Err(error) => {
                if let Some(failed) = error.downcast_ref::<Failed>() {
                    eprint!("{}", failed.log);
                }
                if self.json {
                    let error = show::one_line(&error);
                    show::print_json(&serde_json::json!({ "ok": false, "error": error }))?;
                }
                Err(error)
            }
        }
    }

    fn check(&self) -> anyhow::Result<()> {
        for (flag, count) in [
            ("agents", self.agents),
            ("regions", self.regions),
            ("region-processes", self.region_processes),
        ] {
            ensure!(count > 0, "--{flag} is at least 1");
        }
        ensure!(self.agents >= self.regions, "--agents is at least --regions: one agent in each");
        let processes = self.regions.saturating_mul(self.region_processes) + self.agents;
        ensure!(processes <= PROCESSES_MAX, "{processes} processes are more than {PROCESSES_MAX}");
        ensure!(
            self.size.as_u64() >= SIZE_MIN_BYTES,
            "--size is at least {}: the program has to fit",
            show::size(SIZE_MIN_BYTES)
        );
        Ok(())
    }

    /// Where the buckets are, when they are not directories of the demo's own; looked at before anything is started.
    async fn buckets(&self) -> anyhow::Result<Option<String>> {
        let Some(url) = &self.bucket else { return Ok(None) };
        let url = url.trim_end_matches('/').to_string();
        let bucket = Bucket::open(&url).context("--bucket")?;
        ensure!(bucket.signs(), "--bucket is an s3:// or gs:// address: directories need none");
        bucket.probe().await.context("--bucket")?;
        Ok(Some(url))
    }

    /// About how much disk the demo takes, in bytes: each agent keeps the artifact and its compressed pieces,
    /// each bucket the pieces, and the worker the build.
    fn disk_bytes(&self) -> u64 {
        let copies = 2 * self.agents + self.regions + 5;
        Source::size_bytes(self).unwrap_or(0).saturating_mul(copies as u64)
    }
}

/// The demo's directory.
struct Place {
    root: PathBuf,
    temporary: Option<tempfile::TempDir>,
}

impl Place {
    fn make(args: &DemoArgs) -> anyhow::Result<Self> {
        let needed = args.disk_bytes();
        if let Some(dir) = &args.data_dir {
            DirBuilder::new()
                .recursive(true)
                .mode(ROOT_MODE)
                .create(dir)
                .with_context(|| format!("cannot make {}", dir.display()))?;
            let root = dir.canonicalize()?;
            let empty = root.read_dir()?.next().is_none();
            ensure!(empty, "{} is not empty: give a new directory", root.display());
            let free = free_bytes(&root).unwrap_or(u64::MAX);
            ensure!(free >= needed, "{}", no_room(&root, needed, free));
            return Ok(Self { root, temporary: None });
        }
        // /tmp is often in memory: /var/tmp is for what is large.
        let usual = std::env::temp_dir();
        let candidates = [usual.clone(), PathBuf::from("/var/tmp")];
        let roomy =
            candidates.iter().find(|dir| free_bytes(dir).is_some_and(|free| free >= needed));
        let parent = roomy.with_context(|| {
            no_room(&usual, needed, free_bytes(&usual).unwrap_or(0))
                + "; give --data-dir on a larger disk, or a smaller --size"
        })?;
        let temporary = tempfile::Builder::new()
            .prefix("shoal-demo-")
            .permissions(Permissions::from_mode(ROOT_MODE))
            .tempdir_in(parent)
            .with_context(|| format!("cannot make a directory in {}", parent.display()))?;
        Ok(Self { root: temporary.path().canonicalize()?, temporary: Some(temporary) })
    }

    fn leave(self) {
        if let Some(temporary) = self.temporary {
            let _ = temporary.keep();
        }
    }

    fn remove(self) -> anyhow::Result<()> {
        match self.temporary {
            Some(temporary) => {
                temporary.close().with_context(|| format!("cannot remove {}", self.root.display()))
            }
            None => Ok(()),
        }
    }
}

fn free_bytes(dir: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(dir).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

fn no_room(dir: &Path, needed: u64, free: u64) -> String {
    let (needed, free) = (show::size(needed), show::size(free));
    format!("the demo needs about {needed}, and {} has {free} free", dir.display())
}

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
async fn follow(
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

fn job_report(job: &Job) -> JobReport {
    JobReport {
        id: job.id,
        status: job.status,
        queued_s: show::seconds_between(Some(job.created_at_ms), job.started_at_ms),
        build_s: show::seconds_between(job.started_at_ms, job.finished_at_ms),
    }
}

fn replication_report(
    artifact: &Artifact,
) -> std::collections::BTreeMap<shoal_proto::RegionName, ReplicationReport> {
    let report = |copy: &shoal_client::types::Replication| ReplicationReport {
        status: copy.status,
        seconds: show::seconds_between(Some(artifact.created_at_ms), copy.finished_at_ms),
    };
    artifact.replication.iter().map(|(name, copy)| (name.clone(), report(copy))).collect()
}

fn region_reports(
    rollout: &Rollout,
) -> std::collections::BTreeMap<shoal_proto::RegionName, RegionReport> {
    let report = |region: &shoal_client::types::RolloutRegion| {
        let count = |wanted: fn(MachineState) -> bool| {
            region.states.iter().filter(|(state, _)| wanted(**state)).map(|(_, count)| count).sum()
        };
        let since = |at| show::seconds_between(Some(rollout.created_at_ms), at);
        RegionReport {
            machines: region.machines,
            active: count(MachineState::is_success),
            failed: count(MachineState::is_failure),
            origin_bytes: region.origin_bytes,
            origin_copies: region.origin_copies,
            first_active_s: since(region.first_active_at_ms),
            last_active_s: since(region.last_active_at_ms),
        }
    };
    rollout.regions.iter().map(|(name, region)| (name.clone(), report(region))).collect()
}

fn wrong(agents: &[AgentReport]) -> String {
    let names: Vec<_> = agents.iter().filter(|a| !a.ok).map(|a| a.name.as_str()).collect();
    if names.is_empty() {
        return "the rollout did not succeed, though every agent runs the right bytes".into();
    }
    format!("not every agent runs the right bytes: {}", names.join(", "))
}

/// Says how to talk to a cluster that was left running.
fn explain(cluster: &Cluster) {
    let operator = cluster.operator_dir();
    let root = operator.parent().unwrap_or(Path::new("/"));
    eprintln!(
        "\nThe cluster is still running. Talk to it so:\n\n\
         export SHOAL_COORDINATOR={}\nexport SHOAL_IDENTITY={}\n\
         shoal status\nshoal machines\nshoal jobs\n",
        cluster.api(),
        operator.display()
    );
    for agent in &cluster.agents {
        let port = agent.process.data_dir().join("run/demo/port");
        if let Ok(port) = std::fs::read_to_string(port) {
            eprintln!("{}  http://127.0.0.1:{}/version", agent.process.name, port.trim());
        }
    }
    eprintln!("\nLogs are in {}/*/log. End it with: shoal demo --stop {0}", root.display());
}
