//! `shoal-sim` on the fleets that Shoal is meant for, with a history of its figures by commit.
//!
//! Each run adds one line to `benches/history/scale.jsonl`: the commit, and the figures of the case. What is printed is
//! compared with the newest line of the same case from another commit. Efficiency, copies and messages depend on the
//! commit alone, so they are compared exactly; the cost of simulating depends on the machine too.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, ensure};
use clap::Parser;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use shoal_benches::{program, run};

/// A case: its name, what it asks for as efficiency, and the flags.
struct Case {
    name: &'static str,
    asked: f64,
    flags: &'static str,
}

/// The first one is run unless others are named.
const CASES: &[Case] = &[
    Case {
        name: "100k",
        asked: 0.90,
        flags: "--nodes 100000 --size 10GB --nic 10Gbps --piece-size 16MiB --seed 1",
    },
    Case {
        name: "100k-4m",
        asked: 0.92,
        flags: "--nodes 100000 --size 10GB --nic 10Gbps --piece-size 4MiB --seed 1",
    },
    Case {
        name: "100k-1g",
        asked: 0.90,
        flags: "--nodes 100000 --size 10GB --nic 1Gbps --piece-size 16MiB --seed 1",
    },
    Case {
        name: "100k-25g",
        asked: 0.85,
        flags: "--nodes 100000 --size 10GB --nic 25Gbps --piece-size 16MiB --seed 1",
    },
    Case {
        name: "100k-zones",
        asked: 0.90,
        flags: "--nodes 100000 --size 10GB --nic 10Gbps --piece-size 16MiB --zones 3 --seed 1",
    },
    Case {
        name: "regions-20k",
        asked: 0.90,
        flags: "--regions 10 --nodes 20000 --size 10GB --nic 10Gbps --piece-size 16MiB --seed 1",
    },
    Case {
        name: "regions-100k",
        asked: 0.90,
        flags: "--regions 10 --nodes 100000 --size 10GB --nic 10Gbps --piece-size 16MiB --seed 1",
    },
    Case {
        name: "10k",
        asked: 0.90,
        flags: "--nodes 10000 --size 10GB --nic 10Gbps --piece-size 16MiB --seed 1",
    },
    Case {
        name: "10k-4m",
        asked: 0.92,
        flags: "--nodes 10000 --size 10GB --nic 10Gbps --piece-size 4MiB --seed 1",
    },
    Case {
        name: "1k",
        asked: 0.92,
        flags: "--nodes 1000 --size 10GB --nic 10Gbps --piece-size 16MiB --seed 1",
    },
    Case {
        name: "1k-zones",
        asked: 0.92,
        flags: "--nodes 1000 --size 10GB --nic 10Gbps --piece-size 16MiB --zones 3 --seed 1",
    },
    Case {
        name: "1k-1g",
        asked: 0.90,
        flags: "--nodes 1000 --size 10GB --nic 1Gbps --piece-size 16MiB --seed 1",
    },
    Case {
        name: "1k-25g",
        asked: 0.85,
        flags: "--nodes 1000 --size 10GB --nic 25Gbps --piece-size 16MiB --seed 1",
    },
];

/// Simulates large fleets and keeps the figures by commit.
#[derive(Parser)]
struct Args {
    /// Which cases, by name; default: 100k. `--list` names them.
    cases: Vec<String>,
    /// Name the cases and their flags.
    #[arg(long)]
    list: bool,
    /// The program `shoal-sim`; by default the one beside this one.
    #[arg(long)]
    sim: Option<PathBuf>,
    /// Where the history is kept.
    #[arg(long, default_value = "benches/history/scale.jsonl")]
    history: PathBuf,
    /// Add nothing to the history.
    #[arg(long)]
    dry_run: bool,
    /// Print the lines of the history that were added, as JSON.
    #[arg(long)]
    json: bool,
}

/// A line of the history.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Line {
    case: String,
    commit: String,
    efficiency: f64,
    makespan_s: f64,
    p50_s: f64,
    origin_copies: f64,
    cross_zone_copies: f64,
    /// Control messages for each piece that a machine got.
    messages_per_piece: f64,
    events_per_piece: f64,
    wall_s: f64,
    /// The whole run by the pieces of all machines.
    wall_us_per_piece: f64,
    cpu_s: f64,
    peak_rss_bytes: u64,
    trace_digest: String,
}

/// The commit that is checked out, with a mark if anything is changed.
fn commit() -> anyhow::Result<String> {
    let args = ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"];
    let output = Command::new("git").args(args).output().context("cannot run git")?;
    ensure!(output.status.success(), "run it in a checkout of Shoal: git knows no commit here");
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn lines(history: &Path) -> anyhow::Result<Vec<Line>> {
    let text = match fs::read_to_string(history) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("cannot read {history:?}")),
    };
    let parse = |(at, line): (usize, &str)| {
        serde_json::from_str(line).with_context(|| format!("line {} of {history:?}", at + 1))
    };
    text.lines().enumerate().map(parse).collect()
}

fn simulate(sim: &Path, case: &Case, commit: &str) -> anyhow::Result<Line> {
    let mut command = Command::new(sim);
    command.args(case.flags.split(' ')).arg("--json");
    let (cost, printed) = run(&mut command)?;
    let figures: Value = serde_json::from_str(&printed).context("shoal-sim printed no JSON")?;
    let number = |name: &str| {
        figures[name].as_f64().with_context(|| format!("shoal-sim says no number for {name}"))
    };
    let pieces = number("nodes")? * number("pieces")?;
    Ok(Line {
        case: case.name.to_owned(),
        commit: commit.to_owned(),
        efficiency: number("efficiency")?,
        makespan_s: number("makespan_s")?,
        p50_s: number("p50_s")?,
        origin_copies: number("origin_copies")?,
        cross_zone_copies: number("cross_zone_copies")?,
        messages_per_piece: number("messages")? / pieces,
        events_per_piece: number("events")? / pieces,
        wall_s: cost.wall_s,
        wall_us_per_piece: cost.wall_s * 1e6 / pieces,
        cpu_s: cost.cpu_s,
        peak_rss_bytes: number("peak_rss_bytes")? as u64,
        trace_digest: figures["trace_digest"].as_str().unwrap_or_default().to_owned(),
    })
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    if args.list {
        for case in CASES {
            println!("{:12} {}", case.name, case.flags);
        }
        return Ok(());
    }
    let wanted = if args.cases.is_empty() { vec!["100k".to_owned()] } else { args.cases };
    let find = |name: &String| {
        let case = CASES.iter().find(|case| case.name == name);
        case.with_context(|| format!("no case {name:?}: --list names them"))
    };
    let cases = wanted.iter().map(find).collect::<anyhow::Result<Vec<_>>>()?;
    let sim = program(args.sim.as_deref(), "shoal-sim")?;
    let commit = commit()?;
    let before = lines(&args.history)?;
    if !args.json {
        println!(
            "case         efficiency  asked  before  origin  zones  msg/piece  wall s  cpu s  us/piece  MiB"
        );
    }
    for case in cases {
        let line = simulate(&sim, case, &commit)?;
        let last = before.iter().rev().find(|old| old.case == line.case && old.commit != commit);
        if args.json {
            println!("{}", serde_json::to_string(&line)?);
        } else {
            let last = last.map_or("-".to_owned(), |last| format!("{:.4}", last.efficiency));
            println!(
                "{:12} {:10.4} {:6.2} {:>7} {:7.3} {:6.2} {:10.1} {:7.1} {:6.1} {:9.2} {:4}",
                line.case,
                line.efficiency,
                case.asked,
                last,
                line.origin_copies,
                line.cross_zone_copies,
                line.messages_per_piece,
                line.wall_s,
                line.cpu_s,
                line.wall_us_per_piece,
                line.peak_rss_bytes >> 20
            );
        }
        if !args.dry_run {
            if let Some(parent) = args.history.parent() {
                fs::create_dir_all(parent)?;
            }
            let mut file =
                fs::OpenOptions::new().create(true).append(true).open(&args.history).with_context(
                    || {
                        format!(
                            "cannot write {}: run it at the top of the checkout",
                            args.history.display()
                        )
                    },
                )?;
            writeln!(file, "{}", serde_json::to_string(&line)?)?;
        }
    }
    Ok(())
}
