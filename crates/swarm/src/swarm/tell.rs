//! What neighbours hear: batches of new pieces, and now and then everything.
//!
//! A neighbour that holds a whole batch is not told of it, all others hear the same. So what we
//! believe of a neighbour may be less than the truth, but never where it matters.

use core::time::Duration;

use shoal_proto::{Bitmap, peer::HAVE_BATCH_MAX};

use super::{
    Swarm,
    neighbours::Slots,
    peers,
    state::{Fetching, State},
};
use crate::{
    event::{Action, SwarmKey},
    time::Time,
};

/// How long news waits for more. At the start every neighbour waits for the first pieces to multiply, at the end each
/// waits for its last ones: they are told at once. In between everybody has much to ask for, and what is told in
/// one message costs a tenth of what it costs in ten.
pub(super) fn delay(fetch: &Fetching, held: &Bitmap) -> Duration {
    /// With so many pieces held or so many lacking it is half a piece's time; in proportion, ...
    const FEW: u32 = 16;
    /// ...but no more than so many times that.
    const MOST: u32 = 8;
    let few = held.count().min(held.len() - held.count());
    fetch.times.mean().unwrap_or_default() / 2 * few.min(FEW * MOST) / FEW
}

impl Swarm {
    /// How many new pieces make a message.
    pub(super) fn have_batch(&self) -> usize {
        self.config.have_batch.clamp(1, HAVE_BATCH_MAX)
    }

    /// Tells all neighbours of the pieces that are new.
    pub(super) fn tell(&mut self, key: SwarmKey) {
        let Some(state) = self.states.get_mut(key) else { return };
        state.tell_at = None;
        let to = state.neighbours.lacking(&state.untold);
        if to != 0 {
            self.actions.tell_have(key, state.untold.as_slice().into(), to);
        }
        state.untold.clear();
    }

    /// Tells neighbours everything.
    pub(super) fn announce_to(&mut self, key: SwarmKey, whom: impl Fn(&State) -> Slots) {
        if let Some(state) = self.states.get(key) {
            self.actions.tell_all(state, whom(state));
        }
    }

    /// Tells everything again to those who may lack something; the time has come.
    pub(super) fn reannounce(&mut self, now: Time, key: SwarmKey) {
        self.announce_to(key, |state| state.neighbours.taken() & !state.neighbours.complete());
        if let Some(state) = self.states.get_mut(key) {
            state.reannounce_at = now + peers::jitter(self.config.reannounce, &mut self.rng);
        }
    }

    /// Calls for more neighbours if there are too few; the time has come.
    pub(super) fn want_peers(&mut self, now: Time, key: SwarmKey) {
        let Some(state) = self.states.get_mut(key) else { return };
        let want = self.config.neighbours_target.saturating_sub(state.neighbours.len());
        if want == 0 {
            // Asked again when the next one leaves.
            state.want_peers_at = now + self.config.want_peers_max;
            return;
        }
        let max = match state.fetch {
            Some(_) => self.config.want_peers_max,
            None => self.config.want_peers_seed,
        };
        let min = self.config.want_peers_min;
        let pause = peers::backoff(state.want_peers_streak, min, max, &mut self.rng);
        state.want_peers_streak = state.want_peers_streak.saturating_add(1);
        state.want_peers_at = now + pause;
        let want = u16::try_from(want).unwrap_or(u16::MAX);
        self.actions.push(Action::WantPeers { swarm: key, want });
    }
}
