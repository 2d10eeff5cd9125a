//! `shoal-sim`: the swarm policy of the agent on thousands of virtual machines.
//!
//! Every machine is a `shoal_swarm::Swarm`, the very type that the agent drives; the world around it
//! ([`world`]) is a discrete-event one whose only clock is the time of the next event. One seed gives one
//! run, to the last event: the digest of the trace says so. `README.md` says what is exact in this world
//! and what is approximated.
//!
//! A run goes through this crate in one line. [`args`] and a [`scenario`] file make a [`plan`]: for each region a
//! [`setup::Setup`]. [`world::run`] makes each a [`setup::Run`], while [`progress`] shows how far it is. The
//! [`report`] measures it against what no swarm beats ([`bounds`], and [`fair`] where several artifacts share the
//! lines), adds the [`pipeline`] around it, and [`plot`] draws it. When an invariant was violated, [`replay`] says
//! which command shows it again.

mod args;
mod bounds;
mod fair;
mod options;
mod pages;
mod pipeline;
mod plan;
mod plot;
mod progress;
mod replay;
mod report;
mod scenario;
mod setup;
#[cfg(test)]
mod testing;
mod units;
mod world;

use std::{env, ffi::OsString, io::ErrorKind, process::ExitCode, time::Instant};

use args::{Args, NoArgs};
use plan::Plan;
use plot::Plot;
use progress::Progress;
use report::{Figures, Report, worst};

/// How a run ended that could be run at all.
enum Ended {
    Well,
    /// An invariant was violated: how, and the command that shows it again.
    Violated(String, String),
}

fn main() -> ExitCode {
    let given: Vec<OsString> = env::args_os().collect();
    let ended = match Args::read(&given) {
        Ok(args) => simulate(&args, &given),
        Err(NoArgs::Asked(text)) => {
            // Nothing to be done when stdout is closed.
            let _ = text.print();
            Ok(Ended::Well)
        }
        Err(NoArgs::Wrong(error)) => Err(error),
    };
    match ended {
        Ok(Ended::Well) => ExitCode::SUCCESS,
        Ok(Ended::Violated(what, replay)) => {
            eprintln!("error: {what}");
            eprintln!("replay: {replay}");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

/// Runs everything that the arguments ask for. An error is wrong input, or a result that cannot be written.
fn simulate(args: &Args, given: &[OsString]) -> Result<Ended, String> {
    let plan = Plan::new(args)?;
    pages::use_large(plan.regions[0].nodes);
    let plot = args.plot.as_deref().map(Plot::open).transpose()?;
    let begun = Instant::now();
    let mut progress = Progress::new(plan.regions.len() as u32, plan.regions[0].fetches());
    let mut figures = Vec::new();
    let mut ended = Ended::Well;
    // The setup and the run of the worst region.
    let mut shown = None;
    for (region, setup) in (0..).zip(&plan.regions) {
        let run = world::run(setup, &mut |at| progress.told(region, at));
        figures.push(Figures::new(setup, &run, region));
        if let Some(violation) = &run.violation {
            let words: Vec<_> =
                given.iter().skip(1).map(|word| word.display().to_string()).collect();
            let replay = replay::command(&words, setup.seed, violation);
            ended = Ended::Violated(replay::violated(setup.seed, violation), replay);
        }
        if worst(&figures) == region as usize {
            shown = Some((setup, run));
        }
        if matches!(ended, Ended::Violated(..)) {
            break;
        }
    }
    progress.end();
    let (setup, run) = shown.ok_or("there is no region to simulate")?;
    let report = Report::new(setup, figures, plan.pipeline(), begun.elapsed());
    let printed =
        if args.json { report.print_json() } else { report.print_table(setup, plan.about()) };
    match printed {
        // A reader that has gone away (`| head`) is no error of ours.
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            return Err(format!("cannot write the result: {error}"));
        }
        _ => {}
    }
    if let Some(plot) = plot {
        plot.draw(setup, &run, plan.about())?;
    }
    Ok(ended)
}
