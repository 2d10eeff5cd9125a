//! Small files, written whole or not at all.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::Path,
};

use anyhow::Context as _;
use serde::Serialize;
use shoal_pki::{Identity, Trust};

/// Replaces `path` by `bytes` so that a crash leaves the old or the new content, and what is there after the
/// return stays there.
///
/// # Errors
/// Those of the file system.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let mut temporary = name.to_os_string();
    temporary.push(format!(".{}.tmp", std::process::id()));
    let temporary = dir.join(temporary);
    let mut file = File::create(&temporary)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    let renamed = written.and_then(|()| fs::rename(&temporary, path));
    if let Err(error) = renamed {
        // The old content is untouched; nothing else can be done about the temporary file.
        let _ = fs::remove_file(&temporary);
        return Err(error);
    }
    File::open(dir)?.sync_all()
}

/// Writes `addresses.json` into a process's data directory: it is ready, and this is where it listens.
///
/// # Errors
/// Those of the file system.
pub fn announce(data_dir: &Path, addresses: &impl Serialize) -> anyhow::Result<()> {
    let path = data_dir.join("addresses.json");
    let text = serde_json::to_vec(addresses)?;
    write_atomic(&path, &text).with_context(|| format!("cannot write {}", path.display()))
}

/// Reads a process's certificate, key and trust bundle from `dir`: `identity.pem`, `identity.key`,
/// `trust.bin`, as `shoal pki issue` writes them.
///
/// # Errors
/// A line that names the file which is missing or wrong.
pub fn load_identity(dir: &Path) -> anyhow::Result<(Identity, Trust)> {
    let read = |name: &str| {
        let path = dir.join(name);
        fs::read(&path).with_context(|| {
            format!("cannot read {} (make it with: shoal pki issue)", path.display())
        })
    };
    let text = |name: &str| -> anyhow::Result<String> {
        String::from_utf8(read(name)?).with_context(|| format!("{name} is not PEM"))
    };
    let identity = Identity::from_pem(&text("identity.pem")?, &text("identity.key")?)
        .with_context(|| format!("the certificate or key in {} is not usable", dir.display()))?;
    let trust = Trust::from_signed(&read("trust.bin")?)
        .with_context(|| format!("{}/trust.bin is not usable", dir.display()))?;
    Ok((identity, trust))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_replaces_the_whole_and_leaves_no_temporary() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        write_atomic(&path, b"long first content").unwrap();
        write_atomic(&path, b"second").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(write_atomic(&dir.path().join("no/such/dir"), b"x").is_err());
    }
}
