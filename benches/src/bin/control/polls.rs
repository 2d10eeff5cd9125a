//! Machines that ask a region process for their goals, over connections that stay open.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use serde::Serialize;
use shoal_client::types::DeployRequest;
use shoal_pki::{Credentials, Role};
use shoal_proto::{
    AppName, Revision,
    peer::{PeerAddr, StreamReply, StreamRequest},
    region::{MachineInfo, RegionReply, RegionRequest, goals_digest, reports_digest},
};
use shoal_transport::{Connection, Endpoint, EndpointConfig};
use tokio::{task::JoinSet, time::MissedTickBehavior};

use crate::{
    times::Spread,
    world::{Shape, World, app},
};

/// Of so many polls one is of a machine that knows no goal.
const CHANGED_EVERY: u64 = 100;

/// How long is measured: connections at rest, over one whole round of what a region process tells each machine by itself, and then
/// polls.
const REST: Duration = Duration::from_secs(90);
const POLLS: Duration = Duration::from_secs(20);

/// A machine's socket needs no more room than for its polls.
const SOCKET_BUFFER_BYTES: usize = 64 << 10;

/// For how many machines of a region it is reckoned.
const MACHINES: f64 = 100_000.0;

/// How many machines connect at once.
const DIALS_MAX: usize = 64;

#[derive(Debug, Serialize)]
pub(crate) struct Report {
    connections: usize,
    asked_per_s: f64,
    answered_per_s: f64,
    changed: u64,
    answer: Spread,
    /// Cores of the region process, while the connections only stay open and while they poll.
    cores_at_rest: f64,
    cores: f64,
    /// What a connection at rest takes of the region process: microseconds of CPU a second, and bytes of memory
    /// that is no file's, beyond what the process has without connections.
    cpu_us_per_s_each: f64,
    bytes_each: f64,
    /// The memory of the region process without connections, with them at rest, and after the polls.
    rss_anon_before_bytes: u64,
    rss_anon_at_rest_bytes: u64,
    rss_anon_bytes: u64,
}

impl Report {
    pub(crate) fn print(&self) {
        println!(
            "{:.0} polls/s asked, {:.0} answered ({} changed) over {} open connections: {:.2} cores of the region \
             process, {:.2} with the connections at rest, {} MiB",
            self.asked_per_s,
            self.answered_per_s,
            self.changed,
            self.connections,
            self.cores,
            self.cores_at_rest,
            self.rss_anon_bytes >> 20,
        );
        println!("  an answer              {}", self.answer);
        println!(
            "  at rest a connection takes {:.1} us of CPU a second and {:.1} KiB ({} MiB before, {} MiB with all); {MACHINES} would \
             take {:.2} cores and {:.1} GiB",
            self.cpu_us_per_s_each,
            self.bytes_each / 1024.0,
            self.rss_anon_before_bytes >> 20,
            self.rss_anon_at_rest_bytes >> 20,
            self.cpu_us_per_s_each * MACHINES / 1e6,
            self.bytes_each * MACHINES / (1u64 << 30) as f64,
        );
    }
}

/// A machine, and its connection to the region process.
struct Machine {
    info: MachineInfo,
    connection: Connection,
    _endpoint: Endpoint,
}

impl Machine {
    async fn connect(config: EndpointConfig, region: std::net::SocketAddr) -> anyhow::Result<Self> {
        let member = config.credentials.identity().member().clone();
        let (endpoint, mut incoming) = Endpoint::bind(&config)?;
        // What the region process says by itself is read, and no more.
        tokio::spawn(async move { while incoming.recv().await.is_some() {} });
        let connection = endpoint.connect_any(region, Role::Region).await?;
        let addr = endpoint.local_addr();
        let addr = PeerAddr {
            node: member.node,
            machine: member.machine,
            zone: "a".into(),
            data: addr,
            gossip: addr,
        };
        let version = env!("CARGO_PKG_VERSION").into();
        let info = MachineInfo { addr, labels: [("role".into(), "web".into())].into(), version };
        Ok(Self { info, connection, _endpoint: endpoint })
    }

    /// Asks, and says whether there was something new.
    async fn poll(&self, digest: u64) -> anyhow::Result<bool> {
        let reports_digest = reports_digest(std::iter::empty());
        let machine = self.info.clone();
        let request = RegionRequest::Poll { machine, digest, reports_digest };
        match self.connection.request(StreamRequest::Region(request)).await?.0 {
            StreamReply::Region(RegionReply::Unchanged { .. }) => Ok(false),
            StreamReply::Region(RegionReply::Goals { goals, .. }) => {
                ensure!(!goals.is_empty(), "an answer without a goal");
                Ok(true)
            }
            other => bail!("another answer: {other:?}"),
        }
    }
}

/// Polls once in `every`, beginning after `phase`, for a time.
async fn machine(
    machine: Arc<Machine>,
    (every, phase): (Duration, Duration),
    number: Arc<AtomicU64>,
    digest: u64,
) -> anyhow::Result<(Vec<Duration>, u64)> {
    let (mut took, mut changed) = (vec![], 0);
    let begin = Instant::now();
    let mut tick = tokio::time::interval_at((begin + phase).into(), every);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        if begin.elapsed() >= POLLS {
            return Ok((took, changed));
        }
        let is_new = number.fetch_add(1, Ordering::Relaxed).is_multiple_of(CHANGED_EVERY);
        let start = Instant::now();
        let answer = machine.poll(if is_new { 0 } else { digest }).await?;
        took.push(start.elapsed());
        ensure!(answer == is_new, "the goals are told to who has them, or not to who has none");
        changed += u64::from(answer);
    }
}

pub(crate) async fn measure(
    shape: Shape<'_>,
    connections: usize,
    per_s: f64,
) -> anyhow::Result<Report> {
    let shape = Shape { regions: 1, region_processes: true, etcd: false, ..shape };
    let mut world = World::start(shape).await?;
    let client = world.client("bench", Role::Operator, None)?;
    let name = AppName::new("data")?;
    client.set_app(&app("data")?).await?;
    let artifact = world.publish(&client, "data").await?;
    let request = DeployRequest { app: name.clone(), artifact: artifact.name };
    let revision: Revision = client.deploy(&request).await?.revision;
    let digest = goals_digest([(&name, revision)]);

    let region = world.regions.first().context("no region")?.clone();
    let cores = |before_s: f64, start: Instant, world: &World| {
        let used_s = world.cpu_s(region.as_str())? - before_s;
        anyhow::Ok(used_s / start.elapsed().as_secs_f64())
    };
    let (before_s, start) = (world.cpu_s(region.as_str())?, Instant::now());
    tokio::time::sleep(REST / 9).await;
    let cores_alone = cores(before_s, start, &world)?;
    let rss_anon_before_bytes = world.rss_anon_bytes(region.as_str())?;
    let addr = world.address(region.as_str(), "data")?;
    let mut machines = Vec::with_capacity(connections);
    let mut dials = JoinSet::new();
    for at in 0..connections {
        if dials.len() >= DIALS_MAX {
            machines.extend(dials.join_next().await.transpose()?.transpose()?.map(Arc::new));
        }
        let (identity, trust) = world.member(&format!("m{at}"), Role::Agent, Some(&region))?;
        let credentials = Credentials::new(identity, trust);
        let mut config = EndpointConfig::new("127.0.0.1:0".parse()?, credentials);
        config.max_connections = 4;
        config.socket_buffer_bytes = SOCKET_BUFFER_BYTES;
        dials.spawn(Machine::connect(config, addr));
    }
    while let Some(machine) = dials.join_next().await {
        machines.push(Arc::new(machine??));
    }
    // Until it has the goal.
    let first = machines.first().context("no connections")?;
    while !first.poll(0).await.unwrap_or_default() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    let (before_s, start) = (world.cpu_s(region.as_str())?, Instant::now());
    tokio::time::sleep(REST).await;
    let cores_at_rest = cores(before_s, start, &world)?;
    let rss_anon_at_rest_bytes = world.rss_anon_bytes(region.as_str())?;

    let every = Duration::from_secs_f64(connections as f64 / per_s);
    let number = Arc::new(AtomicU64::new(0));
    let mut tasks = JoinSet::new();
    let (before_s, start) = (world.cpu_s(region.as_str())?, Instant::now());
    for (at, one) in machines.iter().enumerate() {
        let phase = every.mul_f64(at as f64 / connections as f64);
        tasks.spawn(machine(one.clone(), (every, phase), number.clone(), digest));
    }
    let (mut answers, mut changed) = (vec![], 0);
    while let Some(ended) = tasks.join_next().await {
        let (took, new) = ended??;
        answers.extend(took);
        changed += new;
    }
    let seconds = start.elapsed().as_secs_f64();
    let cores = cores(before_s, start, &world)?;
    let open = machines.iter().filter(|machine| !machine.connection.is_closed()).count();
    ensure!(open == connections, "{} of {connections} connections are closed", connections - open);
    world.check()?;
    Ok(Report {
        connections,
        asked_per_s: per_s,
        answered_per_s: answers.len() as f64 / seconds,
        changed,
        answer: Spread::of(answers),
        cores_at_rest,
        cores,
        cpu_us_per_s_each: (cores_at_rest - cores_alone).max(0.0) * 1e6 / connections as f64,
        bytes_each: rss_anon_at_rest_bytes.saturating_sub(rss_anon_before_bytes) as f64
            / connections as f64,
        rss_anon_before_bytes,
        rss_anon_at_rest_bytes,
        rss_anon_bytes: world.rss_anon_bytes(region.as_str())?,
    })
}
