//! Many callers at once, of one coordinator and of two.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use shoal_proto::{
    Revision,
    state::{JobStatus, MachineState},
};
use shoal_queue::{Choice, Claimant, End, Lease, Queue, QueueError, Watch};
use tokio::task::JoinSet;

use super::{
    BACKOFF, actor, app, claim, name,
    records::{EU, deploy, named, publish, ready, seen, state},
    regions, stored, submit,
};

fn claimant(worker: usize) -> Claimant {
    Claimant { worker: format!("w{worker}"), host: "host".into(), incarnation: "one".into() }
}

/// Two coordinators' databases: on SQLite two processes would be one too many, so both are the same.
async fn two(url: &str) -> [Queue; 2] {
    let one = Queue::open(url).await.unwrap();
    let two =
        if url.starts_with("postgres") { Queue::open(url).await.unwrap() } else { one.clone() };
    [one, two]
}

pub(crate) async fn fifty_workers_of_two_coordinators_run_nothing_twice(url: &str) {
    const JOBS: usize = 200;
    const WORKERS: usize = 50;
    let queues = two(url).await;
    queues[0].set_regions(&regions(&[EU]), 0).await.unwrap();
    app(&queues[0], "web").await;
    for at in 0..JOBS {
        submit(&queues[0], "web", at as i64).await;
    }
    let ended = Arc::new(AtomicUsize::new(0));
    let attempts = Arc::new(Mutex::new(BTreeSet::new()));
    let mut tasks = JoinSet::new();
    for worker in 0..WORKERS {
        let (queue, ended, attempts) =
            (queues[worker % 2].clone(), ended.clone(), attempts.clone());
        tasks.spawn(async move {
            let mut at = 0;
            while ended.load(Ordering::Relaxed) < JOBS {
                at += 1;
                let token = format!("{worker}-{at}");
                let Some(job) = queue.claim(&claimant(worker), &token, 1_000).await.unwrap() else {
                    tokio::task::yield_now().await;
                    continue;
                };
                assert_eq!(
                    (job.worker, job.lease),
                    (Some(format!("w{worker}")), Some(token.clone()))
                );
                let first = attempts.lock().unwrap().insert((job.id, job.attempt));
                assert!(first, "attempt {} of job {} was given twice", job.attempt, job.id);
                let lease = Lease { attempt: job.attempt, token };
                assert!(!queue.heartbeat(job.id, &lease, 1_001).await.unwrap());
                // Every fifth first attempt fails, and the job runs once more.
                let end = if job.attempt == 1 && job.id % 5 == 0 {
                    End::Failed { reason: "once".into(), retry: Some(BACKOFF) }
                } else {
                    ended.fetch_add(1, Ordering::Relaxed);
                    End::Succeeded(stored((job.id % 251) as u8))
                };
                queue.finish(job.id, &lease, &end, &regions(&[EU]), 1_002).await.unwrap();
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    let jobs = queues[0].jobs(None, 1_000).await.unwrap();
    assert!(jobs.iter().all(|job| job.status == JobStatus::Succeeded));
    assert_eq!(attempts.lock().unwrap().len(), JOBS + JOBS / 5);
    assert_eq!(queues[0].artifacts(None, 1_000).await.unwrap().len(), JOBS);
}

pub(crate) async fn the_oldest_first_however_many_claim(url: &str) {
    const JOBS: usize = 150;
    let queue = Queue::open(url).await.unwrap();
    app(&queue, "web").await;
    for at in 0..JOBS {
        submit(&queue, "web", at as i64).await;
    }
    let claims = Arc::new(Mutex::new(Vec::new()));
    let mut tasks = JoinSet::new();
    for worker in 0..20 {
        let (queue, claims) = (queue.clone(), claims.clone());
        tasks.spawn(async move {
            loop {
                let asked = Instant::now();
                let token = format!("{worker} {asked:?}");
                let Some(job) = queue.claim(&claimant(worker), &token, 1_000).await.unwrap() else {
                    return;
                };
                claims.lock().unwrap().push((job.id, asked, Instant::now()));
            }
        });
    }
    tasks.join_all().await;
    let mut claims = claims.lock().unwrap().clone();
    claims.sort_unstable_by_key(|claim| claim.0);
    assert_eq!(claims.len(), JOBS);
    // A job that was given away before an older one's claimant had even asked was given out of turn.
    for (at, (older, asked, _)) in claims.iter().enumerate() {
        for (younger, _, given) in &claims[at + 1..] {
            assert!(given >= asked, "job {younger} was given before anybody asked for {older}");
        }
    }
}

pub(crate) async fn heartbeats_that_come_together_are_each_answered(url: &str) {
    const JOBS: usize = 60;
    let queue = Queue::open(url).await.unwrap();
    app(&queue, "web").await;
    let mut held = Vec::new();
    for at in 0..JOBS {
        submit(&queue, "web", at as i64).await;
        held.push(claim(&queue, 1).await.unwrap());
    }
    for (job, _) in held.iter().filter(|(job, _)| job.id % 3 == 0) {
        queue.cancel(job.id, &actor(), 2).await.unwrap();
    }
    let mut tasks = JoinSet::new();
    for round in 0..4 {
        for (job, lease) in &held {
            let (queue, id, mut lease) = (queue.clone(), job.id, lease.clone());
            tasks.spawn(async move {
                if id % 7 == 0 {
                    lease.token = "another's".into();
                }
                let call = queue.heartbeat(id, &lease, 100 + round);
                if id % 11 == 0 && round == 1 {
                    // Hangs up at once: whoever carries others' heartbeats may.
                    let _ = tokio::time::timeout(std::time::Duration::from_micros(300), call).await;
                    return;
                }
                match call.await {
                    Ok(cancel) => assert_eq!((cancel, id % 7 != 0), (id % 3 == 0, true)),
                    Err(QueueError::LeaseLost { job }) => assert_eq!((job, id % 7), (id, 0)),
                    Err(other) => panic!("{other}"),
                }
            });
        }
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    for job in queue.running().await.unwrap() {
        let beaten = job.last_heartbeat_ms.unwrap() >= 100;
        assert_eq!(beaten, job.id % 7 != 0, "job {}", job.id);
    }
}

pub(crate) async fn calls_that_are_given_up_harm_nobody(url: &str) {
    let queues = two(url).await;
    app(&queues[0], "web").await;
    let mut tasks = JoinSet::new();
    for at in 0..40_u64 {
        let queue = queues[0].clone();
        tasks.spawn(async move {
            for round in 0..20 {
                let limit = std::time::Duration::from_micros((at * 37 + round * 113) % 3_000);
                let _ = tokio::time::timeout(limit, submit(&queue, "web", 5)).await;
            }
        });
        let queue = queues[0].clone();
        tasks.spawn(async move {
            for round in 0..20 {
                let worker = claimant(at as usize);
                let token = format!("{at} {round}");
                // Nobody hangs up here: what is answered is there, for everybody.
                let Some(job) = queue.claim(&worker, &token, 6).await.unwrap() else { continue };
                let lease = Lease { attempt: job.attempt, token };
                queue.check_lease(job.id, &lease).await.unwrap();
                let end = End::Failed { reason: "no".into(), retry: None };
                queue.finish(job.id, &lease, &end, &[], 7).await.unwrap();
                assert_eq!(queue.job(job.id).await.unwrap().status, JobStatus::Failed);
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    for queue in &queues {
        let job = submit(queue, "web", 8).await;
        assert_eq!(queues[0].job(job.id).await.unwrap(), job);
        assert_eq!(queues[1].job(job.id).await.unwrap(), job);
    }
}

pub(crate) async fn one_end_of_an_attempt_wins(url: &str) {
    let queues = two(url).await;
    queues[0].set_regions(&regions(&[EU]), 0).await.unwrap();
    app(&queues[0], "web").await;
    for round in 0..20 {
        submit(&queues[0], "web", round).await;
        let (job, lease) = claim(&queues[0], 100).await.unwrap();
        let mut watch = Watch::new(90, 1_000);
        watch.look(0, 0, &queues[1].running().await.unwrap());
        let lost = watch.look(90, 90, &queues[1].running().await.unwrap()).remove(0);
        // All at the same moment: the worker's end, the reaper's verdict, and an operator's cancel.
        let (eu, by) = (regions(&[EU]), actor());
        let end = End::Succeeded(stored(round as u8));
        let (finished, reaped, cancelled) = tokio::join!(
            queues[0].finish(job.id, &lease, &end, &eu, 101),
            queues[1].reap(&lost, BACKOFF, 102),
            queues[1].cancel(job.id, &by, 103),
        );
        let now = queues[0].job(job.id).await.unwrap();
        match (finished, reaped.unwrap()) {
            // What was cancelled is not built, whoever was first.
            (Ok(job), None) if cancelled.is_ok() => {
                assert_eq!((job.status, now.status), (JobStatus::Cancelled, job.status))
            }
            (Ok(job), None) => {
                assert_eq!((job.status, now.status), (JobStatus::Succeeded, job.status))
            }
            (Err(QueueError::LeaseLost { .. }), Some(to)) => {
                // Given back, it was still there to be cancelled; or the cancel was first.
                assert!(matches!(to, JobStatus::Queued | JobStatus::Cancelled));
                assert_eq!(now.status, JobStatus::Cancelled);
                cancelled.unwrap();
            }
            (finished, reaped) => panic!("{finished:?} {reaped:?}"),
        }
        let made = queues[0].artifact(&job.name, None).await.is_ok();
        assert_eq!(made, now.status == JobStatus::Succeeded);
    }
}

pub(crate) async fn coordinators_may_start_at_once(url: &str) {
    // SQLite's one process is the first to open the file.
    let opened = match url.starts_with("sqlite") {
        true => Some(Queue::open(url).await.unwrap()),
        false => None,
    };
    let mut tasks = JoinSet::new();
    for at in 0..4 {
        let (url, opened) = (url.to_string(), opened.clone());
        tasks.spawn(async move {
            let queue = match opened {
                Some(queue) => queue,
                None => Queue::open(&url).await.unwrap(),
            };
            queue.set_regions(&regions(&["eu", "us", "ap"]), at).await.unwrap();
            queue
        });
    }
    let queues = tasks.join_all().await;
    for queue in &queues {
        assert_eq!(queue.regions().await.unwrap().len(), 3);
    }
}

pub(crate) async fn one_name_published_at_once_is_one_artifact(url: &str) {
    let queues = two(url).await;
    queues[0].set_regions(&regions(&[EU]), 0).await.unwrap();
    app(&queues[0], "web").await;
    let mut tasks = JoinSet::new();
    for at in 0..16_u8 {
        let queue = queues[usize::from(at % 2)].clone();
        tasks.spawn(async move {
            let stored = stored(1 + at / 8);
            queue.publish(&name("web"), "web/a", &stored, &regions(&[EU]), &actor(), 10).await
        });
    }
    let results = tasks.join_all().await;
    let won: BTreeSet<_> =
        results.iter().flatten().map(|artifact| artifact.stored.artifact).collect();
    assert_eq!(won.len(), 1);
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 8);
    let refused = results.iter().filter_map(|result| result.as_ref().err());
    assert!(refused.into_iter().all(|error| matches!(error, QueueError::Conflict(_))));
    assert_eq!(queues[0].artifacts(None, 10).await.unwrap().len(), 1);
}

pub(crate) async fn batches_and_forgetting_do_not_block_each_other(url: &str) {
    const MACHINES: usize = 300;
    let queues = two(url).await;
    let queue = ready(url, &[]).await;
    let revision = Revision { epoch: 1, number: 1 };
    let mut tasks = JoinSet::new();
    for at in 0..12_u64 {
        let queue = queues[at as usize % 2].clone();
        tasks.spawn(async move {
            if at % 4 == 3 {
                queue.forget_machines(at as i64).await.unwrap();
                return;
            }
            // The same machines in opposite orders.
            let mut all: Vec<_> = (0..MACHINES).map(|at| format!("m{at}")).collect();
            if at % 2 == 0 {
                all.reverse();
            }
            let machines: Vec<_> =
                all.iter().map(|name| seen(name, "web", 100 + at as i64)).collect();
            let states: Vec<_> =
                all.iter().map(|name| state(name, revision, at, MachineState::Active)).collect();
            queue.keep_reports(&EU.parse().unwrap(), &machines, &states).await.unwrap();
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    assert_eq!(queue.machines(None, None).await.unwrap().len(), MACHINES);
    let states = queue.states(&name("web"), revision).await.unwrap();
    assert_eq!(states.len(), MACHINES);
}

pub(crate) async fn a_copy_is_taken_once_and_taken_over(url: &str) {
    const ARTIFACTS: u8 = 20;
    let queues = two(url).await;
    queues[0].set_regions(&regions(&["eu", "us"]), 0).await.unwrap();
    app(&queues[0], "web").await;
    for seed in 0..ARTIFACTS {
        publish(&queues[0], "web", &format!("web/{seed}"), seed).await;
    }
    let mut tasks = JoinSet::new();
    for at in 0..8 {
        let queue = queues[at % 2].clone();
        tasks.spawn(async move {
            let mut taken = vec![];
            for _ in 0..100 {
                let copy = queue.take_copy(&format!("c{at}"), &[], 100, 1_000).await.unwrap();
                taken.extend(copy.map(|copy| (copy.artifact, copy.region)));
            }
            taken
        });
    }
    let taken: Vec<_> = tasks.join_all().await.into_iter().flatten().collect();
    assert_eq!(taken.len(), 2 * usize::from(ARTIFACTS));
    assert_eq!(taken.iter().collect::<BTreeSet<_>>().len(), taken.len());
    // Long before its time ends: their owners are known to be gone.
    assert_eq!(queues[1].take_over_copies().await.unwrap(), taken.len() as u64);
    assert!(queues[1].take_copy("next", &[], 101, 1_000).await.unwrap().is_some());
}

pub(crate) async fn goals_are_told_in_the_order_of_their_commits(url: &str) {
    const APPS: usize = 8;
    let queues = two(url).await;
    let queue = ready(url, &[]).await;
    for at in 0..APPS {
        let name = format!("app{at}");
        app(&queue, &name).await;
        publish(&queue, &name, &format!("{name}/a"), 1).await;
    }
    while let Some(copy) = queue.take_copy("me", &[], 20, 1_000).await.unwrap() {
        queue.copy_complete(&copy, "me", 7, 30).await.unwrap();
    }
    let mut tasks = JoinSet::new();
    for at in 0..APPS {
        let queue = queues[at % 2].clone();
        tasks.spawn(async move {
            for _ in 0..5 {
                let name = format!("app{at}");
                deploy(&queue, &name, &named(&format!("{name}/a"))).await.unwrap();
            }
        });
    }
    // Who follows the cursor meanwhile misses nothing.
    let (mut cursor, mut newest) = (0, BTreeMap::new());
    loop {
        let done = tasks.is_empty();
        let after = queue.goals_after(cursor).await.unwrap();
        assert!(after.cursor >= cursor);
        cursor = after.cursor;
        for signed in after.signed {
            let (revision, name) = signed.split_once(' ').unwrap();
            let number: u64 = revision.strip_prefix("1.").unwrap().parse().unwrap();
            let before = newest.insert(name.to_string(), number);
            assert!(before < Some(number), "{name}: {before:?}, then {number}");
        }
        if done {
            break;
        }
        while let Some(ended) = tasks.try_join_next() {
            ended.unwrap();
        }
        tokio::task::yield_now().await;
    }
    assert_eq!(newest.len(), APPS);
    assert!(newest.values().all(|number| *number == 5), "{newest:?}");
    let none = deploy(&queue, "app0", &Choice::Named("app0/b".into())).await;
    assert!(matches!(none, Err(QueueError::NotFound(_))));
}
