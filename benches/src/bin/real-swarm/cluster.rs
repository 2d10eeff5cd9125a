//! The cluster: keys, processes, the operator's commands, and what the processes log.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

use crate::net::{self, CONTROL};

/// How long a process may take until it is ready.
const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// How often something that is waited for is looked at.
pub(crate) const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Where the agents find the bucket.
pub(crate) const BUCKET_ADDRESS: &str = "10.77.0.2";

/// The region processes' data ports; gossip is on the next.
const REGION_PORTS: [u16; 2] = [7420, 7430];

const REGION: &str = "bench";

/// A process that runs until the benchmark ends.
struct Process {
    name: String,
    log: PathBuf,
    child: Child,
}

pub(crate) struct Cluster {
    shoal: PathBuf,
    root: PathBuf,
    processes: Vec<Process>,
    pub(crate) agents: Vec<String>,
}

/// A line of a process's log.
pub(crate) struct Event {
    pub(crate) at: SystemTime,
    fields: Value,
}

impl Event {
    pub(crate) fn says(&self, key: &str, value: &str) -> bool {
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
    /// Makes the keys under `root`. Nothing runs yet.
    pub(crate) fn create(shoal: &Path, root: &Path) -> anyhow::Result<Self> {
        let cluster = Self {
            shoal: shoal.into(),
            root: root.into(),
            processes: Vec::new(),
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

    fn issue(&self, name: &str, role: &str, more: &[&str]) -> anyhow::Result<()> {
        let mut command = Command::new(&self.shoal);
        command.args(["pki", "issue", "--pki"]).arg(self.path("pki"));
        command.args(["--role", role, "--name", name]).args(more);
        finish(command.arg("--out").arg(self.path(name).join("identity"))).map(drop)
    }

    /// Starts `command ARGS`, its log in `NAME.log`.
    fn spawn(&mut self, name: &str, command: &mut Command) -> anyhow::Result<()> {
        let log = self.path(&format!("{name}.log"));
        let out = File::create(&log)?;
        command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
        let child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
        self.processes.push(Process { name: name.into(), log, child });
        Ok(())
    }

    /// Adds what every process of Shoal is given.
    fn role<'a>(&self, command: &'a mut Command, role: &str, name: &str) -> &'a mut Command {
        command.args(["--log-format", "json", role]);
        command.arg("--identity").arg(self.path(name).join("identity"));
        command.arg("--data-dir").arg(self.path(name).join("data"))
    }

    /// Waits until the process that was started last has said where it listens.
    fn wait_ready(&mut self) -> anyhow::Result<()> {
        let Some(name) = self.processes.last().map(|process| process.name.clone()) else {
            return Ok(());
        };
        let addresses = self.path(&name).join("data/addresses.json");
        self.wait(&format!("{name} to be ready"), READY_TIMEOUT, |_| Ok(addresses.exists()))
    }

    /// Waits for something of the cluster; an error when a process ends or `limit` is over.
    pub(crate) fn wait(
        &mut self,
        what: &str,
        limit: Duration,
        mut done: impl FnMut(&Self) -> anyhow::Result<bool>,
    ) -> anyhow::Result<()> {
        let start = Instant::now();
        while !done(self)? {
            for Process { name, log, child } in &mut self.processes {
                if let Some(status) = child.try_wait()? {
                    let log = fs::read_to_string(log).unwrap_or_default();
                    let last = log.lines().last().unwrap_or_default();
                    bail!("{name} ended ({status}): {last}");
                }
            }
            ensure!(start.elapsed() < limit, "waited {} s for {what}", limit.as_secs());
            thread::sleep(LOOK_EVERY);
        }
        Ok(())
    }

    /// Starts the bucket's server on its machine.
    pub(crate) fn start_bucket(&mut self, machine: &str) -> anyhow::Result<()> {
        let mut command = net::on_machine(machine, &std::env::current_exe()?);
        command.arg("--serve-bucket").arg(self.path("bucket"));
        command.args(["--listen", &format!("{BUCKET_ADDRESS}:80")]);
        self.spawn(machine, &mut command)
    }

    /// Starts coordinator and region processes, beside the bridge.
    pub(crate) fn start_control(&mut self) -> anyhow::Result<()> {
        let bucket = self.path("bucket");
        self.issue("coordinator", "coordinator", &["--host", CONTROL])?;
        self.issue("operator", "operator", &[])?;
        let mut command = Command::new(&self.shoal);
        self.role(&mut command, "coordinator", "coordinator");
        command.args(["--listen", &format!("{CONTROL}:7400")]);
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
            command.args(["--coordinator", &format!("https://{CONTROL}:7400")]);
            command.args(["--listen", &format!("{CONTROL}:{port}")]);
            command.args(["--gossip-listen", &format!("{CONTROL}:{}", port + 1)]);
            for earlier in &REGION_PORTS[..at] {
                command.args(["--peer", &format!("{CONTROL}:{}", earlier + 1)]);
            }
            self.spawn(&name, &mut command)?;
            self.wait_ready()?;
        }
        Ok(())
    }

    /// Starts an agent on its machine.
    pub(crate) fn start_agent(&mut self, machine: &str, address: &str) -> anyhow::Result<()> {
        self.issue(machine, "agent", &["--region", REGION])?;
        // The disk is memory here: what was deployed before makes room.
        let config = self.path(machine).join("config.toml");
        fs::write(&config, "keep_builds = 0\nreserve_free_mib = 64\n")?;
        let mut command = net::on_machine(machine, &self.shoal);
        self.role(&mut command, "agent", machine).arg("--config").arg(config);
        command.args(["--listen", &format!("{address}:7410")]);
        command.args(["--gossip-listen", &format!("{address}:7411")]);
        for port in REGION_PORTS {
            command.args(["--region", &format!("{CONTROL}:{port}")]);
            command.args(["--gossip-seed", &format!("{CONTROL}:{}", port + 1)]);
        }
        command.args(["--bucket", "s3://bucket"]);
        command.env("AWS_ENDPOINT", format!("http://{BUCKET_ADDRESS}"));
        command.env("AWS_ALLOW_HTTP", "true").env("AWS_SKIP_SIGNATURE", "true");
        command.env("AWS_REGION", "none");
        self.spawn(machine, &mut command)?;
        self.agents.push(machine.into());
        self.wait_ready()
    }

    /// Runs one of the operator's commands and reads its JSON.
    pub(crate) fn operator(&self, args: &[&str]) -> anyhow::Result<Value> {
        let mut command = Command::new(&self.shoal);
        command.args(args).arg("--json");
        command.env("SHOAL_COORDINATOR", format!("https://{CONTROL}:7400"));
        command.env("SHOAL_IDENTITY", self.path("operator/identity")).env("TMPDIR", &self.root);
        Ok(serde_json::from_slice(&finish(&mut command)?)?)
    }

    /// What a process logged, oldest first.
    pub(crate) fn events(&self, name: &str) -> anyhow::Result<Vec<Event>> {
        let log = fs::read_to_string(self.path(&format!("{name}.log")))?;
        let read = |line: &str| {
            let line: Value = serde_json::from_str(line).ok()?;
            let at = humantime::parse_rfc3339(line.get("timestamp")?.as_str()?).ok()?;
            Some(Event { at, fields: line.get("fields")?.clone() })
        };
        Ok(log.lines().filter_map(read).collect())
    }

    /// When the first region process had a goal.
    pub(crate) fn goal_at(&self, app: &str, revision: &str) -> anyhow::Result<Option<SystemTime>> {
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
    pub(crate) fn state_at(
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
    pub(crate) fn keep_logs(&self, dir: &Path) -> anyhow::Result<()> {
        fs::create_dir_all(dir)?;
        for Process { name, log, .. } in &self.processes {
            fs::copy(log, dir.join(format!("{name}.log")))?;
        }
        Ok(())
    }
}
