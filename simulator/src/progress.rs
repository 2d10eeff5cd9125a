//! How far a run is, on stderr: a bar on a terminal, a line now and then elsewhere. Short runs show nothing.

use std::{
    io::IsTerminal as _,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::{units::grouped, world};

/// A run that is done by then shows nothing.
const QUIET: Duration = Duration::from_secs(2);

/// How often a line is written where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Steps of the bar.
const STEPS: f64 = 1_000.0;

/// Shows how far all regions of a run are.
pub(crate) struct Progress {
    regions: u32,
    /// What is to be complete in each region: machines, counted once for each artifact.
    fetches: u64,
    begun: Instant,
    bar: Option<ProgressBar>,
    /// When the newest line was written.
    line_at: Instant,
}

impl Progress {
    pub(crate) fn new(regions: u32, fetches: u64) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = terminal.then(|| {
            let bar =
                ProgressBar::with_draw_target(Some(STEPS as u64), ProgressDrawTarget::hidden());
            // The template is a constant: were it wrong, the default would be shown.
            if let Ok(style) = ProgressStyle::with_template("{bar:30} {percent:>3} %  {wide_msg}") {
                bar.set_style(style);
            }
            bar
        });
        Self { regions, fetches, begun: Instant::now(), bar, line_at: Instant::now() }
    }

    /// Takes in how far the region with this number is.
    pub(crate) fn told(&mut self, region: u32, progress: world::Progress) {
        let elapsed = self.begun.elapsed();
        if elapsed < QUIET {
            return;
        }
        let part = (f64::from(region) + progress.held_part) / f64::from(self.regions);
        if self.bar.is_none() {
            if self.line_at.elapsed() < LINE_EVERY {
                return;
            }
            self.line_at = Instant::now();
        }
        let text = self.text(region, progress, part, elapsed);
        match &self.bar {
            Some(bar) => {
                if bar.is_hidden() {
                    bar.set_draw_target(ProgressDrawTarget::stderr());
                }
                bar.set_position((part * STEPS) as u64);
                bar.set_message(text);
            }
            None => eprintln!("{:3.0} %  {text}", part * 100.0),
        }
    }

    fn text(&self, region: u32, at: world::Progress, part: f64, elapsed: Duration) -> String {
        let which = match self.regions {
            1 => String::new(),
            regions => format!("region {} of {regions}: ", region + 1),
        };
        let done = grouped(at.done);
        let fetches = grouped(self.fetches);
        let left = left(elapsed, part)
            .map_or(String::new(), |left| format!(", {} left", humantime::format_duration(left)));
        format!("{which}{:.1} s simulated, {done} of {fetches} complete{left}", at.at_s)
    }

    /// Takes the bar away.
    pub(crate) fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// How long it takes from here on, in whole seconds, when the rest goes as what is done: what costs time is pieces.
/// None: too little is done to say.
fn left(elapsed: Duration, part: f64) -> Option<Duration> {
    let left_s = elapsed.as_secs_f64() * (1.0 - part) / part;
    (part > 0.001).then(|| Duration::from_secs(left_s.max(0.0).round() as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_takes_as_long_as_what_is_done() {
        assert_eq!(left(Duration::from_secs(30), 0.25), Some(Duration::from_secs(90)));
        assert_eq!(left(Duration::from_secs(30), 1.0), Some(Duration::ZERO));
        assert_eq!(left(Duration::from_secs(30), 0.0), None);
    }

    #[test]
    fn a_line_says_region_time_and_machines() {
        let progress = Progress::new(10, 20_000);
        let at = world::Progress { at_s: 3.25, held_part: 0.5, done: 1_234 };
        let text = progress.text(2, at, 0.25, Duration::from_secs(60));
        let expected = "region 3 of 10: 3.2 s simulated, 1,234 of 20,000 complete, 3m left";
        assert_eq!(text, expected);
    }
}
