//! `shoal-sim`: the swarm policy of the agent on thousands of virtual machines.
//!
//! Every machine is a `shoal_swarm::Swarm`, the very type that the agent drives; the world around it
//! ([`world`]) is a discrete-event one whose only clock is the time of the next event. One seed gives one
//! run, to the last event: the digest of the trace says so. `README.md` says what is exact in this world
//! and what is approximated.

mod report;
mod units;
mod world;

use std::{process::ExitCode, time::Instant};

use clap::{Parser, error::ErrorKind};
use shoal_proto::manifest::{PIECES_MAX, PieceSize};

/// The most machines in one run: each takes some tens of kilobytes.
const NODES_MAX: u32 = 1_000_000;

/// Simulates one artifact on its way from a region's bucket to every machine.
#[derive(Debug, Parser)]
#[command(name = "shoal-sim", version, max_term_width = 100)]
struct Args {
    /// Machines in the region.
    #[arg(long, default_value_t = 1_000)]
    nodes: u32,
    /// Size of the artifact as stored, such as 10GB or 512MiB.
    #[arg(long, default_value = "10GB", value_parser = units::size)]
    size: u64,
    /// Each machine's line, each way, such as 10Gbps or 300MBps.
    #[arg(long, default_value = "10Gbps", value_parser = units::rate)]
    nic: u64,
    /// Size of a piece, a power of two from 256KiB to 16MiB. Default: the agent's own choice.
    #[arg(long, value_parser = units::size)]
    piece_size: Option<u64>,
    /// Zones that the machines are spread over.
    #[arg(long, default_value_t = 1)]
    zones: u32,
    /// One seed gives one run.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

impl Args {
    fn setup(&self) -> Result<world::Setup, String> {
        if self.nodes == 0 || self.nodes > NODES_MAX {
            return Err(format!("--nodes is {}: give 1 to {NODES_MAX}", self.nodes));
        }
        if self.zones == 0 || self.zones > self.nodes {
            return Err(format!("--zones is {}: give 1 to the number of nodes", self.zones));
        }
        let piece_size = match self.piece_size {
            None => PieceSize::for_artifact(self.size),
            Some(bytes) => PieceSize::from_bytes(bytes).ok_or_else(|| {
                format!("--piece-size is {bytes} bytes: give a power of two, 256KiB to 16MiB")
            })?,
        };
        let pieces = self.size.div_ceil(piece_size.bytes());
        let pieces = u32::try_from(pieces).ok().filter(|pieces| *pieces <= PIECES_MAX);
        let pieces = pieces.ok_or_else(|| {
            format!("an artifact has at most {PIECES_MAX} pieces: use a larger --piece-size")
        })?;
        Ok(world::Setup {
            nodes: self.nodes,
            size_bytes: self.size,
            piece_bytes: piece_size.bytes(),
            pieces,
            nic_bps: self.nic,
            zones: self.zones,
            seed: self.seed,
        })
    }
}

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error)
            if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) =>
        {
            // Nothing to be done when stdout is closed.
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            let text = error.to_string();
            eprintln!("{}", text.lines().next().unwrap_or("error: wrong arguments"));
            return ExitCode::from(2);
        }
    };
    let setup = match args.setup() {
        Ok(setup) => setup,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(2);
        }
    };
    let begun = Instant::now();
    let run = world::World::new(setup.clone()).run();
    let report = report::Report::new(&setup, &run, begun.elapsed());
    let printed = if args.json { report.print_json() } else { report.print_table() };
    if let Err(error) = printed {
        eprintln!("error: cannot write the result: {error}");
        return ExitCode::from(2);
    }
    match run.violation {
        Some(violation) => {
            eprintln!("error: seed {}: {violation}", setup.seed);
            ExitCode::FAILURE
        }
        None => ExitCode::SUCCESS,
    }
}
