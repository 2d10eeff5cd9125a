//! Certificates renew by themselves: at two thirds of their life, and soon when their CA is being replaced.

use std::{
    future::Future,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use shoal_pki::{Identity, Trust, issuer_of};

use crate::membership::Membership;

/// How long to wait after nobody gave a certificate, at first and at most. The last third of a life is 30 days.
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(600);

/// While a CA is replaced, machines ask for their certificates within this time, each at its own moment: 100,000 of them
/// are 167 a second.
const ROTATION_SPREAD_MAX: Duration = Duration::from_secs(600);

/// Looked at least this often: a machine may have slept.
const LOOK_AGAIN: Duration = Duration::from_secs(3_600);

/// How much of what is left of a certificate's life machines spread their asking over: those that were set up together
/// would renew together for ever. In thousandths.
const SPREAD_PERMILLE: u32 = 1;

/// When `identity` is to be renewed, from `now_s` on; none: not within its life.
fn due_in(identity: &Identity, trust: &Trust, now_s: i64, chance: f64) -> Duration {
    let left = Duration::from_secs((identity.not_after_s() - now_s).max(0) as u64);
    let spread = (left * SPREAD_PERMILLE / 1_000).min(ROTATION_SPREAD_MAX).mul_f64(chance);
    let newest = trust.newest_ca();
    if newest.is_some() && issuer_of(identity.certificate_der()) != newest {
        return spread;
    }
    Duration::from_secs((identity.renew_at_s() - now_s).max(0) as u64) + spread
}

fn now_s() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}

/// Renews the process's certificate whenever that is due: `ask` gets one, PEM, from whoever gives it. Runs until dropped.
pub async fn keep_renewed<F>(membership: Arc<Membership>, ask: impl Fn() -> F)
where
    F: Future<Output = Result<String, String>>,
{
    let mut changes = membership.watch();
    let mut pause = RETRY_MIN;
    loop {
        changes.borrow_and_update();
        let identity = membership.identity();
        let wait = due_in(&identity, &membership.trust(), now_s(), rand::random());
        tokio::select! {
            () = tokio::time::sleep(wait.min(LOOK_AGAIN)) => if wait > LOOK_AGAIN { continue },
            changed = changes.changed() => match changed {
                Ok(()) => continue,
                Err(_) => return,
            },
        }
        let renewed = match ask().await {
            Ok(pem) => membership.take_certificate(&pem).map_err(|error| format!("{error:#}")),
            Err(error) => Err(error),
        };
        match renewed {
            Ok(()) => pause = RETRY_MIN,
            Err(error) => {
                let left_s = identity.not_after_s() - now_s();
                tracing::warn!(error, left_s, "cannot renew the certificate");
                tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.5))).await;
                // Of a short life there must be time for some more questions.
                let most = RETRY_MAX.min(Duration::from_secs((left_s / 20).max(1) as u64));
                pause = (pause * 2).min(most);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use shoal_pki::{CertificateAuthority, GoalSigner, Names, NewKey, Role};
    use shoal_proto::{
        codec,
        trust::{TRUST_MAX_BYTES, TrustBundle},
    };

    use super::*;

    #[test]
    fn two_thirds_of_a_life_or_a_new_ca_make_it_due() {
        let (ca, next) = (
            CertificateAuthority::create("reef").unwrap(),
            CertificateAuthority::create("reef").unwrap(),
        );
        let signer = GoalSigner::create(1).unwrap();
        let trust = |cas: &[&CertificateAuthority]| {
            let bundle = TrustBundle {
                cluster: "reef".into(),
                number: 1,
                ca_certificates: cas.iter().map(|ca| ca.cert_der().to_vec()).collect(),
                goal_keys: vec![signer.public()],
                revoked: vec![],
            };
            let signed = signer.sign_trust(&bundle).unwrap();
            Trust::from_signed(&codec::encode(&signed, TRUST_MAX_BYTES).unwrap()).unwrap()
        };
        let key = NewKey::generate().unwrap();
        let machine = "m1".parse().unwrap();
        let names = Names { machine, region: None, role: Role::Worker, hosts: vec![] };
        let pem = ca.certify(&names, &key.node(), 90_000).unwrap();
        let identity = Identity::from_pem(&pem, &key.to_pem().unwrap()).unwrap();
        let issued_s = identity.not_after_s() - 90_000;
        let due = |trust: &Trust, age_s, chance| {
            due_in(&identity, trust, issued_s + age_s, chance).as_secs()
        };
        assert_eq!(due(&trust(&[&ca]), 0, 0.0), 60_000);
        assert_eq!(due(&trust(&[&ca]), 59_000, 0.0), 1_000);
        assert_eq!(due(&trust(&[&ca]), 70_000, 0.0), 0);
        assert_eq!(due(&trust(&[&ca]), 70_000, 1.0), 20, "each at its own moment");
        // Another CA is the newest: soon, whatever the age.
        assert_eq!(due(&trust(&[&ca, &next]), 0, 0.0), 0);
        assert_eq!(due(&trust(&[&ca, &next]), 0, 1.0), 90);
        assert_eq!(due(&trust(&[&next, &ca]), 0, 0.0), 60_000);
    }
}
