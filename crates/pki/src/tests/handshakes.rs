//! TLS handshakes in memory.

use std::sync::Arc;

use rustls::{CipherSuite, ClientConnection, Error, ServerConnection, pki_types::ServerName};

use super::{CLUSTER, Cluster, bundle, cluster, identity, sign};
use crate::{
    ClientAuth, Credentials, Identity, PkiError, Role, Trust, client_config, server_config,
    server_name,
};

const ALPN: &[&[u8]] = &[b"test/1"];

const DAY_S: u64 = 86_400;

fn with(identity: &Identity, trust: &Trust) -> Credentials {
    Credentials::new(identity.clone(), trust.clone())
}

/// Runs a handshake to its end: the first error of either side, or both connections.
fn shake(
    client: rustls::ClientConfig,
    server: rustls::ServerConfig,
    name: &str,
) -> Result<(ClientConnection, ServerConnection), Error> {
    let name = ServerName::try_from(name.to_string()).unwrap();
    let mut client = ClientConnection::new(Arc::new(client), name).unwrap();
    let mut server = ServerConnection::new(Arc::new(server)).unwrap();
    for _ in 0..10 {
        let mut wire = Vec::new();
        client.write_tls(&mut wire).unwrap();
        server.read_tls(&mut wire.as_slice()).unwrap();
        server.process_new_packets()?;
        wire.clear();
        server.write_tls(&mut wire).unwrap();
        client.read_tls(&mut wire.as_slice()).unwrap();
        client.process_new_packets()?;
        if !client.is_handshaking() && !server.is_handshaking() && !client.wants_write() {
            return Ok((client, server));
        }
    }
    panic!("the handshake does not end");
}

fn ends(
    server: &Cluster,
    client: &Cluster,
    client_trust: &Trust,
    server_trust: &Trust,
    name: &str,
) -> Result<(ClientConnection, ServerConnection), Error> {
    let region = identity(&server.ca, "r1", Role::Region);
    let agent = identity(&client.ca, "m1", Role::Agent);
    shake(
        client_config(&with(&agent, client_trust), ALPN).unwrap(),
        server_config(&with(&region, server_trust), ALPN, ClientAuth::Required).unwrap(),
        name,
    )
}

#[test]
fn members_shake_hands() {
    let one = cluster(CLUSTER);
    for name in [server_name(CLUSTER).as_str(), "localhost", "127.0.0.1"] {
        let (client, server) = ends(&one, &one, &one.trust, &one.trust, name).unwrap();
        let suite = client.negotiated_cipher_suite().unwrap().suite();
        assert_eq!(suite, CipherSuite::TLS13_AES_128_GCM_SHA256);
        assert_eq!(server.alpn_protocol(), Some(ALPN[0]));
        let shown = server.peer_certificates().unwrap();
        assert_eq!(one.trust.verify_certificate(&shown[0]).unwrap().machine.as_str(), "m1");
    }
}

#[test]
fn a_wrong_host_name_is_refused() {
    let one = cluster(CLUSTER);
    for name in ["elsewhere", "127.0.0.2", "atoll.shoal"] {
        let error = ends(&one, &one, &one.trust, &one.trust, name).unwrap_err();
        assert!(error.to_string().contains("NotValidForName"), "{error}");
    }
}

#[test]
fn another_ca_is_refused_by_either_side() {
    let (ours, theirs) = (cluster(CLUSTER), cluster(CLUSTER));
    let name = server_name(CLUSTER);
    // The client refuses a server of another CA.
    let error = ends(&theirs, &ours, &ours.trust, &ours.trust, &name).unwrap_err();
    assert!(error.to_string().contains("UnknownIssuer"), "{error}");
    // The server refuses a client of another CA, even one that believes the server.
    let error = ends(&ours, &theirs, &ours.trust, &ours.trust, &name).unwrap_err();
    assert!(error.to_string().contains("UnknownIssuer"), "{error}");
}

#[test]
fn a_revoked_client_is_refused() {
    let one = cluster(CLUSTER);
    let agent = identity(&one.ca, "m1", Role::Agent);
    let region = identity(&one.ca, "r1", Role::Region);
    let mut bundle = bundle(&one.ca, &one.signer);
    bundle.revoked.push(agent.member().node);
    let strict = sign(&one.signer, &bundle);
    let error = shake(
        client_config(&with(&agent, &one.trust), ALPN).unwrap(),
        server_config(&with(&region, &strict), ALPN, ClientAuth::Required).unwrap(),
        &server_name(CLUSTER),
    )
    .unwrap_err();
    assert!(error.to_string().contains("Revoked"), "{error}");
}

#[test]
fn each_handshake_goes_by_the_trust_and_the_certificate_of_its_moment() {
    let one = cluster(CLUSTER);
    let agent = identity(&one.ca, "m1", Role::Agent);
    let client = with(&agent, &one.trust);
    let server = with(&identity(&one.ca, "r1", Role::Region), &one.trust);
    let client_tls = client_config(&client, ALPN).unwrap();
    let server_tls = server_config(&server, ALPN, ClientAuth::Required).unwrap();
    let shown = || {
        let name = server_name(CLUSTER);
        let (_, server) = shake(client_tls.clone(), server_tls.clone(), &name)?;
        Ok::<_, Error>(server.peer_certificates().unwrap()[0].to_vec())
    };
    assert_eq!(shown().unwrap(), agent.certificate_der());
    // The same settings, another certificate of the same key.
    let renewed = one.ca.renew(agent.certificate_der(), DAY_S).unwrap();
    let renewed = agent.with_certificate(&renewed).unwrap();
    client.set_identity(renewed.clone()).unwrap();
    assert_ne!(renewed.certificate_der(), agent.certificate_der());
    assert_eq!(shown().unwrap(), renewed.certificate_der());
    // Another machine's is not taken.
    assert!(client.set_identity(identity(&one.ca, "m2", Role::Agent)).is_err());
    // And the same settings, another trust.
    let mut next = bundle(&one.ca, &one.signer);
    next.number = 2;
    next.revoked.push(agent.member().node);
    assert!(server.set_trust(sign(&one.signer, &next)));
    let error = shown().unwrap_err();
    assert!(error.to_string().contains("Revoked"), "{error}");
    // An older one changes nothing.
    assert!(!server.set_trust(one.trust.clone()));
    assert!(shown().is_err());
}

#[test]
fn a_client_without_a_certificate_comes_in_only_where_it_may() {
    let one = cluster(CLUSTER);
    let region = identity(&one.ca, "r1", Role::Region);
    let anonymous = || {
        let agent = identity(&one.ca, "m1", Role::Agent);
        let mut config = client_config(&with(&agent, &one.trust), ALPN).unwrap();
        config.client_auth_cert_resolver = Arc::new(NoCertificate);
        config
    };
    let server = |auth| server_config(&with(&region, &one.trust), ALPN, auth).unwrap();
    let name = server_name(CLUSTER);
    let error = shake(anonymous(), server(ClientAuth::Required), &name).unwrap_err();
    assert!(matches!(error, Error::NoCertificatesPresented), "{error}");
    let (_, server_side) = shake(anonymous(), server(ClientAuth::Optional), &name).unwrap();
    assert!(server_side.peer_certificates().is_none());
    // A certificate that is shown must be good even there.
    let stranger = identity(&cluster(CLUSTER).ca, "m1", Role::Agent);
    let config = client_config(&with(&stranger, &one.trust), ALPN).unwrap();
    let error = shake(config, server(ClientAuth::Optional), &name).unwrap_err();
    assert!(error.to_string().contains("UnknownIssuer"), "{error}");
}

#[derive(Debug)]
struct NoCertificate;

impl rustls::client::ResolvesClientCert for NoCertificate {
    fn resolve(
        &self,
        _root_hint_subjects: &[&[u8]],
        _sigschemes: &[rustls::SignatureScheme],
    ) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

/// A client that checks no Ed25519, as browsers are, and believes this one certificate.
fn browser(certificate: &str) -> rustls::ClientConfig {
    use rustls::{SignatureScheme, crypto::WebPkiSupportedAlgorithms, pki_types::pem::PemObject};
    const ECDSA: &[&dyn rustls::pki_types::SignatureVerificationAlgorithm] =
        &[webpki::aws_lc_rs::ECDSA_P256_SHA256];
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    provider.signature_verification_algorithms = WebPkiSupportedAlgorithms {
        all: ECDSA,
        mapping: &[(SignatureScheme::ECDSA_NISTP256_SHA256, ECDSA)],
    };
    let mut roots = rustls::RootCertStore::empty();
    let certificate = rustls::pki_types::CertificateDer::from_pem_slice(certificate.as_bytes());
    roots.add(certificate.unwrap()).unwrap();
    rustls::ClientConfig::builder_with_provider(provider.into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth()
}

#[test]
fn who_cannot_check_the_clusters_certificate_is_shown_another() {
    let one = cluster(CLUSTER);
    let region = identity(&one.ca, "r1", Role::Region);
    let (chain, key) = crate::self_signed(&["page.example".into()], 30).unwrap();
    let server = |chain: &str, key: &str| {
        let mut config =
            server_config(&with(&region, &one.trust), &[], ClientAuth::Optional).unwrap();
        let shown = crate::BrowserCertificate::new(chain, key)?;
        shown.show(&mut config);
        Ok::<_, PkiError>((config, shown))
    };
    let (config, shown) = server(&chain, &key).unwrap();
    let (client, _) = shake(browser(&chain), config.clone(), "page.example").unwrap();
    assert_ne!(client.peer_certificates().unwrap()[0].as_ref(), region.certificate_der());
    // A member is shown what it knows.
    let agent = identity(&one.ca, "m1", Role::Agent);
    let member = client_config(&with(&agent, &one.trust), &[]).unwrap();
    let (client, _) = shake(member, config.clone(), &server_name(CLUSTER)).unwrap();
    assert_eq!(client.peer_certificates().unwrap()[0].as_ref(), region.certificate_der());
    let (renewed, other) = crate::self_signed(&["page.example".into()], 30).unwrap();
    // What is wrong changes nothing; what is right counts from the next handshake on.
    assert!(matches!(shown.replace(&chain, &other), Err(PkiError::KeyMismatch)));
    shake(browser(&chain), config.clone(), "page.example").unwrap();
    shown.replace(&renewed, &other).unwrap();
    shake(browser(&renewed), config.clone(), "page.example").unwrap();
    assert!(shake(browser(&chain), config, "page.example").is_err());
    assert!(matches!(server(&chain, &other), Err(PkiError::KeyMismatch)));
    assert!(matches!(server("", &key), Err(PkiError::Pem(_))));
    assert!(matches!(server(&chain, "key"), Err(PkiError::Pem(_))));
    assert!(crate::not_after_s(&chain).unwrap() > 0 && crate::not_after_s(&key).is_err());
}
