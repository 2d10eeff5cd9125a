//! Copies for as long as their artifact lives: inspected, repaired, kept, removed.

use std::collections::BTreeMap;

use shoal_proto::{
    RegionName,
    state::{MachineState, ReplicationStatus, RolloutStatus},
};
use shoal_queue::{CopyProgress, End, Plan, Queue, QueueError};
use tokio::task::JoinSet;

use super::{
    actor, app, claim, name,
    records::{EU, copy_all, deploy, end, named, publish, ready, report, state},
    regions, stored, submit,
};

fn eu() -> RegionName {
    EU.parse().unwrap()
}

fn went(plan: &Plan) -> Vec<&str> {
    plan.goes.iter().map(|it| it.name.as_str()).collect()
}

fn stayed(plan: &Plan) -> BTreeMap<&str, &str> {
    plan.stays.iter().map(|it| (it.name.as_str(), it.why.as_str())).collect()
}

/// Takes all runs that are due and ends them, with everything gone.
async fn remove_all(queue: &Queue, now_ms: i64) -> usize {
    let runs = queue.take_removals("me", now_ms, now_ms + 100).await.unwrap();
    for run in &runs {
        assert!(queue.removal_ends(run, "me", (&run.regions, true), now_ms).await.unwrap());
    }
    runs.len()
}

async fn audited(queue: &Queue) -> Vec<String> {
    queue.audit(1_000).await.unwrap().into_iter().map(|row| row.what).collect()
}

pub(crate) async fn a_damaged_copy_is_not_deployable_until_it_is_copied_again(url: &str) {
    let queue = ready(url, &["web/a"]).await;
    let it = stored(1);
    let of = (&it.artifact, &it.encoding, &eu());
    let reason = "lost part-00001";
    assert!(queue.copy_damaged(of, (reason, &[1, 3]), &actor(), 100).await.unwrap());
    assert!(!queue.copy_damaged(of, (reason, &[1]), &actor(), 100).await.unwrap(), "told once");
    assert_eq!(queue.damaged().await.unwrap(), (0, 1));
    let artifact = queue.artifact("web/a", None).await.unwrap();
    let standing = artifact.standing(&queue.regions().await.unwrap());
    assert_eq!(standing.status, ReplicationStatus::Failed);
    let why = standing.reason.unwrap();
    assert!(why.contains("region eu lost part-00001"), "{why}");
    let refused = deploy(&queue, "web", &named("web/a")).await.unwrap_err();
    assert!(refused.to_string().contains(&why), "one reason everywhere: {refused}");
    let copy = queue.take_copy("me", &[], 101, 200).await.unwrap().unwrap();
    assert_eq!(copy.doubted, [1, 3]);
    assert!(queue.copy_complete(&copy, "me", 7, 150).await.unwrap());
    let artifact = queue.artifact("web/a", None).await.unwrap();
    assert_eq!(artifact.standing(&queue.regions().await.unwrap()).reason, None);
    assert_eq!(artifact.copies[&eu()].checked_at_ms, Some(150));
    deploy(&queue, "web", &named("web/a")).await.unwrap();
    let audited = audited(&queue).await;
    assert_eq!(audited.iter().filter(|what| what.starts_with("copy.")).count(), 2, "{audited:?}");
    assert_eq!(queue.damaged().await.unwrap(), (0, 0));
}

pub(crate) async fn a_damaged_main_bucket_is_told_and_repaired(url: &str) {
    let queue = ready(url, &["web/a"]).await;
    queue.inspect_all().await.unwrap();
    let it = stored(1);
    let of = (&it.artifact, &it.encoding);
    assert!(queue.main_damaged(of, ("lost its index", &[2]), &actor(), 100).await.unwrap());
    assert!(!queue.main_damaged(of, ("lost its index", &[]), &actor(), 100).await.unwrap());
    let refused = deploy(&queue, "web", &named("web/a")).await.unwrap_err().to_string();
    assert!(refused.contains("main bucket lost its index"), "{refused}");
    let repair = queue.next_repair(100).await.unwrap().unwrap();
    assert_eq!((repair.doubted.as_slice(), repair.regions.as_slice()), (&[2][..], &[eu()][..]));
    queue.repair_failed(&repair, "lost its index, and no region has it", 500).await.unwrap();
    assert_eq!(queue.next_repair(499).await.unwrap(), None);
    let artifact = queue.artifact("web/a", None).await.unwrap();
    assert_eq!(artifact.main_damage.unwrap(), "lost its index, and no region has it");
    let again = queue.next_repair(500).await.unwrap().unwrap();
    assert_eq!(again.tries, 1);
    assert!(queue.is_main_damaged(of.0, of.1).await.unwrap());
    assert!(queue.main_repaired(of, &actor(), 600).await.unwrap());
    assert!(!queue.is_main_damaged(of.0, of.1).await.unwrap());
    assert!(!queue.main_repaired(of, &actor(), 600).await.unwrap());
    deploy(&queue, "web", &named("web/a")).await.unwrap();
    let audited = audited(&queue).await;
    assert!(audited.contains(&"main.repaired".into()) && audited.contains(&"main.damaged".into()));
}

pub(crate) async fn what_was_inspected_longest_ago_is_next(url: &str) {
    let queue = ready(url, &["web/a", "web/b", "web/c"]).await;
    assert_eq!(queue.inspect_all().await.unwrap(), 3);
    // They were made at 10, so at 10 and before nothing is due.
    assert_eq!(queue.next_inspection(10).await.unwrap(), None);
    for now in [100, 200, 300] {
        let next = queue.next_inspection(11).await.unwrap().unwrap();
        assert_eq!((next.regions.as_slice(), next.urgent), (&[eu()][..], false));
        queue.inspected(&next, &next.regions, now).await.unwrap();
    }
    assert_eq!(queue.next_inspection(11).await.unwrap(), None);
    assert_eq!(queue.oldest_inspection_ms().await.unwrap(), Some(100));
    let first = queue.next_inspection(1_000).await.unwrap().unwrap();
    let artifact = queue.artifact(&first.artifact.to_string(), None).await.unwrap();
    assert_eq!(artifact.copies[&eu()].checked_at_ms, Some(100));
    // What is asked for comes at once, before what is due; what a goal names before that.
    let it = stored(3);
    assert!(queue.inspect_soon(&it.artifact, &it.encoding).await.unwrap());
    assert!(!queue.inspect_soon(&it.artifact, &stored(9).encoding).await.unwrap());
    let next = queue.next_inspection(1_000).await.unwrap().unwrap();
    assert_eq!((next.artifact, next.urgent), (it.artifact, true));
    deploy(&queue, "web", &named("web/b")).await.unwrap();
    // A region that comes back may have lost anything.
    queue.drain(&eu(), true, None, &actor(), 400).await.unwrap();
    let without = queue.next_inspection(1_000).await.unwrap().unwrap();
    assert!(without.regions.is_empty(), "a drained region is not looked at");
    queue.drain(&eu(), false, None, &actor(), 500).await.unwrap();
    for (at, want) in [2, 3, 1].into_iter().enumerate() {
        let next = queue.next_inspection(0).await.unwrap().unwrap();
        assert!(next.urgent);
        // Of the others, both made at the same time, either may be first.
        if at == 0 {
            assert_eq!(next.artifact, stored(want).artifact);
        }
        queue.inspected(&next, &next.regions, 600).await.unwrap();
    }
    assert_eq!(queue.next_inspection(0).await.unwrap(), None);
}

pub(crate) async fn what_a_region_missed_comes_in_use_first_then_the_newest(url: &str) {
    let queue = ready(url, &["web/run"]).await;
    queue.set_regions(&regions(&["eu", "us"]), 20).await.unwrap();
    let us: RegionName = "us".parse().unwrap();
    queue.drain(&us, true, None, &actor(), 30).await.unwrap();
    let all = regions(&["eu", "us"]);
    for (seed, at) in [(2, 40), (3, 50), (4, 60)] {
        let artifact = format!("web/{seed}");
        queue.publish(&name("web"), &artifact, &stored(seed), &all, &actor(), at).await.unwrap();
    }
    copy_all(&queue).await;
    // Out of service it holds up nothing, and gets nothing.
    deploy(&queue, "web", &named("web/2")).await.unwrap();
    assert_eq!(queue.next_copy_due_ms().await.unwrap(), None);
    queue.drain(&us, false, None, &actor(), 70).await.unwrap();
    queue.publish(&name("web"), "web/new", &stored(5), &all, &actor(), 80).await.unwrap();
    let mut copies = vec![];
    while let Some(copy) = queue.take_copy("me", &[eu()], 90, 1_000).await.unwrap() {
        copies.push(copy);
    }
    let order: Vec<_> = copies.iter().map(|copy| copy.artifact).collect();
    // What runs, what is made now, and then what was missed.
    assert_eq!(order, [2, 5, 4, 3].map(|seed| stored(seed).artifact));
    // Who copies into a region that is drained hears that it does not any more.
    queue.drain(&us, true, None, &actor(), 100).await.unwrap();
    queue.drain(&us, false, None, &actor(), 101).await.unwrap();
    for copy in &copies {
        assert!(!queue.copy_progress(copy, "me", CopyProgress::default(), 2_000).await.unwrap());
    }
}

pub(crate) async fn the_last_of_each_app_and_what_is_used_stay(url: &str) {
    let queue = Queue::open(url).await.unwrap();
    queue.set_regions(&regions(&[EU]), 0).await.unwrap();
    app(&queue, "web").await;
    app(&queue, "api").await;
    for seed in 1..=9u8 {
        let artifact = format!("web/{seed}");
        let at = i64::from(seed) * 10;
        let all = regions(&[EU]);
        queue.publish(&name("web"), &artifact, &stored(seed), &all, &actor(), at).await.unwrap();
    }
    publish(&queue, "api", "api/1", 20).await;
    copy_all(&queue).await;
    // 1 and 2 ran, 2 is what one would go back to, 3 is the goal; m1 runs 1 and ran 4 before, m2 is on its way to 5.
    let mut last = None;
    for seed in [4, 1, 5, 2, 3] {
        let rollout = deploy(&queue, "web", &named(&format!("web/{seed}"))).await.unwrap();
        if matches!(seed, 1 | 4) {
            let mut seen = state("m1", rollout.revision, 1, MachineState::Active);
            seen.report.artifact = stored(seed).artifact;
            report(&queue, EU, &[seen]).await;
        }
        if seed == 5 {
            let mut seen = state("m2", rollout.revision, 1, MachineState::Fetching);
            seen.report.artifact = stored(seed).artifact;
            report(&queue, EU, &[seen]).await;
        }
        end(&queue, &rollout, RolloutStatus::Succeeded).await;
        last = Some(rollout);
    }
    queue.pin("web/6", Some("for the audit"), &actor(), 100).await.unwrap();
    let plan = queue.retention_plan(&name("web"), 1).await.unwrap();
    assert_eq!(went(&plan), ["web/8", "web/7"]);
    let why = stayed(&plan);
    assert!(why["web/9"].contains("among the last 1 of web"), "{why:?}");
    assert_eq!(why["web/6"], "pinned by alice: for the audit");
    assert!(why["web/5"].contains("1 machines have it"), "{why:?}");
    assert!(why["web/4"].contains("ran it before"), "{why:?}");
    assert!(why["web/1"].contains("1 machines run it"), "{why:?}");
    assert!(why["web/2"].contains("shoal rollback web"), "{why:?}");
    assert_eq!(why["web/3"], "it is the goal of web");
    assert_eq!(plan.freed_bytes, 2 * stored(1).encoded_bytes);
    // A plan changes nothing; doing it does what it said.
    assert_eq!(queue.retention_plan(&name("web"), 1).await.unwrap(), plan);
    let done = queue.retain(&name("web"), 1, &actor(), 200).await.unwrap();
    assert_eq!((went(&done), done.freed_bytes), (went(&plan), plan.freed_bytes));
    assert_eq!(stayed(&done), why);
    assert_eq!(queue.removals_open().await.unwrap(), 2);
    assert!(queue.retain(&name("web"), 1, &actor(), 200).await.unwrap().goes.is_empty());
    // A pin that goes, a goal that changes, and a job that builds the same commit.
    assert!(queue.unpin("web/6", &actor(), 210).await.unwrap());
    assert!(!queue.unpin("web/6", &actor(), 210).await.unwrap());
    assert_eq!(went(&queue.retain(&name("web"), 1, &actor(), 220).await.unwrap()), ["web/6"]);
    assert!(queue.pins(10).await.unwrap().is_empty());
    let rollout = last.unwrap();
    let next = deploy(&queue, "web", &named("web/9")).await.unwrap();
    assert!(next.revision > rollout.revision);
    let plan = queue.retention_plan(&name("web"), 0).await.unwrap();
    assert!(stayed(&plan)["web/9"].contains("goal"), "{plan:?}");
    assert!(stayed(&plan)["web/3"].contains("rollback"), "{plan:?}");
    assert_eq!(went(&plan), ["web/2"]);
    // Another app's are its own.
    assert_eq!(went(&queue.retention_plan(&name("api"), 0).await.unwrap()), ["api/1"]);
    assert!(audited(&queue).await.iter().filter(|what| *what == "artifact.delete").count() == 3);
    // Built again, it is kept while its build goes on.
    let job = submit(&queue, "api", 300).await;
    let (_, lease) = claim(&queue, 301).await.unwrap();
    let end_of = End::Succeeded(stored(30));
    queue.finish(job.id, &lease, &end_of, &regions(&[EU]), 302).await.unwrap();
    let ask = shoal_queue::Ask { commit: job.commit.clone(), ..super::ask("api") };
    queue.submit(&ask, &actor(), 303).await.unwrap();
    let plan = queue.retention_plan(&name("api"), 0).await.unwrap();
    assert!(stayed(&plan)[job.name.as_str()].contains("builds its commit again"), "{plan:?}");
}

pub(crate) async fn names_that_share_an_encoding_share_its_end(url: &str) {
    let queue = ready(url, &["web/a"]).await;
    app(&queue, "api").await;
    publish(&queue, "api", "api/a", 1).await;
    let done = queue.retain(&name("web"), 0, &actor(), 100).await.unwrap();
    assert_eq!((went(&done), done.freed_bytes), (vec!["web/a"], 0), "its objects are api's, too");
    assert_eq!(queue.take_removals("me", 100, 200).await.unwrap(), []);
    let shared = queue.artifact("api/a", None).await.unwrap();
    assert_eq!(shared.copies[&eu()].status, ReplicationStatus::Complete);
    // The id means the one that lives.
    let by_id = queue.artifact(&stored(1).artifact.to_string(), None).await.unwrap();
    assert_eq!(by_id.name, "api/a");
    let done = queue.retain(&name("api"), 0, &actor(), 100).await.unwrap();
    assert_eq!(done.freed_bytes, stored(1).encoded_bytes);
    let runs = queue.take_removals("me", 100, 200).await.unwrap();
    assert_eq!(runs.len(), 1);
    assert!(runs[0].main && runs[0].regions == [eu()]);
}

pub(crate) async fn a_deleted_artifact_stays_on_record_and_is_made_again(url: &str) {
    let queue = ready(url, &["web/a", "web/b"]).await;
    queue.retain(&name("web"), 0, &actor(), 100).await.unwrap();
    let artifact = queue.artifact("web/a", None).await.unwrap();
    let deleted = artifact.deleted.clone().unwrap();
    assert_eq!((deleted.at_ms, deleted.by.as_str()), (100, "alice"));
    assert!(artifact.copies.is_empty(), "no copy counts any more");
    let refused = deploy(&queue, "web", &named("web/a")).await.unwrap_err().to_string();
    assert!(refused.contains("deleted") && refused.contains("shoal publish FILE"), "{refused}");
    assert!(matches!(queue.pin("web/a", None, &actor(), 1).await, Err(QueueError::Conflict(_))));
    assert_eq!(queue.want_everywhere("web/a", 1).await.unwrap(), 0);
    assert_eq!(queue.inspect_all().await.unwrap(), 0, "nothing of it is inspected");
    let id = stored(1);
    assert!(!queue.inspect_soon(&id.artifact, &id.encoding).await.unwrap());
    // Before anybody removes anything its objects are all there: it lives again, and nothing is removed.
    publish(&queue, "web", "web/a", 1).await;
    let again = queue.artifact("web/a", None).await.unwrap();
    assert_eq!((again.deleted, again.copies[&eu()].status), (None, ReplicationStatus::Pending));
    assert_eq!(queue.inspect_all().await.unwrap(), 1);
    assert_eq!(remove_all(&queue, 200).await, 1, "only of the other one");
    copy_all(&queue).await;
    deploy(&queue, "web", &named("web/a")).await.unwrap();
    // After it, the same.
    assert!(queue.artifact("web/b", None).await.unwrap().deleted.is_some());
    publish(&queue, "web", "web/b", 2).await;
    assert_eq!(remove_all(&queue, 300).await, 0);
    copy_all(&queue).await;
    deploy(&queue, "web", &named("web/b")).await.unwrap();
    assert_eq!(queue.inspect_all().await.unwrap(), 2);
}

pub(crate) async fn a_removal_is_begun_once_and_taken_over(url: &str) {
    let queue = ready(url, &["web/a"]).await;
    queue.retain(&name("web"), 0, &actor(), 100).await.unwrap();
    assert_eq!(queue.take_copy("me", &[], 100, 200).await.unwrap(), None, "nobody copies it");
    let runs = queue.take_removals("one", 100, 200).await.unwrap();
    let run = &runs[0];
    assert_eq!(queue.take_removals("two", 150, 250).await.unwrap(), []);
    assert!(queue.removal_goes_on(run, "one", 300).await.unwrap());
    assert_eq!(queue.take_removals("two", 250, 350).await.unwrap(), []);
    // Its owner is silent past its time: another one begins it again, and the first can say nothing about it.
    let again = queue.take_removals("two", 301, 400).await.unwrap();
    assert_eq!((again.len(), again[0].tries), (1, 2));
    assert!(!queue.removal_goes_on(run, "one", 500).await.unwrap());
    assert!(!queue.removal_ends(run, "one", (&[eu()], true), 500).await.unwrap());
    // A bucket that fails is due again at its time.
    assert!(queue.removal_ends(&again[0], "two", (&[], true), 500).await.unwrap());
    assert_eq!(queue.take_removals("two", 499, 600).await.unwrap(), []);
    let rest = queue.take_removals("two", 500, 600).await.unwrap();
    assert_eq!((rest[0].main, rest[0].regions.as_slice()), (false, &[eu()][..]));
    assert!(queue.removal_ends(&rest[0], "two", (&[eu()], true), 600).await.unwrap());
    assert_eq!(queue.removals_open().await.unwrap(), 0);
    assert_eq!(queue.take_removals("two", 10_000, 11_000).await.unwrap(), []);
}

pub(crate) async fn what_is_drained_is_removed_later_unless_it_is_wanted_again(url: &str) {
    for wanted in [false, true] {
        let queue = ready(url, &[]).await;
        let artifact = format!("web/{wanted}");
        let seed = 1 + u8::from(wanted);
        publish(&queue, "web", &artifact, seed).await;
        copy_all(&queue).await;
        queue.drain(&eu(), true, None, &actor(), 50).await.unwrap();
        queue.retain(&name("web"), 0, &actor(), 100).await.unwrap();
        let runs = queue.take_removals("me", 100, 200).await.unwrap();
        assert_eq!((runs[0].regions.as_slice(), runs[0].main), (&[][..], true));
        assert!(queue.removal_ends(&runs[0], "me", (&[], true), 100).await.unwrap());
        assert_eq!(queue.take_removals("me", 100, 200).await.unwrap(), [], "nothing to be done");
        assert_eq!(queue.removals_open().await.unwrap(), 1);
        if wanted {
            publish(&queue, "web", &artifact, seed).await;
        }
        queue.drain(&eu(), false, None, &actor(), 300).await.unwrap();
        let runs = queue.take_removals("me", 300, 400).await.unwrap();
        if wanted {
            assert_eq!(runs, [], "what is left there is the beginning of its copy");
            let copy = queue.take_copy("me", &[], 300, 400).await.unwrap().unwrap();
            assert_eq!(copy.artifact, stored(seed).artifact);
        } else {
            assert_eq!((runs[0].regions.as_slice(), runs[0].main), (&[eu()][..], false));
            assert!(queue.removal_ends(&runs[0], "me", (&[eu()], true), 300).await.unwrap());
        }
        assert_eq!(queue.removals_open().await.unwrap(), 0);
    }
}

pub(crate) async fn objects_seen_before_a_removal_give_no_name(url: &str) {
    let queue = ready(url, &["web/a"]).await;
    let (it, all) = (stored(1), regions(&[EU]));
    let generation = async || queue.generation(&it.artifact, &it.encoding).await.unwrap();
    let seen = generation().await;
    assert_eq!(seen, Some(0));
    let job = submit(&queue, "web", 1).await;
    let (_, lease) = claim(&queue, 2).await.unwrap();
    queue.retain(&name("web"), 0, &actor(), 100).await.unwrap();
    let (web, alice, built) = (name("web"), actor(), End::Succeeded(stored(1)));
    let publish = |seen| queue.publish_seen(&web, "web/b", (&it, seen), &all, &alice, 110);
    let finish = |seen| queue.finish_seen(job.id, &lease, (&built, seen), &all, 110);
    let gone = |error: QueueError| matches!(error, QueueError::ObjectsGone(_));
    // While they are removed nobody may count on them.
    let runs = queue.take_removals("me", 100, 200).await.unwrap();
    assert_eq!(generation().await, None);
    for seen in [seen, None] {
        assert!(gone(publish(seen).await.unwrap_err()));
        assert!(gone(finish(seen).await.unwrap_err()));
    }
    assert!(queue.removal_ends(&runs[0], "me", (&[eu()], true), 120).await.unwrap());
    // Nor afterwards on what was seen before.
    assert!(gone(publish(seen).await.unwrap_err()));
    assert!(gone(finish(seen).await.unwrap_err()));
    assert!(matches!(queue.artifact("web/b", None).await, Err(QueueError::NotFound(_))));
    assert_eq!(queue.job(job.id).await.unwrap().artifact, None, "it runs on");
    // What was uploaded since is there.
    let seen = generation().await;
    assert_eq!(seen, Some(1));
    finish(seen).await.unwrap();
    publish(seen).await.unwrap();
    assert_eq!(queue.take_removals("me", 1_000, 1_100).await.unwrap(), []);
    assert!(queue.artifact(&job.name, None).await.unwrap().deleted.is_none());
}

pub(crate) async fn names_given_and_removals_begun_at_once_never_meet(url: &str) {
    const ROUNDS: u32 = 15;
    const NAMES: u32 = 4;
    let queue = ready(url, &[]).await;
    let it = stored(1);
    let mut refused = 0;
    for round in 0..ROUNDS {
        queue.publish(&name("web"), "web/a", &it, &regions(&[EU]), &actor(), 1).await.unwrap();
        let mut jobs = vec![];
        for _ in 0..NAMES {
            submit(&queue, "web", 2).await;
            jobs.push(claim(&queue, 3).await.unwrap());
        }
        let seen = queue.generation(&it.artifact, &it.encoding).await.unwrap();
        queue.retain(&name("web"), 0, &actor(), 4).await.unwrap();
        let mut tasks = JoinSet::new();
        for (job, lease) in jobs {
            let queue = queue.clone();
            tasks.spawn(async move {
                let end = End::Succeeded(stored(1));
                let all = regions(&[EU]);
                queue.finish_seen(job.id, &lease, (&end, seen), &all, 5).await.err()
            });
        }
        let runs = queue.take_removals("me", 10, 100).await.unwrap();
        let errors: Vec<_> = tasks.join_all().await.into_iter().flatten().collect();
        assert!(errors.iter().all(|e| matches!(e, QueueError::ObjectsGone(_))), "{errors:?}");
        // Either all names were given and nothing is removed, or it is removed and none was.
        match runs.len() {
            0 => assert!(errors.is_empty(), "{round}: {errors:?}"),
            _ => {
                assert_eq!(errors.len(), NAMES as usize, "{round}");
                refused += 1;
                assert!(queue.removal_ends(&runs[0], "me", (&[eu()], true), 5).await.unwrap());
            }
        }
    }
    assert!(refused <= ROUNDS);
}

pub(crate) async fn a_goal_or_a_pin_at_the_moment_of_deletion_wins_or_is_refused(url: &str) {
    for round in 0..10u8 {
        let artifact = format!("web/{round}");
        let queue = ready(url, &[]).await;
        publish(&queue, "web", &artifact, 100 + round).await;
        copy_all(&queue).await;
        let (one, two) = (queue.clone(), queue.clone());
        let (named_a, named_b) = (artifact.clone(), artifact.clone());
        let sets = tokio::spawn(async move {
            if round % 2 == 0 {
                deploy(&one, "web", &named(&named_a)).await.map(drop)
            } else {
                one.pin(&named_a, None, &actor(), 60).await
            }
        });
        let deletes = tokio::spawn(async move {
            let done = two.retain(&name("web"), 0, &actor(), 61).await.unwrap();
            done.goes.iter().any(|it| it.name == named_b)
        });
        let (set, deleted) = (sets.await.unwrap(), deletes.await.unwrap());
        assert_eq!(set.is_err(), deleted, "{round}: {set:?}");
        let now = queue.artifact(&artifact, None).await.unwrap();
        assert_eq!(now.deleted.is_some(), deleted);
    }
}
