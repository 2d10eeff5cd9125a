//! Processes that were started for a job, and how all of them end.
//!
//! A process group is not enough: what a build starts may leave its group or its session. So a job's
//! processes are found by three signs: the group, a marker in the environment that children inherit,
//! and descent. Orphans come to the worker, which is their *subreaper*, so that descent is never lost. Each is
//! signalled through a pidfd after a second look, so that no other process that was given the same number
//! is hit.

use std::{
    collections::BTreeSet,
    fs, io,
    path::Path,
    process::ExitStatus,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, getpid, pidfd_open, pidfd_send_signal,
    set_child_subreaper, waitpid,
};
use serde::{Deserialize, Serialize};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};

/// The variable that marks a job's processes.
pub(crate) const MARKER: &str = "SHOAL_BUILD";

/// How often it is looked whether processes that were signalled are gone.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// For how long SIGKILL is repeated. A process that is left then hangs in the kernel, and nothing helps.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// The most of a process's environment that is searched for the marker, in bytes.
const ENVIRONMENT_MAX_BYTES: u64 = 256 << 10;

/// Children that this process started itself and waits for itself; any other child is an orphan of a build.
static OWN: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

/// Jobs with processes. Only while there is no other may an orphan without a marker be counted to one.
static TREES: AtomicUsize = AtomicUsize::new(0);

fn own() -> MutexGuard<'static, BTreeSet<i32>> {
    OWN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes orphans of builds come to this process.
pub(crate) fn adopt_orphans() {
    if let Err(error) = set_child_subreaper(Some(getpid())) {
        tracing::warn!(%error, "processes that leave a build's group and clear their environment may stay");
    }
}

/// One process as `/proc` shows it.
#[derive(Debug, Clone, Copy)]
struct Seen {
    pid: i32,
    parent: i32,
    group: i32,
    zombie: bool,
    /// When it started, in clock ticks since the machine did.
    started: u64,
}

fn look(pid: i32) -> Option<Seen> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name is in parentheses and may hold anything, so count from its end.
    let rest = &stat[stat.rfind(')')? + 1..];
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    Some(Seen {
        pid,
        zombie: matches!(*fields.first()?, "Z" | "X"),
        parent: fields.get(1)?.parse().ok()?,
        group: fields.get(2)?.parse().ok()?,
        started: fields.get(19)?.parse().ok()?,
    })
}

fn all() -> Vec<Seen> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| look(entry.file_name().to_str()?.parse().ok()?)).collect()
}

fn is_marked(pid: i32, marker: &str) -> bool {
    use io::Read as _;
    let Ok(file) = fs::File::open(format!("/proc/{pid}/environ")) else { return false };
    let mut bytes = Vec::new();
    if file.take(ENVIRONMENT_MAX_BYTES).read_to_end(&mut bytes).is_err() {
        return false;
    }
    let wanted = format!("{MARKER}={marker}");
    bytes.split(|byte| *byte == 0).any(|variable| variable == wanted.as_bytes())
}

fn signal(seen: &Seen, signal: Signal) {
    let Some(pid) = Pid::from_raw(seen.pid) else { return };
    // Gone, or no permission: the next look tells.
    let Ok(handle) = pidfd_open(pid, PidfdFlags::empty()) else { return };
    if look(seen.pid).is_some_and(|now| now.started == seen.started) {
        let _ = pidfd_send_signal(handle, signal);
    }
}

/// Takes the ends of dead orphans, which nobody else waits for.
fn bury(seen: &[Seen], own: &BTreeSet<i32>) {
    let me = getpid().as_raw_nonzero().get();
    for orphan in seen.iter().filter(|p| p.zombie && p.parent == me && !own.contains(&p.pid)) {
        let _ = waitpid(Pid::from_raw(orphan.pid), WaitOptions::NOHANG);
    }
}

/// What a job's processes are known by; kept in a file beside its checkout for the next start of a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Signs {
    /// The value of [`MARKER`].
    pub(crate) marker: String,
    /// The leader of the process group; 0 before it was started.
    pub(crate) leader: i32,
    /// When it started, in clock ticks since the machine did.
    pub(crate) started: u64,
    /// Which start of the machine that was.
    pub(crate) boot: String,
}

fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().into()
}

impl Signs {
    /// Living processes with these signs; `orphans` says whether unmarked orphans count too.
    fn find(&self, orphans: bool) -> Vec<Seen> {
        // Held over the whole look: a child that is just being started is in the set or not there yet.
        let own = own();
        let seen = all();
        bury(&seen, &own);
        let me = getpid().as_raw_nonzero().get();
        let mut found: BTreeSet<i32> = BTreeSet::new();
        for process in &seen {
            let in_group = self.leader > 1
                && process.group == self.leader
                && process.started >= self.started;
            let orphan = orphans && process.parent == me && !own.contains(&process.pid);
            if process.pid != me && (in_group || orphan || is_marked(process.pid, &self.marker)) {
                found.insert(process.pid);
            }
        }
        // And all that descends from them: parents may come after children in the list.
        loop {
            let before = found.len();
            for process in &seen {
                if found.contains(&process.parent) && !own.contains(&process.pid) {
                    found.insert(process.pid);
                }
            }
            if found.len() == before {
                break;
            }
        }
        seen.into_iter().filter(|process| !process.zombie && found.contains(&process.pid)).collect()
    }

    async fn look_for(&self, orphans: bool) -> Vec<Seen> {
        let signs = self.clone();
        tokio::task::spawn_blocking(move || signs.find(orphans)).await.unwrap_or_default()
    }

    /// Ends everything with these signs: SIGTERM, and SIGKILL to what is left after `grace`. Returns how
    /// many processes were found, or the number of one that could not be ended.
    async fn end(&self, grace: Duration, orphans: bool) -> Result<usize, i32> {
        let begun = Instant::now();
        let first = self.look_for(orphans).await;
        let mut left = first.clone();
        if !grace.is_zero() {
            left.iter().for_each(|process| signal(process, Signal::TERM));
            while !left.is_empty() && begun.elapsed() < grace {
                sleep(LOOK_INTERVAL).await;
                left = self.look_for(orphans).await;
            }
        }
        let killing = Instant::now();
        while let Some(process) = left.first() {
            if killing.elapsed() > KILL_TIMEOUT {
                return Err(process.pid);
            }
            left.iter().for_each(|process| signal(process, Signal::KILL));
            sleep(LOOK_INTERVAL).await;
            left = self.look_for(orphans).await;
        }
        Ok(first.len())
    }

    /// Ends what an earlier worker left; what is not of this start of the machine is gone anyway.
    pub(crate) async fn end_leftovers(&self) -> Result<usize, i32> {
        if self.boot != boot_id() {
            return Ok(0);
        }
        self.end(Duration::ZERO, false).await
    }
}

/// A command of a job, its group, and everything that came of it.
pub(crate) struct Tree {
    child: Child,
    signs: Signs,
    ended: bool,
}

impl Tree {
    /// Starts `command` as the leader of a group of its own, marked with `marker`. `file` is where its
    /// [`Signs`] are kept.
    ///
    /// # Errors
    /// Those of starting a program and of writing the file.
    pub(crate) fn start(command: &mut Command, marker: &str, file: Option<&Path>) -> io::Result<Self> {
        let mut signs =
            Signs { marker: marker.into(), leader: 0, started: 0, boot: boot_id() };
        if let Some(file) = file {
            // Written before the start too: a worker that is killed in between still leaves the marker.
            fs::write(file, serde_json::to_vec(&signs)?)?;
        }
        command.env(MARKER, marker).process_group(0);
        let child = {
            let mut own = own();
            let child = command.spawn()?;
            own.extend(child.id().and_then(|pid| i32::try_from(pid).ok()));
            child
        };
        TREES.fetch_add(1, Ordering::SeqCst);
        let leader = child.id().and_then(|pid| i32::try_from(pid).ok()).unwrap_or(0);
        signs.leader = leader;
        signs.started = look(leader).map_or(0, |seen| seen.started);
        let tree = Self { child, signs, ended: false };
        if let Some(file) = file {
            fs::write(file, serde_json::to_vec(&tree.signs)?)?;
        }
        Ok(tree)
    }

    /// Waits for the leader. Others of the tree may still be there: see [`Tree::end`].
    pub(crate) async fn wait(&mut self) -> io::Result<ExitStatus> {
        let status = self.child.wait().await?;
        own().remove(&self.signs.leader);
        Ok(status)
    }

    /// Ends the whole tree and returns when nothing of it is left; `grace` lies between SIGTERM and SIGKILL,
    /// none when it is zero.
    pub(crate) async fn end(&mut self, grace: Duration) {
        let orphans = TREES.load(Ordering::SeqCst) == 1;
        let ended = self.signs.end(grace, orphans).await;
        let _ = self.wait().await;
        // The leader's death may have made orphans after the last look.
        let again = self.signs.end(Duration::ZERO, orphans).await;
        if let Err(pid) = ended.and(again) {
            tracing::error!(pid, "a process of a build cannot be ended");
        }
        self.ended = true;
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        TREES.fetch_sub(1, Ordering::SeqCst);
        if !self.ended {
            // The job's task was dropped or panicked: no time for grace.
            self.signs.find(false).iter().for_each(|process| signal(process, Signal::KILL));
            let _ = self.child.start_kill();
            own().remove(&self.signs.leader);
        }
    }
}

/// Living processes with the marker; for tests.
#[cfg(test)]
pub(crate) fn marked(marker: &str) -> Vec<i32> {
    all().iter().filter(|p| !p.zombie && is_marked(p.pid, marker)).map(|p| p.pid).collect()
}

/// Whether `pid` is a living process; for tests.
#[cfg(test)]
pub(crate) fn is_alive(pid: i32) -> bool {
    look(pid).is_some_and(|seen| !seen.zombie)
}
