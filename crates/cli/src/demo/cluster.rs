//! The demo's cluster: keys, configurations, buckets and processes, all under one directory on loopback.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use shoal_client::Client;
use shoal_goals::{EtcdStore, GoalStore as _};
use shoal_origin::Bucket;
use shoal_pki::{IssueRequest, Role};
use shoal_proto::{MachineName, RegionName};

use super::process::{Alive, Process, stop_all};
use crate::pki::{self, Pki};

/// The file by which `shoal demo --stop DIR` knows what to end.
const STATE_FILE: &str = "demo.json";

/// How long the demo's certificates count, in days: it may be kept for a while.
const DAYS: u32 = 30;

/// How often machines ask for their goals, in seconds. The cluster is small, and somebody watches.
const POLL_S: f64 = 2.0;

/// How much of the disk the demo's agents leave free, in MiB.
const RESERVE_FREE_MIB: u64 = 64;

/// What the cluster consists of.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) regions: usize,
    pub(super) region_processes: usize,
    pub(super) agents: usize,
}

/// One agent and where it stands.
pub(super) struct Agent {
    pub(super) process: Process,
    pub(super) region: RegionName,
    pub(super) zone: &'static str,
}

/// Where the goals are beside the coordinator's database.
#[derive(Clone, Serialize, Deserialize)]
struct GoalsIn {
    url: String,
    /// The cluster's name: demos that share an etcd have one each.
    cluster: String,
}

impl GoalsIn {
    fn store(&self) -> anyhow::Result<EtcdStore> {
        Ok(EtcdStore::open(&self.url, &self.cluster)?)
    }

    /// Takes the demo's goals away.
    async fn clear(&self) -> anyhow::Result<()> {
        self.store()?.clear().await.context("the demo's goals stay in etcd")
    }
}

/// What the demo is to use of engines that run already.
#[derive(Clone, Default)]
pub(super) struct Engines {
    /// The coordinator's database; none: a file of its own.
    pub(super) database: Option<String>,
    /// An etcd for the goals.
    pub(super) goals: Option<String>,
    /// The address of buckets on S3 or GCS; none: they are directories.
    pub(super) buckets: Option<String>,
}

/// Deletes the objects that a demo has put under an address of its own.
async fn clear_buckets(url: &str) -> anyhow::Result<()> {
    let cleared = async { Bucket::open(url)?.clear().await }.await;
    cleared.with_context(|| format!("the demo's objects stay under {url}"))
}

/// A name that no other demo has.
fn own_name(root: &Path) -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let text = format!("{} {} {since:?}", root.display(), std::process::id());
    format!("demo-{}", &blake3::hash(text.as_bytes()).to_hex()[..8])
}

/// What is written into [`STATE_FILE`].
#[derive(Serialize, Deserialize)]
struct State {
    #[serde(default)]
    goals: Option<GoalsIn>,
    #[serde(default)]
    buckets: Option<String>,
    temporary: bool,
    processes: Vec<Alive>,
    agent_data_dirs: Vec<PathBuf>,
}

impl State {
    /// Ends all processes and programs, and clears etcd and the buckets.
    async fn end(&self) -> anyhow::Result<()> {
        stop_all(&self.processes, &self.agent_data_dirs).await;
        let goals = match &self.goals {
            Some(goals) => goals.clear().await,
            None => Ok(()),
        };
        // One that is away does not keep the other from being cleared.
        if let Some(url) = &self.buckets {
            clear_buckets(url).await?;
        }
        goals
    }
}

/// A cluster that runs, or is about to.
pub(super) struct Cluster {
    root: PathBuf,
    keep: bool,
    temporary: bool,
    /// The address under which the demo's own buckets are; none: they are directories.
    buckets: Option<String>,
    pki: Pki,
    /// Coordinator, worker and region processes.
    control: Vec<Process>,
    pub(super) agents: Vec<Agent>,
    api: Option<String>,
    goals: Option<GoalsIn>,
    database: Option<String>,
}

/// The region with number `at`, from 0.
pub(super) fn region_name(at: usize) -> anyhow::Result<RegionName> {
    Ok(RegionName::new(format!("region-{}", at + 1))?)
}

impl Cluster {
    /// Makes the keys. Nothing runs yet. In an etcd and on S3 it is under a name that no other demo has.
    pub(super) fn create(
        root: &Path,
        keep: bool,
        temporary: bool,
        engines: Engines,
    ) -> anyhow::Result<Self> {
        let (dir, name) = (root.join("pki"), own_name(root));
        let buckets = engines.buckets.map(|url| format!("{}/{name}", url.trim_end_matches('/')));
        let goals = engines.goals.map(|url| GoalsIn { url, cluster: name });
        pki::init(&dir, goals.as_ref().map_or("demo", |goals| &goals.cluster))?;
        Ok(Self {
            root: root.into(),
            keep,
            temporary,
            buckets,
            pki: Pki::open(&dir)?,
            control: Vec::new(),
            agents: Vec::new(),
            api: None,
            goals,
            database: engines.database,
        })
    }

    /// Starts all processes; returns when each is ready, with a client of the coordinator.
    pub(super) async fn start(&mut self, shape: Shape) -> anyhow::Result<Client> {
        if let Some(goals) = &self.goals {
            // An etcd that does not answer is said before anything runs.
            goals.store()?.list().await?;
        }
        let api = self.start_coordinator(shape).await?;
        self.api = Some(api.clone());
        self.issue(&self.operator_dir(), "operator", Role::Operator, None)?;
        let (identity, trust) = shoal_process::load_identity(&self.operator_dir())?;
        let worker = toml::toml! { slots = 1 };
        self.start_process("worker", "worker-1", Role::Worker, None, &api, worker)?;
        for at in 0..shape.regions {
            let region = region_name(at)?;
            let (data, gossip) = self.start_region(&region, shape.region_processes, &api).await?;
            for number in (0..shape.agents).filter(|number| number % shape.regions == at) {
                let zone = if (number / shape.regions).is_multiple_of(2) { "a" } else { "b" };
                self.start_agent(number, &region, zone, &data, &gossip)?;
            }
        }
        for process in self.control.iter_mut().chain(self.agents.iter_mut().map(|a| &mut a.process))
        {
            process.addresses().await?;
        }
        self.agents.sort_by(|a, b| a.process.name.cmp(&b.process.name));
        Ok(Client::new(&[api], &identity, &trust)?)
    }

    async fn start_coordinator(&mut self, shape: Shape) -> anyhow::Result<String> {
        let dir = self.root.join("coordinator");
        let mut config = toml::Table::new();
        config.insert("listen".into(), "127.0.0.1:0".into());
        config.insert("goal_key".into(), text(&self.root.join("pki/goal.key")));
        config.insert("bucket".into(), self.bucket("main").into());
        if let Some(goals) = &self.goals {
            config.insert("goals".into(), goals.url.clone().into());
        }
        if let Some(database) = &self.database {
            config.insert("database".into(), database.clone().into());
        }
        let regions = (0..shape.regions).map(|at| {
            let name = region_name(at)?;
            let mut region = toml::Table::new();
            region.insert("name".into(), name.as_str().into());
            region.insert("bucket".into(), self.bucket(name.as_str()).into());
            Ok(toml::Value::from(region))
        });
        config.insert("regions".into(), regions.collect::<anyhow::Result<Vec<_>>>()?.into());
        self.issue(&dir.join("identity"), "coordinator", Role::Coordinator, None)?;
        self.write_config(&dir, config)?;
        let mut process = Process::start("coordinator", "coordinator", &dir, self.keep)?;
        let addresses = process.addresses().await;
        self.control.push(process);
        self.write_state()?;
        Ok(format!("https://{}", addresses?.get("api")?))
    }

    /// Starts one region's processes one after the other, since each is told of those before it. Returns
    /// their data and gossip addresses.
    async fn start_region(
        &mut self,
        region: &RegionName,
        processes: usize,
        api: &str,
    ) -> anyhow::Result<(Vec<String>, Vec<String>)> {
        let (mut data, mut gossip) = (Vec::new(), Vec::<String>::new());
        for number in 1..=processes {
            let name = format!("{region}-p{number}");
            let mut config = listeners(POLL_S);
            config.insert("bucket".into(), self.bucket(region.as_str()).into());
            config.insert("peers".into(), gossip.clone().into());
            if let Some(goals) = &self.goals {
                config.insert("goals".into(), goals.url.clone().into());
            }
            self.start_process("region", &name, Role::Region, Some(region), api, config)?;
            if let Some(process) = self.control.last_mut() {
                let addresses = process.addresses().await?;
                data.push(addresses.get("data")?.to_string());
                gossip.push(addresses.get("gossip")?.to_string());
            }
        }
        Ok((data, gossip))
    }

    /// Starts a process that calls the coordinator.
    fn start_process(
        &mut self,
        command: &str,
        name: &str,
        role: Role,
        region: Option<&RegionName>,
        api: &str,
        mut config: toml::Table,
    ) -> anyhow::Result<()> {
        let dir = self.root.join(name);
        config.insert("coordinators".into(), vec![api].into());
        self.issue(&dir.join("identity"), name, role, region)?;
        self.write_config(&dir, config)?;
        self.control.push(Process::start(command, name, &dir, self.keep)?);
        self.write_state()
    }

    fn start_agent(
        &mut self,
        number: usize,
        region: &RegionName,
        zone: &'static str,
        data: &[String],
        gossip: &[String],
    ) -> anyhow::Result<()> {
        let name = format!("agent-{:02}", number + 1);
        let dir = self.root.join(&name);
        let mut config = listeners(POLL_S);
        config.insert("regions".into(), data.to_vec().into());
        config.insert("gossip_seeds".into(), gossip.to_vec().into());
        if self.buckets.is_none() {
            config.insert("bucket".into(), self.bucket(region.as_str()).into());
        }
        config.insert("zone".into(), zone.into());
        config.insert("reserve_free_mib".into(), RESERVE_FREE_MIB.cast_signed().into());
        self.issue(&dir.join("identity"), &name, Role::Agent, Some(region))?;
        self.write_config(&dir, config)?;
        let process = Process::start("agent", &name, &dir, self.keep)?;
        self.agents.push(Agent { process, region: region.clone(), zone });
        self.write_state()
    }

    fn issue(
        &self,
        out: &Path,
        name: &str,
        role: Role,
        region: Option<&RegionName>,
    ) -> anyhow::Result<()> {
        let hosts = vec!["127.0.0.1".into(), "localhost".into()];
        let request = IssueRequest {
            machine: MachineName::new(name)?,
            region: region.cloned(),
            role,
            hosts,
            days: DAYS,
        };
        self.pki.issue(&request, out)
    }

    /// Writes `DIR/config.toml` with what every process has, and the rest.
    fn write_config(&self, dir: &Path, mut config: toml::Table) -> anyhow::Result<()> {
        let data_dir = dir.join("data");
        fs::create_dir_all(&data_dir)?;
        config.insert("identity".into(), text(&dir.join("identity")));
        config.insert("data_dir".into(), text(&data_dir));
        config.insert("metrics_listen".into(), "127.0.0.1:0".into());
        let path = dir.join("config.toml");
        fs::write(&path, toml::to_string(&config)?)
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// The address of a bucket, by its name.
    fn bucket(&self, name: &str) -> String {
        match &self.buckets {
            Some(url) => format!("{url}/{name}"),
            None => self.root.join("buckets").join(name).display().to_string(),
        }
    }

    pub(super) fn operator_dir(&self) -> PathBuf {
        self.root.join("operator")
    }

    /// The coordinator's address.
    pub(super) fn api(&self) -> &str {
        self.api.as_deref().unwrap_or("(not started)")
    }

    /// An error when a process has ended.
    pub(super) fn check(&mut self) -> anyhow::Result<()> {
        self.control.iter_mut().try_for_each(Process::check)?;
        self.agents.iter_mut().try_for_each(|agent| agent.process.check())
    }

    fn state(&self) -> State {
        let agents = self.agents.iter().map(|agent| &agent.process);
        State {
            goals: self.goals.clone(),
            buckets: self.buckets.clone(),
            temporary: self.temporary,
            processes: self.control.iter().chain(agents.clone()).map(|p| p.alive).collect(),
            agent_data_dirs: agents.map(Process::data_dir).collect(),
        }
    }

    fn write_state(&self) -> anyhow::Result<()> {
        if self.keep {
            let bytes = serde_json::to_vec(&self.state())?;
            shoal_process::write_atomic(&self.root.join(STATE_FILE), &bytes)?;
        }
        Ok(())
    }

    /// Whether there is anything to end.
    pub(super) fn has_started(&self) -> bool {
        !self.control.is_empty()
    }

    /// Ends everything that runs, and takes away what it put elsewhere.
    pub(super) async fn stop(&self) -> anyhow::Result<()> {
        self.state().end().await
    }

    /// Where the buckets are, when they are not directories.
    pub(super) fn remote_buckets(&self) -> Option<&str> {
        self.buckets.as_deref()
    }
}

/// Ends what `shoal demo --keep` left running in `dir`.
pub(super) async fn stop_kept(dir: &Path) -> anyhow::Result<()> {
    let path = dir.join(STATE_FILE);
    let bytes = fs::read(&path).with_context(|| {
        format!("cannot read {}: no demo was left running in {}", path.display(), dir.display())
    })?;
    let state: State = serde_json::from_slice(&bytes)
        .with_context(|| format!("{} is not a demo's", path.display()))?;
    state.end().await?;
    if state.temporary {
        fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    }
    Ok(())
}

/// The addresses of a process with both planes: any free ports.
fn listeners(poll_s: f64) -> toml::Table {
    let mut config = toml::Table::new();
    config.insert("listen".into(), "127.0.0.1:0".into());
    config.insert("gossip_listen".into(), "127.0.0.1:0".into());
    config.insert("poll_s".into(), poll_s.into());
    config
}

fn text(path: &Path) -> toml::Value {
    path.display().to_string().into()
}
