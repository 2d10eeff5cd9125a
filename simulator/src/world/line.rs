//! Lines: who may send next, and when what was sent has arrived.
//!
//! A piece goes over a line in parts of at most [`part_bytes`]. The sender's line serves its flows in turn, a
//! part each; a flow has at most [`FLOW_PARTS_MAX`] parts on their way, and waits for the receiver's line to be through with one
//! before it sends the next. The receiver's line takes the parts as they come. So both ends share their line
//! evenly to within a part, nothing is idle that has something to do, and a slow receiver slows its sender.
//! What a line sends is settled [`TURN_PARTS`] parts at a time, or up to the end of a flow.

use shoal_swarm::UploadId;
use smallvec::SmallVec;

use super::message::Actor;

/// Parts of one flow that may be on their way: one is received while the next is sent.
pub(super) const FLOW_PARTS_MAX: u32 = 2;

/// Parts that a line puts on its way at once, one after the other: one event for both.
pub(super) const TURN_PARTS: u32 = 2;

/// Flows that lie in the line itself: as many as a machine has slots.
const FLOWS: usize = 8;

/// The longest part, in bytes.
const PART_MAX: u64 = 4 << 20;

/// Parts that a piece has, but for the limits.
const PARTS_OF_PIECE: u64 = 4;

/// The shortest part of a piece that is longer, in bytes: less costs events and changes nothing.
const PART_MIN: u64 = 1 << 20;

/// The length of a part for a size of pieces, in bytes.
pub(super) fn part_bytes(piece_bytes: u64) -> u64 {
    (piece_bytes / PARTS_OF_PIECE).clamp(PART_MIN, PART_MAX).min(piece_bytes)
}

/// How long a line of `bits_per_s` needs for `bytes`, in nanoseconds.
pub(super) fn line_ns(bytes: u64, bits_per_s: u64) -> u64 {
    const BIT_NS: u64 = 8_000_000_000;
    let rate = bits_per_s.max(1);
    match bytes.checked_mul(BIT_NS) {
        Some(bit_ns) => bit_ns / rate,
        None => (u128::from(bytes) * u128::from(BIT_NS) / u128::from(rate)) as u64,
    }
}

/// Pieces on their way to one receiver, one after the other.
#[derive(Debug, Clone, Copy)]
pub(super) struct Flow {
    pub(super) to: Actor,
    /// The receiver's number for it.
    pub(super) number: u32,
    pub(super) piece: u32,
    /// The last piece; the bucket sends several in one answer.
    pub(super) last: u32,
    /// Bytes of `piece` that were not sent.
    pub(super) left: u64,
    pub(super) upload: UploadId,
    pub(super) swarm: u16,
    pub(super) in_flight: u16,
}

/// The sending side of a line.
#[derive(Debug, Default)]
pub(super) struct Line {
    pub(super) busy: bool,
    /// What was sent whole when the line is free again.
    pub(super) ending: Option<UploadId>,
    /// Whose turn it is.
    turn: usize,
    flows: SmallVec<[Flow; FLOWS]>,
}

impl Line {
    pub(super) fn add(&mut self, flow: Flow) {
        self.flows.push(flow);
    }

    /// Reads the flows, so that they are in the cache.
    pub(super) fn warm(&self) -> u64 {
        self.flows.iter().fold(0, |sum, flow| sum ^ flow.left)
    }

    fn remove_at(&mut self, at: usize) -> Flow {
        let flow = self.flows.remove(at);
        if self.turn > at {
            self.turn -= 1;
        }
        flow
    }

    /// Ends a flow that is no longer wanted.
    pub(super) fn remove(&mut self, to: Actor, number: u32) {
        if let Some(at) = self.flows.iter().position(|f| f.to == to && f.number == number) {
            self.remove_at(at);
        }
    }

    /// The receiver is through with a part.
    pub(super) fn credit(&mut self, to: Actor, number: u32) {
        let flow = self.flows.iter_mut().find(|flow| flow.to == to && flow.number == number);
        if let Some(flow) = flow {
            flow.in_flight = flow.in_flight.saturating_sub(1);
        }
    }

    /// The next part of whichever flow's turn it is: the flow as it was before, and the part's bytes. None too once
    /// a flow has ended, until that is known.
    pub(super) fn next(
        &mut self,
        part: impl Fn(u16) -> u64,
        piece_len: impl Fn(u16, u32) -> u64,
    ) -> Option<(Flow, u64)> {
        if self.ending.is_some() {
            return None;
        }
        let count = self.flows.len();
        let turn = self.turn.min(count);
        let at = (turn..count)
            .chain(0..turn)
            .find(|at| u32::from(self.flows[*at].in_flight) < FLOW_PARTS_MAX)?;
        self.turn = at + 1;
        let flow = &mut self.flows[at];
        let before = *flow;
        let bytes = flow.left.min(part(flow.swarm));
        flow.left -= bytes;
        flow.in_flight += 1;
        if flow.left == 0 && flow.piece < flow.last {
            flow.piece += 1;
            flow.left = piece_len(flow.swarm, flow.piece);
        }
        if flow.left == 0 {
            self.ending = Some(flow.upload);
            self.remove_at(at);
        }
        Some((before, bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PART: u64 = 4;

    fn flow(to: Actor, left: u64) -> Flow {
        let upload = UploadId(u64::from(to));
        Flow { to, number: 7, swarm: 0, piece: 0, last: 0, left, in_flight: 0, upload }
    }

    fn next(line: &mut Line) -> Option<(Actor, u64)> {
        line.next(|_| PART, |_, _| 10).map(|(flow, bytes)| (flow.to, bytes))
    }

    #[test]
    fn flows_take_turns_and_wait_for_their_receivers() {
        let mut line = Line::default();
        line.add(flow(1, 10));
        line.add(flow(2, 10));
        let sent: Vec<_> = (0..4).filter_map(|_| next(&mut line)).collect();
        assert_eq!(sent, [(1, 4), (2, 4), (1, 4), (2, 4)]);
        assert_eq!(next(&mut line), None, "two parts of each are on their way");
        line.credit(2, 7);
        assert_eq!(next(&mut line), Some((2, 2)), "the rest");
        assert_eq!(line.ending.take(), Some(UploadId(2)));
        line.credit(1, 7);
        assert_eq!(next(&mut line), Some((1, 2)));
        assert_eq!(next(&mut line), None);
    }

    #[test]
    fn a_flow_of_several_pieces_sends_one_after_the_other() {
        let mut line = Line::default();
        line.add(Flow { last: 1, ..flow(1, 3) });
        assert_eq!(next(&mut line), Some((1, 3)));
        assert_eq!(line.ending, None);
        assert_eq!(next(&mut line), Some((1, 4)), "the next piece has ten");
        line.remove(1, 7);
        line.credit(1, 7);
        assert_eq!(next(&mut line), None, "it was cancelled");
    }

    #[test]
    fn parts_are_quarters_within_limits() {
        let mib = 1 << 20;
        let parts = [256 << 10, mib, 4 * mib, 8 * mib, 16 * mib].map(part_bytes);
        assert_eq!(parts, [256 << 10, mib, mib, 2 * mib, 4 * mib]);
        assert_eq!(line_ns(1_250_000_000, 10_000_000_000), 1_000_000_000);
    }
}
