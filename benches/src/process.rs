//! What a process has used of the machine, by `/proc`.

use std::{
    collections::BTreeMap,
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::Context as _;

/// The kernel's unit of CPU time in `/proc`, as Linux shows it to every program: 1/100 s.
pub const TICKS_PER_SECOND: f64 = 100.0;

/// What a process has used so far.
#[derive(Debug, Clone, Copy)]
pub struct Usage {
    /// User and system time of all its threads, in seconds; to 10 ms.
    pub cpu_s: f64,
    /// Memory that is no file's, at this moment, in bytes.
    pub rss_anon_bytes: u64,
}

/// User and system time in the text of a `/proc/PID/stat`, in ticks.
#[must_use]
pub fn ticks(stat: &str) -> Option<u64> {
    // The name in parentheses may hold anything; utime and stime are the 14th and 15th fields (proc(5)).
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    Some(ticks()? + ticks()?)
}

/// What a process has used so far.
///
/// # Errors
/// When it has ended.
pub fn usage(pid: u32) -> anyhow::Result<Usage> {
    let read = |name: &str| {
        let path = format!("/proc/{pid}/{name}");
        fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))
    };
    let (stat, status) = (read("stat")?, read("status")?);
    let anon = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let anon = anon.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    Ok(Usage {
        cpu_s: ticks(&stat).context("no CPU time")? as f64 / TICKS_PER_SECOND,
        rss_anon_bytes: anon.context("no RssAnon")? << 10,
    })
}

/// The numbers of a process's children; not of those that its other threads started.
///
/// # Errors
/// When it has ended.
pub fn children(pid: u32) -> anyhow::Result<Vec<u32>> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let children = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    children.split_whitespace().map(|child| Ok(child.parse()?)).collect()
}

/// How often memory is looked at.
const SAMPLE_EVERY: Duration = Duration::from_millis(20);

/// Watches how much memory that is no file's some processes hold, and keeps the most of each.
#[derive(Debug)]
pub struct Peaks {
    over: Arc<AtomicBool>,
    watcher: JoinHandle<BTreeMap<u32, u64>>,
}

impl Peaks {
    /// Begins. A process may end meanwhile.
    #[must_use]
    pub fn watch(pids: Vec<u32>) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let ended = over.clone();
        let watcher = thread::spawn(move || {
            let mut most = BTreeMap::new();
            while !ended.load(Ordering::Relaxed) {
                for pid in &pids {
                    let held = usage(*pid).map_or(0, |usage| usage.rss_anon_bytes);
                    let most = most.entry(*pid).or_default();
                    *most = held.max(*most);
                }
                thread::sleep(SAMPLE_EVERY);
            }
            most
        });
        Self { over, watcher }
    }

    /// Ends, and gives the most that each process held, in bytes.
    #[must_use]
    pub fn end(self) -> BTreeMap<u32, u64> {
        self.over.store(true, Ordering::Relaxed);
        self.watcher.join().unwrap_or_default()
    }
}
