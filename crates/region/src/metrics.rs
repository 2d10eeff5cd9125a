//! What a region process's metrics page shows.

use prometheus::{IntCounter, IntCounterVec, IntGauge, Registry};
use shoal_process::Meters;

/// The metrics; the names are documented in the README.
pub(crate) struct Metrics {
    pub(crate) registry: Registry,
    /// Requests of machines, by `kind`.
    pub(crate) requests: IntCounterVec,
    /// Polls that were answered "unchanged".
    pub(crate) unchanged: IntCounter,
    /// Pieces leased, repeats counted.
    pub(crate) leased: IntCounter,
    /// URLs signed for leases.
    pub(crate) signed: IntCounter,
    /// Goals that arrived, by `result` (`taken`, `old`, `refused`, `not_kept`).
    pub(crate) goals: IntCounterVec,
    /// Times that a goal store failed, by `store` (`goals`, `region_goals`).
    pub(crate) store_failures: IntCounterVec,
    /// Machines known.
    pub(crate) machines: IntGauge,
    /// Machines with news that the coordinator has not been told.
    pub(crate) backlog: IntGauge,
    /// Batches that the coordinator did not take.
    pub(crate) failed_batches: IntCounter,
}

impl Metrics {
    pub(crate) fn new() -> prometheus::Result<Self> {
        let meters = Meters::default();
        Ok(Self {
            requests: meters.counters(
                "shoal_region_requests_total",
                "Requests of machines.",
                "kind",
            )?,
            unchanged: meters
                .counter("shoal_region_polls_unchanged_total", "Polls without news.")?,
            leased: meters
                .counter("shoal_region_leased_pieces_total", "Pieces leased, repeats counted.")?,
            signed: meters
                .counter("shoal_region_signed_urls_total", "URLs signed for leased pieces.")?,
            goals: meters.counters(
                "shoal_region_goals_total",
                "Goals that arrived, by what became of them.",
                "result",
            )?,
            store_failures: meters.counters(
                "shoal_region_goal_store_failures_total",
                "Times that a goal store failed; it is tried again.",
                "store",
            )?,
            machines: meters.gauge("shoal_region_machines", "Machines known.")?,
            backlog: meters.gauge(
                "shoal_region_report_backlog_machines",
                "Machines with news that the coordinator has not been told.",
            )?,
            failed_batches: meters.counter(
                "shoal_region_failed_batches_total",
                "Batches of reports that the coordinator did not take.",
            )?,
            registry: meters.registry,
        })
    }
}
