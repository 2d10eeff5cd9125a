//! The driver of rollouts: counts machines, and ends each rollout by the rules of `shoal-rollout`.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use shoal_proto::{
    RegionName,
    goal::Selector,
    state::{MachineState, RolloutStatus},
};
use shoal_queue::{Bell, Progress, QueueError, Rollout, Targets};
use shoal_rollout::{Counts, outcome, settled};
use tokio_util::sync::CancellationToken;

use crate::{
    state::{Shared, myself, now_ms, seconds},
    view,
};

/// However fast reports come, this lies between two looks at least.
const REST_MIN: Duration = Duration::from_millis(100);

/// After a look it rests for this many times as long: counting a large fleet never takes over the process.
const REST_FACTOR: u32 = 4;

impl Shared {
    /// The regions that are out of service.
    pub(crate) async fn drained(&self) -> Result<BTreeSet<RegionName>, QueueError> {
        let regions = self.queue.regions().await?;
        Ok(regions
            .into_iter()
            .filter(|region| region.drain.is_some())
            .map(|region| region.name)
            .collect())
    }
}

/// Drives all rollouts until it is stopped.
pub(crate) async fn run(shared: Arc<Shared>, stop: CancellationToken) {
    let interval = seconds(shared.config.rollout_interval_s);
    loop {
        let start = Instant::now();
        if let Err(error) = look(&shared).await {
            tracing::warn!(%error, "cannot look at the rollouts");
            shared.metrics.task_failures.with_label_values(&["rollout"]).inc();
        }
        let rest = REST_MIN.max(start.elapsed() * REST_FACTOR);
        tokio::select! {
            () = async {
                tokio::time::sleep(rest).await;
                shared.rollouts_moved.notified().await;
            } => {}
            () = tokio::time::sleep(interval.max(rest)) => {}
            () = stop.cancelled() => return,
        }
    }
}

async fn look(shared: &Shared) -> Result<(), QueueError> {
    shared.registry.refresh(&shared.queue).await?;
    let open = shared.queue.open_rollouts().await?;
    if open.is_empty() {
        return Ok(());
    }
    let drained = shared.drained().await?;
    let began = Instant::now();
    let mut progress = shared.queue.progress_of_open().await?;
    for rollout in open {
        let progress = progress.remove(&rollout.id).unwrap_or_default();
        shared.counted.note(&rollout, &progress, began);
        drive(shared, rollout, progress, &drained).await?;
    }
    Ok(())
}

fn cut(count: u64) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// The machines of all regions in service by what each region has reported; the silent ones wait.
fn counts(targets: &Targets, progress: &Progress, drained: &BTreeSet<RegionName>) -> Counts {
    let names: BTreeSet<_> = targets.keys().chain(progress.keys()).collect();
    let region = |name: &RegionName| {
        let mut counts = Counts::default();
        let mut reported = 0;
        for (state, count) in progress.get(name).iter().flat_map(|region| &region.states) {
            reported += count;
            counts.active += if state.is_success() { cut(*count) } else { 0 };
            counts.failed += if state.is_failure() { cut(*count) } else { 0 };
        }
        counts.machines = cut(targets.get(name).copied().unwrap_or_default().max(reported));
        counts
    };
    names.into_iter().filter(|name| !drained.contains(*name)).map(region).sum()
}

/// The same machine by machine: those that match now, and those that have reported.
async fn exact(
    shared: &Shared,
    rollout: &Rollout,
    selector: &Selector,
    drained: &BTreeSet<RegionName>,
) -> Result<Counts, QueueError> {
    let matching = shared.registry.matching(selector, drained).await;
    let states = shared.queue.states(&rollout.app, rollout.revision).await?;
    let mut silent = matching;
    let mut of_reported = Vec::with_capacity(states.len());
    for (machine, region, state) in states {
        silent.remove(&machine);
        if !drained.contains(&region) {
            of_reported.push(state);
        }
    }
    let of_silent = silent.into_values().map(|_| MachineState::Waiting);
    Ok(Counts::of(of_reported.into_iter().chain(of_silent)))
}

async fn drive(
    shared: &Shared,
    rollout: Rollout,
    progress: Progress,
    drained: &BTreeSet<RegionName>,
) -> Result<(), QueueError> {
    let selector: Selector = rollout.selector.parse().map_err(QueueError::Corrupt)?;
    let targets = shared.registry.targets(&selector).await;
    if targets != rollout.targets {
        shared.queue.set_targets(rollout.id, &targets).await?;
    }
    let elapsed = rollout.elapsed_s(now_ms());
    let rough = counts(&targets, &progress, drained);
    let none = rough.machines == 0;
    let ends = |counts: &Counts| match outcome(&rollout.plan, counts, elapsed) {
        status if status.is_terminal() => Some(status),
        _ => None,
    };
    if none {
        let waited_ms = now_ms() - rollout.created_at_ms;
        if waited_ms as f64 >= shared.config.no_machine_grace_s * 1_000.0 {
            let reason = match rollout.selector.as_str() {
                "" => "no machine is known: nothing to do".to_string(),
                selector => format!("no machine matches the selector '{selector}': nothing to do"),
            };
            return end(shared, &rollout, RolloutStatus::Succeeded, &reason, &progress).await;
        }
        return Ok(());
    }
    if ends(&rough).is_none() {
        return Ok(());
    }
    // The end is decided on machines, not on sums of sums: a machine whose labels changed counts once.
    let counts = exact(shared, &rollout, &selector, drained).await?;
    let Some(status) = ends(&counts) else { return Ok(()) };
    let late = elapsed >= u64::from(rollout.plan.deadline_s);
    let reason = reason(&rollout, &counts, status, late);
    let mut summary = progress;
    for (region, machines) in &targets {
        let region = summary.entry(region.clone()).or_default();
        region.states = view::settle(&rollout, &region.states, *machines, elapsed);
    }
    end(shared, &rollout, status, &reason, &summary).await
}

fn reason(rollout: &Rollout, counts: &Counts, status: RolloutStatus, late: bool) -> String {
    let Counts { machines, active, failed } = *counts;
    let silent = counts.pending();
    let unreachable = match (late, silent) {
        (true, 1..) => format!(
            ", {silent} had not ended by the deadline of {} s ({})",
            rollout.plan.deadline_s,
            settled(&rollout.plan, MachineState::Waiting, u64::MAX)
        ),
        _ => String::new(),
    };
    let failures = if failed > 0 { format!(", {failed} failed") } else { String::new() };
    let limit = match status {
        RolloutStatus::Failed => format!("; at most {} may fail", counts.failed_max(&rollout.plan)),
        _ => String::new(),
    };
    format!("{active} of {machines} machines are ACTIVE{failures}{unreachable}{limit}")
}

async fn end(
    shared: &Shared,
    rollout: &Rollout,
    status: RolloutStatus,
    reason: &str,
    summary: &Progress,
) -> Result<(), QueueError> {
    let (queue, now) = (&shared.queue, now_ms());
    let (_, ended) = queue.end_rollout(rollout.id, status, reason, summary, &myself(), now).await?;
    if ended {
        shared.metrics.rollouts_ended.with_label_values(&[status.as_str()]).inc();
        shared.ring(Bell::Goals);
        tracing::info!(rollout = rollout.id, app = %rollout.app, %status, reason, "rollout ended");
    }
    Ok(())
}
