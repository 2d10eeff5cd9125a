//! What browsers are shown instead of the cluster's certificate, which they cannot check: the one of the configuration, or one
//! that this coordinator makes for itself and keeps.

use std::{
    fs, io::Write as _, os::unix::fs::OpenOptionsExt as _, path::Path, sync::Arc, time::Duration,
};

use anyhow::{Context as _, bail};
use shoal_pki::BrowserCertificate;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{
    config::Config,
    state::{Shared, now_ms},
};

/// How often it is looked whether the certificate was renewed, when no SIGHUP says so.
const LOOK_EVERY: Duration = Duration::from_secs(60);

/// How long one that is made here counts, in days: browsers take no longer ones.
const DAYS: u32 = 395;

/// One that is made here is made anew when it counts for less than this, in seconds.
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

/// What browsers are shown, and what it was made of.
pub(crate) struct Shown {
    certificate: BrowserCertificate,
    /// The chain and its key, PEM, as they were read last.
    read: Option<(String, String)>,
    hangup: Signal,
}

impl Shown {
    /// The certificate of the configuration, or an own one.
    pub(crate) fn open(config: &Config, machine: &str) -> anyhow::Result<Self> {
        // From now on SIGHUP has it read again, and ends nothing.
        let hangup = signal(SignalKind::hangup())?;
        let (chain, key) = certificate(config, machine)?;
        let certificate =
            BrowserCertificate::new(&chain, &key).context("the certificate for browsers")?;
        Ok(Self { certificate, read: Some((chain, key)), hangup })
    }

    /// To be shown by a listener.
    pub(crate) fn certificate(&self) -> &BrowserCertificate {
        &self.certificate
    }

    /// Reads it again on SIGHUP, and every so often, until the coordinator stops: who renews it writes new files.
    pub(crate) async fn follow(mut self, shared: Arc<Shared>) {
        loop {
            let is_asked = tokio::select! {
                _ = self.hangup.recv() => true,
                () = tokio::time::sleep(LOOK_EVERY) => false,
                () = shared.stop.cancelled() => return,
            };
            let now = certificate(&shared.config, shared.machine().as_str());
            if !is_asked && now.as_ref().ok() == self.read.as_ref() {
                continue;
            }
            let result =
                now.as_ref().map_err(|error| format!("{error:#}")).and_then(|(chain, key)| {
                    self.certificate.replace(chain, key).map_err(|error| error.to_string())
                });
            match result {
                Ok(()) => tracing::info!("the certificate for browsers was read again"),
                Err(error) => {
                    tracing::error!(
                        error,
                        "the certificate for browsers is wrong: the one before stays"
                    );
                }
            }
            self.read = now.ok();
        }
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
