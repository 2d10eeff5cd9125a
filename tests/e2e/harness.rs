//! A whole Shoal on loopback: real processes of the real binary, each with its own directory, on free ports.

use std::{
    fs,
    io::Write as _,
    net::SocketAddr,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use shoal_client::{
    Client,
    types::{App, Artifact, DeployRequest, Job, Machine, MachineApp, Rollout},
};
use shoal_pki::{CertificateAuthority, GoalSigner, Identity, IssueRequest, Role, Trust};
use shoal_proto::{
    AppName, CommitSha, MachineName, RegionName, codec,
    goal::{Activation, HealthCheck, RolloutPlan},
    state::{MachineState, RolloutStatus},
    trust::{TRUST_MAX_BYTES, TrustBundle},
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

/// A started process; killed when dropped.
pub struct Process {
    pub name: String,
    pub dir: PathBuf,
    child: Child,
}

impl Process {
    /// Starts `shoal ROLE --config DIR/config.toml`; its log goes to `DIR/log`.
    pub fn start(role: &str, name: &str, dir: &Path) -> Self {
        let _ = fs::remove_file(dir.join("data/addresses.json"));
        let log = fs::File::options().create(true).append(true).open(dir.join("log")).unwrap();
        let child = Command::new(SHOAL)
            .arg(role)
            .arg("--config")
            .arg(dir.join("config.toml"))
            .env("SHOAL_LOG", "info,shoal_agent=debug,shoal_region=debug,libp2p=warn,quinn=warn")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .process_group(0)
            .spawn()
            .unwrap();
        Self { name: name.into(), dir: dir.into(), child }
    }

    pub fn data_dir(&self) -> PathBuf {
        self.dir.join("data")
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// Waits until it says where it listens.
    pub async fn address(&mut self, key: &str) -> SocketAddr {
        let path = self.data_dir().join("addresses.json");
        let name = self.name.clone();
        wait_for(&format!("{name} to be ready"), async || {
            if let Ok(Some(status)) = self.child.try_wait() {
                panic!("{name} ended with {status}:\n{}", self.log());
            }
            let bytes = fs::read(&path).map_err(|error| error.to_string())?;
            let value: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
            let text = value[key].as_str().ok_or(format!("no address {key}"))?;
            text.parse().map_err(|_| format!("{text} is no address"))
        })
        .await
    }

    /// SIGKILL, and gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// SIGTERM, and its exit status.
    pub async fn stop(&mut self) -> std::process::ExitStatus {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let name = self.name.clone();
        wait_for(&format!("{name} to stop"), async || {
            self.child.try_wait().unwrap().ok_or("still runs")
        })
        .await
    }

    /// The exit status, when it has ended by itself.
    pub fn ended(&mut self) -> Option<std::process::ExitStatus> {
        self.child.try_wait().unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

fn trust(ca: &CertificateAuthority, signer: &GoalSigner) -> Vec<u8> {
    let bundle = TrustBundle {
        cluster: ca.cluster().into(),
        number: 1,
        ca_certificates: vec![ca.cert_der().to_vec()],
        goal_keys: vec![signer.public()],
        revoked: vec![],
    };
    codec::encode(&signer.sign_trust(&bundle).unwrap(), TRUST_MAX_BYTES).unwrap()
}

/// A cluster's keys.
pub struct Keys {
    pub ca: CertificateAuthority,
    pub signer: GoalSigner,
    pub trust: Vec<u8>,
}

impl Keys {
    pub fn new(cluster: &str) -> Self {
        let ca = CertificateAuthority::create(cluster).unwrap();
        let signer = GoalSigner::create(1).unwrap();
        let trust = trust(&ca, &signer);
        Self { ca, signer, trust }
    }

    /// A trust bundle of this CA that believes another goal key.
    pub fn trust_with(&self, signer: &GoalSigner) -> Vec<u8> {
        trust(&self.ca, signer)
    }

    /// Writes an identity directory.
    pub fn issue(&self, dir: &Path, role: Role, name: &str, region: Option<&str>) {
        fs::create_dir_all(dir).unwrap();
        let issued = self
            .ca
            .issue(&IssueRequest {
                machine: MachineName::new(name).unwrap(),
                region: region.map(|region| RegionName::new(region).unwrap()),
                role,
                hosts: vec!["127.0.0.1".into()],
                days: 7,
            })
            .unwrap();
        fs::write(dir.join("identity.pem"), issued.cert_pem).unwrap();
        fs::write(dir.join("identity.key"), issued.key_pem).unwrap();
        fs::write(dir.join("trust.bin"), &self.trust).unwrap();
    }
}

/// What a cluster consists of.
pub struct Shape {
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
    /// More lines for each agent's configuration, above its tables.
    pub agent_extra: String,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            regions: 1,
            region_processes: 2,
            agents: 3,
            workers: 0,
            coordinators: 1,
            coordinator_extra: String::new(),
            worker_extra: String::new(),
            agent_extra: String::new(),
        }
    }
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
    dir: tempfile::TempDir,
}

pub fn region_name(at: usize) -> String {
    format!("r{}", at + 1)
}

impl Cluster {
    pub async fn start(shape: Shape) -> Self {
        let dir = tempfile::Builder::new().prefix("shoal-e2e-").tempdir().unwrap();
        // Builds run as another user where the tests run as root.
        let readable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(dir.path(), readable).unwrap();
        let keys = Keys::new("test");
        let root = dir.path().to_path_buf();
        let mut coordinator = start_coordinator(&keys, &root, &shape, 0, 0);
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

    /// The addresses of all coordinators.
    fn urls(&self) -> Vec<String> {
        [self.api].iter().chain(&self.other_apis).map(|api| format!("https://{api}")).collect()
    }

    /// Starts the coordinator again on the port that it had.
    pub async fn restart_coordinator(&mut self) {
        self.coordinator.kill();
        self.coordinator =
            start_coordinator(&self.keys, self.dir.path(), &self.shape, 0, self.api.port());
        self.coordinator.address("api").await;
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
        Process::start("worker", &name, &dir)
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
        let config = format!(
            "identity = \"{0}/identity\"\ndata_dir = \"{0}/data\"\ncoordinators = {1:?}\n\
             listen = \"{2}\"\ngossip_listen = \"127.0.0.1:0\"\nbucket = \"{3}\"\npeers = {4:?}\n\
             wave_settle_s = 1.0\n",
            dir.display(),
            self.urls(),
            listen.map_or("127.0.0.1:0".into(), |listen| listen.to_string()),
            self.bucket(region).display(),
            peers,
        );
        fs::write(dir.join("config.toml"), config).unwrap();
        Process::start("region", &name, &dir)
    }

    /// Starts an agent in the region that its number falls to; `labels` are lines of its label table.
    pub async fn start_agent(&mut self, name: &str, labels: &str) -> Process {
        let number: usize = name[1..].parse().unwrap();
        let region = (number - 1) % self.shape.regions;
        let dir = self.root().join(name);
        self.keys.issue(&dir.join("identity"), Role::Agent, name, Some(&region_name(region)));
        self.configure_agent(&dir, region, labels).await;
        let mut agent = Process::start("agent", name, &dir);
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
        let config = format!(
            "identity = \"{0}/identity\"\ndata_dir = \"{0}/data\"\nlisten = \"127.0.0.1:0\"\n\
             gossip_listen = \"127.0.0.1:0\"\nregions = {1:?}\ngossip_seeds = {2:?}\nbucket = \"{3}\"\n\
             zone = \"a\"\npoll_s = 0.5\nreserve_free_mib = 64\nstop_timeout_s = 2\n{4}\n[labels]\n{5}",
            dir.display(),
            data,
            gossip,
            self.root().join(format!("bucket-{}", region_name(region))).display(),
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
        self.agents[at] = Process::start("agent", &name, &dir);
        self.agents[at].address("data").await;
    }

    /// Waits until the coordinator knows that many machines.
    pub async fn machines_known(&self, count: usize) {
        wait_for(&format!("{count} machines"), async || {
            let machines = self.client.machines(None, None).await.map_err(|e| e.to_string())?;
            if machines.len() >= count {
                Ok(())
            } else {
                Err(format!("{} machines", machines.len()))
            }
        })
        .await;
    }

    pub async fn set_app(&self, app: &App) {
        self.client.set_app(app).await.unwrap();
    }

    /// Publishes a file with the command and waits until it is deployable.
    pub async fn publish(&self, app: &str, file: &Path) -> Artifact {
        let output = self.shoal(&["publish", file.to_str().unwrap(), "--app", app, "--json"]);
        let artifact: Artifact = serde_json::from_str(&output).unwrap();
        self.deployable(&artifact.name).await
    }

    pub async fn deployable(&self, name: &str) -> Artifact {
        wait_for(&format!("{name} to be deployable"), async || {
            let artifact = self.client.artifact(name).await.map_err(|error| error.to_string())?;
            if artifact.deployable { Ok(artifact) } else { Err(format!("{artifact:?}")) }
        })
        .await
    }

    pub async fn deploy(&self, app: &str, artifact: &str) -> Rollout {
        let app = AppName::new(app).unwrap();
        self.client.deploy(&DeployRequest { app, artifact: artifact.into() }).await.unwrap()
    }

    /// Waits until a rollout has ended.
    pub async fn rollout_ends(&self, id: i64) -> Rollout {
        wait_for(&format!("rollout {id} to end"), async || {
            let rollout = self.client.rollout(id).await.map_err(|error| error.to_string())?;
            if rollout.status.is_terminal() { Ok(rollout) } else { Err(format!("{rollout:?}")) }
        })
        .await
    }

    pub async fn rollout_succeeds(&self, id: i64) -> Rollout {
        let rollout = self.rollout_ends(id).await;
        assert_eq!(rollout.status, RolloutStatus::Succeeded, "{rollout:?}");
        rollout
    }

    pub async fn job_ends(&self, id: i64) -> Job {
        wait_for(&format!("job {id} to end"), async || {
            let job = self.client.job(id).await.map_err(|error| error.to_string())?;
            if job.status.is_terminal() { Ok(job) } else { Err(format!("{job:?}")) }
        })
        .await
    }

    pub async fn machine(&self, name: &str) -> Machine {
        let machines = self.client.machines(None, None).await.unwrap();
        machines.into_iter().find(|machine| machine.name.as_str() == name).unwrap()
    }

    /// Waits until a machine's report about an app is as wanted.
    pub async fn machine_reports(
        &self,
        name: &str,
        app: &str,
        what: &str,
        is: impl Fn(&MachineApp) -> bool,
    ) -> MachineApp {
        wait_for(&format!("{name}'s {app} to be {what}"), async || {
            let machine = self.machine(name).await;
            let found = machine.apps.iter().find(|state| state.report.app.as_str() == app);
            match found {
                Some(state) if is(state) => Ok(state.clone()),
                other => Err(format!("{other:?}")),
            }
        })
        .await
    }

    pub async fn machine_is(&self, name: &str, app: &str, state: MachineState) -> MachineApp {
        self.machine_reports(name, app, state.as_str(), |seen| seen.report.state == state).await
    }

    /// The bytes that a machine's `current` of an app points to.
    pub fn current(&self, machine: &str, app: &str) -> Vec<u8> {
        fs::read(self.current_path(machine, app)).unwrap()
    }

    pub fn current_path(&self, machine: &str, app: &str) -> PathBuf {
        self.root().join(machine).join("data/apps").join(app).join("current")
    }

    /// Runs an operator's command; panics with its stderr when it fails.
    pub fn shoal(&self, args: &[&str]) -> String {
        let output = self.shoal_output(args);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "shoal {args:?}: {stderr}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs an operator's command that must fail with exit code 1 and one line; returns the line.
    pub fn shoal_fails(&self, args: &[&str]) -> String {
        let output = self.shoal_output(args);
        let stderr = String::from_utf8_lossy(&output.stderr).trim().to_string();
        assert_eq!(output.status.code(), Some(1), "shoal {args:?}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "shoal {args:?}: {stderr}");
        stderr
    }

    fn shoal_output(&self, args: &[&str]) -> std::process::Output {
        Command::new(SHOAL)
            .args(args)
            .env("SHOAL_COORDINATOR", format!("https://{}", self.api))
            .env("SHOAL_IDENTITY", self.root().join("operator"))
            .env("SHOAL_LOG", "warn")
            .output()
            .unwrap()
    }

    /// Writes a file of `len` bytes that do not compress, the same for the same `seed`.
    pub fn random_file(&self, name: &str, len: usize, seed: u64) -> PathBuf {
        let path = self.root().join(name);
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        let mut bytes = vec![0; len];
        blake3::Hasher::new_keyed(&key).finalize_xof().fill(&mut bytes);
        fs::write(&path, bytes).unwrap();
        path
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
    let read = |name: &str| fs::read_to_string(identity.join(name)).unwrap();
    let id = Identity::from_pem(&read("identity.pem"), &read("identity.key")).unwrap();
    let trust = Trust::from_signed(&fs::read(identity.join("trust.bin")).unwrap()).unwrap();
    Client::new(&[format!("https://{api}")], &id, &trust).unwrap()
}

fn start_coordinator(keys: &Keys, root: &Path, shape: &Shape, at: usize, port: u16) -> Process {
    let name = if at == 0 { "coordinator".into() } else { format!("coordinator-{}", at + 1) };
    let dir = root.join(&name);
    if !dir.exists() {
        keys.issue(&dir.join("identity"), Role::Coordinator, &format!("c{}", at + 1), None);
        fs::create_dir_all(dir.join("data")).unwrap();
        fs::write(dir.join("goal.key"), keys.signer.to_pem().unwrap()).unwrap();
    }
    let mut config = format!(
        "identity = \"{0}/identity\"\ndata_dir = \"{0}/data\"\nlisten = \"127.0.0.1:{port}\"\n\
         goal_key = \"{0}/goal.key\"\nbucket = \"{1}/bucket-main\"\n{2}\n",
        dir.display(),
        root.display(),
        shape.coordinator_extra,
    );
    for region in 0..shape.regions {
        let name = region_name(region);
        config += &format!(
            "[[regions]]\nname = \"{name}\"\nbucket = \"{}/bucket-{name}\"\n",
            root.display()
        );
    }
    fs::write(dir.join("config.toml"), config).unwrap();
    Process::start("coordinator", &name, &dir)
}

/// An app that is only published to, for all machines, and only verified there.
pub fn plain_app(name: &str) -> App {
    App {
        name: AppName::new(name).unwrap(),
        repository: String::new(),
        build_command: String::new(),
        output: String::new(),
        activation: Activation::None,
        health: None,
        selector: String::new(),
        build_timeout_s: 60,
        piece_size_bytes: None,
        plan: RolloutPlan { deadline_s: 600, ..RolloutPlan::default() },
        priority: 0,
    }
}

/// An app whose program is a shell script that writes what it is and stays.
pub fn script_app(name: &str, repository: &Path) -> App {
    App {
        repository: repository.display().to_string(),
        build_command: "sh build.sh".into(),
        output: "out/app".into(),
        activation: Activation::Run { args: vec![] },
        health: Some(HealthCheck {
            command: "test -s \"$SHOAL_RUN_DIR/version\"".into(),
            timeout_s: 30,
        }),
        ..plain_app(name)
    }
}

/// A git repository of a test.
pub struct Repo {
    pub path: PathBuf,
}

impl Repo {
    /// A repository whose build makes a script that says its version and stays.
    pub fn new(path: PathBuf) -> Self {
        fs::create_dir_all(&path).unwrap();
        let repo = Self { path };
        repo.git(&["init", "-q", "-b", "main"]);
        repo
    }

    pub fn git(&self, args: &[&str]) -> String {
        let output = Command::new("git")
            .arg("-C")
            .arg(&self.path)
            .args(["-c", "user.name=Tester", "-c", "user.email=tester@example.org"])
            .args(["-c", "safe.directory=*"])
            .args(args)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "git {args:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap().trim().into()
    }

    /// Commits `build.sh` with this text.
    pub fn commit(&self, build: &str) -> CommitSha {
        fs::write(self.path.join("build.sh"), build).unwrap();
        self.git(&["add", "-A"]);
        self.git(&["commit", "-q", "--allow-empty", "-m", "change"]);
        self.git(&["rev-parse", "HEAD"]).parse().unwrap()
    }

    /// Commits a build whose program writes `version` and runs until it is stopped.
    pub fn commit_version(&self, version: &str) -> CommitSha {
        self.commit(&format!(
            "mkdir -p out\nprintf '#!/bin/sh\\necho {version} $SHOAL_APP > \"$SHOAL_RUN_DIR/version\"\\n\
             exec sleep 100000\\n' > out/app\n"
        ))
    }
}
