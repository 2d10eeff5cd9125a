//! How new trust comes from the coordinators and goes on to the machines, and how certificates are renewed.
//!
//! The coordinators are asked by long poll. Each machine is told the number of the bundle that this process goes by, when it
//! connects, whenever that changes, and now and then; who is behind asks for what it lacks. Gossip says it to those who are
//! connected to neighbours alone.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use shoal_client::{
    Client,
    types::{RenewForRequest, Standing},
};
use shoal_pki::{Member, Role, issuer_of};
use shoal_process::{CatchUp, Membership};
use shoal_proto::{
    NodeId,
    gossip::GossipMessage,
    peer::{PeerMessage, StreamReply, StreamRequest, TRUST_SINCE},
};
use shoal_transport::Connection;

use crate::{Shared, serve::Server};

/// How long a machine may take to answer with bundles.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// How often every machine is told again.
const TELL_AGAIN: Duration = Duration::from_secs(60);

/// How many machines are told at once, and the pause after them when there is news and when there is none. Tens of thousands at
/// once would all be woken, and their answers would come, before anybody else is served.
const TELL_AT_ONCE: usize = 50;
const TELL_NEWS_PAUSE: Duration = Duration::from_millis(5);
const TELL_PAUSE: Duration = Duration::from_millis(25);

/// How often certificates are looked at again: they expire.
const LOOK_AGAIN: Duration = Duration::from_secs(600);

/// How often the coordinator is told how the machines stand, when that changed, and when it did not.
const STAND_EVERY: Duration = Duration::from_secs(2);
const STAND_AGAIN: Duration = Duration::from_secs(60);

/// The most renewals that the coordinator is asked for at once; further askers are told to come again.
const RENEWALS_MAX: usize = 64;

/// What is known of the machines' trust and certificates: those that are connected.
pub(crate) struct Standings {
    pub(crate) membership: Arc<Membership>,
    client: Arc<Client>,
    /// The bundle and the issuer that each machine last said; connections bound it.
    machines: Mutex<HashMap<NodeId, (u64, u64)>>,
    catch_up: Arc<CatchUp<Connection>>,
    renewals: tokio::sync::Semaphore,
}

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

impl Standings {
    pub(crate) fn new(membership: Arc<Membership>, client: Arc<Client>) -> Self {
        let renewals = tokio::sync::Semaphore::new(RENEWALS_MAX);
        let catch_up = Arc::new(CatchUp::new(membership.clone()));
        Self { membership, client, machines: Mutex::default(), catch_up, renewals }
    }

    fn machines(&self) -> MutexGuard<'_, HashMap<NodeId, (u64, u64)>> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says to machines what this process goes by. Lost where a queue is full: they are told again.
    pub(crate) fn tell(&self, machines: &[Connection]) {
        let identity = self.membership.identity();
        let issuer = issuer_of(identity.certificate_der()).unwrap_or_default();
        let standing = PeerMessage::Standing { trust: self.membership.trust().number(), issuer };
        for connection in machines.iter().filter(|connection| speaks(connection)) {
            let _ = connection.try_send(&standing);
        }
    }

    /// A machine of a release that says nothing counts with what it showed.
    pub(crate) fn connected(&self, connection: &Connection) {
        if connection.member().role == Role::Agent {
            let issuer = connection.certificate().and_then(|der| issuer_of(&der));
            self.machines().insert(connection.node(), (0, issuer.unwrap_or_default()));
        }
        self.tell(std::slice::from_ref(connection));
    }

    /// A machine is gone.
    pub(crate) fn lost(&self, node: &NodeId) {
        self.machines().remove(node);
    }

    /// A machine says what it goes by; it is asked when it knows more than this process.
    pub(crate) fn heard(&self, connection: &Connection, trust: u64, issuer: u64) {
        if let Some(known) = self.machines().get_mut(&connection.node()) {
            *known = (trust, issuer);
        }
        self.catch_up.heard(connection, trust, ask);
    }

    /// What a machine may lack.
    pub(crate) fn bundles(&self, after: u64) -> StreamReply {
        StreamReply::Trust(self.membership.bundles_after(after))
    }

    /// Asks the coordinator for a machine's renewed certificate. The connection proves that it has the key.
    pub(crate) async fn renewed(
        &self,
        member: &Member,
        certificate: Option<Vec<u8>>,
    ) -> StreamReply {
        let refused = |text: String| StreamReply::Error(text);
        let Some(der) = certificate.filter(|_| member.role == Role::Agent) else {
            return refused(format!("a {} asks the coordinator itself", member.role));
        };
        let Ok(_place) = self.renewals.try_acquire() else {
            return refused("too many ask for certificates at this moment: ask again".into());
        };
        let certificate = der.iter().map(|byte| format!("{byte:02x}")).collect();
        match self.client.renew_for(&RenewForRequest { certificate }).await {
            Ok(reply) => StreamReply::Certificate(reply.certificate),
            Err(error) => refused(error.to_string()),
        }
    }

    /// How the machines stand, for the coordinator.
    fn sum(&self, address: &str) -> Standing {
        let mut sum = Standing { address: Some(address.into()), ..Standing::default() };
        for (trust, issuer) in self.machines().values() {
            *sum.bundles.entry(*trust).or_default() += 1;
            *sum.issuers.entry(format!("{issuer:016x}")).or_default() += 1;
        }
        sum
    }
}

/// Follows the coordinators' bundles.
pub(crate) async fn follow(shared: Arc<Shared>, membership: Arc<Membership>) {
    let held = || membership.trust().number();
    let take = |bundles: &[Vec<u8>]| {
        tokio::task::block_in_place(|| membership.take_trust(bundles, "the coordinator"));
    };
    shared.client.follow_trust(held, take).await;
}

/// Acts on every change: closes connections that are not trusted any more, forgets whose they were, and tells the others.
pub(crate) async fn keep(shared: Arc<Shared>, server: Arc<Server>) {
    let membership = server.standings.membership.clone();
    let mut changes = membership.watch();
    let (mut changed, mut look) = (true, Instant::now());
    loop {
        changes.borrow_and_update();
        let trust = membership.trust();
        if changed || look <= Instant::now() {
            look = Instant::now() + LOOK_AGAIN;
            let endpoint = server.endpoint.clone();
            let closed = tokio::task::spawn_blocking(move || endpoint.recheck()).await.unwrap_or(0);
            if closed > 0 {
                tracing::info!(closed, "closed connections that are not trusted any more");
            }
            // After that nothing more of them comes in.
            for revoked in &trust.bundle().revoked {
                server.introductions.forget(revoked);
            }
            server.machines.forget(&|node| trust.is_revoked(node));
            // It has ended only when the process does.
            let _ = shared.gossip.recheck().await;
        }
        let hash = *blake3::hash(trust.signed_bytes()).as_bytes();
        let news = GossipMessage::Trust { number: trust.number(), hash };
        if let Err(error) = shared.gossip.publish(&news).await {
            tracing::warn!(%error, "cannot publish that there is a trust bundle");
        }
        for some in server.endpoint.connections().chunks(TELL_AT_ONCE) {
            server.standings.tell(some);
            // What comes meanwhile is acted on at once: it may be that a machine is revoked. Then all are told again.
            if changes.has_changed().unwrap_or(true) {
                break;
            }
            tokio::time::sleep(if changed { TELL_NEWS_PAUSE } else { TELL_PAUSE }).await;
        }
        changed = tokio::select! {
            ended = changes.changed() => match ended {
                Ok(()) => {
                    shared.client.reconnect();
                    true
                }
                Err(_) => return,
            },
            () = tokio::time::sleep(TELL_AGAIN.mul_f64(rand::random_range(0.5..1.5))) => false,
        };
    }
}

/// Keeps this process's own certificate renewed.
pub(crate) async fn renew(shared: Arc<Shared>, membership: Arc<Membership>) {
    let ask = || async {
        let reply = shared.client.renew().await.map_err(|error| error.to_string())?;
        Ok(reply.certificate)
    };
    shoal_process::keep_renewed(membership, ask).await;
}

/// Tells the coordinator how the machines stand.
pub(crate) async fn stand(shared: Arc<Shared>, server: Arc<Server>) {
    let address = server.me.data.to_string();
    let mut told: Option<(Standing, tokio::time::Instant)> = None;
    loop {
        let now = server.standings.sum(&address);
        let known = told
            .as_ref()
            .is_some_and(|(standing, at)| *standing == now && at.elapsed() < STAND_AGAIN);
        if !known {
            match shared.client.stand(&now).await {
                Ok(()) => told = Some((now, tokio::time::Instant::now())),
                Err(error) => {
                    tracing::debug!(%error, "the coordinator did not take how the machines stand")
                }
            }
        }
        tokio::time::sleep(STAND_EVERY).await;
    }
}
