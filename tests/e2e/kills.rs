//! kill -9 of workers, coordinators, PostgreSQL and etcd, at random, under load: nothing acknowledged is lost, nothing is
//! done twice, and everything ends.
//!
//! `SHOAL_KILLS` says how often, `SHOAL_KILLS_SEED` (which each run prints) makes the same choices again.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use shoal_client::{
    Client, ClientError, EventQuery,
    types::{App, BuildRequest, DeployRequest, Job, Rollout},
};
use shoal_goals::{Entry, EtcdStore, GoalStore as _};
use shoal_proto::{
    AppName, ArtifactId, CommitSha, Revision, codec,
    goal::GOAL_MAX_BYTES,
    state::{JobStatus, RolloutStatus},
};
use shoal_test_postgres::{Database, Server as Postgres};

use crate::harness::{Cluster, Repo, Shape, plain_app, wait_for};

/// How often something is killed where `SHOAL_KILLS` does not say.
const KILLS_DEFAULT: u64 = 12;

/// How many jobs are open at a time: more than there are workers, so that some wait and some run.
const OPEN_JOBS: usize = 8;

/// How many jobs end, or goals are set, at most between two things that happen to the processes.
const PROGRESS_MAX: u64 = 2;

/// How often what goes on by itself is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);

const APPS: [&str; 2] = ["web", "api"];

/// Choices that a seed makes again.
struct Chance(blake3::OutputReader);

impl Chance {
    fn new(seed: u64) -> Self {
        Self(blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof())
    }

    fn below(&mut self, end: u64) -> u64 {
        let mut bytes = [0; 8];
        self.0.fill(&mut bytes);
        u64::from_le_bytes(bytes) % end
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Target {
    Worker(usize),
    Coordinator,
    OtherCoordinator,
    Postgres,
    Etcd,
}

const TARGETS: [Target; 6] = [
    Target::Worker(0),
    Target::Worker(1),
    Target::Coordinator,
    Target::OtherCoordinator,
    Target::Postgres,
    Target::Etcd,
];

/// What was asked for and acknowledged while processes died.
#[derive(Default)]
struct Load {
    over: AtomicBool,
    /// Jobs that ended and goals that were set.
    progress: AtomicU64,
    jobs: Mutex<Vec<Job>>,
    goals: Mutex<Vec<Rollout>>,
    /// Calls that were not answered: what they asked for may be done or not.
    unanswered: AtomicU64,
    /// The newest build of each app.
    built: Mutex<BTreeMap<AppName, String>>,
}

impl Load {
    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    fn progress(&self) -> u64 {
        self.progress.load(Ordering::Relaxed)
    }

    fn goes_on(&self) {
        self.progress.fetch_add(1, Ordering::Relaxed);
    }

    /// An answer; none when there was none. A coordinator that refuses what is right is an error of its own.
    fn answered<T>(&self, what: &str, answer: Result<T, ClientError>) -> Option<T> {
        match answer {
            Ok(answer) => Some(answer),
            Err(error) if error.is_transient() => {
                self.unanswered.fetch_add(1, Ordering::Relaxed);
                None
            }
            Err(error) => panic!("{what}: {error:?}"),
        }
    }

    async fn waits_for(&self, more: u64) {
        let wanted = self.progress() + more;
        wait_for("jobs to end and goals to be set", async || match self.progress() {
            now if now >= wanted => Ok(()),
            now => Err(format!("{now} of {wanted}")),
        })
        .await;
    }
}

fn app(name: &str, repo: &Repo) -> App {
    App {
        repository: repo.path.display().to_string(),
        build_command: "sh build.sh".into(),
        output: "out/app".into(),
        max_attempts: Some(100),
        ..plain_app(name)
    }
}

/// Keeps some builds open, each of a commit of its own.
async fn build(load: Arc<Load>, client: Client, repo: Repo) {
    let mut open: Vec<Job> = vec![];
    let mut commits = 0;
    while !load.is_over() {
        while open.len() < OPEN_JOBS {
            commits += 1;
            let commit = repo.commit(&format!("mkdir -p out; echo {commits} >out/app\n"));
            let app = AppName::new(APPS[commits % APPS.len()]).unwrap();
            let answer = client.build(&BuildRequest::new(app, commit)).await;
            let Some(job) = load.answered("a build", answer) else { break };
            load.jobs.lock().unwrap().push(job.clone());
            open.push(job);
        }
        let mut left = vec![];
        for job in open {
            match load.answered("a job", client.job(job.id).await) {
                Some(now) if now.status.is_terminal() => {
                    load.built.lock().unwrap().insert(now.app, now.name);
                    load.goes_on();
                }
                _ => left.push(job),
            }
        }
        open = left;
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Deploys the newest builds, app after app.
async fn deploy(load: Arc<Load>, client: Client) {
    while !load.is_over() {
        let built: Vec<_> = {
            let mut built = load.built.lock().unwrap();
            std::mem::take(&mut *built).into_iter().collect()
        };
        for (app, artifact) in built {
            while !load.is_over() {
                let found = client.artifact(&artifact).await;
                if load.answered("an artifact", found).is_some_and(|found| found.deployable) {
                    break;
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
            if load.is_over() {
                return;
            }
            let answer = client.deploy(&DeployRequest { app, artifact }).await;
            if let Some(rollout) = load.answered("a deployment", answer) {
                load.goals.lock().unwrap().push(rollout);
                load.goes_on();
            }
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Everything that can be killed.
struct World {
    cluster: Cluster,
    postgres: Postgres,
    etcd: shoal_test_etcd::Server,
}

impl World {
    fn kill(&mut self, target: Target) {
        match target {
            Target::Worker(at) => self.cluster.workers[at].kill(),
            Target::Coordinator => self.cluster.coordinator.kill(),
            Target::OtherCoordinator => self.cluster.others[0].kill(),
            Target::Postgres => self.postgres.kill().unwrap(),
            Target::Etcd => self.etcd.kill().unwrap(),
        }
    }

    async fn start(&mut self, target: Target) {
        match target {
            Target::Worker(at) => self.cluster.workers[at] = self.cluster.start_worker(at),
            Target::Coordinator => self.cluster.restart_coordinator().await,
            Target::OtherCoordinator => self.cluster.restart_other(0).await,
            Target::Postgres => self.postgres.start_again().await.unwrap(),
            Target::Etcd => self.etcd.start_again().await.unwrap(),
        }
    }

    /// Nobody but whoever was killed may have ended.
    fn all_run(&mut self) {
        let cluster = &mut self.cluster;
        let all = cluster.workers.iter_mut().chain(&mut cluster.regions).chain(&mut cluster.agents);
        for process in all.chain(&mut cluster.others).chain([&mut cluster.coordinator]) {
            let ended = process.ended();
            assert!(ended.is_none(), "{} ended by itself with {ended:?}", process.name);
        }
    }
}

async fn world() -> World {
    let postgres = Postgres::start(&[]).await.unwrap();
    let database = Database::create_on(&postgres.url("postgres")).await.unwrap();
    let etcd = shoal_test_etcd::Server::start().await.unwrap();
    let goals = format!("goals = \"{}\"\n", etcd.url());
    let cluster = Cluster::start(Shape {
        regions: 2,
        region_processes: 1,
        agents: 2,
        workers: 2,
        coordinators: 2,
        coordinator_extra: format!(
            "database = \"{}\"\n{goals}heartbeat_s = 0.5\nloss_window_s = 2.0\nreaper_interval_s = 0.3\n\
             reap_jobs = 100\nbackoff_s = 0.1\nbackoff_max_s = 0.5\nreplication_interval_s = 1.0\ncopy_owned_s = 2.0\n",
            database.url()
        ),
        region_extra: goals,
        ..Shape::default()
    })
    .await;
    World { cluster, postgres, etcd }
}

/// A number of the environment.
fn given(name: &str) -> Option<u64> {
    let text = env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} = {text}: give a whole number")))
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_is_lost_or_done_twice_whoever_is_killed() {
    let kills = given("SHOAL_KILLS").unwrap_or(KILLS_DEFAULT);
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let seed = given("SHOAL_KILLS_SEED").unwrap_or(since.as_secs());
    println!("{kills} kills; again with SHOAL_KILLS={kills} SHOAL_KILLS_SEED={seed}");
    let mut chance = Chance::new(seed);
    let mut world = world().await;
    let repo = Repo::new(world.cluster.root().join("repo"));
    for name in APPS {
        world.cluster.set_app(&app(name, &repo)).await;
    }
    let load = Arc::new(Load::default());
    let builds = tokio::spawn(build(load.clone(), world.cluster.client_of_all(), repo));
    let deploys = tokio::spawn(deploy(load.clone(), world.cluster.client_of_all()));
    load.waits_for(1).await;

    let start = Instant::now();
    let mut killed = BTreeMap::<Target, u64>::new();
    for _ in 0..kills {
        let target = TARGETS[chance.below(TARGETS.len() as u64) as usize];
        world.kill(target);
        *killed.entry(target).or_default() += 1;
        // Without a database nothing goes on; without any other, everything does.
        if target != Target::Postgres {
            load.waits_for(chance.below(PROGRESS_MAX + 1)).await;
        }
        world.start(target).await;
        load.waits_for(chance.below(PROGRESS_MAX + 1)).await;
        world.all_run();
    }
    let took = start.elapsed();
    load.over.store(true, Ordering::Relaxed);
    builds.await.unwrap();
    deploys.await.unwrap();

    let all_jobs = jobs_are_right(&world.cluster, &load).await;
    let all_goals = goals_are_right(&world, &load).await;
    println!(
        "killed {kills} times in {:.0} s: {killed:?}; {} jobs and {} goals acknowledged, {all_jobs} and {all_goals} made, \
         {} calls unanswered; none lost, none finished twice, all ended",
        took.as_secs_f64(),
        load.jobs.lock().unwrap().len(),
        load.goals.lock().unwrap().len(),
        load.unanswered.load(Ordering::Relaxed),
    );
}

/// Every job that was acknowledged is there and succeeded, once, and has one artifact; returns how many there are.
async fn jobs_are_right(cluster: &Cluster, load: &Load) -> usize {
    let client = &cluster.client;
    let all = wait_for("all jobs to end", async || {
        let all = client.jobs(None, u32::MAX).await.map_err(|error| error.to_string())?;
        match all.iter().find(|job| !job.status.is_terminal()) {
            None => Ok(all),
            Some(open) => Err(format!("{open:?}")),
        }
    })
    .await;
    let by_id: BTreeMap<i64, &Job> = all.iter().map(|job| (job.id, job)).collect();
    assert_eq!(by_id.len(), all.len(), "a job is listed twice");
    for acknowledged in load.jobs.lock().unwrap().iter() {
        let job = by_id.get(&acknowledged.id).unwrap_or_else(|| panic!("lost: {acknowledged:?}"));
        let is = |job: &Job| (job.app.clone(), job.commit.clone(), job.name.clone());
        assert_eq!(is(job), is(acknowledged));
    }
    for job in &all {
        let job = client.job(job.id).await.unwrap();
        assert_eq!(job.status, JobStatus::Succeeded, "{job:?}");
        let numbers: Vec<_> = job.attempts.iter().map(|attempt| attempt.attempt).collect();
        assert_eq!(numbers, (1..=job.attempt).collect::<Vec<_>>(), "{job:?}");
        let ends: Vec<_> = job.attempts.iter().map(|attempt| attempt.outcome.as_deref()).collect();
        let (last, earlier) = ends.split_last().unwrap();
        assert_eq!(*last, Some("succeeded"), "{job:?}");
        assert!(earlier.iter().all(|end| matches!(end, Some("lost" | "failed"))), "{job:?}");
    }
    let commits: BTreeSet<(&AppName, &CommitSha)> =
        all.iter().map(|job| (&job.app, &job.commit)).collect();
    assert_eq!(commits.len(), all.len(), "a build that was asked for once is two jobs");
    let artifacts = client.artifacts(None, u32::MAX).await.unwrap();
    let made: BTreeMap<i64, ArtifactId> =
        artifacts.iter().map(|made| (made.job.unwrap(), made.artifact)).collect();
    assert_eq!(made.len(), artifacts.len(), "a job has two artifacts");
    let said: BTreeMap<i64, ArtifactId> =
        all.iter().map(|job| (job.id, job.artifact.unwrap())).collect();
    assert_eq!(made, said);
    ended_once(client, "build:completed", all.len(), |event| event.job).await;
    all.len()
}

/// There is one event of this kind of each of `count` jobs or rollouts, and events have no gap.
async fn ended_once(
    client: &Client,
    kind: &str,
    count: usize,
    of: impl Fn(&shoal_client::types::Event) -> Option<i64>,
) {
    wait_for(&format!("{count} events {kind}"), async || {
        let events = client.events(&EventQuery::default(), u32::MAX).await;
        let events = events.map_err(|error| error.to_string())?;
        let ids: Vec<_> = events.iter().rev().map(|event| event.id).collect();
        assert_eq!(ids, (1..=ids.len() as i64).collect::<Vec<_>>(), "a gap in the events");
        let ends: Vec<_> = events.iter().filter(|event| event.kind == kind).map(&of).collect();
        let distinct: BTreeSet<_> = ends.iter().collect();
        assert_eq!(distinct.len(), ends.len(), "{kind} was told twice");
        if ends.len() == count { Ok(()) } else { Err(format!("{} events", ends.len())) }
    })
    .await;
}

/// The goals in a region process's files.
fn kept(cluster: &Cluster, region: usize) -> BTreeMap<AppName, (Revision, ArtifactId)> {
    let files = fs::read_dir(cluster.regions[region].data_dir().join("goals")).unwrap();
    let files = files.map(|file| file.unwrap().path());
    let goals =
        files.filter(|path| path.extension().is_some_and(|end| end == "goal")).map(|path| {
            let signed = codec::decode(&fs::read(path).unwrap(), GOAL_MAX_BYTES).unwrap();
            meaning(&Entry::of(signed).unwrap())
        });
    goals.collect()
}

fn meaning(entry: &Entry) -> (AppName, (Revision, ArtifactId)) {
    let goal = entry.signed.decode_unverified().unwrap();
    (entry.app.clone(), (entry.revision, goal.artifact))
}

/// Every goal that was acknowledged is a rollout that ended, and the regions' and etcd's goals are the database's; returns
/// how many rollouts there are.
async fn goals_are_right(world: &World, load: &Load) -> usize {
    let cluster = &world.cluster;
    let client = &cluster.client;
    let acknowledged = load.goals.lock().unwrap().clone();
    let mut newest = BTreeMap::<AppName, Revision>::new();
    for goal in &acknowledged {
        let rollout = cluster.rollout_ends(goal.id).await;
        let is =
            |of: &Rollout| (of.app.clone(), of.revision, of.artifact, of.artifact_name.clone());
        assert_eq!(is(&rollout), is(goal));
        let before = newest.insert(goal.app.clone(), goal.revision);
        assert!(before.is_none_or(|before| before < goal.revision), "{goal:?} after {before:?}");
    }
    let status = client.status(None).await.unwrap();
    let present: Vec<Rollout> = status.into_iter().filter_map(|app| app.rollout).collect();
    for rollout in &present {
        let told = newest.get(&rollout.app);
        assert!(told.is_none_or(|told| *told <= rollout.revision), "a goal was lost: {rollout:?}");
    }
    // Of each app those before the present one, whether or not their setting was answered.
    let last = present.iter().map(|rollout| rollout.id).max().unwrap();
    let mut revisions = BTreeSet::new();
    let mut count = 0;
    for id in 1..=last {
        // Numbers have gaps: one that was given to a transaction that was killed is not given again.
        match client.rollout(id).await {
            Err(shoal_client::ClientError::Refused { status: 404, .. }) => continue,
            known => drop(known.unwrap()),
        }
        count += 1;
        let rollout = cluster.rollout_ends(id).await;
        let is_present = present.iter().any(|present| present.id == id);
        let wanted = if is_present {
            matches!(rollout.status, RolloutStatus::Succeeded)
        } else {
            matches!(rollout.status, RolloutStatus::Succeeded | RolloutStatus::Superseded)
        };
        assert!(wanted, "{rollout:?}");
        assert!(revisions.insert((rollout.app, rollout.revision)), "a revision is given twice");
    }
    ended_once(client, "deploy:completed", count, |event| event.rollout).await;
    let goals: BTreeMap<AppName, (Revision, ArtifactId)> = present
        .iter()
        .map(|rollout| (rollout.app.clone(), (rollout.revision, rollout.artifact)))
        .collect();
    for region in 0..cluster.regions.len() {
        wait_for(&format!("the goals of region {region}"), async || match kept(cluster, region) {
            found if found == goals => Ok(()),
            found => Err((found, goals.clone())),
        })
        .await;
    }
    let store = EtcdStore::open(&world.etcd.url(), "test").unwrap();
    wait_for("the goals in etcd", async || {
        let listed = store.list().await.map_err(|error| error.to_string())?;
        let found: BTreeMap<_, _> = listed.entries.iter().map(meaning).collect();
        if found == goals { Ok(()) } else { Err(format!("{found:?} instead of {goals:?}")) }
    })
    .await;
    count
}
