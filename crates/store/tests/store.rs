//! The store as an agent uses it: begin, write, finish, serve, remove.
#![allow(clippy::unwrap_used)]

mod common;

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};

use common::{PIECE, Place, content, damage, held, index_of, index_with, put, raw};
use shoal_pieces::{Decoder, verify_piece};
use shoal_proto::{
    ArtifactId, PieceIndex,
    manifest::{Codec, PieceSize},
};
use shoal_store::{Artifact, CutOptions, Progress, Store, StoreConfig, StoreError};

fn fill(artifact: &Artifact, bytes: &[u8]) {
    (0..artifact.manifest().piece_count()).for_each(|piece| put(artifact, bytes, piece));
}

#[test]
fn an_artifact_is_begun_filled_and_finished() {
    let place = Place::new();
    let store = place.open();
    let bytes = content(5 * PIECE + 77, 1);
    let index = index_of(&bytes);
    let artifact = store.open_artifact(&index).unwrap();
    assert_eq!(artifact.path(), place.file(&index, "partial"));
    let metadata = fs::metadata(artifact.path()).unwrap();
    assert_eq!(metadata.len(), bytes.len() as u64);
    assert!(metadata.blocks() * 512 >= metadata.len(), "the space is set aside at the start");
    assert_eq!(held(&artifact), Vec::<u32>::new());
    assert_eq!(read_stored(&artifact, PieceIndex(0)).unwrap(), None);

    put(&artifact, &bytes, 5);
    put(&artifact, &bytes, 2);
    let size_bytes = bytes.len() as u64;
    let some = Progress { pieces_held: 2, pieces: 6, bytes_held: PIECE as u64 + 77, size_bytes };
    assert_eq!(artifact.progress(), some);
    let early = artifact.finish(0o755);
    assert!(matches!(early, Err(StoreError::Incomplete { held: 2, pieces: 6 })));
    assert!(!artifact.is_complete());

    fill(&artifact, &bytes);
    assert_eq!(artifact.progress().bytes_held, size_bytes);
    assert!(!artifact.is_complete());
    let path = artifact.finish(0o7755).unwrap();
    assert!(artifact.is_complete());
    assert_eq!(path, place.file(&index, "data"));
    assert_eq!(fs::read(&path).unwrap(), bytes);
    let mode = || fs::metadata(&path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(), 0o755, "no set-user-id bit is taken over");
    assert_eq!(artifact.finish(0o644).unwrap(), path);
    assert_eq!(mode(), 0o644);
    assert_eq!(artifact.finish(0).unwrap(), path);
    assert_eq!(mode(), 0o400);
    // A late duplicate changes nothing.
    put(&artifact, &bytes, 3);

    drop((artifact, store));
    let store = place.open();
    let artifact = store.get(&index.manifest.artifact).unwrap();
    assert!(artifact.is_complete());
    assert_eq!(artifact.index(), &index);
    let mut out = vec![1; 9];
    assert!(artifact.read_raw(PieceIndex(5), &mut out).unwrap());
    assert_eq!(out, raw(&index, &bytes, 5));
}

#[test]
fn artifacts_of_no_bytes_and_of_one_are_artifacts() {
    let place = Place::new();
    for bytes in [content(0, 1), content(1, 1), content(PIECE, 1), content(PIECE + 1, 1)] {
        let index = index_of(&bytes);
        let store = place.open();
        let artifact = store.open_artifact(&index).unwrap();
        fill(&artifact, &bytes);
        assert_eq!(fs::read(artifact.finish(0o600).unwrap()).unwrap(), bytes);
        drop((artifact, store));
        assert!(place.open().get(&index.manifest.artifact).unwrap().is_complete());
    }
}

#[test]
fn a_finished_program_runs_while_it_is_served() {
    let program = fs::read("/bin/true").unwrap();
    let place = Place::new();
    let store = place.open();
    let artifact = store.open_artifact(&index_of(&program)).unwrap();
    fill(&artifact, &program);
    let path = artifact.finish(0o755).unwrap();
    // With the file open for writing anywhere this is "text file busy".
    assert!(Command::new(&path).status().unwrap().success());
    assert!(read_stored(&artifact, PieceIndex(0)).unwrap().is_some());
}

#[test]
fn wrong_pieces_are_refused() {
    let place = Place::new();
    let store = place.open();
    let bytes = content(PIECE + 9, 1);
    let artifact = store.open_artifact(&index_of(&bytes)).unwrap();
    let short = artifact.write(PieceIndex(1), &bytes[..8], None);
    assert!(matches!(short, Err(StoreError::Length { got: 8, want: 9, .. })));
    let past = PieceIndex(2);
    let none = |result: Result<(), StoreError>| {
        assert!(matches!(result, Err(StoreError::NoSuchPiece { index, .. }) if index == past));
    };
    none(artifact.write(past, &[], None));
    none(read_stored(&artifact, past).map(drop));
    none(artifact.read_raw(past, &mut Vec::new()).map(drop));
    none(artifact.recheck(past).map(drop));
    assert!(!artifact.read_raw(PieceIndex(0), &mut Vec::new()).unwrap());
    let mut forged = artifact.index().clone();
    forged.manifest.artifact = ArtifactId([1; 32]);
    assert!(matches!(store.open_artifact(&forged), Err(StoreError::Index(_))));
    assert!(store.get(&ArtifactId([1; 32])).is_none());
}

#[test]
fn many_threads_write_at_once() {
    let place = Place::new();
    let store = place.open();
    let bytes = content(60 * PIECE + 5, 4);
    let artifact = store.open_artifact(&index_of(&bytes)).unwrap();
    let next = AtomicU32::new(0);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                loop {
                    // Each piece comes twice, from two threads at about the same time.
                    let turn = next.fetch_add(1, Ordering::Relaxed);
                    if turn >= 2 * 61 {
                        return;
                    }
                    put(&artifact, &bytes, turn / 2);
                    let read = read_stored(&artifact, PieceIndex(turn / 2)).unwrap();
                    assert!(read.is_some(), "what was written can be served");
                    artifact.sync().unwrap();
                }
            });
        }
    });
    assert_eq!(fs::read(artifact.finish(0o644).unwrap()).unwrap(), bytes);
}

#[test]
fn pieces_are_served_encoded_from_the_bounded_cache() {
    let mut place = Place::new();
    place.config.encoded_cache_bytes = 1 << 20;
    let store = place.open();
    let bytes = content(40 * PIECE, 6);
    let index = index_of(&bytes);
    let artifact = store.open_artifact(&index).unwrap();
    let mut encoded = 0;
    for piece in 0..40 {
        put(&artifact, &bytes, piece);
        assert!(store.encoded_cache_bytes() <= 1 << 20);
        // The one just written is the last to go.
        let (codec, _) = read_stored(&artifact, PieceIndex(piece)).unwrap().unwrap();
        encoded += u32::from(codec == Codec::Zstd);
    }
    assert_eq!(encoded, 20, "every other piece compresses");
    let decode = |artifact: &Artifact| {
        let mut encoded = 0;
        for piece in 0..40 {
            let piece = PieceIndex(piece);
            let (codec, stored) = read_stored(artifact, piece).unwrap().unwrap();
            let (mut out, len) = (Vec::new(), index.manifest.piece_len(piece));
            Decoder::new().decode(codec, &stored, len, &mut out).unwrap();
            verify_piece(&index.manifest, piece, &out).unwrap();
            encoded += u32::from(codec == Codec::Zstd);
        }
        encoded
    };
    let kept = decode(&artifact);
    assert!((1..20).contains(&kept), "{kept} of 20 fit");
    let on_disk = || {
        let dir = place.root().join("cache").join(index.manifest.artifact.to_string());
        fs::read_dir(dir).map_or(0, |files| files.count()) as u32
    };
    assert_eq!(on_disk(), kept);

    // A later process uses what is left, proves it first, and holds it to its own bound.
    drop((artifact, store));
    let dir = place.root().join("cache").join(index.manifest.artifact.to_string());
    let mut files = fs::read_dir(&dir).unwrap();
    damage(&files.next().unwrap().unwrap().path(), 40_000);
    fs::write(files.next().unwrap().unwrap().path(), "torn").unwrap();
    fs::write(dir.join("new-3"), "left by a crash").unwrap();
    fs::create_dir(place.root().join("cache/other")).unwrap();
    let store = place.open();
    let artifact = store.get(&index.manifest.artifact).unwrap();
    assert_eq!(decode(&artifact), kept - 2);
    assert_eq!(on_disk(), kept - 2);
    assert!(!place.root().join("cache/other").exists());
    drop((artifact, store));
    place.config.encoded_cache_bytes = 0;
    let store = place.open();
    assert_eq!(store.encoded_cache_bytes(), 0);
    assert_eq!(decode(&store.get(&index.manifest.artifact).unwrap()), 0);
}

#[test]
fn in_memory_a_file_takes_room_only_for_what_is_written() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let config = StoreConfig { reserve_free_bytes: 0, ..StoreConfig::default() };
    let store = Store::open(dir.path(), config).unwrap();
    let bytes = content(20 * PIECE, 1);
    let artifact = store.open_artifact(&index_of(&bytes)).unwrap();
    let room = || fs::metadata(artifact.path()).unwrap().blocks() * 512 / PIECE as u64;
    assert_eq!(room(), 0, "nothing is waited for");
    put(&artifact, &bytes, 19);
    assert_eq!(room(), 1);
    let mut writer = artifact.begin(PieceIndex(18)).unwrap().unwrap();
    writer.write(raw(artifact.index(), &bytes, 18)).unwrap();
    assert!(writer.end().unwrap());
    assert_eq!(room(), 2);
}

#[test]
fn a_full_disk_is_noticed_before_the_first_byte() {
    let mut place = Place::new();
    place.config.reserve_free_bytes = u64::MAX;
    let store = place.open();
    let bytes = content(PIECE, 1);
    let index = index_of(&bytes);
    let refused = store.open_artifact(&index);
    assert!(matches!(refused, Err(StoreError::NoSpace { needed, free: 0 }) if needed > 0));
    assert_eq!(store.list(), []);
    assert!(!place.file(&index, "").exists());
    let file = place.dir.path().join("file");
    fs::write(&file, &bytes).unwrap();
    let refused = store.import(&file, None, 1, |_| {});
    // Where blocks can be shared, importing takes no room.
    assert!(matches!(refused, Err(StoreError::NoSpace { .. }) | Ok(_)));
    drop(store);
    place.config.reserve_free_bytes = 0;
    assert!(place.open().open_artifact(&index).is_ok());
}

#[test]
fn one_process_at_a_time() {
    let place = Place::new();
    let store = place.open();
    let second = Store::open(&place.root(), StoreConfig::default());
    assert!(matches!(second, Err(StoreError::InUse(_))));
    let artifact = store.open_artifact(&index_of(&content(9, 1))).unwrap();
    drop(store);
    let second = Store::open(&place.root(), StoreConfig::default());
    assert!(matches!(second, Err(StoreError::InUse(_))), "an artifact is still open");
    drop(artifact);
    place.open();
}

#[test]
fn what_is_removed_is_gone() {
    let place = Place::new();
    let store = place.open();
    let bytes = content(4 * PIECE, 1);
    let index = index_of(&bytes);
    let id = index.manifest.artifact;
    let artifact = store.open_artifact(&index).unwrap();
    put(&artifact, &bytes, 0);
    put(&artifact, &bytes, 1);
    artifact.sync().unwrap();
    assert!(store.remove(&id).unwrap());
    assert!(!store.remove(&id).unwrap());
    assert!(store.get(&id).is_none());
    assert_eq!(store.list(), []);
    assert_eq!(store.encoded_cache_bytes(), 0);
    assert!(!place.file(&index, "").exists());
    let late = artifact.write(PieceIndex(2), raw(&index, &bytes, 2), None);
    assert!(matches!(late, Err(StoreError::Closed(closed)) if closed == id));
    assert!(matches!(artifact.finish(0o644), Err(StoreError::Incomplete { .. })));
    let (_, stored) = read_stored(&artifact, PieceIndex(1)).unwrap().unwrap();
    assert_eq!(stored, raw(&index, &bytes, 1), "a reader reads on");
    // Begun again, it has nothing of its former life, now and after a restart.
    assert_eq!(held(&store.open_artifact(&index).unwrap()), Vec::<u32>::new());
    drop((artifact, store));
    let store = place.open();
    assert_eq!(held(&store.get(&id).unwrap()), Vec::<u32>::new());
}

#[test]
fn another_encoding_is_another_handle_on_the_same_file() {
    let place = Place::new();
    let store = place.open();
    let bytes = content(4 * PIECE, 1);
    let options = CutOptions { piece_size: Some(PieceSize::MIN), ..Default::default() };
    let one = index_with(&bytes, options);
    let other = index_with(&bytes, CutOptions { level: 9, ..options });
    assert_ne!(one, other);
    let first = store.open_artifact(&one).unwrap();
    assert!(Arc::ptr_eq(&first, &store.open_artifact(&one).unwrap()));
    put(&first, &bytes, 0);
    let second = store.open_artifact(&other).unwrap();
    assert_eq!(second.index(), &other);
    put(&second, &bytes, 1);
    assert_eq!(held(&first), [0, 1]);
    assert_eq!(held(&second), [0, 1]);

    // With another piece size the pieces are others: what is there is hashed again.
    let coarse = PieceSize::from_bytes(2 * PIECE as u64);
    let third =
        store.open_artifact(&index_with(&bytes, CutOptions { piece_size: coarse, ..options }));
    let third = third.unwrap();
    assert_eq!(held(&third), [0]);
    let late = first.write(PieceIndex(2), raw(&one, &bytes, 2), None);
    assert!(matches!(late, Err(StoreError::Closed(_))));
    put(&third, &bytes, 1);
    third.finish(0o644).unwrap();
    drop((first, second, third, store));
    let store = place.open();
    let again = store.open_artifact(&one).unwrap();
    assert!(again.is_complete());
    assert_eq!(again.have().count(), 4);
}

#[test]
fn the_list_says_what_is_there_and_when_it_was_used() {
    let place = Place::new();
    let store = place.open();
    let (small, large) = (content(10, 1), content(3 * PIECE, 2));
    let done = store.open_artifact(&index_of(&small)).unwrap();
    fill(&done, &small);
    done.finish(0o644).unwrap();
    let begun = store.open_artifact(&index_of(&large)).unwrap();
    fs::create_dir(place.root().join("artifacts/not-an-id")).unwrap();
    let find = |id: &ArtifactId| {
        let list = store.list();
        assert_eq!(list.len(), 2);
        list.into_iter().find(|summary| summary.artifact == *id).unwrap()
    };
    let (done, begun) = (done.manifest().artifact, begun.manifest().artifact);
    let summary = find(&done);
    assert!(summary.complete && summary.size_bytes == 10);
    let summary = find(&begun);
    assert!(!summary.complete && summary.size_bytes == 3 * PIECE as u64);
    let before = find(&begun).last_used;
    store.open_artifact(&index_of(&large)).unwrap();
    assert!(find(&begun).last_used >= before);
    assert!(find(&begun).last_used >= find(&done).last_used);
}

#[test]
fn a_file_is_imported_whole_and_ready_to_seed() {
    let place = Place::new();
    let store = place.open();
    let path = place.dir.path().join("file");
    for len in [0, 1, PIECE, PIECE + 1, 9 * PIECE + 3] {
        let bytes = content(len, 8);
        fs::write(&path, &bytes).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o750)).unwrap();
        let done = AtomicU32::new(0);
        let artifact = store
            .import(&path, Some(PieceSize::MIN), 1, |at| done.store(at as u32, Ordering::Relaxed))
            .unwrap();
        assert_eq!(done.into_inner() as usize, len);
        assert!(artifact.is_complete() && artifact.have().is_full());
        assert_eq!(artifact.manifest().artifact.0, *blake3::hash(&bytes).as_bytes());
        assert_eq!(artifact.index(), &index_of(&bytes));
        let stored = fs::metadata(artifact.path()).unwrap();
        assert_eq!(stored.permissions().mode() & 0o777, 0o750);
        assert_ne!(stored.ino(), fs::metadata(&path).unwrap().ino(), "never a hard link");
        assert_eq!(fs::read(artifact.path()).unwrap(), bytes);
        if len > 0 {
            let (codec, _) = read_stored(&artifact, PieceIndex(0)).unwrap().unwrap();
            assert_eq!(codec == Codec::Zstd, len > 1, "encoded pieces are in the cache");
        }
        // Again, it is what it is.
        let again = store.import(&path, Some(PieceSize::MIN), 1, |_| {}).unwrap();
        assert!(Arc::ptr_eq(&artifact, &again));
    }
    assert_eq!(store.list().len(), 5);
    assert_eq!(fs::read_dir(place.root().join("staging")).unwrap().count(), 0);
    let cached = fs::read_dir(place.root().join("cache")).unwrap().count();
    assert_eq!(cached, 3, "nothing under a provisional name");
    let missing = store.import(&place.dir.path().join("none"), None, 1, |_| {});
    assert!(matches!(missing, Err(StoreError::Cut(_))));
    assert_eq!(fs::read_dir(place.root().join("staging")).unwrap().count(), 0);
    drop(store);
    let store = place.open();
    assert!(store.list().iter().all(|s| s.complete && store.get(&s.artifact).is_some()));
}

#[test]
fn an_import_completes_what_was_begun() {
    let place = Place::new();
    let store = place.open();
    let bytes = content(6 * PIECE + 1, 8);
    let path = place.dir.path().join("file");
    fs::write(&path, &bytes).unwrap();
    let begun = store.open_artifact(&index_of(&bytes)).unwrap();
    put(&begun, &bytes, 3);
    // With pieces of another size too: the bytes are the same.
    let imported = store.import(&path, Some(PieceSize::MAX), 1, |_| {}).unwrap();
    assert!(Arc::ptr_eq(&begun, &imported));
    assert!(begun.is_complete());
    assert_eq!(fs::read(begun.path()).unwrap(), bytes);
}

#[test]
fn a_piece_that_rots_is_found_by_a_recheck() {
    let place = Place::new();
    let store = place.open();
    let bytes = content(3 * PIECE, 8);
    let index = index_of(&bytes);
    let artifact = store.open_artifact(&index).unwrap();
    fill(&artifact, &bytes);
    let path = artifact.finish(0o644).unwrap();
    assert!(artifact.recheck(PieceIndex(1)).unwrap());
    damage(&path, PIECE as u64 + 5);
    assert!(artifact.recheck(PieceIndex(0)).unwrap());
    assert!(!artifact.recheck(PieceIndex(1)).unwrap());
    assert_eq!(read_stored(&artifact, PieceIndex(1)).unwrap(), None);
    assert_eq!(held(&artifact), [0, 2]);
    // The next time that it is opened, it is repaired.
    drop((artifact, store));
    let store = place.open();
    let artifact = store.get(&index.manifest.artifact).unwrap();
    assert!(!artifact.is_complete());
    assert_eq!(held(&artifact), [0, 2]);
    put(&artifact, &bytes, 1);
    assert_eq!(fs::read(artifact.finish(0o644).unwrap()).unwrap(), bytes);
}

/// A held piece in the form in which it is sent, read in parts of 100 KiB.
fn read_stored(
    artifact: &Artifact,
    piece: PieceIndex,
) -> Result<Option<(Codec, Vec<u8>)>, StoreError> {
    let Some(mut stored) = artifact.stored(piece)? else { return Ok(None) };
    let (codec, len) = (stored.codec(), stored.left());
    let mut bytes = Vec::new();
    while stored.left() > 0 {
        bytes.extend_from_slice(&stored.read(100 << 10, artifact.buffers().take())?);
    }
    assert_eq!(bytes.len(), len);
    Ok(Some((codec, bytes)))
}

/// A piece that comes in parts of 100 KiB, and how that ended.
fn pour(artifact: &Artifact, piece: u32, raw: &[u8]) -> Result<bool, StoreError> {
    let mut writer = artifact.begin(PieceIndex(piece))?.unwrap();
    for part in raw.chunks(100 << 10) {
        writer.write(part)?;
    }
    writer.end()
}

#[test]
fn a_piece_is_written_as_it_comes_and_held_when_it_has_its_hash() {
    let place = Place::new();
    let bytes = content(3 * PIECE + 77, 21);
    let index = index_of(&bytes);
    let piece = |at: u32| raw(&index, &bytes, at);
    {
        let store = place.open();
        let artifact = store.open_artifact(&index).unwrap();
        let mut bad = piece(1).to_vec();
        bad[200_000] ^= 1;
        assert!(!pour(&artifact, 1, &bad).unwrap(), "a byte is wrong");
        assert!(!pour(&artifact, 2, &piece(2)[1..]).unwrap(), "the last byte is missing");
        let long = [piece(3), b"x"].concat();
        let error = pour(&artifact, 3, &long).unwrap_err();
        assert!(matches!(error, StoreError::Length { got: 78, want: 77, .. }), "{error}");
        assert!(artifact.begin(PieceIndex(4)).is_err(), "there is no piece 4");
        assert_eq!(held(&artifact), Vec::<u32>::new());
        assert_eq!(artifact.progress().bytes_held, 0);
    }
    // What lies there since is not believed.
    let store = place.open();
    let artifact = store.open_artifact(&index).unwrap();
    assert_eq!(held(&artifact), Vec::<u32>::new());
    for at in 0..4 {
        assert!(pour(&artifact, at, piece(at)).unwrap());
        assert!(artifact.begin(PieceIndex(at)).unwrap().is_none(), "it is held");
    }
    assert_eq!(artifact.progress().bytes_held, bytes.len() as u64);
    assert_eq!(fs::read(artifact.finish(0o644).unwrap()).unwrap(), bytes);
}

#[test]
fn what_was_written_as_it_came_is_synced_when_that_is_due() {
    let place = Place::new();
    let store = place.open();
    let bytes = content(65 << 20, 23);
    let piece_size = PieceSize::from_bytes(1 << 20);
    let index = index_with(&bytes, CutOptions { piece_size, ..CutOptions::default() });
    let artifact = store.open_artifact(&index).unwrap();
    for at in 0..63 {
        assert!(pour(&artifact, at, raw(&index, &bytes, at)).unwrap());
    }
    assert!(!artifact.is_sync_due());
    artifact.sync_at_times().unwrap();
    assert!(pour(&artifact, 63, raw(&index, &bytes, 63)).unwrap());
    assert!(artifact.is_sync_due(), "64 MiB are not on the disk");
    artifact.sync_at_times().unwrap();
    assert!(!artifact.is_sync_due());
}

#[test]
fn one_at_a_time_writes_a_piece_as_it_comes_and_a_whole_one_takes_it_over() {
    let place = Place::new();
    let store = place.open();
    let bytes = content(2 * PIECE, 22);
    let index = index_of(&bytes);
    let artifact = store.open_artifact(&index).unwrap();
    let good = raw(&index, &bytes, 1);
    let bad = vec![7; PIECE];

    let mut slow = artifact.begin(PieceIndex(1)).unwrap().unwrap();
    slow.write(&bad[..1_000]).unwrap();
    assert!(artifact.begin(PieceIndex(1)).unwrap().is_none(), "somebody is at it");
    assert!(artifact.begin(PieceIndex(0)).unwrap().is_some(), "nobody is at that one");
    put(&artifact, &bytes, 1);
    assert_eq!(held(&artifact), [1]);
    // Its bytes no longer reach the file.
    slow.write(&bad[1_000..]).unwrap();
    assert!(!slow.end().unwrap());
    let mut out = Vec::new();
    assert!(artifact.read_raw(PieceIndex(1), &mut out).unwrap());
    assert_eq!(out, good);

    // Whoever gives up makes room for another; who is taken over while all was well is told that it is held.
    drop(artifact.begin(PieceIndex(0)).unwrap().unwrap());
    let mut late = artifact.begin(PieceIndex(0)).unwrap().unwrap();
    late.write(raw(&index, &bytes, 0)).unwrap();
    put(&artifact, &bytes, 0);
    assert!(late.end().unwrap());
    assert_eq!(fs::read(artifact.finish(0o644).unwrap()).unwrap(), bytes);
}
