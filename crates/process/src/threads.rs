//! No more threads at work than the work needs.
//!
//! A runtime with a thread for each processor wakes a second one whenever two things happen at once: it finds little to do, its
//! cache is cold, and what it wakes for would have been done as soon by the first. On two processors that costs
//! eight agents a tenth of their CPU, and it is the machine's own work that such CPU is taken from. So all threads but one are held
//! back. One more is let go when those at work are busy and the machine has a processor free, or when they do not answer, as a
//! thread that waits for a disk does not; later it is held back again.

use std::{
    fs,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use nix::sys::{
    resource::{UsageWho, getrusage},
    time::TimeValLike as _,
};
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio_util::sync::CancellationToken;

/// How often threads and processors are looked at. Who does not answer from one time to the next is stuck.
const TICK: Duration = Duration::from_millis(100);

/// Threads that use so much of a processor each have all they can do.
const BUSY: f64 = 0.85;

/// One thread fewer is enough when all of them use so much of it.
const CALM: f64 = 0.6;

/// Another thread needs so much of a processor that nobody uses.
const FREE: f64 = 0.5;

/// A thread that was let go stays for so long after it was last needed.
const STAY: Duration = Duration::from_secs(2);

/// One that was let go because others were stuck stays longer, each time twice as long as the time before, up to...
const STUCK_STAY: Duration = Duration::from_secs(10);

/// ...this.
const STUCK_STAY_MAX: Duration = Duration::from_secs(600);

/// Holds back all threads of the runtime that it is called in but one, until `token` is cancelled, and lets them go as they are
/// needed. A runtime of one thread, or of the caller's, is left as it is.
///
/// # Errors
/// When the thread that watches over them cannot be started.
pub fn hold_spare_threads(token: CancellationToken) -> std::io::Result<()> {
    let runtime = Handle::current();
    let threads = runtime.metrics().num_workers();
    if runtime.runtime_flavor() != RuntimeFlavor::MultiThread || threads < 2 {
        return Ok(());
    }
    let watch = move || {
        let held = Arc::<Held>::default();
        let answered = Arc::new(AtomicBool::new(true));
        let mut governor = Governor::new(threads);
        let mut cpu = cpu_time();
        let mut at = Instant::now();
        while !token.is_cancelled() {
            held.hold(threads - governor.at_work, &runtime);
            answered.store(false, Ordering::Relaxed);
            runtime.spawn({
                let answered = answered.clone();
                async move { answered.store(true, Ordering::Relaxed) }
            });
            thread::sleep(TICK);
            let (cpu_before, before) = (cpu, at);
            (cpu, at) = (cpu_time(), Instant::now());
            let cores = (cpu - cpu_before).as_secs_f64() / (at - before).as_secs_f64();
            governor.look(at, cores, answered.load(Ordering::Relaxed), processors);
        }
        held.hold(0, &runtime);
    };
    thread::Builder::new().name("threads".into()).spawn(watch).map(drop)
}

/// How many threads are at work.
struct Governor {
    threads: usize,
    at_work: usize,
    /// The processors when those at work were found busy.
    busy_since: Option<Processors>,
    /// None is held back before.
    stay_until: Option<Instant>,
    /// When they were last stuck, and how long one more stayed then.
    stuck: Option<(Instant, Duration)>,
}

impl Governor {
    fn new(threads: usize) -> Self {
        Self { threads, at_work: 1, busy_since: None, stay_until: None, stuck: None }
    }

    /// Takes in what was seen: the process used `cores` processors, and its threads answered or not.
    fn look(
        &mut self,
        now: Instant,
        cores: f64,
        is_answered: bool,
        processors: impl FnOnce() -> Option<Processors>,
    ) {
        if !is_answered {
            let stay = match self.stuck {
                Some((last, stay)) if now < last + 2 * stay => (2 * stay).min(STUCK_STAY_MAX),
                _ => STUCK_STAY,
            };
            self.stuck = Some((now, stay));
            self.one_more(now + stay);
            return;
        }
        if cores < BUSY * self.at_work as f64 {
            self.busy_since = None;
        } else {
            let seen = processors();
            let is_room = match (&self.busy_since, &seen) {
                (Some(before), Some(now)) => now.free_since(before) >= FREE,
                // Nobody can say: it is tried.
                (_, None) => true,
                (None, Some(_)) => false,
            };
            if is_room {
                self.one_more(now + STAY);
            }
            self.busy_since = seen;
        }
        if self.at_work == 1 {
            return;
        }
        if cores >= CALM * (self.at_work - 1) as f64 {
            self.stay_until = self.stay_until.max(Some(now + STAY));
        } else if self.stay_until.is_none_or(|until| now >= until) {
            self.at_work -= 1;
            self.stay_until = Some(now + STAY);
        }
    }

    fn one_more(&mut self, until: Instant) {
        self.at_work = (self.at_work + 1).min(self.threads);
        self.stay_until = self.stay_until.max(Some(until));
    }
}

/// Threads that are held back: each stands in a task that does not return.
#[derive(Default)]
struct Held {
    state: Mutex<Standing>,
    changed: Condvar,
}

#[derive(Default)]
struct Standing {
    /// How many are to stand.
    wanted: usize,
    /// How many stand, or are on their way.
    standing: usize,
}

impl Held {
    /// Holds back this many.
    fn hold(self: &Arc<Self>, wanted: usize, runtime: &Handle) {
        let mut state = self.lock();
        if state.wanted == wanted {
            return;
        }
        state.wanted = wanted;
        while state.standing < wanted {
            state.standing += 1;
            let held = self.clone();
            runtime.spawn(async move { held.stand() });
        }
        self.changed.notify_all();
    }

    /// Keeps the thread that it is called on, as long as it is wanted.
    fn stand(&self) {
        let mut state = self.lock();
        while state.standing <= state.wanted {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.standing -= 1;
    }

    fn lock(&self) -> MutexGuard<'_, Standing> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What this process has used so far.
fn cpu_time() -> Duration {
    getrusage(UsageWho::RUSAGE_SELF).map_or(Duration::ZERO, |usage| {
        let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
        Duration::from_micros(u64::try_from(micros).unwrap_or(0))
    })
}

/// The machine's processors: time that went by, and how much of it nobody used, in ticks of all of them.
#[derive(Debug, Clone, Copy)]
struct Processors {
    count: f64,
    total: u64,
    free: u64,
}

impl Processors {
    /// How many were free on average.
    fn free_since(&self, before: &Self) -> f64 {
        let total = self.total.saturating_sub(before.total).max(1);
        self.count * self.free.saturating_sub(before.free) as f64 / total as f64
    }
}

/// None where the kernel does not say.
fn processors() -> Option<Processors> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    let is_one = |line: &&str| line.starts_with("cpu") && !line.starts_with("cpu ");
    let count = stat.lines().filter(is_one).count() as f64;
    // user nice system idle iowait irq softirq steal; what guests use is in user.
    let of_all = stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace().take(8);
    let of_all: Vec<u64> = of_all.map(str::parse).collect::<Result<_, _>>().ok()?;
    let [_, _, _, idle, iowait, ..] = of_all[..] else { return None };
    Some(Processors { count, total: of_all.iter().sum(), free: idle + iowait })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use tokio::{runtime::Runtime, sync::oneshot};

    use super::*;

    /// A machine of four processors, of which `free` are.
    struct Seen {
        now: Instant,
        at: Processors,
    }

    impl Seen {
        fn new() -> Self {
            Self { now: Instant::now(), at: Processors { count: 4.0, total: 0, free: 0 } }
        }

        fn tick(&mut self, governor: &mut Governor, cores: f64, free: u64, is_answered: bool) {
            self.now += TICK;
            self.at.total += 40;
            self.at.free += 10 * free;
            let at = self.at;
            governor.look(self.now, cores, is_answered, || Some(at));
        }

        fn ticks(&mut self, governor: &mut Governor, time: Duration, cores: f64) {
            for _ in 0..time.as_millis() / TICK.as_millis() {
                self.tick(governor, cores, 2, true);
            }
        }
    }

    #[test]
    fn busy_threads_get_help_where_a_processor_is_free_and_only_as_long() {
        let (mut seen, mut governor) = (Seen::new(), Governor::new(3));
        for _ in 0..50 {
            seen.tick(&mut governor, 0.99, 0, true);
        }
        assert_eq!(governor.at_work, 1, "nobody has a processor for another one");
        seen.tick(&mut governor, 0.7, 2, true);
        assert_eq!(governor.at_work, 1, "it is not busy");
        seen.tick(&mut governor, 0.99, 2, true);
        assert_eq!(governor.at_work, 1, "what was before says nothing");
        seen.tick(&mut governor, 0.99, 2, true);
        assert_eq!(governor.at_work, 2);
        seen.ticks(&mut governor, Duration::from_secs(5), 2.5);
        assert_eq!(governor.at_work, 3, "there are no more");
        seen.ticks(&mut governor, Duration::from_secs(30), 1.3);
        assert_eq!(governor.at_work, 3, "two would be too few");
        seen.ticks(&mut governor, STAY - 2 * TICK, 0.1);
        assert_eq!(governor.at_work, 3);
        seen.ticks(&mut governor, 2 * STAY + 4 * TICK, 0.1);
        assert_eq!(governor.at_work, 1);
    }

    #[test]
    fn stuck_threads_are_helped_for_longer_each_time() {
        let (mut seen, mut governor) = (Seen::new(), Governor::new(2));
        let mut stay = STUCK_STAY;
        for _ in 0..10 {
            seen.tick(&mut governor, 0.0, 4, false);
            assert_eq!(governor.at_work, 2);
            seen.ticks(&mut governor, stay - TICK, 0.0);
            assert_eq!(governor.at_work, 2, "{stay:?}");
            seen.ticks(&mut governor, 2 * TICK, 0.0);
            assert_eq!(governor.at_work, 1, "{stay:?}");
            stay = (2 * stay).min(STUCK_STAY_MAX);
        }
        seen.ticks(&mut governor, 2 * STUCK_STAY_MAX, 0.0);
        seen.tick(&mut governor, 0.0, 4, false);
        seen.ticks(&mut governor, STUCK_STAY + TICK, 0.0);
        assert_eq!(governor.at_work, 1, "that was long ago");
    }

    fn runtime(threads: usize) -> Runtime {
        tokio::runtime::Builder::new_multi_thread().worker_threads(threads).build().unwrap()
    }

    /// On which threads many tasks run that begin at once.
    fn threads_of(runtime: &Runtime) -> HashSet<thread::ThreadId> {
        let tasks = (0..64).map(|_| {
            runtime.spawn(async {
                thread::sleep(Duration::from_millis(1));
                thread::current().id()
            })
        });
        let tasks: Vec<_> = tasks.collect();
        tasks.into_iter().map(|task| runtime.block_on(task).unwrap()).collect()
    }

    #[test]
    fn held_threads_do_nothing_until_they_are_let_go() {
        let runtime = runtime(3);
        let held = Arc::<Held>::default();
        for (wanted, at_work) in [(2, 1), (0, 3), (1, 2), (2, 1), (1, 2), (0, 3)] {
            held.hold(wanted, runtime.handle());
            // They come and go in their time.
            let start = Instant::now();
            while threads_of(&runtime).len() != at_work {
                assert!(start.elapsed() < Duration::from_secs(30), "not {at_work} at work");
            }
        }
    }

    #[test]
    fn a_stuck_thread_holds_up_nobody() {
        let runtime = runtime(2);
        let token = CancellationToken::new();
        runtime.block_on(async { hold_spare_threads(token.clone()) }).unwrap();
        let start = Instant::now();
        while threads_of(&runtime).len() != 1 {
            assert!(start.elapsed() < Duration::from_secs(30), "two are at work");
        }
        let (stuck, is_stuck) = oneshot::channel();
        let (go_on, goes_on) = std::sync::mpsc::channel::<()>();
        let waits = runtime.spawn(async move {
            stuck.send(()).unwrap();
            goes_on.recv().unwrap();
        });
        runtime.block_on(is_stuck).unwrap();
        let other = runtime.spawn(async { 7 });
        assert_eq!(runtime.block_on(other).unwrap(), 7);
        go_on.send(()).unwrap();
        runtime.block_on(waits).unwrap();
        // Else the runtime would wait for the thread that is held back.
        token.cancel();
    }

    #[test]
    fn processors_are_counted() {
        let seen = processors().expect("/proc/stat");
        assert!(seen.count >= 1.0 && seen.total >= seen.free, "{seen:?}");
        let later = Processors { count: 4.0, total: seen.total + 40, free: seen.free + 10 };
        assert!((later.free_since(&seen) - 1.0).abs() < 1e-9);
    }
}
