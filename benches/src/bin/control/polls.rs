//! Machines that ask a region process for their goals, over connections that stay open.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde::Serialize;
use shoal_client::types::DeployRequest;
use shoal_pki::Role;
use shoal_proto::{AppName, Revision, region::goals_digest};

use crate::{
    machines::{Group, MACHINES_MAX, Machines},
    times::Spread,
    world::{Shape, World, app},
};

/// How long is measured: connections at rest, over one whole round of what a region process tells each machine by itself, and then
/// polls.
const REST: Duration = Duration::from_secs(90);
const POLLS: Duration = Duration::from_secs(60);

/// For how many machines of a region it is reckoned.
const MACHINES: f64 = 100_000.0;

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
    let mut groups = Vec::new();
    for first in (0..connections).step_by(MACHINES_MAX) {
        groups.push(Machines::start(&Group {
            dir: world.dir().into(),
            region: region.clone(),
            addr,
            number: u8::try_from(groups.len()).context("too many connections")?,
            first,
            count: MACHINES_MAX.min(connections - first),
            digest,
            every: Duration::from_secs_f64(connections as f64 / per_s),
            polls: POLLS,
        })?);
    }
    for group in &mut groups {
        group.connected()?;
    }

    let (before_s, start) = (world.cpu_s(region.as_str())?, Instant::now());
    tokio::time::sleep(REST).await;
    let cores_at_rest = cores(before_s, start, &world)?;
    let rss_anon_at_rest_bytes = world.rss_anon_bytes(region.as_str())?;

    let (before_s, start) = (world.cpu_s(region.as_str())?, Instant::now());
    for group in &mut groups {
        group.poll()?;
    }
    let (mut answers, mut changed, mut open) = (vec![], 0, 0);
    for group in &mut groups {
        let polled = group.polled()?;
        answers.extend(polled.took);
        changed += polled.changed;
        open += polled.open;
    }
    let seconds = start.elapsed().as_secs_f64();
    let cores = cores(before_s, start, &world)?;
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
