//! The origin's budget, kept by a region process for the blocks that it owns.

use alloc::{
    boxed::Box,
    collections::{BTreeMap, VecDeque},
    vec,
};
use core::time::Duration;

use shoal_proto::region::{LEASE_BLOCK_PIECES, LEASE_PIECES_MAX};

use crate::time::Time;

/// How long a lease holds: 16 pieces of 16 MiB need 22 s at 100 Mbit/s. A machine that dies with a
/// lease holds its pieces up for as long.
pub const LEASE_DURATION: Duration = Duration::from_secs(30);

/// An asker whose block is all leased asks again after between this...
pub const LEASE_RETRY_MIN: Duration = Duration::from_millis(500);

/// ...and this, by when the first of the leases ends.
pub const LEASE_RETRY_MAX: Duration = Duration::from_secs(5);

/// A holder that is lost this soon after it reported a piece may have been the only one.
pub const HELD_SETTLES: Duration = Duration::from_secs(10);

/// Pieces that may be leased at once before anything was measured: half of what fills a bucket of ten machines'
/// bandwidth.
const WINDOW_START: u32 = 8;

/// The most pieces that may be leased at once: two for each machine that asks.
const WINDOW_MAX: u32 = 512;

/// Turns are at least this far apart: before anything was measured, too.
const INTERVAL_MIN: Duration = Duration::from_millis(1);

/// A turn that is not taken within this long is given up.
const TURN_KEPT: Duration = Duration::from_millis(500);

/// The most machines that wait for their turn; more are told to ask much later.
const TURNS_MAX: usize = 1_024;

/// A piece that a leaser's neighbours still lack this long after it came into the swarm, or after as many piece times
/// as [`HELD_LONG_PIECES`], is leased again: its holder is gone, or gives wrong bytes.
const HELD_LONG: Duration = Duration::from_secs(10);
const HELD_LONG_PIECES: u32 = 64;

/// What a piece is to the origin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Piece {
    /// Nobody has been given it.
    Free,
    /// Somebody reads it. The first one of a lease is measured.
    Leased { holder: u64, until: Time, first: bool },
    /// It is in the swarm.
    Held { holder: u64, since: Time },
}

/// What a region process answers to a machine that asks for a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseAnswer {
    /// Read these.
    Granted {
        /// The first piece.
        first: u32,
        /// How many.
        count: u32,
        /// For how long.
        duration: Duration,
    },
    /// All pieces of the block are leased or held; ask about it again after this.
    Retry(Duration),
    /// As much is being read as the bucket takes: ask again after this, about any block.
    Later(Duration),
    /// All pieces of the block are in the swarm.
    AllHeld,
}

/// Who reads which piece of one artifact from the region's bucket. A live lease is never given twice.
///
/// **How many at once.** The sooner the first pieces are whole, the sooner they multiply, and a bucket that
/// is asked for everything at once ends everything late. So the pieces that are leased at one time are held to
/// a window, which grows by one with each lease that ended well, as TCP's does in its slow start. Who finds it
/// full is told when its turn will be, and has it then before others: leases go round, so that what is read
/// lies on many machines and spreads from all of them.
#[derive(Debug, Clone)]
pub struct LeaseBook {
    pieces: Box<[Piece]>,
    held: u32,
    granted: u64,
    /// Pieces that are leased.
    leased: u32,
    window: u32,
    /// The leases in the order in which they end: until when, first piece, how many.
    ends: VecDeque<(Time, u32, u32)>,
    /// What the first piece of a lease takes, smoothed; zero before any did.
    took: Duration,
    /// When it is whose turn.
    turns: BTreeMap<u64, Time>,
    /// The last turn that was given.
    last_turn: Time,
}

impl LeaseBook {
    /// A book of an artifact of `pieces_total` pieces (at most `PIECES_MAX` of the protocol; more are
    /// not kept), none of them in the swarm.
    #[must_use]
    pub fn new(pieces_total: u32) -> Self {
        let pieces_total = pieces_total.min(shoal_proto::manifest::PIECES_MAX);
        Self {
            pieces: vec![Piece::Free; pieces_total as usize].into_boxed_slice(),
            held: 0,
            granted: 0,
            leased: 0,
            window: WINDOW_START,
            ends: VecDeque::new(),
            took: Duration::ZERO,
            turns: BTreeMap::new(),
            last_turn: Time::ZERO,
        }
    }

    /// `holder` asks for up to `want` pieces of `block`, of those in `lacking` (lowest bit first): it gets the first run
    /// of free ones, at most [`LEASE_PIECES_MAX`] and an eighth of what the window has room for. What is past the
    /// end is held.
    pub fn ask(
        &mut self,
        now: Time,
        holder: u64,
        block: u32,
        lacking: u64,
        want: u16,
    ) -> LeaseAnswer {
        self.expire(now);
        let want = u32::from(want).clamp(1, LEASE_PIECES_MAX);
        let start = (block.saturating_mul(LEASE_BLOCK_PIECES) as usize).min(self.pieces.len());
        let end = (start + LEASE_BLOCK_PIECES as usize).min(self.pieces.len());
        let run = &self.pieces[start..end];
        let long = HELD_LONG.max(self.took.saturating_mul(HELD_LONG_PIECES));
        let lacks = |at: usize| lacking >> at & 1 == 1;
        let free = |at: usize| {
            lacks(at)
                && match run[at] {
                    Piece::Free => true,
                    Piece::Leased { .. } => false,
                    Piece::Held { since, .. } => now.since(since) >= long,
                }
        };
        let Some(first) = (0..run.len()).find(|at| free(*at)) else {
            let ends = run.iter().enumerate().filter_map(|(at, piece)| match piece {
                Piece::Leased { until, .. } if lacks(at) => Some(until.since(now)),
                _ => None,
            });
            return ends.min().map_or(LeaseAnswer::AllHeld, |wait| {
                LeaseAnswer::Retry(wait.clamp(LEASE_RETRY_MIN, LEASE_RETRY_MAX))
            });
        };
        let most = (first..run.len()).take(want as usize).take_while(|at| free(*at)).count();
        let room = match self.room(now, holder) {
            Ok(room) => room,
            Err(wait) => return LeaseAnswer::Later(wait),
        };
        let count = (most as u32).min(room.div_ceil(8));
        let (first, until) = (start as u32 + first as u32, now + LEASE_DURATION);
        for piece in first..first + count {
            let is = &mut self.pieces[piece as usize];
            self.held -= u32::from(matches!(is, Piece::Held { .. }));
            *is = Piece::Leased { holder, until, first: piece == first };
        }
        self.ends.push_back((until, first, count));
        self.leased += count;
        self.granted += u64::from(count);
        LeaseAnswer::Granted { first, count, duration: LEASE_DURATION }
    }

    /// How many pieces `holder` may have now, at least one; else after how long its turn is.
    fn room(&mut self, now: Time, holder: u64) -> Result<u32, Duration> {
        self.turns.retain(|_, turn| *turn + TURN_KEPT > now);
        let own = self.turns.get(&holder).copied();
        let before = match own {
            Some(turn) if turn <= now => 0,
            Some(_) => self.turns.len() as u32 - 1,
            None => self.turns.len() as u32,
        };
        let room = self.window.saturating_sub(self.leased).saturating_sub(before);
        if room > 0 {
            self.turns.remove(&holder);
            return Ok(room);
        }
        let turn = match own {
            Some(turn) if turn > now => turn,
            Some(_) => now + self.interval(),
            None if self.turns.len() >= TURNS_MAX => return Err(LEASE_RETRY_MAX),
            None => {
                self.last_turn = self.last_turn.max(now) + self.interval();
                self.last_turn
            }
        };
        self.turns.insert(holder, turn);
        Err(turn.since(now).clamp(INTERVAL_MIN, LEASE_RETRY_MAX))
    }

    /// Leases whose time is over end.
    fn expire(&mut self, now: Time) {
        while let Some((until, first, count)) = self.ends.front().copied() {
            if until > now {
                break;
            }
            self.ends.pop_front();
            for piece in &mut self.pieces[first as usize..(first + count) as usize] {
                if matches!(piece, Piece::Leased { until: of, .. } if *of == until) {
                    *piece = Piece::Free;
                    self.leased -= 1;
                }
            }
        }
    }

    /// The first piece of a lease is in the swarm: the window grows, and turns are given by how long it took.
    fn measure(&mut self, took: Duration) {
        self.window = (self.window + 1).min(WINDOW_MAX);
        self.took = if self.took.is_zero() { took } else { (self.took * 7 + took) / 8 };
    }

    /// About how long it takes until the next lease ends.
    fn interval(&self) -> Duration {
        (self.took / self.window).max(INTERVAL_MIN)
    }

    /// `holder` reports pieces: they are in the swarm, or it gives them back. A report that they are in
    /// the swarm is believed from anybody (members are honest, and a book that was lost learns so); a
    /// lease is given back only by its holder.
    pub fn done(&mut self, now: Time, holder: u64, first: u32, count: u32, held: bool) {
        let start = (first as usize).min(self.pieces.len());
        let end = start.saturating_add(count as usize).min(self.pieces.len());
        for at in start..end {
            match self.pieces[at] {
                Piece::Held { .. } => {}
                Piece::Leased { until, first, .. } if held => {
                    self.pieces[at] = Piece::Held { holder, since: now };
                    self.held += 1;
                    self.leased -= 1;
                    let began = Time(until.0.saturating_sub(LEASE_DURATION.as_nanos() as u64));
                    if first {
                        self.measure(now.since(began));
                    }
                }
                Piece::Free if held => {
                    self.pieces[at] = Piece::Held { holder, since: now };
                    self.held += 1;
                }
                Piece::Leased { holder: other, .. } if other == holder => {
                    self.pieces[at] = Piece::Free;
                    self.leased -= 1;
                }
                _ => {}
            }
        }
    }

    /// `holder` is gone: its leases are free again, and so are the pieces that it reported less than
    /// [`HELD_SETTLES`] ago.
    pub fn lost(&mut self, now: Time, holder: u64) {
        self.turns.remove(&holder);
        for piece in &mut self.pieces {
            match piece {
                Piece::Leased { holder: other, .. } if *other == holder => {
                    *piece = Piece::Free;
                    self.leased -= 1;
                }
                Piece::Held { holder: other, since }
                    if *other == holder && now.since(*since) < HELD_SETTLES =>
                {
                    *piece = Piece::Free;
                    self.held -= 1;
                }
                _ => {}
            }
        }
    }

    /// How many pieces there are.
    #[must_use]
    pub fn pieces_total(&self) -> u32 {
        self.pieces.len() as u32
    }

    /// How many pieces are in the swarm.
    #[must_use]
    pub fn held(&self) -> u32 {
        self.held
    }

    /// How many pieces were leased, repeats counted.
    #[must_use]
    pub fn granted(&self) -> u64 {
        self.granted
    }
}

#[cfg(test)]
mod tests {
    use alloc::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const ZERO: Time = Time::ZERO;
    const ALL: u64 = u64::MAX;

    fn granted(answer: LeaseAnswer) -> (u32, u32) {
        match answer {
            LeaseAnswer::Granted { first, count, .. } => (first, count),
            other => panic!("{other:?}"),
        }
    }

    /// A book whose window is open.
    fn open(pieces: u32) -> LeaseBook {
        LeaseBook { window: WINDOW_MAX, ..LeaseBook::new(pieces) }
    }

    fn ms(ms: u64) -> Time {
        Time(ms * 1_000_000)
    }

    #[test]
    fn the_window_grows_with_what_ends_well() {
        let mut book = LeaseBook::new(64);
        for holder in 0..WINDOW_START {
            let one = granted(book.ask(ZERO, holder.into(), 0, ALL, 16));
            assert_eq!(one, (holder, 1), "an eighth of the window");
        }
        assert!(matches!(book.ask(ZERO, 8, 0, ALL, 1), LeaseAnswer::Later(_)));
        for holder in 0..4 {
            book.done(ms(20), holder, holder as u32, 1, true);
        }
        // The window is four wider and four of it are free; one waits, and keeps its place.
        assert_eq!(granted(book.ask(ms(20), 9, 0, ALL, 16)), (8, 1));
        book.done(ms(20), 9, 8, 1, false);
        assert_eq!(book.window, WINDOW_START + 4, "what is given back does not count");
    }

    #[test]
    fn who_was_told_to_wait_has_its_turn_before_others() {
        let mut book = LeaseBook::new(64);
        for holder in 0..8 {
            granted(book.ask(ZERO, holder, 0, ALL, 1));
        }
        let LeaseAnswer::Later(turn) = book.ask(ZERO, 10, 0, ALL, 1) else {
            panic!("the window is full")
        };
        book.done(ms(5), 0, 0, 1, false);
        assert!(
            matches!(book.ask(ms(5), 0, 0, ALL, 1), LeaseAnswer::Later(_)),
            "10 comes before it"
        );
        assert_eq!(
            granted(book.ask(ZERO + turn.max(Duration::from_millis(5)), 10, 0, ALL, 1)),
            (0, 1)
        );
        // A turn that nobody takes is lost.
        book.done(ms(6), 10, 0, 1, false);
        let later = ms(6) + TURN_KEPT * 2;
        assert_eq!(granted(book.ask(later, 11, 0, ALL, 1)), (0, 1));
    }

    #[test]
    fn pieces_are_leased_once_until_they_are_held() {
        let mut book = open(70);
        assert_eq!(granted(book.ask(ZERO, 1, 0, ALL, 10)), (0, 10));
        assert_eq!(granted(book.ask(ZERO, 2, 0, ALL, 99)), (10, 16), "at most a lease's worth");
        assert_eq!(granted(book.ask(ZERO, 2, 1, ALL, 16)), (64, 6), "the last block is short");
        assert!(matches!(book.ask(ZERO, 3, 1, ALL, 0), LeaseAnswer::Retry(_)));
        assert_eq!(granted(book.ask(ZERO, 3, 0, ALL, 0)), (26, 1), "nothing wanted is one");
    }

    #[test]
    fn what_expires_is_given_again() {
        let mut book = open(4);
        assert_eq!(granted(book.ask(ZERO, 1, 0, ALL, 4)), (0, 4));
        let almost = Time(LEASE_DURATION.as_nanos() as u64 - 1);
        assert_eq!(book.ask(almost, 2, 0, ALL, 4), LeaseAnswer::Retry(LEASE_RETRY_MIN));
        assert_eq!(book.ask(ZERO, 2, 0, ALL, 4), LeaseAnswer::Retry(LEASE_RETRY_MAX));
        let after = ZERO + LEASE_DURATION;
        assert_eq!(granted(book.ask(after, 2, 0, ALL, 2)), (0, 2));
        // The first holder was slow and gives back what is no longer its own: nothing changes.
        book.done(after, 1, 0, 4, false);
        assert_eq!(granted(book.ask(after, 3, 0, ALL, 4)), (2, 2));
        // But what it holds it holds.
        book.done(after, 1, 0, 4, true);
        assert_eq!(book.ask(after, 3, 0, ALL, 4), LeaseAnswer::AllHeld);
        assert_eq!((book.held(), book.granted()), (4, 8));
    }

    #[test]
    fn what_is_given_back_or_lost_is_free() {
        let mut book = open(8);
        assert_eq!(granted(book.ask(ZERO, 1, 0, ALL, 4)), (0, 4));
        book.done(ZERO, 1, 1, 1, false);
        assert_eq!(granted(book.ask(ZERO, 2, 0, ALL, 4)), (1, 1));
        book.done(ZERO, 1, 0, 1, true);
        book.lost(ZERO, 1);
        assert_eq!(granted(book.ask(ZERO, 3, 0, ALL, 1)), (0, 1), "held by one that died at once");
        assert_eq!(granted(book.ask(ZERO, 3, 0, ALL, 9)), (2, 6), "its leases");
        book.done(ZERO, 3, 2, 6, true);
        book.lost(ZERO + HELD_SETTLES, 3);
        assert_eq!(book.held(), 6, "what others have had time to get is kept");
    }

    #[test]
    fn what_nobody_gets_from_its_holder_is_leased_again() {
        let mut book = open(8);
        assert_eq!(granted(book.ask(ZERO, 1, 0, ALL, 8)), (0, 8));
        book.done(ms(100), 1, 0, 8, true);
        let long = ms(100) + HELD_LONG;
        assert_eq!(book.ask(Time(long.0 - 1), 2, 0, 0b10_0110, 8), LeaseAnswer::AllHeld);
        assert_eq!(granted(book.ask(long, 2, 0, 0b10_0110, 8)), (1, 2), "what it lacks, a run");
        assert_eq!((book.held(), book.ask(long, 3, 0, 0b1_1000, 8)), (6, granted_again(3)));
        book.done(long, 2, 1, 2, true);
        assert_eq!(book.ask(long, 4, 0, 0b110, 8), LeaseAnswer::AllHeld, "only now in the swarm");
        // Where pieces take long, they need longer to come round.
        let mut slow = open(8);
        assert_eq!(granted(slow.ask(ZERO, 1, 0, ALL, 1)), (0, 1));
        slow.done(ms(1_000), 1, 0, 1, true);
        assert_eq!(slow.ask(ms(1_000) + HELD_LONG, 2, 0, 1, 1), LeaseAnswer::AllHeld);
        assert_eq!(granted(slow.ask(ms(1_000) + Duration::from_secs(64), 2, 0, 1, 1)), (0, 1));
    }

    fn granted_again(first: u32) -> LeaseAnswer {
        LeaseAnswer::Granted { first, count: 2, duration: LEASE_DURATION }
    }

    #[test]
    fn blocks_past_the_end_and_empty_artifacts_are_all_held() {
        let mut book = LeaseBook::new(64);
        assert_eq!(book.ask(ZERO, 1, 1, ALL, 4), LeaseAnswer::AllHeld);
        assert_eq!(book.ask(ZERO, 1, u32::MAX, ALL, 4), LeaseAnswer::AllHeld);
        book.done(ZERO, 1, u32::MAX, u32::MAX, true);
        assert_eq!(LeaseBook::new(0).ask(ZERO, 1, 0, ALL, 1), LeaseAnswer::AllHeld);
        assert!(LeaseBook::new(u32::MAX).pieces_total() <= 65_536);
    }

    proptest! {
        #[test]
        fn a_live_lease_is_never_given_twice(
            steps in prop::collection::vec((0..4u8, 0..5u64, 0..3u32, any::<u16>(), 0..20u64), 0..200)
        ) {
            let mut book = LeaseBook::new(150);
            // Whose each piece is, until when nobody else may have it, and whether it is in the swarm.
            let mut live: BTreeMap<u32, (u64, Time, bool)> = BTreeMap::new();
            let mut now = ZERO;
            for (kind, holder, block, number, wait) in steps {
                now = now + Duration::from_secs(wait);
                let (first, count) = (u32::from(number) % 160, u32::from(number) / 160 % 12);
                match kind {
                    0 | 1 => {
                        let lacking = u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                        if let LeaseAnswer::Granted { first, count, duration } =
                            book.ask(now, holder, block, lacking, number % 40)
                        {
                            prop_assert!((1..=LEASE_PIECES_MAX).contains(&count));
                            prop_assert_eq!(first / LEASE_BLOCK_PIECES, block);
                            for piece in first..first + count {
                                prop_assert!(lacking >> (piece % LEASE_BLOCK_PIECES) & 1 == 1);
                                let before = live.insert(piece, (holder, now + duration, false));
                                prop_assert!(before.is_none_or(|(_, until, _)| until <= now));
                            }
                        }
                    }
                    2 => {
                        let held = number % 2 == 0;
                        book.done(now, holder, first, count, held);
                        for piece in first..first + count {
                            let before = live.get(&piece).copied();
                            if before.is_some_and(|(_, _, held)| held) || piece >= 150 {
                                continue;
                            } else if held {
                                live.insert(piece, (holder, now + HELD_LONG, true));
                            } else if before.is_some_and(|(of, ..)| of == holder) {
                                live.remove(&piece);
                            }
                        }
                    }
                    _ => {
                        book.lost(now, holder);
                        // What it reported long ago stays; what else it had is free, or no longer sure.
                        live.retain(|_, (of, until, held)| *of != holder || *held && *until <= now);
                    }
                }
            }
        }
    }
}
