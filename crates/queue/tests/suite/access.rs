//! Tokens, requests that come again, lists in pages, the audit log's filters.

use std::collections::BTreeSet;

use shoal_proto::{
    Revision,
    state::{MachineState, TokenRole},
};
use shoal_queue::{Actor, AuditFilter, Known, MachineSeen, NewToken, Queue, QueueError, Reports};

use super::{
    actor, app, ask, name,
    records::{self, publish},
    submit,
};

fn new_token(name: &str, expires_at_ms: Option<i64>) -> NewToken {
    let apps = Some(BTreeSet::from([super::name("web")]));
    let hash = format!("hash-of-{name}");
    NewToken { name: name.parse().unwrap(), hash, role: TokenRole::Deployer, apps, expires_at_ms }
}

pub(crate) async fn tokens_count_until_they_end(url: &str) {
    let (queue, other) = (Queue::open(url).await.unwrap(), Queue::open(url).await.unwrap());
    let made = queue.create_token(&new_token("ci", Some(1_000)), &actor(), 10).await.unwrap();
    let again = queue.create_token(&new_token("ci", None), &actor(), 11).await;
    assert!(matches!(again, Err(QueueError::Conflict(text)) if text.contains("'ci'")));
    queue.create_token(&new_token("cd", None), &actor(), 12).await.unwrap();
    assert_eq!(other.token_of("hash-of-ci", 999).await.unwrap().as_ref(), Some(&made));
    assert!(other.token_of("hash-of-ci", 1_000).await.unwrap().is_none(), "it has expired");
    assert!(other.token_of("ci", 20).await.unwrap().is_none());
    queue.token_used(made.id, 30).await.unwrap();
    queue.token_used(made.id, 20).await.unwrap();
    let all = queue.tokens(0, 10).await.unwrap();
    assert_eq!(all[0].last_used_at_ms, Some(30));
    assert_eq!((all[0].role, all[0].created_by.as_str()), (TokenRole::Deployer, "alice"));
    assert_eq!(queue.tokens(all[0].id, 10).await.unwrap().len(), 1);
    // Revoked by one coordinator, it counts at none from the commit on.
    let cd = "cd".parse().unwrap();
    assert!(other.token_of("hash-of-cd", 40).await.unwrap().is_some());
    queue.revoke_token(&cd, &actor(), 50).await.unwrap();
    assert!(other.token_of("hash-of-cd", 40).await.unwrap().is_none());
    let twice = queue.revoke_token(&cd, &actor(), 60).await.unwrap();
    assert_eq!(twice.revoked_at_ms, Some(50));
    let unknown = queue.revoke_token(&"no".parse().unwrap(), &actor(), 60).await;
    assert!(matches!(unknown, Err(QueueError::NotFound(_))));
    let what: Vec<_> = queue.audit(9).await.unwrap().into_iter().map(|row| row.what).collect();
    assert_eq!(what, ["token.revoke", "token.create", "token.create"]);
    assert!(queue.audit(9).await.unwrap().iter().all(|row| !row.detail.contains("hash")));
    assert_eq!(queue.forget_tokens(1_000).await.unwrap(), 1);
    assert_eq!(queue.forget_tokens(1_001).await.unwrap(), 1);
    queue.create_token(&new_token("ci", None), &actor(), 2_000).await.unwrap();
}

/// As `actor`, in a request that may come again.
fn in_request(id: &str) -> Actor {
    Actor { request: Some(id.into()), ..actor() }
}

pub(crate) async fn a_request_is_done_once(url: &str) {
    let (queue, other) = (Queue::open(url).await.unwrap(), Queue::open(url).await.unwrap());
    app(&queue, "web").await;
    assert_eq!(queue.begin_request("r1", "body", 1).await.unwrap(), Known::New);
    assert_eq!(other.begin_request("r1", "else", 2).await.unwrap(), Known::Other);
    assert_eq!(other.begin_request("r1", "body", 2).await.unwrap(), Known::UnderWay { beat: 0 });
    queue.beat_request("r1").await.unwrap();
    assert!(!other.take_over_request("r1", 0).await.unwrap(), "it goes on");
    // It has made a job, and dies before it answers.
    let wanted = ask("web");
    let job = queue.submit(&wanted, &in_request("r1"), 3).await.unwrap().job;
    assert!(other.take_over_request("r1", 1).await.unwrap());
    assert!(!queue.take_over_request("r1", 1).await.unwrap(), "one takes it over");
    queue.drop_request("r1").await.unwrap();
    assert_eq!(other.begin_request("r1", "body", 4).await.unwrap(), Known::UnderWay { beat: 2 });
    // Even when the job has ended meanwhile, which would be built again.
    queue.cancel(job.id, &actor(), 4).await.unwrap();
    let again = other.submit(&wanted, &in_request("r1"), 5).await.unwrap().job;
    assert_eq!(again.id, job.id);
    assert_eq!(queue.jobs(None, 10).await.unwrap().len(), 1);
    other.answer_request("r1", 200, "{}").await.unwrap();
    let answer = Known::Answered { status: 200, body: "{}".into() };
    assert_eq!(queue.begin_request("r1", "body", 6).await.unwrap(), answer);
    assert!(!other.take_over_request("r1", 2).await.unwrap());
    // What was refused may come again.
    assert_eq!(queue.begin_request("r2", "body", 7).await.unwrap(), Known::New);
    queue.drop_request("r2").await.unwrap();
    assert_eq!(queue.known_request("r2", "body").await.unwrap(), Known::New);
    assert_eq!(queue.begin_request("r2", "other", 8).await.unwrap(), Known::New);
    assert_eq!(queue.forget_requests(2).await.unwrap(), 1);
    assert_eq!(queue.begin_request("r1", "new", 9).await.unwrap(), Known::New);
}

pub(crate) async fn two_who_do_one_request_make_one_thing(url: &str) {
    let (queue, other) = (Queue::open(url).await.unwrap(), Queue::open(url).await.unwrap());
    app(&queue, "web").await;
    for round in 0..20 {
        let id = format!("r{round}");
        queue.begin_request(&id, "body", 1).await.unwrap();
        // Builds of two commits: no job would be joined.
        let (one, two, by) = (ask("web"), ask("web"), in_request(&id));
        let (one, two) = tokio::join!(queue.submit(&one, &by, 2), other.submit(&two, &by, 2));
        assert_eq!(one.unwrap().job.id, two.unwrap().job.id, "round {round}");
    }
    assert_eq!(queue.jobs(None, 100).await.unwrap().len(), 20);
}

pub(crate) async fn pages_neither_skip_nor_repeat(url: &str) {
    let queue = Queue::open(url).await.unwrap();
    for of in ["a-b", "ab", "a.c", "b"] {
        app(&queue, of).await;
    }
    // Several of a moment, of two apps.
    for at in 0..12 {
        submit(&queue, if at % 3 == 0 { "ab" } else { "b" }, at / 4).await;
        publish(&queue, "ab", &format!("ab/{at}"), at as u8).await;
    }
    let apps = Some(BTreeSet::from([name("ab"), name("a.c")]));
    for (apps, want) in [(None, 12), (apps.clone(), 4)] {
        let (mut seen, mut after) = (Vec::new(), None);
        loop {
            let page = queue.jobs_page(apps.as_ref(), after, 3).await.unwrap();
            let Some(last) = page.last() else { break };
            after = Some((last.created_at_ms, last.id));
            seen.extend(page.iter().map(|job| job.id));
            // What comes meanwhile moves nothing.
            submit(&queue, "ab", 100 + seen.len() as i64).await;
        }
        let all = queue.jobs_page(apps.as_ref(), None, 1_000).await.unwrap();
        let first_twelve = |ids: Vec<i64>| ids.into_iter().filter(|id| *id <= 12).collect();
        let all: Vec<_> = first_twelve(all.iter().map(|job| job.id).collect());
        assert_eq!((all.len(), first_twelve(seen)), (want, all));
    }
    let (mut seen, mut after): (Vec<_>, Option<(i64, String)>) = (Vec::new(), None);
    loop {
        let from = after.as_ref().map(|(at, name)| (*at, name.as_str()));
        let page = queue.artifacts_page(None, from, 5).await.unwrap();
        let Some(last) = page.last() else { break };
        after = Some((last.created_at_ms, last.name.clone()));
        seen.extend(page.into_iter().map(|artifact| artifact.name));
    }
    assert_eq!(seen.len(), 12);
    assert_eq!(seen.iter().collect::<BTreeSet<_>>().len(), 12);
    let (mut seen, mut after) = (Vec::new(), String::new());
    while let Some(row) = queue.apps_page(None, &after, 1).await.unwrap().pop() {
        after = row.name.to_string();
        seen.push(after.clone());
    }
    seen.sort_unstable();
    assert_eq!(seen, ["a-b", "a.c", "ab", "b"]);
    assert_eq!(queue.apps_page(apps.as_ref(), "", 9).await.unwrap().len(), 2);
    let nothing = Some(BTreeSet::new());
    assert!(queue.apps_page(nothing.as_ref(), "", 9).await.unwrap().is_empty());
    let machine = |of: &str| MachineSeen {
        node: None,
        name: of.parse().unwrap(),
        zone: "z".into(),
        labels: [].into(),
        version: "1".into(),
        address: "x".into(),
        last_seen_ms: 1,
    };
    let machines = ["m-1", "m1", "m.2", "m10", "m2"].map(machine);
    let eu = "eu".parse().unwrap();
    queue.keep_reports(&eu, &machines, &[]).await.unwrap();
    let (mut seen, mut after) = (Vec::new(), String::new());
    while let Some(row) =
        queue.machines_page(Some(&eu), Reports::default(), &after, 2).await.unwrap().first()
    {
        after = row.seen.name.to_string();
        seen.push(after.clone());
    }
    seen.sort_unstable();
    assert_eq!(seen, ["m-1", "m.2", "m1", "m10", "m2"]);
    let of_apps = Reports { apps: apps.as_ref(), failed: false };
    assert!(queue.machines_page(None, of_apps, "", 9).await.unwrap().is_empty());
    // Those that failed, and why.
    let (revision, web) = (Revision { epoch: 1, number: 1 }, BTreeSet::from([name("web")]));
    let said = |machine, state| records::state(machine, revision, 1, state);
    let states = [
        said("m1", MachineState::Failed),
        said("m2", MachineState::Active),
        said("m10", MachineState::RolledBack),
        said("m.2", MachineState::Waiting),
    ];
    queue.keep_reports(&eu, &machines, &states).await.unwrap();
    let count = async |wanted| queue.machines_page(None, wanted, "", 9).await.unwrap().len();
    let of_web = Reports { apps: Some(&web), failed: false };
    assert_eq!(count(of_web).await, 4);
    let failed =
        queue.machines_page(None, Reports { failed: true, ..of_web }, "", 9).await.unwrap();
    let failed: Vec<_> =
        failed.iter().map(|row| (row.seen.name.as_str(), row.apps.len())).collect();
    assert_eq!(
        failed.iter().copied().collect::<BTreeSet<_>>(),
        BTreeSet::from([("m1", 1), ("m10", 1)])
    );
    assert_eq!(count(Reports { failed: true, ..of_apps }).await, 0);
    assert_eq!(count(Reports { failed: true, apps: None }).await, 2);
}

pub(crate) async fn audit_rows_are_found_by_what_they_say(url: &str) {
    let queue = Queue::open(url).await.unwrap();
    let bob = Actor { name: "token:bob".into(), ..actor() };
    app(&queue, "web").await;
    app(&queue, "web2").await;
    submit(&queue, "web", 5).await;
    queue.submit(&ask("web2"), &bob, 6).await.unwrap();
    queue.pause(Some("why"), &bob, 7).await.unwrap();
    let find = async |change: &dyn Fn(&mut AuditFilter)| {
        let mut filter = AuditFilter::default();
        change(&mut filter);
        let rows = queue.audit_rows(&filter, 10).await.unwrap();
        rows.into_iter().map(|row| row.what).collect::<Vec<_>>()
    };
    let some = |text: &str| Some(text.to_string());
    assert_eq!(find(&|f| f.app = some("web")).await, ["job.submit", "app.set"]);
    assert_eq!(find(&|f| f.who = some("token:bob")).await, ["queue.pause", "job.submit"]);
    assert_eq!(find(&|f| f.what = some("job.")).await.len(), 2);
    assert_eq!(find(&|f| f.what = some("job")).await.len(), 0);
    assert_eq!(find(&|f| f.what = some("app.set")).await.len(), 2);
    assert_eq!(find(&|f| f.subject = some("queue")).await, ["queue.pause"]);
    assert_eq!(find(&|f| f.since_ms = Some(6)).await, ["queue.pause", "job.submit"]);
    let both = find(&|f| (f.app, f.who) = (some("web2"), some("alice"))).await;
    assert_eq!(both, ["app.set"]);
    let rows = queue.audit_rows(&AuditFilter::default(), 2).await.unwrap();
    assert_eq!(find(&|f| f.before = Some(rows[1].id)).await.len(), 3);
    assert!(rows[0].app.is_none() && rows[1].app.as_deref() == Some("web2"));
}
