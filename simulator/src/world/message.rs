//! What travels in the world, and when it arrives.

use std::{cmp::Ordering, collections::BTreeMap, sync::Arc, time::Duration};

use shoal_proto::{Bitmap, PieceIndex};

use super::WINDOW_NS;

/// Bytes of a control message beside its content: artifact, kind, framing, and the packet's part.
pub(super) const ENVELOPE: u64 = 40;

/// Who a message is for or from: a machine, a region process, the bucket or a trunk, in this order.
pub(super) type Actor = u32;

/// One thing that happens to one actor at one moment.
#[derive(Debug)]
pub(super) struct Message {
    /// In nanoseconds of the run.
    pub(super) at: u64,
    pub(super) to: Actor,
    pub(super) from: Actor,
    /// The sender's own count: with `from` it orders what arrives at one moment.
    pub(super) seq: u32,
    pub(super) what: What,
}

/// What happens. `link` is the number of the connection that it came over; `life` says how often a machine had been
/// started when it planned something for itself.
#[derive(Debug)]
pub(super) enum What {
    // Between machines, on the control stream.
    Join {
        link: u16,
        swarm: u16,
        have: Arc<Bitmap>,
    },
    Have {
        link: u16,
        swarm: u16,
        pieces: Arc<[PieceIndex]>,
    },
    Leave {
        link: u16,
        swarm: u16,
    },
    Goal {
        artifact: u16,
    },
    /// The goals that the sender knows: it has heard of a swarm that it knows nothing of.
    Known {
        known: u64,
    },
    Offer {
        link: u16,
        swarm: u16,
        piece: PieceIndex,
    },
    // Between machines, a stream for each piece.
    Ask {
        link: u16,
        swarm: u16,
        piece: PieceIndex,
        number: u32,
    },
    Cancel {
        number: u32,
    },
    Refused {
        number: u32,
        busy: bool,
    },
    /// The first byte of a part of a piece; the last one leaves `tail_ns` later.
    Bytes {
        to: Actor,
        number: u32,
        bytes: u32,
        tail_ns: u32,
        corrupt: bool,
    },
    /// The receiver's line is through with as many bytes.
    Credit {
        number: u32,
    },
    // Connections.
    Connect {
        link: u16,
    },
    Connected {
        link: u16,
    },
    /// The connection timed out, or the machine at its other end came back as another one.
    Lost {
        link: u16,
    },
    // To a region process, and its answers.
    AskLease {
        swarm: u16,
        block: u32,
        lacking: u64,
        want: u16,
    },
    LeaseDone {
        swarm: u16,
        first: u32,
        count: u32,
        held: bool,
    },
    Introduce {
        want: u16,
    },
    Poll {
        known: u64,
    },
    Gone,
    LeaseGranted {
        swarm: u16,
        block: u32,
        first: u32,
        count: u32,
    },
    LeaseDenied {
        swarm: u16,
        all_blocks: bool,
        block: u32,
        retry: Option<Duration>,
    },
    Introduced {
        machines: Box<[Actor]>,
    },
    // To the bucket, and its refusal.
    Read {
        swarm: u16,
        first: u32,
        count: u16,
        number: u32,
        admitted: bool,
    },
    ReadFailed {
        number: u32,
    },
    // Planned by an actor for itself.
    Wake,
    LineFree {
        life: u16,
    },
    Stored {
        life: u16,
        number: u32,
        piece: u32,
        corrupt: bool,
    },
    LeaseTimeout {
        life: u16,
        tried: u8,
        number: u32,
    },
    ReadTimeout {
        life: u16,
        number: u32,
    },
    PollDue {
        life: u16,
    },
    /// Time to see which connections died with a zone that was cut off.
    CutNoticed {
        life: u16,
    },
    // From the world itself.
    Die,
    Revive,
}

impl What {
    /// A number for each kind and its subject, for the trace's digest.
    pub(super) fn code(&self) -> (u8, u32) {
        match *self {
            Self::Join { swarm, .. } => (1, u32::from(swarm)),
            Self::Have { ref pieces, .. } => (2, pieces.first().map_or(0, |piece| piece.0)),
            Self::Leave { swarm, .. } => (3, u32::from(swarm)),
            Self::Goal { artifact } => (4, u32::from(artifact)),
            Self::Ask { piece, .. } => (5, piece.0),
            Self::Cancel { number } => (6, number),
            Self::Refused { number, .. } => (7, number),
            Self::Bytes { number, .. } => (8, number),
            Self::Credit { number } => (9, number),
            Self::Connect { link } => (10, u32::from(link)),
            Self::Connected { link } => (11, u32::from(link)),
            Self::Lost { link } => (12, u32::from(link)),
            Self::AskLease { block, .. } => (13, block),
            Self::LeaseDone { first, .. } => (14, first),
            Self::Introduce { want } => (15, u32::from(want)),
            Self::Poll { .. } => (16, 0),
            Self::Gone => (17, 0),
            Self::LeaseGranted { first, .. } => (18, first),
            Self::LeaseDenied { block, .. } => (19, block),
            Self::Introduced { ref machines } => (20, machines.len() as u32),
            Self::Read { first, .. } => (21, first),
            Self::ReadFailed { number } => (22, number),
            Self::Wake => (23, 0),
            Self::LineFree { .. } => (24, 0),
            Self::Stored { piece, .. } => (25, piece),
            Self::LeaseTimeout { number, .. } => (26, number),
            Self::ReadTimeout { number, .. } => (27, number),
            Self::PollDue { .. } => (28, 0),
            Self::CutNoticed { .. } => (29, 0),
            Self::Offer { piece, .. } => (32, piece.0),
            Self::Known { .. } => (33, 0),
            Self::Die => (30, 0),
            Self::Revive => (31, 0),
        }
    }
}

impl Message {
    fn key(&self) -> (u64, Actor, u32) {
        (self.at, self.from, self.seq)
    }
}

// In a heap: the earliest on top.
impl Ord for Message {
    fn cmp(&self, other: &Self) -> Ordering {
        other.key().cmp(&self.key())
    }
}

impl PartialOrd for Message {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Message {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Message {}

/// Windows that lie in the ring: one second. What lies further ahead is in a map.
const RING: u64 = 8_192;

/// Windows ahead that are filled by many: they get a buffer that was used before.
const NEAR: u64 = 64;

/// Emptied buffers that are kept.
const SPARE_MAX: usize = 128;

/// Messages by the window in which they arrive.
pub(super) struct Calendar {
    current: u64,
    ring: Vec<Vec<Message>>,
    /// One bit for each place of the ring that is not empty.
    occupied: Vec<u64>,
    far: BTreeMap<u64, Vec<Message>>,
    spare: Vec<Vec<Message>>,
}

impl Calendar {
    pub(super) fn new() -> Self {
        Self {
            current: 0,
            ring: (0..RING).map(|_| Vec::new()).collect(),
            occupied: vec![0; RING as usize / 64],
            far: BTreeMap::new(),
            spare: Vec::new(),
        }
    }

    /// Keeps a message for its window, which is not over.
    pub(super) fn push(&mut self, message: Message) {
        let window = message.at / WINDOW_NS;
        let ahead = window - self.current;
        if ahead >= RING {
            self.far.entry(window).or_default().push(message);
            return;
        }
        let place = (window % RING) as usize;
        let slot = &mut self.ring[place];
        if slot.is_empty() {
            self.occupied[place / 64] |= 1 << (place % 64);
            if ahead < NEAR
                && slot.capacity() == 0
                && let Some(spare) = self.spare.pop()
            {
                *slot = spare;
            }
        }
        slot.push(message);
    }

    /// The first window from the current one on with a message in it.
    pub(super) fn first(&self) -> Option<u64> {
        let far = self.far.keys().next().copied();
        let start = (self.current % RING) as usize;
        let words = self.occupied.len();
        let mut near = None;
        for step in 0..=words {
            let at = (start / 64 + step) % words;
            let mut word = self.occupied[at];
            if step == 0 {
                word &= u64::MAX << (start % 64);
            } else if step == words {
                word &= !(u64::MAX << (start % 64));
            }
            if word != 0 {
                let place = at as u64 * 64 + u64::from(word.trailing_zeros());
                near = Some(self.current + (place + RING - start as u64) % RING);
                break;
            }
        }
        [near, far].into_iter().flatten().min()
    }

    /// Goes on to a window; nothing lies before it. Its messages, unordered.
    pub(super) fn take(&mut self, window: u64) -> Vec<Message> {
        self.current = window;
        let place = (window % RING) as usize;
        self.occupied[place / 64] &= !(1 << (place % 64));
        let mut messages = std::mem::take(&mut self.ring[place]);
        if let Some(far) = self.far.remove(&window) {
            messages.extend(far);
        }
        messages
    }

    /// Takes an emptied buffer back.
    pub(super) fn give_back(&mut self, buffer: Vec<Message>) {
        if self.spare.len() < SPARE_MAX && buffer.capacity() > 0 {
            self.spare.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_pcg::Pcg32;

    use super::*;

    #[test]
    fn everything_comes_out_in_its_window_and_nothing_is_lost() {
        let mut rng = Pcg32::seed_from_u64(3);
        let mut calendar = Calendar::new();
        let push = |calendar: &mut Calendar, at: u64| {
            calendar.push(Message { at, to: 0, from: 0, seq: 0, what: What::Wake });
        };
        let mut inside = 0;
        for _ in 0..500 {
            // Within the ring and far beyond it.
            let far = if rng.random_range(0..4) == 0 { 100 * RING } else { RING };
            push(&mut calendar, rng.random_range(0..far * WINDOW_NS));
            inside += 1;
        }
        let mut last = 0;
        while let Some(window) = calendar.first() {
            assert!(window >= last);
            last = window;
            let messages = calendar.take(window);
            assert!(!messages.is_empty());
            assert!(messages.iter().all(|message| message.at / WINDOW_NS == window));
            inside -= messages.len();
            calendar.give_back(Vec::new());
            if inside > 0 && rng.random_range(0..3) == 0 {
                push(&mut calendar, (window + rng.random_range(1..3 * RING)) * WINDOW_NS);
                inside += 1;
            }
        }
        assert_eq!(inside, 0);
    }
}
