//! A control plane of real processes on loopback: PostgreSQL, a coordinator, region processes, and etcd if asked for.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use serde_json::Value;
use shoal_benches::{process, processes::Processes};
use shoal_client::{
    Client,
    types::{App, Artifact},
};
use shoal_pki::{CertificateAuthority, GoalSigner, Identity, IssueRequest, Role, Trust};
use shoal_proto::{
    AppName, MachineName, RegionName, codec,
    goal::{Activation, RolloutPlan},
    trust::{TRUST_MAX_BYTES, TrustBundle},
};
use shoal_test_postgres::{Database, Server};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// How long a process may take until it is ready.
const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// How often something that is waited for is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// How long certificates hold.
const CERTIFICATE_DAYS: u32 = 7;

/// What runs.
pub(crate) struct World {
    processes: Processes,
    members: Members,
    pub(crate) regions: Vec<RegionName>,
    shoal: PathBuf,
    api: String,
    etcd: Option<shoal_test_etcd::Server>,
    _postgres: Server,
    dir: tempfile::TempDir,
}

/// Makes the members of the cluster, in any process of the benchmark.
pub(crate) struct Members {
    authority: CertificateAuthority,
    trust: Trust,
}

/// How a world is made.
pub(crate) struct Shape<'a> {
    pub(crate) shoal: &'a Path,
    /// Where everything lies.
    pub(crate) base: &'a Path,
    pub(crate) regions: usize,
    /// Whether each region has its process.
    pub(crate) region_processes: bool,
    pub(crate) etcd: bool,
}

/// An app for all machines, which only verify it, and which its own rollouts wait for.
pub(crate) fn app(name: &str) -> anyhow::Result<App> {
    Ok(App {
        name: AppName::new(name)?,
        repository: "none".into(),
        build_command: "true".into(),
        output: "out".into(),
        activation: Activation::None,
        health: None,
        selector: String::new(),
        build_timeout_s: 60,
        max_attempts: None,
        keep_builds: None,
        piece_size_bytes: None,
        plan: RolloutPlan { deadline_s: 86_400, ..RolloutPlan::default() },
        priority: 0,
    })
}

impl Members {
    /// Makes a CA, which other processes find in `dir`.
    fn create(dir: &Path, signer: &GoalSigner) -> anyhow::Result<Self> {
        let authority = CertificateAuthority::create("bench")?;
        let bundle = TrustBundle {
            cluster: "bench".into(),
            number: 1,
            ca_certificates: vec![authority.cert_der().to_vec()],
            goal_keys: vec![signer.public()],
            revoked: vec![],
        };
        let signed = codec::encode(&signer.sign_trust(&bundle)?, TRUST_MAX_BYTES)?;
        fs::write(dir.join("ca.key"), authority.key_pem()?)?;
        fs::write(dir.join("trust.bin"), &signed)?;
        Ok(Self { authority, trust: Trust::from_signed(&signed)? })
    }

    /// Those of the CA in `dir`.
    pub(crate) fn load(dir: &Path) -> anyhow::Result<Self> {
        let trust = Trust::from_signed(&fs::read(dir.join("trust.bin"))?)?;
        let key = fs::read_to_string(dir.join("ca.key"))?;
        Ok(Self { authority: CertificateAuthority::of_trust(&trust, &key)?, trust })
    }

    fn issue(
        &self,
        name: &str,
        role: Role,
        region: Option<&RegionName>,
    ) -> anyhow::Result<(String, String)> {
        let issued = self.authority.issue(&IssueRequest {
            machine: MachineName::new(name)?,
            region: region.cloned(),
            role,
            hosts: vec!["127.0.0.1".into()],
            days: CERTIFICATE_DAYS,
        })?;
        Ok((issued.cert_pem, issued.key_pem))
    }

    /// A new member of the cluster, and what it believes.
    pub(crate) fn member(
        &self,
        name: &str,
        role: Role,
        region: Option<&RegionName>,
    ) -> anyhow::Result<(Identity, Trust)> {
        let (cert, key) = self.issue(name, role, region)?;
        Ok((Identity::from_pem(&cert, &key)?, self.trust.clone()))
    }
}

impl World {
    pub(crate) async fn start(shape: Shape<'_>) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("shoal-control-").tempdir_in(shape.base)?;
        let postgres = Server::start_in(shape.base, &[]).await?;
        let database = Database::create_on(&postgres.url("postgres")).await?;
        for setting in ["fsync", "synchronous_commit"] {
            let value = database.setting(setting).await?;
            ensure!(value == "on", "{setting} is {value} on the server: that is no measurement");
        }
        let etcd = match shape.etcd {
            true => Some(shoal_test_etcd::Server::start().await?),
            false => None,
        };
        let signer = GoalSigner::create(1)?;
        let members = Members::create(dir.path(), &signer)?;
        let regions = (0..shape.regions).map(|at| RegionName::new(format!("r{at}")));
        let regions = regions.collect::<Result<Vec<_>, _>>()?;
        let mut world = Self {
            processes: Processes::default(),
            members,
            regions,
            shoal: shape.shoal.into(),
            api: String::new(),
            etcd,
            _postgres: postgres,
            dir,
        };
        world.issue_to_file("operator", Role::Operator, None)?;
        fs::write(world.path("goal.key"), signer.to_pem()?)?;
        world.start_coordinator(database.url())?;
        world.api = format!("https://{}", world.address("coordinator", "api")?);
        if shape.region_processes {
            for region in world.regions.clone() {
                world.start_region(&region)?;
            }
        }
        Ok(world)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Where everything lies.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The directory of a process's data.
    pub(crate) fn data(&self, name: &str) -> PathBuf {
        self.path(name).join("data")
    }

    fn goals(&self) -> String {
        self.etcd.as_ref().map_or(String::new(), |etcd| format!("goals = \"{}\"\n", etcd.url()))
    }

    fn start_coordinator(&mut self, database: &str) -> anyhow::Result<()> {
        self.issue_to_file("coordinator", Role::Coordinator, None)?;
        let root = self.dir.path().display();
        let mut config = format!(
            "identity = \"{root}/coordinator/identity\"\ndata_dir = \"{root}/coordinator/data\"\n\
             listen = \"127.0.0.1:0\"\nmetrics_listen = \"127.0.0.1:0\"\ndatabase = \"{database}\"\n\
             goal_key = \"{root}/goal.key\"\nbucket = \"{root}/bucket-main\"\nno_machine_grace_s = 86400.0\n{}",
            self.goals(),
        );
        for region in &self.regions {
            config +=
                &format!("[[regions]]\nname = \"{region}\"\nbucket = \"{root}/bucket-{region}\"\n");
        }
        self.start_process("coordinator", "coordinator", &config)
    }

    fn start_region(&mut self, region: &RegionName) -> anyhow::Result<()> {
        let name = region.as_str();
        self.issue_to_file(name, Role::Region, Some(region))?;
        let root = self.dir.path().display();
        let config = format!(
            "identity = \"{root}/{name}/identity\"\ndata_dir = \"{root}/{name}/data\"\n\
             coordinators = [\"{}\"]\nlisten = \"127.0.0.1:0\"\ngossip_listen = \"127.0.0.1:0\"\n\
             bucket = \"{root}/bucket-{name}\"\n{}",
            self.api,
            self.goals(),
        );
        self.start_process("region", name, &config)
    }

    fn start_process(&mut self, role: &str, name: &str, config: &str) -> anyhow::Result<()> {
        fs::create_dir_all(self.data(name))?;
        let file = self.path(name).join("config.toml");
        fs::write(&file, config)?;
        let mut command = Command::new(&self.shoal);
        command.arg(role).arg("--config").arg(file).env("SHOAL_LOG", "warn");
        let log = self.path(&format!("{name}.log"));
        self.processes.spawn(name, &log, &mut command)?;
        let addresses = self.data(name).join("addresses.json");
        let ready = || Ok(addresses.exists());
        self.processes.wait(&format!("{name} to be ready"), LOOK_EVERY, READY_TIMEOUT, ready)
    }

    /// Where a process listens.
    pub(crate) fn address(&self, name: &str, key: &str) -> anyhow::Result<SocketAddr> {
        let text = fs::read(self.data(name).join("addresses.json"))?;
        let addresses: Value = serde_json::from_slice(&text)?;
        let address = addresses.get(key).and_then(Value::as_str).context("no such address")?;
        Ok(address.parse()?)
    }

    fn issue_to_file(
        &self,
        name: &str,
        role: Role,
        region: Option<&RegionName>,
    ) -> anyhow::Result<()> {
        let dir = self.path(name).join("identity");
        fs::create_dir_all(&dir)?;
        let (cert, key) = self.members.issue(name, role, region)?;
        fs::write(dir.join("identity.pem"), cert)?;
        fs::write(dir.join("identity.key"), key)?;
        fs::write(dir.join("trust.bin"), self.members.trust.signed_bytes())?;
        Ok(())
    }

    /// A client with a certificate of its own.
    pub(crate) fn client(
        &self,
        name: &str,
        role: Role,
        region: Option<&RegionName>,
    ) -> anyhow::Result<Client> {
        let (identity, trust) = self.members.member(name, role, region)?;
        Ok(Client::new(std::slice::from_ref(&self.api), &identity, &trust)?)
    }

    /// Publishes a small file to an app with the operator's command, and waits until it may be deployed.
    pub(crate) async fn publish(&self, client: &Client, app: &str) -> anyhow::Result<Artifact> {
        let file = self.path("artifact");
        fs::write(&file, b"a small artifact\n")?;
        let mut command = Command::new(&self.shoal);
        command.arg("publish").arg(&file).args(["--app", app, "--json"]);
        command.env("SHOAL_COORDINATOR", &self.api).env("SHOAL_LOG", "warn");
        let output = command.env("SHOAL_IDENTITY", self.path("operator/identity")).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "shoal publish failed: {}", said.trim());
        let made: Artifact = serde_json::from_slice(&output.stdout)?;
        loop {
            let found = client.artifact(&made.name).await?;
            if found.deployable {
                return Ok(found);
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Whether all processes run.
    pub(crate) fn check(&mut self) -> anyhow::Result<()> {
        self.processes.check()
    }

    /// CPU seconds of a process so far.
    pub(crate) fn cpu_s(&self, name: &str) -> anyhow::Result<f64> {
        let pid = self.processes.pid(name).with_context(|| format!("{name} does not run"))?;
        Ok(process::usage(pid)?.cpu_s)
    }

    /// Memory of a process that is no file's, in bytes.
    pub(crate) fn rss_anon_bytes(&self, name: &str) -> anyhow::Result<u64> {
        let pid = self.processes.pid(name).with_context(|| format!("{name} does not run"))?;
        Ok(process::usage(pid)?.rss_anon_bytes)
    }

    /// How many calls the coordinator answered with 400 and above: by route and status.
    pub(crate) async fn refused(&self) -> anyhow::Result<Vec<String>> {
        let addr = self.address("coordinator", "metrics")?;
        let mut stream = tokio::net::TcpStream::connect(addr).await?;
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await?;
        let mut page = String::new();
        stream.read_to_string(&mut page).await?;
        let bad = |line: &&str| {
            let status = line.split_once("status=\"").and_then(|(_, rest)| rest.get(..3));
            line.contains("api_requests_total{") && status.is_some_and(|status| status >= "400")
        };
        Ok(page.lines().filter(bad).map(str::to_owned).collect())
    }
}
