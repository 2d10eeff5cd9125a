//! A region process's configuration: one documented struct, filled from a TOML file and the flags above it.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use serde::{Deserialize, Serialize};

/// The flags of `shoal region`. Each overrides the key of the same name in the file.
#[derive(Debug, Clone, Default, clap::Args, Serialize)]
pub struct Args {
    /// TOML file with any of the keys below.
    #[arg(long, env = "SHOAL_REGION_CONFIG")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// Directory with identity.pem, identity.key and trust.bin.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<PathBuf>,
    /// Directory for the goals.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_dir: Option<PathBuf>,
    /// A coordinator, https://HOST:PORT; several with commas, or repeat for each.
    #[arg(long = "coordinator", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub coordinators: Vec<String>,
    /// Goal store of the world, that the coordinators write: etcd://HOST:PORT,... or etcds://...?ca=FILE.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub goals: Option<String>,
    /// Goal store of this region, that its processes write and follow.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region_goals: Option<String>,
    /// Address of the data plane, UDP [default: 0.0.0.0:7420].
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
    /// Address of the gossip plane, UDP [default: 0.0.0.0:7421].
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gossip_listen: Option<SocketAddr>,
    /// IP address that others reach this process at; needed when listening on all addresses.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advertise: Option<IpAddr>,
    /// Gossip address of another region process of this region, HOST:PORT; repeat for each.
    #[arg(long = "peer")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub peers: Vec<String>,
    /// The region's bucket: a path, file://, s3:// or gs:// URL.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bucket: Option<String>,
    /// Address of the metrics page, TCP.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics_listen: Option<SocketAddr>,
    /// How often machines shall ask for their goals, in seconds [default: 30].
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub poll_s: Option<f64>,
}

/// Everything that can be set about a region process.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Directory with `identity.pem`, `identity.key` and `trust.bin`. The certificate names the region.
    pub identity: PathBuf,
    /// Directory for the goals and for what is open of their rollouts.
    pub data_dir: PathBuf,
    /// The coordinators, `https://HOST:PORT`.
    pub coordinators: Vec<String>,
    /// Goal store of the world, that the coordinators write, `etcd://USER:PASSWORD@HOST:PORT,HOST:PORT/PREFIX`, or
    /// `etcds://...?ca=FILE` with TLS: followed beside the coordinators. Reading is all that it needs.
    #[serde(default)]
    pub goals: Option<String>,
    /// Goal store of this region, that its processes write and follow.
    #[serde(default)]
    pub region_goals: Option<String>,
    /// Address of the data plane, UDP.
    #[serde(default = "default_listen")]
    pub listen: SocketAddr,
    /// Address of the gossip plane, UDP.
    #[serde(default = "default_gossip_listen")]
    pub gossip_listen: SocketAddr,
    /// IP address that others reach this process at; the listening one when not given.
    #[serde(default)]
    pub advertise: Option<IpAddr>,
    /// Gossip addresses of the other region processes of this region, `HOST:PORT`.
    #[serde(default)]
    pub peers: Vec<String>,
    /// The region's bucket: a path, or a `file://`, `s3://` or `gs://` URL. Only indexes are read.
    pub bucket: String,
    /// Address of the metrics page, TCP; none: no page.
    #[serde(default)]
    pub metrics_listen: Option<SocketAddr>,
    /// How often machines shall ask for their goals, in seconds; they spread it by half.
    #[serde(default = "default_poll_s")]
    pub poll_s: f64,
    /// How long machines must have been coming, in seconds, before waves are reckoned from those that are
    /// known: a process that has just started knows only the first of them. Longer than 1.5 times `poll_s`.
    #[serde(default = "default_wave_settle_s")]
    pub wave_settle_s: f64,
    /// How many machines may be connected.
    #[serde(default = "default_max_connections")]
    pub max_connections: usize,
}

fn default_listen() -> SocketAddr {
    SocketAddr::from(([0, 0, 0, 0], 7420))
}
fn default_gossip_listen() -> SocketAddr {
    SocketAddr::from(([0, 0, 0, 0], 7421))
}
fn default_poll_s() -> f64 {
    30.0
}
fn default_wave_settle_s() -> f64 {
    60.0
}
fn default_max_connections() -> usize {
    100_000
}

impl Config {
    /// Checks what serde cannot.
    ///
    /// # Errors
    /// A line that names the key.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.goals.is_none() || self.goals != self.region_goals,
            "goals and region_goals are the same: leave region_goals out, or name the region's own etcd or prefix"
        );
        anyhow::ensure!((0.05..=3_600.0).contains(&self.poll_s), "poll_s is 0.05 to 3600 seconds");
        anyhow::ensure!(
            (0.0..=3_600.0).contains(&self.wave_settle_s),
            "wave_settle_s is 0 to 3600 seconds"
        );
        Ok(())
    }

    /// The address that others are told, given the one that was bound.
    ///
    /// # Errors
    /// When it listens on all addresses and `advertise` is not set.
    pub(crate) fn advertised(&self, bound: SocketAddr) -> anyhow::Result<SocketAddr> {
        let ip = self.advertise.unwrap_or(bound.ip());
        anyhow::ensure!(
            !ip.is_unspecified(),
            "set `advertise` to the IP address that the machines reach this process at"
        );
        Ok(SocketAddr::new(ip, bound.port()))
    }
}
