//! The processes of a build, and how all of them end.
//!
//! A process group is not enough: what a build starts may leave it. So its processes are found by three signs
//! and by descent from what has them: the group, a variable that children inherit, and, while only one
//! build runs, that they are orphans of this process, their *subreaper*.

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use rustix::process::{
    Pid, Signal, WaitOptions, getpid, kill_process, set_child_subreaper, waitpid,
};

/// The variable that marks all processes of a build, however far they went.
pub(crate) const MARK: &str = "SHOAL_BUILD_DIR";

/// For how long processes are looked for and killed. One that is left then hangs in the kernel.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// How long processes have to be gone before they are looked for again.
const LOOK_INTERVAL: Duration = Duration::from_millis(2);

/// What the processes of a build are known by.
pub(crate) struct Signs<'a> {
    /// The build's directory, or one that holds those of several: what [`MARK`] says.
    pub(crate) dir: &'a Path,
    /// The leader of the process group.
    pub(crate) leader: Option<Pid>,
    /// Whether orphans of this process count. Only where it has no other children than this build's.
    pub(crate) orphans: bool,
}

/// Makes orphans of builds come to this process, which must then end builds with [`Signs::orphans`].
pub(crate) fn adopt_orphans() {
    if let Err(error) = set_child_subreaper(Some(getpid())) {
        tracing::warn!(%error, "a process that hides its origin may stay after its build");
    }
}

/// One process as `/proc` shows it.
struct Seen {
    pid: Pid,
    parent: i32,
    group: i32,
    is_dead: bool,
}

fn look(pid: i32) -> Option<Seen> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name is in parentheses and may hold anything, so count from its end.
    let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace();
    Some(Seen {
        pid: Pid::from_raw(pid)?,
        is_dead: matches!(fields.next()?, "Z" | "X"),
        parent: fields.next()?.parse().ok()?,
        group: fields.next()?.parse().ok()?,
    })
}

fn raw(pid: Pid) -> i32 {
    pid.as_raw_nonzero().get()
}

impl Signs<'_> {
    fn is_marked(&self, pid: Pid) -> bool {
        let environment = fs::read(format!("/proc/{}/environ", raw(pid))).unwrap_or_default();
        let mark = format!("{MARK}={}", self.dir.display());
        environment.split(|byte| *byte == 0).any(|variable| {
            let rest = variable.strip_prefix(mark.as_bytes());
            rest.is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
        })
    }

    /// The living processes with these signs and what descends from them. Buries dead orphans.
    fn find(&self) -> Vec<Pid> {
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let all: Vec<Seen> =
            entries.filter_map(|entry| look(entry.file_name().to_str()?.parse().ok()?)).collect();
        let me = raw(getpid());
        let mut found = BTreeSet::new();
        for seen in all.iter().filter(|seen| raw(seen.pid) != me) {
            let is_leader = self.leader == Some(seen.pid);
            let is_orphan = self.orphans && seen.parent == me && !is_leader;
            if is_orphan && seen.is_dead {
                // The leader's end is waited for where it was started; nobody waits for these.
                let _ = waitpid(Some(seen.pid), WaitOptions::NOHANG);
            }
            let in_group = self.leader.is_some_and(|leader| raw(leader) == seen.group);
            if is_orphan || in_group || self.is_marked(seen.pid) {
                found.insert(raw(seen.pid));
            }
        }
        loop {
            let before = found.len();
            found.extend(
                all.iter()
                    .filter(|s| found.contains(&s.parent))
                    .map(|s| raw(s.pid))
                    .collect::<Vec<_>>(),
            );
            if found.len() == before {
                break;
            }
        }
        let living = all.iter().filter(|seen| !seen.is_dead && found.contains(&raw(seen.pid)));
        living.map(|seen| seen.pid).collect()
    }
}

/// Kills every process with these signs until none is left; returns how many there were. Blocks, shortly.
pub(crate) fn end(signs: &Signs<'_>) -> usize {
    let begun = Instant::now();
    let mut killed = BTreeSet::new();
    loop {
        let living = signs.find();
        if living.is_empty() {
            return killed.len();
        }
        if begun.elapsed() > END_TIMEOUT {
            tracing::error!(processes = ?living, "processes of a build cannot be ended");
            return killed.len();
        }
        for pid in living {
            // Gone by itself, or to be seen again.
            let _ = kill_process(pid, Signal::KILL);
            killed.insert(raw(pid));
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
}
