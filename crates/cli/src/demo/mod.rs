//! `shoal demo`: a whole cluster of real processes on this machine, and what an operator does with it.
//!
//! It starts a coordinator, a worker, region processes and agents ([`cluster`], [`process`]), registers an app,
//! builds a commit ([`source`]), waits for its copies in the regions, deploys it, follows the rollout, and
//! then looks for itself ([`check`]) whether each agent runs the right bytes; the steps are in [`steps`].

mod check;
mod cluster;
mod place;
mod process;
mod progress;
mod report;
mod source;
mod steps;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use bytesize::ByteSize;
use shoal_origin::Bucket;

use self::{
    cluster::{Cluster, Engines},
    place::Place,
    process::Failed,
    progress::Progress,
    report::AgentReport,
    source::{SIZE_MIN_BYTES, Source},
    steps::follow,
};
use crate::{exit::usage, show};

/// More processes than this are no demo for one machine.
const PROCESSES_MAX: usize = 256;

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
    #[arg(long, default_value = "256MiB", value_parser = show::parse_size, conflicts_with_all = ["repo", "artifact"])]
    size: ByteSize,
    /// Keep the buckets under this address, such as s3://bucket/prefix, with credentials from the environment. The
    /// agents get none of them. What is written is under a name of its own there, and deleted at the end.
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
        self.probe_bucket().await?;
        // Both before the first process, so that nothing is left behind whenever the signal comes.
        let interrupted = shoal_process::shutdown()?;
        let place = Place::make(&self)?;
        let engines = Engines {
            database: self.database.clone(),
            goals: self.goals.clone(),
            buckets: self.bucket.clone(),
        };
        let temporary = place.temporary.is_some();
        let mut cluster = Cluster::create(&place.root, self.keep, temporary, engines)?;
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
                    show::note(failed.log.trim_end());
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
            if count == 0 {
                return Err(usage(format!("--{flag} is at least 1")));
            }
        }
        let processes =
            self.regions.saturating_mul(self.region_processes).saturating_add(self.agents);
        let least = show::size(SIZE_MIN_BYTES);
        let wrong = if self.agents < self.regions {
            "--agents is at least --regions: one agent in each".into()
        } else if processes > PROCESSES_MAX {
            format!("{processes} processes are more than {PROCESSES_MAX}")
        } else if self.size.as_u64() < SIZE_MIN_BYTES {
            format!("--size is at least {least}: the program has to fit")
        } else {
            return Ok(());
        };
        Err(usage(wrong))
    }

    /// Looks whether the buckets can be where they are to be, before anything is started.
    async fn probe_bucket(&self) -> anyhow::Result<()> {
        let Some(url) = &self.bucket else { return Ok(()) };
        let bucket = Bucket::open(url).context("--bucket")?;
        if !bucket.signs() {
            return Err(usage("--bucket is an s3:// or gs:// address: directories need none"));
        }
        bucket.probe().await.context("--bucket")
    }

    /// About how much disk the demo takes, in bytes: each agent keeps the artifact and its compressed pieces,
    /// each bucket the pieces, and the worker the build.
    fn disk_bytes(&self) -> u64 {
        let copies = 2 * self.agents + self.regions + 5;
        Source::size_bytes(self).unwrap_or(0).saturating_mul(copies as u64)
    }
}

fn wrong(agents: &[AgentReport]) -> String {
    let names: Vec<_> = agents.iter().filter(|a| !a.ok).map(|a| a.name.as_str()).collect();
    if names.is_empty() {
        return "the rollout did not succeed, though every agent runs the right bytes".into();
    }
    format!("not every agent runs the right bytes: {}", names.join(", "))
}

/// Whether programs in a directory are found by their names.
fn is_searched(dir: &Path) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|all| std::env::split_paths(&all).any(|searched| searched == dir))
}

/// Says how to talk to a cluster that was left running.
fn explain(cluster: &Cluster) {
    let operator = cluster.operator_dir();
    let root = operator.parent().unwrap_or(Path::new("/"));
    let program = std::env::current_exe().ok();
    let dir = program.as_deref().and_then(Path::parent).filter(|dir| !is_searched(dir));
    let path = dir.map(|dir| format!("export PATH=\"{}:$PATH\"\n", dir.display()));
    show::note(&format!(
        "\nThe cluster is still running. Talk to it so:\n\n{}\
         export SHOAL_COORDINATOR={}\nexport SHOAL_IDENTITY={}\n\
         shoal status\nshoal machines\nshoal jobs\n",
        path.unwrap_or_default(),
        cluster.api(),
        operator.display()
    ));
    for agent in &cluster.agents {
        let port = agent.process.data_dir().join("run/demo/port");
        if let Ok(port) = std::fs::read_to_string(port) {
            let (name, port) = (&agent.process.name, port.trim());
            show::note(&format!("{name}  http://127.0.0.1:{port}/version"));
        }
    }
    show::note(&format!("\nLogs are in {}/*/log.", root.display()));
    if let Some(url) = cluster.remote_buckets() {
        show::note(&format!("Its objects are under {url}; the end deletes them."));
    }
    show::note(&format!("End it with: shoal demo --stop {}", root.display()));
}
