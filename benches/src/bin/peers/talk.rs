//! Peers that are driven by lines: `ready`, `go`, `done`, `uploaded`. For libraries, which have no program of their own.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    thread,
    time::Duration,
};

use anyhow::Context as _;
use shoal_benches::{machine::Machine, processes::Processes};

use crate::{
    run::{Contender, EVERY, Ground},
    torrent::Tracker,
};

/// How long a peer may take to say a line, but for `done`.
const TIMEOUT: Duration = Duration::from_secs(120);

/// What is said to a process, and what it says.
#[derive(Debug)]
struct Talk {
    name: String,
    input: ChildStdin,
    lines: Receiver<String>,
    done: bool,
}

impl Talk {
    fn start(
        processes: &mut Processes,
        name: &str,
        log: &Path,
        command: &mut Command,
    ) -> anyhow::Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(File::create(log)?);
        let mut child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        processes.add(name, log, child);
        let (input, output) = pipes.context("a process without pipes")?;
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self { name: name.into(), input, lines, done: false })
    }

    fn say(&mut self, line: &str) -> anyhow::Result<()> {
        writeln!(self.input, "{line}").with_context(|| format!("{} does not listen", self.name))
    }

    fn hear(&self) -> anyhow::Result<String> {
        self.lines.recv_timeout(TIMEOUT).with_context(|| format!("{} says nothing", self.name))
    }
}

/// A swarm of such peers.
pub(crate) struct Talkers {
    processes: Processes,
    seed: Talk,
    leechers: Vec<Talk>,
    /// Where a leecher puts the file, below its directory, if it is a file.
    file: Option<PathBuf>,
    dir: PathBuf,
    _tracker: Option<Tracker>,
}

impl Talkers {
    /// Starts them, the seed first, each by its command.
    pub(crate) fn start(
        ground: &Ground<'_>,
        file: Option<PathBuf>,
        tracker: Option<Tracker>,
        command: impl Fn(&Machine) -> anyhow::Result<Command>,
    ) -> anyhow::Result<Self> {
        let mut processes = Processes::default();
        let mut start = |machine: &Machine| {
            let log = ground.log(machine);
            Talk::start(&mut processes, &machine.name, &log, &mut command(machine)?)
        };
        let seed = start(ground.seed()?)?;
        let ready = seed.hear();
        let leechers = ready.and_then(|_| ground.leechers().iter().map(start).collect());
        let leechers: anyhow::Result<Vec<Talk>> = leechers.and_then(|leechers: Vec<Talk>| {
            for leecher in &leechers {
                leecher.hear()?;
            }
            Ok(leechers)
        });
        // A process that has ended says better why.
        let leechers = leechers.or_else(|error| processes.check().and(Err(error)))?;
        if let Some(tracker) = &tracker {
            processes
                .wait("the seed to announce itself", EVERY, TIMEOUT, || Ok(tracker.known() == 1))?;
        }
        let dir = ground.dir.into();
        Ok(Self { processes, seed, leechers, file, dir, _tracker: tracker })
    }
}

impl Contender for Talkers {
    fn go(&mut self) -> anyhow::Result<()> {
        self.leechers.iter_mut().try_for_each(|leecher| leecher.say("go"))
    }

    fn done(&mut self) -> anyhow::Result<bool> {
        self.processes.check()?;
        for leecher in &mut self.leechers {
            leecher.done |= leecher.lines.try_recv().is_ok();
        }
        Ok(self.leechers.iter().all(|leecher| leecher.done))
    }

    fn uploaded_bytes(&mut self) -> anyhow::Result<u64> {
        self.seed.say("uploaded")?;
        let said = self.seed.hear()?;
        said.parse().with_context(|| format!("{said} is no number of bytes"))
    }

    fn seed_pids(&self) -> Vec<u32> {
        self.processes.pid(&self.seed.name).into_iter().collect()
    }

    fn leecher_pids(&self) -> Vec<u32> {
        self.leechers.iter().filter_map(|leecher| self.processes.pid(&leecher.name)).collect()
    }

    fn files(&self) -> Vec<PathBuf> {
        let Some(file) = &self.file else {
            return Vec::new();
        };
        self.leechers.iter().map(|leecher| self.dir.join(&leecher.name).join(file)).collect()
    }
}
