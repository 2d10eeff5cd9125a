//! Whom builds run as.

use std::{
    fs, io,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, lchown},
    path::Path,
};

use anyhow::Context as _;

/// An unprivileged user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BuildUser {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

impl BuildUser {
    /// The user that builds run as; none when the worker is not root, or `name` is empty: then they run as the
    /// worker's own user.
    pub(crate) fn find(name: &str, data_dir: &Path) -> anyhow::Result<Option<Self>> {
        if name.is_empty() || !rustix::process::geteuid().is_root() {
            return Ok(None);
        }
        let user = nix::unistd::User::from_name(name)
            .with_context(|| format!("build_user: cannot look up '{name}'"))?
            .with_context(|| {
                format!("build_user: there is no user '{name}'; name one, or \"\" for root")
            })?;
        for dir in data_dir.ancestors() {
            let about = fs::metadata(dir)?;
            let reachable =
                about.permissions().mode() & 0o001 != 0 || about.uid() == user.uid.as_raw();
            anyhow::ensure!(
                reachable,
                "data_dir: user '{name}' cannot enter {}: chmod o+x it, choose another data_dir or build_user",
                dir.display()
            );
        }
        Ok(Some(Self { uid: user.uid.as_raw(), gid: user.gid.as_raw() }))
    }

    /// Gives `path` and all below it to the user.
    pub(crate) fn give(self, path: &Path) -> io::Result<()> {
        lchown(path, Some(self.uid), Some(self.gid))?;
        if fs::symlink_metadata(path)?.is_dir() {
            for entry in fs::read_dir(path)? {
                self.give(&entry?.path())?;
            }
        }
        Ok(())
    }
}
