//! What peers ask of us: slots, a short queue, and BUSY at once beyond it.
//!
//! A piece that nobody got from us yet goes before one that somebody did: the second asker may by then
//! get it from the first. So two leechers that picked the same piece of their one seed cost the seed one
//! copy more often than two.

use alloc::vec::Vec;

use super::{actions::Actions, state::States};
use crate::{
    config::Config,
    event::{Action, PeerKey, SwarmKey, UploadId},
};

#[derive(Debug, Clone, Copy)]
pub(super) struct Upload {
    pub(super) id: UploadId,
    pub(super) peer: PeerKey,
    pub(super) swarm: SwarmKey,
    pub(super) piece: u32,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Uploads {
    /// Those that are served, in any order, then those that wait, in order of arrival.
    all: Vec<Upload>,
    served: usize,
}

impl Uploads {
    /// A peer asks for a piece that we hold.
    pub(super) fn ask(
        &mut self,
        config: &Config,
        states: &mut States,
        actions: &mut Actions,
        upload: Upload,
    ) {
        if self.all.iter().any(|other| other.id == upload.id) {
            return;
        }
        let of_peer = self.all.iter().filter(|other| other.peer == upload.peer).count();
        let (served, waiting) = self.counts();
        let room = served < config.upload_slots || waiting < config.upload_queue_max;
        if of_peer >= config.uploads_per_peer_max || !room {
            actions.push(Action::RefuseBusy { upload: upload.id });
            return;
        }
        self.all.push(upload);
        self.promote(config, states, actions);
    }

    /// An upload ended, or a waiting one was taken back.
    pub(super) fn ended(
        &mut self,
        config: &Config,
        states: &mut States,
        actions: &mut Actions,
        upload: UploadId,
    ) {
        if let Some(at) = self.all.iter().position(|other| other.id == upload) {
            self.all.remove(at);
            self.served -= usize::from(at < self.served);
            self.promote(config, states, actions);
        }
    }

    /// A connection ended, and all its uploads with it.
    pub(super) fn peer_down(
        &mut self,
        config: &Config,
        states: &mut States,
        actions: &mut Actions,
        peer: PeerKey,
    ) {
        self.served -= self.all[..self.served].iter().filter(|u| u.peer == peer).count();
        self.all.retain(|upload| upload.peer != peer);
        self.promote(config, states, actions);
    }

    /// A swarm was stopped: what waits for it is refused; what is being sent goes on.
    pub(super) fn swarm_stopped(&mut self, actions: &mut Actions, swarm: SwarmKey) {
        let mut at = self.served;
        while let Some(upload) = self.all.get(at) {
            if upload.swarm == swarm {
                actions.push(Action::RefuseNotHere { upload: upload.id });
                self.all.remove(at);
            } else {
                at += 1;
            }
        }
    }

    fn promote(&mut self, config: &Config, states: &mut States, actions: &mut Actions) {
        while self.served < config.upload_slots && self.served < self.all.len() {
            let is_fresh = |upload: &Upload| {
                states.get(upload.swarm).is_some_and(|state| !state.given.contains(upload.piece))
            };
            let waiting = &mut self.all[self.served..];
            let next = match waiting.len() {
                1 => 0,
                _ => waiting.iter().position(is_fresh).unwrap_or(0),
            };
            waiting[..=next].rotate_right(1);
            let upload = waiting[0];
            self.served += 1;
            if let Some(state) = states.get_mut(upload.swarm) {
                state.gives(upload.piece);
            }
            actions.push(Action::Serve { upload: upload.id });
        }
    }

    /// Uploads being served, and waiting.
    pub(super) fn counts(&self) -> (usize, usize) {
        (self.served, self.all.len() - self.served)
    }
}
