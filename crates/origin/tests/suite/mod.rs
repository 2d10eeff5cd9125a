//! What every bucket must do. Each case runs on directories and on S3.

mod place;

use std::sync::{
    Mutex,
    atomic::{AtomicU32, Ordering},
};

use bytes::Bytes;
use futures::{future, stream};
use shoal_origin::{Bucket, Check, CopyStats, Finding, OriginError, PutPart};
use shoal_proto::{ArtifactId, EncodingId};

pub(crate) use self::place::{Kind, Place, TWO_PARTS_BYTES, change};

pub(crate) async fn uploaded_copied_and_read_back(it: Place) {
    it.main.probe().await.unwrap();
    assert_eq!(it.check(&it.main).await, Check::Absent);
    let seen = Mutex::new(Vec::new());
    let tell = |bytes| seen.lock().unwrap().push(bytes);
    let stats = it.main.upload(&it.cut(), &it.index, &it.bytes, &it.encoding, tell).await.unwrap();
    assert_eq!(stats, CopyStats { bytes: it.total(), skipped_bytes: 0 });
    assert_eq!(*seen.lock().unwrap().last().unwrap(), it.total());
    assert_eq!(it.check(&it.main).await, Check::Whole);
    assert_eq!(it.copy().await.unwrap(), CopyStats { bytes: it.total(), skipped_bytes: 0 });
    it.verify(&it.regional).await.unwrap();
    let parts = it.regional.parts(&it.artifact, &it.encoding).await.unwrap();
    assert_eq!(parts.into_iter().collect::<Vec<_>>(), [(0, 64 << 20), (1, 1_000)]);
    let again = CopyStats { bytes: 0, skipped_bytes: it.total() };
    assert_eq!((it.copy().await.unwrap(), it.upload().await.unwrap()), (again, again));

    // Pieces, also across the border between the parts.
    let layout = it.index.layout();
    for (first, count) in [(0, 1), (3, 2), (0, 5), (4, 1), (2, 0)] {
        let pieces = it.regional.read_pieces(&it.artifact, &it.encoding, &layout, first, count);
        let pieces = pieces.await.unwrap();
        assert_eq!(pieces.len() as u32, count);
        for (n, piece) in (first..).zip(&pieces) {
            assert!(**piece == *it.piece(n), "piece {n}");
        }
    }
    for (first, count) in [(0, 6), (5, 1), (6, 0), (u32::MAX, u32::MAX)] {
        let error = it.regional.read_pieces(&it.artifact, &it.encoding, &layout, first, count);
        assert!(matches!(error.await, Err(OriginError::NoSuchPieces { .. })), "{first} {count}");
    }
}

pub(crate) async fn what_is_not_there_is_not_there(it: Place) {
    assert_eq!(it.main.index(&it.artifact, &it.encoding).await.unwrap(), None);
    assert!(it.main.parts(&it.artifact, &it.encoding).await.unwrap().is_empty());
    assert!(matches!(it.copy().await, Err(OriginError::NotFound { .. })));
    assert!(matches!(it.verify(&it.main).await, Err(OriginError::NotFound { .. })));
    let layout = it.index.layout();
    let gone = it.main.read_pieces(&it.artifact, &it.encoding, &layout, 0, 1).await.unwrap_err();
    assert!(matches!(gone, OriginError::NotFound { .. }), "{gone}");
    let line = gone.to_string();
    assert!(line.contains("part-00000") && line.contains("main") && line.lines().count() == 1);
}

pub(crate) async fn the_index_comes_last_and_once(it: Place) {
    let bytes = Bytes::from(it.bytes.clone());
    let early = it.main.put_index(&it.artifact, &it.encoding, bytes.clone()).await;
    assert!(matches!(&early, Err(OriginError::Incomplete { missing }) if *missing == [0, 1]));
    let other = it.main.put_index(&ArtifactId::EMPTY, &it.encoding, bytes.clone()).await;
    assert!(matches!(other, Err(OriginError::Index { .. })));
    it.upload().await.unwrap();
    let file = it.file("main", "index");
    let written = std::fs::metadata(&file).unwrap().modified().unwrap();
    it.main.put_index(&it.artifact, &it.encoding, bytes).await.unwrap();
    assert_eq!(std::fs::metadata(&file).unwrap().modified().unwrap(), written, "not again");
    change(&file, |bytes| bytes[5] ^= 1);
    assert!(matches!(it.copy().await, Err(OriginError::Index { .. })));
    it.upload().await.unwrap();
    assert_eq!(it.check(&it.main).await, Check::Whole, "a damaged index is mended");
}

pub(crate) async fn two_writers_of_a_part_are_one(it: Place) {
    for (number, len) in [(0, 64 << 20), (1, 1_000)] {
        let from = number as usize * (64 << 20);
        let put = || {
            let expect = Some(it.index.parts[number as usize]);
            let bytes = Bytes::copy_from_slice(&it.raw[from..from + len]);
            let stream = stream::iter([Ok::<_, OriginError>(bytes)]);
            it.main.put_part(&it.artifact, &it.encoding, number, expect, stream)
        };
        let (one, two) = tokio::join!(put(), put());
        let ends = [one.unwrap(), two.unwrap()];
        assert!(ends.contains(&PutPart::Written(it.index.parts[number as usize])), "{ends:?}");
        assert_eq!(put().await.unwrap(), PutPart::Present, "the third one finds it there");
    }
    let bytes = Bytes::from(it.bytes.clone());
    let index = || it.main.put_index(&it.artifact, &it.encoding, bytes.clone());
    let (one, two) = tokio::join!(index(), index());
    one.unwrap();
    two.unwrap();
    it.verify(&it.main).await.unwrap();
}

pub(crate) async fn what_is_written_stays(it: Place) {
    let put = |expect, bytes: Vec<u8>| {
        let stream = stream::iter([Ok::<_, OriginError>(Bytes::from(bytes))]);
        it.main.put_part(&it.artifact, &it.encoding, 1, expect, stream)
    };
    let part = it.index.parts[1];
    let small = it.raw[64 << 20..].to_vec();
    for wrong in [vec![0; 1_000], vec![0; 999], vec![0; 1_001], vec![0; 9 << 20], vec![]] {
        let error = put(Some(part), wrong).await.unwrap_err();
        assert!(matches!(error, OriginError::Mismatch { part: 1, .. }), "{error}");
    }
    assert!(it.main.parts(&it.artifact, &it.encoding).await.unwrap().is_empty());
    assert_eq!(put(Some(part), small.clone()).await.unwrap(), PutPart::Written(part));
    // Not even looked at.
    assert_eq!(put(Some(part), vec![7; 1_000]).await.unwrap(), PutPart::Present);
    it.upload().await.unwrap();
    let sealed = put(None, vec![7; 1_000]).await.unwrap_err();
    assert!(matches!(sealed, OriginError::Sealed { .. }), "{sealed}");
    // A part that was lost is brought again, by who does not know what it should be, too.
    std::fs::remove_file(it.file("main", "part-00001")).unwrap();
    let wrong = put(None, vec![7; 1_000]).await.unwrap_err();
    assert!(matches!(wrong, OriginError::Mismatch { part: 1, .. }), "{wrong}");
    assert_eq!(put(None, small).await.unwrap(), PutPart::Written(part));
    it.verify(&it.main).await.unwrap();
}

pub(crate) async fn an_upload_that_was_cut_off_goes_on(it: Place) {
    let cut = it.cut();
    // Given up in the middle of the long part, the short one is through.
    let chunks = AtomicU32::new(0);
    let stop = tokio::sync::Notify::new();
    let tell = |_| {
        if chunks.fetch_add(1, Ordering::Relaxed) == 6 {
            stop.notify_one();
        }
    };
    let upload = Box::pin(it.main.upload(&cut, &it.index, &it.bytes, &it.encoding, tell));
    let ended = future::select(upload, Box::pin(stop.notified())).await;
    assert!(matches!(ended, future::Either::Right(_)));
    drop(ended);
    let parts = it.main.parts(&it.artifact, &it.encoding).await.unwrap();
    assert!(!parts.contains_key(&0), "nothing is seen of half a part: {parts:?}");
    assert_eq!(it.main.index(&it.artifact, &it.encoding).await.unwrap(), None);
    // As if the process had been killed after the first part: it is not read again, it is not even there any more.
    let whole = Bytes::copy_from_slice(&it.raw[..64 << 20]);
    let stream = stream::iter([Ok::<_, OriginError>(whole)]);
    let expect = Some(it.index.parts[0]);
    it.main.put_part(&it.artifact, &it.encoding, 0, expect, stream).await.unwrap();
    let there = it.main.parts(&it.artifact, &it.encoding).await.unwrap();
    std::fs::remove_file(cut.join("part-00000")).unwrap();
    let stats = it.upload().await.unwrap();
    assert_eq!(stats.skipped_bytes, there.values().sum::<u64>());
    assert_eq!(stats.bytes + stats.skipped_bytes, it.total());
    it.verify(&it.main).await.unwrap();
}

pub(crate) async fn what_an_upload_finds_there_is_proved(it: Place) {
    // Somebody was there before, with other bytes of the right length.
    let stream = stream::iter([Ok::<_, OriginError>(Bytes::from(vec![7; 1_000]))]);
    it.main.put_part(&it.artifact, &it.encoding, 1, None, stream).await.unwrap();
    assert_eq!(it.upload().await.unwrap(), CopyStats { bytes: it.total(), skipped_bytes: 0 });
    it.verify(&it.main).await.unwrap();
    // What went bad since then is mended by whoever brings the bytes again.
    change(&it.file("main", "part-00001"), |bytes| bytes[1] ^= 1);
    let mended = CopyStats { bytes: 1_000, skipped_bytes: 64 << 20 };
    assert_eq!(it.upload().await.unwrap(), mended);
    it.verify(&it.main).await.unwrap();
}

pub(crate) async fn a_copy_that_was_cut_off_goes_on(it: Place) {
    it.upload().await.unwrap();
    let chunks = AtomicU32::new(0);
    let stop = tokio::sync::Notify::new();
    let tell = |_| {
        if chunks.fetch_add(1, Ordering::Relaxed) == 6 {
            stop.notify_one();
        }
    };
    let copy = Box::pin(it.regional.copy_from(&it.main, &it.artifact, &it.encoding, tell));
    let ended = future::select(copy, Box::pin(stop.notified())).await;
    assert!(matches!(ended, future::Either::Right(_)));
    drop(ended);
    assert_eq!(it.regional.index(&it.artifact, &it.encoding).await.unwrap(), None);
    let there = it.regional.parts(&it.artifact, &it.encoding).await.unwrap();
    assert!(!there.contains_key(&0), "{there:?}");
    let stats = it.copy().await.unwrap();
    assert_eq!(stats.skipped_bytes, there.values().sum::<u64>());
    it.verify(&it.regional).await.unwrap();
    // A region that lost a part gets that part and no other.
    std::fs::remove_file(it.file("regional", "part-00001")).unwrap();
    assert_eq!(it.check(&it.regional).await, Check::Missing { index: true, parts: vec![1] });
    assert_eq!(it.copy().await.unwrap(), CopyStats { bytes: 1_000, skipped_bytes: 64 << 20 });
}

pub(crate) async fn damage_is_found_and_not_passed_on(it: Place) {
    it.upload().await.unwrap();
    let layout = it.index.layout();
    let file = it.file("main", "part-00000");
    let flip = |bytes: &mut Vec<u8>| *bytes.last_mut().unwrap() ^= 1;
    change(&file, flip);
    let error = it.copy().await.unwrap_err();
    assert!(matches!(error, OriginError::Mismatch { part: 0, .. }), "{error}");
    assert!(matches!(it.verify(&it.main).await, Err(OriginError::Mismatch { part: 0, .. })));
    let copied = it.regional.parts(&it.artifact, &it.encoding).await.unwrap();
    assert!(!copied.contains_key(&0), "{copied:?}");
    change(&file, flip);
    // Shorter than its index says.
    change(&file, |bytes| bytes.truncate(50 << 20));
    assert!(matches!(it.copy().await, Err(OriginError::Mismatch { part: 0, .. })));
    assert_eq!(it.check(&it.main).await, Check::Missing { index: true, parts: vec![0] });
    for (first, right) in [(3, false), (2, true)] {
        let pieces = it.main.read_pieces(&it.artifact, &it.encoding, &layout, first, 1).await;
        assert_eq!(pieces.is_ok(), right, "{pieces:?}");
        if let Err(error) = pieces {
            assert!(matches!(error, OriginError::WrongRange { .. }), "{error}");
        }
    }
    // The upload mends it, whatever its length was.
    assert_eq!(it.upload().await.unwrap().bytes, 64 << 20);
    it.verify(&it.main).await.unwrap();
}

pub(crate) async fn an_artifact_of_no_bytes_is_an_index(it: Place) {
    let it = match it.kind {
        Kind::Directory => Place::directory(0),
        Kind::S3(_) => Place::s3(0),
    };
    assert_eq!(it.upload().await.unwrap(), CopyStats::default());
    assert_eq!(it.copy().await.unwrap(), CopyStats::default());
    assert_eq!(it.check(&it.regional).await, Check::Whole);
    assert_eq!(it.check(&it.main).await, Check::Whole);
    let other = it.main.check(&it.artifact, &EncodingId([7; 32])).await.unwrap();
    assert_eq!(other, Check::Absent);
}

pub(crate) async fn what_a_bucket_lost_is_found_and_mended(it: Place) {
    let inspect = |bucket: &Bucket, pieces: &[u32]| {
        let (bucket, pieces) = (bucket.clone(), pieces.to_vec());
        let (artifact, encoding) = (it.artifact, it.encoding);
        async move { bucket.inspect(&artifact, &encoding, |_| pieces).await.unwrap() }
    };
    let damaged = |reason: &str, doubted: &[u32]| Finding::Damaged {
        reason: reason.into(),
        doubted: doubted.to_vec(),
    };
    it.upload().await.unwrap();
    it.copy().await.unwrap();
    let read = it.piece(0).len() as u64 + it.piece(4).len() as u64;
    let whole = Finding::Whole { read_bytes: read };
    assert_eq!(inspect(&it.regional, &[0, 4]).await, whole);
    let file = |name: &str| it.file("regional", name);
    // Gone, too short, and of other bytes in a piece that is read, or in one that is not.
    std::fs::remove_file(file("part-00001")).unwrap();
    assert_eq!(inspect(&it.regional, &[0, 4]).await, damaged("lost part-00001", &[]));
    assert_eq!(it.copy().await.unwrap().bytes, 1_000);
    // Gone since the listing.
    let since = it.regional.inspect(&it.artifact, &it.encoding, |_| {
        std::fs::remove_file(file("part-00001")).unwrap();
        vec![4]
    });
    assert_eq!(since.await.unwrap(), damaged("lost part-00001", &[]));
    assert_eq!(it.copy().await.unwrap().bytes, 1_000);
    change(&file("part-00000"), |bytes| bytes.truncate(1 << 20));
    assert_eq!(inspect(&it.regional, &[]).await, damaged("lost part-00000", &[]));
    assert_eq!(it.copy().await.unwrap().bytes, 64 << 20);
    change(&file("part-00000"), |bytes| bytes[1] ^= 1);
    assert_eq!(inspect(&it.regional, &[1]).await, Finding::Whole { read_bytes: 16 << 20 });
    let wrong = damaged("has wrong bytes in part-00000", &[0]);
    assert_eq!(inspect(&it.regional, &[1, 0]).await, wrong);
    // Of the right length, it is written again only because it is doubted.
    assert_eq!(it.copy().await.unwrap().bytes, 0);
    let (main, regional) = (it.main.clone(), it.regional.clone());
    let stats =
        regional.mend_from(&[&main], &it.artifact, &it.encoding, &[0], |_| {}).await.unwrap();
    assert_eq!(stats, CopyStats { bytes: 64 << 20, skipped_bytes: 1_000 });
    it.verify(&regional).await.unwrap();
    // The index.
    change(&file("index"), |bytes| bytes[9] ^= 1);
    assert_eq!(inspect(&regional, &[]).await, damaged("has a damaged index", &[]));
    it.copy().await.unwrap();
    std::fs::remove_file(file("index")).unwrap();
    assert_eq!(inspect(&regional, &[]).await, damaged("lost its index", &[]));
    it.copy().await.unwrap();
    assert_eq!(inspect(&regional, &[0, 4]).await, whole);
    // The main bucket has lost one part, the region another: each is mended from the other.
    std::fs::remove_file(it.file("main", "part-00000")).unwrap();
    std::fs::remove_file(it.file("main", "index")).unwrap();
    std::fs::remove_file(file("part-00001")).unwrap();
    let lost = main.mend_from(&[&regional], &it.artifact, &it.encoding, &[], |_| {}).await.unwrap();
    assert_eq!(lost.bytes, 64 << 20);
    let both = regional.mend_from(&[&main], &it.artifact, &it.encoding, &[], |_| {}).await.unwrap();
    assert_eq!(both.bytes, 1_000);
    // A part that one source has wrong comes from the next one.
    change(&it.file("main", "part-00000"), |bytes| bytes[1] ^= 1);
    let third = Bucket::open(it.dir.path().join("third").to_str().unwrap()).unwrap();
    assert!(third.copy_from(&main, &it.artifact, &it.encoding, |_| {}).await.is_err());
    third.mend_from(&[&main, &regional], &it.artifact, &it.encoding, &[], |_| {}).await.unwrap();
    it.verify(&third).await.unwrap();
}

pub(crate) async fn what_is_removed_is_gone_and_comes_again(it: Place) {
    it.upload().await.unwrap();
    it.copy().await.unwrap();
    let (artifact, encoding) = (&it.artifact, &it.encoding);
    let other = EncodingId([7; 32]);
    it.regional.remove_index(artifact, &other).await.unwrap();
    assert!(it.regional.remove_parts(artifact, &other, || true).await.unwrap());
    it.regional.remove_index(artifact, encoding).await.unwrap();
    it.regional.remove_index(artifact, encoding).await.unwrap();
    let there = it.check(&it.regional).await;
    assert_eq!(there, Check::Missing { index: false, parts: vec![] }, "the parts are there");
    // Who may not go on takes nothing.
    assert!(!it.regional.remove_parts(artifact, encoding, || false).await.unwrap());
    assert_eq!(it.regional.parts(artifact, encoding).await.unwrap().len(), 2);
    // Gone is what a listing says is gone.
    assert!(!it.regional.remove_parts(artifact, encoding, || true).await.unwrap());
    assert!(it.regional.remove_parts(artifact, encoding, || true).await.unwrap());
    assert_eq!(it.check(&it.regional).await, Check::Absent);
    if let Kind::Directory = it.kind {
        assert!(!it.file("regional", "index").parent().unwrap().exists());
    }
    assert_eq!(it.check(&it.main).await, Check::Whole, "another bucket is none of its business");
    assert_eq!(it.copy().await.unwrap().bytes, it.total());
    it.verify(&it.regional).await.unwrap();
}

pub(crate) async fn copies_side_by_side_are_each_right(it: Place) {
    it.upload().await.unwrap();
    let open = |at: u32| Bucket::open(it.dir.path().join(format!("side-{at}")).to_str().unwrap());
    let targets: Vec<_> = (0..4).map(|at| open(at).unwrap()).collect();
    let before = shoal_origin::source_reads();
    let copies =
        targets.iter().map(|to| to.copy_from(&it.main, &it.artifact, &it.encoding, |_| {}));
    for stats in future::join_all(copies).await {
        assert_eq!(stats.unwrap(), CopyStats { bytes: it.total(), skipped_bytes: 0 });
    }
    for target in &targets {
        it.verify(target).await.unwrap();
    }
    // Other tests of this process may read, too: less than each for itself is what can be said.
    let read = shoal_origin::source_reads() - before;
    assert!(read >= it.total(), "{read}");
}
