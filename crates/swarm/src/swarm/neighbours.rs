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

use crate::event::PeerKey;

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

#[derive(Debug, Clone, Copy)]
struct Neighbour {
    key: PeerKey,
    /// Its place among the machine's peers.
    peer: u16,
    /// Pieces that it lacks; kept while we fetch.
    lacks: u32,
}

const NOBODY: Neighbour = Neighbour { key: PeerKey(0), peer: 0, lacks: 0 };

/// Who takes part in a swarm, and what each holds.
#[derive(Debug, Clone)]
pub(super) struct Neighbours {
    /// A byte of each slot's hashed key, 0 for a free slot, eight to a word.
    tags: [u64; SLOTS_MAX / LINE],
    taken: Slots,
    /// Those that hold every piece.
    complete: Slots,
    /// By slot; as long as there are slots, a multiple of [`LINE`].
    slots: Vec<Neighbour>,
    /// For each 64 pieces the words of all slots; nothing while we do not fetch. A free slot's words are 0.
    matrix: Box<[Line]>,
    pieces: u32,
    /// Whether what each holds is kept.
    tracked: bool,
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
            tags: [0; SLOTS_MAX / LINE],
            taken: 0,
            complete: 0,
            slots: Vec::new(),
            matrix: Box::default(),
            pieces,
            tracked,
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

    pub(super) fn key(&self, slot: usize) -> PeerKey {
        self.slots[slot].key
    }

    /// The place among the machine's peers of the one in this slot.
    pub(super) fn peer(&self, slot: usize) -> usize {
        usize::from(self.slots[slot].peer)
    }

    /// The words of all slots for the 64 pieces from `word * 64` on.
    pub(super) fn word(&self, word: usize) -> &[Line] {
        let lines = self.lines();
        self.matrix.get(word * lines..(word + 1) * lines).unwrap_or_default()
    }

    fn lines(&self) -> usize {
        self.slots.len() / LINE
    }

    fn words(&self) -> usize {
        if self.tracked { self.pieces.div_ceil(u64::BITS) as usize } else { 0 }
    }

    /// The slot of a neighbour.
    pub(super) fn find(&self, key: PeerKey) -> Option<usize> {
        let tag = tag(key) * EACH_BYTE;
        for (at, tags) in self.tags.iter().take(self.lines()).enumerate() {
            // A bit for each byte that is 0, and now and then for one above it.
            let same = tags ^ tag;
            let mut hits = same.wrapping_sub(EACH_BYTE) & !same & EACH_BYTE << 7;
            while hits != 0 {
                let slot = at * LINE + hits.trailing_zeros() as usize / LINE;
                if self.slots[slot].key == key && self.taken >> slot & 1 == 1 {
                    return Some(slot);
                }
                hits &= hits - 1;
            }
        }
        None
    }

    /// Gives a peer a slot, if there are fewer than `max` neighbours.
    pub(super) fn insert(&mut self, key: PeerKey, peer: usize, max: usize) -> Option<usize> {
        if self.len() >= max.min(SLOTS_MAX) {
            return None;
        }
        let slot = self.taken.trailing_ones() as usize;
        if slot >= self.slots.len() {
            self.grow();
        }
        let lacks = self.pieces;
        self.slots[slot] = Neighbour { key, peer: u16::try_from(peer).ok()?, lacks };
        self.tags[slot / LINE] |= tag(key) << (slot % LINE * 8);
        self.taken |= 1 << slot;
        Some(slot)
    }

    /// Frees a slot.
    pub(super) fn remove(&mut self, slot: usize) {
        self.tags[slot / LINE] &= !(0xff << (slot % LINE * 8));
        self.taken &= !(1 << slot);
        self.complete &= !(1 << slot);
        self.slots[slot] = NOBODY;
        for word in 0..self.words() {
            *self.bits(slot, word) = 0;
        }
    }

    /// The peer of a slot has another place among the machine's peers.
    pub(super) fn moved(&mut self, slot: usize, peer: usize) {
        self.slots[slot].peer = u16::try_from(peer).unwrap_or(u16::MAX);
    }

    fn grow(&mut self) {
        let old = self.lines();
        self.slots.reserve_exact(LINE);
        self.slots.resize(self.slots.len() + LINE, NOBODY);
        let mut matrix = Vec::with_capacity(self.words() * (old + 1));
        for word in 0..self.words() {
            matrix.extend_from_slice(&self.matrix[word * old..(word + 1) * old]);
            matrix.push(Line::default());
        }
        self.matrix = matrix.into_boxed_slice();
    }

    fn bits(&mut self, slot: usize, word: usize) -> &mut u64 {
        let line = word * self.lines() + slot / LINE;
        &mut self.matrix[line].0[slot % LINE]
    }

    /// Notes all that a neighbour holds; whether that changes anything.
    pub(super) fn set_all(&mut self, slot: usize, have: &Bitmap) -> bool {
        let mut changed = have.is_full() != self.is_complete(slot);
        if have.is_full() {
            self.complete |= 1 << slot;
        } else {
            self.complete &= !(1 << slot);
        }
        if self.tracked {
            self.slots[slot].lacks = have.len() - have.count();
            for (word, new) in have.words().iter().enumerate() {
                let bits = self.bits(slot, word);
                changed |= *bits != *new;
                *bits = *new;
            }
        }
        changed
    }

    /// A neighbour holds one more piece; whether that is news.
    pub(super) fn set(&mut self, slot: usize, piece: u32) -> bool {
        if !self.tracked || piece >= self.pieces {
            return false;
        }
        let bit = 1 << (piece % u64::BITS);
        let bits = self.bits(slot, (piece / u64::BITS) as usize);
        if *bits & bit != 0 {
            return false;
        }
        *bits |= bit;
        let lacks = &mut self.slots[slot].lacks;
        *lacks -= 1;
        if *lacks == 0 {
            self.complete |= 1 << slot;
        }
        true
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
            self.slots[slot].lacks += 1;
            self.complete &= !(1 << slot);
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

    /// The slots whose peer passes, by its place among the machine's peers; each of them may pass
    /// several tests, a bit for each.
    pub(super) fn filter<const TESTS: usize>(
        &self,
        passes: impl Fn(usize) -> [bool; TESTS],
    ) -> [Slots; TESTS] {
        let mut passed = [0; TESTS];
        for (at, line) in self.slots.chunks_exact(LINE).enumerate() {
            let mut bits = [[0; LINE]; TESTS];
            for (slot, neighbour) in line.iter().enumerate() {
                let passes = passes(usize::from(neighbour.peer));
                for (bits, passes) in bits.iter_mut().zip(passes) {
                    bits[slot] = u64::from(passes);
                }
            }
            for (passed, bits) in passed.iter_mut().zip(bits) {
                *passed |= set_of_line(at, bits);
            }
        }
        passed.map(|passed| passed & self.taken)
    }

    /// What anybody holds of 64 pieces.
    pub(super) fn anyones(&self, word: usize) -> u64 {
        self.word(word).iter().flat_map(|line| line.0).fold(0, |all, word| all | word)
    }

    /// Whether anybody holds a piece.
    pub(super) fn anyone_has(&self, piece: u32) -> bool {
        self.anyones((piece / u64::BITS) as usize) >> (piece % u64::BITS) & 1 == 1
    }

    /// Those that lack at least one of `pieces`, as far as it is known.
    pub(super) fn lacking(&self, pieces: &[PieceIndex]) -> Slots {
        let mut holders = self.taken;
        for piece in pieces {
            holders &= self.holders(piece.0);
        }
        self.taken & !holders
    }

    /// What each holds matters no longer.
    pub(super) fn forget_pieces(&mut self) {
        self.matrix = Box::default();
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
            let lacks = self.slots[slot].lacks;
            let tagged = if free(slot) { 0 } else { tag(self.slots[slot].key) };
            tag_of(slot) == tagged
                && (!free(slot) || held == 0 && !self.is_complete(slot))
                && (free(slot) || self.find(self.slots[slot].key) == Some(slot))
                && row(slot).next_back().is_none_or(|word| word & !tail == 0)
                && (!self.tracked
                    || free(slot)
                    || held + lacks == self.pieces && self.is_complete(slot) == (lacks == 0))
        };
        self.matrix.len() == self.words() * self.lines()
            && members(self.taken).all(|slot| slot < self.slots.len())
            && (0..self.slots.len()).all(sound)
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, vec::Vec};

    use proptest::prelude::*;

    use super::*;

    proptest! {
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
            steps in prop::collection::vec((0..4u8, 0..160u64, 0..80u32), 0..600),
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
                        let fits = slots.insert(key, 0, SLOTS_MAX).is_some();
                        prop_assert_eq!(fits, model.len() < SLOTS_MAX);
                        if fits {
                            model.insert(key, Bitmap::empty(pieces));
                        }
                    }
                    (1, Some(slot)) => {
                        slots.clear(slot, piece);
                        model.get_mut(&key).map(|have| have.remove(piece));
                    }
                    (_, Some(slot)) => {
                        let new = model.get_mut(&key).is_some_and(|have| have.insert(piece));
                        prop_assert_eq!(slots.set(slot, piece), new);
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
                prop_assert_eq!(slots.anyone_has(piece), holders > 0);
                prop_assert_eq!(slots.lacking(&[PieceIndex(piece)]).count_ones() as usize, model.len() - holders);
            }
        }
    }
}
