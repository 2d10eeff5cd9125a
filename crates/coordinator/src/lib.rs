//! The coordinator: the one process that owns the database.
//!
//! Everything else is told by it or tells it, over one HTTP API with mutual TLS (`api`): operators register
//! apps, ask for builds, publish files and set goals; workers take jobs and end them; region processes
//! follow the goals and hand in their machines' reports. A certificate's role decides which of the three groups of
//! calls its holder may use.
//!
//! The API changes the database (`shoal-queue`) and answers. Any number of coordinators on one PostgreSQL do that at
//! once. What goes on by itself is done by one of them at a time (`duty`), and may stop and start anywhere,
//! because all that it knows is in the database:
//!
//! - `replicate` copies artifacts from the main bucket into the regions' buckets;
//! - `inspect` looks for as long as an artifact lives whether the buckets still have it, and repairs the main one;
//! - `retention` deletes artifacts that nothing needs, and `removal` takes their objects out of the buckets;
//! - `rollout` counts machines and ends rollouts by the rules of `shoal-rollout`;
//! - `reaper` gives on the jobs of workers that are gone, and lets jobs be taken that waited for their next attempt;
//! - `outbox` tells the goal store (etcd), where there is one, which goals were set;
//! - `events` gives numbers to what happened and forgets what is old; `webhooks` tells it to those who asked for it;
//! - `auto_deploy` deploys what a push to the main branch brought, where an app says so;
//! - `forget` drops machines and workers that are gone.
//!
//! Who waits is woken: a queued job, a cancelled one, a finished upload, a new goal and a batch of reports each ring a bell
//! ([`shoal_queue::Bell`]), here and, by way of the database, at the other coordinators. A bell may get lost; so
//! everybody who waits looks again after some seconds.
//!
//! After a restore of the database `recover` raises the epoch, before any goal is set.
//!
//! Whom the cluster believes is a numbered bundle (`trust`) that every process follows; any coordinator makes the next one.
//!
//! The same listener has a page for browsers (`page`), which is a caller of the API like any other.
//!
//! Goals are made and signed in `goals`, inside the transaction that numbers them. Uploads stream through
//! into the main bucket, and an index is stored only when every part is proved (`uploads`). The jobs' logs are plain
//! files (`logs`).

mod api;
mod auto_deploy;
mod browsers;
mod config;
mod config_told;
mod counted;
mod duty;
mod error;
mod events;
mod forget;
mod goals;
mod hooks;
mod inspect;
mod logs;
mod metrics;
mod outbox;
mod page;
mod reaper;
mod recover;
mod registry;
mod removal;
mod replicate;
mod retention;
mod rollout;
mod secrets;
mod signatures;
mod state;
mod trust;
mod unwanted;
mod uploads;
mod view;
mod webhooks;

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use serde::Serialize;
use shoal_goals::EtcdStore;
use shoal_origin::Bucket;
use shoal_pki::{ClientAuth, GoalSigner, Role, Trust};
use shoal_process::Membership;
use shoal_proto::state::TokenRole;
use shoal_queue::{Queue, sqlite_url};
use tokio::{
    sync::{Notify, Semaphore},
    task::{JoinHandle, JoinSet},
};
use tokio_util::sync::CancellationToken;

pub use config::{Args, Config, RegionConfig, Replication};
pub use config_told::{EventsConfig, WebhooksConfig};

use state::{Shared, now_ms, random_token};

/// How often the gauges are brought up to date.
const GAUGES_INTERVAL: Duration = Duration::from_secs(5);

/// How long a database may take to open before it is said that it is waited for.
const OPEN_QUIETLY: Duration = Duration::from_secs(2);

/// The OpenAPI document of the API, which a coordinator serves at `/v1/openapi.json`.
#[must_use]
pub fn openapi() -> serde_json::Value {
    api::document()
}

/// A route of the API, and who may call it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteInfo {
    /// GET, POST or PUT.
    pub method: String,
    /// The path, with its variables in braces.
    pub path: &'static str,
    /// The certificates that may call it; none where tokens may, too, or anybody.
    pub certificate: Option<Role>,
    /// The least role of a token that may call it; none where no token may, or anybody.
    pub role: Option<TokenRole>,
    /// Whether a token that is bound to apps is refused.
    pub fleet: bool,
}

/// All routes of the API.
#[must_use]
pub fn api_routes() -> Vec<RouteInfo> {
    api::table()
}

/// Runs the coordinator until SIGTERM or SIGINT.
///
/// # Errors
/// One line that says what is wrong with the configuration, the identity, the database or a bucket.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let mut config: Config = shoal_process::load_config(args.config.as_deref(), &args)?;
    config.recover = args.recover;
    let token = shoal_process::shutdown()?;
    start(config, token).await?.ended().await
}

/// Where a coordinator listens; also what it writes into `addresses.json`.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Addresses {
    /// The API.
    pub api: SocketAddr,
    /// The metrics page.
    pub metrics: Option<SocketAddr>,
}

/// A running coordinator.
pub struct Coordinator {
    addresses: Addresses,
    shared: Arc<Shared>,
    api: JoinHandle<()>,
    tasks: JoinSet<()>,
}

impl Coordinator {
    /// Where it listens.
    #[must_use]
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// Waits until it has stopped, which its token makes it do: open calls answered, copies given back, the
    /// database closed.
    ///
    /// # Errors
    /// When a task of it has panicked, which stops all of it.
    pub async fn ended(mut self) -> anyhow::Result<()> {
        let mut result = Ok(());
        while let Some(ended) = self.tasks.join_next().await {
            if let Err(error) = ended {
                result =
                    Err(anyhow::Error::from(error).context("a task of the coordinator failed"));
                self.shared.stop.cancel();
            }
        }
        self.api.await.context("the API failed")?;
        self.shared.queue.close().await;
        result
    }
}

/// Reads the key that signs goals, and checks that the cluster believes it.
pub(crate) fn read_signer(path: &Path, trust: &Trust) -> anyhow::Result<GoalSigner> {
    let pem = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the goal key {}", path.display()))?;
    let signer = GoalSigner::from_pem(&pem)
        .with_context(|| format!("{} is not a goal key", path.display()))?;
    ensure!(
        trust.bundle().goal_keys.contains(&signer.public()),
        "the trust bundle does not know the goal key {}: no machine would follow its goals",
        path.display()
    );
    Ok(signer)
}

/// Opens the database; a server that still starts is waited for, and that is said.
async fn open(url: &str) -> anyhow::Result<Queue> {
    let mut opening = std::pin::pin!(Queue::open(url));
    if let Ok(opened) = tokio::time::timeout(OPEN_QUIETLY, &mut opening).await {
        return Ok(opened?);
    }
    let at = shoal_queue::place(url);
    tracing::warn!(at, "the database does not answer yet: it is waited for");
    Ok(opening.await?)
}

/// Starts a coordinator that runs until `stop` is cancelled. It is ready when this returns.
///
/// # Errors
/// One line that says what is wrong with the configuration, the identity, the database or a bucket.
pub async fn start(config: Config, stop: CancellationToken) -> anyhow::Result<Coordinator> {
    config.check().map_err(shoal_process::WrongConfig::from)?;
    let membership = Arc::new(Membership::load(&config.identity)?);
    let role = membership.identity().member().role;
    ensure!(role == Role::Coordinator, "the certificate is of the role {role}, not coordinator");
    std::fs::create_dir_all(&config.data_dir)
        .with_context(|| format!("cannot make {}", config.data_dir.display()))?;
    let main = Bucket::open(&config.bucket).context("the main bucket")?;
    let mut buckets = BTreeMap::new();
    for region in &config.regions {
        let bucket = Bucket::open(&region.bucket)
            .with_context(|| format!("the bucket of region {}", region.name))?;
        buckets.insert(region.name.clone(), bucket);
    }
    let cluster = membership.trust().cluster().to_string();
    let open_store = |url: &String| EtcdStore::open(url, cluster.as_str());
    let goal_store = config.goals.as_ref().map(open_store).transpose().context("the goal store")?;
    for bucket in std::iter::once(&main).chain(buckets.values()) {
        let bucket = bucket.clone();
        // Said at the start, and no reason not to start: a bucket may be away for a while.
        tokio::spawn(async move {
            if let Err(error) = bucket.probe().await {
                tracing::warn!(%error, "a bucket cannot be read");
            }
        });
    }
    let data_dir = std::path::absolute(&config.data_dir)?;
    let logs = logs::Logs::open(data_dir.join("logs")).context("cannot make the jobs' logs")?;
    let url = config.database.clone();
    let url = url.unwrap_or_else(|| sqlite_url(&data_dir.join("shoal.sqlite")));
    if let Some(path) = &config.ca_key
        && let Err(error) = std::fs::File::open(path)
    {
        let path = path.display();
        tracing::warn!(%path, %error, "the CA key cannot be read: nobody can join, and no certificate is renewed, until it can");
    }
    let queue = open(&url).await?;
    let names: Vec<_> = buckets.keys().cloned().collect();
    queue.set_regions(&names, now_ms()).await?;

    trust::meet(&queue, &membership).await.context("cannot compare the trust bundles")?;
    // After that: the key may be newer than the bundle in the directory.
    read_signer(&config.goal_key, &membership.trust())?;
    let secrets_key = config.secrets_key.as_ref().unwrap_or(&config.goal_key);
    let secrets = std::fs::read(secrets_key)
        .with_context(|| format!("cannot read the secrets' key {}", secrets_key.display()))?;
    let secrets = secrets::Secrets::new(&secrets)?;
    let webhook_client = webhooks::client(&config)?;

    // Who has no certificate yet may join, and people show tokens: each route asks for what it needs.
    let credentials = membership.credentials();
    let mut tls = shoal_pki::server_config(credentials, &[b"http/1.1"], ClientAuth::Optional)?;
    let machine = membership.identity().member().machine.clone();
    let shown = browsers::Shown::open(&config, machine.as_str())?;
    shown.certificate().show(&mut tls);
    let shared = Arc::new(Shared {
        queue,
        main,
        buckets,
        goal_store,
        recovery: Mutex::new(config.recover.then(recover::Recovery::default)),
        membership: membership.clone(),
        noted: api::Noted::default(),
        join_failures: api::Failures::default(),
        logs,
        registry: registry::Registry::default(),
        counted: counted::Counted::default(),
        part_hashes: uploads::PartHashes::default(),
        metrics: metrics::Metrics::new()?,
        job_waits: Notify::new(),
        copy_waits: Notify::new(),
        upkeep: Notify::new(),
        copies_under_way: removal::UnderWay::default(),
        goals_moved: Notify::new(),
        rollouts_moved: Notify::new(),
        cancels: Notify::new(),
        happened: Notify::new(),
        events_moved: Notify::new(),
        streams: Arc::new(Semaphore::new(events::STREAMS_MAX)),
        webhook_client,
        hook_limit: hooks::Limit::default(),
        hook_places: Semaphore::new(api::HOOKS_AT_ONCE),
        workers: Mutex::new(HashMap::new()),
        seen: Mutex::new(HashMap::new()),
        tokens_used: Mutex::new(HashMap::new()),
        secrets,
        openapi: api::document(),
        stop: stop.clone(),
        config,
    });
    let mut tasks = JoinSet::new();
    tasks.spawn(duty::run(shared.clone(), random_token()?));
    tasks.spawn(carry_bells(shared.clone()));
    tasks.spawn(keep_gauges(shared.clone()));
    tasks.spawn(trust::follow(shared.clone()));
    tasks.spawn(trust::renew(shared.clone()));
    tasks.spawn(shown.follow(shared.clone()));
    if shared.config.recover {
        tasks.spawn(recover::run(shared.clone()));
    }

    let metrics = match shared.config.metrics_listen {
        Some(addr) => {
            let registry = shared.metrics.registry.clone();
            Some(shoal_process::serve_metrics(addr, registry, stop.clone()).await?)
        }
        None => None,
    };
    let router = page::router(shared.clone(), api::router(shared.clone()))
        .layer(axum::middleware::from_fn(unwanted::drain));
    let listen = shared.config.listen;
    let (addr, api) = shoal_process::serve_https(listen, tls, router, membership, stop).await?;
    let addresses = Addresses { api: addr, metrics };
    shoal_process::announce(&shared.config.data_dir, &addresses)?;
    tracing::info!(api = %addr, "the coordinator is ready");
    Ok(Coordinator { addresses, shared, api, tasks })
}

/// Rings here what other coordinators ring, and there what is rung here.
async fn carry_bells(shared: Arc<Shared>) {
    tokio::select! {
        () = shared.queue.carry_bells(|bell| shared.wake(bell)) => {}
        () = shared.stop.cancelled() => {}
    }
}

async fn keep_gauges(shared: Arc<Shared>) {
    let mut tick = tokio::time::interval(GAUGES_INTERVAL);
    loop {
        tokio::select! {
            _ = tick.tick() => metrics::refresh(&shared).await,
            () = shared.stop.cancelled() => return,
        }
    }
}
