//! Membership over the API: whom the coordinator believes, and who may join.

use std::time::{Duration, Instant};

use shoal_client::{
    Client,
    types::{
        ClaimRequest, FinishRotation, JoinRequest, JoinTokenRequest, MachineSeen, RenewForRequest,
        RevokeRequest, Standing, TrustQuery,
    },
};
use shoal_pki::{Identity, NewKey, Role, Trust};
use shoal_proto::NodeId;

use crate::harness::*;

fn unhex(text: &str) -> Vec<u8> {
    let pairs = text.as_bytes().chunks(2);
    pairs.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

/// What a refusal says.
fn said<T: std::fmt::Debug>(result: Result<T, shoal_client::ClientError>) -> String {
    refusal(result).2
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn claim() -> ClaimRequest {
    ClaimRequest { host: "host".into(), incarnation: "one".into(), wait_s: POLL_S }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_shows_no_certificate_may_read_the_trust_and_nothing_else() {
    let cluster = Cluster::start().await;
    let stranger = Client::stranger(&[cluster.url()], Some(cluster.trust.clone())).unwrap();
    let reply = stranger.trust(&TrustQuery::default()).await.unwrap();
    assert_eq!(
        (reply.number, unhex(&reply.bundles[0])),
        (1, cluster.trust.signed_bytes().to_vec())
    );
    let refused = stranger.apps().await.unwrap_err();
    assert_eq!(refused.code(), Some("unauthorized"), "{refused}");
    assert_eq!(stranger.renew().await.unwrap_err().code(), Some("unauthorized"));
    let revoke = RevokeRequest { machine: "m1".parse().unwrap(), node: None };
    assert_eq!(stranger.revoke(&revoke).await.unwrap_err().code(), Some("unauthorized"));
    // Nor may those whose roles are others.
    let worker = cluster.client(Role::Worker, "w1", None);
    assert_eq!(worker.revoke(&revoke).await.unwrap_err().code(), Some("forbidden"));
    // It believes no coordinator of another CA.
    let other = Cluster::start().await;
    let stranger = Client::stranger(&[cluster.url()], Some(other.trust.clone())).unwrap();
    assert!(stranger.trust(&TrustQuery::default()).await.unwrap_err().is_transient());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_callers_connections_end_at_once_and_nobody_elses() {
    let cluster = Cluster::start_with(ONLY_BELLS).await;
    let (operator, good) = (cluster.operator(), cluster.client(Role::Worker, "w2", None));
    let bad = cluster.client(Role::Worker, "w1", None);
    // Both wait in a long poll on a connection of their own.
    let waits = tokio::spawn(async move { good.claim(&claim()).await });
    let ends = tokio::spawn(async move { (bad.claim(&claim()).await, bad) });
    wait_for("both to be known", async || {
        let workers = operator.workers().await.unwrap();
        if workers.len() == 2 { Ok(()) } else { Err(workers.len()) }
    })
    .await;
    let start = Instant::now();
    let follower = cluster.client(Role::Region, "r1", Some("eu"));
    let follows =
        tokio::spawn(
            async move { follower.trust(&TrustQuery { after: 1, wait_s: 5 }).await.unwrap() },
        );
    let revoke = RevokeRequest { machine: "w1".parse().unwrap(), node: None };
    let revoked = operator.revoke(&revoke).await.unwrap();
    assert_eq!((revoked.number, revoked.nodes.len()), (2, 1));
    let (ended, bad) = ends.await.unwrap();
    assert!(ended.is_err());
    assert!(start.elapsed() < Duration::from_secs(10), "only the end of its poll ended it");
    assert!(bad.claim(&claim()).await.unwrap_err().is_transient(), "no connection");
    // Who follows is told, and gets to the newest from what it has.
    let told = follows.await.unwrap();
    let bundles: Vec<_> = told.bundles.iter().map(|text| unhex(text)).collect();
    let next = cluster.trust.follow(bundles.iter().map(Vec::as_slice)).unwrap();
    assert_eq!((next.number(), next.is_revoked(&revoked.nodes[0])), (2, true));
    // The other one's poll goes on, and is woken by a job.
    assert!(!waits.is_finished());
    waits.abort();
    let again = said(operator.revoke(&revoke).await);
    assert!(again.contains("revoked already"), "{again}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_machine_is_no_longer_told_of() {
    let cluster = Cluster::start().await;
    let (operator, region) = (cluster.operator(), cluster.region("eu"));
    let node = |byte| Some(NodeId([byte; 32]));
    let both = || {
        let one = MachineSeen { node: node(1), ..machine("m1", "web") };
        vec![one, MachineSeen { node: node(2), ..machine("m2", "web") }]
    };
    report(&region, both(), vec![]).await;
    let names = async || {
        let machines = operator.machines(None, None).await.unwrap();
        machines.iter().map(|machine| machine.name.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(names().await, ["m1", "m2"]);
    let revoke = RevokeRequest { machine: "m1".parse().unwrap(), node: None };
    assert_eq!(Some(operator.revoke(&revoke).await.unwrap().nodes[0]), node(1));
    assert_eq!(names().await, ["m2"]);
    // A region process that has not heard of it yet tells of it once more, and of the other one.
    report(&region, both(), vec![]).await;
    assert_eq!(names().await, ["m2"]);
}

async fn token(operator: &Client, uses: u32) -> (String, String) {
    let request = JoinTokenRequest {
        role: "agent".into(),
        region: Some("eu".parse().unwrap()),
        zone: None,
        labels: Default::default(),
        uses,
        ttl_s: 60,
    };
    let made = operator.make_join_token(&request).await.unwrap();
    (made.token, made.ca_hash)
}

fn ask(key: &NewKey, token: &str, machine: &str) -> JoinRequest {
    let machine = machine.parse().unwrap();
    let signature = hex(&key.sign_join(token, &machine));
    JoinRequest { token: token.into(), machine, node: key.node(), hosts: vec![], signature }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_joins_with_a_token_and_the_key_that_it_names() {
    let cluster = Cluster::start().await;
    let operator = cluster.operator();
    let stranger = Client::stranger(&[cluster.url()], Some(cluster.trust.clone())).unwrap();
    let (token, ca_hash) = token(&operator, 1).await;
    let der = &cluster.trust.bundle().ca_certificates[0];
    assert_eq!(ca_hash, format!("blake3:{}", blake3::hash(der).to_hex()));
    let (key, other) = (NewKey::generate().unwrap(), NewKey::generate().unwrap());
    // Somebody who saw the request cannot get the certificate for another key or name.
    let stolen = JoinRequest { node: other.node(), ..ask(&key, &token, "m1") };
    assert!(said(stranger.join(&stolen).await).contains("not signed"));
    let renamed = JoinRequest { machine: "m2".parse().unwrap(), ..ask(&key, &token, "m1") };
    assert!(said(stranger.join(&renamed).await).contains("not signed"));
    let joined = stranger.join(&ask(&key, &token, "m1")).await.unwrap();
    let identity = Identity::from_pem(&joined.certificate, &key.to_pem().unwrap()).unwrap();
    assert_eq!(identity.member().to_string(), "agent m1 in eu");
    let trust = Trust::from_signed(&unhex(&joined.trust)).unwrap();
    assert_eq!(trust.verify_certificate(identity.certificate_der()).unwrap(), *identity.member());
    assert!(said(stranger.join(&ask(&other, &token, "m2")).await).contains("used up"));
    let rows = operator.audit(&Default::default(), 1).await.unwrap();
    let row = &rows[0];
    assert_eq!((row.what.as_str(), row.who.as_str()), ("join_token.use", "m1"), "{row:?}");
    assert!(row.detail.contains(&key.node().to_string()), "{row:?}");
    // Tokens give no role that could do everything, and no region that is not there.
    for (role, region) in
        [("operator", None), ("coordinator", None), ("agent", None), ("agent", Some("mars"))]
    {
        let region = region.map(|region: &str| region.parse().unwrap());
        let request = JoinTokenRequest {
            role: role.into(),
            region,
            zone: None,
            labels: Default::default(),
            uses: 1,
            ttl_s: 60,
        };
        said(operator.make_join_token(&request).await);
    }
    // Nor do they count for ever, for anybody, or not at all.
    let fine = JoinTokenRequest {
        role: "worker".into(),
        region: None,
        zone: None,
        labels: Default::default(),
        uses: 1,
        ttl_s: 60,
    };
    operator.make_join_token(&fine).await.unwrap();
    for (uses, ttl_s, word) in
        [(0, 60, "uses"), (u32::MAX, 60, "uses"), (1, 0, "ttl_s"), (1, u64::MAX >> 12, "ttl_s")]
    {
        let request = JoinTokenRequest { uses, ttl_s, ..fine.clone() };
        let text = said(operator.make_join_token(&request).await);
        assert!(text.starts_with(&format!("{word} = ")), "{text}");
    }
    // It renews by way of its region process, which may do so for its own region's agents alone.
    let certificate = hex(identity.certificate_der());
    let renew = RenewForRequest { certificate };
    let (eu, us) = (cluster.region("eu"), cluster.region("us"));
    let renewed = eu.renew_for(&renew).await.unwrap().certificate;
    assert_eq!(identity.with_certificate(&renewed).unwrap().member(), identity.member());
    assert!(said(us.renew_for(&renew).await).contains("no agent of region us"));
    let operators = cluster.identity(Role::Operator, "eve", None);
    let wrong = RenewForRequest { certificate: hex(operators.certificate_der()) };
    assert!(said(eu.renew_for(&wrong).await).contains("no agent"));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_names_wrong_tokens_must_wait_and_has_used_none() {
    let cluster = Cluster::start().await;
    let stranger = Client::stranger(&[cluster.url()], Some(cluster.trust.clone())).unwrap();
    let key = NewKey::generate().unwrap();
    let mut codes = Vec::new();
    for _ in 0..11 {
        let error = stranger.join(&ask(&key, "shoal-join-no", "m1")).await.unwrap_err();
        codes.push(error.code().unwrap().to_string());
    }
    assert!(codes[..10].iter().all(|code| code == "forbidden"), "{codes:?}");
    assert_eq!(codes[10], "too_many_requests");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_without_the_cas_key_says_so() {
    let cluster = Cluster::start_with(NO_CA_KEY).await;
    let worker = cluster.client(Role::Worker, "w1", None);
    let error = worker.renew().await.unwrap_err();
    assert_eq!(error.code(), Some("no_ca_key"), "{error}");
    assert!(error.to_string().contains("set ca_key"), "{error}");
    assert_eq!(cluster.operator().trust_status().await.unwrap().issues_with, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_waits_for_machines_that_are_behind() {
    let cluster = Cluster::start().await;
    let operator = cluster.operator();
    let refused = said(operator.finish_goal_key(&FinishRotation::default()).await);
    assert!(refused.contains("rotate-goal-key begin"), "{refused}");
    let standing = Standing { bundles: [(1, 3)].into(), ..Standing::default() };
    cluster.region("eu").stand(&standing).await.unwrap();
    let signer = shoal_pki::GoalSigner::create(2).unwrap();
    let public = hex(&signer.public().public);
    let begin = shoal_client::types::GoalKeyBeginRequest { id: 2, public };
    assert_eq!(operator.begin_goal_key(&begin).await.unwrap().number, 2);
    assert!(said(operator.begin_goal_key(&begin).await).contains("already"));
    let refused = said(operator.finish_goal_key(&FinishRotation::default()).await);
    assert!(refused.contains("still signs with goal key 1"), "{refused}");
    std::fs::write(cluster.path("goal.key"), signer.to_pem().unwrap()).unwrap();
    let refused = said(operator.finish_goal_key(&FinishRotation::default()).await);
    assert!(refused.contains("3 machines still go by"), "{refused}");
    let status = operator.trust_status().await.unwrap();
    assert_eq!((status.goal_keys, status.signs_with), (vec![1, 2], Some(2)));
    let force = FinishRotation { force: true };
    assert_eq!(operator.finish_goal_key(&force).await.unwrap().number, 3);
    assert_eq!(operator.trust_status().await.unwrap().goal_keys, [2]);
    // The bundles lead from the first to the last, whoever asks from where.
    let reply = operator.trust(&TrustQuery { after: 1, wait_s: 0 }).await.unwrap();
    let bundles: Vec<_> = reply.bundles.iter().map(|text| unhex(text)).collect();
    assert_eq!(cluster.trust.follow(bundles.iter().map(Vec::as_slice)).unwrap().number(), 3);
}
