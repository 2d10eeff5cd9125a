//! What the policy knows of one swarm.

use alloc::{boxed::Box, vec, vec::Vec};

use shoal_proto::{Bitmap, PieceIndex, region::LEASE_BLOCK_PIECES};

use super::{
    PieceState,
    neighbours::{Neighbours, Slots},
    peers::PieceTime,
};
use crate::{
    config::Config,
    event::{PeerKey, SwarmKey},
    prefetch::prefetch,
    time::Time,
};

/// All swarms of a machine. Most machines have one: it lies in the machine itself, with no pointer
/// between.
#[derive(Debug, Clone, Default)]
pub(super) struct States {
    /// Any of them; there unless there is none at all.
    one: Option<State>,
    /// The others, by key.
    more: Vec<State>,
}

impl States {
    pub(super) fn get(&self, key: SwarmKey) -> Option<&State> {
        match &self.one {
            Some(state) if state.key == key => Some(state),
            _ => self.place(key).ok().map(|at| &self.more[at]),
        }
    }

    pub(super) fn get_mut(&mut self, key: SwarmKey) -> Option<&mut State> {
        match &mut self.one {
            Some(state) if state.key == key => Some(state),
            _ => {
                let at = self.more.binary_search_by_key(&key, |state| state.key).ok()?;
                self.more.get_mut(at)
            }
        }
    }

    fn place(&self, key: SwarmKey) -> Result<usize, usize> {
        self.more.binary_search_by_key(&key, |state| state.key)
    }

    /// Adds a swarm that is not there.
    pub(super) fn insert(&mut self, state: State) {
        if self.one.is_none() {
            self.one = Some(state);
        } else if let Err(at) = self.place(state.key) {
            self.more.insert(at, state);
        }
    }

    pub(super) fn remove(&mut self, key: SwarmKey) -> Option<State> {
        match self.one.take_if(|state| state.key == key) {
            Some(state) => {
                self.one = self.more.pop();
                Some(state)
            }
            None => self.place(key).ok().map(|at| self.more.remove(at)),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.more.len() + usize::from(self.one.is_some())
    }

    /// The swarm at this place, to go over all of them while they are worked on.
    pub(super) fn at(&self, at: usize) -> Option<&State> {
        match at.checked_sub(1) {
            None => self.one.as_ref(),
            Some(at) => self.more.get(at),
        }
    }

    pub(super) fn at_mut(&mut self, at: usize) -> Option<&mut State> {
        match at.checked_sub(1) {
            None => self.one.as_mut(),
            Some(at) => self.more.get_mut(at),
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &State> {
        self.one.iter().chain(&self.more)
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut State> {
        self.one.iter_mut().chain(&mut self.more)
    }

    pub(super) fn fetch(&self, key: SwarmKey) -> Option<&Fetching> {
        self.get(key)?.fetch.as_deref()
    }

    pub(super) fn fetch_mut(&mut self, key: SwarmKey) -> Option<&mut Fetching> {
        self.get_mut(key)?.fetch.as_deref_mut()
    }
}

/// One artifact's swarm. In the order of the fields, as [`super::Swarm`] is.
#[derive(Debug, Clone)]
#[repr(C, align(64))]
pub(super) struct State {
    pub(super) key: SwarmKey,
    /// There until every piece is held; never for a seed.
    pub(super) fetch: Option<Box<Fetching>>,
    pub(super) held: Bitmap,
    pub(super) pieces: u32,
    /// The slot whose turn it is to be offered a place.
    pub(super) offer_turn: u32,
    /// What was given to the present neighbours while few of them held everything.
    pub(super) given: Option<Box<Bitmap>>,
    pub(super) neighbours: Neighbours,
    /// Held pieces that neighbours were not told of.
    pub(super) untold: Vec<PieceIndex>,
    pub(super) tell_at: Option<Time>,
    pub(super) reannounce_at: Time,
    pub(super) want_peers_at: Time,
    pub(super) want_peers_streak: u32,
}

/// What there is to know while pieces are missing. In the order of the fields, three lines.
#[derive(Debug, Clone)]
#[repr(C, align(64))]
pub(super) struct Fetching {
    /// 64 pieces each.
    words: Box<[Word]>,
    pub(super) pieces: u32,
    /// Those in state [`PieceState::Missing`].
    missing: u32,
    pub(super) fleet: u32,
    pub(super) priority: u8,
    may_lease: bool,
    pub(super) times: PieceTime,
    /// When the last piece was gained; at first, when the fetch began.
    pub(super) progressed_at: Time,
    /// When a neighbour last gave us a piece; at first, when the fetch began.
    pub(super) served_at: Time,
    pub(super) piece_bytes: u64,
    /// Bytes that neighbours gave us, from what others of this machine had when the fetch began.
    pub(super) gained: u64,
    /// Requests to peers under way.
    pub(super) requests: u32,
    /// How far the fallback has gone: 0 not at all, then the part doubles with each level.
    pub(super) level: u32,
    pub(super) level_at: Time,
    pub(super) origin_rests_until: Time,
    pub(super) origin_failed: u32,
    /// Unanswered lease questions since the last answer.
    pub(super) lease_failed: u32,
    pub(super) lease_rests_until: Time,
    /// Pieces in state [`PieceState::Leased`], and until when.
    pub(super) leases: Deadlines,
    /// Pieces that the bucket gave wrong or not at all: not read again before this.
    pub(super) spoilt: Deadlines,
    /// Only for a machine that may lease.
    pub(super) blocks: Box<[Block]>,
}

/// The states of 64 pieces, as far as no list tells them.
#[derive(Debug, Clone, Copy, Default)]
struct Word {
    missing: u64,
    asked: u64,
}

/// What a region process said of a lease block.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Block {
    /// How many pieces were asked for, while the question is open.
    pub(super) asking: Option<u16>,
    /// Not asked about before this.
    pub(super) rests_until: Time,
}

/// A few pieces, ascending, each with an instant.
#[derive(Debug, Clone, Default)]
pub(super) struct Deadlines(Vec<(u32, Time)>);

impl Deadlines {
    fn place(&self, piece: u32) -> Result<usize, usize> {
        self.0.binary_search_by_key(&piece, |(piece, _)| *piece)
    }

    pub(super) fn contains(&self, piece: u32) -> bool {
        self.place(piece).is_ok()
    }

    pub(super) fn insert(&mut self, piece: u32, at: Time) {
        match self.place(piece) {
            Ok(place) => self.0[place].1 = at,
            Err(place) => self.0.insert(place, (piece, at)),
        }
    }

    pub(super) fn remove(&mut self, piece: u32) {
        if let Ok(place) = self.place(piece) {
            self.0.remove(place);
        }
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn pieces(&self) -> impl Iterator<Item = u32> {
        self.0.iter().map(|(piece, _)| *piece)
    }

    pub(super) fn times(&self) -> impl Iterator<Item = Time> {
        self.0.iter().map(|(_, at)| *at)
    }

    /// Takes out one whose time has come.
    pub(super) fn take_due(&mut self, now: Time) -> Option<u32> {
        let due = self.0.iter().position(|(_, at)| *at <= now)?;
        Some(self.0.remove(due).0)
    }
}

impl State {
    /// Notes a neighbour's pieces anew, if there is room for it. Its slot, whether it shall be answered (it was no
    /// neighbour, or was complete and no longer is), and whether it is news at all.
    pub(super) fn joined(
        &mut self,
        (key, place, near): (PeerKey, usize, bool),
        have: &Bitmap,
        max: usize,
    ) -> Option<(usize, bool, bool)> {
        let known = self.neighbours.find(key);
        let slot = match known {
            Some(slot) => slot,
            None => self.neighbours.insert(key, place, near, max)?,
        };
        let lost = self.neighbours.is_complete(slot) && !have.is_full();
        let changed = self.neighbours.set_all(slot, have);
        Some((slot, known.is_none() || lost, known.is_none() || changed))
    }

    /// A neighbour turned out not to hold a piece, or to hold it wrong.
    pub(super) fn has_not(&mut self, peer: PeerKey, piece: u32) {
        if let Some(slot) = self.neighbours.find(peer) {
            self.neighbours.clear(slot, piece);
        }
    }

    /// What a piece is.
    pub(super) fn piece_state(&self, piece: u32) -> Option<PieceState> {
        if piece >= self.pieces {
            return None;
        }
        Some(match &self.fetch {
            _ if self.held.contains(piece) => PieceState::Held,
            None => PieceState::Missing,
            Some(fetch) if fetch.is_missing(piece) => PieceState::Missing,
            Some(fetch) if fetch.is_asked(piece) => PieceState::Asked,
            Some(fetch) if fetch.leases.contains(piece) => PieceState::Leased,
            Some(_) => PieceState::Origin,
        })
    }

    /// Every piece is held: what only a fetch needs is dropped.
    pub(super) fn finish(&mut self) {
        self.fetch = None;
        self.neighbours.forget_pieces();
    }

    /// Takes one out of a set of slots: who has it.
    pub(super) fn take_slot(&self, of: &mut Slots) -> Option<PeerKey> {
        *of &= self.neighbours.taken();
        let slot = super::neighbours::members(*of).next()?;
        *of &= !(1 << slot);
        Some(self.neighbours.key(slot))
    }
}

impl Fetching {
    pub(super) fn new(
        held: &Bitmap,
        priority: u8,
        may_lease: bool,
        fleet: u32,
        now: Time,
        config: &Config,
    ) -> Self {
        let pieces = held.len();
        let all = Bitmap::full(pieces);
        let words = all.words().iter().zip(held.words());
        let mut fetch = Self {
            priority,
            may_lease: false,
            fleet,
            pieces,
            missing: pieces - held.count(),
            words: words.map(|(all, held)| Word { missing: all & !held, asked: 0 }).collect(),
            times: PieceTime::default(),
            progressed_at: now,
            served_at: now,
            requests: 0,
            piece_bytes: 0,
            gained: 0,
            blocks: Box::default(),
            leases: Deadlines::default(),
            spoilt: Deadlines::default(),
            origin_rests_until: Time::ZERO,
            origin_failed: 0,
            lease_failed: 0,
            lease_rests_until: Time::ZERO,
            level: 0,
            level_at: now + config.fallback_after,
        };
        fetch.let_lease(may_lease);
        fetch
    }

    /// Begins to read the states of 64 pieces, for `warm`.
    pub(super) fn warm_word(&self, word: usize) {
        if let Some(word) = self.words.get(word) {
            prefetch(word);
        }
    }

    /// From now on it takes its turn with others, by the bytes of its pieces.
    pub(super) fn shares(&mut self, piece_bytes: u64, turn: u64) {
        (self.piece_bytes, self.gained) = (piece_bytes, turn);
    }

    /// Bytes gained and asked for: among fetches of one priority the least has its turn.
    pub(super) fn turn(&self) -> u64 {
        self.gained + self.piece_bytes * u64::from(self.requests)
    }

    pub(super) fn may_lease(&self) -> bool {
        self.may_lease
    }

    /// Whether this machine may lease, from now on.
    pub(super) fn let_lease(&mut self, may_lease: bool) {
        self.may_lease = may_lease;
        if may_lease && self.blocks.is_empty() {
            let blocks = self.pieces.div_ceil(LEASE_BLOCK_PIECES) as usize;
            self.blocks = vec![Block::default(); blocks].into_boxed_slice();
        }
    }

    fn bit(&self, piece: u32, of: impl Fn(&Word) -> u64) -> bool {
        let word = self.words.get((piece / u64::BITS) as usize);
        word.is_some_and(|word| of(word) >> (piece % u64::BITS) & 1 == 1)
    }

    pub(super) fn is_missing(&self, piece: u32) -> bool {
        self.bit(piece, |word| word.missing)
    }

    pub(super) fn is_asked(&self, piece: u32) -> bool {
        self.bit(piece, |word| word.asked)
    }

    /// The one place where a piece changes its state. What is leased, read from the bucket or held stands in
    /// lists of its own.
    pub(super) fn set(&mut self, piece: u32, state: PieceState) {
        let word = &mut self.words[(piece / u64::BITS) as usize];
        let bit = 1 << (piece % u64::BITS);
        self.missing -= u32::from(word.missing & bit != 0);
        word.missing &= !bit;
        word.asked &= !bit;
        match state {
            PieceState::Missing => {
                word.missing |= bit;
                self.missing += 1;
            }
            PieceState::Asked => word.asked |= bit,
            PieceState::Leased | PieceState::Origin | PieceState::Held => {}
        }
    }

    /// How many pieces are in state [`PieceState::Missing`].
    pub(super) fn missing(&self) -> u32 {
        self.missing
    }

    /// How many words of 64 pieces there are.
    pub(super) fn words(&self) -> usize {
        self.words.len()
    }

    /// Those of 64 pieces that are in state [`PieceState::Missing`].
    pub(super) fn missing_word(&self, word: usize) -> u64 {
        self.words[word].missing
    }

    /// Those of 64 pieces that are in state [`PieceState::Asked`].
    pub(super) fn asked_word(&self, word: usize) -> u64 {
        self.words[word].asked
    }
}
