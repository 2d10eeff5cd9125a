//! What the demo shows meanwhile, on stderr: bars on a terminal, plain lines elsewhere.

use std::{
    io::IsTerminal as _,
    sync::Mutex,
    time::{Duration, Instant},
};

use crate::show;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// How often a plain line about the same thing is written at most.
const LINE_EVERY: Duration = Duration::from_secs(2);

/// Everything that is shown.
pub(super) struct Progress {
    bars: Option<MultiProgress>,
    start: Instant,
}

impl Progress {
    pub(super) fn new() -> Self {
        let bars = std::io::stderr()
            .is_terminal()
            .then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr()));
        Self { bars, start: Instant::now() }
    }

    /// Says that something is done or begins.
    pub(super) fn say(&self, text: &str) {
        let line = format!("{:7.1} s  {text}", self.start.elapsed().as_secs_f64());
        match &self.bars {
            // An error means that the terminal is gone; there is nobody to tell.
            Some(bars) => drop(bars.println(line)),
            None => show::note(&line),
        }
    }

    /// Starts to show something that goes from nothing to a total.
    pub(super) fn task(&self, name: &str) -> Task<'_> {
        let bar = self.bars.as_ref().map(|bars| {
            let bar = bars.add(ProgressBar::new(1));
            // The template is a constant: were it wrong, the default would be shown.
            if let Ok(style) = ProgressStyle::with_template(
                "           {prefix:<12} {bar:30} {percent:>3} %  {wide_msg}",
            ) {
                bar.set_style(style);
            }
            bar.set_prefix(name.to_string());
            bar
        });
        let said = Mutex::new((String::new(), None));
        Task { progress: self, name: name.into(), bar, said }
    }
}

/// One thing that goes from nothing to a total. It disappears from a terminal when dropped.
pub(super) struct Task<'a> {
    progress: &'a Progress,
    name: String,
    bar: Option<ProgressBar>,
    /// The last plain line and when it was written.
    said: Mutex<(String, Option<Instant>)>,
}

impl Task<'_> {
    /// Shows how far it is. A plain line is written only for news, and not too often.
    pub(super) fn set(&self, done: u64, total: u64, message: &str) {
        if let Some(bar) = &self.bar {
            bar.set_length(total.max(1));
            bar.set_position(done);
            bar.set_message(message.to_string());
            return;
        }
        let percent = (done * 100).checked_div(total).unwrap_or(0);
        let line = format!("{}: {percent} %, {message}", self.name);
        let Ok(mut said) = self.said.lock() else { return };
        let recent = said.1.is_some_and(|at| at.elapsed() < LINE_EVERY);
        if said.0 != line && (!recent || done == total) {
            self.progress.say(&line);
            *said = (line, Some(Instant::now()));
        }
    }
}

impl Drop for Task<'_> {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
