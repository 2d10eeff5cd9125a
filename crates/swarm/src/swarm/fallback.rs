//! Reading the bucket without anybody's leave, when region processes are gone.
//!
//! Each piece that no neighbour has falls to the machines whose hash of machine and piece
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

use core::time::Duration;

use super::{Swarm, neighbours::Neighbours, origin::Read, state::Fetching};
use crate::{
    config::Config,
    event::SwarmKey,
    hash::{LEASERS_AIM, below, mix},
    time::Time,
};

/// The level at which everything may be read by everybody in a fleet of any size.
const LEVEL_MAX: u32 = 33;

/// A zero step would raise a level for ever in one event.
const STEP_MIN: Duration = Duration::from_millis(1);

impl Fetching {
    pub(super) fn raise_level(&mut self, now: Time, config: &Config) {
        self.level = (self.level + 1).min(LEVEL_MAX);
        self.level_at = now + self.step(config);
    }

    /// How long a level holds: longer while it is the bucket that is short, not those who read it.
    pub(super) fn step(&self, config: &Config) -> Duration {
        let fails = self.origin_failed > 0;
        let step = if fails { config.origin_backoff_max } else { config.fallback_step };
        step.max(STEP_MIN)
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
}

impl Swarm {
    pub(super) fn fall_back(&mut self, now: Time, key: SwarmKey) {
        while let Some((state, fetch)) =
            self.may_read(now, key).filter(|(_, fetch)| fetch.level > 0)
        {
            // Beside a more urgent one it reads a piece at a time, as it does under leases.
            if self.yields(now, key) {
                return;
            }
            let most = match self.is_outranked(now, fetch.priority) {
                true => 1,
                false => self.read_pieces(),
            };
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
            let count = run.trailing_ones().min(most);
            self.read(now, key, first, count, false);
        }
    }
}
