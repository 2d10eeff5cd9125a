//! Goals and how rollouts end.

use std::time::Duration;

use shoal_client::{
    Client, EventQuery, Streamed,
    types::{
        App, GoalsQuery, GoalsReply, HaltRequest, RegionReports, RollbackRequest, Rollout,
        WaveOpened,
    },
};
use shoal_proto::{
    RegionName,
    goal::RolloutPlan,
    state::{MachineState, RolloutStatus},
};

use crate::harness::*;

fn planned(plan: RolloutPlan) -> App {
    App { plan, ..app("web", "role=web") }
}

/// A cluster with an app, `n` machines of it in `eu`, and artifacts that may be deployed.
async fn ready(more: &str, plan: RolloutPlan, n: usize, artifacts: u8) -> (Cluster, Vec<String>) {
    let cluster = Cluster::start_with(more).await;
    let operator = cluster.operator();
    operator.set_app(&planned(plan)).await.unwrap();
    let machines = (0..n).map(|at| machine(&format!("m{at}"), "web")).collect();
    report(&cluster.region("eu"), machines, vec![]).await;
    let mut names = vec![];
    for seed in 0..artifacts {
        names.push(publish(&operator, "web", &cut(seed + 1, 1)).await.name);
    }
    for name in &names {
        deployable(&operator, name).await;
    }
    (cluster, names)
}

async fn ended(operator: &Client, id: i64) -> Rollout {
    wait_for("the rollout's end", async || {
        let rollout = operator.rollout(id).await.unwrap();
        if rollout.status.is_terminal() { Ok(rollout) } else { Err(rollout) }
    })
    .await
}

async fn goals(region: &Client, after: u64) -> GoalsReply {
    region.goals(&GoalsQuery { after, wait_s: POLL_S, highest_epoch: 0 }).await.unwrap()
}

fn eu() -> RegionName {
    "eu".parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_failures_end_a_rollout_and_regions_hear_of_it() {
    let (cluster, names) = ready(ONLY_BELLS, RolloutPlan::default(), 4, 1).await;
    let (operator, region) = (cluster.operator(), cluster.region("eu"));
    let rollout = deploy(&operator, "web", &names[0]).await.unwrap();
    let told = goals(&region, 0).await;
    assert_eq!((told.goals.len(), told.halted.len()), (1, 0));
    // Whoever waits for goals hears of the halt.
    let (cursor, waiting) = (told.cursor, cluster.region("us"));
    let halted = tokio::spawn(async move { woken(goals(&waiting, cursor)).await });
    let bad = state("m0", "web", rollout.revision, MachineState::RolledBack);
    report(&region, vec![], vec![bad]).await;
    let end = ended(&operator, rollout.id).await;
    assert_eq!(end.status, RolloutStatus::Failed);
    assert!(end.reason.as_ref().unwrap().contains("1 failed"), "{end:?}");
    let halted = halted.await.unwrap();
    assert_eq!(halted.halted, [("web".parse().unwrap(), rollout.revision)]);
    assert!(halted.cursor > cursor && halted.goals.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_silent_are_unreachable_by_the_deadline() {
    let plan = RolloutPlan { deadline_s: 1, ..RolloutPlan::default() };
    let (cluster, names) = ready("", plan, 3, 1).await;
    let (operator, region) = (cluster.operator(), cluster.region("eu"));
    let rollout = deploy(&operator, "web", &names[0]).await.unwrap();
    let active = |name| state(name, "web", rollout.revision, MachineState::Active);
    let fetching = state("m1", "web", rollout.revision, MachineState::Fetching);
    report(&region, vec![], vec![active("m0"), fetching]).await;
    let end = ended(&operator, rollout.id).await;
    assert_eq!(end.status, RolloutStatus::Failed);
    let states = &end.regions[&eu()].states;
    assert_eq!((states[&MachineState::Active], states[&MachineState::Unreachable]), (1, 2));
    assert!(end.reason.as_ref().unwrap().contains("UNREACHABLE"), "{end:?}");
    // Late is better than never: what it reports is seen, and changes no end.
    let late = shoal_client::types::MachineStateSeen {
        report: shoal_proto::region::MachineReport { sequence: 2, ..active("m1").report },
        ..active("m1")
    };
    report(&region, vec![], vec![late]).await;
    let after = operator.rollout(rollout.id).await.unwrap();
    assert_eq!(
        (after.status, after.regions[&eu()].states[&MachineState::Active]),
        (RolloutStatus::Failed, 2)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_few_silent_ones_within_the_limit_do_not_fail_a_rollout() {
    let plan = RolloutPlan { deadline_s: 1, max_failed_permille: 500, ..RolloutPlan::default() };
    let (cluster, names) = ready("", plan, 2, 1).await;
    let (operator, region) = (cluster.operator(), cluster.region("eu"));
    let rollout = deploy(&operator, "web", &names[0]).await.unwrap();
    let active = state("m0", "web", rollout.revision, MachineState::Active);
    report(&region, vec![], vec![active]).await;
    let end = ended(&operator, rollout.id).await;
    assert_eq!(end.status, RolloutStatus::Succeeded, "{end:?}");
    assert_eq!(end.regions[&eu()].states[&MachineState::Unreachable], 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn machines_that_appear_later_are_waited_for() {
    let (cluster, names) = ready("", RolloutPlan::default(), 1, 1).await;
    let (operator, region, us) = (cluster.operator(), cluster.region("eu"), cluster.region("us"));
    let rollout = deploy(&operator, "web", &names[0]).await.unwrap();
    let active = |name| state(name, "web", rollout.revision, MachineState::Active);
    report(&us, vec![machine("late", "web"), machine("other", "db")], vec![]).await;
    report(&region, vec![], vec![active("m0")]).await;
    wait_for("both regions to be counted", async || {
        let rollout = operator.rollout(rollout.id).await.unwrap();
        assert_eq!(rollout.status, RolloutStatus::Running);
        if rollout.regions.len() == 2 { Ok(()) } else { Err(rollout) }
    })
    .await;
    report(&us, vec![], vec![active("late")]).await;
    assert_eq!(ended(&operator, rollout.id).await.status, RolloutStatus::Succeeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn machines_of_a_drained_region_hold_up_no_rollout() {
    let (cluster, names) = ready("", RolloutPlan::default(), 1, 1).await;
    let (operator, region) = (cluster.operator(), cluster.region("eu"));
    report(&cluster.region("us"), vec![machine("gone", "web")], vec![]).await;
    let rollout = deploy(&operator, "web", &names[0]).await.unwrap();
    let active = state("m0", "web", rollout.revision, MachineState::Active);
    report(&region, vec![], vec![active]).await;
    operator.drain_region(&"us".parse().unwrap(), &HaltRequest::default()).await.unwrap();
    assert_eq!(ended(&operator, rollout.id).await.status, RolloutStatus::Succeeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn machines_that_are_gone_are_forgotten() {
    let (cluster, names) = ready("forget_machine_s = 1", RolloutPlan::default(), 2, 1).await;
    let (operator, region) = (cluster.operator(), cluster.region("eu"));
    let rollout = deploy(&operator, "web", &names[0]).await.unwrap();
    let active = state("m0", "web", rollout.revision, MachineState::Active);
    report(&region, vec![], vec![active]).await;
    // m0 is heard of, m1 never again: the rollout ends without it.
    let end = wait_for("the rollout's end", async || {
        report(&region, vec![machine("m0", "web")], vec![]).await;
        let rollout = operator.rollout(rollout.id).await.unwrap();
        if rollout.status.is_terminal() { Ok(rollout) } else { Err(rollout) }
    })
    .await;
    assert_eq!(end.status, RolloutStatus::Succeeded, "{end:?}");
    assert_eq!(operator.machines(None, None).await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_selector_that_matches_nothing_is_told() {
    let (cluster, names) = ready("", RolloutPlan::default(), 0, 1).await;
    let operator = cluster.operator();
    let rollout = deploy(&operator, "web", &names[0]).await.unwrap();
    let end = ended(&operator, rollout.id).await;
    assert_eq!(end.status, RolloutStatus::Succeeded);
    assert!(end.reason.unwrap().contains("no machine matches the selector 'role=web'"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_goal_supersedes_and_a_rollback_goes_back() {
    let plan = RolloutPlan { waves_permille: vec![100, 500], ..RolloutPlan::default() };
    let (cluster, names) = ready("", plan, 1, 2).await;
    let (operator, region) = (cluster.operator(), cluster.region("eu"));
    let first = deploy(&operator, "web", &names[0]).await.unwrap();
    let active = |rollout: &Rollout| state("m0", "web", rollout.revision, MachineState::Active);
    report(&region, vec![], vec![active(&first)]).await;
    assert_eq!(ended(&operator, first.id).await.status, RolloutStatus::Succeeded);
    let second = deploy(&operator, "web", &names[1]).await.unwrap();
    let back = RollbackRequest { app: "web".parse().unwrap(), artifact: None };
    let third = operator.rollback(&back).await.unwrap();
    assert_eq!((third.artifact_name.as_str(), third.rollback), (names[0].as_str(), true));
    assert!(third.revision > second.revision);
    let old = operator.rollout(second.id).await.unwrap();
    assert_eq!(old.status, RolloutStatus::Superseded);
    assert!(old.reason.unwrap().contains(&third.revision.to_string()));
    // Only the newest goal is told.
    let told = goals(&region, 0).await;
    assert_eq!(told.goals.len(), 1);
    let named = RollbackRequest { artifact: Some(names[1].clone()), ..back };
    let fourth = operator.rollback(&named).await.unwrap();
    assert_eq!(fourth.artifact_name, names[1]);
    // How the first one went is kept, although its machines now report about others.
    report(&region, vec![], vec![active(&fourth)]).await;
    ended(&operator, fourth.id).await;
    let first = operator.rollout(first.id).await.unwrap();
    assert_eq!(first.regions[&eu()].states[&MachineState::Active], 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollout_is_cancelled_once() {
    let (cluster, names) = ready("", RolloutPlan::default(), 1, 1).await;
    let operator = cluster.operator();
    let rollout = deploy(&operator, "web", &names[0]).await.unwrap();
    let end = operator.cancel_rollout(rollout.id).await.unwrap();
    assert_eq!(end.status, RolloutStatus::Cancelled);
    assert_eq!(end.reason.as_deref(), Some("cancelled by alice"));
    assert_eq!(operator.cancel_rollout(rollout.id).await.unwrap().status, end.status);
    let halted = goals(&cluster.region("eu"), 0).await.halted;
    assert_eq!(halted, [("web".parse().unwrap(), rollout.revision)]);
    let next = deploy(&operator, "web", &names[0]).await.unwrap();
    let active = state("m0", "web", next.revision, MachineState::Active);
    report(&cluster.region("eu"), vec![], vec![active]).await;
    ended(&operator, next.id).await;
    let late = refusal(operator.cancel_rollout(next.id).await);
    assert!(late.2.contains("SUCCEEDED"), "{late:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_rollout_opens_nothing_and_waits() {
    let plan = RolloutPlan { deadline_s: 1, ..RolloutPlan::default() };
    let (cluster, names) = ready(ONLY_BELLS, plan, 2, 1).await;
    let (operator, region) = (cluster.operator(), cluster.region("eu"));
    let rollout = deploy(&operator, "web", &names[0]).await.unwrap();
    let paused = operator.pause_rollout(rollout.id, true).await.unwrap();
    let began = std::time::Instant::now();
    assert_eq!(paused.status, RolloutStatus::Paused);
    assert_eq!(paused.reason.as_deref(), Some("paused by alice"));
    assert_eq!(operator.pause_rollout(rollout.id, true).await.unwrap().status, paused.status);
    let told = goals(&region, 0).await;
    assert_eq!(told.halted, [("web".parse().unwrap(), rollout.revision)]);
    // Whoever waits for goals hears that it goes on.
    let (cursor, waiting) = (told.cursor, cluster.region("us"));
    let resumed = tokio::spawn(async move { woken(goals(&waiting, cursor)).await });
    // Its deadline would be over: while it is paused it does not come.
    let active = state("m0", "web", rollout.revision, MachineState::Active);
    report(&region, vec![], vec![active]).await;
    while began.elapsed() < Duration::from_secs(2) {
        assert_eq!(operator.rollout(rollout.id).await.unwrap().status, RolloutStatus::Paused);
        report(&region, vec![machine("m0", "web")], vec![]).await;
    }
    let on = operator.pause_rollout(rollout.id, false).await.unwrap();
    assert_eq!((on.status, on.reason), (RolloutStatus::Running, None));
    assert!(resumed.await.unwrap().halted.is_empty());
    // Then it does.
    let end = ended(&operator, rollout.id).await;
    assert_eq!(end.status, RolloutStatus::Failed, "{end:?}");
    assert_eq!(end.regions[&eu()].states[&MachineState::Unreachable], 1);
    let late = refusal(operator.pause_rollout(rollout.id, true).await);
    assert!(late.0 == 409 && late.2.contains("it is FAILED"), "{late:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn waves_that_region_processes_open_are_told() {
    let (cluster, names) = ready(ONLY_BELLS, RolloutPlan::default(), 1, 1).await;
    let (operator, region) = (cluster.operator(), cluster.region("eu"));
    let rollout = deploy(&operator, "web", &names[0]).await.unwrap();
    let wanted = EventQuery { app: None, types: vec!["deploy:wave".into()] };
    let mut live = operator.follow_events(&wanted, None).await.unwrap();
    let wave = |open_permille| WaveOpened {
        app: "web".parse().unwrap(),
        revision: rollout.revision,
        open_permille,
        age_ms: 5,
    };
    let tell = async |waves: Vec<WaveOpened>| {
        region.report(&RegionReports { waves, ..RegionReports::default() }).await
    };
    tell(vec![wave(250)]).await.unwrap();
    tell(vec![wave(250)]).await.unwrap();
    let Some(Streamed::Event(event)) = woken(live.next()).await.unwrap() else { panic!("none") };
    assert_eq!((event.kind.as_str(), event.rollout), ("deploy:wave", Some(rollout.id)));
    assert_eq!((event.region, event.open_permille), (Some(eu()), Some(250)));
    assert_eq!(event.reason.as_deref(), Some("opened by eu-p1"));
    let seen = operator.rollout(rollout.id).await.unwrap();
    assert_eq!(seen.regions[&eu()].open_permille, Some(250));
    for wrong in [0, 1_001] {
        let refused = refusal(tell(vec![wave(wrong)]).await);
        assert!(refused.0 == 400 && refused.2.contains("1 to 1000"), "{refused:?}");
    }
    tell(vec![wave(1_000)]).await.unwrap();
    let Some(Streamed::Event(next)) = woken(live.next()).await.unwrap() else { panic!("none") };
    assert_eq!(next.open_permille, Some(1_000), "once each");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_goal_wakes_the_regions_that_wait() {
    let (cluster, names) = ready(ONLY_BELLS, RolloutPlan::default(), 1, 1).await;
    let (operator, region) = (cluster.operator(), cluster.region("eu"));
    let mut cursor = 0;
    for _ in 0..3 {
        let waiting = woken(goals(&region, cursor));
        let deploying = async {
            // The poll is under way when the goal is set, or comes right after it.
            tokio::time::sleep(Duration::from_millis(50)).await;
            deploy(&operator, "web", &names[0]).await.unwrap()
        };
        let (told, rollout) = tokio::join!(waiting, deploying);
        assert_eq!(told.goals.len(), 1, "the goal {}", rollout.revision);
        cursor = told.cursor;
    }
    let nothing =
        region.goals(&GoalsQuery { after: cursor, wait_s: 0, highest_epoch: 0 }).await.unwrap();
    assert_eq!((nothing.goals.len(), nothing.cursor), (0, cursor));
}

#[tokio::test(flavor = "multi_thread")]
async fn goals_and_rollouts_survive_a_restart() {
    let (mut cluster, names) = ready("", RolloutPlan::default(), 1, 1).await;
    let rollout = deploy(&cluster.operator(), "web", &names[0]).await.unwrap();
    let before = goals(&cluster.region("eu"), 0).await;
    cluster.stop().await;
    cluster.run().await;
    let after = goals(&cluster.region("eu"), 0).await;
    assert_eq!((after.goals, after.cursor), (before.goals, before.cursor));
    let active = state("m0", "web", rollout.revision, MachineState::Active);
    report(&cluster.region("eu"), vec![], vec![active]).await;
    assert_eq!(ended(&cluster.operator(), rollout.id).await.status, RolloutStatus::Succeeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_big_batch_of_reports_is_taken() {
    let (cluster, names) = ready("", RolloutPlan::default(), 0, 1).await;
    let (operator, region) = (cluster.operator(), cluster.region("eu"));
    let fleet: Vec<_> = (0..5_000).map(|at| format!("m{at}")).collect();
    report(&region, fleet.iter().map(|name| machine(name, "web")).collect(), vec![]).await;
    let rollout = deploy(&operator, "web", &names[0]).await.unwrap();
    assert_eq!(rollout.regions[&eu()].machines, 5_000);
    let active = |name: &String| state(name, "web", rollout.revision, MachineState::Active);
    report(&region, vec![], fleet.iter().map(active).collect()).await;
    let end = ended(&operator, rollout.id).await;
    assert_eq!(end.status, RolloutStatus::Succeeded);
    assert_eq!(end.regions[&eu()].states[&MachineState::Active], 5_000);
}
