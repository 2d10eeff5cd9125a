//! What the policy knows of one swarm.

use alloc::{boxed::Box, collections::BTreeMap, vec, vec::Vec};

use shoal_proto::{Bitmap, PieceIndex, region::LEASE_BLOCK_PIECES};

use super::{PieceState, peers::PieceTime};
use crate::{event::PeerKey, time::Time};

/// What a neighbour holds.
#[derive(Debug, Clone)]
pub(super) enum Holds {
    /// Every piece.
    All,
    /// These; kept only while we fetch.
    Some(Bitmap),
    /// Not all; which ones does not matter to a machine that fetches nothing.
    Partly,
}

impl Holds {
    pub(super) fn contains(&self, piece: u32) -> bool {
        match self {
            Self::All => true,
            Self::Some(have) => have.contains(piece),
            Self::Partly => false,
        }
    }

    pub(super) fn word(&self, at: usize) -> u64 {
        match self {
            Self::All => u64::MAX,
            Self::Some(have) => have.words().get(at).copied().unwrap_or(0),
            Self::Partly => 0,
        }
    }

    pub(super) fn is_all(&self) -> bool {
        matches!(self, Self::All)
    }
}

/// One artifact's swarm.
#[derive(Debug, Clone)]
pub(super) struct State {
    pub(super) pieces: u32,
    pub(super) held: Bitmap,
    /// There until every piece is held; never for a seed.
    pub(super) fetch: Option<Box<Fetching>>,
    pub(super) neighbours: BTreeMap<PeerKey, Holds>,
    /// Held pieces that neighbours were not told of.
    pub(super) untold: Vec<PieceIndex>,
    pub(super) tell_at: Option<Time>,
    pub(super) reannounce_at: Time,
    pub(super) want_peers_at: Time,
    pub(super) want_peers_streak: u32,
}

/// What there is to know while pieces are missing.
#[derive(Debug, Clone)]
pub(super) struct Fetching {
    pub(super) priority: u8,
    pub(super) may_lease: bool,
    pub(super) fleet: u32,
    /// The truth about each piece.
    states: Box<[PieceState]>,
    /// Those in state [`PieceState::Missing`], to scan 64 at a time.
    missing: Bitmap,
    /// Neighbours without all pieces that hold each.
    partial: Box<[u16]>,
    /// Neighbours with all pieces.
    pub(super) seeds: u16,
    pub(super) times: PieceTime,
    /// Requests to peers under way.
    pub(super) requests: usize,
    pub(super) blocks: Box<[Block]>,
    /// Pieces in state [`PieceState::Leased`], and until when.
    pub(super) leases: BTreeMap<u32, Time>,
    /// Pieces that the bucket gave wrong or not at all: not read again before this.
    pub(super) spoilt: BTreeMap<u32, Time>,
    pub(super) origin_rests_until: Time,
    pub(super) origin_failed: u32,
    /// Unanswered lease questions since the last answer.
    pub(super) lease_failed: u32,
    pub(super) lease_rests_until: Time,
    /// How far the fallback has gone: 0 not at all, then the part doubles with each level.
    pub(super) level: u32,
    pub(super) level_at: Time,
}

/// What a region process said of a lease block.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Block {
    /// How many pieces were asked for, while the question is open.
    pub(super) asking: Option<u16>,
    /// Not asked about before this.
    pub(super) rests_until: Time,
}

impl State {
    /// Notes a neighbour's pieces anew; true when it was no neighbour, or was complete and no longer is.
    pub(super) fn joined(&mut self, peer: PeerKey, have: Bitmap) -> bool {
        let before = self.left(peer);
        let holds = match &mut self.fetch {
            _ if have.is_full() => Holds::All,
            None => Holds::Partly,
            Some(fetch) => {
                have.iter().for_each(|piece| fetch.partial[piece as usize] += 1);
                Holds::Some(have)
            }
        };
        if let (Holds::All, Some(fetch)) = (&holds, &mut self.fetch) {
            fetch.seeds += 1;
        }
        let all = holds.is_all();
        self.neighbours.insert(peer, holds);
        before.is_none_or(|before| before.is_all() && !all)
    }

    /// Forgets a neighbour; what it held.
    pub(super) fn left(&mut self, peer: PeerKey) -> Option<Holds> {
        let holds = self.neighbours.remove(&peer)?;
        if let Some(fetch) = &mut self.fetch {
            match &holds {
                Holds::All => fetch.seeds -= 1,
                Holds::Some(have) => {
                    have.iter().for_each(|piece| fetch.partial[piece as usize] -= 1);
                }
                Holds::Partly => {}
            }
        }
        Some(holds)
    }

    /// A neighbour holds one more piece; true when it is news about a piece that we lack.
    pub(super) fn has(&mut self, peer: PeerKey, piece: u32) -> bool {
        let (Some(fetch), Some(holds)) = (&mut self.fetch, self.neighbours.get_mut(&peer)) else {
            return false;
        };
        let Holds::Some(have) = holds else { return false };
        if !have.insert(piece) {
            return false;
        }
        fetch.partial[piece as usize] += 1;
        if have.is_full() {
            fetch.partial.iter_mut().for_each(|count| *count -= 1);
            fetch.seeds += 1;
            *holds = Holds::All;
        }
        fetch.state(piece) == Some(PieceState::Missing)
    }

    /// A neighbour turned out not to hold a piece, or to hold it wrong.
    pub(super) fn has_not(&mut self, peer: PeerKey, piece: u32) {
        let (Some(fetch), Some(holds)) = (&mut self.fetch, self.neighbours.get_mut(&peer)) else {
            return;
        };
        if holds.is_all() {
            fetch.seeds -= 1;
            fetch.partial.iter_mut().for_each(|count| *count += 1);
            *holds = Holds::Some(Bitmap::full(self.pieces));
        }
        if let Holds::Some(have) = holds
            && have.remove(piece)
        {
            fetch.partial[piece as usize] -= 1;
        }
    }

    /// What a piece is.
    pub(super) fn piece_state(&self, piece: u32) -> Option<PieceState> {
        match &self.fetch {
            Some(fetch) => fetch.state(piece),
            None if piece >= self.pieces => None,
            None if self.held.contains(piece) => Some(PieceState::Held),
            None => Some(PieceState::Missing),
        }
    }

    /// Every piece is held: what only a fetch needs is dropped.
    pub(super) fn finish(&mut self) {
        self.fetch = None;
        for holds in self.neighbours.values_mut() {
            if let Holds::Some(_) = holds {
                *holds = Holds::Partly;
            }
        }
    }
}

impl Fetching {
    pub(super) fn new(
        held: &Bitmap,
        priority: u8,
        may_lease: bool,
        fleet: u32,
        first_level_at: Time,
    ) -> Self {
        let pieces = held.len();
        let mut missing = Bitmap::full(pieces);
        let mut states = vec![PieceState::Missing; pieces as usize];
        for piece in held.iter() {
            missing.remove(piece);
            states[piece as usize] = PieceState::Held;
        }
        let blocks = pieces.div_ceil(LEASE_BLOCK_PIECES) as usize;
        Self {
            priority,
            may_lease,
            fleet,
            states: states.into_boxed_slice(),
            missing,
            partial: vec![0; pieces as usize].into_boxed_slice(),
            seeds: 0,
            times: PieceTime::default(),
            requests: 0,
            blocks: vec![Block::default(); blocks].into_boxed_slice(),
            leases: BTreeMap::new(),
            spoilt: BTreeMap::new(),
            origin_rests_until: Time::ZERO,
            origin_failed: 0,
            lease_failed: 0,
            lease_rests_until: Time::ZERO,
            level: 0,
            level_at: first_level_at,
        }
    }

    pub(super) fn state(&self, piece: u32) -> Option<PieceState> {
        self.states.get(piece as usize).copied()
    }

    /// The one place where a piece changes its state.
    pub(super) fn set(&mut self, piece: u32, state: PieceState) {
        self.states[piece as usize] = state;
        if state == PieceState::Missing {
            self.missing.insert(piece);
        } else {
            self.missing.remove(piece);
        }
    }

    pub(super) fn missing(&self) -> &Bitmap {
        &self.missing
    }

    /// How many neighbours hold a piece.
    pub(super) fn available(&self, piece: u32) -> u16 {
        self.partial[piece as usize] + self.seeds
    }
}
