//! The demo's directory: where there is room for it, and how it goes.

use std::{
    fs::{DirBuilder, Permissions},
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, ensure};

use super::DemoArgs;
use crate::show;

/// The directory's mode: builds run as another user where the demo runs as root, and must reach their own
/// checkout in it. Keys have modes of their own.
const ROOT_MODE: u32 = 0o711;

/// The demo's directory.
pub(super) struct Place {
    pub(super) root: PathBuf,
    pub(super) temporary: Option<tempfile::TempDir>,
}

impl Place {
    pub(super) fn make(args: &DemoArgs) -> anyhow::Result<Self> {
        let needed = args.disk_bytes();
        if let Some(dir) = &args.data_dir {
            DirBuilder::new()
                .recursive(true)
                .mode(ROOT_MODE)
                .create(dir)
                .with_context(|| format!("cannot make {}", dir.display()))?;
            let root = dir.canonicalize()?;
            let empty = root.read_dir()?.next().is_none();
            ensure!(empty, "{} is not empty: give a new directory", root.display());
            let free = free_bytes(&root).unwrap_or(u64::MAX);
            ensure!(free >= needed, "{}", no_room(&root, needed, free));
            return Ok(Self { root, temporary: None });
        }
        // /tmp is often in memory: /var/tmp is for what is large.
        let usual = std::env::temp_dir();
        let candidates = [usual.clone(), PathBuf::from("/var/tmp")];
        let roomy =
            candidates.iter().find(|dir| free_bytes(dir).is_some_and(|free| free >= needed));
        let parent = roomy.with_context(|| {
            no_room(&usual, needed, free_bytes(&usual).unwrap_or(0))
                + "; give --data-dir on a larger disk, or a smaller --size"
        })?;
        let temporary = tempfile::Builder::new()
            .prefix("shoal-demo-")
            .permissions(Permissions::from_mode(ROOT_MODE))
            .tempdir_in(parent)
            .with_context(|| format!("cannot make a directory in {}", parent.display()))?;
        Ok(Self { root: temporary.path().canonicalize()?, temporary: Some(temporary) })
    }

    pub(super) fn leave(self) {
        if let Some(temporary) = self.temporary {
            let _ = temporary.keep();
        }
    }

    pub(super) fn remove(self) -> anyhow::Result<()> {
        match self.temporary {
            Some(temporary) => {
                temporary.close().with_context(|| format!("cannot remove {}", self.root.display()))
            }
            None => Ok(()),
        }
    }
}

fn free_bytes(dir: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(dir).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

fn no_room(dir: &Path, needed: u64, free: u64) -> String {
    let (needed, free) = (show::size(needed), show::size(free));
    format!("the demo needs about {needed}, and {} has {free} free", dir.display())
}
