//! What is read from the region's bucket: a few pieces at a time, under a lease (`leasing`) or, when nobody gives one,
//! without (`fallback`).

use alloc::vec::Vec;
use core::time::Duration;

use super::{
    PieceState, Swarm,
    leasing::report,
    peers::{backoff, jitter},
    state::{Fetching, State},
};
use crate::{
    config::Config,
    event::{Action, Outcome, SwarmKey},
    time::Time,
};

/// The most pieces in one read: they are counted in the bits of a word.
const READ_PIECES_MAX: u32 = 16;

/// A read of the bucket under way.
#[derive(Debug, Clone)]
pub(super) struct Read {
    pub(super) swarm: SwarmKey,
    pub(super) first: u32,
    pub(super) count: u32,
    pub(super) at: Time,
    /// It has taken so long that its pieces may come from elsewhere.
    pub(super) late: bool,
    /// Pieces that have not ended, one bit each from `first` on.
    open: u32,
    /// Pieces read under a lease.
    pub(super) leased: u32,
    verified: u32,
    failed: bool,
    /// The swarm was stopped since: it only holds its place until it ends.
    orphan: bool,
}

impl Read {
    pub(super) fn open(&self) -> impl Iterator<Item = u32> + use<> {
        let (first, bits) = (self.first, self.open);
        (0..self.count).filter(move |at| bits >> at & 1 == 1).map(move |at| first + at)
    }

    pub(super) fn open_count(&self) -> u32 {
        if self.orphan { 0 } else { self.open.count_ones() }
    }

    pub(super) fn is_open(&self, swarm: SwarmKey, piece: u32) -> bool {
        self.swarm == swarm
            && piece >= self.first
            && piece - self.first < self.count
            && self.open >> (piece - self.first) & 1 == 1
    }

    pub(super) fn orphan(&mut self) {
        self.orphan = true;
        self.late = true;
    }
}

impl Fetching {
    /// A piece was gained: whatever feeds us may go on as it does.
    pub(super) fn progressed(&mut self, now: Time, config: &Config) {
        self.progressed_at = now;
        if self.level > 0 {
            self.level_at = self.level_at.max(now + config.fallback_step);
        } else if self.lease_failed == 0 {
            self.level_at = now + config.fallback_after;
        }
    }

    /// A neighbour gave us a piece: neighbours are not what we wait for in vain.
    pub(super) fn served(&mut self, now: Time, took: Duration) {
        self.served_at = now;
        self.times.measured(took);
    }
}

impl Swarm {
    /// Reads what is leased, asks for more leases, falls back: for each swarm, the first ones first.
    pub(super) fn use_origin(&mut self, now: Time) {
        for at in 0..self.fetching.len() {
            let key = self.fetching[at];
            self.read_leased(now, key);
            self.ask_leases(now, key);
            self.fall_back(now, key);
        }
    }

    pub(super) fn may_read(&self, now: Time, key: SwarmKey) -> Option<(&State, &Fetching)> {
        let state = self.states.get(key)?;
        let fetch = state.fetch.as_deref()?;
        let free = self.reads.len() < self.config.origin_reads_max;
        (free && fetch.origin_rests_until <= now).then_some((state, fetch))
    }

    pub(super) fn read_pieces(&self) -> u32 {
        self.config.origin_read_pieces.clamp(1, READ_PIECES_MAX)
    }

    fn read_leased(&mut self, now: Time, key: SwarmKey) {
        let Some(state) = self.states.get_mut(key) else { return };
        let Some(fetch) = state.fetch.as_deref_mut() else { return };
        let here = fetch.leases.pieces().filter(|piece| state.neighbours.anyone_gives(*piece));
        let here: Vec<u32> = here.collect();
        for piece in &here {
            fetch.leases.remove(*piece);
            fetch.set(*piece, PieceState::Missing);
            self.peers_stirred = true;
        }
        report(&mut self.actions, key, here.into_iter().map(|piece| (piece, true)));
        while let Some((_, fetch)) = self.may_read(now, key) {
            let Some(first) = fetch.leases.pieces().next() else { break };
            // What it waits too long with is leased anew, to anybody.
            if self.yields(now, key) {
                break;
            }
            let most = self.read_pieces();
            let run = (first..first.saturating_add(most))
                .take_while(|piece| fetch.leases.contains(*piece));
            let count = run.count() as u32;
            self.read(now, key, first, count, true);
        }
    }

    pub(super) fn read(&mut self, now: Time, key: SwarmKey, first: u32, count: u32, leased: bool) {
        let pieces = first..first + count;
        // None, unless neighbours are given up.
        self.cancel(|request| request.swarm == key && pieces.contains(&request.piece));
        let Some(fetch) = self.states.fetch_mut(key) else { return };
        for piece in pieces {
            fetch.leases.remove(piece);
            fetch.set(piece, PieceState::Origin);
        }
        if fetch.level > 0 && fetch.origin_failed == 0 {
            // Who reads knows that the bucket is asked: it is not the time for more.
            fetch.level_at = fetch.level_at.max(now + self.config.origin_late);
        }
        let all = (1 << count) - 1;
        self.reads.push(Read {
            swarm: key,
            first,
            count,
            at: now,
            late: false,
            open: all,
            leased: if leased { all } else { 0 },
            verified: 0,
            failed: false,
            orphan: false,
        });
        self.actions.push(Action::FetchOrigin { swarm: key, first, count });
    }

    pub(super) fn origin_ended(&mut self, now: Time, key: SwarmKey, piece: u32, outcome: Outcome) {
        let Some(at) = self.reads.iter().position(|read| read.is_open(key, piece)) else { return };
        let read = &mut self.reads[at];
        let bit = 1 << (piece - read.first);
        read.open &= !bit;
        let orphan = read.orphan;
        let state = self.states.get_mut(key).filter(|_| !orphan);
        let is = state.as_ref().and_then(|state| state.piece_state(piece));
        if let Some(fetch) = state.and_then(|state| state.fetch.as_deref_mut()) {
            match outcome {
                Outcome::Verified => fetch.origin_failed = 0,
                Outcome::Corrupt | Outcome::NotHere => {
                    let rest = jitter(self.config.origin_backoff_max, &mut self.rng);
                    fetch.spoilt.insert(piece, now + rest.max(Duration::from_millis(1)));
                }
                Outcome::Busy | Outcome::Failed => read.failed = true,
            }
            if outcome != Outcome::Verified && !read.late && is == Some(PieceState::Origin) {
                fetch.set(piece, PieceState::Missing);
            }
        }
        if outcome == Outcome::Verified && !orphan {
            read.verified |= bit;
        }
        if read.open == 0 {
            let read = self.reads.swap_remove(at);
            self.read_ended(now, &read);
        }
        // Verified and written is held, however late it came.
        if outcome == Outcome::Verified && !orphan {
            self.hold(now, key, piece);
        }
        self.stir();
    }

    fn read_ended(&mut self, now: Time, read: &Read) {
        let Some(state) = self.states.get_mut(read.swarm).filter(|_| !read.orphan) else { return };
        let mut ended: Vec<(u32, bool)> = (0..read.count)
            .filter(|at| read.leased >> at & 1 == 1)
            .map(|at| (read.first + at, read.verified >> at & 1 == 1))
            .collect();
        for (piece, held) in &mut ended {
            *held |= state.held.contains(*piece);
        }
        if let Some(fetch) = state.fetch.as_deref_mut().filter(|_| read.failed) {
            let (min, max) = (self.config.origin_backoff_min, self.config.origin_backoff_max);
            let rest = backoff(fetch.origin_failed, min, max, &mut self.rng);
            fetch.origin_rests_until = now + rest;
            fetch.origin_failed = fetch.origin_failed.saturating_add(1);
            if fetch.level > 0 && read.late {
                // So many read that the bucket is through with none of them in time.
                fetch.level = (fetch.level / 2).max(1);
            }
            if fetch.level > 0 && fetch.origin_failed == 1 {
                fetch.level_at = now + fetch.step(&self.config);
            }
            // Others may have better luck with what we cannot read now.
            for piece in core::mem::take(&mut fetch.leases).pieces() {
                fetch.set(piece, PieceState::Missing);
                ended.push((piece, false));
            }
        }
        if let Some(fetch) = state.fetch.as_deref_mut()
            && fetch.level > 0
            && !read.failed
        {
            fetch.level_at = now + fetch.step(&self.config);
        }
        report(&mut self.actions, read.swarm, ended.into_iter());
    }
}
