//! An artifact that is cut into parts, and two buckets to keep it in: directories or S3. Each test program uses some of it.
#![allow(dead_code)]

use std::{
    fs,
    path::{Path, PathBuf},
};

use shoal_origin::{Bucket, Check, CopyStats, OriginError};
use shoal_proto::{
    ArtifactId, EncodingId, PieceIndex,
    manifest::{Codec, EncodingIndex, Manifest, PART_MAX_BYTES, Part, PieceSize, StoredPiece},
};
use shoal_test_s3::{BUCKET, Proxy, Server, WRITER, environment};
use tempfile::TempDir;

/// Four pieces of 16 MiB fill a part, which goes up in several pieces; the fifth, short one is another part, which
/// goes up at once.
pub(crate) const TWO_PARTS_BYTES: usize = (64 << 20) + 1_000;

/// What is in front of the buckets.
pub(crate) enum Kind {
    Directory,
    S3(Box<(Server, Proxy)>),
}

pub(crate) struct Place {
    pub(crate) dir: TempDir,
    pub(crate) kind: Kind,
    pub(crate) raw: Vec<u8>,
    pub(crate) index: EncodingIndex,
    pub(crate) bytes: Vec<u8>,
    pub(crate) artifact: ArtifactId,
    pub(crate) encoding: EncodingId,
    pub(crate) main: Bucket,
    pub(crate) regional: Bucket,
}

impl Place {
    pub(crate) fn directory(len: usize) -> Self {
        let dir = TempDir::new().unwrap();
        let open = |name: &str| Bucket::open(dir.path().join(name).to_str().unwrap()).unwrap();
        let (main, regional) = (open("main"), open("regional"));
        Self::new(len, dir, Kind::Directory, main, regional)
    }

    pub(crate) fn s3(len: usize) -> Self {
        let server = Server::start().unwrap();
        let proxy = Proxy::start(&server).unwrap();
        let open = |name: &str| {
            let settings = environment(&proxy.endpoint(), WRITER);
            Bucket::open_in(&format!("s3://{BUCKET}/{name}"), settings).unwrap()
        };
        let (main, regional) = (open("main"), open("regional"));
        let kind = Kind::S3(Box::new((server, proxy)));
        Self::new(len, TempDir::new().unwrap(), kind, main, regional)
    }

    fn new(len: usize, dir: TempDir, kind: Kind, main: Bucket, regional: Bucket) -> Self {
        let mut raw = vec![0; len];
        blake3::Hasher::new().finalize_xof().fill(&mut raw);
        let (piece_size, size_bytes) = (PieceSize::MAX, len as u64);
        let pieces = || raw.chunks(piece_size.bytes() as usize);
        let hash = |(n, raw)| shoal_pieces::piece_hash(size_bytes, piece_size, PieceIndex(n), raw);
        let piece_hashes: Vec<_> = (0..).zip(pieces()).map(hash).collect();
        let artifact = shoal_pieces::merge(&piece_hashes, piece_size, size_bytes);
        fs::create_dir(dir.path().join("cut")).unwrap();
        let mut parts = Vec::new();
        for (n, part) in raw.chunks(PART_MAX_BYTES as usize).enumerate() {
            fs::write(dir.path().join(format!("cut/part-{n:05}")), part).unwrap();
            parts.push(Part { len: part.len() as u64, hash: *blake3::hash(part).as_bytes() });
        }
        let stored = |raw: &[u8]| StoredPiece { codec: Codec::Raw, len: raw.len() as u32 };
        let stored = pieces().map(stored).collect();
        let manifest = Manifest { artifact, size_bytes, piece_size, piece_hashes };
        let index = EncodingIndex { manifest, pieces: stored, parts };
        let (bytes, encoding) = shoal_pieces::seal_index(&index).unwrap();
        Self { dir, kind, raw, index, bytes, artifact, encoding, main, regional }
    }

    pub(crate) fn cut(&self) -> PathBuf {
        self.dir.path().join("cut")
    }

    /// The file in which an object of one of the buckets (`main`, `regional`) lies.
    pub(crate) fn file(&self, bucket: &str, name: &str) -> PathBuf {
        let key = format!("{bucket}/artifacts/{}/{}/{name}", self.artifact, self.encoding);
        match &self.kind {
            Kind::Directory => self.dir.path().join(key),
            Kind::S3(s3) => s3.0.file(&key),
        }
    }

    pub(crate) fn server(&self) -> &Server {
        let Kind::S3(s3) = &self.kind else { panic!("no server") };
        &s3.0
    }

    pub(crate) fn proxy(&self) -> &Proxy {
        let Kind::S3(s3) = &self.kind else { panic!("no proxy") };
        &s3.1
    }

    pub(crate) async fn upload(&self) -> Result<CopyStats, OriginError> {
        self.main.upload(&self.cut(), &self.index, &self.bytes, &self.encoding, |_| {}).await
    }

    pub(crate) async fn copy(&self) -> Result<CopyStats, OriginError> {
        self.regional.copy_from(&self.main, &self.artifact, &self.encoding, |_| {}).await
    }

    pub(crate) async fn check(&self, bucket: &Bucket) -> Check {
        bucket.check(&self.artifact, &self.encoding).await.unwrap()
    }

    pub(crate) async fn verify(&self, bucket: &Bucket) -> Result<(), OriginError> {
        bucket.verify(&self.artifact, &self.encoding).await
    }

    pub(crate) fn total(&self) -> u64 {
        self.raw.len() as u64
    }

    /// The bytes of a piece.
    pub(crate) fn piece(&self, piece: u32) -> &[u8] {
        let range = self.index.manifest.piece_range(PieceIndex(piece));
        &self.raw[range.start as usize..range.end as usize]
    }
}

/// Changes a file.
pub(crate) fn change(file: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(file).unwrap();
    change(&mut bytes);
    fs::write(file, bytes).unwrap();
}
