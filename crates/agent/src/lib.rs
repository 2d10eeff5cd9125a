//! The agent: the process on every target machine.
//!
//! It follows the goals of the apps that the machine's labels match (`goals`: signed files; they arrive by
//! gossip, from neighbours and, for certain, by polling: `link`). For each app one task (`app`) brings
//! the machine to the goal: artifact fetched and verified, its wave open, switched over, started, healthy; or
//! back to the build before (`activate`, `program`). What it does is told to the region until it is kept
//! (`reports`).
//!
//! Fetching is the `engine`'s: one task owns the swarm policy (`shoal-swarm`), turns what comes from the sockets into its
//! events and its actions into requests. It asks the region processes (`regions`) for neighbours and leases, and a
//! piece goes from the wire or the bucket (`origin`) to the disk through `fetch`. Pieces of all artifacts share one endpoint, one
//! policy and one memory budget.
//!
//! Whom it believes changes while it runs, and its certificate is renewed (`trust`).
//!
//! Only the certificate, the goal files and the store make up the agent's state: killed at any moment, it goes
//! on from there. Where its neighbours were (`neighbours`) helps it when no region process is there to ask. The
//! programs that it started are not its children in that sense: they run on.

mod activate;
mod app;
mod config;
mod control;
mod disk;
mod engine;
mod fetch;
mod goals;
mod limits;
mod link;
mod machine;
mod metrics;
mod neighbours;
mod origin;
mod program;
mod regions;
mod reports;
mod socket;
mod throttle;
mod trust;

use std::{collections::HashMap, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use anyhow::Context as _;
use serde::Serialize;
use shoal_gossip::{Gossip, GossipConfig};
use shoal_origin::Bucket;
use shoal_pki::Role;
use shoal_process::Membership;
use shoal_proto::{
    AppName,
    goal::{Goal, labels},
    peer::PeerAddr,
    region::MachineInfo,
};
use shoal_store::{Store, StoreConfig};
use shoal_transport::{Endpoint, EndpointConfig, Pacer};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
    task::{JoinError, JoinSet},
};
use tokio_util::sync::CancellationToken;

pub use config::{Args, Config};
pub use control::Imported;
pub use limits::Limit;
pub use throttle::{LimitsReport, Way};

use activate::{AppState, Place};
use app::{AppTask, Waves};
use engine::{Engine, Parts};
use machine::{Machine, Retention};
use neighbours::Neighbours;
use origin::Origin;
use regions::{REGION_PROCESSES_MAX, Regions};
use throttle::Throttle;

/// How often the region processes are told again that this machine holds its apps' artifacts.
const ANNOUNCE_INTERVAL: Duration = Duration::from_secs(240);

/// How long to wait before an app whose directories could not be made is tried again.
const PLACE_RETRY: Duration = Duration::from_secs(15);

/// What the agent writes into `addresses.json`.
#[derive(Serialize)]
struct Addresses {
    data: SocketAddr,
    gossip: SocketAddr,
    metrics: Option<SocketAddr>,
}

/// Runs the agent until SIGTERM or SIGINT.
///
/// # Errors
/// One line that says what is wrong with the configuration, the identity or the machine.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let config = Config::load(&args)?;
    let token = shoal_process::shutdown()?;
    shoal_process::hold_spare_threads(token.clone())?;
    // From the start: whoever asks for the file to be read again must not end the agent.
    let hangup = signal(SignalKind::hangup())?;
    let (machine, (gossip, heard), driver) = start(config.clone(), &token).await?;

    let mut tasks = JoinSet::new();
    tasks.spawn(driver);
    for imported in machine.retention.imported() {
        control::seed(&machine, imported).await;
    }
    tasks.spawn(link::poll(machine.clone()));
    tasks.spawn(link::report(machine.clone()));
    tasks.spawn(link::gossip(machine.clone(), heard));
    tasks.spawn(trust::keep(machine.clone(), gossip.clone()));
    tasks.spawn(trust::renew(machine.clone()));
    tasks.spawn(announce_held(machine.clone()));
    tasks.spawn(machine.neighbours.clone().keep());
    tasks.spawn(machine.throttle.clone().watch());
    tasks.spawn(machine.throttle.clone().reload(args, config, hangup));
    tasks.spawn(count_gossip(machine.clone(), gossip.clone()));
    tasks.spawn(socket::watch(machine.endpoint.clone(), machine.metrics.clone()));
    tasks.spawn({
        let machine = machine.clone();
        async move {
            if let Err(error) = control::serve(machine).await {
                tracing::error!(error = format!("{error:#}"), "the local socket failed");
            }
        }
    });
    let failed = tokio::select! {
        () = token.cancelled() => None,
        () = follow_goals(machine.clone()) => None,
        error = panicked(&mut tasks) => Some(error),
    };

    token.cancel();
    tasks.shutdown().await;
    gossip.shutdown().await;
    machine.endpoint.shutdown().await;
    // What is synced now need not be hashed by the next life.
    let last = machine.clone();
    let synced = tokio::task::spawn_blocking(move || {
        last.neighbours.save();
        for held in last.store.list().iter().filter(|held| !held.complete) {
            if let Some(Err(error)) = last.store.get(&held.artifact).map(|held| held.sync()) {
                tracing::warn!(artifact = %held.artifact, %error, "cannot sync");
            }
        }
    });
    synced.await?;
    failed.map_or(Ok(()), |error| Err(error).context("the agent ends: it lacks a part"))
}

/// Waits until a task panics: an agent without it would look alive and do half of its work.
async fn panicked(tasks: &mut JoinSet<()>) -> JoinError {
    loop {
        match tasks.join_next().await {
            Some(Err(error)) if error.is_panic() => return error,
            Some(_) => {}
            None => std::future::pending().await,
        }
    }
}

type GossipParts = (Gossip, tokio::sync::mpsc::Receiver<shoal_gossip::GossipEvent>);

/// Opens everything, in the order in which one needs the other.
async fn start(
    config: Config,
    token: &CancellationToken,
) -> anyhow::Result<(Arc<Machine>, GossipParts, impl Future<Output = ()> + use<>)> {
    let membership = Arc::new(Membership::load(&config.identity)?);
    let credentials = membership.credentials().clone();
    let member = membership.identity().member().clone();
    anyhow::ensure!(
        member.role == Role::Agent,
        "the certificate in {} is a {}'s, not an agent's",
        config.identity.display(),
        member.role
    );
    let region = member.region.clone().context("the certificate names no region")?;
    anyhow::ensure!(
        config.regions.len() <= REGION_PROCESSES_MAX,
        "`regions` names more than {REGION_PROCESSES_MAX} region processes"
    );
    std::fs::create_dir_all(&config.data_dir)
        .with_context(|| format!("cannot make {}", config.data_dir.display()))?;
    // Programs are started with paths below it.
    let config = Config { data_dir: config.data_dir.canonicalize()?, ..config };
    let labels = labels(&region, &config.zone, &member.machine, &config.labels);
    let goals = Arc::new(goals::Goals::open(
        config.data_dir.join("goals"),
        credentials.clone(),
        region.clone(),
        labels.clone(),
    )?);
    let metrics = Arc::new(metrics::Metrics::new()?);
    let store = open_store(&config).await?;
    let retention = Retention::open(config.data_dir.join("imported"))?;
    keep_what_ran(&config, &retention)?;
    let bucket = config.bucket.as_deref().map(Bucket::open).transpose()?;
    let origin = Origin::new(bucket)?;
    let neighbours = Arc::new(Neighbours::open(config.data_dir.join("neighbours.bin")));

    let mut endpoint = EndpointConfig::new(config.listen, credentials.clone());
    endpoint.max_connections = config.max_connections;
    let (endpoint, incoming) = Endpoint::bind(&endpoint)?;
    let gossip_config = GossipConfig::new(config.gossip_listen, credentials, region);
    let (gossip, heard) = Gossip::start(gossip_config).await?;
    for seed in &config.gossip_seeds {
        let resolved = tokio::net::lookup_host(seed)
            .await
            .with_context(|| format!("gossip_seeds: '{seed}' is not HOST:PORT"))?;
        for addr in resolved {
            gossip.dial(addr).await?;
        }
    }
    let addr = PeerAddr {
        node: member.node,
        machine: member.machine.clone(),
        zone: config.zone.clone(),
        data: config.advertised(endpoint.local_addr())?,
        gossip: config.advertised(gossip.local_addr())?,
    };
    let regions = Regions::start(
        endpoint.clone(),
        member.machine.clone(),
        membership.clone(),
        &config.regions,
        token,
    );
    let standing = trust::Standing::new(membership.clone());
    let origin_pacer = Pacer::default();
    let parts = Parts {
        me: addr.clone(),
        max_connections: config.max_connections,
        endpoint: endpoint.clone(),
        incoming,
        gossip: gossip.clone(),
        regions: regions.clone(),
        origin: origin.clone(),
        origin_pacer: origin_pacer.clone(),
        goals: goals.clone(),
        neighbours: neighbours.clone(),
        metrics: metrics.clone(),
        standing: standing.clone(),
    };
    let (engine, driver) = Engine::new(parts, token.clone());
    let throttle = Throttle::new(
        endpoint.clone(),
        engine.clone(),
        origin_pacer,
        metrics.clone(),
        config.limits(),
    );
    let metrics_addr = match config.metrics_listen {
        Some(listen) => {
            let registry = metrics.registry.clone();
            Some(shoal_process::serve_metrics(listen, registry, token.clone()).await?)
        }
        None => None,
    };
    let addresses = Addresses {
        data: endpoint.local_addr(),
        gossip: gossip.local_addr(),
        metrics: metrics_addr,
    };
    shoal_process::announce(&config.data_dir, &addresses)?;
    tracing::info!(machine = %member.machine, data = %addr.data, gossip = %addr.gossip, "ready");
    let info = MachineInfo { addr, labels, version: env!("CARGO_PKG_VERSION").into() };
    let machine = Arc::new(Machine {
        name: member.machine,
        info,
        config,
        store,
        engine,
        endpoint,
        regions,
        origin,
        goals,
        neighbours,
        reports: reports::Reports::default(),
        metrics,
        waves: watch::channel(Waves::default()).0,
        retention,
        activating: std::sync::Mutex::default(),
        wave_wanted: watch::channel(0).0,
        throttle: Arc::new(throttle),
        importing: std::sync::atomic::AtomicUsize::new(0),
        membership,
        standing,
    });
    Ok((machine, (gossip, heard), driver))
}

/// Before anything is swept: what each app ran stays, whether or not its goal is known.
fn keep_what_ran(config: &Config, retention: &Retention) -> anyhow::Result<()> {
    let apps = config.data_dir.join("apps");
    std::fs::create_dir_all(&apps)?;
    for entry in std::fs::read_dir(&apps)? {
        let name = entry?.file_name();
        let Some(Ok(app)) = name.to_str().map(AppName::new) else { continue };
        let state = AppState::load(&app, &apps.join(app.as_str()).join("state.json"));
        let active = state.active.map(|build| build.artifact);
        retention.want(&app, active.into_iter().chain(state.history).collect());
    }
    Ok(())
}

async fn open_store(config: &Config) -> anyhow::Result<Store> {
    let dir = config.data_dir.join("store");
    let settings = StoreConfig {
        encoded_cache_bytes: config.encoded_cache_mib << 20,
        reserve_free_bytes: config.reserve_free_mib << 20,
    };
    Ok(tokio::task::spawn_blocking(move || Store::open(&dir, settings)).await??)
}

/// Keeps one task for each app whose goal is known.
async fn follow_goals(machine: Arc<Machine>) {
    let mut changed = machine.goals.watch();
    let mut apps: HashMap<AppName, watch::Sender<Arc<Goal>>> = HashMap::new();
    // Dropped with this future, and every app's task with it.
    let mut tasks = JoinSet::new();
    loop {
        changed.borrow_and_update();
        let mut failed = false;
        for (app, known) in machine.goals.all() {
            if let Some(sender) = apps.get(&app) {
                sender.send_if_modified(|goal| {
                    let newer = known.goal.revision > goal.revision;
                    if newer {
                        *goal = known.goal.clone();
                    }
                    newer
                });
                continue;
            }
            let patience = Duration::from_secs(machine.config.stop_timeout_s);
            match Place::open(&machine.config.data_dir, &app, &machine.name, patience) {
                Ok(place) => {
                    let (sender, goals) = watch::channel(known.goal.clone());
                    let state = AppState::load(&app, &place.state_path());
                    let machine = machine.clone();
                    let place = Arc::new(place);
                    tasks.spawn(AppTask::new(machine, place, goals, state).run());
                    apps.insert(app, sender);
                }
                Err(error) => {
                    tracing::error!(%app, %error, "cannot make the app's directories");
                    failed = true;
                }
            }
        }
        let retry = async {
            if failed {
                tokio::time::sleep(PLACE_RETRY).await;
            } else {
                std::future::pending().await
            }
        };
        tokio::select! {
            changed = changed.changed() => if changed.is_err() { return },
            () = retry => {}
        }
    }
}

/// Tells the region processes now and then which artifacts this machine holds: one that was restarted learns it again.
async fn announce_held(machine: Arc<Machine>) {
    loop {
        tokio::time::sleep(regions::spread(ANNOUNCE_INTERVAL)).await;
        let lister = machine.clone();
        let listed = tokio::task::spawn_blocking(move || lister.store.list()).await;
        for held in listed.into_iter().flatten() {
            let me = &machine.info.addr;
            // Nobody answers: the next round tells it.
            let _ = machine.regions.introduce(me, held.artifact, held.complete, 0).await;
        }
    }
}

async fn count_gossip(machine: Arc<Machine>, gossip: Gossip) {
    loop {
        machine.metrics.gossip_peers.set(gossip.peers() as i64);
        tokio::time::sleep(Duration::from_secs(5)).await;
    }
}

/// Changes the limits of the running agent that `args` configure, as far as `args` name any, and tells all of them. They hold
/// until the agent reads its configuration again.
///
/// # Errors
/// One line that says what is wrong with the configuration, or that no agent runs.
pub async fn limits(args: Args) -> anyhow::Result<LimitsReport> {
    let config: Config = shoal_process::load_config(args.config.as_deref(), &args)?;
    let told = control::ask(&config.data_dir, &control::Request::limits(args.limits())).await?;
    told.with_context(|| {
        let dir = config.data_dir.display();
        format!(
            "no agent runs on {dir}: start it, or give the --config or --data-dir of one that runs"
        )
    })
}

/// Cuts `file` into the store of the agent that `args` configure. A running agent does it itself and serves the
/// artifact at once; otherwise it is served when the agent starts.
///
/// # Errors
/// One line that says what is wrong with the file or the configuration.
pub async fn import(
    args: Args,
    file: &Path,
    piece_size_bytes: Option<u64>,
) -> anyhow::Result<Imported> {
    let config: Config = shoal_process::load_config(args.config.as_deref(), &args)?;
    let request = control::Request::import(file, piece_size_bytes)?;
    if let Some(imported) = control::ask(&config.data_dir, &request).await? {
        return Ok(imported);
    }
    std::fs::create_dir_all(&config.data_dir)
        .with_context(|| format!("cannot make {}", config.data_dir.display()))?;
    let store = open_store(&config).await?;
    let retention = Retention::open(config.data_dir.join("imported"))?;
    let file = file.to_path_buf();
    tokio::task::spawn_blocking(move || {
        control::import_into(&store, &retention, &file, piece_size_bytes)
    })
    .await?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_panics_is_noticed_and_one_that_ends_is_not() {
        let mut tasks = JoinSet::new();
        tasks.spawn(async {});
        let ended = tokio::time::timeout(Duration::from_millis(50), panicked(&mut tasks)).await;
        assert!(ended.is_err());
        tasks.spawn(async { panic!("as a bug would") });
        assert!(panicked(&mut tasks).await.to_string().contains("as a bug would"));
    }
}
