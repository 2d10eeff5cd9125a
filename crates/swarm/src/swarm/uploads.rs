//! What peers ask of us: slots, a short queue, and BUSY at once beyond it.
//!
//! A piece that nobody got from us yet goes before one that somebody did: the second asker may by then
//! get it from the first. So two leechers that picked the same piece of their one seed cost the seed one
//! copy more often than two.

use alloc::{
    collections::{BTreeMap, VecDeque},
    vec::Vec,
};

use shoal_proto::Bitmap;

use crate::{
    config::Config,
    event::{Action, PeerKey, SwarmKey, UploadId},
};

#[derive(Debug, Clone, Copy)]
struct Upload {
    id: UploadId,
    peer: PeerKey,
    swarm: SwarmKey,
    piece: u32,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Uploads {
    served: BTreeMap<UploadId, Upload>,
    /// In order of arrival.
    waiting: Vec<Upload>,
    /// Pieces that went out since all had; only of swarms that serve.
    fresh: BTreeMap<SwarmKey, Bitmap>,
}

impl Uploads {
    /// A peer asks for a piece that we hold. `pieces` is the swarm's number of pieces.
    pub(super) fn ask(
        &mut self,
        config: &Config,
        actions: &mut VecDeque<Action>,
        (id, peer, swarm, piece): (UploadId, PeerKey, SwarmKey, u32),
        pieces: u32,
    ) {
        if self.served.contains_key(&id) || self.waiting.iter().any(|upload| upload.id == id) {
            return;
        }
        let upload = Upload { id, peer, swarm, piece };
        let of_peer = self.served.values().chain(&self.waiting).filter(|u| u.peer == peer).count();
        if of_peer >= config.uploads_per_peer_max {
            actions.push_back(Action::RefuseBusy { upload: id });
        } else if self.served.len() < config.upload_slots {
            self.fresh.entry(swarm).or_insert_with(|| Bitmap::empty(pieces));
            self.serve(actions, upload);
        } else if self.waiting.len() < config.upload_queue_max {
            self.fresh.entry(swarm).or_insert_with(|| Bitmap::empty(pieces));
            self.waiting.push(upload);
        } else {
            actions.push_back(Action::RefuseBusy { upload: id });
        }
    }

    fn serve(&mut self, actions: &mut VecDeque<Action>, upload: Upload) {
        if let Some(out) = self.fresh.get_mut(&upload.swarm) {
            out.insert(upload.piece);
            if out.is_full() {
                *out = Bitmap::empty(out.len());
            }
        }
        self.served.insert(upload.id, upload);
        actions.push_back(Action::Serve { upload: upload.id });
    }

    /// An upload ended, or a waiting one was taken back.
    pub(super) fn ended(
        &mut self,
        config: &Config,
        actions: &mut VecDeque<Action>,
        upload: UploadId,
    ) {
        self.served.remove(&upload);
        self.waiting.retain(|waiting| waiting.id != upload);
        self.promote(config, actions);
    }

    /// A connection ended, and all its uploads with it.
    pub(super) fn peer_down(
        &mut self,
        config: &Config,
        actions: &mut VecDeque<Action>,
        peer: PeerKey,
    ) {
        self.served.retain(|_, upload| upload.peer != peer);
        self.waiting.retain(|upload| upload.peer != peer);
        self.promote(config, actions);
    }

    /// A swarm was stopped: what waits for it is refused; what is being sent goes on.
    pub(super) fn swarm_stopped(&mut self, actions: &mut VecDeque<Action>, swarm: SwarmKey) {
        self.fresh.remove(&swarm);
        self.waiting.retain(|upload| {
            let stays = upload.swarm != swarm;
            if !stays {
                actions.push_back(Action::RefuseNotHere { upload: upload.id });
            }
            stays
        });
    }

    fn promote(&mut self, config: &Config, actions: &mut VecDeque<Action>) {
        while self.served.len() < config.upload_slots && !self.waiting.is_empty() {
            let is_fresh = |upload: &Upload| {
                self.fresh.get(&upload.swarm).is_some_and(|out| !out.contains(upload.piece))
            };
            let next = self.waiting.iter().position(is_fresh).unwrap_or(0);
            let upload = self.waiting.remove(next);
            self.serve(actions, upload);
        }
    }

    /// Uploads being served, and waiting.
    pub(super) fn counts(&self) -> (usize, usize) {
        (self.served.len(), self.waiting.len())
    }
}
