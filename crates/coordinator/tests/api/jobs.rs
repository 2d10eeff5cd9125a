//! Build jobs.

use std::time::{Duration, Instant};

use shoal_client::types::{FinishRequest, LeaseRef, Outcome};
use shoal_proto::state::{JobStatus, MachineState, RolloutStatus};

use crate::harness::*;

/// Waits until a worker's long poll is under way.
async fn claim_waits(cluster: &Cluster) {
    wait_for("the claim to wait", async || {
        let text = cluster.metrics().await;
        let open = "shoal_coordinator_api_requests_open{route=\"/v1/worker/claim\"} 1";
        if text.contains(open) { Ok(()) } else { Err(text) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_lives_from_its_commit_to_active_machines() {
    let cluster = Cluster::start().await;
    let (operator, worker, eu) = (cluster.operator(), cluster.worker("w1"), cluster.region("eu"));
    operator.set_app(&app("web", "role=web")).await.unwrap();

    // The worker waits before there is anything.
    let waiting = tokio::spawn(async move { (claim(&worker, 5).await, worker) });
    let job = build(&operator, "web").await;
    assert_eq!((job.status, job.requested_by.as_str()), (JobStatus::Queued, "alice"));
    let (claimed, worker) = waiting.await.unwrap();
    let (claimed, lease) = claimed.unwrap();
    assert_eq!((claimed.job.id, claimed.job.status), (job.id, JobStatus::Running));
    assert_eq!(claimed.app, app("web", "role=web"));
    assert_eq!(claimed.heartbeat_s, 0.2);

    assert!(!worker.heartbeat(job.id, &lease).await.unwrap().cancel);
    worker.append_log(job.id, &lease, 0, "compiling\n".into()).await.unwrap();
    worker.append_log(job.id, &lease, 0, "compiling\n".into()).await.unwrap();
    worker.append_log(job.id, &lease, 10, "done\n".into()).await.unwrap();
    assert_eq!(operator.job_log(job.id, 0).await.unwrap(), "compiling\ndone\n");
    assert_eq!(operator.job_log(job.id, 10).await.unwrap(), "done\n");

    // Success is believed only when the artifact is there.
    let cut = cut(1, 3);
    let early = refusal(worker.finish(job.id, &succeeded(&lease, &cut)).await);
    assert_eq!((early.0, early.1.as_str()), (409, "not_whole"));
    assert!(early.2.contains("index"), "{}", early.2);
    store(claimed.bucket.as_ref(), &cut).await;
    let ended = worker.finish(job.id, &succeeded(&lease, &cut)).await.unwrap();
    assert_eq!((ended.status, ended.artifact), (JobStatus::Succeeded, Some(cut.artifact)));
    assert_eq!(worker.finish(job.id, &succeeded(&lease, &cut)).await.unwrap().status, ended.status);
    let seen = operator.job(job.id).await.unwrap();
    assert_eq!(seen.attempts.len(), 1);
    assert_eq!(seen.attempts[0].worker, "w1");

    let artifact = deployable(&operator, &job.name).await;
    assert_eq!(artifact.replication.len(), 2);
    assert_eq!((artifact.artifact, artifact.pieces, artifact.job), (cut.artifact, 3, Some(job.id)));
    for region in ["eu", "us"] {
        let bucket = shoal_origin::Bucket::open(cluster.path(region).to_str().unwrap()).unwrap();
        bucket.verify(&cut.artifact, &cut.encoding).await.unwrap();
    }

    report(&eu, vec![machine("m1", "web"), machine("m2", "web"), machine("m3", "db")], vec![])
        .await;
    let rollout = deploy(&operator, "web", &job.name).await.unwrap();
    assert_eq!(rollout.regions[&"eu".parse().unwrap()].machines, 2);
    let goals = eu
        .goals(&shoal_client::types::GoalsQuery { after: 0, wait_s: 5, highest_epoch: 0 })
        .await
        .unwrap();
    let bytes: Vec<u8> = (0..goals.goals[0].len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&goals.goals[0][at..at + 2], 16).unwrap())
        .collect();
    let signed = shoal_proto::codec::decode(&bytes, shoal_proto::goal::GOAL_MAX_BYTES).unwrap();
    let goal = cluster.trust.open_goal(&signed).unwrap();
    assert_eq!(
        (goal.artifact, goal.encoding, goal.revision),
        (cut.artifact, cut.encoding, rollout.revision)
    );
    assert_eq!((goal.machines_estimate, goal.selector.to_string().as_str()), (2, "role=web"));
    assert!(!goal.plan.rollback);

    let active = |name| state(name, "web", rollout.revision, MachineState::Active);
    report(&eu, vec![], vec![active("m1")]).await;
    let half = operator.rollout(rollout.id).await.unwrap();
    assert_eq!(half.status, RolloutStatus::Running, "m2 is silent");
    report(&eu, vec![], vec![active("m2")]).await;
    let done = wait_for("the rollout's end", async || {
        let rollout = operator.rollout(rollout.id).await.unwrap();
        if rollout.status == RolloutStatus::Running { Err(rollout) } else { Ok(rollout) }
    })
    .await;
    assert_eq!(done.status, RolloutStatus::Succeeded, "{done:?}");
    let region = &done.regions[&"eu".parse().unwrap()];
    assert_eq!(region.states[&MachineState::Active], 2);
    assert!(region.first_active_at_ms.is_some());
    let status = operator.status(None).await.unwrap();
    assert_eq!(status.len(), 1);
    assert_eq!(status[0].rollout.as_ref().unwrap().status, RolloutStatus::Succeeded);
    let machines = operator.machines(None, Some(&"web".parse().unwrap())).await.unwrap();
    assert_eq!(machines.len(), 2);
    assert_eq!(machines[0].apps[0].report.state, MachineState::Active);
    let regions = operator.regions().await.unwrap();
    assert_eq!(regions[0].machines, 3);
    assert!(regions[0].processes.contains_key(&"eu-p1".parse().unwrap()));

    let metrics = wait_for("the gauges", async || {
        let text = cluster.metrics().await;
        let all = [
            "shoal_coordinator_jobs_running 0",
            "shoal_coordinator_workers{state=\"IDLE\"} 1",
            "shoal_coordinator_rollouts{status=\"SUCCEEDED\"} 1",
        ];
        if all.iter().all(|line| text.contains(line)) { Ok(text) } else { Err(text) }
    })
    .await;
    for line in [
        "shoal_coordinator_job_transitions_total{to=\"RUNNING\"} 1",
        "shoal_coordinator_replication_bytes_total{region=\"us\"}",
        "shoal_coordinator_goals_set_total{kind=\"deploy\"} 1",
        "route=\"/v1/worker/jobs/{job}/finish\",status=\"409\"",
    ] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_worker_loses_its_job_to_the_next_and_at_last_for_good() {
    let cluster = Cluster::start_with("max_attempts = 2").await;
    let (operator, w1, w2) = (cluster.operator(), cluster.worker("w1"), cluster.worker("w2"));
    operator.set_app(&app("web", "")).await.unwrap();
    let job = build(&operator, "web").await;
    let (_, old) = claim(&w1, 5).await.unwrap();
    // Nothing is heard of w1: w2's long poll gets the job.
    let (again, lease) =
        wait_for("the second attempt", async || claim(&w2, 5).await.ok_or(())).await;
    assert_eq!((again.job.id, again.job.attempt), (job.id, 2));
    for refused in [
        refusal(w1.heartbeat(job.id, &old).await),
        refusal(w1.append_log(job.id, &old, 0, "late".into()).await),
        refusal(w1.finish(job.id, &succeeded(&old, &cut(1, 1))).await),
    ] {
        assert_eq!((refused.0, refused.1.as_str()), (409, "lease_lost"));
    }
    w2.heartbeat(job.id, &lease).await.unwrap();
    let ended = wait_for("the job's end", async || {
        let job = operator.job(job.id).await.unwrap();
        if job.status == JobStatus::Running { Err(job) } else { Ok(job) }
    })
    .await;
    assert_eq!(ended.status, JobStatus::Failed);
    assert!(ended.reason.unwrap().contains("worker w2 was lost"));
    assert_eq!(ended.attempts.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn heartbeats_keep_a_job() {
    let cluster = Cluster::start_with("loss_window_s = 1.5").await;
    let (operator, worker) = (cluster.operator(), cluster.worker("w1"));
    operator.set_app(&app("web", "")).await.unwrap();
    let job = build(&operator, "web").await;
    let (_, lease) = claim(&worker, 5).await.unwrap();
    // Twice the loss window.
    let until = Instant::now() + Duration::from_secs(3);
    while Instant::now() < until {
        worker.heartbeat(job.id, &lease).await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(operator.job(job.id).await.unwrap().attempt, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_are_cancelled_waiting_and_running() {
    let cluster = Cluster::start_with("loss_window_s = 60").await;
    let (operator, worker) = (cluster.operator(), cluster.worker("w1"));
    operator.set_app(&app("web", "")).await.unwrap();
    let waiting = build(&operator, "web").await;
    let cancelled = operator.cancel_job(waiting.id).await.unwrap();
    assert_eq!(cancelled.status, JobStatus::Cancelled);
    let running = build(&operator, "web").await;
    let (claimed, lease) = claim(&worker, 5).await.unwrap();
    assert_eq!(claimed.job.id, running.id, "the cancelled one is passed over");
    assert_eq!(operator.cancel_job(running.id).await.unwrap().status, JobStatus::Running);
    assert!(worker.heartbeat(running.id, &lease).await.unwrap().cancel);
    let end = FinishRequest { lease: lease.clone(), outcome: Outcome::Cancelled };
    let ended = worker.finish(running.id, &end).await.unwrap();
    assert_eq!(ended.status, JobStatus::Cancelled);
    assert_eq!(ended.reason.as_deref(), Some("cancelled by alice"));
    let failing = build(&operator, "web").await;
    let (_, lease) = claim(&worker, 5).await.unwrap();
    let outcome = Outcome::Failed { reason: "exit status 2".into(), retry: false };
    let ended = worker.finish(failing.id, &FinishRequest { lease, outcome }).await.unwrap();
    assert_eq!((ended.status, ended.reason.as_deref()), (JobStatus::Failed, Some("exit status 2")));
    let late = refusal(operator.cancel_job(failing.id).await);
    assert!(late.2.contains("FAILED"), "{}", late.2);
    assert_eq!(operator.jobs(Some(&"web".parse().unwrap()), 2).await.unwrap().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn new_and_retried_jobs_wake_waiting_workers_and_logs_follow_each_other() {
    let cluster = Cluster::start_with(ONLY_BELLS).await;
    let (operator, worker) = (cluster.operator(), cluster.worker("w1"));
    operator.set_app(&app("web", "")).await.unwrap();
    let waiting = tokio::spawn(async move { (woken(claim(&worker, POLL_S)).await, worker) });
    claim_waits(&cluster).await;
    let job = build(&operator, "web").await;
    let (claimed, worker) = waiting.await.unwrap();
    let (_, lease) = claimed.unwrap();
    worker.append_log(job.id, &lease, 0, "one\n".into()).await.unwrap();
    let next = cluster.worker("w2");
    let waiting = tokio::spawn(async move { (woken(claim(&next, POLL_S)).await, next) });
    claim_waits(&cluster).await;
    let outcome = Outcome::Failed { reason: "the network failed".into(), retry: true };
    let ended = worker.finish(job.id, &FinishRequest { lease, outcome }).await.unwrap();
    assert_eq!(ended.status, JobStatus::Queued);
    let (claimed, next) = waiting.await.unwrap();
    let (claimed, lease) = claimed.unwrap();
    assert_eq!(claimed.job.attempt, 2);
    next.append_log(job.id, &lease, 0, "two\n".into()).await.unwrap();
    assert_eq!(operator.job_log(job.id, 0).await.unwrap(), "one\ntwo\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_without_work_ends_with_nothing_and_a_stopping_coordinator_answers() {
    let mut cluster = Cluster::start_with(ONLY_BELLS).await;
    let worker = cluster.worker("w1");
    assert!(claim(&worker, 0).await.is_none());
    let waiting = tokio::spawn(async move { woken(claim(&worker, POLL_S)).await.is_none() });
    claim_waits(&cluster).await;
    cluster.stop().await;
    assert!(waiting.await.unwrap(), "nothing is told as nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_survive_a_restart() {
    let mut cluster = Cluster::start_with("loss_window_s = 60").await;
    cluster.operator().set_app(&app("web", "")).await.unwrap();
    let first = build(&cluster.operator(), "web").await;
    let second = build(&cluster.operator(), "web").await;
    let (_, lease) = claim(&cluster.worker("w1"), 5).await.unwrap();
    let log = LeaseRef::clone(&lease);
    cluster.worker("w1").append_log(first.id, &log, 0, "kept".into()).await.unwrap();
    cluster.stop().await;
    cluster.run().await;
    // The worker goes on under its lease; the other job waits as it did.
    assert!(!cluster.worker("w1").heartbeat(first.id, &lease).await.unwrap().cancel);
    assert_eq!(cluster.operator().job_log(first.id, 0).await.unwrap(), "kept");
    let (claimed, _) = claim(&cluster.worker("w2"), 5).await.unwrap();
    assert_eq!(claimed.job.id, second.id);
}
