//! What the policy wants done.

use std::sync::Arc;

use futures::FutureExt;
use shoal_proto::{
    PieceIndex,
    peer::{PeerMessage, StreamReply},
    region::RegionReply,
};
use shoal_swarm::{Action, Event, Outcome, RequestId, SwarmKey, UploadId};
use tokio_util::task::AbortOnDropHandle;

use super::{Driver, Input, Verdict, unless_it_panics};
use crate::fetch::Fetched;

impl Driver {
    /// Carries out all waiting actions.
    pub(super) fn act(&mut self) {
        while let Some(action) = self.policy.poll_action() {
            self.carry_out(action);
        }
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::Announce { peer, swarm, have } => {
                let have = Arc::unwrap_or_clone(have);
                let message = |artifact| PeerMessage::Join { artifact, have };
                self.send_about(peer, swarm, message);
            }
            Action::AnnounceHave { peer, swarm, pieces } => {
                let pieces = pieces.to_vec();
                self.send_about(peer, swarm, |artifact| PeerMessage::Have { artifact, pieces });
            }
            Action::AnnounceLeave { peer, swarm } => {
                self.send_about(peer, swarm, |artifact| PeerMessage::Leave { artifact });
            }
            Action::Fetch { request, peer, swarm, piece } => {
                self.fetch(request, peer, swarm, piece);
            }
            Action::CancelFetch { request } => {
                self.fetches.remove(&request);
            }
            Action::Offer { peer, swarm, piece } => {
                self.send_about(peer, swarm, |artifact| PeerMessage::Offer { artifact, piece });
            }
            Action::Serve { upload } => self.serve(upload),
            Action::RefuseBusy { upload } => {
                self.parts.metrics.busy.inc();
                self.refuse(upload, StreamReply::Busy);
            }
            Action::RefuseNotHere { upload } => self.refuse(upload, StreamReply::NotHere),
            Action::AskLease { swarm, block, lacking, want } => {
                self.ask_lease(swarm, block, lacking, want);
            }
            Action::LeaseDone { swarm, first, count, held } => {
                if let Some(part) = self.swarms.get(&swarm) {
                    let regions = self.parts.regions.clone();
                    let artifact = part.artifact.manifest().artifact;
                    tokio::spawn(async move {
                        regions.lease_done(artifact, first, count, held).await;
                    });
                }
            }
            Action::FetchOrigin { swarm, first, count } => self.fetch_origin(swarm, first, count),
            Action::WantPeers { swarm, want } => {
                self.introduce(swarm, want);
                self.dial_remembered(usize::from(want));
            }
            Action::Ban { peer } => self.ban(peer),
            Action::Completed { swarm } => {
                if let Some(part) = self.swarms.get(&swarm) {
                    part.status.send_modify(|status| {
                        status.complete = true;
                        status.trouble = None;
                        status.progress.pieces = status.progress.pieces_total;
                    });
                    // From now on others are told that this machine has all of it.
                    self.introduce(swarm, 0);
                }
            }
        }
    }

    fn fetch(
        &mut self,
        request: RequestId,
        peer: shoal_swarm::PeerKey,
        swarm: SwarmKey,
        piece: PieceIndex,
    ) {
        let (Some(part), Some(peer)) = (self.swarms.get(&swarm), self.peers.get(&peer)) else {
            let outcome = Outcome::Failed;
            return self.tell(Event::FetchEnded { request, outcome });
        };
        let (kitchen, inputs) = (self.kitchen.clone(), self.inputs.clone());
        let (connection, artifact) = (peer.connection.clone(), part.artifact.clone());
        let task = tokio::spawn(async move {
            let fetched = kitchen.from_peer(&connection, &artifact, piece);
            let fetched = unless_it_panics(fetched, Fetched::without(Outcome::Failed)).await;
            let _ = inputs.send(Input::Fetched(request, swarm, piece, fetched)).await;
        });
        self.fetches.insert(request, AbortOnDropHandle::new(task));
    }

    fn serve(&mut self, upload: UploadId) {
        let Some(asked) = self.uploads.remove(&upload) else { return };
        let verdict = match self.swarms.get(&asked.swarm) {
            Some(part) => Verdict::Serve(part.artifact.clone(), asked.piece),
            None => Verdict::Refuse(StreamReply::NotHere),
        };
        // An error says that the asker has just taken it back: its task tells the policy.
        let _ = asked.verdict.send(verdict);
    }

    fn refuse(&mut self, upload: UploadId, reply: StreamReply) {
        if let Some(asked) = self.uploads.remove(&upload) {
            let _ = asked.verdict.send(Verdict::Refuse(reply));
        }
    }

    fn ask_lease(&mut self, swarm: SwarmKey, block: u32, lacking: u64, want: u16) {
        let Some(part) = self.swarms.get(&swarm) else { return };
        let (regions, inputs) = (self.parts.regions.clone(), self.inputs.clone());
        let artifact = part.artifact.manifest().artifact;
        let pieces = part.artifact.manifest().piece_count();
        tracing::debug!(%artifact, block, lacking = lacking.count_ones(), want, "asks for a lease");
        let (encoding, origin) = (part.encoding, self.parts.origin.clone());
        let signed = origin.bucket().is_none();
        tokio::spawn(async move {
            let about = (artifact, encoding, pieces);
            let asked =
                regions.lease(about, (block, lacking), want, signed).map(|reply| match reply {
                    Ok(RegionReply::SignedLeased { first, duration_ms, urls }) => {
                        let count = urls.len() as u32;
                        let duration = std::time::Duration::from_millis(u64::from(duration_ms));
                        if origin.keep((artifact, encoding), first, urls, duration) {
                            Event::LeaseGranted { swarm, block, first, count, duration }
                        } else {
                            Event::LeaseFailed { swarm, block }
                        }
                    }
                    Ok(RegionReply::Leased { first, count, duration_ms }) => Event::LeaseGranted {
                        swarm,
                        block,
                        first,
                        count,
                        duration: std::time::Duration::from_millis(u64::from(duration_ms)),
                    },
                    Ok(RegionReply::NoLease { retry_ms, all_blocks }) => Event::LeaseDenied {
                        swarm,
                        block,
                        retry: retry_ms
                            .map(|retry_ms| std::time::Duration::from_millis(u64::from(retry_ms))),
                        all_blocks,
                    },
                    Ok(_) | Err(_) => Event::LeaseFailed { swarm, block },
                });
            let event = unless_it_panics(asked, Event::LeaseFailed { swarm, block }).await;
            let _ = inputs.send(Input::Policy(event)).await;
        });
    }

    fn fetch_origin(&mut self, swarm: SwarmKey, first: u32, count: u32) {
        let Some(part) = self.swarms.get(&swarm) else { return };
        let (kitchen, inputs) = (self.kitchen.clone(), self.inputs.clone());
        let (origin, artifact) = (self.parts.origin.clone(), part.artifact.clone());
        let layout = part.layout.clone();
        tokio::spawn(async move {
            for piece in (first..first + count).map(PieceIndex) {
                let fetched = kitchen.from_origin(&origin, &artifact, &layout, piece);
                let fetched = unless_it_panics(fetched, Fetched::without(Outcome::Failed)).await;
                let _ = inputs.send(Input::OriginPiece(swarm, piece, fetched)).await;
            }
        });
    }
}
