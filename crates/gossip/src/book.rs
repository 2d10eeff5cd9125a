//! The address book: whom to dial, and when again. Bounded; the dead are forgotten.

use std::{
    collections::BTreeMap,
    hash::{BuildHasher, RandomState},
    net::SocketAddr,
    time::{Duration, Instant},
};

use shoal_proto::NodeId;

/// How many addresses are kept: a region process introduces some dozens at a time.
pub(crate) const ADDRESSES_MAX: usize = 1_024;

/// How many addresses without a key are kept: the region processes that the configuration names.
pub(crate) const SEEDS_MAX: usize = 64;

/// A peer that could not be reached so often in a row is forgotten: some minutes of trying.
const FAILURES_MAX: u32 = 8;

/// The pause after the first failure; it doubles with each further one.
const PAUSE_MIN: Duration = Duration::from_secs(1);

/// The longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// The pause before a peer that has no room, or refuses us, is asked again.
const PAUSE_FULL: Duration = Duration::from_secs(60);

/// `pause`, less or more by up to a half, so that machines that failed together do not return together.
fn spread(pause: Duration) -> Duration {
    // Each `RandomState` has keys of its own: enough randomness for a pause.
    let thousandths = RandomState::new().hash_one(0) % 1_000;
    pause / 2 + pause.mul_f64(thousandths as f64 / 1_000.0)
}

/// How an address has done.
#[derive(Debug, Clone, Copy)]
struct Tries {
    failures: u32,
    next: Instant,
}

impl Tries {
    fn new(now: Instant) -> Self {
        Self { failures: 0, next: now }
    }

    fn failed(&mut self, now: Instant) {
        let pause = PAUSE_MIN.saturating_mul(1 << self.failures.min(10)).min(PAUSE_MAX);
        self.failures += 1;
        self.next = now + spread(pause);
    }
}

#[derive(Debug)]
struct Entry {
    addr: SocketAddr,
    tries: Tries,
}

#[derive(Debug)]
struct Seed {
    /// Who answered there last.
    node: Option<NodeId>,
    tries: Tries,
}

#[derive(Debug, Default)]
pub(crate) struct Book {
    peers: BTreeMap<NodeId, Entry>,
    seeds: BTreeMap<SocketAddr, Seed>,
}

impl Book {
    pub(crate) fn len(&self) -> usize {
        self.peers.len() + self.seeds.len()
    }

    /// Takes a peer's address. When the book is full, one that does not answer makes room; if all do,
    /// the new one is not needed.
    pub(crate) fn add(&mut self, node: NodeId, addr: SocketAddr, now: Instant) {
        if let Some(entry) = self.peers.get_mut(&node) {
            if entry.addr != addr {
                *entry = Entry { addr, tries: Tries::new(now) };
            }
            return;
        }
        if self.peers.len() >= ADDRESSES_MAX {
            let worst = self.peers.iter().max_by_key(|(_, entry)| entry.tries.failures);
            match worst.map(|(node, entry)| (*node, entry.tries.failures)) {
                Some((worst, failures)) if failures > 0 => self.peers.remove(&worst),
                _ => return,
            };
        }
        self.peers.insert(node, Entry { addr, tries: Tries::new(now) });
    }

    /// Takes an address that the configuration names; it is never forgotten.
    pub(crate) fn add_seed(&mut self, addr: SocketAddr, now: Instant) {
        if self.seeds.len() < SEEDS_MAX {
            self.seeds.entry(addr).or_insert(Seed { node: None, tries: Tries::new(now) });
        }
    }

    pub(crate) fn remove_seed(&mut self, addr: &SocketAddr) {
        self.seeds.remove(addr);
    }

    /// At most `want` peers to dial now, at random, of those that are not `busy`.
    pub(crate) fn due(
        &self,
        now: Instant,
        want: usize,
        busy: impl Fn(&NodeId) -> bool,
    ) -> Vec<(NodeId, SocketAddr)> {
        if want == 0 {
            return Vec::new();
        }
        let mut due: Vec<_> = self
            .peers
            .iter()
            .filter(|(node, entry)| entry.tries.next <= now && !busy(node))
            .map(|(node, entry)| (*node, entry.addr))
            .collect();
        let order = RandomState::new();
        due.sort_by_cached_key(|(node, _)| order.hash_one(node));
        due.truncate(want);
        due
    }

    /// The seeds to dial now: all whose process is not `busy`.
    pub(crate) fn due_seeds(
        &self,
        now: Instant,
        busy: impl Fn(&NodeId) -> bool,
    ) -> Vec<SocketAddr> {
        let due = self
            .seeds
            .iter()
            .filter(|(_, seed)| seed.tries.next <= now && !seed.node.as_ref().is_some_and(&busy));
        due.map(|(addr, _)| *addr).collect()
    }

    /// `node` answered at `addr`, or wherever it is known to be.
    pub(crate) fn answered(&mut self, node: &NodeId, addr: Option<SocketAddr>, now: Instant) {
        if let Some(entry) = self.peers.get_mut(node) {
            entry.tries = Tries::new(now);
        }
        if let Some(seed) = addr.and_then(|addr| self.seeds.get_mut(&addr)) {
            *seed = Seed { node: Some(*node), tries: Tries::new(now) };
        }
    }

    /// `node` did not answer; after [`FAILURES_MAX`] times in a row it is forgotten.
    pub(crate) fn failed(&mut self, node: &NodeId, now: Instant) {
        if let Some(entry) = self.peers.get_mut(node) {
            entry.tries.failed(now);
            if entry.tries.failures >= FAILURES_MAX {
                self.peers.remove(node);
            }
        }
    }

    pub(crate) fn seed_failed(&mut self, addr: &SocketAddr, now: Instant) {
        if let Some(seed) = self.seeds.get_mut(addr) {
            seed.node = None;
            seed.tries.failed(now);
        }
    }

    /// `node` is gone, has no room, or refuses us: not again at once.
    pub(crate) fn later(&mut self, node: &NodeId, full: bool, now: Instant) {
        let pause = || now + spread(if full { PAUSE_FULL } else { PAUSE_MIN });
        if let Some(entry) = self.peers.get_mut(node) {
            entry.tries.next = pause();
        }
        for seed in self.seeds.values_mut().filter(|seed| seed.node.as_ref() == Some(node)) {
            seed.tries.next = pause();
        }
    }

    /// `node` is not a member.
    pub(crate) fn forget(&mut self, node: &NodeId) {
        self.peers.remove(node);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(n: u32) -> NodeId {
        let mut bytes = [0; 32];
        bytes[..4].copy_from_slice(&n.to_be_bytes());
        NodeId(bytes)
    }

    fn addr(port: u16) -> SocketAddr {
        ([127, 0, 0, 1], port).into()
    }

    #[test]
    fn the_dead_are_tried_ever_less_and_forgotten() {
        let (mut book, mut now) = (Book::default(), Instant::now());
        book.add(node(1), addr(1), now);
        let mut pauses = Vec::new();
        for _ in 0..FAILURES_MAX {
            assert_eq!(book.due(now, 5, |_| false), [(node(1), addr(1))]);
            book.failed(&node(1), now);
            let next = book.peers.get(&node(1)).map(|entry| entry.tries.next);
            if let Some(next) = next {
                assert!(book.due(now, 5, |_| false).is_empty(), "not at once");
                pauses.push(next - now);
                now = next;
            }
        }
        assert_eq!(book.len(), 0, "forgotten");
        assert!(pauses[0] >= PAUSE_MIN / 2 && pauses[6] >= PAUSE_MIN * 16, "{pauses:?}");
        assert!(pauses.iter().all(|pause| *pause <= PAUSE_MAX * 3 / 2), "{pauses:?}");
    }

    #[test]
    fn the_book_is_bounded_and_the_silent_make_room() {
        let (mut book, now) = (Book::default(), Instant::now());
        for n in 0..ADDRESSES_MAX as u32 + 10 {
            book.add(node(n), addr(1), now);
        }
        assert_eq!(book.len(), ADDRESSES_MAX);
        book.failed(&node(3), now);
        book.add(node(5_000), addr(2), now);
        assert_eq!(book.len(), ADDRESSES_MAX);
        assert!(!book.peers.contains_key(&node(3)) && book.peers.contains_key(&node(5_000)));
        assert_eq!(book.due(now, 7, |_| false).len(), 7);
        assert!(book.due(now, 7, |_| true).is_empty());
        for port in 0..100 {
            book.add_seed(addr(port), now);
        }
        assert_eq!(book.seeds.len(), SEEDS_MAX);
    }

    #[test]
    fn a_seed_is_never_forgotten() {
        let (mut book, mut now) = (Book::default(), Instant::now());
        book.add_seed(addr(9), now);
        for _ in 0..40 {
            book.seed_failed(&addr(9), now);
            assert!(book.due_seeds(now, |_| false).is_empty());
            now += PAUSE_MAX * 2;
            assert_eq!(book.due_seeds(now, |_| false), [addr(9)]);
        }
        book.answered(&node(1), Some(addr(9)), now);
        assert!(book.due_seeds(now, |n| *n == node(1)).is_empty(), "connected");
        assert_eq!(book.due_seeds(now, |_| false), [addr(9)], "gone again");
    }
}
