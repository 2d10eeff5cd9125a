//! The demo's processes: started, watched, and ended for certain.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{Read as _, Seek as _, SeekFrom},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde::{Deserialize, Serialize};
use tokio::process::{Child, Command};

/// How long a process may take until it is ready.
const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// How often something that is waited for on this machine is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// How long processes have to end after SIGTERM, before they are killed: the coordinator gives its open
/// requests 6 s.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// How much of a log is read for its last lines, in bytes.
const TAIL_BYTES: u64 = 4_096;

/// How many of its last lines are shown.
const TAIL_LINES: usize = 12;

/// A process on this machine, told from a later one with the same number by when it was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Alive {
    pid: i32,
    /// In clock ticks since boot.
    start_time: u64,
}

impl Alive {
    fn of(pid: i32) -> Option<Self> {
        Some(Self { pid, start_time: start_time(pid)? })
    }

    /// Reads a program's pid file, as the agent writes it: its number and its start time.
    fn read(pid_file: &Path) -> Option<Self> {
        let text = fs::read_to_string(pid_file).ok()?;
        let mut fields = text.split_whitespace();
        let pid = fields.next()?.parse().ok()?;
        Some(Self { pid, start_time: fields.next()?.parse().ok()? })
    }

    fn is_alive(self) -> bool {
        start_time(self.pid) == Some(self.start_time)
    }

    /// SIGTERM to it alone.
    fn terminate(self) {
        if let (true, Some(pid)) = (self.is_alive(), Pid::from_raw(self.pid)) {
            let _ = kill_process(pid, Signal::TERM);
        }
    }

    /// A signal to the process group that it leads.
    fn signal_group(self, signal: Signal) {
        if let (true, Some(pid)) = (self.is_alive(), Pid::from_raw(self.pid)) {
            let _ = kill_process_group(pid, signal);
        }
    }
}

/// When `pid` was started; none when it is gone or only waits to be reaped.
fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold spaces and brackets: the fields are counted from behind it.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    (state != "Z" && state != "X").then_some(())?;
    fields.nth(18)?.parse().ok()
}

async fn wait_until_gone(processes: &[Alive], limit: Duration) -> bool {
    let start = Instant::now();
    while processes.iter().any(|process| process.is_alive()) {
        if start.elapsed() > limit {
            return false;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    true
}

/// Ends processes, then the programs that agents started and that run on by design: their pid files are
/// under each of `agent_data_dirs`.
pub(super) async fn stop_all(processes: &[Alive], agent_data_dirs: &[PathBuf]) {
    processes.iter().for_each(|process| process.terminate());
    if !wait_until_gone(processes, STOP_TIMEOUT).await {
        processes.iter().for_each(|process| process.signal_group(Signal::KILL));
        wait_until_gone(processes, STOP_TIMEOUT).await;
    }
    // Only now: an agent would start its program again.
    let programs: Vec<_> = agent_data_dirs.iter().flat_map(|dir| programs(dir)).collect();
    programs.iter().for_each(|program| program.signal_group(Signal::TERM));
    if !wait_until_gone(&programs, Duration::from_secs(2)).await {
        programs.iter().for_each(|program| program.signal_group(Signal::KILL));
        wait_until_gone(&programs, STOP_TIMEOUT).await;
    }
}

/// The programs that an agent has started.
fn programs(data_dir: &Path) -> Vec<Alive> {
    let Ok(apps) = fs::read_dir(data_dir.join("run")) else { return Vec::new() };
    apps.flatten().filter_map(|app| Alive::read(&app.path().join("pid"))).collect()
}

/// One of Shoal's processes. Killed when dropped, unless it is to outlive the demo.
pub(super) struct Process {
    pub(super) name: String,
    pub(super) alive: Alive,
    dir: PathBuf,
    child: Child,
}

impl Process {
    /// Starts `shoal ROLE --config DIR/config.toml`, its log in `DIR/log`.
    pub(super) fn start(role: &str, name: &str, dir: &Path, keep: bool) -> anyhow::Result<Self> {
        let log = File::options().create(true).append(true).open(dir.join("log"))?;
        let mut command = Command::new(std::env::current_exe()?);
        if !keep {
            // Closed by the kernel whatever becomes of the demo.
            command.arg("--stop-with-stdin");
        }
        if role == "agent" {
            // Agents hold no credentials of a bucket: they get URLs with their leases.
            let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
            for name in names.filter(|name| name.starts_with("AWS_") || name.starts_with("GOOGLE_"))
            {
                command.env_remove(name);
            }
        }
        let child = command
            .arg(role)
            .arg("--config")
            .arg(dir.join("config.toml"))
            .env_remove("SHOAL_COORDINATOR")
            .env_remove("SHOAL_IDENTITY")
            .stdin(if keep { Stdio::null() } else { Stdio::piped() })
            .stdout(log.try_clone()?)
            .stderr(log)
            // An interrupt from the terminal is for the demo, which ends them in order.
            .process_group(0)
            .kill_on_drop(!keep)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let alive = child.id().and_then(|pid| Alive::of(pid.cast_signed()));
        let alive = alive.with_context(|| format!("{name} ended at once"))?;
        Ok(Self { name: name.into(), alive, dir: dir.into(), child })
    }

    pub(super) fn data_dir(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// Waits until it is ready, and returns where it listens.
    pub(super) async fn addresses(&mut self) -> anyhow::Result<Addresses> {
        let start = Instant::now();
        let path = self.data_dir().join("addresses.json");
        loop {
            self.check()?;
            if let Ok(bytes) = fs::read(&path) {
                let map: BTreeMap<String, Option<SocketAddr>> = serde_json::from_slice(&bytes)
                    .with_context(|| format!("{} is not as expected", path.display()))?;
                return Ok(Addresses { name: self.name.clone(), map });
            }
            if start.elapsed() > READY_TIMEOUT {
                let limit = READY_TIMEOUT.as_secs();
                return Err(self.failed(format!("was not ready after {limit} s")));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// An error when it has ended.
    pub(super) fn check(&mut self) -> anyhow::Result<()> {
        if let Some(status) = self.child.try_wait()? {
            return Err(self.failed(format!("ended ({status})")));
        }
        Ok(())
    }

    /// What went wrong with it, and the end of its log.
    fn failed(&self, what: String) -> anyhow::Error {
        let path = self.dir.join("log");
        let read = || -> std::io::Result<String> {
            let mut file = File::open(&path)?;
            let len = file.metadata()?.len();
            file.seek(SeekFrom::Start(len.saturating_sub(TAIL_BYTES)))?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        let log = read().unwrap_or_default();
        // A process's last word is why it ended.
        let why = log.lines().next_back().and_then(|line| line.strip_prefix("shoal: "));
        let why = why.map(|why| format!(": {why}")).unwrap_or_default();
        Failed { what: format!("{} {what}{why}", self.name), log: tail(&log) }.into()
    }

    /// Its anonymous resident memory in bytes.
    pub(super) fn rss_anon_bytes(&self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.alive.pid)).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
        Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1_024)
    }
}

/// What went wrong in a line, and the end of the log that may say why.
#[derive(Debug)]
pub(super) struct Failed {
    pub(super) what: String,
    pub(super) log: String,
}

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Failed {}

/// The last lines of a log, indented.
pub(super) fn tail(log: &str) -> String {
    let lines: Vec<_> = log.lines().collect();
    let last = &lines[lines.len().saturating_sub(TAIL_LINES)..];
    last.iter().map(|line| format!("  | {line}\n")).collect()
}

/// Where a process listens, by what for.
pub(super) struct Addresses {
    name: String,
    map: BTreeMap<String, Option<SocketAddr>>,
}

impl Addresses {
    pub(super) fn get(&self, what: &str) -> anyhow::Result<SocketAddr> {
        let found = self.map.get(what).copied().flatten();
        found.with_context(|| format!("{} does not say its {what} address", self.name))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt as _;

    use super::*;

    #[tokio::test]
    async fn processes_and_programs_are_ended() {
        let dir = tempfile::tempdir().unwrap();
        let sleep = || {
            let mut command = std::process::Command::new("sh");
            command.args(["-c", "trap '' TERM; while :; do sleep 0.1; done"]).process_group(0);
            command.spawn().unwrap()
        };
        let mut program = sleep();
        let alive = Alive::of(program.id().cast_signed()).unwrap();
        let run = dir.path().join("run/demo");
        fs::create_dir_all(&run).unwrap();
        fs::write(run.join("pid"), format!("{} {}\n", alive.pid, alive.start_time)).unwrap();
        // Another life's pid file: its number belongs to somebody else by now.
        let other = dir.path().join("run/other");
        fs::create_dir_all(&other).unwrap();
        fs::write(other.join("pid"), format!("{} 1\n", std::process::id())).unwrap();
        stop_all(&[], &[dir.path().to_path_buf()]).await;
        assert!(!program.wait().unwrap().success());
        assert!(!alive.is_alive());
    }
}
