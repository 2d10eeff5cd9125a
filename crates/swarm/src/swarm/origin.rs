//! What is read from the region's bucket, by whose leave.
//!
//! A machine that may lease asks for blocks in which a piece is missing that no neighbour has. Leased
//! pieces are read, a few at a time, and reported. Whatever a neighbour turns out to have is reported
//! as held instead of read: so a lease book that was lost learns what the swarm has.
//!
//! **Without leases** each piece that no neighbour has falls to the machines whose hash of machine and piece
//! lies below a threshold: at level 1 to about one machine, at each further level to twice as many. The level
//! rises only while the machine makes no progress at all, so a piece that anybody reads is heard of long
//! before many would read it, and in the end every machine may read everything.
//!
//! The threshold waits while this machine reads, and grows slowly while its reads fail: what is short then is the
//! bucket, and more readers would only make it slower. A read that was late and failed halves the level.
//!
//! **What a neighbour has** is the neighbour's to give, however slow our line is. Only when no neighbour gave
//! anything for so long that every request has been given up does a second threshold let us read that too, and
//! it grows like the first from there: nobody is stuck.
//!
//! Leases need no such patience, for each piece is leased once: what only neighbours hold that let a request pass, and
//! answered none since, is leased and read. Their disks may hang, or they never had it.

use alloc::vec::Vec;
use core::time::Duration;

use rand::RngExt;
use shoal_proto::region::{LEASE_BLOCK_PIECES, LEASE_PIECES_MAX};

use super::{
    PieceState, Swarm,
    actions::Actions,
    neighbours::Neighbours,
    peers::{backoff, jitter},
    state::{Fetching, State},
};
use crate::{
    config::Config,
    event::{Action, Outcome, SwarmKey},
    hash::{LEASERS_AIM, below, mix},
    lease::LEASE_RETRY_MIN,
    time::Time,
};

/// The level at which everything may be read by everybody in a fleet of any size.
const LEVEL_MAX: u32 = 33;

/// A zero step would raise a level for ever in one event.
const STEP_MIN: Duration = Duration::from_millis(1);

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
    leased: u32,
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

    pub(super) fn raise_level(&mut self, now: Time, config: &Config) {
        self.level = (self.level + 1).min(LEVEL_MAX);
        self.level_at = now + self.step(config);
    }

    /// How long a level holds: longer while it is the bucket that is short, not those who read it.
    fn step(&self, config: &Config) -> Duration {
        let fails = self.origin_failed > 0;
        let step = if fails { config.origin_backoff_max } else { config.fallback_step };
        step.max(STEP_MIN)
    }

    /// Region processes answer again: back to leases.
    fn lease_answered(&mut self, now: Time, config: &Config) {
        if self.lease_failed > 0 {
            (self.lease_failed, self.level) = (0, 0);
            self.level_at = now + config.fallback_after;
        }
        self.lease_rests_until = now;
    }

    /// How often the part was doubled of what neighbours have and we may read all the same; none while they may
    /// yet deliver.
    fn unserved(&self, now: Time, config: &Config) -> Option<u32> {
        let step = config.fallback_step.max(STEP_MIN).as_nanos();
        let since = now.since(self.served_at).checked_sub(config.give_up_max)?;
        Some((since.as_nanos() / step).min(LEVEL_MAX.into()) as u32)
    }

    /// Those of 64 pieces that the fallback lets a machine of this `salt` read by itself.
    fn falling(&self, neighbours: &Neighbours, salt: u64, at: usize, unserved: Option<u32>) -> u64 {
        let Some(level) = self.level.checked_sub(1) else { return 0 };
        // Only those who asked in vain know so soon, and they are this many.
        let knows = self.may_lease() && self.lease_failed > 0;
        let few = if knows { self.fleet.min(LEASERS_AIM) } else { self.fleet };
        let (missing, here) = (self.missing_word(at), neighbours.anyones(at));
        let lone = (missing & !here, Some(level), few);
        // What was asked for in vain is among it.
        let theirs = ((missing | self.asked_word(at)) & here, unserved, self.fleet);
        let mut falling = 0;
        for (mut among, doublings, whole) in [lone, theirs] {
            let Some(doublings) = doublings else { continue };
            let part = 1_u32.checked_shl(doublings).unwrap_or(u32::MAX);
            while among != 0 {
                let piece = at as u32 * u64::BITS + among.trailing_zeros();
                let ours = below(mix(salt ^ u64::from(piece)), part, whole);
                if ours && !self.spoilt.contains(piece) {
                    falling |= among & among.wrapping_neg();
                }
                among &= among - 1;
            }
        }
        falling
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
    /// Reads what is leased, asks for more leases, falls back: for each swarm, the first ones first.
    pub(super) fn use_origin(&mut self, now: Time) {
        for at in 0..self.fetching.len() {
            let key = self.fetching[at];
            self.read_leased(now, key);
            self.ask_leases(now, key);
            self.fall_back(now, key);
        }
    }

    fn may_read(&self, now: Time, key: SwarmKey) -> Option<(&State, &Fetching)> {
        let state = self.states.get(key)?;
        let fetch = state.fetch.as_deref()?;
        let free = self.reads.len() < self.config.origin_reads_max;
        (free && fetch.origin_rests_until <= now).then_some((state, fetch))
    }

    fn read_pieces(&self) -> u32 {
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

    fn read(&mut self, now: Time, key: SwarmKey, first: u32, count: u32, leased: bool) {
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

    fn ask_leases(&mut self, now: Time, key: SwarmKey) {
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

    fn fall_back(&mut self, now: Time, key: SwarmKey) {
        while let Some((state, fetch)) =
            self.may_read(now, key).filter(|(_, fetch)| fetch.level > 0)
        {
            let salt = self.salt ^ mix(key.0);
            let unserved = fetch.unserved(now, &self.config);
            let mine = |at: usize| {
                let falling = fetch.falling(&state.neighbours, salt, at, unserved);
                let reads = self.reads.iter().filter(|read| read.swarm == key);
                let open = reads.flat_map(Read::open).filter(|p| (p / u64::BITS) as usize == at);
                open.fold(falling, |mine, piece| mine & !(1 << (piece % u64::BITS)))
            };
            // From any piece on, so that not all begin with the same.
            let any = mix(self.salt ^ self.next_request ^ now.0);
            let words = fetch.words();
            let (start, turn) = (any as usize % words.max(1), (any >> 32) as u32 % u64::BITS);
            let found = (start..words).chain(0..start).find_map(|at| {
                let mine = mine(at);
                let first = (mine.rotate_right(turn).trailing_zeros() + turn) % u64::BITS;
                (mine != 0).then_some((at, mine >> first, first))
            });
            let Some((at, run, first)) = found else { return };
            let first = at as u32 * u64::BITS + first;
            let count = run.trailing_ones().min(self.read_pieces());
            self.read(now, key, first, count, false);
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
