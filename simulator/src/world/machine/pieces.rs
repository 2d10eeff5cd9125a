//! Pieces: what the policy orders, how they travel over the line, and how they end.

use rand::RngExt;
use shoal_proto::PieceIndex;
use shoal_swarm::{Action, Event, Outcome, SwarmKey, UploadId};

use super::{LeaseAsk, Live, Machine, OF_BUCKET, parts};
use crate::world::{
    Static,
    line::{Flow, Parts, line_ns},
    message::{Actor, ENVELOPE, What},
    shard::Out,
};

/// Hashing, in bits a second: BLAKE3 on one core, 4.4 GB/s.
const HASH_BPS: u64 = 35_200_000_000;

/// Writing a piece into its file, in bits a second: the page cache of a disk, 4.3 GB/s.
const DISK_BPS: u64 = 34_400_000_000;

/// How long the bucket may take for a read, as the agent has it.
const READ_TIMEOUT_NS: u64 = 60_000_000_000;

impl Machine {
    pub(super) fn act(&mut self, world: &Static, out: &mut Out, now: u64, action: Action) {
        match action {
            Action::Announce { peer, swarm, have } => {
                out.counts.control(ENVELOPE + have.words().len() as u64 * 8);
                let (to, link) = parts(peer);
                self.send(world, out, now, to, What::Join { link, swarm: swarm.0 as u16, have });
            }
            Action::AnnounceHave { peer, swarm, pieces } => {
                out.counts.control(ENVELOPE + pieces.len() as u64 * 3);
                let (to, link) = parts(peer);
                self.send(world, out, now, to, What::Have { link, swarm: swarm.0 as u16, pieces });
            }
            Action::AnnounceLeave { peer, swarm } => {
                out.counts.control(ENVELOPE);
                let (to, link) = parts(peer);
                self.send(world, out, now, to, What::Leave { link, swarm: swarm.0 as u16 });
            }
            Action::Fetch { request, peer, swarm, piece } => {
                out.counts.control(ENVELOPE);
                let (to, link) = parts(peer);
                let (swarm, number) = (swarm.0 as u16, self.number());
                self.live.push(Live {
                    number,
                    from: to,
                    request,
                    swarm,
                    piece: piece.0,
                    last: piece.0,
                    left: world.piece_len(swarm, piece.0) as u32,
                    storing: 0,
                });
                self.send(world, out, now, to, What::Ask { link, swarm, piece, number });
            }
            Action::CancelFetch { request } => {
                let same = |live: &Live| live.request == request;
                if let Some(at) = self.live.iter().position(same) {
                    let Live { from, number, .. } = self.live.swap_remove(at);
                    out.counts.control(ENVELOPE / 2);
                    self.send(world, out, now, from, What::Cancel { number });
                }
            }
            Action::Serve { upload } => {
                if let Some(upload) = self.uploads.iter().find(|own| own.is(upload)) {
                    self.line.add(Flow {
                        to: upload.to,
                        number: upload.number,
                        swarm: upload.swarm,
                        piece: upload.piece,
                        last: upload.piece,
                        left: world.piece_len(upload.swarm, upload.piece) as u32,
                        in_flight: 0,
                        upload: upload.id,
                    });
                    self.send_next(world, out, now);
                }
            }
            Action::Offer { peer, swarm, piece } => {
                out.counts.control(ENVELOPE);
                let ((to, link), swarm) = (parts(peer), swarm.0 as u16);
                self.send(world, out, now, to, What::Offer { link, swarm, piece });
            }
            Action::RefuseBusy { upload } => self.refuse(world, out, now, upload, true),
            Action::RefuseNotHere { upload } => self.refuse(world, out, now, upload, false),
            Action::AskLease { swarm, block, lacking, want } => {
                let (number, swarm) = (self.number(), swarm.0 as u16);
                let ask = LeaseAsk { number, swarm, block, lacking, want };
                self.asks.push(ask);
                self.ask_lease(world, out, now, ask, 0);
            }
            Action::LeaseDone { swarm, first, count, held } => {
                let swarm = swarm.0 as u16;
                let block = first / shoal_proto::region::LEASE_BLOCK_PIECES;
                let owners = world.owners(swarm, block);
                let answers = owners.iter().find(|owner| self.silent_until[**owner] <= now);
                let owner = world.region(*answers.unwrap_or(&owners[0]));
                out.counts.control(ENVELOPE);
                self.send(world, out, now, owner, What::LeaseDone { swarm, first, count, held });
            }
            Action::FetchOrigin { swarm, first, count } => {
                let (swarm, number) = (swarm.0 as u16, self.number());
                self.live.push(Live {
                    number,
                    from: world.bucket(),
                    request: OF_BUCKET,
                    swarm,
                    piece: first,
                    last: first + count - 1,
                    left: world.piece_len(swarm, first) as u32,
                    storing: 0,
                });
                let (life, count) = (self.life, count as u16);
                self.plan(out, now + READ_TIMEOUT_NS, What::ReadTimeout { life, number });
                let read = What::Read { swarm, first, count, number, admitted: false };
                self.send(world, out, now, world.bucket(), read);
            }
            Action::WantPeers { want, .. } => {
                let region = self.region(world);
                out.counts.control(ENVELOPE);
                self.send(world, out, now, region, What::Introduce { want });
            }
            Action::Ban { peer } => {
                let (machine, link) = parts(peer);
                self.banned.push(machine);
                self.drop_peer(world, out, now, machine);
                self.send(world, out, now, machine, What::Lost { link });
            }
            Action::Completed { swarm } => {
                let artifact = swarm.0 as u16;
                let task = self.tasks.iter_mut().find(|task| task.artifact == artifact);
                if let Some(task) = task
                    && task.completed_at.is_none()
                {
                    task.completed_at = Some(now);
                    out.counts.completed += 1;
                }
            }
        }
    }

    pub(super) fn refuse(
        &mut self,
        world: &Static,
        out: &mut Out,
        now: u64,
        upload: UploadId,
        busy: bool,
    ) {
        if let Some(at) = self.uploads.iter().position(|own| own.is(upload)) {
            let upload = self.uploads.swap_remove(at);
            out.counts.control(ENVELOPE / 4);
            let number = upload.number;
            self.send(world, out, now, upload.to, What::Refused { number, busy });
        }
    }

    /// Puts the next part on the line, if it is free.
    pub(super) fn send_next(&mut self, world: &Static, out: &mut Out, now: u64) {
        if self.line.busy {
            return;
        }
        let next = self.line.next(|swarm| world.parts(swarm), |swarm, p| world.piece_len(swarm, p));
        let Some((flow, bytes)) = next else { return };
        self.line.busy = true;
        let took = line_ns(bytes, self.rate_bps);
        let life = self.life;
        self.plan(out, now + took, What::LineFree { life });
        let zone = world.zone(flow.to);
        if zone != self.zone {
            out.counts.cross_zone_bytes += bytes;
        }
        let arrives = now + world.one_way_ns(self.zone, zone, self.rng.random());
        let part = What::Bytes {
            to: flow.to,
            number: flow.number,
            bytes: bytes as u32,
            tail_ns: took as u32,
            corrupt: self.corrupt,
        };
        let hop = world.first_hop(self.id, flow.to);
        self.post(world, out, arrives, hop, part);
    }

    pub(super) fn received(
        &mut self,
        world: &Static,
        out: &mut Out,
        now: u64,
        from: Actor,
        (number, bytes, tail_ns, corrupt): (u32, u32, u32, bool),
    ) {
        let took = line_ns(u64::from(bytes), self.rate_bps);
        self.down_free = self.down_free.max(now) + took;
        let through = self.down_free.max(now + u64::from(tail_ns));
        let Some(live) = self.live.iter_mut().find(|live| live.number == number) else {
            // It was cancelled; the sender knows by now.
            out.counts.wasted_bytes += u64::from(bytes);
            return;
        };
        // Parts of two pieces of one flow may come in the wrong order: the flow's bytes count, whichever they are.
        let (swarm, first, mut more) = (live.swarm, live.piece, bytes);
        while more >= live.left {
            more -= live.left;
            live.left = 0;
            live.storing += 1;
            if live.piece == live.last {
                break;
            }
            live.piece += 1;
            live.left = world.piece_len(swarm, live.piece) as u32;
        }
        live.left = live.left.saturating_sub(more);
        let end = live.piece + u32::from(live.left == 0);
        // The sender waits for it only if there is a part that it may not send yet.
        let Parts { bytes: part, window } = world.parts(swarm);
        let credit = live.piece < live.last || u64::from(live.left) > part * u64::from(window - 1);
        if credit {
            let way = world.one_way_ns(self.zone, world.zone(from), self.rng.random());
            // The next part is on its way while the end of this one comes in.
            let at = (now + way).max(through.saturating_sub(way));
            self.post(world, out, at, from, What::Credit { number });
        }
        let life = self.life;
        for piece in first..end {
            let len = world.piece_len(swarm, piece);
            self.hash_free = self.hash_free.max(through) + line_ns(len, HASH_BPS);
            self.disk_free = self.disk_free.max(self.hash_free) + line_ns(len, DISK_BPS);
            self.plan(out, self.disk_free, What::Stored { life, number, piece, corrupt });
        }
    }

    pub(super) fn stored(
        &mut self,
        world: &Static,
        out: &mut Out,
        now: u64,
        number: u32,
        piece: u32,
        corrupt: bool,
    ) {
        let Some(at) = self.live.iter().position(|live| live.number == number) else {
            return;
        };
        let outcome = if corrupt { Outcome::Corrupt } else { Outcome::Verified };
        self.live[at].storing -= 1;
        let live = Live { piece, ..self.live[at] };
        if live.storing == 0 && self.live[at].left == 0 {
            self.live.swap_remove(at);
        }
        self.ended(world, out, now, live, outcome);
    }

    /// A piece that was asked for is there, or will not be.
    pub(super) fn ended(
        &mut self,
        world: &Static,
        out: &mut Out,
        now: u64,
        live: Live,
        outcome: Outcome,
    ) {
        let len = world.piece_len(live.swarm, live.piece);
        let task = self.tasks.iter_mut().find(|task| task.artifact == live.swarm);
        if outcome == Outcome::Verified
            && let Some(task) = task
        {
            if task.got.insert(live.piece) {
                out.counts.held_bytes += len;
            } else {
                out.counts.wasted_bytes += len;
            }
        } else if outcome == Outcome::Corrupt {
            out.counts.wasted_bytes += len;
        }
        let event = match live.request {
            OF_BUCKET => {
                let (swarm, piece) = (SwarmKey(u64::from(live.swarm)), PieceIndex(live.piece));
                Event::OriginEnded { swarm, piece, outcome }
            }
            request => Event::FetchEnded { request, outcome },
        };
        self.tell(world, out, now, event);
    }

    pub(super) fn read_failed(&mut self, world: &Static, out: &mut Out, now: u64, number: u32) {
        let Some(at) = self.live.iter().position(|live| live.number == number) else { return };
        let live = self.live.swap_remove(at);
        for piece in live.piece - u32::from(live.storing)..=live.last {
            self.ended(world, out, now, Live { piece, ..live }, Outcome::Failed);
        }
    }
}
