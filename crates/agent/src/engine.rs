//! Drives the swarm policy: turns what comes from sockets, disk and region processes into its events, and
//! its actions into requests, reads and messages. It decides nothing about pieces itself.
//!
//! One task owns the policy and all of its handles. Whatever takes time runs beside it, bounded by the
//! policy's own limits, and comes back as an [`Input`].

mod actions;
mod peers;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use futures::FutureExt;
use shoal_gossip::Gossip;
use shoal_proto::{
    ArtifactId, Bitmap, EncodingId, NodeId, PieceIndex,
    manifest::{Location, PieceSize},
    peer::{PeerAddr, StreamReply, StreamRequest},
    region::FetchProgress,
};
use shoal_store::{Artifact, StoreError};
use shoal_swarm::{
    Config, Event, Outcome, PeerKey, Purpose, RequestId, Swarm, SwarmKey, Time, UploadId,
    machine_hash, may_lease,
};
use shoal_transport::{Connection, Endpoint, Incoming, IncomingRequest, Pacer, ReplyError};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use crate::{
    disk::{DiskWork, PART_BYTES},
    fetch::{Fetched, Kitchen},
    goals::Goals,
    limits::Limits,
    metrics::Metrics,
    neighbours::Neighbours,
    origin::Origin,
    regions::Regions,
    trust::Standing,
};

/// How many inputs may wait for the engine: a few for each piece in flight.
const INPUTS_MAX: usize = 1_024;

/// How many dials to neighbours may be under way at once.
const DIALS_MAX: usize = 16;

/// What a machine remembers of artifacts that a neighbour has and it does not take part in (yet).
const EARLY_JOINS_MAX: usize = 16;

/// How far a fetch is, for whoever waits for it.
#[derive(Debug, Clone, Default)]
pub(crate) struct FetchStatus {
    /// All pieces are held.
    pub(crate) complete: bool,
    /// Bytes and pieces.
    pub(crate) progress: FetchProgress,
    /// Why it does not get on, when it does not: the disk, wrong bytes in the bucket.
    pub(crate) trouble: Option<String>,
}

/// What the engine is told by the rest of the agent.
enum Command {
    /// Take part in a swarm.
    Start { artifact: Arc<Artifact>, priority: u8, fleet: u32, status: watch::Sender<FetchStatus> },
    /// Take part no longer.
    Stop(ArtifactId),
}

/// What comes back from work beside the engine.
enum Input {
    Command(Command),
    Fetched(RequestId, SwarmKey, PieceIndex, Fetched),
    UploadEnded(UploadId, u64),
    Policy(Event),
    OriginPiece(SwarmKey, PieceIndex, Fetched),
    Introduced(SwarmKey, Vec<PeerAddr>),
    Dialled(NodeId),
}

/// A neighbour on the data plane.
struct Peer {
    connection: Connection,
    /// Known from its Hello; before that it is no peer to the policy.
    addr: Option<PeerAddr>,
    /// What it holds of artifacts that this machine takes no part in.
    early: BTreeMap<ArtifactId, Bitmap>,
    /// Swarms about which a message could not be queued: the whole bitmap goes out instead, later.
    resend: HashSet<SwarmKey>,
    /// Swarms for which it was told of other machines.
    exchanged: HashSet<SwarmKey>,
}

/// An artifact's swarm.
struct Part {
    artifact: Arc<Artifact>,
    encoding: EncodingId,
    layout: Arc<Vec<Location>>,
    status: watch::Sender<FetchStatus>,
    /// Machines known to take part, connected or not.
    known: BTreeMap<NodeId, PeerAddr>,
}

/// A handle on the engine; clones share it.
#[derive(Clone)]
pub(crate) struct Engine {
    inputs: mpsc::Sender<Input>,
    limits: Arc<watch::Sender<Limits>>,
    running: Arc<Mutex<HashMap<ArtifactId, watch::Receiver<FetchStatus>>>>,
}

/// What the engine works with.
pub(crate) struct Parts {
    pub(crate) me: PeerAddr,
    pub(crate) max_connections: usize,
    pub(crate) endpoint: Endpoint,
    pub(crate) incoming: mpsc::Receiver<Incoming>,
    pub(crate) gossip: Gossip,
    pub(crate) regions: Regions,
    pub(crate) origin: Origin,
    /// Limits what is read from the bucket.
    pub(crate) origin_pacer: Pacer,
    pub(crate) goals: Arc<Goals>,
    pub(crate) neighbours: Arc<Neighbours>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) standing: Standing,
}

impl Engine {
    /// An engine, and what has to be run for it until `token` is cancelled.
    pub(crate) fn new(
        parts: Parts,
        token: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + use<>) {
        let (inputs, queue) = mpsc::channel(INPUTS_MAX);
        let seed = rand::random();
        let disk = DiskWork::new();
        let (origin, down) = (parts.origin_pacer.clone(), parts.endpoint.down().clone());
        let kitchen = Kitchen::new(origin, down, disk.clone());
        let (limits, limited) = watch::channel(Limits::default());
        let driver = Driver {
            parts,
            inputs: inputs.clone(),
            kitchen,
            disk,
            limits: limited,
            policy: Swarm::new(Config::default(), seed),
            began: Instant::now(),
            swarms: BTreeMap::new(),
            by_artifact: HashMap::new(),
            peers: BTreeMap::new(),
            by_node: HashMap::new(),
            banned: HashSet::new(),
            asked_for_goals: None,
            dialling: HashSet::new(),
            fetches: HashMap::new(),
            uploads: HashMap::new(),
            next_key: 1,
        };
        let engine = Self { inputs, limits: Arc::new(limits), running: Arc::default() };
        (engine, driver.run(queue, token))
    }

    /// Takes part in an artifact's swarm, if it does not yet; the receiver tells how far it is.
    pub(crate) async fn join(
        &self,
        artifact: Arc<Artifact>,
        priority: u8,
        fleet: u32,
    ) -> watch::Receiver<FetchStatus> {
        let id = artifact.manifest().artifact;
        let have = artifact.have();
        let progress = FetchProgress {
            pieces: have.count(),
            pieces_total: have.len(),
            ..FetchProgress::default()
        };
        let (sender, receiver) =
            watch::channel(FetchStatus { complete: have.is_full(), progress, trouble: None });
        {
            let mut running = self.running();
            if let Some(receiver) = running.get(&id)
                && receiver.has_changed().is_ok()
            {
                return receiver.clone();
            }
            running.insert(id, receiver.clone());
        }
        let command = Command::Start { artifact, priority, fleet, status: sender };
        // It fails only when the agent is stopping; then the receiver is closed too.
        let _ = self.inputs.send(Input::Command(command)).await;
        receiver
    }

    /// Has the policy keep to limits: with a slow line, fewer pieces are under way at once.
    pub(crate) fn limit(&self, limits: Limits) {
        self.limits.send_replace(limits);
    }

    /// Leaves an artifact's swarm.
    pub(crate) async fn leave(&self, artifact: ArtifactId) {
        self.running().remove(&artifact);
        let _ = self.inputs.send(Input::Command(Command::Stop(artifact))).await;
    }

    fn running(
        &self,
    ) -> std::sync::MutexGuard<'_, HashMap<ArtifactId, watch::Receiver<FetchStatus>>> {
        self.running.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

struct Driver {
    parts: Parts,
    inputs: mpsc::Sender<Input>,
    kitchen: Arc<Kitchen>,
    disk: Arc<DiskWork>,
    limits: watch::Receiver<Limits>,
    policy: Swarm,
    began: Instant,
    swarms: BTreeMap<SwarmKey, Part>,
    by_artifact: HashMap<ArtifactId, SwarmKey>,
    peers: BTreeMap<PeerKey, Peer>,
    by_node: HashMap<NodeId, PeerKey>,
    banned: HashSet<NodeId>,
    /// When a neighbour was last asked for goals that we lack.
    asked_for_goals: Option<Instant>,
    dialling: HashSet<NodeId>,
    fetches: HashMap<RequestId, AbortOnDropHandle<()>>,
    /// Questions for pieces that the policy has not answered yet, each held by a task of its own.
    uploads: HashMap<UploadId, Asked>,
    next_key: u64,
}

impl Driver {
    fn now(&self) -> Time {
        Time(u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    fn key(&mut self) -> u64 {
        self.next_key += 1;
        self.next_key
    }

    async fn run(mut self, mut queue: mpsc::Receiver<Input>, token: CancellationToken) {
        // The neighbours of the life before may know goals and have indexes: before any swarm is joined.
        self.dial_remembered(shoal_swarm::Config::default().neighbours_target);
        loop {
            let timeout = self.policy.next_timeout().map(|at| {
                let delay = at.0.saturating_sub(self.now().0);
                tokio::time::Instant::now() + Duration::from_nanos(delay)
            });
            let timer = async {
                match timeout {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = token.cancelled() => break,
                Some(input) = queue.recv() => self.input(input),
                Ok(()) = self.limits.changed() => self.keep_to_limits(),
                Some(incoming) = self.parts.incoming.recv() => self.incoming(incoming),
                () = timer => self.tell(Event::Timeout),
                else => break,
            }
            self.act();
            self.resend();
        }
    }

    /// Gives the policy the numbers that fit the limits and the longest pieces.
    fn keep_to_limits(&mut self) {
        let lengths = self.swarms.values().map(|part| part.artifact.manifest().piece_size.bytes());
        let longest = lengths.max().unwrap_or(PieceSize::MAX.bytes());
        let numbers = self.limits.borrow_and_update().policy(longest);
        if *self.policy.config() != numbers {
            let now = self.now();
            self.policy.set_config(now, numbers);
        }
    }

    fn tell(&mut self, event: Event) {
        let now = self.now();
        self.policy.handle(now, event);
    }

    fn input(&mut self, input: Input) {
        match input {
            Input::Command(Command::Start { artifact, priority, fleet, status }) => {
                self.start_swarm(artifact, priority, fleet, status);
            }
            Input::Command(Command::Stop(artifact)) => {
                if let Some(swarm) = self.by_artifact.remove(&artifact) {
                    self.tell(Event::Stop { swarm });
                    // Its last actions (leaving, cancelled fetches) still need the swarm.
                    self.act();
                    self.swarms.remove(&swarm);
                    self.keep_to_limits();
                }
            }
            Input::Fetched(request, swarm, piece, fetched) => {
                if self.fetches.remove(&request).is_none() {
                    return;
                }
                self.count(swarm, piece, &fetched, false);
                self.tell(Event::FetchEnded { request, outcome: fetched.outcome });
            }
            Input::OriginPiece(swarm, piece, fetched) => {
                self.count(swarm, piece, &fetched, true);
                self.tell(Event::OriginEnded { swarm, piece, outcome: fetched.outcome });
            }
            Input::UploadEnded(upload, bytes) => {
                self.uploads.remove(&upload);
                self.parts.metrics.sent_bytes.inc_by(bytes);
                self.tell(Event::UploadEnded { upload, whole: bytes > 0 });
            }
            Input::Policy(event) => self.tell(event),
            Input::Introduced(swarm, peers) => self.learn(swarm, peers),
            Input::Dialled(node) => {
                self.dialling.remove(&node);
            }
        }
    }

    fn start_swarm(
        &mut self,
        artifact: Arc<Artifact>,
        priority: u8,
        fleet: u32,
        status: watch::Sender<FetchStatus>,
    ) {
        let id = artifact.manifest().artifact;
        if let Some(swarm) = self.by_artifact.get(&id).copied() {
            // Left and joined again before the engine saw it: only who waits has changed.
            if let Some(part) = self.swarms.get_mut(&swarm) {
                status.send_replace(part.status.borrow().clone());
                part.status = status;
            }
            return;
        }
        let swarm = SwarmKey(self.key());
        let have = artifact.have();
        let pieces = artifact.manifest().piece_count();
        let piece_bytes = artifact.manifest().piece_size.bytes();
        let layout = Arc::new(artifact.index().layout());
        self.by_artifact.insert(id, swarm);
        let encoding = artifact.encoding();
        let part = Part { artifact, encoding, layout, status, known: BTreeMap::new() };
        self.swarms.insert(swarm, part);
        self.keep_to_limits();
        let early: Vec<_> = self
            .peers
            .iter_mut()
            .filter_map(|(peer, state)| Some((*peer, state.early.remove(&id)?)))
            .collect();
        let hash = machine_hash(&self.parts.me.node, &id);
        let start = |may_lease| {
            let have = have.clone();
            let purpose = match have.is_full() {
                true => Purpose::Seed,
                false => Purpose::Fetch { priority, piece_bytes, may_lease, fleet },
            };
            Event::Start { swarm, pieces, have, purpose }
        };
        // What neighbours hold comes first: the policy asks at once for leases of what nobody has.
        self.tell(start(false));
        for (peer, have) in early {
            self.tell(Event::PeerJoined { peer, swarm, have: have.into() });
        }
        if may_lease(hash, fleet) {
            self.tell(start(true));
        }
        // The region may know others, and shall know this machine, also when it only seeds.
        self.introduce(swarm, shoal_proto::peer::PEERS_BATCH_MAX as u16);
    }

    /// Books a fetched piece: metrics, progress, what stands in its way.
    fn count(&mut self, swarm: SwarmKey, piece: PieceIndex, fetched: &Fetched, origin: bool) {
        let metrics = &self.parts.metrics;
        let source = if origin { "origin" } else { "peer" };
        metrics.received_bytes.with_label_values(&[source]).inc_by(fetched.stored_bytes);
        let outcome = match fetched.outcome {
            Outcome::Verified => "verified",
            Outcome::Corrupt => "corrupt",
            Outcome::Busy => "busy",
            Outcome::NotHere => "not_here",
            Outcome::Failed => "failed",
        };
        metrics.fetches.with_label_values(&[outcome]).inc();
        if !matches!(fetched.outcome, Outcome::Verified | Outcome::Busy) {
            tracing::debug!(%piece, source, outcome, "no piece");
        }
        let Some(part) = self.swarms.get(&swarm) else { return };
        let held = part.artifact.have().count();
        part.status.send_modify(|status| {
            let progress = &mut status.progress;
            progress.pieces = held;
            if origin {
                progress.origin_bytes += fetched.stored_bytes;
            } else {
                progress.peer_bytes += fetched.stored_bytes;
            }
            match fetched.outcome {
                Outcome::Verified => status.trouble = None,
                Outcome::Corrupt => {
                    progress.corrupt_pieces += 1;
                    if origin {
                        status.trouble =
                            Some(format!("piece {piece} in the region's bucket is corrupt"));
                    }
                }
                _ => {}
            }
            if let Some(bucket) = &fetched.bucket {
                status.trouble = Some(format!("cannot read piece {piece}: {bucket}"));
            }
            if let Some(disk) = &fetched.disk {
                status.trouble = Some(format!("cannot write piece {piece}: {disk}"));
            }
        });
    }

    fn incoming(&mut self, incoming: Incoming) {
        match incoming {
            Incoming::Connected(connection) => self.connected(connection),
            Incoming::Closed(connection, reason) => self.closed(&connection, &reason),
            Incoming::Message(connection, message) => self.message(&connection, message),
            Incoming::Request(request) => self.request(request),
        }
    }

    fn request(&mut self, request: IncomingRequest) {
        match request.request {
            StreamRequest::Piece { artifact, piece } => {
                let peer = self.by_node.get(&request.from().member().node).copied();
                let swarm = self.by_artifact.get(&artifact).copied();
                let (Some(peer), Some(swarm)) = (peer, swarm) else {
                    return answer(request, StreamReply::NotHere);
                };
                let upload = UploadId(self.key());
                let (sender, verdict) = oneshot::channel();
                let asked = Asked { peer, swarm, piece, verdict: sender };
                self.uploads.insert(upload, asked);
                let (disk, inputs) = (self.disk.clone(), self.inputs.clone());
                tokio::spawn(upload_one(upload, request, verdict, disk, inputs));
                self.tell(Event::UploadAsked { upload, peer, swarm, piece });
            }
            StreamRequest::Index { artifact, encoding } => {
                let reply = self
                    .by_artifact
                    .get(&artifact)
                    .and_then(|swarm| self.swarms.get(swarm))
                    .filter(|part| part.encoding == encoding)
                    .map_or(StreamReply::NotHere, |part| {
                        StreamReply::Index(part.artifact.index_bytes().to_vec())
                    });
                answer(request, reply);
            }
            StreamRequest::Trust { after } => {
                let reply = self.parts.standing.bundles(after);
                answer(request, reply);
            }
            StreamRequest::Region(_) | StreamRequest::Renew => {
                answer(
                    request,
                    StreamReply::Error("this is an agent, not a region process".into()),
                );
            }
        }
    }
}

/// A question for a piece that waits for the policy's answer.
struct Asked {
    peer: PeerKey,
    swarm: SwarmKey,
    piece: PieceIndex,
    verdict: oneshot::Sender<Verdict>,
}

/// What the policy says to a question for a piece.
enum Verdict {
    /// Send it.
    Serve(Arc<Artifact>, PieceIndex),
    /// Answer this.
    Refuse(StreamReply),
}

/// Holds a question for a piece until the policy has answered it or the asker has taken it back.
async fn upload_one(
    upload: UploadId,
    request: IncomingRequest,
    verdict: oneshot::Receiver<Verdict>,
    disk: Arc<DiskWork>,
    inputs: mpsc::Sender<Input>,
) {
    let verdict = tokio::select! {
        verdict = verdict => verdict,
        () = request.stopped() => {
            let _ = inputs.send(Input::UploadEnded(upload, 0)).await;
            return;
        }
    };
    match verdict {
        Ok(Verdict::Serve(artifact, piece)) => {
            let sent = send_piece(request, artifact, piece, &disk).map(|sent| sent.unwrap_or(0));
            let sent = unless_it_panics(sent, 0).await;
            let _ = inputs.send(Input::UploadEnded(upload, sent)).await;
        }
        Ok(Verdict::Refuse(reply)) => {
            // An error says that the asker is gone.
            let _ = request.reply(reply, None).await;
        }
        // The asker's connection is gone, and the policy has forgotten it.
        Err(_) => {}
    }
}

/// Sends a piece as it is read, and says how many bytes that took.
async fn send_piece(
    request: IncomingRequest,
    artifact: Arc<Artifact>,
    piece: PieceIndex,
    disk: &Arc<DiskWork>,
) -> Result<u64, ReplyError> {
    let buffer = disk.parts().take();
    let begin = move || match artifact.stored(piece)? {
        Some(mut stored) => {
            let (codec, len) = (stored.codec(), stored.left() as u32);
            let first = stored.read(PART_BYTES, buffer)?;
            Ok(Some((StreamReply::Piece { codec, len }, first, stored)))
        }
        None => Ok(None),
    };
    let begun: Result<Option<_>, StoreError> = match disk.run(begin).await {
        Ok(begun) => begun,
        Err(_) => Ok(None),
    };
    if let Err(error) = &begun {
        tracing::warn!(%error, "cannot read a piece to send");
    }
    let Ok(Some((reply, first, mut stored))) = begun else {
        return request.reply(StreamReply::NotHere, None).await;
    };
    let mut answer = request.answer(reply)?;
    let mut part = first;
    loop {
        answer.send(part).await?;
        if answer.left() == 0 {
            return answer.end().await;
        }
        let buffer = disk.parts().take();
        let read = move || (stored.read(PART_BYTES, buffer), stored);
        // Given up in the middle, which the asker sees.
        let Ok((read, rest)) = disk.run(read).await else { return Ok(0) };
        match read {
            Ok(read) => (part, stored) = (read, rest),
            Err(error) => {
                tracing::warn!(%error, "cannot read a piece to send");
                return Ok(0);
            }
        }
    }
}

/// Does something whose end the policy waits for. When it panics, that counts as `otherwise`: a slot or a lease that it
/// held is free again, and the panic is told on standard error.
async fn unless_it_panics<T>(work: impl Future<Output = T>, otherwise: T) -> T {
    AssertUnwindSafe(work).catch_unwind().await.unwrap_or(otherwise)
}

/// Answers without a body, aside: the asker may be slow to read.
fn answer(request: IncomingRequest, reply: StreamReply) {
    tokio::spawn(async move {
        // An error says that the asker is gone.
        let _ = request.reply(reply, None).await;
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_panics_ends_as_if_it_had_failed() {
        assert_eq!(unless_it_panics(async { 1 }, 0).await, 1);
        let panics = async {
            tokio::task::yield_now().await;
            panic!("as a bug would")
        };
        assert_eq!(unless_it_panics(panics, 0).await, 0);
    }
}
