//! From a goal's setting until it is stored in each region.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::ensure;
use serde::Serialize;
use shoal_client::types::DeployRequest;
use shoal_pki::Role;
use shoal_proto::{
    Revision, codec,
    goal::{GOAL_MAX_BYTES, SignedGoal},
};

use crate::{
    times::Spread,
    world::{Shape, World, app},
};

/// How often the regions' files are looked at: no time is more exact.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// How long a goal may take.
const GOAL_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Debug, Serialize)]
pub(crate) struct Report {
    etcd: bool,
    regions: usize,
    /// Until the call is answered.
    answered: Spread,
    /// From the call until a region process has the goal in its file: of each goal in each region.
    stored: Spread,
    /// Until the last region has it.
    stored_everywhere: Spread,
}

impl Report {
    pub(crate) fn print(&self) {
        let etcd = if self.etcd { "and by etcd" } else { "by the coordinator alone" };
        println!("goal set -> stored in each of {} regions, {etcd}", self.regions);
        println!("  the call is answered   {}", self.answered);
        println!("  stored in a region     {}", self.stored);
        println!("  stored in all of them  {}", self.stored_everywhere);
    }
}

/// The revision in a file; none while there is none.
fn revision(path: &Path) -> anyhow::Result<Option<Revision>> {
    match fs::read(path) {
        Ok(bytes) => {
            let signed: SignedGoal = codec::decode(&bytes, GOAL_MAX_BYTES)?;
            Ok(Some(signed.decode_unverified()?.revision))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

pub(crate) async fn measure(shape: Shape<'_>, goals: usize) -> anyhow::Result<Report> {
    let etcd = shape.etcd;
    let mut world = World::start(Shape { region_processes: true, ..shape }).await?;
    let client = world.client("bench", Role::Operator, None)?;
    client.set_app(&app("data")?).await?;
    let artifact = world.publish(&client, "data").await?;
    let request = DeployRequest { app: artifact.app.clone(), artifact: artifact.name };
    let files =
        world.regions.iter().map(|region| world.data(region.as_str()).join("goals/data.goal"));
    let files: Vec<PathBuf> = files.collect();
    let (mut answered, mut stored, mut everywhere) = (vec![], vec![], vec![]);
    for _ in 0..goals {
        let start = Instant::now();
        // The coordinator makes the goal the region's before it answers: files are looked at meanwhile.
        let call = client.deploy(&request);
        let before: Vec<_> = files.iter().map(|file| revision(file)).collect::<Result<_, _>>()?;
        let look = async {
            let mut seen = vec![None; files.len()];
            while seen.iter().any(Option::is_none) {
                ensure!(
                    start.elapsed() < GOAL_TIMEOUT,
                    "a goal is not stored after {GOAL_TIMEOUT:?}"
                );
                for (at, file) in files.iter().enumerate() {
                    if seen[at].is_none() && revision(file)? != before[at] {
                        seen[at] = Some(start.elapsed());
                    }
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
            Ok(seen.into_iter().flatten().collect::<Vec<_>>())
        };
        let call = async {
            let rollout = call.await?;
            Ok((rollout.revision, start.elapsed()))
        };
        let ((wanted, took), seen) = tokio::try_join!(call, look)?;
        for file in &files {
            ensure!(revision(file)? == Some(wanted), "another goal than {wanted} is stored");
        }
        answered.push(took);
        everywhere.push(seen.iter().copied().max().unwrap_or_default());
        stored.extend(seen);
        world.check()?;
    }
    Ok(Report {
        etcd,
        regions: files.len(),
        answered: Spread::of(answered),
        stored: Spread::of(stored),
        stored_everywhere: Spread::of(everywhere),
    })
}
