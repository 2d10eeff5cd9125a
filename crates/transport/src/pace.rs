//! Bandwidth limits: how fast piece bytes may pass, for a whole process and one way.
//!
//! A [`Pacer`] is a bucket of tokens that refills as fast as its limit says. Everybody who moves a piece takes a
//! [`Turn`], and before each part of the piece asks it for leave. **Turns are served in the order in which they were taken**, not
//! evenly: eight pieces at an eighth of the speed each would all be whole only at the end, and only what is whole can be
//! passed on. A turn that asks for nothing, because its connection has no room, holds nobody up. Where an even share is
//! wanted, each part is a turn of its own.
//!
//! Only the bytes of pieces are paced. Messages, BUSY and indexes never wait here.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

/// What is not used of a limit is kept for so long: timers are late by milliseconds on a busy machine.
const SAVED: Duration = Duration::from_millis(20);

/// Leave is given for about so long at a time, so that a new limit holds soon...
const PART: Duration = Duration::from_millis(5);

/// ...but not for fewer bytes than this: less costs more wake-ups than it is worth...
const PART_MIN_BYTES: usize = 4 << 10;

/// ...and not for more.
const PART_MAX_BYTES: usize = 256 << 10;

/// A limit on piece bytes, or none yet. Clones are the same limit.
#[derive(Clone, Debug, Default)]
pub struct Pacer(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    /// Bytes a second; 0 for no limit.
    limit: AtomicU64,
    passed_bytes: AtomicU64,
    held_bytes: AtomicU64,
    turns: AtomicU64,
    line: Mutex<Line>,
}

/// What passed a [`Pacer`], and what it held back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Paced {
    /// Bytes that passed, with a limit or without one.
    pub passed_bytes: u64,
    /// Bytes of them that had to wait.
    pub held_bytes: u64,
    /// For how long something had to wait.
    pub held: Duration,
}

/// The bucket, and who waits for it. As many wait as pieces are under way.
#[derive(Debug, Default)]
struct Line {
    /// What was let through is through by then, at the limit.
    free_at: Option<Instant>,
    /// By the number of the turn.
    waiting: BTreeMap<u64, Arc<Notify>>,
    /// Since when somebody waits.
    waits_since: Option<Instant>,
    held: Duration,
}

impl Line {
    /// Lets some of `wanted` bytes pass, or says when it will. Time goes on as fast as `limit` bytes a second.
    fn pass(&mut self, now: Instant, limit: u64, wanted: usize) -> Result<usize, Instant> {
        let saved = now.checked_sub(SAVED).unwrap_or(now);
        let free_at = self.free_at.map_or(saved, |free_at| free_at.max(saved));
        if free_at > now {
            return Err(free_at);
        }
        let passes = wanted.min(part_bytes(limit));
        self.free_at = Some(free_at + Duration::from_secs_f64(passes as f64 / limit as f64));
        Ok(passes)
    }

    /// Wakes whoever is first now.
    fn wake_first(&self) {
        if let Some(first) = self.waiting.values().next() {
            first.notify_one();
        }
    }
}

fn part_bytes(limit: u64) -> usize {
    let part = u128::from(limit) * PART.as_millis() / 1_000;
    usize::try_from(part).unwrap_or(PART_MAX_BYTES).clamp(PART_MIN_BYTES, PART_MAX_BYTES)
}

impl Pacer {
    /// The limit in force, in bytes a second.
    #[must_use]
    pub fn limit(&self) -> Option<u64> {
        match self.0.limit.load(Ordering::Relaxed) {
            0 => None,
            limit => Some(limit),
        }
    }

    /// Sets the limit, in bytes a second, also for what waits and what is under way. A limit of 0 is none.
    pub fn set_limit(&self, limit: Option<u64>) {
        self.0.limit.store(limit.unwrap_or(0), Ordering::Relaxed);
        let mut line = self.line();
        // What was reckoned by the old limit does not count.
        line.free_at = line.free_at.map(|free_at| free_at.min(Instant::now()));
        line.waiting.values().for_each(|waits| waits.notify_one());
    }

    /// What passed, and what was held back, since the process began.
    #[must_use]
    pub fn paced(&self) -> Paced {
        let line = self.line();
        let waits = line.waits_since.map_or(Duration::ZERO, |since| since.elapsed());
        Paced {
            passed_bytes: self.0.passed_bytes.load(Ordering::Relaxed),
            held_bytes: self.0.held_bytes.load(Ordering::Relaxed),
            held: line.held + waits,
        }
    }

    /// A turn for one piece, behind all that were taken before.
    #[must_use]
    pub fn turn(&self) -> Turn {
        Turn { pacer: self.clone(), number: self.0.turns.fetch_add(1, Ordering::Relaxed) }
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.0.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, bytes: usize, held: bool) {
        self.0.passed_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        if held {
            self.0.held_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        }
    }
}

/// One piece's place in the order.
#[derive(Debug)]
pub struct Turn {
    pacer: Pacer,
    number: u64,
}

impl Turn {
    /// Waits until some of `wanted` bytes may pass, and says how many: all of them without a limit or where none is wanted,
    /// at least one with a limit. They count as passed. Dropping the future gives the wait up.
    pub async fn some(&self, wanted: usize) -> usize {
        let mut waits = None;
        loop {
            let until = match self.try_some(wanted, &mut waits) {
                Ok(passes) => {
                    self.pacer.count(passes, waits.is_some());
                    return passes;
                }
                Err(until) => until,
            };
            let Some(Waits { notify, .. }) = &waits else { continue };
            match until {
                Some(until) => {
                    tokio::select! {
                        () = tokio::time::sleep_until(until) => {}
                        () = notify.notified() => {}
                    }
                }
                None => notify.notified().await,
            }
        }
    }

    /// Waits until all of `bytes` may pass.
    pub async fn all(&self, bytes: usize) {
        let mut left = bytes;
        while left > 0 {
            left -= self.some(left).await;
        }
    }

    /// How many bytes may pass now, or else when to look again: none for a turn that is not the first.
    fn try_some<'turn>(
        &'turn self,
        wanted: usize,
        waits: &mut Option<Waits<'turn>>,
    ) -> Result<usize, Option<Instant>> {
        if wanted == 0 || self.pacer.limit().is_none() {
            return Ok(wanted);
        }
        let mut line = self.pacer.line();
        // Again, now that nobody can change it without waking us.
        let Some(limit) = self.pacer.limit() else { return Ok(wanted) };
        let now = Instant::now();
        let first = line.waiting.keys().next().is_none_or(|first| *first >= self.number);
        let until = if first {
            match line.pass(now, limit, wanted) {
                Ok(passes) => return Ok(passes),
                Err(until) => Some(until),
            }
        } else {
            None
        };
        if waits.is_none() {
            let notify = Arc::<Notify>::default();
            line.waiting.insert(self.number, notify.clone());
            line.waits_since.get_or_insert(now);
            *waits = Some(Waits { turn: self, notify });
        }
        Err(until)
    }
}

/// A turn among those that wait; gone from there when it is dropped.
struct Waits<'turn> {
    turn: &'turn Turn,
    notify: Arc<Notify>,
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        let mut line = self.turn.pacer.line();
        line.waiting.remove(&self.turn.number);
        if line.waiting.is_empty()
            && let Some(since) = line.waits_since.take()
        {
            line.held += since.elapsed();
        }
        line.wake_first();
    }
}

#[cfg(test)]
mod tests {
    use tokio::task::JoinSet;

    use super::*;

    const MB: u64 = 1_000_000;

    fn limited(limit: u64) -> Pacer {
        let pacer = Pacer::default();
        pacer.set_limit(Some(limit));
        pacer
    }

    /// Takes turns for pieces of a MB until `until`, one after the other.
    async fn moves(pacer: Pacer, until: Instant) {
        loop {
            let turn = pacer.turn();
            if tokio::time::timeout_at(until, turn.all(MB as usize)).await.is_err() {
                return;
            }
        }
    }

    /// What passes in so long with so many pieces at once.
    async fn passes(pacer: &Pacer, at_once: usize, seconds: u64) -> u64 {
        let before = pacer.paced().passed_bytes;
        let until = Instant::now() + Duration::from_secs(seconds);
        let mut tasks = JoinSet::new();
        for _ in 0..at_once {
            tasks.spawn(moves(pacer.clone(), until));
        }
        tasks.join_all().await;
        pacer.paced().passed_bytes - before
    }

    #[tokio::test(start_paused = true)]
    async fn as_much_passes_as_the_limit_says_however_many_ask() {
        for limit in [2 * MB, 50 * MB, 5_000 * MB] {
            for at_once in [1, 8, 64] {
                let pacer = limited(limit);
                let passed = passes(&pacer, at_once, 10).await;
                let ratio = passed as f64 / (10 * limit) as f64;
                assert!((0.99..=1.01).contains(&ratio), "{at_once} at {limit}: {ratio}");
                let paced = pacer.paced();
                assert!(paced.held > Duration::from_secs(9), "{paced:?}");
                assert!(paced.held_bytes > 0 && paced.held_bytes <= passed, "{paced:?}");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_limit_holds_for_what_is_under_way() {
        let pacer = limited(2 * MB);
        let began = Instant::now();
        let mover = tokio::spawn({
            let turn = pacer.turn();
            async move { turn.all(110 * MB as usize).await }
        });
        tokio::time::sleep(Duration::from_secs(5)).await;
        let slow = pacer.paced().passed_bytes;
        assert!((9 * MB..=11 * MB).contains(&slow), "{slow}");
        pacer.set_limit(Some(50 * MB));
        mover.await.expect("it moves");
        let took = began.elapsed().as_secs_f64();
        assert!((6.9..=7.1).contains(&took), "10 MB in 5 s, 100 MB in 2 s, not {took}");
        // Taken away, it holds nothing back.
        let turn = limited(2 * MB).turn();
        let waits = turn.all(1_000 * MB as usize);
        let lift = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            turn.pacer.set_limit(None);
        };
        let began = Instant::now();
        tokio::join!(waits, lift);
        assert!(began.elapsed() < Duration::from_millis(1_100), "{:?}", began.elapsed());
        assert_eq!(turn.pacer.limit(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn pieces_pass_one_after_the_other_in_the_order_of_their_turns() {
        let pacer = limited(10 * MB);
        let began = Instant::now();
        let mut tasks = JoinSet::new();
        for piece in 0..5 {
            let turn = pacer.turn();
            tasks.spawn(async move {
                // The last ones ask first.
                tokio::time::sleep(Duration::from_millis(5 - piece)).await;
                turn.all(10 * MB as usize).await;
                (piece, began.elapsed().as_secs_f64())
            });
        }
        for expected in 0..5 {
            let (piece, at) = tasks.join_next().await.expect("five").expect("it ends");
            assert_eq!(piece, expected);
            assert!((at - (piece + 1) as f64).abs() < 0.1, "{piece} is whole after {at} s");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_gives_up_holds_up_nobody() {
        let pacer = limited(2 * MB);
        let (first, second) = (pacer.turn(), pacer.turn());
        let gone = tokio::time::timeout(Duration::from_secs(1), first.all(100 * MB as usize));
        let began = Instant::now();
        let (gone, ()) = tokio::join!(gone, second.all(2 * MB as usize));
        assert!(gone.is_err());
        assert!(began.elapsed() < Duration::from_millis(2_100), "{:?}", began.elapsed());
        assert!(pacer.line().waiting.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_used_is_not_saved_for_long() {
        let pacer = limited(2 * MB);
        pacer.turn().all(MB as usize).await;
        tokio::time::sleep(Duration::from_secs(100)).await;
        let passed = passes(&pacer, 4, 1).await;
        assert!(passed < 21 * MB / 10, "{passed}");
    }

    #[tokio::test]
    async fn without_a_limit_all_passes_at_once_and_is_counted() {
        let pacer = Pacer::default();
        assert_eq!(pacer.turn().some(5_000_000).await, 5_000_000);
        assert_eq!(pacer.turn().some(0).await, 0);
        let paced = Paced { passed_bytes: 5_000_000, ..Paced::default() };
        assert_eq!(pacer.paced(), paced);
    }
}
