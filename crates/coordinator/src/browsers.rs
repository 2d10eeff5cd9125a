//! What browsers are shown instead of the cluster's certificate, which they cannot check: the one of the configuration, or one
//! that this coordinator makes for itself and keeps.

use std::{fs, io::Write as _, os::unix::fs::OpenOptionsExt as _, path::Path};

use anyhow::{Context as _, bail};

use crate::{config::Config, state::now_ms};

/// How long one that is made here counts, in days: browsers take no longer ones.
const DAYS: u32 = 395;

/// One that is made here is made anew at a start when it counts for less than this, in seconds: a coordinator is started
/// more often than that.
const RENEWED_BEFORE_S: i64 = 120 * 86_400;

/// The file of both: it is written at once.
const FILE: &str = "page.pem";

fn read(path: &Path, what: &str) -> anyhow::Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {what} {}", path.display()))
}

/// The certificate for browsers and its key, PEM.
pub(crate) fn certificate(config: &Config, machine: &str) -> anyhow::Result<(String, String)> {
    match (&config.page_certificate, &config.page_key) {
        (Some(certificate), Some(key)) => {
            Ok((read(certificate, "page_certificate")?, read(key, "page_key")?))
        }
        (None, None) => own(&config.data_dir.join(FILE), machine),
        _ => bail!("page_certificate and page_key belong together: give both, or none"),
    }
}

fn own(path: &Path, machine: &str) -> anyhow::Result<(String, String)> {
    if let Ok(both) = fs::read_to_string(path) {
        let until_s = shoal_pki::not_after_s(&both).unwrap_or_default();
        if until_s - now_ms() / 1_000 > RENEWED_BEFORE_S {
            return Ok((both.clone(), both));
        }
    }
    let hosts = [machine, "localhost", "127.0.0.1", "::1"].map(String::from);
    let (certificate, key) = shoal_pki::self_signed(&hosts, DAYS)?;
    let both = certificate + &key;
    let new = path.with_extension("new");
    let _ = fs::remove_file(&new);
    let write = || {
        let mut file = fs::File::options().create_new(true).write(true).mode(0o600).open(&new)?;
        file.write_all(both.as_bytes())?;
        file.sync_all()?;
        fs::rename(&new, path)
    };
    write().with_context(|| format!("cannot write {}", path.display()))?;
    Ok((both.clone(), both))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn one_is_made_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let first = own(&path, "c1").unwrap();
        assert_eq!(own(&path, "c1").unwrap(), first);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        // One that ends soon, or is none, gives way to a new one.
        let (certificate, key) = shoal_pki::self_signed(&["c1".into()], 100).unwrap();
        for old in [certificate + &key, "nothing".into()] {
            fs::write(&path, &old).unwrap();
            assert!(!own(&path, "c1").unwrap().0.contains(&old));
        }
    }
}
