//! A cluster of real processes: keys, the processes, the operator's commands, and what the processes log.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use crate::{
    process::{self, Usage},
    processes::Processes,
};

/// How long a process may take until it is ready.
const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// How often something that is waited for is looked at.
pub const LOOK_EVERY: Duration = Duration::from_millis(100);

/// The region processes' data ports; gossip is on the next.
const REGION_PORTS: [u16; 2] = [7420, 7430];

const REGION: &str = "bench";

/// Processes of one cluster. They end with it.
#[derive(Debug)]
pub struct Cluster {
    shoal: PathBuf,
    root: PathBuf,
    /// Where coordinator and region processes listen.
    control: String,
    processes: Processes,
    /// The names of those that were started.
    pub agents: Vec<String>,
}

/// How an agent is started.
#[derive(Debug)]
pub struct Agent<'a> {
    /// Its machine.
    pub name: &'a str,
    /// What runs `shoal` there, with its environment.
    pub program: Command,
    /// Its address.
    pub address: &'a str,
    /// Its port on the data plane; gossip is on the next.
    pub port: u16,
    /// The region's bucket, as it sees it.
    pub bucket: &'a str,
    /// The rest of its settings, as in its file.
    pub settings: &'a str,
}

/// A line of a process's log.
#[derive(Debug)]
pub struct Event {
    /// When, by the process's clock.
    pub at: SystemTime,
    fields: Value,
}

impl Event {
    /// Whether a field has this value.
    #[must_use]
    pub fn says(&self, key: &str, value: &str) -> bool {
        self.fields.get(key).and_then(Value::as_str) == Some(value)
    }
}

/// Runs a command to its end.
fn finish(command: &mut Command) -> anyhow::Result<Vec<u8>> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} failed: {}", said.trim());
    Ok(output.stdout)
}

impl Cluster {
    /// Makes the keys under `root`; coordinator and region processes will listen at the address `control`. Nothing
    /// runs yet.
    ///
    /// # Errors
    /// When `shoal pki` fails.
    pub fn create(shoal: &Path, root: &Path, control: &str) -> anyhow::Result<Self> {
        let cluster = Self {
            shoal: shoal.into(),
            root: root.into(),
            control: control.into(),
            processes: Processes::default(),
            agents: Vec::new(),
        };
        fs::create_dir_all(root.join("bucket"))?;
        let pki = root.join("pki");
        finish(Command::new(shoal).args(["pki", "init"]).arg(pki).args(["--cluster", "bench"]))?;
        Ok(cluster)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Issues an identity, into the folder `identity` of `name`'s own.
    ///
    /// # Errors
    /// When `shoal pki` fails.
    pub fn issue(&self, name: &str, role: &str, more: &[&str]) -> anyhow::Result<()> {
        let mut command = Command::new(&self.shoal);
        command.args(["pki", "issue", "--pki"]).arg(self.path("pki"));
        command.args(["--role", role, "--name", name]).args(more);
        finish(command.arg("--out").arg(self.path(name).join("identity"))).map(drop)
    }

    /// Starts a command, its log in `NAME.log`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(&mut self, name: &str, command: &mut Command) -> anyhow::Result<()> {
        self.processes.spawn(name, &self.path(&format!("{name}.log")), command)
    }

    /// Adds what every process of Shoal is given.
    fn role<'a>(&self, command: &'a mut Command, role: &str, name: &str) -> &'a mut Command {
        command.args(["--log-format", "json", role]);
        command.arg("--identity").arg(self.path(name).join("identity"));
        command.arg("--data-dir").arg(self.path(name).join("data"))
    }

    /// Waits until the process that was started last has said where it listens.
    fn wait_ready(&mut self) -> anyhow::Result<()> {
        let Some(name) = self.processes.last().map(str::to_owned) else {
            return Ok(());
        };
        let addresses = self.path(&name).join("data/addresses.json");
        self.wait(&format!("{name} to be ready"), READY_TIMEOUT, |_| Ok(addresses.exists()))
    }

    /// Waits for something of the cluster.
    ///
    /// # Errors
    /// When a process ends, or `limit` is over.
    pub fn wait(
        &mut self,
        what: &str,
        limit: Duration,
        mut done: impl FnMut(&Self) -> anyhow::Result<bool>,
    ) -> anyhow::Result<()> {
        let start = Instant::now();
        while !done(self)? {
            self.processes.check()?;
            ensure!(start.elapsed() < limit, "waited {} s for {what}", limit.as_secs());
            thread::sleep(LOOK_EVERY);
        }
        Ok(())
    }

    /// Starts coordinator and region processes.
    ///
    /// # Errors
    /// When one cannot be started, or ends.
    pub fn start_control(&mut self) -> anyhow::Result<()> {
        let control = self.control.clone();
        let bucket = self.path("bucket");
        self.issue("coordinator", "coordinator", &["--host", &control])?;
        self.issue("operator", "operator", &[])?;
        let mut command = Command::new(&self.shoal);
        self.role(&mut command, "coordinator", "coordinator");
        command.args(["--listen", &format!("{control}:7400")]);
        command.arg("--goal-key").arg(self.path("pki/goal.key"));
        command.arg("--bucket").arg(self.path("main"));
        command.arg("--region").arg(format!("{REGION}={}", bucket.display()));
        self.spawn("coordinator", &mut command)?;
        self.wait_ready()?;
        for (at, port) in REGION_PORTS.into_iter().enumerate() {
            let name = format!("region-{at}");
            self.issue(&name, "region", &["--region", REGION])?;
            let mut command = Command::new(&self.shoal);
            self.role(&mut command, "region", &name).arg("--bucket").arg(&bucket);
            command.args(["--coordinator", &format!("https://{control}:7400")]);
            command.args(["--listen", &format!("{control}:{port}")]);
            command.args(["--gossip-listen", &format!("{control}:{}", port + 1)]);
            for earlier in &REGION_PORTS[..at] {
                command.args(["--peer", &format!("{control}:{}", earlier + 1)]);
            }
            self.spawn(&name, &mut command)?;
            self.wait_ready()?;
        }
        Ok(())
    }

    /// Starts an agent, and waits until it is ready.
    ///
    /// # Errors
    /// When it cannot be started, or ends.
    pub fn start_agent(&mut self, agent: Agent<'_>) -> anyhow::Result<()> {
        let Agent { name, mut program, address, port, bucket, settings } = agent;
        self.issue(name, "agent", &["--region", REGION])?;
        let config = self.path(name).join("config.toml");
        fs::write(&config, settings)?;
        self.role(&mut program, "agent", name).arg("--config").arg(config);
        program.args(["--listen", &format!("{address}:{port}")]);
        program.args(["--gossip-listen", &format!("{address}:{}", port + 1)]);
        for port in REGION_PORTS {
            program.args(["--region", &format!("{}:{port}", self.control)]);
            program.args(["--gossip-seed", &format!("{}:{}", self.control, port + 1)]);
        }
        self.spawn(name, program.args(["--bucket", bucket]))?;
        self.agents.push(name.into());
        self.wait_ready()
    }

    /// The region's bucket, a directory.
    #[must_use]
    pub fn bucket(&self) -> PathBuf {
        self.path("bucket")
    }

    /// The processes' numbers.
    #[must_use]
    pub fn pids(&self) -> Vec<u32> {
        self.processes.pids()
    }

    /// A process's number.
    #[must_use]
    pub fn pid(&self, name: &str) -> Option<u32> {
        self.processes.pid(name)
    }

    /// What the processes have used of the machine so far.
    ///
    /// # Errors
    /// When one has ended.
    pub fn usage(&self) -> anyhow::Result<Vec<Usage>> {
        self.pids().into_iter().map(process::usage).collect()
    }

    /// Runs one of the operator's commands and reads its JSON.
    ///
    /// # Errors
    /// When it fails.
    pub fn operator(&self, args: &[&str]) -> anyhow::Result<Value> {
        let mut command = Command::new(&self.shoal);
        command.args(args).arg("--json");
        command.env("SHOAL_COORDINATOR", format!("https://{}:7400", self.control));
        command.env("SHOAL_IDENTITY", self.path("operator/identity")).env("TMPDIR", &self.root);
        Ok(serde_json::from_slice(&finish(&mut command)?)?)
    }

    /// What a process logged, oldest first.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub fn events(&self, name: &str) -> anyhow::Result<Vec<Event>> {
        let log = fs::read_to_string(self.path(&format!("{name}.log")))?;
        let read = |line: &str| {
            let line: Value = serde_json::from_str(line).ok()?;
            let at = humantime::parse_rfc3339(line.get("timestamp")?.as_str()?).ok()?;
            Some(Event { at, fields: line.get("fields")?.clone() })
        };
        Ok(log.lines().filter_map(read).collect())
    }

    /// When the first region process had a goal.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub fn goal_at(&self, app: &str, revision: &str) -> anyhow::Result<Option<SystemTime>> {
        let mut first = None;
        for at in 0..REGION_PORTS.len() {
            let events = self.events(&format!("region-{at}"))?;
            let goal = events.iter().find(|event| {
                event.says("message", "goal")
                    && event.says("app", app)
                    && event.says("revision", revision)
            });
            first = first.into_iter().chain(goal.map(|event| event.at)).min();
        }
        Ok(first)
    }

    /// When an agent first was in a state.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub fn state_at(
        &self,
        agent: &str,
        app: &str,
        revision: &str,
        state: &str,
    ) -> anyhow::Result<Option<SystemTime>> {
        let events = self.events(agent)?;
        let entered = events.iter().find(|event| {
            event.says("state", state) && event.says("app", app) && event.says("revision", revision)
        });
        Ok(entered.map(|event| event.at))
    }

    /// Copies the processes' logs to `dir`.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub fn keep_logs(&self, dir: &Path) -> anyhow::Result<()> {
        fs::create_dir_all(dir)?;
        for (name, log) in self.processes.logs() {
            fs::copy(log, dir.join(format!("{name}.log")))?;
        }
        Ok(())
    }

    /// Makes a file an artifact of an app, and waits until it may be deployed.
    ///
    /// # Errors
    /// When that fails.
    pub fn publish(&self, app: &str, file: &Path) -> anyhow::Result<Artifact> {
        let file = file.to_str().context("a path that is no text")?;
        let made = self.operator(&["publish", file, "--app", app])?;
        let name = text(&made, "name")?;
        self.operator(&["artifact", &name, "--wait"])?;
        let number = |key: &str| made.get(key).and_then(Value::as_u64).context("no number");
        Ok(Artifact {
            name,
            size_bytes: number("size_bytes")?,
            encoded_bytes: number("encoded_bytes")?,
            piece_size_bytes: number("piece_size_bytes")?,
        })
    }

    /// Sets an app's goal; returns its revision as logs name it.
    ///
    /// # Errors
    /// When that fails.
    pub fn deploy(&self, app: &str, artifact: &Artifact) -> anyhow::Result<String> {
        let rollout = self.operator(&["deploy", app, &artifact.name])?;
        let part = |key: &str| rollout.get("revision")?.get(key)?.as_u64();
        let revision = part("epoch").zip(part("number"));
        let (epoch, number) = revision.context("a rollout has no revision")?;
        Ok(format!("{epoch}.{number}"))
    }

    /// Waits until every one of these agents has verified a revision, and says when each had.
    ///
    /// # Errors
    /// When a process ends, or `limit` is over.
    pub fn verified(
        &mut self,
        agents: &[String],
        app: &str,
        revision: &str,
        limit: Duration,
    ) -> anyhow::Result<BTreeMap<String, SystemTime>> {
        let mut verified = BTreeMap::new();
        self.wait("every agent to have verified", limit, |cluster| {
            for agent in agents {
                if !verified.contains_key(agent)
                    && let Some(at) = cluster.state_at(agent, app, revision, "VERIFIED")?
                {
                    verified.insert(agent.clone(), at);
                }
            }
            Ok(verified.len() == agents.len())
        })?;
        Ok(verified)
    }

    /// Waits until a rollout has ended well, and returns it.
    ///
    /// # Errors
    /// When it failed, a process ends, or `limit` is over.
    pub fn ended(&mut self, app: &str, limit: Duration) -> anyhow::Result<Value> {
        let mut rollout = Value::Null;
        self.wait("the rollout to end", limit, |cluster| {
            let status = cluster.operator(&["status", app])?;
            let first = status.get(0).and_then(|app| app.get("rollout"));
            rollout = first.cloned().unwrap_or_default();
            Ok(matches!(text(&rollout, "status")?.as_str(), "SUCCEEDED" | "FAILED"))
        })?;
        ensure!(text(&rollout, "status")? == "SUCCEEDED", "a rollout failed: {rollout}");
        Ok(rollout)
    }
}

/// An artifact in the region's bucket.
#[derive(Debug, Clone)]
pub struct Artifact {
    /// Its name, for the operator's commands.
    pub name: String,
    /// Its length.
    pub size_bytes: u64,
    /// The length of its stored pieces.
    pub encoded_bytes: u64,
    /// The length of a piece, but for the last one.
    pub piece_size_bytes: u64,
}

/// A field of an answer that is text.
///
/// # Errors
/// When it is not there.
pub fn text(value: &Value, key: &str) -> anyhow::Result<String> {
    let text = value.get(key).and_then(Value::as_str);
    Ok(text.with_context(|| format!("no {key} in the answer"))?.to_owned())
}
