//! Leave to read the bucket: asked of region processes, a block at a time, and reported back.
//!
//! A machine that may lease asks for blocks in which a piece is missing that no neighbour has. What is leased is read (see
//! `origin`) and reported. Whatever a neighbour turns out to have is reported as held instead of read: so a lease
//! book that was lost learns what the swarm has.
//!
//! Leases need no such patience as the fallback, for each piece is leased once: what only neighbours hold that let a request
//! pass, and answered none since, is leased and read. Their disks may hang, or they never had it.

use alloc::vec::Vec;
use core::time::Duration;

use rand::RngExt;
use shoal_proto::region::{LEASE_BLOCK_PIECES, LEASE_PIECES_MAX};

use super::{
    PieceState, Swarm,
    actions::Actions,
    neighbours::Neighbours,
    peers::{backoff, jitter},
    state::Fetching,
};
use crate::{
    config::Config,
    event::{Action, SwarmKey},
    hash::LEASERS_AIM,
    lease::LEASE_RETRY_MIN,
    time::Time,
};

/// Reports pieces in as few messages as their order allows.
pub(super) fn report(
    actions: &mut Actions,
    swarm: SwarmKey,
    pieces: impl Iterator<Item = (u32, bool)>,
) {
    let mut run: Option<(u32, u32, bool)> = None;
    let mut push = |(first, count, held)| {
        actions.push(Action::LeaseDone { swarm, first, count, held });
    };
    for (piece, held) in pieces {
        match &mut run {
            Some((first, count, was)) if *first + *count == piece && *was == held => *count += 1,
            _ => run.replace((piece, 1, held)).into_iter().for_each(&mut push),
        }
    }
    run.into_iter().for_each(push);
}

impl Fetching {
    /// Region processes answer again: back to leases.
    fn lease_answered(&mut self, now: Time, config: &Config) {
        if self.lease_failed > 0 {
            (self.lease_failed, self.level) = (0, 0);
            self.level_at = now + config.fallback_after;
        }
        self.lease_rests_until = now;
    }

    /// How many pieces to lease at once: so many that the machines that lease come round twice.
    fn lease_want(&self) -> u32 {
        let leasers = self.fleet.clamp(1, LEASERS_AIM);
        (self.pieces / (2 * leasers)).clamp(1, LEASE_PIECES_MAX)
    }

    /// A block, any, that is worth asking about now, and the pieces of it that nobody around has.
    fn next_block(
        &self,
        neighbours: &Neighbours,
        now: Time,
        turn: usize,
        skip: impl Fn(u32) -> bool,
    ) -> Option<(u32, u64)> {
        const { assert!(LEASE_BLOCK_PIECES == u64::BITS, "a block is a word of the bitmap") };
        if neighbours.has_seed() {
            return None;
        }
        let lacking = |at: usize| {
            let block = &self.blocks[at];
            if block.asking.is_some() || block.rests_until > now {
                return None;
            }
            let mut word = self.missing_word(at) & !neighbours.given(at);
            let mut lacking = word;
            while word != 0 {
                let piece = at as u32 * LEASE_BLOCK_PIECES + word.trailing_zeros();
                if self.spoilt.contains(piece) || skip(piece) {
                    lacking &= !(word & word.wrapping_neg());
                }
                word &= word - 1;
            }
            (lacking != 0).then_some((at as u32, lacking))
        };
        let blocks = self.blocks.len();
        (turn..blocks).chain(0..turn.min(blocks)).find_map(lacking)
    }
}

impl Swarm {
    /// Leases held, leases asked for, and questions open, over all swarms.
    pub(super) fn leases(&self) -> (u32, u32, usize) {
        let mut sum = (0, 0, 0);
        for fetch in self.states.iter().filter_map(|state| state.fetch.as_deref()) {
            sum.0 += fetch.leases.len() as u32;
            for want in fetch.blocks.iter().filter_map(|block| block.asking) {
                sum.1 += u32::from(want);
                sum.2 += 1;
            }
        }
        sum
    }

    pub(super) fn ask_leases(&mut self, now: Time, key: SwarmKey) {
        loop {
            let Some(state) = self.states.get(key) else { return };
            let Some(fetch) = state.fetch.as_deref() else { return };
            let rests = fetch.origin_rests_until.max(fetch.lease_rests_until);
            if !fetch.may_lease() || rests > now || self.yields(now, key) {
                return;
            }
            let priority = fetch.priority;
            let outranked = self.is_outranked(now, priority);
            let asks = |fetch: &Fetching| fetch.blocks.iter().any(|block| block.asking.is_some());
            if outranked && (fetch.leases.len() > 0 || asks(fetch)) {
                return;
            }
            let (held, wanted, open) = self.leases();
            let is_full = held + wanted >= self.config.leased_max;
            let room = match is_full {
                false => self.config.leased_max - held - wanted,
                true => self.leases_below(priority),
            };
            if room == 0 || open >= self.config.lease_asks_max {
                return;
            }
            let want = if outranked { 1 } else { fetch.lease_want().min(room) as u16 };
            let turn = self.rng.random_range(0..fetch.blocks.len().max(1));
            let being_read = |piece| self.reads.iter().any(|read| read.is_open(key, piece));
            let block = fetch.next_block(&state.neighbours, now, turn, being_read);
            let Some((block, lacking)) = block else { return };
            if is_full {
                self.give_back(priority);
            }
            if let Some(fetch) = self.states.fetch_mut(key) {
                fetch.blocks[block as usize].asking = Some(want);
            }
            self.actions.push(Action::AskLease { swarm: key, block, lacking, want });
        }
    }

    /// How many leases less urgent fetches hold.
    fn leases_below(&self, priority: u8) -> u32 {
        let fetches = self.states.iter().filter_map(|state| state.fetch.as_deref());
        fetches
            .filter(|fetch| fetch.priority < priority)
            .map(|fetch| fetch.leases.len() as u32)
            .sum()
    }

    /// Gives back the leases of less urgent fetches, which have all that there may be.
    fn give_back(&mut self, priority: u8) {
        for state in self.states.iter_mut() {
            let Some(fetch) = state.fetch.as_deref_mut() else { continue };
            if fetch.priority >= priority {
                continue;
            }
            let pieces: Vec<u32> = fetch.leases.pieces().collect();
            for piece in &pieces {
                fetch.leases.remove(*piece);
                fetch.set(*piece, PieceState::Missing);
            }
            report(&mut self.actions, state.key, pieces.into_iter().map(|piece| (piece, false)));
        }
    }

    /// The fetch whose question about `block` was open; it no longer is.
    fn lease_answer(&mut self, key: SwarmKey, block: u32) -> Option<&mut Fetching> {
        self.origin_stirred = true;
        let fetch = self.states.fetch_mut(key)?;
        fetch.blocks.get_mut(block as usize)?.asking.take()?;
        Some(fetch)
    }

    pub(super) fn lease_granted(
        &mut self,
        now: Time,
        key: SwarmKey,
        block: u32,
        first: u32,
        count: u32,
        duration: Duration,
    ) {
        let config = self.config.clone();
        if let Some(fetch) = self.lease_answer(key, block) {
            fetch.lease_answered(now, &config);
        }
        let (mut leases, _, _) = self.leases();
        let Some(state) = self.states.get_mut(key) else { return };
        let first = first.min(state.pieces);
        let end = first.saturating_add(count.min(LEASE_PIECES_MAX)).min(state.pieces);
        let mut taken = false;
        let mut ended: Vec<(u32, bool)> = Vec::new();
        for piece in first..end {
            let held = state.held.contains(piece);
            let Some(fetch) = state.fetch.as_deref_mut() else {
                ended.push((piece, held));
                continue;
            };
            let read = self.reads.iter_mut().find(|read| read.is_open(key, piece));
            let fits = leases < config.leased_max && !fetch.spoilt.contains(piece);
            if held || state.neighbours.anyone_gives(piece) {
                ended.push((piece, true));
            } else if let Some(read) = read {
                read.leased |= 1 << (piece - read.first);
            } else if fetch.leases.contains(piece) {
                fetch.leases.insert(piece, now + duration);
            } else if fetch.is_missing(piece) && fits {
                fetch.set(piece, PieceState::Leased);
                fetch.leases.insert(piece, now + duration);
                leases += 1;
                taken = true;
            } else {
                ended.push((piece, false));
            }
        }
        if let Some(fetch) = &mut state.fetch {
            if taken {
                fetch.level = 0;
                fetch.level_at = now + config.fallback_after;
            } else if let Some(block) = fetch.blocks.get_mut(block as usize) {
                block.rests_until = now + jitter(LEASE_RETRY_MIN, &mut self.rng);
            }
        }
        report(&mut self.actions, key, ended.into_iter());
    }

    pub(super) fn lease_denied(
        &mut self,
        now: Time,
        key: SwarmKey,
        block: u32,
        retry: Option<Duration>,
        all_blocks: bool,
    ) {
        let config = self.config.clone();
        if let Some(turn) = retry.filter(|_| all_blocks) {
            if let Some(fetch) = self.lease_answer(key, block) {
                fetch.lease_answered(now, &config);
                // The region process spreads the turns itself.
                fetch.lease_rests_until = now + turn.max(Duration::from_millis(1));
            }
            return;
        }
        // What is all held will reach us; asked again in case its holders are gone.
        let rest = jitter(retry.unwrap_or(config.all_held_recheck), &mut self.rng);
        if let Some(fetch) = self.lease_answer(key, block) {
            fetch.lease_answered(now, &config);
            fetch.blocks[block as usize].rests_until = now + rest.max(Duration::from_millis(1));
        }
    }

    pub(super) fn lease_failed(&mut self, now: Time, key: SwarmKey, block: u32) {
        let (min, max) =
            (self.config.lease_failed_backoff_min, self.config.lease_failed_backoff_max);
        let after = self.config.fallback_after_failed;
        let mut rng = self.rng.clone();
        if let Some(fetch) = self.lease_answer(key, block) {
            fetch.lease_rests_until = now + backoff(fetch.lease_failed, min, max, &mut rng);
            fetch.lease_failed = fetch.lease_failed.saturating_add(1);
            if fetch.level == 0 {
                fetch.level_at = fetch.level_at.min(now + after);
            }
        }
        self.rng = rng;
    }
}

#[cfg(test)]
mod tests {
    use shoal_proto::Bitmap;

    use super::*;
    use crate::event::{Event, PeerKey, Purpose};

    const SWARM: SwarmKey = SwarmKey(1);
    const PIECES: u32 = 200;

    /// How often leases are asked for by a machine that begins next to a neighbour that says what it holds: it may lease
    /// `at_once`, or only after that.
    fn asks(at_once: bool, have: Bitmap) -> usize {
        let mut swarm = Swarm::new(Config::default(), 7);
        let start = |may_lease| {
            let purpose = Purpose::Fetch { priority: 0, piece_bytes: 1 << 20, may_lease, fleet: 8 };
            let have = Bitmap::empty(PIECES);
            Event::Start { swarm: SWARM, pieces: PIECES, have, purpose }
        };
        let peer = PeerKey(1);
        swarm.handle(Time(1), Event::PeerUp { peer, same_zone: true });
        swarm.handle(Time(1), start(at_once));
        let joined = Event::PeerJoined { peer, swarm: SWARM, have: have.into() };
        swarm.handle(Time(1), joined);
        swarm.handle(Time(1), start(true));
        let actions = core::iter::from_fn(|| swarm.poll_action());
        actions.filter(|action| matches!(action, Action::AskLease { .. })).count()
    }

    #[test]
    fn who_may_lease_only_once_neighbours_were_heard_asks_for_nothing_that_they_hold() {
        assert!(asks(true, Bitmap::full(PIECES)) > 0, "it knew of nobody");
        assert_eq!(asks(false, Bitmap::full(PIECES)), 0);
        assert!(asks(false, Bitmap::empty(PIECES)) > 0, "and then it may");
    }
}
