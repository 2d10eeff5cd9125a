//! The machines that there is a connection to.

use core::time::Duration;

use rand::RngExt;
use rand_pcg::Pcg32;

use crate::time::Time;

/// How long a measured piece time says something about a peer's load.
const MEASURE_KEEP: Duration = Duration::from_secs(5);

/// The most that a back-off is doubled: past it every limit is reached.
const DOUBLINGS_MAX: u32 = 24;

/// One connection's machine.
#[derive(Debug, Clone)]
pub(super) struct Peer {
    pub(super) same_zone: bool,
    pub(super) banned: bool,
    /// Requests on their way from it, over all swarms.
    pub(super) requests: u8,
    /// It is not asked before this.
    pub(super) rests_until: Time,
    /// BUSY answers since its last piece.
    busy: u32,
    /// Failed requests since its last piece.
    failed: u32,
    /// Corrupt pieces it sent, ever.
    pub(super) corrupt: u8,
    /// The smoothed time that it takes for a piece.
    piece_time: Duration,
    measured_at: Time,
}

impl Peer {
    pub(super) fn new(same_zone: bool) -> Self {
        Self {
            same_zone,
            banned: false,
            requests: 0,
            rests_until: Time::ZERO,
            busy: 0,
            failed: 0,
            corrupt: 0,
            piece_time: Duration::ZERO,
            measured_at: Time::ZERO,
        }
    }

    /// Whether it may be asked for one more piece.
    pub(super) fn is_free(&self, now: Time, requests_max: u8) -> bool {
        !self.banned && self.requests < requests_max && self.rests_until <= now
    }

    /// It delivered a piece.
    pub(super) fn delivered(&mut self, now: Time, took: Duration) {
        (self.busy, self.failed) = (0, 0);
        self.piece_time =
            if self.is_measured(now) { (self.piece_time * 3 + took) / 4 } else { took };
        self.measured_at = now;
    }

    /// A request to it is late: it is at least this slow.
    pub(super) fn is_late(&mut self, now: Time, so_far: Duration) {
        self.piece_time = self.piece_time.max(so_far);
        self.measured_at = now;
    }

    pub(super) fn was_busy(&mut self, now: Time, min: Duration, max: Duration, rng: &mut Pcg32) {
        self.rests_until = self.rests_until.max(now + backoff(self.busy, min, max, rng));
        self.busy = self.busy.saturating_add(1);
    }

    pub(super) fn has_failed(&mut self, now: Time, min: Duration, max: Duration, rng: &mut Pcg32) {
        self.rests_until = self.rests_until.max(now + backoff(self.failed, min, max, rng));
        self.failed = self.failed.saturating_add(1);
    }

    fn is_measured(&self, now: Time) -> bool {
        self.piece_time > Duration::ZERO && now.since(self.measured_at) < MEASURE_KEEP
    }

    /// How loaded it is, in octaves of the time that one more piece may take; `usual` is what a piece
    /// takes from a peer that was not measured of late.
    pub(super) fn load(&self, now: Time, usual: Duration) -> u32 {
        let each = if self.is_measured(now) { self.piece_time } else { usual };
        let expected = each.as_micros() as u64 * (u64::from(self.requests) + 1);
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

/// What a piece takes, smoothed as TCP smooths round trips (RFC 6298): mean and mean deviation.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct PieceTime {
    mean: Duration,
    deviation: Duration,
    /// Requests given up since the last one that ended well: the measure is too hopeful.
    given_up: u32,
}

impl PieceTime {
    pub(super) fn measured(&mut self, took: Duration) {
        if self.mean == Duration::ZERO {
            self.deviation = took / 2;
            self.mean = took;
        } else {
            self.deviation = (self.deviation * 3 + self.mean.abs_diff(took)) / 4;
            self.mean = (self.mean * 7 + took) / 8;
        }
        self.given_up = 0;
    }

    pub(super) fn gave_up(&mut self) {
        self.given_up = self.given_up.saturating_add(1);
    }

    /// The mean, once there is one.
    pub(super) fn mean(&self) -> Option<Duration> {
        (self.mean > Duration::ZERO).then_some(self.mean)
    }

    /// When a request counts as late: four deviations past the mean.
    pub(super) fn late(&self) -> Option<Duration> {
        self.mean().map(|mean| mean + self.deviation * 4)
    }

    /// How often the time to give up is doubled.
    pub(super) fn strain(&self) -> u32 {
        1 << self.given_up.min(DOUBLINGS_MAX)
    }
}
