//! A process's place in its cluster, as files and in memory: its certificate and key, and whom it believes.
//!
//! Both change while it runs. What is new is checked, written whole into the identity directory, and goes for every
//! handshake from then on; who waits at [`Membership::watch`] looks again at what was agreed before.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, ensure};
use shoal_pki::{CLOCK_LEEWAY_S, Credentials, Identity, Trust, TrustError};
use shoal_proto::{
    codec,
    trust::{TRUST_CHAIN_MAX, TRUST_MAX_BYTES},
};
use tokio::sync::watch;

use crate::files::{load_identity, write_atomic};

/// The bundles before the present one that lead to it, beside `trust.bin`.
const CHAIN_FILE: &str = "trust-chain.bin";

/// The longest file of them, in bytes.
const CHAIN_MAX_BYTES: usize = TRUST_CHAIN_MAX * (TRUST_MAX_BYTES + 16);

/// What became of trust bundles that arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Taken {
    /// The last of them is what the process goes by now.
    New,
    /// Nothing newer.
    Old,
    /// Not to be believed, and why.
    Refused(String),
}

/// A process's certificate, key and trust, in memory and as files.
pub struct Membership {
    dir: PathBuf,
    credentials: Credentials,
    /// The last bundle that each goal key signed, by number, the present one last: whoever has an older bundle believes
    /// one of these keys, and gets from there to here.
    chain: Mutex<Vec<Trust>>,
    changes: watch::Sender<u64>,
}

impl Membership {
    /// Reads `identity.pem`, `identity.key` and `trust.bin` in `dir`.
    ///
    /// # Errors
    /// A line that names the file which is missing or wrong, or says that the certificate's time is over.
    pub fn load(dir: &Path) -> anyhow::Result<Self> {
        let (identity, trust) = load_identity(dir)?;
        check_time(&identity, now_s())?;
        let mut chain = earlier(&dir.join(CHAIN_FILE), &trust);
        chain.push(trust.clone());
        let credentials = Credentials::new(identity, trust);
        let (dir, chain) = (dir.to_path_buf(), Mutex::new(chain));
        Ok(Self { dir, credentials, chain, changes: watch::Sender::new(0) })
    }

    /// What handshakes go by.
    #[must_use]
    pub fn credentials(&self) -> &Credentials {
        &self.credentials
    }

    /// Whom it believes at present.
    #[must_use]
    pub fn trust(&self) -> Trust {
        self.credentials.trust()
    }

    /// Its certificate and key at present.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.credentials.identity()
    }

    /// The directory with its files.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A receiver that sees every change of trust or certificate.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn chain(&self) -> MutexGuard<'_, Vec<Trust>> {
        self.chain.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The signed bundles that lead on from number `after` to the present one, the last of them; none when that is it.
    #[must_use]
    pub fn bundles_after(&self, after: u64) -> Vec<Vec<u8>> {
        let chain = self.chain();
        let newer = chain.iter().filter(|trust| trust.number() > after);
        newer.map(|trust| trust.signed_bytes().to_vec()).collect()
    }

    /// Takes bundles that came from `from`, if each is signed by a key of the one before, the first by one of the
    /// present one. What cannot be written goes nevertheless: a machine that was revoked must be cut off now.
    pub fn take_trust(&self, bundles: &[Vec<u8>], from: &str) -> Taken {
        let mut chain = self.chain();
        let mut last = self.trust();
        let mut new = Vec::new();
        for bytes in bundles.iter().take(TRUST_CHAIN_MAX) {
            match last.successor(bytes) {
                Ok(next) => {
                    last = next.clone();
                    new.push(next);
                }
                Err(TrustError::Old { .. }) => {}
                Err(error) => {
                    tracing::warn!(%from, %error, "refused a trust bundle");
                    return Taken::Refused(error.to_string());
                }
            }
        }
        if new.is_empty() {
            return Taken::Old;
        }
        for trust in new {
            chain.retain(|held| held.signed_by() != trust.signed_by());
            chain.push(trust);
        }
        let surplus = chain.len().saturating_sub(TRUST_CHAIN_MAX);
        chain.drain(..surplus);
        if let Err(error) = self.write(&chain) {
            let error = format!("{error:#}");
            tracing::error!(
                error,
                "the new trust holds until this process ends, but is not on the disk"
            );
        }
        let (number, revoked) = (last.number(), last.bundle().revoked.len());
        let own = last.is_revoked(&self.identity().member().node);
        self.credentials.set_trust(last);
        drop(chain);
        tracing::info!(number, revoked, %from, "trust");
        if own {
            tracing::error!(
                "this process's certificate is revoked: nobody speaks with it any more"
            );
        }
        self.changes.send_modify(|count| *count += 1);
        Taken::New
    }

    fn write(&self, chain: &[Trust]) -> anyhow::Result<()> {
        let Some((present, earlier)) = chain.split_last() else { return Ok(()) };
        // First what leads to it: with the present one alone, those who are behind would be left there.
        let earlier: Vec<_> = earlier.iter().map(|trust| trust.signed_bytes().to_vec()).collect();
        let bytes = codec::encode(&earlier, CHAIN_MAX_BYTES)?;
        for (name, bytes) in [(CHAIN_FILE, &bytes[..]), ("trust.bin", present.signed_bytes())] {
            let path = self.dir.join(name);
            write_atomic(&path, bytes)
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }

    /// Takes a renewed certificate of this process's key, in PEM: written first, then shown.
    ///
    /// # Errors
    /// When it is of another key or member, does not count by the present trust, or cannot be written.
    pub fn take_certificate(&self, cert_pem: &str) -> anyhow::Result<()> {
        let identity = self.identity().with_certificate(cert_pem)?;
        self.trust().verify_certificate(identity.certificate_der())?;
        ensure!(
            identity.member() == self.identity().member(),
            "the renewed certificate is of {}, not of {}",
            identity.member(),
            self.identity().member()
        );
        let path = self.dir.join("identity.pem");
        write_atomic(&path, cert_pem.as_bytes())
            .with_context(|| format!("cannot write {}", path.display()))?;
        let until_s = identity.not_after_s();
        self.credentials.set_identity(identity)?;
        tracing::info!(until_s, "the certificate was renewed");
        self.changes.send_modify(|count| *count += 1);
        Ok(())
    }
}

/// The bundles before `present` that lead to it. Without them nobody who is behind is helped on from here.
fn earlier(path: &Path, present: &Trust) -> Vec<Trust> {
    let read = || -> anyhow::Result<Vec<Trust>> {
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
            Err(error) => return Err(error.into()),
        };
        let bundles: Vec<Vec<u8>> = codec::decode(&bytes, CHAIN_MAX_BYTES)?;
        let read = bundles.iter().map(|bytes| Ok(Trust::from_signed(bytes)?));
        read.collect()
    };
    let mut chain = read().unwrap_or_else(|error| {
        let error = format!("{error:#}");
        tracing::warn!(path = %path.display(), error, "earlier trust bundles cannot be read");
        vec![]
    });
    chain.retain(|trust| trust.number() < present.number());
    chain
}

fn now_s() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}

/// A certificate whose time is over is nobody's any more: only a new one helps.
fn check_time(identity: &Identity, now_s: i64) -> anyhow::Result<()> {
    let over_s = now_s - identity.not_after_s();
    ensure!(
        over_s <= CLOCK_LEEWAY_S,
        "the certificate of {} expired {} ago: get a new one with `shoal join` and a token of \
         `shoal join-token create`, or with `shoal pki issue`",
        identity.member(),
        match over_s / 86_400 {
            0 => format!("{over_s} s"),
            days => format!("{days} days"),
        }
    );
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use shoal_pki::{CertificateAuthority, GoalSigner, Names, Role};
    use shoal_proto::trust::TrustBundle;

    use super::*;

    pub(crate) struct Cluster {
        ca: CertificateAuthority,
        bundle: TrustBundle,
        dir: tempfile::TempDir,
    }

    impl Cluster {
        pub(crate) fn new(signer: &GoalSigner) -> Self {
            let ca = CertificateAuthority::create("reef").unwrap();
            let bundle = TrustBundle {
                cluster: "reef".into(),
                number: 1,
                ca_certificates: vec![ca.cert_der().to_vec()],
                goal_keys: vec![signer.public()],
                revoked: vec![],
            };
            let dir = tempfile::tempdir().unwrap();
            let cluster = Self { ca, bundle, dir };
            let request = shoal_pki::IssueRequest {
                machine: "m1".parse().unwrap(),
                region: None,
                role: Role::Worker,
                hosts: vec!["127.0.0.1".into(), "host.example".into()],
                days: 90,
            };
            let issued = cluster.ca.issue(&request).unwrap();
            let path = |name: &str| cluster.dir.path().join(name);
            fs::write(path("identity.pem"), issued.cert_pem).unwrap();
            fs::write(path("identity.key"), issued.key_pem).unwrap();
            fs::write(path("trust.bin"), signed(signer, &cluster.bundle)).unwrap();
            cluster
        }

        pub(crate) fn load(&self) -> Membership {
            Membership::load(self.dir.path()).unwrap()
        }

        /// The next bundle, after something was done to the last one.
        pub(crate) fn next(
            &mut self,
            signer: &GoalSigner,
            change: impl FnOnce(&mut TrustBundle),
        ) -> Vec<u8> {
            self.bundle.number += 1;
            change(&mut self.bundle);
            signed(signer, &self.bundle)
        }
    }

    fn signed(signer: &GoalSigner, bundle: &TrustBundle) -> Vec<u8> {
        codec::encode(&signer.sign_trust(bundle).unwrap(), TRUST_MAX_BYTES).unwrap()
    }

    #[test]
    fn newer_trust_is_taken_kept_and_told_and_nothing_else_is() {
        let one = GoalSigner::create(1).unwrap();
        let mut cluster = Cluster::new(&one);
        let member = cluster.load();
        let mut seen = member.watch();
        let first = signed(&one, &cluster.bundle);
        let second = cluster.next(&one, |bundle| {
            bundle.revoked.push(shoal_proto::NodeId([7; 32]));
        });
        assert_eq!(member.take_trust(std::slice::from_ref(&first), "a test"), Taken::Old);
        let forged = signed(&GoalSigner::create(1).unwrap(), &cluster.bundle);
        assert!(matches!(member.take_trust(&[forged], "a test"), Taken::Refused(_)));
        assert!(!seen.has_changed().unwrap());
        assert_eq!(member.take_trust(std::slice::from_ref(&second), "a test"), Taken::New);
        assert!(seen.has_changed().unwrap());
        seen.borrow_and_update();
        assert_eq!(member.bundles_after(1), std::slice::from_ref(&second));
        assert!(member.bundles_after(2).is_empty());
        // The next life goes by it, too, and does not go back.
        let member = cluster.load();
        assert_eq!(member.trust().number(), 2);
        assert_eq!(member.take_trust(&[first, second], "a test"), Taken::Old);
    }

    #[test]
    fn whoever_slept_through_a_change_of_the_goal_key_is_led_on() {
        let (one, two) = (GoalSigner::create(1).unwrap(), GoalSigner::create(2).unwrap());
        let mut cluster = Cluster::new(&one);
        let sleeper = cluster.load();
        let asleep = sleeper.trust();
        let both = cluster.next(&one, |bundle| bundle.goal_keys.push(two.public()));
        let again = cluster.next(&one, |_| ());
        let without = cluster.next(&two, |bundle| bundle.goal_keys.retain(|key| key.id == 2));
        assert!(asleep.successor(&without).is_err(), "it does not believe that key");
        // Another process has seen all of them, has been restarted since, and holds what leads there.
        let awake = cluster.load();
        for bundle in [both, again.clone(), without.clone()] {
            assert_eq!(awake.take_trust(&[bundle], "a test"), Taken::New);
        }
        let awake = cluster.load();
        let chain = awake.bundles_after(asleep.number());
        assert_eq!(chain, [again, without]);
        assert_eq!(sleeper.take_trust(&chain, "a test"), Taken::New);
        assert_eq!(sleeper.trust().number(), 4);
    }

    #[test]
    fn who_was_off_until_after_the_end_is_told_to_join_again() {
        let cluster = Cluster::new(&GoalSigner::create(1).unwrap());
        let identity = cluster.load().identity();
        let end = identity.not_after_s();
        check_time(&identity, end + CLOCK_LEEWAY_S).unwrap();
        let said = |over_s| check_time(&identity, end + over_s).unwrap_err().to_string();
        let late = said(3 * 86_400 + 5);
        assert!(late.contains("worker m1 expired 3 days ago"), "{late}");
        assert!(late.contains("shoal join") && !late.contains('\n'), "{late}");
        assert!(said(CLOCK_LEEWAY_S + 1).contains("601 s ago"));
    }

    #[test]
    fn a_renewed_certificate_is_written_and_shown_and_a_strange_one_is_not() {
        let signer = GoalSigner::create(1).unwrap();
        let cluster = Cluster::new(&signer);
        let member = cluster.load();
        let before = member.identity();
        let pem = cluster.ca.renew(before.certificate_der(), 1_000).unwrap();
        member.take_certificate(&pem).unwrap();
        let (now, on_disk) = (member.identity(), cluster.load().identity());
        assert_eq!(now.certificate_der(), on_disk.certificate_der());
        assert_eq!(
            (now.member(), now.not_after_s() < before.not_after_s()),
            (before.member(), true)
        );
        // Two thirds of its life.
        assert!((now.not_after_s() - now.renew_at_s() - 333).abs() <= 2);
        // Of another CA, and of another name.
        let stranger = CertificateAuthority::create("reef").unwrap();
        let pem = stranger.renew(before.certificate_der(), 1_000).unwrap();
        assert!(member.take_certificate(&pem).is_err());
        let machine = "m2".parse().unwrap();
        let names = Names { machine, region: None, role: Role::Worker, hosts: vec![] };
        let pem = cluster.ca.certify(&names, &before.member().node, 1_000).unwrap();
        assert!(member.take_certificate(&pem).is_err());
        assert_eq!(cluster.load().identity().certificate_der(), now.certificate_der());
    }
}
