//! The queue's rules through the API.

use shoal_client::types::{
    BuildRequest, ClaimRequest, FinishRequest, HaltRequest, LeaseRef, Outcome, WatchRequest,
};
use shoal_proto::state::{JobStatus, Priority, WorkerState};

use crate::harness::*;

/// Waits until a call of this route is under way.
async fn under_way(cluster: &Cluster, route: &str) {
    wait_for(&format!("{route} to wait"), async || {
        let text = cluster.metrics().await;
        let open = format!("shoal_coordinator_api_requests_open{{route=\"{route}\"}} 1");
        if text.contains(&open) { Ok(()) } else { Err(text) }
    })
    .await;
}

const WATCH: &str = "/v1/worker/jobs/{job}/watch";

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_is_told_of_a_cancel_at_once() {
    let cluster = Cluster::start_with(ONLY_BELLS).await;
    let (operator, worker) = (cluster.operator(), cluster.worker("w1"));
    operator.set_app(&app("web", "")).await.unwrap();
    let job = build(&operator, "web").await;
    let (_, lease) = claim(&worker, 5).await.unwrap();
    let request = WatchRequest { lease: lease.clone(), wait_s: 0 };
    assert!(!worker.watch_job(job.id, &request).await.unwrap().cancel);
    let forged = LeaseRef { attempt: 2, ..lease.clone() };
    let refused = worker.watch_job(job.id, &WatchRequest { lease: forged, wait_s: 0 }).await;
    assert_eq!(refusal(refused).1, "lease_lost");
    let waiting = tokio::spawn(async move {
        let request = WatchRequest { lease: request.lease, wait_s: POLL_S };
        (woken(worker.watch_job(job.id, &request)).await.unwrap(), worker)
    });
    under_way(&cluster, WATCH).await;
    // Another job's cancel is not this one's.
    let other = build(&operator, "web").await;
    operator.cancel_job(other.id).await.unwrap();
    let cancelled = operator.cancel_job(job.id).await.unwrap();
    assert!(cancelled.cancel_requested && cancelled.status == JobStatus::Running);
    let (told, worker) = waiting.await.unwrap();
    assert!(told.cancel);
    // It was faster, and is cancelled all the same.
    let cut = cut(1, 1);
    store(&cluster.path("main"), &cut).await;
    let ended = worker.finish(job.id, &succeeded(&lease, &cut)).await.unwrap();
    assert_eq!((ended.status, ended.artifact), (JobStatus::Cancelled, None));
}

#[tokio::test(flavor = "multi_thread")]
async fn builds_of_one_commit_are_joined_and_urgent_ones_go_first() {
    let cluster = Cluster::start_with("loss_window_s = 60").await;
    let (operator, worker) = (cluster.operator(), cluster.worker("w1"));
    operator.set_app(&app("web", "")).await.unwrap();
    let first = build(&operator, "web").await;
    assert_eq!((first.joined, first.priority), (Some(false), Priority::Normal));
    let second = build(&operator, "web").await;
    let request = BuildRequest {
        priority: Priority::Urgent,
        ..BuildRequest::new(second.app.clone(), second.commit.clone())
    };
    let joined = operator.build(&request).await.unwrap();
    assert_eq!((joined.id, joined.joined), (second.id, Some(true)));
    assert_eq!(joined.priority, Priority::Urgent);
    assert_eq!(operator.job(second.id).await.unwrap().joined, None);
    for id in [second.id, first.id] {
        assert_eq!(claim(&worker, 5).await.unwrap().0.job.id, id);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_queue_gives_nothing_and_resuming_wakes_workers() {
    let mut cluster = Cluster::start_with(ONLY_BELLS).await;
    cluster.operator().set_app(&app("web", "")).await.unwrap();
    let reason = Some("  the mirror is down ".into());
    let paused = cluster.operator().pause_queue(&HaltRequest { reason }).await.unwrap();
    assert_eq!(paused.paused.unwrap().reason.as_deref(), Some("the mirror is down"));
    let job = build(&cluster.operator(), "web").await;
    cluster.stop().await;
    cluster.run().await;
    let worker = cluster.worker("w1");
    assert!(claim(&worker, 0).await.is_none());
    let status = cluster.operator().queue().await.unwrap();
    assert_eq!(status.paused.unwrap().by, "alice");
    assert_eq!(status.waiting[&Priority::Normal].jobs, 1);
    assert_eq!(status.workers[&WorkerState::Idle], 1);
    let waiting = tokio::spawn(async move { woken(claim(&worker, POLL_S)).await });
    under_way(&cluster, "/v1/worker/claim").await;
    wait_for("the gauges", async || {
        let text = cluster.metrics().await;
        let all = [
            "shoal_coordinator_queue_paused 1",
            "shoal_coordinator_jobs_waiting{priority=\"normal\"} 1",
            "shoal_coordinator_jobs_waiting{priority=\"urgent\"} 0",
            "shoal_coordinator_oldest_wait_seconds{priority=\"normal\"}",
            "shoal_coordinator_workers{state=\"IDLE\"} 1",
        ];
        if all.iter().all(|line| text.contains(line)) { Ok(()) } else { Err(text) }
    })
    .await;
    let resumed = cluster.operator().resume_queue().await.unwrap();
    assert!(resumed.paused.is_none());
    assert_eq!(waiting.await.unwrap().unwrap().0.job.id, job.id);
    let status = cluster.operator().queue().await.unwrap();
    assert_eq!((status.running, status.workers[&WorkerState::Busy]), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_worker_finishes_what_it_has() {
    let cluster = Cluster::start_with("loss_window_s = 60").await;
    let (operator, worker) = (cluster.operator(), cluster.worker("w1"));
    operator.set_app(&app("web", "")).await.unwrap();
    let job = build(&operator, "web").await;
    let (_, lease) = claim(&worker, 5).await.unwrap();
    build(&operator, "web").await;
    let w1 = "w1".parse().unwrap();
    let reason = HaltRequest { reason: Some("new kernel".into()) };
    let draining = operator.drain_worker(&w1, &reason).await.unwrap();
    assert_eq!((draining.state, draining.jobs), (WorkerState::Draining, vec![job.id]));
    assert_eq!(draining.drain.unwrap().reason.as_deref(), Some("new kernel"));
    assert!(!worker.heartbeat(job.id, &lease).await.unwrap().cancel);
    let outcome = Outcome::Failed { reason: "exit 1".into(), retry: false };
    worker.finish(job.id, &FinishRequest { lease, outcome }).await.unwrap();
    assert!(claim(&worker, 0).await.is_none());
    assert_eq!(operator.workers().await.unwrap()[0].state, WorkerState::Drained);
    // Another one is not concerned.
    assert!(claim(&cluster.worker("w2"), 5).await.is_some());
    build(&operator, "web").await;
    let back = operator.undrain_worker(&w1).await.unwrap();
    assert_eq!((back.state, back.drain.is_none()), (WorkerState::Idle, true));
    assert!(claim(&worker, 5).await.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_worker_is_another_process() {
    let cluster = Cluster::start_with("loss_window_s = 600").await;
    let (operator, worker) = (cluster.operator(), cluster.worker("w1"));
    operator.set_app(&app("web", "")).await.unwrap();
    let job = build(&operator, "web").await;
    let (_, lease) = claim_as(&worker, "old", 5).await.unwrap();
    let (again, _) = claim_as(&worker, "new", 5).await.unwrap();
    assert_eq!((again.job.id, again.job.attempt), (job.id, 2));
    assert_eq!(refusal(worker.heartbeat(job.id, &lease).await).1, "lease_lost");
    let request = ClaimRequest { incarnation: "old".into(), host: "there".into(), wait_s: 0 };
    let refused = refusal(worker.claim(&request).await);
    assert!(refused.0 == 409 && refused.2.contains("certificate"), "{refused:?}");
    let seen = operator.job(job.id).await.unwrap();
    assert_eq!(seen.attempts[0].outcome.as_deref(), Some("lost"));
    assert_eq!(seen.attempts[0].reason.as_deref(), Some("worker w1 was restarted"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_third_attempt_waits_and_an_app_says_how_many_there_are() {
    let more = "loss_window_s = 60\nbackoff_s = 0.5\nmax_attempts = 9";
    let cluster = Cluster::start_with(more).await;
    let (operator, worker) = (cluster.operator(), cluster.worker("w1"));
    let web = shoal_client::types::App { max_attempts: Some(3), ..app("web", "") };
    operator.set_app(&web).await.unwrap();
    let job = build(&operator, "web").await;
    assert_eq!(job.max_attempts, 3);
    let fail = async |wait_s| {
        let (claimed, lease) = claim(&worker, wait_s).await.unwrap();
        let outcome = Outcome::Failed { reason: "no network".into(), retry: true };
        let ended = worker.finish(job.id, &FinishRequest { lease, outcome }).await.unwrap();
        (claimed.job.attempt, ended)
    };
    let (_, second) = fail(0).await;
    assert_eq!((second.status, second.eligible_at_ms), (JobStatus::Queued, None));
    let (_, third) = fail(0).await;
    let until = third.eligible_at_ms.unwrap() - third.created_at_ms;
    assert!(until > 0, "{third:?}");
    let (attempt, ended) = wait_for("the third attempt", async || {
        let waits = operator.job(job.id).await.unwrap().eligible_at_ms;
        if waits.is_none() { Ok(fail(5).await) } else { Err(waits) }
    })
    .await;
    assert_eq!((attempt, ended.status), (3, JobStatus::Failed));
    assert_eq!(ended.reason.as_deref(), Some("no network, in attempt 3 of 3"));
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_workers_lose_so_many_jobs_at_a_look() {
    const JOBS: usize = 6;
    let more = "loss_window_s = 4\nreaper_interval_s = 1\nreap_jobs = 1\nreap_share = 0";
    let cluster = Cluster::start_with(more).await;
    let operator = cluster.operator();
    operator.set_app(&app("web", "")).await.unwrap();
    for at in 0..JOBS {
        build(&operator, "web").await;
        claim(&cluster.worker(&format!("w{at}")), 5).await.unwrap();
    }
    let held = format!("shoal_coordinator_lost_jobs_waiting {}", JOBS - 1);
    wait_for("the reaper to hold back", async || {
        let text = cluster.metrics().await;
        if text.contains(&held) { Ok(()) } else { Err(text) }
    })
    .await;
    let jobs = operator.jobs(None, 10).await.unwrap();
    assert!(jobs.iter().any(|job| job.status == JobStatus::Running), "all at once: {jobs:?}");
    // In the end all are, one a look.
    wait_for("all to be given on", async || {
        let jobs = operator.jobs(None, 10).await.unwrap();
        let running = jobs.iter().filter(|job| job.status == JobStatus::Running).count();
        if running == 0 { Ok(()) } else { Err(running) }
    })
    .await;
    let lost = format!("shoal_coordinator_jobs_lost_total {JOBS}");
    wait_for("none to wait", async || {
        let text = cluster.metrics().await;
        let all = [&lost, "shoal_coordinator_lost_jobs_waiting 0"];
        if all.iter().all(|line| text.contains(*line)) { Ok(()) } else { Err(text) }
    })
    .await;
}
