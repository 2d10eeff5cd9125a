//! From a verified file to a running, healthy build, and back when that fails.

use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process_group};
use serde::{Deserialize, Serialize};
use shoal_proto::{
    AppName, ArtifactId, MachineName, Revision,
    goal::{Activation, Goal, HealthCheck},
};
use tokio::process::Command;

use crate::program::Program;

/// A program without a health check is well when it runs this long, or has ended with 0 by then.
const START_GRACE: Duration = Duration::from_secs(1);

/// How long an activation command may take.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(600);

/// How long to wait between two runs of a health check.
const HEALTH_INTERVAL: Duration = Duration::from_millis(250);

/// How long one run of a health check may take.
const HEALTH_RUN_TIMEOUT: Duration = Duration::from_secs(10);

/// How often, and how far apart, a program is tried to be started whose file somebody still holds open for writing.
const BUSY_TRIES: u32 = 40;
const BUSY_PAUSE: Duration = Duration::from_millis(50);

/// How much of a command's output goes into a reason, in bytes from its end.
const OUTPUT_TAIL_BYTES: u64 = 200;

/// A build that can be started, now or again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Build {
    pub(crate) revision: Revision,
    pub(crate) artifact: ArtifactId,
    pub(crate) activation: Activation,
    pub(crate) health: Option<HealthCheck>,
}

impl From<&Goal> for Build {
    fn from(goal: &Goal) -> Self {
        Self {
            revision: goal.revision,
            artifact: goal.artifact,
            activation: goal.activation.clone(),
            health: goal.health.clone(),
        }
    }
}

/// Where an app's files are, and how it is started.
#[derive(Clone)]
pub(crate) struct Place {
    pub(crate) app: AppName,
    machine: MachineName,
    app_dir: PathBuf,
    pub(crate) run_dir: PathBuf,
    stop_timeout: Duration,
}

impl Place {
    /// Makes the app's directories under `data_dir`: `apps/APP` for the agent, `run/APP` for the program.
    pub(crate) fn open(
        data_dir: &Path,
        app: &AppName,
        machine: &MachineName,
        stop_timeout: Duration,
    ) -> io::Result<Self> {
        let app_dir = data_dir.join("apps").join(app.as_str());
        let run_dir = data_dir.join("run").join(app.as_str());
        fs::create_dir_all(&app_dir)?;
        fs::create_dir_all(&run_dir)?;
        Ok(Self { app: app.clone(), machine: machine.clone(), app_dir, run_dir, stop_timeout })
    }

    /// The file in which the app's state is kept.
    pub(crate) fn state_path(&self) -> PathBuf {
        self.app_dir.join("state.json")
    }

    /// Points `current` at `target`, whole or not at all.
    fn switch(&self, target: &Path) -> io::Result<()> {
        let next = self.app_dir.join("current.next");
        match fs::remove_file(&next) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        symlink(target, &next)?;
        fs::rename(&next, self.app_dir.join("current"))?;
        fs::File::open(&self.app_dir)?.sync_all()
    }

    fn environment(&self, build: &Build, command: &mut Command) {
        let path =
            std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into());
        command
            .env_clear()
            .env("PATH", path)
            .env("HOME", &self.run_dir)
            .env("LANG", "C.UTF-8")
            .env("SHOAL_APP", self.app.as_str())
            .env("SHOAL_ARTIFACT", build.artifact.to_string())
            .env("SHOAL_REVISION", build.revision.to_string())
            .env("SHOAL_MACHINE", self.machine.as_str())
            .env("SHOAL_RUN_DIR", &self.run_dir)
            .env("SHOAL_CURRENT", self.app_dir.join("current"));
    }

    /// Runs a command to its end. Its output goes to a file, so that what it leaves running in the background
    /// holds nobody up; what it starts ends with it only when it takes too long.
    async fn shell(&self, build: &Build, script: &str, timeout: Duration) -> Result<(), String> {
        let cannot = |error: io::Error| format!("cannot run '{script}': {error}");
        let output = self.run_dir.join("command.log");
        let file = fs::File::create(&output).map_err(cannot)?;
        let mut command = Command::new("sh");
        command.arg("-c").arg(script).current_dir(&self.run_dir);
        self.environment(build, &mut command);
        command
            .stdin(Stdio::null())
            .stdout(file.try_clone().map_err(cannot)?)
            .stderr(file)
            .process_group(0)
            .kill_on_drop(true);
        let mut child = command.spawn().map_err(cannot)?;
        let group = child.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
        let status = match tokio::time::timeout(timeout, child.wait()).await {
            Err(_) => {
                if let Some(group) = group {
                    let _ = kill_process_group(group, Signal::KILL);
                }
                return Err(format!("'{script}' took more than {} s", timeout.as_secs()));
            }
            Ok(Err(error)) => return Err(cannot(error)),
            Ok(Ok(status)) => status,
        };
        if status.success() {
            return Ok(());
        }
        Err(format!("'{script}' failed ({status}): {}", tail(&output)))
    }

    /// Ends the app's program, if one runs.
    pub(crate) async fn stop(&self) {
        if let Some(program) = Program::adopt(&self.run_dir) {
            program.stop(self.stop_timeout).await;
        }
    }

    /// Starts the program of a build that is current.
    pub(crate) async fn spawn(&self, build: &Build, file: &Path) -> Result<Program, String> {
        let Activation::Run { args } = &build.activation else {
            return Err("the build is no program".into());
        };
        let mut busy = 0;
        loop {
            let mut command = Command::new(file);
            command.args(args);
            self.environment(build, &mut command);
            match Program::start(command, &self.run_dir) {
                // Another process was forked while the file was still written to: until it has executed its own
                // program, it holds the file open.
                Err(error)
                    if error.kind() == io::ErrorKind::ExecutableFileBusy && busy < BUSY_TRIES =>
                {
                    busy += 1;
                    tokio::time::sleep(BUSY_PAUSE).await;
                }
                started => {
                    return started.map_err(|error| format!("cannot start the program: {error}"));
                }
            }
        }
    }

    /// Stops what runs, switches to `build` and starts it; when this returns well, it is healthy.
    pub(crate) async fn activate(
        &self,
        build: &Build,
        file: &Path,
    ) -> Result<Option<Program>, String> {
        self.stop().await;
        self.switch(file).map_err(|error| format!("cannot switch 'current': {error}"))?;
        let program = match &build.activation {
            Activation::None => None,
            Activation::Run { .. } => Some(self.spawn(build, file).await?),
            Activation::Command { command } => {
                self.shell(build, command, COMMAND_TIMEOUT).await?;
                None
            }
        };
        let healthy = self.healthy(build, program.as_ref()).await;
        if let (Err(_), Some(program)) = (&healthy, &program) {
            program.clone().stop(self.stop_timeout).await;
        }
        healthy.map(|()| program)
    }

    async fn healthy(&self, build: &Build, program: Option<&Program>) -> Result<(), String> {
        let ended = async {
            match program {
                Some(program) => program.ended().await,
                None => std::future::pending().await,
            }
        };
        let Some(health) = &build.health else {
            if program.is_none() {
                return Ok(());
            }
            return match tokio::time::timeout(START_GRACE, ended).await {
                Ok(ended) if !ended.is_success() => Err(ended.to_string()),
                Ok(_) | Err(_) => Ok(()),
            };
        };
        let check = async {
            let mut last = String::from("not run yet");
            let until_healthy = async {
                loop {
                    match self.shell(build, &health.command, HEALTH_RUN_TIMEOUT).await {
                        Ok(()) => return,
                        Err(reason) => last = reason,
                    }
                    tokio::time::sleep(HEALTH_INTERVAL).await;
                }
            };
            let limit = Duration::from_secs(u64::from(health.timeout_s));
            let result = tokio::time::timeout(limit, until_healthy).await;
            result.map_err(|_| format!("not healthy after {} s: {last}", health.timeout_s))
        };
        tokio::pin!(ended);
        tokio::select! {
            biased;
            result = check => result,
            ended = &mut ended => Err(format!("{ended} before it was healthy")),
        }
    }
}

/// The end of a command's output, on one line.
fn tail(path: &Path) -> String {
    use io::{Read as _, Seek as _, SeekFrom};
    let read = || -> io::Result<Vec<u8>> {
        let mut file = fs::File::open(path)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(OUTPUT_TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(OUTPUT_TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().unwrap_or_default();
    String::from_utf8_lossy(&bytes).trim().replace('\n', " | ")
}

/// What an agent keeps of an app across restarts.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct AppState {
    /// What runs.
    pub(crate) active: Option<Build>,
    /// What ran before, the latest first.
    pub(crate) history: Vec<ArtifactId>,
    /// A goal that was tried and given up, whether the machine went back, and why: it is not tried again.
    pub(crate) failed: Option<(Revision, bool, String)>,
    /// The sequence of the last state report.
    pub(crate) sequence: u64,
}

impl AppState {
    /// Reads the state of an app; one that cannot be read is as good as none, and said.
    pub(crate) fn load(app: &AppName, path: &Path) -> Self {
        match fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|error| {
                tracing::warn!(%app, %error, "the app's state is not readable: begun anew");
                Self::default()
            }),
            Err(_) => Self::default(),
        }
    }

    /// Writes it.
    pub(crate) fn save(&self, place: &Place) -> io::Result<()> {
        shoal_process::write_atomic(&place.state_path(), &serde_json::to_vec(self)?)
    }
}

/// Shares a [`Place`] with tasks.
pub(crate) type SharedPlace = Arc<Place>;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    struct Machine {
        dir: tempfile::TempDir,
        place: Place,
    }

    impl Machine {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let app = AppName::new("web").unwrap();
            let machine = MachineName::new("m1").unwrap();
            let place = Place::open(dir.path(), &app, &machine, Duration::from_secs(5)).unwrap();
            Self { dir, place }
        }

        fn script(&self, name: &str, text: &str) -> PathBuf {
            let path = self.dir.path().join(name);
            fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            path
        }
    }

    fn build(health: Option<&str>) -> Build {
        Build {
            revision: Revision { epoch: 0, number: 1 },
            artifact: ArtifactId::EMPTY,
            activation: Activation::Run { args: vec!["hello".into()] },
            health: health.map(|command| HealthCheck { command: command.into(), timeout_s: 10 }),
        }
    }

    #[tokio::test]
    async fn a_healthy_program_runs_with_its_arguments_and_environment() {
        let machine = Machine::new();
        let text = "echo \"$1 $SHOAL_APP\" > \"$SHOAL_RUN_DIR/said\"; exec sleep 1000";
        let file = machine.script("v1", text);
        let build = build(Some("grep -q 'hello web' \"$SHOAL_RUN_DIR/said\""));
        assert!(machine.place.activate(&build, &file).await.unwrap().is_some());
        assert_eq!(fs::read_link(machine.dir.path().join("apps/web/current")).unwrap(), file);
        machine.place.stop().await;
        assert!(Program::adopt(&machine.place.run_dir).is_none());
    }

    #[tokio::test]
    async fn a_program_that_fails_is_told_with_its_reason_and_leaves_nothing_running() {
        let machine = Machine::new();
        let reason = |result: Result<Option<Program>, String>| result.err().unwrap();
        let file = machine.script("bad", "exit 3");
        let said = reason(machine.place.activate(&build(None), &file).await);
        assert!(said.contains("exited with 3"), "{said}");
        let said = reason(machine.place.activate(&build(Some("false")), &file).await);
        assert!(said.contains("before it was healthy"), "{said}");
        let mut sick = build(Some("echo sick; exit 1"));
        sick.health.as_mut().unwrap().timeout_s = 1;
        let file = machine.script("sick", "exec sleep 1000");
        let said = reason(machine.place.activate(&sick, &file).await);
        assert!(said.contains("sick") && said.contains("after 1 s"), "{said}");
        assert!(Program::adopt(&machine.place.run_dir).is_none());
        let file = machine.script("once", "exit 0");
        assert!(machine.place.activate(&build(None), &file).await.is_ok(), "0 at once is well");
    }

    #[tokio::test]
    async fn a_command_that_leaves_something_running_has_ended_all_the_same() {
        let machine = Machine::new();
        let file = machine.script("v1", "exit 0");
        let script = "sleep 1000 & echo $! > \"$SHOAL_RUN_DIR/left\"; echo done";
        let build =
            Build { activation: Activation::Command { command: script.into() }, ..build(None) };
        assert!(machine.place.activate(&build, &file).await.unwrap().is_none());
        let left = fs::read_to_string(machine.place.run_dir.join("left")).unwrap();
        let left = Pid::from_raw(left.trim().parse().unwrap()).unwrap();
        rustix::process::kill_process(left, Signal::KILL).expect("it runs on");
    }

    #[tokio::test]
    async fn a_new_build_takes_the_place_of_the_old_one() {
        let machine = Machine::new();
        let file = machine.script("v1", "exec sleep 1000");
        let first = machine.place.activate(&build(None), &file).await.unwrap().unwrap();
        let file = machine.script("v2", "exec sleep 1000");
        machine.place.activate(&build(None), &file).await.unwrap();
        assert!(!first.ended().await.is_success());
        assert_eq!(fs::read_link(machine.dir.path().join("apps/web/current")).unwrap(), file);
        machine.place.stop().await;
    }
}
