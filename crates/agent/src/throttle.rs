//! The limits in force: setting them, telling them, and taking new ones from the configuration file on SIGHUP.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use shoal_transport::{Endpoint, Paced, Pacer};
use tokio::signal::unix::Signal;

use crate::{
    config::{Args, Config},
    engine::Engine,
    limits::{Limits, LimitsChange},
    metrics::Metrics,
};

/// How often it is noted what has passed.
const SAMPLE_EVERY: Duration = Duration::from_secs(1);

/// So many of these notes are kept: a present rate is that of the last three or four seconds.
const SAMPLES: usize = 4;

/// The limits of an agent, and what passes under them.
pub(crate) struct Throttle {
    endpoint: Endpoint,
    engine: Engine,
    origin: Pacer,
    metrics: Arc<Metrics>,
    state: Mutex<State>,
}

struct State {
    limits: Limits,
    /// What had passed each way at some instants, the last ones.
    samples: VecDeque<(Instant, [u64; 3])>,
}

/// One way: its limit, and what passes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Way {
    /// The limit in force, in bytes a second; none: no limit.
    pub limit_bytes_per_s: Option<u64>,
    /// Piece bytes a second, over the last seconds.
    pub rate_bytes_per_s: u64,
    /// Piece bytes that passed since the agent started.
    pub passed_bytes: u64,
    /// How many of them had to wait for the limit.
    pub held_back_bytes: u64,
    /// For how long something had to wait, in milliseconds.
    pub held_back_ms: u64,
}

/// The limits of a running agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LimitsReport {
    /// What is sent to neighbours.
    pub up: Way,
    /// What is received, from neighbours and the bucket together.
    pub down: Way,
    /// What is read from the bucket.
    pub origin: Way,
    /// Whether what is sent yields to other traffic.
    pub scavenger: bool,
}

impl Throttle {
    /// Puts `limits` in force.
    pub(crate) fn new(
        endpoint: Endpoint,
        engine: Engine,
        origin: Pacer,
        metrics: Arc<Metrics>,
        limits: Limits,
    ) -> Self {
        let samples = VecDeque::with_capacity(SAMPLES);
        let state = Mutex::new(State { limits: Limits::default(), samples });
        let throttle = Self { endpoint, engine, origin, metrics, state };
        throttle.set(limits);
        throttle
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts other limits in force, for what is under way too; what has changed, in words.
    fn set(&self, limits: Limits) -> Option<String> {
        let mut state = self.state();
        let changed = state.limits.changes_to(&limits);
        state.limits = limits;
        self.endpoint.up().set_limit(limits.up.bytes_per_s());
        self.endpoint.limit_down(limits.down.bytes_per_s());
        self.origin.set_limit(limits.origin.bytes_per_s());
        self.endpoint.yield_to_others(limits.scavenger);
        self.engine.limit(limits);
        for (way, limit) in [("up", limits.up), ("down", limits.down), ("origin", limits.origin)] {
            let bytes = limit.bytes_per_s().unwrap_or(0);
            self.metrics.limits.with_label_values(&[way]).set(bytes as i64);
        }
        self.metrics.scavenger.set(limits.scavenger.into());
        changed
    }

    /// Changes some of them, until the file is read again.
    pub(crate) fn change(&self, change: LimitsChange) {
        let limits = self.state().limits.with(change);
        if let Some(changed) = self.set(limits) {
            tracing::info!(
                "limits changed by hand until the configuration is read again: {changed}"
            );
        }
    }

    fn paced(&self) -> [Paced; 3] {
        [self.endpoint.up().paced(), self.endpoint.down().paced(), self.origin.paced()]
    }

    /// The limits in force and what passes under them.
    pub(crate) fn report(&self) -> LimitsReport {
        let paced = self.paced();
        let state = self.state();
        let since = state.samples.front();
        let way = |at: usize, limit_bytes_per_s| {
            let Paced { passed_bytes, held_bytes, held } = paced[at];
            let rate = since.map_or(0.0, |(then, passed)| {
                let passed = passed_bytes.saturating_sub(passed[at]);
                passed as f64 / then.elapsed().as_secs_f64().max(0.001)
            });
            Way {
                limit_bytes_per_s,
                rate_bytes_per_s: rate as u64,
                passed_bytes,
                held_back_bytes: held_bytes,
                held_back_ms: millis(held),
            }
        };
        LimitsReport {
            up: way(0, state.limits.up.bytes_per_s()),
            down: way(1, state.limits.down.bytes_per_s()),
            origin: way(2, state.limits.origin.bytes_per_s()),
            scavenger: state.limits.scavenger,
        }
    }

    /// Notes for ever what passes, and tells the metrics.
    pub(crate) async fn watch(self: Arc<Self>) {
        let mut told = [Paced::default(); 3];
        loop {
            let paced = self.paced();
            for ((way, now), told) in ["up", "down", "origin"].into_iter().zip(paced).zip(&mut told)
            {
                let bytes = self.metrics.held_back_bytes.with_label_values(&[way]);
                bytes.inc_by(now.held_bytes - told.held_bytes);
                let time = self.metrics.held_back_ms.with_label_values(&[way]);
                time.inc_by(millis(now.held).saturating_sub(millis(told.held)));
                *told = now;
            }
            {
                let samples = &mut self.state().samples;
                if samples.len() == SAMPLES {
                    samples.pop_front();
                }
                samples.push_back((Instant::now(), paced.map(|paced| paced.passed_bytes)));
            }
            tokio::time::sleep(SAMPLE_EVERY).await;
        }
    }

    /// Reads the configuration again on each SIGHUP, for ever: what may change while the agent runs is in force at once, what
    /// else has changed since it started waits for a restart. A configuration that is wrong changes nothing.
    pub(crate) async fn reload(self: Arc<Self>, args: Args, started: Config, mut hangup: Signal) {
        while hangup.recv().await.is_some() {
            match Config::load(&args) {
                Ok(new) => {
                    match self.set(new.limits()) {
                        Some(changed) => tracing::info!("configuration read again: {changed}"),
                        None => tracing::info!("configuration read again: no limit has changed"),
                    }
                    for key in started.keys_that_differ(&new) {
                        tracing::warn!("{key} has changed: it needs a restart of the agent");
                    }
                }
                Err(error) => {
                    let error = format!("{error:#}");
                    tracing::error!(error, "the configuration is wrong: all stays as it was");
                }
            }
        }
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
