use std::time::Duration;

use rustls::pki_types::UnixTime;
use shoal_proto::NodeId;

use super::{CLUSTER, bundle, cluster, identity, request, sign};
use crate::{
    CLOCK_LEEWAY_S, CertificateAuthority, CertificateError, Identity, PkiError, Role, member_of,
    server_name,
};

const DAY_S: i64 = 86_400;
const NOW_S: i64 = 1_800_000_000;

fn at(seconds: i64) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(seconds as u64))
}

#[test]
fn a_certificate_names_its_member() {
    let cluster = cluster(CLUSTER);
    for (role, name) in [
        (Role::Coordinator, "coordinator"),
        (Role::Worker, "worker"),
        (Role::Region, "region"),
        (Role::Agent, "agent"),
        (Role::Operator, "operator"),
    ] {
        let identity = identity(&cluster.ca, "m.1_a", role);
        let member = cluster.trust.verify_certificate(identity.certificate_der()).unwrap();
        assert_eq!(&member, identity.member());
        assert_eq!((member.cluster.as_str(), member.role), (CLUSTER, role));
        assert_eq!(member.machine.as_str(), "m.1_a");
        assert_eq!(member.region.is_some(), role == Role::Agent);
        assert_eq!((name.parse(), role.to_string()), (Ok(role), name.to_string()));
    }
    assert!("admin".parse::<Role>().is_err());
}

#[test]
fn keys_and_certificates_come_back_from_pem() {
    let cluster = cluster(CLUSTER);
    let key_pem = cluster.ca.key_pem().unwrap();
    let again = CertificateAuthority::from_pem(&cluster.ca.cert_pem(), &key_pem).unwrap();
    assert_eq!(again.cluster(), CLUSTER);
    let member = identity(&again, "m1", Role::Agent);
    cluster.trust.verify_certificate(member.certificate_der()).unwrap();

    // The seed makes the same public key in another library's hands.
    let seed = member.ed25519_seed();
    let pair = aws_lc_rs::signature::Ed25519KeyPair::from_seed_unchecked(&seed).unwrap();
    let public = aws_lc_rs::signature::KeyPair::public_key(&pair);
    assert_eq!(public.as_ref(), member.member().node.0);
}

#[test]
fn a_key_of_another_certificate_is_refused() {
    let ca = CertificateAuthority::create(CLUSTER).unwrap();
    let one = ca.issue(&request("m1", Role::Agent)).unwrap();
    let two = ca.issue(&request("m2", Role::Agent)).unwrap();
    assert_eq!(Identity::from_pem(&one.cert_pem, &two.key_pem).unwrap_err(), PkiError::KeyMismatch);
    assert!(Identity::from_pem(&one.key_pem, &one.key_pem).is_err());
    assert!(Identity::from_pem(&one.cert_pem, "").is_err());
    assert!(CertificateAuthority::from_pem(&ca.cert_pem(), &one.key_pem).is_err());
}

#[test]
fn another_ca_is_refused_even_under_the_same_name() {
    let ours = cluster(CLUSTER);
    for name in [CLUSTER, "atoll"] {
        let theirs = CertificateAuthority::create(name).unwrap();
        let member = identity(&theirs, "m1", Role::Agent);
        assert_eq!(
            ours.trust.verify_certificate(member.certificate_der()),
            Err(CertificateError::UnknownIssuer)
        );
    }
    // The CA itself is no member.
    assert!(ours.trust.verify_certificate(ours.ca.cert_der()).is_err());
}

#[test]
fn both_cas_of_a_rotation_count() {
    let old = cluster(CLUSTER);
    let new = CertificateAuthority::create(CLUSTER).unwrap();
    let mut both = bundle(&old.ca, &old.signer);
    both.ca_certificates.push(new.cert_der().to_vec());
    let trust = sign(&old.signer, &both);
    for ca in [&old.ca, &new] {
        trust.verify_certificate(identity(ca, "m1", Role::Agent).certificate_der()).unwrap();
    }
}

#[test]
fn time_counts_with_the_leeway_of_clocks() {
    let cluster = cluster(CLUSTER);
    let mut wanted = request("m1", Role::Agent);
    wanted.days = 1;
    let issued = cluster.ca.issue_at(&wanted, NOW_S).unwrap();
    let identity = Identity::from_pem(&issued.cert_pem, &issued.key_pem).unwrap();
    assert_eq!(identity.not_after_s(), NOW_S + DAY_S);
    let check = |seconds| {
        cluster.trust.verify_certificate_at(identity.certificate_der(), at(seconds)).map(drop)
    };
    let (first, last) = (NOW_S - DAY_S - CLOCK_LEEWAY_S, NOW_S + DAY_S + CLOCK_LEEWAY_S);
    for good in [first, NOW_S - CLOCK_LEEWAY_S, NOW_S, last] {
        assert_eq!(check(good), Ok(()), "at {good}");
    }
    assert_eq!(check(last + 1), Err(CertificateError::Expired(CLOCK_LEEWAY_S + 1)));
    assert_eq!(check(first - 1), Err(CertificateError::NotYet(CLOCK_LEEWAY_S + 1)));
}

#[test]
fn a_revoked_machine_is_refused() {
    let cluster = cluster(CLUSTER);
    let (good, bad) =
        (identity(&cluster.ca, "m1", Role::Agent), identity(&cluster.ca, "m2", Role::Agent));
    let mut bundle = bundle(&cluster.ca, &cluster.signer);
    bundle.revoked = vec![NodeId([7; 32]), bad.member().node];
    let trust = sign(&cluster.signer, &bundle);
    trust.verify_certificate(good.certificate_der()).unwrap();
    assert_eq!(
        trust.verify_certificate(bad.certificate_der()),
        Err(CertificateError::Revoked(bad.member().node))
    );
}

#[test]
fn a_changed_certificate_is_refused() {
    let cluster = cluster(CLUSTER);
    let identity = identity(&cluster.ca, "m1", Role::Agent);
    let der = identity.certificate_der();
    // A role that its holder would like better, of the same length.
    let role = der.windows(7).position(|bytes| bytes == b"/agent/").unwrap();
    let mut risen = der.to_vec();
    risen[role..role + 7].copy_from_slice(b"/Agent/");
    assert!(member_of(&risen).is_err());
    let machine = der.windows(4).position(|bytes| bytes == b"u/m1").unwrap();
    let mut other = der.to_vec();
    other[machine + 3] = b'2';
    assert_eq!(member_of(&other).unwrap().machine.as_str(), "m2");
    assert_eq!(cluster.trust.verify_certificate(&other), Err(CertificateError::UnknownIssuer));
    // Any change at all, and any cut.
    for at in 0..der.len() {
        let mut changed = der.to_vec();
        changed[at] ^= 1;
        assert!(cluster.trust.verify_certificate(&changed).is_err(), "byte {at}");
        assert!(cluster.trust.verify_certificate(&der[..at]).is_err(), "cut at {at}");
    }
}

#[test]
fn what_a_certificate_cannot_say_is_refused() {
    assert!(CertificateAuthority::create("Not a label").is_err());
    assert!(CertificateAuthority::create("-reef").is_err());
    assert!(CertificateAuthority::create(&"a".repeat(64)).is_err());
    CertificateAuthority::create(&"a".repeat(63)).unwrap();

    let ca = CertificateAuthority::create(CLUSTER).unwrap();
    let with = |change: fn(&mut crate::IssueRequest)| {
        let mut wanted = request("m1", Role::Worker);
        change(&mut wanted);
        ca.issue(&wanted)
    };
    assert!(with(|wanted| wanted.days = 0).is_err());
    assert!(with(|wanted| wanted.days = 100_000).is_err());
    assert!(with(|wanted| wanted.hosts = vec!["no host".into()]).is_err());
    assert!(with(|wanted| wanted.hosts = vec!["a".into(); 17]).is_err());
    assert!(with(|wanted| wanted.hosts = vec!["::1".into(), "a.example".into()]).is_ok());
    assert_eq!(server_name(CLUSTER), "reef.shoal");
}
