//! Cutting a file into parts and an index.
#![allow(clippy::unwrap_used)]

mod common;

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::Mutex,
    time::UNIX_EPOCH,
};

use common::{PIECE, content};
use proptest::prelude::*;
use shoal_pieces::{Decoder, open_index, verify_piece};
use shoal_proto::{
    ArtifactId, PieceIndex,
    manifest::{PART_MAX_BYTES, PieceSize},
};
use shoal_store::{Cut, CutError, CutOptions, INDEX_NAME, cut, part_name};

fn options(threads: usize) -> CutOptions {
    CutOptions { piece_size: Some(PieceSize::MIN), threads: Some(threads), ..Default::default() }
}

/// Puts the file together again from what was cut, by the index alone.
fn rebuild(cut: &Cut, dir: &Path) -> Vec<u8> {
    let parts: Vec<Vec<u8>> = (0..cut.index.parts.len() as u32)
        .map(|number| fs::read(dir.join(part_name(number))).unwrap())
        .collect();
    for (part, bytes) in cut.index.parts.iter().zip(&parts) {
        assert_eq!(part.len, bytes.len() as u64);
        assert_eq!(part.hash, *blake3::hash(bytes).as_bytes());
    }
    assert!(!dir.join(part_name(parts.len() as u32)).exists());
    let (mut decoder, mut raw, mut whole) = (Decoder::new(), Vec::new(), Vec::new());
    for (at, (place, piece)) in cut.index.layout().iter().zip(&cut.index.pieces).enumerate() {
        let index = PieceIndex(at as u32);
        let from = place.offset as usize;
        let stored = &parts[place.part as usize][from..from + place.len as usize];
        let len = cut.index.manifest.piece_len(index);
        decoder.decode(piece.codec, stored, len, &mut raw).unwrap();
        verify_piece(&cut.index.manifest, index, &raw).unwrap();
        whole.extend_from_slice(&raw);
    }
    whole
}

fn check(bytes: &[u8], options: &CutOptions) -> Cut {
    let dir = tempfile::tempdir().unwrap();
    let (path, out) = (dir.path().join("file"), dir.path().join("out"));
    fs::write(&path, bytes).unwrap();
    let told = Mutex::new(vec![0]);
    let cut = cut(&path, &out, options, |done| told.lock().unwrap().push(done)).unwrap();
    assert_eq!(cut.index.manifest.artifact.0, *blake3::hash(bytes).as_bytes());
    let index = fs::read(out.join(INDEX_NAME)).unwrap();
    assert_eq!(index, cut.index_bytes);
    assert_eq!(open_index(&index, &cut.index.manifest.artifact, &cut.encoding).unwrap(), cut.index);
    assert_eq!(rebuild(&cut, &out), bytes);
    let told = told.into_inner().unwrap();
    assert!(told.is_sorted());
    assert_eq!(*told.last().unwrap(), bytes.len() as u64);
    cut
}

#[test]
fn every_boundary_is_cut_and_rebuilt() {
    for len in [0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 7 * PIECE + 1023] {
        check(&content(len, len as u64), &options(3));
    }
    let empty = check(&[], &options(3));
    assert_eq!(empty.index.manifest.artifact, ArtifactId::EMPTY);
    assert!(empty.index.parts.is_empty() && empty.index.pieces.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    #[test]
    fn any_file_is_cut_the_same_by_any_number_of_threads(
        pieces in 0..40usize, last in 0..PIECE, seed: u64, threads in 1..9usize
    ) {
        let bytes = content(pieces * PIECE + last, seed);
        let one = check(&bytes, &options(1));
        let many = check(&bytes, &options(threads));
        prop_assert_eq!(one.encoding, many.encoding);
    }
}

#[test]
fn parts_are_filled_to_their_limit() {
    // Nothing compresses, so two parts of 64 MiB less what a piece does not fit, and a rest.
    let mut bytes = vec![0; (PART_MAX_BYTES + (PART_MAX_BYTES / 2)) as usize + 3];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    let cut = check(&bytes, &CutOptions { piece_size: None, ..options(4) });
    assert_eq!(cut.index.parts.len(), 2);
    assert_eq!(cut.index.parts[0].len, PART_MAX_BYTES);
    assert_eq!(cut.index.encoded_bytes(), bytes.len() as u64);
    let coarse = CutOptions { piece_size: Some(PieceSize::MAX), ..options(4) };
    assert_eq!(check(&bytes, &coarse).index.parts.len(), 2);
}

#[test]
fn an_earlier_cut_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let (path, out) = (dir.path().join("file"), dir.path().join("out"));
    fs::create_dir(&out).unwrap();
    for stale in [part_name(0), part_name(7), INDEX_NAME.to_owned(), "kept".to_owned()] {
        fs::write(out.join(stale), "stale").unwrap();
    }
    let bytes = content(3 * PIECE, 1);
    fs::write(&path, &bytes).unwrap();
    let cut = cut(&path, &out, &options(2), |_| {}).unwrap();
    assert_eq!(rebuild(&cut, &out), bytes);
    assert!(!out.join(part_name(7)).exists() && out.join("kept").exists());
}

#[test]
fn what_cannot_be_cut_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let cut_at = |path: &Path| cut(path, &out, &options(2), |_| {}).unwrap_err();
    assert!(matches!(cut_at(dir.path()), CutError::NotAFile(_)));
    assert!(matches!(cut_at(&dir.path().join("none")), CutError::Io { .. }));
    // 65,537 pieces of 256 KiB, in a file that takes no room.
    let large = dir.path().join("large");
    fs::File::create(&large).unwrap().set_len(65_537 * PIECE as u64).unwrap();
    assert!(matches!(cut_at(&large), CutError::TooManyPieces { pieces: 65_537 }));
    // A directory where a part should be.
    let small = dir.path().join("small");
    fs::write(&small, content(9 * PIECE, 0)).unwrap();
    let blocked = cut(&small, &small.join("out"), &options(2), |_| {});
    assert!(matches!(blocked, Err(CutError::Io { .. })));
}

#[test]
fn a_file_that_changes_meanwhile_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let (path, out) = (dir.path().join("file"), dir.path().join("out"));
    let bytes = content(8 * PIECE, 2);
    let changed = |change: &(dyn Fn() + Sync)| {
        fs::write(&path, &bytes).unwrap();
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_modified(UNIX_EPOCH).unwrap();
        let cut = cut(&path, &out, &options(1), |done| {
            if done == PIECE as u64 {
                change();
            }
        });
        assert!(matches!(cut, Err(CutError::Changed(_))), "{cut:?}");
        assert!(!out.join(INDEX_NAME).exists());
    };
    changed(&|| fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(9).unwrap());
    changed(&|| fs::write(&path, content(9 * PIECE, 3)).unwrap());
    // Of the same length, in what was read already.
    changed(&|| common::damage(&path, 0));
}

#[test]
fn a_panic_in_the_callback_reaches_the_caller() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    fs::write(&path, content(40 * PIECE, 2)).unwrap();
    let cut = catch_unwind(AssertUnwindSafe(|| {
        cut(&path, &dir.path().join("out"), &options(4), |_| panic!("in the callback"))
    }));
    assert!(cut.is_err());
}
