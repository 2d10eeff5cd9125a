//! Dequeue and complete through `shoal_queue`: many workers on PostgreSQL, and on SQLite beside it.
//!
//! Each job is claimed in one transaction and ended, with its artifact and its copies to be made, in another one; no
//! transaction carries two jobs. Every commit is on the disk before it is answered: `fsync` and
//! `synchronous_commit` are on, which is checked on the server, and SQLite syncs in full. The engines take turns, round
//! after round, each time in a database of its own, which is empty or has a history of jobs that ended before.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use clap::Parser;
use serde::Serialize;
use shoal_proto::{
    AppName, ArtifactId, EncodingId, RegionName,
    state::{JobStatus, Priority},
};
use shoal_queue::{Actor, AppRow, Ask, Claimant, Depth, End, Lease, Queue, Stored, sqlite_url};
use shoal_test_postgres::{Database, Server};
use sqlx::{AssertSqlSafe, Connection as _};
use tokio::{sync::Barrier, task::JoinSet};

/// How long whoever numbers events rests.
const NUMBER_REST: Duration = Duration::from_millis(20);

/// Measures dequeue and complete on PostgreSQL and on SQLite.
#[derive(Parser)]
struct Args {
    /// How many jobs each round works off.
    #[arg(long, default_value_t = 5_000)]
    jobs: usize,
    /// How many workers claim and complete at once.
    #[arg(long, default_value_t = 100)]
    workers: usize,
    /// How many regions each artifact is to be copied to.
    #[arg(long, default_value_t = 5)]
    regions: usize,
    /// How many jobs have ended before.
    #[arg(long, default_value_t = 0)]
    history: usize,
    /// Number the events meanwhile, as the coordinator on duty does.
    #[arg(long)]
    events: bool,
    /// Only this engine, for a profile: postgres or sqlite.
    #[arg(long, value_parser = ["postgres", "sqlite"])]
    only: Option<String>,
    /// How many rounds.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// A server that runs, as postgres://USER@HOST/DATABASE; without one, it starts one of its own.
    #[arg(long)]
    server: Option<String>,
    /// Where the databases lie; without one, the system's directory for temporary files.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// One round on one engine.
#[derive(Debug, Clone, Serialize)]
struct Round {
    jobs_per_s: f64,
    submits_per_s: f64,
    claim_p50_ms: f64,
    claim_p99_ms: f64,
    complete_p50_ms: f64,
    complete_p99_ms: f64,
    run_twice: usize,
    fifo_violations: usize,
}

#[derive(Serialize)]
struct Report {
    jobs: usize,
    workers: usize,
    regions: usize,
    history: usize,
    cores: usize,
    rounds: BTreeMap<&'static str, Vec<Round>>,
    median_jobs_per_s: BTreeMap<&'static str, f64>,
    postgres_to_sqlite: Option<f64>,
}

/// What a worker saw of one job.
struct Run {
    job: i64,
    asked: Instant,
    given: Instant,
    completed: Instant,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let base = args.dir.clone().unwrap_or_else(std::env::temp_dir);
    let own = match args.server {
        Some(_) => None,
        None => Some(Server::start_in(&base, &[]).await?),
    };
    let server = own.as_ref().map(|server| server.url("postgres"));
    let server = args.server.clone().or(server).context("no server")?;
    let mut rounds: BTreeMap<&'static str, Vec<Round>> = BTreeMap::new();
    for _ in 0..args.rounds.max(1) {
        if args.only.as_deref() != Some("sqlite") {
            let database = Database::create_on(&server).await?;
            for setting in ["fsync", "synchronous_commit"] {
                let value = database.setting(setting).await?;
                ensure!(
                    value == "on",
                    "{setting} is {value} on the server: that is no measurement"
                );
            }
            rounds.entry("postgres").or_default().push(round(&args, database.url()).await?);
            database.remove().await?;
        }
        if args.only.as_deref() != Some("postgres") {
            let dir = tempfile::tempdir_in(&base)?;
            let url = sqlite_url(&dir.path().join("queue.sqlite"));
            rounds.entry("sqlite").or_default().push(round(&args, &url).await?);
        }
    }
    let report = report(&args, rounds)?;
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print(&report);
    }
    Ok(())
}

async fn round(args: &Args, url: &str) -> anyhow::Result<Round> {
    let queue = Queue::open(url).await?;
    let names = (0..args.regions).map(|at| RegionName::new(format!("r{at}")));
    let regions: Arc<[RegionName]> = names.collect::<Result<Vec<_>, _>>()?.into();
    queue.set_regions(&regions, 0).await?;
    let submits_per_s = submit(&queue, args, url).await?;
    let start = Arc::new(Barrier::new(args.workers));
    let mut tasks = JoinSet::new();
    for worker in 0..args.workers {
        tasks.spawn(work(queue.clone(), worker, regions.clone(), start.clone()));
    }
    let numbering = args.events.then(|| tokio::spawn(number(queue.clone())));
    let mut runs = Vec::with_capacity(args.jobs);
    while let Some(ended) = tasks.join_next().await {
        runs.extend(ended??);
    }
    if let Some(numbering) = numbering {
        numbering.abort();
    }
    let ended = queue.jobs(None, u32::try_from(args.jobs)?).await?;
    ensure!(
        queue.depth().await? == Depth::default()
            && ended.iter().filter(|job| job.status == JobStatus::Succeeded).count() == args.jobs,
        "not all jobs have succeeded"
    );
    queue.close().await;
    let begin = runs.iter().map(|run| run.asked).min().context("no job was run")?;
    let end = runs.iter().map(|run| run.completed).max().context("no job was run")?;
    let distinct: BTreeSet<_> = runs.iter().map(|run| run.job).collect();
    let (claim_p50_ms, claim_p99_ms) = percentiles(runs.iter().map(|run| run.given - run.asked));
    let (complete_p50_ms, complete_p99_ms) =
        percentiles(runs.iter().map(|run| run.completed - run.given));
    Ok(Round {
        jobs_per_s: args.jobs as f64 / (end - begin).as_secs_f64(),
        submits_per_s,
        claim_p50_ms,
        claim_p99_ms,
        complete_p50_ms,
        complete_p99_ms,
        run_twice: runs.len() - distinct.len(),
        fifo_violations: fifo_violations(&mut runs),
    })
}

/// Fills the queue, one job after the other: their numbers are their order.
async fn submit(queue: &Queue, args: &Args, url: &str) -> anyhow::Result<f64> {
    let app: AppName = "web".parse()?;
    let actor = Actor { name: "bench".into(), origin: String::new(), request: None };
    queue.set_app(&AppRow { name: app.clone(), spec: "{}".into() }, &actor, 0).await?;
    if args.history > 0 {
        add_history(url, args.history).await?;
    }
    let start = Instant::now();
    for at in 0..args.jobs {
        // Each another commit: one that waits already would be joined.
        let commit = format!("{at:040x}").parse()?;
        let ask = Ask { app: app.clone(), commit, priority: Priority::Normal, max_attempts: 3 };
        queue.submit(&ask, &actor, i64::try_from(at)?).await?;
    }
    Ok(args.jobs as f64 / start.elapsed().as_secs_f64())
}

/// Jobs that were asked for and have succeeded before all others.
async fn add_history(url: &str, jobs: usize) -> anyhow::Result<()> {
    let mut connection = sqlx::AnyConnection::connect(url).await?;
    let sql = format!(
        "INSERT INTO jobs (id, created_at, app, commit_sha, name, status, attempt, max_attempts, \
         cancel_requested, requested_by, finished_at, priority, eligible_at, deferred) \
         WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {jobs}) \
         SELECT -i, -i, 'web', 'commit ' || i, 'web/old-' || i, 'SUCCEEDED', 1, 3, 0, 'bench', -i, 2, -i, 0 FROM n"
    );
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await?;
    sqlx::raw_sql("ANALYZE").execute(&mut connection).await?;
    Ok(connection.close().await?)
}

/// Gives events their numbers, and rests for a moment where there is none.
async fn number(queue: Queue) {
    loop {
        // What fails is tried again; the rate shows it.
        if queue.number_events().await.unwrap_or_default() == 0 {
            tokio::time::sleep(NUMBER_REST).await;
        }
    }
}

/// A worker that does nothing between a job's start and its end.
async fn work(
    queue: Queue,
    worker: usize,
    regions: Arc<[RegionName]>,
    start: Arc<Barrier>,
) -> anyhow::Result<Vec<Run>> {
    let claimant =
        Claimant { worker: format!("w{worker}"), host: "here".into(), incarnation: "one".into() };
    let mut runs = Vec::new();
    start.wait().await;
    loop {
        let token = format!("{worker}-{}", runs.len());
        let asked = Instant::now();
        let Some(job) = queue.claim(&claimant, &token, 1_000_000).await? else { return Ok(runs) };
        let given = Instant::now();
        let lease = Lease { attempt: job.attempt, token };
        let end = End::Succeeded(stored(job.id));
        queue.finish(job.id, &lease, &end, &regions, 1_000_001).await?;
        runs.push(Run { job: job.id, asked, given, completed: Instant::now() });
    }
}

/// What a job made: each job another artifact.
fn stored(job: i64) -> Stored {
    let id = *blake3::hash(&job.to_le_bytes()).as_bytes();
    Stored {
        artifact: ArtifactId(id),
        encoding: EncodingId(id),
        size_bytes: 10_000_000_000,
        encoded_bytes: 4_000_000_000,
        piece_size_bytes: 4 << 20,
        pieces: 2_385,
    }
}

/// Jobs that were given away before somebody had even asked for the call that got an older one. (Of two calls
/// that overlap, either may get the older job.)
fn fifo_violations(runs: &mut [Run]) -> usize {
    runs.sort_unstable_by_key(|run| run.job);
    let mut first_given: Option<Instant> = None;
    let mut violations = 0;
    for run in runs.iter().rev() {
        if first_given.is_some_and(|given| given < run.asked) {
            violations += 1;
        }
        first_given = Some(first_given.map_or(run.given, |given| given.min(run.given)));
    }
    violations
}

/// The median and the 99th percentile, in milliseconds.
fn percentiles(times: impl Iterator<Item = Duration>) -> (f64, f64) {
    let mut all: Vec<_> = times.collect();
    all.sort_unstable();
    let at = |share: f64| {
        let index = (all.len() as f64 * share) as usize;
        all.get(index).map_or(0.0, |time| time.as_secs_f64() * 1_000.0)
    };
    (at(0.5), at(0.99))
}

fn report(args: &Args, rounds: BTreeMap<&'static str, Vec<Round>>) -> anyhow::Result<Report> {
    let median = |rounds: &Vec<Round>| {
        let mut all: Vec<_> = rounds.iter().map(|round| round.jobs_per_s).collect();
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    let medians: BTreeMap<_, _> =
        rounds.iter().map(|(engine, rounds)| (*engine, median(rounds))).collect();
    Ok(Report {
        jobs: args.jobs,
        workers: args.workers,
        regions: args.regions,
        history: args.history,
        cores: std::thread::available_parallelism()?.get(),
        postgres_to_sqlite: medians
            .get("postgres")
            .zip(medians.get("sqlite"))
            .map(|(postgres, sqlite)| postgres / sqlite),
        median_jobs_per_s: medians,
        rounds,
    })
}

fn print(report: &Report) {
    println!(
        "{} jobs after {} others, {} workers, {} regions, {} cores; every commit synced",
        report.jobs, report.history, report.workers, report.regions, report.cores
    );
    for (engine, rounds) in &report.rounds {
        for round in rounds {
            println!(
                "{engine:<9} {:>6.0} jobs/s  claim {:>5.1} ms (p99 {:>6.1})  complete {:>5.1} ms (p99 {:>6.1})  \
                 {:>5.0} submits/s  run twice: {}  out of order: {}",
                round.jobs_per_s,
                round.claim_p50_ms,
                round.claim_p99_ms,
                round.complete_p50_ms,
                round.complete_p99_ms,
                round.submits_per_s,
                round.run_twice,
                round.fifo_violations,
            );
        }
    }
    for (engine, jobs_per_s) in &report.median_jobs_per_s {
        println!("{engine}: {jobs_per_s:.0} jobs/s");
    }
    if let Some(ratio) = report.postgres_to_sqlite {
        println!("PostgreSQL to SQLite: {ratio:.1}");
    }
}
