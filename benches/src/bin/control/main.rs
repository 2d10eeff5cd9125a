//! The control plane under load, each figure from real processes on this machine: a coordinator on PostgreSQL with
//! everything synced, region processes, and the benchmark in the place of people, workers and machines.

mod day;
mod goals;
mod jobs;
mod machines;
mod polls;
mod reports;
mod times;
mod world;

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use serde::Serialize;

use crate::{day::Load, machines::Play, world::Shape};

/// Measures the control plane.
#[derive(Parser)]
struct Args {
    /// What is measured; nothing: all, in this order.
    #[arg(value_enum)]
    cases: Vec<Case>,
    /// The program, when it is not beside this one.
    #[arg(long)]
    shoal: Option<PathBuf>,
    /// Where databases, buckets and goals lie; without one, the system's directory for temporary files.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// goals: how many are set.
    #[arg(long, default_value_t = 200)]
    goals: usize,
    /// goals, reports: how many regions.
    #[arg(long, default_value_t = 10)]
    regions: usize,
    /// reports: how many machines.
    #[arg(long, default_value_t = 100_000)]
    machines: usize,
    /// polls: how many machines are connected.
    #[arg(long, default_value_t = 50_000)]
    connections: usize,
    /// polls: how many there are a second.
    #[arg(long, default_value_t = 1_667.0)]
    polls_per_s: f64,
    /// jobs: how many.
    #[arg(long, default_value_t = 5_000)]
    jobs: usize,
    /// jobs: how many take and end them.
    #[arg(long, default_value_t = 100)]
    job_workers: usize,
    /// day: how many builds, each of which is deployed.
    #[arg(long, default_value_t = 10_000)]
    builds: usize,
    /// day: how many build and deploy, one after the other.
    #[arg(long, default_value_t = 32)]
    engineers: usize,
    /// day: how many take jobs.
    #[arg(long, default_value_t = 20)]
    workers: usize,
    /// jobs, day: how many regions.
    #[arg(long, default_value_t = 5)]
    day_regions: usize,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    play: Play,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Case {
    /// From a goal's setting until it is stored in each region.
    Goals,
    /// What machines report, taken in through the API.
    Reports,
    /// Machines that ask a region process for their goals.
    Polls,
    /// Jobs that are taken and ended through the API.
    Jobs,
    /// A day's builds and deployments at full speed.
    Day,
}

#[derive(Debug, Default, Serialize)]
struct Report {
    cores: usize,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    goals: Vec<goals::Report>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reports: Option<reports::Report>,
    #[serde(skip_serializing_if = "Option::is_none")]
    polls: Option<polls::Report>,
    #[serde(skip_serializing_if = "Option::is_none")]
    jobs: Option<jobs::Report>,
    #[serde(skip_serializing_if = "Option::is_none")]
    day: Option<day::Report>,
}

/// Each machine of the benchmark has a socket, and so a file.
fn raise_open_files() -> anyhow::Result<()> {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    Ok(setrlimit(Resource::Nofile, limit)?)
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    raise_open_files()?;
    if let Some(played) = args.play.run().await {
        return played;
    }
    let shoal = shoal_benches::program(args.shoal.as_deref(), "shoal")?;
    let base = args.dir.clone().unwrap_or_else(std::env::temp_dir);
    let shape = |regions| Shape {
        shoal: &shoal,
        base: &base,
        regions,
        region_processes: false,
        etcd: false,
    };
    let wanted = |case| args.cases.is_empty() || args.cases.contains(&case);
    let cores = std::thread::available_parallelism()?.get();
    let mut report = Report { cores, ..Report::default() };
    if !args.json {
        println!("{cores} cores; PostgreSQL with every commit synced");
    }
    if wanted(Case::Goals) {
        for etcd in [false, true] {
            let shape = Shape { etcd, ..shape(args.regions) };
            let measured = goals::measure(shape, args.goals).await?;
            if !args.json {
                measured.print();
            }
            report.goals.push(measured);
        }
    }
    if wanted(Case::Reports) {
        let measured = reports::measure(shape(args.regions), args.machines).await?;
        if !args.json {
            measured.print();
        }
        report.reports = Some(measured);
    }
    if wanted(Case::Polls) {
        let measured = polls::measure(shape(1), args.connections, args.polls_per_s).await?;
        if !args.json {
            measured.print();
        }
        report.polls = Some(measured);
    }
    if wanted(Case::Jobs) {
        let measured = jobs::measure(shape(args.day_regions), args.jobs, args.job_workers).await?;
        if !args.json {
            measured.print();
        }
        report.jobs = Some(measured);
    }
    if wanted(Case::Day) {
        let Args { builds, engineers, workers, .. } = args;
        let load = Load { builds, engineers, workers };
        let measured = day::measure(shape(args.day_regions), load).await?;
        if !args.json {
            measured.print();
        }
        report.day = Some(measured);
    }
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    }
    Ok(())
}
