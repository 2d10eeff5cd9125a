//! What neighbours hear: batches of new pieces, and now and then everything.
//!
//! A neighbour is told only of pieces that it lacks: what it holds it will never ask for. So what we
//! believe of a neighbour may be less than the truth, but never where it matters.

use alloc::vec::Vec;

use shoal_proto::peer::HAVE_BATCH_MAX;

use super::{Swarm, peers, state::Holds};
use crate::{
    event::{Action, SwarmKey},
    time::Time,
};

impl Swarm {
    /// How many new pieces make a message.
    pub(super) fn have_batch(&self) -> usize {
        self.config.have_batch.clamp(1, HAVE_BATCH_MAX)
    }

    /// Tells all neighbours of the pieces that are new.
    pub(super) fn tell(&mut self, key: SwarmKey) {
        let Some(state) = self.states.get_mut(&key) else { return };
        state.tell_at = None;
        let untold = core::mem::take(&mut state.untold);
        for (peer, holds) in &state.neighbours {
            let pieces: Vec<_> =
                untold.iter().filter(|piece| !holds.contains(piece.0)).copied().collect();
            if !pieces.is_empty() {
                self.actions.push_back(Action::AnnounceHave { peer: *peer, swarm: key, pieces });
            }
        }
    }

    /// Tells neighbours everything.
    pub(super) fn announce_to(&mut self, key: SwarmKey, whom: impl Fn(&Holds) -> bool) {
        let Some(state) = self.states.get(&key) else { return };
        for (peer, _) in state.neighbours.iter().filter(|(_, holds)| whom(holds)) {
            let have = state.held.clone();
            self.actions.push_back(Action::Announce { peer: *peer, swarm: key, have });
        }
    }

    /// Tells everything again to those who may lack something; the time has come.
    pub(super) fn reannounce(&mut self, now: Time, key: SwarmKey) {
        self.announce_to(key, |holds| !holds.is_all());
        if let Some(state) = self.states.get_mut(&key) {
            state.reannounce_at = now + peers::jitter(self.config.reannounce, &mut self.rng);
        }
    }

    /// Calls for more neighbours if there are too few; the time has come.
    pub(super) fn want_peers(&mut self, now: Time, key: SwarmKey) {
        let Some(state) = self.states.get_mut(&key) else { return };
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
        self.actions.push_back(Action::WantPeers { swarm: key, want });
    }
}
