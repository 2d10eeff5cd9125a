//! `shoal machines`, `regions`, `drain`, `undrain`.

use shoal_client::types::{HaltRequest, Machine, Region};
use shoal_proto::{AppName, MachineName, RegionName};

use crate::{connect::Connection, queue, show};

#[derive(clap::Args)]
pub(crate) struct MachinesArgs {
    /// Only machines of this region.
    #[arg(long)]
    region: Option<RegionName>,
    /// Only machines that follow this app, and only what they do about it.
    #[arg(long)]
    app: Option<AppName>,
    /// Only machines that failed an app (FAILED, ROLLED_BACK, UNREACHABLE).
    #[arg(long)]
    failed: bool,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
pub(crate) struct RegionsArgs {
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
pub(crate) struct DrainArgs {
    #[command(flatten)]
    of: DrainOf,
    /// Why, for those who look.
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
pub(crate) struct UndrainArgs {
    #[command(flatten)]
    of: DrainOf,
    #[command(flatten)]
    connection: Connection,
}

/// What is taken out of service or put back.
#[derive(clap::Args)]
#[group(required = true, multiple = false)]
struct DrainOf {
    /// The region.
    region: Option<RegionName>,
    /// A worker instead: it finishes what it has, and takes nothing more.
    #[arg(long, value_name = "WORKER")]
    worker: Option<MachineName>,
}

impl MachinesArgs {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let client = self.connection.client()?;
        let mut machines = client.machines(self.region.as_ref(), self.app.as_ref()).await?;
        if let Some(app) = &self.app {
            for machine in &mut machines {
                machine.apps.retain(|entry| entry.report.app == *app);
            }
        }
        if self.failed {
            for machine in &mut machines {
                machine.apps.retain(|entry| entry.report.state.is_failure());
            }
            machines.retain(|machine| !machine.apps.is_empty());
        }
        let nothing = if self.failed { "no machine failed" } else { "no machines yet" };
        show::print_as(self.connection.json, &machines, |machines| list(machines, nothing))
    }
}

impl RegionsArgs {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let regions = self.connection.client()?.regions().await?;
        show::print_as(self.connection.json, &regions, |regions| list_regions(regions))
    }
}

impl DrainArgs {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        self.of.set(&self.connection, Some(HaltRequest { reason: self.reason })).await
    }
}

impl UndrainArgs {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        self.of.set(&self.connection, None).await
    }
}

impl DrainOf {
    /// Takes it out of service, or with no request puts it back.
    async fn set(&self, connection: &Connection, drain: Option<HaltRequest>) -> anyhow::Result<()> {
        let client = connection.client()?;
        if let Some(worker) = &self.worker {
            let worker = match drain {
                Some(request) => client.drain_worker(worker, &request).await?,
                None => client.undrain_worker(worker).await?,
            };
            return show::print_as(connection.json, &worker, |worker| {
                queue::list_workers(std::slice::from_ref(worker))
            });
        }
        let Some(region) = &self.region else { anyhow::bail!("which region or worker?") };
        let region = match drain {
            Some(request) => client.drain_region(region, &request).await?,
            None => client.undrain_region(region).await?,
        };
        show::print_as(connection.json, &region, |region| {
            list_regions(std::slice::from_ref(region))
        })
    }
}

fn list(machines: &[Machine], nothing: &str) -> String {
    let mut table = show::table(&[
        "MACHINE", "REGION", "ZONE", "SEEN", "APP", "STATE", "REVISION", "ARTIFACT", "PIECES",
        "REASON",
    ]);
    for machine in machines {
        let mut first = [
            machine.name.to_string(),
            machine.region.to_string(),
            machine.zone.clone(),
            show::ago(machine.last_seen_at_ms),
        ];
        if machine.apps.is_empty() {
            table.add_row(first.clone());
        }
        for entry in &machine.apps {
            let report = &entry.report;
            let rest = [
                report.app.to_string(),
                report.state.to_string(),
                report.revision.to_string(),
                // Enough to tell artifacts apart; the whole id is in the JSON.
                report.artifact.to_string()[..12].to_string(),
                format!("{}/{}", report.progress.pieces, report.progress.pieces_total),
                report.reason.clone().unwrap_or_default(),
            ];
            table.add_row(first.iter().cloned().chain(rest));
            first = Default::default();
        }
    }
    show::render(&table, nothing)
}

fn list_regions(regions: &[Region]) -> String {
    let mut table = show::table(&["REGION", "STATE", "MACHINES", "PROCESSES", "DRAINED"]);
    for region in regions {
        let processes: Vec<_> = region
            .processes
            .iter()
            .map(|(name, seen)| format!("{name} ({})", show::ago(*seen)))
            .collect();
        table.add_row([
            region.name.to_string(),
            if region.drained { "drained" } else { "in service" }.into(),
            region.machines.to_string(),
            if processes.is_empty() { "none".into() } else { processes.join(", ") },
            region.drain.as_ref().map(show::halted).unwrap_or_default(),
        ]);
    }
    show::render(&table, "the coordinator's configuration names no regions")
}
