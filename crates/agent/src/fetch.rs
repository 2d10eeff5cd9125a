//! One piece, from a stream or from the bucket to the disk: decoded, verified, written.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use shoal_pieces::{Decoder, verify_piece};
use shoal_proto::{
    PieceIndex,
    manifest::{Codec, Location},
    peer::{StreamReply, StreamRequest},
};
use shoal_store::{Artifact, Buffer, PieceWriter, StoreError};
use shoal_swarm::Outcome;
use shoal_transport::{Connection, Pacer, ReplyBody};
use tokio::sync::Semaphore;

use crate::{
    disk::{DiskWork, PART_BYTES},
    origin::Origin,
};

/// How many bytes of pieces may be on their way into memory at once. It bounds the agent's memory whatever
/// the piece size and the number of neighbours.
pub(crate) const RECEIVE_BUDGET_BYTES: u32 = 48 << 20;

/// How long the bucket may take for one piece: a directory on a dead file server never answers.
const ORIGIN_READ_TIMEOUT: Duration = Duration::from_secs(60);

/// An encoded piece of at most so many raw bytes is decoded, hashed and written where it was received, within one or two
/// milliseconds; a larger one is handed over to another thread, which costs two wake-ups.
const DECODE_ON_THE_SPOT_BYTES: usize = 1 << 20;

/// What the fetches of a process share.
pub(crate) struct Kitchen {
    /// Permits are bytes of [`RECEIVE_BUDGET_BYTES`].
    receive: Semaphore,
    /// Limits what is read from the bucket...
    origin: Pacer,
    /// ...and, with what neighbours send, what is received.
    down: Pacer,
    /// One permit a core, for decoding large pieces: that is work of the processor.
    cores: Semaphore,
    /// Decoders and output buffers at rest.
    spare: Mutex<Vec<(Decoder, Vec<u8>)>>,
    disk: Arc<DiskWork>,
}

/// How a fetch went, and what it cost.
pub(crate) struct Fetched {
    pub(crate) outcome: Outcome,
    /// Stored bytes that were received.
    pub(crate) stored_bytes: u64,
    /// Why the disk refused it, when that is the reason.
    pub(crate) disk: Option<String>,
    /// Why the bucket did not give it, when that is the reason.
    pub(crate) bucket: Option<String>,
}

/// How far a piece is that is written as it comes.
enum Poured {
    Part(PieceWriter, Buffer),
    /// All of it came; whether it has its hash.
    Whole(bool),
}

impl Fetched {
    pub(crate) fn without(outcome: Outcome) -> Self {
        Self { outcome, stored_bytes: 0, disk: None, bucket: None }
    }
}

impl Kitchen {
    pub(crate) fn new(origin: Pacer, down: Pacer, disk: Arc<DiskWork>) -> Arc<Self> {
        let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        Arc::new(Self {
            receive: Semaphore::new(RECEIVE_BUDGET_BYTES as usize),
            origin,
            down,
            cores: Semaphore::new(cores),
            spare: Mutex::default(),
            disk,
        })
    }

    /// Decodes `stored`, verifies it as `piece` and writes it: only then it is held.
    async fn take_in(
        self: &Arc<Self>,
        artifact: &Arc<Artifact>,
        piece: PieceIndex,
        codec: Codec,
        stored: Bytes,
    ) -> Fetched {
        let stored_bytes = stored.len() as u64;
        let is_small = artifact.manifest().piece_len(piece) <= DECODE_ON_THE_SPOT_BYTES;
        let work = {
            let (kitchen, artifact) = (self.clone(), artifact.clone());
            move || kitchen.decode(&artifact, piece, codec, &stored)
        };
        let done = if is_small {
            self.disk.run(work).await
        } else {
            let Ok(_core) = self.cores.acquire().await else {
                return Fetched::without(Outcome::Failed);
            };
            tokio::task::spawn_blocking(work).await
        };
        let (outcome, disk) = match done {
            Ok(Ok(true)) => match sync_at_times(artifact).await {
                Ok(()) => (Outcome::Verified, None),
                Err(error) => (Outcome::Failed, Some(error.to_string())),
            },
            Ok(Ok(false)) => (Outcome::Corrupt, None),
            Ok(Err(error)) => (Outcome::Failed, Some(error.to_string())),
            Err(_) => (Outcome::Failed, None),
        };
        Fetched { outcome, stored_bytes, disk, bucket: None }
    }

    /// Whether `stored` is the piece; then it is written.
    fn decode(
        &self,
        artifact: &Artifact,
        piece: PieceIndex,
        codec: Codec,
        stored: &[u8],
    ) -> Result<bool, StoreError> {
        let spare = || self.spare.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (mut decoder, mut raw) = spare().pop().unwrap_or_else(|| (Decoder::new(), Vec::new()));
        let manifest = artifact.manifest();
        let decoded = match codec {
            Codec::Raw => Some(stored),
            Codec::Zstd => decoder
                .decode(codec, stored, manifest.piece_len(piece), &mut raw)
                .is_ok()
                .then_some(raw.as_slice()),
        };
        let written = match decoded {
            Some(raw) if verify_piece(manifest, piece, raw).is_ok() => {
                let encoded = (codec != Codec::Raw).then_some((codec, stored));
                artifact.write(piece, raw, encoded).map(|()| true)
            }
            _ => Ok(false),
        };
        spare().push((decoder, raw));
        written
    }

    /// Fetches a piece from a neighbour.
    pub(crate) async fn from_peer(
        self: &Arc<Self>,
        connection: &Connection,
        artifact: &Arc<Artifact>,
        piece: PieceIndex,
    ) -> Fetched {
        let raw_len = artifact.manifest().piece_len(piece);
        let request = StreamRequest::Piece { artifact: artifact.manifest().artifact, piece };
        let (codec, len, mut body) = match connection.request(request).await {
            Ok((StreamReply::Piece { codec, len }, body)) => (codec, len as usize, body),
            Ok((StreamReply::Busy, _)) => return Fetched::without(Outcome::Busy),
            Ok((StreamReply::NotHere, _)) => return Fetched::without(Outcome::NotHere),
            Ok(_) | Err(_) => return Fetched::without(Outcome::Failed),
        };
        // A stored piece is never longer than the raw one: a longer answer is a lie, and is not read.
        if len > raw_len {
            return Fetched::without(Outcome::Corrupt);
        }
        let writer = if codec == Codec::Raw { artifact.begin(piece) } else { Ok(None) };
        // Only now is there memory for it: who waits in a neighbour's queue holds none.
        match writer {
            Ok(Some(writer)) if len < raw_len => {
                drop(writer);
                Fetched::without(Outcome::Corrupt)
            }
            Ok(Some(writer)) => self.pour(body, artifact, writer).await,
            Ok(None) => {
                let Ok(_budget) = self.receive.acquire_many(raw_len as u32).await else {
                    return Fetched::without(Outcome::Failed);
                };
                let mut stored = artifact.buffers().take();
                match body.read_into(len, &mut stored).await {
                    Ok(()) => self.take_in(artifact, piece, codec, Bytes::from_owner(stored)).await,
                    Err(_) => Fetched::without(Outcome::Failed),
                }
            }
            Err(_) => Fetched::without(Outcome::Failed),
        }
    }

    /// Writes a piece where it belongs as it comes, and says in the end whether it has its hash.
    async fn pour(
        self: &Arc<Self>,
        mut body: ReplyBody,
        artifact: &Arc<Artifact>,
        mut writer: PieceWriter,
    ) -> Fetched {
        let stored_bytes = body.left() as u64;
        let Ok(_budget) = self.receive.acquire_many(PART_BYTES as u32).await else {
            return Fetched::without(Outcome::Failed);
        };
        let mut part = self.disk.parts().take();
        loop {
            if body.read_into(body.left().min(PART_BYTES), &mut part).await.is_err() {
                return Fetched::without(Outcome::Failed);
            }
            let is_last = body.left() == 0;
            let work = move || {
                writer.write(&part)?;
                Ok(if is_last { Poured::Whole(writer.end()?) } else { Poured::Part(writer, part) })
            };
            let done = |outcome, disk| Fetched { outcome, stored_bytes, disk, bucket: None };
            match self.disk.run(work).await {
                Ok(Ok(Poured::Part(at, buffer))) => (writer, part) = (at, buffer),
                Ok(Ok(Poured::Whole(true))) => {
                    return match sync_at_times(artifact).await {
                        Ok(()) => done(Outcome::Verified, None),
                        Err(error) => done(Outcome::Failed, Some(error.to_string())),
                    };
                }
                Ok(Ok(Poured::Whole(false))) => return done(Outcome::Corrupt, None),
                Ok(Err(error)) => {
                    let error: StoreError = error;
                    return done(Outcome::Failed, Some(error.to_string()));
                }
                Err(_) => return Fetched::without(Outcome::Failed),
            }
        }
    }

    /// Reads a leased piece from the bucket and takes it in.
    pub(crate) async fn from_origin(
        self: &Arc<Self>,
        origin: &Origin,
        artifact: &Arc<Artifact>,
        layout: &[Location],
        piece: PieceIndex,
    ) -> Fetched {
        let (id, encoding) = (artifact.manifest().artifact, artifact.encoding());
        let raw_len = artifact.manifest().piece_len(piece);
        let stored = artifact.index().pieces.get(piece.0 as usize);
        // Before the read and before there is memory for it, so neither the bucket nor a neighbour's piece waits for that.
        let stored_len = stored.map_or(raw_len, |stored| stored.len as usize);
        self.origin.turn().all(stored_len).await;
        self.down.turn().all(stored_len).await;
        let Ok(_budget) = self.receive.acquire_many(raw_len as u32).await else {
            return Fetched::without(Outcome::Failed);
        };
        let codec = stored.map(|stored| stored.codec);
        let read = origin.read((id, encoding), layout, piece.0);
        let Ok(read) = tokio::time::timeout(ORIGIN_READ_TIMEOUT, read).await else {
            tracing::warn!(artifact = %id, %piece, "the bucket does not answer");
            let bucket = Some("the bucket does not answer".into());
            return Fetched { bucket, ..Fetched::without(Outcome::Failed) };
        };
        match (read, codec) {
            (Ok(stored), Some(codec)) => self.take_in(artifact, piece, codec, stored).await,
            (Err(error), _) => {
                tracing::warn!(artifact = %id, %piece, %error, "cannot read from the bucket");
                let bucket = Some(error.to_string());
                Fetched { bucket, ..Fetched::without(Outcome::Failed) }
            }
            (Ok(_), _) => Fetched::without(Outcome::Failed),
        }
    }
}

/// Syncs what was written, now and then; that is never done on the spot.
async fn sync_at_times(artifact: &Arc<Artifact>) -> anyhow::Result<()> {
    if artifact.is_sync_due() {
        let artifact = artifact.clone();
        tokio::task::spawn_blocking(move || artifact.sync_at_times()).await??;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use shoal_pieces::Encoder;
    use shoal_proto::manifest::PieceSize;
    use shoal_store::{CutOptions, Store, StoreConfig, cut};

    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn an_encoded_piece_is_held_only_with_its_hash_wherever_it_is_decoded() {
        const SPOT: u64 = DECODE_ON_THE_SPOT_BYTES as u64;
        let kitchen = Kitchen::new(Pacer::default(), Pacer::default(), DiskWork::new());
        for piece_bytes in [SPOT, 2 * SPOT] {
            let dir = tempfile::tempdir().unwrap();
            let file = dir.path().join("file");
            let lines: String = (0..SPOT).map(|line| format!("{line}\n")).collect();
            let bytes = &lines.as_bytes()[..2 * piece_bytes as usize];
            fs::write(&file, bytes).unwrap();
            let piece_size = PieceSize::from_bytes(piece_bytes);
            let options = CutOptions { piece_size, ..CutOptions::default() };
            let index = cut(&file, &dir.path().join("cut"), &options, |_| {}).unwrap().index;
            let config = StoreConfig { reserve_free_bytes: 0, ..StoreConfig::default() };
            let store = Store::open(&dir.path().join("store"), config).unwrap();
            let artifact = store.open_artifact(&index).unwrap();

            let frames: Vec<Bytes> = bytes
                .chunks(piece_bytes as usize)
                .map(|raw| {
                    let mut frame = Vec::new();
                    assert_eq!(Encoder::new(1).encode(raw, &mut frame), Codec::Zstd);
                    frame.into()
                })
                .collect();
            let taken_in = async |frame: &Bytes| {
                let piece = PieceIndex(1);
                let fetched = kitchen.take_in(&artifact, piece, Codec::Zstd, frame.clone()).await;
                assert_eq!(fetched.stored_bytes, frame.len() as u64);
                (fetched.outcome, artifact.have().contains(1))
            };
            assert_eq!(taken_in(&frames[0]).await, (Outcome::Corrupt, false), "another piece");
            let torn = frames[1].slice(..frames[1].len() / 2);
            assert_eq!(taken_in(&torn).await, (Outcome::Corrupt, false));
            assert_eq!(taken_in(&frames[1]).await, (Outcome::Verified, true));
            // It is passed on as it came.
            let mut stored = artifact.stored(PieceIndex(1)).unwrap().unwrap();
            assert_eq!(stored.codec(), Codec::Zstd);
            let passed_on = stored.read(usize::MAX, artifact.buffers().take()).unwrap();
            assert_eq!(passed_on, frames[1]);
        }
    }
}
