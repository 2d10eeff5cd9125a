//! What an operator does with a cluster and sees of it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use shoal_client::types::{App, Artifact, DeployRequest, Job, Machine, MachineApp, Rollout};
use shoal_proto::{
    AppName,
    state::{MachineState, RolloutStatus},
};

use super::{Cluster, SHOAL, wait_for};

impl Cluster {
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
        self.shoal_of(Path::new(SHOAL), args)
    }

    /// The same with another program.
    pub fn shoal_of(&self, program: &Path, args: &[&str]) -> String {
        let output = self.shoal_output(program, args);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "shoal {args:?}: {stderr}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs an operator's command that must fail with exit code 1 and one line; returns the line.
    pub fn shoal_fails(&self, args: &[&str]) -> String {
        self.shoal_fails_with(1, args)
    }

    /// The same with another exit code.
    pub fn shoal_fails_with(&self, code: i32, args: &[&str]) -> String {
        let output = self.shoal_output(Path::new(SHOAL), args);
        let stderr = String::from_utf8_lossy(&output.stderr).trim().to_string();
        assert_eq!(output.status.code(), Some(code), "shoal {args:?}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "shoal {args:?}: {stderr}");
        stderr
    }

    fn shoal_output(&self, program: &Path, args: &[&str]) -> std::process::Output {
        Command::new(program)
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
