//! Processes that a benchmark starts, and that end with it.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

/// How often it is looked whether those that were asked to end have.
const TERMINATE_LOOK_EVERY: Duration = Duration::from_millis(10);

/// A process that is to run until all of them end.
#[derive(Debug)]
struct Process {
    name: String,
    log: PathBuf,
    child: Child,
}

/// Processes that are to run until this ends.
#[derive(Debug, Default)]
pub struct Processes {
    all: Vec<Process>,
}

impl Drop for Processes {
    fn drop(&mut self) {
        for Process { child, .. } in &mut self.all {
            // One that has ended is gone already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Processes {
    /// Starts a command; what it says goes to the file `log`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(&mut self, name: &str, log: &Path, command: &mut Command) -> anyhow::Result<()> {
        let out = File::create(log)?;
        command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
        let child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
        self.add(name, log, child);
        Ok(())
    }

    /// Takes over a child that was started otherwise; `log` has its standard error.
    pub fn add(&mut self, name: &str, log: &Path, child: Child) {
        self.all.push(Process { name: name.into(), log: log.into(), child });
    }

    /// Looks whether all run.
    ///
    /// # Errors
    /// When one has ended; it gives the last that it said.
    pub fn check(&mut self) -> anyhow::Result<()> {
        for Process { name, log, child } in &mut self.all {
            if let Some(status) = child.try_wait()? {
                let log = fs::read_to_string(log).unwrap_or_default();
                let last = log.lines().last().unwrap_or_default();
                bail!("{name} ended ({status}): {last}");
            }
        }
        Ok(())
    }

    /// Waits for something, looking at it again and again.
    ///
    /// # Errors
    /// When a process ends, or `limit` is over.
    pub fn wait(
        &mut self,
        what: &str,
        every: Duration,
        limit: Duration,
        mut done: impl FnMut() -> anyhow::Result<bool>,
    ) -> anyhow::Result<()> {
        let start = Instant::now();
        while !done()? {
            self.check()?;
            ensure!(start.elapsed() < limit, "waited {} s for {what}", limit.as_secs());
            thread::sleep(every);
        }
        Ok(())
    }

    /// Asks all to end, and waits for that, at most so long.
    pub fn terminate(&mut self, limit: Duration) {
        let start = Instant::now();
        for Process { child, .. } in &self.all {
            // One that has ended is gone already.
            let _ = kill_process(Pid::from_child(child), Signal::TERM);
        }
        while start.elapsed() < limit
            && self.all.iter_mut().any(|process| matches!(process.child.try_wait(), Ok(None)))
        {
            thread::sleep(TERMINATE_LOOK_EVERY);
        }
    }

    /// The process that was started last.
    #[must_use]
    pub fn last(&self) -> Option<&str> {
        self.all.last().map(|process| process.name.as_str())
    }

    /// Their numbers.
    #[must_use]
    pub fn pids(&self) -> Vec<u32> {
        self.all.iter().map(|process| process.child.id()).collect()
    }

    /// The number of one.
    #[must_use]
    pub fn pid(&self, name: &str) -> Option<u32> {
        self.all.iter().find(|process| process.name == name).map(|process| process.child.id())
    }

    /// Each one's name and log.
    pub fn logs(&self) -> impl Iterator<Item = (&str, &Path)> {
        self.all.iter().map(|process| (process.name.as_str(), process.log.as_path()))
    }
}
