//! Machines with certificates and sockets of their own, in processes of a [`Group`] each: one may not have as many open files
//! as a region has machines. A group is the benchmark itself, started again with the flag of [`Play`].

use std::{
    env,
    io::{self, BufRead as _, BufReader, Write as _},
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use shoal_pki::{Credentials, Role};
use shoal_proto::{
    RegionName,
    peer::{PeerAddr, StreamReply, StreamRequest},
    region::{MachineInfo, RegionReply, RegionRequest, reports_digest},
};
use shoal_transport::{Connection, Endpoint, EndpointConfig};
use tokio::{task::JoinSet, time::MissedTickBehavior};

use crate::world::Members;

/// How many machines a process plays: each has two files, and an address has some 28,000 ports for sockets of any port.
pub(crate) const MACHINES_MAX: usize = 9_000;

/// Of so many polls one is of a machine that knows no goal.
const CHANGED_EVERY: u64 = 100;

/// A machine's socket needs no more room than for its polls.
const SOCKET_BUFFER_BYTES: usize = 64 << 10;

/// How many machines of a group connect at once, and how often one dials before it gives up: a region process that has its
/// hands full refuses, and is dialled again, as by agents.
const DIALS_MAX: usize = 16;
const DIALS_EACH: u32 = 10;

/// How often a goal that is not there yet is asked for, and a region process dialled again.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// What makes the benchmark a group of machines.
#[derive(Debug, clap::Args)]
pub(crate) struct Play {
    /// A [`Group`], as JSON.
    #[arg(long, hide = true)]
    play: Option<String>,
}

/// Which machines a process plays.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Group {
    /// Where the world lies.
    pub(crate) dir: PathBuf,
    pub(crate) region: RegionName,
    /// Where the region process listens.
    pub(crate) addr: SocketAddr,
    /// The number of the group, and of its first machine.
    pub(crate) number: u8,
    pub(crate) first: usize,
    pub(crate) count: usize,
    /// Of all goals that there are.
    pub(crate) digest: u64,
    /// Each machine asks so often, for so long.
    pub(crate) every: Duration,
    pub(crate) polls: Duration,
}

/// What the machines of a group were answered.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Polled {
    pub(crate) took: Vec<Duration>,
    pub(crate) changed: u64,
    /// How many connections are open still.
    pub(crate) open: usize,
}

/// The process of a group. It ends with this.
pub(crate) struct Machines {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Machines {
    /// Starts the process, which begins to connect its machines.
    pub(crate) fn start(group: &Group) -> anyhow::Result<Self> {
        let mut command = Command::new(env::current_exe()?);
        command.arg("--play").arg(serde_json::to_string(group)?);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let orders = child.stdin.take().context("no input")?;
        let answers = BufReader::new(child.stdout.take().context("no output")?);
        Ok(Self { child, orders, answers })
    }

    fn answer<T: DeserializeOwned>(&mut self) -> anyhow::Result<T> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        ensure!(!line.is_empty(), "a process of machines has ended");
        Ok(serde_json::from_str(&line)?)
    }

    /// Waits until all are connected, and the region process has the goal.
    pub(crate) fn connected(&mut self) -> anyhow::Result<()> {
        self.answer()
    }

    /// Has them begin to poll.
    pub(crate) fn poll(&mut self) -> anyhow::Result<()> {
        Ok(writeln!(self.orders)?)
    }

    /// Waits until they have.
    pub(crate) fn polled(&mut self) -> anyhow::Result<Polled> {
        self.answer()
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        // One that has ended is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Play {
    /// Plays machines until the process that started this one ends, if it was started for that.
    pub(crate) async fn run(&self) -> Option<anyhow::Result<()>> {
        let group = self.play.as_deref()?;
        Some(match serde_json::from_str(group) {
            Ok(group) => play(group).await,
            Err(error) => Err(error.into()),
        })
    }
}

/// What the process that started this one orders, a line each. The process ends with it.
fn orders() -> mpsc::Receiver<()> {
    let (order, orders) = mpsc::channel();
    thread::spawn(move || {
        while io::stdin().read_line(&mut String::new()).is_ok_and(|len| len > 0) {
            let _ = order.send(());
        }
        std::process::exit(130);
    });
    orders
}

fn say(answer: &impl Serialize) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, answer)?;
    writeln!(out)?;
    Ok(out.flush()?)
}

async fn play(group: Group) -> anyhow::Result<()> {
    let orders = orders();
    let machines = connect(&group).await?;
    let first = machines.first().context("no machines")?;
    while !first.poll(0).await.unwrap_or_default() {
        tokio::time::sleep(LOOK_EVERY).await;
    }
    say(&())?;
    while orders.recv().is_ok() {
        say(&poll(&group, &machines).await?)?;
    }
    Ok(())
}

async fn connect(group: &Group) -> anyhow::Result<Vec<Arc<Machine>>> {
    let members = Members::load(&group.dir)?;
    let listen = SocketAddr::from((Ipv4Addr::new(127, 0, group.number, 1), 0));
    let mut machines = Vec::with_capacity(group.count);
    let mut dials = JoinSet::new();
    for at in group.first..group.first + group.count {
        if dials.len() >= DIALS_MAX {
            machines.extend(dials.join_next().await.transpose()?.transpose()?.map(Arc::new));
        }
        let (identity, trust) =
            members.member(&format!("m{at}"), Role::Agent, Some(&group.region))?;
        let mut config = EndpointConfig::new(listen, Credentials::new(identity, trust));
        config.max_connections = 4;
        config.socket_buffer_bytes = SOCKET_BUFFER_BYTES;
        dials.spawn(Machine::connect(config, group.addr));
    }
    while let Some(machine) = dials.join_next().await {
        machines.push(Arc::new(machine??));
    }
    Ok(machines)
}

/// All machines poll, evenly spread over the time between a machine's polls.
async fn poll(group: &Group, machines: &[Arc<Machine>]) -> anyhow::Result<Polled> {
    let number = Arc::new(AtomicU64::new(0));
    let mut tasks = JoinSet::new();
    for (at, one) in machines.iter().enumerate() {
        let phase = group.every.mul_f64(at as f64 / machines.len() as f64);
        let times = (group.every, phase, group.polls);
        tasks.spawn(one.clone().polls(times, number.clone(), group.digest));
    }
    let mut polled = Polled { took: vec![], changed: 0, open: 0 };
    while let Some(ended) = tasks.join_next().await {
        let (took, changed) = ended??;
        polled.took.extend(took);
        polled.changed += changed;
    }
    polled.open = machines.iter().filter(|machine| !machine.connection.is_closed()).count();
    Ok(polled)
}

/// A machine, and its connection to the region process.
struct Machine {
    info: MachineInfo,
    connection: Connection,
    _endpoint: Endpoint,
}

impl Machine {
    async fn connect(config: EndpointConfig, region: SocketAddr) -> anyhow::Result<Self> {
        let member = config.credentials.identity().member().clone();
        let (endpoint, mut incoming) = Endpoint::bind(&config)?;
        // What the region process says by itself is read, and no more.
        tokio::spawn(async move { while incoming.recv().await.is_some() {} });
        let mut dials = 1;
        let connection = loop {
            match endpoint.connect_any(region, Role::Region).await {
                Ok(connection) => break connection,
                Err(error) if dials == DIALS_EACH => return Err(error.into()),
                Err(_) => dials += 1,
            }
            tokio::time::sleep(LOOK_EVERY * dials).await;
        };
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

    /// Polls once in `every`, beginning after `phase`, for a time; what each took, and how many told something new.
    async fn polls(
        self: Arc<Self>,
        (every, phase, time): (Duration, Duration, Duration),
        number: Arc<AtomicU64>,
        digest: u64,
    ) -> anyhow::Result<(Vec<Duration>, u64)> {
        let (mut took, mut changed) = (vec![], 0);
        let begin = Instant::now();
        let mut tick = tokio::time::interval_at((begin + phase).into(), every);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let is_new = number.fetch_add(1, Ordering::Relaxed).is_multiple_of(CHANGED_EVERY);
            let start = Instant::now();
            let answer = self.poll(if is_new { 0 } else { digest }).await?;
            took.push(start.elapsed());
            ensure!(answer == is_new, "the goals are told to who has them, or not to who has none");
            changed += u64::from(answer);
            if begin.elapsed() + every >= time {
                return Ok((took, changed));
            }
        }
    }
}
