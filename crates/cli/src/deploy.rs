//! `shoal deploy`, `rollback`, `status`.

use std::{collections::BTreeMap, io::IsTerminal as _, time::Duration};

use anyhow::bail;
use shoal_client::{
    Client,
    types::{AppStatus, DeployRequest, RollbackRequest, Rollout, RolloutRegion},
};
use shoal_proto::{
    AppName,
    state::{MachineState, RolloutStatus},
};

use crate::{connect::Connection, show};

/// How often a rollout that is followed is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

#[derive(clap::Args)]
pub(crate) struct DeployArgs {
    /// The app.
    app: AppName,
    /// The artifact's name (APP/SHA12-JOB) or id.
    artifact: String,
    /// Wait for the rollout's end; exit 1 unless it SUCCEEDED.
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
pub(crate) struct RollbackArgs {
    /// The app.
    app: AppName,
    /// The artifact's name or id; by default what ran before the present one.
    artifact: Option<String>,
    /// Wait for the rollout's end; exit 1 unless it SUCCEEDED.
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Subcommand)]
pub(crate) enum RolloutCommand {
    /// Let no further wave open; what is open goes on. The time does not count towards the deadline.
    Pause(RolloutArgs),
    /// Let a paused rollout go on.
    Resume(RolloutArgs),
    /// Cancel it: the goal stays, no further wave opens.
    Cancel(RolloutArgs),
}

#[derive(clap::Args)]
pub(crate) struct RolloutArgs {
    /// The app, whose present rollout it is.
    app: AppName,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
pub(crate) struct StatusArgs {
    /// Only this app.
    app: Option<AppName>,
    /// Show it again every second until interrupted; with --json a line each time.
    #[arg(long)]
    watch: bool,
    #[command(flatten)]
    connection: Connection,
}

impl DeployArgs {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let client = self.connection.client()?;
        let rollout = deploy(&client, &self.app, &self.artifact).await?;
        end(&client, rollout, self.wait, self.connection.json).await
    }
}

impl RollbackArgs {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let client = self.connection.client()?;
        let request = RollbackRequest { app: self.app, artifact: self.artifact };
        let rollout = client.rollback(&request).await?;
        end(&client, rollout, self.wait, self.connection.json).await
    }
}

impl RolloutCommand {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let (Self::Pause(args) | Self::Resume(args) | Self::Cancel(args)) = &self;
        let client = args.connection.client()?;
        let status = client.status(Some(&args.app)).await?;
        let Some(rollout) = status.into_iter().find_map(|status| status.rollout) else {
            bail!("{} was never deployed: shoal deploy {} ARTIFACT does so", args.app, args.app);
        };
        let rollout = match &self {
            Self::Pause(_) => client.pause_rollout(rollout.id, true).await?,
            Self::Resume(_) => client.pause_rollout(rollout.id, false).await?,
            Self::Cancel(_) => client.cancel_rollout(rollout.id).await?,
        };
        show::print_as(args.connection.json, &rollout, |rollout| {
            format!("rollout {} of {} is {}", rollout.id, rollout.app, rollout.status)
        })
    }
}

impl StatusArgs {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let client = self.connection.client()?;
        if !self.watch {
            let status = client.status(self.app.as_ref()).await?;
            return show::print_as(self.connection.json, &status, |status| list(status));
        }
        let clear = if std::io::stdout().is_terminal() { "\x1b[H\x1b[2J" } else { "" };
        loop {
            match client.status(self.app.as_ref()).await {
                Ok(status) => show::stream_as(self.connection.json, &status, |status| {
                    format!("{clear}{}", list(status))
                })?,
                Err(error) if error.may_pass() => show::again(&error),
                Err(error) => return Err(error.into()),
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

/// Sets an app's goal.
pub(crate) async fn deploy(
    client: &Client,
    app: &AppName,
    artifact: &str,
) -> anyhow::Result<Rollout> {
    let request = DeployRequest { app: app.clone(), artifact: artifact.into() };
    Ok(client.deploy(&request).await?)
}

async fn end(client: &Client, rollout: Rollout, wait: bool, json: bool) -> anyhow::Result<()> {
    if wait {
        return wait_and_show(client, rollout, json).await;
    }
    show::print_as(json, &rollout, |rollout| {
        format!(
            "rollout {}: {} goes to {} (follow it: shoal status {} --watch)",
            rollout.id, rollout.artifact_name, rollout.app, rollout.app
        )
    })
}

/// Waits for a rollout's end and shows it; an error unless it SUCCEEDED.
pub(crate) async fn wait_and_show(
    client: &Client,
    mut rollout: Rollout,
    json: bool,
) -> anyhow::Result<()> {
    let mut said = String::new();
    while !rollout.status.is_terminal() {
        tokio::time::sleep(LOOK_EVERY).await;
        match client.rollout(rollout.id).await {
            Ok(new) => rollout = new,
            Err(error) if error.may_pass() => show::again(&error),
            Err(error) => return Err(error.into()),
        }
        let now = states(&total(&rollout).states);
        if !json && now != said {
            show::note(&format!("rollout {} {}: {now}", rollout.id, rollout.status));
            said = now;
        }
    }
    show::print_as(json, &rollout, |rollout| {
        list(&[AppStatus { app: rollout.app.clone(), rollout: Some(rollout.clone()) }])
    })?;
    if rollout.status != RolloutStatus::Succeeded {
        let reason = rollout.reason.as_deref().unwrap_or("no reason given");
        bail!(
            "rollout {} is {}: {reason} (the machines: shoal machines --app {} --failed)",
            rollout.id,
            rollout.status,
            rollout.app
        );
    }
    Ok(())
}

/// A rollout over all its regions.
pub(crate) fn total(rollout: &Rollout) -> RolloutRegion {
    let mut sum = RolloutRegion::default();
    for region in rollout.regions.values() {
        sum.machines += region.machines;
        sum.pieces += region.pieces;
        sum.pieces_total += region.pieces_total;
        sum.origin_bytes += region.origin_bytes;
        sum.peer_bytes += region.peer_bytes;
        for (state, count) in &region.states {
            *sum.states.entry(*state).or_default() += count;
        }
    }
    sum
}

/// How many machines are in each state: `5 ACTIVE, 3 FETCHING`.
pub(crate) fn states(states: &BTreeMap<MachineState, u64>) -> String {
    let counts: Vec<_> = states
        .iter()
        .filter(|(_, count)| **count > 0)
        .map(|(state, count)| format!("{count} {state}"))
        .collect();
    if counts.is_empty() { "no reports yet".into() } else { counts.join(", ") }
}

/// How much of the pieces is there, in per cent.
fn fetched(region: &RolloutRegion) -> String {
    match (region.pieces * 100).checked_div(region.pieces_total) {
        Some(percent) => format!("{percent} %"),
        None => "-".into(),
    }
}

fn list(apps: &[AppStatus]) -> String {
    let mut table = show::table(&[
        "APP", "ROLLOUT", "STATUS", "ARTIFACT", "REGION", "MACHINES", "FETCHED", "COPIES", "STATES",
    ]);
    for AppStatus { app, rollout } in apps {
        let Some(rollout) = rollout else {
            table.add_row([app.as_str(), "-", "never deployed"]);
            continue;
        };
        let mut first = [
            app.to_string(),
            rollout.id.to_string(),
            rollout.status.to_string(),
            rollout.artifact_name.clone(),
        ];
        if rollout.regions.is_empty() {
            table.add_row(first.clone());
        }
        for (name, region) in &rollout.regions {
            let rest = [
                name.to_string(),
                region.machines.to_string(),
                fetched(region),
                format!("{:.2}", region.origin_copies),
                states(&region.states),
            ];
            table.add_row(first.iter().cloned().chain(rest));
            // The rollout is said once, its regions stand under it.
            first = Default::default();
        }
        if let Some(reason) = &rollout.reason {
            table.add_row(["".into(), "".into(), format!("({reason})")]);
        }
    }
    show::render(&table, "no apps yet: register one with shoal app set")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_counted_in_the_order_of_their_life() {
        let counts = BTreeMap::from([
            (MachineState::Active, 5),
            (MachineState::Fetching, 3),
            (MachineState::Failed, 0),
        ]);
        assert_eq!(states(&counts), "3 FETCHING, 5 ACTIVE");
        assert_eq!(states(&BTreeMap::new()), "no reports yet");
        assert_eq!(fetched(&RolloutRegion::default()), "-");
    }
}
