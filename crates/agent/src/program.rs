//! An app's program: a process of its own process group that outlives the agent, found again by its pid and start time.

use std::{
    fs::{self, File},
    io,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::{process::Command, sync::watch};

/// How often a process that is not this agent's child is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// A program's log is started anew above this length; the one before is kept beside it.
const LOG_MAX_BYTES: u64 = 64 << 20;

/// How a program ended, as far as it can be known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// It exited with this status.
    Status(ExitStatus),
    /// It is gone; it was started by an earlier life of the agent, so nobody knows how.
    Unknown,
}

impl Ended {
    /// Whether it ended by itself and well.
    pub(crate) fn is_success(self) -> bool {
        matches!(self, Self::Status(status) if status.success())
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unknown => f.write_str("the program is gone"),
            Self::Status(status) => match (status.code(), status.signal()) {
                (Some(code), _) => write!(f, "the program exited with {code}"),
                (None, Some(signal)) => write!(f, "the program was killed by signal {signal}"),
                (None, None) => f.write_str("the program ended"),
            },
        }
    }
}

/// A started program.
#[derive(Clone)]
pub(crate) struct Program {
    pid: i32,
    start_time: u64,
    /// Set when this agent's own child has ended; none for an adopted one.
    ended: Option<watch::Receiver<Option<ExitStatus>>>,
    pid_file: PathBuf,
}

/// When `pid` was started, in clock ticks since boot; none when it is gone or a zombie.
fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold spaces and brackets: the fields are counted from behind it.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    (state != "Z" && state != "X").then_some(())?;
    fields.nth(18)?.parse().ok()
}

impl Program {
    /// Starts `command` in `run_dir`, with its output in `run_dir/log` and its pid in `run_dir/pid`.
    pub(crate) fn start(mut command: Command, run_dir: &Path) -> io::Result<Self> {
        let log_path = run_dir.join("log");
        if fs::metadata(&log_path).is_ok_and(|log| log.len() > LOG_MAX_BYTES) {
            fs::rename(&log_path, run_dir.join("log.1"))?;
        }
        let log = File::options().create(true).append(true).open(&log_path)?;
        command
            .current_dir(run_dir)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .kill_on_drop(false);
        let mut child = command.spawn()?;
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).ok_or(io::ErrorKind::Other)?;
        // Not reaped yet, so the pid cannot be anybody else's.
        let start_time = start_time(pid).unwrap_or(0);
        let pid_file = run_dir.join("pid");
        let recorded =
            shoal_process::write_atomic(&pid_file, format!("{pid} {start_time}\n").as_bytes());
        if let Err(error) = recorded {
            // A program that nobody could find again must not run.
            if let Some(group) = Pid::from_raw(pid) {
                let _ = kill_process_group(group, Signal::KILL);
            }
            return Err(error);
        }
        let (sender, ended) = watch::channel(None);
        tokio::spawn(async move {
            if let Ok(status) = child.wait().await {
                sender.send_replace(Some(status));
            }
        });
        Ok(Self { pid, start_time, ended: Some(ended), pid_file })
    }

    /// Finds the program that an earlier life of the agent started, if it still runs.
    pub(crate) fn adopt(run_dir: &Path) -> Option<Self> {
        let pid_file = run_dir.join("pid");
        let text = fs::read_to_string(&pid_file).ok()?;
        let mut fields = text.split_whitespace();
        let pid = fields.next()?.parse().ok()?;
        let recorded = fields.next()?.parse().ok()?;
        let program = Self { pid, start_time: recorded, ended: None, pid_file };
        (start_time(pid) == Some(recorded)).then_some(program)
    }

    /// Waits until it has ended.
    pub(crate) async fn ended(&self) -> Ended {
        if let Some(ended) = &self.ended
            && let Ok(status) = ended.clone().wait_for(Option::is_some).await
            && let Some(status) = *status
        {
            return Ended::Status(status);
        }
        while start_time(self.pid) == Some(self.start_time) {
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
        Ended::Unknown
    }

    /// Ends it: SIGTERM to its group, and SIGKILL after `patience`.
    pub(crate) async fn stop(self, patience: Duration) {
        let Some(group) = Pid::from_raw(self.pid) else { return };
        if start_time(self.pid) == Some(self.start_time) {
            let _ = kill_process_group(group, Signal::TERM);
            if tokio::time::timeout(patience, self.ended()).await.is_err() {
                tracing::warn!(pid = self.pid, "the program does not end: killed");
                let _ = kill_process_group(group, Signal::KILL);
                self.ended().await;
            }
        }
        // What it started in its group goes with it. While the group has a member its number is given to
        // nobody else; a process that has the number now and began at another time is somebody else's.
        if start_time(self.pid).is_none_or(|since| since == self.start_time) {
            let _ = kill_process_group(group, Signal::KILL);
        }
        let _ = fs::remove_file(&self.pid_file);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[tokio::test]
    async fn a_program_is_found_again_and_its_whole_group_ends() {
        let dir = tempfile::tempdir().unwrap();
        let started = Program::start(shell("sleep 1000 & echo ready; wait"), dir.path()).unwrap();
        while fs::read_to_string(dir.path().join("log")).unwrap() != "ready\n" {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let adopted = Program::adopt(dir.path()).expect("it runs");
        assert_eq!(adopted.pid, started.pid);
        adopted.stop(Duration::from_secs(5)).await;
        assert!(matches!(started.ended().await, Ended::Status(status) if !status.success()));
        assert!(Program::adopt(dir.path()).is_none());
    }

    #[tokio::test]
    async fn one_that_ignores_sigterm_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        let script = "trap '' TERM; echo ready; while :; do sleep 0.05; done";
        let program = Program::start(shell(script), dir.path()).unwrap();
        while fs::read_to_string(dir.path().join("log")).unwrap() != "ready\n" {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        program.clone().stop(Duration::from_millis(100)).await;
        assert!(
            matches!(program.ended().await, Ended::Status(status) if status.signal() == Some(9))
        );
    }

    #[tokio::test]
    async fn a_pid_that_belongs_to_another_process_by_now_is_not_adopted() {
        let dir = tempfile::tempdir().unwrap();
        let me = std::process::id();
        fs::write(dir.path().join("pid"), format!("{me} 1\n")).unwrap();
        assert!(Program::adopt(dir.path()).is_none());
    }
}
