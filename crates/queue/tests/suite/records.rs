//! Artifacts, goals, rollouts, machines, regions.

use std::collections::BTreeMap;

use shoal_proto::{
    Revision,
    goal::{Labels, RolloutPlan},
    region::{FetchProgress, MachineReport},
    state::{MachineState, ReplicationStatus, RolloutStatus},
};
use shoal_queue::{
    Choice, CopyProgress, Drain, End, GoalDraft, MachineCursor, MachineSeen, Progress, Queue,
    QueueError, Result, Rollout, SealedGoal, StateSeen, Targets,
};

use super::{actor, app, claim, name, regions, stored, submit};

pub(super) const EU: &str = "eu";

pub(super) fn seal(draft: &GoalDraft<'_>) -> Result<SealedGoal> {
    Ok(SealedGoal {
        signed: format!("{} {}", draft.revision, draft.artifact.name),
        selector: "role=web".into(),
        plan: RolloutPlan::default(),
        targets: Targets::from([(EU.parse().unwrap(), 3)]),
    })
}

pub(super) async fn deploy(queue: &Queue, app: &str, choice: &Choice) -> Result<Rollout> {
    let rollback = matches!(choice, Choice::Previous);
    queue.set_goal(&name(app), choice, rollback, seal, &actor(), 50).await
}

pub(super) fn named(name: &str) -> Choice {
    Choice::Named(name.into())
}

pub(super) async fn publish(queue: &Queue, app: &str, artifact: &str, seed: u8) {
    let all: Vec<_> =
        queue.regions().await.unwrap().into_iter().map(|region| region.name).collect();
    queue.publish(&name(app), artifact, &stored(seed), &all, &actor(), 10).await.unwrap();
}

pub(super) async fn copy_all(queue: &Queue) {
    while let Some(job) = queue.take_copy("me", &[], 20, 1_000).await.unwrap() {
        assert!(queue.copy_complete(&job, "me", 7, 30).await.unwrap());
    }
}

pub(super) async fn end(queue: &Queue, rollout: &Rollout, status: RolloutStatus) -> bool {
    let none = Progress::new();
    queue.end_rollout(rollout.id, status, "done", &none, &actor(), 60).await.unwrap().1
}

/// A database with a region, the app `web`, and its whole artifacts.
pub(super) async fn ready(url: &str, artifacts: &[&str]) -> Queue {
    let queue = Queue::open(url).await.unwrap();
    queue.set_regions(&regions(&[EU]), 0).await.unwrap();
    app(&queue, "web").await;
    for (seed, artifact) in (1..).zip(artifacts) {
        publish(&queue, "web", artifact, seed).await;
    }
    copy_all(&queue).await;
    queue
}

pub(crate) async fn copies_are_owned_tried_again_and_taken_over(url: &str) {
    let queue = Queue::open(url).await.unwrap();
    queue.set_regions(&regions(&["eu", "us"]), 0).await.unwrap();
    app(&queue, "web").await;
    publish(&queue, "web", "web/a", 1).await;
    queue.drain(&EU.parse().unwrap(), true, None, &actor(), 1).await.unwrap();
    let us = queue.take_copy("one", &[], 100, 200).await.unwrap().unwrap();
    assert_eq!(us.region.as_str(), "us");
    assert_eq!(queue.take_copy("one", &[], 100, 200).await.unwrap(), None, "eu is drained");
    queue.drain(&EU.parse().unwrap(), false, None, &actor(), 2).await.unwrap();
    let at = |bytes_done| CopyProgress { bytes_done, bytes_per_s: 1 };
    let eu = queue.take_copy("one", &[], 100, 200).await.unwrap().unwrap();
    assert_eq!((eu.region.as_str(), eu.tries), (EU, 1));
    assert_eq!(queue.take_copy("two", &[], 150, 250).await.unwrap(), None, "both are owned");
    assert!(queue.copy_progress(&eu, "one", at(5), 300).await.unwrap());
    let artifact = queue.artifact("web/a", None).await.unwrap();
    let copy = &artifact.copies[&eu.region];
    assert_eq!((copy.status, copy.bytes_done), (ReplicationStatus::Copying, 5));
    // Its owner is silent past its time: another takes it over, and the first can no longer end it.
    assert_eq!(queue.take_copy("two", &[], 250, 350).await.unwrap().unwrap().region, us.region);
    let taken = queue.take_copy("two", &[], 301, 400).await.unwrap().unwrap();
    assert_eq!((&taken.region, taken.tries), (&eu.region, 2));
    assert!(!queue.copy_progress(&eu, "one", at(6), 500).await.unwrap());
    assert!(!queue.copy_complete(&eu, "one", 6, 310).await.unwrap());
    assert!(!queue.copy_failed(&eu, "one", "x", 310).await.unwrap());
    // A failure is due again at its time, not before.
    assert!(queue.copy_failed(&taken, "two", "the bucket is full", 500).await.unwrap());
    assert_eq!(queue.next_copy_due_ms().await.unwrap(), Some(500));
    assert_eq!(
        queue.take_copy("two", std::slice::from_ref(&us.region), 499, 900).await.unwrap(),
        None
    );
    assert_eq!(queue.take_copy("two", &regions(&["eu", "us"]), 501, 900).await.unwrap(), None);
    let again =
        queue.take_copy("two", std::slice::from_ref(&us.region), 500, 900).await.unwrap().unwrap();
    assert!(queue.copy_complete(&again, "two", 9, 600).await.unwrap());
    let artifact = queue.artifact("web/a", None).await.unwrap();
    let copy = &artifact.copies[&eu.region];
    assert_eq!(
        (copy.status, copy.bytes_done, copy.finished_at_ms),
        (ReplicationStatus::Complete, 9, Some(600))
    );
    assert_eq!(copy.reason, None);
    // What a stopping owner gives back is due at once.
    assert_eq!(queue.give_back_copies("two").await.unwrap(), 1);
    let back = queue.take_copy("three", &[], 260, 900).await.unwrap().unwrap();
    assert_eq!(back.region, us.region);
}

pub(crate) async fn publishing_is_idempotent(url: &str) {
    let queue = Queue::open(url).await.unwrap();
    queue.set_regions(&regions(&[EU]), 0).await.unwrap();
    app(&queue, "web").await;
    app(&queue, "api").await;
    let publish = async |app: &str, artifact: &str, seed, now| {
        let all = regions(&[EU]);
        queue.publish(&name(app), artifact, &stored(seed), &all, &actor(), now).await
    };
    let first = publish("web", "web/a", 1, 10).await.unwrap();
    assert_eq!(publish("web", "web/a", 1, 20).await.unwrap(), first);
    assert!(matches!(publish("web", "web/a", 2, 20).await, Err(QueueError::Conflict(_))));
    assert!(matches!(publish("no", "no/a", 1, 20).await, Err(QueueError::NotFound(_))));
    // Another app's name for the same encoding shares its copy.
    copy_all(&queue).await;
    let shared = publish("api", "api/a", 1, 30).await.unwrap();
    assert_eq!(shared.copies[&EU.parse().unwrap()].status, ReplicationStatus::Complete);
}

pub(crate) async fn an_artifact_is_found_by_name_and_id(url: &str) {
    let queue = ready(url, &["web/a", "web/b"]).await;
    app(&queue, "api").await;
    publish(&queue, "api", "api/a", 1).await;
    let id = stored(1).artifact.to_string();
    assert_eq!(queue.artifact("web/b", None).await.unwrap().stored, stored(2));
    assert_eq!(queue.artifact(&id, Some(&name("web"))).await.unwrap().name, "web/a");
    assert_eq!(queue.artifact(&id, Some(&name("api"))).await.unwrap().name, "api/a");
    assert!(queue.artifact(&id, None).await.is_ok());
    for unknown in ["web/c", &stored(9).artifact.to_string(), "", "'; DROP TABLE jobs; --"] {
        assert!(matches!(queue.artifact(unknown, None).await, Err(QueueError::NotFound(_))));
    }
    let names =
        |list: Vec<shoal_queue::Artifact>| list.into_iter().map(|a| a.name).collect::<Vec<_>>();
    assert_eq!(names(queue.artifacts(Some(&name("web")), 10).await.unwrap()), ["web/a", "web/b"]);
    assert_eq!(queue.artifacts(None, 2).await.unwrap().len(), 2);
}

pub(crate) async fn revisions_rise_and_goals_are_told_by_cursor(url: &str) {
    let queue = ready(url, &["web/a", "web/b"]).await;
    app(&queue, "api").await;
    publish(&queue, "api", "api/a", 1).await;
    assert_eq!(queue.goals_after(0).await.unwrap().cursor, 0);
    let first = deploy(&queue, "web", &named("web/a")).await.unwrap();
    assert_eq!(first.revision, Revision { epoch: 1, number: 1 });
    assert_eq!(first.status, RolloutStatus::Running);
    assert_eq!(first.selector, "role=web");
    assert_eq!(first.encoded_bytes, stored(1).encoded_bytes);
    assert!(first.newest);
    let all = queue.goals_after(0).await.unwrap();
    assert_eq!(all.signed, ["1.1 web/a"]);
    assert_eq!(queue.goals_after(all.cursor).await.unwrap().signed, Vec::<String>::new());
    deploy(&queue, "api", &named("api/a")).await.unwrap();
    let second = deploy(&queue, "web", &named("web/b")).await.unwrap();
    assert_eq!(second.revision.number, 2);
    // Each app's newest goal only, in the order in which they were set.
    assert_eq!(queue.goals_after(0).await.unwrap().signed, ["1.1 api/a", "1.2 web/b"]);
    assert_eq!(queue.goals_after(all.cursor).await.unwrap().signed.len(), 2);
    // A cursor from before a restore asks for all.
    assert_eq!(queue.goals_after(1_000).await.unwrap().signed.len(), 2);
    queue.raise_epoch(7, &actor(), 60).await.unwrap();
    assert!(matches!(queue.raise_epoch(7, &actor(), 60).await, Err(QueueError::Conflict(_))));
    let third = deploy(&queue, "web", &named("web/a")).await.unwrap();
    assert_eq!(third.revision, Revision { epoch: 7, number: 3 });
    assert!(third.revision > second.revision);
    // Nor does one that stood further on before the restore miss the first goal after it.
    assert_eq!(queue.goals_after(1_000).await.unwrap().signed, ["7.3 web/a"]);
}

pub(crate) async fn only_whole_artifacts_of_the_app_are_deployed(url: &str) {
    let queue = Queue::open(url).await.unwrap();
    queue.set_regions(&regions(&["eu", "us"]), 0).await.unwrap();
    app(&queue, "web").await;
    app(&queue, "api").await;
    publish(&queue, "web", "web/a", 1).await;
    let refused = |result: Result<Rollout>| result.unwrap_err();
    assert!(matches!(
        refused(deploy(&queue, "no", &named("web/a")).await),
        QueueError::NotFound(_)
    ));
    assert!(matches!(
        refused(deploy(&queue, "web", &named("web/x")).await),
        QueueError::NotFound(_)
    ));
    let other = refused(deploy(&queue, "api", &named("web/a")).await);
    assert!(matches!(&other, QueueError::Conflict(text) if text.contains("of web")), "{other}");
    let us = regions(&["us"]);
    let eu = queue.take_copy("me", &us, 20, 1_000).await.unwrap().unwrap();
    queue.copy_complete(&eu, "me", 1, 30).await.unwrap();
    let pending = refused(deploy(&queue, "web", &named("web/a")).await);
    let text = pending.to_string();
    assert!(matches!(pending, QueueError::NotDeployable { .. }));
    assert!(text.contains("us (PENDING)") && !text.contains("eu ("), "{text}");
    // A region out of service holds nothing up, and does again when it is back.
    queue.drain(&us[0], true, None, &actor(), 40).await.unwrap();
    deploy(&queue, "web", &named("web/a")).await.unwrap();
    queue.drain(&us[0], false, None, &actor(), 41).await.unwrap();
    assert!(deploy(&queue, "web", &named("web/a")).await.is_err());
    // A region that is new has nothing of an artifact that no goal names.
    copy_all(&queue).await;
    queue.set_regions(&regions(&["eu", "us", "new"]), 45).await.unwrap();
    let text = refused(deploy(&queue, "web", &named("web/a")).await).to_string();
    assert!(text.contains("new (PENDING)"), "{text}");
}

pub(crate) async fn a_refused_goal_leaves_nothing_behind(url: &str) {
    let queue = ready(url, &["web/a"]).await;
    let no = |_: &GoalDraft<'_>| Err(QueueError::Refused("too long".into()));
    let refused = queue.set_goal(&name("web"), &named("web/a"), false, no, &actor(), 50).await;
    assert!(matches!(refused, Err(QueueError::Refused(_))));
    assert!(queue.open_rollouts().await.unwrap().is_empty());
    assert_eq!(queue.goals_after(0).await.unwrap(), shoal_queue::GoalsAfter::default());
    assert!(queue.audit(100).await.unwrap().iter().all(|row| row.what != "app.deploy"));
    let rollout = deploy(&queue, "web", &named("web/a")).await.unwrap();
    assert_eq!(rollout.revision.number, 1, "the refused one took no number");
}

pub(crate) async fn concurrent_goals_get_different_revisions(url: &str) {
    let queue = ready(url, &["web/a"]).await;
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..20 {
        let queue = queue.clone();
        tasks.spawn(async move { deploy(&queue, "web", &named("web/a")).await.unwrap() });
    }
    let mut numbers: Vec<_> =
        tasks.join_all().await.iter().map(|rollout| rollout.revision.number).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (1..=20).collect::<Vec<_>>());
    let open = queue.open_rollouts().await.unwrap();
    assert_eq!(open.len(), 1, "all the others were superseded");
    assert_eq!(open[0].revision.number, 20);
}

pub(crate) async fn a_new_goal_supersedes_and_bad_ends_are_told(url: &str) {
    let queue = ready(url, &["web/a", "web/b"]).await;
    let first = deploy(&queue, "web", &named("web/a")).await.unwrap();
    report(&queue, EU, &[state("m1", first.revision, 1, MachineState::Active)]).await;
    let second = deploy(&queue, "web", &named("web/b")).await.unwrap();
    let old = queue.rollout(first.id).await.unwrap();
    assert_eq!((old.status, old.newest), (RolloutStatus::Superseded, false));
    assert!(old.reason.unwrap().contains("1.2"));
    let summary = old.summary.unwrap();
    assert_eq!(summary[&EU.parse().unwrap()].states, BTreeMap::from([(MachineState::Active, 1)]));
    assert!(!end(&queue, &first, RolloutStatus::Failed).await, "it has ended");
    // A good end moves no cursor; a bad one does, and names the revision.
    let before = queue.goals_after(0).await.unwrap();
    assert!(before.halted.is_empty());
    assert!(end(&queue, &second, RolloutStatus::Failed).await);
    assert!(!end(&queue, &second, RolloutStatus::Succeeded).await);
    let after = queue.goals_after(before.cursor).await.unwrap();
    assert!(after.cursor > before.cursor && after.signed.is_empty());
    assert_eq!(after.halted, [(name("web"), second.revision)]);
    // A newer goal is not halted.
    let third = deploy(&queue, "web", &named("web/a")).await.unwrap();
    assert!(queue.goals_after(0).await.unwrap().halted.is_empty());
    assert!(end(&queue, &third, RolloutStatus::Succeeded).await);
    assert_eq!(queue.newest_rollouts().await.unwrap().len(), 1);
    let newest = queue.newest_rollout(&name("web")).await.unwrap().unwrap();
    assert_eq!((newest.id, newest.status), (third.id, RolloutStatus::Succeeded));
    let counts: BTreeMap<_, _> = queue.rollouts_by_status().await.unwrap().into_iter().collect();
    assert_eq!(counts[&RolloutStatus::Superseded], 1);
    assert!(matches!(queue.rollout(99).await, Err(QueueError::NotFound(_))));
}

pub(crate) async fn going_back_finds_what_ran_before(url: &str) {
    let queue = ready(url, &["web/a", "web/b", "web/c"]).await;
    let none = deploy(&queue, "web", &Choice::Previous).await.unwrap_err();
    assert!(matches!(none, QueueError::Conflict(text) if text.contains("never deployed")));
    let a = deploy(&queue, "web", &named("web/a")).await.unwrap();
    let only = deploy(&queue, "web", &Choice::Previous).await.unwrap_err();
    assert!(matches!(only, QueueError::Conflict(text) if text.contains("only ever run web/a")));
    deploy(&queue, "web", &named("web/b")).await.unwrap();
    // None succeeded: the goal before.
    let back = deploy(&queue, "web", &Choice::Previous).await.unwrap();
    assert_eq!((back.artifact_name.as_str(), back.rollback), ("web/a", true));
    assert!(end(&queue, &back, RolloutStatus::Succeeded).await);
    let bad = deploy(&queue, "web", &named("web/b")).await.unwrap();
    end(&queue, &bad, RolloutStatus::Failed).await;
    deploy(&queue, "web", &named("web/c")).await.unwrap();
    let back = deploy(&queue, "web", &Choice::Previous).await.unwrap();
    assert_eq!(back.artifact_name, "web/a", "the failed one is passed over");
    assert_eq!(a.artifact_name, back.artifact_name);
}

pub(super) fn state(
    machine: &str,
    revision: Revision,
    sequence: u64,
    state: MachineState,
) -> StateSeen {
    let report = MachineReport {
        app: name("web"),
        revision,
        artifact: stored(1).artifact,
        state,
        reason: Some("because".into()),
        progress: FetchProgress {
            pieces: 2,
            pieces_total: 4,
            peer_bytes: 20,
            origin_bytes: 10,
            corrupt_pieces: 1,
        },
        sequence,
        age_ms: 0,
    };
    StateSeen { machine: machine.parse().unwrap(), report, state_at_ms: 100 + sequence as i64 }
}

pub(super) fn seen(machine: &str, role: &str, last_seen_ms: i64) -> MachineSeen {
    MachineSeen {
        name: machine.parse().unwrap(),
        zone: "a".into(),
        labels: Labels::from([("role".into(), role.into())]),
        version: "1".into(),
        address: "127.0.0.1:1".into(),
        node: None,
        last_seen_ms,
    }
}

pub(super) async fn report(queue: &Queue, region: &str, states: &[StateSeen]) -> u64 {
    let machines: Vec<_> =
        states.iter().map(|state| seen(state.machine.as_str(), "web", 1)).collect();
    queue.keep_reports(&region.parse().unwrap(), &machines, states).await.unwrap()
}

pub(crate) async fn an_older_report_replaces_nothing(url: &str) {
    use MachineState::{Active, Failed, Fetching, Unreachable, Verified};
    let queue = ready(url, &[]).await;
    let (one, two) = (Revision { epoch: 1, number: 1 }, Revision { epoch: 1, number: 2 });
    let now = async || {
        let machines = queue.machines(None, Some(&name("web"))).await.unwrap();
        let (report, at) = machines[0].apps[0].clone();
        (report.revision, report.sequence, report.state, at)
    };
    assert_eq!(report(&queue, EU, &[state("m", one, 5, Verified)]).await, 1);
    for old in [state("m", one, 4, Fetching), state("m", one, 5, Fetching)] {
        assert_eq!(report(&queue, EU, &[old]).await, 0);
    }
    assert_eq!(now().await, (one, 5, Verified, 105));
    // The same state again, with more progress: the time when it came about stays.
    assert_eq!(report(&queue, EU, &[state("m", one, 6, Verified)]).await, 1);
    assert_eq!(now().await, (one, 6, Verified, 105));
    // A newer revision begins to count anew, and the old one never comes back.
    assert_eq!(report(&queue, EU, &[state("m", two, 1, Fetching)]).await, 1);
    assert_eq!(report(&queue, EU, &[state("m", one, 99, Active)]).await, 0);
    assert_eq!(now().await, (two, 1, Fetching, 101));
    // In one batch the newest wins, in whatever order they stand.
    let batch =
        [state("m", two, 4, Failed), state("m", two, 3, Active), state("m", one, 9, Active)];
    assert_eq!(report(&queue, EU, &batch).await, 1);
    assert_eq!(now().await, (two, 4, Failed, 104));
    let higher = Revision { epoch: 2, number: 1 };
    assert_eq!(report(&queue, EU, &[state("m", higher, 1, Active)]).await, 1);
    assert_eq!(
        report(&queue, EU, &[state("m", higher, 2, Unreachable)]).await,
        0,
        "not a machine's word"
    );
    assert_eq!(now().await, (higher, 1, Active, 101));
}

pub(crate) async fn changed_machines_are_told_once_in_order(url: &str) {
    let queue = ready(url, &[]).await;
    let keep = async |region: &str, machines: &[MachineSeen]| {
        queue.keep_reports(&region.parse().unwrap(), machines, &[]).await.unwrap();
    };
    let mut cursor = MachineCursor::default();
    let mut changed = async || {
        let mut names = vec![];
        loop {
            // Pages shorter than a batch: nobody is left out between two pages.
            let page = queue.machines_changed(&mut cursor, 2).await.unwrap();
            names.extend(page.iter().map(|machine| {
                format!("{} {} {}", machine.name, machine.region, machine.labels["role"])
            }));
            if page.len() < 2 {
                return names;
            }
        }
    };
    keep(EU, &["c", "a", "b"].map(|name| seen(name, "web", 10))).await;
    assert_eq!(changed().await, ["a eu web", "b eu web", "c eu web"]);
    keep(EU, &[seen("a", "web", 20), seen("b", "api", 20), seen("c", "api", 5)]).await;
    assert_eq!(changed().await, ["b eu api"], "the same, changed, and seen earlier");
    keep("us", &[seen("a", "web", 30), seen("a", "api", 29)]).await;
    assert_eq!(changed().await, ["a us web"], "it moved; of two in a batch the later one");
    assert_eq!(changed().await, Vec::<String>::new());
    let machines = queue.machines(Some(&"us".parse().unwrap()), None).await.unwrap();
    assert_eq!(machines.len(), 1);
    assert_eq!(machines[0].seen, seen("a", "web", 30));
    assert_eq!(queue.machines(None, None).await.unwrap().len(), 3);
}

pub(crate) async fn machines_that_are_gone_are_forgotten(url: &str) {
    let queue = ready(url, &[]).await;
    let revision = Revision { epoch: 1, number: 1 };
    let eu = EU.parse().unwrap();
    let machines = [seen("old", "web", 10), seen("new", "web", 20)];
    let states = ["old", "new"].map(|name| state(name, revision, 1, MachineState::Active));
    queue.keep_reports(&eu, &machines, &states).await.unwrap();
    assert_eq!(queue.forget_machines(10).await.unwrap(), 0);
    assert_eq!(queue.machine_numbers().await.unwrap().forgotten, 0);
    assert_eq!(queue.forget_machines(20).await.unwrap(), 1);
    assert_eq!(
        queue.machine_numbers().await.unwrap().forgotten,
        1,
        "who has them in memory is told"
    );
    let left = queue.machines(None, None).await.unwrap();
    assert_eq!(left.iter().map(|m| m.seen.name.as_str()).collect::<Vec<_>>(), ["new"]);
    assert_eq!(queue.states(&name("web"), revision).await.unwrap().len(), 1);
    // One that comes back is a new one, and is told as such.
    let mut cursor = MachineCursor::default();
    queue.machines_changed(&mut cursor, 10).await.unwrap();
    queue.keep_reports(&eu, &[seen("old", "web", 30)], &[]).await.unwrap();
    assert_eq!(queue.machines_changed(&mut cursor, 10).await.unwrap().len(), 1);
}

pub(crate) async fn progress_is_summed_by_region(url: &str) {
    use MachineState::{Active, Fetching};
    let queue = ready(url, &[]).await;
    let revision = Revision { epoch: 1, number: 1 };
    let old = Revision { epoch: 1, number: 0 };
    let batch = [
        state("m1", revision, 1, Active),
        state("m2", revision, 7, Active),
        state("m3", revision, 3, Fetching),
        state("m4", old, 3, Active),
    ];
    report(&queue, EU, &batch).await;
    report(&queue, "us", &[state("m5", revision, 2, Fetching)]).await;
    let progress = queue.progress(&name("web"), revision).await.unwrap();
    let eu = &progress[&EU.parse().unwrap()];
    assert_eq!(eu.states, BTreeMap::from([(Active, 2), (Fetching, 1)]));
    assert_eq!((eu.pieces, eu.pieces_total), (6, 12));
    assert_eq!((eu.origin_bytes, eu.peer_bytes), (30, 60));
    assert_eq!((eu.first_active_ms, eu.last_active_ms), (Some(101), Some(107)));
    let us = &progress[&"us".parse().unwrap()];
    assert_eq!((us.first_active_ms, us.states.len()), (None, 1));
    assert_eq!(queue.states(&name("web"), revision).await.unwrap().len(), 4);
    assert!(queue.progress(&name("api"), revision).await.unwrap().is_empty());
}

pub(crate) async fn a_big_batch_is_kept_whole(url: &str) {
    const MACHINES: usize = 6_000;
    let queue = ready(url, &[]).await;
    let revision = Revision { epoch: 1, number: 1 };
    let batch: Vec<_> = (0..MACHINES)
        .map(|at| state(&format!("m{at}"), revision, 1, MachineState::Active))
        .collect();
    assert_eq!(report(&queue, EU, &batch).await, MACHINES as u64);
    assert_eq!(report(&queue, EU, &batch).await, 0);
    let progress = queue.progress(&name("web"), revision).await.unwrap();
    let active = progress[&EU.parse().unwrap()].states[&MachineState::Active];
    assert_eq!(active, MACHINES as u64);
    assert_eq!(queue.regions().await.unwrap()[0].machines, MACHINES as u64);
}

pub(crate) async fn regions_follow_the_configuration(url: &str) {
    let queue = ready(url, &["web/a", "web/b"]).await;
    deploy(&queue, "web", &named("web/b")).await.unwrap();
    queue.set_regions(&regions(&["us"]), 10).await.unwrap();
    let names = async || -> Vec<String> {
        let regions = queue.regions().await.unwrap();
        regions.into_iter().map(|region| region.name.to_string()).collect()
    };
    assert_eq!(names().await, ["us"]);
    let eu = EU.parse().unwrap();
    assert!(matches!(
        queue.drain(&eu, true, None, &actor(), 1).await,
        Err(QueueError::NotFound(_))
    ));
    // The new region gets what runs, and the rest when it is asked for.
    let copy = queue.take_copy("me", &[], 100, 200).await.unwrap().unwrap();
    assert_eq!((copy.region.as_str(), copy.artifact), ("us", stored(2).artifact));
    assert_eq!(queue.take_copy("me", &[], 100, 200).await.unwrap(), None);
    assert_eq!(queue.want_everywhere("web/a", 100).await.unwrap(), 1);
    assert_eq!(queue.want_everywhere("web/a", 100).await.unwrap(), 0);
    assert!(queue.take_copy("me", &[], 100, 200).await.unwrap().is_some());
    // A region that comes back is as it was.
    queue.set_regions(&regions(&["eu", "us"]), 20).await.unwrap();
    assert_eq!(names().await, ["eu", "us"]);
    let artifact = queue.artifact("web/a", None).await.unwrap();
    assert_eq!(artifact.copies[&eu].status, ReplicationStatus::Complete);
    queue.drain(&eu, true, Some("flood"), &actor(), 30).await.unwrap();
    queue.set_regions(&regions(&["eu", "us"]), 40).await.unwrap();
    let why = Drain { reason: Some("flood".into()), by: "alice".into(), at_ms: 30 };
    assert_eq!(
        queue.regions().await.unwrap()[0].drain,
        Some(why),
        "a restart puts no region back into service"
    );
    assert_eq!(queue.audit(1).await.unwrap()[0].detail, "flood");
    queue.drain(&eu, false, None, &actor(), 45).await.unwrap();
    assert_eq!(queue.regions().await.unwrap()[0].drain, None);
    let process = "eu-1".parse().unwrap();
    queue.region_process_seen(&eu, &process, 50).await.unwrap();
    queue.region_process_seen(&eu, &process, 60).await.unwrap();
    assert_eq!(queue.regions().await.unwrap()[0].processes, BTreeMap::from([(process, 60)]));
}

pub(crate) async fn every_change_is_audited(url: &str) {
    let queue = ready(url, &["web/a"]).await;
    submit(&queue, "web", 1).await;
    let (job, lease) = claim(&queue, 2).await.unwrap();
    queue.cancel(job.id, &actor(), 3).await.unwrap();
    queue.finish(job.id, &lease, &End::Cancelled, &[], 4).await.unwrap();
    let rollout = deploy(&queue, "web", &named("web/a")).await.unwrap();
    end(&queue, &rollout, RolloutStatus::Cancelled).await;
    queue.drain(&EU.parse().unwrap(), true, None, &actor(), 5).await.unwrap();
    let rows = queue.audit(100).await.unwrap();
    let what: Vec<_> = rows.iter().rev().map(|row| row.what.as_str()).collect();
    assert_eq!(
        what,
        [
            "app.set",
            "artifact.publish",
            "job.submit",
            "job.cancel",
            "app.deploy",
            "rollout.end",
            "region.drain"
        ]
    );
    assert!(rows.iter().all(|row| row.who == "alice" && row.origin == "127.0.0.1"));
    assert_eq!(rows[0].id, 7);
    assert_eq!(queue.audit(1).await.unwrap().len(), 1);
}
