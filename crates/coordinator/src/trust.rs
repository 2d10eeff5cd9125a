//! Whom the cluster believes: following the newest bundle, and making its successor.
//!
//! The database numbers the bundles, so any coordinator may make the next one. It is signed with the goal key: whoever has
//! that decides what every machine runs, so a key of its own for trust would guard nothing more.

use std::time::Duration;

use anyhow::Context as _;
use shoal_pki::{CertificateAuthority, GoalSigner, Trust, ca_id};
use shoal_process::{Membership, Taken};
use shoal_proto::{
    codec,
    goal::{GOAL_MAX_BYTES, SignedGoal},
    trust::{TRUST_MAX_BYTES, TrustBundle},
};
use shoal_queue::{Actor, Bell, Queue, QueueError, Result, TrustChange, TrustRow};

use crate::{
    error::{ApiError, ApiResult},
    read_signer,
    state::{Shared, bell, hex, now_ms},
};

/// Of a region process that said nothing for this long no address is told, in milliseconds.
const ADDRESSES_MS: i64 = 3_600_000;

/// How long to wait after the database failed.
const RETRY: Duration = Duration::from_secs(1);

/// Bytes in hexadecimal, as they were.
pub(crate) fn unhex(text: &str) -> Result<Vec<u8>> {
    let wrong = || QueueError::Corrupt("not hexadecimal".into());
    let pairs = text.as_bytes().chunks(2);
    pairs
        .map(|pair| {
            let pair = std::str::from_utf8(pair).map_err(|_| wrong())?;
            if pair.len() != 2 {
                return Err(wrong());
            }
            u8::from_str_radix(pair, 16).map_err(|_| wrong())
        })
        .collect()
}

fn row(trust: &Trust) -> TrustRow {
    let (number, key_id) = (trust.number(), trust.signed_by());
    TrustRow { number, key_id, signed: hex(trust.signed_bytes()) }
}

/// Takes what is newer in the database, and brings there what is newer here: at a first start, and after a restore.
pub(crate) async fn meet(queue: &Queue, membership: &Membership) -> anyhow::Result<()> {
    take_newest(queue, membership).await?;
    let mut chain = Vec::new();
    for bytes in membership.bundles_after(0) {
        chain.push(row(&Trust::from_signed(&bytes)?));
    }
    if queue.bring_trust(&chain, now_ms()).await? {
        tracing::info!(
            number = membership.trust().number(),
            "the database has this trust bundle now"
        );
    }
    Ok(())
}

/// Takes what is newer in the database; whether something was.
async fn take_newest(queue: &Queue, membership: &Membership) -> Result<bool> {
    if queue.trust_number().await? <= membership.trust().number() {
        return Ok(false);
    }
    let chain = queue.trust_chain().await?;
    let bundles = chain.iter().map(|row| unhex(&row.signed)).collect::<Result<Vec<_>>>()?;
    Ok(membership.take_trust(&bundles, "the database") == Taken::New)
}

/// Follows the bundles that other coordinators make.
pub(crate) async fn follow(shared: std::sync::Arc<Shared>) {
    let look_again = Duration::from_secs_f64(shared.config.look_again_s);
    loop {
        let bell = bell(&shared.goals_moved);
        let pause = match take_newest(&shared.queue, &shared.membership).await {
            Ok(true) => {
                forget_revoked(&shared).await;
                Duration::ZERO
            }
            Ok(false) => look_again,
            Err(error) => {
                tracing::warn!(%error, "cannot follow the trust");
                RETRY
            }
        };
        tokio::select! {
            () = bell => {}
            () = tokio::time::sleep(pause) => {}
            () = shared.stop.cancelled() => return,
        }
    }
}

/// Keeps this coordinator's own certificate renewed, by its own CA key where it has one.
pub(crate) async fn renew(shared: std::sync::Arc<Shared>) {
    let ask = || async {
        if shared.config.ca_key.is_none() {
            return Err("this coordinator has no CA key: set ca_key, or shoal pki issue".into());
        }
        let authority = shared.authority().map_err(|error| error.to_string())?;
        let own = shared.membership.identity();
        let life_s = shared.config.certificate_life_s as u64;
        authority.renew(own.certificate_der(), life_s).map_err(|error| error.to_string())
    };
    tokio::select! {
        () = shoal_process::keep_renewed(shared.membership.clone(), ask) => {}
        () = shared.stop.cancelled() => {}
    }
}

/// What a region said of a machine while that was being revoked.
async fn forget_revoked(shared: &Shared) {
    match shared.queue.forget_revoked().await {
        Ok(0) => {}
        Ok(machines) => {
            tracing::info!(machines, "revoked machines were forgotten");
            shared.ring(Bell::Rollouts);
        }
        Err(error) => tracing::warn!(%error, "cannot forget revoked machines"),
    }
}

/// Signs the successor of a bundle.
fn seal(
    signer: &GoalSigner,
    newest: &TrustRow,
    change: impl FnOnce(&mut TrustBundle) -> Result<()>,
) -> Result<TrustRow> {
    let corrupt = |error: String| QueueError::Corrupt(error);
    let held = Trust::from_signed(&unhex(&newest.signed)?).map_err(|e| corrupt(e.to_string()))?;
    let mut bundle = held.bundle().clone();
    bundle.number += 1;
    change(&mut bundle)?;
    let refused = |error: String| QueueError::Refused(error);
    let signed = signer.sign_trust(&bundle).map_err(|error| refused(error.to_string()))?;
    let bytes =
        codec::encode(&signed, TRUST_MAX_BYTES).map_err(|error| refused(error.to_string()))?;
    // As every other process will.
    let next = held.successor(&bytes).map_err(|error| QueueError::Conflict(error.to_string()))?;
    Ok(row(&next))
}

impl Shared {
    /// The key that goals and bundles are signed with: read anew, because it is replaced while the process runs.
    pub(crate) fn signer(&self) -> Result<GoalSigner> {
        read_signer(&self.config.goal_key, &self.membership.trust())
            .map_err(|error| QueueError::Conflict(format!("{error:#}")))
    }

    /// The CA that certificates come from: read anew, for the same reason.
    pub(crate) fn authority(&self) -> ApiResult<CertificateAuthority> {
        let no = |text: String| {
            ApiError::new(axum::http::StatusCode::SERVICE_UNAVAILABLE, "no_ca_key", text)
        };
        let Some(path) = &self.config.ca_key else {
            return Err(no(
                "this coordinator has no CA key and issues no certificates: set ca_key in its configuration, or use \
                 shoal pki issue where the key is"
                    .into(),
            ));
        };
        let trust = self.membership.trust();
        let read = || -> anyhow::Result<CertificateAuthority> {
            let key = std::fs::read_to_string(path)?;
            Ok(CertificateAuthority::of_trust(&trust, &key)?)
        };
        let authority = read()
            .with_context(|| format!("the CA key {} is not usable", path.display()))
            .map_err(|error| no(format!("{error:#}")))?;
        if ca_id(authority.cert_der()) != trust.newest_ca() {
            return Err(no(format!(
                "the CA is being replaced, and {} is still the old one's key: put the new one there",
                path.display()
            )));
        }
        Ok(authority)
    }

    /// Makes the next trust bundle, with its audit row, and tells everybody.
    pub(crate) async fn change_trust(
        &self,
        what: &TrustChange<'_>,
        change: impl FnOnce(&mut TrustBundle) -> Result<()> + Send,
        actor: &Actor,
    ) -> Result<u64> {
        let signer = self.signer()?;
        let seal = |newest: &TrustRow| seal(&signer, newest, change);
        let next = self.queue.change_trust(what, seal, actor, now_ms()).await?;
        self.take_changed(&next).await?;
        Ok(next.number)
    }

    /// Revokes a machine's keys: the number of the bundle that says so, and the keys.
    pub(crate) async fn revoke(
        &self,
        machine: &shoal_proto::MachineName,
        extra: Option<shoal_proto::NodeId>,
        actor: &Actor,
    ) -> Result<(u64, Vec<shoal_proto::NodeId>)> {
        let signer = self.signer()?;
        let own = self.membership.identity().member().node;
        let sealed = |newest: &TrustRow, nodes: &[shoal_proto::NodeId]| {
            seal(&signer, newest, |bundle| {
                let new: Vec<_> =
                    nodes.iter().filter(|node| !bundle.revoked.contains(node)).copied().collect();
                if new.is_empty() {
                    return Err(QueueError::Conflict(format!("{machine} is revoked already")));
                }
                if new.contains(&own) {
                    return Err(QueueError::Conflict(format!(
                        "{machine} is the coordinator that you ask: have another one revoke it"
                    )));
                }
                bundle.revoked.extend(new);
                Ok(())
            })
        };
        let (next, nodes) = self.queue.revoke(machine, extra, sealed, actor, now_ms()).await?;
        self.take_changed(&next).await?;
        forget_revoked(self).await;
        self.ring(Bell::Rollouts);
        Ok((next.number, nodes))
    }

    async fn take_changed(&self, next: &TrustRow) -> Result<()> {
        // Another coordinator may have made others in between: then all of them.
        if self.membership.take_trust(&[unhex(&next.signed)?], "this coordinator") != Taken::New {
            take_newest(&self.queue, &self.membership).await?;
        }
        self.ring(Bell::Goals);
        Ok(())
    }

    /// Where the processes of a region were lately, data plane.
    pub(crate) async fn region_addresses(
        &self,
        region: Option<&shoal_proto::RegionName>,
    ) -> Result<Vec<String>> {
        let Some(region) = region else { return Ok(Vec::new()) };
        let all = self.queue.standings(now_ms() - ADDRESSES_MS).await?;
        let own = all.into_iter().filter(|(of, ..)| of == region);
        let own = own.filter_map(|(.., standing)| {
            let standing: shoal_client::types::Standing = serde_json::from_str(&standing).ok()?;
            standing.address
        });
        Ok(own.collect())
    }

    /// Has all present goals signed with this coordinator's key.
    pub(crate) async fn sign_goals_again(&self) -> Result<u64> {
        let signer = self.signer()?;
        let sign = |signed: &str| {
            let corrupt = |error: String| QueueError::Corrupt(error);
            let held: SignedGoal = codec::decode(&unhex(signed)?, GOAL_MAX_BYTES)
                .map_err(|error| corrupt(error.to_string()))?;
            let goal = held.decode_unverified().map_err(|error| corrupt(error.to_string()))?;
            let signed =
                signer.sign_goal(&goal).map_err(|error| QueueError::Refused(error.to_string()))?;
            let bytes = codec::encode(&signed, GOAL_MAX_BYTES)
                .map_err(|error| QueueError::Refused(error.to_string()))?;
            Ok(hex(&bytes))
        };
        let goals = self.queue.sign_goals_again(sign, now_ms()).await?;
        self.ring(Bell::Goals);
        Ok(goals)
    }
}
