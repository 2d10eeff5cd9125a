//! The neighbours of the life before: where the machines were that this one was lately connected with.
//!
//! The region processes introduce machines to each other, and are asked first. This list is for an agent that starts
//! while none of them answers: its neighbours have the goals, indexes and pieces that it misses, and it need only
//! remember where they are. A help and nothing more: an address may be of a machine that is gone, moved or takes
//! part in nothing any more, and the connection itself proves who is there.

use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::Context as _;
use shoal_proto::{
    NodeId, codec,
    peer::{PEER_MESSAGE_MAX_BYTES, PeerAddr},
};

/// How many machines are remembered: twice the neighbours that a swarm wants, for some will be gone.
const NEIGHBOURS_MAX: usize = 64;

/// The longest file, in bytes: each address was once in a message.
const FILE_MAX_BYTES: usize = NEIGHBOURS_MAX * PEER_MESSAGE_MAX_BYTES;

/// How often the file is written at most; a life that is cut off loses so much of what it met.
const SAVE_INTERVAL: Duration = Duration::from_secs(5);

/// The machines that were met, and the file that keeps them.
pub(crate) struct Neighbours {
    path: PathBuf,
    met: Mutex<Met>,
    /// Held while the file is written: two writers would share one temporary file.
    writing: Mutex<()>,
}

/// At most [`NEIGHBOURS_MAX`], each node once, the one met last first.
#[derive(Default)]
struct Met {
    list: Vec<PeerAddr>,
    /// Since the file was written.
    changed: bool,
}

impl Met {
    fn note(&mut self, addr: PeerAddr) {
        if self.list.first() == Some(&addr) {
            return;
        }
        self.list.retain(|met| met.node != addr.node);
        self.list.insert(0, addr);
        self.list.truncate(NEIGHBOURS_MAX);
        self.changed = true;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read(path: &Path) -> anyhow::Result<Vec<PeerAddr>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(codec::decode(&bytes, FILE_MAX_BYTES)?),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            tracing::info!("no neighbours are remembered");
            Ok(Vec::new())
        }
        Err(error) => Err(error.into()),
    }
}

impl Neighbours {
    /// Reads the file at `path`. One that cannot be read is nothing but a line in the log.
    pub(crate) fn open(path: PathBuf) -> Self {
        let mut met = Met::default();
        match read(&path) {
            Ok(list) => list.into_iter().take(NEIGHBOURS_MAX).rev().for_each(|addr| met.note(addr)),
            Err(error) => {
                tracing::warn!(path = %path.display(), error = format!("{error:#}"), "the neighbours' file is not valid: ignored");
            }
        }
        met.changed = false;
        Self { path, met: Mutex::new(met), writing: Mutex::default() }
    }

    /// The machines, the one met last first.
    pub(crate) fn all(&self) -> Vec<PeerAddr> {
        lock(&self.met).list.clone()
    }

    /// This machine is connected with `addr`, or was a moment ago.
    pub(crate) fn note(&self, addr: PeerAddr) {
        lock(&self.met).note(addr);
    }

    /// Forgets a machine that is not wanted as a neighbour any more.
    pub(crate) fn forget(&self, node: &NodeId) {
        let mut met = lock(&self.met);
        let before = met.list.len();
        met.list.retain(|addr| addr.node != *node);
        met.changed |= met.list.len() < before;
    }

    /// Writes the file if anything changed. A failure is logged, and the next change tries again.
    pub(crate) fn save(&self) {
        let _alone = lock(&self.writing);
        let list = {
            let mut met = lock(&self.met);
            if !std::mem::take(&mut met.changed) {
                return;
            }
            met.list.clone()
        };
        let written = codec::encode(&list, FILE_MAX_BYTES)
            .context("cannot encode them")
            .and_then(|bytes| Ok(shoal_process::write_atomic(&self.path, &bytes)?));
        if let Err(error) = written {
            tracing::warn!(path = %self.path.display(), error = format!("{error:#}"), "cannot keep the neighbours");
        }
    }

    /// Keeps the file up to date for ever.
    pub(crate) async fn keep(self: Arc<Self>) {
        loop {
            tokio::time::sleep(SAVE_INTERVAL).await;
            let neighbours = self.clone();
            // An error says that the agent is stopping: it saves once more.
            let _ = tokio::task::spawn_blocking(move || neighbours.save()).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use shoal_proto::MachineName;

    use super::*;

    fn addr(number: u8) -> PeerAddr {
        let at = |port: u16| std::net::SocketAddr::from(([10, 0, 0, number], port));
        PeerAddr {
            node: NodeId([number; 32]),
            machine: MachineName::new(format!("m{number}")).unwrap(),
            zone: "a".into(),
            data: at(7000),
            gossip: at(7001),
        }
    }

    #[test]
    fn the_next_life_knows_them_the_last_met_first() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("neighbours.bin");
        let before = Neighbours::open(path.clone());
        assert_eq!(before.all(), []);
        before.save();
        assert!(!path.exists(), "nothing changed");
        for number in [1, 2, 3, 4, 1] {
            before.note(addr(number));
        }
        before.forget(&addr(3).node);
        let moved = PeerAddr { data: "10.0.0.2:9000".parse().unwrap(), ..addr(2) };
        before.note(moved.clone());
        before.save();
        let after = Neighbours::open(path.clone());
        assert_eq!(after.all(), [moved, addr(1), addr(4)]);
        fs::remove_file(&path).unwrap();
        after.save();
        assert!(!path.exists(), "it was as in the file");
    }

    #[test]
    fn the_list_and_its_file_are_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("neighbours.bin");
        let neighbours = Neighbours::open(path.clone());
        // Longer than a message lets any zone be.
        let zone = "z".repeat(PEER_MESSAGE_MAX_BYTES - 128);
        for number in 0..=u8::MAX {
            neighbours.note(PeerAddr { zone: zone.clone(), ..addr(number) });
        }
        neighbours.save();
        let kept: Vec<u8> =
            Neighbours::open(path.clone()).all().iter().map(|addr| addr.node.0[0]).collect();
        assert_eq!(kept, (u8::MAX - 63..=u8::MAX).rev().collect::<Vec<_>>());
        // A file of another hand that names more, and one of them twice.
        let many: Vec<_> = (0..100).map(|number| addr(number / 2)).collect();
        fs::write(&path, codec::encode(&many, FILE_MAX_BYTES).unwrap()).unwrap();
        assert_eq!(Neighbours::open(path).all(), (0..32).map(addr).collect::<Vec<_>>());
    }

    #[test]
    fn a_file_that_is_not_valid_is_ignored_and_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("neighbours.bin");
        let good = codec::encode(&vec![addr(1)], FILE_MAX_BYTES).unwrap();
        let long = codec::encode(&vec![0u8; FILE_MAX_BYTES], usize::MAX).unwrap();
        for bad in [&[][..], b"rotten", &good[..good.len() - 1], &long] {
            fs::write(&path, bad).unwrap();
            let neighbours = Neighbours::open(path.clone());
            assert_eq!(neighbours.all(), []);
            neighbours.note(addr(2));
            neighbours.save();
            assert_eq!(Neighbours::open(path.clone()).all(), [addr(2)]);
        }
    }
}
