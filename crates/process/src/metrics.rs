//! Making metrics: each is made and registered in one step, so that none is forgotten.

use prometheus::{
    IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, Result, core::Collector,
};

/// A registry, and metrics in it. Names are `shoal_PROCESS_WHAT_UNIT`, with `_total` behind a counter's.
#[derive(Default)]
pub struct Meters {
    /// What the metrics page shows.
    pub registry: Registry,
}

impl Meters {
    fn registered<M: Collector + Clone + 'static>(&self, metric: M) -> Result<M> {
        self.registry.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    /// A counter.
    ///
    /// # Errors
    /// When the name is taken or not a name; so for the others.
    pub fn counter(&self, name: &str, help: &str) -> Result<IntCounter> {
        self.registered(IntCounter::new(name, help)?)
    }

    /// A counter for each value of `label`.
    ///
    /// # Errors
    /// As for [`Self::counter`].
    pub fn counters(&self, name: &str, help: &str, label: &str) -> Result<IntCounterVec> {
        self.registered(IntCounterVec::new(Opts::new(name, help), &[label])?)
    }

    /// A gauge.
    ///
    /// # Errors
    /// As for [`Self::counter`].
    pub fn gauge(&self, name: &str, help: &str) -> Result<IntGauge> {
        self.registered(IntGauge::new(name, help)?)
    }

    /// A gauge for each value of `label`.
    ///
    /// # Errors
    /// As for [`Self::counter`].
    pub fn gauges(&self, name: &str, help: &str, label: &str) -> Result<IntGaugeVec> {
        self.registered(IntGaugeVec::new(Opts::new(name, help), &[label])?)
    }
}
