//! The worker process: takes jobs for as long as it has room.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use prometheus::{IntCounter, IntCounterVec, IntGauge, Registry};
use serde::Serialize;
use shoal_client::{Client, types::ClaimRequest};
use shoal_pki::Role;
use shoal_process::{Membership, Meters};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::{
    config::{Args, Config},
    git::Git,
    job,
    processes::{Signs, adopt_orphans, end},
    user::BuildUser,
};

/// How long a question for a job waits at the coordinator: DESIGN's 5 s.
const CLAIM_WAIT_S: u32 = 5;

/// How long to wait after a coordinator did not answer, at first and at most.
const RETRY_MIN: Duration = Duration::from_millis(250);
const RETRY_MAX: Duration = Duration::from_secs(5);

/// What the metrics page shows; the names are documented in the README.
pub(crate) struct Metrics {
    registry: Registry,
    ended: IntCounterVec,
    running: IntGauge,
    pub(crate) uploaded_bytes: IntCounter,
}

impl Metrics {
    fn new() -> prometheus::Result<Self> {
        let meters = Meters::default();
        Ok(Self {
            ended: meters.counters(
                "shoal_worker_attempts_total",
                "Attempts that ended, by how.",
                "outcome",
            )?,
            running: meters.gauge("shoal_worker_running_jobs", "Jobs being worked on.")?,
            uploaded_bytes: meters.counter(
                "shoal_worker_uploaded_bytes_total",
                "Bytes of part objects written to the main bucket.",
            )?,
            registry: meters.registry,
        })
    }

    pub(crate) fn ended(&self, outcome: &str) {
        self.ended.with_label_values(&[outcome]).inc();
    }
}

/// What all attempts share.
pub(crate) struct Worker {
    pub(crate) config: Config,
    pub(crate) client: Client,
    pub(crate) git: Git,
    pub(crate) user: Option<BuildUser>,
    pub(crate) builds: PathBuf,
    pub(crate) logs: PathBuf,
    pub(crate) metrics: Metrics,
}

/// What the worker writes into `addresses.json`.
#[derive(Serialize)]
struct Addresses {
    metrics: Option<std::net::SocketAddr>,
}

/// Ends what an earlier life of the worker left: processes of its builds, their directories and logs.
fn clean(builds: &Path, logs: &Path) -> anyhow::Result<()> {
    let killed = end(&Signs { dir: builds, leader: None, orphans: false });
    if killed > 0 {
        tracing::warn!(killed, "ended processes of builds that an earlier worker left");
    }
    for dir in [builds, logs] {
        if dir.exists() {
            std::fs::remove_dir_all(dir)
                .with_context(|| format!("cannot remove {}", dir.display()))?;
        }
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    Ok(())
}

/// Runs a worker until SIGTERM or SIGINT; a build under way is given back.
///
/// # Errors
/// One line that says what is wrong with the configuration or the identity.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let config: Config = shoal_process::load_config(args.config.as_deref(), &args)?;
    config.check().map_err(shoal_process::WrongConfig::from)?;
    let token = shoal_process::shutdown()?;
    let membership = Arc::new(Membership::load(&config.identity)?);
    let identity = membership.identity();
    let member = identity.member();
    anyhow::ensure!(
        member.role == Role::Worker,
        "the certificate in {} is a {}'s, not a worker's",
        config.identity.display(),
        member.role
    );
    std::fs::create_dir_all(&config.data_dir)
        .with_context(|| format!("cannot make {}", config.data_dir.display()))?;
    let data_dir = config.data_dir.canonicalize()?;
    // One worker a directory: the other's builds would be taken for leftovers.
    let lock_path = data_dir.join("lock");
    let lock = std::fs::File::create(&lock_path)?;
    lock.try_lock().map_err(|_| {
        anyhow::anyhow!("another worker uses {}: give each its own data_dir", data_dir.display())
    })?;
    let user = BuildUser::find(&config.build_user, &data_dir)?;
    let builds = data_dir.join("builds");
    let logs = data_dir.join("logs");
    clean(&builds, &logs)?;
    if config.slots == 1 {
        adopt_orphans();
    }
    let git = Git::open(&data_dir, Duration::from_secs(config.fetch_timeout_s))?;
    let client = Client::of(&config.coordinators, membership.credentials())?;
    let slots = config.slots;
    let metrics_listen = config.metrics_listen;
    let metrics = Metrics::new()?;
    let registry = metrics.registry.clone();
    let worker = Arc::new(Worker { config, client, git, user, builds, logs, metrics });
    let metrics = match metrics_listen {
        Some(listen) => Some(shoal_process::serve_metrics(listen, registry, token.clone()).await?),
        None => None,
    };
    shoal_process::announce(&data_dir, &Addresses { metrics })?;
    tracing::info!(machine = %member.machine, "ready");
    tokio::select! {
        () = claim(&worker, slots, &token) => {}
        () = follow_trust(&worker, &membership) => {}
    }
    drop(lock);
    Ok(())
}

/// Goes by the newest trust, and keeps the certificate renewed. Never ends.
async fn follow_trust(worker: &Worker, membership: &Arc<Membership>) {
    let held = || membership.trust().number();
    let take = |bundles: &[Vec<u8>]| {
        tokio::task::block_in_place(|| membership.take_trust(bundles, "the coordinator"));
    };
    let ask = || async {
        let reply = worker.client.renew().await.map_err(|error| error.to_string())?;
        Ok(reply.certificate)
    };
    let reconnect = async {
        let mut changes = membership.watch();
        while changes.changed().await.is_ok() {
            worker.client.reconnect();
        }
    };
    let renewed = shoal_process::keep_renewed(membership.clone(), ask);
    tokio::join!(worker.client.follow_trust(held, take), renewed, reconnect);
}

async fn claim(worker: &Arc<Worker>, slots: usize, token: &CancellationToken) {
    let room = Arc::new(Semaphore::new(slots));
    let mut running = tokio::task::JoinSet::new();
    let request = ClaimRequest {
        incarnation: format!("{:032x}", rand::random::<u128>()),
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        wait_s: CLAIM_WAIT_S,
    };
    let mut pause = RETRY_MIN;
    loop {
        let place = token.run_until_cancelled(room.clone().acquire_owned()).await;
        let Some(Ok(place)) = place else { break };
        // An answer on its way when the worker is stopped is a job that the reaper finds: ask to the end.
        let claimed = worker.client.claim(&request).await;
        while running.try_join_next().is_some() {}
        match claimed {
            Ok(Some(claimed)) => {
                pause = RETRY_MIN;
                let (worker, token) = (worker.clone(), token.clone());
                running.spawn(async move {
                    let _place = place;
                    worker.metrics.running.inc();
                    job::work(worker.clone(), claimed, token).await;
                    worker.metrics.running.dec();
                });
            }
            Ok(None) => pause = RETRY_MIN,
            Err(error) => {
                tracing::warn!(%error, "cannot ask for a job");
                let wait = pause.mul_f64(rand::random_range(0.5..1.5));
                token.run_until_cancelled(tokio::time::sleep(wait)).await;
                pause = (pause * 2).min(RETRY_MAX);
            }
        }
        if token.is_cancelled() {
            break;
        }
    }
    while running.join_next().await.is_some() {}
}
