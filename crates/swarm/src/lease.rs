//! The origin's budget, kept by a region process for the blocks that it owns.

use alloc::{boxed::Box, vec};
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

/// What a piece is to the origin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Piece {
    /// Nobody has been given it.
    Free,
    /// Somebody reads it.
    Leased { holder: u64, until: Time },
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
    /// All pieces are leased or held; ask again after this.
    Retry(Duration),
    /// All pieces of the block are in the swarm.
    AllHeld,
}

/// Who reads which piece of one artifact from the region's bucket. A live lease is never given twice.
#[derive(Debug, Clone)]
pub struct LeaseBook {
    pieces: Box<[Piece]>,
    held: u32,
    granted: u64,
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
        }
    }

    /// `holder` asks for up to `want` pieces of `block`: it gets the first run of free ones, at most
    /// [`LEASE_PIECES_MAX`]. A block past the end is all held.
    pub fn ask(&mut self, now: Time, holder: u64, block: u32, want: u16) -> LeaseAnswer {
        let want = u32::from(want).clamp(1, LEASE_PIECES_MAX) as usize;
        let start = (block.saturating_mul(LEASE_BLOCK_PIECES) as usize).min(self.pieces.len());
        let end = (start + LEASE_BLOCK_PIECES as usize).min(self.pieces.len());
        let run = &mut self.pieces[start..end];
        let free = |piece: &Piece| match piece {
            Piece::Free => true,
            Piece::Leased { until, .. } => *until <= now,
            Piece::Held { .. } => false,
        };
        if let Some(first) = run.iter().position(free) {
            let count = run[first..].iter().take(want).take_while(|piece| free(piece)).count();
            run[first..first + count].fill(Piece::Leased { holder, until: now + LEASE_DURATION });
            self.granted += count as u64;
            return LeaseAnswer::Granted {
                first: (start + first) as u32,
                count: count as u32,
                duration: LEASE_DURATION,
            };
        }
        let ends = run.iter().filter_map(|piece| match piece {
            Piece::Leased { until, .. } => Some(until.since(now)),
            _ => None,
        });
        ends.min().map_or(LeaseAnswer::AllHeld, |wait| {
            LeaseAnswer::Retry(wait.clamp(LEASE_RETRY_MIN, LEASE_RETRY_MAX))
        })
    }

    /// `holder` reports pieces: they are in the swarm, or it gives them back. A report that they are in
    /// the swarm is believed from anybody (members are honest, and a book that was lost learns so); a
    /// lease is given back only by its holder.
    pub fn done(&mut self, now: Time, holder: u64, first: u32, count: u32, held: bool) {
        let start = (first as usize).min(self.pieces.len());
        let end = start.saturating_add(count as usize).min(self.pieces.len());
        for piece in &mut self.pieces[start..end] {
            match piece {
                Piece::Held { .. } => {}
                _ if held => {
                    *piece = Piece::Held { holder, since: now };
                    self.held += 1;
                }
                Piece::Leased { holder: other, .. } if *other == holder => *piece = Piece::Free,
                _ => {}
            }
        }
    }

    /// `holder` is gone: its leases are free again, and so are the pieces that it reported less than
    /// [`HELD_SETTLES`] ago.
    pub fn lost(&mut self, now: Time, holder: u64) {
        for piece in &mut self.pieces {
            match piece {
                Piece::Leased { holder: other, .. } if *other == holder => *piece = Piece::Free,
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

    fn granted(answer: LeaseAnswer) -> (u32, u32) {
        match answer {
            LeaseAnswer::Granted { first, count, .. } => (first, count),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn pieces_are_leased_once_until_they_are_held() {
        let mut book = LeaseBook::new(70);
        assert_eq!(granted(book.ask(ZERO, 1, 0, 10)), (0, 10));
        assert_eq!(granted(book.ask(ZERO, 2, 0, 99)), (10, 16), "at most a lease's worth");
        assert_eq!(granted(book.ask(ZERO, 2, 1, 16)), (64, 6), "the last block is short");
        assert!(matches!(book.ask(ZERO, 3, 1, 0), LeaseAnswer::Retry(_)));
        assert_eq!(granted(book.ask(ZERO, 3, 0, 0)), (26, 1), "nothing wanted is one");
    }

    #[test]
    fn what_expires_is_given_again() {
        let mut book = LeaseBook::new(4);
        assert_eq!(granted(book.ask(ZERO, 1, 0, 4)), (0, 4));
        let almost = Time(LEASE_DURATION.as_nanos() as u64 - 1);
        assert_eq!(book.ask(almost, 2, 0, 4), LeaseAnswer::Retry(LEASE_RETRY_MIN));
        assert_eq!(book.ask(ZERO, 2, 0, 4), LeaseAnswer::Retry(LEASE_RETRY_MAX));
        let after = ZERO + LEASE_DURATION;
        assert_eq!(granted(book.ask(after, 2, 0, 2)), (0, 2));
        // The first holder was slow and gives back what is no longer its own: nothing changes.
        book.done(after, 1, 0, 4, false);
        assert_eq!(granted(book.ask(after, 3, 0, 4)), (2, 2));
        // But what it holds it holds.
        book.done(after, 1, 0, 4, true);
        assert_eq!(book.ask(after, 3, 0, 4), LeaseAnswer::AllHeld);
        assert_eq!((book.held(), book.granted()), (4, 8));
    }

    #[test]
    fn what_is_given_back_or_lost_is_free() {
        let mut book = LeaseBook::new(8);
        assert_eq!(granted(book.ask(ZERO, 1, 0, 4)), (0, 4));
        book.done(ZERO, 1, 1, 1, false);
        assert_eq!(granted(book.ask(ZERO, 2, 0, 4)), (1, 1));
        book.done(ZERO, 1, 0, 1, true);
        book.lost(ZERO, 1);
        assert_eq!(granted(book.ask(ZERO, 3, 0, 1)), (0, 1), "held by one that died at once");
        assert_eq!(granted(book.ask(ZERO, 3, 0, 9)), (2, 6), "its leases");
        book.done(ZERO, 3, 2, 6, true);
        book.lost(ZERO + HELD_SETTLES, 3);
        assert_eq!(book.held(), 6, "what others have had time to get is kept");
    }

    #[test]
    fn blocks_past_the_end_and_empty_artifacts_are_all_held() {
        let mut book = LeaseBook::new(64);
        assert_eq!(book.ask(ZERO, 1, 1, 4), LeaseAnswer::AllHeld);
        assert_eq!(book.ask(ZERO, 1, u32::MAX, 4), LeaseAnswer::AllHeld);
        book.done(ZERO, 1, u32::MAX, u32::MAX, true);
        assert_eq!(LeaseBook::new(0).ask(ZERO, 1, 0, 1), LeaseAnswer::AllHeld);
        assert!(LeaseBook::new(u32::MAX).pieces_total() <= 65_536);
    }

    proptest! {
        #[test]
        fn a_live_lease_is_never_given_twice(
            steps in prop::collection::vec((0..4u8, 0..5u64, 0..3u32, any::<u16>(), 0..20u64), 0..200)
        ) {
            let mut book = LeaseBook::new(150);
            let mut live: BTreeMap<u32, (u64, Time)> = BTreeMap::new();
            let mut now = ZERO;
            for (kind, holder, block, number, wait) in steps {
                now = now + Duration::from_secs(wait);
                let (first, count) = (u32::from(number) % 160, u32::from(number) / 160 % 12);
                match kind {
                    0 | 1 => {
                        if let LeaseAnswer::Granted { first, count, duration } =
                            book.ask(now, holder, block, number % 40)
                        {
                            prop_assert!((1..=LEASE_PIECES_MAX).contains(&count));
                            prop_assert_eq!(first / LEASE_BLOCK_PIECES, block);
                            for piece in first..first + count {
                                let before = live.insert(piece, (holder, now + duration));
                                prop_assert!(before.is_none_or(|(_, until)| until <= now));
                            }
                        }
                    }
                    2 => {
                        let held = number % 2 == 0;
                        book.done(now, holder, first, count, held);
                        for piece in first..first + count {
                            if held && piece < 150 {
                                live.insert(piece, (holder, Time(u64::MAX)));
                            } else if live.get(&piece).is_some_and(|l| l.0 == holder && l.1 < Time(u64::MAX)) {
                                live.remove(&piece);
                            }
                        }
                    }
                    _ => {
                        book.lost(now, holder);
                        // What it reported long ago stays; what else it had is free, or no longer sure.
                        live.retain(|_, (of, _)| *of != holder);
                    }
                }
            }
        }
    }
}
