//! From the database's records to the API's.

use std::collections::BTreeMap;

use shoal_client::types;
use shoal_proto::{
    RegionName,
    state::{JobStatus, MachineState, ReplicationStatus, RolloutStatus, WorkerState},
};
use shoal_queue as queue;

use crate::state::{Shared, WORKER_GONE, ms, now_ms};

pub(crate) fn job(job: queue::Job, attempts: Vec<queue::Attempt>) -> types::Job {
    let attempts = attempts.into_iter().map(|attempt| types::Attempt {
        attempt: attempt.attempt,
        worker: attempt.worker,
        host: attempt.host,
        incarnation: attempt.incarnation,
        started_at_ms: attempt.started_at_ms,
        finished_at_ms: attempt.finished_at_ms,
        outcome: attempt.outcome,
        reason: attempt.reason,
        log_at: attempt.log_at,
    });
    types::Job {
        id: job.id,
        app: job.app,
        commit: job.commit,
        name: job.name,
        status: job.status,
        attempt: job.attempt,
        max_attempts: job.max_attempts,
        priority: job.priority,
        created_at_ms: job.created_at_ms,
        eligible_at_ms: (job.status == JobStatus::Queued && job.deferred)
            .then_some(job.eligible_at_ms),
        started_at_ms: job.started_at_ms,
        finished_at_ms: job.finished_at_ms,
        worker: job.worker,
        reason: job.reason,
        artifact: job.artifact,
        cancel_requested: job.cancel_requested,
        requested_by: job.requested_by,
        joined: None,
        attempts: attempts.collect(),
    }
}

/// What a worker does at `now_ms`.
fn worker_state(worker: &queue::Worker, now_ms: i64) -> WorkerState {
    match (&worker.drain, worker.jobs.is_empty()) {
        (Some(_), false) => WorkerState::Draining,
        (None, false) => WorkerState::Busy,
        // One that works is heard of by its jobs, and the reaper judges those.
        (_, true) if now_ms - worker.last_seen_ms > ms(WORKER_GONE) => WorkerState::Gone,
        (Some(_), true) => WorkerState::Drained,
        (None, true) => WorkerState::Idle,
    }
}

pub(crate) fn worker(worker: queue::Worker) -> types::Worker {
    types::Worker {
        state: worker_state(&worker, now_ms()),
        name: worker.name,
        host: worker.host,
        incarnation: worker.incarnation,
        started_at_ms: worker.started_at_ms,
        last_seen_at_ms: worker.last_seen_ms,
        jobs: worker.jobs,
        drain: worker.drain.map(halt),
    }
}

pub(crate) fn halt(drain: queue::Drain) -> types::Halt {
    types::Halt { reason: drain.reason, by: drain.by, at_ms: drain.at_ms }
}

/// The queue as it is now.
pub(crate) async fn queue_status(shared: &Shared) -> queue::Result<types::QueueStatus> {
    let paused = shared.queue.paused().await?;
    let depth = shared.queue.depth().await?;
    let now_ms = now_ms();
    let waiting = depth.waiting.into_iter().map(|waiting| {
        let oldest_wait_s = (now_ms - waiting.since_ms).max(0) as f64 / 1_000.0;
        (waiting.priority, types::Waiting { jobs: waiting.jobs, oldest_wait_s })
    });
    let mut workers = BTreeMap::new();
    for worker in shared.queue.workers().await? {
        *workers.entry(worker_state(&worker, now_ms)).or_default() += 1;
    }
    Ok(types::QueueStatus {
        paused: paused.map(|pause| types::Halt {
            reason: pause.reason,
            by: pause.by,
            at_ms: pause.at_ms,
        }),
        waiting: waiting.collect(),
        deferred: depth.deferred,
        running: depth.running,
        workers,
    })
}

/// In how many seconds `bytes_left` come at a rate; none when nothing comes or nothing is left.
pub(crate) fn eta_s(bytes_left: u64, bytes_per_s: u64) -> Option<f64> {
    (bytes_left > 0 && bytes_per_s > 0).then(|| bytes_left as f64 / bytes_per_s as f64)
}

pub(crate) fn artifact(artifact: queue::Artifact, regions: &[queue::Region]) -> types::Artifact {
    let standing = artifact.standing(regions);
    let encoded_bytes = artifact.stored.encoded_bytes;
    let copies = artifact.copies.into_iter().map(|(region, copy)| {
        let bytes_left = encoded_bytes.saturating_sub(copy.bytes_done);
        let copying = copy.status == ReplicationStatus::Copying;
        let copy = types::Replication {
            status: copy.status,
            bytes_done: copy.bytes_done,
            bytes_per_s: copy.bytes_per_s,
            eta_s: eta_s(bytes_left, copy.bytes_per_s).filter(|_| copying),
            started_at_ms: copy.started_at_ms,
            finished_at_ms: copy.finished_at_ms,
            reason: copy.reason,
            damaged_at_ms: copy.damaged_at_ms,
            checked_at_ms: copy.checked_at_ms,
        };
        (region, copy)
    });
    types::Artifact {
        name: artifact.name,
        app: artifact.app,
        artifact: artifact.stored.artifact,
        encoding: artifact.stored.encoding,
        size_bytes: artifact.stored.size_bytes,
        encoded_bytes: artifact.stored.encoded_bytes,
        piece_size_bytes: artifact.stored.piece_size_bytes,
        pieces: artifact.stored.pieces,
        job: artifact.origin.job,
        commit: artifact.origin.commit,
        created_at_ms: artifact.created_at_ms,
        replication: copies.collect(),
        replication_status: standing.status,
        deployable: standing.reason.is_none(),
        not_deployable_reason: standing.reason,
        main_damage: artifact.main_damage,
        deleted: artifact.deleted.map(|deleted| types::Deletion {
            at_ms: deleted.at_ms,
            by: deleted.by,
            why: deleted.why,
        }),
    }
}

/// Settles what a region's machines that have not ended count as, `elapsed_s` after the start.
pub(crate) fn settle(
    rollout: &queue::Rollout,
    states: &BTreeMap<MachineState, u64>,
    machines: u64,
    elapsed_s: u64,
) -> BTreeMap<MachineState, u64> {
    let mut settled = BTreeMap::new();
    let reported: u64 = states.values().sum();
    let silent = machines.saturating_sub(reported);
    let all = states.iter().map(|(state, count)| (*state, *count));
    for (state, count) in all.chain([(MachineState::Waiting, silent)]) {
        if count > 0 {
            let state = shoal_rollout::settled(&rollout.plan, state, elapsed_s);
            *settled.entry(state).or_default() += count;
        }
    }
    settled
}

/// A rollout with how it is in each region.
pub(crate) fn rollout(rollout: queue::Rollout, progress: &queue::Progress) -> types::Rollout {
    // Who had not ended when the deadline ended the rollout is unreachable, until it reports after all.
    let elapsed_s = match (rollout.status, rollout.finished_at_ms) {
        (RolloutStatus::Succeeded | RolloutStatus::Failed, Some(end_ms)) => {
            rollout.elapsed_s(end_ms)
        }
        _ => 0,
    };
    let mut names: Vec<&RegionName> = rollout.targets.keys().chain(progress.keys()).collect();
    names.sort();
    names.dedup();
    let none = queue::RegionProgress::default();
    let regions = names.into_iter().map(|name| {
        let known = progress.get(name).unwrap_or(&none);
        let reported: u64 = known.states.values().sum();
        let machines = rollout.targets.get(name).copied().unwrap_or_default().max(reported);
        let copies = match rollout.encoded_bytes {
            0 => 0.0,
            encoded => known.origin_bytes as f64 / encoded as f64,
        };
        let region = types::RolloutRegion {
            machines,
            states: settle(&rollout, &known.states, machines, elapsed_s),
            pieces: known.pieces,
            pieces_total: known.pieces_total,
            origin_bytes: known.origin_bytes,
            origin_copies: copies,
            peer_bytes: known.peer_bytes,
            first_active_at_ms: known.first_active_ms,
            last_active_at_ms: known.last_active_ms,
            open_permille: known.open_permille,
        };
        (name.clone(), region)
    });
    types::Rollout {
        id: rollout.id,
        app: rollout.app.clone(),
        revision: rollout.revision,
        artifact: rollout.artifact,
        artifact_name: rollout.artifact_name.clone(),
        status: rollout.status,
        reason: rollout.reason.clone(),
        rollback: rollout.rollback,
        created_at_ms: rollout.created_at_ms,
        finished_at_ms: rollout.finished_at_ms,
        requested_by: rollout.requested_by.clone(),
        regions: regions.collect(),
    }
}

pub(crate) fn machine(machine: queue::Machine) -> types::Machine {
    let apps = machine.apps.into_iter();
    types::Machine {
        name: machine.seen.name,
        region: machine.region,
        zone: machine.seen.zone,
        labels: machine.seen.labels,
        version: machine.seen.version,
        address: machine.seen.address,
        last_seen_at_ms: machine.seen.last_seen_ms,
        apps: apps.map(|(report, state_at_ms)| types::MachineApp { report, state_at_ms }).collect(),
    }
}

pub(crate) fn region(region: queue::Region) -> types::Region {
    types::Region {
        name: region.name,
        drained: region.drain.is_some(),
        drain: region.drain.map(halt),
        processes: region.processes,
        machines: region.machines,
    }
}
