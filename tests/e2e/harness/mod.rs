//! A whole Shoal on loopback: real processes of the real binary, each with its own directory, on free ports.
//!
//! However a test ends, nothing of it stays: a [`Cluster`] that is dropped ends all that it started, and when the test itself
//! is killed, the kernel ends its processes and a [`Cleaner`](cleaner::Cleaner) the rest.

mod apps;
mod browser;
mod cleaner;
mod cluster;
mod keys;
mod network;
mod operate;
mod process;
mod receiver;
mod relay;

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use shoal_client::Client;
use shoal_pki::{Identity, Trust};

pub use self::{
    apps::{Repo, plain_app, script_app},
    browser::Browser,
    cluster::{Cluster, Remote, Shape, region_name},
    keys::Keys,
    network::{ip, own_network},
    process::Process,
    receiver::{Received, Receiver},
    relay::Relay,
};

/// How long anything that a test waits for may take on a slow, busy machine.
pub const PATIENCE: Duration = Duration::from_secs(90);

pub const SHOAL: &str = env!("CARGO_BIN_EXE_shoal");

/// Looks at a condition until it holds; the failure says what was waited for and what was seen last.
pub async fn wait_for<T, S: std::fmt::Debug>(
    what: &str,
    mut look: impl AsyncFnMut() -> Result<T, S>,
) -> T {
    let start = Instant::now();
    loop {
        match look().await {
            Ok(found) => return found,
            Err(seen) if start.elapsed() > PATIENCE => {
                panic!("waited {PATIENCE:?} for {what}; last seen: {seen:?}")
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(40)).await,
        }
    }
}

/// Every file below `dir` that `wanted` accepts.
pub fn walk(dir: &Path, wanted: &dyn Fn(&Path) -> bool) -> Vec<PathBuf> {
    let mut found = vec![];
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => found.extend(walk(&path, wanted)),
            Ok(kind) if kind.is_file() && wanted(&path) => found.push(path),
            _ => {}
        }
    }
    found
}

pub fn client(identity: &Path, api: SocketAddr) -> Client {
    client_of(identity, &[format!("https://{api}")])
}

pub fn client_of(identity: &Path, coordinators: &[String]) -> Client {
    let read = |name: &str| fs::read_to_string(identity.join(name)).unwrap();
    let id = Identity::from_pem(&read("identity.pem"), &read("identity.key")).unwrap();
    let trust = Trust::from_signed(&fs::read(identity.join("trust.bin")).unwrap()).unwrap();
    Client::new(coordinators, &id, &trust).unwrap()
}
