//! The outbox of goals, and where the epoch of a recovery comes from.

use std::collections::BTreeMap;

use shoal_proto::{Revision, state::MachineState};
use shoal_queue::{GoalDraft, OutboxDepth, Queue, QueueError, StoreDifference};

use super::{
    actor, app, name,
    records::{EU, deploy, named, publish, ready, report, state},
};

pub(crate) async fn goals_wait_in_the_outbox_until_they_are_told(url: &str) {
    let queue = ready(url, &["web/a", "web/b"]).await;
    app(&queue, "api").await;
    publish(&queue, "api", "api/a", 1).await;
    let signed = async |queue: &Queue| {
        queue.outbox(10).await.unwrap().into_iter().map(|goal| goal.signed).collect::<Vec<_>>()
    };
    assert_eq!(queue.outbox_depth().await.unwrap(), OutboxDepth::default());
    deploy(&queue, "web", &named("web/a")).await.unwrap();
    deploy(&queue, "api", &named("api/a")).await.unwrap();
    let depth = queue.outbox_depth().await.unwrap();
    assert_eq!((depth.goals, depth.oldest_since_ms), (2, Some(50)));
    let before = queue.outbox(10).await.unwrap();
    assert_eq!(queue.outbox(1).await.unwrap(), before[..1]);
    // A newer goal takes the older one's place, at the end, and what is told of the older one does not take it away.
    deploy(&queue, "web", &named("web/b")).await.unwrap();
    assert_eq!(signed(&queue).await, ["1.1 api/a", "1.2 web/b"]);
    queue.outbox_told(&before[0]).await.unwrap();
    assert_eq!(signed(&queue).await, ["1.1 api/a", "1.2 web/b"]);
    // It is there in another process, and after this one was killed.
    let queue = Queue::open(url).await.unwrap();
    for goal in queue.outbox(10).await.unwrap() {
        queue.outbox_told(&goal).await.unwrap();
    }
    assert_eq!(queue.outbox_depth().await.unwrap(), OutboxDepth::default());
    // A refused goal leaves nothing in it.
    let no = |_: &GoalDraft<'_>| Err(QueueError::Refused("too long".into()));
    queue.set_goal(&name("web"), &named("web/a"), false, no, &actor(), 50).await.unwrap_err();
    assert_eq!(queue.outbox_depth().await.unwrap().goals, 0);
}

pub(crate) async fn what_a_store_lacks_goes_into_the_outbox(url: &str) {
    let queue = ready(url, &["web/a", "web/b"]).await;
    app(&queue, "api").await;
    publish(&queue, "api", "api/a", 1).await;
    deploy(&queue, "web", &named("web/a")).await.unwrap();
    deploy(&queue, "web", &named("web/b")).await.unwrap();
    deploy(&queue, "api", &named("api/a")).await.unwrap();
    for goal in queue.outbox(10).await.unwrap() {
        queue.outbox_told(&goal).await.unwrap();
    }
    let revision = |epoch, number| Revision { epoch, number };
    let stored = |web, api| BTreeMap::from([(name("web"), web), (name("api"), api)]);
    let same = stored(revision(1, 2), revision(1, 1));
    let none = StoreDifference::default();
    assert_eq!(queue.outbox_compare(&same, 60).await.unwrap(), none);
    assert_eq!(queue.outbox_depth().await.unwrap().goals, 0);
    // One app is behind, another one ahead, and one is not the database's at all.
    let mut other = stored(revision(1, 1), revision(2, 1));
    other.insert(name("gone"), revision(1, 1));
    let found = queue.outbox_compare(&other, 60).await.unwrap();
    assert_eq!(found.behind, 1);
    assert_eq!(found.ahead, [(name("api"), revision(2, 1)), (name("gone"), revision(1, 1))]);
    let waits = queue.outbox(10).await.unwrap();
    assert_eq!(waits.iter().map(|goal| goal.signed.as_str()).collect::<Vec<_>>(), ["1.2 web/b"]);
    // After a recovery the next goals are above all that.
    queue.raise_epoch(2, &actor(), 65).await.unwrap();
    let still = queue.outbox_compare(&other, 66).await.unwrap().ahead;
    assert_eq!(still, [(name("api"), revision(2, 1))]);
    queue.raise_epoch(3, &actor(), 67).await.unwrap();
    assert_eq!(queue.outbox_compare(&other, 68).await.unwrap().ahead, []);
    // An empty one lacks all of them.
    assert_eq!(queue.outbox_compare(&BTreeMap::new(), 70).await.unwrap().behind, 2);
    assert_eq!(queue.outbox_depth().await.unwrap().goals, 2);
}

pub(crate) async fn the_highest_epoch_is_the_databases_or_a_machines(url: &str) {
    let queue = ready(url, &["web/a"]).await;
    assert_eq!(queue.highest_epoch().await.unwrap(), 1);
    queue.raise_epoch(3, &actor(), 10).await.unwrap();
    assert_eq!(queue.highest_epoch().await.unwrap(), 3);
    let rows = queue.audit(1).await.unwrap();
    assert_eq!((rows[0].what.as_str(), rows[0].detail.as_str()), ("epoch.raise", "3"));
    let higher = Revision { epoch: 5, number: 1 };
    report(&queue, EU, &[state("m1", higher, 1, MachineState::Active)]).await;
    assert_eq!(queue.highest_epoch().await.unwrap(), 5);
}
