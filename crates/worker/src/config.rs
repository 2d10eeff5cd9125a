//! A worker's configuration: one documented struct, filled from a TOML file and the flags above it.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf};

use serde::{Deserialize, Serialize};

/// The flags of `shoal worker`. Each overrides the key of the same name in the file.
#[derive(Debug, Clone, Default, clap::Args, Serialize)]
pub struct Args {
    /// TOML file with any of the keys below.
    #[arg(long, env = "SHOAL_WORKER_CONFIG")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// Directory with identity.pem, identity.key and trust.bin.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<PathBuf>,
    /// Directory for mirrors of repositories and for builds; the build user must be able to reach it.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_dir: Option<PathBuf>,
    /// A coordinator, https://HOST:PORT; several with commas, or repeat for each.
    #[arg(long = "coordinator", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub coordinators: Vec<String>,
    /// User that builds run as when the worker runs as root; empty: root [default: nobody].
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub build_user: Option<String>,
    /// How many builds at a time [default: 1].
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slots: Option<usize>,
    /// Address of the metrics page, TCP.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics_listen: Option<SocketAddr>,
}

/// Everything that can be set about a worker.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Directory with `identity.pem`, `identity.key` and `trust.bin`.
    pub identity: PathBuf,
    /// Directory for mirrors of repositories and for builds; the build user must be able to reach it.
    pub data_dir: PathBuf,
    /// The coordinators, `https://HOST:PORT`.
    pub coordinators: Vec<String>,
    /// User that builds run as when the worker runs as root; empty: root itself.
    #[serde(default = "default_build_user")]
    pub build_user: String,
    /// How many builds at a time.
    #[serde(default = "default_slots")]
    pub slots: usize,
    /// Variables that builds see beside the few that the worker sets.
    #[serde(default)]
    pub build_env: BTreeMap<String, String>,
    /// How much of a build's output is kept, in MiB.
    #[serde(default = "default_log_max_mib")]
    pub log_max_mib: u64,
    /// How long git may take to fetch a repository, in seconds.
    #[serde(default = "default_fetch_timeout_s")]
    pub fetch_timeout_s: u64,
    /// The zstd level of pieces, 1 to 9.
    #[serde(default = "default_zstd_level")]
    pub zstd_level: i32,
    /// Address of the metrics page, TCP; none: no page.
    #[serde(default)]
    pub metrics_listen: Option<SocketAddr>,
}

fn default_build_user() -> String {
    "nobody".into()
}
fn default_slots() -> usize {
    1
}
fn default_log_max_mib() -> u64 {
    64
}
fn default_fetch_timeout_s() -> u64 {
    600
}
fn default_zstd_level() -> i32 {
    1
}

impl Config {
    /// Checks what serde cannot.
    ///
    /// # Errors
    /// A line that names the key.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        anyhow::ensure!((1..=64).contains(&self.slots), "slots is 1 to 64");
        anyhow::ensure!((1..=9).contains(&self.zstd_level), "zstd_level is 1 to 9");
        Ok(())
    }
}
