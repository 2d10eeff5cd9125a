//! Trust bundles, revoked machines, join tokens.

use shoal_proto::{MachineName, NodeId, goal::Labels};
use shoal_queue::{
    JoinGrant, JoinToken, MachineSeen, MemberSeen, Queue, QueueError, TrustChange, TrustRow,
};

use super::{
    actor, app,
    records::{EU, deploy, named, ready, report, seen, state},
};

fn bundle(number: u64, key_id: u32) -> TrustRow {
    TrustRow { number, key_id, signed: format!("bundle {number} by {key_id}") }
}

fn next_by(key_id: u32) -> impl FnOnce(&TrustRow) -> Result<TrustRow, QueueError> {
    move |newest| Ok(bundle(newest.number + 1, key_id))
}

const CHANGE: TrustChange<'_> = TrustChange { what: "trust.test", subject: "it", detail: "why" };

fn node(number: u8) -> NodeId {
    NodeId([number; 32])
}

fn member(machine: &str, key: u8) -> MemberSeen {
    let machine: MachineName = machine.parse().unwrap();
    MemberSeen { node: node(key), machine, role: "agent".into(), region: Some(EU.parse().unwrap()) }
}

pub(crate) async fn bundles_are_numbered_one_after_the_other_and_lead_on(url: &str) {
    let queue = Queue::open(url).await.unwrap();
    let change =
        async |queue: &Queue, key| queue.change_trust(&CHANGE, next_by(key), &actor(), 5).await;
    assert_eq!(queue.trust_number().await.unwrap(), 0);
    assert!(matches!(change(&queue, 1).await, Err(QueueError::Conflict(_))));
    assert!(queue.bring_trust(&[bundle(1, 1)], 1).await.unwrap());
    assert!(!queue.bring_trust(&[bundle(1, 1)], 1).await.unwrap(), "it is there");
    // Two coordinators at once: each change has a number of its own.
    let other = Queue::open(url).await.unwrap();
    let (one, two) = tokio::join!(change(&queue, 1), change(&other, 1));
    let mut numbers = [one.unwrap().number, two.unwrap().number];
    numbers.sort_unstable();
    assert_eq!(numbers, [2, 3]);
    // What cannot be signed leaves nothing.
    let no = |_: &TrustRow| Err(QueueError::Refused("no key".into()));
    queue.change_trust(&CHANGE, no, &actor(), 5).await.unwrap_err();
    assert_eq!(queue.trust_number().await.unwrap(), 3);
    assert_eq!(change(&queue, 2).await.unwrap(), bundle(4, 2));
    assert_eq!(change(&queue, 2).await.unwrap(), bundle(5, 2));
    // The last by each key, and no others: from anywhere they lead to the newest.
    assert_eq!(other.trust_chain().await.unwrap(), [bundle(3, 1), bundle(5, 2)]);
    let audit = queue.audit(10).await.unwrap();
    assert_eq!(audit.len(), 4);
    let newest = &audit[0];
    assert_eq!((newest.what.as_str(), newest.subject.as_str()), ("trust.test", "it"));
    assert_eq!(newest.detail, "trust 5: why");
}

fn seen_with_key(machine: &str, key: u8) -> MachineSeen {
    MachineSeen { node: Some(node(key)), ..seen(machine, "web", 1) }
}

pub(crate) async fn a_revoked_machine_is_forgotten_with_all_its_keys(url: &str) {
    let queue = ready(url, &["web/a"]).await;
    let rollout = deploy(&queue, "web", &named("web/a")).await.unwrap();
    queue.bring_trust(&[bundle(1, 1)], 1).await.unwrap();
    let region = EU.parse().unwrap();
    let machines = [seen_with_key("m1", 1), seen_with_key("m2", 2)];
    queue.keep_reports(&region, &machines, &[]).await.unwrap();
    let active = shoal_proto::state::MachineState::Active;
    report(&queue, EU, &[state("m1", rollout.revision, 1, active)]).await;
    queue.keep_reports(&region, &machines, &[]).await.unwrap();
    // It had another key before, by which it spoke with a coordinator.
    queue.member_seen(&member("m1", 9), 1).await.unwrap();
    let revoke = async |machine: &str, extra| {
        let seal = |newest: &TrustRow, nodes: &[NodeId]| {
            assert!(!nodes.is_empty());
            Ok(bundle(newest.number + 1, 1))
        };
        queue.revoke(&machine.parse().unwrap(), extra, seal, &actor(), 7).await
    };
    let forgotten = queue.machine_numbers().await.unwrap().forgotten;
    let (row, nodes) = revoke("m1", None).await.unwrap();
    assert_eq!((row.number, nodes), (2, vec![node(1), node(9)]));
    let left = queue.machines(None, None).await.unwrap();
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].seen.node, Some(node(2)));
    assert!(
        queue.machine_numbers().await.unwrap().forgotten > forgotten,
        "others drop it from memory"
    );
    // A batch that was under way brings it back, until that is looked for.
    queue.keep_reports(&region, &machines, &[]).await.unwrap();
    assert_eq!(queue.forget_revoked().await.unwrap(), 1);
    assert_eq!(queue.forget_revoked().await.unwrap(), 0);
    assert_eq!(queue.machines(None, None).await.unwrap().len(), 1);
    // One that nobody knows, but by its key.
    assert!(matches!(revoke("m7", None).await, Err(QueueError::NotFound(_))));
    assert_eq!(revoke("m7", Some(node(7))).await.unwrap().1, [node(7)]);
    let audit = queue.audit(2).await.unwrap();
    let said: Vec<_> = audit.iter().map(|row| (row.what.as_str(), row.subject.as_str())).collect();
    assert_eq!(said, [("trust.revoke", "m7"), ("trust.revoke", "m1")]);
}

pub(crate) async fn present_goals_are_signed_again_and_told_again(url: &str) {
    let queue = ready(url, &["web/a", "web/b"]).await;
    app(&queue, "api").await;
    deploy(&queue, "web", &named("web/a")).await.unwrap();
    deploy(&queue, "web", &named("web/b")).await.unwrap();
    let before = queue.goals_after(0).await.unwrap();
    for goal in queue.outbox(10).await.unwrap() {
        queue.outbox_told(&goal).await.unwrap();
    }
    let again = |signed: &str| Ok(format!("{signed} again"));
    assert_eq!(queue.sign_goals_again(again, 9).await.unwrap(), 1);
    let after = queue.goals_after(before.cursor).await.unwrap();
    assert_eq!(after.signed, [format!("{} again", before.signed[0])]);
    let told: Vec<_> = queue.outbox(10).await.unwrap().into_iter().map(|g| g.signed).collect();
    assert_eq!(told, after.signed);
    let no = |_: &str| Err(QueueError::Refused("no key".into()));
    queue.sign_goals_again(no, 9).await.unwrap_err();
    assert_eq!(queue.goals_after(0).await.unwrap().signed, after.signed);
}

fn token(id: &str, uses_left: u32, expires_at_ms: i64) -> JoinToken {
    let grant = JoinGrant {
        role: "agent".into(),
        region: Some(EU.parse().unwrap()),
        zone: Some("a".into()),
        labels: Labels::from([("role".into(), "web".into())]),
    };
    let created_by = "alice".into();
    JoinToken { id: id.into(), grant, uses_left, created_at_ms: 10, expires_at_ms, created_by }
}

pub(crate) async fn a_join_token_is_used_as_often_as_it_says_and_not_after_its_time(url: &str) {
    let queue = Queue::open(url).await.unwrap();
    let once = token("once", 1, 1_000);
    queue.add_join_token(&once, "h1", &actor()).await.unwrap();
    queue.add_join_token(&token("twice", 2, 1_000), "h2", &actor()).await.unwrap();
    assert_eq!(queue.join_tokens(10).await.unwrap(), [once.clone(), token("twice", 2, 1_000)]);
    assert_eq!(queue.join_grant("h1", 10).await.unwrap(), Some(once.grant));
    assert_eq!(queue.join_grant("h1", 1_000).await.unwrap(), None, "its time is over");
    assert_eq!(queue.join_grant("h3", 10).await.unwrap(), None);
    let take = async |hash: &str, machine: &str, key, now_ms| {
        queue.use_join_token(hash, &member(machine, key), "10.0.0.1", now_ms).await
    };
    assert!(take("h1", "m1", 1, 1_000).await.is_err());
    take("h1", "m1", 1, 10).await.unwrap();
    assert!(matches!(take("h1", "m2", 2, 10).await, Err(QueueError::Conflict(_))));
    // A machine that is there with another key keeps its name, and the token its use.
    let error = take("h2", "m1", 3, 10).await.unwrap_err().to_string();
    assert!(error.contains("shoal pki revoke m1"), "{error}");
    take("h2", "m1", 1, 10).await.unwrap();
    take("h2", "m2", 2, 10).await.unwrap();
    assert!(queue.join_tokens(10).await.unwrap().is_empty());
    let used: Vec<_> = queue.audit(10).await.unwrap().into_iter().collect();
    assert_eq!((used[0].what.as_str(), used[0].who.as_str()), ("join_token.use", "m2"));
    assert_eq!((used[0].subject.as_str(), used[0].origin.as_str()), ("twice", "10.0.0.1"));
    // Revoked before it was used.
    queue.add_join_token(&token("third", 1, 1_000), "h3", &actor()).await.unwrap();
    queue.revoke_join_token("third", &actor(), 20).await.unwrap();
    assert!(take("h3", "m3", 4, 10).await.is_err());
    let gone = queue.revoke_join_token("third", &actor(), 20).await.unwrap_err();
    assert!(matches!(gone, QueueError::NotFound(_)), "{gone}");
}

pub(crate) async fn of_many_who_use_a_token_at_once_one_gets_it(url: &str) {
    let queue = Queue::open(url).await.unwrap();
    let other = Queue::open(url).await.unwrap();
    queue.add_join_token(&token("once", 1, 1_000), "h1", &actor()).await.unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for key in 0..20 {
        let queue = if key % 2 == 0 { queue.clone() } else { other.clone() };
        tasks.spawn(async move {
            let member = member(&format!("m{key}"), key + 1);
            queue.use_join_token("h1", &member, "10.0.0.1", 10).await.is_ok()
        });
    }
    let got = tasks.join_all().await;
    assert_eq!(got.into_iter().filter(|got| *got).count(), 1);
    let uses = queue.audit(50).await.unwrap();
    assert_eq!(uses.iter().filter(|row| row.what == "join_token.use").count(), 1);
}

pub(crate) async fn region_processes_say_how_their_machines_stand(url: &str) {
    let queue = ready(url, &["web/a"]).await;
    let (region, machine) = (EU.parse().unwrap(), "r1".parse::<MachineName>().unwrap());
    queue.region_process_seen(&region, &machine, 5).await.unwrap();
    assert!(queue.standings(0).await.unwrap().is_empty());
    queue.region_stands(&region, &machine, "{\"a\":1}", 10).await.unwrap();
    queue.region_stands(&region, &machine, "{\"a\":2}", 20).await.unwrap();
    let said = vec![(region.clone(), machine.clone(), "{\"a\":2}".to_string())];
    assert_eq!(queue.standings(20).await.unwrap(), said);
    assert!(queue.standings(21).await.unwrap().is_empty(), "it said nothing for long");
    // Being heard of does not take it away.
    queue.region_process_seen(&region, &machine, 30).await.unwrap();
    assert_eq!(queue.standings(21).await.unwrap(), said);
}
