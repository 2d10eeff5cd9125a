//! What a restart makes of what an earlier process left, whole or damaged.
#![allow(clippy::unwrap_used)]

mod common;

use std::{
    env, fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
};

use common::{PIECE, Place, content, damage, held, index_of, put};
use proptest::prelude::*;
use shoal_pieces::verify_piece;
use shoal_proto::{PieceIndex, manifest::EncodingIndex};
use shoal_store::Artifact;

/// Every piece held has its bytes.
fn sound(artifact: &Artifact) {
    let mut raw = Vec::new();
    for piece in held(artifact) {
        assert!(artifact.read_raw(PieceIndex(piece), &mut raw).unwrap());
        verify_piece(artifact.manifest(), PieceIndex(piece), &raw).unwrap();
    }
}

fn ledger(place: &Place) -> std::path::PathBuf {
    place.root().join("ledger")
}

/// Overwrites every file of the ledger with noise of the same length.
fn ruin(dir: &Path) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            let mut noise = vec![0; fs::metadata(&path).unwrap().len() as usize];
            blake3::Hasher::new().finalize_xof().fill(&mut noise);
            fs::write(&path, noise).unwrap();
        }
    }
}

/// A place with an artifact of eight pieces, of which some are synced and some only written.
fn begun(synced: &[u32], written: &[u32]) -> (Place, EncodingIndex, Vec<u8>) {
    let place = Place::new();
    let bytes = content(7 * PIECE + 1000, 3);
    let index = index_of(&bytes);
    let store = place.open();
    let artifact = store.open_artifact(&index).unwrap();
    synced.iter().for_each(|&piece| put(&artifact, &bytes, piece));
    artifact.sync().unwrap();
    written.iter().for_each(|&piece| put(&artifact, &bytes, piece));
    drop((artifact, store));
    (place, index, bytes)
}

fn held_again(place: &Place, index: &EncodingIndex) -> Vec<u32> {
    let store = place.open();
    let artifact = store.open_artifact(index).unwrap();
    sound(&artifact);
    held(&artifact)
}

#[test]
fn what_was_written_is_held_after_a_restart() {
    let (place, index, _) = begun(&[1, 7], &[4]);
    let store = place.open();
    assert_eq!(held(&store.get(&index.manifest.artifact).unwrap()), [1, 4, 7]);
}

#[test]
fn a_lost_ledger_is_made_again_from_the_file() {
    let (place, index, _) = begun(&[1, 7], &[4]);
    fs::remove_dir_all(ledger(&place)).unwrap();
    assert_eq!(held_again(&place, &index), [1, 4, 7]);
    // It names them again: what is known to be synced is not hashed, which shows by damage.
    damage(&place.file(&index, "partial"), PIECE as u64 + 1);
    let store = place.open();
    assert_eq!(held(&store.open_artifact(&index).unwrap()), [1, 4, 7]);
}

#[test]
fn a_ruined_ledger_is_moved_aside_and_made_again() {
    let (place, index, _) = begun(&[1, 7], &[4]);
    ruin(&ledger(&place));
    assert_eq!(held_again(&place, &index), [1, 4, 7]);
    assert!(place.root().join("ledger.damaged").exists());
    // A second time, and with a file where the directory was.
    fs::remove_dir_all(ledger(&place)).unwrap();
    fs::write(ledger(&place), "not a directory").unwrap();
    assert_eq!(held_again(&place, &index), [1, 4, 7]);
    assert!(ledger(&place).is_dir());
}

#[test]
fn damage_to_what_is_not_known_to_be_synced_is_noticed() {
    let (place, index, bytes) = begun(&[1], &[4, 5]);
    damage(&place.file(&index, "partial"), 4 * PIECE as u64 + 99);
    let store = place.open();
    let artifact = store.open_artifact(&index).unwrap();
    assert_eq!(held(&artifact), [1, 5]);
    sound(&artifact);
    (0..8).for_each(|piece| put(&artifact, &bytes, piece));
    assert_eq!(fs::read(artifact.finish(0o644).unwrap()).unwrap(), bytes);
}

#[test]
fn a_truncated_file_is_hashed_again_whatever_the_ledger_says() {
    let (place, index, _) = begun(&[0, 3, 7], &[1]);
    let partial = place.file(&index, "partial");
    let file = fs::OpenOptions::new().write(true).open(&partial).unwrap();
    file.set_len(3 * PIECE as u64 + 7).unwrap();
    drop(file);
    assert_eq!(held_again(&place, &index), [0, 1]);
    assert_eq!(fs::metadata(&partial).unwrap().len(), index.manifest.size_bytes);
}

#[test]
fn a_file_that_is_not_the_one_in_the_ledger_is_hashed_again() {
    let (place, index, _) = begun(&[0, 3], &[]);
    let partial = place.file(&index, "partial");
    let copy = partial.with_extension("copy");
    fs::copy(&partial, &copy).unwrap();
    damage(&copy, 5);
    fs::rename(&copy, &partial).unwrap();
    assert_eq!(held_again(&place, &index), [3]);
    fs::remove_file(&partial).unwrap();
    let store = place.open();
    assert!(store.get(&index.manifest.artifact).is_none(), "there is nothing to open");
    drop(store);
    assert_eq!(held_again(&place, &index), Vec::<u32>::new());
}

#[test]
fn damage_to_a_finished_file_is_noticed_and_repaired() {
    let change: [fn(&Path); 3] = [
        |path| damage(path, 2 * PIECE as u64),
        |path| fs::OpenOptions::new().append(true).open(path).unwrap().set_len(9).unwrap(),
        |path| fs::OpenOptions::new().append(true).open(path).unwrap().set_len(9 << 20).unwrap(),
    ];
    let left: [&[u32]; 3] = [&[0, 1, 3, 4, 5, 6, 7], &[], &[0, 1, 2, 3, 4, 5, 6, 7]];
    for (change, left) in change.iter().zip(left) {
        let (place, index, bytes) = begun(&[0, 1, 2, 3, 4, 5, 6, 7], &[]);
        let store = place.open();
        let data = store.open_artifact(&index).unwrap().finish(0o755).unwrap();
        drop(store);
        assert!(place.open().get(&index.manifest.artifact).unwrap().is_complete());
        change(&data);
        let store = place.open();
        let artifact = store.open_artifact(&index).unwrap();
        assert!(!artifact.is_complete());
        assert_eq!(held(&artifact), left);
        sound(&artifact);
        (0..8).for_each(|piece| put(&artifact, &bytes, piece));
        assert_eq!(fs::read(artifact.finish(0o755).unwrap()).unwrap(), bytes);
    }
}

#[test]
fn a_finished_file_is_hashed_when_the_ledger_is_lost() {
    let place = Place::new();
    // With a run of zeros that a copy has made a hole of.
    let mut bytes = content(8 * PIECE, 3);
    bytes[2 * PIECE..4 * PIECE].fill(0);
    let index = index_of(&bytes);
    let store = place.open();
    let artifact = store.open_artifact(&index).unwrap();
    (0..8).for_each(|piece| put(&artifact, &bytes, piece));
    let data = artifact.finish(0o644).unwrap();
    drop((artifact, store));
    fs::remove_dir_all(ledger(&place)).unwrap();
    let sparse = data.with_extension("sparse");
    let file = fs::File::create(&sparse).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    for piece in [0, 1, 4, 5, 6, 7] {
        let at = piece * PIECE;
        std::os::unix::fs::FileExt::write_all_at(&file, &bytes[at..at + PIECE], at as u64).unwrap();
    }
    fs::rename(&sparse, &data).unwrap();
    assert!(place.open().get(&index.manifest.artifact).unwrap().is_complete());
}

#[test]
fn a_damaged_index_is_not_believed_and_is_repaired() {
    let (place, index, _) = begun(&[0, 3], &[5]);
    damage(&place.file(&index, "index"), 60);
    let store = place.open();
    assert!(store.get(&index.manifest.artifact).is_none());
    assert_eq!(held(&store.open_artifact(&index).unwrap()), [0, 3, 5]);
    drop(store);
    assert!(place.open().get(&index.manifest.artifact).is_some());
}

#[derive(Debug, Clone)]
enum Step {
    Write(u32),
    Sync,
    Restart,
    LoseLedger,
    RuinLedger,
    /// Damages a piece on the disk; the ledger is lost with it when the piece was synced.
    Damage(u32),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0..8u32).prop_map(Step::Write),
        2 => Just(Step::Sync),
        2 => Just(Step::Restart),
        1 => Just(Step::LoseLedger),
        1 => Just(Step::RuinLedger),
        2 => (0..8u32).prop_map(Step::Damage),
    ];
    prop::collection::vec(step, 1..24)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn after_any_history_what_is_held_is_sound_and_nothing_else_is_lost(steps in steps()) {
        let place = Place::new();
        let bytes = content(7 * PIECE + 1000, 3);
        let index = index_of(&bytes);
        let mut expected = std::collections::BTreeSet::new();
        for (number, step) in steps.into_iter().enumerate() {
            // Each step is a process of its own, in what the one before left.
            let store = place.open();
            let artifact = store.open_artifact(&index).unwrap();
            match step {
                Step::Write(piece) => {
                    put(&artifact, &bytes, piece);
                    expected.insert(piece);
                }
                Step::Sync => artifact.sync().unwrap(),
                _ => {}
            }
            prop_assert_eq!(held(&artifact), expected.iter().copied().collect::<Vec<_>>());
            sound(&artifact);
            drop((artifact, store));
            match step {
                Step::LoseLedger => fs::remove_dir_all(ledger(&place)).unwrap(),
                Step::RuinLedger => ruin(&ledger(&place)),
                Step::Damage(piece) => {
                    fs::remove_dir_all(ledger(&place)).unwrap();
                    // Another byte each time: the same one flipped twice is sound again.
                    let at = index.manifest.piece_range(PieceIndex(piece)).start + number as u64;
                    damage(&place.file(&index, "partial"), at);
                    expected.remove(&piece);
                }
                _ => {}
            }
        }
    }
}

const CHILD_DIR: &str = "SHOAL_STORE_TEST_DIR";
const CHILD_PIECES: u32 = 48;

fn child_content() -> Vec<u8> {
    content(CHILD_PIECES as usize * PIECE - 11, 5)
}

/// Not a test by itself: the process that `killed_at_any_moment_nothing_wrong_is_held` kills.
#[test]
fn child_that_writes_until_it_is_killed() {
    let Some(dir) = env::var_os(CHILD_DIR) else { return };
    let config = shoal_store::StoreConfig { encoded_cache_bytes: 1 << 20, reserve_free_bytes: 0 };
    let store = shoal_store::Store::open(Path::new(&dir), config).unwrap();
    let bytes = child_content();
    let artifact = store.open_artifact(&index_of(&bytes)).unwrap();
    sound(&artifact);
    for piece in 0..CHILD_PIECES {
        put(&artifact, &bytes, piece);
        println!("wrote {piece}");
        if piece % 5 == 0 {
            artifact.sync().unwrap();
        }
    }
    artifact.finish(0o644).unwrap();
    println!("finished");
}

#[test]
fn killed_at_any_moment_nothing_wrong_is_held() {
    let place = Place::new();
    let bytes = child_content();
    let index = index_of(&bytes);
    // Each child goes on where the one before was killed, a few pieces further each time.
    for stop_after in [0, 1, 5, 6, 17, 40, CHILD_PIECES] {
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["child_that_writes_until_it_is_killed", "--exact", "--nocapture"])
            .env(CHILD_DIR, place.root())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let told = BufReader::new(child.stdout.take().unwrap())
            .lines()
            .map_while(Result::ok)
            .filter(|line| line.contains("wrote ") || line.contains("finished"))
            .take(stop_after as usize + 1)
            .count() as u32;
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(told, stop_after + 1, "the child got that far");
        let store = place.open();
        let artifact = store.get(&index.manifest.artifact).unwrap();
        sound(&artifact);
        assert!(artifact.have().count() >= told.min(CHILD_PIECES), "no write was lost");
        assert!(store.encoded_cache_bytes() <= 1 << 20);
    }
    let store = place.open();
    let artifact = store.get(&index.manifest.artifact).unwrap();
    assert!(artifact.is_complete());
    assert_eq!(fs::read(artifact.path()).unwrap(), bytes);
}
