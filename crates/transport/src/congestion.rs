//! Congestion control: Cubic, or one that yields to whatever else the path carries, as a flag says.
//!
//! The one that yields is LEDBAT (RFC 6817) with the multiplicative decrease of LEDBAT++ (draft-irtf-iccrg-ledbat-plus-plus): the
//! window grows while packets wait for less than [`TARGET`] on their way, and shrinks when they wait for longer, so before any
//! queue is full. Cubic and its like fill queues until they lose packets, and so push it aside.
//!
//! QUIC tells no one-way delays, so the round trip stands for them: what waits on the way back counts too, and a peer that is slow to
//! acknowledge looks like a queue. Both make it yield when it need not, never the other way round.

use std::{
    any::Any,
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use quinn::congestion::{Controller, ControllerFactory, Cubic, CubicConfig};
use quinn_proto::RttEstimator;

/// Packets may wait for so long in queues. RFC 6817 allows up to 100 ms, which no queue of a datacentre holds: at
/// 10 Gbit/s 4 MB wait 3 ms. Much less than this is lost among the delays of scheduling.
const TARGET: Duration = Duration::from_millis(3);

/// The shortest of so many round trips, the latest ones, is the present one: a single late acknowledgement is no queue.
const PRESENT: usize = 4;

/// The shortest round trip of so many minutes is the one without queues: paths change.
const BASE_MINUTES: usize = 10;

const MINUTE: Duration = Duration::from_secs(60);

/// Packets in the smallest window.
const WINDOW_MIN_PACKETS: u64 = 2;

/// Makes the controllers of all connections of a process.
#[derive(Debug)]
pub(crate) struct Congestion {
    /// Whether to yield, also on connections that stand.
    pub(crate) yields: Arc<AtomicBool>,
    /// Bytes that a connection may send before anything is acknowledged.
    pub(crate) initial_window: u64,
}

impl Congestion {
    fn cubic(&self, now: Instant, mtu: u16, window: u64) -> Cubic {
        let mut config = CubicConfig::default();
        config.initial_window(window);
        Cubic::new(Arc::new(config), now, mtu)
    }
}

impl ControllerFactory for Congestion {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        let way = Way::Cubic(self.cubic(now, current_mtu, self.initial_window));
        Box::new(Switched { of: self, mtu: current_mtu, way })
    }
}

/// A connection's controller.
#[derive(Clone)]
struct Switched {
    of: Arc<Congestion>,
    mtu: u16,
    way: Way,
}

#[derive(Clone)]
enum Way {
    Cubic(Cubic),
    Ledbat(Ledbat),
}

impl Switched {
    /// Goes over to what the flag says, with the window as it is.
    fn follow(&mut self, now: Instant) {
        let yields = self.of.yields.load(Ordering::Relaxed);
        match &self.way {
            Way::Cubic(cubic) if yields => {
                self.way = Way::Ledbat(Ledbat::new(cubic.window(), self.mtu));
            }
            Way::Ledbat(ledbat) if !yields => {
                self.way = Way::Cubic(self.of.cubic(now, self.mtu, ledbat.window));
            }
            _ => {}
        }
    }
}

impl Controller for Switched {
    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        app_limited: bool,
        rtt: &RttEstimator,
    ) {
        self.follow(now);
        match &mut self.way {
            Way::Cubic(cubic) => cubic.on_ack(now, sent, bytes, app_limited, rtt),
            Way::Ledbat(ledbat) => ledbat.acked(now, sent, bytes, app_limited),
        }
    }

    fn on_congestion_event(
        &mut self,
        now: Instant,
        sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        self.follow(now);
        match &mut self.way {
            Way::Cubic(cubic) => {
                cubic.on_congestion_event(now, sent, is_persistent_congestion, lost_bytes);
            }
            Way::Ledbat(ledbat) => ledbat.lost(now, sent, is_persistent_congestion),
        }
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.mtu = new_mtu;
        match &mut self.way {
            Way::Cubic(cubic) => cubic.on_mtu_update(new_mtu),
            Way::Ledbat(ledbat) => ledbat.set_mtu(new_mtu),
        }
    }

    fn window(&self) -> u64 {
        match &self.way {
            Way::Cubic(cubic) => cubic.window(),
            Way::Ledbat(ledbat) => ledbat.window,
        }
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.of.initial_window
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// LEDBAT's state.
#[derive(Debug, Clone)]
struct Ledbat {
    /// Bytes that may be on their way.
    window: u64,
    /// What of a byte the window has grown or shrunk by besides.
    rest: f64,
    mtu: u64,
    /// The latest round trips.
    present: VecDeque<Duration>,
    /// The shortest round trip of each of the last minutes, and when the last of them began.
    minutes: VecDeque<Duration>,
    minute_began: Option<Instant>,
    /// When the window was last cut for a loss: what was sent before is no news.
    cut_at: Option<Instant>,
}

impl Ledbat {
    fn new(window: u64, mtu: u16) -> Self {
        let mut ledbat = Self {
            window,
            rest: 0.0,
            mtu: mtu.into(),
            present: VecDeque::with_capacity(PRESENT),
            minutes: VecDeque::with_capacity(BASE_MINUTES),
            minute_began: None,
            cut_at: None,
        };
        ledbat.set_mtu(mtu);
        ledbat
    }

    fn window_min(&self) -> u64 {
        WINDOW_MIN_PACKETS * self.mtu
    }

    fn set_mtu(&mut self, mtu: u16) {
        self.mtu = mtu.into();
        self.window = self.window.max(self.window_min());
    }

    /// How long packets wait on their way, by one more round trip.
    fn waits(&mut self, now: Instant, round_trip: Duration) -> Duration {
        if self.present.len() == PRESENT {
            self.present.pop_front();
        }
        self.present.push_back(round_trip);
        if self.minute_began.is_none_or(|began| now.saturating_duration_since(began) >= MINUTE) {
            self.minute_began = Some(now);
            if self.minutes.len() == BASE_MINUTES {
                self.minutes.pop_front();
            }
            self.minutes.push_back(round_trip);
        } else if let Some(shortest) = self.minutes.back_mut() {
            *shortest = round_trip.min(*shortest);
        }
        let shortest = |of: &VecDeque<Duration>| of.iter().min().copied().unwrap_or(round_trip);
        shortest(&self.present).saturating_sub(shortest(&self.minutes))
    }

    fn acked(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool) {
        let waits = self.waits(now, now.saturating_duration_since(sent));
        let over = waits.as_secs_f64() / TARGET.as_secs_f64() - 1.0;
        // In a whole round trip it grows by a packet at most, and shrinks by half at most.
        let (window, mtu) = (self.window as f64, self.mtu as f64);
        let change =
            if over <= 0.0 { -over * mtu } else { (mtu - window * over).max(-window / 2.0) };
        if change > 0.0 && app_limited {
            return;
        }
        let wanted = window + self.rest + change * bytes as f64 / window;
        self.window = (wanted as u64).max(self.window_min());
        self.rest = (wanted - self.window as f64).clamp(0.0, 1.0);
    }

    fn lost(&mut self, now: Instant, sent: Instant, persistent: bool) {
        if self.cut_at.is_some_and(|cut_at| sent <= cut_at) {
            return;
        }
        self.cut_at = Some(now);
        let window = if persistent { 0 } else { self.window / 2 };
        self.window = window.max(self.window_min());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MTU: u16 = 1_200;

    /// A path with a line of so many bytes a second and a queue before it, in steps of a millisecond.
    struct Path {
        now: Instant,
        line: u64,
        base: Duration,
        queued: f64,
    }

    impl Path {
        fn new(line: u64) -> Self {
            Self { now: Instant::now(), line, base: Duration::from_millis(1), queued: 0.0 }
        }

        fn waits(&self) -> Duration {
            Duration::from_secs_f64(self.queued / self.line as f64)
        }

        /// Sends a window a round trip for so many milliseconds, beside others that send so many bytes a second.
        fn carry(&mut self, ledbat: &mut Ledbat, others: u64, ms: u64) {
            for _ in 0..ms {
                let round_trip = self.base + self.waits();
                let sends = ledbat.window as f64 * 0.001 / round_trip.as_secs_f64();
                let line = self.line as f64 * 0.001;
                self.queued = (self.queued + sends + others as f64 * 0.001 - line).max(0.0);
                self.now += Duration::from_millis(1);
                let sent = self.now - self.base - self.waits();
                for _ in 0..(sends / f64::from(MTU)).ceil() as u64 {
                    ledbat.acked(self.now, sent, MTU.into(), false);
                }
            }
        }
    }

    #[test]
    fn alone_it_fills_the_line_and_no_queue() {
        let mut path = Path::new(12_500_000);
        let mut ledbat = Ledbat::new(12_000, MTU);
        path.carry(&mut ledbat, 0, 5_000);
        assert!(path.queued > 0.0, "the line is never idle");
        assert!(path.waits() < TARGET * 2, "{:?}", path.waits());
    }

    #[test]
    fn it_yields_to_others_and_comes_back() {
        let mut path = Path::new(12_500_000);
        let mut ledbat = Ledbat::new(12_000, MTU);
        path.carry(&mut ledbat, 0, 2_000);
        let alone = ledbat.window;
        // Others take all that there is, and let a queue stand.
        path.carry(&mut ledbat, 12_500_000, 2_000);
        assert!(ledbat.window < alone / 4, "{} of {alone}", ledbat.window);
        path.carry(&mut ledbat, 0, 3_000);
        assert!(ledbat.window > alone / 2, "{} of {alone}", ledbat.window);
    }

    #[test]
    fn a_loss_halves_the_window_once_a_round_trip() {
        let now = Instant::now();
        let mut ledbat = Ledbat::new(120_000, MTU);
        let later = now + Duration::from_millis(5);
        ledbat.lost(later, now, false);
        ledbat.lost(later, now, false);
        assert_eq!(ledbat.window, 60_000);
        ledbat.lost(later + Duration::from_millis(5), later + Duration::from_millis(1), false);
        assert_eq!(ledbat.window, 30_000);
        ledbat.lost(later + Duration::from_secs(1), later + Duration::from_millis(500), true);
        assert_eq!(ledbat.window, 2_400);
    }

    #[test]
    fn a_single_late_acknowledgement_is_no_queue() {
        let mut now = Instant::now();
        let mut ledbat = Ledbat::new(120_000, MTU);
        for at in 0..1_000 {
            now += Duration::from_millis(1);
            let late = Duration::from_millis(if at % 3 == 0 { 25 } else { 0 });
            ledbat.acked(now, now - Duration::from_millis(1) - late, 1_200, false);
        }
        assert!(ledbat.window > 120_000, "{}", ledbat.window);
        // What is not used does not grow.
        let before = ledbat.window;
        ledbat.acked(now, now - Duration::from_millis(1), 1_200, true);
        assert_eq!(ledbat.window, before);
    }

    #[test]
    fn the_shortest_round_trip_is_forgotten_after_minutes() {
        let mut now = Instant::now();
        let mut ledbat = Ledbat::new(120_000, MTU);
        ledbat.acked(now, now - Duration::from_millis(1), 1_200, false);
        for _ in 0..12 {
            for _ in 0..PRESENT {
                now += MINUTE / 4;
                ledbat.acked(now, now - Duration::from_millis(50), 1_200, false);
            }
        }
        assert_eq!(ledbat.waits(now, Duration::from_millis(50)), Duration::ZERO);
        assert!(ledbat.minutes.len() <= BASE_MINUTES);
    }

    #[test]
    fn the_flag_switches_connections_that_stand() {
        let yields = Arc::new(AtomicBool::new(false));
        let of = Arc::new(Congestion { yields: yields.clone(), initial_window: 50_000 });
        let now = Instant::now();
        let mut controller = of.build(now, MTU);
        assert_eq!(controller.window(), 50_000);
        yields.store(true, Ordering::Relaxed);
        let later = now + Duration::from_millis(10);
        controller.on_congestion_event(later, now, false, 1_200);
        assert_eq!(controller.window(), 25_000, "LEDBAT halves");
        yields.store(false, Ordering::Relaxed);
        let last = later + Duration::from_millis(10);
        controller.on_congestion_event(last, later + Duration::from_millis(5), false, 1_200);
        assert_eq!(controller.window(), 17_500, "Cubic leaves seven tenths");
    }
}
