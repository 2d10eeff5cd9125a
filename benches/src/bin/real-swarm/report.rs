//! The simulation of what was measured, and both beside each other.

use std::{env, process::Command};

use anyhow::{Context as _, ensure};
use serde::Serialize;
use serde_json::Value;
use shoal_benches::median_of;

use crate::{
    Args,
    rounds::{Measured, Pair, Round},
};

/// Medians over the seeds.
#[derive(Serialize)]
pub(crate) struct Simulated {
    p50_s: f64,
    last_s: f64,
    /// The command, for the first seed.
    command: String,
}

#[derive(Serialize)]
pub(crate) struct Report {
    command: String,
    agents: usize,
    rate_bits_per_s: f64,
    /// What of it is payload, by the pair: what is simulated.
    payload_bits_per_s: f64,
    size_bytes: u64,
    piece_size_bytes: u64,
    pair: Pair,
    /// The first deployment, when no connection stood.
    cold: Round,
    rounds: Vec<Round>,
    /// Whether every round is.
    pub(crate) void: bool,
    /// Medians of the rounds that are not void, or of all when all are.
    p50_s: f64,
    last_s: f64,
    simulated: Simulated,
    /// By how much the real ones took longer than the simulated, in per cent.
    p50_over_simulated_percent: f64,
    last_over_simulated_percent: f64,
}

fn median(values: Vec<f64>) -> anyhow::Result<f64> {
    median_of(values.into_iter()).context("nothing to take the median of")
}

/// Simulates the same deployment, seed after seed.
pub(crate) fn simulate(args: &Args, measured: &Measured) -> anyhow::Result<Simulated> {
    let program = args.sim()?;
    let mut flags = vec![
        "--nodes".to_owned(),
        args.agents.to_string(),
        "--size".to_owned(),
        format!("{}B", measured.size_bytes),
        "--nic".to_owned(),
        format!("{:.0}bps", measured.payload_bits_per_s),
        "--piece-size".to_owned(),
        format!("{}B", measured.piece_size_bytes),
        "--json".to_owned(),
        "--seed".to_owned(),
    ];
    let (mut p50, mut last) = (Vec::new(), Vec::new());
    for seed in 1..=args.seeds {
        let output = Command::new(&program).args(&flags).arg(seed.to_string()).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "shoal-sim failed: {}", said.trim());
        let run: Value = serde_json::from_slice(&output.stdout)?;
        let number = |key: &str| run.get(key).and_then(Value::as_f64).context("no such number");
        p50.push(number("p50_s")?);
        last.push(number("makespan_s")?);
    }
    flags.push("1".into());
    let command = format!("shoal-sim {}", flags.join(" "));
    Ok(Simulated { p50_s: median(p50)?, last_s: median(last)?, command })
}

impl Report {
    pub(crate) fn new(
        args: &Args,
        measured: Measured,
        simulated: Simulated,
    ) -> anyhow::Result<Self> {
        let Measured { size_bytes, piece_size_bytes, pair, cold, rounds, payload_bits_per_s } =
            measured;
        let void = rounds.iter().all(|round| round.void);
        let counted: Vec<_> = rounds.iter().filter(|round| void || !round.void).collect();
        let p50_s = median(counted.iter().map(|round| round.p50_s).collect())?;
        let last_s = median(counted.iter().map(|round| round.last_s).collect())?;
        let over = |real: f64, simulated: f64| 100.0 * (real / simulated - 1.0);
        let given = env::args().skip(1).filter(|arg| arg != "--inside");
        Ok(Self {
            command: ["real-swarm".to_owned()]
                .into_iter()
                .chain(given)
                .collect::<Vec<_>>()
                .join(" "),
            agents: args.agents,
            rate_bits_per_s: args.rate_mbit * 1e6,
            payload_bits_per_s,
            size_bytes,
            piece_size_bytes,
            pair,
            cold,
            void,
            p50_s,
            last_s,
            p50_over_simulated_percent: over(p50_s, simulated.p50_s),
            last_over_simulated_percent: over(last_s, simulated.last_s),
            rounds,
            simulated,
        })
    }

    pub(crate) fn print(&self) {
        println!(
            "{} agents, {:.0} MiB in pieces of {} KiB, lines of {:.0} Mbit/s, {:.1} of it payload",
            self.agents,
            self.size_bytes as f64 / f64::from(1 << 20),
            self.piece_size_bytes >> 10,
            self.rate_bits_per_s / 1e6,
            self.payload_bits_per_s / 1e6,
        );
        println!("one machine to one: {:.1} % of the line", 100.0 * self.pair.share_of_line);
        println!("                p50 s    last s    CPU  copies  wire  lost");
        let names = std::iter::once("cold".to_owned());
        let names = names.chain((1..=self.rounds.len()).map(|number| format!("round {number}")));
        for (name, round) in names.zip(std::iter::once(&self.cold).chain(&self.rounds)) {
            round.print(&name);
        }
        println!(" simulated  {:8.2}  {:8.2}", self.simulated.p50_s, self.simulated.last_s);
        println!(
            "the real swarm takes {:+.1} % at p50 and {:+.1} % at the last machine{}",
            self.p50_over_simulated_percent,
            self.last_over_simulated_percent,
            if self.void { "; VOID: the CPU was busy, give a lower --rate-mbit" } else { "" },
        );
        println!("{}", self.simulated.command);
    }
}
