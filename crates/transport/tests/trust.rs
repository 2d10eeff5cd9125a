//! Trust that changes while connections stand.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Cluster, Peer, hello, until, within};
use shoal_pki::{CertificateAuthority, Role, issuer_of};
use shoal_proto::peer::{StreamReply, StreamRequest};
use shoal_transport::ConnectError;

#[tokio::test]
async fn a_revoked_machine_is_cut_off_at_once_and_stays_out_and_the_others_notice_nothing() {
    let cluster = Cluster::new();
    let config = cluster.config("r1", Role::Region);
    let credentials = config.credentials.clone();
    let mut hub = Peer::bind(&config);
    let (mut good, mut bad) = (cluster.peer("m1"), cluster.peer("m2"));
    let kept = good.connect(&hub).await;
    assert_eq!(good.connected().await, kept);
    hub.connected().await;
    let lost = bad.connect(&hub).await;
    bad.connected().await;
    hub.connected().await;
    assert_eq!(hub.endpoint.recheck(), 0, "all are good");

    let revoked = bad.node;
    assert!(credentials.set_trust(cluster.next_trust(|bundle| bundle.revoked.push(revoked))));
    assert_eq!(hub.endpoint.recheck(), 1);
    let (closed, why) = bad.closed().await;
    assert_eq!(closed, lost);
    assert!(why.contains("Untrusted"), "{why}");
    assert_eq!(hub.closed().await.0.node(), revoked);
    // It dials again, and is dialled.
    assert!(within(bad.endpoint.connect(hub.addr, hub.node)).await.is_err());
    assert!(within(hub.endpoint.connect(bad.addr, bad.node)).await.is_err());
    assert!(hub.endpoint.connection(&revoked).is_none());
    // The other one's connection is the very same, and works.
    assert_eq!(good.connect(&hub).await, kept);
    kept.send(&hello(1)).await.unwrap();
    assert_eq!(hub.message().await, hello(1));
}

#[tokio::test]
async fn a_renewed_certificate_of_another_ca_is_shown_and_the_old_ca_can_go() {
    let cluster = Cluster::new();
    let configs = [cluster.config("m1", Role::Agent), cluster.config("m2", Role::Agent)];
    let next = CertificateAuthority::create(common::CLUSTER).unwrap();
    let both = cluster.next_trust(|bundle| bundle.ca_certificates.push(next.cert_der().to_vec()));
    let only = cluster.next_trust(|bundle| {
        bundle.number += 1;
        bundle.ca_certificates = vec![next.cert_der().to_vec()];
    });
    let (mut one, two) = (Peer::bind(&configs[0]), Peer::bind(&configs[1]));
    let first = one.connect(&two).await;
    one.connected().await;
    let issuer = |connection: &shoal_transport::Connection| {
        issuer_of(&connection.certificate().unwrap()).unwrap()
    };
    for config in &configs {
        let credentials = &config.credentials;
        assert!(credentials.set_trust(both.clone()));
        let own = credentials.identity();
        let pem = next.renew(own.certificate_der(), 1_000).unwrap();
        credentials.set_identity(own.with_certificate(&pem).unwrap()).unwrap();
    }
    assert_eq!((one.endpoint.recheck(), two.endpoint.recheck()), (0, 0), "the old CA still counts");
    assert_eq!(issuer(&first), issuer_of(first.certificate().unwrap().as_slice()).unwrap());
    // Without the old CA the connection that was made by its word ends; the next one is by the new one's.
    assert!(configs.iter().all(|config| config.credentials.set_trust(only.clone())));
    assert_eq!(one.endpoint.recheck(), 1);
    one.closed().await;
    until(|| two.endpoint.connections().is_empty()).await;
    let again = one.connect(&two).await;
    assert_ne!(issuer(&again), issuer(&first));
    assert_eq!(Some(issuer(&again)), shoal_pki::ca_id(next.cert_der()));
}

#[tokio::test]
async fn a_machine_that_slept_through_a_change_of_the_ca_asks_whoever_answers() {
    let cluster = Cluster::new();
    let (sleeper, awake) = (cluster.config("m1", Role::Agent), cluster.config("r1", Role::Region));
    let next = CertificateAuthority::create(common::CLUSTER).unwrap();
    let both = cluster.next_trust(|bundle| bundle.ca_certificates.push(next.cert_der().to_vec()));
    let own = awake.credentials.identity();
    let pem = next.renew(own.certificate_der(), 1_000).unwrap();
    assert!(awake.credentials.set_trust(both.clone()));
    awake.credentials.set_identity(own.with_certificate(&pem).unwrap()).unwrap();
    let (one, mut two) = (Peer::bind(&sleeper), Peer::bind(&awake));
    let error = within(one.endpoint.connect(two.addr, two.node)).await.unwrap_err();
    assert!(matches!(error, ConnectError::Handshake(_)), "{error}");
    let (endpoint, addr) = (one.endpoint.clone(), two.addr);
    let asking = tokio::spawn(async move { endpoint.ask_trust(addr, 1).await });
    two.connected().await;
    let asked = two.request().await;
    assert_eq!(asked.request, StreamRequest::Trust { after: 1 });
    let bundles = vec![both.signed_bytes().to_vec()];
    within(asked.reply(StreamReply::Trust(bundles.clone()), None)).await.unwrap();
    assert_eq!(within(asking).await.unwrap().unwrap(), bundles);
    two.closed().await;
    let trust = sleeper.credentials.trust().successor(&bundles[0]).unwrap();
    assert!(sleeper.credentials.set_trust(trust));
    one.connect(&two).await;
}
