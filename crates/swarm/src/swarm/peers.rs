//! The machines that there is a connection to.

use alloc::vec::Vec;
use core::time::Duration;

use rand::RngExt;
use rand_pcg::Pcg32;

use crate::{
    event::{PeerKey, SwarmKey},
    time::Time,
};

/// How long a measured piece time says something about a peer's load.
const MEASURE_KEEP: Duration = Duration::from_secs(5);

/// The most that a back-off is doubled: past it every limit is reached.
const DOUBLINGS_MAX: u32 = 24;

/// How many peers room is made for at a time.
const ROOM: usize = 8;

/// All peers of a machine, each at a place that stays its own until a peer goes. The keys lie by
/// themselves: to look one up is to run through a few cache lines.
#[derive(Debug, Clone, Default)]
pub(super) struct Peers {
    keys: Vec<PeerKey>,
    peers: Vec<Peer>,
}

impl Peers {
    pub(super) fn len(&self) -> usize {
        self.peers.len()
    }

    pub(super) fn find(&self, key: PeerKey) -> Option<usize> {
        self.keys.iter().position(|other| *other == key)
    }

    pub(super) fn key(&self, at: usize) -> PeerKey {
        self.keys[at]
    }

    pub(super) fn get(&self, at: usize) -> Option<&Peer> {
        self.peers.get(at)
    }

    pub(super) fn get_mut(&mut self, at: usize) -> Option<&mut Peer> {
        self.peers.get_mut(at)
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Peer> {
        self.peers.iter_mut()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (PeerKey, &Peer)> {
        self.keys.iter().copied().zip(&self.peers)
    }

    pub(super) fn push(&mut self, key: PeerKey, peer: Peer) {
        if self.keys.len() == self.keys.capacity() {
            self.keys.reserve_exact(ROOM);
            self.peers.reserve_exact(ROOM);
        }
        self.keys.push(key);
        self.peers.push(peer);
    }

    /// Takes a peer out; the last one moves to its place.
    pub(super) fn remove(&mut self, at: usize) {
        self.keys.swap_remove(at);
        self.peers.swap_remove(at);
    }
}

/// One connection's machine, in a cache line.
#[derive(Debug, Clone)]
#[repr(align(64))]
pub(super) struct Peer {
    /// It is not asked before this.
    pub(super) rests_until: Time,
    measured_at: Time,
    /// The smoothed time that it takes for a piece; 0 before the first.
    piece_nanos: u64,
    /// The swarm in which it became a neighbour last, and its slot there: most machines have one, and need not look.
    neighbour: Option<(SwarmKey, u8)>,
    pub(super) same_zone: bool,
    pub(super) banned: bool,
    /// It let a request pass, and has answered none since: see [`Self::is_silent`].
    pub(super) mute: bool,
    /// It delivered a piece at some time.
    proven: bool,
    /// Requests on their way from it, over all swarms.
    pub(super) requests: u8,
    /// Corrupt pieces it sent, ever.
    pub(super) corrupt: u8,
    /// BUSY answers since its last piece.
    busy: u8,
    /// Failed requests since its last piece.
    failed: u8,
}

impl Peer {
    pub(super) fn new(same_zone: bool) -> Self {
        Self {
            rests_until: Time::ZERO,
            measured_at: Time::ZERO,
            piece_nanos: 0,
            neighbour: None,
            same_zone,
            banned: false,
            mute: false,
            proven: false,
            requests: 0,
            corrupt: 0,
            busy: 0,
            failed: 0,
        }
    }

    /// It has this slot in a swarm.
    pub(super) fn has_slot(&mut self, swarm: SwarmKey, slot: usize) {
        self.neighbour = u8::try_from(slot).ok().map(|slot| (swarm, slot));
    }

    /// It is no neighbour in a swarm any more.
    pub(super) fn has_no_slot(&mut self, swarm: SwarmKey) {
        self.neighbour.take_if(|(of, _)| *of == swarm);
    }

    /// Its slot in a swarm, if that is known here.
    pub(super) fn slot(&self, swarm: SwarmKey) -> Option<usize> {
        self.neighbour.filter(|(of, _)| *of == swarm).map(|(_, slot)| slot.into())
    }

    /// Whether it may be asked for one more piece.
    pub(super) fn is_free(&self, now: Time, requests_max: u8) -> bool {
        !self.banned & (self.requests < requests_max) & (self.rests_until <= now)
    }

    /// It delivered a piece.
    pub(super) fn delivered(&mut self, now: Time, took: Duration) {
        self.proven = true;
        (self.busy, self.failed) = (0, 0);
        let took = nanos(took);
        self.piece_nanos =
            if self.is_measured(now) { (self.piece_nanos * 3 + took) / 4 } else { took };
        self.measured_at = now;
    }

    /// A request to it is late: it is at least this slow.
    pub(super) fn is_late(&mut self, now: Time, so_far: Duration) {
        self.piece_nanos = self.piece_nanos.max(nanos(so_far));
        self.measured_at = now;
    }

    /// Whether what it says it holds is to be doubted: a request to it was `given_up`, or is late and it never delivered
    /// anything. It may hang, or lie.
    pub(super) fn is_silent(&self, given_up: bool) -> bool {
        !self.mute && (given_up || !self.proven)
    }

    pub(super) fn was_busy(&mut self, now: Time, min: Duration, max: Duration, rng: &mut Pcg32) {
        self.rests_until = self.rests_until.max(now + backoff(self.busy.into(), min, max, rng));
        self.busy = self.busy.saturating_add(1);
    }

    /// It keeps a place for us: it is no longer busy.
    pub(super) fn offers(&mut self, now: Time) {
        if self.failed == 0 {
            self.rests_until = self.rests_until.min(now);
            self.busy = 0;
        }
    }

    pub(super) fn has_failed(&mut self, now: Time, min: Duration, max: Duration, rng: &mut Pcg32) {
        self.rests_until = self.rests_until.max(now + backoff(self.failed.into(), min, max, rng));
        self.failed = self.failed.saturating_add(1);
    }

    fn is_measured(&self, now: Time) -> bool {
        self.piece_nanos > 0 && now.since(self.measured_at) < MEASURE_KEEP
    }

    /// How loaded it is, in octaves of the time that one more piece may take; `usual` is what a piece
    /// takes from a peer that was not measured of late.
    pub(super) fn load(&self, now: Time, usual: Duration) -> u32 {
        if self.mute {
            return u32::MAX;
        }
        let each = if self.is_measured(now) { self.piece_nanos } else { nanos(usual) };
        let expected = each / 1_000 * (u64::from(self.requests) + 1);
        u64::BITS - expected.leading_zeros()
    }
}

/// `min` doubled `streak` times up to `max`, then spread evenly over half of it either way, so that
/// those who were refused together do not come back together.
pub(super) fn backoff(streak: u32, min: Duration, max: Duration, rng: &mut Pcg32) -> Duration {
    let full = min.saturating_mul(1 << streak.min(DOUBLINGS_MAX)).min(max);
    jitter(full, rng)
}

/// An even choice between half and one and a half of `around`.
pub(super) fn jitter(around: Duration, rng: &mut Pcg32) -> Duration {
    let nanos = u64::try_from(around.as_nanos()).unwrap_or(u64::MAX / 2).min(u64::MAX / 2);
    Duration::from_nanos(nanos / 2 + rng.random_range(0..=nanos))
}

/// Far more than any time that matters, and small enough to calculate with.
fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).min(u64::MAX / 16)
}

/// What a piece takes, smoothed as TCP smooths round trips (RFC 6298): mean and mean deviation.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct PieceTime {
    mean_nanos: u64,
    deviation_nanos: u64,
    /// Requests given up since the last one that ended well: the measure is too hopeful.
    given_up: u32,
}

impl PieceTime {
    pub(super) fn measured(&mut self, took: Duration) {
        let took = nanos(took);
        if self.mean_nanos == 0 {
            self.deviation_nanos = took / 2;
            self.mean_nanos = took;
        } else {
            self.deviation_nanos = (self.deviation_nanos * 3 + self.mean_nanos.abs_diff(took)) / 4;
            self.mean_nanos = (self.mean_nanos * 7 + took) / 8;
        }
        self.given_up = 0;
    }

    pub(super) fn gave_up(&mut self) {
        self.given_up = self.given_up.saturating_add(1);
    }

    /// The mean, once there is one.
    pub(super) fn mean(&self) -> Option<Duration> {
        (self.mean_nanos > 0).then_some(Duration::from_nanos(self.mean_nanos))
    }

    /// When a request counts as late: four deviations past the mean.
    pub(super) fn late(&self) -> Option<Duration> {
        self.mean().map(|mean| mean + Duration::from_nanos(self.deviation_nanos * 4))
    }

    /// How often the time to give up is doubled.
    pub(super) fn strain(&self) -> u32 {
        1 << self.given_up.min(DOUBLINGS_MAX)
    }
}
