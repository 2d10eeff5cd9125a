//! `shoal build`, `jobs`, `job`, `cancel`.

use std::{collections::BTreeSet, io, time::Duration};

use anyhow::bail;
use serde::Serialize;
use shoal_client::{
    Client,
    types::{BuildRequest, Job},
};
use shoal_proto::{
    AppName, CommitSha,
    state::{JobStatus, Priority},
};

use crate::{connect::Connection, show};

/// How often a job that is waited for is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// How many rows a list has when nothing is said.
pub(crate) const LIST_LIMIT: u32 = 50;

#[derive(clap::Args)]
pub(crate) struct BuildArgs {
    /// The app.
    app: AppName,
    /// The full commit SHA.
    commit: CommitSha,
    /// Which builds go first: urgent, high, normal or low. A build of the same commit that waits is raised to it.
    #[arg(long, value_name = "PRIORITY", default_value_t)]
    priority: Priority,
    /// Wait until the job has ended; exit 1 unless it SUCCEEDED.
    #[arg(long)]
    wait: bool,
    /// Print its log on stderr meanwhile; waits, too.
    #[arg(long)]
    follow: bool,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
pub(crate) struct JobsArgs {
    /// Only jobs of this app.
    #[arg(long)]
    app: Option<AppName>,
    /// How many at most.
    #[arg(long, default_value_t = LIST_LIMIT, value_parser = show::at_least_one())]
    limit: u32,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
pub(crate) struct JobArgs {
    /// The job's number.
    job: i64,
    /// Print its log instead; with --json as the text of one object.
    #[arg(long)]
    log: bool,
    /// Print its log as it comes until the job has ended; exit 1 unless it SUCCEEDED. With --json the log goes to stderr,
    /// and the job is printed at its end.
    #[arg(long)]
    follow: bool,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
pub(crate) struct CancelArgs {
    /// The job's number.
    job: i64,
    #[command(flatten)]
    connection: Connection,
}

impl BuildArgs {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let client = self.connection.client()?;
        let request = BuildRequest { app: self.app, commit: self.commit, priority: self.priority };
        let mut job = client.build(&request).await?;
        if self.follow || self.wait {
            let joined = job.joined;
            if !self.connection.json {
                let there = if joined == Some(true) { "was there already and " } else { "" };
                show::note(&format!("job {} {there}is {}: {}", job.id, job.status, job.name));
            }
            job = wait(&client, job.id, self.follow.then_some(&mut io::stderr() as _)).await?;
            job.joined = joined;
        }
        show::print_as(self.connection.json, &job, detail)?;
        if (self.follow || self.wait) && job.status != JobStatus::Succeeded {
            bail!("{}", failure(&job));
        }
        Ok(())
    }
}

impl JobsArgs {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let jobs = self.connection.client()?.jobs(self.app.as_ref(), self.limit).await?;
        show::print_as(self.connection.json, &jobs, |jobs| list(jobs))
    }
}

impl JobArgs {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let client = self.connection.client()?;
        let json = self.connection.json;
        if self.follow {
            let (mut stdout, mut stderr) = (io::stdout(), io::stderr());
            let log: &mut (dyn io::Write + Send) = if json { &mut stderr } else { &mut stdout };
            let job = wait(&client, self.job, Some(log)).await?;
            if json {
                show::print_json(&job)?;
            }
            if job.status != JobStatus::Succeeded {
                bail!("{}", failure(&job));
            }
            return Ok(());
        }
        if self.log {
            return print_log(&client, self.job, json).await;
        }
        let job = client.job(self.job).await?;
        show::print_as(json, &job, detail)
    }
}

/// A job's log as JSON.
#[derive(Serialize)]
struct Log {
    job: i64,
    /// What is no UTF-8 in it is replaced.
    log: String,
}

async fn print_log(client: &Client, job: i64, json: bool) -> anyhow::Result<()> {
    let (mut offset, mut kept) = (0, Vec::new());
    let mut stdout = io::stdout();
    let out: &mut (dyn io::Write + Send) = if json { &mut kept } else { &mut stdout };
    while copy_log(client, job, &mut offset, out).await? {}
    if json {
        let log = String::from_utf8_lossy(&kept).into_owned();
        return show::print_json(&Log { job, log });
    }
    if offset == 0 {
        tell_place(client, job).await?;
    }
    Ok(())
}

/// Says which coordinator has a job's log, if another one has it.
async fn tell_place(client: &Client, job: i64) -> anyhow::Result<()> {
    let job = client.job(job).await?;
    let places: BTreeSet<_> = job.attempts.iter().flat_map(|a| &a.log_at).collect();
    let places: Vec<_> = places.into_iter().map(String::as_str).collect();
    if !places.is_empty() {
        let places = places.join(", ");
        eprintln!("shoal: the log lies with coordinator {places}: ask there with --coordinator");
    }
    Ok(())
}

impl CancelArgs {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let job = self.connection.client()?.cancel_job(self.job).await?;
        show::print_as(self.connection.json, &job, detail)
    }
}

/// Passes on what the log has from `offset` on, 1 MiB at most; whether there was anything.
async fn copy_log(
    client: &Client,
    job: i64,
    offset: &mut u64,
    out: &mut (dyn io::Write + Send),
) -> anyhow::Result<bool> {
    let bytes = client.job_log(job, *offset).await?;
    *offset += bytes.len() as u64;
    show::written(out.write_all(&bytes).and_then(|()| out.flush()))?;
    Ok(!bytes.is_empty())
}

/// Waits for a job's end, and copies its log to `log` meanwhile. A coordinator that is away for a while
/// does not end the waiting.
async fn wait(
    client: &Client,
    id: i64,
    mut log: Option<&mut (dyn io::Write + Send)>,
) -> anyhow::Result<Job> {
    let mut offset = 0;
    loop {
        // The job is read before the log: what it wrote up to its end is then in the log.
        let job = match client.job(id).await {
            Ok(job) => job,
            Err(error) if error.may_pass() => {
                show::again(&error);
                tokio::time::sleep(LOOK_EVERY).await;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        if let Some(log) = &mut log {
            while copy_log(client, id, &mut offset, *log).await? {}
        }
        if job.status.is_terminal() {
            if log.is_some() && offset == 0 {
                tell_place(client, id).await?;
            }
            return Ok(job);
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Why a job has no artifact, in a line.
fn failure(job: &Job) -> String {
    let reason = job.reason.as_deref().unwrap_or("no reason given");
    format!("job {} is {}: {reason} (its log: shoal job {} --log)", job.id, job.status, job.id)
}

fn list(jobs: &[Job]) -> String {
    let mut table = show::table(&[
        "JOB", "APP", "COMMIT", "STATUS", "PRIORITY", "ASKED", "TOOK", "WORKER", "REASON",
    ]);
    for job in jobs {
        let took = show::seconds_between(job.started_at_ms, job.finished_at_ms);
        table.add_row([
            job.id.to_string(),
            job.app.to_string(),
            job.commit.short().to_string(),
            job.status.to_string(),
            job.priority.to_string(),
            show::ago(job.created_at_ms),
            took.map_or("-".into(), |s| show::duration(Duration::from_secs_f64(s))),
            job.worker.clone().unwrap_or_else(|| "-".into()),
            job.reason.clone().unwrap_or_default(),
        ]);
    }
    show::render(&table, "no jobs yet: ask for one with shoal build APP SHA")
}

fn detail(job: &Job) -> String {
    let mut table = show::table(&["JOB", &job.id.to_string()]);
    let mut row = |key: &str, value: Option<String>| {
        if let Some(value) = value {
            table.add_row([key, &value]);
        }
    };
    let stopping = job.cancel_requested && !job.status.is_terminal();
    row(
        "status",
        Some(format!("{}{}", job.status, if stopping { ", being cancelled" } else { "" })),
    );
    row("reason", job.reason.clone());
    row("app", Some(job.app.to_string()));
    row("commit", Some(job.commit.to_string()));
    row("name", Some(job.name.clone()));
    row("artifact", job.artifact.map(|artifact| artifact.to_string()));
    row("priority", Some(job.priority.to_string()));
    row("asked", Some(format!("{} by {}", show::ago(job.created_at_ms), job.requested_by)));
    row("joined", job.joined.filter(|joined| *joined).map(|_| "it was there already".into()));
    row("next attempt", job.eligible_at_ms.map(show::until));
    let queued = show::seconds_between(Some(job.created_at_ms), job.started_at_ms);
    row("queued", queued.map(|s| format!("{s:.1} s")));
    let took = show::seconds_between(job.started_at_ms, job.finished_at_ms);
    row("took", took.map(|s| format!("{s:.1} s")));
    row("worker", job.worker.clone());
    row("attempt", Some(format!("{} of {}", job.attempt, job.max_attempts)));
    for attempt in &job.attempts {
        let took = show::seconds_between(Some(attempt.started_at_ms), attempt.finished_at_ms);
        let how = match (&attempt.outcome, took) {
            (Some(outcome), Some(s)) => format!("{outcome} after {s:.1} s"),
            _ => "under way".into(),
        };
        let reason = attempt.reason.as_ref().map(|reason| format!(": {reason}"));
        let text = format!("{how} on {}{}", attempt.worker, reason.unwrap_or_default());
        row(&format!("attempt {}", attempt.attempt), Some(text));
    }
    show::render(&table, "")
}
