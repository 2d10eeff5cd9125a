use shoal_proto::{
    AppName, ArtifactId, EncodingId, Revision, codec,
    goal::{Activation, GOAL_MAX_BYTES, Goal, RolloutPlan, Selector, SignedGoal},
    manifest::PieceSize,
};

use super::{CLUSTER, Cluster, bundle, cluster, sign, signed_bytes};
use crate::{CertificateAuthority, GoalError, GoalSigner, SignError, Trust, TrustError};

fn goal(cluster: &str) -> Goal {
    Goal {
        cluster: cluster.into(),
        app: AppName::new("web").unwrap(),
        revision: Revision { epoch: 0, number: 7 },
        selector: Selector::default(),
        regions: vec![],
        artifact: ArtifactId([1; 32]),
        size_bytes: 10_000_000_000,
        piece_size: PieceSize::MAX,
        encoding: EncodingId([2; 32]),
        file_mode: 0o755,
        activation: Activation::Run { args: vec!["--port".into(), "80".into()] },
        health: None,
        plan: RolloutPlan::default(),
        priority: 1,
        machines_estimate: 20_000,
        issued_at_ms: 0,
    }
}

#[test]
fn a_signed_goal_opens() {
    let Cluster { signer, trust, .. } = cluster(CLUSTER);
    let signed = signer.sign_goal(&goal(CLUSTER)).unwrap();
    assert_eq!(trust.open_goal(&signed).unwrap(), goal(CLUSTER));
    let again = GoalSigner::from_pem(&signer.to_pem().unwrap()).unwrap();
    assert_eq!(again.public(), signer.public());
    assert_eq!(again.sign_goal(&goal(CLUSTER)).unwrap(), signed);
    assert!(GoalSigner::from_pem("").is_err());
}

#[test]
fn a_goal_signed_by_another_key_is_refused() {
    let Cluster { signer, trust, .. } = cluster(CLUSTER);
    // Under the known number, and under an unknown one.
    let forged = GoalSigner::create(1).unwrap().sign_goal(&goal(CLUSTER)).unwrap();
    assert_eq!(trust.open_goal(&forged), Err(GoalError::Signature));
    let unknown = GoalSigner::create(9).unwrap().sign_goal(&goal(CLUSTER)).unwrap();
    assert_eq!(trust.open_goal(&unknown), Err(GoalError::UnknownKey(9)));
    // A goal's signature is not one over a trust bundle, nor the other way round.
    let signed = signer.sign_trust(trust.bundle()).unwrap();
    let crossed =
        SignedGoal { goal: signed.bundle, key_id: signed.key_id, signature: signed.signature };
    assert!(trust.open_goal(&crossed).is_err());
}

#[test]
fn a_changed_goal_is_refused() {
    let Cluster { signer, trust, .. } = cluster(CLUSTER);
    let signed = signer.sign_goal(&goal(CLUSTER)).unwrap();
    for at in 0..signed.goal.len() {
        let mut changed = signed.clone();
        changed.goal[at] ^= 1;
        assert_eq!(trust.open_goal(&changed), Err(GoalError::Signature), "byte {at}");
    }
    for at in 0..signed.signature.len() {
        let mut changed = signed.clone();
        changed.signature[at] ^= 1;
        assert_eq!(trust.open_goal(&changed), Err(GoalError::Signature), "signature byte {at}");
    }
    let mut cut = signed.clone();
    cut.signature.pop();
    assert_eq!(trust.open_goal(&cut), Err(GoalError::Signature));
    let mut none = signed;
    none.signature.clear();
    assert_eq!(trust.open_goal(&none), Err(GoalError::Signature));
}

#[test]
fn a_goal_of_another_cluster_is_refused() {
    let Cluster { signer, trust, .. } = cluster(CLUSTER);
    let signed = signer.sign_goal(&goal("atoll")).unwrap();
    assert_eq!(trust.open_goal(&signed), Err(GoalError::OtherCluster("atoll".into())));
}

#[test]
fn a_goal_that_gossip_cannot_carry_is_neither_signed_nor_taken() {
    let Cluster { signer, trust, .. } = cluster(CLUSTER);
    let with = |len: usize| {
        let mut goal = goal(CLUSTER);
        goal.activation = Activation::Command { command: "x".repeat(len) };
        goal
    };
    // The longest that is signed is just within the limit.
    let longest = (0..GOAL_MAX_BYTES).rev().find_map(|len| signer.sign_goal(&with(len)).ok());
    let longest = longest.unwrap();
    let len = codec::encode(&longest, usize::MAX).unwrap().len();
    assert_eq!(len, GOAL_MAX_BYTES);
    trust.open_goal(&longest).unwrap();
    let error = signer.sign_goal(&with(GOAL_MAX_BYTES)).unwrap_err();
    assert!(matches!(error, SignError::Goal(_)), "{error}");
    let mut padded = longest;
    padded.signature.push(0);
    assert!(matches!(trust.open_goal(&padded), Err(GoalError::Codec(_))));
}

#[test]
fn a_changed_trust_bundle_is_refused() {
    let Cluster { ca, signer, trust } = cluster(CLUSTER);
    let bytes = trust.signed_bytes();
    assert_eq!(Trust::from_signed(bytes).unwrap().bundle(), &bundle(&ca, &signer));
    for at in 0..bytes.len() {
        let mut changed = bytes.to_vec();
        changed[at] ^= 1;
        assert!(Trust::from_signed(&changed).is_err(), "byte {at}");
        assert!(Trust::from_signed(&bytes[..at]).is_err(), "cut at {at}");
    }
}

#[test]
fn a_trust_bundle_that_contradicts_itself_is_refused() {
    let Cluster { ca, signer, .. } = cluster(CLUSTER);
    let good = bundle(&ca, &signer);
    let mut without = good.clone();
    without.goal_keys.clear();
    let error = Trust::from_signed(&signed_bytes(&signer, &without)).unwrap_err();
    assert_eq!(error, TrustError::Signature);
    let mut twice = good.clone();
    twice.goal_keys.push(GoalSigner::create(1).unwrap().public());
    let error = Trust::from_signed(&signed_bytes(&signer, &twice)).unwrap_err();
    assert_eq!(error, TrustError::GoalKeyTwice(1));
    let mut foreign = good.clone();
    let other = CertificateAuthority::create("atoll").unwrap();
    foreign.ca_certificates.push(other.cert_der().to_vec());
    let error = Trust::from_signed(&signed_bytes(&signer, &foreign)).unwrap_err();
    assert!(matches!(error, TrustError::Ca(_)), "{error}");
    let mut garbage = good;
    garbage.ca_certificates.push(vec![1, 2, 3]);
    let error = Trust::from_signed(&signed_bytes(&signer, &garbage)).unwrap_err();
    assert!(matches!(error, TrustError::Ca(_)), "{error}");
}

#[test]
fn a_successor_is_signed_by_a_key_that_was_believed() {
    let Cluster { ca, signer, trust } = cluster(CLUSTER);
    let mut next = bundle(&ca, &signer);
    next.number = 2;
    let new_key = GoalSigner::create(2).unwrap();
    next.goal_keys.push(new_key.public());

    let held = trust.successor(&signed_bytes(&signer, &next)).unwrap();
    assert_eq!(held.number(), 2);
    // The new key counts from now on, and not before.
    let signed = new_key.sign_goal(&goal(CLUSTER)).unwrap();
    held.open_goal(&signed).unwrap();
    assert_eq!(trust.open_goal(&signed), Err(GoalError::UnknownKey(2)));
    let error = trust.successor(&signed_bytes(&new_key, &next)).unwrap_err();
    assert_eq!(error, TrustError::Signature);

    let error = held.successor(&signed_bytes(&signer, &next)).unwrap_err();
    assert_eq!(error, TrustError::Old { offered: 2, held: 2 });
    // Somebody else's bundle is whole in itself, but says nothing here.
    let theirs = cluster(CLUSTER);
    let mut stolen = bundle(&theirs.ca, &theirs.signer);
    stolen.number = 9;
    sign(&theirs.signer, &stolen);
    let error = held.successor(&signed_bytes(&theirs.signer, &stolen)).unwrap_err();
    assert_eq!(error, TrustError::Signature);
    let atoll = cluster("atoll");
    let error = held.successor(atoll.trust.signed_bytes()).unwrap_err();
    assert_eq!(error, TrustError::OtherCluster("atoll".into()));
}
