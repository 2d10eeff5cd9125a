//! How new trust reaches this machine and goes on from it, and how its certificate is renewed.
//!
//! Both ends of a connection say which bundle they go by: when it is up, whenever that changes, and now and then. Who is
//! behind asks the other one for what it lacks, be that a neighbour or a region process. Gossip says the same to those who
//! are not connected.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use shoal_pki::issuer_of;
use shoal_process::{CatchUp, Membership};
use shoal_proto::{
    NodeId,
    peer::{PeerMessage, StreamReply, StreamRequest, TRUST_SINCE},
};
use shoal_transport::{Connection, Endpoint};

use crate::{machine::Machine, regions::spread};

/// How long a neighbour may take to answer with bundles.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// How often every neighbour is told again.
const TELL_AGAIN: Duration = Duration::from_secs(60);

/// How often certificates are looked at again: they expire.
const LOOK_AGAIN: Duration = Duration::from_secs(600);

/// What this machine goes by, and the questions about it.
#[derive(Clone)]
pub(crate) struct Standing {
    membership: Arc<Membership>,
    catch_up: Arc<CatchUp<Connection>>,
}

/// Whether the other end knows these messages.
fn speaks(connection: &Connection) -> bool {
    connection.version().is_some_and(|version| version >= TRUST_SINCE)
}

async fn ask(connection: Connection, after: u64) -> Option<(Vec<Vec<u8>>, String)> {
    let asked = connection.request(StreamRequest::Trust { after });
    match tokio::time::timeout(ANSWER_TIMEOUT, asked).await.ok()?.ok()? {
        (StreamReply::Trust(bundles), _) => Some((bundles, connection.member().to_string())),
        _ => None,
    }
}

impl Standing {
    pub(crate) fn new(membership: Arc<Membership>) -> Self {
        let catch_up = Arc::new(CatchUp::new(membership.clone()));
        Self { membership, catch_up }
    }

    /// Says to a neighbour what this machine goes by. Lost when its queue is full: it is told again.
    pub(crate) fn tell(&self, connection: &Connection) {
        if speaks(connection) {
            let identity = self.membership.identity();
            let issuer = issuer_of(identity.certificate_der()).unwrap_or_default();
            let trust = self.membership.trust().number();
            let _ = connection.try_send(&PeerMessage::Standing { trust, issuer });
        }
    }

    /// What a neighbour may have that this machine lacks.
    pub(crate) fn bundles(&self, after: u64) -> StreamReply {
        StreamReply::Trust(self.membership.bundles_after(after))
    }

    /// Somebody goes by this bundle: it is asked for it, if it is newer.
    pub(crate) fn heard(&self, connection: &Connection, number: u64) {
        if speaks(connection) {
            self.catch_up.heard(connection, number, ask);
        }
    }

    /// Gossip says that there is a bundle: whoever said so is asked, or else a region process.
    pub(crate) fn gossiped(
        &self,
        endpoint: &Endpoint,
        from: &NodeId,
        number: u64,
        hash: &[u8; 32],
    ) {
        let held = self.membership.trust();
        if held.number() == number && blake3::hash(held.signed_bytes()).as_bytes() != hash {
            tracing::warn!(%from, number, "another trust bundle of this number goes round: was the database restored?");
        }
        let near = endpoint.connection(from).filter(speaks);
        let region = || {
            let all = endpoint.connections().into_iter();
            all.filter(speaks).find(|peer| peer.member().role == shoal_pki::Role::Region)
        };
        if let Some(connection) = near.or_else(region) {
            self.heard(&connection, number);
        }
    }
}

/// Acts on every change: closes connections that are not trusted any more, and tells the others.
pub(crate) async fn keep(machine: Arc<Machine>, gossip: shoal_gossip::Gossip) {
    let membership = machine.membership.clone();
    let mut changes = membership.watch();
    let (mut changed, mut look) = (true, Instant::now());
    loop {
        changes.borrow_and_update();
        if changed || look <= Instant::now() {
            look = Instant::now() + LOOK_AGAIN;
            let endpoint = machine.endpoint.clone();
            let closed = tokio::task::spawn_blocking(move || endpoint.recheck()).await.unwrap_or(0);
            if closed > 0 {
                tracing::info!(closed, "closed connections that are not trusted any more");
            }
            // It has ended only when the agent does.
            let _ = gossip.recheck().await;
            for revoked in &membership.trust().bundle().revoked {
                machine.neighbours.forget(revoked);
            }
        }
        for connection in machine.endpoint.connections() {
            machine.standing.tell(&connection);
        }
        changed = tokio::select! {
            ended = changes.changed() => match ended {
                Ok(()) => {
                    // Goals signed with a key that is gone are asked for soon.
                    machine.ask_for_wave(machine.goals.largest_fleet());
                    true
                }
                Err(_) => return,
            },
            () = tokio::time::sleep(spread(TELL_AGAIN)) => false,
        };
    }
}

/// Keeps the machine's certificate renewed, by its region process: it speaks with nobody else.
pub(crate) async fn renew(machine: Arc<Machine>) {
    let membership = machine.membership.clone();
    shoal_process::keep_renewed(membership, || machine.regions.renewed()).await;
}
