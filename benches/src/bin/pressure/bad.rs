//! Deployments with a bad peer and without, in turn.

use std::process::{Child, Stdio};

use anyhow::{Context as _, ensure};
use serde::Serialize;
use shoal_benches::{
    cluster::{Artifact, Cluster},
    median_of,
    net::{self, CONTROL, Line, Rate},
};

use crate::{APP, Args, Bad, LIMIT, PORT, SEED, known, line, seeded, select, start_agent};

/// What is printed with `--json`.
#[derive(Serialize)]
struct Report {
    bad: Bad,
    leechers: usize,
    rate_mbit: f64,
    size_mib: u64,
    /// Until the last of the others had verified everything, in seconds, when all were good.
    without_s: Vec<f64>,
    /// The same beside the bad one.
    with_s: Vec<f64>,
    median_without_s: f64,
    median_with_s: f64,
    /// How much longer the others took.
    longer_percent: f64,
    /// Agents that banned it, the seed among them if it fetched, by round.
    banned_by: Vec<usize>,
}

/// A bad peer's process, gone with this.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // One that has ended is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) fn measure(args: &Args, cluster: &mut Cluster, bad: Bad) -> anyhow::Result<()> {
    start_agent(args, cluster, SEED, &[])?;
    let leechers: Vec<String> = (1..=args.leechers).map(|number| format!("m{number:03}")).collect();
    for name in &leechers {
        start_agent(args, cluster, name, &[])?;
    }
    known(cluster)?;
    // One more, whose connections the others find made.
    deploy(args, cluster, &leechers, None, "")?;
    let (mut without_s, mut with_s, mut banned_by) = (vec![], vec![], vec![]);
    for round in 1..=args.rounds {
        without_s.push(deploy(args, cluster, &leechers, None, "")?);
        // Another one each time: a ban outlives its connection.
        let name = format!("bad-{round}");
        with_s.push(deploy(args, cluster, &leechers, Some(bad), &name)?);
        let mut banned = 0;
        for agent in &leechers {
            let events = cluster.events(agent)?;
            let is = |event: &shoal_benches::cluster::Event| {
                event.says("machine", &name)
                    && event
                        .says("message", "neighbour banned: it sent pieces that fail their hash")
            };
            banned += usize::from(events.iter().any(is));
        }
        banned_by.push(banned);
    }
    let median = |all: &[f64]| median_of(all.iter().copied()).context("no rounds");
    let (median_without_s, median_with_s) = (median(&without_s)?, median(&with_s)?);
    let report = Report {
        bad,
        leechers: args.leechers,
        rate_mbit: args.rate_mbit,
        size_mib: args.size_mib,
        without_s,
        with_s,
        median_without_s,
        median_with_s,
        longer_percent: 100.0 * (median_with_s / median_without_s - 1.0),
        banned_by,
    };
    if args.flags.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        println!(
            "{} leechers, {} MiB, lines of {} Mbit/s; one is {}: the others take {:.2} s instead of {:.2} ({:+.1} %)",
            report.leechers,
            report.size_mib,
            report.rate_mbit,
            format!("{bad:?}").to_lowercase(),
            report.median_with_s,
            report.median_without_s,
            report.longer_percent
        );
        if bad == Bad::Liar {
            println!("banned by {:?} of {} others", report.banned_by, report.leechers - 1);
        }
    }
    Ok(())
}

/// Gives another artifact to all; how long the last of those took that are good in every round, in seconds.
fn deploy(
    args: &Args,
    cluster: &mut Cluster,
    leechers: &[String],
    bad: Option<Bad>,
    bad_name: &str,
) -> anyhow::Result<f64> {
    let artifact = seeded(args, cluster)?;
    let (last, others) = leechers.split_last().context("no leechers")?;
    let mut all = vec![SEED.to_owned()];
    all.extend(others.iter().cloned());
    let mut running = None;
    match bad {
        // It takes the place of one that fetches.
        Some(Bad::Silent | Bad::Liar) => {
            running = Some(act(cluster, bad, last, bad_name, &artifact)?);
        }
        Some(Bad::Slow) => {
            let Rate { bits_per_s, queue_s } = line(args).up;
            let slow = Rate { bits_per_s: bits_per_s / 100.0, queue_s };
            net::hold(last, Line::even(slow))?;
            all.push(last.clone());
        }
        None => all.push(last.clone()),
    }
    select(cluster, &all)?;
    let revision = cluster.deploy(APP, &artifact)?;
    let verified = cluster.verified(others, APP, &revision, LIMIT)?;
    net::hold(last, line(args))?;
    drop(running);
    cluster.ended(APP, LIMIT)?;
    let goal = cluster.goal_at(APP, &revision)?.context("no region process has the goal")?;
    let done = verified.values().max().context("nobody verified")?;
    Ok(done.duration_since(goal)?.as_secs_f64())
}

/// Starts a bad peer on a leecher's machine.
fn act(
    cluster: &Cluster,
    bad: Option<Bad>,
    machine: &str,
    name: &str,
    artifact: &Artifact,
) -> anyhow::Result<Running> {
    cluster.issue(name, "agent", &["--region", "bench"])?;
    let number = cluster.agents.iter().position(|agent| agent == machine);
    let number = number.context("no such machine")? + 1;
    let described = cluster.operator(&["artifact", &artifact.name])?;
    let id =
        described.get("artifact").and_then(|id| id.as_str()).context("an artifact has no id")?;
    let bad = format!("{:?}", bad.context("nothing is wrong with it")?).to_lowercase();
    let mut command = net::on_machine(machine, &std::env::current_exe()?);
    command.args(["act", "--bad", &bad, "--identity", &format!("{}/{name}/identity", crate::ROOT)]);
    command.args(["--listen", &format!("10.77.1.{number}:{}", PORT + 10), "--artifact", id]);
    command.args(["--size", &artifact.size_bytes.to_string()]);
    command.args(["--piece-size", &artifact.piece_size_bytes.to_string()]);
    for port in [7420, 7430] {
        command.args(["--region", &format!("{CONTROL}:{port}")]);
    }
    let mut running = Running(command.stdin(Stdio::null()).spawn().context("cannot start a peer")?);
    ensure!(running.0.try_wait()?.is_none(), "the bad peer ended at once");
    Ok(running)
}
