//! What happens because time passed, and when that is.

use super::{PieceState, Swarm, pick::stall, state::State};
use crate::{
    event::{Action, SwarmKey},
    time::Time,
};

impl Swarm {
    /// Does everything whose time has come; each timer is then in the future or off.
    pub(super) fn fire(&mut self, now: Time) {
        self.fire_requests(now);
        self.fire_reads(now);
        let due = |state: &State| {
            state.tell_at.is_some_and(|at| at <= now)
                || state.reannounce_at <= now
                || state.want_peers_at <= now
                || state.fetch.as_ref().is_some_and(|fetch| {
                    fetch.level_at <= now
                        || fetch.leases.times().any(|until| until <= now)
                        || fetch.spoilt.times().any(|until| until <= now)
                })
        };
        for at in 0..self.states.len() {
            if let Some(state) = self.states.at(at).filter(|state| due(state)) {
                self.fire_swarm(now, state.key);
            }
        }
    }

    fn fire_requests(&mut self, now: Time) {
        let mut at = 0;
        while let Some(request) = self.requests.get_mut(at) {
            if request.give_up_at <= now {
                let request = self.take_request(at);
                self.actions.push(Action::CancelFetch { request: request.id });
                let place = usize::from(request.peer);
                self.doubt(place, true);
                if let Some(peer) = self.peers.get_mut(place) {
                    let (min, max) =
                        (self.config.failed_backoff_min, self.config.failed_backoff_max);
                    peer.has_failed(now, min, max, &mut self.rng);
                }
                self.watch(now, place);
                if let Some(fetch) = self.states.fetch_mut(request.swarm) {
                    fetch.times.gave_up();
                }
                self.stir();
                continue;
            }
            if !request.late && request.late_at <= now {
                request.late = true;
                let so_far = now.since(request.at);
                let place = usize::from(request.peer);
                if let Some(peer) = self.peers.get_mut(place) {
                    peer.is_late(now, so_far);
                }
                self.peers_stirred = true;
                self.doubt(place, false);
            }
            at += 1;
        }
    }

    /// A request to a peer is late, or `given_up`.
    fn doubt(&mut self, place: usize, given_up: bool) {
        if self.peers.get(place).is_some_and(|peer| peer.is_silent(given_up)) {
            self.set_mute(place, true);
        }
    }

    fn fire_reads(&mut self, now: Time) {
        let late = self.config.origin_late;
        for read in self.reads.iter_mut().filter(|read| !read.late && read.at + late <= now) {
            read.late = true;
            if let Some(state) = self.states.get_mut(read.swarm) {
                for piece in read.open() {
                    if state.piece_state(piece) == Some(PieceState::Origin)
                        && let Some(fetch) = &mut state.fetch
                    {
                        fetch.set(piece, PieceState::Missing);
                    }
                }
            }
            self.peers_stirred = true;
        }
    }

    fn fire_swarm(&mut self, now: Time, key: SwarmKey) {
        let Some(state) = self.states.get_mut(key) else { return };
        let tell = state.tell_at.is_some_and(|at| at <= now);
        let reannounce = state.reannounce_at <= now;
        if let Some(fetch) = &mut state.fetch {
            while let Some(piece) = fetch.leases.take_due(now) {
                fetch.set(piece, PieceState::Missing);
                (self.peers_stirred, self.origin_stirred) = (true, true);
            }
            while fetch.spoilt.take_due(now).is_some() {}
            if fetch.level_at <= now {
                fetch.raise_level(now, &self.config);
                (self.peers_stirred, self.origin_stirred) = (true, true);
            }
        }
        if state.want_peers_at <= now {
            self.want_peers(now, key);
        }
        if tell {
            self.tell(key);
        }
        if reannounce {
            self.reannounce(now, key);
        }
    }

    /// When something will have to be done though nothing happens; always after `now`.
    pub(super) fn next_wake(&self, now: Time) -> Option<Time> {
        let mut wake = Time(u64::MAX);
        let mut at = |time: Time| {
            if time > now {
                wake = wake.min(time);
            }
        };
        for request in &self.requests {
            if !request.late {
                at(request.late_at);
            }
            at(request.give_up_at);
        }
        for read in self.reads.iter().filter(|read| !read.late) {
            at(read.at + self.config.origin_late);
        }
        // However many are busy: that their rest ends is what is waited for.
        let may_ask = self.requests.len() < self.config.requests_wanted;
        for state in self.states.iter() {
            state.tell_at.into_iter().for_each(&mut at);
            at(state.reannounce_at);
            at(state.want_peers_at);
            let Some(fetch) = &state.fetch else { continue };
            if may_ask {
                at(state.neighbours.watch_at());
            }
            at(fetch.level_at);
            fetch.leases.times().chain(fetch.spoilt.times()).for_each(&mut at);
            at(fetch.origin_rests_until);
            if fetch.may_lease() {
                at(fetch.lease_rests_until);
                fetch.blocks.iter().filter(|b| b.asking.is_none()).for_each(|b| at(b.rests_until));
            }
            if fetch.requests == 0 && fetch.missing() > 0 {
                // More pieces fall to a machine that stalls.
                let step = stall(fetch);
                let stalls = now.since(fetch.progressed_at).as_nanos() / step.as_nanos();
                at(fetch.progressed_at + step.saturating_mul(stalls as u32 + 1));
            }
            if may_ask
                && fetch.missing() == 0
                && let Some(mean) = fetch.times.mean()
            {
                let own = self.requests.iter().filter(|request| request.swarm == state.key);
                own.for_each(|request| at(request.at + mean));
            }
        }
        (wake < Time(u64::MAX)).then_some(wake)
    }
}
