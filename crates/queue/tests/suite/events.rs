//! What happened, who is told, what starts by itself, and what is remembered of it.

use std::collections::BTreeMap;

use shoal_proto::{
    Revision,
    state::{JobStatus, RolloutStatus},
};
use shoal_queue::{
    Actor, Attempted, AutoDeploy, Choice, DeliveryStatus, End, Event, EventFilter, EventKind,
    NewWebhook, Progress, Push, PushSource, Queue, QueueError, ReapLimit, Taken, Watch,
};
use tokio::task::JoinSet;

use super::{BACKOFF, actor, app, ask, claim, name, records::*, regions, stored, submit};

const ALL: EventFilter = EventFilter { apps: None, kinds: Vec::new() };

/// Numbers all events and returns them.
async fn events(queue: &Queue) -> Vec<Event> {
    while queue.number_events().await.unwrap() > 0 {}
    queue.events_after(0, &ALL, 10_000).await.unwrap()
}

fn kinds(events: &[Event]) -> Vec<&'static str> {
    events.iter().map(|event| event.kind.as_str()).collect()
}

async fn copy_all(queue: &Queue) {
    while let Some(job) = queue.take_copy("me", &[], 20, 1_000).await.unwrap() {
        assert!(queue.copy_complete(&job, "me", 7, 30).await.unwrap());
    }
}

/// Builds what waits, as artifact `seed`.
async fn build(queue: &Queue, seed: u8, now_ms: i64) -> String {
    let (job, lease) = claim(queue, now_ms).await.unwrap();
    let end = End::Succeeded(stored(seed));
    queue.finish(job.id, &lease, &end, &regions(&[EU]), now_ms + 1).await.unwrap();
    copy_all(queue).await;
    job.name
}

pub(crate) async fn each_change_is_an_event_in_the_order_of_its_commit(url: &str) {
    let queue = ready(url, &[]).await;
    let first = submit(&queue, "web", 1).await;
    let (job, lease) = claim(&queue, 2).await.unwrap();
    let failed = End::Failed { reason: "no network".into(), retry: Some(BACKOFF) };
    queue.finish(job.id, &lease, &failed, &[], 3).await.unwrap();
    let built = build(&queue, 1, 4).await;
    let rollout = deploy(&queue, "web", &named(&built)).await.unwrap();
    let none = Progress::new();
    let (status, by) = (RolloutStatus::Failed, actor());
    queue.end_rollout(rollout.id, status, "2 failed", &none, &by, 60).await.unwrap();
    // Ended once.
    queue.end_rollout(rollout.id, status, "again", &none, &by, 61).await.unwrap();
    let second = submit(&queue, "web", 70).await;
    queue.cancel(second.id, &by, 71).await.unwrap();

    assert_eq!(queue.events_cursor().await.unwrap(), 0, "they have no numbers yet");
    assert!(queue.events_after(0, &ALL, 10).await.unwrap().is_empty());
    let all = events(&queue).await;
    assert_eq!(
        kinds(&all),
        [
            "build:queued",
            "build:init",
            "build:requeued",
            "build:init",
            "build:completed",
            "replication:completed",
            "deploy:init",
            "deploy:completed",
            "build:queued",
            "build:completed",
        ]
    );
    assert_eq!(all.iter().map(|event| event.seq).collect::<Vec<_>>(), (1..=10).collect::<Vec<_>>());
    assert_eq!(queue.events_cursor().await.unwrap(), 10);
    let begun = &all[1];
    assert_eq!((begun.at_ms, begun.job, begun.attempt), (2, Some(first.id), Some(1)));
    assert_eq!((begun.worker.as_deref(), begun.status.as_deref()), (Some("w1"), Some("RUNNING")));
    assert_eq!(begun.requested_by.as_deref(), Some("alice"));
    assert_eq!((begun.name.as_ref(), begun.commit.as_ref()), (Some(&built), Some(&first.commit)));
    assert_eq!(all[2].reason.as_deref(), Some("no network"));
    assert_eq!((all[4].status.as_deref(), all[4].attempt), (Some("SUCCEEDED"), Some(2)));
    assert_eq!((all[5].job, all[5].status.as_deref()), (Some(first.id), Some("COMPLETE")));
    assert_eq!((all[6].rollout, all[6].status.as_deref()), (Some(rollout.id), Some("RUNNING")));
    let ended = &all[7];
    assert_eq!(
        (ended.status.as_deref(), ended.reason.as_deref()),
        (Some("FAILED"), Some("2 failed"))
    );
    assert_eq!((ended.job, ended.commit.as_ref()), (Some(first.id), Some(&first.commit)));
    assert_eq!(all[9].status.as_deref(), Some("CANCELLED"));

    // By kind, by app, from a number on; and the newest first.
    let filter =
        EventFilter { apps: Some([name("web")].into()), kinds: vec![EventKind::BuildCompleted] };
    let found = queue.events_after(5, &filter, 10).await.unwrap();
    assert_eq!(found.iter().map(|event| event.seq).collect::<Vec<_>>(), [10]);
    let filter = EventFilter { apps: Some([name("other")].into()), ..ALL };
    assert!(queue.events_after(0, &filter, 10).await.unwrap().is_empty());
    let newest = queue.newest_events(&ALL, None, 2).await.unwrap();
    assert_eq!(newest.iter().map(|event| event.seq).collect::<Vec<_>>(), [10, 9]);
    // The same bytes once more: nothing is to be copied, and they are complete at once.
    submit(&queue, "web", 80).await;
    build(&queue, 1, 81).await;
    let more = queue.events_after(10, &ALL, 10).await.unwrap();
    assert!(more.is_empty());
    let more = &events(&queue).await[10..];
    assert_eq!(
        kinds(more),
        ["build:queued", "build:init", "build:completed", "replication:completed"]
    );
}

pub(crate) async fn waves_and_pauses_are_told_once(url: &str) {
    let queue = ready(url, &["web/a", "web/b"]).await;
    let rollout = deploy(&queue, "web", &named("web/a")).await.unwrap();
    let before = events(&queue).await.len();
    let (eu, by) = (EU.parse().unwrap(), actor());
    let (one, two) = ("eu-p1".parse().unwrap(), "eu-p2".parse().unwrap());
    let wave = |open_permille, opened_at_ms| shoal_queue::WaveSeen {
        app: name("web"),
        revision: rollout.revision,
        open_permille,
        opened_at_ms,
    };
    assert_eq!(queue.keep_waves(&eu, &one, &[wave(250, 51)]).await.unwrap(), 1);
    // Told again after an answer that was lost, or by an older message: known.
    assert_eq!(queue.keep_waves(&eu, &one, &[wave(250, 52), wave(100, 40)]).await.unwrap(), 0);
    assert_eq!(queue.keep_waves(&eu, &two, &[wave(260, 53)]).await.unwrap(), 1);
    assert_eq!(queue.keep_waves(&eu, &one, &[wave(1_000, 54)]).await.unwrap(), 1);
    let other = Revision { number: rollout.revision.number + 1, ..rollout.revision };
    let unknown = shoal_queue::WaveSeen { revision: other, ..wave(300, 55) };
    assert_eq!(queue.keep_waves(&eu, &one, &[unknown]).await.unwrap(), 0);
    let progress = queue.progress(&name("web"), rollout.revision).await.unwrap();
    assert_eq!(progress[&eu].open_permille, Some(260), "the one that is least far");
    assert_eq!(queue.progress_of_open().await.unwrap()[&rollout.id], progress);

    let cursor = queue.goals_cursor().await.unwrap();
    let (paused, did) = queue.pause_rollout(rollout.id, true, &by, 60).await.unwrap();
    assert!(did && paused.status == RolloutStatus::Paused);
    assert_eq!(paused.reason.as_deref(), Some("paused by alice"));
    assert!(!queue.pause_rollout(rollout.id, true, &by, 61).await.unwrap().1);
    let told = queue.goals_after(cursor).await.unwrap();
    assert_eq!(told.halted, [(name("web"), rollout.revision)]);
    assert!(told.cursor > cursor, "who waits hears of it");
    // Time stands still: 50 to 60, and on from 7060.
    assert_eq!(paused.elapsed_s(100_050), 0);
    let (on, did) = queue.pause_rollout(rollout.id, false, &by, 7_060).await.unwrap();
    assert!(did && (on.status, on.reason.as_deref()) == (RolloutStatus::Running, None));
    assert!(!queue.pause_rollout(rollout.id, false, &by, 7_061).await.unwrap().1);
    assert_eq!(queue.goals_after(cursor).await.unwrap().halted, []);
    assert_eq!((on.elapsed_s(8_049), on.elapsed_s(8_050)), (0, 1));
    queue.pause_rollout(rollout.id, true, &by, 9_000).await.unwrap();
    let (twice, _) = queue.pause_rollout(rollout.id, false, &by, 10_000).await.unwrap();
    assert_eq!(twice.elapsed_s(11_050), 3, "11 s less the two pauses of 7 s and 1 s");
    // A paused one is ended, too, and then goes neither way.
    queue.pause_rollout(rollout.id, true, &by, 11_000).await.unwrap();
    deploy(&queue, "web", &named("web/b")).await.unwrap();
    assert_eq!(queue.keep_waves(&eu, &two, &[wave(1_000, 70)]).await.unwrap(), 0, "it has ended");
    for pause in [true, false] {
        let refused = queue.pause_rollout(rollout.id, pause, &by, 12_000).await.unwrap_err();
        assert!(refused.to_string().contains("it is SUPERSEDED"), "{refused}");
    }
    assert!(matches!(queue.pause_rollout(99, true, &by, 1).await, Err(QueueError::NotFound(_))));

    let all = &events(&queue).await[before..];
    let (wave, paused, resumed) = ("deploy:wave", "deploy:paused", "deploy:resumed");
    assert_eq!(
        kinds(all),
        [
            wave,
            wave,
            wave,
            paused,
            resumed,
            paused,
            resumed,
            paused,
            "deploy:completed",
            "deploy:init"
        ]
    );
    let first = &all[0];
    assert_eq!(
        (first.at_ms, first.rollout, first.open_permille),
        (51, Some(rollout.id), Some(250))
    );
    assert_eq!((first.region.as_ref(), first.status.as_deref()), (Some(&eu), Some("RUNNING")));
    assert_eq!(first.reason.as_deref(), Some("opened by eu-p1"));
    assert_eq!(all[1].reason.as_deref(), Some("opened by eu-p2"));
    assert_eq!((all[3].at_ms, all[3].status.as_deref()), (60, Some("PAUSED")));
    assert_eq!((all[3].reason.as_deref(), all[3].region.as_ref()), (Some("paused by alice"), None));
    assert_eq!((all[4].at_ms, all[4].status.as_deref()), (7_060, Some("RUNNING")));
    let what: Vec<_> = queue.audit(20).await.unwrap().into_iter().map(|row| row.what).collect();
    assert_eq!(what.iter().filter(|what| *what == "rollout.pause").count(), 3);
    assert_eq!(what.iter().filter(|what| *what == "rollout.resume").count(), 2);
}

pub(crate) async fn an_undone_change_is_no_event(url: &str) {
    let queue = ready(url, &["web/a"]).await;
    let before = events(&queue).await.len();
    let no = |_: &shoal_queue::GoalDraft<'_>| Err(QueueError::Refused("no".into()));
    queue.set_goal(&name("web"), &named("web/a"), false, no, &actor(), 50).await.unwrap_err();
    // A heartbeat came in between: the verdict does nothing.
    let job = submit(&queue, "web", 1).await;
    let (_, lease) = claim(&queue, 2).await.unwrap();
    let mut watch = Watch::new(10, 10);
    watch.look(0, 0, &queue.running().await.unwrap());
    watch.look(10, 10, &queue.running().await.unwrap());
    let mut lost = watch.look(20, 20, &queue.running().await.unwrap());
    ReapLimit { jobs: 5, share: 0.1 }.apply(&mut lost, 1);
    queue.heartbeat(job.id, &lease, 15).await.unwrap();
    assert_eq!(queue.reap(&lost[0], BACKOFF, 20).await.unwrap(), None);
    let wrong = shoal_queue::Lease { token: "other".into(), ..lease };
    queue.finish(job.id, &wrong, &End::Cancelled, &[], 21).await.unwrap_err();
    queue.finish(job.id, &wrong, &End::Succeeded(stored(3)), &[], 21).await.unwrap_err();
    assert_eq!(kinds(&events(&queue).await[before..]), ["build:queued", "build:init"]);
}

pub(crate) async fn events_of_many_at_once_are_numbered_without_a_gap(url: &str) {
    const WRITERS: u64 = 8;
    const EACH: u64 = 30;
    let queue = ready(url, &[]).await;
    let mut writers = JoinSet::new();
    for _ in 0..WRITERS {
        let queue = queue.clone();
        writers.spawn(async move {
            for _ in 0..EACH {
                submit(&queue, "web", 1).await;
                // Another one may be taking the last one that waits, and give it back.
                let (job, lease) = loop {
                    if let Some(claimed) = claim(&queue, 2).await {
                        break claimed;
                    }
                };
                queue.finish(job.id, &lease, &End::Succeeded(stored(1)), &[], 3).await.unwrap();
            }
        });
    }
    // Two number at once while they write, and a reader follows.
    let mut numbering = JoinSet::new();
    for _ in 0..2 {
        let queue = queue.clone();
        numbering.spawn(async move {
            loop {
                queue.number_events().await.unwrap();
                tokio::task::yield_now().await;
            }
        });
    }
    let mut seen = Vec::new();
    let all = (WRITERS * EACH * 3) as usize;
    let mut cursor = 0;
    // (The region's copy stays to be made: no event of it.)
    while seen.len() < all {
        let page = queue.events_after(cursor, &ALL, 1_000).await.unwrap();
        cursor = page.last().map_or(cursor, |event| event.seq);
        seen.extend(page);
        while let Some(ended) = writers.try_join_next() {
            ended.unwrap();
        }
    }
    numbering.shutdown().await;
    assert_eq!(
        seen.iter().map(|event| event.seq).collect::<Vec<_>>(),
        (1..=all as i64).collect::<Vec<_>>()
    );
    let mut of_jobs: BTreeMap<i64, Vec<&str>> = BTreeMap::new();
    for event in &seen {
        of_jobs.entry(event.job.unwrap()).or_default().push(event.kind.as_str());
    }
    assert_eq!(of_jobs.len() as u64, WRITERS * EACH);
    for (job, told) in of_jobs {
        assert_eq!(told, ["build:queued", "build:init", "build:completed"], "job {job}");
    }
}

async fn webhook(queue: &Queue, app: Option<&str>, kinds: &[EventKind]) -> i64 {
    let new = NewWebhook {
        url: "https://example.org/hook".into(),
        app: app.map(name),
        kinds: kinds.to_vec(),
        sealed: "sealed".into(),
    };
    queue.add_webhook(&new, &actor(), 5).await.unwrap().id
}

pub(crate) async fn events_are_kept_for_a_time_and_while_a_webhook_waits(url: &str) {
    let queue = ready(url, &[]).await;
    for at in 1..=6 {
        submit(&queue, "web", at * 10).await;
    }
    let hook = webhook(&queue, None, &[]).await;
    assert_eq!(events(&queue).await.len(), 6);
    let waiting = queue.deliveries_due(hook, 100, 10).await.unwrap();
    assert_eq!(waiting.len(), 6);
    assert_eq!(queue.forget_events(1_000, 0).await.unwrap(), 0, "the webhook waits for all");
    for delivery in &waiting {
        queue.delivery_tried(delivery, &Attempted::default(), None, 70).await.unwrap();
    }
    assert_eq!(queue.forget_events(25, 100).await.unwrap(), 2, "those before 25");
    assert_eq!(queue.oldest_event().await.unwrap(), Some(3));
    assert_eq!(queue.forget_events(25, 3).await.unwrap(), 1, "more than three");
    assert_eq!(queue.oldest_event().await.unwrap(), Some(4));
    assert_eq!(queue.forget_events(1_000, 3).await.unwrap(), 3);
    assert_eq!(queue.oldest_event().await.unwrap(), None);
    assert_eq!(queue.events_cursor().await.unwrap(), 6);
    assert_eq!(queue.forget_deliveries(70).await.unwrap(), 0);
    assert_eq!(queue.forget_deliveries(71).await.unwrap(), 6);
}

pub(crate) async fn a_webhook_is_told_what_it_wants_from_then_on(url: &str) {
    let queue = ready(url, &[]).await;
    app(&queue, "db").await;
    submit(&queue, "web", 1).await;
    events(&queue).await;
    let all = webhook(&queue, None, &[]).await;
    let web = webhook(&queue, Some("web"), &[]).await;
    let both = [EventKind::BuildQueued, EventKind::DeployInit];
    let queued = webhook(&queue, Some("db"), &both).await;
    let never = webhook(&queue, None, &[EventKind::DeployCompleted]).await;
    submit(&queue, "web", 2).await;
    submit(&queue, "db", 3).await;
    claim(&queue, 4).await.unwrap();
    events(&queue).await;
    let mut told = BTreeMap::new();
    for hook in [all, web, queued, never] {
        let due = queue.deliveries_due(hook, 10, 10).await.unwrap();
        told.insert(hook, due.iter().map(|delivery| delivery.seq.unwrap()).collect::<Vec<_>>());
    }
    let want = [(all, vec![2, 3, 4]), (web, vec![2, 4]), (queued, vec![3]), (never, vec![])];
    assert_eq!(told, BTreeMap::from(want));
    let due = queue.webhooks_due().await.unwrap();
    assert_eq!(due.iter().map(|due| due.webhook).collect::<Vec<_>>(), [all, web, queued]);
    let kept = queue.webhook(queued).await.unwrap();
    assert_eq!((kept.kinds.as_slice(), kept.app), (&both[..], Some(name("db"))));
    assert_eq!(kept.sealed, "sealed");
    // One that is removed is told no more, not even what waited.
    queue.remove_webhook(all, &actor(), 9).await.unwrap();
    assert!(matches!(queue.webhook(all).await, Err(QueueError::NotFound(_))));
    assert!(queue.deliveries(all, None, 10).await.is_err());
    assert_eq!(queue.webhooks_due().await.unwrap().len(), 2);
    assert!(queue.remove_webhook(all, &actor(), 9).await.is_err());
    let what: Vec<_> = queue.audit(1).await.unwrap().into_iter().map(|row| row.what).collect();
    assert_eq!(what, ["webhook.remove"]);
}

pub(crate) async fn a_delivery_is_tried_until_it_is_taken_or_given_up(url: &str) {
    let queue = ready(url, &[]).await;
    let hook = webhook(&queue, None, &[]).await;
    submit(&queue, "web", 100).await;
    submit(&queue, "web", 110).await;
    events(&queue).await;
    let due = queue.deliveries_due(hook, 120, 10).await.unwrap();
    let [first, second] = &due[..] else { panic!("{due:?}") };
    assert_eq!(first.message, "evt_1_100");
    assert_eq!(queue.deliveries_waiting().await.unwrap(), (2, Some(100)));
    let refused = Attempted { answer: Some(503), latency_ms: 7, reason: Some("busy".into()) };
    let status = queue.delivery_tried(first, &refused, Some(200), 121).await.unwrap();
    assert_eq!(status, DeliveryStatus::Pending);
    // It waits for its time, and holds up nothing else.
    let due: Vec<_> = queue.deliveries_due(hook, 199, 10).await.unwrap();
    assert_eq!(due.iter().map(|due| &due.message).collect::<Vec<_>>(), [&second.message]);
    let silent = Attempted { answer: None, latency_ms: 9, reason: Some("no answer".into()) };
    let status = queue.delivery_tried(second, &silent, None, 122).await.unwrap();
    assert_eq!(status, DeliveryStatus::GivenUp);
    let again = queue.deliveries_due(hook, 200, 10).await.unwrap();
    assert_eq!((again.len(), again[0].tries, again[0].answer), (1, 1, Some(503)));
    let taken = Attempted { answer: Some(204), latency_ms: 3, reason: None };
    let status = queue.delivery_tried(&again[0], &taken, None, 201).await.unwrap();
    assert_eq!(status, DeliveryStatus::Delivered);
    // A late word of another attempt changes nothing.
    queue.delivery_tried(&again[0], &refused, Some(300), 202).await.unwrap();
    let log = queue.deliveries(hook, None, 10).await.unwrap();
    let [given_up, delivered] = &log[..] else { panic!("{log:?}") };
    assert_eq!((given_up.status, given_up.tries), (DeliveryStatus::GivenUp, 1));
    assert_eq!(given_up.reason.as_deref(), Some("no answer"));
    assert_eq!((delivered.status, delivered.tries), (DeliveryStatus::Delivered, 2));
    assert_eq!((delivered.answer, delivered.latency_ms), (Some(204), Some(3)));
    assert_eq!((delivered.reason.as_ref(), delivered.finished_at_ms), (None, Some(201)));
    assert!(queue.webhooks_due().await.unwrap().is_empty());
    // What waited for as long as it may is given up together.
    submit(&queue, "web", 400).await;
    submit(&queue, "web", 500).await;
    events(&queue).await;
    assert_eq!(queue.give_up_deliveries(hook, 450, "away", 600).await.unwrap(), 1);
    let due = queue.deliveries_due(hook, 600, 10).await.unwrap();
    assert_eq!(due.iter().map(|due| due.created_at_ms).collect::<Vec<_>>(), [500]);
    let log = queue.deliveries(hook, None, 2).await.unwrap();
    assert_eq!((log[1].status, log[1].reason.as_deref()), (DeliveryStatus::GivenUp, Some("away")));
    let test = queue.keep_test(hook, "test_1", "webhook:test", &refused, 700).await.unwrap();
    assert_eq!((test.status, test.seq), (DeliveryStatus::GivenUp, None));
    assert_eq!(queue.deliveries(hook, None, 1).await.unwrap(), [test]);
}

fn pusher() -> Actor {
    Actor { name: "github:octocat".into(), origin: "192.0.2.1".into(), request: None }
}

/// A push of a new commit, and its job.
async fn push(queue: &Queue, delivery: &str, now_ms: i64) -> i64 {
    let push = Push { delivery: delivery.into(), branch: "main".into() };
    match queue.take_push(&push, &ask("web"), &pusher(), now_ms).await.unwrap() {
        Taken::Now(submitted) => submitted.job.id,
        Taken::Before(job) => panic!("it was taken before, for job {job}"),
    }
}

pub(crate) async fn a_push_is_taken_once_and_marks_its_job(url: &str) {
    let queue = ready(url, &[]).await;
    app(&queue, "db").await;
    let source = PushSource {
        app: name("web"),
        repository: String::new(),
        branch: "main".into(),
        sealed: "sealed".into(),
        updated_at_ms: 1,
    };
    queue.set_push(&source, &actor()).await.unwrap();
    assert_eq!(queue.push_sources().await.unwrap(), std::slice::from_ref(&source));
    let (push, wanted) = (Push { delivery: "d1".into(), branch: "main".into() }, ask("web"));
    // The same delivery, twenty times at once.
    let mut tasks = JoinSet::new();
    for _ in 0..20 {
        let (queue, push, wanted) = (queue.clone(), push.clone(), wanted.clone());
        tasks.spawn(async move { queue.take_push(&push, &wanted, &pusher(), 2).await.unwrap() });
    }
    let taken = tasks.join_all().await;
    let fresh: Vec<_> = taken
        .iter()
        .filter_map(|taken| match taken {
            Taken::Now(submitted) => Some(&submitted.job),
            Taken::Before(_) => None,
        })
        .collect();
    let [job] = fresh[..] else { panic!("{taken:?}") };
    assert_eq!(job.requested_by, "github:octocat");
    assert_eq!(taken.iter().filter(|taken| **taken == Taken::Before(job.id)).count(), 19);
    assert_eq!(queue.jobs(None, 10).await.unwrap().len(), 1);
    // Taken again after its build has ended, too: it is no new wish.
    build(&queue, 1, 3).await;
    let again = queue.take_push(&push, &wanted, &pusher(), 9).await.unwrap();
    assert_eq!(again, Taken::Before(job.id));
    assert_eq!(queue.jobs(None, 10).await.unwrap().len(), 1);
    // Another app of the same repository builds it, too.
    let other = ask("db");
    assert!(matches!(queue.take_push(&push, &other, &pusher(), 9).await.unwrap(), Taken::Now(_)));
    queue.unset_push(&name("web"), &actor(), 10).await.unwrap();
    assert!(queue.push_source(&name("web")).await.is_err());
    assert!(queue.set_push(&PushSource { app: name("no"), ..source }, &actor()).await.is_err());
}

async fn upcoming(queue: &Queue) -> Vec<i64> {
    queue.upcoming().await.unwrap().into_iter().map(|upcoming| upcoming.job).collect()
}

/// Sets the goal that is to be set by itself.
async fn follow(queue: &Queue, job: i64) -> Result<i64, QueueError> {
    let choice = Choice::Following { name: queue.job(job).await.unwrap().name, job };
    let by = Actor { name: "auto_deploy".into(), origin: String::new(), request: None };
    let set = queue.set_goal(&name("web"), &choice, false, seal, &by, 50).await;
    set.map(|rollout| rollout.id)
}

pub(crate) async fn the_main_branch_is_deployed_forward_and_never_over_a_rollback(url: &str) {
    let queue = ready(url, &[]).await;
    let web = name("web");
    let old = push(&queue, "d0", 1).await;
    build(&queue, 1, 2).await;
    assert!(upcoming(&queue).await.is_empty(), "it is off by default");
    let refused = follow(&queue, old).await.unwrap_err().to_string();
    assert!(refused.contains("it is off"), "{refused}");
    queue.set_auto_deploy(&web, true, &actor(), 3).await.unwrap();
    let auto = queue.auto_deploy(&web).await.unwrap().unwrap();
    assert_eq!(auto, AutoDeploy { app: web.clone(), after_job: old, suspended: None });
    assert!(upcoming(&queue).await.is_empty(), "what was there is not deployed");
    // Nor by a coordinator that looked before it was switched on: the goal's own transaction looks, too.
    let refused = follow(&queue, old).await.unwrap_err().to_string();
    assert!(refused.contains("was there when it was switched on"), "{refused}");
    // A build that no push asked for is not the main branch's.
    submit(&queue, "web", 4).await;
    build(&queue, 2, 5).await;
    assert!(upcoming(&queue).await.is_empty());

    // Two pushes: the younger one is there first, and the older one does not come after it.
    let (one, two) = (push(&queue, "d1", 6).await, push(&queue, "d2", 7).await);
    let (first, first_lease) = claim(&queue, 8).await.unwrap();
    assert_eq!(first.id, one);
    build(&queue, 3, 9).await;
    assert_eq!(upcoming(&queue).await, [two]);
    follow(&queue, two).await.unwrap();
    assert!(upcoming(&queue).await.is_empty());
    assert!(follow(&queue, two).await.is_err(), "once");
    let end = End::Succeeded(stored(4));
    queue.finish(one, &first_lease, &end, &regions(&[EU]), 10).await.unwrap();
    copy_all(&queue).await;
    assert!(upcoming(&queue).await.is_empty());
    assert!(follow(&queue, one).await.is_err(), "never backwards");

    // An operator goes back: nothing is deployed by itself until he says so.
    let back = deploy(&queue, "web", &named(&queue.job(one).await.unwrap().name)).await.unwrap();
    let suspended = queue.auto_deploy(&web).await.unwrap().unwrap().suspended.unwrap();
    assert_eq!((suspended.by.as_str(), suspended.at_ms), ("alice", 50));
    assert!(suspended.reason.contains(&back.artifact_name), "{suspended:?}");
    let three = push(&queue, "d3", 11).await;
    build(&queue, 5, 12).await;
    assert!(upcoming(&queue).await.is_empty());
    let refused = follow(&queue, three).await.unwrap_err().to_string();
    assert!(refused.contains("alice deployed the older"), "{refused}");
    queue.resume_auto_deploy(&web, &actor(), 13).await.unwrap();
    // What he went back from stays away; what came since is deployed.
    assert_eq!(upcoming(&queue).await, [three]);
    follow(&queue, three).await.unwrap();
    // The same by a rollback, and nothing new since: nothing comes back.
    deploy(&queue, "web", &Choice::Previous).await.unwrap();
    let suspended = queue.auto_deploy(&web).await.unwrap().unwrap().suspended.unwrap();
    assert!(suspended.reason.starts_with("alice went back to"), "{suspended:?}");
    queue.set_auto_deploy(&web, true, &actor(), 14).await.unwrap();
    assert_eq!(queue.auto_deploy(&web).await.unwrap().unwrap().suspended, None);
    assert!(upcoming(&queue).await.is_empty());
    // A newer build that an operator deploys suspends nothing.
    let four = push(&queue, "d4", 15).await;
    build(&queue, 6, 16).await;
    deploy(&queue, "web", &named(&queue.job(four).await.unwrap().name)).await.unwrap();
    assert_eq!(queue.auto_deploy(&web).await.unwrap().unwrap().suspended, None);
    queue.set_auto_deploy(&web, false, &actor(), 17).await.unwrap();
    assert_eq!(queue.auto_deploy(&web).await.unwrap(), None);
    assert!(queue.resume_auto_deploy(&web, &actor(), 18).await.is_err());
    let who = queue.audit(100).await.unwrap();
    assert_eq!(who.iter().filter(|row| row.who == "auto_deploy").count(), 2);
}

pub(crate) async fn history_shows_builds_deployments_and_rollbacks(url: &str) {
    let queue = ready(url, &["web/file"]).await;
    app(&queue, "db").await;
    deploy(&queue, "web", &named("web/file")).await.unwrap();
    let job = submit(&queue, "web", 60).await;
    let built = build(&queue, 8, 61).await;
    let never = submit(&queue, "web", 70).await;
    queue.cancel(never.id, &actor(), 71).await.unwrap();
    let waiting = submit(&queue, "db", 80).await;
    // Deployed at 50 in `deploy`'s own time: before the builds.
    deploy(&queue, "web", &named(&built)).await.unwrap();
    deploy(&queue, "web", &Choice::Previous).await.unwrap();
    let all = queue.history(None, None, 100).await.unwrap();
    let shape: Vec<_> = all
        .iter()
        .map(|row| {
            let rollout = row.rollout.as_ref();
            (
                row.job.as_ref().map(|job| (job.id, job.status)),
                row.artifact.as_ref().map(|artifact| artifact.copies.len()),
                rollout.map(|rollout| (rollout.revision.number, rollout.status, rollout.rollback)),
            )
        })
        .collect();
    use RolloutStatus::{Running, Superseded};
    assert_eq!(
        shape,
        [
            (Some((waiting.id, JobStatus::Queued)), None, None),
            (Some((never.id, JobStatus::Cancelled)), None, None),
            (None, Some(1), Some((3, Running, true))),
            (Some((job.id, JobStatus::Succeeded)), Some(1), Some((2, Superseded, false))),
            (None, Some(1), Some((1, Superseded, false))),
        ]
    );
    let of_db = queue.history(Some(&[name("db")].into()), None, 100).await.unwrap();
    assert_eq!(of_db.len(), 1);
    assert_eq!(queue.history(None, None, 2).await.unwrap(), all[..2]);
    assert_eq!(queue.history(None, Some(all[1].place()), 100).await.unwrap(), all[2..]);
}

pub(crate) async fn old_history_goes_but_not_what_is_there(url: &str) {
    let queue = ready(url, &[]).await;
    let built = submit(&queue, "web", 1).await;
    build(&queue, 1, 2).await;
    let failed = push(&queue, "d1", 3).await;
    let (_, lease) = claim(&queue, 4).await.unwrap();
    let end = End::Failed { reason: "no".into(), retry: None };
    queue.finish(failed, &lease, &end, &[], 100).await.unwrap();
    let running = submit(&queue, "web", 5).await;
    claim(&queue, 6).await.unwrap();
    let waiting = submit(&queue, "web", 7).await;
    let late = submit(&queue, "web", 8).await;
    queue.cancel(late.id, &actor(), 101).await.unwrap();
    assert_eq!(queue.forget_history(100).await.unwrap(), 0);
    assert_eq!(queue.forget_history(101).await.unwrap(), 1);
    assert!(queue.job(failed).await.is_err() && queue.attempts(failed).await.unwrap().is_empty());
    for kept in [built.id, running.id, waiting.id, late.id] {
        queue.job(kept).await.unwrap();
    }
    assert_eq!(queue.forget_history(i64::MAX).await.unwrap(), 1);
    assert_eq!(queue.jobs(None, 10).await.unwrap().len(), 3);
}
