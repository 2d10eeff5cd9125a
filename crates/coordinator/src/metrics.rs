//! What a coordinator counts.

use prometheus::{
    HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};
use shoal_proto::state::{Priority, ReplicationStatus, RolloutStatus, WorkerState};
use shoal_queue::OutboxDepth;

use crate::{
    state::{Shared, now_ms},
    view,
};

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
    /// Copies looked at by inspections, by bucket and what was found.
    pub(crate) inspections: IntCounterVec,
    /// Bytes that inspections read and proved, by bucket.
    pub(crate) inspected_bytes: IntCounterVec,
    /// Damages that were repaired, by where.
    pub(crate) repairs: IntCounterVec,
    damaged: IntGaugeVec,
    oldest_inspection_seconds: IntGauge,
    /// Artifacts that were deleted.
    pub(crate) deleted_artifacts: IntCounter,
    /// Runs that removed objects, by whether all buckets were reached.
    pub(crate) removals: IntCounterVec,
    removals_open: IntGauge,
    /// Goals set.
    pub(crate) goals: IntCounterVec,
    /// Goals that the goal store was told, by result.
    pub(crate) goal_store_writes: IntCounterVec,
    /// Goals of the goal store that are newer than the database's.
    pub(crate) goals_ahead: IntGauge,
    goal_outbox: IntGauge,
    goal_outbox_oldest_seconds: IntGauge,
    /// Rollouts ended by the driver or by an operator.
    pub(crate) rollouts_ended: IntCounterVec,
    /// Machine reports that arrived, by region and whether they were new.
    pub(crate) reports: IntCounterVec,
    /// Times that a background task failed and tries again.
    pub(crate) task_failures: IntCounterVec,
    /// Events that were given numbers.
    pub(crate) events: IntCounter,
    /// Streams whose readers were too slow.
    pub(crate) streams_dropped: IntCounter,
    /// Attempts to tell a webhook, by what became of them.
    pub(crate) webhook_attempts: IntCounterVec,
    webhooks_waiting: IntGauge,
    webhooks_oldest_seconds: IntGauge,
    /// Pushes that came, by what became of them.
    pub(crate) pushes: IntCounterVec,
    /// Jobs that were taken from workers that were gone.
    pub(crate) jobs_lost: IntCounter,
    /// Jobs of silent workers that the reaper does not give on yet.
    pub(crate) lost_jobs_waiting: IntGauge,
    jobs_waiting: IntGaugeVec,
    oldest_wait_seconds: IntGaugeVec,
    jobs_deferred: IntGauge,
    jobs_running: IntGauge,
    queue_paused: IntGauge,
    workers: IntGaugeVec,
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
        let counter = |name: &str, help: &str| {
            let metric = IntCounter::new(name, help)?;
            registry.register(Box::new(metric.clone()))?;
            Ok::<_, prometheus::Error>(metric)
        };
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
            inspections: counters(
                "inspections_total",
                "Copies looked at, by bucket and what was found: whole, damaged, unreachable",
                &["bucket", "result"],
            )?,
            inspected_bytes: counters(
                "inspected_bytes_total",
                "Stored bytes that inspections read and proved",
                &["bucket"],
            )?,
            repairs: counters(
                "repairs_total",
                "Damaged copies that are whole again, by whether in a region or the main bucket",
                &["where"],
            )?,
            damaged: gauges(
                "damaged",
                "Copies in regions, or encodings in the main bucket, that are damaged now",
                &["where"],
            )?,
            oldest_inspection_seconds: gauge(
                "oldest_inspection_seconds",
                "How long ago the artifact was inspected whose turn it is",
            )?,
            deleted_artifacts: counter(
                "deleted_artifacts_total",
                "Artifacts that were deleted, through this coordinator",
            )?,
            removals: counters(
                "removals_total",
                "Runs that removed a deleted encoding's objects: gone everywhere, or later in some bucket",
                &["result"],
            )?,
            removals_open: gauge(
                "removals_open",
                "Deleted encodings of which some bucket still has objects",
            )?,
            goals: counters("goals_set_total", "Goals set", &["kind"])?,
            goal_store_writes: counters(
                "goal_store_writes_total",
                "Goals that the goal store was told, where that runs, by what became of them",
                &["result"],
            )?,
            goals_ahead: gauge(
                "goal_store_ahead",
                "Goals of the goal store that are newer than the database's: restored from a backup, and not recovered",
            )?,
            goal_outbox: gauge("goal_outbox", "Goals that the goal store has not been told yet")?,
            goal_outbox_oldest_seconds: gauge(
                "goal_outbox_oldest_seconds",
                "How long one of them has waited",
            )?,
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
            events: counter("events_total", "Events that were given numbers, where that runs")?,
            streams_dropped: counter(
                "event_streams_dropped_total",
                "Streams of events whose readers were too slow",
            )?,
            webhook_attempts: counters(
                "webhook_attempts_total",
                "Attempts to tell a webhook, where that runs, by what became of them",
                &["result"],
            )?,
            webhooks_waiting: gauge(
                "webhook_messages",
                "Messages that webhooks have not taken yet",
            )?,
            webhooks_oldest_seconds: gauge(
                "webhook_messages_oldest_seconds",
                "How long one of them has waited",
            )?,
            pushes: counters(
                "pushes_total",
                "Pushes to main branches, by what became of them",
                &["result"],
            )?,
            jobs_lost: counter(
                "jobs_lost_total",
                "Jobs that were taken from workers that were gone, through this coordinator",
            )?,
            lost_jobs_waiting: gauge(
                "lost_jobs_waiting",
                "Jobs of silent workers that the reaper does not give on yet, where it runs",
            )?,
            jobs_waiting: gauges("jobs_waiting", "Jobs that a worker could take", &["priority"])?,
            oldest_wait_seconds: gauges(
                "oldest_wait_seconds",
                "How long one of them has waited for a worker",
                &["priority"],
            )?,
            jobs_deferred: gauge("jobs_deferred", "Jobs that wait for their next attempt")?,
            jobs_running: gauge("jobs_running", "Jobs that run")?,
            queue_paused: gauge("queue_paused", "1 while nobody takes a job, else 0")?,
            workers: gauges("workers", "Workers by what they do", &["state"])?,
            copies: gauges("copies", "Copies in regional buckets by state", &["status"])?,
            rollouts: gauges("rollouts", "Rollouts by state", &["status"])?,
            machines: gauge("machines", "Machines known")?,
            on_duty: gauge("on_duty", "1 where the periodic tasks run, else 0")?,
            gauge_failures: counter(
                "gauge_failures_total",
                "Times that the database could not be asked for the gauges",
            )?,
            registry,
        })
    }
}

/// Brings the gauges up to date from the database.
pub(crate) async fn refresh(shared: &Shared) {
    let metrics = &shared.metrics;
    let all = async {
        let queue = view::queue_status(shared).await?;
        let copies = shared.queue.copies_by_status().await?;
        let rollouts = shared.queue.rollouts_by_status().await?;
        let machines = shared.registry.refresh(&shared.queue).await?;
        // Without a goal store nobody empties it.
        let outbox = match &shared.goal_store {
            Some(_) => shared.queue.outbox_depth().await?,
            None => OutboxDepth::default(),
        };
        let webhooks = shared.queue.deliveries_waiting().await?;
        let upkeep = (
            shared.queue.damaged().await?,
            shared.queue.oldest_inspection_ms().await?,
            shared.queue.removals_open().await?,
        );
        Ok::<_, shoal_queue::QueueError>((
            queue, copies, rollouts, machines, outbox, webhooks, upkeep,
        ))
    };
    let Ok((queue, copies, rollouts, machines, outbox, webhooks, upkeep)) = all.await else {
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
    let gauge = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
    for priority in Priority::ALL {
        let waiting = queue.waiting.get(priority);
        let labels = [priority.as_str()];
        let jobs = waiting.map_or(0, |waiting| waiting.jobs);
        metrics.jobs_waiting.with_label_values(&labels).set(gauge(jobs));
        let oldest_s = waiting.map_or(0.0, |waiting| waiting.oldest_wait_s);
        metrics.oldest_wait_seconds.with_label_values(&labels).set(oldest_s as i64);
    }
    let ((main, copies_damaged), oldest, removals) = upkeep;
    metrics.damaged.with_label_values(&["main"]).set(gauge(main));
    metrics.damaged.with_label_values(&["region"]).set(gauge(copies_damaged));
    let ago_ms = oldest.map_or(0, |oldest| (now_ms() - oldest).max(0));
    metrics.oldest_inspection_seconds.set(ago_ms / 1_000);
    metrics.removals_open.set(gauge(removals));
    metrics.goal_outbox.set(gauge(outbox.goals));
    let waits_ms = outbox.oldest_since_ms.map_or(0, |since_ms| (now_ms() - since_ms).max(0));
    metrics.goal_outbox_oldest_seconds.set(waits_ms / 1_000);
    metrics.webhooks_waiting.set(gauge(webhooks.0));
    let waits_ms = webhooks.1.map_or(0, |since_ms| (now_ms() - since_ms).max(0));
    metrics.webhooks_oldest_seconds.set(waits_ms / 1_000);
    metrics.jobs_deferred.set(gauge(queue.deferred));
    metrics.jobs_running.set(gauge(queue.running));
    metrics.queue_paused.set(i64::from(queue.paused.is_some()));
    for state in WorkerState::ALL {
        let workers = queue.workers.get(state).copied().unwrap_or_default();
        metrics.workers.with_label_values(&[state.as_str()]).set(gauge(workers));
    }
    set(&metrics.copies, ReplicationStatus::ALL, ReplicationStatus::as_str, &copies);
    set(&metrics.rollouts, RolloutStatus::ALL, RolloutStatus::as_str, &rollouts);
    metrics.machines.set(i64::try_from(machines).unwrap_or(i64::MAX));
}
