//! What a coordinator counts.

use prometheus::{
    HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};
use shoal_proto::state::{JobStatus, ReplicationStatus, RolloutStatus};

use crate::state::{Shared, now_ms};

/// The coordinator's metrics; all names begin with `shoal_coordinator_`.
pub(crate) struct Metrics {
    pub(crate) registry: Registry,
    /// Calls answered, by route and status.
    pub(crate) requests: IntCounterVec,
    /// Calls under way, by route.
    pub(crate) requests_open: IntGaugeVec,
    /// How long they took.
    pub(crate) request_seconds: HistogramVec,
    /// Jobs that came into a state.
    pub(crate) job_transitions: IntCounterVec,
    /// Bytes written into regional buckets.
    pub(crate) replication_bytes: IntCounterVec,
    /// Copies that ended, by region and result.
    pub(crate) copies_ended: IntCounterVec,
    /// Goals set.
    pub(crate) goals: IntCounterVec,
    /// Rollouts ended by the driver or by an operator.
    pub(crate) rollouts_ended: IntCounterVec,
    /// Machine reports that arrived, by region and whether they were new.
    pub(crate) reports: IntCounterVec,
    /// Times that a background task failed and tries again.
    pub(crate) task_failures: IntCounterVec,
    jobs: IntGaugeVec,
    oldest_queued_seconds: IntGauge,
    copies: IntGaugeVec,
    rollouts: IntGaugeVec,
    machines: IntGauge,
    /// Whether this coordinator runs the periodic tasks.
    pub(crate) on_duty: IntGauge,
    /// Database calls of the gauges that failed.
    gauge_failures: IntCounter,
}

/// Upper bounds in seconds: a database commit to a long poll.
const SECONDS_BUCKETS: &[f64] = &[0.001, 0.005, 0.02, 0.1, 0.5, 1.0, 2.5, 6.0, 30.0];

impl Metrics {
    pub(crate) fn new() -> prometheus::Result<Self> {
        let registry = Registry::new_custom(Some("shoal_coordinator".into()), None)?;
        let counters = |name: &str, help: &str, labels: &[&str]| {
            let metric = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(metric.clone()))?;
            Ok::<_, prometheus::Error>(metric)
        };
        let gauges = |name: &str, help: &str, labels: &[&str]| {
            let metric = IntGaugeVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(metric.clone()))?;
            Ok::<_, prometheus::Error>(metric)
        };
        let gauge = |name: &str, help: &str| {
            let metric = IntGauge::new(name, help)?;
            registry.register(Box::new(metric.clone()))?;
            Ok::<_, prometheus::Error>(metric)
        };
        let seconds =
            HistogramOpts::new("api_request_seconds", "How long calls took, long polls included")
                .buckets(SECONDS_BUCKETS.to_vec());
        let request_seconds = HistogramVec::new(seconds, &["route"])?;
        registry.register(Box::new(request_seconds.clone()))?;
        let gauge_failures = IntCounter::new(
            "gauge_failures_total",
            "Times that the database could not be asked for the gauges",
        )?;
        registry.register(Box::new(gauge_failures.clone()))?;
        Ok(Self {
            requests: counters("api_requests_total", "Calls answered", &["route", "status"])?,
            requests_open: gauges("api_requests_open", "Calls under way", &["route"])?,
            request_seconds,
            job_transitions: counters(
                "job_transitions_total",
                "Jobs that came into a state, through this coordinator",
                &["to"],
            )?,
            replication_bytes: counters(
                "replication_bytes_total",
                "Bytes written into regional buckets",
                &["region"],
            )?,
            copies_ended: counters(
                "copies_ended_total",
                "Copies into regional buckets that ended",
                &["region", "result"],
            )?,
            goals: counters("goals_set_total", "Goals set", &["kind"])?,
            rollouts_ended: counters("rollouts_ended_total", "Rollouts ended", &["status"])?,
            reports: counters(
                "reports_total",
                "Machine reports that arrived; stale ones replaced nothing",
                &["region", "result"],
            )?,
            task_failures: counters(
                "task_failures_total",
                "Times that a background task failed; it tries again",
                &["task"],
            )?,
            jobs: gauges("jobs", "Jobs by state", &["status"])?,
            oldest_queued_seconds: gauge(
                "oldest_queued_seconds",
                "How long the oldest queued job has waited",
            )?,
            copies: gauges("copies", "Copies in regional buckets by state", &["status"])?,
            rollouts: gauges("rollouts", "Rollouts by state", &["status"])?,
            machines: gauge("machines", "Machines known")?,
            on_duty: gauge("on_duty", "1 where the periodic tasks run, else 0")?,
            gauge_failures,
            registry,
        })
    }
}

/// Brings the gauges up to date from the database.
pub(crate) async fn refresh(shared: &Shared) {
    let metrics = &shared.metrics;
    let all = async {
        let depth = shared.queue.depth().await?;
        let copies = shared.queue.copies_by_status().await?;
        let rollouts = shared.queue.rollouts_by_status().await?;
        let machines = shared.registry.refresh(&shared.queue).await?;
        Ok::<_, shoal_queue::QueueError>((depth, copies, rollouts, machines))
    };
    let Ok((depth, copies, rollouts, machines)) = all.await else {
        metrics.gauge_failures.inc();
        return;
    };
    fn set<S: Copy + PartialEq>(
        gauges: &IntGaugeVec,
        all: &[S],
        name: fn(S) -> &'static str,
        counts: &[(S, u64)],
    ) {
        for state in all {
            let count = counts.iter().find(|(of, _)| of == state).map_or(0, |(_, count)| *count);
            let count = i64::try_from(count).unwrap_or(i64::MAX);
            gauges.with_label_values(&[name(*state)]).set(count);
        }
    }
    set(&metrics.jobs, JobStatus::ALL, JobStatus::as_str, &depth.by_status);
    set(&metrics.copies, ReplicationStatus::ALL, ReplicationStatus::as_str, &copies);
    set(&metrics.rollouts, RolloutStatus::ALL, RolloutStatus::as_str, &rollouts);
    let waited = depth.oldest_queued_ms.map_or(0, |since| (now_ms() - since).max(0) / 1_000);
    metrics.oldest_queued_seconds.set(waited);
    metrics.machines.set(i64::try_from(machines).unwrap_or(i64::MAX));
}
