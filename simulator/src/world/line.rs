//! Lines: who may send next, and when what was sent has arrived.
//!
//! A piece goes over a line in [`Parts`]. The sender's line serves its flows in turn, a part each. A flow has a window
//! of few parts: the next one beyond it arrives when the receiver's line is through with the first, not earlier. The
//! receiver's line takes the parts as they come. So both ends share their line evenly to within a part, nothing is
//! idle that has something to do, and a slow receiver slows its sender.

use smallvec::SmallVec;

use super::{RTT_CROSS_NS, message::Actor};

/// Flows that lie in the line itself: as many as a machine has slots.
const FLOWS: usize = 8;

/// How an artifact's pieces go over a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Parts {
    /// The length of a part, in bytes.
    pub(super) bytes: u64,
    /// Parts of one flow that may be on their way: what keeps a line busy for a round trip.
    pub(super) window: u16,
}

impl Parts {
    /// For pieces of that length, sent in that many parts on lines of that rate.
    pub(super) fn of(piece_bytes: u64, count: u32, bits_per_s: u64) -> Self {
        let bytes = piece_bytes.div_ceil(u64::from(count));
        let window = RTT_CROSS_NS.div_ceil(line_ns(bytes, bits_per_s).max(1));
        Self { bytes, window: u16::try_from(window).unwrap_or(u16::MAX) }
    }
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

/// Pieces on their way to one receiver, one after the other. Small: a line looks through all of its flows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Flow {
    pub(super) to: Actor,
    /// The receiver's number for it.
    pub(super) number: u32,
    pub(super) piece: u32,
    /// The last piece; the bucket sends several in one answer.
    pub(super) last: u32,
    /// Bytes of `piece` that were not sent.
    pub(super) left: u32,
    /// The sender's number for it.
    pub(super) upload: u32,
    pub(super) swarm: u16,
    /// Parts on their way.
    pub(super) in_flight: u16,
}

/// The sending side of a line. In the order of the fields: the flows end with their number.
#[derive(Debug, Default)]
#[repr(C)]
pub(super) struct Line {
    flows: SmallVec<[Flow; FLOWS]>,
    /// Whose turn it is.
    turn: usize,
    /// What was sent whole when the line is free again, by the sender's number.
    pub(super) ending: Option<u32>,
    pub(super) busy: bool,
}

impl Line {
    pub(super) fn add(&mut self, flow: Flow) {
        self.flows.push(flow);
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

    /// The receiver is about to be through with a part.
    pub(super) fn credit(&mut self, to: Actor, number: u32) {
        let flow = self.flows.iter_mut().find(|flow| flow.to == to && flow.number == number);
        if let Some(flow) = flow {
            flow.in_flight = flow.in_flight.saturating_sub(1);
        }
    }

    /// The next part of whichever flow's turn it is: the flow as it was before, and the part's bytes.
    pub(super) fn next(
        &mut self,
        parts: impl Fn(u16) -> Parts,
        piece_len: impl Fn(u16, u32) -> u64,
    ) -> Option<(Flow, u64)> {
        let count = self.flows.len();
        let turn = self.turn.min(count);
        let at = (turn..count)
            .chain(0..turn)
            .find(|at| self.flows[*at].in_flight < parts(self.flows[*at].swarm).window)?;
        self.turn = at + 1;
        let flow = &mut self.flows[at];
        let before = *flow;
        let bytes = u64::from(flow.left).min(parts(flow.swarm).bytes);
        flow.left -= bytes as u32;
        flow.in_flight += 1;
        if flow.left == 0 && flow.piece < flow.last {
            flow.piece += 1;
            flow.left = piece_len(flow.swarm, flow.piece) as u32;
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

    const PARTS: Parts = Parts { bytes: 4, window: 1 };

    fn flow(to: Actor, left: u32) -> Flow {
        Flow { to, number: 7, swarm: 0, piece: 0, last: 0, left, in_flight: 0, upload: to }
    }

    fn next(line: &mut Line) -> Option<(Actor, u64)> {
        line.next(|_| PARTS, |_, _| 10).map(|(flow, bytes)| (flow.to, bytes))
    }

    #[test]
    fn flows_take_turns_and_wait_for_their_receivers() {
        let mut line = Line::default();
        line.add(flow(1, 10));
        line.add(flow(2, 6));
        let sent: Vec<_> = (0..2).filter_map(|_| next(&mut line)).collect();
        assert_eq!(sent, [(1, 4), (2, 4)]);
        assert_eq!(next(&mut line), None, "a part of each is on its way");
        line.credit(2, 7);
        assert_eq!(next(&mut line), Some((2, 2)), "the rest");
        assert_eq!(line.ending.take(), Some(2));
        line.credit(1, 7);
        assert_eq!(next(&mut line), Some((1, 4)));
        assert_eq!(next(&mut line), None);
    }

    #[test]
    fn a_flow_of_several_pieces_sends_one_after_the_other() {
        let mut line = Line::default();
        line.add(Flow { last: 1, ..flow(1, 3) });
        assert_eq!(next(&mut line), Some((1, 3)));
        assert_eq!(line.ending, None);
        line.credit(1, 7);
        assert_eq!(next(&mut line), Some((1, 4)), "the next piece has ten");
        line.remove(1, 7);
        line.credit(1, 7);
        assert_eq!(next(&mut line), None, "it was cancelled");
    }

    #[test]
    fn a_window_of_parts_fills_a_round_trip() {
        let parts = |piece_mib: u64, count| Parts::of(piece_mib << 20, count, 10_000_000_000);
        assert_eq!(parts(16, 2), Parts { bytes: 8 << 20, window: 1 });
        assert_eq!(parts(16, 32), Parts { bytes: 512 << 10, window: 4 });
        assert_eq!(parts(1, 3), Parts { bytes: 349_526, window: 6 });
        assert_eq!(line_ns(1_250_000_000, 10_000_000_000), 1_000_000_000);
    }
}
