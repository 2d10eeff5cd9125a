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
    goal::labels,
    peer::{PEERS_BATCH_MAX, PeerAddr, PeerMessage, StreamReply, StreamRequest},
    region::{MachineInfo, OpenWave, RegionReply, RegionRequest, goals_digest},
};
use shoal_swarm::{LeaseAnswer, LeaseBook, Time};
use shoal_transport::{Connection, Incoming, IncomingRequest};
use tokio::sync::{Mutex as AsyncMutex, Semaphore, mpsc};

use crate::{
    goals::{Goals, KnownGoal},
    introductions::Introductions,
    machines::Machines,
    metrics::Metrics,
};

/// How many requests may be answered at once; more wait in their connections.
const ANSWERS_MAX: usize = 1_024;

/// The most lease books; the one that was longest unused makes room.
const BOOKS_MAX: usize = 256;

/// How much the kept indexes may take, in bytes: 50 of a 10 GB artifact.
const INDEXES_MAX_BYTES: usize = 16 << 20;

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
    pub(crate) books: Mutex<HashMap<ArtifactId, Book>>,
    pub(crate) indexes: AsyncMutex<Vec<(EncodingId, Bytes)>>,
    pub(crate) began: Instant,
}

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
                Incoming::Closed(connection, _) => self.lost(&connection),
                Incoming::Connected(_) | Incoming::Message(..) => {}
            }
        }
    }

    fn now(&self) -> Time {
        Time(u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    fn books(&self) -> std::sync::MutexGuard<'_, HashMap<ArtifactId, Book>> {
        self.books.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// A machine is gone: its leases are free.
    fn lost(&self, connection: &Connection) {
        let (now, holder) = (self.now(), holder(connection.member()));
        for book in self.books().values_mut() {
            book.leases.lost(now, holder);
        }
    }

    async fn answer(&self, request: IncomingRequest) {
        let member = request.from().member().clone();
        let reply = if member.region.as_ref() != Some(&self.region) {
            StreamReply::Error(format!("this is region {}, not yours", self.region))
        } else if !matches!(member.role, Role::Agent | Role::Region) {
            StreamReply::Error(format!("a {} has nothing to ask here", member.role))
        } else {
            match &request.request {
                StreamRequest::Piece { .. } => StreamReply::NotHere,
                StreamRequest::Index { artifact, encoding } => self
                    .index(artifact, encoding)
                    .await
                    .map_or(StreamReply::NotHere, |bytes| StreamReply::Index(bytes.to_vec())),
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
            RegionRequest::Lease { artifact, encoding: _, pieces_total, block, want } => {
                count("lease");
                self.lease(member, artifact, pieces_total, block, want)
            }
            RegionRequest::LeaseDone { artifact, first, count: pieces, held } => {
                count("lease_done");
                if let Some(book) = self.books().get_mut(&artifact) {
                    book.leases.done(self.now(), holder(member), first, pieces, held);
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
        Ok(MachineInfo { labels, ..machine })
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
        let waves: Vec<OpenWave> = goals
            .iter()
            .filter(|known| !known.goal.plan.waves_permille.is_empty())
            .map(|known| {
                let halted = self.goals.is_halted(&known.goal.app, known.goal.revision);
                self.machines.open_wave(&known.goal, halted, now)
            })
            .collect();
        let opening = waves.iter().any(|wave| wave.open_permille < shoal_rollout::ALL_PERMILLE);
        let poll_after_ms = if opening { self.poll_ms.min(WAVE_POLL_MS) } else { self.poll_ms };
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
        block: u32,
        want: u16,
    ) -> RegionReply {
        let (now, used) = (self.now(), Instant::now());
        let mut books = self.books();
        if !books.contains_key(&artifact) && books.len() >= BOOKS_MAX {
            let oldest = books.iter().min_by_key(|(_, book)| book.used).map(|(id, _)| *id);
            oldest.map(|oldest| books.remove(&oldest));
        }
        let book = books
            .entry(artifact)
            .or_insert_with(|| Book { leases: LeaseBook::new(pieces_total), used });
        book.used = used;
        if book.leases.pieces_total() != pieces_total {
            return RegionReply::Error(format!(
                "the artifact has {} pieces, not {pieces_total}",
                book.leases.pieces_total()
            ));
        }
        match book.leases.ask(now, holder(member), block, want) {
            LeaseAnswer::Granted { first, count, duration } => {
                self.metrics.leased.inc_by(u64::from(count));
                RegionReply::Leased { first, count, duration_ms: millis(duration) }
            }
            LeaseAnswer::Retry(after) => RegionReply::NoLease { retry_ms: Some(millis(after)) },
            LeaseAnswer::AllHeld => RegionReply::NoLease { retry_ms: None },
        }
    }

    /// An encoding's index: read once from the bucket, however many ask.
    async fn index(&self, artifact: &ArtifactId, encoding: &EncodingId) -> Option<Bytes> {
        let mut indexes = self.indexes.lock().await;
        if let Some(at) = indexes.iter().position(|(kept, _)| kept == encoding) {
            let found = indexes.remove(at);
            let bytes = found.1.clone();
            indexes.push(found);
            return Some(bytes);
        }
        let bytes = match self.bucket.index(artifact, encoding).await {
            Ok(bytes) => bytes?,
            Err(error) => {
                tracing::warn!(%artifact, error = format!("{error:#}"), "cannot read an index");
                return None;
            }
        };
        indexes.push((*encoding, bytes.clone()));
        while indexes.iter().map(|(_, bytes)| bytes.len()).sum::<usize>() > INDEXES_MAX_BYTES
            && indexes.len() > 1
        {
            indexes.remove(0);
        }
        Some(bytes)
    }
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
