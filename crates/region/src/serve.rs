//! Answers the machines.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use bytes::Bytes;
use shoal_origin::Bucket;
use shoal_pki::{Member, Role};
use shoal_proto::{
    ArtifactId, EncodingId, RegionName,
    goal::{check_label, labels},
    manifest::PIECES_MAX,
    peer::{PEERS_BATCH_MAX, PeerAddr, PeerMessage, StreamReply, StreamRequest},
    region::{MachineInfo, RegionReply, RegionRequest, goals_digest},
};
use shoal_swarm::{LeaseAnswer, LeaseBook, Time};
use shoal_transport::{Connection, Endpoint, Incoming, IncomingRequest};
use tokio::sync::{Semaphore, mpsc};

use crate::{
    goals::{Goals, KnownGoal},
    indexes::Indexes,
    introductions::Introductions,
    machines::Machines,
    metrics::Metrics,
    signing::{Signing, sign},
    trust::Standings,
};

/// How many requests may be answered at once; more wait in their connections.
const ANSWERS_MAX: usize = 1_024;

/// The most lease books; the one that was longest unused makes room.
const BOOKS_MAX: usize = 256;

/// How many questions for an index may be answered at once; more are told to ask again. They wait for the
/// bucket and have long answers: leases and polls must find places beside them.
pub(crate) const INDEX_ANSWERS_MAX: usize = 256;

/// The longest text of a machine, such as its version, in bytes: the coordinator keeps no longer one.
const TEXT_MAX_BYTES: usize = 255;

/// The most labels of a machine: the coordinator keeps no more.
const LABELS_MAX: usize = 64;

/// While a machine waits for its wave it shall ask again this soon, in milliseconds.
const WAVE_POLL_MS: u32 = 1_000;

/// What the answers are made of.
pub(crate) struct Server {
    pub(crate) me: PeerAddr,
    pub(crate) region: RegionName,
    pub(crate) poll_ms: u32,
    pub(crate) goals: Arc<Goals>,
    pub(crate) machines: Arc<Machines>,
    pub(crate) introductions: Introductions,
    pub(crate) bucket: Bucket,
    pub(crate) metrics: Arc<Metrics>,
    /// By artifact and number of pieces: encodings with pieces of another size are leased apart.
    pub(crate) books: Mutex<HashMap<BookKey, Book>>,
    pub(crate) indexes: Indexes,
    pub(crate) signing: Signing,
    pub(crate) index_places: Semaphore,
    pub(crate) endpoint: Endpoint,
    pub(crate) began: Instant,
    pub(crate) standings: Arc<Standings>,
}

/// An artifact and its number of pieces.
pub(crate) type BookKey = (ArtifactId, u32);

/// A lease book and when it was last used.
pub(crate) struct Book {
    leases: LeaseBook,
    used: Instant,
}

impl Server {
    /// Answers for as long as requests come.
    pub(crate) async fn run(self: Arc<Self>, mut incoming: mpsc::Receiver<Incoming>) {
        let places = Arc::new(Semaphore::new(ANSWERS_MAX));
        while let Some(incoming) = incoming.recv().await {
            match incoming {
                Incoming::Request(request) => {
                    let Ok(place) = places.clone().acquire_owned().await else { return };
                    let server = self.clone();
                    tokio::spawn(async move {
                        let _place = place;
                        server.answer(request).await;
                    });
                }
                Incoming::Message(connection, PeerMessage::Hello { .. }) => {
                    let hello = PeerMessage::Hello { me: self.me.clone(), revisions: vec![] };
                    // An agent that does not read its queue learns nothing else here either.
                    let _ = connection.try_send(&hello);
                }
                Incoming::Message(connection, PeerMessage::Standing { trust, issuer }) => {
                    self.standings.heard(&connection, trust, issuer);
                }
                Incoming::Closed(connection, _) => self.lost(&connection),
                Incoming::Connected(connection) => self.standings.connected(&connection),
                Incoming::Message(..) => {}
            }
        }
    }

    fn now(&self) -> Time {
        Time(u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    fn books(&self) -> std::sync::MutexGuard<'_, HashMap<BookKey, Book>> {
        self.books.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// A machine is gone, unless it has come back by another connection: its leases are free.
    fn lost(&self, connection: &Connection) {
        if self.endpoint.connection(&connection.node()).is_some_and(|now| now != *connection) {
            return;
        }
        self.standings.lost(&connection.node());
        let (now, holder) = (self.now(), holder(connection.member()));
        for book in self.books().values_mut() {
            book.leases.lost(now, holder);
        }
    }

    async fn answer(&self, request: IncomingRequest) {
        let member = request.from().member().clone();
        let is_index = matches!(
            request.request,
            StreamRequest::Index { .. } | StreamRequest::Region(RegionRequest::Index { .. })
        );
        // Held until the answer is out: that is what takes memory and time.
        let place = is_index.then(|| self.index_places.try_acquire());
        let reply = if member.region.as_ref() != Some(&self.region) {
            StreamReply::Error(format!("this is region {}, not yours", self.region))
        } else if !matches!(member.role, Role::Agent | Role::Region) {
            StreamReply::Error(format!("a {} has nothing to ask here", member.role))
        } else if matches!(place, Some(Err(_))) {
            match &request.request {
                StreamRequest::Region(_) => {
                    StreamReply::Region(RegionReply::Error("busy, ask again".into()))
                }
                _ => StreamReply::Busy,
            }
        } else {
            match &request.request {
                StreamRequest::Piece { .. } => StreamReply::NotHere,
                StreamRequest::Index { artifact, encoding } => self
                    .index(artifact, encoding)
                    .await
                    .map_or(StreamReply::NotHere, |bytes| StreamReply::Index(bytes.to_vec())),
                StreamRequest::Trust { after } => self.standings.bundles(*after),
                StreamRequest::Renew => {
                    self.metrics.requests.with_label_values(&["renew"]).inc();
                    let certificate = request.from().certificate();
                    self.standings.renewed(&member, certificate).await
                }
                StreamRequest::Region(question) => {
                    StreamReply::Region(self.region_reply(&member, question.clone()).await)
                }
            }
        };
        // An error says that the asker is gone.
        let _ = request.reply(reply, None).await;
    }

    async fn region_reply(&self, member: &Member, request: RegionRequest) -> RegionReply {
        let count = |kind| self.metrics.requests.with_label_values(&[kind]).inc();
        match request {
            RegionRequest::Poll { machine, digest, reports_digest } => {
                count("poll");
                self.poll(member, machine, digest, reports_digest)
            }
            RegionRequest::Report { machine, reports } => {
                count("report");
                let told = self
                    .believed(member, machine)
                    .and_then(|machine| self.machines.reported(machine, reports, Instant::now()));
                told.map_or_else(RegionReply::Error, |()| RegionReply::Kept)
            }
            RegionRequest::Introduce { me, artifact, complete, want } => {
                count("introduce");
                if me.node != member.node || me.machine != member.machine {
                    return RegionReply::Error("introduce yourself, not another machine".into());
                }
                let want = usize::from(want).min(PEERS_BATCH_MAX);
                let now = Instant::now();
                RegionReply::Peers(self.introductions.introduce(me, artifact, complete, want, now))
            }
            RegionRequest::Lease { artifact, encoding: _, pieces_total, block, lacking, want } => {
                count("lease");
                self.lease(member, artifact, pieces_total, (block, lacking), want)
            }
            RegionRequest::SignedLease {
                artifact,
                encoding,
                pieces_total,
                block,
                lacking,
                want,
            } => {
                count("signed_lease");
                let asked = (artifact, encoding, pieces_total);
                self.signed_lease(member, asked, (block, lacking), want).await
            }
            RegionRequest::LeaseDone { artifact, first, count: pieces, held } => {
                count("lease_done");
                let (now, holder) = (self.now(), holder(member));
                let end = first.saturating_add(pieces);
                // It does not say of how many pieces: every book that has these is told.
                for ((of, pieces_total), book) in self.books().iter_mut() {
                    if *of == artifact && end <= *pieces_total {
                        book.leases.done(now, holder, first, pieces, held);
                    }
                }
                RegionReply::Kept
            }
            RegionRequest::Index { artifact, encoding } => {
                count("index");
                match self.index(&artifact, &encoding).await {
                    Some(bytes) => RegionReply::Index(bytes.to_vec()),
                    None => RegionReply::Error("the region's bucket has no such index".into()),
                }
            }
        }
    }

    /// A machine speaks for itself only, and its certificate says who and where it is.
    fn believed(&self, member: &Member, machine: MachineInfo) -> Result<MachineInfo, String> {
        if machine.addr.node != member.node || machine.addr.machine != member.machine {
            return Err("report for yourself, not for another machine".into());
        }
        let labels = labels(&self.region, &machine.addr.zone, &member.machine, &machine.labels);
        let machine = MachineInfo { labels, ..machine };
        check_machine(&machine)?;
        Ok(machine)
    }

    fn poll(
        &self,
        member: &Member,
        machine: MachineInfo,
        digest: u64,
        reports_digest: u64,
    ) -> RegionReply {
        let now = Instant::now();
        let machine = match self.believed(member, machine) {
            Ok(machine) => machine,
            Err(reason) => return RegionReply::Error(reason),
        };
        let goals: Vec<KnownGoal> = self
            .goals
            .all()
            .into_iter()
            .filter(|known| known.goal.is_for(&self.region, &machine.labels))
            .collect();
        let want_reports = match self.machines.polled(machine, reports_digest, now) {
            Ok(want_reports) => want_reports,
            Err(reason) => return RegionReply::Error(reason),
        };
        let rollouts =
            goals.iter().filter(|known| !known.goal.plan.waves_permille.is_empty()).map(|known| {
                let halted = self.goals.is_halted(&known.goal.app, known.goal.revision);
                (&*known.goal, halted)
            });
        let (waves, waits) = self.machines.open_waves(&member.machine, rollouts, now);
        let poll_after_ms = if waits { self.poll_ms.min(WAVE_POLL_MS) } else { self.poll_ms };
        if goals_digest(goals.iter().map(|known| (&known.goal.app, known.goal.revision))) == digest
        {
            self.metrics.unchanged.inc();
            return RegionReply::Unchanged { waves, poll_after_ms, want_reports };
        }
        let goals = goals.into_iter().map(|known| known.signed).collect();
        RegionReply::Goals { goals, waves, poll_after_ms, want_reports }
    }

    fn lease(
        &self,
        member: &Member,
        artifact: ArtifactId,
        pieces_total: u32,
        (block, lacking): (u32, u64),
        want: u16,
    ) -> RegionReply {
        if pieces_total > PIECES_MAX {
            return RegionReply::Error(format!("an artifact has at most {PIECES_MAX} pieces"));
        }
        let (now, used) = (self.now(), Instant::now());
        let mut books = self.books();
        let key = (artifact, pieces_total);
        if !books.contains_key(&key) && books.len() >= BOOKS_MAX {
            let oldest = books.iter().min_by_key(|(_, book)| book.used).map(|(id, _)| *id);
            oldest.map(|oldest| books.remove(&oldest));
        }
        let book =
            books.entry(key).or_insert_with(|| Book { leases: LeaseBook::new(pieces_total), used });
        book.used = used;
        match book.leases.ask(now, holder(member), block, lacking, want) {
            LeaseAnswer::Granted { first, count, duration } => {
                self.metrics.leased.inc_by(u64::from(count));
                RegionReply::Leased { first, count, duration_ms: millis(duration) }
            }
            LeaseAnswer::Retry(after) => {
                RegionReply::NoLease { retry_ms: Some(millis(after)), all_blocks: false }
            }
            LeaseAnswer::Later(turn) => {
                RegionReply::NoLease { retry_ms: Some(millis(turn)), all_blocks: true }
            }
            LeaseAnswer::AllHeld => RegionReply::NoLease { retry_ms: None, all_blocks: false },
        }
    }

    /// A lease whose pieces can be read by URLs; given back at once when none can be signed.
    async fn signed_lease(
        &self,
        member: &Member,
        (artifact, encoding, pieces_total): (ArtifactId, EncodingId, u32),
        block: (u32, u64),
        want: u16,
    ) -> RegionReply {
        // Before anything is leased: what cannot be signed is nobody's turn.
        let layout = match self.signing.layout(&artifact, &encoding, self).await {
            Ok(layout) => layout,
            Err(reason) => return RegionReply::Error(reason),
        };
        if layout.len() != pieces_total as usize {
            return RegionReply::Error(format!("the artifact has {} pieces", layout.len()));
        }
        let leased = self.lease(member, artifact, pieces_total, block, want);
        let RegionReply::Leased { first, count, duration_ms } = leased else { return leased };
        let pieces = (first, count);
        match sign(&self.bucket, &artifact, &encoding, &layout, pieces, duration_ms).await {
            Ok(urls) => {
                self.metrics.signed.inc_by(urls.len() as u64);
                RegionReply::SignedLeased { first, duration_ms, urls }
            }
            Err(reason) => {
                tracing::warn!(%artifact, %reason, "cannot sign URLs for a lease");
                let (now, holder) = (self.now(), holder(member));
                if let Some(book) = self.books().get_mut(&(artifact, pieces_total)) {
                    book.leases.done(now, holder, first, count, false);
                }
                RegionReply::Error(reason)
            }
        }
    }

    /// An encoding's index: read once from the bucket, however many ask.
    pub(crate) async fn index(
        &self,
        artifact: &ArtifactId,
        encoding: &EncodingId,
    ) -> Option<Bytes> {
        let read = || async {
            self.bucket.index(artifact, encoding).await.unwrap_or_else(|error| {
                tracing::warn!(%artifact, error = format!("{error:#}"), "cannot read an index");
                None
            })
        };
        self.indexes.get((*artifact, *encoding), read).await
    }
}

/// What the coordinator would refuse is refused here, where the machine hears why.
fn check_machine(machine: &MachineInfo) -> Result<(), String> {
    if machine.addr.zone.len().max(machine.version.len()) > TEXT_MAX_BYTES {
        return Err(format!("a machine's zone and version are at most {TEXT_MAX_BYTES} bytes"));
    }
    let count = machine.labels.len();
    if count > LABELS_MAX {
        return Err(format!("{count} labels, region, zone and machine included: use {LABELS_MAX}"));
    }
    machine
        .labels
        .iter()
        .try_for_each(|(key, value)| check_label(key).and_then(|()| check_label(value)))
        .map_err(|error| format!("the machine's labels: {error}"))
}

/// A machine as a lease book knows it.
fn holder(member: &Member) -> u64 {
    let mut first = [0; 8];
    first.copy_from_slice(&member.node.0[..8]);
    u64::from_le_bytes(first)
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use shoal_proto::{MachineName, NodeId, goal::Labels};

    use super::*;

    #[test]
    fn a_machine_that_the_coordinator_would_refuse_is_refused_with_the_reason() {
        let data = "127.0.0.1:1".parse().unwrap();
        let machine = |version: &str, labels: Labels| MachineInfo {
            addr: PeerAddr {
                node: NodeId([1; 32]),
                machine: MachineName::new("m1").unwrap(),
                zone: "a".into(),
                data,
                gossip: data,
            },
            labels,
            version: version.into(),
        };
        let labels = |count: usize| -> Labels {
            (0..count).map(|at| (format!("k{at}"), "v".into())).collect()
        };
        assert_eq!(check_machine(&machine("1", labels(LABELS_MAX))), Ok(()));
        let refused = |machine| check_machine(&machine).unwrap_err();
        assert!(refused(machine("1", labels(LABELS_MAX + 1))).contains("65 labels"));
        assert!(refused(machine(&"1".repeat(256), labels(1))).contains("255 bytes"));
        let odd = Labels::from([("k".into(), "a b".into())]);
        assert!(refused(machine("1", odd)).contains("'a b'"));
    }
}
