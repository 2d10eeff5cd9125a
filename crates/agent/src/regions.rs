//! The region processes as this machine sees them: which one it polls, which one owns a lease, and what to do when
//! one is silent. Nothing here is needed for a fetch that neighbours can finish.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use shoal_pki::Role;
use shoal_process::{Membership, Taken};
use shoal_proto::{
    ArtifactId, EncodingId, MachineName, NodeId,
    peer::{CloseReason, PeerAddr, StreamReply, StreamRequest, TRUST_SINCE},
    region::{LEASE_BLOCK_PIECES, RegionReply, RegionRequest, SIGNED_LEASES_SINCE},
};
use shoal_swarm::lease_owners;
use shoal_transport::{ConnectError, Connection, Endpoint};
use tokio_util::sync::CancellationToken;

/// How long a region process may take to answer before the next one is asked.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);

/// After so many questions in a row that not even their arrival was acknowledged of, the connection is made anew.
const UNHEARD_MAX: u32 = 2;

/// How long a certificate may take: the coordinator is asked for it.
const RENEW_TIMEOUT: Duration = Duration::from_secs(30);

/// How long to wait before a region process that did not answer is tried again, at first and at most.
const REDIAL_MIN: Duration = Duration::from_millis(250);
const REDIAL_MAX: Duration = Duration::from_secs(15);

/// How often a standing connection is looked at.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// The most region processes that a machine knows: two or three are usual.
pub(crate) const REGION_PROCESSES_MAX: usize = 16;

/// One configured region process.
#[derive(Default)]
struct Process {
    /// Its key, once it has been seen: rendezvous needs it also while it is away.
    node: Option<NodeId>,
    /// The connection, while it stands.
    connection: Option<Connection>,
    /// Not asked before then: it did not answer.
    silent_until: Option<Instant>,
    /// How many questions in a row nothing came back for, not even that they had come.
    unheard: u32,
}

struct Inner {
    endpoint: Endpoint,
    machine: MachineName,
    membership: Arc<Membership>,
    processes: Mutex<Vec<Process>>,
}

/// A handle on the region processes; clones share them.
#[derive(Clone)]
pub(crate) struct Regions(Arc<Inner>);

/// No region process answered.
#[derive(Debug, thiserror::Error)]
#[error("no region process answers")]
pub(crate) struct NoAnswer;

impl Regions {
    /// Keeps a connection to each of `addresses` until `token` is cancelled.
    pub(crate) fn start(
        endpoint: Endpoint,
        machine: MachineName,
        membership: Arc<Membership>,
        addresses: &[String],
        token: &CancellationToken,
    ) -> Self {
        let processes = addresses.iter().map(|_| Process::default()).collect();
        let regions = Self(Arc::new(Inner {
            endpoint,
            machine,
            membership,
            processes: Mutex::new(processes),
        }));
        for (at, address) in addresses.iter().enumerate() {
            let (regions, address, token) = (regions.clone(), address.clone(), token.clone());
            tokio::spawn(async move {
                token.run_until_cancelled(regions.keep_connected(at, address)).await;
            });
        }
        regions
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Process>> {
        self.0.processes.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    async fn keep_connected(&self, at: usize, address: String) {
        let mut pause = REDIAL_MIN;
        loop {
            match self.dial(&address).await {
                Ok(connection) => {
                    pause = REDIAL_MIN;
                    let node = connection.member().node;
                    tracing::info!(%address, machine = %connection.member().machine, "connected to a region process");
                    self.lock()[at] = Process {
                        node: Some(node),
                        connection: Some(connection.clone()),
                        silent_until: None,
                        unheard: 0,
                    };
                    while !connection.is_closed() {
                        tokio::time::sleep(CHECK_INTERVAL).await;
                    }
                    self.lock()[at].connection = None;
                    tracing::info!(%address, "lost the region process");
                }
                Err(error) => {
                    tracing::debug!(%address, error = format!("{error:#}"), "no connection to the region process");
                }
            }
            tokio::time::sleep(spread(pause)).await;
            pause = (pause * 2).min(REDIAL_MAX);
        }
    }

    async fn dial(&self, address: &str) -> anyhow::Result<Connection> {
        let mut last = anyhow::anyhow!("{address} is no address");
        for resolved in tokio::net::lookup_host(address).await? {
            match self.0.endpoint.connect_any(resolved, Role::Region).await {
                Ok(connection) => return Ok(connection),
                Err(error @ ConnectError::Handshake(_)) => {
                    last = error.into();
                    if self.catch_up(resolved).await {
                        return Ok(self.0.endpoint.connect_any(resolved, Role::Region).await?);
                    }
                }
                Err(error) => last = error.into(),
            }
        }
        Err(last)
    }

    /// A handshake fails when this machine slept through a change of the CA: whoever is there may have the bundles that lead to
    /// it, which prove themselves. Whether there was something new.
    async fn catch_up(&self, addr: SocketAddr) -> bool {
        let membership = self.0.membership.clone();
        let asked = self.0.endpoint.ask_trust(addr, membership.trust().number()).await;
        let Ok(bundles) = asked else { return false };
        let from = addr.to_string();
        let taken = tokio::task::spawn_blocking(move || membership.take_trust(&bundles, &from));
        matches!(taken.await, Ok(Taken::New))
    }

    /// The region processes in the order in which this machine asks them: its own first (a rendezvous hash
    /// of its name spreads the machines), the silent ones last.
    fn preferred(&self) -> Vec<(usize, Connection)> {
        let now = Instant::now();
        let processes = self.lock();
        let mut ready: Vec<_> = processes
            .iter()
            .enumerate()
            .filter_map(|(at, process)| Some((at, process, process.connection.clone()?)))
            .map(|(at, process, connection)| {
                let silent = process.silent_until.is_some_and(|until| until > now);
                let mut hash = blake3::Hasher::new();
                hash.update(self.0.machine.as_str().as_bytes());
                hash.update(&connection.member().node.0);
                (silent, *hash.finalize().as_bytes(), at, connection)
            })
            .collect();
        ready.sort_by_key(|(silent, hash, ..)| (*silent, *hash));
        ready.into_iter().map(|(_, _, at, connection)| (at, connection)).collect()
    }

    /// Whether at least one is connected.
    pub(crate) fn any_connected(&self) -> bool {
        self.lock().iter().any(|process| process.connection.is_some())
    }

    /// Whether `node` is one of the region processes.
    pub(crate) fn is_region(&self, node: &NodeId) -> bool {
        self.lock().iter().any(|process| process.node.as_ref() == Some(node))
    }

    async fn ask_one(
        &self,
        at: usize,
        connection: &Connection,
        request: RegionRequest,
    ) -> Result<RegionReply, NoAnswer> {
        let asked = async {
            match connection.request(StreamRequest::Region(request)).await {
                Ok((StreamReply::Region(reply), _)) => Some(reply),
                Ok((other, _)) => {
                    tracing::debug!(?other, "a region process answered something else");
                    None
                }
                Err(error) => {
                    tracing::debug!(%error, "a region process did not answer");
                    None
                }
            }
        };
        let before = connection.stats().received_bytes;
        let reply = tokio::time::timeout(ANSWER_TIMEOUT, asked).await.ok().flatten();
        let heard = reply.is_some() || connection.stats().received_bytes > before;
        if let Some(process) = self.lock().get_mut(at) {
            process.silent_until = reply.is_none().then(|| Instant::now() + ANSWER_TIMEOUT);
            process.unheard = if heard { 0 } else { process.unheard + 1 };
            if process.unheard >= UNHEARD_MAX {
                // A connection at rest is not probed, so it is up to those who ask to find out that nobody is there.
                connection.close(CloseReason::Idle);
            }
        }
        match reply {
            Some(RegionReply::Error(reason)) => {
                tracing::warn!(%reason, "a region process refused");
                Err(NoAnswer)
            }
            Some(reply) => Ok(reply),
            None => Err(NoAnswer),
        }
    }

    /// Asks this machine's own region process, and the others in turn when it is silent.
    pub(crate) async fn ask(&self, request: &RegionRequest) -> Result<RegionReply, NoAnswer> {
        for (at, connection) in self.preferred() {
            if let Ok(reply) = self.ask_one(at, &connection, request.clone()).await {
                return Ok(reply);
            }
        }
        Err(NoAnswer)
    }

    /// A renewed certificate of this machine's key, PEM, from the first region process that gives one; or why none did.
    pub(crate) async fn renewed(&self) -> Result<String, String> {
        let mut why = "no region process answers".to_string();
        for (_, connection) in self.preferred() {
            if connection.version().is_none_or(|version| version < TRUST_SINCE) {
                continue;
            }
            let asked = connection.request(StreamRequest::Renew);
            match tokio::time::timeout(RENEW_TIMEOUT, asked).await {
                Ok(Ok((StreamReply::Certificate(pem), _))) => return Ok(pem),
                Ok(Ok((StreamReply::Error(reason), _))) => why = reason,
                Ok(Ok(_)) => why = "a region process answered something else".into(),
                Ok(Err(error)) => why = error.to_string(),
                Err(_) => why = "a region process did not answer in time".into(),
            }
        }
        Err(why)
    }

    /// Asks all of them for neighbours, and makes this machine known to all: any of them may be the one that
    /// another machine asks.
    pub(crate) async fn introduce(
        &self,
        me: &PeerAddr,
        artifact: ArtifactId,
        complete: bool,
        want: u16,
    ) -> Result<Vec<PeerAddr>, NoAnswer> {
        let asks = self.preferred().into_iter().map(|(at, connection)| {
            let request = RegionRequest::Introduce { me: me.clone(), artifact, complete, want };
            async move { self.ask_one(at, &connection, request).await }
        });
        let mut answered = false;
        let mut all = Vec::new();
        for reply in futures::future::join_all(asks).await {
            if let Ok(RegionReply::Peers(peers)) = reply {
                answered = true;
                all.extend(peers);
            }
        }
        all.sort();
        all.dedup();
        if answered { Ok(all) } else { Err(NoAnswer) }
    }

    /// The region processes that are connected, in the order in which they own the leases of `piece`'s block.
    fn owners(&self, artifact: &ArtifactId, block: u32) -> Vec<(usize, Connection)> {
        let processes = self.lock();
        let known: Vec<(usize, NodeId)> = processes
            .iter()
            .enumerate()
            .filter_map(|(at, process)| Some((at, process.node?)))
            .collect();
        let nodes: Vec<NodeId> = known.iter().map(|(_, node)| *node).collect();
        let order = lease_owners(artifact, block, &nodes);
        let now = Instant::now();
        let mut owners: Vec<_> = order
            .into_iter()
            .filter_map(|rank| known.get(rank))
            .filter_map(|(at, _)| {
                let process = processes.get(*at)?;
                let silent = process.silent_until.is_some_and(|until| until > now);
                Some((silent, *at, process.connection.clone()?))
            })
            .collect();
        owners.sort_by_key(|(silent, ..)| *silent);
        owners.into_iter().map(|(_, at, connection)| (at, connection)).collect()
    }

    /// Asks the owner of a block for a lease, and the next in order when it is silent; for a `signed` one those that
    /// know it.
    pub(crate) async fn lease(
        &self,
        (artifact, encoding, pieces_total): (ArtifactId, EncodingId, u32),
        (block, lacking): (u32, u64),
        want: u16,
        signed: bool,
    ) -> Result<RegionReply, NoAnswer> {
        for (at, connection) in self.owners(&artifact, block) {
            let known = connection.version().is_some_and(|version| version >= SIGNED_LEASES_SINCE);
            let request = if !signed {
                RegionRequest::Lease { artifact, encoding, pieces_total, block, lacking, want }
            } else if known {
                RegionRequest::SignedLease {
                    artifact,
                    encoding,
                    pieces_total,
                    block,
                    lacking,
                    want,
                }
            } else {
                tracing::debug!(machine = %connection.member().machine, "a region process of an older release signs no URLs");
                continue;
            };
            if let Ok(reply) = self.ask_one(at, &connection, request).await {
                return Ok(reply);
            }
        }
        Err(NoAnswer)
    }

    /// Tells the owner of a lease that its pieces are held, or given back. Lost when nobody answers: then the
    /// lease runs out by itself.
    pub(crate) async fn lease_done(
        &self,
        artifact: ArtifactId,
        first: u32,
        count: u32,
        held: bool,
    ) {
        let (mut first, end) = (first, first.saturating_add(count));
        while first < end {
            // Each block has an owner of its own.
            let block = first / LEASE_BLOCK_PIECES;
            let next = (block + 1).saturating_mul(LEASE_BLOCK_PIECES).min(end);
            for (at, connection) in self.owners(&artifact, block) {
                let count = next - first;
                let request = RegionRequest::LeaseDone { artifact, first, count, held };
                if self.ask_one(at, &connection, request).await.is_ok() {
                    break;
                }
            }
            first = next;
        }
    }
}

/// A duration spread by half, up and down, so that machines do not act in step.
pub(crate) fn spread(duration: Duration) -> Duration {
    duration.mul_f64(rand::random_range(0.5..1.5))
}
