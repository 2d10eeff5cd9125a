//! The neighbours of one swarm: who takes part, and who holds what.
//!
//! A neighbour has a slot, and while we fetch the slot has one bit for each piece. The bits lie word by
//! word: the words of all slots for the same 64 pieces stand side by side in a few cache lines. So a
//! HAVE is one lookup and one OR, and a pick reads in one go what all neighbours hold of 64 pieces. How many
//! hold each of them is not kept but counted when it is needed, 64 pieces at a time (bit-sliced, with
//! carry-save adders: Harley and Seal's population count, see Warren, *Hacker's Delight*, 5-1).
//!
//! 100,000 machines are touched in random order by a simulator: what counts are cache misses one after
//! the other. The tags lie in the machine itself, and tell the slot without following a pointer.

use alloc::{boxed::Box, vec::Vec};

use shoal_proto::{Bitmap, PieceIndex};

use crate::{event::PeerKey, prefetch::prefetch, time::Time};

/// The most slots that there may be: a set of them is the bits of a `u128`.
pub(super) const SLOTS_MAX: usize = 128;

/// Slots in a cache line; they are added by as many.
const LINE: usize = 8;

/// A one in each byte of a word.
const EACH_BYTE: u64 = u64::MAX / 0xff;

/// A set of slots.
pub(super) type Slots = u128;

/// The words of eight slots for the same 64 pieces.
#[derive(Debug, Clone, Copy, Default)]
#[repr(align(64))]
pub(super) struct Line(pub(super) [u64; LINE]);

/// Words that say who a neighbour is: its key; its place among the machine's peers in the upper half of
/// the second, how many pieces it lacks (kept while we fetch) in the lower.
const WHO: usize = 2;

/// Who takes part in a swarm, and what each holds. The fields lie in their order, three lines that most is found in.
#[derive(Debug, Clone)]
#[repr(C, align(64))]
pub(super) struct Neighbours {
    taken: Slots,
    /// Those that hold every piece.
    complete: Slots,
    /// Those that hold one piece or none, and not all.
    beginners: Slots,
    /// Those in our zone.
    near: Slots,
    /// Those that may have to rest or have enough requests, and some that need not.
    watched: Slots,
    /// Those of them that answered BUSY, and have offered nothing since.
    busy: Slots,
    /// Those that do not answer: what they say they hold is asked of them, and of others and the bucket too.
    mute: Slots,
    /// When the first of those that are watched may be free.
    watch_at: Time,
    pieces: u32,
    /// Slots that there are, in lines.
    lines: u16,
    /// Whether what each holds is kept.
    tracked: bool,
    /// First who is in each slot, [`WHO`] words a slot, then for each 64 pieces the words of all slots: none
    /// while we do not fetch. The words of a free slot are 0. One piece of memory: a HAVE stays on a page.
    table: Box<[Line]>,
    /// A byte of each slot's hashed key, 0 for a free slot, eight to a word.
    tags: [u64; SLOTS_MAX / LINE],
}

/// The members of a set of slots, ascending.
pub(super) fn members(mut slots: Slots) -> impl Iterator<Item = usize> {
    core::iter::from_fn(move || {
        let slot = slots.trailing_zeros() as usize;
        slots &= slots.wrapping_sub(1);
        (slot < SLOTS_MAX).then_some(slot)
    })
}

/// The set of those slots of one line whose bit is 1.
fn set_of_line(line: usize, bits: [u64; LINE]) -> Slots {
    let mut set = 0;
    for (at, bit) in bits.into_iter().enumerate() {
        set |= bit << at;
    }
    Slots::from(set) << (line * LINE)
}

fn tag(key: PeerKey) -> u64 {
    (key.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56).max(1)
}

/// The sum and the carry of three numbers, for 64 columns at once.
fn add(a: u64, b: u64, c: u64) -> (u64, u64) {
    let half = a ^ b;
    (half ^ c, a & b | half & c)
}

/// The members of `among` that the fewest slots hold, and how many hold each of those.
pub(super) fn rarest(lines: &[Line], among: u64) -> (u32, u64) {
    let (mut ones, mut twos, mut fours) = (0, 0, 0);
    // Eights, sixteens, up to [`SLOTS_MAX`].
    let mut more = [0; 5];
    for Line(words) in lines {
        let (sum, two_a) = add(ones, words[0], words[1]);
        let (sum, two_b) = add(sum, words[2], words[3]);
        let (sum_twos, four_a) = add(twos, two_a, two_b);
        let (sum, two_a) = add(sum, words[4], words[5]);
        let (sum, two_b) = add(sum, words[6], words[7]);
        let (sum_twos, four_b) = add(sum_twos, two_a, two_b);
        let (sum_fours, mut carry) = add(fours, four_a, four_b);
        (ones, twos, fours) = (sum, sum_twos, sum_fours);
        for plane in &mut more {
            let next = *plane & carry;
            *plane ^= carry;
            carry = next;
        }
    }
    let (mut fewest, mut count) = (among, 0);
    for plane in more.into_iter().rev().chain([fours, twos, ones]) {
        let without = fewest & !plane;
        count = count * 2 + u32::from(without == 0);
        if without != 0 {
            fewest = without;
        }
    }
    (count, fewest)
}

impl Neighbours {
    /// Nobody yet; what each holds of `pieces` is kept if `tracked`.
    pub(super) fn new(pieces: u32, tracked: bool) -> Self {
        Self {
            taken: 0,
            complete: 0,
            beginners: 0,
            near: 0,
            watched: 0,
            busy: 0,
            mute: 0,
            watch_at: Time::ZERO,
            pieces,
            lines: 0,
            tracked,
            table: Box::default(),
            tags: [0; SLOTS_MAX / LINE],
        }
    }

    pub(super) fn len(&self) -> usize {
        self.taken.count_ones() as usize
    }

    pub(super) fn taken(&self) -> Slots {
        self.taken
    }

    pub(super) fn complete(&self) -> Slots {
        self.complete
    }

    pub(super) fn is_complete(&self, slot: usize) -> bool {
        self.complete >> slot & 1 == 1
    }

    pub(super) fn beginners(&self) -> Slots {
        self.beginners
    }

    pub(super) fn near(&self) -> Slots {
        self.near
    }

    pub(super) fn watched(&self) -> Slots {
        self.watched
    }

    /// When one of those that are watched may be free though nothing happens.
    pub(super) fn watch_at(&self) -> Time {
        self.watch_at
    }

    /// These may not be asked, before `until` at least...
    pub(super) fn watch(&mut self, slots: Slots, until: Time) {
        self.watched |= slots & self.taken;
        self.watch_at = self.watch_at.min(until);
    }

    /// ...and these may be.
    pub(super) fn unwatch(&mut self, slots: Slots) {
        self.watched &= !slots;
        self.busy &= !slots;
    }

    /// A neighbour that is watched answered BUSY.
    pub(super) fn is_busy(&mut self, slot: usize) {
        self.busy |= 1 << slot & self.watched;
    }

    /// How many answered BUSY, and neither offered a slot since nor have rested for long enough.
    pub(super) fn busy_count(&self) -> usize {
        self.busy.count_ones() as usize
    }

    /// All that are watched were looked at; the first may be free then.
    pub(super) fn watched_until(&mut self, until: Time) {
        self.watch_at = until;
    }

    fn lines(&self) -> usize {
        usize::from(self.lines)
    }

    fn who(&self, slot: usize) -> [u64; WHO] {
        let at = slot * WHO;
        let line = &self.table[at / LINE].0;
        [line[at % LINE], line[at % LINE + 1]]
    }

    fn who_mut(&mut self, slot: usize) -> &mut [u64] {
        let at = slot * WHO;
        &mut self.table[at / LINE].0[at % LINE..at % LINE + WHO]
    }

    pub(super) fn key(&self, slot: usize) -> PeerKey {
        PeerKey(self.who(slot)[0])
    }

    /// The place among the machine's peers of the one in this slot.
    pub(super) fn place(&self, slot: usize) -> usize {
        (self.who(slot)[1] >> 32) as usize
    }

    fn lacks(&self, slot: usize) -> u32 {
        self.who(slot)[1] as u32
    }

    /// The words of all slots for the 64 pieces from `word * 64` on.
    pub(super) fn word(&self, word: usize) -> &[Line] {
        let from = (WHO + word) * self.lines();
        self.table.get(from..from + self.lines()).unwrap_or_default()
    }

    fn words(&self) -> usize {
        if self.tracked { self.pieces.div_ceil(u64::BITS) as usize } else { 0 }
    }

    /// Begins to read who is in a slot, for `warm`.
    pub(super) fn warm_who(&self, slot: usize) {
        if let Some(line) = self.table.get(slot * WHO / LINE) {
            prefetch(line);
        }
    }

    /// Begins to read whether the one in a slot holds a piece.
    pub(super) fn warm_piece(&self, slot: usize, piece: u32) {
        let line = (WHO + (piece / u64::BITS) as usize) * self.lines() + slot / LINE;
        if let Some(line) = self.table.get(line) {
            prefetch(line);
        }
    }

    /// The slot of a neighbour.
    pub(super) fn find(&self, key: PeerKey) -> Option<usize> {
        self.tagged(key).find(|slot| self.key(*slot) == key && self.taken >> slot & 1 == 1)
    }

    /// The slot that most likely is a neighbour's, any if it has none. It is found without looking into the table.
    pub(super) fn probable(&self, key: PeerKey) -> usize {
        self.tagged(key).next().unwrap_or(0)
    }

    /// The slots with the tag of a key, and now and then another one.
    fn tagged(&self, key: PeerKey) -> impl Iterator<Item = usize> {
        let tag = tag(key) * EACH_BYTE;
        self.tags.iter().take(self.lines()).enumerate().flat_map(move |(at, tags)| {
            // A bit for each byte that is 0, and now and then for one above it.
            let same = tags ^ tag;
            let mut hits = same.wrapping_sub(EACH_BYTE) & !same & EACH_BYTE << 7;
            core::iter::from_fn(move || {
                let slot = at * LINE + hits.trailing_zeros() as usize / LINE;
                let hit = hits != 0;
                hits &= hits.wrapping_sub(1);
                hit.then_some(slot)
            })
        })
    }

    /// Gives the peer at a place a slot, if there are fewer than `max` neighbours.
    pub(super) fn insert(
        &mut self,
        key: PeerKey,
        place: usize,
        near: bool,
        max: usize,
    ) -> Option<usize> {
        if self.len() >= max.min(SLOTS_MAX) {
            return None;
        }
        let slot = self.taken.trailing_ones() as usize;
        if slot >= self.lines() * LINE {
            self.grow();
        }
        let lacks = u64::from(self.pieces);
        self.who_mut(slot).copy_from_slice(&[key.0, (place as u64) << 32 | lacks]);
        self.tags[slot / LINE] |= tag(key) << (slot % LINE * 8);
        self.taken |= 1 << slot;
        self.set_lacks(slot, self.pieces);
        self.near |= Slots::from(near) << slot;
        self.watch(1 << slot, Time::ZERO);
        Some(slot)
    }

    /// Frees a slot.
    pub(super) fn remove(&mut self, slot: usize) {
        self.tags[slot / LINE] &= !(0xff << (slot % LINE * 8));
        for set in [
            &mut self.taken,
            &mut self.complete,
            &mut self.beginners,
            &mut self.near,
            &mut self.watched,
            &mut self.busy,
            &mut self.mute,
        ] {
            *set &= !(1 << slot);
        }
        self.who_mut(slot).fill(0);
        for word in 0..self.words() {
            *self.bits(slot, word) = 0;
        }
    }

    /// The peer of a slot has another place among the machine's peers.
    pub(super) fn moved(&mut self, slot: usize, place: usize) {
        let lacks = u64::from(self.lacks(slot));
        self.who_mut(slot)[1] = (place as u64) << 32 | lacks;
    }

    fn set_lacks(&mut self, slot: usize, lacks: u32) {
        let place = self.who(slot)[1] >> 32;
        self.who_mut(slot)[1] = place << 32 | u64::from(lacks);
        let is = |is: bool| Slots::from(is) << slot;
        self.complete = self.complete & !(1 << slot) | is(lacks == 0);
        let begins = lacks > 0 && self.pieces - lacks <= 1;
        self.beginners = self.beginners & !(1 << slot) | is(begins);
    }

    fn grow(&mut self) {
        let (old, rows) = (self.lines(), self.words() + WHO);
        let mut table = Vec::with_capacity(rows * (old + 1));
        // Who is in a slot lies apart from what it holds: the new lines follow those of all.
        table.extend_from_slice(&self.table[..WHO * old]);
        table.extend_from_slice(&[Line::default(); WHO]);
        for row in WHO..rows {
            table.extend_from_slice(&self.table[row * old..(row + 1) * old]);
            table.push(Line::default());
        }
        self.table = table.into_boxed_slice();
        self.lines += 1;
    }

    fn bits(&mut self, slot: usize, word: usize) -> &mut u64 {
        let line = (WHO + word) * self.lines() + slot / LINE;
        &mut self.table[line].0[slot % LINE]
    }

    /// Notes all that a neighbour holds; whether that changes anything.
    pub(super) fn set_all(&mut self, slot: usize, have: &Bitmap) -> bool {
        let mut changed = have.is_full() != self.is_complete(slot);
        self.set_lacks(slot, have.len() - have.count());
        if self.tracked {
            for (word, new) in have.words().iter().enumerate() {
                let bits = self.bits(slot, word);
                changed |= *bits != *new;
                *bits = *new;
            }
        }
        changed
    }

    /// A neighbour holds these pieces: `news` is told of each that it was not known to hold.
    pub(super) fn set(&mut self, slot: usize, pieces: &[PieceIndex], mut news: impl FnMut(u32)) {
        if !self.tracked {
            return;
        }
        let (all, mut lacks) = (self.pieces, self.lacks(slot));
        for piece in pieces.iter().map(|piece| piece.0).filter(|piece| *piece < all) {
            let bit = 1 << (piece % u64::BITS);
            let bits = self.bits(slot, (piece / u64::BITS) as usize);
            if *bits & bit == 0 {
                *bits |= bit;
                lacks -= 1;
                news(piece);
            }
        }
        self.set_lacks(slot, lacks);
    }

    /// A neighbour turned out not to hold a piece.
    pub(super) fn clear(&mut self, slot: usize, piece: u32) {
        if !self.tracked || piece >= self.pieces {
            return;
        }
        let bit = 1 << (piece % u64::BITS);
        let bits = self.bits(slot, (piece / u64::BITS) as usize);
        if *bits & bit != 0 {
            *bits &= !bit;
            self.set_lacks(slot, self.lacks(slot) + 1);
        }
    }

    /// Those that hold a piece, as far as it is known.
    pub(super) fn holders(&self, piece: u32) -> Slots {
        let mut holders = 0;
        for (at, line) in self.word((piece / u64::BITS) as usize).iter().enumerate() {
            let bits = line.0.map(|word| word >> (piece % u64::BITS) & 1);
            holders |= set_of_line(at, bits);
        }
        holders
    }

    /// What anybody holds of 64 pieces.
    pub(super) fn anyones(&self, word: usize) -> u64 {
        self.word(word).iter().flat_map(|line| line.0).fold(0, |all, word| all | word)
    }

    /// A neighbour answers or not.
    pub(super) fn set_mute(&mut self, slot: usize, mute: bool) {
        self.mute = self.mute & !(1 << slot) | Slots::from(mute) << slot;
    }

    /// Those that do not answer.
    pub(super) fn mute(&self) -> Slots {
        self.mute
    }

    /// Whether somebody who answers holds every piece.
    pub(super) fn has_seed(&self) -> bool {
        self.complete & !self.mute != 0
    }

    /// What anybody holds of 64 pieces, but for those that do not answer.
    pub(super) fn given(&self, word: usize) -> u64 {
        if self.mute == 0 {
            return self.anyones(word);
        }
        let held = |(at, line): (usize, &Line)| {
            let answer = |each: &usize| self.mute >> (at * LINE + each) & 1 == 0;
            (0..LINE).filter(answer).fold(0, |all, each| all | line.0[each])
        };
        self.word(word).iter().enumerate().map(held).fold(0, |all, word| all | word)
    }

    /// Whether anybody holds a piece, but for those that do not answer.
    pub(super) fn anyone_gives(&self, piece: u32) -> bool {
        self.given((piece / u64::BITS) as usize) >> (piece % u64::BITS) & 1 == 1
    }

    /// Those that lack at least one of `pieces`, as far as it is known.
    pub(super) fn lacking(&self, pieces: &[PieceIndex]) -> Slots {
        let mut holders = self.taken;
        for piece in pieces {
            holders &= self.holders(piece.0);
        }
        self.taken & !holders
    }

    /// A piece of `held` that a neighbour lacks, as far as it is known: the first one from a word on.
    pub(super) fn lacked(&self, slot: usize, held: &Bitmap, from: usize) -> Option<u32> {
        let words = held.words().len();
        let from = from % words.max(1);
        (from..words).chain(0..from).find_map(|at| {
            // What each holds is not kept by who holds everything.
            let theirs = if self.tracked { self.word(at)[slot / LINE].0[slot % LINE] } else { 0 };
            let lacked = held.words()[at] & !theirs;
            (lacked != 0).then(|| at as u32 * u64::BITS + lacked.trailing_zeros())
        })
    }

    /// What each holds matters no longer.
    pub(super) fn forget_pieces(&mut self) {
        self.table = self.table[..WHO * self.lines()].into();
        self.tracked = false;
    }

    /// What must hold, for [`super::check`].
    pub(super) fn is_sound(&self) -> bool {
        let free = |slot: usize| self.taken >> slot & 1 == 0;
        let tag_of = |slot: usize| self.tags[slot / LINE] >> (slot % LINE * 8) & 0xff;
        let row = |slot: usize| {
            (0..self.words()).map(move |word| self.word(word)[slot / LINE].0[slot % LINE])
        };
        let tail = match self.pieces % u64::BITS {
            0 => u64::MAX,
            bits => (1 << bits) - 1,
        };
        let sound = |slot: usize| {
            let held = row(slot).map(u64::count_ones).sum::<u32>();
            let lacks = self.lacks(slot);
            let tagged = if free(slot) { 0 } else { tag(self.key(slot)) };
            tag_of(slot) == tagged
                && (!free(slot) || held == 0 && self.who(slot) == [0; WHO])
                && (free(slot) || self.find(self.key(slot)) == Some(slot))
                && row(slot).next_back().is_none_or(|word| word & !tail == 0)
                && (!self.tracked
                    || free(slot)
                    || held + lacks == self.pieces && self.is_complete(slot) == (lacks == 0))
        };
        self.table.len() == (WHO + self.words()) * self.lines()
            && members(self.taken).all(|slot| slot < self.lines() * LINE)
            && (self.complete | self.beginners | self.near | self.watched) & !self.taken == 0
            && self.busy & !self.watched == 0
            && (0..self.lines() * LINE).all(sound)
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, vec::Vec};

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

        #[test]
        fn the_rarest_are_found(words in prop::collection::vec(any::<[u64; 8]>(), 0..16), among in 1..u64::MAX) {
            let lines: Vec<Line> = words.iter().copied().map(Line).collect();
            let count = |bit: u32| {
                words.iter().flatten().filter(|word| **word >> bit & 1 == 1).count() as u32
            };
            let bits = || (0..64).filter(|bit| among >> bit & 1 == 1);
            let least = bits().map(count).min().unwrap_or(0);
            let all = bits().filter(|bit| count(*bit) == least).fold(0, |all, bit| all | 1_u64 << bit);
            prop_assert_eq!(rarest(&lines, among), (least, all));
        }

        #[test]
        fn slots_are_a_map(
            steps in prop::collection::vec((0..6u8, 0..160u64, 0..80u32), 0..600),
            pieces in 1..150u32,
        ) {
            let (mut slots, mut model) = (Neighbours::new(pieces, true), BTreeMap::new());
            for (kind, key, piece) in steps {
                let key = PeerKey(key * key);
                let slot = slots.find(key);
                prop_assert_eq!(slot.is_some(), model.contains_key(&key));
                match (kind, slot) {
                    (0, Some(slot)) => {
                        slots.remove(slot);
                        model.remove(&key);
                    }
                    (_, None) => {
                        let fits = slots.insert(key, 0, true, SLOTS_MAX).is_some();
                        prop_assert_eq!(fits, model.len() < SLOTS_MAX);
                        if fits {
                            model.insert(key, Bitmap::empty(pieces));
                        }
                    }
                    (1 | 2, Some(slot)) => slots.set_mute(slot, kind == 1),
                    (3, Some(slot)) => {
                        slots.clear(slot, piece);
                        model.get_mut(&key).map(|have| have.remove(piece));
                    }
                    (_, Some(slot)) => {
                        let both = [PieceIndex(piece), PieceIndex(piece / 2)];
                        let mut new = Vec::new();
                        if let Some(have) = model.get_mut(&key) {
                            new.extend(both.map(|p| p.0).into_iter().filter(|p| have.insert(*p)));
                        }
                        let mut news = Vec::new();
                        slots.set(slot, &both, |piece| news.push(piece));
                        prop_assert_eq!(news, new);
                    }
                }
                prop_assert!(slots.is_sound());
                for (key, have) in &model {
                    let slot = slots.find(*key).unwrap_or(SLOTS_MAX);
                    prop_assert_eq!(slots.is_complete(slot), have.is_full());
                    let holds = slots.holders(piece) >> slot & 1 == 1;
                    prop_assert_eq!(holds, have.contains(piece));
                }
                let holders = model.values().filter(|have| have.contains(piece)).count();
                let gives = |key: &PeerKey| slots.find(*key).is_some_and(|slot| slots.mute() >> slot & 1 == 0);
                let given = model.iter().any(|(key, have)| have.contains(piece) && gives(key));
                prop_assert_eq!(slots.anyone_gives(piece), given);
                let seed = model.iter().any(|(key, have)| have.is_full() && gives(key));
                prop_assert_eq!(slots.has_seed(), seed);
                prop_assert_eq!(slots.lacking(&[PieceIndex(piece)]).count_ones() as usize, model.len() - holders);
            }
        }
    }
}
