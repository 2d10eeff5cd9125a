//! What machines report, taken in through the API as region processes hand it in, while somebody asks for the status.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde::Serialize;
use shoal_client::{
    Client,
    types::{DeployRequest, MachineSeen, MachineStateSeen, RegionReports, Rollout},
};
use shoal_pki::Role;
use shoal_proto::{
    MachineName,
    region::{FetchProgress, MachineReport},
    state::MachineState,
};
use tokio::task::JoinSet;

use crate::{
    times::Spread,
    world::{Shape, World, app},
};

/// What each machine goes through.
const STATES: [MachineState; 4] = [
    MachineState::Fetching,
    MachineState::Verified,
    MachineState::Activating,
    MachineState::Active,
];

/// How many machines there are in a batch, each with a state: as in a region process's.
const BATCH_MACHINES: usize = 2_500;

/// The rest between two questions for the status.
const STATUS_REST: Duration = Duration::from_millis(20);

/// How long the rollout may take until it counts all machines.
const COUNTED_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Debug, Serialize)]
pub(crate) struct Report {
    machines: usize,
    states: usize,
    regions: usize,
    /// Until the last batch was answered.
    seconds: f64,
    coordinator_cpu_s: f64,
    batch: Spread,
    /// `GET /v1/status` meanwhile, and afterwards.
    status: Spread,
    status_at_rest: Spread,
}

impl Report {
    pub(crate) fn print(&self) {
        println!(
            "{} machines in {} regions, {} states each: taken in within {:.1} s ({:.1} CPU s of the coordinator)",
            self.machines, self.regions, self.states, self.seconds, self.coordinator_cpu_s
        );
        println!("  a batch of {BATCH_MACHINES}         {}", self.batch);
        println!("  GET /v1/status         {}", self.status);
        println!("  the same afterwards    {}", self.status_at_rest);
    }
}

/// A batch: these machines, each in this state.
fn batch(machines: &[MachineName], rollout: &Rollout, at: usize) -> RegionReports {
    let seen = |name: &MachineName| MachineSeen {
        node: None,
        name: name.clone(),
        zone: "a".into(),
        labels: [("role".to_string(), "web".to_string())].into(),
        version: env!("CARGO_PKG_VERSION").into(),
        address: "10.1.2.3:7410".into(),
        age_ms: 100,
    };
    let state = |name: &MachineName| MachineStateSeen {
        machine: name.clone(),
        report: MachineReport {
            app: rollout.app.clone(),
            revision: rollout.revision,
            artifact: rollout.artifact,
            state: STATES[at],
            reason: None,
            progress: FetchProgress { pieces: 1, pieces_total: 1, ..FetchProgress::default() },
            sequence: at as u64 + 1,
            age_ms: 50,
        },
    };
    RegionReports {
        machines: machines.iter().map(seen).collect(),
        reports: machines.iter().map(state).collect(),
        waves: Vec::new(),
    }
}

/// One region process: a batch after the other.
async fn region(
    client: Client,
    machines: Vec<MachineName>,
    rollout: Rollout,
) -> anyhow::Result<Vec<Duration>> {
    let mut took = vec![];
    for at in 0..STATES.len() {
        for some in machines.chunks(BATCH_MACHINES) {
            let batch = batch(some, &rollout, at);
            let start = Instant::now();
            client.report(&batch).await?;
            took.push(start.elapsed());
        }
    }
    Ok(took)
}

async fn status(client: &Client) -> anyhow::Result<(Rollout, Duration)> {
    let start = Instant::now();
    let status = client.status(None).await?;
    let took = start.elapsed();
    let rollout = status.into_iter().find_map(|app| app.rollout).context("no rollout")?;
    Ok((rollout, took))
}

pub(crate) async fn measure(shape: Shape<'_>, machines: usize) -> anyhow::Result<Report> {
    let mut world = World::start(Shape { region_processes: false, etcd: false, ..shape }).await?;
    let client = world.client("bench", Role::Operator, None)?;
    client.set_app(&app("data")?).await?;
    let artifact = world.publish(&client, "data").await?;
    let request = DeployRequest { app: artifact.app.clone(), artifact: artifact.name };
    let rollout = client.deploy(&request).await?;

    let each = machines / world.regions.len();
    let before_s = world.cpu_s("coordinator")?;
    let mut tasks = JoinSet::new();
    let start = Instant::now();
    for (at, name) in world.regions.iter().enumerate() {
        let client = world.client(&format!("process-{at}"), Role::Region, Some(name))?;
        let names = (0..each).map(|machine| MachineName::new(format!("m{at}-{machine}")));
        let names = names.collect::<Result<Vec<_>, _>>()?;
        tasks.spawn(region(client, names, rollout.clone()));
    }
    let (mut batches, mut meanwhile) = (vec![], vec![]);
    let mut rest = tokio::time::interval(STATUS_REST);
    rest.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let looker = world.client("looker", Role::Operator, None)?;
    let mut look = Box::pin(status(&looker));
    loop {
        tokio::select! {
            ended = tasks.join_next() => match ended {
                Some(ended) => batches.extend(ended??),
                None => break,
            },
            seen = &mut look => {
                meanwhile.push(seen?.1);
                rest.tick().await;
                look = Box::pin(status(&looker));
            }
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    drop(look);
    let coordinator_cpu_s = world.cpu_s("coordinator")? - before_s;
    // All of them are there.
    let start = Instant::now();
    loop {
        let (now, _) = status(&looker).await?;
        let states = now.regions.values().flat_map(|region| &region.states);
        let active = states.filter(|(state, _)| **state == MachineState::Active);
        if active.map(|(_, count)| *count as usize).sum::<usize>() == each * world.regions.len() {
            break;
        }
        ensure!(start.elapsed() < COUNTED_TIMEOUT, "not all machines are counted: {now:?}");
        tokio::time::sleep(STATUS_REST).await;
    }
    let mut at_rest = vec![];
    for _ in 0..100 {
        at_rest.push(status(&looker).await?.1);
    }
    world.check()?;
    let refused = world.refused().await?;
    ensure!(refused.is_empty(), "calls were refused: {refused:?}");
    Ok(Report {
        machines: each * world.regions.len(),
        states: STATES.len(),
        regions: world.regions.len(),
        seconds,
        coordinator_cpu_s,
        batch: Spread::of(batches),
        status: Spread::of(meanwhile),
        status_at_rest: Spread::of(at_rest),
    })
}
