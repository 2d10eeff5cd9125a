//! The rounds: each program in turn, on the same machines, with the same file.

use std::{
    fs::{self, File},
    io::Read as _,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use shoal_benches::{
    ballast::Ballast,
    children_cpu_s,
    machine::Machine,
    net::{self, CONTROL},
    process::{self, Peaks},
    random_file,
};

use crate::{
    Args,
    bittorrent::{Aria2, Rqbit, Swarm},
    case::Setting,
    curl::Nginx,
    iroh,
    kind::Kind,
    libtorrent,
    report::{Outcome, Report, Table},
    shoal,
};

/// How often it is looked whether all are done, or something is ready.
pub(crate) const EVERY: Duration = Duration::from_millis(50);

/// How long a swarm may take.
pub(crate) const LIMIT: Duration = Duration::from_secs(900);

/// The tracker's port.
const TRACKER_PORT: u16 = 7_300;

/// What would have programs ask others than the swarm.
const PROXIES: [&str; 6] =
    ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"];

/// What a swarm is started on.
#[derive(Debug)]
pub(crate) struct Ground<'a> {
    /// The seed first.
    pub(crate) machines: &'a [Machine],
    /// What is brought to all; it lies alone in its directory.
    pub(crate) file: &'a Path,
    /// The swarm's own directory.
    pub(crate) dir: &'a Path,
    /// The program.
    pub(crate) program: &'a Path,
    /// The machine's memory while nobody needs it.
    pub(crate) ballast: &'a Ballast,
}

impl Ground<'_> {
    pub(crate) fn seed(&self) -> anyhow::Result<&Machine> {
        self.machines.first().context("there is no seed")
    }

    pub(crate) fn leechers(&self) -> &[Machine] {
        self.machines.get(1..).unwrap_or_default()
    }

    /// A command that runs the program on a machine.
    pub(crate) fn command(&self, machine: &Machine) -> Command {
        let mut command = machine.command(self.program);
        for proxy in PROXIES {
            command.env_remove(proxy);
        }
        command
    }

    /// Where what a process says is kept.
    pub(crate) fn log(&self, machine: &Machine) -> PathBuf {
        self.dir.join(format!("{}.log", machine.name))
    }

    /// A directory of a machine's own; it is made.
    pub(crate) fn own_dir(&self, machine: &Machine) -> anyhow::Result<PathBuf> {
        let dir = self.dir.join(&machine.name);
        fs::create_dir_all(&dir)?;
        Ok(dir)
    }

    /// The directory of the file.
    pub(crate) fn source(&self) -> anyhow::Result<PathBuf> {
        Ok(self.file.parent().context("a file without a directory")?.into())
    }

    pub(crate) fn file_name(&self) -> anyhow::Result<&str> {
        let name = self.file.file_name().and_then(|name| name.to_str());
        name.context("a file without a name")
    }

    /// Where each peer listens for others: at the first port of its machine.
    pub(crate) fn peers(&self) -> Vec<String> {
        self.machines.iter().map(|machine| machine.at(0)).collect()
    }

    /// Where the tracker listens: every machine reaches it, by no held line but its own.
    pub(crate) fn tracker(&self) -> String {
        let lined = self.machines.first().is_some_and(|seed| seed.namespace().is_some());
        format!("{}:{TRACKER_PORT}", if lined { CONTROL } else { "127.0.0.1" })
    }
}

/// A swarm that stands ready: the seed has the file, the leechers wait.
pub(crate) trait Contender {
    /// Has all leechers begin.
    fn go(&mut self) -> anyhow::Result<()>;

    /// Whether all of them have the file, verified if the program verifies.
    fn done(&mut self) -> anyhow::Result<bool>;

    /// How many bytes the seed has sent so far.
    fn uploaded_bytes(&mut self) -> anyhow::Result<u64>;

    /// The seed's processes.
    fn seed_pids(&self) -> Vec<u32>;

    /// The leechers' processes, once they have begun.
    fn leecher_pids(&self) -> Vec<u32>;

    /// What the leechers made, to be compared with the file; none if they made no files.
    fn files(&self) -> Vec<PathBuf>;
}

/// Runs all cases.
pub(crate) fn all(args: &Args) -> anyhow::Result<ExitCode> {
    // The lines' bridge stands beside a loopback that is set for each case.
    net::bridge()?;
    let root = tempfile::Builder::new().prefix("shoal-peers-").tempdir_in(&args.dir)?;
    let source = root.path().join("source");
    fs::create_dir(&source)?;
    let file = source.join("file");
    random_file(&file, args.size.as_u64())?;
    let hash = hash(&file)?;
    let ballast = Ballast::new(root.path())?;
    let mut report = Report::new(args)?;
    let mut number = 0;
    for case in &args.cases {
        let kinds = args.kinds(*case)?;
        for setting in case.settings(args) {
            let machines = setting.machines(number)?;
            number += 1;
            let mut table = Table::new(setting, &kinds);
            for round in 1..=args.rounds {
                for kind in &kinds {
                    let dir = root.path().join("run");
                    fs::create_dir(&dir)?;
                    let program = kind.program(&args.installed()?);
                    let ground = Ground {
                        machines: &machines,
                        file: &file,
                        dir: &dir,
                        program: &program,
                        ballast: &ballast,
                    };
                    let outcome = measure(args, *kind, setting, &hash, &ground);
                    fs::remove_dir_all(&dir)?;
                    say(*kind, &setting, round, &outcome);
                    table.add(*kind, outcome.map_err(|error| format!("{error:#}")));
                }
            }
            if !args.flags.json {
                println!("{table}\n");
            }
            report.settings.push(table);
        }
    }
    if args.flags.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        println!("Medians of {}. {}", args.rounds, report.versions());
    }
    Ok(if report.failed() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Says how far it is.
fn say(kind: Kind, setting: &Setting, round: usize, outcome: &anyhow::Result<Outcome>) {
    match outcome {
        Ok(outcome) => eprintln!(
            "{}, round {round}: {kind} {:.2} s, {:.2} CPU s/GB, {:.2} copies",
            setting.title(),
            outcome.wall_s,
            outcome.cpu_s_per_gb,
            outcome.seed_upload_copies
        ),
        Err(error) => eprintln!("{}, round {round}: {kind} failed: {error:#}", setting.title()),
    }
}

fn measure(
    args: &Args,
    kind: Kind,
    setting: Setting,
    hash: &blake3::Hash,
    ground: &Ground<'_>,
) -> anyhow::Result<Outcome> {
    let mut contender: Box<dyn Contender> = match kind {
        Kind::Shoal => return shoal::measure(&args.flags.shoal()?, ground, setting),
        Kind::Nginx => Box::new(Nginx::start(ground)?),
        Kind::Aria2 => Box::new(Swarm::start(Aria2, ground)?),
        Kind::Rqbit => Box::new(Swarm::start(Rqbit, ground)?),
        Kind::Libtorrent => Box::new(libtorrent::start(ground)?),
        Kind::Iroh => Box::new(iroh::start(ground)?),
    };
    ground.ballast.fill()?;
    let outcome = clock(contender.as_mut(), ground, setting)?;
    for made in contender.files() {
        let whole = self::hash(&made)? == *hash;
        ensure!(whole, "{} is not what the seed has", made.display());
    }
    Ok(outcome)
}

/// Has the leechers begin, and waits until the last is done.
fn clock(
    contender: &mut dyn Contender,
    ground: &Ground<'_>,
    setting: Setting,
) -> anyhow::Result<Outcome> {
    let sent = contender.uploaded_bytes()?;
    let line = line_bytes(ground)?;
    let cpu = cpu_s(contender)?;
    let start = Instant::now();
    contender.go()?;
    let (seed, leechers) = (contender.seed_pids(), contender.leecher_pids());
    let peaks = Peaks::watch([seed.clone(), leechers.clone()].concat());
    while !contender.done()? {
        ensure!(start.elapsed() < LIMIT, "it was not done after {} s", LIMIT.as_secs());
        thread::sleep(EVERY);
    }
    let wall_s = start.elapsed().as_secs_f64();
    let cpu_s = cpu_s(contender)? - cpu;
    let peaks = peaks.end();
    let line = line_bytes(ground)?.zip(line).map(|(after, before)| after - before);
    let sent = contender.uploaded_bytes()? - sent;
    let size = setting.size_bytes as f64;
    let peak = |pid: &u32| peaks.get(pid).copied().unwrap_or(0);
    Ok(Outcome {
        wall_s,
        cpu_s_per_gb: cpu_s / (size * setting.leechers as f64 / 1e9),
        seed_upload_copies: sent as f64 / size,
        seed_line_copies: line.map(|bytes| bytes as f64 / size),
        seed_peak_bytes: seed.iter().map(peak).sum(),
        leecher_peak_bytes: leechers.iter().map(peak).max().unwrap_or(0),
    })
}

/// What the seed's line has carried from it so far, if it has one.
pub(crate) fn line_bytes(ground: &Ground<'_>) -> anyhow::Result<Option<u64>> {
    let namespace = ground.seed()?.namespace();
    namespace.map(|name| Ok(net::carried(name)?.up_bytes)).transpose()
}

/// CPU time of all processes, of those that have ended too, in seconds.
fn cpu_s(contender: &dyn Contender) -> anyhow::Result<f64> {
    let running = [contender.seed_pids(), contender.leecher_pids()].concat();
    let running = running.into_iter().filter_map(|pid| process::usage(pid).ok());
    Ok(children_cpu_s()? + running.map(|usage| usage.cpu_s).sum::<f64>())
}

fn hash(path: &Path) -> anyhow::Result<blake3::Hash> {
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut hasher = blake3::Hasher::new();
    let mut chunk = vec![0; 1 << 20];
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(hasher.finalize()),
            length => hasher.update(&chunk[..length]),
        };
    }
}
