//! The command line.

use std::{ffi::OsString, path::PathBuf};

use clap::{Parser, error::ErrorKind};

use crate::options::Options;

/// Simulates artifacts on their way from a region's bucket to every machine, with the swarm policy of the agent.
///
/// Sizes are numbers with B, KB, MB, GB, KiB, MiB or GiB, rates with Kbps, Mbps, Gbps, KBps, MBps or GBps.
#[derive(Debug, Parser)]
#[command(name = "shoal-sim", version, max_term_width = 100)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) options: Options,
    /// What goes wrong, what is fetched, and the pipeline around it. Flags go before what the file says.
    #[arg(long, value_name = "FILE.toml")]
    pub(crate) scenario: Option<PathBuf>,
    /// Draw completion, machines and copies over time; of several regions the worst.
    #[arg(long, value_name = "FILE.png")]
    pub(crate) plot: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
    /// Threads to simulate with; the result does not depend on it. [default: one for each core]
    #[arg(long)]
    pub(crate) threads: Option<usize>,
    /// Stop at this simulated time.
    #[arg(long, value_name = "SECONDS", value_parser = stop_at)]
    pub(crate) stop_at: Option<f64>,
    /// Print every event of this machine to stderr.
    #[arg(long, value_name = "MACHINE")]
    pub(crate) watch: Option<u32>,
}

/// Why there are no arguments.
#[derive(Debug)]
pub(crate) enum NoArgs {
    /// Help or the version was asked for: it is to be printed.
    Asked(clap::Error),
    /// They are wrong, for this reason in one line.
    Wrong(String),
}

impl Args {
    pub(crate) fn read(args: &[OsString]) -> Result<Self, NoArgs> {
        Self::try_parse_from(args).map_err(|error| match error.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => NoArgs::Asked(error),
            _ => {
                let text = error.to_string();
                let line = text.lines().next().unwrap_or("wrong arguments");
                NoArgs::Wrong(line.trim_start_matches("error: ").to_string())
            }
        })
    }
}

fn stop_at(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if seconds.is_finite() && seconds >= 0.0 => Ok(seconds),
        _ => Err("give seconds, such as 12.5".into()),
    }
}
