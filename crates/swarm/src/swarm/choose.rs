//! Which piece to ask for: the rarest of a random sample, any among equals; and which of those that only other zones have.

use super::{
    neighbours::{Line, Neighbours, SLOTS_MAX, Slots, rarest},
    pick::stall,
    state::Fetching,
};
use crate::{
    hash::{below, mix},
    time::Time,
};

/// Neighbours, by their slots.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Free {
    /// May be asked now and are in our zone.
    pub(super) near: Slots,
    /// May be asked now and are in another zone.
    pub(super) far: Slots,
    /// Are in our zone and worth waiting for.
    pub(super) zone: Slots,
}

/// Which pieces a machine fetches from another zone though its own has none of them: each falls to few machines of a
/// zone, by a hash of machine and piece, and to more the longer the fetch takes.
pub(super) struct Across {
    salt: u64,
    /// Of so many machines...
    whole: u32,
    /// ...so many are meant.
    part: u32,
}

impl Across {
    pub(super) fn new(fetch: &Fetching, salt: u64, now: Time) -> Self {
        /// Machines of a zone that a piece falls to, in 16ths: at the start, and added until the end, few of them before
        /// the second half: what came into a zone early takes its time to come round there.
        const START: u32 = 16;
        const MORE: u32 = 120;
        /// In a zone of so few machines some that die or lie are a large part of it: then more are added.
        const SMALL: u32 = 256;
        const MORE_OF_SMALL: u32 = 240;
        /// When at most one piece of so many is missing, twice as many are meant: what fell to none of a zone is what all of it
        /// would wait for until they stall, and little can be fetched needlessly by then.
        const LAST: u32 = 64;
        /// A machine does not know how large its zone is: most regions have three.
        const ZONES: u32 = 3;
        let held = u64::from(fetch.pieces - fetch.missing());
        let pieces = u64::from(fetch.pieces.max(1));
        let zone = (fetch.fleet / ZONES).max(1);
        let more = if zone <= SMALL { MORE_OF_SMALL } else { MORE };
        let more = u64::from(more) * held * held / (pieces * pieces);
        let stalls = now.since(fetch.progressed_at).as_nanos() / stall(fetch).as_nanos();
        let is_last = fetch.missing() <= fetch.pieces / LAST;
        // No more than everybody.
        let part = (START + more as u32) << (stalls + u128::from(is_last)).min(20);
        let whole = zone.saturating_mul(16);
        Self { salt, whole, part }
    }

    /// Those that fall to this machine.
    fn ours(&self, word: usize, mut lone: u64) -> u64 {
        let mut ours = 0;
        while lone != 0 {
            let bit = lone & lone.wrapping_neg();
            lone ^= bit;
            let piece = word as u64 * 64 + u64::from(bit.trailing_zeros());
            if below(mix(self.salt ^ piece), self.part, self.whole) {
                ours |= bit;
            }
        }
        ours
    }
}

/// The rarest missing piece that a free neighbour has, among about `scan` candidates from a random place
/// on; of equally rare ones any.
pub(super) fn choose(
    fetch: &Fetching,
    neighbours: &Neighbours,
    free: Free,
    across: &Across,
    scan: u32,
    salt: u64,
) -> Option<u32> {
    /// Lines that are enough for most machines: less to set up.
    const LINES_FEW: usize = 6;
    if free.near | free.far == 0 {
        None
    } else if neighbours.taken() >> (LINES_FEW * 8) == 0 {
        choose_in::<LINES_FEW>(fetch, neighbours, free, across, scan, salt)
    } else {
        choose_in::<{ SLOTS_MAX / 8 }>(fetch, neighbours, free, across, scan, salt)
    }
}

/// The 64 pieces that a choice begins with.
pub(super) fn first_word(fetch: &Fetching, salt: u64) -> usize {
    any_below(fetch.words() as u32, salt << 32) as usize
}

fn choose_in<const LINES: usize>(
    fetch: &Fetching,
    neighbours: &Neighbours,
    free: Free,
    across: &Across,
    scan: u32,
    salt: u64,
) -> Option<u32> {
    let near_masks = masks::<LINES>(free.near);
    // Most machines ask nobody in another zone at all.
    let others = (free.far != 0).then(|| (masks::<LINES>(free.far), masks::<LINES>(free.zone)));
    let words = fetch.words();
    let start = first_word(fetch, salt);
    let mut seen = 0;
    // How many hold the rarest, how many of those were met, and some of them.
    let mut best: Option<(u32, u32, usize, u64)> = None;
    for at in (start..words).chain(0..start) {
        let missing = fetch.missing_word(at);
        if missing == 0 {
            continue;
        }
        let lines = neighbours.word(at);
        let mut candidates = missing & together(lines, &near_masks);
        let mut ours = 0;
        if let Some((far_masks, zone_masks)) = &others
            && missing & !candidates != 0
        {
            let lone = missing & !candidates & together(lines, far_masks);
            if lone != 0 {
                ours = across.ours(at, lone & !together(lines, zone_masks));
                candidates |= ours;
            }
        }
        if candidates == 0 {
            continue;
        }
        seen += candidates.count_ones();
        // What our zone waits for comes before all else.
        let (count, equal) = if ours == 0 { rarest(lines, candidates) } else { (0, ours) };
        let ones = equal.count_ones();
        best = match best {
            Some(best) if best.0 < count => Some(best),
            Some((_, met, word, some)) if best.is_some_and(|best| best.0 == count) => {
                let met = met + ones;
                let takes = any_below(met, mix(salt ^ at as u64)) < ones;
                let (word, some) = if takes { (at, equal) } else { (word, some) };
                Some((count, met, word, some))
            }
            _ => Some((count, ones, at, equal)),
        };
        if seen >= scan {
            break;
        }
    }
    best.map(|(_, _, word, some)| word as u32 * u64::BITS + any_bit(some, salt))
}

/// A word of ones for each slot of a set, laid out as the slots' words are.
fn masks<const LINES: usize>(slots: Slots) -> [Line; LINES] {
    core::array::from_fn(|line| {
        let bits = (slots >> (line * 8)) as u64;
        Line(core::array::from_fn(|at| 0_u64.wrapping_sub(bits >> at & 1)))
    })
}

/// What the slots of a set hold of 64 pieces together.
fn together(lines: &[Line], masks: &[Line]) -> u64 {
    let mut all = [0; 8];
    for (line, mask) in lines.iter().zip(masks) {
        for ((all, word), mask) in all.iter_mut().zip(line.0).zip(mask.0) {
            *all |= word & mask;
        }
    }
    all.into_iter().fold(0, |all, word| all | word)
}

/// An even choice below `count` by the upper half of `roll`.
fn any_below(count: u32, roll: u64) -> u32 {
    (((roll >> 32) * u64::from(count)) >> 32) as u32
}

/// One of `among` bits, an even choice by the upper half of `salt`.
fn any_bit(mut among: u64, salt: u64) -> u32 {
    for _ in 0..any_below(among.count_ones(), salt) {
        among &= among - 1;
    }
    among.trailing_zeros()
}

#[cfg(test)]
mod tests {
    use shoal_proto::Bitmap;

    use super::*;
    use crate::config::Config;

    /// How many machines of a zone of a thousand are meant to fetch a piece that only others have, with so many of 640 missing.
    fn meant(missing: u32) -> f64 {
        let mut held = Bitmap::empty(640);
        (missing..640).for_each(|piece| _ = held.insert(piece));
        let fetch = Fetching::new(&held, 0, false, 3_000, Time::ZERO, &Config::default());
        let across = Across::new(&fetch, 7, Time::ZERO);
        f64::from(across.part) * 1_000.0 / f64::from(across.whole)
    }

    #[test]
    fn more_machines_fetch_from_other_zones_the_more_is_held_and_twice_as_many_the_last_pieces() {
        assert!((meant(640) - 1.0).abs() < 0.1 && (meant(320) - 2.9).abs() < 0.1);
        assert!((meant(11) - 8.2).abs() < 0.1, "{}", meant(11));
        assert!((meant(10) - 16.5).abs() < 0.2, "{}", meant(10));
    }
}
