//! The hot parts, each by itself: cutting, hashing and verifying, encoding and decoding, messages, picking a piece, the queue.
//!
//! `cargo bench -p shoal-benches` runs them all, `cargo bench -p shoal-benches -- pick` one. criterion compares with the run
//! before, on this machine.

use std::{fs, hint::black_box, sync::Arc, time::Duration};

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use shoal_pieces::{Decoder, Encoder, merge, piece_hash, verify_piece};
use shoal_proto::{
    AppName, ArtifactId, Bitmap, CommitSha, EncodingId, PieceIndex, RegionName,
    codec::{decode, encode},
    manifest::{Codec, Manifest, PieceSize},
    peer::{HAVE_BATCH_MAX, PEER_MESSAGE_MAX_BYTES, PeerMessage},
    state::Priority,
};
use shoal_queue::{Actor, AppRow, Ask, Claimant, End, Lease, Queue, Stored, sqlite_url};
use shoal_store::{CutOptions, cut};
use shoal_swarm::{Action, Config, Event, Outcome, PeerKey, Purpose, Swarm, SwarmKey, Time};

const PIECE_BYTES: usize = 4 << 20;

/// 10 GB in pieces of 4 MiB.
const PIECES: u32 = 2_385;

const NEIGHBOURS: u64 = 40;

/// What an artifact is like: half of each 8 KiB is random, half compresses.
fn like_an_artifact(bytes: usize) -> Vec<u8> {
    let mut data = vec![0; bytes];
    let mut stream = blake3::Hasher::new_keyed(b"half of it compresses, half not.").finalize_xof();
    for (at, half) in data.chunks_mut(4 << 10).enumerate() {
        stream.fill(half);
        if at % 2 == 0 {
            for byte in half {
                *byte = b"load store call ret"[usize::from(*byte % 19)] & 0x7c;
            }
        }
    }
    data
}

fn pieces(c: &mut Criterion) {
    let raw = like_an_artifact(PIECE_BYTES);
    let size_bytes = raw.len() as u64;
    let piece_size = PieceSize::from_bytes(size_bytes).expect("a power of two");
    let hash = piece_hash(size_bytes, piece_size, PieceIndex(0), &raw);
    let manifest = Manifest {
        artifact: merge(&[hash], piece_size, size_bytes),
        size_bytes,
        piece_size,
        piece_hashes: vec![hash],
    };
    let mut group = c.benchmark_group("piece");
    group.throughput(Throughput::Bytes(size_bytes));
    group.bench_function("verify", |b| {
        b.iter(|| {
            verify_piece(&manifest, PieceIndex(0), black_box(&raw)).expect("it is the piece")
        });
    });
    let (mut encoder, mut stored) = (Encoder::new(1), Vec::new());
    let codec = encoder.encode(&raw, &mut stored);
    assert_eq!(codec, Codec::Zstd, "half of it compresses");
    group.bench_function("encode", |b| {
        let mut out = Vec::new();
        b.iter(|| encoder.encode(black_box(&raw), &mut out));
    });
    let (mut decoder, mut out) = (Decoder::new(), Vec::new());
    group.bench_function("decode", |b| {
        b.iter(|| {
            decoder.decode(codec, black_box(&stored), raw.len(), &mut out).expect("it decodes")
        });
    });
    group.finish();
}

fn cutting(c: &mut Criterion) {
    let dir =
        tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a directory");
    let file = dir.path().join("file");
    let bytes = 64 << 20;
    fs::write(&file, like_an_artifact(bytes)).expect("room");
    let mut group = c.benchmark_group("cut");
    group.throughput(Throughput::Bytes(bytes as u64)).sample_size(10);
    group.bench_function("64 MiB", |b| {
        let out = dir.path().join("out");
        b.iter(|| {
            let done = cut(&file, &out, &CutOptions::default(), |_| {}).expect("it is cut");
            fs::remove_dir_all(&out).expect("it was made");
            done.index.encoded_bytes()
        });
    });
    group.finish();
}

fn messages(c: &mut Criterion) {
    let artifact = ArtifactId([7; 32]);
    let have = two_thirds(0);
    let batch = (0..HAVE_BATCH_MAX as u32).map(|at| PieceIndex(at * 7 % PIECES)).collect();
    let cases = [
        ("join", PeerMessage::Join { artifact, have }),
        ("have", PeerMessage::Have { artifact, pieces: batch }),
    ];
    let mut group = c.benchmark_group("message");
    for (name, message) in cases {
        let bytes = encode(&message, PEER_MESSAGE_MAX_BYTES).expect("within the limit");
        group.throughput(Throughput::Bytes(bytes.len() as u64));
        group.bench_function(format!("encode {name}"), |b| {
            b.iter(|| encode(black_box(&message), PEER_MESSAGE_MAX_BYTES));
        });
        group.bench_function(format!("decode {name}"), |b| {
            b.iter(|| decode::<PeerMessage>(black_box(&bytes), PEER_MESSAGE_MAX_BYTES));
        });
    }
    group.finish();
}

/// What a neighbour holds: every third piece is lacking, counted from `first`.
fn two_thirds(first: u32) -> Bitmap {
    let mut have = Bitmap::empty(PIECES);
    for piece in (0..PIECES).filter(|piece| !(piece + first).is_multiple_of(3)) {
        have.insert(piece);
    }
    have
}

/// A machine with nothing yet, and neighbours of which each holds two thirds.
fn fetcher() -> Swarm {
    let mut machine = Swarm::new(Config::default(), 1);
    let swarm = SwarmKey(1);
    let purpose = Purpose::Fetch {
        priority: 0,
        piece_bytes: PIECE_BYTES as u64,
        may_lease: false,
        fleet: 1_000,
    };
    let have = Bitmap::empty(PIECES);
    machine.handle(Time(1), Event::Start { swarm, pieces: PIECES, have, purpose });
    for peer in 0..NEIGHBOURS {
        let have = Arc::new(two_thirds(peer as u32));
        let peer = PeerKey(peer);
        machine.handle(Time(2), Event::PeerUp { peer, same_zone: true });
        machine.handle(Time(3), Event::PeerJoined { peer, swarm, have });
    }
    machine
}

/// Fetches everything, each request taking a millisecond; returns how many there were.
fn fetch_all(machine: &mut Swarm) -> u32 {
    let mut now = Time(4);
    let mut open = std::collections::VecDeque::new();
    let mut fetched = 0;
    loop {
        while let Some(action) = machine.poll_action() {
            match action {
                Action::Fetch { request, .. } => open.push_back(request),
                Action::Completed { .. } => return fetched,
                _ => {}
            }
        }
        now = Time(now.0 + 1_000_000);
        match open.pop_front() {
            Some(request) => {
                fetched += 1;
                machine.handle(now, Event::FetchEnded { request, outcome: Outcome::Verified });
            }
            None => {
                now = machine.next_timeout().expect("it waits for something").max(now);
                machine.handle(now, Event::Timeout);
            }
        }
    }
}

fn picking(c: &mut Criterion) {
    assert_eq!(fetch_all(&mut fetcher()), PIECES, "each piece once");
    let mut group = c.benchmark_group("pick");
    group.throughput(Throughput::Elements(u64::from(PIECES))).sample_size(20);
    group.bench_function("10 GB from 40 neighbours", |b| {
        b.iter_batched_ref(fetcher, fetch_all, BatchSize::SmallInput);
    });
    group.finish();
}

/// One job from its submission to its end, alone; many at once are the benchmark `queue`'s.
fn queueing(c: &mut Criterion) {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let dir = tempfile::tempdir().expect("a directory");
    let url = sqlite_url(&dir.path().join("queue.sqlite"));
    let app: AppName = "web".parse().expect("a name");
    let actor = Actor { name: "bench".into(), origin: String::new(), request: None };
    let regions = [RegionName::new("r0").expect("a name")];
    let queue = runtime.block_on(async {
        let queue = Queue::open(&url).await?;
        queue.set_regions(&regions, 0).await?;
        queue.set_app(&AppRow { name: app.clone(), spec: "{}".into() }, &actor, 0).await?;
        anyhow::Ok(queue)
    });
    let queue = queue.expect("a database");
    let worker = Claimant { worker: "w".into(), host: "here".into(), incarnation: "one".into() };
    let mut number = 0_u64;
    let mut group = c.benchmark_group("queue");
    group.sample_size(20).measurement_time(Duration::from_secs(3));
    group.bench_function("submit, claim, complete on SQLite, synced", |b| {
        b.iter(|| {
            number += 1;
            runtime
                .block_on(one_job(&queue, &app, &actor, &worker, &regions, number))
                .expect("a job")
        });
    });
    group.finish();
    runtime.block_on(queue.close());
}

async fn one_job(
    queue: &Queue,
    app: &AppName,
    actor: &Actor,
    worker: &Claimant,
    regions: &[RegionName],
    number: u64,
) -> anyhow::Result<()> {
    let commit: CommitSha = format!("{number:040x}").parse()?;
    let ask = Ask { app: app.clone(), commit, priority: Priority::Normal, max_attempts: 3 };
    queue.submit(&ask, actor, 1).await?;
    let token = number.to_string();
    let job = queue.claim(worker, &token, 1).await?.ok_or(anyhow::anyhow!("no job"))?;
    let id = *blake3::hash(&number.to_le_bytes()).as_bytes();
    let stored = Stored {
        artifact: ArtifactId(id),
        encoding: EncodingId(id),
        size_bytes: 10_000_000_000,
        encoded_bytes: 4_000_000_000,
        piece_size_bytes: PIECE_BYTES as u64,
        pieces: PIECES,
    };
    let lease = Lease { attempt: job.attempt, token };
    queue.finish(job.id, &lease, &End::Succeeded(stored), regions, 2).await?;
    Ok(())
}

criterion_group!(hot, pieces, cutting, messages, picking, queueing);
criterion_main!(hot);
