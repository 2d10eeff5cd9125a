//! What every goal store must do: functions over a way to open it, each of which wants an empty one. Two that are opened
//! are two processes.

use std::{collections::BTreeMap, time::Duration};

use shoal_goals::{Changes, Entry, GoalStore, GoalWatch, Put};
use shoal_proto::{
    AppName, ArtifactId, EncodingId, Revision, codec,
    goal::{Activation, GOAL_MAX_BYTES, Goal, RolloutPlan, Selector, SignedGoal},
    manifest::PieceSize,
};

/// A goal of an app; `salt` makes it another one of the same revision.
pub(crate) fn entry_with(app: &str, epoch: u32, number: u64, salt: u64) -> Entry {
    let goal = Goal {
        cluster: "test".into(),
        app: AppName::new(app).unwrap(),
        revision: Revision { epoch, number },
        selector: Selector::default(),
        regions: vec![],
        artifact: ArtifactId([7; 32]),
        size_bytes: 1,
        piece_size: PieceSize::MIN,
        encoding: EncodingId([0; 32]),
        file_mode: 0o755,
        activation: Activation::None,
        health: None,
        plan: RolloutPlan::default(),
        priority: 0,
        machines_estimate: 1,
        issued_at_ms: salt,
    };
    let goal = codec::encode(&goal, GOAL_MAX_BYTES).unwrap();
    Entry::of(SignedGoal { goal, key_id: 1, signature: vec![9; 64] }).unwrap()
}

pub(crate) fn entry(app: &str, epoch: u32, number: u64) -> Entry {
    entry_with(app, epoch, number, 0)
}

/// Revisions by app.
pub(crate) fn revisions(entries: &[Entry]) -> BTreeMap<String, (u32, u64)> {
    let of = |entry: &Entry| {
        let Revision { epoch, number } = entry.revision;
        (entry.app.to_string(), (epoch, number))
    };
    entries.iter().map(of).collect()
}

fn all(of: &[(&str, u32, u64)]) -> BTreeMap<String, (u32, u64)> {
    of.iter().map(|(app, epoch, number)| (app.to_string(), (*epoch, *number))).collect()
}

pub(crate) async fn put<S: GoalStore>(store: &S, app: &str, epoch: u32, number: u64) {
    assert_eq!(store.put(&entry(app, epoch, number)).await.unwrap(), Put::Written);
}

/// The next changes, within a time that no healthy store needs.
pub(crate) async fn told<W: GoalWatch>(watch: &mut W) -> Changes {
    tokio::time::timeout(Duration::from_secs(30), watch.next()).await.expect("a change").unwrap()
}

/// Watches until each app is at its revision; errors on the way are retried, and no revision may go back.
pub(crate) async fn until<W: GoalWatch>(watch: &mut W, want: &BTreeMap<String, (u32, u64)>) {
    let mut seen: BTreeMap<String, (u32, u64)> = BTreeMap::new();
    let wait = async {
        while seen != *want {
            match watch.next().await {
                Ok(changes) => {
                    for (app, revision) in revisions(&changes.entries) {
                        let old = seen.insert(app.clone(), revision);
                        assert!(old.is_none_or(|old| old <= revision), "{app} went back");
                    }
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    };
    let in_time = tokio::time::timeout(Duration::from_secs(60), wait).await;
    assert!(in_time.is_ok(), "saw {seen:?}, want {want:?}");
}

pub(crate) async fn a_goal_is_written_if_it_is_newer<S: GoalStore>(open: impl AsyncFn() -> S) {
    let store = open().await;
    assert_eq!(store.list().await.unwrap().entries, []);
    put(&store, "web", 1, 9).await;
    assert_eq!(store.put(&entry("web", 1, 9)).await.unwrap(), Put::Known);
    // The same revision with another content, and older ones.
    for stale in [entry_with("web", 1, 9, 1), entry("web", 1, 8), entry("web", 0, u64::MAX)] {
        let kept = Put::Stale(Box::new(entry("web", 1, 9)));
        assert_eq!(store.put(&stale).await.unwrap(), kept);
    }
    put(&store, "web", 1, 10).await;
    put(&store, "web", 2, 1).await;
    put(&store, "web", 10, 0).await;
    put(&store, "other", u32::MAX, u64::MAX).await;
    let listed = store.list().await.unwrap();
    assert!(listed.complete);
    let want = all(&[("web", 10, 0), ("other", u32::MAX, u64::MAX)]);
    assert_eq!(revisions(&listed.entries), want);
    assert!(listed.entries.contains(&entry("web", 10, 0)), "as it was put");
}

pub(crate) async fn changes_are_told_by_cursor<S: GoalStore>(open: impl AsyncFn() -> S) {
    let store = open().await;
    put(&store, "a", 1, 1).await;
    put(&store, "b", 1, 1).await;
    let first = store.list().await.unwrap();
    let nothing = store.changes(first.cursor).await.unwrap();
    assert_eq!((nothing.entries.len(), nothing.complete), (0, false));
    put(&store, "b", 1, 2).await;
    put(&store, "c", 1, 1).await;
    put(&store, "c", 1, 2).await;
    let second = store.changes(first.cursor).await.unwrap();
    assert!(!second.complete && second.cursor.revision() > first.cursor.revision());
    assert_eq!(revisions(&second.entries), all(&[("b", 1, 2), ("c", 1, 2)]));
    // What was refused is no change.
    store.put(&entry("c", 1, 1)).await.unwrap();
    assert_eq!(store.changes(second.cursor).await.unwrap().entries, []);
}

pub(crate) async fn a_watch_begins_with_everything_and_goes_on<S: GoalStore>(
    open: impl AsyncFn() -> S,
) {
    let store = open().await;
    put(&store, "a", 1, 1).await;
    let mut watch = store.watch(None);
    let first = told(&mut watch).await;
    assert!(first.complete);
    assert_eq!(revisions(&first.entries), all(&[("a", 1, 1)]));
    put(&store, "a", 1, 2).await;
    let second = told(&mut watch).await;
    assert_eq!(revisions(&second.entries), all(&[("a", 1, 2)]));
    // Another one goes on where this one was, and is told nothing twice.
    drop(watch);
    put(&store, "b", 1, 1).await;
    put(&store, "b", 1, 2).await;
    let mut watch = store.watch(Some(second.cursor));
    let mut seen = BTreeMap::new();
    while seen != all(&[("b", 1, 2)]) {
        let third = told(&mut watch).await;
        assert!(!third.complete);
        seen.extend(revisions(&third.entries));
    }
}

pub(crate) async fn an_empty_store_tells_so_and_then_its_first_goal<S: GoalStore>(
    open: impl AsyncFn() -> S,
) {
    let store = open().await;
    let mut watch = store.watch(None);
    let first = told(&mut watch).await;
    assert!(first.complete && first.entries.is_empty());
    let (told, ()) = tokio::join!(told(&mut watch), put(&store, "a", 1, 1));
    assert_eq!(revisions(&told.entries), all(&[("a", 1, 1)]));
}

pub(crate) async fn racing_writers_never_go_back<S: GoalStore + Clone + 'static>(
    open: impl AsyncFn() -> S,
) {
    const WRITERS: u64 = 8;
    const GOALS: u64 = 30;
    let store = open().await;
    let mut watch = store.watch(None);
    let mut tasks = tokio::task::JoinSet::new();
    for writer in 0..WRITERS {
        let store = store.clone();
        tasks.spawn(async move {
            let mut written = 0;
            for at in 0..GOALS {
                // Each has revisions of its own, some below what the others have written meanwhile.
                let number = at * WRITERS + writer + 1;
                match store.put(&entry("web", 1, number)).await.unwrap() {
                    Put::Written => written += 1,
                    Put::Stale(stored) => assert!(stored.revision.number > number),
                    Put::Known => panic!("nobody else has this one"),
                }
            }
            written
        });
    }
    let want = all(&[("web", 1, WRITERS * GOALS)]);
    until(&mut watch, &want).await;
    let mut written = 0;
    while let Some(ended) = tasks.join_next().await {
        written += ended.unwrap();
    }
    assert!(written >= GOALS, "{written}");
    assert_eq!(revisions(&store.list().await.unwrap().entries), want);
}

pub(crate) async fn more_than_a_page_of_apps_is_listed<S: GoalStore + Clone + 'static>(
    open: impl AsyncFn() -> S,
) {
    const APPS: u64 = 1_203;
    let store = open().await;
    let mut tasks = tokio::task::JoinSet::new();
    for part in 0..8 {
        let store = store.clone();
        tasks.spawn(async move {
            for at in (part..APPS).step_by(8) {
                put(&store, &format!("app-{at}"), 1, at + 1).await;
            }
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap();
    }
    let listed = store.list().await.unwrap();
    assert_eq!(listed.entries.len() as u64, APPS);
    assert_eq!(revisions(&listed.entries).len() as u64, APPS);
}

pub(crate) async fn all_is_there_after_it_is_opened_again<S: GoalStore>(open: impl AsyncFn() -> S) {
    let store = open().await;
    put(&store, "a", 1, 2).await;
    put(&store, "b", 3, 4).await;
    let cursor = store.list().await.unwrap().cursor;
    put(&store, "a", 1, 3).await;
    drop(store);
    let store = open().await;
    let want = all(&[("a", 1, 3), ("b", 3, 4)]);
    assert_eq!(revisions(&store.list().await.unwrap().entries), want);
    assert!(matches!(store.put(&entry("a", 1, 1)).await.unwrap(), Put::Stale(_)));
    // From a cursor of before nothing is missed, whether the store still knows it or begins anew.
    put(&store, "c", 1, 1).await;
    let changes = store.changes(cursor).await.unwrap();
    let told = revisions(&changes.entries);
    assert_eq!((told["a"], told["c"]), ((1, 3), (1, 1)));
    assert!(!changes.complete || changes.entries.len() == 3);
}
