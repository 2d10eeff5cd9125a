//! A set of piece indices.

use alloc::{vec, vec::Vec};

use serde::{Deserialize, Serialize};

use crate::manifest::PIECES_MAX;

/// A set of piece indices below a fixed count, one bit each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(try_from = "Raw", into = "Raw")]
pub struct Bitmap {
    words: Vec<u64>,
    len: u32,
    ones: u32,
}

/// What a bitmap is on the wire: the count and the words; the rest is derived, and so cannot lie.
#[derive(Serialize, Deserialize)]
struct Raw {
    len: u32,
    words: Vec<u64>,
}

impl TryFrom<Raw> for Bitmap {
    type Error = &'static str;

    fn try_from(raw: Raw) -> Result<Self, Self::Error> {
        if raw.len > PIECES_MAX {
            return Err("bitmap of more pieces than an artifact may have");
        }
        if raw.words.len() != (raw.len as usize).div_ceil(64) {
            return Err("bitmap of the wrong length");
        }
        let tail = raw.len % 64;
        if tail != 0 && raw.words.last().is_some_and(|word| word >> tail != 0) {
            return Err("bitmap with bits past its end");
        }
        let ones = raw.words.iter().map(|word| word.count_ones()).sum();
        Ok(Self { words: raw.words, len: raw.len, ones })
    }
}

impl From<Bitmap> for Raw {
    fn from(map: Bitmap) -> Self {
        Self { len: map.len, words: map.words }
    }
}

impl Bitmap {
    /// The empty set among `len` pieces.
    #[must_use]
    pub fn empty(len: u32) -> Self {
        Self { words: vec![0; (len as usize).div_ceil(64)], len, ones: 0 }
    }

    /// The set of all `len` pieces.
    #[must_use]
    pub fn full(len: u32) -> Self {
        let mut map = Self { words: vec![u64::MAX; (len as usize).div_ceil(64)], len, ones: len };
        if let (tail @ 1.., Some(word)) = (len % 64, map.words.last_mut()) {
            *word = (1 << tail) - 1;
        }
        map
    }

    /// How many pieces there could be.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether the set is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ones == 0
    }

    /// How many pieces are in the set.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.ones
    }

    /// Whether every piece is in the set.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.ones == self.len
    }

    /// Whether `index` is in the set; an index past the end is not.
    #[must_use]
    pub fn contains(&self, index: u32) -> bool {
        index < self.len && self.words[index as usize / 64] >> (index % 64) & 1 == 1
    }

    /// Adds `index`; true when it is new and below the count.
    pub fn insert(&mut self, index: u32) -> bool {
        let new = index < self.len && !self.contains(index);
        if new {
            self.words[index as usize / 64] |= 1 << (index % 64);
            self.ones += 1;
        }
        new
    }

    /// Takes `index` out; true when it was there.
    pub fn remove(&mut self, index: u32) -> bool {
        let held = self.contains(index);
        if held {
            self.words[index as usize / 64] &= !(1 << (index % 64));
            self.ones -= 1;
        }
        held
    }

    /// The members, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.words.iter().enumerate().flat_map(|(at, &word)| {
            let base = at as u32 * 64;
            core::iter::successors((word != 0).then_some(word), |w| {
                let rest = w & (w - 1);
                (rest != 0).then_some(rest)
            })
            .map(move |w| base + w.trailing_zeros())
        })
    }

    /// The words, 64 pieces each, lowest bit first: for set operations over many bitmaps.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use super::*;
    use crate::codec;

    #[test]
    fn set_operations_agree_with_counts() {
        let mut map = Bitmap::empty(130);
        assert!(map.insert(0) && map.insert(64) && map.insert(129));
        assert!(!map.insert(129) && !map.insert(130));
        assert_eq!(map.iter().collect::<Vec<_>>(), [0, 64, 129]);
        assert_eq!(map.count(), 3);
        assert!(map.remove(64) && !map.remove(64));
        assert_eq!(map.iter().collect::<Vec<_>>(), [0, 129]);
        for len in [0, 1, 63, 64, 65, 130] {
            let full = Bitmap::full(len);
            assert!(full.is_full());
            assert_eq!(full.iter().count() as u32, len);
        }
    }

    #[test]
    fn a_bitmap_that_lies_is_refused() {
        let good = codec::encode(&Bitmap::full(70), 1024).unwrap();
        assert_eq!(codec::decode::<Bitmap>(&good, 1024).unwrap(), Bitmap::full(70));
        let past_end = codec::encode(&Raw { len: 3, words: vec![0b1000] }, 1024).unwrap();
        assert!(codec::decode::<Bitmap>(&past_end, 1024).is_err());
        let too_many = codec::encode(&Raw { len: u32::MAX, words: vec![] }, 1024).unwrap();
        assert!(codec::decode::<Bitmap>(&too_many, 1024).is_err());
    }
}
