//! Who is served when: priorities, joining, back-off, pause, and the workers.

use std::collections::BTreeSet;

use shoal_proto::state::{JobStatus, Priority};
use shoal_queue::{Ask, Claimant, Depth, End, Lease, Queue, QueueError, Submitted, Waiting};
use tokio::task::JoinSet;

use super::{BACKOFF, actor, app, ask, claim, stored, submit};

fn worker(name: &str, incarnation: &str) -> Claimant {
    Claimant { worker: name.into(), host: "host".into(), incarnation: incarnation.into() }
}

async fn take(queue: &Queue, claimant: &Claimant, now_ms: i64) -> Option<(i64, Lease)> {
    let token = format!("{} {now_ms}", claimant.incarnation);
    let job = queue.claim(claimant, &token, now_ms).await.unwrap()?;
    Some((job.id, Lease { attempt: job.attempt, token }))
}

async fn urgent(queue: &Queue, priority: Priority, now_ms: i64) -> i64 {
    let ask = Ask { priority, ..ask("web") };
    queue.submit(&ask, &actor(), now_ms).await.unwrap().job.id
}

pub(crate) async fn urgent_jobs_first_and_the_oldest_of_each_priority(url: &str) {
    let queue = Queue::open(url).await.unwrap();
    app(&queue, "web").await;
    use Priority::{High, Low, Normal, Urgent};
    let asked =
        [(Low, 1), (Normal, 2), (High, 3), (Urgent, 4), (Urgent, 3), (Normal, 1), (High, 3)];
    let mut ids = vec![];
    for (priority, at) in asked {
        ids.push(urgent(&queue, priority, at).await);
    }
    let by_place = [4, 3, 2, 6, 5, 1, 0].map(|at| ids[at]);
    let (first, lease) = claim(&queue, 10).await.unwrap();
    assert_eq!((first.id, first.priority), (by_place[0], Urgent));
    // It comes back to its old place, before an urgent one that is younger.
    let end = End::Failed { reason: "no network".into(), retry: Some(BACKOFF) };
    queue.finish(first.id, &lease, &end, &[], 11).await.unwrap();
    for id in by_place {
        assert_eq!(claim(&queue, 12).await.unwrap().0.id, id);
    }
    assert!(claim(&queue, 13).await.is_none());
}

pub(crate) async fn a_commit_is_built_once_at_a_time_and_joining_raises_its_priority(url: &str) {
    let queue = Queue::open(url).await.unwrap();
    app(&queue, "web").await;
    app(&queue, "db").await;
    let older = submit(&queue, "web", 1).await;
    let wanted = ask("web");
    let again = async |priority, now_ms| {
        let ask = Ask { priority, ..wanted.clone() };
        queue.submit(&ask, &actor(), now_ms).await.unwrap()
    };
    let first = again(Priority::Normal, 2).await;
    assert!(!first.joined);
    // Neither a lower priority nor the same one changes anything.
    for priority in [Priority::Low, Priority::Normal] {
        assert_eq!(again(priority, 3).await, Submitted { joined: true, ..first.clone() });
    }
    let raised = again(Priority::High, 4).await;
    assert_eq!((raised.joined, raised.job.id), (true, first.job.id));
    assert_eq!((raised.job.priority, raised.job.created_at_ms), (Priority::High, 2));
    // Another app's build of the same commit is another build.
    let other = Ask { app: super::name("db"), ..wanted.clone() };
    assert!(!queue.submit(&other, &actor(), 5).await.unwrap().joined);

    let (running, lease) = claim(&queue, 6).await.unwrap();
    assert_eq!(running.id, first.job.id, "raised above what is older");
    let joined = again(Priority::Urgent, 7).await;
    assert_eq!((joined.joined, joined.job.status), (true, JobStatus::Running));
    assert_eq!(joined.job.priority, Priority::Urgent, "for its next attempt");
    // One that is being cancelled is nobody's build.
    queue.cancel(running.id, &actor(), 8).await.unwrap();
    let next = again(Priority::Low, 9).await;
    assert!(!next.joined && next.job.id != running.id);
    queue.finish(running.id, &lease, &End::Cancelled, &[], 10).await.unwrap();
    assert_eq!(again(Priority::Low, 11).await.job.id, next.job.id);
    // What has ended is not joined.
    for id in [older.id, other_id(&queue, &other).await, next.job.id] {
        let (job, lease) = claim(&queue, 12).await.unwrap();
        assert_eq!(job.id, id);
        queue.finish(id, &lease, &End::Succeeded(stored(1)), &[], 13).await.unwrap();
    }
    let fresh = again(Priority::Normal, 14).await;
    assert!(!fresh.joined && fresh.job.id > next.job.id);
    let what: Vec<_> = queue.audit(4).await.unwrap().into_iter().map(|row| row.what).collect();
    assert_eq!(what, ["job.submit", "job.join", "job.join", "job.submit"]);
    let rows = queue.audit(20).await.unwrap();
    assert!(rows.iter().any(|row| row.detail == "raised from normal to high"), "{rows:?}");
}

async fn other_id(queue: &Queue, ask: &Ask) -> i64 {
    let submitted = queue.submit(ask, &actor(), 12).await.unwrap();
    assert!(submitted.joined);
    submitted.job.id
}

pub(crate) async fn who_asks_at_once_gets_one_job(url: &str) {
    let one = Queue::open(url).await.unwrap();
    let two = match url.starts_with("postgres") {
        true => Queue::open(url).await.unwrap(),
        false => one.clone(),
    };
    app(&one, "web").await;
    for round in 0..10 {
        let wanted = ask("web");
        let mut tasks = JoinSet::new();
        for at in 0..8 {
            let queue = if at % 2 == 0 { one.clone() } else { two.clone() };
            let wanted = wanted.clone();
            tasks.spawn(async move { queue.submit(&wanted, &actor(), round).await.unwrap() });
        }
        let all = tasks.join_all().await;
        assert_eq!(all.iter().filter(|submitted| !submitted.joined).count(), 1);
        assert_eq!(all.iter().map(|submitted| submitted.job.id).collect::<BTreeSet<_>>().len(), 1);
    }
    assert_eq!(one.jobs(None, 100).await.unwrap().len(), 10);
}

pub(crate) async fn backoff_begins_with_the_third_attempt_and_keeps_the_place(url: &str) {
    let queue = Queue::open(url).await.unwrap();
    app(&queue, "web").await;
    let patient = Ask { max_attempts: 5, ..ask("web") };
    let first = queue.submit(&patient, &actor(), 1).await.unwrap().job.id;
    let second = submit(&queue, "web", 2).await.id;
    let fails = async |now_ms| {
        let (job, lease) = claim(&queue, now_ms).await.unwrap();
        assert_eq!(job.id, first, "before what is younger");
        let end = End::Failed { reason: "no network".into(), retry: Some(BACKOFF) };
        queue.finish(first, &lease, &end, &[], now_ms).await.unwrap()
    };
    let waits = fails(10).await;
    assert_eq!((waits.deferred, waits.eligible_at_ms), (false, 10), "at once for the second");
    // After the second attempt 10 ms, then 20, then the most.
    for (attempt, now_ms, due_ms) in [(2, 100, 110), (3, 200, 220), (4, 300, 330)] {
        let waits = fails(now_ms).await;
        assert_eq!((waits.attempt, waits.status), (attempt, JobStatus::Queued));
        assert_eq!((waits.deferred, waits.eligible_at_ms), (true, due_ms));
        assert_eq!(queue.depth().await.unwrap().deferred, 1);
        assert_eq!(queue.release_due(due_ms - 1).await.unwrap(), 0);
        assert_eq!(queue.release_due(due_ms).await.unwrap(), 1);
        assert_eq!(queue.release_due(due_ms).await.unwrap(), 0);
        assert_eq!(queue.depth().await.unwrap().deferred, 0);
    }
    let ended = fails(400).await;
    assert_eq!((ended.status, ended.deferred), (JobStatus::Failed, false));
    assert_eq!(ended.reason.as_deref(), Some("no network, in attempt 5 of 5"));
    assert_eq!(queue.attempts(first).await.unwrap().len(), 5);
    // What waits for its time is passed by, joined, and cancelled.
    let waiting = Ask { max_attempts: 5, ..ask("web") };
    let third = queue.submit(&waiting, &actor(), 0).await.unwrap().job.id;
    for now_ms in [500, 501] {
        let (job, lease) = claim(&queue, now_ms).await.unwrap();
        let end = End::Failed { reason: "no network".into(), retry: Some(BACKOFF) };
        queue.finish(job.id, &lease, &end, &[], now_ms).await.unwrap();
    }
    assert_eq!(claim(&queue, 502).await.unwrap().0.id, second);
    assert_eq!(queue.submit(&waiting, &actor(), 503).await.unwrap().job.id, third);
    assert_eq!(queue.cancel(third, &actor(), 504).await.unwrap().status, JobStatus::Cancelled);
    assert_eq!(queue.release_due(i64::MAX).await.unwrap(), 0);
    assert!(claim(&queue, 505).await.is_none());
}

pub(crate) async fn a_paused_queue_gives_nothing_and_says_why(url: &str) {
    let queue = Queue::open(url).await.unwrap();
    app(&queue, "web").await;
    assert_eq!(queue.paused().await.unwrap(), None);
    submit(&queue, "web", 1).await;
    let (running, lease) = claim(&queue, 2).await.unwrap();
    let waiting = submit(&queue, "web", 3).await;
    queue.pause(Some("the bucket is full"), &actor(), 4).await.unwrap();
    assert!(claim(&queue, 5).await.is_none());
    // It is the database's, not a process's.
    queue.close().await;
    let queue = Queue::open(url).await.unwrap();
    assert!(claim(&queue, 6).await.is_none());
    let paused = queue.paused().await.unwrap().unwrap();
    assert_eq!((paused.by.as_str(), paused.at_ms), ("alice", 4));
    assert_eq!(paused.reason.as_deref(), Some("the bucket is full"));
    // What runs goes on and ends; what is asked for waits.
    assert!(!queue.heartbeat(running.id, &lease, 7).await.unwrap());
    queue.finish(running.id, &lease, &End::Succeeded(stored(1)), &[], 8).await.unwrap();
    submit(&queue, "web", 9).await;
    queue.pause(None, &actor(), 10).await.unwrap();
    assert_eq!(queue.paused().await.unwrap().unwrap().reason, None);
    for _ in 0..2 {
        queue.resume(&actor(), 11).await.unwrap();
    }
    assert_eq!(queue.paused().await.unwrap(), None);
    assert_eq!(claim(&queue, 12).await.unwrap().0.id, waiting.id);
    let what: Vec<_> = queue.audit(5).await.unwrap().into_iter().map(|row| row.what).collect();
    assert_eq!(what, ["queue.resume", "queue.pause", "job.submit", "queue.pause", "job.submit"]);
}

pub(crate) async fn a_drained_worker_takes_nothing_and_keeps_what_it_has(url: &str) {
    let queue = Queue::open(url).await.unwrap();
    app(&queue, "web").await;
    let (w1, w2) = (worker("w1", "a"), worker("w2", "b"));
    let none = queue.drain_worker("w1", true, None, &actor(), 1).await;
    assert!(matches!(none, Err(QueueError::NotFound(text)) if text.contains("shoal workers")));
    for claimant in [&w1, &w2] {
        assert!(queue.worker_seen(claimant, 0, BACKOFF, 2).await.unwrap().is_empty());
        submit(&queue, "web", 2).await;
    }
    let (mine, lease) = take(&queue, &w1, 3).await.unwrap();
    queue.drain_worker("w1", true, Some("new disk"), &actor(), 4).await.unwrap();
    assert!(take(&queue, &w1, 5).await.is_none());
    let workers = queue.workers().await.unwrap();
    assert_eq!(workers.len(), 2);
    let drain = workers[0].drain.clone().unwrap();
    assert_eq!(
        (drain.reason.as_deref(), drain.by.as_str(), drain.at_ms),
        (Some("new disk"), "alice", 4)
    );
    assert_eq!((workers[0].jobs.as_slice(), &workers[1].drain), (&[mine][..], &None));
    // A new process of the name is drained, too; the old one's job is another matter.
    assert!(!queue.heartbeat(mine, &lease, 6).await.unwrap());
    queue.finish(mine, &lease, &End::Succeeded(stored(1)), &[], 7).await.unwrap();
    assert!(take(&queue, &w1, 8).await.is_none());
    assert!(take(&queue, &w2, 8).await.is_some());
    let next = worker("w1", "c");
    queue.worker_seen(&next, 0, BACKOFF, 9).await.unwrap();
    submit(&queue, "web", 9).await;
    assert!(take(&queue, &next, 10).await.is_none());
    queue.drain_worker("w1", false, None, &actor(), 11).await.unwrap();
    assert!(take(&queue, &next, 12).await.is_some());
    let audit = queue.audit(10).await.unwrap();
    let row = audit.iter().find(|row| row.what == "worker.drain").unwrap();
    assert_eq!((row.subject.as_str(), row.detail.as_str()), ("w1", "new disk"));
    assert!(audit.iter().any(|row| row.what == "worker.undrain"));
}

pub(crate) async fn a_restarted_workers_job_is_given_on_at_once(url: &str) {
    let queue = Queue::open(url).await.unwrap();
    app(&queue, "web").await;
    let (old, new) = (worker("w1", "old"), worker("w1", "new"));
    queue.worker_seen(&old, 0, BACKOFF, 1).await.unwrap();
    queue.worker_seen(&worker("w2", "x"), 0, BACKOFF, 1).await.unwrap();
    let mut ids = vec![];
    for at in 0..4 {
        ids.push(submit(&queue, "web", at).await.id);
    }
    let once = Ask { max_attempts: 1, ..ask("web") };
    ids.push(queue.submit(&once, &actor(), 5).await.unwrap().job.id);
    let (first, lease) = take(&queue, &old, 10).await.unwrap();
    take(&queue, &old, 11).await.unwrap();
    let (kept, _) = take(&queue, &worker("w2", "x"), 12).await.unwrap();
    let (done, done_lease) = take(&queue, &old, 13).await.unwrap();
    queue.finish(done, &done_lease, &End::Succeeded(stored(1)), &[], 14).await.unwrap();
    take(&queue, &old, 15).await.unwrap();
    queue.cancel(ids[1], &actor(), 16).await.unwrap();
    // Seen again, it is nothing new.
    assert!(queue.worker_seen(&old, 0, BACKOFF, 17).await.unwrap().is_empty());
    let given = queue.worker_seen(&new, 0, BACKOFF, 18).await.unwrap();
    use JobStatus::{Cancelled, Failed, Queued};
    assert_eq!(given, [(first, Queued), (ids[1], Cancelled), (ids[4], Failed)]);
    assert_eq!(queue.job(kept).await.unwrap().status, JobStatus::Running, "another's");
    let lost = queue.heartbeat(first, &lease, 19).await;
    assert!(matches!(lost, Err(QueueError::LeaseLost { .. })));
    let failed = queue.job(ids[4]).await.unwrap().reason.unwrap();
    assert_eq!(failed, "worker w1 was restarted, in attempt 1 of 1");
    // What the old process still asks for is not given to anybody.
    assert!(take(&queue, &old, 20).await.is_none());
    let (again, _) = take(&queue, &new, 21).await.unwrap();
    assert_eq!(again, first, "in its old place");
    let attempts = queue.attempts(first).await.unwrap();
    assert_eq!(attempts[0].outcome.as_deref(), Some("lost"));
    assert_eq!(attempts[0].reason.as_deref(), Some("worker w1 was restarted"));
    assert_eq!((attempts[1].outcome.as_deref(), attempts[1].incarnation.as_str()), (None, "new"));
    assert_eq!(queue.workers().await.unwrap()[0].started_at_ms, 18);
}

pub(crate) async fn a_late_process_does_not_get_its_name_back(url: &str) {
    let queue = Queue::open(url).await.unwrap();
    app(&queue, "web").await;
    let (old, new) = (worker("w1", "old"), worker("w1", "new"));
    queue.worker_seen(&old, 0, BACKOFF, 10).await.unwrap();
    queue.worker_seen(&new, 0, BACKOFF, 20).await.unwrap();
    submit(&queue, "web", 20).await;
    let (job, lease) = take(&queue, &new, 21).await.unwrap();
    // Heard of at 20: two processes with one name do not take each other's jobs in turn.
    let refused = queue.worker_seen(&old, 20, BACKOFF, 30).await;
    assert!(matches!(refused, Err(QueueError::Conflict(text)) if text.contains("certificate")));
    assert_eq!(queue.workers().await.unwrap()[0].incarnation, "new");
    assert!(!queue.heartbeat(job, &lease, 31).await.unwrap());
    // While it works it is heard of by its job.
    queue.worker_heard(job, 40).await.unwrap();
    assert!(queue.worker_seen(&old, 40, BACKOFF, 41).await.is_err());
    // Silent for too long: it was the late one.
    let given = queue.worker_seen(&old, 41, BACKOFF, 50).await.unwrap();
    assert_eq!(given, [(job, JobStatus::Queued)]);
    assert!(queue.worker_seen(&new, 50, BACKOFF, 51).await.is_err());
    assert_eq!(take(&queue, &old, 52).await.unwrap().0, job);
}

pub(crate) async fn workers_are_forgotten_unless_drained(url: &str) {
    let queue = Queue::open(url).await.unwrap();
    for (name, at) in [("w1", 10), ("w2", 20), ("w3", 10)] {
        queue.worker_seen(&worker(name, "a"), 0, BACKOFF, at).await.unwrap();
    }
    queue.drain_worker("w3", true, None, &actor(), 11).await.unwrap();
    assert_eq!(queue.forget_workers(20).await.unwrap(), 1);
    let left: Vec<_> = queue.workers().await.unwrap().into_iter().map(|one| one.name).collect();
    assert_eq!(left, ["w2", "w3"]);
}

pub(crate) async fn depth_counts_what_waits_and_runs(url: &str) {
    let queue = Queue::open(url).await.unwrap();
    app(&queue, "web").await;
    assert_eq!(queue.depth().await.unwrap(), Depth::default());
    urgent(&queue, Priority::Low, 5).await;
    urgent(&queue, Priority::Low, 4).await;
    let first = urgent(&queue, Priority::Urgent, 6).await;
    let waiting = |priority, jobs, since_ms| Waiting { priority, jobs, since_ms };
    let (low, top) = (waiting(Priority::Low, 2, 4), waiting(Priority::Urgent, 1, 6));
    let depth = queue.depth().await.unwrap();
    assert_eq!((depth.waiting, depth.running), (vec![top, low.clone()], 0));
    let (job, lease) = claim(&queue, 10).await.unwrap();
    assert_eq!(job.id, first);
    let depth = queue.depth().await.unwrap();
    assert_eq!((depth.waiting, depth.running), (vec![low.clone()], 1));
    // It waits for a worker since its attempt ended: what it took is not the queue's.
    let end = End::Failed { reason: "no network".into(), retry: Some(BACKOFF) };
    queue.finish(first, &lease, &end, &[], 500).await.unwrap();
    let top = waiting(Priority::Urgent, 1, 500);
    assert_eq!(queue.depth().await.unwrap().waiting, [top, low]);
}
