//! The coordinator's configuration: one documented struct, filled from a TOML file and the flags above it.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use anyhow::ensure;
use serde::{Deserialize, Serialize};
use shoal_proto::RegionName;

use crate::config_told::{EventsConfig, WebhooksConfig};

/// The flags of `shoal coordinator`. Each overrides the key of the same name in the file.
#[derive(Debug, Clone, Default, clap::Args, Serialize)]
pub struct Args {
    /// TOML file with any of the keys below.
    #[arg(long, env = "SHOAL_COORDINATOR_CONFIG")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// Directory with identity.pem, identity.key and trust.bin.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<PathBuf>,
    /// Directory for the database (unless --database names another one) and the jobs' logs.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_dir: Option<PathBuf>,
    /// Address of the API, HTTPS [default: 127.0.0.1:7400].
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
    /// URL of the database, sqlite:///PATH or postgres://USER@HOST/DATABASE [default: a SQLite file in the data
    /// directory].
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub database: Option<String>,
    /// PEM file with the key that signs goals.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub goal_key: Option<PathBuf>,
    /// PEM file with the key of the cluster's CA, to issue and renew certificates with.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_key: Option<PathBuf>,
    /// Goal store beside the database, etcd://HOST:PORT,HOST:PORT/PREFIX or etcds://...?ca=FILE.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub goals: Option<String>,
    /// After a restore of the database from a backup, once: raise the epoch above all that regions and goal store
    /// know, so that machines follow the next goals. No goal is set until that is done.
    #[arg(long)]
    #[serde(skip)]
    pub recover: bool,
    /// The main bucket: a path, file://, s3:// or gs:// URL.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bucket: Option<String>,
    /// A region and its bucket, NAME=BUCKET; repeat for each.
    #[arg(long = "region", value_parser = parse_region)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub regions: Vec<RegionConfig>,
    /// Address of the metrics page, TCP.
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics_listen: Option<SocketAddr>,
}

fn parse_region(text: &str) -> Result<RegionConfig, String> {
    let (name, bucket) = text.split_once('=').ok_or("write NAME=BUCKET")?;
    let name = name.parse().map_err(|error: shoal_proto::ids::InvalidId| error.to_string())?;
    Ok(RegionConfig { name, bucket: bucket.into(), replication: None })
}

/// A region and its bucket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegionConfig {
    /// Its name.
    pub name: RegionName,
    /// Its bucket: a path, file://, s3:// or gs:// URL.
    pub bucket: String,
    /// Who copies into it; none: as for all regions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replication: Option<Replication>,
}

/// Who makes the copies in regions' buckets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Replication {
    /// The coordinator on duty.
    #[default]
    Copy,
    /// The store itself (its cross-region replication): the coordinator only looks until all is there, and proves it.
    Observe,
}

/// All that can be set about a coordinator. Times are in seconds, and may be fractions of one.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Directory with identity.pem, identity.key and trust.bin.
    pub identity: PathBuf,
    /// Directory for the database and the jobs' logs.
    pub data_dir: PathBuf,
    /// Address of the API, HTTPS. Port 0: any free one; `addresses.json` says which.
    #[serde(default = "listen_default")]
    pub listen: SocketAddr,
    /// URL of the database, `sqlite:///PATH` or `postgres://USER@HOST/DATABASE`, which several coordinators may share;
    /// none: a SQLite file in the data directory.
    #[serde(default)]
    pub database: Option<String>,
    /// PEM file with the key that signs goals.
    pub goal_key: PathBuf,
    /// PEM file with the key of the cluster's CA, `ca.key`: with it this coordinator issues and renews certificates. None: it
    /// does not, and says so to who asks. Each coordinator has the same.
    #[serde(default)]
    pub ca_key: Option<PathBuf>,
    /// How long the certificates count that it issues; 90 days. They are renewed after two thirds of that.
    #[serde(default = "certificate_life_default")]
    pub certificate_life_s: f64,
    /// PEM file with the certificate, and those between it and its CA, that browsers are shown: they can check none of the
    /// cluster's. None: one that the coordinator makes for itself, of which browsers warn. Read again
    /// on SIGHUP, and within a minute of a change.
    #[serde(default)]
    pub page_certificate: Option<PathBuf>,
    /// PEM file with that certificate's key.
    #[serde(default)]
    pub page_key: Option<PathBuf>,
    /// Goal store beside the database, `etcd://USER:PASSWORD@HOST:PORT,HOST:PORT/PREFIX`, or `etcds://...?ca=FILE` with
    /// TLS: what is set is written there, too, and regions may follow it. None: they follow the coordinators alone.
    #[serde(default)]
    pub goals: Option<String>,
    /// Whether the epoch is raised first: said by the flag alone, for one start.
    #[serde(skip)]
    pub recover: bool,
    /// The main bucket: a path, file://, s3:// or gs:// URL.
    pub bucket: String,
    /// The regions and their buckets.
    #[serde(default)]
    pub regions: Vec<RegionConfig>,
    /// Address of the metrics page, TCP; none: no metrics page.
    #[serde(default)]
    pub metrics_listen: Option<SocketAddr>,
    /// How often a worker sends a heartbeat.
    #[serde(default = "heartbeat_default")]
    pub heartbeat_s: f64,
    /// A job whose heartbeat stands still for this long is lost; none: three heartbeats.
    #[serde(default)]
    pub loss_window_s: Option<f64>,
    /// How often the reaper looks for lost jobs.
    #[serde(default = "reaper_interval_default")]
    pub reaper_interval_s: f64,
    /// How many lost jobs are given to other workers at each look of the reaper,
    #[serde(default = "reap_jobs_default")]
    pub reap_jobs: u32,
    /// or which share of those that run, whichever is more: a network that fails does not start all builds again.
    #[serde(default = "reap_share_default")]
    pub reap_share: f64,
    /// How often a job is started at most, where its app does not say.
    #[serde(default = "max_attempts_default")]
    pub max_attempts: u32,
    /// How long a job waits before its third attempt; doubled with each one after it, less up to half by chance. It
    /// does not wait before its second.
    #[serde(default = "backoff_default")]
    pub backoff_s: f64,
    /// How long it waits at most.
    #[serde(default = "backoff_max_default")]
    pub backoff_max_s: f64,
    /// How long a long poll waits at most.
    #[serde(default = "long_poll_default")]
    pub long_poll_s: f64,
    /// How often a long poll looks again by itself, in case that nobody wakes it.
    #[serde(default = "look_again_default")]
    pub look_again_s: f64,
    /// How often copies to be made are looked for; a finished build starts its copies at once.
    #[serde(default = "replication_interval_default")]
    pub replication_interval_s: f64,
    /// Who makes the copies, where a region does not say: `copy` (the coordinator on duty) or `observe` (the store itself).
    #[serde(default)]
    pub replication: Replication,
    /// How often a copy that the store makes itself is looked at until it is whole.
    #[serde(default = "observe_interval_default")]
    pub observe_interval_s: f64,
    /// How many copies are made at once.
    #[serde(default = "copies_in_parallel_default")]
    pub copies_in_parallel: u32,
    /// How many of them into one region: a bucket that hangs does not hold up the other regions.
    #[serde(default = "copies_per_region_default")]
    pub copies_per_region: u32,
    /// Within this time every bucket is looked at for every artifact that lives.
    #[serde(default = "inspect_round_default")]
    pub inspect_round_s: f64,
    /// Which share of each copy's pieces is read and proved then; one piece at least, and 64 at most.
    #[serde(default = "inspect_share_default")]
    pub inspect_share: f64,
    /// How many of each app's newest artifacts are kept beside those in use, where the app does not say; none: all of
    /// them are.
    #[serde(default)]
    pub keep_builds: Option<u32>,
    /// How often artifacts beyond that are deleted.
    #[serde(default = "retention_interval_default")]
    pub retention_interval_s: f64,
    /// How long after its first failure a copy is tried again; doubled with each failure, to a minute.
    #[serde(default = "copy_retry_default")]
    pub copy_retry_s: f64,
    /// How long a copy is left to a coordinator that no longer says how far it is.
    #[serde(default = "copy_owned_default")]
    pub copy_owned_s: f64,
    /// How often open rollouts are looked at.
    #[serde(default = "rollout_interval_default")]
    pub rollout_interval_s: f64,
    /// A machine that was not heard of for this long is forgotten: no rollout counts it any more.
    #[serde(default = "forget_machine_default")]
    pub forget_machine_s: f64,
    /// How long a request with an idempotency key is remembered, and its answer given again.
    #[serde(default = "keep_request_default")]
    pub keep_request_s: f64,
    /// How long a token that was revoked or has expired is still listed; then its name is free again.
    #[serde(default = "keep_ended_token_default")]
    pub keep_ended_token_s: f64,
    /// How long a rollout whose selector matches no machine waits for one before it ends.
    #[serde(default = "no_machine_grace_default")]
    pub no_machine_grace_s: f64,
    /// How long a recovery hears the region processes at least: two of their long polls.
    #[serde(default = "recover_settle_default")]
    pub recover_settle_s: f64,
    /// How long builds that left no artifact are kept in the history, with their attempts; none: for ever. What has an
    /// artifact is kept with it.
    #[serde(default)]
    pub history_keep_s: Option<f64>,
    /// File from which the key is derived that the secrets of webhooks and pushes are sealed with in the database, the same
    /// for all coordinators; none: the goal key.
    #[serde(default)]
    pub secrets_key: Option<PathBuf>,
    /// How long events are kept.
    #[serde(default)]
    pub events: EventsConfig,
    /// How webhooks are told.
    #[serde(default)]
    pub webhooks: WebhooksConfig,
}

fn listen_default() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, 7400))
}

fn certificate_life_default() -> f64 {
    90.0 * 86_400.0
}

fn heartbeat_default() -> f64 {
    30.0
}

fn reaper_interval_default() -> f64 {
    30.0
}

fn reap_jobs_default() -> u32 {
    5
}

fn reap_share_default() -> f64 {
    0.1
}

fn backoff_default() -> f64 {
    10.0
}

fn backoff_max_default() -> f64 {
    300.0
}

fn max_attempts_default() -> u32 {
    3
}

fn long_poll_default() -> f64 {
    5.0
}

fn look_again_default() -> f64 {
    5.0
}

fn replication_interval_default() -> f64 {
    10.0
}

fn observe_interval_default() -> f64 {
    10.0
}

fn copies_in_parallel_default() -> u32 {
    20
}

fn copies_per_region_default() -> u32 {
    2
}

fn inspect_round_default() -> f64 {
    86_400.0
}

fn inspect_share_default() -> f64 {
    0.001
}

fn retention_interval_default() -> f64 {
    3_600.0
}

fn copy_retry_default() -> f64 {
    1.0
}

fn copy_owned_default() -> f64 {
    10.0
}

fn rollout_interval_default() -> f64 {
    1.0
}

fn forget_machine_default() -> f64 {
    7.0 * 86_400.0
}

fn keep_request_default() -> f64 {
    86_400.0
}

fn keep_ended_token_default() -> f64 {
    90.0 * 86_400.0
}

fn no_machine_grace_default() -> f64 {
    60.0
}

fn recover_settle_default() -> f64 {
    10.0
}

/// How many heartbeats a worker misses before its job is lost.
const MISSED_HEARTBEATS: f64 = 3.0;

/// The longest time that can be set, in seconds: a year.
const TIME_MAX_S: f64 = 365.0 * 86_400.0;

/// The most regions: each is a copy of every artifact.
const REGIONS_MAX: usize = 100;

/// The most copies at once: they share one memory budget, so more would only wait.
const COPIES_MAX: u32 = 64;

/// The most attempts at one job.
pub(crate) const ATTEMPTS_MAX: u32 = 100;

impl Config {
    /// Checks what a type cannot.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        let times = [
            ("certificate_life_s", self.certificate_life_s),
            ("heartbeat_s", self.heartbeat_s),
            ("loss_window_s", self.loss_window_s.unwrap_or(1.0)),
            ("reaper_interval_s", self.reaper_interval_s),
            ("backoff_s", self.backoff_s),
            ("backoff_max_s", self.backoff_max_s),
            ("long_poll_s", self.long_poll_s),
            ("look_again_s", self.look_again_s),
            ("replication_interval_s", self.replication_interval_s),
            ("observe_interval_s", self.observe_interval_s),
            ("inspect_round_s", self.inspect_round_s),
            ("retention_interval_s", self.retention_interval_s),
            ("copy_retry_s", self.copy_retry_s),
            ("copy_owned_s", self.copy_owned_s),
            ("rollout_interval_s", self.rollout_interval_s),
            ("forget_machine_s", self.forget_machine_s),
            ("keep_request_s", self.keep_request_s),
            ("keep_ended_token_s", self.keep_ended_token_s),
            ("no_machine_grace_s", self.no_machine_grace_s),
            ("recover_settle_s", self.recover_settle_s),
            ("history_keep_s", self.history_keep_s.unwrap_or(1.0)),
        ];
        self.events.check()?;
        let times = times.into_iter().chain(self.events.times()).chain(self.webhooks.times());
        for (key, value) in times {
            ensure!(
                value > 0.0 && value <= TIME_MAX_S,
                "{key} = {value}: give seconds above 0 and at most {TIME_MAX_S}"
            );
        }
        ensure!(
            (1..=COPIES_MAX).contains(&self.copies_in_parallel),
            "copies_in_parallel = {}: give 1 to {COPIES_MAX}",
            self.copies_in_parallel
        );
        ensure!(
            (1..=self.copies_in_parallel).contains(&self.copies_per_region),
            "copies_per_region = {}: give 1 to copies_in_parallel, which is {}",
            self.copies_per_region,
            self.copies_in_parallel
        );
        ensure!(
            (0.0..=1.0).contains(&self.inspect_share),
            "inspect_share = {}: give 0 to 1",
            self.inspect_share
        );
        ensure!(
            self.keep_builds != Some(0),
            "keep_builds = 0: give at least 1, or leave it out to keep all"
        );
        ensure!(
            (1..=ATTEMPTS_MAX).contains(&self.max_attempts),
            "max_attempts = {}: give 1 to {ATTEMPTS_MAX}",
            self.max_attempts
        );
        ensure!(
            self.reap_jobs > 0,
            "reap_jobs = 0: no lost job would ever be given to another worker"
        );
        ensure!(
            (0.0..=1.0).contains(&self.reap_share),
            "reap_share = {}: give 0 to 1",
            self.reap_share
        );
        if let Some(window_s) = self.loss_window_s {
            ensure!(
                window_s > self.heartbeat_s,
                "loss_window_s = {window_s}: give more than heartbeat_s, which is {}, or every job counts as lost between two heartbeats",
                self.heartbeat_s
            );
        }
        ensure!(self.regions.len() <= REGIONS_MAX, "more than {REGIONS_MAX} regions");
        let mut names = BTreeSet::new();
        for region in &self.regions {
            ensure!(names.insert(&region.name), "region {} is named twice", region.name);
            ensure!(
                region.bucket != self.bucket,
                "region {} has the main bucket for its own: a copy there would be none, give it another",
                region.name
            );
        }
        Ok(())
    }

    /// Whether a region's store makes the copies itself.
    pub(crate) fn is_observed(&self, region: &RegionName) -> bool {
        let of = self.regions.iter().find(|of| of.name == *region);
        of.and_then(|of| of.replication).unwrap_or(self.replication) == Replication::Observe
    }

    /// How long a heartbeat may stand still.
    pub(crate) fn loss_window(&self) -> Duration {
        Duration::from_secs_f64(self.loss_window_s.unwrap_or(MISSED_HEARTBEATS * self.heartbeat_s))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(more: &str) -> anyhow::Result<Config> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        let text = format!("identity = 'i'\ndata_dir = 'd'\ngoal_key = 'k'\nbucket = 'b'\n{more}");
        std::fs::write(&path, text).unwrap();
        let config: Config = shoal_process::load_config(Some(&path), &Args::default())?;
        config.check()?;
        Ok(config)
    }

    #[test]
    fn defaults_are_those_of_the_design() {
        let config = config("").unwrap();
        assert_eq!(config.loss_window(), Duration::from_secs(90));
        assert_eq!(config.listen.port(), 7400);
    }

    #[test]
    fn mistakes_are_named() {
        for (more, word) in [
            ("heartbeat_s = 0", "heartbeat_s"),
            ("long_poll_s = -1", "long_poll_s"),
            ("copies_in_parallel = 0", "copies_in_parallel"),
            ("copies_per_region = 0", "copies_per_region"),
            ("inspect_share = 2.0", "inspect_share"),
            ("inspect_round_s = 0", "inspect_round_s"),
            ("keep_builds = 0", "keep_builds"),
            ("loss_window_s = 30", "heartbeat_s, which is 30"),
            ("[[regions]]\nname = 'a'\nbucket = 'b'", "main bucket"),
            ("replication = 'mirror'", "mirror"),
            ("reap_jobs = 0", "reap_jobs"),
            ("reap_share = 1.5", "reap_share"),
            ("backoff_s = 0", "backoff_s"),
            ("hearbeat_s = 1", "hearbeat_s"),
            ("history_keep_s = 0", "history_keep_s"),
            ("events.keep_max = 0", "events.keep_max"),
            ("webhooks.retry_s = 0", "webhooks.retry_s"),
            ("webhooks.alow_http = true", "alow_http"),
            ("[[regions]]\nname = 'A b'\nbucket = 'x'", "region name"),
            (
                "[[regions]]\nname = 'a'\nbucket = 'x'\n[[regions]]\nname = 'a'\nbucket = 'y'",
                "twice",
            ),
        ] {
            let error = config(more).unwrap_err().to_string();
            assert!(error.contains(word), "{more}: {error}");
        }
    }

    #[test]
    fn a_region_may_differ_in_who_copies() {
        let both = "replication = 'observe'\n[[regions]]\nname = 'a'\nbucket = 'x'\n\
                    [[regions]]\nname = 'b'\nbucket = 'y'\nreplication = 'copy'";
        let config = config(both).unwrap();
        let observed = |name: &str| config.is_observed(&name.parse().unwrap());
        assert!(observed("a") && !observed("b"));
    }

    #[test]
    fn regions_come_from_flags_too() {
        let region = parse_region("eu=/buckets/eu").unwrap();
        assert_eq!(region.bucket, "/buckets/eu");
        let args = Args { regions: vec![region], ..Args::default() };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        std::fs::write(&path, "identity='i'\ndata_dir='d'\ngoal_key='k'\nbucket='b'").unwrap();
        let config: Config = shoal_process::load_config(Some(&path), &args).unwrap();
        assert_eq!(config.regions.len(), 1);
        assert!(parse_region("eu").is_err());
    }
}
