//! The job queue.

use std::collections::BTreeSet;

use shoal_proto::state::{JobStatus, Priority, ReplicationStatus};
use shoal_queue::{Claimant, Depth, End, Lease, Queue, QueueError, Waiting, Watch};

use super::{BACKOFF, actor, app, ask, claim, name, regions, stored, submit};

fn failed(retry: bool) -> End {
    End::Failed { reason: "exit 1".into(), retry: retry.then_some(BACKOFF) }
}

fn lost<T>(result: Result<T, QueueError>) -> bool {
    matches!(result, Err(QueueError::LeaseLost { .. }))
}

/// A watch that has seen the running jobs stand still for the whole window.
async fn reap(queue: &Queue) -> Vec<Option<JobStatus>> {
    let mut watch = Watch::new(90, 1_000);
    assert!(watch.look(0, 0, &queue.running().await.unwrap()).is_empty());
    let mut ended = Vec::new();
    for lost in watch.look(90, 90, &queue.running().await.unwrap()) {
        ended.push(queue.reap(&lost, BACKOFF, 1_000).await.unwrap());
    }
    ended
}

pub(crate) async fn jobs_are_taken_in_order_and_once(url: &str) {
    let queue = Queue::open(url).await.unwrap();
    app(&queue, "web").await;
    assert!(claim(&queue, 1).await.is_none());
    // Asked for at the same millisecond: by number.
    let ids: Vec<_> = [
        submit(&queue, "web", 20).await.id,
        submit(&queue, "web", 20).await.id,
        submit(&queue, "web", 10).await.id,
    ]
    .into();
    let depth = queue.depth().await.unwrap();
    let waiting = Waiting { priority: Priority::Normal, jobs: 3, since_ms: 10 };
    assert_eq!(depth, Depth { waiting: vec![waiting], deferred: 0, running: 0 });
    let mut taken = vec![];
    while let Some((job, _)) = claim(&queue, 30).await {
        assert_eq!(job.status, JobStatus::Running);
        assert_eq!((job.attempt, job.last_heartbeat_ms), (1, Some(30)));
        taken.push(job.id);
    }
    assert_eq!(taken, [ids[2], ids[0], ids[1]]);
    let newest: Vec<_> = queue.jobs(None, 2).await.unwrap().iter().map(|job| job.id).collect();
    assert_eq!(newest, [ids[1], ids[0]]);
    let newest = queue.jobs(Some(&name("web")), 2).await.unwrap();
    assert_eq!(newest.iter().map(|job| job.id).collect::<Vec<_>>(), [ids[1], ids[0]]);
    assert!(queue.jobs(Some(&name("other")), 2).await.unwrap().is_empty());
}

pub(crate) async fn sixteen_claimants_never_share_a_job(url: &str) {
    const JOBS: usize = 100;
    let queue = Queue::open(url).await.unwrap();
    app(&queue, "web").await;
    for at in 0..JOBS {
        submit(&queue, "web", at as i64).await;
    }
    let mut tasks = tokio::task::JoinSet::new();
    for worker in 0..16 {
        let queue = queue.clone();
        tasks.spawn(async move {
            let mut taken = vec![];
            let claimant = Claimant {
                worker: format!("w{worker}"),
                host: String::new(),
                incarnation: String::new(),
            };
            let mut at = 0;
            while let Some(job) =
                queue.claim(&claimant, &format!("{worker}-{at}"), 1_000).await.unwrap()
            {
                assert_eq!(job.worker.as_deref(), Some(claimant.worker.as_str()));
                taken.push(job.id);
                at += 1;
            }
            taken
        });
    }
    let taken: Vec<i64> = tasks.join_all().await.into_iter().flatten().collect();
    assert_eq!(taken.len(), JOBS);
    assert_eq!(taken.into_iter().collect::<BTreeSet<_>>().len(), JOBS);
}

pub(crate) async fn only_the_present_lease_moves_a_job(url: &str) {
    let queue = Queue::open(url).await.unwrap();
    app(&queue, "web").await;
    submit(&queue, "web", 1).await;
    let (job, old) = claim(&queue, 2).await.unwrap();
    assert!(!queue.heartbeat(job.id, &old, 3).await.unwrap());
    assert_eq!(queue.job(job.id).await.unwrap().last_heartbeat_ms, Some(3));
    queue.finish(job.id, &old, &failed(true), &[], 4).await.unwrap();
    let (job, new) = claim(&queue, 5).await.unwrap();
    assert_eq!(job.attempt, 2);
    let forged = Lease { attempt: 2, token: old.token.clone() };
    let early = Lease { attempt: 1, token: new.token.clone() };
    for wrong in [&old, &forged, &early] {
        assert!(lost(queue.heartbeat(job.id, wrong, 6).await));
        assert!(lost(queue.check_lease(job.id, wrong).await));
        let end = End::Succeeded(stored(1));
        assert!(lost(queue.finish(job.id, wrong, &end, &[], 6).await));
        assert!(lost(queue.finish(job.id, wrong, &End::Cancelled, &[], 6).await));
    }
    assert_eq!(queue.job(job.id).await.unwrap(), job, "nothing of that changed it");
    assert!(queue.artifacts(None, 10).await.unwrap().is_empty());
    queue.check_lease(job.id, &new).await.unwrap();
    queue.finish(job.id, &new, &failed(false), &[], 7).await.unwrap();
    assert!(lost(queue.heartbeat(job.id, &new, 8).await), "it has ended");
    assert!(matches!(
        queue.finish(99, &new, &End::Cancelled, &[], 8).await,
        Err(QueueError::NotFound(_))
    ));
}

pub(crate) async fn an_end_told_twice_is_one_end(url: &str) {
    let queue = Queue::open(url).await.unwrap();
    queue.set_regions(&regions(&["eu"]), 0).await.unwrap();
    app(&queue, "web").await;
    submit(&queue, "web", 1).await;
    let (job, lease) = claim(&queue, 2).await.unwrap();
    let end = End::Succeeded(stored(1));
    let first = queue.finish(job.id, &lease, &end, &regions(&["eu"]), 3).await.unwrap();
    let second = queue.finish(job.id, &lease, &end, &regions(&["eu"]), 4).await.unwrap();
    assert_eq!(first, second);
    assert_eq!(queue.artifacts(None, 10).await.unwrap().len(), 1);
    // Another end of the same attempt is no repetition.
    assert!(lost(queue.finish(job.id, &lease, &End::Succeeded(stored(2)), &[], 5).await));
    assert!(lost(queue.finish(job.id, &lease, &failed(false), &[], 5).await));
    // A retry told twice does not disturb the job that waits again, or runs again.
    submit(&queue, "web", 6).await;
    let (job, lease) = claim(&queue, 7).await.unwrap();
    queue.finish(job.id, &lease, &failed(true), &[], 8).await.unwrap();
    let again = queue.finish(job.id, &lease, &failed(true), &[], 9).await.unwrap();
    assert_eq!(again.status, JobStatus::Queued);
    let (running, _) = claim(&queue, 10).await.unwrap();
    queue.finish(job.id, &lease, &failed(true), &[], 11).await.unwrap();
    assert_eq!(queue.job(job.id).await.unwrap(), running);
}

pub(crate) async fn a_failure_is_tried_again_in_its_old_place_until_the_last_attempt(url: &str) {
    let queue = Queue::open(url).await.unwrap();
    app(&queue, "web").await;
    let first = submit(&queue, "web", 1).await;
    submit(&queue, "web", 2).await;
    let (_, lease) = claim(&queue, 3).await.unwrap();
    let waiting = queue.finish(first.id, &lease, &failed(true), &[], 4).await.unwrap();
    assert_eq!((waiting.status, waiting.finished_at_ms), (JobStatus::Queued, None));
    assert_eq!(waiting.reason.as_deref(), Some("exit 1"));
    let (again, lease) = claim(&queue, 5).await.unwrap();
    assert_eq!(
        (again.id, again.created_at_ms, again.reason),
        (first.id, 1, None),
        "before the other"
    );
    let ended = queue.finish(first.id, &lease, &failed(true), &[], 6).await.unwrap();
    assert_eq!((ended.status, ended.finished_at_ms), (JobStatus::Failed, Some(6)));
    let attempts = queue.attempts(first.id).await.unwrap();
    assert_eq!(attempts.iter().map(|a| a.attempt).collect::<Vec<_>>(), [1, 2]);
    let reasons: Vec<_> = attempts.iter().map(|a| a.reason.as_deref().unwrap()).collect();
    assert_eq!(reasons, ["exit 1", "exit 1, in attempt 2 of 2"]);
    assert!(attempts.iter().all(|a| a.outcome.as_deref() == Some("failed")));
    assert_eq!(attempts[0].finished_at_ms, Some(4));
    // What another attempt would not mend is not tried again.
    let (other, lease) = claim(&queue, 7).await.unwrap();
    let ended = queue.finish(other.id, &lease, &failed(false), &[], 8).await.unwrap();
    assert_eq!((ended.status, ended.attempt), (JobStatus::Failed, 1));
}

pub(crate) async fn a_waiting_job_is_cancelled_at_once(url: &str) {
    let queue = Queue::open(url).await.unwrap();
    app(&queue, "web").await;
    let job = submit(&queue, "web", 1).await;
    let cancelled = queue.cancel(job.id, &actor(), 2).await.unwrap();
    assert_eq!((cancelled.status, cancelled.finished_at_ms), (JobStatus::Cancelled, Some(2)));
    assert_eq!(cancelled.reason.as_deref(), Some("cancelled by alice"));
    assert!(claim(&queue, 3).await.is_none());
    assert_eq!(queue.cancel(job.id, &actor(), 4).await.unwrap(), cancelled, "twice is once");
    assert!(matches!(queue.cancel(99, &actor(), 4).await, Err(QueueError::NotFound(_))));
}

pub(crate) async fn a_running_job_is_cancelled_by_its_worker(url: &str) {
    let queue = Queue::open(url).await.unwrap();
    app(&queue, "web").await;
    let ends = [End::Cancelled, failed(true), failed(false)];
    for (at, end) in ends.iter().enumerate() {
        submit(&queue, "web", at as i64).await;
        let (job, lease) = claim(&queue, 10).await.unwrap();
        assert!(!queue.heartbeat(job.id, &lease, 11).await.unwrap());
        let told = queue.cancel(job.id, &actor(), 12).await.unwrap();
        assert_eq!((told.status, told.cancel_requested), (JobStatus::Running, true));
        assert!(queue.heartbeat(job.id, &lease, 13).await.unwrap(), "the worker is told");
        let ended = queue.finish(job.id, &lease, end, &[], 14).await.unwrap();
        assert_eq!(ended.status, JobStatus::Cancelled, "{end:?}");
        assert!(ended.reason.unwrap().starts_with("cancelled by alice"));
    }
    // Its worker was faster than the news: it is cancelled all the same, and leaves nothing.
    submit(&queue, "web", 20).await;
    let (job, lease) = claim(&queue, 21).await.unwrap();
    assert!(!queue.check_lease(job.id, &lease).await.unwrap());
    queue.cancel(job.id, &actor(), 22).await.unwrap();
    assert!(queue.check_lease(job.id, &lease).await.unwrap());
    let end = End::Succeeded(stored(1));
    for _ in 0..2 {
        let ended = queue.finish(job.id, &lease, &end, &regions(&["eu"]), 23).await.unwrap();
        assert_eq!((ended.status, ended.artifact), (JobStatus::Cancelled, None), "told twice");
    }
    assert!(queue.artifact(&job.name, None).await.is_err());
    // What has ended well stays so.
    submit(&queue, "web", 30).await;
    let (job, lease) = claim(&queue, 31).await.unwrap();
    queue.finish(job.id, &lease, &end, &[], 32).await.unwrap();
    let late = queue.cancel(job.id, &actor(), 33).await;
    assert!(matches!(late, Err(QueueError::Conflict(text)) if text.contains("SUCCEEDED")));
}

pub(crate) async fn a_cancelled_job_whose_worker_is_lost_is_cancelled(url: &str) {
    let queue = Queue::open(url).await.unwrap();
    app(&queue, "web").await;
    let job = submit(&queue, "web", 1).await;
    claim(&queue, 2).await.unwrap();
    // The cancel comes between the verdict and its being carried out.
    let mut watch = Watch::new(90, 1_000);
    watch.look(0, 0, &queue.running().await.unwrap());
    let lost = watch.look(90, 90, &queue.running().await.unwrap());
    queue.cancel(job.id, &actor(), 3).await.unwrap();
    assert_eq!(queue.reap(&lost[0], BACKOFF, 4).await.unwrap(), Some(JobStatus::Cancelled));
    let reason = queue.job(job.id).await.unwrap().reason.unwrap();
    assert!(reason.starts_with("cancelled by alice"), "{reason}");
}

pub(crate) async fn a_lost_job_goes_back_to_its_old_place_and_fails_after_its_last_attempt(
    url: &str,
) {
    let queue = Queue::open(url).await.unwrap();
    app(&queue, "web").await;
    let first = submit(&queue, "web", 1).await;
    submit(&queue, "web", 2).await;
    let (_, lease) = claim(&queue, 3).await.unwrap();
    assert_eq!(reap(&queue).await, [Some(JobStatus::Queued)]);
    assert!(lost(queue.heartbeat(first.id, &lease, 4).await));
    let end = End::Succeeded(stored(1));
    assert!(lost(queue.finish(first.id, &lease, &end, &[], 4).await), "declared dead is dead");
    let (again, _) = claim(&queue, 5).await.unwrap();
    assert_eq!((again.id, again.created_at_ms, again.attempt), (first.id, 1, 2));
    assert_eq!(reap(&queue).await, [Some(JobStatus::Failed)]);
    let job = queue.job(first.id).await.unwrap();
    assert_eq!(job.status, JobStatus::Failed);
    let reason = job.reason.unwrap();
    assert!(reason.contains("worker w1 was lost") && reason.contains("attempt 2 of 2"), "{reason}");
    let reasons = queue.attempts(first.id).await.unwrap();
    assert!(reasons.iter().all(|attempt| attempt.reason.as_ref().unwrap().contains("lost")));
}

pub(crate) async fn a_heartbeat_in_time_beats_the_reaper(url: &str) {
    let queue = Queue::open(url).await.unwrap();
    app(&queue, "web").await;
    let job = submit(&queue, "web", 1).await;
    let (_, lease) = claim(&queue, 2).await.unwrap();
    let mut watch = Watch::new(90, 1_000);
    watch.look(0, 0, &queue.running().await.unwrap());
    let lost = watch.look(90, 90, &queue.running().await.unwrap());
    // The verdict was reached, and before it is carried out the worker is heard.
    queue.heartbeat(job.id, &lease, 3).await.unwrap();
    assert_eq!(queue.reap(&lost[0], BACKOFF, 4).await.unwrap(), None);
    assert_eq!(queue.job(job.id).await.unwrap().status, JobStatus::Running);
    queue.check_lease(job.id, &lease).await.unwrap();
}

pub(crate) async fn a_success_brings_its_artifact_and_copies(url: &str) {
    let queue = Queue::open(url).await.unwrap();
    queue.set_regions(&regions(&["eu", "us"]), 0).await.unwrap();
    app(&queue, "web").await;
    let job = submit(&queue, "web", 1).await;
    assert_eq!(job.name, format!("web/0123456789ab-{}", job.id));
    let (_, lease) = claim(&queue, 2).await.unwrap();
    let end = End::Succeeded(stored(1));
    let ended = queue.finish(job.id, &lease, &end, &regions(&["eu", "us"]), 3).await.unwrap();
    assert_eq!(ended.artifact, Some(stored(1).artifact));
    let artifact = queue.artifact(&job.name, None).await.unwrap();
    assert_eq!(artifact.stored, stored(1));
    assert_eq!((artifact.origin.job, artifact.origin.commit), (Some(job.id), Some(job.commit)));
    assert_eq!(artifact.requested_by, "alice");
    let pending = |region: &str| artifact.copies[&region.parse().unwrap()].status;
    assert_eq!(artifact.copies.len(), 2);
    assert_eq!(pending("eu"), ReplicationStatus::Pending);
    assert_eq!(pending("us"), ReplicationStatus::Pending);
}

pub(crate) async fn jobs_of_unknown_apps_are_refused(url: &str) {
    let queue = Queue::open(url).await.unwrap();
    let refused = queue.submit(&ask("web"), &actor(), 1).await;
    assert!(matches!(refused, Err(QueueError::NotFound(text)) if text.contains("shoal app set")));
    app(&queue, "web").await;
    assert_eq!(submit(&queue, "web", 2).await.id, 1, "the refused one took no number");
}

pub(crate) async fn where_a_log_is_is_written_down_once(url: &str) {
    let queue = Queue::open(url).await.unwrap();
    app(&queue, "web").await;
    let job = submit(&queue, "web", 1).await;
    claim(&queue, 2).await.unwrap();
    let at = async || queue.attempts(job.id).await.unwrap()[0].log_at.clone();
    assert!(at().await.is_empty());
    for coordinator in ["c1", "c12", "c1", "c2", "c12"] {
        queue.note_log(job.id, 1, coordinator).await.unwrap();
    }
    queue.note_log(job.id, 2, "c3").await.unwrap();
    assert_eq!(at().await, ["c1", "c12", "c2"]);
}
