//! An upgrade in the order that OPERATIONS.md gives, on PostgreSQL, with a build and a deployment after each step: from the
//! program that `SHOAL_BEFORE` names (`.ci/upgrade REVISION` builds it), or from this one, which shows the order alone.

use std::{env, fs, path::PathBuf};

use serde_json::Value;
use shoal_test_postgres::Database;

use crate::harness::{Cluster, Repo, SHOAL, Shape, wait_for};

struct Upgrade {
    cluster: Cluster,
    repo: Repo,
    /// The operators' program, the last that is replaced.
    operators: PathBuf,
    /// What was deployed.
    artifacts: Vec<String>,
}

impl Upgrade {
    fn shoal(&self, args: &[&str]) -> String {
        self.cluster.shoal_of(&self.operators, args)
    }

    fn json(&self, args: &[&str]) -> Value {
        let args = [args, &["--json"]].concat();
        serde_json::from_str(&self.shoal(&args)).unwrap()
    }

    /// Builds a new version and deploys it, as operators do, and sees it run on every machine.
    async fn a_deployment_works(&mut self, version: &str) {
        let commit = self.repo.commit_version(version).to_string();
        let job = self.json(&["build", "web", &commit, "--wait"]);
        assert_eq!(job["status"], "SUCCEEDED", "{version}: {job}");
        let artifact = format!("web/{}-{}", &commit[..12], job["id"]);
        self.shoal(&["artifact", &artifact, "--wait"]);
        let rollout = self.json(&["deploy", "web", &artifact, "--wait"]);
        assert_eq!(rollout["status"], "SUCCEEDED", "{version}: {rollout}");
        self.artifacts.push(artifact);
        self.runs(version).await;
    }

    async fn runs(&self, version: &str) {
        for agent in &self.cluster.agents {
            let path = agent.data_dir().join("run/web/version");
            wait_for(&format!("{} to run {version}", agent.name), async || {
                let says = fs::read_to_string(&path).unwrap_or_default();
                if says.starts_with(version) { Ok(()) } else { Err(says) }
            })
            .await;
        }
    }

    /// The ids of the processes that run the app, by machine.
    fn pids(&self) -> Vec<String> {
        let pid = |dir: PathBuf| fs::read_to_string(dir.join("run/web/pid")).unwrap();
        self.cluster.agents.iter().map(|agent| pid(agent.data_dir())).collect()
    }

    async fn worker_is(&self, state: &str) {
        wait_for(&format!("a worker to be {state}"), async || {
            let workers = self.json(&["workers"]);
            if workers[0]["state"] == state { Ok(()) } else { Err(workers) }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_process_is_replaced_in_its_order_and_deployments_go_on() {
    let before: PathBuf = env::var_os("SHOAL_BEFORE").unwrap_or_else(|| SHOAL.into()).into();
    let now = PathBuf::from(SHOAL);
    let database = Database::create().await.unwrap();
    let shape = Shape {
        program: before.clone(),
        regions: 2,
        agents: 4,
        workers: 1,
        coordinators: 2,
        coordinator_extra: format!("database = \"{}\"\n", database.url()),
        ..Shape::default()
    };
    let cluster = Cluster::start(shape).await;
    let repo = Repo::new(cluster.root().join("repo"));
    let mut upgrade = Upgrade { cluster, repo, operators: before, artifacts: vec![] };
    let repository = upgrade.repo.path.display().to_string();
    upgrade.shoal(&[
        "app",
        "set",
        "web",
        "--repository",
        &repository,
        "--build-command",
        "sh build.sh",
        "--output",
        "out/app",
        "--run",
        "--health",
        "test -s \"$SHOAL_RUN_DIR/version\"",
    ]);
    upgrade.a_deployment_works("before").await;
    let pids = upgrade.pids();

    // Coordinators: all stop, one starts, then the other.
    upgrade.cluster.set_program(&now);
    assert!(upgrade.cluster.coordinator.stop().await.success());
    assert!(upgrade.cluster.others[0].stop().await.success());
    upgrade.cluster.restart_coordinator().await;
    upgrade.cluster.restart_other(0).await;
    assert_eq!(upgrade.pids(), pids, "machines need none of them");
    upgrade.a_deployment_works("coordinators").await;

    // Region processes, one after the other, where they were.
    for at in 0..upgrade.cluster.regions.len() {
        let (region, process) = (at / 2, at % 2);
        let sibling = at - process + (1 - process);
        let gossip = upgrade.cluster.regions[sibling].address("gossip").await;
        let listen = upgrade.cluster.regions[at].address("data").await;
        assert!(upgrade.cluster.regions[at].stop().await.success());
        let mut started = upgrade.cluster.start_region(region, process, &[gossip], Some(listen));
        started.address("data").await;
        upgrade.cluster.regions[at] = started;
    }
    upgrade.a_deployment_works("regions").await;

    // The worker, drained.
    upgrade.shoal(&["drain", "--worker", "w1"]);
    upgrade.worker_is("DRAINED").await;
    assert!(upgrade.cluster.workers[0].stop().await.success());
    upgrade.cluster.workers[0] = upgrade.cluster.start_worker(0);
    upgrade.shoal(&["undrain", "--worker", "w1"]);
    upgrade.a_deployment_works("worker").await;

    // Agents: the programs run on.
    let pids = upgrade.pids();
    for at in 0..upgrade.cluster.agents.len() {
        assert!(upgrade.cluster.agents[at].stop().await.success());
        upgrade.cluster.restart_agent(at).await;
    }
    assert_eq!(upgrade.pids(), pids, "programs run on");
    upgrade.a_deployment_works("agents").await;

    // Operators, who find all of it, and can go back to what was before.
    upgrade.operators = now;
    upgrade.a_deployment_works("operators").await;
    let history = upgrade.json(&["history", "--app", "web"]);
    let history = history.to_string();
    for artifact in &upgrade.artifacts {
        assert!(history.contains(artifact.as_str()), "{artifact} is not in {history}");
    }
    let first = upgrade.artifacts[0].clone();
    upgrade.shoal(&["rollback", "web", &first, "--wait"]);
    upgrade.runs("before").await;
}
