//! `shoal replication`, `pin`, `unpin`, `pins`, `gc`.

use std::{io::IsTerminal as _, time::Duration};

use shoal_client::types::{
    Artifact, GcApp, GcReport, GcRequest, Pin, PinRequest, RegionReplication, ReplicationStatusPage,
};
use shoal_proto::{AppName, state::ReplicationStatus};

use crate::{connect::Connection, jobs::LIST_LIMIT, show};

/// How often `--watch` looks.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// Clears a terminal.
const CLEAR: &str = "\u{1b}[H\u{1b}[2J";

#[derive(clap::Args)]
pub(crate) struct ReplicationArgs {
    /// An artifact's name or id; without it all that are not whole in some bucket.
    artifact: Option<String>,
    /// Show it again every second, until nothing is left to be copied; with --json a line each time.
    #[arg(long)]
    watch: bool,
    /// Have the artifact's copies inspected at once, in all buckets.
    #[arg(long, requires = "artifact")]
    inspect: bool,
    /// How many artifacts at most.
    #[arg(long, default_value_t = LIST_LIMIT, value_parser = show::at_least_one())]
    limit: u32,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
pub(crate) struct PinArgs {
    /// Its name (APP/SHA12-JOB) or id.
    artifact: String,
    /// Why, for those who look.
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
pub(crate) struct UnpinArgs {
    /// Its name (APP/SHA12-JOB) or id.
    artifact: String,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
pub(crate) struct PinsArgs {
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
pub(crate) struct GcArgs {
    /// Only show what would go and why the rest stays.
    #[arg(long)]
    dry_run: bool,
    /// Only artifacts of this app.
    #[arg(long)]
    app: Option<AppName>,
    /// How many of each app's newest stay beside those in use [default: as the app says, else as the coordinator is
    /// configured].
    #[arg(long, value_name = "K")]
    keep: Option<u32>,
    #[command(flatten)]
    connection: Connection,
}

impl ReplicationArgs {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let client = self.connection.client()?;
        if let (true, Some(artifact)) = (self.inspect, &self.artifact) {
            client.inspect(artifact).await?;
        }
        let terminal = std::io::stdout().is_terminal();
        loop {
            let page = client.replication(self.artifact.as_deref(), self.limit).await?;
            if !self.watch {
                return show::print_as(self.connection.json, &page, replication);
            }
            let clear = if terminal { CLEAR } else { "" };
            show::stream_as(self.connection.json, &page, |page| {
                format!("{clear}{}", replication(page))
            })?;
            let left = page
                .artifacts
                .iter()
                .any(|artifact| artifact.deleted.is_none() && !artifact.deployable);
            if !left {
                return Ok(());
            }
            tokio::time::sleep(WATCH_EVERY).await;
        }
    }
}

impl PinArgs {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let request = PinRequest { artifact: self.artifact, reason: self.reason };
        let pin = self.connection.client()?.pin(&request).await?;
        show::print_as(self.connection.json, &pin, |pin| list_pins(std::slice::from_ref(pin)))
    }
}

impl UnpinArgs {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let client = self.connection.client()?;
        client.unpin(&self.artifact).await?;
        let pins = client.pins().await?;
        show::print_as(self.connection.json, &pins, |pins| list_pins(pins))
    }
}

impl PinsArgs {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let pins = self.connection.client()?.pins().await?;
        show::print_as(self.connection.json, &pins, |pins| list_pins(pins))
    }
}

impl GcArgs {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let request = GcRequest { dry_run: self.dry_run, app: self.app, keep: self.keep };
        let report = self.connection.client()?.gc(&request).await?;
        show::print_as(self.connection.json, &report, gc)
    }
}

fn rate(bytes_per_s: u64) -> String {
    if bytes_per_s == 0 { "-".into() } else { format!("{}/s", show::size(bytes_per_s)) }
}

fn eta(eta_s: Option<f64>) -> String {
    let whole = eta_s.map(|eta_s| show::duration(Duration::from_secs_f64(eta_s.clamp(0.0, 1e9))));
    whole.unwrap_or_else(|| "-".into())
}

fn state(region: &RegionReplication) -> &'static str {
    match (region.drained, region.observed) {
        (true, _) => "drained",
        (false, true) => "observed",
        (false, false) => "in service",
    }
}

fn replication(page: &ReplicationStatusPage) -> String {
    let mut table = show::table(&[
        "REGION", "STATE", "COMPLETE", "COPYING", "PENDING", "FAILED", "LEFT", "RATE", "ETA",
        "DRAINED",
    ]);
    for (name, region) in &page.regions {
        let count = |status| region.copies.get(&status).copied().unwrap_or_default().to_string();
        table.add_row([
            name.to_string(),
            state(region).into(),
            count(ReplicationStatus::Complete),
            count(ReplicationStatus::Copying),
            count(ReplicationStatus::Pending),
            count(ReplicationStatus::Failed),
            show::size(region.bytes_left),
            rate(region.bytes_per_s),
            eta(region.eta_s),
            region.drain.as_ref().map(show::halted).unwrap_or_default(),
        ]);
    }
    let mut text = show::render(&table, "the coordinator's configuration names no regions");
    if page.artifacts.is_empty() {
        return text + "\n\nall artifacts are whole in all buckets";
    }
    for artifact in &page.artifacts {
        text = format!("{text}\n\n{}", copies(artifact));
    }
    text
}

fn copies(artifact: &Artifact) -> String {
    let mut table =
        show::table(&["REGION", "STATUS", "DONE", "OF", "RATE", "ETA", "INSPECTED", "REASON"]);
    for (region, copy) in &artifact.replication {
        table.add_row([
            region.to_string(),
            copy.status.to_string(),
            show::size(copy.bytes_done),
            show::size(artifact.encoded_bytes),
            if copy.eta_s.is_some() { rate(copy.bytes_per_s) } else { "-".into() },
            eta(copy.eta_s),
            copy.checked_at_ms.map_or_else(|| "-".into(), show::ago),
            copy.reason.clone().unwrap_or_default(),
        ]);
    }
    let deployable = match &artifact.not_deployable_reason {
        None => "deployable".into(),
        Some(reason) => format!("not deployable: {reason}"),
    };
    let head = format!("{}: {}, {deployable}", artifact.name, artifact.replication_status);
    format!("{head}\n{}", show::render(&table, "no copies"))
}

fn list_pins(pins: &[Pin]) -> String {
    let mut table = show::table(&["ARTIFACT", "BY", "SINCE", "REASON"]);
    for pin in pins {
        table.add_row([
            pin.artifact.clone(),
            pin.by.clone(),
            show::ago(pin.at_ms),
            pin.reason.clone().unwrap_or_default(),
        ]);
    }
    show::render(&table, "nothing is pinned")
}

fn gc(report: &GcReport) -> String {
    let mut table = show::table(&["ARTIFACT", "STORED", "MADE", "", "WHY"]);
    let (gone, goes) = if report.dry_run { ("would go", "would free") } else { ("gone", "frees") };
    let count = |of: fn(&GcApp) -> usize| report.apps.values().map(of).sum::<usize>();
    for app in report.apps.values() {
        let all = app.goes.iter().map(|it| (gone, it));
        for (what, it) in all.chain(app.stays.iter().map(|it| ("stays", it))) {
            table.add_row([
                it.name.clone(),
                show::size(it.encoded_bytes),
                show::ago(it.created_at_ms),
                what.into(),
                it.why.clone(),
            ]);
        }
    }
    let sum = format!(
        "{} {gone}, {} stay; {goes} {} in each bucket",
        count(|app| app.goes.len()),
        count(|app| app.stays.len()),
        show::size(report.freed_bytes),
    );
    format!("{}\n\n{sum}", show::render(&table, "no artifacts"))
}
