//! Whole encodings in directories, and stores that fail.

use std::{
    fs,
    ops::Range,
    path::{Path as FsPath, PathBuf},
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt, future, stream, stream::BoxStream};
use object_store::{
    CopyOptions, GetOptions, GetRange, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, memory::InMemory,
    path::Path,
};
use shoal_proto::{
    ArtifactId, EncodingId, PieceIndex,
    manifest::{Codec, EncodingIndex, Manifest, Part, PieceSize, StoredPiece},
};
use tempfile::TempDir;

use crate::{
    Bucket, CHUNK_BYTES, CHUNKS_READ_MAX, Check, CopyStats, OriginError, PutPart,
    bucket::part_name, write::READ_BUDGET,
};

/// Four pieces of 16 MiB fill a part; the fifth, short one is another.
const TWO_PARTS_BYTES: usize = (64 << 20) + 1_000;

/// An artifact, cut into a directory, and two buckets.
struct Fixture {
    dir: TempDir,
    raw: Vec<u8>,
    index: EncodingIndex,
    bytes: Vec<u8>,
    artifact: ArtifactId,
    encoding: EncodingId,
    main: Bucket,
    regional: Bucket,
}

impl Fixture {
    fn new(len: usize) -> Self {
        let mut raw = vec![0; len];
        blake3::Hasher::new().finalize_xof().fill(&mut raw);
        let (piece_size, size_bytes) = (PieceSize::MAX, len as u64);
        let piece = piece_size.bytes() as usize;
        let hashes: Vec<_> = (0..)
            .map(PieceIndex)
            .zip(raw.chunks(piece))
            .map(|(n, raw)| shoal_pieces::piece_hash(size_bytes, piece_size, n, raw))
            .collect();
        let artifact = shoal_pieces::merge(&hashes, piece_size, size_bytes);
        let dir = TempDir::new().unwrap();
        fs::create_dir(dir.path().join("cut")).unwrap();
        // Raw pieces: parts are 64 MiB of the artifact each.
        let mut parts = Vec::new();
        for (n, part) in (0..).zip(raw.chunks(64 << 20)) {
            fs::write(dir.path().join("cut").join(part_name(n)), part).unwrap();
            parts.push(Part { len: part.len() as u64, hash: *blake3::hash(part).as_bytes() });
        }
        let pieces = raw
            .chunks(piece)
            .map(|raw| StoredPiece { codec: Codec::Raw, len: raw.len() as u32 })
            .collect();
        let manifest = Manifest { artifact, size_bytes, piece_size, piece_hashes: hashes };
        let index = EncodingIndex { manifest, pieces, parts };
        let (bytes, encoding) = shoal_pieces::seal_index(&index).unwrap();
        let bucket = |name| Bucket::open(dir.path().join(name).to_str().unwrap()).unwrap();
        let (main, regional) = (bucket("main"), bucket("regional"));
        Self { dir, raw, index, bytes, artifact, encoding, main, regional }
    }

    fn cut(&self) -> PathBuf {
        self.dir.path().join("cut")
    }

    fn part_file(&self, bucket: &Bucket, number: u32) -> PathBuf {
        bucket.directory(&self.artifact, &self.encoding).unwrap().join(part_name(number))
    }

    async fn upload(&self) -> Result<CopyStats, OriginError> {
        self.main.upload(&self.cut(), &self.index, &self.bytes, &self.encoding, |_| {}).await
    }

    async fn copy(&self) -> Result<CopyStats, OriginError> {
        self.regional.copy_from(&self.main, &self.artifact, &self.encoding, |_| {}).await
    }

    async fn check(&self, bucket: &Bucket) -> Check {
        bucket.check(&self.artifact, &self.encoding).await.unwrap()
    }

    fn total(&self) -> u64 {
        self.raw.len() as u64
    }

    /// The regional bucket has no index, and no part `number`.
    async fn assert_not_copied(&self, number: u32) {
        assert_eq!(self.regional.index(&self.artifact, &self.encoding).await.unwrap(), None);
        let parts = self.regional.parts(&self.artifact, &self.encoding).await.unwrap();
        assert!(!parts.contains_key(&number), "{parts:?}");
        // A chunk that is being hashed when its transfer fails is given back right after.
        let all = READ_BUDGET.acquire_many(CHUNKS_READ_MAX as u32);
        let all =
            tokio::time::timeout(Duration::from_secs(10), all).await.expect("memory is given back");
        drop(all.unwrap());
    }
}

fn names(dir: &FsPath) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn change(file: &FsPath, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(file).unwrap();
    change(&mut bytes);
    fs::write(file, bytes).unwrap();
}

#[tokio::test]
async fn uploaded_copied_and_read_back() {
    let it = Fixture::new(TWO_PARTS_BYTES);
    assert_eq!(it.check(&it.main).await, Check::Absent);
    let seen = Mutex::new(Vec::new());
    let tell = |bytes| seen.lock().unwrap().push(bytes);
    let stats = it.main.upload(&it.cut(), &it.index, &it.bytes, &it.encoding, tell).await.unwrap();
    assert_eq!(stats, CopyStats { bytes: it.total(), skipped_bytes: 0 });
    assert_eq!(*seen.lock().unwrap().last().unwrap(), it.total());
    assert!(seen.lock().unwrap().len() > 8, "told for every chunk");
    assert_eq!(it.check(&it.main).await, Check::Whole);
    let dir = it.main.directory(&it.artifact, &it.encoding).unwrap();
    assert_eq!(names(&dir), ["index", "part-00000", "part-00001"]);
    assert_eq!(fs::read(dir.join("part-00000")).unwrap(), it.raw[..64 << 20]);

    let stats = it.copy().await.unwrap();
    assert_eq!(stats, CopyStats { bytes: it.total(), skipped_bytes: 0 });
    it.regional.verify(&it.artifact, &it.encoding).await.unwrap();
    let again = CopyStats { bytes: 0, skipped_bytes: it.total() };
    assert_eq!(it.copy().await.unwrap(), again);
    assert_eq!(it.upload().await.unwrap(), again);

    // Pieces, also across the border between the parts.
    let layout = it.index.layout();
    for (first, count) in [(0, 1), (3, 2), (0, 5), (4, 1), (2, 0)] {
        let pieces = it.regional.read_pieces(&it.artifact, &it.encoding, &layout, first, count);
        let pieces = pieces.await.unwrap();
        assert_eq!(pieces.len() as u32, count);
        for (n, piece) in (first..).zip(&pieces) {
            let range = it.index.manifest.piece_range(PieceIndex(n));
            assert!(**piece == it.raw[range.start as usize..range.end as usize], "piece {n}");
        }
    }
    for (first, count) in [(0, 6), (5, 1), (6, 0), (u32::MAX, u32::MAX)] {
        let error = it.regional.read_pieces(&it.artifact, &it.encoding, &layout, first, count);
        assert!(matches!(error.await, Err(OriginError::NoSuchPieces { .. })), "{first} {count}");
    }
}

#[tokio::test]
async fn an_upload_goes_on_where_it_stopped() {
    let it = Fixture::new(TWO_PARTS_BYTES);
    let first = Bytes::copy_from_slice(&it.raw[..64 << 20]);
    let stream = stream::iter([Ok::<_, OriginError>(first)]);
    let expect = Some(it.index.parts[0]);
    let put = it.main.put_part(&it.artifact, &it.encoding, 0, expect, stream).await.unwrap();
    assert_eq!(put, PutPart::Written(it.index.parts[0]));
    assert_eq!(
        it.check(&it.main).await,
        Check::Missing { index: false, parts: vec![] },
        "without an index nobody can tell what is missing"
    );
    // It is not read again: it is not even there any more.
    fs::remove_file(it.cut().join(part_name(0))).unwrap();
    let stats = it.upload().await.unwrap();
    assert_eq!(stats, CopyStats { bytes: 1_000, skipped_bytes: 64 << 20 });
    assert_eq!(it.check(&it.main).await, Check::Whole);
}

#[tokio::test]
async fn an_upload_that_is_cut_off_leaves_no_index() {
    let it = Fixture::new(TWO_PARTS_BYTES);
    // Given up after some chunks.
    let chunks = AtomicU32::new(0);
    let stop = tokio::sync::Notify::new();
    let tell = |_| {
        if chunks.fetch_add(1, Ordering::Relaxed) == 3 {
            stop.notify_one();
        }
    };
    let cut = it.cut();
    let upload = Box::pin(it.main.upload(&cut, &it.index, &it.bytes, &it.encoding, tell));
    assert!(matches!(
        future::select(upload, Box::pin(stop.notified())).await,
        future::Either::Right(_)
    ));
    assert_eq!(it.main.index(&it.artifact, &it.encoding).await.unwrap(), None);
    it.upload().await.unwrap();
    it.main.verify(&it.artifact, &it.encoding).await.unwrap();

    // A part that the directory lacks.
    let it = Fixture::new(TWO_PARTS_BYTES);
    let (file, aside) = (it.cut().join(part_name(1)), it.cut().join("aside"));
    fs::rename(&file, &aside).unwrap();
    assert!(matches!(it.upload().await, Err(OriginError::File { .. })));
    assert_eq!(it.main.index(&it.artifact, &it.encoding).await.unwrap(), None);
    // A part that is not what was cut.
    fs::write(&file, vec![7; 1_000]).unwrap();
    assert!(matches!(it.upload().await, Err(OriginError::Mismatch { part: 1, .. })));
    fs::write(&file, b"short").unwrap();
    assert!(matches!(it.upload().await, Err(OriginError::Mismatch { part: 1, .. })));
    assert_eq!(it.main.index(&it.artifact, &it.encoding).await.unwrap(), None);
    // What a killed process leaves behind is swept in the end.
    let dir = it.main.directory(&it.artifact, &it.encoding).unwrap();
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("part-00000#7"), b"half").unwrap();
    fs::rename(&aside, &file).unwrap();
    it.upload().await.unwrap();
    assert_eq!(it.check(&it.main).await, Check::Whole);
    it.main.verify(&it.artifact, &it.encoding).await.unwrap();
    assert_eq!(names(&dir), ["index", "part-00000", "part-00001"]);
}

#[tokio::test]
async fn a_corrupt_part_is_not_copied() {
    let it = Fixture::new(TWO_PARTS_BYTES);
    it.upload().await.unwrap();
    for part in [0, 1] {
        let file = it.part_file(&it.main, part);
        let flip = |bytes: &mut Vec<u8>| *bytes.last_mut().unwrap() ^= 1;
        change(&file, flip);
        let error = it.copy().await.unwrap_err();
        assert!(matches!(error, OriginError::Mismatch { part: p, .. } if p == part), "{error}");
        it.assert_not_copied(part).await;
        let found = it.main.verify(&it.artifact, &it.encoding).await.unwrap_err();
        assert!(matches!(found, OriginError::Mismatch { part: p, .. } if p == part), "{found}");
        change(&file, flip);
        // The other part may have been copied; the next round begins anew.
        let copied = it.regional.directory(&it.artifact, &it.encoding).unwrap();
        if copied.exists() {
            fs::remove_dir_all(copied).unwrap();
        }
    }
    it.copy().await.unwrap();
    it.regional.verify(&it.artifact, &it.encoding).await.unwrap();
}

#[tokio::test]
async fn a_part_of_the_wrong_length_or_a_missing_one_is_not_copied() {
    let it = Fixture::new(TWO_PARTS_BYTES);
    it.upload().await.unwrap();
    let file = it.part_file(&it.main, 0);
    let layout = it.index.layout();
    change(&file, |bytes| bytes.truncate(50 << 20));
    assert!(matches!(it.copy().await, Err(OriginError::Mismatch { part: 0, .. })));
    it.assert_not_copied(0).await;
    assert_eq!(it.check(&it.main).await, Check::Missing { index: true, parts: vec![0] });
    // One piece begins before the new end, the other one is whole before it.
    for (first, ok) in [(3, false), (2, true)] {
        let pieces = it.main.read_pieces(&it.artifact, &it.encoding, &layout, first, 1).await;
        assert_eq!(pieces.is_ok(), ok);
        if let Err(error) = pieces {
            assert!(matches!(error, OriginError::WrongRange { .. }), "{error}");
        }
    }
    change(&file, |bytes| bytes.truncate(10));
    let beyond = it.main.read_pieces(&it.artifact, &it.encoding, &layout, 3, 1).await;
    assert!(matches!(beyond, Err(OriginError::WrongRange { .. })), "{beyond:?}");
    change(&file, |bytes| bytes.resize((64 << 20) + 1, 0));
    assert!(matches!(it.copy().await, Err(OriginError::Mismatch { part: 0, .. })));
    fs::remove_file(&file).unwrap();
    assert!(matches!(it.copy().await, Err(OriginError::NotFound { .. })));
    it.assert_not_copied(0).await;
    let gone = it.main.read_pieces(&it.artifact, &it.encoding, &layout, 0, 1).await;
    assert!(matches!(gone, Err(OriginError::NotFound { .. })), "{gone:?}");
    // The upload mends it, whatever its length was.
    fs::write(&file, b"something").unwrap();
    assert_eq!(it.upload().await.unwrap().bytes, 64 << 20);
    it.main.verify(&it.artifact, &it.encoding).await.unwrap();
}

#[tokio::test]
async fn the_index_comes_last_and_is_the_right_one() {
    let it = Fixture::new(1_000);
    assert!(matches!(it.copy().await, Err(OriginError::NotFound { .. })));
    let bytes = Bytes::from(it.bytes.clone());
    let early = it.main.put_index(&it.artifact, &it.encoding, bytes.clone()).await;
    assert!(
        matches!(&early, Err(OriginError::Incomplete { missing }) if *missing == [0]),
        "{early:?}"
    );
    let other = it.main.put_index(&ArtifactId::EMPTY, &it.encoding, bytes).await;
    assert!(matches!(other, Err(OriginError::Index { .. })));
    it.upload().await.unwrap();
    let file = it.main.directory(&it.artifact, &it.encoding).unwrap().join("index");
    change(&file, |bytes| bytes[5] ^= 1);
    assert!(matches!(it.copy().await, Err(OriginError::Index { .. })));
    it.assert_not_copied(0).await;
    assert!(it.main.check(&it.artifact, &it.encoding).await.is_err());
    it.upload().await.unwrap();
    assert_eq!(it.check(&it.main).await, Check::Whole, "a damaged index is mended");
    it.copy().await.unwrap();
    let copied = it.regional.index(&it.artifact, &it.encoding).await.unwrap().unwrap();
    assert_eq!(copied, it.bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn writers_of_an_index_find_it_there_though_their_files_were_swept_away() {
    // The first that is through sweeps away what the others are about to put in its place. When exactly is up to the
    // threads: in so many rounds it comes about again and again.
    const ROUNDS: usize = 100;
    const WRITERS: usize = 8;
    let it = Fixture::new(0);
    let dir = it.main.directory(&it.artifact, &it.encoding).unwrap();
    for round in 0..ROUNDS {
        let writers: Vec<_> = (0..WRITERS)
            .map(|_| {
                let (bucket, bytes) = (it.main.clone(), Bytes::from(it.bytes.clone()));
                let (artifact, encoding) = (it.artifact, it.encoding);
                tokio::spawn(async move { bucket.put_index(&artifact, &encoding, bytes).await })
            })
            .collect();
        for written in future::join_all(writers).await {
            written.unwrap().unwrap_or_else(|error| panic!("round {round}: {error}"));
        }
        assert_eq!(names(&dir), ["index"], "round {round}");
        assert_eq!(it.check(&it.main).await, Check::Whole);
        fs::remove_file(dir.join("index")).unwrap();
    }
}

#[tokio::test]
async fn an_artifact_of_no_bytes_is_an_index() {
    let it = Fixture::new(0);
    assert_eq!(it.artifact, ArtifactId::EMPTY);
    assert_eq!(it.upload().await.unwrap(), CopyStats::default());
    assert_eq!(it.copy().await.unwrap(), CopyStats::default());
    assert_eq!(it.check(&it.regional).await, Check::Whole);
    it.regional.verify(&it.artifact, &it.encoding).await.unwrap();
    let dir = it.regional.directory(&it.artifact, &it.encoding).unwrap();
    assert_eq!(names(&dir), ["index"]);
    let pieces = it.regional.read_pieces(&it.artifact, &it.encoding, &[], 0, 0).await.unwrap();
    assert!(pieces.is_empty());
}

#[tokio::test]
async fn a_part_is_written_once_and_only_as_expected() {
    let it = Fixture::new(1_000);
    let part = it.index.parts[0];
    let put = |expect: Option<Part>, items: Vec<Result<Bytes, String>>| {
        it.main.put_part(&it.artifact, &it.encoding, 0, expect, stream::iter(items))
    };
    let all =
        || vec![Ok(Bytes::copy_from_slice(&it.raw[..300])), Ok(it.raw[300..].to_vec().into())];

    let wrong = put(Some(part), vec![Ok(Bytes::from(vec![0; 1_000]))]).await;
    assert!(matches!(wrong, Err(OriginError::Mismatch { part: 0, .. })));
    for items in
        [vec![Ok(Bytes::from(vec![0; 999]))], vec![Ok(Bytes::from(vec![0; 1_001]))], vec![]]
    {
        let wrong = put(Some(part), items).await;
        assert!(matches!(wrong, Err(OriginError::Mismatch { part: 0, .. })));
    }
    let broken = put(Some(part), vec![Ok(Bytes::from_static(b"x")), Err("gone".into())]).await;
    assert!(matches!(broken, Err(OriginError::Stream { .. })));
    assert_eq!(it.check(&it.main).await, Check::Absent, "none of them left anything");

    assert_eq!(put(None, all()).await.unwrap(), PutPart::Written(part));
    assert_eq!(put(None, all()).await.unwrap(), PutPart::Written(part), "until it is whole");
    assert_eq!(put(Some(part), vec![Err("unread".into())]).await.unwrap(), PutPart::Present);
    it.upload().await.unwrap();
    assert!(matches!(put(None, all()).await, Err(OriginError::Sealed { .. })));
}

#[tokio::test]
async fn more_senders_than_memory_take_turns() {
    let it = Fixture::new(0);
    let len = CHUNK_BYTES + 10;
    let bytes = Bytes::from(vec![3; len]);
    let hash = *blake3::hash(&bytes).as_bytes();
    let puts = (0..12).map(|number| {
        // In small, uneven pieces.
        let cut: Vec<_> =
            (0..len).step_by(700_001).map(|at| bytes.slice(at..(at + 700_001).min(len))).collect();
        let stream = stream::iter(cut.into_iter().map(Ok::<_, OriginError>));
        it.main.put_part(&it.artifact, &it.encoding, number, None, stream)
    });
    for put in future::join_all(puts).await {
        assert_eq!(put.unwrap(), PutPart::Written(Part { len: len as u64, hash }));
    }
    let parts = it.main.parts(&it.artifact, &it.encoding).await.unwrap();
    assert_eq!(parts.len(), 12);
    assert!(parts.values().all(|there| *there == len as u64));
    let longest = stream::repeat_with(|| Ok::<_, OriginError>(Bytes::from(vec![0; CHUNK_BYTES])));
    let put = it.main.put_part(&it.artifact, &it.encoding, 12, None, longest).await;
    assert!(matches!(put, Err(OriginError::TooLong { .. })), "{put:?}");
}

/// What a [`Faulty`] store does with a read.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    /// Refuses it, as a store that is busy.
    Busy,
    /// Answers with the range one byte further on.
    Shifted,
    /// Breaks off in the middle of the body.
    BrokenOff,
}

/// A store in memory whose reads go wrong the first times.
#[derive(Debug)]
struct Faulty {
    inner: InMemory,
    faults: Mutex<Vec<Fault>>,
    reads: AtomicU64,
}

impl std::fmt::Debug for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("fault")
    }
}

impl std::fmt::Display for Faulty {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("faulty")
    }
}

type Answer<'a, T> = Pin<Box<dyn Future<Output = object_store::Result<T>> + Send + 'a>>;

impl ObjectStore for Faulty {
    fn put_opts<'a, 'b, 't>(
        &'a self,
        location: &'b Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Answer<'t, PutResult>
    where
        'a: 't,
        'b: 't,
    {
        self.inner.put_opts(location, payload, options)
    }

    fn put_multipart_opts<'a, 'b, 't>(
        &'a self,
        location: &'b Path,
        options: PutMultipartOptions,
    ) -> Answer<'t, Box<dyn MultipartUpload>>
    where
        'a: 't,
        'b: 't,
    {
        self.inner.put_multipart_opts(location, options)
    }

    fn get_opts<'a, 'b, 't>(
        &'a self,
        location: &'b Path,
        mut options: GetOptions,
    ) -> Answer<'t, GetResult>
    where
        'a: 't,
        'b: 't,
    {
        Box::pin(async move {
            self.reads.fetch_add(u64::from(!options.head), Ordering::Relaxed);
            let fault = if options.head { None } else { self.faults.lock().unwrap().pop() };
            if fault == Some(Fault::Busy) {
                let source = "503 slow down".into();
                return Err(object_store::Error::Generic { store: "S3", source });
            }
            if fault == Some(Fault::Shifted)
                && let Some(GetRange::Bounded(Range { start, end })) = &mut options.range
            {
                (*start, *end) = (*start + 1, *end + 1);
            }
            let mut answer = self.inner.get_opts(location, options).await?;
            if fault == Some(Fault::BrokenOff) {
                let half = Bytes::from(vec![0; 3]);
                let payload = stream::iter([Ok(half)]).boxed();
                answer.payload = object_store::GetResultPayload::Stream(payload);
            }
            Ok(answer)
        })
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    fn list_with_delimiter<'a, 'b, 't>(&'a self, prefix: Option<&'b Path>) -> Answer<'t, ListResult>
    where
        'a: 't,
        'b: 't,
    {
        self.inner.list_with_delimiter(prefix)
    }

    fn copy_opts<'a, 'b, 'c, 't>(
        &'a self,
        from: &'b Path,
        to: &'c Path,
        options: CopyOptions,
    ) -> Answer<'t, ()>
    where
        'a: 't,
        'b: 't,
        'c: 't,
    {
        self.inner.copy_opts(from, to, options)
    }
}

#[tokio::test]
async fn reads_that_go_wrong_are_tried_again_and_wrong_bytes_never_given() {
    let mut it = Fixture::new(1_000);
    let faulty = Arc::new(Faulty {
        inner: InMemory::new(),
        faults: Mutex::default(),
        reads: AtomicU64::new(0),
    });
    it.main = Bucket::over(faulty.clone());
    it.upload().await.unwrap();
    // Two pieces of the one that is there, so that a shifted range exists.
    let mut layout = it.index.layout();
    layout[0].len = 500;
    faulty.reads.store(0, Ordering::Relaxed);
    for fault in [Fault::Busy, Fault::Shifted, Fault::BrokenOff] {
        *faulty.faults.lock().unwrap() = vec![fault];
        let pieces = it.main.read_pieces(&it.artifact, &it.encoding, &layout, 0, 1).await.unwrap();
        assert_eq!(pieces, [&it.raw[..500]]);
        assert!(faulty.faults.lock().unwrap().is_empty());
    }
    assert_eq!(faulty.reads.load(Ordering::Relaxed), 6, "each once more");
    // What is not there is not tried again.
    let missing = it.main.read_pieces(&it.artifact, &EncodingId([9; 32]), &layout, 0, 1).await;
    assert!(matches!(missing, Err(OriginError::NotFound { .. })));
    assert_eq!(faulty.reads.load(Ordering::Relaxed), 7);
    // The same on the way to another bucket.
    *faulty.faults.lock().unwrap() = vec![Fault::BrokenOff, Fault::Busy, Fault::Busy];
    it.copy().await.unwrap();
    it.regional.verify(&it.artifact, &it.encoding).await.unwrap();
}
