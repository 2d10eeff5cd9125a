//! A running cluster: its processes, how they are started, and started again.

use std::{
    fs,
    io::Write as _,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use shoal_client::Client;
use shoal_pki::Role;

use super::{Keys, Process, SHOAL, cleaner::Cleaner, client, client_of, walk};

/// What a cluster consists of.
pub struct Shape {
    /// The program `shoal`.
    pub program: PathBuf,
    pub regions: usize,
    pub region_processes: usize,
    pub agents: usize,
    pub workers: usize,
    /// How many coordinators; more than one share a database that `coordinator_extra` names.
    pub coordinators: usize,
    /// More lines for each coordinator's configuration, above its tables.
    pub coordinator_extra: String,
    /// More lines for each worker's configuration.
    pub worker_extra: String,
    /// The coordinator's port; 0: any.
    pub coordinator_port: u16,
    /// A flag of the coordinator.
    pub coordinator_flag: String,
    /// More lines for each region process's configuration.
    pub region_extra: String,
    /// Where the region processes find coordinators, if not where they are.
    pub region_coordinators: Option<Vec<String>>,
    /// More lines for each agent's configuration, above its tables.
    pub agent_extra: String,
    /// How long the certificates count that the test issues, in seconds.
    pub life_s: u64,
    /// Buckets on S3 instead of directories.
    pub remote: Option<Remote>,
}

impl Shape {
    /// The address of a bucket, by its name.
    fn bucket(&self, root: &Path, name: &str) -> String {
        match &self.remote {
            Some(remote) => format!("{}/{name}", remote.base),
            None => root.join(format!("bucket-{name}")).display().to_string(),
        }
    }

    fn environment(&self, of: fn(&Remote) -> &Vec<(String, String)>) -> &[(String, String)] {
        self.remote.as_ref().map_or(&[], |remote| of(remote))
    }
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            program: SHOAL.into(),
            regions: 1,
            region_processes: 2,
            agents: 3,
            workers: 0,
            coordinators: 1,
            coordinator_extra: String::new(),
            worker_extra: String::new(),
            coordinator_port: 0,
            coordinator_flag: String::new(),
            region_extra: String::new(),
            region_coordinators: None,
            agent_extra: String::new(),
            life_s: 7 * 86_400,
            remote: None,
        }
    }
}

/// Buckets on S3 under prefixes of one, and who holds which credentials: the agents none.
#[derive(Clone)]
pub struct Remote {
    /// `s3://bucket/prefix`.
    pub base: String,
    /// The environment of the coordinator and the workers.
    pub writer: Vec<(String, String)>,
    /// The environment of the region processes.
    pub reader: Vec<(String, String)>,
}

/// A running cluster. Programs that agents started are stopped when it is dropped.
pub struct Cluster {
    pub keys: Keys,
    pub client: Client,
    pub coordinator: Process,
    /// The coordinators beside it.
    pub others: Vec<Process>,
    pub workers: Vec<Process>,
    pub regions: Vec<Process>,
    pub agents: Vec<Process>,
    pub api: SocketAddr,
    pub other_apis: Vec<SocketAddr>,
    shape: Shape,
    /// Goes before the directory.
    _cleaner: Cleaner,
    dir: tempfile::TempDir,
}

/// The name of a region by its number from 0.
pub fn region_name(at: usize) -> String {
    format!("r{}", at + 1)
}

impl Cluster {
    pub async fn start(shape: Shape) -> Self {
        let dir = tempfile::Builder::new().prefix("shoal-e2e-").tempdir().unwrap();
        // Builds run as another user where the tests run as root.
        let readable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(dir.path(), readable).unwrap();
        let keys = Keys { life_s: shape.life_s, ..Keys::new("test") };
        let root = dir.path().to_path_buf();
        let port = shape.coordinator_port;
        let mut coordinator = start_coordinator(&keys, &root, &shape, 0, port);
        let api = coordinator.address("api").await;
        let (mut others, mut other_apis) = (vec![], vec![]);
        for at in 1..shape.coordinators {
            let mut other = start_coordinator(&keys, &root, &shape, at, 0);
            other_apis.push(other.address("api").await);
            others.push(other);
        }
        keys.issue(&root.join("operator"), Role::Operator, "tester", None);
        let client = client(&root.join("operator"), api);
        let mut cluster = Self {
            keys,
            client,
            coordinator,
            others,
            workers: vec![],
            regions: vec![],
            agents: vec![],
            api,
            other_apis,
            shape,
            _cleaner: Cleaner::of(&root),
            dir,
        };
        for at in 0..cluster.shape.workers {
            let worker = cluster.start_worker(at);
            cluster.workers.push(worker);
        }
        for region in 0..cluster.shape.regions {
            let mut gossip = vec![];
            for at in 0..cluster.shape.region_processes {
                let mut process = cluster.start_region(region, at, &gossip, None);
                gossip.push(process.address("gossip").await);
                cluster.regions.push(process);
            }
        }
        for at in 0..cluster.shape.agents {
            let labels = format!("half = \"{}\"\n", if at % 2 == 0 { "even" } else { "odd" });
            let agent = cluster.start_agent(&format!("m{}", at + 1), &labels).await;
            cluster.agents.push(agent);
        }
        cluster.machines_known(cluster.shape.agents).await;
        cluster
    }

    pub fn root(&self) -> &Path {
        self.dir.path()
    }

    pub fn bucket(&self, region: usize) -> PathBuf {
        self.root().join(format!("bucket-{}", region_name(region)))
    }

    /// What is started from now on is this program.
    pub fn set_program(&mut self, program: &Path) {
        self.shape.program = program.into();
    }

    /// The addresses of all coordinators.
    fn urls(&self) -> Vec<String> {
        [self.api].iter().chain(&self.other_apis).map(|api| format!("https://{api}")).collect()
    }

    /// Starts the coordinator again on the port that it had.
    pub async fn restart_coordinator(&mut self) {
        self.restart_coordinator_with("").await;
    }

    /// [`Cluster::restart_coordinator`] with a flag.
    pub async fn restart_coordinator_with(&mut self, flag: &str) {
        self.coordinator.kill();
        self.shape.coordinator_flag = flag.into();
        self.coordinator =
            start_coordinator(&self.keys, self.dir.path(), &self.shape, 0, self.api.port());
        self.coordinator.address("api").await;
    }

    /// Starts a coordinator beside the first again, on the port that it had.
    pub async fn restart_other(&mut self, at: usize) {
        self.others[at].kill();
        let (root, port) = (self.dir.path(), self.other_apis[at].port());
        self.others[at] = start_coordinator(&self.keys, root, &self.shape, at + 1, port);
        self.others[at].address("api").await;
    }

    /// A client of all coordinators.
    pub fn client_of_all(&self) -> Client {
        client_of(&self.root().join("operator"), &self.urls())
    }

    pub fn start_worker(&self, at: usize) -> Process {
        let name = format!("w{}", at + 1);
        let dir = self.root().join(&name);
        self.keys.issue(&dir.join("identity"), Role::Worker, &name, None);
        fs::create_dir_all(dir.join("data")).unwrap();
        let config = format!(
            "identity = \"{0}/identity\"\ndata_dir = \"{0}/data\"\ncoordinators = {1:?}\n{2}",
            dir.display(),
            self.urls(),
            self.shape.worker_extra,
        );
        fs::write(dir.join("config.toml"), config).unwrap();
        let environment = self.shape.environment(|remote| &remote.writer);
        Process::start_in(&self.shape.program, environment, &[], "worker", &name, &dir)
    }

    /// Starts process `at` of a region; `listen` keeps an earlier data address.
    pub fn start_region(
        &self,
        region: usize,
        at: usize,
        gossip: &[SocketAddr],
        listen: Option<SocketAddr>,
    ) -> Process {
        let region_id = region_name(region);
        let name = format!("{region_id}-p{}", at + 1);
        let dir = self.root().join(&name);
        self.keys.issue(&dir.join("identity"), Role::Region, &name, Some(&region_id));
        fs::create_dir_all(dir.join("data")).unwrap();
        let peers: Vec<String> = gossip.iter().map(ToString::to_string).collect();
        let coordinators = self.shape.region_coordinators.clone();
        let config = format!(
            "identity = \"{0}/identity\"\ndata_dir = \"{0}/data\"\ncoordinators = {1:?}\n\
             listen = \"{2}\"\ngossip_listen = \"127.0.0.1:0\"\nbucket = \"{3}\"\npeers = {4:?}\n\
             wave_settle_s = 1.0\n{5}",
            dir.display(),
            coordinators.unwrap_or_else(|| self.urls()),
            listen.map_or("127.0.0.1:0".into(), |listen| listen.to_string()),
            self.shape.bucket(self.root(), &region_id),
            peers,
            self.shape.region_extra,
        );
        fs::write(dir.join("config.toml"), config).unwrap();
        let environment = self.shape.environment(|remote| &remote.reader);
        Process::start_in(&self.shape.program, environment, &[], "region", &name, &dir)
    }

    /// Starts an agent in the region that its number falls to; `labels` are lines of its label table.
    pub async fn start_agent(&mut self, name: &str, labels: &str) -> Process {
        let number: usize = name[1..].parse().unwrap();
        let region = (number - 1) % self.shape.regions;
        let dir = self.root().join(name);
        self.keys.issue(&dir.join("identity"), Role::Agent, name, Some(&region_name(region)));
        self.configure_agent(&dir, region, labels).await;
        let mut agent = Process::start_in(&self.shape.program, &[], &[], "agent", name, &dir);
        agent.address("data").await;
        agent
    }

    async fn configure_agent(&mut self, dir: &Path, region: usize, labels: &str) {
        fs::create_dir_all(dir.join("data")).unwrap();
        let each = self.shape.region_processes;
        let mut data = vec![];
        let mut gossip = vec![];
        for process in &mut self.regions[region * each..(region + 1) * each] {
            data.push(process.address("data").await.to_string());
            gossip.push(process.address("gossip").await.to_string());
        }
        let bucket = match self.shape.remote {
            // It holds no credentials: it reads by URLs.
            Some(_) => String::new(),
            None => format!("bucket = \"{}\"\n", self.bucket(region).display()),
        };
        let config = format!(
            "identity = \"{0}/identity\"\ndata_dir = \"{0}/data\"\nlisten = \"127.0.0.1:0\"\n\
             gossip_listen = \"127.0.0.1:0\"\nregions = {1:?}\ngossip_seeds = {2:?}\n{3}\
             zone = \"a\"\npoll_s = 0.5\nreserve_free_mib = 64\nstop_timeout_s = 2\n{4}\n[labels]\n{5}",
            dir.display(),
            data,
            gossip,
            bucket,
            self.shape.agent_extra,
            labels,
        );
        fs::write(dir.join("config.toml"), config).unwrap();
    }

    /// Starts agent `at` again with what it has on its disk.
    pub async fn restart_agent(&mut self, at: usize) {
        let agent = &self.agents[at];
        let (name, dir) = (agent.name.clone(), agent.dir.clone());
        self.agents[at].kill();
        self.agents[at] = Process::start_in(&self.shape.program, &[], &[], "agent", &name, &dir);
        self.agents[at].address("data").await;
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for agent in &mut self.agents {
            agent.kill();
        }
        // Programs outlive their agents by design: end them by the pids that the agents wrote.
        let pids = walk(self.dir.path(), &|path| path.ends_with("pid"));
        for pid in pids.iter().filter_map(|path| fs::read_to_string(path).ok()) {
            let pid = pid.split_whitespace().next().and_then(|pid| pid.parse().ok());
            if let Some(group) = pid.and_then(rustix::process::Pid::from_raw) {
                let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
            }
        }
        if std::thread::panicking() {
            for log in walk(self.dir.path(), &|path| path.ends_with("log")) {
                let text = fs::read_to_string(&log).unwrap_or_default();
                let lines: Vec<_> = text.lines().collect();
                let tail = lines[lines.len().saturating_sub(25)..].join("\n");
                let _ = writeln!(std::io::stderr(), "--- {}\n{tail}", log.display());
            }
        }
    }
}

fn start_coordinator(keys: &Keys, root: &Path, shape: &Shape, at: usize, port: u16) -> Process {
    let name = if at == 0 { "coordinator".into() } else { format!("coordinator-{}", at + 1) };
    let dir = root.join(&name);
    if !dir.exists() {
        keys.issue(&dir.join("identity"), Role::Coordinator, &format!("c{}", at + 1), None);
        fs::create_dir_all(dir.join("data")).unwrap();
        fs::write(dir.join("goal.key"), keys.signer.to_pem().unwrap()).unwrap();
        fs::write(dir.join("ca.key"), keys.ca.key_pem().unwrap()).unwrap();
    }
    let mut config = format!(
        "identity = \"{0}/identity\"\ndata_dir = \"{0}/data\"\nlisten = \"127.0.0.1:{port}\"\n\
         goal_key = \"{0}/goal.key\"\nca_key = \"{0}/ca.key\"\nbucket = \"{1}\"\n{2}\n",
        dir.display(),
        shape.bucket(root, "main"),
        shape.coordinator_extra,
    );
    for region in 0..shape.regions {
        let name = region_name(region);
        config += &format!(
            "[[regions]]\nname = \"{name}\"\nbucket = \"{}\"\n",
            shape.bucket(root, &name)
        );
    }
    fs::write(dir.join("config.toml"), config).unwrap();
    let with_flag = format!("exec \"$@\" {}", shape.coordinator_flag);
    let before: &[&str] =
        if shape.coordinator_flag.is_empty() { &[] } else { &["sh", "-c", &with_flag, "sh"] };
    let environment = shape.environment(|remote| &remote.writer);
    Process::start_in(&shape.program, environment, before, "coordinator", &name, &dir)
}
