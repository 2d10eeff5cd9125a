//! The agent's configuration: one documented struct, filled from a TOML file and the flags above it.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use serde::{Deserialize, Serialize};
use shoal_proto::goal::{Labels, check_label};

use crate::limits::{Limit, Limits, LimitsChange};

/// The flags of `shoal agent`. Each overrides the key of the same name in the file.
#[derive(Debug, Clone, Default, clap::Args, Serialize)]
pub struct Args {
    /// TOML file with any of the keys below.
    #[arg(long, env = "SHOAL_AGENT_CONFIG")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// Directory with identity.pem, identity.key and trust.bin.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<PathBuf>,
    /// Directory for pieces, goals and the apps' files.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_dir: Option<PathBuf>,
    /// Address of the data plane, UDP [default: 0.0.0.0:7410].
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
    /// Address of the gossip plane, UDP [default: 0.0.0.0:7411].
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gossip_listen: Option<SocketAddr>,
    /// IP address that others reach this machine at; needed when listening on all addresses.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advertise: Option<IpAddr>,
    /// Data address of a region process, HOST:PORT; repeat for each.
    #[arg(long = "region")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub regions: Vec<String>,
    /// Gossip address of a region process, HOST:PORT; repeat for each.
    #[arg(long = "gossip-seed")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub gossip_seeds: Vec<String>,
    /// The region's bucket: a path, file://, s3:// or gs:// URL [default: none, read by the leases' URLs].
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bucket: Option<String>,
    /// The machine's zone [default: default].
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// A label of the machine, KEY=VALUE; repeat for each.
    #[arg(long = "label", value_parser = parse_label)]
    #[serde(skip_serializing_if = "Vec::is_empty", serialize_with = "labels_as_table")]
    #[serde(rename = "labels")]
    pub label: Vec<(String, String)>,
    /// Address of the metrics page, TCP.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics_listen: Option<SocketAddr>,
    /// How often to ask the region for goals, in seconds, spread by half [default: the region says].
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub poll_s: Option<f64>,
    /// How much of the disk the compressed pieces may take, in MiB [default: 4096].
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encoded_cache_mib: Option<u64>,
    /// How much of the disk stays free, in MiB [default: 1024].
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reserve_free_mib: Option<u64>,
    /// Limit on what is sent to neighbours, such as 50MB/s, 400Mbit/s or none [default: none].
    #[arg(long, value_name = "RATE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub up_limit: Option<Limit>,
    /// Limit on what is received, from neighbours and the bucket together [default: none].
    #[arg(long, value_name = "RATE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub down_limit: Option<Limit>,
    /// Limit on what is read from the bucket [default: none].
    #[arg(long, value_name = "RATE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub origin_limit: Option<Limit>,
    /// Whether what is sent yields to the machine's other traffic [default: false].
    #[arg(long, value_name = "BOOL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scavenger: Option<bool>,
}

impl Args {
    /// The limits among the flags.
    pub(crate) fn limits(&self) -> LimitsChange {
        LimitsChange {
            up_limit: self.up_limit,
            down_limit: self.down_limit,
            origin_limit: self.origin_limit,
            scavenger: self.scavenger,
        }
    }
}

fn parse_label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write KEY=VALUE")?;
    check_label(key)?;
    check_label(value)?;
    Ok((key.into(), value.into()))
}

fn labels_as_table<S: serde::Serializer>(
    labels: &[(String, String)],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_map(labels.iter().map(|(key, value)| (key, value)))
}

/// Everything that can be set about an agent. The keys from `up_limit` to `scavenger` take effect on SIGHUP, the others with a restart.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Directory with `identity.pem`, `identity.key` and `trust.bin`. The certificate says the
    /// machine's name and region.
    pub identity: PathBuf,
    /// Directory for pieces, goals and the apps' files.
    pub data_dir: PathBuf,
    /// Address of the data plane, UDP.
    #[serde(default = "default_listen")]
    pub listen: SocketAddr,
    /// Address of the gossip plane, UDP.
    #[serde(default = "default_gossip_listen")]
    pub gossip_listen: SocketAddr,
    /// IP address that others reach this machine at; the listening one when not given.
    #[serde(default)]
    pub advertise: Option<IpAddr>,
    /// Data addresses of the region processes, `HOST:PORT`.
    #[serde(default)]
    pub regions: Vec<String>,
    /// Gossip addresses of the region processes, `HOST:PORT`.
    #[serde(default)]
    pub gossip_seeds: Vec<String>,
    /// The region's bucket: a path, or a `file://`, `s3://` or `gs://` URL. It is only read, with credentials of
    /// this machine's environment. None: the machine holds no credentials, and reads by URLs that the region
    /// processes sign with its leases (S3 and GCS); without them it gets everything from neighbours.
    #[serde(default)]
    pub bucket: Option<String>,
    /// The machine's zone: traffic stays within it where it can.
    #[serde(default = "default_zone")]
    pub zone: String,
    /// The machine's own labels, for the selectors of apps.
    #[serde(default)]
    pub labels: Labels,
    /// Address of the metrics page, TCP; none: no page.
    #[serde(default)]
    pub metrics_listen: Option<SocketAddr>,
    /// How often to ask the region for goals, in seconds, spread by half; none: as the region says.
    #[serde(default)]
    pub poll_s: Option<f64>,
    /// How much of the disk the compressed pieces may take, in MiB; evicted before anything else.
    #[serde(default = "default_encoded_cache_mib")]
    pub encoded_cache_mib: u64,
    /// How much of the disk stays free, in MiB: a fetch that would take it waits.
    #[serde(default = "default_reserve_free_mib")]
    pub reserve_free_mib: u64,
    /// How many builds that an app ran before stay on disk, so that going back needs no download.
    #[serde(default = "default_keep_builds")]
    pub keep_builds: usize,
    /// How much of the disk those builds may take, in MiB.
    #[serde(default = "default_keep_builds_mib")]
    pub keep_builds_mib: u64,
    /// How long a program has to end after SIGTERM, in seconds, before it is killed.
    #[serde(default = "default_stop_timeout_s")]
    pub stop_timeout_s: u64,
    /// How many neighbours may be connected.
    #[serde(default = "default_max_connections")]
    pub max_connections: usize,
    /// Limit on the piece bytes sent to neighbours, such as `"50MB/s"`, `"400Mbit/s"` or `"none"`.
    #[serde(default)]
    pub up_limit: Limit,
    /// Limit on the piece bytes received, from neighbours and the bucket together.
    #[serde(default)]
    pub down_limit: Limit,
    /// Limit on the piece bytes read from the bucket.
    #[serde(default)]
    pub origin_limit: Limit,
    /// Whether what is sent yields to the machine's other traffic: judged by delay, and marked DSCP LE.
    #[serde(default)]
    pub scavenger: bool,
}

/// The keys that take effect while the agent runs.
const LIVE_KEYS: [&str; 4] = ["up_limit", "down_limit", "origin_limit", "scavenger"];

fn default_listen() -> SocketAddr {
    SocketAddr::from(([0, 0, 0, 0], 7410))
}
fn default_gossip_listen() -> SocketAddr {
    SocketAddr::from(([0, 0, 0, 0], 7411))
}
fn default_zone() -> String {
    "default".into()
}
fn default_encoded_cache_mib() -> u64 {
    4_096
}
fn default_reserve_free_mib() -> u64 {
    1_024
}
fn default_keep_builds() -> usize {
    2
}
fn default_keep_builds_mib() -> u64 {
    40_960
}
fn default_stop_timeout_s() -> u64 {
    10
}
fn default_max_connections() -> usize {
    160
}

impl Config {
    /// The file with the flags over it, checked.
    ///
    /// # Errors
    /// A line that names the file and the key.
    pub(crate) fn load(args: &Args) -> anyhow::Result<Self> {
        let config: Self = shoal_process::load_config(args.config.as_deref(), args)?;
        config.check().map_err(shoal_process::WrongConfig::from)?;
        Ok(config)
    }

    /// What may be changed while the agent runs.
    pub(crate) fn limits(&self) -> Limits {
        Limits {
            up: self.up_limit,
            down: self.down_limit,
            origin: self.origin_limit,
            scavenger: self.scavenger,
        }
    }

    /// The keys of another configuration that differ and need a restart.
    pub(crate) fn keys_that_differ(&self, other: &Self) -> Vec<String> {
        let table = |config| match serde_json::to_value(config) {
            Ok(serde_json::Value::Object(table)) => table,
            _ => serde_json::Map::new(),
        };
        let (mine, others) = (table(self), table(other));
        let differs = |key: &&String| {
            !LIVE_KEYS.contains(&key.as_str()) && mine.get(*key) != others.get(*key)
        };
        others.keys().filter(differs).cloned().collect()
    }

    /// The address that others are told, given the one that was bound.
    ///
    /// # Errors
    /// When it listens on all addresses and `advertise` is not set.
    pub(crate) fn advertised(&self, bound: SocketAddr) -> anyhow::Result<SocketAddr> {
        let ip = self.advertise.unwrap_or(bound.ip());
        anyhow::ensure!(
            !ip.is_unspecified(),
            "set `advertise` to the IP address that other machines reach this one at"
        );
        Ok(SocketAddr::new(ip, bound.port()))
    }

    /// Checks what serde cannot.
    ///
    /// # Errors
    /// A line that names the key.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        check_label(&self.zone).map_err(|error| anyhow::anyhow!("zone: {error}"))?;
        for (key, value) in &self.labels {
            check_label(key)
                .and_then(|()| check_label(value))
                .map_err(|error| anyhow::anyhow!("labels: {error}"))?;
        }
        if let Some(poll_s) = self.poll_s {
            anyhow::ensure!((0.05..=3_600.0).contains(&poll_s), "poll_s is 0.05 to 3600 seconds");
        }
        Ok(())
    }
}
