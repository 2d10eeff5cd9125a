//! The unprivileged user that builds run as.

use std::{
    ffi::OsStr,
    fs, io,
    os::unix::fs::{PermissionsExt as _, lchown},
    path::Path,
    process::Stdio,
};

use anyhow::{Context as _, bail, ensure};
use tokio::process::Command;

/// A user by number, so that nothing is looked up while building.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BuildUser {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

impl BuildUser {
    /// Finds the user `name` when this process is root; none when it is not, or `name` is empty: builds then
    /// run as who the worker runs as.
    ///
    /// # Errors
    /// A line that says what to do when there is no such user, or when it is root.
    pub(crate) async fn find(name: &str) -> anyhow::Result<Option<Self>> {
        if name.is_empty() || !rustix::process::geteuid().is_root() {
            return Ok(None);
        }
        // `id` asks all sources of users that the system has; reading /etc/passwd would know one.
        let number = async |flag: &str| -> anyhow::Result<u32> {
            let output = Command::new("id")
                .args([flag, "--", name])
                .stdin(Stdio::null())
                .output()
                .await
                .context("cannot run `id` to find the build user")?;
            if !output.status.success() {
                bail!(
                    "the build user '{name}' does not exist: create it, or set build_user to another \
                     user (\"\" builds as root)"
                );
            }
            String::from_utf8_lossy(&output.stdout)
                .trim()
                .parse()
                .with_context(|| format!("`id` printed no number for the build user '{name}'"))
        };
        let user = Self { uid: number("-u").await?, gid: number("-g").await? };
        ensure!(
            user.uid != 0,
            "the build user '{name}' is root: set build_user = \"\" if you mean that"
        );
        Ok(Some(user))
    }

    /// Checks that the user can work in `dir`, which a parent directory of mode 0700 prevents.
    ///
    /// # Errors
    /// A line that says what to do.
    pub(crate) async fn check_reaches(self, dir: &Path) -> anyhow::Result<()> {
        let status = Command::new("/bin/sh")
            .args([OsStr::new("-c"), OsStr::new("cd \"$0\""), dir.as_os_str()])
            .uid(self.uid)
            .gid(self.gid)
            .current_dir("/")
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .await
            .context("cannot start a shell as the build user")?;
        ensure!(
            status.success(),
            "the build user (uid {}) cannot reach {}: let others pass through its parent directories \
             (chmod o+x), choose another build_dir, or set build_user = \"\"",
            self.uid,
            dir.display()
        );
        Ok(())
    }

    /// Gives everything under `path` to the user; links themselves, never what they point to.
    pub(crate) fn own(self, path: &Path) -> io::Result<()> {
        lchown(path, Some(self.uid), Some(self.gid))?;
        if fs::symlink_metadata(path)?.is_dir() {
            for entry in fs::read_dir(path)? {
                self.own(&entry?.path())?;
            }
        }
        Ok(())
    }
}

/// Removes a directory with all that a build left in it, read-only directories too. It is well if it is not
/// there.
pub(crate) fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            unlock(path)?;
            fs::remove_dir_all(path)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Makes directories writable, as some tools leave their caches read-only.
fn unlock(path: &Path) -> io::Result<()> {
    if fs::symlink_metadata(path)?.is_dir() {
        fs::set_permissions(path, fs::Permissions::from_mode(0o700))?;
        for entry in fs::read_dir(path)? {
            unlock(&entry?.path())?;
        }
    }
    Ok(())
}
