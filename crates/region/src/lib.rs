//! A region process: what stands between the coordinator and a region's machines. Two or more run in each region.
//!
//! It long-polls the coordinator for goals, follows goal stores in etcd where there are any (`stores`), keeps them as signed files (`goals`), publishes them on the region's
//! gossip topic, and answers its machines over the data plane (`serve`): their goals and open waves, other machines
//! of a swarm (`introductions`), leases to read the bucket, with URLs for who has no credentials (`signing`), an
//! artifact's index (`indexes`). What machines
//! report is kept (`machines`) until the coordinator has it. Whom the cluster believes comes the same way, and goes on to
//! the machines (`trust`).
//!
//! Nothing here decides what is true: goals carry the coordinator's signature, and a fetch under way needs no
//! region process. Killed, it has lost only what machines tell again: how far each rollout may go is on the disk
//! (`waves`) before a machine is told.

mod config;
mod goals;
mod indexes;
mod introductions;
mod machines;
mod metrics;
mod serve;
mod signing;
mod stores;
mod trust;
mod waves;

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use serde::Serialize;
use shoal_client::{Client, ClientError, types::GoalsQuery};
use shoal_goals::{Entry, EtcdStore};
use shoal_gossip::{Gossip, GossipConfig, GossipEvent};
use shoal_origin::Bucket;
use shoal_pki::Role;
use shoal_process::Membership;
use shoal_proto::{goal::SignedGoal, gossip::GossipMessage, peer::PeerAddr};
use shoal_transport::{Endpoint, EndpointConfig};
use tokio::sync::mpsc;

pub use config::{Args, Config};

use goals::{Accepted, Goals};
use indexes::Indexes;
use introductions::Introductions;
use machines::Machines;
use metrics::Metrics;
use serve::{INDEX_ANSWERS_MAX, Server};
use signing::Signing;

/// How long the coordinator holds a question for goals: DESIGN's 5 s.
const LONG_POLL_S: u32 = 5;

/// How long to wait after a coordinator did not answer, at first and at most.
const RETRY_MIN: Duration = Duration::from_millis(250);
const RETRY_MAX: Duration = Duration::from_secs(5);

/// How long reports are gathered into a batch.
const GATHER: Duration = Duration::from_millis(250);

/// How often every goal is published again, for machines that joined since: gossip drops what it knows.
const REPUBLISH_INTERVAL: Duration = Duration::from_secs(60);

/// How many machines may be connected on the gossip plane: region processes are where new ones begin.
const GOSSIP_PEERS_MAX: u32 = 400;

/// How long the last reports may take to go out when the process stops.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

/// What a region process writes into `addresses.json`.
#[derive(Serialize)]
struct Addresses {
    data: SocketAddr,
    gossip: SocketAddr,
    metrics: Option<SocketAddr>,
}

/// What the tasks share.
struct Shared {
    client: Arc<Client>,
    goals: Arc<Goals>,
    machines: Arc<Machines>,
    gossip: Gossip,
    metrics: Arc<Metrics>,
}

/// Runs a region process until SIGTERM or SIGINT.
///
/// # Errors
/// One line that says what is wrong with the configuration or the identity.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let config: Config = shoal_process::load_config(args.config.as_deref(), &args)?;
    config.check().map_err(shoal_process::WrongConfig::from)?;
    let token = shoal_process::shutdown()?;
    let membership = Arc::new(Membership::load(&config.identity)?);
    let credentials = membership.credentials().clone();
    let member = membership.identity().member().clone();
    anyhow::ensure!(
        member.role == Role::Region,
        "the certificate in {} is a {}'s, not a region process's",
        config.identity.display(),
        member.role
    );
    let region = member.region.clone().context("the certificate names no region")?;
    let goals = Arc::new(Goals::open(config.data_dir.join("goals"), credentials.clone())?);
    let client = Arc::new(Client::of(&config.coordinators, &credentials)?);
    let cluster = membership.trust().cluster().to_string();
    let open = |key: &str, url: &Option<String>| {
        let open = |url| EtcdStore::open(url, cluster.as_str());
        url.as_deref().map(open).transpose().with_context(|| format!("the goal store `{key}`"))
    };
    let world = open("goals", &config.goals)?;
    let own = open("region_goals", &config.region_goals)?;
    let metrics = Arc::new(Metrics::new()?);
    let bucket = Bucket::open(&config.bucket)?;

    let mut settings = EndpointConfig::of_region(config.listen, credentials.clone());
    settings.max_connections = config.max_connections;
    let (endpoint, incoming) = Endpoint::bind(&settings)?;
    let mut settings = GossipConfig::new(config.gossip_listen, credentials, region.clone());
    settings.max_peers = GOSSIP_PEERS_MAX;
    let (gossip, heard) = Gossip::start(settings).await?;
    for peer in &config.peers {
        let resolved = tokio::net::lookup_host(peer)
            .await
            .with_context(|| format!("peers: '{peer}' is not HOST:PORT"))?;
        for addr in resolved {
            gossip.dial(addr).await?;
        }
    }
    let me = PeerAddr {
        node: member.node,
        machine: member.machine.clone(),
        zone: String::new(),
        data: config.advertised(endpoint.local_addr())?,
        gossip: config.advertised(gossip.local_addr())?,
    };
    let settle = Duration::from_secs_f64(config.wave_settle_s);
    let machines = Arc::new(Machines::open(config.data_dir.join("waves.bin"), settle));
    let server = Arc::new(Server {
        me,
        region,
        poll_ms: (config.poll_s * 1_000.0) as u32,
        goals: goals.clone(),
        machines: machines.clone(),
        introductions: Introductions::default(),
        bucket,
        metrics: metrics.clone(),
        books: Mutex::new(HashMap::new()),
        indexes: Indexes::default(),
        signing: Signing::default(),
        index_places: tokio::sync::Semaphore::new(INDEX_ANSWERS_MAX),
        endpoint: endpoint.clone(),
        began: Instant::now(),
        standings: Arc::new(trust::Standings::new(membership.clone(), client.clone())),
    });
    let metrics_addr = match config.metrics_listen {
        Some(listen) => {
            let registry = metrics.registry.clone();
            Some(shoal_process::serve_metrics(listen, registry, token.clone()).await?)
        }
        None => None,
    };
    let shared = Arc::new(Shared { client, goals, machines, gossip: gossip.clone(), metrics });
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(look_at(server.bucket.clone()));
    tasks.spawn(trust::follow(shared.clone(), membership.clone()));
    tasks.spawn(trust::keep(shared.clone(), server.clone()));
    tasks.spawn(trust::stand(shared.clone(), server.clone()));
    tasks.spawn(trust::renew(shared.clone(), membership));
    tasks.spawn(server.run(incoming));
    tasks.spawn(follow_goals(shared.clone()));
    if let Some(store) = world {
        tasks.spawn(stores::follow(shared.clone(), "goals", store));
    }
    if let Some(store) = own {
        tasks.spawn(stores::follow(shared.clone(), "region_goals", store.clone()));
        tasks.spawn(stores::keep(shared.clone(), "region_goals", store));
    }
    tasks.spawn(hear_goals(shared.clone(), heard));
    tasks.spawn(republish(shared.clone()));
    tasks.spawn(forward(shared.clone()));
    let addresses = Addresses {
        data: endpoint.local_addr(),
        gossip: gossip.local_addr(),
        metrics: metrics_addr,
    };
    shoal_process::announce(&config.data_dir, &addresses)?;
    tracing::info!(machine = %member.machine, data = %addresses.data, gossip = %addresses.gossip, "ready");

    token.cancelled().await;
    tasks.shutdown().await;
    let flushed = tokio::time::timeout(FLUSH_TIMEOUT, flush(&shared)).await;
    if !matches!(flushed, Ok(true)) {
        tracing::warn!("the last reports did not go out: the machines tell them again");
    }
    gossip.shutdown().await;
    endpoint.shutdown().await;
    Ok(())
}

/// Says at the start what would otherwise be found out in the middle of a deployment.
async fn look_at(bucket: Bucket) {
    if let Err(error) = bucket.probe().await {
        tracing::warn!(%error, "the region's bucket cannot be read");
    }
}

fn take(shared: &Shared, signed: &SignedGoal, from: &str) -> Accepted {
    let accepted = shared.goals.accept(signed);
    let result = match &accepted {
        Accepted::Taken => "taken",
        Accepted::Old => "old",
        Accepted::Refused(reason) => {
            tracing::warn!(%from, %reason, "refused a goal");
            "refused"
        }
        Accepted::NotKept(reason) => {
            tracing::error!(%from, %reason, "did not take a goal");
            "not_kept"
        }
    };
    shared.metrics.goals.with_label_values(&[result]).inc();
    accepted
}

async fn publish(shared: &Shared, signed: &SignedGoal) {
    // Gossip is the accelerator: what it does not carry, polls do.
    if let Err(error) = shared.gossip.publish(&GossipMessage::Goal(signed.clone())).await {
        tracing::warn!(%error, "cannot publish a goal");
    }
}

/// Waits about as long as `pause` says, and makes the next one longer.
async fn wait(pause: &mut Duration) {
    tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.5))).await;
    *pause = (*pause * 2).min(RETRY_MAX);
}

/// Follows the coordinator's goals by long poll.
async fn follow_goals(shared: Arc<Shared>) {
    let mut after = 0;
    let mut pause = RETRY_MIN;
    loop {
        let highest_epoch = shared.goals.highest_epoch();
        let query = GoalsQuery { after, wait_s: LONG_POLL_S, highest_epoch };
        match shared.client.goals(&query).await {
            Ok(reply) => {
                shared.goals.set_halted(reply.halted);
                let mut all_kept = true;
                for text in &reply.goals {
                    let signed = match Entry::from_hex(text) {
                        Ok(entry) => entry.signed,
                        Err(error) => {
                            tracing::warn!(error, "the coordinator sent something that is no goal");
                            continue;
                        }
                    };
                    match take(&shared, &signed, "the coordinator") {
                        Accepted::Taken => publish(&shared, &signed).await,
                        Accepted::NotKept(_) => all_kept = false,
                        Accepted::Old | Accepted::Refused(_) => {}
                    }
                }
                if !all_kept {
                    // The cursor stays: the coordinator sends the same goals again.
                    wait(&mut pause).await;
                    continue;
                }
                pause = RETRY_MIN;
                // A smaller cursor is a coordinator that was restored from a backup: begin anew.
                after = if reply.cursor < after { 0 } else { reply.cursor };
            }
            Err(error) => {
                tracing::warn!(%error, "cannot follow the goals");
                wait(&mut pause).await;
            }
        }
    }
}

/// Takes goals that another region process published first.
async fn hear_goals(shared: Arc<Shared>, mut heard: mpsc::Receiver<GossipEvent>) {
    while let Some(event) = heard.recv().await {
        match event {
            GossipEvent::Message { from, message: GossipMessage::Goal(signed) } => {
                take(&shared, &signed, &format!("gossip by {from}"));
            }
            // The coordinators' long poll is no slower.
            other => tracing::debug!(?other, "gossip"),
        }
    }
}

async fn republish(shared: Arc<Shared>) {
    loop {
        for known in shared.goals.all() {
            publish(&shared, &known.signed).await;
        }
        tokio::time::sleep(REPUBLISH_INTERVAL.mul_f64(rand::random_range(0.5..1.5))).await;
    }
}

/// Tells the coordinator everything that machines said; true when it has all of it.
async fn flush(shared: &Shared) -> bool {
    loop {
        let Some(batch) = shared.machines.batch(Instant::now()) else { return true };
        shared.metrics.machines.set(shared.machines.count() as i64);
        shared.metrics.backlog.set(shared.machines.backlog() as i64);
        let mut parts = vec![batch];
        while let Some(part) = parts.pop() {
            match shared.client.report(&part).await {
                Ok(()) => shared.machines.told(&part, Instant::now()),
                Err(error) => {
                    shared.metrics.failed_batches.inc();
                    if !is_about_content(&error) {
                        tracing::warn!(%error, "the coordinator did not take the reports");
                        return false;
                    }
                    // One machine's bad data must not hold up the others': find it, and go on without.
                    match machines::halves(&part) {
                        Some((first, second)) => parts.extend([second, first]),
                        None => {
                            let machine = part.machines.first().map(|seen| seen.name.as_str());
                            tracing::error!(machine, %error, "the coordinator refuses what a machine says");
                            shared.machines.told(&part, Instant::now());
                        }
                    }
                }
            }
        }
    }
}

/// Whether the coordinator refused what a batch says, and not who sent it or when: it will do so again.
fn is_about_content(error: &ClientError) -> bool {
    matches!(error, ClientError::Refused { status: 400 | 413 | 422, .. })
}

async fn forward(shared: Arc<Shared>) {
    let mut pause = RETRY_MIN;
    loop {
        shared.machines.changed.notified().await;
        tokio::time::sleep(GATHER).await;
        while !flush(&shared).await {
            wait(&mut pause).await;
        }
        pause = RETRY_MIN;
    }
}
