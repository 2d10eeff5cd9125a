//! Membership: trust bundles, certificates, revocation, rotation.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use axum::{
    extract::{ConnectInfo, Request, State},
    http::StatusCode,
    middleware::Next,
    response::Response,
};
use shoal_client::types;
use shoal_pki::{Member, Role, Trust, ca_id};
use shoal_process::Caller;
use shoal_proto::{NodeId, RegionName, trust::GoalKey};
use shoal_queue::{MemberSeen, QueueError, TrustChange};

use super::{App, Args, Json, Peer, Reply, Who, access::From, done};
use crate::{
    error::{ApiError, ApiResult},
    state::{hex, lock, now_ms},
    trust::unhex,
};

/// Of how many members it is remembered that they were written down; when there are more, all are written again.
const NOTED_MAX: usize = 10_000;

/// Region processes that said nothing for this long are not counted, in milliseconds.
const STANDING_MS: i64 = 300_000;

/// The longest certificate in hexadecimal.
const CERTIFICATE_MAX: usize = 16 << 10;

/// The most names of CAs or goal keys in a bundle: two while one is replaced.
const ROTATING: usize = 2;

/// Members that were written down in this life of the process.
#[derive(Default)]
pub(crate) struct Noted(Mutex<HashSet<NodeId>>);

impl Noted {
    fn is_new(&self, node: NodeId) -> bool {
        let mut noted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if noted.len() >= NOTED_MAX {
            noted.clear();
        }
        noted.insert(node)
    }
}

pub(super) fn seen(member: &Member) -> MemberSeen {
    MemberSeen {
        node: member.node,
        machine: member.machine.clone(),
        role: member.role.to_string(),
        region: member.region.clone(),
    }
}

/// Writes down who calls: whoever is to be revoked is named by the machine, and revoked by the key.
pub(super) async fn note(State(shared): App, request: Request, next: Next) -> Response {
    let caller = request.extensions().get::<ConnectInfo<Caller>>();
    if let Some(member) = caller.and_then(|ConnectInfo(caller)| caller.member.clone())
        && shared.noted.is_new(member.node)
        && let Err(error) = shared.queue.member_seen(&seen(&member), now_ms()).await
    {
        lock(&shared.noted.0).remove(&member.node);
        tracing::warn!(%error, "cannot note who calls");
    }
    next.run(request).await
}

/// The bundles that lead on from the asker's: for everybody, also who has no certificate yet. They hold no secret.
pub(super) async fn bundles(
    shared: App,
    Args(query): Args<types::TrustQuery>,
) -> Reply<types::TrustReply> {
    let longest = Duration::from_secs_f64(shared.config.long_poll_s);
    let wait = longest.min(Duration::from_secs(u64::from(query.wait_s)));
    let mut changes = shared.membership.watch();
    let over = tokio::time::sleep(wait);
    tokio::pin!(over);
    while shared.membership.trust().number() <= query.after {
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { break },
            () = &mut over => break,
            () = shared.stop.cancelled() => break,
        }
    }
    let bundles = shared.membership.bundles_after(query.after);
    Ok(axum::Json(types::TrustReply {
        number: shared.membership.trust().number(),
        bundles: bundles.iter().map(|bytes| hex(bytes)).collect(),
    }))
}

pub(super) async fn revoke(
    shared: App,
    Who(_, actor): Who,
    Json(request): Json<types::RevokeRequest>,
) -> Reply<types::RevokeReply> {
    let (number, nodes) = shared.revoke(&request.machine, request.node, &actor).await?;
    tracing::info!(machine = %request.machine, number, by = actor.name, "revoked");
    Ok(axum::Json(types::RevokeReply { number, nodes }))
}

/// The hash of a CA's certificate, as new machines are told it.
pub(super) fn ca_hash(trust: &Trust) -> String {
    let der = trust.bundle().ca_certificates.last().map_or(&[][..], Vec::as_slice);
    format!("blake3:{}", blake3::hash(der).to_hex())
}

fn name(id: u64) -> String {
    format!("{id:016x}")
}

pub(super) async fn status(shared: App) -> Reply<types::TrustStatus> {
    let trust = shared.membership.trust();
    let bundle = trust.bundle();
    let mut regions: BTreeMap<RegionName, BTreeMap<_, _>> = BTreeMap::new();
    for (region, machine, standing) in shared.queue.standings(now_ms() - STANDING_MS).await? {
        let standing = serde_json::from_str(&standing).unwrap_or_default();
        regions.entry(region).or_default().insert(machine, standing);
    }
    let authority = shared.authority().ok();
    let issues_with = authority.and_then(|authority| ca_id(authority.cert_der())).map(name);
    Ok(axum::Json(types::TrustStatus {
        number: trust.number(),
        cas: bundle.ca_certificates.iter().filter_map(|der| ca_id(der)).map(name).collect(),
        ca_hash: ca_hash(&trust),
        goal_keys: bundle.goal_keys.iter().map(|key| key.id).collect(),
        signs_with: shared.signer().ok().map(|signer| signer.id()),
        issues_with,
        revoked: bundle.revoked.len() as u64,
        regions,
    }))
}

/// What a region process says of its machines.
pub(super) async fn standing(
    shared: App,
    Peer(member): Peer,
    Json(standing): Json<types::Standing>,
) -> Reply<types::Done> {
    let region = super::regions::region_of(&shared, &member).await?;
    let text = serde_json::to_string(&standing).map_err(|e| ApiError::invalid(e.to_string()))?;
    shared.queue.region_stands(&region, &member.machine, &text, now_ms()).await?;
    Ok(done())
}

fn forbidden(text: impl Into<String>) -> ApiError {
    ApiError::new(StatusCode::FORBIDDEN, "forbidden", text)
}

fn renewed(shared: &App, der: &[u8]) -> Reply<types::CertificateReply> {
    let authority = shared.authority()?;
    let life_s = shared.config.certificate_life_s as u64;
    let certificate = authority
        .renew(der, life_s)
        .map_err(|error| ApiError::invalid(format!("no certificate was issued: {error}")))?;
    Ok(axum::Json(types::CertificateReply { certificate }))
}

/// A renewed certificate of the key that the caller's connection is made with.
pub(super) async fn renew(shared: App, From(caller): From) -> Reply<types::CertificateReply> {
    let (Some(der), Some(member)) = (&caller.certificate, &caller.member) else {
        return Err(ApiError::new(
            StatusCode::UNAUTHORIZED,
            "unauthorized",
            "no certificate was shown that could be renewed: get one with shoal join",
        ));
    };
    let reply = renewed(&shared, der)?;
    tracing::info!(%member, "renewed a certificate");
    Ok(reply)
}

/// The same for a machine of the caller's region. The region process vouches that the machine has the key; that it
/// might not is no danger: the certificate is of use to the key's holder alone.
pub(super) async fn renew_for(
    shared: App,
    Peer(member): Peer,
    Json(request): Json<types::RenewForRequest>,
) -> Reply<types::CertificateReply> {
    let region = super::regions::region_of(&shared, &member).await?;
    if request.certificate.len() > CERTIFICATE_MAX {
        return Err(ApiError::too_long("no certificate is that long"));
    }
    let wrong = |_| ApiError::invalid("the certificate is not in hexadecimal");
    let der = unhex(&request.certificate).map_err(wrong)?;
    let of = shared.membership.trust().verify_certificate(&der);
    let of = of.map_err(|error| forbidden(error.to_string()))?;
    if of.region.as_ref() != Some(&region) || of.role != Role::Agent {
        return Err(forbidden(format!("{of} is no agent of region {region}")));
    }
    let reply = renewed(&shared, &der)?;
    tracing::debug!(machine = %of, "renewed a certificate");
    Ok(reply)
}

fn conflict(text: impl Into<String>) -> QueueError {
    QueueError::Conflict(text.into())
}

pub(super) async fn begin_ca(
    shared: App,
    Who(_, actor): Who,
    Json(request): Json<types::CaBeginRequest>,
) -> Reply<types::TrustChanged> {
    let der = shoal_pki::ca_certificate(&request.certificate, shared.membership.trust().cluster())
        .map_err(|error| ApiError::invalid(error.to_string()))?;
    let id = ca_id(&der).map(name).unwrap_or_default();
    let what = TrustChange { what: "trust.ca.begin", subject: &id, detail: "" };
    let change = |bundle: &mut shoal_proto::trust::TrustBundle| {
        if bundle.ca_certificates.len() >= ROTATING {
            return Err(conflict(
                "the CA is being replaced already: shoal pki rotate-ca finish ends that",
            ));
        }
        if bundle.ca_certificates.contains(&der) {
            return Err(conflict("that is the present CA: make a new one"));
        }
        bundle.ca_certificates.push(der.clone());
        Ok(())
    };
    let number = shared.change_trust(&what, change, &actor).await?;
    Ok(axum::Json(types::TrustChanged { number }))
}

pub(super) async fn finish_ca(
    shared: App,
    Who(_, actor): Who,
    Json(request): Json<types::FinishRotation>,
) -> Reply<types::TrustChanged> {
    let trust = shared.membership.trust();
    let newest = trust.newest_ca().map(name).unwrap_or_default();
    if shoal_pki::issuer_of(shared.membership.identity().certificate_der()) != trust.newest_ca() {
        return Err(ApiError::conflict(
            "this coordinator's own certificate is still of the CA that is to go: it is renewed once ca_key is the new one's",
        ));
    }
    if !request.force {
        behind(&shared, |standing| {
            standing.issuers.iter().filter(|(id, _)| **id != newest).map(|(_, n)| n).sum()
        })
        .await?;
    }
    let what = TrustChange { what: "trust.ca.finish", subject: &newest, detail: "" };
    let change = |bundle: &mut shoal_proto::trust::TrustBundle| {
        if bundle.ca_certificates.len() < ROTATING {
            return Err(conflict("no CA is being replaced: shoal pki rotate-ca begin starts it"));
        }
        bundle.ca_certificates.drain(..bundle.ca_certificates.len() - 1);
        Ok(())
    };
    let number = shared.change_trust(&what, change, &actor).await?;
    Ok(axum::Json(types::TrustChanged { number }))
}

/// Refuses while the regions know of machines that are behind.
async fn behind(shared: &App, count: impl Fn(&types::Standing) -> u64) -> ApiResult<()> {
    let axum::Json(status) = status(State(shared.0.clone())).await?;
    match count(&status.standing()) {
        0 => Ok(()),
        machines => Err(ApiError::conflict(format!(
            "{machines} machines still go by what is to go: wait (shoal pki status), or give --force"
        ))),
    }
}

pub(super) async fn begin_goal_key(
    shared: App,
    Who(_, actor): Who,
    Json(request): Json<types::GoalKeyBeginRequest>,
) -> Reply<types::TrustChanged> {
    let wrong = || ApiError::invalid("public is not an Ed25519 key in hexadecimal");
    let public = unhex(&request.public).map_err(|_| wrong())?.try_into().map_err(|_| wrong())?;
    let key = GoalKey { id: request.id, public };
    let subject = request.id.to_string();
    let what = TrustChange { what: "trust.goal_key.begin", subject: &subject, detail: "" };
    let change = |bundle: &mut shoal_proto::trust::TrustBundle| {
        if bundle.goal_keys.len() >= ROTATING {
            return Err(conflict(
                "the goal key is being replaced already: shoal pki rotate-goal-key finish ends that",
            ));
        }
        if bundle.goal_keys.iter().any(|held| held.id >= key.id) {
            return Err(conflict(format!("goal key {} is not new: give a higher number", key.id)));
        }
        bundle.goal_keys.push(key.clone());
        Ok(())
    };
    let number = shared.change_trust(&what, change, &actor).await?;
    Ok(axum::Json(types::TrustChanged { number }))
}

pub(super) async fn finish_goal_key(
    shared: App,
    Who(_, actor): Who,
    Json(request): Json<types::FinishRotation>,
) -> Reply<types::TrustChanged> {
    let trust = shared.membership.trust();
    let newest = trust.bundle().goal_keys.last().map(|key| key.id).unwrap_or_default();
    if trust.bundle().goal_keys.len() < ROTATING {
        return Err(ApiError::conflict(
            "no goal key is being replaced: shoal pki rotate-goal-key begin starts it",
        ));
    }
    let signer = shared.signer()?;
    if signer.id() != newest {
        return Err(ApiError::conflict(format!(
            "this coordinator still signs with goal key {}: put key {newest} in the place of {} on every coordinator",
            signer.id(),
            shared.config.goal_key.display()
        )));
    }
    if !request.force {
        // Who does not know the new key yet would refuse what is signed with it.
        let number = trust.number();
        behind(&shared, |standing| standing.bundles.range(..number).map(|(_, n)| n).sum()).await?;
    }
    // First the goals, while both keys are believed.
    shared.sign_goals_again().await?;
    let subject = newest.to_string();
    let what = TrustChange { what: "trust.goal_key.finish", subject: &subject, detail: "" };
    let change = |bundle: &mut shoal_proto::trust::TrustBundle| {
        bundle.goal_keys.retain(|key| key.id == newest);
        Ok(())
    };
    let number = shared.change_trust(&what, change, &actor).await?;
    Ok(axum::Json(types::TrustChanged { number }))
}
